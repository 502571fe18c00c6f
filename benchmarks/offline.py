"""What a teacher's cache takes and what it loses, for several k.

    python benchmarks/offline.py runs/demo/teacher runs/demo/factorized
    python benchmarks/offline.py builtin:smollm2-135m-instruct student --k 16 64 256

The teacher writes a cache of the same records for each k, the models being loaded before; then the
student's loss from each is held against the online loss on the same summary tokens: forward KL in
nats, mean over tokens. Columns: bytes per summary token, of whole files; summary tokens and all
tokens a second, from records to files; the loss online, its difference offline (never above 0 but
for rounding), and the mean of the absolute differences token by token.
"""

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from makd_kernels.linear_divergence import linear_divergence
from makd_llm import distributed
from makd_llm.config import RunConfig
from makd_llm.data.batch import Batch, batches_of, pad_id_of
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer, resolve_model
from makd_llm.objectives.head import Outputs
from makd_llm.objectives.topk import topk_divergence
from makd_llm.offline.read import TeacherCache
from makd_llm.shown import Needs, TopTokens
from makd_llm.teaching import Teaching
from makd_llm.train.build import build_prompts, build_records
from makd_llm.train.engine import Frozen
from measure import RESULTS, say, where, write

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Writes a cache for each k, compares the losses, and writes a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student", type=Path, help="a factorized student of it")
    parser.add_argument("--data", default="builtin:aclsum")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--window", type=int, default=384, help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="records of a forward")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / "offline_cpu.csv")
    asked = parser.parse_args()
    distributed.quiet()
    distributed.init()
    dtype, folder = DTYPES[asked.dtype], resolve_model(asked.teacher)
    teacher, student = _Kept(folder, dtype), _Kept(asked.student, dtype)
    scratch = Path(tempfile.mkdtemp(prefix="makd-offline-"))
    caches: dict[int, TeacherCache] = {}
    seconds: dict[int, float] = {}
    try:
        for k in asked.k:
            config = _config(asked, k)
            teaching = Teaching(config, config.data, dtype, say)
            began = time.perf_counter()
            teaching.write(folder, (), scratch / str(k), lambda *_: teacher)
            seconds[k] = time.perf_counter() - began
            caches[k] = teaching.open(scratch / str(k), folder, asked.student, ())
        losses = _losses(_batches(asked, folder), teacher, student, caches)
        rows = [_row(asked, k, caches[k], seconds[k], losses) for k in asked.k]
    finally:
        shutil.rmtree(scratch)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write(rows, asked.out)
    teacher.give_back()
    student.give_back()
    distributed.shutdown()


class _Kept(Frozen):
    """A model that stays after the cache is written."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        ds = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 0},
            "steps_per_print": 10**9,
        }
        super().__init__(load_sharded(folder, ds, dtype), ds)

    def close(self) -> None:
        """Not yet."""

    def give_back(self) -> None:
        """Now."""
        super().close()


def _config(asked: argparse.Namespace, k: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "teacher": {"model": asked.teacher},
            "data": {"source": asked.data, "limit": asked.records, "max_length": asked.window},
            "distil": {"preset": "kd", "offline": {"top_k": k, "batch_size": asked.batch}},
        }
    )


def _batches(asked: argparse.Namespace, folder: Path) -> list[Batch]:
    data, tokenizer = _config(asked, 1).data, load_tokenizer(folder)
    prompts = build_prompts(data, tokenizer)
    examples = [prompts.example(record) for record in build_records(data)]
    return batches_of(examples, asked.batch, pad_id_of(tokenizer))


def _losses(
    batches: list[Batch], teacher: Frozen, student: Frozen, caches: dict[int, TeacherCache]
) -> dict[int, Tensor]:
    """Per summary token: by k from the caches, and online under 0. fp64, on the CPU."""
    found: dict[int, list[Tensor]] = {k: [] for k in (0, *caches)}
    for batch in batches:
        batch = batch.to(distributed.device())
        tops = {k: cache.shown(batch, Needs()).top for k, cache in caches.items()}
        theirs_BTE = teacher(batch)
        with teacher.output_weight() as theirs_VE:
            values = student(batch, partial(_at_head, batch, theirs_BTE, theirs_VE, tops))
        for k, value_N in zip(found, values, strict=True):
            found[k].append(value_N.double().cpu())
    return {k: torch.cat(values) for k, values in found.items()}


def _at_head(
    batch: Batch,
    theirs_BTE: Tensor,
    theirs_VE: Tensor,
    tops: dict[int, TopTokens | None],
    hidden_BTD: Tensor,
    weight_VD: Tensor,
) -> tuple[Tensor, ...]:
    ours_ND, theirs_NE = (x.flatten(0, 1)[batch.targets_N] for x in (hidden_BTD, theirs_BTE))
    online_N = linear_divergence(ours_ND, weight_VD, theirs_NE, theirs_VE)
    sides = ours_ND, weight_VD, theirs_NE, theirs_VE, batch.targets_N
    return online_N, *(topk_divergence(Outputs(*sides, top)) for top in tops.values())


def _row(
    asked: argparse.Namespace,
    k: int,
    cache: TeacherCache,
    seconds: float,
    losses: dict[int, Tensor],
) -> dict[str, object]:
    manifest, online_N = cache.manifest, losses[0]
    difference_N = losses[k] - online_N
    return {
        "k": k,
        "bytes_per_token": f"{manifest.bytes_per_target:.1f}",
        "records": manifest.records,
        "summary_tokens": manifest.targets,
        "summary_tokens_per_second": f"{manifest.targets / seconds:.1f}",
        "tokens_per_second": f"{manifest.tokens / seconds:.1f}",
        "online": f"{online_N.mean():.5f}",
        "difference": f"{difference_N.mean():+.5f}",
        "difference_by_token": f"{difference_N.abs().mean():.5f}",
        "teacher": asked.teacher if not Path(asked.teacher).exists() else "a folder",
        "dtype": asked.dtype,
        **where(distributed.device().type),
    }


if __name__ == "__main__":
    main()
