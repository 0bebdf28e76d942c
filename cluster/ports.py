"""Free TCP ports, and who holds a taken one."""

import errno
import random
import socket
from contextlib import closing, suppress

from contracts.errors import ConfigurationError

# Below 32768, where Linux begins to hand ports out by itself.
_SEARCH = range(20_000, 32_000)
_TRIES = 200


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. A port in TIME_WAIT counts as free."""
    return _bind_error(host, port) is None


def check_port(host: str, port: int) -> None:
    """Make sure that a server can listen on host:port.

    Raises:
        ConfigurationError: it cannot; the message names the holder if that can be known.
    """
    error = _bind_error(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        raise ConfigurationError(
            f"port {port} on {host} is in use{_held_by(port)}; choose another with --port"
        )
    reason = error.strerror or str(error)
    raise ConfigurationError(f"cannot listen on {host}:{port}: {reason}")


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` neighbouring ports, all free now.

    The place is random, so that several clusters that start at once rarely meet.

    Raises:
        ConfigurationError: there is no such range.
    """
    for _ in range(_TRIES):
        first = random.randrange(_SEARCH.start, _SEARCH.stop - count)
        block = list(range(first, first + count))
        if all(is_free(host, port) for port in block):
            return block
    raise ConfigurationError(f"no {count} neighbouring free ports in {_SEARCH.start} to 32000")


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _held_by(port: int) -> str:
    """` by NAME (pid N)`, or nothing if the system does not tell."""
    import psutil  # 20 ms; needed only when something is wrong

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            listening = connection.status == psutil.CONN_LISTEN
            if listening and connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
