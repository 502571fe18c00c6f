"""The objectives that a run can be made of, and the settings of each.

A run names its objectives freely: `objectives: {late: {objective: hidden, layers: [last]}}`; a name
that is an objective's own need not repeat it. A list does as well, `[{objective: hidden, layers:
[last]}]`. OBJECTIVES is the table of all there are.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag

from makd_llm.config.section import Fraction, NotNegative, Positive, Role, Section

Layers = Literal["shallow", "deep", "all"] | tuple[int | Literal["middle", "last"], ...]
"""Of the student; negative numbers count from the last layer."""


class ObjectiveConfig(Section):
    """What every objective has."""

    objective: str
    """Its kind, one of OBJECTIVES; null: the name that it stands under."""
    weight: NotNegative = 1.0
    """0 switches it off, and nothing is captured for it."""
    every: Positive = 1
    """Learnt on every n-th step only, and not computed on the others."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight rises from 0."""


class CrossEntropyConfig(ObjectiveConfig):
    """Model level: cross-entropy on the reference summaries."""


class LogitsConfig(ObjectiveConfig):
    """Model level: divergence of next-token distributions, times temperature squared."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"
    ] = "forward_kl"
    beta: Fraction = 0.5
    """Of the mixture in jsd: 0 is the forward KL, 1 the reverse KL."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Of the mixture in the skewed KLs: 0 is the plain KL."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


class SinkhornConfig(ObjectiveConfig):
    """Model level: optimal transport between the next-token distributions of a record (SinKD)."""

    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    regularization: Annotated[float, Field(gt=0.0)] = 0.1
    iterations: Positive = 20
    positions: Positive = 64
    """Summary tokens of a record that take part: evenly spread where it has more."""


class RankingConfig(ObjectiveConfig):
    """Model level: rank correlation of the likeliest tokens (RLKD)."""

    top_k: Annotated[int, Field(ge=2)] = 5
    softness: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the student's ranks, in units of its logits' standard deviation."""


class MatrixConfig(ObjectiveConfig):
    """Matrix level: outputs of q k v o (L_MHA) and gate up down (L_FNN)."""

    layers: Layers = "shallow"
    roles: tuple[Role, ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    input: Literal["student", "teacher"] = "student"
    normalize: Literal["relative", "mean"] = "relative"


class AttentionConfig(ObjectiveConfig):
    """Layer level: divergence of attention distributions, mean over heads."""

    layers: Layers = "deep"
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "probability_mse", "logit_mse"] = (
        "forward_kl"
    )
    beta: Fraction = 0.5
    """Of the mixture in jsd: 0 is the forward KL, 1 the reverse KL."""


class HiddenConfig(ObjectiveConfig):
    """Layer level: distance of the layers' hidden states."""

    layers: Layers = "deep"
    metric: Literal["squared", "cosine"] = "squared"
    """The squared error, or 1 - cosine."""
    normalize: Literal["relative", "mean"] = "relative"
    """Of the squared error: by the teacher's squared norm, or by the width."""


class RelationsConfig(ObjectiveConfig):
    """Layer level: divergence of the tokens' relations to each other, among queries, keys and
    values (MiniLM v2). Widths may differ.
    """

    layers: Layers = ("last",)
    roles: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    heads: Positive | None = None
    """Into which each is split anew; null: the student's key-value heads."""


class LocalConfig(ObjectiveConfig):
    """Layer level: every layer by itself against the teacher's (Lillama); no gradient reaches the
    layers before it. Runs the layers once more for each of the inputs.
    """

    layers: Layers = "all"
    inputs: Literal["student", "teacher", "both"] = "both"


class AttributionConfig(ObjectiveConfig):
    """Model level: which words of the document justify the summary (AD-KD, for decoders)."""

    every: Positive = 8
    method: Literal["gradients", "occlusion"] = "gradients"
    """Integrated gradients of the document's embeddings; or, forward only, what the summary loses
    when a span of the document is blanked."""
    views: Annotated[int, Field(ge=0)] = 2
    """The teacher's likeliest tokens that are explained, beside the reference's."""
    positions: Positive = 8
    """Summary tokens of a record that are explained together."""
    steps: Positive = 1
    """Of the integration, from blank embeddings on; 1 is gradient times input."""
    top_k: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Share of the teacher's embedding dimensions that count, of every token the largest."""
    spans: Annotated[int, Field(ge=2)] = 8
    """Of the document, in occlusion."""
    second_order: Literal["auto", "exact", "differences"] = "auto"
    """How the student learns from its gradients: by a backward through the backward, or by central
    differences of two ordinary ones. ZeRO-3 has no weights for the former: auto takes the latter
    there and under gradient checkpointing."""


class AuxiliaryConfig(ObjectiveConfig):
    """Matrix level: the auxiliary tensors of `distil.over_parameterize` against the teacher's
    (OPDF).
    """

    layers: Layers = "all"


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "cross_entropy": CrossEntropyConfig,
    "logits": LogitsConfig,
    "sinkhorn": SinkhornConfig,
    "ranking": RankingConfig,
    "attribution": AttributionConfig,
    "matrix": MatrixConfig,
    "attention": AttentionConfig,
    "hidden": HiddenConfig,
    "relations": RelationsConfig,
    "local": LocalConfig,
    "auxiliary": AuxiliaryConfig,
}


def _kind(value: Any) -> str:
    kind = value.get("objective") if isinstance(value, Mapping) else value.objective
    return str(kind)


if TYPE_CHECKING:
    Objective = ObjectiveConfig
else:
    _TAGGED = tuple(Annotated[section, Tag(kind)] for kind, section in OBJECTIVES.items())
    Objective = Annotated[Union[_TAGGED], Discriminator(_kind)]  # noqa: UP007


def by_name(given: Any) -> Any:
    """A list's objectives by their kinds, the second of a kind with a number; what is no list stays
    as it is. Raises ValueError.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        return given
    found: dict[str, Any] = {}
    for value in given:
        if not isinstance(value, Mapping) or not isinstance(value.get("objective"), str):
            raise ValueError("every objective of a list is to say which, as {objective: hidden}")
        name, number = value["objective"], 2
        while name in found:
            name, number = f"{value['objective']}_{number}", number + 1
        found[name] = value
    return found


def with_kinds(given: Any) -> Any:
    """A mapping's objectives, each with its kind. Raises ValueError."""
    if not isinstance(given, Mapping):
        return given  # pydantic says what it should have been
    return {name: _with_kind(str(name), value) for name, value in given.items()}


def _with_kind(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}, expected settings, as {{weight: 1.0}}")
    kind = value.get("objective") or name
    if kind not in OBJECTIVES:
        near = difflib.get_close_matches(str(kind), OBJECTIVES, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(OBJECTIVES)}"
        raise ValueError(f"there is no objective {kind!r}; {advice}")
    return {**value, "objective": kind}
