"""Text appears while it is written: the pieces join to the whole, and stop strings never show."""

from hypothesis import example, given
from hypothesis import strategies as st

from open_lm.generation.stops import StopSearch, until_stop
from open_lm.generation.stream import TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def run(text, stops):
    shown, tokens, stream = [], [], None
    stream = TextStream(Bytes(), stops, shown.append)
    for byte in text.encode():
        tokens.append(byte)
        if stream.watch(0, tokens):
            break
    return stream.finish(tokens), shown


@given(
    st.text(alphabet="ab\n é漢🙂", max_size=30), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=2)
)
def test_the_pieces_join_to_the_text_before_the_first_stop_string(text, stops):
    whole, shown = run(text, stops)
    assert whole == "".join(shown) == until_stop(text, stops)
    assert "\ufffd" not in whole


def test_a_piece_is_shown_as_soon_as_it_is_certain():
    assert run("xéEND more", ["END"]) == ("xé", ["x", "é"])
    assert run("EN x", ["END"]) == ("EN x", ["EN ", "x"])


def test_of_two_stop_strings_the_first_to_be_complete_counts():
    assert until_stop("one two three", ["three", "two"]) == "one "
    assert until_stop("one two three", ["one two three", "two"]) == "one "


def first_complete(text, stops):
    """The text before a stop string, by trying every end."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@example("aaab", ["aab"])
@example("abaabab", ["abab", "abaaba"])
@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3))
def test_stop_strings_are_found_and_their_beginnings_known_as_by_trying_every_place(text, stops):
    assert until_stop(text, stops) == first_complete(text, stops)
    search = StopSearch(stops)
    begun = text if (begin := search.find(text)) is None else ""
    if begin is None:
        beginnings = [n for stop in stops for n in range(1, len(stop)) if begun.endswith(stop[:n])]
        assert search.n_begun == max(beginnings, default=0)


def test_a_token_costs_the_same_however_long_the_stop_strings_are():
    """Counted in comparisons of characters: a token used to cost a slice and a comparison for each of theirs."""

    class Counting(str):
        n = 0

        def endswith(self, *args):
            Counting.n += 1
            return super().endswith(*args)

        def __getitem__(self, key):
            Counting.n += 1
            return super().__getitem__(key)

    n_of = []
    for length in (10, 1000):
        Counting.n = 0
        stream = TextStream(Bytes(), [Counting("a" * length + "b")])
        tokens = []
        for byte in b"a" * 3000:
            tokens.append(byte)
            stream.watch(0, tokens)
        n_of.append(Counting.n)
    assert n_of[1] < 2 * n_of[0]
