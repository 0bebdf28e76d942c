"""Text to token ids, and the rules about their number."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from contracts.errors import InvalidRequest

_HUGE_CHARS = 1 << 20  # shorter texts are always tokenised, so that their length can be told
_NORMALIZER_SHRINK = 4  # Unicode composition makes at most this many characters one


class TextEncoder:
    """A model's tokenizer, with the limits of a context around it. Safe in several threads.

    `num_ids` is the size of the model's vocabulary: ids in prompts are below it.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._num_ids = num_ids
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._chars_per_token = longest * (_NORMALIZER_SHRINK if tokenizer.normalizer else 1)

    def max_chars(self, max_model_len: int | None) -> int:
        """A text of more characters cannot fit, so it need not be tokenised."""
        return max(_HUGE_CHARS, (max_model_len or 0) * self._chars_per_token)

    def ids(
        self,
        text: str,
        *,
        add_special_tokens: bool = False,
        max_model_len: int | None = None,
        param: str | None = None,
    ) -> tuple[int, ...]:
        """Tokenise; `param` is where the text is from.

        Raises:
            InvalidRequest: hopelessly long, or half a surrogate pair in it.
        """
        if len(text) > (limit := self.max_chars(max_model_len)):
            raise InvalidRequest(
                f"the prompt has {len(text)} characters; more than {limit} are not tokenised"
                + (f" for a context of {max_model_len} tokens" if max_model_len else ""),
                "input_text",
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the prompt's text is not valid Unicode", param) from None
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Ids that a client sent.

        Raises:
            InvalidRequest: one that the model does not have.
        """
        if any(isinstance(i, bool) or not 0 <= i < self._num_ids for i in ids):
            raise InvalidRequest(f"token ids must be from 0 to {self._num_ids - 1}", param)
        return tuple(ids)


def fit(
    ids: tuple[int, ...], *, truncate: int | None, max_model_len: int | None, param: str
) -> tuple[int, ...]:
    """The last `truncate` ids (-1: as many as leave room for one output token; None: all).

    Without `max_model_len` nothing has to fit, and an empty prompt is fine.

    Raises:
        InvalidRequest: none are left (`param`), or there is no room for a single output token.
    """
    if truncate is not None:
        if max_model_len is not None and truncate > max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {truncate}, more than the model's context of "
                f"{max_model_len} tokens",
                "truncate_prompt_tokens",
            )
        if truncate == -1:
            truncate = len(ids) if max_model_len is None else max_model_len - 1
        ids = ids[max(0, len(ids) - truncate) :]
        if not ids and truncate == 0:
            raise InvalidRequest("the prompt is empty", "truncate_prompt_tokens")
    if max_model_len is None:
        return ids
    if not ids:
        raise InvalidRequest("the prompt is empty", param)
    if len(ids) >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens; with at least one output token that is more "
            f"than the model's context of {max_model_len} tokens",
            "input_tokens",
        )
    return ids
