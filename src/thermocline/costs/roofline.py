"""How long a model computes on a machine: one pass over a batch, from which prefill and decode follow.

    pass      = linear + attention + communication + overhead
    linear    = max(2 * active parameters * tokens / (flops * mfu), weights read / (bandwidth * mbu))
    attention = max(4 * query elements * pairs / (flops * attention mfu), KV read / (bandwidth * mbu))

`pairs` are the (new token, earlier token) pairs of the layers that attend, within their windows. It is the roofline
model (Williams, Waterman and Patterson, 2009) with measured shares of both peaks. A batch of a mixture of experts reads
the experts that its tokens are expected to choose: 1 - (1 - k/E)^tokens of them. Tensor parallelism adds two
all-reduces per layer. Times are of the accelerators only, in one pass: what users see of a loaded server is in
`served.py`, what waits in `queueing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from thermocline.costs.geometry import Attention, Geometry
from thermocline.costs.hardware import Accelerator, element_bytes
from thermocline.costs.memory import sequence_bytes
from thermocline.errors import ModelError

Prefill = Callable[[int, int], float]
"""Seconds to compute so many tokens behind so many known ones: `Costs.recompute`, `Measured.prefill_seconds`, or
`prefill_of` below where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Part:
    """One term of an estimate. `how` is its formula, filled in."""

    name: str
    seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, the terms that add up to them, and what was assumed."""

    seconds: float
    parts: tuple[Part, ...]
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that engines reach, and what every pass takes whatever its size."""

    mfu: float
    """Of the dense compute rate, in the products of weights and many tokens."""
    attention_mfu: float
    mbu: float
    """Of the memory bandwidth."""
    link: float
    """Of the link between the accelerators, in an all-reduce of a large buffer."""
    hop_seconds: float
    """What an all-reduce of a small buffer takes."""
    layer_seconds: float
    """What a layer takes beside its bytes and operations."""
    pass_seconds: float
    """What a pass takes beside its layers: the engine's scheduling and sampling."""
    source: str


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on a machine: how it is split, what it is kept in, how well it runs. `efficiency` None: the table's."""

    geometry: Geometry
    accelerator: Accelerator
    tp: int = 1
    weights_dtype: str = "bf16"
    kv_dtype: str = ""
    efficiency: Efficiency | None = None
    dp: int = 1
    """Groups of `tp` ranks, each with its own sequences; weights are taken to be split over all of them."""
    ep: int = 1
    """Ranks that experts are spread over, each whole on one. Only calibrations tell a difference."""

    @property
    def running(self) -> Efficiency:
        """How well it runs."""
        return self.efficiency or efficiency_of(self.accelerator)

    @property
    def ranks(self) -> int:
        """Accelerators."""
        return self.tp * self.dp


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass computes: in each of `sequences` sequences `tokens` new tokens behind `cached` known ones."""

    sequences: int
    tokens: int
    cached: int

    @property
    def all_tokens(self) -> int:
        """New tokens of all sequences."""
        return self.sequences * self.tokens


EXPERTS: Mapping[str, tuple[int, int]] = msgspec.json.decode(
    Path(__file__).with_name("data").joinpath("experts.json").read_bytes(), type=dict[str, tuple[int, int]]
)
"""Routed experts of a layer, and how many of them a token uses; read from the models' published `config.json`."""

_SEED_SOURCE = "aiconfigurator 0.12.0, its measured kernels (vLLM, bf16); a seed, to be measured"
SEEDS = {
    "A100": Efficiency(0.88, 0.61, 0.73, 0.60, 5e-6, 0.0, 0.0, _SEED_SOURCE),
    "H100": Efficiency(0.75, 0.61, 0.81, 0.60, 5e-6, 0.0, 0.0, _SEED_SOURCE),
    "H200": Efficiency(0.75, 0.64, 0.75, 0.60, 5e-6, 0.0, 0.0, _SEED_SOURCE),
    "B200": Efficiency(0.62, 0.50, 0.75, 0.60, 5e-6, 0.0, 0.0, _SEED_SOURCE),
}
ASSUMED = Efficiency(0.60, 0.50, 0.75, 0.60, 5e-6, 0.0, 0.0, "assumed: nothing measured is known of this accelerator")


def efficiency_of(accelerator: Accelerator) -> Efficiency:
    """What the table has for this accelerator, or a cautious assumption that says so."""
    return SEEDS.get(accelerator.name.partition("-")[0], ASSUMED)


def pass_seconds(setup: Setup, work: Work) -> Estimate:
    """One pass of one batch. Raises ModelError where the model's parameters are not known."""
    parts = (_linear(setup, work), _attention(setup, work), *_communication(setup, work), _overhead(setup))
    shown = tuple(part for part in parts if part.seconds > 0)
    return Estimate(math.fsum(part.seconds for part in shown), shown, _assumed(setup))


def _assumed(setup: Setup) -> tuple[str, ...]:
    geometry, accelerator = setup.geometry, setup.accelerator
    said = [
        f"{accelerator.name}: peaks {accelerator.evidence} ({accelerator.source})",
        f"shares of the peaks: {setup.running.source}",
        f"{geometry.name}: {geometry.source}",
    ]
    if geometry.parameters_active is None:
        said.append("how many parameters a token uses is not known: all of them are taken")
    if any(each.index_bytes for each in geometry.attention):
        said.append("sparse attention is taken for full: long prompts take less than this")
    return tuple(said)


def _parameters(geometry: Geometry) -> tuple[int, int]:
    total = geometry.parameters_total
    if total is None:
        raise ModelError(
            f"the number of parameters of {geometry.name} is not known, and its times follow from it",
            hint="name a folder with the checkpoint, or a model of the table that has it",
        )
    return total, geometry.parameters_active or total


def weights_read(geometry: Geometry, tokens: int) -> float:
    """Parameters that a pass over so many tokens is expected to read: of a mixture of experts, those chosen.

    Tokens are taken to choose independently; where the number of experts is not known, each is taken to be as large
    as what one token uses.
    """
    total, active = _parameters(geometry)
    experts, chosen = EXPERTS.get(geometry.name, (0, 0))
    share = chosen / experts if experts else active / total
    if share >= 1 or active >= total:
        return total
    routed = (total - active) / (1 - share)
    return total - routed * (1 - share) ** tokens


def _linear(setup: Setup, work: Work) -> Part:
    _, active = _parameters(setup.geometry)
    accelerator, running, dtype = setup.accelerator, setup.running, setup.weights_dtype
    flops, rate = 2.0 * active * work.all_tokens, accelerator.flops_for(dtype) * running.mfu * setup.ranks
    nbytes = weights_read(setup.geometry, work.all_tokens) * element_bytes(dtype)
    speed = accelerator.memory_bytes_per_second * running.mbu * setup.ranks
    return _slower("weights", flops, rate, nbytes, speed)


def _slower(name: str, flops: float, rate: float, nbytes: float, speed: float) -> Part:
    """The side of the roof that a part is under."""
    if flops / rate >= nbytes / speed:
        return Part(f"{name}, computed", flops / rate, f"{flops:.4g} flops / ({rate:.4g} flops/s)")
    return Part(f"{name}, read", nbytes / speed, f"{nbytes:.4g} B / ({speed:.4g} B/s)")


def _attention(setup: Setup, work: Work) -> Part:
    geometry, accelerator, running = setup.geometry, setup.accelerator, setup.running
    sequences = -(-work.sequences // setup.dp)
    flops = sequences * sum(
        4.0 * each.layers * _query_elements(geometry, each, work) * _pairs(each, work) for each in geometry.attention
    )
    rate = accelerator.flops_for("bf16") * running.attention_mfu * setup.tp
    nbytes = sequences * sequence_bytes(geometry, work.cached + work.tokens, setup.kv_dtype, tp=setup.tp)
    speed = accelerator.memory_bytes_per_second * running.mbu
    return _slower("attention", flops, rate, nbytes, speed)


def _query_elements(geometry: Geometry, attention: Attention, work: Work) -> int:
    absorbed = attention.latent_elements if work.tokens == 1 else 0
    return geometry.query_heads * (absorbed or geometry.query_head_dim)


def _pairs(attention: Attention, work: Work) -> float:
    """(new, earlier) pairs of one sequence and layer: each token attends to itself and all before it in its window."""
    first, last = work.cached + 1, work.cached + work.tokens
    window = attention.window_tokens
    if window is None or last <= window:
        return (first + last) * work.tokens / 2
    inside = max(0, window - work.cached)
    beyond = (work.tokens - inside) * (window / 2 if attention.chunked else window)
    return inside * (first + window) / 2 + beyond


def _communication(setup: Setup, work: Work) -> tuple[Part, ...]:
    """Two ring all-reduces per layer: each of n ranks sends 2 (n - 1) / n of the buffer."""
    if setup.ranks == 1:
        return ()
    accelerator, running = setup.accelerator, setup.running
    speed = (accelerator.peer_bytes_per_second or accelerator.pcie_bytes_per_second or math.inf) * running.link
    buffer = work.all_tokens * setup.geometry.hidden_size * 2
    each = 2 * (setup.ranks - 1) / setup.ranks * buffer / speed + running.hop_seconds
    count = 2 * setup.geometry.layers
    return (Part("all-reduces", count * each, f"{count} x {buffer:.4g} B over {setup.ranks} ranks at {speed:.4g} B/s"),)


def _overhead(setup: Setup) -> Part:
    running, layers = setup.running, setup.geometry.layers
    seconds = running.pass_seconds + layers * running.layer_seconds
    return Part("per pass", seconds, f"{running.pass_seconds:g} s + {layers} layers x {running.layer_seconds:g} s")


def prefill_seconds(
    geometry: Geometry,
    accelerator: Accelerator,
    tokens: int,
    cached: int = 0,
    *,
    tp: int = 1,
    weights_dtype: str = "bf16",
    kv_dtype: str = "",
    efficiency: Efficiency | None = None,
) -> Estimate:
    """Seconds to compute `tokens` new tokens behind `cached` known ones, alone."""
    setup = Setup(geometry, accelerator, tp, weights_dtype, kv_dtype, efficiency)
    return pass_seconds(setup, Work(1, tokens, cached))


def decode_step_seconds(
    geometry: Geometry,
    accelerator: Accelerator,
    batch: int,
    context_tokens: int,
    *,
    tp: int = 1,
    weights_dtype: str = "bf16",
    kv_dtype: str = "",
    efficiency: Efficiency | None = None,
) -> Estimate:
    """Seconds of one step that gives each of `batch` sequences its next token, behind `context_tokens` each."""
    setup = Setup(geometry, accelerator, tp, weights_dtype, kv_dtype, efficiency)
    return pass_seconds(setup, Work(batch, 1, context_tokens))


def prefill_of(setup: Setup) -> Prefill:
    """Prefills of a setup as a function, where nothing was measured."""
    return lambda tokens, cached: pass_seconds(setup, Work(1, tokens, cached)).seconds if tokens > 0 else 0.0
