"""Settings become a store: what is given is used, and what cannot be used is said and leaves nothing behind."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from tests.costs.test_measured import sweep, truth
from tests.faults.redis_server import RedisServer
from tests.store.making import LAYOUT, ask, chain, save
from thermocline.build import store_from
from thermocline.clock import ManualClock
from thermocline.costs import measured
from thermocline.errors import DiskFormatError, DiskInUseError, SettingsError, TierError
from thermocline.settings import Settings
from thermocline.tiers.memory import MemoryTier

MIB = 1024 * 1024


def small(disk_path: Path | None = None, **settings: object) -> Settings:
    """Settings of a small store."""
    return Settings(memory_bytes=4 * MIB, disk_path=disk_path, disk_bytes=16 * MIB, **settings)


def test_memory_alone():
    """Without a disk path a store has a memory tier, and nothing outlives it."""
    store = store_from(small())
    save(store, chain("prompt", 4))
    assert (list(store.usage()), ask(store, chain("prompt", 4)).blocks) == (["memory"], 4)
    store.close()


def test_memory_and_disk(tmp_path):
    """With a disk path what was saved is there in the next store on that path, within the limits that were given."""
    store = store_from(small(tmp_path / "new" / "disk"))
    save(store, chain("prompt", 4))
    usage = store.usage()
    assert (usage["memory"].capacity_bytes, usage["disk"].capacity_bytes) == (4 * MIB, 16 * MIB)
    store.close()
    again = store_from(small(tmp_path / "new" / "disk"))
    assert ask(again, chain("prompt", 4)).by_tier == {"disk": 4}
    again.check_integrity()
    again.close()


def test_redis(tmp_path):
    """With an address of Redis its beginnings go there, as the settings say, and another store finds them."""
    secret = tmp_path / "secret"
    secret.write_text("word\n")
    with RedisServer(tmp_path) as server:
        server.config("requirepass", "word")
        shared = {
            "redis_url": server.url,
            "redis_password_file": secret,
            "redis_namespace": "team",
            "redis_bytes": 8 * MIB,
            "redis_ttl_seconds": 600.0,
            "redis_prefix_tokens": 64,
            "redis_gain_min": 0.0,
            "redis_wait_seconds": 10.0,
            "tokens_per_block": 16,
        }
        first, second = store_from(small(**shared)), store_from(small(**shared))
        keys = chain("prompt", 6)
        save(first, keys)
        assert ask(second, keys).by_tier == {"redis": 4}
        assert second.usage()["redis"].capacity_bytes == 8 * MIB
        first.close()
        second.close()


def test_redis_that_cannot_be_used(tmp_path):
    """A wrong password, or a share too small for one block, is an error with a hint, and the disk is free again."""
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    with RedisServer(tmp_path) as server:
        server.config("requirepass", "word")
        disk = tmp_path / "disk"
        for error, settings in (
            (TierError, {"redis_url": server.url, "redis_password_file": secret}),
            (SettingsError, {"redis_url": server.url, "redis_prefix_tokens": 16}),
            (SettingsError, {"redis_url": "redis://:word@127.0.0.1"}),
        ):
            with pytest.raises(error) as raised:
                store_from(small(disk, **settings))
            assert raised.value.hint
    store_from(small(disk)).close()


def test_every_setting_of_the_store_is_used():
    """Time to live, lease, deadline and number of receipts are those of the settings, on the clock that is given."""
    clock = ManualClock(1000.0)
    settings = small(ttl_seconds=60.0, lease_seconds=7.0, load_seconds_max=0.03125, receipts_kept=3)
    store, keys = store_from(settings, clock=clock), chain("prompt", 4)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=9999)
    assert plan.load_seconds_max == 0.03125
    clock.sleep(8)
    store.match([LAYOUT], [], prompt_tokens=1)
    assert len(store._books.leases) == 0
    clock.sleep(60)
    assert ask(store, keys).reasons == [(0, 4, "expired")]
    assert store.receipts._kept == 3
    store.close()


def test_two_stores_on_one_path(tmp_path):
    """The second store on a disk path is refused with a hint; the first goes on, and the path is free after it."""
    first = store_from(small(tmp_path))
    with pytest.raises(DiskInUseError) as refused:
        store_from(small(tmp_path))
    assert refused.value.hint
    save(first, chain("prompt", 3))
    first.close()
    second = store_from(small(tmp_path))
    assert ask(second, chain("prompt", 3)).blocks == 3
    second.close()


def test_somebody_elses_folder(tmp_path):
    """A folder that holds other things is refused, and they stay as they were."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskFormatError) as refused:
        store_from(small(tmp_path))
    assert refused.value.hint
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_path_that_is_a_file(tmp_path):
    """A disk path that cannot be a folder is a clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError) as refused:
        store_from(small(tmp_path / "file"))
    assert refused.value.hint


def test_more_memory_than_there_is(tmp_path):
    """More memory than the machine has is refused before any is taken, with a hint and with the disk path left free."""
    with pytest.raises(SettingsError) as refused:
        store_from(Settings(memory_bytes=1 << 50, disk_path=tmp_path, disk_bytes=16 * MIB))
    assert "1073741824 MiB" in refused.value.message
    assert refused.value.hint
    store_from(small(tmp_path)).close()


def test_memory_that_the_system_refuses(tmp_path, monkeypatch):
    """Where the system does not give the memory that seemed to be there, the disk is closed again."""

    def refuse(*_: object, **__: object) -> MemoryTier:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("thermocline.build.MemoryTier", refuse)
    with pytest.raises(SettingsError) as refused:
        store_from(small(tmp_path))
    assert "Cannot allocate memory" in refused.value.message
    monkeypatch.undo()
    store_from(small(tmp_path)).close()


def test_close_leaves_no_thread_behind(tmp_path):
    """After close every thread that a store started has ended."""
    before = set(threading.enumerate())
    store = store_from(small(tmp_path))
    save(store, chain("prompt", 4))
    assert store.prefetch([LAYOUT], chain("prompt", 4), 1e12).wait(30)
    store.close()
    assert set(threading.enumerate()) <= before


def test_costs_begin_with_a_profile(tmp_path):
    """With `measured_path`, prefills are believed to take what a profile measured; a bad file is refused."""
    path = tmp_path / "profile.json"
    settings = small(tmp_path / "disk", measured_path=path)
    with pytest.raises(SettingsError, match="No such file"):
        store_from(settings)
    measured.write(path, sweep())  # and now the disk is not in use
    with contextlib.closing(store_from(settings)) as store:
        assert store.costs.recompute(2048, 0, "any") == pytest.approx(truth(2048, 0), rel=0.05)
