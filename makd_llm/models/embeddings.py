"""A forward pass on other embeddings than the tokens' own: scaled, blanked or shifted ones."""
# B batch, T tokens, D width

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Embedded:
    """The embeddings of one forward pass, as the model makes them and as it was given them."""

    own_BTD: Tensor | None = None
    given_BTD: Tensor | None = None


@contextmanager
def embeddings_changed(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[Embedded]:
    """Inside the `with`, the layers of `model` (a Hugging Face causal LM) see what `change` makes
    of its token embeddings (B, T, D), before positions are added to them. One forward pass.
    """
    embedded = Embedded()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.own_BTD = output
        embedded.given_BTD = change(output)
        return embedded.given_BTD

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield embedded
    finally:
        handle.remove()
