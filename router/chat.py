"""POST /v1/chat/completions without HTTP: from a JSON object to a running generation."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from contracts.errors import InvalidRequest, NotFound, Overloaded, ServingError, Unavailable
from contracts.ids import new_request_id
from router.choice import EndRules
from router.config import RouterConfig
from router.job import Job
from router.metrics import RouterMetrics
from router.model_files import ModelDefaults
from router.outbox import Outbox
from router.prompt import ChatPrompts
from router.request import Generation
from router.responses import AnswerHead
from router.sampling import check_ranges, resolve
from router.schema import ChatRequest, parse_chat_request
from router.workers import WorkerPool

_MODEL_CHARS = 80


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked request and how its answer is to look."""

    job: Job
    head: AnswerHead
    stream: bool
    include_usage: bool
    continuous_usage: bool


class ChatService:
    """Checks requests and starts their generations; counts those in flight."""

    def __init__(
        self, config: RouterConfig, prompts: ChatPrompts, pool: WorkerPool, metrics: RouterMetrics
    ) -> None:
        self.config = config
        self.pool = pool
        self.metrics = metrics
        self._prompts = prompts
        self._defaults = prompts.defaults if config.use_generation_config else ModelDefaults()
        self._in_flight = 0

    # Admission

    def enter(self) -> None:
        """Take one of the places for requests; `leave` gives it back.

        Raises:
            Overloaded: all are taken.
        """
        if self._in_flight >= self.config.max_inflight:
            raise Overloaded(f"the server is handling {self._in_flight} requests already")
        self._in_flight += 1
        self.metrics.running.inc()

    def leave(self) -> None:
        """Give the place back."""
        self._in_flight -= 1
        self.metrics.running.dec()

    # Checking

    async def check(self, body: Mapping[str, object], header_id: str | None) -> ChatCall:
        """Resolve a request completely; nothing is checked again after this.

        Raises:
            ServingError: what is wrong with it, naming the field.
        """
        request = parse_chat_request(body)
        self.check_model(request.model)
        check_ranges(request, self.config, self._prompts.vocab_size)
        if not request.messages:
            raise InvalidRequest("messages must not be empty", "messages")
        max_model_len = await self._max_model_len()
        prompt_ids = await self._prompts.encode(request.messages, max_model_len=max_model_len)
        primary = self._prompts.primary_eos
        eos_ids = (() if primary is None else (primary,)) + self._prompts.secondary_eos
        params = resolve(
            request,
            self._defaults,
            num_prompt_tokens=len(prompt_ids),
            max_model_len=max_model_len,
            eos_ids=eos_ids,
        )
        options = request.stream_options
        return ChatCall(
            job=Job(
                request_id=new_request_id(),
                prompt_ids=prompt_ids,
                params=params,
                rules=EndRules(tuple(request.stop or ()), primary),
            ),
            head=self._head(request, header_id, prompt_ids),
            stream=bool(request.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )

    def _head(
        self, request: ChatRequest, header_id: str | None, prompt_ids: tuple[int, ...]
    ) -> AnswerHead:
        base = header_id or request.request_id or secrets.token_hex(16)
        return AnswerHead(
            response_id=f"chatcmpl-{base}",
            created=int(time.time()),
            model=self.config.served_model_name,
            prompt_ids=prompt_ids,
            want_token_ids=bool(request.return_token_ids),
            want_logprobs=bool(request.logprobs),
        )

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here.

        Raises:
            NotFound: an unknown name. None or empty is the served model.
        """
        if name and name not in self.config.names:
            shown = name if len(name) <= _MODEL_CHARS else name[:_MODEL_CHARS] + "…"
            raise NotFound(f"the model {shown!r} does not exist", "model")

    def known_max_model_len(self) -> int | None:
        """Context length in tokens; None while neither configured nor reported."""
        limits = [self.config.max_model_len, self.pool.max_model_len]
        return min((limit for limit in limits if limit is not None), default=None)

    async def _max_model_len(self) -> int:
        wait_until = self.pool.clock() + self.config.worker_wait_s
        while (limit := self.known_max_model_len()) is None:
            left_s = wait_until - self.pool.clock()
            if left_s <= 0:
                raise Unavailable("no worker is connected")
            await self.pool.changed(left_s)
        return limit

    # Running

    def start(self, call: ChatCall) -> Generation:
        """Start the generation; the caller closes it."""
        limit = self.config.write_buffer_bytes if call.stream else None
        generation = Generation(
            call.job,
            pool=self.pool,
            vocabulary=self._prompts.vocabulary,
            outbox=Outbox(limit),
            config=self.config,
            metrics=self.metrics,
        )
        generation.start()
        return generation

    def refused(self, error: ServingError) -> None:
        """Count a request that did not get as far as a generation."""
        self.metrics.failed(type(error).__name__)
