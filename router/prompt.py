"""Messages to token ids: once per request, on the router; workers never see text."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from contracts.errors import ConfigurationError, InvalidRequest
from router.detokenizer import Vocabulary
from router.messages import template_messages
from router.model_files import ModelDefaults, read_model_files
from router.template import ChatTemplate

_HUGE_CHARS = 1 << 20  # shorter texts are always tokenised, so that their length can be told
_NORMALIZER_SHRINK = 4  # Unicode composition makes at most this many characters one


class ChatPrompts:
    """A model's tokenizer and chat template.

    `primary_eos` is the tokenizer's end token (None if there is none), `secondary_eos` the
    model's further ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        primary_eos: int | None,
        secondary_eos: tuple[int, ...] = (),
        defaults: ModelDefaults | None = None,
        config_vocab_size: int = 0,
        inline_chars: int = 2048,
        timeout_s: float = 30.0,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = Vocabulary(tokenizer)
        self.vocab_size = max(config_vocab_size, self.vocabulary.size)
        self.primary_eos = primary_eos
        self.secondary_eos = secondary_eos
        self.defaults = defaults or ModelDefaults()
        self._tokenizer = tokenizer
        self._template = template
        self._inline_chars = inline_chars
        self._timeout_s = timeout_s
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._chars_per_token = longest * (_NORMALIZER_SHRINK if tokenizer.normalizer else 1)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prompt")

    @classmethod
    def load(
        cls, folder: str | Path, *, inline_chars: int = 2048, timeout_s: float = 30.0
    ) -> "ChatPrompts":
        """Read a model folder.

        Raises:
            ConfigurationError: no tokenizer.json or no chat template; says what to do.
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
        primary = tokenizer.token_to_id(files.eos_token) if files.eos_token else None
        if primary is None and files.eos_ids:
            primary = files.eos_ids[0]
        return cls(
            tokenizer,
            ChatTemplate(files.chat_template, files.special_tokens),
            primary_eos=primary,
            secondary_eos=tuple(i for i in files.eos_ids if i != primary),
            defaults=files.defaults,
            config_vocab_size=files.config_vocab_size,
            inline_chars=inline_chars,
            timeout_s=timeout_s,
        )

    async def encode(
        self, messages: Sequence[Mapping[str, Any]], *, max_model_len: int
    ) -> tuple[int, ...]:
        """Token ids of a conversation; long ones are done in a thread.

        Raises:
            InvalidRequest: bad messages, or no room for a single output token.
        """
        shaped = template_messages(
            messages,
            as_parts=self._template.wants_parts,
            knows_developer=self._template.knows_developer,
        )
        if _num_chars(messages, self._inline_chars) < self._inline_chars:
            return self._encode(shaped, max_model_len)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._encode, shaped, max_model_len)
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except TimeoutError:
            raise InvalidRequest(
                f"building the prompt took longer than {self._timeout_s:g} s", "messages"
            ) from None

    def _encode(self, messages: list[dict[str, Any]], max_model_len: int) -> tuple[int, ...]:
        text = self._template.render(messages, timeout_s=self._timeout_s)
        if len(text) > max(_HUGE_CHARS, max_model_len * self._chars_per_token):
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, more than a context of "
                f"{max_model_len} tokens can hold",
                "input_text",
            )
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if not ids:
            raise InvalidRequest("the prompt is empty", "messages")
        if len(ids) >= max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; with at least one output token that is more "
                f"than the model's context of {max_model_len} tokens",
                "input_tokens",
            )
        return ids

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _num_chars(value: Any, limit: int) -> int:
    """Characters of all texts inside a JSON value; stops counting at `limit`."""
    total = 0
    stack = [value]
    while stack and total < limit:
        item = stack.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, Sequence):
            stack.extend(item)
    return total
