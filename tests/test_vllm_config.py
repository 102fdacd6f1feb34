"""What `vllm-config` prints: the one flag that vLLM needs."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from thermocline import cli
from thermocline.build import store_from
from thermocline.engines.vllm.config import node_choice
from thermocline.node.paths import socket_path
from thermocline.node.server import NodeServer
from thermocline.settings import Settings


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run it in a folder of its own, without nodes; gives what vLLM is told, what the connector is, and stderr."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["vllm-config", *argv])
        assert stopped.value.code == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        told = json.loads(out)
        return told, told["kv_connector_extra_config"], err

    return run


def test_without_a_node(run, tmp_path):
    """Where no node answers, the engine is told to start its own, with the settings given here."""
    told, extra, err = run("--memory-bytes", "2GiB", "--disk-path", str(tmp_path / "cache"))
    assert told["kv_load_failure_policy"] == "recompute"
    assert extra == {"settings": {"memory_bytes": 2 << 30, "disk_path": str(tmp_path / "cache")}}
    assert "the engine starts a private one" in err
    assert node_choice(extra).settings == Settings(memory_bytes=2 << 30, disk_path=tmp_path / "cache")


def test_with_a_node(run):
    """Where this user's node answers, the engine is told its socket."""
    with (
        closing(store_from(Settings(memory_bytes=1 << 20))) as store,
        closing(NodeServer(store, socket_path(), lease_seconds=30)) as node,
    ):
        _, extra, err = run()
    assert extra == {"socket": str(node.path)}
    assert str(node.path) in err
    assert run()[1] == {}


def test_a_node_to_come(run, tmp_path):
    """A socket that is named is told in full, whether a node answers there or not."""
    assert run("--socket", "node.sock")[1] == {"socket": str(tmp_path / "node.sock")}
    assert run("--node-socket", "/run/node.sock")[1] == {"socket": "/run/node.sock"}
