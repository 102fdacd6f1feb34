"""Chapter: conversations about real documents, asked three ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.other import Told
from thermocline.demo.screen import Screen, milliseconds
from thermocline.demo.stage import Stage
from thermocline.demo.texts import QUESTIONS, documents
from thermocline.engines.generation import Result
from thermocline.engines.text import Tokens
from thermocline.engines.transformers import Engine
from thermocline.store.receipt import Reason

ANSWER_TOKENS = 10


class Turn(NamedTuple):
    """One question, answered without a cache, with one, and by a new process that has only the disk."""

    document: str
    number: int
    prompt: Tokens
    cold: Result
    memory: Result
    disk: Told = Told()

    @property
    def same(self) -> bool:
        """Whether all three answers are."""
        return self.cold.tokens == self.memory.tokens == self.disk.tokens


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """Each turn without a cache and with one; then all of them again, in another process that has only the disk."""
    with stage.engine(folder) as engine:
        turns = [turn for name, text in documents() for turn in _converse(screen, engine, name, text)]
    stage.other.open(folder)
    turns = [turn._replace(disk=stage.other.answer(turn.prompt.tolist(), ANSWER_TOKENS)) for turn in turns]
    screen.worked()
    screen.say("Two chapters of Python's own documentation, and three questions about each:")
    _show(screen, turns)
    return _concluded(screen, turns)


def _converse(screen: Screen, engine: Engine, name: str, text: str) -> Iterator[Turn]:
    """A conversation: the history grows by the model's own answers."""
    messages = [{"role": "system", "content": f"Answer questions about this text.\n\n{text}"}]
    for number, question in enumerate(QUESTIONS, 1):
        screen.working(f"{name}, turn {number}")
        messages.append({"role": "user", "content": question})
        prompt = engine.text.encode_chat(messages)
        cold = engine.generate(prompt, ANSWER_TOKENS, load=False, save=False)
        warm = engine.generate(prompt, ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": warm.text})
        yield Turn(name, number, prompt, cold, warm)


def _show(screen: Screen, turns: list[Turn]) -> None:
    rows = [
        [
            f"{turn.document}, turn {turn.number}",
            f"{len(turn.prompt):,}",
            milliseconds(turn.cold.first_token_seconds),
            _cell(turn, turn.memory),
            _cell(turn, turn.disk, *turn.disk.reasons),
            "yes" if turn.same else "NO",
        ]
        for turn in turns
    ]
    headers = ["first token", "prompt", "no cache", "memory (known)", "new process (known)", "same answer"]
    screen.table(headers, rows, right=range(1, 6))
    screen.say(
        "The first turn is new to the first process, which computes it; the new process finds all of it on disk."
    )


def _cell(turn: Turn, answer: Result | Told, *reasons: Reason) -> str:
    known = ", ".join([f"{answer.cached_tokens / len(turn.prompt):.0%}", *reasons])
    return f"{milliseconds(answer.first_token_seconds)} ({known})"


def _concluded(screen: Screen, turns: list[Turn]) -> Chapter:
    cold = [turn.cold.first_token_seconds for turn in turns]
    memory = [turn.memory.first_token_seconds for turn in turns]
    disk = [turn.disk.first_token_seconds for turn in turns]
    later = [at for at, turn in enumerate(turns) if turn.number > 1]
    in_memory = median(cold[at] / memory[at] for at in later)
    on_disk = median(before / after for before, after in zip(cold, disk, strict=True))
    some = [memory[at] for at in later]
    bars = (("no cache", median(cold)), ("memory, turn 2 on", median(some)), ("new process, disk", median(disk)))
    screen.say("")
    screen.bars([(name, seconds, milliseconds(seconds)) for name, seconds in bars])
    screen.say("")
    same = sum(turn.same for turn in turns)
    figure = f"{in_memory:.0f}x from memory, {on_disk:.0f}x from disk in a new process"
    claim = Claim('"14x faster time to first token"', figure, "thermocline bench ttft")
    details: dict[str, Any] = {
        "turns": len(turns),
        "prompt_tokens": [len(turn.prompt) for turn in turns],
        "same_answers": same,
        "cold_seconds": cold,
        "memory_seconds": memory,
        "memory_tokens": [turn.memory.cached_tokens for turn in turns],
        "disk_seconds": disk,
        "disk_tokens": [turn.disk.cached_tokens for turn in turns],
        "disk_reasons": [turn.disk.reasons for turn in turns],
        "cold_over_memory": in_memory,
        "cold_over_disk": on_disk,
    }
    used = all(turns[at].memory.cached_tokens for at in later) and all(turn.disk.cached_tokens for turn in turns)
    verdict = f"{same} of {len(turns)} answers the same all three ways; first token {figure}"
    return Chapter(same == len(turns) and used, verdict, claim, details)
