"""A comparison with every row on the tiny teacher: one keep ratio, two seeds, two steps."""

from pathlib import Path

import pytest

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
