"""Fetching a receipt: from the server that was named, and nowhere else."""

from __future__ import annotations

import http.server
import threading

import pytest

from thermocline.errors import SettingsError, UnreachableError
from thermocline.lens import fetch


class _Server(http.server.BaseHTTPRequestHandler):
    asked: list

    def do_GET(self):  # the name that http.server calls
        self.asked.append((self.path, self.headers.get("Authorization")))
        named = self.path.rpartition("/")[2]
        status = int(named) if named.isdigit() else 200
        self.send_response(status)
        self.send_header("Location", "/receipts/last")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_args):
        pass


@pytest.fixture
def server():
    """A server on loopback that notes what it is asked, and answers with the status that the id names."""
    handler = type("Handler", (_Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()
        thread.join()


def test_question(server, tmp_path, monkeypatch):
    """The id is quoted, the key is sent as bearer token, a path before /receipts is kept, and no proxy is asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url, asked = server
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert fetch.receipt(url + "/prefix/", "a/../b?c", key) == b"{}"
    assert asked == [("/prefix/receipts/a%2F..%2Fb%3Fc", "Bearer secret")]


def test_question_for_an_excerpt(server):
    """Text is asked for on this machine only, and not even over https from another one."""
    url, asked = server
    fetch.receipt(url, "last", excerpt=True)
    assert asked[0][0] == "/receipts/last?excerpt=1"
    for other in ("https://example.org", "https://192.0.2.1:8000", "https://127.0.0.1.example.org"):
        with pytest.raises(SettingsError, match="stays on its own") as caught:
            fetch.receipt(other, "last", excerpt=True)
        assert caught.value.hint


def test_question_for_many(server):
    """A list is asked for with its length."""
    url, asked = server
    assert fetch.receipts(url, 12) == b"{}"
    assert asked[0][0] == "/receipts?limit=12"


def test_answers_are_bounded(server, monkeypatch):
    """An answer longer than what is read is an error with a hint, not a part of it."""
    monkeypatch.setattr(fetch, "BODY_BYTES_MAX", 1)
    with pytest.raises(UnreachableError, match="more than is read") as caught:
        fetch.receipts(server[0], 12)
    assert "--last" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "has no receipt"), (401, "wants an API key"), (403, "refuses"), (302, "status 302"), (500, "status 500")],
)
def test_failures(server, status, words):
    """Another status than 200 is an error with a hint; a redirect is not followed."""
    url, asked = server
    with pytest.raises(UnreachableError, match=words) as caught:
        fetch.receipt(url, str(status))
    assert caught.value.hint
    assert ("--socket" in caught.value.hint) == (status == 404)
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["http://example.org", "http://192.0.2.1:8000", "http://127.0.0.1.example.org"])
def test_plain_http_stays_here(url):
    """Plain HTTP to another machine is refused before anything is sent."""
    with pytest.raises(SettingsError, match="readable over the network"):
        fetch.receipt(url, "last")


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://", "http://127.0.0.1:port", "http://[::1"]
)
def test_not_an_address(url):
    """Something that is not the address of a server is refused with an example of one."""
    with pytest.raises(SettingsError, match="not the address") as caught:
        fetch.receipt(url, "last")
    assert "http://127.0.0.1:8000" in caught.value.hint
