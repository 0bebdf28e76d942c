"""What a model is, from its configuration and the headers of its weight files.

The files are asked and not the loaded model, for an engine may keep its weights packed or fused.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import ConfigurationError

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`count` matrices of `outputs` rows and `inputs` columns."""

    outputs: int
    inputs: int
    count: int

    @property
    def size(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.outputs, self.inputs


@dataclass(frozen=True, slots=True)
class Weights:
    """The matrices that a step streams; `shapes` has the head's, too.

    `layer_elements` are multiplied for each token, `head_elements` for each row of logits. Of a
    mixture of experts all are counted, though a token meets a few of them only.
    """

    shapes: tuple[LinearShape, ...]
    layer_elements: int
    head_elements: int

    @property
    def elements(self) -> int:
        """Numbers that a decode step reads."""
        return self.layer_elements + self.head_elements

    def flops(self, tokens: int, rows: int) -> float:
        """Of a step of so many tokens and rows of logits."""
        return 2.0 * (self.layer_elements * tokens + self.head_elements * rows)


def read_weights(folder: Path) -> Weights:
    """Find the linear layers of the model in `folder`.

    Raises:
        ConfigurationError: there are no safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(f"no safetensors files in {folder}")
    shapes: Counter[tuple[int, int]] = Counter()
    embedding: tuple[int, int] | None = None
    head: tuple[int, int] | None = None
    layer_elements = 0
    for name, shape in (entry for file in files for entry in _header(file)):
        if len(shape) < 2 or not name.endswith(("weight", "_proj")):
            continue
        outputs, inputs = shape[-2:]
        count = 1
        for size in shape[:-2]:
            count *= size
        if any(part in name for part in _EMBEDDINGS):
            embedding = outputs, inputs
        elif any(part in name for part in _HEADS):
            head = outputs, inputs
        else:
            shapes[outputs, inputs] += count
            layer_elements += count * outputs * inputs
    head = head or embedding or (0, 0)  # tied
    shapes[head] += 1
    found = tuple(LinearShape(*shape, count) for shape, count in shapes.most_common())
    return Weights(found, layer_elements, head[0] * head[1])


def _header(file: Path) -> list[tuple[str, list[int]]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        entries = json.loads(opened.read(length))
    return [(name, one["shape"]) for name, one in entries.items() if name != "__metadata__"]


def kv_bytes_per_token(folder: Path, itemsize: int) -> int:
    """Keys and values of one token in all layers, `itemsize` bytes a number.

    Raises:
        ConfigurationError: the configuration does not say.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return int(config["num_hidden_layers"] * 2 * kv_heads * head_dim * itemsize)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"no usable configuration in {folder}: {error!r}") from error
