"""LMCache 0.5.6 as a peer: its cache server, in the one mode that runs on a CPU, in an environment of its own.

Only this way came up: the multiprocess server with transfer mode `auto` and a name for its shared memory. Its default
mode never becomes ready without a GPU, and in one process it stays in what it calls degraded mode.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any, Self

from bench.harness import CLOCK
from bench.vllm_server import free_port, python_of
from thermocline.errors import BenchError

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
CHUNK_TOKENS = 256
"""Its default: two of vLLM's blocks on a CPU."""
ENVIRONMENT = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "PYTHONHASHSEED": "0"}
"""No reports to its makers; and its default hash needs the same seed in all processes."""


def python() -> Path:
    """The Python that has vLLM and LMCache. Raises BenchError where there is none."""
    return python_of("LMCACHE_PYTHON", ".venv-lmcache", "bench-lmcache-env")


class Lmcache:
    """Its server: one GiB of memory and files below `disk`. Ready once the object is; ended by `close`."""

    def __init__(self, folder: Path, disk: Path) -> None:
        self.disk = disk
        self._log = folder / "lmcache.log"
        self._shared_name = f"thermocline-bench-{os.getpid()}"
        self._port, self._http_port, self._metrics_port = free_port(), free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def transfer(self) -> dict[str, Any]:
        """What --kv-transfer-config says for a server that uses it."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._port},
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it; returns when it says that it is well. Raises BenchError where it does not."""
        adapter = f'{{"type":"fs","base_path":"{self.disk}"}}'
        argv = [str(python()), "-m", "lmcache.cli.main", "server", "--l1-size-gb", "1", "--eviction-policy", "LRU"]
        argv += ["--host", "127.0.0.1", "--port", str(self._port), "--supported-transfer-mode", "auto"]
        argv += ["--http-host", "127.0.0.1", "--http-port", str(self._http_port)]
        argv += ["--prometheus-port", str(self._metrics_port), "--shm-name", self._shared_name]
        argv += ["--l2-adapter", adapter]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})
        deadline = CLOCK.now() + READY_SECONDS
        while not self._is_well():
            if self._process.poll() is not None or CLOCK.now() > deadline:
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
                raise BenchError(f"LMCache's server does not start:\n{tail}", hint="is its environment whole?")
            CLOCK.sleep(0.2)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self.close()

    def restart(self) -> None:
        """Stop it and start it again: its memory is empty, its files are as they were."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, frozen or not. A second call does nothing."""
        if self._process is not None:
            self.thaw()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self.kill()
        with contextlib.suppress(FileNotFoundError):
            Path(f"/dev/shm/lmcache_l1_pool_{self._shared_name}").unlink()  # noqa: S108  # where its memory lies

    def _is_well(self) -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self._http_port}/healthcheck"
            with urllib.request.urlopen(url, timeout=2) as reply:  # our own child on loopback
                return bool(reply.status == 200)
        return False
