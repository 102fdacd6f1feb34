"""Layouts: whatever makes bytes loadable is in the fingerprint."""

from __future__ import annotations

from itertools import combinations, product

import msgspec
import pytest

from thermocline.blocks.layout import Layout

BASE = Layout(
    model="m",
    weights_digest=b"w" * 32,
    dtype="float32",
    kv_dtype="float32",
    layers=2,
    kv_heads=2,
    head_dim=16,
    tokens_per_block=32,
    block_bytes=16384,
    engine="transformers",
    engine_version="5",
    isa="avx2",
    order="kv-layer",
)


def _changed(value):
    """Another value of the same type."""
    return value + 1 if isinstance(value, int) else value + type(value)(b"x" if isinstance(value, bytes) else "x")


def test_golden_id():
    """The fingerprint of a fixed layout is this very value: it names blocks on disk."""
    assert BASE.id.hex() == "95760ada93783d00788e4fe92fd8c0fa89ae38b01d3588a0089c77c97317dd17"


@pytest.mark.parametrize("field", Layout.__struct_fields__)
def test_every_field_counts(field):
    """Changing any single field changes the fingerprint."""
    other = msgspec.structs.replace(BASE, **{field: _changed(getattr(BASE, field))})
    assert other.id != BASE.id
    assert msgspec.structs.replace(other, **{field: getattr(BASE, field)}).id == BASE.id


def test_same_shapes_do_not_share():
    """Of 96 layouts with the same number of bytes per block, no two have the same fingerprint."""
    variants = product(
        ("kv-layer", "layer-kv"),
        ("float16", "bfloat16"),
        ((4, 2), (2, 4)),
        ("1", "2"),
        ("avx2", "avx512", "neon"),
        (b"a" * 32, b"b" * 32),
    )
    layouts = [
        msgspec.structs.replace(
            BASE,
            order=order,
            kv_dtype=kind,
            kv_heads=heads[0],
            head_dim=16 * heads[1],
            engine_version=version,
            isa=isa,
            weights_digest=digest,
        )
        for order, kind, heads, version, isa, digest in variants
    ]
    assert len(layouts) == 96
    assert sum(a.id == b.id for a, b in combinations(layouts, 2)) == 0


def test_ranks_do_not_share():
    """Every rank and group of one model has a fingerprint of its own, though all have the same shapes."""
    places = ("tp_rank", "pp_rank", "kv_group")
    layouts = [
        msgspec.structs.replace(BASE, tp_size=4, pp_size=4, **{name: at}) for name in places for at in range(1, 20)
    ]
    assert len({layout.id for layout in layouts}) == len(layouts) == 57


def test_fields_do_not_run_together():
    """Text moved from one field into its neighbour is another layout."""
    one = msgspec.structs.replace(BASE, engine="ab", engine_version="c")
    two = msgspec.structs.replace(BASE, engine="a", engine_version="bc")
    assert one.id != two.id


def test_a_layout_is_a_value():
    """Equal layouts have equal fingerprints, and a layout cannot be changed."""
    twin = msgspec.structs.replace(BASE)
    assert twin == BASE
    assert twin.id == BASE.id
    with pytest.raises(AttributeError):
        BASE.model = "other"
