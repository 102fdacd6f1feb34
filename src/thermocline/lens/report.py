"""Receipts and checks in words."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import msgspec

from thermocline.errors import UnreachableError
from thermocline.lens.summary import ReasonShare, Summary, token_range
from thermocline.store.receipt import Excerpt, ExcerptedReceipt, Missing, Reason, Receipt

if TYPE_CHECKING:  # numpy, which a receipt does not need
    from thermocline.tiers.check import CheckReport

T = TypeVar("T")
BAR, BAR_WIDTH = "\u2588", 40
_WORDS = {
    Reason.NEVER_SEEN: "was never seen before",
    Reason.UNKNOWN: "is not remembered; it may have been here long ago",
    Reason.DIVERGED: "differs from what is stored",
    Reason.EVICTED: "was here, and was dropped to make room",
    Reason.EXPIRED: "was here, and reached its age limit",
    Reason.OTHER_LAYOUT: "is stored, but for another model, engine or block size",
    Reason.ELSEWHERE: "is on another node",
    Reason.PENDING: "is being written or promoted right now",
    Reason.DECLINED: "is stored, but computing it was predicted to be quicker",
    Reason.NOT_ADMITTED: "was seen, but not kept",
    Reason.LATE: "did not arrive by the deadline",
    Reason.CORRUPT: "did not verify, and was dropped",
    Reason.TIER_DOWN: "is in a tier that is set aside after failures",
    Reason.TAIL: "is always computed: a partial block, or the token that starts the answer",
}
_ADVICE = {
    Reason.NEVER_SEEN: "The text is new here. The next prompt that begins with it loads it.",
    Reason.UNKNOWN: "Too long ago to say more. More memory_bytes or a disk_path keeps blocks for longer.",
    Reason.DIVERGED: (
        "What changes with every request (a time, an id, a user's name) belongs at the end of a prompt: "
        "everything after the first difference is computed again."
    ),
    Reason.EVICTED: "The tiers are too small for this traffic: raise memory_bytes or disk_bytes, or set disk_path.",
    Reason.EXPIRED: "Raise ttl_seconds if prompts come back later than that.",
    Reason.OTHER_LAYOUT: "Blocks load only where every byte means the same; the new ones take over as they are made.",
    Reason.ELSEWHERE: "Send requests of one conversation to one node.",
    Reason.PENDING: "The same prompt a moment later loads it.",
    Reason.DECLINED: "This is as quick as it gets with the present tiers.",
    Reason.NOT_ADMITTED: "The detail says why; a larger write_queue_bytes lets more bytes wait for the disk.",
    Reason.LATE: "A tier is slower than load_seconds_max allows; the request went on without it.",
    Reason.CORRUPT: "Damaged bytes are refused and computed again, so answers stay right; but look after the medium.",
    Reason.TIER_DOWN: "The tier is tried again by itself; /metrics shows which one fails.",
    Reason.TAIL: "All that can be loaded was loaded.",
}


class ReceiptList(msgspec.Struct, frozen=True):
    """What a server tells of its last requests, newest first; `has_more` where not all that was asked for fits."""

    data: tuple[Receipt, ...]
    has_more: bool = False


def read(body: bytes) -> ExcerptedReceipt:
    """A receipt from the JSON that a server sends. Raises UnreachableError if it is something else."""
    return _read(body, ExcerptedReceipt, "a receipt")


def read_list(body: bytes) -> ReceiptList:
    """A list of receipts from the JSON that a server sends. Raises UnreachableError if it is something else."""
    return _read(body, ReceiptList, "a list of receipts")


def _read(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "is it a thermocline server of this version?"
        raise UnreachableError(f"the server's answer is not {what}: {error}", hint=hint) from None


def render(receipt: Receipt) -> str:
    """A receipt in words: what was loaded, what was computed, why, and what that means."""
    prompt = receipt.prompt_tokens
    match, load, prefill = map(_time, (receipt.match_seconds, receipt.load_seconds, receipt.prefill_seconds))
    lines = [
        f"request {receipt.request}",
        f"  prompt    {prompt:>9,} tokens",
        f"  loaded    {receipt.loaded_tokens:>9,} tokens  {_share(receipt.loaded_tokens, prompt)}{_tiers(receipt)}",
        f"  computed  {receipt.computed_tokens:>9,} tokens  {_share(receipt.computed_tokens, prompt)}",
        f"  matching  {match}, loading {load}, computing {prefill}",
        f"  predicted {_time(receipt.planned_cold_seconds)} to compute all of it",
    ]
    if receipt.missing:
        lines.append("why not more")
        lines += [f"  {_explain(missing, receipt)}" for missing in receipt.missing]
    if isinstance(receipt, ExcerptedReceipt) and receipt.excerpt is not None:
        lines += _excerpted(receipt.excerpt)
    lines.append(f"so: {conclude(receipt)}")
    return "\n".join(lines)


def _excerpted(excerpt: Excerpt) -> list[str]:
    return [
        f"where it parts from request {excerpt.other_request}, at token {excerpt.token:,}",
        f"  both     ...{_printable(excerpt.before)}",
        f"  this one {_printable(excerpt.this)}...",
        f"  that one {_printable(excerpt.other)}...",
    ]


def _printable(text: str) -> str:
    """Text that came from anywhere, without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def conclude(receipt: Receipt) -> str:
    """One or two sentences: what the reason behind most of the computed tokens means, and what to do about it."""
    tokens: Counter[Reason] = Counter()
    for missing in receipt.missing:
        start, stop = token_range(missing, receipt)
        tokens[missing.reason] += max(1, stop - start)
    del tokens[Reason.TAIL]
    return _ADVICE[tokens.most_common(1)[0][0] if tokens else Reason.TAIL]


def render_summary(summary: Summary, *, bars: bool = False) -> str:
    """A summary in words: the hit rate, where tokens came from, why the others were computed, and what to do.

    With `bars`, each share has a bar beside it.
    """
    whole = summary.prompt_tokens
    lines = [
        f"{_requests(summary.requests)}{_period(summary)}",
        f"  prompts   {whole:>12,} tokens",
        f"  loaded    {summary.loaded_tokens:>12,} tokens  {_share(summary.loaded_tokens, whole)}: the hit rate",
    ]
    if summary.skipped:
        lines.append(f"  left out  {summary.skipped:>12,} that are no whole receipts")
    if summary.by_tier:
        lines.append("loaded from")
        lines += [_bar_line(tier, tokens, whole, bars=bars) for tier, tokens in summary.by_tier.items()]
    if summary.by_reason:
        lines.append("computed, because it")
    for share in summary.by_reason:
        lines.append(_bar_line(share.reason.name, share.tokens, whole, bars=bars))
        lines += [f"    {line}" for line in _told(share)]
    lines.append(f"so: {conclude_summary(summary)}")
    return "\n".join(lines)


def conclude_summary(summary: Summary) -> str:
    """The answer to "why is my hit rate 30 %?": the reason that costs most tokens, and the one thing to do about it."""
    if not summary.prompt_tokens:
        return "No request has been answered yet."
    worst = next((share for share in summary.by_reason if share.reason is not Reason.TAIL and share.tokens), None)
    hit = f"The hit rate is {_share(summary.loaded_tokens, summary.prompt_tokens).strip()}."
    if worst is None:
        return f"{hit} {_ADVICE[Reason.TAIL]}"
    part = _share(worst.tokens, summary.prompt_tokens).strip()
    return f"{hit} {part} of all prompt tokens are {worst.reason.name}. {_ADVICE[worst.reason]}"


def _told(share: ReasonShare) -> list[str]:
    lines = [_WORDS[share.reason]]
    if share.detail and share.reason is not Reason.TAIL:
        more = f", and {share.alike - 1:,} more like it" if share.alike > 1 else ""
        lines.append(f"in {_requests(share.requests)}, such as: {share.detail}{more}")
    return lines


def _period(summary: Summary) -> str:
    if not summary.last_wall_seconds:
        return ""
    first, last = (_moment(at) for at in (summary.first_wall_seconds, summary.last_wall_seconds))
    return f", {first} to {last} UTC"


def _moment(wall_seconds: float) -> str:
    return f"{datetime.fromtimestamp(wall_seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _bar_line(name: str, tokens: int, whole: int, *, bars: bool) -> str:
    bar = "  " + BAR * max(1, round(BAR_WIDTH * tokens / whole)) if bars and tokens else ""
    return f"  {name:12} {tokens:>9,} tokens  {_share(tokens, whole)}{bar}"


def render_check(found: CheckReport) -> str:
    """What a check of a disk tier found, in words, and what a repair did."""
    lines = [f"{found.path}: {found.blocks:,} blocks, {found.bytes:,} bytes, in {found.segments:,} segments"]
    counts = [
        (found.corrupt, "blocks do not verify, and would be refused"),
        (found.orphans, "blocks lack an ancestor, and cannot be matched"),
        (found.torn_pages, "pages of the log have a wrong sum"),
        (found.unknown_pages, "pages of the log were written by another release"),
    ]
    done = found.repaired
    if done is not None:
        counts = [
            (done.restored, "blocks were found again by their frames"),
            (done.corrupt, "blocks that did not verify were dropped"),
            (done.orphans, "blocks that lacked an ancestor were dropped"),
            (done.void, "records that cannot be true were dropped"),
            (done.log_pages, "damaged pages of the log were dropped"),
            (done.files, "files that a crash left over were removed"),
        ]
    lines += [f"  {count:,} {words}" for count, words in counts if count]
    if done is not None and not any(count for count, _ in counts):
        lines.append("  nothing had to be repaired")
    damaged = f"so: damaged. {_ADVICE[Reason.CORRUPT]}\nhint: `thermocline check PATH --repair` keeps what is whole"
    lines.append("so: every block that can be matched is right" if found.ok else damaged)
    return "\n".join(lines)


def _explain(missing: Missing, receipt: Receipt) -> str:
    start, stop = token_range(missing, receipt)
    what = f"token {start:,}" if stop - start == 1 else f"tokens {start:,} to {stop - 1:,}"
    detail = f" ({missing.detail})" if missing.detail and missing.reason is not Reason.TAIL else ""
    return f"{what}: {missing.reason.name} - {_WORDS[missing.reason]}{detail}"


def _tiers(receipt: Receipt) -> str:
    parts = [f"{tokens:,} from {tier}" for tier, tokens in receipt.by_tier.items() if tokens]
    return f": {', '.join(parts)}" if parts else ""


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:3.0f} %" if whole else "  - "


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
