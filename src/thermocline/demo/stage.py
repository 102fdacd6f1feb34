"""What the chapters with a model play on: the model in this process, and the second process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from thermocline.build import store_from
from thermocline.clock import SystemClock
from thermocline.demo import other
from thermocline.demo.other import MIB, MODEL, THREADS, Other
from thermocline.demo.screen import Screen
from thermocline.engines.models import Model, load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings


class Stage(NamedTuple):
    """The same model, twice."""

    model: Model
    other: Other

    @contextlib.contextmanager
    def engine(self, folder: Path) -> Iterator[Engine]:
        """An engine with memory and disk. At its end all is durable, and the disk is free for another process."""
        settings = Settings(memory_bytes=256 * MIB, disk_path=folder, disk_bytes=512 * MIB)
        with contextlib.closing(store_from(settings)) as store, contextlib.closing(Engine(self.model, store)) as engine:
            yield engine


@contextlib.contextmanager
def opened(screen: Screen) -> Iterator[Stage]:
    """Load the model in both processes at once, and warm both up with a prompt that nothing else begins with."""
    clock = SystemClock()
    started = clock.now()
    screen.say("")
    screen.say(
        "Loading the built-in model in two processes. Its weights are random and its text is gibberish: what counts is "
        f"that its answers are the same, token by token, and when they begin. It computes on {THREADS} thread."
    )
    with other.started() as second:
        screen.working("importing torch and transformers, making the model the first time")
        model = load_model(MODEL, threads=THREADS)
        second.wait_ready()
        warm_up = [3, *range(100, 355)]
        second.answer(warm_up, 2)
        with contextlib.closing(Engine(model)) as engine:
            engine.generate(warm_up, 2)
        screen.worked()
        weights = sum(parameter.numel() for parameter in model.module.parameters())
        screen.say(
            f"{weights / 1e6:.0f} million weights, {model.layout.dtype}, ready after {clock.now() - started:.0f} s."
        )
        yield Stage(model, second)
