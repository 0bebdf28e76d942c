"""`baton serve`: a whole cluster on this machine, gone without trace when the command ends.

    baton serve ── pipe ──> reaper ──> driver ──> Ray, Serve, HAProxy, router, workers

This process shows progress and waits. It holds the write end of the reaper's pipe, so however
it ends, kill -9 included, the reaper ends all the others.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.launch_plan import Report, write_plan
from cluster.machine import inspect_machine
from cluster.ports import check_port, free_ports
from cluster.progress import Progress
from cluster.reaper import become_subreaper, end_descendants
from cluster.resolve import ResolvedCluster, gib, resolve
from cluster.settings import ClusterSettings

GRACE_S = 10.0
_TICK_S = 0.1
_LONGEST_TMP = 16  # characters; HAProxy's sockets lie 80 deeper, and may not pass 97


def serve(settings: ClusterSettings, *, timings: bool = False) -> int:
    """Start, print where it is, wait for Ctrl-C or SIGTERM, end everything.

    Returns the command's exit code: 0 (SIGTERM), 130 (Ctrl-C), 1 (it could not start, or died).

    Raises:
        ConfigurationError: a setting cannot work; nothing has been started.
    """
    progress = Progress(time.monotonic())
    progress.stage("checking", time.monotonic())
    if settings.port == 0:
        settings = settings.model_copy(update={"port": free_ports(1, settings.host)[0]})
    check_port(settings.host, settings.port)
    cluster = resolve(settings, inspect_machine(), local=True)
    folder = _make_folder()
    try:
        write_plan(folder, cluster)
        return _Launcher(cluster, folder, progress, timings=timings).run()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Launcher:
    def __init__(
        self, cluster: ResolvedCluster, folder: Path, progress: Progress, *, timings: bool
    ) -> None:
        self._cluster = cluster
        self._folder = folder
        self._progress = progress
        self._timings = timings
        self._stops: list[int] = []  # signals received

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, frame: self._stops.append(received))
        become_subreaper()  # of the reaper's orphans, should it be killed
        pipe_read, pipe_write = os.pipe()
        reports, reports_write = os.pipe()
        try:
            with (self._folder / "driver.log").open("wb") as log:
                reaper = subprocess.Popen(
                    self._command(pipe_read, reports_write),
                    pass_fds=(pipe_read, reports_write),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=_environment(),
                )
        finally:
            os.close(pipe_read)
            os.close(reports_write)
        try:
            return self._follow(reaper, reports, pipe_write)
        finally:
            os.close(pipe_write)
            os.close(reports)

    def _command(self, pipe_read: int, reports_write: int) -> list[str]:
        folder = str(self._folder)
        reaper = [sys.executable, "-m", "cluster.reaper", str(pipe_read), str(GRACE_S)]
        driver = [sys.executable, "-m", "cluster.local_driver", folder, str(reports_write)]
        return [*reaper, "--remove", folder, "--", *driver]

    def _follow(self, reaper: "subprocess.Popen[bytes]", reports: int, pipe_write: int) -> int:
        failed = False
        handled = 0
        for report in self._reports(reports):
            while handled < len(self._stops):
                handled += 1
                if handled == 1:
                    self._say("stopping (again: at once)")
                    reaper.terminate()
                else:
                    os.write(pipe_write, b"k")
            if report is None:
                self._progress.tick()
            elif report.kind == "stage":
                self._progress.stage(report.text, report.at)
            elif report.kind == "ready":
                self._ready(report)
            else:
                failed = True
                self._say(f"baton: error: {report.text}")
        code = reaper.wait()
        end_descendants()  # none, unless somebody killed the reaper
        if self._stops and not failed:
            shutil.rmtree(self._folder, ignore_errors=True)
            return 130 if self._stops[0] == signal.SIGINT else 0
        if not failed:
            self._say(f"baton: error: the cluster ended unexpectedly (code {code})")
        self._say(f"baton: logs are in {self._folder}")
        return 1

    def _reports(self, descriptor: int) -> Iterator[Report | None]:
        """The driver's reports, and None several times a second, until all have ended."""
        buffer = b""
        while True:
            if not select.select([descriptor], [], [], _TICK_S)[0]:
                yield None
                continue
            data = os.read(descriptor, 65536)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                yield Report.decode(line)

    def _ready(self, report: Report) -> None:
        if self._stops:
            return
        self._progress.clear()
        if self._timings:
            self._progress.timings(report.at)
        cluster, settings = self._cluster, self._cluster.settings
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        url = f"http://{host}:{settings.port}"
        pools = f"{cluster.decode} worker(s), aggregated"
        if cluster.prefill:
            pools = f"{cluster.prefill} prefill + {cluster.decode} decode"
        seconds = report.at - self._progress.started_at
        print(
            f"baton ready url={url} model={cluster.served_model_name} ({pools} on {cluster.device},"
            f" {cluster.dtype}, {gib(cluster.kv_memory_bytes)} KV cache each, {seconds:.1f} s)"
        )
        key = " -H 'Authorization: Bearer YOUR_KEY'" if cluster.front.api_keys else ""
        print(
            f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d"
            f' \'{{"model": "{cluster.served_model_name}", "stream": true, "max_tokens": 32,'
            ' "messages": [{"role": "user", "content": "Hello!"}]}\'',
            flush=True,
        )

    def _say(self, text: str) -> None:
        self._progress.clear()
        print(text, file=sys.stderr, flush=True)


def _make_folder() -> Path:
    """A private folder for this cluster's files, at a short path."""
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="baton-", dir=base if len(base) <= _LONGEST_TMP else "/tmp")
    )


def _environment() -> dict[str, str]:
    """Ours, with this tree importable by everything below; no setting travels this way."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")}
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment
