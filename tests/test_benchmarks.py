"""The benchmarks' own parts: peers compute what ours computes, and no table is typed by hand."""

import csv
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from makd_kernels import attention_kl
from makd_kernels.linear_divergence import linear_cross_entropy_divergence_loss
from makd_llm import distributed
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.testing import environment_alone

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A module of the benchmarks, imported as its scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


def sides(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 37, 16), (2, 2, 37, 16)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(provider, given: list[Tensor]) -> tuple[Tensor, ...]:
    q, k = (tensor.detach().clone().requires_grad_() for tensor in given[2:])
    values = provider(given[0], given[1], q, k)
    upstream = torch.linspace(-2, 3, values.numel()).view(values.shape)
    return values.detach(), *torch.autograd.grad(values, (q, k), upstream)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_triton", [True, False], ids=["Triton", "torch"])
def test_linear_ard(load, monkeypatch: pytest.MonkeyPatch, by_triton: bool) -> None:
    if by_triton and torch.cuda.is_available():
        pytest.skip("where there is a GPU, Triton compiles for it and takes no CPU tensors")
    module = load("linear_ard")
    monkeypatch.setattr(module, "INTERPRETED", by_triton)
    monkeypatch.setattr(module, "TILE_CPU", 16)
    given = sides()
    assert_close(with_gradients(attention_kl, given), with_gradients(module.LinearARD.apply, given))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_flex_attention_identity(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPU suite runs it, only not compiled; FlexAttention has no backward on a CPU."""
    module = load("attention_kl")
    monkeypatch.setattr(module, "_flex", lambda: module.plain_flex)
    given = sides()
    assert_close([attention_kl(*given)], [module._flex_identity(*given)])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_liger(load, divergence: str) -> None:
    module = load("linear_divergence")
    case = module.LinearCase("here", 40, 96, 16, 24)
    given = module.tensors(case, torch.float32, "cpu")
    theirs = module.providers("cpu", divergence)["Liger, chunked"](*given)
    ours = linear_cross_entropy_divergence_loss(*given, divergence=divergence).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_a_wrong_result_is_not_timed(load) -> None:
    with pytest.raises(SystemExit, match="nothing timed"):
        load("measure").check("op", "ours", error=0.1, eager=0.01, dtype=torch.bfloat16)


def test_a_wrong_gradient_is_seen_behind_right_values(load) -> None:
    right, wrong = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    error = load("measure").relative_error([right, wrong], [right, right])
    assert error != error


def test_a_rival_that_fails_is_left_out_and_ours_stops_everything(load) -> None:
    def fails() -> list[Tensor]:
        raise RuntimeError("out of something")

    measure, right = load("measure"), [torch.ones(3)]
    calls = {"eager": lambda: right, "rival": fails, "ours": lambda: right}
    assert list(measure.checked("op", calls, right, "eager", torch.float32)) == ["eager", "ours"]
    with pytest.raises(RuntimeError, match="out of something"):
        measure.checked("op", calls | {"ours": fails}, right, "eager", torch.float32)


def test_the_readme_shows_what_was_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_measured_stands_in_one_document(load) -> None:
    module = load("readme")
    texts = [path.read_text() for path in module.DOCUMENTS]
    for name, (file, _) in module.TABLES.items():
        wanted = int((module.RESULTS / file).is_file())
        assert sum(t.count(f"<!-- measured: {name} -->") for t in texts) == wanted, name


def test_ratios_are_taken_turn_by_turn(load) -> None:
    measure = load("measure")
    plain = [1.0, 5.0, 1.0, 5.0] * 25  # a machine that is now fast and now slow
    slower = [1.1 * t for t in plain]
    ratio, low, high = measure.ratio_to(plain, slower, in_turns=True)
    assert low == pytest.approx(1.1) and ratio == pytest.approx(1.1) == high
    noisy = [t * (1 + 0.2 * (i * 7 % 10 - 4.5) / 10) for i, t in enumerate(slower)]
    ratio, low, high = measure.ratio_to(plain, noisy, in_turns=True)
    assert low < ratio < high and low < 1.1 < high and high - low < 0.1
    ratio, low, high = measure.ratio_to(plain, slower[:3], in_turns=False)
    assert ratio == pytest.approx(1.1 / 3) and low != low and high != high


@pytest.fixture
def text(tiny: Path) -> Path:
    """Something to calibrate and to measure on."""
    path = tiny / "benchmark.txt"
    path.write_text(" ".join((tiny / "train.jsonl").read_text().split()), encoding="utf-8")
    return path


def called(load, monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    load(name).main()


def test_the_table_of_methods_goes_on_from_its_rows(
    load, monkeypatch: pytest.MonkeyPatch, tiny: Path, text: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "rows.csv"
    sizes = ("--window", "32", "--samples", "8", "--test-samples", "4", "--rank-multiple", "2")
    given = ("--teacher", str(tiny / "teacher"), "--calibrate", str(text), "--test", str(text))
    wanted = ("--keep", "0.6", "--out", str(out), "--rows", "svd", "whitened + refinement")
    called(load, monkeypatch, "factorization", *given, *sizes, *wanted)
    first = out.read_text()
    assert [line.split(",")[0] for line in first.splitlines()[1:]] == [
        "teacher",
        "svd",
        "whitened + refinement",
    ]
    called(load, monkeypatch, "factorization", *given, *sizes, *wanted, "fisher")
    assert out.read_text().startswith(first)
    assert out.read_text().splitlines()[4].startswith("fisher,0.6,")
    shown = load("readme").factorization(list(csv.DictReader(out.open(newline=""))))
    assert "| method | keep 0.6 |" in shown and "| fisher |" in shown and "(teacher " in shown


def test_generation_compares_what_writes_the_same(
    load, monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    sizes = ("--batch", "1", "2", "--prompt", "4", "--new", "3", "--turns", "1")
    teacher, student = tiny / "teacher", tmp_path / "student"
    recipe = Recipe(0.6, method="svd", rank_multiple=2)
    factorize(teacher, student, recipe, [], tokenizer=None, dtype=torch.float32)
    folders = (str(teacher), str(student))
    called(load, monkeypatch, "generation", *folders, *sizes, "--out", str(out))
    rows = list(csv.DictReader(out.open(newline="")))
    names = ["teacher", "teacher, packed", "student", "student, packed"]
    assert [(row["batch"], row["model"]) for row in rows] == [
        (batch, name) for batch in "12" for name in names
    ]
    assert load("generation").loaded(student).config.lowrank
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    assert "tokens/s" in load("readme").TABLES["generation"][1](rows)


def test_a_teachers_cache_is_held_against_the_online_loss(
    load, monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    out, student = tmp_path / "rows.csv", tmp_path / "student"
    recipe = Recipe(0.5, method="svd", rank_multiple=2)
    factorize(tiny / "teacher", student, recipe, [], tokenizer=None, dtype=torch.float32)
    folders = (str(tiny / "teacher"), str(student), "--data", str(tiny / "train.jsonl"))
    sizes = ("--window", "48", "--records", "10", "--k", "4", "16", "64", "--dtype", "float32")
    called(load, monkeypatch, "offline", *folders, *sizes, "--out", str(out))
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["k"] for row in rows] == ["4", "16", "64"]
    assert len({row["online"] for row in rows}) == 1 and float(rows[0]["online"]) > 0
    losses = [float(row["difference"]) for row in rows]
    assert losses == sorted(losses) and losses[0] < losses[-1] < 1e-3
    sizes_found = [float(row["bytes_per_token"]) for row in rows]
    assert sizes_found == sorted(sizes_found)
    assert all(float(row["summary_tokens_per_second"]) > 0 for row in rows)


@pytest.mark.slow
def test_decomposition_is_timed_by_the_slowest_rank(
    load, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    more = ("--samples", "2", "--turns", "1", "--window", "32", "--ranks", "1", "2")
    given = ("--teacher", str(tiny / "teacher"), "--calibrate", str(text), "--out", str(out))
    script = str(BENCHMARKS / "decomposition.py")
    done = subprocess.run(
        [sys.executable, script, *given, *more, "--rank-multiple", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open(newline="")))
    assert [(row["ranks"], row["threads_each"]) for row in rows] == [
        ("1", "1"),
        ("2", "1"),
        ("1", "2"),
    ]
    assert "decomposition, s" in load("readme").TABLES["decomposition"][1](rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_presets_are_run_as_a_user_does_and_steps_are_timed_in_turns(
    load, tiny: Path, tmp_path: Path
) -> None:
    results, run = tmp_path / "results", tmp_path / "run"
    given = [
        *(f"teacher.model={tiny / 'teacher'}", f"data.source={tiny}", "data.max_length=48"),
        *("sft.enabled=true", "sft.train.steps=1", "sft.train.batch_size=4"),
        *("evaluation.max_new_tokens=8", "student.rank_multiple=4"),
        *("student.calibration_records=8", "distil.train.checkpoint_every=100"),
    ]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    port = ["--master_port", str(distributed.free_port())]
    presets = [str(BENCHMARKS / "presets.py"), "--presets", "makd", "--ranks", "1"]
    sizes = ["--steps", "3", "--batch", "2", "--run", str(run), "--results", str(results)]
    ds = str(BENCHMARKS.parent / "ds_configs" / "zero3.json")
    step = [str(BENCHMARKS / "step.py"), "--ds", ds, "--run", str(run), "--rounds", "2"]
    rows_of_random = ["--records", "2", "--length", "16", "--sets", "finetune,makd everywhere"]
    rows = {}
    for name, command in {
        "presets_cpu": [*presets, *sizes, "--", *given],
        "step_cpu": [*launcher, *port, *step, *rows_of_random, "--results", str(results)],
    }.items():
        scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment_alone() | {"PATH": scripts, "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows[name] = list(csv.DictReader((results / f"{name}.csv").open(newline="")))
    assert [row["preset"] for row in rows["presets_cpu"]] == ["kd", "makd"]
    for row in rows["presets_cpu"]:
        assert row["steps"] == "3" and float(row["step_most_s"]) >= float(row["step_median_s"]) > 0
        assert float(row["peak_MB"]) > 0 and float(row["command_s"]) > 0
    assert rows["presets_cpu"][0]["time_to_kd"] == "1.00"
    assert [row["objectives"] for row in rows["step_cpu"]] == ["kd", "finetune", "makd everywhere"]
    for row in rows["step_cpu"]:
        assert row["tokens_per_rank"] == "32" and float(row["seconds_50"]) > 0
    shown = {name: load("readme").TABLES[name][1] for name in ("presets", "step")}
    assert "| makd |" in shown["presets"](rows["presets_cpu"])
    assert "| makd everywhere |" in shown["step"](rows["step_cpu"])


@pytest.fixture
def run_folder(tiny: Path, tmp_path: Path) -> Path:
    """What of a finished run the peers read."""
    run = tmp_path / "run"
    shutil.copytree(tiny / "teacher", run / "teacher")
    recipe = Recipe(0.5, method="svd", rank_multiple=2)
    factorize(tiny / "teacher", run / "factorized", recipe, [], tokenizer=None, dtype=torch.float32)
    for file in (tiny / "teacher").glob("*token*"):
        shutil.copy(file, run / "factorized")
    config = f"teacher: {{model: none}}\ndata: {{source: {tiny}, max_length: 48}}\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    return run


def test_without_trl_there_is_one_line(
    load, monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no TRL here"):
        load("peers").main(run_folder)


def test_peers_that_learn_something_else_are_not_timed(load) -> None:
    peers = load("peers")
    found = {peers.TRL: 2.0, "close": 2.001}
    peers.agree(found, 1e-3)
    for wrong in (2.1, float("nan")):
        with pytest.raises(SystemExit, match=r"other finds .* no table"):
            peers.agree(found | {"other": wrong}, 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peers_take_turns_at_the_same_batches(load, run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is in the extra `peers`")
    out = tmp_path / "peers_cpu.csv"
    script = [str(BENCHMARKS / "peers.py"), "--run", str(run_folder), "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, *script, "--records", "2", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment_alone() | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(out.open(newline="")))
    peers = load("peers")
    assert [row["contestant"] for row in rows] == list(peers.CONTESTANTS)
    for row in rows:
        parts = ("teacher", "student", "loss", "backward", "optimizer")
        seconds = {part: float(row[f"{part}_s"]) for part in parts}
        assert seconds.pop("loss") >= 0.0  # the rest, which of tiny models may round to nothing
        assert all(value > 0.0 for value in seconds.values())
        assert float(row["peak_MB"]) > 0 and float(row["of_matmul"].rstrip("%")) > 0
    assert rows[0]["times_trl"] == rows[0]["memory_of_trl"] == "1.00"
    assert "| makd_llm kd |" in load("readme").TABLES["peers"][1](rows)
    # Rows of another dtype stay, those of the same are replaced.
    about = {key: rows[0][key] for key in ("batch", "dtype")}
    peers.publish([rows[0] | {"dtype": "bf16"}], out, about | {"dtype": "bf16"})
    peers.publish(rows[1:2], out, about)
    assert [row["dtype"] for row in csv.DictReader(out.open(newline=""))] == ["bf16", "fp32"]


def test_scaling_is_told_apart_from_what_two_cores_lose_to_each_other(load) -> None:
    module = load("scaling")
    cases = {way: module.Case("tiny", ranks, 64) for way, (ranks, _) in module.WAYS.items()}
    seconds = {"1 rank": [[4.0, 4.0]], "1 rank, twice": [[5.0], [5.0]], "2 ranks": [[8.0]] * 2}
    found = {
        way: [{"seconds": s, "waited": [2.0] * len(s), "peak_MB": 7.0} for s in ranks]
        for way, ranks in seconds.items()
    }
    alone, twice, both = module.table(cases, found)
    assert (alone["tokens_per_second"], alone["times_1_rank"]) == ("32", "1.00")
    assert (twice["times_1_rank"], twice["waiting_share"]) == ("1.60", "")
    assert (both["times_1_rank"], both["waiting_share"]) == ("1.00", "0.250")
    assert (both["beyond_twice_s"], both["beyond_twice_share"]) == ("3.00", "0.375")
