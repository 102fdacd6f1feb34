"""Chapter: a real vLLM on a node. Its own cache is emptied, the node is killed, and the answers stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thermocline.clock import until
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen, milliseconds
from thermocline.demo.texts import documents
from thermocline.demo.vllm_running import Answer, Running
from thermocline.errors import LaunchError

RECOVERY_SECONDS_MAX = 10.0
RETRY_SECONDS = 0.25
CLAIM = "taken for granted: when the cache daemon dies, so does the engine"
COMMAND = "make vllm demo"


def play(screen: Screen, folder: Path, vllm: Running | None) -> Chapter:  # noqa: ARG001  # it lives longer than a chapter
    """One prompt, five times: new, from vLLM's own cache, from the node, without the node, and from its disk."""
    if vllm is None:
        return _not_shown("not shown: vLLM is not installed (`make vllm` installs it)", ok=True)
    try:
        vllm.wait(screen)
    except LaunchError as error:
        return _not_shown(f"not shown: {error.message}", ok=False)
    prompt = f"Read this.\n\n{documents()[1][1]}\nSay what it is about."
    screen.working("the first requests")
    answers = [vllm.answer("new", prompt), vllm.answer("again: vLLM's own cache", prompt)]
    answers.append(_asked_until_loaded(vllm, "that emptied: the node", prompt))
    vllm.wait_durable()
    vllm.forget()
    vllm.kill_node()
    answers.append(vllm.answer("emptied, and the node killed", prompt))
    screen.working("the node is started again")
    vllm.wait_node()
    answers.append(_asked_until_loaded(vllm, "the node is back: its disk", prompt))
    screen.worked()
    same = _same(answers)
    _show(screen, answers, same)
    return _concluded(answers, same)


def _not_shown(why: str, *, ok: bool) -> Chapter:
    return Chapter(ok, why, Claim(CLAIM, why, COMMAND), {"shown": False})


def _asked_until_loaded(vllm: Running, when: str, prompt: str) -> Answer:
    """The engine finds a node that was away, or late on a busy machine, by itself within a moment."""
    answers: list[Answer] = []

    def loaded() -> int:
        vllm.forget()
        answers.append(vllm.answer(when, prompt))
        return answers[-1].cached_tokens

    until(loaded, RECOVERY_SECONDS_MAX, pause_seconds=RETRY_SECONDS)
    return answers[-1]


def _same(answers: Sequence[Answer]) -> list[bool]:
    """Whether each answer is the one that vLLM gives by itself: computed like the first, or reused like the second.

    Those two may part in the last bits of a number, and then in a word: vLLM cuts its work differently.
    """
    computed, reused = answers[0].text, answers[1].text
    return [answer.text == (reused if answer.cached_tokens else computed) for answer in answers]


def _show(screen: Screen, answers: Sequence[Answer], same: Sequence[bool]) -> None:
    screen.say("vLLM on one thread of this machine's CPU, with the built-in model, asked the same five times:")
    rows = [
        [
            answer.when,
            f"{answer.prompt_tokens:,}",
            f"{answer.cached_tokens:,}",
            milliseconds(answer.seconds),
            "yes" if alike else "NO",
        ]
        for answer, alike in zip(answers, same, strict=True)
    ]
    screen.table(["request", "prompt tokens", "not computed", "answer after", "same answer"], rows, right=range(1, 4))


def _concluded(answers: Sequence[Answer], same: Sequence[bool]) -> Chapter:
    new, again, emptied, alone, back = answers
    shown = again.cached_tokens == emptied.cached_tokens == back.cached_tokens > 0
    ok = all(same) and shown and not alone.cached_tokens and not new.cached_tokens
    figure = (
        f"node killed under vLLM: {sum(same)} of {len(same)} answers the same; once it was back, "
        f"{back.cached_tokens:,} of {back.prompt_tokens:,} tokens came from its disk"
    )
    details = {
        "shown": True,
        "same_answers": sum(same),
        "cached_tokens": [answer.cached_tokens for answer in answers],
        "prompt_tokens": new.prompt_tokens,
        "answer_seconds": [answer.seconds for answer in answers],
    }
    return Chapter(ok, figure, Claim(CLAIM, figure, COMMAND), details)
