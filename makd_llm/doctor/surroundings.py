"""Caches, the Hub, and other programs."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from makd_llm.doctor.finding import Finding
from makd_llm.doctor.machine import ELSEWHERE, refused

PATIENCE = 3.0
"""Seconds that the Hub has to answer in."""

PROGRAMS = {
    "sbatch": ("`makd slurm submit`", "run it where SLURM's clients are installed"),
    "srun": ("runs as batch jobs of SLURM", "run it where SLURM's clients are installed"),
    "numactl": ("deepspeed's --bind_cores_to_rank", "install it (Debian, Ubuntu: numactl)"),
    "pdsh": ("deepspeed's --hostfile", "install it (Debian, Ubuntu: pdsh), or use torchrun"),
    "nvidia-smi": ("looking at GPUs", "it comes with NVIDIA's driver"),
}
"""Name -> what is done with it, and what to do without it."""


def cache_folder() -> Finding:
    """Whether fetched and converted models can be kept."""
    from makd_llm.data.builtin import cache_dir

    folder = cache_dir()
    named = "MAKD_CACHE" if os.environ.get("MAKD_CACHE") else "the user's cache folder"
    if refusal := refused(folder):
        found = f"{folder} ({named}): {refusal}"
        return Finding("cache folder", "missing", found, ELSEWHERE, needed=True)
    return Finding("cache folder", "ok", f"{folder} ({named})")


def builtin_files() -> Finding:
    """What of the demo is there already. Looks at names and sizes, and fetches nothing."""
    from makd_llm.data.builtin import DATASETS, MODELS, cached

    held = {f"builtin:{name}": cached(name) for name in (*MODELS, *DATASETS)}
    here = [name for name, found in held.items() if found]
    absent = [name for name, found in held.items() if not found]
    found = f"in the cache: {', '.join(here) or 'nothing'}"
    if absent:
        advice = "fetched with pip when first asked for; without a network: docs/guide.md"
        return Finding("demo", "check", f"{found}; not yet: {', '.join(absent)}", advice)
    return Finding("demo", "ok", found)


def hub(patience: float = PATIENCE) -> Finding:
    """Whether models and data can come from the Hub, and what of it is cached. patience: in s."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    kept = _kept(Path(constants.HF_HUB_CACHE))
    if constants.is_offline_mode():
        return Finding("Hub", "ok", f"HF_HUB_OFFLINE is set: only what is cached is used; {kept}")
    endpoint = constants.ENDPOINT
    advice = (
        "set HF_ENDPOINT to a mirror that you reach, or HF_HUB_OFFLINE=1 and name local folders; "
        "builtin: models need no Hub"
    )
    try:
        answered = get_session().head(endpoint, timeout=patience)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        return Finding("Hub", "check", f"{endpoint} cannot be reached ({said}); {kept}", advice)
    if answered.status_code >= 500:
        found = f"{endpoint} answers {answered.status_code}; {kept}"
        return Finding("Hub", "check", found, advice)
    return Finding("Hub", "ok", f"{endpoint} answers; {kept}")


def _kept(cache: Path) -> str:
    """How many models and data sets lie in the Hub's cache."""
    models, data = (len(list(cache.glob(f"{kind}--*"))) for kind in ("models", "datasets"))
    return f"{models} models and {data} data sets in its cache"


def programs(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """What some commands call; runs need none of them."""
    for name, (use, advice) in PROGRAMS.items():
        path = which(name)
        if path:
            yield Finding(name, "ok", path)
        else:
            yield Finding(name, "missing", f"not found; only for {use}", advice)
