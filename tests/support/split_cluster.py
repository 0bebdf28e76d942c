"""A prefill and a decode worker in this process, over real gRPC and NIXL, driven token by token."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from contracts.events import (
    Adopted,
    FinishReason,
    PathTaken,
    PrefillStarted,
    PromptLogprob,
    PromptScores,
    RequestFailed,
    TokenLogprob,
    TokensOut,
    WorkerEvent,
    WorkerLoad,
)
from contracts.ids import RequestId, WorkerId, new_incarnation, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerConfig
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from rpc.session_client import WorkerSession

KEY = "test-cluster-key"


@dataclass(eq=False)
class Answer:
    """What came back for one request."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    finish: list[FinishReason | None]
    path: str = ""
    cause: str = ""
    kv_transfer_params: str = ""
    cached_tokens: int = 0
    num_bytes: int = 0
    num_descriptors: int = 0
    failure: str = ""
    param: str = ""  # of the failure
    scores: dict[int, PromptLogprob] = field(default_factory=dict[int, PromptLogprob])
    beam: bool = False
    adopted: Adopted | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return bool(self.failure) or all(reason is not None for reason in self.finish)


class SplitCluster:
    """The two workers and a session to each. `on_event` sees all events first."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self.prefill = prefill
        self.decode = decode
        self.answers: dict[RequestId, Answer] = {}
        self.on_event: Callable[[WorkerId, WorkerEvent], None] = lambda worker, event: None
        self.sessions: dict[Role, WorkerSession] = {}
        self.addresses: dict[Role, str] = {}

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        for event in events:
            self.on_event(worker_id, event)
            answer = self.answers.get(event.request_id)
            if answer is None:
                continue
            match event:
                case PrefillStarted():
                    answer.kv_transfer_params = event.kv_transfer_params or "-"
                    answer.cached_tokens = event.cached_tokens
                case Adopted():
                    answer.adopted = event
                    if not event.accepted:
                        answer.failure = f"refused: {event.reason}"
                case PathTaken():
                    answer.path, answer.cause = event.path, event.cause
                    answer.num_bytes, answer.num_descriptors = (
                        event.num_bytes,
                        event.num_descriptors,
                    )
                case RequestFailed():
                    answer.failure = f"{event.kind}: {event.message}"
                    answer.param = event.param
                case PromptScores():
                    self._scores(answer, event)
                case TokensOut():
                    self._tokens(answer, event)
            answer.changed.set()

    def _scores(self, answer: Answer, event: PromptScores) -> None:
        for position, entry in enumerate(event.entries, event.position):
            assert answer.scores.setdefault(position, entry) == entry, "a repeated score differs"

    def _tokens(self, answer: Answer, event: TokensOut) -> None:
        if answer.beam and event.finish is None:
            return  # what P tells D by way of the router too
        known = answer.tokens[event.choice]
        for offset, token in enumerate(event.token_ids):
            position = event.position + offset
            if position < len(known):
                assert known[position] == token, "a repeated token differs"
                continue
            assert position == len(known), "a token is missing"
            known.append(token)
            if event.logprobs:
                answer.logprobs[event.choice].append(event.logprobs[offset])
        if event.finish is not None:
            answer.finish[event.choice] = event.finish

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        pass

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        pass

    async def open_sessions(self) -> None:
        addresses = [await self.prefill.start(), await self.decode.start()]
        for address in addresses:
            self.addresses[address.role] = address.address
            self.sessions[address.role] = await WorkerSession.open(
                address,
                router_id="test",
                incarnation=new_incarnation(),
                epoch=1,
                cluster_key=KEY,
                listener=self,
            )

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        split: bool = True,
        timeout_s: float = 120.0,
        salt: str = "",
        output_ids: tuple[tuple[int, ...], ...] = (),
    ) -> Answer:
        """Send one request down the remote (or local) path and wait for its end."""
        request = GenerationRequest(
            new_request_id(), tuple(prompt_ids), params, output_ids, cache_salt=salt
        )
        return await self.send(request, split=split, timeout_s=timeout_s)

    async def send(
        self, request: GenerationRequest, *, split: bool, timeout_s: float = 120.0
    ) -> Answer:
        answer = self.expect(request)
        if split:
            self.sessions[Role.PREFILL].submit(request, handoff=True)
            await self.until(
                answer, lambda: bool(answer.kv_transfer_params) or answer.over, timeout_s
            )
            if not answer.over:
                self.sessions[Role.DECODE].adopt(request, answer.kv_transfer_params)
        else:
            self.sessions[Role.DECODE].submit(request, handoff=False)
        await self.until(answer, lambda: answer.over, timeout_s)
        return answer

    async def redraw(
        self, request: GenerationRequest, *, lease_ms: int = 5000, timeout_s: float = 120.0
    ) -> Answer:
        """The two-step protocol: P computes the prompt and forgets who asked; D does the rest."""
        first = replace(
            request,
            request_id=new_request_id(),
            params=SamplingParams(max_tokens=2, temperature=0.0),
            lease_ms=lease_ms,
        )
        step = self.expect(first)
        self.sessions[Role.PREFILL].submit(first, handoff=True)
        await self.until(step, lambda: bool(step.tokens[0]) or step.over, timeout_s)
        answer = self.expect(request)
        self.sessions[Role.DECODE].adopt(replace(request, redraw=True), step.kv_transfer_params)
        await self.until(answer, lambda: answer.over, timeout_s)
        return answer

    def expect(self, request: GenerationRequest) -> Answer:
        n = request.params.n
        known = request.output_ids or [()] * n
        answer = Answer([list(ids) for ids in known], [[] for _ in range(n)], [None] * n)
        answer.beam = request.params.beam
        self.answers[request.request_id] = answer
        return answer

    async def until(
        self, answer: Answer, condition: Callable[[], bool], timeout_s: float = 120.0
    ) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                answer.changed.clear()
                await answer.changed.wait()

    async def idle(self, timeout_s: float = 10.0) -> None:
        """Wait until nothing is held on either side; the ledgers must then read free + cached."""
        async with asyncio.timeout(timeout_s):
            while True:
                states = [self.prefill.status(), self.decode.status()]
                if all(s["idle"] and s["balanced"] and not s["requests"] for s in states):
                    return
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        for session in self.sessions.values():
            await session.close()
        await self.decode.close()
        await self.prefill.close()


@asynccontextmanager
async def split_cluster(
    model: Path,
    *,
    prefill: dict[str, object] | None = None,
    decode: dict[str, object] | None = None,
) -> AsyncIterator[SplitCluster]:
    """A running pair on `model`, configured alike but for what the arguments override."""
    base = WorkerConfig(
        role=Role.PREFILL,
        worker_id=WorkerId(f"p-{secrets.token_hex(3)}"),
        model_path=str(model),
        cluster_key=KEY,
        kv_memory_bytes=3 << 20,
        num_threads=1,
        max_step_tokens=64,
        check_ledger=True,
    )
    p_config = replace(base, **(prefill or {}))  # type: ignore[arg-type]
    d_config = replace(
        base,
        role=Role.DECODE,
        worker_id=WorkerId(f"d-{secrets.token_hex(3)}"),
        **(decode or {}),  # type: ignore[arg-type]
    )
    cluster = SplitCluster(PrefillWorker(p_config), DecodeWorker(d_config))
    try:
        await cluster.open_sessions()
        yield cluster
    finally:
        await cluster.close()
