"""Messages survive the wire, errors keep their class."""

import dataclasses
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
    PromptLogprob,
    PromptScores,
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
from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from contracts.worker import Role, WorkerInfo
from rpc.backlog import event_bytes
from rpc.convert import (
    event_from_pb,
    event_to_pb,
    info_from_pb,
    info_to_pb,
    load_from_pb,
    load_to_pb,
    request_from_pb,
    submit_to_pb,
)
from rpc.convert_peer import decode_frame, from_decode_frame, from_prefill_frame, prefill_frame
from rpc.errors import STATUS, error_named, error_of_call, kind_of, status_of
from rpc.packing import pack_ids, unpack_ids
from rpc.pb import worker_pb2 as pb

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
SCORES = of(
    PromptScores,
    request_id=TEXT,
    attempt=U32,
    position=U32,
    entries=st.lists(
        of(
            PromptLogprob,
            logprob=F32,
            rank=U32,
            top=st.lists(st.tuples(U32, F32), max_size=3).map(tuple),
        ),
        max_size=4,
    ).map(tuple),
)
EVENTS: st.SearchStrategy[WorkerEvent] = st.one_of(
    TOKENS,
    SCORES,
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
    of(RequestFailed, request_id=TEXT, attempt=U32, kind=TEXT, message=TEXT, param=TEXT),
)
GRAMMARS = of(
    Grammar,
    kind=st.sampled_from(GrammarKind),
    text=TEXT,
    any_whitespace=st.booleans(),
    closed_objects=st.booleans(),
    whitespace_pattern=TEXT,
    fallback=st.booleans(),
    start_after=IDS,
    end_token_ids=IDS,
    opened_by=st.none() | U32,
)
PROCESSORS = of(ProcessorSpec, qualname=TEXT, args=st.none() | TEXT, kwargs=st.none() | TEXT)
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
    min_p=F64,
    repetition_penalty=F64,
    frequency_penalty=F64,
    presence_penalty=F64,
    min_tokens=U32,
    min_tokens_masked=IDS,
    logit_bias=st.lists(st.tuples(U32, F64), max_size=3).map(tuple),
    allowed_token_ids=IDS,
    bad_words=st.lists(IDS, max_size=3).map(tuple),
    grammar=st.none() | GRAMMARS,
    processors=st.lists(PROCESSORS, max_size=2).map(tuple),
    extra_args=TEXT,
    prompt_logprobs=st.none() | U32,
    beam=st.booleans(),
    length_penalty=F64,
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
    priority=st.integers(-(2**63), 2**63 - 1),
    redraw=st.booleans(),
    lease_ms=st.none() | U32,
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
    free=U32,
    cached=U32,
    owned=U32,
    leased=U32,
    reserved=U32,
    quarantined=U32,
    expired_transfers=U64,
    revoked_transfers=U64,
    offload_free=U32,
    offload_cached=U32,
    offload_loading=U32,
    offloaded_bytes=U64,
    loaded_bytes=U64,
)
HELLOS = of(
    PeerHello,
    incarnation=I63,
    protocol_version=U32,
    semantic_hash=TEXT,
    layout=TEXT,
    agent_metadata=st.lists(st.binary(max_size=20), max_size=3).map(tuple),
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
    of(Release, transfer_id=TEXT, nonce=TEXT),
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
            event_from_pb,
            pb.WorkerEvent(prompt_scores=pb.PromptScores(logprobs=[-1.0])),
            id="ranks",
        ),
        pytest.param(
            event_from_pb,
            pb.WorkerEvent(
                prompt_scores=pb.PromptScores(
                    logprobs=[-1.0], ranks=b"\1\0\0\0", num_top=b"\1\0\0\0"
                )
            ),
            id="scored-alternatives",
        ),
        pytest.param(
            request_from_pb,
            pb.Submit(params=pb.SamplingParams(grammar=pb.Grammar(kind="latin"))),
            id="grammar",
        ),
        pytest.param(
            request_from_pb, pb.Submit(params=pb.SamplingParams(biases=[1.0])), id="biases"
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
