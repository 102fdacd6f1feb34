"""A private node: started by the first engine that needs it, shared, kept running, gone soon after the last."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tests.node.making import until
from thermocline.engines.vllm import private
from thermocline.engines.vllm.config import node_choice
from thermocline.engines.vllm.private import PrivateNode
from thermocline.node.client import NodeClient

pytestmark = pytest.mark.slow


@pytest.fixture
def choice(folder, monkeypatch):
    """A node that ends soon when nobody is connected."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(private, "ORPHAN_SECONDS", 1.0)
    return node_choice({"settings": {"memory_bytes": "8MiB"}})


def test_it_is_started_again_and_ends_by_itself(choice):
    """It serves its engine, is started again when it is killed, and ends when its engine has left."""
    with (
        contextlib.closing(NodeClient(choice.socket)) as client,
        contextlib.closing(PrivateNode(choice, lambda: client.up)) as node,
    ):
        assert client.wait_up(60)
        first = node.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: node.pid != first and client.up, "another one to be there")
    until(lambda: not choice.socket.exists(), "it to end")


def test_two_engines_share_it(choice):
    """The second engine starts none, and the node outlives the first."""
    with contextlib.closing(NodeClient(choice.socket)) as one, contextlib.closing(NodeClient(choice.socket)) as other:
        with contextlib.closing(PrivateNode(choice, lambda: one.up)) as first:
            assert one.wait_up(60)
            assert other.wait_up(60)
            with contextlib.closing(PrivateNode(choice, lambda: other.up)) as second:
                assert first.pid
                assert not second.pid
        one.close()
        assert other.up
    until(lambda: not choice.socket.exists(), "it to end")


PROGRAM = """
import os, signal
from thermocline.engines.vllm import private
from thermocline.engines.vllm.config import node_choice
private.ORPHAN_SECONDS = 1.0
choice = node_choice({"settings": {"memory_bytes": "8MiB"}})
node = private.PrivateNode(choice, lambda: False)
while not choice.socket.exists():
    pass
children = open(f"/proc/self/task/{os.getpid()}/children").read()
assert str(node.pid) not in children.split(), "vLLM would end it by force"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_is_no_child_of_its_engine(choice):
    """When the engine and all its children are killed, the node ends in good order by itself."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    until(lambda: not choice.socket.exists(), "the node to end")
