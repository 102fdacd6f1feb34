"""`thermocline size` in words, side by side, as a page, and its exit codes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from tests.costs.test_sizing import asked, profile, unknown
from thermocline.cli.app import main
from thermocline.costs import measured
from thermocline.costs.geometry import Geometry
from thermocline.costs.hardware import accelerator
from thermocline.costs.models import find
from thermocline.costs.served import measurements
from thermocline.costs.sizing import Asked, size
from thermocline.costs.trace import read
from thermocline.errors import SettingsError
from thermocline.lens.figures import lengths
from thermocline.lens.size import render, report, so, with_parameters

ROOT = Path(__file__).parents[2]
QWEN = "qwen2.5-32b-instruct"
LLAMA = "meta-llama/Meta-Llama-3.1-70B"


@pytest.fixture
def run(capsys):
    """Run the command in this process; gives its exit code, stdout and stderr."""

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            main(["size", *argv])
        return stopped.value.code, *capsys.readouterr()

    return run


def test_in_words():
    """An answer says first what follows from it, then every table, then what is assumed."""
    text = render([size(asked(contexts=(2048, 8192)))])
    assert text.startswith("Qwen/Qwen2.5-32B-Instruct on 1 x A100-80-SXM: fits\nso: It fits: ")
    headings = re.findall(r"^(\w[\w ]+)$", text, re.MULTILINE)
    assert headings[1:] == [
        "sessions",
        "seconds to the first token",
        "seconds per output token",
        "loading instead of computing",
        "money",
        "assumed",
    ]
    assert "262,144 B per token" in text


def test_the_guide():
    """The tables of memory and sessions in the guide are what the command prints."""
    guide = (ROOT / "docs" / "guides" / "size.md").read_text()
    shown = re.search(r"^memory of one accelerator of 1$.*?(?=^```)", guide, re.DOTALL | re.MULTILINE)
    assert shown[0].rstrip() in render([size(asked())])


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"model": LLAMA}, "it fits on 2"),
        ({"contexts": (8192,), "target_seconds": 0.01, "arrivals_per_second": 1.0}, "not with any number of instances"),
        ({"contexts": (8192,), "arrivals_per_second": 9.0}, "accelerators keep up"),
        ({"contexts": (8192,)}, "1,000 requests cost $"),
    ],
)
def test_what_follows(more, word):
    """What follows is said in a sentence: no room, unknown, late, enough, or what it costs."""
    assert any(word in line for line in so(size(asked(**more))))


def test_what_is_not_known():
    """Where it is not known whether a model fits, that is said, and why."""
    said = so(size(Asked(geometry=unknown(), accelerator=accelerator("H100"))))
    assert "not known" in said[0]
    assert said[-1].startswith("Unknown: ")


def test_one_instance_is_one(tmp_path):
    """Where one instance keeps up with a trace, the text says one instance."""
    path = tmp_path / "some.jsonl"
    row = {"input_length": 2000, "output_length": 10, "hash_ids": [1, 2, 3, 4]}
    path.write_text("".join(f"{json.dumps(row | {'timestamp': 100_000 * at})}\n" for at in range(20)))
    assert "with 1 instance\n" in render([size(asked(trace=read(path)))])


def test_side_by_side():
    """Several answers are columns of one table; what does not fit has no seconds."""
    answers = [size(asked(contexts=(8192,))), size(asked(LLAMA, contexts=(8192,)))]
    text = render(answers)
    (row,) = re.findall(r"first token of 8k +(.*)", text)
    assert row.split("  ")[0].endswith("s")
    assert row.split()[-1] == "-"


def test_the_page():
    """The page is well-formed, needs no script, and has the charts and tables of every answer."""
    text = report([size(asked(contexts=(2048, 8192))), size(asked(LLAMA))])
    assert "<script" not in text
    body = ET.fromstring(text[text.index("<body>") : text.index("</html>")])  # noqa: S314  # our own
    assert len(body.findall(".//{http://www.w3.org/2000/svg}svg")) == 4 + 2
    assert len(body.findall(".//table")) >= 8


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ((QWEN, "--gpu", "a100-80"), 0),
        ((LLAMA, "--gpu", "a100-80"), 3),
        ((QWEN, "--gpu", "a100-80", "--slo-seconds", "0.01"), 4),
        (("qwen3-next-80b-a3b", "--gpu", "h200", "--tp", "2"), 5),
        ((LLAMA, QWEN, "--gpu", "a100-80"), 0),
        (("nothing-like-it", "--gpu", "a100-80"), 1),
        ((QWEN, "--gpu", "a100-80", "--context", "none"), 2),
        ((QWEN, "--gpu", "a100-80", "--arrivals", "nan"), 2),
        ((QWEN, "--gpu", "a100-80", "--arrivals", "inf"), 2),
        ((QWEN, "--gpu", "a100-80", "--utilisation", "nan"), 2),
        ((QWEN, "--gpu", "a100-80", "--price", "nan"), 2),
        ((QWEN, "--gpu", "a100-80", "--html", "missing/size.html"), 2),
        ((QWEN, "--gpu", "a100-80", "--trace", "missing.jsonl"), 2),
    ],
)
def test_exit_codes(run, argv, code):
    """No room, late, and no cache advised are exit codes of their own; of several answers the best one counts."""
    found, out, err = run(*argv)
    assert found == code
    assert bool(out) is (code not in {1, 2})
    assert ("hint:" in err) is (code in {1, 2})


def test_json_and_html(run, tmp_path):
    """--json prints a list of answers with all that the text says, and --html writes the page beside it."""
    page = tmp_path / "size.html"
    code, out, _ = run(QWEN, "--gpu", "a100-80", "--gpu", "h200", "--context", "2k,8k", "--json", "--html", str(page))
    answers = json.loads(out)
    assert code == 0
    assert [answer["gpu"] for answer in answers] == ["A100-80-SXM", "H200-SXM"]
    assert [each["tokens"] for each in answers[0]["contexts"]] == [2048, 8192]
    _, text, _ = run(QWEN, "--gpu", "a100-80", "--context", "2k,8k")
    assert re.findall(r"^so: (.*)$", text, re.MULTILINE) == answers[0]["so"]
    assert f"{answers[0]['wasted_hours_per_node_month']:,.0f} accelerator-hours" in text
    assert page.read_text().startswith("<!doctype html>")


def test_measured(run, tmp_path):
    """--measured takes what a profile wrote."""
    path = tmp_path / "profile.json"
    measured.write(path, profile())
    _, out, _ = run(QWEN, "--gpu", "a100-80", "--context", "8k", "--measured", str(path), "--json")
    assert json.loads(out)[0]["contexts"][0]["prefill_seconds"] == pytest.approx(8.2, rel=0.05)


def test_tiers_that_could_be_had(run):
    """--tier says which tiers are weighed, with their speed; what is no tier is a mistake with a hint."""
    words = (QWEN, "--gpu", "a100-80", "--context", "8k")
    code, out, _ = run(*words, "--tier", "host=64GiB", "--tier", "redis@25gbe", "--json")
    assert code == 0
    assert [each["name"] for each in json.loads(out)[0]["tiers"]] == ["host", "25gbe"]
    for wrong in (("--tier", "tape"), ("--tier", "host:0.1", "--price", "0")):
        code, _, err = run(*words, *wrong)
        assert code == 2
        assert "hint:" in err


def test_each_tier_beside_itself():
    """Of several answers, of which one knows no link to host memory, a row has the same tier in all columns."""
    linkless = replace(accelerator("a100-80"), pcie_bytes_per_second=None, cpu_bytes_per_second=None)
    answers = [size(asked(contexts=(8192,))), size(Asked(geometry=find(QWEN), accelerator=linkless, contexts=(8192,)))]
    row = next(line for line in render(answers).splitlines() if line.strip().startswith("host pays from"))
    assert row.split()[-1] in {"unknown", "-"}


def test_under_load(run):
    """--users has a row for each length and number of users; those beyond the memory wait, and it says how many run."""
    words = (QWEN, "--gpu", "a100-80", "--context", "2k,8k", "--users", "1", "--users", "64")
    _, out, _ = run(*words, "--json")
    rows = json.loads(out)[0]["loads"]
    assert [(each["prompt_tokens"], each["users"]) for each in rows] == [(2048, 1), (2048, 64), (8192, 1), (8192, 64)]
    assert rows[3]["running"] < 64 < rows[3]["first_token_seconds"] / rows[2]["first_token_seconds"]
    assert "waiting for memory" in rows[3]["parts"]
    code, out, _ = run(*words)
    assert code == 0
    assert "nothing: formulas" in out or "other models" in out
    for engine in measurements().doors:
        assert run(*words, "--engine", engine)[0] == 0
    assert run(QWEN, "--gpu", "a100-80", "--engine", "none")[0] == 2
    _, out, _ = run(*words, "--pp", "2", "--json")
    assert not json.loads(out)[0]["loads"]
    assert any("was not measured" in note for note in json.loads(out)[0]["assumptions"])


def test_lengths():
    """Lengths are numbers between commas; a k is 1,024."""
    assert lengths(["4k,32k", "1000"]) == (4096, 32768, 1000)
    for bad in ("0", "-1", "4.5k", "x"):
        with pytest.raises(SettingsError):
            lengths([bad])


def test_parameters():
    """Parameters are a total, and where given those that are active."""
    geometry = find(QWEN)

    def given(text) -> Geometry:
        return with_parameters(geometry, text)

    assert given(None) is geometry
    assert (given("27B").parameters_total, given("27B").parameters_active) == (27 * 10**9, 27 * 10**9)
    assert (given("30.5B:3e9").parameters_total, given("30.5B:3e9").parameters_active) == (305 * 10**8, 3 * 10**9)
    for bad in ("", "x", "1:2:3", "-1B", "0", "3B:30B"):
        with pytest.raises(SettingsError):
            given(bad)


def test_how_memory_is_divided_is_asked(run):
    """The size of a block and the tokens of a step are inputs: lengths are rounded to one, windows hold the other."""
    words = ("google/gemma-3-27b-it", "--gpu", "h200", "--context", "8k", "--json")
    usual, blocks, steps = (
        json.loads(run(*words, *more)[1])[0] for more in ((), ("--block-tokens", "128"), ("--batched-tokens", "2048"))
    )
    assert [each["room"]["block_tokens"] for each in (usual, blocks, steps)] == [16, 128, 16]
    assert steps["room"]["overhead_bytes"] < usual["room"]["overhead_bytes"]
    assert steps["contexts"][0]["admitted"] > usual["contexts"][0]["admitted"]
    assert run(*words, "--block-tokens", "0")[0] == 2
