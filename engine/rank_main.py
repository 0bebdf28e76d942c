"""A follower: a process with one rank's share of the model, which computes what rank 0 tells it.

It ends when rank 0's end of the socket pair is closed, with its parent in any case, and of itself
when a step fails: rank 0 sees that at once.
"""

import ctypes
import faulthandler
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from contracts.errors import EngineFailure, ServingError
from contracts.ids import Incarnation
from contracts.memory import KvMemory
from contracts.worker import Role, WorkerConfig
from engine.rank_build import RankParts, build_rank
from engine.rank_group import RankGroup
from engine.rank_messages import Kind, Link, StepDecoder

PR_SET_PDEATHSIG = 1
log = logging.getLogger(__name__)

RankService = Callable[[socket.socket, KvMemory, int], None]
"""Runs in a thread of a follower beside its steps: (its own socket, the memory, the rank)."""


def main(link_fd: int, service_fd: int) -> None:
    """Serve rank 0 until it closes the link."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1)  # as in cluster/where.py
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=link_fd))
    code = 1
    try:
        follow(link, service_fd)
        code = 0
    except EOFError:
        code = 0
    except EngineFailure as error:  # rank 0 says so, too
        log.info("a follower ends: %s", error)
    except Exception:
        log.exception("a follower fails")
    finally:
        logging.shutdown()
        os._exit(code)  # libraries' threads may be in the midst of something


def follow(link: Link, service_fd: int = -1) -> None:
    """Build this rank, then compute steps.

    Raises:
        EOFError: rank 0 has closed the link.
        Exception: this rank has failed; rank 0 has been told, unless in a step.
    """
    _, content = link.receive()
    setup: dict[str, Any] = json.loads(content)
    if os.getppid() != setup["parent"]:
        raise EOFError
    logging.basicConfig(level=setup["log_level"], format=f"rank {setup['rank']}: %(message)s")

    def meet() -> None:
        link.send(Kind.LOADED)
        link.receive()

    config = WorkerConfig(**{**setup["config"], "role": Role(setup["config"]["role"])})
    group = RankGroup(setup["rank"], config.tensor_parallel_size, Path(setup["folder"]), meet)
    try:
        parts = build_rank(config, Incarnation(setup["incarnation"]), group)
        if setup["service"]:
            _start_service(setup["service"], service_fd, parts.memory, group.rank)
    except EOFError:
        raise
    except ServingError as error:
        link.tell(Kind.FAILED, {"kind": type(error).__name__, "text": str(error)})
        raise EngineFailure(str(error)) from error
    except Exception as error:
        link.tell(Kind.FAILED, {"kind": "EngineFailure", "text": repr(error)})
        raise
    link.tell(Kind.READY, asdict(parts.memory))
    _compute_steps(link, parts, group)


def _compute_steps(link: Link, parts: RankParts, group: RankGroup) -> None:
    decoder = StepDecoder()
    with torch.inference_mode():
        while True:
            _, content = link.receive()
            step = decoder.decode(content)
            parts.words.mirror(step.words)  # before what may write those blocks (F2)
            parts.runner.move(step.moves)
            if step.arrays is not None:
                parts.runner.compute(step.arrays)
            else:
                group.barrier()


def _start_service(name: str, service_fd: int, memory: KvMemory, rank: int) -> None:
    module, _, attribute = name.partition(":")
    service: RankService = getattr(importlib.import_module(module), attribute)
    end = socket.socket(fileno=service_fd)
    threading.Thread(
        target=service, args=(end, memory, rank), name="baton-rank-service", daemon=True
    ).start()
