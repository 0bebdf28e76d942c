"""Steps as frames: a follower has the arrays of rank 0, whatever changes between two steps."""

import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.sampling import SamplingParams
from engine.arrays import BlockTables, Moves, StepArrays, step_arrays
from engine.generations import GenerationWords
from engine.kv_cache import KvCache, KvSpec
from engine.plan import Chunk, SampleSlot, StepPlan
from engine.rank_messages import Kind, Link, StepDecoder, StepEncoder

BLOCK = 4
SLOTS = (SampleSlot(choice=0, position=0, params=SamplingParams(max_tokens=1)),)
CACHE = KvCache(KvSpec(1, 1, 2, BLOCK, torch.float32), 32, torch.device("cpu"))

sequences = st.integers(0, 6)
tables = st.lists(st.integers(0, 31), min_size=3, max_size=5).map(tuple)
chunks = st.tuples(sequences, tables, st.integers(0, 5), st.integers(1, 6), st.booleans())
steps = st.lists(chunks, min_size=1, max_size=5, unique_by=lambda chunk: chunk[0])
pairs = st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), max_size=3).map(tuple)
moves = st.builds(Moves, offloads=pairs, loads=pairs, copies=pairs)
words = st.lists(st.tuples(st.integers(0, 31), st.integers(0, 2**64 - 1)), max_size=3).map(tuple)


def same(one: StepArrays, other: StepArrays) -> None:
    assert one.num_tokens == other.num_tokens
    assert list(one.sequences) == list(other.sequences)
    for name in ("query_starts", "query_lens", "kv_lens", "packed"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert len(one.tables) == len(other.tables)
    for mine, theirs in zip(one.tables, other.tables, strict=True):
        assert np.array_equal(mine, theirs)


@given(st.lists(st.tuples(steps, moves, words), min_size=1, max_size=6), st.booleans())
def test_every_step_arrives(
    run: list[
        tuple[list[tuple[int, tuple[int, ...], int, int, bool]], Moves, tuple[tuple[int, int], ...]]
    ],
    keep_tables: bool,
) -> None:
    encoder, decoder, block_tables = StepEncoder(), StepDecoder(), BlockTables()
    known: dict[int, tuple[int, ...]] = {}
    for number, (parts, moved, bumped) in enumerate(run):
        plan = []
        for sequence, table, start, length, draws in parts:
            kept = known.setdefault(sequence, table) if keep_tables else table
            plan.append(Chunk(sequence, start, tuple(range(length)), kept, SLOTS if draws else ()))
        arrays = step_arrays(StepPlan(number, tuple(plan)), block_tables, CACHE)
        found = decoder.decode(encoder.encode(bumped, moved, arrays))
        assert found.arrays is not None
        same(arrays, found.arrays)
        assert (found.moves, found.words) == (moved, bumped)


def test_an_unchanged_table_is_not_sent_again() -> None:
    encoder, block_tables = StepEncoder(), BlockTables()
    table = tuple(range(30))

    def size(start: int) -> int:
        plan = StepPlan(start, (Chunk(1, start, (5,), table, SLOTS),))
        return len(encoder.encode((), Moves(), step_arrays(plan, block_tables, CACHE)))

    first = size(7)
    assert first - size(8) == 8 * (len(table) + 2)


def test_moves_alone_have_no_arrays() -> None:
    moved = Moves(copies=((1, 2),), loads=((3, 4), (5, 6)))
    message = StepDecoder().decode(StepEncoder().encode(((3, 2**63 + 1),), moved, None))
    assert (message.words, message.moves, message.arrays) == (((3, 2**63 + 1),), moved, None)


def test_a_follower_mirrors_the_words_of_rank_0() -> None:
    first, second = GenerationWords(8, 5), GenerationWords(8, 5)
    first.record()
    first.bump((3, 4, 3))
    second.mirror(first.take_bumped())
    assert first.read(list(range(8))) == second.read(list(range(8)))
    assert first.take_bumped() == ()


def test_a_link_carries_frames_until_it_closes() -> None:
    mine, theirs = (Link(end) for end in socket.socketpair())
    mine.send(Kind.STEP, b"x" * 10_000)
    mine.tell(Kind.SETUP, {"rank": 1})
    mine.send(Kind.CONNECT)
    assert theirs.receive() == (Kind.STEP, b"x" * 10_000)
    assert theirs.receive() == (Kind.SETUP, b'{"rank": 1}')
    assert theirs.receive() == (Kind.CONNECT, b"")
    mine.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()
