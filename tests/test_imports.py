"""Who may import whom, read from the syntax trees of the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# Everybody in makd_llm may import these.
COMMON = ("makd_llm.errors", "makd_llm.distributed", "makd_llm.memory")

# Of all that is ours, the left imports nothing but itself, COMMON and the right.
SEES_ONLY = {
    "makd_llm.errors": (),
    "makd_llm.operators": (),
    "makd_llm.distributed": ("makd_llm.operators",),
    # Read by every rank before anything of weight is imported.
    "makd_llm.cluster.slurm": (),
    "makd_llm.objectives": ("makd_kernels", "makd_llm.data.batch", "makd_llm.shown"),
    # Its file travels with an exported model to places where nothing of ours is installed.
    "makd_llm.models.modeling_lowrank": (),
}

# Only the right (and the left itself) import the left.
COMPOSERS = (
    "makd_llm.train",
    "makd_llm.pipeline",
    "makd_llm.cutting",
    "makd_llm.teaching",
    "makd_llm.evaluating",
    "makd_llm.factorization",
    "makd_llm.teacher_summaries",
    "makd_llm.cli",
    "makd_llm.cli_generate",
    "makd_llm.cli_slurm",
    "makd_llm.cli_compare",
    "makd_llm.comparison",
    "makd_llm.planning",
    "makd_llm.testing",
)
BUILDERS = ("makd_llm.train.build", "makd_llm.train.deepspeed_config")
SEEN_ONLY_BY = {
    "makd_llm.objectives": COMPOSERS,
    "makd_llm.train": COMPOSERS,
    "makd_llm.pipeline": ("makd_llm.cli", "makd_llm.factorization", "makd_llm.comparison"),
    "makd_llm.comparison": ("makd_llm.cli_compare",),
    "makd_llm.factorization": ("makd_llm.cli",),
    "makd_llm.teacher_summaries": ("makd_llm.cli_generate", "makd_llm.pipeline"),
    "makd_llm.cutting": ("makd_llm.pipeline", "makd_llm.evaluating"),
    "makd_llm.teaching": ("makd_llm.pipeline", "makd_llm.testing"),
    "makd_llm.evaluating": ("makd_llm.pipeline",),
    "makd_llm.config": (
        "makd_llm.pipeline",
        "makd_llm.cutting",
        "makd_llm.teaching",
        "makd_llm.evaluating",
        "makd_llm.factorization",
        "makd_llm.teacher_summaries",
        "makd_llm.cli",
        "makd_llm.cli_generate",
        "makd_llm.cli_slurm",
        "makd_llm.cli_compare",
        "makd_llm.comparison",
        "makd_llm.planning",
        "makd_llm.checks",
        "makd_llm.testing",
        *BUILDERS,
    ),
    "makd_llm.checks": (
        "makd_llm.pipeline",
        "makd_llm.teacher_summaries",
        "makd_llm.comparison",
        "makd_llm.cli_slurm",
        "makd_llm.planning",
    ),
    "makd_llm.testing": (),
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import `imported`, a dotted name of ours."""
    if within(importer, ("makd_kernels",)):
        return within(imported, ("makd_kernels",))
    if within(imported, COMMON):
        return True
    for package, seen in SEES_ONLY.items():
        if within(importer, (package,)) and not within(imported, (package, *seen)):
            return False
    for package, users in SEEN_ONLY_BY.items():
        if within(imported, (package,)) and not within(importer, (package, *users)):
            return False
    return True


def imports_of_ours(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """The dotted names of makd_llm and makd_kernels that a module imports, at any depth in it."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        yield from (name for name in names if within(name, ("makd_llm", "makd_kernels")))


def test_the_import_rule_holds() -> None:
    broken = []
    for root in (CHECKOUT, CHECKOUT / "kernels"):
        for path in [*root.glob("makd_llm/**/*.py"), *root.glob("makd_kernels/**/*.py")]:
            is_package = path.name == "__init__.py"
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            for imported in imports_of_ours(path.read_text(), module, is_package):
                if not allowed(module, imported):
                    broken.append(f"{module} must not import {imported}")
    assert broken == []


def test_there_is_something_to_check() -> None:
    source = (CHECKOUT / "makd_llm" / "distributed.py").read_text()
    assert set(imports_of_ours(source, "makd_llm.distributed")) == {
        "makd_llm.errors.Disconnected",
        "makd_llm.operators",
        "makd_llm.errors.UserError",
    }
    assert (CHECKOUT / "kernels" / "makd_kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("importer", "source", "fine"),
    [
        ("makd_kernels.attention_kl", "import makd_llm.errors", False),
        ("makd_kernels.attention_kl", "from makd_kernels import divergences", True),
        ("makd_llm.objectives.logits", "from makd_llm.models import capture", False),
        ("makd_llm.objectives.logits", "from makd_llm.data import batch", True),
        ("makd_llm.objectives.logits", "from ..data.loader import Loader", False),
        ("makd_llm.objectives.logits", "from .hidden import term", True),
        ("makd_llm.objectives.logits", "def f():\n    import makd_llm.config", False),
        ("makd_llm.models.teacher", "from makd_llm.objectives.combine import Losses", False),
        ("makd_llm.models.teacher", "from makd_llm import train", False),
        ("makd_llm.evaluation.rouge", "from makd_llm.config import RunConfig", False),
        ("makd_llm.data.records", "from makd_llm.errors import UserError", True),
        ("makd_llm.train.step", "from makd_llm.objectives.combine import Losses", True),
        ("makd_llm.train.step", "from makd_llm.config import RunConfig", False),
        ("makd_llm.pipeline", "from makd_llm.config import RunConfig", True),
        ("makd_llm.pipeline", "from makd_llm import testing", False),
    ],
)
def test_the_rule_tells_good_from_bad(importer: str, source: str, fine: bool) -> None:
    (imported,) = imports_of_ours(source, importer)
    assert allowed(importer, imported) == fine
