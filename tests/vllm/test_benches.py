"""The benches on real vLLM in a form too short to mean anything."""

from __future__ import annotations

import math

import pytest

from bench import lmcache, ttft_vllm, vs_lmcache
from bench.harness import Progress
from thermocline.errors import BenchError

pytestmark = pytest.mark.vllm_long


def _is_sound(report):
    assert all(math.isfinite(each.value) for each in report.checks)
    rows = [*report.details["arms"].values(), *report.details["ratios"].values()]
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)


def test_ttft_vllm(vllm, monkeypatch):
    """`bench ttft-vllm` has every arm be what it says on real vLLM, and the node give the same tokens."""
    for name, value in (("LENGTHS", (513, 1025)), ("PROMPTS", 1), ("MEMORY_ROUNDS", 2), ("DISK_ROUNDS", 2)):
        monkeypatch.setattr(ttft_vllm, name, value)
    monkeypatch.setattr(ttft_vllm, "PAIRS", 4)
    report = ttft_vllm.run(Progress("test"))
    _is_sound(report)
    assert {each.name: each.ok for each in report.checks}["same tokens from the node"]


def test_vs_lmcache(vllm, monkeypatch):
    """`bench vs-lmcache` meets every fault, and none of them is felt by a request of thermocline's."""
    try:
        lmcache.python()
    except BenchError as error:
        pytest.skip(f"{error.message} ({error.hint})")
    for name, value in (("LENGTHS", {513: 2}), ("ROUNDS", 1), ("TRIPLES", 2)):
        monkeypatch.setattr(vs_lmcache, name, value)
    report = vs_lmcache.run(Progress("test"))
    _is_sound(report)
    assert all(each.ok for each in report.checks)
