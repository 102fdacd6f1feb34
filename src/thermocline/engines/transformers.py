"""The engine: one model, one thread, several requests in flight that take turns.

A request's life: match, load, compute the rest of the prompt, emit the first token, save, compute token by token, save.
`Engine._steps` is that sentence in code; every `yield` in it passes the turn on. Requests are never batched: a token
computed beside others may differ in its last bit, and the promise here is equal answers.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thermocline.clock import Clock, SystemClock
from thermocline.engines.generation import Event, Finish, GenerateRequest, Generation, Result
from thermocline.engines.kv import Kv, KvPool
from thermocline.engines.models import Model
from thermocline.engines.pages import MemoryPages
from thermocline.engines.reuse import Reuse
from thermocline.engines.sampling import NotFiniteError, Sampler, Sampling
from thermocline.engines.text import Text, TextStream, Tokens
from thermocline.errors import ModelError, RequestError, ThermoclineError
from thermocline.metrics import Metrics
from thermocline.node.announce import Announcer
from thermocline.store.verbs import PrefillCosts, StoreVerbs

LOG = logging.getLogger("thermocline.engine")
PREFILL_TOKENS = 2048
"""A long prompt is computed in pieces that end at multiples of this, and others have their turns in between."""

WARM_UP_TOKENS = (4, 16, 32)
CALIBRATION_TOKENS = (64, 512)
CALIBRATION_SECONDS_MAX = 0.8
STAGING_BYTES = 64 << 20
REQUESTS_MAX = 64
KV_BYTES_MAX = 1 << 30


@dataclass(slots=True)
class _Turn:
    """A request that is running: what is left of it, and the memory it computes in."""

    generation: Generation
    kv: Kv
    steps: Generator[None]


class Engine:
    """Computes with a model, and with a store if there is one. Any thread may submit; close it before the store.

    `requests_max` bounds the requests in flight, `kv_bytes_max` the memory they compute in: what does not fit waits.
    `announcer` tells routers what the store holds.
    """

    def __init__(
        self,
        model: Model,
        store: StoreVerbs | None = None,
        *,
        metrics: Metrics | None = None,
        requests_max: int = REQUESTS_MAX,
        kv_bytes_max: int = KV_BYTES_MAX,
        clock: Clock | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        self.served = model
        self.store = store
        self._announcer = announcer
        if announcer is not None:
            announcer.declare(model.layout)
        self.metrics = metrics or (store.metrics if store else Metrics())
        self.text = Text(model.tokenizer)
        self._clock = clock or SystemClock()
        self._requests_max = requests_max
        layout = model.layout
        blocks = -(-model.context_tokens // layout.tokens_per_block)
        self._staging = MemoryPages(layout, max(1, min(blocks, STAGING_BYTES // layout.block_bytes)))
        self._pool = KvPool(layout, model.module.dtype, bytes_max=kv_bytes_max, tokens_max=model.context_tokens)
        self._waiting: deque[Generation] = deque()
        self._running: deque[_Turn] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._warm = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._warm.wait()

    @property
    def alive(self) -> bool:
        """True while the engine's thread runs, and requests can be taken."""
        return self._thread.is_alive() and not self._closed

    # -- for any thread ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, watcher: Callable[[Event], object] | None = None) -> Generation:
        """Queue a request. Returns its handle at once; see `Generation` for `watcher`.

        Raises RequestError for a request that cannot be served, with status 429 when too many are in flight.
        """
        self.check(request.tokens, request.max_new_tokens)
        generation = Generation(request, watcher)
        generation.account.submitted = self._clock.now()
        with self._changed:
            if self._closed:
                msg = "the server is shutting down"
                raise RequestError(msg, hint="try again in a moment", status=503, code="shutting_down")
            if len(self._waiting) + len(self._running) >= self._requests_max:
                msg = f"{self._requests_max} requests are in flight already"
                raise RequestError(
                    msg, hint="retry later, or raise requests_max", status=429, code="rate_limit_exceeded"
                )
            self._waiting.append(generation)
            self.metrics.gauge("requests_in_flight", len(self._waiting) + len(self._running))
            self._changed.notify()
        return generation

    def generate(
        self,
        tokens: Sequence[int] | Tokens,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        request_id: str = "",
        salt: bytes = b"",
        load: bool = True,
        save: bool = True,
    ) -> Result:
        """Generate and wait; goes on to `max_new_tokens` whatever the model thinks of ending. Raises as `submit`."""
        request = GenerateRequest(
            np.ascontiguousarray(tokens, np.uint32),
            max_new_tokens,
            request_id,
            sampling or Sampling(),
            ignore_eos=True,
            salt=salt,
            load=load,
            save=save,
        )
        return self.submit(request).result()

    def check(self, tokens: Tokens, max_new_tokens: int) -> None:
        """Raise RequestError unless these tokens and that many more can be computed."""
        context = self.served.context_tokens
        if not len(tokens):
            raise RequestError("the prompt is empty", hint="send at least one token", param="prompt")
        if int(tokens.max()) >= self.served.vocabulary:
            msg = f"the prompt has a token id that is not below {self.served.vocabulary}, the size of the vocabulary"
            raise RequestError(msg, hint="use this model's own tokenizer", param="prompt")
        if len(tokens) + max_new_tokens > context:
            msg = f"{len(tokens)} tokens of prompt and {max_new_tokens} to generate exceed the context of {context}"
            raise RequestError(
                msg, hint="shorten the prompt or lower max_tokens", param="prompt", code="context_length_exceeded"
            )

    def close(self) -> None:
        """Cancel what is in flight and stop the thread. A second call does nothing."""
        with self._changed:
            self._closed = True
            for generation in (*self._waiting, *(turn.generation for turn in self._running)):
                generation.cancel()
            self._changed.notify()
        self._thread.join()

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Give every running request its turn, one step each, until closed and done."""
        with torch.inference_mode():
            self._warm_up()
            while self._admit():
                if not self._running:
                    continue
                if self._take_step(self._running[0]):
                    self._running.rotate(-1)
                else:
                    self._running.popleft()
                    self.metrics.gauge("requests_in_flight", len(self._waiting) + len(self._running))

    def _warm_up(self) -> None:
        """Compute short pieces once: the matrix library compiles its code on first use, per thread and size."""
        try:
            for tokens in WARM_UP_TOKENS:
                if (kv := self._pool.take(1)) is not None:
                    kv.length = max(0, min(kv.capacity, self.served.context_tokens) - max(WARM_UP_TOKENS))
                    try:
                        self._compute(np.zeros(tokens, np.uint32), kv)
                    finally:
                        self._pool.give(kv)
            if self.store is not None and not self.store.costs.computes(self.served.layout.computed_by):
                self._calibrate(self.store.costs)
        except Exception:
            LOG.exception("the warm-up failed")
        finally:
            self._warm.set()

    def _calibrate(self, costs: PrefillCosts) -> None:
        """Learn what short prompts take on this machine, within about a second: the first plan should not guess."""
        seconds = 0.0
        for tokens in CALIBRATION_TOKENS:
            if seconds * tokens > CALIBRATION_SECONDS_MAX * CALIBRATION_TOKENS[0]:
                return  # this one would take too long, as the first one shows
            if tokens > self.served.context_tokens or (kv := self._pool.take(tokens)) is None:
                return
            try:
                started = self._clock.now()
                self._compute(np.zeros(tokens, np.uint32), kv)
                seconds = seconds or self._clock.now() - started
                costs.recomputed(tokens, 0, self._clock.now() - started)
            finally:
                self._pool.give(kv)

    def _admit(self) -> bool:
        """Start waiting requests while there is memory for them; sleep while nothing is to do. False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            while self._waiting and self._start(self._waiting[0]):
                self._waiting.popleft()
            return bool(self._running) or not self._closed

    def _start(self, generation: Generation) -> bool:
        """Let a waiting request run, or end it where it cannot; False while it has to wait for others' memory."""
        if generation.cancelled:
            self._end(generation, Finish.CANCELLED)
            return True
        try:
            kv = self._pool.take(len(generation.request.tokens) + generation.request.max_new_tokens)
        except Exception as error:  # noqa: BLE001  # no memory: this request gets an answer, the others go on
            self._fail(generation, error)
            return True
        if kv is not None:
            self._running.append(_Turn(generation, kv, self._steps(generation, kv)))
        elif not self._running:
            self._fail(generation, MemoryError("no memory is left for a request"))
        return kv is not None or not self._running

    def _take_step(self, turn: _Turn) -> bool:
        """One step of one request; False when it has ended, and its memory is free again."""
        generation = turn.generation
        try:
            if not generation.cancelled:
                next(turn.steps)
                return True
            turn.steps.close()
            self._end(generation, Finish.CANCELLED)
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001  # whatever it is: this request gets an answer, the others go on
            self._fail(generation, error)
            self._pool.drop(turn.kv)  # no telling what is in it
            return False
        self._pool.give(turn.kv)
        return False

    def _steps(self, generation: Generation, kv: Kv) -> Generator[None]:
        """The life of a request, one step per turn."""
        request, account = generation.request, generation.account
        self.metrics.count("prompt_tokens_total", len(request.tokens))
        reuse = Reuse(self.store, self.served.layout, self._staging, request, self.metrics, self._announcer)
        reuse.load(kv)
        account.cached_tokens = kv.length
        yield

        for stop in _piece_ends(kv.length, len(request.tokens)):
            started = self._clock.now()
            logits = self._compute(request.tokens[kv.length : stop], kv)
            account.prefill_seconds += self._clock.now() - started
            if stop < len(request.tokens):
                yield

        answer = _Answer(generation, self.text, self.served.end_tokens)
        finish = answer.take(logits)
        account.first_token = self._clock.now()
        account.receipt = reuse.record(account.prefill_seconds)
        if finish:
            self._finish(generation, answer, finish)
        for _ in reuse.save(kv, request.tokens):
            if not finish:
                yield
        while not finish:
            yield
            finish = answer.take(self._compute(answer.last, kv))
            if finish:
                self._finish(generation, answer, finish)
        whole = np.concatenate((request.tokens, np.array(answer.tokens, np.uint32)))
        for _ in reuse.save(kv, whole[: kv.length]):
            pass  # no pause: a next turn that comes at once finds all of it

    def _compute(self, tokens: Tokens, kv: Kv) -> Tensor:
        return self.served.forward(torch.from_numpy(tokens.astype(np.int64)), kv)

    def _finish(self, generation: Generation, answer: _Answer, finish: Finish) -> None:
        account = generation.account
        self.metrics.count("generated_tokens_total", len(answer.tokens))
        self.metrics.count("prefill_seconds_total", account.prefill_seconds)
        self.metrics.count("first_token_seconds_total", account.first_token - account.submitted)
        self._end(generation, finish, answer.rest())

    def _end(self, generation: Generation, finish: Finish, text: str = "") -> None:
        generation.account.ended = self._clock.now()
        generation.tell(Event(text=text, finish=finish))

    def _fail(self, generation: Generation, error: Exception) -> None:
        if isinstance(error, NotFiniteError):
            msg, hint = "the model computed a number that is not finite", "check its weights, or serve it in float32"
        else:
            LOG.error("a request failed", exc_info=error)
            msg, hint = "the engine failed while computing this request", "the server's log says more"
        generation.account.error = error if isinstance(error, ThermoclineError) else ModelError(msg, hint=hint)
        self._end(generation, Finish.FAILED)


class _Answer:
    """The tokens of one answer as they are chosen, and the events that tell of them."""

    def __init__(self, generation: Generation, text: Text, end_tokens: frozenset[int]) -> None:
        request = generation.request
        self._generation = generation
        self._sampler = Sampler(request.sampling, logprobs=request.logprobs)
        self._stream = TextStream(text, request.stop)
        self._end_tokens = frozenset() if request.ignore_eos else end_tokens
        self.tokens: list[int] = []

    @property
    def last(self) -> Tokens:
        """The last token, as an array of one."""
        return np.array(self.tokens[-1:], np.uint32)

    def take(self, logits: Tensor) -> Finish | None:
        """Choose the next token and tell of it. Returns why the answer ends with it, or None. Raises NotFiniteError."""
        choice = self._sampler.choose(logits)
        self.tokens.append(choice.token)
        ended = choice.token in self._end_tokens
        self._generation.tell(Event(choice, "" if ended else self._stream.feed(choice.token)))
        if ended or self._stream.stopped:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self._generation.request.max_new_tokens else None

    def rest(self) -> str:
        """The text that was held back in case more would follow."""
        return self._stream.finish()


def _piece_ends(start: int, stop: int) -> Iterator[int]:
    """Where the pieces of a prompt's rest [start, stop) end: at fixed places, wherever it starts."""
    yield from range((start // PREFILL_TOKENS + 1) * PREFILL_TOKENS, stop, PREFILL_TOKENS)
    yield stop
