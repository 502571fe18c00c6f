"""What every section of a run's config is made of."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _file_name(name: str) -> str:
    if not name.isprintable() or name in ("", ".", "..") or set(name) & set("/\\"):
        raise ValueError("files are named after it: give a name without / and \\, as train")
    return name


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("nobody's home folder; write the path in full") from None


Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FileName = Annotated[str, AfterValidator(_file_name)]
Place = Annotated[Path, AfterValidator(_expanded)]
"""A file or folder; a leading ~ is somebody's home."""
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


class Section(BaseModel):
    """Base of every section: immutable, and strict about the names of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
