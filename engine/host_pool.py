"""Cold prefix blocks in host memory: which are there, who goes next, and the ledger of it.

What the device's prefix cache evicts is kept here under the same key, and brought back into
another block when a prompt begins with it again. This is the bookkeeping; engine/offload.py has
the memory and moves the bytes. Each slot holds one block and is in one of three states:

    free      nothing is in it
    cached    findable; the least recently used of these goes first
    loading   findable, and a device block is being filled from it: it stays as it is
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from engine.block_pool import LedgerFault

Moves = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class HostLedger:
    """Slots by state; the three add up to `total`, always."""

    STATES: ClassVar[tuple[str, ...]] = ("free", "cached", "loading")

    total: int
    free: int
    cached: int
    loading: int


class HostPool:
    """Slots of host memory, by prefix key. Only the engine thread touches one.

    Moves are noted here and made by the next plan that is computed: first what `take` tells to
    save, then what it tells to load. So a saved block's new owner writes it after it was saved,
    a slot may be loaded from in the very plan that saves into it, and whoever computes in this
    plan finds its blocks filled.
    """

    def __init__(self, num_slots: int, bytes_per_block: int) -> None:
        self.total = num_slots
        self._bytes_per_block = bytes_per_block
        self._free = list(range(num_slots))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, least recently used first
        self._loading: dict[int, int] = {}  # slot -> device block
        self._key: list[bytes | None] = [None] * num_slots
        self._by_key: dict[bytes, int] = {}
        self._saves: dict[int, int] = {}  # slot -> device block, not taken yet
        self._loads: list[tuple[int, int]] = []  # (slot, device block), not taken yet
        self.saved_blocks = 0
        self.loaded_blocks = 0

    @property
    def saved_bytes(self) -> int:
        """Moved from the device so far."""
        return self.saved_blocks * self._bytes_per_block

    @property
    def loaded_bytes(self) -> int:
        """Moved to the device so far."""
        return self.loaded_blocks * self._bytes_per_block

    # -- what is here -----------------------------------------------------------------------

    def find(self, key: bytes) -> int | None:
        """The slot that holds this block, if one does."""
        return self._by_key.get(key)

    def save(self, block: int, key: bytes) -> None:
        """Keep a device block that is evicted now; if every slot is being loaded from, do not."""
        slot = self._by_key.get(key)
        if slot is not None:  # it came from here; equal keys have equal content
            if slot in self._idle:
                self._idle.move_to_end(slot)
            return
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            slot, _ = self._idle.popitem(last=False)
            self._forget(slot)
        else:
            return
        self._key[slot] = key
        self._by_key[key] = slot
        self._idle[slot] = None
        self._saves[slot] = block

    def hold(self, slots: Iterable[int]) -> None:
        """These will be loaded: nothing may take their place."""
        for slot in slots:
            if slot not in self._idle:
                raise LedgerFault(f"host slot {slot} is to be loaded, but not cached")
            del self._idle[slot]
            self._loading[slot] = -1

    def load(self, slot: int, block: int) -> None:
        """Fill a device block from a slot that is held."""
        if self._loading.get(slot) != -1:
            raise LedgerFault(f"host slot {slot} is loaded, but not held for it")
        self._loading[slot] = block
        self._loads.append((slot, block))

    # -- moves ------------------------------------------------------------------------------

    def take(self) -> tuple[Moves, Moves]:
        """Moves that the next plan must make: (block, slot) to save, then (slot, block) to load."""
        if not self._saves and not self._loads:
            return (), ()
        saves = tuple((block, slot) for slot, block in self._saves.items())
        loads = tuple(self._loads)
        self._saves.clear()
        self._loads.clear()
        self.saved_blocks += len(saves)
        return saves, loads

    def loaded(self, loads: Moves) -> None:
        """They are made."""
        for slot, block in loads:
            if self._loading.pop(slot, None) != block:
                raise LedgerFault(f"host slot {slot} was loaded into block {block}, unasked")
            self._idle[slot] = None
        self.loaded_blocks += len(loads)

    # -- the ledger -------------------------------------------------------------------------

    def ledger(self) -> HostLedger:
        """Slots by state."""
        return HostLedger(self.total, len(self._free), len(self._idle), len(self._loading))

    def verify(self) -> None:
        """Assert that the states add up, at the same cost for any size. Raises LedgerFault."""
        ledger = self.ledger()
        kept = ledger.cached + ledger.loading
        if ledger.free + kept != self.total or kept != len(self._by_key):
            raise LedgerFault(f"the ledger of host memory does not add up: {ledger}")

    def faults(self) -> set[str]:
        """Look at every slot: what is wrong."""
        found: set[str] = set()
        places = Counter([*self._free, *self._idle, *self._loading])
        for slot, key in enumerate(self._key):
            if places[slot] != 1:
                found.add(f"host slot {slot} is in {places[slot]} states")
            if (key is None) != (slot in self._free):
                found.add(f"host slot {slot} has a key or not, against its state")
            if key is not None and self._by_key.get(key) != slot:
                found.add(f"the key of host slot {slot} leads to another")
        if any(self._loading.get(slot) != block for slot, block in self._loads):
            found.add("a load is noted for a host slot that does not wait for it")
        if any(self._key[slot] is None for slot in self._saves):
            found.add("a save is noted for a host slot that is free")
        return found

    # -- inside -----------------------------------------------------------------------------

    def _forget(self, slot: int) -> None:
        key = self._key[slot]
        assert key is not None, "a cached slot has a key"
        del self._by_key[key]
        self._key[slot] = None
        self._saves.pop(slot, None)
