"""How many bytes the KV of a model takes, beside a figure that is often quoted: what `thermocline size` works out."""

from __future__ import annotations

from pathlib import Path

from thermocline.costs.hardware import accelerator
from thermocline.costs.models import find
from thermocline.costs.sizing import Asked, size
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.lens.figures import nbytes, share, tokens

MODEL, GPU = "Qwen/Qwen2.5-32B-Instruct", "A100-80-SXM"
QUOTED = {2048: 1.34e9, 8192: 5.37e9, 32768: 21.5e9, 131072: 85.9e9}
"""By length, as a playbook has it; beside it, and right, 262 kB per token."""
COMMAND = "thermocline size qwen2.5-32b-instruct --gpu a100-80 --context 2k,8k,32k,128k"
QUERY_HEADS, KV_HEADS = 40, 8


def play(screen: Screen, folder: Path) -> Chapter:  # noqa: ARG001  # nothing is written
    """The formula with its numbers, the table beside the quoted one, and what the quoted one must have taken."""
    found = size(Asked(geometry=find(MODEL), accelerator=accelerator(GPU), contexts=tuple(QUOTED)))
    screen.say(f"KV of {MODEL}, from its config.json: {found.token.formula}.")
    rows = []
    for each in found.contexts:
        quoted = QUOTED[each.tokens]
        shown = [nbytes(each.nbytes), share(each.share_of_weights or 0.0), nbytes(quoted)]
        rows.append([tokens(each.tokens), *shown, f"{quoted / each.nbytes:.2f}x"])
    screen.table(["tokens", "KV", "of the weights", "quoted", "too much by"], rows, right=range(1, 5))
    wrong = found.token.nbytes * QUERY_HEADS // KV_HEADS // 2
    screen.say(
        f"The quoted table has {QUERY_HEADS} query heads for {KV_HEADS} KV heads, and forgets that there are keys and "
        f"values: {wrong:,} B per token. Beyond {tokens(find(MODEL).context_tokens or 0)} tokens the model needs YaRN."
    )
    off = max(abs(length * wrong / quoted - 1) for length, quoted in QUOTED.items())
    ok = found.token.nbytes == 262_144 and off < 0.01  # noqa: PLR2004  # what the check is about
    longest = found.contexts[-1]
    figure = (
        f"{nbytes(longest.nbytes)} of KV at {tokens(longest.tokens)}: {share(longest.share_of_weights or 0.0)} of it"
    )
    verdict = f"{found.token.nbytes:,} B per token, {figure}"
    details = {"bytes_per_token": found.token.nbytes, "bytes": {each.tokens: each.nbytes for each in found.contexts}}
    return Chapter(ok, verdict, Claim('"KV of 131k tokens is 132 % of a 32B model"', figure, COMMAND), details)
