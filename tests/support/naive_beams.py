"""Beam search as one would write it down: every step of every beam, nothing shared or left out."""

from collections.abc import Callable, Sequence

Best = Callable[[list[int], int], Sequence[tuple[int, float]]]  # (tokens, count) -> best tokens


def naive_beams(
    best: Best,
    prompt: Sequence[int],
    width: int,
    max_tokens: int,
    ends: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[tuple[list[int], str]]:
    """The `width` best texts and why each ended, best first."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    closed: list[tuple[float, list[int], str]] = []
    for _ in range(max_tokens):
        found = [
            (-(total + logprob), index, token, tokens)
            for index, (total, tokens) in enumerate(live)
            for token, logprob in best([*prompt, *tokens], 2 * width)
        ]
        live = []
        for negative, _, token, tokens in sorted(found):
            if token in ends:
                length = len(prompt) + len(tokens)
                closed.append((-negative / length**length_penalty, [*tokens, token], "stop"))
            elif len(live) < width:
                live.append((-negative, [*tokens, token]))
    every = closed + [
        (total / (len(prompt) + len(tokens)) ** length_penalty, tokens, "length")
        for total, tokens in live
    ]
    every.sort(key=lambda entry: -entry[0])
    return [(tokens, reason) for _, tokens, reason in every[:width]]
