"""Matrices as chains of tensors: exact, in their form, and trained as the matrix that they are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from makd_llm.models.modeling_lowrank import LowRankLinear
from makd_llm.models.tensor_train import (
    Kind,
    OverParameterized,
    Split,
    TensorTrain,
    contract,
    decompose,
    ends_of,
    mean_distance,
    split_of,
)

KINDS = st.sampled_from(("weight", "up", "down"))
SIZES = st.integers(1, 60)  # with primes, powers and squares among them
COUNTS = st.sampled_from((3, 5, 7))


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def split(shape: tuple[int, int], kind: Kind, tensors: int = 5) -> Split:
    found = split_of(shape, kind, tensors)
    assert found is not None
    return found


def chain(
    matrix: Tensor, kind: Kind, dtype: torch.dtype = torch.float64, **options: bool
) -> TensorTrain:
    """A filled one."""
    made = split((matrix.shape[0], matrix.shape[1]), kind)
    train = TensorTrain(made, dtype, **options)
    for parameter, tensor in zip(train.tensors, decompose(matrix, made), strict=True):
        parameter.data.copy_(tensor)
    return train


@given(SIZES, SIZES, KINDS, COUNTS)
def test_every_matrix_is_its_chain_exactly(rows: int, columns: int, kind: Kind, count: int) -> None:
    found = split_of((rows, columns), kind, count)
    if found is None:
        return
    assert (math.prod(found.rows), math.prod(found.columns)) == (rows, columns)
    matrix = random(rows, columns)
    tensors = decompose(matrix, found)
    assert [tuple(tensor.shape) for tensor in tensors] == found.shapes
    assert found.parameters == sum(tensor.numel() for tensor in tensors)
    torch.testing.assert_close(contract(tensors), matrix, rtol=0, atol=1e-12)
    for place, tensor in enumerate(tensors):
        flat = tensor.flatten(0, 2) if place < found.centre else tensor.flatten(1).T
        if place != found.centre:
            torch.testing.assert_close(flat.T @ flat, torch.eye(flat.shape[1]).double())


@given(SIZES, SIZES, KINDS, COUNTS)
def test_the_ends_hold_nothing_of_the_rank_and_are_square(
    rows: int, columns: int, kind: Kind, count: int
) -> None:
    """So they have the shapes of the teacher's, whatever the rank."""
    found = split_of((rows, columns), kind, count)
    if found is None:
        return
    for end in (0, count - 1):
        size = found.rows[end] * found.columns[end]
        assert kind == "weight" or {"up": found.columns, "down": found.rows}[kind][end] == 1
        assert (end in found.compared) == (1 < size**2 <= rows * columns)
        if end in found.compared:
            assert math.prod(found.shapes[end]) == size**2
    if count == 3 and kind == "up":
        assert found.columns == (1, columns, 1), "the rank is whole in the centre"


def test_two_primes_stay_a_matrix_and_even_chains_are_refused() -> None:
    assert split_of((7, 13), "weight", 5) is None and split_of((7, 13), "up", 5) is None
    assert split_of((7, 12), "up", 3) is None
    prime_by_rank = split((7, 12), "up")
    assert prime_by_rank.rows == (1, 1, 7, 1, 1) and prime_by_rank.compared == ()
    for wrong in (1, 2, 4):
        with pytest.raises(ValueError, match="odd number of tensors"):
            split_of((8, 8), "up", wrong)


@pytest.mark.parametrize("kind", ["up", "down"])
def test_five_tensors_are_two_to_three_times_the_matrix_and_three_hardly_more(kind: Kind) -> None:
    shape = (1536, 208) if kind == "up" else (208, 1536)
    numbers = math.prod(shape)
    assert 1.0 < split(shape, kind, 3).parameters / numbers < 1.03
    assert 2.0 < split(shape, kind, 5).parameters / numbers < 3.1


@pytest.mark.parametrize("kind", ["weight", "up", "down"])
def test_the_ends_of_a_matrix_are_those_of_its_chain(kind: Kind) -> None:
    matrix, found = random(24, 30), split((24, 30), kind)
    tensors = decompose(matrix, found)
    flipped = {place: -tensors[place] for place in found.compared}
    assert set(found.compared) == {0, 4}
    for place, tensor in ends_of(matrix, found, flipped).items():
        torch.testing.assert_close(tensor, flipped[place])


def test_the_ends_of_a_teachers_matrix_are_bases_of_its_rows_first_and_last_digits() -> None:
    """up is 24 x 5, the teacher's matrix 24 x 30: only the rows are the same."""
    up, teacher = random(24, 5), random(24, 30)
    found = split((24, 5), "up")
    tensors = decompose(up, found)
    like = {place: tensors[place] for place in found.compared}
    ends = ends_of(teacher, found, like)
    first, last = found.rows[0], found.rows[-1]
    unfolded = teacher.reshape(first, -1)
    basis = ends[0].view(first, first)
    energy = (basis.T @ unfolded).square().sum(1)
    torch.testing.assert_close(energy, torch.linalg.svdvals(unfolded).square())
    unfolded = teacher.reshape(-1, last, 30).transpose(0, 1).reshape(last, -1)
    energy = (ends[4].view(last, last) @ unfolded).square().sum(1)
    torch.testing.assert_close(energy, torch.linalg.svdvals(unfolded).square())
    assert all(
        ((ends[0] * like[0]).sum((0, 1, 2)) >= 0).tolist()
        + ((ends[4] * like[4]).sum((1, 2, 3)) >= 0).tolist()
    )


def test_the_gradient_of_a_contraction_is_right() -> None:
    tensors = [t.requires_grad_() for t in decompose(random(6, 4), split((6, 4), "up"))]
    assert torch.autograd.gradcheck(lambda *ts: contract(ts), tensors)


def test_the_distance_is_the_mean_squared_error_of_the_ends_and_reaches_no_teacher() -> None:
    train = chain(random(12, 6), "up")
    assert train.distance() is None
    targets = {k: random(*train.tensors[k].shape, seed=9).requires_grad_() for k in (0, 4)}
    train.set_targets(targets)
    expected = sum(
        ((train.tensors[k] - targets[k]) ** 2).sum() / targets[k].numel() for k in (0, 4)
    )
    found = train.distance()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found.backward()
    for place, tensor in enumerate(train.tensors):
        if place in targets:
            wanted = 2 * (tensor - targets[place]) / tensor.numel()
            torch.testing.assert_close(tensor.grad, wanted.detach(), rtol=1e-13, atol=0)
        else:
            assert tensor.grad is None
    assert all(target.grad is None for target in targets.values())

    def distance(first: Tensor, last: Tensor) -> Tensor:
        state = {"tensor_0": first, "tensor_4": last}
        _, value = torch.func.functional_call(train, state, torch.zeros(1, 6).double())
        assert isinstance(value, Tensor)
        return value

    ends = [train.tensors[k].detach().clone().requires_grad_() for k in (0, 4)]
    assert torch.autograd.gradcheck(distance, ends)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_over_parameterized_pair_is_the_pair_and_all_of_it_learns(recompute: bool) -> None:
    pair = LowRankLinear(24, 20, rank=6).double()
    trains = {
        "down": chain(pair.down.data, "down", recompute=recompute),
        "up": chain(pair.up.data, "up", recompute=recompute),
    }
    made = OverParameterized(trains, pair.bias)
    x = random(3, 5, 24).requires_grad_()
    torch.testing.assert_close(made(x), pair(x), rtol=0, atol=1e-12)
    assert made.distance is None
    upstream = random(3, 5, 20, seed=4)
    wanted = torch.autograd.grad(pair(x), (x, pair.up, pair.down), upstream)
    found = torch.autograd.grad(made(x), (x, *made.parameters()), upstream)
    torch.testing.assert_close(found[0], wanted[0])
    assert all(gradient.any() for gradient in found)
    # Moving a tensor changes the matrix by the contraction with the others: the chain rule.
    for train, gradient in ((trains["up"], wanted[1]), (trains["down"], wanted[2])):
        expected = torch.autograd.grad(train.matrix(), train.tensors, gradient)
        actual = dict(zip([id(p) for p in made.parameters()], found[1:], strict=True))
        for tensor, of_tensor in zip(train.tensors, expected, strict=True):
            torch.testing.assert_close(actual[id(tensor)], of_tensor)


def test_what_is_made_again_is_not_kept() -> None:
    """Between forward and backward a recomputing chain holds its input and what is compared."""
    train = chain(random(24, 20), "up", recompute=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        train(random(2, 20).requires_grad_())
    assert max(kept, default=0) <= 40
    train.recompute = False
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        train(random(2, 20).requires_grad_())
    assert max(kept) >= 24 * 20


def test_tensors_in_bf16_are_multiplied_in_fp32_and_rounded_once() -> None:
    matrix = random(64, 48)
    train = chain(matrix, "up", torch.bfloat16)
    exact = contract([tensor.double() for tensor in train.tensors])
    assert train.matrix().dtype == torch.bfloat16
    torch.testing.assert_close(
        train.matrix().double(), exact.to(torch.bfloat16).double(), rtol=2**-7, atol=1e-6
    )
    # Each of five tensors is off by at most 2**-9 of every entry, as the matrix itself would be.
    assert (exact - matrix).norm() < 5 * 2**-9 * matrix.norm()


def test_a_transposed_matrix_goes_back_as_it_was() -> None:
    stored = random(24, 20)
    train = chain(stored.T, "weight", transposed=True)
    torch.testing.assert_close(train.stored(), stored, rtol=0, atol=1e-12)


def test_the_distance_of_a_layer_is_the_mean_of_its_modules() -> None:
    modules = []
    for seed in (1, 2):
        train = chain(random(12, 6, seed=seed), "up")
        train.set_targets({k: torch.zeros_like(train.tensors[k].data) for k in (0, 4)})
        plain = nn.Parameter(random(6, 8))
        module = OverParameterized({"down": plain, "up": train}, None)
        assert module(random(2, 8)).shape == (2, 12)
        modules.append(module)
    each = [module.distance for module in modules]
    assert each[0] is not None and each[1] is not None
    torch.testing.assert_close(mean_distance(modules), (each[0] + each[1]) / 2)
