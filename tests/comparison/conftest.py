"""A comparison with every row on the tiny teacher: one keep ratio, two seeds, two steps."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from makd_llm.comparison.grid import Grid, Item, build_grid
from makd_llm.config import load_comparison
from makd_llm.evaluation import rouge
from makd_llm.evaluation.measured import Measured, write_measured

CHECKOUT = Path(__file__).resolve().parents[2]

HEAD = """
name: tiny
folder: {folder}
ds: {checkout}/ds_configs/zero1.json
keep_ratios: [0.5]
seeds: [0, 1]
run:
  teacher: {{model: {tiny}/teacher}}
  data: {{source: {tiny}, max_length: 64}}
  sft: {{enabled: true, train: {{steps: 1, batch_size: 2}}}}
  student: {{rank_multiple: 4, calibration_records: 4, calibration_batch: 4}}
  distil: {{train: {{steps: 2, batch_size: 2, learning_rate: 1.0e-3, checkpoint_every: 2}}}}
  evaluation: {{records: 8, generate_records: 8, max_new_tokens: 4, batch_size: 8}}
"""


def rows_of(name: str) -> str:
    """The rows of a comparison that is shipped, as YAML."""
    text = (CHECKOUT / "configs" / "compare" / f"{name}.yaml").read_text()
    return text[text.index("\nrows:") + 1 :]


@pytest.fixture(scope="package")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison's YAML, with the rows of configs/compare/dialogsum.yaml."""
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "tiny.yaml"
    head = HEAD.format(folder=folder / "made", checkout=CHECKOUT, tiny=tiny)
    path.write_text(head + rows_of("dialogsum"))
    return path


@pytest.fixture
def grid(config: Path, tmp_path: Path) -> Grid:
    """Two rows of its first seed, in a folder of their own."""
    checked = load_comparison(config, []).model_copy(update={"folder": tmp_path / "made"})
    return build_grid(checked).chosen(["kd", "makd"], None, [0])


@pytest.fixture
def leave() -> Callable[..., None]:
    """Leaves what a finished run leaves for the table, beside its record: as stand-ins do."""

    def leave(grid: Grid, item: Item, documents: int = 3) -> None:
        folder = grid.folder / item.place
        names = {"evaluate": ["student"], "baselines": [grid.lead, "teacher", "factorized"]}
        nats = {"value": math.e, "nats": float(documents), "tokens": documents}
        for name in names.get(item.until, []):
            row = {"parameters": {"blocks": 1, "total": 2}, "perplexity": nats}
            scores = {m: [10.0 + place for place in range(documents)] for m in rouge.METRICS}
            measured = Measured(row, ["a text"] * documents, {**scores, "nats": [1.0] * documents})
            (folder / "measured").mkdir(parents=True, exist_ok=True)
            write_measured(folder / "measured" / f"{name}.json", {}, measured)
        folder.mkdir(parents=True, exist_ok=True)
        steps = range(1, item.config.distil.train.steps + 1)
        lines = [{"stage": "distil", "step": n, "tokens": 5, "seconds": 0.5} for n in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return leave
