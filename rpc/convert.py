"""Dataclasses of `contracts` to protobuf messages and back: sessions. Peer links: convert_peer.

Token ids travel as packed little-endian unsigned 32-bit integers (S5), log-probabilities as
32-bit floats, sampling parameters (convert_params) exactly. A message that breaks the format
raises InvalidRequest. Events that a newer peer invented are read as None, unknown fields are
ignored.
"""

import itertools
from typing import assert_never

from contracts.errors import InvalidRequest
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
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.request import GenerationRequest
from contracts.worker import Role, WorkerInfo
from rpc.convert_params import params_from_pb, params_to_pb
from rpc.packing import pack_ids, unpack_ids
from rpc.pb import worker_pb2 as pb
from rpc.wire import PROTOCOL_VERSION


def submit_to_pb(request: GenerationRequest, *, handoff: bool) -> pb.Submit:
    """A request, to the wire."""
    return pb.Submit(
        request_id=request.request_id,
        attempt=request.attempt,
        prompt_ids=pack_ids(request.prompt_ids),
        params=params_to_pb(request.params),
        output_ids=[pack_ids(ids) for ids in request.output_ids],
        cache_salt=request.cache_salt,
        deadline_s=request.deadline_s,
        handoff=handoff,
        finished=pack_ids(request.finished),
        priority=request.priority,
        redraw=request.redraw,
        lease_ms=request.lease_ms,
    )


def request_from_pb(message: pb.Submit) -> GenerationRequest:
    """A request, from the wire (`handoff` is the message's own)."""
    return GenerationRequest(
        request_id=RequestId(message.request_id),
        prompt_ids=unpack_ids(message.prompt_ids),
        params=params_from_pb(message.params),
        output_ids=tuple(unpack_ids(ids) for ids in message.output_ids),
        attempt=message.attempt,
        finished=unpack_ids(message.finished),
        cache_salt=message.cache_salt,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        priority=message.priority,
        redraw=message.redraw,
        lease_ms=message.lease_ms if message.HasField("lease_ms") else None,
    )


def info_to_pb(info: WorkerInfo, *, epoch: int) -> pb.WorkerHello:
    """A worker's hello in the session of that epoch."""
    return pb.WorkerHello(
        worker_id=info.worker_id,
        role=info.role.value,
        incarnation=info.incarnation,
        semantic_hash=info.semantic_hash,
        max_model_len=info.max_model_len,
        max_prompt_tokens=info.max_prompt_tokens,
        block_size=info.block_size,
        total_blocks=info.total_blocks,
        attention_backend=info.attention_backend,
        device=info.device,
        version=info.version,
        epoch=epoch,
        protocol_version=PROTOCOL_VERSION,
    )


def info_from_pb(message: pb.WorkerHello) -> WorkerInfo:
    """What a worker says of itself."""
    try:
        role = Role(message.role)
    except ValueError:
        raise InvalidRequest(f"unknown worker role {message.role!r}") from None
    return WorkerInfo(
        worker_id=WorkerId(message.worker_id),
        role=role,
        incarnation=Incarnation(message.incarnation),
        semantic_hash=message.semantic_hash,
        max_model_len=message.max_model_len,
        max_prompt_tokens=message.max_prompt_tokens,
        block_size=message.block_size,
        total_blocks=message.total_blocks,
        attention_backend=message.attention_backend,
        device=message.device,
        version=message.version,
    )


def load_to_pb(load: WorkerLoad) -> pb.Load:
    """A worker's load, to the wire."""
    return pb.Load(
        step=load.step,
        waiting=load.waiting,
        running=load.running,
        waiting_tokens=load.waiting_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        draining=load.draining,
        free=load.free,
        cached=load.cached,
        owned=load.owned,
        leased=load.leased,
        reserved=load.reserved,
        quarantined=load.quarantined,
        expired_transfers=load.expired_transfers,
        revoked_transfers=load.revoked_transfers,
        offload_free=load.offload_free,
        offload_cached=load.offload_cached,
        offload_loading=load.offload_loading,
        offloaded_bytes=load.offloaded_bytes,
        loaded_bytes=load.loaded_bytes,
    )


def load_from_pb(message: pb.Load) -> WorkerLoad:
    """A worker's load, from the wire."""
    return WorkerLoad(
        step=message.step,
        waiting=message.waiting,
        running=message.running,
        waiting_tokens=message.waiting_tokens,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        draining=message.draining,
        free=message.free,
        cached=message.cached,
        owned=message.owned,
        leased=message.leased,
        reserved=message.reserved,
        quarantined=message.quarantined,
        expired_transfers=message.expired_transfers,
        revoked_transfers=message.revoked_transfers,
        offload_free=message.offload_free,
        offload_cached=message.offload_cached,
        offload_loading=message.offload_loading,
        offloaded_bytes=message.offloaded_bytes,
        loaded_bytes=message.loaded_bytes,
    )


def _logprob_to_pb(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        logprob=entry.logprob,
        top_ids=pack_ids(token_id for token_id, _ in entry.top),
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def _logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    top_ids = unpack_ids(message.top_ids)
    if len(top_ids) != len(message.top_logprobs):
        raise InvalidRequest(
            f"{len(top_ids)} alternatives, {len(message.top_logprobs)} log-probabilities"
        )
    return TokenLogprob(message.logprob, tuple(zip(top_ids, message.top_logprobs, strict=True)))


def tokens_to_pb(tokens: TokensOut) -> pb.Tokens:
    """New tokens of one choice, to the wire. No `finish` is the empty string."""
    return pb.Tokens(
        request_id=tokens.request_id,
        attempt=tokens.attempt,
        choice=tokens.choice,
        position=tokens.position,
        token_ids=pack_ids(tokens.token_ids),
        logprobs=[_logprob_to_pb(entry) for entry in tokens.logprobs],
        finish=tokens.finish.value if tokens.finish is not None else "",
    )


def tokens_from_pb(message: pb.Tokens) -> TokensOut:
    """New tokens of one choice, from the wire."""
    try:
        finish = FinishReason(message.finish) if message.finish else None
    except ValueError:
        raise InvalidRequest(f"unknown finish reason {message.finish!r}") from None
    return TokensOut(
        request_id=RequestId(message.request_id),
        attempt=message.attempt,
        choice=message.choice,
        position=message.position,
        token_ids=unpack_ids(message.token_ids),
        logprobs=tuple(_logprob_from_pb(entry) for entry in message.logprobs),
        finish=finish,
    )


def _scores_to_pb(scores: PromptScores) -> pb.PromptScores:
    entries = scores.entries
    return pb.PromptScores(
        request_id=scores.request_id,
        attempt=scores.attempt,
        position=scores.position,
        logprobs=[entry.logprob for entry in entries],
        ranks=pack_ids(entry.rank for entry in entries),
        num_top=pack_ids(len(entry.top) for entry in entries),
        top_ids=pack_ids(token_id for entry in entries for token_id, _ in entry.top),
        top_logprobs=[logprob for entry in entries for _, logprob in entry.top],
    )


def _scores_from_pb(message: pb.PromptScores) -> PromptScores:
    ranks, num_top = unpack_ids(message.ranks), unpack_ids(message.num_top)
    top_ids = unpack_ids(message.top_ids)
    if not len(message.logprobs) == len(ranks) == len(num_top):
        raise InvalidRequest(
            f"{len(message.logprobs)} scored tokens, {len(ranks)} ranks, {len(num_top)} counts"
        )
    if not len(top_ids) == len(message.top_logprobs) == sum(num_top):
        raise InvalidRequest(
            f"{sum(num_top)} alternatives, {len(top_ids)} of them with an id, "
            f"{len(message.top_logprobs)} with a log-probability"
        )
    alternatives = zip(top_ids, message.top_logprobs, strict=True)
    return PromptScores(
        request_id=RequestId(message.request_id),
        attempt=message.attempt,
        position=message.position,
        entries=tuple(
            PromptLogprob(logprob, rank, tuple(itertools.islice(alternatives, count)))
            for logprob, rank, count in zip(message.logprobs, ranks, num_top, strict=True)
        ),
    )


def event_to_pb(event: WorkerEvent) -> pb.WorkerEvent:
    """One event, to the wire."""
    match event:
        case TokensOut():
            return pb.WorkerEvent(tokens=tokens_to_pb(event))
        case PromptScores():
            return pb.WorkerEvent(prompt_scores=_scores_to_pb(event))
        case PrefillStarted():
            return pb.WorkerEvent(
                prefill_started=pb.PrefillStarted(
                    request_id=event.request_id,
                    attempt=event.attempt,
                    kv_transfer_params=event.kv_transfer_params,
                    cached_tokens=event.cached_tokens,
                )
            )
        case Adopted():
            return pb.WorkerEvent(
                adopted=pb.Adopted(
                    request_id=event.request_id,
                    attempt=event.attempt,
                    accepted=event.accepted,
                    reason=event.reason,
                )
            )
        case PathTaken():
            return pb.WorkerEvent(
                path_taken=pb.PathTaken(
                    request_id=event.request_id,
                    attempt=event.attempt,
                    path=event.path,
                    cause=event.cause,
                    num_bytes=event.num_bytes,
                    num_descriptors=event.num_descriptors,
                    read_s=event.read_s,
                )
            )
        case RequestFailed():
            return pb.WorkerEvent(
                failed=pb.RequestFailed(
                    request_id=event.request_id,
                    attempt=event.attempt,
                    kind=event.kind,
                    message=event.message,
                    param=event.param,
                )
            )
        case _:
            assert_never(event)


def event_from_pb(message: pb.WorkerEvent) -> WorkerEvent | None:
    """One event, from the wire; None for one that this version does not know."""
    match message.WhichOneof("event"):
        case "tokens":
            return tokens_from_pb(message.tokens)
        case "prompt_scores":
            return _scores_from_pb(message.prompt_scores)
        case "prefill_started":
            started = message.prefill_started
            return PrefillStarted(
                request_id=RequestId(started.request_id),
                attempt=started.attempt,
                kv_transfer_params=started.kv_transfer_params,
                cached_tokens=started.cached_tokens,
            )
        case "adopted":
            adopted = message.adopted
            return Adopted(
                request_id=RequestId(adopted.request_id),
                attempt=adopted.attempt,
                accepted=adopted.accepted,
                reason=adopted.reason,
            )
        case "path_taken":
            taken = message.path_taken
            return PathTaken(
                request_id=RequestId(taken.request_id),
                attempt=taken.attempt,
                path=taken.path,
                cause=taken.cause,
                num_bytes=taken.num_bytes,
                num_descriptors=taken.num_descriptors,
                read_s=taken.read_s,
            )
        case "failed":
            failed = message.failed
            return RequestFailed(
                request_id=RequestId(failed.request_id),
                attempt=failed.attempt,
                kind=failed.kind,
                message=failed.message,
                param=failed.param,
            )
        case _:
            return None
