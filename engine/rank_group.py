"""The ranks of one worker and what they do together: sums, gathered parts, a meeting.

On the CPU this is gloo over loopback, on GPUs NCCL. The process groups are this object's own:
torch's global one is left alone. A wait that takes too long, or for a rank that has died, ends in
an EngineFailure; on a GPU it is the engine's missing pulse that tells.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from contracts.errors import EngineFailure

dist: Any = torch.distributed  # most of what is used here is not in its type stubs
MEET_S = 60.0  # to connect, once all have their weights
BUILD_S = 600.0  # the first steps may compile kernels
STEP_S = 30.0
_LOOPBACK = "127.0.0.1"
_SMALL_BYTES = 64 << 10  # up to here gloo gathers in half the time that it reduces in


class RankGroup:
    """Rank `rank` of `size`. Every method but `close` is called by all ranks, in the same order.

    Args:
        rank: 0 is the worker itself.
        size: tensor_parallel_size.
        folder: where the ranks find each other: private, empty, the same for all.
        meet: returns once all ranks are about to connect; raises if one never will.
    """

    def __init__(self, rank: int, size: int, folder: Path, meet: Callable[[], None]) -> None:
        self.rank = rank
        self.size = size
        self._folder = folder
        self._meet = meet
        self._process_group: Any = None
        self._device = torch.device("cpu")
        self._limit = timedelta(seconds=BUILD_S)

    def connect(self, device: torch.device) -> None:
        """Meet the others; the tensors of all that follows are on `device`.

        Raises:
            EngineFailure: they do not come.
        """
        self._meet()
        self._device = device
        wait = timedelta(seconds=MEET_S)
        try:
            store = dist.FileStore(str(self._folder / "store"), self.size)
            store.set_timeout(wait)
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self._limit
                torch.cuda.set_device(device)
                self._process_group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            else:
                gloo = dist.ProcessGroupGloo._Options()
                gloo._timeout = wait
                gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
                self._process_group = dist.ProcessGroupGloo(store, self.rank, self.size, gloo)
        except RuntimeError as error:
            raise EngineFailure(f"the ranks of this worker do not find each other: {error}") from (
                error
            )

    def built(self) -> None:
        """From now on nothing takes long."""
        self._limit = timedelta(seconds=STEP_S)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same to the bit on each; overwrites `tensor` (contiguous)."""
        if tensor.nbytes <= _SMALL_BYTES and tensor.device.type == "cpu":
            parts = tensor.new_empty((self.size, *tensor.shape))
            self._gather(list(parts), tensor)
            return parts.sum(0)
        options = dist.AllreduceOptions()
        options.timeout = self._limit
        return self._reduce(tensor, options)

    def maximum(self, value: float) -> float:
        """The largest of the ranks' values; NaN if one is."""
        options = dist.AllreduceOptions()
        options.timeout = self._limit
        options.reduceOp = dist.ReduceOp.MAX
        pair = [float("inf") if value != value else value, float(value != value)]
        found = torch.tensor(pair, dtype=torch.float64, device=self._device)
        largest, nan = self._reduce(found, options).tolist()
        return float("nan") if nan else float(largest)

    def barrier(self) -> None:
        """Return when all ranks' devices have done what came before it."""
        self.maximum(0.0)  # reading the result waits for the stream

    def gather_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, equally shaped, side by side in the last dimension."""
        part = tensor.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._gather(parts, part)
        return torch.cat(parts, dim=-1)

    def close(self) -> None:
        """Let go of the others. Idempotent."""
        self._process_group = None

    def _gather(self, parts: list[torch.Tensor], part: torch.Tensor) -> None:
        options = dist.distributed_c10d.AllgatherOptions()
        options.timeout = self._limit
        self._done(lambda group: group.allgather([parts], [part], options))

    def _reduce(self, tensor: torch.Tensor, options: Any) -> torch.Tensor:
        self._done(lambda group: group.allreduce([tensor], options))
        return tensor

    def _done(self, start: Callable[[Any], Any]) -> None:
        assert self._process_group is not None, "the ranks are not connected"
        try:
            start(self._process_group).wait()
        except RuntimeError as error:
            raise EngineFailure(f"a rank of this worker is dead or stuck: {error}") from error
