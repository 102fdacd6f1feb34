"""Text that comes in pieces is the text that would have come whole, and no piece is broken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.engines.models import Model
from thermocline.engines.text import BROKEN, Text, TextStream
from thermocline.errors import RequestError

TEXTS = ["Grüße, 世界! 🌊🏳️‍🌈 e\u0301", "plain words, and more of them", "नमस्ते दुनिया", "\n\t  spaces  \n"]


@pytest.fixture(scope="module")
def text(model: Model) -> Text:
    """The built-in model's tokenizer."""
    return Text(model.tokenizer)


@pytest.mark.parametrize("whole", TEXTS)
def test_no_piece_is_broken(text: Text, whole: str) -> None:
    """Characters of several tokens arrive whole, in the piece of their last token."""
    stream = TextStream(text)
    pieces = [stream.feed(token) for token in text.encode(whole).tolist()] + [stream.finish()]
    assert "".join(pieces) == whole
    assert not any(BROKEN in piece for piece in pieces)


@given(tokens=st.lists(st.integers(2, 4095), max_size=40))
@settings(max_examples=100)
def test_any_tokens_give_their_text(model: Model, tokens: list[int]) -> None:
    """Pieces of random tokens, broken characters among them, add up to the decoded whole."""
    text = Text(model.tokenizer)
    stream = TextStream(text)
    assert "".join([*(stream.feed(token) for token in tokens), stream.finish()]) == text.decode(tokens)


@given(data=st.data(), whole=st.sampled_from(TEXTS[:2]))
@settings(max_examples=100)
def test_stop_strings_cut_the_text(model: Model, data: st.DataObject, whole: str) -> None:
    """The text ends before the first stop string, of which no piece ever shows a part."""
    text = Text(model.tokenizer)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 6))]
    stream = TextStream(text, ("\x00never", stop))
    said = ""
    for token in text.encode(whole).tolist():
        said += stream.feed(token)
        assert whole.startswith(said)
        assert stop not in said
        if stream.stopped:
            break
    assert stream.stopped
    assert said + stream.finish() == whole[: whole.index(stop)]


def test_what_was_held_back_comes_at_the_end(text: Text) -> None:
    """The beginning of a stop string that never came is text."""
    stream = TextStream(text, ("wordsmith",))
    said = "".join(stream.feed(token) for token in text.encode("plain words").tolist())
    assert said == "plain "
    assert stream.finish() == "words"
    assert not stream.stopped


def test_chats_use_the_models_template(text: Text) -> None:
    """A conversation becomes the tokens of the template's text; a template that refuses is a request error."""
    tokens = text.encode_chat([{"role": "user", "content": "Hello"}])
    assert tokens.dtype == np.uint32
    assert tokens[0] == 0
    assert text.decode(tokens.tolist()) == "[user] Hello\n[assistant]"
    with pytest.raises(RequestError, match="template"):
        text.encode_chat([{"role": "user"}])


def test_a_model_without_a_template_refuses_chats(model: Model) -> None:
    """Where no template is, the way out is named."""

    class Bare:
        chat_template = None

    with pytest.raises(RequestError) as refused:
        Text(Bare()).encode_chat([])
    assert "/v1/completions" in refused.value.hint
