"""The built-in model, made once per run in a folder of its own, and engines around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.engines.eager import eager_store
from thermocline.engines import tiny
from thermocline.engines.models import Model, load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings
from thermocline.store.store import Store

MEMORY_BYTES = 256 << 20


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of this run's own, in the place of the user's."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny_folder(cache_home: Path) -> Path:
    """The built-in model's files."""
    return tiny.ensure()


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Model:
    """The built-in model. One thread: two would wait for each other wherever a core is busy with something else."""
    return load_model("tiny", threads=1)


@pytest.fixture(scope="session")
def plain(model: Model) -> Iterator[Engine]:
    """An engine without a store: what it generates is what everything else must generate."""
    with closing(Engine(model)) as engine:
        yield engine


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    """Closes what was entered, last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_store(cleanup: ExitStack, tmp_path: Path) -> Callable[..., Store]:
    """Stores with a memory tier, and a disk tier in this test's folder if asked."""

    def make(*, disk: bool = False, **settings: object) -> Store:
        values: dict[str, object] = {"memory_bytes": MEMORY_BYTES, "disk_bytes": MEMORY_BYTES, **settings}
        if disk:
            values["disk_path"] = tmp_path / "disk"
        return cleanup.enter_context(closing(eager_store(Settings(**values))))

    return make


@pytest.fixture
def make_engine(cleanup: ExitStack, model: Model) -> Callable[..., Engine]:
    """Engines around the built-in model."""

    def make(store: Store | None = None, **options: object) -> Engine:
        return cleanup.enter_context(closing(Engine(model, store, **options)))

    return make
