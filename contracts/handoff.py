"""The messages of the peer link between a D and a P (protocol notes, section 4)."""

from dataclasses import dataclass

from contracts.events import TokensOut
from contracts.ids import Incarnation, TransferId


@dataclass(frozen=True, slots=True)
class PeerHello:
    """First message each way. `agent_metadata`, of each of the sender's ranks, gives read access
    to its whole cache: it travels on this authenticated link only (C4).

    `layout` is kv_transfer.layout's JSON, which says where each rank's blocks and words are.
    """

    incarnation: Incarnation
    protocol_version: int
    semantic_hash: str
    layout: str
    agent_metadata: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """D asks for a transfer. The same nonce again gets the same answer (C2)."""

    transfer_id: TransferId
    nonce: str
    prompt_digest: str


@dataclass(frozen=True, slots=True)
class ClaimGranted:
    """P's answer: what to read and what its generation words must be when all is read (F7).

    Ids and words are the same on all ranks of P.
    """

    transfer_id: TransferId
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    num_tokens: int  # tokens whose KV the blocks hold when the prefill is complete
    ready_tokens: int  # so far
    lease_ms: int
    first_tokens: tuple[TokensOut, ...] = ()  # if already drawn


@dataclass(frozen=True, slots=True)
class ClaimDenied:
    """P does not grant. `kind` is TransferGone or ClaimRefused."""

    transfer_id: TransferId
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """KV of the first `ready_tokens` prompt tokens is complete in P's memory (F2)."""

    transfer_id: TransferId
    ready_tokens: int


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Token 1 of every choice. A choice whose `finish` is set needs no decode."""

    transfer_id: TransferId
    tokens: tuple[TokensOut, ...]


@dataclass(frozen=True, slots=True)
class Revoked:
    """P took the transfer back. `reason`: aborted, expired, ended, pressure, failed."""

    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """D needs the blocks no more. Repeated until acknowledged or the lease is over (L4).

    `nonce` is the claim's: over a new link it proves whose transfer this is.
    """

    transfer_id: TransferId
    nonce: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """D posts its first read: under memory pressure P takes back those not being read (L6)."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class ReleaseAck:
    """P's blocks of that transfer are free (also for an unknown one)."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Beat:
    """Renews all claims of the link (L2); P echoes it, so D knows what was acknowledged."""

    sequence: int


FromDecode = PeerHello | Claim | Reading | Release | Beat
FromPrefill = (
    PeerHello | ClaimGranted | ClaimDenied | ChunkReady | FirstTokens | Revoked | ReleaseAck | Beat
)
