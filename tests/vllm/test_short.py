"""The short pass on real vLLM: what comes from memory, and from disk after restarts, is what no cache would answer."""

from __future__ import annotations

import pytest

from tests.vllm.arms import cold, loaded, same, saved
from tests.vllm.node import MIB
from tests.vllm.prompts import all_prompts, loadable
from tests.vllm.server import EXACT

TOKENS = 8
PROMPTS = [each for each in all_prompts() if len(each) in {5, 33, 257, 701, 737, 1025}]


@pytest.mark.slow
def test_identical_from_memory_and_from_disk(start_node, start_vllm, folder):
    """Greedy answers of a real vLLM are equal without a cache, from memory, and from disk after all was restarted."""
    node = start_node(disk_path=folder / "disk", disk_bytes=256 * MIB)
    server = start_vllm(*EXACT, node=node.socket)
    expected = cold(server, PROMPTS, TOKENS)
    saved(server, PROMPTS, expected, TOKENS)
    memory = loaded(server, PROMPTS, expected, "memory", TOKENS)
    assert memory.by_tier["memory"] >= sum(map(loadable, PROMPTS))
    server.close()
    node.restart()
    server = start_vllm(*EXACT, node=node.socket)
    disk = loaded(server, PROMPTS, expected, "disk", TOKENS)
    assert disk.by_tier["disk"] > 0, disk
    same(cold(server, PROMPTS, TOKENS), expected, "a new process, without a cache")
