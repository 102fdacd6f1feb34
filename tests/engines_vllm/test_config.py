"""What vLLM is told and what the connector reads of it, and the node of an engine's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node.making import until
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
def test_an_engines_own_node(runtime):
    """It serves its engine, is started again when it is killed, and ends when it is closed."""
    choice = node_choice({"settings": {"memory_bytes": "8MiB"}}, "engine")
    node = PrivateNode(choice)
    client = NodeClient(choice.socket)
    try:
        assert client.wait_up(60)
        first = node.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: node.pid != first and client.up, "another one to be there")
    finally:
        client.close()
        node.close()
    until(lambda: not choice.socket.exists(), "it to end")


PROGRAM = """
import os
from thermocline.engines.vllm import config
config.ORPHAN_SECONDS = 1.0
choice = config.node_choice({"settings": {"memory_bytes": "8MiB"}}, "engine")
node = config.PrivateNode(choice)
while not choice.socket.exists():
    pass
os._exit(0)
"""


@pytest.mark.slow
def test_an_engines_own_node_does_not_outlive_it_for_long(runtime):
    """When its engine is gone without a word, the node ends by itself."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
    socket = node_choice({}, "engine").socket
    until(lambda: not socket.exists(), "the node to end")
