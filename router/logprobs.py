"""Log-probabilities as clients see them: tokens by their text in place, special ones by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.events import PromptLogprob
from router.detokenizer import Vocabulary

LOWEST_LOGPROB = -9999.0  # JSON has no infinity
LIGHT_ENTRIES = 256  # tokens; more of them are written in a thread


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One output token's text and log-probability; `top` is best first.

    `spelled` has the texts of the token and of each alternative, where `token` tells their ids.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    spelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt token's id, text, log-probability and rank (1 is best).

    `top` is best first: (token id, text, log-probability). The first token has no
    log-probability, hence no rank and no alternatives.
    """

    token_id: int
    token: str
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, str, float], ...] = ()


def prompt_entries(
    vocabulary: Vocabulary,
    prompt_ids: Sequence[int],
    scores: Sequence[PromptLogprob | None],
    num_top: int,
) -> list[PromptEntry]:
    """Name the tokens of a scored prompt and at most `num_top` alternatives (negative: all).

    Takes microseconds for each of them: not for the event loop if the prompt is long.
    """
    detokenizer = vocabulary.detokenizer((), skip_special_tokens=False)

    def name(token_id: int) -> str:
        special = token_id in vocabulary.special_ids
        return vocabulary.name(token_id) if special else detokenizer.peek(token_id)

    entries: list[PromptEntry] = []
    for token_id, score in zip(prompt_ids, scores, strict=True):
        if score is None:
            entries.append(PromptEntry(token_id, name(token_id)))
        else:
            best = score.top if num_top < 0 else score.top[:num_top]
            top = tuple((i, name(i), max(value, LOWEST_LOGPROB)) for i, value in best)
            logprob = max(score.logprob, LOWEST_LOGPROB)
            entries.append(PromptEntry(token_id, name(token_id), logprob, score.rank, top))
        detokenizer.push(token_id)
    return entries


def logprobs_json(entries: Iterable[LogprobEntry]) -> dict[str, Any]:
    """The `logprobs` object of a chat's choice or chunk."""
    return {"content": [_entry_json(entry) for entry in entries]}


def _entry_json(entry: LogprobEntry) -> dict[str, Any]:
    names = [entry.token, *(token for token, _ in entry.top)]
    first, *others = entry.spelled or names
    best = zip(entry.top, others, strict=True)
    return {
        **_token_json(entry.token, entry.logprob, first),
        "top_logprobs": [_token_json(token, value, text) for (token, value), text in best],
    }


def _token_json(token: str, logprob: float, text: str) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(text.encode())}


def prompt_logprobs_json(entries: Iterable[PromptEntry]) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` list: each token's own entry first, then the best, by id as text."""
    return [None if entry.logprob is None else _prompt_json(entry) for entry in entries]


def _prompt_json(entry: PromptEntry) -> dict[str, Any]:
    found: dict[str, Any] = {
        str(entry.token_id): {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": entry.token,
        }
    }
    for rank, (token_id, token, logprob) in enumerate(entry.top, 1):
        value = {"logprob": logprob, "rank": rank, "decoded_token": token}
        found.setdefault(str(token_id), value)
    return found
