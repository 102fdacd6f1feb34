"""How everything is measured: arms interleaved and warmed up, medians with intervals, conditions beside the figures."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from thermocline.clock import SystemClock
from thermocline.demo.machine import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CLOCK = SystemClock()
PROGRESS_SECONDS = 2.0
BINOMIAL_MAX = 1000
"""Beyond so many values the binomial is a normal distribution, and 0.5**count no number any more."""
NOT_CODE = ("bench/results", "docs", "README.md", "CHANGELOG.md")
"""A change there does not change what is measured."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One promise: `value` must be at most (`lower`) or at least (`higher`) `target`."""

    name: str
    value: float
    unit: str
    target: float
    better: Literal["lower", "higher"]
    ok: bool


class Report(msgspec.Struct, frozen=True):
    """What a bench hands back. Under `details`, `arms` and `ratios` hold spreads by name; the rest is free."""

    checks: list[Check]
    details: dict[str, Any]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints and `--save` keeps."""

    bench: str
    machine: dict[str, Any]
    date: str
    checks: list[Check]
    details: dict[str, Any]


def check(name: str, value: float, unit: str, target: float, better: Literal["lower", "higher"]) -> Check:
    """A check, judged."""
    ok = value <= target if better == "lower" else value >= target
    return Check(name=name, value=value, unit=unit, target=target, better=better, ok=ok)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Progress:
    """Says on stderr what is under way, no more often than a person can read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._said = CLOCK.now()

    def __call__(self, text: str) -> None:
        """`text` is under way; said only when nothing was said for a while."""
        now = CLOCK.now()
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            print(f"bench {self._name}: {now - self._started:4.0f} s  {text}", file=sys.stderr, flush=True)


def timed(arm: Callable[[], object], clock: Callable[[], float] = CLOCK.now) -> float:
    """Seconds that one call takes."""
    started = clock()
    arm()
    return clock() - started


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Seconds of each arm in each round. Arms take turns within a round, and the first place moves on every round.

    What disturbs the machine for a while then disturbs all arms, and a ratio of one round stays fair.
    """
    for arm in list(arms.values()) * warmup:
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for at in range(rounds):
        if progress is not None:
            progress(f"round {at + 1} of {rounds}")
        turn = at % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(arms[name]))
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quotients of the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with its 95 % interval from order statistics, which assumes nothing about how values scatter."""
    ordered = sorted(values)
    cut = _cut(len(ordered))
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    return {"median": statistics.median(ordered), "low": low, "high": high, "rounds": len(ordered)}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _cut(count: int) -> int:
    """How many values to drop at each end so that the median lies between the rest with 95 % probability."""
    if count > BINOMIAL_MAX:
        return int(count / 2 - 0.98 * math.sqrt(count))
    below, term = 0.0, 0.5**count
    for at in range(count // 2):
        below += term
        if below > 0.025:
            return at
        term *= (count - at) / (at + 1)
    return 0


# -- a run -------------------------------------------------------------------------------------------------------------


def measure(name: str, run: Callable[[Progress], Report]) -> Result:
    """Run a bench and write down the conditions it ran under."""
    conditions = {**machine(), "commit": _commit()}
    started = CLOCK.now()
    report = run(Progress(name))
    conditions["load_average_after"] = os.getloadavg()[0]
    details = {**report.details, "bench_seconds": CLOCK.now() - started}
    today = datetime.now(UTC).date().isoformat()
    return Result(bench=name, machine=conditions, date=today, checks=report.checks, details=details)


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM ends a bench as Ctrl-C does: with the servers that it has started."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def holds(result: Result) -> bool:
    """True where every check does."""
    return all(each.ok for each in result.checks)


def _commit() -> str:
    """The commit that was measured, with a + where the code had changed since; empty outside a git checkout."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in NOT_CODE))
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)  # noqa: S607  # git from PATH
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


# -- results -----------------------------------------------------------------------------------------------------------


def to_json(result: Result) -> str:
    """One JSON object, indented, as it is kept under bench/results."""
    return msgspec.json.format(msgspec.json.encode(rounded(msgspec.to_builtins(result))), indent=2).decode()


def rounded(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    """The same JSON value with floats cut to five digits: more would be noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def save(result: Result, folder: Path = RESULTS) -> Path:
    """Keep a result, in place of the last one of this bench."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.bench}.json"
    path.write_text(to_json(result) + "\n")
    return path


def saved(name: str, folder: Path = RESULTS) -> Result | None:
    """The kept result of a bench, or None."""
    path = folder / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=Result) if path.exists() else None


def kept(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A kept result as plain JSON, also one that no bench made; None where there is none."""
    path = folder / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else None


def to_text(result: Result) -> str:
    """A result for a person: checks, then arms, then conditions."""
    lines = [f"{'check':44} {'value':>14} {'target':>14}"]
    lines += [_check_line(each) for each in result.checks]
    for title, unit in (("ratios", "x"), ("arms", "s")):
        rows = result.details.get(title, {})
        if rows:
            lines += ["", f"{title + ', median':44} {'':>14} {'95 % interval':>22}"]
            lines += [_spread_line(name, row, unit) for name, row in rows.items()]
    lines += [f"{note}" for note in itertools.chain([""], result.details.get("notes", []))]
    return "\n".join([*lines, conditions(result), *(f"fell short: {c.name}" for c in result.checks if not c.ok)])


def conditions(result: Result) -> str:
    """Where and when, on one line."""
    at = result.machine
    load = f"load {at['load_average_before']:.1f} to {at['load_average_after']:.1f}"
    commit = f", commit {at['commit']}" if at["commit"] else ""
    return f"{at['cpu']}, {at['cores']} cores, Python {at['python']}, {load}, {result.date}{commit}"


def quantity(value: float, unit: str) -> str:
    """A value with a unit that suits its size."""
    if unit != "s":
        return f"{value:.0f} {unit}" if unit.startswith("of ") else f"{value:.2f} {unit}"
    for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value / 1e-9:.3g} ns"


def _check_line(each: Check) -> str:
    sign = "<=" if each.better == "lower" else ">="
    mark = "ok" if each.ok else "SHORT"
    target = f"{sign} {quantity(each.target, each.unit)}"
    return f"{each.name:44} {quantity(each.value, each.unit):>14} {target:>14}  {mark}"


def _spread_line(name: str, row: Mapping[str, float], unit: str) -> str:
    interval = f"{quantity(row['low'], unit)} .. {quantity(row['high'], unit)}"
    return f"{name:44} {quantity(row['median'], unit):>14} {interval:>22}  ({row['rounds']:.0f} rounds)"
