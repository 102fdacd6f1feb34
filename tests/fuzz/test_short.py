"""The short form of the fuzzer: the same inputs every time, some thousand for each parser of outside bytes."""

from __future__ import annotations

import resource
from itertools import islice

import pytest

from tests.fuzz.mutate import mutants
from tests.fuzz.targets import TARGETS

COUNT = 6000
NUMBER = 20_260_801
GROWN_BYTES_MAX = 64 << 20


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_break_a_parser(name):
    """Whatever bytes come, each parser refuses them or reads bounded values from them, within bounded memory."""
    target = TARGETS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for payload in (*target.seeds, *islice(mutants(target.seeds, NUMBER), COUNT)):
        try:
            target.feed(payload)
        except BaseException as error:
            raise AssertionError(f"{name} fails on {payload.hex()}") from error
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < GROWN_BYTES_MAX


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_understood(name):
    """The fuzzer begins with bytes that the parser takes, so that what it tries is nearly right."""
    chosen = list(islice(mutants(TARGETS[name].seeds, 1), 50))
    assert chosen == list(islice(mutants(TARGETS[name].seeds, 1), 50))
    for seed in TARGETS[name].seeds:
        TARGETS[name].feed(seed)
