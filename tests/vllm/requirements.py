"""Prints what the packages named on the command line ask for, without what is installed before or never needed.

Torch comes first, as a CPU build; audio, video and Triton are gigabytes that nothing uses on a CPU; xgrammar is
installed without its own requirements, because Triton is one of them.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "triton", "xgrammar"}

for requirement in (Requirement(line) for name in sys.argv[1:] for line in requires(name) or ()):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        sys.stdout.write(f"{requirement}\n")
