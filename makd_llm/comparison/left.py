"""What a run of a comparison has left for the table, and whether it is whole: the measurements of
its models, and what metrics.jsonl says of the steps that its student learnt in.
"""

from pydantic import BaseModel, Field

from makd_llm.comparison.grid import Grid, Item
from makd_llm.evaluation.measured import Measured, read_measured


class Damaged(Exception):
    """A file that the table needs is not there, or damaged. stages: those that have to run again
    for it to be made again.
    """

    def __init__(self, said: str, stages: tuple[str, ...]) -> None:
        super().__init__(said)
        self.stages = stages


class Step(BaseModel):
    """A line of metrics.jsonl: tokens and seconds over all ranks; the peak, where it is known, of
    the rank that needed most.
    """

    stage: str
    tokens: int = Field(ge=0, lt=2**63)
    seconds: float = Field(allow_inf_nan=False)
    peak_memory_MB: float | None = Field(default=None, allow_inf_nan=False)


def measured_of(grid: Grid, item: Item, name: str) -> Measured:
    """What a run has measured of a model. Raises Damaged."""
    place = f"{item.place}/measured/{name}.json"
    found = read_measured(grid.folder / place)
    if found is None:
        raise Damaged(f"{place}: not there, or damaged", (item.until,))
    return found


def steps_of(grid: Grid, item: Item) -> list[Step]:
    """Every step of a run's distil stage. Raises Damaged."""
    place, steps = f"{item.place}/metrics.jsonl", item.config.distil.train.steps
    try:
        text = (grid.folder / place).read_text(encoding="utf-8")
        lines = [Step.model_validate_json(line) for line in text.splitlines()]
        found = [line for line in lines if line.stage == "distil"]
        wrong = None if len(found) == steps else f"{len(found)} of {steps} steps are in it"
    except OSError as error:
        wrong = error.strerror
    except ValueError:
        wrong = "damaged"
    if wrong:
        # The student may be another one now, where the machine does not repeat itself.
        raise Damaged(f"{place}: {wrong}", ("distil", "merge", "evaluate"))
    return found


def damage(grid: Grid, item: Item) -> Damaged | None:
    """The first file that the table needs of a finished run and cannot have; None: it has all."""
    names = {"evaluate": ("student",), "baselines": (grid.lead, "teacher", "factorized")}
    try:
        for name in names.get(item.until, ()):
            measured_of(grid, item, name)
        if item.until == "evaluate":
            steps_of(grid, item)
    except Damaged as found:
        return found
    return None
