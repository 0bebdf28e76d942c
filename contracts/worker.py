"""What a worker says of itself when a session opens."""

from dataclasses import dataclass
from enum import StrEnum

from contracts.ids import Incarnation, WorkerId


class Role(StrEnum):
    """What a worker is for."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """What the registry knows: where a worker is. Everything else it says itself (WorkerInfo)."""

    worker_id: WorkerId
    role: Role
    address: str  # host:port of its gRPC server
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's Hello. Routers pair workers of equal `semantic_hash` only."""

    worker_id: WorkerId
    role: Role
    incarnation: Incarnation
    semantic_hash: str
    max_model_len: int
    max_prompt_tokens: int  # what its cache can hold once
    block_size: int
    total_blocks: int
    attention_backend: str
    device: str
    version: str


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """All a worker process needs, every default resolved by `cluster`.

    `cluster_key` authenticates sessions and peer links and signs `kv_transfer_params`.
    `num_threads` is torch's intra-op thread count (None: torch's own choice). With several ranks
    (`tensor_parallel_size`, a process each) it and the KV memory are shared by them.
    """

    role: Role
    worker_id: WorkerId
    model_path: str
    cluster_key: str
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    device: str = "cpu"  # cpu, cuda, cuda:N
    dtype: str = "float32"  # float32, bfloat16, float16
    block_size: int = 16  # tokens
    kv_memory_bytes: int = 256 << 20
    kv_offload_bytes: int = 0  # host memory for cold prefix blocks; 0: none
    max_model_len: int | None = None  # None: the model's own
    max_step_tokens: int = 2048  # a step computes at most this many tokens
    max_running: int = 256  # sequences in a step
    max_waiting: int = 1024  # requests; beyond: refused
    num_threads: int | None = None
    tensor_parallel_size: int = 1  # ranks, on devices that follow `device`
    prefix_caching: bool = True
    lease_ms: int = 2000
    read_timeout_ms: int = 10_000  # D gives a silent read up and recomputes
    quarantine_ms: int = 10_000  # a read given up that lasts longer may last for ever (Q2)
    check_ledger: bool = False  # assert the ledger after every step (tests)
    logits_processor_pattern: str = ""  # names of allowed logits processors match it; empty: none
    warm_grammars: bool = False  # start what compiles grammars with the worker, not on first need

    def address(self, port: int, incarnation: Incarnation) -> WorkerAddress:
        """Where routers and peers find the worker that listens on `port`."""
        return WorkerAddress(self.worker_id, self.role, f"{self.host}:{port}", incarnation)
