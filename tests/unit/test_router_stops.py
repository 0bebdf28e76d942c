from hypothesis import given
from hypothesis import strategies as st

from router.stops import StopStrings

AB = st.text(alphabet="ab", min_size=1, max_size=6)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string complete first; of those at the same end, the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
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
