"""Staging: what a prompt begins with is brought into memory and kept there, for engines that read it from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.store.plan import Plan, Run
from thermocline.store.receipt import Missing, Reason, merged
from thermocline.store.store import Store


def stage(
    store: Store,
    layouts: Sequence[Layout],
    keys: Sequence[BlockKey],
    *,
    prompt_tokens: int,
    now: float,
    promoting: Callable[[float], None],
    then: Callable[[Plan], None],
) -> None:
    """Match a prompt, promote what lies deeper than memory, and call `then` with a plan whose blocks all lie in memory.

    The plan's runs still say which tier each block came from; its lease holds them in memory. Where that takes time,
    `promoting` is called first, with the time at which it is over at the latest, and `then` in another thread. It never
    takes longer than computing would: what has not come by then is left out, as LATE.
    """
    plan = store.match(layouts, keys, prompt_tokens=prompt_tokens)
    if store.in_memory(plan):
        then(plan)
        return
    deadline = now + plan.load_seconds_max
    promoting(deadline)
    job = store.prefetch(layouts, keys[: plan.blocks], deadline)
    job.watch(done=lambda _: then(_arrived(store, plan)))


def _arrived(store: Store, plan: Plan) -> Plan:
    """The plan, as far as its blocks are in memory now, with a lease on those there."""
    held, lease = store.lease_in_memory(plan.layouts, plan.keys[: plan.blocks])
    store.release(plan.lease)
    if held == plan.blocks:
        return replace(plan, lease=lease)
    runs = tuple(Run(run.start, min(run.stop, held), run.tier, run.seconds) for run in plan.runs if run.start < held)
    why = _why_no_more(store, plan, held)
    rest = tuple(part for part in plan.missing if part.stop > plan.blocks)
    return replace(plan, runs=runs, lease=lease, missing=merged((why, *rest)))


def _why_no_more(store: Store, plan: Plan, held: int) -> Missing:
    """Why nothing came behind the blocks that are held: it turned out to be gone, or damaged, or it takes too long."""
    gaps = store.missing(plan.layouts, plan.keys[: plan.blocks])
    lost = next((gap for gap in gaps if gap.start <= held < gap.stop), None)
    if lost is not None:
        return Missing(held, plan.blocks, lost.reason, lost.detail)
    return Missing(held, plan.blocks, Reason.LATE, "it was not in memory by the time computing it would have taken")
