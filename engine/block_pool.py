"""Who holds which KV block: the pool, its prefix cache and its ledger.

Every physical block is in exactly one state, the first that applies (protocol notes, section 3):
`quarantined` (a posted transfer may still write it), `reserved` (promised to an arriving handoff),
`leased` (exported to a D), `owned` (a live sequence's), `cached` (nobody's, content findable),
`free`. Only the engine thread touches a pool.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from contracts.errors import OutOfBlocks
from engine.free_runs import FreeRuns
from engine.generations import GenerationWords


@dataclass(frozen=True, slots=True)
class Ledger:
    """Blocks by state; the six add up to `total`, always."""

    total: int
    free: int
    cached: int
    owned: int
    leased: int
    reserved: int
    quarantined: int

    @property
    def balanced(self) -> bool:
        """Whether the states add up."""
        parts = self.free + self.cached + self.owned + self.leased + self.reserved
        return parts + self.quarantined == self.total

    @property
    def idle(self) -> bool:
        """Whether nobody holds anything: `free + cached = total`."""
        return self.free + self.cached == self.total


def root_key(cache_salt: str) -> bytes:
    """Parent key of a first block: the salt separates caches (section 11)."""
    return hashlib.blake2b(
        cache_salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"baton-salt"
    ).digest()


def block_key(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """128-bit cryptographic key of a full block: its parent's key and its token ids."""
    ids = array("I", token_ids).tobytes()
    return hashlib.blake2b(parent + ids, digest_size=16, person=b"baton-block").digest()


class BlockPool:
    """Counts of holders for each block; a block with no holder is cached or free.

    Invariant: a block with a key is in `_by_key` under it; a block without holders is either in
    `_evictable` (it has a key) or in `_free`.
    """

    def __init__(self, num_blocks: int, generations: GenerationWords) -> None:
        self.total = num_blocks
        self.generations = generations
        self._free = FreeRuns(num_blocks)
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._owned = [0] * num_blocks
        self._leased = [0] * num_blocks
        self._reserved = [0] * num_blocks
        self._quarantined = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that can be given out now: free and evictable."""
        return len(self._free) + len(self._evictable)

    # -- taking and giving back -------------------------------------------------------------

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` blocks as an owner, or none; their generations are bumped (F1).

        Raises:
            OutOfBlocks: the pool is unchanged.
        """
        blocks = self._take(count, after)
        self._hold(self._owned, blocks)
        return blocks

    def reserve(self, count: int) -> list[int]:
        """Take `count` blocks for an arriving handoff, or none (M2). Raises OutOfBlocks."""
        blocks = self._take(count, None)
        self._hold(self._reserved, blocks)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for blocks that are cached or held."""
        self._pin(self._owned, blocks)

    def pin_reserved(self, blocks: Sequence[int]) -> None:
        """Hold cache hits for an arriving handoff."""
        self._pin(self._reserved, blocks)

    def lease(self, blocks: Sequence[int]) -> None:
        """Export: the blocks stay unchanged until `unlease`."""
        self._pin(self._leased, blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """An owner leaves."""
        self._drop(self._owned, blocks)

    def unlease(self, blocks: Sequence[int]) -> None:
        """An export is over."""
        self._drop(self._leased, blocks)

    def unreserve(self, blocks: Sequence[int]) -> None:
        """A reservation is given up (no transfer into these blocks is posted)."""
        self._drop(self._reserved, blocks)

    def adopt(self, blocks: Sequence[int]) -> None:
        """Reserved blocks become a sequence's."""
        self._hold(self._owned, blocks)
        self._drop(self._reserved, blocks)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """Reserved blocks that a posted transfer may still write: nobody's (Q1)."""
        self._hold(self._quarantined, blocks)
        self._drop(self._reserved, blocks)

    def unquarantine(self, blocks: Sequence[int]) -> None:
        """The transfer into these blocks is terminal."""
        self._drop(self._quarantined, blocks)

    # -- prefix cache -----------------------------------------------------------------------

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`."""
        hits: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def remember(self, block_id: int, key: bytes) -> None:
        """Make a full, completely computed block findable. The first block of a key stays."""
        if self._key[block_id] is None and key not in self._by_key:
            self._key[block_id] = key
            self._by_key[key] = block_id

    # -- the ledger -------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """Count every block in its one state, from the holders themselves."""
        counts = dict.fromkeys(("quarantined", "reserved", "leased", "owned", "cached", "free"), 0)
        for block in range(self.total):
            if self._quarantined[block]:
                counts["quarantined"] += 1
            elif self._reserved[block]:
                counts["reserved"] += 1
            elif self._leased[block]:
                counts["leased"] += 1
            elif self._owned[block]:
                counts["owned"] += 1
            elif self._key[block] is not None:
                counts["cached"] += 1
            else:
                counts["free"] += 1
        return Ledger(total=self.total, **counts)

    def check(self) -> None:
        """Assert the invariants: what is counted free or cached is what can be given out."""
        ledger = self.ledger()
        assert ledger.balanced, ledger
        assert ledger.free == len(self._free), (ledger, len(self._free))
        assert ledger.cached == len(self._evictable), (ledger, len(self._evictable))
        assert all(self._key[b] == key for key, b in self._by_key.items())
        for counts in (self._owned, self._leased, self._reserved, self._quarantined):
            assert min(counts, default=0) >= 0

    # -- inside -----------------------------------------------------------------------------

    def _held(self, block: int) -> bool:
        return bool(
            self._owned[block]
            or self._leased[block]
            or self._reserved[block]
            or self._quarantined[block]
        )

    def _take(self, count: int, after: int | None) -> list[int]:
        if count > self.available:
            raise OutOfBlocks(wanted=count, available=self.available)
        while len(self._free) < count:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
            self._free.add(block)
            self.evictions += 1
        blocks = self._free.take(count, after)
        for block in blocks:
            self.generations.bump(block)
        return blocks

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._by_key[key]
            self._key[block] = None

    def _pin(self, counts: list[int], blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self._held(block) or block in self._evictable, f"block {block} is free"
            self._evictable.pop(block, None)
        self._hold(counts, blocks)

    def _hold(self, counts: list[int], blocks: Sequence[int]) -> None:
        for block in blocks:
            counts[block] += 1

    def _drop(self, counts: list[int], blocks: Sequence[int]) -> None:
        # Reversed: a prefix's later blocks become evictable first, so chains shorten at the end.
        for block in reversed(blocks):
            assert counts[block] > 0, f"block {block} is not held so"
            counts[block] -= 1
            if self._held(block):
                continue
            if self._key[block] is None:
                self._free.add(block)
            else:
                self._evictable[block] = None
