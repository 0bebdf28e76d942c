"""A model's share of one rank, cut by transformers' own tensor-parallel plan.

A plan names for each layer how it is split (`model.tp_plan`):

    colwise               its outputs: each rank computes its heads, or its part of an MLP
    rowwise               its inputs, which a colwise layer left split; the ranks' sums are added
    colwise_gather_output its outputs, which all ranks then need whole
    rowwise_split_input   its inputs, which all ranks have whole
    packed_colwise        an experts' weight: gate and up, each by its outputs
    moe_tp_experts        experts with such weights: the ranks' sums are added

The weights are read whole (checkpoints in safetensors with the dtype that is served are mapped,
not read) and each rank keeps copies of its slices. That the split model computes what the whole
one did is seen before it serves: see `check_split`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from contracts.errors import ConfigurationError
from engine import hook
from engine.attention.base import AttentionLayer
from engine.differences import TOLERANCE, logit_difference
from engine.rank_group import RankGroup

_WHOLE = frozenset(  # each rank has all of it and computes it for itself
    {
        "replicate",
        "replicated_with_grad_allreduce",
        "local_params",
        "embedding_rowwise",
        "embedding_colwise",
    }
)
_CHECKED_TOKENS = 8


class RowwiseLinear(nn.Module):
    """A linear layer of which each rank has some of the input features.

    With `split_input` it is given all of them, else just its own.
    """

    def __init__(self, linear: nn.Linear, group: RankGroup, *, split_input: bool) -> None:
        super().__init__()
        self.part = _linear(_slice(linear.weight, 1, group), None)
        self.bias = linear.bias
        self._split_input = split_input
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """The part that this rank has."""
        return self.part.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., features] to [..., out_features], the same on all ranks."""
        if self._split_input:
            input = _slice(input, input.dim() - 1, self._group)
        out: torch.Tensor = self._group.all_reduce(self.part(input).contiguous())
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """A linear layer of which each rank computes some output features, and gets the others."""

    def __init__(self, linear: nn.Linear, group: RankGroup) -> None:
        super().__init__()
        self.part = _columns(linear, group)
        self.out_features = linear.out_features
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """The part that this rank has."""
        return self.part.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], the same on all ranks."""
        out: torch.Tensor = self.part(input)
        if not out.numel():  # no row is asked for, on no rank
            return out.new_empty((*out.shape[:-1], self.out_features))
        return self._group.gather_last(out)


def check_heads(text: Any, size: int) -> None:
    """Refuse what the configuration already shows not to divide.

    Raises:
        ConfigurationError: `size` does not divide the heads.
    """
    heads, kv_heads = _heads(text)
    for count, what in ((heads, "attention heads"), (kv_heads, "KV heads")):
        if count % size:
            raise _refuse(text, size, f"it has {count} {what}, which do not divide by {size}")


def split(module: Any, group: RankGroup) -> None:
    """Leave of a whole model, on the CPU, this rank's share of it.

    Raises:
        ConfigurationError: there is no plan, or it cannot be followed; says what does not divide.
    """
    text = module.config.get_text_config()
    plan: dict[str, str] = dict(getattr(module, "tp_plan", None) or {})
    if not any(style.startswith("rowwise") for style in plan.values()):
        raise _refuse(text, group.size, "transformers has no tensor-parallel plan for it")
    try:
        with torch.no_grad():
            for parent, name, style in list(_planned(module, plan)):
                _apply(parent, name, style, group)
    except _Indivisible as error:
        raise _refuse(text, group.size, str(error)) from None


def check_layers(text: Any, layers: tuple[AttentionLayer, ...], size: int) -> None:
    """See that every rank got its own heads only, and so its own KV heads.

    Raises:
        ConfigurationError: the plan leaves all of them on each rank.
    """
    heads, _ = _heads(text)
    found = layers[0].num_heads
    if any(layer.num_heads * size != heads for layer in layers):
        raise _refuse(text, size, f"its plan leaves {found} of {heads} heads on each rank")


def whole_logits(module: Any) -> torch.Tensor:
    """[vocab_size] after a few tokens: what the model says as transformers runs it."""
    text = module.config.get_text_config()
    count = min(_CHECKED_TOKENS, int(text.vocab_size))
    tokens = torch.arange(count, device=module.device)[None] * 7 % int(text.vocab_size)
    positions = torch.arange(count, device=module.device)[None]
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            result = module(input_ids=tokens, position_ids=positions, use_cache=False)
    finally:
        module.set_attn_implementation(hook.SERVE)
    logits: torch.Tensor = result.logits[0, -1]
    return logits.float().cpu()


def check_split(module: Any, before: torch.Tensor | None, group: RankGroup) -> None:
    """See that the split model computes what the whole one did; all ranks do this together.

    Args:
        module: this rank's share.
        before: `whole_logits` of the whole model, on one rank at least.
        group: the ranks.

    Raises:
        ConfigurationError: it does not; on all ranks.
    """
    found = whole_logits(module)
    apart = 0.0 if before is None else logit_difference(before, found)
    apart = group.maximum(apart)
    limit = TOLERANCE[module.dtype]
    if not apart <= limit:  # also if NaN
        raise _refuse(
            module.config.get_text_config(),
            group.size,
            f"split by its plan, its logits differ from the whole model's by {apart:.2g} of their "
            f"spread (allowed: {limit:.2g})",
        )


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Where rank `rank` computes if rank 0 is on `device`: GPUs are counted on from there."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", (device.index or 0) + rank)


class _Indivisible(Exception):
    """What the plan asks for cannot be done to this layer."""


def _refuse(text: Any, size: int, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"tensor_parallel_size {size} does not suit architecture {str(text.model_type)!r}: {reason}"
    )


def _heads(text: Any) -> tuple[int, int]:
    heads = int(text.num_attention_heads)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)


def _planned(module: nn.Module, plan: dict[str, str]) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, name in it, style) of each layer and bare parameter that the plan names."""
    for path, owner in module.named_modules():
        for name in (*owner._modules, *owner._parameters):
            generic = re.sub(r"\.\d+(?=\.|$)", ".*", f"{path}.{name}".removeprefix("."))
            style = plan.get(generic)
            if style is not None and getattr(owner, name, None) is not None:
                yield owner, name, style


def _apply(owner: nn.Module, name: str, style: str, group: RankGroup) -> None:
    if style in _WHOLE:
        return
    layer = getattr(owner, name)
    if isinstance(layer, nn.Parameter):
        setattr(owner, name, nn.Parameter(_cut(layer, name, style, group), requires_grad=False))
    elif style in ("moe_tp_experts", "all_reduce"):
        layer.register_forward_hook(_adding(group))
    elif type(layer) is not nn.Linear:
        raise _Indivisible(f"its {name} is a {type(layer).__name__}, which cannot be split")
    else:
        setattr(owner, name, _LINEAR[style](layer, group) if style in _LINEAR else _no(style))


def _no(style: str) -> nn.Module:
    raise _Indivisible(f"its plan asks for {style!r}, which is not known here")


def _cut(weight: torch.Tensor, name: str, style: str, group: RankGroup) -> torch.Tensor:
    """A rank's part of a parameter that no layer owns (of experts: [experts, out, in])."""
    if style == "packed_colwise" and weight.dim() > 1:
        halves = weight.chunk(2, dim=-2)
        return torch.cat([_slice(half, half.dim() - 2, group) for half in halves], dim=-2)
    if style == "colwise" and weight.dim() > 1:
        return _slice(weight, weight.dim() - 2, group)
    if style == "rowwise" and weight.dim() > 1:
        return _slice(weight, weight.dim() - 1, group)
    raise _Indivisible(f"its plan asks for {style!r} of {name}, which is not known here")


def _slice(tensor: torch.Tensor, dim: int, group: RankGroup) -> torch.Tensor:
    """A copy of this rank's part of a dimension."""
    size = tensor.shape[dim]
    if size % group.size:
        raise _Indivisible(f"a layer with {size} features does not divide by {group.size}")
    each = size // group.size
    return (
        tensor.detach()
        .narrow(dim, group.rank * each, each)
        .clone(memory_format=torch.contiguous_format)
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _columns(linear: nn.Linear, group: RankGroup) -> nn.Linear:
    bias = None if linear.bias is None else _slice(linear.bias, 0, group)
    return _linear(_slice(linear.weight, 0, group), bias)


def _gathered(linear: nn.Linear, group: RankGroup) -> nn.Module:
    if linear.out_features % group.size:
        return linear  # each rank computes it whole: just as right
    return GatheredLinear(linear, group)


_LINEAR: dict[str, Callable[[nn.Linear, RankGroup], nn.Module]] = {
    "colwise": _columns,
    "rowwise": lambda linear, group: RowwiseLinear(linear, group, split_input=False),
    "colwise_gather_output": _gathered,
    "colwise_rep": _gathered,
    "rowwise_split_input": lambda linear, group: RowwiseLinear(linear, group, split_input=True),
    "rowwise_rep": lambda linear, group: RowwiseLinear(linear, group, split_input=True),
}


def _adding(group: RankGroup) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
    def add(layer: nn.Module, args: Any, out: Any) -> torch.Tensor:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"{type(layer).__name__} gives no tensor")
        return group.all_reduce(out.contiguous())

    return add
