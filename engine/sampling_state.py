"""What a choice's draws remember between steps; all of it can be rebuilt from the outputs."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from contracts.errors import ServingError
from contracts.sampling import SamplingParams
from engine.guide import Guide, Matcher, Processor
from engine.penalties import TokenCounts
from engine.plan import SampleSlot

SLOW_S = 0.05  # a step of a grammar that takes longer than this counts as slow
MAX_SLOW_S = 5.0  # the slow steps of one choice together; then its grammar is given up

Ids = NDArray[np.int64]
_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


class DrawFailure(Exception):
    """A draw that cannot be made; the text says why. Only its own request fails."""


class SamplingState:
    """One choice's counts, grammar matcher and processors after the outputs `consumed`.

    `guided`: the grammar binds now (its `start_after` has been seen, or is not needed). A draw
    that cannot be made raises `DrawFailure`, and the state must then be dropped.
    """

    def __init__(self, slot: SampleSlot, vocab_size: int, device: torch.device) -> None:
        params = slot.params
        self.params = params
        self.guide: Guide | None = slot.guide
        self.prompt_ids = list(slot.prompt_ids)
        self.consumed: list[int] = []
        self.matcher: Matcher | None = None
        self.guided = False
        self.processors: list[Processor] = []
        self._slow_s = 0.0
        self._start_after = params.grammar.start_after if params.grammar is not None else ()
        self._opened_by = params.grammar.opened_by if params.grammar is not None else None
        self._prepare(slot)
        self.bias_ids, self.bias = _bias(params, vocab_size)
        self.min_tokens_ids = _inside(params.min_tokens_masked, vocab_size)
        self._banned = _group_bad_words(params, vocab_size)
        self.allowed: torch.Tensor | None = None  # bool [vocab]
        if params.allowed_token_ids:
            allowed = np.zeros(vocab_size, dtype=np.bool_)
            allowed[_inside(params.allowed_token_ids, vocab_size)] = True
            self.allowed = torch.from_numpy(allowed).to(device)
        self.counts: TokenCounts | None = None
        if (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        ):
            prompt = slot.prompt_ids if params.repetition_penalty != 1.0 else ()
            self.counts = TokenCounts(prompt, ())
        self.feed(slot.output_ids)

    def _prepare(self, slot: SampleSlot) -> None:
        guide = slot.guide or Guide()
        if slot.params.grammar is not None:
            if guide.grammar is None:
                raise DrawFailure("the grammar was not prepared")
            self.matcher = guide.grammar.matcher()
            self.guided = not self._start_after or self._opened_by is not None
        if slot.params.processors:
            if guide.processors is None:
                raise DrawFailure("the logits processors were not prepared")
            try:
                self.processors = guide.processors()
            except Exception as error:  # the operator's code
                raise DrawFailure(f"a logits processor failed: {type(error).__name__}") from error

    def continues(self, slot: SampleSlot) -> bool:
        """Whether `feed` can bring this state to the slot's outputs."""
        return (
            self.params is slot.params
            and self.guide is slot.guide
            and len(slot.output_ids) >= len(self.consumed)
            and list(slot.output_ids[: len(self.consumed)]) == self.consumed
        )

    def feed(self, token_ids: Sequence[int]) -> bool:
        """Take tokens as generated. Returns whether the last one closed the grammar.

        Raises:
            DrawFailure: the grammar does not take one of them.
        """
        ended = False
        for token in token_ids:
            self.consumed.append(token)
            if self.counts is not None:
                self.counts.add(token)
            if self.matcher is None:
                continue
            if token == self._opened_by and len(self.consumed) == 1:
                self.guided = False  # until the thoughts are over
                continue
            if self.guided:
                ended = self._accept(self.matcher, token)
            elif tuple(self.consumed[-len(self._start_after) :]) == self._start_after:
                self.guided = True
        return ended

    def _accept(self, matcher: Matcher, token: int) -> bool:
        started = time.perf_counter()
        if not matcher.accept(token):
            raise DrawFailure("the output does not fit the grammar")
        self._spent(time.perf_counter() - started)
        return matcher.ended

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that the grammar lets follow.

        Raises:
            DrawFailure: there are none, or the grammar takes too long.
        """
        assert self.matcher is not None
        started = time.perf_counter()
        try:
            self.matcher.fill(bitmask)
            if self._opened_by is not None and not self.consumed:
                bitmask[self._opened_by // 32] |= np.int32(_BITS[self._opened_by % 32])
        except ServingError as error:
            raise DrawFailure(str(error)) from error
        self._spent(time.perf_counter() - started)
        if not bitmask.any():
            raise DrawFailure("the grammar leaves no token that may follow")

    def _spent(self, seconds: float) -> None:
        if seconds > SLOW_S:
            self._slow_s += seconds
            if self._slow_s > MAX_SLOW_S:
                raise DrawFailure("the grammar takes too long to enforce")

    def banned(self) -> Ids:
        """Last tokens of bad words whose other tokens are the newest outputs."""
        found = [
            last
            for before, last in self._banned
            if not before or tuple(self.consumed[-len(before) :]) == before
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


class SamplingStates:
    """States by (sequence, choice), the `limit` last used. Only the engine thread touches it."""

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._states: OrderedDict[tuple[int, int], SamplingState] = OrderedDict()
        self._choices: dict[int, set[int]] = {}  # of each sequence

    def __len__(self) -> int:
        return len(self._states)

    def at(self, slot: SampleSlot, vocab_size: int, device: torch.device) -> SamplingState:
        """The state right before the slot's draw: advanced, or built from its outputs.

        Raises:
            DrawFailure: the outputs do not fit the grammar, or a processor cannot be made.
        """
        key = (slot.sequence, slot.choice)
        state = self._states.pop(key, None)
        if state is not None and state.continues(slot):
            state.feed(slot.output_ids[len(state.consumed) :])
        else:
            state = SamplingState(slot, vocab_size, device)
        self._states[key] = state
        self._choices.setdefault(slot.sequence, set()).add(slot.choice)
        return state

    def forget(self, sequence: int, choice: int) -> None:
        """Drop one state, if there is one."""
        if self._states.pop((sequence, choice), None) is not None:
            self._choices[sequence].discard(choice)

    def drop(self, sequences: Iterable[int]) -> None:
        """Drop all states of sequences that are over."""
        for sequence in sequences:
            for choice in self._choices.pop(sequence, ()):
                self._states.pop((sequence, choice), None)

    def trim(self) -> None:
        """Drop the least recently used beyond the limit."""
        while len(self._states) > self._limit:
            (sequence, choice), _ = self._states.popitem(last=False)
            self._choices[sequence].discard(choice)
            if not self._choices[sequence]:
                del self._choices[sequence]


def _inside(ids: Sequence[int], vocab_size: int) -> Ids:
    array: Ids = np.asarray(ids, dtype=np.int64)
    return array[(array >= 0) & (array < vocab_size)]


def _bias(params: SamplingParams, vocab_size: int) -> tuple[Ids, NDArray[np.float32]]:
    kept = [pair for pair in params.logit_bias if 0 <= pair[0] < vocab_size]
    ids: Ids = np.asarray([token for token, _ in kept], dtype=np.int64)
    return ids, np.asarray([value for _, value in kept], dtype=np.float32)


def _group_bad_words(params: SamplingParams, vocab_size: int) -> list[tuple[tuple[int, ...], Ids]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for word in params.bad_words:
        if word:
            groups.setdefault(word[:-1], []).append(word[-1])
    return [(before, _inside(last, vocab_size)) for before, last in groups.items()]
