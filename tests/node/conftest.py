"""Nodes in this process, ended with each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.node.making import Host
from thermocline.clock import ManualClock


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Nodes over memory of so many blocks, and a disk if asked."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Host(tmp_path, **options))


@pytest.fixture
def host(make_host) -> Host:
    """A node with memory alone."""
    return make_host()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still unless a test moves it."""
    return ManualClock(1_000_000.0)
