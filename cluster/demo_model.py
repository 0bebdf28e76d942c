"""A small random model that Baton builds for itself, so that it starts with nothing downloaded.

Qwen3-shaped: 4 layers, hidden size 256, 8 heads over 4 KV heads, 2048 tokens, float32, 11 MB. Its
text is noise. Every number comes from a fixed seed by exact operations, so two machines build
the same bytes and their workers agree about the semantic hash.
"""

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.demo_template import CHAT_TEMPLATE, MARKERS
from contracts.errors import ConfigurationError

RECIPE = 2  # raise it with any change to what is built: old folders are then rebuilt
MARKER = "baton_demo.json"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
VOCAB_SIZE = 2048
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 8, 4, 32, 256
SEED = 20250727

CONFIG: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GENERATION_CONFIG: dict[str, object] = {
    "bos_token_id": 0,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
TOKENIZER_CONFIG: dict[str, object] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 4096,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
README = """# Baton's demo model

Random weights, made on this machine by `cluster/demo_model.py`. **Its text is noise**: it was never
trained, and it is here so that the serving path can be tried and tested with nothing downloaded.
Delete the folder to have it built again.
"""
PROSE = """
A prompt is read once and an answer is written word by word. The first part is heavy and short, the
second is light and long, so they want different machines. One worker reads the prompt and fills its
cache with keys and values; another takes the cache over and goes on from there. What moves between
them is called a handoff, and like the baton of a relay race it must never be dropped, never be
passed twice, and never be swapped for a stick that looks the same.

Every block has an owner. A block may be free, cached, owned, leased, reserved or in quarantine, and
it is in exactly one of these states. When the reader has all it asked for, it looks at the numbers
that were promised; if one of them differs, it throws the copy away and computes the prompt again.
Nobody outside will notice, except that the first word comes a little later than usual.

Why would anyone split what could be done in one place? Because a long prompt stops the others.
While it is read, every stream on that machine waits, and people who watch their text
arrive see it halt. Two pools can be sized, scaled and upgraded apart, and a slow request no
longer holds up a fast one. The price is a copy, and the art is to make that copy
cheap, early, safe, and easy to explain.

Good morning! Could you tell me about the weather, please? Yes: today is bright, tomorrow may bring
rain, and after that nobody knows. Write a poem about the sea, a story about an old lighthouse, a
letter to a friend, a recipe for bread with seven grains, a list of three small countries. Explain
how a bicycle stays upright, why the sky is blue, what makes music sad, and who invented the clock.
The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.

Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 16 20 24 30 32 50 64 100 128 256 500 512 1000 1024 2048 4096.
Signs: ( ) [ ] { } < > + - * / = % & | ! ? . , : ; # @ $ ~ ^ _ " ' and so on... "Really?" -- "I
don't think it's hers, they're ours, we've won, you'll see, he'd say."
def add(first, second): return first + second
for index in range(10): print(index, values[index])
{"name": "baton", "active": true, "count": 3, "items": [1, 2, 3], "nothing": null}
"""
STEMS = """
answer ask balance block board build burn call carry chain charge check claim clear climb collect
compare connect correct count cover craft cross deal decode defend deliver describe discover draw
dream drift earn empty engine enter exchange expect explain export fail farm fear field fight finish
fish follow forest form gather garden guard guess handle happen harbour help hunt import improve
invent island journey jump kitchen land laugh lead learn lend level lift listen load look market
measure member mention mirror model morning mountain name network number offer open order paint
parent pattern perform picture plant play point pour prefill present press protect pull question
reach record reflect release remember render repair repeat report request rest return river round
route sail sample scale school search season shadow shape share shelter shout signal silver sing
sleep smooth sound speak spring stand start station stay stone storm stream street strength
stretch student summer support surface switch table talk teach thank thread token touch tower trade
train travel treat turn valley view village visit voice wait walk wander warm wash water welcome
whisper window winter wonder work worker world yellow yield
"""
ENDINGS = ("", "s", "ed", "ing", "er")


def ensure_demo_model(folder: Path) -> Path:
    """The demo model in `folder`, built first if it is not there (under a second).

    A half-built folder is never visible, and several processes may call this at once.

    Raises:
        ConfigurationError: `folder` holds something else.
    """
    if _is_current(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed; dies with its process
        if _is_current(folder):  # another process was faster
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            raise ConfigurationError(
                f"{folder} is not empty and holds no demo model; name another folder"
            )
        workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fresh = workspace / "fresh"
            fresh.mkdir()
            _build(fresh)
            if folder.exists():
                os.replace(folder, workspace / "outdated")
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    return folder


def _is_current(folder: Path) -> bool:
    try:
        marker: object = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return marker == {"recipe": RECIPE}


def _build(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder / "tokenizer.json")
    (folder / "README.md").write_text(README, encoding="utf-8")
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        (MARKER, {"recipe": RECIPE}),
    ):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _weights() -> dict[str, NDArray[np.float32]]:
    """Uniform draws, which are exact on every machine (normal draws go through its libm).

    The gains are chosen so that attention, MLP and residual weigh about the same and logits spread
    widely: a wrong KV block then changes the text, and rounding does not.
    """
    draws = np.random.RandomState(SEED)  # its stream is frozen by numpy's policy

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        """[rows, columns] with standard deviation gain / sqrt(columns)."""
        limit = gain * (3.0 / columns) ** 0.5
        uniform: NDArray[np.float64] = draws.random_sample((rows, columns))
        scaled: NDArray[np.float32] = ((2.0 * uniform - 1.0) * limit).astype(np.float32)
        return scaled

    def constant(size: int, value: float = 1.0) -> NDArray[np.float32]:
        return np.full(size, value, dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN, gain=HIDDEN**0.5)}
    for layer in range(LAYERS):
        part = {
            "input_layernorm": constant(HIDDEN),
            "post_attention_layernorm": constant(HIDDEN),
            "self_attn.q_proj": matrix(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD_DIM, gain=2.0),
            "self_attn.q_norm": constant(HEAD_DIM, 2.0),
            "self_attn.k_norm": constant(HEAD_DIM),
            "mlp.gate_proj": matrix(MLP, HIDDEN, gain=1.5),
            "mlp.up_proj": matrix(MLP, HIDDEN, gain=1.5),
            "mlp.down_proj": matrix(HIDDEN, MLP),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": array for name, array in part.items()}
    weights["model.norm.weight"] = constant(HIDDEN)
    head = matrix(VOCAB_SIZE, HIDDEN, gain=3.0)
    head[: len(SPECIAL_TOKENS) + 256] = 0.0  # rarely an end, rarely a lone byte: words instead
    head[-len(MARKERS) :] = 0.0  # calls and thoughts come from forced tokens only
    weights["lm_head.weight"] = head
    return weights


def _write_tokenizer(path: Path) -> None:
    """Byte-level BPE, trained here on the text above; ties break by id, so it is deterministic."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKERS),
        min_frequency=0,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    forms = " ".join(stem + ending for stem in STEMS.split() for ending in ENDINGS)
    tokenizer.train_from_iterator([PROSE, forms], trainer=trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"the text gives {tokenizer.get_vocab_size()} tokens only")
    tokenizer.save(str(path))
