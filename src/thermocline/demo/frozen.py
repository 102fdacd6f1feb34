"""Chapter: two processes share prompts through Redis; then Redis freezes, and nobody notices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thermocline.clock import until
from thermocline.demo import local_redis
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.other import Other, Told
from thermocline.demo.screen import Screen, milliseconds
from thermocline.demo.stage import Stage
from thermocline.demo.texts import documents
from thermocline.engines.text import Tokens
from thermocline.store.receipt import Reason

ANSWER_TOKENS = 8
CHARACTERS = 2_400
BEFORE, DURING = 1, 4
"""Prompts asked while Redis is well, and while it is frozen; one more is asked when it is well again."""
RECOVERY_SECONDS_MAX = 6.0
LATE_MAX = 1
"""How many requests may find out that Redis is frozen."""
CLAIM = "taken for granted: when the shared cache hangs, so do requests"


class Answer(NamedTuple):
    """One prompt, computed by the first process without a cache, and answered by the second."""

    when: str
    prompt: Tokens
    cold_seconds: float
    told: Told
    same: bool


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """The first process saves to Redis; the second, with nothing of its own, is asked the same."""
    if local_redis.installed() is None:
        claim = Claim(CLAIM, "not shown: no redis-server on this machine", "make demo")
        return Chapter(ok=True, verdict=claim.figure, claim=claim, details={"shown": False})
    with local_redis.running(folder) as server:
        known = _saved(screen, stage, server.url)
        stage.other.open(None, redis_url=server.url)
        answers = [_asked(stage.other, "well", *prompt) for prompt in known[:BEFORE]]
        server.freeze()
        for at, prompt in enumerate(known[BEFORE : BEFORE + DURING], 1):
            screen.working(f"request {at} of {DURING} while Redis is frozen")
            answers.append(_asked(stage.other, "frozen", *prompt))
        server.thaw()
        screen.working("Redis goes on")
        answers.append(_asked_until_loaded(stage.other, *known[-1]))
    screen.worked()
    _show(screen, answers)
    return _concluded(answers)


def _saved(screen: Screen, stage: Stage, url: str) -> list[tuple[Tokens, tuple[int, ...], float]]:
    """Prompts that are in Redis afterwards, each with its answer and the seconds to its first token without a cache."""
    texts = [text[:CHARACTERS] for _, text in documents()]
    known = []
    with stage.engine(redis_url=url) as engine:
        for at in range(BEFORE + DURING + 1):
            screen.working(f"the first process saves prompt {at + 1}")
            prompt = engine.text.encode(f"Document {at}.\n\n{texts[at % len(texts)]}\nSay what this is about.")
            cold = engine.generate(prompt, ANSWER_TOKENS, load=False, save=False)
            engine.generate(prompt, 1)
            known.append((prompt, cold.tokens, cold.first_token_seconds))
        assert engine.store is not None
        engine.store.flush(10.0)
    return known


def _asked(other: Other, when: str, prompt: Tokens, answer: tuple[int, ...], cold_seconds: float) -> Answer:
    told = other.answer(prompt.tolist(), ANSWER_TOKENS)
    return Answer(when, prompt, cold_seconds, told, told.tokens == answer)


def _asked_until_loaded(other: Other, prompt: Tokens, answer: tuple[int, ...], cold_seconds: float) -> Answer:
    """Ask for one token, leaving nothing behind, until Redis serves again; then ask for the answer."""
    asked = partial(other.answer, prompt.tolist(), 1, save=False)
    until(lambda: asked().cached_tokens, RECOVERY_SECONDS_MAX, pause_seconds=0.1)
    return _asked(other, "well again", prompt, answer, cold_seconds)


def _show(screen: Screen, answers: Sequence[Answer]) -> None:
    screen.say("The second process has an empty memory and no disk. The first saved all of these prompts to Redis:")
    rows = [
        [
            each.when,
            f"{len(each.prompt):,}",
            milliseconds(each.cold_seconds),
            f"{1e3 * each.told.match_seconds:,.1f} ms",
            milliseconds(each.told.first_token_seconds),
            ", ".join([f"{each.told.cached_tokens / len(each.prompt):.0%} from Redis", *each.told.reasons]),
            "yes" if each.same else "NO",
        ]
        for each in answers
    ]
    headers = ["Redis", "prompt", "no cache", "asking took", "first token", "known", "same answer"]
    screen.table(headers, rows, right=range(1, 5))


def _concluded(answers: Sequence[Answer]) -> Chapter:
    frozen = [each for each in answers if each.when == "frozen"]
    same = sum(each.same for each in answers)
    late = sum(Reason.LATE in each.told.reasons for each in frozen)
    silent = {Reason.LATE, Reason.TIER_DOWN}
    explained = sum(bool(silent & set(each.told.reasons)) for each in frozen)
    shared = all(each.told.cached_tokens for each in answers if each.when != "frozen")
    waited = 1e3 * max(each.told.match_seconds for each in frozen)
    figure = (
        f"Redis frozen: {late} of {len(frozen)} requests waited for it, {waited:.0f} ms; {same} of {len(answers)} "
        "answers the same"
    )
    claim = Claim(CLAIM, figure, "thermocline demo")
    details = {
        "shown": True,
        "answers": len(answers),
        "same_answers": same,
        "waited": late,
        "explained": explained,
        "match_seconds": [each.told.match_seconds for each in answers],
        "first_token_seconds": [each.told.first_token_seconds for each in answers],
        "cold_seconds": [each.cold_seconds for each in answers],
        "cached_tokens": [each.told.cached_tokens for each in answers],
    }
    ok = same == len(answers) and late <= LATE_MAX and explained == len(frozen) and shared
    verdict = f"{figure}; every miss says that Redis did not answer"
    return Chapter(ok, verdict, claim, details)
