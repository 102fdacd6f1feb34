"""The bounds of the door, beside those of any HTTP server in `wire.http.Limits`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """What one request may take, and all of them together."""

    requests_max: int = 1024
    """In flight; more are refused with status 429."""
    held_bytes_max: int = 512 << 20
    """Of request bodies, of all connections together."""
    choose_seconds: float = 1.0
    """For a decision that is made aside; one that is later than this goes to the least busy instance."""
    connect_seconds: float = 2.0
    first_byte_seconds: float = 300.0
    """Per try, until the first byte of the answer's body."""
    gap_seconds: float = 120.0
    """Between two pieces of an answer."""
    total_seconds: float = 3600.0
    """For a request with all its tries."""
    tries_max: int = 3
    retry_share: float = 0.1
    """Of requests that may be tried again, in the long run."""
    retry_burst: float = 100.0
    """Retries that may come at once, as when an instance dies with all that it was doing."""
    retry_after_seconds: int = 1
    link_idle_seconds: float = 4.0
    """How long a connection to an instance is kept unused: uvicorn, and so vLLM, closes its end after 5 seconds."""
    links_idle_max: int = 256
    response_head_bytes_max: int = 64 << 10
    health_seconds: float = 2.0
    """Between two questions for an instance's health, and how long an answer may take."""
    unhealthy_after: int = 2
    """So many failed questions in a row set an instance aside; one that succeeds brings it back."""
    slow_start_seconds: float = 5.0
    """Over so long an instance that came, or came back, takes up its share."""
    decisions_kept: int = 4096
