"""A model's numbers, from its config."""

from pathlib import Path

import pytest

from makd_llm.cluster.sizes import read_model_config, sizes_of, student_config
from makd_llm.testing import tiny_config


def test_sizes_are_the_models_own(large: Path) -> None:
    found = sizes_of(read_model_config(large))
    assert found.numbers == 70_553_706_496
    assert (found.query, found.key_value, found.neurons) == (8192, 1024, 28672)
    assert found.table == 128256 * 8192 == found.own_head
    assert found.largest_inside == 8192 * 28672
    tied = sizes_of(tiny_config("llama", tied=True))
    untied = sizes_of(tiny_config("llama"))
    assert untied.numbers - tied.numbers == tied.table


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon"])
def test_a_student_keeps_its_share(family: str) -> None:
    config = tiny_config(family)
    dense, student = sizes_of(config), sizes_of(student_config(config, 0.5, 1))
    assert 0.45 < sum(student.products) / sum(dense.products) <= 0.5
    outside = dense.numbers - sum(dense.products)
    assert student.numbers - sum(student.products) == outside
