"""The systems that `benchmarks.versus` can start by name, and those given as URL or command."""

import json
import secrets
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.peers.process import Part, System, free_port

SERVED_NAME = "versus"


class UnknownSystem(Exception):
    """A `--system` that names nothing we can start."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all systems are given alike, and what only some need.

    `kv_gib` is the KV cache of each worker, in GiB; `pd_threads` the threads of each of two
    workers that share the machine (one worker alone takes what its engine takes).
    """

    model: Path
    cores: int
    kv_gib: int = 1
    pd_threads: int = 1
    max_model_len: int = 2048
    vllm_bin: Path | None = None
    vllm_env: dict[str, str] = field(default_factory=dict[str, str])
    vllm_args: tuple[str, ...] = ()
    baton_worker_args: tuple[str, ...] = ()
    transformers_env: dict[str, str] = field(default_factory=dict[str, str])
    transformers_args: tuple[str, ...] = ()


def make_system(text: str, setup: Setup) -> System:
    """From `NAME` (one of KNOWN), `NAME=URL`, or `NAME=COMMAND` with {model} and {port} in it.

    Raises:
        UnknownSystem: one line that says what is wrong.
    """
    name, given, rest = text.partition("=")
    if not name:
        raise UnknownSystem(f"a system needs a name: {text!r}")
    if not given:
        if name not in KNOWN:
            raise UnknownSystem(f"{name!r} is not one of {', '.join(KNOWN)}; or write NAME=URL")
        return KNOWN[name](setup)
    if rest.startswith(("http://", "https://")):
        return System(name, rest.rstrip("/"))
    if "{port}" not in rest:
        raise UnknownSystem(f"{name}: a command must hold {{port}} (and {{model}})")
    port = free_port()
    words = [
        word.replace("{port}", str(port)).replace("{model}", str(setup.model))
        for word in shlex.split(rest)
    ]
    url = f"http://127.0.0.1:{port}"
    return System(name, url, (Part(tuple(words), health_url=f"{url}/v1/models"),))


def _baton(setup: Setup, *, split: bool) -> System:
    """Workers and a router as plain processes, without Ray."""
    env = {"BATON_CLUSTER_KEY": secrets.token_hex(16)}
    command = (sys.executable, "-m", "cluster.cli")
    parts: list[Part] = []
    where: list[str] = []
    for role in ("prefill", "decode") if split else ("decode",):
        port = free_port()
        words = [*command, "worker", role, str(setup.model), "--port", str(port)]
        words += ["--kv-memory", f"{setup.kv_gib}GiB", "--max-model-len", str(setup.max_model_len)]
        if split:
            words += ["--num-threads", str(setup.pd_threads)]
        parts.append(Part((*words, *setup.baton_worker_args), env))
        where += [f"--{role}", f"127.0.0.1:{port}"]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    router = (*command, "router", str(setup.model), *where, "--port", str(port))
    router += ("--served-model-name", SERVED_NAME)
    parts.append(Part(router, env, health_url=f"{url}/health"))
    return System("baton-1p1d" if split else "baton-aggregated", url, tuple(parts), SERVED_NAME)


def _vllm_server(setup: Setup, port: int, *more: str, env: dict[str, str]) -> Part:
    if setup.vllm_bin is None:
        raise UnknownSystem("vLLM needs --vllm-bin, the bin folder of its virtual environment")
    command = (
        str(setup.vllm_bin / "python"),
        *("-m", "vllm.entrypoints.cli.main", "serve", str(setup.model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME),
        *("--max-model-len", str(setup.max_model_len), "--dtype", "bfloat16"),
        *setup.vllm_args,
        *more,
    )
    general = {
        "PATH": f"{setup.vllm_bin}:/usr/local/bin:/usr/bin:/bin",
        "VLLM_CPU_KVCACHE_SPACE": str(setup.kv_gib),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return Part(command, {**general, **env, **setup.vllm_env}, f"http://127.0.0.1:{port}/health")


def _vllm_aggregated(setup: Setup) -> System:
    port = free_port()
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.cores - 1}"}
    part = _vllm_server(setup, port, env=env)
    return System("vllm-aggregated", f"http://127.0.0.1:{port}", (part,), SERVED_NAME)


def _vllm_1p1d(setup: Setup) -> System:
    """One P and one D with the NIXL connector, and our small proxy in front."""
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    parts: list[Part] = []
    ports = [free_port(), free_port()]
    for number, port in enumerate(ports):
        first = (number * setup.pd_threads) % setup.cores
        last = min(first + setup.pd_threads, setup.cores) - 1
        env = {
            "VLLM_CPU_OMP_THREADS_BIND": f"{first}-{last}" if last > first else str(first),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        more = ("--kv-transfer-config", json.dumps(connector))
        parts.append(_vllm_server(setup, port, *more, env=env))
    front = free_port()
    url = f"http://127.0.0.1:{front}"
    proxy = (
        *(sys.executable, "-m", "benchmarks.peers.proxy", "--port", str(front)),
        *("--prefill", f"http://127.0.0.1:{ports[0]}"),
        *("--decode", f"http://127.0.0.1:{ports[1]}"),
    )
    parts.append(Part(proxy, health_url=f"{url}/health"))
    return System("vllm-1p1d", url, tuple(parts), SERVED_NAME)


def _transformers_cb(setup: Setup) -> System:
    """`transformers serve` with continuous batching, from this environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    share = min(0.9, (setup.kv_gib << 30) / psutil.virtual_memory().total)
    command = (
        str(Path(sys.executable).with_name("transformers")),
        *("serve", str(setup.model), "--continuous-batching", "--dtype", "bfloat16"),
        *("--device", "cpu", "--host", "127.0.0.1", "--port", str(port)),
        *("--cb-max-memory-percent", f"{share:.3f}"),
        *setup.transformers_args,
    )
    part = Part(command, {"HF_HUB_OFFLINE": "1", **setup.transformers_env}, f"{url}/health")
    return System("transformers-cb", url, (part,), str(setup.model), strict=True)


KNOWN: dict[str, Callable[[Setup], System]] = {
    "baton-aggregated": lambda setup: _baton(setup, split=False),
    "baton-1p1d": lambda setup: _baton(setup, split=True),
    "vllm-aggregated": _vllm_aggregated,
    "vllm-1p1d": _vllm_1p1d,
    "transformers-cb": _transformers_cb,
}
