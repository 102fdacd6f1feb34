"""Chapter: conversations over two instances behind a gateway; one of them is killed in the middle, and comes back.

The instances are light ones: queue, prefix cache, KV events and HTTP of an engine, without a model. The gateway is the
real one.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from thermocline.clock import until
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.engines.launch import GATEWAY_INSTALL, gateway_lacks
from thermocline.errors import LaunchError

NAMES = ("a", "b")
CONVERSATIONS, AT_ONCE, TURN_TOKENS = 16, 4, 160
TURNS = 6
WAIT_SECONDS = 30.0
HIT_MIN, BACK_SHARE = 0.7, 0.9
CLAIM = "taken for granted: an instance that dies takes its requests and its conversations' context with it"


@dataclass(frozen=True, slots=True)
class Answered:
    """What one request brought."""

    status: int
    instance: str
    prompt_tokens: int
    cached_tokens: int


def play(screen: Screen, folder: Path) -> Chapter:
    """Three times the same: both instances are up, one is killed while requests are under way, both are up again."""
    if gateway_lacks():
        claim = Claim(CLAIM, f"not shown: {gateway_lacks()} is not installed", GATEWAY_INSTALL)
        return Chapter(ok=True, verdict=claim.figure, claim=claim, details={"shown": False})
    events = f"ipc://{folder / 'events'}"
    with contextlib.ExitStack() as stack:
        screen.working("starting two instances and a gateway")
        urls, processes = {}, {}
        for name in NAMES:
            processes[name], urls[name] = stack.enter_context(light(name, events))
        url = stack.enter_context(gateway(folder, events, urls))
        talk = Talk(url)
        rows = {"both are up": talk.turns(screen, "both are up")}
        rows["b is killed"] = talk.turns(screen, "b is killed", at_first=processes["b"].kill)
        processes["b"].wait()
        stack.enter_context(light("b", events, urlsplit(urls["b"]).port or 0))
        screen.working("the gateway finds b again")
        talk.wait_for("b")
        talk.some_begin_anew()  # b holds nothing any more: only new conversations have a reason to go there
        rows["b is back"] = talk.turns(screen, "b is back")
    screen.worked()
    _show(screen, rows)
    return _concluded(rows)


class Talk:
    """Conversations that go on from phase to phase."""

    def __init__(self, url: str, conversations: int = CONVERSATIONS) -> None:
        self._where = urlsplit(url)
        self._rng = random.Random(1)  # noqa: S311  # must replay
        self._texts = [self._new(64) for _ in range(conversations)]

    def turns(self, screen: Screen, what: str, at_first: object = None) -> list[Answered]:
        """Some turns of every conversation; after the first turn `at_first` is called."""
        answers: list[Answered] = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for turn in range(TURNS):
                screen.working(f"{what}: turn {turn + 1} of {TURNS} of {len(self._texts)} conversations")
                for text in self._texts:
                    text.extend(self._new(TURN_TOKENS))
                asked = [threads.submit(self._ask, text) for text in self._texts]
                if turn == 1 and callable(at_first):
                    at_first()
                answers += [each.result() for each in asked]
        return answers

    def new(self) -> Answered:
        """One request that nobody has a reason to get."""
        return self._ask(self._new(64))

    def wait_for(self, name: str) -> None:
        """Until a request that nobody has a reason to get goes there. It starts slowly, as an instance does."""
        until(lambda: self.new().instance == name, WAIT_SECONDS, pause_seconds=0.05)

    def some_begin_anew(self) -> None:
        """Half of the people leave, and as many others come."""
        self._texts = [self._new(64) if at % 2 else text for at, text in enumerate(self._texts)]

    def _new(self, count: int) -> list[int]:
        return [self._rng.randrange(1 << 16) for _ in range(count)]

    def _ask(self, text: Sequence[int]) -> Answered:
        body = msgspec.json.encode({"model": "light", "prompt": text, "max_tokens": 2})
        link = http.client.HTTPConnection(self._where.hostname or "", self._where.port, timeout=WAIT_SECONDS)
        with contextlib.closing(link):
            link.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            reply = link.getresponse()
            told = msgspec.json.decode(reply.read())
            usage = told.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            instance = reply.getheader("x-thermocline-instance") or ""
            return Answered(reply.status, instance, usage.get("prompt_tokens", 0), cached)


@contextlib.contextmanager
def light(name: str, events: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A light instance that tells its events there: its process and its URL."""
    words = ["thermocline.engines.light", "--name", name, "--events", events, "--port", str(port)]
    with _running(words) as (process, url):
        yield process, url


@contextlib.contextmanager
def gateway(folder: Path, events: str, urls: dict[str, str], *more: str) -> Iterator[str]:
    """A gateway in front of these, administered at admin.sock in the folder: its URL. `more` flags are its own."""
    named = ", ".join(f"{name}={url}" for name, url in urls.items())
    words = ["thermocline", "route", "--port", "0", "--route-to", named, "--events-listen", events, "--json"]
    with _running([*words, "--admin-socket", str(folder / "admin.sock"), *more]) as (_, url):
        yield url


@contextlib.contextmanager
def _running(words: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that tells its URL first."""
    process = subprocess.Popen(  # ourselves
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise LaunchError(f"{words[0]} does not start", hint=f"python -m {' '.join(words)} says why")
        yield process, msgspec.json.decode(line)["url"]
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _show(screen: Screen, rows: dict[str, list[Answered]]) -> None:
    table = []
    for what, answers in rows.items():
        shares = Counter(each.instance for each in answers)
        where = ", ".join(f"{shares[name]} by {name}" for name in NAMES)
        answered = sum(each.status == http.HTTPStatus.OK for each in answers)
        table.append([what, f"{answered} of {len(answers)}", where, f"{_hit_rate(answers):.0%}"])
    screen.table(["", "answered", "where", "prompt tokens found cached"], table, right=(1, 3))


def _hit_rate(answers: Sequence[Answered]) -> float:
    return sum(each.cached_tokens for each in answers) / max(1, sum(each.prompt_tokens for each in answers))


def _concluded(rows: dict[str, list[Answered]]) -> Chapter:
    every = [answer for answers in rows.values() for answer in answers]
    answered = sum(each.status == http.HTTPStatus.OK for each in every)
    before, _, after = (_hit_rate(answers) for answers in rows.values())
    figure = f"{answered} of {len(every)} requests answered; {before:.0%} cached before, {after:.0%} after"
    details = {
        "shown": True,
        "requests": len(every),
        "answered": answered,
        "hit_rates": {what: _hit_rate(answers) for what, answers in rows.items()},
    }
    ok = answered == len(every) and before >= HIT_MIN and after >= BACK_SHARE * before
    return Chapter(ok, figure, Claim(CLAIM, figure, "thermocline demo"), details)
