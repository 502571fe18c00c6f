"""`makd doctor`: whether this machine can do what the project does, and what slows it down.

software.py looks at Python, packages and compilers; machine.py at cores, memory and disks;
accelerators.py at GPUs; surroundings.py at caches, the Hub and other programs. Each function looks
at one thing and returns what it finds; nothing is changed, and nothing is written but empty files,
which are gone at once. It works where packages are missing, and takes seconds.
"""

from collections.abc import Iterator
from pathlib import Path

from makd_llm.doctor import accelerators, machine, software, surroundings
from makd_llm.doctor.finding import Finding


def examine(ranks: int | None = None, runs: Path = Path("runs")) -> Iterator[Finding]:
    """All findings, one by one as they are made.

    ranks: processes of this machine; None: one for each GPU, without any two. runs: where run
    folders will be; it need not exist.
    """
    yield software.python()
    yield from software.packages()
    yield software.against_constraints()
    yield from software.compilers()
    yield from software.torch_build()
    yield from software.operators()
    yield software.triton()
    gpus = accelerators.count()
    yield from accelerators.gpus()
    yield from machine.instructions(gpus)
    yield machine.load()
    yield from machine.rates(gpus)
    yield machine.threads(ranks or gpus or 2, gpus)
    yield machine.memory()
    yield from machine.disks(runs)
    yield machine.shared_memory(gpus)
    yield surroundings.cache_folder()
    yield surroundings.builtin_files()
    yield surroundings.hub()
    yield from surroundings.programs()
