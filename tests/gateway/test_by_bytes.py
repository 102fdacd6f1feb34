"""A gateway without a tokenizer, before engines that tell of their caches: it follows what they tell."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
from contextlib import ExitStack

import pytest

from bench.vllm_server import free_port
from tests.faults.process import CLOCK
from tests.gateway.fleet import ANSWER_SECONDS, MODEL, Light, Route

pytest.importorskip("zmq", reason="KV events need pyzmq")
pytest.importorskip("uvloop", reason="the gateway runs on uvloop")

BLOCKS = 300
LENGTH = 4000
"""Characters of a prompt, each of which is a token to these instances: 250 blocks."""
NEARLY = LENGTH - 600
"""What is found of one by its bytes, but for a last chunk and its rest."""
PATIENCE_SECONDS = 20.0


def text(seed: int) -> str:
    """A prompt, and no part of another one."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=LENGTH))  # noqa: S311  # must replay


def ask(port: int, prompt: str) -> tuple[str, int, int]:
    """The instance that answered, the cached tokens that were predicted, and those that it had."""
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 4})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)) as link:
        link.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        reply = link.getresponse()
        told = json.load(reply)
        assert reply.status == http.HTTPStatus.OK
        predicted = int(reply.getheader("x-thermocline-predicted-cached-tokens") or 0)
        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        return reply.getheader("x-thermocline-instance") or "", predicted, cached


def heard(gateway: Route, light: Light) -> None:
    """Wait until the gateway knows of what the instance holds now."""
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while gateway.instances()[light.name]["blocks"]["device"] != light.held():
        assert CLOCK.now() < deadline, "events are not heard"
        CLOCK.sleep(0.02)


def test_predictions_follow_events(folder):
    """What was sent somewhere is found there until that instance says otherwise, and wherever else it is announced."""
    with ExitStack() as stack:
        listen = f"tcp://127.0.0.1:{free_port()}"
        lights = {name: stack.enter_context(Light(folder, name, listen, BLOCKS)) for name in "ab"}
        gateway = stack.enter_context(Route(folder, [*lights.values()], "--events-listen", listen))
        for light in lights.values():  # what is told before somebody listens is heard when more comes
            while not gateway.instances()[light.name]["blocks"]["device"]:
                ask(light.port, f"{CLOCK.now():.9f}" * 3)
        name, predicted, cached = ask(gateway.port, text(0))
        assert (predicted, cached) == (0, 0)
        held, other = lights[name], lights["ab".replace(name, "")]
        heard(gateway, held)
        again, predicted, cached = ask(gateway.port, text(0))
        assert again == name
        assert NEARLY < predicted <= cached

        ask(held.port, text(1))  # pushes most of it out, and the gateway has no part in it
        heard(gateway, held)
        ask(other.port, text(0))
        heard(gateway, other)
        _, predicted, cached = ask(gateway.port, text(0))  # goes wherever the router likes
        assert cached - (LENGTH - NEARLY) < predicted <= cached

        held.kill()
        moved, predicted, cached = ask(gateway.port, text(0))
        assert moved == other.name
        assert NEARLY < predicted <= cached

        other.kill()
        other.start()
        for seed in range(1000):
            ask(other.port, f"{seed:03}" * 10)
            if gateway.instances()[other.name]["blocks"]["device"] == other.held():
                break
        _, predicted, cached = ask(gateway.port, text(0))
        assert max(predicted, cached) < 100
