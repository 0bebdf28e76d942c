"""Which attention backend a device gets."""

import torch

from engine.attention.base import AttentionBackend
from engine.attention.cpu import SdpaBackend
from engine.attention.cuda import FlashInferBackend, flashinfer_fits
from engine.attention.native import NativeBackend
from engine.attention.native_build import native_library


def select_backend(
    device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 0
) -> AttentionBackend:
    """FlashInfer where it is installed and has kernels for the model; our own on CPUs with a
    compiler; else plain torch.
    """
    if device.type == "cuda" and flashinfer_fits(dtype, head_dim):
        return FlashInferBackend(device)
    library = native_library() if device.type == "cpu" else None
    return SdpaBackend() if library is None else NativeBackend(library)
