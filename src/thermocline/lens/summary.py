"""What many receipts say together: how much of the prompts was loaded from where, and why not more.

Every token of a prompt is counted once: as loaded from one tier, or as computed for one reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from thermocline.store.receipt import Missing, Reason, Receipt


class ReasonShare(msgspec.Struct, frozen=True):
    """Tokens that were computed for one reason, in how many requests.

    `detail` is that of the largest stretch of the most frequent kind; `alike` counts the requests with one of its kind,
    such as another that differs at the same token.
    """

    reason: Reason
    tokens: int
    requests: int
    detail: str = ""
    alike: int = 0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Of all these requests: loaded_tokens, and the tokens in `by_reason`, add up to prompt_tokens exactly.

    `hit_rate` is loaded over prompt tokens. `by_reason` has the most tokens first. `skipped` counts what was no whole
    receipt; times are seconds since 1970, 0 where none is known.
    """

    requests: int
    prompt_tokens: int
    loaded_tokens: int
    hit_rate: float
    by_tier: dict[str, int]
    by_reason: tuple[ReasonShare, ...]
    first_wall_seconds: float = 0.0
    last_wall_seconds: float = 0.0
    skipped: int = 0


def token_range(missing: Missing, receipt: Receipt) -> tuple[int, int]:
    """The tokens [start, stop) of a stretch of blocks. The last block of a prompt may be a part of one."""
    size, prompt = receipt.tokens_per_block, receipt.prompt_tokens
    return min(missing.start * size, prompt), min(missing.stop * size, prompt)


def summarise(receipts: Iterable[Receipt], *, skipped: int = 0) -> Summary:
    """Add receipts up. One that does not account for each of its tokens is left out, and counted as skipped."""
    counted: list[Receipt] = []
    by_tier: Counter[str] = Counter()
    stretches: dict[Reason, list[tuple[str, str, int]]] = {}
    for receipt in receipts:
        if not _adds_up(receipt):
            skipped += 1
            continue
        counted.append(receipt)
        by_tier.update(receipt.by_tier)
        for missing in receipt.missing:
            start, stop = token_range(missing, receipt)
            stretches.setdefault(missing.reason, []).append((receipt.request, missing.detail, stop - start))
    prompt_tokens = sum(receipt.prompt_tokens for receipt in counted)
    loaded_tokens = sum(receipt.loaded_tokens for receipt in counted)
    times = [receipt.wall_seconds for receipt in counted if receipt.wall_seconds > 0]
    shares = (_share(reason, parts) for reason, parts in stretches.items())
    return Summary(
        requests=len(counted),
        prompt_tokens=prompt_tokens,
        loaded_tokens=loaded_tokens,
        hit_rate=loaded_tokens / prompt_tokens if prompt_tokens else 0.0,
        by_tier={tier: tokens for tier, tokens in by_tier.most_common() if tokens},
        by_reason=tuple(sorted(shares, key=lambda share: (-share.tokens, share.reason))),
        first_wall_seconds=min(times, default=0.0),
        last_wall_seconds=max(times, default=0.0),
        skipped=skipped,
    )


def _share(reason: Reason, parts: Sequence[tuple[str, str, int]]) -> ReasonShare:
    kinds: Counter[str] = Counter()
    for _, detail, tokens in parts:
        kinds[_kind(detail)] += max(1, tokens)
    most = kinds.most_common(1)[0][0]
    alike = [(tokens, detail, request) for request, detail, tokens in parts if _kind(detail) == most]
    return ReasonShare(
        reason,
        sum(tokens for _, _, tokens in parts),
        len({request for request, _, _ in parts}),
        max(alike)[1],
        len({request for _, _, request in alike}),
    )


def _kind(detail: str) -> str:
    """A detail without what differs from one request to the next: other requests' names, ages, seconds."""
    return _VARYING.sub("*", detail)


def _adds_up(receipt: Receipt) -> bool:
    at = receipt.loaded_tokens
    for missing in receipt.missing:
        start, stop = token_range(missing, receipt)
        if start != at or stop < start:
            return False
        at = stop
    return at == receipt.prompt_tokens and sum(receipt.by_tier.values()) == receipt.loaded_tokens


_VARYING = re.compile(r"request .+, which holds \d+%|less than a minute ago|\d+ (?:min|h|d) ago|\d+(?:\.\d+)? m?s\b")
