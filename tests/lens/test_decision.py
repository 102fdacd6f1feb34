"""A gateway's record of a request, in words."""

from __future__ import annotations

import json

import pytest

from thermocline.errors import UnreachableError
from thermocline.lens import decision

CHOICE = {
    **dict.fromkeys(("queue_seconds", "transfer_seconds", "interference_seconds"), 0.0),
    "instance": 0,
    "seconds": 0.1,
    "recompute_seconds": 0.1,
    "cached_tokens": 32,
    "tier": "DEVICE",
    "reasons": ["LONGEST_MATCH"],
}
TRY = {
    "instance": "a",
    "predicted_seconds": 0.1,
    "cached_tokens": 32,
    "trouble": None,
    "first_byte_seconds": 5.0,
    "choices": [CHOICE, CHOICE | {"instance": 1, "seconds": 0.25}],
}
RECORD = {"request": "r", "status": 200, "seconds": 6.0, "usage": {"cached_tokens": 16}, "tries": [TRY]}


def _shown(**more):
    return decision.render(decision.read(json.dumps(RECORD | more).encode()))


def test_what_came_of_it():
    """How far the prediction was off and the regret are what the gateway says, of streams; nothing is made up here."""
    shown = _shown(error=0.5, regret_seconds=0.15)
    assert "predicted 50 % off" in shown
    assert "regret: 150.0 ms" in shown
    assert "regret: none" in _shown(regret_seconds=0.0)
    assert "regret" not in _shown(), "a whole answer's first byte is no first token"


def test_no_gateway(tmp_path):
    """Where no gateway answers, the hint is how to find the path of one."""
    with pytest.raises(UnreachableError, match="no gateway answers") as caught:
        decision.ask(tmp_path / "gateway-8000.sock", "/trace")
    assert "thermocline ps" in caught.value.hint


def test_no_record():
    """What is no record is said to be none."""
    with pytest.raises(UnreachableError, match="no decision"):
        decision.read(b"[]")
