"""POST /v1/chat/completions and what the engine would get for it."""

from dataclasses import dataclass
from typing import Any

from router.chat import ChatCall, ChatService
from router.endpoints.calls import Body
from router.endpoints.render import sampling_json
from router.logprobs import LIGHT_ENTRIES
from router.offload import apart
from router.request import Generation
from router.responses import Answer
from router.sse import ChunkEncoder, EventEncoder, PieceSource


@dataclass(frozen=True, slots=True)
class RunnableChat:
    """A checked chat."""

    service: ChatService
    call: ChatCall

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.call.stream

    def start(self) -> Generation:
        """Begin; the caller closes it."""
        return self.service.start(self.call)

    async def encoder(self, source: PieceSource) -> EventEncoder:
        """How the stream is written."""
        return ChunkEncoder(
            self.call.head,
            include_usage=self.call.include_usage,
            continuous_usage=self.call.continuous_usage,
        )

    async def full(self, source: PieceSource) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ServingError: there will be none.
        """
        assert isinstance(source, Generation)
        answer = Answer(self.call.head, self.call.job.params.n)
        while pieces := await source.outbox.take():
            for piece in pieces:
                answer.add(piece)

        def body() -> dict[str, Any]:
            return answer.body(
                source.usage,
                source.semantic_hash,
                prompt=source.prompt_entries(),
                kv_transfer_params=source.kv_transfer_params,
            )

        scored = len(source.job.prompt_ids) if self.call.head.want_prompt_logprobs else 0
        return await apart(scored + answer.num_entries > LIGHT_ENTRIES, body)


async def check_chat(service: ChatService, body: Body, header_id: str | None) -> RunnableChat:
    """Resolve a request completely.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """
    return RunnableChat(service, await service.check(body, header_id))


async def render_chat(service: ChatService, body: Body) -> dict[str, Any]:
    """What the engine would get.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """
    job = (await service.check(body, None)).job
    return {
        "model": service.config.served_model_name,
        "prompt_token_ids": list(job.prompt_ids),
        "sampling_params": sampling_json(job.params),
    }
