"""Attention divergence block by block in plain torch: any device, O(T x block) extra memory.

A *slab* is one block of queries against all the keys that it can see, for some (batch, key head)
instances. Scores of both sides go into four buffers that every slab reuses, are reduced by the row
formulas, and are overwritten by the next slab; under a causal mask the slab ends at its last query
and under a window it starts at its first visible key. The backward makes the scores again, so that
nothing but the inputs is kept between forward and backward.

Scores of half precision inputs are multiplied in that precision and reduced in fp32, exactly as
eager attention does; sums over query blocks are kept in fp32.
"""

# n = B x G instances (one key head of one sequence), R = H / G query heads that share it,
# T tokens, Q queries of a block, K keys of a slab, M = Q x R rows of a slab, D head size

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from makd_kernels.attention_kl.settings import HIDDEN, Settings
from makd_kernels.divergences import (
    DIVERGENCES,
    Formula,
    Rows,
    Weights,
    exponentials,
    visible_logits,
)

SLAB_ELEMENTS_CPU = 2**19  # per thread: four fp32 buffers of it, 8 MiB, stay in the last cache
SLAB_ELEMENTS_OTHER = 2**25
SHORTEST_BLOCK, LONGEST_BLOCK = 32, 64  # queries; short blocks skip more of the causal half


class _Side(NamedTuple):
    """Queries with their shared heads inside, so that a block of queries is one matrix."""

    q_nTRD: Tensor
    k_nTD: Tensor
    lse_nTR1: Tensor | None
    scale: float


class _Slab(NamedTuple):
    instances: slice
    queries: slice
    keys: slice


class _Mask(NamedTuple):
    """Columns of a slab, and there: 1 and 0 visible, 0 and HIDDEN hidden (over n, Q, R, K)."""

    columns: slice
    factor: Tensor
    bias: Tensor


class _Visibility:
    """Which keys a query may see, slab by slab, touching only the columns that need it."""

    def __init__(self, causal: bool, window: int | None, mask_nT: Tensor | None, like: Tensor):
        self.causal, self.window, self.like = causal, window, like
        self.mask_nT = mask_nT
        self.triangle = self._mask(slice(0), like.new_ones(0, 1, 0))

    def masks(self, slab: _Slab) -> list[_Mask]:
        """What to apply to the slab's scores."""
        found = []
        q0, q1 = slab.queries.start, slab.queries.stop
        k0, k1 = slab.keys.start, slab.keys.stop
        if self.mask_nT is not None:
            factor = self.mask_nT[slab.instances, None, None, slab.keys]
            found.append(self._mask(slice(0, k1 - k0), factor))
        if self.causal and q1 - q0 > 1:
            size = q1 - q0
            if self.triangle.factor.shape[0] < size:
                factor = self.like.new_ones(size, size).tril_()[:, None]
                self.triangle = self._mask(slice(0), factor)
            _, factor, bias = self.triangle
            columns = slice(q0 - k0, q1 - k0)
            found.append(_Mask(columns, factor[:size, :, :size], bias[:size, :, :size]))
        if self.window is not None and q1 - self.window > k0:
            # the keys that have left the window of the block's last query
            query_Q11 = torch.arange(q0, q1, device=self.like.device)[:, None, None]
            key_K = torch.arange(k0, q1 - self.window, device=self.like.device)
            factor = (key_K > query_Q11 - self.window).to(self.like.dtype)
            found.append(self._mask(slice(0, key_K.shape[0]), factor))
        return found

    @staticmethod
    def _mask(columns: slice, factor: Tensor) -> _Mask:
        return _Mask(columns, factor, (factor - 1.0) * -HIDDEN)


def _summed_back(dk_BHTD: Tensor, key_heads: int) -> Tensor:
    """The gradient of keys that were repeated, if they were."""
    shared = dk_BHTD.shape[1] // key_heads
    return dk_BHTD.unflatten(1, (-1, shared)).sum(2) if shared > 1 else dk_BHTD


def _one_key_per_head(q_BHTD: Tensor, k_BGTD: Tensor) -> Tensor:
    return k_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)


class Sweep:
    """One pass over all slabs, with the buffers that they share; both sides have H heads. See
    `attention_kl`.
    """

    def __init__(
        self,
        q_teacher: Tensor,
        k_teacher: Tensor,
        q_student: Tensor,
        k_student: Tensor,
        mask_BT: Tensor | None,
        lse_teacher: Tensor | None,
        lse_student: Tensor | None,
        settings: Settings,
    ) -> None:
        self.key_heads = k_student.shape[1]
        self.formula: Formula = DIVERGENCES[settings.divergence](settings.beta, 0.0)
        self.softmax = settings.divergence != "logit_mse"
        if k_teacher.shape[1] != k_student.shape[1]:
            # other groupings of the same heads: one key head for each, O(H x T x D)
            k_teacher = _one_key_per_head(q_teacher, k_teacher)
            k_student = _one_key_per_head(q_student, k_student)
        on_cpu = q_student.device.type == "cpu"  # elsewhere a look at the mask waits for it
        if mask_BT is not None and on_cpu and mask_BT.all():
            mask_BT = None
        self.shape_BGRTD = (
            q_student.shape[0],
            k_student.shape[1],
            q_student.shape[1] // k_student.shape[1],
            *q_student.shape[2:],
        )
        self.teacher = _grouped(q_teacher, k_teacher, lse_teacher, settings.scale_teacher)
        self.student = _grouped(q_student, k_student, lse_student, settings.scale_student)
        dtype = torch.promote_types(q_teacher.dtype, q_student.dtype)
        self.dtype = torch.promote_types(dtype, torch.float32)
        mask_nT = None
        if mask_BT is not None:
            mask_nT = mask_BT.to(self.dtype).repeat_interleave(k_student.shape[1], dim=0)
        like = q_student.new_empty(0, dtype=self.dtype)
        self.visibility = _Visibility(settings.causal, settings.window, mask_nT, like)
        self.block, self.instances = self._slab_size()
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def values(self) -> Tensor:
        """(B, H, T) divergences."""
        values_nTR1 = self._no_values()
        for slab in self._slabs():
            value = self.formula(*self._rows(slab), None, True)
            assert value is not None
            values_nTR1[slab.instances, slab.queries] = value
        return self._by_head(values_nTR1)

    def _no_values(self) -> Tensor:
        batch, groups, shared, tokens, _ = self.shape_BGRTD
        shape_nTR1 = (batch * groups, tokens, shared, 1)
        return torch.empty(shape_nTR1, dtype=self.dtype, device=self.student.k_nTD.device)

    def _by_head(self, values_nTR1: Tensor) -> Tensor:
        """(B, H, T), 0 where the query is padding."""
        batch, groups, shared, tokens, _ = self.shape_BGRTD
        if self.visibility.mask_nT is not None:
            values_nTR1.mul_(self.visibility.mask_nT[:, :, None, None])
        values_BGTR = values_nTR1.view(batch, groups, tokens, shared)
        values_BGRT = values_BGTR.transpose(2, 3).contiguous()
        return values_BGRT.view(batch, groups * shared, tokens)

    def gradients(
        self, grad_BHT: Tensor, *, with_values: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """(values_BHT if asked for, and the student's dq_BHTD and dk_BGTD for the gradient
        `grad_BHT` of the values). Where that is known before the values are, the scores are made
        once for both.
        """
        q_nTRD, k_nTD, _, scale = self.student
        batch, groups, shared, tokens, size = self.shape_BGRTD
        grad_BGTR = (grad_BHT.to(self.dtype) * scale).unflatten(1, (groups, shared)).transpose(2, 3)
        grad_nTR1 = grad_BGTR.reshape(batch * groups, tokens, shared, 1)
        if self.visibility.mask_nT is not None:
            grad_nTR1 = grad_nTR1 * self.visibility.mask_nT[:, :, None, None]
        dq_nTRD = torch.empty_like(q_nTRD)
        dk_nTD = torch.zeros_like(k_nTD, dtype=self.dtype)
        values_nTR1 = self._no_values() if with_values else None
        for slab in self._slabs():
            t_rows, s_rows = self._rows(slab)
            weights = Weights(grad_nTR1[slab.instances, slab.queries])
            value = self.formula(t_rows, s_rows, weights, with_values)
            if values_nTR1 is not None:
                assert value is not None
                values_nTR1[slab.instances, slab.queries] = value
            ds_nMK = s_rows.exp.flatten(1, 2)
            if ds_nMK.dtype != q_nTRD.dtype:
                ds_nMK = self._buffer("half", ds_nMK.shape, q_nTRD.dtype).copy_(ds_nMK)
            q_nMD, k_nKD = _operands(self.student, slab)
            dq_nMD = torch.bmm(ds_nMK, k_nKD)
            dq_nTRD[slab.instances, slab.queries] = dq_nMD.unflatten(1, (-1, shared))
            dk_nKD = dk_nTD[slab.instances, slab.keys]
            if dk_nKD.dtype == ds_nMK.dtype:
                dk_nKD.baddbmm_(ds_nMK.mT, q_nMD)
            else:
                dk_nKD.add_(torch.bmm(ds_nMK.mT, q_nMD))
        dq_BGTRD = dq_nTRD.view(batch, groups, tokens, shared, size)
        dq_BHTD = dq_BGTRD.transpose(2, 3).reshape(batch, groups * shared, tokens, size)
        dk_BGTD = dk_nTD.to(k_nTD.dtype).view(batch, groups, tokens, size)
        values_BHT = None if values_nTR1 is None else self._by_head(values_nTR1)
        return values_BHT, dq_BHTD.contiguous(), _summed_back(dk_BGTD, self.key_heads)

    def _rows(self, slab: _Slab) -> tuple[Rows, Rows]:
        """Both sides' centred scores and exponentials, (n, Q, R, K), hidden keys at exactly 0."""
        t = self._scores(self.teacher, slab, "t")
        s = self._scores(self.student, slab, "s")
        masks = self.visibility.masks(slab)

        def hide(rows: Tensor) -> None:
            for columns, factor, _ in masks:
                rows[..., columns].mul_(factor)

        make_rows = visible_logits
        if self.softmax:
            make_rows = exponentials
            for columns, _, bias in masks:
                t[..., columns].add_(bias)
                s[..., columns].add_(bias)
        return (
            make_rows(
                t, self._buffer("exp t", t.shape, self.dtype), hide, _known(self.teacher, slab)
            ),
            make_rows(
                s, self._buffer("exp s", s.shape, self.dtype), hide, _known(self.student, slab)
            ),
        )

    def _scores(self, side: _Side, slab: _Slab, name: str) -> Tensor:
        q_nMD, k_nKD = _operands(side, slab)
        shape_nMK = (q_nMD.shape[0], q_nMD.shape[1], k_nKD.shape[1])
        scores = self._buffer(name, shape_nMK, self.dtype)
        if q_nMD.dtype == self.dtype:
            torch.baddbmm(scores, q_nMD, k_nKD.mT, beta=0, alpha=side.scale, out=scores)
        else:
            low = self._buffer("half", shape_nMK, q_nMD.dtype)
            torch.baddbmm(low, q_nMD, k_nKD.mT, beta=0, alpha=side.scale, out=low)
            scores.copy_(low)
        shared = side.q_nTRD.shape[2]
        return scores.view(shape_nMK[0], -1, shared, shape_nMK[2])

    def _slab_size(self) -> tuple[int, int]:
        """Queries of a block and instances of a slab, from the number of scores that fit."""
        n, tokens, shared, _ = self.student.q_nTRD.shape
        elements = SLAB_ELEMENTS_OTHER
        if self.student.q_nTRD.device.type == "cpu":
            elements = SLAB_ELEMENTS_CPU * torch.get_num_threads()
        window = self.visibility.window
        keys = tokens if window is None else min(tokens, window + LONGEST_BLOCK)
        block = elements // max(1, shared * keys) // SHORTEST_BLOCK * SHORTEST_BLOCK
        block = max(1, min(tokens, LONGEST_BLOCK, max(SHORTEST_BLOCK, block)))
        most = max(1, elements // max(1, shared * block * keys))
        slabs = max(1, -(-n // most))
        return block, max(1, -(-n // slabs))

    def _slabs(self) -> Iterator[_Slab]:
        n, tokens = self.student.k_nTD.shape[:2]
        causal, window = self.visibility.causal, self.visibility.window
        for first in range(0, n, self.instances):
            instances = slice(first, min(n, first + self.instances))
            for q0 in range(0, tokens, self.block):
                q1 = min(tokens, q0 + self.block)
                k0 = 0 if window is None else max(0, q0 - window + 1)
                yield _Slab(instances, slice(q0, q1), slice(k0, q1 if causal else tokens))

    def _buffer(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous view of the buffer `name`; its old content is lost."""
        size = 1
        for extent in shape:
            size *= extent
        held = self.buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=self.student.k_nTD.device)
            self.buffers[name, dtype] = held
        return held[:size].view(shape)


def _grouped(q_BHTD: Tensor, k_BGTD: Tensor, lse_BHT: Tensor | None, scale: float) -> _Side:
    batch, heads, tokens, size = q_BHTD.shape
    groups = k_BGTD.shape[1]

    def heads_inside(of_query_BHTD: Tensor) -> Tensor:
        of_query_BGRTD: Tensor = of_query_BHTD.unflatten(1, (groups, heads // groups))
        return of_query_BGRTD.transpose(2, 3).flatten(0, 1).contiguous()

    lse_nTR1 = None if lse_BHT is None else heads_inside(lse_BHT[..., None])
    k_nTD = k_BGTD.reshape(batch * groups, tokens, size)
    return _Side(heads_inside(q_BHTD), k_nTD, lse_nTR1, scale)


def _known(side: _Side, slab: _Slab) -> Tensor | None:
    """The log-sum-exps of the slab's queries (n, Q, R, 1), where they were given."""
    return None if side.lse_nTR1 is None else side.lse_nTR1[slab.instances, slab.queries]


def _operands(side: _Side, slab: _Slab) -> tuple[Tensor, Tensor]:
    """The slab's queries (n, M, D) and keys (n, K, D)."""
    q_nMD = side.q_nTRD[slab.instances, slab.queries].flatten(1, 2)
    return q_nMD, side.k_nTD[slab.instances, slab.keys]
