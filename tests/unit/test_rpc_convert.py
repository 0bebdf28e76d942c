"""Messages survive the wire, errors keep their class, backlogs merge without loss."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidRequest, OutOfBlocks, ServingError, Unavailable
from contracts.events import (
    Adopted,
    FinishReason,
    PathTaken,
    PrefillStarted,
    RequestFailed,
    TokenLogprob,
    TokensOut,
    WorkerEvent,
    WorkerLoad,
)
from contracts.handoff import (
    Beat,
    ChunkReady,
    Claim,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    FromDecode,
    FromPrefill,
    PeerHello,
    Release,
    ReleaseAck,
    Revoked,
)
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerInfo
from rpc.backlog import Backlog, event_bytes, merged, packed
from rpc.convert import (
    event_from_pb,
    event_to_pb,
    info_from_pb,
    info_to_pb,
    load_from_pb,
    load_to_pb,
    pack_ids,
    request_from_pb,
    submit_to_pb,
    unpack_ids,
)
from rpc.convert_peer import decode_frame, from_decode_frame, from_prefill_frame, prefill_frame
from rpc.errors import STATUS, error_named, error_of_call, kind_of, status_of
from rpc.frames import FrameReader, FrameWriter
from rpc.pb import worker_pb2 as pb
from rpc.wire import MAX_FRAME_BYTES
from tests.support.rpc_fakes import tokens

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I63 = st.integers(0, 2**63 - 1)
F32 = st.floats(width=32, allow_nan=False)
F64 = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)
IDS = st.lists(U32, max_size=5).map(tuple)


def of(cls: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances with every field drawn: a field that the conversion forgets cannot hide."""
    assert set(fields) == {field.name for field in dataclasses.fields(cls)}
    return st.builds(cls, **fields)


LOGPROB = of(TokenLogprob, logprob=F32, top=st.lists(st.tuples(U32, F32), max_size=3).map(tuple))
TOKENS = of(
    TokensOut,
    request_id=TEXT,
    attempt=U32,
    choice=U32,
    position=U32,
    token_ids=IDS,
    logprobs=st.lists(LOGPROB, max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
)
EVENTS: st.SearchStrategy[WorkerEvent] = st.one_of(
    TOKENS,
    of(PrefillStarted, request_id=TEXT, attempt=U32, kv_transfer_params=TEXT, cached_tokens=U32),
    of(Adopted, request_id=TEXT, attempt=U32, accepted=st.booleans(), reason=TEXT),
    of(
        PathTaken,
        request_id=TEXT,
        attempt=U32,
        path=TEXT,
        cause=TEXT,
        num_bytes=U64,
        num_descriptors=U64,
        read_s=F64,
    ),
    of(RequestFailed, request_id=TEXT, attempt=U32, kind=TEXT, message=TEXT),
)
PARAMS = of(
    SamplingParams,
    max_tokens=U32,
    temperature=F64,
    top_p=F64,
    top_k=st.integers(-(2**31), 2**31 - 1),
    seed=U64,
    n=U32,
    eos_token_ids=IDS,
    stop_token_ids=IDS,
    logprobs=st.none() | U32,
)
REQUESTS = of(
    GenerationRequest,
    request_id=TEXT,
    prompt_ids=IDS,
    params=PARAMS,
    output_ids=st.lists(IDS, max_size=3).map(tuple),
    attempt=U32,
    finished=IDS,
    cache_salt=TEXT,
    deadline_s=st.none() | F64,
)
INFOS = of(
    WorkerInfo,
    worker_id=TEXT,
    role=st.sampled_from(Role),
    incarnation=I63,
    semantic_hash=TEXT,
    max_model_len=U32,
    max_prompt_tokens=U32,
    block_size=U32,
    total_blocks=U32,
    attention_backend=TEXT,
    device=TEXT,
    version=TEXT,
)
LOADS = of(
    WorkerLoad,
    step=U64,
    waiting=U32,
    running=U32,
    waiting_tokens=U64,
    free_blocks=U32,
    total_blocks=U32,
    draining=st.booleans(),
)
HELLOS = of(
    PeerHello,
    incarnation=I63,
    protocol_version=U32,
    semantic_hash=TEXT,
    layout=TEXT,
    agent_metadata=st.binary(max_size=20),
)


@st.composite
def grants(draw: st.DrawFn) -> ClaimGranted:
    blocks = draw(st.lists(st.tuples(U32, U64), max_size=5))
    rest = of(
        ClaimGranted,
        transfer_id=TEXT,
        block_ids=st.just(tuple(block for block, _ in blocks)),
        generations=st.just(tuple(word for _, word in blocks)),
        num_tokens=U32,
        ready_tokens=U32,
        lease_ms=U32,
        first_tokens=st.lists(TOKENS, max_size=2).map(tuple),
    )
    granted: ClaimGranted = draw(rest)
    return granted


FROM_DECODE: st.SearchStrategy[FromDecode] = st.one_of(
    HELLOS,
    of(Claim, transfer_id=TEXT, nonce=TEXT, prompt_digest=TEXT),
    of(Release, transfer_id=TEXT),
    of(Beat, sequence=U64),
)
FROM_PREFILL: st.SearchStrategy[FromPrefill] = st.one_of(
    HELLOS,
    grants(),
    of(ClaimDenied, transfer_id=TEXT, kind=TEXT, message=TEXT),
    of(ChunkReady, transfer_id=TEXT, ready_tokens=U32),
    of(FirstTokens, transfer_id=TEXT, tokens=st.lists(TOKENS, max_size=2).map(tuple)),
    of(Revoked, transfer_id=TEXT, reason=TEXT),
    of(ReleaseAck, transfer_id=TEXT),
    of(Beat, sequence=U64),
)


@given(REQUESTS, st.booleans())
def test_requests(request: GenerationRequest, handoff: bool) -> None:
    wire = pb.Submit.FromString(submit_to_pb(request, handoff=handoff).SerializeToString())
    assert request_from_pb(wire) == request
    assert wire.handoff == handoff


@given(EVENTS)
def test_events(event: WorkerEvent) -> None:
    wire = event_to_pb(event).SerializeToString()
    assert event_from_pb(pb.WorkerEvent.FromString(wire)) == event
    # What decides where frames are cut must never be too small: tag and length included.
    assert event_bytes(event) >= len(wire) + 8


@given(INFOS, LOADS)
def test_infos_and_loads(info: WorkerInfo, load: WorkerLoad) -> None:
    frame = pb.WorkerFrame(hello=info_to_pb(info, epoch=5), load=load_to_pb(load))
    wire = pb.WorkerFrame.FromString(frame.SerializeToString())
    assert info_from_pb(wire.hello) == info
    assert load_from_pb(wire.load) == load
    assert wire.hello.epoch == 5


@given(FROM_DECODE, FROM_PREFILL)
def test_peer_messages(up: FromDecode, down: FromPrefill) -> None:
    up_wire, down_wire = decode_frame(up), prefill_frame(down)
    assert from_decode_frame(pb.DecodeFrame.FromString(up_wire.SerializeToString())) == up
    assert from_prefill_frame(pb.PrefillFrame.FromString(down_wire.SerializeToString())) == down


def test_ids_are_little_endian_u32() -> None:
    assert pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"
    assert unpack_ids(b"\x01\0\0\0\x04\x03\x02\x01") == (1, 0x01020304)
    with pytest.raises(OverflowError):
        pack_ids([2**32])
    with pytest.raises(OverflowError):
        pack_ids([-1])


@pytest.mark.parametrize(
    ("read", "message"),
    [
        pytest.param(unpack_ids, b"\0\0\0", id="torn-ids"),
        pytest.param(info_from_pb, pb.WorkerHello(role="king"), id="role"),
        pytest.param(event_from_pb, pb.WorkerEvent(tokens=pb.Tokens(finish="tired")), id="finish"),
        pytest.param(
            event_from_pb,
            pb.WorkerEvent(tokens=pb.Tokens(logprobs=[pb.TokenLogprob(top_ids=b"\0\0\0\0")])),
            id="alternatives",
        ),
        pytest.param(
            from_prefill_frame,
            pb.PrefillFrame(granted=pb.ClaimGranted(generations=[4])),
            id="generations",
        ),
    ],
)
def test_broken_messages_are_refused(read: Callable[[Any], Any], message: Any) -> None:
    with pytest.raises(InvalidRequest):
        read(message)


def test_unknown_messages_are_none() -> None:
    assert event_from_pb(pb.WorkerEvent()) is None
    assert from_decode_frame(pb.DecodeFrame()) is None
    assert from_prefill_frame(pb.PrefillFrame()) is None


def _tree(cls: type[ServingError]) -> list[type[ServingError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


@pytest.mark.parametrize(
    "cls", [cls for cls in _tree(ServingError) if cls.__module__ == "contracts.errors"]
)
def test_every_error_crosses_the_wire(cls: type[ServingError]) -> None:
    error = cls(3, 2) if cls is OutOfBlocks else cls("text")
    back = error_named(kind_of(error), str(error))
    assert type(back) is cls
    assert str(back) == str(error)
    if isinstance(back, OutOfBlocks):
        assert (back.wanted, back.available) == (3, 2)
    assert status_of(error) is STATUS[cls]
    call = aio.AioRpcError(
        status_of(error),
        aio.Metadata(),
        aio.Metadata(("baton-error", kind_of(error))),
        details=str(error),
    )
    assert type(error_of_call(call)) is cls


def test_strangers_statuses_become_our_errors() -> None:
    def of_status(code: grpc.StatusCode) -> ServingError:
        return error_of_call(aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=""))

    assert isinstance(of_status(grpc.StatusCode.DEADLINE_EXCEEDED), Unavailable)
    for code in grpc.StatusCode:
        assert str(of_status(code)) == code.name
    assert str(error_named("NewError", "x")) == "NewError: x"


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
