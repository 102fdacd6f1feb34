"""Time to first token of a prompt of which 2,048 tokens are known and 16 are new, in four ways that must agree.

`python -m bench.ttft FOLDER` is the new process: it opens the disk that the first one left, and answers when asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.harness import CLOCK, ROOT, Progress, Report, check, ratios, spread
from bench.retained import Retained
from thermocline.build import store_from
from thermocline.engines.models import Model, load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings

MODEL = "tiny"
KNOWN_TOKENS, NEW_TOKENS = 2_048, 16
PROMPTS = 21
"""Each is asked once in each way, so that every answer from disk is that prompt's first one."""
WARM_UP = PROMPTS
"""The number of an unrelated prompt, for the warm-up."""
THREADS = 1
"""One thread computes: two threads that wait for each other measure whoever else uses the machine."""
REST_SECONDS = 0.02
MIB = 1024 * 1024
COLD, MEMORY, DISK, RETAINED = "no cache", "memory", "disk, new process", "retained cache"


def run(progress: Progress) -> Report:
    """Fill a disk in this process, then ask each prompt in four ways, taking turns, on one thread."""
    model = load_model(MODEL, threads=THREADS)
    prompts = [_prompt(number, model) for number in range(PROMPTS + 1)]
    with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
        with _engine(model, Path(folder)) as engine:
            for at, prompt in enumerate(prompts):
                progress(f"filling the disk: prompt {at + 1} of {len(prompts)}")
                engine.generate(prompt[:KNOWN_TOKENS], 1)
        with _engine(model, None) as engine, _new_process(Path(folder)) as ask_other, contextlib.ExitStack() as stack:
            retained = stack.enter_context(Retained.of(MODEL))
            arms: dict[str, Callable[[int], dict[str, Any]]] = {
                COLD: lambda at: _ask(engine, prompts[at], use_store=False),
                MEMORY: lambda at: _ask(engine, prompts[at], use_store=True),
                DISK: ask_other,
                RETAINED: retained.ask,
            }
            for at, prompt in enumerate(prompts):
                progress(f"filling memory: prompt {at + 1} of {len(prompts)}")
                engine.generate(prompt[:KNOWN_TOKENS], 1)
                retained.keep(prompt, KNOWN_TOKENS)
            answers = _interleaved(arms, progress)
    return _report(answers, model)


def _interleaved(
    arms: dict[str, Callable[[int], dict[str, Any]]], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """One answer of each arm per prompt, the first place moving on; one prompt more, before, as a warm-up."""
    names = list(arms)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        arms[name](WARM_UP)
    for at in range(PROMPTS):
        progress(f"prompt {at + 1} of {PROMPTS}")
        for turn in range(len(names)):
            name = names[(at + turn) % len(names)]
            CLOCK.sleep(REST_SECONDS)
            answers[name].append(arms[name](at))
    return answers


def _ask(engine: Engine, prompt: np.ndarray, *, use_store: bool) -> dict[str, Any]:
    result = engine.generate(prompt, 1, load=use_store, save=False)
    return {
        "seconds": result.first_token_seconds,
        "token": result.tokens[0],
        "by_tier": result.receipt.by_tier if use_store and result.receipt else {},
    }


def _prompt(number: int, model: Model) -> np.ndarray:
    random = np.random.default_rng([6, number])
    return random.integers(2, model.vocabulary, KNOWN_TOKENS + NEW_TOKENS, dtype=np.uint32)


@contextlib.contextmanager
def _engine(model: Model, folder: Path | None) -> Iterator[Engine]:
    """An engine over memory, and a disk where a folder is given. Closing it makes everything durable."""
    settings = Settings(memory_bytes=512 * MIB, disk_path=folder, disk_bytes=1024 * MIB)
    with contextlib.closing(store_from(settings)) as store, contextlib.closing(Engine(model, store)) as engine:
        yield engine


# -- the new process ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_process(folder: Path) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Start it, wait until it is ready, and give what asks it for one prompt."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "bench.ttft", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout

        def ask(number: int) -> dict[str, Any]:
            print(number, file=asked, flush=True)
            answer: dict[str, Any] = json.loads(told.readline())
            return answer

        try:
            yield ask
        finally:
            asked.close()


def answer_from(folder: Path, asked: IO[str], told: IO[str]) -> None:
    """Be the new process: for each number on a line, ask that prompt and print the answer."""
    model = load_model(MODEL, threads=THREADS)
    with _engine(model, folder) as engine:
        for line in asked:
            answer = _ask(engine, _prompt(int(line), model), use_store=True)
            print(json.dumps(answer), file=told, flush=True)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(answers: dict[str, list[dict[str, Any]]], model: Model) -> Report:
    for name, tier in ((MEMORY, "memory"), (DISK, "disk")):
        assert all(each["by_tier"] == {tier: KNOWN_TOKENS} for each in answers[name]), f"{name}: not all was loaded"
    tokens = {name: [each["token"] for each in rows] for name, rows in answers.items()}
    seconds = {name: [each["seconds"] for each in rows] for name, rows in answers.items()}
    quotients = {
        f"{MEMORY} / {RETAINED}": ratios(seconds[MEMORY], seconds[RETAINED]),
        f"{DISK} / {RETAINED}": ratios(seconds[DISK], seconds[RETAINED]),
        f"{COLD} / {MEMORY}": ratios(seconds[COLD], seconds[MEMORY]),
        f"{COLD} / {DISK}": ratios(seconds[COLD], seconds[DISK]),
    }
    spreads = {name: spread(values) for name, values in quotients.items()}
    equal = sum(tokens[COLD][at] == tokens[MEMORY][at] == tokens[DISK][at] for at in range(PROMPTS))
    plain = sum(one == other for one, other in zip(tokens[COLD], tokens[RETAINED], strict=True))
    checks = [
        check(f"{MEMORY} / {RETAINED}", spreads[f"{MEMORY} / {RETAINED}"]["median"], "x", 1.15, "lower"),
        check(f"{DISK} / {RETAINED}", spreads[f"{DISK} / {RETAINED}"]["median"], "x", 1.4, "lower"),
        check("same first token: no cache, memory, disk", float(equal), f"of {PROMPTS}", float(PROMPTS), "higher"),
    ]
    weights = sum(parameter.numel() for parameter in model.module.parameters())
    details = {
        "arms": {name: spread(values) for name, values in seconds.items()},
        "ratios": spreads,
        "ranges": {name: [min(values), max(values)] for name, values in quotients.items()},
        "model": f"{MODEL} ({weights / 1e6:.0f} M random weights, {model.layout.dtype}), {THREADS} thread",
        "cached_tokens": KNOWN_TOKENS,
        "new_tokens": NEW_TOKENS,
        "prompts": PROMPTS,
        "notes": [f"The retained cache, which is plain transformers, chose the same token for {plain} of {PROMPTS}."],
    }
    return Report(checks, details)


if __name__ == "__main__":
    answer_from(Path(sys.argv[1]), sys.stdin, sys.stdout)
