"""What vLLM gives away: pages of one size for all kinds of layers, and how many a request may hold at worst.

The rules are those of vLLM 0.32, and `tests/vllm/test_geometry.py` holds them to its own allocation, without an error:

- layers of one kind are one group, and a block is one page of each of its layers (kv_cache_utils.py);
- several kinds are split into groups of as many layers as the rarest kind has, each with its own table of blocks of one
  common pool; a kind with smaller pages gets longer blocks, or its pages are padded;
- beside recurrent states the block grows until a page is as large as a state, and states are padded to a page
  (platforms/interface.py); with prefix caching a sequence holds several states of each layer (MambaSpec);
- a request is admitted as if its windows held `window - 1` tokens and all that may be in flight, and a block more
  (SlidingWindowSpec), and its chunks a whole chunk and all that may be in flight (ChunkedLocalAttentionSpec).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from thermocline.costs.architectures import ARCHITECTURES, Architecture
from thermocline.costs.geometry import Attention, Geometry
from thermocline.errors import SettingsError

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of an element of K and V. Formats with scales beside them are a little larger."""

STATE_FP32 = {"nemotron_h", "kimi_linear", "kimi_k3"}
"""Models whose states vLLM keeps in fp32 unless told otherwise; those of others have the model's own type."""

MIXED_RATIO = 1.5
"""Below this ratio of the commonest to the rarest kind, groups have as many layers as the commonest."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine divides its memory. The defaults are vLLM 0.32's on a GPU of 70 GiB or more, answering HTTP."""

    block_tokens: int = 16
    latent_block_tokens: int = 64
    """Of latent attention; FlashMLA's and FlashInfer's, where the CPU has 16."""
    align_tokens: int = 16
    """Blocks that grow to hold a state stay multiples of this and of the block."""
    batched_tokens: int = 8192
    """`max_num_batched_tokens`: see `vllm_on` for those of other GPUs."""
    batches_in_flight: int = 2
    """Two with asynchronous scheduling, and no fewer than stages; each holds `batched_tokens` that are not settled."""
    prefix_caching: bool = True
    """With it a sequence holds a second state of each recurrent layer, and one of Mamba 2 a third, as a checkpoint.
    A model without attention has none."""
    state_dtype: str = ""
    """Of recurrent states, whatever the model says. A CPU with AVX512-BF16 keeps them in float32 (platforms/cpu.py)."""
    windows_freed: bool = True
    """What lies before a window or chunk. Not with a connector that cannot do without it, or where it is turned off."""


VLLM = Engine()
SMALL_BELOW_BYTES, LARGE_FROM_BYTES = 70 << 30, 160 << 30

VLLM_CPU = Engine(128, 16, 32, batched_tokens=2048, batches_in_flight=1, state_dtype="float32")
"""One without AMX: with it, latent attention has blocks of 128 as well."""


def vllm_on(memory_bytes: int, name: str) -> Engine:
    """What vLLM 0.32 does on a GPU, answering HTTP: small steps on small ones and the A100, large on the largest.

    The rule is that of its `EngineArgs.get_batch_defaults` (vllm/engine/arg_utils.py).
    """
    small = memory_bytes < SMALL_BELOW_BYTES or "a100" in name.lower()
    return replace(VLLM, batched_tokens=16_384 if memory_bytes >= LARGE_FROM_BYTES else 2048 if small else 8192)


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a table of blocks."""

    kind: str
    """As in `Geometry.pattern`: f, w or s."""
    layers: tuple[int, ...]
    block_tokens: int
    page_bytes: int
    window_tokens: int = 0
    chunked: bool = False
    states: int = 0
    """That a sequence holds, one page each."""


@dataclass(frozen=True, slots=True)
class Paging:
    """All groups, and what a block of the common pool takes on the fullest rank."""

    engine: Engine
    groups: tuple[Group, ...]
    block_bytes: int
    in_flight_tokens: int

    @property
    def block_tokens(self) -> int:
        """Of layers that keep everything; of any, where there are none."""
        return next((each.block_tokens for each in self.groups if each.kind == "f"), self.groups[0].block_tokens)

    def worst_pages(self, tokens: int) -> int:
        """Blocks that a request of at most so many tokens is admitted for, over all groups."""
        return self._pages(tokens, self.in_flight_tokens)

    def steady_pages(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds between two steps, over all groups."""
        return self._pages(tokens, 0)

    def _pages(self, tokens: int, flying: int) -> int:
        total = 0
        for each in self.groups:
            whole = _up(tokens, each.block_tokens)
            if each.kind == "s":
                total += each.states
            elif each.kind == "f":
                total += whole
            elif each.chunked:
                total += _up(min(each.window_tokens + flying, tokens), each.block_tokens)
            else:
                held = _up(min(each.window_tokens - 1 + flying, tokens), each.block_tokens) + 1
                total += held if flying else min(whole, held)
        return total


def layer_token_bytes(attention: Attention, kv_dtype: str, tp: int = 1) -> int:
    """Bytes of one token in one layer, on one of `tp` ranks. Raises SettingsError for an unknown data type.

    Heads are split over the ranks, and repeated where there are fewer heads than ranks; a latent vector is whole on
    every rank.
    """
    if kv_dtype not in DTYPE_BYTES:
        raise SettingsError(
            f"{kv_dtype} is no data type of a KV cache that is known here", hint=f"one of {', '.join(DTYPE_BYTES)}"
        )
    if attention.latent_elements:
        return attention.latent_elements * DTYPE_BYTES[kv_dtype] + attention.index_bytes
    heads = max(1, _up(attention.kv_heads, tp))
    return heads * (attention.head_dim_k + attention.head_dim_v) * DTYPE_BYTES[kv_dtype] + attention.index_bytes


def stages(geometry: Geometry, pp: int) -> list[range]:
    """The layers of each pipeline stage: those that are left over go to the stages before the last, from behind.

    As `get_pp_indices` of vLLM 0.32 (distributed/utils.py) deals them out. Raises SettingsError where a stage would be
    empty.
    """
    if not 1 <= pp <= geometry.layers:
        raise SettingsError(f"{geometry.layers} layers cannot be in {pp} stages", hint="choose fewer stages")
    each, left = divmod(geometry.layers, pp)
    counts = [each + (pp - 1 - left <= at < pp - 1) for at in range(pp)]
    starts = [sum(counts[:at]) for at in range(pp + 1)]
    return [range(starts[at], starts[at + 1]) for at in range(pp)]


def pattern(geometry: Geometry) -> str:
    """What each layer keeps. Where only counts are known, the kinds are spread evenly: right but for their order."""
    if geometry.pattern:
        return geometry.pattern
    kinds = [("f" if each.window_tokens is None else "w", each.layers) for each in geometry.attention]
    kinds += [("s", geometry.state.layers)] if geometry.state else []
    spread = sorted(((at + 0.5) / count, kind) for kind, count in kinds for at in range(count))
    return "".join(kind for _, kind in spread).ljust(geometry.layers, "-")


def paging(geometry: Geometry, engine: Engine = VLLM, kv_dtype: str = "", *, tp: int = 1, pp: int = 1) -> Paging:
    """How the engine divides the KV memory of one of `tp` times `pp` ranks.

    Raises SettingsError for a data type or a number of stages that cannot be.
    """
    kv_dtype = kv_dtype or geometry.kv_dtype
    kinds = _equal(list(_kinds(geometry, engine, kv_dtype, tp)))
    counts = [len(each.layers) for each in kinds]
    size = max(counts) if max(counts) < MIXED_RATIO * min(counts) else min(counts)
    groups = []
    for kind in kinds:
        number = _up(len(kind.layers), size)
        groups += [replace(kind, layers=kind.layers[at::number]) for at in range(number)]
    dealt = stages(geometry, pp)
    fullest = max(sum(at in stage for at in each.layers) * each.page_bytes for each in groups for stage in dealt)
    return Paging(engine, tuple(groups), fullest, engine.batched_tokens * max(pp, engine.batches_in_flight))


def _kinds(geometry: Geometry, engine: Engine, kv_dtype: str, tp: int) -> Iterator[Group]:
    """One group for each kind of layers, each with pages of its own size."""
    letters = pattern(geometry)
    latent = any(each.latent_elements for each in geometry.attention)
    block = engine.latent_block_tokens if latent else engine.block_tokens
    state = _state_page(geometry, engine, kv_dtype, tp)
    token: dict[str, int] = {}
    for kind in "fw":
        like = [each for each in geometry.attention if (each.window_tokens is not None) == (kind == "w")]
        total = sum(each.layers * layer_token_bytes(each, kv_dtype, tp) for each in like)
        token |= {kind: _up(total, sum(each.layers for each in like))} if like else {}
    if state and token:
        step = max(engine.align_tokens, block, 128 if latent else 0)
        block = step * _up(state, step * next(iter(token.values())))
    at = {kind: tuple(i for i, each in enumerate(letters) if each in kept) for kind, kept in KEPT.items()}
    if not engine.windows_freed and len(token) > 1:
        both = sum(len(at[kind]) * each for kind, each in token.items())
        yield Group("f", at["f"] + at["w"], block, _up(block * both, len(at["f"] + at["w"])))
    else:
        for kind, each in token.items():
            window = next((a for a in geometry.attention if a.window_tokens is not None and kind == "w"), None)
            limits = (window.window_tokens or 0, window.chunked) if window else (0, False)
            yield Group(kind, at[kind], block, block * each, *limits)
    if state:
        mamba2 = ARCHITECTURES.get(geometry.model_type, NO_STATE).state == "mamba2"
        reused = engine.prefix_caching and bool(token)
        yield Group("s", at["s"], block, state, states=1 + (1 + mamba2) * reused)


NO_STATE = Architecture()
KEPT = {"f": "fb", "w": "w", "s": "sb"}


def _state_page(geometry: Geometry, engine: Engine, kv_dtype: str, tp: int) -> int:
    """Bytes of one layer's state on a rank. Both parts have the model's type unless somebody asks for fp32."""
    if geometry.state is None:
        return 0
    own = 4 if kv_dtype == "fp32" else 2
    asked = engine.state_dtype or geometry.state.dtype or ("float32" if geometry.model_type in STATE_FP32 else "")
    each = {"float32": 4, "bfloat16": 2, "float16": 2}.get(asked, own)
    return _up(geometry.state.state_elements, tp) * each + _up(geometry.state.conv_elements, tp) * own


def _equal(kinds: list[Group]) -> list[Group]:
    """The same with pages of one size: longer blocks where they divide the largest page, else padded pages."""
    largest = max((each.page_bytes for each in kinds), default=0)
    if len(kinds) == 1:
        return kinds
    longer = []
    for each in kinds:
        ratio = 1 if each.kind == "s" or largest % each.page_bytes else largest // each.page_bytes
        longer.append(replace(each, block_tokens=each.block_tokens * ratio, page_bytes=largest))
    return longer


def _up(count: int, size: int) -> int:
    return -(-count // size)
