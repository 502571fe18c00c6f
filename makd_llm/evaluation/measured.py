"""What was measured of a model, kept in a file of the run: the same model is not measured twice.

A row of the table, the texts that the model wrote, and every record's scores, which paired tests
need. It holds for one model under one way of measuring, which the key names.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from makd_llm.evaluation import rouge
from makd_llm.files import write_json

_TEXTS = TypeAdapter(list[str])
_SCORES = TypeAdapter(dict[str, list[float]])
_NUMBER = TypeAdapter(float)


@dataclass(frozen=True)
class Measured:
    """One model's results.

    Attributes:
        row: as evaluation.json has it.
        texts: what it wrote, a text for each record.
        scores: metric -> its value for each record, in the same order; `nats` those of every
            reference.
        key: of the model, and of how it was measured.
    """

    row: dict[str, Any]
    texts: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    key: Mapping[str, Any] = field(default_factory=dict, compare=False)


def read_measured(path: Path, key: Mapping[str, Any] | None = None) -> Measured | None:
    """What stands in the file; None where there is none, it is damaged, or of another key. key:
    None takes any.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if key is not None and found["key"] != json.loads(json.dumps(key, default=str)):
            return None
        _check(found)
        return Measured(found["row"], found["texts"], found["scores"], found["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(found: dict[str, Any]) -> None:
    """Whether the parts are what they should be, and of each other. Raises ValueError, KeyError or
    TypeError.
    """
    row, texts = found["row"], _TEXTS.validate_python(found["texts"])
    scores = _SCORES.validate_python(found["scores"], strict=True)
    for section, number in (("parameters", "total"), ("perplexity", "value")):
        if section in row:
            _NUMBER.validate_python(row[section][number], strict=True)
    if not texts or any(len(scores[metric]) != len(texts) for metric in rouge.METRICS):
        raise ValueError("not one text and one score of each kind for each record")
    if "nats" in scores:
        whole, summed = row["perplexity"]["nats"], sum(scores["nats"])
        if row["perplexity"]["tokens"] < 1 or (
            math.isfinite(whole) and not math.isclose(whole, summed, rel_tol=1e-6)
        ):
            raise ValueError("the nats of the references are not those of the perplexity")


def write_measured(path: Path, key: Mapping[str, Any], measured: Measured) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    plain_key = json.loads(json.dumps(key, default=str))
    write_json(
        path,
        {
            "key": plain_key,
            "row": measured.row,
            "texts": list(measured.texts),
            "scores": {metric: list(values) for metric, values in measured.scores.items()},
        },
    )
