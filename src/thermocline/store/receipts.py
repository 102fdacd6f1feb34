"""The last receipts, and the one place where a plan and a load become a receipt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thermocline.store.likeness import Likeness, Resemblance
from thermocline.store.plan import Plan
from thermocline.store.receipt import Missing, Reason, Receipt, merged

RECEIPTS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought: the first `blocks` blocks are verified and may be used, later ones hold anything at all."""

    blocks: int
    by_tier: dict[str, int]
    missing: tuple[Missing, ...]
    seconds: float


NOTHING = Loaded(0, {}, (), 0.0)


class Receipts:
    """A bounded ring of receipts by request. Safe to use from several threads."""

    def __init__(self, kept: int = RECEIPTS_KEPT) -> None:
        self._kept = kept
        self._ring: OrderedDict[str, Receipt] = OrderedDict()
        self._likeness = Likeness()
        self._lock = threading.Lock()

    def record(
        self, request: str, tokens: NDArray[np.uint32], plan: Plan, loaded: Loaded | None, prefill_seconds: float
    ) -> Receipt:
        """Make the receipt of a request and keep it. `loaded` is None where nothing was loaded."""
        with self._lock:
            resemblance = self._likeness.closest(tokens)
            receipt = make_receipt(request, plan, loaded or NOTHING, prefill_seconds, resemblance)
            self._likeness.note(request, tokens)
            self._ring[request] = receipt
            while len(self._ring) > self._kept:
                self._ring.popitem(last=False)
        return receipt

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


def make_receipt(
    request: str, plan: Plan, loaded: Loaded, prefill_seconds: float, resemblance: Resemblance | None
) -> Receipt:
    """A pure function: every block that was not loaded gets its one reason, the most specific one that is known."""
    tokens_per_block = plan.layouts[0].tokens_per_block
    whole = len(plan.keys)
    blocks = -(-plan.prompt_tokens // tokens_per_block)
    missing = [part for part in (*loaded.missing, *plan.missing) if part.start >= loaded.blocks]
    missing = [_diverged(part, tokens_per_block, resemblance) for part in missing]
    tail = Missing(whole, blocks, Reason.TAIL, "a partial block, or the token that must be computed")
    loaded_tokens = loaded.blocks * tokens_per_block
    return Receipt(
        request=request,
        prompt_tokens=plan.prompt_tokens,
        tokens_per_block=tokens_per_block,
        loaded_tokens=loaded_tokens,
        computed_tokens=plan.prompt_tokens - loaded_tokens,
        by_tier={tier: count * tokens_per_block for tier, count in loaded.by_tier.items()},
        missing=merged([*missing, tail]),
        match_seconds=plan.match_seconds,
        load_seconds=loaded.seconds,
        prefill_seconds=prefill_seconds,
        planned_load_seconds=plan.load_seconds,
        planned_recompute_seconds=plan.recompute_seconds,
        planned_cold_seconds=plan.cold_seconds,
    )


def _diverged(part: Missing, tokens_per_block: int, resemblance: Resemblance | None) -> Missing:
    """Blocks that were never seen, in a prompt that mostly was: the reason is the token where it parts."""
    unseen = part.reason in {Reason.NEVER_SEEN, Reason.UNKNOWN}
    if resemblance is None or not unseen or resemblance.at // tokens_per_block != part.start:
        return part
    detail = (
        f"token {resemblance.at} differs from request {resemblance.request}, "
        f"which holds {resemblance.share:.0%} of this prompt's text"
    )
    return Missing(part.start, part.stop, Reason.DIVERGED, detail)
