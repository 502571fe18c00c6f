"""What the tests share: hardware as a decorator, processes that talk over gloo, a fair tolerance.

`run_on_ranks(2)` turns a test into two fresh Python processes with a gloo group between them, so
sharded logic is tested on any machine. The processes load the test's own file by its path, which
works under every pytest import mode; the body is therefore a function at the top of its module.
`testing.training` has a small distillation run for such bodies.

This module needs pytest (the `dev` extra); nothing outside the tests imports it.
"""

import copy
import functools
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from makd_llm import distributed, operators

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A rank that outlives a failed one is most likely waiting for it.
GRACE_SECONDS = 10.0
DEFAULT_TIMEOUT_SECONDS = 240.0
LOG_TAIL = 4000
TINY_LAYERS = 2


def shared_data(name: str) -> Path:
    """A file or folder of the shared material, e.g. `shared_data("data/rouge")`; skips without it.

    It is looked for in `$MAKD_SHARED`, and otherwise in the folder `shared` beside the checkout.
    """
    beside_checkout = Path(__file__).resolve().parents[3] / "shared"
    path = Path(os.environ.get("MAKD_SHARED", beside_checkout)) / name
    if not path.exists():
        pytest.skip(f"needs the shared material {name!r}; set MAKD_SHARED to its folder")
    return path


def tiny_config(model_type: str, tied: bool = False) -> "PreTrainedConfig":
    """The config of a tiny model of an architecture, with what is peculiar to the architecture."""
    from transformers import AutoConfig

    from makd_llm.models.families import FAMILIES

    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "qwen3": {"head_dim": 16},  # wider than hidden_size / heads, as the real ones
        "mistral": {"sliding_window": 4},
        "gemma": {"head_dim": 8},
        "gemma3_text": {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        "gemma2": {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "gpt_neox": {"intermediate_size": 40, "max_position_embeddings": 64},
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 40},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen2_moe": {  # a dense layer, then a sparse one
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [0],
        },
        "qwen3_moe": {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    }
    grouped = {"intermediate_size": 40, "num_key_value_heads": 2}
    without = ("gpt2", "opt", "gpt_neox", "falcon")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        **({} if model_type in without else grouped),
        **own.get(model_type, {}),
    )
    config.architectures = [FAMILIES[model_type].causal_lm]
    return config


def unstacked(model: Any) -> Any:
    """A copy of a model of transformers whose experts have modules of their own, with the same
    weights.
    """
    from makd_llm.checkpoint.expert_names import stacked_place
    from makd_llm.models.modeling_lowrank import unstack_experts

    twin, state = copy.deepcopy(model), model.state_dict()
    unstack_experts(twin)
    values = {}
    for name in twin.state_dict():
        place = stacked_place(name)
        if place is None or place.name not in state:
            values[name] = state[name]
        else:
            stack = state[place.name]
            values[name] = stack[place.expert, place.rows(tuple(stack.shape))]
    twin.to(model.dtype).load_state_dict(values)
    return twin.train(model.training)


def run_on_ranks(
    world_size: int, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorate a test so that its body runs in `world_size` processes joined by gloo.

    Fixtures and parameters are handed over by pickle, so they must be plain values. The test
    passes when every rank returns; see `launch_ranks` for what happens when one does not.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(*args: Any, **kwargs: Any) -> None:
            launch_ranks(world_size, body, *args, timeout=timeout, **kwargs)

        return test

    return decorate


GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_alone() -> dict[str, str]:
    """This environment without a process group's names: for a process that is to make its own."""
    return {name: value for name, value in os.environ.items() if name not in GROUP}


def launch_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` in fresh processes joined by gloo; return their results by rank.

    `fn` stands at the top of a module; arguments and results must be picklable. The processes run
    on the CPU with one thread each, with the environment that a launcher would give them, and are
    joined before `fn` starts. The first exception of any rank is raised here with that rank's
    traceback as a note (so `pytest.skip` inside `fn` skips, and `pytest.raises` sees the type).
    After `timeout` seconds all are stopped, and TimeoutError tells where each of them stood.
    """
    fn = inspect.unwrap(fn)
    if "<" in fn.__qualname__ or "." in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} must be a function at the top of its module")
    with tempfile.TemporaryDirectory(prefix="makd-ranks-") as folder:
        # The arguments are a pickle within the pickle: their classes may live in fn's module.
        address = (str(Path(fn.__code__.co_filename).resolve()), fn.__module__, fn.__name__)
        call = (*address, pickle.dumps((args, kwargs)))
        (Path(folder) / "call.pickle").write_bytes(pickle.dumps(call))
        ranks = [_start_rank(Path(folder), rank, world_size) for rank in range(world_size)]
        try:
            timed_out = _wait_for(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()
        if timed_out:
            logs = "\n".join(f"--- rank {rank.rank} ---\n{rank.log()}" for rank in ranks)
            raise TimeoutError(f"{fn.__qualname__} took over {timeout:g} s:\n{logs}")
        return _results(ranks)


def assert_no_worse_than_eager(
    actual: torch.Tensor, eager: torch.Tensor, exact_fp64: torch.Tensor, slack: float = 1.5
) -> None:
    """Assert that `actual` is about as near to the exact result as the plain computation is.

    `eager` is the same quantity from plain torch in the same precision, `exact_fp64` from float64;
    all of one shape. The largest and the root-mean-square error of `actual` may be `slack` times
    those of `eager`, and one unit of rounding of its dtype more (for an eager that is exact by
    luck). Where the exact value is not finite, `actual` must equal it.
    """
    if exact_fp64.dtype != torch.float64:
        raise ValueError(f"the exact result must be float64, not {exact_fp64.dtype}")
    if not actual.shape == eager.shape == exact_fp64.shape:
        raise AssertionError(
            f"shapes differ: {tuple(actual.shape)}, eager {tuple(eager.shape)}, "
            f"exact {tuple(exact_fp64.shape)}"
        )
    exact = exact_fp64.detach().cpu()
    finite = exact.isfinite()
    got, plain = actual.detach().cpu().double(), eager.detach().cpu().double()
    torch.testing.assert_close(got[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    scale = exact[finite].abs().max().item()
    one_rounding = torch.finfo(actual.dtype).eps * scale
    measures = {"largest": _largest, "root-mean-square": _root_mean_square}
    for name, measure in measures.items():
        error = measure((got - exact)[finite].abs()).item()
        eager_error = measure((plain - exact)[finite].abs()).item()
        bound = slack * eager_error + one_rounding
        # Written so that a NaN fails.
        if not error <= bound:
            raise AssertionError(
                f"{name} error {error:.3e} exceeds {bound:.3e} "
                f"({slack:g} x eager's {eager_error:.3e} + rounding {one_rounding:.3e})"
            )


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.max()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()


class _Outcome(NamedTuple):
    """What a rank leaves behind: when it ended, with which value, failure, or reason to skip."""

    when: float
    value: Any
    failure: BaseException | None
    trace: str
    skip: str | None


@dataclass(frozen=True)
class _Rank:
    """One started process, with the files that it writes."""

    rank: int
    process: subprocess.Popen[bytes]
    result_path: Path
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """End the process and what it has started (a compiler, say), if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _start_rank(folder: Path, rank: int, world_size: int) -> _Rank:
    environment = (
        os.environ
        | operators.compiler_environment()
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(distributed.free_port()),
            "GLOO_SOCKET_IFNAME": "lo",  # a machine's own name may not resolve
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
    )
    log_path = folder / f"rank{rank}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", _CHILD, str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Rank(rank, process, folder / f"rank{rank}.pickle", log_path)


_CHILD = "import sys; from makd_llm.testing import _run_as_rank; _run_as_rank(sys.argv[1])"


def _wait_for(ranks: Sequence[_Rank], timeout: float) -> bool:
    """Wait until all have ended, or a grace after the first failure; True if the time ran out."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(rank.process.poll() is None for rank in ranks):
        if time.monotonic() > deadline:
            if failed:
                return False
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
                    rank.process.wait()
            return True
        if not failed and any(rank.process.poll() not in (None, 0) for rank in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    return False


def _results(ranks: Sequence[_Rank]) -> list[Any]:
    """Every rank's result; or raise what failed first."""
    outcomes = {
        rank.rank: _Outcome(*pickle.loads(rank.result_path.read_bytes()))
        for rank in ranks
        if rank.result_path.exists()
    }
    failed = [(number, end) for number, end in outcomes.items() if end.failure is not None]
    if failed:
        number, end = min(failed, key=lambda pair: pair[1].when)
        assert end.failure is not None
        log = ranks[number].log()[-LOG_TAIL:]
        end.failure.add_note(f"on rank {number} of {len(ranks)}:\n{end.trace}\n{log}".rstrip())
        raise end.failure
    for end in outcomes.values():
        if end.skip is not None:
            pytest.skip(end.skip)
    silent = [rank for rank in ranks if rank.rank not in outcomes]
    if silent:
        logs = "\n".join(
            f"--- rank {rank.rank} ended with code {rank.process.returncode} ---\n{rank.log()}"
            for rank in silent
        )
        raise RuntimeError(f"{len(silent)} of {len(ranks)} ranks left no result:\n{logs}")
    return [outcomes[rank.rank].value for rank in ranks]


def _run_as_rank(folder: str) -> None:
    """The life of one started process: join, call, leave the outcome in a file."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    value: Any = None
    failure: BaseException | None = None
    trace, skip = "", None
    try:
        path, module, name, arguments = pickle.loads((Path(folder) / "call.pickle").read_bytes())
        fn = inspect.unwrap(getattr(_load_module(path, module), name))
        args, kwargs = pickle.loads(arguments)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size
        )
        value = fn(*args, **kwargs)
        pickle.dumps(value)
    except pytest.skip.Exception as skipped:  # pickle refuses it
        skip = str(skipped)
    except BaseException as error:  # noqa: BLE001 - an assertion, an exit: the parent judges
        value, failure, trace = None, error, traceback.format_exc()
    outcome = (time.time(), value, distributed.portable(failure), trace, skip)
    unfinished = Path(folder) / f"rank{rank}.unfinished"
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(Path(folder) / f"rank{rank}.pickle")
    if failure is not None or skip is not None:
        # Not sys.exit: leaving the group in good order would wait for the other ranks.
        sys.stdout.flush()
        os._exit(1)
    distributed.shutdown()


def _load_module(path: str, name: str) -> ModuleType:
    """The module `name` of that file, also where no import path leads to it."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle looks here for the module's own classes
    spec.loader.exec_module(module)
    return module
