"""The multi-turn workload of a fleet: 24 conversations in turns, more than one server's cache holds, less than two do.

Every prompt begins with one system prompt, so hashing the beginning, or following the longest match alone, sends all
requests to one server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.harness import CLOCK
from bench.vllm_server import MODEL_NAME

CONVERSATIONS, TURNS, AT_ONCE = 24, 4, 8
SYSTEM_WORDS, TURN_WORDS, FRESH_WORDS = 256, 300, 700
NEW_TOKENS = 8
WAIT_SECONDS = 165.0
WORDS = [
    *("import", "return", "class", "def", "self", "value", "index", "result", "cache", "block", "token", "prefix"),
    *("worker", "route", "score", "model", "load", "time", "list", "dict", "string", "number", "open", "close"),
    *("read", "write", "send", "recv", "node", "tree", "hash", "key"),
]


@dataclass(slots=True)
class Ran:
    """What the clients saw of one run."""

    seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def _text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(int(count / 1.15)))


def conversations(url: str, salt: str, *, sessions: bool = False, at_once: int = AT_ONCE) -> Ran:
    """Every conversation's turns in order, so many requests at a time over all. `sessions`: each names its own."""
    rng = random.Random(1)  # noqa: S311  # must replay
    system = f"{salt} {_text(rng, SYSTEM_WORDS)}"
    texts = [[_text(rng, TURN_WORDS) for _ in range(TURNS)] for _ in range(CONVERSATIONS)]

    def converse(number: int, ask: Callable[[str, dict[str, str]], str]) -> None:
        history = system
        for text in texts[number]:
            history += f"\nuser: {text}\nassistant:"
            history += ask(history, {"X-Session-ID": f"{salt} c{number}"} if sessions else {})

    return _together(url, CONVERSATIONS, converse, at_once)


def fresh(url: str, salt: str, count: int) -> Ran:
    """Prompts that share nothing."""
    rng = random.Random(2)  # noqa: S311  # as above
    texts = [f"{salt} {number} {_text(rng, FRESH_WORDS)}" for number in range(count)]
    return _together(url, count, lambda number, ask: _ignored(ask(texts[number], {})))


def _ignored(_: object) -> None:
    return None


def _together(
    url: str, count: int, one: Callable[[int, Callable[[str, dict[str, str]], str]], None], at_once: int = AT_ONCE
) -> Ran:
    """Run `one` for each number in a thread of its own; requests take turns."""
    ran, turns, lock = Ran(), threading.Semaphore(at_once), threading.Lock()

    def ask(text: str, headers: dict[str, str]) -> str:
        with turns:
            seconds, answer, trouble = _ask(url, text, headers)
        with lock:
            ran.first_token_seconds.append(seconds)
            ran.texts.append(text)
            if trouble:
                ran.failed.append(trouble)
        return answer

    threads = [threading.Thread(target=one, args=(number, ask)) for number in range(count)]
    started = CLOCK.now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ran.seconds = CLOCK.now() - started
    return ran


def _ask(url: str, text: str, headers: dict[str, str]) -> tuple[float, str, str]:
    """Seconds to the first token, the answer, and what went wrong."""
    body = {"model": MODEL_NAME, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    where = urlsplit(url)
    started, first, answer = CLOCK.now(), 0.0, ""
    link = http.client.HTTPConnection(where.hostname or "", where.port, timeout=WAIT_SECONDS)
    with contextlib.closing(link):
        try:
            link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", **headers})
            reply = link.getresponse()
            if reply.status != 200:
                return CLOCK.now() - started, "", f"HTTP {reply.status} {reply.read()[:200]!r}"
            for line in reply:
                if line.startswith(b"data: {"):
                    first = first or CLOCK.now() - started
                    answer += "".join(choice.get("text", "") for choice in json.loads(line[6:])["choices"])
        except (OSError, http.client.HTTPException) as error:
            return CLOCK.now() - started, answer, type(error).__name__
    return first, answer, "" if first else "no token"
