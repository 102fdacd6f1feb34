"""Typed state on real servers, from threads and from asyncio, and in the process: the same answers from all."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.process import CLOCK
from tests.faults.redis_server import RedisServer
from tests.near.serving import NearServer
from thermocline.clock import until
from thermocline.errors import NearError, SettingsError
from thermocline.near import (
    Answers,
    AsyncRedis,
    AsyncState,
    Chunks,
    Embeddings,
    Found,
    LocalState,
    Options,
    Redis,
    Results,
    Routes,
    Scope,
    Sessions,
    Similar,
    Space,
    State,
    Turn,
)
from thermocline.near.coherence import Wait
from thermocline.near.together import together

ACME = Space("acme")
HI, HELLO = Turn("user", "hi"), Turn("assistant", "hello")
NO = {"near": Options(prefixes=("nothing:",))}


@pytest.fixture
def other(redis_server):
    """Another process's client, as far as ours can tell. The server is empty."""
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def client(redis_server, other):
    with Redis(port=redis_server.port, near=Options()) as client:
        assert client.near.wait()
        yield client


@pytest.fixture(scope="module")
def near_server(tmp_path_factory):
    """A cache in memory behind the Redis protocol."""
    with NearServer(tmp_path_factory.mktemp("near")) as server:
        yield server


@pytest.fixture(params=["threads", "asyncio", "local", "near serve"])
def asks(request):
    """A state's `ask` and `prefetch`, called as functions."""
    if request.param == "local":
        state = LocalState(1 << 24)
        yield state.ask, state.prefetch
        return
    if request.param == "near serve":
        with Redis(port=request.getfixturevalue("near_server").port) as client:
            client.flushall()
            assert client.near.wait()
            yield State(client).ask, State(client).prefetch
        return
    if request.param == "threads":
        state = State(request.getfixturevalue("client"))
        yield state.ask, state.prefetch
        return
    request.getfixturevalue("other")
    port = request.getfixturevalue("redis_server").port
    with asyncio.Runner() as runner:

        async def begin():
            return AsyncState(AsyncRedis(port=port))

        state = runner.run(begin())
        yield (lambda *a: runner.run(state.ask(*a))), (lambda *a: runner.run(state.prefetch(*a)))
        runner.run(state._client.aclose())


def told(client):
    """Wait until the link has told all that has happened so far."""
    assert client.near.link.ask("PING").result(5)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_embeddings(asks):
    """An embedding is found by every spelling of its text, by no other text or model, and one by one of several."""
    ask, _ = asks
    e5, other = Embeddings("e5", ACME), Embeddings("e6", ACME)
    vector = np.linspace(-1, 1, 768, dtype=np.float32)
    assert ask(e5.put("What  is\u00a0a te\u0301st?", vector)) is None
    for _ in range(2):
        found, missing = ask(e5.get(" What is a t\u00e9st?", "what is a t\u00e9st?"))
        assert (found.tolist(), missing) == (vector.tolist(), None)
        assert ask(e5.get()) == ()
        assert ask(other.get("What is a t\u00e9st?")) == (None,)
        assert ask(Embeddings("e5", Space("umbra")).get("What is a t\u00e9st?")) == (None,)


def test_results_and_chunks(asks):
    """Results are those of the query, limit, filter and index; chunks come as asked for, None where unknown."""
    ask, _ = asks
    results, chunks = Results("docs@3", ACME), Chunks(ACME)
    found = (Found("a", 0.5), Found("b", 0.25))
    ask(results.put("q", found, limit=2, where="lang=en"))
    ask(results.put("nothing", (), limit=2))
    ask(chunks.put({"a": "text \ud800", "b": ""}))
    ask(chunks.put({}))
    for _ in range(2):
        assert ask(results.get(" q", limit=2, where="lang=en")) == found
        assert ask(results.get("nothing", limit=2)) == ()
        assert ask(results.get("q", limit=3, where="lang=en")) is None
        assert ask(results.get("q", limit=2)) is None
        assert ask(Results("docs@4", ACME).get("q", limit=2, where="lang=en")) is None
        assert ask(chunks.get("b", "none", "a")) == ("", None, "text \ud800")
        assert ask(chunks.get()) == ()
    with pytest.raises(NearError):
        results.put("q", found * 501, limit=2)


def test_sessions(asks):
    """Turns come back in order, of one session and tenant; asked again after an error, they are there once."""
    ask, _ = asks
    sessions = Sessions(ACME)
    append = sessions.append("s", HI, HELLO)
    assert ask(append) == 2
    assert ask(sessions.turns("s")) == (HI, HELLO)
    ask(append)
    odd = Turn("\ud800", "\udfff")
    ask(sessions.append("s", HI, odd))
    assert ask(sessions.turns("s")) == (HI, HELLO, HI, odd)
    assert ask(Sessions(Space("umbra")).turns("s")) == ask(sessions.turns("t")) == ()
    assert ask(sessions.end("s")) is True
    assert ask(sessions.end("s")) is False
    assert ask(sessions.turns("s")) == ()


def test_sessions_are_bounded(asks):
    """Beyond its turns or its bytes a session loses its oldest turns, at the server too, and never the last one."""
    ask, _ = asks
    few = Sessions(ACME, turns_max=3)
    for at in range(5):
        assert ask(few.append("few", Turn("user", str(at)))) == min(at + 1, 3)
    assert [turn.text for turn in ask(few.turns("few"))] == ["2", "3", "4"]
    small = Sessions(ACME, bytes_max=1000, turn_bytes_max=600)
    for at in range(10):
        assert ask(small.append("small", Turn("user", f"{at}" + "x" * (300 if at % 2 else 20)))) >= 1
    texts = [turn.text for turn in ask(small.turns("small"))]
    assert texts[-1].startswith("9")
    assert 300 < sum(map(len, texts)) <= 1000
    kept = ask(Sessions(ACME).turns("small"))  # a reader with a larger bound sees what is there
    assert [turn.text for turn in kept] == texts


def test_a_session_ends_by_its_users_class(client, other):
    """A session lives as long as its class of user has it, from its last append on."""
    state, sessions = State(client), Sessions(ACME, ttl_seconds=100, class_ttl_seconds={"free": 10, "paid": 1000})
    for user_class, ttl in (("free", 10), ("paid", 1000), ("", 100), ("unheard of", 100), ("free", 10)):
        state.ask(sessions.append("s", HI, user_class=user_class))
        assert ttl - 5 < other.ttl("state:acme:session:s") <= ttl
    state.ask(Sessions(ACME, ttl_seconds=0.03).append("short", HI))
    assert until(lambda: state.ask(sessions.turns("short")) == (), 5, pause_seconds=0.005)


def test_routes(asks):
    """A table is swapped where its version is the one expected, is refused elsewhere, and is one value."""
    ask, _ = asks
    routes = Routes(ACME)
    assert ask(routes.table("chat")) is None
    assert ask(routes.swap("chat", {"": {"a": 1}}, version=1)) is None
    first = ask(routes.swap("chat", {"": {"a": 1}}, version=0))
    assert (first.version, first.variant("anybody")) == (1, "a")
    assert ask(routes.swap("chat", {"": {"b": 1}}, version=0)) is None
    assert ask(routes.table("chat")) == first
    assert ask(routes.table("chat")) is ask(routes.table("chat"))
    assert ask(routes.swap("chat", {"": {"b": 1}}, version=1)).version == 2
    assert ask(routes.table("chat")).variant("anybody") == "b"
    assert ask(Routes(Space("umbra")).table("chat")) is None
    with pytest.raises(NearError):
        routes.swap("chat", {f"{at:1000}": {"a": 1} for at in range(1100)}, version=2)


# -- similar answers ---------------------------------------------------------------------------------------------------


def same_polarity(query, answer):
    return ("disable" in query) == ("disable" in answer.query)


def test_similar_answers(asks):
    """A similar query finds an answer where the verifier says so; what it refutes is counted, and is no answer."""
    ask, _ = asks
    similar = Similar(0.8, same_polarity)
    answers, scope = Answers(ACME, similar=similar), Scope("m", "s", (HI, HELLO))
    vector = np.asarray([1.0, 1.0, 0.0])
    ask(answers.put(scope, "enable 2FA", "so", vector))
    assert ask(answers.get(scope, " enable  2FA", vector)).similarity is None
    ask(answers.put(scope, "\ud800", "\udfff"))
    assert ask(answers.get(scope, "\ud800")).text == "\udfff"
    found = ask(answers.get(scope, "turn on 2FA", [1.0, 0.9, 0.1]))
    assert (found.text, found.query) == ("so", "enable 2FA")
    assert 0.8 <= found.similarity < 1
    assert ask(answers.get(scope, "disable 2FA", [1.0, 1.0, 0.05])) is None  # nearer than the paraphrase
    assert ask(answers.get(scope, "weather?", [-1.0, 0.5, 0.0])) is None
    assert ask(answers.get(scope, "turn on 2FA")) is None  # not asked for
    for elsewhere in (Scope("m", "s"), Scope("m", "t", (HI, HELLO)), Scope("n", "s", (HI, HELLO))):
        assert ask(answers.get(elsewhere, "turn on 2FA", vector)) is None
    assert ask(Answers(Space("umbra"), similar=similar).get(scope, "enable 2FA", vector)) is None
    assert ask(Answers(ACME).get(scope, "turn on 2FA", vector)) is None  # off until asked for
    stats = similar.stats
    assert (stats.looked_up, stats.similar, stats.verified, stats.refuted, stats.failed) == (7, 2, 1, 1, 0)
    assert stats.false_hit_rate == 0.5


def test_a_verifier_that_fails_has_verified_nothing(asks):
    """A verifier that raises, and an answer that is gone by then, are counted and no answer; nothing is raised."""
    ask, _ = asks

    def broken(query, answer):
        raise ValueError(query)

    similar = Similar(0.5, broken)
    answers, scope = Answers(ACME, similar=similar), Scope("m")
    ask(answers.put(scope, "a", "b", [1.0]))
    assert ask(answers.get(scope, "c", [1.0])) is None
    gone = Answers(ACME, similar=Similar(0.5, same_polarity), ttl_seconds=0.02)
    ask(gone.put(Scope("n"), "a", "b", [1.0]))
    ask(Answers(ACME, similar=gone.similar).put(Scope("n"), "z", "z", [-1.0]))  # the list lives on
    CLOCK.sleep(0.05)
    assert ask(gone.get(Scope("n"), "c", [1.0])) is None
    assert (similar.stats.failed, gone.similar.stats.failed) == (1, 1)
    assert similar.stats.false_hit_rate is None


def test_candidates_are_bounded(client, other):
    """Only the latest queries of a scope are candidates, at the server too."""
    state, similar = State(client), Similar(0.99, same_polarity, candidates_max=3)
    answers = Answers(ACME, similar=similar)
    for at in range(5):
        state.ask(answers.put(Scope("m"), f"q{at}", "text", np.eye(8)[at]))
    (key,) = other.keys("*:similar:*")
    assert other.llen(key) == 3
    assert [state.ask(answers.get(Scope("m"), "?", np.eye(8)[at])) is not None for at in range(5)] == [False] * 2 + [
        True
    ] * 3


def test_a_slow_verifier_does_not_hold_the_loop(redis_server, other):
    """In asyncio a verifier runs in a thread: the loop goes on meanwhile."""
    inside, may_end = threading.Event(), threading.Event()

    def slow(query, answer):
        inside.set()
        return may_end.wait(30)

    async def main():
        async with AsyncRedis(port=redis_server.port) as client:
            state, answers = AsyncState(client), Answers(ACME, similar=Similar(0.5, slow))
            await state.ask(answers.put(Scope("m"), "a", "b", [1.0]))
            asked = asyncio.create_task(state.ask(answers.get(Scope("m"), "c", [1.0])))
            assert await asyncio.to_thread(inside.wait, 30)
            assert await state.ask(Chunks(ACME).get("x")) == (None,)
            may_end.set()
            assert (await asked).text == "b"

    asyncio.run(asyncio.wait_for(main(), 30))


# -- one round trip ----------------------------------------------------------------------------------------------------


class Counting(Redis):
    """Counts round trips that fetch for memory."""

    trips = 0

    def near_fetch(self, commands):
        self.trips += 1
        return super().near_fetch(commands)


def test_prefetch_is_one_round_trip(redis_server, other):
    """All that a request needs comes in one round trip, 8 MB too; asking for it then sends nothing, and is current."""
    sessions, routes, chunks, e5 = Sessions(ACME), Routes(ACME), Chunks(ACME), Embeddings("e5", ACME)
    with Redis(port=redis_server.port) as writer:
        state = State(writer)
        state.ask(sessions.append("s", HI, HELLO))
        state.ask(routes.swap("chat", {"": {"a": 1}}, version=0))
        state.ask(chunks.put({"a": "x" * (8 << 20), "b": "y"}))
        state.ask(e5.put("q", [1.0, 2.0]))
    with Counting(port=redis_server.port, near=Options(bytes_max=64 << 20)) as client:
        assert client.near.wait()
        state = State(client, reads=lambda session: (sessions.turns(session), routes.table("chat")))
        done = state.prefetch("s", chunks.get("a", "b"), e5.get("q"), e5.get("unknown"))
        assert (done.commands, done.failed, client.trips) == (5, 0, 1)
        assert state.prefetch("s", chunks.get("a", "b")).failed == 0
        before = other.info("stats")["total_commands_processed"]
        assert state.ask(sessions.turns("s")) == (HI, HELLO)
        assert state.ask(routes.table("chat")).variant("u") == "a"
        assert [len(text) for text in state.ask(chunks.get("a", "b"))] == [8 << 20, 1]
        assert [vector is None for vector in state.ask(e5.get("q", "unknown"))] == [False, True]
        assert client.trips == 1
        assert other.info("stats")["total_commands_processed"] - before <= 1 + 8  # INFO itself, and the link's PINGs
        other.delete("state:acme:session:s")
        told(client)
        assert state.ask(sessions.turns("s")) == ()
        assert state.stats().prefetched == 8


def test_prefetch_asks_for_the_sessions_blocks(asks, client):
    """The callable for KV blocks is given the session; what it or `reads` raises is counted, the rest fetched."""
    began = []
    state = State(client, blocks=lambda session: began.append(session) or "job")
    assert state.prefetch("s 7", Chunks(ACME).get("a")).blocks == "job"
    assert began == ["s 7"]

    def broken(session):
        raise OSError(session)

    state = State(client, blocks=broken)
    done = state.prefetch("s", Chunks(ACME).get("a", "b"), Chunks(ACME).put({"a": "b"}))
    assert (done.commands, done.failed, done.blocks) == (1, 0, None)
    assert state.stats().blocks_failed == 1
    state = State(client, reads=broken)
    assert state.prefetch("s", Chunks(ACME).get("a")).commands == 1
    assert state.stats().failed == 1
    _, prefetch = asks
    assert prefetch("s").commands == 0
    assert prefetch("s", Chunks(ACME).get("a")).failed == 0


def test_prefetch_with_memory_that_may_not_be_used(redis_server, other):
    """Where memory keeps none of the keys, or has no link, it is still one round trip, and answers are right."""
    other.set("state:acme:chunk:a", "text")
    with Counting(port=redis_server.port, **NO) as client:
        state = State(client)
        for _ in range(2):
            assert state.prefetch("s", Chunks(ACME).get("a"), Chunks(ACME).get("a", "b")).failed == 0
            assert state.ask(Chunks(ACME).get("a")) == ("text",)
        assert client.trips == 2


def test_reads_together_from_many_threads(redis_server, other):
    """Threads that want the same cold keys in different orders never wait for each other, and get the right values."""
    names = [f"k{at}" for at in range(12)]
    for round_ in range(20):
        other.mset({name: f"{name} {round_}" for name in names})
        with (
            Redis(port=redis_server.port, near=Options(max_age_seconds=50 + round_)) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            assert client.near.wait()
            orders = [names[at:] + names[:at] for at in range(8)]
            jobs = [pool.submit(client.near_read, [("GET", name) for name in order]) for order in orders]
            for order, job in zip(orders, jobs, strict=True):
                assert job.result(4) == [f"{name} {round_}".encode() for name in order]


def test_reads_together_bring_theirs_before_they_wait(client):
    """Where another reader fetches one of the keys already, it is waited for only after the others were fetched."""
    view = client.near.view
    another = view.read(("GET", "b"), view.flights)
    theirs = next(another)
    reads = together(view, [("GET", "b"), ("GET", "a")], view.flights, local=True)
    assert next(reads).commands == (("PTTL", "a"), ("GET", "a"))
    waits = reads.send([-1, b"1"])
    assert isinstance(waits, Wait)
    assert not waits.future.done()
    with pytest.raises(StopIteration):
        another.send([-1] * (len(theirs.commands) - 1) + [b"2"])
    with pytest.raises(StopIteration) as ended:
        reads.send(theirs is not None)  # that it is done
    assert ended.value.value == [b"2", b"1"]


def test_reads_together_are_plain_reads(redis_server, other):
    """Each reply is what the command alone gives, an error of one among them; twice the same key is no trouble."""
    other.mset({"a": "1", "b": "2"})
    other.rpush("l", "x", "y")
    other.hset("h", "f", "v")
    commands = [
        ("GET", "a"),
        ("MGET", "b", "none"),
        ("LRANGE", "l", 0, -1),
        ("GET", "l"),
        ("GET", "a"),
        ("HGETALL", "h"),
    ]
    for mode in ("bcast", "default"):
        other.set("a", "1")
        with Redis(port=redis_server.port, near=Options(mode=mode)) as client:
            for served in (False, True, True):
                assert not served or client.near.wait()
                replies = client.near_read(commands)
                assert isinstance(replies.pop(3), redis.ResponseError)
                assert replies == [b"1", [b"2", None], [b"x", b"y"], b"1", {b"f": b"v"}]
            client.set("a", "3")
            assert client.near_read([("GET", "a")]) == [b"3"]
            assert client.near_read([]) == []


def test_a_read_together_that_is_cancelled_leaves_no_one_waiting(redis_server, other):
    """A task that is cancelled in a prefetch hands its keys over: who waits for them asks the server."""
    other.set("a", "1")

    async def main():
        async with AsyncRedis(port=redis_server.port) as client:
            client.near.wait()
            tasks = [asyncio.create_task(client.near_read([("GET", "a"), ("GET", "b")])) for _ in range(4)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            assert await asyncio.gather(*tasks[1:]) == [[b"1", None]] * 3
            assert not client._near_flights

    asyncio.run(asyncio.wait_for(main(), 4))


# -- watch -------------------------------------------------------------------------------------------------------------


def test_a_table_is_watched(client, redis_server):
    """A watcher is told of each version that is there when it looks, the one at the start first; `stop` ends it."""
    routes, state, stop, seen = Routes(ACME), State(client), threading.Event(), []

    watcher = threading.Thread(target=follow, args=(state, routes, stop, seen))
    watcher.start()
    with Redis(port=redis_server.port) as another:
        for version in range(3):
            assert until(lambda version=version: seen and seen[-1] == (version or None), 5, pause_seconds=0.001)
            assert State(another).ask(routes.swap("chat", {"": {"a": 1}}, version=version))
        assert until(lambda: seen[-1] == 3, 5, pause_seconds=0.001)
    stop.set()
    watcher.join(5)
    assert not watcher.is_alive()
    assert seen == [None, 1, 2, 3]


def follow(state, routes, stop, seen):
    for table in state.watch(routes.table("chat"), look_seconds=0.001, stop=stop):
        seen.append(table and table.version)


def test_a_table_is_watched_in_asyncio_and_in_the_process(redis_server, other):
    """The other two colours tell the same."""
    routes = Routes(ACME)

    async def main():
        async with AsyncRedis(port=redis_server.port) as client:
            state, seen = AsyncState(client), []
            async for table in state.watch(routes.table("chat"), look_seconds=0.001):
                seen.append(table.version if table else 0)
                if seen[-1] == 2:
                    break
                await state.ask(routes.swap("chat", {"": {"a": 1}}, version=seen[-1]))
            return seen

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [0, 1, 2]
    local, seen = LocalState(1 << 20), []
    for table in local.watch(routes.table("chat"), look_seconds=0.001):
        seen.append(table.version if table else 0)
        if seen[-1] == 2:
            break
        local.ask(routes.swap("chat", {"": {"a": 1}}, version=seen[-1]))
    assert seen == [0, 1, 2]


def test_one_of_many_swaps_wins(redis_server, other):
    """Threads that swap one table at once: each version has one author, and none is lost."""
    routes, won = Routes(ACME), []

    def author(name):
        with Redis(port=redis_server.port) as client:
            state = State(client)
            while len(won) < 40:
                table = state.ask(routes.table("chat"))
                mine = state.ask(routes.swap("chat", {"": {name: 1}}, version=table.version if table else 0))
                if mine:
                    won.append((mine.version, name))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(author, "abcd"))
    assert sorted(version for version, _ in won) == list(range(1, len(won) + 1))


# -- when it goes wrong ------------------------------------------------------------------------------------------------


def test_a_server_that_is_gone(folder):
    """Caches answer with nothing, counted; what is state raises; prefetch raises nothing; a watch goes on."""
    e5, chunks, sessions, routes = Embeddings("e5"), Chunks(), Sessions(), Routes()
    once = Retry(NoBackoff(), 0)
    with RedisServer(folder) as server, Redis(port=server.port, retry=once) as client:
        state, stop, seen = State(client, reads=lambda session: (sessions.turns(session),)), threading.Event(), []
        watcher = threading.Thread(target=follow, args=(state, routes, stop, seen))
        watcher.start()
        assert until(lambda: seen == [None], 5, pause_seconds=0.001)
        server.kill()
        assert state.ask(e5.get("a", "b")) == (None, None)
        assert state.ask(e5.put("a", [1.0])) is None
        assert state.ask(chunks.put({"a": "b", "c": "d"})) is None
        assert state.stats().failed >= 3
        for question in (sessions.turns("s"), sessions.append("s", HI), routes.table("chat")):
            with pytest.raises(redis.ConnectionError):
                state.ask(question)
        assert state.prefetch("s", e5.get("a")).failed == 2
        server.start()
        assert until(lambda: state.prefetch("s").failed == 0, 20, pause_seconds=0.05)
        state.ask(routes.swap("chat", {"": {"a": 1}}, version=0))
        assert until(lambda: seen[-1] == 1, 20, pause_seconds=0.01)
        stop.set()
        watcher.join(5)
        assert not watcher.is_alive()


def test_damaged_bytes(client, other):
    """What another program wrote there: a cache misses and counts it, a session and a table raise, with a hint."""
    state, e5, scope = State(client), Embeddings("e5"), Scope("m")
    answers = Answers(similar=Similar(0.5, same_polarity))
    caches = [e5.get("a"), Results("i").get("q", limit=1), Chunks().get("a"), answers.get(scope, "q")]
    for question in caches:
        other.set(question.commands[0][1], b"\xff\xfe")
        assert state.ask(question) in {None, (None,)}
    similar = answers.get(scope, "z", [1.0])
    other.lpush(similar.commands[1][1], b"\xff")
    assert state.ask(similar) is None
    assert state.stats().damaged == 5
    other.lpush("state::session:s", b"{")
    other.set("state::routes:chat", b'{"version":1,"segments":{"":{"a":-1}}}')
    told(client)
    for question in (Sessions().turns("s"), Routes().table("chat")):
        with pytest.raises(NearError) as found:
            state.ask(question)
        assert found.value.hint
    other.set("state::session:t", "a string")
    told(client)
    with pytest.raises(redis.ResponseError):
        state.ask(Sessions().turns("t"))


def test_clients_that_cannot_serve_state(redis_server, other):
    """A client of redis-py's own, and one that decodes, are refused with a hint."""
    for wrong in (other, Redis(port=redis_server.port, decode_responses=True)):
        with pytest.raises(SettingsError) as found:
            State(wrong)
        assert found.value.hint
        wrong.close()


def test_local_state_is_bounded():
    """State in the process stays within its bytes: what does not fit is evicted, or not kept."""
    state, chunks = LocalState(1 << 20), Chunks()
    for at in range(200):
        state.ask(chunks.put({str(at): "x" * 20_000}))
    assert state.ask(chunks.get("199")) == ("x" * 20_000,)
    assert state.ask(chunks.get("0")) == (None,)
