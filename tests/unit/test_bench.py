"""A whole sweep, with programs for server and client: what it writes, and what happens when one goes wrong."""

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
from bench_inputs import PARAMS, POINT, RECORDED
from conftest import REPO, every_input, run_in, set_params, write_files

from lib.bench.experiments import Bench, Point
from lib.bench.sweep import key, limit, sweep
from lib.core.parent import exit_words
from lib.core.stage import write_json


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


def test_lengths_above_the_servers_limit_are_refused_at_once(bench):
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


def test_a_server_that_was_left_out_is_not_measured(bench):
    set_params(bench.tree, bench={"servers": []})
    done = bench()
    assert done.returncode == 0, done.stderr
    for server in ("triton", "vllm"):
        written = json.loads((results_of(bench.tree) / server / "points.json").read_text())
        assert written["points"] == [] and written["engine"] is None
        assert written["not_measured"] == f"params.yaml: bench.servers has no {server}"
    assert not (bench.tree / "server.pid").exists()


def test_a_repository_that_was_not_built_gives_its_reason(bench):
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


def test_a_sweep_whose_server_was_killed_resumes(bench):
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


def test_an_invalid_point_is_written_and_measured_again(bench):
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
        ("loses it", "0 files *_genai_perf.json, want 1; genai-perf did not finish"),
        ("empties it", "profile_export_genai_perf.json: not whole"),
        ("cuts it", "profile_export_genai_perf.json: not whole"),
        ("writes it twice", "2 files *_genai_perf.json, want 1; empty the folder and run genai-perf again"),
    ],
)
def test_a_spoiled_client_file_costs_that_point_only(bench, behaviour, message):
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

    def ten_seconds(p, server, point, client_image, process, other_processes, work):
        now[0] += 10
        measured.append((point.server, point.concurrency))
        found = POINT | {"valid": not other_processes, "ttft_ms_p50": None, "output_tokens_per_second": None}
        found |= {"invalid_reasons": ["other_processes"] if other_processes else [], "checks": []}
        found |= {"tokens_counted_by": "client"}
        found |= {"input_tokens_asked": 64, "output_tokens_asked": 32, "concurrency": 1, "variant": "corrected"}
        write_json(work / "points" / f"{point}.json", found)
        return found

    monkeypatch.setattr("lib.bench.sweep.start", started)
    monkeypatch.setattr("lib.bench.sweep.measure_point", ten_seconds)
    return measured


def test_a_budget_ends_between_points_that_span_the_sweep(tmp_path, monkeypatch, took):
    p = Bench(**PARAMS | {"servers": ["vllm"], "concurrency": [1, 2, 4, 8], "repeats": 2})
    monkeypatch.setenv("BUDGET", "25s")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took == [("vllm", 1), ("vllm", 8), ("vllm", 4)]
    monkeypatch.setenv("BUDGET", "")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took[3:] == [("vllm", level) for level in (2, 1, 8, 4, 2)]


def test_a_point_spoiled_by_others_waits_for_another_start(tmp_path, monkeypatch, took):
    monkeypatch.setattr("lib.bench.sweep.other_gpu_processes", lambda: [4711])
    p = Bench(**PARAMS | {"servers": ["vllm"], "concurrency": [1, 2], "repeats": 1})
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took == [("vllm", 1), ("vllm", 2)]
    monkeypatch.setattr("lib.bench.sweep.other_gpu_processes", lambda: [])
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    sweep("base", p, every_input(), {"client": "host:"}, tmp_path / "work")
    assert took[2:] == [("vllm", 1), ("vllm", 2)]


def test_a_point_may_take_what_its_tokens_take():
    # What the slowest card for the profile writeup needs, with the client's start: 461 and 420 s.
    p = Bench(**PARAMS | {"requests_per_stream": 9, "min_requests": 40, "point_seconds": 300})
    batch, long = Point("vllm", 512, 256, 64, "corrected", 1), Point("vllm", 128, 1024, 1, "corrected", 1)
    assert (limit(p, batch), limit(p, long)) == (4806, 1375)


def test_a_client_that_hangs_is_given_up(bench):
    set_params(bench.tree, bench={"point_seconds": 2})
    done = bench(client="hangs 1")
    said = "error: genai-perf took longer than 10 s (bench.point_seconds and its tokens); its output: .work/"
    assert error_of(done).startswith(said)
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
