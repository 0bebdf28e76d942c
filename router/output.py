"""The answer side of a request: its choices, its counts, and the pieces that have come out."""

from contracts.events import TokensOut
from router.choice import Choice
from router.detokenizer import Vocabulary
from router.job import Job, Usage
from router.logprobs import PromptEntry, prompt_entries
from router.metrics import RequestTimes
from router.outbox import Outbox
from router.scores import ScoreSheet


class Output:
    """`emitted` tokens of all choices are in the outbox, or were; `reasoned` of them were thoughts.

    It knows no workers: events come in the order in which they are to be shown.
    """

    def __init__(
        self, job: Job, vocabulary: Vocabulary, outbox: Outbox, times: RequestTimes
    ) -> None:
        self.choices = [
            Choice(index, job.prompt_ids, job.params, job.rules, vocabulary)
            for index in range(job.params.n)
        ]
        self.scores = ScoreSheet(len(job.prompt_ids), wanted=job.params.prompt_logprobs is not None)
        self.emitted = 0
        self.reasoned = 0
        self._job = job
        self._vocabulary = vocabulary
        self._outbox = outbox
        self._times = times

    @property
    def finished(self) -> bool:
        """Whether nothing more is to come out."""
        return all(choice.finished for choice in self.choices)

    @property
    def worker_finished(self) -> bool:
        """Whether the attempt's workers have ended all choices that they were given."""
        return all(choice.worker_finished for choice in self.choices)

    def usage(self, cached_tokens: int) -> Usage:
        """Counts so far: what was emitted, whatever it took."""
        reasoned = self.reasoned if self._job.rules.thinks else None
        return Usage(len(self._job.prompt_ids), self.emitted, cached_tokens, reasoned)

    def show(self, event: TokensOut) -> None:
        """Put a frame's new tokens into the outbox.

        Raises:
            TokenFault: the tokens contradict earlier ones.
            SlowReader: the outbox is full.
        """
        piece = self.choices[event.choice].add(event, self.emitted, self.reasoned)
        if piece is not None:
            num_tokens = piece.completion_tokens - self.emitted
            self.emitted, self.reasoned = piece.completion_tokens, piece.reasoning_tokens
            self._times.frame(num_tokens, piece.finish_reason)
            self._outbox.put(piece)

    def prompt_entries(self) -> list[PromptEntry] | None:
        """The prompt's scores with the tokens' texts; None if not asked for, or not complete."""
        scores, wanted = self.scores.entries, self._job.params.prompt_logprobs
        if scores is None or wanted is None:
            return None
        return prompt_entries(self._vocabulary, self._job.prompt_ids, scores, wanted)
