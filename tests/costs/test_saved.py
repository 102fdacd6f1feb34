"""Costs between runs: the next process predicts what the last one did, and no file can do harm."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thermocline.costs import model, saved
from thermocline.costs.model import CostsState, LearnedCosts
from thermocline.costs.saved import SavedCosts

MIB = 1024 * 1024
ASKED = [(1, 0), (64, 0), (2048, 0), (4096, 4096), (16, 16384)]


def learned(costs: LearnedCosts, name: str = "model", factor: float = 1.0) -> LearnedCosts:
    """Costs of one model and two tiers, each measured a few times."""
    random = np.random.default_rng(7)
    costs.computes(name)
    for tokens in (64, 500, 2000, 64, 3000):
        costs.recomputed(tokens, 0, factor * 1e-3 * tokens * float(random.normal(1, 0.1)))
        costs.transferred("memory", tokens * 1000, factor * 1e-6 * tokens)
        costs.transferred("disk", tokens * 1000, factor * 1e-5 * tokens)
    return costs


def answers(costs: LearnedCosts) -> list[float]:
    """What it predicts."""
    sizes = (1000, MIB, 100 * MIB)
    return [costs.recompute(*asked) for asked in ASKED] + [
        costs.transfer(nbytes, tier) for nbytes in sizes for tier in ("memory", "disk", "other")
    ]


def test_the_next_run_predicts_the_same(tmp_path):
    """What was learned is there after a restart, to the last bit, in a file that only its owner may read."""
    path = tmp_path / "costs.json"
    first = SavedCosts(path)
    for _ in range(4):
        learned(first)
    first.close()
    second = SavedCosts(path)
    assert second.computes("model")
    assert answers(second) == answers(first)
    assert second.knows("disk")
    assert not second.knows("other")
    assert (second.sure("disk"), second.sure("memory"), second.sure("other")) == (first.sure("disk"), True, False)
    second.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["costs.json"]


def test_learning_goes_on_where_it_ended(tmp_path):
    """A process that begins with saved costs learns on from them as the same process would have."""
    path = tmp_path / "costs.json"
    first = SavedCosts(path)
    learned(first)
    first.close()
    second = SavedCosts(path)
    second.computes("model")
    second.close()
    for costs in (first, second):
        costs.recomputed(777, 0, 5.0)
        costs.transferred("disk", MIB, 3.0)
    assert answers(first) == answers(second)


def test_each_model_has_its_own_prefills():
    """Prefills of one model say nothing of another; those of models that come back are known again."""
    costs = learned(LearnedCosts(), "small")
    small = answers(costs)
    assert not costs.computes("large")
    assert costs.recompute(64, 0) == LearnedCosts().recompute(64, 0)
    again = LearnedCosts(learned(LearnedCosts(learned(LearnedCosts(), "small").state()), "large", 50.0).state())
    assert again.computes("small")
    assert answers(again)[: len(ASKED)] == small[: len(ASKED)]
    assert again.computes("large")
    assert again.recompute(2048, 0) > 10 * small[2]


def test_models_are_bounded():
    """No more than so many models are kept, the latest ones."""
    state = CostsState()
    for number in range(model.MODELS_KEPT + 5):
        state = learned(LearnedCosts(state), f"model {number}").state()
    assert list(state.prefills) == [f"model {number}" for number in range(5, model.MODELS_KEPT + 5)]


def test_another_machine_measures_anew(tmp_path, monkeypatch, caplog):
    """Costs of another machine are not used, and that is no reason for a warning."""
    path = tmp_path / "costs.json"
    assert saved.write(path, learned(LearnedCosts()).state())
    monkeypatch.setattr(saved, "machine", lambda: "another one")
    assert saved.read(path) == CostsState()
    assert not caplog.records


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 1}',
        b"\xff\xfe",
        b"null",
        b'{"version": "1"}',
        b"[" * 100_000,
        b'{"x":' + b"[" * 100_000,
        b" " * 2**21,
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path, caplog, body):
    """A file that is no saved costs is not used, one warning says so, and the next save replaces it."""
    path = tmp_path / "costs.json"
    path.write_bytes(body)
    costs = SavedCosts(path)
    assert answers(costs) == answers(LearnedCosts())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    learned(costs)
    costs.close()
    assert saved.read(path) == costs.state()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_file_makes_costs_absurd(tmp_path, data):
    """Whatever numbers a file holds, what is predicted from it is finite and not negative."""
    raw = json.loads(msgspec.json.encode(learned(LearnedCosts()).state()))
    number = st.one_of(st.floats(allow_nan=False), st.integers(-(10**30), 10**30), st.just(0))
    fits = [*raw["prefills"].values(), *raw["transfers"].values()]
    for fit in data.draw(st.lists(st.sampled_from(fits), min_size=1, max_size=3)):
        size = data.draw(st.sampled_from(fit["sizes"]))
        name = data.draw(st.sampled_from(["sums", "slowness", "weight", "size"]))
        if name == "sums":
            row = data.draw(st.sampled_from(size["sums"]))
            row[data.draw(st.integers(0, len(row) - 1))] = data.draw(number)
        else:
            size[name] = data.draw(number)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"version": saved.VERSION, "machine": saved.machine(), "costs": raw}))
    costs = LearnedCosts(saved.read(path))
    costs.computes("model")
    costs.recomputed(100, 0, 0.1)
    assert all(0 <= answer < float("inf") for answer in answers(costs))


def test_a_file_that_cannot_be_written_is_no_trouble(tmp_path, caplog):
    """Where costs cannot be saved, a warning says so, and everything else goes on."""
    costs = SavedCosts(tmp_path / "missing" / "costs.json")
    learned(costs)
    costs.close()
    costs.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list(tmp_path.iterdir()) == []


def test_costs_are_saved_now_and_then(tmp_path, monkeypatch):
    """A process that is killed has saved what it learned until shortly before."""
    written = threading.Event()
    real = saved.write

    def write(path: Path, state: CostsState) -> bool:
        done = real(path, state)
        if state.transfers:
            written.set()
        return done

    monkeypatch.setattr(saved, "write", write)
    costs = SavedCosts(tmp_path / "costs.json", save_seconds=0.01)
    learned(costs)
    assert written.wait(30)
    assert saved.read(tmp_path / "costs.json").transfers
    costs.close()


def test_a_link_is_not_followed(tmp_path):
    """A link in the draft's place is not written through."""
    path, victim = tmp_path / "costs.json", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"costs.json.{os.getpid()}.new").symlink_to(victim)
    assert not saved.write(path, CostsState())
    assert victim.read_text() == "precious"


def test_what_was_given_up_took_at_least_so_long():
    """A late load raises what is predicted, and never lowers it."""
    costs = learned(LearnedCosts())
    before = costs.transfer(MIB, "disk")
    costs.not_transferred("disk", MIB, before / 2)
    assert costs.transfer(MIB, "disk") == before
    for _ in range(80):
        costs.not_transferred("disk", MIB, 100 * before)
    assert costs.transfer(MIB, "disk") > 10 * before
