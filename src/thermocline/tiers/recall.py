"""What a damaged log forgot of blocks that are held: their frames say it too."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import PAGE_BYTES, Header, read_header
from thermocline.tiers.journal import Records, rows
from thermocline.tiers.segments import Segments, aligned_memory


def recall(live: Records, held: Records, segments: Segments, stored_wall_seconds: float) -> Records:
    """Records of held blocks that a log does not name, with what their header pages say of parent and depth.

    `held` has key, layout, place and length of each. A block whose header does not verify is left out. When it was
    stored is not known: `stored_wall_seconds` stands for it.
    """
    lacking = rows(held, np.flatnonzero(~_named(live, held))).copy()
    page = aligned_memory(PAGE_BYTES)
    found = []
    for at in range(len(lacking)):
        record = lacking[at]
        header = _header(segments, record, page)
        if header is not None:
            record["parent"], record["depth"] = np.void(header.parent), header.depth
            found.append(at)
    lacking["stored"] = stored_wall_seconds
    return rows(lacking, np.array(found, np.int64))


def _named(live: Records, held: Records) -> NDArray[np.bool_]:
    """Which held blocks the log names, in the place where they are."""
    if not len(live):
        return np.zeros(len(held), bool)
    there, wanted = (part["segment"].astype(np.int64) << 32 | part["slot"] for part in (live, held))
    order = np.argsort(there)
    at = order[np.minimum(np.searchsorted(there[order], wanted), len(live) - 1)]
    named: NDArray[np.bool_] = there[at] == wanted
    for name in ("key", "layout"):
        named &= live[name][at] == held[name]
    return named


def _header(segments: Segments, record: Records, page: NDArray[np.uint8]) -> Header | None:
    """The header of the frame in a record's place, if it is that of the record's block."""
    offset = int(record["slot"]) * int(record["slot_pages"]) * PAGE_BYTES
    try:
        os.preadv(segments.fd(int(record["segment"])), [page.data], offset)
    except OSError:
        return None
    header = read_header(page)
    names = (record["key"].tobytes(), record["layout"].tobytes(), int(record["length"]))
    return header if header and (header.key, header.layout, header.length_bytes) == names else None
