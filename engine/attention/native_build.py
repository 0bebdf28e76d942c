"""Compiles the CPU kernels for this machine, once, and loads them. Without a compiler: none.

The library lies in `$XDG_CACHE_HOME/baton/native` (by default under ~/.cache), named by its source,
its flags, the compiler and the CPU: a home that several kinds of machines share is no problem.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("native.h")
_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("native.cpp", "decoder.cpp", "draw.cpp")
)
_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-pthread", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi",
)  # fmt: skip
_COMPILE_S = 120.0
_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason in the log, where they cannot be had.

    `BATON_NATIVE=0` in the environment switches them off.
    """
    if os.environ.get("BATON_NATIVE", "1") == "0":
        log.info("native attention is switched off by BATON_NATIVE=0")
        return None
    try:
        return _declare(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("attention runs on torch alone, which is slower on CPUs: %s", _told(error))
        return None


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr or "").strip().splitlines()
        return f"the compiler failed: {lines[0] if lines else error}"
    return str(error)


def _compiled() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise OSError("no C++ compiler (install g++, or set CXX)")
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in (_HEADER, *_SOURCES)))
    key.update("\0".join((*_FLAGS, _version(compiler), _cpu())).encode())
    folder = _folder()
    library = folder / f"attention-{key.hexdigest()[:24]}.so"
    if library.is_file():
        return library
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        _run(compiler, *_FLAGS, "-o", name, *map(str, _SOURCES))
        Path(name).replace(library)  # whole or not at all, whoever else compiles it now
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "baton" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="baton-native-"))


def _version(compiler: str) -> str:
    return f"{compiler} {_run(compiler, '--version').splitlines()[0]}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in kinds}))


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
    return done.stdout


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.baton_can_prefill.argtypes = [_I]
    library.baton_can_prefill.restype = _N
    library.baton_rms_norm.argtypes = [_N, _P, _P, _P, _I, _I, _F]
    library.baton_rms_norm.restype = None
    library.baton_decode.argtypes = [
        _N, _P, _P, _P, _P, _I, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _I, _I, _F, _N,
    ]  # fmt: skip
    library.baton_decode.restype = None
    library.baton_prefill.argtypes = [
        _P, _P, _P, _P, _I, _P, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _F, _N,
    ]  # fmt: skip
    library.baton_prefill.restype = None
    library.baton_write.argtypes = [_P, _P, _P, _P, _P, *[_I] * 8]
    library.baton_write.restype = None
    library.baton_draw.argtypes = [_P, _I, _I, _P, _I, _P, _N]
    library.baton_draw.restype = None
    library.baton_decoder_new.argtypes = [_N, _P, _F, _F, _N, _P, _P, _P, _P]
    library.baton_decoder_new.restype = _P
    library.baton_decoder_free.argtypes = [_P]
    library.baton_decoder_free.restype = None
    library.baton_decoder_linear.argtypes = [_P, _I, _N, _P, _P, _I, _I, _I]
    library.baton_decoder_linear.restype = None
    library.baton_decoder_turn.argtypes = [_P, _I, _P, _P, _P, _P, _P, _I]
    library.baton_decoder_turn.restype = None
    library.baton_decoder_norm.argtypes = [_P, _I, _N, _P, _P, _P, _I]
    library.baton_decoder_norm.restype = None
    library.baton_decoder_gate.argtypes = [_P, _P, _P, _I]
    library.baton_decoder_gate.restype = None
    library.baton_decoder_seconds.argtypes = [_P, _P, _P]
    library.baton_decoder_seconds.restype = None
    library.baton_linear.argtypes = [_N, _P, _P, _I, _I, _I, _P]
    library.baton_linear.restype = None
    library.baton_decoder_layer.argtypes = [_P, _I, _P, _P, _P, _P, _P, _P, _I]
    library.baton_decoder_layer.restype = None
    library.baton_decoder_step.argtypes = [_P, _I, _P, _P, _P, _P, _I, _P, _P]
    library.baton_decoder_step.restype = None
    return library
