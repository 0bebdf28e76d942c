"""Steps of common decoders on the CPU without their modules (attention/decoder.cpp).

Most of a small model's decode step is not arithmetic but the calls around it. For models of
Llama's kind, whose layers are known exactly, a step in which every sequence has one token is
one native call. In other steps oneDNN multiplies, the attention backend attends, and what lies
between them takes one call instead of half a dozen. The weights stay where oneDNN packed them.
Whether it computes what the model's own modules do is seen at load, or it is not used.
"""

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.attention.base import AttentionBackend, AttentionLayer, IntArray
from engine.attention.native import padded
from engine.attention.native_build import native_library
from engine.kv_cache import KvCache
from engine.model import LoadedModel
from engine.packed import NativeRmsNorm, PackedLinear

log = logging.getLogger(__name__)

MAX_BATCH = 64  # above that, torch's calls cost little beside the arithmetic
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of a linear layer's output
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TABLE_BYTES = 512 << 20  # of cosines and sines


class NotThisKind(Exception):
    """The model is none that this can compute; the text says why."""


class NativeDecoder:
    """Computes decode steps of one model over one cache. Used by one thread.

    Raises:
        NotThisKind: see there.
    """

    def __init__(self, model: LoadedModel, cache: KvCache, threads: int) -> None:
        library = native_library()
        if library is None:
            raise NotThisKind("there is no native library")
        self._step = library.baton_decoder_step
        self._turn = library.baton_decoder_turn
        self._norm_after = library.baton_decoder_norm
        self._gate = library.baton_decoder_gate
        self._layers = model.layers
        self._linears: list[list[Any]] = []  # of each layer, in the order of _LINEARS
        self._seconds = library.baton_decoder_seconds
        self._free = library.baton_decoder_free
        self._handle: int | None = None
        self._vocab, self._dtype = model.vocab_size, model.dtype
        self._kept: list[torch.Tensor] = []  # whose memory is used
        self._build(library, model, cache, threads)

    def _build(
        self, library: ctypes.CDLL, model: LoadedModel, cache: KvCache, threads: int
    ) -> None:
        module, config, dtype = model.module, model.config, model.dtype
        _check_family(module, model)
        body, head = module.model, module.lm_head
        layers, own = list(body.layers), model.layers
        embedding = body.embed_tokens.weight
        if type(body.embed_tokens) is not nn.Embedding or not _is_plain(embedding, dtype):
            raise NotThisKind("its embedding is not plain")
        cos, sin = self._angles(body.rotary_emb, model, cache)
        self._kept += [cos, sin, embedding, cache.tensor]
        self._embedding, self._head = embedding, head
        mlp = layers[0].mlp.gate_proj.out_features
        sizes = np.asarray(
            [
                len(layers), config.hidden_size, own[0].num_heads, own[0].num_kv_heads,
                own[0].head_dim, mlp, model.vocab_size, MAX_BATCH, cache.block_size,
                cache.elements_per_block, cache.elements_per_head,
            ],
            dtype=np.int64,
        )  # fmt: skip
        norm, epsilon = self._norm(body.norm)
        self._handle = library.baton_decoder_new(
            _KINDS[dtype], sizes.ctypes.data, epsilon, own[0].scaling, threads,
            embedding.data_ptr(), norm, cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        self._linear(library, -1, 0, head, config.hidden_size, model.vocab_size)
        for index, layer in enumerate(layers):
            attention = layer.self_attn
            norms = [
                self._norm(layer.input_layernorm),
                self._norm(layer.post_attention_layernorm),
                *(self._norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm")),
            ]
            if any(own_epsilon not in (epsilon, None) for _, own_epsilon in norms):
                raise NotThisKind("its norms differ in their epsilon")
            keys, values = cache.layer_addresses(index)
            library.baton_decoder_layer(
                self._handle, index, *(address for address, _ in norms), keys, values,
                own[index].window or 0,
            )  # fmt: skip
            shapes = _shapes(own[index], config.hidden_size, mlp)
            linears = [
                getattr(layer.mlp if which > 3 else attention, name)
                for which, name in enumerate(_LINEARS)
            ]
            for which, (linear, shape) in enumerate(zip(linears, shapes, strict=True)):
                self._linear(library, index, which, linear, *shape)
            self._linears.append(linears)

    def _angles(
        self, rotary: Any, model: LoadedModel, cache: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of every position, [positions, head_dim / 2], as the model has them."""
        kind, half = getattr(rotary, "rope_type", None), model.head_dim // 2
        if kind not in _ROPES:
            raise NotThisKind(f"its rotary embedding is of type {kind}")
        length = min(model.max_model_len, cache.num_blocks * cache.block_size)
        if 2 * length * half * model.dtype.itemsize > _TABLE_BYTES:
            raise NotThisKind("its context is too long for a table of angles")
        probe = torch.empty(0, dtype=model.dtype)
        with torch.inference_mode():
            cos, sin = rotary(probe, torch.arange(length)[None])
        for table in (cos, sin):
            if table.shape != (1, length, 2 * half) or table.dtype != model.dtype:
                raise NotThisKind("its rotary embedding turns a part of a head")
            if not torch.equal(table[0, :, :half], table[0, :, half:]):
                raise NotThisKind("its rotary embedding pairs dimensions otherwise")
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _norm(self, norm: Any) -> tuple[int | None, float | None]:
        """Address of its weight and its epsilon; (None, None) if there is none."""
        if norm is None:
            return None, None
        if type(norm) is not NativeRmsNorm:
            raise NotThisKind(f"a {type(norm).__name__} is no norm that is known")
        if not _is_plain(norm.weight, self._dtype):
            raise NotThisKind("a norm's weight is not plain")
        self._kept.append(norm.weight)
        return norm.weight.data_ptr(), norm.variance_epsilon

    def _linear(
        self, library: ctypes.CDLL, layer: int, which: int, linear: Any, size_in: int, size_out: int
    ) -> None:
        if type(linear) is not PackedLinear:
            raise NotThisKind(f"a {type(linear).__name__} is no packed linear layer")
        if (linear.in_features, linear.out_features) != (size_in, size_out):
            raise NotThisKind("a linear layer has another shape than its layer's")
        packed, bias = linear.packed, linear.bias
        if linear.weight.dtype != self._dtype or not (bias is None or _is_plain(bias, self._dtype)):
            raise NotThisKind("a linear layer is of another dtype")
        self._kept += [packed] if bias is None else [packed, bias]
        library.baton_decoder_linear(
            self._handle, layer, which, torch.ops.mkldnn.data_ptr(packed),
            None if bias is None else bias.data_ptr(), size_in, size_out,
            _columns_together(library, linear),
        )  # fmt: skip

    def step(
        self,
        tokens: IntArray,
        positions: IntArray,
        rows: IntArray,
        tables: Sequence[IntArray],
        kv_lens: IntArray,
    ) -> torch.Tensor:
        """One token of each of at most MAX_BATCH sequences.

        Args:
            tokens: [batch] token ids.
            positions: [batch].
            rows: [batch], each token's row in the cache (KvCache.write).
            tables: block ids of each sequence.
            kv_lens: [batch] lengths of the sequences, these tokens included.

        Returns:
            [batch, vocab_size] float32 logits.
        """
        assert self._handle is not None, "the decoder is closed"
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(self._embedding):
            raise IndexError("a token id is none of the model's")
        batch = len(tokens)
        logits = torch.empty((batch, self._vocab))
        table = padded(tables)
        self._step(
            self._handle, batch, tokens.ctypes.data, positions.ctypes.data, rows.ctypes.data,
            table.ctypes.data, table.shape[1], kv_lens.ctypes.data, logits.data_ptr(),
        )  # fmt: skip
        return logits

    def forward(
        self,
        inputs: torch.Tensor,
        keep: torch.Tensor,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        """A step of any kind; `backend` is prepared for it.

        Args:
            inputs: [3, tokens] int64: token ids, positions, rows in the cache (KvCache.write).
            keep: the tokens whose logits are wanted.
            backend: attends to what is in the cache.

        Returns:
            [len(keep), vocab_size] float32 logits.
        """
        assert self._handle is not None, "the decoder is closed"
        tokens, positions, rows = inputs.unbind()
        count = len(tokens)
        x = torch.index_select(self._embedding, 0, tokens)
        a = torch.empty_like(x)
        place, row = positions.data_ptr(), rows.data_ptr()
        y: torch.Tensor | None = None
        for index, (layer, linears) in enumerate(zip(self._layers, self._linears, strict=True)):
            q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = linears
            self._add_norm(index, 0, x, y, a)
            q, k, v = q_proj(a), k_proj(a), v_proj(a)
            self._turn(
                self._handle, index, q.data_ptr(), k.data_ptr(), v.data_ptr(), place, row, count
            )
            heads = (count, -1, layer.head_dim)
            mixed = backend.attend(layer, q.view(heads), k.view(heads), v.view(heads), None)
            self._add_norm(index, 1, x, o_proj(mixed.view(count, -1)), a)
            gate, up = gate_proj(a), up_proj(a)
            self._gate(self._handle, gate.data_ptr(), up.data_ptr(), count)
            y = down_proj(gate)
        self._add_norm(len(self._layers), 0, x, y, a)
        logits: torch.Tensor = self._head(a.index_select(0, keep))
        return logits.float()

    def _add_norm(
        self, layer: int, mlp: int, x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        added = None if y is None else y.data_ptr()
        self._norm_after(self._handle, layer, mlp, x.data_ptr(), added, out.data_ptr(), len(x))

    def seconds(self) -> tuple[float, float]:
        """Seconds spent so far in attention, rotary embedding included, and in linear layers."""
        attention, linear = ctypes.c_double(), ctypes.c_double()
        self._seconds(self._handle, ctypes.byref(attention), ctypes.byref(linear))
        return attention.value, linear.value

    def close(self) -> None:
        """End its threads. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._free(handle)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()


def _columns_together(library: ctypes.CDLL, linear: PackedLinear) -> int:
    """How oneDNN has packed a layer (see decoder.cpp); it depends on the CPU, threads, and sizes.

    Raises:
        NotThisKind: in no way that is known.
    """
    address, num_bytes = (
        getattr(torch.ops.mkldnn, name)(linear.packed) for name in ("data_ptr", "_nbytes")
    )
    dtype, size_in, size_out = linear.weight.dtype, linear.in_features, linear.out_features
    row = torch.linspace(-1, 3, size_in, dtype=dtype)[None]
    with torch.inference_mode():
        expected = linear(row)[0].float()
        if linear.bias is not None:
            expected -= linear.bias.float()
    found = torch.empty(size_out)
    for together in (64, 32):
        if num_bytes != -(-size_out // together) * together * size_in * dtype.itemsize:
            continue
        library.baton_linear(
            _KINDS[dtype], row.data_ptr(), address, size_in, size_out, together, found.data_ptr()
        )
        if (found - expected).norm() <= _TOLERANCE[dtype] * expected.norm():
            return together
    raise NotThisKind("its linear layers are packed in another way")


def _check_family(module: nn.Module, model: LoadedModel) -> None:
    """Raise NotThisKind unless `module` is of a class whose computation is known."""
    name, config = type(module).__name__, model.config
    if name not in [f"{family}ForCausalLM" for family in _FAMILIES]:
        raise NotThisKind(f"{name} is none of the known kinds")
    if not type(module).__module__.startswith("transformers.models."):
        raise NotThisKind(f"{name} is not transformers' own")
    if model.dtype not in _KINDS:
        raise NotThisKind(f"its dtype is {model.dtype}")
    if config.hidden_act != "silu":
        raise NotThisKind(f"its activation is {config.hidden_act}")
    for layer in model.layers:
        if layer.softcap is not None or layer.has_sinks or layer.scaling != model.layers[0].scaling:
            raise NotThisKind("its attention has soft caps, sinks or several scalings")


def _shapes(layer: AttentionLayer, hidden: int, mlp: int) -> list[tuple[int, int]]:
    """(in, out) of a layer's linear layers, in the order of _LINEARS."""
    width, narrow = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    if any(size % 32 for size in (hidden, width, mlp)) or layer.head_dim % 2:
        raise NotThisKind("its sizes are no multiples of 32")
    inner = [(hidden, width), (hidden, narrow), (hidden, narrow), (width, hidden)]
    return [*inner, (hidden, mlp), (hidden, mlp), (mlp, hidden)]
