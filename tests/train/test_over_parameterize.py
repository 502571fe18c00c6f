"""A student whose matrices are chains of tensors: where it starts, what it learns on DeepSpeed's
engines, and what is exported.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from makd_llm.errors import UserError
from makd_llm.testing import launch_ranks, tiny_config
from makd_llm.testing.training import (
    assert_same_gradient,
    factorized,
    gradients,
    named_parameters,
    parts,
    run_loop,
    sizes,
    small_loader,
)

OPDF = {"preset": "opdf"}
WITHOUT = {"preset": "opdf", "objectives": {"auxiliary": {"weight": 0.0}}}
IDS = torch.arange(3, 20)[None]


def over_parameterized(
    student: Path, teacher: Path, dtype: torch.dtype = torch.float32, **asked: Any
) -> Any:
    """A loaded student with its chains, and their counts; one process, nothing sharded."""
    from makd_llm.checkpoint.folder import read_config
    from makd_llm.config import DistilConfig
    from makd_llm.models.pairing import pair
    from makd_llm.models.sharded import load_sharded
    from makd_llm.train.build import build_chains, build_objectives
    from makd_llm.train.over_parameterize import over_parameterize

    distil = DistilConfig.model_validate({"preset": "opdf", **asked})
    model = load_sharded(student, {}, dtype)
    pairing = pair(read_config(student), read_config(teacher))
    layers = read_config(student).num_hidden_layers
    chains = build_chains(distil, build_objectives(distil, model.family, layers, pairing))
    assert chains is not None
    return model, over_parameterize(model, chains, student, teacher, pairing, {}, dtype)


def cut(teacher: Path, student: Path, keep_ratio: float = 0.5) -> None:
    from makd_llm.factorize.student import Recipe, factorize

    recipe = Recipe(keep_ratio=keep_ratio, method="svd", rank_multiple=2)
    factorize(teacher, student, recipe, [], tokenizer=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Tiny teachers and their students, by architecture: single, fused and transposed matrices."""
    from transformers import AutoModelForCausalLM

    found = {}
    for kind in ("llama", "gpt2", "phi3", "gpt_neox"):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(folder / "teacher")
        cut(folder / "teacher", folder / "student")
        found[kind] = folder / "student", folder / "teacher"
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("dense", [False, True])
def test_it_starts_as_the_student_and_is_exported_under_its_names(
    models: dict[str, tuple[Path, Path]], kind: str, dense: bool
) -> None:
    """dense: the teacher itself is trained, whose matrices are not factored."""
    from makd_llm.models.sharded import load_sharded
    from makd_llm.train.engine import whole_tensors

    student, teacher = models[kind]
    start = teacher if dense else student
    plain = load_sharded(start, {}, torch.float32).model
    model, counts = over_parameterized(start, teacher)
    with torch.no_grad():
        expected, found = plain(IDS).logits, model.model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = dict(plain.named_parameters())
    exported = dict(whole_tensors(model))
    assert {n: t.shape for n, t in exported.items()} == {n: p.shape for n, p in before.items()}
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, before[name].detach(), rtol=0, atol=1e-6)
    assert counts.in_tensors > counts.numbers and counts.matrices > 0
    grown = sum(p.numel() for p in model.model.parameters())
    kept = sum(p.numel() for p in before.values())
    assert grown - kept == counts.in_tensors - counts.numbers


def test_only_the_asked_roles_become_chains(models: dict[str, tuple[Path, Path]]) -> None:
    student, teacher = models["llama"]
    asked = {"over_parameterize": {"tensors": 3, "roles": ["o", "up"]}}
    model, counts = over_parameterized(student, teacher, **asked)
    chains = {n.rpartition(".")[0] for n, _ in model.model.named_parameters() if ".tensor_" in n}
    assert {name.split(".")[4] for name in chains} == {"o_proj", "up_proj"}
    assert len(chains) == counts.matrices and all(len(m) == 2 for m in model.compared.values())


def test_a_student_of_its_teachers_matrices_starts_at_the_teachers_tensors(
    models: dict[str, tuple[Path, Path]],
) -> None:
    _, teacher = models["llama"]
    model, _ = over_parameterized(teacher, teacher)
    model.model(IDS)
    assert all(
        float(module.distance.detach()) < 1e-9
        for modules in model.compared.values()
        for module in modules
    )


def test_in_bf16_it_starts_close_to_the_student(models: dict[str, tuple[Path, Path]]) -> None:
    """Rounding each of five tensors, instead of the matrix, moves it by less than a hundredth."""
    from makd_llm.checkpoint.folder import TensorReader
    from makd_llm.train.engine import whole_tensors

    student, teacher = models["llama"]
    model, _ = over_parameterized(student, teacher, torch.bfloat16)
    reader = TensorReader(student)
    for name, tensor in whole_tensors(model):
        start = reader.get(name)
        assert tensor.dtype == torch.bfloat16
        assert (tensor.float() - start).norm() <= 1e-2 * start.norm(), name


def test_what_cannot_be_is_refused(models: dict[str, tuple[Path, Path]]) -> None:
    _, fused = models["gpt2"]
    only_q = {"over_parameterize": {"roles": ["q"]}}
    with pytest.raises(UserError, match=r"q, k, v are one matrix in attn\.c_attn; name all"):
        over_parameterized(fused, fused, **only_q)
    gate = {"over_parameterize": {"roles": ["gate"]}, "objectives": {"auxiliary": {"weight": 0}}}
    with pytest.raises(UserError, match="no matrix of the roles gate whose sizes have divisors"):
        over_parameterized(fused, fused, **gate)


def test_a_layer_with_nothing_to_compare_is_refused(
    models: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all sizes are primes."""
    from makd_llm.models.tensor_train import split_of
    from makd_llm.train import over_parameterize

    def without_ends(*asked: Any) -> Any:
        split = split_of(*asked)
        return split and replace(split, compared=())

    monkeypatch.setattr(over_parameterize, "split_of", without_ends)
    with pytest.raises(UserError, match="layer 0 has no auxiliary tensors to be compared"):
        over_parameterized(*models["llama"])


def start_of(folder: Path, student: Path) -> dict[str, Any]:
    """Tensors, targets, and what the model says of a batch, beside what the plain student says."""
    made = parts(folder, student, sizes(1, 4, stage=1), distil=OPDF)
    plain = parts(folder, student, sizes(1, 4, stage=1), distil={"preset": "kd"})
    one = small_loader(folder, student, micro_batch_size=4).next_step()[0]
    with torch.no_grad():
        said = [
            of.trained(one, lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T).clone()
            for of in (made, plain)
        ]
    model = made.trained.model.model
    found = {
        "tensors": {n: p.detach().clone() for n, p in model.named_parameters() if ".tensor_" in n},
        "targets": {n: b.clone() for n, b in model.named_buffers() if ".target_" in n},
        "said": said,
    }
    made.close()
    plain.close()
    return found


def on_one_rank(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path)

    def of(distil: dict[str, Any], stage: int = 3, **trained: Any) -> Any:
        return gradients(path, student, sizes(1, 4, stage), distil=distil, **trained)

    return {
        "start": start_of(path, student),
        "kd": of({"preset": "kd"}),
        "without": of(WITHOUT),
        "whole": of(OPDF),
        "stage 1": of(OPDF, stage=1),
        "stage 2": of(OPDF, stage=2),
        "checkpointing": of(OPDF, gradient_checkpointing=True),
        "measured": measured(path, student),
    }


def on_two_ranks(folder: str) -> dict[str, Any]:
    path = Path(folder)
    student = factorized(path)
    return {
        "resumed": resumed(path, student),
        "memory": shares_after_a_forward(path, student),
        "measured": measured(path, student),
    }


def resumed(folder: Path, student: Path) -> dict[str, Any]:
    """8 steps; and the last 4 of them again, from the checkpoint of step 4."""
    from makd_llm import distributed

    run_dir = folder / "resumed"
    first = eight_steps(folder, student, run_dir)
    distributed.on_main(shutil.rmtree, run_dir / "checkpoints" / "step-00000008")
    second = eight_steps(folder, student, run_dir)
    return {"first": first, "second": second}


def eight_steps(folder: Path, student: Path, run_dir: Path) -> dict[str, Any]:
    """All parameters and targets whole, what is exported, and what the engine says of a batch."""
    import deepspeed

    from makd_llm.train.engine import whole_tensors

    made = parts(folder, student, sizes(2, 2), distil=OPDF)
    said = run_loop(made, run_dir, 8, save_every=4)
    model = made.trained.model
    whole = {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    for name, parameter in named_parameters(made.trained).items():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    one = small_loader(folder, student, micro_batch_size=2).next_step()[0]
    with torch.no_grad():
        logits = made.trained(one, lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T).clone()
    ids, mask = one.input_ids_BT, one.attention_mask_BT
    exported = dict(whole_tensors(model))
    made.close()
    return {
        "whole": whole,
        "exported": exported,
        "batch": (ids, mask),
        "logits": logits,
        "said": said,
    }


def shares_after_a_forward(folder: Path, student: Path) -> dict[str, tuple[int, int]]:
    """Between forward and backward, what of each tensor this rank has, and the whole of it."""
    made = parts(folder, student, sizes(2, 2), distil=OPDF)
    one = made.loader.next_step()[0]
    loss = made.trained(one, lambda hidden_BTD, weight_VD: hidden_BTD.square().mean())
    found = {
        name: (parameter.ds_tensor.numel(), parameter.ds_numel)
        for name, parameter in named_parameters(made.trained).items()
        if ".tensor_" in name
    }
    made.trained.backward(loss)
    made.close()
    return found


def measured(folder: Path, student: Path) -> list[float]:
    """The objective's value in the metrics of four steps."""
    from makd_llm import distributed

    world = distributed.world_size()
    run_dir = folder / f"measured-{world}"
    made = parts(folder, student, sizes(world, 4 // world), distil=OPDF)
    run_loop(made, run_dir, 4)
    made.close()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/auxiliary"] for line in lines]


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    return launch_ranks(1, on_one_rank, str(tiny), timeout=400)[0]


@pytest.fixture(scope="module")
def two_ranks(tiny: Path) -> list[dict[str, Any]]:
    return launch_ranks(2, on_two_ranks, str(tiny), timeout=400)


def chains_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors):
        found.setdefault(name.rpartition(".")[0], []).append(tensors[name])
    return found


@pytest.mark.slow
def test_the_engine_says_at_the_start_what_the_plain_student_says(one_rank: dict[str, Any]) -> None:
    ours, plain = one_rank["start"]["said"]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tensors_get_the_matrixs_gradient_by_the_chain_rule(one_rank: dict[str, Any]) -> None:
    """Of the output's objectives, measured on the plain student."""
    from makd_llm.models.tensor_train import contract

    plain, found = one_rank["kd"], one_rank["without"]
    chains = chains_of(one_rank["start"]["tensors"])
    assert set(found) - set(plain) == set(one_rank["start"]["tensors"])
    for name in set(found) & set(plain):  # norms, the embedding
        torch.testing.assert_close(found[name], plain[name], rtol=1e-3, atol=2e-6)
    for name, tensors in chains.items():
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(contract(leaves), leaves, plain[name].double())
        for place, gradient in enumerate(expected):
            torch.testing.assert_close(
                found[f"{name}.tensor_{place}"], gradient.float(), rtol=1e-3, atol=2e-6
            )


@pytest.mark.slow
def test_the_auxiliary_objective_adds_its_own_gradient_and_nothing_else(
    one_rank: dict[str, Any],
) -> None:
    """Mean over 4 layers and 7 modules, summed over a module's tensors, mean over a tensor."""
    start, whole, without = one_rank["start"], one_rank["whole"], one_rank["without"]
    assert start["targets"]
    for name, gradient in whole.items():
        target = start["targets"].get(name.replace(".tensor_", ".target_"))
        added = torch.zeros_like(gradient)
        if target is not None and ".tensor_" in name:
            added = 2 * (start["tensors"][name] - target) / target.numel() / 4 / 7
        torch.testing.assert_close(gradient, without[name] + added, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stage 1", "stage 2", "checkpointing"])
def test_the_gradient_is_that_of_stage_3(one_rank: dict[str, Any], way: str) -> None:
    """For its splits into ranks and micro-batches see test_presets.py."""
    assert_same_gradient(one_rank[way], one_rank["whole"])


@pytest.mark.slow
def test_tensors_are_sharded_trained_and_resumed_to_the_last_bit(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    for rank in two_ranks:
        for have, numbers in rank["memory"].values():
            assert have <= (numbers + 1) // 2
        first, second = rank["resumed"]["first"], rank["resumed"]["second"]
        assert first["whole"].keys() == second["whole"].keys()
        for name, tensor in first["whole"].items():
            assert torch.equal(tensor, second["whole"][name]), name
        for name, tensor in one_rank["start"]["tensors"].items():
            assert not torch.equal(first["whole"][name], tensor), f"{name} has not learnt"


@pytest.mark.slow
def test_what_is_measured_does_not_depend_on_the_ranks(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    assert two_ranks[0]["measured"] == pytest.approx(one_rank["measured"], rel=1e-4)
    assert one_rank["measured"][-1] < one_rank["measured"][0], "it is learnt"


@pytest.mark.slow
def test_the_export_is_the_plain_student_and_says_what_the_trained_one_says(
    two_ranks: list[dict[str, Any]], tiny: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from makd_llm.checkpoint.folder import TensorReader

    found = two_ranks[0]["resumed"]["first"]
    reader = TensorReader(tiny / "student-2")
    assert found["exported"].keys() == reader.names()
    assert all(tuple(t.shape) == tuple(reader.shape(n)) for n, t in found["exported"].items())
    model = AutoModelForCausalLM.from_pretrained(tiny / "student-2", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(found["exported"], strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, "which is tied"
    ids, mask = found["batch"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(found["logits"][real], logits[real], rtol=1e-4, atol=1e-4)


def on_a_reshaped_student(folder: str) -> dict[str, Any]:
    """Narrower, with fewer layers and heads: its tensors' targets, and one step's gradients."""
    path = Path(folder)
    student = factorized(path, "reduced")
    made = parts(path, student, sizes(1, 4), distil=OPDF)
    model = made.trained.model.model
    targets = {name: b.clone() for name, b in model.named_buffers() if ".target_" in name}
    made.close()
    return {"targets": targets, "gradients": gradients(path, student, sizes(1, 4), distil=OPDF)}


@pytest.mark.slow
def test_a_narrower_student_is_compared_with_the_features_that_it_kept(reshaped: Path) -> None:
    from makd_llm.checkpoint.folder import TensorReader, read_config
    from makd_llm.models.origin import origin_of

    found = launch_ranks(1, on_a_reshaped_student, str(reshaped))[0]
    assert all(gradient.any() for gradient in found["gradients"].values())
    origin = origin_of(read_config(reshaped / "reduced"))
    assert origin is not None and origin.channels and origin.neurons
    reader = TensorReader(reshaped / "teacher")
    for layer, source in enumerate(origin.layers):
        prefix = f"model.layers.{source}"
        merged = reader.get(f"{prefix}.self_attn.k_proj.weight").view(2, 8, -1).mean(0)
        rows = reader.get(f"{prefix}.mlp.up_proj.weight")[list(origin.neurons[layer])]
        columns = reader.get(f"{prefix}.mlp.up_proj.weight")[:, list(origin.channels)]
        for name, kept in (
            ("self_attn.k_proj.up", merged),
            ("mlp.up_proj.up", rows),
            ("mlp.up_proj.down", columns.T),
        ):
            target = found["targets"][f"model.layers.{layer}.{name}.target_0"].double()
            size = target.shape[-1]
            basis = target.reshape(size, size)
            unfolded = kept.double().reshape(size, -1)
            energy = (basis.T @ unfolded).square().sum(1)
            torch.testing.assert_close(
                energy, torch.linalg.svdvals(unfolded).square(), rtol=1e-4, atol=1e-6
            )


def test_the_objective_of_a_run_is_one_number_for_any_batch() -> None:
    """As every token's value: its sum over tokens, by their number, is itself."""
    from makd_llm.objectives.masks import Masks
    from makd_llm.objectives.terms import auxiliary_term
    from makd_llm.shown import Needs, Shown

    term = auxiliary_term([0, 3], weight=1.0)
    assert term.needs == Needs(auxiliary=frozenset({0, 3})) and term.needs_of_teacher == Needs()
    student = Shown(auxiliary={0: torch.tensor(0.5), 3: torch.tensor(0.25)})
    for tokens in (torch.ones(1, 1), torch.tensor([[1, 1, 0], [1, 0, 0]])):
        found = term.compare(student, Shown(), Masks(tokens.bool()))
        assert float(found / tokens.sum()) == 0.375
