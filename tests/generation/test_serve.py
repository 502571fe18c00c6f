"""A real server, `transformers serve`, writes what the local engine writes. (vLLM is the same
call.)
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from makd_llm import distributed
from makd_llm.config import DataConfig
from makd_llm.config.sequences import GenerationConfig
from makd_llm.generation.endpoint import Endpoint
from makd_llm.teacher_summaries import Task, write_with_endpoint
from makd_llm.testing import launch_ranks

pytestmark = pytest.mark.slow

FP32 = {"zero_optimization": {"stage": 0}}


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The URL of a server of the model; ends with the `with`."""
    port = distributed.free_port()
    url = f"http://127.0.0.1:{port}"
    transformers = str(Path(sys.executable).parent / "transformers")
    with log.open("w") as file:
        process = subprocess.Popen(
            [transformers, "serve", str(model), "--port", str(port), "--host", "127.0.0.1",
             "--device", "cpu"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def task_of(data: str, model: str, out: Path) -> Task:
    return Task(
        Path(model),
        DataConfig(source=data, max_length=40, limit=12, prompt={"user_template": "{document} =>"}),
        GenerationConfig(max_new_tokens=8, batch_size=4),
        out,
        piece=5,
    )


def written_locally(data: str, models: list[str], out: str) -> None:
    from makd_llm.teacher_summaries import write_with_engine

    distributed.init()
    for number, model in enumerate(models):
        task = task_of(data, model, Path(out) / f"local-{number}")
        write_with_engine(task, FP32, lambda text: None)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.timeout(600)
def test_a_real_server_writes_what_the_local_engine_writes(
    tiny: Path, chat_teacher: Path, tmp_path: Path
) -> None:
    data, models = str(tiny / "train.jsonl"), [tiny / "teacher", chat_teacher]
    launch_ranks(1, written_locally, data, [str(m) for m in models], str(tmp_path))
    for number, model in enumerate(models):
        out = tmp_path / f"served-{number}"
        with served(model, tmp_path / f"serve-{number}.log") as url:
            endpoint = Endpoint(url, str(model), concurrency=3, retries=2, timeout=60.0)
            found = write_with_endpoint(task_of(data, str(model), out), endpoint, print)
        local = rows_of(tmp_path / f"local-{number}")
        assert found["documents"] == 12 and len(local) > 8
        assert rows_of(out) == local
        assert len({row["summary"] for row in local}) > 4
    assert rows_of(tmp_path / "local-0") != rows_of(tmp_path / "local-1")
