"""Every error thermocline raises, in one tree.

    ThermoclineError            the root: `message` and a `hint` that says what to do next
    ├── SettingsError           a setting is missing, unknown, or out of range
    ├── LayoutError             bytes of this shape cannot be stored or loaded here
    ├── TierError               a tier cannot be opened or used
    │   ├── DiskInUseError      another process holds this disk path
    │   └── DiskFormatError     the path holds something else, or another format version
    ├── ModelError              a model cannot be served (unknown, unsupported cache, no weights)
    ├── RequestError            a request is malformed; carries the HTTP status and OpenAI's `param` and `code`
    ├── NodeError               a node cannot run here, or refuses us
    ├── NearError               the near cache cannot wait longer, or cannot be used so
    ├── TraceError              a request trace cannot be read
    ├── BenchError              a bench cannot run here
    ├── LaunchError             a process that a command starts does not come up, or does not stay up
    ├── UnreachableError        a server that a command asks does not answer
    └── CommandError            a command of the Redis protocol is refused; the message is the line of the reply

Expected outcomes of the cache itself (miss, late, corrupt, refused) are values, never exceptions.
"""

from __future__ import annotations


class ThermoclineError(Exception):
    """Root of the tree. `hint` is one sentence that names the next action."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SettingsError(ThermoclineError):
    """A setting is missing, unknown, of the wrong type, or out of range."""

    exit_code = 2


class LayoutError(ThermoclineError):
    """Bytes of this shape cannot be stored or loaded here."""


class TierError(ThermoclineError):
    """A tier cannot be opened or used."""


class DiskInUseError(TierError):
    """Another process holds this disk path."""


class DiskFormatError(TierError):
    """The path holds something else, or a format version this release does not know."""


class ModelError(ThermoclineError):
    """A model cannot be served."""


class RequestError(ThermoclineError):
    """A request is malformed. The API answers with `status` and an OpenAI error object."""

    def __init__(
        self, message: str, *, hint: str = "", status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.code = code


class NodeError(ThermoclineError):
    """A node cannot run here, or refuses this client."""


class NearError(ThermoclineError):
    """The near cache cannot wait longer for a value, or cannot be used in this way."""


class TraceError(ThermoclineError):
    """A request trace cannot be read, or is of no format we know."""

    exit_code = 2


class BenchError(ThermoclineError):
    """A bench cannot run here."""


class LaunchError(ThermoclineError):
    """A process that a command starts does not come up, or does not stay up."""


class UnreachableError(ThermoclineError):
    """A server that a command asks does not answer."""


class CommandError(ThermoclineError):
    """A command of the Redis protocol is refused. The message is the reply's line: its first word says which kind.

    Those that Redis gives are worded as there, since clients know them; ours have a hint, which is sent along.
    """
