"""What a request has to do with the store: find its beginning there, load it, and leave behind what was computed.

Nothing here can fail a request. Whatever the store raises is counted and logged, and the tokens are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.blocks.layout import Layout
from thermocline.engines.generation import GenerateRequest
from thermocline.engines.kv import Kv
from thermocline.engines.pages import MemoryPages
from thermocline.engines.text import Tokens
from thermocline.metrics import Metrics
from thermocline.node.announce import Announcer
from thermocline.store.plan import Plan, Run
from thermocline.store.receipt import Missing, Receipt
from thermocline.store.receipts import NOTHING, Loaded
from thermocline.store.verbs import StoreVerbs
from thermocline.tiers.tier import Outcome

LOG = logging.getLogger("thermocline.engine")
STORE_LABEL = (("tier", "store"),)
T = TypeVar("T")


class Reuse:
    """One request's dealings with the store. Lives as long as the request; used by the engine's thread only.

    `staging` is the engine's private copy: the store loads into it and verifies there, and only then do the bytes move
    to where the model computes on them. Without a store nothing is ever found, and nothing kept.
    """

    def __init__(
        self,
        store: StoreVerbs | None,
        layout: Layout,
        staging: MemoryPages,
        request: GenerateRequest,
        metrics: Metrics,
        announcer: Announcer | None = None,
    ) -> None:
        self._announcer = None if request.salt else announcer  # what is salted is told by its keys alone
        self._store, self._layout, self._staging = store, layout, staging
        self._request, self._metrics = request, metrics
        self._root = root_key(request.salt)
        self._keys = self._hash(request.tokens, self._root) if store else []
        self._plan: Plan | None = None
        self._loaded = NOTHING

    # -- before computing ----------------------------------------------------------------------------------------------

    def load(self, kv: Kv) -> None:
        """Match, load, verify, and copy what is intact to the start of an empty `kv`. At least one token is left."""
        store, request = self._store, self._request
        if store is None or not request.load:
            return
        tokens = len(request.tokens)
        keys = self._keys[: (tokens - 1) // self._layout.tokens_per_block]
        plan = self._plan = self._tried("matching", lambda: store.match([self._layout], keys, prompt_tokens=tokens))
        if plan is None:
            return
        self._tried("loading", lambda: self._load_windows(store, plan, kv))
        self._tried("releasing", lambda: store.release(plan.lease))
        kv.grow(self._loaded.blocks * self._layout.tokens_per_block)
        for tier, blocks in self._loaded.by_tier.items():
            self._metrics.count("cached_tokens_total", blocks * self._layout.tokens_per_block, (("tier", tier),))

    def _load_windows(self, store: StoreVerbs, plan: Plan, kv: Kv) -> None:
        """Load as many blocks at a time as the staging memory holds, until one is missing."""
        for at in range(0, plan.blocks, len(self._staging)):
            window = _window(plan, at, min(plan.blocks, at + len(self._staging)), self._loaded.seconds)
            loaded = store.load(window, 0, self._staging.view(range(window.blocks)))
            kv.write(at, self._staging.rows[: loaded.blocks])
            self._loaded = _joined(self._loaded, loaded)
            if loaded.blocks < window.blocks:
                break

    # -- after computing -----------------------------------------------------------------------------------------------

    def record(self, prefill_seconds: float) -> Receipt | None:
        """Report what computing the prompt took, and keep the receipt, if there was a plan."""
        store, request, plan = self._store, self._request, self._plan
        if store is None:
            return None
        cached = self._loaded.blocks * self._layout.tokens_per_block
        self._tried("learning", lambda: store.costs.recomputed(len(request.tokens) - cached, cached, prefill_seconds))
        if plan is None:
            return None
        receipt = self._tried(
            "accounting",
            lambda: store.receipts.record(
                request.request_id, request.tokens, plan, self._loaded, prefill_seconds, root=self._root
            ),
        )
        for part in receipt.missing if receipt else ():
            self._metrics.count("missing_blocks_total", part.stop - part.start, (("reason", part.reason),))
        return receipt

    def save(self, kv: Kv, tokens: Tokens) -> Iterator[None]:
        """Leave behind every full block of `kv`, which holds the states of `tokens`. Pauses after every window."""
        store = self._store
        if store is None or not self._request.save:
            return
        known = len(self._keys)
        behind = tokens[known * self._layout.tokens_per_block :]
        self._keys += self._hash(behind, self._keys[-1] if known else self._root)
        at: int | None = self._tried("asking", lambda: store.unsaved(self._layout, self._keys))
        while at is not None and at < len(self._keys):
            start = at
            at = self._tried("saving", lambda: self._save_window(store, kv, tokens, start))  # noqa: B023  # called at once
            yield

    def _save_window(self, store: StoreVerbs, kv: Kv, tokens: Tokens, start: int) -> int | None:
        """Save as many blocks as the staging memory holds; where to go on, or None if the store takes no more."""
        stop = min(len(self._keys), start + len(self._staging))
        kv.read(start, self._staging.rows[: stop - start])
        with self._told(tokens, start, stop):
            job = store.save(self._layout, self._keys[:stop], self._staging.view(range(stop - start)), start=start)
        return stop if {Outcome.HIT, Outcome.PENDING}.issuperset(job.outcomes) else None

    @contextmanager
    def _told(self, tokens: Tokens, start: int, stop: int) -> Iterator[None]:
        """KV events of blocks [start, stop) that are saved meanwhile say their tokens too."""
        if self._announcer is None:
            yield
            return
        size = self._layout.tokens_per_block
        self._announcer.text(self._keys[start:stop], tokens[start * size : stop * size].tobytes())
        try:
            yield
        finally:
            self._announcer.text_over()

    # -- both ----------------------------------------------------------------------------------------------------------

    def _hash(self, tokens: Tokens, root: BlockKey) -> list[BlockKey]:
        return block_keys(tokens.data, root=root, tokens_per_block=self._layout.tokens_per_block)

    def _tried(self, doing: str, action: Callable[[], T]) -> T | None:
        """The second law: a cache failure is never a request failure, and never silent. The first is told in full."""
        try:
            return action()
        except Exception:  # whatever it is, what could have been loaded can be computed
            known = self._metrics.value("tier_failures_total", STORE_LABEL) > 0
            self._metrics.count("tier_failures_total", labels=STORE_LABEL)
            if not known:
                LOG.exception("the store failed while %s; requests go on without it", doing)
            return None


def _window(plan: Plan, start: int, stop: int, spent_seconds: float) -> Plan:
    """The part of a plan for blocks [start, stop), as a plan of its own."""
    runs = tuple(
        Run(max(run.start, start) - start, min(run.stop, stop) - start, run.tier, run.seconds)
        for run in plan.runs
        if run.start < stop and run.stop > start
    )
    seconds = max(0.0, plan.load_seconds_max - spent_seconds)
    return replace(plan, keys=plan.keys[start:stop], runs=runs, load_seconds_max=seconds)


def _joined(first: Loaded, second: Loaded) -> Loaded:
    tiers = {*first.by_tier, *second.by_tier}
    missing = tuple(
        Missing(part.start + first.blocks, part.stop + first.blocks, part.reason, part.detail)
        for part in second.missing
    )
    return Loaded(
        first.blocks + second.blocks,
        {tier: first.by_tier.get(tier, 0) + second.by_tier.get(tier, 0) for tier in tiers},
        first.missing + missing,
        first.seconds + second.seconds,
    )
