"""The transformers engine is an instance like any other: its events name what it holds, in vLLM's form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest

from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.clock import until
from thermocline.engines import api
from thermocline.engines.transformers import Engine
from thermocline.node.announce import Announcer
from thermocline.node.client import NodeClient
from thermocline.settings import Settings
from thermocline.wire.events import Batch, BlockStored, Topic, read_batch, read_topic
from thermocline.wire.subscriber import Subscriber

WAIT_SECONDS = 20.0
BLOCK_TOKENS = 32


class Heard:
    """Batches in their order, and what can be chained from their tokens alone, as a router of another make does it."""

    def __init__(self) -> None:
        self.topics: set[str] = set()
        self.batches: list[Batch] = []

    def __call__(self, source: str, _: int, payload: bytes) -> None:
        self.topics.add(source)
        self.batches.append(read_batch(payload))

    def stored(self, *, with_tokens: bool) -> list[BlockStored]:
        events = [event for batch in self.batches for event in batch.events if isinstance(event, BlockStored)]
        return [event for event in events if bool(event.tokens) == with_tokens]

    def chained(self) -> set[bytes]:
        named: dict[object, BlockKey] = {}
        for event in self.stored(with_tokens=True):
            root = root_key() if event.parent is None else named[event.parent]
            keys = block_keys(event.tokens, root=root, tokens_per_block=event.block_tokens)
            assert tuple(keys) == event.hashes
            named |= dict(zip(event.hashes, keys, strict=True))
        return {*named.values()}

    def keys(self) -> set[bytes]:
        return {name for event in self.stored(with_tokens=False) for name in event.hashes}


@pytest.fixture
def place() -> str:
    return f"ipc://@kv-{os.urandom(6).hex()}"


@pytest.fixture
def told(cleanup: ExitStack, place, make_store, make_engine) -> Iterator[tuple[Engine, Callable[[], Heard]]]:
    """An engine that announces, and routers that hear it, the next one in the place of the one before."""
    store = make_store()
    announcer = cleanup.enter_context(closing(Announcer(store, "http://127.0.0.1:8000", place)))
    engine = make_engine(store, announcer=announcer)
    routers = ExitStack()

    def router() -> Heard:
        routers.close()
        heard, before = Heard(), announcer._publisher._told
        routers.enter_context(closing(Subscriber([place], heard)))
        assert soon(lambda: announcer._publisher._told > before), "who subscribes is told all there is"
        return heard

    yield engine, router
    routers.close()


def numbers(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 4000, count).astype(np.uint32)


def keys_of(tokens: np.ndarray, salt: bytes = b"") -> set[bytes]:
    return set(block_keys(tokens.data, root=root_key(salt), tokens_per_block=BLOCK_TOKENS))


def soon(true: Callable[[], object]) -> bool:
    return until(true, WAIT_SECONDS, pause_seconds=0.01)


def test_events_name_what_is_held(told):
    """Every full block is told with its tokens, which give the very keys that its event names; a next turn follows."""
    engine, router = told
    heard = router()
    prompt = numbers(200, 1)
    answer = engine.generate(prompt, 40)
    whole = np.concatenate((prompt, np.array(answer.tokens[:-1], np.uint32)))
    assert soon(lambda: heard.chained() == keys_of(whole))
    longer = np.concatenate((whole, numbers(100, 2)))
    engine.generate(longer, 1)
    assert soon(lambda: heard.chained() == keys_of(longer))
    assert not heard.keys()
    assert [read_topic(topic) for topic in heard.topics] == [Topic("http://127.0.0.1:8000", engine.served.name)]
    assert {event.medium for event in heard.stored(with_tokens=True)} == {"CPU"}


def test_what_is_salted_is_told_by_its_keys_alone(told):
    """Neither the token ids of a salted prompt nor its salt leave the engine."""
    engine, router = told
    heard = router()
    prompt = numbers(100, 3)
    engine.generate(prompt, 1, salt=b"tenant")
    assert soon(lambda: heard.keys() == keys_of(prompt, b"tenant"))
    assert not heard.stored(with_tokens=True)


def test_a_router_that_starts_again_knows_all_that_follows(told):
    """It learns by key what was held before, and what follows by key as well: no block is behind one it cannot name."""
    engine, router = told
    first = router()
    prompt = numbers(100, 4)
    engine.generate(prompt, 1)
    assert soon(lambda: first.chained() | first.keys() == keys_of(prompt))
    second = router()
    assert soon(lambda: second.keys() == keys_of(prompt))
    longer, other = np.concatenate((prompt, numbers(100, 5))), numbers(70, 6)
    engine.generate(longer, 1)
    engine.generate(other, 1)
    assert soon(lambda: second.keys() >= keys_of(longer) and second.chained() == keys_of(other))


def test_only_own_tiers_are_announced(cleanup, place, make_store, tmp_path):
    """With tiers of its own `serve` announces them by its URL, if asked; those of a node are the node's to announce."""
    store, asked = make_store(), Settings(events_endpoint=place)
    client = cleanup.enter_context(closing(NodeClient(tmp_path / "no.sock")))
    assert api._announcer(asked, client, "http://127.0.0.1:8000") is None
    assert api._announcer(Settings(), store, "http://127.0.0.1:8000") is None
    announcer = api._announcer(asked, store, "http://127.0.0.1:8000")
    assert announcer is not None
    cleanup.enter_context(closing(announcer))
    assert announcer._name == "http://127.0.0.1:8000"
