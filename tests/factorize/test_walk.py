"""A walk sees what the model would see, for every architecture, dense and low-rank."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.factorize.decompose import svd
from makd_llm.factorize.gradients import row_fisher, sensitivity
from makd_llm.factorize.matrices import dense_matrix, jobs_of
from makd_llm.factorize.statistics import InputStatistics, inputs_of, only_input_of, real_rows
from makd_llm.factorize.walk import Walk
from makd_llm.models.capture import attention_of
from makd_llm.models.families import FAMILIES
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.testing import tiny_config

IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2]]
CPU = torch.device("cpu")


def saved(model_type: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.init_std = config.initializer_range = 0.2  # OPT's name, and the others'
    model = model_class_for(config)(config).eval()
    model.save_pretrained(folder)
    return model


def batches(padding_side: str = "right") -> list[Batch]:
    examples = [Example(str(i), ids, 1) for i, ids in enumerate(IDS)]
    return [
        collate(examples, 0, padding_side=padding_side),  # type: ignore[arg-type]
        collate(examples[:1], 0),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_equals_the_whole(model_type: str, side: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path)
    model.set_attn_implementation(attention_of(model.config))  # type: ignore[operator,arg-type]
    given = batches(side)
    walk = Walk(tmp_path, given, dtype=torch.float32, device=CPU)
    stream = walk.embedded()
    for index in range(len(walk)):
        stream = walk.advanced(index, walk.layer(index), stream)
    with torch.no_grad():
        finished = list(walk.finished(stream))
        for batch, last_BTD in zip(given, finished, strict=True):
            right_BTV = model(
                batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
            ).logits
            nats_N = walk.nats(last_BTD, batch, walk.output_weight())
            labels_N = batch.labels_BT.flatten()[batch.targets_N]
            logits_NV = right_BTV.flatten(0, 1)[batch.targets_N]
            right_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
            torch.testing.assert_close(nats_N, right_N, rtol=1e-4, atol=1e-4)


def test_no_more_than_a_layer_has_storage(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    assert all(p.is_meta for p in walk.empty_layer(0).parameters())
    first = walk.layer(0)
    assert not any(p.is_meta or p.requires_grad for p in first.parameters())
    assert all(p.is_meta for p in walk.empty_layer(0).parameters())


def test_a_folder_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        walk.layer(1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_inputs_are_those_that_the_matrices_read(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    batch = batches()[0]
    walk = Walk(tmp_path, [batch], dtype=torch.float32, device=CPU)
    layer, family = walk.layer(0), walk.family
    (before,) = walk.embedded()
    outputs = {}
    modules = {matrix.role: layer.get_submodule(matrix.module) for matrix in family.matrices}
    for role, module in modules.items():
        module.register_forward_hook(lambda m, i, out, role=role: outputs.update({role: out}))
    firsts = tuple(group[0] for group in family.shared_inputs)
    with torch.no_grad(), inputs_of(layer, family, firsts) as inputs:
        walk.step(0, layer, batch, before)
    assert set(inputs) == set(firsts)
    reader = walk.reader
    for job in jobs_of(reader, family, walk.config):
        if job.layer == 0 and job.matrix.role in firsts:
            weight = dense_matrix(reader, job)
            module, matrix = modules[job.matrix.role], job.matrix
            made = (
                outputs[matrix.role] - getattr(module, "bias", torch.zeros(()))
                if getattr(module, "bias", None) is not None
                else outputs[matrix.role]
            )
            made = made.chunk(matrix.parts, dim=-1)[matrix.part]
            torch.testing.assert_close(inputs[matrix.role] @ weight.T, made, rtol=1e-4, atol=1e-5)
            with torch.no_grad(), only_input_of(layer, family, matrix.role):
                alone = walk.step(0, layer, batch, before)
            torch.testing.assert_close(alone, inputs[matrix.role])
    assert not any(m._forward_pre_hooks for m in modules.values())


def test_statistics_count_real_tokens_in_float64() -> None:
    batch = batches()[0]
    x_BTK = torch.randn(2, 11, 6)
    x_NK = real_rows(x_BTK, batch)
    assert x_NK.shape == (17, 6) and x_NK.dtype == torch.float64
    seen = InputStatistics.zeros(6, CPU)
    seen.add(x_NK[:5])
    seen.add(x_NK[5:])
    right = torch.cat([x_BTK[0], x_BTK[1, :6]]).double()
    torch.testing.assert_close(seen.covariance_KK, right.T @ right)
    torch.testing.assert_close(seen.mean_abs_K, right.abs().mean(0))
    assert seen.tokens == seen.over_ranks(0, "q").tokens == 17


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_row_fisher_equals_that_of_the_models_own_gradients(
    model_type: str, tmp_path: Path
) -> None:
    model = saved(model_type, tmp_path)
    given = batches()
    walk = Walk(tmp_path, given, dtype=torch.float32, device=CPU)
    found = row_fisher(walk)
    expected: dict[tuple[int, str], torch.Tensor] = {}
    for ids in (IDS[0], IDS[1], IDS[0]):
        model.zero_grad()
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
        for job in jobs_of(walk.reader, walk.family, walk.config):
            gradient = model.get_submodule(job.name).weight.grad
            gradient = gradient.T if job.matrix.transposed else gradient
            rows = gradient.chunk(job.matrix.parts)[job.matrix.part].double().square().sum(1)
            key = (job.layer, job.matrix.role)
            expected[key] = expected.get(key, 0) + rows
    assert set(found) == set(expected)
    for key, rows in found.items():
        torch.testing.assert_close(rows, expected[key], rtol=1e-3, atol=1e-8)


def test_students_walk_as_teachers_do(tmp_path: Path) -> None:
    from makd_llm.models.modeling_lowrank import lowrank_config

    torch.manual_seed(0)
    config = lowrank_config(tiny_config("llama"), {"model.layers.1.mlp.up_proj": 3})
    model = model_class_for(config)(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    stream = walk.embedded()
    for index in range(len(walk)):
        stream = walk.advanced(index, walk.layer(index), stream)
    with torch.no_grad():
        last = list(walk.finished(stream))[1]
        right = again(batches()[1].input_ids_BT, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last, right, rtol=1e-4, atol=1e-5)


def test_sensitivity_is_the_fisher_estimate_of_what_the_loss_rises(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    jobs = {(j.layer, j.matrix.role): j for j in jobs_of(walk.reader, walk.family, walk.config)}
    dense = {key: dense_matrix(walk.reader, job) for key, job in jobs.items()}
    kept = {key: svd(weight) for key, weight in dense.items()}
    found = sensitivity(
        walk, lambda *key: (dense[key], kept[key].down_JK[:9], kept[key].up_MJ[:, :9])
    )
    assert set(found) == set(jobs)
    assert all(len(rises) == 10 and bool((rises >= 0).all()) for rises in found.values())
    # The sum over tokens for one matrix and rank, from the whole model's own gradients.
    layer, role, rank = 1, "up", 7
    error = dense[layer, role].double()
    first = kept[layer, role].first(rank)
    error = error - first.up_MR @ first.down_RK
    expected = 0.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    module = model.get_submodule(jobs[layer, role].name)
    for ids in (IDS[0], IDS[1], IDS[0]):
        seen: dict[str, torch.Tensor] = {}
        handle = module.register_forward_hook(
            lambda m, args, out, seen=seen: (
                seen.update(x=args[0].detach(), y=out),
                out.retain_grad(),
            )[0]
        )
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
        handle.remove()
        wrong = seen["x"][0].double() @ error.T
        expected += 0.5 * float((wrong * seen["y"].grad[0].double()).sum(1).square().sum())
    assert float(found[layer, role][rank]) == pytest.approx(expected, rel=1e-3)
