"""What model files call the tensors of experts.

Here every matrix of an expert is a tensor of its own: `model.layers.1.mlp.experts.3.up_proj.weight`
(`modeling_lowrank.Experts`). Qwen's files on the Hub say the same. Mixtral's call the block
`block_sparse_moe` and the matrices w1 (gate), w3 (up) and w2 (down); `save_pretrained` writes these
names, and `from_pretrained` asks for them. Files written from transformers' modules as they are
hold all experts of a layer in `mlp.experts.gate_up_proj` (E, 2 I, D) and `mlp.experts.down_proj`
(E, D, I).
"""

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(.+\.)mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"(.+\.)mlp\.gate\.weight")
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


class Stacked(NamedTuple):
    """A matrix within a stacked tensor: the tensor's name, the expert's place in it, and which half
    of that expert's rows (0 gate, 1 up; None: all of them).
    """

    name: str
    expert: int
    half: int | None

    def rows(self, stored: tuple[int, ...]) -> slice:
        """The matrix's rows, in a tensor stored with this shape (E, rows, columns)."""
        if self.half is None:
            return slice(0, stored[1])
        inner = stored[1] // 2
        return slice(self.half * inner, (self.half + 1) * inner)


def mixtral_name(name: str) -> str:
    """The name that Mixtral's files on the Hub have for a tensor; most have the model's own."""
    if found := _EXPERT.fullmatch(name):
        before, expert, role = found.groups()
        return f"{before}block_sparse_moe.experts.{expert}.{_MIXTRAL[role]}.weight"
    if found := _ROUTER.fullmatch(name):
        return f"{found[1]}block_sparse_moe.gate.weight"
    return name


def stacked_place(name: str) -> Stacked | None:
    """Where a matrix of an expert lies in files with stacked experts; None: it is none."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return None
    before, expert, role = found.groups()
    if role == "down":
        return Stacked(f"{before}mlp.experts.down_proj", int(expert), None)
    half = ("gate", "up").index(role)
    return Stacked(f"{before}mlp.experts.gate_up_proj", int(expert), half)
