"""Several gateway processes on one address: what they are started with, and that none is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.fleet import ENVIRONMENT
from tests.gateway.serving import until

pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
WORDS = [sys.executable, "-m", "thermocline", "route", "--route-to", "a=http://127.0.0.1:9", "--port", "0", "--json"]


def _children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def _answers(url):
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are counted in /proc")
def test_as_many_as_the_environment_says(folder):
    """The setting may come from the environment: children do not see it there, and end with whoever started them."""
    environment = os.environ | ENVIRONMENT | {"THERMOCLINE_GATEWAY_PROCESSES": "2"}
    words = [*WORDS, "--admin-socket", str(folder / "g.sock")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        try:
            assert parent.stdout is not None
            url = json.loads(parent.stdout.readline())["url"]
            children = _children(parent.pid)
            assert len(children) == 2
            assert not any(_children(child) for child in children)
            assert _answers(url)
        finally:
            parent.kill()
    assert until(lambda: not _answers(url)), "children outlive whoever started them"
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)


@pytest.mark.parametrize("more", [["--shared"], ["--admin-socket", "/no/such/folder/g.sock"]])
def test_what_cannot_start(more):
    """One of several is not several, and where children cannot start, nobody waits for them."""
    words = [*WORDS, "--gateway-processes", "2", *more]
    ended = subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode in {1, 2}
    assert "--shared" in ended.stderr or "did not start" in ended.stderr
