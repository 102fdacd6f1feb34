"""Chapter: two applications share a server, and the hit rate is low. The summary says why, and then it is mended."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen, milliseconds
from thermocline.demo.stage import Stage
from thermocline.demo.texts import documents
from thermocline.engines.transformers import Engine
from thermocline.lens import fetch, report
from thermocline.lens.summary import Summary, summarise
from thermocline.store.receipt import Reason

CHARACTERS = 2_000
ROUNDS = 6
QUESTIONS = ("What is this about?", "Who is it for?", "What is left out?", "Is it true?", "Why so?", "What else?")
HIT_RATE_MIN = 0.6

Prompt = Callable[[str, str, int], str]


class Phase(NamedTuple):
    """What one phase of the traffic came to."""

    summary: Summary
    first_token_seconds: float


def time_first(text: str, stamp: str, _: int) -> str:
    """As the second application writes its prompts at first."""
    return f"Now it is {stamp}. Read this and go on.\n\n{text}\nGo on."


def time_last(text: str, stamp: str, at: int) -> str:
    """As it should."""
    return f"Read this and go on.\n\n{text}\nNow it is {stamp}. Go on. {QUESTIONS[at]}"


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """The same traffic twice: as it is, and with one line moved."""
    path = folder / "receipts.jsonl"
    with stage.engine(receipts_path=path) as engine:
        before = _phase(screen, engine, 0, time_first)
        after = _phase(screen, engine, 1, time_last)
    screen.worked()
    screen.say(
        "Two applications share a server: one asks about a document, the other begins each prompt with the time. "
        f"Over their {before.summary.requests} requests, `thermocline why --summary` says:"
    )
    screen.quote(report.render_summary(before.summary, bars=True))
    screen.say("The second application moves the time to the end of its prompts, and the same traffic comes again:")
    screen.table(
        ["traffic", "requests", "prompt tokens", "hit rate", "most of the rest", "first token (median)"],
        [_row("time first", before), _row("time last", after)],
        right=(1, 2, 3, 5),
    )
    whole = summarise(fetch.receipts_in(path, 1_000).receipts)
    return _concluded(before, after, whole)


def _phase(screen: Screen, engine: Engine, part: int, written: Prompt) -> Phase:
    """Every round, each application asks once. Each phase has its own part of the texts, which was never seen."""
    store = engine.store
    assert store is not None
    texts = [text[part * CHARACTERS :][:CHARACTERS] for _, text in documents()]
    seconds: list[float] = []
    for at in range(ROUNDS):
        screen.working(f"traffic, round {part * ROUNDS + at + 1} of {2 * ROUNDS}")
        asked = f"Answer from this text.\n\n{texts[0]}\n{QUESTIONS[at]}"
        stamped = written(texts[1], f"2026-11-20 09:{at:02}:{7 * at % 60:02}", at)
        for name, prompt in (("question", asked), ("clock", stamped)):
            request = f"{name}-{part * ROUNDS + at + 1}"
            result = engine.generate(engine.text.encode(prompt), 2, request_id=request)
            seconds.append(result.first_token_seconds)
    return Phase(summarise(store.receipts.latest(2 * ROUNDS)), statistics.median(seconds))


def _worst(summary: Summary) -> Reason:
    """The reason of most tokens that need not have been computed."""
    return next(share.reason for share in summary.by_reason if share.reason is not Reason.TAIL)


def _row(name: str, phase: Phase) -> list[str]:
    summary = phase.summary
    counts = [f"{summary.requests}", f"{summary.prompt_tokens:,}", f"{summary.hit_rate:.0%}"]
    return [name, *counts, _worst(summary).name, milliseconds(phase.first_token_seconds)]


def _adds_up(each: Summary) -> bool:
    computed = sum(share.tokens for share in each.by_reason)
    return each.loaded_tokens + computed == each.prompt_tokens and not each.skipped


def _concluded(before: Phase, after: Phase, whole: Summary) -> Chapter:
    first, second = before.summary, after.summary
    worst = _worst(first)
    written = whole.prompt_tokens == first.prompt_tokens + second.prompt_tokens
    adds_up = all(map(_adds_up, (first, second, whole))) and written
    ok = adds_up and worst is Reason.DIVERGED and second.hit_rate >= max(HIT_RATE_MIN, 1.5 * first.hit_rate)
    figure = f"{first.hit_rate:.0%}: {worst.name}; {second.hit_rate:.0%} after the line that it names was moved"
    details = {
        "hit_rate_time_first": first.hit_rate,
        "hit_rate_time_last": second.hit_rate,
        "requests": whole.requests,
        "prompt_tokens": whole.prompt_tokens,
        "adds_up": adds_up,
        "reason": worst,
        "conclusion": report.conclude_summary(first),
    }
    sums = "all tokens add up" if adds_up else "the tokens do NOT add up"
    verdict = f"{figure}; {sums}, here and in the file of receipts"
    claim = Claim('"why is my hit rate 30 %?"', figure, "thermocline why --summary")
    return Chapter(ok, verdict, claim, details)
