"""RMSNorm and SwiGLU that keep less for the backward, and let the product after them keep less too.

    from makd_kernels.lean import keeping_less, rms_norm, swiglu

Of every decoder layer and token eager torch keeps each tensor that some backward reads: of a norm
what goes in, that over its root mean square, and what comes out; of a gate what goes in, what comes
out, what it is multiplied with, and the product. `rms_norm` keeps what goes in, `swiglu` its two
inputs. What comes out is needed by the matmul behind it; inside `keeping_less()` both leave a note
how it was made, and `lowrank_linear` keeps the note in its place. Its backward makes the tensor
again, with a few additions and multiplications.

`lowrank_linear` leaves such a note too, where its own input had one. By it `swiglu` keeps the
narrow product that `up` came from in the place of `up`, one of a layer's widest tensors; its
backward multiplies that with the second factor once more.

On a CPU both work on a block of rows at a time, so that what lies between two operations stays in
cache. Gradients of gradients are those of the plain formulas. (The saving is ours; that a norm's
backward needs its input alone is well known, e.g. from Liger Kernel, arXiv 2410.10989.)
"""

# N rows, n rows of a block, D width, K inputs, R rank, M outputs

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

BLOCK_ELEMENTS_CPU = 2**16  # of one tensor; the four or five of a block fit a core's second cache


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), Llama's norm: x over its root is made in fp32 at least
    and rounded to x's dtype before it is weighted.

    Args:
        x: (..., D), any float dtype.
        weight_D: of the same dtype.
        eps: added to the mean square.

    Returns:
        (..., D). Gradients reach x and the weight.

    Raises:
        ValueError: a weight of another width or dtype.
    """
    if weight_D.shape != x.shape[-1:] or weight_D.dtype != x.dtype:
        raise ValueError(
            f"weight is {tuple(weight_D.shape)} {weight_D.dtype}; x {tuple(x.shape)} {x.dtype} "
            f"needs ({x.shape[-1]},) of its dtype"
        )
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)
    if _notes is not None and y.requires_grad:
        # A copy: where ZeRO-3 shards the weight, only the norm's own backward has it whole.
        _leave(y, _norm_of, x, weight_D.detach().clone(), eps)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: (..., M) of one float dtype.

    Returns:
        (..., M). Gradients reach both.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}; they must "
            "be alike"
        )
    note = note_of(up)
    y: Tensor = _SwiGLU.apply(gate, up) if note is None else _SwiGLUOfNoted.apply(gate, up, note)
    if _notes is not None and y.requires_grad:
        if note is None:
            _leave(y, _swiglu_of, gate, up)
        else:
            _leave(y, partial(_swiglu_of_noted, note), gate, *note.tensors, parent=note)
    return y


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight_D * scaled.to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    return F.silu(gate) * up


class _Note:
    """How a tensor is made again: `make(*tensors, *rest)`.

    Several may use it (products of queries, keys and values); what is made for the first of them
    stays until the last has had it. parent: the note of a tensor that has to be made before.
    """

    def __init__(
        self,
        make: Callable[..., Tensor],
        tensors: tuple[Tensor, ...],
        rest: tuple[Any, ...],
        parent: "_Note | None" = None,
    ) -> None:
        self.make, self.tensors, self.rest, self.parent = make, tensors, rest, parent
        self.users = 0
        self._made: Tensor | None = None

    def use(self) -> None:
        """There is one more whose backward needs the tensor."""
        if self.users == 0 and self.parent is not None:
            self.parent.use()
        self.users += 1

    def again(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The tensor, for one of its users."""
        made = self.make(*tensors, *self.rest) if self._made is None else self._made
        self.users -= 1
        self._made = made if self.users > 0 else None
        return made


_notes: dict[int, tuple[StorageWeakRef, _Note]] | None = None
"""By the address of a tensor's memory, which is not used again while the weak reference is there.
None outside of `keeping_less`.
"""
_whole_weights = True
"""Whether factors may be used again in another module's backward, see `keeping_less`."""


@contextmanager
def keeping_less(*, whole_weights: bool = True) -> Iterator[None]:
    """Inside it, what a forward keeps for its backward is less. Not for a forward whose gradient is
    to be differentiated again: what is made again has no history of its own. Not for one with
    checkpointed layers either: what they run again would have to be inside as well.

    whole_weights: every weight is there during the whole backward, and not during that of its own
    module alone (as under ZeRO-3). No factor is used again otherwise.
    """
    global _notes, _whole_weights
    outer, _notes = (_notes, _whole_weights), {}
    _whole_weights = whole_weights
    try:
        yield
    finally:
        for _, note in _notes.values():
            note.tensors = ()  # whose backward needs them has saved them
        _notes, _whole_weights = outer


def _leave(
    y: Tensor, make: Callable[..., Tensor], *arguments: Any, parent: _Note | None = None
) -> None:
    tensors = tuple(a for a in arguments if isinstance(a, Tensor))
    storage = StorageWeakRef(y.untyped_storage())
    assert _notes is not None
    _notes[storage.cdata] = storage, _Note(make, tensors, arguments[len(tensors) :], parent)


def note_of(x: Tensor) -> _Note | None:
    """How x is made again, if something inside `keeping_less` has said so of all of its memory."""
    if _notes is None or not x.requires_grad:
        return None
    found = _notes.get(x.untyped_storage()._cdata)
    if found is None or x.numel() * x.element_size() != x.untyped_storage().nbytes():
        return None
    return found[1] if x.is_contiguous() else None


def product_of_noted(
    x: Tensor, note: _Note, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None
) -> Tensor:
    """x @ down^T @ up^T + bias as two matmuls, (..., M), keeping the note in x's place."""
    y: Tensor
    y, narrow = _ProductOfNoted.apply(x, note, down_RK, up_MR, bias_M)
    if _whole_weights and y.requires_grad:
        _leave(y, F.linear, narrow, up_MR, *(() if bias_M is None else (bias_M,)))
    return y


class _ProductOfNoted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, note: _Note, down_RK: Tensor, up_MR: Tensor, bias_M: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        narrow = F.linear(x, down_RK)
        ctx.save_for_backward(narrow, down_RK, up_MR, *note.tensors)
        ctx.note, ctx.biased = note, bias_M is not None
        ctx.mark_non_differentiable(narrow)
        ctx.set_materialize_grads(False)
        note.use()
        return F.linear(narrow, up_MR, bias_M), narrow

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        narrow, down_RK, up_MR, *tensors = ctx.saved_tensors
        grad_NM, narrow_NR = grad.flatten(0, -2), narrow.flatten(0, -2)
        grad_narrow_NR = grad_NM @ up_MR
        x_NK = ctx.note.again(tuple(tensors)).flatten(0, -2)
        grad_x = (grad_narrow_NR @ down_RK).view(*narrow.shape[:-1], -1)
        grad_bias = grad_NM.sum(0) if ctx.biased else None
        return grad_x, None, grad_narrow_NR.T @ x_NK, grad_NM.T @ narrow_NR, grad_bias


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, root = _norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, root)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, root_N1 = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = rms_norm_reference(x, weight_D, ctx.eps)
            return *_differentiable(y, (x, weight_D), ctx.needs_input_grad, grad), None
        width, x_ND, grad_ND = x.shape[-1], *(t.reshape(-1, x.shape[-1]) for t in (x, grad))
        grad_x_ND = torch.empty_like(x_ND)
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, grad_weight_D = weight_D.to(exact), weight_D.new_zeros(width, dtype=exact)
        for rows in _blocks(x_ND):
            x_nD, g_nD, root_n1 = x_ND[rows].to(exact), grad_ND[rows].to(exact), root_N1[rows]
            scaled_nD = x_nD * root_n1
            grad_weight_D += (g_nD * scaled_nD).sum(0)
            g_nD = g_nD * weight
            along_n1 = torch.linalg.vecdot(g_nD, scaled_nD).unsqueeze(-1) / width
            grad_x_ND[rows] = g_nD.addcmul_(scaled_nD, along_n1, value=-1).mul_(root_n1)
        return grad_x_ND.view(x.shape), grad_weight_D.to(weight_D.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu_of(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = swiglu_reference(gate, up)
            return _differentiable(y, (gate, up), ctx.needs_input_grad, grad)
        return _swiglu_backward(gate, up, grad)


class _SwiGLUOfNoted(torch.autograd.Function):
    """With up's note in its place."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, note: _Note) -> Tensor:
        ctx.save_for_backward(gate, *note.tensors)
        ctx.note = note
        note.use()
        return _swiglu_of(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, *tensors = ctx.saved_tensors
        return *_swiglu_backward(gate, ctx.note.again(tuple(tensors)), grad), None


def _swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    flat = [t.reshape(-1, gate.shape[-1]) for t in (gate, up, grad)]
    grad_gate, grad_up = (torch.empty_like(flat[0]) for _ in range(2))
    for rows in _blocks(flat[0]):
        gate_nM, up_nM, grad_nM = (t[rows] for t in flat)
        torch.mul(F.silu(gate_nM), grad_nM, out=grad_up[rows])
        torch.ops.aten.silu_backward.grad_input(
            grad_nM * up_nM, gate_nM, grad_input=grad_gate[rows]
        )
    return grad_gate.view(gate.shape), grad_up.view(gate.shape)


def _norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm's output, and 1 / root, (N, 1) in fp32 at least."""
    x_ND = x.reshape(-1, x.shape[-1])
    exact = torch.promote_types(x.dtype, torch.float32)
    y_ND, root_N1 = torch.empty_like(x_ND), x_ND.new_empty(x_ND.shape[0], 1, dtype=exact)
    for rows in _blocks(x_ND):
        x_nD = x_ND[rows].to(exact)
        square_n1 = torch.linalg.vecdot(x_nD, x_nD).unsqueeze(-1) / x.shape[-1]
        torch.rsqrt(square_n1 + eps, out=root_N1[rows])
        torch.mul((x_nD * root_N1[rows]).to(x.dtype), weight_D, out=y_ND[rows])
    return y_ND.view(x.shape), root_N1


def _norm_of(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _norm(x, weight_D, eps)[0]


def _swiglu_of(gate: Tensor, up: Tensor) -> Tensor:
    gate_NM, up_NM = (t.reshape(-1, gate.shape[-1]) for t in (gate, up))
    y_NM = torch.empty_like(gate_NM)
    for rows in _blocks(gate_NM):
        torch.mul(F.silu(gate_NM[rows]), up_NM[rows], out=y_NM[rows])
    return y_NM.view(gate.shape)


def _swiglu_of_noted(note: _Note, gate: Tensor, *tensors: Tensor) -> Tensor:
    return _swiglu_of(gate, note.again(tensors))


def _blocks(like_NM: Tensor) -> list[slice]:
    """All rows: on a CPU cut into blocks, elsewhere as one."""
    rows, width = like_NM.shape
    block = max(1, BLOCK_ELEMENTS_CPU // max(width, 1)) if like_NM.is_cpu else max(rows, 1)
    return [slice(start, min(rows, start + block)) for start in range(0, rows, block)]


def _differentiable(
    y: Tensor, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated, of those of the inputs that are wanted."""
    asked = [x for x, wants in zip(inputs, wanted, strict=False) if wants]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return tuple(next(found) if wants else None for _, wants in zip(inputs, wanted, strict=False))
