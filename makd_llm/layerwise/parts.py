"""What a stage has finished, on disk: of a factorization, every matrix as soon as it is done.

An interrupted one goes on from its parts if it is started again with the same teacher,
recipe and calibration text; anything else clears them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from makd_llm import distributed
from makd_llm.checkpoint.folder import unwritable
from makd_llm.files import write_whole


class Parts:
    """A folder of small safetensors files, shared by all ranks."""

    def __init__(
        self, folder: Path, key: str, tell: Callable[[str], None], stage: str = "factorize"
    ) -> None:
        """key: all that the parts depend on, as text. Collective."""
        self.folder = folder
        kept = distributed.on_main(self._keep_or_clear, key)
        if kept:
            tell(f"{stage}: goes on from {kept} parts of an interrupted one")

    def _keep_or_clear(self, key: str) -> int:
        path = self.folder / "key.json"
        if path.is_file() and path.read_text(encoding="utf-8") == key:
            return len(list(self.folder.glob("*.safetensors")))
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            write_whole(path, key)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return 0

    def missing(self, names: list[str]) -> list[str]:
        """Those that are not finished; the same on every rank. Collective."""
        return distributed.on_main(lambda: [n for n in names if not self._path(n).is_file()])

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors under a name: whole, or not at all. Raises UserError on a full disk."""
        scratch = self._path(name).with_suffix(".writing")
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, scratch)
            scratch.replace(self._path(name))
        except (SafetensorError, OSError) as error:
            scratch.unlink(missing_ok=True)
            raise unwritable(self.folder, error) from error

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished part, on the CPU."""
        return load_file(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
