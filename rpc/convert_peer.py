"""The peer link's messages to protobuf frames and back. Conventions as in rpc.convert."""

from typing import assert_never

from contracts.errors import InvalidRequest
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
    Reading,
    Release,
    ReleaseAck,
    Revoked,
)
from contracts.ids import Incarnation, TransferId
from rpc.convert import tokens_from_pb, tokens_to_pb
from rpc.packing import pack_ids, unpack_ids
from rpc.pb import worker_pb2 as pb


def _hello_to_pb(hello: PeerHello) -> pb.PeerHello:
    return pb.PeerHello(
        incarnation=hello.incarnation,
        protocol_version=hello.protocol_version,
        semantic_hash=hello.semantic_hash,
        layout=hello.layout,
        agent_metadata=hello.agent_metadata,
    )


def _hello_from_pb(message: pb.PeerHello) -> PeerHello:
    return PeerHello(
        incarnation=Incarnation(message.incarnation),
        protocol_version=message.protocol_version,
        semantic_hash=message.semantic_hash,
        layout=message.layout,
        agent_metadata=tuple(message.agent_metadata),
    )


def decode_frame(message: FromDecode) -> pb.DecodeFrame:
    """A message of D, to the wire."""
    match message:
        case PeerHello():
            return pb.DecodeFrame(hello=_hello_to_pb(message))
        case Claim():
            return pb.DecodeFrame(
                claim=pb.Claim(
                    transfer_id=message.transfer_id,
                    nonce=message.nonce,
                    prompt_digest=message.prompt_digest,
                )
            )
        case Reading():
            return pb.DecodeFrame(reading=pb.Reading(transfer_id=message.transfer_id))
        case Release():
            return pb.DecodeFrame(
                release=pb.Release(transfer_id=message.transfer_id, nonce=message.nonce)
            )
        case Beat():
            return pb.DecodeFrame(beat=pb.Beat(sequence=message.sequence))
        case _:
            assert_never(message)


def from_decode_frame(frame: pb.DecodeFrame) -> FromDecode | None:
    """A message of D, from the wire; None for one that this version does not know."""
    match frame.WhichOneof("message"):
        case "hello":
            return _hello_from_pb(frame.hello)
        case "claim":
            return Claim(
                transfer_id=TransferId(frame.claim.transfer_id),
                nonce=frame.claim.nonce,
                prompt_digest=frame.claim.prompt_digest,
            )
        case "reading":
            return Reading(TransferId(frame.reading.transfer_id))
        case "release":
            return Release(TransferId(frame.release.transfer_id), frame.release.nonce)
        case "beat":
            return Beat(frame.beat.sequence)
        case _:
            return None


def prefill_frame(message: FromPrefill) -> pb.PrefillFrame:
    """A message of P, to the wire."""
    match message:
        case PeerHello():
            return pb.PrefillFrame(hello=_hello_to_pb(message))
        case ClaimGranted():
            return pb.PrefillFrame(
                granted=pb.ClaimGranted(
                    transfer_id=message.transfer_id,
                    block_ids=pack_ids(message.block_ids),
                    generations=message.generations,
                    num_tokens=message.num_tokens,
                    ready_tokens=message.ready_tokens,
                    lease_ms=message.lease_ms,
                    first_tokens=[tokens_to_pb(tokens) for tokens in message.first_tokens],
                )
            )
        case ClaimDenied():
            return pb.PrefillFrame(
                denied=pb.ClaimDenied(
                    transfer_id=message.transfer_id, kind=message.kind, message=message.message
                )
            )
        case ChunkReady():
            return pb.PrefillFrame(
                chunk_ready=pb.ChunkReady(
                    transfer_id=message.transfer_id, ready_tokens=message.ready_tokens
                )
            )
        case FirstTokens():
            return pb.PrefillFrame(
                first_tokens=pb.FirstTokens(
                    transfer_id=message.transfer_id,
                    tokens=[tokens_to_pb(tokens) for tokens in message.tokens],
                )
            )
        case Revoked():
            return pb.PrefillFrame(
                revoked=pb.Revoked(transfer_id=message.transfer_id, reason=message.reason)
            )
        case ReleaseAck():
            return pb.PrefillFrame(release_ack=pb.ReleaseAck(transfer_id=message.transfer_id))
        case Beat():
            return pb.PrefillFrame(beat=pb.Beat(sequence=message.sequence))
        case _:
            assert_never(message)


def from_prefill_frame(frame: pb.PrefillFrame) -> FromPrefill | None:
    """A message of P, from the wire; None for one that this version does not know."""
    match frame.WhichOneof("message"):
        case "hello":
            return _hello_from_pb(frame.hello)
        case "granted":
            return _granted_from_pb(frame.granted)
        case "denied":
            return ClaimDenied(
                transfer_id=TransferId(frame.denied.transfer_id),
                kind=frame.denied.kind,
                message=frame.denied.message,
            )
        case "chunk_ready":
            return ChunkReady(
                transfer_id=TransferId(frame.chunk_ready.transfer_id),
                ready_tokens=frame.chunk_ready.ready_tokens,
            )
        case "first_tokens":
            return FirstTokens(
                transfer_id=TransferId(frame.first_tokens.transfer_id),
                tokens=tuple(tokens_from_pb(tokens) for tokens in frame.first_tokens.tokens),
            )
        case "revoked":
            return Revoked(
                transfer_id=TransferId(frame.revoked.transfer_id), reason=frame.revoked.reason
            )
        case "release_ack":
            return ReleaseAck(TransferId(frame.release_ack.transfer_id))
        case "beat":
            return Beat(frame.beat.sequence)
        case _:
            return None


def _granted_from_pb(message: pb.ClaimGranted) -> ClaimGranted:
    block_ids = unpack_ids(message.block_ids)
    if len(block_ids) != len(message.generations):
        raise InvalidRequest(f"{len(block_ids)} blocks, {len(message.generations)} generations")
    return ClaimGranted(
        transfer_id=TransferId(message.transfer_id),
        block_ids=block_ids,
        generations=tuple(message.generations),
        num_tokens=message.num_tokens,
        ready_tokens=message.ready_tokens,
        lease_ms=message.lease_ms,
        first_tokens=tuple(tokens_from_pb(tokens) for tokens in message.first_tokens),
    )
