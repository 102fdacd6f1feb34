"""A whole fleet for a test: light instances and gateways in processes of their own, and clients that talk on and on."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from bench.vllm_server import free_port
from tests.faults.process import CLOCK, Process

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS, ANSWER_SECONDS = 60.0, 30.0
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
MODEL = "light"


class _Listening(Process):
    """A process that is ready when its port accepts connections."""

    def __init__(self, log: Path) -> None:
        super().__init__(log, stop_seconds=10.0)
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *words: str) -> None:
        self.launch([sys.executable, "-m", *words], self._listens, seconds=READY_SECONDS, environment=ENVIRONMENT)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Light(_Listening):
    """An instance without a model; its events go to `events`."""

    def __init__(self, folder: Path, name: str, events: str, blocks: int) -> None:
        super().__init__(folder / f"{name}.log")
        self.name, self._events, self._blocks = name, events, blocks
        self.replay = f"tcp://127.0.0.1:{free_port()}"
        self.start()

    def start(self) -> None:
        words = ["--name", self.name, "--port", str(self.port), "--blocks", str(self._blocks)]
        self.run("thermocline.engines.light", *words, "--events", self._events, "--replay", self.replay)


class Route(_Listening):
    """`thermocline route` in front of some instances."""

    def __init__(self, folder: Path, instances: list[Light], listen: str, *more: str) -> None:
        super().__init__(folder / "route.log")
        self._words = ["--route-to", ", ".join(f"{each.name}={each.url} replay={each.replay}" for each in instances)]
        self._words += ["--events-listen", listen, "--admin-socket", str(folder / "admin.sock"), *more]
        self.start()

    def start(self) -> None:
        self.run("thermocline", "route", "--port", str(self.port), *self._words)


@dataclass(slots=True)
class Asked:
    """One request: when it was sent, and what came."""

    at: float
    status: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    instance: str = ""


@dataclass
class Clients:
    """Conversations that go on, a few at a time. A conversation that has grown long begins anew."""

    url: str
    conversations: int = 24
    at_once: int = 6
    turn_tokens: int = 160
    tokens_max: int = 1600
    seed: int = 0
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._rng = random.Random(self.seed)  # noqa: S311  # must replay
        self._waiting = [self._text(64) for _ in range(self.conversations)]
        self._threads = [threading.Thread(target=self._talk) for _ in range(self.at_once)]
        for thread in self._threads:
            thread.start()

    def hit_rate(self, since: float) -> float:
        """Cached tokens over prompt tokens, of what was asked since then."""
        some = [each for each in self.asked if each.at >= since]
        return sum(each.cached_tokens for each in some) / sum(each.prompt_tokens for each in some)

    def wait_asked(self, count: int) -> None:
        """Until so many more requests were answered."""
        wanted, deadline = len(self.asked) + count, CLOCK.now() + 60
        while len(self.asked) < wanted:
            assert CLOCK.now() < deadline, "requests are not answered any more"
            CLOCK.sleep(0.01)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _text(self, count: int) -> list[int]:
        return [self._rng.randrange(1 << 16) for _ in range(count)]

    def _talk(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                text = self._waiting.pop(self._rng.randrange(len(self._waiting)))
                text = (text if len(text) < self.tokens_max else []) + self._text(self.turn_tokens)
            asked = self._ask(text)
            with self._lock:
                self.asked.append(asked)
                self._waiting.append(text)

    def _ask(self, text: list[int]) -> Asked:
        at = CLOCK.now()
        host, _, port = self.url.removeprefix("http://").partition(":")
        body = json.dumps({"model": MODEL, "prompt": text, "max_tokens": 4})
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)) as link:
            try:
                link.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                reply = link.getresponse()
                told = json.loads(reply.read() or b"{}")
            except (OSError, http.client.HTTPException, ValueError):
                return Asked(at, 0)
            usage = told.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            instance = reply.getheader("x-thermocline-instance") or ""
            return Asked(at, reply.status, usage.get("prompt_tokens", 0), cached, instance)
