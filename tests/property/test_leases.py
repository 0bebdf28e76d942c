"""ExportTable against a model: blocks come back once, claims have one owner, time decides."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from contracts.errors import ClaimRefused, TransferFailed, TransferGone
from contracts.events import TokensOut
from contracts.handoff import ClaimGranted
from contracts.ids import BlockId, RequestId, TransferId
from kv_transfer.leases import Ended, ExportState, ExportTable

LEASE_S = 2.0
A, B, C = TransferId("a"), TransferId("b"), TransferId("c")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def generations(block_ids: Sequence[BlockId]) -> list[int]:
    return [block * 1000 + 7 for block in block_ids]


def ids(*blocks: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in blocks)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> ExportTable:
    table = ExportTable(LEASE_S, clock)
    table.create(A, ids(1, 2), num_tokens=30, prompt_digest="d")
    return table


def claim(table: ExportTable, nonce: str = "n", claimer: str = "link") -> ClaimGranted:
    return table.claim(A, nonce, "d", claimer, generations)


def test_a_claim_is_granted_once_and_repeated(table: ExportTable) -> None:
    """C1, C2."""
    first = claim(table)
    assert (first.block_ids, first.generations, first.num_tokens) == ((1, 2), (1007, 2007), 30)
    assert (first.ready_tokens, first.lease_ms, first.first_tokens) == (0, 2000, ())
    assert claim(table) == first
    with pytest.raises(ClaimRefused, match="another D"):
        claim(table, nonce="other")


def test_a_repeated_claim_keeps_its_generations_and_sees_the_readiness_of_now(
    table: ExportTable,
) -> None:
    first = claim(table)
    assert table.ready(A, 16) == "link"
    tokens = (TokensOut(RequestId("r"), 0, 0, 0, (5,)),)
    assert table.complete(A, tokens) == "link"
    again = table.claim(A, "n", "d", "link", lambda _: [0, 0])
    assert (again.generations, again.ready_tokens, again.first_tokens) == (
        first.generations,
        30,
        tokens,
    )


def test_another_digest_is_refused_with_both_values(table: ExportTable) -> None:
    with pytest.raises(ClaimRefused, match="here d, claimed x"):
        table.claim(A, "n", "x", "link", generations)
    export = table.get(A)
    assert export is not None
    assert not export.claimed


def test_an_ended_or_unknown_transfer_is_gone(table: ExportTable, clock: Clock) -> None:
    assert table.release(A) is not None
    with pytest.raises(TransferGone, match="released"):
        claim(table)
    with pytest.raises(TransferGone, match="unknown"):
        table.claim(B, "n", "d", "link", generations)
    assert table.ended(A) == "released"
    clock.now += 10 * LEASE_S
    assert table.ended(A) is None
    with pytest.raises(TransferGone):
        claim(table)


def test_what_nobody_reads_is_taken_back_first(table: ExportTable, clock: Clock) -> None:
    """L6: unclaimed, then claimed and not begun; never in prefill, never while it is read."""
    for name in (B, C):
        table.create(name, [BlockId(7)], 16, "d")
    assert table.revocable() == []
    for name in (A, B, C):
        table.complete(name)
    claim(table)
    assert table.revocable() == [B, C, A]
    table.reading(A, "another link")
    assert table.revocable() == [B, C, A]
    table.reading(A, "link")
    assert table.revocable() == [B, C]


def test_a_nonce_proves_the_claimer_over_any_link(table: ExportTable) -> None:
    assert not table.is_claimer(A, "link", "n"), "nobody has claimed it"
    claim(table)
    assert table.is_claimer(A, "link", "")
    assert table.is_claimer(A, "new link", "n")
    assert not table.is_claimer(A, "new link", "x")
    assert not table.is_claimer(B, "link", "n")


def test_what_p_gave_up_itself_is_no_fault_of_the_bearer(table: ExportTable) -> None:
    assert table.revoke(A, "pressure") is not None
    with pytest.raises(TransferFailed, match="pressure"):
        claim(table)


def test_readiness_never_goes_back_and_is_told_once(table: ExportTable) -> None:
    claim(table)
    told = [table.ready(A, tokens) for tokens in (8, 4, 8, 16)]
    assert told == ["link", None, None, "link"]
    export = table.get(A)
    assert export is not None
    assert export.ready_tokens == 16


def test_an_id_is_used_once(table: ExportTable) -> None:
    with pytest.raises(ValueError, match="once"):
        table.create(A, ids(3), 1, "d")
    table.release(A)
    with pytest.raises(ValueError, match="once"):
        table.create(A, ids(3), 1, "d")


def test_an_unclaimed_lease_starts_at_the_end_of_prefill(table: ExportTable, clock: Clock) -> None:
    """L2."""
    clock.now += 100 * LEASE_S
    assert table.expired() == []
    table.complete(A)
    clock.now += LEASE_S - 0.01
    assert table.expired() == []
    clock.now += 0.01
    assert table.expired() == [Ended(A, ids(1, 2), "expired", in_prefill=False, claimer=None)]
    assert table.expired() == []


def test_the_two_step_path_waits_longer(clock: Clock) -> None:
    table = ExportTable(LEASE_S, clock)
    table.create(A, ids(1), 1, "d", unclaimed_lease_s=30.0)
    table.complete(A)
    clock.now += 29.0
    assert table.expired() == []
    claim(table)
    clock.now += LEASE_S
    assert [end.transfer_id for end in table.expired()] == [A]  # claimed: the short one


def test_a_claim_without_beats_expires_even_while_the_prefill_runs(
    table: ExportTable, clock: Clock
) -> None:
    claim(table)
    clock.now += LEASE_S
    assert table.expired() == [Ended(A, ids(1, 2), "expired", in_prefill=True, claimer="link")]


def test_a_beat_renews_all_claims_of_its_link_and_no_other(
    table: ExportTable, clock: Clock
) -> None:
    table.create(B, ids(3), 1, "d")
    claim(table)
    table.claim(B, "n", "d", "other link", generations)
    clock.now += LEASE_S / 2
    assert table.renew("link") == 1
    clock.now += LEASE_S / 2
    assert [end.transfer_id for end in table.expired()] == [B]


def test_a_lost_link_stops_renewal_only_and_the_same_nonce_may_come_back(
    table: ExportTable, clock: Clock
) -> None:
    """L3."""
    claim(table)
    table.lost_claimer("link")
    assert table.renew("link") == 0
    clock.now += LEASE_S / 2
    with pytest.raises(ClaimRefused):
        claim(table, nonce="thief")
    claim(table, claimer="new link")
    clock.now += LEASE_S / 2
    assert table.expired() == []
    assert table.renew("new link") == 1
    assert table.release(A) == Ended(A, ids(1, 2), "released", True, "new link")


def test_late_news_of_an_ended_transfer_is_nothing(table: ExportTable) -> None:
    table.release(A)
    assert table.release(A) is None
    assert table.revoke(A, "aborted") is None
    assert table.ready(A, 5) is None
    assert table.complete(A) is None
    assert (len(table), list(table)) == (0, [])


@dataclass
class Model:
    """One transfer as the rules say it should be."""

    block_ids: tuple[BlockId, ...]
    num_tokens: int
    complete: bool = False
    ready_tokens: int = 0
    nonce: str | None = None
    link: str | None = None
    deadline: float | None = None
    grant: ClaimGranted | None = None


class Leases(RuleBasedStateMachine):
    """Random histories of prefills, claims, beats, losses and time."""

    transfers: Bundle[TransferId] = Bundle("transfers")
    nonces = st.sampled_from(["n1", "n2"])
    links = st.sampled_from(["l1", "l2"])

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.table = ExportTable(LEASE_S, self.clock)
        self.live: dict[TransferId, Model] = {}
        self.given: Counter[BlockId] = Counter()
        self.freed: Counter[BlockId] = Counter()
        self.serial = itertools.count()

    def take(self, end: Ended | None, transfer_id: TransferId) -> None:
        """An end is told exactly when the model's transfer lives, and with its blocks."""
        model = self.live.pop(transfer_id, None)
        assert (end is None) == (model is None)
        if end is not None and model is not None:
            assert end.transfer_id == transfer_id
            assert end.block_ids == model.block_ids
            assert end.in_prefill == (not model.complete)
            assert end.claimer == model.link
            self.freed.update(end.block_ids)

    @rule(target=transfers, num_blocks=st.integers(1, 4))
    def create(self, num_blocks: int) -> TransferId:
        transfer_id = TransferId(f"t{next(self.serial)}")
        blocks = ids(*(int(transfer_id[1:]) * 10 + i for i in range(num_blocks)))
        self.table.create(transfer_id, blocks, num_blocks * 4, "digest")
        self.live[transfer_id] = Model(blocks, num_blocks * 4)
        self.given.update(blocks)
        return transfer_id

    @rule(transfer_id=transfers, tokens=st.integers(0, 16))
    def ready(self, transfer_id: TransferId, tokens: int) -> None:
        self.table.ready(transfer_id, tokens)
        if transfer_id in self.live:
            model = self.live[transfer_id]
            model.ready_tokens = max(model.ready_tokens, min(tokens, model.num_tokens))

    @rule(transfer_id=transfers)
    def complete(self, transfer_id: TransferId) -> None:
        self.table.complete(transfer_id)
        model = self.live.get(transfer_id)
        if model is not None and not model.complete:
            model.complete = True
            model.ready_tokens = model.num_tokens
            if model.nonce is None:
                model.deadline = self.clock.now + LEASE_S

    @rule(transfer_id=transfers, nonce=nonces, link=links, right=st.booleans())
    def claim(self, transfer_id: TransferId, nonce: str, link: str, right: bool) -> None:
        digest = "digest" if right else "other"
        model = self.live.get(transfer_id)
        if model is None:
            with pytest.raises((TransferGone, TransferFailed)):
                self.table.claim(transfer_id, nonce, digest, link, generations)
            return
        if not right or model.nonce not in (None, nonce):
            with pytest.raises(ClaimRefused):
                self.table.claim(transfer_id, nonce, digest, link, generations)
            return
        grant = self.table.claim(transfer_id, nonce, digest, link, generations)
        assert grant.ready_tokens == model.ready_tokens
        if model.grant is not None:
            assert grant.block_ids == model.grant.block_ids
            assert grant.generations == model.grant.generations
        model.grant, model.nonce, model.link = grant, nonce, link
        model.deadline = self.clock.now + LEASE_S

    @rule(link=links)
    def beat(self, link: str) -> None:
        mine = [model for model in self.live.values() if model.link == link]
        assert self.table.renew(link) == len(mine)
        for model in mine:
            model.deadline = self.clock.now + LEASE_S

    @rule(link=links)
    def lose(self, link: str) -> None:
        self.table.lost_claimer(link)
        for model in self.live.values():
            if model.link == link:
                model.link = None

    @rule(transfer_id=transfers)
    def release(self, transfer_id: TransferId) -> None:
        self.take(self.table.release(transfer_id), transfer_id)

    @rule(transfer_id=transfers)
    def revoke(self, transfer_id: TransferId) -> None:
        self.take(self.table.revoke(transfer_id, "aborted"), transfer_id)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        over = {
            transfer_id
            for transfer_id, model in self.live.items()
            if model.deadline is not None and model.deadline <= self.clock.now
        }
        ends = self.table.expired()
        assert {end.transfer_id for end in ends} == over
        for end in ends:
            assert end.reason == "expired"
            self.take(end, end.transfer_id)

    @invariant()
    def every_block_is_either_exported_or_freed_once(self) -> None:
        if not hasattr(self, "table"):
            return
        exported = Counter(block for export in self.table for block in export.block_ids)
        assert exported + self.freed == self.given
        assert {export.transfer_id for export in self.table} == self.live.keys()
        for export in self.table:
            model = self.live[export.transfer_id]
            assert export.ready_tokens == model.ready_tokens
            assert (export.state is ExportState.READY) == model.complete
            assert export.claimed == (model.nonce is not None)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
