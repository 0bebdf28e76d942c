"""Who holds which KV block: the pool, its prefix cache and its ledger.

Every physical block is in exactly one state, the first that applies (protocol notes, section 3):
`quarantined` (a posted transfer may still write it), `reserved` (promised to an arriving handoff),
`leased` (exported to a D), `owned` (a live sequence's), `cached` (nobody's, content findable),
`free`. Only the engine thread touches a pool.

A block's holders are one integer, a field of `_FIELD_BITS` bits for each kind, the kind that
decides above the others: what is the highest bit set tells the state.

    quarantined | reserved | leased | owned          0: cached (it has a key) or free
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from contracts.errors import OutOfBlocks
from engine.free_runs import FreeRuns
from engine.generations import GenerationWords

if TYPE_CHECKING:
    from engine.host_pool import HostPool

_FREE, _CACHED, _OWNED, _LEASED, _RESERVED, _QUARANTINED = range(6)  # states, least first
_FIELD_BITS = 20  # a block never has a million holders of one kind
_ONE = (0, 0, *(1 << _FIELD_BITS * field for field in range(4)))  # one holder that makes a state
# By the number of bits of the holders; none: see there whether the block is cached.
_STATE = (_CACHED, *(state for state in range(_OWNED, 6) for _ in range(_FIELD_BITS)))

_BLOCK_DIGEST = hashlib.blake2b(digest_size=16, person=b"baton-block")  # of nothing yet; copied


class LedgerFault(Exception):
    """The pool contradicts itself: some block has no state, or two.

    Never an answer to a request, and nothing may go on from here: a block that two believe to be
    theirs is a wrong token, one that nobody can free is memory lost for good. So it ends the
    engine, before anything computed with the broken pool is told to anyone: the engine's requests
    fail, routers replay them elsewhere, and the worker is replaced. Handoffs that are complete may
    still be read, for nothing writes any more and each word of a block that changed hands has
    changed (F1).
    """


@dataclass(frozen=True, slots=True)
class Ledger:
    """Blocks by state; the six add up to `total`, always."""

    STATES: ClassVar[tuple[str, ...]] = (
        "free",
        "cached",
        "owned",
        "leased",
        "reserved",
        "quarantined",
    )

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
    digest = _BLOCK_DIGEST.copy()
    digest.update(parent + array("I", token_ids).tobytes())
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Hits:
    """The longest cached prefix of a chain of keys: what is on the device, what on the host."""

    keys: Sequence[bytes]
    blocks: list[int]  # on the device, in order
    slots: dict[int, int]  # host slots, by their place in the chain

    def __len__(self) -> int:
        return len(self.blocks) + len(self.slots)

    def filled(self, fresh: Sequence[int]) -> list[int]:
        """All blocks in order: `fresh` ones where the host has the content, and at the end."""
        if not self.slots:
            return [*self.blocks, *fresh]
        device, new = iter(self.blocks), iter(fresh)
        places = range(len(self.blocks) + len(fresh))
        return [next(new if i in self.slots or i >= len(self) else device) for i in places]


class BlockPool:
    """Holders of each block; a block with no holder is cached or free.

    Invariants: a block with a key is in `_by_key` under it; a block without holders is either in
    `_evictable` (it has a key) or in `_free`; `_counts` are the blocks by state. `verify` asserts
    after every step what can be seen of this without looking at each block, `check` all of it.

    With a `host` pool the content of an evicted block is kept there, under its key.

    All methods but `allocate` and `reserve` raise LedgerFault for blocks that are not held as the
    call says; the pool is then of no more use.
    """

    def __init__(
        self, num_blocks: int, generations: GenerationWords, host: "HostPool | None" = None
    ) -> None:
        self.total = num_blocks
        self.generations = generations
        self.host = host
        self._free = FreeRuns(num_blocks)
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._holders = [0] * num_blocks
        self._counts = [num_blocks, 0, 0, 0, 0, 0]
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
        return self._take(count, after, _OWNED)

    def reserve(self, count: int) -> list[int]:
        """Take `count` blocks for an arriving handoff, or none (M2). Raises OutOfBlocks."""
        return self._take(count, None, _RESERVED)

    def allocate_after(self, hits: Hits, count: int) -> list[int]:
        """`count` blocks in all for an owner that shares `hits.blocks` already, hits first.

        Raises:
            OutOfBlocks: the pool is unchanged.
        """
        return self._take_after(hits, count, _OWNED)

    def reserve_after(self, hits: Hits, count: int) -> list[int]:
        """The same for an arriving handoff that has pinned `hits.blocks`. Raises OutOfBlocks."""
        return self._take_after(hits, count, _RESERVED)

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for blocks that are cached or held."""
        self._pin(_OWNED, blocks)

    def pin_reserved(self, blocks: Sequence[int]) -> None:
        """Hold cache hits for an arriving handoff."""
        self._pin(_RESERVED, blocks)

    def lease(self, blocks: Sequence[int]) -> None:
        """Export: the blocks stay unchanged until `unlease`."""
        self._pin(_LEASED, blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """An owner leaves."""
        self._drop(_OWNED, blocks)

    def unlease(self, blocks: Sequence[int]) -> None:
        """An export is over."""
        self._drop(_LEASED, blocks)

    def unreserve(self, blocks: Sequence[int]) -> None:
        """A reservation is given up (no transfer into these blocks is posted)."""
        self._drop(_RESERVED, blocks)

    def adopt(self, blocks: Sequence[int]) -> None:
        """Reserved blocks become a sequence's."""
        self._pin(_OWNED, blocks)
        self._drop(_RESERVED, blocks)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """Reserved blocks that a posted transfer may still write: nobody's (Q1)."""
        self._pin(_QUARANTINED, blocks)
        self._drop(_RESERVED, blocks)

    def unquarantine(self, blocks: Sequence[int]) -> None:
        """The transfer into these blocks is terminal."""
        self._drop(_QUARANTINED, blocks)

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

    def search(self, keys: Sequence[bytes]) -> Hits:
        """The longest prefix of `keys` that is on the device or in host memory."""
        blocks = self.lookup(keys)
        slots: dict[int, int] = {}
        if self.host is not None:
            for index in range(len(blocks), len(keys)):
                block = self._by_key.get(keys[index])
                if block is not None:
                    blocks.append(block)
                    continue
                slot = self.host.find(keys[index])
                if slot is None:
                    break
                slots[index] = slot
        return Hits(keys, blocks, slots)

    def remember(self, block_id: int, key: bytes) -> None:
        """Make a full, completely computed block findable. The first block of a key stays."""
        if not self._holders[block_id]:
            raise LedgerFault(f"block {block_id} is remembered, but nobody holds it")
        if self._key[block_id] is None and key not in self._by_key:
            self._key[block_id] = key
            self._by_key[key] = block_id

    # -- the ledger -------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """Blocks by state, as counted with every change."""
        return Ledger(self.total, *self._counts)

    def verify(self) -> None:
        """Assert after a step that the counts add up and that `free` and `cached` are there.

        Costs the same whatever the size of the pool; production runs it too.

        Raises:
            LedgerFault: they do not.
        """
        counts = self._counts
        if (
            sum(counts) != self.total
            or counts[_FREE] != len(self._free)
            or counts[_CACHED] != len(self._evictable)
            or min(counts) < 0
        ):
            there = f"{len(self._free)} can be given out, {len(self._evictable)} evicted"
            raise LedgerFault(f"the block ledger does not add up: {self.ledger()}, {there}")
        if self.host is not None:
            self.host.verify()

    def faults(self) -> set[tuple[str, int]]:
        """Look at every block: what is wrong, and with which (-1: with no one in particular)."""
        found: set[tuple[str, int]] = set()
        free = Counter(self._free)
        recount = [0] * 6
        for block, holders in enumerate(self._holders):
            key = self._key[block]
            state = _STATE[holders.bit_length()] if holders or key is not None else _FREE
            recount[state] += 1
            if free[block] != (state == _FREE):
                found.add(
                    (f"{Ledger.STATES[state]}, yet listed as free {free[block]} times", block)
                )
            if (block in self._evictable) != (state == _CACHED):
                found.add((f"{Ledger.STATES[state]}, yet evictable or not", block))
            if key is not None and self._by_key.get(key) != block:
                found.add(("has a key that leads to another block", block))
        if len(self._by_key) != self.total - self._key.count(None):
            found.add(("keys lead to blocks that do not have them", -1))
        if recount != self._counts:
            found.add((f"the ledger is {self.ledger()}, recounted {recount}", -1))
        if self.host is not None:
            found |= {(what, -1) for what in self.host.faults()}
        return found

    def check(self) -> None:
        """Assert all invariants, block by block. Raises LedgerFault."""
        self.verify()
        found = self.faults()
        if found:
            raise LedgerFault("; ".join(f"{what} (block {block})" for what, block in sorted(found)))

    def holders(self, state: str) -> Counter[int]:
        """How often each block is held in a way that makes it `owned`, `leased` and so on."""
        shift = _FIELD_BITS * (Ledger.STATES.index(state) - _OWNED)
        mask = (1 << _FIELD_BITS) - 1
        held = ((block, holders >> shift & mask) for block, holders in enumerate(self._holders))
        return Counter({block: count for block, count in held if count})

    # -- inside -----------------------------------------------------------------------------

    def _take(self, count: int, after: int | None, state: int) -> list[int]:
        if count > self.available:
            raise OutOfBlocks(wanted=count, available=self.available)
        counts, holders, one = self._counts, self._holders, _ONE[state]
        while len(self._free) < count:
            block, _ = self._evictable.popitem(last=False)
            self._evict(block)
            self._free.add(block)
            counts[_CACHED] -= 1
            counts[_FREE] += 1
            self.evictions += 1
        blocks = self._free.take(count, after)
        for block in blocks:
            if holders[block]:
                raise LedgerFault(f"block {block} is free, but somebody holds it")
            holders[block] = one
        self.generations.bump(blocks)
        counts[_FREE] -= count
        counts[state] += count
        return blocks

    def _take_after(self, hits: Hits, count: int, state: int) -> list[int]:
        wanted = count - len(hits.blocks)
        if wanted > self.available:
            raise OutOfBlocks(wanted=wanted, available=self.available)
        first = min(hits.slots, default=len(hits.blocks))
        after = hits.blocks[first - 1] if first and state == _OWNED else None
        if self.host is not None:
            self.host.hold(hits.slots.values())  # what is evicted now takes none of their places
        blocks = hits.filled(self._take(wanted, after, state))
        if self.host is not None:
            for index, slot in hits.slots.items():
                self.host.load(slot, blocks[index])
                self.remember(blocks[index], hits.keys[index])
        return blocks

    def _evict(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._by_key[key]
            self._key[block] = None
            if self.host is not None:
                self.host.save(block, key)

    def _pin(self, state: int, blocks: Sequence[int]) -> None:
        """One more holder for blocks that are cached or held."""
        counts, holders, one = self._counts, self._holders, _ONE[state]
        for block in blocks:
            before = holders[block]
            if not before:
                if block not in self._evictable:
                    raise LedgerFault(f"block {block} is free, but is to be shared")
                del self._evictable[block]
            holders[block] = before + one
            if before < one:  # so far nothing decided that comes before
                counts[_STATE[before.bit_length()]] -= 1
                counts[state] += 1

    def _drop(self, state: int, blocks: Sequence[int]) -> None:
        counts, holders, one = self._counts, self._holders, _ONE[state]
        field = (one << _FIELD_BITS) - one
        # Reversed: a prefix's later blocks become evictable first, so chains shorten at the end.
        for block in reversed(blocks):
            before = holders[block]
            if not before & field:
                raise LedgerFault(f"block {block} is given back, but not {Ledger.STATES[state]}")
            after = holders[block] = before - one
            if after >= one:
                continue
            counts[state] -= 1
            if after:
                counts[_STATE[after.bit_length()]] += 1
            elif self._key[block] is None:
                counts[_FREE] += 1
                self._free.add(block)
            else:
                counts[_CACHED] += 1
                self._evictable[block] = None
