"""An engine's staging pages, and the way of blocks between pages and a model's tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thermocline.blocks.layout import Layout
from thermocline.engines.kv import Kv, KvPool
from thermocline.engines.models import Model
from thermocline.engines.pages import MemoryPages

COUNT = 6


@pytest.fixture
def pages(model: Model) -> MemoryPages:
    """Pages of the model's layout."""
    return MemoryPages(model.layout, COUNT)


def test_pieces_add_up_to_a_block(pages: MemoryPages) -> None:
    """Each page has its pieces in order, one-dimensional bytes that add up to the block's length."""
    for pieces in pages.view([3, 0]):
        assert sum(piece.nbytes for piece in pieces) == pages.layout.block_bytes
        assert all(piece.dtype == np.uint8 and piece.ndim == 1 and piece.flags.c_contiguous for piece in pieces)


def test_writing_into_a_piece_writes_into_its_page_only(pages: MemoryPages) -> None:
    """A view is the memory itself: what is written is there at the next look, and in no other page."""
    for page in range(COUNT):
        for piece in pages.view([page])[0]:
            piece[:] = page + 1
    for page, pieces in enumerate(pages.view(range(COUNT))):
        assert all((piece == page + 1).all() for piece in pieces)


def test_an_unknown_page_is_refused(pages: MemoryPages) -> None:
    """A page that does not exist is an error, not another page."""
    with pytest.raises(IndexError):
        pages.view([1 << 30])
    with pytest.raises(IndexError):
        pages.view([-1])


@pytest.mark.parametrize("tokens_per_block", [16, 32, 48])
def test_blocks_keep_their_order(model: Model, tokens_per_block: int) -> None:
    """A block's bytes are layer, key or value, head, token, dimension, for every block size; and come back equal."""
    layout = _with_block(model.layout, tokens_per_block)
    kv = Kv(layout, torch.bfloat16, 1000)
    kv.tensor.copy_(torch.randn(kv.tensor.shape))
    rows = MemoryPages(layout, 3).rows
    kv.read(2, rows)
    for at in range(3):
        start = (2 + at) * tokens_per_block
        expected = kv.tensor[:, :, :, start : start + tokens_per_block].contiguous().view(torch.uint8).numpy().ravel()
        assert np.array_equal(rows[at], expected)
    other = Kv(layout, torch.bfloat16, 1000)
    other.write(5, rows)
    moved = other.tensor[:, :, :, 5 * tokens_per_block : 8 * tokens_per_block]
    assert torch.equal(moved, kv.tensor[:, :, :, 2 * tokens_per_block : 5 * tokens_per_block])


def test_the_pool_is_bounded_and_uses_memory_again(model: Model) -> None:
    """What is taken never exceeds the bound; what was given back is handed out again before anything is allocated."""
    pool = KvPool(model.layout, torch.bfloat16, bytes_max=48 << 20, tokens_max=4096)
    taken = [kv for kv in (pool.take(500) for _ in range(100)) if kv is not None]
    assert 0 < len(taken) < 100
    assert pool.used_bytes <= pool.bytes_max
    for kv in taken:
        pool.give(kv)
    assert pool.take(100) in taken
    large = pool.take(4000)
    assert large is not None
    assert large.capacity >= 4000
    assert pool.used_bytes <= pool.bytes_max


def _with_block(layout: Layout, tokens_per_block: int) -> Layout:
    token_bytes = layout.block_bytes // layout.tokens_per_block
    fields = {name: getattr(layout, name) for name in layout.__struct_fields__}
    return Layout(**fields | {"tokens_per_block": tokens_per_block, "block_bytes": tokens_per_block * token_bytes})
