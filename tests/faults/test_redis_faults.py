"""The Redis tier in trouble: damaged values, a server that fails in every way it can, a wire that cuts and flips.

Never a wrong byte, never an operation that outlives its deadline, and all is well again when the server is.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.samples import blocks_of, chain, content, hits, layout_of, load, room_for, save
from tests.faults import matrix
from tests.faults.devices import Witness
from tests.faults.proxy import Cut, Delay, Drop, Flip, Freeze, Pause, Proxy, Rate, Repeat, Way
from tests.faults.redis_server import RedisServer
from thermocline.blocks.frame import PAGE_BYTES, frame_bytes
from thermocline.clock import SystemClock
from thermocline.errors import TierError
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.tier import Outcome
from thermocline.wire.resp import Address

CLOCK = SystemClock()
MIB = 1 << 20
LENGTH = 1_000
FRAME = frame_bytes(LENGTH)
A, B = layout_of("a", LENGTH), layout_of("b", LENGTH)
KEYS = chain(11, 8)
SPACE = Space(b"faults", 64 * MIB, 3600.0)
GUARD_SECONDS = 20.0
OVERRUN_SECONDS = 0.05
"""What an operation may take beyond its deadline; the long forms measure it."""
NOT_HIT = {Outcome.MISS, Outcome.LATE, Outcome.CORRUPT, Outcome.FAILED}


@pytest.fixture
def server(tmp_path):
    """A server to do harm to."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def opened():
    """Opens tiers, and closes them at the end."""
    with ExitStack() as stack:

        def opens(address, *, space=SPACE, seconds=GUARD_SECONDS, up=True, **options):
            """A tier with more patience than in service, so that only a fault makes it late."""
            url = f"redis://{address[0]}:{address[1]}"
            tier = RedisTier(Address.parse(url), space, wait_seconds=seconds, **options)
            stack.callback(tier.close)
            assert not up or tier.wait_up(GUARD_SECONDS)
            return tier

        yield opens


def _values(server, keys, layout=A):
    """What lies under these keys."""
    return server.calls(("GET", SPACE.value(layout, key)) for key in keys)


def _put(server, keys, values, layout=A):
    """Put values there behind the tier's back."""
    server.calls(("SET", SPACE.value(layout, key), value) for key, value in zip(keys, values, strict=True))


def _flipped(value, bit):
    wrong = bytearray(value)
    wrong[bit // 8] ^= 1 << bit % 8
    return bytes(wrong)


def _try_damage(tier, server, damages, layout=A, batch=128):
    """Load values damaged one way each. All must be found out, forgotten, and taken again. Returns how many there were.

    `damages` makes a value out of the right one.
    """
    keys = chain(5, min(batch, len(damages)))
    save(tier, layout, keys, LENGTH)
    right = _values(server, keys, layout)
    for start in range(0, len(damages), batch):
        part = damages[start : start + batch]
        some = keys[: len(part)]
        _put(server, some, [make(value) for make, value in zip(part, right, strict=False)], layout)
        outcomes = load(tier, layout, some, LENGTH)
        assert set(outcomes) == {Outcome.CORRUPT}, [
            at for at, each in enumerate(outcomes) if each is not Outcome.CORRUPT
        ]
        assert tier.wait_idle(GUARD_SECONDS)
        assert not any(tier.holds(layout, some))
        assert _values(server, some, layout) == [None] * len(some)
    _put(server, keys, right, layout)
    assert hits(load(tier, layout, keys, LENGTH)) == len(keys)
    return len(damages)


def _open_files():
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))


def _well_again(tier, keys=KEYS, layout=A):
    """The tier takes up again what works: it saves, and loads what it saved."""
    deadline = CLOCK.now() + GUARD_SECONDS
    while CLOCK.now() < deadline:
        if tier.wait_up(GUARD_SECONDS):
            saved = tier.save(layout, keys, blocks_of(layout, keys, LENGTH))
            assert saved.wait(GUARD_SECONDS)
            if set(saved.outcomes) == {Outcome.HIT} and hits(load(tier, layout, keys, LENGTH)) == len(keys):
                tier.check_integrity()
                return
        CLOCK.sleep(0.02)
    pytest.fail("the tier does not come back")


# -- what lies in Redis ------------------------------------------------------------------------------------------------


def _some(bits, count, seed=1):
    return sorted(random.Random(seed).sample(range(bits), count))  # noqa: S311  # a seed must replay


LONG = pytest.mark.faults_long


@pytest.mark.parametrize("count", [500, pytest.param(8 * PAGE_BYTES, marks=LONG)])
@pytest.mark.matrix("bit in a header", "redis")
def test_every_bit_of_the_header(server, opened, cases, count):
    """Whichever bit of a stored header is wrong, the block is damaged, forgotten, and saved again."""
    bits = _some(8 * PAGE_BYTES, count)
    cases(_try_damage(opened(server.address), server, [lambda value, bit=bit: _flipped(value, bit) for bit in bits]))


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=LONG)])
@pytest.mark.matrix("bit in a payload", "redis")
def test_bits_of_the_payload(server, opened, cases, count):
    """Whichever bit of a stored payload is wrong, the block is damaged."""
    rng = random.Random(2)  # noqa: S311  # a seed must replay
    bits = [8 * PAGE_BYTES + rng.randrange(8 * LENGTH) for _ in range(count)]
    cases(_try_damage(opened(server.address), server, [lambda value, bit=bit: _flipped(value, bit) for bit in bits]))


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=LONG)])
@pytest.mark.matrix("cut", "redis")
def test_every_length(server, opened, cases, step):
    """A value that is shorter or longer than a frame, by any number of bytes, is damage."""
    shorter = [lambda value, length=length: value[:length] for length in range(0, FRAME, step)]
    longer = [lambda value, more=more: value + bytes(more) for more in (1, 4095, 4096, 100_000)]
    tier = opened(server.address)
    count = _try_damage(tier, server, shorter)
    for make in longer:  # a reply that is too long costs the link
        count += _try_damage(tier, server, [make])
        assert tier.wait_up(GUARD_SECONDS)
    cases(count)


@pytest.mark.matrix("no bytes", "redis")
def test_empty_value(server, opened, cases):
    """A value without a byte is damage."""
    cases(_try_damage(opened(server.address), server, [lambda value: b""]))


@pytest.mark.matrix("hole", "redis")
def test_holes(server, opened, cases):
    """A value of the right length with zeros where bytes should be is damage."""
    holes = [(0, 64), (0, PAGE_BYTES), (PAGE_BYTES, PAGE_BYTES + LENGTH), (PAGE_BYTES + 500, FRAME), (0, FRAME)]
    made = [lambda v, a=first, b=last: v[:a] + bytes(b - a) + v[b:] for first, last in holes]
    cases(_try_damage(opened(server.address), server, made))


@pytest.mark.matrix("other block", "redis")
def test_swapped_values(server, opened, cases):
    """Another block's value under a key is damage, also where it is a good one of the same length."""
    tier = opened(server.address)
    save(tier, A, KEYS, LENGTH)
    right = _values(server, KEYS)
    turned = right[1:] + right[:1]
    _put(server, KEYS, turned)
    assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.CORRUPT}
    assert tier.wait_idle(GUARD_SECONDS)
    _put(server, KEYS, right)
    assert hits(load(tier, A, KEYS, LENGTH)) == len(KEYS)
    cases(len(KEYS))


@pytest.mark.matrix("other layout", "redis")
def test_stale_values(server, opened, cases):
    """The same key's value of another layout, say of older weights, is damage."""
    tier = opened(server.address)
    for layout in (A, B):
        save(tier, layout, KEYS, LENGTH)
    _put(server, KEYS, _values(server, KEYS, B))
    assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.CORRUPT}
    assert hits(load(tier, B, KEYS, LENGTH)) == len(KEYS)
    cases(len(KEYS))


def test_wrong_types(server, opened):
    """What is no string under one of our keys is damage, and is deleted."""
    tier = opened(server.address)
    makers = [("RPUSH", "x"), ("HSET", "x", "y"), ("SADD", "x"), ("ZADD", 1, "x"), ("PFADD", "x")]
    server.calls((verb, SPACE.value(A, key), *rest) for key, (verb, *rest) in zip(KEYS, makers, strict=False))
    assert set(load(tier, A, KEYS[: len(makers)], LENGTH)) == {Outcome.CORRUPT}
    _well_again(tier)


def test_damage_is_not_found_while_it_is_deleted(server, opened):
    """What a load found damaged is not found any more, also where it is deleted while the question is under way."""
    tier = opened(server.address)
    key = KEYS[:1]
    save(tier, A, key, LENGTH)
    _put(server, key, [bytes(FRAME)])
    asked, real_delete, real_exist = threading.Event(), tier._delete, tier._exist

    def delete_later(*arguments):
        assert asked.wait(GUARD_SECONDS)
        return real_delete(*arguments)

    def exist(*arguments):
        there = real_exist(*arguments)
        asked.set()
        while tier._damaged:
            CLOCK.sleep(0.001)
        return there

    tier._delete, tier._exist = delete_later, exist
    assert load(tier, A, key, LENGTH) == [Outcome.CORRUPT]
    assert tier.find(A, key, CLOCK.now() + GUARD_SECONDS) == [Outcome.MISS]


@pytest.mark.matrix("deleted", "redis")
def test_gone_behind_our_back(server, opened, cases):
    """Values that expired, were deleted or flushed are misses."""
    tier = opened(server.address)
    for gone in (
        lambda name: ("PEXPIRE", name, 1),
        lambda name: ("DEL", name),
        lambda name: ("UNLINK", name),
        lambda name: ("FLUSHALL",),
    ):
        _well_again(tier)
        server.calls(gone(SPACE.value(A, key)) for key in KEYS)
        CLOCK.sleep(0.01)
        assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.MISS}
        assert not any(tier.holds(A, KEYS))
    _well_again(tier)
    cases(4 * len(KEYS))


# -- a server that refuses ---------------------------------------------------------------------------------------------


@pytest.mark.matrix("full", "redis")
def test_evicted_by_the_server(server, opened, cases):
    """A server that evicts by its own rule costs misses: what is loaded is exact, saving goes on, the cap holds."""
    server.config("maxmemory-policy", "allkeys-random")
    server.config("maxmemory", str(6 * MIB))
    tier = opened(server.address)
    loaded = count = 0
    for seed in range(30):
        keys = chain(seed, 40)
        save(tier, A, keys, LENGTH)
        loaded += hits(load(tier, A, keys, LENGTH))
        count += len(keys)
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes
    assert loaded > 0
    assert tier.wait_idle(GUARD_SECONDS)
    tier.check_integrity()
    cases(count)


@pytest.mark.matrix("quota", "redis")
def test_the_quota_holds(server, opened, cases):
    """However much is saved, by however many tiers, the values of a namespace take no more than they may."""
    space = Space(SPACE.namespace, MIB, 3600.0)
    tiers = [opened(server.address, space=space) for _ in range(2)]
    count = 0
    for turn in range(20):
        for number, tier in enumerate(tiers):
            keys = chain((turn, number), 20)
            count += hits(save(tier, A, keys, LENGTH).outcomes)
            names = [name for name in server.keys("faults:*") if len(name) == len("faults:") + 64]
            assert sum(server.calls(("STRLEN", name) for name in names)) <= MIB
            assert tier.usage().used_bytes <= MIB
    assert count * FRAME > 5 * MIB
    cases(count)


@pytest.mark.matrix("full", "redis")
def test_out_of_memory(server, opened, cases):
    """A server without memory takes nothing, and says so; what it has is loaded; with room it takes all again."""
    tier = opened(server.address)
    save(tier, A, KEYS, LENGTH)
    server.config("maxmemory", "1")
    assert set(save(tier, A, chain(2, 8), LENGTH).outcomes) <= {Outcome.FULL, Outcome.FAILED}
    assert hits(load(tier, A, KEYS, LENGTH)) == len(KEYS)
    assert _values(server, chain(2, 8)) == [None] * 8
    server.config("maxmemory", "0")
    _well_again(tier, chain(2, 8))
    cases(8)


def _misconf(server, folder):
    """A server that cannot write its snapshot refuses to write at all."""
    data = folder / "data"
    data.mkdir()
    server.config("dir", str(data))
    data.rmdir()
    server.config("save", "3600 1")
    server.call("SET", "other", "x")
    server.call("BGSAVE")
    deadline = CLOCK.now() + GUARD_SECONDS
    while b"rdb_last_bgsave_status:err" not in server.call("INFO", "persistence"):
        assert CLOCK.now() < deadline
        CLOCK.sleep(0.01)


REFUSALS = {
    "READONLY": lambda server, folder: server.call("REPLICAOF", "127.0.0.1", "1"),
    "MISCONF": _misconf,
    "NOPERM": lambda server, folder: server.call("ACL", "SETUSER", "default", "-@write", "-@scripting"),
}
MENDED = {
    "READONLY": lambda server: server.call("REPLICAOF", "NO", "ONE"),
    "MISCONF": lambda server: server.config("stop-writes-on-bgsave-error", "no"),
    "NOPERM": lambda server: server.call("ACL", "SETUSER", "default", "+@all"),
}


@pytest.mark.parametrize("word", REFUSALS)
@pytest.mark.matrix("refusing", "redis")
def test_refused_writes(tmp_path, opened, cases, word):
    """A server that refuses writes costs nothing but those: loads go on, and saving when it takes them again."""
    (tmp_path / "server").mkdir()
    with RedisServer(tmp_path / "server", enable_protected_configs="yes") as server:
        tier = opened(server.address)
        save(tier, A, KEYS, LENGTH)
        REFUSALS[word](server, tmp_path)
        outcomes = save(tier, A, chain(2, 8), LENGTH).outcomes
        assert set(outcomes) <= {Outcome.FAILED, Outcome.FULL}
        assert tier.wait_up(GUARD_SECONDS)
        assert hits(load(tier, A, KEYS, LENGTH)) == len(KEYS)
        MENDED[word](server)
        _well_again(tier, chain(2, 8))
        tier.close()
    cases(16)


@pytest.mark.matrix("refusing", "redis")
def test_a_server_that_loads_its_data(tmp_path, opened, cases):
    """A server that answers LOADING costs misses, and serves again when it has loaded."""
    with RedisServer(tmp_path, enable_debug_command="yes", loading_process_events_interval_bytes="1024") as server:
        tier = opened(server.address)
        save(tier, A, KEYS, LENGTH)
        server.config("key-load-delay", "60000")
        loading = threading.Thread(target=lambda: server.call("DEBUG", "RELOAD"))
        loading.start()
        seen = []
        while loading.is_alive():
            seen += load(tier, A, KEYS, LENGTH, seconds=0.5)
        loading.join()
        assert Outcome.FAILED in seen
        server.config("key-load-delay", "0")
        _well_again(tier)
        cases(len(seen))
        tier.close()


@pytest.mark.matrix("refusing", "redis")
def test_passwords(server, opened, cases):
    """A wrong password at the start is an error with a hint; one that came later costs misses, until it is gone."""
    tier = opened(server.address)
    save(tier, A, KEYS, LENGTH)
    server.config("requirepass", "secret")
    server.calls([("AUTH", "secret"), ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")])
    with pytest.raises(TierError) as error:
        RedisTier(Address.parse(server.url, password="wrong"), SPACE)  # noqa: S106  # wrong on purpose
    assert error.value.hint
    while hits(load(tier, A, KEYS, LENGTH, seconds=0.5)):
        CLOCK.sleep(0.01)
    assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.FAILED}
    assert set(save(tier, A, KEYS, LENGTH).outcomes) == {Outcome.FAILED}
    server.calls([("AUTH", "secret"), ("CONFIG", "SET", "requirepass", "")])
    _well_again(tier)
    cases(3)


# -- a server that is gone, frozen or slow -----------------------------------------------------------------------------


@pytest.mark.matrix("killed", "redis")
def test_killed(server, opened, cases):
    """While the server is gone everything is answered at once, with FAILED; when it is back, empty, so is the tier."""
    tier = opened(server.address)
    for _ in range(3):
        _well_again(tier)
        server.kill()
        deadline = CLOCK.now() + GUARD_SECONDS
        while set(load(tier, A, KEYS, LENGTH)) != {Outcome.FAILED}:
            assert CLOCK.now() < deadline
        assert not any(tier.holds(A, KEYS))
        assert set(save(tier, A, KEYS, LENGTH).outcomes) == {Outcome.FAILED}
        assert tier.remove(A, KEYS) == 0
        server.start()
        assert tier.wait_up(GUARD_SECONDS)
        assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.MISS}
    _well_again(tier)
    cases(3)


@pytest.mark.matrix("frozen", "redis")
def test_frozen(server, opened, cases):
    """A frozen server is waited for once, within the bound; then it is not asked, until it answers again."""
    tier = opened(server.address, seconds=0.05)
    count = 0
    for verb in ("load", "find", "holds", "save", "remove"):
        _well_again(tier)
        with server.frozen():
            started = CLOCK.now()
            answers = _all_of(tier, verb)
            first = CLOCK.now() - started
            assert not answers & {Outcome.HIT, True}
            for _ in range(20):
                count += 1
                assert not _all_of(tier, "load") & {Outcome.HIT}
            assert first < GUARD_SECONDS / 4
    _well_again(tier)
    cases(count)


def _all_of(tier, verb):
    """What all of KEYS are answered with."""
    if verb == "load":
        return set(load(tier, A, KEYS, LENGTH, seconds=0.3))
    if verb == "find":
        return set(tier.find(A, KEYS, CLOCK.now() + 0.3))
    if verb == "holds":
        return set(tier.holds(A, KEYS))
    if verb == "save":
        job = tier.save(A, chain(77, 4), blocks_of(A, chain(77, 4), LENGTH))
        assert job.wait(GUARD_SECONDS)
        return set(job.outcomes)
    tier.remove(A, chain(78, 2))
    return set()


@pytest.mark.matrix("slow", "redis")
def test_slow(server, opened, cases):
    """A server that takes longer than the bound is late, and nothing of it is used; one that is quicker is used."""
    with Proxy(server.address) as proxy:
        tier = opened(proxy.address, seconds=0.2)
        _well_again(tier)
        proxy.strike(Delay(Way.DOWN, 0.02))
        assert hits(load(tier, A, KEYS, LENGTH)) == len(KEYS)
        for fault in (Delay(Way.DOWN, 1.0), Delay(Way.UP, 1.0), Pause(Way.DOWN, 20_000, 1.0), Freeze(Way.DOWN, 5)):
            _well_again(tier)
            proxy.strike(fault)
            outcomes = load(tier, A, KEYS, LENGTH)
            assert hits(outcomes) < len(KEYS)
            proxy.thaw()
        _well_again(tier)
        proxy.strike(Rate(Way.DOWN, 100_000))  # never silent for long, and far too slow
        outcomes = load(tier, A, KEYS, LENGTH, seconds=0.3)
        assert 0 < hits(outcomes) < len(KEYS)
        cases(6)


def test_refused_connections(server, opened):
    """While connecting is refused nobody waits for it; afterwards the tier connects by itself."""
    with Proxy(server.address) as proxy:
        proxy.refuse()
        tier = opened(proxy.address, up=False)
        assert set(load(tier, A, KEYS, LENGTH)) == {Outcome.FAILED}
        proxy.allow()
        _well_again(tier)
        proxy.refuse()
        proxy.cut()
        while set(load(tier, A, KEYS, LENGTH)) != {Outcome.FAILED}:
            CLOCK.sleep(0.01)
        proxy.allow()
        _well_again(tier)


# -- the wire ----------------------------------------------------------------------------------------------------------

REPLY_BYTES = len(b"$8192\r\n") + FRAME + 2


@pytest.mark.parametrize("step", [331, pytest.param(1, marks=LONG)])
@pytest.mark.matrix("connection cut", "redis")
def test_cut_at_every_byte(server, opened, cases, step):
    """Wherever in the reply to a load the connection is reset, that block is not used, and the next load works."""
    key = KEYS[:1]
    count = 0
    with Proxy(server.address) as proxy:
        tier = opened(proxy.address)
        save(tier, A, key, LENGTH)
        for at in [*range(10), *range(10, REPLY_BYTES, step), REPLY_BYTES - 1]:
            proxy.strike(Cut(Way.DOWN, at))
            assert set(load(tier, A, key, LENGTH)) <= {Outcome.FAILED, Outcome.LATE}
            assert tier.wait_up(GUARD_SECONDS)
            assert load(tier, A, key, LENGTH) == [Outcome.HIT]
            count += 1
    cases(count)


@pytest.mark.parametrize("step", [2_111, pytest.param(61, marks=LONG)])
@pytest.mark.matrix("killed while writing", "redis")
def test_cut_while_writing(server, opened, cases, step):
    """Wherever in a save the connection is reset, what is there afterwards is exact, and the next save works."""
    count = 0
    with Proxy(server.address) as proxy:
        tier = opened(proxy.address)
        for at in range(0, 5 * FRAME, step):
            keys = chain(10_000 + at, 4)
            proxy.strike(Cut(Way.UP, at))
            job = tier.save(A, keys, blocks_of(A, keys, LENGTH))
            assert job.wait(GUARD_SECONDS)
            assert tier.wait_up(GUARD_SECONDS)
            assert set(load(tier, A, keys, LENGTH)) <= {Outcome.HIT, Outcome.MISS, Outcome.FAILED, Outcome.LATE}
            count += 1
        _well_again(tier)
    cases(count)


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=LONG)])
@pytest.mark.parametrize("way", Way)
@pytest.mark.matrix("bit on the wire", "redis")
def test_bits_on_the_wire(server, opened, cases, way, count):
    """A bit that flips on its way, in a request or a reply, in what is saved or what is loaded, is never used."""
    rng = random.Random(count)  # noqa: S311  # a seed must replay
    _wire_faults(server, opened, [Flip(way, rng.randrange(4 * FRAME), rng.randrange(8)) for _ in range(count)])
    cases(count)


@pytest.mark.parametrize("count", [30, pytest.param(1_000, marks=LONG)])
@pytest.mark.matrix("bytes lost on the wire", "redis")
def test_lost_and_repeated_bytes(server, opened, cases, count):
    """Bytes that get lost, or arrive twice, shift everything behind them: nothing of that is used."""
    rng = random.Random(count)  # noqa: S311  # a seed must replay
    faults = [
        rng.choice((Drop, Repeat))(rng.choice(list(Way)), rng.randrange(4 * FRAME), rng.randrange(1, 64))
        for _ in range(count)
    ]
    _wire_faults(server, opened, faults)
    cases(count)


def _wire_faults(server, opened, faults):
    """One fault at a time on every link: save and load what is exact or is not used. Then all is well."""
    with Proxy(server.address) as proxy:
        tier = opened(proxy.address, seconds=0.1)
        for number, fault in enumerate(faults):
            keys = chain(number % 50, 4)
            proxy.strike(fault)
            job = tier.save(A, keys, blocks_of(A, keys, LENGTH))
            load(tier, A, keys, LENGTH, seconds=0.5)
            assert job.wait(GUARD_SECONDS)
            load(tier, A, keys, LENGTH, seconds=0.5)
            tier.find(A, keys, CLOCK.now() + 0.5)
            if number % 5 == 4:
                proxy.cut()
        proxy.cut()
        server.call("FLUSHALL")
        _well_again(tier)


# -- deadlines, and what is left over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=LONG)])
@pytest.mark.matrix("hung", "redis")
def test_no_operation_outlives_its_deadline(server, opened, cases, seconds, record_property):
    """Whatever server and wire do meanwhile, each operation is over soon after its deadline, and no HIT is wrong.

    Times in which this machine did not even wake a sleeper do not count: the witness is another process.
    """
    with Proxy(server.address) as proxy:
        tier = opened(proxy.address, seconds=0.05)
        save(tier, A, KEYS, LENGTH)
        storm = threading.Thread(target=_storm, args=(proxy, server, CLOCK.now() + seconds))
        with Witness() as witness:
            storm.start()
            told, late, seen = _ask_until_over(tier, storm)
            storm.join()
        ours = [end - deadline - witness.stalled_seconds(begin, end) for begin, deadline, end in late]
        worst = max((end - deadline for _, deadline, end in late), default=0.0)
        count = told.total()
        text = f"{told['met']:,} met the wire, {len(late)} of {count:,} over by 50 ms, at most {1e3 * worst:.0f} ms"
        record_property(
            matrix.NOTE, f"{text}; {sum(over > OVERRUN_SECONDS for over in ours)} of them not the machine's"
        )
        assert Outcome.HIT in seen
        assert seen & {Outcome.LATE, Outcome.FAILED}
        assert max(ours, default=0.0) < (OVERRUN_SECONDS if seconds > 50 else GUARD_SECONDS)
        _well_again(tier)
    cases(count)


def _ask_until_over(tier, storm):
    """How many operations met the wire and how many no link, those over by more than the bound, what all answered."""
    rng = random.Random(9)  # noqa: S311  # a seed must replay
    into = room_for(len(KEYS), LENGTH)
    right = [content(A, key, LENGTH) for key in KEYS]
    told, late, seen = Counter(), [], set()
    while storm.is_alive():
        begin = CLOCK.now()
        deadline = begin + rng.choice((0.0, 0.001, 0.005, 0.02, 0.05))
        loads = rng.random() < 0.8
        outcomes = tier.load(A, KEYS, into, deadline) if loads else tier.find(A, KEYS, deadline)
        end = CLOCK.now()
        if end - deadline > OVERRUN_SECONDS:
            late.append((begin, deadline, end))
        for pieces, outcome, wanted in zip(into, outcomes, right, strict=True):
            assert not loads or outcome is not Outcome.HIT or np.array_equal(pieces[0], wanted)
        seen |= set(outcomes)
        told["no link" if set(outcomes) == {Outcome.FAILED} else "met"] += 1
    return told, late, seen


def _storm(proxy, server, until):
    """Something else goes wrong every few milliseconds; between that the wire is well."""
    rng = random.Random(3)  # noqa: S311  # a seed must replay
    while CLOCK.now() < until:
        way, at = rng.choice(list(Way)), rng.randrange(2 * FRAME)
        fault = rng.choice(
            [Flip(way, at), Cut(way, at), Delay(way, 0.01), Pause(way, at, 0.02), Drop(way, at, 9), None]
        )
        if fault is not None:
            proxy.strike(fault)
        elif rng.random() < 0.5:
            with server.frozen():
                CLOCK.sleep(0.03)
        else:
            proxy.freeze()
            CLOCK.sleep(0.03)
            proxy.thaw()
        CLOCK.sleep(rng.uniform(0.0, 0.2))
        proxy.cut()


def test_nothing_is_left(tmp_path):
    """A tier that is closed while its server is gone, frozen or refuses leaves no thread and no descriptor."""
    with RedisServer(tmp_path) as server:
        threads, files = threading.active_count(), _open_files()
        for trouble in ("none", "frozen", "killed"):
            tier = RedisTier(Address.parse(server.url), SPACE)
            assert tier.wait_up(GUARD_SECONDS)
            save(tier, A, KEYS, LENGTH)
            if trouble == "frozen":
                server.freeze()
            elif trouble == "killed":
                server.kill()
            load(tier, A, KEYS, LENGTH, seconds=0.2)
            tier.save(A, KEYS, blocks_of(A, KEYS, LENGTH))
            tier.close()
            tier.close()
            if trouble == "frozen":
                server.thaw()
        assert (threading.active_count(), _open_files()) == (threads, files)
