"""A walk sees what the model would see, for every architecture, dense and low-rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import makd_llm  # noqa: F401  (makes the Auto classes know the students)
from makd_llm.data.batch import Batch, collate
from makd_llm.data.schema import Example
from makd_llm.errors import UserError
from makd_llm.factorize import gradients
from makd_llm.factorize.decompose import svd
from makd_llm.factorize.gradients import row_fisher, sensitivity
from makd_llm.factorize.matrices import dense_matrix, jobs_of
from makd_llm.factorize.statistics import (
    InputStatistics,
    Read,
    inputs_of,
    paired,
    read_by,
    real_rows,
)
from makd_llm.layerwise.walk import Walk
from makd_llm.models import families
from makd_llm.models.capture import attention_of
from makd_llm.models.families import FAMILIES
from makd_llm.models.modeling_lowrank import model_class_for
from makd_llm.testing import tiny_config, unstacked

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


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen2_moe", "mixtral"])
def test_inputs_are_those_that_the_matrices_read(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    batch = batches()[0]
    walk = Walk(tmp_path, [batch], dtype=torch.float32, device=CPU)
    stream = walk.advanced(0, walk.layer(0), walk.embedded())
    layer, matrices, (before,) = walk.layer(1), walk.matrices(1), stream
    modules = {matrix.key: layer.get_submodule(matrix.module) for matrix in matrices}
    outputs: dict[str, torch.Tensor] = {}
    for matrix in matrices:

        def listen(
            module: Any, given: Any, out: torch.Tensor, matrix: families.Matrix = matrix
        ) -> None:
            row_N, _ = read_by(layer, matrix, given[0], batch)
            outputs[matrix.key] = out.flatten(0, -2)[row_N]

        modules[matrix.key].register_forward_hook(listen)
    firsts = {group[0].key for group in families.shared_inputs(matrices)}
    with torch.no_grad(), inputs_of(layer, matrices, firsts, batch) as inputs:
        walk.step(1, layer, batch, before)
    assert set(inputs) == firsts
    reader = walk.reader
    for job in jobs_of(reader, walk.config):
        matrix, key = job.matrix, job.matrix.key
        if job.layer == 1 and key in firsts:
            weight = dense_matrix(reader, job)
            bias = getattr(modules[key], "bias", None)
            made = outputs[key] if bias is None else outputs[key] - bias
            made = made.chunk(matrix.parts, dim=-1)[matrix.part]
            x_NK = inputs[key].x_NK
            torch.testing.assert_close(x_NK @ weight.T, made, rtol=1e-4, atol=1e-5)
            with torch.no_grad(), inputs_of(layer, matrices, {key}, batch, only=True) as alone:
                walk.step(1, layer, batch, before)
            assert set(alone) == {key}
            torch.testing.assert_close(alone[key].x_NK, x_NK)
    assert not any(m._forward_pre_hooks for m in modules.values())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_experts_inputs_are_the_real_tokens_that_are_sent_to_it(
    model_type: str, side: str, tmp_path: Path
) -> None:
    """Against each record by itself, without padding, through the model of transformers."""
    model = saved(model_type, tmp_path)
    batch = batches(side)[0]
    walk = Walk(tmp_path, [batch], dtype=torch.float32, device=CPU)
    stream = walk.advanced(0, walk.layer(0), walk.embedded())
    layer, matrices = walk.layer(1), walk.matrices(1)
    experts = [m for m in matrices if m.role == "gate" and m.expert.isdigit()]
    keys = {matrix.key for matrix in experts}
    with torch.no_grad(), inputs_of(layer, matrices, keys, batch) as inputs:
        walk.step(1, layer, batch, stream[0])
    right: dict[str, list[torch.Tensor]] = {key: [] for key in keys}

    def listen(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        hidden_ND, chosen_NC, _ = given
        for matrix in experts:
            right[matrix.key].append(hidden_ND[(chosen_NC == int(matrix.expert)).any(1)])

    model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(listen)
    with torch.no_grad():
        for ids in IDS:
            model(torch.tensor([ids]))
    choices = model.config.num_experts_per_tok
    assert sum(len(read.x_NK) for read in inputs.values()) == choices * sum(map(len, IDS))
    for key, rows in right.items():
        x_NK = torch.cat(rows)
        # Both records in their order, but within them by choice: sums do not depend on it.
        read = inputs.get(key, Read(x_NK[:0], torch.zeros(0)))
        torch.testing.assert_close(read.x_NK.T @ read.x_NK, x_NK.T @ x_NK, rtol=1e-4, atol=1e-4)
        real = batch.token_mask_BT.flatten()
        assert bool(real[read.token_N.long()].all())


def test_inputs_of_two_models_are_paired_by_their_tokens() -> None:
    x = torch.arange(6.0)[:, None]
    one = Read(x[[4, 0, 3]], torch.tensor([4, 0, 3]))
    other = Read(-x[[3, 5, 4]], torch.tensor([3, 5, 4]))
    left, right = paired(one, other)
    assert left.flatten().tolist() == [4.0, 3.0] and torch.equal(left, -right)
    nothing = Read(x[:0], torch.zeros(0, dtype=torch.long))
    assert all(len(rows) == 0 for rows in paired(one, nothing) + paired(nothing, one))


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


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "qwen2_moe"])
def test_row_fisher_equals_that_of_the_models_own_gradients(
    model_type: str, tmp_path: Path
) -> None:
    model = saved(model_type, tmp_path)
    given = batches()
    walk = Walk(tmp_path, given, dtype=torch.float32, device=CPU)
    found = row_fisher(walk)
    model = unstacked(model)
    expected: dict[tuple[int, str], torch.Tensor] = {}
    for ids in (IDS[0], IDS[1], IDS[0]):
        model.zero_grad()
        tokens = torch.tensor([ids])
        logits = model(tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
        for job in jobs_of(walk.reader, walk.config):
            gradient = model.get_submodule(job.name).weight.grad
            if gradient is None:  # of an expert that this record does not reach
                continue
            gradient = gradient.T if job.matrix.transposed else gradient
            rows = gradient.chunk(job.matrix.parts)[job.matrix.part].double().square().sum(1)
            key = (job.layer, job.matrix.key)
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


def test_the_way_back_is_the_same_with_few_streams_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [gradients.stride_of(30, size) for size in (0, 2**27, 2**28, 2**40)] == [1, 1, 2, 5]
    saved("llama", tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    found = row_fisher(walk)
    monkeypatch.setattr(gradients, "stride_of", lambda n_layers, stream_bytes: 3)
    again = row_fisher(walk)
    assert found.keys() == again.keys()
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize(("model_type", "key"), [("llama", "up"), ("mixtral", "up.2")])
def test_sensitivity_is_the_fisher_estimate_of_what_the_loss_rises(
    model_type: str, key: str, tmp_path: Path
) -> None:
    saved(model_type, tmp_path)
    walk = Walk(tmp_path, batches(), dtype=torch.float32, device=CPU)
    jobs = {(j.layer, j.matrix.key): j for j in jobs_of(walk.reader, walk.config)}
    dense = {key: dense_matrix(walk.reader, job) for key, job in jobs.items()}
    kept = {key: svd(weight) for key, weight in dense.items()}
    found = sensitivity(
        walk, lambda *key: (dense[key], kept[key].down_JK[:9], kept[key].up_MJ[:, :9])
    )
    assert set(found) == set(jobs)
    assert all(len(rises) == 10 and bool((rises >= 0).all()) for rises in found.values())
    # The sum over tokens for one matrix and rank, from the whole model's own gradients.
    layer, rank = 1, 7
    error = dense[layer, key].double()
    first = kept[layer, key].first(rank)
    error = error - first.up_MR @ first.down_RK
    expected = 0.0
    model = unstacked(AutoModelForCausalLM.from_pretrained(tmp_path))
    module = model.get_submodule(jobs[layer, key].name)
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
        if seen:  # the record reaches the expert
            wrong_NM = seen["x"].flatten(0, -2).double() @ error.T
            gradient_NM = seen["y"].grad.flatten(0, -2).double()
            expected += 0.5 * float((wrong_NM * gradient_NM).sum(1).square().sum())
    assert expected > 0
    assert float(found[layer, key][rank]) == pytest.approx(expected, rel=1e-3)
