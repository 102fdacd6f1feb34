"""`thermocline up` with vLLM, started at the beginning of the demo, because that takes a minute on a small machine."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from thermocline.clock import SystemClock, until
from thermocline.demo.screen import Screen
from thermocline.engines.telling import Event
from thermocline.errors import LaunchError, UnreachableError
from thermocline.node import ask

ANSWER_TOKENS = 8
START_SECONDS_MAX, STOP_SECONDS_MAX = 300.0, 60.0
ANSWER_SECONDS_MAX = 60.0
POLL_SECONDS, PAUSE_SECONDS = 0.25, 0.05
OK = 200
_SIZES = ("--memory-bytes", "256MiB", "--disk-bytes", "512MiB")
_ENGINE = ("--max-model-len", "8192", "--block-size", "32")


class Answer(NamedTuple):
    """One request: how many tokens of its prompt were not computed, and the answer."""

    when: str
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    text: str


class Running:
    """`thermocline up` with vLLM, in its own environment, started in the background. `wait` says when it is ready."""

    def __init__(self, process: subprocess.Popen[str], socket: Path) -> None:
        assert process.stdout is not None
        self._process, self._socket = process, socket
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()
        self.node_pid = 0
        self._address: tuple[str, int] = ("", 0)

    def wait(self, screen: Screen) -> None:
        """Wait until vLLM answers. Raises LaunchError where it does not come up."""
        clock = SystemClock()
        started = clock.now()
        while not self._address[1]:
            if clock.now() - started > START_SECONDS_MAX:
                raise LaunchError("vLLM is not ready in time", hint="try `thermocline up --engine vllm` by hand")
            screen.waiting("vLLM starts, as it has since the first chapter", clock.now() - started)
            self._take(POLL_SECONDS)
        screen.worked()

    def wait_durable(self) -> None:
        """Wait until all that the node has in memory is on its disk, too."""

        def durable() -> bool:
            blocks = {tier.name: tier.blocks for tier in ask.status(self._socket).tiers}
            return blocks["disk"] >= blocks["memory"]

        until(durable, ANSWER_SECONDS_MAX, pause_seconds=PAUSE_SECONDS)

    def kill_node(self) -> None:
        """SIGKILL, and no goodbye. `up` starts it again after a second."""
        os.kill(self.node_pid, signal.SIGKILL)
        self.node_pid = 0

    def wait_node(self) -> None:
        """Wait until the node is back. Raises LaunchError where it does not come."""
        clock = SystemClock()
        deadline = clock.now() + ANSWER_SECONDS_MAX
        while not self.node_pid:
            if clock.now() > deadline:
                raise LaunchError("the node was not started again", hint="what `thermocline up` said is above")
            self._take(POLL_SECONDS)

    def forget(self) -> None:
        """Empty vLLM's own cache. It refuses while blocks are held, which takes a moment after each answer."""

        def forgotten() -> bool:
            return bool(self._post("/reset_prefix_cache", {})[1].get("success", True))

        if not until(forgotten, ANSWER_SECONDS_MAX, pause_seconds=PAUSE_SECONDS):
            raise UnreachableError("vLLM does not empty its own cache", hint="see its log, named above")

    def answer(self, when: str, prompt: str) -> Answer:
        """Ask for a few tokens, the likeliest ones."""
        clock = SystemClock()
        started = clock.now()
        body = {"model": "tiny", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        status, told = self._post("/v1/completions", body)
        seconds = clock.now() - started
        if status != OK:
            return Answer(when, 0, 0, seconds, f"status {status}")
        usage = told["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(when, usage["prompt_tokens"], cached, seconds, told["choices"][0]["text"])

    def end(self) -> None:
        """Stop vLLM, then the node; asked twice, `up` ends them by force. Killing it would leave them running."""
        for _ in range(2):
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX)
                return

    def _post(self, path: str, body: dict[str, object]) -> tuple[int, dict[str, Any]]:
        with contextlib.closing(http.client.HTTPConnection(*self._address, timeout=ANSWER_SECONDS_MAX)) as connection:
            connection.request("POST", path, msgspec.json.encode(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        return response.status, msgspec.json.decode(content) if content else {}

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self._events.put(msgspec.json.decode(line, type=Event))
        self._events.put(None)

    def _take(self, seconds: float) -> None:
        """The next event, if one comes."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return
        if event is None:
            raise LaunchError("vLLM did not come up", hint="what `thermocline up` said is above")
        if (event.event, event.name) == ("ready", "node"):
            self.node_pid = event.pid
        elif event.event == "up":
            url = urlsplit(event.engines[0].url)
            self._address = (url.hostname or "", url.port or 0)


def python() -> Path | None:
    """The Python that has vLLM: this one, or the one that `make vllm` made beside it."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    beside = Path(sys.prefix).with_name(".venv-vllm")
    return beside / "bin" / "python" if (beside / ".vllm-ready").exists() else None


@contextlib.contextmanager
def started() -> Iterator[Running | None]:
    """Start it in the background, on one thread. None where vLLM is not installed. It ends with the context."""
    interpreter = python()
    if interpreter is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="thermocline-demo-", ignore_cleanup_errors=True) as folder:
        socket = Path(folder) / "node.sock"
        words = [str(interpreter), "-m", "thermocline", "up", "--engine", "vllm", "--json"]
        words += ["--port", "0", "--threads", "1", "--socket", str(socket), "--disk-path", f"{folder}/disk", *_SIZES]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        process = subprocess.Popen([*words, "--", *_ENGINE], stdout=subprocess.PIPE, text=True, env=environment)
        running = Running(process, socket)
        try:
            yield running
        finally:
            running.end()
