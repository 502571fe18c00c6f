"""What is compared with what: layers, heads and features by the origin, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from makd_llm.errors import UserError
from makd_llm.models.families import FAMILIES
from makd_llm.models.origin import Origin, set_origin
from makd_llm.models.pairing import HIDDEN, LayerMap, Pairing, Shape, pair, shape_of
from makd_llm.models.projections import Projections
from makd_llm.testing import tiny_config

TEACHER = Shape(6, width=6, neurons=5, heads=4, key_value_heads=2, head_width=2)
STUDENT = Shape(3, width=4, neurons=3, heads=4, key_value_heads=1, head_width=2)
ORIGIN = Origin(
    layers=(0, 2, 3),
    teacher_layers=6,
    channels=(0, 2, 3, 5),
    neurons=((0, 1, 4), (1, 2, 3), (0, 2, 4)),
    query_heads=((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)),
    key_value_heads=(((0, 1),),) * 3,
)
RESHAPED = Pairing(STUDENT, TEACHER, ORIGIN)

DISTILLED = [name for name, family in FAMILIES.items() if not family.experts]


@pytest.mark.parametrize(
    ("layer_map", "matrix", "hidden"),
    [
        ("origin", [0, 2, 3], [1, 2, 5]),
        ("uniform", [1, 3, 5], [1, 3, 5]),
        ((5, 0, 0), [5, 0, 0], [5, 0, 0]),
    ],
)
def test_layers_by_origin_evenly_or_as_listed(
    layer_map: LayerMap, matrix: list[int], hidden: list[int]
) -> None:
    pairing = replace(RESHAPED, layer_map=layer_map)
    assert pairing.teacher_layers([0, 1, 2]) == matrix
    assert pairing.teacher_layers([0, 1, 2], hidden=True) == hidden
    assert pairing.teacher_layers([2], hidden=True) == hidden[2:]


def test_an_even_spread_of_depths_that_do_not_divide_ends_at_the_last_layer() -> None:
    spread = Pairing(replace(TEACHER, layers=3), replace(TEACHER, layers=7), None, "uniform")
    assert spread.teacher_layers([0, 1, 2]) == [1, 3, 6]


def start(layer: int, role: str) -> torch.Tensor:
    projection = RESHAPED.projection(layer, role)
    assert projection is not None
    (weight_NM,) = Projections({(layer, role): projection}, {}, torch.float32).parameters()
    return weight_NM.detach()


def test_projections_start_by_putting_every_feature_in_its_place() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for role in (HIDDEN, "o", "down"):
        assert (start(1, role) @ x).tolist() == [1, 0, 2, 3, 0, 4]
    for role in ("gate", "up"):
        assert (start(1, role) @ x[:3]).tolist() == [0, 1, 2, 3, 0]
        assert (start(2, role) @ x[:3]).tolist() == [1, 0, 2, 0, 3]
    for role in ("k", "v"):
        assert (start(0, role) @ x[:2]).tolist() == [1, 2, 1, 2], "to both heads that were merged"


def test_queries_are_picked_by_heads_and_never_projected() -> None:
    assert RESHAPED.heads(0) is None and RESHAPED.selection(0, "q") is None
    assert RESHAPED.heads(1) == (2, 0, 3, 1)
    assert RESHAPED.selection(1, "q") == (4, 5, 0, 1, 6, 7, 2, 3)
    assert all(RESHAPED.projection(layer, "q") is None for layer in range(3))
    fewer = Pairing(
        replace(TEACHER, heads=2), TEACHER, Origin(tuple(range(6)), 6, query_heads=((3, 1),) * 6)
    )
    assert fewer.selection(0, "q") == (6, 7, 2, 3) and fewer.projection(0, "q") is None


def test_features_that_are_only_permuted_are_picked_and_not_projected() -> None:
    channels = (5, 4, 3, 2, 1, 0)
    swapped = (((1,), (0,)),) * 6
    origin = Origin(tuple(range(6)), 6, channels=channels, key_value_heads=swapped)
    permuted = Pairing(TEACHER, TEACHER, origin)
    assert permuted.selection(0, HIDDEN) == permuted.selection(3, "down") == channels
    assert permuted.selection(0, "k") == permuted.selection(0, "v") == (2, 3, 0, 1)
    assert permuted.selection(0, "gate") is None
    assert not any(permuted.projection(0, r) for r in (HIDDEN, *"qkvo", "gate", "up", "down"))


def test_inputs_are_picked_by_channels_heads_and_neurons() -> None:
    for role in ("q", "k", "v", "gate", "up"):
        assert RESHAPED.input_selection(1, role) == (0, 2, 3, 5)
    assert RESHAPED.input_selection(1, "o") == (4, 5, 0, 1, 6, 7, 2, 3)
    assert RESHAPED.input_selection(1, "down") == (1, 2, 3)
    elsewhere = replace(RESHAPED, layer_map="uniform")
    assert elsewhere.input_selection(1, "q") == (0, 2, 3, 5)
    with pytest.raises(UserError, match=r"matrix\.input=teacher: the neurons of the student's la"):
        elsewhere.input_selection(1, "down")


@pytest.mark.parametrize("family", DISTILLED)
def test_a_student_of_the_teachers_shape_has_nothing_picked_or_projected(family: str) -> None:
    config = tiny_config(family)
    same = pair(config, tiny_config(family))
    roles = FAMILIES[family].roles
    assert same.teacher_layers([0, 1]) == same.teacher_layers([0, 1], hidden=True) == [0, 1]
    assert same.heads(0) is None
    for role in (*roles, HIDDEN):
        assert same.selection(0, role) is None and same.projection(0, role) is None
    assert not any(same.input_selection(0, role) for role in roles)


@pytest.mark.parametrize("family", DISTILLED)
def test_sizes_are_those_of_the_modules(family: str) -> None:
    from makd_llm.models.families import part_of
    from makd_llm.models.modeling_lowrank import model_class_for

    config = tiny_config(family)
    shape = shape_of(config)
    with torch.device("meta"):
        model = model_class_for(config)(config)
    layer = model.get_submodule(f"{FAMILIES[family].layers}.0")
    features = {
        "q": shape.heads * shape.head_width,
        "k": shape.key_value_heads * shape.head_width,
        "o": shape.width,
        "up": shape.neurons,
    }
    for matrix in FAMILIES[family].dense:
        weight = layer.get_submodule(matrix.module).weight
        assert isinstance(weight, torch.Tensor)
        own = part_of(config, matrix, weight, -1 if matrix.transposed else 0)
        if matrix.role in features:
            assert own.shape[-1 if matrix.transposed else 0] == features[matrix.role]


def test_an_origin_that_the_teacher_handed_on_is_not_the_students() -> None:
    teacher, student = tiny_config("llama"), tiny_config("llama")
    for config in (teacher, student):
        set_origin(config, Origin((0, 3), 4))
    assert pair(student, teacher).origin is None
    set_origin(student, Origin((0, 1), 2))
    assert pair(student, teacher).origin == Origin((0, 1), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_map": (0, 1)}, "layer_map: 2 layers are named, but the student has 3"),
        ({"layer_map": (0, 1, 6)}, "layer_map: there is no layer 6; the teacher has layers 0 to 5"),
        ({"layer_map": (0, -1, 2)}, "layer_map: there is no layer -1"),
        ({"origin": replace(ORIGIN, teacher_layers=8)}, "says in makd_origin that its teacher has"),
        ({"origin": replace(ORIGIN, layers=(0, 1))}, "2 layers were kept, but the student has 3"),
        ({"origin": replace(ORIGIN, layers=(0, 2, 2))}, "which are not in order"),
        ({"origin": replace(ORIGIN, layers=(0, 2, 6))}, "which are not in order"),
        ({"origin": replace(ORIGIN, channels=(0, 1))}, "2 of hidden_size were kept"),
        ({"origin": replace(ORIGIN, channels=(0, 1, 2, 6))}, "does not have"),
        ({"origin": replace(ORIGIN, key_value_heads=(((),),) * 3)}, "does not have"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        replace(RESHAPED, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_another_shape_without_an_origin_says_what_to_do() -> None:
    unsaid = Pairing(STUDENT, TEACHER)
    with pytest.raises(UserError, match=r"has 3 layers and its teacher 6.*layer_map=uniform"):
        unsaid.teacher_layers([0])
    with pytest.raises(UserError, match=r"has 4 for hidden_size and its teacher 6"):
        unsaid.projection(0, HIDDEN)
    with pytest.raises(UserError, match=r"has 2 for num_attention_heads and its teacher 4"):
        Pairing(replace(STUDENT, heads=2), TEACHER).heads(0)
    with pytest.raises(UserError, match=r"heads have 3 channels and its teacher's 2, so q cannot"):
        Pairing(replace(STUDENT, head_width=3), TEACHER, ORIGIN).selection(0, "q")
    with pytest.raises(UserError, match="more than its teacher's 3"):
        Pairing(TEACHER, replace(TEACHER, layers=3), None, "uniform").teacher_layers([0])


def test_layers_that_see_other_tokens_are_not_compared() -> None:
    types = ("sliding_attention", "full_attention")
    mapped = Pairing(replace(TEACHER, layers=2), TEACHER, None, (1, 5), types, types * 3)
    with pytest.raises(UserError, match=r"the student's layer 0 \(sliding_attention\)"):
        mapped.check_windows([0, 1])
    mapped.check_windows([1])
