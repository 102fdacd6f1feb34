"""The tables of commands against a real server's own, and the places of keys."""

from __future__ import annotations

import pytest
import redis

from thermocline.near.commands import EFFECTS, LOCAL, READS, WRITES, Kind, effect


@pytest.fixture(scope="module")
def told(redis_server):
    """What the server says of its commands."""
    with redis.Redis(port=redis_server.port) as client:
        return {name.upper(): facts for name, facts in client.command().items()}


def test_nothing_that_writes_counts_as_reading(told):
    """Every command that this server says may write is known as one that changes keys, or as unknown."""
    writing = {name for name, facts in told.items() if {"write", "movablekeys"} & set(facts["flags"])}
    safe = {name for name in writing if effect((name,)).kind in {Kind.NOTHING, Kind.LOCAL}}
    assert {name for name in safe if "write" in told[name]["flags"]} == set()
    assert len(writing) > 90


def test_places_of_written_keys_are_the_servers(told):
    """Where a command's keys stand is what the server says; of those with a destination, at least that one."""
    for (first, last, step), names in WRITES.items():
        for name in names.split():
            if name in told:
                facts = told[name]
                assert (facts["first_key_pos"], facts["step_count"]) == (first, step), name
                assert facts["last_key_pos"] == last, name


def test_every_command_of_the_server_is_known_or_unknown_on_purpose(told):
    """What stands in no table may have written anything: scripts, commands with keys at moving places, and the like."""
    unknown = {name for name in told if effect((name,)).kind is Kind.UNKNOWN}
    moving = (
        "BLMPOP BZMPOP DEBUG EVAL EVALSHA FAILOVER FCALL FUNCTION GEORADIUS GEORADIUSBYMEMBER LMPOP MIGRATE MODULE "
        "PFDEBUG PFSELFTEST PSYNC REPLCONF REPLICAOF SLAVEOF SORT SYNC XGROUP XREADGROUP ZMPOP"
    )
    assert unknown <= {*moving.split()}


def test_names_in_any_form_mean_the_same():
    """Case, bytes and a second word change nothing; a command nobody knows may have changed anything."""
    assert effect((b"get", "k")).kind is Kind.NOTHING  # and so is asked of the server: only redis-py's way is local
    assert effect(("get", "k")).kind is Kind.NOTHING
    assert effect(("set", "k", 1)) == effect((b"SET", "k", 1)) == EFFECTS["SET"]
    assert effect(("CONFIG GET", "save")).kind is effect(("client list",)).kind is Kind.NOTHING
    for args in (("XGROUP CREATE", "k"), ("JSON.SET", "k"), ("",), (7,), ("EVALSHA", "x", 0), ("DEL x", "k")):
        assert effect(args).kind is Kind.UNKNOWN


def test_keys_that_a_command_changes():
    """First, last and step select keys as the server counts them."""
    for args, keys in {
        ("SET", "a", 1): ["a"],
        ("DEL", "a", "b", "c"): ["a", "b", "c"],
        ("MSET", "a", 1, "b", 2): ["a", "b"],
        ("BLPOP", "a", "b", 5): ["a", "b"],
        ("RENAME", "a", "b"): ["a", "b"],
        ("BITOP", "AND", "to", "a", "b"): ["to", "a", "b"],
    }.items():
        assert list(effect(args).keys(args)) == keys
    assert not set(LOCAL.split()) & set(READS.split())
