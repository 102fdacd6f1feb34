"""What a model keeps of a sequence: its geometry, as values, and how it is read off a `config.json`.

    geometry_of(config, name) -> Geometry     layers, heads, windows, states; an unknown architecture is refused by name

Bytes follow from it in `memory.py`; names and files are looked up in `models.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Any

from thermocline.costs.architectures import ARCHITECTURES, INNER, LAYER_WORDS, PATTERN_WORDS, Architecture
from thermocline.errors import ModelError

NESTED = ("text_config", "llm_config", "language_config")
"""Where models of several inputs keep the configuration of their decoder."""

ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_attention_groups",),
    "hidden_size": ("n_embd", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "head_dim": ("attention_head_dim",),
    "dtype": ("torch_dtype",),
}
KV_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
INDEX_SCALE_ELEMENTS, SCALE_BYTES = 128, 4
"""The keys of a sparse indexer are one byte an element, with an fp32 scale for every 128 (DeepSeek-V3.2)."""

LAYERS_MAX, SIZE_MAX = 10_000, 1 << 40
FOUR_BITS = {4, "nvfp4", "mxfp4", "awq", "gptq"}


@dataclass(frozen=True, slots=True)
class Attention:
    """Like layers that keep something of every token they may still attend to.

    With `latent_elements` (multi-head latent attention, DeepSeek-V2 2024) a token has one vector per layer, whole on
    every tensor-parallel rank, and `kv_heads` and the head dimensions are 0.
    """

    layers: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window_tokens: int | None = None
    """Tokens that are kept; None: all."""
    chunked: bool = False
    """Attention inside chunks of `window_tokens` (Llama 4) instead of over the last `window_tokens`."""
    latent_elements: int = 0
    index_bytes: int = 0
    """Of a sparse indexer (DeepSeek-V3.2), per token and layer; its own format, whatever the cache's data type is."""


@dataclass(frozen=True, slots=True)
class State:
    """Layers that keep one state per sequence, however long it is. Counted as fp32 state and bf16 convolution state."""

    layers: int
    state_elements: int
    conv_elements: int
    dtype: str = ""
    """What the checkpoint asks for its state; "" where it says nothing (engines then differ)."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model as far as its memory and its arithmetic depend on it. None is "not known", never a guess."""

    name: str
    model_type: str
    hidden_size: int
    layers: int
    """All of them, also those that keep nothing (a feed-forward layer of Nemotron-H)."""
    query_heads: int
    query_head_dim: int
    """Elements of a query head, the mean of its key and value side: attention costs 4 * heads * this per pair."""
    attention: tuple[Attention, ...]
    state: State | None
    parameters_total: int | None
    parameters_active: int | None
    weights_bytes: int | None
    """Of the checkpoint, where its files say so."""
    context_tokens: int | None
    kv_dtype: str
    """What the checkpoint asks for; engines keep K and V so unless told otherwise."""
    source: str
    """Where these numbers are from, to be shown beside every figure that follows from them."""
    weights_dtype: str = "bf16"
    pattern: str = ""
    """What each layer keeps, a letter each: f all tokens, w a window, s a state, b all tokens and a state, - nothing.
    "" where only the counts are known."""


class _Config:
    """One configuration: its fields under one name each, with the defaults of its class. A missing one is an error."""

    def __init__(self, given: Mapping[str, Any], architecture: Architecture, name: str) -> None:
        self._given, self.architecture, self.name = given, architecture, name

    def get(self, field: str) -> Any:  # noqa: ANN401  # whatever JSON holds
        """The field, else its default, else None."""
        for each in (field, *ALIASES.get(field, ())):
            if self._given.get(each) is not None:
                return self._given[each]
        return None if field in self._given else self.architecture.defaults.get(field)

    def off(self, field: str, or_lacking: bool) -> bool:  # noqa: FBT001  # one caller, one line below a rule
        """Whether it is null, or lacks where that means the same."""
        return self.get(field) in {None, 0} and (field in self._given or or_lacking)

    def count(self, field: str, *or_else: str, or_null: int = 0) -> int:
        """A whole number above nothing, from the first of these fields that is there; `or_null` where it is null."""
        if or_null and field in self._given and self._given[field] is None:
            return or_null
        for each in (field, *or_else):
            found = self.get(each)
            if isinstance(found, int | float) and found == int(found) and found > 0:
                return int(found)
            if found is not None:
                raise self.wrong(f"its {each} is {found!r}")
        raise self.wrong(f"it has no {field}")

    def wrong(self, what: str) -> ModelError:
        """The error of a configuration that does not say what is needed."""
        return ModelError(
            f"the geometry of {self.name} cannot be read: {what}",
            hint="give the checkpoint's own config.json; circulating copies are often incomplete",
        )


def geometry_of(config: Mapping[str, Any], name: str) -> Geometry:
    """What a Hugging Face `config.json` says a model keeps.

    Raises ModelError for an architecture that is not known here, by its name, and for a field that lacks: nothing is
    guessed. `source` says only that a config.json was read; `models.find` says which.
    """
    try:
        return _sound(_read(config, name))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(
            f"the config.json of {name} has a field that cannot be read: {error}",
            hint="give the checkpoint's own config.json",
        ) from None


def _sound(found: Geometry) -> Geometry:
    """The same, where all of its sizes are whole numbers that a model can have; else ValueError."""
    sizes: list[tuple[str, Any]] = [
        (each, getattr(found, each)) for each in ("query_heads", "query_head_dim", "context_tokens")
    ]
    for part in (*found.attention, *((found.state,) if found.state else ())):
        sizes += [(each.name, getattr(part, each.name)) for each in fields_of(part) if each.name != "dtype"]
    for field, size in sizes:
        if size is not None and not (isinstance(size, int) and 0 <= size < SIZE_MAX):
            raise ValueError(f"{field} is {size!r}")
    return found


def _read(config: Mapping[str, Any], name: str) -> Geometry:
    outer = str(config.get("model_type", ""))
    inner = next((config[each] for each in NESTED if isinstance(config.get(each), Mapping)), None)
    if inner is not None:
        read = {"model_type": INNER.get(outer, outer), **inner}
        for each in ("quantization_config", "dtype", "torch_dtype"):
            read.setdefault(each, config.get(each))
        return replace(_read(read, name), model_type=outer)
    architecture = ARCHITECTURES.get(INNER.get(outer, outer))
    if architecture is None:
        raise ModelError(
            f"{name} has the architecture {outer or 'without a model_type'}, and what that keeps is not known here",
            hint=f"known are {', '.join(sorted(ARCHITECTURES))}; or measure it with `thermocline profile`",
        )
    fields = _Config(config, architecture, name)
    pattern = _pattern(fields, architecture)
    heads = fields.get("num_attention_heads") or 0
    attention = _attention(fields, architecture, pattern)
    return Geometry(
        name=name,
        model_type=outer,
        hidden_size=fields.count("hidden_size"),
        layers=len(pattern),
        query_heads=heads if attention else 0,
        query_head_dim=_query_head_dim(fields, architecture, attention),
        attention=attention,
        state=_state(fields, architecture, pattern),
        parameters_total=None,
        parameters_active=None,
        weights_bytes=None,
        context_tokens=fields.get("max_position_embeddings"),
        kv_dtype=_kv_dtype(config),
        source="config.json",
        weights_dtype=_weights_dtype(config),
        pattern=pattern,
    )


# -- which layer keeps what --------------------------------------------------------------------------------------------


def _pattern(fields: _Config, architecture: Architecture) -> str:
    if architecture.layers == "letters" and fields.get("hybrid_override_pattern"):
        return _letters(fields, fields.get("hybrid_override_pattern"), PATTERN_WORDS)
    listed = fields.get("layer_types") or fields.get("layers_block_type")
    if architecture.layers == "letters":
        return _letters(fields, listed or (), LAYER_WORDS)
    layers = fields.count("num_hidden_layers")
    if layers > LAYERS_MAX:
        raise fields.wrong(f"it has {layers} layers")
    if isinstance(listed, list) and architecture.layers != "both":
        letters = _letters(fields, listed[:layers], LAYER_WORDS)
        if len(letters) != layers:
            raise fields.wrong(f"it names the kind of {len(letters)} of its {layers} layers")
    else:
        rule, _, number = architecture.layers.partition(" ")
        letters = RULES[rule](fields, layers, int(number or 0))
    if fields.off("sliding_window", architecture.layers in MAY_HAVE_NONE) or fields.get("use_sliding_window") is False:
        letters = letters.replace("w", "f")
    letters = letters[:-1] + "f" if architecture.last_full else letters
    return letters[: layers - (fields.get("num_kv_shared_layers") or 0)].ljust(layers, "-")


MAY_HAVE_NONE = {"window", "qwen"}


def _letters(fields: _Config, listed: Any, words: Mapping[str, str]) -> str:  # noqa: ANN401  # a list, or a text
    unknown = sorted({str(each) for each in listed} - set(words))
    if unknown or not listed:
        raise fields.wrong(f"it has layers of the kind {', '.join(unknown)}" if unknown else "it lists no layers")
    return "".join(words[each] for each in listed)


def _every(fields: _Config, layers: int, number: int) -> str:
    """All but each n-th layer have a window, or a state. Exaone spells it out, and its last layer keeps all."""
    turn = fields.get("sliding_window_pattern") or fields.get("full_attention_interval")
    if isinstance(turn, str):
        spelt = _letters(fields, turn, PATTERN_WORDS)
        return (spelt * layers)[: layers - 1] + "f"
    number, other = int(turn or number), "s" if fields.architecture.state else "w"
    return "".join("f" if (at + 1) % number == 0 else other for at in range(layers))


def _qwen(fields: _Config, layers: int, _: int) -> str:
    full = layers if not fields.get("use_sliding_window") else int(fields.get("max_window_layers") or 0)
    return ("f" * full).ljust(layers, "w")[:layers]


def _chunks(fields: _Config, layers: int, _: int) -> str:
    """Llama 4: a layer with rotary positions attends inside its chunk, one without to all."""
    every = fields.get("no_rope_layer_interval") or 4
    rotary = fields.get("no_rope_layers") or [int((at + 1) % every != 0) for at in range(layers)]
    return "".join("w" if each else "f" for each in rotary)[:layers]


def _mimo(fields: _Config, layers: int, _: int) -> str:
    listed = fields.get("hybrid_layer_pattern")
    if not isinstance(listed, list):
        raise fields.wrong("it has no hybrid_layer_pattern")
    return "".join("w" if each else "f" for each in listed)[:layers]


def _jamba(fields: _Config, layers: int, _: int) -> str:
    period, offset = fields.count("attn_layer_period"), int(fields.get("attn_layer_offset") or 0)
    return "".join("f" if at % period == offset else "s" for at in range(layers))


def _indices(fields: _Config, layers: int, _: int) -> str:
    """Those that have attention are listed. Kimi counts layers from 1."""
    full = fields.get("attn_layer_indices") or fields.get("full_attn_idxs")
    if full is None and fields.get("linear_attn_config"):
        full = [at - 1 for at in fields.get("linear_attn_config")["full_attn_layers"]]
    if full is None:
        raise fields.wrong("it does not say which layers have attention")
    return "".join("f" if at in full else "s" for at in range(layers))


RULES: dict[str, Callable[[_Config, int, int], str]] = {
    "full": lambda _, layers, __: "f" * layers,
    "window": lambda _, layers, __: "w" * layers,
    "states": lambda _, layers, __: "s" * layers,
    "both": lambda _, layers, __: "b" * layers,
    "every": _every,
    "qwen": _qwen,
    "chunks": _chunks,
    "mimo": _mimo,
    "jamba": _jamba,
    "indices": _indices,
}


# -- what such a layer keeps -------------------------------------------------------------------------------------------


def _attention(fields: _Config, architecture: Architecture, pattern: str) -> tuple[Attention, ...]:
    full, windowed = pattern.count("f") + pattern.count("b"), pattern.count("w")
    groups: list[Attention] = []
    if full and architecture.latent:
        latent = fields.count("kv_lora_rank") + fields.count("qk_rope_head_dim")
        each = Attention(full, 0, 0, 0, latent_elements=latent)
        indexed = _indexed(fields, full) if architecture.indexed else 0
        index = fields.count("index_head_dim") if indexed else 0
        with_index = replace(each, layers=indexed, index_bytes=index + SCALE_BYTES * -(-index // INDEX_SCALE_ELEMENTS))
        groups += [with_index] * bool(indexed) + [replace(each, layers=full - indexed)] * (indexed < full)
    elif full:
        groups.append(Attention(full, *_heads(fields, architecture, "global_")))
    if windowed:
        chunk = fields.get("attention_chunk_size") if architecture.layers == "chunks" else None
        window = chunk or fields.count("sliding_window")
        kept = _heads(fields, architecture, "swa_")
        groups.append(Attention(windowed, *kept, window_tokens=window, chunked=chunk is not None))
    return tuple(groups)


def _heads(fields: _Config, architecture: Architecture, own: str) -> tuple[int, int, int]:
    """Heads, and elements of a key and of a value.

    Gemma 4 has fields of their own for layers that keep all (`global_`), MiMo-V2 for those with a window (`swa_`).
    `head_dim` as published comes first: hidden size over heads is wrong for Qwen3, Gemma and gpt-oss.
    """
    query_heads = fields.count("num_attention_heads")
    kv_heads, key = KV_HEADS[architecture.heads](fields, query_heads), fields.get(f"{own}head_dim")
    if own == "swa_" or fields.get("attention_k_eq_v"):
        kv_heads = fields.get(f"{own}num_key_value_heads") or fields.get(f"num_{own}key_value_heads") or kv_heads
    if own == "swa_" and fields.get("attention_other_setting"):
        kv_heads = fields.get("attention_other_setting")["num_attention_groups"]  # Step 3.5
    key = key or fields.get("head_dim") or fields.count("hidden_size") // query_heads
    value = fields.get("swa_v_head_dim") if own == "swa_" else None
    return kv_heads, key, value or fields.get("v_head_dim") or key


def _falcon_heads(fields: _Config, heads: int) -> int:
    if fields.get("new_decoder_architecture"):
        return fields.count("num_kv_heads", "n_head_kv")
    return 1 if fields.get("multi_query") in {None, True} else int(fields.get("num_kv_heads") or heads)


KV_HEADS: dict[str, Callable[[_Config, int], int]] = {
    "num_key_value_heads": lambda fields, heads: int(fields.get("num_key_value_heads") or heads),
    "stated": lambda fields, heads: fields.count("num_key_value_heads", or_null=heads),
    "all": lambda _, heads: heads,
    "multi_query": lambda fields, heads: 1 if fields.get("multi_query") in {None, True} else heads,
    "falcon": _falcon_heads,
    "dbrx": lambda fields, _: int((fields.get("attn_config") or {}).get("kv_n_heads", 1)),
}


def _indexed(fields: _Config, layers: int) -> int:
    """How many layers have an indexer of their own: GLM-5.2 lets the layers between use the choice of the last one."""
    every, offset = int(fields.get("index_topk_freq") or 1), fields.get("index_skip_topk_offset")
    offset = 2 if offset is None else int(offset)
    return sum(max(at - offset + 1, 0) % every == 0 for at in range(layers))


def _query_head_dim(fields: _Config, architecture: Architecture, attention: tuple[Attention, ...]) -> int:
    if not attention:
        return 0
    if architecture.latent:
        return (fields.count("qk_nope_head_dim") + fields.count("qk_rope_head_dim") + fields.count("v_head_dim")) // 2
    return (attention[0].head_dim_k + attention[0].head_dim_v) // 2


def _state(fields: _Config, architecture: Architecture, pattern: str) -> State | None:
    layers = pattern.count("s") + pattern.count("b")
    if not layers:
        return None
    dtype = str(fields.get("mamba_ssm_dtype") or fields.get("mamba_ssm_cache_dtype") or "")
    return State(layers, *STATES[architecture.state](fields), dtype)


def _delta(fields: _Config) -> tuple[int, int]:
    """Gated delta rule (Qwen3-Next): a matrix per value head; the convolution is over queries, keys and values."""
    key, value = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    key_heads, value_heads = fields.count("linear_num_key_heads"), fields.count("linear_num_value_heads")
    kept = fields.count("linear_conv_kernel_dim") - 1
    return value_heads * value * key, kept * (2 * key_heads * key + value_heads * value)


def _kda(fields: _Config) -> tuple[int, int]:
    """Kimi delta attention: as above, with as many heads for keys as for values."""
    linear = fields.get("linear_attn_config") or {}
    heads = linear.get("num_heads") or fields.count("linear_num_heads")
    size = linear.get("head_dim") or fields.count("linear_head_dim")
    kernel = linear.get("short_conv_kernel_size") or fields.count("linear_conv_kernel_dim")
    return heads * size * size, (kernel - 1) * 3 * heads * size


def _mamba1(fields: _Config) -> tuple[int, int]:
    inner = fields.count("mamba_expand", "expand") * fields.count("hidden_size")
    return inner * fields.count("mamba_d_state", "state_size"), inner * (
        fields.count("mamba_d_conv", "conv_kernel") - 1
    )


def _mamba2(fields: _Config) -> tuple[int, int]:
    names = ("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("num_heads", "head_dim")
    heads_name, size_name = next((pair for pair in names if fields.get(pair[0])), names[0])
    heads, size = fields.count(heads_name), fields.get(size_name)
    if not isinstance(size, int):  # "auto"
        size = (fields.get("mamba_d_ssm") or fields.count("mamba_expand") * fields.count("hidden_size")) // heads
    state, groups = (
        fields.count("mamba_d_state", "ssm_state_size", "state_size"),
        fields.count("mamba_n_groups", "n_groups"),
    )
    return heads * size * state, (fields.count("mamba_d_conv", "conv_kernel") - 1) * (heads * size + 2 * groups * state)


STATES: dict[str, Callable[[_Config], tuple[int, int]]] = {
    "delta": _delta,
    "kda": _kda,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "conv": lambda fields: (0, (fields.count("conv_L_cache") - 1) * fields.count("hidden_size")),
}


# -- data types --------------------------------------------------------------------------------------------------------


def _kv_dtype(config: Mapping[str, Any]) -> str:
    """What the checkpoint asks for. One of fp32 weights is served with 16 bits unless the engine is told otherwise."""
    quantised = config.get("quantization_config") or {}
    scheme = quantised.get("kv_cache_scheme") or quantised.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        scheme = {"float": "fp", "int": "int"}.get(str(scheme.get("type")), "?") + str(scheme.get("num_bits"))
    if scheme:
        return str(scheme).lower()
    return KV_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "bf16")


def _weights_dtype(config: Mapping[str, Any]) -> str:
    """A rough one, for where no files say how large the weights are: the width that most of them have."""
    quantised = config.get("quantization_config") or {}
    methods = {str(quantised.get(each)).lower() for each in ("quant_method", "quant_algo")}
    groups = quantised.get("config_groups") or {}
    bits = [each.get("weights", {}).get("num_bits") for each in groups.values() if isinstance(each, Mapping)]
    if not quantised:
        return {"float32": "fp32"}.get(str(config.get("dtype") or config.get("torch_dtype")), "bf16")
    return "fp4" if {*bits, quantised.get("bits"), *methods} & FOUR_BITS else "fp8"
