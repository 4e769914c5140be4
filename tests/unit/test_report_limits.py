"""lib/report/limits.py: measured limits beside the maker's, and what they allow."""

import json

import pytest
from conftest import REPO

from lib.report.limits import limits
from lib.report.page import to_html, to_markdown

GOOD = {"median": 4.2e12, "least": 4.1e12, "most": 4.3e12, "not_measured": None}
SLOW = {"median": 3.9e12, "least": 3.8e12, "most": 4.0e12, "not_measured": None}
NONE = {"median": None, "least": None, "most": None, "not_measured": "no FP8 matrix units"}


def measured(device, gpus, fp8=None):
    rate = {"median": 7e14, "least": 6.9e14, "most": 7.1e14, "not_measured": None}
    return {
        "made_by": {"gpus": gpus}, "device": device, "bytes_per_second": 4.2e12, "flops_per_second": 7e14,
        "fp8_flops_per_second": fp8 and fp8["median"],
        "probes": {
            "bytes_per_second": {"copy": SLOW, "sum": GOOD, "matrix_vector": NONE},
            "flops_per_second": {"matrix_bf16": rate},
            "fp8_flops_per_second": {"matrix_fp8": fp8 or NONE},
        },
    }  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch):
    """blocks(limits.json of one run, of the next, ...; None: a run without)."""
    monkeypatch.chdir(REPO)

    def blocks(*entries):
        runs = {f"run {number}": tmp_path / str(number) for number in range(len(entries))}
        for folder, entry in zip(runs.values(), entries, strict=True):
            if entry:
                (folder / "limits").mkdir(parents=True)
                (folder / "limits" / "limits.json").write_text(json.dumps(entry))
        return list(limits({"runs": {name: {"folder": str(folder)} for name, folder in runs.items()}}))

    return blocks


def tables(blocks):
    return [[list(row) for row in block[2]] for block in blocks if block[0] == "table"]


def test_a_limit_is_its_fastest_probe_beside_the_datasheet(report):
    table, _ = tables(report(measured("NVIDIA H200", [{"name": "NVIDIA H200"}], GOOD)))
    assert table[0][2:6] == ["memory", "4,200 GB/s", "sum", "4,100 GB/s"]
    assert table[0][7:] == ["4,800 GB/s (https://www.nvidia.com/en-us/data-center/h200/)", "88%"]


def test_a_failed_probe_gives_a_reason_and_no_fp8_limit(report):
    table, served = tables(report(measured("NVIDIA A100-SXM4-80GB", [{"name": "NVIDIA A100-SXM4-80GB"}])))
    assert table[2][3:5] == ["not measured", "no FP8 matrix units"] and table[0][7:] == ["—", "—"]
    assert {row[-1] for row in served if row[1] == "fp8"} == {"not measured"}
    assert "not measured" not in {cell for row in served if row[1] != "fp8" for cell in row}


def test_every_model_and_format_has_its_limit_at_1_16_and_64(report):
    rows = tables(report(measured("NVIDIA H200", [{"name": "NVIDIA H200"}], GOOD)))[1]
    assert [row[2] for row in rows] == ["1", "16", "64"] * 4
    # Llama-2-7B in bf16 by hand: 13.21 GB of weights and 640 positions of 524,288 bytes, at 4.2 TB/s.
    assert rows[0][:6] == ["llama-2-7b", "bf16", "1", "13.21", "0.34", "3.23"]
    limit, apart = (float(cell.replace(",", "")) for cell in rows[0][6:])
    assert 305 < apart < limit < 1000 / 3.22


def test_runs_on_the_same_gpu_share_the_fastest_limits(report):
    h200, h100 = (measured(name, [{"name": name}], GOOD) for name in ("NVIDIA H200", "NVIDIA H100"))
    blocks = report(h200 | {"bytes_per_second": 4.1e12}, h100, h200)
    assert [block[2] for block in blocks if block[0] == "heading"][1:] == [
        "The most that one GPU can serve: NVIDIA H200",
        "The most that one GPU can serve: NVIDIA H100",
    ]
    assert "With the limits of run 2: " in blocks[4][1]
    assert tables(blocks)[1][0][5] == "3.23"  # ms a step at 4.2 TB/s, as by hand above


def test_a_machine_without_a_gpu_shows_its_limits(report):
    assert report(None) == []
    blocks = report(measured("some CPU, 2 threads", []))
    assert [block[0] for block in blocks] == ["heading", "text", "table"]


def test_the_blocks_become_a_page(report):
    blocks = report(measured("NVIDIA H200", [{"name": "NVIDIA H200"}], GOOD))
    assert "gpt-oss-20b" in to_html("Title", "", blocks, ()) and "| gpt-oss-20b |" in to_markdown("Title", blocks)
