"""The arms of an identity test: the same prompts asked with nothing kept, from vLLM's own cache, and from each tier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from tests.vllm.prompts import loadable
from tests.vllm.server import CLOCK, Answer, Server

SETTLE_SECONDS = 40.0
_SALTS = count()


def cold(server: Server, prompts: Sequence[Sequence[int]], tokens: int = 24, *, at_once: int = 1) -> list[Answer]:
    """What it answers with nothing kept: under salts that nobody used, nothing is ever found."""
    answers = server.ask_all(prompts, tokens, at_once=at_once, salt=lambda: f"nobody {next(_SALTS)}")
    assert not any(answer.cached_tokens or answer.loaded for answer in answers), "something was found"
    return answers


def saved(server: Server, prompts: Sequence[list[int]], tokens: int = 2) -> None:
    """Ask the prompts until the node holds all of them: what is asked once is kept, unless there was no room lent."""
    deadline = CLOCK.now() + SETTLE_SECONDS
    for prompt in prompts:
        server.ask(prompt, tokens)
    while True:
        short = [
            prompt
            for prompt, answer in zip(prompts, hits(server, prompts, tokens), strict=True)
            if _lacks(prompt, answer)
        ]
        if not short:
            return
        assert CLOCK.now() < deadline, (
            f"never loaded: prompts of {[len(each) for each in short]} tokens\n{server.log_tail()}"
        )


def hits(server: Server, prompts: Sequence[list[int]], tokens: int = 24, *, at_once: int = 1) -> list[Answer]:
    """What it answers when its own prefix cache holds nothing."""
    if at_once > 1:
        server.forget()
        return server.ask_all(prompts, tokens, at_once=at_once)
    answers = []
    for prompt in prompts:
        server.forget()  # each time: prompts share prefixes, and what is in the engine is not loaded
        answers.append(server.ask(prompt, tokens))
    return answers


def _lacks(prompt: list[int], answer: Answer) -> bool:
    return answer.loaded < loadable(prompt)


def same(answers: Sequence[Answer], expected: Sequence[Answer], arm: str) -> None:
    """Fail unless both say the same tokens."""
    wrong = [
        at for at, (ours, theirs) in enumerate(zip(answers, expected, strict=True)) if ours.tokens != theirs.tokens
    ]
    assert not wrong, f"{arm}: other tokens than without a cache for the prompts {wrong}"


def distance(answers: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The largest difference of a log-probability."""
    pairs = zip(answers, expected, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours.logprobs, theirs.logprobs, strict=True))
