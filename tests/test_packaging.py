"""What gets installed: both packages, from one distribution, and nothing that shadows another's.

Nothing here needs a network: the build backend is in the `dev` extra, and the dependencies are
those of the environment that runs the tests.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import makd_llm

CHECKOUT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]

WHERE = (
    "import importlib.util, makd_llm, makd_kernels\n"
    "print(makd_llm.__file__, makd_kernels.__file__, makd_llm.__version__)\n"
    "print(*[getattr(importlib.util.find_spec(n), 'origin', None) for n in ('kernels', 'tests')])\n"
)


def run(command: list[str], cwd: Path, pythonpath: Path | None = None) -> list[str]:
    """Run to the end in a folder, without this process's own PYTHONPATH; the lines it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "makd_llm", "kernels", "tests"):
        source = CHECKOUT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, copy / name, ignore=skip)
        else:
            shutil.copy(source, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), str(checkout)], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def editable_python(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh environment with an editable install, which sees the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    (site,) = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    # As a path line in a .pth file: it adds the libraries but not their own editable installs.
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # `--python` makes pip act on that environment; its build backend comes from the libraries.
    run([*PIP, "--python", python, "install", *OFFLINE, "-e", str(checkout)], cwd=folder)
    return python


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
        (metadata,) = (name.split("/")[0] for name in members if name.endswith("/METADATA"))
        entry_points = archive.read(f"{metadata}/entry_points.txt").decode()
    code = {name for name in members if not name.startswith(metadata)}
    expected = {
        path.relative_to(root).as_posix()
        for root in (checkout, checkout / "kernels")
        for package in ("makd_llm", "makd_kernels")
        for path in root.glob(f"{package}/**/*.*")
        if path.suffix in (".py", ".yaml", ".sbatch", ".html", ".css", ".js")
    }
    assert {"makd_llm/__init__.py", "makd_kernels/__init__.py"} <= expected
    assert code == expected
    assert metadata == f"makd_llm-{makd_llm.__version__}.dist-info"
    assert "makd = makd_llm.cli:main" in entry_points
    assert any(name.startswith(metadata) and name.endswith("LICENSE") for name in members)


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run([*PIP, "install", *OFFLINE, "--target", str(target), str(wheel)], cwd=tmp_path)
    places, shadows = run([sys.executable, "-c", WHERE], cwd=tmp_path, pythonpath=target)
    ours, kernels, version = places.split()
    assert Path(ours).is_relative_to(target)
    assert Path(kernels).is_relative_to(target)
    assert version == makd_llm.__version__
    assert str(target) not in shadows


@pytest.mark.parametrize("inside", [False, True])
def test_an_editable_install_works_inside_and_outside_the_checkout(
    inside: bool, editable_python: str, checkout: Path, tmp_path: Path
) -> None:
    cwd = checkout if inside else tmp_path
    places, shadows = run([editable_python, "-c", WHERE], cwd)
    ours, kernels, _ = places.split()
    assert Path(ours) == checkout / "makd_llm" / "__init__.py"
    assert Path(kernels) == checkout / "kernels" / "makd_kernels" / "__init__.py"
    assert str(checkout) not in shadows, "`kernels` or `tests` resolves to a package of ours"


def test_transformers_works_from_the_root_of_the_checkout(
    editable_python: str, checkout: Path
) -> None:
    """There `kernels` is a folder on the path, which transformers must not take for the library."""
    program = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)\n"
        "print(LlamaForCausalLM(config).num_parameters() > 0)\n"
    )
    assert run([editable_python, "-c", program], checkout) == ["True"]


def test_importing_makd_llm_leaves_deepspeed_alone(checkout: Path, tmp_path: Path) -> None:
    """Loading an exported student needs no training engine."""
    program = "import sys, makd_llm; print('deepspeed' in sys.modules)"
    assert run([sys.executable, "-c", program], tmp_path, pythonpath=checkout) == ["False"]


def test_nothing_named_like_anothers_package_is_in_the_tree() -> None:
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
    assert list((CHECKOUT / "tests").rglob("__init__.py")) == []
