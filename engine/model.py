"""Loading a model: any decoder of transformers, with our attention."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from contracts.errors import ConfigurationError
from engine import hook, tensor_parallel
from engine.architectures import check_config, learn_layers
from engine.attention.base import AttentionLayer
from engine.kv_cache import KvSpec
from engine.rank_group import RankGroup
from engine.weights import model_folder, weights_digest

log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model on its device, ready for a ModelRunner. `layers` are by layer index.

    With several ranks it is one rank's share: heads are those of this rank.
    """

    module: Any  # a transformers PreTrainedModel
    config: Any  # its text configuration
    folder: Path
    layers: tuple[AttentionLayer, ...]
    slot: hook.AttentionSlot
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_layers(self) -> int:
        """Attention layers, each with KV of its own."""
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of every layer, on this rank."""
        return self.layers[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of a key or value head."""
        return self.layers[0].head_dim

    def kv_spec(self, block_size: int) -> KvSpec:
        """The shape of this model's KV blocks of `block_size` tokens."""
        return KvSpec(self.num_layers, self.num_kv_heads, self.head_dim, block_size, self.dtype)

    def weights_digest(self) -> str:
        """Fingerprint of configuration and weights, equal in all processes that load them."""
        return weights_digest(self.folder)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    max_model_len: int | None = None,
    group: RankGroup | None = None,
) -> LoadedModel:
    """Load a model from a folder or by its hub id.

    Args:
        path: folder or hub id.
        device: cpu, cuda, cuda:N.
        dtype: float32, bfloat16 or float16.
        max_model_len: longest sequence in tokens; None, or more than the model's: the model's.
        group: the ranks that share it, not yet connected; all of them load it together.

    Raises:
        UnsupportedModel: the architecture cannot be served exactly; names it and says why.
        ConfigurationError: no model there, or an unknown dtype, or it cannot be split like that.
        EngineFailure: another rank is gone.
    """
    began = time.monotonic()
    folder = model_folder(str(path))
    device = torch.device(device)
    dtype = _dtype(dtype)
    config = _read_config(folder)
    text = config.get_text_config()
    limit = _max_model_len(text, max_model_len)
    check_config(config, _model_class(config), limit)
    if not limit:
        raise ConfigurationError("the model states no longest context: set --max-model-len")
    if group is not None:
        tensor_parallel.check_heads(text, group.size)
    module = _read_weights(folder, dtype)
    module.eval().requires_grad_(False)
    if device.type == "cpu" and module._can_set_experts_implementation():
        # A loop over the experts: each token's sum is in expert order, whatever the batch.
        module.set_experts_implementation("eager")
    head = module.get_output_embeddings()
    vocab_size = int(text.vocab_size if head is None else head.weight.shape[0])
    whole = None
    if group is not None:
        whole = None if group.rank else tensor_parallel.whole_logits(module)
        tensor_parallel.split(module, group)
    module.to(device)
    slot = hook.install(module)
    if group is not None:
        group.connect(device)
    layers = trace_layers(module, config, slot)
    if group is not None:
        tensor_parallel.check_layers(text, layers, group.size)
        tensor_parallel.check_split(module, whole, group)
    log.info(
        "loaded %s (%s) on %s in %.1f s", folder.name, text.model_type, device,
        time.monotonic() - began,
    )  # fmt: skip
    return LoadedModel(
        module=module,
        config=text,
        folder=folder,
        layers=layers,
        slot=slot,
        vocab_size=vocab_size,
        max_model_len=limit,
        eos_token_ids=_eos_token_ids(module.generation_config),
        dtype=dtype,
        device=device,
    )


def trace_layers(module: Any, config: Any, slot: hook.AttentionSlot) -> tuple[AttentionLayer, ...]:
    """Run one token to learn what each attention layer is; leaves the model set to serve.

    Raises:
        UnsupportedModel: see `learn_layers`.
    """
    slot.trace.clear()
    token = torch.zeros((1, 1), dtype=torch.int64, device=module.device)
    module.set_attn_implementation(hook.TRACE)
    try:
        with torch.inference_mode():
            module(input_ids=token, position_ids=token, use_cache=False)
    finally:
        module.set_attn_implementation(hook.SERVE)
    slot.layers = learn_layers(config, slot.trace)
    slot.trace.clear()
    return tuple(slot.layers)


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no usable model in {folder}: {error}") from error


def _read_weights(folder: Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=hook.SERVE,
            local_files_only=True,
            trust_remote_code=False,
        )
    except OSError as error:
        raise ConfigurationError(f"no usable weights in {folder}: {error}") from error


def _model_class(config: Any) -> type[Any] | None:
    """The class AutoModelForCausalLM takes for this configuration."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        return None
    found: type[Any] | tuple[type[Any], ...] = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _max_model_len(text: Any, wanted: int | None) -> int:
    own = getattr(text, "max_position_embeddings", None)
    return min((int(limit) for limit in (wanted, own) if limit), default=0)


def _eos_token_ids(generation_config: Any) -> tuple[int, ...]:
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
