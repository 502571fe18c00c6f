"""The one place where the word given as `impl` becomes an implementation. Nothing falls back."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def choose(impl: str, implementations: Mapping[str, T], auto: str) -> str:
    """The name behind `impl`: itself, or `auto` for "auto". ValueError names the known ones."""
    if impl == "auto":
        return auto
    if impl not in implementations:
        known = ", ".join(["auto", *implementations])
        raise ValueError(f"impl={impl!r} is not known; choose one of: {known}")
    return impl
