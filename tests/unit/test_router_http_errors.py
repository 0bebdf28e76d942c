import json
from collections.abc import Iterator

import pytest

import router.attempt
import router.choice
import router.http_errors
import router.outbox
import router.placement
from contracts import errors
from contracts.errors import ServingError
from router.attempt import error_of, is_hopeless
from router.http_errors import STATUS, body_of, encode, error_body, headers_of, status_of


def tree(cls: type[ServingError] = ServingError) -> Iterator[type[ServingError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from tree(sub)


def make(cls: type[ServingError]) -> ServingError:
    return cls(3, 2) if issubclass(cls, errors.OutOfBlocks) else cls("secret /path")


@pytest.mark.parametrize("cls", sorted(set(tree()), key=str))
def test_every_error_has_a_status_and_a_whole_body(cls: type[ServingError]) -> None:
    assert any(base in STATUS for base in cls.__mro__), "no entry for it or its bases"
    error = make(cls)
    status, kind = status_of(error)
    body = json.loads(encode(body_of(error)))["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert (body["code"], body["type"]) == (status, kind)
    assert body["message"]
    assert 400 <= status < 600


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequest("x", "n"), 400),
        (errors.NotFound("x"), 404),
        (errors.Overloaded("x"), 429),
        (errors.Unavailable("x"), 503),
        (router.placement.NoCapacity("x"), 503),
        (errors.FenceBroken("x"), 503),
        (errors.EngineFailure("x"), 500),
        (router.choice.TokenFault("x"), 500),
        (router.http_errors.BodyTooLarge("x"), 413),
    ],
)
def test_status(error: ServingError, status: int) -> None:
    assert status_of(error)[0] == status


@pytest.mark.parametrize(
    "cls", [errors.EngineFailure, errors.ConfigurationError, errors.FenceBroken]
)
def test_inner_messages_stay_inside(cls: type[ServingError]) -> None:
    assert b"secret" not in encode(body_of(make(cls)))


def test_retry_after_is_whole_seconds() -> None:
    assert headers_of(errors.Overloaded("x", retry_after_s=1.2)) == {"Retry-After": "2"}
    assert headers_of(errors.Unavailable("x")) == {"Retry-After": "1"}
    assert headers_of(errors.InvalidRequest("x")) == {}


def test_long_messages_are_cut() -> None:
    body = error_body(400, "x" * 10_000)
    assert len(encode(body)) < 1000


@pytest.mark.parametrize("cls", [c for c in tree() if c.__module__ == "contracts.errors"])
def test_what_workers_name_comes_back_as_an_error(cls: type[ServingError]) -> None:
    error = error_of(cls.__name__, "message")
    assert isinstance(error, ServingError)
    if cls is not errors.OutOfBlocks:
        assert type(error) is cls


@pytest.mark.parametrize("kind", ["", "Nonsense", "FinishReason", "annotations", "str"])
def test_unknown_kinds_are_engine_failures(kind: str) -> None:
    assert isinstance(error_of(kind, "message"), errors.EngineFailure)


def test_only_the_callers_faults_are_hopeless() -> None:
    assert is_hopeless(errors.InvalidRequest("x"))
    assert is_hopeless(errors.UnsupportedModel("x"))
    assert not is_hopeless(errors.Overloaded("x"))
