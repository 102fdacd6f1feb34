"""Verbs that show on this machine what is claimed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import thermocline
from thermocline.cli.app import app, json_flag
from thermocline.errors import BenchError

_ENGINE_READY = (
    "Wait for this file before the chapters with a model: it appears when torch is installed. FILE.failed appears "
    "instead when that went wrong, and names the log."
)


@app.command()
@json_flag
@click.option("--engine-ready", metavar="FILE", help=_ENGINE_READY)
def demo(as_json: bool, engine_ready: str | None) -> int:
    """Show all of it on this machine: damage refused, a crash recovered, answers identical and sooner."""
    from thermocline.demo.story import play

    return play(json_output=as_json, engine_ready=Path(engine_ready) if engine_ready else None)


@app.command()
@click.argument("name")
@click.option("--save", is_flag=True, help="Keep the result under bench/results/, where the tables come from.")
@json_flag
def bench(name: str, save: bool, as_json: bool) -> int:
    """Measure one budget against its raw limit in the same run. `bench list` names them with their cost."""
    checkout = Path(thermocline.__file__).resolve().parents[2]
    if not (checkout / "bench" / "__init__.py").is_file():
        raise BenchError(
            "the benches are part of the source checkout, not of the installed package",
            hint="clone the repository and run `make bench` there",
        )
    import importlib

    sys.path.insert(0, str(checkout))
    status: int = importlib.import_module("bench").main(name, json_output=as_json, save=save)
    return status
