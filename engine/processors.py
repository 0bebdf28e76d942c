"""Logits processors: code that the operator allows, made from a request's names and arguments."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from contracts.errors import InvalidRequest
from contracts.sampling import ProcessorSpec
from engine.guide import Processor

if TYPE_CHECKING:
    import torch

PARAM = "logits_processors"
EXTRA_ARGS = "vllm_xargs"  # the argument by which a processor asks for the request's extra ones


def resolve(
    specs: Sequence[ProcessorSpec], *, pattern: str, extra_args: str
) -> Callable[[], list[Processor]]:
    """Import and try out a request's processors.

    Importing runs code, so it must not happen on an event loop.

    Args:
        specs: in the order in which they run.
        pattern: what a whole name must match to be allowed; empty allows none.
        extra_args: JSON object for those that want it; empty: none.

    Returns:
        What makes a fresh list of them for one choice.

    Raises:
        InvalidRequest: a name is not allowed or not there, or the arguments do not fit.
    """
    for spec in specs:
        if not _allows(pattern, spec.qualname):
            raise InvalidRequest(
                f"the logits processor '{spec.qualname}' is not allowed on this server", PARAM
            )
    extra = json.loads(extra_args) if extra_args else {}
    makers = [_maker(spec, extra) for spec in specs]

    def make() -> list[Processor]:
        return [one() for one in makers]

    make()
    return make


def _allows(pattern: str, name: str) -> bool:
    try:
        return bool(pattern) and re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _maker(spec: ProcessorSpec, extra: object) -> Callable[[], Processor]:
    found = _load(spec.qualname)
    if not callable(found):
        raise InvalidRequest(f"'{spec.qualname}' is no logits processor", PARAM)
    takes_extra = _wants_extra(found)
    if spec.args is None and spec.kwargs is None and not inspect.isclass(found):
        function = partial(found, **{EXTRA_ARGS: extra}) if takes_extra else found
        processor = _as_processor(function, spec.qualname)
        return lambda: processor
    args, kwargs = _arguments(spec)
    if takes_extra:
        kwargs.setdefault(EXTRA_ARGS, extra)

    def build() -> Processor:
        try:
            made = found(*args, **kwargs)
        except Exception as error:  # the operator's code, the client's arguments
            raise InvalidRequest(
                f"'{spec.qualname}' does not accept its arguments ({type(error).__name__})", PARAM
            ) from error
        if not callable(made):
            raise InvalidRequest(f"'{spec.qualname}' does not make a logits processor", PARAM)
        return _as_processor(made, spec.qualname)

    return build


def _arguments(spec: ProcessorSpec) -> tuple[list[Any], dict[str, Any]]:
    try:
        args = json.loads(spec.args) if spec.args is not None else []
        kwargs = json.loads(spec.kwargs) if spec.kwargs is not None else {}
    except ValueError as error:
        raise InvalidRequest(f"the arguments of '{spec.qualname}' are no JSON", PARAM) from error
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidRequest(
            f"'{spec.qualname}' needs `args` as a list and `kwargs` as an object", PARAM
        )
    return args, kwargs


def _load(name: str) -> object:
    """The object that `module.attribute` or `module:attribute` names."""
    split = name.partition(":") if ":" in name else name.rpartition(".")
    module_name, _, attributes = split
    missing = InvalidRequest(f"there is no logits processor '{name}'", PARAM)
    if not module_name or not attributes or module_name.startswith("."):
        raise missing
    try:
        found: object = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # an import runs any code
        raise missing from error
    if isinstance(found, ModuleType):
        raise missing
    return found


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in ones tell none
        return None


def _wants_extra(function: Callable[..., Any]) -> bool:
    return any(one.name == EXTRA_ARGS for one in _parameters(function) or [])


def _as_processor(function: Callable[..., Any], name: str) -> Processor:
    """Give both known forms the same one: (prompt, output, logits) and (output, logits)."""
    parameters = _parameters(function)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters is None or any(one.kind is one.VAR_POSITIONAL for one in parameters):
        count = 3
    else:
        places = [one for one in parameters if one.kind in kinds]
        needed = [one for one in places if one.default is one.empty]
        count = len(needed) if needed else len(places)
    if count == 3:
        return function
    if count != 2:
        raise InvalidRequest(
            f"'{name}' takes neither (output ids, logits) nor (prompt ids, output ids, logits)",
            PARAM,
        )

    def without_prompt(
        prompt_ids: list[int], output_ids: list[int], logits: "torch.Tensor"
    ) -> "torch.Tensor":
        result: torch.Tensor = function(output_ids, logits)
        return result

    return without_prompt
