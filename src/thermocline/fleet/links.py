"""Prompts that are known by keys of their bytes, tied to the blocks that an engine made of them.

Without a tokenizer nobody here knows a prompt's tokens. But its engine says how many they were, and announces its
blocks: if one text alone ended at that depth since the prompt was sent there, it is this prompt. From then on keys of
its bytes stand for those blocks, whoever holds them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from thermocline.fleet.chains import Chain, Place, Run, climbed, depth_of, up

LINK_CHUNKS = 2
"""So many chunks from one link to the next; the last chunk of a prompt has one too."""
LINK_BYTES = 400
DEPTHS_MAX, ENDS_MAX = 128, 4
"""Ends of texts that are remembered of a slot: so many depths, and of each the last few."""
BLOCKS_PER_LINK = 16
"""For so many blocks that an index may file there may be one link."""
WAITING_MAX = 64
"""Prompts of a slot that were answered, and wait for their blocks to be announced."""
LATE_SECONDS = 2.0
"""By the sender's clock: how long events may come behind the answer that they belong to."""


class Ended(NamedTuple):
    """A prompt that was answered, and what its engine said of it. `since`: what had been announced before it."""

    chain: Chain
    since: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    until_seconds: float = 0.0


class _End(NamedTuple):
    """Blocks [start, depth of `place`] of a text came at once; with what came before, [first, ...]."""

    number: int
    place: Place
    start: int
    first: int


class Ends:
    """Where the texts ended that one slot announced lately."""

    __slots__ = ("_by_depth", "count", "sizes")

    def __init__(self) -> None:
        self.count = 0
        self.sizes: set[int] = set()
        self._by_depth: OrderedDict[tuple[int, int], tuple[_End, ...]] = OrderedDict()

    def note(self, behind: Place | None, place: Place) -> bool:
        """Blocks behind `behind` came, up to `place`. False for one alone: an engine says that while it answers."""
        start, depth, block_tokens = depth_of(behind), depth_of(place), place[0].forest.filed[1]
        if behind is not None and depth - start == 1:
            return False
        self.count += 1
        self.sizes.add(block_tokens)
        before = self._by_depth.get((block_tokens, start), ())
        first = next((end.first for end in reversed(before) if end.place == behind), start)
        same = self._by_depth.pop((block_tokens, depth), ())
        self._by_depth[block_tokens, depth] = (*same[1 - ENDS_MAX :], _End(self.count, place, start, first))
        if len(self._by_depth) > DEPTHS_MAX:
            self._by_depth.popitem(last=False)
        return True

    def fitting(self, ended: Ended, block_tokens: int, bit: int) -> set[Place]:
        """Where that prompt may have ended: at its last whole block, of which the slot (its `bit`) holds some still.

        An engine announces a prompt as soon as it is computed, or with its answer.
        """
        length = ended.prompt_tokens
        through = length + ended.output_tokens
        cached = None if ended.cached_tokens is None else ended.cached_tokens // block_tokens
        depths = {each // block_tokens for each in (length, max(length, through - 1), through)}
        return {
            up(end.place, depth - length // block_tokens)
            for depth in depths
            for end in self._by_depth.get((block_tokens, depth), ())
            if end.number > ended.since
            and end.place[0].root == ended.chain.root
            and end.place[0].holders & bit
            and (cached is None or cached in {end.start, end.first})
        }


class Tied(NamedTuple):
    """So many keys of a prompt's bytes lead to this block. Not `whole`: more of them led to blocks that are gone."""

    keys: int
    place: Place | None
    whole: bool


class Ties:
    """What is known of the blocks behind keys of bytes: `Links` for each size of block."""

    def __init__(self, blocks_max: int) -> None:
        self._most = max(1, blocks_max // BLOCKS_PER_LINK)
        self._links: dict[int, Links] = {}

    def __len__(self) -> int:
        return sum(map(len, self._links.values()))

    def find(self, chain: Chain) -> list[Tied]:
        """What the prompt's bytes lead to, for each size of blocks that they lead to at all."""
        found = [links.find(chain.chunk_keys) for links in [*self._links.values()]]
        return [each for each in found if each is not None]

    def tie(self, ended: Ended, ends: Ends, bit: int) -> bool:
        """Tie a prompt's bytes to its blocks. True where that is done with: also where several texts would do."""
        done = False
        for block_tokens in ends.sizes:
            fitting = ends.fitting(ended, block_tokens, bit)
            done = done or bool(fitting)
            if len(fitting) == 1:
                links = self._links.setdefault(block_tokens, Links(self._most))
                links.learn(ended, fitting.pop())
        return done

    def forget(self, run: Run) -> None:
        """These blocks are held nowhere."""
        if run.links is not None:
            self._links[run.forest.filed[1]].forget(run)

    def announced(self, prints: Sequence[int], end: Place) -> None:
        """Blocks with these prints are held, up to `end`. Some may have been held by nobody for a while."""
        links = self._links.get(end[0].forest.filed[1])
        if links is not None:
            links.announced(prints, end)

    def check_integrity(self, runs: AbstractSet[Run]) -> None:
        """See `Links.check_integrity`."""
        for links in self._links.values():
            links.check_integrity(runs)


class Links:
    """Where the blocks of one forest lie whose texts' bytes have these keys. At most so many; old ends go first.

    Of a prompt's keys, those that are known come first, so that the last one is found by bisection. Where the block is
    held by nobody, its print stands for it until it is announced again.
    """

    __slots__ = ("_gone", "_most", "_places")

    def __init__(self, most: int) -> None:
        self._most = most
        self._places: OrderedDict[int, Place | int] = OrderedDict()
        self._gone: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: Sequence[int]) -> Tied | None:
        """Which blocks the keys lead to. Any thread may ask."""
        known = self._last(keys, self._places.__contains__)
        if not known:
            return None
        place = self._places.get(keys[known - 1])
        if isinstance(place, tuple):
            return Tied(known, place, whole=True)
        held = self._last(keys, lambda key: isinstance(self._places.get(key), tuple))
        place = self._places.get(keys[held - 1]) if held else None
        return Tied(held, place if isinstance(place, tuple) else None, whole=False)

    @staticmethod
    def _last(keys: Sequence[int], known: Callable[[int], bool]) -> int:
        low, high = 0, len(keys) // LINK_CHUNKS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if known(keys[middle * LINK_CHUNKS - 1]) else (low, middle - 1)
        first = low * LINK_CHUNKS
        return next(
            (at for at in range(min(len(keys), first + LINK_CHUNKS - 1), first, -1) if known(keys[at - 1])), first
        )

    def learn(self, ended: Ended, place: Place) -> None:
        """The prompt's last whole block is there. Between its links, tokens are as many as the bytes' share says."""
        chain, path, block_tokens = ended.chain, climbed(place), place[0].forest.filed[1]
        keys, share = chain.chunk_keys, ended.prompt_tokens / chain.tokens
        first, first_tokens = 0, share * chain.before_tokens
        last, last_tokens = len(keys), share * (chain.before_tokens + len(keys) * chain.chunk_tokens)
        known = self.find(keys)
        if known is not None and known.place is not None and _is_along(path, known.place):
            first, first_tokens = known.keys, min(last_tokens, depth_of(known.place) * block_tokens)
        rate = (min(last_tokens, ended.prompt_tokens) - first_tokens) / max(1, last - first)
        for count in [last, *range(last - last % LINK_CHUNKS, 0, -LINK_CHUNKS)]:  # beginnings are forgotten last
            depth = int(first_tokens + rate * (count - first)) // block_tokens
            if count <= first:
                self._touch(keys[count - 1])
            elif depth > 0:
                self._set(keys[count - 1], _at(path, depth))

    def forget(self, run: Run) -> None:
        """These blocks are held nowhere: prompts that led there are held by nobody so far, whatever was sent where."""
        for key in run.links or ():
            place = self._places[key]
            assert isinstance(place, tuple)
            print_ = self._places[key] = run.prints[place[1]]
            self._gone.setdefault(print_, set()).add(key)
        run.links = None

    def announced(self, prints: Sequence[int], end: Place) -> None:
        """See `Ties.announced`."""
        for print_ in self._gone.keys() & prints if self._gone else ():
            run, at = up(end, len(prints) - 1 - prints.index(print_))
            run.links = (run.links or set()) | self._gone[print_]
            self._places.update(dict.fromkeys(self._gone.pop(print_), (run, at)))

    def check_integrity(self, runs: AbstractSet[Run]) -> None:
        """Links lead to blocks that are filed, and these know of them: for tests."""
        assert len(self._places) <= self._most
        held = {key: place for key, place in self._places.items() if isinstance(place, tuple)}
        for key, (run, at) in held.items():
            assert run in runs
            assert at < len(run.prints)
            assert key in (run.links or ())
        assert sum(len(run.links or ()) for run in {run for run, _ in held.values()}) == len(held)
        assert sum(map(len, self._gone.values())) == len(self._places) - len(held)

    def _touch(self, key: int) -> None:
        if key in self._places:
            self._places.move_to_end(key)

    def _set(self, key: int, place: Place) -> None:
        self._unset(key)
        self._places[key] = place
        run = place[0]
        run.links = run.links or set()
        run.links.add(key)
        if len(self._places) > self._most:
            self._unset(next(iter(self._places)))

    def _unset(self, key: int) -> None:
        before = self._places.pop(key, None)
        if isinstance(before, int):
            self._gone[before].discard(key)
            if not self._gone[before]:
                del self._gone[before]
        elif before is not None and before[0].links is not None:
            before[0].links.discard(key)


def _is_along(path: Sequence[Place], place: Place) -> bool:
    return any(run is place[0] and place[1] < count for run, count in path)


def _at(path: Sequence[Place], depth: int) -> Place:
    """The block at that depth along a path."""
    for run, count in path:
        if depth <= count:
            return run, depth - 1
        depth -= count
    return path[-1][0], path[-1][1] - 1
