"""Reading metrics and events: bounded, never in the way, and exact about what was read."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lens.recordings import FOLDER
from thermocline.clock import ManualClock
from thermocline.errors import UnreachableError
from thermocline.lens import observe
from thermocline.lens.observe import Ear, Kind, Source, Watched, parse, watch
from thermocline.metrics import Metrics
from thermocline.wire.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, write_batch


@given(st.binary(max_size=2000) | st.text(max_size=2000))
def test_any_bytes_are_read(data):
    """Whatever a server sends as its metrics is read without an error, within the bounds."""
    found = parse(data)
    assert sum(map(len, found.series.values())) <= observe.SAMPLES_MAX


NAMES = st.sampled_from(["thermocline_a_total", "vllm:b", "other_c"])
VALUES = st.floats(0, 1e30)
LABEL_VALUES = st.text(st.characters(exclude_characters='"\\\n', exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(NAMES, LABEL_VALUES, VALUES), max_size=30))
def test_series_are_added_up(rows):
    """Of our own and of vLLM's names every sample is kept with its label; others are passed over."""
    text = "".join(f'{name}{{tier="{tier}"}} {value!r}\n' for name, tier, value in rows)
    found = parse(text)
    assert found.skipped == 0
    for name, kept in (("thermocline_a_total", "a_total"), ("vllm:b", "vllm:b")):
        values = [(tier, value) for has, tier, value in rows if has == name]
        assert [(dict(labels)["tier"], value) for labels, value in found.series.get(kept, ())] == values
    assert "other_c" not in found.series


def test_what_our_own_metrics_write_is_read():
    """The text of a Metrics object reads back, histograms too."""
    metrics = Metrics()
    metrics.count("load_blocks_total", 3, (("tier", "disk"), ("outcome", "hit")))
    metrics.gauge("breaker_open", 1.0, (("tier", "disk"),))
    metrics.observe("answer_seconds", 0.2)
    found = parse(metrics.text(), 5.0)
    assert found.value("load_blocks_total", tier="disk") == 3
    assert found.value("load_blocks_total", tier="memory") is None
    assert found.by("breaker_open", "tier") == {"disk": 1.0}
    assert found.value("answer_seconds_count") == 1
    assert found.at_seconds == 5.0


@pytest.mark.parametrize("page", ["", "<html>", "up 1\n"])
def test_a_page_without_metrics(page):
    """A server whose page has no metric that we know is as one that does not answer, and never called healthy."""
    source = Source(Kind.SERVER, "http://a", lambda: page, None)
    watched = watch([source], 0.0, ManualClock(0.0))
    assert watched[0].scrapes == ()
    with pytest.raises(UnreachableError, match="no metrics of vLLM"):
        observe.answered(watched)


def test_broken_lines_are_counted():
    """Lines that are no samples, numbers that are none, and lines of any length are skipped and counted."""
    lines = [
        "vllm:a 1",
        "vllm:a",
        "vllm:a x",
        "vllm:a nan",
        "vllm:a +Inf",
        "vllm:a 1e300",
        "vllm:" + "a" * (1 << 20) + " 1",
    ]
    found = parse("\n".join(lines))
    assert (found.value("vllm:a"), found.skipped) == (1.0, 6)


def test_counters_are_differences():
    """Counters count what happened while one looked; all of it where nothing did; anew where they went back."""

    def at(*values: float) -> Watched:
        scrapes = tuple(
            parse(f"thermocline_matches_total {each}\nthermocline_leases_expired_total {each}") for each in values
        )
        return Watched(kind=Kind.NODE, name="node", scrapes=scrapes)

    assert at(10, 12).counted("leases_expired_total") == 2
    assert at(10, 10).counted("leases_expired_total") == 10
    assert at(10, 4).counted("leases_expired_total") == 4
    assert at().counted("leases_expired_total") == 0


def test_looking_takes_its_time_and_no_answer_is_told():
    """All sources are looked at several times within the time; one that never answers is there, and says why not."""
    clock, asked = ManualClock(100.0), []

    def answers() -> str:
        asked.append(clock.now())
        return f"thermocline_matches_total {len(asked)}"

    def does_not() -> str:
        raise UnreachableError("nobody is there", hint="")

    sources = [Source(Kind.NODE, "a", answers), Source(Kind.SERVER, "b", does_not)]
    found, silent = watch(sources, 8.0, clock)
    assert (len(asked), asked[0], asked[-1]) == (observe.LOOKS + 1, 100.0, 108.0)
    assert found.counted("matches_total") == observe.LOOKS
    assert found.seconds == 8.0
    assert silent.scrapes == ()
    assert silent.untold == (("metrics", "nobody is there"),)


def _stored(*hashes: int, parent: int | None = None, salt: str = "") -> BlockStored:
    extras = ((salt,), *(None for _ in hashes[1:])) if salt else None
    return BlockStored(hashes, parent, array("I"), 16, extra_keys=extras)


def _heard(*batches: tuple[str, int, tuple]) -> dict[str, observe.Heard]:
    ear = Ear(ManualClock(0.0))
    for name, sequence, events in batches:
        ear.hear(f"kv@{name}@m", sequence, write_batch(Batch(50.0, events)), 51.0)
    return {each.name: each for each in ear.heard()}


def test_events_are_added_up_by_sender():
    """What is stored again after it left, or held by another, is told from what is new; holes in the numbers count."""
    found = _heard(
        ("a", 0, (_stored(1, 2), _stored(3, parent=2))),
        ("a", 1, (BlockRemoved((2, 3, 9)),)),
        ("a", 4, (_stored(2, parent=1),)),
        ("b", 0, (_stored(1, 5),)),
    )
    assert found["a"] == observe.Heard("a", 3, 4, 2, 1, 0, 1, 0, 2, 0, 1.0)
    assert found["b"] == observe.Heard("b", 1, 2, 0, 0, 1, 1, 0, 0, 0, 1.0)


def test_a_cache_that_is_cleared_did_not_evict():
    """What is stored again after all was cleared was not dropped for room."""
    found = _heard(("a", 0, (_stored(1, 2),)), ("a", 1, (AllBlocksCleared(),)), ("a", 2, (_stored(1, 2),)))
    assert (found["a"].stored, found["a"].again) == (4, 0)


def test_salts_are_counted_where_they_are_single():
    """Texts with a salt that no other text has are counted; tenants' salts, which come again, are not."""
    own = tuple(("a", at, (_stored(at, salt=f"request {at}"),)) for at in range(5))
    shared = tuple(("b", at, (_stored(100 + at, salt="tenant"),)) for at in range(5))
    found = _heard(*own, *shared)
    assert (found["a"].salted, found["a"].texts) == (5, 5)
    assert (found["b"].salted, found["b"].texts) == (0, 5)


@given(st.binary(max_size=300))
def test_any_bytes_are_heard(payload):
    """Whatever comes as a batch of events is counted, and raises nothing."""
    ear = Ear(ManualClock(0.0))
    ear.hear("kv@a@m", 0, payload, 0.0)
    (heard,) = ear.heard()
    assert heard.batches + heard.unreadable >= 1


@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_recordings_are_read_whole(folder):
    """Every line that was recorded of a real vLLM is a sample that is read."""
    for path in folder.glob("*.txt"):
        found = parse(path.read_bytes())
        assert found.skipped == 0
        assert found.value("vllm:cache_config_info") == 1.0
