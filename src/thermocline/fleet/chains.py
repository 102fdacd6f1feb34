"""Texts as chains of numbers, and the forest of runs in which a fleet's blocks are filed.

A **print** is 64 bits that stand for all tokens before a place: print(p) = xxh3(16 token ids, seed = print(p - 16)).
It is four times as quick to make as a key, and enough to route by: a collision misroutes one request, and nothing is
ever loaded by it. Events without token ids, as nodes send them, name blocks by own key; those are filed by its first
bytes, in a forest of their own, and a prompt's keys are made only where there is such a forest.

A **run** is up to 64 blocks that follow each other, with one number of 64 bits per instance that says which of them it
holds. It is a radix tree's edge (Morrison, 1968) with bitmaps: what an instance holds is a plain set of blocks, so a
block removed from the middle hides what is behind it, and coming back shows it again. A **span** is a part of a run
that came at once: one digest over all its tokens, so that a prompt goes through it in one step instead of 64.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import repeat

import xxhash

from thermocline.blocks.key import TOKEN_BYTES, TOKENS_PER_KEY, BlockKey, Tokens, block_keys, root_key

STEP_BYTES = TOKENS_PER_KEY * TOKEN_BYTES
RUN_BLOCKS = 64
_STEPS = struct.Struct(f"{STEP_BYTES}s")
"""Cuts tokens into steps, in two thirds of the time of slices."""
NAME_MASK = (1 << 60) - 1
"""Numbers below 2**60 take 32 bytes in Python, others 48."""
SPAN_BLOCKS_MIN, WHOLE_FROM = 8, 8
NO_NAME = 0
"""Stands where no engine has named the block: it was learned from what was sent."""


class By(Enum):
    """What the blocks of a forest are filed by."""

    PRINT = "print"
    KEY = "key"
    CHUNK = "chunk"


Filed = tuple[By, int]
"""A forest: what its blocks are filed by, and how many tokens are in one (0 for chunks of bytes)."""


def grow_prints(ids: bytes | memoryview, seed: int) -> list[int]:
    """Prints at every 16 tokens of `ids` (u32, little-endian), behind a text whose print is `seed`."""
    digest, key = xxhash.xxh3_64_intdigest, seed
    whole = len(ids) - len(ids) % STEP_BYTES
    return [key := digest(step, key) for (step,) in _STEPS.iter_unpack(ids[:whole])]


def root_print(secret: int, salt: str = "", lora: str = "") -> int:
    """The print before any token. Other salts and adapters share nothing."""
    parts = (salt.encode(), lora.encode())
    return xxhash.xxh3_64_intdigest(b"".join(len(part).to_bytes(4, "little") + part for part in parts), secret)


def name_of(name: int | bytes) -> int:
    """An engine's name for a block, or an own key, as the forest knows it."""
    return (name if isinstance(name, int) else int.from_bytes(name[:8], "little")) & NAME_MASK


class Chain:
    """One prompt, as the index looks it up. Tokens are read, and keys made, only as far as they are asked for.

    `tokens` are a list, or u32 in a buffer; they are read later, so they must stay as they are. Several threads may
    look it up: what was read and made so far is replaced whole, at worst by less of it, and each goes on with its own.
    """

    __slots__ = (
        "_grown",
        "_ids",
        "_list",
        "_lora",
        "_salt",
        "before_tokens",
        "chunk_keys",
        "chunk_tokens",
        "root",
        "since",
        "tokens",
    )

    def __init__(self, tokens: Sequence[int] | Tokens, root: int, salt: str = "", lora: tuple[str, ...] = ()) -> None:
        self._list: list[int] = []
        self._ids: array[int] | memoryview[int]
        if isinstance(tokens, list | tuple):
            self._list = tokens if isinstance(tokens, list) else [*tokens]
            self._ids, self.tokens = array("I"), len(tokens)
        else:
            self._ids = memoryview(tokens).cast("B").cast("I")  # type: ignore[arg-type]  # what is no list has a buffer
            self.tokens = len(self._ids)
        self.root, self._salt, self._lora = root, salt, lora
        self._grown: tuple[Sequence[int], BlockKey | None] = ((), None)  # keys as filed, and the last: one value
        self.chunk_keys: Sequence[int] = ()
        self.chunk_tokens = self.before_tokens = 0.0
        self.since = 0  # how much its slot had announced when it was sent there

    @classmethod
    def of_chunks(
        cls, keys: Sequence[int], chunk_tokens: float, *, root: int = 0, before_tokens: float = 0.0, tokens: int = 0
    ) -> Chain:
        """A prompt that is known by keys of its bytes only, each about `chunk_tokens` tokens after the one before.

        It has about `tokens`, of which `before_tokens` stand before the bytes that have keys. `root` is as for tokens.
        """
        chain = cls((), root)
        chain.chunk_keys, chain.chunk_tokens, chain.before_tokens = keys, chunk_tokens, before_tokens
        chain.tokens = tokens or max(1, round(before_tokens + len(keys) * chunk_tokens))
        return chain

    def continued(self, tokens: Sequence[int] | Tokens, known_tokens: int) -> Chain:
        """Another prompt whose first `known_tokens` are those of this one, which is the caller's word."""
        chain = Chain(tokens, self.root, self._salt, self._lora)
        grown = self._grown
        if len(grown[0]) <= known_tokens // TOKENS_PER_KEY:
            chain._grown = grown
        return chain

    def names(self, filed: Filed, blocks: int) -> Sequence[int]:
        """What the first blocks are filed by there: at least `blocks` of them, where the prompt has so many."""
        by, block_tokens = filed
        if by is By.CHUNK:
            return self.chunk_keys
        step = block_tokens // TOKENS_PER_KEY
        found = self._grown_keys(blocks * step) if by is By.KEY else grow_prints(self.ids(0, blocks * step), self.root)
        return found if step == 1 else found[step - 1 :: step]

    def unit(self, filed: Filed) -> float:
        """Tokens per block of that forest."""
        return filed[1] or self.chunk_tokens

    def ids(self, first: int, stop: int) -> bytes:
        """The token ids of steps from `first` to `stop`, as they are hashed, as far as the prompt goes."""
        first, stop, ids = first * TOKENS_PER_KEY, min(stop * TOKENS_PER_KEY, self.tokens), self._ids
        read = len(ids)
        if stop > read and isinstance(ids, array):
            if stop * WHOLE_FROM >= self.tokens:  # all of a list costs a third of as much in slices
                ids = array("I")
                ids.fromlist(self._list)
            else:
                ids = ids + array("I", self._list[read:stop])  # another may be reading the old one
            self._ids = ids
        return ids[first:stop].tobytes()

    def _grown_keys(self, count: int) -> Sequence[int]:
        names, last = self._grown
        known = len(names)
        if count > known and (ids := self.ids(known, count)):
            root = last or root_key(self._salt.encode())
            extras = tuple(b"lora " + part.encode() for part in self._lora)
            keys = block_keys(ids, root=root, tokens_per_block=TOKENS_PER_KEY, extras=extras)
            if keys:
                names = [*names, *map(name_of, keys)]
                self._grown = names, keys[-1]
        return names


class Run:
    """Blocks that follow each other behind `parent`'s block `offset - 1` (None: they begin a text).

    `holders` has a bit for each instance that holds any of them, in any tier; `whole` may have one for those that hold
    all of them on the device. `kids` counts the runs that follow. A span is (first block, stop, digest). `depth` blocks
    lie before it; `root` is the print before any token, 0 where unknown. `links` are keys of bytes that lead here.
    """

    __slots__ = (
        "aliases",
        "depth",
        "forest",
        "holders",
        "kids",
        "links",
        "names",
        "offset",
        "parent",
        "prints",
        "root",
        "spans",
        "whole",
    )

    def __init__(self, forest: Forest, parent: Run | None, offset: int, root: int) -> None:
        self.forest, self.parent, self.offset = forest, parent, offset
        self.depth: int = parent.depth + offset if parent is not None else 0
        self.root: int = parent.root if parent is not None else root
        self.links: set[int] | None = None
        self.prints = array("Q")
        self.names = array("Q")
        self.holders = self.whole = self.kids = 0
        self.aliases: tuple[int, ...] = ()
        self.spans: tuple[tuple[int, int, int], ...] = ()


Place = tuple[Run, int]
Piece = tuple[Run, int, int]
"""Blocks [start, stop) of a run."""


class Forest:
    """All runs of one kind: `heads` by the print of a run's first block, `known` by the engines' names of blocks."""

    __slots__ = ("aliases", "blocks", "filed", "heads", "known")

    def __init__(self, filed: Filed) -> None:
        self.filed = filed
        self.blocks = self.aliases = 0
        self.heads: dict[int, Run] = {}
        self.known: dict[int, Run | Place] = {}

    def find(self, name: int) -> Place | None:
        """Where the block of that name lies."""
        found = self.known.get(name)
        return (found, found.names.index(name)) if isinstance(found, Run) else found

    def place(
        self,
        behind: Place | None,
        prints: Sequence[int],
        names: Sequence[int],
        ids: bytes | memoryview = b"",
        root: int = 0,
    ) -> Iterator[Piece]:
        """File blocks that follow each other, and say where they lie. Those already filed stay where they are.

        `ids` are the blocks' tokens, where prints are made of nothing else, and `root` is the print before them.
        """
        run, offset = behind or (None, 0)
        offset += bool(behind)
        at, count = 0, len(prints)
        while at < count:
            if run is not None and offset < len(run.prints):
                same = common(run.prints, offset, prints, at)
                if same:
                    self._name(run, offset, names[at : at + same])
                    yield run, offset, offset + same
                    at, offset = at + same, offset + same
                    continue
            head = self.heads.get(prints[at])
            if head is not None:
                run, offset = head, 0
                continue
            if run is None or offset < len(run.prints) or offset == RUN_BLOCKS:
                run, offset = self._begin(run, offset, prints[at], root), 0
            stop = min(count, at + RUN_BLOCKS - offset)
            run.prints += array("Q", prints[at:stop])
            run.names += array("Q", names[at:stop])
            run.whole = 0
            self.blocks += stop - at
            if names[at] != NO_NAME:
                self.known.update(zip(names[at:stop], repeat(run)))
            if ids and stop - at >= SPAN_BLOCKS_MIN:
                size = self.filed[1] * TOKEN_BYTES
                digest = xxhash.xxh3_64_intdigest(ids[at * size : stop * size], prints[at - 1] if at else root)
                run.spans += ((offset, offset + stop - at, digest),)
            yield run, offset, offset + stop - at
            at, offset = stop, offset + stop - at

    def place_chain(self, chain: Chain) -> Iterator[Piece]:
        """File a prompt that no event has told of. What is filed already is not hashed again, as far as spans go."""
        path = self.path(chain)
        yield from ((run, 0, count) for run, count in path)
        at = sum(count for _, count in path)
        behind = (path[-1][0], path[-1][1] - 1) if path else None
        if self.filed[0] is By.CHUNK:
            prints = chain.names(self.filed, 0)[at:]
            yield from self.place(behind, prints, [NO_NAME] * len(prints))
            return
        step = self.filed[1] // TOKENS_PER_KEY
        root = behind[0].prints[behind[1]] if behind else chain.root
        ids = chain.ids(at * step, chain.tokens // self.filed[1] * step)
        prints = grow_prints(ids, root)[step - 1 :: step]
        yield from self.place(behind, prints, [NO_NAME] * len(prints), ids, root)

    def path(self, chain: Chain) -> list[Place]:
        """The runs along a prompt, each with the number of its blocks that the prompt goes through.

        Where a run was left is found by bisection. No more of the prompt is read than that takes.
        """
        if bool(chain.chunk_tokens) != (self.filed[0] is By.CHUNK):
            return []
        return self._path_by_prints(chain) if self.filed[0] is By.PRINT else self._path_by_names(chain)

    def _path_by_names(self, chain: Chain) -> list[Place]:
        path: list[Place] = []
        at, names = 0, chain.names(self.filed, 1)
        while at < len(names) and (run := self.heads.get(names[at])):
            stop = at + len(run.prints)
            if stop > len(names):
                names = chain.names(self.filed, stop)
            same = common(run.prints, 0, names, at)
            if not same:  # it is being filed at this moment
                break
            path.append((run, same))
            at += same
            if at == len(names):
                names = chain.names(self.filed, at + 1)
        return path

    def _path_by_prints(self, chain: Chain) -> list[Place]:
        path: list[Place] = []
        step = self.filed[1] // TOKENS_PER_KEY
        at, last, seed = 0, chain.tokens // self.filed[1], chain.root
        while at < last:
            ids = chain.ids(at * step, (at + 1) * step)
            run = self.heads.get(xxhash.xxh3_64_intdigest(ids, seed) if step == 1 else grow_prints(ids, seed)[-1])
            same = _along(run, chain, at, seed, step) if run is not None else 0
            if run is None or not same:
                break
            path.append((run, same))
            at, seed = at + same, run.prints[same - 1]
        return path

    def forget(self, run: Run) -> None:
        """Take a run out. It must have no kids."""
        del self.heads[run.prints[0]]
        self.blocks -= len(run.prints)
        self.aliases -= len(run.aliases)
        known = self.known
        for name in (*run.names, *run.aliases):
            found = known.get(name)
            if found is run or (isinstance(found, tuple) and found[0] is run):
                del known[name]
        if run.parent is not None:
            run.parent.kids -= 1

    def _begin(self, parent: Run | None, offset: int, first: int, root: int) -> Run:
        run = self.heads[first] = Run(self, parent, offset, root)
        if parent is not None:
            parent.kids += 1
        return run

    def _name(self, run: Run, offset: int, names: Sequence[int]) -> None:
        """Engines that hash alike have one name for a block. Another name is an alias, and one that was none is set."""
        stop = offset + len(names)
        known_names, new_names = run.names[offset:stop], array("Q", names)
        if known_names == new_names or not any(new_names):
            return
        if not any(known_names):
            run.names[offset:stop] = new_names
            self.known.update(zip(names, repeat(run)))
            return
        for at, name in enumerate(names, offset):
            known = run.names[at]
            if known == NO_NAME:
                run.names[at] = name
                self.known[name] = run
            elif name not in {known, NO_NAME} and name not in self.known:
                self.known[name] = (run, at)
                run.aliases += (name,)
                self.aliases += 1


def depth_of(place: Place | None) -> int:
    """How many blocks a text has up to there, that block too."""
    return place[0].depth + place[1] + 1 if place else 0


def up(place: Place, blocks: int) -> Place:
    """The block so many before."""
    run, at = place
    while at < blocks and run.parent is not None:
        blocks -= at + 1
        run, at = run.parent, run.offset - 1
    return run, at - blocks


def climbed(place: Place) -> list[Place]:
    """The runs from a text's beginning up to there, each with the number of its blocks that the text goes through."""
    run, at = place
    path = [(run, at + 1)]
    while run.parent is not None:
        path.append((run.parent, run.offset))
        run = run.parent
    return path[::-1]


def _along(run: Run, chain: Chain, at: int, seed: int, step: int) -> int:
    """How many blocks of the run the prompt goes through from its block `at` on, behind the print `seed`."""
    done, blocks = 0, len(run.prints)
    for start, stop, digest in run.spans:
        if start != done or (at + stop) * step * TOKENS_PER_KEY > chain.tokens:
            break
        if xxhash.xxh3_64_intdigest(chain.ids((at + done) * step, (at + stop) * step), seed) != digest:
            break
        done, seed = stop, run.prints[stop - 1]
    if done == blocks:
        return done
    prints = grow_prints(chain.ids((at + done) * step, (at + blocks) * step), seed)
    return done + common(run.prints, done, prints if step == 1 else prints[step - 1 :: step], 0)


def common(run: Sequence[int], offset: int, prints: Sequence[int], at: int) -> int:
    """How many blocks are the same from `run[offset]` and `prints[at]` on: equal prints, equal texts before."""
    low, high = 0, min(len(run) - offset, len(prints) - at)
    if high and run[offset + high - 1] == prints[at + high - 1]:
        return high
    while low < high:
        middle = (low + high) // 2
        if run[offset + middle] == prints[at + middle]:
            low = middle + 1
        else:
            high = middle
    return low
