"""Exported students: loaded by other processes, merged, counted."""

# Shapes: M outputs, K inputs.

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from makd_llm.checkpoint.export import (
    ParameterCount,
    count_parameters,
    counts_of_folders,
    expected_shapes,
    merge,
    rewrite,
    write_model,
)
from makd_llm.checkpoint.folder import TensorReader, TensorWriter, read_config, write_config
from makd_llm.errors import UserError
from makd_llm.models.families import FAMILIES, family_of, matrices_of, part_of
from makd_llm.models.modeling_lowrank import lowrank_config, model_class_for
from makd_llm.testing import tiny_config, unstacked

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TIED = ("qwen2", "gemma", "gemma3_text", "gpt2")


def tiny_teacher(model_type: str) -> Any:
    torch.manual_seed(0)
    config = tiny_config(model_type, tied=model_type in TIED)
    teacher: Any = model_class_for(config)(config).eval()
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    # Sharp enough that the likeliest tokens are no near ties.
    nn.init.normal_(teacher.lm_head.weight, std=0.5)
    return teacher


def factored(teacher: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Ranks, and a student's tensors whose factors multiply out to the teacher's matrices."""
    dense = unstacked(teacher).state_dict()
    tensors = dict(dense)
    ranks: dict[str, Any] = {}
    for _, matrix, name in matrices_of(teacher.config):
        weight = dense[f"{name}.weight"]
        weight_MK = part_of(teacher.config, matrix, weight.T if matrix.transposed else weight, 0)
        u, s, vh = torch.linalg.svd(weight_MK.double(), full_matrices=False)
        prefix = f"{name}.parts.{matrix.part}" if matrix.parts > 1 else name
        tensors[f"{prefix}.up"] = (u * s.sqrt()).float()
        tensors[f"{prefix}.down"] = (s.sqrt()[:, None] * vh).float()
        if matrix.parts > 1 and f"{name}.bias" in dense:
            tensors[f"{prefix}.bias"] = part_of(teacher.config, matrix, dense[f"{name}.bias"], 0)
            tensors.pop(f"{name}.bias", None)
        tensors.pop(f"{name}.weight", None)
        ranks[name] = [*ranks.get(name, []), len(s)] if matrix.parts > 1 else len(s)
    return ranks, tensors


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load_with_info(folder: Path) -> Any:
    """The model, and what transformers says about missing and unexpected tensors."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def write_student(teacher: Any, folder: Path, **options: Any) -> None:
    ranks, tensors = factored(teacher)
    write_model(folder, lowrank_config(teacher.config, ranks), tensors.items(), **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per family: the teacher's logits, the factored student, and the merged one."""
    root = tmp_path_factory.mktemp("exported")
    for model_type in FAMILIES:
        teacher = tiny_teacher(model_type)
        (root / model_type).mkdir()
        torch.save(logits_of(teacher), root / model_type / "logits.pt")
        teacher.save_pretrained(root / model_type / "teacher")
        write_student(
            teacher,
            root / model_type / "student",
            generation_config=GenerationConfig(max_new_tokens=7, do_sample=False),
            tokenizer=word_tokenizer(),
            max_shard_bytes=30_000,
        )
        merge(root / model_type / "student", root / model_type / "merged")
    return root


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(47)} | {"[UNK]": 47}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="w0", pad_token="w0"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_factored_folder_loads_with_the_auto_classes(exported: Path, model_type: str) -> None:
    folder = exported / model_type / "student"
    student, info = load_with_info(folder)
    assert not any(info.values()), info
    assert student.config.model_type == f"makd_{model_type}"
    assert student.dtype == torch.float32
    expected = torch.load(exported / model_type / "logits.pt")
    torch.testing.assert_close(logits_of(student), expected, rtol=1e-4, atol=1e-4)
    head = f"{family_of(student.config).head}.weight"
    assert (head in TensorReader(folder).names()) == (model_type not in TIED)
    assert AutoTokenizer.from_pretrained(folder)("w3 w1 w4").input_ids == [3, 1, 4]


# Runs where makd_llm cannot be imported: isolated from PYTHONPATH and from the working directory,
# and barred by name in case it is installed. One process for all folders, since importing
# transformers takes longest; the merged ones come first, before any code of ours has run.
WITHOUT_MAKD = """
import pathlib, sys
sys.modules["makd_llm"] = sys.modules["makd_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
options = {"max_new_tokens": 5, "do_sample": False}

def check(folder, origin, **remote):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **remote)
    assert type(model).__module__.startswith(origin), type(model)
    assert not any(info.values()), (folder, info)
    expected = torch.load(folder.parent / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with_cache = model.generate(ids, **options, use_cache=True)
    assert torch.equal(with_cache, model.generate(ids, **options, use_cache=False)), folder
    if folder.parent.name == "llama":  # some other types insist on a tokenizer of their own
        assert AutoTokenizer.from_pretrained(folder, **remote)("w3 w1").input_ids == [3, 1]
    again = folder.with_name(folder.name + "-again")
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, **remote)
    assert [p.shape for p in reloaded.parameters()] == [p.shape for p in model.parameters()]

families = [pathlib.Path(sys.argv[1]) / family for family in sys.argv[2:]]
for family in families:
    check(family / "merged", "transformers.models.")
for family in families:
    check(family / "student", "transformers_modules.", trust_remote_code=True)
"""


def test_folders_load_where_makd_llm_is_not_installed(exported: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_MAKD, str(exported), *FAMILIES],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for said in ("newly initialized", "not used", "Traceback", "MISSING", "UNEXPECTED"):
        assert said not in done.stderr, done.stderr
    for model_type, family in FAMILIES.items():
        for kind in ("student", "merged"):
            first, again = (
                count_parameters(at, family, read_config(at))
                for at in (exported / model_type / kind, exported / model_type / f"{kind}-again")
            )
            assert first == again


LOADED_AFTER_IMPORT = """
import sys
import makd_llm
assert "transformers" not in sys.modules, "import makd_llm should stay cheap"
from transformers import Gemma3ForCausalLM, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "makd_llm.models.modeling_lowrank", type(model)
"""


def test_importing_makd_llm_is_enough_to_load_a_student(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_AFTER_IMPORT, str(exported / "llama" / "student")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_is_the_teachers_own_architecture(exported: Path, model_type: str) -> None:
    teacher = TensorReader(exported / model_type / "teacher")
    merged = TensorReader(exported / model_type / "merged")
    # transformers writes GPT-NeoX's head under its name on the Hub, and reads either.
    assert merged.names() == {n.replace("embed_out.", "lm_head.") for n in teacher.names()}
    for name in teacher.names():
        torch.testing.assert_close(
            merged.get(name.replace("embed_out.", "lm_head.")),
            teacher.get(name),
            rtol=1e-4,
            atol=1e-5,
        )
    config = read_config(exported / model_type / "merged")
    assert config.model_type == model_type
    assert config.architectures == [FAMILIES[model_type].causal_lm]
    assert not hasattr(config, "auto_map") and not hasattr(config, "lowrank")
    settings = GenerationConfig.from_pretrained(exported / model_type / "merged")
    assert settings.max_new_tokens == 7


def test_merged_in_another_dtype(exported: Path, tmp_path: Path) -> None:
    merge(exported / "llama" / "student", tmp_path / "merged", dtype=torch.bfloat16)
    reader = TensorReader(tmp_path / "merged")
    teacher = TensorReader(exported / "llama" / "teacher")
    for name in reader.names():
        expected = teacher.get(name).bfloat16()
        assert reader.get(name).dtype == torch.bfloat16
        torch.testing.assert_close(reader.get(name), expected, rtol=0.01, atol=1e-3)
    assert read_config(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_folder_is_rewritten_as_it_is(exported: Path, model_type: str, tmp_path: Path) -> None:
    for kind in ("teacher", "student"):
        rewrite(exported / model_type / kind, tmp_path / kind)
        source, target = (TensorReader(at / kind) for at in (exported / model_type, tmp_path))
        assert source.names() == target.names()
        assert all(torch.equal(source.get(name), target.get(name)) for name in source.names())
        model, info = load_with_info(tmp_path / kind)
        assert not any(info.values()), info
        expected = torch.load(exported / model_type / "logits.pt")
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_stacked_experts_are_rewritten_under_the_names_of_the_hub(tmp_path: Path) -> None:
    teacher = tiny_teacher("mixtral")
    with TensorWriter(tmp_path / "stacked") as writer:
        write_config(writer.staging, teacher.config)
        for name, tensor in teacher.state_dict().items():
            writer.add(name, tensor)
    counts = counts_of_folders({"stacked": tmp_path / "stacked"})
    rewrite(tmp_path / "stacked", tmp_path / "hub", dtype=torch.bfloat16)
    assert counts == counts_of_folders({"stacked": tmp_path / "hub"})
    names = TensorReader(tmp_path / "hub").names()
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    model, info = load_with_info(tmp_path / "hub")
    assert not any(info.values()), info
    assert torch.equal(
        model.model.layers[0].mlp.experts.gate_up_proj,
        teacher.model.layers[0].mlp.experts.gate_up_proj.bfloat16(),
    )


def test_a_product_of_half_precision_factors_is_rounded_once(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama").bfloat16()
    ranks, tensors = factored(teacher)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    write_model(tmp_path / "student", lowrank_config(teacher.config, ranks), tensors.items())
    assert read_config(tmp_path / "student").dtype == torch.bfloat16
    merge(tmp_path / "student", tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj"
    up_MR, down_RK = tensors[f"{name}.up"].float(), tensors[f"{name}.down"].float()
    assert torch.equal(
        TensorReader(tmp_path / "merged").get(f"{name}.weight"), (up_MR @ down_RK).bfloat16()
    )


def test_merge_refuses_what_it_cannot_do(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a factored student"):
        merge(exported / "llama" / "teacher", tmp_path / "merged")
    with pytest.raises(UserError, match="another one"):
        merge(exported / "llama" / "student", exported / "llama" / "student")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        merge(tmp_path / "nowhere", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_counted_from_the_files(exported: Path, model_type: str) -> None:
    for kind in ("teacher", "student", "merged"):
        folder = exported / model_type / kind
        config = read_config(folder)
        family = family_of(config)
        model, _ = load_with_info(folder)
        model = unstacked(model)
        layers = model.get_submodule(family.layers)
        matrices = [model.get_submodule(name) for _, _, name in matrices_of(config)]
        factorized = {
            id(parameter): parameter.numel()
            for module in matrices
            for name, parameter in module.named_parameters()
            if not name.endswith("bias")
        }
        assert count_parameters(TensorReader(folder), family, config) == ParameterCount(
            blocks=sum(parameter.numel() for parameter in layers.parameters()),
            total=sum(parameter.numel() for parameter in model.parameters()),
            factorized=sum(factorized.values()),
        )


def test_old_buffers_and_a_stored_tied_head_are_not_counted(tmp_path: Path) -> None:
    teacher = tiny_teacher("gpt2")
    with TensorWriter(tmp_path / "hub") as writer:
        write_config(writer.staging, teacher.config)
        for name, tensor in teacher.transformer.state_dict().items():
            writer.add(name, tensor)
        writer.add("h.0.attn.bias", torch.ones(1, 1, 16, 16))
        writer.add("lm_head.weight", teacher.lm_head.weight)
    count = count_parameters(tmp_path / "hub", family_of(teacher.config), teacher.config)
    assert count.total == sum(parameter.numel() for parameter in teacher.parameters())


def test_write_model_takes_exactly_the_models_tensors(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    ranks, tensors = factored(teacher)
    config = lowrank_config(teacher.config, ranks)
    name = "model.layers.0.mlp.up_proj.down"
    wrong = {
        "were not given": {key: tensor for key, tensor in tensors.items() if key != name},
        "has shape": tensors | {name: tensors[name][:-1]},
        "'more'": tensors | {"more": torch.ones(1)},
    }
    for said, given in wrong.items():
        with pytest.raises(ValueError, match=said):
            write_model(tmp_path / "student", config, given.items())
    assert list(tmp_path.iterdir()) == []
    assert expected_shapes(config).keys() == tensors.keys()
