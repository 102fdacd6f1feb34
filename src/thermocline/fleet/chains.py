"""Texts as chains of numbers, and the forest of runs in which a fleet's blocks are filed.

A **print** is 64 bits that stand for all tokens before a place: print(p) = xxh3(16 token ids, seed = print(p - 16)).
It is four times as quick to make as a key, and enough to route by: a collision misroutes one request, and nothing is
ever loaded by it. Events without token ids, as nodes send them, name blocks by own key; those are filed by its first
bytes, in a forest of their own, and a prompt's keys are made only where there is such a forest.

A **run** is up to 64 blocks that follow each other, with one number of 64 bits per instance that says which of them it
holds. It is a radix tree's edge (Morrison, 1968) with bitmaps: what an instance holds is a plain set of blocks, so a
block removed from the middle hides what is behind it, and coming back shows it again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import repeat

import xxhash

from thermocline.blocks.key import TOKEN_BYTES, TOKENS_PER_KEY, BlockKey, Tokens, block_keys, root_key

STEP_BYTES = TOKENS_PER_KEY * TOKEN_BYTES
RUN_BLOCKS = 64
NAME_MASK = (1 << 60) - 1
"""Numbers below 2**60 take 32 bytes in Python, others 48."""
NO_NAME = 0
"""Stands where no engine has named the block: it was learned from what was sent."""


class By(Enum):
    """What the blocks of a forest are filed by."""

    PRINT = "print"
    KEY = "key"
    CHUNK = "chunk"


Filed = tuple[By, int]
"""A forest: what its blocks are filed by, and how many tokens are in one (0 for chunks of bytes)."""


def grow_prints(ids: bytes, seed: int) -> list[int]:
    """Prints at every 16 tokens of `ids` (u32, little-endian), behind a text whose print is `seed`."""
    digest, key = xxhash.xxh3_64_intdigest, seed
    return [key := digest(ids[at : at + STEP_BYTES], key) for at in range(0, len(ids) - STEP_BYTES + 1, STEP_BYTES)]


def root_print(secret: int, salt: str = "", lora: str = "") -> int:
    """The print before any token. Other salts and adapters share nothing."""
    parts = (salt.encode(), lora.encode())
    return xxhash.xxh3_64_intdigest(b"".join(len(part).to_bytes(4, "little") + part for part in parts), secret)


def name_of(name: int | bytes) -> int:
    """An engine's name for a block, or an own key, as the forest knows it."""
    return (name if isinstance(name, int) else int.from_bytes(name[:8], "little")) & NAME_MASK


class Chain:
    """One prompt, as the index looks it up. Prints and keys are made only as far as they are asked for.

    `tokens` are a list, or u32 in a buffer; they are read later, so they must stay as they are.
    """

    __slots__ = ("_ids", "_key", "_keys", "_lora", "_prints", "_root", "_salt", "chunk_tokens")

    def __init__(self, tokens: Sequence[int] | Tokens, root: int, salt: str = "", lora: tuple[str, ...] = ()) -> None:
        self._ids = tokens if isinstance(tokens, list | tuple) else memoryview(tokens).cast("B").cast("I")  # type: ignore[arg-type]  # a sequence that is neither has a buffer
        self._root, self._salt, self._lora = root, salt, lora
        self._prints: list[int] = []
        self._keys: list[int] = []
        self._key: BlockKey | None = None
        self.chunk_tokens = 0.0

    @classmethod
    def of_chunks(cls, keys: list[int], chunk_tokens: float) -> Chain:
        """A prompt that is known by keys of its bytes only, each about `chunk_tokens` tokens after the one before."""
        chain = cls((), 0)
        chain._prints, chain.chunk_tokens = keys, chunk_tokens
        return chain

    @property
    def tokens(self) -> int:
        """How many tokens the prompt has; 0 where only chunks are known."""
        return len(self._ids)

    def continued(self, tokens: Sequence[int] | Tokens, known_tokens: int) -> Chain:
        """Another prompt whose first `known_tokens` are those of this one, which is the caller's word."""
        chain = Chain(tokens, self._root, self._salt, self._lora)
        steps = known_tokens // TOKENS_PER_KEY
        chain._prints = self._prints[:steps]
        if len(self._keys) <= steps:
            chain._keys, chain._key = self._keys.copy(), self._key
        return chain

    def names(self, filed: Filed, blocks: int) -> Sequence[int]:
        """What the first blocks are filed by there: at least `blocks` of them, where the prompt has so many."""
        by, block_tokens = filed
        if by is By.CHUNK:
            return self._prints if self.chunk_tokens else ()
        if self.chunk_tokens:
            return ()
        step = block_tokens // TOKENS_PER_KEY
        found = self._grown_keys(blocks * step) if by is By.KEY else self._grown_prints(blocks * step)
        return found if step == 1 else found[step - 1 :: step]

    def unit(self, filed: Filed) -> float:
        """Tokens per block of that forest."""
        return filed[1] or self.chunk_tokens

    def _grown_prints(self, count: int) -> list[int]:
        prints = self._prints
        known = len(prints)
        if count > known:
            prints += grow_prints(self._bytes(known, count), prints[-1] if prints else self._root)
        return prints

    def _grown_keys(self, count: int) -> list[int]:
        known = len(self._keys)
        if count > known and (ids := self._bytes(known, count)):
            root = self._key or root_key(self._salt.encode())
            extras = tuple(b"lora " + part.encode() for part in self._lora)
            keys = block_keys(ids, root=root, tokens_per_block=TOKENS_PER_KEY, extras=extras)
            if keys:
                self._key = keys[-1]
            self._keys += map(name_of, keys)
        return self._keys

    def _bytes(self, first: int, stop: int) -> bytes:
        """The ids of whole steps from `first` to `stop`, as they are hashed."""
        part = self._ids[first * TOKENS_PER_KEY : stop * TOKENS_PER_KEY]
        return part.tobytes() if isinstance(part, memoryview) else array("I", part).tobytes()


class Run:
    """Blocks that follow each other behind `parent`'s block `offset - 1` (None: they begin a text).

    `holders` has a bit for each instance that holds any of them, in any tier. `kids` counts the runs that follow.
    """

    __slots__ = ("aliases", "forest", "holders", "kids", "names", "offset", "parent", "prints")

    def __init__(self, forest: Forest, parent: Run | None, offset: int) -> None:
        self.forest, self.parent, self.offset = forest, parent, offset
        self.prints = array("Q")
        self.names = array("Q")
        self.holders = self.kids = 0
        self.aliases: tuple[int, ...] = ()


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

    def place(self, behind: Place | None, prints: Sequence[int], names: Sequence[int]) -> Iterator[Piece]:
        """File blocks that follow each other, and say where they lie. Those already filed stay where they are."""
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
                run, offset = self._begin(run, offset, prints[at]), 0
            stop = min(count, at + RUN_BLOCKS - offset)
            run.prints.extend(prints[at:stop])
            run.names.extend(names[at:stop])
            self.blocks += stop - at
            if names[at] != NO_NAME:
                self.known.update(zip(names[at:stop], repeat(run)))
            yield run, offset, offset + stop - at
            at, offset = stop, offset + stop - at

    def path(self, chain: Chain) -> list[Place]:
        """The runs along a prompt, each with the number of its blocks that the prompt goes through.

        A run's last print stands for all of it, so a run is one comparison; where the prompt leaves it is found by
        bisection. No more of the prompt is hashed than that takes.
        """
        filed = self.filed
        path: list[Place] = []
        at, names = 0, chain.names(filed, 1)
        while at < len(names) and (run := self.heads.get(names[at])):
            stop = at + len(run.prints)
            if stop > len(names):
                names = chain.names(filed, stop)
            same = common(run.prints, 0, names, at)
            if not same:  # it is being filed at this moment
                break
            path.append((run, same))
            at += same
            if at == len(names):
                names = chain.names(filed, at + 1)
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

    def _begin(self, parent: Run | None, offset: int, first: int) -> Run:
        run = self.heads[first] = Run(self, parent, offset)
        if parent is not None:
            parent.kids += 1
        return run

    def _name(self, run: Run, offset: int, names: Sequence[int]) -> None:
        """Engines that hash alike have one name for a block. Another name is an alias, and one that was none is set."""
        stop = offset + len(names)
        if run.names[offset:stop] == array("Q", names):
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
