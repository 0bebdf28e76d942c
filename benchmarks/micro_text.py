"""The micro benchmarks as a person reads them."""

from collections.abc import Sequence

from benchmarks.micro_linear import LinearFigures
from benchmarks.micro_machine import Machine
from benchmarks.micro_profile import Profile
from benchmarks.micro_sampler import SamplerFigures
from benchmarks.micro_scheduler import SchedulerFigures
from benchmarks.micro_steps import StepFigures
from benchmarks.micro_transfer import TransferFigures

_PARTS = ("schedule", "prepare", "attention", "linear", "rest", "sample", "commit", "publish",
          "other")  # fmt: skip


def machine_text(machine: Machine) -> str:
    """The limits."""
    return (
        f"{machine.device}, {machine.dtype}, {machine.threads} threads, torch {machine.torch}\n"
        f"copy of {machine.copy_bytes >> 20} MiB {machine.copy_gb_s:.1f} GB/s (read + written), "
        f"sum {machine.read_gb_s:.1f} GB/s, "
        f"matmul of {machine.matmul_size} squared {machine.matmul_gflop_s:.0f} GFLOP/s"
    )


def steps_text(title: str, figures: Sequence[StepFigures]) -> str:
    """Step times, then their parts; decodes have one token a sequence, prefills one sequence."""
    decode = figures[0].context > 0
    first = f"{'batch':>6}{'context':>8}" if decode else f"{'tokens':>14}"
    lines = [
        f"{title}: % are of the copy limit, of the matmul peak, and of the time by the roofline",
        f"{first}{'step ms':>10}{'best':>10}{'tokens/s':>10}{'KV GB/s':>9}{'':>7}"
        f"{'wts GB/s':>10}{'':>7}{'GFLOP/s':>9}{'':>7}{'roofline':>10}{'linear':>8}",
    ]
    lines += [
        f"{_place(one)}{one.step_ms:>10.3f}{one.best_ms:>10.3f}{one.tokens_per_s:>10.0f}"
        f"{_number(one.kv_gb_s):>9}{_percent(one.kv_of_copy)}"
        f"{one.weights_gb_s:>10.2f}{_percent(one.weights_of_copy)}"
        f"{one.gflop_s:>9.1f}{_percent(one.of_matmul_peak)}"
        f"{_percent(one.roofline):>10}{_percent(one.linear_roofline):>8}"
        for one in figures
    ]
    lines += [
        f"{title}, parts in ms with stopwatches about (rest: of the forward pass)",
        first + f"{'step ms':>10}" + "".join(f"{part:>10}" for part in _PARTS),
    ]
    lines += [
        f"{_place(one)}{one.parts.whole:>10.3f}"
        + "".join(f"{_number(getattr(one.parts, part), 3):>10}" for part in _PARTS)
        for one in figures
    ]
    return "\n".join(lines)


def linear_text(figures: Sequence[LinearFigures]) -> str:
    """The model's shapes."""
    lines = [
        "linear layers alone, us each; roofline: the time at best, of theirs; last %: of the peak",
        f"{'outputs':>9}{'inputs':>8}{'count':>7}{'tokens':>8}{'engine':>11}{'roofline':>10}"
        f"{'plain torch':>13}{'roofline':>10}{'wts GB/s':>10}{'GFLOP/s':>9}",
    ]
    lines += [
        f"{one.outputs:>9}{one.inputs:>8}{one.count:>7}{one.tokens:>8}"
        f"{_number(one.us, 1):>11}{_percent(one.roofline):>10}"
        f"{one.plain_us:>13.1f}{_percent(one.plain_roofline):>10}"
        f"{one.weights_gb_s:>10.2f}{one.gflop_s:>9.1f}{_percent(one.of_matmul_peak)}"
        for one in figures
    ]
    return "\n".join(lines)


def sampler_text(figures: Sequence[SamplerFigures]) -> str:
    """Kinds of requests in rows, batches in columns."""
    batches = list(dict.fromkeys(one.batch for one in figures))
    found = {(one.kind, one.batch): one.us for one in figures}
    lines = [
        f"sampler, us a step, {figures[0].vocab_size} tokens in the vocabulary",
        f"{'batch':22}" + "".join(f"{batch:>10}" for batch in batches),
    ]
    lines += [
        f"{kind:22}" + "".join(f"{found[kind, batch]:>10.1f}" for batch in batches)
        for kind in dict.fromkeys(one.kind for one in figures)
    ]
    return "\n".join(lines)


def scheduler_text(figures: Sequence[SchedulerFigures]) -> str:
    """By running decodes."""
    lines = [
        "scheduler, us a step of greedy decodes; publish: verify, load and events, twice",
        f"{'running':>8}{'context':>8}{'whole':>10}{'schedule':>10}{'commit':>10}{'publish':>10}"
        f"{'a sequence':>12}",
    ]
    lines += [
        f"{one.running:>8}{one.context:>8}{one.whole_us:>10.1f}{one.schedule_us:>10.1f}"
        f"{one.commit_us:>10.1f}{one.publish_us:>10.1f}{one.us_per_sequence:>12.2f}"
        for one in figures
    ]
    return "\n".join(lines)


def transfer_text(figures: Sequence[TransferFigures]) -> str:
    """By size."""
    lines = [
        "KV transfer out of a second process, host to host",
        f"{'KiB':>8}{'us':>12}{'GB/s':>8}{'of copy':>9}",
    ]
    lines += [
        f"{one.num_bytes >> 10:>8}{one.us:>12.1f}{one.gb_s:>8.2f}{_percent(one.of_copy):>9}"
        for one in figures
    ]
    return "\n".join(lines)


def profile_text(figures: Sequence[Profile]) -> str:
    """Groups in columns, then each step's largest operations."""
    lines = ["ms a step under the profiler (plain: without it)"]
    groups = [*figures[0].groups]
    lines.append(
        f"{'':8}{'batch':>6}{'context':>8}{'plain':>10}{'wall':>10}"
        + "".join(f"{group:>11}" for group in groups)
        + f"{'ops':>8}"
    )
    for one in figures:
        lines.append(
            f"{one.kind:8}{one.batch:>6}{one.context:>8}{one.plain_ms:>10.3f}{one.wall_ms:>10.3f}"
            + "".join(f"{one.groups[group]:>11.3f}" for group in groups)
            + f"{one.operations:>8.0f}"
        )
        if one.device_groups:
            kernels = (f"{group} {ms:.3f}" for group, ms in one.device_groups.items())
            lines.append("        on the device: " + ", ".join(kernels))
    for one in figures:
        lines.append(f"{one.kind}, batch {one.batch}, context {one.context}: largest operations")
        lines += [
            f"    {top.ms:>9.3f} ms {top.calls:>7.1f} calls  {top.name} ({top.group})"
            for top in one.top
        ]
    return "\n".join(lines)


def _place(one: StepFigures) -> str:
    return f"{one.batch:>6}{one.context:>8}" if one.context else f"{one.tokens:>14}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return f"{'-':>7}" if share is None else f"{share * 100:>6.1f}%"
