"""The engine: equal answers on every path, several requests at a time, and nothing that the store does can hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.prompts import NEW_TOKENS, prompts
from tests.faults.redis_server import RedisServer
from thermocline.blocks.key import root_key
from thermocline.engines import transformers as engine_module
from thermocline.engines.generation import Event, Finish, GenerateRequest, Result
from thermocline.engines.models import Model
from thermocline.engines.sampling import Sampling
from thermocline.engines.transformers import Engine
from thermocline.errors import ModelError, RequestError
from thermocline.store.receipt import Reason
from thermocline.store.store import Store

WAIT_SECONDS = 60
MakeEngine = Callable[..., Engine]
MakeStore = Callable[..., Store]


def array(tokens: list[int]) -> np.ndarray:
    """Token ids as requests take them."""
    return np.array(tokens, np.uint32)


def numbers(count: int, seed: int = 1) -> list[int]:
    """A prompt of so many tokens."""
    return np.random.default_rng(seed).integers(10, 4000, count).tolist()


@pytest.fixture(scope="session")
def expected(plain: Engine) -> list[tuple[int, ...]]:
    """What the model answers to the 24 prompts without any cache."""
    return [plain.generate(prompt, NEW_TOKENS).tokens for prompt in prompts()]


@pytest.mark.slow
def test_answers_are_equal_with_memory_disk_and_a_new_process(
    expected: list[tuple[int, ...]], make_engine: MakeEngine, make_store: MakeStore, tmp_path: Path, tiny_folder: Path
) -> None:
    """24 prompts of 1 to 6,000 tokens get token-identical answers from memory, from disk, and in another process."""

    def open_engine() -> tuple[Engine, Store]:
        store = make_store(disk=True)
        return make_engine(store), store

    cached = [(len(prompt) - 1) // 32 * 32 for prompt in prompts()]
    engine, store = open_engine()
    for arm in ("filling", "memory"):
        results = [engine.generate(prompt, NEW_TOKENS) for prompt in prompts()]
        assert [result.tokens for result in results] == expected, arm
    assert loads(results) == [(tokens, {"tail"}) for tokens in cached]
    engine.close()
    store.close()

    engine, store = open_engine()
    results = [engine.generate(prompt, NEW_TOKENS) for prompt in prompts()]
    assert [result.tokens for result in results] == expected
    assert loads(results) == [(tokens, {"tail"}) for tokens in cached]
    assert engine.metrics.value("cached_tokens_total", (("tier", "disk"),)) > 6000
    engine.close()
    store.close()

    answers = in_another_process(disk_path=str(tmp_path / "disk"))
    assert [tuple(answer["tokens"]) for answer in answers] == expected
    assert [answer["cached_tokens"] for answer in answers] == cached


def in_another_process(*, first: int = 0, step: int = 1, **settings: str | float) -> list[dict[str, Any]]:
    """What a new process with these settings answers to the 24 prompts, or from `first` on to every so many."""
    script = Path(__file__).with_name("other_process.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), json.dumps(settings), str(first), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


@pytest.mark.matrix("restart", "redis")
def test_a_new_process_with_an_empty_disk_answers_from_redis(
    expected: list[tuple[int, ...]], make_engine: MakeEngine, make_store: MakeStore, tmp_path: Path, tiny_folder: Path
) -> None:
    """Two processes that share nothing but Redis give the same answers, and the second computes no token it holds."""
    step = 5  # 6,000 tokens are the last of these
    some = prompts()[3::step]
    with RedisServer(tmp_path) as server:
        shared = {"redis_url": server.url, "redis_wait_seconds": 5.0}
        store = make_store(**shared)
        engine = make_engine(store)
        assert [engine.generate(prompt, NEW_TOKENS).tokens for prompt in some] == expected[3::step]
        engine.close()
        assert store.flush(60.0)
        answers = in_another_process(first=3, step=step, disk_path=str(tmp_path / "empty"), **shared)
    assert [tuple(answer["tokens"]) for answer in answers] == expected[3::step]
    assert [answer["cached_tokens"] for answer in answers] == [
        min(4096, (len(prompt) - 1) // 32 * 32) for prompt in some
    ]
    assert sum(answer["by_tier"].get("redis", 0) for answer in answers) > 4_000
    assert all("disk" not in answer["by_tier"] for answer in answers)


def loads(results: Sequence[Result]) -> list[tuple[int, set[str]]]:
    """How much each request loaded, and why not more."""
    return [
        (r.cached_tokens, {str(part.reason) for part in r.receipt.missing} if r.receipt else set()) for r in results
    ]


def test_tokens_are_counted_once(make_engine: MakeEngine, make_store: MakeStore) -> None:
    """Counters of tokens add up to what requests sent, loaded and got; missing blocks are counted by reason."""
    store = make_store()
    engine = make_engine(store)
    for _ in range(2):
        engine.generate(numbers(100), 7)
    metrics = engine.metrics
    assert metrics is store.metrics
    assert metrics.value("prompt_tokens_total") == 200
    assert metrics.value("cached_tokens_total", (("tier", "memory"),)) == 96
    assert metrics.value("generated_tokens_total") == 14
    assert metrics.value("missing_blocks_total", (("reason", Reason.NEVER_SEEN),)) == 3
    assert metrics.value("missing_blocks_total", (("reason", Reason.TAIL),)) == 2


def test_a_next_turn_finds_prompt_and_reply(make_engine: MakeEngine, make_store: MakeStore, plain: Engine) -> None:
    """Blocks that generation completed are kept, and computing on them equals computing everything anew."""
    engine = make_engine(make_store())
    history = numbers(70)
    for turn in range(3):
        result = engine.generate(history, 40)
        assert result.tokens == plain.generate(history, 40).tokens
        assert result.cached_tokens == (0 if turn == 0 else (len(history) - 30 - 1) // 32 * 32)
        history += [*result.tokens, *numbers(30, seed=turn)]


def test_memory_tiers_smaller_than_a_prompt_do_no_harm(
    make_engine: MakeEngine, make_store: MakeStore, plain: Engine
) -> None:
    """A store that can hold a third of a prompt keeps its beginning, and answers stay equal."""
    engine = make_engine(make_store(memory_bytes=4 << 20))
    prompt = numbers(2500)
    results = [engine.generate(prompt, 4) for _ in range(3)]
    assert {result.tokens for result in results} == {plain.generate(prompt, 4).tokens}
    assert all(result.cached_tokens < 2500 for result in results)


def test_long_prompts_load_in_windows(
    make_engine: MakeEngine, make_store: MakeStore, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With staging memory for 3 blocks, 40 blocks go in and out all the same."""
    monkeypatch.setattr(engine_module, "STAGING_BYTES", 3 * 131072)
    engine = make_engine(make_store())
    prompt = numbers(1290)
    first, second = engine.generate(prompt, 5), engine.generate(prompt, 5)
    assert first.tokens == second.tokens == plain.generate(prompt, 5).tokens
    assert second.cached_tokens == 1280
    assert second.receipt is not None
    assert second.receipt.by_tier == {"memory": 1280}


def test_streams_side_by_side_equal_streams_alone(
    make_engine: MakeEngine, make_store: MakeStore, plain: Engine
) -> None:
    """Eight requests that take turns, sampled ones among them, answer as each would by itself."""
    engine = make_engine(make_store())
    shared = numbers(300)
    requests = [
        GenerateRequest(array(shared + numbers(40 * at, at)), 20, sampling=Sampling(at % 2 * 0.8, 0.9, seed=at))
        for at in range(8)
    ]
    together = [generation.result().tokens for generation in [engine.submit(request) for request in requests]]
    alone = [plain.submit(request).result().tokens for request in requests]
    assert together == alone


def test_first_tokens_of_short_requests_do_not_wait_for_long_ones(make_engine: MakeEngine) -> None:
    """While a long prompt is computed in pieces, a short request that came later is answered first."""
    engine = make_engine()
    order: list[str] = []
    # Five pieces: on a busy machine the short request may be taken in only after the first of them.
    long = engine.submit(GenerateRequest(array(numbers(8500)), 1), lambda event: event.choice and order.append("long"))
    short = engine.submit(GenerateRequest(array(numbers(5)), 1), lambda event: event.choice and order.append("short"))
    engine.submit(GenerateRequest(array(numbers(5)), 1)).result()
    while not (long.account.ended and short.account.ended):
        engine.generate([5], 1)
    assert order == ["short", "long"]


def test_salts_do_not_share_blocks(make_engine: MakeEngine, make_store: MakeStore) -> None:
    """The same prompt under another salt finds nothing, and answers the same."""
    engine = make_engine(make_store())
    prompt = numbers(200)
    results = {salt: engine.generate(prompt, 6, salt=salt) for salt in (b"", b"one", b"two")}
    assert {result.cached_tokens for result in results.values()} == {0}
    assert len({result.tokens for result in results.values()}) == 1
    assert engine.generate(prompt, 6, salt=b"one").cached_tokens == 192
    assert root_key(b"one") != root_key(b"two")


def test_load_and_save_can_be_left_out(make_engine: MakeEngine, make_store: MakeStore) -> None:
    """A request may leave no trace, or use none."""
    store = make_store()
    engine = make_engine(store)
    prompt = numbers(200)
    engine.generate(prompt, 2, save=False)
    assert store.usage()["memory"].blocks == 0
    engine.generate(prompt, 2)
    assert engine.generate(prompt, 2, load=False).cached_tokens == 0


def test_a_receipt_says_what_was_loaded_and_why_not_more(make_engine: MakeEngine, make_store: MakeStore) -> None:
    """Each request has its receipt by its id, whose tokens add up and whose last reason is the tail."""
    store = make_store()
    engine = make_engine(store)
    prompt = numbers(200)
    engine.generate(prompt, 1, request_id="first")
    receipt = engine.generate(prompt, 1, request_id="second").receipt
    assert receipt is not None
    assert receipt == store.receipts.get("second")
    assert (receipt.loaded_tokens, receipt.computed_tokens, receipt.by_tier) == (192, 8, {"memory": 192})
    assert [part.reason for part in receipt.missing] == [Reason.TAIL]
    first = store.receipts.get("first")
    assert first is not None
    assert [part.reason for part in first.missing] == [Reason.NEVER_SEEN, Reason.TAIL]


@pytest.mark.parametrize("verb", ["match", "load", "save", "release", "unsaved", "receipts", "costs"])
def test_a_failing_store_fails_no_request(
    verb: str,
    make_engine: MakeEngine,
    make_store: MakeStore,
    plain: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever verb of the store raises: the answer is the same, and failures are counted, and logged once."""
    store = make_store()
    engine = make_engine(store)
    prompt = numbers(100)
    engine.generate(prompt, 3)

    def fail(*_: object, **__: object) -> None:
        msg = "broken"
        raise OSError(msg)

    if verb in {"receipts", "costs"}:
        monkeypatch.setattr(getattr(store, verb), {"receipts": "record", "costs": "recomputed"}[verb], fail)
    else:
        monkeypatch.setattr(store, verb, fail)
    for seed in (2, 3):
        prompt += numbers(64, seed)
        assert engine.generate(prompt, 3).tokens == plain.generate(prompt, 3).tokens
    assert engine.metrics.value("tier_failures_total", (("tier", "store"),)) >= 2
    assert len([record for record in caplog.records if "the store failed" in record.message]) == 1


def test_damage_in_memory_is_computed_around(make_engine: MakeEngine, make_store: MakeStore, plain: Engine) -> None:
    """A byte that changed in the memory tier is noticed before anything is computed on it."""
    store = make_store()
    engine = make_engine(store)
    prompt = numbers(200)
    engine.generate(prompt, 3)
    block = store._warm.block(engine.served.layout.id, engine_keys(prompt)[2])
    assert block is not None
    block[0][5000] ^= 1
    result = engine.generate(prompt, 3)
    assert result.tokens == plain.generate(prompt, 3).tokens
    assert result.cached_tokens == 64
    assert result.receipt is not None
    assert result.receipt.missing[0].reason is Reason.CORRUPT


def engine_keys(prompt: list[int]) -> list[bytes]:
    """The prompt's block keys."""
    from thermocline.blocks.key import block_keys

    return list(block_keys(array(prompt), root=root_key(), tokens_per_block=32))


def test_a_cancelled_request_ends_within_a_token(make_engine: MakeEngine) -> None:
    """Cancelling ends a stream at once, frees its memory, and leaves the others alone."""
    engine = make_engine()
    stopped = engine.submit(GenerateRequest(array(numbers(10)), 5000, ignore_eos=True))
    other = engine.submit(GenerateRequest(array(numbers(10)), 30, ignore_eos=True))
    events = iter(stopped)
    next(events)
    stopped.cancel()
    assert [event.finish for event in events][-1] is Finish.CANCELLED
    assert len(other.result().tokens) == 30


def test_waiting_requests_can_be_cancelled(make_engine: MakeEngine) -> None:
    """A request that is cancelled before its first turn ends without computing anything."""
    engine = make_engine()
    generation = engine.submit(GenerateRequest(array(numbers(6000)), 5))
    generation.cancel()
    assert [event.finish for event in generation] == [Finish.CANCELLED]


def test_requests_in_flight_are_bounded(make_engine: MakeEngine) -> None:
    """One request more than the bound is refused with status 429 and a hint; those before it are served."""
    engine = make_engine(requests_max=3)
    running = [engine.submit(GenerateRequest(array(numbers(5)), 50, ignore_eos=True)) for _ in range(3)]
    with pytest.raises(RequestError) as refused:
        engine.submit(GenerateRequest(array(numbers(5)), 5))
    assert refused.value.status == 429
    assert refused.value.hint
    assert [len(generation.result().tokens) for generation in running] == [50] * 3


def test_a_request_without_memory_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory of a request cannot be had, that request ends with an error and the next one is answered."""
    engine = make_engine()
    take, refusals = engine._pool.take, [OSError(12, "no memory")]
    monkeypatch.setattr(engine._pool, "take", lambda tokens: _raise(refusals.pop()) if refusals else take(tokens))
    with pytest.raises(ModelError, match="failed"):
        engine.generate([5, 6, 7], 2)
    assert len(engine.generate([5, 6, 7], 2).tokens) == 2
    assert engine.alive


def _raise(error: Exception) -> None:
    raise error


def test_memory_for_requests_is_bounded(make_engine: MakeEngine, model: Model) -> None:
    """Requests that do not fit into memory together run one after the other; freed memory is used again."""
    engine = make_engine(kv_bytes_max=1)
    limit = engine._pool.bytes_max
    requests = [GenerateRequest(array(numbers(10)), model.context_tokens - 10) for _ in range(3)]
    for generation in [engine.submit(request) for request in requests]:
        next(iter(generation))
        assert engine._pool.used_bytes <= limit
        generation.cancel()
        assert [event.finish for event in generation][-1] is Finish.CANCELLED


@pytest.mark.parametrize(
    ("tokens", "new_tokens", "code"),
    [
        ([], 1, None),
        ([4096], 1, None),
        ([5] * 32768, 1, "context_length_exceeded"),
        ([5], 32768, "context_length_exceeded"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    plain: Engine, tokens: list[int], new_tokens: int, code: str | None
) -> None:
    """An empty prompt, an unknown token and too long a text are refused with a hint before they are queued."""
    with pytest.raises(RequestError) as refused:
        plain.generate(tokens, new_tokens)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, "prompt", code)
    assert refused.value.hint


def test_the_whole_context_can_be_used(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of the context is computed without looking beyond it."""
    monkeypatch.setattr(plain, "served", replace(plain.served, context_tokens=50))
    assert len(plain.generate(numbers(45), 5).tokens) == 5


def test_numbers_that_are_not_finite_fail_one_request_only(
    make_engine: MakeEngine, model: Model, plain: Engine
) -> None:
    """A NaN ends the request that met it with an error, and no later request meets its memory."""
    engine = make_engine()
    good = engine.generate([5, 6, 7], 3).tokens
    weight = model.module.get_input_embeddings().weight
    with torch.no_grad():
        saved = weight[9].clone()
        weight[9] = float("nan")
    try:
        with pytest.raises(ModelError, match="not finite"):
            engine.generate([5, 9, 7], 3)
    finally:
        with torch.no_grad():
            weight[9] = saved
    assert engine.generate([5, 6, 7], 3).tokens == good


def test_a_watcher_that_raises_stops_its_own_request(make_engine: MakeEngine) -> None:
    """The engine survives a broken watcher, and goes on with the others."""
    engine = make_engine()

    def watcher(event: Event) -> None:
        msg = "gone"
        raise RuntimeError(msg)

    generation = engine.submit(GenerateRequest(array(numbers(5)), 5000, ignore_eos=True), watcher)
    assert len(engine.generate(numbers(5), 5).tokens) == 5
    assert generation.cancelled


def test_stop_strings_end_tokens_and_text(plain: Engine) -> None:
    """An answer ends before a stop string, with an end token, or at its length, and says which."""
    prompt = array(numbers(20))
    whole = plain.generate(prompt, 12)
    assert whole.finish is Finish.LENGTH
    assert whole.text == plain.text.decode(whole.tokens)
    stop = whole.text[10:14]
    stopped = plain.submit(GenerateRequest(prompt, 12, stop=(stop,), ignore_eos=True)).result()
    assert stopped.finish is Finish.STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.tokens) <= 12


def test_end_tokens_end_an_answer(make_engine: MakeEngine) -> None:
    """The model's end token ends the answer and is no text, unless the request ignores it."""
    engine = make_engine()
    prompt = array(numbers(20))
    whole = engine.generate(prompt, 6)
    engine.served = replace(engine.served, end_tokens=frozenset({whole.tokens[3]}))
    ended = engine.submit(GenerateRequest(prompt, 6)).result()
    assert (ended.finish, ended.tokens) == (Finish.STOP, whole.tokens[:4])
    assert ended.text == engine.text.decode(whole.tokens[:3])
    assert engine.submit(GenerateRequest(prompt, 6, ignore_eos=True)).result().tokens == whole.tokens


def test_closing_cancels_what_is_in_flight(make_engine: MakeEngine) -> None:
    """A closed engine tells its requests, refuses new ones, and may be closed again."""
    engine = make_engine()
    generation = engine.submit(GenerateRequest(array(numbers(5)), 5000, ignore_eos=True))
    next(iter(generation))
    engine.close()
    assert [event.finish for event in generation][-1] is Finish.CANCELLED
    with pytest.raises(RequestError) as refused:
        engine.generate([5], 1)
    assert refused.value.status == 503
    engine.close()
