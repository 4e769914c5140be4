"""The record of a point: what genai-perf really wrote, the median of repeats, the server's token count."""

import json
import shutil

import pytest
from bench_inputs import RECORDED

from lib.analysis.metrics import METRICS as SHOWN_METRICS
from lib.analysis.metrics import panel_title
from lib.bench import metrics
from lib.core.stage import UserError
from lib.serving.client_summary import METRICS
from lib.serving.clients import GenaiPerf


def read_point(folder):
    return metrics.named_as_points(GenaiPerf().read(folder))


@pytest.fixture
def raw(tmp_path):
    """raw("vllm") is a folder that holds what genai-perf wrote for vLLM, as it lay there."""

    def folder(name, change=None):
        text = (RECORDED / f"{name}_genai_perf.json").read_text()
        (tmp_path / "a-run").mkdir()
        (tmp_path / "a-run" / "profile_export_genai_perf.json").write_text(change(text) if change else text)
        return tmp_path

    return folder


def test_a_point_of_triton_is_what_genai_perf_wrote(raw):
    point = read_point(raw("triton"))
    assert point["requests"] == 8
    assert (point["input_tokens"], point["output_tokens"]) == (64.0, 32.0)
    assert point["output_tokens_per_second"] == pytest.approx(59.08, abs=0.01)
    assert point["requests_per_second"] == pytest.approx(1.846, abs=0.001)
    assert point["request_latency_ms_p99"] == pytest.approx(1095.49, abs=0.01)
    assert point["ttft_ms_p50"] < point["ttft_ms_p99"] < point["request_latency_ms_avg"]


def test_a_point_of_vllm_has_the_same_numbers_as_one_of_triton(raw, tmp_path):
    vllm = read_point(raw("vllm"))
    assert vllm["output_tokens_per_second"] == pytest.approx(107.3, abs=0.1)
    assert vllm["per_user_tokens_per_second"] == pytest.approx(1000 / vllm["itl_ms_avg"], rel=0.02)
    assert None not in vllm.values()


@pytest.mark.parametrize("name", ["truncated", "empty"])
def test_a_json_that_genai_perf_did_not_finish_is_named(raw, name):
    with pytest.raises(UserError, match=r"profile_export_genai_perf\.json: not whole"):
        read_point(raw(name))


def test_no_json_at_all_says_that_genai_perf_did_not_finish(tmp_path):
    with pytest.raises(UserError, match="0 files .*, want 1; genai-perf did not finish; run it again"):
        read_point(tmp_path)


def test_another_unit_stops_the_run(raw):
    folder = raw("vllm", lambda text: text.replace('"ms"', '"us"', 1))
    with pytest.raises(UserError, match="request_latency is in 'us', want 'ms'"):
        read_point(folder)


def test_what_genai_perf_did_not_measure_is_none_and_not_zero(raw):
    def without_streaming(text):
        kept = json.loads(text)
        del kept["time_to_first_token"], kept["inter_token_latency"]
        return json.dumps(kept)

    point = read_point(raw("vllm", without_streaming))
    assert point["ttft_ms_p50"] is None and point["itl_ms_avg"] is None
    assert point["request_latency_ms_p50"] > 0


def test_two_summaries_of_one_point_are_not_averaged_but_refused(raw):
    folder = raw("vllm")
    shutil.copytree(folder / "a-run", folder / "b-run")
    with pytest.raises(UserError, match="2 files .*, want 1; empty the folder and run genai-perf again"):
        read_point(folder)


def repeat(rate, valid=True, **more):
    reasons = [] if valid else ["2 of 8 requests failed"]
    return {"concurrency": 4, "input_tokens_asked": 64, "output_tokens_asked": 32, "variant": "corrected", "repeat": 1,
            "rate": rate, "gpu_watts": None, "tokens_counted_by": "server", "valid": valid, "invalid_reasons":
            reasons, "checks": [], **more}  # fmt: skip


def test_repeats_are_summed_up_as_medians_with_an_interval():
    summed = metrics.summarise_repeats([repeat(9.0), repeat(30.0), repeat(10.0)])
    assert summed["rate"] == 10.0 and summed["intervals"]["rate"] == [9.0, 30.0]
    assert (summed["concurrency"], summed["gpu_watts"], summed["valid"]) == (4, None, True)
    assert len(summed["repeats"]) == 3 and "repeat" not in summed


def test_an_invalid_repeat_stays_out_of_the_median():
    summed = metrics.summarise_repeats([repeat(9.0), repeat(1.0, valid=False), repeat(11.0), repeat(10.0)])
    assert summed["rate"] == 10.0 and summed["intervals"]["rate"][0] == 9.0
    assert summed["valid"] and summed["invalid_reasons"] == ["2 of 8 requests failed"]


def test_no_valid_repeat_no_point_two_repeats_no_interval():
    assert not metrics.summarise_repeats([repeat(9.0, valid=False)] * 3)["valid"]
    assert metrics.summarise_repeats([repeat(9.0), repeat(10.0)])["intervals"] == {}


def test_a_number_that_one_repeat_lacks_has_no_median():
    assert "late" not in metrics.summarise_repeats([repeat(9.0, late=1.0), repeat(10.0, late=None)])


def test_a_point_is_corrected_to_the_servers_count():
    read = {"output_tokens": 33.0, "output_tokens_per_second": 66.0, "requests_per_second": 2.0, "itl_ms_p50": 10.0,
            "per_user_tokens_per_second": 100.0, "ttft_ms_p50": 70.0}  # fmt: skip
    point = metrics.correct(read, 17.0, 500.0)
    assert (point["output_tokens"], point["output_tokens_per_second"]) == (17.0, 34.0)
    assert (point["itl_ms_p50"], point["per_user_tokens_per_second"]) == (20.0, 50.0)  # 32 gaps counted, 16 made
    assert point["ttft_ms_p50"] == 70.0 and point["tokens_per_joule"] == pytest.approx(34 / 500)
    assert (point["client_itl_ms_p50"], point["client_output_tokens_per_second"]) == (10.0, 66.0)
    assert point["tokens_counted_by"] == "server" and "client_ttft_ms_p50" not in point


def test_without_a_servers_count_the_client_is_believed():
    read = {"output_tokens": 33.0, "output_tokens_per_second": 66.0, "requests_per_second": 2.0, "itl_ms_p50": None}
    point = metrics.correct(read, None, 500.0)
    assert {name: point[name] for name in read} == read
    assert point["tokens_counted_by"] == "client" and point["tokens_per_joule"] is None


def test_every_metric_shown_is_one_that_is_measured():
    measured = {name.replace("tpot", "itl") for name, (key, *_) in METRICS.items() if key}
    assert SHOWN_METRICS.keys() <= measured
    for name, metric in SHOWN_METRICS.items():
        unit = "ms" if name.endswith("_ms") else "tokens/s"
        assert unit in metric.column and unit in metric.title
        assert metric.higher_is_better == (unit == "tokens/s")
    assert panel_title("ttft_ms_p50") == "first token after ms (median)" != panel_title("ttft_ms_p99")


def test_points_name_tpot_itl_and_leave_the_gaps_out():
    numbers = {"requests": 8, "failed": 0, "tpot_ms_p50": 5.0, "itl_ms_p50": 7.0}
    assert metrics.named_as_points(numbers) == {"requests": 8, "itl_ms_p50": 5.0}
