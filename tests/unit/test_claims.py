"""
Verdicts on the claims. The run `cpu` in fixtures/claims is real output of the embedded profile, shortened, with the
points of its servers filled in; the run `h100` is made up: it has the writeup's conditions, so that claims apply to it.
"""

import json
import shutil
from pathlib import Path

import pytest

from lib.analysis.own_figures import all_checks, card_limits
from lib.claims import judge, kinds
from lib.claims.claims import load_claims, read_claim
from lib.claims.kinds import CARD, CONTRADICTED, OTHER_CARD, UNANSWERED, VERDICTS
from lib.claims.runs import lookup, runs
from lib.claims.settle import settle
from lib.core.stage import UserError, load_yaml, read_json, write_json
from stages import claims

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).parents[1] / "fixtures" / "claims"
H100, CPU = {"h100": RUNS / "h100"}, {"this checkout": RUNS / "cpu"}
WRITEUPS, CLAIMS = load_claims(ROOT / "data" / "claims")
BY_ID = {claim.id: claim for claim in CLAIMS}


def judged(claim_id, runs):
    return settle(BY_ID[claim_id], 0.1, runs)


def a_claim(**fields):
    entry = {
        "id": "a-claim", "says": "x", "value": 1, "unit": "s", "writeup": "fixstars", "section": "x", "conditions": "x",
        "requires": {}, "measure": None,
    }  # fmt: skip
    return read_claim(entry | fields, "claims.yaml: claim a-claim")


def test_a_figure_within_its_tolerance_is_reproduced():
    claim = judged("lora-memory-high", H100)
    assert (claim["verdict"], claim["run"], claim["measured"]) == ("reproduced", "h100", 16800.0)
    assert claim["reason"] == "measured 16,800, published 17,000 MB (nvidia-smi's MiB); ratio 0.9882, tolerance 0.1"
    assert claim["evidence"] == CARD


def test_a_smaller_effect_of_the_same_sign_is_direction_only():
    claim = judged("qlora-memory-change", H100)  # 11,000 of 16,800 MiB, published -55.8 %
    assert claim["verdict"] == "direction only"
    assert "measured -34.52, published -55.8 %" in claim["reason"]


def test_an_effect_of_the_other_sign_is_not_reproduced():
    measure = {
        "expression": "b - a",
        "a": {"file": "finetune/lora/metrics.json", "key": "wall_seconds"},
        "b": {"file": "finetune/qlora/metrics.json", "key": "wall_seconds"},
        "no_effect": 0,
    }
    assert settle(a_claim(value=-300, measure=measure), 0.1, H100)["verdict"] == "not reproduced"


def test_a_figure_outside_its_tolerance_is_not_reproduced():
    claim = judged("qlora-memory", H100)
    assert claim["verdict"] == "not reproduced"
    assert claim["reason"] == "measured 11,000, published 7,577 MB (nvidia-smi's MiB); ratio 1.452, tolerance 0.1"


def test_a_source_contradiction_still_shows_the_measured_value():
    claim = judged("qlora-time-change", H100)
    assert claim["verdict"] == CONTRADICTED
    assert claim["measured"] == pytest.approx(100 * (1500 / 1150 - 1))
    assert "35 % longer" in claim["reason"] and "measured 30.43" in claim["reason"]


def test_a_contradicted_claim_shows_only_comparable_figures():
    claim = judged("qlora-time-change", CPU)
    assert (claim["verdict"], claim["measured"], claim["outcomes"][0]["measured"]) == (CONTRADICTED, None, None)
    assert "measured" not in claim["reason"]


def test_other_conditions_are_not_comparable_with_a_reason():
    claim = judged("lora-wall", CPU)
    assert claim["verdict"] == "not comparable"
    assert "shape llama-2-7b (here SmolLM2-135M-Instruct)" in claim["reason"]
    assert "gpu H100 (here none)" in claim["reason"] and "on SmolLM2-135M-Instruct" in claim["reason"]


def test_a_missing_file_is_not_measured_and_names_its_stage():
    claim = settle(BY_ID["qlora-bytes-per-parameter"], 0.1, {"empty": RUNS / "empty"})
    assert (claim["verdict"], claim["measured"]) == ("not measured", None)
    assert claim["reason"] == "no vram/vram.json; `containers/run venv:tools dvc repro vram` makes it"


def test_a_missing_study_names_its_graph():
    claim = settle(BY_ID["stream-ensemble-faster"], 0.1, {"empty": RUNS / "empty"})
    assert claim["reason"].endswith("`containers/run venv:tools dvc repro studies/dvc.yaml:streaming@triton` makes it")
    assert load_yaml(ROOT / "studies/dvc.yaml")["stages"].keys() <= set(judge.STUDIES)


def test_a_missing_key_is_not_measured_and_never_a_zero():
    measure = {"file": "bench/base/vllm/points.json", "key": "points[concurrency=64].ttft_ms_p50"}
    claim = settle(a_claim(measure=measure), 0.1, CPU)
    assert (claim["verdict"], claim["measured"]) == ("not measured", None)
    assert "holds no points[concurrency=64].ttft_ms_p50" in claim["reason"]


def test_the_reason_of_a_server_that_was_left_out_is_its_own():
    measure = {"file": "bench/lora/triton/points.json", "key": "points[concurrency=1].ttft_ms_p50"}
    assert settle(a_claim(measure=measure), 0.1, CPU)["reason"] == "bench.servers leaves triton out"


def test_an_invalid_point_never_gives_a_verdict():
    measure = {"file": "bench/base/vllm/points.json", "key": "points[concurrency=2].output_tokens_per_second"}
    claim = settle(a_claim(value=99.0, measure=measure), 0.1, CPU)  # the very figure of the invalid point
    assert (claim["verdict"], claim["measured"]) == ("not comparable", None)
    assert "stopped early" in claim["reason"]


@pytest.mark.parametrize("claim_id", [c.id for c in CLAIMS if c.measure and "triton" in json.dumps(c.measure)])
def test_a_stand_in_never_answers_for_tensorrt_llm(claim_id):
    claim = judged(claim_id, CPU)
    assert claim["outcomes"][0]["verdict"] in ("not comparable", "not measured", CONTRADICTED)
    if claim["outcomes"][0]["verdict"] == "not comparable":
        assert "bench/base/triton/points.json is of a stand-in engine, Transformers 5.23.0" in claim["reason"]


def test_a_stand_in_is_refused_even_where_nothing_is_required():
    measure = {"file": "bench/base/triton/points.json", "key": "points[concurrency=1].output_tokens_per_second"}
    assert settle(a_claim(value=37.2, measure=measure), 0.1, CPU)["verdict"] == "not comparable"


def test_the_best_outcome_of_all_runs_is_the_verdict():
    claim = judged("lora-trainable", CPU | H100)
    assert (claim["verdict"], claim["run"]) == ("reproduced", "h100")
    assert [one["verdict"] for one in claim["outcomes"]] == ["not comparable", "reproduced", "reproduced"]


def test_fewest_unmet_conditions_win_if_none_is_comparable(tmp_path):
    for name, gpus, answers in (("a-cpu", [], 3), ("b-gpu", [{"name": "NVIDIA H200"}], 3)):
        write_json(tmp_path / name / "s.json", {"made_by": {"gpus": gpus}, "answers": answers, "speed": len(gpus)})
    measure = {"file": "s.json", "key": "speed"}
    claim = a_claim(value=9, measure=measure, requires={"gpu": "H200", "answers": 100})
    found = settle(claim, 0.1, {name: tmp_path / name for name in ("a-cpu", "b-gpu")})
    assert (found["run"], found["verdict"], found["measured"]) == ("b-gpu", "not comparable", 1)


def test_a_conclusion_is_answered_by_a_comparison():
    refuted = judged("stream-same-throughput", H100)
    assert refuted["verdict"] == "not reproduced"
    assert refuted["reason"] == "`two < 1.1 * one` does not hold: one 180, two 350.20"


def test_servers_are_compared_in_the_same_weight_format(tmp_path):
    mixed = judged("triton-beats-vllm", H100)  # 4 bits on Triton, 16 on vLLM
    assert mixed["verdict"] == "not comparable" and "weights_format int4-g128 (here " in mixed["reason"]
    shutil.copytree(H100["h100"], tmp_path / "h100")
    path = tmp_path / "h100/bench/base/vllm/points.json"
    write_json(path, {**read_json(path), "weights_format": "int4-g128"})
    assert judged("triton-beats-vllm", {"h100": tmp_path / "h100"})["verdict"] == "reproduced"


def test_arithmetic_needs_no_run_and_is_judged_up_to_rounding():
    claim = judged("lora-trainable", {})
    assert (claim["verdict"], claim["run"], claim["measured"]) == ("reproduced", "arithmetic", 9994240)
    assert settle(a_claim(value=99, computed="10 * 10"), 0.1, {})["verdict"] == "not reproduced"


def test_a_run_ranks_before_arithmetic_with_the_same_verdict():
    assert judged("lora-trainable", H100)["run"] == "h100"


def test_every_fine_tuning_variant_of_a_run_is_tried(tmp_path):
    shutil.copytree(RUNS / "h100", tmp_path / "run")
    shutil.move(tmp_path / "run" / "finetune" / "lora", tmp_path / "run" / "finetune" / "lora-published")
    claim = judged("lora-wall", {"h100": tmp_path / "run"})
    assert (claim["verdict"], claim["run"]) == ("reproduced", "h100 (published variant)")


def test_a_result_file_that_is_cut_short_is_named(tmp_path):
    shutil.copytree(RUNS / "h100", tmp_path / "run")
    path = tmp_path / "run" / "vram" / "vram.json"
    path.write_text(path.read_text()[:400])
    with pytest.raises(UserError, match="vram/vram.json: not whole"):
        judged("lora-gradients-negligible", {"h100": tmp_path / "run"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sayz": "x"}, "claim a-claim has no field 'sayz'; it has id, says,"),
        ({"value": "12"}, "claim a-claim: value is '12'"),
        ({"id": "A Claim"}, "want kebab-case"),
        ({"measure": {"file": "a.json"}}, r"measure.figure is {'file': 'a.json'}, want {file, key}"),
        ({"measure": {"expression": "1 + 1"}}, "measure reads no figure of a run"),
        ({"computed": "__import__('os')"}, "neither arithmetic nor a figure"),
        ({"computed": "1 +"}, "is not arithmetic"),
        ({"computed": "1 < 2"}, "must be a comparison just where value is null"),
        ({"source": {"answer": "confirmed"}}, "source has answer; want answer, "),
        ({"source": {"answer": "yes", "test": "t", "says": "x"}}, "source.answer is 'yes', want confirmed or refuted"),
        ({"consistent": {"equals": "a"}}, "consistent wants one of equals, "),
        ({"consistent": {"holds": "1 < 2", "rule": "x"}}, "consistent.holds is for a claim without a value"),
        ({"estimate": {"file": "a.json"}}, r"measure.figure is {'file': 'a.json'}"),
    ],
)
def test_a_wrong_claim_is_named_with_its_field(fields, message):
    with pytest.raises(UserError, match=message):
        a_claim(**fields)


def test_a_claim_that_stands_twice_is_refused(tmp_path):
    shutil.copytree(ROOT / "data" / "claims", tmp_path / "claims")
    path = tmp_path / "claims" / "five-methods.yaml"
    again = next(line for line in path.read_text().splitlines() if "id: five-speed-up" in line)
    path.write_text(path.read_text() + again + "\n")
    with pytest.raises(UserError, match="claim five-speed-up stands twice"):
        load_claims(tmp_path / "claims")


# Figures that a reader of the writeups will look for, read off the texts by hand.
KEY_FIGURES = {
    "fixstars": [
        130, 780, 650, 510, 12, 84, 60, 8, 14000, 9994240, 6748409856, 0.1481, 1400, 111, 15100, 17000, 1192.129,
        1423.559, 7.7, 0.7, 6.9, 7577, 1611.628, 1720.509, 14.316, 10, -55.8, 5, 21, 23, 28, 0.0154, 0.0169,
        0.0119, 0.0125, 83, 211, 512, 167.38, 167.79, 159.31, 32.13, 74.48, 269.56, 14.00, 12.34, 17.17, 16.47, 14.78,
        14.37, 6.09, 1398.62, 20.44, 1576.10, 5.83, 173.18, 217.57, 240, 338, 512.08, 171.29, 0.71, 38, 1364.90, 20.01,
        1589.75, 5.97, 2745.78, 3134.24, 5.81, 173.70, 217.99, 172.09, 0.72, 1156.97, 813.81, 0.5, 256, 16, 2,
        0.9, 210, 4,
    ],
    "nvidia-trtllm": [2, 3, 16, 1],
    "five-methods": [
        44.36, 43.60, 48.97, 65.59, 74.76, 102.69, 7984.71, 1.3, 2.97, 2, 3, 10, 20, 74, 102, 300, 319, 187,
        1.83, 32.78, 2.87, 1.56,
    ],
    "nvidia-lora": [51200000, 400000, 10, 8, 28, 22],
    "vllm-supercharge": [24, 2, 5, 1500000000, 5600000, 1],
}  # fmt: skip


@pytest.mark.parametrize("writeup", KEY_FIGURES)
def test_every_key_figure_of_a_writeup_stands_in_the_claims(writeup):
    values = {claim.value for claim in CLAIMS if claim.writeup == writeup}
    assert sorted(set(KEY_FIGURES[writeup]) - values) == []


def test_both_tables_of_the_streaming_chapter_are_whole():
    for concurrency in (1, 2):
        rows = [claim for claim in CLAIMS if claim.id.startswith(f"stream-c{concurrency}-")]
        assert len(rows) == 7 * 6 + 3  # seven metrics with six statistics, three with one figure


def test_a_measured_figure_says_why_it_is_comparable():
    free = [c.id for c in CLAIMS if c.measure and not c.requires and c.value is not None]
    files = {where["file"] for name in free for where in BY_ID[name].figures.values()}
    assert files <= {"vram/vram.json"}  # a prediction belongs to no machine


def test_the_stage_works_in_a_clone_without_any_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data" / "claims", tmp_path / "data" / "claims")
    (tmp_path / "params.yaml").write_text("profile: embedded\nclaims: {tolerance: 0.1}\n")
    claims.main()
    settled = json.loads((tmp_path / "results/embedded/claims/claims.json").read_text())
    assert settled["runs"] == {}
    assert sum(settled["counts"].values()) == len(settled["claims"]) == len(CLAIMS)
    assert set(settled["counts"]) == set(VERDICTS)
    assert "not comparable" not in capsys.readouterr().out


def test_the_exact_adapter_proof_is_read_from_gpu_and_cpu_runs():
    for run in ("h200-walk-adapters", "embedded-2-cores"):
        data = read_json(ROOT / "results/reference" / run / "multilora/vllm/multilora.json")
        assert lookup(data, "proof.float32|batch-invariant.same_as_alone") == 6
    assert lookup({"proof": {"served": {"requests": 6}}}, "proof.float32|batch-invariant.requests") is None


# Kinds of verdicts and evidence.


def write_speeds(folder, **speeds):
    """Runs named cpu, h100 and h200 with the given speed each."""
    cards = {"cpu": [], "h100": [{"name": "NVIDIA H100 80GB HBM3"}], "h200": [{"name": "NVIDIA H200"}]}
    for name, speed in speeds.items():
        write_json(folder / name / "s.json", {"made_by": {"gpus": cards[name]}, "speed": speed})
    return {name: folder / name for name in speeds}


SPEED = {"file": "s.json", "key": "speed"}


def test_every_verdict_and_evidence_has_a_definition_and_a_place():
    assert sorted(verdict for group in kinds.ORDER for verdict in group) == sorted(VERDICTS)
    assert all(len(says) > 10 for says in [*VERDICTS.values(), *kinds.EVIDENCE.values()])


def test_the_published_gpu_ranks_before_others_and_a_cpu(tmp_path):
    claim = a_claim(value=10, measure=SPEED)
    claim.card = "H100"
    settled = settle(claim, 0.1, write_speeds(tmp_path, cpu=10, h200=10, h100=99))
    assert (settled["run"], settled["verdict"], settled["evidence"]) == ("h100", "not reproduced", CARD)
    settled = settle(claim, 0.1, write_speeds(tmp_path, cpu=10, h200=99))
    assert (settled["run"], settled["verdict"], settled["evidence"]) == ("h200", "not reproduced", OTHER_CARD)


def test_runs_with_equal_evidence_that_disagree_are_named(tmp_path):
    write_json(tmp_path / "a" / "s.json", {"speed": 10})
    write_json(tmp_path / "b" / "s.json", {"speed": 50})
    settled = settle(a_claim(value=10, measure=SPEED), 0.1, {name: tmp_path / name for name in "ab"})
    assert settled["verdict"] == "reproduced"
    assert settled["reason"].endswith("other runs differ (b: not reproduced, 50)")


def test_on_another_card_a_ratio_shows_the_direction_and_says_so(tmp_path):
    fields = {"measure": {"expression": "a > 1", "a": SPEED}, "requires": {"gpu": "RTX 3080 Laptop"}}
    claim = a_claim(value=None, unit=None, elsewhere=["gpu"], **fields)
    settled = settle(claim, 0.1, write_speeds(tmp_path, h200=2))
    assert (settled["verdict"], settled["evidence"]) == ("direction only", OTHER_CARD)
    assert settled["reason"].startswith("not on the writeup's machine: gpu RTX 3080 Laptop (here NVIDIA H200)")
    assert settle(a_claim(value=None, unit=None, **fields), 0.1, write_speeds(tmp_path, h200=2))["verdict"] == (
        "not comparable"
    )


def test_a_point_that_a_stand_in_lacks_is_not_measured(tmp_path):
    write_json(tmp_path / "run" / "s.json", {"engine_is_stand_in": True, "engine": "x"})
    assert settle(a_claim(measure=SPEED), 0.1, {"run": tmp_path / "run"})["verdict"] == "not measured"


def test_an_estimate_ranks_between_a_run_and_other_conditions(tmp_path):
    write_json(tmp_path / "run" / "e.json", {"speed": 10.4})
    fields = {"value": 10, "estimate": {"file": "e.json", "key": "speed"}, "measure": SPEED}
    alone = settle(a_claim(**fields), 0.1, {"run": tmp_path / "run"})
    assert (alone["verdict"], alone["evidence"], alone["measured"]) == ("estimate agrees", "estimated", 10.4)
    write_json(tmp_path / "run" / "e.json", {"speed": 20})
    assert settle(a_claim(**fields), 0.1, {"run": tmp_path / "run"})["verdict"] == "estimate disagrees"
    write_json(tmp_path / "run" / "s.json", {"speed": 11})
    assert settle(a_claim(**fields), 0.1, {"run": tmp_path / "run"})["evidence"] == kinds.CPU


def test_a_source_answers_where_no_run_does():
    settled = judged("lowrank-random-start", H100)
    assert (settled["verdict"], settled["evidence"]) == ("refuted by source", "source")
    assert settled["run"] == "huggingface/peft@v0.17.1 src/peft/tuners/lora/layer.py:269"


def test_every_test_that_settles_a_claim_is_there():
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = [claim.source["test"] for claim in CLAIMS if claim.source and "test" in claim.source]
    assert named and [name for name in named if f"def {name}(" not in text] == []


def settle_all(monkeypatch):
    """Every claim with its verdict by the published runs."""
    monkeypatch.chdir(ROOT)
    published = runs(ROOT / "results/none")
    checks = all_checks(CLAIMS, card_limits(CLAIMS, published))
    return [settle(claim, 0.1, published, checks) for claim in CLAIMS]


def test_at_most_a_tenth_is_unanswered_and_each_names_a_command(monkeypatch):
    settled = settle_all(monkeypatch)
    unanswered = [claim for claim in settled if claim["verdict"] in UNANSWERED]
    assert len(unanswered) <= 0.1 * sum(claim["verdict"] != "opinion" for claim in settled)
    assert [claim["id"] for claim in unanswered if not claim["command"]] == []


def test_the_published_tables_agree_with_themselves_and_the_card(monkeypatch):
    settled = {claim["id"]: claim for claim in settle_all(monkeypatch)}
    cells = [claim for claim in settled.values() if claim["table"]]
    own = [one["verdict"] for claim in cells for one in claim["outcomes"] if one["run"] == "its own figures"]
    assert own == ["consistent"] * 90 and len(cells) == 90
    # The estimate ranks above it: two users would get more from TensorRT-LLM's kernels than the table has.
    others = {claim["id"]: claim["verdict"] for claim in cells if claim["verdict"] != "consistent"}
    assert others == {"stream-c2-throughput": "estimate disagrees"}
    assert "the card's own limit for this load: 171.29 beside" in settled["stream-c1-throughput"]["reason"]
    assert settled["five-vllm-seconds"]["verdict"] == "inconsistent"
    assert "five-sample-tokens and five-vllm" in settled["five-vllm-seconds"]["reason"]
