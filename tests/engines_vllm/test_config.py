"""What vLLM is told and what the connector reads of it, and the node of an engine's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.node.making import until
from thermocline.engines.vllm import config
from thermocline.engines.vllm.config import PrivateNode, node_choice, vllm_config_json
from thermocline.errors import SettingsError
from thermocline.node.client import NodeClient
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
    choice = node_choice(extra_of(text), "engine")
    assert (choice.settings.memory_bytes, choice.settings.disk_path) == (64 << 20, Path("/var/cache/d"))


def test_a_named_node_is_used():
    """With a socket there is no node of its own, and no settings."""
    choice = node_choice(extra_of(vllm_config_json(Settings(), Path("/run/node.sock"))), "engine")
    assert (choice.socket, choice.settings) == (Path("/run/node.sock"), None)


def test_all_processes_of_an_engine_derive_one_socket(runtime):
    """The engine's id alone names the socket, and it is short enough whatever the id."""
    assert node_choice({}, "a" * 500).socket == node_choice({}, "a" * 500).socket
    assert node_choice({}, "a").socket != node_choice({}, "b").socket


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
        node_choice(extra, "engine")
    assert caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "left alone"])
def test_a_node_of_its_own_ends_with_its_engine(runtime, monkeypatch, how):
    """An engine's own node serves it, and ends when it is closed, or by itself when its engine is gone."""
    monkeypatch.setattr(config, "ORPHAN_SECONDS", 3.0)
    choice = node_choice({"settings": {"memory_bytes": "8MiB"}}, "engine")
    node = PrivateNode(choice)
    client = NodeClient(choice.socket)
    try:
        assert client.wait_up(60)
        assert not node.ended
    finally:
        client.close()
        if how == "closed":
            node.close()
    until(lambda: node.ended, "the node to end")
    assert not choice.socket.exists()
