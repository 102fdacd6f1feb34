"""Request traces: when prompts came, which share a prefix, and how long their answers were. One value for all formats.

| format | told by | blocks |
|---|---|---|
| Mooncake (JSON lines) | `hash_ids` | named by the trace; their size follows from `input_length` |
| kv-cache-tester (JSON lines, one conversation a line) | `req` with runs | 64 tokens, mixed as `Mix` says |
| LMCache agent traces (JSON lines) | `input`, `session_id` | of 64 characters; four characters are taken for a token |
| Azure LLM inference (CSV) | `ContextTokens` | none: lengths and arrivals only |

A file may be packed (.xz, .gz). Lines that cannot be read are passed over and counted. Sizes are bounded; what was left
out is said in `Trace.notes`.
"""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, compress
from pathlib import Path
from random import Random
from typing import IO, Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from thermocline.errors import TraceError

LINE_BYTES_MAX = 64 << 20
LINES_MAX = 4_000_000
BLOCKS_MAX = 100_000_000
"""References to blocks in one trace, of four bytes each."""

CHARACTERS_PER_TOKEN = 4
TEXT_BLOCK_CHARACTERS = 64
SIZES = (512, 16, 32, 64, 128, 256, 1024, 2048)
"""Tokens per block that are looked for in traces which do not name it; the first is Mooncake's own."""

SESSION_REQUESTS_MIN, SESSION_SHARE = 20, 0.005
"""A block that fewer requests than this contain, and than this share of all, is taken to belong to one session."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
Name = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Time = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
Blocks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Mix:
    """How conversations that were recorded one by one become one stream of requests.

    Conversations are drawn with `seed` and start at random, every `start_seconds` on average; pauses are cut to
    `pause_seconds_max`; blocks are coarsened to `tokens_per_block`; equal tools and system prompts are shared.
    Requests of sub-agents, whose clocks begin with them, stay where the file has them, as in the published tables.
    """

    conversations: int = 150
    seed: int = 1
    start_seconds: float = 30.0
    pause_seconds_max: float = 600.0
    tokens_per_block: int = 512


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order they came, as columns. A block's number stands for a whole prefix, up to its end.

    The blocks of request n are `path(n)`; the last one may be a part. `sessions` numbers sessions from 0; -1 where none
    is known. `tokens_per_block` is 0 where the trace tells nothing of prefixes: then there are no blocks.
    """

    name: str
    tokens_per_block: int
    arrival_seconds: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    sessions: NDArray[np.int64]
    blocks: NDArray[np.int32]
    starts: NDArray[np.int64]
    distinct_blocks: int
    skipped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_seconds)

    def path(self, request: int) -> NDArray[np.int32]:
        """The blocks of a prompt, first to last."""
        return self.blocks[self.starts[request] : self.starts[request + 1]]

    @property
    def has_blocks(self) -> bool:
        """True if the trace tells which prompts share a prefix."""
        return self.tokens_per_block > 0

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return float(self.arrival_seconds[-1] - self.arrival_seconds[0]) if len(self) else 0.0

    @property
    def arrivals_per_second(self) -> float:
        """Mean rate; 0 where all came at once."""
        return (len(self) - 1) / self.seconds if self.seconds else 0.0

    @property
    def arrival_cv(self) -> float:
        """Standard deviation over mean of the times between requests: 1 is Poisson, above it is bursty."""
        gaps = np.diff(self.arrival_seconds)
        return float(gaps.std() / gaps.mean()) if self.seconds else 0.0


def read(path: Path, mix: Mix | None = None) -> Trace:
    """Read a trace. `mix` is used where conversations were recorded one by one.

    Raises TraceError where the file cannot be read, is of no format we know, or holds no request.
    """
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            return parse(file, str(path), mix)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise TraceError(
            f"the trace {path} cannot be read: {error}", hint="name a file of requests, or an .xz"
        ) from error


def parse(file: IO[bytes], name: str, mix: Mix | None = None) -> Trace:
    """The trace in an open file, which is at `name`. Raises as `read`, and as the file does."""
    rows = _read(file, mix or Mix())
    if not rows.inputs:
        raise TraceError(f"the trace {name} holds no request", hint=f"formats: {', '.join(_FORMATS)}")
    return rows.trace(Path(name).name.partition(".")[0])


_OPEN: dict[str, Callable[..., IO[bytes]]] = {".xz": lzma.open, ".gz": gzip.open}  # type: ignore[dict-item]  # read as bytes


@dataclass(slots=True)
class _Rows:
    """What was read so far."""

    tokens_per_block: int = 0
    arrivals: list[float] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    sessions: list[str | None] = field(default_factory=list)
    paths: list[Blocks] = field(default_factory=list)
    references: int = 0
    lines: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """As much as we take."""
        return self.lines >= LINES_MAX or self.references >= BLOCKS_MAX

    def add(self, at: float, inputs: int, outputs: int, session: str | None, path: Blocks) -> None:
        """One more request."""
        self.arrivals.append(at)
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        self.sessions.append(session)
        self.paths.append(path)
        self.references += len(path)

    def keep(self, chosen: Sequence[bool]) -> None:
        """Pass over all requests but these."""
        self.skipped += len(chosen) - sum(chosen)
        columns: tuple[list[Any], ...] = (self.arrivals, self.inputs, self.outputs, self.sessions, self.paths)
        for column in columns:
            column[:] = compress(column, chosen)

    def trace(self, name: str) -> Trace:
        """All of them in the order they came."""
        order = np.argsort(np.array(self.arrivals), kind="stable")
        arrivals = np.array(self.arrivals)[order]
        starts = np.concatenate([[0], np.cumsum([len(self.paths[at]) for at in order])])
        flat = np.concatenate([self.paths[at] for at in order])
        blocks, distinct = _chained(flat, starts)
        numbers: dict[str, int] = defaultdict(lambda: len(numbers))
        named = (self.sessions[at] for at in order)
        sessions = np.array([-1 if name is None else numbers[name] for name in named])
        notes = list(self.notes)
        if len(blocks) and (sessions < 0).all():
            sessions = _sessions(blocks, starts, distinct)
            notes.append("sessions are told apart by the first block that few requests share: the trace names none")
        if not any(self.outputs):
            notes.append("the trace does not tell how long the answers were")
        if self.skipped:
            notes.append(f"{self.skipped:,} lines or requests of the trace were passed over: they cannot be read")
        if self.full:
            notes.append(f"only the first {len(arrivals):,} requests were read: the trace is larger than we take")
        return Trace(
            name=name,
            tokens_per_block=self.tokens_per_block,
            arrival_seconds=arrivals - arrivals[0],
            input_tokens=np.array(self.inputs)[order],
            output_tokens=np.array(self.outputs)[order],
            sessions=sessions,
            blocks=blocks,
            starts=starts,
            distinct_blocks=distinct,
            skipped=self.skipped,
            notes=tuple(notes),
        )


def _read(file: IO[bytes], mix: Mix) -> _Rows:
    rows = _Rows()
    lines = _lines(file, rows)
    first = next(lines, b"")
    reader = next((reader for mark, reader in _FORMATS.items() if mark.encode() in first), None)
    if reader is None:
        raise TraceError(
            "the trace is of no format we know", hint=f"its first line names one of: {', '.join(_FORMATS)}"
        )
    reader(chain([first], lines), rows, mix)
    return rows


def _lines(file: IO[bytes], rows: _Rows) -> Iterator[bytes]:
    """Lines that are not empty, until there is as much as we take. One that is too long is passed over."""
    while not rows.full and (line := file.readline(LINE_BYTES_MAX)):
        rows.lines += 1
        if len(line) == LINE_BYTES_MAX and not line.endswith(b"\n"):
            rows.skipped += 1
            while (rest := file.readline(LINE_BYTES_MAX)) and not rest.endswith(b"\n"):
                pass
        elif not line.isspace():
            yield line


def _decoded(lines: Iterator[bytes], rows: _Rows, shape: Any) -> Iterator[Any]:  # noqa: ANN401  # a Struct of ours
    decoder = msgspec.json.Decoder(shape)
    for line in lines:
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            rows.skipped += 1


# -- formats -----------------------------------------------------------------------------------------------------------


class _Hashed(msgspec.Struct, frozen=True):
    timestamp: Time
    input_length: Count
    output_length: Count
    hash_ids: list[Name]
    session_id: str | None = None


def _read_hashed(lines: Iterator[bytes], rows: _Rows, mix: Mix) -> None:  # noqa: ARG001  # it is one stream already
    fitting: Counter[int] = Counter()
    for row in _decoded(lines, rows, _Hashed):
        path = np.array(row.hash_ids, np.int64)
        fitting.update(size for size in SIZES if _fits(size, row.input_length, path))
        rows.add(row.timestamp / 1000, row.input_length, row.output_length, row.session_id, path)
    rows.tokens_per_block = size = max(SIZES, key=lambda size: fitting[size])
    rows.keep([_fits(size, tokens, path) for tokens, path in zip(rows.inputs, rows.paths, strict=True)])


def _fits(size: int, tokens: int, path: Blocks) -> bool:
    return -(-tokens // size) == len(path)


Run = tuple[Count, Count]


class _Conversation(msgspec.Struct, frozen=True):
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    tool: Count
    sys: Count
    req: list[tuple[Time, Count, Count, list[Run], Any, Any]]


def _read_conversations(lines: Iterator[bytes], rows: _Rows, mix: Mix) -> None:
    """The recipe of the mix is that of the published tables: see docs/guides/size.md."""
    random = Random(mix.seed)  # noqa: S311  # a trace, no secret
    found = list(_decoded(lines, rows, _Conversation))
    drawn = [each for each in found if mix.tokens_per_block % each.block_size == 0]
    rows.skipped += len(found) - len(drawn)
    random.shuffle(drawn)
    shared: dict[tuple[int, int], int] = {}
    start, base = 0.0, 1_000_000
    for number, each in enumerate(drawn[: mix.conversations]):
        start += random.expovariate(1 / mix.start_seconds)
        prefix = shared.setdefault((each.tool, each.sys), len(shared)) * 1000
        common = (each.tool + each.sys) // mix.tokens_per_block
        step = mix.tokens_per_block // each.block_size
        latest = shift = 0.0
        for at, inputs, outputs, runs, *_ in each.req:
            if sum(count for _, count in runs) > BLOCKS_MAX - rows.references:
                rows.skipped += 1
                continue
            shift += max(0.0, at - latest - mix.pause_seconds_max)
            latest = max(latest, at)
            path = base + _expanded(runs)[step - 1 :: step]
            path[:common] = prefix + np.arange(len(path[:common]))
            if len(path):
                rows.add(start + at - shift, inputs, outputs, str(number), path)
        base += max((first + count for request in each.req for first, count in request[3]), default=0) + 10
    rows.tokens_per_block = mix.tokens_per_block
    rows.notes.append(
        f"{min(mix.conversations, len(drawn))} conversations of {len(drawn)}, drawn with seed {mix.seed}, start every "
        f"{mix.start_seconds:g} s on average; pauses are cut to {mix.pause_seconds_max:g} s"
    )


def _expanded(runs: Sequence[Run]) -> Blocks:
    return np.concatenate([np.arange(first, first + count) for first, count in runs] or [np.arange(0)])


class _Text(msgspec.Struct, frozen=True):
    timestamp: Time
    input: str
    output: str
    session_id: str


def _read_texts(lines: Iterator[bytes], rows: _Rows, mix: Mix) -> None:  # noqa: ARG001  # it is one stream already
    numbers: dict[str, int] = defaultdict(lambda: len(numbers))
    size = TEXT_BLOCK_CHARACTERS
    for row in _decoded(lines, rows, _Text):
        whole = len(row.input) // size * size
        path = np.array([numbers[row.input[at : at + size]] for at in range(0, whole, size)], int)
        rows.add(row.timestamp / 1e6, _tokens(row.input), _tokens(row.output), row.session_id, path)
    rows.tokens_per_block = size // CHARACTERS_PER_TOKEN
    rows.notes.append(f"the trace is text: {CHARACTERS_PER_TOKEN} characters are taken for a token")


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def _read_lengths(lines: Iterator[bytes], rows: _Rows, mix: Mix) -> None:  # noqa: ARG001  # it is one stream already
    wanted = [b"TIMESTAMP", b"ContextTokens", b"GeneratedTokens"]
    head = next(lines).strip().split(b",")
    columns = [head.index(name) for name in wanted if name in head]
    nothing = np.arange(0)
    for line in lines:
        cells = line.strip().split(b",")
        try:
            moment, inputs, outputs = (cells[column] for column in columns)
            at = datetime.fromisoformat(moment[:26].decode()).replace(tzinfo=UTC).timestamp()
            lengths = msgspec.convert([int(inputs), int(outputs)], tuple[Count, Count])
        except (IndexError, ValueError):  # msgspec's and unicode's errors are of the latter kind
            rows.skipped += 1
            continue
        rows.add(at, *lengths, None, nothing)
    rows.notes.append("the trace tells lengths and arrivals only: nothing is known of shared prefixes")


_FORMATS: dict[str, Callable[[Iterator[bytes], _Rows, Mix], None]] = {
    '"hash_ids"': _read_hashed,
    '"req"': _read_conversations,
    '"session_id"': _read_texts,
    "ContextTokens": _read_lengths,
}


# -- paths -------------------------------------------------------------------------------------------------------------


def _chained(flat: Blocks, starts: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Blocks numbered from 0 such that a number stands for a whole prefix, and how many there are.

    Most traces name prefixes already: then each number has one parent. Where it has several, it names content, and is
    numbered again by (parent, content).
    """
    names, dense = np.unique(flat, return_inverse=True)
    parents = np.concatenate([[-1], dense[:-1]]) if len(dense) else dense
    parents[starts[:-1][starts[:-1] < len(dense)]] = -1
    parent_of = np.full(len(names), -2)
    parent_of[dense] = parents
    if (parent_of[dense] == parents).all():
        return dense.astype(np.int32), len(names)
    numbers: dict[tuple[int, int], int] = defaultdict(lambda: len(numbers))
    renumbered = np.empty(len(dense), np.int32)
    firsts, behind = set(starts[:-1].tolist()), -1
    for at, content in enumerate(dense.tolist()):
        behind = numbers[-1 if at in firsts else behind, content]
        renumbered[at] = behind
    return renumbered, len(numbers)


def _sessions(blocks: NDArray[np.int32], starts: NDArray[np.int64], distinct: int) -> NDArray[np.int64]:
    uses = np.bincount(blocks, minlength=distinct)
    rare = uses < max(SESSION_REQUESTS_MIN, SESSION_SHARE * (len(starts) - 1))
    found = np.full(len(starts) - 1, -1)
    for request, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        if stop > start:
            path = blocks[start:stop]
            own = int(rare[path].argmax())
            found[request] = path[own] if rare[path[own]] else path[-1]
    known = found >= 0
    found[known] = np.unique(found[known], return_inverse=True)[1]
    return found
