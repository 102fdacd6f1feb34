"""Accelerators and links: what planning takes for given, each figure with where it comes from.

The table is `data/gpus.json`. Memory is what the device reports, not what its name says: an "80 GB" H100 has 80 GiB.
Prices are defaults with a date. Everything can be replaced with `dataclasses.replace`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from thermocline.errors import SettingsError

TABLE = Path(__file__).with_name("data") / "gpus.json"
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "int4": 0.5}
"""Bytes per element, without the scales that blocks of four bits carry: see `SCALE_BYTES`."""
SCALE_BYTES = {"fp4": 1 / 16, "int4": 1 / 16}
"""More bytes per element for scales: one byte per 16 elements (NVFP4), two per 32 (GPTQ-like)."""
COMPUTED_AS = {"fp16": "bf16", "int4": "bf16", "int8": "fp8"}
"""The rate that a dtype is computed at; four-bit integers are only kept so, and computed in bf16."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per accelerator and hour, on demand.

    `typical` is the published median where there is one, else the border between specialty providers and hyperscalers.
    """

    low: float
    typical: float
    high: float
    source: str
    date: str

    def __str__(self) -> str:
        return f"${self.typical:.2f} per hour (${self.low:.2f} to {self.high:.2f}; {self.source}, {self.date})"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator: peak rates, links counted in one direction.

    `evidence` says whether the figures were read from a file ("config_read"), asked of the device ("measured"), given
    by the user ("given") or are "unverified".
    """

    name: str
    memory_bytes: int
    memory_bytes_per_second: float
    flops: Mapping[str, float] = field(default_factory=dict)
    pcie_bytes_per_second: float | None = None
    peer_bytes_per_second: float | None = None
    cpu_bytes_per_second: float | None = None
    price: Price | None = None
    evidence: str = "given"
    source: str = "given"
    note: str = ""

    def flops_for(self, dtype: str) -> float:
        """Dense operations per second. What the device has no units for is computed in bf16, at that rate."""
        rate = self.flops.get(COMPUTED_AS.get(dtype, dtype)) or self.flops.get("bf16")
        if rate is None:
            raise SettingsError(
                f"{self.name} has no known compute rate", hint="name another accelerator, or give its bf16 flops"
            )
        return rate

    @property
    def ridge_flops_per_byte(self) -> float:
        """Operations per byte of memory traffic at which compute and memory take as long: compute / bandwidth, bf16."""
        return self.flops_for("bf16") / self.memory_bytes_per_second

    @property
    def host_bytes_per_second(self) -> float | None:
        """The faster of its ways to the host's memory."""
        ways = [way for way in (self.cpu_bytes_per_second, self.pcie_bytes_per_second) if way]
        return max(ways) if ways else None


def element_bytes(dtype: str) -> float:
    """Bytes of one weight, its share of scales included. Raises SettingsError for a dtype that is not known."""
    try:
        return DTYPE_BYTES[dtype] + SCALE_BYTES.get(dtype, 0.0)
    except KeyError:
        raise SettingsError(f"no dtype {dtype}", hint=f"one of {', '.join(DTYPE_BYTES)}") from None


@functools.cache
def accelerators() -> Mapping[str, Accelerator]:
    """All of the table, by name."""
    entries = msgspec.json.decode(TABLE.read_bytes())["accelerators"]
    return {name: msgspec.convert({"name": name, **entry}, Accelerator) for name, entry in entries.items()}


def accelerator(name: str) -> Accelerator:
    """By name, in any case and with "-" or "_"; the front of a name will do: "H100" is the SXM one.

    Raises SettingsError for what the table does not have.
    """
    table = {_plain(known): each for known, each in accelerators().items()}
    wanted = _plain(name)
    fits = [known for known in table if known == wanted] or sorted(
        (known for known in table if wanted and known.startswith(wanted)), key=_preference
    )
    if fits:
        return table[fits[0]]
    near = difflib.get_close_matches(wanted, table, n=3, cutoff=0.4)
    meant = f"did you mean {', '.join(table[each].name for each in near)}?"
    hint = meant if near else f"it has {', '.join(accelerators())}"
    raise SettingsError(f"no accelerator {name} in the table", hint=hint)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").removeprefix("amd-")


def _preference(name: str) -> tuple[bool, bool, str]:
    return "pcie" in name, "80" not in name, name
