"""A key does not go backwards: what a reader was given by another way is not followed by what others fetched before."""

from __future__ import annotations

import math

import pytest

from thermocline.clock import ManualClock
from thermocline.near.coherence import Fetch, View
from thermocline.near.options import Options


@pytest.fixture
def view():
    view = View(Options(prefixes=("k",)), ManualClock(0.0), lambda *_: None, decodes=False)
    view.lease.until = math.inf
    return view


def ended(steps, came):
    """The reply of steps that take one more."""
    with pytest.raises(StopIteration) as end:
        steps.send(came)
    return end.value.value


def fetching(view, key="k"):
    """A fetch of another thread, not answered yet."""
    steps = view.read(("GET", key), view.flights)
    assert isinstance(next(steps), Fetch)
    return steps


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (("GETRANGE", "k", 0, -1), b"new"),
        (("STRLEN", "k"), 3),
        (("LRANGE", "k", 0, 5), [b"new"]),
        (("EXISTS", "k", "k2"), 1),
        (("MGET", "k", "elsewhere"), [b"new", None]),
    ],
)
@pytest.mark.parametrize("lands", ["before", "after"])
def test_a_plain_reply_is_not_followed_by_an_older_one(view, command, reply, lands):
    """While the server answers a read that memory cannot, what others fetch meanwhile is not served after it."""
    slower = fetching(view)
    plain = view.read(command, view.flights)
    next(plain)
    if lands == "before":
        assert ended(slower, [-1, b"old"]) == b"old"
    assert ended(plain, reply) == reply
    if lands == "after":
        assert ended(slower, [-1, b"old"]) == b"old"
    assert ended(fetching(view), [-1, b"new"]) == b"new"


@pytest.mark.parametrize("many", [False, True])
def test_a_pipelines_reply_is_not_followed_by_an_older_one(view, many):
    """What a pipeline read is not followed by what GET or MGET, in any colour, fetched before it."""
    slower = view.read(("MGET", "k", "k2") if many else ("GET", "k"), {})
    assert isinstance(next(slower), Fetch)
    view.saw([("GET", "k")], [b"new"])
    old = [-1, -1, [b"old", b"2"]] if many else [-1, b"old"]
    ended(slower, old)
    assert ended(fetching(view), [-1, b"new"]) == b"new"


def test_a_command_without_a_key_goes_to_the_server(view):
    """A command that lacks its key is the server's to refuse."""
    steps = view.read(("GET",), view.flights)
    next(steps)
    assert ended(steps, "refused") == "refused"


@pytest.mark.parametrize(("first", "then"), [("k", b"k"), (b"k", "k")])
def test_a_key_as_text_and_as_bytes_is_one_key(view, first, then):
    """A key read as text is not followed by an older value read as bytes, nor the other way round."""
    assert ended(fetching(view, first), [-1, b"old"]) == b"old"
    assert ended(fetching(view, then), [-1, b"new"]) == b"new"
    assert ended(fetching(view, first), [-1, b"new"]) == b"new"
    assert ended(fetching(view, then), [-1, b"new"]) == b"new"
    with pytest.raises(StopIteration) as end:
        next(view.read(("GET", first), view.flights))
    assert end.value.value == b"new"
