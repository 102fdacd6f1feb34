"""Handing KV events on: engines connect to one address, and every process that wants them hears them."""

from __future__ import annotations

import logging
import os
import threading

import zmq

from thermocline.wire.events import PAYLOAD_BYTES_MAX
from thermocline.wire.publisher import Endpoint

LOG = logging.getLogger("thermocline.events")
WAITING_MAX = 10_000


class Forwarder:
    """Binds both endpoints; a thread passes events one way and subscriptions the other, so late comers are told all.

    Raises SettingsError where an endpoint cannot be had.
    """

    def __init__(self, comes: str, goes: str) -> None:
        self.dropped = 0
        self._context = zmq.Context()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._in, self._out = (self._socket(kind, text) for kind, text in ((zmq.XSUB, comes), (zmq.XPUB, goes)))
            self._out.set(zmq.XPUB_VERBOSE, 1)
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._run, name="kv events forwarder", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 2.0) -> None:
        """Pass nothing on any more. A second call does nothing."""
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join(seconds)
            os.close(self._wake)

    def _socket(self, kind: int, text: str) -> zmq.Socket[bytes]:
        sock = self._context.socket(kind)
        sock.set(zmq.RCVHWM, WAITING_MAX)
        sock.set(zmq.SNDHWM, WAITING_MAX)
        sock.set(zmq.MAXMSGSIZE, PAYLOAD_BYTES_MAX)
        Endpoint.parse(text, binds=True).open(sock)
        return sock

    def _run(self) -> None:
        poller = zmq.Poller()
        ways = {self._in: self._out, self._out: self._in}
        for each in (self._wake, *ways):
            poller.register(each, zmq.POLLIN)
        try:
            while True:
                for sock, _ in poller.poll():
                    if sock not in ways:
                        return
                    try:
                        ways[sock].send_multipart(sock.recv_multipart(zmq.NOBLOCK), zmq.NOBLOCK)
                    except zmq.Again:  # this one is lost, and is a gap for those who would have heard it
                        self.dropped += 1
        except Exception:  # gateways go on without events, and say so
            LOG.exception("KV events are passed on no more")
        finally:
            self._context.destroy(linger=0)
