"""Tiny random checkpoints, one for each architecture the engine is tested with.

Weights are drawn so that attention matters and greedy margins are far above float32 rounding,
and no token ends a sequence.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

VOCAB = 384
WINDOW = 64  # tokens, where the architecture has sliding windows
_HIDDEN = 64
_LAYERS = 3

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": _HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "layer_types": _MIXED,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
    },
    "phi3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
    "stablelm": {"partial_rotary_factor": 0.25},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _MIXED, "logit_scale": 0.5},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
    },
    "glm4": {"head_dim": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": _HIDDEN, "dropout": 0.0},
}
ARCHITECTURES = tuple(_SPECIAL)


def build_tiny(arch: str, folder: Path, **changes: Any) -> Path:
    """Write a random float32 checkpoint of `arch` into `folder` (made if need be); seeded.

    `changes` override the configuration's values. An existing checkpoint is left as it is.
    """
    if (folder / "config.json").exists():
        return folder
    config = AutoConfig.for_model(arch, **{**_BASE, **_SPECIAL[arch], **changes})
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Gemma multiplies its embeddings by sqrt(hidden): keep them from drowning the attention.
    _draw(model, torch.Generator().manual_seed(1234), 0.03 if "gemma" in arch else 0.25)
    model.generation_config = GenerationConfig(eos_token_id=None, bos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _draw(model: torch.nn.Module, generator: torch.Generator, embedding_std: float) -> None:
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parameter.dim() < 2:
            if parts[-1] == "sinks":
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parts[-1] == "bias" or parts[-1].endswith("_bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            continue  # norms keep their own start
        if "embed" in name or "wte" in name:
            parameter.normal_(0.0, embedding_std, generator=generator)
            continue
        gain = 1.5 if {"q_proj", "k_proj", "qkv_proj", "query_key_value"} & set(parts) else 1.0
        if parts[0] in ("lm_head", "embed_out"):
            gain = 3.0
        parameter.normal_(0.0, gain / math.sqrt(parameter.shape[-1]), generator=generator)
