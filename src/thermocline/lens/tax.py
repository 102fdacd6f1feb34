"""What lookups before the first token cost, in a table: as the application saw it, plainly, and with the near cache."""

from __future__ import annotations

from thermocline.lens import figures
from thermocline.near.profile import Cost, Side, Spread, Tax

KINDS_MAX = 20
NAMES = {"recorded": "as recorded", "plain": "plain redis-py", "near": "near cache"}


def render(tax: Tax) -> str:
    """In words and a table per way to ask."""
    sides = {name: side for name in NAMES if (side := getattr(tax, name)) is not None}
    lines = [line for name, side in sides.items() for line in _side(NAMES[name], side)]
    return "\n".join([*lines, f"so: {_conclude(tax)}", *_reservations(tax)])


def _side(name: str, side: Side) -> list[str]:
    head = f"  {'kind':24} {'calls':>8} {'mean size':>10} {'p50':>10} {'p99':>10} {'all':>10} {'memory':>8}"
    shown = [_row(kind, cost) for kind, cost in list(side.kinds.items())[:KINDS_MAX]]
    left = len(side.kinds) - len(shown)
    more = [f"  and {left} kinds that cost less"] if left else []
    per = side.requests
    request = [f"  before the first token of a request ({per.count:,}): {_spread(per)}"] if per else []
    return [name, head, *shown, *more, *request]


def _row(kind: str, cost: Cost) -> str:
    taken = cost.seconds
    p50, p99, total = map(figures.seconds, (taken.p50_seconds, taken.p99_seconds, taken.sum_seconds))
    size = figures.nbytes(cost.mean_bytes)
    return f"  {kind[:24]:24} {taken.count:>8,} {size:>10} {p50:>10} {p99:>10} {total:>10} {cost.memory_share:>8.0%}"


def _spread(spread: Spread) -> str:
    return f"p50 {figures.seconds(spread.p50_seconds)}, p99 {figures.seconds(spread.p99_seconds)}"


def _conclude(tax: Tax) -> str:
    if tax.plain is None or tax.near is None:
        return "name the server with --url to see what the same lookups cost without the near cache, and with it"
    plain, near, unit = tax.plain.requests, tax.near.requests, "request"
    if plain is None or near is None or tax.saved is None:
        return "no request was marked; `with profile.request()` around what comes before the first token tells of each"
    first, then, saved = (each.p50_seconds for each in (plain, near, tax.saved))
    if saved <= 0:
        return (
            f"nothing is saved: the median {unit} waits {figures.seconds(first)}, and {figures.seconds(then)} with it"
        )
    waits = f"waits {figures.seconds(then)} in place of {figures.seconds(first)}"
    return f"the median {unit} {waits} for its lookups: {figures.seconds(saved)} sooner at its first token"


def _reservations(tax: Tax) -> list[str]:
    """What these figures are not."""
    if tax.plain is None:
        return []
    start = "was filled before" if tax.warm else "was empty before each round"
    lines = [
        f"Asked {tax.rounds} times in turn, one lookup after another, from this process; near memory {start}.",
        "What others change meanwhile is fetched anew; an application whose keys change more often saves less.",
        "It is latency of a request, which engines spend on other requests: no time of a GPU, no throughput, no money.",
    ]
    if tax.overlapping_requests:
        lines.append(f"{tax.overlapping_requests:,} requests made lookups at a time, and wait less than shown here.")
    return lines
