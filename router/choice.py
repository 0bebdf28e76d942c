"""One choice of an answer: tokens by position in, pieces of what is shown out."""

from dataclasses import dataclass, field

from contracts.errors import EngineFailure
from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.sampling import SamplingParams
from router.deltas import Delta, OutputParser, Reasoning
from router.detokenizer import Detokenizer, Vocabulary
from router.logprobs import LOWEST_LOGPROB, LogprobEntry
from router.pieces import Piece, merged
from router.rules import OutputRules
from router.stops import StopStrings


class TokenFault(EngineFailure):
    """Workers contradict themselves: a gap, or another token where one was given."""


@dataclass(slots=True, eq=False)
class Choice:
    """`token_ids` are what was emitted, in order; nothing is added once `finished`.

    Each token goes by itself through detokenizer, stop strings and parser, so what is shown does
    not depend on how workers put tokens into frames. Only the request that owns it, on the event
    loop, touches a Choice.
    """

    index: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    rules: OutputRules
    vocabulary: Vocabulary
    token_ids: list[int] = field(default_factory=list[int])
    reasoning_tokens: int = 0  # of `token_ids`
    finished: bool = False
    worker_finished: bool = False  # a worker said so; it will send no more of this choice
    detokenizer: Detokenizer = field(init=False)
    stops: StopStrings = field(init=False)
    parser: OutputParser | None = field(init=False)
    _end_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        rules, params = self.rules, self.params
        self.detokenizer = self.vocabulary.detokenizer(
            self.prompt_ids,
            skip_special_tokens=rules.skip_special_tokens,
            spaces_between_special_tokens=rules.spaces_between_special_tokens,
        )
        self.stops = StopStrings(rules.stop, include=rules.include_stop)
        self.parser = None if rules.make_parser is None else rules.make_parser()
        of_grammar = () if params.grammar is None else params.grammar.end_token_ids
        self._end_ids = frozenset((*params.eos_token_ids, *params.stop_token_ids, *of_grammar))

    def add(
        self, event: TokensOut, emitted_before: int = 0, reasoned_before: int = 0
    ) -> Piece | None:
        """Take a frame's tokens strictly by position; None if there is nothing new in it.

        `emitted_before` and `reasoned_before` are the tokens, and of these the thoughts, that all
        choices have emitted so far.

        Raises:
            TokenFault: a gap, or a repeated position with another token.
        """
        known = len(self.token_ids)
        if event.position < known:
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
        return self._extend(event, start, emitted_before, reasoned_before)

    def _check_repeat(self, event: TokensOut, known: int) -> None:
        end = min(known, event.position + len(event.token_ids))
        for position in range(event.position, end):
            ours, theirs = self.token_ids[position], event.token_ids[position - event.position]
            if ours != theirs:
                raise TokenFault(
                    f"choice {self.index}: position {position} was token {ours}, now it is {theirs}"
                )

    def _extend(
        self, event: TokensOut, start: int, emitted_before: int, reasoned_before: int
    ) -> Piece:
        """Take event.token_ids[start:], up to the token that ends the choice."""
        stops, parser, min_tokens = self.stops, self.parser, self.params.min_tokens
        first = not self.token_ids
        reasoned_before -= self.reasoning_tokens
        last = len(event.token_ids) - 1
        texts: list[str] = []
        deltas: list[Delta] = []
        visible: list[int] = []  # ids, if not all of them may be seen
        entries: list[LogprobEntry] = []
        stop_reason: int | str | None = None
        end = start
        for index in range(start, last + 1):
            token_id = event.token_ids[index]
            ends = index == last and event.finish is not None
            closes = ends and event.finish is FinishReason.STOP and token_id in self._end_ids
            if closes:
                stop_reason = self.rules.stop_reason(token_id, self.params)
            logprob = event.logprobs[index] if index < len(event.logprobs) else None
            hidden = closes and not self.rules.include_stop
            text, entry = self._token(token_id, logprob, hidden=hidden, ends=ends)
            text = stops.push(text, event.position + index >= min_tokens)
            end = index + 1
            if parser is None:
                texts.append(text)
                if entry is not None:
                    entries.append(entry)
            elif self._parse(parser, text, deltas, counts=not closes):
                visible.append(token_id)
                if entry is not None:
                    entries.append(entry)
            if stops.matched is not None:
                break
        taken = event.token_ids[start:end]
        self.token_ids.extend(taken)
        reason = event.finish
        if stops.matched is None and reason is not None:
            texts += stops.push(self.detokenizer.finish()), stops.finish()
        if stops.matched is not None:
            reason, stop_reason = FinishReason.STOP, stops.matched
        shown = "".join(texts)
        if parser is not None:
            if reason is not None:
                self._finish_parsing(parser, shown, deltas)
            shown = ""
        self.finished = reason is not None
        return Piece(
            self.index,
            shown,
            taken if parser is None else tuple(visible),
            tuple(entries),
            first,
            None if reason is None else self._finish_reason(reason),
            stop_reason,
            emitted_before + len(taken),
            merged(deltas) if deltas else (),
            reasoned_before + self.reasoning_tokens,
        )

    def _finish_reason(self, reason: FinishReason) -> str:
        called = self.parser is not None and self.parser.calls > 0
        return self.rules.calls_finish if called and reason is FinishReason.STOP else reason.value

    # Parsing

    def _parse(self, parser: OutputParser, text: str, deltas: list[Delta], *, counts: bool) -> bool:
        """Push one token's text; whether the token itself may be seen.

        What touches the thoughts is kept from view with them; their markers are not counted.
        """
        before = parser.thinking
        if text:
            self._keep(parser.push(text), deltas)
        after = parser.thinking
        if before and after and counts:
            self.reasoning_tokens += 1
        return self.rules.include_reasoning or not (before or after)

    def _finish_parsing(self, parser: OutputParser, rest: str, deltas: list[Delta]) -> None:
        if rest:
            self._keep(parser.push(rest), deltas)
        self._keep(parser.finish(), deltas)

    def _keep(self, new: list[Delta], deltas: list[Delta]) -> None:
        if self.rules.include_reasoning:
            deltas.extend(new)
        else:
            deltas.extend(delta for delta in new if not isinstance(delta, Reasoning))

    # Log-probabilities

    def _token(
        self, token_id: int, logprob: TokenLogprob | None, *, hidden: bool, ends: bool
    ) -> tuple[str, LogprobEntry | None]:
        """A token's visible text, and its entry if log-probabilities are wanted.

        A hidden end token shows only in its entry; the choice's last token also gets the U+FFFD
        of a character that was never completed.
        """
        if logprob is None:
            text = "" if hidden else self.detokenizer.push(token_id)
            return (text + self.detokenizer.finish() if ends else text), None
        top = self._alternatives(logprob)
        name = self._name(token_id) if hidden else ""
        text = "" if hidden else self.detokenizer.push(token_id)
        if ends:
            text += self.detokenizer.finish()
        if not hidden:
            special = token_id in self.vocabulary.special_ids
            name = self.vocabulary.name(token_id) if special else text
        value = max(logprob.logprob, LOWEST_LOGPROB)
        if not self.rules.tokens_as_ids:
            return text, LogprobEntry(name, value, tuple((other, v) for _, other, v in top))
        by_id = tuple((f"token_id:{i}", v) for i, _, v in top)
        spelled = (name, *(other for _, other, _ in top))
        return text, LogprobEntry(f"token_id:{token_id}", value, by_id, spelled)

    def _name(self, token_id: int) -> str:
        """A token as log-probabilities show it in this place: special ones by name."""
        if token_id in self.vocabulary.special_ids:
            return self.vocabulary.name(token_id)
        return self.detokenizer.peek(token_id)

    def _alternatives(self, logprob: TokenLogprob) -> list[tuple[int, str, float]]:
        """(token id, text, log-probability); before the token itself is pushed."""
        wanted = self.params.logprobs or 0
        best = logprob.top if wanted < 0 else logprob.top[:wanted]
        return [(i, self._name(i), max(value, LOWEST_LOGPROB)) for i, value in best]
