"""The suite itself is tested: a tier that lies fails at least one of its promises, and an honest wrapper none."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import product

import pytest

from tests.conformance import lying, openings, samples, test_tiers

SLOW = ("test_threads", "test_sizes_share_the_room", "test_remove_frees")
PROMISES = {
    name: promise
    for name, promise in vars(test_tiers).items()
    if name.startswith("test_") and list(inspect.signature(promise).parameters) == ["opening"]
}
IN_ORDER = [name for name in PROMISES if name not in SLOW] + [name for name in PROMISES if name in SLOW]


def _opening(kind, path, wrap, request):
    if kind == "redis":
        honest = openings.redis(request.getfixturevalue("redis_server"))
    else:
        honest = openings.memory() if kind == "memory" else openings.disk(path)
    return replace(honest, kind=f"{kind}-lying", wrap=wrap)


def _broken(kind, wrap, path, monkeypatch, request):
    """The first promise that this tier breaks, and how; None if it keeps them all."""
    for name in [*IN_ORDER, "test_threads"]:
        opening = _opening(kind, path / name, wrap, request)
        promise = PROMISES.get(name) or (lambda it: test_tiers.test_threads(it, monkeypatch))
        try:
            promise(opening)
        except Exception as error:  # noqa: BLE001  # a liar may fail in any way
            return name, error
        finally:
            for tier in opening._opened:
                tier._tier.close()
    return None


CASES = [
    (liar, kind)
    for liar, kind in product(lying.LIARS, ("memory", "disk", "redis"))
    if not (liar in lying.ONLY_PERSISTENT and kind != "disk")
    and not (liar in lying.ONLY_MEMORY and kind != "memory")
    and not (liar in lying.NOT_IF_IT_EVICTS and kind == "redis")
]


@pytest.mark.parametrize(("liar", "kind"), CASES, ids=[f"{liar.__name__}-{kind}" for liar, kind in CASES])
def test_a_lie_is_found(liar, kind, tmp_path, monkeypatch, request):
    """A tier that breaks a promise fails the suite."""
    monkeypatch.setattr(samples, "PATIENCE_SECONDS", 2.0)  # some liars never answer
    assert _broken(kind, liar, tmp_path, monkeypatch, request), f"{liar.__name__} passes the suite: {liar.__doc__}"


@pytest.mark.parametrize("kind", ["memory", "disk", "redis"])
def test_the_truth_passes(kind, tmp_path, monkeypatch, request):
    """The wrapper that all liars share breaks nothing by itself."""
    assert _broken(kind, lying._Liar, tmp_path, monkeypatch, request) is None
