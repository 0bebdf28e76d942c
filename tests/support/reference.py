"""What `transformers` itself generates: the truth that the engine is held to."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

EAGER_ONLY = ("gemma2", "gpt_oss")  # soft-capping or sinks: sdpa would leave them out


@cache
def stock_model(folder: Path, arch: str) -> Any:
    """The stock model, float32, with an attention that honours all the architecture asks for."""
    # The workers' own setting holds for their threads only; more threads than cores crawl.
    torch.set_num_threads(1)
    attention = "eager" if arch in EAGER_ONLY else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


def greedy(folder: Path, arch: str, prompt: list[int], new_tokens: int) -> list[int]:
    """`generate(do_sample=False)` for one prompt alone."""
    found = stock_model(folder, arch).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=new_tokens,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens
