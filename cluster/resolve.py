"""Settings with every default found from the model and the machine; frozen, and checked whole.

How defaults are chosen:

- device: cuda if this machine has a GPU, else cpu.
- dtype: the checkpoint's own. On a CPU, float16 checkpoints, and bfloat16 ones where the CPU has no
  instructions for bfloat16, are loaded as float32 (faster there and closer to exact) if all
  workers' weights then fit a quarter of the free memory.
- kv_memory, of each worker: on a CPU, room for 16 sequences of full length, between 64 MiB and
  4 GiB, and never more than half of the free memory over all workers. On a GPU, 85 % of what is
  free after the weights, shared by the workers of that GPU; of N GPUs if a worker has N ranks.
- kv_offload_memory: none; what is set is taken from the machine's own memory before kv_memory is.
- max_model_len: the model's own, cut to what one worker's cache can hold once.
- num_threads: the cores, shared by the workers (1 on a GPU's host side is left to torch).
"""

import secrets
from dataclasses import dataclass, replace

from cluster.checkpoint import Checkpoint, find_model, read_checkpoint
from cluster.front import Front, resolve_front
from cluster.machine import Machine
from cluster.settings import ClusterSettings, read_cluster_key
from contracts.errors import ConfigurationError
from contracts.ids import WorkerId
from contracts.worker import Role, WorkerConfig
from router.config import RouterConfig

_MIN_KV_BYTES = 64 << 20
_MAX_CPU_KV_BYTES = 4 << 30
_UNKNOWN_KV_BYTES = 256 << 20  # when the config does not tell a token's size
_FULL_SEQUENCES = 16
_PROCESS_BYTES = 400 << 20  # a worker without weights and cache: torch, transformers


@dataclass(frozen=True, slots=True)
class ResolvedCluster:
    """A cluster with nothing left to find out. Holds keys: never log it."""

    settings: ClusterSettings
    model_path: str
    front: Front
    cluster_key: str
    device: str
    dtype: str
    kv_memory_bytes: int  # of each worker
    max_model_len: int | None
    num_threads: int | None  # of each worker
    worker_gpus: float  # what Ray reserves for each rank of a worker
    local: bool  # all on this machine, on its loopback address
    weight_bytes: int = 0  # of each worker, as loaded

    @property
    def served_model_name(self) -> str:
        """The name that answers carry."""
        return self.front.names[0]

    @property
    def prefill(self) -> int:
        """Number of prefill workers: none if aggregated."""
        return 0 if self.settings.aggregated else self.settings.prefill

    @property
    def decode(self) -> int:
        """Number of decode workers."""
        return self.settings.decode

    def located(self) -> "ResolvedCluster":
        """The same, with the model's folder on the node that asks (downloaded there if need be).

        Raises:
            ConfigurationError: this node has no such folder and cannot get it.
        """
        if self.local:
            return self
        return replace(self, model_path=str(find_model(self.settings.model)))

    def worker_config(self, role: Role, worker_id: str, host: str, port: int = 0) -> WorkerConfig:
        """The configuration of one worker."""
        settings = self.settings
        return WorkerConfig(
            role=role,
            worker_id=WorkerId(worker_id),
            model_path=self.model_path,
            cluster_key=self.cluster_key,
            host=host,
            port=port,
            device=self.device,
            dtype=self.dtype,
            block_size=settings.block_size,
            kv_memory_bytes=self.kv_memory_bytes,
            kv_offload_bytes=settings.kv_offload_memory,
            max_model_len=self.max_model_len,
            max_step_tokens=settings.max_step_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            num_threads=self.num_threads,
            tensor_parallel_size=settings.tensor_parallel_size,
            prefix_caching=settings.prefix_caching,
            lease_ms=settings.lease_ms,
            read_timeout_ms=settings.read_timeout_ms,
            check_ledger=settings.check_ledger,
            logits_processor_pattern=settings.logits_processor_pattern,
            warm_grammars=True,
        )

    def router_config(self) -> RouterConfig:
        """The configuration of the router replicas."""
        return self.front.router_config(self.settings, self.model_path, self.cluster_key)


def resolve(
    settings: ClusterSettings, machine: Machine, *, local: bool, num_workers: int | None = None
) -> ResolvedCluster:
    """Find every default and check that it can work.

    Args:
        settings: what a person set.
        machine: where the workers run (`local`), or what one of the nodes is like.
        local: all workers share this machine: make up a key, split memory and cores among them.
        num_workers: how many share the machine; default: all of the settings.

    Raises:
        ConfigurationError: one line that says what is wrong and what to do.
    """
    checkpoint = read_checkpoint(find_model(settings.model))
    if num_workers is None:
        prefill = 0 if settings.aggregated else settings.prefill
        num_workers = prefill + settings.decode if local else 1
    device = _device(settings, machine, check=local)
    dtype = _dtype(settings, checkpoint, machine, device, num_workers)
    on_gpu = device.startswith("cuda")
    if local and on_gpu:
        _check_ranks(settings, machine)
    sharing = _sharing(settings, machine, num_workers) if on_gpu else num_workers
    kv_bytes = settings.kv_memory or _kv_bytes(
        checkpoint, machine, device, dtype, sharing, settings
    )
    if local:
        on_host = settings.kv_offload_memory + (0 if on_gpu else kv_bytes)
        weights = 0 if on_gpu else checkpoint.weight_bytes_as(dtype)
        _check_memory(machine, num_workers, weights, on_host)
    if settings.kv_offload_memory and not settings.prefix_caching:
        raise ConfigurationError(
            "kv_offload_memory keeps what prefix_caching finds; switch that on"
        )
    key = read_cluster_key(settings.cluster_key, settings.cluster_key_file)
    if key is None and not local:
        raise ConfigurationError(
            "a cluster needs a key that all its processes share; set BATON_CLUSTER_KEY or"
            " cluster_key_file"
        )
    gpus = settings.worker_gpus
    if gpus is None:
        gpus = 0.0 if not on_gpu else round(1.0 / sharing, 4) if local else 1.0
    threads = settings.num_threads
    if threads is None and local and not on_gpu:
        threads = max(1, machine.cores // num_workers)
    return ResolvedCluster(
        settings=settings,
        model_path=str(checkpoint.path),
        front=resolve_front(settings, checkpoint.path),
        cluster_key=key or secrets.token_hex(32),
        device=device,
        dtype=dtype,
        kv_memory_bytes=kv_bytes,
        max_model_len=_max_model_len(settings, checkpoint, dtype, kv_bytes),
        num_threads=threads,
        worker_gpus=gpus,
        local=local,
        weight_bytes=checkpoint.weight_bytes_as(dtype),
    )


def resolve_router(settings: ClusterSettings) -> RouterConfig:
    """The configuration of a router alone, for workers that are elsewhere.

    Raises:
        ConfigurationError: no model folder, or no cluster key.
    """
    path = find_model(settings.model)
    key = read_cluster_key(settings.cluster_key, settings.cluster_key_file)
    if key is None:
        raise ConfigurationError("a router needs the cluster key of its workers")
    return resolve_front(settings, path).router_config(settings, str(path), key)


def _check_ranks(settings: ClusterSettings, machine: Machine) -> None:
    ranks = settings.tensor_parallel_size
    if ranks > machine.gpus:
        raise ConfigurationError(
            f"tensor_parallel_size {ranks} needs as many GPUs; this machine has {machine.gpus}"
        )


def _sharing(settings: ClusterSettings, machine: Machine, num_workers: int) -> int:
    """How many workers share a GPU, or the N GPUs of their ranks."""
    groups = max(1, machine.gpus // settings.tensor_parallel_size)
    return -(-num_workers // groups)


def _device(settings: ClusterSettings, machine: Machine, *, check: bool) -> str:
    if settings.device == "auto":
        return "cuda" if machine.gpus else "cpu"
    if check and settings.device.startswith("cuda") and not machine.gpus:
        raise ConfigurationError(
            f"device {settings.device} is set, but there is no NVIDIA GPU here; use --device cpu"
        )
    return settings.device


def _dtype(
    settings: ClusterSettings, checkpoint: Checkpoint, machine: Machine, device: str, workers: int
) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    stored = checkpoint.dtype
    if stored not in ("float32", "bfloat16", "float16"):
        stored = "bfloat16"  # an 8-bit storage type; computed in the usual one
    if device != "cpu" or (stored == "bfloat16" and machine.multiplies_bfloat16):
        return stored
    small = checkpoint.weight_bytes_as("float32") * workers <= machine.free_bytes // 4
    return "float32" if small else stored


def _kv_bytes(
    checkpoint: Checkpoint,
    machine: Machine,
    device: str,
    dtype: str,
    sharing: int,
    settings: ClusterSettings,
) -> int:
    ranks = settings.tensor_parallel_size
    weights = checkpoint.weight_bytes_as(dtype)
    if device.startswith("cuda"):
        if machine.gpu_free_bytes is None:
            raise ConfigurationError("cannot see how much GPU memory is free; set kv_memory")
        room = int(0.85 * ranks * machine.gpu_free_bytes / sharing) - weights
        if room < _MIN_KV_BYTES:
            raise ConfigurationError(
                f"too little GPU memory: {gib(machine.gpu_free_bytes)} free for {sharing}"
                f" worker(s) of {gib(weights)} weights each"
            )
        return room
    per_token = checkpoint.kv_bytes_per_token(dtype)
    if per_token is None or checkpoint.max_model_len is None:
        wish = _UNKNOWN_KV_BYTES
    else:
        wish = _FULL_SEQUENCES * checkpoint.max_model_len * per_token
    spare = machine.free_bytes // sharing - weights - ranks * _PROCESS_BYTES
    spare -= settings.kv_offload_memory
    return max(_MIN_KV_BYTES, min(wish, spare // 2, _MAX_CPU_KV_BYTES))


def _check_memory(machine: Machine, workers: int, weights: int, kv_bytes: int) -> None:
    """What the workers of this machine need of its own memory, not of its GPUs'."""
    need = workers * (weights + kv_bytes)
    if need > machine.free_bytes:
        raise ConfigurationError(
            f"too little memory: {workers} worker(s) need {gib(need)} ({gib(weights)} weights and"
            f" {gib(kv_bytes)} KV cache each), {gib(machine.free_bytes)} is available; use fewer"
            " workers, a smaller --kv-memory or --kv-offload-memory, or a smaller model"
        )


def _max_model_len(
    settings: ClusterSettings, checkpoint: Checkpoint, dtype: str, kv_bytes: int
) -> int | None:
    per_token = checkpoint.kv_bytes_per_token(dtype)
    wanted = settings.max_model_len or checkpoint.max_model_len
    if per_token is None or wanted is None:
        return settings.max_model_len
    # One block stays out of the sum: the sequence that fills the cache still needs to copy.
    blocks = kv_bytes // (per_token * settings.block_size) - 1
    held = max(0, blocks) * settings.block_size
    if settings.max_model_len is not None and held < settings.max_model_len:
        raise ConfigurationError(
            f"max_model_len {settings.max_model_len} does not fit a KV cache of {gib(kv_bytes)},"
            f" which holds {held} tokens; raise kv_memory or lower max_model_len"
        )
    if held < 2 * settings.block_size:
        raise ConfigurationError(
            f"a KV cache of {gib(kv_bytes)} holds {held} tokens of this model; raise kv_memory"
        )
    return min(wanted, held)


def gib(num_bytes: int) -> str:
    """Bytes for people: 11 MiB, 3.4 GiB."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / (1 << 30):.1f} GiB"
