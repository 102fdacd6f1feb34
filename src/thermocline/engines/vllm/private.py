"""A node that nobody started: the first engine that needs it does, and it ends by itself soon after the last."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable

from thermocline.engines.vllm.config import NOT_THE_NODES, NodeChoice
from thermocline.errors import LaunchError

LOG = logging.getLogger("thermocline.vllm")
ORPHAN_SECONDS = 60.0
"""It ends when nobody was connected for so long: longer than an engine takes to start again, mostly."""
LOOK_SECONDS = 0.5
RESTART_SECONDS, RESTART_SECONDS_MAX = 1.0, 30.0
_DETACHED = '"$@" >&2 & echo $!'


class PrivateNode:
    """Keeps a node running for this engine, and for others with the same settings: they have the same socket.

    It is no descendant of the engine, as vLLM ends its own by force: so it can write down what only memory holds, and
    an engine that is back soon finds all of it.
    """

    def __init__(self, choice: NodeChoice, is_up: Callable[[], bool]) -> None:
        """`is_up` says whether this engine is attached: then somebody runs a node. Raises LaunchError."""
        assert choice.settings is not None
        words = [sys.executable, "-m", "thermocline", "node", "--socket", str(choice.socket)]
        self._words = [*words, "--idle-exit", f"{ORPHAN_SECONDS:g}", *choice.settings.flags(without=NOT_THE_NODES)]
        self._is_up = is_up
        self._closing = threading.Event()
        self.pid = 0
        self._fd = -1
        if not is_up():
            self._start()
        self._thread = threading.Thread(target=self._keep, name="thermocline node", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look after it no more. A second call does nothing."""
        self._closing.set()
        self._thread.join()
        self._forget()

    def _start(self) -> None:
        """Through a shell that ends at once: the node then belongs to nobody."""
        self._forget()
        try:
            told = subprocess.run(  # noqa: S603  # ourselves
                ["/bin/sh", "-c", _DETACHED, "sh", *self._words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the engine
                check=True,
            )
            self.pid = int(told.stdout)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise LaunchError(
                f"cannot start a node: {error}", hint="start `thermocline node`, and name its socket"
            ) from None
        try:
            self._fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            LOG.warning("the private node ended at once")
        LOG.info("started a private node (process %d)", self.pid)

    def _keep(self) -> None:
        """Start one again when it dies, each time after a longer pause: its disk may still be another's for a while."""
        pause = RESTART_SECONDS
        while not self._closing.wait(LOOK_SECONDS):
            if self._is_up():
                pause = RESTART_SECONDS
            elif self._ended():
                if self._closing.wait(pause) or self._is_up():
                    continue
                pause = min(2 * pause, RESTART_SECONDS_MAX)
                LOG.warning("there is no private node any more; another one is started")
                try:
                    self._start()
                except LaunchError as error:
                    LOG.warning("%s; hint: %s", error.message, error.hint)

    def _ended(self) -> bool:
        return self._fd < 0 or bool(select.select([self._fd], [], [], 0)[0])

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
