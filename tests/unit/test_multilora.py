"""The stage multilora: the adapter that each request names, the proof that it got it, adapters with random weights."""

import json
import subprocess
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import REPO, left_out

from lib.core.stage import UserError, read_json, write_json
from lib.multilora.cost import draw_adapters, kv_tokens
from lib.multilora.isolation import compare_answers
from lib.serving.servers import ADAPTERS
from stages import multilora
from stages.multilora import Multilora

P = {"servers": ["vllm"], "prompts": "data/multilora_prompts.json", "proof_tokens": 10, "adapters": [1, 4],
     "ranks": [8], "target_modules": ["q_proj"], "popularity": ["uniform"], "max_loras": 2, "questions": "q",
     "concurrency": 1, "requests": 1, "output_tokens": 1, "seed": 1, "ready_seconds": 1, "client_seconds": 1,
     "server_options": []}  # fmt: skip


# The proof.


def rows(*answers):
    return [
        {"prompt": prompt, "adapter": adapter, "together": together, "alone": alone}
        for prompt, adapter, together, alone in answers
    ]


def test_an_answer_of_another_adapter_is_found():
    same = [("p", None, "base", "base"), ("p", "lora", "one", "one"), ("p", "qlora", "two", "two")]
    assert compare_answers(rows(*same)) == {"requests": 3, "same_as_alone": 3, "different_answers": 3,
                                            "with_an_adapter": 2,
                                     "other_than_adapter_off": 2}  # fmt: skip
    mixed = compare_answers(rows(*same[:2], ("p", "qlora", "one", "two")))
    assert (mixed["same_as_alone"], mixed["different_answers"]) == (2, 2)


def test_an_adapter_without_effect_is_no_proof():
    silent = compare_answers(
        rows(("p", None, "base", "base"), ("p", "lora", "base", "base"), ("p", "qlora", "base", "base"))
    )
    assert silent["same_as_alone"] == 3 and silent["other_than_adapter_off"] == 0 == silent["different_answers"] - 1


def test_the_six_prompts_are_the_writeups_two_three_times_each():
    prompts = json.loads((REPO / "data" / "multilora_prompts.json").read_text())
    assert [prompts.count(one) for one in dict.fromkeys(prompts)] == [3, 3] and prompts[:3] == [prompts[0]] * 3
    # The shell passes \n on as it stands: its printed token ids show a backslash and an n.
    assert all("\\n" in one and "\n" not in one for one in prompts)


# A run that is cut off.


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """A GPU machine whose vLLMs are doubles; set `fails` to the name of one that fails. Returns (run, asked)."""
    asked, fails = [], set()

    class Vllm:
        def __init__(self, model, inputs):
            self.command, self.engine = lambda options: ["vllm"], lambda: ("a double", True)

    def measure_server(p, asking, name, exact):
        asked.append(name)
        if name in fails:
            raise UserError(f"no kernel for {name}")
        return {"proof": {"served": {}} if name == 8 else {}, "points": [{"variant": name}]}

    @contextmanager
    def serving(server, command, log, seconds, key):
        yield None, 1.0

    monkeypatch.setattr(multilora, "SERVERS", {"vllm": Vllm})
    monkeypatch.setattr(multilora, "serving", serving)
    monkeypatch.setattr(multilora, "measure_server", measure_server)
    monkeypatch.setattr(multilora, "working_folder", lambda p, images: work)
    monkeypatch.setattr(multilora, "results", lambda name: tmp_path)
    (work := tmp_path / "work").mkdir()
    (tmp_path / "machine.json").write_text('{"gpus": [{"name": "a GPU"}]}')
    for adapter in ADAPTERS:
        write_json(tmp_path / adapter / "adapter/adapter_config.json", {"r": 4})
    p = Multilora(**{**P, "ranks": [8, 64]})
    return partial(multilora.measure_vllm, p, ["host:", "host:"], tmp_path / "out"), asked, fails


def test_an_interrupted_study_resumes_at_its_server(servers):
    run, asked, fails = servers
    fails.add(64)
    with pytest.raises(UserError, match="no kernel for 64"):
        run()
    fails.clear()
    found = run()
    assert asked == ["none", "batch-invariant", 8, 64, 64]
    assert [one["variant"] for one in found["points"]] == ["none", "batch-invariant", 8, 64]


def test_a_server_without_exact_proof_gives_a_reason(servers):
    run, _, fails = servers
    fails.add("batch-invariant")
    found = run()
    assert found["proof"] == {"served": {}, "batch-invariant": {"not_measured": "no kernel for batch-invariant"}}
    assert [one["variant"] for one in found["points"]] == ["none", 8, 64]


@pytest.mark.parametrize(("ours", "ranks"), [(8, ["8", "8", "64"]), (16, ["16", "16", "64"])])
def test_a_server_of_our_adapters_has_room_for_their_rank(ours, ranks):
    p = Multilora(**{**P, "ranks": [8, 64]})
    server = SimpleNamespace(command=lambda options: ["vllm"])
    runs = multilora.commands(p, "host:", server, ("float32", [], []), ours)
    assert [words[words.index("--max-lora-rank") + 1] for words in list(runs.values())[1:]] == ranks


# The study.


def test_skewed_requests_prefer_the_first_adapter():
    names = [f"random-{number}" for number in range(8)]
    skewed, uniform = (Counter(draw_adapters(names, kind, 8000, 1)) for kind in ("skewed", "uniform"))
    assert skewed["random-0"] / skewed["random-7"] == pytest.approx(8, rel=0.25)
    assert uniform["random-0"] / uniform["random-7"] == pytest.approx(1, rel=0.15)
    assert (
        draw_adapters(names, "skewed", 50, 1)
        == draw_adapters(names, "skewed", 50, 1)
        != draw_adapters(names, "skewed", 50, 2)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": [4]}, r"multilora.ranks is \[4\]; vLLM takes 8, 16"),
        ({"adapters": [4, 1]}, r"multilora.adapters is \[4, 1\]; use growing numbers from 1"),
        ({"popularity": ["zipf"]}, "multilora.popularity has 'zipf'; use uniform, skewed"),
        ({"servers": ["tgi"]}, "multilora.servers has 'tgi'; use triton, vllm"),
    ],
)
def test_wrong_parameters_say_what_to_mend(values, message):
    with pytest.raises(UserError, match=message):
        Multilora(**{**P, **values})


def test_the_kv_cache_size_is_that_of_vllm():
    exposition = (REPO / "tests/fixtures/multilora/metrics.txt").read_text()
    assert 'kv_cache_size_tokens="23296"' in exposition  # newer versions say so; older ones the blocks alone
    assert kv_tokens(exposition) == 23296
    assert kv_tokens(exposition.replace('num_gpu_blocks="182"', 'num_gpu_blocks="None"')) is None
    assert kv_tokens("vllm:num_requests_running 1.0\n") is None


def test_no_more_slots_than_adapters():
    assert Multilora(**P).slots == 2 and Multilora(**{**P, "max_loras": 64}).slots == 4


def test_a_server_that_is_left_out_stands_as_not_measured(tree):
    written = left_out(tree, "multilora")
    assert (written["engine"], written["not_measured"]) == (None, "params.yaml: multilora.servers has no vllm")


# Adapters with random weights.


def random_lora(model, out, *words):
    command = ["containers/run", "venv:client", "python3", "stages/workers/random_lora.py", model, out, *words]
    return subprocess.run([str(word) for word in command], cwd=REPO, capture_output=True, text=True)


def test_a_seed_gives_the_same_adapter_bytes(base_model, tmp_path):
    model = base_model / "model"
    for out, rank in (("a", 8), ("b", 8), ("c", 16)):
        done = random_lora(model, tmp_path / out, 2, rank, 42, "q_proj", "v_proj")
        assert done.returncode == 0, done.stderr
    first, again, second, larger = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a/0", "b/0", "a/1", "c/0")
    )
    assert first == again != second
    # 30 layers of SmolLM2: q from 576 to 576, v from 576 to 192, two bytes each; the rest is the files' heads.
    numbers = 30 * 8 * (576 + 576 + 576 + 192)
    assert 0 <= len(first) - 2 * numbers < 20_000 and len(larger) - len(first) == pytest.approx(2 * numbers, abs=1000)
    config = read_json(tmp_path / "c" / "0" / "adapter_config.json")
    assert (config["r"], config["target_modules"]) == (16, ["q_proj", "v_proj"])


def test_a_module_that_the_model_has_not_is_named(base_model, tmp_path):
    done = random_lora(base_model / "model", tmp_path / "a", 1, 8, 42, "q_proj", "c_attn")
    assert done.returncode == 1 and "no weight of the model belongs to c_attn" in done.stderr
