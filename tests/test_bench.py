"""The sweep: numbers from what genai-perf really wrote, and what happens when a server or a client goes wrong."""

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

import psutil
import pytest
from conftest import REPO, run_in, set_params

from stages import points, servers, serving
from stages.bench import Bench, client_command, key
from stages.stage import UserError

RECORDED = REPO / "tests" / "fixtures" / "bench"
PARAMS = {"servers": ["triton", "vllm"], "input_tokens": 64, "output_tokens": 32, "concurrency": [1, 2, 4],
          "requests_per_stream": 4, "min_requests": 8, "warmup_requests": 2, "seed": 42, "ready_seconds": 20,
          "point_seconds": 20, "server_options": []}  # fmt: skip


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
    point = points.read_point(raw("triton"))
    assert point["requests"] == 8
    assert (point["input_tokens"], point["output_tokens"]) == (64.0, 32.0)
    assert point["output_tokens_per_second"] == pytest.approx(59.08, abs=0.01)
    assert point["requests_per_second"] == pytest.approx(1.846, abs=0.001)
    assert point["request_latency_ms_p99"] == pytest.approx(1095.49, abs=0.01)
    assert point["ttft_ms_p50"] < point["ttft_ms_p99"] < point["request_latency_ms_avg"]


def test_a_point_of_vllm_has_the_same_numbers_as_one_of_triton(raw, tmp_path):
    vllm = points.read_point(raw("vllm"))
    assert vllm["output_tokens_per_second"] == pytest.approx(107.3, abs=0.1)
    assert vllm["per_user_tokens_per_second"] == pytest.approx(1000 / vllm["itl_ms_avg"], rel=0.02)
    assert None not in vllm.values()


@pytest.mark.parametrize("name", ["truncated", "empty"])
def test_a_json_that_genai_perf_did_not_finish_is_named(raw, name):
    with pytest.raises(UserError, match=r"profile_export_genai_perf\.json: not whole"):
        points.read_point(raw(name))


def test_no_json_at_all_says_that_genai_perf_did_not_finish(tmp_path):
    with pytest.raises(UserError, match="0 files .*, want 1; genai-perf did not finish this point"):
        points.read_point(tmp_path)


def test_another_unit_stops_the_run(raw):
    folder = raw("vllm", lambda text: text.replace('"ms"', '"us"', 1))
    with pytest.raises(UserError, match="request_latency is in 'us', want 'ms'"):
        points.read_point(folder)


def test_what_genai_perf_did_not_measure_is_none_and_not_zero(raw):
    def without_streaming(text):
        kept = json.loads(text)
        del kept["time_to_first_token"], kept["inter_token_latency"]
        return json.dumps(kept)

    point = points.read_point(raw("vllm", without_streaming))
    assert point["ttft_ms_p50"] is None and point["itl_ms_avg"] is None
    assert point["request_latency_ms_p50"] > 0


# Is it the work that was asked for?


def judged(counted, made, requests=8):
    point = {"output_tokens": counted, "server_output_tokens": made, "requests": requests, "requests_per_second": 2.0}
    return points.judged(point, 8, 32)


def test_a_point_that_made_what_was_asked_for_is_valid():
    point = judged(32.0, 32.0)
    assert (point["valid"], point["invalid_reasons"], point["notes"]) == (True, [], [])
    assert point["server_output_tokens_per_second"] == 64.0


def test_shorter_answers_than_asked_for_make_a_point_invalid():
    point = judged(31.0, 31.0)
    assert not point["valid"]
    assert point["invalid_reasons"] == ["the server made 31.00 output tokens a request, 32 were asked for"]


def test_a_miscount_of_genai_perf_is_noted_where_the_server_made_the_right_length():
    point = judged(30.0, 32.0)
    assert point["valid"]
    assert point["notes"] == ["genai-perf counted 30.00 output tokens a request where the server made 32.00"]


def test_without_a_count_of_the_server_that_of_genai_perf_decides():
    assert judged(32.4, None)["valid"]
    assert judged(30.0, None)["invalid_reasons"] == [
        "genai-perf counted 30.00 output tokens a request, 32 were asked for"
    ]
    assert judged(30.0, None)["server_output_tokens_per_second"] is None


def test_failed_requests_make_a_point_invalid():
    point = judged(32.0, 32.0, requests=6)
    assert point["failed_requests"] == 2
    assert point["invalid_reasons"] == ["2 of 8 requests failed"]


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
    assert servers.sums(TRITON_METRICS, servers.Triton.counters) == {"output_tokens": 113.0, "requests": 11.0}
    before = {"output_tokens": 94.0, "requests": 3.0}
    assert points.per_request(before, {"output_tokens": 414.0, "requests": 13.0}) == 32.0


@pytest.mark.parametrize("after", [{}, {"requests": 13.0}, {"output_tokens": 94.0, "requests": 3.0}])
def test_a_server_that_tells_no_counts_leaves_the_length_unmeasured(after):
    assert points.per_request({"output_tokens": 94.0, "requests": 3.0}, after) is None


# Commands and parameters


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A working folder of the embedded profile with a model, two adapters and a repository, none of them real."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    files = {
        "machine/machine.json": "{}",
        "base_model/model/config.json": "{}",
        "base_model/metrics.json": '{"name": "Tiny", "weights": "random", "parameters": 7}',
        "finetune/lora/adapter/adapter_config.json": '{"r": 4}',
        "finetune/qlora/adapter/adapter_config.json": '{"r": 12}',
        "repository/base/repository.json": '{"engine": "Fake 1", "engine_is_stand_in": true, "not_built": null, '
        '"stands_in_for": "TensorRT-LLM"}',
    }
    for name, text in files.items():
        path = tmp_path / "results" / "embedded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_genai_perf_drives_triton_with_a_pinned_length_and_an_adapter(embedded):
    command = client_command(Bench(**PARAMS), servers.Triton("lora"), 4, Path("W"))
    assert " ".join(command) == (
        "genai-perf profile --model ensemble --url 127.0.0.1:8001 --endpoint-type kserve --backend tensorrtllm "
        "--extra-inputs min_tokens:32 --extra-inputs lora_task_id:1 --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 4 --request-count 16 --warmup-request-count 8 "
        "--input-file W/prompts.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 --random-seed 42 "
        "--artifact-dir W/raw/4"
    )


def test_genai_perf_drives_vllm_with_the_same_prompts_and_the_adapter_by_name(embedded):
    command = client_command(Bench(**PARAMS), servers.Vllm("lora"), 1, Path("W"))
    assert " ".join(command) == (
        "genai-perf profile --model lora --url http://127.0.0.1:8000 --endpoint-type completions "
        "--extra-inputs ignore_eos:true --extra-inputs min_tokens:32 --extra-inputs temperature:0 --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 1 --request-count 8 --warmup-request-count 2 "
        "--input-file W/prompts.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 --random-seed 42 "
        "--artifact-dir W/raw/1"
    )


def test_vllm_serves_all_adapters_with_a_rank_that_it_accepts(embedded):
    command = servers.Vllm("lora").command(["--enforce-eager"])
    assert " ".join(command) == (
        "python3 -m vllm.entrypoints.openai.api_server --model results/embedded/base_model/model "
        "--served-model-name base --host 127.0.0.1 --port 8000 --no-enable-prefix-caching --enable-lora "
        "--max-lora-rank 16 --max-loras 2 --lora-modules lora=results/embedded/finetune/lora/adapter "
        "qlora=results/embedded/finetune/qlora/adapter --enforce-eager"
    )
    assert "--enable-lora" not in servers.Vllm("base").command([])


def test_a_missing_adapter_is_named_before_anything_starts(embedded):
    shutil.rmtree("results/embedded/finetune/lora")
    with pytest.raises(UserError, match="results/embedded/finetune/lora/adapter: no adapter there"):
        servers.Vllm("lora").command([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"servers": ["tgi"]}, "bench.servers has 'tgi'; use triton, vllm"),
        ({"concurrency": [1, 0]}, r"bench.concurrency is \[1, 0\]; use whole numbers from 1"),
        ({"concurrency": []}, r"bench.concurrency is \[\]"),
        ({"output_tokens": 0}, "bench.output_tokens is 0; use 1 or more"),
        ({"server_options": ["--max-model-len", 2048]}, "bench.server_options has 2048; write it as text"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(change, message):
    with pytest.raises(UserError, match=f"params.yaml: {message}"):
        Bench(**PARAMS | change)


def test_points_are_kept_only_while_what_they_depend_on_is_the_same(embedded):
    images = ["host:", "host:"]
    first = key(Bench(**PARAMS), servers.Vllm("lora"), images)
    assert key(Bench(**PARAMS | {"concurrency": [8], "point_seconds": 9}), servers.Vllm("lora"), images) == first
    others = [
        key(Bench(**PARAMS | {"seed": 1}), servers.Vllm("lora"), images),
        key(Bench(**PARAMS), servers.Vllm("lora"), ["docker://vllm@sha256:0", "host:"]),
        key(Bench(**PARAMS), servers.Vllm("base"), images),
    ]
    for changed in (
        "base_model/model/config.json",
        "finetune/lora/adapter/adapter_config.json",
        "machine/machine.json",
    ):
        Path("results/embedded", changed).write_text('{"r": 8}')
        others.append(key(Bench(**PARAMS), servers.Vllm("lora"), images))
    assert len({first, *others}) == 7


# The processes


def test_a_program_that_ignores_the_signal_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "STOP_SECONDS", 0.5)
    stubborn = "trap '' TERM; sleep 600 & sleep 600"
    with serving.started(["bash", "-c", stubborn], tmp_path / "log") as process:
        deadline = time.monotonic() + 5
        while len(serving.session(process)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(serving.session(process)) == 3
    assert serving.session(process) == []


def test_a_taken_port_names_the_program_that_holds_it():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken by \w+.* \(process {os.getpid()}\); stop it first"):
            serving.check_ports([port])
    serving.check_ports([port])


# A whole sweep, with programs in the place of server and client


@pytest.fixture
def bench(tree, embedded):
    """bench() runs triton-base in a copied tree with the programs of fixtures/bench/bin; `tree` is the copy."""
    shutil.copytree(embedded / "results", tree / "results", dirs_exist_ok=True)
    (tree / "containers" / "client" / "prompts.py").write_text("import sys; open(sys.argv[-1], 'w')")
    for name, text in {"server": "runs", "client": "measures", "requests": "0", "calls": ""}.items():
        (tree / name).write_text(text)
    set_params(tree, bench={"requests_per_stream": 1, "concurrency": [1, 2, 4], "output_tokens": 32})
    command = ["containers/run", "venv:tools", "python", "-m", "stages.bench", "triton-base", "host:", "host:"]
    environment = {"PATH": f"{RECORDED / 'bin'}:{os.environ['PATH']}"}

    def start(**files):
        for name, text in files.items():
            (tree / name).write_text(text)
        return run_in(tree, *command, environment=environment, timeout=60)

    start.tree = tree
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
    return tree / "results" / "embedded" / "bench" / "triton-base"


def test_a_sweep_writes_points_raw_files_and_what_made_them(bench):
    done = bench()
    assert done.returncode == 0, done.stderr
    out = results_of(bench.tree)
    written = json.loads((out / "points.json").read_text())
    assert [point["concurrency"] for point in written["points"]] == [1, 2, 4]
    assert all(point["valid"] and point["server_output_tokens"] == 32.0 for point in written["points"])
    assert written["engine"] == "Fake 1 behind Triton 2.51.0 (stand-in for TensorRT-LLM)"
    assert written["engine_is_stand_in"] is True
    assert written["base_model"] == {"name": "Tiny", "weights": "random", "parameters": 7}
    assert written["server_ready_seconds"] > 0 and written["not_measured"] is None
    recorded = (RECORDED / "triton_genai_perf.json").read_bytes()
    assert [path.read_bytes() for path in sorted(out.glob("raw/*/*/*_genai_perf.json"))] == [recorded] * 3
    assert len((out / "points.csv").read_text().splitlines()) == 4
    assert re.search(r"concurrency 2: 59\.1 tokens/s.* about \d+ s left", done.stdout)
    assert left_over(bench.tree) == []
    # The next run measures anew, and knows how long this one took.
    assert list((bench.tree / ".work" / "embedded").iterdir()) == [
        bench.tree / ".work" / "embedded" / "bench-triton-base.seconds.json"
    ]


def test_a_server_that_is_not_to_be_measured_stands_as_not_measured(bench):
    set_params(bench.tree, bench={"servers": ["vllm"]})
    done = bench()
    assert done.returncode == 0, done.stderr
    written = json.loads((results_of(bench.tree) / "points.json").read_text())
    assert written["points"] == [] and written["engine"] is None
    assert written["not_measured"] == "params.yaml: bench.servers has no triton"
    assert not (bench.tree / "server.pid").exists()


def test_a_repository_that_was_not_built_stands_as_not_measured_with_its_reason(bench):
    path = bench.tree / "results" / "embedded" / "repository" / "base" / "repository.json"
    path.write_text('{"not_built": "params.yaml: repository.engine is none"}')
    assert bench().returncode == 0
    written = json.loads((results_of(bench.tree) / "points.json").read_text())
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
    done = bench(client="kills the server 2")
    assert error_of(done) == "error: the server stopped (exit code -9) while it was measured"
    assert "1 of 3 points are finished and kept in .work/embedded/bench-triton-base-" in done.stderr
    assert not results_of(bench.tree).exists() and left_over(bench.tree) == []

    done = bench(client="measures", calls="")
    assert done.returncode == 0, done.stderr
    assert (bench.tree / "calls").read_text().split() == ["2", "4"]
    written = json.loads((results_of(bench.tree) / "points.json").read_text())
    assert [point["concurrency"] for point in written["points"]] == [1, 2, 4]


def test_points_of_other_parameters_are_not_gone_on_with(bench):
    bench(client="fails 4")
    set_params(bench.tree, bench={"seed": 7})
    bench(client="measures", calls="")
    assert (bench.tree / "calls").read_text().split() == ["1", "2", "4"]


def test_an_invalid_point_is_written_as_such_and_measured_again_when_the_sweep_goes_on(bench):
    set_params(bench.tree, bench={"output_tokens": 64})
    assert error_of(bench(client="fails 4")).startswith("error: genai-perf failed (exit code 1); its output: .work/")
    done = bench(client="measures", calls="")
    assert (bench.tree / "calls").read_text().split() == ["1", "2", "4"]
    assert "INVALID: the server made 32.00 output tokens a request, 64 were asked for" in done.stdout
    written = json.loads((results_of(bench.tree) / "points.json").read_text())
    assert [point["valid"] for point in written["points"]] == [False, False, False]


def test_a_client_that_hangs_is_given_up(bench):
    set_params(bench.tree, bench={"point_seconds": 2})
    done = bench(client="hangs 1")
    assert error_of(done).startswith("error: genai-perf took longer than 2 s (bench.point_seconds); its output: .work/")
    assert left_over(bench.tree) == []


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stage_that_is_stopped_leaves_no_process(bench, sign, code):
    (bench.tree / "client").write_text("hangs 2")
    with bench.popen() as stage:
        deadline = time.monotonic() + 30
        while "2" not in (bench.tree / "calls").read_text() and time.monotonic() < deadline:
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
    command = [sys.executable, "-m", "stages.bench", "sglang-base", "host:", "host:"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert "with RUN one of triton-base, triton-lora, vllm-base, vllm-lora" in error_of(done)
