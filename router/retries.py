"""What may follow a failed attempt: another one, a pause, or the end. No I/O; the clock is given.

Most failures are not the request's fault, so they are bounded by time and not by a small count:
a worker that is restarted refuses what crosses its drain, and hands over what it was at.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from contracts.errors import HandoffError, Overloaded, ServingError, Unavailable
from router.attempt import WorkerFault, is_hopeless
from router.config import RouterConfig
from router.placement import Instance

_PAUSE_S = 0.25  # until a worker that could not take the request is asked again


class FaultKind(StrEnum):
    """What a worker's fault says of the next attempt."""

    MOVED = "moved"  # it is leaving: another one, at no charge
    LOST = "lost"  # its session broke: it died, it froze, or the network did
    FULL = "full"  # it has no room now
    FAILED = "failed"  # it tried, and could not


def kind_of(fault: WorkerFault) -> FaultKind:
    """Which of them a fault is."""
    if fault.lost:
        return FaultKind.MOVED if fault.drained else FaultKind.LOST
    if isinstance(fault.error, Unavailable):
        return FaultKind.MOVED
    return FaultKind.FULL if isinstance(fault.error, Overloaded) else FaultKind.FAILED


@dataclass(slots=True)
class Retries:
    """One request's failed attempts.

    `lost` counts sessions that broke under it, over its whole life: a request that kills each
    worker it touches must not go on for ever. `failed_before` and `failed_after` count the other
    failures, before and after the first token. `_waited_s` is how long nobody could take it since
    it last moved forward.
    """

    config: RouterConfig
    clock: Callable[[], float]
    force_local: bool = False
    error: ServingError | None = None  # what the last worker said that was full or failed
    lost: int = 0
    failed_before: int = 0
    failed_after: int = 0
    _excluded: dict[Instance, tuple[FaultKind, float]] = field(
        default_factory=dict[Instance, tuple[FaultKind, float]]
    )
    _emitted: int = 0
    _waited_s: float = 0.0

    def add(self, fault: WorkerFault, instance: Instance | None, emitted: int) -> None:
        """An attempt has failed by a fault of `instance` (None: not connected any more).

        Raises:
            ServingError: no other attempt may follow.
        """
        error = fault.error
        if is_hopeless(error):
            raise error
        self._moved_to(emitted)
        kind = kind_of(fault)
        if kind is FaultKind.LOST:
            self.lost += 1
            if self.lost > self.config.max_lost_workers:
                raise error
        elif kind is FaultKind.FAILED:
            if emitted:
                self.failed_after += 1
            else:
                self.failed_before += 1
            if (
                self.failed_after > self.config.max_replays
                or self.failed_before > self.config.max_retries
            ):
                raise error
        if isinstance(error, HandoffError):  # the worker is fine
            self.force_local = True
        elif not fault.lost and instance is not None:
            self._excluded[instance] = kind, self.clock()
        if kind in (FaultKind.FULL, FaultKind.FAILED):
            self.error = error

    @property
    def excluded(self) -> frozenset[Instance]:
        """Who is not to be asked now.

        Who failed the request is not asked again; who was full is, once the client has its first
        token, for then nothing is left but to wait; who was leaving is, in case it has come back.
        """
        now = self.clock()
        return frozenset(
            instance
            for instance, (kind, at) in self._excluded.items()
            if now < at + _PAUSE_S
            or kind is FaultKind.FAILED
            or (kind is FaultKind.FULL and not self._emitted)
        )

    @property
    def undecided(self) -> frozenset[Instance]:
        """Who has refused but may yet take it: if only others are left, waiting is in vain."""
        return frozenset(
            instance
            for instance, (kind, _) in self._excluded.items()
            if kind is FaultKind.MOVED or (kind is FaultKind.FULL and self._emitted)
        )

    def wait_s(self, emitted: int) -> float:
        """How long to wait for a change when nobody can take the request; 0: no longer."""
        self._moved_to(emitted)
        limit_s = self.config.replay_wait_s if emitted else self.config.worker_wait_s
        left_s = max(limit_s - self._waited_s, 0.0)
        return min(left_s, _PAUSE_S) if self._excluded else left_s

    def waited(self, seconds: float) -> None:
        """Nobody could take it for so long."""
        self._waited_s += seconds

    def _moved_to(self, emitted: int) -> None:
        if emitted > self._emitted:
            self._emitted, self._waited_s = emitted, 0.0
