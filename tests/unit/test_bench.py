"""The sweep: numbers from what genai-perf really wrote, and what happens when a server or a client goes wrong."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import REPO, every_input, run_in, set_params, write_files

from lib.bench import metrics
from lib.bench.experiments import Bench, Clock, Point, coarse_to_fine, seconds_of, visits, with_experiment
from lib.bench.sweep import key, sweep
from lib.bench.validity import certificate, steady
from lib.core.parent import exit_words
from lib.core.stage import UserError, write_json
from lib.serving import process as serving_process
from lib.serving import servers
from lib.serving.clients import client_command
from lib.serving.monitor import Watch, cores

RECORDED = REPO / "tests" / "fixtures" / "bench"
PARAMS = {"experiments": {"base": "base"}, "definitions": {"base": {}, "old": {"pinned": False, "endpoint": "chat"}},
          "configurations": {"fp8": ["--quantization=fp8"]},
          "client_variants": {"corrected": {}, "short": {"min_requests": 2}},
          "variants": ["corrected"], "servers": ["triton", "vllm"], "model": "base",
          "lengths": [[64, 32]], "concurrency": [1, 2, 4], "repeats": 1, "requests_per_stream": 4, "min_requests": 8,
          "warmup_requests": 2, "endpoint": "completions", "prompts": "unique", "pinned": True, "seed": 42,
          "ready_seconds": 20, "point_seconds": 20, "server_options": []}  # fmt: skip


# One point


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
    point = metrics.read_point(raw("triton"))
    assert point["requests"] == 8
    assert (point["input_tokens"], point["output_tokens"]) == (64.0, 32.0)
    assert point["output_tokens_per_second"] == pytest.approx(59.08, abs=0.01)
    assert point["requests_per_second"] == pytest.approx(1.846, abs=0.001)
    assert point["request_latency_ms_p99"] == pytest.approx(1095.49, abs=0.01)
    assert point["ttft_ms_p50"] < point["ttft_ms_p99"] < point["request_latency_ms_avg"]


def test_a_point_of_vllm_has_the_same_numbers_as_one_of_triton(raw, tmp_path):
    vllm = metrics.read_point(raw("vllm"))
    assert vllm["output_tokens_per_second"] == pytest.approx(107.3, abs=0.1)
    assert vllm["per_user_tokens_per_second"] == pytest.approx(1000 / vllm["itl_ms_avg"], rel=0.02)
    assert None not in vllm.values()


@pytest.mark.parametrize("name", ["truncated", "empty"])
def test_a_json_that_genai_perf_did_not_finish_is_named(raw, name):
    with pytest.raises(UserError, match=r"profile_export_genai_perf\.json: not whole"):
        metrics.read_point(raw(name))


def test_no_json_at_all_says_that_genai_perf_did_not_finish(tmp_path):
    with pytest.raises(UserError, match="0 files .*, want 1; genai-perf did not finish this point"):
        metrics.read_point(tmp_path)


def test_another_unit_stops_the_run(raw):
    folder = raw("vllm", lambda text: text.replace('"ms"', '"us"', 1))
    with pytest.raises(UserError, match="request_latency is in 'us', want 'ms'"):
        metrics.read_point(folder)


def test_what_genai_perf_did_not_measure_is_none_and_not_zero(raw):
    def without_streaming(text):
        kept = json.loads(text)
        del kept["time_to_first_token"], kept["inter_token_latency"]
        return json.dumps(kept)

    point = metrics.read_point(raw("vllm", without_streaming))
    assert point["ttft_ms_p50"] is None and point["itl_ms_avg"] is None
    assert point["request_latency_ms_p50"] > 0


def single_requests(tmp_path, name, change=lambda text: text):
    """A folder with what genai-perf kept of 12 requests to a server that answers in 80 ms; of the drifting one the
    first six took 280 ms."""
    (tmp_path / "profile_export.json").write_text(change((RECORDED / f"{name}_profile_export.json").read_text()))
    return metrics.latencies(tmp_path)


@pytest.mark.parametrize(("name", "verdict", "first"), [("steady", "pass", 0.08), ("drifting", "fail", 0.28)])
def test_a_server_that_gets_faster_while_it_is_measured_is_found_in_genai_perfs_own_record(
    tmp_path, name, verdict, first
):
    latencies = single_requests(tmp_path, name)
    assert len(latencies) == 12 and latencies[0] == pytest.approx(first, rel=0.05)
    assert steady(latencies)[0] == verdict


def test_requests_count_in_the_order_of_sending_and_not_of_the_file(tmp_path):
    def backwards(text):
        data = json.loads(text)
        data["experiments"][0]["requests"].reverse()
        return json.dumps(data)

    assert single_requests(tmp_path, "drifting", backwards) == single_requests(tmp_path, "drifting")


def test_a_record_of_single_requests_that_is_cut_short_is_named(tmp_path):
    with pytest.raises(UserError, match=r"profile_export\.json: not whole"):
        single_requests(tmp_path, "steady", lambda text: text[:5000])


def test_two_summaries_of_one_point_are_not_averaged_but_refused(raw):
    folder = raw("vllm")
    shutil.copytree(folder / "a-run", folder / "b-run")
    with pytest.raises(UserError, match="2 files .*, want 1; measure this point again, in an empty folder"):
        metrics.read_point(folder)


# Is it the work that was asked for?

POINT = {"requests": 8, "input_tokens": 64.0, "output_tokens": 32.0, "requests_per_second": 2.0,
         "request_latency_ms_avg": 2000.0}  # fmt: skip
ASKED = {"requests": 8, "warmup": 4, "concurrency": 4, "input_tokens": 64, "output_tokens": 32}
COUNTED = {"input_tokens": 768.0, "output_tokens": 384.0, "requests": 12.0, "cache_hits": 0.0}
SEEN = {"client_cores": 0.1, "other_cores": 0.1, "gpu_slowed": [], "gpu_sm_mhz": 1980.0, "gpu_watts": 650.0,
        "gpu_celsius_max": 61, "gpu_capped": 0.25}  # fmt: skip


def checked(point=None, asked=None, counted=None, seen=None, strangers=(), latencies=(2.0,) * 12):
    """{check: (verdict, reason)} of a good point on a GPU with some of its figures changed."""
    counted = COUNTED | (counted or {})
    counted = {name: value for name, value in counted.items() if value is not None}
    point, asked, seen = POINT | (point or {}), ASKED | (asked or {}), SEEN | (seen or {})
    checks = certificate(point, asked, counted, seen, strangers, latencies)
    return {one["check"]: (one["verdict"], one["reason"]) for one in checks}


def test_a_point_that_did_what_was_asked_on_a_quiet_gpu_passes_every_check():
    assert {verdict for verdict, _ in checked().values()} == {"pass"}


@pytest.mark.parametrize(
    ("change", "check", "verdict", "reason"),
    [
        ({"point": {"requests": 6}}, "requests", "fail", "2 of 8 requests failed"),
        ({"counted": {"output_tokens": 372.0}}, "output length", "fail",
         "the server counted 31.00 output tokens a request, 32 were asked for"),
        # genai-perf tokenises the text again, which may have another spelling: the server's count decides.
        ({"point": {"output_tokens": 30.0}}, "output length", "pass",
         "the server counted 32.00 output tokens a request, 32 were asked for"),
        ({"point": {"output_tokens": 30.0}, "counted": {"output_tokens": None}}, "output length", "fail",
         "the client counted 30.00 output tokens a request, 32 were asked for"),
        ({"counted": {"input_tokens": 900.0}}, "input length", "fail",
         "the server counted 75.00 input tokens a request, 64 were asked for"),
        ({"point": {"input_tokens": None}, "counted": {"input_tokens": None}}, "input length", "unknown",
         "neither server nor client counted input tokens"),
        ({"counted": {"cache_hits": 320.0}}, "prefix cache", "fail", "320 prompt tokens came from the prefix cache"),
        ({"counted": {"cache_hits": None}}, "prefix cache", "unknown",
         "the server does not tell how many prompt tokens it had cached"),
        ({"latencies": (3.0,) * 4 + (2.0,) * 8}, "steady", "fail",
         "the first third of the requests took 3 s each, the last 2 s (medians)"),
        ({"latencies": (2.0,) * 8 + (2.51,) * 4}, "steady", "fail", "the first third"),
        ({"latencies": (2.4,) * 4 + (9.0, 2.0, 2.0, 2.0) * 2}, "steady", "pass", "the first third"),
        ({"latencies": (9.0, 2.0) * 5}, "steady", "unknown", "10 requests are too few to tell, 12 are enough"),
        ({"latencies": None}, "steady", "unknown", "the client kept no single requests"),
        ({"asked": {"warmup": 0}}, "warm-up", "fail", "0 requests before those that count"),
        ({"point": {"requests_per_second": 1.2}}, "concurrency", "fail",
         "2.40 requests in flight on average, 4 were asked for"),
        ({"point": {"request_latency_ms_avg": None}}, "concurrency", "unknown", "the client gave no latency"),
        ({"seen": {"client_cores": 900.0}}, "client", "fail", "the client used 900.00 of"),
        ({"seen": {"other_cores": 900.0}}, "other programs", "fail", "other programs used 900.00 of"),
        ({"seen": {"other_cores": None}}, "other programs", "unknown", "the load was too short to see what other"),
        ({"strangers": [4711]}, "GPU alone", "fail", "processes 4711 were on the GPU before"),
        ({"strangers": None}, "GPU alone", "unknown", "no NVIDIA GPU"),
        ({"seen": {"gpu_slowed": ["hardware thermal slowdown"]}}, "GPU clocks", "fail",
         "hardware thermal slowdown; 1980 MHz, 650 W, at most 61 °C"),
        ({"seen": {"gpu_slowed": None}}, "GPU clocks", "unknown", "no NVIDIA GPU"),
    ],
)  # fmt: skip
def test_each_way_to_measure_something_else_is_found_and_named(change, check, verdict, reason):
    found = checked(**change)
    assert found[check][0] == verdict and found[check][1].startswith(reason)
    assert [name for name, (other, _) in found.items() if other != "pass"] in ([check], [])


def test_a_card_at_its_own_power_limit_is_valid_and_says_how_often():
    assert checked()["GPU clocks"][1].endswith("at its power limit in 25% of the samples")


def sample(seconds, running, client, server, everything):
    return {"seconds": seconds, "running": running, "client_cpu_seconds": client, "server_cpu_seconds": server,
            "all_cpu_seconds": everything}  # fmt: skip


def test_the_cpu_of_client_server_and_others_is_told_apart_while_requests_run():
    watch = Watch(servers.Vllm("base", every_input()), list)
    watch.samples = [
        sample(0, 0, 0, 0, 0), sample(1, 2, 5, 1, 8), sample(2, 4, 5.25, 2.5, 10), sample(3, 4, 5.5, 4, 12),
        sample(9, 0, 15, 4, 30),  # the client works up its results: no load any more
    ]  # fmt: skip
    seen = watch.summary()
    assert (seen["client_cores"], seen["server_cores"], seen["other_cores"]) == (0.25, 1.5, 0.25)
    assert seen["batch_max"] == 4 and seen["batch_mean"] == pytest.approx(10 / 3)
    assert seen["gpu_watts"] is None and seen["queue_mean"] is None


def test_a_load_shorter_than_two_looks_leaves_the_cpu_unmeasured():
    assert cores([sample(0, 1, 0, 0, 0)]) == {"client_cores": None, "server_cores": None, "other_cores": None}


# Several repeats


def repeat(rate, valid=True, **more):
    reasons = [] if valid else ["2 of 8 requests failed"]
    return {"concurrency": 4, "input_tokens_asked": 64, "output_tokens_asked": 32, "variant": "corrected", "repeat": 1,
            "rate": rate, "gpu_watts": None, "tokens_counted_by": "server", "valid": valid, "invalid_reasons":
            reasons, "checks": [], **more}  # fmt: skip


def test_repeats_are_summed_up_as_medians_with_an_interval():
    summed = metrics.summed_up([repeat(9.0), repeat(30.0), repeat(10.0)])
    assert summed["rate"] == 10.0 and summed["intervals"]["rate"] == [9.0, 30.0]
    assert (summed["concurrency"], summed["gpu_watts"], summed["valid"]) == (4, None, True)
    assert len(summed["repeats"]) == 3 and "repeat" not in summed


def test_an_invalid_repeat_stays_in_the_data_and_out_of_the_median():
    summed = metrics.summed_up([repeat(9.0), repeat(1.0, valid=False), repeat(11.0), repeat(10.0)])
    assert summed["rate"] == 10.0 and summed["intervals"]["rate"][0] == 9.0
    assert summed["valid"] and summed["invalid_reasons"] == ["2 of 8 requests failed"]


def test_a_point_without_a_valid_repeat_is_invalid_and_two_repeats_have_no_interval():
    assert not metrics.summed_up([repeat(9.0, valid=False)] * 3)["valid"]
    assert metrics.summed_up([repeat(9.0), repeat(10.0)])["intervals"] == {}


def test_a_number_that_one_repeat_lacks_has_no_median():
    assert "late" not in metrics.summed_up([repeat(9.0, late=1.0), repeat(10.0, late=None)])


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


# The order


def test_servers_take_turns_there_and_back_and_neighbours_share_a_start():
    p = Bench(**PARAMS | {"repeats": 3, "concurrency": [1]})
    order = [(server, [point.repeat for point in group]) for server, group in visits(p)]
    assert order == [("triton", [1]), ("vllm", [1, 2]), ("triton", [2, 3]), ("vllm", [3])]


def test_a_sweep_begins_with_its_ends_and_halves_the_gaps():
    assert coarse_to_fine([1, 2, 4, 8, 16, 32, 64]) == [1, 64, 8, 4, 32, 2, 16]
    assert coarse_to_fine([1]) == [1] and coarse_to_fine([1, 4]) == [1, 4]
    for count in range(1, 12):
        assert sorted(coarse_to_fine(list(range(count)))) == list(range(count))


def test_all_lengths_of_a_server_share_its_start():
    p = Bench(**PARAMS | {"servers": ["vllm-fp8"], "lengths": [[64, 32], [128, 8]], "concurrency": [1]})
    ((server, group),) = visits(p)
    assert server == "vllm-fp8" and group == [
        Point(server, 64, 32, 1, "corrected", 1),
        Point(server, 128, 8, 1, "corrected", 1),
    ]


def test_the_time_left_is_what_the_same_points_took_before(tmp_path):
    p = Bench(**PARAMS | {"concurrency": [1, 2]})
    clock = Clock(tmp_path / "seconds.json")
    assert clock.left(visits(p)) is None
    clock.seconds = {
        "ready": {"triton": 10, "vllm": 40},
        "points": {"triton-64-32-c1-corrected": 7, "vllm-64-32-c2-corrected": 9},
    }
    assert clock.left(visits(p)) == 50 + 7 + 9 + 9 + 9
    assert clock.left(visits(p), running=1) == 40 + 7 + 9 + 9 + 9


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), (None, None), ("", None)])
def test_a_budget_is_read_with_its_unit(text, seconds):
    assert seconds_of(text) == seconds


def test_a_budget_without_a_unit_is_refused():
    with pytest.raises(UserError, match="BUDGET is '30'; write a number and s, m or h, such as 30m"):
        seconds_of("30")


VLLM_METRICS = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="base"} 94.0
vllm:generation_tokens_created{engine="0",model_name="base"} 1.7952430471469536e+09
vllm:request_success_total{engine="0",finished_reason="stop",model_name="base"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="base"} 2.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="base"} 0.0
"""
TRITON_METRICS = """\
nv_llm_input_token_len_sum{model="tensorrt_llm",response_metric_type="total_input_tokens",version="1"} 60
nv_llm_output_token_len_sum{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"} 113
nv_llm_output_token_len_count{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"} 11
nv_llm_output_token_len_bucket{model="tensorrt_llm",version="1",le="10.0"} 4
"""


def test_the_tokens_a_server_made_are_read_from_its_metrics():
    assert servers.sums(VLLM_METRICS, servers.Vllm.counters) == {"output_tokens": 94.0, "requests": 3.0}
    counted = {"input_tokens": 60.0, "output_tokens": 113.0, "requests": 11.0}
    assert servers.sums(TRITON_METRICS, servers.Triton.counters) == counted


VLLM_GUESSING = """\
vllm:spec_decode_num_drafts_total{engine="0",model_name="base"} 13.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="base"} 46.0
vllm:spec_decode_num_draft_tokens_created{engine="0",model_name="base"} 1.7953661829967446e+09
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="base"} 43.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="base",position="0"} 13.0
"""


@pytest.mark.parametrize(
    ("text", "guessed", "right"),
    [
        (VLLM_GUESSING, 46, 43 / 46),
        (VLLM_GUESSING.replace(" 46.0", " 0.0").replace(" 43.0", " 0.0"), 0, None),
        (VLLM_METRICS, None, None),
    ],
)
def test_how_many_guessed_tokens_were_right_is_read_from_a_server_that_guesses(text, guessed, right):
    counted = servers.sums(text, servers.Vllm.counters)
    assert metrics.guess_counts(counted) == {"guessed_tokens": guessed, "guessed_right": right}


# Commands and parameters


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A working folder of the embedded profile with a model, two adapters and a repository, none of them real."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    files = {
        "machine/machine.json": "{}",
        "base_model/model/config.json": '{"dtype": "bfloat16", "head_dim": 8, "use_cache": true}',
        "base_model/metrics.json": '{"name": "Tiny", "weights": "random", "parameters": 7}',
        "finetune/lora/adapter/adapter_config.json": '{"r": 4}',
        "finetune/qlora/adapter/adapter_config.json": '{"r": 12}',
        "repository/base/repository.json": '{"engine": "Fake 1", "engine_is_stand_in": true, "not_built": null, '
        '"stands_in_for": "TensorRT-LLM"}',
    }
    write_files(tmp_path / "results" / "embedded", files)
    return tmp_path


def test_genai_perf_drives_triton_with_a_pinned_length_and_an_adapter(embedded):
    command = client_command(
        Bench(**PARAMS), servers.Triton("lora", every_input()), Point("triton", 64, 32, 4, "corrected", 1), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model ensemble --url 127.0.0.1:8001 --endpoint-type kserve --backend tensorrtllm "
        "--extra-inputs min_tokens:32 --extra-inputs lora_task_id:1 --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 4 --request-count 16 --warmup-request-count 8 "
        "--input-file W/prompts-64.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 --random-seed 42 "
        "--artifact-dir W/raw/triton-64-32-c4-corrected-r1"
    )


def test_genai_perf_drives_vllm_with_the_same_prompts_and_the_adapter_by_name(embedded):
    command = client_command(
        Bench(**PARAMS), servers.Vllm("lora", every_input()), Point("vllm", 64, 32, 1, "corrected", 2), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model lora --url http://127.0.0.1:8000 --endpoint-type completions "
        "--extra-inputs ignore_eos:true --extra-inputs min_tokens:32 --extra-inputs temperature:0 --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 1 --request-count 8 --warmup-request-count 2 "
        "--input-file W/prompts-64.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 --random-seed 42 "
        "--artifact-dir W/raw/vllm-64-32-c1-corrected-r2"
    )


def test_the_writeups_client_sends_its_own_prompts_to_the_chat_endpoint_and_leaves_the_length_free(embedded):
    changes = {"pinned": False, "endpoint": "chat", "prompts": "synthetic", "warmup_requests": 0}
    p = Bench(**PARAMS | changes | {"min_requests": 10, "requests_per_stream": 2})
    command = client_command(
        p, servers.Vllm("base", every_input()), Point("vllm", 512, 256, 16, "corrected", 1), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model base --url http://127.0.0.1:8000 --endpoint-type chat "
        "--extra-inputs temperature:0 --streaming --tokenizer results/embedded/base_model/model --concurrency 16 "
        "--request-count 32 --synthetic-input-tokens-mean 512 --synthetic-input-tokens-stddev 0 "
        "--output-tokens-mean 256 --random-seed 42 --artifact-dir W/raw/vllm-512-256-c16-corrected-r1"
    )


def test_a_shape_is_served_out_of_a_folder_of_its_own(embedded):
    command = servers.Vllm("gpt-oss-20b:mxfp4", every_input()).command([])
    assert command[command.index("--model") + 1] == ".work/embedded/shapes/gpt-oss-20b-mxfp4"


@pytest.mark.parametrize(
    ("model", "options", "formats"),
    [
        ("base", [], ("bf16", "bf16")),
        ("llama-2-7b:int4-g128", [], ("int4-g128", "bf16")),
        ("llama-2-7b:bf16", ["--quantization=fp8", "--kv-cache-dtype=fp8"], ("fp8", "fp8")),
    ],
)
def test_a_point_knows_in_which_format_its_weights_are_served(embedded, model, options, formats):
    assert servers.Vllm(model, every_input()).formats(options) == formats


def test_a_variant_changes_the_client_and_shares_the_server(embedded):
    p = Bench(**PARAMS | {"variants": ["corrected", "short"], "servers": ["vllm"], "concurrency": [1]})
    ((_, group),) = visits(p)
    assert [point.variant for point in group] == ["corrected", "short"]
    assert p.requests(1) == 8 and p.with_variant("short").requests(1) == 4


def test_vllm_serves_all_adapters_with_a_rank_that_it_accepts(embedded):
    command = servers.Vllm("lora", every_input()).command(["--enforce-eager"])
    assert " ".join(command) == (
        "python3 -m vllm.entrypoints.openai.api_server --model results/embedded/base_model/model "
        "--served-model-name base --host 127.0.0.1 --port 8000 --no-enable-prefix-caching --enable-lora "
        "--max-lora-rank 16 --max-loras 2 --lora-modules lora=results/embedded/finetune/lora/adapter "
        "qlora=results/embedded/finetune/qlora/adapter --enforce-eager"
    )
    assert "--enable-lora" not in servers.Vllm("base", every_input()).command([])


def test_a_missing_adapter_is_named_before_anything_starts(embedded):
    shutil.rmtree("results/embedded/finetune/lora")
    with pytest.raises(UserError, match="results/embedded/finetune/lora/adapter: no adapter there"):
        servers.Vllm("lora", every_input()).command([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"servers": ["tgi"]}, "bench.servers has 'tgi'; use triton, vllm, trtllm, triton-fp8, vllm-fp8, trtllm-fp8"),
        ({"servers": ["vllm-fp9"]}, "bench.servers has 'vllm-fp9'; use"),
        ({"lengths": [[64]]}, r"bench.lengths is \[\[64\]\]; use pairs of tokens in and out, from 1"),
        ({"lengths": [[64, 0]]}, r"bench.lengths is \[\[64, 0\]\]"),
        ({"variants": ["old"]}, "bench.variants has 'old'; use corrected, short"),
        ({"model": "llama"}, "bench.model is 'llama'; use base, lora, or SHAPE:FORMAT"),
        ({"repeats": 0}, "bench.repeats is 0; use 1 or more"),
        ({"endpoint": "embeddings"}, "bench.endpoint is 'embeddings'; use completions or chat"),
        ({"configurations": {"a": [7]}}, "bench.a has 7; write it as text"),
        ({"concurrency": [1, 0]}, r"bench.concurrency is \[1, 0\]; use whole numbers from 1"),
        ({"concurrency": []}, r"bench.concurrency is \[\]"),
        ({"server_options": ["--max-model-len", 2048]}, "bench.server_options has 2048; write it as text"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(change, message):
    with pytest.raises(UserError, match=f"params.yaml: {message}"):
        Bench(**PARAMS | change)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("new", "bench.definitions has no 'new'; it has base, old"),
        ("odd", "bench.definitions.odd.concurency is no parameter of bench"),
        ("deep", "bench.definitions.deep.experiments is no parameter of bench"),
    ],
)
def test_a_wrong_experiment_is_named(name, message):
    p = Bench(**PARAMS)
    p.definitions |= {"odd": {"concurency": [1]}, "deep": {"experiments": []}} if name != "new" else {}
    with pytest.raises(UserError, match=message):
        with_experiment(p, name)


def test_a_sweep_resumes_only_with_the_same_inputs(tree, embedded, monkeypatch):
    shutil.copytree(embedded / "results", tree / "results", dirs_exist_ok=True)
    monkeypatch.chdir(tree)
    images = {"client": "host:", "vllm": "host:"}
    first = key(Bench(**PARAMS), "base", images)
    assert key(Bench(**PARAMS | {"concurrency": [8], "repeats": 5, "point_seconds": 9}), "base", images) == first
    others = [
        key(Bench(**PARAMS | {"seed": 1}), "base", images),
        key(Bench(**PARAMS), "base", images | {"vllm": "docker://vllm@sha256:0"}),
        key(Bench(**PARAMS), "lora", images),
    ]
    # One file of each kind that dvc.yaml names: a program of the client, a chapter, a shape, the machine, the model.
    for path in ("stages/workers/prompts.py", "lib/serving/process.py", "data/shapes/llama-2-7b.json",
                 "results/embedded/machine/machine.json", "results/embedded/base_model/model/config.json"):  # fmt: skip
        with open(path, "a") as file:
            file.write("\n")
        others.append(key(Bench(**PARAMS), "base", images))
    assert len({first, *others}) == 1 + len(others)
    write_files(Path("lib/report"), {"serving.py": "# reworded\n"})
    assert key(Bench(**PARAMS), "base", images) == others[-1]


def test_a_program_that_ignores_the_signal_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_process, "STOP_SECONDS", 0.5)
    stubborn = "trap '' TERM; sleep 600 & sleep 600"
    with serving_process.started(["bash", "-c", stubborn], tmp_path / "log") as process:
        deadline = time.monotonic() + 5
        while len(serving_process.session(process)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(serving_process.session(process)) == 3
    assert serving_process.session(process) == []


def test_a_taken_port_names_the_program_that_holds_it():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken by \w+.* \(process {os.getpid()}\); stop it first"):
            serving_process.check_ports([port])
    serving_process.check_ports([port])


# A whole sweep, with programs in the place of server and client


@pytest.fixture
def bench(tree, embedded):
    """bench() runs `base` with Triton in a copied tree with the programs of fixtures/bench/bin; `tree` is the copy."""
    shutil.copytree(embedded / "results", tree / "results", dirs_exist_ok=True)
    (tree / "stages" / "workers" / "prompts.py").write_text("import sys; open(sys.argv[-1], 'w')")
    for name, text in {"server": "runs", "client": "measures", "requests": "0", "calls": ""}.items():
        (tree / name).write_text(text)
    loads = {"lengths": [[64, 32]], "concurrency": [1, 2, 4], "requests_per_stream": 1, "min_requests": 8}
    set_params(tree, bench={**loads, "servers": ["triton"], "repeats": 1, "warmup_requests": 2})
    command = [
        "containers/run",
        "venv:tools",
        "python",
        "-m",
        "stages.bench",
        "base",
        "host:",
        "triton=host:",
        "vllm=host:",
    ]
    environment = {"PATH": f"{RECORDED / 'bin'}:{os.environ['PATH']}"}

    def start(**files):
        for name, text in files.items():
            (tree / name).write_text(text)
        return run_in(tree, *command, environment=environment | {"BUDGET": start.budget}, timeout=60)

    start.tree, start.budget = tree, ""
    start.popen = lambda: subprocess.Popen(
        command, cwd=tree, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return start


def left_over(tree):
    """Processes that work in the copied tree, or name it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(tree) in " ".join(process.cmdline()) or process.cwd() == str(tree):
                found.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def results_of(tree):
    return tree / "results" / "embedded" / "bench" / "base"


def test_lengths_that_the_server_cannot_take_are_refused_before_it_starts(bench):
    lengths = {"lengths": [[64, 32], [2000, 100]], "server_options": ["--max-model-len=2048"]}
    set_params(bench.tree, bench=lengths | {"servers": ["vllm"]})
    assert error_of(bench()).startswith(
        "error: experiments.yaml: bench.definitions.base asks vllm for 2100 tokens in and out; its options have "
        "--max-model-len=2048: raise that, or shorten bench.lengths"
    )
    assert not (bench.tree / "server.pid").exists()


def test_a_sweep_writes_points_raw_files_and_what_made_them(bench):
    done = bench()
    assert done.returncode == 0, done.stderr
    out = results_of(bench.tree)
    written = json.loads((out / "triton" / "points.json").read_text())
    assert [point["concurrency"] for point in written["points"]] == [1, 2, 4]
    assert all(point["valid"] and point["output_tokens"] == 32.0 for point in written["points"])
    assert written["engine"] == "Fake 1 behind Triton 2.51.0 (stand-in for TensorRT-LLM)"
    assert written["engine_is_stand_in"] is True
    assert written["base_model"] == {"name": "Tiny", "weights": "random", "parameters": 7, "config": {"head_dim": 8}}
    assert (written["weights_format"], written["kv_format"]) == ("bf16", "bf16")
    assert written["settings"]["client_variants"] == {"corrected": {}}
    assert written["server_ready_seconds"] > 0 and written["not_measured"] is None
    names = [path.relative_to(out / "raw").parts[0] for path in sorted(out.glob("raw/*/*/*_genai_perf.json"))]
    assert names == ["triton-64-32-c1-corrected-r1", "triton-64-32-c2-corrected-r1", "triton-64-32-c4-corrected-r1"]
    assert len((out / "triton" / "points.csv").read_text().splitlines()) == 4
    assert re.search(r"concurrency 2: 118\.2 tokens/s.* about \d+ s left", done.stdout)
    assert left_over(bench.tree) == []
    # The next run measures anew, and knows how long this one took.
    kept = {path.name for path in (bench.tree / ".work" / "embedded").iterdir()}
    assert kept == {"bench-base.seconds.json", "bench-base.lock"}


def test_a_server_that_is_not_to_be_measured_stands_as_not_measured(bench):
    set_params(bench.tree, bench={"servers": []})
    done = bench()
    assert done.returncode == 0, done.stderr
    for server in ("triton", "vllm"):
        written = json.loads((results_of(bench.tree) / server / "points.json").read_text())
        assert written["points"] == [] and written["engine"] is None
        assert written["not_measured"] == f"params.yaml: bench.servers has no {server}"
    assert not (bench.tree / "server.pid").exists()


def test_a_repository_that_was_not_built_stands_as_not_measured_with_its_reason(bench):
    path = bench.tree / "results" / "embedded" / "repository" / "base" / "repository.json"
    path.write_text('{"not_built": "params.yaml: repository.engine is none"}')
    assert bench().returncode == 0
    written = json.loads((results_of(bench.tree) / "triton" / "points.json").read_text())
    assert written["not_measured"] == "params.yaml: repository.engine is none"


def error_of(done):
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_server_that_dies_at_once_shows_the_end_of_its_log(bench):
    done = bench(server="dies")
    assert error_of(done) == "error: Triton stopped (exit code 3) before it was ready"
    assert "| failed to allocate memory" in done.stderr
    assert left_over(bench.tree) == []


def test_a_server_that_never_gets_ready_is_given_up(bench):
    set_params(bench.tree, bench={"ready_seconds": 1})
    assert error_of(bench(server="never ready")) == "error: Triton was not ready after 1 s (bench.ready_seconds)"
    assert left_over(bench.tree) == []


def test_a_taken_port_stops_the_sweep_before_the_server_starts(bench):
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 8001))
        holder.listen()
        done = bench()
    name = psutil.Process().name()
    assert error_of(done) == f"error: port 8001 is taken by {name} (process {os.getpid()}); stop it first"
    assert not (bench.tree / "server.pid").exists()


def test_a_sweep_whose_server_is_killed_goes_on_at_the_missing_point(bench):
    done = bench(client="kills the server 4")
    assert error_of(done) == f"error: the server stopped ({exit_words(-9)}) while it was measured"
    assert "1 of 3 points are finished and kept in .work/embedded/bench-base-" in done.stderr
    assert not results_of(bench.tree).exists() and left_over(bench.tree) == []

    done = bench(client="measures", calls="")
    assert done.returncode == 0, done.stderr
    assert (bench.tree / "calls").read_text().split() == ["4", "2"]
    written = json.loads((results_of(bench.tree) / "triton" / "points.json").read_text())
    assert [point["concurrency"] for point in written["points"]] == [1, 2, 4]


def test_a_sweep_that_the_budget_cuts_short_fails_and_resumes(bench):
    bench.budget = "0s"
    done = bench()
    assert done.returncode == 75
    assert done.stderr == "base: BUDGET=0s ended after 0 of 3 points; run the same again to resume\n"
    written = json.loads((results_of(bench.tree) / "triton" / "points.json").read_text())
    assert written["points"] == [] and written["not_measured"] == "the budget ended after 0 of 3 measurements"
    bench.budget = "1h"
    assert bench().returncode == 0
    written = json.loads((results_of(bench.tree) / "triton" / "points.json").read_text())
    assert len(written["points"]) == 3 and written["not_measured"] is None


def test_points_of_other_parameters_are_not_gone_on_with(bench):
    bench(client="fails 4")
    set_params(bench.tree, bench={"seed": 7})
    bench(client="measures", calls="")
    assert (bench.tree / "calls").read_text().split() == ["1", "4", "2"]


def test_an_invalid_point_is_written_as_such_and_measured_again_by_the_same_server_and_when_the_sweep_goes_on(bench):
    set_params(bench.tree, bench={"lengths": [[64, 64]]})
    assert error_of(bench(client="fails 4")).startswith("error: genai-perf failed (exit code 1); its output: .work/")
    done = bench(client="measures", calls="")
    assert (bench.tree / "calls").read_text().split() == ["1", "4", "2"] * 2
    assert done.stdout.count("is ready after") == 1
    assert "INVALID: the server counted 32.00 output tokens a request, 64 were asked for" in done.stdout
    written = json.loads((results_of(bench.tree) / "triton" / "points.json").read_text())
    assert [point["valid"] for point in written["points"]] == [False, False, False]
    # No try hides the one before it. The first sweep ended before concurrency 2 had one.
    tries = {point["concurrency"]: point["repeats"][0]["refused_tries"] for point in written["points"]}
    assert {load: len(refused) for load, refused in tries.items()} == {1: 2, 4: 1, 2: 1}
    assert all(one["invalid_reasons"] and one["concurrency"] == 1 for one in tries[1])
    with (results_of(bench.tree) / "triton" / "points.csv").open() as file:
        told = {row["concurrency"]: row["refused_tries"] for row in csv.DictReader(file)}
    assert told == {"1": "2", "4": "1", "2": "1"}


def test_a_variant_that_can_never_be_valid_is_measured_once(bench):
    set_params(bench.tree, bench={"warmup_requests": 0})
    assert error_of(bench(client="fails 2")).startswith("error: genai-perf failed")
    done = bench(client="measures", calls="")
    assert done.returncode == 0 and (bench.tree / "calls").read_text().split() == ["2"]
    assert "INVALID: 0 requests before those that count" in done.stdout


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("loses it", "0 files *_genai_perf.json, want 1; genai-perf did not finish this point"),
        ("empties it", "profile_export_genai_perf.json: not whole"),
        ("cuts it", "profile_export_genai_perf.json: not whole"),
        ("writes it twice", "2 files *_genai_perf.json, want 1; measure this point again, in an empty folder"),
    ],
)
def test_a_file_that_the_client_spoiled_ends_the_sweep_and_costs_that_point_only(bench, behaviour, message):
    done = bench(client=f"{behaviour} 4")
    assert message in error_of(done) and "1 of 3 points are finished and kept" in done.stderr
    assert bench(client="measures", calls="").returncode == 0
    assert (bench.tree / "calls").read_text().split() == ["4", "2"]


def test_a_sweep_that_was_killed_goes_on_at_the_missing_point(bench):
    (bench.tree / "client").write_text("hangs 4")
    with bench.popen() as stage:
        deadline = time.monotonic() + 30
        while "4" not in (bench.tree / "calls").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        stage.kill()
        stage.stdout.read()
    done = bench(client="measures", calls="")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 points to measure" in done.stdout
    assert (bench.tree / "calls").read_text().split() == ["4", "2"]


@pytest.fixture
def took(monkeypatch):
    """sweep() without servers: what was measured, 10 s each by a clock that nothing else moves. A point is valid unless
    others were on the GPU."""
    now, measured = [0.0], []
    monkeypatch.setattr("lib.bench.sweep.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("lib.bench.sweep.other_gpu_processes", lambda: None)
    monkeypatch.setattr("lib.bench.sweep.make_inputs", lambda p, inputs, images, work: None)

    def started(name, p, inputs, server_name, images, work, clock, stack):
        clock.seconds["ready"][server_name] = 5
        return None, None

    def ten_seconds(p, server, point, client_image, process, strangers, work):
        now[0] += 10
        measured.append((point.server, point.concurrency))
        found = POINT | {"valid": not strangers, "ttft_ms_p50": None, "output_tokens_per_second": None}
        found |= {"invalid_reasons": ["strangers"] if strangers else [], "checks": []}
        found |= {"tokens_counted_by": "client"}
        found |= {"input_tokens_asked": 64, "output_tokens_asked": 32, "concurrency": 1, "variant": "corrected"}
        write_json(work / "points" / f"{point}.json", found)
        return found

    monkeypatch.setattr("lib.bench.sweep.start", started)
    monkeypatch.setattr("lib.bench.sweep.measure", ten_seconds)
    return measured


def test_a_budget_ends_between_two_points_and_what_is_there_spans_the_sweep(tmp_path, monkeypatch, took):
    p = Bench(**PARAMS | {"servers": ["vllm"], "concurrency": [1, 2, 4, 8], "repeats": 2})
    monkeypatch.setenv("BUDGET", "25s")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took == [("vllm", 1), ("vllm", 8), ("vllm", 4)]
    monkeypatch.setenv("BUDGET", "")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took[3:] == [("vllm", level) for level in (2, 1, 8, 4, 2)]


def test_what_others_on_the_gpu_spoiled_is_measured_again_by_another_start_only(tmp_path, monkeypatch, took):
    monkeypatch.setattr("lib.bench.sweep.other_gpu_processes", lambda: [4711])
    p = Bench(**PARAMS | {"servers": ["vllm"], "concurrency": [1, 2], "repeats": 1})
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took == [("vllm", 1), ("vllm", 2)]
    monkeypatch.setattr("lib.bench.sweep.other_gpu_processes", lambda: [])
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took[2:] == [("vllm", 1), ("vllm", 2)]


def test_a_client_that_hangs_is_given_up(bench):
    set_params(bench.tree, bench={"point_seconds": 2})
    done = bench(client="hangs 1")
    assert error_of(done).startswith("error: genai-perf took longer than 2 s (bench.point_seconds); its output: .work/")
    assert left_over(bench.tree) == []


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stage_that_is_stopped_leaves_no_process(bench, sign, code):
    (bench.tree / "client").write_text("hangs 4")
    with bench.popen() as stage:
        deadline = time.monotonic() + 30
        while "4" not in (bench.tree / "calls").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        stage.send_signal(sign)
        printed = stage.stdout.read() if sign != signal.SIGKILL else ""
        assert stage.wait(timeout=30) == code, printed
        deadline = time.monotonic() + 5
        while left_over(bench.tree) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert left_over(bench.tree) == []
    if sign != signal.SIGKILL:
        assert "1 of 3 points are finished and kept" in printed


def test_a_wrong_run_name_shows_how_to_call_it():
    command = [sys.executable, "-m", "stages.bench", "sglang", "host:", "vllm=host:"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert "with EXPERIMENT one of base, lora, walk" in error_of(done)
