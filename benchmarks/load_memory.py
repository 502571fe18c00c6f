"""What a rank holds while a model is loaded under ZeRO-3, against the model's full size.

    deepspeed --num_accelerators 2 benchmarks/load_memory.py --model builtin:smollm2-135m-instruct

Samples this process's anonymous and file-backed resident memory every 2 ms from before the model is
built until it is filled, and prints the peaks above the start, per rank.
"""

import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from makd_llm import distributed
from makd_llm.checkpoint.folder import TensorReader
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import resolve_model

FIELDS = ("RssAnon", "RssFile", "RssShmem")


def resident() -> dict[str, float]:
    """MiB by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(FIELDS))
    return {kind: int(value.split()[0]) / 1024 for kind, value in found.items()}


def main(
    model: Annotated[str, typer.Option()] = "builtin:smollm2-135m-instruct",
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Loads the model once and prints one line per rank."""
    distributed.quiet()
    distributed.init()
    folder = resolve_model(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    import deepspeed  # noqa: F401  (its import is not part of what is measured)

    from makd_llm.checkpoint.folder import read_config
    from makd_llm.models.modeling_lowrank import model_class_for

    model_class_for(read_config(folder))
    before = resident()
    peak = dict.fromkeys(FIELDS, 0.0)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for kind, value in resident().items():
                peak[kind] = max(peak[kind], value - before[kind])
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load_sharded(folder, config, torch.bfloat16)
    done.set()
    watcher.join()
    after = {kind: value - before[kind] for kind, value in resident().items()}
    full = TensorReader(folder).nbytes / 2**20
    shards = [getattr(parameter, "ds_tensor") for parameter in loaded.parameters()]  # noqa: B009
    share = sum(shard.numel() * shard.element_size() for shard in shards)
    said = ", ".join(f"{k} peak +{peak[k]:.0f}, after +{after[k]:.0f}" for k in FIELDS)
    for line in distributed.gather_objects(
        f"rank {distributed.rank()}: {said} MiB; shards {share / 2**20:.0f} of {full:.0f} MiB"
    ):
        if distributed.is_main():
            print(line)
    distributed.shutdown()


if __name__ == "__main__":
    typer.run(main)
