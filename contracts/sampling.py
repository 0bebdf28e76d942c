"""Sampling parameters as the engine gets them: every default resolved, nothing to check twice."""

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    """What the text of a `Grammar` is."""

    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON
    JSON_OBJECT = "json_object"  # any JSON object; no text
    REGEX = "regex"  # the whole output matches
    CHOICE = "choice"  # a JSON list of texts; the output is one of them
    EBNF = "ebnf"  # GBNF, with `root ::=`
    LARK = "lark"  # with `start:`
    STRUCTURAL_TAG = "structural_tag"  # free text with tagged parts, as JSON


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output must satisfy. Complete, it lets only `end_token_ids` follow.

    It binds from the first output token, or from the one after the token ids `start_after` were
    generated one after the other (the end of a model's thoughts). With `opened_by` that is the
    model's choice: its first token is this one (thoughts begin) or already the grammar's.
    """

    kind: GrammarKind
    text: str = ""
    any_whitespace: bool = True  # between JSON's parts; False: compact
    closed_objects: bool = True  # objects whose schema is silent take no further properties
    whitespace_pattern: str = ""  # a regular expression for that white space; empty: the usual
    fallback: bool = True  # a second backend may serve what the first cannot express
    start_after: tuple[int, ...] = ()
    opened_by: int | None = None
    end_token_ids: tuple[int, ...] = ()  # the model's own end tokens, even with ignore_eos


@dataclass(frozen=True, slots=True)
class ProcessorSpec:
    """A logits processor that the operator allows: importable, made with JSON arguments.

    `args` and `kwargs` are None for a plain function, which is used as it is.
    """

    qualname: str
    args: str | None = None  # JSON list
    kwargs: str | None = None  # JSON object


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and when they end.

    `seed` is always set (the router draws one if the client gave none); choice i uses
    `seed + i` modulo 2**64. `temperature` 0 means greedy. With `beam`, `n` is the width and
    nothing but the model's log-probabilities counts.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0  # unsigned 64 bit
    n: int = 1
    eos_token_ids: tuple[int, ...] = ()  # empty with ignore_eos
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the drawn token's and the k best
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # prompt and output
    frequency_penalty: float = 0.0  # output only
    presence_penalty: float = 0.0  # output only
    min_tokens: int = 0  # that many outputs before any of `min_tokens_masked` may be drawn
    min_tokens_masked: tuple[int, ...] = ()  # all end tokens, those of ignore_eos included
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be generated
    grammar: Grammar | None = None
    processors: tuple[ProcessorSpec, ...] = ()
    extra_args: str = ""  # JSON object for processors that want it (vllm_xargs); empty: none
    prompt_logprobs: int | None = None  # None: none; k: each prompt token's and the k best
    beam: bool = False
    length_penalty: float = 1.0  # beams only

    @property
    def greedy(self) -> bool:
        """Whether the draw is a plain arg max."""
        return self.temperature == 0.0

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on more than its logit row: it needs the tokens before."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or bool(self.bad_words)
            or self.grammar is not None
            or bool(self.processors)
        ) and not self.beam

    def ends(self, token_id: int) -> bool:
        """Whether `token_id` ends a choice whatever came before it."""
        return token_id in self.eos_token_ids or token_id in self.stop_token_ids
