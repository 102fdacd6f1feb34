"""The planner against measured servers: what it says of a fixed sample of rows, and what aiconfigurator says of them.

The rows are those that aiconfigurator's package ships; `planner_rows.py` says how they are read. Constants and
calibrations come from rows outside of the sample, of other setups, lengths or numbers of users (`planner_fit.py`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import planner_fit
from bench.harness import Progress, Report, check
from bench.planner_rows import ASKED, FILE, SAMPLE, SEED, Row, read, split
from bench.vllm_server import python_of
from thermocline.costs import served
from thermocline.costs.served import Measurements
from thermocline.errors import BenchError

FIRST_ERROR_MAX, BETWEEN_ERROR_MAX = 20.0, 15.0
WITHOUT_ROUNDS, WITHOUT_EVERY = 4, 5
"""For constants without a model's rows: some rounds, on every fifth of the other rows, come close and take minutes."""

Times = tuple[float, float]
"""Seconds to the first token, and between tokens."""


def run(progress: Progress) -> Report:
    """Predict the sample, ask the peer, and compare both with what was measured."""
    python = python_of("PLANNER_PYTHON", ".venv-planner", "bench-planner-env")
    sample, others = split(read(_packages(python)))
    rows = [row for row in sample if row.setup is not None]
    table = served.measurements()
    ours = _predicted(rows, table)
    formulas = _predicted(rows, planner_fit.replace_calibrations(table, {}))
    theirs = _asked_of_peer(python, [row for row in sample[:ASKED] if row.raw["mode"] == "agg"], progress)
    fitted = [row for row in others if row.setup is not None]
    unseen = _unseen(rows, fitted, progress)
    both = [row for row in rows if isinstance(theirs.get(row.raw["id"]), tuple)]
    peer = {row.raw["id"]: answer for row in both if isinstance(answer := theirs[row.raw["id"]], tuple)}
    levels = {"calibrated": ours, "formulas alone": formulas, "formulas that never saw the model": unseen}
    told = {name: _errors(rows, found) for name, found in levels.items()}
    side = {"thermocline": _errors(both, ours), "aiconfigurator": _errors(both, peer)}
    checks = [
        check("TTFT, mean absolute error", told["calibrated"]["first"]["mean"], "%", FIRST_ERROR_MAX, "lower"),
        check("TPOT, mean absolute error", told["calibrated"]["between"]["mean"], "%", BETWEEN_ERROR_MAX, "lower"),
        *(
            check(f"{name}, error over aiconfigurator's, same rows", _over(side, which), "x", 1.0, "lower")
            for name, which in (("TTFT", "first"), ("TPOT", "between"))
        ),
    ]
    details = {
        "rows": {"sample": SAMPLE, "seed": SEED, "predicted": len(rows), "fitted_to": len(fitted)},
        "refused": dict(Counter(row.refused for row in sample if row.refused).most_common()),
        "errors_percent": told,
        "same_rows": {"rows": len(both), **side},
        "peer_refused": dict(Counter(text for text in theirs.values() if isinstance(text, str)).most_common()),
        "errors_by": {name: _by(rows, ours, part) for name, part in PARTS.items()},
        "notes": _notes(told, side, len(sample) - len(rows), len(both)),
    }
    return Report(checks, details)


# -- predictions -------------------------------------------------------------------------------------------------------


def _predicted(rows: Sequence[Row], table: Measurements) -> dict[str, Times]:
    found = {}
    for row in rows:
        assert row.setup is not None
        assert row.load is not None
        told = served.served(row.setup, row.engine, row.load, table)
        found[row.raw["id"]] = (told.first_token.seconds, told.between_tokens.seconds)
    return found


def _unseen(rows: Sequence[Row], others: Sequence[Row], progress: Progress) -> dict[str, Times]:
    """Each model of the sample by constants that were fitted without any of its rows."""
    found: dict[str, Times] = {}
    for model in sorted({_model(row) for row in rows}):
        progress(f"constants without {model}")
        mine = [row for row in rows if _model(row) == model]
        rest = [row for row in others if _model(row) != model][::WITHOUT_EVERY]
        found |= _predicted(mine, planner_fit.constants(rest, progress, WITHOUT_ROUNDS))
    return found


def _asked_of_peer(python: Path, rows: Sequence[Row], progress: Progress) -> dict[str, Times | str]:
    """What aiconfigurator says of each row: times, or why not."""
    program = Path(__file__).with_name("planner_peer.py")
    found: dict[str, Times | str] = {}
    with subprocess.Popen([python, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        for at, row in enumerate(rows):
            progress(f"aiconfigurator, row {at + 1} of {len(rows)}")
            if row.setup is None:
                found[row.raw["id"]] = "not asked: the row cannot be read as a setup"
                continue
            peer.stdin.write(json.dumps(_question(row)) + "\n")
            peer.stdin.flush()
            answer = json.loads(peer.stdout.readline() or "{}")
            if not answer:
                raise BenchError("aiconfigurator ended", hint="run `make bench-planner-env` again")
            found[row.raw["id"]] = answer.get("refused") or (answer["first_seconds"], answer["between_seconds"])
        peer.stdin.close()
    return found


def _question(row: Row) -> dict[str, Any]:
    """A row in the words of its tool."""
    setup, load, raw = row.setup, row.load, row.raw
    assert setup is not None
    assert load is not None
    asked = {
        "model_path": setup.geometry.name,
        "system_name": raw["system"],
        "backend_name": row.engine,
        "isl": load.prompt_tokens,
        "osl": load.output_tokens,
        "batch_size": max(1, load.users // setup.dp),
        "tp_size": setup.tp,
        "attention_dp_size": setup.dp,
    }
    if setup.geometry.parameters_active != setup.geometry.parameters_total:
        ep = min(setup.ep, setup.ranks)
        asked |= {"moe_ep_size": ep, "moe_tp_size": setup.ranks // ep}
    modes = {name: raw[name] for name in ("gemm_quant_mode", "moe_quant_mode") if raw[name]}
    return asked | {"modes": modes}


def _packages(python: Path) -> Path:
    """Where the environment's packages lie."""
    for folder in sorted(python.parent.parent.glob("lib/python3*/site-packages")):
        if (folder / FILE).exists():
            return folder
    raise BenchError(f"{python} has no measured rows of aiconfigurator", hint="run `make bench-planner-env` first")


# -- errors ------------------------------------------------------------------------------------------------------------


def _model(row: Row) -> str:
    return row.place.partition("|")[0]


def _users(row: Row) -> str:
    assert row.load is not None
    return next(f"up to {most} users" for most in (8, 32, 128, 1 << 30) if row.load.users <= most).replace(
        f"up to {1 << 30}", "over 128"
    )


def _memory(row: Row) -> str:
    assert row.load is not None
    return "no room for all" if row.load.running < row.load.users else "room for all"


PARTS: dict[str, Callable[[Row], str]] = {
    "model": _model,
    "accelerator": lambda row: row.place.split("|")[1],
    "engine": lambda row: row.engine,
    "users": _users,
    "memory": _memory,
}


def _errors(rows: Sequence[Row], found: Mapping[str, Times]) -> dict[str, Any]:
    """Mean, median and 90th percentile of |predicted / measured - 1|, in percent."""
    told = {}
    for at, name in enumerate(("first", "between")):
        known = [(row.first_seconds, row.between_seconds)[at] for row in rows]
        off = sorted(100 * abs(found[row.raw["id"]][at] / true - 1) for row, true in zip(rows, known, strict=True)) or [
            0.0
        ]
        told[name] = {"mean": statistics.fmean(off), "median": statistics.median(off), "p90": off[int(0.9 * len(off))]}
    return {"rows": len(rows), **told}


def _by(rows: Sequence[Row], found: Mapping[str, Times], part: Callable[[Row], str]) -> dict[str, Any]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[part(row)].append(row)
    return {name: _errors(mine, found) for name, mine in sorted(groups.items())}


def _over(side: Mapping[str, Any], which: str) -> float:
    ours, theirs = (side[tool][which]["mean"] for tool in ("thermocline", "aiconfigurator"))
    return float(ours / theirs)


def _notes(told: Mapping[str, Any], side: Mapping[str, Any], refused: int, both: int) -> list[str]:
    lines = [
        f"a random {SAMPLE} of all rows (seed {SEED}): {told['calibrated']['rows']} predicted, {refused} refused",
        *(f"{name}: {_said(each)}" for name, each in told.items()),
        f"on the {both} rows of the first {ASKED} that both tools predict:",
        *(f"  {name}: {_said(each)}" for name, each in side.items()),
    ]
    lines.append(
        "aiconfigurator computes from kernels, and fits nothing to these rows; we fit to other rows of the file"
    )
    return lines


def _said(each: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {each[which]['mean']:.1f} % (median {each[which]['median']:.1f} %)"
        for name, which in (("TTFT", "first"), ("TPOT", "between"))
    )
