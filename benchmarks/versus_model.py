"""Models to compare engines on: random bf16 weights of a given size, and a tokenizer to match.

Every word of `benchmarks.schedule.WORDS` is one token, so that a prompt's length is known before it
is sent. Neither ends of text nor lone bytes are ever the likeliest token (their rows of the head
are zero), so that every token is text and no stream waits for the rest of a character.
"""

import json
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.schedule import WORDS

RECIPE = 1  # raise it with any change to what is built
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ROWS = len(SPECIAL_TOKENS) + 256  # of the head: the tokens that are never the likeliest
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
MAX_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder; `family` is the transformers model type (llama or qwen3)."""

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """All weights of two dimensions, [outputs, inputs]."""
        shapes = dict.fromkeys(("model.embed_tokens", "lm_head"), (self.vocab_size, self.hidden))
        for layer in range(self.layers):
            for name, outputs, inputs in (
                ("self_attn.q_proj", self.heads * self.head_dim, self.hidden),
                ("self_attn.k_proj", self.kv_heads * self.head_dim, self.hidden),
                ("self_attn.v_proj", self.kv_heads * self.head_dim, self.hidden),
                ("self_attn.o_proj", self.hidden, self.heads * self.head_dim),
                ("mlp.gate_proj", self.mlp, self.hidden),
                ("mlp.up_proj", self.mlp, self.hidden),
                ("mlp.down_proj", self.hidden, self.mlp),
            ):
                shapes[f"model.layers.{layer}.{name}"] = (outputs, inputs)
        return shapes

    def vectors(self) -> dict[str, int]:
        """All norms' weights and their lengths."""
        sizes = {"model.norm": self.hidden}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            sizes[f"{prefix}.input_layernorm"] = self.hidden
            sizes[f"{prefix}.post_attention_layernorm"] = self.hidden
            if self.family == "qwen3":
                sizes[f"{prefix}.self_attn.q_norm"] = self.head_dim
                sizes[f"{prefix}.self_attn.k_norm"] = self.head_dim
        return sizes

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(rows * columns for rows, columns in self.matrices().values()) + sum(
            self.vectors().values()
        )

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM" if self.family == "qwen3" else "LlamaForCausalLM"],
            "model_type": self.family,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": MAX_TOKENS,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


SIZES: dict[str, Shape] = {
    "4m": Shape("qwen3", 2048, 256, 4, 8, 4, 32, 768),
    "60m": Shape("qwen3", 32000, 512, 8, 8, 4, 64, 1536),
    "470m": Shape("qwen3", 32000, 1024, 26, 16, 8, 128, 3072),
}


def ensure_model(folder: Path, shape: Shape) -> Path:
    """The model in `folder`, built first if it is not there or differs; never half-built."""
    made = {"recipe": RECIPE, **asdict(shape)}
    marker = folder / "versus.json"
    if marker.exists() and json.loads(marker.read_text()) == made:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh = workspace / "fresh"
        fresh.mkdir()
        _write_weights(fresh / "model.safetensors", shape)
        _write_tokenizer(fresh / "tokenizer.json", shape.vocab_size)
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        }
        for name, content in (
            ("config.json", shape.config()),
            ("generation_config.json", {"eos_token_id": None, "pad_token_id": 0}),
            ("tokenizer_config.json", tokenizer_config),
            ("versus.json", made),
        ):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, workspace / "outdated")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return folder


class Prompts:
    """User messages that make prompts of a wanted length, by the model's own tokenizer."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.overhead_tokens = self.count(" ") - self._plain_count(" ")

    def count(self, message: str) -> int:
        """Prompt tokens of one user message in TEMPLATE."""
        text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        return self._plain_count(text)

    def make(self, num_tokens: int, seed: str) -> str:
        """Random words, so that no prefix cache helps; exactly `num_tokens` with the template.

        Raises:
            ValueError: the template alone is longer.
        """
        words = num_tokens - self.overhead_tokens
        if words < 1:
            raise ValueError(f"a prompt has more than {self.overhead_tokens} tokens")
        return "".join(f" {word}" for word in random.Random(seed).choices(WORDS, k=words))

    def _plain_count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _write_weights(path: Path, shape: Shape) -> None:
    """The safetensors format: the header's length (u64), the header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dimensions: dict[str, tuple[int, ...]] = dict(shape.matrices())
    dimensions |= {name: (size,) for name, size in shape.vectors().items()}
    end = 0
    for name, dims in dimensions.items():
        begin, end = end, end + 2 * int(np.prod(dims))
        header[f"{name}.weight"] = {
            "dtype": "BF16",
            "shape": list(dims),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(20261123)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in dimensions.items():
            file.write(_to_bf16(_tensor(name, dims, draw)).tobytes())


def _tensor(name: str, dims: tuple[int, ...], draw: np.random.Generator) -> NDArray[np.float32]:
    if len(dims) == 1:
        return np.ones(dims, np.float32)
    values = draw.standard_normal(dims, dtype=np.float32)
    if name == "model.embed_tokens":
        return values
    values *= (3.0 if name == "lm_head" else 1.0) * dims[1] ** -0.5
    if name == "lm_head":
        values[:PLAIN_ROWS] = 0.0
    return values


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """Byte-level BPE that knows WORDS; the rest of the vocabulary are made-up words.

    Those come out of the model and never out of a text: no merge leads to them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([f" {word}" for word in sorted(set(WORDS))], trainer=trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    for number in range(len(vocabulary), vocab_size):
        vocabulary[f"\u0120w{number}"] = number  # \u0120 is ByteLevel's space
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
