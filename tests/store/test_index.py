from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import LAYOUT, chain, make_layout
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout
from thermocline.costs.trace import read
from thermocline.store.evict import Candidate, LeastRecent
from thermocline.store.index import NO_NODE, Index
from thermocline.tiers.tier import FIRST, GONE, Found

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl.xz"
OTHER = make_layout("other")


def make_index(*tiers: str) -> Index:
    """An empty index over tiers, a warm and a cold one where nothing else is said."""
    return Index(tiers or ("warm", "cold"), LeastRecent())


def enter(index: Index, keys: list[BlockKey], tier: str = "warm", now: float = 0.0, layout=LAYOUT) -> list[int]:
    """Enter a path, first block first."""
    parents = [NO_PARENT, *keys]
    return [index.add(layout.id, key, parents[at], at + 1, tier, now) for at, key in enumerate(keys)]


def walk(index: Index, keys: list[BlockKey], tier: str) -> int:
    """The longest match, one block after the other."""
    held = (index.holds(index.node(LAYOUT.id, key), tier) for key in keys)
    return next((at for at, here in enumerate(held) if not here), len(keys))


@given(
    held=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=8),
    broken=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), max_size=4),
    asked=st.tuples(st.integers(0, 3), st.integers(0, 14)),
)
def test_bisection_equals_a_walk(held, broken, asked):
    """The longest match found by bisection is the one that a walk along the path finds, broken blocks included."""
    index = make_index()
    trunk = chain("trunk", 4)
    paths = [chain(f"branch {number}", 10, behind=trunk) for number in range(4)]
    for path, length in held:
        enter(index, paths[path][:length])
    for path, at in broken:
        node = index.node(LAYOUT.id, paths[path][at])
        if index.holds(node, "warm"):
            index.lost(node, "warm")
    keys = paths[asked[0]][: asked[1]]
    assert index.covered(LAYOUT.id, keys, "warm") == walk(index, keys, "warm")
    index.check_integrity()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.floats(-1e6, 1e6)), max_size=6),
    lost=st.sets(st.integers(0, 40), max_size=3),
    known_already=st.booleans(),
)
def test_restoring_in_bulk_equals_entering_one_by_one(lengths, lost, known_already):
    """An index restored in bulk answers, evicts and counts exactly as one that was filled block by block."""
    rows: dict[BlockKey, tuple[BlockKey, int, float]] = {}
    for name, length, used in lengths:
        path = chain(f"path {name}", length, behind=chain("trunk", 2))
        for at, key in enumerate(path):
            rows.setdefault(key, (path[at - 1] if at else NO_PARENT, at + 1, used))
    keys = sorted((key for key in rows), key=lambda key: rows[key][1])
    keys = [key for at, key in enumerate(keys) if at not in lost]
    bulk, single = make_index(), make_index()
    if known_already:
        enter(bulk, chain("trunk", 2))
        enter(single, chain("trunk", 2))
    orphans = bulk.restore(found_of(keys, rows), "cold", np.array([rows[key][2] for key in keys]))
    refused = [key for key in keys if single.add(LAYOUT.id, key, *rows[key][:2], "cold", rows[key][2]) == NO_NODE]
    assert sorted(orphans) == sorted(refused)
    bulk.check_integrity()
    assert list(drain(bulk, "cold")) == list(drain(single, "cold"))


def found_of(keys: list[BlockKey], rows: dict[BlockKey, tuple[BlockKey, int, float]], layout: Layout = LAYOUT) -> Found:
    """What a tier would say of these blocks."""
    positions = {key: at for at, key in enumerate(keys)}
    parents = [FIRST if rows[key][0] == NO_PARENT else positions.get(rows[key][0], GONE) for key in keys]
    depths = [rows[key][1] for key in keys]
    return Found(layout.id, positions, np.array(parents, int), np.array(depths, int), np.zeros(len(keys)))


def test_restored_in_any_order_and_after_another_layout():
    """Children may be found before their parents, and a second layout goes behind the first."""
    path, index = chain("path", 6), make_index()
    rows = {key: (path[at - 1] if at else NO_PARENT, at + 1, float(at)) for at, key in enumerate(path)}
    for layout in (LAYOUT, OTHER):
        found = found_of([path[at] for at in (3, 5, 0, 2, 1, 4)], rows, layout)
        assert index.restore(found, "cold", np.arange(6.0)) == []
    index.check_integrity()
    for layout in (LAYOUT, OTHER):
        assert index.covered(layout.id, path, "cold") == 6
        assert [index.parent(index.node(layout.id, key)) for key in path] == [
            NO_NODE,
            *(index.node(layout.id, key) for key in path[:-1]),
        ]


def test_a_parent_of_the_wrong_depth():
    """A block that is not one deeper than its parent is an orphan, and so is all that lies behind it."""
    path, index = chain("path", 5), make_index()
    rows = {key: (path[at - 1] if at else NO_PARENT, at + 1 + (at == 2), 0.0) for at, key in enumerate(path)}
    assert index.restore(found_of(path, rows), "cold", np.zeros(5)) == path[2:]
    index.check_integrity()
    assert index.covered(LAYOUT.id, path, "cold") == 2


def drain(index: Index, tier: str) -> Iterator[BlockKey]:
    """Every key in the order of eviction."""
    while (node := index.victim(tier)) != NO_NODE:
        yield index.place(node).key
        index.remove(node, tier)


def test_blocks_that_were_used_before_the_clock_began_keep_their_order():
    """A restored block may have been used before this machine's clock began: its age and order survive."""
    index = make_index()
    for name, used in (("young", -5.0), ("old", -500.0), ("middle", -50.0)):
        enter(index, chain(name, 1), "cold", used)
    assert index.victim("cold", used_before=-501.0) == NO_NODE
    assert list(drain(index, "cold")) == [chain(name, 1)[0] for name in ("old", "middle", "young")]


@pytest.mark.parametrize("gap", ["parent unknown", "parent in another tier only", "wrong depth"])
def test_a_block_without_its_parent_is_refused(gap):
    """A block is entered for a tier only while its parent is in that tier, so that every tier stays prefix-closed."""
    index = make_index()
    path = chain("path", 3)
    if gap == "parent in another tier only":
        enter(index, path[:2], "cold")
    elif gap == "wrong depth":
        enter(index, path[:1])
        assert index.add(LAYOUT.id, path[1], NO_PARENT, 2, "warm", 0.0) == NO_NODE
        assert index.add(LAYOUT.id, path[1], path[0], 1, "warm", 0.0) == NO_NODE
        return
    assert index.add(LAYOUT.id, path[2], path[1], 3, "warm", 0.0) == NO_NODE
    index.check_integrity()


class PathLru:
    """LRU over whole paths, each accessed tail first, block by block: what leaf-first LRU must equal."""

    def __init__(self) -> None:
        self.order: OrderedDict[BlockKey, None] = OrderedDict()

    def use(self, keys: list[BlockKey], capacity: int) -> int:
        hits = next((at for at, key in enumerate(keys) if key not in self.order), len(keys))
        for key in reversed(keys):
            self.order[key] = None
            self.order.move_to_end(key)
        while len(self.order) > capacity:
            self.order.popitem(last=False)
        return hits


class LeafLru:
    """The index, used as the store uses it: match, touch the deepest block, enter the rest, evict leaves."""

    def __init__(self) -> None:
        self.index = make_index("warm")

    def use(self, keys: list[BlockKey], capacity: int, now: float) -> int:
        index = self.index
        hits = index.covered(LAYOUT.id, keys, "warm")
        if hits:
            index.touch(index.node(LAYOUT.id, keys[hits - 1]), now)
        parents = [NO_PARENT, *keys]
        for at in range(hits, len(keys)):
            index.add(LAYOUT.id, keys[at], parents[at], at + 1, "warm", now)
        while index.blocks("warm") > capacity:
            index.remove(index.victim("warm"), "warm")
        return hits

    def keys(self) -> set[BlockKey]:
        return set(self.index._by_key.get(LAYOUT.id, {}))


@given(rng=st.randoms(use_true_random=False), capacity=st.integers(1, 40))
def test_leaf_first_lru_is_lru_over_paths(rng, capacity):
    """Leaf-first LRU keeps exactly the blocks that LRU over whole paths, accessed tail first, would keep."""
    ours, model = LeafLru(), PathLru()
    paths = [chain("root", 2)]
    for step in range(60):
        behind = rng.choice(paths)
        if rng.random() < 0.5:
            cut = rng.randint(1, len(behind))
            paths.append(chain(f"{step}", rng.randint(1, 6), behind=behind[:cut]))
        keys = rng.choice(paths)[:capacity]
        assert ours.use(keys, capacity, float(step)) == model.use(keys, capacity)
        assert ours.keys() == set(model.order)
    ours.index.check_integrity()


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason="the folder of real traces is not beside this checkout")
def test_hit_rate_on_a_real_trace():
    """On the Mooncake conversation trace, 10,000 blocks of leaf-first LRU hit 21.6 % of the tokens."""
    ours = LeafLru()
    hit_tokens = tokens = 0
    trace = read(TRACE)
    for number in range(len(trace)):
        keys = [BlockKey((block + 1).to_bytes(32, "little")) for block in trace.path(number).tolist()]
        hits = ours.use(keys, 10_000, float(number))
        hit_tokens += min(hits * 512, int(trace.input_tokens[number]))
        tokens += int(trace.input_tokens[number])
    assert hit_tokens / tokens == pytest.approx(0.216, abs=0.001)
    ours.index.check_integrity()


def test_the_parent_inherits_the_recency_of_its_leaf():
    """A path used lately is evicted after one used before, block by block from its end."""
    index = make_index()
    old, young = chain("old", 3), chain("young", 3)
    enter(index, old, now=1.0)
    enter(index, young, now=0.0)
    index.touch(index.node(LAYOUT.id, young[-1]), 2.0)
    assert list(drain(index, "warm")) == [*old[::-1], *young[::-1]]


def test_a_use_outlives_the_leaf_it_was_noted_at():
    """When a leaf goes its parent has been used as lately as the leaf was, so that it does not expire too soon."""
    index = make_index()
    path = chain("path", 2)
    nodes = enter(index, path, now=1.0)
    index.touch(nodes[1], 50.0)
    index.remove(nodes[1], "warm")
    assert index.victim("warm", used_before=49.0) == NO_NODE
    assert index.victim("warm", used_before=51.0) == nodes[0]


def test_a_pin_keeps_a_whole_path():
    """A pinned block and all its ancestors stay while everything else is evicted, and go once the pin has ended."""
    index = make_index()
    pinned, free = chain("pinned", 5), chain("free", 5)
    enter(index, pinned)
    enter(index, free)
    node = index.node(LAYOUT.id, pinned[2])
    index.pin(node, "warm")
    assert set(drain(index, "warm")) == {*free, *pinned[3:]}
    assert index.covered(LAYOUT.id, pinned, "warm") == 3
    index.unpin(node, "warm")
    assert list(drain(index, "warm")) == pinned[2::-1]
    assert index.pins("warm") == 0


def test_two_pins_need_two_ends():
    """A block pinned twice stays until both pins ended."""
    index = make_index()
    (node,) = enter(index, chain("path", 1))
    index.pin(node, "warm")
    index.pin(node, "warm")
    index.unpin(node, "warm")
    assert index.victim("warm") == NO_NODE
    index.unpin(node, "warm")
    assert index.victim("warm") == node


def test_a_broken_block_hides_what_is_behind_it():
    """A lost block with descendants ends every match before it, until a save brings it back and them with it."""
    index = make_index()
    path = chain("path", 6)
    nodes = enter(index, path)
    index.lost(nodes[2], "warm")
    assert index.covered(LAYOUT.id, path, "warm") == 2
    assert index.covered_or_broken(LAYOUT.id, path, "warm") == 6
    assert not index.holds(nodes[2], "warm")
    assert index.broken("warm") == 1
    index.check_integrity()
    assert index.add(LAYOUT.id, path[2], path[1], 3, "warm", 0.0) == nodes[2]
    assert index.covered(LAYOUT.id, path, "warm") == 6
    assert index.broken("warm") == 0
    index.check_integrity()


def test_a_broken_block_of_one_layout_hides_nothing_of_another():
    """Two layouts have the same keys: damage in the one does not shorten a match of the other."""
    index = make_index()
    path = chain("path", 4)
    nodes = enter(index, path)
    enter(index, path, layout=OTHER)
    index.lost(nodes[1], "warm")
    assert index.covered(LAYOUT.id, path, "warm") == 1
    assert index.covered(OTHER.id, path, "warm") == 4


def test_a_lost_leaf_leaves_at_once():
    """A lost block without descendants is dropped, and may be entered again."""
    index = make_index()
    path = chain("path", 2)
    nodes = enter(index, path)
    index.lost(nodes[1], "warm")
    assert index.node(LAYOUT.id, path[1]) == NO_NODE
    assert index.broken("warm") == 0
    assert index.add(LAYOUT.id, path[1], path[0], 2, "warm", 0.0) != NO_NODE
    index.check_integrity()


@pytest.mark.parametrize("length", [3, 3000])
def test_broken_blocks_leave_with_their_last_descendant(length):
    """When nothing depends on a broken block any more it goes, and a long path of them goes without deep recursion."""
    index = make_index()
    path = chain("path", length)
    nodes = enter(index, path)
    index.pin(nodes[-1], "warm")
    for node in nodes[1:]:
        index.lost(node, "warm")
    assert index.broken("warm") == length - 1
    index.unpin(nodes[-1], "warm")
    assert (index.blocks("warm"), index.broken("warm")) == (1, 0)
    index.check_integrity()


def test_a_reused_number_never_revives_an_old_heap_entry():
    """A node number that is used again is evicted by its own recency, not by that of the block it named before."""
    index = make_index("warm")
    (first,) = enter(index, chain("first", 1), now=1.0)
    index.lost(first, "warm")  # leaves its entry behind in the heap
    enter(index, chain("second", 1), now=5.0)
    (third,) = enter(index, chain("third", 1), now=3.0)
    assert index.node(LAYOUT.id, chain("second", 1)[0]) == first
    assert index.victim("warm") == third
    index.check_integrity()


@given(rng=st.randoms(use_true_random=False))
def test_integrity_holds_after_any_changes(rng):
    """Whatever is added, touched, pinned, lost and removed in two tiers, counts hold and everything can be evicted."""
    index = make_index()
    paths = [chain(f"branch {number}", 5, behind=chain("trunk", 3)) for number in range(4)]
    pins: list[tuple[int, str]] = []
    for step in range(80):
        path, tier = rng.choice(paths), rng.choice(("warm", "cold"))
        node = index.node(LAYOUT.id, rng.choice(path))
        match rng.choice(("enter", "enter", "evict", "touch", "pin", "unpin", "lost")):
            case "enter":
                enter(index, path[: rng.randint(1, 8)], tier, float(step))
            case "evict" if (victim := index.victim(tier)) != NO_NODE:
                index.remove(victim, tier)
            case "touch" if node != NO_NODE:
                index.touch(node, float(step))
            case "pin" if index.holds(node, tier):
                index.pin(node, tier)
                pins.append((node, tier))
            case "unpin" if pins:
                index.unpin(*pins.pop(rng.randrange(len(pins))))
            case "lost" if index.holds(node, tier):
                index.lost(node, tier)
        index.check_integrity()
        assert index.pins("warm") + index.pins("cold") == len(pins)
    for pin in pins:
        index.unpin(*pin)
    for tier in ("warm", "cold"):
        list(drain(index, tier))
    assert len(index) == 0


DAMAGE: dict[str, Callable[[Index, list[int]], object]] = {
    "a block without its parent": lambda index, nodes: index._held.__setitem__(nodes[0], 0),
    "a child too many": lambda index, nodes: index._tiers["warm"].children.__setitem__(nodes[1], 0),
    "a wrong total": lambda index, nodes: setattr(index._tiers["warm"], "blocks", 7),
    "a wrong depth": lambda index, nodes: index._depths.__setitem__(nodes[1], 9),
    "a leaf that is not queued": lambda index, nodes: index._tiers["warm"].queued.__setitem__(nodes[2], 0),
    "a leaf without a heap entry": lambda index, nodes: index._tiers["warm"].heap.clear(),
    "a key under another number": lambda index, nodes: index._by_key[LAYOUT.id].update({b"x" * 32: nodes[0]}),
    "a broken block nobody holds": lambda index, nodes: index._tiers["cold"].broken.add(nodes[2]),
    "a broken leaf": lambda index, nodes: index._tiers["warm"].broken.add(nodes[2]),
    "a free number in use": lambda index, nodes: index._free.append(nodes[2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_integrity_check_finds_damage(damage):
    """check_integrity is not vacuous: each kind of planted damage makes it raise."""
    index = make_index()
    nodes = enter(index, chain("path", 3))
    index.check_integrity()
    DAMAGE[damage](index, nodes)
    with pytest.raises(AssertionError):
        index.check_integrity()


def test_leaves_only_in_names_leaves_without_another_copy():
    """What is handed down before it goes: leaves of this tier that no other tier holds, the first to go first."""
    index = make_index()
    both, young, old = chain("both", 2), chain("young", 2), chain("old", 2)
    enter(index, both, now=0.0)
    enter(index, both, "cold", now=0.0)
    enter(index, young, now=2.0)
    enter(index, old, now=1.0)
    assert index.leaves_only_in("warm", 8) == [index.node(LAYOUT.id, path[-1]) for path in (old, young)]
    assert index.leaves_only_in("warm", 1) == [index.node(LAYOUT.id, old[-1])]
    assert set(index.only_in("warm")) == {index.node(LAYOUT.id, key) for key in (*young, *old)}


class DeepestFirst:
    name = "deepest"

    def priority(self, leaf: Candidate) -> float:
        return float(-leaf.depth)


def test_the_policy_decides_among_leaves():
    """Another policy behind the seam evicts in its own order, still leaves only."""
    index = Index(("warm",), DeepestFirst())
    short, long = chain("short", 1), chain("long", 3)
    enter(index, short, now=0.0)
    enter(index, long, now=9.0)
    assert list(drain(index, "warm"))[:2] == long[:0:-1]


@given(order=st.permutations(range(6)), depth=st.integers(1, 40), count=st.integers(1, 9), gone=st.integers(0, 39))
def test_what_is_held_is_told_a_little_at_a_time(order, depth, count, gone):
    """However its nodes are numbered, one call tells few blocks, and all of them tell each once, parents first."""
    index = make_index("warm")
    for name in range(6):  # numbers are used again, so that children may have smaller ones than their parents
        enter(index, chain(f"was {name}", depth))
    for _ in range(6 * depth - min(gone, 6 * depth - 1)):
        index.remove(index.victim("warm"), "warm")
    paths = [chain(f"is {name}", depth) for name in order]
    for path in paths:
        enter(index, path)
    told, start, seen = bytearray(), 0, []
    while True:
        start, found = index.held(start, count, told)
        keys = [key for each, _ in found.values() for key in each]
        assert len(keys) <= max(count, 0 if seen else depth)
        seen += keys
        if not start:
            break
    all_keys = [key for name in range(6) for kind in ("was", "is") for key in chain(f"{kind} {name}", depth)]
    held = [key for key in all_keys if index.holds(index.node(LAYOUT.id, key), "warm")]
    assert sorted(seen) == sorted(held)
    for path in paths:
        assert [key for key in seen if key in set(path)] == path
