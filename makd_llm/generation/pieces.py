"""A split's summaries on disk: piece by piece while they are written, one file in the end.

    OUT/manifest.json          what they are made from, from the first moment on; counts at the end
    OUT/pieces/000017.jsonl    a finished piece: written under another name, synced, renamed
    OUT/train.jsonl            all of them in order, when the last piece is there

Whoever is killed leaves whole pieces and a manifest, and the next start writes the missing ones.
Other settings, another model or other data than the manifest's are refused.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from makd_llm.checkpoint.folder import unwritable
from makd_llm.errors import UserError
from makd_llm.files import replacing
from makd_llm.stages import Key, difference

MANIFEST = "manifest.json"
PIECES = "pieces"

Line = dict[str, Any]
"""{"id": of the document, "ended": bool, "empty": bool, "row": the line of the joined file}."""


class Pieces:
    """The pieces of one folder. Only `save` is for every rank; the rest is rank 0's.

    made_from: what the texts depend on, in JSON values. expected: how many lines a piece has.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        made_from: Key,
        *,
        count: int,
        expected: Callable[[int], int],
    ) -> None:
        self.folder, self.file = folder, folder / f"{split}.jsonl"
        self._made_from, self._count, self._expected = made_from, count, expected

    def begin(self, replacing: Callable[[str], None] | None = None) -> list[int] | None:
        """The pieces that are missing; None where the joined file stands. Raises UserError where
        the folder holds other summaries, unless `replacing` is to be told so and they go.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        manifest = self.manifest()
        if manifest is not None:
            change = difference(manifest["made_from"], self._made_from)
            done = manifest["done"] and manifest["summaries"] > 0
            if change is None and done and self.file.is_file():
                self._remove_pieces()
                return None
            if change is not None and replacing is None:
                raise UserError(
                    f"{self.folder} holds summaries that were made otherwise: {change}; "
                    "name another folder, or delete this one"
                )
            if change is not None and replacing is not None:
                replacing(f"{self.folder}: written anew, as {change}")
                self._remove_pieces()
        elif self.file.exists():
            raise UserError(
                f"{self.file} is there already, and no {MANIFEST} says where it comes from; "
                "name another folder"
            )
        self._write_manifest({"done": False})
        try:
            self._path(0).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return [number for number in range(self._count) if not self._is_whole(number)]

    def save(self, number: int, lines: list[Line]) -> None:
        """Keeps a finished piece. Raises UserError where it cannot be written."""
        assert len(lines) == self._expected(number)
        self._write(self._path(number), lines)

    def join(self, facts: dict[str, Any]) -> int:
        """Joins the pieces in order; the manifest then has `facts`, counts, and the ids of the
        documents whose text was cut short or is empty. An empty text teaches nothing, and data
        with one would be refused: it stays out. Where all are empty nothing is done, and the
        pieces go, so that the next start writes them again. Returns how many texts there are.
        """
        if all(line["empty"] for line in self._all_lines()):
            self._remove_pieces()
            return 0
        cut, empty = [], []
        written = 0

        def rows() -> Iterator[Line]:
            nonlocal written
            for line in self._all_lines():
                if line["empty"]:
                    empty.append(line["id"])
                    continue
                if not line["ended"]:
                    cut.append(line["id"])
                written += 1
                yield line["row"]

        self._write(self.file, rows())
        counts = {"summaries": written, "cut": cut, "empty": empty}
        self._write_manifest({"done": True, **facts, **counts})
        self._remove_pieces()
        return written

    def manifest(self) -> dict[str, Any] | None:
        """What is known of the folder; None: nothing. Raises UserError where it is damaged, or of
        something else.
        """
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); name another folder"
            ) from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: damaged; delete the folder, or name another") from None
        match found:
            case {"made_from": {}, "done": False}:
                return dict(found)
            case {"made_from": {}, "done": True, "summaries": int(), "cut": [*_], "empty": [*_]}:
                return dict(found)
        raise UserError(f"{path}: no manifest of summaries; name another folder")

    def _write_manifest(self, facts: dict[str, Any]) -> None:
        found = json.dumps({"made_from": self._made_from, **facts}, indent=1, ensure_ascii=False)
        self._write_text(self.folder / MANIFEST, [found])

    def _write(self, path: Path, lines: Iterable[Line]) -> None:
        self._write_text(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _write_text(self, path: Path, parts: Iterable[str]) -> None:
        try:
            with replacing(path, durable=True) as scratch, scratch.open("w", encoding="utf-8") as f:
                f.writelines(parts)
        except OSError as error:
            raise unwritable(path, error) from error

    def _path(self, number: int) -> Path:
        return self.folder / PIECES / f"{number:06d}.jsonl"

    def _all_lines(self) -> Iterator[Line]:
        return (line for number in range(self._count) for line in self._lines(number))

    def _lines(self, number: int) -> Iterator[Line]:
        with self._path(number).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def _is_whole(self, number: int) -> bool:
        try:
            return sum(1 for _ in self._lines(number)) == self._expected(number)
        except (FileNotFoundError, ValueError):
            return False

    def _remove_pieces(self) -> None:
        shutil.rmtree(self.folder / PIECES, ignore_errors=True)
