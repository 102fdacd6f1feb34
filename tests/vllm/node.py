"""A real node of a test's own: `thermocline node` in a process that can be frozen, killed, restarted and damaged."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

from tests.faults.process import Process

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60.0
STOP_SECONDS = 30.0
MIB = 1 << 20


class Node(Process):
    """Started with the object, listening once that returns; ended by `close`, whatever state it is in.

    Settings are those of the command line, by name: `memory_bytes=...`, `disk_path=...`, `redis_url=...`. `program` is
    what Python runs: thermocline itself, or a script that troubles it.
    """

    def __init__(self, folder: Path, *, program: tuple[str, ...] = ("-m", "thermocline"), **settings: object) -> None:
        super().__init__(folder / "node.log", stop_seconds=STOP_SECONDS)
        self.socket = folder / "node.sock"
        self._program = program
        self.settings = settings
        self.start()

    def start(self) -> None:
        """Start it; returns when its socket accepts connections."""
        flags = [word for name, value in self.settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        argv = [sys.executable, *self._program, "node", "--socket", str(self.socket), *flags]
        environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        self.launch(argv, self._listens, seconds=READY_SECONDS, environment=environment)

    def stop(self) -> None:
        """SIGTERM: it drains what is in flight, keeps its snapshot, and ends."""
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(STOP_SECONDS) == 0, f"the node does not stop in good order\n{self.log_tail()}"
            self._process = None

    def restart(self, **settings: object) -> None:
        """Stop it in good order and start it again: its memory is empty. `settings` replace those of the same name."""
        self.stop()
        self.settings |= settings
        self.start()

    def slabs(self) -> list[Path]:
        """Its memory, which another process of this user may open as a file."""
        found = []
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                if "memfd:" in str(each.readlink()):
                    found.append(each)
        return found

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0
