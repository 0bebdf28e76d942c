"""The process below the reaper that starts Ray, Serve and the application on this machine.

Run as `python -m cluster.local_driver FOLDER REPORT_FD`. It says how far it is on REPORT_FD, and
ends at SIGTERM. Whatever it leaves behind the reaper ends.
"""

import contextlib
import http.client
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.launch_plan import Report, read_plan
from cluster.ray_settings import InnerPorts, local_environment
from cluster.reaper import die_with_parent
from cluster.resolve import ResolvedCluster
from contracts.errors import ServingError

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 100 << 20  # Ray's own needs; no request data passes it
_POLL_S = 0.1
_STATUS_EVERY_S = 1.0
_SHUTDOWN_S = 6.0


class StartFailed(Exception):
    """The application did not come up; the message is for the user."""


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM; 0 after that, 1 if the start failed."""
    args = sys.argv[1:] if argv is None else argv
    folder, report_fd = Path(args[0]), int(args[1])
    os.set_inheritable(report_fd, False)
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    def report(kind: str, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(report_fd, Report.now(kind, text).encode())

    # Until it serves there is nothing to end well: the reaper does all.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        _start(read_plan(folder), folder, report)
    except (StartFailed, ServingError) as error:
        report("error", str(error))
        return 1
    except Exception as error:
        logger.exception("the start failed")
        report("error", f"{type(error).__name__}: {_last_line(str(error))}")
        return 1
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    report("ready", "")
    stop.wait()
    _shut_down()
    return 0


def _start(cluster: ResolvedCluster, folder: Path, report: Callable[[str, str], None]) -> None:
    settings = cluster.settings
    cores = len(os.sched_getaffinity(0))
    for name in ("RAY_ADDRESS", "RAY_NAMESPACE"):  # may lead to a cluster of somebody else
        os.environ.pop(name, None)
    os.environ.update(local_environment(folder, InnerPorts.choose(), cores))
    report("stage", "importing Ray")
    import ray

    # ray.init mostly waits for other processes.
    importing = threading.Thread(target=_import_serve, daemon=True)
    importing.start()
    report("stage", "starting Ray")
    gpus = {"num_gpus": 0} if cluster.worker_gpus == 0 else {}
    ray.init(
        address="local",
        include_dashboard=False,
        namespace=settings.app_name,
        num_cpus=max(cores, 4),
        object_store_memory=_OBJECT_STORE_BYTES,
        configure_logging=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder / "ray"),
        **gpus,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # Ray has put in its own
    importing.join()
    from ray import serve

    from cluster.registry import registry_handle
    from cluster.serve_app import application

    registry = registry_handle(settings.app_name)
    report("stage", "starting the ingress")
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ingress = _Ingress(
        proxy_location="HeadOnly",
        http_options={"host": settings.host, "port": settings.port},
        logging_config=quiet,
    )
    ingress.wait_for_controller()
    report("stage", "starting router and workers")
    target = serve.RunTarget(
        application(cluster), settings.app_name, route_prefix="/", logging_config=quiet
    )
    serve.run_many([target], wait_for_applications_running=False)
    _wait_until_healthy(cluster, registry, ingress, report)


class _Ingress:
    """`serve.start` in a thread: the workers start while HAProxy does (saves 2 s)."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        from ray import serve

        try:
            serve.start(**self._options)
        except Exception as error:
            logger.exception("the ingress failed")
            self._error = error

    def wait_for_controller(self) -> None:
        """Until Serve takes applications; `check` raises if it never will."""
        import ray
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        while self._thread.is_alive():
            with contextlib.suppress(ValueError):
                ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
                return
            time.sleep(0.05)
        self.check()

    def check(self) -> None:
        """Raises StartFailed if HAProxy could not start."""
        if self._error is not None:
            raise StartFailed(f"the ingress cannot start: {_last_line(str(self._error))}")


def _import_serve() -> None:
    import cluster.serve_app  # noqa: F401


def _wait_until_healthy(
    cluster: ResolvedCluster,
    registry: Any,
    ingress: _Ingress,
    report: Callable[[str, str], None],
) -> None:
    """Until /health says yes and all workers are there.

    Raises:
        StartFailed: a worker or the router gave up.
    """
    import ray
    from ray import serve

    expected = cluster.prefill + cluster.decode
    host = cluster.settings.host
    probe = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    status_at = time.monotonic()
    seen = -1
    while True:
        ingress.check()
        listing = ray.get(registry.watch.remote(0, 0, 0.0))
        failures: list[tuple[str, str, str]] = ray.get(registry.failures.remote())
        if failures:
            who, kind, message = failures[0]
            raise StartFailed(f"the {who} cannot start: {kind}: {message}")
        present = len(listing["workers"])
        if present != seen:
            seen = present
            report("stage", f"loading the model: {present} of {expected} workers done")
        if present >= expected and _healthy(probe, cluster.settings.port):
            return
        if time.monotonic() - status_at > _STATUS_EVERY_S:
            status_at = time.monotonic()
            app = serve.status().applications.get(cluster.settings.app_name)
            if app is not None and app.status == "DEPLOY_FAILED":
                raise StartFailed(f"the application cannot start: {_last_line(app.message)}")
        time.sleep(_POLL_S)


def _healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _shut_down() -> None:
    """Let workers and router end well, as long as that takes no more than some seconds."""
    from ray import serve

    ending = threading.Thread(target=serve.shutdown, daemon=True)
    ending.start()
    ending.join(_SHUTDOWN_S)


def _last_line(text: str) -> str:
    """The last line of a message or traceback: the one that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's own exit takes seconds and aborts; the reaper ends the rest
