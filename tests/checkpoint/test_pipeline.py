"""Exported students in transformers' own pipeline, where nothing of ours is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from makd_llm.cli import main
from makd_llm.factorize.student import Recipe, factorize
from makd_llm.models.source import load_tokenizer

# Isolated from PYTHONPATH and the working directory, and barred by name where it is installed.
STOCK = """
import json, sys
sys.modules["makd_llm"] = sys.modules["makd_kernels"] = sys.modules["deepspeed"] = None
import torch
from transformers import pipeline
torch.set_num_threads(1)
said = {}
for name, folder, remote in (("merged", sys.argv[1], False), ("student", sys.argv[2], True)):
    write = pipeline("text-generation", model=folder, trust_remote_code=remote, dtype="float32")
    (text,) = write("the cat sat", max_new_tokens=6, do_sample=False, return_full_text=False)
    ids = write.tokenizer("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = write.model(ids).logits[0, -1]
    said[name] = [type(write.model).__module__, text["generated_text"], logits.tolist()]
try:
    pipeline("text-generation", model=sys.argv[2], trust_remote_code=False)
except ValueError as error:
    said["without trust"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def student(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored student of the tiny teacher, and beside it `merged`, as exported."""
    folder = tmp_path_factory.mktemp("pipeline") / "student"
    recipe = Recipe(keep_ratio=0.5, method="svd", rank_multiple=1)
    tokenizer = load_tokenizer(tiny / "teacher")
    factorize(tiny / "teacher", folder, recipe, [], tokenizer=tokenizer, dtype=torch.float32)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [low-rank]\n---\n\n# A student\n")
    main(["export", str(folder), str(folder.parent / "merged"), "--merge"])
    return folder


def test_both_forms_run_in_a_stock_pipeline(student: Path, tmp_path: Path) -> None:
    merged = student.parent / "merged"
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(merged), str(student)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["merged"][0].startswith("transformers.models.llama")
    assert said["student"][0].startswith("transformers_modules.")
    assert said["merged"][1] == said["student"][1] != ""
    assert said["merged"][2] == pytest.approx(said["student"][2], rel=1e-2, abs=1e-2)
    assert "trust_remote_code=True" in said["without trust"]
    assert "MISSING" not in done.stderr and "newly initialized" not in done.stderr


def test_the_merged_form_takes_the_card_along(student: Path) -> None:
    card = (student.parent / "merged" / "README.md").read_text()
    assert "license: mit" in card and "# A student" in card and "low-rank" not in card
