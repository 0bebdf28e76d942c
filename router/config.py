"""What a router replica needs to know, checked whole at start."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contracts.errors import ConfigurationError


@dataclass(frozen=True)
class RouterConfig:
    """Every default resolved by `cluster`; frozen.

    Raises:
        ConfigurationError: a value makes no sense; the message names it.
    """

    model_path: str
    served_model_name: str
    cluster_key: str = field(repr=False)
    model_aliases: tuple[str, ...] = ()  # further accepted names
    max_model_len: int | None = None  # tokens; None: the least of the workers'
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # empty: no key needed
    allowed_origins: tuple[str, ...] = ("*",)  # CORS, as the next three
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    enable_openapi: bool = True  # GET /openapi.json
    aggregated: bool = False  # decode workers alone, every path local
    generation_config: str = "auto"  # sampling defaults: the model's, "vllm" (none), or a folder
    override_generation_config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    chat_template: str | None = None  # the operator's, as text; None: the model's
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None  # None: by the chat template; "none": off
    reasoning_parser: str | None = None  # likewise
    exclude_tools_when_tool_choice_none: bool = False  # from the prompt
    logits_processor_pattern: str = ""  # allowed names, matched whole; empty: none
    return_tokens_as_token_ids: bool = False  # unless a request says
    allow_kv_transfer_params: bool = False  # from clients: the two-step protocol
    two_step_lease_ms: int = 30_000  # how long a P keeps what nobody has come for
    enable_render: bool = True
    max_body_bytes: int = 32 << 20
    max_n: int = 64
    max_logprobs: int = 20  # alternatives for each token; -1: no cap
    max_batch: int = 64  # prompts of one completion request
    max_stop: int = 4
    write_buffer_bytes: int = 1 << 20  # unread output of one stream; beyond: that one is aborted
    max_inflight: int = 4096  # requests; beyond: 429
    max_retries: int = 2  # after failures before the first token
    max_replays: int = 3  # after failures later on
    max_lost_workers: int = 8  # sessions that may break under one request; see router.retries
    worker_wait_s: float = 5.0  # how long a request waits for a worker that can take it
    replay_wait_s: float = 60.0  # the same once tokens went out: waiting beats failing
    queue_wait_s: float = 60.0  # how long it waits for room on a D; then 429
    request_timeout_s: float | None = 3600.0  # the whole request; workers hear of it
    body_timeout_s: float = 60.0  # a body's silence; see router.body
    write_timeout_s: float = 60.0  # an answer of which nothing more is taken
    template_timeout_s: float = 30.0
    inline_prompt_chars: int = 2048  # longer prompts are rendered and tokenised in a thread
    router_id: str = "router"

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ConfigurationError("served_model_name is empty")
        if not Path(self.model_path).is_dir():
            raise ConfigurationError(f"model_path {self.model_path!r} is not a folder")
        least = {
            "max_body_bytes": 1,
            "max_n": 1,
            "max_logprobs": -1,
            "max_batch": 1,
            "max_stop": 0,
            "write_buffer_bytes": 1024,
            "max_inflight": 1,
            "max_retries": 0,
            "max_replays": 0,
            "max_lost_workers": 0,
            "worker_wait_s": 0,
            "replay_wait_s": 0,
            "queue_wait_s": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigurationError(f"{name} must be at least {value}")
        for name in ("request_timeout_s", "body_timeout_s", "write_timeout_s"):
            limit_s = getattr(self, name)
            if limit_s is not None and limit_s <= 0:
                raise ConfigurationError(f"{name} must be more than 0 seconds")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigurationError("max_model_len must be at least 2 tokens")
        try:
            re.compile(self.logits_processor_pattern)
        except re.error as error:
            raise ConfigurationError(
                f"logits_processor_pattern is not a regular expression: {error}"
            ) from None
        if self.generation_config not in ("auto", "vllm"):
            folder = Path(self.generation_config)
            if not (folder / "generation_config.json").is_file():
                raise ConfigurationError(
                    f"generation_config {self.generation_config!r} must be auto, vllm, or a "
                    "folder with a generation_config.json"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use, the primary one first."""
        return (self.served_model_name, *self.model_aliases)
