"""The page of the fault matrix, made from what tests kept under bench/results and from what is known of two peers.

`thermocline` cells come from tests alone: a test names its cells (tests/faults/matrix.py), and a run with
`--keep-matrix` keeps what it proved. What is said of the peers was measured or read once, with these versions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "faults.json"
VLLM_RESULTS = RESULTS.with_name("vllm-faults.json")
TIERS = ("memory", "disk", "redis")
VLLM = "vllm"
"""Stands in the place of a tier for what was tried on a live vLLM."""
PEERS = ("LMCache 0.5.6", "vLLM 0.32.0, file-system tier")
NO_FILE = "it has no file"
IN_PROCESS = "it is memory of the process"
NO_WIRE = "no wire"


@dataclass(frozen=True, slots=True)
class Row:
    """A fault in words, what the two peers do, and the tiers that cannot have it."""

    words: str
    lmcache: str = ""
    vllm: str = ""
    never: dict[str, str] = field(default_factory=dict)


FAULTS = {
    "bit in a payload": Row(
        "one bit of a stored block flips",
        "disk and Redis: full hit, 4 of 4 chunks delivered corrupt, no warning (measured)",
        "success with wrong bytes (measured)",
    ),
    "bit in a header": Row(
        "one bit of a stored header or index record flips",
    ),
    "cut": Row(
        "a file or value is cut short",
        "disk: full hit, the missing half is another request's KV (measured); Redis: a miss (measured)",
        "error, the file is removed (measured)",
        {"memory": NO_FILE},
    ),
    "no bytes": Row(
        "a file or value has no bytes",
        "disk: full hit, all of it another request's KV (measured)",
        "error (read)",
        {"memory": NO_FILE},
    ),
    "hole": Row(
        "zeros where bytes should be, as after a crash",
        "success with wrong bytes (the path of a flipped bit)",
        "success with wrong bytes (measured)",
        {"memory": IN_PROCESS},
    ),
    "other block": Row("another block's bytes under this name", "", "success with wrong bytes (measured)"),
    "other layout": Row(
        "bytes of another layout or of older weights",
        "no epoch (read)",
        "the path names the model, not its weights (read)",
    ),
    "other salt": Row(
        "another salt's prefix",
        "a salt in server mode only (read)",
        "`cache_salt` is part of the hash (read)",
    ),
    "deleted": Row(
        "a file or value vanishes behind the index",
        "miss with a warning (read; #1313)",
        "error, failed promotion (read)",
        {"memory": IN_PROCESS},
    ),
    "restart": Row(
        "the process restarts",
        "0 of 1,024 tokens found; old files are orphaned and never deleted (measured)",
        "files are found again (read)",
        {"memory": IN_PROCESS},
    ),
    "index damaged": Row("index log or snapshot is damaged or missing", "", "", {"memory": NO_FILE}),
    "killed while writing": Row(
        "kill -9, or a cut connection, while it writes",
        "in-place writes: 59 torn visible files in 100 kills (the technique, measured)",
        "temporary file and rename: 0 torn, 94 left-over files in 100 kills (the technique, measured)",
        {"memory": IN_PROCESS},
    ),
    "power loss": Row(
        "power is lost between any two writes",
        "no fsync (read)",
        "no fsync (read)",
        {"memory": NO_FILE, "redis": "the server's matter"},
    ),
    "full": Row(
        "the medium is full",
        "8 MB disk: errors swallowed, 38 puts stuck for ever, the cache is dead, nothing said (measured)",
        "an error per block, no limit (read)",
    ),
    "quota": Row("more is stored than allowed", "460 GB used of 250 (issue #1454)", "no quota (read)"),
    "I/O error": Row("reads or writes fail (EIO)", "", "", {"memory": "no I/O", "redis": "no file"}),
    "refusing": Row(
        "the server refuses: READONLY, MISCONF, LOADING, password", "", "no Redis", {"memory": NO_WIRE, "disk": NO_WIRE}
    ),
    "killed": Row(
        "the store process or server is gone",
        "its CPU mode: +3.0 s on every request for ever, the first one 32.9 s (measured)",
        "no other process",
        {"memory": IN_PROCESS, "disk": "no other process"},
    ),
    "frozen": Row(
        "the medium hangs",
        "Redis: the default client still waits after 4 s (measured)",
        "no deadline; all 32 I/O threads can hang (RFC #54363)",
        {"memory": IN_PROCESS},
    ),
    "slow": Row("the medium is slow", "as frozen", "no deadline (RFC #54363)", {"memory": IN_PROCESS}),
    "hung": Row(
        "operations with short deadlines, while one fault follows another",
        "",
        "",
        {"memory": IN_PROCESS},
    ),
    "connection cut": Row(
        "the connection is reset inside a reply", "", "no wire", {"memory": NO_WIRE, "disk": NO_WIRE}
    ),
    "bit on the wire": Row(
        "one bit flips on the wire, either way", "", "no wire", {"memory": NO_WIRE, "disk": NO_WIRE}
    ),
    "bytes lost on the wire": Row(
        "bytes are lost or repeated on the wire", "", "no wire", {"memory": NO_WIRE, "disk": NO_WIRE}
    ),
    "serve: corrupting": Row(
        "live server: stored bytes change while requests run",
        '2,047 of 2,048 tokens "hit", wrong tokens with HTTP 200, nothing logged (real vLLM, measured)',
        "the same class (read)",
    ),
    "serve: killed": Row(
        "live server: the tier's server is killed", "", "", {"memory": IN_PROCESS, "disk": "no other process"}
    ),
    "serve: frozen": Row("live server: the tier freezes", "", "", {"memory": IN_PROCESS}),
    "serve: slow": Row("live server: the tier becomes slow", "", "", {"memory": IN_PROCESS}),
    "serve: full": Row("live server: the tier is full", "", ""),
}

VLLM_FAULTS = {
    "node killed": "the node is killed (SIGKILL)",
    "node frozen": "the node is frozen (SIGSTOP)",
    "node slow": "the node runs one tenth of the time (SIGSTOP and SIGCONT in turn)",
    "socket removed": "the node's socket is removed, and the node is restarted",
    "disk full": "the disk tier's file system is full",
    "disk I/O errors": "every read, write and sync of the disk tier fails with EIO",
    "frames corrupted": "one bit in every 64 KiB of the disk tier's files is flipped",
    "slab overwritten": "bits of the node's memory flip all the time, under engines that copy from it",
    "index damaged": "the disk tier's index log is damaged, and the node is restarted",
    "engine killed while saving": "the engine is killed while it saves; another engine goes on",
    "engine killed while loading": "the engine is killed while it loads; another engine goes on",
    "engine frozen past its lease": "the engine is frozen while it loads, past its lease; others take its blocks",
    "wrong layout offered": "a model of the same shape with other weights asks a node that holds these prompts",
}

HEAD = """# Faults
<!-- Written by docs/generate.py from bench/results/*faults.json: test with --keep-matrix, then `make generate`. -->

A hit is exact or it is a miss, and a cache failure is never a request failure. This page says how far that was tested:
every fault that can be made here, on every tier, beside what two other systems do.

**How to read it.** *held* means that every case of every test of that cell passed: no wrong byte was delivered, no
request failed, and the tier worked again afterwards. The number is how many cases were run. *not tested* means that no
test of that cell was kept. *n/a* means that the tier cannot have the fault, and says why.

"""
PEERS_TEXT = """
**The peers' columns** are as of LMCache 0.5.6 and vLLM 0.32.0 (its file-system tier), looked at in September 2026.
*Measured*: their own code was called with damaged data, or run under a real vLLM, on a 2-core CPU machine. *Read*: from
their source or their public issues, and not run. An empty cell was neither run nor read. Later versions may differ.

**What is not here.** A real power cut, a device that lies about a flush, memory errors of the processor, and clocks
that go back were not tried. Power loss is a shim that holds back and drops writes that were not synced.
"""


VLLM_HEAD = """
## On a live vLLM

vLLM 0.32.0 on a CPU, its connector, and a node. *held* means: every request was answered with status 200 and with the
greedy tokens that the same server gives without a cache, while the fault lasted; the same prompts asked again were
answered alike, from vLLM's own cache and from the store, so that nothing wrong stayed in either; and the node was used
again afterwards. The cost is the seconds of requests during the fault beside those of the same prompts when nothing is
kept: the median of the differences, and the largest.
"""


def faults_page() -> str:
    """The whole page."""
    kept, live = (json.loads(path.read_text()) if path.exists() else [] for path in (RESULTS, VLLM_RESULTS))
    return HEAD + "\n".join([*_table(kept), PEERS_TEXT, *_on_vllm(live), *_tests(kept)]) + "\n"


def _on_vllm(kept: list[dict[str, Any]]) -> list[str]:
    """The faults on a live vLLM: what was tried how often, and what it cost."""
    lines = [*VLLM_HEAD.splitlines(), "", "| fault | runs | outcome | what it cost | commit |", "|---|---|---|---|---|"]
    for fault, words in VLLM_FAULTS.items():
        proven = [each for each in kept if each["fault"] == fault]
        outcome = "held" if all(each["outcome"] == "passed" for each in proven) else "**failed**"
        runs = f"{sum(each['cases'] for each in proven):,}"
        note, commit = (", ".join(dict.fromkeys(each[name] for each in proven)) for name in ("note", "commit"))
        cells = (runs, outcome, note, commit) if proven else ("", "not tested", "", "")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return [*lines, "", "`make test-vllm ARGS=--keep-matrix` runs them all and keeps the outcome.", ""]


def _table(kept: list[dict[str, Any]]) -> list[str]:
    names = [*PEERS, *(f"thermocline {tier}" for tier in TIERS)]
    lines = ["| fault | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for fault, row in FAULTS.items():
        cells = [row.lmcache, row.vllm, *(_cell(kept, fault, row, tier) for tier in TIERS)]
        lines.append(f"| {row.words} | " + " | ".join(cells) + " |")
    return lines


def _cell(kept: list[dict[str, Any]], fault: str, row: Row, tier: str) -> str:
    proven = [each for each in kept if (each["fault"], each["tier"]) == (fault, tier)]
    if not proven:
        return f"n/a: {row.never[tier]}" if tier in row.never else "not tested"
    cases = sum(each["cases"] for each in proven)
    if any(each["outcome"] != "passed" for each in proven):
        return f"**failed** ({cases:,})"
    return f"held ({cases:,})"


def _tests(kept: list[dict[str, Any]]) -> list[str]:
    """Which test proved what, when, and on which commit."""
    if not kept:
        return []
    lines = [
        "## The tests",
        "",
        "| fault | tier | test | cases | outcome | date | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(FAULTS)
    for each in sorted(kept, key=lambda each: (order.index(each["fault"]), each["tier"], each["test"])):
        path, _, name = each["test"].partition("::")
        test = f"`{path.removeprefix('tests/')}` {name.replace('::', ' ')}"
        said = f"{each['outcome']}; {each['note']}" if each.get("note") else each["outcome"]
        cells = (each["fault"], each["tier"], test, f"{each['cases']:,}", said, each["date"], each["commit"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Times in this table were taken while the machine was busy with other tests: read them as upper bounds.",
    ]
    return [*lines, "", "`make test-long ARGS=--keep-matrix` runs them all and keeps the outcome."]
