"""What a router replica counts. Names follow vLLM's where the meaning is the same."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from contracts.errors import FenceBroken
from contracts.events import PathTaken, WorkerLoad
from contracts.worker import Role
from router.placement import Decision, WorkerSnapshot

_BYTES = tuple(4.0**n for n in range(6, 18))  # 4 KiB to 16 GiB
_READ_SECONDS = tuple(0.0001 * 2**n for n in range(17))  # 0.1 ms to 6.6 s
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)


class RouterMetrics:
    """One registry a router replica, so that several apps in a process do not collide."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._label = {"model_name": model_name}
        self.running = self._gauge("vllm:num_requests_running", "Requests in this router")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Output tokens")
        self.cache_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up")
        self.cache_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in a cache")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to first token")
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Time between frames")
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Whole request")
        self._finished = Counter(
            "vllm:request_success",
            "Choices by finish reason",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._placements = Counter(
            "baton:placements",
            "Decisions by path and reason",
            ["path", "reason"],
            registry=self._registry,
        )
        self._paths = Counter(
            "baton:path", "How prompts were computed", ["path"], registry=self._registry
        )
        self._errors = Counter(
            "baton:request_errors", "Requests by error", ["kind"], registry=self._registry
        )
        self.retries = Counter(
            "baton:retries", "Attempts repeated before a token", registry=self._registry
        )
        self.replays = Counter(
            "baton:replays", "Attempts continued after a token", registry=self._registry
        )
        self.token_faults = Counter(
            "baton:token_faults", "Contradicting tokens from workers", registry=self._registry
        )
        self.refused_handoffs = Counter(
            "baton:refused_handoffs", "Adopts that a D refused", registry=self._registry
        )
        self._recomputed = Counter(
            "baton:recomputed_handoffs",
            "Prompts that a D computed itself because the handoff failed, by cause",
            ["cause"],
            registry=self._registry,
        )
        self.fence_breaks = Counter(
            "baton:fence_breaks",
            "Handoffs whose blocks changed hands while being read",
            registry=self._registry,
        )
        self.lost_sessions = Counter(
            "baton:lost_sessions",
            "Sessions with workers that broke",
            ["role"],
            registry=self._registry,
        )
        for role in Role:  # a rate needs the zero before the first
            self.lost_sessions.labels(role.value)
        self.disconnects = Counter(
            "baton:client_disconnects", "Clients gone before the end", registry=self._registry
        )
        labels = ["worker_id", "role"]
        self._worker_running = Gauge(
            "baton:worker_running", "Running on a worker", labels, registry=self._registry
        )
        self._worker_waiting = Gauge(
            "baton:worker_waiting", "Waiting on a worker", labels, registry=self._registry
        )
        self._worker_free = Gauge(
            "baton:worker_free_blocks", "Free KV blocks", labels, registry=self._registry
        )
        self._kv_blocks = Gauge(
            "baton:kv_blocks", "KV blocks by state", [*labels, "state"], registry=self._registry
        )
        self._offload_blocks = Gauge(
            "baton:kv_offload_blocks",
            "KV blocks of host memory by state",
            [*labels, "state"],
            registry=self._registry,
        )
        self._offload_bytes = Gauge(
            "baton:kv_offload_total_bytes",
            "KV bytes moved to and from host memory since the worker's start",
            [*labels, "transfer_type"],
            registry=self._registry,
        )
        self._ended_transfers = Gauge(
            "baton:worker_ended_transfers",
            "Transfers that a P ended since its start, by reason: expired leases, revoked for "
            "lack of memory",
            [*labels, "reason"],
            registry=self._registry,
        )
        self._handoff_bytes = self._handoff("bytes", "KV bytes read", _BYTES)
        self._handoff_descriptors = self._handoff(
            "descriptors", "Contiguous regions read", tuple(2.0**n for n in range(13))
        )
        self._handoff_seconds = self._handoff("read_seconds", "Time in KV reads", _READ_SECONDS)
        self._handoff_rate = self._handoff(
            "gigabytes_per_second", "KV read rate", tuple(0.01 * 2**n for n in range(16))
        )
        self._waiting = self._gauge("vllm:num_requests_waiting", "Waiting on all workers")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._label), registry=self._registry).labels(**self._label)

    def _handoff(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"baton:handoff_{name}",
            f"{text}, for each handoff",
            registry=self._registry,
            buckets=buckets,
        )

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, list(self._label), registry=self._registry)
        return counter.labels(**self._label)

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(
            name, text, list(self._label), registry=self._registry, buckets=_SECONDS
        )
        return histogram.labels(**self._label)

    def placed(self, decision: Decision) -> None:
        """Count a decision."""
        self._placements.labels(decision.path.value, decision.reason.value).inc()

    def handoff(self, taken: PathTaken) -> None:
        """Count how a handoff ended: what a D read from a P, or why it computed the prompt."""
        if taken.path == "recomputed":
            self._recomputed.labels(taken.cause).inc()
            if taken.cause == FenceBroken.__name__:
                self.fence_breaks.inc()
        if not taken.num_bytes:
            return
        self._handoff_bytes.observe(taken.num_bytes)
        self._handoff_descriptors.observe(taken.num_descriptors)
        self._handoff_seconds.observe(taken.read_s)
        if taken.read_s > 0:
            self._handoff_rate.observe(taken.num_bytes / taken.read_s / 1e9)

    def path(self, path: str) -> None:
        """Count how a prompt was computed: remote, local, recomputed, replayed."""
        self._paths.labels(path).inc()

    def finished(self, reason: str) -> None:
        """Count a choice that ended."""
        self._finished.labels(**self._label, finished_reason=reason).inc()

    def failed(self, kind: str) -> None:
        """Count a request that ended with an error."""
        self._errors.labels(kind).inc()

    def render(self, workers: Iterable[WorkerSnapshot]) -> bytes:
        """The Prometheus text, with the workers' load of this moment."""
        waiting = 0
        for gauge in (
            *(self._worker_running, self._worker_waiting, self._worker_free),
            *(self._kv_blocks, self._ended_transfers),
            *(self._offload_blocks, self._offload_bytes),
        ):
            gauge.clear()
        for worker in workers:
            labels = (worker.worker_id, worker.role.value)
            self._worker_running.labels(*labels).set(worker.load.running)
            self._worker_waiting.labels(*labels).set(worker.load.waiting)
            self._worker_free.labels(*labels).set(worker.load.free_blocks)
            for state, blocks in _ledger(worker.load).items():
                self._kv_blocks.labels(*labels, state).set(blocks)
            for state, blocks in _offload(worker.load).items():
                self._offload_blocks.labels(*labels, state).set(blocks)
            moved = self._offload_bytes  # vLLM's names for the directions
            moved.labels(*labels, "GPU_to_CPU").set(worker.load.offloaded_bytes)
            moved.labels(*labels, "CPU_to_GPU").set(worker.load.loaded_bytes)
            if worker.role is Role.PREFILL:
                ended = self._ended_transfers
                ended.labels(*labels, "expired").set(worker.load.expired_transfers)
                ended.labels(*labels, "revoked").set(worker.load.revoked_transfers)
            waiting += worker.load.waiting
        self._waiting.set(waiting)
        return generate_latest(self._registry)


def _ledger(load: WorkerLoad) -> dict[str, int]:
    """Blocks by state; they add up to the worker's blocks."""
    return {
        "free": load.free,
        "cached": load.cached,
        "owned": load.owned,
        "leased": load.leased,
        "reserved": load.reserved,
        "quarantined": load.quarantined,
    }


def _offload(load: WorkerLoad) -> dict[str, int]:
    """Blocks of host memory by state."""
    return {
        "free": load.offload_free,
        "cached": load.offload_cached,
        "loading": load.offload_loading,
    }


class RequestTimes:
    """One request's clock: when its frames came, put into the histograms."""

    def __init__(self, metrics: RouterMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self.started_at = clock()
        self._last_at: float | None = None

    def frame(self, num_tokens: int, finish_reason: str | None) -> None:
        """New tokens of one choice."""
        now = self._clock()
        if self._last_at is None:
            self._metrics.ttft.observe(now - self.started_at)
        else:
            self._metrics.itl.observe(now - self._last_at)
        self._last_at = now
        self._metrics.generation_tokens.inc(num_tokens)
        if finish_reason is not None:
            self._metrics.finished(finish_reason)

    def ended(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The request ended well."""
        self._metrics.e2e.observe(self._clock() - self.started_at)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.cache_queries.inc(prompt_tokens)
        self._metrics.cache_hits.inc(cached_tokens)
