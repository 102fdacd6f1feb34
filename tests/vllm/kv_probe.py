"""Run by vLLM's own Python: start the engine of a folder's model with dummy weights, and tell what memory it planned.

python kv_probe.py FOLDER [ARGUMENTS as JSON]     one line of JSON on stdout, behind `PLANNED `
"""

from __future__ import annotations

import json
import sys


def main(folder: str, arguments: str = "{}") -> None:
    """Start, tell, end."""
    import torch
    from vllm import LLM

    options = {"max_model_len": 4096, "max_num_batched_tokens": 4096, **json.loads(arguments)}
    llm = LLM(folder, load_format="dummy", enforce_eager=True, skip_tokenizer_init=True, **options)
    engine = llm.llm_engine.engine_core.engine_core
    plan, config = engine.scheduler.kv_cache_config, engine.vllm_config
    told = {
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "blocks": plan.num_blocks,
        "tokens": config.cache_config.kv_cache_size_tokens,
        "concurrency": config.cache_config.kv_cache_max_concurrency,
        "in_flight_tokens": config.max_in_flight_tokens,
        "cache_bytes": max(tensor.size for tensor in plan.kv_cache_tensors),
        "groups": [
            {
                "kind": type(group.kv_cache_spec).__name__,
                "layers": len(group.layer_names),
                "block_tokens": group.kv_cache_spec.block_size,
                "page_bytes": group.kv_cache_spec.page_size_bytes,
            }
            for group in plan.kv_cache_groups
        ],
    }
    sys.stdout.write(f"PLANNED {json.dumps(told)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
