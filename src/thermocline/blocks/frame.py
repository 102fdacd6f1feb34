"""Frame: a 4 KiB header page and a payload. The same bytes on disk and on every wire.

The header names what the payload must be (key, layout, length, sum), so a reader compares it with what it *asked* for.
One sum covers the whole header page, another the whole payload: no bit of a frame is unprotected.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128, xxh3_128_digest

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId

PAGE_BYTES = 4096
MAGIC = b"THERMCL\x01"
VERSION = 1
CODEC_RAW = 0
SUM_BYTES = 16
TILE_BYTES = 512 * 1024
"""Copy and hash in tiles that fit a core's own cache: hashing what just left it costs a second trip to memory."""

_FIELDS = struct.Struct("<8sHBBIQQ32s32s32s16s16s")
_SUM_AT = PAGE_BYTES - SUM_BYTES
_ZEROES = bytes(_SUM_AT - _FIELDS.size)


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says about itself. `tenant` is 16 bytes (zero: none); `epoch` counts openings of the store."""

    key: BlockKey
    parent: BlockKey
    layout: LayoutId
    depth: int
    length_bytes: int
    payload_sum: bytes
    epoch: int = 0
    tenant: bytes = bytes(16)
    codec: int = CODEC_RAW


def padded(length_bytes: int) -> int:
    """The next multiple of a page."""
    return -(-length_bytes // PAGE_BYTES) * PAGE_BYTES


def frame_bytes(length_bytes: int) -> int:
    """What a block of `length_bytes` takes as a frame."""
    return PAGE_BYTES + padded(length_bytes)


def write_header(header: Header, page: NDArray[np.uint8]) -> None:
    """Fill a 4,096-byte page with the header and its sum."""
    view = page.data
    fields = (header.depth, header.length_bytes, header.epoch, header.key, header.parent, header.layout)
    _FIELDS.pack_into(view, 0, MAGIC, VERSION, header.codec, 0, *fields, header.tenant, header.payload_sum)
    view[_FIELDS.size : _SUM_AT] = _ZEROES
    view[_SUM_AT:] = xxh3_128_digest(view[:_SUM_AT])


def read_header(page: NDArray[np.uint8]) -> Header | None:
    """The header in a 4,096-byte page, or None if any bit of the page is not as it was written."""
    if page.nbytes != PAGE_BYTES or xxh3_128_digest(page[:_SUM_AT].data) != page[_SUM_AT:].tobytes():
        return None
    magic, version, codec, flags, *rest = _FIELDS.unpack_from(page.data)
    depth, length, epoch, key, parent, layout, tenant, payload_sum = rest
    if (magic, version, codec, flags) != (MAGIC, VERSION, CODEC_RAW, 0):
        return None
    return Header(key, parent, layout, depth, length, payload_sum, epoch, tenant, codec)


def payload_sum(pieces: Iterable[NDArray[np.uint8]]) -> bytes:
    """XXH3-128 over the pieces in order: the same value however the bytes are cut."""
    state = xxh3_128()
    for piece in pieces:
        state.update(piece.data)
    return state.digest()


def copy_out(source: NDArray[np.uint8], pieces: Sequence[NDArray[np.uint8]]) -> bytes:
    """Copy contiguous `source` into `pieces` and return the sum of what arrived *in the pieces*.

    The caller compares it with the sum the block was saved with. Raises ValueError if the lengths differ.
    """
    if len(pieces) == 1 and source.nbytes <= TILE_BYTES:
        np.copyto(pieces[0], source)
        return xxh3_128_digest(pieces[0].data)
    state = xxh3_128()
    update = state.update
    copyto = np.copyto
    start = 0
    for piece in pieces:
        length = piece.nbytes
        if length <= TILE_BYTES:
            copyto(piece, source[start : start + length])
            update(piece.data)
        else:
            for tile in range(0, length, TILE_BYTES):
                part = piece[tile : tile + TILE_BYTES]
                copyto(part, source[start + tile : start + tile + part.nbytes])
                update(part.data)
        start += length
    if start != source.nbytes:
        raise ValueError(f"pieces of {start} bytes for a block of {source.nbytes} bytes")
    return state.digest()


def copy_in(pieces: Sequence[NDArray[np.uint8]], target: NDArray[np.uint8]) -> None:
    """Copy `pieces` into contiguous `target`, which may be longer (padding is left as it is)."""
    start = 0
    for piece in pieces:
        np.copyto(target[start : start + piece.nbytes], piece)
        start += piece.nbytes
