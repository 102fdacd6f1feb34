"""Chapter: conversations about real documents, asked three ways."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.demo.stage import Stage
from thermocline.demo.texts import QUESTIONS, documents
from thermocline.engines.text import Tokens
from thermocline.engines.transformers import Engine
from thermocline.store.receipt import Reason

ANSWER_TOKENS = 10


class Turn(NamedTuple):
    """One question and its answers: how long each way took to the first token, and how much it did not compute."""

    document: str
    number: int
    prompt: Tokens
    answer: tuple[int, ...]
    cold_seconds: float
    memory_seconds: float
    memory_tokens: int
    same: bool


class Again(NamedTuple):
    """The same question to a new process on the same disk, and why it did not load more."""

    seconds: float
    tokens: int
    same: bool
    reasons: tuple[Reason, ...]


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """Each turn without a cache and with one; then all of them again, in another process that has only the disk."""
    with stage.engine(folder) as engine:
        turns = [turn for name, text in documents() for turn in _converse(screen, engine, name, text)]
    stage.other.open(folder)
    told = [stage.other.answer(turn.prompt.tolist(), ANSWER_TOKENS) for turn in turns]
    again = [
        Again(each.first_token_seconds, each.cached_tokens, each.tokens == turn.answer, each.reasons)
        for each, turn in zip(told, turns, strict=True)
    ]
    screen.worked()
    screen.say("Two chapters of Python's own documentation, and three questions about each:")
    _show(screen, turns, again)
    return _concluded(screen, turns, again)


def _converse(screen: Screen, engine: Engine, name: str, text: str) -> list[Turn]:
    """A conversation: the history grows by the model's own answers."""
    messages = [{"role": "system", "content": f"Answer questions about this text.\n\n{text}"}]
    turns = []
    for number, question in enumerate(QUESTIONS, 1):
        screen.working(f"{name}, turn {number}")
        messages.append({"role": "user", "content": question})
        prompt = engine.text.encode_chat(messages)
        cold = engine.generate(prompt, ANSWER_TOKENS, load=False, save=False)
        warm = engine.generate(prompt, ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": warm.text})
        turns.append(
            Turn(
                name,
                number,
                prompt,
                cold.tokens,
                cold.first_token_seconds,
                warm.first_token_seconds,
                warm.cached_tokens,
                cold.tokens == warm.tokens,
            )
        )
    return turns


def _show(screen: Screen, turns: list[Turn], again: list[Again]) -> None:
    rows = [
        [
            f"{turn.document}, turn {turn.number}",
            f"{len(turn.prompt):,}",
            f"{1e3 * turn.cold_seconds:,.0f} ms",
            f"{1e3 * turn.memory_seconds:,.0f} ms ({turn.memory_tokens / len(turn.prompt):.0%})",
            f"{1e3 * new.seconds:,.0f} ms ({', '.join([f'{new.tokens / len(turn.prompt):.0%}', *new.reasons])})",
            "yes" if turn.same and new.same else "NO",
        ]
        for turn, new in zip(turns, again, strict=True)
    ]
    headers = ["first token", "prompt", "no cache", "memory (known)", "new process (known)", "same answer"]
    screen.table(headers, rows, right=range(1, 6))
    screen.say(
        "The first turn is new to the first process, so it computes it; the new process finds all of it on disk."
    )


def _concluded(screen: Screen, turns: list[Turn], again: list[Again]) -> Chapter:
    later = [turn for turn in turns if turn.number > 1]
    cold = statistics.median(turn.cold_seconds for turn in turns)
    memory = statistics.median(turn.memory_seconds for turn in later)
    disk = statistics.median(new.seconds for new in again)
    in_memory = statistics.median(turn.cold_seconds / turn.memory_seconds for turn in later)
    on_disk = statistics.median(turn.cold_seconds / new.seconds for turn, new in zip(turns, again, strict=True))
    bars = (("no cache", cold), ("memory, turn 2 on", memory), ("new process, disk", disk))
    screen.say("")
    screen.bars([(name, seconds, f"{1e3 * seconds:,.0f} ms") for name, seconds in bars])
    screen.say("")
    same = sum(turn.same and new.same for turn, new in zip(turns, again, strict=True))
    claim = Claim(
        '"14x faster time to first token"',
        f"{in_memory:.0f}x from memory, {on_disk:.0f}x from disk in a new process",
        "thermocline bench ttft",
    )
    details: dict[str, Any] = {
        "turns": len(turns),
        "prompt_tokens": [len(turn.prompt) for turn in turns],
        "same_answers": same,
        "cold_seconds": [turn.cold_seconds for turn in turns],
        "memory_seconds": [turn.memory_seconds for turn in turns],
        "memory_tokens": [turn.memory_tokens for turn in turns],
        "disk_seconds": [new.seconds for new in again],
        "disk_tokens": [new.tokens for new in again],
        "disk_reasons": [new.reasons for new in again],
        "cold_over_memory": in_memory,
        "cold_over_disk": on_disk,
    }
    used = all(turn.memory_tokens for turn in later) and all(new.tokens for new in again)
    verdict = f"{same} of {len(turns)} answers the same all three ways; first token {claim.figure}"
    return Chapter(name="conversations", ok=same == len(turns) and used, verdict=verdict, claim=claim, details=details)
