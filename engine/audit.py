"""The audit of a live worker: every hold of a block must be somebody's who lives.

The ledger's sums cannot show a leak: a block held for nobody is counted like any other. So the
holders of each block are compared with those who should have it, from both sides: sequences and
reservations as the engine knows them, requests, transfers and reads as the worker does.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from contracts.ids import RequestId
from engine.block_pool import BlockPool
from engine.sequence import Reservation, Sequence

Finding = tuple[str, int]  # what is wrong, and with which block; -1: with no one block
_SHOWN = 8  # blocks named in a line


@dataclass(frozen=True, slots=True)
class Known:
    """What a worker knows of whom blocks are held for: a copy, made at one moment.

    Args:
        requests: those that may have sequences, by id and attempt.
        leased: how many live exports list a block.
        quarantined: how many reads, given up but not terminal, may still write a block.
        reservations: those that a handoff has yet to adopt or give back; None: not told, then
            each must be of one of the `requests`.
    """

    requests: frozenset[tuple[RequestId, int]]
    leased: Counter[int] = field(default_factory=Counter)
    quarantined: Counter[int] = field(default_factory=Counter)
    reservations: frozenset[Reservation] | None = None


def audit(
    pool: BlockPool,
    sequences: list[Sequence],
    copied: list[int],
    reservations: list[Reservation],
    known: Known,
) -> set[Finding]:
    """What is wrong. `copied`: blocks pinned as sources of copies that are not made yet."""
    found = pool.faults()
    owned = Counter(copied)
    for seq in sequences:
        owned.update(seq.block_ids)
    reserved = Counter[int]()
    for reservation in reservations:
        reserved.update(reservation.blocks + reservation.spare)
    for state, expected, who in (
        ("owned", owned, "sequence"),
        ("reserved", reserved, "reservation"),
        ("leased", known.leased, "transfer"),
        ("quarantined", known.quarantined, "read"),
    ):
        held = pool.holders(state)
        found |= {(f"is {state}, but for no {who}", block) for block in held - expected}
        found |= {(f"a {who} has it, but it is not {state}", block) for block in expected - held}
    for seq in sequences:
        if _key(seq) not in known.requests:
            found.add((f"a sequence of {_name(seq)}, which the worker does not know", -1))
    if known.reservations is None:
        lost = {r for r in reservations if _key(r) not in known.requests}
        over: set[Reservation] = set()
    else:
        kept = {reservation for reservation in known.reservations if not reservation.reclaimed}
        lost, over = set(reservations) - kept, kept - set(reservations)
    found |= {(f"no handoff has the reservation of {_name(r)}", -1) for r in lost}
    found |= {(f"a handoff has a reservation of {_name(r)} that is over", -1) for r in over}
    return found


def lines(found: Iterable[Finding]) -> list[str]:
    """Findings for people: one line for each kind."""
    blocks: dict[str, list[int]] = {}
    for what, block in sorted(found):
        blocks.setdefault(what, []).append(block)
    return [_line(what, those) for what, those in blocks.items()]


def _line(what: str, blocks: list[int]) -> str:
    if blocks == [-1]:
        return what
    more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
    return f"blocks {', '.join(map(str, blocks[:_SHOWN]))}{more}: {what}"


def _key(item: Sequence | Reservation) -> tuple[RequestId, int]:
    return item.request.request_id, item.request.attempt


def _name(item: Sequence | Reservation) -> str:
    return f"request {item.request.request_id}, attempt {item.request.attempt}"
