"""The students on the way to a student, so that what each step is worth can be told apart.

Plain SVD, whitening, the recipe's own method and budget, refinement: every rung keeps the same
share of the parameters and is cut with the same calibration text.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from makd_llm import distributed
from makd_llm.data.batch import Batch
from makd_llm.factorize.student import Recipe, factorize


def name_of(recipe: Recipe) -> str:
    """A recipe in a few words: "fisher, greedy + refinement"."""
    budget = "" if recipe.budget == "uniform" else f", {recipe.budget}"
    limits = " within limits" if recipe.limits else ""
    return recipe.method + budget + limits + (" + refinement" if recipe.refine else "")


def rungs(recipe: Recipe) -> dict[str, Recipe]:
    """What comes before this recipe, the simplest first, by name."""
    svd = replace(recipe, method="svd", budget="uniform", limits={}, refine=None)
    whitened = [replace(svd, method="whitened")] if recipe.needs_calibration else []
    before = [svd, *whitened, replace(recipe, refine=None)]
    return {name_of(rung): rung for rung in before if rung != recipe}


def measured_rungs(
    start: Path,
    recipe: Recipe,
    batches: Sequence[Batch],
    scratch: Path,
    measure: Callable[[Path], float],
    *,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """What is measured of each student on the way to this recipe's, by name. Collective.

    start: the model that is cut. scratch: takes one student at a time and the components of the
    methods (components_in), and is removed at the end.
    """
    found = {}
    for name, rung in rungs(recipe).items():
        tell(f"stages: {name}")
        components = components_in(scratch, rung)
        student = scratch / "student"
        factorize(start, student, rung, batches, tokenizer=None, dtype=dtype, components=components)
        found[name] = measure(student)
    distributed.on_main(partial(shutil.rmtree, ignore_errors=True), scratch)
    return found


def components_in(scratch: Path, recipe: Recipe) -> Path:
    """Where the components of a recipe's method are, so that its rungs share them."""
    return scratch / recipe.calibrated_as
