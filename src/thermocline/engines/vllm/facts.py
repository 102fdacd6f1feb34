"""What vLLM says of itself, its configuration and its tensors, as plain values; or why it cannot be served."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thermocline.engines.vllm.layout import Engine, LayerMemory
from thermocline.engines.vllm.weights import digest_of_dummies, digest_of_files
from thermocline.errors import LayoutError
from thermocline.tiers.tier import Piece

LOG = logging.getLogger("thermocline.vllm")

Anything = Any
"""Objects of vLLM's, read by attribute: their types change between its versions."""

_WINDOWS = frozenset({"SlidingWindowSpec", "ChunkedLocalAttentionSpec"})
_KINDS = frozenset({"FullAttentionSpec", "MLAAttentionSpec", *_WINDOWS})
_TOKENS = 16
_DIMENSIONS = 4
_FIELDS = (
    *("block_size", "num_kv_heads", "head_size", "head_size_v", "kv_quant_mode", "sliding_window"),
    *("attention_chunk_size", "cache_dtype_str", "tokens_per_state", "num_head_slots", "model_version"),
)
_NO_PREFIX = "vLLM's prefix caching is off for this model, so thermocline finds and keeps nothing; answers are the same"
_SIZES = ("decode_context_parallel_size", "prefill_context_parallel_size")


def is_of_use(vllm_config: Anything) -> bool:
    """False where vLLM itself does not reuse prefixes: then nothing is loaded, and nothing kept."""
    if vllm_config.cache_config.enable_prefix_caching:
        return True
    LOG.warning(_NO_PREFIX)
    return False


def check(vllm_config: Anything, kv_cache_config: Anything) -> None:
    """Raises LayoutError, with what to do instead, for an engine whose state we could not load exactly."""
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise LayoutError(
            "kv_load_failure_policy is not recompute, so a load that fails would fail its request",
            hint="take the whole --kv-transfer-config from `thermocline vllm-config`",
        )
    if any(getattr(vllm_config.parallel_config, name, 1) > 1 for name in _SIZES):
        raise LayoutError(
            "context parallelism splits a block's tokens over ranks, and cannot be served yet",
            hint="use tensor or pipeline parallelism, or leave out --kv-transfer-config",
        )
    for group in kv_cache_config.kv_cache_groups:
        for spec in specs_of(group):
            _check_kind(type(spec).__name__, spec)
    tokens_per_block(kv_cache_config)


def _check_kind(kind: str, spec: Anything) -> None:
    if kind == "MambaSpec":
        raise LayoutError(
            "this model keeps a recurrent state (Mamba or linear attention), which has no blocks to be loaded",
            hint="serve it without --kv-transfer-config; models of attention alone can be served",
        )
    replayed = getattr(spec, "prefix_replay_tokens", 0)
    if kind not in _KINDS or not getattr(spec, "prefix_cacheable", True) or replayed:
        raise LayoutError(
            f"this model keeps its state as {kind}, which thermocline does not know to load exactly",
            hint="serve it without --kv-transfer-config",
        )


def has_windows(kv_cache_config: Anything) -> bool:
    """True where some layers keep only the last tokens: vLLM gives their older pages to others."""
    return any(type(spec).__name__ in _WINDOWS for group in kv_cache_config.kv_cache_groups for spec in specs_of(group))


def specs_of(group: Anything) -> Sequence[Anything]:
    """The specs of a KV group: one, or one per layer."""
    inner = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return list(inner.values()) if inner else [group.kv_cache_spec]


def tokens_per_block(kv_cache_config: Anything) -> int:
    """Tokens in a block of every KV group. Raises LayoutError where groups differ, or keys do not fit."""
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) != 1 or min(sizes) % _TOKENS:
        raise LayoutError(
            f"the KV groups of this model have blocks of {sorted(sizes)} tokens; one multiple of {_TOKENS} is needed",
            hint="set --block-size to a multiple of 16, or serve it without --kv-transfer-config",
        )
    size: int = sizes.pop()
    return size


def engine_of(vllm_config: Anything, kv_cache_config: Anything, *, version: str, tp_rank: int, pp_rank: int) -> Engine:
    """What is true of this rank. Raises ModelError where the model's files cannot be found."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = Path(model.model).resolve().name if Path(model.model).exists() else model.model
    return Engine(
        model=name,
        weights_digest=_weights(vllm_config),
        dtype=f"{model.dtype} {model.quantization or ''}".strip(),
        kv_dtype=str(vllm_config.cache_config.cache_dtype),
        version=f"{version} torch {torch.__version__}",
        isa=_instruction_set(),
        physical=str(kv_cache_config.kv_cache_layout),
        tp_rank=tp_rank,
        tp_size=parallel.tensor_parallel_size,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline_parallel_size,
    )


def _weights(vllm_config: Anything) -> bytes:
    model, load = vllm_config.model_config, vllm_config.load_config
    told = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    if "long_factor" in told:  # such a model turns its positions by other angles where it is started for longer texts
        told += f" {model.max_model_len}"
    if str(getattr(load.load_format, "value", load.load_format)) == "dummy":
        return digest_of_dummies(model.seed or 0, told)
    return digest_of_files(getattr(model, "model_weights", "") or model.model, model.revision, told)


def _instruction_set() -> str:
    """What kernels are chosen by, on the processor and on the device."""
    level = torch.backends.cpu.get_cpu_capability()
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    units = [unit for unit in ("avx512_bf16", "amx_bf16", "amx_fp16") if known.get(unit)]
    if torch.cuda.is_available():
        units.append(torch.cuda.get_device_name())
    return " ".join([level, *units])


# -- tensors -----------------------------------------------------------------------------------------------------------


class Regions:
    """The allocations behind an engine's tensors: each once, though many layers may share one."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []

    def number(self, tensor: Tensor) -> int:
        """The number of the allocation in which a tensor lies."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._numbers:
            self._numbers[pointer] = len(self.tensors)
            self.tensors.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        return self._numbers[pointer]

    def in_host_memory(self) -> list[Piece]:
        """All allocations as bytes of this process."""
        return [np.asarray(tensor.numpy()) for tensor in self.tensors]


def layer_memory(
    name: str, tensor: Tensor, spec: Anything, module: Anything, regions: Regions, pages: int
) -> LayerMemory:
    """One layer's registered tensor as numbers. Raises LayoutError for a form that is not one of vLLM 0.32's."""
    if tensor.dim() != _DIMENSIONS or tensor.shape[0] % pages:
        raise LayoutError(
            f"the pages of {name} have the shape {tuple(tensor.shape)}; [pages, heads, tokens, content] was expected",
            hint="run vLLM 0.32",
        )
    per_page, stride = tensor.shape[0] // pages, tensor.stride(0)
    size = tensor.element_size()
    return LayerMemory(
        name,
        regions.number(tensor),
        int(tensor.storage_offset()) * size,
        (pages, per_page, *map(int, tensor.shape[1:])),
        (stride * per_page * size, *(each * size for each in tensor.stride())),
        size,
        f"{_kind(spec)} {tensor.dtype} {_kernels(module)}",
    )


def _kind(spec: Anything) -> str:
    """A spec's name and every field that a page's meaning may depend on."""
    fields = [f"{name}={getattr(spec, name)}" for name in _FIELDS if getattr(spec, name, None) is not None]
    return " ".join((type(spec).__name__, *fields))


def _kernels(module: Anything) -> str:
    """Who writes a layer's pages, and for which instruction set it packs them."""
    found = getattr(module, "get_attn_backend", None)
    name = found().get_name() if found else ""
    impl = type(getattr(module, "impl", None)).__name__
    return f"{name} {impl} {getattr(module, 'isa', '')}".strip()


def layers_of(vllm_config: Anything) -> Mapping[str, Anything]:
    """The attention modules by layer name."""
    found: Mapping[str, Anything] = vllm_config.compilation_config.static_forward_context
    return found
