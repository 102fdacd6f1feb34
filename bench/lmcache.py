"""LMCache 0.5.6 as a peer: its cache server, in the one mode that runs on a CPU, in an environment of its own.

Only this way came up: the multiprocess server with transfer mode `auto` and a name for its shared memory. Its default
mode never becomes ready without a GPU, and in one process it stays in what it calls degraded mode.
"""

from __future__ import annotations

import contextlib
import os
import urllib.request
from pathlib import Path
from typing import Any

from bench.vllm_server import free_port, python_of
from tests.faults.process import Process
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


class Lmcache(Process):
    """Its server: one GiB of memory and files below `disk`. Ready once the object is; ended by `close`."""

    def __init__(self, folder: Path, disk: Path) -> None:
        super().__init__(folder / "lmcache.log", stop_seconds=STOP_SECONDS)
        self.disk = disk
        self._shared_name = f"thermocline-bench-{os.getpid()}"
        self._port, self._http_port, self._metrics_port = free_port(), free_port(), free_port()
        self.start()

    @property
    def transfer(self) -> dict[str, Any]:
        """What --kv-transfer-config says for a server that uses it."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._port},
        }

    def start(self) -> None:
        """Start it; returns when it says that it is well. Raises BenchError where it does not."""
        adapter = f'{{"type":"fs","base_path":"{self.disk}"}}'
        argv = [str(python()), "-m", "lmcache.cli.main", "server", "--l1-size-gb", "1", "--eviction-policy", "LRU"]
        argv += ["--host", "127.0.0.1", "--port", str(self._port), "--supported-transfer-mode", "auto"]
        argv += ["--http-host", "127.0.0.1", "--http-port", str(self._http_port)]
        argv += ["--prometheus-port", str(self._metrics_port), "--shm-name", self._shared_name]
        argv += ["--l2-adapter", adapter]
        try:
            self.launch(argv, self._is_well, seconds=READY_SECONDS, environment=ENVIRONMENT)
        except AssertionError as error:
            raise BenchError(f"LMCache's server does not start: {error}", hint="is its environment whole?") from error

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        self.close()

    def restart(self) -> None:
        """Stop it and start it again: its memory is empty, its files are as they were."""
        self.stop()
        self.start()

    def close(self) -> None:
        """See `Process.close`; what lies in shared memory goes, too."""
        super().close()
        with contextlib.suppress(FileNotFoundError):
            Path(f"/dev/shm/lmcache_l1_pool_{self._shared_name}").unlink()  # noqa: S108  # where its memory lies

    def _is_well(self) -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self._http_port}/healthcheck"
            with urllib.request.urlopen(url, timeout=2) as reply:  # our own child on loopback
                return bool(reply.status == 200)
        return False
