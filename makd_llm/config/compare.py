"""A comparison: what its rows share, and what each of them learns instead."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from makd_llm.config.load import read_values, validated
from makd_llm.config.section import FileName, Place, Positive, Section
from makd_llm.files import is_plain_name


class RowConfig(Section):
    """One row: a baseline that is measured as it is, or what a student learns."""

    label: str | None = None
    """As tables call it; null: its name."""
    baseline: Literal["lead", "teacher", "factorized"] | None = None
    distil: dict[str, Any] | None = None
    """A run's block `distil`, over that of the comparison's `run`."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "RowConfig":
        if (self.baseline is None) == (self.distil is None):
            raise ValueError("a row has either baseline or distil: give one of them")
        return self


class CompareConfig(Section):
    """One teacher, a student for each keep ratio, and the rows, each with every seed."""

    name: FileName
    folder: Place
    ds: Place = Path("ds_configs/zero1.json")
    """DeepSpeed's JSON, for all rows."""
    ranks: Positive = 1
    """Processes of a row; where there are GPUs, one for each."""
    keep_ratios: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    against: tuple[str, ...] = ("kd", "tinybert")
    """Rows that all others are tested against."""
    run: dict[str, Any]
    """A run's config, as of `makd train`, that all rows have."""
    rows: dict[str, RowConfig] = Field(min_length=1)

    @field_validator("keep_ratios", "seeds")
    @classmethod
    def _different(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        twice = next((value for value, count in Counter(given).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice:g} stands there twice: once is enough")
        return given

    @model_validator(mode="after")
    def _names(self) -> "CompareConfig":
        for name in self.rows:
            if not is_plain_name(name):
                raise ValueError(f"rows.{name}: folders are named after it: give a plain name")
        for name in self.against:
            if name not in self.rows or self.rows[name].distil is None:
                raise ValueError(f"against: there is no row {name} that learns: name another")
        return self


def load_comparison(path: Path, overrides: list[str]) -> CompareConfig:
    """Reads a comparison's YAML. overrides: `key.path=value` of its section `run`.

    Raises UserError: missing or malformed file, unknown key, wrong type, value out of range.
    """
    return validated(CompareConfig, read_values(path, overrides, under="run"), str(path), overrides)
