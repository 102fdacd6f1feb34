"""What passes through: every route, untouched, whole and streamed, on connections that are kept."""

from __future__ import annotations

import hashlib
import json
import socket

import pytest

from tests.gateway.serving import CHAT, RULES, USAGE, InTurn, World, get, post, served, until
from thermocline.errors import SettingsError
from thermocline.gateway.admission import read_front, spliced
from thermocline.gateway.proxy import Gateway
from thermocline.gateway.seam import Usage
from thermocline.gateway.usage import read_usage
from thermocline.tokens.prompt import Front

ODD = b' \n{ "model" : "m",  "x":"\\u00e9 \xc3\xa9", "n": 1e3 ,"messages":[ ] }\r\n'
"""Spaces, escapes and numbers that another encoder would write in another way."""


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_untouched(path):
    """A body reaches the instance byte for byte, and the answer comes back byte for byte, with our headers."""
    with served() as (door, (instance,)):
        answer = door.ask(ODD, path=path, headers="x-custom: kept\r\n")
    assert answer.status == 200
    assert answer.json["sha256"] == hashlib.sha256(ODD).hexdigest()
    assert instance.requests[0].body == ODD
    assert instance.requests[0].headers["x-custom"] == "kept"
    assert instance.requests[0].headers["content-length"] == str(len(ODD))
    assert answer.headers["x-thermocline-instance"] == "i0"
    assert answer.headers["x-thermocline-predicted-ttft"] == "0.2500"
    assert answer.headers["x-thermocline-predicted-cached-tokens"] == "48"
    assert answer.headers["x-thermocline-cached-tokens"] == "64"


def test_models():
    """GET /v1/models is answered by an instance, and a query is passed on."""
    with served() as (door, _), door.connect() as line:
        assert line.ask(get("/v1/models?x=1")).json == {"object": "list", "data": []}
        assert door.chooser.arrived[0].path == "/v1/models"


def test_stream():
    """Events come as they are made, and what the last one says of cached tokens is learned without holding it up."""
    with served() as (door, _):
        answer = door.ask(b'{"stream":true,"events":5}')
        assert answer.whole
        assert answer.headers["content-type"] == "text/event-stream"
        assert "x-thermocline-cached-tokens" not in answer.headers
        assert answer.body.count(b"data: ") == 7
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert until(lambda: ("finished", Usage(100, 64, 3)) in door.chooser.heard)
        assert door.chooser.heard[0] == ("first_byte", 0)
        assert door.counted("routed_cached_tokens_total") == {"": 64}
        assert door.counted("predicted_cached_tokens_total") == {"": 48}


def test_a_stream_without_usage():
    """A success that does not say what it used is told from one that was none."""
    with served() as (door, _):
        assert door.ask(b'{"stream":true,"usage":false}').whole
        assert until(lambda: ("finished", Usage(None, None, None)) in door.chooser.heard)
        assert door.ask(b'{"status":400}').status == 400
        assert until(lambda: ("finished", None) in door.chooser.heard)
        assert door.counted("routed_cached_tokens_total") in ({}, {"": 0})


def test_connections_are_kept():
    """Many requests of one client, whole or streamed in any order, use one connection to the instance."""
    with served() as (door, (instance,)), door.connect() as line:
        for at in range(20):
            answer = line.ask(post(b'{"stream":%b}' % (b"true" if at % 3 == 0 else b"false")))
            assert answer.whole
            assert answer.headers["connection"] == "keep-alive"
        assert len(instance.server._connections) <= 2  # ours, and perhaps a question for its health


def test_no_delay():
    """TCP_NODELAY is set on both sides, as a delayed acknowledgement would cost 40 ms at the first token."""
    with served() as (door, _), door.connect() as line:
        line.ask(post(b"{}"))
        sides = door.world.call(
            lambda: [
                transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for transport in (
                    next(iter(door.gateway._clients))._transport,
                    door.gateway.standings[0]._links[0].transport,
                )
            ]
        )
        assert all(sides)


def test_close_is_honoured():
    """A client that asks to close is answered and closed; hop-by-hop headers go no further."""
    with served() as (door, (instance,)), door.connect() as line:
        headers = "connection: close, x-secret\r\nx-secret: 1\r\nte: trailers\r\naccept-encoding: gzip\r\n"
        assert line.ask(post(b"{}", headers=headers)).headers["connection"] == "close"
        assert line.closed()
        assert not {"x-secret", "te", "accept-encoding"} & instance.requests[0].headers.keys()


def test_large_answer():
    """An answer of many pieces comes whole, and a client that reads it slowly is waited for."""
    with served() as (door, _), door.connect() as line:
        line.send(post(b'{"pad":5000000}'))
        answer = line.answer()
        assert answer.whole
        assert len(answer.body) > 5_000_000
        assert line.ask(post(b"{}")).status == 200


def test_chunked_request():
    """A request body in chunks reaches the instance with one length, and without its trailers."""
    with served() as (door, (instance,)), door.connect() as line:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        line.send(head.encode() + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
        answer = line.ask(b'6;x=y\r\n"a":1}\r\n0\r\nx-trailer: 1\r\n\r\n')
        assert answer.json["sha256"] == hashlib.sha256(b'{"a":1}').hexdigest()
        sent = instance.requests[0].headers
        assert sent["content-length"] == "7"
        assert not {"transfer-encoding", "x-trailer"} & sent.keys()


def test_expect_continue():
    """A client that asks before it sends its body is told to go on."""
    with served() as (door, _), door.connect() as line:
        head = post(b'{"a":1}', headers="expect: 100-continue\r\n")
        line.send(head[:-7])
        assert line.head() == (100, {})
        assert line.ask(b'{"a":1}').status == 200


def test_names():
    """A request keeps the name that its client gave it, or is given one; the instance and the answer have the same."""
    with served() as (door, (instance,)):
        assert door.ask(headers="x-request-id: mine-7\r\n").headers["x-thermocline-request"] == "mine-7"
        named = door.ask().headers["x-thermocline-request"]
        assert [each.headers["x-request-id"] for each in instance.requests] == ["mine-7", named]
        assert door.gateway.decisions.get(named).status == 200
        assert door.gateway.decisions.get("last").request == named


def test_what_the_chooser_learns():
    """Whoever decides is told model, session, output and stream, from header or body."""
    with served() as (door, _):
        door.ask(b'{"model":"m","user":"u","max_tokens":7,"stream":true}')
        door.ask(b'{"prompt_cache_key":"k"}', headers="x-session-id: s\r\n")
        first, second = door.chooser.arrived
    assert (first.model, first.session, first.output_tokens, first.streamed) == ("m", "u", 7, True)
    assert (second.model, second.session, second.output_tokens, second.streamed) == (None, "s", None, False)


def test_upstream_errors_pass():
    """An instance's own error is the client's to read, and says nothing against the instance."""
    with served() as (door, _):
        for _ in range(5):
            answer = door.ask(b'{"status":400}')
            assert (answer.status, answer.body) == (400, b'{"error":{}}')
        assert door.ask().status == 200


def test_two_processes_share_a_port():
    """Two gateways listen on one address, as several processes would, and both answer."""
    with World() as world:
        instance = world.good()
        one = world.gateway([instance.port], shared=True)
        other = world.gateway([instance.port], shared=True, port=one.port)
        for _ in range(60):
            assert one.ask().status == 200
        assert one.chooser.asked + other.chooser.asked == 60
        assert min(one.chooser.asked, other.chooser.asked) > 0


def test_decided_aside():
    """A decision may be made in its own time; one that fails or is late goes to the least busy instance."""

    class Slow(InTurn):
        def choose(self, request):
            found = super().choose(request)
            if request.body == b'{"fail":1}':
                raise ValueError

            async def later():
                import asyncio

                await asyncio.sleep(9 if request.body == b'{"late":1}' else 0.01)
                return found

            return later()

    with served(chooser=Slow(), rules=RULES) as (door, _):
        assert door.ask().headers["x-thermocline-predicted-cached-tokens"] == "48"
        assert door.ask(b'{"fail":1}').status == 200
        assert door.ask(b'{"late":1}').status == 200
        assert door.counted("decisions_missed_total") == {"": 2}


def test_removed_while_it_was_decided():
    """Where an instance is removed while a decision for it is made aside, another answers; without another, 503."""

    class Slow(InTurn):
        def choose(self, request):
            found = super().choose(request)

            async def later():
                import asyncio

                await asyncio.sleep(0.2)
                return found

            return later()

    with served(2, chooser=Slow()) as (door, _), door.connect() as line:
        line.send(post(b"{}"))
        assert until(lambda: door.chooser.asked == 1)
        door.world.call(lambda: door.gateway.standings.remove(door.gateway.standings[0]))
        assert line.answer().headers["x-thermocline-instance"] == "i1"
        line.send(post(b"{}"))
        assert until(lambda: door.chooser.asked == 2)
        door.world.call(lambda: door.gateway.standings.remove(door.gateway.standings[1]))
        assert line.answer().code == "no_instance"
        assert until(lambda: door.chooser.open == 0)
        assert door.gateway.in_flight == 0


def test_a_chooser_that_fails():
    """Whatever goes wrong where decisions are made, answers pass through whole."""

    class Deaf(InTurn):
        def first_byte(self, decision, now):
            raise ValueError

        finished = failed = first_byte

    with served(chooser=Deaf()) as (door, _), door.connect() as line:
        for _ in range(3):
            assert line.ask(post(b'{"stream":true}')).whole


@pytest.mark.parametrize("body", [b"{}", b" { } ", b'{"a":1}', b'\n{ "a" : {} }'])
def test_spliced(body):
    """Fields of ours are put in first, and the rest of a body stays as it is."""
    pieces = spliced(body, b"s", b'{"x":1}')
    whole = b"".join(pieces)
    assert json.loads(whole) == {"cache_salt": "s", "kv_transfer_params": {"x": 1}, **json.loads(body)}
    assert whole.replace(pieces[1], b"") == body
    assert spliced(body, b"", b"") == (body,)


def test_front_is_lenient():
    """Fields of a wrong type are left for the instance to complain about."""
    front = read_front(b'{"model":5,"user":{"a":1},"max_tokens":"x","stream":"yes"}')
    assert (front.session, front.output_tokens) == (None, None)
    assert read_front(b"{}") == Front()


def test_usage():
    """The last usage of an answer is read, however it is cut; text of the model cannot pass for one."""
    said = b'{"choices":[{"text":"\\"usage\\":{\\"prompt_tokens\\":9}"}],' + USAGE + b"}"
    for cut in range(len(said)):
        assert read_usage(said[:cut], said[cut:]) == Usage(100, 64, 3)
    assert read_usage(b"", said.replace(USAGE, b'"x":1')) is None
    assert read_usage(b"", b'{"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":2}}}') == Usage(
        5, 2, None
    )
    assert read_usage(b"", b'"usage":null') is None


def test_loopback_or_keys():
    """A gateway that other machines reach does not start without keys."""
    with pytest.raises(SettingsError):
        Gateway(InTurn(), host="0.0.0.0")  # noqa: S104  # refused
