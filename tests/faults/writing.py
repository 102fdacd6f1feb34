"""A process that saves and removes until it is killed, and says what is durable and what it is about to remove.

Lines on stdout: `durable SEED COUNT` once the chain's blocks are, `gone SEED COUNT` before it removes them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tests.conformance.samples import blocks_of, chain, layout_of
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Outcome

LENGTH = 10_000
LAYOUT = layout_of("a", LENGTH)
CAPACITY = 8 << 20
HELD_MAX = 40


def main(path, first):
    """Save chains, a few in flight at a time; remove the oldest so that room and log turn over."""
    tier = DiskTier(Path(path), CAPACITY, queue_bytes_max=1 << 20)
    tier.found()
    rng = random.Random(first)  # noqa: S311  # which chain next
    flying, held = [], []
    for seed in range(first, first + 100_000):
        count = rng.randint(1, 6)
        keys = chain(seed, count)
        flying.append((seed, count, tier.save(LAYOUT, keys, blocks_of(LAYOUT, keys, LENGTH))))
        if len(flying) < rng.randint(1, 4):
            continue
        for number, length, job in flying:
            job.wait()
            if set(job.outcomes) == {Outcome.HIT}:
                sys.stdout.write(f"durable {number} {length}\n")
                held.append((number, length))
            else:  # some are in, some are not: nothing is promised, and nothing kept
                tier.remove(LAYOUT, chain(number, length))
        flying.clear()
        sys.stdout.flush()
        while len(held) > HELD_MAX:
            number, length = held.pop(rng.randrange(len(held)))
            sys.stdout.write(f"gone {number} {length}\n")
            sys.stdout.flush()
            tier.remove(LAYOUT, chain(number, length))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
