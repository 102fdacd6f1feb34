"""A sweep of a real vLLM server: what it had cached, from where, and the blocks that a length takes."""

from __future__ import annotations

import pytest

from thermocline.clock import SystemClock
from thermocline.lens.profile import profile
from thermocline.lens.sweep import Endpoint, Plan

BLOCK = 32
CLOCK = SystemClock()


@pytest.mark.vllm_long
def test_sweep(start_vllm):
    """Shared blocks are cached on the device, and KV memory by length is blocks of the prompt and of what follows."""
    server = start_vllm()
    asked = Plan((193, 641), (0.5,), (1, 2), answers=2)
    found = profile(
        Endpoint(f"http://127.0.0.1:{server.port}", None, CLOCK), asked, CLOCK, 120.0, lambda _: None, seed=1
    )
    assert (found.stopped, found.failed) == ("", 0)
    for row in found.measured.rows:
        assert row.cached_tokens == row.shared_tokens // BLOCK * BLOCK
        assert row.source == ("device" if row.cached_tokens else "")
    assert found.measured.block_tokens == BLOCK
    assert found.measured.conditions.engine.startswith("vllm")
    assert [each.blocks for each in found.measured.memory] == [7, 21]
