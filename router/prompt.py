"""Messages to token ids: once per request, on the router; workers never see text."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from contracts.errors import ConfigurationError, InvalidRequest, Overloaded
from router.detokenizer import Vocabulary
from router.model_files import ModelDefaults, read_model_files
from router.offload import weight
from router.prompt_request import BuiltPrompt, PromptRequest
from router.template import ChatTemplate, ContentFormat, Rendered
from router.template_files import DEFAULT, TOOL_USE, operator_template
from router.template_sandbox import TemplateSandbox
from router.tokenizing import TextEncoder, fit

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TAIL_CHARS = 512  # of the rendered text, for parsers
_MAX_DECODED = 1 << 20  # ids in one call of `decode`
_NO_TEMPLATE = (
    "the model has no chat template: the operator can give one (--chat-template), or put a "
    "chat_template.jinja next to tokenizer.json"
)


class ChatPrompts:
    """A model's tokenizer and chat templates.

    `primary_eos` is the tokenizer's end token (None if there is none), `secondary_eos` the
    model's further ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, ChatTemplate],
        *,
        primary_eos: int | None,
        secondary_eos: tuple[int, ...] = (),
        special_tokens: Mapping[str, str] | None = None,
        defaults: ModelDefaults | None = None,
        config_vocab_size: int = 0,
        inline_chars: int = 2048,
        timeout_s: float = 30.0,
        sandbox: TemplateSandbox | None = None,
    ) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.vocab_size = max(config_vocab_size, self.vocabulary.size)
        self.primary_eos = primary_eos
        self.secondary_eos = secondary_eos
        self.defaults = defaults or ModelDefaults()
        self._encoder = TextEncoder(tokenizer, config_vocab_size or self.vocabulary.size)
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._inline_chars = inline_chars
        self._timeout_s = timeout_s
        self._sandbox = sandbox or TemplateSandbox()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prompt")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        chat_template: str | None = None,
        content_format: ContentFormat = "auto",
        inline_chars: int = 2048,
        timeout_s: float = 30.0,
        sandbox: TemplateSandbox | None = None,
    ) -> "ChatPrompts":
        """Read a model folder.

        `chat_template` (a file or Jinja text) takes the place of all the model's own. Without
        any template the model still serves plain prompts; chats are refused.

        Raises:
            ConfigurationError: no tokenizer.json, or a template that cannot be read.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigurationError(
                "the model folder has no tokenizer.json: save it with a fast tokenizer "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigurationError(f"tokenizer.json cannot be read: {error}") from None
        files = read_model_files(folder)
        sources = files.chat_templates
        if chat_template is not None:
            sources = {DEFAULT: operator_template(chat_template)}
        if not sources:
            logger.warning(_NO_TEMPLATE)
        primary = tokenizer.token_to_id(files.eos_token) if files.eos_token else None
        if primary is None and files.eos_ids:
            primary = files.eos_ids[0]
        return cls(
            tokenizer,
            {
                name: ChatTemplate(
                    sources[name], files.special_tokens, content_format=content_format
                )
                for name in (DEFAULT, TOOL_USE)
                if name in sources
            },
            primary_eos=primary,
            secondary_eos=tuple(i for i in files.eos_ids if i != primary),
            special_tokens=files.special_tokens,
            defaults=files.defaults,
            config_vocab_size=files.config_vocab_size,
            inline_chars=inline_chars,
            timeout_s=timeout_s,
            sandbox=sandbox,
        )

    @property
    def template_sources(self) -> tuple[str, ...]:
        """Texts of the templates in use: parsers for calls and thoughts are found by them."""
        return tuple(template.source for template in self._templates.values())

    # Chats

    async def encode(self, request: PromptRequest, *, max_model_len: int | None) -> BuiltPrompt:
        """The prompt of a conversation; long ones are made in a thread.

        Without `max_model_len` the prompt need not fit (to count its tokens).

        Raises:
            InvalidRequest: bad messages or template, or no room for a single output token.
            Overloaded: a long one's turn did not come in time.
        """
        if request.chat_template is not None:
            rendered = await self._sandbox.render(
                request, self._special_tokens, max_chars=self._encoder.max_chars(max_model_len)
            )
            short = len(rendered.text) < self._inline_chars
            return await self._do(
                short, lambda: self._build(request, rendered, max_model_len=max_model_len)
            )
        template = self._choose(request)

        def build() -> BuiltPrompt:
            rendered = template.render(
                request,
                timeout_s=self._timeout_s,
                max_chars=self._encoder.max_chars(max_model_len),
            )
            return self._build(request, rendered, max_model_len=max_model_len)

        values = (request.messages, request.tools, request.documents, request.template_kwargs)
        return await self._do(weight(values, self._inline_chars) < self._inline_chars, build)

    def _choose(self, request: PromptRequest) -> ChatTemplate:
        template = self._templates.get(TOOL_USE) if request.tools else None
        template = template or self._templates.get(DEFAULT)
        if template is None:
            raise InvalidRequest(_NO_TEMPLATE)
        return template

    def _build(
        self, request: PromptRequest, rendered: Rendered, *, max_model_len: int | None
    ) -> BuiltPrompt:
        ids = self._encoder.ids(
            rendered.text,
            add_special_tokens=request.add_special_tokens,
            max_model_len=max_model_len,
            param="messages",
        )
        ids = fit(
            ids,
            truncate=request.truncate_prompt_tokens,
            max_model_len=max_model_len,
            param="messages",
        )
        role = "assistant" if request.add_generation_prompt else rendered.last_role
        last_text = rendered.last_text if rendered.last_role == role else ""
        # A continued message may have opened its thoughts far back.
        tail = _TAIL_CHARS + (len(rendered.last_text) if request.continue_final_message else 0)
        return BuiltPrompt(ids, role=role, last_text=last_text, tail=rendered.text[-tail:])

    # Plain texts and ids

    async def encode_text(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        truncate: int | None = None,
        max_model_len: int | None,
        param: str = "prompt",
    ) -> tuple[int, ...]:
        """The prompt of a plain text, or of ids (checked; nothing is added); long ones in a thread.

        Without `max_model_len` the prompt need not fit and may be empty (to count its tokens).

        Raises:
            InvalidRequest: as `encode`; ids that the model does not have; nothing in it.
        """

        def build() -> tuple[int, ...]:
            if isinstance(prompt, str):
                ids = self._encoder.ids(
                    prompt,
                    add_special_tokens=add_special_tokens,
                    max_model_len=max_model_len,
                    param=param,
                )
            else:
                ids = self._encoder.checked(prompt, param)
            return fit(ids, truncate=truncate, max_model_len=max_model_len, param=param)

        return await self._do(len(prompt) < self._inline_chars, build)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a short text, with nothing added.

        Raises:
            InvalidRequest: hopelessly long, or not valid Unicode.
        """
        return self._encoder.ids(text)

    def decode(self, ids: Sequence[int], *, param: str = "tokens") -> str:
        """Text of ids, special tokens by name. For many, call it in a thread.

        Raises:
            InvalidRequest: ids that the model does not have, or more than a million of them.
        """
        if len(ids) > _MAX_DECODED:
            raise InvalidRequest(f"{param} has more than {_MAX_DECODED} token ids", param)
        return self.vocabulary.decode(self._encoder.checked(ids, param))

    def token_strs(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it; empty for an unknown id."""
        return [self.vocabulary.name(token_id) for token_id in ids]

    async def _do(self, short: bool, work: Callable[[], T]) -> T:
        """Short work at once, other work in a thread and within the time limit."""
        if short:
            return work()
        job = self._threads.submit(work)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), self._timeout_s)
        except TimeoutError:
            if job.cancel():  # it never began
                raise Overloaded("too many long prompts are waiting to be tokenised") from None
            raise InvalidRequest(
                f"building the prompt took longer than {self._timeout_s:g} s", "messages"
            ) from None

    def close(self) -> None:
        """Stop the threads and the children."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()
