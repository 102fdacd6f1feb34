"""The OpenAI API as values: what is read, what is refused, how answers and errors look."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import ModelError, RequestError
from thermocline.wire import openai

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*openai.CompletionRequest.__struct_fields__, *openai.ChatRequest.__struct_fields__, *openai.NEUTRAL]


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=6), st.booleans())
def test_any_json_is_read_or_refused(fields: dict[str, object], chat: bool) -> None:  # noqa: FBT001  # drawn
    """Whatever a body holds, it becomes a request within the bounds, or a request error with a hint."""
    body = json.dumps(fields).encode()
    try:
        if chat:
            [message.text() for message in openai.read(body, openai.ChatRequest).messages]
        else:
            openai.read(body, openai.CompletionRequest).prompts()
    except RequestError as error:
        seen = (error.status, bool(error.hint))
    else:
        seen = (400, True)
    assert seen == (400, True)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Bytes that are no JSON at all are refused as such."""
    with pytest.raises(RequestError) as refused:
        openai.read(body, openai.CompletionRequest)
    assert refused.value.status == 400


@pytest.mark.parametrize("name", openai.NEUTRAL)
def test_unsupported_fields_are_never_ignored(name: str) -> None:
    """Each such field is refused by name, unless it is null or asks for nothing special."""
    with pytest.raises(RequestError, match=f"{name} is not supported") as refused:
        openai.read(json.dumps({"prompt": "a", name: {"some": "thing"}}).encode(), openai.CompletionRequest)
    assert (refused.value.param, refused.value.code) == (name, "unsupported")
    for value in (None, *openai.NEUTRAL[name]):
        openai.read(json.dumps({"prompt": "a", name: value}).encode(), openai.CompletionRequest)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RequestError("no", hint="yes", param="n", code="c"), "invalid_request_error", "c"),
        (RequestError("no", hint="yes", status=401, param="n"), "authentication_error", None),
        (RequestError("no", hint="yes", status=429, param="n"), "rate_limit_error", None),
        (RequestError("no", hint="yes", status=503, param="n"), "server_error", None),
    ],
)
def test_errors_have_openais_shape(error: RequestError, kind: str, code: str | None) -> None:
    """Message with the hint in it, type, field and code, as clients read them."""
    expected = {"message": "no. hint: yes", "type": kind, "param": "n", "code": code}
    assert json.loads(openai.error_body(error)) == {"error": expected}


def test_other_errors_are_the_servers() -> None:
    """An error that is no fault of the request says so."""
    error = json.loads(openai.error_body(ModelError("broken", hint="mend it")))["error"]
    assert error == {"message": "broken. hint: mend it", "type": "server_error", "param": None, "code": None}


def test_an_event_is_one_line() -> None:
    """A server-sent event has no line break inside, whatever the text."""
    choice = openai.CompletionChoice(index=0, text="a\nb\r\n\u2028")
    answer = openai.Answer(id="x", object="y", created=1, model="z", choices=[choice])
    event = openai.event(answer)
    assert event.startswith(b"data: {")
    assert event.count(b"\n") == 2
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:])["choices"][0]["text"] == "a\nb\r\n\u2028"
    assert b"usage" not in event
