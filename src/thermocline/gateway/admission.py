"""Who may come in, and with what: API keys and their tenants, the front of a body, the budget of retries."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct

from thermocline.errors import RequestError, SettingsError
from thermocline.tokens.prompt import Front, front_of

_OPENING = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*(\})?")


# -- keys --------------------------------------------------------------------------------------------------------------


class _Declared(Struct, forbid_unknown_fields=True):
    """One entry of the keys file. `sha256` is the digest of a key that is random, such as `openssl rand -hex 32`."""

    tenant: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    salt: Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9._~+/=-]+$")] | None = None
    requests_max: Annotated[int, Meta(ge=1)] = 1 << 30
    operator: bool = False


class Tenant:
    """Who asks. All keys of one tenant share its salt and its requests in flight."""

    __slots__ = ("in_flight", "name", "operator", "requests_max", "salt")

    def __init__(self, name: str, salt: bytes, requests_max: int, *, operator: bool) -> None:
        self.name, self.salt, self.requests_max, self.operator = name, salt, requests_max, operator
        self.in_flight = 0


class Keys:
    """Tenants by their keys, of which only digests are known."""

    def __init__(self, declared: list[_Declared]) -> None:
        self._secret = secrets.token_bytes(32)
        self._tenants: dict[bytes, tuple[bytes, Tenant]] = {}
        known: dict[str, Tenant] = {}
        for each in declared:
            salt = (each.salt or f"tenant-{each.tenant}").encode()
            tenant = known.setdefault(each.tenant, Tenant(each.tenant, salt, each.requests_max, operator=each.operator))
            if (tenant.salt, tenant.requests_max, tenant.operator) != (salt, each.requests_max, each.operator):
                msg = f"the keys of tenant {each.tenant} differ in more than sha256"
                raise SettingsError(msg, hint="give all keys of a tenant the same salt, requests_max and operator")
            digest = bytes.fromhex(each.sha256)
            self._tenants[self._place(digest)] = (digest, tenant)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a TOML file: `[[keys]]` tables with tenant and sha256. Raises SettingsError."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
            declared = msgspec.convert(raw, dict[str, list[_Declared]])["keys"]
        except (OSError, ValueError, KeyError) as error:  # ValidationError, TOML and UTF-8 errors are ValueErrors
            msg = f"cannot read API keys from {path}: {error}"
            raise SettingsError(msg, hint='write [[keys]] tables with tenant = "..." and sha256 = "..."') from None
        return cls(declared)

    @classmethod
    def of_one(cls, key: str) -> Keys:
        """One key for everybody, who are one tenant without a salt and may see the counters."""
        keys = cls([])
        digest = hashlib.sha256(key.encode()).digest()
        keys._tenants[keys._place(digest)] = (digest, Tenant("all", b"", 1 << 30, operator=True))
        return keys

    def tenant(self, authorization: bytes) -> Tenant:
        """Whose key this is. How long it takes says nothing of the keys there are. Raises RequestError."""
        scheme, _, token = authorization.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        expected, tenant = self._tenants.get(self._place(digest), (b"", None))
        if tenant is None or not hmac.compare_digest(expected, digest) or scheme.lower() != b"bearer":
            msg = "the API key is missing or wrong"
            hint = "send it as `Authorization: Bearer KEY`"
            raise RequestError(msg, hint=hint, status=401, code="invalid_api_key")
        return tenant

    def _place(self, digest: bytes) -> bytes:
        """Where a digest is filed: keyed with a secret of this process, so nobody can aim at a neighbour."""
        return hmac.digest(self._secret, digest, "sha256")


# -- bodies ------------------------------------------------------------------------------------------------------------


def read_front(body: bytes) -> Front:
    """Look into a body without taking it apart. Raises RequestError for anything but one JSON object."""
    try:
        return front_of(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"the body is not a JSON object: {error}"
        raise RequestError(msg, hint="send one JSON object, encoded in UTF-8", code="invalid_json") from None


def refuse_salt(front: Front) -> None:
    """A tenant's salt is not for clients to choose, nor what is loaded. Raises RequestError for such a body."""
    if front.cache_salt is not UNSET:
        msg = "cache_salt is set by the API key here"
        raise RequestError(msg, hint="leave cache_salt out", param="cache_salt", code="salt_not_allowed")
    if front.kv_transfer_params is not UNSET:
        msg, name = "kv_transfer_params are not for clients with an API key of a tenant", "kv_transfer_params"
        raise RequestError(msg, hint=f"leave {name} out", param=name, code="transfer_not_allowed")


def spliced(body: bytes, salt: bytes, kv_transfer_params: bytes) -> tuple[bytes | memoryview, ...]:
    """The body's pieces, with fields of ours put in first. Nothing else of it changes, and none of it is copied."""
    fields = [b'"cache_salt":"%b"' % salt] if salt else []
    if kv_transfer_params:
        fields.append(b'"kv_transfer_params":%b' % kv_transfer_params)
    if not fields:
        return (body,)
    opening = _OPENING.match(body)
    assert opening is not None  # it was read as an object
    if not opening[1]:
        fields.append(b"")
    at = body.index(b"{") + 1
    return body[:at], b",".join(fields), memoryview(body)[at:]


# -- retries -----------------------------------------------------------------------------------------------------------


class RetryBudget:
    """Retries as a share of requests: where everything fails, trying everything twice would make it worse."""

    __slots__ = ("_burst", "_share", "_tokens")

    def __init__(self, share: float, burst: float) -> None:
        self._share, self._burst = share, burst
        self._tokens = burst

    def earn(self) -> None:
        """A request came."""
        if self._tokens < self._burst:
            self._tokens = min(self._burst, self._tokens + self._share)

    def spend(self) -> bool:
        """Take one retry; False where there is none left."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
