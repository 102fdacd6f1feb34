"""How long a request waits before it is computed. A first token without this term is right on an idle server only.

Open traffic (users come whatever the server does), G/G/m, the Allen-Cunneen approximation with Sakasegawa's exponent:

    waiting = (ca^2 + cs^2) / 2 * rho^(sqrt(2 (m + 1)) - 1) / (m (1 - rho)) * service

With one server that is Kingman's formula; with Poisson arrivals it is Pollaczek and Khinchine's, and exact. `ca` is the
coefficient of variation of the times between arrivals (1: Poisson, 3: bursts as in published traces), `cs` that of the
service. Batching helps in two ways and hurts in one: see `batched`.

Closed traffic (a fixed number of users, as a load test has it): mean value analysis (Reiser and Lavenberg, 1980) of one
queue, the prefills, and a delay, the decoding.

Sources: Kingman 1961; Allen, "Probability, Statistics and Queueing Theory", 1990; Sakasegawa 1977.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    step_seconds: float = 0.0,
) -> Waiting:
    """Open traffic before `servers` that take `service_seconds` each (variance in seconds squared).

    `step_seconds` is the length of the step that runs when a request comes: it waits for half of it.
    """
    rho = arrivals_per_second * service_seconds / servers
    if rho >= 1:
        how = f"{arrivals_per_second:g}/s x {service_seconds:.4g} s / {servers} = {rho:.2f}: it never catches up"
        return Waiting(None, rho, how, ())
    squared = service_variance / service_seconds**2 if service_seconds > 0 else 0.0
    variability = (arrival_cv**2 + squared) / 2
    crowd = rho ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - rho))
    seconds = variability * crowd * service_seconds + step_seconds / 2
    spread = f"({arrival_cv:g}^2 + {math.sqrt(squared):.2g}^2) / 2"
    how = f"{spread} x {crowd:.3g} x {service_seconds:.4g} s + {step_seconds:.3g} s / 2"
    assumptions = (
        "Allen-Cunneen: arrivals independent of each other and of the service; requests in order of arrival",
        f"times between arrivals vary by {arrival_cv:g} times their mean",
    )
    return Waiting(seconds, rho, how, assumptions)
