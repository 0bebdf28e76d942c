"""What /metrics says of workers' blocks and of faults."""

from contracts.events import PathTaken, WorkerLoad
from contracts.ids import RequestId, WorkerId
from contracts.worker import Role
from router.metrics import RouterMetrics
from router.placement import WorkerSnapshot

LEDGER = {"free": 1, "cached": 2, "owned": 3, "leased": 4, "reserved": 5, "quarantined": 6}


def lines(metrics: RouterMetrics, *workers: tuple[str, Role, WorkerLoad]) -> list[str]:
    snapshots = [
        WorkerSnapshot(WorkerId(name), role, "m", 100, load=load) for name, role, load in workers
    ]
    return metrics.render(snapshots).decode().splitlines()


def taken(path: str, cause: str = "", num_bytes: int = 0) -> PathTaken:
    return PathTaken(RequestId("r"), 0, path, cause, num_bytes, read_s=0.001)


def test_blocks_by_worker_and_state() -> None:
    metrics = RouterMetrics("m")
    load = WorkerLoad(free=1, cached=2, owned=3, leased=4, reserved=5, quarantined=6)
    shown = lines(metrics, ("p", Role.PREFILL, load), ("d", Role.DECODE, WorkerLoad(free=9)))
    for state, blocks in LEDGER.items():
        assert (
            f'baton:kv_blocks{{role="prefill",state="{state}",worker_id="p"}} {blocks}.0' in shown
        )
    assert 'baton:kv_blocks{role="decode",state="free",worker_id="d"} 9.0' in shown
    assert 'baton:kv_blocks{role="decode",state="owned",worker_id="d"} 0.0' in shown
    assert not [line for line in lines(metrics) if line.startswith("baton:kv_blocks{")], "both left"


def test_host_memory_by_worker() -> None:
    load = WorkerLoad(
        offload_free=1, offload_cached=2, offload_loading=3, offloaded_bytes=40, loaded_bytes=30
    )
    shown = lines(RouterMetrics("m"), ("d", Role.DECODE, load))
    for state, blocks in {"free": 1, "cached": 2, "loading": 3}.items():
        labels = f'role="decode",state="{state}",worker_id="d"'
        assert f"baton:kv_offload_blocks{{{labels}}} {blocks}.0" in shown
    for direction, moved in {"GPU_to_CPU": 40, "CPU_to_GPU": 30}.items():
        labels = f'role="decode",transfer_type="{direction}",worker_id="d"'
        assert f"baton:kv_offload_total_bytes{{{labels}}} {moved}.0" in shown


def test_ended_transfers_are_those_of_prefill_workers() -> None:
    load = WorkerLoad(expired_transfers=3, revoked_transfers=2)
    shown = lines(RouterMetrics("m"), ("p", Role.PREFILL, load), ("d", Role.DECODE, load))
    found = [line for line in shown if line.startswith("baton:worker_ended_transfers{")]
    assert found == [
        'baton:worker_ended_transfers{reason="expired",role="prefill",worker_id="p"} 3.0',
        'baton:worker_ended_transfers{reason="revoked",role="prefill",worker_id="p"} 2.0',
    ]


def test_failed_handoffs_are_counted_by_cause_and_broken_fences_apart() -> None:
    metrics = RouterMetrics("m")
    assert "baton:fence_breaks_total 0.0" in lines(metrics), "shown before the first"
    for cause in ("TransferGone", "FenceBroken", "TransferGone"):
        metrics.handoff(taken("recomputed", cause))
    metrics.handoff(taken("local"))
    metrics.handoff(taken("remote", num_bytes=4096))
    shown = lines(metrics)
    assert 'baton:recomputed_handoffs_total{cause="TransferGone"} 2.0' in shown
    assert 'baton:recomputed_handoffs_total{cause="FenceBroken"} 1.0' in shown
    assert "baton:fence_breaks_total 1.0" in shown
    assert "baton:handoff_bytes_count 1.0" in shown


def test_lost_sessions_are_counted_by_role() -> None:
    metrics = RouterMetrics("m")
    assert 'baton:lost_sessions_total{role="decode"} 0.0' in lines(metrics)
    metrics.lost_sessions.labels("decode").inc()
    assert 'baton:lost_sessions_total{role="decode"} 1.0' in lines(metrics)
