"""A model's matrix products in fewer and cheaper calls, for inference.

Two things cost time when a model writes token by token: reading the weights, and calling each
product. A factor pair reads less and calls twice, so for a small matrix, or a rank close to
break-even, the dense product is the faster one. Here, in the decoder layers and the head,

- matrices that read one input (q k v; gate up) get their first product together, in one call: the
  `down` factors of those that stay factored above the weights of those that are dense;
- one row is multiplied as a vector, which takes torch a quarter to a third less time on a CPU in
  bfloat16 than a matrix of one row;
- a pair is multiplied out where that is clearly faster: where R (M + K) numbers and one more call
  cost WORTH times as much as M K numbers, since the memory that a pair saves is certain and the
  time is measured. What a call costs, in numbers, is measured too (`numbers_per_call`).

Source: ours; QKV packing is common practice in inference engines.
"""
# M outputs, K inputs, R rank, n rows of an input

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd_llm.models.families import family_of, shared_inputs
from makd_llm.models.modeling_lowrank import LowRankLinear, LowRankParts

Product = LowRankLinear | nn.Linear

Shape = tuple[int, int]
"""Of a product's weight."""

SIZES: tuple[Shape, ...] = ((256, 256), (1024, 1024))
"""Of products that are timed beside the model's own."""

WORTH = 1.25

ROUNDS = 9
"""Of timing."""

POOL_BYTES = 64 * 1024**2


class Packing(NamedTuple):
    """calls_before, calls_after: matrix products per token in the decoder layers, those that are
    not packed left out. merged: factor pairs that were multiplied out.
    """

    calls_before: int
    calls_after: int
    merged: int


@torch.no_grad()
def pack(model: PreTrainedModel, *, rows: int = 1, call: float | None = None) -> Packing:
    """Packs a model, low-rank or dense, in place and for good: it then has other tensor names than
    an exported one, is not trained, and is not saved.

    rows: tokens that are fed at once, as the batch size of greedy generation. call: what calling a
    product costs, in numbers; None: measured.
    """
    family = family_of(model.config)
    layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    if call is None:
        weight = next(model.parameters())
        modules = [m.module for m in family.matrices(model.config, 0)]
        shapes = [*_shapes(layers[0], modules), *SIZES]
        call = numbers_per_call(shapes, weight.device, weight.dtype, rows)
    total = Packing(0, 0, 0)
    for index, layer in enumerate(layers):
        there = dict(layer.named_modules())  # without experts that transformers keeps stacked
        for group in shared_inputs(family.matrices(model.config, index)):
            names = dict.fromkeys(m.module for m in group if m.module in there)
            found = _pack_group(layer, list(names), call) if names else Packing(0, 0, 0)
            total = Packing(*(a + b for a, b in zip(total, found, strict=True)))
    head = model.get_output_embeddings()
    if isinstance(head, Product):
        model.set_output_embeddings(Chain(head))
    return total


def _pack_group(layer: nn.Module, names: Sequence[str], call: float) -> Packing:
    """Packs what reads one input: sibling modules, or the parts of one fused module."""
    parent = owner = layer.get_submodule(names[0].rpartition(".")[0])
    children = [name.rpartition(".")[2] for name in names]
    if isinstance(fused := getattr(owner, children[0]), LowRankParts):
        parent, owner, children = fused, fused.parts, [str(i) for i in range(len(fused.parts))]
    members = {child: getattr(owner, child) for child in children}
    if not all(isinstance(member, Product) for member in members.values()):
        return Packing(0, 0, 0)  # GPT-2's dense Conv1D, say
    before = sum(_calls(member) for member in members.values())
    chosen = {child: _cheaper(member, call) for child, member in members.items()}
    merged = sum(chosen[child] is not member for child, member in members.items())
    if len(chosen) > 1:
        shared = SharedProduct(list(chosen.values()))
        for number, (child, product) in enumerate(chosen.items()):
            setattr(owner, child, PackedProduct(product, shared, number))
        parent.add_module(f"shared_{children[0]}", shared)
        after = 1 + sum(_calls(product) - 1 for product in chosen.values())
    else:
        ((child, product),) = chosen.items()
        setattr(owner, child, Chain(product))
        after = _calls(product)
    return Packing(before, after, merged)


def _calls(member: Product) -> int:
    return 2 if isinstance(member, LowRankLinear) else 1


def _cheaper(member: Product, call: float) -> Product:
    """A pair as it is, or multiplied out."""
    if not isinstance(member, LowRankLinear):
        return member
    rows, columns = member.out_features, member.in_features
    if member.rank * (rows + columns) + call < WORTH * rows * columns:
        return member
    dense = nn.Linear(columns, rows, bias=False, device="meta")
    dense.weight = nn.Parameter(member.dense_weight(), requires_grad=False)
    dense.register_parameter("bias", member.bias)
    return dense


def product_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) times (M, K) to (..., M), plus a bias (M,)."""
    if x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    row = torch.mv(weight, x.reshape(-1))
    row = row if bias is None else row + bias
    return row.view(*x.shape[:-1], -1)


class Chain(nn.Module):
    """A matrix that shares its input with no other: one product, or a pair's two."""

    def __init__(self, member: Product) -> None:
        super().__init__()
        factored = isinstance(member, LowRankLinear)
        self.weight = cast(nn.Parameter, member.up if factored else member.weight)
        self.down = cast(nn.Parameter, member.down) if factored else None
        self.bias = member.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., M)."""
        if self.down is not None:
            x = product_of(x, self.down, None)
        return product_of(x, self.weight, self.bias)


class SharedProduct(nn.Module):
    """The first products of matrices that read one input, stacked into one.

    Whoever of its members comes first with an input has the product made; the others, which come
    with the very same tensor, get their share of it. Nothing is kept once all have had theirs.
    """

    def __init__(self, members: Sequence[Product]) -> None:
        super().__init__()
        firsts = [m.down if isinstance(m, LowRankLinear) else m.weight for m in members]
        self.widths = [len(first) for first in firsts]
        self.weight = nn.Parameter(torch.cat(list(firsts)), requires_grad=False)
        # The bias of a pair belongs to its second product.
        biases = [None if isinstance(m, LowRankLinear) else m.bias for m in members]
        self.bias: nn.Parameter | None = None
        if any(bias is not None for bias in biases):
            parts = [
                first.new_zeros(len(first)) if bias is None else bias
                for first, bias in zip(firsts, biases, strict=True)
            ]
            self.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        self._input: Tensor | None = None
        self._shares: dict[int, Tensor] = {}

    def share(self, x: Tensor, member: int) -> Tensor:
        """(..., K) to (..., R or M of the member)."""
        if x is not self._input or member not in self._shares:
            stacked = product_of(x, self.weight, self.bias)
            self._input = x
            self._shares = dict(enumerate(stacked.split(self.widths, dim=-1)))
        found = self._shares.pop(member)
        if not self._shares:
            self._input = None
        return found


class PackedProduct(nn.Module):
    """What is left of a matrix whose first product lies in a `SharedProduct`."""

    def __init__(self, product: Product, shared: SharedProduct, member: int) -> None:
        super().__init__()
        self.member = member
        self.up = self.bias = None
        if isinstance(product, LowRankLinear):
            self.up, self.bias = product.up, product.bias
        self._shared = (shared,)  # in a tuple: the group's parent holds it

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., M)."""
        first = self._shared[0].share(x, self.member)
        return first if self.up is None else product_of(first, self.up, self.bias)


def numbers_per_call(
    shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype, rows: int
) -> float:
    """How many of a weight's numbers a product reads in the time that calling it takes, measured.

    shapes: of products to be timed, two sizes at least. rows: of their inputs. Seconds are fitted
    by a line over the numbers of a weight: its value at 0 over its slope.
    """
    distinct = sorted(set(shapes), key=lambda shape: shape[0] * shape[1])
    numbers = torch.tensor([float(m * k) for m, k in distinct], dtype=torch.float64)
    if len(distinct) < 2:
        raise ValueError("a line is fitted through products of two sizes at least")
    seconds = torch.tensor(_seconds(distinct, rows, device, dtype), dtype=torch.float64)
    centred = numbers - numbers.mean()
    slope = float((centred * seconds).sum() / centred.square().sum())
    at_0 = float(seconds.mean()) - slope * float(numbers.mean())
    # A slope that noise has hidden says nothing against the factors as they are.
    return max(at_0, 0.0) / slope if slope > 0 else 0.0


def _shapes(layer: nn.Module, names: Iterable[str]) -> Iterator[Shape]:
    """Of the products of a layer's matrices, factored and dense."""
    there = dict(layer.named_modules())
    for name in names:
        module = there.get(name)
        for member in module.parts if isinstance(module, LowRankParts) else [module]:
            if isinstance(member, LowRankLinear):
                yield member.rank, member.in_features
                yield member.out_features, member.rank
            if isinstance(member, Product):
                yield member.out_features, member.in_features


def _seconds(
    shapes: Sequence[Shape], rows: int, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Of a product of each shape, the least over rounds that take turns: whatever else the machine
    does only adds to it. The weights are more than caches hold.
    """
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    pools = []
    for m, k in shapes:
        copies = max(1, min(256, POOL_BYTES // (m * k * dtype.itemsize)))
        pools.append([torch.zeros(m, k, device=device, dtype=dtype) for _ in range(copies)])
    least = [float("inf")] * len(shapes)
    for number in range(ROUNDS + 1):
        for index, ((_, k), pool) in enumerate(zip(shapes, pools, strict=True)):
            x = torch.zeros(rows, 1, k, device=device, dtype=dtype)
            calls = max(len(pool), 32)
            wait()
            began = time.perf_counter()
            for call in range(calls):
                product_of(x, pool[call % len(pool)], None)
            wait()
            if number:  # the first warms up
                least[index] = min(least[index], (time.perf_counter() - began) / calls)
    return least
