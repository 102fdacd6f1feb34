"""The public names, listed, sorted, and all of them real."""

from __future__ import annotations

import pytest

import thermocline

NAMES = [
    "BlockKey",
    "Layout",
    "Plan",
    "Reason",
    "Receipt",
    "Settings",
    "Store",
    "ThermoclineError",
    "__version__",
    "block_keys",
    "root_key",
    "store_from",
]


def test_the_list_is_this_one():
    """A public name is added or removed only together with this list."""
    assert thermocline.__all__ == NAMES == sorted(NAMES)
    assert dir(thermocline) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_exists(name):
    """Every public name loads, and is documented."""
    assert getattr(thermocline, name).__doc__


def test_unknown_name():
    """Asking for a name that does not exist is an AttributeError, as for any module."""
    with pytest.raises(AttributeError, match="no attribute 'Stoer'"):
        _ = thermocline.Stoer
