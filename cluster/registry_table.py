"""Which workers live: the registry's state, without Ray. The clock is an argument.

A restarted registry is empty and has a new incarnation; workers refill it with their next
heartbeat, and watchers (`RegistryView`) keep what they knew for a grace time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role, WorkerAddress

HEARTBEAT_S = 2.0  # how often workers register again
EXPIRY_S = 10.0  # a worker that did not is forgotten
GRACE_S = 3 * HEARTBEAT_S  # how long a view outlives a restarted registry's empty list


@dataclass(frozen=True, slots=True)
class StartFailure:
    """A worker or router that could not start. `kind` is the exception's class name."""

    who: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The workers that take requests, as of `version` of one registry's life."""

    incarnation: int
    version: int
    workers: tuple[WorkerAddress, ...]


@dataclass(slots=True)
class _Entry:
    address: WorkerAddress
    seen_at: float
    draining: bool = False


@dataclass(slots=True, eq=False)
class RegistryTable:
    """The table. `version` grows with each change of `listing()`, and with nothing else."""

    incarnation: int
    clock: Callable[[], float]
    expiry_s: float = EXPIRY_S
    version: int = 0
    failures: list[StartFailure] = field(default_factory=list[StartFailure])
    _entries: dict[WorkerId, _Entry] = field(default_factory=dict[WorkerId, _Entry])

    def register(self, address: WorkerAddress, *, draining: bool = False) -> None:
        """Add a worker, or say that it still lives. A new incarnation replaces the old one."""
        old = self._entries.get(address.worker_id)
        entry = _Entry(address, self.clock(), draining)
        self._entries[address.worker_id] = entry
        was = old.address if old is not None and not old.draining else None
        if was != (None if draining else address):
            self.version += 1

    def unregister(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Forget a worker; nothing happens if it is unknown or has another incarnation."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.address.incarnation == incarnation:
            self._remove(worker_id)

    def expire(self) -> None:
        """Forget the workers that have been silent for `expiry_s`."""
        oldest = self.clock() - self.expiry_s
        for worker_id in [i for i, entry in self._entries.items() if entry.seen_at < oldest]:
            self._remove(worker_id)

    def listing(self) -> Listing:
        """The workers that take requests, by id. Draining ones are left out: routers that have a
        session to one keep it, and others shall not begin.
        """
        workers = (entry.address for entry in self._entries.values() if not entry.draining)
        ordered = tuple(sorted(workers, key=lambda address: address.worker_id))
        return Listing(self.incarnation, self.version, ordered)

    def _remove(self, worker_id: WorkerId) -> None:
        if not self._entries.pop(worker_id).draining:
            self.version += 1


@dataclass(slots=True, eq=False)
class RegistryView:
    """What one watcher believes. Survives a restart of the registry.

    After a restart, workers known before stay in the view until `grace_s` is over or they
    registered again; so a view never shrinks because a registry died.
    """

    clock: Callable[[], float]
    grace_s: float = GRACE_S
    incarnation: int = 0
    version: int = -1
    workers: tuple[WorkerAddress, ...] = ()
    _listed: tuple[WorkerAddress, ...] = ()
    _carried: dict[WorkerId, WorkerAddress] = field(default_factory=dict[WorkerId, WorkerAddress])
    _carried_until: float = 0.0

    def update(self, listing: Listing) -> bool:
        """Take a listing in. Returns whether `workers` has changed."""
        if listing.incarnation != self.incarnation:
            self._carried = {address.worker_id: address for address in self.workers}
            self._carried_until = self.clock() + self.grace_s
            self.incarnation = listing.incarnation
        self.version = listing.version
        self._listed = listing.workers
        return self._merge()

    def tick(self) -> bool:
        """End the grace time if it is over. Returns whether `workers` has changed."""
        return self._merge()

    @property
    def grace_left_s(self) -> float | None:
        """Seconds until `tick` may change something; None: it will not."""
        return max(0.0, self._carried_until - self.clock()) if self._carried else None

    def _merge(self) -> bool:
        if self._carried and self.clock() >= self._carried_until:
            self._carried = {}
        for address in self._listed:
            self._carried.pop(address.worker_id, None)
        merged = {**self._carried, **{a.worker_id: a for a in self._listed}}
        workers = tuple(merged[worker_id] for worker_id in sorted(merged))
        changed = workers != self.workers
        self.workers = workers
        return changed


def address_to_dict(address: WorkerAddress) -> dict[str, object]:
    """Plain data for the actor's calls: independent of the caller's version of the class."""
    return {
        "worker_id": address.worker_id,
        "role": address.role.value,
        "address": address.address,
        "incarnation": address.incarnation,
    }


def address_from_dict(fields: dict[str, object]) -> WorkerAddress:
    """The inverse; unknown fields are ignored.

    Raises:
        ValueError: a field is missing or wrong.
    """
    try:
        return WorkerAddress(
            worker_id=WorkerId(str(fields["worker_id"])),
            role=Role(str(fields["role"])),
            address=str(fields["address"]),
            incarnation=Incarnation(int(str(fields["incarnation"]))),
        )
    except KeyError as error:
        raise ValueError(f"a worker address without {error.args[0]}") from error


def addresses_from(listed: Iterable[dict[str, object]]) -> tuple[WorkerAddress, ...]:
    """Many addresses."""
    return tuple(address_from_dict(fields) for fields in listed)
