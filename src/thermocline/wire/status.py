"""What a node tells of itself: the JSON of its Report on Status."""

from __future__ import annotations

import msgspec


class TierStatus(msgspec.Struct, frozen=True):
    """What one tier holds."""

    name: str
    medium: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    loaded_blocks: int
    set_aside: bool


class ClientStatus(msgspec.Struct, frozen=True):
    """One client, as the node sees it."""

    role: str
    pid: int
    layouts: int
    leases: int
    lent_slots: int


class NodeStatus(msgspec.Struct, frozen=True):
    """What `thermocline ps` shows of a node. Of all `asked_blocks` each tier had `found_blocks`."""

    version: str
    pid: int
    socket: str
    uptime_seconds: float
    tiers: list[TierStatus]
    clients: list[ClientStatus]
    asked_blocks: int
    found_blocks: dict[str, int]
