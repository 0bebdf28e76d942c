"""A service for followers: it tells once what it was given, then echoes."""

import json
import socket
from dataclasses import asdict

from contracts.memory import KvMemory


def serve(end: socket.socket, memory: KvMemory, rank: int) -> None:
    with end:
        end.sendall(json.dumps([rank, asdict(memory)]).encode() + b"\n")
        while data := end.recv(1000):
            end.sendall(data)
