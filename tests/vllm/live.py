"""A live vLLM with its node, held to what it answers without a cache while something is wrong with one of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tests.vllm.arms import cold, loaded
from tests.vllm.node import Node
from tests.vllm.prompts import prompt
from tests.vllm.server import CLOCK, Answer, Server
from thermocline.node import ask

TOKENS = 8
ATTACHED_SECONDS = 30.0
PROMPTS = [prompt(600 + at, count) for at, count in enumerate((1025, 900, 737))]


class Live:
    """A server and its node. What is asked is checked; what it cost is kept in `added`."""

    def __init__(self, node: Node, server: Server, prompts: Sequence[list[int]] = PROMPTS) -> None:
        self.node, self.server, self.prompts = node, server, prompts
        self.expected = cold(server, prompts, TOKENS)
        self._cold: list[float] = []
        self.usual()
        self.added: list[float] = []
        self.loaded = 0
        self.reasons: set[str] = set()

    def ask(self, arm: str, *, from_store: bool = True, measured: bool = False) -> list[Answer]:
        """Ask every prompt, of the store (vLLM's own cache is emptied before each) or as it comes. All right."""
        answers = []
        for each in self.prompts:
            if from_store:
                self.server.forget()
            answers.append(self.server.ask(each, TOKENS))
        self._check(answers, arm)
        if measured:
            self.added += [each.seconds - usual for each, usual in zip(answers, self._cold, strict=True)]
            self.loaded += sum(each.loaded for each in answers)
            self.reasons |= {part["reason"] for each in answers for part in each.receipt.get("missing", ())}
        return answers

    def usual(self) -> None:
        """Measure what each prompt takes now, when nothing is kept: what is asked next is compared with it."""
        answers = cold(self.server, self.prompts, TOKENS)
        self._check(answers, "nothing kept")
        self._cold = [each.seconds for each in answers]

    def fill(self) -> None:
        """Ask until all of every prompt comes from the store; every answer must be right: nothing wrong lies there."""
        loaded(self.server, self.prompts, self.expected, "healthy", TOKENS)

    def after(self) -> None:
        """Nothing wrong stayed in vLLM's own cache: what it answers from there is right."""
        self.ask("vLLM's own cache, afterwards", from_store=False)

    def attached(self) -> None:
        """Wait until the engine has found its node again."""
        deadline = CLOCK.now() + ATTACHED_SECONDS
        while sum(client.role.startswith("vllm") for client in ask.status(self.node.socket).clients) < 2:
            assert CLOCK.now() < deadline, "the engine does not find its node again"
            CLOCK.sleep(0.05)

    def said(self) -> str:
        """What the fault cost: the median and the largest difference to the same prompt a moment before, uncached."""
        return (
            f"median {1e3 * statistics.median(self.added):+.1f} ms, at most {1e3 * max(self.added):+.1f} ms over a "
            f"cold request of {1e3 * statistics.median(self._cold):.0f} ms ({len(self.added)} requests, {self.loaded} "
            "tokens loaded)"
        )

    def begin(self) -> None:
        """Forget what was measured."""
        self.added, self.loaded, self.reasons = [], 0, set()

    def _check(self, answers: Sequence[Answer], arm: str) -> None:
        wrong = [at for at, each in enumerate(answers) if each.tokens != self.expected[at].tokens]
        assert not wrong, f"{arm}: other tokens than without a cache for the prompts {wrong}"
