"""Models against each other, by what each scored on the same documents."""
# S seeds, N documents

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from makd_llm.errors import UserError
from makd_llm.evaluation.measured import Measured, read_measured
from makd_llm.evaluation.significance import Difference, Scores, paired_difference

METRICS = ("rouge1", "rouge2", "rougeLsum")
PER_TOKEN = "nats_per_token"
"""The logarithm of the perplexity, as a mean over documents: what tests are made of."""
STUDENT = "measured/student.json"
OF_A_MODEL = ("model", "dtype")
"""What two measurements' keys may differ in."""


def scores_of(measured: Sequence[Measured]) -> dict[str, Scores]:
    """metric -> (S, N), of models that differ in their seed. Nats are each document's share of the
    mean per token, which their mean is.
    """
    found = {metric: np.array([m.scores[metric] for m in measured]) for metric in METRICS}
    if all("nats" in m.scores for m in measured):
        nats = np.array([m.scores["nats"] for m in measured])
        found[PER_TOKEN] = nats * nats.shape[1] / measured[0].row["perplexity"]["tokens"]
    return found


def differences(measured: Sequence[Measured], others: Sequence[Measured]) -> dict[str, Difference]:
    """metric -> how far the first are above the others; both of the same documents and seeds."""
    theirs = scores_of(others)
    return {
        metric: paired_difference(scores, theirs[metric])
        for metric, scores in scores_of(measured).items()
        if metric in theirs
    }


def students_apart(run_dir: Path, other_dir: Path) -> dict[str, Difference]:
    """metric -> how far a run's student is above another's.

    Raises:
        UserError: one was not measured, or they were measured differently.
    """
    one, other = (_student(folder) for folder in (run_dir, other_dir))
    names = dict.fromkeys([*one.key, *other.key])
    unlike = [n for n in names if n not in OF_A_MODEL and one.key.get(n) != other.key.get(n)]
    if unlike:
        raise UserError(
            f"{run_dir} and {other_dir} were measured differently ({', '.join(unlike)}); measure "
            "both on the same documents in the same way"
        )
    return differences([one], [other])


def _student(run_dir: Path) -> Measured:
    found = read_measured(run_dir / STUDENT)
    if found is None:
        raise UserError(
            f"{run_dir / STUDENT}: not there, or damaged; run `makd train` with run_dir={run_dir} "
            "to the end"
        )
    return found
