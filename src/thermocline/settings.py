"""Settings: every one declared once, in the fields of `Settings`.

A field gives the attribute and TOML key (`memory_bytes`), the environment variable (`THERMOCLINE_MEMORY_BYTES`), the
flag of `thermocline serve` (`--memory-bytes`), the default, the bounds and the line of documentation. A flag wins over
the environment, the environment over the TOML file, the file over the default.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thermocline.errors import SettingsError

PREFIX = "THERMOCLINE_"
CONFIG_VARIABLE = "THERMOCLINE_CONFIG"
"""Names the TOML file when no `--config` does. The only variable of ours that is not a setting."""

Value = str | int | float | Path | None

_SIZE_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for unit, base in (("iB", 1024), ("B", 1000))
}
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class Kind(enum.StrEnum):
    """How a setting is written. The value is what the help shows in place of the argument."""

    TEXT = "TEXT"
    COUNT = "COUNT"
    NUMBER = "NUMBER"
    SIZE = "SIZE"
    DURATION = "DURATION"
    PATH = "PATH"


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one setting. `optional` ones may be `none`, which is then their default too."""

    name: str
    kind: Kind
    default: Value
    doc: str
    least: float
    most: float
    multiple_of: int

    @property
    def optional(self) -> bool:
        """True where no value is a value."""
        return self.default is None

    @property
    def variable(self) -> str:
        """The environment variable."""
        return _variable(self.name)

    @property
    def flag(self) -> str:
        """The flag of `thermocline serve`."""
        return "--" + self.name.replace("_", "-")

    def parse(self, raw: object) -> Value:
        """The value that `raw` (text, or a TOML value) stands for. Raises ValueError with the expectation in words."""
        if self.optional and (raw is None or (isinstance(raw, str) and raw.strip().lower() in {"", "none"})):
            return None
        value = _READERS[self.kind](raw)
        if isinstance(value, int | float):
            self._check_bounds(value)
        return value

    def show(self, value: Value) -> str:
        """`value` as a person would write it; `parse` reads it back."""
        if value is None:
            return "none"
        if self.kind is Kind.SIZE and isinstance(value, int):
            return _size_text(value)
        if self.kind is Kind.NUMBER:
            short = f"{value:g}"
            return short if float(short) == value else repr(value)
        return f"{value:g}s" if self.kind is Kind.DURATION else str(value)

    def show_bound(self, bound: float) -> str:
        """A bound as a person would write it."""
        return self.show(bound if self.kind in {Kind.DURATION, Kind.NUMBER} else int(bound))

    def _check_bounds(self, value: float) -> None:
        if not self.least <= value <= self.most:
            raise ValueError(f"must be at least {self.show_bound(self.least)} and at most {self.show_bound(self.most)}")
        if self.multiple_of > 1 and value % self.multiple_of:
            raise ValueError(f"must be a multiple of {self.multiple_of}")


def _size_text(value: int) -> str:
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def _text(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("must be a text that is not empty")
    return raw


def _path(raw: object) -> Path:
    if not isinstance(raw, str | Path) or not str(raw).strip():
        raise ValueError("must be a path")
    try:
        return Path(raw).expanduser()
    except RuntimeError:  # ~somebody
        raise ValueError("must be a path, and this machine knows no such user") from None


def _count(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and re.fullmatch(r"\s*-?\d+\s*", raw):
        return int(raw)
    raise ValueError("must be a whole number")


def _number(raw: object) -> float:
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(raw, str) and re.fullmatch(r"\s*\d+(\.\d+)?(e[+-]?\d{1,3})?\s*", raw):
        return float(raw)
    raise ValueError("must be a number")


def _size(raw: object) -> int:
    """Bytes from 1073741824, "1GiB" (1024 based), "2GB" (1000 based)."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    match = _NUMBER_AND_UNIT.fullmatch(raw) if isinstance(raw, str) else None
    unit = _unit(match[2], _SIZE_UNITS) if match else None
    if match is None or unit is None:
        raise ValueError('must be a size such as "512MiB", "2GB" or a number of bytes')
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * int(unit)


def _duration(raw: object) -> float:
    """Seconds from 30, 0.5, "90s", "24h", "7d"."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    match = _NUMBER_AND_UNIT.fullmatch(raw) if isinstance(raw, str) else None
    unit = _unit(match[2], _DURATION_UNITS) if match else None
    if match is None or unit is None:
        raise ValueError('must be a duration such as "90s", "15m", "24h", "7d" or a number of seconds')
    return float(match[1]) * unit


def _unit(text: str, units: Mapping[str, float]) -> float | None:
    return next((factor for name, factor in units.items() if name.lower() == text.lower()), None)


_READERS: Mapping[Kind, Callable[[object], Value]] = {
    Kind.TEXT: _text,
    Kind.COUNT: _count,
    Kind.NUMBER: _number,
    Kind.SIZE: _size,
    Kind.DURATION: _duration,
    Kind.PATH: _path,
}


def _setting(
    kind: Kind, default: Value, doc: str, *, least: float = 0, most: float = float("inf"), multiple_of: int = 1
) -> Any:  # noqa: ANN401  # a dataclass field, seen as whatever type the attribute has
    declared = (kind, default, doc, least, most, multiple_of)
    return dataclasses.field(default=default, metadata={"declared": declared})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Out-of-range values cannot exist: making one raises SettingsError with a hint.

    `origins` names, for each attribute that is not at its default, where its value came from.
    """

    model: str = _setting(
        Kind.TEXT, "tiny", 'The model to serve: "tiny" (built in, random weights), a folder, or a hub name.'
    )
    host: str = _setting(Kind.TEXT, "127.0.0.1", "The address to listen on. Any but loopback needs `api_key_file`.")
    port: int = _setting(Kind.COUNT, 8000, "The port to listen on; 0 picks a free one.", most=65535)
    api_key_file: Path | None = _setting(
        Kind.PATH, None, "A file whose first line is the key that every request must carry as its bearer token."
    )
    node_socket: Path | None = _setting(
        Kind.PATH, None, "The socket of a node that owns the tiers for all engines of this host."
    )
    memory_bytes: int = _setting(
        Kind.SIZE, 1 << 30, "The memory tier's size, taken once at start.", least=1 << 20, most=1 << 50
    )
    disk_path: Path | None = _setting(Kind.PATH, None, "The disk tier's folder; without one nothing is kept on disk.")
    disk_bytes: int = _setting(
        Kind.SIZE, 10 << 30, "The disk tier's hard limit, logs included.", least=16 << 20, most=1 << 60
    )
    redis_url: str | None = _setting(
        Kind.TEXT, None, "A Redis or Valkey that engines share: redis://host:6379/0, rediss://host (TLS), unix:///path."
    )
    redis_password_file: Path | None = _setting(
        Kind.PATH, None, "A file whose first line is the password of the Redis server."
    )
    redis_ca_file: Path | None = _setting(
        Kind.PATH, None, "The certificate authority of a rediss:// server; none trusts those of the system."
    )
    redis_namespace: str = _setting(
        Kind.TEXT, "thermocline", "What all our keys in Redis begin with; engines share blocks within one namespace."
    )
    redis_bytes: int = _setting(
        Kind.SIZE, 4 << 30, "The most that our values in Redis take, of all engines.", least=1 << 20, most=1 << 50
    )
    redis_ttl_seconds: float = _setting(
        Kind.DURATION, 86400.0, "Values in Redis that nobody used for this long expire.", least=1, most=1e9
    )
    redis_prefix_tokens: int = _setting(
        Kind.COUNT, 4096, "Only the first so many tokens of a prompt are kept in Redis.", least=16, most=1 << 30
    )
    redis_gain_min: float = _setting(
        Kind.NUMBER,
        1.5,
        "Redis takes only what is predicted to load this many times faster than it is computed; 0 takes all.",
        most=1e6,
    )
    redis_wait_seconds: float = _setting(
        Kind.DURATION,
        0.05,
        "How long a request waits for Redis without a byte; then it goes on without it.",
        least=0.001,
        most=10,
    )
    ttl_seconds: float | None = _setting(
        Kind.DURATION,
        None,
        "Blocks not used for this long expire; none keeps them until the room is needed.",
        least=1,
        most=1e10,
    )
    tokens_per_block: int = _setting(
        Kind.COUNT, 32, "Tokens in a block, the unit that is stored and matched.", least=16, most=1024, multiple_of=16
    )
    threads: int = _setting(Kind.COUNT, 0, "Threads that the model computes with; 0 lets torch choose.", most=1024)
    requests_max: int = _setting(
        Kind.COUNT, 64, "Requests in flight; more are refused with status 429.", least=1, most=65536
    )
    prompt_tokens_max: int = _setting(Kind.COUNT, 0, "The longest prompt; 0 means the model's own limit.", most=1 << 30)
    new_tokens_max: int = _setting(
        Kind.COUNT, 4096, "The most tokens that one request may generate.", least=1, most=1 << 20
    )
    body_bytes_max: int = _setting(
        Kind.SIZE, 8 << 20, "The largest request body that is read.", least=1 << 10, most=1 << 30
    )
    lease_seconds: float = _setting(
        Kind.DURATION, 30.0, "How long a plan protects its blocks from eviction.", least=0.001, most=86400
    )
    receipts_kept: int = _setting(Kind.COUNT, 1024, "How many receipts `why` can look back on.", least=1, most=1 << 20)
    receipts_path: Path | None = _setting(
        Kind.PATH, None, "A file to which every receipt is appended as a line of JSON: figures and reasons, no text."
    )
    receipts_bytes: int = _setting(
        Kind.SIZE, 64 << 20, "At this size the receipts file becomes the older one of two.", least=1 << 16, most=1 << 40
    )
    costs_path: Path | None = _setting(
        Kind.PATH, None, "A small file that keeps what was learned of costs between runs; none measures anew."
    )
    measured_path: Path | None = _setting(
        Kind.PATH,
        None,
        "What `thermocline profile --write` measured: believed by `serve`, `node` and `route` at first.",
    )
    write_queue_bytes: int = _setting(
        Kind.SIZE, 64 << 20, "Bytes that may wait for the disk; saves beyond are dropped.", least=1 << 20, most=1 << 40
    )
    load_seconds_max: float = _setting(
        Kind.DURATION, 10.0, "The deadline of any load; what is late is computed.", least=0.001, most=3600
    )
    events_endpoint: str | None = _setting(
        Kind.TEXT,
        None,
        "Where KV events go, for a router: tcp://127.0.0.1:5557 or ipc:///path connects, @tcp://... listens; "
        "@!tcp://10.0.0.5:5557 listens where other machines reach it.",
    )
    events_replay_endpoint: str | None = _setting(
        Kind.TEXT,
        None,
        "Where a router may ask for KV events that it missed: an address to listen on; !tcp://10.0.0.5:5558 where "
        "other machines reach it.",
    )
    events_name: str | None = _setting(
        Kind.TEXT, None, "What KV events call this instance or node: by default its URL, or the machine's name."
    )
    route_to: str | None = _setting(
        Kind.TEXT,
        None,
        "What a gateway routes to: NAME=URL, separated by commas; behind a URL node=NAME, replay=ENDPOINT, "
        "events=ENDPOINT, capacity=TOKENS or seats=COUNT, separated by spaces.",
    )
    policy: str = _setting(
        Kind.TEXT, "predicted_ttft", "How a gateway chooses: predicted_ttft, least_loaded, session_hash or round_robin."
    )
    tokenizer_path: Path | None = _setting(
        Kind.PATH, None, "The model's folder, for a gateway: with its tokenizer, prompts are known exactly."
    )
    tenants_path: Path | None = _setting(
        Kind.PATH, None, "A gateway's API keys: a TOML file of [[keys]] tables with a tenant and the sha256 of a key."
    )
    instance_key_file: Path | None = _setting(
        Kind.PATH, None, "A file whose first line is the API key that a gateway sends to its instances."
    )
    admin_socket: Path | None = _setting(
        Kind.PATH, None, "Where a gateway is administered; by default gateway-PORT.sock in this user's runtime folder."
    )
    events_listen: str | None = _setting(
        Kind.TEXT,
        None,
        "Where a gateway hears KV events: tcp://127.0.0.1:5557 or ipc:///path, which engines connect to; "
        "!tcp://10.0.0.5:5557 for engines on other machines.",
    )
    gateway_processes: int = _setting(
        Kind.COUNT, 1, "Gateways that share one address, each with an index of its own.", least=1, most=64
    )
    index_blocks: int = _setting(
        Kind.COUNT,
        4_000_000,
        "Blocks that a gateway remembers, of all instances: 160 bytes each.",
        least=1,
        most=1 << 34,
    )
    near_host: str = _setting(
        Kind.TEXT, "127.0.0.1", "Where `near serve` listens. Any but loopback needs `near_password_file`."
    )
    near_port: int = _setting(Kind.COUNT, 6379, "The port of `near serve`; 0 picks a free one.", most=65535)
    near_unix_socket: Path | None = _setting(
        Kind.PATH, None, "A Unix socket for `near serve`, of this user alone, in place of host and port."
    )
    near_password_file: Path | None = _setting(
        Kind.PATH, None, "A file whose first line is the password that clients of `near serve` must say."
    )
    near_memory_bytes: int = _setting(
        Kind.SIZE, 256 << 20, "What `near serve` holds at most; older keys go.", least=1 << 20, most=1 << 50
    )
    near_connections_max: int = _setting(Kind.COUNT, 1024, "Clients of `near serve` at a time.", least=1, most=65536)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Read and check every value: one made in code is held to the same bounds as one from a file."""
        for setting in DECLARED.values():
            value = _parse(setting, getattr(self, setting.name), self.where_from(setting.name))
            object.__setattr__(self, setting.name, value)
        if self.tenants_path is None:
            self.require_key()

    def require_key(self) -> None:
        """An engine that other machines can reach needs a key. Raises SettingsError where it has none."""
        if self.api_key_file is None and not is_loopback(self.host):
            raise SettingsError(
                f"host {self.host} can be reached from other machines, and no API key protects it",
                hint="set api_key_file, or listen on 127.0.0.1",
            )

    def near_password(self) -> bytes | None:
        """The password of `near serve`. Raises SettingsError where it can be reached from elsewhere and has none."""
        if self.near_password_file is not None:
            return read_key(self.near_password_file, what="password").encode()
        if self.near_unix_socket is None and not is_loopback(self.near_host):
            raise SettingsError(
                f"near_host {self.near_host} can be reached from other machines, and no password protects it",
                hint="set near_password_file, or listen on 127.0.0.1",
            )
        return None

    @classmethod
    def load(
        cls,
        toml_path: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, object] | None = None,
    ) -> Settings:
        """Join flags > environment > TOML file > defaults. `flags` maps attributes to values; None means not given.

        Raises SettingsError for an unknown name, a value of the wrong kind or out of range, or an unreadable file.
        """
        given: dict[str, tuple[object, str]] = {}
        environ = os.environ if environ is None else environ
        path = toml_path or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
        if path is not None:
            given |= {_known(key, f"in {path}"): (raw, str(path)) for key, raw in _read(path).items()}
        given |= _from_environment(environ)
        for key, raw in (flags or {}).items():
            if raw is not None:
                setting = DECLARED[_known(key, "among the flags")]
                given[key] = (raw, setting.flag)
        values: dict[str, Any] = {key: raw for key, (raw, _) in given.items()}
        return cls(**values, origins={key: origin for key, (_, origin) in given.items()})

    def flags(self, without: frozenset[str] = frozenset()) -> list[str]:
        """The settings that are not at their default, as a child process takes them; but for those of these names."""
        words: list[str] = []
        for name, setting in DECLARED.items():
            value = getattr(self, name)
            if name not in without and value != setting.default:
                words += [setting.flag, setting.show(value)]
        return words

    def where_from(self, name: str) -> str:
        """Where the value of `name` came from: a flag, a variable, a file, or "default"."""
        return self.origins.get(name, "default")


DECLARED: Mapping[str, Setting] = {
    field.name: Setting(field.name, *field.metadata["declared"])
    for field in dataclasses.fields(Settings)
    if "declared" in field.metadata
}
"""Every setting by its attribute, in the order of the documentation."""


def _parse(setting: Setting, raw: object, origin: str) -> Value:
    try:
        return setting.parse(raw)
    except ValueError as error:
        source = "" if origin == "default" else f" (from {origin})"
        raise SettingsError(
            f"{setting.name} = {raw!s}{source}: {error}",
            hint=f"{setting.doc} Default: {setting.show(setting.default)}.",
        ) from None


def _known(name: str, where: str, spell: Callable[[str], str] = str) -> str:
    if name in DECLARED:
        return name
    import difflib

    near = difflib.get_close_matches(name, DECLARED, n=1)
    hint = f"did you mean {spell(near[0])}?" if near else "`thermocline config` lists every setting"
    raise SettingsError(f"unknown setting {spell(name)} {where}", hint=hint)


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    return {
        _known(variable.removeprefix(PREFIX).lower(), "in the environment", _variable): (raw, variable)
        for variable, raw in environ.items()
        if variable.startswith(PREFIX) and variable != CONFIG_VARIABLE and not _is_service_link(variable, raw)
    }


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child: its settings are resolved already, and it gets them as flags."""
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX)}


def _is_service_link(variable: str, raw: str) -> bool:
    """Kubernetes sets THERMOCLINE_PORT=tcp://... and others for a service called thermocline: those are not ours."""
    port = variable == _variable("port") and "://" in raw
    return port or re.match(r"THERMOCLINE_(SERVICE|PORT_\d+)_", variable) is not None


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}", hint="name a readable TOML file with --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} is not TOML: {error}", hint='write one setting a line, such as memory_bytes = "4GiB"'
        ) from None


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: Path, *, what: str = "API key") -> str:
    """A secret (`what` names it): the first line of the file. Raises SettingsError where there is none."""
    try:
        key = path.read_text(encoding="ascii").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"cannot read the {what} from {path}: {error}",
            hint=f"name a readable file whose first line is the {what}, in ASCII",
        ) from None
    if not key:
        raise SettingsError(
            f"the first line of {path} is empty, so there is no {what}",
            hint="write it there, such as the output of `openssl rand -hex 32`",
        )
    return key
