"""The last receipts, and the one place where a plan and a load become a receipt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.key import BlockKey, root_key
from thermocline.clock import Clock, SystemClock
from thermocline.store.likeness import PROMPTS_KEPT, Likeness, Prompt, Resemblance, sampled
from thermocline.store.plan import Plan
from thermocline.store.receipt import Missing, Reason, Receipt, merged
from thermocline.store.receipts_file import ReceiptsFile
from thermocline.tokens.recent import Recent

RECEIPTS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought: the first `blocks` blocks are verified and may be used, later ones hold anything at all."""

    blocks: int
    by_tier: dict[str, int]
    missing: tuple[Missing, ...]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Parting:
    """Two prompts, `mine` and that of the request `other`, which are equal before token `at` and differ there."""

    other: str
    at: int
    mine: NDArray[np.uint32]
    others: NDArray[np.uint32]


NOTHING = Loaded(0, {}, (), 0.0)


class Receipts:
    """A bounded ring of receipts by request, and a file of them if there is one. Safe to use from several threads."""

    def __init__(self, kept: int = RECEIPTS_KEPT, *, clock: Clock | None = None) -> None:
        self._kept = kept
        self._clock = clock or SystemClock()
        self.recent = Recent()
        """Their prompts, as a trace."""
        self._file: ReceiptsFile | None = None
        self._ring: OrderedDict[str, Receipt] = OrderedDict()
        self._likeness = Likeness()
        self._partings: OrderedDict[str, Resemblance] = OrderedDict()
        self._lock = threading.Lock()

    def record(
        self,
        request: str,
        tokens: NDArray[np.uint32],
        plan: Plan,
        loaded: Loaded | None,
        prefill_seconds: float,
        *,
        root: BlockKey | None = None,
    ) -> Receipt:
        """Make the receipt of a request and keep it. `loaded` is None where nothing was loaded.

        Its prompt is compared only with those of the same `root`: a receipt says nothing about another salt's prompts.
        """
        loaded = loaded or NOTHING
        missing = account(plan, loaded)
        receipt = make_receipt(request, plan, loaded, prefill_seconds, missing, self._clock.wall())
        age = receipt.match_seconds + receipt.load_seconds + prefill_seconds
        return self.keep(receipt, tokens, root=root, age_seconds=age)

    def keep(
        self,
        receipt: Receipt,
        tokens: NDArray[np.uint32],
        *,
        root: BlockKey | None = None,
        age_seconds: float = 0.0,
        output_tokens: int = 0,
    ) -> Receipt:
        """Keep a receipt that was made elsewhere; returns it with what is known here of prompts like this one.

        The request came `age_seconds` ago; `output_tokens` are 0 where its answer is not over.
        """
        request, group = receipt.request, int.from_bytes((root or root_key())[:8], "little")
        prompt = sampled(tokens, group=group)
        with self._lock:
            again = request in self._ring
            missing = self._diverged(request, receipt.missing, prompt, receipt.tokens_per_block)
            receipt = msgspec.structs.replace(receipt, missing=missing)
            self._likeness.note(request, prompt)
            self._ring.pop(request, None)
            self._ring[request] = receipt
            while len(self._ring) > self._kept:
                self._ring.popitem(last=False)
        if not again:  # one that was preempted came once
            came = max(0.0, self._clock.wall() - age_seconds)
            self.recent.note(came, tokens.tobytes(), group=group, output_tokens=output_tokens)
        if self._file is not None:
            self._file.append(receipt)
        return receipt

    def keep_in(self, file: ReceiptsFile) -> None:
        """Append every receipt from now on to this file, too. It is closed with the receipts."""
        self._file = file

    def close(self) -> None:
        """Write what waits for the file, if there is one. A second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def get(self, request: str) -> Receipt | None:
        """The receipt of a request (`last`: the latest one), if it is still kept."""
        with self._lock:
            if request == "last":
                return next(reversed(self._ring.values()), None)
            return self._ring.get(request)

    def latest(self, count: int) -> list[Receipt]:
        """The last `count` receipts, newest first."""
        with self._lock:
            return [receipt for receipt, _ in zip(reversed(self._ring.values()), range(count), strict=False)]

    def parting(self, request: str) -> Parting | None:
        """Where a prompt that was DIVERGED parts from the other one, while both are remembered."""
        with self._lock:
            like = self._partings.get(request)
            mine = self._likeness.tokens(request)
            other = self._likeness.tokens(like.request) if like else None
        return None if like is None or mine is None or other is None else Parting(like.request, like.at, mine, other)

    def _diverged(
        self, request: str, missing: Sequence[Missing], prompt: Prompt, tokens_per_block: int
    ) -> tuple[Missing, ...]:
        """Blocks never seen, of a prompt that mostly was: the reason is the token where it parts from another."""
        parts = list(missing)
        self._partings.pop(request, None)
        at = next((at for at, part in enumerate(parts) if part.reason in _UNSEEN), None)
        if at is not None:
            start = parts[at].start * tokens_per_block
            like = self._likeness.closest(prompt, start, start + tokens_per_block)
            if like:
                detail = (
                    f"token {like.at} differs from request {like.request}, which holds {like.share:.0%} of what follows"
                )
                parts[at] = Missing(parts[at].start, parts[at].stop, Reason.DIVERGED, detail)
                self._partings[request] = like
                while len(self._partings) > PROMPTS_KEPT:
                    self._partings.popitem(last=False)
        return tuple(parts)


def account(plan: Plan, loaded: Loaded) -> tuple[Missing, ...]:
    """One reason for every block from the first that was computed to the end. A pure function."""
    blocks = -(-plan.prompt_tokens // plan.layouts[0].tokens_per_block)
    tail = Missing(len(plan.keys), blocks, Reason.TAIL, "a partial block, or the token that must be computed")
    parts: list[Missing] = []
    at = loaded.blocks
    for part in (*loaded.missing, *plan.missing, tail):
        parts.append(Missing(at, part.start, Reason.DECLINED, "planned, but the engine did not load it"))
        at = max(at, part.start)
        parts.append(Missing(at, part.stop, part.reason, part.detail))
        at = max(at, part.stop)
    return merged(parts)


def make_receipt(
    request: str, plan: Plan, loaded: Loaded, prefill_seconds: float, missing: Sequence[Missing], wall_seconds: float
) -> Receipt:
    """A pure function of what was planned, what was loaded, and why not more."""
    tokens_per_block = plan.layouts[0].tokens_per_block
    loaded_tokens = loaded.blocks * tokens_per_block
    return Receipt(
        request=request,
        prompt_tokens=plan.prompt_tokens,
        tokens_per_block=tokens_per_block,
        loaded_tokens=loaded_tokens,
        computed_tokens=plan.prompt_tokens - loaded_tokens,
        by_tier={tier: count * tokens_per_block for tier, count in loaded.by_tier.items()},
        missing=tuple(missing),
        match_seconds=plan.match_seconds,
        load_seconds=loaded.seconds,
        prefill_seconds=prefill_seconds,
        planned_load_seconds=plan.load_seconds,
        planned_recompute_seconds=plan.recompute_seconds,
        planned_cold_seconds=plan.cold_seconds,
        wall_seconds=wall_seconds,
    )


_UNSEEN = frozenset({Reason.NEVER_SEEN, Reason.UNKNOWN})
