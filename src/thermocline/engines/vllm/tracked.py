"""What the scheduler's half knows about one request of vLLM's, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thermocline.engines.vllm.prompts import Prompt
from thermocline.node.staging import Staging
from thermocline.store.plan import Plan
from thermocline.store.receipts import NOTHING, Loaded

SESSION_CHARACTERS_MAX = 256


@dataclass(frozen=True, slots=True)
class Hints:
    """What a request may say in `kv_transfer_params: {"thermocline": {...}}`. `session` comes back in its receipt."""

    load: bool = True
    save: bool = True
    session: str = ""


def read_hints(params: object) -> Hints | None:
    """The hints of a request, the usual ones where it has none; None where they are malformed."""
    given = params.get("thermocline") if isinstance(params, Mapping) else None
    if given is None:
        return Hints()
    if not isinstance(given, Mapping) or not given.keys() <= {"load", "save", "session"}:
        return None
    load, save, session = given.get("load", True), given.get("save", True), given.get("session", "")
    if not isinstance(load, bool) or not isinstance(save, bool):
        return None
    if not isinstance(session, str) or len(session) > SESSION_CHARACTERS_MAX:
        return None
    return Hints(load, save, session)


@dataclass(slots=True)
class Saving:
    """How far a request's chain was ordered to be saved.

    Blocks before `ordered` are saved, held already, or on their way. Workers know the first `told` keys. After so many
    `refusals` in a row nothing of this request is ordered any more.
    """

    ordered: int = 0
    told: int = 0
    refusals: int = 0


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, which `came` then. `may_load` and `may_save` only ever go from True to False.

    `first` is the plan that its receipt tells of, `staging` the question whose plan is loaded from, `asked` when it was
    put, until its answer was read. `local` counts the blocks that vLLM itself had when it last asked; `at_once` says if
    a load comes in the very step that computes on it, `is_first` if it comes before all computing. `under_way` is what
    a load brings if it goes well, of the blocks `wanted[group]`; `loaded` is what the first one brought.
    """

    request: Any
    prompt: Prompt
    hints: Hints
    came: float
    may_load: bool
    may_save: bool
    saving: Saving = field(default_factory=Saving)
    staging: Staging | None = None
    stagings: int = 0
    asked: float | None = None
    deadline: float = 0.0
    first: Plan | None = None
    local: int = 0
    at_once: bool = False
    is_first: bool = False
    loading: bool = False
    wanted: Sequence[Sequence[int]] = ()
    under_way: Loaded = NOTHING
    loaded: Loaded = NOTHING
    running: bool = False
    started: float | None = None
    prefill_seconds: float = 0.0

    @property
    def id(self) -> str:
        """VLLM's name for it."""
        name: str = self.request.request_id
        return name

    @property
    def loadable(self) -> int:
        """How many leading blocks may be loaded: at least one token is left to be computed."""
        tokens: int = self.request.num_tokens
        return (tokens - 1) // self.prompt.tokens_per_block
