"""Two real vLLM servers behind routers: the same conversations through each, one router after the other, in rounds.

Figures are the servers' own: a hit is a token that vLLM counts as found in its prefix cache, over all prompt tokens.
Both servers share all cores with the routers and clients, so a busy server slows the other one down too.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.fleet_workload import CONVERSATIONS, TURNS, Ran, conversations, fresh
from bench.harness import CLOCK, Progress, Report, check, percentile, ratios, spread
from bench.routers import Router, admin_of, peer_routers, thermocline_route
from bench.vllm_server import BLOCK_TOKENS, MODEL_NAME, Server, free_port, vllm_python
from thermocline.blocks.key import block_keys, root_key
from thermocline.engines import tiny
from thermocline.errors import BenchError
from thermocline.lens import decision
from thermocline.tokens.tokenizer import load_tokenizer

OURS, ROUND_ROBIN, LEAST, SESSION = "predicted_ttft", "round_robin", "least_loaded", "session_hash"
POLICIES = (OURS, ROUND_ROBIN, LEAST, SESSION)
ROUNDS, FRESH_ROUNDS, FRESH_REQUESTS = 5, 3, 32
NAMES = ("a", "b")
BLOCKS = 192
REST_SECONDS = 1.0
COUNTERS = {
    "hits": "vllm:prefix_cache_hits_total",
    "prompt": "vllm:prompt_tokens_total",
    "requests": "vllm:request_success_total",
}


@dataclass(slots=True)
class Seen:
    """One arm's runs. `requests` are those of the first and the second server."""

    rate: list[float] = field(default_factory=list)
    hit: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)
    first_p50: list[float] = field(default_factory=list)
    requests: list[tuple[int, int]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run(progress: Progress) -> Report:
    """All arms in turns, the first place moving on every round; then prompts that share nothing; then predictions."""
    seen: dict[str, Seen] = {}
    without: dict[str, Seen] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        model, events = tiny.ensure(), f"tcp://127.0.0.1:{free_port()}"
        servers, instances = _servers(stack, folder, model, events, progress)
        peers = peer_routers([server.url for server in servers])
        arms = [*POLICIES, *peers]

        def measured(seen: Seen, name: str, ask: Callable[[str], Ran]) -> None:
            with _router(name, folder, instances, events, model, peers) as url:
                _measured(seen, servers, model, lambda: ask(url))

        for at in range(ROUNDS):
            for name in arms[at % len(arms) :] + arms[: at % len(arms)]:
                progress(f"round {at + 1} of {ROUNDS}: {name}")
                talk = partial(conversations, salt=f"{name} {at}", sessions="session" in name or "hash" in name)
                measured(seen.setdefault(name, Seen()), name, talk)
        for at in range(FRESH_ROUNDS):
            for name in (OURS, LEAST)[:: 1 if at % 2 else -1]:
                progress(f"nothing reused, round {at + 1} of {FRESH_ROUNDS}: {name}")
                talk = partial(fresh, salt=f"fresh {name} {at}", count=FRESH_REQUESTS)
                measured(without.setdefault(name, Seen()), name, talk)
        told = instances.split(", ")
        predictions = {
            "two servers, 8 at once": _predictions(folder, instances, events, model, 8, progress),
            "one server, 4 at once": _predictions(folder, told[0], events, model, 4, progress),
        }
    return _report(seen, without, predictions)


def _servers(
    stack: contextlib.ExitStack, folder: Path, model: Path, events: str, progress: Progress
) -> tuple[list[Server], str]:
    """Both servers, each with its events going to whichever gateway listens; and how a gateway is told of them."""
    servers, told = [], []
    for name in NAMES:
        progress(f"starting server {name}")
        replay = f"tcp://127.0.0.1:{free_port()}"
        config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events, "replay_endpoint": replay}
        arguments = ["--kv-events-config", json.dumps(config | {"topic": f"kv@{name}@{MODEL_NAME}"})]
        arguments += ["--num-gpu-blocks-override", str(BLOCKS), "--max-num-seqs", "16", "--block-size"]
        server = Server(
            vllm_python(),
            model,
            folder,
            arguments=[*arguments, str(BLOCK_TOKENS)],
            environment={"PYTHONHASHSEED": "0"},
        )
        servers.append(stack.enter_context(server).wait())
        told.append(f"{name}={server.url} replay={replay} capacity={BLOCKS * BLOCK_TOKENS} seats=16")
    return servers, ", ".join(told)


@contextlib.contextmanager
def _router(name: str, folder: Path, instances: str, events: str, model: Path, peers: dict[str, Any]) -> Iterator[str]:
    """A router of that name, ready. Peers are asked for one token first, as they look for servers by themselves."""
    router = peers[name](folder) if name in peers else _ours(folder, instances, events, model, name)
    with contextlib.closing(router):
        yield router.url


def _ours(folder: Path, instances: str, events: str, model: Path, policy: str) -> Router:
    """`thermocline route` with a tokenizer and events."""
    more = ["--events-listen", events, "--policy", policy, "--tokenizer-path", str(model), "--model", MODEL_NAME]
    return thermocline_route(folder, instances, *more, name=policy)


def _measured(seen: Seen, servers: list[Server], model: Path, run: Callable[[], Ran]) -> None:
    """Empty both caches, run, and read what the servers counted."""
    for server in servers:
        server.forget()
    CLOCK.sleep(REST_SECONDS)
    before = [server.metrics() for server in servers]
    ran = run()
    CLOCK.sleep(REST_SECONDS)
    after = [server.metrics() for server in servers]
    counted = [
        {name: now.get(key, 0) - then.get(key, 0) for name, key in COUNTERS.items()}
        for now, then in zip(after, before, strict=True)
    ]
    prompt = sum(each["prompt"] for each in counted)
    seen.rate.append(len(ran.first_token_seconds) / ran.seconds)
    seen.hit.append(sum(each["hits"] for each in counted) / prompt if prompt else 0.0)
    seen.first += ran.first_token_seconds
    seen.first_p50.append(statistics.median(ran.first_token_seconds))
    seen.requests.append((int(counted[0]["requests"]), int(counted[1]["requests"])))
    seen.failed += ran.failed
    seen.ideal.append(_ideal(model, ran.texts))


def _predictions(
    folder: Path, instances: str, events: str, model: Path, at_once: int, progress: Progress
) -> list[tuple[float, float]]:
    """Predicted and actual seconds to the first token, of the second half of a gateway's decisions."""
    progress(f"predictions, {at_once} requests at once")
    with contextlib.closing(_ours(folder, instances, events, model, OURS)) as gateway:
        for at in range(2):
            ran = conversations(gateway.url, f"predicted {at_once} {at}", at_once=at_once)
            if ran.failed:
                raise BenchError(f"requests failed: {ran.failed[0]}", hint="is the machine out of memory?")
        records = json.loads(decision.ask(admin_of(folder, OURS), "/decisions?limit=10000")[1])
    half = records[: len(records) // 2]
    return [
        (each["tries"][-1]["predicted_seconds"], each["tries"][-1]["first_byte_seconds"])
        for each in half
        if each["tries"] and each["tries"][-1]["first_byte_seconds"]
    ]


def _ideal(model: Path, texts: list[str]) -> float:
    """The share of prompt tokens in full blocks that an earlier prompt had: what a cache that forgets nothing finds."""
    tokenizer, _ = load_tokenizer(model)
    held: set[bytes] = set()
    found = asked = 0
    for text in texts:
        tokens = tokenizer.encode(text)
        keys = block_keys(tokens, root=root_key(), tokens_per_block=BLOCK_TOKENS)
        loadable = keys[: (len(tokens) - 1) // BLOCK_TOKENS]
        leading = next((at for at, key in enumerate(loadable) if key not in held), len(loadable))
        found, asked = found + leading * BLOCK_TOKENS, asked + len(tokens)
        held.update(keys)
    return found / asked


def _errors(predictions: dict[str, list[tuple[float, float]]]) -> Iterator[dict[str, Any]]:
    for where, pairs in predictions.items():
        errors = sorted(abs(told - actual) / actual for told, actual in pairs)
        yield check(f"prediction, {where}: median error", 100 * statistics.median(errors), "%", 15, "lower")
        yield check(f"prediction, {where}: p90 error", 100 * percentile(errors, 0.9), "%", 40, "lower")


def _report(
    seen: dict[str, Seen], without: dict[str, Seen], predictions: dict[str, list[tuple[float, float]]]
) -> Report:
    ours, robin = seen[OURS], seen[ROUND_ROBIN]
    most = max(max(pair) / max(1, sum(pair)) for pair in ours.requests)
    checks = [
        check("hit rate over the ideal one", 100 * statistics.median(ratios(ours.hit, ours.ideal)), "%", 99, "higher"),
        check("requests per second / round robin", _median(ours.rate, robin.rate), "x", 1.35, "higher"),
        check("first token p50 / round robin", _median(ours.first_p50, robin.first_p50), "x", 0.70, "lower"),
        check("requests at the busier server", 100 * most, "%", 60, "lower"),
        check("nothing reused: / least_loaded", _median(without[OURS].rate, without[LEAST].rate), "x", 0.97, "higher"),
        *_errors(predictions),
        check("requests that failed", float(sum(len(each.failed) for each in (ours, robin))), "", 0.0, "lower"),
    ]
    details = {
        "ratios": {f"requests per second: {name} / round robin": spread(ratios(each.rate, robin.rate))
                   for name, each in seen.items() if len(each.rate) == len(robin.rate)},
        "policies": {name: _row(each) for name, each in seen.items()},
        "nothing_reused": {name: _row(each) for name, each in without.items()},
        "requests": CONVERSATIONS * TURNS,
        "predictions": {where: len(pairs) for where, pairs in predictions.items()},
        "notes": [_line(name, each) for name, each in seen.items()],
    }  # fmt: skip
    return Report(checks, details)


def _median(above: list[float], below: list[float]) -> float:
    return statistics.median(ratios(above, below))


def _row(seen: Seen) -> dict[str, Any]:
    return {
        "requests_per_second": statistics.median(seen.rate),
        "hit_rate": statistics.median(seen.hit),
        "ideal_hit_rate": statistics.median(seen.ideal),
        "first_token_p50_seconds": statistics.median(seen.first),
        "first_token_p90_seconds": percentile(seen.first, 0.9),
        "requests_per_server": seen.requests,
        "failed": len(seen.failed),
    }


def _line(name: str, seen: Seen) -> str:
    row = _row(seen)
    return (
        f"{name:28} {row['requests_per_second']:6.2f} req/s, hit rate {row['hit_rate']:.3f}, first token p50"
        f" {row['first_token_p50_seconds']:.2f} s, p90 {row['first_token_p90_seconds']:.2f} s,"
        f" servers {seen.requests[-1][0]} / {seen.requests[-1][1]}, failed {row['failed']}"
    )
