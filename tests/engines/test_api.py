"""The OpenAI API over real sockets, in front of the real engine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.engines.api_server import ApiServer
from tests.engines.eager import eager_store
from thermocline.clock import SystemClock
from thermocline.engines import api
from thermocline.engines.models import Model
from thermocline.engines.transformers import Engine
from thermocline.errors import SettingsError, ThermoclineError
from thermocline.lens import advise, fetch, observe, report
from thermocline.lens.summary import summarise
from thermocline.settings import Settings

WAIT_SECONDS = 60
TEXT = "Which countries border Switzerland, and who told you? " * 8
JSON = {"content-type": "application/json"}


class Client:
    """Asks one server; a new connection each time."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        self.url, self.headers = urlsplit(url), headers or {}

    def send(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        connection = http.client.HTTPConnection(str(self.url.hostname), self.url.port, timeout=WAIT_SECONDS)
        with closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, {**JSON, **self.headers, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def post(self, path: str, **fields: object) -> Any:
        """The decoded answer to a request that succeeds."""
        status, _, body = self.send("POST", path, fields)
        assert status == 200, body
        return json.loads(body)

    def get(self, path: str) -> Any:
        """The decoded answer."""
        status, _, body = self.send("GET", path)
        assert status == 200, body
        return json.loads(body)

    def stream(self, path: str, **fields: object) -> list[Any]:
        """The events of a stream, which ends as it should."""
        status, headers, body = self.send("POST", path, {**fields, "stream": True})
        assert status == 200, body
        assert headers["content-type"] == "text/event-stream"
        *events, done, rest = body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def settings() -> Settings:
    """A small server on a free port."""
    return Settings(port=0, memory_bytes=64 << 20, new_tokens_max=500, prompt_tokens_max=3000, body_bytes_max=100_000)


@pytest.fixture(scope="module")
def engine(model: Model, settings: Settings) -> Iterator[Engine]:
    """An engine with a store."""
    with closing(eager_store(settings)) as store, closing(Engine(model, store, requests_max=8)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine, settings: Settings) -> Iterator[Client]:
    """A client of a server around the engine."""
    with ApiServer(engine, settings) as server:
        yield Client(server.url)


def test_a_completion_has_openais_shape(client: Client, plain: Engine) -> None:
    """Every field that clients read is there, and the text is what the model says."""
    answer = client.post("/v1/completions", model="tiny", prompt=TEXT, max_tokens=5)
    tokens = plain.text.encode(TEXT)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    expected = plain.generate(tokens, 5).text
    choice = {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), 5)
    assert usage["total_tokens"] == len(tokens) + 5


def test_a_chat_has_openais_shape(client: Client, plain: Engine) -> None:
    """The model's template makes the prompt; text may come in parts, a line each; the reply is one message."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    answer = client.post("/v1/chat/completions", model="tiny", messages=messages, max_completion_tokens=5)
    assert answer["object"] == "chat.completion"
    expected = plain.generate(plain.text.encode_chat(messages), 5).text
    message = {"role": "assistant", "content": expected}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    messages[1] = {"role": "user", "content": f"{TEXT[:9]}\n{TEXT[9:]}"}
    whole = client.post("/v1/chat/completions", messages=messages, max_tokens=5)
    messages[1] = {"role": "user", "content": [{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]}
    again = client.post("/v1/chat/completions", messages=messages, max_tokens=5)
    assert again["choices"] == whole["choices"]


def test_prompts_may_be_tokens_and_several(client: Client, plain: Engine) -> None:
    """A text, token ids, and lists of both give the same answers, one choice per prompt in their order."""
    tokens = plain.text.encode(TEXT).tolist()
    one, two = (plain.generate(prompt, 4).text for prompt in (tokens, [7, 8, 9]))
    for prompt, expected in (
        (tokens, [one]),
        ([tokens, [7, 8, 9]], [one, two]),
        ([TEXT, plain.text.decode([7, 8, 9])], None),
    ):
        answer = client.post("/v1/completions", prompt=prompt, max_tokens=4)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        assert answer["usage"]["completion_tokens"] == 4 * len(answer["choices"])
        assert expected is None or [choice["text"] for choice in answer["choices"]] == expected


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_adds_up_to_the_whole(client: Client, path: str) -> None:
    """Pieces have one id and the right shape, add up to the whole answer, and end with usage if asked."""
    fields: dict[str, Any] = {"max_tokens": 12, "stop": ["\x00never"]}
    fields |= {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": TEXT}]}
    whole = client.post(path, **fields)
    events = client.stream(path, **fields)
    assert len({event["id"] for event in events}) == 1
    assert not any("usage" in event for event in events)
    choices = [event["choices"][0] for event in events]
    if path == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        said = "".join(choice["delta"].get("content", "") for choice in choices)
        assert said == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    *events, last = client.stream(path, **fields, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12


def test_several_prompts_stream_side_by_side(client: Client) -> None:
    """The pieces of each prompt carry its index, and each ends by itself."""
    whole = client.post("/v1/completions", prompt=["one two", "three"], max_tokens=6)
    events = client.stream("/v1/completions", prompt=["one two", "three"], max_tokens=6)
    choices = [event["choices"][0] for event in events]
    for at in (0, 1):
        text = "".join(choice["text"] for choice in choices if choice["index"] == at)
        assert text == whole["choices"][at]["text"]
    assert sum(choice["finish_reason"] == "length" for choice in choices) == 2


def test_probabilities_have_openais_shape(client: Client) -> None:
    """Both kinds of answer list the tokens that came with their logarithms, and the likeliest others."""
    completion = client.post("/v1/completions", prompt=TEXT, max_tokens=3, logprobs=2)["choices"][0]
    logprobs = completion["logprobs"]
    assert "".join(logprobs["tokens"]) == completion["text"]
    assert logprobs["text_offset"][0] == 0
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert all(
        max(top.values()) == log for top, log in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )
    messages = [{"role": "user", "content": TEXT}]
    events = client.stream("/v1/chat/completions", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2)
    content = [
        entry
        for event in events
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert len(content) == 3
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)


def test_cached_tokens_and_salts_are_honoured(client: Client) -> None:
    """A second request loads what the first computed; one with another salt does not, and answers the same."""
    prompt = "salted " + TEXT
    first, second, salted, again = (
        client.post("/v1/completions", prompt=prompt, max_tokens=2, cache_salt=salt)
        for salt in (None, None, "mine", "mine")
    )
    tokens = first["usage"]["prompt_tokens"]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, salted, again)]
    assert cached == [0, (tokens - 1) // 32 * 32, 0, (tokens - 1) // 32 * 32]
    assert len({answer["choices"][0]["text"] for answer in (first, second, salted, again)}) == 1


def test_seeds_repeat_and_temperature_varies(client: Client) -> None:
    """The same seed gives the same sampled answer; without one, answers differ."""
    fields = {"prompt": TEXT, "max_tokens": 8, "temperature": 1.5, "top_p": 0.95}
    texts = [client.post("/v1/completions", **fields, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({client.post("/v1/completions", **fields)["choices"][0]["text"] for _ in range(3)}) > 1


def test_receipts_can_be_fetched(client: Client) -> None:
    """Every answer's id names its receipt; the latest come first; none of them has text."""
    prompt = "receipted " + TEXT
    answers = [client.post("/v1/completions", prompt=prompt, max_tokens=1) for _ in range(2)]
    receipt = client.get(f"/receipts/{answers[1]['id']}")
    assert receipt["loaded_tokens"] == answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert client.get("/receipts/last") == receipt
    listed = client.get("/receipts")["data"]
    assert [entry["request"] for entry in listed[:2]] == [answers[1]["id"], answers[0]["id"]]
    assert "receipted" not in json.dumps(listed)


def test_the_last_requests_are_a_trace(client: Client, engine: Engine) -> None:
    """Two requests of one text are two lines with the same numbers; `advise` reads them, and no text is told."""
    for _ in range(2):
        client.post("/v1/completions", prompt="traced " * 200, max_tokens=1)
    status, headers, body = client.send("GET", "/trace")
    assert (status, headers["content-type"]) == (200, "application/jsonl")
    rows = [json.loads(line) for line in body.splitlines()]
    assert len(rows) > 1
    assert rows[-1]["hash_ids"] == rows[-2]["hash_ids"]
    assert "traced" not in body.decode()
    asked = advise.Asked(model="meta-llama/Meta-Llama-3.1-8B", gpu="h100")
    found = advise.of_server(asked, observe.of_url(client.url.geturl()), SystemClock())
    assert next(each.value for each in found.inputs if each.name == "requests") == len(rows)


def test_as_many_receipts_as_asked_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """`limit` says how many receipts are listed, newest first; a body has a bound, and says when it has not all."""
    ids = [client.post("/v1/completions", prompt=f"{n} {TEXT}", max_tokens=1)["id"] for n in range(3)]
    listed = client.get("/receipts?limit=2")
    assert [entry["request"] for entry in listed["data"]] == [ids[2], ids[1]]
    assert client.get("/receipts?limit=0")["data"] == []
    assert len(client.get("/receipts?limit=999999999")["data"]) >= 3
    for wrong in ("-1", "x", "1e9", "1" * 10, "%D9%A3"):
        assert client.send("GET", f"/receipts?limit={wrong}")[0] == 400
    monkeypatch.setattr(api, "RECEIPTS_BYTES_MAX", 800)
    listed = client.get("/receipts?limit=3")
    assert ([entry["request"] for entry in listed["data"]], listed["has_more"]) == ([ids[2]], True)


def test_a_summary_of_a_live_server(client: Client) -> None:
    """What the server lists adds up: every prompt token was loaded, or computed for one reason."""
    for _ in range(2):
        client.post("/v1/completions", prompt="summed up " + TEXT, max_tokens=1)
    listed = report.read_list(fetch.receipts(client.url.geturl(), 1000))
    found = summarise(listed.data)
    assert (found.requests, found.skipped) == (len(listed.data), 0)
    assert found.loaded_tokens > 0
    assert found.loaded_tokens + sum(share.tokens for share in found.by_reason) == found.prompt_tokens
    assert found.last_wall_seconds >= found.first_wall_seconds > 1_700_000_000


def parted(client: Client, name: str) -> str:
    """Two prompts that part at their top; the id of the second one's answer."""
    numbers = np.random.default_rng(list(name.encode())).integers(10_000, size=200)
    for stamp in ("10 o'clock", "11 o'clock"):
        prompt = f"{name} is asked at {stamp}. {numbers.tolist()}"
        answer = client.post("/v1/completions", prompt=prompt, max_tokens=1)
    return str(answer["id"])


def test_an_excerpt_shows_where_two_prompts_part(client: Client) -> None:
    """Asked for it, the server shows at most 80 characters of both prompts around the token where they part."""
    request = parted(client, "Susan")
    receipt = client.get(f"/receipts/{request}?excerpt=1")
    assert receipt["missing"][0]["reason"] == "diverged"
    excerpt = receipt.pop("excerpt")
    assert (excerpt["before"] + excerpt["this"]).startswith("Susan is asked at 11 o'clock. [")
    assert (excerpt["before"] + excerpt["other"]).startswith("Susan is asked at 10 o'clock. [")
    assert excerpt["this"].startswith("1 o'clock")
    assert excerpt["other"].startswith("0 o'clock")
    assert all(len(excerpt["before"] + excerpt[part]) <= 80 for part in ("this", "other"))
    assert client.get(f"/receipts/{request}") == receipt
    assert "clock" not in json.dumps(client.get("/receipts"))
    assert "clock" not in client.send("GET", "/metrics")[2].decode()
    before = client.get("/receipts?limit=2")["data"][1]["request"]
    assert client.get(f"/receipts/{before}?excerpt=1")["excerpt"] is None


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "Via", "X-Real-IP"])
def test_no_excerpt_through_a_proxy(client: Client, header: str) -> None:
    """What a proxy passes on may come from anywhere: it gets the receipt, and no text."""
    request = parted(client, header)
    status, _, body = client.send("GET", f"/receipts/{request}?excerpt=1", headers={header: "192.0.2.1"})
    assert (status, json.loads(body)["error"]["code"]) == (403, "not_local")
    assert client.send("GET", f"/receipts/{request}", headers={header: "192.0.2.1"})[0] == 200


def test_no_excerpt_from_an_open_listener(engine: Engine, tmp_path: Path) -> None:
    """A server that other machines reach shows no text to anybody, whoever has the key."""
    (tmp_path / "key").write_text("open sesame\n")
    settings = Settings(port=0, host="0.0.0.0", api_key_file=tmp_path / "key")  # noqa: S104  # that is what is tested
    with ApiServer(engine, settings) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104  # an address to connect to
        client = Client(url, {"authorization": "Bearer open sesame"})
        request = parted(client, "Open")
        status, _, body = client.send("GET", f"/receipts/{request}?excerpt=1")
        assert (status, json.loads(body)["error"]["code"]) == (403, "not_local")


def test_the_file_of_receipts_has_no_text(model: Model, tmp_path: Path) -> None:
    """What a prompt says is in no line of the file of receipts, also where it parts from another one."""
    path = tmp_path / "receipts.jsonl"
    settings = Settings(port=0, memory_bytes=64 << 20, receipts_path=path)
    with (
        closing(eager_store(settings)) as store,
        closing(Engine(model, store)) as engine,
        ApiServer(engine, settings) as server,
    ):
        request = parted(Client(server.url), "Canary")
    written = path.read_text()
    assert request in written
    assert "diverged" in written
    assert not {"Canary", "clock", "asked"} & set(re.findall(r"[A-Za-z]+", written))


def test_models_health_and_metrics(client: Client) -> None:
    """The served model is listed and says what it is; counters come in Prometheus' format."""
    (card,) = client.get("/v1/models")["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 32768)
    assert "gibberish" in card["description"]
    assert client.get("/v1/models/tiny") == card
    assert client.get("/health") == {"status": "ok"}
    client.post("/v1/completions", prompt="a", max_tokens=1)
    status, headers, body = client.send("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = body.decode().splitlines()
    assert any(line.startswith('thermocline_requests_total{route="/v1/completions",status="200"}') for line in lines)
    assert any(line.startswith("thermocline_requests_in_flight ") for line in lines)


BAD = [
    (b"", 400, None, "not JSON"),
    (b"{", 400, None, "not JSON"),
    (b"[]", 400, None, "object"),
    (b'{"prompt": "\xff"}', 400, None, "not JSON"),
    (b"[" * 50_000, 400, None, ""),
    ({}, 400, "prompt", "prompt"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": []}, 400, "prompt", "entries"),
    ({"prompt": [[]]}, 400, "prompt", "empty"),
    ({"prompt": ["a", ""]}, 400, "prompt", "empty"),
    ({"prompt": 5}, 400, "prompt", "str"),
    ({"prompt": [1, "a"]}, 400, "prompt", "token ids"),
    ({"prompt": [1.5]}, 400, "prompt", "token ids"),
    ({"prompt": [-1]}, 400, "prompt", "token ids"),
    ({"prompt": [4096]}, 400, "prompt", "vocabulary"),
    ({"prompt": [1 << 40]}, 400, "prompt", "token ids"),
    ({"prompt": [5] * 3001}, 400, "prompt", "3000 are the limit"),
    ({"prompt": ["a"] * 65}, 400, "prompt", "65 entries"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", ">= 1"),
    ({"prompt": "a", "max_tokens": 501}, 400, "max_tokens", "at most 500"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "int"),
    ({"prompt": "a", "max_tokens": 5.5}, 400, "max_tokens", "int"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", ">= 0"),
    ({"prompt": "a", "temperature": 2.1}, 400, "temperature", "<= 2"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "> 0"),
    ({"prompt": "a", "seed": 1 << 70}, 400, "seed", ""),
    ({"prompt": "a", "stop": [""]}, 400, "stop", "length"),
    ({"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "length"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream", "bool"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "<= 20"),
    ({"prompt": "a", "n": 2}, 400, "n", "not supported"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of", "not supported"),
    ({"prompt": "a", "echo": True}, 400, "echo", "not supported"),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    ({"prompt": "a", "cache_salt": 5}, 400, "cache_salt", "str"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "model", "not served here"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD, ids=range(len(BAD)))
def test_bad_completions_are_refused(client: Client, body: object, status: int, param: str | None, words: str) -> None:
    """Whatever is wrong with a request: OpenAI's error, the field's name, a hint, and no harm to the server."""
    got, _, answer = client.send("POST", "/v1/completions", body)
    error = json.loads(answer)["error"]
    assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]
    assert " hint: " in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "x " * 4000}]}, "prompt"),
    ],
)
def test_bad_chats_are_refused(client: Client, fields: dict[str, object], param: str) -> None:
    """Conversations that are malformed, more than text, or too long are refused by name."""
    status, _, answer = client.send("POST", "/v1/chat/completions", fields)
    assert (status, json.loads(answer)["error"]["param"]) == (400, param)


def test_neutral_and_unknown_fields_do_no_harm(client: Client) -> None:
    """What clients send by habit, with values that change nothing, is accepted."""
    habits = {"n": 1, "tools": [], "logit_bias": {}, "presence_penalty": 0, "response_format": {"type": "text"}}
    client.post("/v1/completions", prompt="a", max_tokens=1, user="me", metadata={"a": "b"}, echo=None, **habits)


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, None, 404, "not_found"),
        ("GET", "/v1/models/gpt-4", {}, None, 404, "model_not_found"),
        ("GET", "/receipts/nothing", {}, None, 404, "not_found"),
        ("GET", "/v1/completions", {}, None, 405, "method_not_allowed"),
        ("POST", "/v1/completions", {"content-type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
        ("POST", "/v1/completions", {}, b"x" * 100_001, 413, "body_too_large"),
        ("GET", "/health", {"host": "evil.example:80"}, None, 403, "wrong_host"),
    ],
)
def test_what_is_not_served_is_refused(
    client: Client, method: str, path: str, headers: dict[str, str], body: bytes | None, status: int, code: str
) -> None:
    """Unknown routes and methods, foreign hosts, other content types and large bodies get OpenAI's error."""
    got, _, answer = client.send(method, path, body, headers)
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, code)
    assert " hint: " in error["message"]


def test_a_client_that_leaves_stops_its_generation(client: Client, engine: Engine) -> None:
    """When the reader of a stream, or of a whole answer, is gone, nothing more is computed for it."""
    for stream in (True, False):
        body = json.dumps({"prompt": "endless", "max_tokens": 500, "ignore_eos": True, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        sock = socket.create_connection((client.url.hostname, client.url.port))
        sock.sendall(head.encode() + body)
        if stream:
            sock.recv(100)
        sock.close()
        before = engine.metrics.value("generated_tokens_total")
        while engine._running or engine._waiting:
            time.sleep(0.01)
        assert engine.metrics.value("generated_tokens_total") - before < 500


def test_too_many_requests_are_refused(client: Client, engine: Engine) -> None:
    """Beyond requests_max an answer is 429 with OpenAI's type, and a batch that does not fit leaves nothing running."""
    status, _, answer = client.send("POST", "/v1/completions", {"prompt": ["a"] * 9, "max_tokens": 400})
    assert (status, json.loads(answer)["error"]["type"]) == (429, "rate_limit_error")
    while engine._running or engine._waiting:
        time.sleep(0.01)
    assert client.post("/v1/completions", prompt=["a"] * 8, max_tokens=1)["usage"]["completion_tokens"] == 8


def test_requests_of_many_clients_agree(client: Client) -> None:
    """Six clients at once get what each would get alone."""
    prompts = [f"{at} {TEXT}" for at in range(6)]
    alone = [client.post("/v1/completions", prompt=prompt, max_tokens=6)["choices"] for prompt in prompts]
    together: dict[int, Any] = {}

    def ask(at: int) -> None:
        together[at] = client.post("/v1/completions", prompt=prompts[at], max_tokens=6)["choices"]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[at] for at in range(6)] == alone


def test_a_key_protects_everything_but_health(engine: Engine, tmp_path: Path) -> None:
    """With an API key, every route but /health wants it, and says so; no part of the key helps."""
    (tmp_path / "key").write_text("open sesame\n")
    settings = Settings(port=0, api_key_file=tmp_path / "key")
    with ApiServer(engine, settings) as server:
        assert Client(server.url).get("/health") == {"status": "ok"}
        assert Client(server.url, {"authorization": "Bearer open sesame"}).get("/v1/models")
        for header in ("", "Bearer", "Bearer open", "Basic open sesame", "Bearer open sesame2"):
            status, _, answer = Client(server.url, {"authorization": header}).send("GET", "/metrics")
            error = json.loads(answer)["error"]
            assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")


def test_a_keyed_engine_behind_a_keyed_gateway(engine: Engine, tmp_path: Path) -> None:
    """The gateway takes its clients' key, and gives instances theirs: neither sees the other's, nor does a client."""
    pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
    from tests.gateway.serving import World
    from thermocline.gateway.admission import Keys
    from thermocline.gateway.serve import _instance_key

    (tmp_path / "key").write_text("sesame\n")
    body = {"prompt": [1, 2, 3], "max_tokens": 1}
    with ApiServer(engine, Settings(port=0, api_key_file=tmp_path / "key")) as server, World() as world:
        door = world.gateway([urlsplit(server.url).port], keys=Keys.of_one("clients"))
        client = Client(f"http://127.0.0.1:{door.port}", {"authorization": "Bearer clients"})
        assert client.send("POST", "/v1/completions", body)[0] == 401, "the engine asks for no key"
        door.gateway.instance_key = _instance_key(tmp_path / "key")
        assert client.post("/v1/completions", **body)["usage"]["prompt_tokens"] == 3
        stranger = Client(f"http://127.0.0.1:{door.port}", {"authorization": "Bearer sesame"})
        assert stranger.send("POST", "/v1/completions", body)[0] == 401
        behind_none = world.gateway([urlsplit(server.url).port])
        behind_none.gateway.instance_key = _instance_key(tmp_path / "key")
        sent = Client(f"http://127.0.0.1:{behind_none.port}", {"authorization": "Bearer wrong"})
        assert sent.post("/v1/completions", **body), "what a client sends goes nowhere"
    (tmp_path / "key").write_text("two words\n")
    with pytest.raises(SettingsError, match="cannot be one"):
        _instance_key(tmp_path / "key")


def test_a_port_in_use_is_an_error_with_a_hint(client: Client, engine: Engine) -> None:
    """The second server on a port says so, and what to do."""
    with pytest.raises(ThermoclineError, match="cannot listen") as refused:
        ApiServer(engine, Settings(port=client.url.port))
    assert "--port" in refused.value.hint


@pytest.mark.slow
def test_serve_announces_answers_and_flushes(cache_home: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """`thermocline serve` says where it listens, answers, and on SIGTERM makes everything durable and exits with 0."""
    command = [sys.executable, "-m", "thermocline", "serve", "--json", "--port", "0", "--threads", "1"]
    command += ["--memory-bytes", "64MiB", "--disk-path", str(tmp_path / "disk"), "--disk-bytes", "64MiB"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    cached, reasons = [], []
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
            assert server.stdout is not None
            announced = json.loads(server.stdout.readline())
            assert announced["model"] == "tiny"
            answer = Client(announced["url"]).post("/v1/completions", prompt=TEXT, max_tokens=1)
            assert answer["usage"]["prompt_tokens"] > 64
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            receipt = Client(announced["url"]).get("/receipts/last")
            reasons.append({part["reason"] for part in receipt["missing"]})
            server.send_signal(number)
            _, errors = server.communicate(timeout=WAIT_SECONDS)
            assert (server.returncode, b"Traceback" in errors) == (0, False)
    assert cached[0] == 0
    assert cached[1] >= 64 or reasons[1] & {"late", "declined"}  # as a busy machine may have it


def test_the_same_text_has_the_same_tokens_however_long(plain: Engine) -> None:
    """Texts that are tokenised aside give the tokens that they give at once."""
    assert np.array_equal(plain.text.encode(TEXT * 50)[:50], plain.text.encode(TEXT)[:50])
