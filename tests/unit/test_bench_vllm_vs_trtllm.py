"""The comparison, from four runs that were really measured (tests/fixtures/bench/runs)."""

import csv
import json
import shutil
from xml.etree import ElementTree

import pytest
from conftest import REPO, only_error, run_in, set_params

from lib.analysis.summary import summarise_run
from lib.bench import metrics
from lib.core.stage import REPRO, UserError, read_json, write_json
from lib.report.comparison import compared_experiments, draw_comparison, ratio_rows, remarks

RECORDED = REPO / "tests" / "fixtures" / "bench" / "runs"
STAND_IN = "Transformers 5.23.0 continuous batching behind Triton 2.51.0 (stand-in for TensorRT-LLM)"


@pytest.fixture
def runs():
    """{SERVER-EXPERIMENT: points.json} of the recorded runs, to change before they are summed up."""
    return {f"{path.parts[-2]}-{path.parts[-3]}": read_json(path) for path in RECORDED.glob("*/*/points.json")}


@pytest.fixture
def experiments(runs, tmp_path):
    """experiments() gives the experiments of the runs as they stand."""

    def summed_up():
        for name, data in runs.items():
            server, experiment = name.rsplit("-", 1)
            write_json(tmp_path / "bench" / experiment / server / "points.json", data)
        return compared_experiments(summarise_run(tmp_path, {}))

    return summed_up


def ratios_of(experiments, percentile="p50"):
    """{(experiment, load): row} of Triton divided by vLLM."""
    return {(row["experiment"], row["load"]): row for row in ratio_rows(experiments, percentile)}


@pytest.fixture
def compared(tree):
    """compared(change) runs both stages on the recorded runs; change(name, run) may alter them first. Gives the
    folder."""
    folder = tree / "results" / "embedded" / "bench"

    def stage(change=None):
        shutil.copytree(RECORDED, folder)
        for path in folder.glob("*/*/points.json"):
            data = json.loads(path.read_text())
            if change:
                change(f"{data['server']}-{data['model']}", data)
            path.write_text(json.dumps(data))
        for name in ("serving_summary", "bench_vllm_vs_trtllm"):
            stage.done = run_in(tree, "containers/run", "venv:tools", "python", "-m", f"stages.{name}")
        return tree / "results" / "embedded" / "bench_vllm_vs_trtllm"

    stage.tree = tree
    return stage


def without_triton(name, data):
    if data["server"] == "triton":
        data |= {"points": [], "engine": None, "engine_is_stand_in": False, "server_ready_seconds": None}
        data["not_measured"] = "params.yaml: repository.engine is none"


def words(svg):
    """All texts of an SVG."""
    return ["".join(node.itertext()) for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_ratio_is_triton_divided_by_vllm(runs, experiments):
    rows = ratios_of(experiments())
    assert list(rows) == [(model, f"c={level}") for model in ("base", "lora") for level in (1, 2, 4)]
    expected = runs["triton-lora"]["points"][2]["ttft_ms_p50"] / runs["vllm-lora"]["points"][2]["ttft_ms_p50"]
    row = rows["lora", "c=4"]
    assert row["ttft_ms_p50"]["ratio"] == pytest.approx(expected) and row["divided_by"] == "vllm"


def three_times(runs, name, number, figures):
    """The first point of a run with three repeats, whose `number` is one of `figures` each."""
    (repeat,) = runs[name]["points"][0]["repeats"]
    runs[name]["points"][0] = metrics.summarise_repeats([{**repeat, number: figure} for figure in figures])


@pytest.mark.parametrize(
    ("triton", "vllm", "verdict"),
    [
        ([20, 21, 22], [10, 10.2, 10.4], "triton (stand-in) higher"),
        ([5, 5.1, 5.2], [10, 10.2, 10.4], "vllm higher"),
        ([10, 10.1, 10.5], [10.05, 10.2, 10.4], "cannot be told apart"),
        # Apart without overlap, but by less than a server is from itself: 40 % between the repeats of the slow one.
        ([11.1, 11.2, 11.3], [7, 10, 11], "cannot be told apart"),
    ],
)
def test_a_difference_exceeds_interval_and_noise(runs, experiments, triton, vllm, verdict):
    three_times(runs, "triton-base", "ttft_ms_p50", triton)
    three_times(runs, "vllm-base", "ttft_ms_p50", vllm)
    ratio = ratios_of(experiments())["base", "c=1"]["ttft_ms_p50"]
    assert ratio["verdict"] == verdict
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]


def test_two_repeats_give_a_ratio_without_a_verdict(experiments):
    ratio = ratios_of(experiments())["base", "c=1"]["ttft_ms_p50"]
    assert (ratio["low"], ratio["high"], ratio["verdict"]) == (None, None, "no verdict: fewer than 3 repeats")


def test_an_invalid_point_has_no_ratio_and_says_why(runs, experiments):
    runs["vllm-base"]["points"][1] |= {"valid": False, "invalid_reasons": ["2 of 8 requests failed"]}
    found = experiments()
    assert ratios_of(found)["base", "c=2"]["output_tokens_per_second"] is None
    assert "vllm-base, c=2: 2 of 8 requests failed" in remarks(found)


def test_an_invalid_point_is_a_grey_cross(runs, experiments):
    runs["vllm-base"]["points"][1]["valid"] = False
    lines = draw_comparison(experiments(), "p50").axes[0].get_lines()
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2]] and crosses[0].get_color() == "#999999"
    vllm = [line for line in lines if line.get_label().startswith("vllm") and line.get_label().endswith("base")]
    assert [list(line.get_xdata()) for line in vllm] == [[1, 4]]


def test_an_unmeasured_number_is_neither_drawn_nor_divided(runs, experiments):
    for point in runs["vllm-lora"]["points"]:
        for each in (point, *point["repeats"]):
            each["ttft_ms_p99"] = None
    found = experiments()
    rows = ratios_of(found, "p99")
    assert [row["ttft_ms_p99"] for (model, _), row in rows.items() if model == "lora"] == [None] * 3
    panel = draw_comparison(found, "p99").axes[2]
    assert panel.get_title(loc="left") == "first token after ms (p99)"
    assert len(panel.get_lines()) == 3


def test_any_servers_are_compared(runs, experiments):
    runs["sglang-base"] = runs.pop("triton-base")
    runs["sglang-base"] |= {"server": "sglang", "engine_is_stand_in": False}
    rows = ratio_rows(experiments(), "p50")
    assert {(row["server"], row["divided_by"]) for row in rows if row["experiment"] == "base"} == {("sglang", "vllm")}
    labels = [line.get_label() for line in draw_comparison(experiments(), "p50").axes[0].get_lines()]
    assert [label for label in labels if label.startswith("sglang: ")]


def test_the_figure_names_the_stand_in(compared):
    out = compared()
    assert compared.done.returncode == 0, compared.done.stderr
    text = words(out / "comparison.svg")
    assert "SmolLM2-135M-Instruct: 64 tokens in, 32 out" in text
    assert [each for each in text if each.startswith("triton: stand-in engine, ") and each.endswith(", lora")]
    assert [each for each in text if each.startswith("vllm: vLLM 0.32.0, ") and each.endswith(", base")]
    assert {each for each in text if "TensorRT" in each} == {f"triton-base: {STAND_IN}", f"triton-lora: {STAND_IN}"}


def test_all_points_stand_in_table_and_json(compared):
    out = compared()
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["experiment"], row["server"], row["concurrency"]) for row in rows] == [
        (experiment, server, concurrency)
        for experiment in ("base", "lora")
        for server in ("triton (stand-in)", "vllm")
        for concurrency in ("1", "2", "4")
    ]
    written = json.loads((out / "comparison.json").read_text())
    assert [server["engine"] for server in written["servers"]["lora"]] == [STAND_IN, "vLLM 0.32.0"]
    assert len(written["ratios"]) == 6 and written["percentile"] == "p50"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_other_formats_of_weights_are_said_with_the_ratios(runs, experiments):
    assert not [line for line in remarks(experiments()) if "formats" in line]
    runs["triton-base"] |= {"weights_format": "int4-g128", "kv_format": "int8"}
    found = experiments()
    assert (
        "base: the servers hold other formats (triton int4-g128 weights, int8 cache, vllm bf16 weights, bf16 cache), "
        "so their ratios compare these too"
    ) in remarks(found)
    assert not [line for line in remarks(found) if line.startswith("lora: the servers hold")]


def test_a_missing_side_leaves_the_other_and_a_remark(compared):
    out = compared(without_triton)
    assert compared.done.returncode == 0, compared.done.stderr
    text = words(out / "comparison.svg")
    assert "triton-base: not measured (params.yaml: repository.engine is none)" in text
    assert not [each for each in text if each.startswith("triton: ")]
    written = json.loads((out / "comparison.json").read_text())
    assert written["ratios"] == []
    assert written["servers"]["base"][0]["not_measured"] == "params.yaml: repository.engine is none"


def test_nothing_measured_is_still_a_figure(compared):
    def nothing(name, data):
        data |= {"points": [], "engine": None, "engine_is_stand_in": False, "not_measured": "params.yaml: no servers"}

    out = compared(nothing)
    assert compared.done.returncode == 0, compared.done.stderr
    assert "vllm-lora: not measured (params.yaml: no servers)" in words(out / "comparison.svg")


def test_the_same_runs_give_the_same_svg(compared):
    out = compared()
    first = (out / "comparison.svg").read_bytes()
    shutil.rmtree(compared.tree / "results" / "embedded" / "bench")
    compared()
    assert (out / "comparison.svg").read_bytes() == first


def test_other_lengths_are_not_compared(compared):
    def longer(name, data):
        if name.endswith("-lora"):
            data["settings"]["lengths"] = [[64, 256]]

    compared(longer)
    message = f"lengths is [[64, 256]] in lora and [[64, 32]] in base; `{REPRO} bench` measures both alike"
    assert only_error(compared.done) == f"error: the experiments cannot be compared: {message}"


def test_no_benchmark_names_the_command_that_makes_it():
    with pytest.raises(UserError, match=f"there is no benchmark of this checkout; `{REPRO} bench` makes it"):
        compared_experiments({"experiments": {}})


def test_an_unknown_percentile_is_refused(compared):
    set_params(compared.tree, bench_vllm_vs_trtllm={"percentile": "p42"})
    compared()
    expected = "params.yaml: bench_vllm_vs_trtllm.percentile is 'p42'; use one of p50, p90, p95, p99"
    assert only_error(compared.done) == f"error: {expected}"
