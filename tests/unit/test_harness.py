"""What the benchmark costs beside its client: the arithmetic, the whole stage with a double as client, the report."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import REPO, run_in, set_params
from test_client_accuracy import WORDS

from lib.bench.experiments import Bench
from lib.core.stage import UserError, read_params
from lib.report import client_accuracy
from lib.report.page import to_markdown
from lib.serving.servers import SERVERS
from stages.harness import Harness, Known, as_bench, line, ratios

RECORDED = REPO / "tests" / "fixtures"
PARAMS = {"points": [1, 2, 4], "pairs": 3, "ttft_ms": 20, "itl_ms": 5, "concurrency": 4, "input_tokens": 64,
          "output_tokens": 32, "requests_per_stream": 16}  # fmt: skip


def test_sweeps_that_lie_on_a_line_give_its_start_and_its_slope():
    found = line([{"points": n, "seconds": 10 + 7 * n} for n in (1, 2, 4)])
    assert found["start_seconds"] == pytest.approx(10) and found["point_seconds"] == pytest.approx(7)
    assert found["off_by_percent"] == pytest.approx(0, abs=1e-9)


def test_a_sweep_that_is_no_line_says_how_far_it_is_off():
    found = line([{"points": n, "seconds": n**2} for n in (1, 2, 4)])
    assert found["off_by_percent"] > 20 and found["start_seconds"] < 0


def test_the_sweep_is_divided_by_the_bare_client_with_an_interval():
    numbers = {"output_tokens_per_second": 100.0, "ttft_ms_p50": 20.0, "itl_ms_p50": 5.0}
    rows = [{"by": by, "seconds": seconds * n, **numbers}
            for by, seconds in (("sweep", 10.2), ("bare client", 10.0)) for n in (0.999, 1.0, 1.001)]  # fmt: skip
    found = ratios(rows)
    assert found["seconds"]["ratio"] == pytest.approx(1.02)
    assert found["seconds"]["low"] < 1.02 < found["seconds"]["high"]
    assert found["ttft_ms_p50"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("number", "low", "high", "verdict"),
    [
        ("seconds", 1.001, 1.019, "yes"),
        ("seconds", 0.9, 1.01, "yes"),
        ("seconds", 1.01, 1.05, "cannot be told"),
        ("seconds", 1.03, 1.05, "no"),
        ("ttft_ms_p50", 0.95, 0.97, "no"),
        ("ttft_ms_p50", 0.95, 1.01, "cannot be told"),
        ("ttft_ms_p50", None, None, "no verdict: fewer than 3 repeats"),
    ],
)
def test_less_than_two_per_cent_is_said_of_the_whole_interval_only(number, low, high, verdict):
    assert client_accuracy.overhead(number, {"low": low, "high": high}) == verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [2, 2]}, r"harness.points is \[2, 2\]; a line needs two different numbers"),
        ({"points": [0, 2]}, r"harness.points is \[0, 2\]"),
        ({"pairs": 0}, "harness.pairs is 0; use 1 or more"),
    ],
)
def test_a_wrong_parameter_is_named(change, message):
    with pytest.raises(UserError, match=f"params.yaml: {message}"):
        Harness(**PARAMS | change)


def test_the_sweep_is_the_benchmark_s_own_with_one_load(monkeypatch):
    monkeypatch.setitem(SERVERS, "mock", Known)
    p = as_bench(Harness(**PARAMS), read_params(Bench, REPO / "params.yaml"), 3)
    assert (p.servers, p.lengths, p.concurrency, p.repeats) == (["mock"], [[64, 32]], [4], 3)
    assert p.requests(4) == 64 and p.warmup(4) == 4 and p.pinned


@pytest.fixture
def measured(tree):
    """results/embedded/harness of a whole run: the real mock and sweep, a double in the place of genai-perf."""
    model = tree / "results/embedded/base_model/model"
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text(json.dumps(WORDS))
    (model / "config.json").write_text("{}")
    (model.parent / "metrics.json").write_text('{"name": "Tiny", "weights": "random", "parameters": 7}')
    (tree / "results/embedded/machine").mkdir()
    (tree / "results/embedded/machine/machine.json").write_text('{"cpu": "a CPU", "cores": 2}')
    (tree / "stages/workers/prompts.py").write_text("import sys; open(sys.argv[-1], 'w')")
    for name, text in {"client": "measures", "requests": "0", "calls": ""}.items():
        (tree / name).write_text(text)
    set_params(tree, harness={"points": [1, 3], "pairs": 1})
    # `host:` has the double for genai-perf, and the one library of the clients' environment that the mock needs.
    subprocess.run([REPO / "containers" / "venv", "client"], check=True)
    (packages,) = (REPO / ".venvs" / "client").glob("lib/*/site-packages")
    (tree / "tokenizers").symlink_to(packages / "tokenizers")
    path = f"{RECORDED / 'bench' / 'bin'}:{os.environ['PATH']}"
    command = ["containers/run", "venv:tools", "python", "-m", "stages.harness", "host:"]
    done = run_in(tree, *command, environment={"PATH": path}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "results/embedded/harness"


def test_a_run_keeps_every_second_and_measures_both_ways_in_turns(measured):
    found = json.loads((measured / "harness.json").read_text())
    assert [row["points"] for row in found["sweeps"]] == [1, 3]
    assert [row["by"] for row in found["runs"]] == ["bare client", "sweep", "sweep", "bare client"]
    assert all(row["seconds"] > 0 for row in found["sweeps"] + found["runs"])
    assert found["line"]["point_seconds"] > 0
    slept = found["sleeping_client"]
    assert min(slept["bare"]) >= 3.0 and len(slept["bare"]) == len(slept["watched"]) == 2
    calls = (measured.parents[2] / "calls").read_text().split()
    # The double's figures are those of another load: a sweep tries every point once more, a single point is one.
    assert len(calls) == 2 * (1 + 3) + 4
    assert not list(measured.glob("*/"))  # what was only needed on the way is gone


def test_the_report_says_what_a_start_and_a_point_cost_and_whether_the_overhead_is_below_two_per_cent(tmp_path):
    (tmp_path / "harness").mkdir()
    shutil.copy(RECORDED / "harness.json", tmp_path / "harness")
    data = json.loads((RECORDED / "harness.json").read_text())
    blocks = list(client_accuracy.harness({"runs": {"mine": {"folder": str(tmp_path)}}}))
    ((_, _, rows),) = [block for block in blocks if block[0] == "table"]
    assert [row[0] for row in rows] == ["seconds", "output tokens per second", "ttft ms p50", "itl ms p50"]
    assert rows[0][1] == f"{data['sweep_divided_by_bare_client']['seconds']['ratio']:.4f}"
    assert f"{data['line']['point_seconds']:.1f} s a point" in to_markdown("Title", blocks)
    assert f"the sweep adds {data['sleeping_client']['added_seconds']:.2f} s" in to_markdown("Title", blocks)
    assert list(client_accuracy.harness({"runs": {"none": {"folder": str(tmp_path / "none")}}})) == []
