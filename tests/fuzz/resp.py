"""Any bytes for the server of the Redis protocol: its parser alone, and a whole session with an engine behind it."""

from __future__ import annotations

import asyncio

from tests.near.serving import encoded
from thermocline.clock import ManualClock
from thermocline.errors import CommandError
from thermocline.near.engine import Engine
from thermocline.near.engine_table import TABLE
from thermocline.wire.resp_parse import Bounds, RequestParser
from thermocline.wire.resp_server import RespLimits, RespServer, _Client

BOUNDS = Bounds(words_max=64, bulk_bytes_max=4096)
MEMORY_BYTES = 1 << 20


def feed_requests(payload: bytes) -> None:
    """Requests are bounded, the same in any pieces, and come back from what they would be written as."""
    whole = _read([payload])
    cut = payload[-1] % len(payload) if payload else 0
    assert whole == _read([payload[:cut], payload[cut:]])
    assert whole == _read([payload[at : at + 1] for at in range(len(payload))])
    for words in whole:
        if isinstance(words, list):
            assert len(words) <= BOUNDS.words_max
            assert max(map(len, words)) <= BOUNDS.bulk_bytes_max
            assert RequestParser(BOUNDS).feed(encoded(*words)) == words or any(b"\r\n" in word for word in words)


def _read(pieces: list[bytes]) -> list[list[bytes] | str]:
    parser, found = RequestParser(BOUNDS), []
    sent = 0
    try:
        for piece in pieces:
            sent += len(piece)
            words = parser.feed(piece) or parser.next()
            while words is not None:
                found.append(words)
                words = parser.next()
            assert parser.held_bytes <= sent
    except CommandError as error:
        found.append(error.message)
    return found


class _Transport(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def writelines(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.write(piece)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name == "peername" else default


def feed_server(payload: bytes) -> None:
    """A session ends with its connection and leaves nothing behind; a second one is served whatever the first said."""
    asyncio.run(_session(payload))


async def _session(payload: bytes) -> None:
    engine = Engine(MEMORY_BYTES, clock=ManualClock(1000.0))
    server = RespServer(engine, RespLimits(request=BOUNDS, output_bytes_max=1 << 20))
    first, second = _joined(server), _joined(server)
    cut = payload[-1] * len(payload) >> 8 if payload else 0
    for piece in (payload[:cut], payload[cut:]):
        if not first[1].closed:
            first[0].data_received(piece)
    second[0].data_received(encoded("SET", "k", "v") + encoded("PING"))
    assert bytes(second[1].written).endswith(b"+PONG\r\n")
    assert engine.keys.cache.nbytes <= MEMORY_BYTES
    for client, _ in (first, second):
        client.connection_lost(None)
    assert not engine.sessions
    assert not engine.watchers
    assert not engine.subscribers
    assert not engine.followers
    assert not server.waiting_bytes
    assert not server.clients


def _joined(server: RespServer) -> tuple[_Client, _Transport]:
    client, transport = _Client(server), _Transport()
    client.connection_made(transport)
    return client, transport


_LINES = (
    "SET a 1 EX 10|GET a|INCR a|HSET h f v|HGETALL h|LPUSH l a b|LRANGE l 0 -1|SADD s a|SPOP s|ZADD z 1 a|ZPOPMIN z",
    "HELLO 3|CLIENT TRACKING ON BCAST PREFIX a|SET a 1|FLUSHALL|CLIENT TRACKING OFF",
    "MULTI|GET a|SET b 1|EXEC|WATCH a|UNWATCH|SUBSCRIBE c|PUBLISH c m|UNSUBSCRIBE",
    "KEYS a*[^b]?|SCAN 0 MATCH * COUNT 1|GETRANGE a 3 9|APPEND a b|RENAME a b|GETEX b PERSIST|EXPIRE a 10|PTTL a",
    "CLIENT SETNAME x|INFO|CONFIG GET *|COMMAND DOCS get|AUTH x|EVAL x 0|POST /",
)
REQUEST_SEEDS = [b"".join(encoded(*line.split()) for line in text.split("|")) for text in _LINES] + [
    b"SET a  b\r\n\r\nPING\n",
    b"*0\r\n*-1\r\n*1\r\n$0\r\n\r\n",
]
REQUEST_WORDS = [
    *TABLE,
    b"*2\r\n$",
    b"\r\n$1\r\n",
    b"BCAST",
    b"PREFIX",
    b"NOLOOP",
    b"-9223372036854775808",
    b"inf",
    b"(1",
]
