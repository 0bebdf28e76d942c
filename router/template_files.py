"""Where a model's chat templates are found, and which one a conversation gets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contracts.errors import ConfigurationError

DEFAULT, TOOL_USE = "default", "tool_use"  # the names that mean something


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of a model folder by name; empty if the model has none.

    A chat_template.jinja goes before the `chat_template` of tokenizer_config.json, which is a text
    or a list of `{name, template}`. Further ones lie in `additional_chat_templates/<name>.jinja`.
    """
    found: dict[str, str] = {}
    configured = tokenizer_config.get("chat_template")
    if isinstance(configured, str):
        found[DEFAULT] = configured
    elif isinstance(configured, list):
        for entry in configured:
            name = entry.get("name") if isinstance(entry, dict) else None
            source = entry.get("template") if isinstance(entry, dict) else None
            if isinstance(name, str) and isinstance(source, str):
                found[name] = source
    file = folder / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = _read_text(file)
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = _read_text(extra)
    return {name: source for name, source in found.items() if source}


def operator_template(option: str) -> str:
    """The template an operator names: a file's text, or the option itself if it is Jinja.

    Raises:
        ConfigurationError: neither a file nor anything that looks like a template.
    """
    looks_like_jinja = any(mark in option for mark in ("{{", "{%", "{#", "\n"))
    path = Path(option)
    try:
        is_file = not looks_like_jinja and path.is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        is_file = False
    if is_file:
        return _read_text(path)
    if looks_like_jinja:
        return option
    raise ConfigurationError("the chat template option names no file and is no Jinja template")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file.name} cannot be read: {error}") from None
