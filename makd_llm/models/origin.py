"""Where the parts of a student come from in its teacher, where the two differ in shape.

A student with fewer layers, narrower hidden states or fewer heads keeps this in its own config
(`config.makd_origin`), so it travels with the folder: factorization hands it on, and distillation
finds in it what to compare with what. A student of the teacher's own shape has none.
"""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

KEY = "makd_origin"


@dataclass(frozen=True)
class Origin:
    """The teacher's parts that a student was made of; None: all of them, in their order.

    Attributes:
        layers: for each of the student's layers, the teacher's layer.
        teacher_layers: how many layers the teacher has.
        channels: of the hidden states, the teacher's channels that the student keeps.
        neurons: for each of the student's layers, the feed-forward neurons kept.
        query_heads: for each of the student's layers, the teacher's query heads in the student's
            order.
        key_value_heads: for each of the student's layers and key-value heads, the teacher's that
            were merged into it.
    """

    layers: tuple[int, ...]
    teacher_layers: int
    channels: tuple[int, ...] | None = None
    neurons: tuple[tuple[int, ...], ...] | None = None
    query_heads: tuple[tuple[int, ...], ...] | None = None
    key_value_heads: tuple[tuple[tuple[int, ...], ...], ...] | None = None


def origin_of(config: PreTrainedConfig) -> Origin | None:
    """What a student's config says of its origin; None: it has its teacher's shape."""
    said: dict[str, Any] | None = getattr(config, KEY, None)
    if said is None:
        return None
    return Origin(**{name: _tuples(value) for name, value in said.items()})


def set_origin(config: PreTrainedConfig, origin: Origin) -> None:
    """Writes it into a config, as plain lists and numbers."""
    setattr(config, KEY, asdict(origin))


def clear_origin(config: PreTrainedConfig) -> None:
    """Makes a config say that it has its teacher's shape."""
    if hasattr(config, KEY):
        delattr(config, KEY)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
