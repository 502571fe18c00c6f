"""The students on the way to a student, so that what each step is worth can be told apart.

Plain SVD, whitening, the recipe's own method and budget, refinement: every rung keeps the same
share of the parameters and is cut with the same calibration text.
"""

from dataclasses import replace

from makd_llm.factorize.student import Recipe


def name_of(recipe: Recipe) -> str:
    """A recipe in a few words: "fisher, greedy + refinement"."""
    budget = "" if recipe.budget == "uniform" else f", {recipe.budget}"
    return recipe.method + budget + (" + refinement" if recipe.refine else "")


def rungs(recipe: Recipe) -> dict[str, Recipe]:
    """What comes before this recipe, the simplest first, by name."""
    svd = replace(recipe, method="svd", budget="uniform", limits={}, refine=None)
    whitened = [replace(svd, method="whitened")] if recipe.needs_calibration else []
    before = [svd, *whitened, replace(recipe, refine=None)]
    return {name_of(rung): rung for rung in before if rung != recipe}
