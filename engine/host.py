"""One engine inside an asyncio process: built off the loop, commanded from it, heard on it."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from contracts.errors import Overloaded
from contracts.ids import Incarnation
from contracts.memory import KvMemory, RankProcess
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import WorkerConfig, WorkerInfo
from engine.audit import Finding, Known, lines
from engine.block_pool import BlockPool, Ledger
from engine.generations import GenerationWords
from engine.grammar import GrammarCompiler
from engine.guide import Guide
from engine.host_pool import HostLedger, HostPool
from engine.kv_cache import KvCache
from engine.loop import Engine
from engine.model import LoadedModel
from engine.plan import Chunk, SampleSlot, StepPlan, StepResult
from engine.processors import resolve
from engine.rank_build import build_rank
from engine.rank_followers import Followers
from engine.runner import ModelRunner
from engine.sampler import arg_max, prompt_scores, sample
from engine.sampling_state import SamplingStates
from engine.scheduler import EngineEvent, Scheduler, SchedulerConfig

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

    rank_memory: tuple[KvMemory, ...]  # by rank; addresses are those of each rank's own process

    @property
    def memory(self) -> KvMemory:
        """What a connector in this process registers and peers read."""
        return self.rank_memory[0]


def build(
    config: WorkerConfig, incarnation: Incarnation, followers: Followers | None = None
) -> tuple[EngineParts, ModelComputer]:
    """Build rank 0 and what only it has.

    Raises:
        ServingError: see `build_rank`; with followers, also what they say.
    """
    if followers is None:
        rank = build_rank(config, incarnation)
    else:
        try:
            rank = build_rank(config, incarnation, followers.group)
            followers.finish(rank.words)
        except Exception as error:
            raise followers.reason(error) from None
        rank.runner.followers = followers
    model, num_blocks = rank.model, rank.cache.num_blocks
    words, max_model_len, num_slots = rank.words, rank.max_model_len, rank.num_slots
    bytes_per_block = rank.cache.bytes_per_block * config.tensor_parallel_size
    scheduler = Scheduler(
        SchedulerConfig(
            block_size=config.block_size,
            max_model_len=max_model_len,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            prefix_caching=config.prefix_caching,
        ),
        BlockPool(num_blocks, words, HostPool(num_slots, bytes_per_block) if num_slots else None),
    )
    tokenizer = Path(config.model_path) / "tokenizer.json"
    digest = {
        "weights": model.weights_digest(),
        "dtype": str(model.dtype),
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        if tokenizer.is_file()
        else "",
    }
    memories = (rank.memory, *(followers.memories if followers is not None else ()))
    parts = EngineParts(
        model,
        rank.cache,
        words,
        scheduler,
        rank.runner.backend.name,
        max_model_len,
        digest,
        memories,
    )
    return parts, ModelComputer(rank.runner)


class EngineHost:
    """An engine and the event loop that commands it. Both callbacks run on it.

    `rank_service`: what each further rank's process runs beside its steps (see Followers).
    """

    def __init__(
        self, config: WorkerConfig, incarnation: Incarnation, rank_service: str = ""
    ) -> None:
        self._config = config
        self._rank_service = rank_service
        self.followers: Followers | None = None
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
        if self._config.tensor_parallel_size > 1:
            self.followers = Followers(self._config, self._incarnation, self._rank_service)
            self.followers.start()

        def deliver(events: list[EngineEvent]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_events, events)

        def report(error: BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_failure, error)

        # In a thread that then ends, and with it its OpenMP team: while there are more of those
        # threads than cores, all of them sleep at every wait instead of spinning for a moment.
        builder = ThreadPoolExecutor(1, "baton-build")
        try:
            parts, computer = await loop.run_in_executor(
                builder, build, self._config, self._incarnation, self.followers
            )
        finally:
            builder.shutdown(wait=False)  # who is cancelled here does not wait for the model
        self._parts = parts
        model = parts.model
        self._grammars = GrammarCompiler(
            model.folder / "tokenizer.json", model.vocab_size, model.eos_token_ids
        )
        self._engine = Engine(
            parts.scheduler, computer, deliver, report, check_ledger=self._config.check_ledger
        )
        self._engine.start()
        if self.followers is not None:
            self.followers.watch(self._engine.fail)
        if self._config.warm_grammars:
            self._grammars.warm()
        return parts

    @property
    def parts(self) -> EngineParts:
        """What `start` built."""
        assert self._parts is not None, "the engine has not been started"
        return self._parts

    @property
    def rank_processes(self) -> tuple[RankProcess, ...]:
        """The further ranks, with the channels to their `rank_service`."""
        if self.followers is None:
            return ()
        ends = zip(self.followers.pids, self.followers.service_ends, strict=True)
        return tuple(RankProcess(rank, pid, end) for rank, (pid, end) in enumerate(ends, 1))

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
        host = scheduler.pool.host
        kept = {state: getattr(load, f"offload_{state}") for state in HostLedger.STATES}
        return {
            "ledger": {"total": ledger.total, **states},
            "offload": {"total": host.total if host is not None else 0, **kept},
            "balanced": ledger.balanced,
            "idle": ledger.idle,
            "tensor_parallel_size": self._config.tensor_parallel_size,
            "steps": self.engine.steps,
            "busy_s": self.engine.busy_s,
            "preemptions": scheduler.preemptions,
            "evictions": scheduler.pool.evictions,
            "computed_prompt_tokens": scheduler.computed_prompt_tokens,
            "cached_prompt_tokens": scheduler.cached_prompt_tokens,
            "offloaded_bytes": load.offloaded_bytes,
            "loaded_bytes": load.loaded_bytes,
        }

    def stop(self) -> None:
        """End engine thread, compiler and ranks. Idempotent; accepts a host not started."""
        if self._grammars is not None:
            self._grammars.close()
        if self._engine is not None:
            self._engine.stop()
        if self.followers is not None:
            self.followers.close()
