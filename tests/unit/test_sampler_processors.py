"""Logits processors: only what the operator allows is imported, and both known forms work."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contracts.errors import InvalidRequest
from contracts.sampling import ProcessorSpec
from engine.processors import resolve

CODE = '''
import torch

def pair(output_ids, logits):
    logits[len(output_ids)] += 1
    return logits

def triple(prompt_ids, output_ids, logits):
    logits[len(prompt_ids)] += 10
    return logits

def extra(output_ids, logits, *, vllm_xargs=None):
    logits[0] = vllm_xargs["value"]
    return logits

class Add:
    """Adds to one token; counts its own calls."""
    def __init__(self, token, amount=1.0, vllm_xargs=None):
        if amount < 0:
            raise RuntimeError("/a/path/with/secrets")
        self.token, self.amount, self.calls = token, amount, 0
        if vllm_xargs:
            self.amount = vllm_xargs["value"]
    def __call__(self, output_ids, logits):
        self.calls += 1
        logits[self.token] += self.amount * self.calls
        return logits

def make(token):
    return lambda prompt_ids, output_ids, logits: logits * 0 + token

class Space:
    inner = staticmethod(pair)

def odd(one):
    return one

number = 5
'''
ALLOW = r"own_processors[.:].*"


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_processors.py").write_text(CODE)
    (tmp_path / "own_processors_broken.py").write_text("raise SystemError('on import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("own_processors", "own_processors_broken"):
        sys.modules.pop(name, None)


def run(*specs: ProcessorSpec, extra_args: str = "", calls: int = 1) -> list[float]:
    """What the processors make of zeros, with two prompt tokens and three outputs."""
    processors = resolve(specs, pattern=ALLOW, extra_args=extra_args)()
    logits = torch.zeros(5)
    for _ in range(calls):
        logits = torch.zeros(5)
        for processor in processors:
            logits = processor([8, 9], [1, 2, 3], logits)
    return [float(value) for value in logits]


def named(name: str, *args: object, **kwargs: object) -> ProcessorSpec:
    return ProcessorSpec(f"own_processors.{name}", json.dumps(args), json.dumps(kwargs))


def test_both_forms_of_functions() -> None:
    both = (ProcessorSpec("own_processors.pair"), ProcessorSpec("own_processors:triple"))
    assert run(*both) == [0, 0, 10, 1, 0]
    assert run(ProcessorSpec("own_processors:Space.inner")) == [0, 0, 0, 1, 0]


def test_objects_are_made_with_their_arguments() -> None:
    assert run(named("Add", 1, amount=2.5)) == [0, 2.5, 0, 0, 0]
    assert run(named("Add", 1), calls=3) == [0, 3, 0, 0, 0]
    assert run(named("make", 4)) == [4] * 5
    assert run(ProcessorSpec("own_processors.Add", None, '{"token": 2}')) == [0, 0, 1, 0, 0]


def test_extra_arguments_reach_those_that_name_them() -> None:
    extra = '{"value": 7}'
    assert run(named("Add", 1), extra_args=extra) == [0, 7, 0, 0, 0]
    assert run(ProcessorSpec("own_processors.extra"), extra_args=extra) == [7, 0, 0, 0, 0]
    assert run(ProcessorSpec("own_processors.pair"), extra_args=extra) == [0, 0, 0, 1, 0]


def test_each_list_has_instances_of_its_own() -> None:
    make = resolve([named("Add", 0)], pattern=ALLOW, extra_args="")
    first, second = make()[0], make()[0]
    assert float(first([], [], torch.zeros(1))[0]) == 1
    assert float(first([], [], torch.zeros(1))[0]) == 2
    assert float(second([], [], torch.zeros(1))[0]) == 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ProcessorSpec("own_processors.absent"), "there is no"),
        (ProcessorSpec("own_processors.absent.pair"), "there is no"),
        (ProcessorSpec("own_processors.number"), "is no logits processor"),
        (ProcessorSpec("own_processors.torch"), "there is no"),
        (ProcessorSpec("own_processors.odd"), "takes neither"),
        (named("Add"), "does not accept its arguments (TypeError)"),
        (named("Add", 1, amount=-1), "does not accept its arguments (RuntimeError)"),
        (named("Add", 1, colour="red"), "does not accept its arguments (TypeError)"),
        (named("number"), "is no logits processor"),
        (ProcessorSpec("own_processors.Add", "{"), "no JSON"),
        (ProcessorSpec("own_processors.Add", "{}"), "as a list"),
        (ProcessorSpec("own_processors.Add"), "does not accept its arguments"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(spec: ProcessorSpec, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve([spec], pattern=ALLOW, extra_args="")
    assert reason in str(caught.value)
    assert "secrets" not in str(caught.value)
    assert caught.value.param == "logits_processors"


@pytest.mark.parametrize("pattern", ["", "own_processors", r"own_processors\.p", "(", r"other\..*"])
def test_nothing_is_imported_that_is_not_allowed(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="not allowed"):
        resolve([ProcessorSpec("own_processors.pair")], pattern=pattern, extra_args="")
    assert "own_processors" not in sys.modules


def test_one_name_that_is_not_allowed_stops_all() -> None:
    specs = [ProcessorSpec("own_processors.pair"), ProcessorSpec("os.system")]
    with pytest.raises(InvalidRequest, match=r"os\.system"):
        resolve(specs, pattern=ALLOW, extra_args="")
    assert "own_processors" not in sys.modules


def test_a_module_that_fails_on_import() -> None:
    with pytest.raises(InvalidRequest, match="there is no"):
        resolve([ProcessorSpec("own_processors_broken.x")], pattern=r".*", extra_args="")
