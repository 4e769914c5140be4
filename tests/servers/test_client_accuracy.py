"""The stage that holds the load clients against a known server: that server, live, and the judging of real runs."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import REPO

from lib.client_accuracy.truth import COMPARED, judge_run, lateness, server_counts, true_numbers, wrong
from lib.core.stage import UserError
from lib.report import client_accuracy
from lib.report.page import to_html, to_markdown
from lib.serving.clients import CLIENTS
from lib.serving.load import warm_up
from lib.serving.process import is_ready
from stages.client_accuracy import ClientAccuracy, make_prompts, order
from tests.unit.test_clients import FOLDERS, LOAD, RECORDED, recorded

# A vocabulary of words: every word of a prompt is one token, and a BOS stands before it, as Llama's does.
WORDS = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
    "post_processor": {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    },
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "the": 1, "<s>": 2}, "unk_token": "[UNK]"},
}  # fmt: skip


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    """The folder of a running mock server with 12 prompts of 2 words."""
    folder = tmp_path_factory.mktemp("mock")
    (folder / "tokenizer.json").write_text(json.dumps(WORDS))
    lines = (json.dumps({"text": f"prompt {n}", "prompt": f"prompt {n}"}) for n in range(12))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    command = [
        "containers/run",
        "venv:client",
        "python3",
        "-m",
        "stages.workers.mock_server",
        folder,
        folder / "prompts.jsonl",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not is_ready("http://127.0.0.1:8000/health") and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.poll() is None, (folder / "log").read_text()
        yield folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def talk(connection, method, path, body=None):
    """The answer as text, on a connection that stays open."""
    connection.request(method, path, None if body is None else json.dumps(body))
    return connection.getresponse().read().decode()


def completion(prompt, tokens, **more):
    return {"model": "mock", "prompt": prompt, "max_tokens": tokens, "stream": True, **more}


def events(text):
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_an_answer_is_one_chunk_a_token_then_usage_then_the_end(mock):
    connection = http.client.HTTPConnection("127.0.0.1", 8000)
    talk(connection, "POST", "/mock", {"ttft_ms": 1, "itl_ms": 1})
    usage = {"stream_options": {"include_usage": True}}
    *tokens, counts, done = events(talk(connection, "POST", "/v1/completions", completion("prompt 3", 5, **usage)))
    assert [json.loads(event)["choices"][0]["text"] for event in tokens] == [" the"] * 5
    assert [json.loads(event)["choices"][0]["finish_reason"] for event in tokens] == [None] * 4 + ["length"]
    assert json.loads(counts)["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert done == "[DONE]"
    # The same connection, a prompt in a list of one as genai-perf sends it, and no usage asked for.
    assert len(events(talk(connection, "POST", "/v1/completions", completion(["prompt 4"], 3)))) == 4


def test_lateness_is_measured_from_each_tokens_deadline(mock):
    connections = [http.client.HTTPConnection("127.0.0.1", 8000) for _ in range(3)]
    talk(connections[0], "POST", "/mock", {"ttft_ms": 30, "itl_ms": 10})
    for n, connection in enumerate(connections):  # at once: none is answered yet
        connection.request("POST", "/v1/completions", json.dumps(completion(f"prompt {n}", 8)))
    for connection in connections:
        connection.getresponse().read()
    requests = json.loads(talk(connections[0], "GET", "/mock"))
    assert len(requests) == 3
    for request in requests:
        assert request["due"] == pytest.approx([request["arrived"] + 0.03 + 0.01 * n for n in range(8)])
        assert all(
            written >= due - 1e-6 for written, due in zip(request["written"], request["due"], strict=True)
        )  # never early
    late = [1000 * (w - d) for request in requests for w, d in zip(request["written"], request["due"], strict=True)]
    assert lateness(requests)["max"] == max(late)


def test_a_new_timing_clears_the_recorded_requests(mock):
    connection = http.client.HTTPConnection("127.0.0.1", 8000)
    talk(connection, "POST", "/mock", {"ttft_ms": 0, "itl_ms": 0})
    talk(connection, "POST", "/v1/completions", completion("four words of text", 2, min_tokens=2, ignore_eos=True))
    (request,) = json.loads(talk(connection, "GET", "/mock"))
    asked = {"max_tokens": 2, "min_tokens": 2, "ignore_eos": True, "temperature": None, "stream": True}
    assert {name: request[name] for name in asked} == asked
    assert request["prompt_tokens"] == 5  # the BOS too
    talk(connection, "POST", "/mock", {"ttft_ms": 0, "itl_ms": 0})
    assert json.loads(talk(connection, "GET", "/mock")) == []


def test_warm_up_sends_no_prompt_that_is_measured_later(mock):
    connection = http.client.HTTPConnection("127.0.0.1", 8000)
    talk(connection, "POST", "/mock", {"ttft_ms": 0, "itl_ms": 0})
    load = replace(LOAD, prompts=mock / "prompts.jsonl", warmup=3, input_tokens=3, output_tokens=4)
    warm_up(load)
    sent = json.loads(talk(connection, "GET", "/mock"))
    keys = ("max_tokens", "min_tokens", "ignore_eos")
    assert [tuple(request[key] for key in keys) for request in sent] == [(4, 4, True)] * 3
    # They are none of the 8 that a client would send first.
    reasons = wrong(load, sent)
    assert "3 prompts are not among the file's first 8" in reasons


def test_a_failed_warm_up_is_a_one_line_error(mock):
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:1: the server did not answer while it was warmed up"):
        warm_up(replace(LOAD, url="http://127.0.0.1:1", prompts=mock / "prompts.jsonl"))


# What was so, and what a client said of it.


def request(arrived, *written):
    return {"arrived": arrived, "due": list(written), "written": list(written)}


def test_what_was_so_follows_from_the_written_times():
    # 1 s to the first token and gaps of 1 and 3 s; then 2 s and gaps of 2 and 2 s.
    truth = true_numbers([request(0, 1, 2, 5), request(10, 12, 14, 16)])
    assert truth["ttft_ms_avg"] == 1500
    assert truth["tpot_ms_avg"] == 2000
    assert (truth["itl_ms_avg"], truth["itl_ms_p50"]) == (2000, 2000)
    assert truth["itl_ms_p99"] == pytest.approx(2970)  # the pool is 1, 2, 2, 3 s
    assert truth["request_latency_ms_avg"] == 5500
    assert truth["output_tokens_per_second"] == 6 / 16


def test_lateness_is_written_less_due():
    late = lateness([{"due": [1.0, 2.0], "written": [1.001, 2.003]}])
    assert (late["avg"], late["max"]) == (pytest.approx(2), pytest.approx(3))


@pytest.fixture
def load(tmp_path):
    """The load of the recorded runs, with their prompts."""
    shutil.copy(RECORDED / "prompts.jsonl", tmp_path)
    return replace(LOAD, prompts=tmp_path / "prompts.jsonl", folder=tmp_path)


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_sends_each_prompt_once_at_its_length(name, load):
    assert wrong(load, recorded(name, "mock.json")) == []


@pytest.mark.parametrize("name", CLIENTS)
def test_the_error_is_the_reported_minus_the_true_value(name, load):
    reported = CLIENTS[name].read(RECORDED / FOLDERS[name])
    run = judge_run(load, reported, {"wall": 9.0, "client_cpu": 2.0}, recorded(name, "mock.json"))
    assert run["valid"] and set(run["error"]) == set(COMPARED)
    for key in COMPARED:
        if reported[key] is None:
            assert run["error"][key] is None and run["error_percent"][key] is None
        else:
            assert run["error"][key] == reported[key] - run["known"][key]
    # A client cannot see a first token before it was written.
    assert run["error"]["ttft_ms_avg"] > 0
    assert run["seconds"]["overhead"] == 9.0 - run["seconds"]["load"]


def without_last(seen):
    return seen[:-1]


def first_twice(seen):
    return [*seen[:-1], seen[0]]


def changed(**more):
    return lambda seen: [seen[0] | more, *seen[1:]]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (without_last, "7 requests arrived, 8 were asked for"),
        (first_twice, "1 prompts arrived twice"),
        (changed(prompt_sha256="f" * 64), "1 prompts are not among the file's first 8"),
        (changed(prompt_tokens=65), "prompt_tokens is 65, not 64"),
        (changed(max_tokens=16), "max_tokens is 16, not 32"),
        (changed(ignore_eos=None), "ignore_eos is None, not True"),
        (changed(temperature=0.7), "temperature is 0.7, not 0"),
        (changed(written=[1.0, 2.0], due=[1.0, 2.0]), "1 answers were cut off"),
    ],
)
def test_a_run_with_another_load_is_invalid_with_a_reason(how, reason, load):
    reported = CLIENTS["AIPerf"].read(RECORDED / "aiperf")
    run = judge_run(load, reported, {"wall": 9.0, "client_cpu": 2.0}, how(recorded("AIPerf", "mock.json")))
    assert not run["valid"] and reason in run["invalid_reasons"]


def test_the_clients_take_turns_so_that_a_drift_hits_all_of_them():
    names = list(CLIENTS)
    assert [name for name, _ in order()] == names + names[::-1]
    assert sorted(order()) == sorted((name, turn) for name in names for turn in (1, 2))


def test_the_server_count_decides_if_the_load_is_valid():
    before = {"requests": 2, "input_tokens": 128, "output_tokens": 64, "ttft_seconds": 1.0, "request_seconds": 4.0}
    after = {"requests": 10, "input_tokens": 640, "output_tokens": 320, "ttft_seconds": 1.8, "request_seconds": 12.0}
    counts = server_counts(LOAD, before, after)
    assert counts["valid"] and counts["server"]["ttft_ms_avg"] == pytest.approx(100)
    assert counts["server"]["request_latency_ms_avg"] == 1000
    short = server_counts(LOAD, before, after | {"output_tokens": 300})
    assert short["invalid_reasons"] == ["the server counted 29.5 output_tokens, 32 were asked for"]
    unknown = server_counts(LOAD, {}, {})
    assert not unknown["valid"] and unknown["server"]["ttft_ms_avg"] is None


PARAMS = {
    "timings": [[20, 5, 1]], "input_tokens": 64, "output_tokens": 32, "requests_per_stream": 8,
    "server_concurrency": [1], "warmup_requests": 2, "seed": 42, "ready_seconds": 9, "run_seconds": 9,
    "server_options": [],
}  # fmt: skip


def test_a_client_that_takes_too_long_names_this_stages_setting(tmp_path):
    with pytest.raises(
        UserError, match=r"^prompts\.py took longer than 0 s \(client_accuracy\.run_seconds\); its output: "
    ):
        make_prompts(SimpleNamespace(**PARAMS | {"run_seconds": 0}), {"client": "host:"}, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("timings", [[20, 5]], r"client_accuracy.timings has \[20, 5\]; want \[TTFT in ms, ITL in ms, concurrency\]"),
        ("timings", [[20, 5, 0.5]], r"client_accuracy.timings has \[20, 5, 0.5\]"),
        ("timings", [["20", 5, 1]], r"client_accuracy.timings has \['20', 5, 1\]"),
        ("server_concurrency", [0], r"client_accuracy.server_concurrency is \[0\]"),
        ("output_tokens", 1, "client_accuracy.output_tokens is 1; use 2 or more"),
    ],
)
def test_a_wrong_parameter_is_named(key, value, message):
    with pytest.raises(UserError, match=message):
        ClientAccuracy(**PARAMS | {key: value})


# The report.


REFERENCE = REPO / "results" / "reference" / "embedded-2-cores"


def blocks_of(folder):
    return list(client_accuracy.client_accuracy({"runs": {"mine": {"folder": str(folder)}}}))


def test_the_report_names_each_metric_as_each_client_does():
    blocks = blocks_of(REFERENCE)
    errors, costs, server, names = (block[2] for block in blocks if block[0] == "table")
    assert {row[2] for row in errors} == {row[0] for row in costs} == {row[1] for row in server} == set(CLIENTS)
    (tpot,) = (row for row in names if row[0] == "`tpot_ms`")
    assert tpot[2:] == ["Inter Token Latency", "TPOT", "Inter Token Latency"]
    data = json.loads((REFERENCE / "client_accuracy/client_accuracy.json").read_text())
    both = [run["error"]["ttft_ms_avg"] for run in data["mock"] if run["client"] == "AIPerf"][:2]
    (row,) = (row for row in errors if row[1:3] == [errors[0][1], "AIPerf"])
    assert row[3] == f"{sum(both) / 2:+.2f}"
    assert "The load clients: mine" in to_html("a", "", blocks, ()) and "whose" in to_markdown("a", blocks).lower()


def test_an_invalid_run_is_named_and_left_out_of_the_report(tmp_path):
    data = json.loads((REFERENCE / "client_accuracy/client_accuracy.json").read_text())
    first = data["mock"][0]
    first |= {"valid": False, "invalid_reasons": ["7 requests arrived, 8 were asked for"]}
    (tmp_path / "client_accuracy").mkdir()
    (tmp_path / "client_accuracy/client_accuracy.json").write_text(json.dumps(data))
    texts = [block[1] for block in blocks_of(tmp_path) if block[0] == "text"]
    which = f"{first['client']}, concurrency {first['concurrency']}, run 1"
    assert f"Invalid, 7 requests arrived, 8 were asked for: {which}." in texts


def test_without_a_run_the_report_names_the_command(tmp_path):
    assert blocks_of(tmp_path)[1] == ("text", "Not measured yet. `make client-accuracy` measures it.")
