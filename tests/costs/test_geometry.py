"""What a config.json says a model keeps: each kind of attention, each trap, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.architectures import ARCHITECTURES
from thermocline.costs.geometry import Attention, State, geometry_of
from thermocline.costs.memory import state_bytes, token_bytes
from thermocline.errors import ModelError

PLAIN = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
SLIDING = {"sliding_window": 1024, "num_key_value_heads": 4, "head_dim": 256}
DELTA = {"linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_conv_kernel_dim": 4} | {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def config(**fields):
    return PLAIN | fields


def full(layers, heads, key, value=None, **more):
    return Attention(layers, heads, key, value or key, **more)


def read(**fields):
    return geometry_of(config(**fields), "a model")


# -- kinds of attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": 8}, full(32, 8, 128)),
        ({}, full(32, 32, 128)),
        ({"num_key_value_heads": 1}, full(32, 1, 128)),
        ({"num_key_value_heads": 8, "head_dim": 64}, full(32, 8, 64)),
        ({"model_type": "gemma", "num_key_value_heads": 16}, full(32, 16, 256)),
        ({"model_type": "gpt_bigcode", "multi_query": True}, full(32, 1, 128)),
        ({"model_type": "falcon", "num_kv_heads": 8, "new_decoder_architecture": True}, full(32, 8, 128)),
        ({"model_type": "falcon", "num_kv_heads": 8}, full(32, 1, 128)),
        ({"model_type": "falcon", "multi_query": False}, full(32, 32, 128)),
        ({"model_type": "dbrx", "attn_config": {"kv_n_heads": 8}}, full(32, 8, 128)),
        ({"model_type": "gpt_neox", "num_key_value_heads": 8}, full(32, 32, 128)),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 128, **LATENT}, full(32, 0, 0, latent_elements=576)),
    ],
)
def test_all_tokens(fields, expected):
    """Heads and sizes of layers that keep all tokens are read as each architecture means them."""
    assert read(**fields).attention == (expected,)


def test_old_names():
    """GPT-2 names its fields in its own way."""
    found = geometry_of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, "gpt2")
    assert (found.attention, found.context_tokens, found.hidden_size) == ((full(12, 12, 64),), 1024, 768)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "w" * 8),
        ({"model_type": "mistral", "sliding_window": None}, "f" * 8),
        ({"model_type": "mistral"}, "w" * 8),
        ({"model_type": "mixtral"}, "f" * 8),
        ({"model_type": "gemma2", "sliding_window": 4096}, "wf" * 4),
        ({"model_type": "gemma3_text", "sliding_window": 512}, "wwwwwfww"),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 4}, "wwwf" * 2),
        ({"model_type": "exaone4", "sliding_window": 512, "sliding_window_pattern": "LLG"}, "wwfwwfwf"),
        ({"model_type": "exaone4", "sliding_window": None}, "f" * 8),
        ({"model_type": "gpt_oss", "layer_types": ["full_attention", "sliding_attention"] * 4}, "fw" * 4),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False, "max_window_layers": 4}, "f" * 8),
        (
            {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 6},
            "ffffffww",
        ),
        ({"model_type": "llama4_text"}, "wwwf" * 2),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0] * 4}, "wf" * 4),
        ({"model_type": "qwen3_next", "num_key_value_heads": 2}, "sssf" * 2),
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1}, "sfss" * 2),
        ({"model_type": "bamba", "attn_layer_indices": [3], "num_key_value_heads": 8}, "sssfssss"),
        ({"model_type": "falcon_h1"}, "b" * 8),
        ({"model_type": "gemma4_text"}, "wwwwwfwf"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 2}, "wwwwwf--"),
    ],
)
def test_which_layer_keeps_what(fields, pattern):
    """The kind of each layer follows from the rule of its architecture."""
    assert read(**{"num_hidden_layers": 8, **fields}).pattern == pattern


def test_two_kinds_of_heads():
    """Gemma 4's layers that keep all, and MiMo-V2's that have a window, have heads of their own."""
    gemma = read(
        model_type="gemma4_text",
        num_hidden_layers=6,
        **SLIDING | {"num_key_value_heads": 8},
        global_head_dim=512,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
    )
    assert gemma.attention == (full(1, 2, 512), full(5, 8, 256, window_tokens=1024))
    mimo = read(
        model_type="mimo_v2_flash",
        num_hidden_layers=3,
        hybrid_layer_pattern=[0, 1, 1],
        num_key_value_heads=4,
        head_dim=192,
        v_head_dim=128,
        swa_num_key_value_heads=8,
        swa_head_dim=192,
        swa_v_head_dim=128,
        sliding_window=128,
    )
    assert mimo.attention == (full(1, 4, 192, 128), full(2, 8, 192, 128, window_tokens=128))


def test_chunks():
    """Llama 4's chunks are windows that end together, and say so."""
    found = read(model_type="llama4_text", num_hidden_layers=4, num_key_value_heads=8, head_dim=128)
    assert found.attention == (full(1, 8, 128), full(3, 8, 128, window_tokens=8192, chunked=True))


def test_sparse_indexer():
    """An indexer's keys are kept beside the latent vector; GLM-5.2 has them in the first layers and every fourth."""
    found = read(model_type="deepseek_v32", num_hidden_layers=61, index_head_dim=128, **LATENT)
    assert found.attention == (full(61, 0, 0, latent_elements=576, index_bytes=132),)
    fields = LATENT | {"index_head_dim": 128, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    shared = read(model_type="glm_moe_dsa", num_hidden_layers=78, **fields)
    assert [(each.layers, each.index_bytes) for each in shared.attention] == [(21, 132), (57, 0)]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        (
            {"model_type": "qwen3_5_text", "num_key_value_heads": 4, "mamba_ssm_dtype": "float32", **DELTA},
            State(24, 786_432, 30_720, "float32"),
        ),
        ({"model_type": "jamba"}, State(28, 131_072, 24_576)),
        (
            {
                "model_type": "nemotron_h",
                "hybrid_override_pattern": "M-M*EM",
                "mamba_num_heads": 64,
                "mamba_head_dim": 64,
                "n_groups": 8,
                "ssm_state_size": 128,
                "conv_kernel": 4,
            },
            State(3, 524_288, 18_432),
        ),
        (
            {
                "model_type": "bamba",
                "attn_layer_indices": [1],
                "mamba_n_heads": 128,
                "mamba_d_head": "auto",
                "head_dim": 32,
                "mamba_d_state": 256,
            },
            State(31, 2_097_152, 26_112),
        ),
        (
            {
                "model_type": "kimi_linear",
                "linear_attn_config": {
                    "full_attn_layers": [4, 8],
                    "num_heads": 32,
                    "head_dim": 128,
                    "short_conv_kernel_size": 4,
                },
            },
            State(30, 524_288, 36_864),
        ),
        ({"model_type": "lfm2", "full_attn_idxs": [2], "num_key_value_heads": 8}, State(31, 0, 8192)),
        ({"model_type": "falcon_mamba", "conv_kernel": 4}, State(32, 131_072, 24_576)),
        ({}, None),
    ],
)
def test_states(fields, state):
    """What a recurrent layer keeps per sequence follows from its kind: delta rule, Mamba 1 and 2, KDA, convolution."""
    assert read(**fields).state == state


def test_only_states():
    """A model without attention keeps nothing per token."""
    found = read(model_type="mamba", conv_kernel=4)
    assert (found.attention, token_bytes(found), found.query_heads) == ((), 0, 0)
    assert state_bytes(found) == 32 * (131_072 * 4 + 24_576 * 2)


# -- nested, quantised -------------------------------------------------------------------------------------------------


def test_the_decoder_inside():
    """A model of several inputs is read from its text_config, also where that leaves out what its class has."""
    inside = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024, "model_type": "gemma3_text"}
    found = geometry_of({"model_type": "gemma3", "text_config": inside, "vision_config": {}}, "gemma-3-4b")
    assert found.attention == (full(5, 4, 256), full(29, 4, 256, window_tokens=1024))
    assert (found.model_type, found.query_heads) == ("gemma3", 8)
    unsaid = geometry_of({"model_type": "llava", "text_config": {**PLAIN, "model_type": "llama"}}, "llava")
    assert unsaid.attention == (full(32, 32, 128),)
    flat = geometry_of({**PLAIN, "model_type": "qwen2_vl", "num_key_value_heads": 4}, "qwen2-vl")
    assert flat.attention == (full(32, 4, 128),)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float16"}, "fp16"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float32"}, "bf16"),
        ({}, "bf16"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}, "fp8"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}}, "int8"),
        ({"quantization_config": {"kv_cache_scheme": "FP8"}}, "fp8"),
        ({"quantization_config": {"kv_cache_quant_algo": "FP8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bf16"),
    ],
)
def test_data_type_of_the_cache(fields, dtype):
    """K and V have the type that the checkpoint asks for; quantised weights alone say nothing about them."""
    assert read(**fields).kv_dtype == dtype


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "fp4"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "fp4"),
        ({"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}}, "fp4"),
        ({"torch_dtype": "float32"}, "fp32"),
        ({}, "bf16"),
    ],
)
def test_data_type_of_the_weights(fields, dtype):
    """The width of most weights is told from the quantisation, for where no files say their size."""
    assert read(**fields).weights_dtype == dtype


# -- traps -------------------------------------------------------------------------------------------------------------


def test_kv_heads_not_query_heads():
    """Qwen2.5-32B keeps 8 heads, not the 40 that ask."""
    fields = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    assert token_bytes(read(model_type="qwen2", **fields)) == 262_144


@pytest.mark.parametrize(
    ("fields", "right", "by_division"),
    [
        ({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}, 128, 64),
        ({"model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "head_dim": 64}, 64, 45),
        ({"model_type": "gemma3_text", "hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}, 128, 168),
    ],
)
def test_head_size_as_published(fields, right, by_division):
    """A head is as large as the configuration says, not hidden size over heads."""
    found = read(num_key_value_heads=8, **fields)
    assert {each.head_dim_k for each in found.attention} == {right} != {by_division}


def test_wrong_copies_are_not_mended():
    """A circulating Qwen3-32B with 60 layers and 96 heads reads as it is written: other than the checkpoint's own."""
    own = {"model_type": "qwen3", "hidden_size": 5120, "num_key_value_heads": 8, "head_dim": 128}
    right = read(**own, num_hidden_layers=64, num_attention_heads=64)
    wrong = read(**own, num_hidden_layers=60, num_attention_heads=96)
    assert (token_bytes(right), token_bytes(wrong)) == (262_144, 245_760)


def test_k_equal_to_v_is_kept_twice():
    """Gemma 4 says that K equals V, and still keeps both."""
    found = read(model_type="gemma4_text", num_hidden_layers=6, attention_k_eq_v=True, num_global_key_value_heads=2)
    full = found.attention[0]
    assert (full.kv_heads, full.head_dim_k, full.head_dim_v, full.latent_elements) == (2, 512, 512, 0)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "deepseek_v4"}, "deepseek_v4"),
        ({"model_type": "zamba2"}, "zamba2"),
        ({"model_type": ""}, "without a model_type"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"max_position_embeddings": "many"}, "context_tokens"),
        ({"max_position_embeddings": []}, "context_tokens"),
        ({"head_dim": -128}, "head_dim"),
        ({"model_type": "llama4_text", "attention_chunk_size": {}, "sliding_window": "x"}, "sliding_window"),
        ({"model_type": "qwen3_moe"}, "num_key_value_heads"),
        ({"model_type": "bamba"}, "which layers have attention"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M?"}, r"\?"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "1 of its 32 layers"),
        ({"model_type": "gemma3_text", "layer_types": ["dilated_attention"] * 32}, "dilated_attention"),
        ({"model_type": "mimo_v2_flash", "num_key_value_heads": 4}, "hybrid_layer_pattern"),
    ],
)
def test_refused_by_name(fields, named):
    """What is not known is refused by its name, with a hint; nothing is guessed."""
    with pytest.raises(ModelError, match=named) as refused:
        read(**fields)
    assert refused.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=4,
)
FIELDS = sorted(
    {*PLAIN, *LATENT, *SLIDING, *DELTA, "layer_types", "quantization_config", "text_config", "linear_attn_config"}
    | {"hybrid_override_pattern", "attn_layer_indices", "num_kv_shared_layers", "attention_other_setting", "dtype"}
)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_fields(model_type, fields):
    """Whatever stands in a configuration, it is read or refused; no field makes a model of endless layers."""
    with contextlib.suppress(ModelError):
        found = geometry_of(config(**{"num_key_value_heads": 8, "model_type": model_type, **fields}), "any")
        assert found.layers <= 10_000
    with pytest.raises(ModelError, match="layers"):
        read(num_hidden_layers=10**12)


# -- held to transformers ----------------------------------------------------------------------------------------------

KEPT = {
    "DynamicLayer": "f",
    "DynamicIndexedLayer": "f",
    "DynamicSlidingWindowLayer": "w",
    "LinearAttentionLayer": "s",
    "LinearAttentionAndFullAttentionLayer": "b",
    "DummyLayer": "-",
}
SIZES = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
    "n_head",
    "d_model",
    "n_layers",
} | {
    "n_heads",
    "attn_config",
    "layer_types",
    "layers_block_type",
    "mamba_n_heads",
}
SILENT = {"bamba", "lfm2_moe"}
"""Their classes' defaults do not say which layers have attention."""


def test_as_transformers_caches():
    """For each architecture that transformers knows, its cache has just the kinds of layers that are read here.

    And a configuration that leaves out what its class has either reads the same, or is refused.
    """
    transformers = pytest.importorskip("transformers")
    compared = 0
    for model_type in sorted(set(ARCHITECTURES) & set(transformers.CONFIG_MAPPING) - SILENT):
        own = transformers.CONFIG_MAPPING[model_type]()
        fields = own.to_dict()
        found = geometry_of(fields, model_type)
        layers = [type(each).__name__ for each in transformers.DynamicCache(config=own).layers]
        assert "".join(KEPT[each] for each in layers) == found.pattern, model_type
        try:
            lacking = geometry_of({"model_type": model_type} | {each: fields.get(each) for each in SIZES}, model_type)
        except ModelError:
            continue
        assert (lacking.attention, lacking.state) == (found.attention, found.state), model_type
        compared += 1
    assert compared > 40
