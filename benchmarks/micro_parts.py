"""Where a step's time goes: stopwatches around its parts, put there by patches for a while.

step      schedule | publish | compute                            | commit | publish
compute                        prepare | forward         | sample
forward                                  attention, linear, rest
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.micro_clock import settle
from benchmarks.micro_engine import MicroEngine
from engine.native_decoder import NativeDecoder
from engine.sampler import arg_max, sample

_Event = Any  # torch.cuda.Event


@dataclass(frozen=True, slots=True)
class StepParts:
    """Milliseconds of one step. None: nothing of that kind was seen apart (it may be fused).

    `prepare` is what a compute does besides forward and sampling: tables, indices, copies in; if
    it was not seen apart, it is in `rest`.
    """

    whole: float
    schedule: float
    prepare: float | None
    attention: float | None
    linear: float | None
    rest: float  # of the forward pass
    sample: float
    commit: float
    publish: float

    @property
    def other(self) -> float:
        """What lies between the parts."""
        known = self.schedule + self.rest + self.sample + self.commit + self.publish
        apart = (self.prepare, self.attention, self.linear)
        return self.whole - known - sum(one or 0.0 for one in apart)


@dataclass(slots=True, eq=False)
class Stopwatch:
    """Seconds by name since `clear`. Spans on a GPU are timed by events on its stream."""

    device: torch.device
    _spent: dict[str, float] = field(default_factory=dict[str, float])
    _began: dict[int, float] = field(default_factory=dict[int, float])
    _events: list[tuple[str, _Event, _Event]] = field(default_factory=list[Any])

    def clear(self) -> None:
        """Forget all."""
        self._spent.clear()
        self._events.clear()

    def seconds(self, name: str) -> float | None:
        """All the spans of that name together; None: there were none. Call it settled."""
        for event_name, start, end in self._events:
            self._spent[event_name] = (
                self._spent.get(event_name, 0.0) + start.elapsed_time(end) / 1e3
            )
        self._events.clear()
        return self._spent.get(name)

    @contextmanager
    def settled(self, name: str) -> Iterator[None]:
        """A span by the clock, with the device at rest at both ends."""
        settle(self.device)
        began = time.perf_counter()
        yield
        settle(self.device)
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """A span that was timed elsewhere."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of it a settled span."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.settled(name):
                return function(*args, **kwargs)

        return call

    def inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of it a span that does not hold up the device."""

        def call(*args: Any, **kwargs: Any) -> Any:
            token = self.begin()
            result = function(*args, **kwargs)
            self.finish(name, token)
            return result

        return call

    def begin(self) -> Any:
        """Start a span that does not hold up the device; what it gives is for `finish`."""
        if self.device.type == "cuda":
            return _event()
        return time.perf_counter()

    def finish(self, name: str, token: Any) -> None:
        """End it."""
        if self.device.type == "cuda":
            self._events.append((name, token, _event()))
        else:
            self.add(name, time.perf_counter() - token)


def _event() -> _Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def linear_modules(module: Any) -> list[Any]:
    """Modules that multiply by a weight, the engine's own kinds included, each once."""
    return [
        one
        for one in module.modules()
        if "Linear" in type(one).__name__ and not list(one.children())
    ]


def users_of_samplers() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Where the engine holds the samplers that it imported: (module, name, function), to patch."""
    found = [
        (module, attribute, function)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "engine" and name != "engine.sampler"
        for attribute, function in (("sample", sample), ("arg_max", arg_max))
        if vars(module).get(attribute) is function
    ]
    assert found, "the engine does not use engine.sampler.sample: this benchmark is out of date"
    return found


@contextmanager
def watched(engine: MicroEngine, watch: Stopwatch) -> Iterator[None]:
    """Time forward pass, attention, linear layers and sampler of every step in here."""
    module = engine.parts.model.module
    backend = engine.backend
    begun: dict[int, Any] = {}

    def enter(one: Any, *_: Any) -> None:
        begun[id(one)] = watch.begin()

    def leave(one: Any, *_: Any) -> None:
        watch.finish("linear", begun.pop(id(one)))

    with ExitStack() as stack:
        decoder = engine.runner.decoder
        attend = "forward" if decoder is None else "attend"
        stack.enter_context(
            patch.object(backend, attend, watch.inside("attention", getattr(backend, attend)))
        )
        stack.enter_context(
            patch.object(module, "forward", watch.around("forward", module.forward))
        )
        if decoder is not None:
            for name, function in (
                ("step", _native_step(decoder, watch)),
                ("forward", decoder.forward),
            ):
                stack.enter_context(patch.object(decoder, name, watch.around("forward", function)))
        for owner, name, function in users_of_samplers():
            stack.enter_context(patch.object(owner, name, watch.around("sample", function)))
        for one in linear_modules(module):
            stack.callback(one.register_forward_pre_hook(enter).remove)
            stack.callback(one.register_forward_hook(leave).remove)
        yield


def _native_step(decoder: NativeDecoder, watch: Stopwatch) -> Callable[..., Any]:
    step = decoder.step

    def call(*args: Any) -> Any:
        attention, linear = decoder.seconds()
        result = step(*args)
        attention_now, linear_now = decoder.seconds()
        watch.add("attention", attention_now - attention)
        watch.add("linear", linear_now - linear)
        return result

    return call


def watched_step(engine: MicroEngine, watch: Stopwatch) -> StepParts:
    """Make one step in `watched` and tell its parts."""
    watch.clear()
    scheduler = engine.scheduler
    with watch.settled("whole"):
        with watch.settled("schedule"):
            plan = scheduler.schedule()
        with watch.settled("publish"):
            engine.publish()
        with watch.settled("compute"):
            result = engine.computer.compute(plan)
        with watch.settled("commit"):
            scheduler.commit(plan, result)
        with watch.settled("publish"):
            engine.publish()

    def ms(name: str) -> float:
        return (watch.seconds(name) or 0.0) * 1e3

    def ms_apart(name: str) -> float | None:
        return None if watch.seconds(name) is None else ms(name)

    seen = watch.seconds("forward") is not None
    prepare = ms("compute") - ms("forward") - ms("sample")
    forward = ms("forward") if seen else prepare
    return StepParts(
        whole=ms("whole"),
        schedule=ms("schedule"),
        prepare=max(0.0, prepare) if seen else None,
        attention=ms_apart("attention"),
        linear=ms_apart("linear"),
        rest=max(0.0, forward - ms("attention") - ms("linear")),
        sample=ms("sample"),
        commit=ms("commit"),
        publish=ms("publish"),
    )
