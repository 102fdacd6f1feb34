"""What users of a loaded server see: the time to a first token, and between tokens, of N requests at a time.

With d a decode step of those that run, p the prefill of one prompt, n requests that run and N that are there:

    between tokens = d + share * n * p / output tokens                  every step carries its part of the prefills
    first token    = first + p + steps * d                              the server's own, the prefill, steps under way
                     + burst * (n - 1) / 2 * p                          prefills of those that came together
                     + host * N                                         per request at the door
                     + (N - n) / n * (first token + output * between)   those that find no memory wait for others' ends

The traffic is closed (a fixed number of users, each asks again when it has its answer, as load tests do). For open
traffic take `queueing.waiting_seconds`. d and p are `roofline.pass_seconds` with the machine's measured shares; the
other constants are the engine's, measured too. A `Calibration` corrects what is left, where the same model was measured
on the same machine with the same engine. All of it is in `data/efficiency.json`, which `bench/planner_fit.py` writes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from thermocline.costs.roofline import Efficiency, Estimate, Part, Setup, Work, efficiency_of, pass_seconds
from thermocline.errors import SettingsError

BEYOND = "beyond"
TABLE = Path(__file__).with_name("data") / "efficiency.json"


class Machine(msgspec.Struct, frozen=True):
    """What was measured of one engine on one accelerator with one dtype of weights."""

    mfu: float
    mbu: float
    layer_seconds: float
    first_seconds: float
    rows: int


class Door(msgspec.Struct, frozen=True):
    """What was measured of one engine wherever it runs: see the formulas above."""

    share: float
    steps: float
    burst: float
    host_seconds: float


class Calibration(msgspec.Struct, frozen=True):
    """Corrections of one model on one machine: the logarithm of measured / formula is linear in `terms`.

    It holds from `low` to `high`, the range of the measured rows; beyond, it stays as it is at the border.
    """

    rows: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    first: tuple[float, ...]
    between: tuple[float, ...]


class Measurements(msgspec.Struct, frozen=True):
    """The table: machines as `accelerator|engine|dtype`, calibrations as `model|accelerator|engine|dtype`."""

    source: str
    attention_mfu: float
    link: float
    hop_seconds: float
    pass_seconds: float
    machines: dict[str, Machine]
    doors: dict[str, Door]
    calibrations: dict[str, Calibration]
    same_as: dict[str, str] = {}
    """Models of one geometry under several names."""


@dataclass(frozen=True, slots=True)
class Load:
    """Closed traffic: `users` requests at a time on one replica, all of like lengths.

    `room` is how many sequences of such length its memory holds; None: enough for all.
    """

    users: int
    prompt_tokens: int
    output_tokens: int
    room: float | None = None

    @property
    def running(self) -> float:
        """How many of them run at once."""
        return self.users if self.room is None else min(self.users, max(1.0, self.room))


@dataclass(frozen=True, slots=True)
class Served:
    """Typical seconds to a first token and between tokens, and how far the figures were measured.

    `known` is "model" where this model was measured on this machine and engine, "machine" where others were,
    "formulas" where neither was.
    """

    first_token: Estimate
    between_tokens: Estimate
    known: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """One instance under `users` requests at a time, of which `running` run; typical seconds, answers' tokens a second.

    `known` is as in `Served`, or BEYOND for prompts longer than any that was measured. `parts` say what a first token's
    time is made of.
    """

    users: int
    running: float
    prompt_tokens: int
    output_tokens: int
    first_token_seconds: float
    between_tokens_seconds: float
    tokens_per_second: float
    known: str
    parts: dict[str, float]


@functools.cache
def measurements() -> Measurements:
    """The table that is shipped."""
    return msgspec.json.decode(TABLE.read_bytes(), type=Measurements)


def served(setup: Setup, engine: str, load: Load, table: Measurements | None = None) -> Served:
    """What users see. `table` None: the one that is shipped; `setup.efficiency` counts over its."""
    table = table or measurements()
    machine, known = _machine(table, setup, engine)
    door = table.doors.get(engine) or next(iter(table.doors.values()))
    if setup.efficiency is None:
        running = efficiency(table, machine)
        if not machine.rows:
            running = replace(running, source=efficiency_of(setup.accelerator).source)
        setup = replace(setup, efficiency=running)
    first, between = _formulas(setup, machine, door, load)
    name = table.same_as.get(setup.geometry.name, setup.geometry.name)
    found = table.calibrations.get(f"{name}|{setup.accelerator.name}|{engine}|{setup.weights_dtype}")
    if found is not None:
        known, at = "model", terms(setup, load)
        first = _corrected(first, corrected(found, found.first, at), found.rows)
        between = _corrected(between, corrected(found, found.between, at), found.rows)
    return Served(first, between, known)


@functools.cache
def prompt_tokens_max() -> int:
    """The longest prompt of the measured rows."""
    return round(2048 * math.exp(max(each.high[2] for each in measurements().calibrations.values())))


def loaded(setup: Setup, engine: str, load: Load) -> Loaded:
    """What users of one instance see, by the table that is shipped. Raises SettingsError for an unknown engine."""
    if engine not in (known := measurements().doors):
        raise SettingsError(f"no engine {engine} was measured", hint=f"one of {', '.join(sorted(known))}")
    found = served(setup, engine, load)
    first, between = found.first_token.seconds, found.between_tokens.seconds
    return Loaded(
        users=load.users,
        running=load.running,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        first_token_seconds=first,
        between_tokens_seconds=between,
        tokens_per_second=load.users * load.output_tokens / (first + load.output_tokens * between),
        known=found.known if load.prompt_tokens <= prompt_tokens_max() else BEYOND,
        parts={part.name: part.seconds for part in found.first_token.parts},
    )


def efficiency(table: Measurements, machine: Machine) -> Efficiency:
    """A machine's shares, with those that were measured over all of them."""
    return Efficiency(
        mfu=machine.mfu,
        attention_mfu=table.attention_mfu,
        mbu=machine.mbu,
        link=table.link,
        hop_seconds=table.hop_seconds,
        layer_seconds=machine.layer_seconds,
        pass_seconds=table.pass_seconds,
        source=f"fitted to {machine.rows} measured rows ({table.source})",
    )


def terms(setup: Setup, load: Load) -> tuple[float, ...]:
    """What a calibration is linear in."""
    users, prompt = math.log(load.users / 32), math.log(load.prompt_tokens / 2048)
    output, ranks = math.log(load.output_tokens / 1024), math.log(setup.tp / 4)
    split = (float(setup.dp > 1), float(setup.ep > 1))
    products = (users * prompt, users * output, users * ranks, prompt * ranks)
    return (1.0, users, prompt, output, ranks, *split, users * users, *products)


def corrected(found: Calibration, weights: Sequence[float], at: Sequence[float]) -> float:
    """The factor of a calibration, with each term held within what was measured."""
    held = (min(max(x, low), high) for x, low, high in zip(at, found.low, found.high, strict=True))
    return math.exp(math.fsum(weight * x for weight, x in zip(weights, held, strict=True)))


def _corrected(estimate: Estimate, factor: float, rows: int) -> Estimate:
    seconds = estimate.seconds * factor
    part = Part("measured rows", seconds - estimate.seconds, f"x {factor:.3f}, from {rows} rows of this model here")
    return Estimate(seconds, (*estimate.parts, part), estimate.assumptions)


def _machine(table: Measurements, setup: Setup, engine: str) -> tuple[Machine, str]:
    """The nearest of what was measured: the same dtype, else the same engine, else the same accelerator, else seeds."""
    name = setup.accelerator.name
    for front in (f"{name}|{engine}|{setup.weights_dtype}", f"{name}|{engine}|", f"{name}|"):
        found = [each for key, each in table.machines.items() if key.startswith(front)]
        if found:
            return max(found, key=lambda each: each.rows), "machine"
    seeds = efficiency_of(setup.accelerator)
    nearest = max(table.machines.values(), key=lambda each: each.rows)
    return Machine(seeds.mfu, seeds.mbu, nearest.layer_seconds, nearest.first_seconds, 0), "formulas"


def _formulas(setup: Setup, machine: Machine, door: Door, load: Load) -> tuple[Estimate, Estimate]:
    context, running = load.prompt_tokens + load.output_tokens // 2, load.running
    step = pass_seconds(setup, Work(max(1, round(running)), 1, context))
    prefill = pass_seconds(setup, Work(1, load.prompt_tokens, 0))
    others = door.share * running * prefill.seconds / load.output_tokens
    between = step.seconds + others
    shown = [
        Part("the server's own", machine.first_seconds, "measured"),
        Part("prefill", prefill.seconds, f"{load.prompt_tokens} tokens"),
        Part("steps under way", door.steps * step.seconds, f"{door.steps:.3g} x {step.seconds:.4g} s"),
        Part(
            "prefills of others", door.burst * (running - 1) / 2 * prefill.seconds, f"{door.burst:.3g} of half of them"
        ),
        Part("at the door", door.host_seconds * load.users, f"{load.users} x {door.host_seconds:.3g} s"),
    ]
    alone = math.fsum(part.seconds for part in shown)
    over = (load.users - running) / running
    if over > 0:
        ends = over * (alone + load.output_tokens * between)
        shown.append(Part("waiting for memory", ends, f"{load.users} users, room for {running:.0f}"))
    said = (*step.assumptions, "closed traffic: each user asks again when it has its answer")
    spread = Part(
        "prefills of others", others, f"{door.share:.3g} x {running:.0f} prefills per {load.output_tokens} steps"
    )
    return (
        Estimate(math.fsum(part.seconds for part in shown), tuple(shown), said),
        Estimate(between, (*step.parts, spread), said),
    )
