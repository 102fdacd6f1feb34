"""The plan of KV memory, held to what a real vLLM gives away: blocks, tokens and concurrency, without an error.

Each is a tiny configuration with dummy weights. vLLM runs in a process of its own, with exactly one GiB for KV.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench.vllm_server import ENVIRONMENT
from tests.vllm.server import interpreter
from thermocline.costs.geometry import geometry_of
from thermocline.costs.pages import VLLM_CPU, paging

PROBE = Path(__file__).with_name("kv_probe.py")
KV_BYTES = 1 << 30
CONTEXT_TOKENS = 4096
START_SECONDS = 600
NAMES = {"FullAttentionSpec": "f", "MLAAttentionSpec": "f", "SlidingWindowSpec": "w", "MambaSpec": "s"} | {
    "ChunkedLocalAttentionSpec": "w"
}

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
LATENT = {
    "num_hidden_layers": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 4,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128, "norm_topk_prob": True}
DELTA = EXPERTS | {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 128,
    "decoder_sparse_step": 1,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
SLIDING = {"num_hidden_layers": 6, "sliding_window": 512, "query_pre_attn_scalar": 64}
GEMMA4 = {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 128,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 1024,
    "enable_moe_block": False,
}
MIMO = LATENT | {
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "head_dim": 96,
    "v_head_dim": 64,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 96,
    "swa_v_head_dim": 64,
    "sliding_window": 128,
    "sliding_window_size": 128,
    "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1],
    "moe_layer_freq": [0] * 6,
    "n_shared_experts": None,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 1e4,
    "swa_rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "hidden_act": "silu",
    "add_swa_attention_sink_bias": False,
    "add_full_attention_sink_bias": False,
    "attention_value_scale": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
NEMOTRON = {
    "hybrid_override_pattern": "M-M*M-M-",
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "expand": 2,
    "mlp_hidden_act": "relu2",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
}
JAMBA = {
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 100,
    "expert_layer_offset": 99,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 16,
}
LLAMA4 = {
    "attention_chunk_size": 1024,
    "no_rope_layers": [1, 1, 1, 0] * 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 256,
    "interleave_moe_layer_step": 1,
    "moe_layers": [],
    "attn_temperature_tuning": False,
}
GPT2 = {"vocab_size": 1024, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 4096, "torch_dtype": "bfloat16"}
OSS = {"sliding_window": 128, "num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID = {"layer_types": ["mamba", "mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 128}

LLAMA = ("llama", "LlamaForCausalLM")
GEMMA3 = ("gemma3_text", "Gemma3ForCausalLM")
NEXT = ("qwen3_next", "Qwen3NextForCausalLM")
MODELS: dict[str, tuple[tuple[str, str], dict[str, object], dict[str, object]]] = {
    "heads shared by queries": (LLAMA, {"num_key_value_heads": 4}, {}),
    "one head": (LLAMA, {"num_key_value_heads": 1}, {}),
    "fp8 cache": (LLAMA, {"num_key_value_heads": 4}, {"kv_cache_dtype": "fp8"}),
    "latent": (
        ("deepseek_v2", "DeepseekV2ForCausalLM"),
        LATENT | {"topk_method": "greedy", "scoring_func": "softmax"},
        {},
    ),
    "windows": (GEMMA3, SLIDING, {}),
    "gated delta rule": (NEXT, DELTA, {}),
    # The six above are the architectures of the promise; below, each other rule once.
    "as many heads as queries": (("gpt2", "GPT2LMHeadModel"), GPT2, {}),
    "latent, with compressed queries": (
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        LATENT | {"q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        {},
    ),
    "a window everywhere": (("mistral", "MistralForCausalLM"), {"sliding_window": 512}, {}),
    "windows in every second layer": (("gpt_oss", "GptOssForCausalLM"), OSS, {}),
    "uneven kinds": (("gemma2", "Gemma2ForCausalLM"), SLIDING | {"num_hidden_layers": 7}, {}),
    "short blocks and batches": (GEMMA3, SLIDING, {"block_size": 64, "max_num_batched_tokens": 1024}),
    "windows kept whole": (GEMMA3, SLIDING, {"disable_hybrid_kv_cache_manager": True}),
    "heads of two sizes": (("gemma4_text", "Gemma4ForCausalLM"), GEMMA4 | {"num_hidden_layers": 12}, {}),
    "pages that must be padded": (
        ("gemma4_text", "Gemma4ForCausalLM"),
        GEMMA4 | {"num_attention_heads": 12, "num_key_value_heads": 3, "layer_types": None},
        {"max_num_batched_tokens": 1024},
    ),
    "keys larger than values": (("mimo_v2_flash", "MiMoV2FlashForCausalLM"), MIMO, {}),
    "chunks": (("llama4_text", "Llama4ForCausalLM"), LLAMA4, {}),
    "gated delta rule, no prefix caching": (
        NEXT,
        DELTA | {"num_hidden_layers": 8, "num_key_value_heads": 1, "linear_value_head_dim": 128},
        {"enable_prefix_caching": False},
    ),
    "mamba 1": (("jamba", "JambaForCausalLM"), JAMBA, {}),
    "mamba 2": (
        ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
        MAMBA2 | HYBRID | {"num_hidden_layers": 6, "num_experts_per_tok": 0},
        {},
    ),
    "mamba 2 and layers that keep nothing": (("nemotron_h", "NemotronHForCausalLM"), NEMOTRON, {}),
    "attention and state in each layer": (
        ("falcon_h1", "FalconH1ForCausalLM"),
        MAMBA2 | {"num_hidden_layers": 4, "mamba_d_ssm": 512},
        {},
    ),
    "one head on two ranks": (LLAMA, {"num_key_value_heads": 1}, {"tensor_parallel_size": 2}),
    "states on two ranks": (NEXT, DELTA, {"tensor_parallel_size": 2}),
    "latent in three stages": (
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        LATENT | {"num_hidden_layers": 4, "q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        {"pipeline_parallel_size": 3},
    ),
    "uneven kinds in two stages": (
        ("gemma2", "Gemma2ForCausalLM"),
        SLIDING | {"num_hidden_layers": 7},
        {"pipeline_parallel_size": 2},
    ),
}
SHORT = "gated delta rule"


def planned_by_vllm(folder: Path, arguments: dict[str, object]) -> dict[str, object]:
    """What a vLLM that starts on this configuration gives away."""
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    argv = [interpreter(), PROBE, folder, json.dumps(arguments)]
    started = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = started.communicate(timeout=START_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the other ranks too, where they were left
            os.killpg(started.pid, signal.SIGKILL)
    told = [line.removeprefix("PLANNED ") for line in said.splitlines() if line.startswith("PLANNED ")]
    assert told, f"vLLM did not start:\n{said[-4000:]}"
    logged = [line for line in said.splitlines() if "Maximum concurrency for" in line]
    return json.loads(told[0]) | {"logged": logged[-1]}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if each == SHORT else pytest.mark.vllm_long) for each in MODELS]
)
def test_as_vllm_plans(name, tmp_path):
    """Blocks, pages, tokens and concurrency are those of a real vLLM, to the last digit of its log."""
    (model_type, architecture), fields, arguments = MODELS[name]
    shape = {} if model_type == "gpt2" else SHAPE
    config = shape | {"model_type": model_type, "architectures": [architecture]} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = planned_by_vllm(tmp_path, arguments)
    engine = replace(
        VLLM_CPU,
        block_tokens=arguments.get("block_size", VLLM_CPU.block_tokens),
        latent_block_tokens=VLLM_CPU.block_tokens if told["amx"] else VLLM_CPU.latent_block_tokens,
        batched_tokens=arguments.get("max_num_batched_tokens", CONTEXT_TOKENS),
        prefix_caching=arguments.get("enable_prefix_caching", True),
        windows_freed=not arguments.get("disable_hybrid_kv_cache_manager", False),
        state_dtype="float32" if told["avx512_bf16"] else "",
    )
    ranks = {"tp": arguments.get("tensor_parallel_size", 1), "pp": arguments.get("pipeline_parallel_size", 1)}
    plan = paging(geometry_of(config, name), engine, arguments.get("kv_cache_dtype", ""), **ranks)
    blocks = KV_BYTES // plan.block_bytes
    concurrency = blocks / plan.worst_pages(CONTEXT_TOKENS)
    tokens = int(concurrency * CONTEXT_TOKENS)
    assert (blocks, concurrency, tokens) == (told["blocks"], told["concurrency"], told["tokens"])
    assert f"{tokens:,} tokens" in told["logged"]
    assert f"{concurrency:.2f}x" in told["logged"]
    ours = sorted((each.kind, len(each.layers), each.page_bytes) for each in plan.groups)
    theirs = [(NAMES[each["kind"]], each["layers"], each["page_bytes"]) for each in told["groups"]]
    if len(ours) > 1 and ranks["pp"] == 1:
        assert ours == sorted(theirs)
    assert plan.in_flight_tokens == told["in_flight_tokens"]
