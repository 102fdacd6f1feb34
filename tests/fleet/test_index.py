"""The fleet's index: what is announced is found, by whoever holds it, under its salt and adapter, within its cap."""

from __future__ import annotations

import threading
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from thermocline.blocks.key import block_keys, root_key
from thermocline.fleet.chains import RUN_BLOCKS, By, Chain
from thermocline.fleet.index import LATELY_PROMPTS, RUN_WEIGHT, SENT_MAX, Applied, FleetIndex
from thermocline.fleet.instance import Overlaps
from thermocline.fleet.wiring import EVIDENCE, State, Unplaced
from thermocline.wire.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, read_batch, write_batch

BLOCK = 16
MEDIA = ("GPU", "CPU", "STORAGE")


def text(blocks: int, seed: int = 0, block_tokens: int = BLOCK) -> list[int]:
    """Token ids of so many blocks."""
    ids: list[int] = np.random.default_rng(seed).integers(0, 150_000, blocks * block_tokens).tolist()
    return ids


def engine_names(tokens, *, seed: int = 0, block_tokens: int = BLOCK) -> list[int]:
    """What some engine calls the blocks of a text: a 64-bit number that depends on all before."""
    ends = range(block_tokens, len(tokens) + 1, block_tokens)
    return [hash((seed, tuple(tokens[:end]))) & (1 << 64) - 1 for end in ends]


def stored(tokens, first: int = 0, stop: int | None = None, **fields) -> BlockStored:
    """Blocks [first, stop) of a text, as its engine announces them."""
    size = fields.pop("block_tokens", BLOCK)
    names = fields.pop("names", None) or engine_names(tokens, block_tokens=size)
    stop = len(names) if stop is None else stop
    return BlockStored(
        tuple(names[first:stop]),
        names[first - 1] if first else None,
        array("I", tokens[first * size : stop * size]),
        size,
        **fields,
    )


class Engine:
    """Sends one index its batches, numbered."""

    def __init__(self, index: FleetIndex, slot: int = 0, source: str = "") -> None:
        self.index, self.slot, self.source, self.sequence, self.seconds = index, slot, source, 0, 0.0

    def says(self, *events, skip: int = 0, rank: int = 0):
        """One batch, after `skip` that are lost, over the wire's form."""
        self.sequence += 1 + skip
        self.seconds += 1.0
        batch = read_batch(write_batch(Batch(self.seconds, events, rank)))
        return self.index.apply(self.slot, batch, self.sequence - 1, source=self.source)


@pytest.fixture
def index():
    """An index with room for all that a test files."""
    return FleetIndex(100_000, secret=3)


def test_what_was_announced_is_found_and_no_more(index):
    """A prompt's match is what an instance announced of it, in tokens; other prompts have none."""
    tokens = text(10)
    Engine(index).says(stored(tokens, 0, 6))
    assert index.match(index.chain(tokens)).device == [96]
    assert index.match(index.chain(tokens[:40])).device == [32]
    assert index.match(index.chain(text(10, seed=1))) == Overlaps()


@pytest.mark.parametrize("form", [list, tuple, lambda ids: array("I", ids), lambda ids: array("I", ids).tobytes()])
def test_all_forms_of_a_prompt_are_one(index, form):
    """Lists and buffers of the same ids have the same match."""
    tokens = text(100)
    Engine(index).says(stored(tokens, 0, 70))
    assert index.match(index.chain(form(tokens))).device == [70 * BLOCK]


@pytest.mark.parametrize("lengths", [[1] * 90, [90], [63, 1, 1, 25], [64, 26], [7, 70, 13]])
def test_pieces_do_not_matter(index, lengths):
    """However an engine cuts a text into events, it is found whole, and from any instance that holds part of it."""
    tokens = text(90)
    one, other, first = Engine(index), Engine(index, 1), 0
    for length in lengths:
        one.says(stored(tokens, first, first + length))
        first += length
    other.says(stored(tokens, 0, 20))
    other.says(stored(tokens, 20, 75))
    assert index.match(index.chain(tokens)).device == [90 * BLOCK, 75 * BLOCK]
    assert index.blocks == 90
    index.check_integrity()


def test_texts_that_part_are_told_apart(index):
    """Two conversations with one beginning share its blocks, and match each other only so far."""
    shared, ends = text(40), [text(30, seed=1), text(30, seed=2)]
    for slot, end in enumerate(ends):
        Engine(index, slot).says(stored(shared + end))
    assert index.match(index.chain(shared + ends[0])).device == [70 * BLOCK, 40 * BLOCK]
    assert index.match(index.chain(shared + ends[1])).device == [40 * BLOCK, 70 * BLOCK]
    assert index.blocks == 100
    index.check_integrity()


def test_a_block_gone_from_the_middle_hides_what_follows_until_it_is_back(index):
    """Those behind a removed block count again when it is announced again, as the engine still has them."""
    tokens = text(130)
    names, engine = engine_names(tokens), Engine(index)
    engine.says(stored(tokens))
    engine.says(BlockRemoved((names[10],)))
    assert index.match(index.chain(tokens)).device == [10 * BLOCK]
    engine.says(stored(tokens, 10, 11))
    assert index.match(index.chain(tokens)).device == [130 * BLOCK]


def test_tiers_add_up(index):
    """A colder tier counts what the warmer ones hold too; a block that has left the device may lie below."""
    tokens = text(20)
    engine = Engine(index)
    engine.says(stored(tokens, 0, 20), stored(tokens, 0, 12, medium="CPU"), stored(tokens, 0, 16, medium="STORAGE"))
    engine.says(BlockRemoved(tuple(engine_names(tokens)[8:])))
    found = index.match(index.chain(tokens))
    assert (found.device, found.host, found.disk) == ([8 * BLOCK], [12 * BLOCK], [16 * BLOCK])
    assert index.blocks_of(0) == (8, 12, 16)


@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize("lora", [(), ("adapter", "/adapters/one")])
def test_a_nodes_own_keys_are_found(index, salt, lora):
    """A node names blocks by own key and sends no tokens: the prompt's keys find them, under its salt and adapter."""
    tokens = text(96)
    extras = tuple(b"lora " + part.encode() for part in lora)
    keys = block_keys(array("I", tokens), root=root_key(salt.encode()), tokens_per_block=32, extras=extras)
    node = Engine(index, 0, source="node")
    node.says(BlockStored(tuple(keys[:40]), None, array("I"), 32, medium="CPU"))
    Engine(index).says(stored(tokens, 0, 10))
    found = index.match(index.chain(tokens, salt=salt, lora=lora))
    assert found.host == [40 * 32]
    assert found.device == [0 if salt or lora else 10 * BLOCK]
    assert index.match(index.chain(tokens, salt="other")) == Overlaps()


def test_salts_and_adapters_share_nothing(index):
    """The salt in the first block's extra keys and the adapter's name make other prints."""
    tokens = text(4)
    for slot, (salt, lora) in enumerate([("", ""), ("a", ""), ("", "x"), ("a", "x")]):
        entry = tuple(part for part in (lora, salt) if part)
        extras = (entry or None, *[(lora,) if lora else None] * 3) if entry else None
        Engine(index, slot).says(stored(tokens, extra_keys=extras, lora=lora or None))
    for slot, (salt, lora) in enumerate([("", ""), ("a", ""), ("", "x"), ("a", "x")]):
        found = index.match(index.chain(tokens, salt=salt, lora=(lora,) if lora else ()))
        assert found.device == [64 * (each == slot) for each in range(4)]


def test_images_are_part_of_the_text(index):
    """A block that shows an image is another block than the one with the same placeholders alone."""
    tokens = text(4)
    Engine(index).says(stored(tokens, extra_keys=(None, (["image", 3],), None, None)))
    assert index.match(index.chain(tokens)).device == [BLOCK]


@pytest.mark.parametrize("block_tokens", [16, 32, 128])
def test_block_sizes_need_not_agree(index, block_tokens):
    """Engines with other block sizes are found by the same prompt, in whole blocks of theirs."""
    tokens = text(64)
    Engine(index, 0).says(stored(tokens, block_tokens=block_tokens))
    Engine(index, 1).says(stored(tokens))
    found = index.match(index.chain(tokens[: 40 * BLOCK + 5])).device
    assert found == [40 * BLOCK // block_tokens * block_tokens, 40 * BLOCK]


def test_engines_that_hash_otherwise_share_blocks(index):
    """One block under two engines' names is filed once, and either engine removes its own copy only."""
    tokens = text(8)
    names = engine_names(tokens, seed=1)
    Engine(index, 0).says(stored(tokens))
    other = Engine(index, 1)
    other.says(stored(tokens, names=names))
    assert index.blocks == 8
    other.says(BlockRemoved((names[5],)))
    assert index.match(index.chain(tokens)).device == [8 * BLOCK, 5 * BLOCK]
    index.check_integrity()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"medium": "TAPE"}, Unplaced.MEDIUM),
        ({"locality": "REMOTE"}, Unplaced.MEDIUM),
        ({"kind": "sliding_window", "group": 1}, Unplaced.GROUP),
        ({"group": 1}, Unplaced.GROUP),
        ({"extra_keys": (("a",),)}, Unplaced.LENGTHS),
    ],
)
def test_what_cannot_be_filed_is_counted(index, fields, why):
    """Unknown media, other groups than full attention and odd lengths are passed over, with their reason."""
    tokens = text(4)
    assert Engine(index).says(stored(tokens, **fields)).unplaced == ((why, 4),)
    assert index.blocks == 0


def test_odd_blocks_are_counted(index):
    """Blocks of 24 tokens, fewer hashes than tokens, and unknown parents are passed over, with their reason."""
    tokens, engine = text(6), Engine(index)
    names = engine_names(tokens)
    odd = BlockStored(tuple(names[:4]), None, array("I", tokens[:96]), 24)
    short = BlockStored(tuple(names[:4]), None, array("I", tokens), BLOCK)
    assert engine.says(odd).unplaced == ((Unplaced.BLOCK_SIZE, 4),)
    assert engine.says(short).unplaced == ((Unplaced.LENGTHS, 4),)
    assert engine.says(stored(tokens, 2, 6)).unplaced == ((Unplaced.PARENT, 4),)
    assert engine.says(BlockRemoved((names[0],))).unplaced == ((Unplaced.UNKNOWN, 1),)
    assert index.wiring(0).state is State.UNUSABLE


def test_a_removal_in_another_group_leaves_full_attention_alone(index):
    """The same hash leaves a sliding window's group while full attention still holds it."""
    tokens, engine = text(4), Engine(index)
    names = tuple(engine_names(tokens))
    engine.says(stored(tokens, kind="full_attention", group=0), stored(tokens, kind="sliding_window", group=1))
    engine.says(BlockRemoved(names[:2], group=1))
    assert index.match(index.chain(tokens)).device == [64]
    engine.says(BlockRemoved(names[3:], group=0))
    assert index.match(index.chain(tokens)).device == [48]


def test_a_number_that_goes_back_is_a_new_life(index):
    """An engine that starts again holds nothing of before; its node's blocks and other instances' stay."""
    tokens = text(8)
    keys = block_keys(array("I", tokens), root=root_key(), tokens_per_block=BLOCK)
    engine, node, other = Engine(index), Engine(index, 0, "node"), Engine(index, 1)
    engine.says(stored(tokens))
    engine.says(stored(text(3, seed=1)))
    node.says(BlockStored(tuple(keys), None, array("I"), BLOCK, medium="CPU"))
    other.says(stored(tokens, 0, 4))
    engine.sequence = 0
    assert engine.says(stored(text(2, seed=2))).restarted
    found = index.match(index.chain(tokens))
    assert (found.device, found.host) == ([0, 64], [128, 64])
    index.check_integrity()


def test_a_copy_behind_its_own_replay_changes_nothing(index):
    """A batch that came by replay already, and comes again, is no new life."""
    tokens, engine = text(8), Engine(index)
    for at in range(4):
        engine.says(stored(tokens, 2 * at, 2 * at + 2))
    engine.sequence, engine.seconds = 1, 1.0
    assert engine.says(stored(tokens, 2, 4)) == Applied()
    assert index.match(index.chain(tokens)).device == [128]


def test_ranks_count_for_themselves(index):
    """Data-parallel ranks of one instance each number their batches."""
    tokens = text(8)
    for rank in (0, 1):
        engine = Engine(index)
        assert not engine.says(stored(tokens, 0, 4), rank=rank).restarted
        assert engine.says(stored(tokens, 4, 8), rank=rank).gap is None


def test_a_gap_is_told(index):
    """Numbers that were left out are told, counted as lost, and do not stop what follows."""
    engine = Engine(index)
    engine.says(stored(text(2)))
    assert engine.says(stored(text(4, seed=1)), skip=3).gap == (1, 4)
    assert index.wiring(0).lost_batches == 3
    assert index.match(index.chain(text(4, seed=1))).device == [64]


def test_a_cleared_cache_is_empty(index):
    """AllBlocksCleared takes all that this source announced, and nothing of another source."""
    tokens, engine = text(8), Engine(index)
    keys = block_keys(array("I", tokens), root=root_key(), tokens_per_block=BLOCK)
    Engine(index, 0, "node").says(BlockStored(tuple(keys[:3]), None, array("I"), BLOCK, medium="STORAGE"))
    engine.says(stored(tokens))
    engine.says(AllBlocksCleared())
    found = index.match(index.chain(tokens))
    assert (found.device, found.disk) == ([0], [48])


def test_history_counts_until_events_come(index):
    """What was sent to an instance is taken to be held there; once events come, for some prompts more only."""
    tokens = text(100)
    index.learn(2, index.chain(tokens))
    assert index.match(index.chain(tokens)).device == [0, 0, 1600]
    assert index.wiring(2).state is State.NEW
    for seed in range(100):
        index.learn(2, index.chain(text(3, seed=seed)))
    assert index.match(index.chain(tokens)).device == [0, 0, 1600]
    Engine(index, 2).says(stored(tokens, 0, 3))
    assert index.match(index.chain(tokens)).device == [0, 0, 1600]
    for seed in range(2 * LATELY_PROMPTS):
        index.learn(2, index.chain(text(3, seed=seed)))
    assert index.match(index.chain(tokens)).device == [0, 0, 48]
    index.check_integrity()


def test_late_events_name_what_was_learned(index):
    """A prompt is found at once where it was sent; the events that follow name its blocks, and removals take them."""
    tokens = text(70)
    index.learn(0, index.chain(tokens))
    engine = Engine(index)
    engine.says(stored(tokens, 0, 40))
    engine.says(stored(tokens, 40, 70))
    engine.says(BlockRemoved((engine_names(tokens)[50],)))
    assert index.match(index.chain(tokens)).device == [800]
    assert index.blocks == 70
    index.check_integrity()


def test_a_part_of_a_block_is_not_expected(index):
    """Of what was sent lately, an engine that announced blocks of 128 tokens is expected to hold whole ones."""
    tokens, other = text(40), text(40, seed=1)
    Engine(index, 0).says(stored(other[:256], block_tokens=128))
    for slot in (0, 1):
        index.learn(slot, index.chain(tokens))
    assert index.match(index.chain(tokens)).device == [640, 640]
    assert index.match(index.chain(tokens[:500])).device == [384, 496]


def test_an_engines_names_reach_learned_blocks(index):
    """A block that was learned from one instance's history and announced by another is removed by its name."""
    tokens = text(10)
    index.learn(0, index.chain(tokens))
    engine = Engine(index, 1)
    engine.says(stored(tokens))
    engine.says(BlockRemoved((engine_names(tokens)[6],)))
    assert index.match(index.chain(tokens)).device == [160, 96]
    index.check_integrity()


def test_chunks_are_learned_beside_events(index):
    """Without a tokenizer, keys of bytes say where a prompt's beginning was sent, also after events have come."""
    keys = np.random.default_rng(1).integers(0, 1 << 63, 30).tolist()
    index.learn(1, Chain.of_chunks(keys[:20], 64.0))
    Engine(index, 1).says(stored(text(4)))
    assert index.match(Chain.of_chunks(keys, 62.5)).device == [0, 1250]
    assert index.match(Chain.of_chunks(keys[1:], 62.5)) == Overlaps()


def test_a_dropped_instance_holds_nothing(index):
    """After `drop` an instance is as if it had never been heard, and others are untouched."""
    tokens = text(100)
    for slot in (0, 1):
        Engine(index, slot).says(stored(tokens))
    index.drop(0)
    assert index.match(index.chain(tokens)).device == [0, 1600]
    index.drop(1)
    assert index.blocks == 0
    index.check_integrity()


def test_a_lost_engine_leaves_what_its_node_holds(index):
    """With `source`, only that stream's blocks and what was sent there are forgotten; the other stream goes on."""
    tokens = text(20)
    keys = block_keys(array("I", tokens), root=root_key(), tokens_per_block=BLOCK)
    engine, node = Engine(index), Engine(index, 0, "node m")
    node.says(BlockStored(tuple(keys[:8]), None, array("I"), BLOCK, medium="CPU"))
    node.says(BlockStored(tuple(keys[8:12]), keys[7], array("I"), BLOCK, medium="STORAGE"))
    engine.says(stored(tokens))
    index.learn(0, index.chain(text(5, seed=1)))
    index.drop(0, source="")
    found = index.match(index.chain(tokens))
    assert (found.device, found.host, found.disk) == ([0], [8 * BLOCK], [12 * BLOCK])
    assert not any(index.match(index.chain(text(5, seed=1))).device)
    assert not node.says(BlockRemoved((keys[11],), medium="STORAGE")).restarted
    engine.sequence = 0
    assert not engine.says(stored(tokens, 0, 2)).restarted
    found = index.match(index.chain(tokens))
    assert (found.device, found.disk) == ([2 * BLOCK], [11 * BLOCK])
    index.drop(0)
    assert index.blocks == 0
    index.check_integrity()


def test_a_next_turn_hashes_only_what_is_new(index):
    """A chain that continues another one has the same match as one made of all tokens."""
    tokens = text(50)
    Engine(index).says(stored(tokens))
    node = block_keys(array("I", tokens), root=root_key(), tokens_per_block=BLOCK)
    Engine(index, 0, "node").says(BlockStored(tuple(node), None, array("I"), BLOCK, medium="CPU"))
    first = index.chain(tokens[:333])
    index.match(first)
    assert index.match(first.continued(tokens, 333)) == index.match(index.chain(tokens))


def test_turns_grow_apart(index):
    """A chain and the one that continues it may be read on in any order: neither gets what the other has read."""
    tokens = text(50)
    other = tokens[:320] + text(30, seed=1)
    node = block_keys(array("I", other), root=root_key(), tokens_per_block=BLOCK)
    Engine(index, 0, "node").says(BlockStored(tuple(node), None, array("I"), BLOCK, medium="CPU"))
    Engine(index, 1).says(stored(tokens))
    first = index.chain(tokens)
    first.names((By.KEY, BLOCK), 20)
    turn = first.continued(other, 320)
    assert index.match(first) == index.match(index.chain(tokens))
    assert index.match(turn) == index.match(index.chain(other))
    assert index.match(turn).host == [800, 320]
    assert index.match(first.continued(tokens, 800)) == index.match(index.chain(tokens))


class _Slow(tuple):
    """Events that are being taken in until somebody says go on."""

    __slots__ = ()

    def __iter__(self):
        """Tell that it began, and wait."""
        begun, go_on = tuple.__iter__(self)
        begun.set()
        assert go_on.wait(30.0)
        return iter(())


def test_learning_waits_for_no_batch(index):
    """What is learned while a batch is taken in comes back at once, and is found when the batch is done."""
    tokens, begun, go_on = text(5), threading.Event(), threading.Event()
    taker = threading.Thread(target=index.apply, args=(0, Batch(1.0, _Slow((begun, go_on))), 0))
    taker.start()
    assert begun.wait(30.0)
    for seed in range(2 * SENT_MAX):
        index.learn(1, index.chain(text(2, seed=seed + 1)))
    index.learn(1, index.chain(tokens))
    assert index.match(index.chain(tokens)) == Overlaps()
    go_on.set()
    taker.join()
    assert index.match(index.chain(tokens)).device == [0, 5 * BLOCK]
    assert index.blocks == 5 + 2 * (SENT_MAX - 1)
    index.check_integrity()


def test_ends_are_forgotten_before_beginnings():
    """Of one long text that came at once, the cap takes the end: what is left is found from its beginning on."""
    index = FleetIndex(10 * RUN_BLOCKS)
    tokens, engine = text(7 * RUN_BLOCKS), Engine(index)
    engine.says(stored(tokens))
    engine.says(stored(text(2 * RUN_BLOCKS, seed=1)))
    assert index.evicted_blocks == 0
    engine.says(stored(text(2 * RUN_BLOCKS, seed=2)))
    assert index.evicted_blocks == 2 * RUN_BLOCKS
    assert index.match(index.chain(tokens)).device == [5 * RUN_BLOCKS * BLOCK]


@pytest.mark.parametrize("length", [1, 3, 64, 100])
def test_the_cap_holds(length):
    """Whatever comes, the weight of what is filed stays below the cap; what was used last is kept."""
    index = FleetIndex(600, secret=1)
    engine, kept = Engine(index), text(length, seed=10_000)
    engine.says(stored(kept))
    for seed in range(200):
        engine.says(stored(text(length, seed=seed)))
        index.match(index.chain(kept))
        index.check_integrity()
    assert index.evicted_blocks > 0
    assert index.match(index.chain(kept)).device == [length * BLOCK]


def test_memory_is_bounded_by_the_cap():
    """The index's own count of its memory stays below 160 bytes for each block of its cap, for long and short texts."""
    for length in (1, 200):
        index = FleetIndex(6000)
        engine = Engine(index)
        for seed in range(8000 // length):
            engine.says(stored(text(length, seed=seed)))
        assert index.nbytes <= 160 * 6000 + 4096
        assert index.blocks + RUN_WEIGHT * (index.blocks // RUN_BLOCKS) <= 6000


def test_no_events_is_told_plainly(index):
    """Served requests without a single event are called that, and say what to turn on."""
    for _ in range(EVIDENCE):
        index.told(0, 0, 100)
    found = index.wiring(0)
    assert found.state is State.NO_EVENTS
    assert "KV event" in found.advice


def test_no_events_is_told_without_the_engines_word(index):
    """An engine that tells neither events nor cached tokens is found out by what was sent to it."""
    for seed in range(EVIDENCE):
        assert index.wiring(1).state is State.NEW
        index.learn(1, index.chain(text(2, seed=seed)))
    assert index.wiring(1).state is State.NO_EVENTS


@pytest.mark.parametrize(
    ("predicted", "cached", "state"), [(0, 500, State.OTHER_TEXT), (500, 0, State.STALE), (500, 480, State.EXACT)]
)
def test_hits_told_are_compared_with_hits_predicted(index, predicted, cached, state):
    """An engine that finds much more, or much less, than its events explain is not wired as it should be."""
    Engine(index).says(stored(text(4)))
    for _ in range(EVIDENCE):
        index.told(0, predicted, cached)
    assert index.wiring(0).state is state


def test_matching_while_events_come():
    """Matches in one thread and events in another disturb nobody, also while the cap takes blocks away."""
    index, failures = FleetIndex(2000), []
    shared, done = text(40), threading.Event()

    def match() -> None:
        try:
            while not done.is_set():
                for seed in range(20):
                    index.match(index.chain(shared + text(5, seed=seed)))
        except Exception as error:  # noqa: BLE001  # whatever it is, the test shows it
            failures.append(error)

    thread = threading.Thread(target=match)
    thread.start()
    engines = [Engine(index, slot) for slot in range(3)]
    for seed in range(150):
        engine = engines[seed % 3]
        tokens = shared + text(20, seed=seed)
        engine.says(stored(tokens), BlockRemoved(tuple(engine_names(tokens)[30:33])))
    done.set()
    thread.join()
    assert not failures
    index.check_integrity()


# -- against a naive model ---------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Three instances over a small tree of texts, beside plain sets of (text up to here) per instance and tier."""

    @initialize(length=st.sampled_from([3, 70, 150]))
    def start(self, length):
        """Six texts: three pairs that part somewhere, all with one beginning."""
        self.index = FleetIndex(1_000_000, secret=9)
        self.engines = [Engine(self.index, slot) for slot in range(3)]
        root = text(length // 3, seed=100)
        self.texts = []
        for pair in range(3):
            trunk = root + text(length // 3, seed=pair)
            self.texts += [trunk + text(length // 3, seed=10 + 2 * pair + end) for end in (0, 1)]
        self.names = [engine_names(tokens) for tokens in self.texts]
        self.held = [[set() for _ in MEDIA] for _ in self.engines]
        self.known = set()

    @rule(
        slot=st.integers(0, 2), which=st.integers(0, 5), tier=st.integers(0, 2), share=st.tuples(*[st.floats(0, 1)] * 2)
    )
    def store(self, slot, which, tier, share):
        """Blocks anywhere in a text, behind a block that some instance has announced."""
        names = self.names[which]
        first, stop = sorted(round(each * len(names)) for each in share)
        while first and names[first - 1] not in self.known:
            first -= 1
        if stop > first:
            self.engines[slot].says(stored(self.texts[which], first, stop, names=names, medium=MEDIA[tier]))
            self.held[slot][tier].update(names[first:stop])
            self._prune()
            self.known.update(names[first:stop])

    @rule(
        slot=st.integers(0, 2),
        which=st.integers(0, 5),
        tier=st.integers(0, 2),
        at=st.floats(0, 1),
        count=st.integers(1, 5),
    )
    def remove(self, slot, which, tier, at, count):
        """Blocks anywhere, in any order."""
        first = int(at * len(self.names[which]))
        gone = self.names[which][first : first + count]
        if gone:
            self.engines[slot].says(BlockRemoved(tuple(gone), medium=MEDIA[tier]))
            self.held[slot][tier].difference_update(gone)
            self._prune()

    @rule(slot=st.integers(0, 2))
    def restart(self, slot):
        """A new incarnation."""
        if self.engines[slot].sequence:
            self.engines[slot].sequence = 0
            self.engines[slot].says()
            self._forget(slot)

    @rule(slot=st.integers(0, 2))
    def drop(self, slot):
        """An instance that is not heard any more."""
        self.index.drop(slot)
        self.engines[slot].sequence = 0
        self._forget(slot)

    def _forget(self, slot):
        self.held[slot] = [set() for _ in MEDIA]
        self._prune()

    def _prune(self):
        """A parent is known while the run with it is: only what is surely known may be a parent here."""
        held = set().union(*(tier for tiers in self.held for tier in tiers))
        self.known = {name for name in self.known if name in held}

    @invariant()
    def matches(self):
        """Each instance's match is the longest prefix in its set, by tier, cumulatively."""
        if not hasattr(self, "index"):
            return
        self.index.check_integrity()
        for tokens, names in zip(self.texts, self.names, strict=True):
            found = self.index.match(self.index.chain(tokens))
            device = list(found.device) + [0] * (3 - len(found.device))
            host = list(found.host or device) + [0] * (3 - len(found.host or device))
            disk = list(found.disk or host) + [0] * (3 - len(found.disk or host))
            for slot, tiers in enumerate(self.held):
                held: set[int] = set()
                for tier, told in zip(tiers, (device, host, disk), strict=True):
                    held = held | tier
                    expected = next((at for at, name in enumerate(names) if name not in held), len(names))
                    assert told[slot] == expected * BLOCK


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=400), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_any_tokens_at_all(tokens, secret):
    """Any u32 is a token, and any length a prompt: what is announced of it is found, to its last whole block."""
    index = FleetIndex(10_000, secret=secret)
    whole = len(tokens) // BLOCK
    if whole:
        Engine(index).says(stored(tokens, 0, whole))
    assert list(index.match(index.chain(tokens)).device) == ([whole * BLOCK] if whole else [])
