"""A second process with the same model. `python -m thermocline.demo.other` reads requests, one JSON object a line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from thermocline.errors import ThermoclineError
from thermocline.settings import Settings
from thermocline.store.receipt import Reason

MIB = 1024 * 1024
THREADS = 1
"""Computing on one thread makes figures that do not depend on who else uses the machine."""
MODEL = "tiny"


def small(path: Path | None = None, *, redis_url: str | None = None, receipts_path: Path | None = None) -> Settings:
    """Small tiers: memory, and those that are named. Redis is asked whatever it gains."""
    return Settings(
        memory_bytes=256 * MIB,
        disk_path=path,
        disk_bytes=512 * MIB,
        redis_url=redis_url,
        redis_gain_min=0.0,
        receipts_path=receipts_path,
    )


class Ask(msgspec.Struct, frozen=True):
    """Open a store, with a disk tier at `path` or a Redis server as given; or answer `tokens`, if there are any."""

    path: str | None = None
    redis_url: str | None = None
    tokens: tuple[int, ...] = ()
    new_tokens: int = 0
    save: bool = True


class Told(msgspec.Struct, frozen=True):
    """What came of it. `reasons` say why not more was loaded, TAIL left out."""

    tokens: tuple[int, ...] = ()
    cached_tokens: int = 0
    first_token_seconds: float = 0.0
    match_seconds: float = 0.0
    reasons: tuple[Reason, ...] = ()


class Other:
    """The first process's view of the second."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def wait_ready(self) -> None:
        """Wait until the model is loaded."""
        self._read()

    def open(self, path: Path | None, *, redis_url: str | None = None) -> None:
        """Have it open a new store: with a disk tier that no other process has open, or a Redis server."""
        self._ask(Ask(None if path is None else str(path), redis_url))

    def answer(self, tokens: Sequence[int], new_tokens: int, *, save: bool = True) -> Told:
        """Have it answer."""
        return self._ask(Ask(tokens=tuple(tokens), new_tokens=new_tokens, save=save))

    def _ask(self, ask: Ask) -> Told:
        assert self._process.stdin is not None
        print(msgspec.json.encode(ask).decode(), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Told:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ThermoclineError("the second process of the demo ended early", hint="what it said is above")
        return msgspec.json.decode(line, type=Told)


@contextlib.contextmanager
def started() -> Iterator[Other]:
    """Start it; it ends with the context."""
    words = [sys.executable, "-m", "thermocline.demo.other"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Other(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def serve(asked: IO[str], told: IO[str]) -> None:
    """Be the second process, until `asked` ends."""
    from thermocline.build import store_from
    from thermocline.engines.models import load_model
    from thermocline.engines.transformers import Engine

    def tell(answer: Told) -> None:
        print(msgspec.json.encode(answer).decode(), file=told, flush=True)

    model = load_model(MODEL, threads=THREADS)
    tell(Told())
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(Engine(model)))
        for line in asked:
            ask = msgspec.json.decode(line, type=Ask)
            if ask.path or ask.redis_url:
                opened = small(Path(ask.path) if ask.path else None, redis_url=ask.redis_url)
                store = stack.enter_context(contextlib.closing(store_from(opened)))
                engine = stack.enter_context(contextlib.closing(Engine(model, store)))
            if not ask.tokens:
                tell(Told())
                continue
            result = engine.generate(ask.tokens, ask.new_tokens, save=ask.save)
            missing = result.receipt.missing if result.receipt else ()
            reasons = tuple(dict.fromkeys(part.reason for part in missing if part.reason is not Reason.TAIL))
            matching = result.receipt.match_seconds if result.receipt else 0.0
            tell(Told(result.tokens, result.cached_tokens, result.first_token_seconds, matching, reasons))


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
