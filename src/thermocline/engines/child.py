"""A process that is kept running: started, watched, started again when it dies, ended together with its children."""

from __future__ import annotations

import enum
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from thermocline.clock import Clock
from thermocline.engines.launch import Launch
from thermocline.errors import LaunchError

BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 1.0, 30.0
DEATHS_MAX = 5
STEADY_SECONDS = 60.0
"""Who was ready for so long is forgiven what was before."""

LOG_BYTES_MAX = 16 << 20
TAIL_LINES, TAIL_BYTES = 25, 16 << 10


class State(enum.StrEnum):
    """Where a child is in its life."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # it died, and is started again in a moment
    ENDED = "ended"  # it was stopped, or given up


class Death(NamedTuple):
    """How a child ended: what is said of it, and after how many seconds it starts again."""

    words: str
    again_seconds: float


def backoff(deaths: int) -> float | None:
    """Seconds until the next start after so many deaths in a row; None when that is enough."""
    return None if deaths >= DEATHS_MAX else min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2.0 ** (deaths - 1))


class Child:
    """One process. It leads a process group of its own, so no terminal stops it before we do, and its children end too.

    What it says goes to `log`, which is begun anew here and never grows far beyond LOG_BYTES_MAX.
    """

    def __init__(self, launch: Launch, log: Path, clock: Clock) -> None:
        self.launch, self.log = launch, log
        self.state = State.ENDED
        self.death: Death | None = None
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False
        self._deaths = 0
        self._since = 0.0  # when the state began
        os.close(self._open_log(os.O_TRUNC))

    @property
    def pid(self) -> int:
        """The process, 0 while there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def seconds(self) -> float:
        """How long the state has lasted."""
        return self._clock.now() - self._since

    def start(self) -> None:
        """Start it. `look` says when it is ready."""
        log = self._open_log(0)
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own commands
                self.launch.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.launch.environment,
                start_new_session=True,
            )
        finally:
            os.close(log)
        self._enter(State.STARTING)

    def look(self) -> State | None:
        """See what became of it, and start it again when it is time. The state that it is in since now, if it changed.

        Raises LaunchError where it did not come up the first time, or died DEATHS_MAX times in a row; it is ended then.
        """
        if self._process is None:
            return self._start_again() if self.state is State.WAITING else None
        self._bound_log()
        if self._has_exited():
            return self._died(self._buried())
        if self.state is State.STARTING:
            return self._look_for_ready()
        if self.seconds >= STEADY_SECONDS:
            self._deaths = 0
        return None

    def terminate(self) -> None:
        """Ask it to end, and start it no more. `has_ended` says when it has."""
        if self._process is not None:  # not by Popen.send_signal, which buries it: its group would be anybody's
            os.kill(self._process.pid, signal.SIGTERM)
            os.kill(self._process.pid, signal.SIGCONT)  # a frozen one would never hear of it
        self._enter(State.ENDED)

    def has_ended(self) -> bool:
        """True once it and its children are gone; those that outlive it are ended by force."""
        if self._process is not None and self._has_exited():
            self._buried()
        return self._process is None

    def kill(self) -> None:
        """End it and its children by force, now."""
        if self._process is not None:
            self._kill_group()
            self._buried()
        self._enter(State.ENDED)

    def tail(self) -> str:
        """The last lines of its log, without what a terminal would obey."""
        return "\n".join(_lines(self.log)[-TAIL_LINES:])

    def last_line(self) -> str:
        """The last line of its log that says anything."""
        return next((line for line in reversed(_lines(self.log)) if line.strip()), "")

    # -- within --------------------------------------------------------------------------------------------------------

    def _look_for_ready(self) -> State | None:
        if self.launch.ready():
            self._was_ready = True
            return self._enter(State.READY)
        if self.seconds > self.launch.start_seconds_max:
            self.kill()
            return self._died(f"was not ready after {self.launch.start_seconds_max:.0f} s")
        return None

    def _start_again(self) -> State | None:
        if self.death is None or self.seconds < self.death.again_seconds:
            return None
        self.start()
        return self.state

    def _died(self, how: str) -> State:
        self._deaths += 1
        again = backoff(self._deaths) if self._was_ready else None
        if again is None:
            self._enter(State.ENDED)
            times = f", {self._deaths} times in a row" if self._was_ready else " before it was ready"
            text = f"{self.launch.name} {how}{times}. The end of {self.log}:\n{_indented(self.tail())}"
            raise LaunchError(text, hint=f"mend what the log says, then run it again; all of it is in {self.log}")
        self.death = Death(how, again)
        return self._enter(State.WAITING)

    def _has_exited(self) -> bool:
        """True where it ended. It stays a zombie until it is buried: until then its group's number is nobody else's."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _buried(self) -> str:
        """Its children ended, its status read; how it ended, in words."""
        assert self._process is not None
        self._kill_group()
        status = self._process.wait()
        self._process = None
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    def _kill_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _enter(self, state: State) -> State:
        self.state, self._since = state, self._clock.now()
        return state

    def _open_log(self, how: int) -> int:
        return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | how, 0o600)

    def _bound_log(self) -> None:
        """Keep what was said so far as the older of two files. What is said in between may be lost."""
        if self.log.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(self.log, self.log.with_name(self.log.name + ".older"))
            os.truncate(self.log, 0)


def _lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return ["".join(character for character in line if character.isprintable()) for line in text.splitlines()]


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
