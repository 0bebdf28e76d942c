"""Beam search over log-probabilities. Pure: no block, no logits.

Each step keeps the best `n` of all beams' candidates (the 2n best tokens of each) by the sum of
log-probabilities; a candidate that is an end token closes a beam instead and takes no place. In
the end the best `n` of the closed and the live ones count, by sum / length ** length_penalty;
the length is that of prompt and output, a closing end token left out. Ties go to the lower beam,
then to the lower token id.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from contracts.events import FinishReason, TokenLogprob
from contracts.sampling import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A text so far: its last token, and the beam that this one goes on."""

    parent: "Beam | None"
    token_id: int
    entry: TokenLogprob
    total: float  # sum of log-probabilities
    num_outputs: int


@dataclass(frozen=True, slots=True)
class BeamResult:
    """A finished text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # only if asked for
    finish: FinishReason


class BeamSearch:
    """One request's beams. `live` begins as one beam without tokens."""

    def __init__(self, params: SamplingParams, prompt_length: int, max_outputs: int) -> None:
        self._params = params
        self._prompt_length = prompt_length
        self._max_outputs = max_outputs
        self._closed: list[tuple[float, Beam]] = []  # score first; best first, at most n
        self.live: list[Beam] = [Beam(None, -1, TokenLogprob(0.0), 0.0, 0)]

    def advance(self, candidates: Sequence[TokenLogprob]) -> list[int]:
        """Go on by one token.

        Args:
            candidates: for each live beam, its best next tokens as `top`.

        Returns:
            For each beam that is live now, the index of the one before that it goes on.
        """
        width = self._params.n
        found = [
            (-(beam.total + logprob), index, token_id, logprob)
            for index, (beam, entry) in enumerate(zip(self.live, candidates, strict=True))
            for token_id, logprob in entry.top[: 2 * width]
        ]
        found.sort()
        live: list[Beam] = []
        parents: list[int] = []
        for negative, index, token_id, logprob in found:
            ends = self._params.ends(token_id)
            if not ends and len(live) == width:
                continue
            shown = candidates[index].top[: self._params.logprobs or 0]
            parent = self.live[index]
            beam = Beam(
                parent, token_id, TokenLogprob(logprob, shown), -negative, parent.num_outputs + 1
            )
            if ends:
                self._closed.append((self._score(beam.total, parent.num_outputs), beam))
            else:
                live.append(beam)
                parents.append(index)
        self._closed.sort(key=lambda scored: -scored[0])  # stable: ties to the older
        del self._closed[width:]
        self.live = live
        return parents

    @property
    def over(self) -> bool:
        """Whether no further token can change the result."""
        if not self.live or self.live[0].num_outputs >= self._max_outputs:
            return True
        return len(self._closed) == self._params.n and all(
            self._bound(beam) < self._closed[-1][0] for beam in self.live
        )

    def results(self) -> list[BeamResult]:
        """The best `n`, best first; fewer only if the vocabulary is smaller than 2n."""
        scored = [(score, beam, FinishReason.STOP) for score, beam in self._closed]
        scored += [
            (self._score(beam.total, beam.num_outputs), beam, FinishReason.LENGTH)
            for beam in self.live
        ]
        scored.sort(key=lambda entry: -entry[0])
        return [self._result(beam, finish) for _, beam, finish in scored[: self._params.n]]

    def _bound(self, beam: Beam) -> float:
        """No continuation of `beam` scores better: sums only fall, so one of the ends is best."""
        return max(
            self._score(beam.total, beam.num_outputs), self._score(beam.total, self._max_outputs)
        )

    def _score(self, total: float, num_outputs: int) -> float:
        try:
            weight = float(self._prompt_length + num_outputs) ** self._params.length_penalty
        except OverflowError:
            weight = math.inf
        return total / weight if weight else -math.inf

    def _result(self, last: Beam, finish: FinishReason) -> BeamResult:
        chain: list[Beam] = []
        beam = last
        while beam.parent is not None:
            chain.append(beam)
            beam = beam.parent
        chain.reverse()
        asked = self._params.logprobs is not None
        return BeamResult(
            tuple(beam.token_id for beam in chain),
            tuple(beam.entry for beam in chain) if asked else (),
            finish,
        )
