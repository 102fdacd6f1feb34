"""What the chapters with a model play on: the model in this process, and the second process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from thermocline.build import store_from
from thermocline.clock import SystemClock
from thermocline.demo import other
from thermocline.demo.other import MODEL, THREADS, Other, small
from thermocline.demo.screen import Screen
from thermocline.engines.models import Model, load_model
from thermocline.engines.transformers import Engine


class Stage(NamedTuple):
    """The same model, twice."""

    model: Model
    other: Other

    @contextlib.contextmanager
    def engine(
        self, disk: Path | None = None, *, redis_url: str | None = None, receipts_path: Path | None = None
    ) -> Iterator[Engine]:
        """An engine with memory and what is named. At its end all is durable, the disk free for another process."""
        settings = small(disk, redis_url=redis_url, receipts_path=receipts_path)
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
        seconds = clock.now() - started
        screen.say(f"{weights / 1e6:.0f} million weights, {model.layout.dtype}, ready after {seconds:.0f} s.")
        yield Stage(model, second)
