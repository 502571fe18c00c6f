"""A split written with the training engine: complete and in order on two sharded ranks as on one,
and the same texts, however they are drawn.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from makd_llm.config import DataConfig
from makd_llm.config.sequences import GenerationConfig
from makd_llm.errors import UserError
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import FP32_ZERO3

pytestmark = pytest.mark.slow

NEW = 6
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"method": "beam", "beams": 3, "per_document": 2},
    "sample": {"method": "sample", "per_document": 2, "top_p": 0.95, "temperature": 1.3},
}


def data_of(folder: Path) -> DataConfig:
    return DataConfig(source=str(folder / "train.jsonl"), max_length=64, limit=23)


def write_all(folder: str, out: str) -> dict[str, Any]:
    """Every way, in pieces of 5: 5 of them, so that one of two ranks has none at the end."""
    from makd_llm import distributed
    from makd_llm.teacher_summaries import Task, write_with_engine

    distributed.init()
    found = {}
    for name, way in WAYS.items():
        generation = GenerationConfig(max_new_tokens=NEW, batch_size=4, **way)
        teacher = Path(folder) / "teacher"
        task = Task(teacher, data_of(Path(folder)), generation, Path(out) / name, 11, piece=5)
        found[name] = write_with_engine(task, FP32_ZERO3, lambda text: None)
    return found


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders by number of ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"on-{ranks}")
        manifests = launch_ranks(ranks, write_all, str(tiny), str(folders[ranks]))
        assert all(manifest == manifests[0] for manifest in manifests)
    return folders


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_every_document_once_in_order_and_alike_on_one_rank_and_on_two(
    tiny: Path, written: dict[int, Path], way: str
) -> None:
    rows = rows_of(written[2] / way / "train.jsonl")
    manifest = json.loads((written[2] / way / "manifest.json").read_text())
    copies = WAYS[way].get("per_document", 1)
    expected = [row["id"] for row in rows_of(tiny / "train.jsonl")[:23] for _ in range(copies)]
    left_out = list(manifest["empty"])
    for id_ in left_out:
        expected.remove(id_)
    assert [row["id"] for row in rows] == expected
    assert manifest["summaries"] == len(rows) == 23 * copies - len(left_out)
    assert set(manifest["cut"]) <= set(expected) and len(manifest["cut"]) > 0
    alone = (written[1] / way / "train.jsonl").read_bytes()
    assert alone == (written[2] / way / "train.jsonl").read_bytes()


def test_the_texts_are_what_transformers_writes_alone(tiny: Path, written: dict[int, Path]) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for way, own in (("greedy", {}), ("beam", beams)):
        texts = {}
        for row in rows_of(written[2] / way / "train.jsonl"):
            texts.setdefault((row["id"], row["document"]), []).append(row["summary"])
        assert len(texts) > 10
        for (_, document), found in texts.items():
            ids = tokenizer(f"{document}\n\nSummary:", return_tensors="pt")["input_ids"]
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                eos_token_id=2, pad_token_id=2, **own,
            )[:, ids.shape[1] :]  # fmt: skip
            alone = [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
            assert found == [text for text in alone if text]


def test_copies_of_a_document_differ(written: dict[int, Path]) -> None:
    rows = rows_of(written[1] / "sample" / "train.jsonl")
    assert len({(row["id"], row["summary"]) for row in rows}) > 0.8 * len(rows)


def test_what_is_written_is_data(tiny: Path, written: dict[int, Path]) -> None:
    from makd_llm.train.build import build_records

    folder = written[1] / "greedy"
    records = list(build_records(DataConfig(source=str(folder), max_length=64)))
    assert [r.id for r in records] == [row["id"] for row in rows_of(folder / "train.jsonl")]
    assert [r.references[0] for r in records] == [
        row["summary"] for row in rows_of(folder / "train.jsonl")
    ]


def other_columns(folder: str, out: str) -> tuple[dict[str, Any], str]:
    """Columns by other names, no id, a column more that the prompt uses, a document too long for
    the window; and then a window that is too long for the model.
    """
    from makd_llm import distributed
    from makd_llm.teacher_summaries import Task, write_with_engine

    distributed.init()
    path = Path(folder) / "other.jsonl"
    rows = [
        {"text": f"the cat {k}", "gold": "x", "aspect": "the mat" * (1 + 40 * (k == 2))}
        for k in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source=str(path),
        columns={"id": None, "document": "text", "summary": "gold"},
        prompt={"template": "{document} about {aspect}:"},
        on_bad_record="skip",
        max_length=64,
    )
    task = Task(Path(folder) / "teacher", data, GenerationConfig(max_new_tokens=NEW), Path(out))
    found = write_with_engine(task, FP32_ZERO3, lambda text: None)
    longer = Task(
        task.model, data.model_copy(update={"max_length": 256}), task.generation, task.out
    )
    with pytest.raises(UserError) as caught:
        write_with_engine(longer, FP32_ZERO3, lambda text: None)
    return found, str(caught.value)


def test_the_datas_own_columns_and_skipped_records(tiny: Path, tmp_path: Path) -> None:
    ((manifest, refused),) = launch_ranks(1, other_columns, str(tiny), str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out" / "train.jsonl")
    texts = [f"the cat {k}" for k in (0, 1, 3, 4)]
    assert [row["text"] for row in rows] == texts[: len(rows)] or len(rows) < 4
    assert manifest["documents"] == 4 and sum(manifest["skipped"].values()) == 1
    assert manifest["summaries"] + len(manifest["empty"]) == 4
    assert all(set(row) == {"text", "aspect", "gold"} for row in rows)
    assert "data.max_length is 256" in refused and "128 positions" in refused
