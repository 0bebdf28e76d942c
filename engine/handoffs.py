"""Handoffs arriving at a D: blocks reserved for them, and how they become sequences."""

from collections.abc import Callable, Iterable

from contracts.errors import OutOfBlocks
from contracts.events import TokensOut
from contracts.request import GenerationRequest
from engine.beam_group import BeamGroup, told
from engine.beams import BeamSearch
from engine.guide import Guide
from engine.roster import Roster
from engine.sequence import Reservation, blocks_for, extend_keys


class Handoffs:
    """The open reservations of one engine. `arriving` counts their sequences."""

    def __init__(self, roster: Roster, block_size: int, *, prefix_caching: bool) -> None:
        self._roster = roster
        self._pool = roster.pool
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self.arriving = 0
        self.open: list[Reservation] = []  # oldest first
        roster.relief = self.reclaim_youngest

    def reserve(
        self,
        request: GenerationRequest,
        keys: list[bytes],
        on_reclaimed: Callable[[], None] | None = None,
    ) -> Reservation:
        """Reserve all that an arriving handoff needs (M2), outside the growth headroom (M3).

        `on_reclaimed` is called, in the engine's thread, if it is taken back before use. Without
        it, it is not.

        Raises:
            OutOfBlocks: nothing was reserved.
        """
        size, pool = self._block_size, self._pool
        length = len(request.prompt_ids)
        extend_keys(keys, list(request.prompt_ids), size, request.cache_salt, length // size)
        # Whoever draws here computes the last prompt token: in a block of its own (F3).
        usable = keys[: (length - 1) // size] if request.redraw else keys
        hits = pool.search(usable if self._prefix_caching else [])
        pool.pin_reserved(hits.blocks)
        spare_count = request.params.n - 1
        count = blocks_for(length + 1, size)
        try:
            wanted = count - len(hits.blocks) + spare_count
            room = pool.available - self._roster.headroom()
            if wanted > room:
                raise OutOfBlocks(wanted, room)
            blocks = pool.reserve_after(hits, count)
        except OutOfBlocks:
            pool.unreserve(hits.blocks)
            raise
        spare = pool.reserve(spare_count) if spare_count else []
        self.arriving += request.params.n
        reservation = Reservation(request, blocks, len(hits), spare, keys, on_reclaimed)
        self.open.append(reservation)
        return reservation

    def reclaim_youngest(self) -> bool:
        """Take the youngest reservation back that nothing was posted into (M3)."""
        for reservation in reversed(self.open):
            if reservation.on_reclaimed is not None and reservation.reclaim():
                self._close(reservation)
                self._pool.unreserve(reservation.blocks + reservation.spare)
                reservation.on_reclaimed()
                return True
        return False

    def _close(self, reservation: Reservation) -> None:
        self.open.remove(reservation)
        self.arriving -= reservation.request.params.n

    def unreserve(self, reservation: Reservation, in_flight: Iterable[int]) -> None:
        """Give a reservation up; blocks in `in_flight` may still be written and are quarantined."""
        if reservation.reclaimed:
            return
        self._close(reservation)
        posted = set(in_flight)
        every = reservation.blocks + reservation.spare
        self._pool.quarantine([b for b in every if b in posted])
        self._pool.unreserve([b for b in every if b not in posted])

    def adopt(
        self,
        reservation: Reservation,
        first: Iterable[TokensOut],
        guide: Guide | None,
        max_outputs: int,
    ) -> list[TokensOut]:
        """Start sequences from verified blocks; what is to be told if they are over already."""
        request = reservation.request
        self._close(reservation)
        self._pool.adopt(reservation.blocks)
        self._pool.adopt(reservation.spare)
        num_computed = len(request.prompt_ids) - request.redraw
        full = num_computed // self._block_size
        if self._prefix_caching:
            held = zip(reservation.blocks[:full], reservation.block_keys, strict=False)
            for block, key in held:
                self._pool.remember(block, key)
        if request.redraw:
            alive = tuple(c for c in range(request.params.n) if c not in request.finished)
            self._start(reservation, [(alive[:1] if request.params.beam else alive, ())], guide)
            return []
        if not request.params.beam:
            self._start(
                reservation,
                [((out.choice,), out.token_ids) for out in first if out.finish is None],
                guide,
            )
            return []
        search = BeamSearch(request.params, len(request.prompt_ids), max_outputs)
        search.advance([entry for out in first for entry in out.logprobs])
        group = BeamGroup(search, [])
        live = [] if search.over else search.live
        self._start(
            reservation, [((i,), (beam.token_id,)) for i, beam in enumerate(live)], guide, group
        )
        return told(request, search) if search.over else []

    def _start(
        self,
        reservation: Reservation,
        starts: list[tuple[tuple[int, ...], tuple[int, ...]]],
        guide: Guide | None,
        group: BeamGroup | None = None,
    ) -> None:
        """One sequence for each (choices, output tokens), all from the same blocks."""
        request, roster = reservation.request, self._roster
        num_computed = len(request.prompt_ids) - request.redraw
        full = num_computed // self._block_size
        arrival = roster.arrive()
        spare = list(reservation.spare)
        blocks = tuple(reservation.blocks)
        own: tuple[int, ...] | None = blocks
        for choices, output in starts:
            seq = roster.create(request, choices, [*request.prompt_ids, *output], arrival, guide)
            seq.started = True
            seq.block_keys = list(reservation.block_keys[:full])
            if own is not None:
                seq.block_ids, own = own, None
                seq.num_computed = num_computed
                seq.num_remembered = full
            else:
                roster.take_over(seq, blocks, num_computed, spare.pop())
            if group is not None:
                seq.group = group
                group.members.append(seq)
            roster.run(seq)
        if own is not None:
            self._pool.release(own)
        self._pool.release(spare)
