"""The `kv_transfer_params` that P gives out for an exported prompt."""

from contracts.ids import BlockId, Incarnation, TransferId
from contracts.request import GenerationRequest
from contracts.worker import WorkerConfig
from engine.sequence import Started
from kv_transfer.params import HANDOFF_SCOPE, KvTransferParams, encode_incarnation, sign


def signed_params(
    request: GenerationRequest,
    started: Started,
    *,
    transfer_id: TransferId,
    incarnation: Incarnation,
    digest: str,
    semantic_hash: str,
    lease_ms: int,
    port: int,
    config: WorkerConfig,
) -> str:
    """JSON with the mac over all fields (C3). `port`: where peers reach this P."""
    params = KvTransferParams(
        transfer_id=transfer_id,
        incarnation=encode_incarnation(incarnation),
        prompt_digest=digest,
        semantic_hash=semantic_hash,
        remote_engine_id=config.worker_id,
        remote_host=config.host,
        remote_port=port,
        remote_request_id=request.request_id,
        remote_num_tokens=len(request.prompt_ids),
        lease_ms=lease_ms,
        remote_block_ids=tuple(BlockId(block) for block in started.block_ids),
        extra={"remote_prefill_cached_tokens": started.cached_tokens},
    )
    return sign(params, config.cluster_key, HANDOFF_SCOPE).encode()
