"""Any bytes on either side, without sockets: thousands of cases in a second."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.glue import CLIENT_SEEDS, LINK_SEEDS, feed_client, feed_link

SIDES = {"client": (feed_client, CLIENT_SEEDS), "instance": (feed_link, LINK_SEEDS)}


@pytest.mark.parametrize(("feed", "seeds"), SIDES.values(), ids=SIDES)
def test_seeds(feed, seeds):
    """What is right is read right, wherever it is cut."""
    for seed in seeds:
        for cut in range(len(seed) + 1):
            feed(seed, cut)
            feed(seed[:cut])


@pytest.mark.parametrize(("feed", "seeds"), SIDES.values(), ids=SIDES)
@settings(max_examples=300)
@given(data=st.data())
def test_any_bytes(feed, seeds, data):
    """Any bytes, and what is almost right, are refused or read, and never more than that."""
    whole = bytearray(data.draw(st.sampled_from(seeds)) + data.draw(st.sampled_from([b"", *seeds])))
    chance = data.draw(st.randoms(use_true_random=False))
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(whole))
        whole[at : at + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
    feed(bytes(whole), data.draw(st.integers(0, len(whole))))
    feed(data.draw(st.binary(max_size=200)))
