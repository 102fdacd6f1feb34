"""One question to a node, for commands: connect, ask, leave."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import msgspec

from thermocline.errors import NodeError, UnreachableError
from thermocline.node.link import Link
from thermocline.wire import messages as say
from thermocline.wire.status import NodeStatus

ANSWER_SECONDS = 5.0


def status(path: Path) -> NodeStatus:
    """What the node at this socket holds, and for whom. Raises UnreachableError, and NodeError where it refuses us."""
    return msgspec.json.decode(_report(path, say.Status), type=NodeStatus)


def receipts(path: Path, request: str, count: int = 1) -> bytes:
    """JSON: a list with the receipt of this request (`last`: the latest), or without a request the last `count`."""
    return _report(path, lambda number: say.Receipts(number, request, count))


def trace(path: Path) -> bytes:
    """The last requests of all the node's engines as a trace: see `tokens.recent`."""
    return _report(path, say.Trace)


def metrics(path: Path) -> str:
    """The node's counters in the Prometheus text format."""
    return _report(path, say.Metrics).decode()


def _report(path: Path, make: Callable[[int], say.Question]) -> bytes:
    try:
        link = Link(path, "command", wait_seconds=ANSWER_SECONDS, on_end=lambda _: None)
    except OSError as error:
        raise UnreachableError(
            f"no node answers at {path}: {error.strerror or error}",
            hint="start one with `thermocline node`, or name its socket with --socket",
        ) from None
    answers: queue.SimpleQueue[say.Answer | None] = queue.SimpleQueue()
    try:
        link.ask(make, answers.put)
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise UnreachableError(
            f"the node at {path} is there but does not answer", hint="see its log; it may be stopped or overloaded"
        ) from None
    finally:
        link.end()
    if not isinstance(answer, say.Report):
        raise NodeError(f"the node at {path} could not answer", hint="its log says why")
    return answer.body
