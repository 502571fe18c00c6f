"""What is stated of a model that a student is made from: its name on the Hub, and its license.

Only what the model itself says counts: the card of a Hub model or of a folder, the metadata of a
.gguf file, the table of built-in ones. Where that says nothing, the license is unknown. Nothing is
fetched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from makd_llm.data.builtin import DATASETS, MODELS
from makd_llm.models.source import BUILTIN

UNKNOWN = "unknown"
"""As the Hub writes it."""


@dataclass(frozen=True)
class Provenance:
    """What a card says of where a student comes from.

    Attributes:
        name: for people; of a file or a folder the last part of its path, since a card travels.
        hub_id: where the model lies on the Hub, if it is known to lie there.
        license: `license`, and where the model's own terms have a name and a place, `license_name`
            and `license_link`.
    """

    name: str
    hub_id: str | None
    license: dict[str, str]


def provenance_of(model: str) -> Provenance:
    """model: as `teacher.model`: builtin:NAME, a folder, a .gguf file or a Hub id."""
    if model.startswith(BUILTIN):
        known = MODELS.get(model.removeprefix(BUILTIN))
        license = known.license.lower() if known else UNKNOWN
        return Provenance(public_name(model), known.hub_id if known else None, _named(license))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return Provenance(path.name, None, _named(_license_of_gguf(path)))
    if path.is_dir():
        return Provenance(public_name(model), None, _license_of_card(path / "README.md"))
    if not is_hub_id(model):  # a folder that is gone
        return Provenance(public_name(model), None, _named(UNKNOWN))
    kept = try_to_load_from_cache(model, "README.md")
    stated = _license_of_card(Path(kept)) if isinstance(kept, str) else _named(UNKNOWN)
    return Provenance(public_name(model), model, stated)


def license_of_data(source: str) -> str:
    """Of what a run learns from: known of the built-in sets alone."""
    known = DATASETS.get(source.removeprefix(BUILTIN)) if source.startswith(BUILTIN) else None
    return known.license if known else UNKNOWN


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub's (owner/name), and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def public_name(name: str) -> str:
    """The name of a model or of data as a card shows it: of a path the last part."""
    return name if name.startswith(BUILTIN) or is_hub_id(name) else Path(name).name


def _named(license: str) -> dict[str, str]:
    return {"license": license}


def _license_of_card(path: Path) -> dict[str, str]:
    """Of a model card's metadata; unknown where there is none or it cannot be read."""
    try:
        data: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return _named(UNKNOWN)
    fields = ("license", "license_name", "license_link")
    stated = {field: data[field] for field in fields if isinstance(data.get(field), str)}
    return stated if "license" in stated else _named(UNKNOWN)


def _license_of_gguf(path: Path) -> str:
    """`general.license` of a .gguf file."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).fields.get("general.license")
    except (OSError, ValueError):
        return UNKNOWN
    return str(field.contents()) if field is not None else UNKNOWN
