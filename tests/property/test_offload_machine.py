"""Host memory under the prefix cache, against lists that say what should be where.

The memories hold a block's key as its content, so a block that is filled from the wrong place, too
late or not at all shows at once.
"""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool, Hits, block_key
from engine.generations import GenerationWords
from engine.host_pool import HostPool

BLOCK_BYTES = 100
DEPTH = 6


def chain(choices: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    for choice in choices:
        keys.append(block_key(keys[-1] if keys else b"", [choice]))
    return keys


class Model:
    """Which keys are on the device and on the host, as lists in order of use."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.free, self.slots = blocks, slots
        self.held: Counter[bytes] = Counter()
        self.cold: list[bytes] = []  # cached on the device, oldest first
        self.host: list[bytes] = []  # least recently used first
        self.loading: list[bytes] = []
        self.saved = self.loaded = 0

    def places(self, keys: list[bytes]) -> list[str]:
        found = []
        for key in keys:
            device = key in self.cold or self.held[key] > 0
            if not device and key not in self.host:
                break
            found.append("device" if device else "host")
        return found

    def pin(self, keys: list[bytes]) -> None:
        for key in keys:
            if not self.held[key]:
                self.cold.remove(key)
            self.held[key] += 1

    def take(self, count: int) -> None:
        while self.free < count:
            self._save(self.cold.pop(0))
            self.free += 1
        self.free -= count

    def _save(self, key: bytes) -> None:
        if key in self.host:
            if key not in self.loading:
                self.host.remove(key)
                self.host.append(key)
            return
        if len(self.host) == self.slots:
            idle = [other for other in self.host if other not in self.loading]
            if not idle:
                return
            self.host.remove(idle[0])
        self.host.append(key)

    def load(self, key: bytes) -> None:
        self.held[key] += 1
        self.loaded += 1

    def moved(self) -> None:
        for key in self.loading:  # now it was used
            self.host.remove(key)
            self.host.append(key)
        self.loading.clear()

    def drop(self, blocks: list[bytes | None]) -> None:
        for key in reversed(blocks):
            if key is None:
                self.free += 1
                continue
            self.held[key] -= 1
            if not self.held[key]:
                self.cold.append(key)


class OffloadMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(DEPTH + 1, 14), slots=st.integers(1, 12))
    def start(self, blocks: int, slots: int) -> None:
        self.host = HostPool(slots, BLOCK_BYTES)
        self.words = GenerationWords(blocks, incarnation=3)
        self.pool = BlockPool(blocks, self.words, self.host)
        self.model = Model(blocks, slots)
        self.device: list[object] = ["never written"] * blocks
        self.memory: list[object] = ["never saved"] * slots
        # What runs: its blocks, and the keys that they have in the pool's eyes.
        self.visits: list[tuple[list[int], list[bytes | None]]] = []
        self.writes: list[tuple[int, object]] = []  # of the next step
        self.due: list[tuple[list[int], list[bytes]]] = []  # remembered after the next step

    paths = st.lists(st.integers(0, 1), min_size=1, max_size=DEPTH)

    @rule(path=paths, extra=st.integers(0, 1))
    def visit(self, path: list[int], extra: int) -> None:
        """A prompt comes: it shares what is there, and computes the rest in the next step."""
        keys = chain(path)
        places = self.model.places(keys)
        hits = self.pool.search(keys)
        assert len(hits) == len(places)
        assert sorted(hits.slots) == [i for i, place in enumerate(places) if place == "host"]
        count = len(keys) + extra
        self.pool.share(hits.blocks)
        fresh = count - len(hits.blocks)
        on_device = [key for key, place in zip(keys, places, strict=False) if place == "device"]
        self.model.pin(on_device)
        if fresh > self.pool.available:
            self.pool.release(hits.blocks)
            self.model.drop(list(on_device))
            return
        before = self.words.read(tuple(range(self.pool.total)))
        blocks = self.pool.allocate_after(hits, count)
        self._expect(keys, places, hits, blocks, before)
        new = range(len(places), count)
        self.writes += [(blocks[i], keys[i] if i < len(keys) else "open") for i in new]
        self.visits.append((blocks, [*keys[: len(places)], *[None] * len(new)]))
        self.due.append((blocks, keys))

    def _expect(
        self,
        keys: list[bytes],
        places: list[str],
        hits: Hits,
        blocks: list[int],
        before: tuple[int, ...],
    ) -> None:
        from_host = [key for key, place in zip(keys, places, strict=False) if place == "host"]
        self.model.loading += from_host
        self.model.take(len(blocks) - len(hits.blocks))
        for key in from_host:
            self.model.load(key)
        assert len(set(blocks)) == len(blocks)
        assert [b for i, b in enumerate(blocks[: len(places)]) if i not in hits.slots] == (
            hits.blocks
        )
        after = self.words.read(tuple(range(self.pool.total)))
        changed = {block for block in range(self.pool.total) if before[block] != after[block]}
        assert changed == set(blocks) - set(hits.blocks), "a new owner means a new generation"

    @rule()
    def step(self) -> None:
        """Moves, then what was computed, then it is findable."""
        self._move()
        for block, content in self.writes:
            self.device[block] = content
        self.writes.clear()
        live = {id(blocks): index for index, (blocks, _) in enumerate(self.visits)}
        for blocks, keys in self.due:
            index = live.get(id(blocks))
            if index is None:
                continue
            known = self.visits[index][1]
            for place, key in enumerate(keys):
                assert self.device[blocks[place]] == key, "computed from a wrong block"
                self.pool.remember(blocks[place], key)
                if known[place] is None and self.model.places([key])[:1] != ["device"]:
                    known[place] = key
                    self.model.held[key] += 1
        self.due.clear()

    def _move(self) -> None:
        offloads, loads = self.host.take()
        self.model.saved += len(offloads)
        for pairs in (offloads, loads):
            assert len({target for _, target in pairs}) == len(pairs), "a target twice"
        for block, slot in offloads:
            self.memory[slot] = self.device[block]
        for slot, block in loads:
            self.device[block] = self.memory[slot]
        self.host.loaded(loads)
        self.model.moved()

    @precondition(lambda self: bool(self.visits))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Someone is over, or gives up before its first step."""
        index = data.draw(st.integers(0, len(self.visits) - 1))
        blocks, known = self.visits.pop(index)
        if self.due:  # a schedule's loads are made before anyone can leave
            self._move()
        self.writes = [(block, content) for block, content in self.writes if block not in blocks]
        self.due = [(b, keys) for b, keys in self.due if b is not blocks]
        self.pool.release(blocks)
        self.model.drop(known)

    @rule(count=st.integers(1, 4))
    def arrive(self, count: int) -> None:
        """Blocks for a handoff: peers write them before the next step."""
        if count > self.pool.available:
            return
        blocks = self.pool.reserve_after(Hits([], [], {}), count)
        self.model.take(count)
        self._move()
        for block in blocks:
            self.device[block] = "written by a peer"
        self.pool.unreserve(blocks)
        self.model.drop([None] * count)

    @invariant()
    def all_is_where_it_should_be(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        kept, expected = self.host.ledger(), self.model
        assert kept.total == kept.free + kept.cached + kept.loading == expected.slots
        assert kept.cached + kept.loading == len(expected.host)
        assert kept.loading == len(expected.loading)
        assert {key for key in expected.host if self.host.find(key) is not None} == (
            set(expected.host)
        )
        ledger = self.pool.ledger()
        assert (ledger.free, ledger.cached) == (expected.free, len(expected.cold))
        assert self.host.saved_bytes == expected.saved * BLOCK_BYTES
        if not self.host.ledger().loading:
            assert self.host.loaded_bytes == expected.loaded * BLOCK_BYTES


TestOffload = OffloadMachine.TestCase
TestOffload.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
