"""What a model folder says of its size, read from config.json and the files' sizes alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ConfigurationError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "*.txt"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder. `kv_values_per_token` is an estimate from above (all layers full)."""

    path: Path
    dtype: str  # as stored; float32 if the config does not say
    weight_bytes: int  # as stored
    max_model_len: int | None  # tokens
    kv_values_per_token: int | None  # keys and values of one token, all layers
    quantized: bool = False

    def weight_bytes_as(self, dtype: str) -> int:
        """Bytes of the weights when loaded as `dtype` (quantised ones stay as they are)."""
        if self.quantized:
            return self.weight_bytes
        return self.weight_bytes * ITEM_BYTES[dtype] // ITEM_BYTES.get(self.dtype, 4)

    def kv_bytes_per_token(self, dtype: str) -> int | None:
        """Bytes of one token's keys and values."""
        if self.kv_values_per_token is None:
            return None
        return self.kv_values_per_token * ITEM_BYTES[dtype]


def find_model(name: str) -> Path:
    """The folder of a model: a path, or a hub id (`org/name`), downloaded if need be.

    Raises:
        ConfigurationError: there is no such folder, and the hub does not give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    parts = name.split("/")
    if folder.exists() or len(parts) != 2 or not all(parts) or name[0] in "./~":
        raise ConfigurationError(
            f"no model folder {name!r}; name a folder with a config.json, or a hub id (org/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # a boundary: that library raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"no folder {name!r} here, and the hub does not give it: {reason}"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """What is needed to plan memory.

    Raises:
        ConfigurationError: no config.json or no weights, or not JSON.
    """
    file = path / "config.json"
    try:
        config: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} has no config.json, so it is no model folder") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file} is no JSON object")
    weights = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    if not weights:
        raise ConfigurationError(f"{path} has no weights (*.safetensors)")
    text = config.get("text_config")
    inner: dict[str, Any] = {**config, **text} if isinstance(text, dict) else config
    dtype = str(inner.get("dtype") or inner.get("torch_dtype") or "float32")
    return Checkpoint(
        path=path,
        dtype=dtype.removeprefix("torch."),
        weight_bytes=sum(weight.stat().st_size for weight in weights),
        max_model_len=_whole(inner.get("max_position_embeddings") or inner.get("n_positions")),
        kv_values_per_token=_kv_values(inner),
        quantized="quantization_config" in inner,
    )


def _kv_values(config: dict[str, Any]) -> int | None:
    if "kv_lora_rank" in config:  # a latent cache: the sum below would be far too high
        return None
    layers = _whole(config.get("num_hidden_layers") or config.get("n_layer"))
    heads = _whole(config.get("num_attention_heads") or config.get("n_head"))
    hidden = _whole(config.get("hidden_size") or config.get("n_embd"))
    if layers is None or heads is None:
        return None
    kv_heads = _whole(config.get("num_key_value_heads")) or heads
    head_dim = _whole(config.get("head_dim")) or (hidden // heads if hidden else None)
    return None if head_dim is None else 2 * layers * kv_heads * head_dim


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
