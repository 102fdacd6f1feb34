"""Small models of other architectures with random weights: what a cache must get right differs between them."""

from __future__ import annotations

import shutil
from pathlib import Path

SEED = 0
_SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.08,  # large, so that attention looks at something and a wrong block changes the answer
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 4,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
_RECURRENT = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
CONFIGS = {
    "llama": ("llama", _SHAPE),
    "sliding": ("gemma3_text", {**_SHAPE, "sliding_window": 128, "layer_types": _SLIDING, "query_pre_attn_scalar": 64}),
    "latent": ("deepseek_v2", {**_SHAPE, **_LATENT}),
    "recurrent": ("qwen3_next", {**_SHAPE, **_RECURRENT}),
}


def make(kind: str, path: Path, tiny: Path) -> Path:
    """A model of this architecture, with the tokenizer of the built-in one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, fields = CONFIGS[kind]
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(name, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / file, path / file)
    return path


def scaled(model: Path, path: Path) -> Path:
    """The same model, shape and name, with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    weights[embedding] = weights[embedding].flip(0).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
