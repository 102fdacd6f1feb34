"""`thermocline up` and `ps` as a person runs them: a node, two engines with the built-in model, a crash, the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from thermocline.clock import SystemClock

PROMPT = " ".join(str(number) for number in range(200))
CLOCK, TRIES = SystemClock(), 100
SMALL = ("--port", "0", "--memory-bytes", "64MiB", "--disk-bytes", "256MiB", "--threads", "1")


def _ask(url: str) -> dict:
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # as above
        return json.load(response)


def _ask_until_loaded(url: str) -> dict:
    """A busy machine may have the node answer too late, or find it again late: that is a miss, and no failure."""
    for _ in range(TRIES):
        answer = _ask(url)
        if _cached(answer):
            return answer
        CLOCK.sleep(0.2)
    raise AssertionError(f"nothing was loaded in {TRIES} requests")


def _nodes(environment: dict[str, str]) -> list[dict]:
    argv = [sys.executable, "-m", "thermocline", "ps", "--json"]
    return json.loads(subprocess.run(argv, capture_output=True, check=True, env=environment).stdout)["nodes"]


def _wait_durable(environment: dict[str, str]) -> None:
    for _ in range(TRIES):
        blocks = {tier["name"]: tier["blocks"] for tier in _nodes(environment)[0]["tiers"]}
        if blocks["disk"] >= blocks["memory"] > 0:
            return
        CLOCK.sleep(0.2)
    raise AssertionError(f"not all is on disk: {blocks}")


def _next(lines, **wanted: str) -> dict:
    """The next event like this."""
    for line in lines:
        event = json.loads(line)
        if wanted.items() <= event.items():
            return event
    raise AssertionError(f"it ended without {wanted}")


def _cached(answer: dict) -> float:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"] / answer["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_up(tmp_path):
    """Two engines share a node; it is killed, answers stay the same, it is started again and finds its blocks on disk.

    Ctrl-C ends the engines before the node, and nothing is left.
    """
    pytest.importorskip("torch", reason="our own engine needs torch, which is not installed")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "thermocline"]
    argv = ["up", "--engine", "transformers", "--instances", "2", "--json", "--disk-path", str(tmp_path / "disk")]
    with subprocess.Popen([*command, *argv, *SMALL], stdout=subprocess.PIPE, text=True, env=environment) as up:
        try:
            ready = _next(up.stdout, event="up")
            first, second = (engine["url"] for engine in ready["engines"])
            answer = _ask(first)
            shared = _ask_until_loaded(second)
            assert (_cached(answer), shared["choices"]) == (0, answer["choices"])
            assert _cached(shared) > 0.9

            (node,) = _nodes(environment)
            assert node["pid"] == ready["node"]["pid"]
            assert {client["pid"] for client in node["clients"]} == {engine["pid"] for engine in ready["engines"]}

            _wait_durable(environment)
            os.kill(node["pid"], signal.SIGKILL)
            assert "SIGKILL" in _next(up.stdout, event="died", name="node")["detail"]
            assert _ask(first)["choices"] == answer["choices"]
            assert _next(up.stdout, event="ready", name="node")["pid"] != node["pid"]
            back = _ask_until_loaded(second)
            assert back["choices"] == answer["choices"]
            assert _cached(back) > 0.9

            up.send_signal(signal.SIGINT)
            stopped = [json.loads(line)["name"] for line in up.stdout]
            assert stopped[-2:] == ["node", "all of it"]
            assert up.wait(60) == 0
        finally:
            up.terminate()
            up.wait(60)
    pids = [engine["pid"] for engine in ready["engines"]]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_up_with_a_mistake(tmp_path):
    """What does not come up is told with the end of its log and a hint, and nothing is left running."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = ["up", "--engine", "transformers", "--disk-path", "/dev/null/no", *SMALL]
    command = [sys.executable, "-m", "thermocline", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: node ended with status 1 before it was ready" in done.stderr
    assert "  | error: " in done.stderr
    assert f"hint: mend what the log says, then run it again; all of it is in {tmp_path}" in done.stderr
