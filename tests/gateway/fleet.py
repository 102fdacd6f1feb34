"""A whole fleet for a test: light instances and gateways in processes of their own, and clients that talk on and on."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bench.vllm_server import free_port
from tests.faults.process import CLOCK, Process

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS, ANSWER_SECONDS, PAUSE_SECONDS = 60.0, 30.0, 0.05
STREAMED = 0.5
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
    """An instance without a model. Its events go to `events`; where that begins with @, it listens there itself."""

    def __init__(self, folder: Path, name: str, events: str, blocks: int, *, token_seconds: float = 20e-6) -> None:
        super().__init__(folder / f"{name}.log")
        self.name, self._events, self._blocks, self._token_seconds = name, events, blocks, token_seconds
        self.replay = f"tcp://127.0.0.1:{free_port()}"
        self.start()

    @property
    def routed(self) -> str:
        """What a gateway is told of it."""
        own = f" events=>{self._events.removeprefix('@')}" if self._events.startswith("@") else ""
        return f"{self.name}={self.url} replay={self.replay}{own}"

    def held(self) -> int:
        """The blocks in its cache."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as link:
            link.request("GET", "/counts")
            return json.load(link.getresponse())["blocks"]

    def start(self) -> None:
        words = ["--name", self.name, "--port", str(self.port), "--blocks", str(self._blocks)]
        words += ["--token-seconds", str(self._token_seconds)]
        self.run("thermocline.engines.light", *words, "--events", self._events, "--replay", self.replay)


class Route(_Listening):
    """`thermocline route` in front of some instances."""

    def __init__(self, folder: Path, instances: Sequence[Light], *more: str, name: str = "route") -> None:
        super().__init__(folder / f"{name}.log")
        self._words = ["--route-to", ", ".join(each.routed for each in instances)]
        self._admin = folder / f"{name}.sock"
        self._words += ["--admin-socket", str(self._admin), *more]
        self.start()

    def start(self) -> None:
        self.run("thermocline", "route", "--port", str(self.port), *self._words)

    def instances(self) -> dict[str, Any]:
        """What its operator is told of each instance."""
        return {each["name"]: each for each in json.loads(self._told("/instances"))}

    def counted(self, name: str) -> float:
        """The sum of a counter's series."""
        lines = [line.rpartition(" ") for line in self._told("/metrics").decode().splitlines()]
        return sum(float(value) for series, _, value in lines if series.startswith(f"thermocline_{name}"))

    def _told(self, path: str) -> bytes:
        link = http.client.HTTPConnection("admin", timeout=ANSWER_SECONDS)
        with contextlib.closing(link):
            link.sock = socket.socket(socket.AF_UNIX)
            link.sock.connect(str(self._admin))
            link.request("GET", path)
            return link.getresponse().read()


@dataclass(slots=True)
class Asked:
    """One request: when it was sent, and what came. `status` is 0 where no answer began, `whole` is its end."""

    at: float
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    instance: str = ""
    streamed: bool = False
    whole: bool = False

    @property
    def lost(self) -> bool:
        """True but where the answer is right, or is a stream that had begun."""
        return self.status != HTTPStatus.OK or not (self.whole or self.streamed)


@dataclass
class Clients:
    """Conversations that go on, a few at a time, each request at any of the gateways; half of the answers are streamed.

    All conversations begin with the same `shared_tokens`, and one that has grown beyond `tokens_max` begins anew. Where
    nobody listens, they try again; where an answer is wrong, they wait a moment.
    """

    urls: Sequence[str]
    conversations: int = 24
    at_once: int = 6
    turn_tokens: int = 160
    shared_tokens: int = 0
    tokens_max: int = 1600
    seed: int = 0
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._rng = random.Random(self.seed)  # noqa: S311  # must replay
        self._shared = self._text(self.shared_tokens)
        self._waiting = [self._shared + self._text(64) for _ in range(self.conversations)]
        self._threads = [threading.Thread(target=self._talk) for _ in range(self.at_once)]
        for thread in self._threads:
            thread.start()

    @property
    def lost(self) -> list[Asked]:
        """What was asked and not answered, nor begun to be streamed."""
        return [each for each in self.asked if each.lost]

    def hit_rate(self, since: float) -> float:
        """Cached tokens over prompt tokens, of what was asked since then."""
        some = [each for each in self.asked if each.at >= since]
        return sum(each.cached_tokens for each in some) / sum(each.prompt_tokens for each in some)

    def spread(self, since: float = 0.0) -> float:
        """Requests of the busiest instance over the mean of all."""
        shares = Counter(each.instance for each in self.asked if each.at >= since and each.whole)
        return max(shares.values()) * len(shares) / shares.total()

    def wait_asked(self, count: int) -> None:
        """Until so many more requests were answered."""
        wanted, deadline = self._answered() + count, CLOCK.now() + 60
        while self._answered() < wanted:
            assert CLOCK.now() < deadline, "requests are not answered any more"
            CLOCK.sleep(0.01)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _answered(self) -> int:
        return sum(each.whole for each in tuple(self.asked))

    def _text(self, count: int) -> list[int]:
        return [self._rng.randrange(1 << 16) for _ in range(count)]

    def _talk(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                text = self._waiting.pop(self._rng.randrange(len(self._waiting)))
                text = (text if len(text) < self.tokens_max else self._shared) + self._text(self.turn_tokens)
                url, streamed = self._rng.choice(self.urls), self._rng.random() < STREAMED
            asked = self._ask(url, text, streamed=streamed)
            with self._lock:
                self.asked.append(asked)
                self._waiting.append(text)
            if not asked.whole:
                self._stop.wait(PAUSE_SECONDS)

    def _ask(self, url: str, text: list[int], *, streamed: bool) -> Asked:
        host, _, port = url.removeprefix("http://").partition(":")
        asked = Asked(CLOCK.now(), streamed=streamed)
        body = json.dumps({"model": MODEL, "prompt": text, "max_tokens": 4, "stream": streamed})
        link = http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)
        with contextlib.closing(link), contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self._connect(link)
            link.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            reply = link.getresponse()
            asked.status, asked.instance = reply.status, reply.getheader("x-thermocline-instance") or ""
            usage = _usage(reply.read(), streamed=streamed)
            asked.prompt_tokens = usage["prompt_tokens"]
            asked.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            asked.whole = True
        return asked

    def _connect(self, link: http.client.HTTPConnection) -> None:
        """As clients do: where nobody listens, try again."""
        deadline = CLOCK.now() + ANSWER_SECONDS
        while True:
            try:
                return link.connect()
            except ConnectionRefusedError:
                if self._stop.wait(PAUSE_SECONDS) or CLOCK.now() > deadline:
                    raise


def _usage(body: bytes, *, streamed: bool) -> Any:
    """What an answer says of its tokens. Raises ValueError where it does not."""
    if streamed:
        *_, body, done, _ = [b"", b"", *body.split(b"\n\n")]
        if done != b"data: [DONE]":
            raise ValueError("a stream that broke off")
        body = body.removeprefix(b"data: ")
    usage = json.loads(body).get("usage")
    if not usage:
        raise ValueError("an answer without usage")
    return usage
