"""`python -m makd_llm.models.gguf IN.gguf OUT`: a GGUF file as a Hugging Face folder of
safetensors.

transformers dequantizes the file but refuses to save such a model, so its tensors are copied into a
fresh one. Two traps of the GGUF reader are undone: the quantization entry stays in the config, and
the tokenizer's end-of-text token may be another one than the model's.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Writes the folder in one move, so that it is either whole or absent. In bf16,
    unless the file says fp16.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="auto", trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    config = loaded.config
    del config.quantization_config
    if isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    with torch.device("meta"):
        fresh = type(loaded)(config)
    state = {name: tensor.to(dtype) for name, tensor in loaded.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as scratch:
        whole = Path(scratch) / "model"
        fresh.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
