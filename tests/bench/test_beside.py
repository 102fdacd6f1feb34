from __future__ import annotations

from bench import beside

ROW = {"median": 1.5, "low": 1.0, "high": 2.0, "rounds": 3}
FAULT = {"fault": "stored: one bit flipped", "answers": ["right", "WRONG TOKENS"], "cached_tokens": [0, 512]}


def _kept(name):
    assert name == "vs-lmcache"
    ratios = {f"CPU time of a miss: {who} / vLLM alone": ROW for who in beside.CACHES}
    ratios |= {"hit: thermocline / vLLM's own prefix hit, 513 tokens": ROW}
    faults = [{**FAULT, "who": who, "first_token_seconds": [0.25, 0.02]} for who in beside.CACHES]
    return {
        "machine": {"cpu": "X", "cores": 2, "python": "3.11", "commit": "abc"},
        "date": "2026-01-02",
        "details": {"ratios": ratios, "cache_cpu_seconds": dict.fromkeys(beside.CACHES, 0.01), "faults": faults},
    }


def test_each_cache_has_its_column(monkeypatch):
    """The page gives first tokens, misses and faults of both caches, and says where one had no hit or was wrong."""
    monkeypatch.setattr(beside, "kept", _kept)
    text = beside.peers()
    assert "| 513 tokens: hit, after vLLM's own cache was emptied | 1.50 x (1.00 x to 2.00 x) | no hit |" in text
    assert "50.00 % (0.00 % to 100.00 %), and 10 ms in the cache's own process" in text
    assert "1 of 2 right; WRONG TOKENS; first token after 250 ms; then 20 ms; 0, 512 tokens cached" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {4}


def test_nothing_kept_is_nothing(monkeypatch):
    """Before the bench was run the page has no table."""
    monkeypatch.setattr(beside, "kept", lambda _: None)
    assert beside.peers() == ""
