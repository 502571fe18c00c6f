"""What was measured of a model, kept in a file of the run: the same model is not measured twice.

A row of the table, the texts that the model wrote, and every record's scores, which paired tests
need. It holds for one model under one way of measuring, which the key names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makd_llm.files import write_json


@dataclass(frozen=True)
class Measured:
    """One model's results.

    Attributes:
        row: as evaluation.json has it.
        texts: what it wrote, a text for each record.
        scores: metric -> its value for each record, in the same order; `nats` those of every
            reference.
    """

    row: dict[str, Any]
    texts: Sequence[str]
    scores: Mapping[str, Sequence[float]]


def read_measured(path: Path, key: Mapping[str, Any] | None = None) -> Measured | None:
    """What stands in the file; None where there is none, it is damaged, or of another key. key:
    None takes any.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if key is not None and found["key"] != json.loads(json.dumps(key, default=str)):
            return None
        return Measured(found["row"], found["texts"], found["scores"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


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
