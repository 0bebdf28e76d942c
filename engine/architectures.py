"""Which models can be served exactly, and what their attention layers are.

Two looks at a model: `check_config` at its configuration, before any weight is read, and
`learn_layers` at one traced token. What is not understood is refused by name. A third, numeric
look is `engine.probe`.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from contracts.errors import UnsupportedModel
from engine.attention.base import AttentionLayer
from engine.hook import FOREIGN_MASK, TracedCall

_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ALIBI_TYPES = frozenset({"bloom", "mpt"})


def refuse(model_type: str, reason: str) -> UnsupportedModel:
    """The error that names the architecture and says why."""
    return UnsupportedModel(f"architecture {model_type!r} cannot be served exactly: {reason}")


def check_config(config: Any, model_class: type[Any] | None, max_model_len: int) -> None:
    """Refuse what its configuration already shows to be unservable.

    Args:
        config: the model's transformers configuration.
        model_class: its causal-LM class; None if transformers has none.
        max_model_len: the longest sequence to be served, in tokens; 0 if not known.

    Raises:
        UnsupportedModel: with a sentence that says why, and what would work if anything does.
    """
    name = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise refuse(name, "it is an encoder-decoder")
    if model_class is None:
        raise refuse(name, "transformers has no decoder-only language model of this type")
    text = config.get_text_config()
    for reason in _reasons(text, name):
        raise refuse(name, reason)
    if not (
        getattr(model_class, "_supports_attention_backend", False)
        or hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")
    ):
        raise refuse(name, f"{model_class.__name__} does not accept another attention backend")
    _check_rope(text, name, max_model_len)


def _reasons(text: Any, name: str) -> Iterator[str]:
    layer_types: Sequence[str] = getattr(text, "layer_types", None) or ()
    foreign = sorted(set(layer_types) - _SERVED_LAYER_TYPES)
    if foreign:
        yield f"it has layers of type {', '.join(foreign)}; served are full and sliding attention"
    if getattr(text, "kv_lora_rank", None):
        yield "its latent attention (MLA) has key and value heads of different size"
    if (
        name in _ALIBI_TYPES
        or getattr(text, "alibi", False)
        or getattr(text, "position_embedding_type", None) == "alibi"
    ):
        yield "its positions are ALiBi biases"
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", False
    ):
        yield "its attention is bidirectional"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "some of its layers read the KV of other layers"


def _check_rope(text: Any, name: str, max_model_len: int) -> None:
    for rope in _ropes(text):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "dynamic":
            raise refuse(name, "its dynamic rope depends on the longest sequence in the batch")
        if kind != "longrope":
            continue
        original = int(
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or 0
        )
        if max_model_len > original:
            raise refuse(
                name,
                f"beyond {original} tokens its longrope depends on the longest sequence in the "
                f"batch; --max-model-len {original} works",
            )


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """Rope parameters, which may be one mapping or one for each layer type."""
    for attribute in ("rope_parameters", "rope_scaling"):
        found = getattr(text, attribute, None)
        if not isinstance(found, Mapping):
            continue
        nested = [item for item in found.values() if isinstance(item, Mapping)]
        yield from nested or [found]


def learn_layers(config: Any, trace: Sequence[TracedCall]) -> tuple[AttentionLayer, ...]:
    """What each layer's attention is, by layer index.

    Raises:
        UnsupportedModel: a layer has no attention or an attention that is not understood, or
            layers differ in the shape of their KV.
    """
    name = str(config.model_type)
    text = config.get_text_config()
    expected = int(text.num_hidden_layers)
    indices = [call.layer for call in trace]
    if sorted(index for index in indices if index is not None) != list(range(expected)):
        raise refuse(
            name,
            f"of its {expected} layers, those with attention through transformers' attention "
            f"interface are {indices}",
        )
    shapes = {(call.num_kv_heads, call.key_dim) for call in trace}
    if len(shapes) != 1:
        raise refuse(name, f"its layers differ in (KV heads, head size): {sorted(shapes)}")
    layers = [_layer(text, name, call) for call in trace]
    return tuple(sorted(layers, key=lambda layer: layer.index))


def _layer(text: Any, name: str, call: TracedCall) -> AttentionLayer:
    where = f"its layer {call.layer}"
    if call.key_dim != call.value_dim:
        sizes = f"{call.key_dim} and {call.value_dim}"
        raise refuse(name, f"{where} has key and value heads of different size ({sizes})")
    if not call.is_causal:
        raise refuse(name, f"{where} has bidirectional attention")
    if call.mask_window == FOREIGN_MASK:
        raise refuse(name, f"the mask of {where} is neither causal nor a causal window")
    if call.extra_tensors:
        raise refuse(name, f"{where} gives its attention {', '.join(call.extra_tensors)}")
    if call.num_heads % call.num_kv_heads:
        heads = f"{call.num_heads} query and {call.num_kv_heads} KV heads"
        raise refuse(name, f"{where} has {heads}")
    if call.mask_window is None and (call.call_window or getattr(text, "sliding_window", None)):
        raise refuse(name, f"the sliding window of {where} cannot be told from its mask")
    assert call.layer is not None
    return AttentionLayer(
        index=call.layer,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.key_dim,
        scaling=call.scaling,
        window=call.mask_window or None,
        softcap=call.softcap or None,
        has_sinks=call.has_sinks,
    )
