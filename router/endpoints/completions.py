"""POST /v1/completions: plain texts and token ids in, their continuations out."""

import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from contracts.errors import InvalidRequest
from contracts.ids import new_request_id
from contracts.sampling import Grammar
from router.answer_plan import bound, output_rules
from router.chat import ChatService
from router.constraints import constraint
from router.endpoints.calls import Body
from router.endpoints.completions_answer import CompletionAnswer, CompletionChunks, CompletionHead
from router.endpoints.completions_schema import CompletionRequest, Prompt, parse_completion_request
from router.endpoints.group import GenerationGroup
from router.endpoints.render import sampling_json
from router.endpoints.tokenize import decode
from router.job import Job
from router.logprobs import LIGHT_ENTRIES, PromptEntry
from router.offload import apart, is_heavy
from router.outbox import Outbox
from router.request import Generation
from router.sampling import resolve
from router.sse import EventEncoder, PieceSource
from router.two_step import settle


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A checked request: one job a prompt."""

    service: ChatService
    jobs: tuple[Job, ...]
    head: CompletionHead
    stream: bool
    include_usage: bool
    continuous_usage: bool

    def start(self) -> GenerationGroup:
        """Begin; the caller closes it."""
        limit = self.service.config.write_buffer_bytes if self.stream else None
        group = GenerationGroup(self._part, [job.params.n for job in self.jobs], Outbox(limit))
        group.start()
        return group

    def _part(self, index: int, outbox: Outbox) -> Generation:
        service = self.service
        return Generation(
            self.jobs[index],
            pool=service.pool,
            vocabulary=service.prompts.vocabulary,
            outbox=outbox,
            config=service.config,
            metrics=service.metrics,
        )

    async def encoder(self, source: PieceSource) -> EventEncoder:
        """How the stream is written."""
        assert isinstance(source, GenerationGroup)
        return CompletionChunks(
            self.head,
            lambda index: _entries(source.parts[index]),
            include_usage=self.include_usage,
            continuous_usage=self.continuous_usage,
        )

    async def full(self, source: PieceSource) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ServingError: there will be none.
        """
        assert isinstance(source, GenerationGroup)
        answer = CompletionAnswer(self.head)
        while pieces := await source.outbox.take():
            for piece in pieces:
                answer.add(piece)

        def body() -> dict[str, Any]:
            scores = [_entries(part) for part in source.parts]
            return answer.body(
                source.usage, source.semantic_hash, scores, source.parts[0].kv_transfer_params
            )

        return await apart(answer.num_entries + self.num_scored > LIGHT_ENTRIES, body)

    @property
    def num_scored(self) -> int:
        """How many prompt tokens come with log-probabilities, those of all choices together."""
        jobs = (job for job in self.jobs if job.params.prompt_logprobs is not None)
        return sum(job.params.n * len(job.prompt_ids) for job in jobs)


def _entries(part: Generation) -> list[PromptEntry] | None:
    entries = part.prompt_entries()
    if entries is None or not part.job.rules.tokens_as_ids:
        return entries
    return [
        replace(
            entry,
            token=f"token_id:{entry.token_id}",
            top=tuple((i, f"token_id:{i}", value) for i, _, value in entry.top),
        )
        for entry in entries
    ]


async def check_completion(
    service: ChatService, body: Body, header_id: str | None
) -> CompletionCall:
    """Resolve a request completely; nothing is checked again after this.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """

    def read() -> tuple[CompletionRequest, Grammar | None]:
        request = parse_completion_request(body, service.config.max_batch)
        service.check_fields(request)
        grammar = constraint(request)
        return request, None if grammar is None else bound(grammar, service.model)

    heavy = is_heavy(body)
    request, grammar = await apart(heavy, read)
    max_model_len = await service.max_model_len()
    jobs: list[Job] = []
    for prompt in request.prompt:
        ids = await service.prompts.encode_text(
            prompt,
            add_special_tokens=request.add_special_tokens is not False,
            truncate=request.truncate_prompt_tokens,
            max_model_len=max_model_len,
        )
        make = partial(_job, service, request, grammar, ids, max_model_len)
        jobs.append(await apart(heavy, make))
    options = request.stream_options
    echoes: list[str] = []
    if request.echo:
        whole = request.truncate_prompt_tokens is None
        pairs = zip(request.prompt, jobs, strict=True)
        echoes = [await _echo(service, prompt, job, whole=whole) for prompt, job in pairs]
    base = header_id or request.request_id or secrets.token_hex(16)
    return CompletionCall(
        service=service,
        jobs=tuple(jobs),
        head=CompletionHead(
            response_id=f"cmpl-{base}",
            created=int(time.time()),
            model=service.config.served_model_name,
            prompts=tuple(job.prompt_ids for job in jobs),
            n=jobs[0].params.n,
            echoes=tuple(echoes),
            want_token_ids=bool(request.return_token_ids),
            want_logprobs=request.logprobs is not None,
            want_prompt_logprobs=not request.stream and request.wanted_prompt_logprobs is not None,
            scores_only=request.scores_only,
        ),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _job(
    service: ChatService,
    request: CompletionRequest,
    grammar: Grammar | None,
    prompt_ids: tuple[int, ...],
    max_model_len: int,
) -> Job:
    params = resolve(
        request,
        service.model,
        num_prompt_tokens=len(prompt_ids),
        max_model_len=max_model_len,
        grammar=grammar,
    )
    if request.echo and request.stream:  # the echoed prompt carries its log-probabilities
        params = replace(params, prompt_logprobs=params.logprobs)
    transfer, params = settle(service.transfer(request), params)
    if transfer is not None and len(request.prompt) > 1:
        raise InvalidRequest("kv_transfer_params belong to one prompt", "kv_transfer_params")
    return Job(
        request_id=new_request_id(),
        prompt_ids=prompt_ids,
        params=params,
        rules=output_rules(request, service.config, service.prompts.primary_eos),
        cache_salt=request.cache_salt or "",
        priority=request.priority or 0,
        transfer=transfer,
    )


async def _echo(service: ChatService, prompt: Prompt, job: Job, *, whole: bool) -> str:
    """The prompt as it is shown in front of its continuation; what was cut off is not."""
    if whole and isinstance(prompt, str):
        return prompt
    return await decode(service, job.prompt_ids, param="prompt")


async def render_completion(service: ChatService, body: Body) -> dict[str, Any]:
    """What the engine would get.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """
    call = await check_completion(service, body, None)
    return {
        "model": call.head.model,
        "prompts": [
            {
                "prompt_token_ids": list(job.prompt_ids),
                "sampling_params": sampling_json(job.params),
            }
            for job in call.jobs
        ],
    }
