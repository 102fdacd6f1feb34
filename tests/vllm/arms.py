"""The arms of an identity test: the same prompts asked with nothing kept, from vLLM's own cache, and from each tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tests.vllm.prompts import loadable
from tests.vllm.server import CLOCK, Answer, Server

SETTLE_SECONDS = 120.0
_SALTS = count()


def cold(server: Server, prompts: Sequence[Sequence[int]], tokens: int = 24, *, at_once: int = 1) -> list[Answer]:
    """What it answers with nothing kept: under salts that nobody used, nothing is ever found."""
    answers = server.ask_all(prompts, tokens, at_once=at_once, salt=lambda: f"nobody {next(_SALTS)}")
    assert not any(answer.cached_tokens or answer.loaded for answer in answers), "something was found"
    return answers


def saved(server: Server, prompts: Sequence[list[int]], expected: Sequence[Answer], tokens: int = 24) -> None:
    """Ask the prompts until the node holds all of them: a save is dropped where no room was lent, and made again.

    Each is computed whole at first, as without a cache, whatever others with the same beginning have left.
    """
    for prompt in prompts:
        server.forget()
        server.ask(prompt, 1, kv_transfer_params={"thermocline": {"load": False}})
    loaded(server, prompts, expected, "just saved", tokens)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answers of which all that could be loaded was, the tokens of each tier, and what kept earlier tries from it."""

    answers: list[Answer]
    by_tier: Counter[str]
    reasons: Counter[str]

    def __str__(self) -> str:
        tiers = ", ".join(f"{count} from {tier}" for tier, count in sorted(self.by_tier.items())) or "0"
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        return f"loaded {tiers} tokens" + (f" (blocks not loaded: {why})" if why else "")


def loaded(
    server: Server, prompts: Sequence[list[int]], expected: Sequence[Answer], arm: str, tokens: int = 24
) -> Loaded:
    """Ask each prompt, with vLLM's own cache emptied, until all of it comes from the store; such answers are right.

    A node may be late on a busy machine, and then some is computed: that costs time, and no answer. Where only a part
    was loaded, tokens are not compared: in bf16 vLLM's own hits of that length flip near ties as well.
    """
    deadline = CLOCK.now() + SETTLE_SECONDS
    told = Loaded([], Counter(), Counter())
    for prompt, right in zip(prompts, expected, strict=True):
        while True:
            server.forget()  # each time: prompts share prefixes, and what is in the engine is not loaded
            answer = server.ask(prompt, tokens)
            partly = 0 < answer.loaded < loadable(prompt)
            assert partly or answer.tokens == right.tokens, (
                f"{arm}: other tokens than without a cache, {len(prompt)} in the prompt"
            )
            told.by_tier.update(answer.receipt.get("by_tier", {}))
            if answer.loaded >= loadable(prompt):
                break
            for part in answer.receipt.get("missing", ()):
                told.reasons[part["reason"]] += part["stop"] - part["start"]
            assert CLOCK.now() < deadline, f"{arm}: never loaded: {answer.receipt}\n{server.log_tail()}"
        told.answers.append(answer)
    return told


def at_once(server: Server, prompts: Sequence[list[int]], tokens: int = 24, *, count: int = 8) -> list[Answer]:
    """What it answers to so many requests at a time, its own prefix cache empty before."""
    server.forget()
    return server.ask_all(prompts, tokens, at_once=count)


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
