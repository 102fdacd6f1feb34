"""A server of a test's own, in a process that can be frozen, thawed, killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from thermocline.clock import SystemClock

CLOCK = SystemClock()


class Process:
    """No process until `launch`; ended by `close`, whatever state it is in, by force after `stop_seconds`.

    What it says goes to `log`.
    """

    def __init__(self, log: Path, *, stop_seconds: float = 0.0) -> None:
        self.log, self._stop_seconds = log, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(
        self, words: Sequence[str], ready: Callable[[], bool], *, seconds: float, environment: Mapping[str, str]
    ) -> None:
        """Start it with these words and more environment; returns when it is ready. Fails with the end of its log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment})
        deadline = CLOCK.now() + seconds
        try:
            while not ready():
                assert self._process.poll() is None, f"it ended as it was started\n{self.log_tail()}"
                assert CLOCK.now() < deadline, f"it is not ready after {seconds:.0f} s\n{self.log_tail()}"
                CLOCK.sleep(0.02)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: what it had not made durable is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting connections and bytes, and nobody answers.

        The signal stops the others only once one thread has taken it, which lasts on a busy machine.
        """
        os.kill(self.pid, signal.SIGSTOP)
        while not all(self._stopped(task) for task in Path(f"/proc/{self.pid}/task").iterdir()):
            CLOCK.sleep(0.0005)

    @staticmethod
    def _stopped(task: Path) -> bool:
        try:
            return (task / "stat").read_text().rpartition(")")[2].split()[0] in "TtXZ"
        except OSError:  # it has ended meanwhile
            return True

    def thaw(self) -> None:
        """SIGCONT: it answers what has piled up."""
        os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen, and thawed again whatever happens."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def log_tail(self, lines: int = 40) -> str:
        """The end of what it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End it, frozen or not. A second call does nothing."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_seconds)
            self.kill()
