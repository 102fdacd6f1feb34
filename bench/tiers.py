"""Tiers over their raw limits: memory over plain copies, disk over raw direct I/O, fresh and when nearly full."""

from __future__ import annotations

from typing import Any

from bench import tiers_disk, tiers_memory
from bench.harness import Check, Progress, Report, check, spread


def run(progress: Progress) -> Report:
    """Both tiers. A ratio is our speed over the raw speed in the same round, so 1.0 means nothing was lost."""
    details: dict[str, Any] = {"ratios": {}, "arms": {}, "notes": []}
    checks: list[Check] = []
    for name, target, ours, raw in (*tiers_memory.run(progress), *tiers_disk.run(progress, details["notes"])):
        shares = [limit / own for own, limit in zip(ours, raw, strict=True)]
        details["ratios"][name] = spread(shares)
        details["arms"] |= {f"{name}: ours": spread(ours), f"{name}: raw": spread(raw)}
        checks.append(check(name, details["ratios"][name]["median"], "x", target, "higher"))
    return Report(checks, details)
