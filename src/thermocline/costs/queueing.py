"""How long a request waits before it is computed. A first token without this term is right on an idle server only.

Open traffic (users come whatever the server does), G/G/m, the Allen-Cunneen approximation with Sakasegawa's exponent:

    waiting = (ca^2 + cs^2) / 2 * rho^(sqrt(2 (m + 1)) - 1) / (m (1 - rho)) * service  +  step / 2

With one server that is Kingman's formula; with Poisson arrivals it is Pollaczek and Khinchine's, and exact. `ca` is the
coefficient of variation of the times between arrivals (1: Poisson; 3: the conversation trace of Mooncake), `cs` that of
the service. An engine that batches computes all that wait in one pass: what a pass takes whatever its size
(`shared_seconds`) is then paid once for 1 + rate * waiting of them, which is solved for. It finishes the step it is
in first: half of one, on average. Closed traffic (a fixed number of users) is in `served.py`.

Sources: Kingman 1961; Sakasegawa 1977; Allen, "Probability, Statistics and Queueing Theory", 1990.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROUNDS = 128


@dataclass(frozen=True, slots=True)
class Waiting:
    """Mean seconds of waiting, or None where there is no such mean: `utilisation` of 1 or more never catches up."""

    seconds: float | None
    utilisation: float
    how: str
    assumptions: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """True where more comes than can be served: no time to a first token may be told."""
        return self.seconds is None


def waiting_seconds(
    arrivals_per_second: float,
    service_seconds: float,
    service_variance: float = 0.0,
    arrival_cv: float = 1.0,
    *,
    servers: int = 1,
    shared_seconds: float = 0.0,
    step_seconds: float = 0.0,
) -> Waiting:
    """Open traffic before `servers` that take `service_seconds` each (variance in seconds squared).

    Of these, `shared_seconds` are paid once by all that are computed together.
    """
    least = arrivals_per_second * (service_seconds - shared_seconds) / servers
    if least >= 1:
        how = f"{arrivals_per_second:g}/s x {service_seconds:.4g} s / {servers} = {least:.2f}: it never catches up"
        return Waiting(None, least, how, ())
    squared = service_variance / service_seconds**2 if service_seconds > 0 else 0.0

    def waited(guess: float) -> tuple[float, float]:
        """The wait, and the utilisation, where as many are computed together as come during `guess`."""
        together = 1 + arrivals_per_second * guess / servers
        service = service_seconds - shared_seconds * (1 - 1 / together)
        rho = min(arrivals_per_second * service / servers, 1 - 1e-6)  # it falls as more come
        crowd = rho ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - rho))
        return (arrival_cv**2 + squared) / 2 * crowd * service, rho

    low, (queue, rho) = 0.0, waited(0.0)
    for _ in range(ROUNDS if shared_seconds else 0):  # the longer the guess, the shorter the wait: they meet once
        middle = (low + queue) / 2
        low, queue = (middle, queue) if waited(middle)[0] > middle else (low, middle)
    rho = waited(queue)[1] if shared_seconds else rho
    spread = f"({arrival_cv:g}^2 + {math.sqrt(squared):.2g}^2) / 2"
    how = f"{spread} at {rho:.0%} of {servers} x {service_seconds:.4g} s, and half a step of {step_seconds:.3g} s"
    assumptions = (
        "Allen-Cunneen: arrivals independent of each other and of the service; requests in order of arrival",
        f"times between arrivals vary by {arrival_cv:g} times their mean",
    )
    return Waiting(queue + step_seconds / 2, rho, how, assumptions)
