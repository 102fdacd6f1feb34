"""Chapter: a flipped bit on disk is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, frame_bytes, payload_sum, read_header
from thermocline.blocks.key import NO_PARENT, BlockKey, block_keys, root_key
from thermocline.blocks.layout import Layout
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.lens import report
from thermocline.store.receipt import Reason
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Block, Outcome

MIB = 1024 * 1024
BLOCK_BYTES = 16 * 1024
BLOCKS = 256
FLIPS = 200
TOKENS_PER_BLOCK = 32
LAYOUT = Layout(
    model="demo",
    weights_digest=bytes(32),
    dtype="bfloat16",
    kv_dtype="bfloat16",
    layers=4,
    kv_heads=1,
    head_dim=32,
    tokens_per_block=TOKENS_PER_BLOCK,
    block_bytes=BLOCK_BYTES,
    engine="demo",
    engine_version="1",
    isa="any",
    order="layer",
)


def play(screen: Screen, folder: Path) -> Chapter:
    """One bit, with the receipt that explains the miss; then one random bit in each of 200 blocks."""
    screen.say(f"{BLOCKS} blocks of {BLOCK_BYTES // 1024} KiB are saved to a disk tier and made durable.")
    explained = _one_bit(screen, folder / "one")
    refused, wrong, whole = _many_bits(folder / "many")
    ok = explained and refused == FLIPS and wrong == 0 and whole == BLOCKS - FLIPS
    screen.say(f"Then one random bit in each of {FLIPS} blocks, headers and payloads alike:")
    verdict = f"{refused} of {FLIPS} refused, {wrong} wrong bytes handed out, the other {whole} blocks load"
    figure = f"{refused} of {FLIPS} flipped bits refused, {wrong} wrong"
    claim = Claim("taken for granted: a hit returns what was saved", figure, "make test")
    details = {"flips": FLIPS, "refused": refused, "wrong": wrong, "intact_loaded": whole, "explained": explained}
    return Chapter(ok, verdict, claim, details)


def _one_bit(screen: Screen, folder: Path) -> bool:
    """Save a prompt, restart, damage its 100th block, ask for all of it; True if exactly what is intact was loaded."""
    tokens = np.random.default_rng(1).integers(0, 50_000, BLOCKS * TOKENS_PER_BLOCK + 1, dtype=np.uint32)
    keys = block_keys(tokens.data, root=root_key(), tokens_per_block=TOKENS_PER_BLOCK)
    payloads = _payloads(2)
    store = _open(folder)
    store.save(LAYOUT, keys, [[payload] for payload in payloads])
    store.close()

    victim = 100
    path, offset = _frames(folder)[keys[victim]]
    _flip(path, offset + PAGE_BYTES, 8 * 12_345 + 3)
    screen.say(f"One bit of block {victim} is flipped in {path.name}. The store is reopened and asked for all of it:")

    store = _open(folder)
    plan = store.match([LAYOUT], keys, prompt_tokens=len(tokens))
    into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(plan.blocks)]
    loaded = store.load(plan, 0, into)
    store.release(plan.lease)
    receipt = store.receipts.record("demo", tokens, plan, loaded, prefill_seconds=0.0)
    store.close()
    screen.quote(report.render(receipt))
    right = all(np.array_equal(into[at][0], payloads[at]) for at in range(loaded.blocks))
    return right and loaded.blocks == victim and receipt.missing[0].reason is Reason.CORRUPT


def _many_bits(folder: Path) -> tuple[int, int, int]:
    """(refused, handed out wrong, handed out intact) after a flip in each of FLIPS blocks."""
    random = np.random.default_rng(3)
    tier = DiskTier(folder, 32 * MIB)
    keys = [BlockKey(random.bytes(32)) for _ in range(BLOCKS)]
    payloads = _payloads(4)
    blocks = [Block(NO_PARENT, 1, [payload], payload_sum([payload])) for payload in payloads]
    tier.save(LAYOUT.id, keys, blocks).wait()
    frames = _frames(folder)
    for victim in random.permutation(BLOCKS)[:FLIPS]:
        _flip(*frames[keys[victim]], int(random.integers(8 * frame_bytes(BLOCK_BYTES))))
    into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys]
    outcomes = tier.load(LAYOUT.id, keys, into, math.inf)
    tier.close()
    hits = [at for at, outcome in enumerate(outcomes) if outcome is Outcome.HIT]
    intact = sum(np.array_equal(into[at][0], payloads[at]) for at in hits)
    return outcomes.count(Outcome.CORRUPT), len(hits) - intact, intact


def _open(folder: Path) -> Store:
    return Store(MemoryTier(16 * MIB), [DiskTier(folder, 32 * MIB)])


def _payloads(seed: int) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return list(np.random.default_rng(seed).integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8))


def _frames(folder: Path) -> dict[BlockKey, tuple[Path, int]]:
    """Where each block lies: file and offset of its frame, found by reading the headers."""
    return {key: (path, offset) for path in sorted(folder.glob("*.segment")) for key, offset in _headers(path)}


def _headers(path: Path) -> Iterator[tuple[BlockKey, int]]:
    content = np.fromfile(path, np.uint8)
    for offset in range(0, content.nbytes, PAGE_BYTES):
        header = read_header(content[offset : offset + PAGE_BYTES])
        if header is not None:
            yield header.key, offset


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset + bit // 8)
        byte = file.read(1)[0]
        file.seek(offset + bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
