"""Linear divergence: chunked equals whole, exact endpoints, bounded memory, heads left alone."""

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from makd_kernels import (
    linear_cross_entropy_divergence,
    linear_cross_entropy_divergence_loss,
    linear_divergence,
)

op = importlib.import_module("makd_kernels.linear_divergence.op")
tile = importlib.import_module("makd_kernels.linear_divergence.tile")
TOKENS, VOCAB, STUDENT, TEACHER = 23, 40, 12, 7
DIVERGENCES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.5},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "skew_forward_kl", "alpha": 0.1},
    {"divergence": "skew_forward_kl", "alpha": 0.7},
    {"divergence": "skew_reverse_kl", "alpha": 0.1},
    {"divergence": "skew_reverse_kl", "alpha": 0.0},
    {"divergence": "tvd"},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or more rows in a tile, several tiles in a chunk, at the sizes of a test."""
    monkeypatch.setattr(tile, "TILE_BYTES_CPU", 3 * VOCAB * 4)


class Seen(TorchDispatchMode):
    """Records the most elements that an operation returned, and the names of all operations.

    What runs inside a custom operator it cannot see; `inside` is called there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.__name__)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the operators' own work consists of."""
    seen = Seen()
    sweep = op.sweep

    def seen_sweep(*args, **kwargs):
        with seen:
            return sweep(*args, **kwargs)

    monkeypatch.setattr(op, "sweep", seen_sweep)
    return seen


def problem(
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    teacher_vocab: int | None = None,
    dtype: torch.dtype = torch.float64,
    gain: float = 1.0,
    same: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student hidden, student head, teacher hidden, teacher head)"""
    generator = torch.Generator().manual_seed(3)

    def side(size: int, rows: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64) * gain
        head = torch.randn(rows, size, generator=generator, dtype=torch.float64) / size**0.5
        return hidden.to(dtype), head.to(dtype)

    student = side(STUDENT, vocab)
    return *student, *(student if same else side(TEACHER, teacher_vocab or vocab))


def labels(tokens: int = TOKENS, vocab: int = VOCAB) -> Tensor:
    found = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(5))
    found[::4] = -100
    return found


def gradients(
    tensors: tuple[Tensor, ...], scalar: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Outputs of `scalar` (the first is differentiated) and the student's two gradients."""
    hidden, head = (t.detach().clone().requires_grad_() for t in tensors[:2])
    outputs = scalar(hidden, head, *tensors[2:])
    outputs[0].backward()
    return *(o.detach() for o in outputs if o is not None), hidden.grad, head.grad


def assert_all_close(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def rows_scalar(label_N: Tensor, **options):
    """Both outputs under gradients that differ for each row and each output."""

    def scalar(hidden: Tensor, head: Tensor, *teacher: Tensor) -> tuple[Tensor, ...]:
        ce, div = linear_cross_entropy_divergence(hidden, head, label_N, *teacher, **options)
        count = torch.arange(ce.shape[0], dtype=ce.dtype)
        return (ce * count.cos()).sum() + (div * count.sin()).sum(), ce, div

    return scalar


def loss_scalar(label_N: Tensor, **options):
    def scalar(hidden: Tensor, head: Tensor, *teacher: Tensor) -> tuple[Tensor | None, ...]:
        out = linear_cross_entropy_divergence_loss(hidden, head, label_N, *teacher, **options)
        return out.loss * 3.5, out.cross_entropy_N, out.divergence_N

    return scalar


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 19),
    vocab=st.integers(2, 50),
    padding=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    divergence=st.sampled_from(DIVERGENCES),
    chunk_bytes=st.sampled_from([1, 2000, 2**20]),
)
def test_equals_reference_at_any_shape(
    tokens, vocab, padding, temperature, divergence, chunk_bytes
) -> None:
    tensors = problem(tokens, vocab + padding, vocab + 3)
    options = {
        "temperature": temperature, "vocab_size": vocab, "chunk_bytes": chunk_bytes, **divergence,
    }  # fmt: skip
    label_N, weight_N = labels(tokens, vocab), torch.linspace(0, 2, tokens, dtype=torch.float64)

    def divergence_alone(*tensors: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        values = linear_divergence(*tensors, weight_N=weight_N, impl=impl, **options)
        return (values * torch.arange(tokens)).sum(), values

    for build in (
        lambda impl: lambda *t: divergence_alone(*t, impl=impl),
        lambda impl: rows_scalar(label_N, weight_N=weight_N, impl=impl, **options),
        lambda impl: loss_scalar(
            label_N, weight_N=weight_N, cross_entropy_weight=0.3, divergence_weight=-1.7,
            impl=impl, **options,
        ),
    ):  # fmt: skip
        assert_all_close(gradients(tensors, build("torch")), gradients(tensors, build("reference")))


@pytest.mark.parametrize("options", DIVERGENCES)
@pytest.mark.parametrize("gain", [1.0, 10.0, 60.0])
def test_float64_agrees_with_the_reference(options: dict, gain: float) -> None:
    """Forward to 1e-12, gradients to 1e-10 of their largest entry, at any scale of the logits."""
    tensors = problem(gain=gain)
    ours, reference = (
        gradients(tensors, rows_scalar(labels(), impl=impl, **options))
        for impl in ("torch", "reference")
    )
    for one, other, allowed in zip(
        ours, reference, (1e-12, 1e-12, 1e-12, 1e-10, 1e-10), strict=True
    ):
        assert (one - other).abs().max() <= allowed * other.abs().max()


@pytest.mark.parametrize("options", DIVERGENCES)
def test_gradient_is_that_of_the_values(options: dict) -> None:
    hidden, head, *teacher = problem(4, 6)
    label_N = labels(4, 6)

    def values(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_cross_entropy_divergence(
            hidden, head, label_N, *teacher, temperature=1.5, **options
        )

    assert torch.autograd.gradcheck(values, (hidden.requires_grad_(), head.requires_grad_()))


def test_without_teacher_it_is_cross_entropy() -> None:
    tensors = problem()[:2]
    label_N = labels()

    def plain(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.nn.functional.cross_entropy(hidden @ head.T, label_N, reduction="none")
        return 3.5 * values.sum(), values

    ours = gradients(tensors, loss_scalar(label_N, chunk_bytes=2000))
    assert_all_close(ours, gradients(tensors, plain))
    assert (ours[1][::4] == 0).all(), "an ignored row costs nothing"
    cross_entropy_N, divergence_N = linear_cross_entropy_divergence(*tensors, label_N)
    assert divergence_N is None
    torch.testing.assert_close(cross_entropy_N, ours[1])


def test_the_loss_equals_the_rows_weighted() -> None:
    """The gradient made in the forward is that of the recomputing op under the same weights."""
    tensors, label_N = problem(), labels()

    def by_rows(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, head, *teacher = tensors
        ce, div = linear_cross_entropy_divergence(hidden, head, label_N, *teacher)
        return 3.5 * (0.3 * ce + 1.7 * div).sum(), ce, div

    in_forward = loss_scalar(label_N, cross_entropy_weight=0.3, divergence_weight=1.7)
    assert_all_close(gradients(tensors, in_forward), gradients(tensors, by_rows))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_endpoints_are_the_plain_divergences(beta: float) -> None:
    tensors = problem(dtype=torch.bfloat16, gain=10)
    ends = linear_divergence(*tensors, divergence="jsd", beta=beta)
    plain = linear_divergence(*tensors, divergence="reverse_kl" if beta else "forward_kl")
    assert torch.equal(ends, plain)


@pytest.mark.parametrize("options", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_sides_give_exactly_zero(options: dict, dtype: torch.dtype) -> None:
    tensors = problem(dtype=dtype, gain=8, same=True)
    assert (linear_divergence(*tensors, temperature=2.0, **options) == 0).all()


@pytest.mark.parametrize("options", DIVERGENCES)
def test_never_negative(options: dict) -> None:
    for gain in (1e-3, 1.0, 60.0):
        hidden, head, _, _ = problem(dtype=torch.bfloat16, gain=gain)
        nearly = hidden * 1.01
        values = linear_divergence(nearly, head, hidden, head, **options)
        assert values.isfinite().all() and (values >= 0).all()


@pytest.mark.parametrize("options", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_no_worse_than_eager(options: dict, dtype: torch.dtype, gain: float) -> None:
    """Per tensor: our largest error stays within 1.3 times eager's plus two units of rounding."""
    tensors = problem(dtype=dtype, gain=gain)
    runs = {
        impl: gradients(given, loss_scalar(labels(), impl=impl, chunk_bytes=2000, **options))
        for impl, given in (("torch", tensors), ("reference", tensors))
    }
    exact = gradients(
        tuple(t.double() for t in tensors), loss_scalar(labels(), impl="reference", **options)
    )
    for truth, one, other in zip(exact, runs["torch"], runs["reference"], strict=True):
        assert one.isfinite().all()
        error, allowed = ((t.double() - truth).abs().max() for t in (one, other))
        slack = 2 * torch.finfo(one.dtype).eps * truth.abs().max()
        assert error <= 1.3 * allowed + slack, f"{error:.2e} against {allowed:.2e}"


def test_padded_vocabulary_counts_for_nothing() -> None:
    hidden, head, teacher, teacher_head = problem(vocab=VOCAB + 5, teacher_vocab=VOCAB + 9)
    label_N = labels()
    padded = gradients(
        (hidden, head, teacher, teacher_head), loss_scalar(label_N, vocab_size=VOCAB)
    )
    real = gradients((hidden, head[:VOCAB], teacher, teacher_head[:VOCAB]), loss_scalar(label_N))
    assert_all_close((*padded[:-1], padded[-1][:VOCAB]), real)
    assert (padded[-1][VOCAB:] == 0).all()
    with pytest.raises(ValueError, match="vocab_size"):
        linear_divergence(hidden, head, teacher, teacher_head)


def test_never_holds_all_logits(inside: Seen) -> None:
    tensors, label_N = problem(tokens=200), labels(200)
    chunk_bytes = 20 * VOCAB * 8 * 2  # twenty rows of both sides
    for scalar in (rows_scalar, loss_scalar):
        hidden, head = (t.detach().clone().requires_grad_() for t in tensors[:2])
        scalar(label_N, chunk_bytes=chunk_bytes)(hidden, head, *tensors[2:])[0].backward()
        assert 10 * VOCAB < inside.largest <= max(20 * VOCAB, 200 * STUDENT), inside.largest


def test_the_backward_of_the_loss_leaves_the_heads_alone(inside: Seen) -> None:
    """A head that is gathered during the forward alone may be gone, or garbage, afterwards."""
    tensors, label_N = problem(), labels()
    expected = gradients(tensors, loss_scalar(label_N))
    hidden, head, teacher, teacher_head = (t.clone() for t in tensors)
    out = loss_scalar(label_N)(
        hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head
    )
    head.data.fill_(torch.nan)
    teacher_head.data.fill_(torch.nan)
    inside.operations.clear()
    out[0].backward()
    assert not inside.operations
    assert_all_close((hidden.grad, head.grad), expected[-2:])


def test_the_loss_hands_its_gradient_over_once() -> None:
    out = loss_scalar(labels())(problem()[0].requires_grad_(), *problem()[1:])
    out[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        out[0].backward()


def test_no_gradient_work_where_none_is_wanted(inside: Seen) -> None:
    hidden, head, *teacher = problem()
    hidden.requires_grad_()
    head.requires_grad_()
    with torch.no_grad():
        out = linear_cross_entropy_divergence_loss(hidden, head, labels(), *teacher)
    assert not out.loss.requires_grad
    assert sum("mm" in name for name in inside.operations) == 2
    frozen = loss_scalar(labels())(hidden, head.detach(), *teacher)
    frozen[0].backward()
    assert_all_close(
        (hidden.grad,), gradients((hidden, head, *teacher), loss_scalar(labels()))[3:4]
    )


def test_small_weights_survive_fp16() -> None:
    tensors, label_N = problem(dtype=torch.float16), labels()
    tiny = {"cross_entropy_weight": 2.0**-20, "divergence_weight": 2.0**-20}

    def scaled(*t: Tensor) -> tuple[Tensor]:
        out = linear_cross_entropy_divergence_loss(*t[:2], label_N, *t[2:], **tiny)
        return (out.loss * 2.0**20,)

    def plain(*t: Tensor) -> tuple[Tensor]:
        return (linear_cross_entropy_divergence_loss(*t[:2], label_N, *t[2:]).loss,)

    for one, other in zip(gradients(tensors, scaled), gradients(tensors, plain), strict=True):
        torch.testing.assert_close(one, other)


def test_takes_any_strides_and_is_deterministic() -> None:
    tensors = problem()
    strided = tuple(t.T.contiguous().T for t in tensors)
    assert not strided[0].is_contiguous()
    first = gradients(strided, loss_scalar(labels(), chunk_bytes=2000))
    assert_all_close(first, gradients(tensors, loss_scalar(labels())))
    again = gradients(strided, loss_scalar(labels(), chunk_bytes=2000))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_no_tokens_is_a_zero() -> None:
    tensors = problem(tokens=0)
    loss, *_, grad_hidden, grad_head = gradients(tensors, loss_scalar(labels(0)))
    assert loss == 0 and grad_hidden.shape == (0, STUDENT) and (grad_head == 0).all()


def test_the_teacher_never_gets_a_gradient() -> None:
    hidden, head, teacher, teacher_head = problem()
    with pytest.raises(ValueError, match="teacher"):
        linear_divergence(hidden, head, teacher.requires_grad_(), teacher_head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "auto, reference, torch"),
        ({"divergence": "l2"}, "forward_kl, reverse_kl, jsd"),
        ({"divergence": "jsd", "beta": 1.5}, "beta"),
        ({"temperature": 0.0}, "positive"),
        ({"vocab_size": VOCAB + 1}, "vocab_size"),
        ({"weight_N": torch.ones(3)}, "weight_N"),
    ],
)
def test_misuse_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_divergence(*problem(), **options)


def test_labels_and_shapes_that_do_not_fit_are_named() -> None:
    hidden, head, teacher, teacher_head = problem()
    wrong = labels()
    wrong[1] = VOCAB
    with pytest.raises(ValueError, match=f"label {VOCAB} "):
        linear_cross_entropy_divergence(hidden, head, wrong)
    with pytest.raises(ValueError, match="both teacher_NE and teacher_head_VE"):
        linear_cross_entropy_divergence(hidden, head, labels(), teacher)
    with pytest.raises(ValueError, match="tokens differ"):
        linear_divergence(hidden, head, teacher[1:], teacher_head)
    with pytest.raises(ValueError, match="teacher: dtypes"):
        linear_divergence(hidden, head, teacher.float(), teacher_head)
