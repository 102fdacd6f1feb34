"""Pages in a GPU's memory: blocks are gathered and scattered on the device, and cross the bus in large copies.

A load is copied from the node's memory into a private pinned bay, verified there, sent to the device on a stream of its
own and scattered into the pages; it has ended when the device says so. A save is gathered behind what the engine has
queued, and goes straight into slots of the node's memory where that is registered with the driver, or through a bay.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.engines.vllm.layout import Span
from thermocline.node.client import NodeClient
from thermocline.node.committer import Lent, Part, Save
from thermocline.node.places import Places
from thermocline.store.receipt import Missing
from thermocline.store.receipts import Loaded
from thermocline.tiers.tier import Job, Outcome, Piece

LOG = logging.getLogger("thermocline.vllm")
BAY_BYTES = 32 << 20
"""What crosses the bus at once: large enough for its full speed, small enough that two hide behind each other."""
BAYS = 2
WORD_BYTES = 8


class Mark(Protocol):
    """A point in a queue of the device."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


class Lane(Protocol):
    """A queue of work for the device, beside the engine's own."""

    def behind_engine(self) -> None:
        """What is queued from now on comes after what the engine has queued."""

    def before_engine(self) -> None:
        """What the engine queues from now on comes after what is queued here."""

    def behind(self, mark: Mark) -> None:
        """What is queued from now on comes after that point of another queue."""

    def enter(self) -> AbstractContextManager[object]:
        """Within it, copies and kernels are queued here."""

    def mark(self) -> Mark:
        """The end of the queue now."""


class CudaLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here

    def behind_engine(self) -> None:
        """See `Lane.behind_engine`: the engine's is the stream that is current in the calling thread."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def before_engine(self) -> None:
        """See `Lane.before_engine`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def behind(self, mark: Mark) -> None:
        """See `Lane.behind`."""
        if isinstance(mark, torch.cuda.Event):  # else it was reached before anything was queued
            self._stream.wait_event(mark)

    def enter(self) -> AbstractContextManager[object]:
        """See `Lane.enter`."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """See `Lane.mark`."""
        mark: Mark = self._stream.record_event()
        return mark


class HostLane:
    """For memory that the processor computes on: everything has happened when a call returns."""

    def behind_engine(self) -> None:
        """Nothing is queued."""

    def before_engine(self) -> None:
        """Nothing is queued."""

    def behind(self, mark: Mark) -> None:
        """Nothing is queued."""

    def enter(self) -> AbstractContextManager[object]:
        """Nothing to enter."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """Where we are already."""
        return _HERE


class _Here:
    def synchronize(self) -> None:
        """Nothing to wait for."""


_HERE = _Here()


def lane_for(device: torch.device) -> Lane:
    """The lane that this kind of memory needs."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class Blocks:
    """The blocks in an engine's pages as rows: gathered side by side, or scattered to where they belong."""

    def __init__(self, spans: Sequence[Span], regions: Sequence[torch.Tensor]) -> None:
        """`regions` are one-dimensional tensors of bytes: the engine's allocations, by the number in the spans."""
        self.device = regions[0].device
        self.block_bytes = sum(span.nbytes for span in spans)
        sizes = [
            WORD_BYTES,
            self.block_bytes,
            *(size for span in spans for size in (span.offset, span.stride, span.nbytes)),
        ]
        word = WORD_BYTES if all(size % WORD_BYTES == 0 for size in sizes) and _aligned(regions) else 1
        self._kind = torch.int64 if word == WORD_BYTES else torch.uint8
        self._parts: list[tuple[torch.Tensor, int, int]] = []
        at = 0
        for span in spans:
            region = regions[span.region].view(self._kind)
            pages = (regions[span.region].numel() - span.offset - span.nbytes) // span.stride + 1
            rows = region.as_strided((pages, span.nbytes // word), (span.stride // word, 1), span.offset // word)
            self._parts.append((rows, at // word, (at + span.nbytes) // word))
            at += span.nbytes
        self.pages = min(part.shape[0] for part, _, _ in self._parts)

    def rows(self, count: int) -> torch.Tensor:
        """Room on the device for so many blocks, for `gather` and `scatter`."""
        row = self.block_bytes // self._kind.itemsize
        return torch.empty((count, row), dtype=self._kind, device=self.device)

    def ids(self, pages: Sequence[int]) -> torch.Tensor:
        """Page numbers on the device. Raises IndexError for one that does not exist."""
        if pages and not 0 <= min(pages) <= max(pages) < self.pages:
            raise IndexError(f"there are pages 0 to {self.pages - 1}")
        return torch.tensor(pages, dtype=torch.int64).to(self.device)

    def gather(self, ids: torch.Tensor, into: torch.Tensor) -> None:
        """Copy the blocks in these pages into the first rows of `into`."""
        for rows, start, stop in self._parts:
            into[: len(ids), start:stop] = rows.index_select(0, ids)

    def scatter(self, ids: torch.Tensor, source: torch.Tensor) -> None:
        """Copy the first rows of `source` into these pages."""
        for rows, start, stop in self._parts:
            rows.index_copy_(0, ids, source[: len(ids), start:stop])


def _aligned(regions: Sequence[torch.Tensor]) -> bool:
    return all(region.data_ptr() % WORD_BYTES == 0 and region.numel() % WORD_BYTES == 0 for region in regions)


@dataclass(slots=True)
class _Bay:
    """Private host memory that the bus reads from or writes to, and its match on the device."""

    host: torch.Tensor
    device: torch.Tensor
    free: Mark

    def pieces(self, count: int) -> list[list[Piece]]:
        """The first rows as pieces, one per block."""
        rows = self.host[:count].view(torch.uint8).numpy()
        return [[row] for row in rows]


class Registered:
    """The node's memory, known to the driver: the bus then writes into it directly. Each life of a node has its own.

    Registering pins every page, which takes about a second per some gigabytes, so a thread does it; until then, and
    where the driver refuses, saves go through bays.
    """

    def __init__(self, register: Callable[[Piece], bool]) -> None:
        self._register = register
        self._asked: set[int] = set()
        self._done: set[int] = set()

    def holds(self, incarnation: int, memory: Callable[[], Piece | None]) -> bool:
        """True once this life's memory is registered. The first question starts it."""
        if incarnation not in self._asked:
            self._asked.add(incarnation)
            start = threading.Thread(target=self._try, args=(incarnation, memory), name="register", daemon=True)
            start.start()
        return incarnation in self._done

    def _try(self, incarnation: int, memory: Callable[[], Piece | None]) -> None:
        mapped = memory()
        if mapped is not None and self._register(mapped):
            self._done.add(incarnation)
        else:
            LOG.warning("the node's memory cannot be registered with the driver; saves take one copy more")


def cuda_register(memory: Piece) -> bool:
    """Have the driver pin this memory for as long as the process lives. False where it refuses."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types here
    return int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0


@dataclass(frozen=True, slots=True)
class _Copy:
    """A part of a save on its way from the device. In `bay` if not in the slots themselves when it `arrived`."""

    arrived: Mark
    part: Part
    bay: _Bay
    direct: bool


class DevicePages:
    """See `GroupPages`. One lane loads, another saves, and a thread commits what has arrived."""

    def __init__(
        self,
        client: NodeClient,
        layout: Layout,
        spans: Sequence[Span],
        regions: Sequence[torch.Tensor],
        registered: Registered | None = None,
    ) -> None:
        """`regions` as in `Blocks`. Without `registered`, every save goes through a bay."""
        self.layout = layout
        self._client = client
        self._registered = registered
        self._blocks = Blocks(spans, regions)
        self._loading, self._saving = lane_for(self._blocks.device), lane_for(self._blocks.device)
        self._gathered: Mark = _HERE
        self._window = max(1, BAY_BYTES // layout.block_bytes)
        self._load_bays = [self._bay() for _ in range(BAYS)]
        self._save_bays: queue.SimpleQueue[_Bay] = queue.SimpleQueue()
        for _ in range(BAYS):
            self._save_bays.put(self._bay())
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._commit_all, name="device saves", daemon=True)
        self._thread.start()

    def _bay(self) -> _Bay:
        rows = self._blocks.rows(self._window)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        return _Bay(host, rows, _HERE)

    # -- load ----------------------------------------------------------------------------------------------------------

    def load(self, places: Places, pages: Sequence[int]) -> Loaded:
        """See `GroupPages.load`. Only what was verified in the bay is sent; while it travels the next bay is filled.

        Pages that have left a sliding window are given to a load while a step under way still saves what was in them:
        nothing is written into pages before what was to be saved until now is gathered.
        """
        done, seconds = 0, 0.0
        missing: tuple[Missing, ...] = ()
        for number, at in enumerate(range(0, len(pages), self._window)):
            bay = self._load_bays[number % BAYS]
            bay.free.synchronize()
            stop = min(at + self._window, len(pages))
            part = self._client.fetch(places.part(at, stop), bay.pieces(stop - at))
            self._send(bay, pages[at : at + part.blocks])
            done, seconds = done + part.blocks, seconds + part.seconds
            if part.missing:
                missing = (Missing(done, len(pages), part.missing[0].reason, part.missing[0].detail),)
                break
        for bay in self._load_bays:
            bay.free.synchronize()
        return Loaded(done, {"memory": done} if done else {}, missing, seconds)

    def behind_engine(self) -> None:
        """See `GroupPages.behind_engine`."""
        self._loading.behind_engine()

    def _send(self, bay: _Bay, pages: Sequence[int]) -> None:
        if not pages:
            return
        with self._loading.enter():
            ids = self._blocks.ids(pages)
            bay.device[: len(pages)].copy_(bay.host[: len(pages)], non_blocking=True)
            self._loading.behind(self._gathered)
            self._blocks.scatter(ids, bay.device)
            bay.free = self._loading.mark()

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(self, keys: Sequence[BlockKey], pages: Sequence[int], start: int) -> Job:
        """See `GroupPages.save`. Queues the copies and returns; what finds no slot or no bay free is LATE.

        The engine's stream waits for the gathering, which runs at the speed of the device's own memory, and not for the
        bus: the pages may be written again behind it.
        """
        ids = self._blocks.ids(pages)
        save = Save(self.layout, keys, start, Job([Outcome.PENDING] * len(pages)))
        at = 0
        while at < len(pages) and (taken := self._save_window(save, ids, at)):
            at += taken
        save.refuse(at, Outcome.LATE)
        save.sealed()
        return save.job

    def _save_window(self, save: Save, ids: torch.Tensor, at: int) -> int:
        """Queue the copies of as many blocks as a bay and the slots lent take; returns how many."""
        lent = self._client.lend(self.layout, min(self._window, len(ids) - at))
        try:
            bay = self._save_bays.get_nowait() if lent else None
        except queue.Empty:
            self._client.give_back(lent)
            bay = None
        if bay is None:
            return 0
        try:
            self._copies.put(self._queued(save, ids, at, lent, bay))
        except BaseException:  # what it may still write into a slot, the sum of that slot's next block tells
            self._save_bays.put(bay)
            self._client.give_back(lent)
            raise
        return len(lent)

    def _queued(self, save: Save, ids: torch.Tensor, at: int, lent: Sequence[Lent], bay: _Bay) -> _Copy:
        """Copies that the device has been told of."""
        direct = self._registered is not None and self._registered.holds(
            lent[0].link.incarnation, lambda: self._client.memory_of(lent[0].link.incarnation)
        )
        self._saving.behind_engine()
        with self._saving.enter():
            self._blocks.gather(ids[at : at + len(lent)], bay.device)
            self._saving.before_engine()
            self._gathered = self._saving.mark()
            if direct:
                for slot, row in zip(lent, bay.device, strict=False):
                    torch.from_numpy(slot.view).view(row.dtype).copy_(row, non_blocking=True)
            else:
                bay.host[: len(lent)].copy_(bay.device[: len(lent)], non_blocking=True)
            arrived = self._saving.mark()
        return _Copy(arrived, save.part(at, lent), bay, direct)

    def relabel(self, layout: Layout) -> None:
        """See `GroupPages.relabel`."""
        self._client.ready(layout, self._client.unready(self.layout))
        self.layout = layout

    def close(self) -> None:
        """See `GroupPages.close`."""
        if self._thread.is_alive():
            self._copies.put(None)
            self._thread.join()

    def _commit_all(self) -> None:
        while (copy := self._copies.get()) is not None:
            try:
                copy.arrived.synchronize()
                if not copy.direct:
                    for slot, (row,) in zip(copy.part.lent, copy.bay.pieces(len(copy.part.lent)), strict=True):
                        np.copyto(slot.view, row)
                self._client.commit_part(copy.part)
            except Exception:  # the next save wants this thread; this one's blocks are not kept
                LOG.exception("a save from the device failed")
                copy.part.save.ended(copy.part.at, [Outcome.FAILED] * len(copy.part.lent))
                self._client.give_back(copy.part.lent)
            self._save_bays.put(copy.bay)
