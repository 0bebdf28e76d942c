from hypothesis import given
from hypothesis import strategies as st

from router.stops import StopStrings

AB = st.text(alphabet="ab", min_size=1, max_size=6)


def reference(
    text: str, stops: list[str], *, include: bool = False, heed_from: int = 0
) -> tuple[str, str | None]:
    """The stop string complete first; of those at the same end, the longest.

    One that is complete within the first `heed_from` characters means nothing.
    """
    for end in range(heed_from + 1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(st.lists(AB, min_size=1, max_size=4), st.lists(st.text(alphabet="abc", max_size=5)))
def test_any_chunking_gives_what_a_search_in_the_whole_text_gives(
    stops: list[str], chunks: list[str]
) -> None:
    matcher = StopStrings(stops)
    shown = [matcher.push(chunk) for chunk in chunks]
    if matcher.matched is None:
        shown.append(matcher.finish())
    assert ("".join(shown), matcher.matched) == reference("".join(chunks), stops)


@given(
    st.lists(AB, min_size=1, max_size=4),
    st.lists(st.text(alphabet="abc", max_size=5)),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_stop_string_may_be_kept_and_is_not_looked_for_at_the_beginning(
    stops: list[str], chunks: list[str], num_first: int, include: bool
) -> None:
    matcher = StopStrings(stops, include=include)
    shown = [matcher.push(chunk, at >= num_first) for at, chunk in enumerate(chunks)]
    text = "".join(chunks)
    if matcher.matched is None:
        assert len(text) - sum(map(len, shown)) < max(map(len, stops))
        shown.append(matcher.finish())
    heed_from = len("".join(chunks[:num_first]))
    expected = reference(text, stops, include=include, heed_from=heed_from)
    assert ("".join(shown), matcher.matched) == expected


def test_nothing_is_held_if_the_stop_string_is_kept() -> None:
    matcher = StopStrings(["END"], include=True)
    assert matcher.push("a EN") == "a EN"
    assert matcher.push("D b") == "D"


@given(st.lists(AB, min_size=1, max_size=4), st.text(alphabet="abc", max_size=30))
def test_at_most_the_longest_stop_string_less_one_is_held(stops: list[str], text: str) -> None:
    matcher = StopStrings(stops)
    shown = 0
    for count, char in enumerate(text, 1):
        shown += len(matcher.push(char))
        if matcher.matched is not None:
            break
        assert count - shown < max(map(len, stops))


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    matcher = StopStrings(["\nObservation:"])
    assert matcher.push("It is") == "It is"
    assert matcher.push(" so\nObs") == " so"
    assert matcher.push("cure") == "\nObscure"


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("a EN") == "a "
    assert matcher.push("D b") == ""
    assert matcher.matched == "END"
    assert matcher.push("c") == ""
    assert matcher.finish() == ""


def test_held_text_is_released_at_the_end() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("a EN") + matcher.finish() == "a EN"


def test_without_stop_strings_text_passes() -> None:
    assert StopStrings([]).push("text") == "text"
