"""Texts that the student writes while it learns: when, which, and the same for every split."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm import distributed
from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.generation.decoding import Decoding
from makd_llm.testing import launch_ranks
from makd_llm.testing.training import factorized, parts, run_loop, sizes, small_loader
from makd_llm.train.consolidated import Consolidated
from makd_llm.train.on_policy import Adaptive, OnPolicy, Settings

WRITTEN = 40
EOS = 2


def settings(**changes: Any) -> Settings:
    made: dict[str, Any] = {
        "lmbda": 1.0,
        "decoding": Decoding("greedy", 4),
        "batch_size": 3,
        "steps": 100,
        "max_length": 12,
        "pad_id": 0,
        "eos_ids": (EOS,),
        "seed": 7,
    }
    return Settings(**{**made, **changes})


class Writes:
    """A writer that counts its rounds and says the round's number, four times."""

    def __init__(self) -> None:
        self.rounds = 0

    @contextmanager
    def __call__(self, rows: int) -> Iterator[Callable[..., torch.Tensor]]:
        self.rounds += 1

        def generate(batch: Batch, **arguments: Any) -> torch.Tensor:
            new = torch.full((len(batch.record_ids), 4), WRITTEN + self.rounds)
            return torch.cat([batch.input_ids_BT, new], 1)

        yield generate


def batches() -> list[Batch]:
    examples = [
        Example(f"r{i}", list(range(3, 3 + n)), n - 2, (1, n - 3))
        for i, n in enumerate((8, 11, 6, 9))
    ]
    return [collate(examples[:2], 0), collate(examples[2:], 0)]


def test_the_prompts_stay_and_the_students_words_are_the_targets() -> None:
    on_policy = OnPolicy(settings(), Writes())
    found = on_policy.of_step(1, batches())
    assert found is not None
    for given, own in zip(batches(), found, strict=True):
        assert own.record_ids == given.record_ids
        assert own.document_mask_BT.sum(1).tolist() == given.document_mask_BT.sum(1).tolist()
        for row in range(2):
            first = int(given.target_mask_BT[row].nonzero()[0]) + 1
            assert own.input_ids_BT[row, :first].equal(given.input_ids_BT[row, :first])
            words = own.labels_BT[row][own.target_mask_BT[row]].tolist()
            assert words == [WRITTEN + 1] * min(4, 12 - first)  # no further than the window


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_so_many_steps_are_the_students(share: float) -> None:
    writer = Writes()
    on_policy = OnPolicy(settings(lmbda=share), writer)
    own = [on_policy.of_step(step, batches()) is not None for step in range(1, 301)]
    assert abs(sum(own) / 300 - share) < 0.06 and writer.rounds == sum(own)
    again = OnPolicy(settings(lmbda=share), Writes())
    assert own == [again.of_step(step, batches()) is not None for step in range(1, 301)]


def test_a_buffer_keeps_the_newest_and_writes_less_and_less() -> None:
    writer = Writes()
    on_policy = OnPolicy(settings(replay=10, steps=200), writer)
    rounds = []
    for step in range(1, 201):
        found = on_policy.of_step(step, batches())
        assert found is not None and len(on_policy.kept) <= 10
        assert [len(batch.record_ids) for batch in found] == [2, 2]
        rounds.append(writer.rounds)
    assert rounds[0] == 1 and rounds[49] > 35  # of the first 50 steps most are written for
    assert rounds[-1] - rounds[149] < 15
    newest = {example.input_ids[-1] for example in on_policy.kept}
    assert newest == {WRITTEN + n for n in range(writer.rounds - 2, writer.rounds + 1)}


def test_the_share_rises_only_with_the_validation_loss() -> None:
    losses = iter([2.0, 1.9, 1.95, 2.06, 2.2, 9.0, 99.0])
    rule = Adaptive(2, 0.5, 0.1, lambda: next(losses))
    on_policy = OnPolicy(settings(lmbda=0.0, adaptive=rule), Writes())
    shares = []
    for step in range(1, 15):
        measured = on_policy.after_step(step)
        assert (measured is None) == bool(step % 2)
        if measured is not None:
            shares.append(on_policy.share)
    assert shares == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


def test_the_state_brings_back_share_loss_and_texts() -> None:
    rule = Adaptive(1, 0.5, 0.0, lambda: 1.0)
    one = OnPolicy(settings(lmbda=0.4, replay=6, adaptive=rule), Writes())
    for step in range(1, 9):
        one.of_step(step, batches())
        one.after_step(step)
    other = OnPolicy(settings(lmbda=0.4, replay=6, adaptive=rule), Writes())
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.kept and other.kept == one.kept
    assert (other.share, other.last_loss) == (one.share, one.last_loss)


def test_cross_entropy_alone_cannot_teach_a_student_by_its_own_words() -> None:
    from makd_llm.config import DistilConfig
    from makd_llm.models.families import FAMILIES
    from makd_llm.train.build import build_objectives

    asked = DistilConfig.model_validate({"preset": "finetune", "sequences": {"student": {}}})
    with pytest.raises(UserError, match="student's own words"):
        build_objectives(asked, FAMILIES["llama"], 4)


OWN = {
    "preset": "gkd",
    "sequences": {"student": {"lmbda": 0.4, "max_new_tokens": 6, "replay": 6}},
    "objectives": {"cross_entropy": {"weight": 0.5}},
}


def losses_of(folder: str, micro: int, stop_at: int | None) -> list[dict[str, Any]]:
    """Eight steps; with stop_at, by two engines, the second of which resumes."""
    student = factorized(Path(folder))
    run_dir = Path(folder) / f"own-{distributed.world_size()}-{micro}-{stop_at}"
    ds = sizes(distributed.world_size(), micro)
    for steps in [8] if stop_at is None else [stop_at, 8]:
        made = parts(Path(folder), student, ds, distil=OWN)
        run_loop(made, run_dir, steps, distil=OWN, save_every=stop_at or 10**9)
        made.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    return lines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_student_writes_and_learns_is_the_same_for_every_split(tiny: Path) -> None:
    whole = launch_ranks(1, losses_of, str(tiny), 4, None, timeout=300)[0]
    own = [line["own_words"] for line in whole]
    assert 0 < sum(own) < 8
    for line in whole:  # the student's words are measured, and not learnt
        measured = {"own_words"} if line["own_words"] else {"cross_entropy"}
        assert {"loss/logits", *(f"loss/{name}" for name in measured)} <= set(line)
        assert "loss/cross_entropy" not in line or not line["own_words"]
    others = [
        launch_ranks(1, losses_of, str(tiny), 1, None, timeout=300)[0],
        launch_ranks(2, losses_of, str(tiny), 2, None, timeout=300)[0],
        launch_ranks(2, losses_of, str(tiny), 1, 4, timeout=300)[0],
    ]
    for lines in others:
        for line, expected in zip(lines, whole, strict=True):
            assert line["tokens"] == expected["tokens"]
            assert line["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def gathered_while_writing(folder: str) -> dict[str, Any]:
    """Gatherings of weights while a round of few and of many tokens is written, and the texts."""
    import deepspeed

    student = factorized(Path(folder))
    made = parts(Path(folder), student, sizes(distributed.world_size(), 2))
    batch = small_loader(Path(folder), student, 2).next_step()[0]
    count, entered = 0, deepspeed.zero.GatheredParameters.__enter__

    def counting(self: Any) -> Any:
        nonlocal count
        count += 1
        return entered(self)

    found: dict[str, Any] = {"texts": []}
    deepspeed.zero.GatheredParameters.__enter__ = counting
    try:
        for new in (2, 12):
            count = 0
            policy = OnPolicy(
                settings(decoding=Decoding("greedy", new), max_length=64, pad_id=2),
                Consolidated(made.trained.model, torch.float32).writer,
            )
            own = policy.of_step(1, [batch])
            assert own is not None
            found[str(new)] = count
            found["texts"] = [
                own[0].labels_BT[row][own[0].target_mask_BT[row]].tolist() for row in range(2)
            ]
    finally:
        deepspeed.zero.GatheredParameters.__enter__ = entered
    found["parameters"] = len(list(made.trained.model.model.parameters()))
    found["prompts"] = [e.input_ids[: e.prompt_length] for e in _examples(batch)]
    made.close()
    return found


def _examples(batch: Batch) -> list[Example]:
    from makd_llm.data.batch import examples_of

    return examples_of(batch)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_weights_are_gathered_once_for_all_that_is_written(tiny: Path) -> None:
    """And what is written is what the exported student writes."""
    from transformers import AutoModelForCausalLM

    found = launch_ranks(2, gathered_while_writing, str(tiny), timeout=300)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny / "student-2", dtype=torch.float32)
    for rank in found:
        assert rank["2"] == rank["12"] == rank["parameters"]
        for prompt, text in zip(rank["prompts"], rank["texts"], strict=True):
            ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
            assert text == ids[0, len(prompt) :].tolist()
