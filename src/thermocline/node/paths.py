"""Where nodes listen: a folder that is ours alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from thermocline.errors import NodeError

SOCKET_PATH_BYTES_MAX = 107
"""What the kernel takes for a Unix socket's path."""


def runtime_folder() -> Path:
    """The folder for the sockets of this user's nodes, made where it is missing.

    Raises NodeError where somebody else could reach it: whoever can write there could pretend to be the node.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "thermocline" if base else Path(f"/tmp/thermocline-{os.getuid()}")  # noqa: S108  # owner and mode are checked below
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise NodeError(
            f"cannot make {folder}: {error.strerror}", hint="set XDG_RUNTIME_DIR to a folder of yours, or give --socket"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise NodeError(
            f"{folder} is not a folder that only this user may enter",
            hint="remove it, set XDG_RUNTIME_DIR to a folder of yours, or give --socket",
        )
    return folder


def socket_path(name: str = "node") -> Path:
    """The socket of the node of this name. Raises NodeError as `runtime_folder` does."""
    return checked(runtime_folder() / f"{name}.sock")


def checked(path: Path) -> Path:
    """The path, if a socket can have it. Raises NodeError."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise NodeError(f"{path} is too long for a socket", hint=f"name one of at most {SOCKET_PATH_BYTES_MAX} bytes")
    return path
