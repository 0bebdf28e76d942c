"""From a checked request to how its output is bound and read: grammar, parser, rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from router.config import RouterConfig
from router.constraints import constraint
from router.deltas import OutputParser
from router.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    make_output_parser,
    may_think,
    reasoning_end,
    reasoning_start,
    starts_inside,
)
from router.prompt_request import BuiltPrompt
from router.rules import OutputRules
from router.sampling import ServedModel
from router.schema import ChatRequest, SharedFields
from router.tool_choice import ToolPlan


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What binds the output, and who makes thoughts and calls out of it (None: nobody).

    `keep_special`: the parser needs special tokens in the text, whatever the request says.
    `thinks`: it looks for thoughts.
    """

    grammar: Grammar | None = None
    make_parser: Callable[[], OutputParser] | None = None
    keep_special: bool = False
    thinks: bool = False


def chosen_grammar(request: ChatRequest, tools: ToolPlan) -> Grammar | None:
    """The one grammar of a request: of its constraint, or of its tools.

    A constraint leaves no room for calls the model may choose to make, so it wins over these.

    Raises:
        InvalidRequest: a forced call beside a constraint, or a grammar beside beams.
    """
    wanted = constraint(request)
    if wanted is not None and tools.forced:
        raise InvalidRequest(
            f"tool_choice {tools.mode!r} cannot be used with response_format or structured_outputs"
        )
    if request.use_beam_search and tools.grammar is not None:
        name = "tool_choice" if tools.forced else "tools"
        raise InvalidRequest(f"{name}: forced or strict calls cannot be used with beams", name)
    return wanted or tools.grammar


def plan_answer(
    request: ChatRequest,
    grammar: Grammar | None,
    tools: ToolPlan,
    prompt: BuiltPrompt,
    model: ServedModel,
    *,
    reasoning: str | None,
    template_kwargs: Mapping[str, Any],
) -> AnswerPlan:
    """Bind the grammar to the model and choose the parser, now that the prompt is known.

    A grammar starts behind the thoughts if there may be any, unless they are not wanted: then it
    starts at once, and there is nothing but the answer.
    """
    wanted = request.include_reasoning is not False
    whole = grammar is not None and grammar.kind is not GrammarKind.STRUCTURAL_TAG
    if whole and not wanted:
        reasoning = None
    if grammar is not None:
        grammar = bound(grammar, model)
        if reasoning and wanted and may_think(reasoning, prompt.tail, template_kwargs):
            inside = starts_inside(reasoning, prompt.tail, template_kwargs)
            grammar = _behind_thoughts(grammar, model, reasoning, inside=inside)
    if reasoning is None and tools.parsing is None:
        return AnswerPlan(grammar)
    make_parser = partial(
        _make_parser,
        reasoning=reasoning,
        tools=tools.parsing,
        tail=prompt.tail,
        template_kwargs=template_kwargs,
    )
    keep_special = _needs_special(reasoning, tools, model)
    return AnswerPlan(grammar, make_parser, keep_special, thinks=reasoning is not None)


def _make_parser(**arguments: Any) -> OutputParser:
    parser = make_output_parser(**arguments)
    assert parser is not None
    return parser


def _needs_special(reasoning: str | None, tools: ToolPlan, model: ServedModel) -> bool:
    """Whether markers may be among the tokens that leave no text."""
    calls = None if tools.forced else tools.parsing
    if calls is not None and TOOL_PARSERS[calls.format].needs_special_tokens:
        return True
    if reasoning is None or not REASONING_PARSERS[reasoning].needs_special_tokens:
        return False
    return not model.special_ids.isdisjoint(model.tokenize(reasoning_end(reasoning)))


def bound(grammar: Grammar, model: ServedModel) -> Grammar:
    """The same grammar with the tokens of this model that end it."""
    return replace(grammar, end_token_ids=model.eos_ids)


def _behind_thoughts(
    grammar: Grammar, model: ServedModel, reasoning: str, *, inside: bool
) -> Grammar:
    """The same grammar for an answer that may follow thoughts.

    Thoughts that the model may leave out are told by their first token. Without one token that
    opens them the grammar binds at once: an answer that is not held to it would be worse.
    """
    start_after = model.tokenize(reasoning_end(reasoning))
    if inside:
        return replace(grammar, start_after=start_after)
    start = model.tokenize(reasoning_start(reasoning))
    if len(start) != 1:
        return grammar
    return replace(grammar, start_after=start_after, opened_by=start[0])


def output_rules(
    request: SharedFields,
    config: RouterConfig,
    primary_eos: int | None,
    *,
    plan: AnswerPlan | None = None,
    include_reasoning: bool = True,
    calls_finish: str = "tool_calls",
) -> OutputRules:
    """How tokens become the answer, every default resolved."""
    plan = plan or AnswerPlan()
    as_ids = request.return_tokens_as_token_ids
    return OutputRules(
        stop=tuple(request.stop or ()),
        primary_eos=primary_eos,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False and not plan.keep_special,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        tokens_as_ids=config.return_tokens_as_token_ids if as_ids is None else as_ids,
        make_parser=plan.make_parser,
        thinks=plan.thinks,
        include_reasoning=include_reasoning,
        calls_finish=calls_finish,
    )
