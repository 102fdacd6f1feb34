"""OpenAI's HTTP API in front of an engine: what comes in is checked, queued, and answered as tokens come.

serve   settings to a running server, until a signal
_Api    the handlers
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import hmac
import json
import secrets
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs

import msgspec

from thermocline.build import store_from
from thermocline.clock import Clock, SystemClock
from thermocline.engines import tiny
from thermocline.engines.answers import Answers, ChatAnswers, CompletionAnswers, excerpt_of
from thermocline.engines.generation import Event, Finish, GenerateRequest, Generation
from thermocline.engines.models import load_model
from thermocline.engines.sampling import GREEDY, Sampling
from thermocline.engines.text import Tokens
from thermocline.engines.transformers import Engine
from thermocline.errors import RequestError, ThermoclineError
from thermocline.node.announce import Announcer, open_announcer
from thermocline.node.client import NodeClient
from thermocline.settings import Settings, is_loopback, read_key
from thermocline.store.receipt import ExcerptedReceipt, Receipt
from thermocline.store.store import Store
from thermocline.store.verbs import StoreVerbs
from thermocline.wire import openai
from thermocline.wire.http import Limits, Server, url_of
from thermocline.wire.routes import Handler, Request, Response, Routes
from thermocline.wire.sockets import listening

T = TypeVar("T")
COMPLETION_TOKENS_DEFAULT = 16
ENCODE_AT_ONCE_CHARACTERS = 4096
"""Longer texts are tokenised in another thread: 32 kB take some 12 ms, and other streams would wait."""

RECEIPTS_LISTED = 100
RECEIPTS_BYTES_MAX = 15 << 20
LIMIT_DIGITS_MAX = 9
DRAIN_SECONDS = 20.0
NODE_SECONDS = 5.0
FORWARDED = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip"})
OPEN_ROUTES = frozenset({"/health"})


def serve(settings: Settings, *, as_json: bool = False) -> None:
    """Load the model, open the store, listen until SIGINT or SIGTERM, then finish what is in flight and flush.

    The address goes to stdout once requests are answered, as JSON if asked; progress goes to stderr. Raises
    ThermoclineError for a port in use, a disk path that cannot be used, or a model that cannot be served.
    """
    settings.require_key()
    sock = listening(settings.host, settings.port)
    with contextlib.closing(sock), contextlib.closing(_store(settings)) as store, contextlib.ExitStack() as opened:
        model = load_model(
            settings.model,
            tokens_per_block=settings.tokens_per_block,
            threads=settings.threads,
            progress=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201  # progress of a long start
        )
        announcer = _announcer(settings, store, url_of(sock))
        if announcer is not None:
            opened.callback(announcer.close)
        requests_max, kv_bytes_max = settings.requests_max, settings.memory_bytes
        engine = Engine(model, store, requests_max=requests_max, kv_bytes_max=kv_bytes_max, announcer=announcer)
        opened.callback(engine.close)
        _settle_memory()
        _run(_serve_until_signal(engine, settings, sock, as_json=as_json))


def _store(settings: Settings) -> StoreVerbs:
    """Tiers of our own, or those of a node. One that is not there yet is no error: it is used from when it is."""
    if settings.node_socket is None:
        return store_from(settings)
    client = NodeClient(settings.node_socket, role="transformers", receipts_kept=settings.receipts_kept)
    client.wait_up(NODE_SECONDS)
    return client


def _announcer(settings: Settings, store: StoreVerbs, url: str) -> Announcer | None:
    """What tells routers of our own tiers, if asked for. Those of a node are the node's to tell."""
    return open_announcer(settings, store, name=url) if isinstance(store, Store) else None


def _settle_memory() -> None:
    """What was loaded until now stays: a full collection that looks at all of it again stops every thread for long.

    With torch and transformers that is some 350,000 objects, and hundreds of milliseconds on a busy machine.
    """
    gc.collect()
    gc.freeze()


async def _serve_until_signal(engine: Engine, settings: Settings, sock: socket.socket, *, as_json: bool) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = _Api(engine, settings).server()
    await server.start(sock)
    line = f"thermocline is serving {engine.served.name} at {url_of(sock)}"
    announced = json.dumps({"url": url_of(sock), "model": engine.served.name}) if as_json else line
    print(announced, flush=True)  # noqa: T201  # the result of the command
    await stop.wait()
    await server.stop(DRAIN_SECONDS)


def _run(main: Any) -> None:  # noqa: ANN401  # a coroutine
    """On uvloop where it is installed: half the time per request."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


class _Api:
    """The handlers. All run on the event loop; the engine calls back from its own thread."""

    def __init__(self, engine: Engine, settings: Settings, clock: Clock | None = None) -> None:
        self._engine, self._settings = engine, settings
        self._clock = clock or SystemClock()
        self._started = int(self._clock.wall())
        self._metrics = engine.metrics
        key = read_key(settings.api_key_file) if settings.api_key_file else None
        self._key_digest = None if key is None else hashlib.sha256(key.encode()).digest()
        context = engine.served.context_tokens
        self._prompt_tokens_max = min(settings.prompt_tokens_max or context, context)

    def server(self, limits: Limits | None = None) -> Server:
        """An HTTP server with all routes."""
        table: dict[tuple[str, str], Handler] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._complete,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/models/*"): self._model,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics_text,
            ("GET", "/receipts"): self._receipts,
            ("GET", "/receipts/*"): self._receipt,
            ("GET", "/trace"): self._trace,
        }
        guarded = {route: self._guarded(route[1], handler) for route, handler in table.items()}
        limits = limits or Limits(body_bytes_max=self._settings.body_bytes_max)
        return Server(Routes(guarded), _refusal, limits=limits, observe=self._observe)

    # -- at the door ---------------------------------------------------------------------------------------------------

    def _guarded(self, path: str, handler: Handler) -> Handler:
        """Every route checks who asks before it reads what is asked."""

        async def guarded(request: Request) -> Response:
            self._check_host(request)
            if path not in OPEN_ROUTES:
                self._check_key(request)
            if request.method == "POST":
                _check_content_type(request)
            return await handler(request)

        return guarded

    def _check_host(self, request: Request) -> None:
        """On loopback, a browser led here by a foreign name (DNS rebinding) gets nothing."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if is_loopback(self._settings.host) and host and not is_loopback(name.strip("[]")):
            msg = "this server answers to its loopback address only"
            raise RequestError(msg, hint="use the address it printed", status=403, code="wrong_host")

    def _check_key(self, request: Request) -> None:
        if self._key_digest is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._key_digest):
            msg = "the API key is missing or wrong"
            hint = "send it as `Authorization: Bearer KEY`"
            raise RequestError(msg, hint=hint, status=401, code="invalid_api_key")

    def _observe(self, route: str, status: int) -> None:
        self._metrics.count("requests_total", labels=(("route", route), ("status", str(status))))

    # -- completions ---------------------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        body = openai.read(request.body, openai.CompletionRequest)
        self._check_model(body.model)
        encode = self._engine.text.encode
        prompts = [
            await _aside(len(prompt), encode, prompt) if isinstance(prompt, str) else _array(prompt)
            for prompt in body.prompts()
        ]
        answers = CompletionAnswers(self._engine.text, self._new_id("cmpl"), int(self._clock.wall()), self._name)
        return await self._generate(body, prompts, body.max_tokens or COMPLETION_TOKENS_DEFAULT, body.logprobs, answers)

    async def _chat(self, request: Request) -> Response:
        body = openai.read(request.body, openai.ChatRequest)
        self._check_model(body.model)
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        prompt = await _aside(len(request.body), self._engine.text.encode_chat, messages)
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        left = max(1, self._engine.served.context_tokens - len(prompt))
        wanted = body.max_completion_tokens or body.max_tokens or min(self._settings.new_tokens_max, left)
        answers = ChatAnswers(self._engine.text, self._new_id("chatcmpl"), int(self._clock.wall()), self._name)
        return await self._generate(body, [prompt], wanted, logprobs, answers)

    async def _generate(
        self,
        body: openai.CompletionRequest | openai.ChatRequest,
        prompts: Sequence[Tokens],
        max_tokens: int,
        logprobs: int | None,
        answers: Answers,
    ) -> Response:
        """Submit every prompt, and answer whole or as a stream."""
        sampling = Sampling(body.temperature or GREEDY, 1.0 if body.top_p is None else body.top_p, body.seed)
        requests = [
            GenerateRequest(
                prompt,
                max_tokens,
                answers.id if at == 0 else f"{answers.id}-{at}",
                sampling,
                body.stops,
                body.ignore_eos,
                logprobs,
                (body.cache_salt or "").encode(),
            )
            for at, prompt in enumerate(prompts)
        ]
        running = self._submit(requests)
        if body.stream:
            return Response(_events(running, answers, with_usage=body.include_usage), content_type="text/event-stream")
        async with contextlib.aclosing(running.events()) as events:
            async for at, event in events:
                answers.take(at, event)
        return Response(msgspec.json.encode(answers.whole(running.usage(answers))))

    def _submit(self, requests: Sequence[GenerateRequest]) -> _Running:
        for request in requests:
            self._check_bounds(request)
        running = _Running()
        try:
            for request in requests:
                running.start(self._engine, request)
        except BaseException:
            running.cancel()
            raise
        return running

    def _check_bounds(self, request: GenerateRequest) -> None:
        """The settings' bounds; the engine has its own."""
        if request.max_new_tokens > self._settings.new_tokens_max:
            msg = f"max_tokens is {request.max_new_tokens}, and at most {self._settings.new_tokens_max} are generated"
            raise RequestError(msg, hint="lower it, or raise new_tokens_max", param="max_tokens")
        if len(request.tokens) > self._prompt_tokens_max:
            msg = f"the prompt has {len(request.tokens)} tokens, and {self._prompt_tokens_max} are the limit"
            hint = "shorten the prompt, or raise prompt_tokens_max"
            raise RequestError(msg, hint=hint, param="prompt", code="context_length_exceeded")
        self._engine.check(request.tokens, request.max_new_tokens)

    def _check_model(self, name: str | None) -> None:
        if name not in {None, self._name, self._settings.model}:
            msg = f"the model {name} is not served here"
            hint = f'this server has "{self._name}"'
            raise RequestError(msg, hint=hint, status=404, param="model", code="model_not_found")

    @property
    def _name(self) -> str:
        return self._engine.served.name

    def _new_id(self, kind: str) -> str:
        return f"{kind}-{secrets.token_hex(12)}"

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _card(self) -> openai.ModelCard:
        note = "built in, random weights: its text is gibberish" if self._name == tiny.NAME else "a transformers model"
        context = self._engine.served.context_tokens
        return openai.ModelCard(id=self._name, created=self._started, description=note, max_model_len=context)

    async def _models(self, _: Request) -> Response:
        return Response(msgspec.json.encode(openai.ModelList([self._card()])))

    async def _model(self, request: Request) -> Response:
        self._check_model(request.rest)
        return Response(msgspec.json.encode(self._card()))

    async def _health(self, _: Request) -> Response:
        alive = self._engine.alive
        return Response(b'{"status":"ok"}' if alive else b'{"status":"stopped"}', 200 if alive else 503)

    async def _metrics_text(self, _: Request) -> Response:
        if self._engine.store is not None:
            self._engine.store.measure()
        return Response(self._metrics.text().encode(), content_type="text/plain; version=0.0.4")

    async def _receipts(self, request: Request) -> Response:
        store, limit = self._engine.store, _limit(request.query)
        return Response(await asyncio.to_thread(lambda: _listed(store.receipts.latest(limit) if store else [])))

    async def _trace(self, _: Request) -> Response:
        store = self._engine.store
        lines = await asyncio.to_thread(store.receipts.recent.lines) if store else b""
        return Response(lines, content_type="application/jsonl")

    async def _receipt(self, request: Request) -> Response:
        store = self._engine.store
        receipt = store.receipts.get(request.rest) if store else None
        if receipt is None:
            msg = f"there is no receipt of {request.rest}"
            raise RequestError(
                msg, hint="ids are in the answers; old receipts are dropped", status=404, code="not_found"
            )
        if parse_qs(request.query).get("excerpt") != ["1"]:
            return Response(msgspec.json.encode(receipt))
        self._check_local(request)
        parting = store.receipts.parting(receipt.request) if store else None
        excerpt = await asyncio.to_thread(excerpt_of, self._engine.text, parting) if parting else None
        shown = ExcerptedReceipt(**msgspec.structs.asdict(receipt), excerpt=excerpt)
        return Response(msgspec.json.encode(shown), headers={"cache-control": "no-store"})

    def _check_local(self, request: Request) -> None:
        """Text of prompts is for whoever sits at this machine. What a proxy passes on comes from anywhere."""
        if not is_loopback(self._settings.host) or not FORWARDED.isdisjoint(request.headers):
            msg = "text of prompts is shown on the server's own machine only"
            hint = "listen on 127.0.0.1, and run `thermocline why --excerpt` there"
            raise RequestError(msg, hint=hint, status=403, param="excerpt", code="not_local")


class _Running:
    """The generations of one HTTP request, and their events in the order they come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._generations: list[Generation] = []

    def start(self, engine: Engine, request: GenerateRequest) -> None:
        """Submit one more. Raises as `Engine.submit`."""
        at = len(self._generations)

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (at, event))

        self._generations.append(engine.submit(request, tell))

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Every event of every generation. Closing it early, as a client that leaves does, cancels them all.

        Raises the error that ended a generation.
        """
        left = len(self._generations)
        try:
            while left:
                at, event = await self._queue.get()
                if event.finish in {Finish.FAILED, Finish.CANCELLED}:
                    raise self._generations[at].account.error or _shutting_down()
                left -= event.finish is not None
                yield at, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody wants the answers any more. Does nothing to those that are complete."""
        for generation in self._generations:
            generation.cancel()

    def usage(self, answers: Answers) -> openai.Usage:
        """What all of them used; complete after the last event."""
        prompt_tokens = sum(len(generation.request.tokens) for generation in self._generations)
        cached_tokens = sum(generation.account.cached_tokens for generation in self._generations)
        return openai.usage(prompt_tokens, answers.tokens, cached_tokens)


def _shutting_down() -> RequestError:
    msg = "the server is shutting down"
    return RequestError(msg, hint="try again in a moment", status=503, code="shutting_down")


async def _events(running: _Running, answers: Answers, *, with_usage: bool) -> AsyncGenerator[bytes]:
    """The server-sent events of a streamed answer. An error in the middle is an event too, and the last one."""
    usage: openai.Usage | msgspec.UnsetType | None = None if with_usage else msgspec.UNSET
    try:
        async with contextlib.aclosing(running.events()) as events:
            async for at, event in events:
                piece = answers.piece(at, event, usage)
                if piece is not None:
                    yield openai.event(piece)
    except ThermoclineError as error:
        yield b"data: " + openai.error_body(error) + b"\n\n"
        return
    if with_usage:
        yield openai.event(answers.last_piece(running.usage(answers)))
    yield openai.DONE


def _limit(query: str) -> int:
    """How many receipts a query asks for. Raises RequestError for something that is not a number."""
    text = parse_qs(query).get("limit", [str(RECEIPTS_LISTED)])[0]
    if not text.isascii() or not text.isdecimal() or len(text) > LIMIT_DIGITS_MAX:
        msg = f"limit is not a number of at most {LIMIT_DIGITS_MAX} digits"
        raise RequestError(msg, hint="write ?limit=1000", param="limit")
    return int(text)


def _listed(receipts: Sequence[Receipt]) -> bytes:
    """Receipts as JSON, as many as fit into a bounded body."""
    data: list[msgspec.Raw] = []
    room = RECEIPTS_BYTES_MAX
    for receipt in receipts:
        encoded = msgspec.json.encode(receipt)
        room -= len(encoded) + 1
        if room < 0:
            break
        data.append(msgspec.Raw(encoded))
    return msgspec.json.encode({"object": "list", "data": data, "has_more": len(data) < len(receipts)})


async def _aside(size: int, call: Callable[..., T], *args: object) -> T:
    """Call at once what is short, and in another thread what would hold up the loop."""
    return call(*args) if size <= ENCODE_AT_ONCE_CHARACTERS else await asyncio.to_thread(call, *args)


def _array(tokens: Sequence[int]) -> Tokens:
    import numpy as np

    return np.array(tokens, np.uint32)


def _check_content_type(request: Request) -> None:
    """Browsers send JSON across sites only after asking, and are told no."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        msg = "the content type is not application/json"
        raise RequestError(msg, hint="send `Content-Type: application/json`", status=415, code="unsupported_media_type")


def _refusal(error: RequestError) -> Response:
    return Response(openai.error_body(error), error.status)
