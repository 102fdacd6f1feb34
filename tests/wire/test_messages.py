"""What nodes and clients say to each other: every message comes out as it went in, and nothing else comes out."""

from __future__ import annotations

import struct
from typing import get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.wire import messages as say

FROM_CLIENT, FROM_NODE = get_args(say.FromClient), get_args(say.FromNode)
SIZES = st.integers(1, 40)


def _of(kind):
    """Values of a type, none of them long."""
    plain = {
        int: st.integers(-(1 << 63), (1 << 64) - 1),
        str: st.text(max_size=10),
        bytes: st.binary(max_size=40),
        float: st.floats(allow_nan=False),
    }
    if kind in plain:
        return plain[kind]
    if get_args(kind):
        return st.lists(_of(get_args(kind)[0]), max_size=3).map(tuple)
    return st.builds(
        kind, **{name: _of(of) for name, of in get_type_hints(kind).items() if name in kind.__struct_fields__}
    )


CLIENT_MESSAGES, NODE_MESSAGES = (st.one_of(map(_of, kinds)) for kinds in (FROM_CLIENT, FROM_NODE))


def _check(messages, step, read):
    sent = b"".join(map(say.encode, messages))
    inbox = say.Inbox()
    bodies = [body for at in range(0, len(sent), step) for body in inbox.feed(sent[at : at + step])]
    assert [read(body) for body in bodies] == messages


@settings(max_examples=60)
@given(messages=st.lists(CLIENT_MESSAGES, max_size=4), step=SIZES)
def test_what_a_client_says_is_heard(messages, step):
    """Every message of a client survives the wire, however its bytes are cut."""
    _check(messages, step, say.client_says)


@settings(max_examples=60)
@given(messages=st.lists(NODE_MESSAGES, max_size=4), step=SIZES)
def test_what_a_node_says_is_heard(messages, step):
    """Every message of a node survives the wire, however its bytes are cut."""
    _check(messages, step, say.node_says)


@given(body=st.binary(max_size=200), read=st.sampled_from([say.client_says, say.node_says]))
def test_other_bytes_are_no_message(body, read):
    """Any bytes are a message, or raise MessageError and nothing else."""
    try:
        message = read(body)
    except say.MessageError:
        return
    assert isinstance(message, FROM_CLIENT + FROM_NODE)


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode(["ping"]),
        msgspec.msgpack.encode(["ping", "one"]),
        msgspec.msgpack.encode(["ping", 1, 2]),
        msgspec.msgpack.encode(["welcome", 1, "", 1, 1]),
        msgspec.msgpack.encode({"type": "ping", "id": 1}),
        msgspec.msgpack.encode(["release", [1.5]]),
        b"\x92" * 100_000,
        b"",
    ],
)
def test_almost_messages(body):
    """Missing, wrong and extra fields, and messages of the other side, are refused."""
    with pytest.raises(say.MessageError):
        say.client_says(body)


def test_lengths_are_bounded():
    """A length that nobody may send is refused at once, before anything of it is kept."""
    inbox = say.Inbox()
    with pytest.raises(say.MessageError, match="was announced"):
        list(inbox.feed(struct.pack("<I", say.MESSAGE_BYTES_MAX + 1)))
    with pytest.raises(say.MessageError, match="are read"):
        say.encode(say.Report(1, bytes(say.MESSAGE_BYTES_MAX)))
    most = say.encode(say.Report(1, bytes(say.MESSAGE_BYTES_MAX - 100)))
    (body,) = say.Inbox().feed(most)
    assert len(say.node_says(body).body) == say.MESSAGE_BYTES_MAX - 100


@given(data=st.binary(max_size=100), size=SIZES)
def test_split(data, size):
    """Keys and sums are cut where they were joined; a rest is refused."""
    if len(data) % size:
        with pytest.raises(say.MessageError):
            say.split(data, size)
    else:
        parts = say.split(data, size)
        assert b"".join(parts) == data
        assert all(len(part) == size for part in parts)


def test_split_is_bounded():
    """More keys than any prompt has are refused."""
    with pytest.raises(say.MessageError):
        say.split(bytes(say.BLOCKS_MAX + 1), 1)
