"""The fused squared error equals the plain one, forward and backward, in every precision."""

import pytest
import torch

from makd_llm.objectives.squared_error import squared_error


def plain(student: torch.Tensor, teacher: torch.Tensor, normalize: str) -> torch.Tensor:
    error = (student.double() - teacher.double()).square().sum(-1)
    return error / (
        teacher.double().square().sum(-1) if normalize == "relative" else student.shape[-1]
    )


@pytest.mark.parametrize("normalize", ["relative", "mean"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_value_and_gradient_equal_the_plain_formula(
    normalize: str, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 7, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(2, 5, 7, generator=generator).to(dtype)
    upstream = torch.rand(2, 5, generator=generator)
    before = student.detach().clone()
    got = squared_error(student, teacher, normalize=normalize)  # type: ignore[arg-type]
    (got * upstream).sum().backward()
    exact = student.detach().double().requires_grad_()
    wanted = plain(exact, teacher, normalize)
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]
    assert torch.equal(student, before), "the input is left as it was"
    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


def test_equal_inputs_give_zero_and_a_silent_teacher_no_nan() -> None:
    same = torch.randn(1, 3, 4)
    assert torch.equal(squared_error(same, same), torch.zeros(1, 3))
    student = torch.ones(1, 1, 4, requires_grad=True)
    error = squared_error(student, torch.zeros(1, 1, 4))
    error.sum().backward()
    assert error.item() == 4.0 and torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        squared_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_the_teacher_receives_no_gradient() -> None:
    student, teacher = (
        torch.ones(1, 2, 3, requires_grad=True),
        torch.zeros(1, 2, 3, requires_grad=True),
    )
    squared_error(student, teacher, normalize="mean").sum().backward()
    assert teacher.grad is None
