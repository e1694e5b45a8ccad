"""Text appears while it is written: the pieces join to the whole, and stop strings never show."""

from hypothesis import given
from hypothesis import strategies as st

from open_lm.generation.stream import TextStream, until_stop


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
