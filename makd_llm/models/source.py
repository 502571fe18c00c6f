"""Where a model comes from: `builtin:NAME`, a Hub id, a local folder, or a .gguf file; always ends
as a local folder.

Everything after this reads safetensors tensor by tensor, so no process has to hold a model whole. A
.gguf file is converted once, in a process of its own, and the result is kept in the cache folder.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from makd_llm.data.builtin import cache_dir, fetch_builtin_model
from makd_llm.errors import UserError
from makd_llm.files import TEXTS

BUILTIN = "builtin:"


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The local folder of a model (config.json, *.safetensors, tokenizer). Safe to call on every
    rank at once. weights: False where the tokenizer is all that is needed.

    Raises UserError where there is no such model, its files are incomplete, or a Hub cannot be
    reached.
    """
    if model.startswith(BUILTIN):
        return _converted(fetch_builtin_model(model.removeprefix(BUILTIN)))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(
                f"{model}: no such file; teacher.model takes a .gguf file, a folder or a Hub id"
            )
        return _converted(path)
    if path.is_dir():
        return _checked_folder(path) if weights else path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(
            f"{model}: no such folder; teacher.model takes a .gguf file, a folder or a Hub id"
        )
    if not weights:
        return _from_hub(model, TEXTS)
    return _checked_folder(_from_hub(model, ("*.safetensors", "README.md", *TEXTS)))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError where it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: no tokenizer could be loaded ({reason}); add its tokenizer files"
        ) from None


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: no *.safetensors; save the model again with transformers' save_pretrained"
        )
    return folder


def _from_hub(model: str, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except HFValidationError:
        raise UserError(f"{model}: neither a local folder nor a Hub id (owner/name)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{model}: not in the local cache, and the Hub did not give it ({reason}); download it "
            "elsewhere and name the folder, set HF_ENDPOINT to a mirror you can reach, or use "
            "builtin:smollm2-135m-instruct"
        ) from None


def _converted(gguf: Path) -> Path:
    """The safetensors folder made from a .gguf file, or found in the cache."""
    stat = gguf.stat()
    identity = f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    name = f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder = cache_dir() / "converted" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            # A process of its own: a rank never holds the model whole, not even while converting.
            command = [sys.executable, "-m", "makd_llm.models.gguf", str(gguf), str(folder)]
            environment = {
                k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            }
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise UserError(f"{gguf}: could not be converted from GGUF: {lines[-1]}")
    return folder
