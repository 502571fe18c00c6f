"""How a run ends early, each with its exit code. The command line shows them as one line, without a
traceback.

Everything else that is raised is a defect of the program and keeps its traceback.
"""


class RunEnded(Exception):
    """A run that ended before its end, on purpose. `exit_code` is what the process exits with.
    alone: one rank may raise it while the others know nothing of it.
    """

    exit_code = 1
    alone = False


class UserError(RunEnded):
    """Wrong input: the message says in one line what is wrong, where, and what to do about it."""

    exit_code = 2


class Interrupted(RunEnded):
    """SIGTERM or SIGINT: the state is saved, and the same command goes on from it (75:
    EX_TEMPFAIL).
    """

    exit_code = 75


class Unavailable(RunEnded):
    """A service did not answer, however often it was asked; what it answered before is kept, and
    the same command goes on from it (69: EX_UNAVAILABLE).
    """

    exit_code = 69


class OutOfMemory(RunEnded):
    """Memory was missing, most often on one rank: the same command would meet it again (71:
    EX_OSERR).
    """

    exit_code = 71
    alone = True


class Disconnected(RunEnded):
    """Another rank did not answer in time, or the connection to it broke; what was saved before
    stands, and the same command goes on from it (74: EX_IOERR).
    """

    exit_code = 74
    alone = True


class RankFailed(RunEnded):
    """Another rank has ended, and this is what it said."""

    alone = True

    def __init__(self, says: str, exit_code: int = 1) -> None:
        super().__init__(says)
        self.exit_code = exit_code


class RowsFailed(RunEnded):
    """Some rows of a comparison could not be made; the others stand."""


class Diverged(RunEnded):
    """Too many steps in a row whose loss or gradient was not finite."""

    exit_code = 65
