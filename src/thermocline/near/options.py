"""How a client keeps values: one frozen value, the same for both colours."""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Under:
    """How the keys under one prefix are kept otherwise. Raises SettingsError for what cannot be.

    For `grace_seconds` after a value has changed on the server, or has ended, it is still returned, while one fetch in
    the background replaces it: nobody waits, and what is served is at most `stale_seconds_max + grace_seconds` old.
    Own writes are seen at once all the same. `early` (1.0 is the paper's) has a value replaced in the background before
    `max_age_seconds` are over, the sooner the longer its fetch took: XFetch (Vattani, Chierichetti, Lowenstein, VLDB
    2015), drawn once per value and process, so that a hit draws nothing. `negative_seconds`: as in Options.
    """

    prefix: str
    grace_seconds: float = 0.0
    early: float = 0.0
    negative_seconds: float | None = None

    def __post_init__(self) -> None:
        least = min(self.grace_seconds, self.early, 0.0 if self.negative_seconds is None else self.negative_seconds)
        if least < 0 or self.negative_seconds == 0:
            raise SettingsError(
                f"under {self.prefix!r}: less than nothing", hint="give seconds and early of 0 or above"
            )


PLAIN_UNDER = Under(prefix="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a client keeps values. Raises SettingsError for what cannot be.

    `stale_seconds_max`: nothing older than that is served, even where the link to the server dies silently.
    `mode`: "bcast" has the server announce every change under `prefixes` (all keys where there are none);
    "default" only changes of keys that were read, for large key spaces of which this process reads few.
    With `prefixes` only keys that begin with one of them are kept. `max_age_seconds` and `negative_seconds` (for keys
    that do not exist) bound every entry once more. `wait_seconds`: how long readers of a cold key wait for the first.
    `under`: prefixes whose keys are kept otherwise; of those that fit, the longest counts. `profile`: a file that each
    lookup is noted in, with its key (profile.py), which makes each some 30 us slower.
    """

    bytes_max: int = 64 << 20
    prefixes: tuple[str, ...] = ()
    mode: str = "bcast"
    stale_seconds_max: float = 1.0
    max_age_seconds: float = 300.0
    negative_seconds: float = 10.0
    wait_seconds: float = 5.0
    policy: str = "adaptive"
    under: tuple[Under, ...] = ()
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in {"bcast", "default"}:
            raise SettingsError(f"no tracking mode {self.mode!r}", hint='the mode is "bcast" or "default"')
        if any(a != b and a.startswith(b) for a in self.prefixes for b in self.prefixes):
            raise SettingsError("prefixes overlap", hint='give prefixes such as ("session:", "flag:")')
        if min(self.stale_seconds_max, self.max_age_seconds, self.negative_seconds, self.wait_seconds) <= 0:
            raise SettingsError("an age or a wait is not above 0 seconds", hint="give seconds above 0")
