"""Costs between runs: what was learned goes to a small JSON file, and the next process on this machine begins there.

A file that is damaged, or of another machine or version, is not used: then costs are measured anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
from pathlib import Path

import msgspec

from thermocline.costs.model import CostsState, FitState, LearnedCosts
from thermocline.errors import SettingsError

LOG = logging.getLogger("thermocline.costs")
VERSION = 1
FILE_BYTES_MAX = 1 << 20
SAVE_SECONDS = 300.0
CLOSE_SECONDS = 5.0


class _File(msgspec.Struct, frozen=True):
    version: int
    machine: str
    costs: CostsState


def machine() -> str:
    """What decides how long things take, as far as a name can tell: the processor and how many of it may be used."""
    return f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores"


def cpu_model() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read(path: Path) -> CostsState:
    """What was learned on this machine before; nothing where there is no file, or none that can be used."""
    try:
        found = _decoded(path)
    except FileNotFoundError:
        return CostsState()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        LOG.warning("the costs saved in %s are not used: %s", path, error)
        return CostsState()
    if (found.version, found.machine) != (VERSION, machine()):
        LOG.info("the costs saved in %s are of another machine or version", path)
        return CostsState()
    return found.costs


def _decoded(path: Path) -> _File:
    with path.open("rb") as file:
        body = file.read(FILE_BYTES_MAX + 1)
    if len(body) > FILE_BYTES_MAX:
        raise msgspec.DecodeError("it is too large")
    return msgspec.json.decode(body, type=_File)


def write(path: Path, costs: CostsState) -> bool:
    """Replace the file in one step, readable by its owner only. False, and a warning, where that cannot be done."""
    try:
        replace(path, msgspec.json.encode(_File(VERSION, machine(), costs)))
    except OSError as error:
        LOG.warning("what was learned of costs is not saved to %s: %s", path, error)
        return False
    return True


def replace(path: Path, body: bytes) -> None:
    """Give a file this content in one step, readable by its owner only. Raises OSError, and then nothing is left."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(body)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def put(path: Path, body: bytes) -> None:
    """The same for a file that somebody asked for. Raises SettingsError where that cannot be done."""
    try:
        replace(path, body)
    except OSError as error:
        hint = "name a file in a folder that may be written to"
        raise SettingsError(f"cannot write {path}: {error.strerror}", hint=hint) from None


class SavedCosts(LearnedCosts):
    """Learned costs that begin with a file, and go there every few minutes and when they are closed."""

    def __init__(self, path: Path, *, measured: FitState | None = None, save_seconds: float = SAVE_SECONDS) -> None:
        super().__init__(read(path), measured)
        self._path, self._save_seconds = path, save_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._save_now_and_then, name="costs", daemon=True)
        self._thread.start()

    def _save_now_and_then(self) -> None:
        while not self._closing.wait(self._save_seconds):
            write(self._path, self.state())
        write(self._path, self.state())

    def close(self) -> None:
        """Save, in the thread that always does. A second call does nothing."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)  # and no longer, where the device hangs
