"""The log-probabilities of a prompt, gathered from the pieces in which workers send them."""

from contracts.errors import EngineFailure
from contracts.events import PromptLogprob, PromptScores


class ScoreSheet:
    """One place for each prompt token; the first token's stays empty.

    Whoever computes the prompt again sends the same once more: what came first is kept.
    """

    def __init__(self, num_prompt_tokens: int, *, wanted: bool) -> None:
        self._wanted = wanted
        self._entries: list[PromptLogprob | None] = [None] * (num_prompt_tokens if wanted else 0)
        self._missing = max(len(self._entries) - 1, 0)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing (always so if none were asked for)."""
        return not self._missing

    @property
    def entries(self) -> tuple[PromptLogprob | None, ...] | None:
        """An entry for each prompt token, None for the first; None if not wanted or incomplete."""
        return tuple(self._entries) if self._wanted and self.complete else None

    def add(self, event: PromptScores) -> None:
        """Take a piece; unwanted ones are dropped.

        Raises:
            EngineFailure: it tells of tokens that the prompt does not have.
        """
        if not self._wanted:
            return
        end = event.position + len(event.entries)
        if event.position < 1 or end > len(self._entries):
            raise EngineFailure(
                f"log-probabilities of prompt tokens [{event.position}, {end}) came, "
                f"[1, {len(self._entries)}) were expected"
            )
        for position, entry in enumerate(event.entries, event.position):
            if self._entries[position] is None:
                self._entries[position] = entry
                self._missing -= 1
