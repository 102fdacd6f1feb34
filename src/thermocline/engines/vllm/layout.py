"""From the tensors that vLLM registered to a layout: where a block's bytes lie, and what makes them what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from thermocline.blocks.layout import Layout
from thermocline.errors import LayoutError

_DIMENSIONS = "RHNC"
"""What vLLM calls the dimensions of a page: kernel blocks, heads, tokens ("states"), content of keys and values."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """One layer's pages in an engine's memory: `shape` and `strides` (in bytes) of [pages, R, H, N, C].

    `region` numbers the allocation, `offset` is where the layer begins in it. `kind` says what a page holds and how it
    is packed: the kind of attention with its window, the kernels, the type of the numbers.
    """

    name: str
    region: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [offset + page * stride, ... + nbytes) of an allocation belong to the block in that page."""

    region: int
    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Engine:
    """What is true of one rank of an engine, whatever KV group."""

    model: str
    weights_digest: bytes
    dtype: str
    kv_dtype: str
    version: str
    isa: str
    physical: str
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1


def make_layout(
    engine: Engine, layers: Sequence[LayerMemory], *, group: int, tokens_per_block: int, kv_heads: int, head_dim: int
) -> Layout:
    """The layout of one KV group's blocks. The number of pages is no part of it: it may change at a restart."""
    if not layers:
        raise LayoutError(
            f"KV group {group} has no layers on this rank, so its ranks cannot be matched with each other",
            hint="use another --pipeline-parallel-size",
        )
    spans = spans_of(layers)
    return Layout(
        model=engine.model,
        weights_digest=engine.weights_digest,
        dtype=engine.dtype,
        kv_dtype=engine.kv_dtype,
        layers=len(layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens_per_block=tokens_per_block,
        block_bytes=sum(span.nbytes for span in spans),
        engine="vllm",
        engine_version=engine.version,
        isa=engine.isa,
        order=order_text(engine.physical, layers),
        tp_rank=engine.tp_rank,
        tp_size=engine.tp_size,
        pp_rank=engine.pp_rank,
        pp_size=engine.pp_size,
        kv_group=group,
    )


def layout_in(epoch: bytes, layout: Layout) -> Layout:
    """The layout of an engine that was told to forget: its weights may be others since. Empty is the first epoch."""
    if not epoch:
        return layout
    digest = hashlib.sha256(b"epoch" + layout.weights_digest + epoch).digest()
    return msgspec.structs.replace(layout, weights_digest=digest[:16])


def order_text(physical: str, layers: Sequence[LayerMemory]) -> str:
    """The order of a block's bytes, and what they are: short for people, with a digest of every layer's description."""
    described = [f"{layer.name}: {layer.kind} {_inner(layer)}" for layer in layers]
    digest = hashlib.sha256("\n".join([physical, *described]).encode()).hexdigest()[:32]
    return f"{physical} {layers[0].kind} {_inner(layers[0])} {digest}"


def spans_of(layers: Sequence[LayerMemory]) -> list[Span]:
    """A block's bytes: layer by layer, each in the order of its own memory, as few stretches as there are.

    Raises LayoutError for memory that is not whole bytes side by side.
    """
    spans: list[Span] = []
    for layer in layers:
        offsets, nbytes = _stretches(layer)
        for offset in offsets:
            span = Span(layer.region, layer.offset + offset, layer.strides[0], nbytes)
            last = spans[-1] if spans else None
            if last and (last.region, last.stride, last.offset + last.nbytes) == (
                span.region,
                span.stride,
                span.offset,
            ):
                spans[-1] = Span(last.region, last.offset, last.stride, last.nbytes + span.nbytes)
            else:
                spans.append(span)
    return spans


def _stretches(layer: LayerMemory) -> tuple[list[int], int]:
    """Where the contiguous stretches of a page begin in it, in the order of memory, and how long each is."""
    nbytes = layer.item_bytes
    offsets = [0]
    for size, stride, _ in reversed(_in_memory_order(layer)):
        if offsets == [0] and stride == nbytes:
            nbytes *= size
        elif stride < nbytes:
            raise LayoutError(
                f"the pages of {layer.name} overlap themselves", hint="report the model and the version of vLLM"
            )
        else:
            offsets = [at * stride + inner for at in range(size) for inner in offsets]
    return offsets, nbytes


def _in_memory_order(layer: LayerMemory) -> list[tuple[int, int, str]]:
    """Size, stride and name of a page's dimensions, outermost first. Dimensions of size 1 are nowhere."""
    inner = zip(layer.shape[1:], layer.strides[1:], _DIMENSIONS, strict=True)
    return sorted(((size, stride, name) for size, stride, name in inner if size > 1), key=lambda each: -each[1])


def _inner(layer: LayerMemory) -> str:
    sizes = dict(zip(_DIMENSIONS, layer.shape[1:], strict=True))
    named = [name for _, _, name in _in_memory_order(layer)]
    return "".join(f"{name}{sizes[name]}" for name in (*named, *(name for name in _DIMENSIONS if name not in named)))
