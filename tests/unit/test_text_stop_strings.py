"""Stop strings are found wherever the text is cut, and never shown in part."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.text import StopStringMatcher

letters = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The match that ends first, the longest of several: by looking at every end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stop_strings: list[str]) -> tuple[list[str], str | None]:
    """What is shown after each piece, with the rest at the end, and the match."""
    matcher = StopStringMatcher(stop_strings)
    shown = []
    for piece in pieces:
        found = matcher.push(piece)
        shown.append(found.text)
        if found.matched is not None:
            return shown, found.matched
    return [*shown, matcher.finish()], None


@settings(deadline=None)
@given(letters, stops, st.data())
def test_any_split_gives_the_same_result(text: str, stop_strings: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, matched = run(pieces, stop_strings)
    assert ("".join(shown), matched) == reference(text, stop_strings)


@settings(deadline=None)
@given(letters, stops)
def test_what_cannot_be_part_of_a_stop_string_is_shown_at_once(text: str, stop_strings: list[str]) -> None:
    matcher = StopStringMatcher(stop_strings)
    seen = shown = ""
    for character in text:
        found = matcher.push(character)
        if found.matched is not None:
            return
        seen += character
        shown += found.text
        held = seen[len(shown) :]
        longest = max((n for s in stop_strings for n in range(len(s)) if seen.endswith(s[:n])), default=0)
        assert seen == shown + held
        assert len(held) == longest


def test_a_stop_string_that_almost_matched_is_given_back() -> None:
    assert run(["one EN", "D", "OF", " two"], ["ENDING"]) == (["one ", "", "ENDOF", " two", ""], None)


def test_a_pattern_that_overlaps_itself() -> None:
    assert run(list("aabaaab"), ["aaab"]) == (["", "", "aab", "", "", "", ""], "aaab")


def test_without_stop_strings_everything_passes() -> None:
    assert run(["a", "b"], []) == (["a", "b", ""], None)
