"""A model, its tokenizer and the layout of its blocks: loaded, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from thermocline.blocks.layout import Layout
from thermocline.engines import attention, tiny
from thermocline.engines.kv import ORDER, Kv, refused_layers
from thermocline.errors import ModelError

PROBE_TOKENS = 12
PROBE_TOLERANCE = 0.1
"""Of the logits' spread. bfloat16 makes hundredths of noise; another kind of attention is off by half or more."""

CONTEXT_TOKENS_MAX = 1 << 20
"""Where a model names no limit."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
_NOT_IN_FINGERPRINT = {"_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype"}

Progress = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be served. `module` and `tokenizer` are transformers' own objects."""

    name: str
    module: PreTrainedModel
    tokenizer: Any
    layout: Layout
    context_tokens: int
    end_tokens: frozenset[int]

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self.module.config.get_text_config(decoder=True).vocab_size)

    def new_kv(self, tokens: int) -> Kv:
        """Memory for a text of that many tokens."""
        return Kv(self.layout, self.module.dtype, tokens)

    def forward(self, ids: Tensor, kv: Kv) -> Tensor:
        """Compute tokens [n] behind what `kv` holds, and append them. Returns the logits [vocabulary] after the last.

        Computes whole tiles (see `attention`): the padding behind the text is overwritten by the next call, and no
        token of the text sees it.
        """
        tokens = len(ids)
        padding = min(-tokens % attention.TILE_TOKENS, self.context_tokens - kv.length - tokens)
        if padding:
            ids = torch.cat((ids, ids[-1:].expand(padding)))
        output = self.module(
            input_ids=ids[None],
            past_key_values=kv.cache,
            use_cache=True,
            logits_to_keep=min(len(ids), attention.TILE_TOKENS),
        )
        kv.grow(tokens)
        logits: Tensor = output.logits[0, -1 - padding]
        return logits


def load_model(
    name: str, *, tokens_per_block: int = 32, threads: int = 0, progress: Progress = lambda _: None
) -> Model:
    """Load a model by folder, hub name, or the name of the built-in one, onto the CPU.

    Only safetensors weights are read and no code that comes with a model is run. Raises ModelError for a model that
    is not there, is not a decoder, or keeps something else than plain keys and values per token.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers types some of its functions only
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # as above
    if threads:
        torch.set_num_threads(threads)
    source = name
    if name == tiny.NAME:
        doing = "is in" if tiny.folder().is_dir() else "is being made in"
        progress(f"the built-in model (its text is gibberish) {doing} {tiny.folder()}")
        source = str(tiny.ensure())
    progress(f"loading {name}")
    config = _read(AutoConfig.from_pretrained, source, name)
    _refuse_others(config, name)
    module = _weighted(source, name, config)
    module.eval()  # type: ignore[no-untyped-call]  # as above
    tokenizer = _read(AutoTokenizer.from_pretrained, source, name)
    name = Path(name).resolve().name if Path(name).is_dir() else name
    with torch.inference_mode():
        model = _probed(name, module, tokenizer, tokens_per_block)
    progress(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:,.0f} million weights, {module.dtype}")
    return model


def _read(load: Callable[..., Any], source: str, name: str, **options: object) -> Any:  # noqa: ANN401  # transformers' factories
    """One of transformers' factories. What it raises for a missing or odd model has no common base class."""
    try:
        return load(source, trust_remote_code=False, **options)
    except (*_LOAD_ERRORS, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        msg = f"cannot load the model {name}: {first_line}"
        hint = "name a folder with config.json, tokenizer and *.safetensors, or a hub model that was downloaded before"
        if not Path(source).exists():
            hint += f'; "{tiny.NAME}" needs neither'
        raise ModelError(msg, hint=hint) from None


def _weighted(source: str, name: str, config: Any) -> PreTrainedModel:  # noqa: ANN401  # any of transformers' configurations
    """The module with every weight from the files. Transformers would fill in random numbers for missing ones."""
    options = {"config": config, "dtype": "auto", "use_safetensors": True, "output_loading_info": True}
    module, found = _read(AutoModelForCausalLM.from_pretrained, source, name, **options)
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        msg = f"the files of {name} lack {len(missing)} weights, {missing[0]} among them"
        raise ModelError(
            msg, hint="fetch the model again; it is not complete, or not of the kind its configuration says"
        )
    loaded: PreTrainedModel = module
    return loaded


def _refuse_others(config: Any, name: str) -> None:  # noqa: ANN401  # any of transformers' configurations
    hint = (
        "serve a decoder with full attention in every layer (Llama, Qwen2, Qwen3, Mistral without window, GPT-2, ...)"
    )
    if config.is_encoder_decoder:
        msg = f"{name} has an encoder, and what it computes for a prompt is no sequence of blocks"
        raise ModelError(msg, hint=hint)
    found = refused_layers(DynamicCache(config=config))
    if found:
        msg = f"{name} keeps its state in {', '.join(found)}; only plain keys and values per token can be stored so far"
        raise ModelError(msg, hint=hint)


def _probed(name: str, module: PreTrainedModel, tokenizer: Any, tokens_per_block: int) -> Model:  # noqa: ANN401  # untyped
    """Compute a few tokens both ways, transformers' and ours. Ours must agree, with steady attention if that can be."""
    config = module.config.get_text_config(decoder=True)
    ids = torch.arange(PROBE_TOKENS) * 7919 % config.vocab_size
    cache = DynamicCache(config=config)
    expected = module(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0, -1].float()
    own = module.config._attn_implementation  # noqa: SLF001  # the name has no public reader
    for implementation in (attention.NAME, own):
        model = _described(name, module, tokenizer, cache, tokens_per_block, steady=implementation == attention.NAME)
        if not _set_attention(module, implementation):
            continue
        kv = model.new_kv(PROBE_TOKENS)
        try:
            model.forward(ids[:7], kv)
            found = model.forward(ids[7:], kv).float()
        except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError):
            continue  # this variant of attention is not plain enough; the comparison below would say the same
        if float((found - expected).norm()) <= PROBE_TOLERANCE * float((expected - expected.mean()).norm()):
            return model
    msg = f"{name} computes something else from a cache than from the whole text"
    raise ModelError(msg, hint="report the model's name and your version of transformers; another model will do")


def _set_attention(module: PreTrainedModel, implementation: str) -> bool:
    module.set_attn_implementation(implementation)
    return bool(module.config._attn_implementation == implementation)  # noqa: SLF001  # as above


def _described(
    name: str,
    module: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401  # untyped
    cache: DynamicCache,
    tokens_per_block: int,
    *,
    steady: bool,
) -> Model:
    shapes = {tuple(states.shape) for keys, values, _ in cache for states in (keys, values)}
    if len(shapes) != 1:
        msg = f"{name} has layers, or keys and values, of different shapes"
        raise ModelError(msg, hint="serve a model whose layers are alike")
    _, kv_heads, _, head_dim = shapes.pop()
    config = module.config.get_text_config(decoder=True)
    dtype = module.dtype
    layout = Layout(
        model=name,
        weights_digest=weights_digest(module),
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=str(dtype).removeprefix("torch."),
        layers=len(cache.layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens_per_block=tokens_per_block,
        block_bytes=len(cache.layers) * 2 * kv_heads * tokens_per_block * head_dim * dtype.itemsize,
        engine="transformers",
        engine_version=_engine_version(steady=steady),
        isa=_instruction_set(),
        order=ORDER,
    )
    context: float = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return Model(name, module, tokenizer, layout, int(min(context, CONTEXT_TOKENS_MAX)), _end_tokens(module, tokenizer))


def _engine_version(*, steady: bool) -> str:
    numbers = ".".join(transformers.__version__.split(".")[:2])
    return f"{numbers} torch {torch.__version__} {f'steady {attention.VERSION}' if steady else 'own attention'}"


def _instruction_set() -> str:
    """What the matrix library will choose its code by: other vector units differ in their last bits."""
    level = torch.backends.cpu.get_cpu_capability()
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return " ".join([level, *(unit for unit in ("avx512_bf16", "amx_bf16", "amx_fp16") if known.get(unit))])


def weights_digest(module: PreTrainedModel, *, with_config: bool = True) -> bytes:
    """16 bytes over every weight (name, type, shape, bytes) and over the configuration that says how they are used."""
    digest = xxhash.xxh3_128()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
    if with_config:
        config = {key: value for key, value in module.config.to_dict().items() if key not in _NOT_IN_FINGERPRINT}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.digest()


def _end_tokens(module: PreTrainedModel, tokenizer: Any) -> frozenset[int]:  # noqa: ANN401  # untyped
    """Tokens that end an answer: a model may have several, and its generation settings know best."""
    settings = getattr(module, "generation_config", None)
    found = [
        getattr(settings, "eos_token_id", None),
        module.config.eos_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ]
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return frozenset(token for token in flat if isinstance(token, int))
