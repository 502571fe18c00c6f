"""An exported student under `lm_eval --model hf`, on tasks of a YAML and a JSONL file, offline."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval; `make test-ecosystem` installs it")

import yaml

from makd_llm.checkpoint.export import merge
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.source import load_tokenizer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"

# What lm-eval calls perplexity here is exp of the mean loss of a whole continuation.
LIKELIHOOD: dict[str, Any] = {
    "task": "tiny_likelihood",
    "output_type": "loglikelihood",
    "doc_to_text": "{{document}} tl;dr",
    "doc_to_target": " {{summary}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity"}],
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def guide_command() -> list[str]:
    """The guide's call of lm_eval: its arguments, one by one."""
    (block,) = (block for block in fenced("sh") if "lm_eval" in block)
    line = next(x for x in block.replace("\\\n", " ").splitlines() if "lm_eval" in x)
    return line.partition("lm_eval ")[2].split()


@pytest.fixture(scope="module")
def student(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored student of the tiny teacher in fp32, and beside it `merged`."""
    folder = tmp_path_factory.mktemp("lm-eval") / "student"
    recipe = Recipe(keep_ratio=0.5, method="svd", rank_multiple=1)
    tokenizer = load_tokenizer(tiny / "teacher")
    factorize(tiny / "teacher", folder, recipe, [], tokenizer=tokenizer, dtype=torch.float32)
    merge(folder, folder.with_name("merged"))
    return folder


@pytest.fixture(scope="module")
def rows(tiny: Path, student: Path) -> list[dict[str, str]]:
    """Six records with the guide's columns, as the file that its YAML names."""
    lines = (tiny / "validation.jsonl").read_text().splitlines()[:6]
    rows = [json.loads(line) | {"aspect": "outcome"} for line in lines]
    path = student.parent / "aclsum" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tasks = student.parent / "tasks"
    tasks.mkdir()
    (of_the_guide,) = fenced("yaml")
    (tasks / "aclsum.yaml").write_text(of_the_guide)
    same_data = {
        key: value
        for key, value in yaml.safe_load(of_the_guide).items()
        if key.startswith("dataset") or key == "validation_split"
    }
    (tasks / "likelihood.yaml").write_text(yaml.safe_dump(LIKELIHOOD | same_data))
    return rows


def measured(student: Path, form: str, home: Path, *model_args: str) -> dict[str, Any]:
    """Runs the guide's command on a form of the student; the results by task."""
    given = guide_command()
    changed = {
        "--model_args": ",".join([f"pretrained={form}", "dtype=float32", *model_args]),
        "--tasks": "aclsum_sentences,tiny_likelihood",
        "--limit": "6",
        "--output_path": f"out-{form}",
    }
    for option, value in changed.items():
        given[given.index(option) + 1] = value
    given.remove("--apply_chat_template")  # the tiny tokenizer has none
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *given],
        cwd=student.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (student.parent / f"out-{form}").glob("**/results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())["results"]
    return found


def mean_loss(student: Path, rows: list[dict[str, str]]) -> float:
    """Nats of a summary after its document, the mean over the rows, by our own model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(student).eval()
    tokenizer: Any = load_tokenizer(student)
    losses = []
    for row in rows:
        prompt, target = f"{row['document']} tl;dr", f" {row['summary']}"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        whole = tokenizer(prompt + target, add_special_tokens=False).input_ids
        assert whole[: len(before)] == before
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double()
        log_p = logits.log_softmax(-1)
        places = range(len(before) - 1, len(whole) - 1)
        losses.append(-sum(log_p[at, whole[at + 1]].item() for at in places))
    return sum(losses) / len(losses)


@pytest.mark.timeout(900)
def test_both_forms_are_measured_alike_and_as_we_measure(
    student: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    factored = measured(student, "student", tmp_path, "trust_remote_code=True")
    merged = measured(student, "merged", tmp_path)
    for found in (factored, merged):
        value = found["tiny_likelihood"]["perplexity,none"]
        assert math.log(value) == pytest.approx(mean_loss(student, rows), rel=1e-3)
        assert 0 <= found["aclsum_sentences"]["chrf,none"] <= 100
    one, other = (f["aclsum_sentences"]["chrf,none"] for f in (factored, merged))
    assert one == pytest.approx(other, abs=1e-6)
