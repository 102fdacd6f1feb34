"""Any schedule that vLLM may come up with: what is computed on and what is saved is right, and nothing is left over."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines_vllm.mini import BLOCK, MiniEngine, Request
from tests.node.making import Host, until
from thermocline.node.staging import Staging

SALTS = count()
TRUNK = [7 * at % 1000 for at in range(12 * BLOCK)]

ARRIVE = st.tuples(st.just("arrive"), st.sampled_from([BLOCK - 3, 4 * BLOCK - 3, 8 * BLOCK]), st.integers(0, 1))
STEP = st.tuples(st.just("step"), st.sampled_from([1, BLOCK - 1, 2 * BLOCK, 12 * BLOCK]), st.integers(1, 3))
OTHERS = [st.tuples(st.just(op), st.integers(0, 3)) for op in ("preempt", "finish", "abort", "damage", "anew")]
OTHERS.append(st.tuples(st.just("reset"), st.integers(0, 7)))
OPS = st.one_of(ARRIVE, ARRIVE, STEP, STEP, STEP, STEP, *OTHERS)


def text(length, branch):
    """Prompts that share beginnings with others of the same branch, and a shorter one with all."""
    return [token + (1000 * branch if at >= 3 * BLOCK else 0) for at, token in enumerate(TRUNK[:length])]


@pytest.mark.parametrize(("groups", "how"), [(1, ""), (2, ""), (1, "at_once"), (1, "ahead"), (2, "ahead")])
def test_any_schedule(clients, caplog, groups, how):
    """However requests come, run, are preempted, fail to load and end: no wrong byte, no key twice, no lease left."""

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ops=st.lists(OPS, min_size=40, max_size=100))
    def run(ops):
        some = clients[:2] if how == "at_once" else clients
        engine = MiniEngine(some, groups=groups, at_once=how == "at_once", ahead=how == "ahead")
        salt = f"example {next(SALTS)}"
        try:
            _play(engine, salt, ops)
            engine.drain()
            engine.damage_next_load = False
            answers = [run_alone(engine, Request(f"after {at}", text(100, 3), salt)) for at in range(2)]
        finally:
            engine.close()
        assert answers[1]["loaded_tokens"] == 96, "it saves and loads as before"
        assert not [record for record in caplog.records if record.exc_info], "a hook failed"

    run()


def _play(engine, salt, ops):
    names = count()
    for op, *arguments in ops:
        alive = [request for request in engine.requests.values() if request.state != "gone"]
        if op == "arrive" and len(alive) < 4:
            engine.arrive(Request(f"r{next(names)}", text(*arguments), salt))
        elif op == "step":
            for _ in range(arguments[1]):
                engine.step(arguments[0])
        elif op == "damage" and arguments == [0]:
            engine.damage_next_load = True
        elif op == "reset" and arguments == [0]:
            engine.scheduler.reset()
        elif op == "anew":  # prompts from now on begin as none before
            salt += " anew"
        elif alive and op in {"preempt", "finish", "abort"}:
            getattr(engine, op)(alive[arguments[0] % len(alive)])


def run_alone(engine, request, *, new_tokens=1):
    """Run one request to its end; what its answer says."""
    engine.arrive(request)
    done = request.num_prompt_tokens + new_tokens

    def over():
        engine.step(4 * BLOCK)
        return request.num_tokens >= done

    until(over, "the request to be computed")
    engine.finish(request)
    engine.drain()
    return engine.receipts[request.request_id]


def test_a_second_request_loads_what_the_first_one_left(clients):
    """A prompt asked again is loaded on all ranks and in all groups, but for its last token."""
    engine = MiniEngine(clients, groups=2)
    first = run_alone(engine, Request("a", text(100, 1)))
    second = run_alone(engine, Request("b", text(100, 1)))
    engine.close()
    assert first["loaded_tokens"] == 0
    assert second["loaded_tokens"] == 96
    assert second["by_tier"] == {"memory": 96}
    assert second["missing"] == [
        {"start": 6, "stop": 7, "reason": "tail", "detail": "a partial block, or the token that must be computed"}
    ]


def test_what_left_a_window_is_saved_before_others_load_into_its_pages(clients):
    """A load may be given pages that a step under way still saves: that is saved as it was, and then loaded over."""
    engine = MiniEngine(clients, groups=2, ahead=True)
    run_alone(engine, Request("a", text(128, 1)))
    for name in "bcd":  # more than is saved in one step
        engine.arrive(Request(name, text(128, 1), name))
    staged = [engine.scheduler._tracked[name].staging for name in "bcd"]
    until(lambda: all(staging.done for staging in staged), "the node's answers")
    engine.step(8 * BLOCK)
    engine.step(8 * BLOCK)
    saved = {page for order in engine.steps[-1].orders.saves for page in order.pages[1]}
    engine.arrive(Request("e", text(128, 1)))
    until(lambda: engine.scheduler._tracked["e"].staging.done, "the node's answer")
    engine.step(8 * BLOCK)
    (load,) = engine.steps[-1].orders.loads
    assert saved & set(load.pages[1])
    engine.drain()
    engine.close()


def test_an_idle_engine_loads_in_the_step_that_computes(clients):
    """One rank with one group that nobody else uses needs no step for a load; others, and busy ones, load aside."""
    for ranks, groups, busy in ((1, 1, False), (1, 1, True), (2, 1, False), (1, 2, False)):
        engine = MiniEngine(clients[: 1 + ranks], groups=groups, at_once=True)
        run_alone(engine, Request("a", text(100, 1)))
        if busy:
            engine.arrive(Request("other", text(5, 0)))
            until(lambda engine=engine: engine.step(1) or engine.requests["other"].state == "running", "it to run")
        request = Request("b", text(100, 1))
        engine.arrive(request)
        until(lambda engine=engine, request=request: engine.step(1) or request.num_computed_tokens, "it to be matched")
        assert (request.state == "running") == (ranks == groups == 1 and not busy)
        engine.drain()
        engine.close()


def test_two_requests_of_one_step_load_aside(clients):
    """Of two requests that come together, neither computes on what is still being loaded for the other."""
    engine = MiniEngine(clients[:2], at_once=True)
    run_alone(engine, Request("a", text(100, 1)))
    requests = [Request(name, text(100, 1)) for name in "bc"]
    for request in requests:
        engine.arrive(request)
    until(lambda: engine.step(1) or all(each.num_computed_tokens for each in requests), "both to be matched")
    assert {each.state for each in requests} <= {"loading", "waiting", "running"}
    assert not any(engine.scheduler.loads_at_once(each.request_id) for each in requests)
    engine.drain()
    engine.close()


def test_what_vllm_has_itself_waits_for_nobody(clients):
    """A prompt that is in vLLM's own cache needs no answer of the node, is not saved again, and has its receipt."""
    run_alone(MiniEngine(clients), Request("a", text(100, 1)))
    engine = MiniEngine(clients)  # it saved nothing, and loads what the other has
    assert run_alone(engine, Request("b", text(100, 1)))["by_tier"] == {"memory": 96}
    request = Request("c", text(100, 1))
    engine.scheduler.arrived(request)
    assert engine.scheduler.matched("c", 96) == 0, "at once, whatever the node says"
    engine.scheduler.allocated("c", (), 0)
    request.num_computed_tokens = 96
    orders = engine.scheduler.orders({"c": 4}, lambda _: [list(range(1, 8))] * engine.groups)
    assert not orders.saves
    assert engine.scheduler.finished("c")["by_tier"] == {"device": 96}
    engine.drain()
    engine.close()


def test_a_request_leaves_its_times(clients, host):
    """The node remembers when a request came, how long it was, and how long its answer."""
    engine = MiniEngine(clients)
    before = clients[0]._clock.wall()
    run_alone(engine, Request("a", text(100, 1)), new_tokens=5)
    engine.close()
    until(host.store.receipts.recent.lines, "its receipt")
    row = json.loads(host.store.receipts.recent.lines())
    assert (row["input_length"], row["output_length"]) == (100, 5)
    assert before - 1 <= row["timestamp"] / 1000 <= clients[0]._clock.wall()


def test_a_request_of_one_token_has_its_receipt(clients):
    """A request that ends in the step that loaded for it says what was loaded."""
    engine = MiniEngine(clients[:2], at_once=True)
    run_alone(engine, Request("a", text(100, 1)))
    engine.finishing.add("b")
    engine.arrive(Request("b", text(100, 1)))
    until(lambda: engine.step(8 * BLOCK) or "b" in engine.receipts, "it to end")
    engine.drain()
    engine.close()
    assert engine.receipts["b"]["by_tier"] == {"memory": 96}
    assert engine.scheduler.take_counts()["loaded_tokens", "memory"] == 96


def test_generated_tokens_are_found_by_the_next_turn(clients):
    """Blocks that become full while an answer is generated are saved as those of prompts are."""
    engine = MiniEngine(clients)
    first = Request("a", text(40, 1))
    run_alone(engine, first, new_tokens=60)
    turn = Request("b", [*first.all_token_ids[:98], 1, 2, 3])
    assert run_alone(engine, turn)["loaded_tokens"] == 96
    engine.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_damaged_block_fails_the_load_and_is_replaced(clients, at_once):
    """A load that does not verify is computed, saved anew, and the next request loads all of it."""
    engine = MiniEngine(clients[:2] if at_once else clients, at_once=at_once)
    run_alone(engine, Request("a", text(100, 1)))
    engine.damage_next_load = True
    second = run_alone(engine, Request("b", text(100, 1)))
    third = run_alone(engine, Request("c", text(100, 1)))
    counts = engine.scheduler.take_counts()
    engine.close()
    assert (second["loaded_tokens"], second["missing"][0]["reason"]) == (0, "corrupt")
    assert third["loaded_tokens"] == 96
    assert counts["failed_loads", "corrupt"] == 1
    assert counts["loaded_tokens", "memory"] == 96, "a failed load is no hit"


def test_after_a_reset_nothing_older_is_loaded(clients):
    """A reset ends what was saved before for this engine, and what is saved from then on is found again."""
    engine = MiniEngine(clients)
    run_alone(engine, Request("a", text(100, 1)))
    engine.scheduler.reset()
    assert run_alone(engine, Request("b", text(100, 1)))["loaded_tokens"] == 0
    assert run_alone(engine, Request("c", text(100, 1)))["loaded_tokens"] == 96
    fresh = MiniEngine(clients)
    assert run_alone(fresh, Request("d", text(100, 1)))["loaded_tokens"] == 96, "other engines have what was before"
    engine.close()
    fresh.close()


def test_a_request_that_runs_over_a_reset_is_not_saved(clients):
    """What was begun with the weights of before is never saved under those of after."""
    engine = MiniEngine(clients)
    request = Request("a", text(100, 1))
    engine.arrive(request)
    engine.step(BLOCK)
    engine.scheduler.reset()
    until(lambda: engine.step(BLOCK) or request.num_tokens > 100, "the request to be computed")
    engine.finish(request)
    engine.drain()
    assert run_alone(engine, Request("b", text(100, 1)))["loaded_tokens"] == 0
    engine.close()


@pytest.mark.parametrize(
    ("hints", "asks", "keeps"),
    [({"load": False}, False, True), ({"save": False}, True, False), ({"load": 1}, True, True), ("x", True, True)],
)
def test_hints(clients, hints, asks, keeps):
    """A request may refuse to load or to be saved; malformed hints are counted, and it runs as usual."""
    engine = MiniEngine(clients)
    receipt = run_alone(engine, Request("a", text(100, 1), kv_transfer_params={"thermocline": hints}))
    assert (receipt is not None) == asks
    again = run_alone(engine, Request("b", text(100, 1), kv_transfer_params={"thermocline": {"session": "s"}}))
    assert again["loaded_tokens"] == (96 if keeps else 0)
    assert again["session"] == "s"
    assert engine.scheduler.take_counts().get(("hints_refused", ""), 0) == (hints in ({"load": 1}, "x"))
    engine.close()


def test_without_a_node_requests_run(host, clients):
    """With the node gone nothing is found, kept or waited for, and the receipt says why."""
    host.server.close()
    until(lambda: not any(client.up for client in clients), "the clients to see it")
    engine = MiniEngine(clients)
    receipt = run_alone(engine, Request("a", text(100, 1)))
    engine.close()
    assert receipt["missing"][0]["reason"] == "tier_down"
    assert engine.scheduler.take_counts().keys() == {("asked_blocks", ""), ("dropped_blocks", "failed")}


def test_a_node_that_comes_back_empty_is_filled_again(host, clients):
    """What a node forgot is saved anew by the next request that computes it, however sure we were that it is kept."""
    engine = MiniEngine(clients)
    run_alone(engine, Request("a", text(100, 1)))
    host.restart()
    until(lambda: all(client.up for client in clients), "the clients to attach again")
    assert run_alone(engine, Request("b", text(100, 1)))["loaded_tokens"] == 0
    assert run_alone(engine, Request("c", text(100, 1)))["loaded_tokens"] == 96
    engine.close()


@pytest.mark.parametrize("verb", ["places", "record", "save", "plan"])
def test_a_client_that_breaks_its_promise_fails_no_request(clients, monkeypatch, verb):
    """Whatever our own parts raise, a request is computed to its end, and nothing is left over."""

    def broken(*_, **__):
        raise RuntimeError(verb)

    engine = MiniEngine(clients)
    run_alone(engine, Request("a", text(100, 1)))
    owner = Staging if verb == "plan" else clients[1 if verb == "save" else 0]
    monkeypatch.setattr(owner, verb, broken)
    request = Request("b", text(200, 1))
    run_alone(engine, request)
    engine.drain()
    engine.close()
    assert request.num_tokens == request.num_prompt_tokens + 1


def test_what_is_lent_is_shared_by_all_groups(folder):
    """Where a step computes more than room is lent for, every ask still brings a longer beginning, in all groups."""
    with Host(folder, blocks=128) as host:
        clients = [host.client(save_wait_seconds=0.0) for _ in range(2)]
        engine = MiniEngine(clients, groups=2)
        asks = 0
        while (run_alone(engine, Request(f"r{asks}", text(100, 1))) or {})["loaded_tokens"] < 96:
            asks += 1
            assert asks < 20
        engine.close()
