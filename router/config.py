"""What a router replica needs to know, checked whole at start."""

from dataclasses import dataclass
from pathlib import Path

from contracts.errors import ConfigurationError


@dataclass(frozen=True)
class RouterConfig:
    """Every default resolved by `cluster`; frozen.

    Raises:
        ConfigurationError: a value makes no sense; the message names it.
    """

    model_path: str
    served_model_name: str
    cluster_key: str
    model_aliases: tuple[str, ...] = ()  # further accepted names
    max_model_len: int | None = None  # tokens; None: the least of the workers'
    api_keys: tuple[str, ...] = ()  # empty: no key needed
    allowed_origins: tuple[str, ...] = ("*",)  # CORS
    aggregated: bool = False  # decode workers alone, every path local
    use_generation_config: bool = True  # the model's own sampling defaults
    max_body_bytes: int = 32 << 20
    max_n: int = 64
    max_top_logprobs: int = 20
    max_stop: int = 4
    write_buffer_bytes: int = 1 << 20  # unread output of one stream; beyond: that one is aborted
    max_inflight: int = 4096  # requests; beyond: 429
    max_retries: int = 2  # before the first token
    max_replays: int = 3  # after it
    worker_wait_s: float = 5.0  # how long a request waits for a worker to connect
    request_timeout_s: float | None = None  # whole request
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
            "max_top_logprobs": 0,
            "max_stop": 0,
            "write_buffer_bytes": 1024,
            "max_inflight": 1,
            "max_retries": 0,
            "max_replays": 0,
            "worker_wait_s": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigurationError(f"{name} must be at least {value}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigurationError("max_model_len must be at least 2 tokens")

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use, the primary one first."""
        return (self.served_model_name, *self.model_aliases)
