"""What a forward keeps for its backward, and what the objectives have captured, in bytes per token.

A tensor is kept where autograd needs it for a gradient, and counted once however many operations
keep it. The rules below are read from the layers of transformers 5; tests/cluster holds them
against what autograd keeps in a real layer of every family. Attention is the fused kernel, which
keeps queries, keys, values, its output and one fp32 number per head, and no T x T map but a mask,
where a sliding window needs one.
"""
# T tokens of a record, D width, Q outputs of q, G outputs of k, F neurons,
# R ranks of a layer's matrices

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from makd_llm.cluster.sizes import Sizes
from makd_llm.shown import Needs


@dataclass(frozen=True)
class Rules:
    """How a family's layer is built.

    Attributes:
        norm: "lean" is `makd_kernels.lean.rms_norm`, "layer" torch's layer norm: both keep their
            input as it is; "rms32" computes in fp32, and keeps input and result so.
        norms: of a layer's stream. parallel: all of them read the same one.
        head_norms: queries and keys are normed too, by head or whole.
        rotary: queries and keys are turned, so that attention keeps other tensors than the
            matrices' outputs.
        fused: values are a part of one module's outputs, all of which stay with them.
        copied: the attention's output is copied before `o` reads it.
        repeated: keys are repeated for all heads.
        lean_gate: the feed-forward part is `makd_kernels.lean.swiglu`.
    """

    norm: Literal["lean", "rms32", "layer"] = "lean"
    norms: int = 2
    parallel: bool = False
    head_norms: Literal["", "heads", "whole"] = ""
    rotary: bool = True
    fused: bool = False
    copied: bool = False
    repeated: bool = False
    lean_gate: bool = False


RULES: dict[str, Rules] = {
    "llama": Rules(lean_gate=True),
    "qwen2": Rules(lean_gate=True),
    "qwen3": Rules(head_norms="heads", lean_gate=True),
    "mistral": Rules(lean_gate=True),
    "gemma": Rules("rms32"),
    "gemma3_text": Rules("rms32", norms=4, head_norms="heads"),
    "olmo2": Rules("rms32", head_norms="whole", lean_gate=True),
    "phi3": Rules(fused=True, copied=True),
    "opt": Rules("layer", rotary=False),
    "gpt_neox": Rules("layer", parallel=True, fused=True, copied=True),
    "falcon": Rules("layer", parallel=True, fused=True, copied=True, repeated=True),
    "gpt2": Rules("layer", rotary=False),
}

# Tensors of F features that an activation keeps beside its result.
_ACTIVATION_KEEPS = {"gelu_new": 4, "relu": 0}


def rules_of(sizes: Sizes) -> Rules:
    """How a model's layers are built."""
    rules = RULES[sizes.family]
    return replace(rules, parallel=rules.parallel and not sizes.sequential)


def layer_keeps(
    sizes: Sizes, weight: int, layer: int, length: int, *, noted: bool = True, whole: bool = True
) -> int:
    """Bytes per token that one decoder layer keeps for the backward. noted: inside `keeping_less`,
    as a student's forward is (but not the one that a checkpointed layer's backward begins with).
    whole: with whole weights, as everywhere but under ZeRO-3.

    With c bytes a weight: each norm its input D c, or in fp32 4 D and its result 4 D; the inputs of
    matrices 2 D c; attention (2 Q + 2 G) c and 4 bytes a head; the feed-forward part F c each for
    the gate, its activation, the up projection and their product (without a gate: what the
    activation keeps, and its result); and R c for the narrow product of every factored matrix.
    A lean gate keeps no activation; and what a lean norm or gate gives is not kept where noted, if
    all matrices that read it are factored; nor is what a factored `up` gives, if weights are whole.
    Where records are as long as the layer's window, also its mask, T c, and keys and values
    repeated for all heads, 2 (Q - G) c (copies, so that a fused module's outputs are not kept).
    """
    rules, c = rules_of(sizes), weight
    query, key, dense = sizes.query, sizes.key_value, sizes.dense[layer]
    inputs = (dense & {"q", "k", "v"}, dense & {"gate", "up"})
    again = noted and rules.norm == "lean"
    total = sum(sizes.width * c for readers in inputs if readers or not again)
    streams = 1 if rules.parallel else rules.norms
    if rules.norm == "layer":
        total += streams * sizes.width * c + rules.norms * 2 * c
    else:
        kept = c if rules.norm == "lean" else 8
        total += rules.norms * (sizes.width * kept + 4)
        if rules.head_norms:
            each = sizes.heads + sizes.heads * key // query if rules.head_norms == "heads" else 2
            total += (query + key) * kept + 4 * each
    total += 2 * (query + key) * c + 4 * sizes.heads
    masked = sizes.masked(layer, length)
    fused = rules.fused and not (masked and key < query)
    total += fused * (query + key) * c + rules.copied * query * c
    total += rules.repeated * (query - key) * c
    total += masked * (length + 2 * (query - key)) * c
    inside = _ACTIVATION_KEEPS.get(sizes.activation, 1)
    wide = inside + (3 if sizes.gated else 1)
    if rules.lean_gate and sizes.activation == "silu":
        wide = 2 + (not noted or "down" in dense) - (noted and whole and _up_again(sizes, layer))
    total += wide * sizes.neurons * c
    return total + sizes.ranks[layer] * c


def _up_again(sizes: Sizes, layer: int) -> bool:
    """Whether `up`'s output can be made again in a noted layer with whole weights."""
    rules = rules_of(sizes)
    lean = rules.lean_gate and sizes.activation == "silu" and rules.norm == "lean"
    return lean and "up" not in sizes.dense[layer]


def model_keeps(sizes: Sizes, weight: int, length: int, *, whole: bool = True) -> int:
    """The same of all layers."""
    layers = range(sizes.layers)
    return sum(layer_keeps(sizes, weight, layer, length, whole=whole) for layer in layers)


def layer_works(sizes: Sizes, weight: int, length: int) -> int:
    """Bytes per token that live for a moment while a layer works, forward or backward: the stream
    and its normed copy, and three tensors as wide as the feed-forward part; and where there are
    masks, one as it is made (a byte a place) and one as a layer takes it.
    """
    masked = any(sizes.masked(layer, length) for layer in range(sizes.layers))
    return (2 * sizes.width + 3 * sizes.neurons) * weight + masked * length * (1 + weight)


@dataclass(frozen=True)
class Captured:
    """Bytes per token of what objectives look at.

    teacher: what the teacher's forward leaves. student: what the student's leaves beyond what its
    backward keeps in any case; student_whole: all of it (checkpointed layers keep nothing else).
    compared: what the comparisons keep for the backward, in the place of all that.
    """

    teacher: int = 0
    student: int = 0
    student_whole: int = 0
    compared: int = 0


def captured(
    student_needs: Needs,
    teacher_needs: Needs,
    student: Sizes,
    teacher: Sizes,
    weight: int,
    length: int,
    *,
    whole: bool,
) -> Captured:
    """What the objectives' needs come to. whole: as of `layer_keeps`.

    A squared error, a cosine and a relation keep one tensor of what they compare; an attention
    divergence keeps the gradients of the student's queries and keys.
    """
    shown = _shown(student_needs, student)
    kept = _kept_anyway(student_needs, student, weight, whole)
    needs = student_needs
    compared = len(needs.hidden) * student.width
    compared += len(needs.attention) * (student.query + student.key_value)
    for _, role in needs.matrix | needs.fed | needs.plain:
        compared += student.outputs(role)
    compared += len(needs.again) * 3 * student.width
    # a layer that runs again keeps what every layer keeps
    again = sum(
        layer_keeps(student, weight, layer, length, whole=whole) for layer, _ in needs.again
    )
    return Captured(
        teacher=_shown(teacher_needs, teacher) * weight,
        student=(shown - kept) * weight + again,
        student_whole=shown * weight + again,
        compared=compared * weight + again,
    )


def _shown(needs: Needs, sizes: Sizes) -> int:
    """Numbers per token that a capture of these needs holds, each tensor once."""
    # the input of a layer is the output of the one before
    streams = set(needs.hidden) | {layer - 1 for layer in needs.layer_input}
    total = len(streams) * sizes.width
    total += len(needs.attention) * (sizes.query + sizes.key_value)
    total += sum(sizes.outputs(role) for _, role in needs.matrix | needs.plain)
    total += sum(sizes.outputs(role) for _, role in needs.fed)
    total += len(needs.again) * sizes.width
    return total + (_inputs(needs.matrix, sizes) if needs.matrix_input else 0)


def _inputs(matrices: Collection[tuple[int, str]], sizes: Sizes) -> int:
    """Numbers per token of the matrices' inputs; q k v share one, gate and up another."""
    read = {(layer, {"k": "q", "v": "q", "up": "gate"}.get(role, role)) for layer, role in matrices}
    return sum(sizes.inputs(role) for _, role in read)


def _kept_anyway(needs: Needs, sizes: Sizes, weight: int, whole: bool) -> int:
    """Of what a capture of the student shows, numbers per token that its backward keeps as well."""
    rules = rules_of(sizes)
    # a norm in fp32 keeps a copy: the stream itself only where that is fp32
    stream = sizes.width if rules.norm != "rms32" or weight == 4 else 0
    total = len(needs.hidden) * stream
    total += len(needs.attention) * (sizes.query + sizes.key_value)
    kept = {"v", "gate", "up"} if sizes.gated else {"v"}
    if not sizes.gated and _ACTIVATION_KEEPS.get(sizes.activation, 1):
        kept.add("up")
    if not rules.rotary:
        kept |= {"q", "k"}
    return total + sum(
        sizes.outputs(role)
        for layer, role in needs.matrix
        if role in kept and not (role == "up" and whole and _up_again(sizes, layer))
    )
