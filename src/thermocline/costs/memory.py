"""What a model's geometry takes in bytes: of a token, of a sequence, of a rank; and what an accelerator has room for.

The formulas, with b bytes per element:

- full attention: layers * heads * (key + value) * b per token, on each rank max(1, heads / tp) of the heads
- latent attention: layers * (rank + rope) * b per token, whole on every rank
- a window or chunk: as full attention, for min(tokens, window) of them
- a state: layers * (state * 4 + convolution * 2) per sequence, however long

What an engine really gives away follows in `pages.py`: whole pages, of one size for all kinds of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.costs.geometry import Geometry
from thermocline.costs.pages import DTYPE_BYTES, KEPT, VLLM, Engine, Paging, layer_token_bytes, paging, pattern, stages
from thermocline.errors import ModelError, SettingsError

STATE_BYTES_EACH, CONV_BYTES_EACH = 4, 2
WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4.5}
"""Of a weight with its share of a scale: formats of 4 bits have one of 8 or 16 bits for every 16 or 32 weights."""

UTILISATION = 0.92
"""vLLM 0.32's `gpu_memory_utilization` (vllm/config/cache.py); it was 0.9 up to 0.19."""

OTHER_BYTES = 3_758_096_384
"""3.5 GiB for the context, graphs and what else nobody counts: the reserve of aiconfigurator 0.12's system files."""

COMMUNICATION_BYTES = {1: 0, 2: 358_612_992, 4: 411_041_792}
"""Of NCCL's buffers, from that many ranks on (the same files)."""

ACTIVATION_FIXED, ACTIVATION_SHARDED = 4, 6
"""Activations take 2 * tokens * hidden size * (4 + 6 / tp) bytes: aiconfigurator 0.12's rule for dense models, which
it calls in need of experiments. A seed, to be replaced by what an engine's log says."""

ASSUMED = {
    "utilisation": "vLLM 0.32's default gpu_memory_utilization",
    "activation_bytes": "2 * {tokens:,} tokens of a step * hidden size * (4 + 6 / tp), aiconfigurator 0.12's rule",
    "communication_bytes": "NCCL's buffers in aiconfigurator 0.12's system files",
    "other_bytes": "3.5 GiB, the reserve in aiconfigurator 0.12's system files",
}


def token_bytes(geometry: Geometry, kv_dtype: str = "") -> int:
    """Bytes that one more token takes when the sequence is longer than every window; not sharded.

    `kv_dtype` is one of `DTYPE_BYTES`, else a SettingsError; "" is the checkpoint's own.
    """
    return sum(
        each.layers * layer_token_bytes(each, kv_dtype or geometry.kv_dtype)
        for each in geometry.attention
        if each.window_tokens is None
    )


def sequence_bytes(geometry: Geometry, tokens: int, kv_dtype: str = "", *, tp: int = 1, pp: int = 1) -> int:
    """Bytes of one sequence of so many tokens, states included, on the fullest of `tp` times `pp` ranks.

    What it holds between two steps, not rounded to pages.
    """
    kv_dtype = kv_dtype or geometry.kv_dtype
    kept = {"f": 0, "w": 0, "s": state_bytes(geometry, tp)}
    for each in geometry.attention:
        count = tokens if each.window_tokens is None else min(tokens, each.window_tokens)
        kind = "f" if each.window_tokens is None else "w"
        kept[kind] += each.layers * layer_token_bytes(each, kv_dtype, tp) * count
    letters = pattern(geometry)
    layers = {kind: [each in like for each in letters] for kind, like in KEPT.items()}
    return max(
        sum(
            -(-size * sum(layers[kind][at] for at in stage) // max(1, sum(layers[kind]))) for kind, size in kept.items()
        )
        for stage in stages(geometry, pp)
    )


def state_bytes(geometry: Geometry, tp: int = 1) -> int:
    """Bytes of the constant states of one sequence, on each of `tp` ranks; 0 for a model without."""
    state = geometry.state
    if state is None:
        return 0
    return state.layers * -(-(state.state_elements * STATE_BYTES_EACH + state.conv_elements * CONV_BYTES_EACH) // tp)


def weights_bytes(geometry: Geometry, dtype: str = "") -> int:
    """Bytes of all weights: what the checkpoint's files say, else parameters times the width of `dtype`.

    With a `dtype` the files are not asked. Raises ModelError where neither bytes nor parameters are known.
    """
    if geometry.weights_bytes is not None and not dtype:
        return geometry.weights_bytes
    dtype = dtype or geometry.weights_dtype
    if dtype not in WEIGHT_BITS:
        raise SettingsError(f"{dtype} is no data type of weights known here", hint=f"one of {', '.join(WEIGHT_BITS)}")
    if geometry.parameters_total is None:
        raise ModelError(
            f"it is not known how many parameters {geometry.name} has",
            hint="give a folder with its safetensors files or their index, or the bytes of the weights",
        )
    return int(geometry.parameters_total * WEIGHT_BITS[dtype] / 8)


@dataclass(frozen=True, slots=True)
class Taken:
    """What of an accelerator is not for KV, beside the weights. None: a seed, which `Capacity.assumed` then names."""

    utilisation: float | None = None
    activation_bytes: int | None = None
    communication_bytes: int | None = None
    other_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Sessions:
    """How many sequences of one length fit at once. 0 where not even one does."""

    tokens: int
    admitted: float
    """As vLLM's log says it: blocks over those that a request may hold at worst, while its prompt is computed."""
    steady: int
    """Of sequences that are only held or decoded: windows hold a window's pages, and no prompt is in flight."""
    bytes_each: int
    """Of the pages that one of them holds then."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one accelerator of an instance has room for; each part in bytes, and the sum is `device * utilisation`."""

    device_bytes: int
    utilisation: float
    weights_bytes: int
    activation_bytes: int
    communication_bytes: int
    other_bytes: int
    kv_bytes: int
    """Left for KV on this rank; negative by what lacks where the model does not fit."""
    blocks: int
    paging: Paging
    assumed: tuple[str, ...] = ()
    """Which parts are seeds, and whose; the rest was given or follows from it."""

    @property
    def fits(self) -> bool:
        """Whether the weights and a block fit."""
        return self.blocks > 0

    def sessions(self, tokens: int) -> Sessions:
        """How many sequences of so many tokens fit."""
        worst, steady = self.paging.worst_pages(tokens), self.paging.steady_pages(tokens)
        return Sessions(tokens, self.blocks / worst, self.blocks // steady, steady * self.paging.block_bytes)

    def tokens(self, context_tokens: int) -> int:
        """The "KV cache size" of vLLM's log: its concurrency at this length times the length."""
        return int(self.sessions(context_tokens).admitted * context_tokens)


def capacity(
    geometry: Geometry,
    device_bytes: int,
    *,
    tp: int = 1,
    pp: int = 1,
    kv_dtype: str = "",
    weights: int | None = None,
    taken: Taken | None = None,
    engine: Engine = VLLM,
) -> Capacity:
    """What the fullest of `tp` times `pp` accelerators has room for, once all that is not KV is taken off.

    `device_bytes` as the device reports it ("80 GB" of an A100 are 80 GiB). `weights` are the bytes of the whole model,
    where they are not those of `weights_bytes`, which raises ModelError if it does not know them.
    """
    taken = taken or Taken()
    nccl = COMMUNICATION_BYTES[max(ranks for ranks in COMMUNICATION_BYTES if ranks <= tp)]
    seeds = Taken(UTILISATION, _activations(geometry, engine, tp), nccl, OTHER_BYTES)
    share, active, communication, other = (
        getattr(seeds if getattr(taken, name) is None else taken, name) for name in ASSUMED
    )
    own = -(-(weights_bytes(geometry) if weights is None else weights) // (tp * pp))
    left = int(device_bytes * share) - own - active - communication - other
    plan = paging(geometry, engine, kv_dtype, tp=tp, pp=pp)
    return Capacity(
        device_bytes=device_bytes,
        utilisation=share,
        weights_bytes=own,
        activation_bytes=active,
        communication_bytes=communication,
        other_bytes=other,
        kv_bytes=left,
        blocks=max(0, left // plan.block_bytes),
        paging=plan,
        assumed=tuple(
            why.format(tokens=engine.batched_tokens) for name, why in ASSUMED.items() if getattr(taken, name) is None
        ),
    )


def _activations(geometry: Geometry, engine: Engine, tp: int) -> int:
    width = 2 * engine.batched_tokens * geometry.hidden_size
    return width * (ACTIVATION_FIXED * tp + ACTIVATION_SHARDED) // tp


def token_formula(geometry: Geometry, kv_dtype: str) -> str:
    """Bytes per token with the numbers filled in; what does not grow with the sequence stands behind."""
    terms, fixed = [], []
    for each in geometry.attention:
        b = DTYPE_BYTES[kv_dtype]
        if each.latent_elements:
            inner = f"{each.latent_elements} x {b}" + (f" + {each.index_bytes}" if each.index_bytes else "")
            term = f"{each.layers} layers x ({inner}) B"
        elif each.head_dim_k == each.head_dim_v:
            term = f"2 x {each.layers} layers x {each.kv_heads} heads x {each.head_dim_k} x {b} B"
        else:
            term = f"{each.layers} layers x {each.kv_heads} heads x ({each.head_dim_k} + {each.head_dim_v}) x {b} B"
        if each.window_tokens is None:
            terms.append(term)
        else:
            fixed.append(f"{term} for the last {each.window_tokens:,} tokens")
    state = state_bytes(geometry)
    fixed += [f"{state:,} B of states per sequence"] if state else []
    total = f" = {token_bytes(geometry, kv_dtype):,} B per token"
    return (" + ".join(terms) or "nothing") + total + "".join(f"; and {each}" for each in fixed)
