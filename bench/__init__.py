"""Every budget is a bench: it measures our figure and its raw limit in the same run, and fails where we fall short.

`thermocline bench list` names them. `main` is all that the command line knows of this folder.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
from dataclasses import dataclass

from bench import harness
from thermocline.errors import BenchError


@dataclass(frozen=True, slots=True)
class Entry:
    """What `bench list` says of a bench. Its module has `run(progress) -> Report`."""

    name: str
    answers: str
    cost_seconds: int
    engine: bool = False

    @property
    def module(self) -> str:
        """The module's name below `bench`."""
        return self.name.replace("-", "_")


BENCHES = {
    entry.name: entry
    for entry in (
        Entry("keys", "naming 131,072 tokens: our keys over the bare hash loop; and only the new tokens of a turn", 5),
        Entry("match", "the longest match among a million blocks: bisection, and the whole plan with its lease", 20),
        Entry("tiers", "verified loads over plain copies; disk over raw direct I/O, fresh and 95 % full", 40),
        Entry(
            "redis-tier", "blocks from Redis over MGET with a copy, and over two keys per block as a peer has them", 20
        ),
        Entry("recovery", "a million blocks found again at a start, over reading and verifying their log alone", 60),
        Entry("locality", "1,600 prefixes on 8 instances: what four policies find, in both senses of a hit", 30),
        Entry("start", "`import thermocline` and `thermocline --help` over bare python", 10),
        Entry("ttft", "first token: no cache, memory, new process on the same disk, retained cache", 120, engine=True),
        Entry("overhead", "what the store costs where nothing is ever reused, in CPU time", 150, engine=True),
        Entry("node", "a match of 64 blocks by a node: idle, under load, asked again, over a bare round trip", 30),
        Entry("near", "a hit in the process, beside seven caches and clients; herds; how soon changes are seen", 60),
        Entry("state", "the four lookups of a chat request, redis-py and three lines changed: cold, warm, ahead", 40),
        Entry("hit-ratio", "eviction of the near cache on six traces, beside five rules and Belady's bound", 240),
        Entry("route", "a routing decision, events taken in and memory per block, over Dynamo's router core", 150),
        Entry(
            "gateway", "CPU time of a request through the gateway, and the first streamed byte, beside two peers", 150
        ),
        Entry("planner", "predicted first tokens and time per token of measured servers, beside aiconfigurator", 900),
        Entry("ttft-vllm", "vLLM's first token: its own prefix hit, memory, disk; what a miss costs", 420, engine=True),
        Entry("fleet-vllm", "two vLLM servers behind routers: hits, rate, first tokens, predictions", 900, engine=True),
        Entry("profile", "first tokens of lengths that a profile did not ask, predicted from it", 300, engine=True),
        Entry("vs-lmcache", "the same vLLM with LMCache and with us: first tokens, misses, faults", 480, engine=True),
    )
}


def main(name: str, json_output: bool, save: bool) -> int:  # noqa: FBT001  # the command line passes both by name
    """Run one bench, or `list` them. Returns 0 where every check holds, else 1. Raises BenchError if it cannot run."""
    if name == "list":
        return _list(json_output=json_output)
    entry = BENCHES.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, BENCHES, n=1)
        hint = f"did you mean `thermocline bench {near[0]}`?" if near else "`thermocline bench list` names them"
        raise BenchError(f"no bench {name}", hint=hint)
    if entry.engine and importlib.util.find_spec("torch") is None:
        raise BenchError(f"bench {name} runs a model, and torch is not installed", hint="run `make engine` first")
    with harness.ended_in_order():
        result = harness.measure(name, importlib.import_module(f"bench.{entry.module}").run)
    if save:
        harness.save(result)
    print(harness.to_json(result) if json_output else harness.to_text(result))
    return 0 if harness.holds(result) else 1


def _list(*, json_output: bool) -> int:
    rows = [
        {"name": entry.name, "cost_seconds": entry.cost_seconds, "engine": entry.engine, "answers": entry.answers}
        for entry in BENCHES.values()
    ]
    if json_output:
        print(json.dumps({"benches": rows}))
        return 0
    for row in rows:
        print(f"{row['name']:12}{row['cost_seconds']:>5} s  {row['answers']}")
    return 0
