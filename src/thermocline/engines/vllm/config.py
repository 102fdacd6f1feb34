"""What vLLM is told with --kv-transfer-config, and what the connector reads of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thermocline.errors import SettingsError
from thermocline.node.paths import socket_path
from thermocline.settings import DECLARED, Settings

_KNOWN = ("socket", "settings")
NOT_THE_NODES = frozenset(
    {"model", "host", "port", "api_key_file", "threads", "requests_max", "prompt_tokens_max", "new_tokens_max"}
    | {"body_bytes_max", "tokens_per_block", "node_socket", "instance_key_file"}
)
"""Settings that say nothing of tiers."""


def vllm_config_json(settings: Settings, socket: Path | None = None) -> str:
    """The JSON for vLLM's --kv-transfer-config, on one line.

    With a `socket` the engine uses the node there; without one it has a private node, with these settings (see
    engines/vllm/private.py). Paths are made absolute: vLLM may run in another folder.
    """
    extra: dict[str, object] = {"socket": str(socket.absolute())} if socket else {}
    if socket is None:
        values = {name: getattr(settings, name) for name in DECLARED if name not in NOT_THE_NODES}
        changed = {name: value for name, value in values.items() if value != DECLARED[name].default}
        if changed:
            extra["settings"] = {
                name: str(value.absolute()) if isinstance(value, Path) else value for name, value in changed.items()
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
    """Which node an engine uses. It is a private one where there are `settings`."""

    socket: Path
    settings: Settings | None


def node_choice(extra: Mapping[str, object]) -> NodeChoice:
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
    name = hashlib.sha256(json.dumps(given or {}, sort_keys=True).encode()).hexdigest()[:16]
    return NodeChoice(socket_path(f"private-{name}"), settings)
