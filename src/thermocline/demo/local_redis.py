"""A Redis server of our own for a while: on a Unix socket in a folder, keeping nothing, gone with the context."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thermocline.clock import SystemClock, until
from thermocline.errors import TierError
from thermocline.wire.resp import Address, connect

NAMES = ("redis-server", "valkey-server")
READY_SECONDS_MAX = 10.0
PAUSE_SECONDS = 0.02


class LocalRedis:
    """A running server. Frozen, it accepts connections and answers nobody."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address) -> None:
        self._process = process
        self.address = address

    @property
    def url(self) -> str:
        """As `redis_url` takes it."""
        return f"unix://{self.address.path}" if self.address.path else f"redis://127.0.0.1:{self.address.port}"

    def freeze(self) -> None:
        """Stop it where it is."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)


def installed() -> str | None:
    """The program, if this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def running(folder: Path, *, port: int = 0) -> Iterator[LocalRedis]:
    """Start a server; on `port` of loopback as well where it is given. Raises TierError where there is none."""
    program = installed()
    if program is None:
        raise TierError("no redis-server on this machine", hint="install it, such as by apt-get install redis-server")
    path = folder / "redis.sock"
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path), "--unixsocketperm", "700"]
    words += ["--save", "", "--appendonly", "no", "--dir", str(folder), "--logfile", str(folder / "redis.log")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = Address("127.0.0.1", port) if port else Address("", 0, str(path))
            if not until(lambda: _answers(address), READY_SECONDS_MAX, pause_seconds=PAUSE_SECONDS):
                raise TierError("redis-server does not answer", hint=f"see {folder / 'redis.log'}")
            yield LocalRedis(process, address)
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def _answers(address: Address) -> bool:
    clock = SystemClock()
    try:
        connect(address, now=clock.now, deadline=clock.now() + READY_SECONDS_MAX).close()
    except OSError:
        return False
    return True
