"""What it takes to load KV instead of computing it: links, break-even bandwidth, and the prefix length that pays.

Loading k tokens of a prompt pays where

    latency + bytes(k) / bandwidth  <  prefill(k + tail, 0) - prefill(tail, k)

with `tail` the tokens that are computed either way. Per token, for long prefixes: bandwidth > bytes per token /
marginal prefill seconds per token. Bandwidths are what one reader gets; measured ones should replace them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thermocline.costs.hardware import Accelerator
from thermocline.costs.roofline import Estimate, Part, Prefill
from thermocline.errors import SettingsError

TAIL_TOKENS, STEP_TOKENS = 128, 128
BytesOf = Callable[[int], int]
"""Bytes that a prefix of so many tokens is stored in."""


@dataclass(frozen=True, slots=True)
class Link:
    """A way from a tier to an accelerator: bytes per second for one reader, and a delay before the first byte."""

    name: str
    medium: str
    bytes_per_second: float
    latency_seconds: float
    evidence: str
    source: str


@dataclass(frozen=True, slots=True)
class Pays:
    """From which prefix length loading over a link is quicker than computing. None: not up to `asked_tokens`."""

    link: Link
    from_tokens: int | None
    asked_tokens: int
    load_seconds: float
    compute_seconds: float


_LINE = "line rate; what one reader gets is less, and has to be measured"
LINKS = {
    link.name: link
    for link in (
        Link("nvme-gen4", "disk", 7e9, 100e-6, "unverified", "vendor figures of one Gen4 x4 drive"),
        Link("nvme-gen5", "disk", 14e9, 100e-6, "unverified", "vendor figures of one Gen5 x4 drive"),
        Link("25gbe", "remote", 25e9 / 8, 50e-6, "unverified", _LINE),
        Link("100gbe", "remote", 100e9 / 8, 50e-6, "unverified", _LINE),
        Link("400gbe", "remote", 400e9 / 8, 50e-6, "unverified", _LINE),
        Link("redis", "remote", 1e9, 500e-6, "measured", "one core of a Redis server; `bench redis-tier`"),
    )
}


def host_link(accelerator: Accelerator) -> Link:
    """The accelerator's way to the host's memory. Raises SettingsError where none is known."""
    speed = accelerator.host_bytes_per_second
    if speed is None:
        raise SettingsError(
            f"how fast {accelerator.name} reads the host's memory is not known", hint="give its PCIe bandwidth"
        )
    return Link("host", "host", speed, 20e-6, accelerator.evidence, f"peak of its link, {accelerator.source}")


def transfer_seconds(link: Link, nbytes: int) -> Estimate:
    """Seconds to move `nbytes` over a link that carries nothing else."""
    moving = nbytes / link.bytes_per_second
    parts = (
        Part("first byte", link.latency_seconds, link.name),
        Part("bytes", moving, f"{nbytes:.4g} B / ({link.bytes_per_second:.4g} B/s)"),
    )
    return Estimate(link.latency_seconds + moving, parts, (f"{link.name}: {link.evidence}, {link.source}",))


def breakeven_bytes_per_second(bytes_of: BytesOf, prefill: Prefill, position: int, span: int = 1024) -> float:
    """The bandwidth above which loading the `span` tokens behind `position` beats computing them."""
    seconds = prefill(span, position)
    return (bytes_of(position + span) - bytes_of(position)) / seconds


def pays_from(link: Link, bytes_of: BytesOf, prefill: Prefill, tokens_max: int, tail: int = TAIL_TOKENS) -> Pays:
    """From which prefix length this link pays, for it and all longer ones up to `tokens_max`."""

    def loaded(tokens: int) -> float:
        return transfer_seconds(link, bytes_of(tokens)).seconds

    def computed(tokens: int) -> float:
        return prefill(tokens + tail, 0) - prefill(tail, tokens)

    lengths = range(STEP_TOKENS, tokens_max + 1, STEP_TOKENS)
    shortest = None
    for tokens in reversed(lengths):
        if loaded(tokens) >= computed(tokens):
            break
        shortest = tokens
    seconds = loaded(tokens_max), computed(tokens_max)
    return Pays(link, shortest, tokens_max, *seconds)
