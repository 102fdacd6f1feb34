"""A real node of a test's own: `thermocline node` in a process that can be frozen, killed, restarted and damaged."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from thermocline.clock import SystemClock

ROOT = Path(__file__).resolve().parents[2]
CLOCK = SystemClock()
READY_SECONDS = 60.0
STOP_SECONDS = 30.0
MIB = 1 << 20


class Node:
    """Started with the object, listening once that returns; ended by `close`, whatever state it is in.

    Settings are those of the command line, by name: `memory_bytes=...`, `disk_path=...`, `redis_url=...`. `program` is
    what Python runs: thermocline itself, or a script that troubles it.
    """

    def __init__(self, folder: Path, *, program: tuple[str, ...] = ("-m", "thermocline"), **settings: object) -> None:
        self.socket = folder / "node.sock"
        self._log = folder / "node.log"
        self._program = program
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it; returns when its socket accepts connections."""
        flags = [word for name, value in self.settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        argv = [sys.executable, *self._program, "node", "--socket", str(self.socket), *flags]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
        deadline = CLOCK.now() + READY_SECONDS
        while not self._listens():
            assert self._process.poll() is None, f"the node ended as it was started\n{self.log_tail()}"
            assert CLOCK.now() < deadline, f"the node does not listen\n{self.log_tail()}"
            CLOCK.sleep(0.02)

    def stop(self) -> None:
        """SIGTERM: it drains what is in flight, keeps its snapshot, and ends."""
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(STOP_SECONDS) == 0, f"the node does not stop in good order\n{self.log_tail()}"
            self._process = None

    def kill(self) -> None:
        """SIGKILL: what it had not made durable is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, **settings: object) -> None:
        """Stop it in good order and start it again: its memory is empty. `settings` replace those of the same name."""
        self.stop()
        self.settings |= settings
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting bytes, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

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

    def slabs(self) -> list[Path]:
        """Its memory, which another process of this user may open as a file."""
        folder = Path(f"/proc/{self.pid}/fd")
        return [each for each in folder.iterdir() if "memfd:" in str(each.readlink())]

    def log_tail(self, lines: int = 40) -> str:
        """The end of what it wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End it, frozen or not. A second call does nothing."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self.kill()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0
