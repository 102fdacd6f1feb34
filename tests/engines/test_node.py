"""The engine on a node: equal answers from memory, from disk, and with the node gone at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from tests.engines.prompts import prompts
from tests.node.making import CLOCK, MIB, PATIENT, Host, until
from tests.vllm.node import Node
from thermocline.engines.generation import GenerateRequest
from thermocline.engines.models import Model
from thermocline.engines.transformers import Engine
from thermocline.node.client import NodeClient
from thermocline.store.receipt import Reason

NEW_TOKENS = 6
SOME = [prompt for prompt in prompts() if 100 < len(prompt) <= 700][::3]
BLOCKS_OF_4_KIB = 64 * MIB // 4096
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def right(plain: Engine) -> list[tuple[int, ...]]:
    """What the model answers without a cache."""
    return [plain.generate(prompt, NEW_TOKENS).tokens for prompt in SOME]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A node in this process, for which loading always pays."""
    with Host(tmp_path, blocks=BLOCKS_OF_4_KIB, disk=True) as host:
        yield host


def answers(engine: Engine, **options: object) -> list[tuple[int, ...]]:
    """What an engine answers to all prompts."""
    return [engine.generate(prompt, NEW_TOKENS, **options).tokens for prompt in SOME]


def kept(client: NodeClient) -> None:
    """Wait until the node has all that was saved."""
    assert client.flush(PATIENT["wait_seconds"])


@pytest.mark.slow
def test_answers_are_equal_from_memory_and_disk(
    right: list[tuple[int, ...]], host: Host, make_engine: MakeEngine
) -> None:
    """Answers are token-identical while the node fills, from its memory, from its disk after a restart, and for two."""
    client = host.client()
    engine = make_engine(client)
    assert answers(engine) == right
    kept(client)
    assert answers(engine) == right
    assert engine.metrics.value("cached_tokens_total", (("tier", "memory"),)) > 0
    host.restart()
    until(lambda: client.up, "the client to attach again")
    assert answers(engine) == right
    assert engine.metrics.value("cached_tokens_total", (("tier", "disk"),)) > 0
    second = make_engine(host.client())
    assert answers(second) == right
    assert second.metrics.value("cached_tokens_total", (("tier", "memory"),)) > 0


@pytest.mark.slow
def test_salts_are_kept_apart(right: list[tuple[int, ...]], host: Host, make_engine: MakeEngine) -> None:
    """What was saved under one salt is never loaded under another."""
    client = host.client()
    engine = make_engine(client)
    longest = max(SOME, key=len)
    engine.generate(longest, NEW_TOKENS, salt=b"one")
    kept(client)
    assert engine.generate(longest, NEW_TOKENS, salt=b"one").cached_tokens > 0
    result = engine.generate(longest, NEW_TOKENS, salt=b"two")
    assert result.cached_tokens == 0
    assert result.tokens == right[SOME.index(longest)]


def test_a_node_that_was_never_there(
    right: list[tuple[int, ...]], tmp_path: Path, make_engine: MakeEngine, model: Model
) -> None:
    """Without a node at the socket every answer is right, and the receipts say why nothing was loaded."""
    with closing(NodeClient(tmp_path / "nobody.sock")) as client:
        engine = make_engine(client)
        assert answers(engine) == right
        request = GenerateRequest(np.array(max(SOME, key=len), np.uint32), 1, "why")
        receipt = engine.submit(request).result().receipt
        assert receipt is not None
        assert receipt.loaded_tokens == 0
        assert receipt.missing[0].reason is Reason.TIER_DOWN


@pytest.mark.slow
def test_a_node_that_is_killed_and_frozen_meanwhile(
    right: list[tuple[int, ...]], tmp_path: Path, make_engine: MakeEngine
) -> None:
    """While its node is frozen, killed and started again an engine answers every request, and right."""
    with ExitStack() as stack:
        settings = {"memory_bytes": "64MiB", "disk_path": tmp_path / "disk", "disk_bytes": "64MiB"}
        node = stack.enter_context(Node(tmp_path, **settings))
        client = stack.enter_context(closing(NodeClient(node.socket)))
        assert client.wait_up(60)
        engine = make_engine(client)
        assert answers(engine) == right
        with node.frozen():
            assert answers(engine) == right
        node.kill()
        assert answers(engine) == right
        node.start()
        until(lambda: client.up, "the client to attach again")
        assert answers(engine) == right
        generations = [engine.submit(GenerateRequest(np.array(prompt, np.uint32), NEW_TOKENS)) for prompt in SOME]
        CLOCK.sleep(0.05)
        node.kill()
        assert [generation.result().tokens for generation in generations] == right
        assert engine.metrics.value("tier_failures_total", (("tier", "store"),)) == 0, "a verb of the client raised"
