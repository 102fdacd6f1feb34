"""Pages in a device's memory. Gathering, scattering and the order of copies are run here on the processor's memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from tests.node.making import PATIENT
from tests.store.making import make_layout
from thermocline.blocks.key import block_keys, root_key
from thermocline.engines.vllm import device
from thermocline.engines.vllm.device import Blocks, DevicePages, HostLane, Registered
from thermocline.engines.vllm.layout import Span
from thermocline.node.client import NodeClient
from thermocline.node.server import NodeServer
from thermocline.store.receipt import Reason
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

PAGES, TOKENS = 24, 16
SHAPES = {
    "one stretch per layer": [Span(layer, 0, 4096, 4096) for layer in range(3)],
    "keys and values apart": [Span(0, half * PAGES * 2048, 2048, 2048) for half in range(2)],
    "block outermost": [Span(0, 0, 6144, 6144)],
    "odd sizes": [Span(0, 3, 1001, 333), Span(1, 0, 77, 77)],
}


def _regions(spans):
    sizes = {span.region: 0 for span in spans}
    for span in spans:
        sizes[span.region] = max(sizes[span.region], span.offset + span.stride * (PAGES - 1) + span.nbytes)
    return [torch.zeros(sizes[number], dtype=torch.uint8) for number in sorted(sizes)]


def _layout(spans):
    return make_layout(repr(spans), block_bytes=sum(span.nbytes for span in spans))


def _block(spans, regions, page):
    return np.concatenate([regions[s.region].numpy()[s.offset + page * s.stride :][: s.nbytes] for s in spans])


def _keys(count):
    tokens = np.arange(count * TOKENS, dtype=np.uint32)
    return block_keys(tokens.data, root=root_key(), tokens_per_block=TOKENS)


@pytest.fixture(params=SHAPES, ids=str)
def spans(request):
    return SHAPES[request.param]


@pytest.fixture
def client(tmp_path):
    with (
        contextlib.closing(Store(MemoryTier(64 << 20))) as store,
        contextlib.closing(NodeServer(store, tmp_path / "n.sock", lease_seconds=30)),
        contextlib.closing(NodeClient(tmp_path / "n.sock", **PATIENT)) as attached,
    ):
        assert attached.wait_up(10)
        yield attached
    store.check_integrity()


@pytest.fixture(autouse=True)
def small_bays(monkeypatch):
    """Bays of a few blocks, so that every copy takes several."""
    monkeypatch.setattr(device, "BAY_BYTES", 20000)


def _filled(spans, seed=0):
    regions = _regions(spans)
    random = np.random.default_rng(seed)
    for region in regions:
        region.copy_(torch.from_numpy(random.integers(0, 256, region.numel(), dtype=np.uint8)))
    return regions


def _pages(client, layout, spans, regions, registered=None):
    client.ready(layout, PAGES)
    client.unsaved(layout, [])  # answered behind the slots that were asked for
    return DevicePages(client, layout, spans, regions, registered)


@pytest.mark.parametrize("word", ["as it is", "registered"])
def test_blocks_come_back_in_other_pages(client, spans, word):
    """What is saved from some pages loads into others byte for byte, whatever the shape of the engine's memory."""
    layout, keys = _layout(spans), _keys(9)
    source, target = _filled(spans), _filled(spans, seed=1)
    registered = Registered(lambda memory: memory.nbytes > 0) if word == "registered" else None
    random = np.random.default_rng(2)
    with contextlib.closing(_pages(client, layout, spans, source, registered)) as saving:
        job = saving.save(keys, [int(page) for page in random.permutation(PAGES)[:9]], 0)
        saved = [int(page) for page in np.random.default_rng(2).permutation(PAGES)[:9]]
        assert job.wait(10)
    kept = job.outcomes.index(Outcome.LATE) if Outcome.LATE in job.outcomes else 9
    assert kept >= 1
    assert set(job.outcomes[:kept]) == {Outcome.HIT}
    plan = client.match([layout], keys[:kept], prompt_tokens=9 * TOKENS + 1)
    assert plan.blocks == kept
    into = [int(page) for page in random.permutation(PAGES)[:kept]]
    before = [region.clone() for region in target]
    with contextlib.closing(_pages(client, layout, spans, target)) as loading:
        assert loading.load(client.places(plan, 0), into).blocks == kept
    for old, new in zip(saved, into, strict=False):
        assert (_block(spans, source, old) == _block(spans, target, new)).all()
    for page in set(range(PAGES)) - set(into):
        assert (_block(spans, before, page) == _block(spans, target, page)).all()
    client.release(plan.lease)


def test_a_damaged_block_never_reaches_a_page(client, spans):
    """What does not verify in the private bay is not sent: its page, and all behind it, are left as they were."""
    layout, keys = _layout(spans), _keys(4)
    source, target = _filled(spans), _filled(spans, seed=1)
    with contextlib.closing(_pages(client, layout, spans, source)) as saving:
        job = saving.save(keys[:1], [0], 0)
        assert job.wait(10)
        for at in range(1, 4):
            job = saving.save(keys[: at + 1], [at], at)
            assert job.wait(10)
            assert job.outcomes == [Outcome.HIT]
    plan = client.match([layout], keys, prompt_tokens=4 * TOKENS + 1)
    places = client.places(plan, 0)
    client.memory_of(places.incarnation)[places.offsets[2] + 5] ^= 1
    before = [region.clone() for region in target]
    with contextlib.closing(_pages(client, layout, spans, target)) as loading:
        loaded = loading.load(places, [5, 6, 7, 8])
    assert loaded.blocks == 2
    assert loaded.missing[0].reason is Reason.CORRUPT
    for page in (7, 8):
        assert (_block(spans, before, page) == _block(spans, target, page)).all()
    client.release(plan.lease)


def test_pages_that_do_not_exist_are_refused(spans):
    """A page number outside of the engine's memory raises, and touches nothing."""
    blocks = Blocks(spans, _regions(spans))
    assert blocks.pages == PAGES
    for wrong in ([PAGES], [-1], [0, PAGES + 7]):
        with pytest.raises(IndexError):
            blocks.ids(wrong)


def test_a_save_without_room_says_so(client, spans):
    """Blocks that find no slot lent are LATE, that once; a later save keeps what it finds room for, from the start."""
    layout, keys = _layout(spans), _keys(PAGES)
    with contextlib.closing(DevicePages(client, layout, spans, _filled(spans))) as saving:
        job = saving.save(keys, list(range(PAGES)), 0)
        assert job.wait(10)
        assert job.outcomes == [Outcome.LATE] * PAGES
        client.unsaved(layout, [])  # answered behind the slots that this asked for
        job = saving.save(keys, list(range(PAGES)), 0)
        assert job.wait(10)
    assert job.outcomes[0] is Outcome.HIT
    kept = [outcome is Outcome.HIT for outcome in job.outcomes]
    assert kept == sorted(kept, reverse=True)
    assert set(job.outcomes) <= {Outcome.HIT, Outcome.LATE}


def test_a_load_writes_behind_what_is_still_to_be_saved(client, spans, monkeypatch):
    """A page that is saved and then given to a load is gathered before it is written, whatever the device is at."""
    log = []

    class Mark:
        def synchronize(self):
            pass

    class Logged(HostLane):
        def mark(self):
            log.append(Mark())
            return log[-1]

        def behind(self, mark):
            log.append(("behind", mark))

    monkeypatch.setattr(device, "lane_for", lambda _: Logged())
    for verb in ("gather", "scatter"):
        whole = getattr(Blocks, verb)
        monkeypatch.setattr(Blocks, verb, lambda *all_, verb=verb, whole=whole: (log.append(verb), whole(*all_)))
    layout, keys = _layout(spans), _keys(1)
    with contextlib.closing(_pages(client, layout, spans, _filled(spans))) as pages:
        assert pages.save(keys, [0], 0).wait(10)
        plan = client.match([layout], keys, prompt_tokens=TOKENS + 1)
        assert pages.load(client.places(plan, 0), [0]).blocks == 1
    client.release(plan.lease)
    gathered = log[log.index("gather") + 1]
    assert log.index(("behind", gathered)) == log.index("scatter") - 1
