"""What this machine has: cores, memory, GPUs. Found without importing torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_QUERY = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores usable by this process, free memory in bytes, free memory of each GPU in bytes.

    `gpus` is 0 without a usable GPU; `gpu_free_bytes` is None if the driver does not tell.
    `multiplies_bfloat16`: its CPU has instructions for that.
    """

    cores: int
    free_bytes: int
    gpus: int = 0
    gpu_free_bytes: int | None = None
    multiplies_bfloat16: bool = False


def inspect_machine() -> Machine:
    """Look at this machine (tens of milliseconds; with a GPU, the time of nvidia-smi)."""
    gpus, gpu_free_bytes = _gpus()
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        free_bytes=_free_bytes(),
        gpus=gpus,
        gpu_free_bytes=gpu_free_bytes,
        multiplies_bfloat16=_multiplies_bfloat16(),
    )


def _multiplies_bfloat16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _free_bytes() -> int:
    """What new processes can take: the system's, or the container's if that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):  # no limit ("max"), or no cgroup v2
        pass
    return max(free, 0)


def _gpus() -> tuple[int, int | None]:
    """Number of NVIDIA GPUs that this process may use, and the least free memory of them."""
    if not Path("/dev/nvidiactl").exists():
        return 0, None
    free_mib: list[int] = []
    if shutil.which(_QUERY[0]):
        try:
            answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True)
            free_mib = [int(line) for line in answer.stdout.split()]
        except (OSError, ValueError, subprocess.SubprocessError):
            free_mib = []
    present = len(free_mib) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [part.strip() for part in visible.split(",") if part.strip()]
        present = min(present, len([part for part in named if part != "-1"]))
        if all(part.isdigit() and int(part) < len(free_mib) for part in named):
            free_mib = [free_mib[int(part)] for part in named]
    if not present:
        return 0, None
    return present, (min(free_mib) << 20 if free_mib else None)
