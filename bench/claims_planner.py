"""Thirty figures of planning playbooks, each computed anew: the rows of the second table in docs/claims.md.

`figures` of a row are numbers from the formulas of `costs/`, never literals of a result. What stands in the playbook is
in `claimed` and, where a row computes with the playbook's own prices or lengths, in `THEIRS`. Rows without figures are
statements, and say so. tests/costs/test_claims.py and test_claims_times.py hold each figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness import kept
from thermocline.costs.geometry import Geometry
from thermocline.costs.hardware import accelerator
from thermocline.costs.memory import sequence_bytes, token_bytes, weights_bytes
from thermocline.costs.models import find
from thermocline.costs.money import HOURS_PER_MONTH, NODE_ACCELERATORS
from thermocline.costs.roofline import prefill_seconds
from thermocline.costs.transfer import LINKS, host_link, transfer_seconds

Figures = tuple[float, ...]
GIB, GB = 1 << 30, 1e9
LENGTHS = (2048, 8192, 32_768, 131_072)
TOOLS = ("thermocline", "aiconfigurator")
ABOUT_BYTES = {1, 2, 5, 6, 7, 13, 27, 28}
STATEMENT = "a statement, no figure"
LINK_SHARE = 0.8
"""Of a PCIe link's peak; assumed, as aiconfigurator 0.12 takes it for memory."""


@dataclass(frozen=True, slots=True)
class Theirs:
    """Figures of the playbooks that a correction computes with."""

    mbu: float = 0.70
    left_bytes: float = 11e9
    usd_per_token: float = 0.0003
    tokens_of_a_request: int = 600
    prompt_tokens: int = 500
    steps: int = 100
    requests_per_second: float = 100.0
    latency_seconds: float = 0.070
    compute_share: float = 0.80
    waiting_share: float = 0.60
    throughput_gain: float = 0.223
    hits: tuple[float, float] = (0.121, 0.975)
    saved_usd: tuple[float, float] = (1200.0, 1800.0)
    usd_per_hour: float = 4.0
    input_tokens: float = 1.0e6
    output_tokens: float = 0.1e6
    hit: float = 0.80
    requests_per_day: float = 10_000.0
    saved_usd_per_month: float = 8.64e6
    prefixes: int = 1600
    requests: int = 65_000
    instances: int = 8


THEIRS = Theirs()


@dataclass(frozen=True, slots=True)
class Claim:
    """One row. `told` puts its figures into words."""

    number: int
    claimed: str
    figures: Callable[[], Figures] | None
    told: str
    correction: str

    def line(self) -> str:
        """As a row of the table."""
        ours = self.told.format(*self.figures()) if self.figures else STATEMENT
        return f"| {self.number} | {self.claimed} | {ours} | {self.correction} | {self.tested} |"

    @property
    def tested(self) -> str:
        """Where the figure is derived anew: B for bytes, T for times and money, - for a statement."""
        return "-" if self.figures is None else "B" if self.number in ABOUT_BYTES else "T"


def table() -> str:
    """All thirty, as Markdown."""
    lines = ["| # | claimed | computed here | what has to be said | test |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(claim.line() for claim in CLAIMS), ""])


# -- figures -----------------------------------------------------------------------------------------------------------


def _qwen() -> Geometry:
    return find("Qwen2.5-32B-Instruct")


def _llama8() -> Geometry:
    return find("Meta-Llama-3.1-8B")


def _llama70() -> Geometry:
    return find("Meta-Llama-3.1-70B")


def kv_of_qwen() -> Figures:
    """Row 1: GB at four lengths, then shares of the model in percent, then the length at which KV is as large."""
    kept = [sequence_bytes(_qwen(), tokens) for tokens in LENGTHS]
    weights = weights_bytes(_qwen())
    return (*(size / GB for size in kept), *(100 * size / weights for size in kept), weights / token_bytes(_qwen()))


def sequences() -> Figures:
    """Row 2: sequences of 2k, 8k and 32k in the playbook's own 11 GB, and in 80 GiB x 0.95 without overhead."""
    room = (THEIRS.left_bytes, 80 * GIB * 0.95 - weights_bytes(_qwen()))
    return tuple(float(left // sequence_bytes(_qwen(), tokens)) for left in room for tokens in LENGTHS[:3])


def ridge() -> Figures:
    """Row 3: operations per byte of an A100, and the quotient as it was written, in its own units."""
    a100 = accelerator("A100")
    return a100.ridge_flops_per_byte, (a100.memory_bytes_per_second / 1e9) / (a100.flops_for("bf16") / 1e12)


def decode_bound() -> Figures:
    """Row 4: tokens/s and ms at full bandwidth; ms at 70 % of it without KV, with KV at 32k, and with the wrong KV."""
    speed, weights = accelerator("A100").memory_bytes_per_second, weights_bytes(_qwen())
    wrong = _qwen().layers * _qwen().query_heads * _qwen().query_head_dim * 2 * LENGTHS[2]
    read = (weights, weights + sequence_bytes(_qwen(), LENGTHS[2]), weights + wrong)
    return speed / weights, 1e3 * weights / speed, *(1e3 * size / speed / THEIRS.mbu for size in read)


def sevens() -> Figures:
    """Row 6: GB at 8k tokens of four models of about 7B, and thousands of tokens for 10 x the first."""
    names = ("Llama-2-7b-hf", "Meta-Llama-3.1-8B", "Mistral-7B-v0.3", "Qwen2.5-7B-Instruct")
    kept = (sequence_bytes(find(name), 8192) / GB for name in names)
    return *kept, 10 * 7e9 * 2 / token_bytes(find(names[0])) / 1e3


def speedups() -> Figures:
    """Row 8: how many times sooner, 70B on 8 x H100: 8k with 7.5k cached, 128k with 126k, and nothing cached."""
    h100 = accelerator("H100")

    def times(tokens: int, cached: int) -> float:
        whole = prefill_seconds(_llama70(), h100, tokens, tp=8).seconds
        return whole / prefill_seconds(_llama70(), h100, tokens - cached, cached, tp=8).seconds

    return times(8192, 7680), times(131_072, 129_024), times(32_768, 0)


def in_flight() -> Figures:
    """Row 11: Little's law: how many requests are under way at once."""
    return (THEIRS.requests_per_second * THEIRS.latency_seconds,)


def unrelated() -> Figures:
    """Row 12: what the figure is a product of."""
    return (THEIRS.waiting_share * THEIRS.usd_per_hour,)


def history() -> Figures:
    """Row 13: tokens in 8 MB, and MB of 2,000 tokens, of an 8B model."""
    return 8e6 // token_bytes(_llama8()), sequence_bytes(_llama8(), 2000) / 1e6


def hydration() -> Figures:
    """Row 14: TB/s of 8 MB in 1.5 us, and ms of a 2,000-token history over PCIe 4 at 80 % of its peak."""
    link = host_link(accelerator("A100"))
    return 8e6 / 1.5e-6 / 1e12, 1e3 * sequence_bytes(_llama8(), 2000) / (link.bytes_per_second * LINK_SHARE)


def overheads() -> Figures:
    """Row 15: the largest of the four figures over the smallest."""
    told = (23e-3, 70e-3, 55e-3, 40e-3)
    return (len(told), max(told) / min(told))


def most() -> Figures:
    """Row 16: the share that waits, in percent, and the most that it can give."""
    waste = THEIRS.compute_share * THEIRS.waiting_share
    return 100 * waste, 1 / (1 - waste)


def twice() -> Figures:
    """Row 17: what 3 x the throughput saves of a bill, in percent."""
    return (100 * (1 - 1 / 3),)


def price() -> Figures:
    """Row 18: list prices of an A100, lowest and highest."""
    found = accelerator("A100").price
    assert found is not None
    return found.low, found.high


def prefills() -> Figures:
    """Row 19: seconds of 4,000 tokens of a 70B on 2 x A100, 8 x A100 and 8 x H100."""
    machines = (("A100", 2), ("A100", 8), ("H100", 8))
    return tuple(prefill_seconds(_llama70(), accelerator(name), 4000, tp=tp).seconds for name, tp in machines)


def round_robin() -> Figures:
    """Row 20: percent of hits by the definition "same instance as last time", and of a cache with room, expected."""
    pairs = THEIRS.prefixes * THEIRS.instances
    seen = pairs * (1 - math.exp(THEIRS.requests * math.log1p(-1 / pairs)))
    return 100 / THEIRS.instances, 100 * (1 - seen / THEIRS.requests)


def wasted() -> Figures:
    """Row 21: waste in percent, GPU-hours of a node and month, $ per hour that are implied, and $ at their price."""
    share = 1 - 1 / (1 + THEIRS.throughput_gain)
    hours = NODE_ACCELERATORS * HOURS_PER_MONTH * share
    return 100 * share, hours, *(usd / hours for usd in THEIRS.saved_usd), hours * THEIRS.usd_per_hour


def prefill_share() -> Figures:
    """Row 22: points of hits, percent of throughput, and the share of prefill in the work that explains both."""
    points, gain = THEIRS.hits[1] - THEIRS.hits[0], THEIRS.throughput_gain
    return 100 * points, 100 * gain, 100 * (1 - 1 / (1 + gain)) / points


def recomputed() -> Figures:
    """Row 23: the claimed and the exact sum of contexts; seconds of prefill, and of decoding, of a 32B on an A100."""
    steps = range(1, THEIRS.steps + 1)
    exact = sum(THEIRS.prompt_tokens + step for step in steps)
    prefill = prefill_seconds(_qwen(), accelerator("A100"), THEIRS.prompt_tokens).seconds
    return THEIRS.tokens_of_a_request * THEIRS.steps, exact, prefill, THEIRS.steps * decode_bound()[1] / 1e3


def per_million() -> Figures:
    """Row 24: $ per million tokens, and of a request."""
    return THEIRS.usd_per_token * 1e6, THEIRS.usd_per_token * THEIRS.tokens_of_a_request


def bill() -> Figures:
    """Row 25: $ of 1.1 M tokens, and with 80 % of the input cached and all of the output computed."""
    new = THEIRS.input_tokens * (1 - THEIRS.hit) + THEIRS.output_tokens
    return (THEIRS.input_tokens + THEIRS.output_tokens) * THEIRS.usd_per_token, new * THEIRS.usd_per_token


def saved() -> Figures:
    """Row 26: $ a month at its own prices, how far off the claim is, and what it would be per request."""
    requests = THEIRS.requests_per_day * 30
    tokens = THEIRS.prompt_tokens + THEIRS.steps / 2
    right = requests * tokens * THEIRS.usd_per_token
    return right, THEIRS.saved_usd_per_month / right, THEIRS.saved_usd_per_month / requests


def full_context() -> Figures:
    """Row 27: millions of tokens of an 8B model in 150 GB, and its context."""
    return 150 * GB / token_bytes(_llama8()) / 1e6, float(_llama8().context_tokens or 0)


def redis() -> Figures:
    """Row 28: prefixes of 4k in 50 GB, 8B and 70B; GB of one, and ms over 25 GbE."""
    one = sequence_bytes(_llama8(), 4096)
    counts = (float(50 * GB // sequence_bytes(model, 4096)) for model in (_llama8(), _llama70()))
    moving = transfer_seconds(LINKS["25gbe"], one).parts[-1].seconds
    return *counts, one / GB, 1e3 * moving


CLAIMS = (
    Claim(
        1,
        "Qwen2.5-32B: 1.34 / 5.37 / 21.5 / 85.9 GB of KV at 2k / 8k / 32k / 131k tokens, up to 132 % of the model",
        kv_of_qwen,
        "{0:.3f} / {1:.3f} / {2:.2f} / {3:.2f} GB; {4:.1f} / {5:.1f} / {6:.0f} / {7:.0f} % of the model; as "
        "large as it at {8:,.0f} tokens",
        "The table counts the 40 heads that ask instead of the 8 that are kept, and one of K and V.",
    ),
    Claim(
        2,
        "11 GB hold 8 / 2 / 0 sequences of 2k / 8k / 32k",
        sequences,
        "{0:.0f} / {1:.0f} / {2:.0f} in 11 GB; {3:.0f} / {4:.0f} / {5:.0f} in what 80 GiB x 0.95 leaves",
        'An "80 GB" accelerator has 80 GiB. With 4 to 6 GB of overhead it is about a third less.',
    ),
    Claim(
        3,
        "ridge point of an A100 = bandwidth / compute = 153",
        ridge,
        "compute / bandwidth = {0:.0f} FLOP per byte; as written {1:.1f}",
        "The number is right, the fraction is upside down.",
    ),
    Claim(
        4,
        "Qwen2.5-32B on an A100: bound 31 tokens/s, and 46 to 61 ms per token",
        decode_bound,
        "{0:.0f} tokens/s ({1:.0f} ms) at full bandwidth; at 70 % of it {2:.0f} ms, and {3:.0f} ms at 32k tokens",
        "Both can hold, not as stated: 61 ms come from the KV of row 1.",
    ),
    Claim(
        5,
        "weights of 64 GB, elsewhere 65",
        lambda: (weights_bytes(_qwen()) / GB,),
        "{0:.2f} GB",
        "32.76 billion parameters of two bytes.",
    ),
    Claim(
        6,
        '"a 7B at 8k needs about 4 GB"; "KV can be 10 x the model"',
        sevens,
        "{0:.2f} GB for Llama-2-7B, {1:.2f} for Llama-3.1-8B, {2:.2f} for Mistral-7B, {3:.2f} for Qwen2.5-7B; 10 x at "
        "{4:.0f}k tokens of the first",
        "True of models without shared heads only.",
    ),
    Claim(
        7,
        "131k tokens of context for Qwen2.5-32B",
        lambda: (float(_qwen().context_tokens or 0),),
        "{0:,.0f} tokens",
        "131k need YaRN, which has to be asked for.",
    ),
    Claim(
        8,
        '"14 x faster TTFT"',
        speedups,
        "70B on 8 x H100: {0:.0f} x with 7.5k of 8k tokens cached, {1:.0f} x with 126k of 128k, {2:.0f} x with none",
        "Without model, length, hardware and the cached share it is no figure.",
    ),
    Claim(9, "a section of references", None, "", "It is empty."),
    Claim(
        10,
        '"high GPU utilisation + low throughput = KV bottleneck"',
        None,
        "",
        "One of several causes: KV full, recomputing, or bandwidth; `thermocline doctor` asks which.",
    ),
    Claim(
        11,
        '70 ms x 100 requests/s = "7 s of GPU idle per second"',
        in_flight,
        "{0:.0f} requests under way at once",
        "Latencies of concurrent requests do not add up to idle time; the product is Little's law.",
    ),
    Claim(
        12,
        "therefore $2.40 of $4.00 per hour are wasted",
        unrelated,
        "60 % x $4 = ${0:.2f}",
        "Unrelated to the 7 s of row 11.",
    ),
    Claim(
        13,
        'KV of a conversation is "2-8 MB"',
        history,
        "8 MB are {0:.0f} tokens of Llama-3.1-8B; 2,000 tokens are {1:.0f} MB",
        "Text has that size, its KV does not.",
    ),
    Claim(
        14,
        '"hydration" 40 ms -> 1.5 us',
        hydration,
        "8 MB in 1.5 us are {0:.1f} TB/s; a 2,000-token history takes {1:.0f} ms over PCIe 4",
        "1.5 us is a look-up of a key. The bytes still have to be moved.",
    ),
    Claim(
        15,
        "overhead 23-75 ms, 70 ms, 55 ms -> 4.5 us, 40 ms",
        overheads,
        "{0:.0f} figures for one quantity, up to {1:.1f} x apart",
        "None is measured.",
    ),
    Claim(
        16,
        "TTFT -33 % gives 3 x throughput; 80 % compute x 60 % waiting",
        most,
        "{0:.0f} % waste, at most {1:.1f} x",
        "A third off one part of a request is not three times the requests.",
    ),
    Claim(17, "and 67 % lower cost", twice, "3 x = {0:.0f} % lower", "The same claim as row 16, counted twice."),
    Claim(
        18,
        "A100 at $4 per hour",
        price,
        "${0:.2f} to ${1:.2f}, list prices of May 2026",
        "A price is an input: `--price`.",
    ),
    Claim(
        19,
        '"4,000-token prefill on 70B > 1 s"',
        prefills,
        "{0:.2f} s on 2 x A100, {1:.2f} s on 8 x A100, {2:.2f} s on 8 x H100",
        "True of two A100. Measured kernels give 1.14, 0.41 and 0.17 s.",
    ),
    Claim(
        20,
        "round robin over 8 GPUs hits 12.5 %",
        round_robin,
        '{0:.1f} % if a hit means "same GPU as last time"; {1:.1f} % of what is held, with room',
        "In steady state round robin warms every GPU. See `thermocline bench locality`.",
    ),
    Claim(
        21,
        "+22.3 % throughput = $1,200-1,800 per node and month",
        wasted,
        "{0:.1f} % waste = {1:,.0f} GPU-hours; the sum means ${2:.2f}-{3:.2f} per hour, and at $4 it is ${4:,.0f}",
        "The gain is not the waste, and the price differs from row 18's.",
    ),
    Claim(
        22,
        "85 points more hits, sold as the value",
        prefill_share,
        "{0:.0f} points became {1:.0f} % throughput: {2:.0f} % of the work was prefill that repeats",
        "A hit saves prefill only.",
    ),
    Claim(
        23,
        "without a cache 600 tokens are recomputed at each of 100 steps: 60,000",
        recomputed,
        "{1:,.0f} tokens, not {0:,.0f}; and reuse saves {2:.2f} s of prefill, not {3:.1f} s of decoding",
        "Every engine caches within a request. (32B on an A100; the playbook has 0.05 s.)",
    ),
    Claim(
        24,
        "$0.0003 per token, $0.18 per request",
        per_million,
        "${0:.0f} per million tokens; ${1:.2f} are 600 of them",
        "A price per token means little without a unit that people compare.",
    ),
    Claim(
        25,
        "1.1 M tokens cost $360; at 80 % hits $72",
        bill,
        "${0:.0f}; ${1:.0f}",
        "Output cannot be cached.",
    ),
    Claim(
        26,
        "10,000 requests a day save $8.64 M a month",
        saved,
        "${0:,.0f} at its own prices, {1:.0f} x less; the claim is ${2:.2f} for each request",
        "A request costs $0.18 in row 24.",
    ),
    Claim(
        27,
        '"150 GB for the full context, 32 layers"',
        full_context,
        "{0:.2f} M tokens of Llama-3.1-8B, whose context is {1:,.0f}",
        "32 layers do not tell a size without heads and tokens.",
    ),
    Claim(
        28,
        "50 GB of Redis, look-up 1-5 ms",
        redis,
        "{0:.0f} prefixes of 4k of an 8B, {1:.0f} of a 70B; {2:.2f} GB over 25 GbE take {3:.0f} ms",
        "1-5 ms is a look-up of a key.",
    ),
    Claim(
        29,
        'hit rates of 95 %, 80 %, 30-50 %, "first layer 100 %"',
        None,
        "",
        "They exclude each other. A hit rate belongs to a traffic: `thermocline size --trace` computes it.",
    ),
    Claim(30, "10 x, 5 x, 5-20 x; a table of companies", None, "", "No sources are given."),
)


# -- how right predicted times are -------------------------------------------------------------------------------------


def errors() -> str:
    """What `bench planner` kept: errors by what was known, beside the peer, and by part; else nothing."""
    found = kept("planner")
    if found is None:
        return ""
    details = found["details"]
    both, peer = details["same_rows"]["rows"], details["rows"]
    groups = [
        (f"{peer['predicted']} of a random {peer['sample']} rows", details["errors_percent"]),
        (f"the {both} rows that both predict", {name: details["same_rows"][name] for name in TOOLS}),
        *((f"by {name}", part) for name, part in details["errors_by"].items()),
    ]
    lines: list[str] = []
    for title, rows in groups:
        lines += [f"| {title} | rows | first token | median | per token | median |", "|---|---|---|---|---|---|"]
        lines += [_error_line(name, row) for name, row in rows.items()]
        lines.append("")
    refused = "; ".join(f"{count} x {why}" for why, count in details["refused"].items())
    lines.append(f"Mean and median of the absolute error. Refused by thermocline: {refused}.")
    lines.append(f"`thermocline bench planner`, {found['date']}, commit {found['machine']['commit']}.")
    return "\n".join([*lines, ""])


def _error_line(name: str, row: Mapping[str, Any]) -> str:
    cells = (f"{row[which][kind]:.0f} %" for which in ("first", "between") for kind in ("mean", "median"))
    return f"| {name} | {row['rows']} | {' | '.join(cells)} |"
