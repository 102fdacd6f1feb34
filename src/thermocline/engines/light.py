"""An instance without a model: the queue, the prefix cache, the events and the HTTP of an engine, and no arithmetic.

    python -m thermocline.engines.light --name a --port 8001 --events tcp://127.0.0.1:5557

It is what a fleet can be shown and tried with on one small machine. A prompt's tokens are its own ids, or its bytes.
New tokens take time one request after the other, as a prefill does; the answer's tokens say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence

import msgspec
import uvloop

from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.clock import SystemClock
from thermocline.errors import RequestError
from thermocline.metrics import Metrics
from thermocline.tokens.prompt import Kind, prompt_of
from thermocline.wire import openai
from thermocline.wire.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Topic, write_topic
from thermocline.wire.http import Limits, Server, url_of
from thermocline.wire.publisher import Publisher
from thermocline.wire.routes import Request, Response, Routes
from thermocline.wire.sockets import listening

MODEL = "light"
NEW_TOKENS_MAX = 1024
CLOCK = SystemClock()
DEVICE = (("tier", "device"),)


class Cache:
    """Blocks of prompts by key, at most `blocks_max`: what was used longest ago goes first, ends before beginnings."""

    def __init__(self, blocks_max: int, tokens_per_block: int) -> None:
        self.blocks_max, self.tokens_per_block = blocks_max, tokens_per_block
        self._held: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def leading(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first blocks are held."""
        return next((at for at, key in enumerate(keys) if key not in self._held), len(keys))

    def keep(self, tokens: array[int], keys: Sequence[BlockKey]) -> list[Event]:
        """Hold these, which belong to one text; what that stored and removed."""
        held, size = self._held, self.tokens_per_block
        keys = keys[: self.blocks_max]
        first = self.leading(keys)
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        gone: list[int | bytes] = []
        while len(held) > self.blocks_max:
            gone.append(held.popitem(last=False)[0])
        events: list[Event] = [BlockRemoved(tuple(gone))] if gone else []
        if first < len(keys):
            fresh = tokens[first * size : len(keys) * size]
            parent = keys[first - 1] if first else None
            events.append(BlockStored(tuple(keys[first:]), parent, fresh, size))
        return events

    def clear(self) -> list[Event]:
        """Hold nothing any more."""
        self._held.clear()
        return [AllBlocksCleared()]


class Light:
    """The engine: one prefill at a time, decoding beside it."""

    def __init__(self, cache: Cache, publisher: Publisher | None, topic: str, token_seconds: float) -> None:
        self.cache, self._publisher, self._topic = cache, publisher, topic
        self._token_seconds = token_seconds
        self._prefilling = asyncio.Lock()
        self.metrics = Metrics()
        self.prompt_tokens = self.cached_tokens = self.requests = 0

    async def prefill(self, tokens: array[int], salt: str) -> int:
        """Compute what is not held, and hold it. Returns how many tokens were held before."""
        root = root_key(salt.encode())
        keys = block_keys(tokens, root=root, tokens_per_block=self.cache.tokens_per_block)
        arrived = CLOCK.now()
        async with self._prefilling:
            began = CLOCK.now()
            found = min(self.cache.leading(keys) * self.cache.tokens_per_block, len(tokens) - 1)
            found -= found % self.cache.tokens_per_block
            await asyncio.sleep((len(tokens) - found) * self._token_seconds)
            self.metrics.count("prefill_seconds_total", CLOCK.now() - began)
            events = self.cache.keep(tokens, keys)
        self._tell(events)
        self.metrics.count("first_token_seconds_total", CLOCK.now() - arrived)
        self.metrics.count("prompt_tokens_total", len(tokens))
        self.metrics.count("cached_tokens_total", found, DEVICE)
        self.requests += 1
        self.prompt_tokens += len(tokens)
        self.cached_tokens += found
        return found

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self.metrics.count("requests_total", labels=(("route", route), ("status", str(status))))

    def clear(self) -> None:
        """Empty the cache."""
        self._tell(self.cache.clear())

    def _tell(self, events: Sequence[Event]) -> None:
        if self._publisher is not None and events:
            self._publisher.publish(self._topic, events)


class _Asked(msgspec.Struct):
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _Api:
    """The HTTP of it, as far as a gateway and a client of it need one."""

    def __init__(self, light: Light, decode_seconds: float) -> None:
        self._light, self._decode_seconds = light, decode_seconds

    def routes(self) -> Routes:
        return Routes(
            {
                ("POST", "/v1/completions"): self._complete,
                ("POST", "/v1/chat/completions"): self._complete,
                ("GET", "/v1/models"): self._models,
                ("GET", "/health"): self._health,
                ("GET", "/counts"): self._counts,
                ("GET", "/metrics"): self._metrics,
                ("POST", "/reset_prefix_cache"): self._reset,
            }
        )

    async def _complete(self, request: Request) -> Response:
        prompt = prompt_of(request.path, request.body)
        if prompt is None:
            raise RequestError("no prompt", hint="send a prompt, or messages")
        tokens = prompt.ids() if prompt.kind is Kind.TOKENS else array("I", [*prompt.raw])
        if not tokens:
            raise RequestError("an empty prompt", hint="send at least one token")
        asked = msgspec.json.decode(request.body, type=_Asked)
        count = min(asked.max_completion_tokens or asked.max_tokens or 16, NEW_TOKENS_MAX)
        if asked.stream:
            return Response(self._stream(tokens, prompt.salt or "", count), content_type="text/event-stream")
        cached = await self._light.prefill(tokens, prompt.salt or "")
        await asyncio.sleep(count * self._decode_seconds)
        body = {"object": "text_completion", "model": MODEL, "choices": [{"index": 0, "text": "." * count}]}
        return Response(json.dumps(body | {"usage": _usage(len(tokens), count, cached)}).encode())

    async def _stream(self, tokens: array[int], salt: str, count: int) -> AsyncGenerator[bytes]:
        cached = await self._light.prefill(tokens, salt)
        for _ in range(count):
            yield b'data: {"choices":[{"index":0,"text":".","delta":{"content":"."}}]}\n\n'
            await asyncio.sleep(self._decode_seconds)
        usage = json.dumps({"choices": [], "usage": _usage(len(tokens), count, cached)})
        yield f"data: {usage}\n\ndata: [DONE]\n\n".encode()

    async def _models(self, _: Request) -> Response:
        return Response(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())

    async def _health(self, _: Request) -> Response:
        return Response(b"{}")

    async def _counts(self, _: Request) -> Response:
        light = self._light
        found = {"requests": light.requests, "prompt_tokens": light.prompt_tokens, "cached_tokens": light.cached_tokens}
        return Response(json.dumps(found | {"blocks": len(light.cache)}).encode())

    async def _metrics(self, _: Request) -> Response:
        self._light.metrics.gauge("tier_blocks", len(self._light.cache), DEVICE)
        return Response(self._light.metrics.text().encode(), content_type="text/plain; version=0.0.4")

    async def _reset(self, _: Request) -> Response:
        self._light.clear()
        return Response(b"{}")


def _usage(prompt_tokens: int, count: int, cached: int) -> dict[str, object]:
    total = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
    return {**total, "prompt_tokens_details": {"cached_tokens": cached}}


def _refuse(error: RequestError) -> Response:
    return Response(openai.error_body(error), error.status)


async def _serve(options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    sock = listening("127.0.0.1", options.port)
    url = url_of(sock)
    publisher = Publisher(options.events, options.replay) if options.events else None
    topic = write_topic(Topic(options.name or url, MODEL))
    light = Light(Cache(options.blocks, options.block_tokens), publisher, topic, options.token_seconds)
    routes = _Api(light, options.decode_seconds).routes()
    server = Server(routes, _refuse, limits=Limits(connections_max=1024), observe=light.answered)
    await server.start(sock)
    print(msgspec.json.encode({"url": url}).decode(), flush=True)  # noqa: T201  # the result of the command
    await stop.wait()
    await server.stop(1.0)
    if publisher is not None:
        publisher.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m thermocline.engines.light", description=__doc__)
    parser.add_argument("--name", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--events", default="")
    parser.add_argument("--replay", default=None)
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--token-seconds", type=float, default=20e-6)
    parser.add_argument("--decode-seconds", type=float, default=1e-4)
    return parser.parse_args()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(_options()))
