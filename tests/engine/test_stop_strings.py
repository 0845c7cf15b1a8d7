"""Stop strings against their naive definition on the whole text, for any cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine.stop_strings import StopStrings, _Automaton


def _first_match(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Start and stop string: earliest start, of those the shortest."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


def _settled(text: str, stops: tuple[str, ...]) -> tuple[int, bool]:
    """How much of `text` is certain whatever follows, and whether a match is."""
    match = _first_match(text, stops)
    for start in range(len(text)):
        if match is not None and start == match[0]:
            return start, True
        if any(stop.startswith(text[start:]) for stop in stops):
            return start, False
    return len(text), False


ALPHABETS = ["ab", "abc", "あい。", "😀👨‍👩‍👧", "\n\r #"]


@st.composite
def texts_and_stops(draw: st.DrawFn) -> tuple[list[str], tuple[str, ...]]:
    letters = st.text(st.sampled_from(list(draw(st.sampled_from(ALPHABETS)))), max_size=6)
    stops = draw(st.lists(letters.filter(bool), max_size=5))
    return draw(st.lists(letters, max_size=12)), tuple(stops)


@settings(max_examples=1500)
@given(case=texts_and_stops())
def test_any_split_gives_the_naive_result_and_holds_back_no_more_than_needed(case) -> None:
    pieces, stops = case
    watcher, text, shown = StopStrings(stops), "", ""
    for piece in pieces:
        text += piece
        safe, matched = watcher.push(piece)
        shown += safe
        certain, ended = _settled(text, stops)
        assert shown == text[:certain]
        assert (matched is not None) == ended
        if ended:
            assert matched == _first_match(text, stops)[1]
            break
    shown += watcher.finish()
    match = _first_match(text, stops)
    assert shown == (text if match is None else text[: match[0]])
    assert watcher.matched == (None if match is None else match[1])


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        (["Hello", "\n", "\nUser: hi"], ("\n\nUser:",), "Hello", "\n\nUser:"),
        (["aab", "ab", "c"], ("ababc",), "a", "ababc"),
        (["xabcd"], ("bc", "abcd"), "x", "abcd"),
        (["xabc", "e"], ("bc", "abcd"), "xa", "bc"),
        (["ab"], ("abc", "ab"), "", "ab"),
        (["終わり", "ま", "した。続き"], ("ました。",), "終わり", "ました。"),
        (["a👨‍👩", "‍👧b"], ("👨‍👩‍👧",), "a", "👨‍👩‍👧"),
        (["nothing"], (), "nothing", None),
        (["almost <", "en"], ("<end>",), "almost <en", None),
    ],
)
def test_known_cases(pieces, stops, shown, matched) -> None:
    watcher = StopStrings(stops)
    text = "".join(watcher.push(piece)[0] for piece in pieces) + watcher.finish()
    assert (text, watcher.matched) == (shown, matched)


def test_a_match_that_waits_for_an_earlier_one_counts_when_the_text_ends() -> None:
    watcher = StopStrings(("bc", "abcd"))
    assert watcher.push("xabc") == ("x", None)
    assert watcher.finish() == "a"
    assert watcher.matched == "bc"


def test_nothing_is_certain_after_the_match() -> None:
    watcher = StopStrings(("b",))
    assert watcher.push("abc") == ("a", "b")
    assert watcher.push("more") == ("", "b")
    assert watcher.finish() == ""


def test_text_that_cannot_begin_a_match_is_shown_at_once() -> None:
    watcher = StopStrings(("END",))
    assert watcher.push("the e") == ("the e", None)
    assert watcher.push("E") == ("", None)
    assert watcher.push("") == ("", None)
    assert watcher.push("n") == ("En", None)


class Counted(str):
    """A character that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__ne__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("text", ["a" * 5000, ("a" * 998 + "c") * 5, "a" * 999 + "b", "ab" * 2500])
def test_comparisons_grow_with_the_text_alone(text: str) -> None:
    # Looking for the stop string anew at every place would compare up to 1,000 characters at each.
    automaton, Counted.comparisons = _Automaton("a" * 999 + "b"), 0
    for character in text:
        automaton.advance(Counted(character))
    assert Counted.comparisons <= 4 * len(text)


def test_a_long_false_start_is_shown_once_it_is_one() -> None:
    watcher = StopStrings(("a" * 999 + "b",))
    shown = "".join(watcher.push("a")[0] for _ in range(3000))
    assert shown == "a" * 2001
    assert watcher.push("c") == ("a" * 999 + "c", None)
