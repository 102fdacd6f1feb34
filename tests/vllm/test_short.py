"""The short pass on real vLLM: what comes from memory, and from disk after restarts, is what no cache would answer."""

from __future__ import annotations

import pytest

from tests.vllm.arms import cold, hits, same, saved
from tests.vllm.node import MIB
from tests.vllm.prompts import all_prompts, loadable

TOKENS = 8
PROMPTS = [each for each in all_prompts() if len(each) in {5, 33, 257, 701, 737, 1025}]


@pytest.mark.slow
def test_identical_from_memory_and_from_disk(start_node, start_vllm, folder):
    """Greedy answers of a real vLLM are equal without a cache, from memory, and from disk after all was restarted."""
    node = start_node(disk_path=folder / "disk", disk_bytes=256 * MIB)
    server = start_vllm(node=node.socket)
    expected = cold(server, PROMPTS, TOKENS)
    saved(server, PROMPTS)
    for tier in ("memory", "disk"):
        answers = hits(server, PROMPTS, TOKENS)
        same(answers, expected, tier)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.loaded == loadable(prompt), (tier, answer.receipt)
            assert set(answer.receipt["by_tier"]) <= {tier, "memory"}, "another block brings a tier back to memory"
        assert any(tier in answer.receipt["by_tier"] for answer in answers)
        if tier == "memory":
            server.close()
            node.restart()
            server = start_vllm(node=node.socket)
