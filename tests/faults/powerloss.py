"""A device that loses power: what was not synced may be kept, lost or torn, whichever the seed says.

`Device` records every file call below one folder while the real files are used as ever. `Device.states` then goes
through them once more, and `State.write` writes the folder as a disk may hold it if power had failed there:

- bytes written to a file since its last sync are kept, lost or torn, each sector of 512 bytes by itself; so they are
  reordered too: a later write may be there without an earlier one;
- a new length (truncated, allocated, grown by a write) may be lost as long as the file was not synced;
- a new name, a rename and a removal may be lost as long as the directory was not synced, each by itself.

What was synced is there. Where a sector was written several times since the last sync, it has one of those values.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
NONE, ALL, SOME = "none", "all", "some"


@dataclass(frozen=True)
class Event:
    """One call: `kind` is write, length, sync, link, rename, unlink or sync-names."""

    kind: str
    file: int = -1
    offset: int = 0
    data: bytes = b""
    name: str = ""
    source: str = ""


@dataclass
class _File:
    """A file as the device has it for certain, and what it may have besides."""

    data: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)


class Device:
    """Everything below `root` from now on; what is there already counts as synced."""

    def __init__(self, root):
        self.root = Path(root)
        self.events: list[Event] = []
        self._lock = threading.RLock()
        self._files: dict[int, int] = {}  # open file to file number
        self._folders: set[int] = set()
        self._numbers: dict[str, int] = {}
        self._count = 0
        self.base: dict[str, bytes] = {}
        for entry in sorted(self.root.iterdir()) if self.root.exists() else ():
            self.base[entry.name] = entry.read_bytes()
            self._number(entry.name)

    def __len__(self):
        return len(self.events)

    def _number(self, name):
        self._numbers[name] = self._count
        self._count += 1
        return self._numbers[name]

    def _log(self, kind, **details):
        self.events.append(Event(kind, **details))

    def _ours(self, path):
        try:
            path = Path(os.fspath(path))
        except TypeError:
            return None
        return path.name if path.parent == self.root else None

    @contextmanager
    def recording(self, monkeypatch) -> Iterator[Device]:
        """Put the shim under `os`, for as long as the context lasts."""
        real = {name: getattr(os, name) for name in _CALLS}
        with monkeypatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, getattr(self, f"_{name}")(real[name]))
            yield self

    # -- the calls ---------------------------------------------------------------------------------------------------

    def _open(self, real):
        def call(path, flags, *rest, **named):
            name = self._ours(path)
            with self._lock:
                fresh = name is not None and not os.path.lexists(path)
                fd = real(path, flags, *rest, **named)
                if Path(os.fspath(path)) == self.root:
                    self._folders.add(fd)
                elif name is not None:
                    if fresh:
                        self._log("link", file=self._number(name), name=name)
                    self._files[fd] = self._numbers[name]
                    if flags & os.O_TRUNC and not fresh:
                        self._log("length", file=self._files[fd], offset=0)
                return fd

        return call

    def _close(self, real):
        def call(fd):
            with self._lock:
                self._files.pop(fd, None)
                self._folders.discard(fd)
                real(fd)

        return call

    def _write_call(self, fd, real, offset, data):
        """A write of `data` (as long as it succeeds) at `offset`."""
        got = real()
        if fd in self._files:
            self._log("write", file=self._files[fd], offset=offset, data=data[:got])
        return got

    def _pwrite(self, real):
        def call(fd, data, offset):
            with self._lock:
                return self._write_call(fd, lambda: real(fd, data, offset), offset, bytes(data))

        return call

    def _pwritev(self, real):
        def call(fd, pieces, offset, *flags):
            with self._lock:
                data = b"".join(bytes(piece) for piece in pieces)
                return self._write_call(fd, lambda: real(fd, pieces, offset, *flags), offset, data)

        return call

    def _write(self, real):
        def call(fd, data):
            with self._lock:
                at = os.lseek(fd, 0, os.SEEK_CUR) if fd in self._files else 0
                return self._write_call(fd, lambda: real(fd, data), at, bytes(data))

        return call

    def _ftruncate(self, real):
        def call(fd, length):
            with self._lock:
                real(fd, length)
                if fd in self._files:
                    self._log("length", file=self._files[fd], offset=length)

        return call

    def _posix_fallocate(self, real):
        def call(fd, offset, length):
            with self._lock:
                before = os.fstat(fd).st_size
                real(fd, offset, length)
                if fd in self._files and offset + length > before:
                    self._log("length", file=self._files[fd], offset=offset + length)

        return call

    def _sync(self, real):
        def call(fd):
            with self._lock:
                real(fd)
                if fd in self._folders:
                    self._log("sync-names")
                elif fd in self._files:
                    self._log("sync", file=self._files[fd])
                else:
                    self._sync_unknown(fd)

        return call

    _fsync = _fdatasync = _sync

    def _sync_unknown(self, fd):
        """A file that was opened past `os.open`: what it holds now becomes known."""
        path = Path(f"/proc/self/fd/{fd}").resolve()
        name = self._ours(path)
        if name is not None:
            self._log("link", file=self._number(name), name=name)
            self._log("write", file=self._numbers[name], data=path.read_bytes())
            self._log("sync", file=self._numbers[name])

    def _rename(self, real):
        def call(source, target, **named):
            with self._lock:
                real(source, target, **named)
                old, new = self._ours(source), self._ours(target)
                if old is not None and new is not None:
                    number = self._numbers[new] = self._numbers.pop(old)
                    self._log("rename", file=number, name=new, source=old)

        return call

    def _unlink(self, real):
        def call(path, **named):
            with self._lock:
                real(path, **named)
                name = self._ours(path)
                if name is not None and self._numbers.pop(name, None) is not None:
                    self._log("unlink", name=name)

        return call

    _remove = _unlink

    # -- the cut -----------------------------------------------------------------------------------------------------

    def states(self) -> Iterator[State]:
        """The device before the first call, and after each one. It is one object that moves on."""
        state = State(self)
        yield state
        for event in self.events:
            state.take(event)
            yield state


class State:
    """What a device has for certain, and what it may have. Moves on event by event."""

    def __init__(self, device):
        self._files = {number: _File(bytearray(device.base[name])) for number, name in enumerate(device.base)}
        self._names = {name: number for number, name in enumerate(device.base)}
        self._pending_names: list[Event] = []

    def take(self, event):
        """The next call happens."""
        if event.kind in {"link", "rename", "unlink"}:
            self._pending_names.append(event)
            if event.kind == "link":
                self._files[event.file] = _File()
        elif event.kind == "sync-names":
            for change in self._pending_names:
                _rename(self._names, change)
            self._pending_names.clear()
        elif event.kind == "sync":
            file = self._files[event.file]
            for change in file.pending:
                _change(file.data, change)
            file.pending.clear()
        else:
            self._files[event.file].pending.append(event)

    def write(self, folder, keep, rng):
        """Write one of the states that a power cut may leave; returns the number of unsynced events."""
        folder = Path(folder)
        folder.mkdir()
        names = dict(self._names)
        for change in self._pending_names:
            if keep == ALL or (keep == SOME and rng.random() < 0.5):
                _rename(names, change)
        for name, number in names.items():
            file = self._files[number]
            data = bytearray(file.data)
            for change in file.pending if keep != NONE else ():
                _change(data, change, None if keep == ALL else rng)
            (folder / name).write_bytes(data)
        return len(self._pending_names) + sum(len(file.pending) for file in self._files.values())


def _rename(names, change):
    if change.kind == "unlink":
        names.pop(change.name, None)
        return
    names[change.name] = change.file
    if names.get(change.source) == change.file:
        del names[change.source]


def _change(data, change, rng=None):
    """Apply a write or a new length; with `rng` wholly, in part, or not at all."""
    fate = rng.choice((ALL, NONE, SOME)) if rng else ALL
    if fate == NONE:
        return
    if change.kind == "length":
        del data[change.offset :]
        data.extend(bytes(change.offset - len(data)))
        return
    end = change.offset + len(change.data)
    if fate == ALL:
        data.extend(bytes(max(0, end - len(data))))
        data[change.offset : end] = change.data
        return
    sectors = [at for at in range(0, len(change.data), SECTOR) if rng.random() < 0.5]
    if rng.random() < 0.5:  # the length may be there without the bytes
        data.extend(bytes(max(0, end - len(data))))
    for at in sectors:
        part = change.data[at : at + SECTOR]
        start = change.offset + at
        data.extend(bytes(max(0, start + len(part) - len(data))))
        data[start : start + len(part)] = part


_CALLS = (
    "open",
    "close",
    "pwrite",
    "pwritev",
    "write",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "remove",
)
