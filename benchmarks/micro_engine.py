"""An engine in this process without its thread: sequences put into it, steps made one by one."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.micro_weights import Weights, kv_bytes_per_token, read_weights
from benchmarks.split_pair import prompts
from contracts.errors import OutOfBlocks
from contracts.events import TokensOut
from contracts.ids import Incarnation, WorkerId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerConfig
from engine.attention.base import AttentionBackend
from engine.host import EngineParts, ModelComputer, build
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.sequence import blocks_for

_SPARE_TOKENS = 64  # for each sequence: a block begun, and the growth that the pool holds back
ENDLESS = SamplingParams(max_tokens=1 << 30, temperature=0.0)


class DoesNotFit(Exception):
    """The model's context or the cache is too small for what was to be measured."""


@dataclass(slots=True, eq=False)
class MicroEngine:
    """A built engine and what is asked of it. Used by one thread."""

    parts: EngineParts
    computer: ModelComputer
    weights: Weights
    draw: random.Random
    _pattern: torch.Tensor | None = None
    _prefilling: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parts.model.device

    @property
    def backend(self) -> type[AttentionBackend]:
        """The kind of attention that its model uses."""
        backend = self.parts.model.slot.backend
        assert backend is not None, "a built engine has one"
        return type(backend)

    @property
    def runner(self) -> ModelRunner:
        """What computes the steps."""
        return self.computer.runner

    @property
    def scheduler(self) -> Scheduler:
        """The engine's own."""
        return self.parts.scheduler

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        return self.parts.cache.bytes_per_block // self.parts.cache.block_size

    def seen_tokens(self, context: int) -> float:
        """Tokens that a query after `context` sees, in the mean over the layers."""
        layers = self.parts.model.layers
        seen = [min(context, context if one.window is None else one.window) for one in layers]
        return sum(seen) / len(seen)

    def attention_flops(self, seen: float) -> float:
        """Of all layers, for `seen` pairs of a query and a key."""
        return sum(4.0 * one.num_heads * one.head_dim for one in self.parts.model.layers) * seen

    def prompt(self, length: int) -> tuple[int, ...]:
        """Token ids that no cache knows."""
        return tuple(prompts(self.draw, self.parts.model.vocab_size, length))

    @contextmanager
    def decoding(self, batch: int, context: int, steps: int) -> Iterator[None]:
        """`batch` sequences after `context` tokens, each with room for `steps` steps.

        They come as a handoff's do, so nothing is computed for them: their KV is random.

        Raises:
            DoesNotFit: no room for so many or such long ones.
        """
        if context + steps + 1 > self.parts.max_model_len:
            raise DoesNotFit(f"the context is {self.parts.max_model_len} tokens")
        total = self.parts.cache.num_blocks
        if batch * blocks_for(context + steps + 1, self.parts.cache.block_size) > total:
            raise DoesNotFit(f"the cache has {total} blocks")
        self._prefilling = False
        running: list[GenerationRequest] = []
        try:
            for _ in range(batch):
                running.append(GenerationRequest(new_request_id(), self.prompt(context), ENDLESS))
                self._start(running[-1])
            yield
        except OutOfBlocks as error:
            raise DoesNotFit(f"the cache has {total} blocks") from error
        finally:
            self.end(running)

    def _start(self, request: GenerationRequest) -> None:
        reservation = self.scheduler.reserve(request)
        blocks = torch.tensor(reservation.blocks, device=self.device)
        tensor = self.parts.cache.tensor
        if self._pattern is None or len(self._pattern) < len(blocks):
            shape = (len(blocks), *tensor.shape[1:])
            self._pattern = torch.randn(shape, device=self.device).to(tensor.dtype)
        tensor.index_copy_(0, blocks, self._pattern[: len(blocks)])  # real pages, not zeros
        token = TokensOut(request.request_id, request.attempt, 0, 0, (request.prompt_ids[0],))
        self.scheduler.adopt(reservation, [token])

    def end(self, requests: list[GenerationRequest]) -> None:
        """Drop them, finished or not."""
        for request in requests:
            self.scheduler.abort(request.request_id, request.attempt)
        self.publish()

    def add_prefill(self, length: int) -> GenerationRequest:
        """A prompt to compute, with one token to draw.

        Raises:
            DoesNotFit: it is too long.
        """
        if length + 1 > self.parts.max_model_len:
            raise DoesNotFit(f"the context is {self.parts.max_model_len} tokens")
        params = SamplingParams(max_tokens=1, temperature=0.0)
        request = GenerationRequest(new_request_id(), self.prompt(length), params)
        self.scheduler.add(request, export=False)
        self._prefilling = True
        return request

    @property
    def finishing(self) -> bool:
        """Whether a prompt is left of which a part is computed: it will end without more."""
        return self._prefilling and self.scheduler.has_work

    def step(self) -> None:
        """Make one step as the engine's thread does."""
        plan = self.scheduler.schedule()
        self.publish()
        self.scheduler.commit(plan, self.computer.compute(plan))
        self.publish()

    def publish(self) -> None:
        """Gather what a step has to tell."""
        over = publish(self.scheduler)
        if over:
            self.computer.forget(over)


def publish(scheduler: Scheduler) -> list[int]:
    """What the engine's thread does with a scheduler twice a step; keys of those that are over."""
    scheduler.pool.verify()
    over = scheduler.take_over()
    scheduler.load()
    scheduler.take_events()
    return over


def open_engine(
    model: Path,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    sizes: Sequence[tuple[int, int]],
    seed: int,
) -> MicroEngine:
    """Build an engine on the model in a folder.

    Args:
        model: the folder.
        device: see WorkerConfig.
        dtype: likewise.
        threads: likewise.
        sizes: (sequences, tokens of each) that it is to hold, one after the other. The cache is
            made for the largest, but takes no more than a third of the free memory.
        seed: of the prompts.

    Raises:
        ConfigurationError: it cannot be used; with the reason.
        UnsupportedModel: likewise.
    """
    itemsize = getattr(torch, dtype).itemsize
    tokens = max(count * (length + _SPARE_TOKENS) for count, length in sizes) + _SPARE_TOKENS
    wanted = kv_bytes_per_token(model, itemsize) * tokens
    config = WorkerConfig(
        role=Role.DECODE,
        worker_id=WorkerId("micro"),
        model_path=str(model),
        cluster_key="",
        device=device,
        dtype=dtype,
        kv_memory_bytes=min(wanted, _free_bytes(device) // 3),
        max_running=max(count for count, _ in sizes),
        num_threads=threads,
    )
    parts, computer = build(config, Incarnation(1))
    return MicroEngine(parts, computer, read_weights(parts.model.folder), random.Random(seed))


def _free_bytes(device: str) -> int:
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)
