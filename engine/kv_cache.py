"""The paged KV cache: one contiguous tensor in which a block is one contiguous region.

    [ block 0                                               | block 1 ... ]
      head 0                                    | head 1 ...
      layer 0         | layer 1         | ...
      keys  | values  | keys  | values

So a block of all layers is moved by one descriptor, and a run of neighbouring blocks too; and of
a worker with other tensor-parallel ranks, the heads that one of its ranks holds (decision 009).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KvSpec:
    """The shape of a cache's blocks. `block_size` is in tokens."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, all layers, keys and values."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize

    def blocks_in(self, memory_bytes: int) -> int:
        """How many blocks fit into `memory_bytes`."""
        return memory_bytes // self.bytes_per_block


class KvCache:
    """Owns the tensor `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`.

    It knows bytes, not owners: who may write which block is the pool's business. Everything
    starts at zero.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.tensor = torch.zeros(
            (
                num_blocks,
                spec.num_kv_heads,
                spec.num_layers,
                2,
                spec.block_size,
                spec.head_dim,
            ),
            dtype=spec.dtype,
            device=device,
        )
        # A row is one token's key (or value) of one head and layer; a panel is one block's.
        # Narrowing by the layer lets the row and panel numbers of layer 0 serve every layer.
        rows = self.tensor.view(-1, spec.head_dim)
        panels = self.tensor.view(-1, spec.block_size * spec.head_dim)
        self._rows = [rows[index * spec.block_size :] for index in range(2 * spec.num_layers)]
        self._panels = [panels[index:] for index in range(2 * spec.num_layers)]
        heads = torch.arange(spec.num_kv_heads, device=device)
        self._head_rows = heads * 2 * spec.num_layers * spec.block_size
        self._head_panels = heads[:, None] * 2 * spec.num_layers
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None  # rows of tokens, of heads

    @property
    def base_address(self) -> int:
        """Address of block 0; block b begins `b * bytes_per_block` after it."""
        return self.tensor.data_ptr()

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, all layers, keys and values."""
        return self.spec.bytes_per_block

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.spec.bytes_per_block

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.spec.block_size

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return self.spec.num_layers

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self.tensor.device

    @property
    def panels_per_block(self) -> int:
        """Distance, in panels, between the same head and layer's keys of neighbouring blocks."""
        return 2 * self.spec.num_layers * self.spec.num_kv_heads

    @property
    def rows_per_block(self) -> int:
        """Distance, in rows, between the same head and layer's keys of neighbouring blocks."""
        return self.panels_per_block * self.spec.block_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views on a layer's keys and values, each [num_blocks, kv_heads, block_size, head_dim]."""
        return self.tensor[:, :, index, 0], self.tensor[:, :, index, 1]

    @property
    def elements_per_block(self) -> int:
        """Distance, in elements, between the same place of neighbouring blocks."""
        return int(self.tensor.stride(0))

    @property
    def elements_per_head(self) -> int:
        """Distance, in elements, between the same place of neighbouring heads of a block."""
        return int(self.tensor.stride(1))

    def layer_addresses(self, index: int) -> tuple[int, int]:
        """Where a layer's keys and values of block 0 begin, in this process's memory."""
        panel = self.tensor.stride(3) * self.tensor.element_size()
        keys = self.tensor.data_ptr() + 2 * index * panel
        return keys, keys + panel

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new tokens.

        Args:
            layer: index of the layer.
            rows: [tokens] int64, `block * rows_per_block + offset in block`; not to be changed
                between the layers of a step.
            key: [tokens, num_kv_heads, head_dim].
            value: likewise.
        """
        if self._written is None or self._written[0] is not rows:
            self._written = rows, (rows[:, None] + self._head_rows).view(-1)
        places = self._written[1]
        flat, dtype = (-1, self.spec.head_dim), self.spec.dtype
        self._rows[2 * layer].index_copy_(0, places, key.reshape(flat).to(dtype))
        self._rows[2 * layer + 1].index_copy_(0, places, value.reshape(flat).to(dtype))

    def gather(self, layer: int, panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of whole blocks.

        Args:
            layer: index of the layer.
            panels: [blocks] int64, `block * panels_per_block`.

        Returns:
            Keys and values, each [blocks * block_size, num_kv_heads, head_dim], head by head in
            memory.
        """
        of_heads = (panels + self._head_panels).view(-1)
        shape = (self.spec.num_kv_heads, -1, self.spec.head_dim)
        key = self._panels[2 * layer].index_select(0, of_heads)
        value = self._panels[2 * layer + 1].index_select(0, of_heads)
        return key.view(shape).transpose(0, 1), value.view(shape).transpose(0, 1)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target), as if all at once: every source is read first."""
        if not pairs:
            return
        sources = torch.tensor([pair[0] for pair in pairs], device=self.device)
        targets = torch.tensor([pair[1] for pair in pairs], device=self.device)
        self.tensor.index_copy_(0, targets, self.tensor.index_select(0, sources))
