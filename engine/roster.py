"""Which sequences wait and which run, and how they come by their blocks and lose them."""

from bisect import insort
from collections.abc import Callable

from contracts.errors import OutOfBlocks
from contracts.request import GenerationRequest
from engine.block_pool import BlockPool
from engine.guide import Guide
from engine.sequence import Sequence, blocks_for, extend_keys


class Roster:
    """All sequences of one engine, in the order in which they are served.

    A waiting sequence holds no block. A running one holds all blocks of its known tokens (M1).
    One in neither list is a beam whose blocks were taken while it waits for the others.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, prefix_caching: bool) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.by_key: dict[int, Sequence] = {}
        self.waiting_tokens = 0  # of all that wait
        self.preemptions = 0
        self.relief: Callable[[], bool] = lambda: False  # frees blocks nobody uses yet (M3)
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._exports = 0  # of the running
        self._copies: list[tuple[int, int]] = []  # (source, target); the source is pinned
        self._over: list[int] = []  # keys of those that have ended
        self._next_key = 0
        self._next_arrival = 0

    # -- sequences --------------------------------------------------------------------------

    def arrive(self) -> int:
        """The next place in the order of arrival."""
        self._next_arrival += 1
        return self._next_arrival

    def create(
        self,
        request: GenerationRequest,
        choices: tuple[int, ...],
        token_ids: list[int],
        arrival: int,
        guide: Guide | None,
    ) -> Sequence:
        """A sequence that neither waits nor runs yet."""
        self._next_key += 1
        seq = Sequence(self._next_key, request, choices, token_ids, arrival, guide)
        self.by_key[seq.key] = seq
        return seq

    def queue(self, seq: Sequence) -> None:
        """Let it wait for its blocks."""
        insort(self.waiting, seq, key=lambda s: s.order)
        self.waiting_tokens += len(seq.token_ids)

    def run(self, seq: Sequence) -> None:
        """Let it run: it has its blocks."""
        insort(self.running, seq, key=lambda s: s.order)
        self._exports += seq.export

    def detach(self, seq: Sequence) -> None:
        """Take it out of both lists; it keeps its blocks."""
        if seq in self.running:
            self._stop(seq)
        elif seq in self.waiting:
            self._unqueue(seq)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._exports -= seq.export

    def _unqueue(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self.waiting_tokens -= len(seq.token_ids)

    def end(self, seq: Sequence) -> None:
        """It is over; its blocks are free."""
        self.detach(seq)
        self._free(seq)
        del self.by_key[seq.key]
        self._over.append(seq.key)

    def take_over_keys(self) -> list[int]:
        """Keys of the sequences that have ended since the last call."""
        over, self._over = self._over, []
        return over

    # -- blocks -----------------------------------------------------------------------------

    def headroom(self) -> int:
        """Blocks kept for the growth of running decodes: one each (M3)."""
        return len(self.running) - self._exports

    def admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens; False: they are not there."""
        size = self.block_size
        length = len(seq.token_ids)
        count = 0
        if self._prefix_caching and not seq.scored:  # a score needs its token computed
            # The last token is always computed: its logits are not in the cache (F3).
            count = (length - 1) // size
            self._extend_keys(seq, count)
        hits = self.pool.search(seq.block_keys[:count])
        self.pool.share(hits.blocks)
        need = blocks_for(length, size)
        if need - len(hits.blocks) > self.pool.available - self.headroom():
            self.pool.release(hits.blocks)
            return False
        seq.block_ids = tuple(self.pool.allocate_after(hits, need))
        seq.num_computed = len(hits) * size
        seq.num_remembered = len(hits)
        self._unqueue(seq)
        self.run(seq)
        return True

    def grow(self, seq: Sequence) -> bool:
        """Give `seq` the block its next token needs, preempting later ones if it must."""
        if seq.key not in self.by_key or not seq.block_ids:
            return False  # preempted earlier in this step
        while len(seq.block_ids) < blocks_for(len(seq.token_ids), self.block_size):
            try:
                seq.block_ids = (*seq.block_ids, *self.pool.allocate(1, seq.block_ids[-1]))
            except OutOfBlocks:
                if self.relief():
                    continue
                victim = max(
                    (s for s in self.running if not s.export), key=lambda s: s.order, default=seq
                )
                self.preempt(victim)
                if victim is seq:
                    return False
        return True

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it is computed again later.

        A beam that has its candidates keeps them, and needs no block until it goes on.
        """
        self.preemptions += 1
        self._stop(seq)
        self._free(seq)
        seq.num_computed = seq.num_remembered = 0
        if seq.candidates is None:
            self.queue(seq)

    def fork(self, parent: Sequence, choice: int, token_id: int) -> Sequence:
        """A further choice: full blocks shared, the partly filled last one copied.

        Without blocks, the parent's or one for the copy, it waits and is computed again.
        """
        size = self.block_size
        full, partial = divmod(parent.num_computed, size)
        child = self.create(
            parent.request,
            (choice,),
            [*parent.token_ids, token_id],
            parent.arrival,
            parent.guide,
        )
        child.started = True
        child.block_keys = parent.block_keys[:full]
        if not parent.block_ids or (partial and self.pool.available == 0):
            self.queue(child)
            return child
        self.take_over(child, parent.block_ids, parent.num_computed, None)
        self.run(child)
        return child

    def take_over(
        self, child: Sequence, blocks: tuple[int, ...], num_computed: int, spare: int | None
    ) -> None:
        """Let `child` begin with what `blocks` hold; `spare`: a block of its own for the copy."""
        full, partial = divmod(num_computed, self.block_size)
        shared = blocks[:full]
        self.pool.share(shared)
        child.block_ids = shared
        if spare is None and partial:
            spare = self.pool.allocate(1)[0]
        if spare is not None:
            child.block_ids = (*shared, spare)
            if partial:
                self.pool.share(blocks[full : full + 1])
                self._copies.append((blocks[full], spare))
        child.num_computed = num_computed
        child.num_remembered = full

    def remember(self, seq: Sequence) -> None:
        """Make the full blocks that are computed findable."""
        full = seq.num_computed // self.block_size
        if not self._prefix_caching or full <= seq.num_remembered:
            return
        self._extend_keys(seq, full)
        for index in range(seq.num_remembered, full):
            self.pool.remember(seq.block_ids[index], seq.block_keys[index])
        seq.num_remembered = full

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The copies (source, target) that the next step must make; `copied` ends them."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def copy_sources(self) -> list[int]:
        """The blocks pinned for copies that no step has taken yet."""
        return [source for source, _ in self._copies]

    def copied(self, copies: tuple[tuple[int, int], ...]) -> None:
        """They are made."""
        self.pool.release([source for source, _ in copies])

    def _free(self, seq: Sequence) -> None:
        if self._copies:
            held = set(seq.block_ids)
            dropped = [copy for copy in self._copies if copy[1] in held]
            if dropped:  # a copy into a block that is given back must never run
                self._copies = [copy for copy in self._copies if copy[1] not in held]
                self.pool.release([source for source, _ in dropped])
        self.pool.release(seq.block_ids)
        seq.block_ids = ()
        seq.stream = None

    def _extend_keys(self, seq: Sequence, count: int) -> None:
        extend_keys(seq.block_keys, seq.token_ids, self.block_size, seq.request.cache_salt, count)
