"""What running servers, nodes and gateways say of themselves, over a few seconds: metrics, receipts, decisions, events.

Reading only. What it means is `doctor`'s to say, from these values and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import msgspec

from thermocline.clock import Clock
from thermocline.errors import ThermoclineError, UnreachableError
from thermocline.lens import decision, fetch, ps, report
from thermocline.metrics import PREFIX
from thermocline.store.receipt import Reason, Receipt
from thermocline.wire.events import AllBlocksCleared, BlockRemoved, BlockStored, Hash, read_batch, read_topic
from thermocline.wire.messages import MessageError
from thermocline.wire.status import NodeStatus

VLLM = "vllm:"
TEXT_BYTES_MAX, LINE_CHARACTERS_MAX, SAMPLES_MAX, VALUE_MAX = 8 << 20, 16 << 10, 50_000, 1e30
LOOKS = 8
"""How often gauges are read within the time: a queue is not told from a moment."""
RECEIPTS_READ, DECISIONS_READ = 10_000, 1000
HASHES_MAX = 1 << 20
TOKENS_MAX, SECONDS_MAX = 1 << 40, 1e9
"""What a receipt may say of one request."""
_PROGRESS = ("prompt_tokens_total", "matches_total", "vllm:prompt_tokens_total")
_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')

Labels = tuple[tuple[str, str], ...]


class Kind(StrEnum):
    """What was looked at."""

    SERVER = "server"
    NODE = "node"
    GATEWAY = "gateway"
    EVENTS = "events"


@dataclass(frozen=True, slots=True)
class Scrape:
    """Metrics at one time: of each name the series. Our own names come without their prefix, vLLM's as they are.

    `skipped` lines were no samples, or beyond the bounds.
    """

    at_seconds: float
    series: Mapping[str, Sequence[tuple[Labels, float]]]
    skipped: int = 0

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the series with these labels; None where there is none."""
        found = [value for has, value in self.series.get(name, ()) if labels.items() <= dict(has).items()]
        return math.fsum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric by one of its labels."""
        values: dict[str, list[float]] = {}
        for has, value in self.series.get(name, ()):
            values.setdefault(dict(has).get(label, ""), []).append(value)
        return {key: math.fsum(values[key]) for key in sorted(values)}


NOTHING = Scrape(0.0, {})


def parse(text: bytes | str, at_seconds: float = 0.0) -> Scrape:
    """Metrics in the Prometheus text format, as far as the doctor reads them. Never raises; bounded in size."""
    if isinstance(text, bytes):
        text = text[:TEXT_BYTES_MAX].decode(errors="replace")
    series: dict[str, list[tuple[Labels, float]]] = {}
    count = skipped = 0
    for line in text[:TEXT_BYTES_MAX].split("\n"):
        name = line.removeprefix(PREFIX)
        if name == line and not line.startswith(VLLM):
            continue
        found = _LINE.match(name) if len(name) <= LINE_CHARACTERS_MAX and count < SAMPLES_MAX else None
        value = number(found[3]) if found else math.nan
        if found is None or not 0 <= value <= VALUE_MAX:  # nothing that we count is below nothing
            skipped += 1
            continue
        count += 1
        series.setdefault(found[1], []).append((tuple(_LABEL.findall(found[2] or "")), value))
    return Scrape(at_seconds, series, skipped)


def number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True, slots=True)
class Heard:
    """The KV events of one sender while it was listened to.

    `texts` are blocks that begin one, `salted` those of them with a salt that no other text had. Of the blocks stored,
    `again` had been removed from the same sender before, and `elsewhere` were held by another. `late_seconds` is the
    mean time from sending to hearing, by two clocks.
    """

    name: str
    batches: int = 0
    stored: int = 0
    removed: int = 0
    again: int = 0
    elsewhere: int = 0
    texts: int = 0
    salted: int = 0
    lost: int = 0
    unreadable: int = 0
    late_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One source over some seconds: `scrapes` are in the order of time. A source without metrics has none.

    What could not be read is None, or empty, and in `untold`: what was asked, and what came instead.
    """

    kind: Kind
    name: str
    scrapes: tuple[Scrape, ...] = ()
    receipts: tuple[Receipt, ...] | None = None
    instances: tuple[ps.Routed, ...] = ()
    decisions: tuple[decision.Decided, ...] = ()
    events: tuple[Heard, ...] | None = None
    untold: tuple[tuple[str, str], ...] = ()

    @property
    def last(self) -> Scrape:
        """The latest metrics."""
        return self.scrapes[-1] if self.scrapes else NOTHING

    @property
    def first(self) -> Scrape:
        """What counting begins at: nothing, where no request came while we looked, so that all before counts."""
        first = self.scrapes[0] if self.scrapes else NOTHING
        return first if any(_grew(first, self.last, name) for name in _PROGRESS) else NOTHING

    @property
    def is_vllm(self) -> bool:
        """True for a vLLM server."""
        return any(name.startswith(VLLM) for name in self.last.series)

    @property
    def seconds(self) -> float:
        """How long was counted; 0 where it is all since the start."""
        return self.last.at_seconds - self.first.at_seconds if self.first.series else 0.0

    def counted(self, name: str, **labels: str) -> float:
        """How far a counter came. One that goes back has begun anew."""
        last, first = self.last.value(name, **labels) or 0.0, self.first.value(name, **labels) or 0.0
        return last - first if last >= first else last

    def counted_by(self, name: str, label: str) -> dict[str, float]:
        """The same by one of its labels, without what stood still."""
        found = {value: self.counted(name, **{label: value}) for value in self.last.by(name, label)}
        return {value: count for value, count in found.items() if count}

    def gauge(self, name: str, **labels: str) -> float | None:
        """What a gauge says now."""
        return self.last.value(name, **labels)

    @property
    def returns(self) -> int:
        """Prompts that found something, of those with a receipt."""
        return sum(1 for each in self.receipts or () if each.loaded_tokens)

    @property
    def idle_tiers(self) -> dict[str, float]:
        """Full tiers in which what leaves next is idle for longer than any that came back was, and for how long."""
        longest = self.gauge("reuse_gap_max_seconds")
        idle = self.last.by("tier_idle_seconds", "tier") if longest is not None else {}
        full = {tier for tier in idle if self.last.value("evicted_blocks_total", tier=tier, reason=Reason.EVICTED)}
        return {tier: seconds for tier, seconds in idle.items() if tier in full and seconds > (longest or 0.0)}


def _grew(first: Scrape, last: Scrape, name: str) -> bool:
    return (last.value(name) or 0.0) > (first.value(name) or 0.0)


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where to look, and how: each function is a question, which may raise ThermoclineError."""

    kind: Kind
    name: str
    metrics: Callable[[], bytes | str]
    receipts: Callable[[], tuple[Receipt, ...]] | None = None
    trace: Callable[[], bytes] | None = None


def of_url(url: str, api_key_file: Path | None = None) -> Source:
    """A server: vLLM's or ours. Raises SettingsError for a URL with a password, which would be shown."""
    fetch.refuse_password(url)
    return Source(
        Kind.SERVER,
        url,
        lambda: fetch.metrics(url, api_key_file),
        lambda: report.read_list(fetch.receipts(url, RECEIPTS_READ, api_key_file)).data,
        lambda: fetch.trace(url, api_key_file),
    )


def of_node(path: Path, ask: NodeQuestions) -> Source:
    """A node, by the questions that a command may ask it."""

    def read() -> tuple[Receipt, ...]:
        return msgspec.json.decode(ask.receipts(path, "", RECEIPTS_READ), type=tuple[Receipt, ...])

    return Source(Kind.NODE, str(path), lambda: ask.metrics(path), read, lambda: ask.trace(path))


def of_gateway(path: Path) -> Source:
    """A gateway, by its admin socket."""
    return Source(
        Kind.GATEWAY, str(path), lambda: decision.ask(path, "/metrics")[1], trace=lambda: decision.trace(path)
    )


def instances_of(gateway: Path) -> int:
    """How many instances a gateway has: at least 1. Raises UnreachableError where none answers."""
    found = ps.gateway(gateway)
    if found is None:
        hint = "`thermocline ps` prints where gateways are administered"
        raise UnreachableError(f"no gateway answers at {gateway}", hint=hint)
    return max(1, len(found.instances))


def watch(sources: Sequence[Source], seconds: float, clock: Clock) -> tuple[Watched, ...]:
    """Look at all of them at once, several times within `seconds`. What does not answer is said in `untold`."""
    seen = [_Seen(source) for source in sources]
    looks = LOOKS if seconds else 0
    for look in range(looks + 1):
        for each in seen:
            each.look(clock)
        if look < looks:
            clock.sleep(seconds / looks)
    return tuple(each.watched() for each in seen)


@dataclass(slots=True)
class _Seen:
    source: Source
    scrapes: list[Scrape] = field(default_factory=list)
    untold: dict[tuple[str, str], None] = field(default_factory=dict)

    def look(self, clock: Clock) -> None:
        try:
            told = parse(self.source.metrics(), clock.now())
        except ThermoclineError as error:
            self.untold["metrics", error.message] = None
            return
        if told.series:
            self.scrapes.append(told)
        else:
            self.untold["metrics", f"what {self.source.name} answers are no metrics of vLLM or thermocline"] = None

    def watched(self) -> Watched:
        kind, name = self.source.kind, self.source.name
        receipts, (instances, decisions) = self._receipts(), _routed(Path(name)) if kind is Kind.GATEWAY else ((), ())
        return Watched(
            kind=kind,
            name=name,
            scrapes=tuple(self.scrapes),
            receipts=receipts,
            instances=instances,
            decisions=decisions,
            untold=tuple(self.untold),
        )

    def _receipts(self) -> tuple[Receipt, ...] | None:
        ours = self.scrapes and not any(name.startswith(VLLM) for name in self.scrapes[-1].series)
        if self.source.receipts is None or not ours:
            return None
        try:
            told = self.source.receipts()
        except (ThermoclineError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.untold["receipts", getattr(error, "message", str(error))] = None
            return None
        sound = tuple(filter(_is_sound, told))
        if len(sound) < len(told):
            self.untold["receipts", f"{len(told) - len(sound):,} of them have figures that cannot be"] = None
        return sound


def _is_sound(told: Receipt) -> bool:
    """Figures that can be: none below nothing, none beyond all bounds."""
    counts = (told.prompt_tokens, told.loaded_tokens, told.computed_tokens, *told.by_tier.values())
    planned = (told.planned_load_seconds, told.planned_recompute_seconds, told.planned_cold_seconds)
    seconds = (told.match_seconds, told.load_seconds, told.prefill_seconds, *planned)
    whole = 1 <= told.tokens_per_block <= TOKENS_MAX and all(0 <= each <= TOKENS_MAX for each in counts)
    return whole and all(0 <= each <= SECONDS_MAX for each in seconds)


def _routed(admin: Path) -> tuple[tuple[ps.Routed, ...], tuple[decision.Decided, ...]]:
    found = ps.gateway(admin)
    try:
        status, body = decision.ask(admin, f"/decisions?limit={DECISIONS_READ}")
        decided = msgspec.json.decode(body, type=tuple[decision.Decided, ...]) if status == HTTPStatus.OK else ()
    except (ThermoclineError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decided = ()
    return found.instances if found else (), decided


class Ear:
    """Takes batches of KV events from a `Subscriber`, and adds them up by sender. Holds at most HASHES_MAX hashes."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._began = clock, clock.now()
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}
        self._late: dict[str, float] = {}
        self._numbers: dict[str, int] = {}
        self._held: dict[str, set[Hash]] = {}
        self._gone: dict[str, set[Hash]] = {}
        self._salts: dict[str, Counter[bytes]] = {}
        self._hashes = 0

    def take(self, source: str, sequence: int, payload: bytes) -> None:
        """One batch, as it was heard now."""
        self.hear(source, sequence, payload, self._clock.wall())

    def hear(self, source: str, sequence: int, payload: bytes, wall_seconds: float) -> None:
        """One batch, heard at `wall_seconds` since 1970."""
        topic = read_topic(source)
        name = topic.name if topic else source
        with self._lock:
            counts = self._counts.setdefault(name, Counter())
            before, self._numbers[source] = self._numbers.get(source), sequence
            counts["lost"] += sequence - before - 1 if before is not None and sequence > before else 0
            try:
                batch = read_batch(payload)
            except MessageError:
                counts["unreadable"] += 1
                return
            counts["batches"] += 1
            counts["unreadable"] += batch.skipped
            self._late[name] = self._late.get(name, 0.0) + wall_seconds - batch.seconds
            for event in batch.events:
                if isinstance(event, BlockStored):
                    self._stored(name, event, counts)
                elif isinstance(event, BlockRemoved):
                    self._left(name, event.hashes, counts)
                elif isinstance(event, AllBlocksCleared):
                    self._held[name] = set()  # on purpose: what is stored again was not dropped for room

    def _stored(self, name: str, event: BlockStored, counts: Counter[str]) -> None:
        held, gone = self._held.setdefault(name, set()), self._gone.setdefault(name, set())
        fresh = set(event.hashes) - held
        counts["stored"] += len(fresh)
        counts["again"] += len(fresh & gone)
        others = [hashes for other, hashes in self._held.items() if other != name]
        counts["elsewhere"] += sum(1 for each in fresh - gone if any(each in hashes for hashes in others))
        if event.parent is None and fresh:
            counts["texts"] += 1
            salt = next((words[-1] for words in event.extra_keys or () if words), "")
            digest = hashlib.sha256(str(salt).encode()).digest() if salt else b""
            self._salts.setdefault(name, Counter())[digest] += 1
        if self._hashes < HASHES_MAX:
            self._hashes += len(fresh)
            held |= fresh

    def _left(self, name: str, hashes: Iterable[Hash], counts: Counter[str]) -> None:
        left = self._held.setdefault(name, set()).intersection(hashes)
        counts["removed"] += len(left)
        self._held[name] -= left
        self._gone.setdefault(name, set()).update(left)

    def watched(self, endpoint: str) -> Watched:
        """All of it, as one source."""
        scrapes = (Scrape(self._began, {}), Scrape(self._clock.now(), {}))
        return Watched(kind=Kind.EVENTS, name=endpoint, scrapes=scrapes, events=self.heard())

    def heard(self) -> tuple[Heard, ...]:
        """What was heard so far, by sender."""
        with self._lock:
            return tuple(
                Heard(
                    name,
                    **{key: counts[key] for key in _COUNTS},
                    salted=sum(1 for salt, times in self._salts.get(name, {}).items() if salt and times == 1),
                    late_seconds=self._late.get(name, 0.0) / max(1, counts["batches"]),
                )
                for name, counts in sorted(self._counts.items())
            )


_COUNTS = ("batches", "stored", "removed", "again", "elsewhere", "texts", "lost", "unreadable")


# -- what there is to look at ------------------------------------------------------------------------------------------

DEFAULT_URL = "http://127.0.0.1:8000"


class NodeQuestions(Protocol):
    """What a command may ask a node: `thermocline.node.ask`."""

    def status(self, path: Path) -> NodeStatus:
        """Who it is."""

    def metrics(self, path: Path) -> str:
        """What it counts."""

    def receipts(self, path: Path, request: str, count: int = 1) -> bytes:
        """JSON: its last receipts."""

    def trace(self, path: Path) -> bytes:
        """Lines of JSON: its last requests."""


def answered(watched: Sequence[Watched]) -> None:
    """Raise UnreachableError where only servers were asked, and none told its metrics: then nothing is known."""
    if watched and all(each.kind is Kind.SERVER and not each.scrapes for each in watched):
        told = "; ".join(dict.fromkeys(why for each in watched for _, why in each.untold))
        raise UnreachableError(f"nothing that was asked has metrics: {told}", hint="is it up, and vLLM's or ours?")


def named(
    urls: Sequence[str], nodes: Sequence[str], gateways: Sequence[str], api_key_file: Path | None, ask: NodeQuestions
) -> list[Source]:
    """The sources that were named, and the instances of the gateways."""
    sources = [of_url(url, api_key_file) for url in urls]
    sources += [of_node(Path(path), ask) for path in nodes]
    for path in gateways:
        sources += [of_gateway(Path(path)), *_instances_of(ps.gateway(Path(path)), api_key_file)]
    return _once(sources)


def found(sockets: Sequence[Path], api_key_file: Path | None, ask: NodeQuestions) -> list[Source]:
    """What answers at these sockets and at DEFAULT_URL. Raises UnreachableError where nothing does."""
    seen = ps.look(sockets, ask.status)
    sources = [of_node(Path(node.socket), ask) for node in seen.nodes]
    for gateway in seen.gateways:
        sources += [of_gateway(Path(gateway.socket)), *_instances_of(gateway, api_key_file)]
    with contextlib.suppress(ThermoclineError):
        fetch.metrics(DEFAULT_URL, api_key_file)
        sources.append(of_url(DEFAULT_URL, api_key_file))
    if not sources:
        hint = "name a server with --url, or a socket with --node or --gateway"
        raise UnreachableError(
            f"no node or gateway of this user runs here, and {DEFAULT_URL} has no metrics", hint=hint
        )
    return _once(sources)


def _instances_of(gateway: ps.GatewayStatus | None, api_key_file: Path | None) -> list[Source]:
    return [of_url(each.url, api_key_file) for each in gateway.instances] if gateway else []


def _once(sources: Iterable[Source]) -> list[Source]:
    return list({(source.kind, source.name.rstrip("/")): source for source in sources}.values())
