"""What the doctor makes of what it measures, on machines that are not this one."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from makd_llm.doctor import accelerators, machine, software, surroundings
from makd_llm.doctor.finding import Finding

GB = 1e9


def nowhere(name: str) -> None:
    return None


def anywhere(name: str) -> str:
    return f"/usr/bin/{name}"


def installed(versions: dict[str, str]) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version


def test_what_every_run_needs_is_needed() -> None:
    found = {f.name: f for f in software.compilers(nowhere)}
    for name in ("gcc", "g++"):
        assert found[name].state == "missing" and found[name].needed
        assert "build-essential" in found[name].advice
    assert not any(f.needed for f in surroundings.programs(nowhere))
    assert {f.state for f in surroundings.programs(nowhere)} == {"missing"}
    assert {f.state for f in surroundings.programs(anywhere)} == {"ok"}


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2.11", "rich>=14", "typer>=0.16", 'ruff>=0.12; extra == "dev"']
    monkeypatch.setattr(software.metadata, "requires", lambda name: asked)
    here = installed({"torch": "2.10.1+cpu", "rich": "15.0"})
    old, absent, rest = software.packages(here)
    assert (old.name, old.state, old.needed) == ("torch", "missing", True)
    assert "2.10.1+cpu, but >=2.11" in old.found
    assert (absent.name, absent.found, absent.needed) == ("typer", "not installed", True)
    assert rest.found == "1 of the 3 required are there"


def test_other_versions_than_the_tested_ones_are_named(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\ntorch==2.13.0\nrich==15.0.0\nruff==0.17.6  # a tool\n")
    same = software.against_constraints(pins, installed({"torch": "2.13.0+cpu", "rich": "15.0.0"}))
    assert same.state == "ok" and same.values == {"same": 2, "others": []}
    other = software.against_constraints(pins, installed({"torch": "2.12.0", "rich": "15.0.0"}))
    assert other.state == "check" and "torch 2.12.0 (tested: 2.13.0)" in other.found
    assert software.against_constraints(tmp_path / "none.txt").state == "ok"


def test_every_pin_of_the_project_is_read() -> None:
    lines = software.CONSTRAINTS.read_text().splitlines()
    pins = software._pinned(software.CONSTRAINTS.read_text())
    assert len(pins) == sum(bool(line) and not line.startswith("#") for line in lines)
    assert pins["deepspeed"]


@pytest.mark.parametrize(
    ("bf16", "fp32", "threads", "gpus", "state"),
    [
        (1.2e12, 0.16e12, 2, 0, "ok"),
        (0.05e12, 0.16e12, 2, 0, "slow"),  # no instructions for bf16
        (0.05e12, 0.16e12, 2, 1, "ok"),  # ... which nobody multiplies here
        (0.30e12, 0.16e12, 32, 0, "slow"),  # the cores are somebody else's
    ],
)
def test_rates(bf16: float, fp32: float, threads: int, gpus: int, state: str) -> None:
    found = machine.judge_rates(bf16, fp32, threads, gpus)
    assert found.state == state
    assert bool(found.advice) == (state != "ok")
    assert found.values["bf16_flops"] == bf16


@pytest.mark.parametrize(
    ("ranks", "of_a_rank", "gpus", "state", "advice"),
    [
        (2, 4, 0, "ok", ""),
        (2, 8, 0, "slow", "export OMP_NUM_THREADS=4"),
        (16, 1, 0, "slow", "--num_accelerators 8"),
        (8, 8, 8, "ok", ""),
    ],
)
def test_threads_against_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: int, of_a_rank: int, gpus: int, state: str, advice: str
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    found = machine.threads(ranks, gpus, of_a_rank)
    assert found.state == state and advice in found.advice


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)))
    assert machine.cores() == 16
    for quota, expected in (("max 100000", 16), ("400000 100000", 4), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert machine.cores() == expected


def test_the_flags_of_a_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for flags, gpus, state in (
        ("avx2 avx512f amx_bf16 amx_tile", 0, "ok"),
        ("avx2", 0, "slow"),
        ("avx2", 1, "ok"),
    ):
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags}\n" * 2)
        (found,) = machine.instructions(gpus, cpuinfo)
        assert found.state == state and "Some CPU" in found.found
        assert set(found.values["flags"]) == set(flags.split())  # type: ignore[arg-type]
    (unread,) = machine.instructions(0, tmp_path / "none")
    assert unread.state == "check"


def test_little_room() -> None:
    for found in (
        machine.memory(2 * GB, 16 * GB),
        machine.judge_disk("disk", Path("runs"), 1 * GB),
        machine.shared_memory(2, 64e6),
    ):
        assert found.state == "check" and found.advice
    for found in (
        machine.memory(12 * GB, 16 * GB),
        machine.judge_disk("disk", Path("runs"), 100 * GB),
        machine.shared_memory(0, 64e6),
        machine.shared_memory(2, 8 * GB),
        machine.load((0.1, 0.1, 0.1)),
    ):
        assert found.state == "ok" and not found.advice
    assert machine.load((1e3, 0.1, 0.1)).state == "slow"


def test_gpus() -> None:
    def state(capability: tuple[int, int], free: float) -> str:
        return accelerators.judge_gpu(0, "NVIDIA H100", capability, free, 80 * GB).state

    assert state((9, 0), 79 * GB) == "ok"
    assert state((9, 0), 40 * GB) == "check"
    assert state((7, 0), 79 * GB) == "slow"
    fast = accelerators.judge_rate("NVIDIA H100 80GB HBM3", 700e12)
    assert fast.state == "ok" and "71%" in fast.found
    assert accelerators.judge_rate("NVIDIA H100 80GB HBM3", 100e12).state == "slow"
    assert "%" not in accelerators.judge_rate("Another Card", 1e12).found


def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = software.torch_build(anywhere)
    assert found.state == "slow" and "build for CUDA" in found.advice
    (found,) = software.torch_build(nowhere)
    assert found.state == "ok"


def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtorch.so:\n cannot open")

    monkeypatch.setattr(software, "import_module", broken)
    for findings in (software.torch_build(), software.operators()):
        (found,) = findings
        assert found.needed and found.found == "cannot be imported: libtorch.so: cannot open"


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    away = surroundings.hub(patience=1.0)
    assert away.state == "check" and "HF_ENDPOINT" in away.advice
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert surroundings.hub() == Finding("Hub", "ok", surroundings.hub().found)
    assert "HF_HUB_OFFLINE" in surroundings.hub().found


def test_a_place_that_no_run_can_be_made_in_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path))
    a_file = tmp_path / "a_file"
    a_file.touch()
    # Nobody can write into /proc, root neither.
    for runs, words in (
        (a_file, "Not a directory"),
        (a_file / "runs", f"{a_file}: Not a directory"),
        (Path("/proc/runs"), "/proc: No such file or directory"),
    ):
        found, cache = machine.disks(runs)
        assert (found.name, found.state, cache.state) == ("disk of runs", "missing", "ok")
        assert found.found.endswith(words) and found.advice and not found.needed
    found, _ = machine.disks(tmp_path / "not" / "yet")
    assert found.state != "missing" and not (tmp_path / "not").exists()
    assert sorted(tmp_path.iterdir()) == [a_file]


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path / "not" / "yet"))
    assert surroundings.cache_folder().state == "ok"
    assert not (tmp_path / "not").exists()
    assert surroundings.builtin_files().state == "check"
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("MAKD_CACHE", str(tmp_path / "a_file"))
    unfit = surroundings.cache_folder()
    assert unfit.needed and "MAKD_CACHE" in unfit.advice
