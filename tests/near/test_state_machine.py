"""Typed state against a model of it, from two clients of one server and in the process."""

from __future__ import annotations

import msgspec
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from thermocline.near import Chunks, LocalState, Options, Redis, Routes, Sessions, State, Turn

NAMES = st.sampled_from(["a", "b:c", "\u00fc"])
TEXTS = st.sampled_from(["", "hi", "x" * 90, "\u00fc" * 40])
TURNS_MAX, BYTES_MAX = 5, 400


def lies(turn):
    """What a turn takes where it is kept."""
    return len(msgspec.msgpack.encode((bytes(8), b"user", turn.text.encode())))


class Machine(RuleBasedStateMachine):
    """What one client does, it sees at once; the other sees it when its link has told; the process is a third."""

    port = 0

    def __init__(self) -> None:
        super().__init__()
        with redis.Redis(port=self.port) as plain:
            plain.flushall()
        self.clients = [Redis(port=self.port, near=Options(max_age_seconds=age)) for age in (100, 200)]
        self.states = [*map(State, self.clients), LocalState(1 << 22)]
        assert all(client.near.wait() for client in self.clients)
        self.sessions, self.routes, self.chunks = (
            Sessions(turns_max=TURNS_MAX, bytes_max=BYTES_MAX, turn_bytes_max=200),
            Routes(),
            Chunks(),
        )
        self.turns: dict[str, list[Turn]] = {}
        self.tables: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.count = 0

    def teardown(self) -> None:
        for client in self.clients:
            client.close()

    def everywhere(self, who, question, answer):
        """Done by one of the two, and in the process."""
        assert self.states[who].ask(question()) == answer
        assert self.states[2].ask(question()) == answer

    def seen(self, who, question, answer):
        """By who wrote it at once, by the other when it is told, by the process; each time it is asked."""
        assert self.clients[1 - who].near.link.ask("PING").result(10)
        for state in (self.states[who], self.states[1 - who], self.states[2]):
            for _ in range(2):
                assert state.ask(question) == answer

    @rule(who=st.integers(0, 1), session=NAMES, texts=st.lists(TEXTS, min_size=1, max_size=7))
    def append(self, who, session, texts):
        turns = [*self.turns.get(session, []), *(Turn("user", text) for text in texts)][-TURNS_MAX:]
        while sum(map(lies, turns)) > BYTES_MAX:
            turns.pop(0)
        self.turns[session] = turns
        self.everywhere(who, lambda: self.sessions.append(session, *(Turn("user", text) for text in texts)), len(turns))
        self.seen(who, self.sessions.turns(session), tuple(turns))

    @rule(who=st.integers(0, 1), session=NAMES)
    def end(self, who, session):
        self.everywhere(who, lambda: self.sessions.end(session), self.turns.pop(session, None) is not None)
        self.seen(who, self.sessions.turns(session), ())

    @rule(who=st.integers(0, 1), name=NAMES, behind=st.integers(0, 1))
    def swap(self, who, name, behind):
        self.count += 1
        version = self.tables.get(name, 0)
        for state in (self.states[who], self.states[2]):
            table = state.ask(self.routes.swap(name, {"": {f"v{self.count}": 1}}, version=version - behind))
            assert (table is not None) == (behind == 0)
        if not behind:
            self.tables[name] = version + 1
            for state in self.states:
                assert self.clients[1 - who].near.link.ask("PING").result(10)
                table = state.ask(self.routes.table(name))
                assert (table.version, table.variant("anybody")) == (version + 1, f"v{self.count}")

    @rule(who=st.integers(0, 1), texts=st.dictionaries(NAMES, TEXTS, max_size=3))
    def put(self, who, texts):
        self.texts |= texts
        self.everywhere(who, lambda: self.chunks.put(texts), None)
        names = ["a", "\u00fc", "b:c", "a"]
        self.seen(who, self.chunks.get(*names), tuple(map(self.texts.get, names)))

    @rule(who=st.integers(0, 1), session=NAMES, name=NAMES)
    def prefetch(self, who, session, name):
        questions = self.sessions.turns(session), self.routes.table(name), self.chunks.get(name, "a")
        for state in self.states:
            assert state.prefetch(session, *questions).failed == 0
        assert self.clients[1 - who].near.link.ask("PING").result(10)
        assert self.states[1 - who].ask(questions[0]) == tuple(self.turns.get(session, ()))


def test_state_does_what_its_model_does(redis_server):
    """Sessions, tables and chunks read as the model says, whoever wrote, on a server and in the process."""
    Machine.port = redis_server.port
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=checks)
    )
