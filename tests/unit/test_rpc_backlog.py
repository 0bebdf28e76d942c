"""Backlogs merge without loss, packing and cutting into frames keep order and size."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidRequest, Unavailable
from contracts.events import FinishReason, PathTaken, TokenLogprob, TokensOut, WorkerEvent
from rpc.backlog import Backlog, merged, packed
from rpc.frames import FrameReader, FrameWriter
from rpc.pb import worker_pb2 as pb
from rpc.wire import MAX_FRAME_BYTES
from tests.support.rpc_fakes import tokens


@st.composite
def streams(draw: st.DrawFn) -> list[WorkerEvent]:
    """Events as an engine makes them: tokens of a few choices, with other events between."""
    events: list[WorkerEvent] = []
    positions: dict[tuple[str, int], int] = {}
    with_logprobs = draw(st.booleans())
    for _ in range(draw(st.integers(0, 30))):
        name = draw(st.sampled_from("ab"))
        if draw(st.integers(0, 7)) == 0:
            events.append(PathTaken(name, 0, "local"))  # type: ignore[arg-type]
            continue
        choice = draw(st.integers(0, 1))
        start = positions.get((name, choice), 0) + draw(st.sampled_from([0, 0, 0, 1]))
        ids = draw(st.lists(st.integers(0, 9), max_size=2))
        positions[name, choice] = start + len(ids)
        out = tokens(name, start, ids, choice)
        if with_logprobs:
            out = dataclasses.replace(out, logprobs=tuple(TokenLogprob(-1.0) for _ in ids))
        if draw(st.integers(0, 9)) == 0:
            out = dataclasses.replace(out, finish=FinishReason.STOP)
        events.append(out)
    return events


Told = tuple[Any, ...]


def told(events: list[WorkerEvent], name: str, choice: int) -> list[Told]:
    """What a router learns of one choice, token by token."""
    result: list[Told] = []
    for event in events:
        if event.request_id != name:
            continue
        if not isinstance(event, TokensOut):
            result.append(("event", event))
        elif event.choice == choice:
            for index, token_id in enumerate(event.token_ids):
                logprob = event.logprobs[index] if event.logprobs else None
                result.append(("token", event.position + index, token_id, logprob))
            if event.finish is not None:
                result.append(("finish", event.finish))
    return result


@given(streams())
def test_merging_changes_nothing_that_a_router_learns(events: list[WorkerEvent]) -> None:
    short = merged(events)
    for name in "ab":
        for choice in (0, 1):
            assert told(short, name, choice) == told(events, name, choice)
    assert len(short) <= len(events)
    assert merged(short) == short


def test_a_blocked_choice_becomes_one_event() -> None:
    events: list[WorkerEvent] = []
    for step in range(100):
        events += [tokens("a", step, [step]), tokens("b", step, [1]), tokens("a", step, [2], 1)]
    assert merged(events) == [
        tokens("a", 0, range(100)),
        tokens("b", 0, [1] * 100),
        tokens("a", 0, [2] * 100, 1),
    ]
    other_attempt = [tokens("a", 0, [1]), tokens("a", 1, [2], attempt=1)]
    assert merged(list(other_attempt)) == other_attempt


@given(st.lists(st.integers(1, 120), max_size=20))
def test_packing_keeps_order_and_size(sizes: list[int]) -> None:
    runs = list(packed(range(len(sizes)), sizes, 100))
    assert [item for run in runs for item in run] == list(range(len(sizes)))
    for run in runs:
        assert len(run) == 1 or sum(sizes[item] for item in run) <= 100
    for left, right in itertools.pairwise(runs):
        assert sum(sizes[item] for item in left) + sizes[right[0]] > 100


def test_a_backlog_is_bounded() -> None:
    backlog = Backlog[int](max_bytes=10, max_items=3)
    backlog.add(1, 9)
    with pytest.raises(Unavailable, match="does not keep up"):
        backlog.add(2, 2)
    assert backlog.take() == ([1], [9])
    for item in range(3):
        backlog.add(item, 0)
    with pytest.raises(Unavailable, match="3 messages"):
        backlog.add(4, 0)
    assert len(backlog) == 3


@given(st.integers(0, 3 * MAX_FRAME_BYTES))
def test_frames_survive_being_cut(length: int) -> None:
    adopt = pb.Adopt(kv_transfer_params="x" * length)
    writer, reader = FrameWriter(), FrameReader()
    for number in range(2):
        sent = pb.RouterFrame(adopts=[adopt], aborts=[pb.Abort(attempt=number)])
        frames = list(writer.numbered(sent))
        assert all(frame.ByteSize() <= MAX_FRAME_BYTES for frame in frames)
        received = [reader.accept(frame) for frame in frames]
        assert received[:-1] == [None] * (len(frames) - 1)
        assert received[-1] is not None
        assert received[-1].adopts == sent.adopts
        assert received[-1].aborts == sent.aborts


def test_torn_pieces_are_refused() -> None:
    reader = FrameReader()
    assert reader.accept(pb.RouterFrame(sequence=0, piece=b"\xff", more_pieces=True)) is None
    with pytest.raises(InvalidRequest, match="between the pieces"):
        reader.accept(pb.RouterFrame(sequence=1))
    with pytest.raises(InvalidRequest, match="no frame"):
        reader.accept(pb.RouterFrame(sequence=2, piece=b"\xff"))
