"""Frames: the bytes of a header are fixed, and no bit of one can change unseen."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from thermocline.blocks.frame import (
    PAGE_BYTES,
    TILE_BYTES,
    Header,
    copy_in,
    copy_out,
    frame_bytes,
    padded,
    payload_sum,
    read_header,
    write_header,
)

HEADER = Header(
    key=bytes(range(32)),
    parent=bytes(range(32, 64)),
    layout=bytes(range(64, 96)),
    depth=7,
    length_bytes=16384,
    payload_sum=bytes(range(16)),
    epoch=3,
    tenant=bytes(range(100, 116)),
)
GOLDEN = {
    0: b"THERMCL\x01".hex(),
    8: "0100" + "00" + "00",
    12: "07000000",
    16: "0040000000000000",
    24: "0300000000000000",
    32: bytes(range(96)).hex(),
    128: bytes(range(100, 116)).hex(),
    144: bytes(range(16)).hex(),
    160: bytes(3920).hex(),
    4080: "f606379b5026f1f514b4facbff8a261d",
}
"""Offset to hex. Other machines and later releases read these bytes."""


def _page_of(header):
    page = np.full(PAGE_BYTES, 0xA5, np.uint8)
    write_header(header, page)
    return page


def _cut(data, sizes):
    """`data` as pieces that lie apart in memory."""
    stops = np.cumsum(sizes)
    assert stops[-1] == len(data)
    return [data[stop - size : stop].copy() for stop, size in zip(stops, sizes, strict=True)]


def _random_bytes(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length, np.uint8)


def test_golden_header():
    """A header page is these very bytes, whatever the memory held before."""
    raw = _page_of(HEADER).tobytes()
    assert len(raw) == PAGE_BYTES
    assert {at: raw[at : at + len(text) // 2].hex() for at, text in GOLDEN.items()} == GOLDEN
    assert sum(len(text) // 2 for text in GOLDEN.values()) == PAGE_BYTES


def test_header_round_trip():
    """What was written is read back, field by field."""
    assert read_header(_page_of(HEADER)) == HEADER


def test_every_bit_of_a_header_counts():
    """A header page with any one of its 32,768 bits flipped is refused, and accepted again once it is flipped back."""
    page = _page_of(HEADER)
    accepted = 0
    for at in range(PAGE_BYTES):
        for bit in range(8):
            page[at] ^= 1 << bit
            accepted += read_header(page) is not None
            page[at] ^= 1 << bit
    assert accepted == 0
    assert read_header(page) == HEADER


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0xA5])
def test_pages_of_one_byte_are_no_header(fill):
    """Zeroes, ones and freed memory are refused."""
    assert read_header(np.full(PAGE_BYTES, fill, np.uint8)) is None


@pytest.mark.parametrize("nbytes", [0, 1, 175, 4095, 4097, 8192])
def test_other_sizes_are_no_header(nbytes):
    """Anything but a whole page is refused."""
    raw = np.resize(_page_of(HEADER), nbytes)
    assert read_header(raw) is None


@pytest.mark.parametrize(("at", "value"), [(0, 0), (7, 2), (8, 2), (9, 1), (10, 1), (11, 1)])
def test_unknown_kinds_are_refused(at, value):
    """Another magic, version, codec or flag is refused although its sum is right: what it means is not known here."""
    page = _page_of(HEADER)
    page[at] = value
    page[-16:] = np.frombuffer(xxhash.xxh3_128_digest(page[:-16]), np.uint8)
    assert read_header(page) is None


@pytest.mark.parametrize(
    ("length", "frame"), [(0, 4096), (1, 8192), (4096, 8192), (4097, 12288), (1 << 20, (1 << 20) + 4096)]
)
def test_frame_sizes(length, frame):
    """A frame is a header page and the payload in whole pages."""
    assert frame_bytes(length) == frame
    assert padded(length) == frame - PAGE_BYTES


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_a_sum_does_not_depend_on_the_cut(data, cuts):
    """The sum of a block is that of its bytes in order, however they are cut, empty pieces included."""
    whole = np.frombuffer(data, np.uint8)
    stops = [*sorted(min(at, len(data)) for at in cuts), len(data)]
    pieces = [whole[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    assert payload_sum(pieces) == xxhash.xxh3_128_digest(data)


SIZES = [
    [1],
    [4096],
    [1, 4095],
    [TILE_BYTES],
    [TILE_BYTES + 1],
    [3 * TILE_BYTES + 5],
    [0, 7, 0, 9],
    [TILE_BYTES + 3, 1, 2 * TILE_BYTES, 17],
    [64] * 64,
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_copy_out_into_scattered_pieces(sizes):
    """Copying out fills the pieces with the block's bytes in order, and returns the sum of what arrived in them."""
    source = _random_bytes(1, sum(sizes))
    pieces = [np.full(size, 0xA5, np.uint8) for size in sizes]
    assert copy_out(source, pieces) == xxhash.xxh3_128_digest(source)
    assert np.array_equal(np.concatenate(pieces), source)
    assert payload_sum(pieces) == xxhash.xxh3_128_digest(source)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_copy_in_undoes_copy_out(sizes):
    """Copying in lays the pieces side by side and touches nothing behind them."""
    source = _random_bytes(2, sum(sizes))
    target = np.full(sum(sizes) + 10, 0xA5, np.uint8)
    copy_in(_cut(source, sizes), target)
    assert np.array_equal(target[: source.nbytes], source)
    assert set(target[source.nbytes :]) == {0xA5}


@pytest.mark.parametrize("sizes", [[31], [33], [16, 15], [16, 17], [], [TILE_BYTES + 1]])
def test_pieces_of_another_length_are_refused(sizes):
    """Pieces that are together shorter or longer than the block are the caller's mistake, and an error."""
    with pytest.raises(ValueError, match=r"pieces|broadcast"):
        copy_out(_random_bytes(4, 32), [np.zeros(size, np.uint8) for size in sizes])
