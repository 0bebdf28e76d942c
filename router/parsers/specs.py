"""What a request says about its tools, as the parsers need it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call.

    `parameters` is the JSON schema of its arguments; None: an empty object. `strict`: the
    arguments are constrained to it even where the call itself is the model's choice.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolParsing:
    """How calls are written in the output.

    `auto`: the markup of `format`, one of the registered names. `required`: a JSON list of
    `{"name", "parameters"}`. `named`: the whole content is the arguments of the function `name`.
    """

    mode: Literal["auto", "required", "named"]
    format: str
    tools: tuple[ToolSpec, ...]
    name: str | None = None
    parallel: bool = True  # False: only the first call is kept
