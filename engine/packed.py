"""Faster forms of a model's layers on the CPU, put in place when it is loaded.

Linear layers get weights that lie as the CPU's matrix kernels read them: a plain `nn.Linear` has
oneDNN or MKL rearrange its weight at every call, while one that is packed once streams at up to
twice the speed for a few rows, and in float32 for many rows too (docs/measurements.md). The
products are the same, sums may be in another order. RMS norms, half a dozen passes in torch,
become one. A layer is replaced only if its new form is seen to compute the same.
"""

import ctypes
import logging
from dataclasses import dataclass

import torch
from torch import nn

from engine.attention.native_build import native_library

log = logging.getLogger(__name__)

_ROWS_HINT = 16  # oneDNN picks the layout for about that many rows; other counts work as well
_DTYPES = (torch.float32, torch.bfloat16)  # as native.cpp numbers them
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the outputs' own size


class PackedLinear(nn.Module):
    """In place of a `nn.Linear`. `weight` has its shape and dtype, and no data; `packed` has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.packed, self.bias, "none", [], ""
        )
        return out


class NativeRmsNorm(nn.Module):
    """In place of a model's own RMS norm with `weight` and an epsilon."""

    def __init__(self, norm: nn.Module, epsilon: float, library: ctypes.CDLL) -> None:
        super().__init__()
        self.plain = norm
        self.weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        self.variance_epsilon = epsilon
        self._call = library.baton_rms_norm
        self._kind = _DTYPES.index(self.weight.dtype)
        self._address = self.weight.data_ptr()
        self._dim = self.weight.shape[0]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., dim]; of the weight's dtype, or the model's own norm computes it."""
        if hidden_states.dtype != self.weight.dtype or hidden_states.shape[-1] != self._dim:
            result: torch.Tensor = self.plain(hidden_states)
            return result
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // self._dim
        self._call(
            self._kind, x.data_ptr(), self._address, out.data_ptr(), rows, self._dim,
            self.variance_epsilon,
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class Packing:
    """What `pack` has done. Until it is dropped, both forms of the weights are in memory."""

    replaced: tuple[tuple[nn.Module, str, nn.Module], ...] = ()

    def undo(self) -> None:
        """Put the plain layers back."""
        for parent, name, layer in self.replaced:
            setattr(parent, name, layer)


def pack(module: nn.Module) -> Packing:
    """Replace what has a faster form in a model on the CPU, where that works."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[nn.Module, nn.Module | None] = {}
    library = native_library()
    with torch.inference_mode():
        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):
                if child is None or (child in made and made[child] is None):
                    continue
                if child not in made:
                    made[child] = _faster(child, library)
                faster = made[child]
                if faster is not None:
                    setattr(parent, name, faster)
                    replaced.append((parent, name, child))
    return Packing(tuple(replaced))


def _faster(layer: nn.Module, library: ctypes.CDLL | None) -> nn.Module | None:
    """A faster form that computes the same, if there is one."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    # A subclass may compute otherwise, a hook may look at the call.
    if weight.dtype not in _DTYPES or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    try:
        if type(layer) is nn.Linear:
            return _checked(layer, PackedLinear(layer), layer.in_features)
        epsilon = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        if library is None or not type(layer).__name__.endswith("RMSNorm") or weight.dim() != 1:
            return None
        if not isinstance(epsilon, float) or not weight.is_contiguous():
            return None
        return _checked(layer, NativeRmsNorm(layer, epsilon, library), weight.shape[0])
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        log.info("a %s stays as it is: %s", type(layer).__name__, error)
        return None


def _checked(layer: nn.Module, faster: nn.Module, width: int) -> nn.Module:
    """`faster`, seen to give the same for two rows. Raises RuntimeError otherwise."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    rows = torch.linspace(-1, 3, 2 * width, dtype=weight.dtype).view(1, 2, width)
    expected, found = layer(rows), faster(rows)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise RuntimeError("its faster form gives something else")
    spread = expected.float().square().mean().sqrt()
    error = (found.float() - expected.float()).square().mean().sqrt()
    if not error <= _TOLERANCE[weight.dtype] * spread:  # also if NaN
        raise RuntimeError("its faster form computes something else")
    return faster
