"""The presets: one YAML each in this package's folder `presets`, which `configs/presets` shows.

A preset is a part of a run's config, its block `distil`. Whatever is given beside it wins.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from makd_llm.errors import UserError

_FOLDER = files("makd_llm.config") / "presets"


def preset_names() -> list[str]:
    """All presets, by name."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@cache
def _read(name: str) -> Any:
    return OmegaConf.create((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def preset(name: str) -> dict[str, Any]:
    """The block `distil` of a preset, as plain values. Raises UserError where there is none."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(preset_names())}"
        raise UserError(f"distil.preset: there is no preset {name!r}; {advice}")
    values = OmegaConf.to_container(_read(name).distil, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section. Lists and single values replace one another."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        result[key] = merged(under, value) if both else value  # type: ignore[arg-type]
    return result
