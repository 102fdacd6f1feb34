"""What users of a loaded server see: the laws of it, and that measured constants stay where they were measured."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.hardware import accelerator
from thermocline.costs.models import find
from thermocline.costs.roofline import Setup
from thermocline.costs.served import BEYOND, Load, corrected, loaded, measurements, served, terms
from thermocline.errors import SettingsError

LLAMA = find("Meta-Llama-3.1-70B")

H200 = Setup(LLAMA, accelerator("H200"), tp=4, weights_dtype="fp8", kv_dtype="fp8")
FORMULAS = msgspec.structs.replace(measurements(), calibrations={})


@given(st.integers(1, 512), st.integers(16, 32_768), st.integers(1, 8192))
def test_more_users_wait_longer(users, prompt, output):
    """By the formulas more users, longer prompts and less room never make a first token come sooner."""
    first = served(H200, "vllm", Load(users, prompt, output), FORMULAS)
    more = served(H200, "vllm", Load(users + 8, prompt, output), FORMULAS)
    tight = served(H200, "vllm", Load(users, prompt, output, room=users / 2), FORMULAS)
    assert first.first_token.seconds <= more.first_token.seconds
    assert first.between_tokens.seconds <= more.between_tokens.seconds
    assert users < 3 or first.first_token.seconds < tight.first_token.seconds


@given(st.integers(1, 512), st.integers(16, 32_768), st.integers(1, 8192))
def test_parts_add_up(users, prompt, output):
    """Each time is the sum of its parts, the correction by measured rows included."""
    found = served(H200, "vllm", Load(users, prompt, output, room=100.0))
    for each in (found.first_token, found.between_tokens):
        assert each.seconds > 0
        assert math.isclose(each.seconds, math.fsum(part.seconds for part in each.parts), rel_tol=1e-9)


def test_how_far_it_was_measured_is_said():
    """Known with this model here, with others here, or not at all: the answer says which."""
    load = Load(16, 1024, 1024)
    assert served(H200, "vllm", load).known == "model"
    assert served(replace(H200, geometry=find("Qwen3-8B")), "vllm", load).known == "machine"
    far = served(replace(H200, accelerator=accelerator("A10"), weights_dtype="bf16"), "vllm", load)
    assert far.known == "formulas"
    assert any("assumed" in each for each in far.first_token.assumptions)


def test_an_instance_under_load():
    """Answers' tokens a second are what the users get together; an engine that nobody measured is refused by name."""
    load = Load(16, 1024, 512, room=8.0)
    found, seen = loaded(H200, "vllm", load), served(H200, "vllm", load)
    first, between = seen.first_token.seconds, seen.between_tokens.seconds
    assert (found.first_token_seconds, found.between_tokens_seconds, found.known) == (first, between, seen.known)
    assert found.tokens_per_second * (first + 512 * between) == pytest.approx(16 * 512)
    assert math.fsum(found.parts.values()) == pytest.approx(first)
    assert found.running == 8
    assert loaded(H200, "vllm", Load(1, 15_001, 512)).known == BEYOND
    with pytest.raises(SettingsError) as refused:
        loaded(H200, "another", load)
    assert "vllm" in refused.value.hint


@given(
    st.integers(1, 1 << 20),
    st.integers(16, 1 << 20),
    st.integers(1, 1 << 20),
    st.sampled_from(list(measurements().calibrations)),
)
def test_a_calibration_stays_within_what_was_measured(users, prompt, output, name):
    """However far a question lies outside, the correction is one that was seen at the border of the measured rows."""
    found = measurements().calibrations[name]
    at = terms(H200, Load(users, prompt, output))
    widest = [
        max(abs(weight * low), abs(weight * high))
        for weight, low, high in zip(found.first, found.low, found.high, strict=True)
    ]
    assert abs(math.log(corrected(found, found.first, at))) <= sum(widest) + 1e-9


def test_constants_can_be_true():
    """No share of a peak is above its peak, and every machine rests on rows that were measured."""
    table = measurements()
    for machine in table.machines.values():
        assert 0 < machine.mfu < 1
        assert 0 < machine.mbu < 1
        assert machine.rows > 0
    assert "outside of the sample" in table.source


@pytest.mark.parametrize(("users", "first", "between"), [(4, 0.069, 0.0063), (32, 0.143, 0.0093), (128, 0.324, 0.0216)])
def test_near_three_measured_rows(users, first, between):
    """Llama-3.1-70B in fp8 on 8 x H200 with TensorRT-LLM, 1,024 tokens in and out: within a factor of measured rows."""
    found = served(replace(H200, tp=8), "trtllm", Load(users, 1024, 1024))
    assert first / 2.5 < found.first_token.seconds < 2.5 * first
    assert found.between_tokens.seconds == pytest.approx(between, rel=0.25)
