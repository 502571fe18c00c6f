"""What contradicts itself is found before anything is computed, not in the middle of a stage."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from makd_kernels.dispatch import why_not_triton
from makd_llm import distributed
from makd_llm.checkpoint.folder import read_config
from makd_llm.config import DistilConfig, RunConfig
from makd_llm.config.objectives import (
    AttentionConfig,
    AttributionConfig,
    AuxiliaryConfig,
    CrossEntropyConfig,
    HiddenConfig,
    LocalConfig,
    LogitsConfig,
    MatrixConfig,
    ObjectiveConfig,
)
from makd_llm.errors import UserError
from makd_llm.models.capture import CAPTURING_SDPA, attention_of
from makd_llm.models.families import check_distillable, family_of
from makd_llm.models.modeling_lowrank import is_lowrank
from makd_llm.models.pairing import check_layer_map
from makd_llm.models.source import load_tokenizer


def check_settings(config: RunConfig, deepspeed: dict[str, Any], ds_path: Path) -> None:
    """Settings against each other and against DeepSpeed's JSON. Raises UserError."""
    distil, data, asked = config.distil, config.data, config.evaluation
    replayed = [name for name, o in distil.of(MatrixConfig).items() if o.input == "teacher"]
    replayed += list(distil.of(LocalConfig))
    if replayed and distil.train.gradient_checkpointing:
        raise UserError(
            f"distil.objectives.{replayed[0]} runs parts of the student a second time, which "
            "distil.train.gradient_checkpointing cannot repeat; switch one of them off"
        )
    if distil.offline is not None:
        _check_offline(distil)
    _check_second_order(distil, deepspeed, ds_path)
    no_triton = why_not_triton(distributed.device().type)
    if distil.kernels == "triton" and no_triton is not None:
        raise UserError(f"distil.kernels=triton cannot run here: {no_triton}; set it to auto")
    if data.validation_source is None and Path(data.source).expanduser().is_file():
        raise UserError(
            f"data.source is one file ({data.source}), which would be trained on and evaluated; "
            "name another in data.validation_source, or a folder with a file for each split"
        )
    if asked.max_new_tokens >= data.max_length // 2:
        raise UserError(
            f"evaluation.max_new_tokens is {asked.max_new_tokens}, half the window "
            f"(data.max_length {data.max_length}) or more; lower it"
        )
    if distil.sequences.source == "teacher":
        new = distil.sequences.generation.max_new_tokens
        if new >= data.max_length // 2:
            raise UserError(
                f"distil.sequences.generation.max_new_tokens is {new}, half the window "
                f"(data.max_length {data.max_length}) or more; lower it"
            )
    if asked.text_stride >= asked.text_window:
        raise UserError(
            f"evaluation.text_stride is {asked.text_stride}, not below "
            f"evaluation.text_window ({asked.text_window}); lower it"
        )
    if asked.text is not None:
        try:
            asked.text.open("rb").close()
        except OSError as error:
            raise UserError(
                f"evaluation.text {asked.text}: cannot be opened ({error.strerror}); "
                "name a text file, or leave it out"
            ) from None
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and not deepspeed.get("bf16", {}).get("enabled"):
        raise UserError(
            f"{ds_path}: stage 0 in fp32 does not notice gradients that are not finite; "
            "set zero_optimization.stage to 1, 2 or 3, or enable bf16"
        )


def _check_second_order(distil: DistilConfig, deepspeed: dict[str, Any], ds_path: Path) -> None:
    """A backward through the backward needs all weights, and every layer's graph."""
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    why = f"{ds_path} has ZeRO-3" if stage == 3 else None
    if distil.train.gradient_checkpointing:
        why = "distil.train.gradient_checkpointing is on"
    for name, asked in distil.of(AttributionConfig).items():
        if why and asked.method == "gradients" and asked.second_order == "exact":
            raise UserError(
                f"distil.objectives.{name}.second_order is exact, which cannot be where {why}; "
                "set it to auto, or to differences"
            )


def _check_offline(distil: DistilConfig) -> None:
    """Only what a teacher cache holds can be learnt from it."""
    if distil.sequences.student is not None:
        raise UserError(
            "distil.sequences.student: what the student will write is in no cache; set it to null, "
            "or distil.offline=null"
        )
    # The auxiliary tensors are compared with those of the teacher's files; it need not speak.
    kept = (CrossEntropyConfig, LogitsConfig, HiddenConfig, AuxiliaryConfig)
    for name, asked in distil.of(ObjectiveConfig).items():
        if not isinstance(asked, kept):
            raise UserError(
                f"distil.objectives.{name} ({asked.objective}) compares what distil.offline does "
                f"not keep; set distil.objectives.{name}.weight=0, or distil.offline=null"
            )


def check_teacher(folder: Path, config: RunConfig) -> None:
    """A model that cannot teach, a window or token ids beyond its tables. Raises UserError."""
    model = read_config(folder)
    family_of(model)
    check_distillable(model)
    for name in config.distil.of(AttentionConfig):
        if attention_of(model) != CAPTURING_SDPA:
            raise UserError(
                f"distil.objectives.{name}: the attention of model_type {model.model_type!r} "
                f"cannot be listened to; set distil.objectives.{name}.weight=0"
            )
    check_layer_map(config.distil.layer_map, model.num_hidden_layers)
    depth, named = config.student.depth, config.distil.layer_map
    layers = depth.layers if depth else model.num_hidden_layers
    if not isinstance(named, str) and len(named) != layers:
        raise UserError(
            f"distil.layer_map: {len(named)} layers are named, but the student will have {layers}; "
            "name a teacher layer for each of them"
        )
    offline = config.distil.offline
    if offline is not None and offline.top_k > model.vocab_size:
        raise UserError(
            f"distil.offline.top_k is {offline.top_k}, but {folder} has {model.vocab_size} tokens; "
            "lower it"
        )
    if is_lowrank(model):
        raise UserError(
            f"{folder} is a low-rank student; make it dense first "
            f"(makd export {folder} OUT --merge) and name OUT as teacher.model"
        )
    windows = {"data.max_length": config.data.max_length}
    if config.evaluation.text is not None:
        windows["evaluation.text_window"] = config.evaluation.text_window
    if config.distil.sequences.student is not None:
        # A prompt may fill the window, and texts are written batch by batch to their full length.
        new = config.distil.sequences.student.max_new_tokens
        longest = "data.max_length + distil.sequences.student.max_new_tokens"
        windows[longest] = config.data.max_length + new
    check_windows(folder, windows)
    # Tokens added for pictures and the like may lie beyond the embedding (Gemma 3's do); these not.
    tokenizer = load_tokenizer(folder)
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokens = max(tokenizer.vocab_size, *(1 + i for i in used if i is not None), 0)
    if tokens > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer needs {tokens} tokens, its embedding has {model.vocab_size} "
            "rows; resize the embedding, or give the tokenizer that belongs to the model"
        )


def check_windows(folder: Path, windows: dict[str, int]) -> None:
    """Windows, by the names of their settings, beyond the model's positions. Raises UserError."""
    check_positions(read_config(folder), str(folder), windows)


def check_positions(config: PreTrainedConfig, name: str, windows: dict[str, int]) -> None:
    """The same of a model whose config is at hand. Raises UserError."""
    positions = getattr(config, "max_position_embeddings", None)
    for key, window in windows.items():
        if positions is not None and window > positions:
            raise UserError(
                f"{key} is {window}, but {name} has only {positions} positions "
                "(max_position_embeddings); lower it"
            )


def check_same_tokenizer(teacher: Path, student: Path) -> None:
    """Token distributions can only be compared over one vocabulary. Raises UserError."""
    ours, theirs = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours != theirs:
        token = next(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))
        raise UserError(
            f"tokenizers differ: {token!r} is {theirs.get(token)} in {teacher} and "
            f"{ours.get(token)} in {student}; delete {student} to cut the student anew"
        )
