"""What one frame added to one choice, and a choice put together again from all of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart
from router.logprobs import LogprobEntry

_PIECE_BYTES = 200  # what an event costs besides its text, roughly
_LOGPROB_BYTES = 100  # an entry or an alternative, roughly


@dataclass(frozen=True, slots=True)
class Piece:
    """What one frame added to one choice.

    Without an output parser `text` is all that is shown and `deltas` is empty; with one it is the
    other way round, and neighbours in `deltas` differ in kind or call. `token_ids` and `logprobs`
    leave out what is not to be seen (thoughts, if those are hidden). `completion_tokens` and
    `reasoning_tokens` count all tokens of all choices up to and including this piece. `first` and
    `finish_reason` mark the choice's first and last piece.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobEntry, ...] = ()
    first: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    completion_tokens: int = 0
    deltas: tuple[Delta, ...] = ()
    reasoning_tokens: int = 0

    @property
    def parts(self) -> tuple[Delta, ...]:
        """What is shown, in one form for both cases."""
        return (Content(self.text),) if self.text else self.deltas

    @property
    def num_bytes(self) -> int:
        """About how many bytes it takes on the wire."""
        size = _PIECE_BYTES + 3 * len(self.text) + 7 * len(self.token_ids)
        if self.logprobs:
            size += _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in self.logprobs)
        for delta in self.deltas:
            text = delta.name if isinstance(delta, ToolCallStart) else delta.text
            size += _PIECE_BYTES + 6 * len(text)  # thoughts are sent under two names
        return size


def merged(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """The same with neighbours of one kind joined, and without empty ones."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        match delta, last:
            case (Content("") | Reasoning("") | ToolArguments(_, ""), _):
                pass
            case Content(text), Content(before):
                out[-1] = Content(before + text)
            case Reasoning(text), Reasoning(before):
                out[-1] = Reasoning(before + text)
            case ToolArguments(index, text), ToolArguments(same, before) if index == same:
                out[-1] = ToolArguments(index, before + text)
            case _:
                out.append(delta)
    return tuple(out)


@dataclass(slots=True)
class GatheredCall:
    """A tool call whose arguments may still grow."""

    call_id: str
    name: str
    pieces: list[str] = field(default_factory=list[str])

    @property
    def arguments(self) -> str:
        """JSON text, as the model wrote it (cut short if the choice was)."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Gathered:
    """All pieces of one choice, joined."""

    token_ids: list[int] = field(default_factory=list[int])
    entries: list[LogprobEntry] = field(default_factory=list[LogprobEntry])
    calls: dict[int, GatheredCall] = field(default_factory=dict[int, GatheredCall])
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _content: list[str] = field(default_factory=list[str])
    _reasoning: list[str] = field(default_factory=list[str])

    @property
    def content(self) -> str:
        """The answer's text."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The thoughts' text."""
        return "".join(self._reasoning)

    def add(self, piece: Piece) -> None:
        """Take the choice's next piece."""
        self.token_ids.extend(piece.token_ids)
        self.entries.extend(piece.logprobs)
        self._content.append(piece.text)
        for delta in piece.deltas:
            match delta:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case ToolCallStart(index, call_id, name):
                    self.calls[index] = GatheredCall(call_id, name)
                case ToolArguments(index, text):
                    self.calls[index].pieces.append(text)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.stop_reason = piece.stop_reason
