"""Who holds how much of a prompt: built from what engines and nodes say of their caches, and exact where they say it.

Blocks are filed by what they mean, not by an engine's names for them: the prints of the events' token ids, or own keys
(see `chains`). Invariant: for each instance and tier the index holds the set of blocks that was announced and not
removed since, less what the cap took; a match is the longest prefix of the prompt within that set. It needs no order of
removals: a block that goes from the middle hides those behind it until it is back.

Any thread may call `match` and `learn`, without waiting. The other verbs take turns.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from thermocline.blocks.key import TOKEN_BYTES, TOKENS_PER_KEY, Tokens
from thermocline.fleet.chains import (
    NAME_MASK,
    RUN_BLOCKS,
    By,
    Chain,
    Filed,
    Forest,
    Piece,
    Place,
    Run,
    climbed,
    depth_of,
    grow_prints,
    name_of,
    root_print,
)
from thermocline.fleet.held import (
    BEFORE,
    BITS,
    BYTES,
    DEVICE,
    DISK,
    GUESSES,
    HOST,
    LATELY,
    MEDIA,
    Held,
    Stream,
    depth_in,
    in_blocks,
    slots_of,
    unusable,
)
from thermocline.fleet.instance import NOTHING, Overlaps
from thermocline.fleet.links import LATE_SECONDS, LINK_BYTES, Ended, Ties
from thermocline.fleet.wiring import Unplaced, Wiring, judged
from thermocline.wire.events import Batch, BlockRemoved, BlockStored

LATELY_PROMPTS = 32
RUN_WEIGHT = 4
"""A run of its own costs about as much memory as so many blocks."""
RUN_BYTES, BLOCK_BYTES = 470, 48
FADING = 0.98
SENT_MAX = 256
"""Prompts that wait to be learned while a batch is taken in. What comes on top pushes out the oldest."""
LOOKED_UP_MAX = 4096


class Applied(NamedTuple):
    """What became of a batch. Blocks are counted; `unplaced` by reason.

    `gap`: batches [first, stop) did not come before this one. `restarted`: the source began anew, and what it had
    announced was dropped.
    """

    stored: int = 0
    removed: int = 0
    unplaced: tuple[tuple[Unplaced, int], ...] = ()
    gap: tuple[int, int] | None = None
    restarted: bool = False


class FleetIndex:
    """Blocks of one model over a fleet. An instance is a slot: a small number, as `fleet.instance` has it.

    `blocks_max` bounds memory: about 160 bytes for each, whatever comes. Beyond it the runs that were used longest ago
    are forgotten, ends of texts first. `secret` makes prints that nobody outside can aim at.
    """

    def __init__(self, blocks_max: int, *, secret: int = 0) -> None:
        self.blocks_max = blocks_max
        self.evicted_blocks = 0
        self._secret = secret & (1 << 64) - 1
        self._roots: dict[tuple[str, str], int] = {}
        self._forests: dict[Filed, Forest] = {}
        self._ties = Ties(blocks_max)
        self._by_bytes = False
        self._instances: list[Held] = []
        self._recent: OrderedDict[Run, None] = OrderedDict()
        self._has_colder = self._has_coarser = False  # tiers than the device; blocks than the smallest
        self._used: deque[Run] = deque(maxlen=LOOKED_UP_MAX)
        self._sent: deque[tuple[int, Chain]] = deque(maxlen=SENT_MAX)
        self._ended: deque[tuple[int, Ended]] = deque(maxlen=SENT_MAX)
        self._lock = threading.Lock()

    # -- looking up ----------------------------------------------------------------------------------------------------

    def chain(self, tokens: Sequence[int] | Tokens, *, salt: str = "", lora: tuple[str, ...] = ()) -> Chain:
        """A prompt to look up. `lora` is the adapter's name, and its path where own keys are to be found too."""
        return Chain(tokens, self._root(salt, lora[0] if lora else ""), salt, lora)

    def chain_of_bytes(
        self,
        keys: Sequence[int],
        chunk_tokens: float,
        *,
        before_tokens: float = 0.0,
        tokens: int = 0,
        salt: str = "",
        lora: tuple[str, ...] = (),
    ) -> Chain:
        """A prompt whose tokens nobody here knows, by the keys of its bytes. See `Chain.of_chunks`, and `chain`."""
        root = self._root(salt, lora[0] if lora else "")
        return Chain.of_chunks(keys, chunk_tokens, root=root, before_tokens=before_tokens, tokens=tokens)

    def match(self, chain: Chain) -> Overlaps:
        """Leading tokens of the prompt that each slot holds, by tier. Nothing is hashed behind the longest match.

        Of bytes, about so many: those that are tied to blocks are held by whom events name. What lies behind these
        was sent to whoever holds all of them, and to those of whom there are no events.
        """
        if chain.chunk_tokens:
            return self._match_by_bytes(chain)
        found = NOTHING
        for filed, forest in [*self._forests.items()]:
            path = forest.path(chain) if forest.heads else []
            if path:
                self._used.append(path[-1][0])
                found = _longer(found, self._overlaps(path, chain.unit(filed)))
        return in_blocks(found, self._instances) if self._has_coarser and found is not NOTHING else found

    def _match_by_bytes(self, chain: Chain) -> Overlaps:
        tied, exact, linked_tokens, behind_tokens = self._ties.find(chain), NOTHING, 0, 0.0
        for keys, place, _ in tied:
            if place is not None and depth_of(place) * place[0].forest.filed[1] > linked_tokens:
                linked_tokens, behind_tokens = depth_of(place) * place[0].forest.filed[1], keys * chain.chunk_tokens
            if place is not None:
                self._used.append(place[0])
                exact = _longer(exact, self._overlaps(climbed(place), place[0].forest.filed[1]))
        forest = self._forests.get((By.CHUNK, 0))
        path = forest.path(chain) if forest is not None else []
        if not path:
            return exact
        self._used.append(path[-1][0])
        sent = self._overlaps(path, chain.chunk_tokens)
        if not tied:
            return sent
        held, whole = exact.disk or exact.device, all(each.whole for each in tied)
        counts = [*sent.device]
        for slot, tokens in enumerate(counts):
            if self._instances[slot].ends.count:
                goes_on = whole and held[slot] >= linked_tokens
                counts[slot] = int(linked_tokens + max(0.0, tokens - behind_tokens)) if goes_on else 0
        return _longer(exact, Overlaps(counts))

    def _overlaps(self, path: Sequence[Place], unit: float) -> Overlaps:
        run, count = path[-1]
        name, device = run.prints[count - 1], self._on_device(path, unit)
        if not self._has_colder:
            return Overlaps(device, name=name)
        host, disk = device.copy(), device.copy()
        for slot in slots_of(path[0][0].holders):
            known = self._instances[slot]
            on_host, on_disk = known.tiers[HOST], known.tiers[DISK]
            if on_host:
                host[slot] = disk[slot] = int(unit * depth_in(path, [*known.warm(), on_host]))
            if on_disk:
                disk[slot] = int(unit * depth_in(path, [*known.warm(), on_host, on_disk]))
        return Overlaps(device, host, disk, name) if disk != device else Overlaps(device, name=name)

    def _on_device(self, path: Sequence[Place], unit: float) -> list[int]:
        """Most slots hold a run wholly or not at all: only where one holds a part of it, its blocks are looked at."""
        through, blocks = path[0][0].holders, 0
        tokens = [0] * len(self._instances)
        for run, count in path:
            whole, holders = through & run.whole, through & run.holders
            if whole != through:
                so_far = int(unit * blocks)
                for slot in slots_of(through ^ holders):
                    tokens[slot] = so_far
                for slot in slots_of(holders & ~whole):
                    tokens[slot] = int(unit * depth_in(path, self._instances[slot].warm()))
                through = whole
                if not through:
                    break
            blocks += count
        so_far = int(unit * blocks)
        for slot in slots_of(through):
            tokens[slot] = so_far
        return tokens

    def _root(self, salt: str, lora: str) -> int:
        found = self._roots.get((salt, lora))
        if found is None:
            if len(self._roots) >= LOOKED_UP_MAX:
                self._roots.clear()
            found = self._roots[salt, lora] = root_print(self._secret, salt, lora)
        return found

    # -- what engines and nodes say ------------------------------------------------------------------------------------

    def apply(self, instance: int, batch: Batch, sequence: int, *, source: str = "") -> Applied:
        """Take a batch in. `source` tells the streams of one slot apart: "" for its engine, else a name for its node.

        Batches come in order, replays included. Numbers that were left out are lost: what they removed stays held here
        until it is announced again or forgotten for room. A number that goes back in a batch that is newer by the
        sender's clock is another incarnation: what this source had announced is dropped. In one that is not newer, it
        is a copy behind its own replay, and passed over.
        """
        with self._lock:
            known = self._instance(instance)
            stream = known.sources.get((source, batch.rank))
            if stream is None:
                stream = known.sources[source, batch.rank] = Stream()
            restarted = sequence < stream.expected
            if restarted and batch.seconds <= stream.seconds:
                return Applied()
            if restarted:
                self._clear(known, (*stream.tiers, *GUESSES))
                stream.begin()
                known.begin()
            gap = (stream.expected, sequence) if sequence > stream.expected else None
            if gap and stream.expected:  # else it is the past of an instance that we meet for the first time
                known.lost += sequence - stream.expected
            stream.expected, stream.seconds = sequence + 1, max(batch.seconds, stream.seconds)
            stored, removed, unplaced = self._take(known, stream, batch)
            self._settle()
            return Applied(stored, removed, tuple(unplaced.items()), gap, restarted)

    def learn(self, instance: int, chain: Chain) -> None:
        """This prompt was sent there, so it is probably held.

        It counts until a removal says otherwise. Where events come, they say what is held: then it counts for the next
        32 to 64 prompts only, as events may be late. What is known by its bytes goes on counting, until it is tied to
        blocks (see `ended`). While a batch is taken in nobody waits for it here: it is learned right behind that.
        """
        if chain.chunk_tokens:
            self._by_bytes, chain.since = True, self._instance(instance).ends.count
        self._sent.append((instance, chain))
        self._settle_if_free()

    def ended(
        self, instance: int, chain: Chain, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
    ) -> None:
        """A prompt that was learned by its bytes is answered; the engine says how many tokens it was.

        Of the texts that the slot announced since, if one alone ends there, the bytes are tied to its blocks. If none
        does, the next batches may still bring it. Nobody waits.
        """
        if chain.chunk_keys and prompt_tokens > 0:
            self._ended.append((instance, Ended(chain, chain.since, prompt_tokens, cached_tokens, output_tokens)))
            self._settle_if_free()

    def _settle_if_free(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def told(self, instance: int, predicted_tokens: int, cached_tokens: int) -> None:
        """What an engine said it found cached of a prompt, beside what was predicted: for `wiring`."""
        known = self._instance(instance)
        known.asked += 1
        known.predicted = int(known.predicted * FADING) + predicted_tokens
        known.cached = int(known.cached * FADING) + cached_tokens

    def drop(self, instance: int, *, source: str | None = None) -> None:
        """Forget all that the slot holds, and its sequences: another instance has it.

        With a `source`, what others announced for the slot stays: its engine is lost (""), and its node goes on.
        """
        with self._lock:
            self._settle()
            known = self._instance(instance)
            lost = [stream for stream in known.sources if source in {None, stream[0]}]
            tiers = {tier for stream in lost for tier in known.sources[stream].tiers}
            self._clear(known, range(len(known.tiers)) if source is None else sorted({*tiers, *GUESSES}))
            for stream in lost:
                del known.sources[stream]
            known.begin()

    # -- what there is to say ------------------------------------------------------------------------------------------

    def wiring(self, instance: int) -> Wiring:
        """Whether the instance's events come, can be filed, and match what is routed there."""
        known = self._instance(instance)
        unplaced = tuple(sorted(known.unplaced.items(), key=lambda item: -item[1]))
        # without events all prompts that were sent count as evidence, whether or not the engine told of its cache
        asked = known.asked if known.batches else max(known.asked, known.learned)
        return judged(known.batches, known.stored, unplaced, known.lost, asked, known.predicted, known.cached)

    def blocks_of(self, instance: int) -> tuple[int, int, int]:
        """Blocks that the slot holds on device, host and disk. Counts them all, so it is for people, not requests."""
        with self._lock:
            tiers = self._instance(instance).tiers
            return (
                sum(map(int.bit_count, tiers[DEVICE].values())),
                sum(map(int.bit_count, tiers[HOST].values())),
                sum(map(int.bit_count, tiers[DISK].values())),
            )

    @property
    def blocks(self) -> int:
        """Blocks that are filed, each once, whoever holds it."""
        return sum(forest.blocks for forest in [*self._forests.values()])

    @property
    def nbytes(self) -> int:
        """About how much memory the index takes."""
        with self._lock:
            heads = [forest.heads for forest in self._forests.values()]
            known = [forest.known for forest in self._forests.values()]
            tiers = [tier for instance in self._instances for tier in instance.tiers]
            return (
                sum(map(sys.getsizeof, (*heads, *known, *tiers)))
                + sum(forest.blocks + 2 * forest.aliases for forest in self._forests.values()) * BLOCK_BYTES
                + len(self._recent) * RUN_BYTES
                + len(self._ties) * LINK_BYTES
            )

    # -- events --------------------------------------------------------------------------------------------------------

    def _take(self, known: Held, stream: Stream, batch: Batch) -> tuple[int, int, dict[Unplaced, int]]:
        stored = removed = 0
        unplaced = {Unplaced.UNREADABLE: batch.skipped} if batch.skipped else {}
        ends: dict[Place, Place | None] = {}
        for event in batch.events:
            if isinstance(event, BlockStored):
                count, why = len(event.hashes), self._store(known, stream, event, ends)
                stored += 0 if why else count
            elif isinstance(event, BlockRemoved):
                gone = self._remove(known, stream, event)
                removed += gone
                count, why = len(event.hashes) - gone, Unplaced.UNKNOWN
            else:
                self._clear(known, (*stream.tiers, *GUESSES))
                continue
            if why and count:
                unplaced[why] = unplaced.get(why, 0) + count
        known.batches += 1
        known.stored += stored
        noted = [known.ends.note(behind, end) for end, behind in ends.items()]
        for _ in range(len(known.waiting) if any(noted) else 0):
            ended = known.waiting.popleft()
            if not self._ties.tie(ended, known.ends, known.bit) and batch.seconds <= ended.until_seconds:
                known.waiting.append(ended)
        for why, count in unplaced.items():
            known.unplaced[why] = known.unplaced.get(why, 0) + count
        return stored, removed, unplaced

    def _store(
        self, known: Held, stream: Stream, event: BlockStored, ends: dict[Place, Place | None]
    ) -> Unplaced | None:
        """File the blocks, or say why not. `ends`: where texts end now, and behind what their new blocks begin."""
        why = unusable(event)
        if why is not None:
            if why is Unplaced.GROUP:
                stream.other_groups.add(event.group)
            return why
        forest = self._forest((By.PRINT if event.tokens else By.KEY, event.block_tokens))
        parent = event.parent
        behind = None
        if parent is not None and not (isinstance(parent, bytes) and not any(parent)):
            behind = forest.find(name_of(parent))
            if behind is None:
                return Unplaced.PARENT
        tier = MEDIA[event.medium]
        stream.tiers.add(tier)
        names = _names(event.hashes)
        if tier != DEVICE:
            self._has_colder = True
        elif event.block_tokens != TOKENS_PER_KEY:
            known.block_tokens, self._has_coarser = event.block_tokens, True
        if not event.tokens:
            self._hold(known, tier, forest.place(behind, names, names))
            return None
        if event.extra_keys:
            prints, root = self._prints_with_extras(event, behind)
            end = self._hold(known, tier, forest.place(behind, prints, names, root=root))
        else:
            step = event.block_tokens // TOKENS_PER_KEY
            root, ids = (
                behind[0].prints[behind[1]] if behind else self._root("", event.lora or ""),
                memoryview(event.tokens).cast("B"),
            )
            prints = grow_prints(ids, root)
            prints = prints if step == 1 else prints[step - 1 :: step]
            end = self._hold(known, tier, forest.place(behind, prints, names, ids, root))
        if self._by_bytes and end is not None:
            self._ties.announced(prints, end)
            ends[end] = ends.pop(behind, behind) if behind is not None else None
        return None

    def _prints_with_extras(self, event: BlockStored, behind: Place | None) -> tuple[list[int], int]:
        """Salt and adapter begin a text; images are named where they stand, which no prompt that is looked up has."""
        extras, lora, salt = event.extra_keys or (), event.lora or "", ""
        if behind is None:
            salt = next((each for each in extras[0] or () if isinstance(each, str) and each != lora), "")
        print_ = root = behind[0].prints[behind[1]] if behind else self._root(salt, lora)
        ids, size = event.tokens.tobytes(), event.block_tokens * TOKEN_BYTES
        found = []
        for at, entry in enumerate(extras):
            rest = [each for each in entry or () if each != lora and (at or behind or each != salt)]
            if rest:
                print_ = xxhash.xxh3_64_intdigest(repr(rest).encode(), print_)
            print_ = grow_prints(ids[at * size : (at + 1) * size], print_)[-1]
            found.append(print_)
        return found, root

    def _hold(self, known: Held, tier: int, pieces: Iterable[Piece]) -> Place | None:
        """The instance holds these from now on. Returns the last block."""
        held, bit, recent = known.tiers[tier], known.bit, self._recent
        touched, stop = [], 0
        for run, start, stop in pieces:
            bits = held[run] = held.get(run, 0) | BITS[stop - start] << start
            run.holders |= bit
            if bits == BITS[len(run.prints)] and tier not in {HOST, DISK}:
                run.whole |= bit
            touched.append(run)
        for run in reversed(touched):  # ends behind beginnings, so that ends are forgotten first
            recent[run] = None
            recent.move_to_end(run)
        return (touched[-1], stop - 1) if touched else None

    def _remove(self, known: Held, stream: Stream, event: BlockRemoved) -> int:
        """How many were held, or are none of ours."""
        tier = MEDIA.get(event.medium)
        if tier is None or event.group in stream.other_groups:
            return len(event.hashes)
        forests = self._forests.values()
        return sum(
            any(self._remove_one(known, tier, forest, name) for forest in forests) for name in _names(event.hashes)
        )

    def _remove_one(self, known: Held, tier: int, forest: Forest, name: int) -> bool:
        place = forest.find(name)
        if place is None:
            return False
        run, at = place
        found = False
        for each in (DEVICE, *GUESSES) if tier == DEVICE else (tier,):
            bits = known.tiers[each].get(run, 0)
            if not bits >> at & 1:
                continue
            found = True
            run.whole &= ~known.bit
            if left := bits & ~(1 << at):
                known.tiers[each][run] = left
            else:
                self._let_go(known, each, run)
        return found

    def _clear(self, known: Held, tiers: Sequence[int]) -> None:
        for tier in tiers:
            for run in [*known.tiers[tier]]:
                self._let_go(known, tier, run)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _let_go(self, known: Held, tier: int, run: Run) -> None:
        """The instance holds none of this run in this tier any more. What nobody holds is forgotten from its end on."""
        del known.tiers[tier][run]
        run.whole &= ~known.bit
        if not any(run in held for held in known.tiers):
            run.holders &= ~known.bit
        self._prune(run)

    def _prune(self, run: Run | None) -> None:
        while run is not None and not run.holders and not run.kids:
            run.forest.forget(run)
            self._recent.pop(run, None)
            self._ties.forget(run)
            run = run.parent

    def _learn_sent(self) -> None:
        while self._sent:
            slot, chain = self._sent.popleft()
            known = self._instance(slot)
            tier, filed = (BYTES, (By.CHUNK, 0)) if chain.chunk_tokens else (LATELY, (By.PRINT, TOKENS_PER_KEY))
            known.learned += 1
            if known.batches and known.learned >= LATELY_PROMPTS:
                known.learned = 0
                self._clear(known, (BEFORE,))
                known.tiers[LATELY], known.tiers[BEFORE] = known.tiers[BEFORE], known.tiers[LATELY]
            self._hold(known, tier, self._forest(filed).place_chain(chain))

    def _learn_ended(self) -> None:
        while self._ended:
            slot, ended = self._ended.popleft()
            known = self._instance(slot)
            if not self._ties.tie(ended, known.ends, known.bit):
                heard = max((stream.seconds for stream in known.sources.values()), default=math.inf)
                known.waiting.append(ended._replace(until_seconds=heard + LATE_SECONDS))

    def _settle(self) -> None:
        """Learn what was sent and answered meanwhile, note what was looked up, and keep within the cap."""
        recent = self._recent
        self._learn_sent()
        self._learn_ended()
        while self._used:
            run: Run | None = self._used.popleft()
            while run is not None and run in recent:  # the deepest first, so that ends are forgotten first
                recent.move_to_end(run)
                run = run.parent
        while self._weight() > self.blocks_max:
            oldest = next(iter(recent))
            if oldest.kids:
                recent.move_to_end(oldest)
                continue
            self.evicted_blocks += len(oldest.prints)
            for slot in slots_of(oldest.holders):
                for held in self._instances[slot].tiers:
                    held.pop(oldest, None)
            oldest.holders = 0
            self._prune(oldest)

    def _weight(self) -> int:
        weight = RUN_WEIGHT * len(self._recent)
        for forest in self._forests.values():
            weight += forest.blocks + forest.aliases
        return weight

    def _forest(self, filed: Filed) -> Forest:
        found = self._forests.get(filed)
        if found is None:
            found = self._forests[filed] = Forest(filed)
        return found

    def _instance(self, slot: int) -> Held:
        while slot >= len(self._instances):
            self._instances.append(Held(1 << len(self._instances)))
        return self._instances[slot]

    def check_integrity(self) -> None:
        """What the tables say of each other is true: for tests."""
        runs = {run for forest in self._forests.values() for run in forest.heads.values()}
        assert runs == set(self._recent)
        kids = Counter(run.parent for run in runs)
        for run in runs:
            assert run.parent is None or run.parent in runs
            assert run.kids == kids[run]
            assert run.kids or run.holders
            assert 0 < len(run.prints) == len(run.names) <= RUN_BLOCKS
            holders = [known for known in self._instances if any(run in held for held in known.tiers)]
            assert run.holders == sum(known.bit for known in holders)
            all_of_it = BITS[len(run.prints)]
            assert all(
                all_of_it in {held.get(run) for held in known.warm()}
                for known in self._instances
                if run.whole & known.bit
            )
            assert not run.spans or run.spans[-1][1] <= len(run.prints)
            assert run.depth == (run.parent.depth + run.offset if run.parent else 0)
        for known in self._instances:
            for held in known.tiers:
                assert all(run in runs and 0 < bits < 1 << len(run.prints) for run, bits in held.items())
        for forest in self._forests.values():
            assert forest.blocks == sum(len(run.prints) for run in forest.heads.values())
            assert forest.aliases == sum(len(run.aliases) for run in forest.heads.values())
            for found in forest.known.values():
                assert (found if isinstance(found, Run) else found[0]) in runs
        self._ties.check_integrity(runs)
        assert self._weight() <= self.blocks_max


# -- small parts -------------------------------------------------------------------------------------------------------


def _longer(one: Overlaps, other: Overlaps) -> Overlaps:
    """The longer match of each slot and tier, where engines and nodes name blocks differently."""
    if one is NOTHING:
        return other
    device = [max(pair) for pair in zip(one.device, other.device, strict=True)]
    if not (one.disk or other.disk):
        return Overlaps(device, name=one.name)
    host, disk = (
        [max(row) for row in zip(device, *(each for each in tiers if each), strict=True)]
        for tiers in ((one.host, other.host), (one.host, other.host, one.disk, other.disk))
    )
    return Overlaps(device, host, disk, one.name)


def _names(hashes: Sequence[int | bytes]) -> list[int]:
    try:
        return [each & NAME_MASK for each in hashes]  # type: ignore[operator]  # bytes are rare
    except TypeError:
        return [*map(name_of, hashes)]
