"""Chapter: an agent that takes 100 steps on one long context."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.demo.stage import Stage
from thermocline.demo.texts import source
from thermocline.engines.generation import Result

STEPS = 100
COLD_STEPS = (1, 50, 100)
"""Only these are also computed without a cache: all of them would take minutes."""
ANSWER_TOKENS = 2
TASK = "You work on the module below. At each step, read what the last tool printed and choose the next one.\n\n"


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """Every step sends the whole context again, as agents do."""
    results: list[Result] = []
    cold: dict[int, Result] = {}
    lengths: list[int] = []
    with stage.engine(folder) as engine:
        context = TASK + source()
        for step in range(1, STEPS + 1):
            context += f"\n[step {step}] line {37 * step % 480} gives {step % 3}. [next]"
            prompt = engine.text.encode(context)
            if step in COLD_STEPS:
                screen.working(f"step {step} of {STEPS}, without a cache")
                cold[step] = engine.generate(prompt, ANSWER_TOKENS, load=False, save=False)
            screen.working(f"step {step} of {STEPS}")
            results.append(engine.generate(prompt, ANSWER_TOKENS))
            lengths.append(len(prompt))
            context += results[-1].text
    screen.worked()
    return _concluded(screen, results, cold, lengths)


def _concluded(screen: Screen, results: list[Result], cold: dict[int, Result], lengths: list[int]) -> Chapter:
    warm_seconds = sum(result.first_token_seconds for result in results)
    measured = [cold[step].first_token_seconds for step in COLD_STEPS]
    cold_seconds = float(np.interp(range(1, STEPS + 1), COLD_STEPS, measured).sum())
    computed = sum(length - result.cached_tokens for length, result in zip(lengths, results, strict=True))
    same = sum(cold[step].tokens == results[step - 1].tokens for step in COLD_STEPS)
    total, how = sum(lengths), f"extrapolated from {len(COLD_STEPS)} measured steps"
    rows = [
        ["without a cache", f"{total:,}", f"{cold_seconds:.0f} s", how],
        ["with thermocline", f"{computed:,}", f"{warm_seconds:.1f} s", f"measured, all {STEPS} steps"],
    ]
    what = f"{STEPS} steps, {lengths[0]:,} to {lengths[-1]:,} tokens"
    screen.table([what, "tokens computed", "waited for first tokens", "how"], rows, right=(1, 2))
    figure = f"{computed:,} of {total:,} prompt tokens computed, {cold_seconds / warm_seconds:.0f}x less waiting"
    claim = Claim('"100 agent steps without a cache recompute 60,000 tokens"', figure, "thermocline demo")
    details = {
        "steps": STEPS,
        "prompt_tokens": total,
        "computed_tokens": computed,
        "first_token_seconds": warm_seconds,
        "cold_seconds_extrapolated": cold_seconds,
        "cold_seconds_measured": dict(zip(map(str, COLD_STEPS), measured, strict=True)),
        "same_answers": same,
    }
    verdict = f"{figure} (cold time extrapolated); {same} of {len(COLD_STEPS)} compared answers the same"
    ok = same == len(COLD_STEPS) and computed < total / 10
    return Chapter(ok, verdict, claim, details)
