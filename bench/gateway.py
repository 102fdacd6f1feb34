"""What a gateway costs: its CPU time per request beside two peers, before instances that answer at once; and its delay.

Every arm decides where a request goes, but for the floor (`passing.c`): what receiving, sending, receiving and sending
take at least on this machine. CPU time is that of the gateway's processes, by the scheduler's own count, less what they
use while nothing is asked; the minimum over rounds counts, as whatever else runs only adds to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import CLOCK, Progress, Report, check, ratios, spread
from bench.routers import SGLANG, VLLM, Router, sglang_router, thermocline_route, vllm_router
from bench.vllm_server import free_port
from thermocline.errors import BenchError

ROUNDS = 3
LOAD_SECONDS = 0.6
WARM_SECONDS = 0.3
IDLE_SECONDS = 1.0
FIRST_ROUNDS = 40
SMALL_BYTES, LARGE_BYTES = 120, 32_000
OURS, PASSING, TOKENISING, DIRECT = "thermocline", "thermocline round_robin", "thermocline tokenising", "direct"
FLOOR = "floor (C, passes through)"
SHARES = {SGLANG: 1 / 3, VLLM: 1 / 2}
"""How much of a peer's CPU time ours may be."""
FIRST_SECONDS_MAX = 1e-3
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """One way to ask."""

    body_bytes: int
    stream: bool
    connections: int

    def __str__(self) -> str:
        size = "small" if self.body_bytes == SMALL_BYTES else "32 kB"
        return f"{size}, {'streamed' if self.stream else 'plain'}, {self.connections} connections"


CASES = [Case(*each) for each in itertools.product((SMALL_BYTES, LARGE_BYTES), (False, True), (1, 32))]


def run(progress: Progress) -> Report:
    """All gateways in turn, case by case, in rounds; then the first streamed byte."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        mock, load, passing = (_built(folder, name) for name in ("gateway_mock", "gateway_load", "passing"))
        ports = [stack.enter_context(_mock(mock)) for _ in range(2)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        progress("starting the gateways")
        routers = {}
        for start in (partial(_floor, passing), *_starts()):
            router = stack.enter_context(contextlib.closing(start(folder, urls)))
            routers[router.name] = router
        measured: dict[str, dict[str, list[float]]] = {str(case): {name: [] for name in routers} for case in CASES}
        rates: dict[str, dict[str, float]] = {str(case): dict.fromkeys(routers, 0.0) for case in CASES}
        idle = {name: _idle(router) for name, router in routers.items()}
        for at, case in itertools.product(range(ROUNDS), CASES):
            progress(f"round {at + 1} of {ROUNDS}: {case}")
            for name, router in _rotated(routers, at):
                cpu, rate = _cpu(router, load, case, idle[name], f"{name} {at}")
                measured[str(case)][name].append(cpu)
                rates[str(case)][name] = max(rate, rates[str(case)][name])
        progress("first streamed bytes")
        first = _first_bytes({DIRECT: ports[0], **{name: router.port for name, router in routers.items()}})
    return _report(measured, rates, idle, first)


def ours(folder: Path, urls: Sequence[str], *more: str, name: str = "thermocline") -> Router:
    """`thermocline route` in front of the mocks."""
    instances = ", ".join(f"i{at}={url}" for at, url in enumerate(urls))
    return thermocline_route(folder, instances, *more, name=name)


def _floor(program: Path, folder: Path, urls: Sequence[str]) -> Router:
    """No gateway, only bytes that pass."""
    ports = [url.rpartition(":")[2] for url in urls]
    return Router(folder, FLOOR, lambda port: [str(program), str(port), *ports])


def _starts() -> Iterator[Callable[[Path, Sequence[str]], Router]]:
    """Ours as it comes, without costs, and with a tokenizer where there is one to make; then the peers."""
    yield ours
    yield lambda folder, urls: ours(folder, urls, "--policy", "round_robin", name=PASSING)
    if importlib.util.find_spec("torch") is not None:
        from thermocline.engines import tiny

        model = str(tiny.ensure())
        yield lambda folder, urls: ours(folder, urls, "--tokenizer-path", model, name=TOKENISING)
    yield sglang_router
    yield vllm_router


# -- parts -------------------------------------------------------------------------------------------------------------


def _built(folder: Path, name: str) -> Path:
    """A small C program of ours, compiled. Raises BenchError without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BenchError("this bench compiles its load and its instances", hint="install gcc")
    path = folder / name
    subprocess.run([compiler, "-O2", "-o", str(path), str(HERE / f"{name}.c")], check=True)
    return path


@contextlib.contextmanager
def _mock(program: Path) -> Iterator[int]:
    port = free_port()
    with subprocess.Popen([program, str(port)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield port
        finally:
            process.kill()


def _rotated(routers: Mapping[str, Router], turn: int) -> list[tuple[str, Router]]:
    pairs = list(routers.items())
    cut = turn % len(pairs)
    return pairs[cut:] + pairs[:cut]


def _idle(router: Router) -> float:
    """CPU seconds per second while nothing is asked."""
    before, started = router.cpu_seconds(), CLOCK.now()
    CLOCK.sleep(IDLE_SECONDS)
    return (router.cpu_seconds() - before) / (CLOCK.now() - started)


def _cpu(router: Router, load: Path, case: Case, idle: float, seed: str) -> tuple[float, float]:
    """CPU seconds per request, and requests per second. Conversations are new to the gateway at first, then known."""
    seed = seed.replace(" ", "-")
    _asked(load, router, case, WARM_SECONDS, seed)
    before, started = router.cpu_seconds(), CLOCK.now()
    count = _asked(load, router, case, LOAD_SECONDS, seed)
    seconds = CLOCK.now() - started
    return max(0.0, router.cpu_seconds() - before - idle * seconds) / count, count / LOAD_SECONDS


def _asked(load: Path, router: Router, case: Case, seconds: float, seed: str) -> int:
    words = [str(word) for word in (router.port, case.connections, seconds, case.body_bytes, int(case.stream), seed)]
    done = subprocess.run([load, *words], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise BenchError(f"{router.name}, {case}: {done.stderr.strip()}", hint=router.log_tail(5))
    count, bad = map(int, done.stdout.split())
    if bad or not count:
        msg = f"{router.name}, {case}: {bad} of {count} answers were not 200"
        raise BenchError(msg, hint=router.log_tail(5))
    return count


def _first_bytes(ports: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds to the first event of a small stream, on one kept connection for each, in turns."""
    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    with contextlib.ExitStack() as stack:
        links = {
            name: stack.enter_context(socket.create_connection(("127.0.0.1", port))) for name, port in ports.items()
        }
        for link in links.values():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(FIRST_ROUNDS):
            for name, link in links.items():
                seconds[name].append(_first_byte(link, request))
    return seconds


def _first_byte(link: socket.socket, request: bytes) -> float:
    started = CLOCK.now()
    link.sendall(request)
    held = b""
    while b"data:" not in held:
        held += link.recv(1 << 16)
    seconds = CLOCK.now() - started
    while not held.endswith(b"\r\n0\r\n\r\n"):
        held += link.recv(1 << 16)
    return seconds


# -- the report --------------------------------------------------------------------------------------------------------


def _report(
    measured: Mapping[str, Mapping[str, list[float]]],
    rates: Mapping[str, Mapping[str, float]],
    idle: Mapping[str, float],
    first: Mapping[str, list[float]],
) -> Report:
    least = {case: {name: min(values) for name, values in arms.items()} for case, arms in measured.items()}
    checks = [
        check(f"{case}: CPU over {peer}", arms[OURS] / arms[peer], "x", share, "lower")
        for case, arms in least.items()
        for peer, share in SHARES.items()
        if peer in arms
    ]
    medians = {name: spread(values) for name, values in first.items()}
    added = medians[OURS]["median"] - medians[DIRECT]["median"]
    checks.append(check("first streamed byte, added", added, "s", FIRST_SECONDS_MAX, "lower"))
    beside_floor = {
        f"{case}: {name} over the floor": spread(ratios(arms[name], arms[FLOOR]))
        for case, arms in measured.items()
        for name in (OURS, *SHARES)
        if name in arms
    }
    notes = [f"{case}: {_line(arms)}" for case, arms in least.items()]
    notes += _out_of_reach(least)
    details: dict[str, Any] = {
        "arms": {f"first streamed byte: {name}": row for name, row in medians.items()},
        "ratios": beside_floor,
        "cpu_seconds": least,
        "requests_per_second": rates,
        "idle_cpu_share": dict(idle),
        "notes": notes,
    }
    return Report(checks, details)


def _line(arms: Mapping[str, float]) -> str:
    """CPU of each arm, and how often that is the floor's."""
    floor = arms[FLOOR]
    return ", ".join(f"{name} {1e6 * seconds:.0f} us ({seconds / floor:.1f}x)" for name, seconds in arms.items())


def _out_of_reach(least: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where bytes alone cost more than ours may, decision and all."""
    return [
        f"{case}: the floor is {arms[FLOOR] / arms[peer]:.2f} of {peer}, more than the {share:.2f} that ours may be"
        for case, arms in least.items()
        for peer, share in SHARES.items()
        if peer in arms and arms[FLOOR] > share * arms[peer]
    ]
