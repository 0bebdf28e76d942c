import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ports import check_port, free_ports, is_free
from cluster.ray_settings import InnerPorts, local_environment
from contracts.errors import ConfigurationError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_refused_and_its_holder_named(taken: int) -> None:
    message = rf"port {taken} on 127\.0\.0\.1 is in use by .* \(pid {os.getpid()}\); choose another"
    with pytest.raises(ConfigurationError, match=message):
        check_port("127.0.0.1", taken)
    assert not is_free("127.0.0.1", taken)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.77:8000"):
        check_port("192.0.2.77", 8000)


def test_free_ports_are_neighbours_and_free() -> None:
    ports = free_ports(5)
    assert ports == list(range(ports[0], ports[0] + 5))
    assert all(is_free("127.0.0.1", port) for port in ports)


def test_a_local_cluster_has_ports_and_files_of_its_own(tmp_path: Path) -> None:
    ports = InnerPorts.choose()
    environment = local_environment(tmp_path, ports, cores=2)
    numbers = {int(value) for name, value in environment.items() if name.endswith("_PORT")}
    assert len(numbers) == 6  # stats, metrics, two fallbacks, first and last replica
    files = [value for value in environment.values() if value.startswith("/")]
    assert len(files) == 6
    assert all(Path(value).is_relative_to(tmp_path) for value in files)


def test_haproxy_opens_nothing_to_other_machines_but_the_front(tmp_path: Path) -> None:
    environment = local_environment(tmp_path, InnerPorts.choose(), cores=2)
    wrapper = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    config = tmp_path / "h" / "haproxy.cfg"
    config.write_text(
        "defaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
        "frontend prometheus\n    bind :9101\n    mode http\n"
        "frontend http_frontend\n    bind 0.0.0.0:8000\n"
        "listen stats\n  bind *:8404\n",
        encoding="utf-8",
    )
    subprocess.run([wrapper, "-c", "-f", str(config)], check=True, capture_output=True)
    binds = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert binds == ["bind 127.0.0.1:9101", "bind 0.0.0.0:8000", "bind 127.0.0.1:8404"]
