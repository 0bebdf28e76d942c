"""One engine inside an asyncio process: built off the loop, commanded from it, heard on it."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from contracts.errors import ConfigurationError, Overloaded
from contracts.ids import Incarnation
from contracts.memory import KvMemory
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import WorkerConfig, WorkerInfo
from engine.attention.native_build import native_library
from engine.attention.select import select_backend
from engine.audit import Finding, Known, lines
from engine.block_pool import BlockPool, Ledger
from engine.generations import GenerationWords
from engine.grammar import GrammarCompiler
from engine.guide import Guide
from engine.kv_cache import KvCache
from engine.loop import Engine
from engine.model import LoadedModel, load_model
from engine.packed import Packing, pack
from engine.plan import Chunk, SampleSlot, StepPlan, StepResult
from engine.probe import probe
from engine.processors import resolve
from engine.runner import ModelRunner
from engine.sampler import arg_max, prompt_scores, sample
from engine.sampling_state import SamplingStates
from engine.scheduler import EngineEvent, Scheduler, SchedulerConfig
from engine.speed_up import use_native_decoder

_LOOKS = 3
_BETWEEN_LOOKS_S = 0.05
_PAUSE_S = 0.5  # at most; usually one turn of the event loop
_QUIET_TRIES = 20

T = TypeVar("T")
log = logging.getLogger(__name__)


def package_version() -> str:
    """Baton's own version."""
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "0+source"


def needs_guide(params: SamplingParams) -> bool:
    """Whether something must be prepared before a request may run (see `EngineHost.prepare`)."""
    return params.grammar is not None or bool(params.processors)


class ModelComputer:
    """Computes a plan with a model: forward, then the scores and the draws."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._states = SamplingStates()

    def forget(self, sequences: Sequence[int]) -> None:
        """Drop what is kept for their draws."""
        self._states.drop(sequences)

    def compute(self, plan: StepPlan) -> StepResult:
        """Draws and scores, in plan order; returns when the device has finished."""
        bare = bool(plan.decodes) and all(s.bare for s in plan.decodes.streams)
        slots: list[SampleSlot] = []
        rows: list[int] = []  # of each slot
        scored: list[tuple[Chunk, int]] = []  # with the first of its rows
        row = len(plan.decodes) if bare else 0
        for chunk in plan.others if bare else plan.chunks:  # rows as in `rows_of`
            if chunk.scored is not None:
                scored.append((chunk, row))
            row += len(chunk.scored_ids)
            if chunk.slots:
                slots += chunk.slots
                rows += [row] * len(chunk.slots)
                row += 1
        with torch.inference_mode():
            logits = self.runner.forward(plan)
            scores = tuple(
                prompt_scores(
                    logits[first : first + len(chunk.scored_ids)],
                    chunk.scored_ids,
                    chunk.scored or 0,
                )
                for chunk, first in scored
            )
            tokens = arg_max(logits[: len(plan.decodes)]) if bare else None
            if slots:
                drawn = sample(logits, rows, slots, self._states)
                return StepResult(tuple(drawn), scores, tokens)
            if tokens is not None:
                return StepResult((), scores, tokens)
            if logits.is_cuda:
                torch.cuda.current_stream().synchronize()  # F2: complete before announced
            return StepResult((), scores)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What a worker needs of its engine besides commands: memory to register, facts to tell."""

    model: LoadedModel
    cache: KvCache
    words: GenerationWords
    scheduler: Scheduler
    backend_name: str
    max_model_len: int
    model_digest: dict[str, str]  # what P and D must agree on, by name

    @property
    def memory(self) -> KvMemory:
        """What a connector registers and peers read."""
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


def build(config: WorkerConfig, incarnation: Incarnation) -> tuple[EngineParts, ModelComputer]:
    """Load the model, size the cache, prove that this architecture is served right.

    Raises:
        UnsupportedModel: refused by name.
        ConfigurationError: the cache cannot hold what was asked for.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    compiling = threading.Thread(target=native_library, name="baton-compile", daemon=True)
    if config.device == "cpu":
        compiling.start()  # a few seconds at the first start on a machine
    model = load_model(config.model_path, config.device, config.dtype, config.max_model_len)
    spec = model.kv_spec(config.block_size)
    num_blocks = spec.blocks_in(config.kv_memory_bytes)
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
    head_dim = model.head_dim
    backend = select_backend(model.device, model.dtype, head_dim)
    runner = ModelRunner(model, cache, backend)
    difference = _probe_packed(runner)
    log.info(
        "model ready: %s layers, %d KV blocks of %d tokens, attention %s, probe difference %.2g",
        model.num_layers,
        num_blocks,
        config.block_size,
        backend.name,
        difference,
    )
    words = GenerationWords(num_blocks, incarnation)
    scheduler = Scheduler(
        SchedulerConfig(
            block_size=config.block_size,
            max_model_len=max_model_len,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            prefix_caching=config.prefix_caching,
        ),
        BlockPool(num_blocks, words),
    )
    tokenizer = Path(config.model_path) / "tokenizer.json"
    digest = {
        "weights": model.weights_digest(),
        "dtype": str(model.dtype),
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        if tokenizer.is_file()
        else "",
    }
    parts = EngineParts(model, cache, words, scheduler, backend.name, max_model_len, digest)
    return parts, ModelComputer(runner)


def _probe_packed(runner: ModelRunner) -> float:
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
    use_native_decoder(runner)
    return difference


class EngineHost:
    """An engine and the event loop that commands it. Both callbacks run on it."""

    def __init__(self, config: WorkerConfig, incarnation: Incarnation) -> None:
        self._config = config
        self._incarnation = incarnation
        self._engine: Engine | None = None
        self._parts: EngineParts | None = None
        self._grammars: GrammarCompiler | None = None
        self._auditing = asyncio.Lock()

    async def start(
        self,
        on_events: Callable[[list[EngineEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> EngineParts:
        """Build everything in a thread and start stepping. `on_failure`: the engine has died."""
        loop = asyncio.get_running_loop()

        def deliver(events: list[EngineEvent]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_events, events)

        def report(error: BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_failure, error)

        # In a thread that then ends, and with it its OpenMP team: while there are more of those
        # threads than cores, all of them sleep at every wait instead of spinning for a moment.
        with ThreadPoolExecutor(1, "baton-build") as builder:
            parts, computer = await loop.run_in_executor(
                builder, build, self._config, self._incarnation
            )
        self._parts = parts
        model = parts.model
        self._grammars = GrammarCompiler(
            model.folder / "tokenizer.json", model.vocab_size, model.eos_token_ids
        )
        self._engine = Engine(
            parts.scheduler, computer, deliver, report, check_ledger=self._config.check_ledger
        )
        self._engine.start()
        if self._config.warm_grammars:
            self._grammars.warm()
        return parts

    @property
    def parts(self) -> EngineParts:
        """What `start` built."""
        assert self._parts is not None, "the engine has not been started"
        return self._parts

    @property
    def engine(self) -> Engine:
        """The running engine."""
        assert self._engine is not None, "the engine has not been started"
        return self._engine

    def call(self, function: Callable[[Scheduler], T]) -> "Future[T]":
        """Run `function` in the engine thread before its next step."""
        return self.engine.call(function)

    async def prepare(self, request: GenerationRequest) -> Guide | None:
        """Make a request's grammar and processors ready; None if it has neither.

        Raises:
            InvalidRequest: they cannot be used; with the reason.
            Overloaded: not in time.
            Unavailable: the host has stopped.
        """
        params = request.params
        if not needs_guide(params):
            return None
        assert self._grammars is not None, "the engine has not been started"
        grammar = processors = None
        try:
            async with asyncio.timeout(request.deadline_s):
                if params.processors:  # in a thread: modules are imported
                    processors = await asyncio.to_thread(
                        resolve,
                        params.processors,
                        pattern=self._config.logits_processor_pattern,
                        extra_args=params.extra_args,
                    )
                if params.grammar is not None:
                    grammar = await self._grammars.compile(params.grammar)
        except TimeoutError:
            raise Overloaded("the deadline passed before the request was prepared") from None
        return Guide(grammar, processors)

    async def ledger(self) -> Ledger:
        """Count the blocks by state, between two steps."""
        return await asyncio.wrap_future(self.call(lambda scheduler: scheduler.pool.ledger()))

    async def audit(self, known: Callable[[], Known]) -> list[str]:
        """Recount all blocks, and find those that are held for nobody; empty if all is well.

        `known` tells what the worker knows at the moment of the call; it is called on the event
        loop. Engine and worker hear of each other's doings with a delay, so both must be looked
        at in the same moment: while the engine makes no step, the loop gets all its events, then
        `known` is made and sent in the same turn of the loop, behind every command that went
        before. What is left (a reservation on its way to the handoff that asked for it) is gone
        at another look; a finding counts if each of several looks finds it.

        Raises:
            EngineFailure: the engine has stopped.
            Overloaded: there was no moment for it.
        """
        async with self._auditing:
            found = await self._look(known)
            for _ in range(_LOOKS - 1):
                if not found:
                    break
                await asyncio.sleep(_BETWEEN_LOOKS_S)
                found &= await self._look(known)
        return lines(found)

    async def _look(self, known: Callable[[], Known]) -> set[Finding]:
        for _ in range(_QUIET_TRIES):
            step = await asyncio.wrap_future(self.engine.pause(_PAUSE_S))
            try:
                asked = self.engine.audit(step, known())
            finally:
                self.engine.resume()
            found = await asyncio.wrap_future(asked)
            if found is not None:
                return found
        raise Overloaded("the worker is too busy for an audit")

    def info(self, semantic_hash: str) -> WorkerInfo:
        """The worker's Hello."""
        parts, config = self.parts, self._config
        return WorkerInfo(
            worker_id=config.worker_id,
            role=config.role,
            incarnation=self._incarnation,
            semantic_hash=semantic_hash,
            max_model_len=parts.max_model_len,
            max_prompt_tokens=min(
                parts.max_model_len - 1, (parts.cache.num_blocks - 1) * config.block_size
            ),
            block_size=config.block_size,
            total_blocks=parts.cache.num_blocks,
            attention_backend=parts.backend_name,
            device=str(parts.model.device),
            version=package_version(),
        )

    def status(self) -> dict[str, object]:
        """Counters and the ledger after the last step: read without stopping the engine."""
        scheduler, load = self.parts.scheduler, self.engine.load
        states = {state: getattr(load, state) for state in Ledger.STATES}
        ledger = Ledger(load.total_blocks, **states)
        return {
            "ledger": {"total": ledger.total, **states},
            "balanced": ledger.balanced,
            "idle": ledger.idle,
            "steps": self.engine.steps,
            "busy_s": self.engine.busy_s,
            "preemptions": scheduler.preemptions,
            "evictions": scheduler.pool.evictions,
            "computed_prompt_tokens": scheduler.computed_prompt_tokens,
            "cached_prompt_tokens": scheduler.cached_prompt_tokens,
        }

    def stop(self) -> None:
        """End the engine thread and the compiler. Idempotent; accepts a host not started."""
        if self._grammars is not None:
            self._grammars.close()
        if self._engine is not None:
            self._engine.stop()
