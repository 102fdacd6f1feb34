"""Accelerators and links of the table: figures as devices report them, with where they come from."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.hardware import (
    TABLE,
    Accelerator,
    accelerator,
    accelerators,
    element_bytes,
)
from thermocline.errors import SettingsError

GIB = 1 << 30


@pytest.mark.parametrize("name", list(json.loads(TABLE.read_text())["accelerators"]))
def test_every_accelerator_says_where_its_figures_are_from(name):
    """Each entry of the table has a source and its evidence, and figures that can be true."""
    found = accelerators()[name]
    assert found.source
    assert found.evidence in {"config_read", "unverified"}
    assert 16 * GIB < found.memory_bytes < 512 * GIB
    assert 1e11 < found.memory_bytes_per_second < 1e13
    assert 1e13 < found.flops_for("bf16") <= found.flops_for("fp8") < 1e16
    assert found.price is None or (found.price.low <= found.price.typical <= found.price.high and found.price.date)


def test_memory_is_what_the_device_reports():
    """An "80 GB" accelerator has 80 GiB."""
    assert accelerator("A100-80-SXM").memory_bytes == 80 * GIB
    assert accelerator("H100-SXM").memory_bytes == 80 * GIB
    assert accelerator("H200-SXM").memory_bytes == 141 * GIB


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("h100", "H100-SXM"),
        ("H100_PCIe", "H100-PCIe"),
        ("nvidia h200", "H200-SXM"),
        ("a100", "A100-80-SXM"),
        ("a100-40", "A100-40-SXM"),
        ("L4", "L4"),
        ("mi300x", "MI300X"),
    ],
)
def test_names_as_people_write_them(said, meant):
    """Case, dashes, a vendor and a missing variant do not matter; the usual variant is meant."""
    assert accelerator(said).name == meant


def test_an_unknown_accelerator_is_an_error_that_names_near_ones():
    """What is not in the table is refused, never guessed."""
    with pytest.raises(SettingsError) as raised:
        accelerator("H1000")
    assert "H100-SXM" in raised.value.hint


def test_the_ridge_is_compute_over_bandwidth():
    """An A100 does 153 operations in the time of a byte."""
    assert round(accelerator("A100-80-SXM").ridge_flops_per_byte) == 153


def test_what_has_no_units_is_computed_in_bf16():
    """An A100 has no fp8 units: such weights are read at half the bytes, and computed at the rate of bf16."""
    a100, h100 = accelerator("A100-80-SXM"), accelerator("H100-SXM")
    assert a100.flops_for("fp8") == a100.flops_for("bf16")
    assert h100.flops_for("int4") == h100.flops_for("bf16")
    assert element_bytes("fp8") == 1.0


def test_a_device_of_ones_own():
    """Everything can be given; what was not is refused where it is needed."""
    own = Accelerator("mine", 24 * GIB, 1e12)
    assert own.evidence == "given"
    with pytest.raises(SettingsError):
        own.flops_for("bf16")


@given(st.text(max_size=12))
def test_any_name_is_found_or_refused(name):
    """Whatever is asked, the answer is an entry of the table or a SettingsError."""
    with contextlib.suppress(SettingsError):
        assert accelerators()[accelerator(name).name]


def test_an_unknown_dtype_is_refused():
    """A dtype that nobody knows has no width."""
    with pytest.raises(SettingsError):
        element_bytes("fp3")
