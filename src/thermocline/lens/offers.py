"""Tiers that could be had, as people name them: `host=512GiB`, `disk=4TB@14GB/s:0.0001`, `redis@100gbe`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from thermocline.costs.hardware import Accelerator
from thermocline.costs.study import Offer
from thermocline.costs.transfer import LINKS, Link, host_link
from thermocline.errors import SettingsError
from thermocline.settings import Kind, Setting

_SIZE = Setting("size", Kind.SIZE, 1, "", 1, 1 << 60, 1)
TIERS = ("host", "disk", "redis")
SHARED = {"redis"}
_LINKS = {"disk": "nvme-gen4", "redis": "redis"}
_TIER = re.compile(r"(?P<tier>\w+)(?:=(?P<size>[^@:]+))?(?:@(?P<speed>[^:]+))?(?::(?P<price>\d+(?:\.\d+)?(?:e-\d+)?))?")
_TIER_HINT = "write NAME[=SIZE][@SPEED][:USD per GB and hour], such as host=512GiB or disk=4TB@14GB/s:0.0001; names: "


def named(texts: Sequence[str], local: Link | None, tp: int, usd_per_hour: float | None) -> tuple[Offer, ...]:
    """Tiers as --tier names them; `local` is one accelerator's link to host memory, where it is known.

    `usd_per_hour` is an accelerator's price, None where it is not known. Raises SettingsError for what is no tier, one
    without a known speed, two of a name, or a price of room where time has none.
    """
    offers = tuple(_offer(text, local, tp) for text in texts)
    if len({each.tier for each in offers}) < len(offers):
        raise SettingsError("a tier is named twice", hint="give each of host, disk and redis once")
    if usd_per_hour == 0 and any(each.usd_per_gb_hour for each in offers):
        raise SettingsError("no tier is worth money where time costs none", hint="give a --price above 0")
    return offers


def offered(texts: Sequence[str], accelerator: Accelerator, tp: int, usd_per_hour: float | None) -> tuple[Offer, ...]:
    """The same for an accelerator, whose link to host memory is known or not. Raises as `named`."""
    return named(texts, host_link(accelerator) if accelerator.host_bytes_per_second else None, tp, usd_per_hour)


def _offer(text: str, local: Link | None, tp: int) -> Offer:
    """A tier as --tier names it. Every accelerator has its own link to host memory; the others share one."""
    parts = _TIER.fullmatch(text.strip())
    tier = parts["tier"] if parts else ""
    if parts is None or tier not in TIERS:
        raise SettingsError(f"{text} is no tier", hint=_TIER_HINT + ", ".join(TIERS))
    if tier == "host" and local is None and not parts["speed"]:
        raise SettingsError("how fast the host's memory is read is not known", hint="name the GPU, or host@SPEED")
    usual = LINKS[_LINKS[tier]] if tier in _LINKS else local or LINKS["nvme-gen4"]
    link = replace(usual, bytes_per_second=usual.bytes_per_second * tp) if tier == "host" else usual
    if parts["speed"] in LINKS:
        link = LINKS[parts["speed"]]
    elif parts["speed"]:
        speed = _bytes(parts["speed"].removesuffix("/s"), text)
        link = replace(usual, name=tier, bytes_per_second=float(speed), evidence="given", source="--tier")
    size = _bytes(parts["size"], text) if parts["size"] else None
    return Offer(tier, link, size, float(parts["price"] or 0), shared=tier in SHARED)


def _bytes(text: str, whole: str) -> int:
    try:
        return int(str(_SIZE.parse(text)))
    except ValueError as error:
        raise SettingsError(f"--tier {whole}: {text} {error}", hint=_TIER_HINT + ", ".join(TIERS)) from None
