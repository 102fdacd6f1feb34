"""A vLLM server and a node for each test that asks, and the tiny model that all of them run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vllm.node import MIB, Node
from tests.vllm.server import Server, interpreter
from thermocline.engines import tiny


@pytest.fixture(scope="session")
def vllm() -> None:
    """Skips what asks for it where vLLM is not installed."""
    interpreter()


@pytest.fixture(scope="session")
def tiny_model(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model's files."""
    return tiny.ensure(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cleanup() -> Iterator[ExitStack]:
    """Closes what was entered, last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start_node(folder: Path) -> Iterator[Callable[..., Node]]:
    """Starts nodes, each with its own settings; ends them after the test."""
    with ExitStack() as stack:

        def start(**settings: object) -> Node:
            return stack.enter_context(Node(folder, **{"memory_bytes": 256 * MIB, **settings}))

        yield start


@pytest.fixture
def start_vllm(folder: Path, tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the built-in model (or of `model`); ends them after the test."""
    with ExitStack() as stack:

        def start(*arguments: str, model: Path = tiny_model, **options: object) -> Server:
            return stack.enter_context(Server(folder, model, *arguments, **options))

        yield start
