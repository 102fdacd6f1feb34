"""The Redis tier on a real server. What happens when that server fails is in tests/faults."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.samples import CLOCK, PATIENCE_SECONDS, blocks_of, chain, hits, layout_of, load, save
from tests.faults.redis_server import RedisServer
from thermocline.blocks.frame import frame_bytes
from thermocline.errors import TierError
from thermocline.tiers.redis import LINKS, RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.tier import Block, Outcome, SharedTier
from thermocline.wire import resp
from thermocline.wire.resp import Address

MIB = 1024 * 1024
LENGTH = 10_000
A = layout_of("a")
SPACE = Space(b"test", 64 * MIB, 3600.0)


@pytest.fixture
def server(tmp_path):
    """A server of the test's own."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def opened(server):
    """Opens tiers on that server, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def opens(space=SPACE, *, url="", password=None, ca_file=None, **options):
            address = Address.parse(url or server.url, password=password, ca_file=ca_file)
            tier = RedisTier(address, space, wait_seconds=PATIENCE_SECONDS, **options)
            stack.callback(tier.close)
            assert tier.wait_up(PATIENCE_SECONDS)
            return tier

        yield opens


def _values(server, name="test"):
    """The keys of blocks, without those of the books."""
    return [key for key in server.keys(f"{name}:*") if len(key) == len(name) + 1 + 64]


def test_engines_share(opened, server):
    """What one tier saved, another one of the same namespace finds and loads; another namespace holds nothing of it."""
    first, second = opened(), opened()
    stranger = opened(Space(b"other", 64 * MIB, 3600.0))
    assert isinstance(first, SharedTier)
    keys = chain(1, 9)
    save(first, A, keys, cuts=3)
    assert second.find(A, [*keys, *chain(2, 1)], CLOCK.now() + 60) == [Outcome.HIT] * 9 + [Outcome.MISS]
    assert hits(load(second, A, keys, cuts=5)) == 9
    assert not any(stranger.holds(A, keys))
    assert len(_values(server)) == 9


def test_a_unix_socket(opened, server):
    """The tier speaks over a Unix socket as over TCP."""
    tier = opened(url=f"unix://{server.socket_path}")
    keys = chain(1, 3)
    save(tier, A, keys)
    assert hits(load(tier, A, keys)) == 3


def test_what_is_there_is_not_sent_again(opened, server):
    """A block that another engine wrote is kept as it is: only the lacking ones cross the wire."""
    first, second = opened(), opened()
    keys = chain(1, 6)
    save(first, A, keys[:4])
    before = int(_stat(server, "total_net_input_bytes"))
    assert set(save(second, A, keys).outcomes) == {Outcome.HIT}
    sent = int(_stat(server, "total_net_input_bytes")) - before
    assert 2 * frame_bytes(LENGTH) < sent < 3 * frame_bytes(LENGTH)
    assert all(second.known(A, keys))


def _stat(server, name):
    lines = server.call("INFO", "stats").decode().splitlines()
    return next(line.partition(":")[2] for line in lines if line.startswith(name))


def test_the_cap_holds_for_all_who_share(opened, server):
    """Two tiers together never hold more than the cap, and their sum is what the server really has."""
    space = Space(b"test", 40 * frame_bytes(LENGTH), 3600.0)
    tiers = opened(space), opened(space)
    for turn in range(12):
        for at, tier in enumerate(tiers):
            save(tier, A, chain((turn, at), 5))
            usage, values = tier.usage(), _values(server)
            assert usage.used_bytes <= usage.capacity_bytes
            assert len(values) == usage.blocks
            assert sum(server.call("STRLEN", value) for value in values) == usage.used_bytes
    assert tiers[0].usage().capacity_bytes == space.capacity_bytes
    assert len(_values(server)) == 40


def test_ends_of_paths_go_before_their_beginnings(opened):
    """When room is made, what is left of a path is its beginning, and the path used last is whole."""
    tier = opened(Space(b"test", 30 * frame_bytes(LENGTH), 3600.0))
    old, new = chain(1, 20), chain(2, 16)
    save(tier, A, old)
    CLOCK.sleep(0.8)  # a block counts as older by a 100,000th of its time to live for each block above it
    save(tier, A, new)
    left = tier.holds(A, old)
    assert all(tier.holds(A, new))
    assert 0 < sum(left) < 20
    assert left == sorted(left, reverse=True)


def test_values_expire_and_live_on_by_use(opened, server):
    """Every key has a time to live; a load gives the whole of it again, to the value and in the books."""
    tier = opened(Space(b"test", 64 * MIB, 500.0))
    other = opened(Space(b"test", 64 * MIB, 500.0))
    keys = chain(1, 3)
    save(tier, A, keys)
    values = [b"test:" + A + key for key in keys]
    assert all(0 < server.call("PTTL", key) <= 500_000 for key in values)
    assert all(server.call("PTTL", key) > 0 for key in server.keys("test:*")), "the books must not stay for ever"
    for key in values:
        server.call("PEXPIRE", key, 60_000)
    assert hits(load(other, A, keys[:2])) == 2
    assert other.wait_idle(PATIENCE_SECONDS)
    lived = [server.call("PTTL", key) for key in values]
    assert min(lived[:2]) > 60_000 >= lived[2]


def test_expired_values_leave_the_books(opened, server):
    """What the server let expire is not counted for ever: the next save takes it out of the sum."""
    tier = opened(Space(b"test", 64 * MIB, 0.3))
    save(tier, A, chain(1, 5))
    assert tier.usage().blocks == 5
    CLOCK.sleep(0.6)
    save(tier, A, chain(2, 2))
    assert tier.usage().blocks == 2
    assert tier.usage().used_bytes == 2 * frame_bytes(LENGTH)
    assert hits(load(tier, A, chain(1, 5))) == 0


@pytest.mark.matrix("index damaged", "redis")
def test_the_books_are_made_again(opened, server):
    """Where the server evicted a part of the books, sums come from what is left, and never fall below the truth."""
    tier = opened()
    save(tier, A, chain(1, 5))
    server.call("DEL", "test:used")
    save(tier, A, chain(2, 2))
    assert tier.usage().used_bytes == 7 * frame_bytes(LENGTH)
    server.call("DEL", "test:sizes", "test:used")
    save(tier, A, chain(3, 1))
    assert tier.usage().used_bytes == 8 * frame_bytes(LENGTH)
    server.call("DEL", "test:index")
    save(tier, A, chain(4, 1))
    assert tier.usage().blocks == 1


def test_only_beginnings(opened):
    """Blocks behind the depth that is kept are a MISS, as are those that could never fit; the others are taken."""
    tier = opened(Space(b"test", 4 * MIB, 3600.0, depth_max=4))
    keys = chain(1, 6)
    assert save(tier, A, keys).outcomes == [Outcome.HIT] * 4 + [Outcome.MISS] * 2
    assert tier.depth_max == 4
    large = layout_of("large", 2 * MIB)
    assert save(tier, large, keys[:1], 2 * MIB).outcomes == [Outcome.MISS]


def test_the_queue_is_bounded(opened, server):
    """More than may wait is LATE at once, and is not written; nothing is left in flight."""
    tier = opened(queue_bytes_max=4 * frame_bytes(LENGTH))
    with server.frozen():
        first = tier.save(A, chain(1, 3), blocks_of(A, chain(1, 3)))
        second = tier.save(A, chain(2, 3), blocks_of(A, chain(2, 3)))
        assert second.outcomes[1:] == [Outcome.LATE] * 2
    assert first.wait(PATIENCE_SECONDS)
    assert second.wait(PATIENCE_SECONDS)
    assert tier.wait_idle(PATIENCE_SECONDS)
    tier.check_integrity()


def test_a_restart_empties_what_is_known(opened, server):
    """After the server was replaced by an empty one the tier reconnects, knows nothing, and takes everything again."""
    tier = opened()
    keys = chain(1, 4)
    save(tier, A, keys)
    server.restart()
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while any(tier.known(A, keys)):
        assert CLOCK.now() < deadline, "it goes on believing"
        tier.holds(A, keys)
        CLOCK.sleep(0.02)
    assert tier.wait_up(PATIENCE_SECONDS)
    assert set(save(tier, A, keys).outcomes) == {Outcome.HIT}
    assert hits(load(tier, A, keys)) == 4


def test_nothing_is_known_at_first(opened):
    """However long values live, and however young the clock is, what was never written nor met is not known."""
    tier = opened(Space(b"test", 64 * MIB, 1e9))
    keys = chain(1, 3)
    assert not any(tier.known(A, keys))
    save(tier, A, keys)
    assert all(tier.known(A, keys))


def test_what_the_server_lost_is_not_known(opened, server):
    """A load that finds nothing ends the belief that it is there."""
    tier = opened()
    keys = chain(1, 3)
    save(tier, A, keys)
    server.call("FLUSHALL")
    assert load(tier, A, keys) == [Outcome.MISS] * 3
    assert not any(tier.known(A, keys))


def test_damage_is_deleted(opened, server):
    """A damaged value is refused, not held from then on, deleted on the server, and a new save brings it back."""
    tier = opened()
    keys = chain(1, 3)
    save(tier, A, keys)
    value = b"test:" + A + keys[1]
    server.call("SETRANGE", value, 5000, b"\x00\x01\x02")
    assert load(tier, A, keys) == [Outcome.HIT, Outcome.CORRUPT, Outcome.HIT]
    assert tier.holds(A, keys) == [True, False, True]
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert server.call("EXISTS", value) == 0
    assert set(save(tier, A, keys).outcomes) == {Outcome.HIT}
    assert hits(load(tier, A, keys)) == 3


def test_damage_that_is_not_deleted_yet_is_written_over(opened, server):
    """A save of a block whose value is known to be damaged does not take it for held: it is written anew."""
    tier = opened()
    keys = chain(1, 2)
    save(tier, A, keys)
    server.call("SETRANGE", b"test:" + A + keys[1], 5000, b"\x00\x01\x02")
    tier._damaged.add((A, keys[1]))  # as where the server went away before it deleted the value
    assert set(save(tier, A, keys).outcomes) == {Outcome.HIT}
    assert hits(load(tier, A, keys)) == 2


def test_no_memory_is_full(opened, server):
    """A server that refuses for lack of memory makes blocks FULL, keeps what it has, and takes more later."""
    tier = opened()
    keys = chain(1, 3)
    save(tier, A, keys)
    server.config("maxmemory", "1mb")
    assert set(save(tier, A, chain(2, 3)).outcomes) == {Outcome.FULL}
    assert hits(load(tier, A, keys)) == 3
    server.config("maxmemory", "0")
    assert set(save(tier, A, chain(2, 3)).outcomes) == {Outcome.HIT}


def test_nothing_stays_that_nobody_counts(opened, server):
    """Where a user may not run scripts, no value is left behind without being accounted for."""
    server.call("ACL", "SETUSER", "plain", "on", ">word", "~*", "+@all", "-eval")
    tier = opened(url=f"redis://plain@127.0.0.1:{server.port}", password="word")  # noqa: S106  # planted above
    assert set(save(tier, A, chain(1, 3)).outcomes) == {Outcome.FAILED}
    assert _values(server) == []


def test_the_rights_that_it_needs(opened, server):
    """A user with the rights that the guide names, and keys of the namespace only, can do all that the tier does."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "redis.md").read_text()
    (rights,) = re.findall(r"`(\+@[^`]*)`", guide)
    server.call("ACL", "SETUSER", "engine", "on", ">word", "~test:*", *rights.split())
    url = f"redis://engine@127.0.0.1:{server.port}"
    tier = opened(Space(b"test", 20 * frame_bytes(LENGTH), 3600.0), url=url, password="word")  # noqa: S106  # planted above
    keys = chain(1, 12)
    save(tier, A, chain(2, 12))
    CLOCK.sleep(0.6)  # as above
    assert set(save(tier, A, keys).outcomes) == {Outcome.HIT}
    assert hits(load(tier, A, keys)) == 12
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert tier.remove(A, keys) == 12


def test_what_was_lost_is_offered_again(opened, server):
    """Once the tier was told that a value is gone, by a question or a load, it does not call it known."""
    tier = opened()
    keys = chain(1, 4)
    save(tier, A, keys)
    server.call("FLUSHALL")
    assert tier.find(A, keys, CLOCK.now() + 60) == [Outcome.MISS] * 4
    assert not any(tier.known(A, keys))


def test_a_save_of_what_is_there_lets_it_live_on(opened, server):
    """A value that another engine wrote and this one uses as well gets its whole time to live again."""
    first, second = opened(), opened()
    keys = chain(1, 2)
    save(first, A, keys)
    for key in keys:
        server.call("PEXPIRE", b"test:" + A + key, 60_000)
    save(second, A, keys)
    assert second.wait_idle(PATIENCE_SECONDS)
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while min(server.call("PTTL", b"test:" + A + key) for key in keys) <= 60_000:
        assert CLOCK.now() < deadline, "it expires although it is used"
        CLOCK.sleep(0.01)


def test_more_callers_than_links(opened, server):
    """Many at a time are all served; one that finds no free link in its time is told so, and nothing is lost by it."""
    tier = opened()
    keys = chain(1, 40)
    save(tier, A, keys)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: load(tier, A, keys), range(96)))
    assert all(outcome in {Outcome.HIT, Outcome.PENDING} for answer in answers for outcome in answer)
    assert hits(load(tier, A, keys)) == 40


def test_a_caller_in_a_hurry_costs_nobody_else(opened, server):
    """A load that has no time left says LATE and closes its own connection; the others stay as they are."""
    tier = opened()
    keys = chain(1, 4)
    save(tier, A, keys)
    before = len(tier._links._ready)
    assert load(tier, A, keys, seconds=-1.0) == [Outcome.LATE] * 4
    assert len(tier._links._ready) >= before - 1
    assert hits(load(tier, A, keys)) == 4


def test_links_that_are_dropped_during_a_load(opened):
    """Dropping all links ends no load that is under way: it is served to its end, and its link closed then."""
    tier = opened()
    keys = chain(1, 8)
    save(tier, A, keys)
    with tier._links.lent(CLOCK.now() + PATIENCE_SECONDS) as link:
        tier._links.drop()
        outcomes = []
        tier._receive(link, A, keys, [[np.zeros(LENGTH, np.uint8)] for _ in keys], CLOCK.now() + 60, outcomes)
    assert outcomes == [Outcome.HIT] * 8
    assert not link.usable


def test_all_links_are_seen_to(opened, server):
    """Every idle link and the writer's own line are asked now and then, so that none dies of idleness unnoticed."""
    tier = opened()
    assert tier.wait_up(PATIENCE_SECONDS)
    before = _calls(server, "ping")
    tier._links.ping(PATIENCE_SECONDS)
    assert _calls(server, "ping") - before == LINKS


def _calls(server, command):
    lines = server.call("INFO", "commandstats").decode().splitlines()
    line = next((line for line in lines if line.startswith(f"cmdstat_{command}:")), "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])


def test_a_read_only_replica(opened, server, tmp_path):
    """A replica serves what it has; damage there is refused for good, though nobody can delete it."""
    tier = opened()
    keys = chain(1, 4)
    save(tier, A, keys)
    server.call("SETRANGE", b"test:" + A + keys[1], 5000, b"\x00\x01\x02")
    server.call("REPLICAOF", "127.0.0.1", "1")
    assert load(tier, A, keys)[:2] == [Outcome.HIT, Outcome.CORRUPT]
    assert tier.wait_idle(PATIENCE_SECONDS)
    for _ in range(3):
        assert tier.find(A, keys[:2], CLOCK.now() + 60) == [Outcome.HIT, Outcome.MISS]
    assert set(save(tier, A, chain(2, 2)).outcomes) == {Outcome.FAILED}


def test_secrets_are_not_quoted(server):
    """What a server says of a command that it does not know may quote a password: it is cut off."""
    server.call("CONFIG", "SET", "maxclients", "100")
    link = resp.connect(Address.parse(server.url), now=CLOCK.now, deadline=CLOCK.now() + 60)
    link.send([resp.encode(b"NOSUCH", b"TOPSECRET")], CLOCK.now() + 60)
    reply = link.reply(CLOCK.now() + 60)
    assert isinstance(reply, resp.Refusal)
    assert "TOPSECRET" not in reply.text
    link.close()


def test_closing_does_not_wait_for_a_server(opened, server):
    """A tier whose server is frozen in the middle of a save closes, and the save has ended."""
    tier = opened()
    with server.frozen():
        job = tier.save(A, chain(1, 3), blocks_of(A, chain(1, 3)))
        tier.close()
        assert job.done
        assert Outcome.HIT not in job.outcomes


def test_no_such_authority(server, tmp_path):
    """A CA file that is not there is an error at once, with a hint."""
    address = Address.parse("rediss://127.0.0.1:1", ca_file=tmp_path / "none.pem")
    with pytest.raises(TierError) as raised:
        RedisTier(address, SPACE)
    assert "redis_ca_file" in raised.value.hint


def test_passwords(server):
    """The right password is let in, a wrong or missing one is an error at once, with a hint."""
    server.config("requirepass", "secret")
    tier = RedisTier(Address.parse(server.url, password="secret"), SPACE)  # noqa: S106  # planted above
    assert tier.wait_up(PATIENCE_SECONDS)
    tier.close()
    for password in ("wrong", None):
        with pytest.raises(TierError) as raised:
            RedisTier(Address.parse(server.url, password=password), SPACE)
        assert "redis_password_file" in raised.value.hint


def test_a_server_that_is_not_there(tmp_path):
    """No server is no error: everything is FAILED at once, and when it comes up the tier finds it."""
    with RedisServer(tmp_path) as server:
        server.kill()
        tier = RedisTier(Address.parse(server.url), SPACE)
        keys = chain(1, 3)
        assert load(tier, A, keys) == [Outcome.FAILED] * 3
        assert tier.find(A, keys, CLOCK.now() + 60) == [Outcome.FAILED] * 3
        assert save(tier, A, keys).outcomes == [Outcome.FAILED] * 3
        server.start()
        assert tier.wait_up(PATIENCE_SECONDS)
        assert set(save(tier, A, keys).outcomes) == {Outcome.HIT}
        tier.close()


def test_a_block_that_cannot_be_sent(opened):
    """Pieces that are no plain memory cost their own save and nothing else: the tier goes on."""
    tier = opened()
    keys = chain(1, 2)
    good = blocks_of(A, keys)
    bad = Block(good[1].parent, 2, [good[1].pieces[0][::2], good[1].pieces[0][1::2]], good[1].sum)
    job = tier.save(A, keys, [good[0], bad])
    assert job.wait(PATIENCE_SECONDS)
    assert Outcome.HIT not in job.outcomes[1:]
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while set(save(tier, A, keys).outcomes) != {Outcome.HIT}:  # the connection, in an unknown state, is made again
        assert CLOCK.now() < deadline, "it takes nothing any more"
        CLOCK.sleep(0.02)
    assert hits(load(tier, A, keys)) == 2


def test_tls(tmp_path, opened):
    """Over TLS the certificate is checked: the right authority connects and loads, another one does not."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl on this machine, which makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    made = [program, *words.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    folder = tmp_path / "tls"
    folder.mkdir()
    with RedisServer(folder) as server:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        for name, value in (("key-file", key), ("cert-file", certificate)):
            server.call("CONFIG", "SET", f"tls-{name}", str(value))
        server.call("CONFIG", "SET", "tls-auth-clients", "no", "tls-port", str(port))
        url = f"rediss://127.0.0.1:{port}"
        tier = opened(url=url, ca_file=certificate)
        keys = chain(1, 5)
        save(tier, A, keys, cuts=3)
        assert hits(load(tier, A, keys, cuts=7)) == 5
        stranger = RedisTier(Address.parse(url), SPACE)
        assert load(stranger, A, keys) == [Outcome.FAILED] * 5
        stranger.close()
