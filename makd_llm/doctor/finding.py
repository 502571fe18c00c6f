"""What the doctor says of one thing."""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "slow", "check", "missing"]
"""`check`: it may be meant so. `missing`: what needs it does not work."""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: what was looked at.
        state: how it stands.
        found: what is there, in words.
        advice: what to do; empty where all is well.
        needed: no run works without it. Only with `missing`.
        values: the numbers behind the words, for programs; units are in their names.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    needed: bool = False
    values: dict[str, float | int | str | list[str]] = field(default_factory=dict)
