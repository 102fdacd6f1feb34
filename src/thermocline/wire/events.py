"""KV events: what an engine or a node says about the blocks it holds, in the form that vLLM gives them on the wire.

A batch is msgpack: [seconds, events, rank]. vLLM 0.28 and later write an event as a map with its `type`, 0.9 to 0.20 as
an array that begins with its name. Both are read; maps are written, as vLLM 0.32 does. Fields that newer versions add
are passed over.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from typing import Annotated, Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

from thermocline.wire.messages import MessageError

T = TypeVar("T")
PAYLOAD_BYTES_MAX = 8 << 20
"""A prompt of a million tokens is announced in 5 MB."""
EVENTS_MAX = 1 << 16
EXTRAS_BYTES_MAX = 1 << 20
TOPIC_BYTES_MAX = 512
GPU, CPU, STORAGE = "GPU", "CPU", "STORAGE"
"""Media, as vLLM names them: the engine's own memory, the host's, and what outlives a process."""

Hash: TypeAlias = int | Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]
"""A block's name in its engine: 64 bits of a digest, or all of it."""
Extra: TypeAlias = tuple[Any, ...] | None
"""What enters a block's hash beside its tokens: LoRA name, [image digest, offset], cache salt, in this order."""
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024)]
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Small: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class BlockStored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that follow each other are held now, the first one behind `parent` (None: it begins a text).

    `tokens` are those of all blocks, `block_tokens` in each. Do not trust that they are as many as the hashes say:
    engines leave blocks out that a sliding window has passed. Our own nodes leave out the tokens: their hashes are full
    own keys. `extra_keys` has one entry per block. `group` is the KV group, `kind` what attends to it.
    """

    hashes: tuple[Hash, ...]
    parent: Hash | None
    tokens: array[int]
    block_tokens: int
    medium: str = GPU
    lora: str | None = None
    extra_keys: tuple[Extra, ...] | None = None
    group: int | None = None
    kind: str | None = None
    locality: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, gc=False):
    """These blocks are gone from a medium."""

    hashes: tuple[Hash, ...]
    medium: str = GPU
    group: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    """Nothing is held any more."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What was published at once, at `seconds` since 1970 by the sender's clock, in order.

    `skipped` events could not be read: of an unknown kind, or malformed. `rank` is the data-parallel one.
    """

    seconds: float
    events: tuple[Event, ...]
    rank: int = 0
    skipped: int = 0


class Topic(NamedTuple):
    """Whose events: of the instance or node of this name (or URL), about blocks of this model."""

    name: str
    model: str


def write_topic(topic: Topic) -> str:
    """kv@NAME@MODEL, as llm-d writes it. A name has no @ in it."""
    return f"kv@{topic.name.replace('@', '-')}@{topic.model}"


def read_topic(text: str) -> Topic | None:
    """What a topic says; None for one that names nobody, such as "kv"."""
    kind, *names = text.split("@", 2)
    return Topic(*names) if kind == "kv" and len(names) == len(Topic._fields) and all(names) else None


# -- reading -----------------------------------------------------------------------------------------------------------


_NO_EXTRAS = msgspec.Raw(b"\xc0")


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    """Fields by vLLM's names, in vLLM's order. What old versions do not send has a default."""

    block_hashes: tuple[Hash, ...]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: _Size
    lora_id: int | None = None
    medium: _Name | None = None
    lora_name: _Name | None = None
    extra_keys: msgspec.Raw = _NO_EXTRAS
    group_idx: _Small | None = None
    kv_cache_spec_kind: _Name | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: _Name | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: tuple[Hash, ...]
    medium: _Name | None = None
    group_idx: _Small | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(_Stored, tag="BlockStored", array_like=True, gc=False):
    pass


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


_Map: TypeAlias = _Stored | _Removed | _Cleared
_Array: TypeAlias = _StoredArray | _RemovedArray | _ClearedArray
_Bound = msgspec.Meta(max_length=EVENTS_MAX)


class _Form(msgspec.Struct, Generic[T], array_like=True, gc=False):
    seconds: float
    events: Annotated[list[T], _Bound]
    rank: _Small | None = None


_Event: TypeAlias = _Map | _Array
_FORMS: tuple[msgspec.msgpack.Decoder[_Form[Any]], ...] = tuple(
    msgspec.msgpack.Decoder(form) for form in (_Form[_Map], _Form[_Array])
)
_RAWS = msgspec.msgpack.Decoder(_Form[msgspec.Raw])
_ONE: tuple[msgspec.msgpack.Decoder[Any], ...] = (msgspec.msgpack.Decoder(_Map), msgspec.msgpack.Decoder(_Array))
_EXTRAS = msgspec.msgpack.Decoder(tuple[Extra, ...] | None)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_batch(payload: bytes) -> Batch:
    """The batch; events that cannot be read are counted in it. Raises MessageError where the whole is no batch."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise MessageError(f"a batch of {len(payload)} bytes; {PAYLOAD_BYTES_MAX} are read")
    try:
        found, unread = _decoded(payload)
    except msgspec.ValidationError:
        raise MessageError("a batch is [seconds, events, rank]") from None
    if not math.isfinite(found.seconds):
        raise MessageError("a batch at no time")
    events: list[Event] = []
    for event in found.events:
        try:
            events.append(_event(event))
        except (OverflowError, *_UNREADABLE):  # a token that is no u32, or extra keys that are none
            unread += 1
    return Batch(found.seconds, tuple(events), found.rank or 0, unread)


def _decoded(payload: bytes) -> tuple[_Form[_Event], int]:
    """All of it in one go, as an engine writes its events in one form; else event by event."""
    for decoder in _FORMS:
        with contextlib.suppress(msgspec.ValidationError):
            return _read(decoder, payload), 0
    raws = _read(_RAWS, payload)
    events = [event for event in map(_one, raws.events) if event is not None]
    return _Form(raws.seconds, events, raws.rank), len(raws.events) - len(events)


def _read(decoder: msgspec.msgpack.Decoder[_Form[T]], payload: bytes) -> _Form[T]:
    try:
        return decoder.decode(payload)
    except msgspec.ValidationError:
        raise
    except _UNREADABLE as error:
        raise MessageError(f"a batch that is no msgpack: {type(error).__name__}") from None


def _one(raw: msgspec.Raw) -> _Event | None:
    for decoder in _ONE:
        with contextlib.suppress(*_UNREADABLE):
            found: _Event = decoder.decode(raw)
            return found
    return None


def _event(found: _Event) -> Event:
    """Raises OverflowError for tokens that are none, and one of `_UNREADABLE`."""
    if isinstance(found, _Stored):
        tokens = array("I")
        tokens.fromlist(found.token_ids)  # the constructor takes half as long again
        return BlockStored(
            found.block_hashes,
            found.parent_block_hash,
            tokens,
            found.block_size,
            found.medium or GPU,
            found.lora_name or (None if found.lora_id is None else str(found.lora_id)),
            None if found.extra_keys is _NO_EXTRAS else _extras(found.extra_keys),
            found.group_idx,
            found.kv_cache_spec_kind,
            found.locality,
        )
    if isinstance(found, _Removed):
        return BlockRemoved(found.block_hashes, found.medium or GPU, found.group_idx)
    return AllBlocksCleared()


def _extras(raw: msgspec.Raw) -> tuple[Extra, ...] | None:
    """One entry per block; None where no block has any, as is usual."""
    size = memoryview(raw).nbytes
    if size > EXTRAS_BYTES_MAX:
        raise OverflowError(f"{size} bytes of extra keys")
    extras = _EXTRAS.decode(raw)
    return extras if extras and any(extras) else None


# -- writing -----------------------------------------------------------------------------------------------------------

_ENCODER = msgspec.msgpack.Encoder()


def write_batch(batch: Batch) -> bytes:
    """The batch as vLLM 0.32 writes it: fields that vLLM leaves out where they are not set are left out."""
    return _ENCODER.encode((batch.seconds, [_wire(event) for event in batch.events], batch.rank))


def _wire(event: Event) -> dict[str, Any]:
    if isinstance(event, BlockStored):
        always = {
            "type": "BlockStored",
            "block_hashes": event.hashes,
            "parent_block_hash": event.parent,
            "token_ids": event.tokens.tolist(),
            "block_size": event.block_tokens,
            "lora_id": None,
            "medium": event.medium,
            "lora_name": event.lora,
        }
        return always | _set(
            ("extra_keys", event.extra_keys),
            ("group_idx", event.group),
            ("kv_cache_spec_kind", event.kind),
            ("locality", event.locality),
        )
    if isinstance(event, BlockRemoved):
        always = {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": event.medium}
        return always | _set(("group_idx", event.group))
    return {"type": "AllBlocksCleared"}


def _set(*fields: tuple[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields if value is not None}
