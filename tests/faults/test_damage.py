"""Damage on the medium: 0 wrong bytes, 0 blocks lost that were whole, and the tier goes on."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.conformance.faulty import flip, overwrite
from tests.conformance.samples import FREED, blocks_of, chain, content, hits, layout_of, load, save
from tests.faults.shelter import Shelter, flip_all
from thermocline.blocks.frame import frame_bytes, read_header, write_header
from thermocline.errors import DiskFormatError
from thermocline.tiers import disk, journal, segments
from thermocline.tiers.directory import FORMAT_FILE, LOG_FILE
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
PAGE = 4096
LENGTH = 5000
FRAME = frame_bytes(LENGTH)
A, B = layout_of("a", LENGTH), layout_of("b", LENGTH)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """120 blocks in 2 MiB: every segment is short enough to cut it everywhere, every chain has a log page."""
    shelter = Shelter(tmp_path_factory.mktemp("small") / "tier", 2 * MIB)
    shelter.fill(A, [chain(seed, 3) for seed in range(25)], LENGTH)
    shelter.fill(B, [chain(seed, 3) for seed in range(10)], LENGTH)
    return shelter


@pytest.fixture
def shelter(small, tmp_path):
    """A copy of it."""
    return small.copy(tmp_path / "tier")


def _whole_before(shelter, segment, cut_at):
    """The blocks that do not need a byte of the segment from `cut_at` on."""
    ends = {name: offset + PAGE + LENGTH for name, (_, offset) in shelter.places.items()}
    return {name for name, (where, _) in shelter.places.items() if where != segment or ends[name] <= cut_at}


@pytest.mark.matrix("restart", "disk")
def test_a_restart(shelter, cases):
    """Every block that was durable is there again when a tier is opened, three times over, and is exact."""
    for _ in range(3):
        tier = shelter.open()
        assert sum(len(part.keys) for part in tier.found()) == len(shelter.durable)
        shelter.survives(tier, [])
        tier.close()
    cases(3 * len(shelter.durable))


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.matrix("bit in a header", "disk")
def test_every_bit_of_a_header_page(tmp_path, cases):
    """Each of the 32,768 bits of a header page on disk, flipped, makes its block CORRUPT: 0 of 32,768 are taken."""
    layout, length = layout_of("one", 100), 100
    shelter = Shelter(tmp_path / "tier", 64 * MIB)
    paths = [chain(seed, 256) for seed in range(16)]
    refused = 0
    for bit in range(8):
        shelter.fill(layout, paths, length)
        flip_all(shelter.path, [shelter.places[layout, key] for path in paths for key in path], range(PAGE), bit)
        tier = shelter.open()
        answers = [outcome for path in paths for outcome in load(tier, layout, path, length)]
        refused += answers.count(Outcome.CORRUPT)
        shelter.goes_on(tier)
        assert tier.usage().blocks == 0
        tier.close()
    assert refused == 8 * PAGE
    cases(refused)


@pytest.mark.matrix("bit in a payload", "disk")
@pytest.mark.parametrize("flips", [2_000, pytest.param(100_000, marks=pytest.mark.faults_long)])
def test_payload_flips_on_disk(tmp_path, flips, cases):
    """Random bits of payloads on disk: every damaged block is refused, every whole one is exact."""
    shelter = Shelter(tmp_path / "tier", 64 * MIB)
    rng = np.random.default_rng(flips)
    paths = [chain(seed, 100) for seed in range(30)]
    for _ in range(flips // 2_000):
        shelter.fill(A, paths, LENGTH)
        names = [list(shelter.durable)[at] for at in rng.permutation(3_000)[:2_000]]
        for bit in range(8):
            some = names[bit::8]
            flip_all(
                shelter.path, [shelter.places[name] for name in some], PAGE + rng.integers(0, LENGTH, len(some)), bit
            )
        tier = shelter.open()
        shelter.survives(tier, names)
        tier.remove(A, [key for path in paths for key in path])
        tier.close()
    cases(flips)


@pytest.mark.matrix("bit in a payload", "memory")
@pytest.mark.parametrize("flips", [2_000, pytest.param(100_000, marks=pytest.mark.faults_long)])
def test_payload_flips_in_memory(flips, cases):
    """Random bits of blocks in memory: each is refused once and gone then, and its neighbours are exact."""
    rng = random.Random(flips)  # noqa: S311  # which bit
    tier = MemoryTier(16 * MIB)
    keys = chain(1, 50)
    corrupt = 0
    for _ in range(flips):
        missing = [key for key in keys if not tier.holds(A, [key])[0]]
        save(tier, A, missing or keys[:0], LENGTH)
        key = rng.choice(keys)
        view, _ = tier.block(A, key)
        view[rng.randrange(LENGTH)] ^= 1 << rng.randrange(8)
        at = keys.index(key)
        outcomes = load(tier, A, keys[max(0, at - 1) : at + 2], LENGTH)
        corrupt += outcomes.count(Outcome.CORRUPT)
        assert hits(outcomes) == len(outcomes) - 1
        assert load(tier, A, [key], LENGTH) == [Outcome.MISS]
    assert corrupt == flips
    tier.check_integrity()
    tier.close()
    cases(flips)


@pytest.mark.matrix("bit in a header", "disk")
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.faults_long)])
def test_every_bit_of_an_index_page(small, tmp_path, step, cases):
    """Each of the 32,768 bits of a page of the log, flipped, costs that page's records and changes no other."""
    whole = (small.path / LOG_FILE).read_bytes()[: 3 * PAGE]
    log = tmp_path / "log"
    log.write_bytes(whole)
    rest = np.delete(journal.read(log).live, [3, 4, 5])
    assert len(rest) == 6
    with log.open("r+b", buffering=0) as file:
        for byte in range(0, PAGE, step):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([whole[PAGE + byte] ^ 1 << bit]), PAGE + byte)
                found = journal.read(log)
                assert (found.bad_pages, found.bad_inside, found.unknown_version) == (1, 1, 0)
                assert found.live.tobytes() == rest.tobytes()
            os.pwrite(file.fileno(), whole[PAGE + byte : PAGE + byte + 1], PAGE + byte)
    cases(8 * len(range(0, PAGE, step)))


@pytest.mark.matrix("bit in a header", "disk")
@pytest.mark.parametrize("step", [512, pytest.param(4, marks=pytest.mark.faults_long)])
def test_every_byte_of_an_index_record(small, tmp_path, step, cases):
    """A tier whose log has a flip in any byte of a page has all blocks of the other pages, and no wrong byte."""
    names = list(small.durable)
    rng = random.Random(step)  # noqa: S311  # which bit
    shelter = small.copy(tmp_path / "tier")
    raw = (small.path / LOG_FILE).read_bytes()
    for byte in range(rng.randrange(step), PAGE, step):
        (shelter.path / LOG_FILE).write_bytes(raw)
        flip(shelter.path / LOG_FILE, 10 * PAGE + byte, rng.randrange(8))
        tier = shelter.open()
        shelter.survives(tier, names[30:33], outcomes=[Outcome.MISS])
        tier.close()
    cases(PAGE // step)


@pytest.mark.matrix("bit in a header", "memory")
def test_every_bit_of_a_sum_in_memory(cases):
    """A block in memory whose sum has any one of its 128 bits flipped is refused."""
    tier = MemoryTier(16 * MIB)
    [key] = chain(1, 1)
    for bit in range(128):
        save(tier, A, [key], LENGTH)
        entry = tier._entries[A][key]
        wrong = (int.from_bytes(entry.sum, "little") ^ 1 << bit).to_bytes(16, "little")
        tier._entries[A][key] = entry._replace(sum=wrong)
        assert load(tier, A, [key], LENGTH) == [Outcome.CORRUPT]
    tier.check_integrity()
    tier.close()
    cases(128)


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.matrix("other block", "disk")
def test_swapped_frames(shelter, cases):
    """Two whole frames that changed places are both refused."""
    names = list(shelter.durable)
    pairs = list(zip(names[:20:2], names[1:20:2], strict=True))
    for pair in pairs:
        (one, at), (two, there) = places = [shelter.places[name] for name in pair]
        frames = [(shelter.path / file).read_bytes()[offset : offset + FRAME] for file, offset in places]
        overwrite(shelter.path / one, at, frames[1])
        overwrite(shelter.path / two, there, frames[0])
    tier = shelter.open()
    shelter.survives(tier, names[:20])
    tier.close()
    cases(20)


@pytest.mark.matrix("other layout", "disk")
def test_the_same_key_of_another_layout(shelter, cases):
    """A whole frame of the same key in another layout, in this block's place, is refused."""
    twins = [(A, key) for layout, key in shelter.durable if layout == B]
    for layout, key in twins:
        (source, start), (target, offset) = shelter.places[B, key], shelter.places[layout, key]
        overwrite(shelter.path / target, offset, (shelter.path / source).read_bytes()[start : start + FRAME])
    tier = shelter.open()
    shelter.survives(tier, twins)
    tier.close()
    cases(len(twins))


@pytest.mark.matrix("other block", "disk")
def test_a_header_over_another_payload(shelter, cases):
    """A header page over another block's payload is refused, and so is a payload under another's header."""
    names = list(shelter.durable)[:6]
    for one, two in zip(names[::2], names[1::2], strict=True):
        (source, start), (target, offset) = shelter.places[one], shelter.places[two]
        overwrite(shelter.path / target, offset, (shelter.path / source).read_bytes()[start : start + PAGE])
    tier = shelter.open()
    shelter.survives(tier, names[1::2])
    tier.close()
    cases(3)


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH + 1, 1 << 40])
def test_a_header_of_another_length(shelter, length):
    """A frame whose header is right in all but the length is refused, although the payload has the right sum."""
    (layout, key), (segment, offset) = next(iter(shelter.places.items()))
    page = np.fromfile(shelter.path / segment, np.uint8, PAGE, offset=offset)
    header = read_header(page)
    write_header(replace(header, length_bytes=length), page)
    overwrite(shelter.path / segment, offset, page)
    tier = shelter.open()
    shelter.survives(tier, [(layout, key)])
    tier.close()


@pytest.mark.matrix("other block", "disk")
def test_a_stale_frame(tmp_path, cases):
    """A frame of the slot's earlier tenant, brought back by a device that lost a write, is refused."""
    shelter = Shelter(tmp_path / "tier", 2 * MIB)
    shelter.fill(A, [chain(1, 30)], LENGTH)
    old = {file.name: file.read_bytes() for file in shelter.path.glob("*.segment")}
    tier = shelter.open()
    tier.remove(A, chain(1, 30))
    tier.close()
    shelter.durable.clear()
    shelter.fill(A, [chain(2, 30)], LENGTH)
    for name, raw in old.items():
        (shelter.path / name).write_bytes(raw)
    tier = shelter.open()
    shelter.survives(tier, shelter.durable)
    assert set(load(tier, A, chain(1, 30), LENGTH)) == {Outcome.MISS}, "what was removed stays removed"
    tier.close()
    cases(len(shelter.durable))


@pytest.mark.matrix("other block", "memory")
@pytest.mark.matrix("other layout", "memory")
def test_wrong_bytes_in_memory(cases):
    """Another block's bytes, another layout's of the same key, zeroes, ones and freed memory in a slot are refused."""
    tier = MemoryTier(16 * MIB)
    keys = chain(1, 12)
    save(tier, A, keys, LENGTH)
    save(tier, B, keys, LENGTH)
    fillings = [content(A, keys[11], LENGTH), content(B, keys[1], LENGTH), 0x00, 0xFF, 0xA5]
    for key, filling in zip(keys, fillings, strict=False):
        tier.block(A, key)[0][:] = filling
    assert load(tier, A, keys, LENGTH) == [Outcome.CORRUPT] * 5 + [Outcome.HIT] * 7
    assert hits(load(tier, B, keys, LENGTH)) == 12
    tier.check_integrity()
    save(tier, A, keys[:5], LENGTH)
    assert hits(load(tier, A, keys, LENGTH)) == 12
    tier.close()
    cases(5)


@pytest.mark.matrix("cut", "memory")
def test_cut_blocks_in_memory(cases):
    """A block whose second half was never written is refused: no earlier tenant's bytes are handed out."""
    tier = MemoryTier(16 * MIB)
    keys = chain(1, 20)
    blocks = blocks_of(A, keys, LENGTH)
    for block in blocks:
        block.pieces[0][LENGTH // 2 :] = 0
    tier.save(A, keys, blocks)
    assert set(load(tier, A, keys, LENGTH)) == {Outcome.CORRUPT}
    tier.check_integrity()
    tier.close()
    cases(20)


@pytest.mark.matrix("cut", "memory")
@pytest.mark.parametrize("filling", [0x00, FREED])
@pytest.mark.parametrize("step", [50, pytest.param(1, marks=pytest.mark.faults_long)])
def test_blocks_in_memory_cut_at_every_length(filling, step, cases):
    """A block in memory of which only the first bytes arrived, however many, is refused unless it is the same."""
    tier = MemoryTier(16 * MIB)
    [key] = chain(1, 1)
    for length in range(0, LENGTH, step):
        save(tier, A, [key], LENGTH)
        view, _ = tier.block(A, key)
        same = (view[length:] == filling).all()
        view[length:] = filling
        assert load(tier, A, [key], LENGTH) == [Outcome.HIT if same else Outcome.CORRUPT]
    tier.check_integrity()
    tier.close()
    cases(len(range(0, LENGTH, step)))


@pytest.mark.matrix("other block", "memory")
def test_stale_slots_in_memory(cases):
    """Of a slot that was given away and taken again, nobody gets the earlier tenant's bytes under the new name."""
    tier = MemoryTier(16 * MIB)
    old, new = chain(1, 20), chain(2, 20)
    save(tier, A, old, LENGTH)
    stale = [tier.block(A, key)[0].copy() for key in old]
    tier.remove(A, old)
    save(tier, A, new, LENGTH)
    for key, was in zip(new, stale, strict=True):
        tier.block(A, key)[0][:] = was  # the write of the new tenant never arrived
    assert set(load(tier, A, new, LENGTH)) == {Outcome.CORRUPT}
    assert set(load(tier, A, old, LENGTH)) == {Outcome.MISS}
    tier.check_integrity()
    tier.close()
    cases(20)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.matrix("cut", "disk")
def test_segments_cut_at_every_page(small, tmp_path, cases):
    """A segment cut at any page, or at odd lengths, loses what lay behind the cut and nothing else."""
    segment = min(segment for segment, _ in small.places.values())
    size = (small.path / segment).stat().st_size
    odd = [1, PAGE - 1, PAGE + 1, PAGE + LENGTH, PAGE + LENGTH - 1, size // 2 + 77, size - 1]
    for cut_at in [*range(0, size + 1, PAGE), *odd]:
        shelter = small.copy(tmp_path / "tier")
        os.truncate(shelter.path / segment, cut_at)
        tier = shelter.open()
        room = (shelter.path / segment).stat()
        assert (room.st_size, room.st_blocks * 512 >= size) == (size, True), "its room is not there before it is needed"
        shelter.survives(tier, set(shelter.durable) - _whole_before(shelter, segment, cut_at))
        tier.close()
    cases(size // PAGE + 1 + len(odd))


@pytest.mark.matrix("cut", "disk")
@pytest.mark.parametrize("step", [997, pytest.param(1, marks=pytest.mark.faults_long)])
def test_a_segment_cut_at_every_length(small, tmp_path, monkeypatch, step, cases):
    """A segment cut at any byte of a frame, of its header, its payload or its padding, loses what is not whole."""
    segment = min(segment for segment, _ in small.places.values())
    monkeypatch.setattr(segments, "READ_BYTES_MAX", 8 * PAGE)  # buffers that are made quickly
    monkeypatch.setattr(disk, "READ_BYTES_MAX", 8 * PAGE)
    _, start = sorted(place for place in small.places.values() if place[0] == segment)[5]
    raw = (small.path / segment).read_bytes()
    shelter = small.copy(tmp_path / "tier")
    log = (small.path / LOG_FILE).read_bytes()
    for cut_at in range(start, start + FRAME + 1, step):
        (shelter.path / segment).write_bytes(raw[:cut_at])
        (shelter.path / LOG_FILE).write_bytes(log)
        tier = shelter.open()
        whole = _whole_before(shelter, segment, cut_at)
        for name, outcome in shelter.outcomes(tier).items():
            assert outcome is (Outcome.HIT if name in whole else Outcome.CORRUPT)
        tier.check_integrity()
        tier.close()
    cases(len(range(0, FRAME + 1, step)))


@pytest.mark.matrix("index damaged", "disk")
@pytest.mark.parametrize("pages", [2, pytest.param(35, marks=pytest.mark.faults_long)])
def test_a_log_cut_at_every_length(small, tmp_path, pages, cases):
    """A log cut at any byte keeps what its whole pages say, and a torn page is no damage."""
    log = tmp_path / "log"
    log.write_bytes((small.path / LOG_FILE).read_bytes()[: pages * PAGE])
    live = journal.read(log).live
    for length in range(pages * PAGE, -1, -1):
        os.truncate(log, length)
        found = journal.read(log)
        assert found.live.tobytes() == live[: length // PAGE * 3].tobytes()
        assert (found.bad_pages, found.bad_inside) == (int(length % PAGE > 0), 0)
    cases(pages * PAGE + 1)


@pytest.mark.matrix("index damaged", "disk")
def test_a_log_cut_at_every_page(small, tmp_path, cases):
    """A log cut at any page, or at odd lengths, keeps what its whole pages say."""
    size = (small.path / LOG_FILE).stat().st_size
    assert size == 35 * PAGE
    names = list(small.durable)
    for cut_at in [*range(0, size + 1, PAGE), 1, 127, PAGE - 1, PAGE + 1, size // 2 + 77, size - 1]:
        shelter = small.copy(tmp_path / "tier")
        os.truncate(shelter.path / LOG_FILE, cut_at)
        tier = shelter.open()
        shelter.survives(tier, names[cut_at // PAGE * 3 :], outcomes=[Outcome.MISS])
        tier.close()
    cases(size // PAGE + 7)


@pytest.mark.matrix("index damaged", "disk")
def test_every_page_of_the_log_damaged(small, tmp_path, cases):
    """A damaged page of the log costs its own records and no other block, and leaves no damage behind."""
    names = list(small.durable)
    rng = random.Random(7)  # noqa: S311  # which bit
    for page in range(35):
        shelter = small.copy(tmp_path / "tier")
        flip(shelter.path / LOG_FILE, page * PAGE + rng.randrange(PAGE), rng.randrange(8))
        hurt = names[page * 3 : page * 3 + 3]
        tier = shelter.open()
        shelter.survives(tier, hurt, outcomes=[Outcome.MISS])
        tier.close()
        assert journal.read(shelter.path / LOG_FILE).bad_pages == 0
        tier = shelter.open()
        shelter.survives(tier, hurt, outcomes=[Outcome.MISS])
        tier.close()
    cases(35)


@pytest.mark.matrix("no bytes", "disk")
def test_files_of_zero_bytes(small, tmp_path, cases):
    """A segment or a log of zero bytes, as some crashes leave them, is a miss for what it held."""
    segments = sorted({segment for segment, _ in small.places.values()})
    for victim in [*segments, LOG_FILE]:
        shelter = small.copy(tmp_path / "tier")
        (shelter.path / victim).write_bytes(b"")
        tier = shelter.open()
        hurt = [name for name, (segment, _) in shelter.places.items() if victim in {segment, LOG_FILE}]
        shelter.survives(tier, hurt, outcomes=[Outcome.MISS] if victim == LOG_FILE else [Outcome.CORRUPT])
        tier.close()
    cases(len(segments) + 1)


@pytest.mark.matrix("deleted", "disk")
def test_files_that_are_gone(small, tmp_path, cases):
    """A segment or a log that somebody deleted is a miss for what it held, and its room is used again."""
    segments = sorted({segment for segment, _ in small.places.values()})
    for victim in [*segments, LOG_FILE]:
        shelter = small.copy(tmp_path / "tier")
        (shelter.path / victim).unlink()
        tier = shelter.open()
        hurt = [name for name, (segment, _) in shelter.places.items() if victim in {segment, LOG_FILE}]
        shelter.survives(tier, hurt, outcomes=[Outcome.MISS])
        tier.close()
    cases(len(segments) + 1)


@pytest.mark.matrix("hole", "disk")
def test_zeroed_holes(small, tmp_path, cases):
    """A hole of zeroes of any size, in header, payload or log, is found by a sum; what it spares is exact."""
    segment = min(segment for segment, _ in small.places.values())
    offsets = sorted(offset for where, offset in small.places.values() if where == segment)
    holes = [(0, 1), (PAGE - 1, 1), (PAGE, 64), (PAGE + LENGTH - 1, 1), (0, PAGE), (PAGE, PAGE), (0, 3 * FRAME)]
    for hole, length in holes:
        shelter = small.copy(tmp_path / "tier")
        start = offsets[2] + hole
        before = (shelter.path / segment).read_bytes()[start : start + length]
        overwrite(shelter.path / segment, start, bytes(length))
        hurt = [
            name
            for name, (where, offset) in shelter.places.items()
            if where == segment and offset < start + length and start < offset + PAGE + LENGTH and any(before)
        ]
        tier = shelter.open()
        shelter.survives(tier, hurt)
        tier.close()
    cases(len(holes))


@pytest.mark.matrix("hole", "disk")
def test_a_file_of_zeroes(small, tmp_path, cases):
    """A segment or a log of its length, but all zeroes, holds nothing."""
    segments = sorted({segment for segment, _ in small.places.values()})
    for victim in [segments[0], LOG_FILE]:
        shelter = small.copy(tmp_path / "tier")
        (shelter.path / victim).write_bytes(bytes((shelter.path / victim).stat().st_size))
        tier = shelter.open()
        hurt = [name for name, (segment, _) in shelter.places.items() if victim in {segment, LOG_FILE}]
        shelter.survives(tier, hurt, outcomes=[Outcome.MISS, Outcome.CORRUPT])
        tier.close()
    cases(2)


@pytest.mark.matrix("index damaged", "disk")
def test_random_files(small, tmp_path, cases):
    """Files of random bytes in the place of log and segments are no blocks, and no error."""
    rng = np.random.default_rng(3)
    shelter = small.copy(tmp_path / "tier")
    for file in [shelter.path / LOG_FILE, *shelter.path.glob("*.segment")]:
        file.write_bytes(rng.bytes(file.stat().st_size))
    tier = shelter.open()
    shelter.survives(tier, shelter.durable, outcomes=[Outcome.MISS])
    tier.close()
    cases(2)


@pytest.mark.matrix("index damaged", "disk")
def test_a_damaged_format_file(small, tmp_path, cases):
    """A format file that is damaged is an error with a hint, and nothing is lost: put right, all is there."""
    shelter = small.copy(tmp_path / "tier")
    file = shelter.path / FORMAT_FILE
    right = file.read_bytes()
    for at in range(len(right)):
        file.write_bytes(right[:at] + bytes([right[at] ^ 0x10]) + right[at + 1 :])
        with pytest.raises(DiskFormatError) as caught:
            DiskTier(shelter.path, shelter.capacity)
        assert caught.value.hint
    file.write_bytes(right)
    tier = shelter.open()
    shelter.survives(tier, [])
    tier.close()
    cases(len(right))


def test_another_release(small, tmp_path):
    """A log with pages of another version is an error with a hint, and stays as it is."""
    shelter = small.copy(tmp_path / "tier")
    log = shelter.path / LOG_FILE
    raw = bytearray(log.read_bytes())
    head = np.frombuffer(raw, journal._HEAD, 1, offset=PAGE)
    head["version"] = 2
    raw[PAGE : PAGE + 16] = journal.xxh3_128_digest(bytes(raw[PAGE + 16 : 2 * PAGE]))
    log.write_bytes(bytes(raw))
    with pytest.raises(DiskFormatError) as caught:
        DiskTier(shelter.path, shelter.capacity)
    assert caught.value.hint
    assert log.read_bytes() == bytes(raw)
