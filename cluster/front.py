"""What the routers need besides the cluster: names, keys, the template, parsers.

Files are read here, once, where the settings are: their content travels to the routers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from cluster.settings import ClusterSettings
from contracts.errors import ConfigurationError
from router.config import RouterConfig
from router.parsers.registry import REASONING_PARSERS, TOOL_PARSERS

_TEMPLATE_SIGNS = frozenset("{}\n")  # in a template's text, and hardly in a file's name


@dataclass(frozen=True, slots=True)
class Front:
    """Resolved and checked. Holds the API keys: never log it."""

    names: tuple[str, ...]  # the first is shown in answers
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    chat_template: str | None = None  # its text

    def router_config(
        self, settings: ClusterSettings, model_path: str, cluster_key: str
    ) -> RouterConfig:
        """The configuration of a router whose model lies at `model_path`."""
        return RouterConfig(
            model_path=model_path,
            served_model_name=self.names[0],
            cluster_key=cluster_key,
            model_aliases=self.names[1:],
            max_model_len=settings.max_model_len,  # None: the least of the workers'
            api_keys=self.api_keys,
            allowed_origins=settings.allowed_origins,
            allowed_methods=settings.allowed_methods,
            allowed_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            enable_openapi=not settings.disable_fastapi_docs,
            enable_render=settings.enable_render,
            aggregated=settings.aggregated,
            max_inflight=settings.max_inflight,
            request_timeout_s=settings.request_timeout_s,
            worker_wait_s=settings.worker_wait_s,
            replay_wait_s=settings.replay_wait_s,
            queue_wait_s=settings.queue_wait_s,
            body_timeout_s=settings.body_timeout_s,
            write_timeout_s=settings.write_timeout_s,
            max_body_bytes=settings.max_body_bytes,
            max_batch=settings.max_batch,
            chat_template=self.chat_template,
            chat_template_content_format=settings.chat_template_content_format,
            default_chat_template_kwargs=settings.default_chat_template_kwargs,
            trust_request_chat_template=settings.trust_request_chat_template,
            tool_call_parser=settings.tool_call_parser,
            reasoning_parser=settings.reasoning_parser,
            exclude_tools_when_tool_choice_none=settings.exclude_tools_when_tool_choice_none,
            logits_processor_pattern=settings.logits_processor_pattern,
            max_logprobs=settings.max_logprobs,
            return_tokens_as_token_ids=settings.return_tokens_as_token_ids,
            generation_config=settings.generation_config,
            override_generation_config=settings.override_generation_config,
            allow_kv_transfer_params=settings.enable_kv_transfer_params,
        )


def resolve_front(settings: ClusterSettings, model_folder: Path) -> Front:
    """Read the files that the settings name and check what can be checked now.

    Raises:
        ConfigurationError: one line that names the setting.
    """
    for setting, name, known in (
        ("tool_call_parser", settings.tool_call_parser, TOOL_PARSERS),
        ("reasoning_parser", settings.reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name not in (*known, "none"):
            choices = ", ".join(sorted(known))
            raise ConfigurationError(
                f"{setting} {name!r} is not known; choose one of {choices}, or none"
            )
    where = settings.generation_config
    if where not in ("auto", "vllm") and not (Path(where) / "generation_config.json").is_file():
        raise ConfigurationError(
            f"generation_config {where!r} is no folder with a generation_config.json; or write"
            " auto (the model's own) or vllm (none)"
        )
    return Front(
        names=_names(settings, model_folder),
        api_keys=_api_keys(settings),
        chat_template=_chat_template(settings.chat_template),
    )


def _names(settings: ClusterSettings, path: Path) -> tuple[str, ...]:
    """As set, else a hub id itself, else the folder's last part."""
    names = settings.served_model_name
    if not names:
        looks_like_id = settings.model.count("/") == 1 and settings.model[0] not in "./~"
        is_id = looks_like_id and not Path(settings.model).is_dir()
        names = (settings.model if is_id else path.name,)
    return tuple(dict.fromkeys((*names, *settings.model_aliases)))


def _api_keys(settings: ClusterSettings) -> tuple[str, ...]:
    keys = settings.api_keys
    if settings.api_key_file is not None:
        text = _read(Path(settings.api_key_file).expanduser(), "api_key_file")
        lines = [line.strip() for line in text.splitlines()]
        found = tuple(line for line in lines if line)
        if not found:  # else everybody would be let in
            raise ConfigurationError(f"api_key_file {settings.api_key_file} holds no key")
        keys += found
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigurationError("an API key must be printable ASCII without spaces")
    return tuple(dict.fromkeys(keys))


def _chat_template(setting: str | None) -> str | None:
    if setting is None or _TEMPLATE_SIGNS & set(setting):
        return setting
    return _read(Path(setting).expanduser(), "chat_template")


def _read(file: Path, setting: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{setting} {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{setting} {file} is not UTF-8") from error
