"""One rank's worker against a real node, told by hand what a scheduler would say."""

from __future__ import annotations

from tests.engines_vllm.mini import Rank, content
from tests.node.making import until
from tests.store.making import chain
from thermocline.engines.vllm.orders import LoadOrder, Orders, SaveOrder


def _step(worker, orders):
    """What vLLM calls in a step; the pages that it is told are bad."""
    worker.begin(orders)
    worker.start_loads(orders)
    bad = worker.take_bad_pages()
    worker.save(orders)
    return bad


def _saved(worker):
    """How many blocks of its one save order were kept."""
    reports = []
    until(lambda: reports.append(worker.report()) or (reports[-1] and reports[-1].saved), "the save to end")
    return reports[-1].saved[0].good


def test_nothing_of_a_spoilt_step_is_saved(clients):
    """A load at the beginning of a step fails: no request of that step is saved, and the next step is as always.

    Another request may have found the bad pages in vLLM's own cache.
    """
    rank = Rank(clients[1], 0, 1, 1)
    worker, layout, keys = rank.worker, rank.pages[0].layout, chain("spoilt", 3)
    for page, key in enumerate(keys):
        rank.write(0, page, content(layout, key))
    order = SaveOrder(1, "other", 0, b"".join(keys), 0, ((0, 1, 2),))
    lost = LoadOrder("loads", (), ((7, 8),), at_once=True)
    assert _step(worker, Orders(loads=(lost,), saves=(order,))) == {7, 8}
    assert _saved(worker) == 0
    assert clients[0].match([layout], keys, prompt_tokens=48).blocks == 0
    again = SaveOrder(2, "other", 3, b"", 0, ((0, 1, 2),))
    assert _step(worker, Orders(saves=(again,))) == set()
    assert _saved(worker) == 3
    worker.close()
