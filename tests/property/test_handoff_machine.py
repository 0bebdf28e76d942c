"""Both sides of handoffs, explored: P's exports, D's machine, their memory, and a bad network.

Real: ExportTable, HandoffMachine, Quarantine, and D's scheduler and pool. Simulated: the link, the
connector (each block lands on its own, late, after everything), the clock, and what the blocks
contain. Whatever happens in whichever order: only P's own data is ever joined, no read writes a
block that is somebody else's, both ledgers add up, and in the end nobody holds anything.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from contracts.errors import OutOfBlocks, TransferFailed
from contracts.events import TokensOut
from contracts.handoff import ChunkReady, ClaimDenied, ClaimGranted, FirstTokens, Revoked
from contracts.ids import BlockId, RequestId, TransferId
from decode_worker import machine as m
from decode_worker.quarantine import Quarantine
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import blocks_for
from tests.support.handoff_world import BLOCK, ROOM, Content, Driver, Link, Prefill, Read


class Handoffs(RuleBasedStateMachine):
    @initialize()
    def build(self) -> None:
        self.now = 100.0
        self.incarnations = 1
        self.p = Prefill(1, self)
        self.old: list[Prefill] = []
        config = SchedulerConfig(block_size=BLOCK, max_model_len=64, max_running=8)
        self.pool = BlockPool(ROOM, GenerationWords(ROOM, 7))
        self.scheduler = Scheduler(config, self.pool)
        self.quarantine = Quarantine(self.pool.unquarantine, lambda: self.now)
        self.content: list[Content] = [("nothing",)] * ROOM
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.link: Link | None = None
        self.drivers: list[Driver] = []
        self.reads: list[Read] = []
        self.prefilling: dict[str, int] = {}  # computed tokens
        self.export(9, 1)
        self.export(6, 1)

    def kv(self, name: str, index: int) -> Content:
        """What block `index` of a prompt contains: its tokens and all before them."""
        return ("kv", self.prompts[name][: (index + 1) * BLOCK])

    # -- P --------------------------------------------------------------------------------

    @rule(length=st.integers(1, 22), prefix=st.integers(0, 2))
    def export(self, length: int, prefix: int) -> None:
        if sum(not driver.finished for driver in self.drivers) >= 4:
            return
        name = f"t{len(self.prompts)}"
        fresh = tuple(range(1000 * len(self.prompts), 1000 * len(self.prompts) + length))
        shared = tuple(range(-BLOCK * prefix, 0))
        prompt = tuple(abs(token) for token in shared + fresh)
        count = blocks_for(len(prompt), BLOCK)
        try:
            blocks = self.p.pool.allocate(count)
        except OutOfBlocks:
            return
        self.prompts[name] = prompt
        self.p.pool.lease(blocks)
        self.p.pool.release(blocks)
        ids = [BlockId(block) for block in blocks]
        self.p.exports.create(TransferId(name), ids, len(prompt), "digest")
        self.prefilling[name] = 0
        self.drivers.append(Driver(self, name, self.p, tuple(blocks)))

    @rule(which=st.integers(0, 5), step=st.integers(1, 12))
    def compute(self, which: int, step: int) -> None:
        """P computes a chunk, or ends the prefill."""
        driver = self.pick(which)
        if driver is not None:
            self.compute_for(driver, step)

    def compute_for(self, driver: Driver, step: int) -> None:
        if driver.p is not self.p or driver.name not in self.prefilling:
            return
        name, prompt = driver.name, self.prompts[driver.name]
        export = self.p.exports.get(TransferId(name))
        if export is None:  # ended: the prefill was stopped with it
            del self.prefilling[name]
            return
        done = min(len(prompt), self.prefilling[name] + step)
        for index in range(blocks_for(done, BLOCK)):
            self.p.content[driver.p_blocks[index]] = self.kv(name, index)
        self.prefilling[name] = done
        ready = done if done == len(prompt) else done // BLOCK * BLOCK
        link = self.p.exports.ready(TransferId(name), ready)
        if isinstance(link, Link):
            link.down.append(ChunkReady(TransferId(name), ready))
        if done == len(prompt):
            del self.prefilling[name]
            first = (TokensOut(RequestId(name), 0, 0, 0, (5,)),)
            link = self.p.exports.complete(TransferId(name), first)
            if isinstance(link, Link):
                link.down.append(FirstTokens(TransferId(name), first))

    @rule(steps=st.lists(st.integers(0, 8), min_size=6, max_size=40), which=st.integers(0, 5))
    def go_on(self, steps: list[int], which: int) -> None:
        """What a good day brings, in some order; the other rules are the bad ones."""
        for step in steps:
            index = which if step % 2 else which + 1
            self._one_step(step, index)

    more = go_on  # thrice as often as each of the others
    still_more = go_on

    def _one_step(self, step: int, which: int) -> None:
        match step:
            case 0:
                self.connect(works=True, which=which)
            case 1:
                self.deliver_up(2)
            case 2:
                self.deliver_down(2)
            case 3:
                self.reserve(which, give_up=False)
            case 4:
                self.compute(which, 5)
            case 5:
                self.land(which, 1)
            case 6:
                self.land(which + 1, 2)
            case 7:
                self.join(which)
            case 8:
                self.tell_reclaimed(which)

    @rule(
        which=st.integers(0, 5),
        reason=st.sampled_from(["pressure", "ended", "aborted"]),
        tell=st.booleans(),
        scribble=st.booleans(),
    )
    def revoke(self, which: int, reason: str, tell: bool, scribble: bool) -> None:
        """P takes a transfer back, with or without a word (L5), and uses its blocks."""
        driver = self.pick(which)
        if driver is not None and driver.p is self.p:
            if not tell and reason == "ended":
                reason = "aborted"
            self.p.finish(self.p.exports.revoke(TransferId(driver.name), reason), tell=tell)
            if scribble:
                self.p.scribble(self.p.pool.available)

    @rule(count=st.integers(1, ROOM))
    def scribble(self, count: int) -> None:
        self.p.scribble(min(count, self.p.pool.available) or 1)

    @rule(which=st.integers(0, 5))
    def reuse(self, which: int) -> None:
        """P breaks its word: it gives exported blocks to another while D may read them."""
        self.revoke(which, "pressure", tell=False, scribble=True)

    @rule()
    def expire(self) -> None:
        for ended in self.p.exports.expired():
            self.p.finish(ended)

    @rule(really=st.integers(0, 3))
    def restart(self, really: int) -> None:
        """P dies; another begins under the same address."""
        if really:
            return
        self.incarnations += 1
        self.p.alive = False
        self.old.append(self.p)
        self.lose_link()
        self.p = Prefill(self.incarnations, self)
        self.prefilling.clear()

    # -- the link -------------------------------------------------------------------------

    @rule(works=st.booleans(), which=st.integers(0, 5))
    def connect(self, works: bool, which: int) -> None:
        driver = self.pick(which)
        if driver is None or not driver.connecting:
            return
        driver.connecting = False
        if not works:
            driver.do(driver.machine.unreachable(TransferFailed("no answer")))
            return
        if self.link is None:
            self.link = Link(self.p, acknowledged_at=self.now)
        driver.link = self.link
        driver.do(driver.machine.linked(self.link.p.incarnation, self.now))

    @rule()
    def lose_link(self) -> None:
        link, self.link = self.link, None
        if link is None:
            return
        link.open = False
        link.p.exports.lost_claimer(link)
        for driver in self.drivers:
            if driver.link is link:
                driver.do(driver.machine.link_lost(driver.lease_until - self.now))

    @rule()
    def beat(self) -> None:
        if self.link is not None:
            self.link.p.exports.renew(self.link)
            self.link.acknowledged_at = self.now

    @rule(count=st.integers(1, 4))
    def deliver_up(self, count: int) -> None:
        for _ in range(count):
            if self.link is not None and self.link.up:
                self.link.p.receive(self.link, self.link.up.popleft())

    @rule(count=st.integers(1, 4))
    def deliver_down(self, count: int) -> None:
        for _ in range(count):
            if self.link is not None and self.link.down:
                self.tell(self.link, self.link.down.popleft())

    def tell(self, link: Link, message: object) -> None:
        name = getattr(message, "transfer_id", None)
        for driver in self.drivers:
            if driver.name != name or driver.link is not link:
                continue
            machine = driver.machine
            match message:
                case ClaimGranted():
                    driver.do(machine.granted(message, self.now))
                case ClaimDenied():
                    driver.do(machine.denied(TransferFailed(message.message)))
                case ChunkReady():
                    driver.do(machine.chunk_ready(message.ready_tokens, self.now))
                case FirstTokens():
                    driver.do(machine.first_tokens_came(message.tokens, self.now))
                case Revoked():
                    driver.do(machine.revoked(message.reason))

    # -- D --------------------------------------------------------------------------------

    @rule(which=st.integers(0, 5), give_up=st.booleans())
    def reserve(self, which: int, give_up: bool) -> None:
        driver = self.pick(which)
        if driver is None or driver.wants is None:
            return
        number = driver.wants
        try:
            reservation = self.scheduler.reserve(
                driver.request, None, lambda: driver.reclaimed.append(number)
            )
        except OutOfBlocks:
            if give_up:
                driver.wants = None
                driver.do(driver.machine.no_memory(number, TransferFailed("no room")))
            return
        driver.wants = None
        driver.reservation, driver.reserved_number = reservation, number
        driver.do(driver.machine.reserved(number, reservation.num_hits))

    @rule()
    def reclaim(self) -> None:
        """A decode needs a block (M3)."""
        self.scheduler._handoffs.reclaim_youngest()

    @rule(which=st.integers(0, 5))
    def tell_reclaimed(self, which: int) -> None:
        driver = self.pick(which)
        if driver is not None and driver.reclaimed:
            driver.do(driver.machine.reclaimed(driver.reclaimed.pop(0)))

    @rule(which=st.integers(0, 5))
    def join(self, which: int) -> None:
        driver = self.pick(which)
        if driver is not None and driver.joining and driver.finished == 0:
            driver.join()

    @rule(which=st.integers(0, 5))
    def end_sequence(self, which: int) -> None:
        """The joined request is over: its blocks are cached, and evicted some time."""
        driver = self.pick(which)
        if driver is not None and driver.joined:
            self.scheduler.abort(driver.request.request_id, 0)

    @rule(which=st.integers(0, 5), really=st.integers(0, 2))
    def abort(self, which: int, really: int) -> None:
        driver = self.pick(which)
        if driver is not None and not really:
            driver.do(driver.machine.abort())

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for driver in self.drivers:
            driver.do(driver.machine.tick(self.now, driver.heard_at))

    # -- reads ----------------------------------------------------------------------------

    @rule(which=st.integers(0, 9), count=st.integers(1, 3))
    def land(self, which: int, count: int) -> None:
        """Some blocks of a posted read arrive, however late."""
        if not self.reads:
            return
        read = self.reads[which % len(self.reads)]
        for _ in range(min(count, len(read.left))):
            source, target = read.left.pop()
            if not read.p.alive:
                continue
            assert self.may_be_written(target), "a late read writes another's block"
            if read.verifying:
                (read.landed_words[target],) = read.p.words.read([source])
            else:
                self.content[target] = read.p.content[source]
            if not read.left and read.fence and not read.verifying and not read.told:
                read.left, read.verifying = list(read.fence), True
        if not read.left:
            self.ended(read, failed=not read.p.alive)

    def may_be_written(self, block: int) -> bool:
        held = self.pool.holders("reserved") + self.pool.holders("quarantined")
        return bool(held[block])

    @rule(which=st.integers(0, 9))
    def time_out(self, which: int) -> None:
        """D gives a read up; it goes on all the same."""
        if self.reads:
            read = self.reads[which % len(self.reads)]
            self.result(read, failed=True)

    def ended(self, read: Read, *, failed: bool) -> None:
        if read in self.reads:
            self.reads.remove(read)
        driver = read.handoff
        self.quarantine.terminal((driver, read.number))
        driver.do(driver.machine.terminal(read.number))
        self.result(read, failed=failed)

    def result(self, read: Read, *, failed: bool) -> None:
        if read.told:
            return
        read.told = True
        machine = read.handoff.machine
        if failed:
            read.handoff.do(machine.read_failed(read.number, TransferFailed("read")))
        elif read.verifying:
            found = [read.landed_words[target] for _, target in read.fence]
            read.handoff.do(machine.words(read.number, found, self.now))
        else:
            read.handoff.do(machine.read_done(read.number, self.now))

    # -- always -----------------------------------------------------------------------------

    def pick(self, which: int) -> Driver | None:
        """One of those that are not over, and sometimes one that is."""
        live = [driver for driver in self.drivers if not driver.finished]
        some = live if live and which < 5 else self.drivers
        return some[which % len(some)] if some else None

    @invariant()
    def ledgers_add_up(self) -> None:
        self.pool.check()
        self.p.pool.check()

    @invariant()
    def a_waiting_handoff_holds_nothing(self) -> None:
        """M2, and what is over has said so once."""
        for driver in self.drivers:
            over = driver.machine.state in (m.HandoffState.RUN, m.HandoffState.OVER)
            assert driver.finished == over
            if driver.machine.state is m.HandoffState.OVER:
                assert driver.reservation is None or driver.reservation.reclaimed

    def teardown(self) -> None:
        if not hasattr(self, "drivers"):
            return
        for _ in range(60):  # all that waits happens, and time passes
            for driver in self.drivers:
                self.compute_for(driver, 12)
            for index in range(5):
                self.connect(works=True, which=index)
                self.reserve(index, give_up=True)
                self.tell_reclaimed(index)
                self.join(index)
            self.deliver_up(4)
            self.deliver_down(4)
            for index in range(len(self.reads)):
                self.land(index, 3)
            self.pass_time(0.5)
            self.beat()
            self.expire()
        for driver in self.drivers:
            assert driver.finished == 1, "a handoff waits without end"
            self.scheduler.abort(driver.request.request_id, 0)
        assert not self.reads
        assert self.pool.ledger().idle, self.pool.ledger()
        assert not len(self.p.exports)
        assert self.p.pool.ledger().idle, self.p.pool.ledger()


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
