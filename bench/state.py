"""The four lookups of a chat request on a real Redis: redis-py, and the same code with three lines changed.

A blob of 2 or 8 MB as KV caches are kept, an embedding with ten chunk texts, a session of twenty turns, a routing
table. Every arm reads the same values; they come back as bytes, but for `typed`, which reads them as what they mean.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import CLOCK, Check, Progress, Report, check, percentile, ratios, saved, spread
from bench.near import free_port
from thermocline.demo import local_redis
from thermocline.errors import BenchError, TierError

MIB = 1 << 20
SIZES = {"2 MB": (2 * MIB, 200), "8 MB": (8 * MIB, 100)}
"""Bytes of the blob, and how many requests each arm makes."""
SESSIONS, TURNS, TURN_CHARACTERS = 8, 20, 400
CHUNKS, CHUNK_CHARACTERS, DIMENSION = 10, 1_000, 768
LOOKUPS = ("blob", "embedding + chunks", "session", "routing")
PLAIN, PIPELINE = "redis-py", "redis-py, one pipeline"
COLD, TURN, WARM = "ours, cold", "ours, after a turn", "ours, warm"
TYPED, AHEAD = "ours, typed, after prefetch", "ours, prefetch"
WARM_MIN, TURN_MIN, COLD_SECONDS_MAX = 20.0, 5.0, 1e-3
"""The last is what a cache may cost a request that finds nothing: a house law, not a figure of this bench."""
Times = dict[str, list[float]]


def run(progress: Progress) -> Report:
    """Both sizes, each on a server of its own."""
    checks: list[Check] = []
    details: dict[str, Any] = {"ratios": {}, "arms": {}, "lookups": {}, "notes": []}
    try:
        import hiredis
        import redis
    except ImportError:
        raise BenchError("redis-py and hiredis are not installed", hint="pip install -e '.[bench]'") from None
    for size, (blob_bytes, requests) in SIZES.items():
        progress(f"blobs of {size}")
        try:
            with ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="thermocline-bench-"))
                server = stack.enter_context(local_redis.running(Path(folder), port=free_port()))
                times = _measured(stack, server.url, blob_bytes, requests, progress)
        except TierError as error:
            raise BenchError(error.message, hint=error.hint) from None
        checks += _judged(size, times, details)
    details["notes"] += [
        f"redis-py {redis.__version__}, hiredis {hiredis.__version__}; redis-server over loopback, on the same cores.",
        f"{CHUNKS} chunks of {CHUNK_CHARACTERS} characters, {DIMENSION} float32, {TURNS} turns of {TURN_CHARACTERS}.",
        f"{SESSIONS} sessions in turn. Nothing is computed with what is read.",
        f"`{TURN}`: another client has appended a turn before each request, and the link has told; the rest is held.",
        f"`{AHEAD}`: everything cold, one round trip; `{TYPED}`: the request that follows it.",
        "Wall time. What is warm is a reference to bytes in this process; what is cold crosses loopback, no network.",
    ]
    return Report(checks, details)


def _judged(size: str, times: dict[str, Times], details: dict[str, Any]) -> Iterator[Check]:
    totals = {arm: [sum(parts) for parts in zip(*rows.values(), strict=True)] for arm, rows in times.items()}
    for arm, taken in totals.items():
        details["arms"][f"{size}: {arm}"] = spread(taken)
    for arm, rows in times.items():
        both = {name: (percentile(taken, 0.5), percentile(taken, 0.99)) for name, taken in rows.items()}
        both["total"] = percentile(totals[arm], 0.5), percentile(totals[arm], 0.99)
        details["lookups"][f"{size}: {arm}"] = {name: {"p50": low, "p99": high} for name, (low, high) in both.items()}
        said = ", ".join(f"{name} {low * 1e6:,.4g} / {high * 1e6:,.4g}" for name, (low, high) in both.items())
        details["notes"].append(f"{size}, {arm}, us p50 / p99: {said}")
    for above, below, target in ((PLAIN, WARM, WARM_MIN), (PLAIN, TURN, TURN_MIN)):
        name = f"{size}: {above} / {below}"
        row = details["ratios"][name] = spread(ratios(totals[above], totals[below]))
        yield check(name, row["median"], "x", target, "higher")
    for ours, theirs in ((COLD, PLAIN), (AHEAD, PIPELINE)):
        name = f"{size}: {ours}, beyond {theirs}"
        more = [a - b for a, b in zip(totals[ours], totals[theirs], strict=True)]
        row = details["arms"][name] = spread(more)
        yield check(name, row["median"], "s", COLD_SECONDS_MAX, "lower")


# -- what is there -----------------------------------------------------------------------------------------------------


class Names:
    """The keys of one session's request, and the questions that read the same."""

    def __init__(self, number: int, session: str = "s") -> None:
        from thermocline.near import Chunks, Embeddings, Routes, Sessions, Space

        space = Space("bench")
        self.session, self.query = f"{session}{number}", f"What does session {number} ask?"
        self.ids = [f"{number}-{at}" for at in range(CHUNKS)]
        self.sessions, self.embeddings = Sessions(space), Embeddings("model", space)
        self.chunks, self.routes = Chunks(space), Routes(space)
        self.questions = (
            self.embeddings.get(self.query),
            self.chunks.get(*self.ids),
            self.sessions.turns(self.session),
            self.routes.table("chat"),
        )
        self.blob = space.key("blob", str(number))
        self.embedding, self.list, self.table = (str(self.questions[at].commands[0][1]) for at in (0, 2, 3))
        self.texts = [str(key) for key in self.questions[1].commands[0][1:]]


def _fill(client: Any, names: Names, blob_bytes: int) -> None:  # noqa: ANN401  # a client of another package
    from thermocline.near import State, Turn

    state, chance = State(client), np.random.default_rng(7)
    client.set(names.blob, os.urandom(blob_bytes))
    turns = [Turn("user", "x" * TURN_CHARACTERS) for _ in range(TURNS)]
    for session in (names.session, names.session.replace("s", "t")):
        state.ask(names.sessions.append(session, *turns))
    state.ask(names.embeddings.put(names.query, chance.standard_normal(DIMENSION)))
    state.ask(names.chunks.put({id_: id_.ljust(CHUNK_CHARACTERS) for id_ in names.ids}))
    segments = {f"segment {at}": {"large": 1.0, "small": 3.0} for at in range(30)}
    state.ask(names.routes.swap("chat", segments, version=0))


# -- arms --------------------------------------------------------------------------------------------------------------


def asked(client: Any, names: Names) -> Iterator[tuple[str, object]]:  # noqa: ANN401  # redis-py's or ours
    """The application's code. The three lines that change are the import, the constructor, and none here."""
    yield "blob", client.get(names.blob)
    yield "embedding + chunks", (client.get(names.embedding), client.mget(names.texts))
    yield "session", client.lrange(names.list, 0, -1)
    yield "routing", client.get(names.table)


def piped(client: Any, names: Names) -> Iterator[tuple[str, object]]:  # noqa: ANN401  # as above
    """The same in one round trip, as a careful application does it."""
    with client.pipeline(transaction=False) as pipe:
        pipe.get(names.blob).get(names.embedding).mget(names.texts).lrange(names.list, 0, -1).get(names.table)
        yield "all", pipe.execute()


def typed(state: Any, names: Names) -> Iterator[tuple[str, object]]:  # noqa: ANN401  # a State
    """As values: an array, texts, turns, and the variant of this session."""
    yield "blob", state.ask(blob_of(names))
    yield "embedding + chunks", (state.ask(names.questions[0]), state.ask(names.questions[1]))
    yield "session", state.ask(names.questions[2])
    yield "routing", state.ask(names.questions[3]).variant(names.session, "segment 7")


def blob_of(names: Names) -> Any:  # noqa: ANN401  # a Question
    """A question of the application's own: what lies under one key, as it is."""
    from thermocline.near import Question

    return Question((("GET", names.blob),), lambda replies: replies[0])


def ahead(state: Any, names: Names) -> Iterator[tuple[str, object]]:  # noqa: ANN401  # a State
    """All of it before the request needs it."""
    done = state.prefetch(names.session, blob_of(names), *names.questions)
    assert done.failed == 0, "something was not fetched"
    yield "all", done


def _measured(stack: ExitStack, url: str, blob_bytes: int, requests: int, progress: Progress) -> dict[str, Times]:
    import redis

    from thermocline.near import Options, Redis, State

    room = max(64 * MIB, 2 * (SESSIONS + 4) * blob_bytes)
    plain, writer = (stack.enter_context(redis.Redis.from_url(url)) for _ in range(2))
    ours = {
        name: stack.enter_context(Redis.from_url(url, near=Options(bytes_max=room, max_age_seconds=3600.0 + at)))
        for at, name in enumerate((COLD, TURN, WARM, AHEAD))
    }
    sets = [Names(number) for number in range(SESSIONS)]
    for names in sets:
        _fill(ours[COLD], names, blob_bytes)
    state = State(ours[AHEAD])
    arms: dict[str, Callable[[Names], Iterator[tuple[str, object]]]] = {
        PLAIN: lambda names: asked(plain, names),
        PIPELINE: lambda names: piped(plain, names),
        **{arm: (lambda names, client=ours[arm]: asked(client, names)) for arm in (COLD, WARM)},
        TURN: lambda names: asked(ours[TURN], Names(sets.index(names), "t")),
        AHEAD: lambda names: ahead(state, names),
        TYPED: lambda names: typed(state, names),
    }
    for client in ours.values():
        assert client.near.wait(), "the server tells nothing of what changes"
        for names in sets:
            list(asked(client, names))
    _agree(arms, sets[0])
    times: dict[str, Times] = {arm: {} for arm in arms}
    for at in range(requests):
        progress(f"request {at + 1} of {requests}")
        names = sets[at % SESSIONS]
        _turn(writer, ours[TURN], Names(at % SESSIONS, "t"))
        ours[COLD].near.view.clear()
        ours[AHEAD].near.view.clear()
        order = [*list(arms)[:-2], (AHEAD, TYPED)]
        for arm in order[at % len(order) :] + order[: at % len(order)]:
            for one in arm if isinstance(arm, tuple) else (arm,):
                _timed(arms[one], names, times[one])
    return times


def _turn(writer: Any, client: Any, names: Names) -> None:  # noqa: ANN401  # clients of other packages
    """Another client appends to the session; here it is known before the request comes."""
    (last,) = writer.lrange(names.list, -1, -1)
    with writer.pipeline() as pipe:
        pipe.rpush(names.list, last).ltrim(names.list, -TURNS, -1).execute()
    assert client.near.link.ask("PING").result(5) is not None, "the link does not answer"


def _timed(arm: Callable[[Names], Iterator[tuple[str, object]]], names: Names, times: Times) -> None:
    lookups = arm(names)
    while True:
        started = CLOCK.now()
        name, found = next(lookups, ("", None))
        taken = CLOCK.now() - started
        del found  # freed outside of what is timed, as the application would still hold it
        if not name:
            return
        times.setdefault(name, []).append(taken)


def _agree(arms: dict[str, Callable[[Names], Iterator[tuple[str, object]]]], names: Names) -> None:
    """The arms read the same."""
    wanted: dict[str, Any] = dict(arms[PLAIN](names))
    for arm in (COLD, TURN, WARM):
        found = dict(arms[arm](names)) | (
            {"session": wanted["session"]} if arm == TURN else {}
        )  # it has one of its own
        assert found == wanted, f"{arm} read something else"
    list(arms[AHEAD](names))
    found = dict(arms[TYPED](names))
    (embedding,), texts = found["embedding + chunks"]
    assert found["blob"] == wanted["blob"], "typed values are others"
    assert (len(embedding), len(texts), len(found["session"])) == (DIMENSION, CHUNKS, TURNS), "typed values are others"
    assert math.isfinite(float(embedding.sum()))


# -- the table in the documents ----------------------------------------------------------------------------------------


def lookups(details: dict[str, Any]) -> str:
    """Microseconds of each lookup, p50 and p99, as the last run kept them."""
    lines = [f"| blob, arm | {' | '.join((*LOOKUPS, 'total'))} |", "|---" * (len(LOOKUPS) + 2) + "|"]
    for arm, rows in details["lookups"].items():
        cells = (rows.get(name) for name in (*LOOKUPS, "total"))
        said = (f"{row['p50'] * 1e6:,.0f} / {row['p99'] * 1e6:,.0f}" if row else "" for row in cells)
        lines.append(f"| {arm.replace(': ', ', ', 1)} | {' | '.join(said)} |")
    return "\n".join(lines)


def table() -> str:
    """The same for a page, with where and when; empty before the first run that was kept."""
    result = saved("state")
    if result is None:
        return ""
    where = f"{result.machine['cpu']}, {result.machine['cores']} cores, {result.date}"
    return f"{lookups(result.details)}\n\nMicroseconds, p50 / p99, `thermocline bench state`, {where}.\n"
