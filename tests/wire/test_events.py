"""KV events: both forms of vLLM's are read, nothing that is malformed gets in, and what is written is read again."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.batches import ARRAYS, MAP, OTHERS, STORED, TOKENS, packed
from thermocline.wire import events
from thermocline.wire.events import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    Topic,
    read_batch,
    read_topic,
    write_batch,
    write_topic,
)
from thermocline.wire.messages import MessageError


@pytest.mark.parametrize(
    "told",
    [
        *ARRAYS,
        MAP,
        MAP | {"extra_keys": [None, None], "session_id": "s", "ownership": "o", "a newer field": {"deep": [1]}},
    ],
)
def test_every_version_of_a_stored_event_is_read(told):
    """Arrays of 0.9 to 0.20 and maps of 0.28 to 0.32 become the same value, whatever a newer version adds."""
    assert read_batch(packed(told)) == Batch(1.5, (STORED,))


def test_what_only_newer_versions_say_is_read():
    """Group, kind of attention, LoRA, extra keys, medium, locality and whole digests arrive."""
    told = MAP | {
        "block_hashes": [b"\1" * 32],
        "parent_block_hash": b"\2" * 32,
        "medium": "CPU",
        "lora_id": 3,
        "lora_name": "adapter",
        "extra_keys": [["adapter", ["image", 5], "salt"]],
        "group_idx": 2,
        "kv_cache_spec_kind": "full_attention",
        "locality": "REMOTE",
    }
    (event,) = read_batch(packed(told)).events
    extras = (("adapter", ["image", 5], "salt"),)
    tokens = array("I", TOKENS)
    assert event == BlockStored(
        (b"\1" * 32,), b"\2" * 32, tokens, 16, "CPU", "adapter", extras, 2, "full_attention", "REMOTE"
    )


def test_an_adapter_that_has_a_number_alone_is_told_apart():
    """Versions before 0.20 send no name of a LoRA: its number stands for it."""
    (event,) = read_batch(packed(["BlockStored", [1], None, TOKENS, 16, 7])).events
    assert event.lora == "7"


def test_removals_and_resets_are_read():
    """BlockRemoved and AllBlocksCleared of both forms arrive in their order."""
    expected = (BlockRemoved((5,)), BlockRemoved((6,), "CPU"), AllBlocksCleared())
    assert read_batch(packed(*OTHERS, rest=())).events == expected
    told = [
        {"type": "BlockRemoved", "block_hashes": [5], "medium": None},
        {"type": "BlockRemoved", "block_hashes": [6], "medium": "CPU"},
        {"type": "AllBlocksCleared"},
    ]
    assert read_batch(packed(*told, rest=(3,))) == Batch(1.5, expected, 3)


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "SomethingNew", "x": 1},
        ["SomethingNew", 1],
        5,
        None,
        {},
        [],
        MAP | {"token_ids": [2**32]},
        MAP | {"token_ids": [-1]},
        MAP | {"token_ids": [1.5]},
        MAP | {"block_size": 0},
        MAP | {"block_size": 1 << 40},
        MAP | {"block_hashes": [b"x" * 65]},
        MAP | {"block_hashes": ["text"]},
        MAP | {"medium": "x" * 2000},
        MAP | {"extra_keys": 5},
        MAP | {"extra_keys": [["x" * (1 << 20)]]},
        {"type": "BlockStored"},
    ],
)
def test_an_event_that_is_none_is_counted_and_the_others_are_kept(bad):
    """One unknown or malformed event costs that event alone, and shows in `skipped`."""
    batch = read_batch(packed(MAP, bad, {"type": "AllBlocksCleared"}))
    assert batch == Batch(1.5, (STORED, AllBlocksCleared()), 0, 1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        packed(MAP)[:-5],
        packed(MAP) + b"\0",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode([1.5]),
        packed(MAP, seconds="soon"),
        packed(MAP, seconds=float("nan")),
        packed(MAP, rest=(-1,)),
        packed(*[0] * (events.EVENTS_MAX + 1)),
        b"\x93\xcb" + bytes(8) + b"\x91" * 100_000,
        packed(bytes(events.PAYLOAD_BYTES_MAX)),
    ],
    ids=range(12),
)
def test_what_is_no_batch_is_refused(payload):
    """Bytes that are no batch, or too many of them, raise MessageError and nothing else."""
    with pytest.raises(MessageError):
        read_batch(payload)


HASHES = st.lists(st.integers(0, 2**64 - 1) | st.binary(min_size=32, max_size=32), max_size=4).map(tuple)
MEDIA = st.sampled_from(["GPU", "CPU", "STORAGE"])
STORED_EVENTS = st.builds(
    BlockStored,
    HASHES,
    st.none() | st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=40).map(lambda tokens: array("I", tokens)),
    st.integers(1, 1 << 20),
    MEDIA,
    st.none() | st.just("adapter"),
    st.none() | st.just((None, ("salt", [1, "x"]))),
    st.none() | st.integers(0, 9),
    st.none() | st.just("full_attention"),
    st.none() | st.just("LOCAL"),
)
EVENTS = STORED_EVENTS | st.builds(BlockRemoved, HASHES, MEDIA, st.none() | st.integers(0, 9))
EVENTS |= st.builds(AllBlocksCleared)


@given(st.builds(Batch, st.floats(0, 1e10), st.lists(EVENTS, max_size=5).map(tuple), st.integers(0, 100)))
def test_what_is_written_is_read_again(batch):
    """Any batch comes back equal from its bytes."""
    assert read_batch(write_batch(batch)) == batch


def test_batches_are_written_as_vllm_does():
    """What is not set is left out as vLLM leaves it out, and what vLLM always sends is there."""
    told = msgspec.msgpack.decode(write_batch(Batch(1.5, (STORED, BlockRemoved((5,)), AllBlocksCleared()))))
    removed = {"type": "BlockRemoved", "block_hashes": [5], "medium": "GPU"}
    assert told == [1.5, [MAP, removed, {"type": "AllBlocksCleared"}], 0]


def test_topics_name_instance_and_model():
    """kv@NAME@MODEL is read back whole, a model may hold any sign, and plain topics name nobody."""
    topic = Topic("http://127.0.0.1:8000", "org/model@v2")
    assert read_topic(write_topic(topic)) == topic
    assert [read_topic(text) for text in ("", "kv", "kv@", "kv@name", "kv@@m", "kv@n@", "other@n@m")] == [None] * 7
