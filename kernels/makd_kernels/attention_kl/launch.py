"""The host side of the Triton kernels: which sweeps a divergence takes, on which grid."""

# B batch, H student heads, G their key heads, P pairs of heads, T tokens, D head size

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from makd_kernels.attention_kl import kernel
from makd_kernels.attention_kl.settings import Settings, in_one_sweep, statistics_of
from makd_kernels.attention_kl.tiles import tiles
from makd_kernels.launching import Tiles, architecture, device_ints, padded_size

CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "probability_mse": 3, "logit_mse": 4}


class Call:
    """One set of queries and keys, laid out for the kernels."""

    def __init__(
        self,
        q_teacher_BHTD: Tensor,
        k_teacher_BGTD: Tensor,
        q_student_BHTD: Tensor,
        k_student_BGTD: Tensor,
        attention_mask_BT: Tensor | None,
        pair_teacher: list[int],
        pair_counts: list[int],
        settings: Settings,
    ) -> None:
        self.settings = settings
        self.teacher = (q_teacher_BHTD, k_teacher_BGTD)
        self.student = (q_student_BHTD, k_student_BGTD)
        self.batch, self.heads, self.tokens, _ = q_student_BHTD.shape
        device = q_student_BHTD.device
        self.pairs, self.counts = len(pair_teacher), pair_counts
        heads = [head for head, count in enumerate(pair_counts) for _ in range(count)]
        starts = [0, *itertools.accumulate(pair_counts)]
        self.head_t_P, self.head_s_P, self.first_pair_H = (
            device_ints(tuple(numbers), device) for numbers in (pair_teacher, heads, starts)
        )
        self.real_keys_BT = None
        if attention_mask_BT is not None:
            self.real_keys_BT = (attention_mask_BT != 0).contiguous()

    def values(
        self, lse_teacher_BHT: Tensor | None, lse_student_BHT: Tensor | None, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """((B, H, T) divergences, (statistics, B, P, T) and the plain dq_BHTD for the backward).

        The log-sum-exps, where given, are usable ones of each side's own heads. `with_gradient`
        says that a backward to the queries will follow; then a forward KL from given log-sum-exps
        has the gradient of its plain sum made in the same sweep.
        """
        divergence = self.settings.divergence
        values_BPT = self._empty(self.batch, self.pairs, self.tokens)
        statistics = self._empty(statistics_of(divergence), *values_BPT.shape)
        plain_dq_BHTD = self.student[0].new_empty(0)
        together = with_gradient and in_one_sweep(divergence, self.student[0].dtype)
        if values_BPT.numel() == 0:
            if together and lse_student_BHT is not None:
                plain_dq_BHTD = torch.empty_like(self.student[0])
        elif lse_teacher_BHT is not None and lse_student_BHT is not None:
            statistics[0] = lse_teacher_BHT[:, self.head_t_P]
            statistics[2] = lse_student_BHT[:, self.head_s_P]
            statistics[1::2].zero_()
            if together:
                plain_dq_BHTD = self._dq(values_BPT, statistics, values_BPT, values=True)
            else:
                self._values(values_BPT, statistics)
        else:
            if divergence != "logit_mse":
                self._kl(values_BPT, statistics, teacher_first=divergence != "reverse_kl")
            if not divergence.endswith("_kl"):
                self._values(values_BPT, statistics)
        return self._mean_over_pairs(values_BPT), statistics, plain_dq_BHTD

    def gradients(
        self, grad_BHT: Tensor, statistics: Tensor, plain_dq_BHTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student's (dq_BHTD, dk_BGTD), from what `values` returned."""
        gradient_BPT = self._per_pair(grad_BHT)
        q_BHTD, k_BGTD = self.student
        if q_BHTD.numel() == 0:
            return torch.empty_like(q_BHTD), torch.empty_like(k_BGTD)
        statistics = statistics if statistics.numel() else gradient_BPT
        if plain_dq_BHTD.numel():
            row_BHT1 = gradient_BPT[:, self.first_pair_H[:-1], :, None]
            dq_BHTD = (plain_dq_BHTD * row_BHT1).to(q_BHTD.dtype)
        else:
            dq_BHTD = self._dq(gradient_BPT, statistics, gradient_BPT, values=False)
        return dq_BHTD, self._dk(gradient_BPT, statistics)

    def _dq(
        self, values_BPT: Tensor, statistics: Tensor, gradient_BPT: Tensor, *, values: bool
    ) -> Tensor:
        """dq_BHTD; with `values` that of the plain sum over pairs, and `values_BPT` is filled."""
        q_BHTD, _ = self.student
        dq_BHTD = torch.empty(q_BHTD.shape, dtype=q_BHTD.dtype, device=q_BHTD.device)
        tile = self._tiles("dq values" if values else "dq")
        grid = (triton.cdiv(self.tokens, tile.m) * self.batch * self.heads,)
        kernel._dq_kernel[grid](
            *self.teacher, *self.student, self._mask(), self.head_t_P, self.first_pair_H,
            statistics, gradient_BPT, values_BPT, dq_BHTD, *self._strides(), self.tokens,
            self.heads, self.pairs, gradient_BPT.numel(), *self._scales(), VALUES=values,
            **self._constants(), **tile.options(),
        )  # fmt: skip
        return dq_BHTD

    def _dk(self, gradient_BPT: Tensor, statistics: Tensor) -> Tensor:
        k_BGTD = self.student[1]
        dk_BGTD = torch.empty(k_BGTD.shape, dtype=k_BGTD.dtype, device=k_BGTD.device)
        tile = self._tiles("dk")
        key_heads = k_BGTD.shape[1]
        grid = (triton.cdiv(self.tokens, tile.n) * self.batch * key_heads,)
        kernel._dk_kernel[grid](
            *self.teacher, *self.student, self._mask(), self.head_t_P, self.head_s_P,
            self.first_pair_H, statistics, gradient_BPT, dk_BGTD, *self._strides(), self.tokens,
            key_heads, self.pairs, gradient_BPT.numel(), *self._scales(),
            **self._constants(), **tile.options(),
        )  # fmt: skip
        return dk_BGTD

    def _kl(self, values_BPT: Tensor, statistics: Tensor, teacher_first: bool) -> None:
        """Fill in KL(first || second) and the statistics of both sides."""
        sides = [
            (*self.teacher, self.head_t_P, self.settings.scale_teacher),
            (*self.student, self.head_s_P, self.settings.scale_student),
        ]
        first, second = sides if teacher_first else reversed(sides)
        q_1, k_1, heads_1, scale_1 = first
        q_2, k_2, heads_2, scale_2 = second
        tile = self._tiles("kl")
        kernel._kl_kernel[self._pair_grid(tile)](
            q_1, k_1, q_2, k_2, self._mask(), heads_1, heads_2, values_BPT, statistics,
            *q_1.stride(), *k_1.stride(), *q_2.stride(), *k_2.stride(),
            self.tokens, self.pairs, values_BPT.numel(), scale_1, scale_2,
            GROUP_1=q_1.shape[1] // k_1.shape[1], GROUP_2=q_2.shape[1] // k_2.shape[1],
            SIZE_1=q_1.shape[3], SIZE_2=q_2.shape[3],
            PADDED_1=padded_size(q_1.shape[3]), PADDED_2=padded_size(q_2.shape[3]),
            TEACHER_FIRST=teacher_first, **self._visibility(), **tile.options(),
        )  # fmt: skip

    def _values(self, values_BPT: Tensor, statistics: Tensor) -> None:
        """Fill in the values and the divergence's own statistic."""
        tile = self._tiles("values")
        kernel._values_kernel[self._pair_grid(tile)](
            *self.teacher, *self.student, self._mask(), self.head_t_P, self.head_s_P,
            values_BPT, statistics if statistics.numel() else values_BPT,
            *self._strides(), self.tokens, self.pairs, values_BPT.numel(), *self._scales(),
            **self._constants(), **tile.options(),
        )  # fmt: skip

    def _pair_grid(self, tile: Tiles) -> tuple[int]:
        return (triton.cdiv(self.tokens, tile.m) * self.batch * self.pairs,)

    def _tiles(self, name: str) -> Tiles:
        tensors = (self.teacher[0], self.student[0])
        size = max(padded_size(tensor.shape[3]) for tensor in tensors)
        full = torch.float32 in (tensor.dtype for tensor in tensors)
        dtype = torch.float32 if full else tensors[0].dtype
        arch = architecture(tensors[0].device)
        return tiles(name, self.settings.divergence, size, dtype, arch)

    def _scales(self) -> tuple[float, float, float]:
        return self.settings.scale_teacher, self.settings.scale_student, self.settings.beta

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.student[0].device)

    def _mask(self) -> Tensor:
        return self.teacher[0] if self.real_keys_BT is None else self.real_keys_BT

    def _strides(self) -> tuple[int, ...]:
        return tuple(s for tensor in (*self.teacher, *self.student) for s in tensor.stride())

    def _visibility(self) -> dict[str, Any]:
        return {
            "CAUSAL": self.settings.causal,
            "WINDOW": self.settings.window or 0,
            "MASKED": self.real_keys_BT is not None,
        }

    def _constants(self) -> dict[str, Any]:
        (q_t, k_t), (q_s, k_s) = self.teacher, self.student
        return {
            "GROUP_T": q_t.shape[1] // k_t.shape[1],
            "GROUP_S": q_s.shape[1] // k_s.shape[1],
            "SIZE_T": q_t.shape[3],
            "SIZE_S": q_s.shape[3],
            "PADDED_T": padded_size(q_t.shape[3]),
            "PADDED_S": padded_size(q_s.shape[3]),
            "DIVERGENCE": CODES[self.settings.divergence],
            **self._visibility(),
        }

    def _mean_over_pairs(self, values_BPT: Tensor) -> Tensor:
        if max(self.counts) == 1:
            return values_BPT
        return torch.stack([part.mean(1) for part in values_BPT.split(self.counts, dim=1)], dim=1)

    def _per_pair(self, grad_BHT: Tensor) -> Tensor:
        """The gradient of every pair's value, 0 at queries that are padding."""
        gradient_BHT = grad_BHT.float()
        if self.real_keys_BT is not None:
            gradient_BHT = gradient_BHT * self.real_keys_BT[:, None]
        if max(self.counts) > 1:
            shares = tuple(count for count in self.counts for _ in range(count))
            share_P1 = device_ints(shares, gradient_BHT.device)[:, None]
            gradient_BHT = gradient_BHT[:, self.head_s_P] / share_P1
        return gradient_BHT.contiguous()
