"""A request to generate, what comes back as it runs, and its handle."""

from __future__ import annotations

import enum
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from thermocline.engines.sampling import Choice, Sampling
from thermocline.engines.text import Tokens
from thermocline.errors import ThermoclineError
from thermocline.store.receipt import Receipt

LOG = logging.getLogger("thermocline.engine")


class Finish(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """What to generate. `tokens` is a uint32 array; `salt` keeps its blocks apart from those of every other salt.

    `load` and `save` say whether the store may be used: a bench's arm without a cache is a request without both.
    """

    tokens: Tokens
    max_new_tokens: int
    request_id: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    salt: bytes = b""
    load: bool = True
    save: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """A token, the text that became certain with it, or the end of the answer: the last event alone has `finish`."""

    choice: Choice | None = None
    text: str = ""
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. Seconds count from `submit`; `prefill_seconds` is what computing the prompt took by itself."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    cached_tokens: int
    first_token_seconds: float
    prefill_seconds: float
    receipt: Receipt | None
    choices: tuple[Choice, ...]


@dataclass(slots=True)
class Account:
    """What the engine writes down while a generation runs. Complete with the last event; then nobody writes."""

    cached_tokens: int = 0
    submitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    prefill_seconds: float = 0.0
    receipt: Receipt | None = None
    error: ThermoclineError | None = None


class Generation:
    """The handle of a running request: iterate over its events, or give `watcher` to be called with each instead.

    The watcher is called on the engine's thread and must return at once. `account` is filled as the request runs.
    """

    def __init__(self, request: GenerateRequest, watcher: Callable[[Event], object] | None = None) -> None:
        self.request = request
        self.account = Account()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._tell = watcher or self._events.put
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """True once nobody wants the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop within a token's time. Returns at once; the last event follows."""
        self._cancelled.set()

    def tell(self, event: Event) -> None:
        """For the engine: the next event. A watcher that raises has gone away, and nobody wants the answer."""
        try:
            self._tell(event)
        except Exception:
            LOG.exception("the watcher of a generation failed")
            self.cancel()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come; ends behind the last one. Raises the ThermoclineError that ended the generation."""
        while True:
            event = self._events.get()
            if self.account.error is not None and event.finish is Finish.FAILED:
                raise self.account.error
            yield event
            if event.finish is not None:
                return

    def result(self) -> Result:
        """Wait for the whole answer. Raises as iterating does, and cannot be mixed with it."""
        events = list(self)
        choices = tuple(event.choice for event in events if event.choice is not None)
        account = self.account
        return Result(
            tokens=tuple(choice.token for choice in choices),
            text="".join(event.text for event in events),
            finish=events[-1].finish or Finish.FAILED,
            cached_tokens=account.cached_tokens,
            first_token_seconds=account.first_token - account.submitted,
            prefill_seconds=account.prefill_seconds,
            receipt=account.receipt,
            choices=choices,
        )
