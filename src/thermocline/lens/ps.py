"""What runs on this host: nodes, their tiers, and who is connected; gateways, and what their instances hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path

import msgspec

from thermocline.errors import NodeError, ThermoclineError, UnreachableError
from thermocline.lens import decision
from thermocline.lens.report import BAR
from thermocline.wire.status import ClientStatus, NodeStatus, TierStatus

COMMAND = "command"
"""The role of whoever asks: it is not shown."""

OK = HTTPStatus.OK
BAR_WIDTH = 20
STEP = 1024
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


class Silent(msgspec.Struct, frozen=True):
    """A socket at which no node answers, and what happened instead."""

    socket: str
    reason: str


class Blocks(msgspec.Struct, frozen=True):
    """What a gateway knows an instance to hold."""

    device: int = 0
    host: int = 0
    disk: int = 0


class Routed(msgspec.Struct, frozen=True):
    """An instance, as its gateway sees it. `wiring` says whether its events can be believed."""

    name: str
    url: str
    state: str
    in_flight: int
    wiring: str = ""
    blocks: Blocks = Blocks()


class GatewayStatus(msgspec.Struct, frozen=True):
    """A gateway, by the socket where it is administered."""

    socket: str
    instances: tuple[Routed, ...]


class Seen(msgspec.Struct, frozen=True):
    """Whoever was asked: the nodes and gateways that answered, and the others."""

    nodes: tuple[NodeStatus, ...]
    silent: tuple[Silent, ...] = ()
    gateways: tuple[GatewayStatus, ...] = ()


def look(sockets: Sequence[Path], ask: Callable[[Path], NodeStatus], *, must_answer: bool = False) -> Seen:
    """Ask the node or gateway at each socket. Where none answers, this raises as `ask` does if all must answer.

    A socket's name says nothing: `ask` raises NodeError where something else than a node answers.
    """
    nodes: list[NodeStatus] = []
    silent: list[Silent] = []
    gateways: list[GatewayStatus] = []
    for socket in sockets:
        try:
            status = ask(socket)
        except ThermoclineError as error:
            found = gateway(socket) if isinstance(error, NodeError) else None
            if found is not None:
                gateways.append(found)
            elif must_answer:
                raise
            else:
                silent.append(Silent(str(socket), error.message))
            continue
        clients = [client for client in status.clients if client.role != COMMAND]
        nodes.append(msgspec.structs.replace(status, clients=clients))
    return Seen(tuple(nodes), tuple(silent), tuple(gateways))


def gateway(socket: Path) -> GatewayStatus | None:
    """The gateway that is administered there; None where it is something else."""
    try:
        status, body = decision.ask(socket, "/instances")
        return GatewayStatus(str(socket), msgspec.json.decode(body, type=tuple[Routed, ...])) if status == OK else None
    except (UnreachableError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def render(seen: Seen, *, bars: bool = False) -> str:
    """In words and tables. With `bars`, what is used of each tier has a bar beside it."""
    parts = [_node(node, bars=bars) for node in seen.nodes]
    parts += [_gateway(each) for each in seen.gateways]
    parts += [silent.reason for silent in seen.silent]
    if not parts:
        parts = ["no node of this user runs here\nhint: start one with `thermocline node`, or name its --socket"]
    return "\n".join(parts)


def _node(node: NodeStatus, *, bars: bool) -> str:
    lines = [
        f"node {node.socket}",
        f"  pid {node.pid}, up {_span(node.uptime_seconds)}, thermocline {node.version}",
        f"  {'tier':8} {'medium':8} {'blocks':>9} {'used':>10} {'of':>10} {'found':>9}",
        *(_tier(tier, node.found_blocks.get(tier.name, 0), bars=bars) for tier in node.tiers),
        f"  {'engine':28} {'pid':>8} {'layouts':>8} {'leases':>7} {'lent':>6}",
        *map(_client, node.clients),
    ]
    if not node.clients:
        lines.append("  none is connected")
    lines.append(f"so: {_conclude(node)}")
    return "\n".join(lines)


def _gateway(gateway: GatewayStatus) -> str:
    head = f"  {'instance':28} {'state':8} {'in flight':>9} {'device':>9} {'host':>9} {'disk':>9}  events"
    return "\n".join((f"gateway {gateway.socket}", head, *map(_routed, gateway.instances)))


def _routed(each: Routed) -> str:
    held = f"{each.blocks.device:>9,} {each.blocks.host:>9,} {each.blocks.disk:>9,}"
    return f"  {each.name[:28]:28} {each.state:8} {each.in_flight:>9,} {held}  {each.wiring or 'none'}"


def _tier(tier: TierStatus, found: int, *, bars: bool) -> str:
    share = tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0
    bar = "  " + BAR * max(1, round(BAR_WIDTH * share)) if bars and share else ""
    away = "  set aside after failures" if tier.set_aside else ""
    used, of = _size(tier.used_bytes), _size(tier.capacity_bytes)
    return f"  {tier.name:8} {tier.medium:8} {tier.blocks:>9,} {used:>10} {of:>10} {found:>9,}{away}{bar}"


def _client(client: ClientStatus) -> str:
    counts = f"{client.layouts:>8} {client.leases:>7} {client.lent_slots:>6}"
    role = client.role.removesuffix(f" {client.pid}")
    return f"  {role[:28]:28} {client.pid:>8} {counts}"


def _conclude(node: NodeStatus) -> str:
    if not node.asked_blocks:
        return "no engine has asked for a block yet"
    share = sum(node.found_blocks.values()) / node.asked_blocks
    text = f"{share:.0%} of {node.asked_blocks:,} blocks asked for were found"
    parts = [f"{count:,} in {tier}" for tier, count in node.found_blocks.items() if count]
    return f"{text}: {', '.join(parts)}" if parts else text


def _size(value: float) -> str:
    if value < STEP:
        return f"{value:.0f} B"
    power = min(int(math.log2(value) // 10), len(_UNITS))
    return f"{value / STEP**power:,.1f} {_UNITS[power - 1]}"


def _span(seconds: float) -> str:
    whole = int(seconds)
    for large, large_name, small, small_name in _SPANS:
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {large_name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"
