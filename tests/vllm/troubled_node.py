"""Runs `thermocline` on a device in trouble: while the file named first exists, the disk's calls fail with EIO."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from tests.faults.devices import TroubledDevice
from thermocline import cli

if __name__ == "__main__":
    flag = Path(sys.argv.pop(1))
    device = TroubledDevice()
    device.plan = lambda _number: errno.EIO if flag.exists() else 0
    with device.installed(pytest.MonkeyPatch()):
        cli.main()
