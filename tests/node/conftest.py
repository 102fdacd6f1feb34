"""Nodes in this process, ended with each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.node.making import Host


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Nodes over memory of so many blocks, and a disk if asked."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Host(tmp_path, **options))


@pytest.fixture
def host(make_host) -> Host:
    """A node with memory alone."""
    return make_host()
