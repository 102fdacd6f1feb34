"""Where a gateway sent a request, and why: the candidates, what was predicted, what came of it, and the regret."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

import msgspec
from msgspec import Struct

from thermocline.errors import UnreachableError

TIMEOUT_SECONDS = 5.0
BODY_BYTES_MAX = 64 << 20
_WHY = {
    "POLICY": "the policy asks for no costs",
    "NOTHING_HELD": "no instance holds any of it, and this one is the least loaded",
    "LONGEST_MATCH": "it holds the most, and is the quickest",
    "SPILLED": "another one holds more, but its queue costs more than computing again",
    "SHARED_EQUALLY": "others hold as much, and this one is the least loaded",
    "SESSION": "it served this session a moment ago",
    "LOAD_REGIME": "what is held is gone before it is used again, so load decides",
    "LOADED": "it loads from a colder tier, which is quicker than computing",
    "FETCHED": "another node's copy is quicker than computing",
}


class Candidate(Struct, frozen=True):
    """One instance that could have been chosen, and the parts of its predicted time to the first token."""

    instance: int
    seconds: float
    queue_seconds: float
    transfer_seconds: float
    recompute_seconds: float
    interference_seconds: float
    cached_tokens: int
    tier: str
    reasons: tuple[str, ...] = ()


class Try(Struct, frozen=True):
    """One instance that was asked."""

    instance: str
    predicted_seconds: float
    cached_tokens: int
    choices: tuple[Candidate, ...]
    trouble: str | None
    first_byte_seconds: float | None


class Used(Struct, frozen=True):
    """What the instance said it used."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class Decided(Struct, frozen=True):
    """One request, as a gateway remembers it."""

    request: str
    status: int
    seconds: float
    usage: Used | None
    tries: tuple[Try, ...]
    error: float | None = None
    regret_seconds: float | None = None


def fetch(admin: Path, request_id: str) -> bytes:
    """The record of a request as JSON; `last` names the newest. Raises UnreachableError where there is none."""
    status, body = ask(admin, f"/decisions/{quote(request_id, safe='')}")
    if status != HTTPStatus.OK:
        hint = "the header x-thermocline-request names it; old ones are forgotten"
        raise UnreachableError(f"the gateway knows nothing of the request {request_id}", hint=hint)
    return body


def ask(admin: Path, path: str) -> tuple[int, bytes]:
    """What a gateway's admin socket answers: status and body. Raises UnreachableError where nobody does."""
    link = http.client.HTTPConnection("gateway", timeout=TIMEOUT_SECONDS)
    link.sock = socket.socket(socket.AF_UNIX)
    link.sock.settimeout(TIMEOUT_SECONDS)
    try:
        link.sock.connect(str(admin))
        link.request("GET", path)
        reply = link.getresponse()
        return reply.status, reply.read(BODY_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        hint = "`thermocline ps` prints the paths of those that run, and `thermocline route` starts one"
        raise UnreachableError(f"no gateway answers at {admin}: {error}", hint=hint) from None
    finally:
        link.close()


def trace(admin: Path) -> bytes:
    """A gateway's last requests in lines of JSON: those whose tokens it knew. Raises UnreachableError."""
    status, body = ask(admin, "/trace")
    if status != HTTPStatus.OK:
        raise UnreachableError(f"the gateway at {admin} tells no trace", hint="is it a gateway of this version?")
    return body


def read(body: bytes) -> Decided:
    """A record from the JSON that a gateway sends. Raises UnreachableError if it is something else."""
    try:
        return msgspec.json.decode(body, type=Decided)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "is it a gateway of this version?"
        raise UnreachableError(f"the gateway's answer is no decision: {error}", hint=hint) from None


def render(found: Decided) -> str:
    """In words and a table for each try."""
    lines = [f"request {found.request}: status {found.status} after {_time(found.seconds)}"]
    for number, each in enumerate(found.tries, 1):
        lines += ["", f"try {number}: {each.instance}{_came(each)}", *_candidates(each.choices)]
    if found.tries and found.tries[-1].trouble is None:
        lines += ["", *_outcome(found)]
    return "\n".join(lines)


def _came(one: Try) -> str:
    predicted = f", predicted {_time(one.predicted_seconds)}"
    if one.trouble is not None:
        return f"{predicted}, failed: {one.trouble}"
    return predicted if one.first_byte_seconds is None else f"{predicted}, came after {_time(one.first_byte_seconds)}"


def _candidates(choices: Sequence[Candidate]) -> list[str]:
    if not choices:
        return ["  no candidates: the decision came too late, so it went to the least busy instance"]
    lines = [
        f"  {'slot':>4}  {'total':>8}  {'queue':>8}  {'load':>8}  {'compute':>8}  {'others':>8}  {'held':>7}  tier"
    ]
    for choice in choices:
        parts = (choice.queue_seconds, choice.transfer_seconds, choice.recompute_seconds, choice.interference_seconds)
        times = "  ".join(f"{_time(seconds):>8}" for seconds in (choice.seconds, *parts))
        lines.append(f"  {choice.instance:>4}  {times}  {choice.cached_tokens:>7,}  {choice.tier}")
    told = "; ".join(_WHY.get(reason, reason) for reason in choices[0].reasons)
    return [*lines, f"  the first: {told}" if told else ""]


def _outcome(found: Decided) -> list[str]:
    last, lines = found.tries[-1], []
    if found.usage is not None and found.usage.cached_tokens is not None:
        asked = f" of {found.usage.prompt_tokens:,}" if found.usage.prompt_tokens is not None else ""
        lines.append(f"found cached: {found.usage.cached_tokens:,}{asked} tokens (predicted {last.cached_tokens:,})")
    if found.error is not None:
        lines.append(f"the first token was predicted {100 * found.error:.0f} % off")
    if found.regret_seconds is not None:
        seconds = found.regret_seconds
        lines.append(
            f"regret: {_time(seconds)}, over the best other candidate's prediction" if seconds else "regret: none"
        )
    return lines


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
