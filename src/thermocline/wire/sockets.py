"""Where a process listens: on TCP, or at a Unix socket of its user alone."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thermocline.errors import ThermoclineError

BACKLOG = 511
PROBE_SECONDS = 0.5


def listening(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket, not listening yet: a port in use is found first, and nobody connects too early.

    With `shared`, other processes may bind the same address, and the kernel spreads connections.

    Raises ThermoclineError where it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        msg = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise ThermoclineError(msg, hint="stop what listens there, or choose another port with --port") from None
    return sock


def private_socket(
    path: Path, who: str, *, hint: str, error: type[ThermoclineError] = ThermoclineError
) -> socket.socket:
    """A listening socket that nobody else can open, not even for a moment. What an ended `who` left is replaced.

    Raises `error` with the hint where it cannot be had, where another `who` listens there, and for what is no socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone(path.parent):
            _clear(path, who, hint, error)
            before = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(before)
            sock.listen(BACKLOG)
    except OSError as wrong:
        sock.close()
        raise error(f"cannot listen at {path}: {wrong.strerror or wrong}", hint=hint) from None
    except ThermoclineError:
        sock.close()
        raise
    return sock


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time takes a place in this folder: of two, the second would take away the first one's socket."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _clear(path: Path, who: str, hint: str, error: type[ThermoclineError]) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise error(f"{path} is there and is no socket", hint=hint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as wrong:
            raise error(f"{path}: {wrong.strerror or 'no answer'}", hint=f"end the {who} that hangs there") from None
    raise error(f"another {who} listens at {path}", hint=hint)
