"""Which rule should rule: the fixed ones run beside the cache on a sample of its keys, and the best one is in charge.

No rule is best everywhere: sessions want recency, shared prefixes and embeddings frequency. The sample is chosen by
hash and kept small by halving its share as the cache grows (SHARDS: Waldspurger et al., FAST 2015); a shadow's bound
shrinks with it, and what happens in it is what would happen in a cache under that rule. Readers do nothing for this:
the marks they leave in sampled entries are told to the shadows later, in order of their last touch.
"""

from __future__ import annotations

from collections.abc import Hashable

from thermocline.near.eviction import FIXED, Marks, Rule, Sketch, WTinyLfu, mix

SAMPLED_MAX = 1024
"""Sampled entries; four shadows of so many marks take about a megabyte."""
JUDGED_EVERY = 256
"""Sampled uses."""
KEPT = 0.9
"""Of the scores, at each judgement: about 2,500 uses are remembered."""
MARGIN = 0.01
"""Of the uses remembered: so much better must another rule be."""
MOVED = 8
"""Entries that go from the old rule to the new one for each that the old one evicts: nobody waits for the rest."""


class Mark:
    """What a shadow holds of a key."""

    __slots__ = ("hits", "order", "seen", "told", "touched", "weight_bytes")

    def __init__(self, weight_bytes: int, touched: float, hits: int) -> None:
        self.weight_bytes = weight_bytes
        self.touched = touched
        self.hits = hits
        self.seen = self.order = self.told = 0


class Shadow:
    """What one rule would hold and hit within a bound of its own."""

    def __init__(self, policy: str, bytes_max: int) -> None:
        self.score = 0.0
        self._policy = policy
        self._bytes_max = bytes_max
        self._begin()

    def _begin(self, old: Rule | None = None) -> None:
        self._rule: Rule = FIXED[self._policy](self._bytes_max)
        if isinstance(self._rule, WTinyLfu) and isinstance(old, WTinyLfu):
            self._rule.sketch = old.sketch
        self._held: dict[int, Marks] = {}
        self._nbytes = 0

    def use(self, key: int, weight_bytes: int, touched: float, times: int) -> None:
        """The key was used so many times, last at `touched`; a key that is not held comes in with the first."""
        mark = self._held.get(key)
        if mark is not None:
            mark.hits += times
            mark.touched = touched
            self.score += times
        elif weight_bytes <= self._bytes_max:
            while self._nbytes + weight_bytes > self._bytes_max:
                old, old_mark = self._rule.evict()
                del self._held[mix_of(old)]
                self._nbytes -= old_mark.weight_bytes
            self._hold(key, Mark(weight_bytes, touched, 0))
            self._held[key].hits = times - 1
            self.score += times - 1

    def remove(self, key: int) -> None:
        """The key is gone from everywhere."""
        mark = self._held.pop(key, None)
        if mark is not None:
            self._nbytes -= mark.weight_bytes
            self._rule.remove(key)

    def halve(self, mask: int) -> None:
        """Half the bound, and of the keys those that `mask` still samples."""
        kept = sorted(self._held.items(), key=lambda held: held[1].touched)
        self._bytes_max //= 2
        self._begin(self._rule)
        for key, mark in kept:
            if not key & mask and self._nbytes + mark.weight_bytes <= self._bytes_max:
                self._hold(key, mark)

    def _hold(self, key: int, mark: Marks) -> None:
        self._held[key] = mark
        self._nbytes += mark.weight_bytes
        self._rule.add(key, mark)


def mix_of(key: Hashable) -> int:
    """A shadow's keys are the mixed hashes themselves."""
    assert isinstance(key, int)
    return key


class Adaptive:
    """The rule that does best on the sample, in charge of all. A Rule itself."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._shadows = {policy: Shadow(policy, bytes_max) for policy in FIXED}
        self.policy = "s3-fifo"
        self._rule: Rule = FIXED[self.policy](bytes_max)
        self._old: Rule | None = None
        self._sketch = Sketch()  # counts under every rule, so that W-TinyLFU does not begin with nothing
        self._mask = 0
        self._sampled: dict[Hashable, Marks] = {}
        self._untold = 0
        self._unjudged = 0
        self._uses = 0.0

    def __len__(self) -> int:
        return len(self._rule) + (0 if self._old is None else len(self._old))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rule or (self._old is not None and key in self._old)

    def add(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        if not isinstance(self._rule, WTinyLfu):
            self._sketch.count(key, 1, len(self))
        self._rule.add(key, entry)
        if not mix(key) & self._mask:
            self._sample(key, entry)

    def replace(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        self._holding(key).replace(key, entry)
        if key in self._sampled:
            self._sample(key, entry)

    def remove(self, key: Hashable) -> None:
        """See Rule."""
        self._holding(key).remove(key)
        if self._sampled.pop(key, None) is not None:
            for shadow in self._shadows.values():
                shadow.remove(mix(key))

    def evict(self) -> tuple[Hashable, Marks]:
        """See Rule."""
        if self._old is None:
            key, entry = self._rule.evict()
        else:
            key, entry = self._old.evict()
            for _ in range(min(MOVED, len(self._old))):
                self._rule.add(*self._old.evict())
            if not self._old:
                self._old = None
        if entry.hits and not isinstance(self._rule, WTinyLfu):
            self._sketch.count(key, entry.hits, len(self))
        if self._sampled.pop(key, None) is not None:
            self._tell(key, entry)
        return key, entry

    def _holding(self, key: Hashable) -> Rule:
        return self._rule if self._old is None or key in self._rule else self._old

    # -- the sample ----------------------------------------------------------------------------------------------------

    def _sample(self, key: Hashable, entry: Marks) -> None:
        """A sampled key comes in, or is written again. Now and then, all marks left since are told first."""
        self._untold += 1
        if self._untold * 8 > len(self._sampled):
            self._untold = 0
            marked = [(held.touched, old) for old, held in self._sampled.items() if held.hits > held.told]
            for _, old in sorted(marked, key=lambda pair: pair[0]):
                self._tell(old, self._sampled[old])
        entry.told = entry.hits
        self._sampled[key] = entry
        self._use(mix(key), entry, 1)
        if len(self._sampled) > SAMPLED_MAX:
            self._halve()
        if self._unjudged >= JUDGED_EVERY:
            self._judge()

    def _tell(self, key: Hashable, entry: Marks) -> None:
        times = entry.hits - entry.told
        entry.told = entry.hits
        if times > 0:
            self._use(mix(key), entry, times)

    def _use(self, key: int, entry: Marks, times: int) -> None:
        self._unjudged += times
        for shadow in self._shadows.values():
            shadow.use(key, entry.weight_bytes, entry.touched, times)

    def _halve(self) -> None:
        self._mask = 2 * self._mask + 1
        self._sampled = {key: entry for key, entry in self._sampled.items() if not mix(key) & self._mask}
        for shadow in self._shadows.values():
            shadow.halve(self._mask)

    def _judge(self) -> None:
        self._uses = KEPT * (self._uses + self._unjudged)
        self._unjudged = 0
        best = max(self._shadows, key=lambda policy: self._shadows[policy].score)
        lead = self._shadows[best].score - self._shadows[self.policy].score
        if lead * KEPT > MARGIN * self._uses and self._old is None:
            self.policy = best
            self._old, self._rule = self._rule, FIXED[best](self._bytes_max)
            if isinstance(self._rule, WTinyLfu):
                self._rule.sketch = self._sketch
        for shadow in self._shadows.values():
            shadow.score *= KEPT
