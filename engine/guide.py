"""What is prepared for a request's draws before it may run: its grammar, its processors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# (prompt ids, output ids, logits [vocab] float32) -> logits [vocab]
Processor = Callable[[list[int], list[int], "torch.Tensor"], "torch.Tensor"]


class Matcher(Protocol):
    """A grammar's state for one choice."""

    def fill(self, bitmask: "NDArray[np.int32]") -> None:
        """Set the bits of all tokens that may follow (bit i % 32 of word i // 32) and no others."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take a token; False: it may not follow, and nothing has changed."""
        ...

    @property
    def ended(self) -> bool:
        """Whether an end token was taken after the grammar was complete."""
        ...


class CompiledGrammar(Protocol):
    """A grammar ready for use. Any thread may start matchers; a matcher belongs to one."""

    def matcher(self) -> Matcher:
        """A state at the beginning."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """The prepared parts; shared by all choices of a request.

    `processors` makes a fresh list of them for one choice, so that those with a state have their
    own; it is None without any.
    """

    grammar: CompiledGrammar | None = None
    processors: Callable[[], list[Processor]] | None = None
