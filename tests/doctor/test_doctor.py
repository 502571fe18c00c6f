"""`makd doctor` on the machine that runs the tests."""

import json
import time
from pathlib import Path

import pytest

from makd_llm import doctor
from makd_llm.cli import main
from makd_llm.doctor.finding import Finding


def test_it_looks_at_everything_and_is_quick(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.process_time()
    main(["doctor", "--json", "--ranks", "3", "--runs", str(tmp_path / "runs")])
    assert time.process_time() - began < 20
    said = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in said["findings"]}
    assert said["ok"] is True  # or these tests could not run
    for name in ("Python", "gcc", "g++", "ninja", "torch", "DeepSpeed", "Triton", "CPU", "load"):
        assert name in findings
    for name in ("memory", "/dev/shm", "cache folder", "demo", "Hub", "sbatch", "disk of runs"):
        assert name in findings
    for finding in findings.values():
        assert finding["state"] in ("ok", "slow", "check", "missing")
        assert finding["found"]
        assert finding["advice"] or finding["state"] == "ok"
    assert findings["CPU products"]["values"]["fp32_flops"] > 1e8
    assert findings["threads"]["values"]["ranks"] == 3
    assert not (tmp_path / "runs").exists()


def test_something_needed_that_is_missing_ends_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Finding("gcc", "missing", "not found [at all]", "install it", needed=True),
        Finding("numactl", "missing", "not found", "install it"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda ranks, runs: iter(found))
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "not found [at all]" in said.out
    assert said.err == "makd: needed, and missing: gcc; the table says what to do\n"
