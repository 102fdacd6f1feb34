"""Events of generations as answers of the OpenAI API: whole, or piece by piece. And text for the operator's eyes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import UnsetType

from thermocline.engines.generation import Event
from thermocline.engines.sampling import Choice
from thermocline.engines.text import Text, Tokens
from thermocline.store.receipt import Excerpt
from thermocline.store.receipts import Parting
from thermocline.wire import openai

BEFORE_CHARACTERS, AFTER_CHARACTERS = 30, 50
EXCERPT_TOKENS = 24


class Answers(Protocol):
    """One HTTP response in the making. `tokens` counts what was generated for it."""

    id: str
    tokens: int

    def take(self, at: int, event: Event) -> None:
        """The next event of prompt `at`, for an answer that is sent whole."""

    def whole(self, usage: openai.Usage) -> openai.Answer:
        """The answer."""

    def piece(self, at: int, event: Event, usage: openai.Usage | UnsetType | None) -> openai.Answer | None:
        """The next event as a piece of a stream; None if there is nothing to say yet."""

    def last_piece(self, usage: openai.Usage) -> openai.Answer:
        """The piece behind all others, with the usage."""


class _Gathered:
    """What came for one prompt so far."""

    def __init__(self) -> None:
        self.text = ""
        self.choices: list[Choice] = []
        self.offsets: list[int] = []
        self.finish: str | None = None

    def take(self, event: Event) -> None:
        if event.choice is not None:
            self.choices.append(event.choice)
            self.offsets.append(len(self.text))
        self.text += event.text
        self.finish = event.finish


class CompletionAnswers:
    """Answers to /v1/completions, one choice per prompt."""

    def __init__(self, text: Text, request_id: str, created: int, model: str) -> None:
        self.id = request_id
        self.tokens = 0
        self._text, self._created, self._model = text, created, model
        self._gathered: dict[int, _Gathered] = {}

    def take(self, at: int, event: Event) -> None:
        """See `Answers.take`."""
        self._count(event)
        self._gathered.setdefault(at, _Gathered()).take(event)

    def whole(self, usage: openai.Usage) -> openai.Answer:
        """See `Answers.whole`."""
        choices = [
            self._choice(at, part.text, part.choices, part.offsets, part.finish)
            for at, part in sorted(self._gathered.items())
        ]
        return self._answer(choices, usage)

    def piece(self, at: int, event: Event, usage: openai.Usage | UnsetType | None) -> openai.Answer | None:
        """See `Answers.piece`."""
        self._count(event)
        so_far = self._gathered.setdefault(at, _Gathered())
        offset = len(so_far.text)
        so_far.text += event.text
        if not event.text and event.finish is None and (event.choice is None or event.choice.logprob is None):
            return None
        choices = [] if event.choice is None else [event.choice]
        return self._answer([self._choice(at, event.text, choices, [offset], event.finish)], usage)

    def last_piece(self, usage: openai.Usage) -> openai.Answer:
        """See `Answers.last_piece`."""
        return self._answer([], usage)

    def _count(self, event: Event) -> None:
        self.tokens += event.choice is not None

    def _choice(
        self, at: int, text: str, choices: Sequence[Choice], offsets: Sequence[int], finish: str | None
    ) -> openai.CompletionChoice:
        logprobs = None
        if choices and choices[0].logprob is not None:
            logprobs = openai.CompletionLogprobs(
                [self._text.token_text(choice.token) for choice in choices],
                [choice.logprob or 0.0 for choice in choices],
                [{self._text.token_text(token): log for token, log in choice.likeliest} for choice in choices],
                list(offsets),
            )
        return openai.CompletionChoice(index=at, text=text, logprobs=logprobs, finish_reason=finish)

    def _answer(
        self, choices: Sequence[openai.CompletionChoice], usage: openai.Usage | UnsetType | None
    ) -> openai.Answer:
        return openai.Answer(
            id=self.id, object="text_completion", created=self._created, model=self._model, choices=choices, usage=usage
        )


class ChatAnswers:
    """The answer to /v1/chat/completions."""

    def __init__(self, text: Text, request_id: str, created: int, model: str) -> None:
        self.id = request_id
        self.tokens = 0
        self._text, self._created, self._model = text, created, model
        self._gathered = _Gathered()
        self._begun = False

    def take(self, at: int, event: Event) -> None:  # noqa: ARG002  # a conversation has one answer
        """See `Answers.take`."""
        self.tokens += event.choice is not None
        self._gathered.take(event)

    def whole(self, usage: openai.Usage) -> openai.Answer:
        """See `Answers.whole`."""
        message = openai.ChatMessage(self._gathered.text)
        logprobs = self._logprobs(self._gathered.choices)
        finish = self._gathered.finish
        choice = openai.ChatChoice(index=0, message=message, logprobs=logprobs, finish_reason=finish)
        return self._answer("chat.completion", [choice], usage)

    def piece(self, at: int, event: Event, usage: openai.Usage | UnsetType | None) -> openai.Answer | None:
        """See `Answers.piece`. The first piece names the role."""
        self.tokens += event.choice is not None
        logprobs = self._logprobs([] if event.choice is None else [event.choice])
        role = None if self._begun else "assistant"
        if self._begun and not event.text and event.finish is None and logprobs is None:
            return None
        self._begun = True
        delta = openai.Delta(role, event.text if event.text or role else None)
        choice = openai.ChatChunkChoice(index=at, delta=delta, logprobs=logprobs, finish_reason=event.finish)
        return self._answer("chat.completion.chunk", [choice], usage)

    def last_piece(self, usage: openai.Usage) -> openai.Answer:
        """See `Answers.last_piece`."""
        return self._answer("chat.completion.chunk", [], usage)

    def _logprobs(self, choices: Sequence[Choice]) -> openai.ChatLogprobs | None:
        entries = []
        for choice in choices:
            if choice.logprob is None:
                return None
            text = self._text.token_text(choice.token)
            others = [(self._text.token_text(token), log) for token, log in choice.likeliest]
            likeliest = [openai.TopLogprob(other, log, list(other.encode())) for other, log in others]
            entries.append(openai.TokenLogprob(text, choice.logprob, list(text.encode()), likeliest))
        return openai.ChatLogprobs(entries) if entries else None

    def _answer(
        self,
        kind: str,
        choices: Sequence[openai.ChatChoice | openai.ChatChunkChoice],
        usage: openai.Usage | UnsetType | None,
    ) -> openai.Answer:
        return openai.Answer(
            id=self.id, object=kind, created=self._created, model=self._model, choices=choices, usage=usage
        )


def excerpt_of(text: Text, parting: Parting) -> Excerpt:
    """At most 80 characters of each of two prompts, around the token where they part."""
    start, stop = max(0, parting.at - EXCERPT_TOKENS), parting.at + EXCERPT_TOKENS
    before = text.decode(parting.mine[start : parting.at].tolist())

    def behind(tokens: Tokens) -> str:
        return text.decode(tokens[start:stop].tolist())[len(before) :][:AFTER_CHARACTERS]

    common = before[-BEFORE_CHARACTERS:]
    return Excerpt(parting.at, parting.other, common, behind(parting.mine), behind(parting.others))
