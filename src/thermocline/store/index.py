"""The union index: one node per block, with the tiers that hold it. The tree of prefixes lives here and only here.

Every tier is prefix-closed: a block is entered for a tier only while its parent is (or it is a first block), and leaves
it only when none of its children is there. So the longest match is a bisection, and the blocks that may be evicted are
the leaves. A lease counts as one more child, which keeps a whole path in place by its deepest block. A block found
damaged while children depend on it stays entered as *broken*: it ends every match, until a save brings it back.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.store.evict import Candidate, Eviction
from thermocline.tiers.tier import FIRST, Found

NO_NODE = -1
LOOK_AHEAD = 4
"""How many leaves are looked at for each that is wanted."""
NEVER_USED = float("-inf")


class Place(NamedTuple):
    """What a node names."""

    layout: LayoutId
    key: BlockKey


@dataclass(slots=True)
class _TierColumns:
    """One tier's view of the tree: children per node, and its leaves ordered by the eviction policy."""

    children: array[int] = field(default_factory=lambda: array("i"))
    queued: bytearray = field(default_factory=bytearray)
    heap: list[tuple[float, int, int]] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    blocks: int = 0


class Index:
    """Nodes in columns, by number. Not thread-safe: the store holds its lock."""

    def __init__(self, tiers: Sequence[str], policy: Eviction) -> None:
        self._policy = policy
        self._bits = {tier: 1 << at for at, tier in enumerate(tiers)}
        self._tiers = {tier: _TierColumns() for tier in tiers}
        self._by_key: dict[LayoutId, dict[BlockKey, int]] = {}
        self._layouts: list[LayoutId] = []
        self._layout_of = array("i")
        self._keys: list[BlockKey | None] = []
        self._parents = array("q")
        self._depths = array("i")
        self._held = bytearray()
        self._used = array("d")
        self._births = array("q")
        self._free: list[int] = []
        self._born = 0

    def __len__(self) -> int:
        return len(self._keys) - len(self._free)

    # -- questions -----------------------------------------------------------------------------------------------------

    def covered(self, layout: LayoutId, keys: Sequence[BlockKey], tier: str) -> int:
        """How many leading blocks the tier holds, by bisection."""
        covered = self.covered_or_broken(layout, keys, tier)
        return self._unbroken(layout, keys[:covered], tier) if self._tiers[tier].broken else covered

    def covered_or_broken(self, layout: LayoutId, keys: Sequence[BlockKey], tier: str) -> int:
        """The same, counting blocks that are broken or hidden behind a broken one."""
        nodes = self._by_key.get(layout)
        if not nodes:
            return 0
        bit, held, get = self._bits[tier], self._held, nodes.get
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            node = get(keys[middle])
            if node is not None and held[node] & bit:
                low = middle + 1
            else:
                high = middle
        return low

    def node(self, layout: LayoutId, key: BlockKey) -> int:
        """The number of a block, or NO_NODE."""
        return self._by_key.get(layout, {}).get(key, NO_NODE)

    def place(self, node: int) -> Place:
        """What the node names."""
        key = self._keys[node]
        assert key is not None
        return Place(self._layouts[self._layout_of[node]], key)

    def parent(self, node: int) -> int:
        """The parent's number, or NO_NODE for a first block."""
        return self._parents[node]

    def depth(self, node: int) -> int:
        """1 for a first block."""
        return self._depths[node]

    def used(self, node: int) -> float:
        """When it was last used, on the store's clock; a block with children does not know of their use."""
        return self._used[node]

    def holds(self, node: int, tier: str) -> bool:
        """True if the tier holds the block undamaged."""
        return self._has(node, tier) and node not in self._tiers[tier].broken

    def blocks(self, tier: str) -> int:
        """How many blocks are entered for the tier."""
        return self._tiers[tier].blocks

    def broken(self, tier: str) -> int:
        """How many of them are broken."""
        return len(self._tiers[tier].broken)

    def layouts(self) -> Sequence[LayoutId]:
        """Layouts of which at least one block is known."""
        return [layout for layout, nodes in self._by_key.items() if nodes]

    def only_in(self, tier: str) -> Iterator[int]:
        """Nodes that no other tier holds."""
        bit = self._bits[tier]
        return (node for node, held in enumerate(self._held) if held == bit)

    def leaves_only_in(self, tier: str, count: int) -> list[int]:
        """Up to `count` leaves that no other tier holds, from among the next ones that the policy would lose."""
        heap, bit = self._tiers[tier].heap, self._bits[tier]
        passed: list[tuple[float, int, int]] = []
        nodes: list[int] = []
        while len(nodes) < count and len(passed) < LOOK_AHEAD * count and (node := self.victim(tier)) != NO_NODE:
            passed.append(heapq.heappop(heap))
            if self._held[node] == bit:
                nodes.append(node)
        for entry in passed:
            heapq.heappush(heap, entry)
        return nodes

    def held(
        self, start: int, count: int, told: bytearray
    ) -> tuple[int, dict[tuple[str, LayoutId], tuple[list[BlockKey], list[BlockKey]]]]:
        """What each tier holds undamaged of the nodes from `start` on and the paths to them: keys, and parents' keys.

        Looks at `count` nodes at most, and gives about as many; parents come before their children. Returns where to go
        on, 0 at the end. `told` marks the nodes that were given already, and grows with the index.
        """
        told += bytes(len(self._keys) - len(told))
        found: dict[tuple[str, LayoutId], tuple[list[BlockKey], list[BlockKey]]] = {}
        left, stop = count, min(start + count, len(self._keys))
        for node in range(start, stop):
            path = self._untold(node, told) if self._keys[node] is not None else []
            rest = path[left:] if node else []  # 0 is the end, and no place to go on at
            for each in path[: len(path) - len(rest)]:
                told[each] = 1
                place, above = self.place(each), self._parents[each]
                for tier in filter(lambda tier: self.holds(each, tier), self._bits):
                    keys, parents = found.setdefault((tier, place.layout), ([], []))
                    keys.append(place.key)
                    parents.append(NO_PARENT if above == NO_NODE else self.place(above).key)
            if rest:
                return node, found
            left = max(0, left - len(path))
        return stop if stop < len(self._keys) else 0, found

    def _untold(self, node: int, told: bytearray) -> list[int]:
        """The path to a node, from the first of it that was not given yet."""
        path: list[int] = []
        while node != NO_NODE and not told[node]:
            path.append(node)
            node = self._parents[node]
        path.reverse()
        return path

    # -- changes -------------------------------------------------------------------------------------------------------

    def add(self, layout: LayoutId, key: BlockKey, parent: BlockKey, depth: int, tier: str, now: float) -> int:
        """Enter a block for a tier, or mend it where it is broken. NO_NODE if its parent is not there, or not that."""
        nodes = self._by_key.setdefault(layout, {})
        above = NO_NODE if parent == NO_PARENT else nodes.get(parent, NO_NODE)
        if (parent == NO_PARENT) != (depth == 1) or (depth > 1 and not self._has(above, tier)):
            return NO_NODE
        node = nodes.get(key, NO_NODE)
        if (depth > 1 and self._depths[above] + 1 != depth) or (node != NO_NODE and self._parents[node] != above):
            return NO_NODE  # no path that somebody hashed: of a chain each key has one parent, and one depth
        if node == NO_NODE:
            node = nodes[key] = self._new(layout, key, above, depth)
        columns, bit = self._tiers[tier], self._bits[tier]
        self._used[node] = max(self._used[node], now)
        columns.broken.discard(node)
        if not self._held[node] & bit:
            self._held[node] |= bit
            columns.blocks += 1
            if above != NO_NODE:
                columns.children[above] += 1
            self._queue(node, tier)
        return node

    def restore(self, found: Found, tier: str, used: NDArray[np.float64]) -> list[BlockKey]:
        """Enter all that a tier was opened with; takes over `found`. Returns the keys whose ancestors are missing.

        A layout that is new here is entered in bulk, column by column: a million blocks take less than a second.
        """
        rooted = found.rooted()
        orphans: list[BlockKey] = []
        if not rooted.all():
            orphans = [key for key, stays in zip(found.positions, rooted.tolist(), strict=True) if not stays]
            found, used = found.only(rooted), used[rooted]
        if self._by_key.get(found.layout):
            self._restore_each(found, tier, used)
        elif found.positions:
            self._restore_all(found, tier, used)
        return orphans

    def _restore_each(self, found: Found, tier: str, used: NDArray[np.float64]) -> None:
        keys = found.keys
        for at in np.argsort(found.depths, kind="stable").tolist():
            above = int(found.parents[at])
            parent = NO_PARENT if above == FIRST else keys[above]
            self.add(found.layout, keys[at], parent, int(found.depths[at]), tier, float(used[at]))

    def _restore_all(self, found: Found, tier: str, used: NDArray[np.float64]) -> None:
        count, number = len(found.positions), self._layout_number(found.layout)
        keys = found.keys
        first = self._extend(count)
        part = slice(first, first + count)
        # a dict of a million is slow to make: the first one serves as it is
        nodes = dict(zip(keys, range(first, first + count), strict=True)) if first else found.positions
        self._by_key[found.layout] = nodes
        self._keys[part] = keys
        self._layout_of[part] = array("i", [number]) * count
        parents = np.where(found.parents == FIRST, NO_NODE, found.parents + first)
        births = np.arange(self._born + 1, self._born + 1 + count)
        self._born += count
        self._parents[part] = array("q", parents.tobytes())
        self._depths[part] = array("i", found.depths.astype(np.int32).tobytes())
        self._births[part] = array("q", births.tobytes())
        self._used[part] = array("d", used.tobytes())
        self._held[part] = bytes([self._bits[tier]]) * count
        self._restore_leaves(self._tiers[tier], first, parents, births)

    def _restore_leaves(
        self, columns: _TierColumns, first: int, parents: NDArray[np.int64], births: NDArray[np.int64]
    ) -> None:
        count = len(parents)
        children = np.bincount(parents[parents >= 0] - first, minlength=count).astype(np.int32)
        columns.children[first : first + count] = array("i", children.tobytes())
        leaves = np.flatnonzero(children == 0)
        columns.queued[first : first + count] = (children == 0).astype(np.uint8).tobytes()
        columns.heap += [(self._priority(first + at), int(births[at]), first + at) for at in leaves.tolist()]
        heapq.heapify(columns.heap)
        columns.blocks += count

    def remove(self, node: int, tier: str) -> None:
        """Take a leaf out of a tier. Its parent inherits its recency, and may be a leaf now."""
        assert self._has(node, tier), "remove of a block that is not there"
        assert not self._tiers[tier].children[node], "remove of a block with children"
        while node != NO_NODE:
            parent = self._take_out(node, tier)
            node = parent if self._is_broken_leaf(parent, tier) else NO_NODE

    def lost(self, node: int, tier: str) -> None:
        """A tier lost the block's bytes: drop it, or mark it broken for as long as descendants depend on it."""
        if self._tiers[tier].children[node]:
            self._tiers[tier].broken.add(node)
        else:
            self.remove(node, tier)

    def touch(self, node: int, now: float) -> None:
        """The path that ends here was used."""
        self._used[node] = max(self._used[node], now)

    def pin(self, node: int, tier: str) -> None:
        """Keep the block, and so its path, in a tier: one more child."""
        self._tiers[tier].children[node] += 1

    def unpin(self, node: int, tier: str) -> None:
        """End one pin."""
        self._tiers[tier].children[node] -= 1
        assert self._tiers[tier].children[node] >= 0, "unpin without pin"
        self._queue(node, tier)
        if self._is_broken_leaf(node, tier):
            self.remove(node, tier)

    def victim(self, tier: str, *, used_before: float = float("inf")) -> int:
        """The leaf that the policy would lose first, or NO_NODE; it stays until `remove`.

        Only a leaf not used since `used_before` counts, which is how a time to live is enforced.
        """
        columns, bit = self._tiers[tier], self._bits[tier]
        heap = columns.heap
        while heap:
            priority, birth, node = heap[0]
            if self._births[node] != birth or not columns.queued[node]:
                heapq.heappop(heap)
                continue
            if columns.children[node] or not self._held[node] & bit:
                heapq.heappop(heap)
                columns.queued[node] = 0
                continue
            current = self._priority(node)
            if current > priority:
                heapq.heapreplace(heap, (current, birth, node))
                continue
            return node if self._used[node] < used_before else NO_NODE
        return NO_NODE

    def check_integrity(self) -> None:
        """Closure, child counts and totals hold, and every leaf can be evicted; O(nodes). Raises AssertionError."""
        named = {node for nodes in self._by_key.values() for node in nodes.values()}
        assert sum(map(len, self._by_key.values())) == len(named) == len(self), "two keys have one node"
        assert not named & set(self._free), "a node is free and in use"
        for node in named:
            place = self.place(node)
            assert self._by_key[place.layout][place.key] == node, "a key is filed under another node"
            assert self._held[node], "a node that no tier holds"
        for tier in self._tiers:
            self._check_tier(tier)

    def _check_tier(self, tier: str) -> None:
        columns = self._tiers[tier]
        inside = [node for node in range(len(self._keys)) if self._has(node, tier)]
        assert len(inside) == columns.blocks, f"{tier}: {len(inside)} blocks, {columns.blocks} counted"
        assert columns.broken <= set(inside), f"{tier}: a broken block that is not entered"
        counts = [0] * len(self._keys)
        for node in inside:
            parent = self._parents[node]
            if parent != NO_NODE:
                assert self._has(parent, tier), f"{tier}: a block without its parent"
                assert self._depths[parent] + 1 == self._depths[node], "depths do not follow"
                counts[parent] += 1
        assert all(have >= want for have, want in zip(columns.children, counts, strict=True)), f"{tier}: child counts"
        waiting = {node for _, birth, node in columns.heap if self._births[node] == birth and columns.queued[node]}
        leaves = {node for node in inside if not columns.children[node]}
        assert leaves <= waiting, f"{tier}: a leaf that can never be evicted"
        assert not leaves & columns.broken, f"{tier}: a broken block that nothing depends on"

    def pins(self, tier: str) -> int:
        """How many pins there are; O(nodes)."""
        bit = self._bits[tier]
        inside = sum(1 for node, held in enumerate(self._held) if held & bit and self._parents[node] != NO_NODE)
        return sum(self._tiers[tier].children) - inside

    # -- inside --------------------------------------------------------------------------------------------------------

    def _has(self, node: int, tier: str) -> bool:
        return node != NO_NODE and bool(self._held[node] & self._bits[tier])

    def _unbroken(self, layout: LayoutId, keys: Sequence[BlockKey], tier: str) -> int:
        """A broken block hides its descendants: where the first one is on this path, which is held as a whole."""
        nodes, broken = self._by_key.get(layout, {}), self._tiers[tier].broken
        if len(broken) > len(keys):
            return next((at for at, key in enumerate(keys) if nodes[key] in broken), len(keys))
        covered = len(keys)
        for node in broken:
            at = self._depths[node] - 1
            if at < covered and nodes[keys[at]] == node:
                covered = at
        return covered

    def _is_broken_leaf(self, node: int, tier: str) -> bool:
        columns = self._tiers[tier]
        return node in columns.broken and not columns.children[node]

    def _take_out(self, node: int, tier: str) -> int:
        """Take one leaf out of a tier; returns its parent."""
        columns, parent = self._tiers[tier], self._parents[node]
        self._held[node] &= ~self._bits[tier] & 0xFF
        columns.broken.discard(node)
        columns.blocks -= 1
        if parent != NO_NODE:
            self._used[parent] = max(self._used[parent], self._used[node])
            columns.children[parent] -= 1
            self._queue(parent, tier)
        if not self._held[node]:
            self._delete(node)
        return parent

    def _priority(self, node: int) -> float:
        return self._policy.priority(Candidate(self._used[node], self._depths[node]))

    def _queue(self, node: int, tier: str) -> None:
        columns = self._tiers[tier]
        if not columns.children[node] and not columns.queued[node] and self._held[node] & self._bits[tier]:
            columns.queued[node] = 1
            heapq.heappush(columns.heap, (self._priority(node), self._births[node], node))

    def _new(self, layout: LayoutId, key: BlockKey, parent: int, depth: int) -> int:
        if not self._free:
            self._free.append(self._extend(1))
        node = self._free.pop()
        self._keys[node], self._layout_of[node] = key, self._layout_number(layout)
        self._parents[node], self._depths[node] = parent, depth
        self._born += 1
        self._births[node], self._used[node] = self._born, NEVER_USED
        return node

    def _layout_number(self, layout: LayoutId) -> int:
        if layout not in self._by_key:
            self._by_key[layout] = {}
        if layout not in self._layouts:
            self._layouts.append(layout)
        return self._layouts.index(layout)

    def _extend(self, count: int) -> int:
        """Add empty nodes to every column; returns the first."""
        first = len(self._keys)
        self._keys += [None] * count
        for column, width in ((self._layout_of, 4), (self._parents, 8), (self._depths, 4), (self._births, 8)):
            column.frombytes(bytes(width * count))
        self._used.frombytes(bytes(8 * count))
        self._held += bytes(count)
        for columns in self._tiers.values():
            columns.children.frombytes(bytes(4 * count))
            columns.queued += bytes(count)
        return first

    def _delete(self, node: int) -> None:
        place = self.place(node)
        del self._by_key[place.layout][place.key]
        self._keys[node] = None
        self._births[node] = 0
        for columns in self._tiers.values():
            columns.queued[node] = 0
        self._free.append(node)
