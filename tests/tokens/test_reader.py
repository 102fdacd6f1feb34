"""From a request's body to the ids that the model's engine will have."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokens.templates_written import CALL, CONVERSATIONS, NAMES, TEMPLATES, TOOLS
from tests.tokens.test_memo import ROOT, Chain, keys_of
from tests.tokens.tokenizers_made import llama_3
from thermocline.blocks.key import block_keys
from thermocline.clock import SystemClock
from thermocline.engines import tiny
from thermocline.engines.text import Text
from thermocline.tokens.chat import messages_of
from thermocline.tokens.prompt import prompt_of
from thermocline.tokens.reader import Reader

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.fixture(scope="module", params=["qwen_3", "gemma"])
def both(request, tmp_path_factory) -> tuple[Reader[Chain], PreTrainedTokenizerFast]:
    """A model's folder, read by us and by transformers."""
    path = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=llama_3(), chat_template=TEMPLATES[request.param], **NAMES
    ).save_pretrained(path)
    return Reader(path, clock=SystemClock(), memo_bytes=1 << 20), PreTrainedTokenizerFast.from_pretrained(path)


def read(reader: Reader[Chain], path: str, **fields):
    prompt = prompt_of(path, json.dumps(fields).encode())
    return reader.read(prompt, keys_of)


def test_a_conversation_grows_turn_by_turn(both):
    """Every turn's ids and keys are those of transformers for the whole, and most of them were known before."""
    reader, theirs = both
    messages = []
    for turn in range(6):
        messages.append({"role": "user", "content": f"Question {turn}.\nGrüße " + "more words " * 60})
        found = read(reader, CHAT, model="m", messages=messages)
        whole = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found.tokens.tolist() == whole
        assert found.chain == block_keys(found.tokens, root=ROOT, tokens_per_block=16)
        assert turn < 2 or found.known_tokens > len(whole) * (turn - 1) / (turn + 1)
        messages.append({"role": "assistant", "content": "An answer. " * 20})


def test_completions_are_texts_or_ids(both):
    """A text gets special tokens around it unless the request wants none; ids are taken as they are."""
    reader, theirs = both
    assert read(reader, COMPLETIONS, prompt="a text").tokens.tolist() == theirs.encode("a text")
    bare = read(reader, COMPLETIONS, prompt="a text", add_special_tokens=False)
    assert bare.tokens.tolist() == theirs.encode("a text", add_special_tokens=False)
    assert read(reader, COMPLETIONS, prompt=[5, 6, 7]).tokens.tolist() == [5, 6, 7]


def test_what_only_the_engine_can_read_is_none(both):
    """Images, templates of the request's own, refused messages, odd prompts: the engine's affair, and no error."""
    reader, _ = both
    messages = [{"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]}]
    assert read(reader, CHAT, messages=messages) is None
    assert read(reader, CHAT, messages=[{"role": "user", "content": 3}]) is None
    assert read(reader, CHAT, messages=[{"content": "no role"}]) is None
    assert read(reader, CHAT, messages=CONVERSATIONS["one"], chat_template="{{ 1 }}") is None
    assert read(reader, CHAT, messages=CONVERSATIONS["one"], tools=[{"type": "function"}]) is None
    assert read(reader, COMPLETIONS, prompt=["text", 5]) is None
    assert read(reader, COMPLETIONS, prompt=[1, -2]) is None
    assert read(reader, "/v1/embeddings", input="text") is None


def test_messages_have_the_form_that_vllm_gives_them():
    """Parts or plain text as the template wants it, arguments as objects, fields that no template knows left out."""
    call = CALL | {"function": {"name": "weather", "arguments": '{"town": "Bern"}'}}
    broken = CALL | {"function": {"name": "weather", "arguments": "{"}}
    raw = json.dumps(
        [
            {"role": "developer", "content": "Be brief.", "tools": []},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "x": 1},
            {"role": "assistant", "content": None, "tool_calls": [call, broken], "refusal": None},
            {"role": "tool", "content": [{"type": "text", "text": "c"}], "tool_call_id": "i"},
            {"role": "assistant", "content": "d", "tool_calls": [], "reasoning_content": "hm", "name": "n"},
        ]
    ).encode()
    plain = messages_of(raw, in_parts=False, knows_developer=False)
    arguments = [{"town": "Bern"}, {}]
    calls = [CALL | {"function": {"name": "weather", "arguments": given}} for given in arguments]
    assert plain == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "c", "tool_call_id": "i"},
        {"role": "assistant", "content": "d", "reasoning": "hm", "reasoning_content": "hm", "name": "n"},
    ]
    parts = messages_of(raw, in_parts=True)
    assert parts[0] == {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    assert parts[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (parts[2]["content"], parts[3]["content"]) == ([], "c")


def test_tools_are_part_of_the_text(both):
    """A request with tools renders them as the template does."""
    reader, theirs = both
    found = read(reader, CHAT, messages=CONVERSATIONS["one"], tools=TOOLS)
    whole = theirs.apply_chat_template(CONVERSATIONS["one"], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert found.tokens.tolist() == whole


def test_the_engine_and_the_reader_agree():
    """For the built-in model the gateway's ids are those of the engine's own API."""
    reader: Reader[Chain] = Reader(tiny.ensure(), clock=SystemClock(), memo_bytes=1 << 20)
    engine = Text(PreTrainedTokenizerFast.from_pretrained(tiny.ensure()))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    assert read(reader, CHAT, messages=messages).tokens.tolist() == engine.encode_chat(messages).tolist()
    assert read(reader, COMPLETIONS, prompt="Hello there").tokens.tolist() == engine.encode("Hello there").tolist()
