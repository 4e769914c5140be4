"""The comparison, from four runs that were really measured (tests/fixtures/bench/runs)."""

import csv
import json
import shutil
from xml.etree import ElementTree

import pytest
from conftest import REPO, only_error, run_in, set_params

from lib.bench import metrics
from lib.core.stage import UserError
from stages.bench_vllm_vs_trtllm import BenchVllmVsTrtllm, figure, ratios, read_runs, remarks

RECORDED = REPO / "tests" / "fixtures" / "bench" / "runs"
STAND_IN = "Transformers 5.23.0 continuous batching behind Triton 2.51.0 (stand-in for TensorRT-LLM)"


@pytest.fixture
def runs():
    return read_runs(RECORDED)


@pytest.fixture
def compared(tree):
    """compared(change) runs the stage on the recorded runs; change(runs) may alter them first. Gives the out folder."""
    folder = tree / "results" / "embedded" / "bench"

    def stage(change=None):
        shutil.copytree(RECORDED, folder)
        for path in folder.glob("*/*/points.json"):
            run = json.loads(path.read_text())
            if change:
                change(f"{run['server']}-{run['model']}", run)
            path.write_text(json.dumps(run))
        stage.done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.bench_vllm_vs_trtllm")
        return tree / "results" / "embedded" / "bench_vllm_vs_trtllm"

    stage.tree = tree
    return stage


def without_triton(name, run):
    if run["server"] == "triton":
        run |= {"points": [], "engine": None, "engine_is_stand_in": False, "server_ready_seconds": None}
        run["not_measured"] = "params.yaml: repository.engine is none"


def words(svg):
    """All texts of an SVG."""
    return ["".join(node.itertext()) for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_ratio_is_triton_divided_by_vllm_at_the_same_model_and_concurrency(runs):
    rows = ratios(runs, "p50")
    assert [(row["model"], row["concurrency"]) for row in rows] == [(m, c) for m in ("base", "lora") for c in (1, 2, 4)]
    point = {name: run["points"][2] for name, run in runs.items()}
    ours = [row for row in rows if (row["model"], row["concurrency"]) == ("lora", 4)][0]
    expected = point["triton-lora"]["ttft_ms_p50"] / point["vllm-lora"]["ttft_ms_p50"]
    assert ours["ttft_ms_p50"]["ratio"] == pytest.approx(expected) and ours["both_valid"]


def test_the_throughput_is_compared_by_the_tokens_that_the_servers_counted(runs):
    # genai-perf counted half of the tokens that vLLM made.
    (one,) = runs["vllm-base"]["points"][0]["repeats"]
    one["output_tokens_per_second"] /= 2
    (triton,) = runs["triton-base"]["points"][0]["repeats"]
    expected = triton["server_output_tokens_per_second"] / one["server_output_tokens_per_second"]
    assert ratios(runs, "p50")[0]["output_tokens_per_second"]["ratio"] == pytest.approx(expected)
    one["server_output_tokens_per_second"] = None
    assert ratios(runs, "p50")[0]["output_tokens_per_second"]["ratio"] == pytest.approx(2 * expected, rel=0.01)


def three_times(runs, name, number, figures):
    """The first point of a run with three repeats, whose `number` is one of `figures` each."""
    point = runs[name]["points"][0]
    (one,) = point["repeats"]
    point["repeats"] = [{**one, number: figure} for figure in figures]
    runs[name]["points"][0] = metrics.summed_up(point["repeats"])


@pytest.mark.parametrize(
    ("triton", "vllm", "verdict"),
    [
        ([20, 21, 22], [10, 10.2, 10.4], "Triton higher"),
        ([5, 5.1, 5.2], [10, 10.2, 10.4], "vLLM higher"),
        ([10, 10.1, 10.5], [10.05, 10.2, 10.4], "cannot be told apart"),
        # Apart without overlap, but by less than a server is from itself: 40 % between the repeats of the slow one.
        ([11.1, 11.2, 11.3], [7, 10, 11], "cannot be told apart"),
    ],
)
def test_a_difference_has_to_leave_the_interval_and_the_noise_of_equal_runs(runs, triton, vllm, verdict):
    three_times(runs, "triton-base", "ttft_ms_p50", triton)
    three_times(runs, "vllm-base", "ttft_ms_p50", vllm)
    found = ratios(runs, "p50")[0]["ttft_ms_p50"]
    assert found["verdict"] == verdict
    assert found["low"] <= found["ratio"] <= found["high"]


def test_fewer_than_three_repeats_give_a_ratio_without_interval_and_verdict(runs):
    found = ratios(runs, "p50")[0]["ttft_ms_p50"]
    assert (found["low"], found["high"], found["verdict"]) == (None, None, "no verdict: fewer than 3 repeats")


def test_an_invalid_point_has_no_ratio_and_says_why(runs):
    runs["vllm-base"]["points"][1] |= {"valid": False, "invalid_reasons": ["2 of 8 requests failed"]}
    row = ratios(runs, "p50")[1]
    assert (row["concurrency"], row["both_valid"], row["output_tokens_per_second"]) == (2, False, None)
    assert "vllm-base, concurrency 2: 2 of 8 requests failed" in remarks(runs)


def test_an_invalid_point_is_drawn_grey_and_apart_from_the_line(runs):
    runs["vllm-base"]["points"][1]["valid"] = False
    lines = figure(runs, "p50").axes[0].get_lines()
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2]] and crosses[0].get_color() == "#999999"
    vllm = [line for line in lines if line.get_label().startswith("vLLM") and line.get_label().endswith("base")]
    assert [list(line.get_xdata()) for line in vllm] == [[1, 4]]


def test_a_number_that_was_not_measured_is_neither_drawn_nor_a_ratio(runs):
    for point in runs["vllm-lora"]["points"]:
        for one in (point, *point["repeats"]):
            one["ttft_ms_p99"] = None
    assert [row["ttft_ms_p99"] for row in ratios(runs, "p99") if row["model"] == "lora"] == [None] * 3
    panel = figure(runs, "p99").axes[2]
    assert panel.get_title(loc="left") == "time to first token, ms (p99)"
    assert len(panel.get_lines()) == 3


def test_the_figure_names_the_stand_in_and_never_tensorrt_llm_as_what_was_measured(compared):
    out = compared()
    assert compared.done.returncode == 0, compared.done.stderr
    text = words(out / "comparison.svg")
    assert "SmolLM2-135M-Instruct: 64 tokens in, 32 out" in text
    assert {"Triton, stand-in engine, base", "Triton, stand-in engine, lora", "vLLM 0.32.0, base"} <= set(text)
    assert {one for one in text if "TensorRT" in one} == {f"triton-base: {STAND_IN}", f"triton-lora: {STAND_IN}"}


def test_all_points_stand_in_the_table_and_in_the_json(compared):
    out = compared()
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["server"], row["model"], row["concurrency"]) for row in rows] == [
        (server, model, concurrency)
        for model in ("base", "lora")
        for server in ("triton", "vllm")
        for concurrency in ("1", "2", "4")
    ]
    assert {row["engine"] for row in rows} == {STAND_IN, "vLLM 0.32.0"}
    written = json.loads((out / "comparison.json").read_text())
    recorded = json.loads((RECORDED / "lora" / "vllm" / "points.json").read_text())
    assert written["runs"]["vllm-lora"]["points"] == recorded["points"]
    assert len(written["triton_divided_by_vllm"]) == 6 and written["percentile"] == "p50"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_one_side_that_was_not_measured_leaves_the_other_and_a_remark(compared):
    out = compared(without_triton)
    assert compared.done.returncode == 0, compared.done.stderr
    text = words(out / "comparison.svg")
    assert "triton-base: not measured (params.yaml: repository.engine is none)" in text
    assert not [one for one in text if one.startswith("Triton")] and "vLLM 0.32.0, lora" in text
    written = json.loads((out / "comparison.json").read_text())
    assert written["triton_divided_by_vllm"] == []
    assert written["runs"]["triton-base"]["not_measured"] == "params.yaml: repository.engine is none"


def test_nothing_measured_at_all_is_still_a_figure_that_says_so(compared):
    def nothing(name, run):
        run |= {"points": [], "engine": None, "engine_is_stand_in": False, "not_measured": "params.yaml: no servers"}

    out = compared(nothing)
    assert compared.done.returncode == 0, compared.done.stderr
    assert "vllm-lora: not measured (params.yaml: no servers)" in words(out / "comparison.svg")


def test_the_same_runs_give_the_same_svg(compared):
    out = compared()
    first = (out / "comparison.svg").read_bytes()
    shutil.rmtree(compared.tree / "results" / "embedded" / "bench")
    compared()
    assert (out / "comparison.svg").read_bytes() == first


def test_runs_of_other_lengths_are_not_compared(compared):
    def longer(name, run):
        if name == "vllm-lora":
            run["output_tokens_asked"] = 256

    compared(longer)
    message = "output_tokens_asked is 256 in vllm-lora and 32 in triton-base; `dvc repro bench` measures both alike"
    assert only_error(compared.done) == f"error: results/embedded/bench: {message}"


def test_no_runs_at_all_says_who_makes_them(tmp_path):
    with pytest.raises(UserError, match="no benchmark there; `dvc repro bench` makes them"):
        read_runs(tmp_path)


def test_a_percentile_that_was_not_kept_is_refused(compared):
    set_params(compared.tree, bench_vllm_vs_trtllm={"percentile": "p42"})
    compared()
    expected = "params.yaml: bench_vllm_vs_trtllm.percentile is 'p42'; use one of p50, p90, p95, p99"
    assert only_error(compared.done) == f"error: {expected}"
    assert BenchVllmVsTrtllm(percentile="p99").percentile == "p99"
