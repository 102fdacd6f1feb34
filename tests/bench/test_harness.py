from __future__ import annotations

import contextlib
import json
import math
import signal

import numpy as np
import pytest

import bench
from bench import harness
from thermocline.demo.machine import machine
from thermocline.errors import BenchError


def _result(**changes):
    checks = [
        harness.check("ours / raw", 1.25, "x", 1.3, "lower"),
        harness.check("speed", 0.5, "x", 0.85, "higher"),
    ]
    fields = {
        "bench": "example",
        "machine": {**machine(), "commit": "abc", "load_average_after": 0.5},
        "date": "2026-01-02",
        "checks": checks,
        "details": {},
    }
    return harness.Result(**(fields | changes))


@pytest.mark.parametrize(
    ("value", "target", "better", "ok"),
    [
        (1.3, 1.3, "lower", True),
        (1.31, 1.3, "lower", False),
        (0.85, 0.85, "higher", True),
        (0.8, 0.85, "higher", False),
    ],
)
def test_check_is_judged(value, target, better, ok):
    """A check holds at its target and on its better side, and nowhere else."""
    assert harness.check("name", value, "x", target, better).ok is ok


def test_arms_take_turns():
    """Within a round every arm runs once, after its warm-up, and the first place moves on from round to round."""
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = harness.interleaved(arms, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_spread_holds_the_median():
    """The interval of a spread holds the true median in about 95 of 100 samples, whatever the distribution."""
    source = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        row = harness.spread(source.exponential(size=31).tolist())
        assert row["low"] <= row["median"] <= row["high"]
        hits += row["low"] <= math.log(2) <= row["high"]
    assert 0.93 <= hits / 400 <= 1.0


def test_spread_of_few_values_is_their_range():
    """With too few rounds for an interval, all of the range is given."""
    assert harness.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}


@pytest.mark.parametrize("count", [1000, 1001, 3000])
def test_spread_of_many_values_is_narrow(count):
    """However many the rounds, the interval holds about two roots of their number in the middle."""
    row = harness.spread([float(at) for at in range(count)])
    assert (row["high"] - row["low"]) / math.sqrt(count) == pytest.approx(1.96, rel=0.05)


def test_result_survives_saving(tmp_path):
    """A kept result reads back as it was printed, to five digits."""
    result = _result()
    path = harness.save(result, tmp_path)
    again = harness.saved("example", tmp_path)
    assert json.loads(path.read_text()) == json.loads(harness.to_json(result))
    assert again.checks == result.checks
    assert harness.saved("unknown", tmp_path) is None


def test_json_has_the_agreed_shape():
    """One object with bench, machine, date, checks and details; every check has its six fields."""
    shown = json.loads(harness.to_json(_result()))
    assert shown.keys() == {"bench", "machine", "date", "checks", "details"}
    assert all(each.keys() == {"name", "value", "unit", "target", "better", "ok"} for each in shown["checks"])
    assert {"cpu", "cores", "python", "load_average_before", "versions", "commit"} <= shown["machine"].keys()


def test_text_names_what_fell_short():
    """A person sees which check fell short, and under which conditions."""
    text = harness.to_text(_result())
    assert "fell short: speed" in text
    assert "fell short: ours / raw" not in text
    assert "2026-01-02" in text


def test_list_names_every_bench(capsys):
    """`bench list --json` names each bench with its cost in seconds, and each has a module."""
    assert bench.main("list", json_output=True, save=False) == 0
    rows = json.loads(capsys.readouterr().out)["benches"]
    assert [row["name"] for row in rows] == list(bench.BENCHES)
    for row in rows:
        assert row["cost_seconds"] > 0
        assert (harness.ROOT / "bench" / f"{bench.BENCHES[row['name']].module}.py").is_file()


def test_unknown_bench_has_a_hint():
    """A mistyped name is refused with the nearest one."""
    with pytest.raises(BenchError) as raised:
        bench.main("key", json_output=False, save=False)
    assert "bench keys" in raised.value.hint


def test_failed_check_is_exit_code_1(monkeypatch, capsys):
    """A bench that falls short exits with 1, one that holds with 0, and both print the same object."""
    for target, status in ((0.9, 1), (0.1, 0)):
        checks = [harness.check("speed", 0.5, "x", target, "higher")]
        monkeypatch.setattr("bench.keys.run", lambda progress, checks=checks: harness.Report(checks, {}))
        assert bench.main("keys", json_output=True, save=False) == status
        assert json.loads(capsys.readouterr().out)["checks"][0]["ok"] is (status == 0)


def test_sigterm_ends_what_was_started():
    """A bench that is told to end unwinds, so that its servers end too; afterwards SIGTERM means what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    with contextlib.ExitStack() as stack:
        raised = stack.enter_context(pytest.raises(SystemExit))
        stack.enter_context(harness.ended_in_order())
        stack.callback(ended.append, "a server")
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 128 + signal.SIGTERM
    assert ended == ["a server"]
    assert signal.getsignal(signal.SIGTERM) is before
