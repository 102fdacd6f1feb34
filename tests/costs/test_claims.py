"""Figures that playbooks claim about bytes, and what the formulas say: each row of them once.

The rows about time and money are in test_claims_times.py; all are listed in docs/claims.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thermocline.costs.memory import Taken, capacity, sequence_bytes, token_bytes, weights_bytes
from thermocline.costs.models import find

GB = 1e9
GIB = 1 << 30
QWEN = "Qwen/Qwen2.5-32B-Instruct"
LLAMA8, LLAMA70 = "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B"


@pytest.mark.parametrize(
    ("tokens", "claimed_gb", "right_gb", "percent"),
    [(2048, 1.34, 0.537, 0.8), (8192, 5.37, 2.147, 3.3), (32_768, 21.5, 8.59, 13.1), (131_072, 85.9, 34.36, 52.4)],
)
def test_1_kv_of_qwen_32b(tokens, claimed_gb, right_gb, percent):
    """Row 1: its KV is 0.54 to 34 GB; the quoted table counts the 40 heads that ask, and one of K and V."""
    qwen = find(QWEN)
    assert sequence_bytes(qwen, tokens) / GB == pytest.approx(right_gb, rel=1e-3)
    assert 100 * sequence_bytes(qwen, tokens) / weights_bytes(qwen) == pytest.approx(percent, abs=0.1)
    wrong = qwen.layers * qwen.query_heads * qwen.query_head_dim * 2
    assert wrong == 655_360
    assert wrong * tokens / GB == pytest.approx(claimed_gb, rel=1e-2)


def test_1_when_kv_exceeds_the_model():
    """Row 1: KV is larger than the weights only above 250k tokens, not at 131k."""
    qwen = find(QWEN)
    assert token_bytes(qwen) == 262_144
    assert 249_900 < weights_bytes(qwen) / token_bytes(qwen) < 250_100


@pytest.mark.parametrize(
    ("left_bytes", "sequences"),
    [(11 * GB, (20, 5, 1)), (80 * GIB * 0.95 - 65.53e9, (29, 7, 1)), (80e9 * 0.95 - 65.53e9, (19, 4, 1))],
)
def test_2_sequences_that_fit(left_bytes, sequences):
    """Row 2: 11 GB hold 20, 5 and 1 sequences, not 8, 2 and 0; and "80 GB" are 80 GiB, which is a third more."""
    qwen = find(QWEN)
    assert tuple(int(left_bytes // sequence_bytes(qwen, tokens)) for tokens in (2048, 8192, 32_768)) == sequences


def test_2_with_what_else_takes_room():
    """Row 2: weights only, 29 sequences of 2k fit as the engine counts; with 4 to 6 GB for the rest a third less."""
    bare = capacity(find(QWEN), 80 * GIB, taken=Taken(0.95, 0, 0, 0)).sessions(2048)
    assert bare.steady == int(bare.admitted) == 29
    for other, expected in ((4e9, 22), (6e9, 18)):
        held = capacity(find(QWEN), 80 * GIB, taken=Taken(0.95, 0, 0, int(other))).sessions(2048)
        assert held.steady == expected
    seeds = capacity(find(QWEN), 80 * GIB, taken=Taken(utilisation=0.95))
    assert 4e9 < seeds.activation_bytes + seeds.communication_bytes + seeds.other_bytes < 6e9


def test_5_one_size_of_the_weights():
    """Row 5: neither 64 nor 65 GB: 32.76 billion parameters in bf16 are 65.53 GB."""
    assert weights_bytes(find(QWEN)) / GB == pytest.approx(65.53, abs=0.005)


@pytest.mark.parametrize(
    ("name", "gb"),
    [
        ("meta-llama/Llama-2-7b-hf", 4.29),
        (LLAMA8, 1.07),
        ("mistralai/Mistral-7B-v0.3", 1.07),
        ("Qwen/Qwen2.5-7B-Instruct", 0.47),
    ],
)
def test_6_a_7b_at_8k(name, gb):
    """Row 6: 4 GB at 8k tokens is a model of 2023 without shared heads; others of its size take 0.5 to 1.1 GB."""
    assert sequence_bytes(find(name), 8192) / GB == pytest.approx(gb, abs=0.005)


def test_6_ten_times_the_model():
    """Row 6: KV of 10 times the model needs more than 250k tokens, even without shared heads."""
    thirteen = find("codellama/CodeLlama-13b")
    assert 10 * weights_bytes(thirteen) / token_bytes(thirteen) > 250_000
    seven = find("meta-llama/Llama-2-7b-hf")
    assert 10 * 7e9 * 2 / token_bytes(seven) == pytest.approx(267_000, rel=1e-3)


def test_7_context():
    """Row 7: Qwen2.5-32B has a context of 32,768 tokens of its own; 131k are an extension."""
    assert find(QWEN).context_tokens == 32_768


def test_13_kv_of_a_conversation():
    """Row 13: 8 MB are 61 tokens of an 8B model; a history of 2,000 tokens is 262 MB."""
    llama = find(LLAMA8)
    assert 8e6 // token_bytes(llama) == 61
    assert sequence_bytes(llama, 2000) / 1e6 == pytest.approx(262, abs=0.5)


def test_27_the_full_context():
    """Row 27: 150 GB in 32 layers are 1.14 million tokens of an 8B model, not "the full context"."""
    llama = find(LLAMA8)
    assert llama.layers == 32
    assert 150 * GB / token_bytes(llama) == pytest.approx(1.14e6, rel=5e-3)


@pytest.mark.parametrize(("name", "prefixes"), [(LLAMA8, 93), (LLAMA70, 37)])
def test_28_what_50_gb_of_redis_hold(name, prefixes):
    """Row 28: 50 GB hold 93 prefixes of 4k tokens of an 8B model, and 37 of a 70B one."""
    assert int(50 * GB // sequence_bytes(find(name), 4096)) == prefixes


def test_28_a_lookup_is_not_a_load():
    """Row 28: 1 to 5 ms finds the keys of a 4k prefix; its 0.54 GB take 172 ms over 25 Gbit/s."""
    size = sequence_bytes(find(LLAMA8), 4096)
    assert size / GB == pytest.approx(0.54, abs=0.005)
    assert 1e3 * size / (25e9 / 8) == pytest.approx(172, abs=0.5)


def test_the_one_that_holds():
    """A prompt below 1 MB of text becomes gigabytes: 100k tokens are 13 GB of an 8B model and 33 GB of a 70B one."""
    assert sequence_bytes(find(LLAMA8), 100_000) / GB == pytest.approx(13.1, abs=0.05)
    assert sequence_bytes(find(LLAMA70), 100_000) / GB == pytest.approx(32.8, abs=0.05)


def test_listed():
    """Every row of the thirty is listed in docs/claims.md, and each that is marked B has a test here."""
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| ([BT-]) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    tested = set(re.findall(r'"""Row (\d+):', Path(__file__).read_text()))
    assert tested == {number for number, where in rows if where == "B"}
