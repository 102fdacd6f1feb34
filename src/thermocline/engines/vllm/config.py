"""What vLLM is told with --kv-transfer-config, what the connector reads of it, and a node of an engine's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thermocline.engines.launch import flags
from thermocline.errors import LaunchError, SettingsError
from thermocline.node.paths import socket_path
from thermocline.settings import DECLARED, Settings

LOG = logging.getLogger("thermocline.vllm")
ORPHAN_SECONDS = 15.0
"""A node that an engine started for itself ends when nobody was connected for so long."""
STOP_SECONDS = 20.0
RESTART_SECONDS, RESTART_SECONDS_MAX = 1.0, 30.0

_KNOWN = ("socket", "settings")
_NOT_THE_NODES = frozenset(
    {"model", "host", "port", "api_key_file", "threads", "requests_max", "prompt_tokens_max", "new_tokens_max"}
    | {"body_bytes_max", "tokens_per_block", "node_socket"}
)


def vllm_config_json(settings: Settings, socket: Path | None = None) -> str:
    """The JSON for vLLM's --kv-transfer-config, on one line.

    With a `socket` the engine uses the node there; without one it starts a private node, with these settings.
    """
    extra: dict[str, object] = {"socket": str(socket)} if socket else {}
    if socket is None:
        values = {name: getattr(settings, name) for name in DECLARED if name not in _NOT_THE_NODES}
        changed = {name: value for name, value in values.items() if value != DECLARED[name].default}
        if changed:
            extra["settings"] = {
                name: str(value) if isinstance(value, Path) else value for name, value in changed.items()
            }
    return json.dumps(
        {
            "kv_connector": "Thermocline",
            "kv_connector_module_path": "thermocline.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    )


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Which node an engine uses. It is the engine's own where `settings` are given."""

    socket: Path
    settings: Settings | None


def node_choice(extra: Mapping[str, object], engine_id: str) -> NodeChoice:
    """Read the connector's part of the configuration: every process of the engine reads the same.

    Raises SettingsError for what is unknown or malformed, and NodeError where no socket can be had.
    """
    for name in extra:
        if name not in _KNOWN:
            raise SettingsError(
                f"unknown option {name} in kv_connector_extra_config",
                hint=f"it may have {' and '.join(_KNOWN)}; `thermocline vllm-config` writes it",
            )
    socket, given = extra.get("socket"), extra.get("settings")
    if socket is not None:
        if not isinstance(socket, str) or not socket.startswith("/") or given is not None:
            raise SettingsError(
                "kv_connector_extra_config: socket must be an absolute path, and settings are those of the node there",
                hint="leave out settings, and give them to `thermocline node`",
            )
        return NodeChoice(Path(socket), None)
    if given is not None and not isinstance(given, dict):
        raise SettingsError(
            "kv_connector_extra_config: settings must be an object", hint="`thermocline vllm-config` writes it"
        )
    settings = Settings.load(flags=given or {})
    name = hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    return NodeChoice(socket_path(f"engine-{name}"), settings)


class PrivateNode:
    """A node that this process starts, keeps running, and ends. It also ends by itself soon after its engine."""

    def __init__(self, choice: NodeChoice) -> None:
        """Raises LaunchError where it cannot be started. Clients attach once it listens."""
        assert choice.settings is not None
        self._words = [sys.executable, "-m", "thermocline", "node", "--socket", str(choice.socket)]
        self._words += ["--idle-exit", f"{ORPHAN_SECONDS:g}", *flags(choice.settings, without=_NOT_THE_NODES)]
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._process = self._started()
        LOG.info("started a node of this engine's own at %s (process %d)", choice.socket, self.pid)
        threading.Thread(target=self._keep, name="thermocline node", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def close(self) -> None:
        """End it in good order, within a bound: what only memory holds goes to its disk first."""
        self._closing.set()
        with self._lock:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            LOG.warning("the node does not end within %g s; it goes on by itself", STOP_SECONDS)

    def _started(self) -> subprocess.Popen[bytes]:
        try:
            # a group of its own: Ctrl-C is for the engine, which has things to save first
            return subprocess.Popen(self._words, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603  # ourselves
        except OSError as error:
            raise LaunchError(
                f"cannot start a node: {error.strerror}", hint="start `thermocline node`, and name its socket"
            ) from None

    def _keep(self) -> None:
        """Start it again when it dies, each time after a longer pause: its disk may still be another's for a while."""
        pause = RESTART_SECONDS
        while True:
            code = self._process.wait()
            if self._closing.wait(pause):
                return
            LOG.warning("the node of this engine's own ended with %d; it is started again", code)
            pause = min(2 * pause, RESTART_SECONDS_MAX)
            with self._lock, contextlib.suppress(LaunchError):
                if not self._closing.is_set():
                    self._process = self._started()
