"""What a profile writes: read back as it was, bounded, and predicting what was measured."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs import measured
from thermocline.costs.measured import Conditions, Measured, Memory, Row
from thermocline.costs.model import LearnedCosts
from thermocline.errors import SettingsError

CONDITIONS = Conditions(
    date="2026-05-01T12:00:00+00:00", url="http://127.0.0.1:8000", model="m", engine="vLLM 0.32", machine="a laptop",
    context_tokens=8192, block_tokens=128,
)  # fmt: skip
LENGTHS, SHARES = (512, 1024, 2048, 4096), (0.0, 0.5, 0.9)
REQUEST, TOKEN, ATTENDED, LOAD = 12e-3, 4e-4, 3e-8, 2e-5
DECODE = (8e-3, 2e-7)


def truth(tokens: int, cached: int) -> float:
    """An engine that takes what the formula says."""
    return REQUEST + TOKEN * tokens + ATTENDED * tokens * (cached + tokens / 2) + LOAD * cached


def row(length: int, share: float, *, told: bool = True, concurrency: int = 1) -> Row:
    """What such an engine would show in a sweep."""
    shared = int(length * share)
    cached = min(shared, length - 1) // 128 * 128
    seconds = truth(length - cached, cached)
    return Row(
        prompt_tokens=length, shared_tokens=shared, cached_tokens=cached if told else None,
        source="host" if told and cached else "", concurrency=concurrency, requests=3, first_token_seconds=seconds,
        low_seconds=seconds, high_seconds=seconds, between_tokens_seconds=DECODE[0] + DECODE[1] * length,
    )  # fmt: skip


def sweep(**changes) -> Measured:
    rows = tuple(row(length, share) for length in LENGTHS for share in SHARES)
    memory = (Memory(context_tokens=512, blocks=4, share=0.1),)
    return Measured(**{"version": measured.VERSION, "conditions": CONDITIONS, "rows": rows, "memory": memory} | changes)


def test_read_what_was_written(tmp_path):
    """A profile is read back as it was written, from a file that only its owner may read."""
    path = tmp_path / "profile.json"
    measured.write(path, sweep())
    assert measured.read(path) == sweep()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [path]


@given(length=st.integers(512, 8192), share=st.floats(0, 0.9))
def test_unseen_lengths(length, share):
    """Of lengths and shares that were not measured, the first token is predicted from what was, within 2 %."""
    shared = int(length * share)
    cached = min(shared, length - 1) // 128 * 128
    assert sweep().first_token_seconds(length, shared) == pytest.approx(truth(length - cached, cached), rel=0.02)


def test_parts():
    """Loading, computing and decoding are told apart, and what was not measured is None and no guess."""
    found = sweep()
    assert found.sources == ("host",)
    assert found.load_seconds(1000, "host") == pytest.approx(1000 * LOAD, rel=0.1)
    assert found.load_seconds(1000, "disk") is None
    assert found.prefill_seconds(1024, 1024) == pytest.approx(truth(1024, 1024) - 1024 * LOAD, rel=0.02)
    assert found.prefill_seconds(0, 1024) == 0.0
    assert found.decode_seconds(3000) == pytest.approx(DECODE[0] + DECODE[1] * 3000, rel=0.01)
    assert found.decode_seconds(3000, 64) is None
    assert found.tokens_max == 4096
    assert [*found.weights()] == ["request", "token", "attended_token", "load_host_token"]


@pytest.mark.parametrize(
    ("name", "same"), [("m", True), ("org/M", True), ("/models/m/", True), ("m2", False), ("org/other", False)]
)
def test_another_model(name, same):
    """Whose seconds these are is always said; that they are of another model, by its name, is said as well."""
    note = sweep().note(name)
    assert "measured of m on a laptop" in note
    assert ("not " + name in note) is not same


def test_what_the_engine_does_not_tell():
    """Where an engine does not say what it had cached, only prompts that share nothing say what computing takes."""
    rows = tuple(row(length, share, told=False) for length in LENGTHS for share in SHARES)
    found = sweep(rows=rows)
    assert found.sources == ()
    assert found.prefill_seconds(3000) == pytest.approx(truth(3000, 0), rel=0.02)


def test_seed():
    """Learned costs that begin with a profile predict what it measured, of any model, and go on learning."""
    costs = LearnedCosts(measured=sweep().prefills())
    assert costs.computes("m")
    for length in LENGTHS:
        assert costs.recompute(length, 0, "m") == pytest.approx(truth(length, 0), rel=0.05)
    for length in LENGTHS * 20:
        costs.recomputed(length, 0, 2 * truth(length, 0), "m")
    assert costs.recompute(3000, 0, "m") > 1.3 * truth(3000, 0)


def _changed(change) -> bytes:
    told = json.loads(measured.msgspec.json.encode(sweep()))
    change(told)
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"x":' + b"[" * 100_000,
        b" " * (measured.FILE_BYTES_MAX + 1),
        _changed(lambda told: told.update(version=measured.VERSION + 1)),
        _changed(lambda told: told.update(rows=[])),
        _changed(lambda told: told.update(rows=told["rows"][:1] * (measured.ROWS_MAX + 1))),
        _changed(lambda told: told["rows"][0].update(first_token_seconds=-1)),
        _changed(lambda told: told["rows"][0].update(first_token_seconds=float("inf"))),
        _changed(lambda told: told["rows"][0].update(prompt_tokens=1 << 40)),
        _changed(lambda told: told["memory"][0].update(share=2)),
        _changed(lambda told: told["conditions"].update(model="m" * 1000)),
        _changed(lambda told: [each.update(concurrency=4) for each in told["rows"]]),
    ],
)
def test_refused(tmp_path, body):
    """A file that no profile wrote, is damaged, or says what cannot be, is refused with a hint."""
    path = tmp_path / "profile.json"
    path.write_bytes(body)
    with pytest.raises(SettingsError) as caught:
        measured.read(path)
    assert "profile" in caught.value.hint


def test_no_file(tmp_path):
    """A file that is not there, or a folder that cannot be written to, is an error with a hint."""
    with pytest.raises(SettingsError, match="No such file"):
        measured.read(tmp_path / "none")
    with pytest.raises(SettingsError, match="No such file"):
        measured.write(tmp_path / "none" / "profile.json", sweep())
