"""Gateways in processes of their own: ours, and the peers, which live in an environment of theirs."""

from __future__ import annotations

import contextlib
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.harness import ROOT
from bench.vllm_server import free_port, process_cpu_seconds, python_of
from tests.faults.process import Process
from thermocline.errors import BenchError

READY_SECONDS = 60.0
STOP_SECONDS = 5.0
SGLANG, VLLM = "sglang-router", "vllm-router"


class Router(Process):
    """Any gateway. Ready once a completion comes back through it: peers discover their instances first."""

    def __init__(self, folder: Path, name: str, argv: Callable[[int], Sequence[str]]) -> None:
        super().__init__(folder / f"{name.replace(' ', '-')}.log", stop_seconds=STOP_SECONDS)
        self.name, self.port = name, free_port()
        path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
        try:
            self.launch(argv(self.port), self._answers, seconds=READY_SECONDS, environment={"PYTHONPATH": path})
        except AssertionError as error:
            raise BenchError(f"{name} does not start: {error}", hint="is its environment whole?") from error

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor time used so far by its process and what it started."""
        return sum(map(process_cpu_seconds, _family(self.pid)))

    def _answers(self) -> bool:
        body = b'{"model":"m","prompt":"hello","max_tokens":1}'
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})  # noqa: S310  # our own child on loopback
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310  # as above
            return bool(reply.status == 200)
        return False


def thermocline_route(folder: Path, instances: str, *more: str, name: str = "thermocline") -> Router:
    """Ours in front of these instances, as `--route-to` takes them; administered at `admin_of` its name."""
    admin = str(admin_of(folder, name))
    start = [sys.executable, "-m", "thermocline", "route", "--admin-socket", admin, "--route-to", instances]
    return Router(folder, name, lambda port: [*start, "--port", str(port), *more])


def admin_of(folder: Path, name: str) -> Path:
    """The admin socket of our router of that name."""
    return folder / f"{name.replace(' ', '-')}.sock"


def sglang_router(folder: Path, urls: Sequence[str], policy: str = "cache_aware") -> Router:
    """sglang-router 0.3.2. Raises BenchError where it is not installed."""
    start = [str(_python()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--policy", policy]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "warn"]
    return Router(folder, SGLANG, lambda port: [*start, *metrics, "--port", str(port), "--worker-urls", *urls])


def vllm_router(folder: Path, urls: Sequence[str], policy: str = "cache_aware") -> Router:
    """vllm-router 0.1.17. Raises BenchError where it is not installed."""
    start = [str(_python().with_name("vllm-router")), "--host", "127.0.0.1", "--policy", policy]
    metrics = ["--prometheus-port", str(free_port()), "--log-level", "warning"]
    return Router(folder, VLLM, lambda port: [*start, *metrics, "--port", str(port), "--worker-urls", *urls])


def peer_routers(urls: Sequence[str]) -> Mapping[str, Callable[[Path], Router]]:
    """How to start each peer in the policy that suits conversations best, by name. Empty where none is installed."""
    try:
        _python()
    except BenchError:
        return {}
    return {
        SGLANG: lambda folder: sglang_router(folder, urls),
        f"{VLLM} consistent_hash": lambda folder: vllm_router(folder, urls, "consistent_hash"),
    }


def _python() -> Path:
    return python_of("ROUTERS_PYTHON", ".venv-routers", "bench-routers-env")


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(each.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found
