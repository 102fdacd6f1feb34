"""Asking a live OpenAI-compatible endpoint prompts of our own making: what `thermocline profile` measures with.

Endpoint   one server: its model, its streamed answers, its metrics
Plan       which lengths, reuse shares and concurrencies, how often, and what that adds up to
sweep      asks all of it in mixed order, and gives one `Sample` after the other
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Self

import msgspec

from thermocline.clock import Clock
from thermocline.costs.measured import UNTOLD, Tokens
from thermocline.errors import UnreachableError
from thermocline.lens.fetch import connect
from thermocline.lens.observe import Scrape, parse
from thermocline.settings import read_key

ANSWER_SECONDS = 120.0
BODY_BYTES_MAX, LINE_BYTES_MAX, LINES_MAX = 16 << 20, 1 << 20, 10_000
FAILURES_MAX = 5
NEW_TOKENS, HELD_TOKENS, LOOKS = 8, 32, 4
"""Tokens of an answer: enough for the time between two; and of one that is looked at a few times while it runs."""
PROBE_TOKENS, IDS = 32, (10, 4000)
EXCERPT_BYTES = 300
_HINT = "name an OpenAI-compatible server with --url, such as `thermocline serve` or `vllm serve` starts"
_ENDED = (OSError, ValueError, RecursionError, http.client.HTTPException)
"""What reading an answer that is none, or that breaks off, raises. DecodeError of msgspec is a ValueError."""
Prompt = list[int | str]


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine's metrics say at one moment; None for what they do not. `cached` is by source, ever since."""

    cached: Mapping[str, float] = field(default_factory=dict)
    kv_share: float | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None


def _told(scrape: Scrape) -> Told:
    cached = scrape.by("vllm:prompt_tokens_cached_by_source_total", "source") | scrape.by("cached_tokens_total", "tier")
    config = [dict(labels) for labels, _ in scrape.series.get("vllm:cache_config_info", ())]
    share = scrape.value("vllm:kv_cache_usage_perc")
    if len(config) != 1 or share is None or not 0 <= share <= 1:  # of several ranks, it is not known which
        return Told(cached)
    numbers = [config[0].get(name, "") for name in ("num_gpu_blocks", "block_size")]
    blocks, size = (int(number) if number.isdecimal() else 0 for number in numbers)
    return Told(cached, share, blocks - 1 if blocks > 1 else None, size or None)  # vLLM counts shares of all but one


class _Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: object = None


class _Card(msgspec.Struct):
    id: str
    owned_by: str = UNTOLD
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: Annotated[list[_Card], msgspec.Meta(min_length=1)]


class _Version(msgspec.Struct):
    version: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer: seconds to its first token and between two, and the tokens that the engine counts.

    `trouble` says what came instead of one, and is empty where all was well.
    """

    seconds: float = 0.0
    between_seconds: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    trouble: str = ""


class Prompts:
    """Prompts that nobody has asked before: random token ids, or random words where ids are not taken."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # it only has to differ
        self.tokens_per_word = 0.0  # ids

    def fresh(self, tokens: int) -> Prompt:
        """One of so many tokens; of about so many, where they are words."""
        return [self._piece() for _ in range(round(tokens / (self.tokens_per_word or 1)) or 1)]

    def like(self, prompt: Prompt, share: float) -> Prompt:
        """One as long as this, of which so much from its beginning is the same."""
        kept = int(share * len(prompt))
        return prompt[:kept] + [self._piece() for _ in prompt[kept:]]

    def _piece(self) -> int | str:
        if not self.tokens_per_word:
            return self._random.randrange(*IDS)
        return "".join(self._random.choice(part) for part in ("bcdfglmnprst", "aeiou") * 2)


class Endpoint:
    """One server that is asked for completions. With an API key, nothing goes to another machine over plain HTTP."""

    def __init__(self, url: str, api_key_file: Path | None, clock: Clock) -> None:
        """Ask what it serves. Raises SettingsError for a URL or key that cannot be used, UnreachableError for none."""
        self.url, self._clock = url, clock
        key = read_key(api_key_file) if api_key_file else ""
        self._carried = "the API key" if key else ""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._open: set[http.client.HTTPConnection] = set()
        try:
            self._card = msgspec.json.decode(self._get("/v1/models"), type=_Cards).data[0]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UnreachableError(f"{url} does not say which model it serves", hint=_HINT) from None
        self.context_tokens = self._card.max_model_len
        version = ""
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            version = msgspec.json.decode(self._get("/version"), type=_Version).version
        self.engine = _plain(f"{self._card.owned_by} {version}".strip())

    @property
    def model(self) -> str:
        """The model's name, fit to be shown."""
        return _plain(self._card.id)

    def ask(self, prompt: Prompt, count: int = NEW_TOKENS) -> Answer:
        """The greedy answer of so many tokens."""
        with self._begun(prompt, count) as stream:
            first = last = 0.0
            usage = None
            try:
                for event in stream.events():
                    if event.choices:
                        last = self._clock.now()
                        first = first or last
                    usage = event.usage or usage
                    if self._clock.now() - stream.started > ANSWER_SECONDS:
                        return Answer(trouble=f"no whole answer within {ANSWER_SECONDS:.0f} s")
            except _ENDED as error:
                return Answer(trouble=_named(error))
        return _answer(first - stream.started, last - first, usage) if first else Answer(trouble=stream.trouble)

    def held(self, prompt: Prompt) -> Told:
        """What the metrics say while a prompt's answer is being written: the most that was in use."""
        seen = [Told()]
        with contextlib.suppress(*_ENDED), self._begun(prompt, HELD_TOKENS) as stream:
            for _ in stream.events():  # to its end: an engine that is cut off would go on telling of it
                if len(seen) <= LOOKS:
                    seen.append(self.told())
        return max(seen, key=lambda each: each.kv_share or 0.0)

    def told(self) -> Told:
        """What its metrics say now; nothing, where it has none."""
        return _told(parse(self._get("/metrics")))

    def abort(self) -> None:
        """End the requests under way."""
        for connection in [*self._open]:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _begun(self, prompt: Prompt, count: int) -> _Stream:
        """A request that was sent, on a connection that was open before its time began."""
        text = " ".join(map(str, prompt)) if isinstance(prompt[0], str) else prompt
        wanted = {"model": self._card.id, "prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body = msgspec.json.encode(wanted | {"stream": True, "stream_options": {"include_usage": True}})
        connection, path = connect(self.url, timeout_seconds=ANSWER_SECONDS, carried=self._carried)
        stream = _Stream(connection, self._open)
        try:
            connection.connect()
            stream.started = self._clock.now()
            headers = {**self._headers, "Content-Type": "application/json"}
            connection.request("POST", f"{path}/v1/completions", body, headers)
            reply = connection.getresponse()
            if reply.status == HTTPStatus.OK:
                stream.reply = reply
            else:
                stream.trouble = f"status {reply.status}: {_plain(reply.read(EXCERPT_BYTES).decode(errors='replace'))}"
        except _ENDED as error:
            stream.trouble = _named(error)
        return stream

    def _get(self, path: str) -> bytes:
        """The body, or nothing where there is no such thing."""
        connection, prefix = connect(self.url, carried=self._carried)
        try:
            connection.request("GET", prefix + path, headers=self._headers)
            reply = connection.getresponse()
            body = reply.read(BODY_BYTES_MAX)
        except _ENDED as error:
            raise UnreachableError(f"no server answers at {self.url}: {_named(error)}", hint=_HINT) from None
        finally:
            connection.close()
        if reply.status == HTTPStatus.UNAUTHORIZED:
            raise UnreachableError(f"{self.url} wants an API key", hint="name its file with --api-key-file")
        return body if reply.status == HTTPStatus.OK else b""


class _Stream:
    """The answer to one request, while it is open."""

    def __init__(self, connection: http.client.HTTPConnection, opened: set[http.client.HTTPConnection]) -> None:
        self._connection, self._opened = connection, opened
        self.started = 0.0
        self.reply: http.client.HTTPResponse | None = None
        self.trouble = "an empty answer"
        opened.add(connection)

    def events(self) -> Iterator[_Event]:
        """What comes, one by one. Raises one of `_ENDED` where that is no completion, or too much."""
        for _ in range(LINES_MAX if self.reply is not None else 0):
            assert self.reply is not None
            line = self.reply.readline(LINE_BYTES_MAX)
            if not line or line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                event = msgspec.json.decode(line[6:], type=_Event)
                if event.error is not None:
                    raise ValueError("an error in the stream")
                yield event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.discard(self._connection)
        self._connection.close()


# -- the sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Prompts of these lengths, of which these shares were asked before, by so many clients at once.

    Every length is asked whole first, by each client with a prompt of its own, and then again with each share kept.
    That is done until there are `answers` of each kind.
    """

    contexts: tuple[int, ...]
    shares: tuple[float, ...]
    concurrency: tuple[int, ...]
    answers: int = 5

    @property
    def rounds(self) -> list[int]:
        """How many clients ask in each round; the rounds of one client lie between those of several."""
        each = ((number, clients) for clients in self.concurrency for number in range(-(-self.answers // clients)))
        return [clients for _, clients in sorted(each)]

    @property
    def requests(self) -> int:
        """How many will be sent, those that warm up and look at memory not counted."""
        return sum(self.rounds) * len(self.contexts) * (1 + len(self.shares))

    @property
    def prompt_tokens(self) -> int:
        """Of all of these together."""
        return sum(self.rounds) * sum(self.contexts) * (1 + len(self.shares))


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to a prompt of about `length` tokens, and where cached ones came from, in the engine's own word."""

    length: int
    share: float
    concurrency: int
    source: str
    answer: Answer

    @property
    def prompt_tokens(self) -> int:
        """As the engine counts them."""
        return self.answer.prompt_tokens or self.length


def sweep(endpoint: Endpoint, plan: Plan, prompts: Prompts, seed: int) -> Iterator[Sample]:
    """Warm up, then ask all of it: in each round the lengths in random order, first whole, then with their shares.

    Raises UnreachableError after several failures one after the other.
    """
    _try(endpoint, prompts)
    for length in (plan.contexts[0], plan.contexts[0], plan.contexts[-1]):
        endpoint.ask(prompts.fresh(length))
    order = random.Random(seed)  # noqa: S311  # what it decides is only in which order
    failures = 0
    for clients in plan.rounds:
        asked = [(length, 0.0, [prompts.fresh(length) for _ in range(clients)]) for length in plan.contexts]
        again = [
            (length, share, [prompts.like(prompt, share) for prompt in fresh])
            for length, _, fresh in asked
            for share in plan.shares
        ]
        order.shuffle(asked)
        order.shuffle(again)
        for length, share, batch in [*asked, *again]:
            for sample in _together(endpoint, length, share, batch):
                yield sample
                failures = failures + 1 if sample.answer.trouble else 0
                if failures >= FAILURES_MAX:
                    raise UnreachableError(f"{endpoint.url} fails again and again: {sample.answer.trouble}", hint=_HINT)


def _together(endpoint: Endpoint, length: int, share: float, batch: Sequence[Prompt]) -> list[Sample]:
    """Ask these at once. Their source is known where all cached tokens came from one."""
    before = endpoint.told().cached
    with ThreadPoolExecutor(len(batch)) as pool:
        try:
            answers = [*pool.map(endpoint.ask, batch)]
        except BaseException:  # Ctrl-C among them: threads that wait for an answer would go on
            endpoint.abort()
            raise
    after = endpoint.told().cached
    grown = [source for source, tokens in after.items() if tokens > before.get(source, 0.0)]
    source = grown[0] if len(grown) == 1 else UNTOLD
    return [Sample(length, share, len(batch), source if answer.cached_tokens else "", answer) for answer in answers]


def _try(endpoint: Endpoint, prompts: Prompts) -> None:
    """Find out whether it takes token ids, or words. Raises UnreachableError where it takes neither."""
    answer = endpoint.ask(prompts.fresh(PROBE_TOKENS))
    if answer.trouble:
        prompts.tokens_per_word = 1.0
        words = endpoint.ask(prompts.fresh(PROBE_TOKENS))
        if words.trouble or not words.prompt_tokens:
            why = words.trouble or "it does not count their tokens"
            raise UnreachableError(
                f"{endpoint.url} completes no prompt of token ids ({answer.trouble}), and none of words ({why})",
                hint=_HINT,
            )
        prompts.tokens_per_word = words.prompt_tokens / PROBE_TOKENS


def _answer(seconds: float, rest_seconds: float, usage: _Usage | None) -> Answer:
    if usage is None:
        return Answer(seconds)
    details = usage.prompt_tokens_details
    count = usage.completion_tokens - 1
    return Answer(
        seconds,
        rest_seconds / count if count > 0 and rest_seconds > 0 else None,
        usage.prompt_tokens or None,
        None if details is None else details.cached_tokens,
    )


def _named(error: Exception) -> str:
    return _plain(str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """What a server says, as far as a terminal can show it without harm."""
    return "".join(each if each.isprintable() else " " for each in text)[:EXCERPT_BYTES].strip()
