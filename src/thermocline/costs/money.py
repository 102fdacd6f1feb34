"""What requests cost on accelerators that are paid by the hour, and how many of them are needed.

    request     = prefill of what is not cached + load of what is + output tokens * decode step / batch
    dollars     = that * price of an instance per second
    wasted      = 1 - (requests with reuse) / (requests without): the share of a bill that computes what was known

A hit saves prefill only: output is never cached, so a hit rate of 85 % is no saving of 85 %. Utilisation is below one,
since an instance that is always busy has an endless queue: how far below, the time to the first token decides.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from thermocline.costs.queueing import waiting_seconds

HOURS_PER_MONTH, NODE_ACCELERATORS = 730.0, 8
Floats = NDArray[np.float64]
LATE = 0.1
"""The share of first tokens that may be later than the target."""
INSTANCES_MAX = 100_000


class Price(msgspec.Struct, frozen=True):
    """US dollars per accelerator and hour, and where that is from."""

    usd_per_hour: float
    source: str


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests per second to the whole fleet, Poisson; or `at`, the very seconds at which each request came."""

    per_second: float
    at: Floats | None = None


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve the workload. Seconds are those of one instance, per request: the mean.

    `instances` are the fewest that keep up, and keep `first_token_late_seconds` (exceeded by one first token in ten)
    within the target if there is one; None: no number does, or it is not known how many requests come. What the room of
    tiers costs is in `usd_per_month`, and in nothing else.
    """

    name: str
    hit: float
    prefill_seconds: float
    load_seconds: float
    decode_seconds: float
    usd_per_million_prompt_tokens: float | None
    usd_per_million_output_tokens: float | None
    usd_per_thousand_requests: float | None
    instances: int | None = None
    accelerators: int | None = None
    tiers_usd_per_month: float | None = None
    utilisation: float | None = None
    waiting_seconds: float | None = None
    first_token_late_seconds: float | None = None
    usd_per_month: float | None = None
    how: str = ""

    @property
    def seconds(self) -> float:
        """All that a request takes of an instance."""
        return self.prefill_seconds + self.load_seconds + self.decode_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is served: mean tokens, arrivals (None: not known), the target, and an instance's accelerators and price.

    An instance of several pipeline `stages` works on as many requests at once.
    """

    prompt_tokens: float
    output_tokens: float
    decode_seconds: float
    accelerators: int
    stages: int = 1
    price: Price | None = None
    arrivals: Arrivals | None = None
    target_seconds: float | None = None


def bill(name: str, demand: Demand, prefills: Floats, loads: Floats, hit: float) -> Bill:
    """The bill of requests that take so many seconds each, for prefill and for loading. Pure.

    Where the demand has the seconds at which requests came, these are the same requests, in that order.
    """
    prefill, load = float(prefills.mean()), float(loads.mean())
    found = Bill(
        name=name,
        hit=hit,
        prefill_seconds=prefill,
        load_seconds=load,
        decode_seconds=demand.decode_seconds,
        usd_per_million_prompt_tokens=_dollars(demand, 1e6 * (prefill + load) / max(1.0, demand.prompt_tokens)),
        usd_per_million_output_tokens=_dollars(demand, 1e6 * demand.decode_seconds / max(1.0, demand.output_tokens)),
        usd_per_thousand_requests=_dollars(demand, 1e3 * (prefill + load + demand.decode_seconds)),
    )
    return found if demand.arrivals is None else _served(found, demand, demand.arrivals, prefills + loads)


def _dollars(demand: Demand, seconds: float) -> float | None:
    """Of so many seconds of one stage."""
    hourly = None if demand.price is None else demand.price.usd_per_hour * demand.accelerators / demand.stages
    return None if hourly is None else hourly * seconds / 3600


def _served(found: Bill, demand: Demand, arrivals: Arrivals, firsts: Floats) -> Bill:
    """With as many instances as it takes. `firsts` are the seconds to each first token, without waiting."""
    low, high = max(0, math.floor(arrivals.per_second * found.seconds / demand.stages)), INSTANCES_MAX
    late = _late(arrivals, demand, firsts, high)[1]
    if late is None or (demand.target_seconds is not None and late > demand.target_seconds):
        return msgspec.structs.replace(found, how="not with any number of instances")
    while high - low > 1:
        middle = (low + high) // 2
        late = _late(arrivals, demand, firsts, middle)[1]
        enough = late is not None and (demand.target_seconds is None or late <= demand.target_seconds)
        low, high = (low, middle) if enough else (middle, high)
    waiting, late = _late(arrivals, demand, firsts, high)
    servers = high * demand.stages
    rho = arrivals.per_second * found.seconds / servers
    price = demand.price
    return msgspec.structs.replace(
        found,
        instances=high,
        accelerators=high * demand.accelerators,
        utilisation=rho,
        waiting_seconds=waiting,
        first_token_late_seconds=late,
        usd_per_month=price and high * demand.accelerators * price.usd_per_hour * HOURS_PER_MONTH,
        how=f"{arrivals.per_second:.4g} requests/s x {found.seconds:.4g} s / {servers} at once = {rho:.2f} busy",
    )


def _late(arrivals: Arrivals, demand: Demand, firsts: Floats, instances: int) -> tuple[float | None, float | None]:
    """Mean wait, and the time to the first token that one in ten exceeds; None where the queue grows without end.

    Known arrivals are replayed, in order, to whichever instance is free. Of others, those who wait at all wait an
    exponential time (Kingman, 1962, for heavy traffic) with the mean of `queueing.py`, on top of their own prefill.
    """
    service, servers = firsts + demand.decode_seconds, instances * demand.stages
    found = waiting_seconds(arrivals.per_second, float(service.mean()), float(service.var()), servers=servers)
    if found.seconds is None:
        return None, None
    if arrivals.at is not None:
        waited = _replayed(arrivals.at, service, servers)
        return float(waited.mean()), float(np.quantile(waited + firsts, 1 - LATE))
    waits = min(1.0, found.utilisation ** (math.sqrt(2 * (servers + 1)) - 1))
    scale = found.seconds / waits if waits > 0 else 0.0

    def exceeded(seconds: float) -> float:
        if scale <= 0:
            return float((firsts > seconds).mean())
        over = np.minimum(0.0, (firsts - seconds) / scale)
        return float(np.where(firsts > seconds, 1.0, waits * np.exp(over)).mean())

    low, high = 0.0, float(firsts.max()) + 60 * scale + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if exceeded(middle) <= LATE else (middle, high)
    return found.seconds, high


def _replayed(at: Floats, service: Floats, servers: int) -> Floats:
    """How long each request waits for the first of the servers that is free."""
    free = [0.0] * min(servers, len(at))
    waited = []
    for now, seconds in zip(at.tolist(), service.tolist(), strict=True):
        start = max(free[0], now)
        heapq.heapreplace(free, start + seconds)
        waited.append(start - now)
    return np.array(waited)


def with_room(found: Bill, usd_per_hour: Callable[[int], float]) -> Bill:
    """The bill with the room of its tiers, which costs so much an hour for this number of instances."""
    if found.instances is None or found.usd_per_month is None:
        return found
    room = usd_per_hour(found.instances) * HOURS_PER_MONTH
    return msgspec.structs.replace(found, tiers_usd_per_month=room, usd_per_month=found.usd_per_month + room)


def wasted_share(without: Bill, with_reuse: Bill) -> float:
    """The share of the instances' time that computes what had been computed before; below 0 where reuse costs more."""
    return 1 - with_reuse.seconds / without.seconds if without.seconds else 0.0


def hours_per_node_month(share: float, accelerators: int = NODE_ACCELERATORS) -> float:
    """Accelerator-hours that such a share is, of a node that runs all month."""
    return share * accelerators * HOURS_PER_MONTH
