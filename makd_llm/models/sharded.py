"""A model folder loaded so that no rank ever holds the model whole.

Under ZeRO-3 every parameter is partitioned as soon as its module is made, and then filled module by
module: rank 0 reads the module's tensors, the others receive them, each keeps its share. The
largest thing a rank holds beside its shards is one module. Teacher, factorized student and trained
student are all such folders and all come this way.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from makd_kernels import lowrank_linear
from makd_llm import distributed
from makd_llm.checkpoint.folder import TensorReader, read_config, read_generation_config
from makd_llm.errors import UserError
from makd_llm.memory import return_freed_memory
from makd_llm.models.capture import attention_of
from makd_llm.models.causal import CausalModel
from makd_llm.models.families import family_of
from makd_llm.models.lean import make_lean
from makd_llm.models.modeling_lowrank import LowRankLinear, model_class_for


def load_sharded(
    folder: Path, deepspeed_config: dict[str, Any], dtype: torch.dtype, kernels: str = "auto"
) -> CausalModel:
    """Builds the model of a folder and fills it.

    deepspeed_config: the JSON of the engine that will own the model; stage 3 in it partitions the
    parameters. kernels: what computes low-rank products, as in the config. Collective: every rank
    calls it. Raises UserError for an unknown architecture or missing tensors.
    """
    config = _without_dropout(read_config(folder))
    family = family_of(config)
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if stage == 3:
            import deepspeed
            from deepspeed.utils import groups

            stack.enter_context(
                deepspeed.zero.Init(
                    config_dict_or_path=deepspeed_config,
                    dtype=dtype,
                    # ZeRO++'s group (hpZ) is there once, also where a second model is loaded.
                    zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
                )
            )
        model = model_class_for(config)._from_config(
            config, dtype=dtype, attn_implementation=attention_of(config)
        )
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.product = _lowrank_product(kernels)
    make_lean(model)
    generation = read_generation_config(folder)
    if generation is not None:
        model.generation_config = generation
    if stage != 3:
        model.to(distributed.device())
    _fill(model, folder, gathered=stage == 3)
    return CausalModel(model, family)


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """GPT-2's and OPT's carry 0.1: noise in what is compared, and another gradient on every rank.
    Some attentions read the rate when they run, so it is taken out of the config itself.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def _lowrank_product(kernels: str) -> Callable[..., torch.Tensor]:
    # "triton" asks for it where it is the way for the shape, which is what "auto" does on a GPU
    impl = "auto" if kernels == "triton" else kernels
    return partial(lowrank_linear, impl=impl)


def _fill(model: PreTrainedModel, folder: Path, *, gathered: bool) -> None:
    """Copies the folder's tensors into the model's parameters, one module at a time."""
    reader = TensorReader(folder)
    wanted = {name for name, _ in model.named_parameters()}
    missing = sorted(name for name in wanted if name not in reader)
    if missing:
        raise UserError(
            f"{folder}: tensor {missing[0]} is missing (and {len(missing) - 1} more); "
            "the files are not of this model's config.json"
        )
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{n}": p for n, p in module.named_parameters(recurse=False)}
        own = {name: p for name, p in own.items() if name in wanted}
        if own:
            _fill_module(reader, own, gathered=gathered)
            reader.release()
            return_freed_memory()


def _fill_module(reader: TensorReader, own: dict[str, nn.Parameter], *, gathered: bool) -> None:
    if not gathered:
        for name, parameter in own.items():
            parameter.data.copy_(reader.get(name))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(own.values()), modifier_rank=0):
        if distributed.is_main():
            for name, parameter in own.items():
                parameter.data.copy_(reader.get(name))
