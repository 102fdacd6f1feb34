"""Where a request goes: what its prompt is, who holds how much of it, and whose first token comes soonest.

Prompts are known by their token ids where there is a tokenizer, which is exact; else by keys of their bytes, that is by
what was sent where before. All of it is memory and arithmetic, but for tokenising a long text, which is done aside.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from array import array
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from msgspec import Struct

from thermocline.blocks.key import TOKENS_PER_KEY
from thermocline.clock import Clock, SystemClock
from thermocline.fleet.books import Booking, Fleet
from thermocline.fleet.chains import Chain
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import NOTHING, Ask, Choice, Instance, Outcome
from thermocline.fleet.router import choose
from thermocline.gateway.seam import Arrived, Decision, Trouble, Usage
from thermocline.metrics import Metrics
from thermocline.tokens.chunks import PROMPT_CHUNK_BYTES, BytesPerToken
from thermocline.tokens.prompt import Kind, Prompt, prompt_in
from thermocline.tokens.reader import Reader
from thermocline.tokens.recent import Recent

LOG = logging.getLogger("thermocline.gateway")
AT_ONCE_BYTES, IDS_AT_ONCE_BYTES = 4096, 64 << 10
"""A longer text that is new takes milliseconds to tokenise, which others would wait for. Ids are quick to read."""
ASIDE_BYTES_MAX, ASIDE_SECONDS_MAX = 256 << 10, 0.5
"""While more than this is tokenised, or where it takes longer, a prompt is known by its bytes. 256 KiB take 0.1 s."""
READ_THREADS = 2
EARLY_EVENTS = frozenset({"/v1/responses"})
"""A stream of these begins with events that say nothing of a first token."""


class _Sent(Struct, frozen=True):
    """What is remembered of a try until it ends."""

    booking: Booking
    cost_bytes: int
    slot: int
    chain: Chain | None


class Door:
    """The gateway's `Chooser`: tokens, index and books joined. One event loop calls it; events come from their thread.

    `model` is what instances call the base model: requests for another name are for an adapter of it. `secret` keys
    what is remembered of sessions and salts. Prompts that are known by their tokens are noted in `recent`.
    """

    def __init__(
        self,
        index: FleetIndex,
        fleet: Fleet,
        *,
        policy: str,
        secret: bytes,
        model: str | None = None,
        reader: Reader[Chain] | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.recent = Recent()
        self._index, self._fleet, self._policy = index, fleet, policy
        self._secret, self._model, self._reader = secret, model, reader
        self._clock, self._metrics = clock or SystemClock(), metrics or Metrics()
        self._bytes_per_token = BytesPerToken()
        self._sent: dict[int, _Sent] = {}
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tokens")
        self._aside: dict[Future[Chain | None], int] = {}
        self._learning_failed = False

    def close(self) -> None:
        """Tokenise nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- instances -----------------------------------------------------------------------------------------------------

    def joined(self, slot: int, instance: Instance) -> None:
        """See `Chooser`."""
        self._fleet.join(instance, slot, self._clock.now())
        self._index.drop(slot)

    def left(self, slot: int) -> None:
        """See `Chooser`."""
        self._fleet.leave(slot, self._clock.now())
        self._index.drop(slot)

    def lost(self, slot: int) -> None:
        """See `Chooser`. Its bookings end as the requests do. What its node holds is there when it comes back."""
        self._index.drop(slot, source="")

    # -- requests ------------------------------------------------------------------------------------------------------

    def choose(self, request: Arrived) -> Decision | Awaitable[Decision]:
        """See `Chooser`."""
        prompt = prompt_in(request.path, request.front)
        if prompt is None or not prompt.exact:
            return self._decided(request, prompt, None)
        if prompt.kind is not Kind.TOKENS and self._reader is None:
            return self._decided(request, prompt, None)
        if prompt.cost_bytes <= (IDS_AT_ONCE_BYTES if prompt.kind is Kind.TOKENS else AT_ONCE_BYTES):
            return self._decided(request, prompt, self._chain(request, prompt))
        if sum([*self._aside.values()]) > ASIDE_BYTES_MAX:
            self._metrics.count("decisions_by_bytes_total", labels=(("why", "full"),))
            return self._decided(request, prompt, None)
        return self._read_aside(request, prompt)

    async def _read_aside(self, request: Arrived, prompt: Prompt) -> Decision:
        reading = self._threads.submit(self._chain, request, prompt)
        self._aside[reading] = prompt.cost_bytes
        reading.add_done_callback(self._aside.pop)
        try:
            async with asyncio.timeout(ASIDE_SECONDS_MAX):
                chain = await asyncio.wrap_future(reading)
        except TimeoutError:  # it goes on there, as it cannot be ended, and counts as long as it does
            self._metrics.count("decisions_by_bytes_total", labels=(("why", "late"),))
            chain = None
        return self._decided(request, prompt, chain)

    def _chain(self, request: Arrived, prompt: Prompt) -> Chain | None:
        """The prompt as the index knows it; None where only the engine can tell what its tokens are."""
        salt, lora = _salt(request, prompt), self._adapter(request.model)

        def grow(before: Chain | None, tokens: array[int], known: int) -> Chain:
            if before is None:
                return self._index.chain(tokens, salt=salt, lora=lora)
            return before.continued(tokens, known)

        try:
            if self._reader is None:
                return grow(None, prompt.ids(), 0)
            read = self._reader.read(prompt, grow, apart=(salt.encode(), *(name.encode() for name in lora)))
        except (msgspec.MsgspecError, UnicodeError):  # the instance says what it thinks of such a prompt
            return None
        return None if read is None else read.chain

    def _adapter(self, model: str | None) -> tuple[str, ...]:
        return (model,) if model and self._model and model != self._model else ()

    def _decided(self, request: Arrived, prompt: Prompt | None, chain: Chain | None) -> Decision:
        """Decide and book in one step."""
        cost_bytes = prompt.cost_bytes if prompt is not None else len(request.body)
        if chain is None and prompt is not None:
            keys = prompt.chunks(self._secret, _salt(request, prompt).encode())
            chain = self._chain_of_bytes(request, prompt, keys) if keys else None
        overlaps = self._index.match(chain) if chain is not None else NOTHING
        tokens = (chain.tokens if chain is not None else 0) or self._bytes_per_token.tokens(cost_bytes)
        if chain is None or chain.chunk_tokens:  # a guess, but no less than what events say of its beginning
            tokens = max(tokens, 1, 1 + max(overlaps.disk or overlaps.host or overlaps.device, default=0))
        ask = Ask(
            prompt_tokens=tokens,
            overlaps=overlaps,
            session=self._digest(request),
            output_tokens_expected=request.output_tokens or 0,
            exclude=request.exclude,
            streamed=request.streamed and request.path not in EARLY_EVENTS,
        )
        booking = choose(ask, self._fleet, self._policy, request.now)
        if booking is None:
            raise LookupError("the books know no instance that can take this")
        choice = booking.choice
        number = next(self._numbers)
        self._sent[number] = _Sent(booking, cost_bytes, choice.instance, chain)
        if chain is not None:
            self._learn(self._index.learn, choice.instance, chain)
        return Decision(
            instance=choice.instance,
            predicted_seconds=choice.seconds,
            cached_tokens=choice.cached_tokens,
            booking=number,
            kv_transfer_params=self._hint(choice),
            choices=tuple(booking.choices),
        )

    def _chain_of_bytes(self, request: Arrived, prompt: Prompt, keys: list[int]) -> Chain:
        per_token = self._bytes_per_token.value
        return self._index.chain_of_bytes(
            keys,
            PROMPT_CHUNK_BYTES / per_token,
            before_tokens=(prompt.cost_bytes - len(prompt.raw)) / per_token,
            tokens=self._bytes_per_token.tokens(prompt.cost_bytes),
            salt=_salt(request, prompt),
            lora=self._adapter(request.model),
        )

    def _learn(self, learn: Callable[..., None], *told: object) -> None:
        """Remember what was sent there. What goes wrong in that costs knowledge, never the booking."""
        try:
            learn(*told)
        except Exception as error:  # noqa: BLE001  # whatever it is, the request is booked and goes
            self._metrics.count("learning_failed_total")
            if not self._learning_failed:
                LOG.error("what was sent where cannot be remembered: %s", type(error).__name__)  # noqa: TRY400  # a traceback could quote a prompt
            self._learning_failed = True

    def _hint(self, choice: Choice) -> bytes:
        """Where a better copy lies, where the chosen instance has a node that could fetch it from another."""
        hint = choice.hint
        if hint is None or not hint.node or not self._fleet.instances[choice.instance].node:
            return b""
        return msgspec.json.encode(hint.kv_transfer_params())

    def _digest(self, request: Arrived) -> str | None:
        """What stands for a session here: it tells nobody what the client called it."""
        if not request.session:
            return None
        text = request.salt + b"\0" + request.session.encode()
        return hashlib.blake2b(text, key=self._secret, digest_size=12).hexdigest()

    # -- what came of it -----------------------------------------------------------------------------------------------

    def first_byte(self, decision: Decision, now: float) -> None:
        """See `Chooser`."""
        sent = self._sent.get(decision.booking)
        if sent is not None and sent.booking.ask.streamed:
            self._fleet.first_token(sent.booking, now)

    def finished(self, decision: Decision, now: float, usage: Usage | None) -> Outcome | None:
        """See `Chooser`."""
        sent = self._sent.pop(decision.booking, None)
        if sent is None:
            return None
        cached = usage.cached_tokens if usage is not None else None
        outcome = self._fleet.finished(sent.booking, now, cached)
        if usage is not None and sent.chain is not None:
            self._learn(self._note, sent.booking, sent.chain, now, usage.output_tokens or 0)
        if usage is not None and usage.prompt_tokens:
            self._bytes_per_token.learn(sent.cost_bytes, usage.prompt_tokens)
            if sent.chain is not None:
                told = (usage.prompt_tokens, cached, usage.output_tokens or 0)
                self._learn(self._index.ended, sent.slot, sent.chain, *told)
        if cached is not None:
            self._index.told(sent.slot, decision.cached_tokens, cached)
        return outcome

    def _note(self, booking: Booking, chain: Chain, now: float, output_tokens: int) -> None:
        """One more request of the trace, at the time it came. One that is known by its bytes is no part of it."""
        ids = b"" if chain.chunk_tokens else chain.ids(0, -(-chain.tokens // TOKENS_PER_KEY))
        if ids:
            at = self._clock.wall() - (now - booking.arrived)
            self.recent.note(at, ids, group=chain.root, output_tokens=output_tokens)

    def failed(self, decision: Decision, now: float, trouble: Trouble) -> None:  # noqa: ARG002  # Chooser's signature
        """See `Chooser`."""
        sent = self._sent.pop(decision.booking, None)
        if sent is not None:
            self._fleet.failed(sent.booking, now)

    def check_idle(self) -> None:
        """Nothing is booked while no request is in flight. Raises AssertionError."""
        assert not self._sent, "a decision has no end"
        self._fleet.check_integrity()


def _salt(request: Arrived, prompt: Prompt) -> str:
    return request.salt.decode() or prompt.salt or ""
