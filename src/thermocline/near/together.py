"""Several reads in one round trip, each by the rules of coherence.py."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from thermocline.near.coherence import PLAIN, Fetch, Flight, Flights, Plain, Step, Steps, View, Wait
from thermocline.near.commands import WRITING, Args, Kind, effect
from thermocline.near.held import Reply


def together(view: View, commands: Sequence[Args], flights: Flights, *, local: bool) -> Steps:
    """The replies to reads that memory may serve; what it lacks of all of them is one `Fetch`. Errors are among them.

    Not `local`: memory may not be used now, and all of them are fetched. A read that others fetch already is waited for
    only when what it takes for ours has come: two that want the same keys in another order never wait for each other.
    """
    reads = _Reads([_steps(view, args, flights, local=local) for args in commands])
    try:
        for at in range(len(commands)):
            reads.go_on(at, None)
        while reads.steps:
            for at, step in list(reads.steps.items()):
                if not isinstance(step, Fetch | Plain) and not _follows(step):  # the link's answer, or a refresh begun
                    reads.go_on(at, (yield step))
            fetches = {at: step for at, step in reads.steps.items() if isinstance(step, Fetch | Plain)}
            came = (yield from _fetched(fetches, commands)) if fetches else {}
            for at, reply in came.items():
                reads.go_on(at, reply)
            for at, step in [] if came else list(reads.steps.items())[:1]:
                reads.go_on(at, (yield step))
    finally:
        reads.close()
    return reads.replies


class _Reads:
    """Reads under way: the step that each of them has come to, or its reply."""

    def __init__(self, reads: Sequence[Steps]) -> None:
        self._reads = reads
        self.replies: list[Reply] = [None] * len(reads)
        self.steps: dict[int, Step] = {}

    def go_on(self, at: int, came: Reply) -> None:
        read = self._reads[at]
        try:
            self.steps[at] = read.throw(came) if isinstance(came, Exception) else read.send(came)
        except StopIteration as end:
            self._ended(at, end.value)
        except Exception as error:  # noqa: BLE001  # it is the reply
            self._ended(at, error)

    def close(self) -> None:
        """Those that have not ended let go of what others may wait for."""
        for read in self._reads:
            read.close()

    def _ended(self, at: int, reply: Reply) -> None:
        self.replies[at] = reply
        self.steps.pop(at, None)


def _follows(step: Step) -> bool:
    """Whether it waits for what another reader fetches."""
    return isinstance(step, Wait) and isinstance(step.future, Flight)


def _fetched(fetches: dict[int, Fetch | Plain], commands: Sequence[Args]) -> Generator[Step, Any, dict[int, Reply]]:
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


def _steps(view: View, args: Args, flights: Flights, *, local: bool) -> Steps:
    """A read that memory may serve; anything else goes to the server as it is, and what it writes is forgotten."""
    found = effect(args)
    if found.kind in WRITING:
        return view.write([(found, args)])
    return view.read(args, flights) if local and found.kind is Kind.LOCAL else _plainly()


def _plainly() -> Steps:
    return (yield PLAIN)
