"""What every rank of a worker builds: its share of the model, its cache, its runner."""

import logging
import threading
from dataclasses import dataclass

import torch

from contracts.errors import ConfigurationError
from contracts.ids import Incarnation
from contracts.memory import KvMemory
from contracts.worker import WorkerConfig
from engine.attention.native_build import native_library
from engine.attention.select import select_backend
from engine.generations import GenerationWords
from engine.kv_cache import KvCache
from engine.model import LoadedModel, load_model
from engine.offload import OffloadMemory, slots_in
from engine.packed import Packing, pack
from engine.probe import probe
from engine.rank_group import RankGroup
from engine.runner import ModelRunner
from engine.speed_up import use_native_decoder
from engine.tensor_parallel import rank_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankParts:
    """One rank, ready to compute steps.

    `max_model_len` is what model and cache allow, `num_slots` the blocks its host memory holds.
    """

    model: LoadedModel
    cache: KvCache
    words: GenerationWords
    runner: ModelRunner
    max_model_len: int
    num_slots: int

    @property
    def memory(self) -> KvMemory:
        """What a connector in this process registers and peers read: this rank's heads."""
        device = self.model.device
        return KvMemory(
            dtype=str(self.model.dtype),
            block_size=self.cache.block_size,
            base_address=self.cache.base_address,
            bytes_per_block=self.cache.bytes_per_block,
            num_blocks=self.cache.num_blocks,
            words_address=self.words.address,
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            device_index=(device.index or 0) if device.type == "cuda" else None,
        )


def build_rank(
    config: WorkerConfig, incarnation: Incarnation, group: RankGroup | None = None
) -> RankParts:
    """Load the model, size the cache, prove that this architecture is served right.

    Args:
        config: the worker's; its memory and threads are for all its ranks together.
        incarnation: the worker's.
        group: the ranks, not yet connected; None if there is one. All of them do this together.

    Raises:
        UnsupportedModel: refused by name.
        ConfigurationError: the cache cannot hold what was asked for, or the ranks do not suit.
        EngineFailure: another rank is gone.
    """
    size = group.size if group is not None else 1
    if config.num_threads is not None or size > 1:
        threads = config.num_threads or torch.get_num_threads()
        torch.set_num_threads(max(1, threads // size))
    compiling = threading.Thread(target=native_library, name="baton-compile", daemon=True)
    if config.device == "cpu":
        compiling.start()  # a few seconds at the first start on a machine
    device = rank_device(torch.device(config.device), group.rank) if group else config.device
    model = load_model(config.model_path, device, config.dtype, config.max_model_len, group)
    spec = model.kv_spec(config.block_size)
    num_blocks = spec.blocks_in(config.kv_memory_bytes // size)
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise ConfigurationError(
            f"--max-model-len {config.max_model_len} needs more KV memory than "
            f"{config.kv_memory_bytes >> 20} MiB, which hold {capacity} tokens; "
            "raise --kv-memory or lower --max-model-len"
        )
    max_model_len = min(model.max_model_len, capacity)
    if max_model_len < 2 * config.block_size:
        raise ConfigurationError(
            f"{config.kv_memory_bytes >> 20} MiB of KV memory hold only {capacity} tokens; "
            "raise --kv-memory"
        )
    if compiling.ident is not None:
        compiling.join()
    cache = KvCache(spec, num_blocks, model.device)
    backend = select_backend(model.device, model.dtype, model.head_dim)
    runner = ModelRunner(model, cache, backend)
    difference = _probe_packed(runner, alone=group is None)
    if group is not None:
        group.built()
    log.info(
        "model ready: %s layers, %d KV blocks of %d tokens, attention %s, probe difference %.2g",
        model.num_layers,
        num_blocks,
        config.block_size,
        backend.name,
        difference,
    )
    num_slots = slots_in(config.kv_offload_bytes // size, spec.bytes_per_block)
    if num_slots:
        runner.offload = OffloadMemory(cache, num_slots)
    words = GenerationWords(num_blocks, incarnation)
    return RankParts(model, cache, words, runner, max_model_len, num_slots)


def _probe_packed(runner: ModelRunner, *, alone: bool) -> float:
    """`probe`, with faster layers if the model is on the CPU and served right that way."""
    packing = pack(runner.model.module) if runner.model.device.type == "cpu" else Packing()
    try:
        difference = probe(runner)
    except Exception as error:
        if not packing.replaced:
            raise
        log.warning("the layers stay as they are: with faster ones, %s", error)
        packing.undo()
        return probe(runner)
    if alone:  # it knows no sums over ranks
        use_native_decoder(runner)
    return difference
