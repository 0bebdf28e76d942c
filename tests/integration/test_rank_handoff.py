"""Handoff between tensor-parallel sizes over real NIXL: each rank beyond the first is a process."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import EngineFailure, TransferFailed
from contracts.memory import RankProcess
from kv_transfer.rank_transfers import RankPeer, RankTransfers
from tests.support.connector_rigs import unique_name
from tests.support.rank_rigs import NUM_BLOCKS, RankMemory, content, fill, gathered

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 30.0
SRC, DST = [7, 8, 9, 3, 20], [1, 2, 3, 4, 15]
WORDS = np.arange(100, 100 + NUM_BLOCKS, dtype=np.uint64)


class Worker:
    """Rank 0 here, the others in processes; their memory is mapped here too."""

    def __init__(self, folder: Path, num_ranks: int, *, reads: bool) -> None:
        self.memories = [RankMemory.zeros(num_ranks)]
        self.processes: list[subprocess.Popen[str]] = []
        followers: list[RankProcess] = []
        for rank in range(1, num_ranks):
            memory = self._mapped(folder / unique_name("rank"), num_ranks)
            ours, theirs = socket.socketpair()
            files = [str(memory.kv.filename), str(memory.words.filename)]  # type: ignore[attr-defined]
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.rank_process", str(theirs.fileno()), *files],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            theirs.close()
            self.processes.append(process)
            self.memories.append(memory)
            followers.append(RankProcess(rank, process.pid, ours))
        for memory, process in zip(self.memories[1:], self.processes, strict=True):
            assert process.stdout is not None
            kv_address, words_address = json.loads(process.stdout.readline())
            memory.addresses = kv_address, words_address
        self.transfers = RankTransfers(
            [memory.described for memory in self.memories],
            unique_name("worker"),
            followers,
            reads=reads,
        )

    @staticmethod
    def _mapped(folder: Path, num_ranks: int) -> RankMemory:
        folder.mkdir()
        plain = RankMemory.zeros(num_ranks)
        kv = np.memmap(folder / "kv", dtype=np.uint8, mode="w+", shape=plain.kv.shape)
        words = np.memmap(folder / "words", dtype=np.uint64, mode="w+", shape=plain.words.shape)
        return RankMemory(kv, words)

    async def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
        await self.transfers.close()
        for process in self.processes:
            process.stdout.close()  # type: ignore[union-attr]
            try:
                await asyncio.to_thread(process.wait, TIME_LIMIT_S)
            finally:
                process.kill()
                process.wait()


Make = Callable[[int, bool], Awaitable[Worker]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Worker] = []

    async def start(num_ranks: int, reads: bool) -> Worker:
        made.append(Worker(tmp_path, num_ranks, reads=reads))
        await made[-1].transfers.start()
        return made[-1]

    yield start
    for worker in reversed(made):
        await worker.close()


async def linked(prefill: Worker, decode: Worker) -> RankPeer:
    return await decode.transfers.add_peer(prefill.transfers.layout, prefill.transfers.metadata)


@pytest.mark.parametrize(("p_ranks", "d_ranks"), [(1, 2), (2, 1), (2, 2), (4, 2)])
async def test_each_rank_gets_its_heads(make: Make, p_ranks: int, d_ranks: int) -> None:
    prefill, decode = await make(p_ranks, False), await make(d_ranks, True)
    data = content(p_ranks + d_ranks)
    fill(prefill.memories, data, WORDS)
    peer = await linked(prefill, decode)
    ended: list[str] = []
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    result = await decode.transfers.read(
        plan,
        deadline=time.monotonic() + TIME_LIMIT_S,
        on_terminal=lambda: ended.append("terminal"),
    )
    assert (result.num_bytes, ended) == (len(SRC) * data[0].nbytes, ["terminal"])
    expected = np.zeros_like(data)
    expected[DST] = data[SRC]
    np.testing.assert_array_equal(gathered(decode.memories), expected)
    assert decode.transfers.words(plan) == WORDS[SRC].tolist()

    prefill.memories[-1].words[SRC[2]] = 7  # a new owner, which only the last rank tells
    await decode.transfers.read(plan, deadline=time.monotonic() + TIME_LIMIT_S)
    found = WORDS[SRC].tolist()
    found[2] = 7 if p_ranks == 1 else 0
    assert decode.transfers.words(plan) == found
    await decode.transfers.remove_peer(peer)


async def test_a_frozen_rank_of_d_holds_the_blocks_until_it_is_dead(make: Make) -> None:
    """Q1 of a rank in another process: nothing but its answer or its end is the end of a read."""
    prefill, decode = await make(2, False), await make(2, True)
    fill(prefill.memories, content(1), WORDS)
    peer = await linked(prefill, decode)
    decode.processes[0].send_signal(signal.SIGSTOP)
    ended: list[str] = []
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    with pytest.raises(TransferFailed, match="in time"):
        await decode.transfers.read(
            plan, deadline=time.monotonic() + 0.2, on_terminal=lambda: ended.append("terminal")
        )
    assert ended == []
    assert decode.transfers.words(plan) == [0] * len(DST)
    decode.processes[0].kill()
    async with asyncio.timeout(TIME_LIMIT_S):
        while not ended:  # noqa: ASYNC110 - what changes it is another process
            await asyncio.sleep(0.005)
    async with asyncio.timeout(TIME_LIMIT_S):
        while not lost(decode):  # noqa: ASYNC110 - its engine has some time to say it first
            await asyncio.sleep(0.05)


def lost(worker: Worker) -> bool:
    try:
        worker.transfers.assert_pulse()
    except EngineFailure as error:
        return "rank 1" in str(error)
    return False


async def test_a_dead_rank_of_p_fails_the_read(make: Make) -> None:
    prefill, decode = await make(2, False), await make(2, True)
    fill(prefill.memories, content(1), WORDS)
    peer = await linked(prefill, decode)
    plan = decode.transfers.plan(peer, SRC, DST, (SRC, DST))
    prefill.processes[0].kill()
    await asyncio.to_thread(prefill.processes[0].wait)
    with pytest.raises(TransferFailed):
        await decode.transfers.read(plan, deadline=time.monotonic() + TIME_LIMIT_S)
    decode.transfers.assert_pulse()
    assert decode.transfers.words(plan) == [0] * len(DST)
