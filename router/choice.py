"""One choice of an answer: tokens by position in, text and log-probabilities out."""

from dataclasses import dataclass, field

from contracts.errors import EngineFailure
from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.sampling import SamplingParams
from router.detokenizer import Detokenizer, Vocabulary
from router.stops import StopStrings

_LOWEST_LOGPROB = -9999.0
_PIECE_BYTES = 200  # what an event costs besides its text, roughly
_LOGPROB_BYTES = 100  # an entry or an alternative, roughly


class TokenFault(EngineFailure):
    """Workers contradict themselves: a gap, or another token where one was given."""


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token's text and log-probability; `top` is best first."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one frame added to one choice.

    `completion_tokens` counts all choices up to and including this piece. `first` and
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

    @property
    def num_bytes(self) -> int:
        """About how many bytes it takes on the wire."""
        entries = sum(1 + len(entry.top) for entry in self.logprobs)
        return (
            _PIECE_BYTES + 3 * len(self.text) + 7 * len(self.token_ids) + _LOGPROB_BYTES * entries
        )


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends a choice and how that is reported (section 6 of the API)."""

    stop: tuple[str, ...] = ()
    primary_eos: int | None = None

    def stop_reason(self, token_id: int, params: SamplingParams) -> int | None:
        """What to report for an end token: nothing for the tokenizer's own eos, else its id."""
        plain = token_id == self.primary_eos and token_id in params.eos_token_ids
        return None if plain else token_id


@dataclass(slots=True, eq=False)
class Choice:
    """`token_ids` are what was emitted, in order; nothing is added once `finished`.

    Only the request that owns it, on the event loop, touches a Choice.
    """

    index: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    rules: EndRules
    vocabulary: Vocabulary
    token_ids: list[int] = field(default_factory=list[int])
    finished: bool = False
    worker_finished: bool = False  # a worker said so; it will send no more of this choice
    detokenizer: Detokenizer = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.detokenizer = self.vocabulary.detokenizer(self.prompt_ids)
        self.stops = StopStrings(self.rules.stop)

    def add(self, event: TokensOut, emitted_before: int = 0) -> Piece | None:
        """Take a frame's tokens strictly by position; None if there is nothing new in it.

        `emitted_before` is what all choices have emitted so far.

        Raises:
            TokenFault: a gap, or a repeated position with another token.
        """
        known = len(self.token_ids)
        self._check_repeat(event, known)
        if event.finish is not None:
            self.worker_finished = True
        if self.finished:
            return None
        start = known - event.position
        if start < 0:
            raise TokenFault(
                f"choice {self.index}: position {event.position} came, {known} was expected"
            )
        if start >= len(event.token_ids) and event.finish is None:
            return None
        return self._extend(event, start, emitted_before)

    def _check_repeat(self, event: TokensOut, known: int) -> None:
        end = min(known, event.position + len(event.token_ids))
        for position in range(event.position, end):
            ours, theirs = self.token_ids[position], event.token_ids[position - event.position]
            if ours != theirs:
                raise TokenFault(
                    f"choice {self.index}: position {position} was token {ours}, now it is {theirs}"
                )

    def _extend(self, event: TokensOut, start: int, emitted_before: int) -> Piece:
        """Take event.token_ids[start:], up to the token that ends the choice."""
        first = not self.token_ids
        last = len(event.token_ids) - 1
        shown: list[str] = []
        entries: list[LogprobEntry] = []
        stop_reason: int | str | None = None
        end = start
        for index in range(start, last + 1):
            token_id = event.token_ids[index]
            ends = index == last and event.finish is not None
            hidden = ends and event.finish is FinishReason.STOP and self.params.ends(token_id)
            if hidden:
                stop_reason = self.rules.stop_reason(token_id, self.params)
            logprob = event.logprobs[index] if index < len(event.logprobs) else None
            text, entry = self._token(token_id, logprob, hidden=hidden, ends=ends)
            if entry is not None:
                entries.append(entry)
            shown.append(self.stops.push(text))
            end = index + 1
            if self.stops.matched is not None:
                break
        taken = event.token_ids[start:end]
        self.token_ids.extend(taken)
        if not taken:  # an end without a token
            shown.append(self.stops.push(self.detokenizer.finish()))
        reason = event.finish
        if self.stops.matched is not None:
            reason, stop_reason = FinishReason.STOP, self.stops.matched
        elif reason is not None:
            shown.append(self.stops.finish())
        self.finished = reason is not None
        return Piece(
            choice=self.index,
            text="".join(shown),
            token_ids=tuple(taken),
            logprobs=tuple(entries),
            first=first,
            finish_reason=None if reason is None else reason.value,
            stop_reason=stop_reason,
            completion_tokens=emitted_before + len(taken),
        )

    def _token(
        self, token_id: int, logprob: TokenLogprob | None, *, hidden: bool, ends: bool
    ) -> tuple[str, LogprobEntry | None]:
        """A token's visible text, and its entry if log-probabilities are wanted.

        A hidden end token shows only in its entry; the choice's last token also gets the U+FFFD
        of a character that was never completed.
        """
        top = () if logprob is None else self._alternatives(logprob)
        name = self._name(token_id) if logprob is not None and hidden else ""
        text = "" if hidden else self.detokenizer.push(token_id)
        if ends:
            text += self.detokenizer.finish()
        if logprob is None:
            return text, None
        if not hidden:
            special = token_id in self.vocabulary.special_ids
            name = self.vocabulary.name(token_id) if special else text
        return text, LogprobEntry(name, max(logprob.logprob, _LOWEST_LOGPROB), top)

    def _name(self, token_id: int) -> str:
        """A token as log-probabilities show it in this place: special ones by name."""
        if token_id in self.vocabulary.special_ids:
            return self.vocabulary.name(token_id)
        return self.detokenizer.peek(token_id)

    def _alternatives(self, logprob: TokenLogprob) -> tuple[tuple[str, float], ...]:
        best = logprob.top[: self.params.logprobs or 0]
        return tuple((self._name(i), max(value, _LOWEST_LOGPROB)) for i, value in best)
