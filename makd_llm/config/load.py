"""From a YAML file and overrides to a checked config, and back; errors in one line."""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from makd_llm.config.objectives import OBJECTIVES, by_name, with_kinds
from makd_llm.config.presets import merged, preset
from makd_llm.config.run import DEFAULT_PRESET, RunConfig
from makd_llm.config.section import Section
from makd_llm.errors import UserError
from makd_llm.redaction import names_a_secret, without_secrets


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """Reads a YAML file (or none: all defaults), applies `key.path=value` overrides, and checks the
    result.

    Raises UserError: missing or malformed file, unknown key, wrong type, value out of range.
    """
    values = read_values(path, overrides)
    return validated(RunConfig, values, str(path) if path else "defaults", overrides)


def read_values(
    path: Path | None, overrides: list[str], under: str | None = None
) -> dict[str, Any]:
    """A YAML file's values and the overrides over them, before they are checked. under: the section
    of the file that the overrides are of; None: they are of the file, which is a run's config.

    Raises UserError: missing or malformed file, or override.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(
                f"{override!r}: not of the form key.path=value; example: distil.train.steps=50"
            )
    where = str(path) if path else "defaults"
    try:
        with _no_secrets_of_the_environment():
            from_file = OmegaConf.load(path) if path else OmegaConf.create({})
            if not OmegaConf.is_dict(from_file):
                raise UserError(
                    f"{where}: expected keys and values at the top level, "
                    "found a list or a single value"
                )
            typed = OmegaConf.from_dotlist(overrides)
            if under is None:
                asked = OmegaConf.select(typed, "distil.preset")
                own = OmegaConf.select(from_file, "distil")
                if isinstance(asked, str) and OmegaConf.is_dict(own):
                    from_file.distil = _under(asked, OmegaConf.to_container(own))
            else:
                own = OmegaConf.select(from_file, under)
                if own is not None and not OmegaConf.is_dict(own):
                    raise UserError(f"{where}: {under}: expected keys and values, found {own!r}")
                typed = OmegaConf.create({under: typed})
            together = _merged(from_file, typed, where)
            plain = OmegaConf.to_container(together, resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; configs/ holds examples") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a config file; name a .yaml file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a YAML config file") from None
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        first_line = " ".join(str(error).split())
        raise UserError(f"{where}: not readable as a config: {first_line}") from None
    if not isinstance(plain, dict):
        raise UserError(
            f"{where}: expected keys and values at the top level, found a {type(plain).__name__}"
        )
    return {str(key): value for key, value in plain.items()}


def _merged(from_file: Any, typed: Any, where: str) -> Any:
    """The overrides over the file. Raises UserError where one has keys and the other a list."""
    try:
        return OmegaConf.merge(from_file, typed)
    except TypeError:  # which says no more than that
        sides = (OmegaConf.to_container(side, resolve=False) for side in (from_file, typed))
        raise UserError(
            f"command line: {_clash(*sides)}: keys and values here and a list in {where}, or the "
            "other way round; give the same of both"
        ) from None


def _clash(below: Any, above: Any) -> str:
    """The path of the first list on one side where the other has keys; empty: there is none."""
    for key in below.keys() & above.keys():
        own, other = below[key], above[key]
        if isinstance(own, dict) and isinstance(other, dict):
            if found := _clash(own, other):
                return f"{key}.{found}"
        elif {type(own), type(other)} == {dict, list}:
            return str(key)
    return ""


SomeSection = TypeVar("SomeSection", bound=Section)


def validated(
    section: type[SomeSection], values: dict[str, Any], where: str, overrides: Sequence[str] = ()
) -> SomeSection:
    """A config from plain values. where: what a message names them. Raises UserError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_line(error, where, overrides, section)) from None


@contextmanager
def _no_secrets_of_the_environment() -> Iterator[None]:
    """Inside, `${oc.env:NAME}` stands for no secret: what it stands for is written into the run
    folder. Raises UserError where one is asked for, however its name is written.
    """
    refused: list[str] = []

    def variable(name: Any, *default: object) -> object:
        if not names_a_secret(str(name)):
            value = oc.env(str(name), *default)
            if without_secrets(str(value)) == str(value):
                return value
        refused.append(str(name))
        raise ValueError("may be a secret")

    OmegaConf.register_resolver("oc.env", variable, replace=True, annotation_validation="off")
    try:
        yield
    except OmegaConfBaseException:
        if not refused:
            raise
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True, annotation_validation="off")
    if refused:
        raise UserError(
            f"${{oc.env:{refused[0]}}}: may be a secret, which the run folder would keep; leave it "
            "in the environment"
        )


def checked(section: type[SomeSection], values: dict[str, Any]) -> SomeSection:
    """A section from plain values, as a command's options give them. Raises UserError."""
    return validated(section, values, "command line")


def _under(asked: str, distil: Any) -> dict[str, Any]:
    """A file's block `distil` under a preset that the command line names: what the file's own
    preset brought along goes, and its objectives are those of the new one.
    """
    above, before = preset(asked), distil.get("preset", DEFAULT_PRESET)
    own = preset(before) if isinstance(before, str) else {}
    kept = {key: value for key, value in distil.items() if key not in own or key in above}
    objectives = with_kinds(by_name(distil.get("objectives") or {}))
    if isinstance(objectives, Mapping):  # else the check of the whole says what is wrong
        off = {name: {**value, "weight": 0.0} for name, value in objectives.items()}
        kept["objectives"] = off
    return merged(kept, above)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, as a run folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_line(
    error: ValidationError, where: str, overrides: Sequence[str], section: type[Section]
) -> str:
    """One line for the first problem: path, what is wrong, what to do."""
    problem = error.errors()[0]
    location = _location(problem["loc"])
    path = ".".join(str(part) for part in location)
    if any(override.partition("=")[0].startswith(path) for override in overrides):
        where = "command line"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], section)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(known)
        return f"{where}: unknown key {path}; {advice}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    single = not isinstance(problem["input"], dict | list | tuple)
    found = f", found {problem['input']!r}" if single else ""
    place = f"{path}: " if path else ""  # a section by itself, as a command's options give it
    return f"{where}: {place}{message[0].lower() + message[1:]}{found}{more}"


def _location(parts: Sequence[int | str]) -> list[int | str]:
    """Where a problem is, as a person wrote it: pydantic also names the branches of unions, and the
    kind of an objective after its name.
    """
    found = [part for part in parts if not (isinstance(part, str) and set("[(") & set(part))]
    if found[:2] == ["distil", "objectives"]:
        del found[3:4]
    return found


def _known_keys(path: Sequence[int | str], section: type[BaseModel]) -> list[str]:
    if tuple(path[:2]) == ("distil", "objectives") and len(path) == 4:
        return list(OBJECTIVES[str(path[3])].model_fields)
    for name in path:
        field = section.model_fields.get(str(name))
        found = _section_type(field.annotation) if field else None
        if found is None:
            return []
        section = found
    return list(section.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((s for a in get_args(annotation) if (s := _section_type(a))), None)
    return None
