"""What `why` shows on a terminal only: bars, and text of prompts."""

from __future__ import annotations

import http.server
import os
import pty
import subprocess
import sys
import threading

import msgspec
import pytest

from thermocline.store.receipt import Excerpt, ExcerptedReceipt, Missing, Reason

RECEIPT = ExcerptedReceipt(
    request="cmpl-1",
    prompt_tokens=40,
    tokens_per_block=32,
    loaded_tokens=0,
    computed_tokens=40,
    by_tier={},
    missing=(Missing(0, 1, Reason.DIVERGED, "token 3 differs"), Missing(1, 2, Reason.TAIL)),
    match_seconds=0,
    load_seconds=0,
    prefill_seconds=0,
    planned_load_seconds=0,
    planned_recompute_seconds=0,
    planned_cold_seconds=0,
    excerpt=Excerpt(3, "cmpl-0", "It is ", "seven o'clock", "six o'clock"),
)


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # the name that http.server calls
        body = msgspec.json.encode({"data": [RECEIPT]} if "limit" in self.path else RECEIPT)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


@pytest.fixture
def url():
    """A server that always has the same receipt."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def on_a_terminal(*argv: str) -> str:
    """What the command writes when its output is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "thermocline", *argv]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed, as Linux says it
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert child.returncode == 0, shown
    return shown.decode()


def test_an_excerpt_is_shown_on_a_terminal(url):
    """On a terminal, `why --excerpt` shows the text where two prompts part."""
    shown = on_a_terminal("why", "last", "--excerpt", "--url", url)
    assert "this one seven o'clock..." in shown
    assert "that one six o'clock..." in shown


def test_a_summary_has_bars_on_a_terminal(url):
    """On a terminal, `why --summary` draws a bar beside each share; elsewhere it prints plain text."""
    assert "\u2588" * 32 in on_a_terminal("why", "--summary", "--url", url)
    command = [sys.executable, "-m", "thermocline", "why", "--summary", "--url", url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    plain = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "DIVERGED            32 tokens   80 %\n" in plain
    assert "\u2588" not in plain
    assert "\x1b" not in plain
