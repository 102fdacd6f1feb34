"""The API of a live engine, in this process."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

from thermocline.engines import api
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings
from thermocline.wire.http import Limits, url_of
from thermocline.wire.sockets import listening


class ApiServer:
    """Serves an engine from a thread of its own, as `thermocline serve` does. Closing it leaves engine and store open.

    Listens once made; `url` says where. Raises ThermoclineError for a port in use.
    """

    def __init__(self, engine: Engine, settings: Settings, *, limits: Limits | None = None) -> None:
        self._sock = listening(settings.host, settings.port)
        self._api = api._Api(engine, settings)
        self._limits = limits
        self.url = url_of(self._sock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: api._run(self._serve(started)), name="api", daemon=True)
        self._thread.start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = self._api.server(self._limits)
        await server.start(self._sock)
        started.set()
        await self._stop.wait()
        await server.stop(api.DRAIN_SECONDS)

    def close(self) -> None:
        """Drain and stop. A second call does nothing."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
