"""The whole thing, as a person runs it: serve, ask, ask why, restart, check."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

PROMPT = " ".join(str(number) for number in range(200))
SMALL = ("--port", "0", "--memory-bytes", "64MiB", "--disk-bytes", "256MiB", "--threads", "1")


def _command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "thermocline", *argv]


def _run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(*argv), capture_output=True, text=True, check=False, timeout=120)


@contextmanager
def _server(disk: Path):
    """A server on a free port, which must stop cleanly on SIGTERM; gives its address."""
    argv = _command("serve", "--json", "--disk-path", str(disk), *SMALL)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield json.loads(server.stdout.readline())["url"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def _ask(url: str) -> dict:
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # as above
        return json.load(response)


@pytest.mark.slow
def test_serve_why_restart(tmp_path):
    """An answer has a receipt that `why` explains; a new process loads it from disk, and answers the same."""
    with _server(tmp_path / "disk") as url:
        first = _ask(url)
        asked = _run("why", first["id"], "--url", url, "--json")
        assert json.loads(asked.stdout)["loaded_tokens"] == 0
        refused = _run("serve", "--disk-path", str(tmp_path / "disk"), *SMALL)
        assert refused.returncode == 1
        assert "in use by another process" in refused.stderr
        assert "hint: " in refused.stderr
    with _server(tmp_path / "disk") as url:
        second = _ask(url)
        text = _run("why", "--url", url).stdout
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.9 * second["usage"]["prompt_tokens"]
    assert second["choices"] == first["choices"]
    assert second["id"] in text
    assert f"{cached:,} from disk" in text
    _check_finds_damage(tmp_path / "disk")


def _check_finds_damage(disk: Path) -> None:
    clean = _run("check", str(disk), "--json")
    found = json.loads(clean.stdout)
    assert (clean.returncode, found["ok"]) == (0, True)
    for segment in disk.glob("*.segment"):
        content = bytearray(segment.read_bytes())
        content[100::4096] = bytes(byte ^ 1 for byte in content[100::4096])
        segment.write_bytes(content)
    damaged = _run("check", str(disk))
    assert damaged.returncode == 1
    assert f"{found['blocks']} blocks do not verify" in damaged.stdout
