"""
The load clients (lib/serving/clients.py), on what all three really wrote and sent.

fixtures/clients/NAME holds one run of 8 requests at concurrency 1 against stages/workers/mock_server.py (TTFT 20 ms,
ITL 5 ms, 64 tokens in, 32 out): the client's summary, its command, and mock.json, what the server saw. Of the files
only the path of the checkout was changed, to /repo.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO

from lib.bench.metrics import named_as_points
from lib.client_accuracy.truth import COMPARED, STATISTICS
from lib.core.stage import UserError
from lib.serving.client_summary import KEYS
from lib.serving.clients import CLIENTS, RandomBench
from lib.serving.load import Load, read_prompts

RECORDED = Path(__file__).parents[1] / "fixtures" / "clients"
FOLDERS = {"genai-perf": "genai-perf", "vllm bench serve": "vllm-bench-serve", "AIPerf": "aiperf"}
SUMMARY = {
    "genai-perf": "profile_export_genai_perf.json",
    "vllm bench serve": "vllm_bench.json",
    "AIPerf": "profile_export_aiperf.json",
}
LOAD = Load(
    url="http://127.0.0.1:8000", model="mock", concurrency=1, requests=8, warmup=2, input_tokens=64, output_tokens=32,
    prompts=Path("results/embedded/rulers/prompts.jsonl"), tokenizer=Path("results/embedded/base_model/model"), seed=42,
    folder=Path("results/embedded/rulers/raw"),
)  # fmt: skip

every_client = pytest.mark.parametrize("name", CLIENTS)


def recorded(name, file=None):
    return json.loads((RECORDED / FOLDERS[name] / (file or SUMMARY[name])).read_text())


@pytest.fixture
def folder(tmp_path, request):
    """A copy of what the client wrote, to damage."""
    return shutil.copytree(RECORDED / FOLDERS[request.getfixturevalue("name")], tmp_path / "raw")


@every_client
def test_what_was_recorded_was_made_by_the_command_as_it_stands(name):
    load = replace(LOAD, folder=LOAD.folder / f"mock-20-5-1-{name.replace(' ', '-')}-1")
    assert CLIENTS[name].command(load) == recorded(name, "command.json")


def test_all_clients_answer_with_the_same_names():
    names = [set(client.read(RECORDED / FOLDERS[name])) for name, client in CLIENTS.items()]
    assert names[0] == names[1] == names[2] == set(KEYS) > set(COMPARED)


@every_client
def test_requests_and_lengths_are_those_that_the_server_saw(name):
    said, seen = CLIENTS[name].read(RECORDED / FOLDERS[name]), recorded(name, "mock.json")
    assert said["requests"] == len(seen) == 8
    assert said["input_tokens"] == seen[0]["prompt_tokens"] == 64
    assert said["output_tokens"] == len(seen[0]["written"]) == 32


def test_the_random_client_sends_the_writeups_command():
    words = " ".join(RandomBench().command(LOAD))
    for each in ("--dataset-name random", "--random-input-len 64", "--random-output-len 32", "--num-prompts 8",
                 "--max-concurrency 1", "--ignore-eos", "--endpoint /v1/completions"):  # fmt: skip
        assert each in words
    assert not any(each in words for each in ("None", "--dataset-path", "--extra-body", "--ready-check"))


def test_a_point_of_the_random_client_calls_tpot_itl():
    point, theirs = named_as_points(RandomBench().read(RECORDED / "vllm-bench-serve")), recorded("vllm bench serve")
    assert point["itl_ms_p90"] == theirs["p90_tpot_ms"] != theirs["p90_itl_ms"]


def test_single_latencies_average_to_the_clients_own():
    latencies = RandomBench().latencies(RECORDED / "vllm-bench-serve")
    assert len(latencies) == 8
    assert sum(latencies) / 8 * 1000 == pytest.approx(recorded("vllm bench serve")["mean_e2el_ms"], rel=0.01)


def test_each_number_is_the_clients_own_under_our_name():
    genai, vllm, aiperf = (recorded(name) for name in CLIENTS)
    said = {name: client.read(RECORDED / FOLDERS[name]) for name, client in CLIENTS.items()}
    assert said["genai-perf"]["tpot_ms_p90"] == genai["inter_token_latency"]["p90"]
    assert said["AIPerf"]["tpot_ms_p90"] == aiperf["inter_token_latency"]["p90"]
    assert said["AIPerf"]["itl_ms_p90"] == aiperf["inter_chunk_latency"]["p90"]
    assert said["vllm bench serve"]["tpot_ms_p90"] == vllm["p90_tpot_ms"]
    assert said["vllm bench serve"]["itl_ms_avg"] == vllm["mean_itl_ms"]
    assert said["vllm bench serve"]["request_latency_ms_p99"] == vllm["p99_e2el_ms"]
    assert said["vllm bench serve"]["output_tokens_per_second"] == vllm["output_throughput"]


def test_our_formulas_give_the_tpot_and_itl_of_vllm():
    found = recorded("vllm bench serve")
    tpots = [
        1000 * (latency - ttft) / (tokens - 1)
        for latency, ttft, tokens in zip(found["latencies"], found["ttfts"], found["output_lens"], strict=True)
    ]
    gaps = [1000 * gap for one in found["itls"] for gap in one]
    said = CLIENTS["vllm bench serve"].read(RECORDED / "vllm-bench-serve")
    assert said["tpot_ms_avg"] == pytest.approx(sum(tpots) / len(tpots))
    assert said["itl_ms_avg"] == pytest.approx(sum(gaps) / len(gaps))


def test_a_missing_metric_is_none_and_never_0():
    said = {name: client.read(RECORDED / FOLDERS[name]) for name, client in CLIENTS.items()}
    assert [said["genai-perf"][f"itl_ms_{one}"] for one in STATISTICS] == [None] * 5
    assert said["genai-perf"]["failed"] is None
    assert said["vllm bench serve"]["per_user_tokens_per_second"] is None
    # The others do count failures, and there were none.
    assert said["vllm bench serve"]["failed"] == said["AIPerf"]["failed"] == 0


@pytest.mark.parametrize(("key", "value", "failed"), [("completed", 5, 3), ("completed", 0, 8)])
def test_vllm_failures_count_and_have_no_times(tmp_path, key, value, failed):
    (tmp_path / "vllm_bench.json").write_text(json.dumps(recorded("vllm bench serve") | {key: value}))
    said = CLIENTS["vllm bench serve"].read(tmp_path)
    assert said["failed"] == failed
    assert (said["ttft_ms_avg"] is None) == (said["output_tokens"] is None) == (value == 0)


def test_aiperfs_failed_requests_are_counted(tmp_path):
    failing = recorded("AIPerf") | {"completed_request_count": {"unit": "requests", "avg": 11.0}}
    (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(failing))
    assert CLIENTS["AIPerf"].read(tmp_path)["failed"] == 3


def test_an_aiperf_run_that_was_cancelled_is_no_measurement(tmp_path):
    (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(recorded("AIPerf") | {"was_cancelled": True}))
    with pytest.raises(UserError, match=r"profile_export_aiperf\.json: AIPerf did not finish"):
        CLIENTS["AIPerf"].read(tmp_path)


def damaged(text, how):
    return {"truncated": text[: len(text) // 2], "empty": "", "duplicated": text + text, "a list": f"[{text}]"}[how]


@every_client
@pytest.mark.parametrize("how", ["truncated", "empty", "duplicated", "a list"])
def test_a_damaged_file_is_named(name, how, folder):
    path = folder / SUMMARY[name]
    path.write_text(damaged(path.read_text(), how))
    with pytest.raises(UserError) as error:
        CLIENTS[name].read(folder)
    assert str(error.value).startswith(f"{path}: ")


@every_client
def test_two_runs_in_one_folder_or_none_are_no_measurement(name, folder):
    (folder / "again").mkdir()
    shutil.copy(folder / SUMMARY[name], folder / "again")
    with pytest.raises(UserError, match=rf"^{folder}: 2 files .*, want 1"):
        CLIENTS[name].read(folder)
    with pytest.raises(UserError, match=r": 0 files .*, want 1"):
        CLIENTS[name].read(folder / "nowhere")


@every_client
def test_a_file_without_the_count_of_requests_is_no_measurement(name, folder):
    path, key = folder / SUMMARY[name], "completed" if name == "vllm bench serve" else "request_count"
    path.write_text(json.dumps({k: value for k, value in recorded(name).items() if k != key}))
    with pytest.raises(UserError, match=f"{SUMMARY[name]}: {key} is missing"):
        CLIENTS[name].read(folder)


@pytest.mark.parametrize("name", ["genai-perf", "AIPerf"])
def test_a_number_in_another_unit_is_refused(name, folder):
    other = recorded(name)
    other["time_to_first_token"]["unit"] = "s"
    (folder / SUMMARY[name]).write_text(json.dumps(other))
    with pytest.raises(UserError, match="time_to_first_token is in 's', want 'ms'"):
        CLIENTS[name].read(folder)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"] * 9, "9 prompts, 8 requests and 2 to warm up need one each"),
        ([*"abcdefghij", "a"], "1 prompts stand there twice"),
    ],
)
def test_too_few_or_repeated_prompts_are_refused(tmp_path, texts, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "prompt": text}) + "\n" for text in texts))
    with pytest.raises(UserError, match=message):
        read_prompts(replace(LOAD, prompts=path))


FAKE_VLLM = """
class CustomDataset: pass
class SampleRequest: pass
def add_cli_args(parser): parser.add_argument("--seed")
def main(args): print(args.seed, args.extra_body)
"""


def test_a_vllm_that_knows_no_extra_body_is_started_all_the_same(tmp_path):
    folder = tmp_path / "vllm" / "benchmarks"
    folder.mkdir(parents=True)
    for name in ("datasets", "serve"):
        (folder / f"{name}.py").write_text(FAKE_VLLM)
    command = [sys.executable, REPO / "stages/workers/vllm_bench.py", "--seed", "1", "--extra-body", "{}"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "1 {}\n", done.stderr


def test_aiperf_ignores_the_users_offline_hub_setting():
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        ["containers/run", "venv:aiperf", "env"], cwd=REPO, env=offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "OFFLINE" not in done.stdout
