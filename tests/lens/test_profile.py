"""Sweeping a server: real instances without a model, and servers that are odd, over real HTTP."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.gateway.fleet import Light, free_port
from thermocline import cli
from thermocline.clock import SystemClock
from thermocline.costs import measured
from thermocline.costs.measured import UNTOLD
from thermocline.errors import SettingsError, UnreachableError
from thermocline.lens import profile as lens
from thermocline.lens.figures import seconds
from thermocline.lens.profile import numbers, page, plan, profile, render
from thermocline.lens.sweep import HELD_TOKENS, Answer, Endpoint, Plan, Prompts, Sample

CLOCK = SystemClock()
BLOCK = 16
SMALL = Plan((64, 128, 256), (0.5, 0.9), (1, 3), answers=2)


@pytest.fixture
def light(folder):
    """An instance without a model."""
    with Light(folder, "a", f"tcp://127.0.0.1:{free_port()}", 4096) as instance:
        yield instance.url


def swept(url: str, asked: Plan = SMALL, seconds_max: float = 60.0):
    done: list[int] = []
    return profile(Endpoint(url, None, CLOCK), asked, CLOCK, seconds_max, done.append, seed=1), done


# -- a server that is odd ----------------------------------------------------------------------------------------------


class _Odd(http.server.BaseHTTPRequestHandler):
    """Counts words or ids as tokens. What it does else is set on the class."""

    protocol_version = "HTTP/1.1"
    refuses, dies_after, lines, cards = "none", 10**9, None, None
    running = most = asked = 0
    lock = threading.Lock()

    def do_GET(self):
        cards = self.cards or {"data": [{"id": "odd\x1b[31m", "max_model_len": 4096}]}
        self._send(
            json.dumps(cards).encode() if self.path == "/v1/models" else b"", 200 if "models" in self.path else 404
        )

    def do_POST(self):
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with kind.lock:
            kind.asked += 1
            kind.running += 1
            kind.most = max(kind.most, kind.running)
        prompt = body["prompt"]
        words = isinstance(prompt, str)
        if self.refuses == "all" or (self.refuses == "ids" and not words) or kind.asked > self.dies_after:
            self._send(b'{"error": "no\x1b"}', 400)
        else:
            count = 2 * len(prompt.split()) if words else len(prompt)
            usage = {"prompt_tokens": count, "completion_tokens": 2, "prompt_tokens_details": None}
            piece = b'data: {"choices": [{"text": "."}]}\n\n'
            last = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
            self._send(piece + piece + last if self.lines is None else self.lines)
        with kind.lock:
            kind.running -= 1

    def _send(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


@contextmanager
def odd(**settings):
    kind = type("Odd", (_Odd,), settings)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", kind
        server.shutdown()
        thread.join()


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_sweep(light):
    """Every length, share and number of clients is a row, with what the engine says it had cached, and from where."""
    found, done = swept(light)
    rows = {(row.prompt_tokens, row.shared_tokens, row.concurrency): row for row in found.measured.rows}
    assert [*rows] == sorted(rows, key=lambda kind: (kind[2], kind[0], kind[1]))
    assert len(rows) == len(found.measured.rows) == 3 * 3 * 2
    for (length, shared, clients), row in rows.items():
        assert row.cached_tokens == min(shared, length - 1) // BLOCK * BLOCK
        assert (row.source != "") == (row.cached_tokens > 0)
        assert row.requests == (3 if clients == 3 else 2)
        assert row.low_seconds <= row.first_token_seconds <= row.high_seconds
    assert found.requests == done[-1] == SMALL.requests == (3 + 2) * 9
    assert found.prompt_tokens == SMALL.prompt_tokens
    assert (found.failed, found.stopped, found.measured.block_tokens) == (0, "", BLOCK)
    assert [each.context_tokens for each in found.measured.memory] == [64, 128, 256]


def test_nothing_is_cached_by_accident(light):
    """What a sweep asks was never asked before, not by the last sweep either; only the shared part is cached."""
    for seed in (1, 2):
        asked = Plan((64,), (), (1,), answers=3)
        found = profile(Endpoint(light, None, CLOCK), asked, CLOCK, 60.0, lambda _: None, seed)
        assert [row.cached_tokens for row in found.measured.rows] == [0]


def test_in_words(light):
    """The text and the page show every row, the formula, and what they do not know as unknown."""
    found, _ = swept(light)
    for text in (render(found), page(found)):
        assert UNTOLD in text
        assert "first token of n computed tokens" in text
        assert text.count("50%") >= 6
    assert page(found).count("<svg") == 3


def test_the_last_line_is_what_the_table_says(light):
    """What reuse gave is told of two rows as they were measured, and not of one and the formula."""
    found, _ = swept(light)
    rows = [row for row in found.measured.rows if row.prompt_tokens == SMALL.contexts[-1] and row.concurrency == 1]
    said = render(found).splitlines()[-1]
    for row in (rows[0], rows[-1]):
        assert seconds(row.first_token_seconds) in said


def test_command(light, tmp_path, capsys):
    """`profile` prints one JSON object, and writes a file for other verbs and a page."""
    path, where = tmp_path / "profile.json", tmp_path / "page.html"
    words = ["profile", "--url", light, "--context", "64,256", "--reuse", "0.5", "--concurrency", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--write", str(path), "--html", str(where), "--json"])
    assert ended.value.code == cli.OK
    out, err = capsys.readouterr()
    assert json.loads(out)["measured"] == json.loads(path.read_text())
    assert measured.read(path).tokens_max == 256
    assert where.read_text().startswith("<!doctype html>")
    assert err.startswith("asking 20 requests of 3,200 tokens")


def test_ctrl_c(folder, tmp_path):
    """Ctrl-C ends it with what there is: the file is written, the text says so, and the exit code is 130."""
    path = tmp_path / "profile.json"
    with Light(folder, "a", f"tcp://127.0.0.1:{free_port()}", 4096, token_seconds=5e-4) as instance:
        words = ["profile", "--url", instance.url, "--context", "64,1024", "--write", str(path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "thermocline", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "80"},
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("asking")
        while instance.held() < (64 + 64 + 1024 + 64 + 1024) // BLOCK:  # warmed up, and two lengths were asked
            CLOCK.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == cli.INTERRUPTED, err
    assert f"stopped {lens.BY_HAND}" in out
    assert measured.read(path).rows


def test_time_is_up(light):
    """No request begins after --seconds-max; what there is until then is shown."""
    found, _ = swept(light, seconds_max=0.0)
    assert found.requests == 1
    assert "--seconds-max" in found.stopped


def test_words():
    """A server that takes no token ids is asked in words, as many as have the tokens wanted."""
    with odd(refuses="ids") as (url, _):
        found, _ = swept(url)
    assert {row.prompt_tokens for row in found.measured.rows} == {64, 128, 256}
    assert {row.cached_tokens for row in found.measured.rows} == {None}
    assert found.measured.sources == ()


def test_no_more_than_asked():
    """No more requests run at once than clients were asked for."""
    with odd() as (url, kind):
        swept(url, Plan((64,), (0.5,), (1, 4), answers=8))
    assert 1 <= kind.most <= 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refuses": "all"}, "completes no prompt of token ids"),
        ({"lines": b"data: [DONE]\n\n"}, "an empty answer"),
        ({"lines": b'data: {"error": {"message": "no"}}\n\n'}, "an error in the stream"),
        ({"lines": b"data: {nonsense\n\n"}, "malformed"),
        ({"lines": b"\x00" * (3 << 20)}, "an empty answer"),
        ({"lines": b'data: {"choices": [1], "usage": {"prompt_tokens": -1}}\n\n'}, "Expected `int` >= 0"),
        ({"cards": {"data": []}}, "which model"),
        ({"cards": {"data": [{"id": 7}]}}, "which model"),
        ({"dies_after": 4}, "nothing was measured"),
    ],
)
def test_servers_that_fail(settings, words):
    """A server that answers no completion is an error that says what came instead, with a hint."""
    with odd(**settings) as (url, _), pytest.raises(UnreachableError, match=words) as caught:
        swept(url)
    assert caught.value.hint
    assert caught.value.message.isprintable()


def test_a_server_that_begins_to_fail():
    """What was measured before a server failed is kept, and it is said why there is no more."""
    with odd(dies_after=20) as (url, _):
        found, _ = swept(url)
    assert found.measured.rows
    assert "fails again and again" in found.stopped
    assert found.failed >= 5
    assert found.measured.conditions.model == "odd [31m"


def test_no_server():
    """Where nobody listens, and where a key would cross the network readable, nothing is sent."""
    with pytest.raises(UnreachableError, match="no server answers"):
        Endpoint(f"http://127.0.0.1:{free_port()}", None, CLOCK)


def test_key(tmp_path):
    """A key is not sent over plain HTTP to another machine."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    with pytest.raises(SettingsError, match="the API key readable"):
        Endpoint("http://192.0.2.1:8000", key, CLOCK)


# -- plans and rows ----------------------------------------------------------------------------------------------------


def test_plan():
    """Without lengths a plan goes as far as the model does; one client and no reuse are always part of it."""
    assert plan(None, (), (0.0, 0.5), (4,)) == Plan((300, 700, 1500, 3100, 7000), (0.5,), (1, 4))
    assert plan(1024 + HELD_TOKENS, (), (), ()).contexts == (64, 128, 256, 512, 1024)
    assert plan(None, (300, 200, 300), (), ()).contexts == (200, 300)
    asked = Plan((10, 20), (0.5,), (1, 4), answers=5)
    assert asked.rounds == [1, 4, 1, 4, 1, 1, 1]
    assert (asked.requests, asked.prompt_tokens) == (13 * 2 * 2, 13 * 30 * 2)


@pytest.mark.parametrize(
    ("contexts", "shares", "clients", "words"),
    [
        ((4096,), (), (), "4,096 are too many"),
        ((2,), (), (), "--context"),
        ((512,), (1.5,), (), "--reuse"),
        ((512,), (-0.5,), (), "--reuse"),
        ((512,), (), (65,), "--concurrency"),
        ((512,), (), (0,), "--concurrency"),
        (tuple(range(16, 96)), (), (), "--context"),
        (tuple(range(1000, 1064)), tuple(at / 64 for at in range(64)), (64,), "are the most"),
    ],
)
def test_refused_plans(contexts, shares, clients, words):
    """What the model does not take, makes no sense, or is too much to ask of a server, is refused with a hint."""
    with pytest.raises(SettingsError, match=words) as caught:
        plan(4096, contexts, shares, clients)
    assert "ask for" in caught.value.hint


@pytest.mark.parametrize("text", ["a", "1;2", "nan", "1,inf", "1 2"])
def test_numbers(text):
    """Lists of numbers are read, and anything else is a mistake."""
    assert numbers("--reuse", "0, 0.5,,1") == [0.0, 0.5, 1.0]
    with pytest.raises(SettingsError, match="--reuse"):
        numbers("--reuse", text)


def test_hits_and_misses_are_not_mixed():
    """Answers of one kind of which some were cached and some not are two rows, and what failed is in none."""
    hit, miss = Answer(0.1, None, 512, 256), Answer(0.9, None, 512, 0)
    samples = [Sample(512, 0.5, 1, "host", hit)] * 3 + [Sample(512, 0.5, 1, "", miss), Sample(512, 0.5, 1, "host", hit)]
    rows = lens._rows([*samples, Sample(512, 0.5, 1, "", Answer(trouble="status 500"))])
    assert [(row.cached_tokens, row.requests, row.first_token_seconds) for row in rows] == [(0, 1, 0.9), (256, 4, 0.1)]


def test_prompts():
    """A prompt like another has its leading share and nothing else of it."""
    for tokens_per_word in (0.0, 2.0):
        prompts = Prompts(3)
        prompts.tokens_per_word = tokens_per_word
        parent = prompts.fresh(400)
        child = prompts.like(parent, 0.25)
        assert len(parent) == len(child) == 400 / (tokens_per_word or 1)
        assert child[: len(child) // 4] == parent[: len(child) // 4]
        assert child[len(child) // 4] != parent[len(child) // 4]
