"""The sequences behind a request's beams: they advance together, and re-parent their blocks."""

from dataclasses import dataclass

from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.request import GenerationRequest
from engine.beams import BeamSearch
from engine.roster import Roster
from engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class BeamGroup:
    """`members[i]` is the sequence of `search.live[i]`."""

    search: BeamSearch
    members: list[Sequence]

    @property
    def candidates(self) -> list[TokenLogprob] | None:
        """Each member's candidates; None while one of them lacks them."""
        found = [seq.candidates for seq in self.members if seq.candidates is not None]
        return found if len(found) == len(self.members) else None

    def advance(self, candidates: list[TokenLogprob], roster: Roster) -> None:
        """Go on by one token, or end all members if the search is over.

        The first beam that goes on from a member takes its sequence, further ones fork it.
        """
        parents = self.search.advance(candidates)
        if self.search.over:
            for seq in self.members:
                roster.end(seq)
            return
        before, self.members = self.members, []
        for index, seq in enumerate(before):
            if index in parents:
                roster.detach(seq)  # its place in the order changes
            else:
                roster.end(seq)  # first, so that forks find room for their copies
        kept: list[tuple[Sequence, int, int]] = []
        for choice, (index, beam) in enumerate(zip(parents, self.search.live, strict=True)):
            parent = before[index]
            if index in parents[:choice]:
                child = roster.fork(parent, choice, beam.token_id)
                child.group = self
                self.members.append(child)
            else:
                kept.append((parent, choice, beam.token_id))
                self.members.append(parent)
        for seq, choice, token_id in kept:  # last, for forks look at their parents
            seq.choices = (choice,)
            seq.token_ids.append(token_id)
            seq.candidates = None
            if seq.block_ids:
                roster.run(seq)
            else:
                roster.queue(seq)


def told(request: GenerationRequest, search: BeamSearch) -> list[TokensOut]:
    """What is told of a search that is over: one message a choice, best first."""
    events = [
        TokensOut(
            request.request_id,
            request.attempt,
            choice,
            0,
            result.token_ids,
            result.logprobs,
            result.finish,
        )
        for choice, result in enumerate(search.results())
    ]
    missing = range(len(events), request.params.n)  # a vocabulary smaller than 2n
    return events + [
        TokensOut(request.request_id, request.attempt, choice, 0, (), (), FinishReason.ABORT)
        for choice in missing
    ]
