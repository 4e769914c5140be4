"""lib/estimate and tools/estimate.py: bands and verdicts on recorded estimates; one test runs the package."""

import json

import pytest
from conftest import REPO, run_in

from lib.claims.claims import load_claims
from lib.claims.settle import settle
from lib.estimate.calibration import bounded_bands, calibration_row, judge, make_bands, point_bands
from lib.estimate.points import card_of, not_calibrated
from lib.report import estimate as chapter
from tools.estimate import asked, table

RECORDED = REPO / "results/reference/kernel-estimates"
RATE = "output_tokens_per_second"


@pytest.fixture(scope="module")
def recorded():
    return json.loads((RECORDED / "estimate/estimates.json").read_text())


def row(weights, users, measured, estimated):
    labels = {"weights_format": weights, "concurrency": users}
    return calibration_row(labels, {RATE: measured}, {RATE: estimated})


def figure(low, high, bounded=False):
    return {"rate": {"value": (low + high) / 2, "low": low, "high": high, "bounded": bounded}}


def test_a_band_reaches_from_least_to_most_and_holds_one():
    bands = make_bands([row("bf16", 4, 120, 100), row("bf16", 16, 150, 100), row("fp8", 4, 80, 100)])
    ends = {band["weights_format"]: (band["low"], band["high"], band["points"]) for band in bands}
    assert ends == {"bf16": (1, 1.5, 2), "fp8": (0.8, 1, 1)}


def test_a_load_without_points_has_no_band():
    bands = make_bands([row("bf16", 1, 120, 100)])
    assert point_bands({"concurrency": 64, RATE: 10}, "bf16", bands) == {}


def test_an_unmeasured_engine_gets_the_widest_band():
    bands = make_bands([row("bf16", 1, 120, 100), row("mxfp4", 1, 90, 100)])
    point = {"concurrency": 1, RATE: 200}
    assert point_bands(point, "bf16", bands)[RATE] == {"low": 200, "high": 240}
    assert point_bands(point, None, bands)[RATE] == {"low": 180, "high": 240}


def test_a_bound_runs_from_the_slowest_format_to_the_limit():
    points = [
        {"band": {RATE: {"low": 100, "high": 150}, "itl_ms_avg": {"low": 5, "high": 8}}},
        {"band": {RATE: {"low": 120, "high": 170}, "itl_ms_avg": {"low": 4, "high": 6}}},
    ]
    bounds = bounded_bands(points, {RATE: 900, "itl_ms_avg": 1})
    assert bounds == {RATE: {"low": 100, "high": 900}, "itl_ms_avg": {"low": 1, "high": 8}}


def test_a_format_without_a_known_limit_has_no_bound():
    assert bounded_bands([{"band": {RATE: {"low": 100, "high": 150}}}], {}) == {}


@pytest.mark.parametrize(
    ("published", "verdict", "where"),
    [(150, "estimate agrees", "inside"), (99, "estimate disagrees", "below"), (201, "estimate disagrees", "above")],
)
def test_a_figure_agrees_inside_the_band_only(published, verdict, where):
    judged = judge(published, figure(100, 200))
    assert judged["verdict"] == verdict and f"lies {where} the band of 100 to 200" in judged["reason"]


def test_a_bound_disagrees_but_never_agrees():
    assert judge(150, figure(100, 200, bounded=True)) is None
    assert judge(99, figure(100, 200, bounded=True))["verdict"] == "estimate disagrees"


def test_a_conclusion_needs_the_same_answer_in_the_whole_band():
    assert judge(None, figure(100, 200), lambda values: values["rate"] > 50)["verdict"] == "estimate agrees"
    assert judge(None, figure(100, 200), lambda values: values["rate"] > 250)["verdict"] == "estimate disagrees"
    assert judge(None, figure(100, 200), lambda values: values["rate"] > 150) is None


def server(**changes):
    gpus = [{"name": "NVIDIA H200"}]
    plain = {"points": [1], "not_measured": None, "engine": "vLLM 0.25.0", "engine_is_stand_in": False}
    return {**plain, "server_command": ["--port"], "made_by": {"gpus": gpus}, **changes}


def test_only_plain_vllm_on_a_known_card_calibrates():
    assert not_calibrated(server()) is None and card_of(server()) == "h200_sxm"
    assert "stand-in" in not_calibrated(server(engine="stand-in", engine_is_stand_in=True))
    assert "card" in not_calibrated(server(made_by={"gpus": []}))
    assert "guesses" in not_calibrated(server(server_command=["--speculative-config={}"]))
    assert not_calibrated(server(points=[], not_measured="no GPU")) == "no GPU"


# On the recorded estimates.


def test_the_recorded_bands_follow_from_the_recorded_rows(recorded):
    assert make_bands(recorded["calibration"]["rows"]) == recorded["calibration"]["bands"]


def test_every_calibration_row_names_what_was_measured(recorded):
    for entry in recorded["calibration"]["rows"]:
        path = (
            REPO / "results/reference" / entry["run"] / "bench" / entry["experiment"] / entry["server"] / "points.json"
        )
        rates = [point[RATE] for point in json.loads(path.read_text())["points"]]
        assert entry["numbers"][RATE]["measured"] in rates


def test_an_estimate_never_passes_as_a_measurement(recorded):
    assert all(
        point["variant"] == "estimated" and point["kernels"] and point["reasons"] for point in recorded["points"]
    )
    assert all("not_measured" in part for part in recorded["gap"]["parts"])


def test_the_writeup_lies_below_every_bound_of_its_deployment():
    _, claims = load_claims(REPO / "data/claims")
    verdicts = {
        claim.id: (settled["verdict"], settled["evidence"])
        for claim in claims
        if claim.estimate
        for settled in [settle(claim, 0.1, {"kernel-estimates": RECORDED})]
    }
    decided = {claim for claim, verdict in verdicts.items() if verdict == ("estimate disagrees", "estimated")}
    assert decided == {"triton-throughput", "stream-c2-throughput"}
    assert ("estimate agrees", "estimated") not in verdicts.values()


def test_the_report_shows_estimates_apart_and_as_such(recorded):
    ledger = {"runs": {"kernel-estimates": {"folder": str(RECORDED)}}}
    point = {"server": "Triton", "numbers": [1156.97], "concurrency": 16}
    summary = {"published": {"points": [point]}, "runs": {}}
    blocks = list(chapter.estimates(ledger, summary))
    texts = " ".join(block[1] for block in blocks if block[0] == "text")
    assert texts.startswith("Estimated, not measured") and "0.59 of the 1,962" in texts
    (figure,) = [block for block in blocks if block[0] == "figure"]
    series = {entry["label"]: entry for entry in figure[2].data["series"]}
    assert list(series) == ["TensorRT-LLM bf16, estimated", "TensorRT-LLM int4, estimated range", "Triton, published"]
    assert all(("estimated" in label) == (entry["kind"] == "estimated") for label, entry in series.items())
    lines = {line.get_label(): line for line in figure[2].figure.axes[0].get_lines()}
    hollow = [label for label, line in lines.items() if line.get_markerfacecolor() == "none"]
    assert hollow == list(series)[:2] and figure[3].count("estimated") >= 1
    assert list(chapter.estimates({"runs": {}}, summary)) == []


# The tool, and the package itself.


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "make estimate CARD="),
        (["h100_sxm", "llama-2-7b", "int3", "1"], "FORMAT is int3; use one of bf16, fp8, mxfp4"),
        (["h100_sxm", "llama-2-7b", "bf16", "1,x"], "USERS is 1,x"),
    ],
)
def test_wrong_words_get_one_line(words, error):
    with pytest.raises(Exception, match=error.replace("(", r"\(")):
        asked(words)


def test_a_point_without_a_band_is_said_to_be_uncalibrated():
    point = {"concurrency": 1, RATE: 100, "per_user_tokens_per_second": 100, "itl_ms_avg": 10}
    assert "not calibrated" in list(table([point], "bf16", "trtllm", []))[1]


def test_the_package_gives_the_recorded_figures(recorded):
    done = run_in(
        REPO,
        *["make", "--no-print-directory", "estimate", "CARD=h100_sxm", "MODEL=llama-2-7b", "FORMAT=bf16", "USERS=1,16"],
    )
    assert done.returncode == 0, done.stderr
    rates = {point["id"]: f"{point[RATE]:,.0f}" for point in recorded["points"]}
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["1", rates["trtllm-bf16-c1"]] in [line[:2] for line in lines]
    assert ["16", rates["trtllm-bf16-c16"]] in [line[:2] for line in lines]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("CARD=mars MODEL=llama-2-7b FORMAT=bf16", "CARD is mars"),
        ("CARD=a100_sxm MODEL=llama-2-7b FORMAT=fp8", "FORMAT is fp8"),
    ],
)
def test_what_has_no_kernels_gets_one_line(words, error):
    done = run_in(REPO, "make", "--no-print-directory", "estimate", *words.split(), "USERS=1")
    assert done.returncode and f"error: {error}" in done.stderr and "Traceback" not in done.stderr
