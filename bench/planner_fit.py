"""Fits what `costs/data/efficiency.json` holds to the measured rows outside of the planner's sample.

`python -m bench.planner_fit FOLDER` with the site-packages of the environment that `make bench-planner-env` makes; it
takes some minutes. First the constants of the formulas, together, by damped least squares of the logarithms with
outliers weighted down (Levenberg and Marquardt; Huber's weights): the formulas are those of `costs/served.py`, called,
not copied. Then one ridge regression per model and machine, of what is left.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.harness import rounded
from bench.planner_rows import Row, read, split
from thermocline.costs import served
from thermocline.costs.served import Calibration, Door, Machine, Measurements

SOURCE = "aiconfigurator_core 0.12.0, silicon_sample.csv, rows outside of the sample of `bench planner`"
MACHINE = {"mfu": (0.5, 0.3), "mbu": (0.75, 0.2), "layer_seconds": (6e-5, 0.5), "first_seconds": (0.03, 0.7)}
DOOR = {"share": (0.5, 0.5), "steps": (4.0, 2.0), "burst": (0.1, 2.0), "host_seconds": (3e-4, 2.0)}
ALL = {"attention_mfu": (0.4, 0.3), "link": (0.5, 0.3), "hop_seconds": (1e-5, 0.5), "pass_seconds": (1e-3, 1.0)}
"""What is fitted, with where it starts and how far its logarithm is believed to be from there."""

SHARES, SHARE_MAX = {"mfu", "mbu", "attention_mfu", "link"}, 0.95
ROUNDS, STEP = 12, 1e-3
NOISE, OUTLIER, FIRST_WEIGHT = 0.1, 0.1, 0.7
RIDGE, RIDGE_ROUNDS, RIDGE_OUTLIER = 1.0, 8, 0.05

Floats = NDArray[np.float64]


class _Vector:
    """The constants as one vector of logarithms; `blocks` are those that can be changed together, as no row has two."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.machines = sorted({row.place.partition("|")[2] for row in rows})
        self.doors = sorted({row.engine for row in rows})
        groups = [(MACHINE, len(self.machines)), (DOOR, len(self.doors)), (ALL, 1)]
        given = [value for table, count in groups for value in table.values() for _ in range(count)]
        self.start = np.log([start for start, _ in given])
        self.spread = np.array([spread for _, spread in given])
        shares = [name in SHARES for table, count in groups for name in table for _ in range(count)]
        self.most = np.where(shares, math.log(SHARE_MAX), np.inf)
        self.blocks: list[slice] = []
        at = 0
        for table, count in groups:
            for _ in table:
                self.blocks.append(slice(at, at + count))
                at += count
        self._machine = [self.machines.index(row.place.partition("|")[2]) for row in rows]
        self._door = [self.doors.index(row.engine) for row in rows]

    def column(self, block: slice, row: int) -> int:
        """Which constant of a block a row depends on."""
        count = block.stop - block.start
        if count == 1:
            return block.start
        return block.start + (self._machine[row] if count == len(self.machines) else self._door[row])

    def table(self, vector: Floats, rows: Sequence[Row]) -> Measurements:
        """The constants as the planner takes them."""
        values = np.exp(vector)
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            counts[row.place.partition("|")[2]] += 1
        parts = [values[block].tolist() for block in self.blocks]
        machines = {
            name: Machine(*(part[at] for part in parts[: len(MACHINE)]), rows=counts[name])
            for at, name in enumerate(self.machines)
        }
        mine = parts[len(MACHINE) : len(MACHINE) + len(DOOR)]
        doors = {name: Door(*(part[at] for part in mine)) for at, name in enumerate(self.doors)}
        return Measurements(SOURCE, *(part[0] for part in parts[len(MACHINE) + len(DOOR) :]), machines, doors, {})


def predicted(rows: Sequence[Row], table: Measurements) -> Floats:
    """Logarithms of both times of every row."""
    out = np.empty((len(rows), 2))
    for at, row in enumerate(rows):
        assert row.setup is not None
        assert row.load is not None
        found = served.served(row.setup, row.engine, row.load, table)
        out[at] = math.log(found.first_token.seconds), math.log(found.between_tokens.seconds)
    return out


def measured(rows: Sequence[Row]) -> Floats:
    """The same as they were measured."""
    return np.log([(row.first_seconds, row.between_seconds) for row in rows])


def constants(rows: Sequence[Row], say: Callable[[str], object] = print, rounds: int = ROUNDS) -> Measurements:
    """The constants of the formulas. No share of a peak is let come out above `SHARE_MAX`."""
    vector = _Vector(rows)
    known, believed = measured(rows), 1 / vector.spread
    x, damping = vector.start.copy(), 1e-2
    found = predicted(rows, vector.table(x, rows))
    cost = _cost(found - known, (x - vector.start) * believed)
    for turn in range(rounds):
        products, right = _normal(vector, x, rows, found, known, believed)
        step = np.linalg.solve(products + damping * np.diag(np.diag(products)), -right)
        tried = np.minimum(x + np.clip(step, -0.7, 0.7), vector.most)
        new = predicted(rows, vector.table(tried, rows))
        new_cost = _cost(new - known, (tried - vector.start) * believed)
        say(f"round {turn + 1}: {cost:.1f} -> {new_cost:.1f}")
        if new_cost < cost:
            done = cost - new_cost < 1e-3 * cost
            x, found, cost, damping = tried, new, new_cost, damping / 5
            if done:
                break
        else:
            damping *= 10
    return vector.table(x, rows)


def _weights(off: Floats) -> Floats:
    return np.minimum(1.0, OUTLIER / np.maximum(np.abs(off), 1e-12)) * np.array([FIRST_WEIGHT**2, 1.0]) / NOISE**2


def _cost(off: Floats, moved: Floats) -> float:
    size = np.abs(off)
    huber = np.where(size <= OUTLIER, size**2, 2 * OUTLIER * size - OUTLIER**2) * np.array([FIRST_WEIGHT**2, 1.0])
    huber /= NOISE**2
    return float(huber.sum() + (moved**2).sum())


def _normal(
    vector: _Vector, x: Floats, rows: Sequence[Row], found: Floats, known: Floats, believed: Floats
) -> tuple[Floats, Floats]:
    """The normal equations, one difference quotient per block."""
    off = found - known
    jacobian = np.zeros((len(rows), 2, len(x)))
    for block in vector.blocks:
        moved = x.copy()
        moved[block] += STEP
        slope = (predicted(rows, vector.table(moved, rows)) - found) / STEP
        for at in range(len(rows)):
            jacobian[at, :, vector.column(block, at)] = slope[at]
    flat, weights = jacobian.reshape(-1, len(x)), _weights(off).ravel()
    products = (flat * weights[:, None]).T @ flat + np.diag(believed**2)
    return products, (flat * weights[:, None]).T @ off.ravel() + (x - vector.start) * believed**2


def calibrations(rows: Sequence[Row], table: Measurements) -> dict[str, Calibration]:
    """What is left, per model and machine."""
    left = measured(rows) - predicted(rows, replace_calibrations(table, {}))
    places: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        places[row.place].append(at)
    out = {}
    for place, mine in sorted(places.items()):
        terms = np.array([_terms(rows[at]) for at in mine])
        first, between = (_ridge(terms, left[mine, each]) for each in (0, 1))
        low, high = terms.min(axis=0), terms.max(axis=0)
        out[place] = Calibration(len(mine), *(tuple(each.tolist()) for each in (low, high, first, between)))
    return out


def _terms(row: Row) -> tuple[float, ...]:
    assert row.setup is not None
    assert row.load is not None
    return served.terms(row.setup, row.load)


def replace_calibrations(table: Measurements, found: dict[str, Calibration]) -> Measurements:
    """The same table with other calibrations."""
    return msgspec.structs.replace(table, calibrations=found)


def _ridge(terms: Floats, left: Floats) -> Floats:
    """Least squares with outliers weighted down; a term counts only as far as rows speak for it."""
    weights, penalty = np.ones(len(left)), RIDGE * np.eye(terms.shape[1])
    penalty[0, 0] *= 0.3
    solved = np.zeros(terms.shape[1])
    for _ in range(RIDGE_ROUNDS):
        weighted = terms * weights[:, None]
        solved = np.linalg.solve(weighted.T @ terms + penalty, weighted.T @ left)
        weights = np.clip(RIDGE_OUTLIER / np.maximum(np.abs(left - terms @ solved), 1e-12), 0.02, 1)
    return solved


def main(folder: Path) -> None:
    """Write the table that is shipped."""
    _, others = split(read(folder))
    rows = [row for row in others if row.setup is not None]
    table = constants(rows)
    table = replace_calibrations(table, calibrations(rows, table))
    table = msgspec.structs.replace(table, same_as={"deepseek-ai/DeepSeek-V3": "deepseek-ai/DeepSeek-R1"})
    served.TABLE.write_text(json.dumps(rounded(msgspec.to_builtins(table)), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
