"""Bytes of tokens, sequences and ranks, what an accelerator has room for, and how vLLM pages it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.geometry import Attention, Geometry, State, geometry_of
from thermocline.costs.hardware import accelerator
from thermocline.costs.memory import Taken, capacity, sequence_bytes, state_bytes, token_bytes, weights_bytes
from thermocline.costs.models import find, table
from thermocline.costs.pages import VLLM, VLLM_CPU, layer_token_bytes, paging, pattern, stages, vllm_on
from thermocline.errors import ModelError, SettingsError

GIB = 1 << 30
NOTHING = Taken(0.95, 0, 0, 0)
NAMES = sorted(name for name, row in table().items() if row["kind"] != "compressed")


def model(*attention, state=None, letters="", **fields):
    layers = sum(each.layers for each in attention) + (state.layers if state else 0)
    same = dict.fromkeys(("parameters_total", "parameters_active", "weights_bytes", "context_tokens"))
    values = {"model_type": "llama", "hidden_size": 256, "query_heads": 4, "query_head_dim": 64, **same, **fields}
    return Geometry(
        name="m",
        layers=layers,
        attention=attention,
        state=state,
        kv_dtype="bf16",
        source="a test",
        pattern=letters,
        **values,
    )


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_dtype", "expected"),
    [
        ("meta-llama/Meta-Llama-3.1-8B", "bf16", 131_072),
        ("meta-llama/Meta-Llama-3.1-8B", "fp8", 65_536),
        ("meta-llama/Meta-Llama-3.1-8B", "int8", 65_536),
        ("meta-llama/Meta-Llama-3.1-8B", "fp32", 262_144),
        ("deepseek-ai/DeepSeek-V3", "fp8", 35_136),
        ("deepseek-ai/DeepSeek-V3.2", "bf16", 78_324),
        ("deepseek-ai/DeepSeek-V3.2", "fp8", 35_136 + 61 * 132),
        ("XiaomiMiMo/MiMo-V2-Flash", "bf16", 9 * 4 * (192 + 128) * 2),
        ("openai/gpt-oss-120b", "bf16", 36_864),
    ],
)
def test_bytes_of_a_token(name, kv_dtype, expected):
    """A token takes what the formula of its kind says; an indexer's own format stays as it is."""
    assert token_bytes(find(name), kv_dtype) == expected


def test_windows_stop_growing():
    """A sequence grows by all its layers up to the window, and by the others beyond it."""
    gemma = find("google/gemma-3-27b-it")
    assert sequence_bytes(gemma, 1024) == 1024 * 507_904
    assert sequence_bytes(gemma, 1025) - sequence_bytes(gemma, 1024) == 81_920
    scout = find("meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert sequence_bytes(scout, 8192) == 8192 * 196_608


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("Qwen/Qwen3.5-27B", 2349),
        ("Qwen/Qwen3-Next-80B-A3B", 3144),
        ("moonshotai/Kimi-K3", 15_701),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 7989),
        ("nvidia/Nemotron-H-56B-Base-8K", 22_280),
    ],
)
def test_a_state_in_tokens(name, tokens):
    """A state is there from the first token on, and equals thousands of tokens of the model's own KV."""
    found = find(name)
    assert round(state_bytes(found) / token_bytes(found)) == tokens
    assert sequence_bytes(found, 1) == state_bytes(found) + token_bytes(found)


@pytest.mark.parametrize(
    ("name", "tp", "per_rank"),
    [
        ("Qwen/Qwen3-235B-A22B", 1, 192_512),
        ("Qwen/Qwen3-235B-A22B", 4, 48_128),
        ("Qwen/Qwen3-235B-A22B", 8, 48_128),
        ("meta-llama/Meta-Llama-3.1-70B", 8, 40_960),
        ("microsoft/phi-4", 4, 3 * 256 * 2 * 40),
        ("deepseek-ai/DeepSeek-V3", 8, 70_272),
        ("google/gemma-4-26B-A4B", 4, 5 * 1024 * 2 + 25 * 2 * 512 * 2),
    ],
)
def test_tensor_parallel(name, tp, per_rank):
    """Heads are split, rounded up, and repeated where there are fewer than ranks; a latent vector is on every rank."""
    assert sequence_bytes(find(name), 1, tp=tp) == per_rank


def test_unknown_data_type():
    """An unknown data type is refused, with those that are known."""
    with pytest.raises(SettingsError, match="int2") as refused:
        token_bytes(find("Qwen/Qwen3-8B"), "int2")
    assert "fp8" in refused.value.hint


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pp", "counts"),
    [
        (32, 4, [8, 8, 8, 8]),
        (61, 4, [15, 15, 16, 15]),
        (62, 4, [15, 16, 16, 15]),
        (63, 4, [16, 16, 16, 15]),
        (3, 2, [2, 1]),
    ],
)
def test_stages(layers, pp, counts):
    """Layers that are left over go to the stages before the last, as vLLM deals them out."""
    assert [len(each) for each in stages(model(Attention(layers, 1, 64, 64)), pp)] == counts


@given(st.integers(1, 200), st.integers(1, 16))
def test_stages_are_a_partition(layers, pp):
    """Every layer is in one stage, no two stages differ by more than one, and more stages than layers are refused."""
    geometry = model(Attention(layers, 1, 64, 64))
    if pp > layers:
        with pytest.raises(SettingsError):
            stages(geometry, pp)
        return
    dealt = stages(geometry, pp)
    assert [at for each in dealt for at in each] == list(range(layers))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_stage_keeps_its_own_layers():
    """The fullest stage counts: where the layers that keep all are together, it holds all of them."""
    kinds = Attention(4, 1, 64, 64), Attention(4, 1, 64, 64, window_tokens=100)
    together, apart = model(*kinds, letters="ffffwwww"), model(*kinds, letters="fwfwfwfw")
    assert sequence_bytes(together, 1000, pp=2) == 4 * 256 * 1000
    assert sequence_bytes(apart, 1000, pp=2) == 2 * 256 * 1100
    assert sequence_bytes(model(*kinds), 1000, pp=2) == 2 * 256 * 1100
    assert sequence_bytes(find("deepseek-ai/DeepSeek-V3"), 1, pp=4) == 16 * 1152


@pytest.mark.parametrize("name", NAMES)
def test_spread_patterns(name):
    """Where only counts are known, the pattern has just as many layers of each kind."""
    found = find(name)
    letters = pattern(found)
    assert len(letters) == found.layers
    assert letters.count("w") == sum(each.layers for each in found.attention if each.window_tokens is not None)
    assert letters.count("s") == (found.state.layers if found.state else 0)


@given(st.sampled_from(NAMES), st.integers(1, 100_000), st.integers(1, 16), st.integers(1, 4))
def test_laws_of_sequences(name, tokens, tp, pp):
    """More tokens never take less, ranks together never less than one alone, and a stage never more than all."""
    found = find(name)
    here = sequence_bytes(found, tokens, tp=tp, pp=pp)
    assert here <= sequence_bytes(found, tokens + 1, tp=tp, pp=pp)
    assert here <= sequence_bytes(found, tokens, tp=tp)
    assert here * tp * pp >= sequence_bytes(found, tokens)


# -- what fits ---------------------------------------------------------------------------------------------------------


def test_parts_add_up():
    """Every byte of the accelerator is in one part, and each seed is named with its source."""
    room = capacity(find("Qwen/Qwen2.5-32B-Instruct"), 80 * GIB, tp=2)
    parts = room.weights_bytes + room.activation_bytes + room.communication_bytes + room.other_bytes + room.kv_bytes
    assert parts == int(80 * GIB * 0.92)
    assert room.weights_bytes == 32_763_876_352
    assert len(room.assumed) == 4
    assert room.blocks == room.kv_bytes // room.paging.block_bytes
    given = capacity(find("Qwen/Qwen2.5-32B-Instruct"), 80 * GIB, taken=NOTHING)
    assert (given.assumed, given.kv_bytes) == ((), int(80 * GIB * 0.95) - 65_527_752_704)


def test_does_not_fit():
    """A model that is too large leaves less than nothing, says by how much, and holds no session."""
    room = capacity(find("meta-llama/Meta-Llama-3.1-70B"), 80 * GIB)
    assert (room.fits, room.blocks, room.kv_bytes < -50 * GIB) == (False, 0, True)
    assert (room.sessions(4096).admitted, room.sessions(4096).steady) == (0, 0)


def test_as_the_log_says_it():
    """Tokens and concurrency of an engine are those of its own log, here of a Gemma 3 on a CPU with one GiB."""
    gemma = model(Attention(1, 2, 64, 64), Attention(5, 2, 64, 64, window_tokens=512), letters="wwwwwf")
    engine = replace(VLLM_CPU, batched_tokens=4096)
    room = capacity(gemma, GIB, weights=0, taken=Taken(1.0, 0, 0, 0), engine=engine)
    assert (room.blocks, room.tokens(4096)) == (16_384, 340_654)
    assert round(room.sessions(4096).admitted, 2) == 83.17
    assert room.sessions(4096).steady == 16_384 // (32 + 5 * 5) == 287


def test_blocks_are_rounded_down():
    """What does not fill a block is not given away: 14,563 blocks of 16 tokens, where 233,016 tokens would fit."""
    latent = model(Attention(4, 0, 0, 0, latent_elements=576))
    room = capacity(latent, GIB, weights=0, taken=Taken(1.0, 0, 0, 0), engine=VLLM_CPU)
    assert GIB // token_bytes(latent) == 233_016
    assert (room.blocks, room.blocks * room.paging.block_tokens) == (14_563, 233_008)


def test_a_block_grows_to_hold_a_state():
    """Beside states of 68.6 KB blocks have 256 tokens instead of 128, and a state takes a page of 131,072 bytes."""
    hybrid = model(Attention(1, 2, 64, 64), state=State(3, 16_384, 1536), letters="sssf", model_type="qwen3_next")
    plan = paging(hybrid, VLLM_CPU)
    assert {(each.block_tokens, each.page_bytes) for each in plan.groups} == {(256, 131_072)}
    assert plan.worst_pages(4096) == 16 + 3 * 2
    assert paging(hybrid, replace(VLLM_CPU, prefix_caching=False)).worst_pages(4096) == 16 + 3


@pytest.mark.parametrize(
    ("name", "gb"), [("deepseek-ai/DeepSeek-V3", 671.0), ("openai/gpt-oss-120b", 65.7), ("Qwen/Qwen3-8B", 16.4)]
)
def test_weights_as_published(name, gb):
    """A model that is published with 8 or 4 bits takes these, not 16: DeepSeek-V3 671 GB, gpt-oss-120b 65.7."""
    assert weights_bytes(find(name)) / 1e9 == pytest.approx(gb, abs=0.05)


def test_weights_without_files():
    """Without files, weights are parameters times the width of their type; unknown parameters are no guess."""
    qwen = find("Qwen/Qwen3-8B")
    assert (weights_bytes(qwen), weights_bytes(qwen, "fp8"), weights_bytes(qwen, "fp4")) == (
        16_380_854_272,
        8_190_427_136,
        4_607_115_264,
    )
    with pytest.raises(ModelError, match="how many parameters") as refused:
        weights_bytes(find("moonshotai/Kimi-K3"))
    assert refused.value.hint
    with pytest.raises(SettingsError, match="fp3"):
        weights_bytes(qwen, "fp3")


@given(
    st.sampled_from(NAMES),
    st.integers(1, 40_000),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["bf16", "fp8"]),
    st.booleans(),
)
def test_laws_of_paging(name, tokens, tp, kv_dtype, gpu):
    """Pages are of one size, hold what their layers keep, and an admission is never less than what is held."""
    found = find(name)
    plan = paging(found, VLLM if gpu else VLLM_CPU, kv_dtype, tp=tp)
    assert len(plan.groups) == 1 or len({each.page_bytes for each in plan.groups}) == 1
    assert plan.worst_pages(tokens) >= plan.steady_pages(tokens)
    assert sorted(at for each in plan.groups for at in each.layers) == [
        at for at, kind in enumerate(pattern(found)) if kind != "-"
    ]
    for each in plan.groups:
        if each.kind == "f":
            kept = max(layer_token_bytes(a, kv_dtype, tp) for a in found.attention if a.window_tokens is None)
            assert each.page_bytes >= each.block_tokens * kept
    assert plan.steady_pages(tokens) * plan.block_bytes >= sequence_bytes(found, tokens, kv_dtype, tp=tp) - state_bytes(
        found, tp
    )


def test_stages_share_the_number_of_blocks():
    """With stages of different layers the fullest one decides how many blocks there are."""
    kinds = Attention(4, 1, 64, 64), Attention(4, 1, 64, 64, window_tokens=512)
    one = paging(model(*kinds, letters="ffffwwww"), VLLM_CPU)
    two = paging(model(*kinds, letters="fwfwfwfw"), VLLM_CPU, pp=2)
    together = paging(model(*kinds, letters="ffffwwww"), VLLM_CPU, pp=2)
    assert (one.block_bytes, two.block_bytes, together.block_bytes) == (4 * 32_768, 2 * 32_768, 4 * 32_768)


def test_read_and_shared():
    """What is read from a configuration pages as the same row of the table does."""
    fields = {"hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8}
    own = geometry_of({"model_type": "gpt_oss", "sliding_window": 128, "head_dim": 64, **fields}, "mine")
    row = find("openai/gpt-oss-120b")
    assert paging(own).block_bytes == paging(row).block_bytes
    assert paging(own).worst_pages(8192) == paging(row).worst_pages(8192)


@pytest.mark.parametrize(
    ("gpu", "tokens"), [("a100-80", 2048), ("l40s", 2048), ("h100", 8192), ("h200", 8192), ("b200", 16_384)]
)
def test_steps_by_gpu(gpu, tokens):
    """Steps are as large as vLLM 0.32 makes them on that GPU, and with them what activations take."""
    device = accelerator(gpu)
    assert vllm_on(device.memory_bytes, device.name).batched_tokens == tokens
