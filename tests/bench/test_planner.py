"""The planner's bench: what its rows mean, and that nothing is fitted to what is predicted."""

from __future__ import annotations

import csv
import itertools

import pytest

from bench import planner_rows
from bench.planner_rows import FILE, ranks, read, split

COLUMNS = """
    id silicon_data_source backend backend_version model_path system precision mode isl osl gemm_quant_mode
    moe_quant_mode batch_size tp_size pp_size attention_dp_size moe_tp_size moe_ep_size prefill_tp_size
    decode_tp_size silicon_ttft_ms silicon_tpot_ms
""".split()  # noqa: SIM905  # a list of so many would be longer
PLAIN = {
    "backend": "vllm",
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h200_sxm",
    "precision": "fp8",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "batch_size": "8",
    "tp_size": "4",
    "attention_dp_size": "1",
    "moe_tp_size": "4",
    "moe_ep_size": "1",
    "silicon_ttft_ms": "100",
    "silicon_tpot_ms": "10",
}


def written(folder, rows):
    """A package with these rows, as changes of a plain one."""
    path = folder / FILE
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(PLAIN | {"id": str(at)} | row for at, row in enumerate(rows))
    return read(folder)


@pytest.mark.parametrize(
    ("tp", "dp", "moe_tp", "ep", "meant"),
    [
        (8, 1, 8, 1, (8, 1)),
        (64, 1, 8, 8, (8, 1)),
        (16, 1, 4, 4, (4, 1)),
        (1, 64, 8, 8, (1, 8)),
        (4, 4, 1, 16, (1, 4)),
        (1, 8, 1, 8, (1, 8)),
        (4, 1, 2, 2, (2, 1)),
    ],
)
def test_ranks_are_counted_once(tp, dp, moe_tp, ep, meant):
    """A row that counts each rank twice is read as the name of the row says."""
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    assert ranks(dict(zip(names, map(str, (tp, dp, moe_tp, ep)), strict=True))) == meant


def test_what_cannot_be_predicted_says_why(tmp_path):
    """Each row is a setup with a load, or a reason; none is dropped."""
    kinds = [{}, {"mode": "disagg"}, {"model_path": "x/unheard-of"}, {"system": "h100_sxm", "tp_size": "1"}]
    kinds += [{"tp_size": "3"}, {"system": "gb200", "tp_size": "8"}]
    rows = written(tmp_path, [*kinds, {"precision": "", "system": "h100_sxm", "tp_size": "1"}])
    told = [row.refused.partition(":")[0] for row in rows]
    assert told[0] == ""
    assert rows[0].load.users == 8
    assert "different machines" in told[1]
    assert "unheard-of" in told[2]
    assert "heads" in told[4]
    assert "more ranks" in told[5]
    assert "do not fit" in told[6]
    assert all((row.setup is None) == bool(row.refused) for row in rows)


def test_nothing_is_fitted_to_what_is_predicted(tmp_path, monkeypatch):
    """The sample is the same in each run, and no row outside of it has the key of one inside, under whatever name."""
    monkeypatch.setattr(planner_rows, "SAMPLE", 40)
    users, lengths = map(str, range(1, 41)), ("512", "1024", "2048")
    rows = [{"batch_size": count, "isl": length} for count, length in itertools.product(users, lengths)]
    again = [{**row, "backend_version": "other", "silicon_ttft_ms": "101"} for row in rows]
    made = written(tmp_path, rows + again)
    sample, others = split(made)
    assert [row.raw["id"] for row in sample] == [row.raw["id"] for row in split(made)[0]]
    assert len(sample) == 40
    assert len(others) >= len(made) - 80
    assert not {row.key for row in sample} & {row.key for row in others}
