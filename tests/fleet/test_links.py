"""Prompts known by their bytes: tied to the blocks that events tell of, they are held by whom events name."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.fleet.test_index import BLOCK, Engine, engine_names, stored, text
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Overlaps
from thermocline.fleet.links import BLOCKS_PER_LINK, ENDS_MAX
from thermocline.tokens.chunks import chunk_keys
from thermocline.wire.events import AllBlocksCleared, BlockRemoved

CHUNK_TOKENS = 64.0
"""Tokens are four bytes each here, so that a chunk is four blocks."""
CHUNK = int(CHUNK_TOKENS)


@pytest.fixture
def index():
    """An index with room for all that a test files."""
    return FleetIndex(100_000, secret=3)


def by_bytes(index, tokens, *, salt="", before_tokens=0.0):
    """The prompt without its tokens."""
    keys = chunk_keys(array("I", tokens).tobytes(), hash(salt) & (1 << 64) - 1)
    total = len(tokens) + int(before_tokens)
    return index.chain_of_bytes(keys, CHUNK_TOKENS, before_tokens=before_tokens, tokens=total, salt=salt)


def ended(index, slot, chain, tokens, *, cached=None, output=0):
    """The engine answers, and says how long the prompt was."""
    index.ended(slot, chain, len(tokens), cached, output)


def served(index, engine, tokens, *, first=0, salt="", cached=None, **fields):
    """A prompt is sent, announced from its block `first` on, and answered."""
    chain = by_bytes(index, tokens, salt=salt)
    index.learn(engine.slot, chain)
    engine.says(stored(tokens, first, **fields))
    ended(index, engine.slot, chain, tokens, cached=cached)


def found(index, tokens, salt=""):
    """What each slot holds of it on the device."""
    return list(index.match(by_bytes(index, tokens, salt=salt)).device)


def test_what_is_evicted_is_forgotten(index):
    """A removal that an engine announces counts for prompts that are known by their bytes only, as does a clearing."""
    tokens, engine = text(80), Engine(index)
    served(index, engine, tokens)
    assert found(index, tokens) == [80 * BLOCK]
    engine.says(BlockRemoved(tuple(engine_names(tokens)[50:])))
    assert found(index, tokens) == [50 * BLOCK]
    assert found(index, tokens[: 41 * BLOCK]) == [40 * BLOCK]
    engine.says(AllBlocksCleared())
    assert not any(found(index, tokens))
    index.check_integrity()


def test_what_nobody_held_for_a_while_is_found_again(index):
    """Blocks that were forgotten are found by the same bytes once any instance announces them, however cut."""
    tokens, engine, other = text(200), Engine(index), Engine(index, 1)
    served(index, engine, tokens)
    engine.says(BlockRemoved(tuple(engine_names(tokens)[30:])))
    assert found(index, tokens) == [30 * BLOCK]
    engine.says(BlockRemoved(tuple(engine_names(tokens)[:30])))
    assert index.blocks == 25 * 2  # keys of bytes: what was sent where
    assert found(index, tokens) == [0]
    for first, stop in ((0, 11), (11, 140), (140, 200)):
        other.says(stored(tokens, first, stop))
        index.check_integrity()
        assert found(index, tokens)[1] // CHUNK == stop // 8 * 2
    assert found(index, tokens)[0] == 0


def test_others_that_hold_the_same_are_found(index):
    """An instance that announces the same blocks is found, although no such prompt was ever sent there."""
    tokens = text(80)
    served(index, Engine(index), tokens)
    Engine(index, 1).says(stored(tokens, 0, 60))
    Engine(index, 2).says(stored(tokens, 0, 70, medium="CPU"))
    overlaps = index.match(by_bytes(index, tokens))
    assert overlaps.device == [80 * BLOCK, 60 * BLOCK, 0]
    assert overlaps.host == [80 * BLOCK, 60 * BLOCK, 70 * BLOCK]


def test_an_instance_that_starts_again_holds_nothing(index):
    """A new incarnation's predecessor is forgotten; another instance's copy stays."""
    tokens, engine = text(40), Engine(index)
    served(index, engine, tokens)
    Engine(index, 1).says(stored(tokens, 0, 20))
    engine.sequence = 0
    engine.says(stored(text(3, seed=1)))
    assert found(index, tokens) == [0, 20 * BLOCK]


def test_shares_of_a_prompt_stand_for_shares_of_its_blocks(index):
    """Prompts that leave a known one early are held as far as their bytes go along, in blocks."""
    tokens, engine = text(400), Engine(index)
    served(index, engine, tokens)
    for chunks in (8, 40, 99):
        other = tokens[: chunks * CHUNK] + text(100, seed=chunks)
        held = found(index, other)[0]
        assert chunks * CHUNK - 2 * CHUNK < held <= chunks * CHUNK


def test_each_turn_corrects_the_shares(index):
    """Where a conversation's bytes per token change, every turn's own length counts for its part."""
    tokens, engine = text(480), Engine(index)
    thick, thin = tokens[: 80 * BLOCK], tokens[: 160 * BLOCK]
    served(index, engine, thick)
    keys = chunk_keys(array("I", thin).tobytes(), hash("") & (1 << 64) - 1)
    told = thick + text(40, seed=9)  # the second turn's bytes are half as many tokens
    chain = index.chain_of_bytes(keys, CHUNK_TOKENS, tokens=len(thin))
    index.learn(0, chain)
    engine.says(stored(told, 80, 120))
    ended(index, 0, chain, told)
    assert list(index.match(chain).device) == [120 * BLOCK]
    assert found(index, thick) == [80 * BLOCK]
    assert found(index, thin[: 112 * BLOCK]) == [96 * BLOCK]


def test_what_stands_before_the_bytes_counts(index):
    """Tools and instructions are tokens of the prompt too, before the bytes that have keys."""
    frame, tokens, engine = text(40, seed=1), text(40), Engine(index)
    chain = by_bytes(index, tokens, before_tokens=40.0 * BLOCK)
    index.learn(0, chain)
    engine.says(stored(frame + tokens))
    ended(index, 0, chain, frame + tokens)
    assert list(index.match(chain).device) == [80 * BLOCK]
    assert list(index.match(by_bytes(index, tokens[: 16 * BLOCK], before_tokens=40.0 * BLOCK)).device) == [56 * BLOCK]


def test_texts_of_one_length_teach_nothing(index):
    """Two texts that end at one depth while a request runs may each be its prompt: history counts on."""
    tokens, engine = text(40), Engine(index)
    chain = by_bytes(index, tokens)
    index.learn(0, chain)
    engine.says(stored(tokens))
    engine.says(stored(text(40, seed=1)))
    ended(index, 0, chain, tokens)
    engine.says(BlockRemoved(tuple(engine_names(tokens))))
    assert found(index, tokens) == [40 * BLOCK]


def test_what_an_engine_had_cached_tells_texts_apart(index):
    """Of two texts of one length, the prompt is the one that was announced from where its cached tokens ended."""
    tokens, other, engine = text(40), text(40, seed=1), Engine(index)
    engine.says(stored(tokens, 0, 12))
    chain = by_bytes(index, tokens)
    index.learn(0, chain)
    engine.says(stored(other))
    engine.says(stored(tokens, 12))
    ended(index, 0, chain, tokens, cached=12 * BLOCK)
    engine.says(BlockRemoved(tuple(engine_names(tokens)[20:])))
    assert found(index, tokens) == [20 * BLOCK]


def test_a_prompt_that_comes_in_pieces(index):
    """A long prompt is announced in several batches, and its answer block by block behind it."""
    tokens, engine = text(45), Engine(index)
    prompt = tokens[: 40 * BLOCK + 7]
    chain = by_bytes(index, prompt)
    index.learn(0, chain)
    engine.says(stored(tokens, 0, 16), stored(tokens, 16, 24))
    engine.says(stored(tokens, 24, 40))
    for at in range(40, 45):
        engine.says(stored(tokens, at, at + 1))
    ended(index, 0, chain, prompt, cached=0, output=5 * BLOCK)
    engine.says(BlockRemoved(tuple(engine_names(tokens)[36:])))
    assert found(index, prompt) == [36 * BLOCK]


def test_a_prompt_that_is_announced_with_its_answer(index):
    """Engines that tell of a text once it is whole: the prompt's end lies before the text's."""
    tokens, engine = text(45), Engine(index)
    prompt = tokens[: 40 * BLOCK]
    chain = by_bytes(index, prompt)
    index.learn(0, chain)
    engine.says(stored(tokens))
    ended(index, 0, chain, prompt, cached=0, output=5 * BLOCK)
    Engine(index, 1).says(stored(tokens))
    assert found(index, prompt) == [40 * BLOCK, 40 * BLOCK]


def test_a_prompt_that_ends_with_a_block_is_no_longer_than_it_is(index):
    """Of a prompt of four whole blocks and no output, a text of three is not the beginning: nothing is tied to it."""
    tokens, engine = text(4 * CHUNK // BLOCK), Engine(index)
    chain = by_bytes(index, tokens)
    index.learn(0, chain)
    engine.says(stored(text(15, seed=9)))
    ended(index, 0, chain, tokens)
    index.learn(0, chain)
    assert found(index, tokens) == [len(tokens)]  # as it was sent there
    index.drop(0)
    index.check_integrity()
    assert index.blocks == 0


def test_events_may_come_behind_the_answer(index):
    """A batch that is late still says what the prompt's blocks are, but not for ever."""
    tokens, other, engine = text(40), text(30, seed=1), Engine(index)
    for wait, prompt in enumerate((tokens, other)):
        engine.says(stored(text(2, seed=20 + wait)))
        chain = by_bytes(index, prompt)
        index.learn(0, chain)
        ended(index, 0, chain, prompt)
        for seed in range(4 * wait):  # a second each
            engine.says(stored(text(2, seed=30 + seed)))
        engine.says(stored(prompt))
        engine.says(BlockRemoved(tuple(engine_names(prompt)[20:])))
    assert found(index, tokens) == [20 * BLOCK]
    assert found(index, other) == [28 * BLOCK]


def test_salts_stay_apart(index):
    """A text under another salt is another text, in bytes and in blocks, whoever was answered meanwhile."""
    tokens, engine = text(40), Engine(index)
    salted = {"extra_keys": (("a",), *[None] * 39), "names": engine_names(tokens, seed=1)}
    chain = by_bytes(index, tokens)
    index.learn(0, chain)
    served(index, engine, tokens, salt="a", **salted)
    ended(index, 0, chain, tokens)
    assert found(index, tokens, salt="a") == [40 * BLOCK]
    engine.says(BlockRemoved(tuple(salted["names"])))
    assert not any(found(index, tokens, salt="a"))
    assert found(index, tokens, salt="b") == []
    assert found(index, tokens) == [40 * BLOCK]


def test_what_was_sent_behind_known_blocks_counts(index):
    """A turn that is under way is held by the instance that holds what came before, and by nobody else."""
    tokens = text(80)
    first = tokens[: 40 * BLOCK]
    served(index, Engine(index), first)
    served(index, Engine(index, 1), text(3, seed=1))
    for slot in (0, 1):
        index.learn(slot, by_bytes(index, tokens))
    assert found(index, tokens) == [80 * BLOCK, 0]
    index.learn(2, by_bytes(index, tokens))
    assert found(index, tokens) == [80 * BLOCK, 0, 80 * BLOCK]


def test_links_are_bounded():
    """However many prompts are tied, links are at most as many as the cap allows, and few lead to one end of a text."""
    index = FleetIndex(4000)
    engine = Engine(index)
    for seed in range(600):
        served(index, engine, text(4, seed=seed))
        engine.says(BlockRemoved(tuple(engine_names(text(4, seed=seed))[seed % 5 :])))
    index.check_integrity()
    assert len(index._ties) <= 4000 // BLOCKS_PER_LINK
    assert index.nbytes <= 160 * 4000 + 4096
    assert found(index, text(4, seed=599)) == [64]
    tokens = text(40)
    for seed in range(10 * ENDS_MAX):
        engine.says(stored(text(40, seed=seed)))
    served(index, engine, tokens, cached=0)
    assert len(engine.index._instance(0).ends._by_depth) < 10


class Machine(RuleBasedStateMachine):
    """Two instances over conversations that share beginnings; one index is asked by tokens, and by bytes."""

    @initialize()
    def start(self):
        self.index = FleetIndex(1_000_000, secret=9)
        self.engines = [Engine(self.index, slot) for slot in range(2)]
        shared = text(16, seed=100)
        self.texts = [shared + text(16 * (2 + which), seed=which) for which in range(4)]
        self.tied: set[int] = set()

    @rule(slot=st.integers(0, 1), which=st.integers(0, 3))
    def serve(self, slot, which):
        """Each text has its own length, so that it is told apart."""
        tokens = self.texts[which]
        held = self.index.match(self.index.chain(tokens)).device
        first = held[slot] // BLOCK if len(held) > slot else 0
        if first < len(tokens) // BLOCK:
            served(self.index, self.engines[slot], tokens, first=first, cached=first * BLOCK)
            self.tied.add(which)

    @rule(slot=st.integers(0, 1), which=st.integers(0, 3), at=st.integers(0, 90))
    def remove(self, slot, which, at):
        """One block."""
        self.engines[slot].says(BlockRemoved(tuple(engine_names(self.texts[which])[at : at + 1])))

    @rule(slot=st.integers(0, 1), lost=st.booleans())
    def restart(self, slot, lost):
        """An engine is lost, or begins anew."""
        if lost:
            self.index.drop(slot, source="")
        self.engines[slot].sequence = 0
        self.engines[slot].says(stored(text(3, seed=200 + slot)))

    @invariant()
    def agrees(self):
        """What is found by bytes is what is found by tokens, of all that was tied and is filed still."""
        if not hasattr(self, "index"):
            return
        self.index.check_integrity()
        for which in self.tied:
            tokens = self.texts[which]
            exact = self.index.match(self.index.chain(tokens))
            told = self.index.match(by_bytes(self.index, tokens))
            if max(exact.device, default=0) == len(tokens):
                linked = max(told.device)
                assert list(told.device) == [min(linked, each) for each in exact.device]
            if exact == Overlaps():
                assert not any(told.device)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
