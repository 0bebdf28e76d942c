"""When a D can no longer be trusted to serve: too much memory in a quarantine without end (Q2)."""

import time
from collections.abc import Callable

from contracts.errors import EngineFailure
from decode_worker.quarantine import Quarantine

_SHARE = 4  # one block in so many


class QuarantineWatch:
    """Says when the worker should stop admitting, and when it should be replaced.

    A posted read cannot be taken back, and tearing its connection down does not stop it
    (docs/decisions/003), so the blocks of a read that never ends come back only with the process.

    Args:
        quarantine: the worker's.
        limit_s: a read that outlives its request by more than this counts as endless.
        drain_s: what runs may go on for that long.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        *,
        limit_s: float,
        drain_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quarantine = quarantine
        self._limit_s = limit_s
        self._drain_s = drain_s
        self._clock = clock
        self._since: float | None = None

    @property
    def draining(self) -> bool:
        """Whether nothing more is to be admitted."""
        return self._since is not None

    def look(self, total_blocks: int) -> bool:
        """Judge anew; whether `draining` has changed."""
        held = len(self._quarantine.blocks())
        stuck = held * _SHARE > total_blocks and self._quarantine.oldest_s > self._limit_s
        if stuck == self.draining:
            return False
        self._since = self._clock() if stuck else None
        return True

    def check(self, num_requests: int) -> None:
        """Raise EngineFailure once the worker should be replaced."""
        if self._since is None:
            return
        if not num_requests or self._clock() - self._since > self._drain_s:
            raise EngineFailure(
                f"{len(self._quarantine.blocks())} KV blocks are held by reads that do not end "
                f"since {self._quarantine.oldest_s:.0f} s: this worker must be restarted"
            )
