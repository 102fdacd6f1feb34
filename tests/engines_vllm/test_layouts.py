"""Layouts of vLLM's memory: bytes that mean something else have another one, and pieces are the block's bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thermocline.engines.vllm.facts import Regions, layer_memory
from thermocline.engines.vllm.layout import Engine, layout_in, make_layout, spans_of
from thermocline.engines.vllm.pages import HostPages
from thermocline.errors import LayoutError

PAGES = 6
ENGINE = Engine("model", b"weights", "bfloat16", "auto", "0.32.0", "AVX512", "LBHNC")
ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


class FullAttentionSpec(SimpleNamespace):
    """As vLLM calls it."""


class SlidingWindowSpec(SimpleNamespace):
    """As vLLM calls it."""


def spec(kind=FullAttentionSpec, **fields):
    """What a spec says of a layer."""
    return kind(**{"block_size": 16, "num_kv_heads": 2, "head_size": 8, **fields})


def module(backend="CPU_ATTN", isa="vec"):
    """An attention layer."""
    return SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), isa=isa)


def tensors(order="LBHNC", *, layers=3, pages=PAGES, heads=2, states=16, content=16, dtype=torch.bfloat16, split=1):
    """Layers of one allocation as vLLM registers them, [B, H, N, C], in a physical order."""
    sizes = {"L": layers, "B": pages * split, "H": heads, "N": states // split, "C": content}
    memory = torch.zeros([sizes[name] for name in order], dtype=dtype)
    logical = memory.permute([order.index(name) for name in "LBHNC"])
    return [logical[at] for at in range(layers)]


def layers_of(views, *, names="abc", specs=None, modules=None, pages=PAGES):
    """All layers as numbers, and where they lie."""
    regions = Regions()
    specs, modules = specs or [spec()] * len(views), modules or [module()] * len(views)
    parts = zip(names, views, specs, modules, strict=False)
    return [layer_memory(name, view, one, its, regions, pages) for name, view, one, its in parts], regions


def layout(views=None, *, engine=ENGINE, group=0, tokens=16, **options):
    """The layout of these layers."""
    layers, _ = layers_of(views or tensors(), **options)
    return make_layout(engine, layers, group=group, tokens_per_block=tokens, kv_heads=2, head_dim=8)


def variants():
    """Engines whose bytes must not be mixed: most of them have blocks of one size, many tensors of one shape."""
    yield "as it is", layout()
    for name, value in {
        "model": "other",
        "weights_digest": b"trained",
        "dtype": "float16",
        "kv_dtype": "fp8",
        "version": "0.33.0",
        "isa": "AVX2",
        "physical": "other",
    }.items():
        yield name, layout(engine=replace(ENGINE, **{name: value}))
    for rank, size in ((0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)):
        yield f"tensor {rank} of {size}", layout(engine=replace(ENGINE, tp_rank=rank, tp_size=size))
        yield f"pipeline {rank} of {size}", layout(engine=replace(ENGINE, pp_rank=rank, pp_size=size))
    for group in (1, 2, 3):
        yield f"group {group}", layout(group=group)
    for order in ORDERS[1:]:
        yield order, layout(tensors(order), engine=replace(ENGINE, physical=order))
    yield "tokens first, not said", layout(tensors("LBNHC"))
    yield "heads and tokens the other way", layout(tensors(heads=16, states=2))
    yield "more heads, less content", layout(tensors(heads=4, content=8))
    yield "split for kernels", layout(tensors(split=2))
    yield "float16", layout(tensors(dtype=torch.float16))
    yield "int16", layout(tensors(dtype=torch.int16))
    yield "float32", layout(tensors(dtype=torch.float32, content=8))
    yield "layers by other names", layout(names="abd")
    yield "layers in another order", layout(names="acb")
    yield "fewer layers", layout(tensors(layers=2))
    yield "blocks of 32 tokens", layout(tensors(states=32, content=8), tokens=32)
    for isa, backend in product(("vec16", "amx"), ("CPU_ATTN", "FLASH_ATTN")):
        yield f"{backend} {isa}", layout(modules=[module(backend, isa)] * 3)
    for fields in (
        {"sliding_window": 128},
        {"sliding_window": 256},
        {"head_size_v": 4},
        {"kv_quant_mode": 1},
        {"cache_dtype_str": "fp8_ds_mla"},
        {"num_kv_heads": 4, "head_size": 4},
        {"tokens_per_state": 2},
        {"attention_chunk_size": 64},
    ):
        yield str(fields), layout(specs=[spec(**fields)] * 3)
        yield f"window {fields}", layout(specs=[spec(SlidingWindowSpec, **fields)] * 3)
    yield "one layer of another kind", layout(specs=[spec(), spec(SlidingWindowSpec, sliding_window=128), spec()])
    yield "another layer of that kind", layout(specs=[spec(), spec(), spec(SlidingWindowSpec, sliding_window=128)])
    yield "after a reset", layout_in(b"epoch", layout())
    yield "after another reset", layout_in(b"other", layout())


def test_all_pairs_of_layouts_differ():
    """Sixty engines, most with blocks of the same size, and not two of them share a layout."""
    made = dict(variants())
    assert len(made) >= 60
    assert len({each.id for each in made.values()}) == len(made)
    sizes = [each.block_bytes for each in made.values()]
    assert sizes.count(made["as it is"].block_bytes) >= 50, "pairs of one size are what this is about"


def test_the_number_of_pages_is_no_part_of_a_layout():
    """An engine that is given more memory finds what it saved with less."""
    for order in ORDERS:
        few, many = (layout(tensors(order, pages=pages), pages=pages) for pages in (PAGES, 2 * PAGES))
        assert few.id == many.id


@pytest.mark.parametrize(("order", "split"), [*((order, 1) for order in ORDERS), ("LBHNC", 2), ("LBNHC", 2)], ids=str)
def test_pieces_are_the_bytes_of_a_page(order, split):
    """In every physical order a block's pieces are all bytes of its page in all layers, each once, and no other's."""
    views = tensors(order, split=split)
    layers, regions = layers_of(views)
    pages = HostPages(None, layout(views), spans_of(layers), regions.in_host_memory())
    for view in views:
        view.copy_(torch.randint(0, 1000, view.shape).to(view.dtype))
    for page in range(PAGES):
        rows = slice(page * split, (page + 1) * split)
        expected = np.concatenate([view[rows].contiguous().view(torch.int16).numpy().ravel() for view in views])
        found = np.concatenate(pages.view(page)).view(np.int16)
        assert sorted(found) == sorted(expected)
        assert len(found) * 2 == pages.layout.block_bytes
    seen = np.zeros(regions.tensors[0].nbytes, np.uint8)
    base = pages.view(0)[0].__array_interface__["data"][0] - spans_of(layers)[0].offset
    for page in range(PAGES):
        for piece in pages.view(page):
            at = piece.__array_interface__["data"][0] - base
            seen[at : at + piece.nbytes] += 1
    assert (seen == 1).all(), "every byte belongs to one page"


def test_layers_that_lie_side_by_side_are_one_piece():
    """Where a block's layers are neighbours, as in block-outermost orders, it is copied in one go."""
    counts = {order: len(spans_of(layers_of(tensors(order))[0])) for order in ORDERS}
    assert counts == {"LBHNC": 3, "LBNHC": 3, "LHBNC": 6, "BLHNC": 1, "BLNHC": 1, "BHLNC": 6}


def test_other_shapes_are_refused():
    """A tensor that is not vLLM 0.32's is refused with what to do."""
    with pytest.raises(LayoutError, match="was expected") as caught:
        layers_of([torch.zeros(2, 6, 16, 2, 8)])
    assert caught.value.hint
