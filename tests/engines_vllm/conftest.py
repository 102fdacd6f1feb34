"""A real node in this process, for both halves of the connector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.making import Host
from thermocline.node.client import NodeClient


@pytest.fixture
def host(folder) -> Iterator[Host]:
    """A node with memory alone."""
    with Host(folder, blocks=4096) as host:  # of which a client is lent a sixteenth
        yield host


@pytest.fixture
def clients(host) -> list[NodeClient]:
    """A scheduler's client, and those of two ranks."""
    return [host.client() for _ in range(3)]
