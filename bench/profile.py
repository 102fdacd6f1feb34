"""What `thermocline profile` measures of a server predicts first tokens of lengths and shares that it did not ask.

Three servers with the same small model, one after the other: our own engine, vLLM with its own prefix cache, and vLLM
that forgets between requests, so that cached tokens come out of a node's memory. Each is swept, what that measured is
written and read back, and then other prompts, between those of the sweep, are predicted before they are asked.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.harness import CLOCK, Progress, Report, check
from bench.vllm_server import Server, connector, vllm_python
from tests.vllm.node import Node
from thermocline.costs import measured
from thermocline.costs.measured import Measured
from thermocline.engines import tiny
from thermocline.errors import BenchError
from thermocline.lens.profile import plan, profile
from thermocline.lens.sweep import NEW_TOKENS, Answer, Endpoint, Prompt, Prompts

MIB = 1 << 20
CONTEXTS, SHARES = (300, 700, 1500, 3100), (0.5, 0.9)
SEED = 7
UNSEEN = tuple(sorted(random.Random(SEED).sample(range(CONTEXTS[0], CONTEXTS[-1]), 5)))  # noqa: S311  # any will do
UNSEEN_SHARES = (0.0, 0.3, 0.75)
"""Lengths and shares that are not in the sweep, but within its range."""
ASKED = 10
"""Of each kind, in two halves: how far the medians of these differ is what no prediction can be better than."""
SECONDS_MAX = 120.0
SAVED_SECONDS = 0.1
OFF_MAX = 15.0
OURS, VLLM, NODE = "our engine", "vLLM", "vLLM, cached by a node"


def run(progress: Progress) -> Report:
    """Sweep each server, then ask it what the sweep did not."""
    checks, details = [], {}
    for name, served in ((OURS, _ours), (VLLM, _vllm), (NODE, _vllm_with_node)):
        progress(f"{name}: starting")
        with served() as endpoint:
            progress(f"{name}: sweeping")
            known = _swept(endpoint)
            rows = list(_unseen(endpoint, known, progress, name))
        off = [abs(row["predicted_seconds"] / row["first_token_seconds"] - 1) * 100 for row in rows]
        checks += [
            check(f"{name}: prediction off, median", statistics.median(off), "%", OFF_MAX, "lower"),
            check(f"{name}: prediction off, worst of {len(off)}", max(off), "%", OFF_MAX, "lower"),
        ]
        details[name] = {"weights": dict(known.weights()), "block_tokens": known.block_tokens, "unseen": rows}
    again = ", ".join(
        f"{name} {max(row['again_off'] for row in told['unseen']):.0f} %" for name, told in details.items()
    )
    notes = [
        f"The same kind asked again is off by, at worst: {again} (medians of the even and of the odd rounds).",
        f"Swept: {CONTEXTS} tokens, shares 0 and {SHARES} asked before, medians of five. Then asked: {UNSEEN} tokens,",
        f"shares {UNSEEN_SHARES}, medians of {ASKED}; each predicted from its length and share alone.",
    ]
    return Report(checks, {"servers": details, "notes": notes})


def _swept(endpoint: Endpoint) -> Measured:
    asked = plan(endpoint.context_tokens, CONTEXTS, SHARES, ())
    found = profile(endpoint, asked, CLOCK, SECONDS_MAX, lambda _: None, SEED)
    if found.stopped or found.failed:
        raise BenchError(f"the sweep of {endpoint.url} stopped {found.stopped}", hint="is the machine busy?")
    with tempfile.TemporaryDirectory() as folder:
        measured.write(Path(folder) / "measured.json", found.measured)
        return measured.read(Path(folder) / "measured.json")


def _unseen(endpoint: Endpoint, known: Measured, progress: Progress, name: str) -> Iterator[dict[str, float]]:
    prompts = Prompts(SEED + 1)
    kinds = [(length, share) for length in UNSEEN for share in UNSEEN_SHARES]
    seconds: dict[tuple[int, float], list[float]] = {kind: [] for kind in kinds}
    cached: dict[tuple[int, float], int] = {}
    order = random.Random(SEED)  # noqa: S311  # only an order
    for at in range(ASKED):
        progress(f"{name}: what it was not asked, round {at + 1} of {ASKED}")
        order.shuffle(kinds)
        parents = {kind: prompts.fresh(kind[0]) for kind in kinds if kind[1]}
        for parent in parents.values():
            endpoint.ask(parent)
        for kind in kinds:
            length, share = kind
            answer = endpoint.ask(prompts.like(parents[kind], share) if share else prompts.fresh(length))
            if answer.trouble:
                raise BenchError(f"{endpoint.url} answers {answer.trouble}", hint="look at its log")
            seconds[kind].append(answer.seconds)
            cached[kind] = answer.cached_tokens or 0
    for (length, share), taken in sorted(seconds.items()):
        yield {
            "prompt_tokens": length,
            "share": share,
            "cached_tokens": cached[length, share],
            "first_token_seconds": statistics.median(taken),
            "again_off": abs(statistics.median(taken[::2]) / statistics.median(taken[1::2]) - 1) * 100,
            "predicted_seconds": known.first_token_seconds(length, int(share * length)),
        }


# -- servers -----------------------------------------------------------------------------------------------------------


class _Forgetting(Endpoint):
    """A vLLM server whose own prefix cache is empty at every request."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.url, None, CLOCK)
        self._server = server

    def ask(self, prompt: Prompt, count: int = NEW_TOKENS) -> Answer:
        CLOCK.sleep(SAVED_SECONDS)
        self._server.forget()
        return super().ask(prompt, count)


@contextlib.contextmanager
def _ours() -> Iterator[Endpoint]:
    words = [sys.executable, "-m", "thermocline", "serve", "--port", "0", "--memory-bytes", "512MiB", "--json"]
    with subprocess.Popen([*words, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            yield Endpoint(msgspec.json.decode(process.stdout.readline())["url"], None, CLOCK)
        finally:
            process.terminate()


@contextlib.contextmanager
def _vllm() -> Iterator[Endpoint]:
    folder = tempfile.TemporaryDirectory(prefix="tcl-bench-")
    with folder as path, Server(vllm_python(), tiny.ensure(), Path(path)) as server:
        yield Endpoint(server.wait().url, None, CLOCK)


@contextlib.contextmanager
def _vllm_with_node() -> Iterator[Endpoint]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        node = stack.enter_context(Node(folder, memory_bytes=768 * MIB))
        server = stack.enter_context(Server(vllm_python(), tiny.ensure(), folder, transfer=connector(node.socket)))
        yield _Forgetting(server.wait())
