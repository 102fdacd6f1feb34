"""KV events of a real vLLM: every one is read, and they name the same own keys as the prompts do."""

from __future__ import annotations

import json
import threading

import pytest

from bench.vllm_server import free_port
from tests.vllm.server import BLOCK_TOKENS, MODEL
from thermocline.blocks.key import block_keys, root_key
from thermocline.clock import until
from thermocline.engines.vllm.prompts import token_array
from thermocline.wire.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Topic, read_batch, write_topic
from thermocline.wire.subscriber import Subscriber

SALT = "tenant a"
WAIT_SECONDS = 20.0
PAGES = 24


class Heard:
    """What a subscriber was handed, by source and sequence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.batches: list[tuple[str, int, Batch]] = []

    def __call__(self, source: str, sequence: int, payload: bytes) -> None:
        batch = read_batch(payload)
        with self._lock:
            self.batches.append((source, sequence, batch))

    def events(self, kind: type) -> list:
        with self._lock:
            return [event for _, _, batch in self.batches for event in batch.events if isinstance(event, kind)]

    def own_keys(self) -> set[bytes]:
        """The own keys of all blocks that were stored, chained from their tokens alone."""
        named: dict[int | bytes, bytes] = {}
        for event in self.events(BlockStored):
            salt = next((words[-1] for words in event.extra_keys or () if words), "")
            parent = root_key(salt.encode()) if event.parent is None else named[event.parent]
            keys = block_keys(event.tokens, root=parent, tokens_per_block=event.block_tokens)
            assert len(keys) == len(event.hashes)
            named |= dict(zip(event.hashes, keys, strict=True))
        return set(named.values())


def expected(prompt: list[int], salt: str = "") -> list[bytes]:
    """The own keys of a prompt's full blocks."""
    return block_keys(token_array(prompt).data, root=root_key(salt.encode()), tokens_per_block=BLOCK_TOKENS)


@pytest.mark.slow
def test_events_of_a_real_vllm(start_vllm):
    """Real events are read with none skipped, give the own keys of the prompts, and come again in a replay."""
    port, replay = free_port(), f"tcp://127.0.0.1:{free_port()}"
    topic = write_topic(Topic("vllm-0", MODEL))
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": topic, "replay_endpoint": replay}
    heard = Heard()
    subscriber = Subscriber([f"tcp://127.0.0.1:{port}"], heard)
    arguments = ("--num-gpu-blocks-override", str(PAGES), "--max-model-len", "512", "--kv-events-config")
    server = start_vllm(*arguments, json.dumps(config | {"endpoint": f"tcp://127.0.0.1:{port}"}))
    prompts = [[10 + (seed * 37 + at * 7) % 3000 for at in range(BLOCK_TOKENS * 4 + 5)] for seed in range(8)]
    for prompt in prompts:
        server.ask(prompt, 4)
    server.ask(prompts[0], 4, cache_salt=SALT)
    wanted = {key for prompt in prompts for key in expected(prompt)} | set(expected(prompts[0], SALT))
    assert until(lambda: wanted <= heard.own_keys(), WAIT_SECONDS, pause_seconds=0.1)
    assert heard.own_keys() == wanted
    assert heard.events(BlockRemoved), "so many pages cannot hold all of it"
    server.forget()
    server.ask(prompts[0], 4)  # vLLM tells of the reset with its next step
    assert until(lambda: heard.events(AllBlocksCleared), WAIT_SECONDS, pause_seconds=0.1)
    assert {source for source, _, _ in heard.batches} == {topic}
    assert [sequence for _, sequence, _ in heard.batches] == list(range(len(heard.batches)))
    assert sum(batch.skipped for _, _, batch in heard.batches) == 0
    subscriber.close()

    late = Heard()
    second = Subscriber([f"tcp://127.0.0.1:{port}"], late, replays={topic: replay})
    assert until(
        lambda: server.ask(prompts[1], 4) and len(late.batches) > len(heard.batches), WAIT_SECONDS, pause_seconds=0.5
    )
    second.close()
    assert late.batches[: len(heard.batches)] == heard.batches
