"""Parsers of outside bytes, each with what may come of any bytes at all, and valid bytes to begin with."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tests.fuzz.node import REPLY_SEEDS, SESSION_SEEDS, feed_replies, feed_session
from tests.fuzz.resp import REQUEST_SEEDS, REQUEST_WORDS, feed_requests, feed_server
from tests.wire.batches import ARRAYS, EVENTS, OTHERS, packed
from thermocline.errors import RequestError
from thermocline.gateway.admission import read_front, spliced
from thermocline.tokens.prompt import prompt_of
from thermocline.wire import messages as say
from thermocline.wire.events import (
    Batch,
    BlockStored,
    Topic,
    read_batch,
    read_topic,
    write_batch,
    write_topic,
)


@dataclass(frozen=True, slots=True)
class Target:
    """`feed` takes any bytes, and raises where the parser does what it must not. `seeds` are bytes it understands.

    `words` are parts of what it understands, for parsers in C, whose branches no fuzzer sees.
    """

    name: str
    feed: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()


def _events(payload: bytes) -> None:
    """A batch is refused as such, or it is made of bounded values that are written and read again as they are."""
    try:
        batch = read_batch(payload)
    except say.MessageError:
        return
    assert 0 <= batch.skipped <= len(payload)
    assert len(batch.events) + batch.skipped <= len(payload)
    for event in batch.events:
        if isinstance(event, BlockStored):
            assert len(event.tokens) + len(event.hashes) <= len(payload)
            assert event.block_tokens > 0
    again = read_batch(write_batch(batch)).events
    assert again == batch.events or repr(again) == repr(batch.events)  # a number that is none is not equal to itself


def _topics(payload: bytes) -> None:
    """A topic names an instance and a model, or nobody."""
    topic = read_topic(payload.decode(errors="replace"))
    assert topic is None or read_topic(write_topic(topic)) == topic


def _says(decode: Callable[[bytes], say.FromClient | say.FromNode]) -> Callable[[bytes], None]:
    def feed(payload: bytes) -> None:
        """A message is refused as such, or comes back from its bytes; a stream in any pieces is the same stream."""
        try:
            message = decode(payload)
        except say.MessageError:
            message = None
        if message is not None:
            (body,) = say.Inbox().feed(say.encode(message))
            # a float that is no number is not equal to itself
            assert decode(body) == message or b"\xcb" in body
        assert _bodies([payload]) == _bodies([payload[:3], payload[3:7], payload[7:]])

    return feed


def _bodies(pieces: Sequence[bytes]) -> list[bytes]:
    inbox, found = say.Inbox(), []
    try:
        for piece in pieces:
            found += inbox.feed(piece)
    except say.MessageError:
        found.append(b"refused")
    return found


def _requests(payload: bytes) -> None:
    """A body is refused, or what is put into it is what its engine reads there, and nothing else has changed."""
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
        prompt = prompt_of(path, payload)
        if prompt is not None:
            assert prompt.cost_bytes <= len(payload)
            prompt.chunks(b"salt")
            for read in (prompt.ids, prompt.text):
                try:
                    assert len(read()) <= len(payload)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue
    try:
        front = read_front(payload)
    except RequestError:
        return
    assert len(front.session or "") <= 256
    if front.cache_salt is not msgspec.UNSET or front.kv_transfer_params is not msgspec.UNSET:
        return
    try:
        before = json.loads(payload)
    except (ValueError, RecursionError):
        return  # no engine reads it
    after = json.loads(b"".join(spliced(payload, b"s", b'{"x":1}')))
    # a number that is none is not equal to itself
    assert after == {"cache_salt": "s", "kv_transfer_params": {"x": 1}} | before or b"NaN" in payload


def _in_two(feed: Callable[[bytes, int], None]) -> Callable[[bytes], None]:
    def fed(payload: bytes) -> None:
        """Pieces as a connection brings them."""
        feed(payload, payload[-1] * len(payload) >> 8 if payload else 0)

    return fed


def _http() -> list[Target]:
    """The gateway's two readers of HTTP, where its parser is installed."""
    if importlib.util.find_spec("httptools") is None:
        return []
    from tests.gateway.glue import CLIENT_SEEDS, LINK_SEEDS, feed_client, feed_link

    return [Target("http", _in_two(feed_client), CLIENT_SEEDS), Target("answers", _in_two(feed_link), LINK_SEEDS)]


_BODIES = [
    say.Hello(1, "1.0", "engine"),
    say.Stage(1, (1, 2), b"k" * 64, 100),
    say.Commit(2, 1, b"k" * 64, 0, (1, 2), b"s" * 32),
    say.Staged(1, 2, 3.0, (say.RunStaged(0, 2, "disk", 0.1),), (), 0.1, 0.2, 0.3, 1.0, 0.1, ((0, 4096),), (b"s" * 32,)),
    say.Lent(3, (1, 2), (0, 4096)),
    say.Record(b"receipt", b"tokens", b"root"),
    say.Refused("reason", "hint"),
]
_ENCODED = [say.encode(body) for body in _BODIES]
_MESSAGES = [each[struct.calcsize("<I") :] for each in _ENCODED] + _ENCODED
_REQUESTS = [
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"tools":[{}],"stream":true,"user":"u"}',
    b'{"prompt":[[1,2,70000],[3]],"max_tokens":4,"prompt_cache_key":"k"}',
    b'{"prompt":["a\\u00e4","b"],"kv_transfer_params":{"a":1}}',
    b' { "input" : "text" , "instructions" : "be", "max_output_tokens":1, "cache\\u005fsalt":"x"}',
    b"{}",
]
_NAMES = (
    *(
        "prompt",
        "messages",
        "role",
        "content",
        "text",
        "type",
        "input",
        "instructions",
        "cache_salt",
        "stream",
        "tools",
    ),
    *("kv_transfer_params", "prompt_cache_key", "user", "model", "max_tokens", "max_output_tokens", "session_id"),
)
_JSON = [
    *(b'"%b":' % name.encode() for name in _NAMES),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b'""',
        b'"a"',
        b"[1,2]",
        b"{}",
        b"null",
        b"true",
        b"1e9",
        b"-1",
        b"\\ud800",
        b"NaN",
    ),
]

TARGETS = {
    target.name: target
    for target in (
        Target(
            "events",
            _events,
            [
                write_batch(Batch(1.5, EVENTS)),
                write_batch(Batch(0.0, EVENTS[1:2])),
                packed(*ARRAYS, *OTHERS),
            ],
        ),
        Target("topics", _topics, [write_topic(Topic("http://127.0.0.1:8000", "org/model")).encode(), b"kv", b"kv@@"]),
        Target("client", _says(say.client_says), _MESSAGES),
        Target("node", _says(say.node_says), _MESSAGES),
        Target("requests", _requests, _REQUESTS, _JSON),
        Target("session", feed_session, SESSION_SEEDS),
        Target("replies", feed_replies, REPLY_SEEDS),
        Target("resp", feed_requests, REQUEST_SEEDS, REQUEST_WORDS),
        Target("resp-session", feed_server, REQUEST_SEEDS, REQUEST_WORDS),
        *_http(),
    )
}
"""By name, as `make fuzz TARGET=events` takes them."""
