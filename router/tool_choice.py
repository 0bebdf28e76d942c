"""`tools` and `tool_choice`: what the template gets, what binds the model, how calls are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from router.json_text import dump_json
from router.parsers.registry import structural_tag
from router.parsers.specs import ToolParsing, ToolSpec
from router.schema import ChatRequest
from router.tool_schema import arguments_schema, calls_schema

Mode = Literal["none", "auto", "required", "named"]
_MAX_TOOLS = 1024


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """A request's tools, resolved. `forced`: the grammar is of a call that has to be made."""

    mode: Mode = "none"
    for_template: tuple[Mapping[str, Any], ...] | None = None
    parsing: ToolParsing | None = None
    grammar: Grammar | None = None

    @property
    def forced(self) -> bool:
        """Whether the model has to call."""
        return self.mode in ("required", "named")

    @property
    def calls_finish(self) -> str:
        """Finish reason of a choice that ended with `stop` after a call."""
        return "stop" if self.mode == "named" else "tool_calls"


def plan_tools(
    request: ChatRequest, *, parser: str | None, exclude_when_none: bool = False
) -> ToolPlan:
    """Check tools and choice and resolve them.

    Args:
        request: types were checked.
        parser: name of the format in which the model writes calls; None: not known.
        exclude_when_none: leave the tools out of the prompt if none may be called.

    Raises:
        InvalidRequest: no such tool, a choice without tools, or calls nobody could read.
    """
    tools = request.tools
    choice = request.tool_choice
    if tools is None:
        if choice is not None and choice != "none":
            raise InvalidRequest("tool_choice needs tools", "tool_choice")
        return ToolPlan()
    if not tools:
        raise InvalidRequest("tools must not be empty", "tools")
    if len(tools) > _MAX_TOOLS:
        raise InvalidRequest(f"tools takes at most {_MAX_TOOLS}", "tools")
    dump_json([tool.function.parameters for tool in tools], "tools")  # refuses what is no JSON
    for_template = tuple(tool.for_template for tool in tools)
    specs = tuple(
        ToolSpec(
            tool.function.name,
            parameters=tool.function.parameters,
            strict=bool(tool.function.strict),
        )
        for tool in tools
    )
    mode, name = _mode(choice, {spec.name for spec in specs})
    if mode == "none":
        return ToolPlan(for_template=None if exclude_when_none else for_template)
    if parser is None:
        raise InvalidRequest(
            f"tool_choice {mode!r} needs a tool call parser, and this server has none for its model"
        )
    parallel = request.parallel_tool_calls is not False
    return ToolPlan(
        mode,
        for_template,
        ToolParsing(mode=mode, format=parser, tools=specs, name=name, parallel=parallel),
        _grammar(mode, name, specs, parallel, parser),
    )


def _mode(choice: str | Mapping[str, Any] | None, names: set[str]) -> tuple[Mode, str | None]:
    """What the choice says; with tools its default is `auto`."""
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "none":
        return "none", None
    if choice == "required":
        return "required", None
    field = "tool_choice"
    if isinstance(choice, str) or choice.get("type") not in (None, "function"):
        raise InvalidRequest("tool_choice must be none, auto, required or a named function", field)
    function = choice.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest("tool_choice needs a function", f"{field}.function")
    name = function.get("name")
    if not isinstance(name, str):
        raise InvalidRequest("tool_choice needs the function's name", f"{field}.function.name")
    if name not in names:
        raise InvalidRequest("tool_choice names a function that is not among the tools", field)
    return "named", name


def _grammar(
    mode: Mode, name: str | None, specs: tuple[ToolSpec, ...], parallel: bool, parser: str
) -> Grammar | None:
    """What binds the output: all of it if a call is forced, else calls of strict tools."""
    if mode == "required":
        schema = calls_schema(specs, parallel=parallel)
        return Grammar(GrammarKind.JSON_SCHEMA, dump_json(schema, "tools"))
    if mode == "named":
        schema = next(arguments_schema(s.parameters) for s in specs if s.name == name)
        return Grammar(GrammarKind.JSON_SCHEMA, dump_json(schema, "tools"))
    if any(spec.strict for spec in specs):
        tag = structural_tag(parser, specs, parallel)
        return None if tag is None else Grammar(GrammarKind.STRUCTURAL_TAG, tag)
    return None
