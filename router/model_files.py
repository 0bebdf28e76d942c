"""What the router reads of a model folder besides the tokenizer itself."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracts.errors import ConfigurationError
from router.template_files import read_chat_templates

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
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Sampling defaults of the model or the operator; None where they have no opinion."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()  # end tokens besides the tokenizer's


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Everything small from the model folder.

    `primary_eos` is the tokenizer's own end token; `secondary_eos` are the model's further ones.
    `config_vocab_size` is 0 if config.json does not say. `chat_templates` may be empty.
    """

    chat_templates: dict[str, str]
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    eos_token: str | None
    config_vocab_size: int
    defaults: ModelDefaults


def read_model_files(folder: Path) -> ModelFiles:
    """Read tokenizer_config.json, generation_config.json, config.json and the chat template.

    Raises:
        ConfigurationError: a file that is not JSON.
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
        chat_templates=read_chat_templates(folder, tokenizer_config),
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


_RANGES: dict[str, tuple[str, float, float]] = {  # name in the file: field, lowest, highest
    "temperature": ("temperature", 0.0, 2.0),
    "top_p": ("top_p", 1e-9, 1.0),
    "top_k": ("top_k", -1, _MAX_INT),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", 1e-30, 1e30),
    "presence_penalty": ("presence_penalty", -2.0, 2.0),
    "frequency_penalty": ("frequency_penalty", -2.0, 2.0),
    "max_new_tokens": ("max_tokens", 1, _MAX_INT),
}


def _defaults(generation: Mapping[str, Any]) -> ModelDefaults:
    """What generation_config.json says; values that make no sense are left out, with a warning."""
    values: dict[str, Any] = {}
    for name, (field, low, high) in _RANGES.items():
        value = generation.get(name)
        if value is None:
            continue
        if _in_range(value, low, high):
            values[field] = value
        else:
            logger.warning("generation_config.json: %s=%r is ignored: out of range", name, value)
    return _typed(values, tuple(_ids(generation.get("eos_token_id"))))


def _typed(values: dict[str, Any], eos_ids: tuple[int, ...]) -> ModelDefaults:
    for name, value in values.items():
        values[name] = int(value) if name in ("top_k", "max_tokens") else float(value)
    return ModelDefaults(**values, eos_ids=eos_ids)


def _in_range(value: object, low: float, high: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high  # type: ignore[operator]  # NaN is in no range


def serving_defaults(
    model: ModelDefaults, source: str = "auto", override: Mapping[str, Any] | None = None
) -> ModelDefaults:
    """What requests leave open.

    Args:
        model: what the model folder says.
        source: `auto` takes it, `vllm` does not, anything else is a folder whose
            generation_config.json replaces it.
        override: the operator's own values, under the names of generation_config.json.

    Raises:
        ConfigurationError: a file that is not JSON, or an override that cannot be honoured.
    """
    if source == "vllm":
        model = ModelDefaults()
    elif source != "auto":
        model = _defaults(_read(Path(source) / "generation_config.json"))
    values: dict[str, Any] = {}
    eos_ids = model.eos_ids
    for name, value in (override or {}).items():
        if name == "eos_token_id":
            eos_ids = tuple(_ids(value))
            continue
        if name not in _RANGES:
            known = ", ".join([*_RANGES, "eos_token_id"])
            raise ConfigurationError(
                f"override_generation_config: {name} is unknown; it takes {known}"
            )
        field, low, high = _RANGES[name]
        if not _in_range(value, low, high):
            raise ConfigurationError(
                f"override_generation_config: {name} must be between {low:g} and {high:g}"
            )
        values[field] = value
    typed = _typed(values, eos_ids)
    return replace(model, eos_ids=eos_ids, **{name: getattr(typed, name) for name in values})


def read_model_type(folder: Path) -> str:
    """`model_type` of config.json; empty if it does not say."""
    model_type = _read(folder / "config.json").get("model_type")
    return model_type if isinstance(model_type, str) else ""
