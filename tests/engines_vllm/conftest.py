"""A real node in this process, for both halves of the connector."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.making import Host
from thermocline.node.client import NodeClient


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a Unix socket in it."""
    path = Path(tempfile.mkdtemp(prefix="tcl-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def host(folder) -> Iterator[Host]:
    """A node with memory alone."""
    with Host(folder, blocks=4096) as host:  # of which a client is lent a sixteenth
        yield host


@pytest.fixture
def clients(host) -> list[NodeClient]:
    """A scheduler's client, and those of two ranks."""
    return [host.client() for _ in range(3)]
