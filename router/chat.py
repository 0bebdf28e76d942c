"""POST /v1/chat/completions without HTTP: from a JSON object to a running generation."""

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import (
    ConfigurationError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from contracts.ids import new_request_id
from contracts.sampling import Grammar, SamplingParams
from router.answer_plan import AnswerPlan, chosen_grammar, output_rules, plan_answer
from router.config import RouterConfig
from router.job import Job
from router.metrics import RouterMetrics
from router.model_files import read_model_type, serving_defaults
from router.offload import apart, is_heavy
from router.outbox import Outbox
from router.parsers.detect import detect_reasoning_parser, detect_tool_parser
from router.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from router.prompt import ChatPrompts
from router.prompt_fields import prompt_request
from router.prompt_request import BuiltPrompt, PromptRequest
from router.ranges import check_ranges
from router.request import Generation
from router.responses import AnswerHead
from router.sampling import ServedModel, resolve
from router.schema import ChatRequest, SharedFields, parse_chat_request
from router.tool_choice import ToolPlan, plan_tools
from router.two_step import Transfer, read_transfer, settle
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
    """Checks requests and starts their generations; counts those in flight.

    `tool_call_parser` and `reasoning_parser` are the names in use; None: there is none.

    Raises:
        ConfigurationError: an unknown parser, or an override that cannot be honoured.
    """

    def __init__(
        self, config: RouterConfig, prompts: ChatPrompts, pool: WorkerPool, metrics: RouterMetrics
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.pool = pool
        self.metrics = metrics
        defaults = serving_defaults(
            prompts.defaults, config.generation_config, config.override_generation_config
        )
        primary = () if prompts.primary_eos is None else (prompts.primary_eos,)
        eos_ids = (*primary, *prompts.secondary_eos, *defaults.eos_ids)
        self.model = ServedModel(
            vocab_size=prompts.vocab_size,
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            tokenize=prompts.token_ids,
            defaults=defaults,
            special_ids=prompts.vocabulary.special_ids,
        )
        templates = "\n".join(prompts.template_sources)
        model_type = read_model_type(Path(config.model_path))
        self.tool_call_parser = _parser(
            "tool_call_parser",
            config.tool_call_parser,
            TOOL_PARSERS,
            detect_tool_parser(templates, model_type),
        )
        self.reasoning_parser = _parser(
            "reasoning_parser",
            config.reasoning_parser,
            REASONING_PARSERS,
            detect_reasoning_parser(templates, model_type),
        )
        self.closing = False  # no request is admitted any more
        self._in_flight = 0

    # Admission

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._in_flight

    def enter(self) -> None:
        """Take one of the places for requests; `leave` gives it back.

        Raises:
            Overloaded: all are taken.
            Unavailable: this router is leaving.
        """
        if self.closing:
            raise Unavailable("the server is shutting down")
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
        heavy = is_heavy(body)
        request, tools, grammar, wanted = await apart(heavy, lambda: self._read(body))
        max_model_len = await self.max_model_len()
        prompt = await self.prompts.encode(wanted, max_model_len=max_model_len)

        def resolved() -> ChatCall:
            plan = plan_answer(
                request,
                grammar,
                tools,
                prompt,
                self.model,
                reasoning=self.reasoning_parser,
                template_kwargs=wanted.template_kwargs,
            )
            params = resolve(
                request,
                self.model,
                num_prompt_tokens=len(prompt.ids),
                max_model_len=max_model_len,
                grammar=plan.grammar,
            )
            return self._call(request, header_id, prompt, params, plan, tools)

        return await apart(heavy, resolved)

    def _read(
        self, body: Mapping[str, object]
    ) -> tuple[ChatRequest, ToolPlan, Grammar | None, PromptRequest]:
        """All that can be checked without the prompt."""
        request = parse_chat_request(body)
        self.check_fields(request)
        if request.mm_processor_kwargs:
            raise InvalidRequest(
                "mm_processor_kwargs are for media, and this model takes text only",
                "mm_processor_kwargs",
            )
        tools = plan_tools(
            request,
            parser=self.tool_call_parser,
            exclude_when_none=self.config.exclude_tools_when_tool_choice_none,
        )
        grammar = chosen_grammar(request, tools)
        wanted = prompt_request(
            request,
            request.messages,
            self.config,
            tools=tools.for_template,
            truncate=request.truncate_prompt_tokens,
        )
        return request, tools, grammar, wanted

    def _call(
        self,
        request: ChatRequest,
        header_id: str | None,
        prompt: BuiltPrompt,
        params: SamplingParams,
        plan: AnswerPlan,
        tools: ToolPlan,
    ) -> ChatCall:
        options = request.stream_options
        transfer, params = settle(self.transfer(request), params)
        return ChatCall(
            job=Job(
                request_id=new_request_id(),
                prompt_ids=prompt.ids,
                params=params,
                rules=output_rules(
                    request,
                    self.config,
                    self.prompts.primary_eos,
                    plan=plan,
                    include_reasoning=request.include_reasoning is not False,
                    calls_finish=tools.calls_finish,
                ),
                cache_salt=request.cache_salt or "",
                priority=request.priority or 0,
                transfer=transfer,
            ),
            head=self._head(
                request, header_id, prompt, want_prompt=params.prompt_logprobs is not None
            ),
            stream=bool(request.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )

    def _head(
        self, request: ChatRequest, header_id: str | None, prompt: BuiltPrompt, *, want_prompt: bool
    ) -> AnswerHead:
        base = header_id or request.request_id or secrets.token_hex(16)
        return AnswerHead(
            response_id=f"chatcmpl-{base}",
            created=int(time.time()),
            model=self.config.served_model_name,
            prompt_ids=prompt.ids,
            want_token_ids=bool(request.return_token_ids),
            want_logprobs=bool(request.logprobs),
            want_prompt_logprobs=want_prompt,
            role=prompt.role,
            echo=prompt.last_text if request.echo else "",
        )

    def check_fields(self, request: SharedFields) -> None:
        """Check what chats and text completions share: the model's name, and all ranges.

        Raises:
            NotFound: another model.
            InvalidRequest: names the field and its limit.
        """
        self.check_model(request.model)
        check_ranges(request, self.config, self.model.vocab_size)

    def transfer(self, request: SharedFields) -> Transfer | None:
        """Which step of the two-step form the request is; None unless the operator allows that.

        Raises:
            InvalidRequest: a step that cannot be taken that way.
        """
        if not self.config.allow_kv_transfer_params:
            return None
        return read_transfer(
            request.kv_transfer_params,
            stream=bool(request.stream),
            beam=bool(request.use_beam_search),
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

    async def max_model_len(self) -> int:
        """Context length in tokens.

        Raises:
            Unavailable: not configured, and no worker has come to tell it.
        """
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
            vocabulary=self.prompts.vocabulary,
            outbox=Outbox(limit),
            config=self.config,
            metrics=self.metrics,
        )
        generation.start()
        return generation

    def refused(self, error: ServingError) -> None:
        """Count a request that did not get as far as a generation."""
        self.metrics.failed(type(error).__name__)


def _parser(
    name: str, setting: str | None, known: Collection[str], detected: str | None
) -> str | None:
    """The parser as set, else the one the model seems to want; None: there is none."""
    if setting is None:
        return detected
    if setting == "none":
        return None
    if setting not in known:
        raise ConfigurationError(f"{name} {setting!r} is unknown: {', '.join(sorted(known))}")
    return setting
