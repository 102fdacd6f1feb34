"""Several reads in one round trip, each by the rules of coherence.py."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from thermocline.near.coherence import PLAIN, Fetch, Flight, Flights, Plain, Step, Steps, View, Wait
from thermocline.near.commands import Args
from thermocline.near.held import Reply


def together(view: View, commands: Sequence[Args], flights: Flights, *, local: bool) -> Steps:
    """The replies to reads that memory may serve; what it lacks of all of them is one `Fetch`. Errors are among them.

    Not `local`: memory may not be used now, and all of them are fetched. A read that others fetch already is waited for
    only when what it takes for ours has come: two that want the same keys in another order never wait for each other.
    """
    reads = [view.read(args, flights) if local else _plainly() for args in commands]
    replies: list[Reply] = [None] * len(reads)
    steps: dict[int, Step] = {}

    def go_on(at: int, reply: Reply) -> None:
        try:
            steps[at] = reads[at].throw(reply) if isinstance(reply, Exception) else reads[at].send(reply)
        except StopIteration as end:
            replies[at] = end.value
            steps.pop(at, None)
        except Exception as error:  # noqa: BLE001  # it is the reply
            replies[at] = error
            steps.pop(at, None)

    try:
        for at in range(len(reads)):
            go_on(at, None)
        while steps:
            for at, step in list(steps.items()):
                if not _fetches(step) and not _follows(step):  # the link answers by itself, a refresh begins at once
                    go_on(at, (yield step))
            fetches = {at: step for at, step in steps.items() if _fetches(step)}
            if fetches:
                for at, reply in (yield from _fetched(fetches, commands)).items():
                    go_on(at, reply)
                continue
            follows = next(((at, step) for at, step in steps.items() if _follows(step)), None)
            if follows:
                go_on(follows[0], (yield follows[1]))
    finally:
        for read in reads:
            read.close()
    return replies


def _fetches(step: Step) -> bool:
    return isinstance(step, Fetch | Plain)


def _follows(step: Step) -> bool:
    """Whether it waits for what another reader fetches."""
    return isinstance(step, Wait) and isinstance(step.future, Flight)


def _fetched(fetches: dict[int, Step], commands: Sequence[Args]) -> Generator[Step, Any, dict[int, Reply]]:
    """What came of these steps: a list for each `Fetch`, one reply for a command as it is."""
    words = {at: step.commands if isinstance(step, Fetch) else (tuple(commands[at]),) for at, step in fetches.items()}
    try:
        came = yield Fetch(tuple(command for these in words.values() for command in these))
    except Exception as error:  # noqa: BLE001  # each read says what it means
        return dict.fromkeys(fetches, error)
    replies: dict[int, Reply] = {}
    for at, step in fetches.items():
        mine, came = came[: len(words[at])], came[len(words[at]) :]
        replies[at] = mine if isinstance(step, Fetch) else mine[0]
    return replies


def _plainly() -> Steps:
    return (yield PLAIN)
