"""The model of the campaign: tiny, so that a worker starts fast, with a real tokenizer."""

import shutil
from pathlib import Path

from cluster.demo_model import ensure_demo_model
from tests.support.tiny_models import build_tiny

ARCHITECTURE = "qwen3"
VOCABULARY = 2048
END_TOKEN = 2


def ensure_model(folder: Path) -> Path:
    """Build it in `folder`, if it is not there."""
    model = folder / "model"
    demo = ensure_demo_model(folder / "demo")
    build_tiny(
        ARCHITECTURE,
        model,
        vocab_size=VOCABULARY,
        eos_token_id=END_TOKEN,
        head_dim=16,
        num_hidden_layers=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, model / name)
    return model
