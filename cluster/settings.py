"""The one settings model: from flags, the environment (`BATON_*`, read here only) and a YAML file.

A setting given twice comes from the first of: flag, environment, file, default. Unknown keys are
errors everywhere; dashes and underscores in them are the same. `cluster.resolve` turns settings
into values with every default found.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from contracts.errors import ConfigurationError

PREFIX = "BATON_"
_ALIASES = {"api_key": "api_keys"}  # vLLM's name
_FOREIGN = ("BATON_LOG_LEVEL", "BATON_NATIVE", "BATON_TEST_", "BATON_BENCH_")  # not settings
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Bytes from 536870912, "512MiB", "2GB" or "1.5 GiB".

    Raises:
        ValueError: it is none of these, or not positive.
    """
    size = parse_bytes_or_none(value)
    if not size:
        raise ValueError(f"a size must be positive, not {value!r}")
    return size


def parse_bytes_or_none(value: object) -> int:
    """The same, and 0 for nothing. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            raise ValueError(f"{value!r} is no size; write bytes, or for example 512MiB or 2GB")
        size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size < 0:
        raise ValueError(f"a size must be positive, not {value!r}")
    return size


def split_words(value: Any) -> Any:
    """A comma-separated text, or a JSON list, as a list (for flags and the environment)."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return tuple(filter(None, (word.strip() for word in value.split(","))))


def _json(value: object) -> object:
    """A JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def _on(value: bool) -> bool:
    if not value:
        raise ValueError("it cannot be switched off; clients choose with tool_choice")
    return value


On = Annotated[bool, AfterValidator(_on)]
Size = Annotated[int, BeforeValidator(parse_bytes)]
SizeOrNone = Annotated[int, BeforeValidator(parse_bytes_or_none)]
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Word, ...], BeforeValidator(split_words)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_json)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class ClusterSettings(BaseModel):
    """Everything a person can set. None and `auto` mean: found from the model and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a model folder, or a hub id (org/name)")
    served_model_name: Words = ()  # the first is shown in answers, all may be asked for
    model_aliases: Words = ()  # further ones
    app_name: str = Field(default="baton", pattern=r"^[a-z][a-z0-9-]{0,40}$")

    prefill: int = Field(default=1, ge=1, le=1024)
    decode: int = Field(default=1, ge=1, le=1024)
    router_replicas: int = Field(default=1, ge=1, le=256)
    aggregated: bool = False  # decode workers alone; they prefill, too

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free one
    api_keys: Words = Field(default=(), repr=False)
    api_key_file: str | None = None  # one key a line
    allowed_origins: Words = ("*",)
    allowed_methods: Words = ("*",)
    allowed_headers: Words = ("*",)
    allow_credentials: bool = False
    disable_fastapi_docs: bool = False  # no /openapi.json
    enable_render: bool = True  # /v1/*/render: prompts and parameters, without an answer
    max_inflight: int = Field(default=4096, ge=1)
    max_body_bytes: Size = 32 << 20
    max_batch: int = Field(default=64, ge=1)  # prompts in one completion request
    request_timeout_s: float = Field(default=3600.0, gt=0)  # whole request, workers included
    worker_wait_s: float = Field(default=5.0, ge=0)  # for a worker that can take a request; 503
    replay_wait_s: float = Field(default=60.0, ge=0)  # the same in the middle of an answer
    queue_wait_s: float = Field(default=60.0, ge=0)  # for room on a decode worker; then 429
    body_timeout_s: float = Field(default=60.0, gt=0)  # a request's body is silent; then 408
    write_timeout_s: float = Field(default=60.0, gt=0)  # a client takes nothing of its stream

    chat_template: str | None = Field(default=None, min_length=1)  # a file, or the template itself
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    default_chat_template_kwargs: JsonObject = {}  # template variables unless a request sets them
    trust_request_chat_template: bool = False
    enable_auto_tool_choice: On = True  # for vLLM's users: it always is
    tool_call_parser: str | None = Field(default=None, min_length=1)  # none: off
    reasoning_parser: str | None = Field(default=None, min_length=1)  # none: off
    exclude_tools_when_tool_choice_none: bool = False
    logits_processor_pattern: Pattern = ""  # of allowed qualified names, whole; empty: none
    max_logprobs: int = Field(default=20, ge=-1)  # -1: the whole vocabulary
    return_tokens_as_token_ids: bool = False
    generation_config: str = Field(default="auto", min_length=1)  # auto, vllm (none), or a folder
    override_generation_config: JsonObject = {}
    enable_kv_transfer_params: bool = False  # clients may drive P and D themselves

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block_size: int = Field(default=16, ge=1, le=1024)
    kv_memory: Size | None = None  # of each worker
    kv_offload_memory: SizeOrNone = 0  # host memory of each worker for cold prefix blocks; 0: off
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)  # ranks of each worker
    max_model_len: int | None = Field(default=None, ge=2)
    max_step_tokens: int = Field(default=2048, ge=1)
    max_running: int = Field(default=256, ge=1)
    max_waiting: int = Field(default=1024, ge=0)
    num_threads: int | None = Field(default=None, ge=1)  # of each worker
    prefix_caching: bool = True
    check_ledger: bool = False

    lease_ms: int = Field(default=2000, ge=100)
    read_timeout_ms: int = Field(default=10_000, ge=10)

    cluster_key: str | None = Field(default=None, min_length=8, repr=False)
    cluster_key_file: str | None = None

    worker_cpus: float = Field(default=1.0, ge=0)  # what Ray reserves for each rank of a worker
    worker_gpus: float | None = Field(default=None, ge=0)
    drain_timeout_s: float = Field(default=60.0, ge=2)  # of a worker that is scaled down
    router_drain_s: float = Field(default=600.0, ge=2)  # streams of a router that is scaled down


def load_settings(
    flags: Mapping[str, object],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ClusterSettings:
    """Merge flags (None: not given), environment and a YAML file.

    Raises:
        ConfigurationError: one line that names the setting and where it came from.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(more: Mapping[str, object], source: str) -> None:
        for name, value in more.items():
            key = name.replace("-", "_")
            key = _ALIASES.get(key, key)
            _check_known(key, source)
            if sources.get(key) == source:
                raise ConfigurationError(f"{key} is set twice in {source}")
            values[key] = value
            sources[key] = source

    if file is not None:
        take(read_yaml(file), str(file))
    take(_from_environment(os.environ if environ is None else environ), "the environment")
    take({key: value for key, value in flags.items() if value is not None}, "the command line")
    try:
        return ClusterSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        reason = first["msg"].removeprefix("Value error, ")
        source = sources.get(name.split(".")[0])
        raise ConfigurationError(
            f"setting {name}{f' (from {source})' if source else ''}: {reason}"
        ) from error


def read_yaml(file: Path) -> dict[str, object]:
    """The settings in a YAML file.

    Raises:
        ConfigurationError: not readable, not YAML, or no mapping.
    """
    import yaml

    try:
        content: object = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} must hold a mapping of settings")
    return {str(key): value for key, value in content.items()}


def read_cluster_key(key: str | None, key_file: str | None) -> str | None:
    """The cluster key itself, or the content of its file; None if neither is set.

    Raises:
        ConfigurationError: the file is not readable or too short.
    """
    if key is not None or key_file is None:
        return key
    try:
        content = Path(key_file).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"cluster_key_file {key_file}: {error.strerror}") from error
    if len(content) < 8:
        raise ConfigurationError(f"cluster_key_file {key_file} holds less than 8 characters")
    return content


def _check_known(key: str, source: str) -> None:
    if key in ClusterSettings.model_fields:
        return
    near = difflib.get_close_matches(key, ClusterSettings.model_fields, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigurationError(f"unknown setting {key!r} in {source}{hint}")


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIX) and not name.startswith(_FOREIGN) and value != ""
    }
