"""What the router reads of a model folder besides the tokenizer itself."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ConfigurationError

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_NOT_YET = {  # defaults a model may bring that cannot be honoured yet, with their neutral value
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Sampling defaults of the model; None where it has no opinion."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Everything small from the model folder.

    `primary_eos` is the tokenizer's own end token; `secondary_eos` are the model's further ones.
    `config_vocab_size` is 0 if config.json does not say.
    """

    chat_template: str
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    eos_token: str | None
    config_vocab_size: int
    defaults: ModelDefaults


def read_model_files(folder: Path) -> ModelFiles:
    """Read tokenizer_config.json, generation_config.json, config.json and the chat template.

    Raises:
        ConfigurationError: no chat template, or a file that is not JSON.
    """
    tokenizer_config = _read(folder / "tokenizer_config.json")
    special_map = _read(folder / "special_tokens_map.json")
    generation = _read(folder / "generation_config.json")
    config = _read(folder / "config.json")
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else {}
    special = _special_tokens({**special_map, **tokenizer_config})
    eos_ids = dict.fromkeys(
        _ids(generation.get("eos_token_id"))
        + _ids(config.get("eos_token_id"))
        + _ids(inner.get("eos_token_id"))
    )
    vocab_size = config.get("vocab_size", inner.get("vocab_size", 0))
    return ModelFiles(
        chat_template=_chat_template(folder, tokenizer_config),
        special_tokens=special,
        eos_ids=tuple(eos_ids),
        eos_token=special.get("eos_token"),
        config_vocab_size=vocab_size if isinstance(vocab_size, int) else 0,
        defaults=_defaults(generation),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path.name} of the model is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        return template
    raise ConfigurationError(
        "the model has no chat template: put a chat_template.jinja next to tokenizer.json, or "
        "use an instruction-tuned model"
    )


def _special_tokens(values: dict[str, Any]) -> dict[str, str]:
    """Texts of the special tokens, by the names templates know them by."""
    result = {}
    for name in _SPECIAL_TOKENS:
        value = values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            result[name] = value
    return result


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _defaults(generation: dict[str, Any]) -> ModelDefaults:
    for name, neutral in _NOT_YET.items():
        value = generation.get(name)
        if value is not None and value != neutral:
            logger.warning("generation_config.json: %s=%s is not supported yet", name, value)

    def number(name: str, low: float, high: float) -> float | None:
        value = generation.get(name)
        if value is None:
            return None
        valid = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
        if not valid:
            logger.warning("generation_config.json: %s=%r is ignored: out of range", name, value)
            return None
        return float(value)

    top_p = number("top_p", 0.0, 1.0)
    top_k = number("top_k", -1, 2**31 - 1)
    max_new = number("max_new_tokens", 1, 2**31 - 1)
    return ModelDefaults(
        temperature=number("temperature", 0.0, 2.0),
        top_p=top_p if top_p else None,
        top_k=None if top_k is None else int(top_k),
        max_tokens=None if max_new is None else int(max_new),
    )
