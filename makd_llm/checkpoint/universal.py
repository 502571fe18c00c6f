"""A checkpoint for another number of ranks, by way of DeepSpeed's universal form.

ZeRO cuts weights and optimizer states into as many pieces as there are ranks, so DeepSpeed reads
its files only with the number of ranks that wrote them. Its universal form has one file per
parameter and state, whole, of which every rank then takes its piece. Only a run that goes on with
another number of ranks needs it, hence it is made then and not at every save: rank 0 writes it
beside the checkpoint, under a name that the next start clears away, and it is dropped once it is
loaded. The checkpoint itself is only read.

It costs rank 0 the time to read the checkpoint and write it twice, and for that while the disk
holds it three times.
"""

import argparse
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from deepspeed import DeepSpeedEngine

from makd_llm.checkpoint.plain import plain_values_only
from makd_llm.errors import UserError

OPTIMIZER_FILES = "*_optim_states.pt"


def is_cut(checkpoint: Path) -> bool:
    """Whether the files depend on the number of ranks: without ZeRO they do not."""
    return any(checkpoint.glob(OPTIMIZER_FILES))


def write_universal(checkpoint: Path, out: Path) -> None:
    """Writes the universal form of a checkpoint's DeepSpeed files. For one rank.

    Raises UserError where the optimizer's states lie elsewhere (NVMe), and OSError.
    """
    if (checkpoint / "offloaded_tensors").is_dir():
        raise UserError(
            f"checkpoint {checkpoint}: with the optimizer on NVMe it is tied to its number of "
            "ranks; resume with that number"
        )
    from deepspeed.checkpoint import ds_to_universal

    out.mkdir(parents=True)
    settings = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(out),
        num_extract_workers=1,  # more would fork this process, whose threads hold locks
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what Megatron's models would say of themselves
    )
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        plain_values_only(checkpoint),
    ):
        ds_to_universal.main(settings)


@contextmanager
def reading_universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, the engine's load_checkpoint expects the universal form."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
