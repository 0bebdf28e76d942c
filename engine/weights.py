"""Model folders and the fingerprint of their weights."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from contracts.errors import ConfigurationError

_WHOLE_BYTES = 64 << 20  # up to this total, every byte is hashed
_SAMPLE_BYTES = 4096
_SAMPLES = 1024  # for a file whose tensors are not known
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def model_folder(path: str) -> Path:
    """The local folder of `path`: a folder, or a hub id whose snapshot is fetched if need be.

    Raises:
        ConfigurationError: neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = Path(snapshot_download(path, allow_patterns=patterns))
        if not weight_files(found):
            found = Path(snapshot_download(path, allow_patterns=[*patterns, "*.bin"]))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no model at {path!r}: {error}") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, by name: safetensors, or of the first other kind."""
    for pattern in _PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def weights_digest(folder: Path, *, whole_bytes: int = _WHOLE_BYTES) -> str:
    """Hex SHA-256 fingerprint of a model folder's configuration and weights.

    Up to `whole_bytes` of weights count wholly. Beyond that, the tables of contents, the sizes,
    and the first, middle and last 4 KiB of every tensor do: any training step touches those,
    while a change of single rows in the midst of one tensor may go unnoticed.

    Raises:
        ConfigurationError: the folder has no weight files.
    """
    files = weight_files(folder)
    if not files:
        raise ConfigurationError(f"no weight files in {folder}")
    digest = hashlib.sha256()
    configuration = json.loads((folder / "config.json").read_text())
    digest.update(json.dumps(configuration, sort_keys=True).encode())
    whole = sum(file.stat().st_size for file in files) <= whole_bytes
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if whole:
                digest.update(stream.read())
                continue
            for begin, length in _samples(file, size):
                stream.seek(begin)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _samples(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is hashed of a big file."""
    if file.suffix != ".safetensors":
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        for begin in [*range(0, size, step), max(0, size - _SAMPLE_BYTES)]:
            yield begin, _SAMPLE_BYTES
        return
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
    yield 0, 8 + header_bytes
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
        for begin in (first, (first + last) // 2, max(first, last - _SAMPLE_BYTES)):
            yield begin, min(_SAMPLE_BYTES, last - begin)
