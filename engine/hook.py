"""Where transformers' attention calls enter the engine.

Two attention implementations are registered with transformers: `baton` serves, `baton-trace`
records one token's attention calls, from which `engine.architectures` learns what each layer's
attention is. Modules find their engine through an AttentionSlot hung on each of them, since not
every architecture hands keyword arguments of the model's call down to its attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from engine.attention.base import AttentionBackend, AttentionLayer

SERVE = "baton"
TRACE = "baton-trace"
FOREIGN_MASK = -1  # a traced mask that is neither causal nor a causal window

_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "s_aux"})


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One attention call of the traced token. `mask_window`: see `_trace_mask`; None: no mask."""

    layer: int | None
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    mask_window: int | None
    call_window: int | None
    softcap: float | None
    has_sinks: bool
    is_causal: bool
    extra_tensors: tuple[str, ...]


@dataclass(slots=True, eq=False)
class AttentionSlot:
    """What the attention modules of one model share. Set by its only runner and its tracer."""

    layers: Sequence[AttentionLayer] = ()
    backend: AttentionBackend | None = None
    trace: list[TracedCall] = field(default_factory=list[TracedCall])


def install(model: torch.nn.Module) -> AttentionSlot:
    """Hang one new slot on every module of `model`."""
    slot = AttentionSlot()
    for module in model.modules():
        module._baton_slot = slot  # type: ignore[assignment]
    return slot


def _serve(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; all but the sinks' values is known from the trace.

    Args:
        module: the layer's attention module.
        query: [1, heads, tokens, dim]; key and value likewise.
        key: [1, kv_heads, tokens, dim].
        value: likewise.
        attention_mask: not used (the backend knows the sequences).
        s_aux: [heads], the sinks.

    Returns:
        [1, tokens, heads, dim], and no weights.
    """
    slot: AttentionSlot = module._baton_slot
    assert slot.backend is not None, "no runner drives this model"
    out = slot.backend.forward(
        slot.layers[module.layer_idx],
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        s_aux,
    )
    return out[None], None


def _trace(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call; the result is zeros (only shapes matter)."""
    slot: AttentionSlot = module._baton_slot
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    extra = [
        name
        for name, item in others.items()
        if isinstance(item, torch.Tensor) and name not in _HARMLESS_TENSORS
    ]
    window = None
    if attention_mask is not None:
        marked = attention_mask.dtype == torch.int64 and attention_mask.numel() == 1
        window = int(attention_mask.item()) if marked else FOREIGN_MASK
    slot.trace.append(
        TracedCall(
            layer=getattr(module, "layer_idx", None),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            mask_window=window,
            call_window=sliding_window,
            softcap=softcap,
            has_sinks=s_aux is not None,
            is_causal=bool(causal),
            extra_tensors=tuple(extra),
        )
    )
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return query.new_zeros(shape), None


def _trace_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """In place of a mask, its window: 0 for plainly causal, FOREIGN_MASK if it is neither.

    The architecture hands it to its attention calls as it would the mask, so each call tells
    which mask its layer gets. The mask function itself is asked, at the edges of the window.
    """
    window = local_size or 0
    for query in sorted({0, 1, 7, 4099, max(window - 1, 0), window, window + 1, 3 * window + 5}):
        keys = torch.arange(query + 3, device=device)
        expected = keys <= query
        if window:
            expected &= keys > query - window
        place = torch.tensor(query, device=device)
        batch = head = torch.tensor(0, device=device)
        visible = torch.as_tensor(mask_function(batch, head, place, keys), device=device)
        if not torch.equal(visible.expand_as(expected), expected):
            window = FOREIGN_MASK
            break
    return torch.full((batch_size, 1, q_length, kv_length), window, device=device)


AttentionInterface.register(SERVE, _serve)
AttentionInterface.register(TRACE, _trace)
AttentionMaskInterface.register(TRACE, _trace_mask)
