"""What an engine tells routers of its queue and its memory."""

from contracts.events import WorkerLoad
from engine.block_pool import BlockPool
from engine.roster import Roster


def load_of(step: int, roster: Roster, pool: BlockPool) -> WorkerLoad:
    """Queue and memory after `step` planned steps."""
    waiting, running = roster.waiting, roster.running
    ledger, host = pool.ledger(), pool.host
    kept = host.ledger() if host is not None else None
    return WorkerLoad(
        step=step,
        waiting=len(waiting),
        running=len(running),
        waiting_tokens=roster.waiting_tokens
        + sum([s.remaining for s in running if s.stream is None and s.remaining > 1]),
        free_blocks=pool.available,
        total_blocks=ledger.total,
        free=ledger.free,
        cached=ledger.cached,
        owned=ledger.owned,
        leased=ledger.leased,
        reserved=ledger.reserved,
        quarantined=ledger.quarantined,
        offload_free=kept.free if kept else 0,
        offload_cached=kept.cached if kept else 0,
        offload_loading=kept.loading if kept else 0,
        offloaded_bytes=host.saved_bytes if host else 0,
        loaded_bytes=host.loaded_bytes if host else 0,
    )
