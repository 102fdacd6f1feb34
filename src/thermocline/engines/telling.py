"""What `up` says: events as lines of JSON, or as text; and on a terminal what each process is doing now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from thermocline.engines.child import Child, State

if TYPE_CHECKING:
    from rich.live import Live

WAIT_LINE_SECONDS = 10.0
LINE_WIDTH = 110


class Address(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one process is."""

    name: str
    pid: int
    log: str
    url: str = ""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of `up --json`. `event` "up" has all addresses; the others are about the process `name`.

    starting, ready (`seconds` after its start), died (`detail` says how, it starts again in `seconds`), gave_up;
    up: all are ready; stopped: `seconds` after it was asked to, in the end "all of it".
    """

    event: str
    name: str = ""
    seconds: float = 0.0
    detail: str = ""
    log: str = ""
    pid: int = 0
    model: str = ""
    socket: str = ""
    node: Address | None = None
    engines: tuple[Address, ...] = ()
    gateway: Address | None = None


class Telling:
    """Results go to stdout, all else to stderr; as JSON, every event goes to stdout as a line."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Live | None = None
        self._told_seconds = 0.0

    def event(self, event: Event) -> None:
        """Something happened."""
        if self._as_json:
            click.echo(msgspec.json.encode(event).decode())
        elif event.event == "up":
            click.echo(_addresses(event))
        else:
            self._say(_sentence(event))

    def waiting(self, children: Sequence[Child]) -> None:
        """These are not all ready yet. On a terminal a line for each; elsewhere one line every ten seconds."""
        if self._as_json:
            return
        if sys.stderr.isatty():
            self._draw(children)
            return
        for child in children:
            if child.state is State.STARTING and child.seconds - self._told_seconds >= WAIT_LINE_SECONDS:
                self._told_seconds = child.seconds
                said = child.last_line()[:LINE_WIDTH]
                self._say(f"waiting for {child.launch.name} ({child.seconds:.0f} s){': ' if said else ''}{said}")

    def waited(self) -> None:
        """The wait is over: clear what was drawn."""
        self._told_seconds = 0.0
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=True)

    def _draw(self, children: Sequence[Child]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for child in children:
            mark = Text("ready", "green") if child.state is State.READY else Text("...", "yellow")
            seconds = "" if child.state is State.READY else f"{child.seconds:.0f} s"
            said = Text(child.last_line()[:LINE_WIDTH], "dim", no_wrap=True, overflow="ellipsis")
            table.add_row(mark, Text(child.launch.name, no_wrap=True), Text(seconds, no_wrap=True), said)
        if self._live is None:
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)


def _sentence(event: Event) -> str:
    if event.event == "starting":
        return f"starting {event.name}, log in {event.log}"
    if event.event == "ready":
        return f"{event.name} is ready after {event.seconds:.0f} s"
    if event.event == "died":
        return f"{event.name} {event.detail}; starting it again in {event.seconds:.0f} s"
    if event.event == "stopped":
        return f"stopped {event.name}{': ' if event.detail else ''}{event.detail}"
    return event.detail


def _addresses(event: Event) -> str:
    """Every address, and what to do with them."""
    assert event.node is not None
    rows = [(event.node.name, event.socket, event.node.log)]
    gateway = [event.gateway] if event.gateway is not None else []
    rows += [(each.name, each.url, each.log) for each in (*event.engines, *gateway)]
    name_width, place_width = (max(len(row[at]) for row in rows) for at in (0, 1))
    lines = [f"{name:{name_width}}  {place:{place_width}}  log {log}" for name, place, log in rows]
    first = event.engines[0]
    told = {"model": event.model, "prompt": "$(seq -s ' ' 400)", "max_tokens": 8, "temperature": 0}
    body = msgspec.json.encode(told).decode().replace('"', '\\"')
    ask = f"curl -s {(*gateway, first)[0].url}/v1/completions -H 'content-type: application/json' -d \"{body}\""
    # vLLM leaves its receipts with the node, our own engine keeps them
    receipts = f"--url {first.url}" if first.name.startswith("transformers") else f"--socket {event.socket}"
    rest = [f"ask:   {ask}", f"why:   thermocline why {receipts}", "look:  thermocline ps", "stop:  Ctrl-C"]
    return "\n".join([*lines, "", *rest])
