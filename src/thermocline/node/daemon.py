"""The process of a node: from start to the last byte made durable."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from thermocline.clock import Clock, SystemClock
from thermocline.node.announce import Announcer
from thermocline.node.paths import checked
from thermocline.node.server import NodeServer
from thermocline.store.store import Store

LOG = logging.getLogger("thermocline.node")
SWITCH_SECONDS = 0.0005
"""How long one thread may keep the others from running Python: an answer takes a tenth of this."""
LOOK_SECONDS = 0.2


def run(
    open_store: Callable[[], Store],
    path: Path,
    lease_seconds: float,
    *,
    idle_exit_seconds: float | None = None,
    as_json: bool = False,
    clock: Clock | None = None,
    announce: Callable[[Store], Announcer | None] = lambda _: None,
) -> None:
    """Serve the store that `open_store` gives until SIGINT or SIGTERM, or until nobody was there for some time.

    Announces the socket on stdout once clients can connect. `announce` gives what tells routers of the store's blocks.
    Raises what opening the store and announcing raise, and NodeError where the socket cannot be had.
    """
    checked(path)
    clock = clock or SystemClock()
    stop = threading.Event()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(SWITCH_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.closing(open_store()) as store, contextlib.ExitStack() as opened:
        announcer = announce(store)
        if announcer is not None:
            opened.callback(announcer.close)
        server = NodeServer(store, path, lease_seconds=lease_seconds, clock=clock, announcer=announcer)
        with contextlib.closing(server):
            _announce(server, as_json=as_json)
            while not stop.wait(LOOK_SECONDS):
                if idle_exit_seconds is not None and server.idle_seconds() > idle_exit_seconds:
                    LOG.info("nobody was connected for %g s", idle_exit_seconds)
                    break
            LOG.info("draining")
        LOG.info("writing down what only memory holds")


def _announce(server: NodeServer, *, as_json: bool) -> None:
    text = json.dumps({"socket": str(server.path)}) if as_json else f"node listens at {server.path}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
