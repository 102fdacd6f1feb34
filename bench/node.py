"""A node's answer: matches of 64 blocks from another process, idle and under load, over a bare socket's round trip.

`python -m bench.node load SOCKET` is the load: an engine that saves and loads paths as fast as it can, until it is
ended. `python -m bench.node echo SOCKET` answers questions of the same size without looking at them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.harness import CLOCK, ROOT, Progress, Report, check, percentile, ratios, spread, timed
from tests.store.making import make_layout
from tests.vllm.node import Node
from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.clock import Clock
from thermocline.errors import BenchError
from thermocline.node.client import NodeClient
from thermocline.store.plan import Plan
from thermocline.store.receipt import Reason
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
PATH_BLOCKS = 64
TOKENS_PER_BLOCK = 128
BLOCK_BYTES = 256 * 1024
PATHS, LOAD_PATHS = 8, 6
"""Known to the node; and those that the load saves and loads."""
SPARE_PATHS = 5
"""What memory has room for beside the known paths, lent slots included: the load needs more, so some must always go."""
IDLE_ROUNDS, LOADED_ROUNDS = 1000, 1000
AGAIN_CALLS = 100
REST_SECONDS = 1e-3
"""Between two rounds, as between two steps of an engine. What is asked first after a rest is slower everywhere."""
LOAD_REST_SECONDS = 0.05
"""Between two paths of 16 MiB that the load saves, each while it loads another."""
PATIENCE_SECONDS = 10.0
QUESTION_BYTES = 4 + PATH_BLOCKS * 32 + 32
ANSWER_BYTES = 4 + PATH_BLOCKS * (16 + 5) + 160
"""A sum and an offset per block, and what the plan says beside them."""
IDLE, LOADED, AGAIN = "node match, idle", "node match, under load and save", "asking again"
BARE, RESTED, RESTED_BARE = "bare socket", "node match, after a rest", "bare socket, after a rest"
LAYOUT = make_layout("bench", block_bytes=BLOCK_BYTES, tokens_per_block=TOKENS_PER_BLOCK)


def run(progress: Progress) -> Report:
    """Ask a node of its own, first while nobody else does, then while another engine saves and loads."""
    seconds: dict[str, list[float]] = {name: [] for name in (IDLE, BARE, RESTED, RESTED_BARE, AGAIN, LOADED)}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        disk = {"disk_path": folder / "disk", "disk_bytes": 1024 * MIB}
        node = stack.enter_context(Node(folder, memory_bytes=(PATHS + SPARE_PATHS) * 16 * MIB, **disk))
        client = stack.enter_context(contextlib.closing(NodeClient(node.socket)))
        paths = [_path(1, number) for number in range(PATHS)]
        for at, path in enumerate(paths):
            progress(f"saving path {at + 1} of {PATHS}")
            _save(client, path)
        bare = stack.enter_context(_echo(folder / "echo.sock"))
        turns = itertools.cycle(paths)
        for at in range(IDLE_ROUNDS):
            progress(f"idle: {at + 1} of {IDLE_ROUNDS}")
            _idle(client, next(turns), bare, seconds)
        with _load(node.socket):
            for at in range(LOADED_ROUNDS):
                progress(f"under load: {at + 1} of {LOADED_ROUNDS}")
                CLOCK.sleep(REST_SECONDS)
                seconds[LOADED].append(_match(client, next(turns)))
    return _report(seconds)


def _idle(
    client: NodeClient, path: Sequence[BlockKey], bare: Callable[[], None], seconds: dict[str, list[float]]
) -> None:
    CLOCK.sleep(REST_SECONDS)
    seconds[RESTED].append(_match(client, path))
    seconds[IDLE].append(_match(client, path))
    CLOCK.sleep(REST_SECONDS)
    seconds[RESTED_BARE].append(timed(bare))
    seconds[BARE].append(timed(bare))
    staging = client.stage([LAYOUT], path, prompt_tokens=_tokens(path))
    assert staging.wait(PATIENCE_SECONDS)
    seconds[AGAIN].append(timed(lambda: [staging.plan() for _ in range(AGAIN_CALLS)]) / AGAIN_CALLS)
    staging.cancel()


def _match(client: NodeClient, path: Sequence[BlockKey]) -> float:
    """Seconds from the question to a plan whose blocks all lie in memory, leased; or until none came in time."""
    started = CLOCK.now()
    plan = client.match([LAYOUT], path, prompt_tokens=_tokens(path))
    seconds = CLOCK.now() - started
    client.release(plan.lease)
    if plan.blocks != len(path):
        _is_late(client, plan)
    return seconds


def _is_late(client: NodeClient, plan: Plan) -> None:
    """A late answer is a miss, and counts with the time it took. Raises BenchError where something else is missing."""
    if {gap.reason for gap in plan.missing} - {Reason.LATE, Reason.TIER_DOWN, Reason.TAIL}:
        why = "; ".join(f"{gap.reason}: {gap.detail}" for gap in plan.missing)
        raise BenchError(f"only {plan.blocks} blocks were found: {why}", hint="the paths may not fit the node's memory")
    if not client.wait_up(PATIENCE_SECONDS):
        raise BenchError("the node does not answer any more", hint="its log may say why")


def _tokens(path: Sequence[BlockKey]) -> int:
    return len(path) * TOKENS_PER_BLOCK + 1


def _path(kind: int, number: int) -> list[BlockKey]:
    tokens = np.random.default_rng([8, kind, number]).integers(0, 4096, PATH_BLOCKS * TOKENS_PER_BLOCK, np.uint32)
    return block_keys(tokens, root=root_key(), tokens_per_block=TOKENS_PER_BLOCK)


def _save(client: NodeClient, path: Sequence[BlockKey]) -> None:
    """Save a path until the node has all of it."""
    client.ready(LAYOUT, len(path))
    data = np.random.default_rng(len(path)).integers(0, 256, BLOCK_BYTES, np.uint8)
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while True:
        job = client.save(LAYOUT, path, [[data]] * len(path))
        job.wait(PATIENCE_SECONDS)
        if set(job.outcomes) == {Outcome.HIT}:
            return
        if CLOCK.now() > deadline:
            raise BenchError(f"the node does not take a path: {set(job.outcomes)}", hint="the machine may be too busy")
        CLOCK.sleep(0.01)


# -- other processes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _process(*words: str) -> Iterator[subprocess.Popen[str]]:
    """This file in another process, once it has said that it is ready; ended at the end."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    argv = [sys.executable, "-m", "bench.node", *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def _load(node: Path) -> Iterator[None]:
    with _process("load", str(node)) as process:
        yield
        assert process.poll() is None, "the load has ended by itself"


@contextlib.contextmanager
def _echo(path: Path) -> Iterator[Callable[[], None]]:
    """One round trip to a process that only reads and writes: what no node can beat."""
    with _process("echo", str(path)), socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        question = bytes(QUESTION_BYTES)

        def ask() -> None:
            link.sendall(question)
            link.recv(ANSWER_BYTES, socket.MSG_WAITALL)

        yield ask


def be_echo(path: str) -> None:
    """Answer one client until it goes."""
    answer = bytes(ANSWER_BYTES)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        link, _ = listening.accept()
        with link:
            while link.recv(QUESTION_BYTES, socket.MSG_WAITALL):
                link.sendall(answer)


def be_load(path: str, clock: Clock = CLOCK) -> None:
    """Save paths and load others, one after the other, as an engine under load does."""
    client = NodeClient(Path(path))
    client.wait_up(PATIENCE_SECONDS)
    into = [[np.empty(BLOCK_BYTES, np.uint8)] for _ in range(PATH_BLOCKS)]
    paths = [_path(2, number) for number in range(LOAD_PATHS)]
    _save(client, paths[0])
    print("ready", flush=True)
    data = np.random.default_rng(1).integers(0, 256, BLOCK_BYTES, np.uint8)
    for at in itertools.count(1):
        saved = client.save(LAYOUT, path := paths[at % LOAD_PATHS], [[data]] * PATH_BLOCKS)
        plan = client.match([LAYOUT], paths[(at - 1) % LOAD_PATHS], prompt_tokens=_tokens(path))
        client.load(plan, 0, into)
        client.release(plan.lease)
        saved.wait(PATIENCE_SECONDS)
        clock.sleep(LOAD_REST_SECONDS)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(seconds: dict[str, list[float]]) -> Report:
    medians = {name: spread(taken) for name, taken in seconds.items()}
    checks = [
        check(f"{IDLE}, median", medians[IDLE]["median"], "s", 120e-6, "lower"),
        check(f"{LOADED}, p99", percentile(seconds[LOADED], 0.99), "s", 2e-3, "lower"),
        check(f"{AGAIN}, median", medians[AGAIN]["median"], "s", 5e-6, "lower"),
    ]
    shares = {
        f"{ours} / {bare}": spread(ratios(seconds[ours], seconds[bare]))
        for ours, bare in ((IDLE, BARE), (RESTED, RESTED_BARE))
    }
    tails = [
        f"p99: {name} {1e6 * percentile(taken, 0.99):,.1f} us, at most {1e6 * max(taken):,.1f} us"
        for name, taken in seconds.items()
    ]
    details = {
        "arms": medians,
        "ratios": shares,
        "p99_seconds": {name: percentile(taken, 0.99) for name, taken in seconds.items()},
        "path_blocks": PATH_BLOCKS,
        "block_bytes": BLOCK_BYTES,
        "notes": tails,
    }
    return Report(checks, details)


if __name__ == "__main__":
    {"load": be_load, "echo": be_echo}[sys.argv[1]](sys.argv[2])
