"""Workers in this process that compute nothing: their tokens follow a script.

For tests of the router alone. A worker's knobs say when it refuses, fails or stops in the middle;
what the router sent it is written down. The order of events is that of a real worker.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from contracts.errors import Unavailable
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
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.request import GenerationRequest
from contracts.worker import Role, WorkerAddress, WorkerInfo
from router.session import Listener, Session

Script = Callable[[GenerationRequest, int], Sequence[int]]

CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """A small byte-level BPE with ChatML markers; every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the other cat sat"], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def write_model_folder(folder: Path, *, template: str = CHATML) -> Path:
    """A folder as a router wants it: tokenizer, template, configs; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    eos = tokenizer.token_to_id("<|im_end|>")
    other = tokenizer.token_to_id("<|endoftext|>")
    files: dict[str, object] = {
        "tokenizer_config.json": {
            "eos_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": {"eos_token_id": [eos, other]},
        "config.json": {"vocab_size": tokenizer.get_vocab_size(), "model_type": "qwen2"},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@dataclass(eq=False)
class FakeWorker:
    """One worker. Change the knobs at any time; they apply to what comes next."""

    worker_id: WorkerId
    role: Role
    script: Script
    semantic_hash: str = "hash"
    max_model_len: int = 512
    max_prompt_tokens: int = 512
    cached_tokens: int = 0
    tokens_per_frame: int = 1
    incarnation: Incarnation = field(default=Incarnation(1))
    total_blocks: int = 64
    # Knobs
    draining: bool = False  # refuses all that is new, and says so in its load
    down: bool = False  # sessions cannot be opened
    refuse_adopts: bool = False
    fail_kind: str = ""  # RequestFailed at once
    fail_param: str = ""  # ... that names this field
    withhold_scores: bool = False  # prompts' log-probabilities are not sent
    fail_kind_at: int | None = None  # ... or before this position
    pause_at: int | None = None  # stop before this output position until `resume`; -1: in P's queue
    # What happened
    submitted: list[tuple[GenerationRequest, bool]] = field(default_factory=list)
    adopted: list[tuple[GenerationRequest, str]] = field(default_factory=list)
    aborted: list[tuple[RequestId, int]] = field(default_factory=list)
    sessions: list["FakeSession"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._resumed = asyncio.Event()
        self.paused = asyncio.Event()

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.role, f"fake:{self.worker_id}", self.incarnation)

    @property
    def session(self) -> "FakeSession":
        return self.sessions[-1]

    @property
    def running(self) -> int:
        """Requests it is still working on."""
        return sum(len(session.tasks) for session in self.sessions)

    def drain(self) -> None:
        """Begin to drain: what runs goes on."""
        self.draining = True
        self.session.report(WorkerLoad(draining=True))

    def restart(self) -> None:
        """The process ends, with whatever it has; the next one under this name comes up."""
        self.incarnation = Incarnation(self.incarnation + 1)
        self.draining = False
        self.session.lose()

    def resume(self) -> None:
        self.pause_at = None
        self._resumed.set()

    async def pass_position(self, position: int) -> None:
        if self.pause_at is not None and position >= self.pause_at:
            self.paused.set()
            await self._resumed.wait()


def scores_of(prompt_ids: Sequence[int], num_top: int) -> tuple[PromptLogprob, ...]:
    """What fake workers say of prompt tokens 1 and after; the alternatives follow in id."""
    return tuple(
        PromptLogprob(
            -0.5 * position, 1 + position, tuple((token + k, -0.25 - k) for k in range(num_top))
        )
        for position, token in enumerate(prompt_ids[1:], 1)
    )


class FakeSession:
    """The router's session with a FakeWorker."""

    def __init__(self, worker: FakeWorker, listener: Listener) -> None:
        self.worker = worker
        self.lost = False
        self.tasks: dict[tuple[RequestId, int], asyncio.Task[None]] = {}
        self._listener = listener

    @property
    def info(self) -> WorkerInfo:
        w = self.worker
        return WorkerInfo(
            worker_id=w.worker_id,
            role=w.role,
            incarnation=w.incarnation,
            semantic_hash=w.semantic_hash,
            max_model_len=w.max_model_len,
            max_prompt_tokens=w.max_prompt_tokens,
            block_size=16,
            total_blocks=w.total_blocks,
            attention_backend="none",
            device="none",
            version="0",
        )

    def submit(self, request: GenerationRequest, *, handoff: bool) -> None:
        self._check()
        self.worker.submitted.append((request, handoff))
        work = self._prefill(request) if handoff else self._local(request)
        self._start(request, work)

    def adopt(self, request: GenerationRequest, kv_transfer_params: str) -> None:
        self._check()
        self.worker.adopted.append((request, kv_transfer_params))
        self._start(request, self._adopted(request))

    def abort(self, request_id: RequestId, attempt: int) -> None:
        self.worker.aborted.append((request_id, attempt))
        task = self.tasks.pop((request_id, attempt), None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        self.lose("closed")

    def lose(self, reason: str = "lost") -> None:
        """The session breaks: nothing more is sent, and the worker gives its requests up."""
        if self.lost:
            return
        self.lost = True
        for task in self.tasks.values():
            task.cancel()
        self.tasks.clear()
        self._listener.on_lost(self.worker.worker_id, reason)

    def report(self, load: WorkerLoad) -> None:
        self._listener.on_load(self.worker.worker_id, load)

    def send(self, *events: WorkerEvent) -> None:
        if not self.lost:
            self._listener.on_events(self.worker.worker_id, events)

    def _check(self) -> None:
        if self.lost:
            raise Unavailable("lost")

    def _start(self, request: GenerationRequest, work: Coroutine[object, object, None]) -> None:
        key = (request.request_id, request.attempt)
        task = asyncio.create_task(work)
        self.tasks[key] = task
        task.add_done_callback(lambda _: self.tasks.pop(key, None))

    async def _prefill(self, request: GenerationRequest) -> None:
        if self._failed(request):
            return
        await self.worker.pass_position(-1)
        params = json.dumps({"transfer_id": f"{request.request_id}-{request.attempt}"})
        rid, attempt = request.request_id, request.attempt
        self.send(PrefillStarted(rid, attempt, params, self.worker.cached_tokens))
        await asyncio.sleep(0)
        await self.worker.pass_position(0)
        self._send_scores(request)
        if request.params.beam:  # the best candidate; D makes beams of it
            self.send(replace(self._tokens(request, 0, 0, 1), finish=None))
        else:
            self.send(*(self._tokens(request, choice, 0, 1) for choice in range(request.params.n)))

    def _send_scores(self, request: GenerationRequest) -> None:
        """Two pieces, so that one alone is not enough."""
        wanted = request.params.prompt_logprobs
        if wanted is None or self.worker.withhold_scores:
            return
        entries = scores_of(request.prompt_ids, wanted)
        rid, attempt, half = request.request_id, request.attempt, len(entries) // 2
        self.send(PromptScores(rid, attempt, 1, entries[:half]))
        self.send(PromptScores(rid, attempt, 1 + half, entries[half:]))

    async def _adopted(self, request: GenerationRequest) -> None:
        if not self.worker.draining and self._failed(request):
            return
        await asyncio.sleep(0)
        reason = "draining" if self.worker.draining else "full"
        accepted = not (self.worker.refuse_adopts or self.worker.draining)
        self.send(
            Adopted(request.request_id, request.attempt, accepted, "" if accepted else reason)
        )
        self._report_draining()
        if accepted:
            self.send(PathTaken(request.request_id, request.attempt, "remote"))
            await self._decode(request)

    async def _local(self, request: GenerationRequest) -> None:
        await asyncio.sleep(0)
        if self._failed(request):
            return
        cached = self.worker.cached_tokens
        self.send(
            PrefillStarted(request.request_id, request.attempt, "", cached),
            PathTaken(request.request_id, request.attempt, "local"),
        )
        self._send_scores(request)
        await self._decode(request)

    async def _decode(self, request: GenerationRequest) -> None:
        """One step: a token of every choice that is not over. Beams are said at the end."""
        at = {
            choice: len(request.output_ids[choice]) if request.output_ids else 0
            for choice in range(request.params.n)
            if choice not in request.finished
        }
        while at:
            await asyncio.sleep(0)
            await self.worker.pass_position(min(at.values()))
            if (
                self.worker.fail_kind_at is not None
                and min(at.values()) >= self.worker.fail_kind_at
            ):
                self.send(self._failure(request))
                return
            count = self.worker.tokens_per_frame
            events = [self._tokens(request, choice, at[choice], count) for choice in at]
            at = {
                event.choice: event.position + len(event.token_ids)
                for event in events
                if event.finish is None
            }
            if not request.params.beam:
                self.send(*events)
        if request.params.beam:
            limit = request.params.max_tokens
            self.send(*(self._tokens(request, i, 0, limit) for i in range(request.params.n)))

    def _tokens(
        self, request: GenerationRequest, choice: int, position: int, count: int
    ) -> TokensOut:
        script = self.worker.script(request, choice)
        params = request.params
        grammar_ends = () if params.grammar is None else params.grammar.end_token_ids
        ids: list[int] = []
        finish: FinishReason | None = None
        while len(ids) < count and finish is None:
            at = position + len(ids)
            ids.append(script[at % len(script)])
            if params.ends(ids[-1]) or ids[-1] in grammar_ends:
                finish = FinishReason.STOP
            elif at + 1 >= params.max_tokens:
                finish = FinishReason.LENGTH
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            top = range(params.logprobs)
            logprobs = tuple(
                TokenLogprob(-0.5, tuple((token + k, -0.5 - k) for k in top)) for token in ids
            )
        return TokensOut(
            request.request_id, request.attempt, choice, position, tuple(ids), logprobs, finish
        )

    def _report_draining(self) -> None:
        if self.worker.draining and not self.lost:
            self.report(WorkerLoad(draining=True))

    def _failed(self, request: GenerationRequest) -> bool:
        if self.worker.draining:
            rid, attempt = request.request_id, request.attempt
            self.send(RequestFailed(rid, attempt, "Unavailable", "draining"))
            self._report_draining()
            return True
        if self.worker.fail_kind:
            self.send(self._failure(request))
        return bool(self.worker.fail_kind)

    def _failure(self, request: GenerationRequest) -> RequestFailed:
        kind = self.worker.fail_kind or "EngineFailure"
        return RequestFailed(
            request.request_id, request.attempt, kind, "as scripted", self.worker.fail_param
        )


class FakeCluster:
    """Opens sessions to its workers, and is their directory."""

    def __init__(self, *workers: FakeWorker) -> None:
        self.workers = {worker.worker_id: worker for worker in workers}
        self.epochs: list[int] = []
        self._changed = asyncio.Event()
        self._listed = tuple(worker.address for worker in workers)

    async def open_session(
        self,
        address: WorkerAddress,
        *,
        router_id: str,
        incarnation: int,
        epoch: int,
        cluster_key: str,
        listener: Listener,
    ) -> Session:
        await asyncio.sleep(0)
        worker = self.workers[address.worker_id]
        if worker.down:
            raise Unavailable("down")
        self.epochs.append(epoch)
        session = FakeSession(worker, listener)
        worker.sessions.append(session)
        return session

    def list(self, *addresses: WorkerAddress) -> None:
        """Change what the directory says."""
        self._listed = addresses
        self._changed.set()

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        while True:
            self._changed.clear()
            yield self._listed
            await self._changed.wait()


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it never did.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions are of any kind
            await asyncio.sleep(0.001)
