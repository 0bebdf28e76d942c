"""Sampling parameters from request fields, with a made-up model behind them."""

from pathlib import Path
from typing import Any

from contracts.sampling import Grammar, SamplingParams
from router.config import RouterConfig
from router.model_files import ModelDefaults
from router.ranges import check_ranges
from router.sampling import ServedModel, resolve
from router.schema import parse_chat_request

MESSAGES = [{"role": "user", "content": "hi"}]
VOCABULARY = 100
CONTEXT = 50
PROMPT = 10
EOS = (1, 2)


def words(text: str) -> tuple[int, ...]:
    """One token a character; a leading blank joins the first letter, as byte-level BPE has it."""
    if len(text) > 1 and text[0] == " " and text[1] != "q":
        return (ord(text[1]) % 40 + 50, *(ord(c) % 40 + 10 for c in text[2:]))
    return tuple(ord(c) % 40 + 10 for c in text)


def make_config(folder: Path, **settings: Any) -> RouterConfig:
    settings = {"logits_processor_pattern": r"good\.\w+", "max_n": 20, **settings}
    return RouterConfig(model_path=str(folder), served_model_name="m", cluster_key="k", **settings)


def params(
    config: RouterConfig,
    *,
    defaults: ModelDefaults | None = None,
    grammar: Grammar | None = None,
    **fields: Any,
) -> SamplingParams:
    request = parse_chat_request({"messages": MESSAGES, **fields})
    check_ranges(request, config, VOCABULARY)
    return resolve(
        request,
        ServedModel(VOCABULARY, EOS, words, defaults or ModelDefaults()),
        num_prompt_tokens=PROMPT,
        max_model_len=CONTEXT,
        grammar=grammar,
    )
