"""What vLLM is told and what the connector reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thermocline.engines.vllm.config import node_choice, vllm_config_json
from thermocline.errors import SettingsError
from thermocline.settings import Settings


@pytest.fixture
def runtime(folder, monkeypatch):
    """A folder for sockets."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def extra_of(text):
    """The connector's part."""
    return json.loads(text)["kv_connector_extra_config"]


def test_what_is_written_is_read_again(runtime):
    """The JSON names the class and the policy, and its settings arrive at the engine's own node."""
    text = vllm_config_json(Settings(memory_bytes=64 << 20, disk_path=Path("/var/cache/d"), model="other", port=1))
    told = json.loads(text)
    assert "\n" not in text
    assert told["kv_connector_module_path"] == "thermocline.engines.vllm"
    assert (told["kv_connector"], told["kv_load_failure_policy"]) == ("Thermocline", "recompute")
    assert extra_of(text) == {"settings": {"memory_bytes": 64 << 20, "disk_path": "/var/cache/d"}}
    choice = node_choice(extra_of(text))
    assert (choice.settings.memory_bytes, choice.settings.disk_path) == (64 << 20, Path("/var/cache/d"))


def test_a_named_node_is_used():
    """With a socket there is no node of its own, and no settings."""
    choice = node_choice(extra_of(vllm_config_json(Settings(), Path("/run/node.sock"))))
    assert (choice.socket, choice.settings) == (Path("/run/node.sock"), None)


def test_engines_with_the_same_settings_have_one_node(runtime):
    """The settings alone name the socket: all processes of an engine derive the same one, and so do its neighbours."""
    one, other = {"settings": {"disk_path": "/a", "memory_bytes": 1 << 30}}, {"settings": {"disk_path": "/b"}}
    turned = {"settings": dict(reversed(one["settings"].items()))}
    assert node_choice(one).socket == node_choice(turned).socket != node_choice(other).socket
    assert node_choice({}).socket == node_choice({}).socket != node_choice(one).socket


def test_paths_are_absolute(runtime, monkeypatch, folder):
    """A relative path means the folder in which the configuration was written, not vLLM's."""
    monkeypatch.chdir(folder)
    text = vllm_config_json(Settings(disk_path=Path("cache")))
    assert extra_of(text)["settings"]["disk_path"] == str(folder / "cache")
    assert extra_of(vllm_config_json(Settings(), Path("n.sock"))) == {"socket": str(folder / "n.sock")}


@pytest.mark.parametrize(
    "extra",
    [
        {"soket": "/a"},
        {"socket": "a"},
        {"socket": 1},
        {"socket": "/a", "settings": {}},
        {"settings": []},
        {"settings": {"memory": 1}},
        {"settings": {"memory_bytes": "x"}},
    ],
)
def test_mistakes_are_told_at_the_start(runtime, extra):
    """What is unknown or malformed is refused with a hint."""
    with pytest.raises(SettingsError) as caught:
        node_choice(extra)
    assert caught.value.hint
