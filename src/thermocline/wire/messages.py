"""What a node and its clients say to each other: msgpack behind a length, every part bounded.

A message is an array whose first item names it. A question carries an `id` that its answer repeats, so a client may ask
again before it has the first answer; several answers may come in any order. Keys, sums and layouts are bytes here: what
they mean is known on the floors above.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeVar

import msgspec

T = TypeVar("T")
PROTOCOL = 2
"""Both sides must speak the same: a node refuses any other at the handshake, with the reason."""

MESSAGE_BYTES_MAX = 32 << 20
KEY_BYTES, SUM_BYTES = 32, 16
BLOCKS_MAX = 1 << 18
LAYOUTS_MAX = 1024
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message. Fields are sent in their order."""


class Numbered(Message, frozen=True):
    """A question, or the answer to the question of this number."""

    id: int


# -- from the client ---------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """The first message. `role` says what the client is, for people: "vllm worker 0"."""

    protocol: int
    version: str
    role: str


class Declare(Message, frozen=True, tag="declare"):
    """From now on `number` means this layout (its fields as msgpack). No answer."""

    number: int
    layout: bytes


class Stage(Numbered, frozen=True, tag="stage"):
    """Have the beginning of this path in memory, and keep it there: Staged, after Promoting if that takes time."""

    layouts: tuple[int, ...]
    keys: bytes
    prompt_tokens: int


class Release(Message, frozen=True, tag="release"):
    """These leases are over. No answer."""

    leases: tuple[int, ...]


class Damaged(Message, frozen=True, tag="damaged"):
    """A copy of these blocks did not verify: look at them. No answer."""

    layout: int
    keys: bytes


class Lend(Numbered, frozen=True, tag="lend"):
    """Lend up to `count` slots for blocks of this layout: Lent."""

    layout: int
    count: int


class GiveBack(Message, frozen=True, tag="give_back"):
    """Nothing is or will be written into these slots. No answer."""

    slots: tuple[int, ...]


class Commit(Numbered, frozen=True, tag="commit"):
    """The blocks of keys[start], keys[start + 1], ... lie in these slots with these sums: Committed."""

    layout: int
    keys: bytes
    start: int
    slots: tuple[int, ...]
    sums: bytes


class Unsaved(Numbered, frozen=True, tag="unsaved"):
    """How many leading blocks are in memory already: Count."""

    layout: int
    keys: bytes


class Prefetch(Numbered, frozen=True, tag="prefetch"):
    """Have this path in memory within so many seconds: Count of what is there then."""

    layouts: tuple[int, ...]
    keys: bytes
    seconds: float


class Computed(Message, frozen=True, tag="computed"):
    """Computing `tokens` behind `cached` ones took `model` so long. No answer."""

    tokens: int
    cached: int
    seconds: float
    model: str


class Record(Message, frozen=True, tag="record"):
    """Keep the receipt of a request (as msgpack), to be compared with others of this root. No answer.

    It came `age_seconds` ago, and was answered with so many tokens; 0 where that is not known.
    """

    receipt: bytes
    tokens: bytes
    root: bytes
    age_seconds: float = 0.0
    output_tokens: int = 0


class Ping(Numbered, frozen=True, tag="ping"):
    """Are you there? Count, of nothing."""


class Status(Numbered, frozen=True, tag="status"):
    """What the node holds, and for whom: Report."""


class Receipts(Numbered, frozen=True, tag="receipts"):
    """The receipt of a request (`last` for the latest), or the last `count` of them: Report."""

    request: str
    count: int


class Trace(Numbered, frozen=True, tag="trace"):
    """The last requests as a trace, in lines of JSON: Report."""


class Metrics(Numbered, frozen=True, tag="metrics"):
    """All counters, in the Prometheus text format: Report."""


# -- from the node -----------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The client may go on. The memory's descriptor travels with it. `incarnation` is another after each start."""

    protocol: int
    version: str
    incarnation: int
    memory_bytes: int


class Refused(Message, frozen=True, tag="refused"):
    """The node does not serve this client; the connection ends."""

    reason: str
    hint: str


class Promoting(Numbered, frozen=True, tag="promoting"):
    """Staged comes at `deadline` (monotonic clock of this machine) at the latest."""

    deadline: float


class RunStaged(Message, frozen=True):
    """Blocks [start, stop) came from `tier`."""

    start: int
    stop: int
    tier: str
    seconds: float


class Gap(Message, frozen=True):
    """Blocks [start, stop) are not there, for a reason of the closed set."""

    start: int
    stop: int
    reason: str
    detail: str


class Staged(Numbered, frozen=True, tag="staged"):
    """The plan: every block of its runs lies in memory, at `offsets` with `sums` (one of each per layout).

    `lease` keeps them there until `deadline`, by the monotonic clock of this machine.
    """

    lease: int
    deadline: float
    runs: tuple[RunStaged, ...]
    gaps: tuple[Gap, ...]
    load_seconds: float
    recompute_seconds: float
    cold_seconds: float
    load_seconds_max: float
    match_seconds: float
    offsets: tuple[tuple[int, ...], ...]
    sums: tuple[bytes, ...]


class Lent(Numbered, frozen=True, tag="lent"):
    """These slots, at these offsets, are the client's until it commits them, gives them back, or is gone."""

    slots: tuple[int, ...]
    offsets: tuple[int, ...]


class Committed(Numbered, frozen=True, tag="committed"):
    """What became of each block; `unused` slots are the client's still."""

    outcomes: tuple[str, ...]
    unused: tuple[int, ...]


class Count(Numbered, frozen=True, tag="count"):
    """A number."""

    count: int


class Report(Numbered, frozen=True, tag="report"):
    """Text for people or their tools."""

    body: bytes


class Failed(Numbered, frozen=True, tag="failed"):
    """The node could not do this one thing. What it means: nothing was found, or kept."""

    reason: str


Question = Stage | Lend | Commit | Unsaved | Prefetch | Ping | Status | Receipts | Trace | Metrics
Order = Declare | Release | Damaged | GiveBack | Computed | Record
FromClient = Hello | Question | Order
Answer = Promoting | Staged | Lent | Committed | Count | Report | Failed
FromNode = Welcome | Refused | Answer

_ENCODER = msgspec.msgpack.Encoder()
_CLIENT_SAYS: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_NODE_SAYS: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)


class MessageError(ValueError):
    """Bytes that are no message: the connection is of no use any more."""


def encode(message: FromClient | FromNode) -> bytes:
    """The message with its length before it. Raises MessageError where it is too long to be read."""
    body = _ENCODER.encode(message)
    if len(body) > MESSAGE_BYTES_MAX:
        raise MessageError(f"a message of {len(body)} bytes; {MESSAGE_BYTES_MAX} are read")
    return _LENGTH.pack(len(body)) + body


def client_says(body: bytes) -> FromClient:
    """The message of a client. Raises MessageError."""
    return _decoded(body, _CLIENT_SAYS)


def node_says(body: bytes) -> FromNode:
    """The message of a node. Raises MessageError."""
    return _decoded(body, _NODE_SAYS)


def _decoded(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None


class Inbox:
    """Cuts a stream of bytes into the bodies of messages."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The bodies that are complete now. Raises MessageError for a length that nobody may send."""
        self._bytes += received
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > MESSAGE_BYTES_MAX:
                raise MessageError(f"a message of {length} bytes was announced; {MESSAGE_BYTES_MAX} are read")
            stop = _LENGTH.size + length
            if len(self._bytes) < stop:
                return
            body = bytes(self._bytes[_LENGTH.size : stop])
            del self._bytes[:stop]
            yield body


def split(joined: bytes, size: int) -> list[bytes]:
    """Keys or sums that were sent one behind the other. Raises MessageError for a rest, or for too many."""
    if len(joined) % size or len(joined) > size * BLOCKS_MAX:
        raise MessageError(f"{len(joined)} bytes are not up to {BLOCKS_MAX} times {size}")
    return [joined[at : at + size] for at in range(0, len(joined), size)]
