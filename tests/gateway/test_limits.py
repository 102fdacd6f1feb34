"""What comes in is bounded: framing that can be read in one way only, sizes, time, numbers, and who may ask."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.serving import CHAT, LIMITS, RULES, get, post, served, until
from thermocline.errors import RequestError, SettingsError
from thermocline.gateway.admission import Keys, RetryBudget, read_front

START = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
AMBIGUOUS = {
    "both": "content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    "both, the other way": "transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n",
    "two lengths": "content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    "a list of lengths": "content-length: 2, 2\r\n\r\n{}",
    "a signed length": "content-length: +2\r\n\r\n{}",
    "a hexadecimal length": "content-length: 0x2\r\n\r\n{}",
    "an empty length": "content-length:\r\n\r\n{}",
    "a length with a space before its colon": "content-length : 2\r\n\r\n{}",
    "chunked twice": "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and more": "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "gzip, chunked": "transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": "transfer-encoding: identity\r\n\r\n{}",
    "a coding nobody knows": "transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a folded header": "x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
    "a bare line feed": "content-length: 2\n\n{}",
    "a bare carriage return": "x: a\rcontent-length: 2\r\n\r\n{}",
    "a zero byte": "x: a\0b\r\ncontent-length: 2\r\n\r\n{}",
    "a bad chunk size": "transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer than it says": "transfer-encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "two hosts": "host: localhost\r\ncontent-length: 2\r\n\r\n{}",
    "two keys": "authorization: Bearer a\r\nauthorization: Bearer b\r\ncontent-length: 2\r\n\r\n{}",
    "an upgrade": "connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\n{}",
}


@pytest.fixture(scope="module")
def door():
    with served(2) as (door, _):
        yield door


@pytest.mark.parametrize("rest", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_one_way_to_read_it(door, rest):
    """A request whose end could be seen in two places is refused and its connection closed; no instance hears of it."""
    asked = door.chooser.asked
    with door.connect() as line:
        answer = line.ask((START + rest).encode())
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert line.closed()
    assert door.chooser.asked == asked


def test_what_follows_is_never_served(door):
    """A second request in the bytes of the first is not answered: the connection closes behind the first answer."""
    with door.connect() as line:
        assert line.ask(post(b"{}") + get("/v1/models")).status == 200
        assert line.closed()


REFUSED = {
    "not in the table": (get("/v1/files"), 404),
    "another instance's inside": (get("/receipts"), 404),
    "the admin's": (get("/instances"), 404),
    "a path that would be the same": (get("/v1//models"), 404),
    "a path in other letters": (get("/V1/models"), 404),
    "an escaped path": (get("/v1/%6dodels"), 404),
    "an absolute address": (get("http://127.0.0.1:1/v1/models"), 404),
    "a method that is not taken": (get(CHAT), 405),
    "HEAD": (get("/health").replace(b"GET", b"HEAD"), 405),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    "an old version": (post(b"{}").replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    "a foreign host": (get("/v1/models").replace(b"127.0.0.1", b"evil.example"), 403),
    "a form": (post(b"a=1").replace(b"application/json", b"text/plain"), 415),
    "a packed body": (post(b"{}", headers="content-encoding: gzip\r\n"), 415),
    "a GET with a body": (get("/v1/models", "content-length: 2\r\n") + b"{}", 400),
    "no JSON": (post(b"{"), 400),
    "no object": (post(b"[1]"), 400),
    "two objects": (post(b"{}{}"), 400),
    "too deep": (post(b'{"a":' * 15_000), 400),
    "a large head": (get("/health", "x: " + "y" * 5000 + "\r\n"), 431),
    "many small headers": (get("/health", "x: y\r\n" * 1000), 431),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
}


@pytest.mark.parametrize(("request_bytes", "status"), REFUSED.values(), ids=REFUSED)
def test_refused(door, request_bytes, status):
    """What is not offered or not understood is refused in OpenAI's shape, and no instance hears of it."""
    asked = door.chooser.asked
    with door.connect() as line:
        line.send(request_bytes)
        found = line.head()
        assert found is not None
        assert found[0] == status
        if status == 405 and b"HEAD" not in request_bytes:
            assert found[1]["allow"] == "POST"
    assert door.chooser.asked == asked


def test_old_balancers_may_ask_for_health(door):
    """GET /health is answered in HTTP/1.0 too, and the connection closed."""
    with door.connect() as line:
        assert line.ask(b"GET /health HTTP/1.0\r\n\r\n").status == 200
        assert line.closed()


@settings(max_examples=150)
@given(st.binary(max_size=300))
def test_any_bytes(door, junk):
    """Whatever bytes come, the gateway answers or closes, and goes on answering others."""
    with door.connect() as line:
        line.send(junk + b"\r\n\r\n")
        line.sock.shutdown(1)
        found = line.head()
        assert found is None or 200 <= found[0] < 600
    assert door.ask().status == 200


@settings(max_examples=60)
@given(st.lists(st.integers(1, 200), max_size=8), st.booleans())
def test_cut_anywhere(door, cuts, chunked):
    """However the network cuts a request, it is the same request."""
    body = b'{"x":"' + b"y" * 100 + b'"}'
    if chunked:
        head = START.encode() + b"transfer-encoding: chunked\r\n\r\n"
        whole = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        whole = post(body)
    with door.connect() as line:
        for cut in cuts:
            line.send(whole[:cut])
            whole = whole[cut:]
        line.send(whole)
        assert line.answer().json["sha256"] == hashlib.sha256(body).hexdigest()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
def test_256_mib(chunked):
    """A body of 256 MiB is refused with 413 while it is sent, and takes no memory."""
    piece = b"x" * (1 << 20)
    with served(limits=replace(LIMITS, body_bytes_max=8 << 20, body_seconds=30, linger_seconds=5)) as (door, _):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with door.connect() as line:
            framing = "transfer-encoding: chunked" if chunked else f"content-length: {256 << 20}"
            line.send((START + framing + "\r\n\r\n").encode())
            sent = 0
            try:
                for _ in range(256):
                    line.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                    sent += 1
            except OSError:
                pass
            if sent == 256:
                assert line.answer().status == 413
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB
        assert door.gateway.held_bytes == 0
        assert door.ask().status == 200


def test_bodies_together():
    """Bodies in flight are bounded together: what is too much is refused with 429, and room comes back."""
    limits, rules = replace(LIMITS, body_seconds=5), replace(RULES, held_bytes_max=150_000)
    with served(limits=limits, rules=rules) as (door, _):
        with door.connect() as first, door.connect() as second:
            first.send(post(b"x" * 90_000)[:-1])
            assert until(lambda: door.gateway.held_bytes > 80_000)
            second.send(post(b"x" * 90_000))
            answer = second.answer()
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert until(lambda: door.gateway.held_bytes == 0)
        assert door.ask(b'{"x":"' + b"y" * 90_000 + b'"}').status == 200
        assert door.gateway.held_bytes == 0


def test_memory_comes_back():
    """Thousands of requests, refused and answered, leave nothing behind."""
    rules = replace(RULES, decisions_kept=10)
    with served(rules=rules) as (door, _), door.connect() as line:
        for _ in range(200):
            line.ask(post(b"{}"))
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(1000):
                line.ask(post(b"{}"))
                line.ask(post(b"[]"))
            door.chooser.arrived.clear()
            door.chooser.heard.clear()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 3_000_000  # the good instance keeps what it was asked


# -- time --------------------------------------------------------------------------------------------------------------


def test_slowloris():
    """A head that trickles in is closed after its time, however often a byte comes."""
    with served() as (door, _), door.connect() as line:
        line.send(b"POST ")
        line.sock.settimeout(0.05)
        for _ in range(200):
            try:
                line.send(b"x")
                if line.sock.recv(4096):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("it was never closed")
        assert until(lambda: not door.gateway._clients)
        assert door.counted("requests_total") == {'{route="unknown",status="408"}': 1}


def test_slow_body():
    """A body that does not come in time is refused with 408."""
    with served() as (door, _), door.connect() as line:
        assert line.ask(post(b"{}")[:-1]).status == 408
        assert line.closed()


def test_idle():
    """A connection on which nothing is asked is closed."""
    limits = replace(LIMITS, idle_seconds=0.2, header_seconds=0.2)
    with served(limits=limits) as (door, _), door.connect() as never, door.connect() as once:
        assert once.ask(post(b"{}")).status == 200
        assert once.closed()
        assert never.closed()


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_connections():
    """More connections than allowed are told so and closed; room comes back."""
    with served(limits=replace(LIMITS, connections_max=2)) as (door, _):
        with door.connect() as one, door.connect() as two, door.connect() as three:
            assert one.ask(post(b"{}")).status == 200
            assert two.ask(post(b"{}")).status == 200
            answer = three.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert until(lambda: not door.gateway._clients)
        assert door.ask().status == 200


def test_requests_in_flight():
    """More requests than allowed get 429 with Retry-After, and their connection is kept."""
    with served(rules=replace(RULES, requests_max=1)) as (door, _), door.connect() as one, door.connect() as two:
        one.send(post(b'{"wait_seconds":0.3}'))
        assert until(lambda: door.gateway.in_flight == 1)
        answer = two.ask(post(b"{}"))
        assert (answer.status, answer.headers["retry-after"], answer.code) == (429, "1", "too_many")
        assert one.answer().status == 200
        assert two.ask(post(b"{}")).status == 200


def test_budget():
    """Retries are a burst, and from then on the share."""
    budget = RetryBudget(0.1, 2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


# -- keys --------------------------------------------------------------------------------------------------------------

KEYS = """
[[keys]]
tenant = "acme"
sha256 = "{acme}"
salt = "acme-salt"
requests_max = 1

[[keys]]
tenant = "ops"
sha256 = "{ops}"
operator = true
"""


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    digests = {name: hashlib.sha256(f"key-{name}".encode()).hexdigest() for name in ("acme", "ops")}
    path.write_text(KEYS.format(**digests))
    return Keys.read(path)


def test_documented_keys(tmp_path):
    """The keys file of the guide is one."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "gateway.md").read_text()
    path = tmp_path / "keys.toml"
    path.write_text(guide.partition("```text\n[[keys]]")[2].partition("```")[0].join(("[[keys]]", "")))
    assert Keys.read(path)


def _bearer(name):
    return f"authorization: Bearer key-{name}\r\n"


def test_keys(keys):
    """With keys, only they open the door; a tenant's salt goes in first, and its key stays with us."""
    with served(keys=keys) as (door, (instance,)):
        for headers in ("", _bearer("other"), "authorization: Basic key-acme\r\n", "authorization: Bearer\r\n"):
            answer = door.ask(headers=headers)
            assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert door.ask(b' { "a" : 1 }', headers=_bearer("acme")).status == 200
        assert instance.requests[0].body == b' {"cache_salt":"acme-salt", "a" : 1 }'
        assert "authorization" not in instance.requests[0].headers
        assert door.ask(b"{}", headers=_bearer("ops")).status == 200
        assert instance.requests[1].body == b'{"cache_salt":"tenant-ops"}'
        assert door.chooser.arrived[0].salt == b"acme-salt"
        assert door.gateway.decisions.get("last").tenant == "ops"


@pytest.mark.parametrize("field", ['"cache_salt"', '"cache\\u005fsalt"', '"\\u0063ache_salt"'])
def test_salt_is_not_for_clients(keys, field):
    """A body with a salt of its own is refused, however it spells the name: engines would take the last one."""
    with served(keys=keys) as (door, (instance,)):
        answer = door.ask(f'{{"a":1,{field}:"acme-salt"}}'.encode(), headers=_bearer("ops"))
        assert (answer.status, answer.code) == (400, "salt_not_allowed")
        assert instance.requests == []


def test_transfers_are_not_for_tenants(keys):
    """Where keys have salts, a client does not tell the engine which blocks to load."""
    with served(keys=keys) as (door, (instance,)):
        answer = door.ask(b'{"kv_transfer_params":{"x":1}}', headers=_bearer("ops"))
        assert (answer.status, answer.code) == (400, "transfer_not_allowed")
        assert instance.requests == []


def test_tenant_in_flight(keys):
    """A tenant with too many requests in flight gets 429; others do not."""
    with served(keys=keys) as (door, _), door.connect() as line:
        line.send(post(b'{"wait_seconds":0.3}', headers=_bearer("acme")))
        assert until(lambda: door.gateway.in_flight == 1)
        assert door.ask(headers=_bearer("acme")).status == 429
        assert door.ask(headers=_bearer("ops")).status == 200
        assert line.answer().status == 200
        assert door.ask(headers=_bearer("acme")).status == 200


def test_what_is_open(keys):
    """Health needs no key; counters need an operator's."""
    with served(keys=keys) as (door, _):
        with door.connect() as line:
            assert line.ask(get("/health")).status == 200
            assert line.ask(get("/metrics", _bearer("ops"))).status == 200
        for headers, status in (("", 401), (_bearer("acme"), 403)):
            with door.connect() as line:
                assert line.ask(get("/metrics", headers)).status == status


def test_one_key():
    """One key for everybody salts nothing, and leaves clients their own salt."""
    with served(keys=Keys.of_one("key-x")) as (door, (instance,)):
        assert door.ask(b'{"cache_salt":"mine"}', headers=_bearer("x")).status == 200
        assert instance.requests[0].body == b'{"cache_salt":"mine"}'
        assert door.ask(headers=_bearer("y")).status == 401


def test_without_keys_salts_and_keys_pass():
    """Without keys of ours, a client's salt and key are between it and the instance."""
    with served() as (door, (instance,)):
        assert door.ask(b'{"cache_salt":"mine"}', headers=_bearer("z")).status == 200
        assert instance.requests[0].body == b'{"cache_salt":"mine"}'
        assert instance.requests[0].headers["authorization"] == "Bearer key-z"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys = 5",
        '[[keys]]\ntenant = "a b"\nsha256 = "00"',
        f'[[keys]]\ntenant = "a"\nsha256 = "{"0" * 64}"\nsalt = "a\\"b"',
        f'[[keys]]\ntenant = "a"\nsha256 = "{"0" * 64}"\nunknown = 1',
        f'[[keys]]\ntenant = "a"\nsha256 = "{"0" * 64}"\n[[keys]]\ntenant = "a"\nsha256 = "{"1" * 64}"\nsalt = "b"',
        "\xff",
    ],
)
def test_bad_keys(tmp_path, text):
    """A keys file that is not as it should be is refused with a hint, not half read."""
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError) as caught:
        Keys.read(path)
    assert caught.value.hint


@given(st.binary(max_size=100))
def test_front_of_any_body(body):
    """Whatever a body is, it is looked into or refused."""
    with contextlib.suppress(RequestError):
        assert len(read_front(body).session or "") <= 256


def test_a_long_model_name():
    """Records of requests are thousands, so what a client calls the model is kept only so far."""
    with served() as (door, _):
        assert door.ask(b'{"model":"%b"}' % (b"m" * 50_000)).status == 200
        assert door.gateway.decisions.get("last").model == "m" * 128
