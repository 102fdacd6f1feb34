"""What is read of a body is what matters for routing, whatever the body."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.tokens.chunks import CHUNK_BYTES, PROMPT_CHUNK_BYTES, BytesPerToken, chunk_keys, chunk_seed
from thermocline.tokens.prompt import Kind, Prompt, front_of, prompt_in, prompt_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def read(path: str, **fields) -> Prompt | None:
    return prompt_of(path, json.dumps(fields).encode())


def test_prompts_of_every_kind_are_found():
    """Chats, texts, token ids, responses and embeddings each have their prompt; nothing else has one."""
    chat = read(CHAT, model="m", messages=[{"role": "user", "content": "hi"}], cache_salt="s")
    assert (chat.kind, chat.model, chat.salt, chat.exact, chat.special) == (Kind.CHAT, "m", "s", True, False)
    assert (read(COMPLETIONS, prompt="a text").kind, read(COMPLETIONS, prompt="a text").special) == (Kind.TEXT, True)
    assert read(COMPLETIONS, prompt="gr\u00fc\u00dfe \n").text() == "grüße \n"
    assert read(COMPLETIONS, prompt=["one", "two"]).text() == "one"
    assert read(COMPLETIONS, prompt=[1, 2, 3]).ids().tolist() == [1, 2, 3]
    assert prompt_of(COMPLETIONS, b'{"prompt": [ [7, 8], [9]]}').ids().tolist() == [7, 8]
    assert read("/v1/responses", input="hi", instructions="be brief").kind is Kind.OTHER
    assert not read("/v1/embeddings", input=["hi"]).exact
    assert read("/v1/models", input="hi") is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"prompt": ""}',
        b'{"prompt": []}',
        b'{"prompt": null}',
        b'{"model": 3, "prompt": "a"}',
        b"\xff",
    ],
)
def test_what_is_no_prompt_is_none(body):
    """A body that is no request is left to the engine to refuse."""
    assert prompt_of(COMPLETIONS, body) is None
    assert prompt_of(CHAT, body.replace(b"prompt", b"messages")) is None


@pytest.mark.parametrize("kwargs", [b'{"a": 1e999}', b'{"a": "\xff"}', b"[" * 5000 + b"]" * 5000])
def test_variables_that_cannot_be_read_are_left_to_the_engine(kwargs):
    """What the template would be told, and is no JSON that we can read, makes the prompt none of ours."""
    body = b'{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": %b}' % kwargs
    assert prompt_of(CHAT, body) is None
    try:
        front = front_of(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    assert prompt_in(CHAT, front) is None


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template": "x"},
        {"continue_final_message": True},
        {"documents": [{"a": "b"}]},
        {"truncate_prompt_tokens": 5},
    ],
)
def test_what_only_the_engine_knows_is_not_exact(more):
    """Fields that change a prompt in other ways make it a guess; at their neutral values they do not."""
    messages = [{"role": "user", "content": "hi"}]
    assert not read(CHAT, messages=messages, **more).exact
    assert read(CHAT, messages=messages, **dict.fromkeys(more)).exact


def test_variables_are_vllms():
    """Reasoning effort reaches the template as vLLM passes it on, beside what the request gives."""
    messages = [{"role": "user", "content": "hi"}]
    assert read(CHAT, messages=messages).variables == {}
    assert read(CHAT, messages=messages, chat_template_kwargs={"a": 1}).variables == {"a": 1}
    effort = {"reasoning_effort": "none", "enable_thinking": False}
    assert read(CHAT, messages=messages, reasoning_effort="none").variables == effort
    given = {"enable_thinking": True}
    asked = read(CHAT, messages=messages, reasoning_effort="none", chat_template_kwargs=given).variables
    assert asked == {"reasoning_effort": "none", "enable_thinking": True}


@given(st.binary(max_size=200), st.sampled_from([CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings"]))
@settings(max_examples=300, deadline=None)
def test_no_body_breaks_the_reader(body, path):
    """Any bytes are a prompt or none."""
    for bytes_ in (body, b'{"prompt":' + body + b"}", b'{"messages":[' + body + b"]}"):
        found = prompt_of(path, bytes_)
        assert found is None or found.chunks(b"") == found.chunks(b"")


@given(st.lists(st.text(max_size=300), min_size=2, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_turn_extends_the_chunks_of_the_one_before(texts, compact):
    """What a conversation adds leaves every earlier chunk as it was, in chats and in plain prompts."""
    separators = (",", ":") if compact else None
    turns = [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]
    found: list[list[int]] = []
    for count in range(1, len(texts) + 1):
        body = json.dumps({"model": "m", "messages": turns[:count], "n": count}, separators=separators).encode()
        prompt = prompt_of(CHAT, body)
        found.append(prompt.chunks(b"salt"))
        assert len(found[-1]) >= (len(prompt.raw) - 2) // PROMPT_CHUNK_BYTES - 1
    for before, after in pairwise(found):
        assert after[: len(before)] == before


def test_chunks_of_other_salts_models_and_tools_differ():
    """The same text under another salt, for another model or behind other tools has no chunk in common."""
    messages = [{"role": "user", "content": "word " * 200}]
    bodies = [{"model": "m"}, {"model": "n"}, {"model": "m", "tools": [{"type": "function"}]}]
    found = [set(read(CHAT, messages=messages, **body).chunks(salt)) for body in bodies for salt in (b"", b"s")]
    assert len(set.union(*found)) == sum(map(len, found))
    assert chunk_seed(b"a", b"bc") != chunk_seed(b"ab", b"c")


@given(st.binary(max_size=3000), st.binary(max_size=600))
def test_chunk_keys_chain(one, more):
    """A longer text's keys begin with those of the shorter, and a changed byte changes all keys behind it."""
    keys = chunk_keys(one, 7)
    assert len(keys) == len(one) // CHUNK_BYTES
    assert chunk_keys(one + more, 7)[: len(keys)] == keys
    if keys:
        assert not set(chunk_keys(bytes([one[0] ^ 1]) + one[1:], 7)) & set(keys)


def test_bytes_per_token_are_learned():
    """After some answers the estimate is near what the model does, and a wild one moves it by little."""
    ratio = BytesPerToken()
    for _ in range(200):
        ratio.learn(30_000, 10_000)
    assert ratio.tokens(3000) == pytest.approx(1000, rel=0.05)
    ratio.learn(1_000_000, 1)
    assert ratio.tokens(3000) == pytest.approx(1000, rel=0.1)
