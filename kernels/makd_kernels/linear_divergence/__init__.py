"""Last linear layer, divergence from the teacher and cross-entropy, without all tokens' logits.

Logits are the largest tensors of distillation: tokens x vocabulary, twice, with their gradient.
These ops take the hidden states and the heads instead, make the logits for one chunk of tokens at a
time, reduce them, and forget them. Cross-entropy and divergence share the student's logits.

* `linear_divergence` and `linear_cross_entropy_divergence` return one value per token. Any gradient
  may flow back into each value; the backward makes the logits again (six matmuls), so it needs the
  heads then.
* `linear_cross_entropy_divergence_loss` returns the weighted sum that training wants. Its gradient
  is made in the forward, while the logits are there (four matmuls); the backward only scales it and
  never touches a head, which suits a head that is gathered during the forward alone (ZeRO-3).

Divergences are computed at `temperature` and multiplied by its square (Hinton et al. 2015), so that
their gradient keeps its size; the cross-entropy is always taken at temperature 1.
"""

# N tokens, D and E hidden sizes of student and teacher, V vocabulary

from typing import NamedTuple

import torch
from torch import Tensor

from makd_kernels.dispatch import choose
from makd_kernels.divergences import checked_divergence
from makd_kernels.linear_divergence import reference
from makd_kernels.linear_divergence.op import linear_loss_op, linear_rows_op
from makd_kernels.linear_divergence.settings import DIVERGENCES, IGNORED_LABEL, Settings

IMPLEMENTATIONS = ("reference", "torch", "triton")


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy_divergence_loss` returns; only `loss` carries a gradient."""

    loss: Tensor
    cross_entropy_N: Tensor
    divergence_N: Tensor | None


def choose_impl(impl: str = "auto", device: str = "cpu") -> str:
    """The implementation that `impl` names on a device of type `device`.

    "auto" is "triton" on a GPU where Triton is installed, and "torch" elsewhere. ValueError if it
    is unknown; RuntimeError if "triton" is asked for and cannot run there.
    """
    return choose(impl, IMPLEMENTATIONS, device)


def linear_divergence(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per token.

    With p the teacher's distribution and q the student's, in nats: "forward_kl" KL(p||q),
    "reverse_kl" KL(q||p), "jsd" beta KL(p||m) + (1-beta) KL(q||m) with m = beta p + (1-beta) q;
    DistiLLM's "skew_forward_kl" KL(p || alpha p + (1-alpha) q) and "skew_reverse_kl"
    KL(q || (1-alpha) p + alpha q); and "tvd", the total variation distance.

    Args:
        student_ND, teacher_NE: hidden states before the heads; the sizes D and E may differ.
        student_head_VD, teacher_head_VE: weights of the last linear layers.
        divergence: one of the names above.
        beta: for "jsd"; exactly the forward KL at 0 and the reverse KL at 1, as in TRL.
        alpha: for the skewed ones; exactly the plain KL at 0, and below 1.
        temperature: divides both sides' logits; the result is multiplied by its square.
        weight_N: factor on each token's value; it gets no gradient.
        vocab_size: real vocabulary; later rows of either head are padding and count as -inf logits.
        chunk_bytes: memory for the logits of one chunk; None is 128 MiB on CPU, 1 GiB elsewhere.
        impl: "torch" (chunks, reduced tile by tile; any device), "triton" (chunks, reduced by one
            kernel; a GPU), "reference" (holds all logits; for checks), or "auto": Triton on a GPU
            unless an input is float64, torch otherwise.

    Returns:
        (N,) in fp32, or float64 where an input is float64. Gradients reach the student's side only.

    Raises:
        ValueError: shapes or dtypes that do not fit, vocabularies that differ without `vocab_size`,
            a teacher tensor that requires grad, an unknown divergence or impl.
    """
    settings = _settings(
        student_ND,
        student_head_VD,
        None,
        teacher_NE,
        teacher_head_VE,
        Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes),
        weight_N,
    )
    inputs = (student_ND, student_head_VD, None, teacher_NE, teacher_head_VE)
    _, divergence_N = _rows(inputs, settings, impl)
    assert divergence_N is not None, "there is a teacher"
    return divergence_N if weight_N is None else divergence_N * weight_N.to(divergence_N.dtype)


def linear_cross_entropy_divergence(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor | None = None,
    teacher_head_VE: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy on the labels and divergence from the teacher, per token, in one pass.

    Arguments as in `linear_divergence`, and `labels_N` (int64), where -100 gives cross-entropy 0;
    `weight_N` multiplies both results. Without a teacher the divergence is None.

    Returns:
        (cross_entropy_N, divergence_N). Each may receive any gradient; the backward makes the
        logits again and reads both heads, which must then still hold their weights.

    Raises:
        ValueError: as `linear_divergence`, and for a label outside the vocabulary.
    """
    settings = _settings(
        student_ND,
        student_head_VD,
        labels_N,
        teacher_NE,
        teacher_head_VE,
        Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes),
        weight_N,
    )
    inputs = (student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE)
    cross_entropy_N, divergence_N = _rows(inputs, settings, impl)
    if weight_N is not None:
        weight_N = weight_N.to(cross_entropy_N.dtype)
        cross_entropy_N = cross_entropy_N * weight_N
        divergence_N = None if divergence_N is None else divergence_N * weight_N
    return cross_entropy_N, divergence_N


def linear_cross_entropy_divergence_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor | None = None,
    teacher_head_VE: Tensor | None = None,
    *,
    cross_entropy_weight: float = 1.0,
    divergence_weight: float = 1.0,
    weight_N: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> LinearLoss:
    """The sum over tokens of weight_N (cross_entropy_weight CE + divergence_weight divergence).

    For training: the gradient is made in the forward from the logits at hand and kept as one tensor
    of each student input's shape; the backward multiplies it by the incoming scalar, which is exact
    for any scalar, and reads neither head. Under `torch.no_grad` no gradient work is done.

    Arguments as in `linear_cross_entropy_divergence`, and the two weights, plain numbers.

    Returns:
        LinearLoss: `loss`, a scalar sum (never a mean), and the detached per-token values
        `cross_entropy_N` and `divergence_N` (None without a teacher), weighted by `weight_N` alone.

    Raises:
        ValueError: as `linear_cross_entropy_divergence`.
    """
    settings = _settings(
        student_ND,
        student_head_VD,
        labels_N,
        teacher_NE,
        teacher_head_VE,
        Settings(divergence, beta, alpha, temperature, vocab_size, chunk_bytes),
        weight_N,
    )
    chosen = _chosen(student_ND, teacher_NE, impl)
    shares = (float(cross_entropy_weight), float(divergence_weight))
    weight_N = None if weight_N is None else weight_N.detach()
    inputs = (student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE)
    if chosen == "reference":
        return LinearLoss(*reference.loss(*inputs, shares, weight_N, settings))
    grad_enabled = torch.is_grad_enabled()
    loss, cross_entropy_N, divergence_N, *_ = linear_loss_op(
        *_without_teacher_graph(inputs),
        weight_N,
        *shares,
        *settings,
        chosen,
        grad_enabled and student_ND.requires_grad,
        grad_enabled and student_head_VD.requires_grad,
    )
    return LinearLoss(loss, cross_entropy_N, None if teacher_NE is None else divergence_N)


_Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _rows(inputs: _Tensors, settings: Settings, impl: str) -> tuple[Tensor, Tensor | None]:
    """(cross_entropy_N, divergence_N); the second is None without a teacher."""
    chosen = _chosen(inputs[0], inputs[3], impl)
    if chosen == "reference":
        return reference.rows(*inputs, settings)
    cross_entropy_N, divergence_N = linear_rows_op(
        *_without_teacher_graph(inputs), *settings, chosen
    )
    return cross_entropy_N, None if inputs[3] is None else divergence_N


def _chosen(student_ND: Tensor, teacher_NE: Tensor | None, impl: str) -> str:
    chosen = choose_impl(impl, student_ND.device.type)
    double = torch.float64 in (
        student_ND.dtype,
        student_ND.dtype if teacher_NE is None else teacher_NE.dtype,
    )
    if chosen == "triton" and double:
        if impl == "triton":
            raise ValueError(
                "impl='triton' computes in fp32, and an input is float64; impl='torch' takes it"
            )
        return "torch"
    return chosen


def _without_teacher_graph(inputs: _Tensors) -> _Tensors:
    student_ND, student_head_VD, labels_N, teacher_NE, teacher_head_VE = inputs
    if teacher_NE is None or teacher_head_VE is None:
        return inputs
    return student_ND, student_head_VD, labels_N, teacher_NE.detach(), teacher_head_VE.detach()


def _settings(
    student_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor | None,
    teacher_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    settings: Settings,
    weight_N: Tensor | None,
) -> Settings:
    """Check all arguments; returns the settings with plain divergence and vocabulary size."""
    divergence = checked_divergence(settings.divergence, DIVERGENCES, settings.beta, settings.alpha)
    if settings.temperature <= 0:
        raise ValueError(f"temperature={settings.temperature} must be positive")
    if (teacher_NE is None) != (teacher_head_VE is None):
        raise ValueError("give both teacher_NE and teacher_head_VE, or neither")
    _check_side("student", student_ND, student_head_VD)
    tokens = student_ND.shape[0]
    vocabularies = [student_head_VD.shape[0]]
    if teacher_NE is not None and teacher_head_VE is not None:
        _check_side("teacher", teacher_NE, teacher_head_VE)
        vocabularies.append(teacher_head_VE.shape[0])
        if teacher_NE.shape[0] != tokens:
            raise ValueError(f"tokens differ: student {tokens}, teacher {teacher_NE.shape[0]}")
        if torch.is_grad_enabled() and (teacher_NE.requires_grad or teacher_head_VE.requires_grad):
            raise ValueError("a teacher tensor requires grad, but it never gets one; detach()")
    vocab = settings.vocab_size
    if vocab is None and len(set(vocabularies)) > 1:
        raise ValueError(
            f"vocabularies differ: student {vocabularies[0]}, teacher {vocabularies[1]}; share a "
            "tokenizer, and pass vocab_size to leave out the padding columns"
        )
    vocab = vocabularies[0] if vocab is None else vocab
    if not 1 <= vocab <= min(vocabularies):
        raise ValueError(f"vocab_size={vocab} is outside 1..{min(vocabularies)}, the heads' rows")
    for name, tensor in (("labels_N", labels_N), ("weight_N", weight_N)):
        if tensor is not None and tensor.shape != (tokens,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be ({tokens},)")
    # a look at the labels waits for a device's copy, and breaks a compiled graph
    looks = labels_N is not None and labels_N.device.type == "cpu"
    if labels_N is not None and looks and not torch.compiler.is_compiling():
        outside = (labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab))
        if outside.any():
            raise ValueError(
                f"label {int(labels_N[outside][0])} is outside 0..{vocab - 1} and -100"
            )
    return settings._replace(divergence=divergence, vocab_size=vocab)


def _check_side(side: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{side}: hidden states {tuple(hidden.shape)} and head {tuple(head.shape)} must be "
            "(tokens, size) and (vocabulary, size)"
        )
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"{side}: dtypes {hidden.dtype} and {head.dtype}; need one float dtype")
