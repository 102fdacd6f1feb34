"""Architectures whose `config.json` can be read: what each keeps per layer, and what its fields mean when they lack.

The facts are those of the configuration classes of Hugging Face transformers 5.16 and of vLLM 0.32's models. An
architecture that is not here is refused: most new ones differ from an old one just in what they keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER_WORDS = {
    "full_attention": "f",
    "attention": "f",
    "indexed_attention": "f",
    "deepseek_sparse_attention": "f",
    "sliding_attention": "w",
    "chunked_attention": "w",
    "linear_attention": "s",
    "mamba": "s",
    "conv": "s",
    "mlp": "-",
    "moe": "-",
}
"""What configurations call a layer, by what it keeps: all tokens (f), a window (w), a state (s), nothing (-)."""

PATTERN_WORDS = {"*": "f", "M": "s", "-": "-", "E": "-", "L": "w", "G": "f"}
"""The letters of `hybrid_override_pattern` (Nemotron-H) and of `sliding_window_pattern` (Exaone 4)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to read one `model_type`.

    `layers` is the rule that says what each layer keeps where no list of layers does, `state` what a layer keeps that
    is no attention, `heads` how many heads keep K and V ("stated": nothing stands in for it). `defaults` stand in for
    fields that a configuration leaves out because its class has them.
    """

    layers: str = "full"
    latent: bool = False
    indexed: bool = False
    heads: str = "num_key_value_heads"
    state: str = ""
    last_full: bool = False
    """The last layer keeps all tokens, whatever is said about it (Gemma 4)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _same(names: str, architecture: Architecture) -> dict[str, Architecture]:
    return dict.fromkeys(names.split(), architecture)


_QWEN_NEXT = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128} | {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "head_dim": 256,
}
_MAMBA2 = {"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 128, "mamba_d_state": 256}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_WIDE = {"head_dim": 128}

ARCHITECTURES: dict[str, Architecture] = {
    **_same(
        "llama phi olmo olmo2 olmoe flex_olmo granite granitemoe granitemoeshared stablelm cohere nemotron arcee "
        "apertus hunyuan_v1_dense hunyuan_v1_moe qwen3_vl_moe_text mimo",
        Architecture(),
    ),
    **_same("qwen3_moe internlm3 bitnet ernie4_5_moe glm4_moe step3p5 step3p7", Architecture(heads="stated")),
    **_same("qwen3_vl_text helium jais2", Architecture(defaults=_WIDE)),
    **_same("ernie4_5 minimax_m2 seed_oss glm glm4", Architecture(heads="stated", defaults=_WIDE)),
    "gemma": Architecture(defaults={"head_dim": 256}),
    "ministral3": Architecture(defaults={"num_key_value_heads": 8, "head_dim": 128}),
    **_same("mistral ministral", Architecture("window", defaults={"num_key_value_heads": 8, "sliding_window": 4096})),
    "mixtral": Architecture("window", defaults={"num_key_value_heads": 8}),
    "phi3": Architecture("window"),
    **_same("phimoe starcoder2", Architecture("window", heads="stated")),
    **_same("qwen2 qwen2_moe", Architecture("qwen")),
    **_same("qwen2_vl_text qwen2_5_vl_text", Architecture("qwen", heads="stated")),
    "qwen3": Architecture("qwen", defaults=_WIDE),
    "smollm3": Architecture(defaults={"num_key_value_heads": 4}),
    "gemma2": Architecture("every 2", defaults=_GEMMA3),
    "gemma3_text": Architecture("every 6", defaults=_GEMMA3),
    "gemma4_text": Architecture(
        "every 6", last_full=True, defaults=_GEMMA3 | {"sliding_window": 512, "global_head_dim": 512}
    ),
    "cohere2": Architecture("every 4", defaults={"head_dim": 128, "sliding_window": 4096}),
    "olmo3": Architecture("every 4", defaults={"sliding_window": 4096}),
    "exaone4": Architecture("every 4", defaults={"sliding_window": 4096}),
    "gpt_oss": Architecture(
        "every 2", defaults={"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_attention_heads": 64}
    ),
    "llama4_text": Architecture(
        "chunks", defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192}
    ),
    "mimo_v2_flash": Architecture("mimo", heads="stated", defaults={"head_dim": 192, "v_head_dim": 128}),
    **_same("gpt2 gptj gpt_neox opt bloom codegen persimmon", Architecture(heads="all")),
    "gpt_bigcode": Architecture(heads="multi_query"),
    "falcon": Architecture(heads="falcon"),
    "dbrx": Architecture(heads="dbrx"),
    **_same("deepseek_v2 deepseek_v3 kimi_k2 kimi_k25", Architecture(latent=True, defaults=_LATENT)),
    "glm4_moe_lite": Architecture(
        latent=True, defaults=_LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256, "num_attention_heads": 20}
    ),
    "deepseek_v32": Architecture(latent=True, indexed=True, defaults=_LATENT | {"index_head_dim": 128}),
    "glm_moe_dsa": Architecture(
        latent=True,
        indexed=True,
        defaults=_LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256, "index_head_dim": 128},
    ),
    **_same(
        "qwen3_next qwen3_5_text qwen3_5_moe_text",
        Architecture("every 4", heads="stated", state="delta", defaults=_QWEN_NEXT),
    ),
    **_same("kimi_linear kimi_k3", Architecture("indices", latent=True, state="kda", defaults=_LATENT)),
    "jamba": Architecture(
        "jamba",
        state="mamba1",
        defaults={"num_key_value_heads": 8, "attn_layer_period": 8, "attn_layer_offset": 4}
        | {"mamba_expand": 2, "mamba_d_state": 16, "mamba_d_conv": 4},
    ),
    "bamba": Architecture("indices", state="mamba2", defaults=_MAMBA2 | {"num_key_value_heads": 8}),
    "granitemoehybrid": Architecture("states", state="mamba2", defaults=_MAMBA2),
    "falcon_h1": Architecture(
        "both", state="mamba2", defaults=_MAMBA2 | {"num_key_value_heads": 8, "mamba_d_ssm": 1024}
    ),
    "nemotron_h": Architecture(
        "letters", state="mamba2", defaults={"num_key_value_heads": 8, "head_dim": 128, "ssm_state_size": 128}
    ),
    "mamba2": Architecture(
        "states", state="mamba2", defaults={"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8}
    ),
    **_same("mamba falcon_mamba", Architecture("states", state="mamba1", defaults={"expand": 2, "state_size": 16})),
    **_same("lfm2 lfm2_moe", Architecture("indices", heads="stated", state="conv", defaults={"conv_L_cache": 3})),
}

INNER = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
}
"""The decoder of a model of several inputs, where its `text_config` does not say so, or there is none."""
