"""Moves between the cache and host memory, byte by byte, and what happens when one fails."""

import random
from collections.abc import Sequence
from queue import Queue

import pytest
import torch

from contracts.errors import ConfigurationError
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.block_pool import BlockPool, LedgerFault, block_key
from engine.generations import GenerationWords
from engine.host_pool import HostLedger, HostPool
from engine.kv_cache import KvCache, KvSpec
from engine.loop import Engine
from engine.offload import OffloadMemory, slots_in
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from tests.support.paged_oracle import PagedOracle

SPEC = KvSpec(num_layers=2, num_kv_heads=2, head_dim=4, block_size=3, dtype=torch.bfloat16)
WAIT_S = 20.0


def check_moves(device: torch.device) -> None:
    draw = random.Random(2)
    cache = KvCache(SPEC, 12, device)
    memory = OffloadMemory(cache, 9)
    with torch.inference_mode():
        cache.tensor.copy_(torch.randn(cache.tensor.shape))
    blocks = [cache.tensor[index].cpu().clone() for index in range(12)]
    slots: dict[int, torch.Tensor] = {}
    for _ in range(60):
        # Runs of neighbours as well as single ones, forwards and crosswise.
        start, count = draw.randrange(6), draw.randint(0, 4)
        offloads = [(start + i, (start + i) % 9) for i in range(count)]
        taken = {slot for _, slot in offloads}
        offloads += [(draw.randrange(12), slot) for slot in range(9) if slot not in taken][:2]
        for block, slot in offloads:
            slots[slot] = blocks[block]
        sources = draw.choices(sorted(slots), k=draw.randint(0, 5))
        loads = list(zip(sources, draw.sample(range(12), len(sources)), strict=True))
        for slot, block in loads:
            blocks[block] = slots[slot]
        with torch.inference_mode():
            memory.move(offloads, loads)
        assert torch.equal(cache.tensor.cpu(), torch.stack(blocks))


def test_moves_on_the_cpu() -> None:
    check_moves(torch.device("cpu"))


@pytest.mark.cuda
def test_moves_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    check_moves(torch.device("cuda:0"))


def test_how_many_blocks_host_memory_holds() -> None:
    assert slots_in(0, 100) == 0
    assert slots_in(1050, 100) == 10
    with pytest.raises(ConfigurationError, match="--kv-offload-memory 99 holds no KV block of 100"):
        slots_in(99, 100)


def pool_of(blocks: int, slots: int) -> tuple[BlockPool, HostPool]:
    host = HostPool(slots, 100)
    return BlockPool(blocks, GenerationWords(blocks, incarnation=1), host), host


def test_a_slot_that_is_loaded_from_is_not_given_away() -> None:
    pool, host = pool_of(3, 2)
    keys = [block_key(b"", [0]), block_key(b"", [1])]
    blocks = pool.allocate(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    pool.release(pool.allocate(3))  # both are evicted
    host.take()
    others = pool.allocate(3)
    for number, block in enumerate(others):
        pool.remember(block, block_key(b"other", [number]))
    pool.release(others)
    found = pool.allocate_after(pool.search(keys[:1]), 3)  # evicts all three, and loads one
    assert host.ledger() == HostLedger(total=2, free=0, cached=1, loading=1)
    offloads, loads = host.take()
    assert len(offloads) == 1, "one of the others has room"
    assert [block for _, block in loads] == found[:1]
    assert {slot for slot, _ in loads}.isdisjoint(slot for _, slot in offloads)
    host.loaded(loads)
    assert host.ledger() == HostLedger(total=2, free=0, cached=2, loading=0)
    with pytest.raises(LedgerFault, match="unasked"):
        host.loaded(loads)
    pool.check()


@pytest.mark.parametrize("wrong", ["a slot is lost", "a slot is listed twice"])
def test_the_ledger_of_host_memory_is_verified_and_audited(wrong: str) -> None:
    pool, host = pool_of(4, 3)
    if wrong == "a slot is lost":
        host._free.pop()
        with pytest.raises(LedgerFault, match="does not add up"):
            pool.verify()
    else:
        host._free[0] = host._free[1]
        pool.verify()
    assert any("in 0 states" in what for what, _ in pool.faults())


# -- in the engine ------------------------------------------------------------------------------

BLOCK, BLOCKS = 4, 8


class Fragile:
    """Computes, until it has to move something."""

    def __init__(self) -> None:
        self.oracle = PagedOracle(BLOCKS, BLOCK)

    def forget(self, sequences: Sequence[int]) -> None:
        pass

    def compute(self, plan: StepPlan) -> StepResult:
        if plan.offloads:
            raise RuntimeError("the bus is gone")
        return self.oracle.compute(plan)


def test_a_move_that_fails_ends_the_engine() -> None:
    """A handoff must not get blocks whose content may be half saved."""
    pool, _ = pool_of(BLOCKS, 20)
    failures: Queue[BaseException] = Queue()
    done: Queue[object] = Queue()
    scheduler = Scheduler(SchedulerConfig(BLOCK, max_model_len=30), pool)
    engine = Engine(scheduler, Fragile(), done.put, failures.put)
    engine.start()
    try:
        prompt = tuple(range(20))
        one = GenerationRequest(RequestId("one"), prompt, SamplingParams(max_tokens=2))
        engine.call(lambda s: s.add(one, export=False)).result(WAIT_S)
        while engine.load.cached < 5:
            done.get(timeout=WAIT_S)
        other = GenerationRequest(RequestId("other"), prompt[::-1], SamplingParams(max_tokens=2))
        asked = engine.call(lambda s: s.reserve(other))
        assert isinstance(asked.exception(WAIT_S), LedgerFault)
        assert isinstance(failures.get(timeout=WAIT_S), LedgerFault)
    finally:
        engine.stop()
