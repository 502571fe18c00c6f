"""What a comparison remembers of each of its runs, in row.json of the run's folder.

`stamp` is a name of everything that the run's result depends on: its config, DeepSpeed's JSON, the
content of the data, and the files of the models that it was given. A result under another stamp
does not count.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from makd_llm.comparison.grid import Grid, Item
from makd_llm.comparison.left import damage
from makd_llm.data.records import content_of
from makd_llm.files import sample_of_folder, write_json
from makd_llm.redaction import without_secrets
from makd_llm.train.deepspeed_config import read_deepspeed_config

UNUSED = {
    "sft": {"student", "distil", "evaluation", "merge"},
    "baselines": {"distil", "merge"},
    "evaluate": set[str](),
}
"""The sections of a config that a run does not come to, by its last stage."""
State = Literal["running", "done", "failed"]
FILE = "row.json"


@dataclass(frozen=True)
class Record:
    """The last word of a run. seconds: from its start to its end, of the attempt that ended it."""

    state: State
    stamp: str
    error: str | None = None
    seconds: float | None = None

    @property
    def why(self) -> str:
        """Of a run that failed, in words."""
        return self.error or "it left no word of why"


def read_record(run_dir: Path) -> Record | None:
    """None where the run was never started, or its word is damaged."""
    try:
        return Record(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_record(run_dir: Path, record: Record) -> None:
    """Leaves the last word of a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    error = None if record.error is None else without_secrets(record.error)
    write_json(run_dir / FILE, {**asdict(record), "error": error}, durable=True)


class Stamps:
    """The stamps of a comparison's runs. The data is read once, when this is made.

    Raises UserError where DeepSpeed's JSON, or the data, is not there or wrong.
    """

    def __init__(self, grid: Grid) -> None:
        data = grid.base.data
        validation = data.validation_source or data.source
        self._grid = grid
        teacher = Path(grid.base.teacher.model).expanduser()
        self._common = {
            "teacher": sample_of_folder(teacher) if teacher.is_dir() else None,
            "train": content_of(data.source, data.train_split, streaming=data.streaming),
            "validation": content_of(validation, data.validation_split),
            "ds": read_deepspeed_config(grid.config.ds),
        }

    def of(self, item: Item) -> str:
        """The stamp that the item's run would have now."""
        needs = None if item.needs is None else self._grid.shared[item.needs]
        given = {
            "config": item.config.model_dump(mode="json", exclude=UNUSED[item.until]),
            **self._common,
            "needs": None if needs is None else self.of(needs),
            "files": None if needs is None else self._files(needs),
        }
        text = json.dumps(given, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _files(self, item: Item) -> str | None:
        folder = (
            self._grid.folder / item.place / ("teacher" if item.until == "sft" else "factorized")
        )
        return sample_of_folder(folder) if folder.is_dir() else None

    def stands(self, item: Item) -> bool:
        """Whether the item's result is there, made from what there is now, and the table can be
        made of it.
        """
        found = self.record_of(item)
        return found is not None and found.state == "done" and damage(self._grid, item) is None

    def record_of(self, item: Item) -> Record | None:
        """The last word of the item's run; None where it is of another stamp, or there is none."""
        found = read_record(self._grid.folder / item.place)
        return found if found is not None and found.stamp == self.of(item) else None
