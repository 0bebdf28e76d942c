"""A router without HTTP over fake workers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.ids import WorkerId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from router.config import RouterConfig
from router.detokenizer import Vocabulary
from router.job import Job
from router.metrics import RouterMetrics
from router.outbox import Outbox
from router.pieces import Piece
from router.request import Generation
from router.rules import OutputRules
from router.two_step import Transfer
from router.workers import WorkerPool
from tests.support.fake_worker import FakeCluster, FakeWorker, Script, byte_level_tokenizer, until

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.token_to_id("<|im_end|>") or 0
TEXT = "one two three four five six seven eight nine ten"


def script(request: GenerationRequest, choice: int) -> Sequence[int]:
    return [*TOKENIZER.encode(TEXT + str(choice)).ids, EOS]


LENGTH = len(TOKENIZER.encode(TEXT + "0").ids) + 1


def fake(name: str, tokens: Script = script) -> FakeWorker:
    role = Role.PREFILL if name[0] == "p" else Role.DECODE
    return FakeWorker(WorkerId(name), role, tokens)


@dataclass
class Router:
    pool: WorkerPool
    config: RouterConfig
    metrics: RouterMetrics

    def start(
        self,
        *,
        stop: Sequence[str] = (),
        limit_bytes: int | None = None,
        rules: OutputRules | None = None,
        cache_salt: str = "",
        priority: int = 0,
        transfer: Transfer | None = None,
        **params: Any,
    ) -> "Run":
        sampling = SamplingParams(**{"max_tokens": 100, "eos_token_ids": (EOS,), **params})
        job = Job(
            new_request_id(),
            tuple(TOKENIZER.encode("the prompt").ids),
            sampling,
            rules or OutputRules(tuple(stop), EOS),
            cache_salt,
            priority,
            transfer,
        )
        generation = Generation(
            job,
            pool=self.pool,
            vocabulary=Vocabulary(TOKENIZER),
            outbox=Outbox(limit_bytes),
            config=self.config,
            metrics=self.metrics,
        )
        generation.start()
        return Run(generation)

    def count(self, name: str) -> float:
        for line in self.metrics.render(()).decode().splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


class Run:
    """A generation and what has come out of it."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pieces: list[Piece] = []

    @property
    def request_id(self) -> str:
        return self.generation.job.request_id

    async def rest(self) -> "Run":
        """Read to the end; raises what the request ended with."""
        async with asyncio.timeout(10):
            while pieces := await self.generation.outbox.take():
                self.pieces.extend(pieces)
        return self

    async def some(self) -> "Run":
        async with asyncio.timeout(10):
            self.pieces.extend(await self.generation.outbox.take())
        return self

    def text(self, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces if piece.choice == choice)

    def tokens(self, choice: int = 0) -> list[int]:
        return [t for piece in self.pieces if piece.choice == choice for t in piece.token_ids]


@asynccontextmanager
async def router(tmp_path: Path, *workers: FakeWorker, **settings: Any) -> AsyncIterator[Router]:
    config = RouterConfig(
        model_path=str(tmp_path),
        served_model_name="m",
        cluster_key="k",
        **{"worker_wait_s": 2.0, **settings},
    )
    cluster = FakeCluster(*workers)
    pool = WorkerPool(cluster, cluster.open_session, router_id="r", cluster_key="k")
    pool.start()
    await until(lambda: len(pool.snapshot()) == sum(not w.down for w in workers))
    try:
        yield Router(pool, config, RouterMetrics("m"))
    finally:
        await pool.close()


def nothing_left(*workers: FakeWorker) -> bool:
    return all(worker.running == 0 for worker in workers)
