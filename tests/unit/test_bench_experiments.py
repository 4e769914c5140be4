"""The experiments of the benchmark: their points, order, time and parameters."""

import json

import pytest
from bench_inputs import PARAMS
from conftest import REPO, every_input

from lib.bench.experiments import Bench, Clock, Point, coarse_to_fine, seconds_of, visits, with_experiment
from lib.core.stage import UserError, load_yaml
from stages.workers.random_weights import GPTQ


def test_servers_take_turns_and_neighbours_share_a_start():
    p = Bench(**PARAMS | {"repeats": 3, "concurrency": [1]})
    order = [(server, [point.repeat for point in group]) for server, group in visits(p)]
    assert order == [("triton", [1]), ("vllm", [1, 2]), ("triton", [2, 3]), ("vllm", [3])]


def test_a_sweep_begins_with_its_ends_and_halves_the_gaps():
    assert coarse_to_fine([1, 2, 4, 8, 16, 32, 64]) == [1, 64, 8, 4, 32, 2, 16]
    assert coarse_to_fine([1]) == [1] and coarse_to_fine([1, 4]) == [1, 4]
    for count in range(1, 12):
        assert sorted(coarse_to_fine(list(range(count)))) == list(range(count))


def test_servers_together_have_ports_of_their_own():
    p = Bench(**PARAMS | {"servers": ["vllm", "vllm-fp8"], "together": True})
    server, _ = p.server("vllm-fp8", every_input())
    assert (server.ready, server.ports) == ("http://127.0.0.1:8001/health", (8001,))
    assert server.client(p, 32)["url"] == "http://127.0.0.1:8001"
    assert p.server("vllm", every_input())[0].ports == (8000,)


def test_the_gptq_servers_differ_in_one_thing():
    bench = load_yaml(REPO / "params.yaml")["bench"] | load_yaml(REPO / "experiments.yaml")["bench"]
    p = with_experiment(Bench(**bench), "gptq")
    plain, flag, both = (p.options(f"vllm-{name}") for name in ("auto", "gptq", "gptq-act"))
    assert flag == [*plain, "--quantization=gptq"] == both[:-1]
    name, _, override = both[-1].partition("=")
    assert (name, json.loads(override)) == ("--hf-overrides", {"quantization_config": GPTQ | {"desc_act": True}})


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


def test_a_variant_changes_the_client_and_shares_the_server(embedded):
    p = Bench(**PARAMS | {"variants": ["corrected", "short"], "servers": ["vllm"], "concurrency": [1]})
    ((_, group),) = visits(p)
    assert [point.variant for point in group] == ["corrected", "short"]
    assert p.requests(1) == 8 and p.with_variant("short").requests(1) == 4


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
        ({"client": "ab"}, "bench.client is 'ab'; use genai-perf or vllm bench serve"),
        ({"together": True}, "bench.together needs a port for each server; triton has fixed ports"),
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


@pytest.mark.parametrize("name", ["trtllm", "trtllm-lora"])
def test_trtllm_serve_is_started_by_the_writeups_profile(name):
    params = load_yaml(REPO / "params.yaml")["bench"] | load_yaml(REPO / "profiles/writeup.yaml")["bench"]
    asked = with_experiment(Bench(**params), name)
    assert asked.servers == ["trtllm", "vllm"] and set(asked.servers) <= set(params["servers"])


def test_both_servers_of_the_writeup_take_as_many_requests():
    profile = load_yaml(REPO / "profiles/writeup.yaml")
    most = profile["engine"]["max_batch_size"]
    assert profile["repository"]["max_batch_size"] == most
    assert profile["bench"]["server_options"] == [f"--max-num-seqs={most}"]
