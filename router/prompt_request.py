"""What a prompt is built from, and what it becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """The fields of section 2.5 of the API that shape a chat's prompt; None: not given.

    `chat_template` is only set if the operator trusts requests' templates.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    truncate_prompt_tokens: int | None = None  # -1: as many as leave room for one output token


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """Token ids, and what the answer needs to know of the conversation.

    `role` is the answer's: `assistant`, or the last message's without a generation prompt.
    `last_text` is the last message's text if its role is the answer's, else empty (for `echo`).
    `tail` is the end of the rendered text, some hundred characters: parsers look for open thoughts.
    """

    ids: tuple[int, ...]
    role: str = "assistant"
    last_text: str = ""
    tail: str = ""
