"""The run as a picture: one panel for each of memory, descriptors, threads, blocks, requests/s."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.soak.record import STATES, Record, Sample

_MIB = 1 << 20
_RATE_S = 10.0  # requests/s are averages over at least that


def draw(record: Record, to: Path) -> None:
    """Write soak.png and soak.svg into the folder."""
    figure = Figure(figsize=(11, 17), layout="constrained")
    panels = figure.subplots(5, 1, sharex=True)
    _memory(panels[0], record)
    _lines(panels[1], record, "open file descriptors", lambda s: s.usage.fds)
    _lines(panels[2], record, "threads", lambda s: s.usage.threads)
    _blocks(panels[3], record)
    _rate(panels[4], record)
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel is not panels[0]:
            panel.set_ylim(bottom=0)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    panels[-1].set_xlabel("minutes")
    figure.savefig(to / "soak.png", dpi=110)
    figure.savefig(to / "soak.svg")


def _minutes(samples: list[Sample]) -> list[float]:
    return [sample.elapsed_s / 60 for sample in samples]


def _memory(panel: Axes, record: Record) -> None:
    """Growth shows only beside a line's own start: workers are ten times the router's size."""
    panel.set_title(
        "RSS since the first idle point, MiB (dots: idle)", loc="left", fontsize="medium"
    )
    for process in _present(record):
        idle = record.of(process, idle=True)
        if not idle:
            continue
        start = idle[0].usage.rss

        def more(sample: Sample, start: int = start) -> float:
            return (sample.usage.rss - start) / _MIB

        begin_s = idle[0].elapsed_s
        _line(panel, record, process, more, f"{process} ({start / _MIB:.0f} MiB +)", begin_s)


def _lines(panel: Axes, record: Record, title: str, value: Callable[[Sample], float]) -> None:
    panel.set_title(f"{title} (dots: idle)", loc="left", fontsize="medium")
    for process in _present(record):
        _line(panel, record, process, value, process)


def _present(record: Record) -> list[str]:
    return [p for p in record.processes if any(s.usage.processes for s in record.of(p, idle=False))]


def _line(
    panel: Axes,
    record: Record,
    process: str,
    value: Callable[[Sample], float],
    label: str,
    begin_s: float = 0.0,
) -> None:
    """A line for all samples from `begin_s`, a dot at each idle point."""
    samples = [s for s in record.of(process, idle=False) if s.elapsed_s >= begin_s]
    idle = record.of(process, idle=True)
    (line,) = panel.plot(_minutes(samples), [value(s) for s in samples], label=label)
    values = [value(sample) for sample in idle]
    panel.plot(_minutes(idle), values, "o", markersize=4, color=line.get_color())


def _blocks(panel: Axes, record: Record) -> None:
    panel.set_title("KV blocks by state (dashed: decode)", loc="left", fontsize="medium")
    for process, style in (("prefill", "-"), ("decode", "--")):
        samples = [s for s in record.of(process, idle=False) if s.worker is not None]
        for number, state in enumerate(STATES):
            counts = [s.worker.blocks[state] for s in samples if s.worker is not None]
            label = state if style == "-" else None
            panel.plot(_minutes(samples), counts, style, color=f"C{number}", label=label)


def _rate(panel: Axes, record: Record) -> None:
    panel.set_title("requests/s (pauses for idle points included)", loc="left", fontsize="medium")
    times, rates = list[float](), list[float]()
    samples = record.of("router", idle=False)
    last = samples[0] if samples else None
    for sample in samples:
        if last is not None and sample.elapsed_s - last.elapsed_s >= _RATE_S:
            span_s = sample.elapsed_s - last.elapsed_s
            times.append(sample.elapsed_s / 60)
            rates.append((sample.done - last.done) / span_s)
            last = sample
    panel.plot(times, rates, color="black")
