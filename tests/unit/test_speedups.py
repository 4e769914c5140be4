"""The stage speedups: five ways to speed up a local model in two variants, and many prompts at once."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
from conftest import REPO, at_once, only_error, probe, run_in, set_params

from lib.analysis.roofline import closed_loop
from lib.claims import judge
from lib.claims.claims import load_claims
from lib.core.stage import UserError, load_yaml, read_json, write_json
from lib.report import kv_cache, speedups
from lib.speedups.methods import METHODS, PUBLISHED
from lib.speedups.rows import not_run, published_seconds, rows, systems
from lib.speedups.tasks import run_tasks, tasks
from stages.speedups import Speedups
from stages.workers.generate_one import generate_options

P = Speedups(**load_yaml(REPO / "params.yaml")["speedups"])
IMAGES = {"pytorch": "venv:pytorch", "vllm": "venv:vllm"}
CPU, GPU = {"gpus": []}, {"gpus": [{"name": "NVIDIA GeForce RTX 3080 Laptop GPU"}]}
LLAMA = json.loads((REPO / "data" / "shapes" / "llama-2-7b.json").read_text())
RATES = {"bytes_per_second": 1e10, "flops_per_second": 1e12, "fp8_flops_per_second": None}
SYSTEMS = ("one", "static", "continuous", "vllm")


# The methods, really run: a tiny GPT-2, as llm-jp's is one.


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    from conftest import copy_tree

    folder = tmp_path_factory.mktemp("speedups")
    return probe(copy_tree(folder / "tree"), "venv:pytorch", "speedups", folder)


def test_every_transformers_method_answers_in_every_variant(answers):
    wanted = {f"{name}-corrected" for name in METHODS} | {f"{name}-published" for name in PUBLISHED}
    assert answers.keys() == wanted - {"vllm-corrected", "vllm-published", "compile-corrected"}
    for name, found in answers.items():
        assert [one["tokens"] for one in found["answers"]] == [6, 6], name
        assert all(0 < one["ttft_seconds"] < one["seconds"] for one in found["answers"]), name
        assert (len(found["warmups"]), found["prompt_tokens"], found["lines"]) == (1, 6, 3), name
        assert found["memory"]["process_peak_mib"] > 100, name
    # A single answer of so small a model may take less than a tick of the clock of CPU time.
    assert sum(one["cpu_seconds"] for found in answers.values() for one in found["answers"]) > 0


def test_only_the_static_cache_compiles_generate(answers):
    assert (
        answers["compile-published"]["compiled_graphs"] == answers["flash1-compile-published"]["compiled_graphs"] == 0
    )
    assert answers["flash1-compile-corrected"]["compiled_graphs"] > 0
    plain = [name for name in answers if "compile" not in name]
    assert {answers[name]["compiled_graphs"] for name in plain} == {0}


def test_only_the_corrected_variant_pins_the_length():
    sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}
    published = generate_options(P.method_task("none", "published"), METHODS["none"])
    assert published == {**sampling, "do_sample": True, "max_new_tokens": 24, "use_cache": False}
    corrected = generate_options(P.method_task("none", "corrected"), METHODS["none"])
    assert corrected["use_cache"] and corrected["min_new_tokens"] == corrected["max_new_tokens"] == 24
    assert P.method_task("none", "published")["warmup"] == 0 < P.method_task("none", "corrected")["warmup"]


# Many prompts at once, really run.


@pytest.fixture(scope="module")
def batches(small_tree):
    task = {"model": "results/embedded/base_model/model", "tokenizer": "results/embedded/base_model/model",
            "rows": "results/embedded/dataset/corrected/validation.jsonl", "batch_prompts": 4, "batch_size": 2,
            "seed": 1}  # fmt: skip
    write_json(small_tree / "batch.json", task)
    of = partial(probe, small_tree)
    return at_once(
        partial(of, "venv:vllm", "batches", "batch.json", "static", "continuous"),
        partial(of, "venv:pytorch", "batches", "batch.json", "one", "static"),
    )


def test_a_static_batch_computes_up_to_its_longest_answer(batches):
    lengths = [length for _, length in batches[0]["load"]]
    padded = 2 * max(lengths[:2]) + 2 * max(lengths[2:])
    assert len(set(lengths)) > 1 and padded > sum(lengths)
    assert batches[0]["made"] == {"static": padded, "continuous": sum(lengths)}
    assert batches[1]["made"] == {"one": sum(lengths), "static": padded}


def test_two_environments_read_the_same_load(batches):
    assert batches[0]["load"] == batches[1]["load"]


# What runs where.


def test_each_method_runs_in_its_own_environment():
    found = {task.name: task.image for task in tasks(P, IMAGES)}
    assert {name for name in found if name.endswith("-published")} == {f"{name}-published" for name in PUBLISHED}
    assert (found["vllm-corrected"], found["lookup-corrected"]) == ("venv:vllm", "venv:pytorch")
    assert (found["batch-continuous"], found["batch-vllm"]) == ("venv:vllm", "venv:vllm")


def test_int8_and_int4_are_not_run_on_a_cpu_and_say_why():
    listed = {task.name: task.words for task in tasks(P, IMAGES)}
    assert "bitsandbytes" in not_run(CPU, listed["int4-corrected"])
    assert not_run(GPU, listed["int4-corrected"]) is None is not_run(CPU, listed["none-corrected"])


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    started = []

    def client(name, command, log, process, seconds, key, monitor):
        started.append(name)
        write_json(command[-1], {"made": name})

    monkeypatch.setattr("lib.speedups.tasks.run_client", client)
    todo = tasks(P, IMAGES)
    write_json(tmp_path / f"{todo[0].name}.json", {"made": "before"})
    found, failed = run_tasks(P, todo, tmp_path)
    assert failed == {}
    assert started == [task.name for task in todo[1:]]
    assert found[todo[0].name] == {"made": "before"} and found.keys() == {task.name for task in todo}


def test_a_failed_method_gives_its_error_and_others_go_on(tmp_path, monkeypatch):
    script = tmp_path / "method.py"
    script.write_text("import json, sys\nif 'int8-' in sys.argv[1]: raise ValueError('no kernel for this GPU')\n"
                      "json.dump({'made': sys.argv[1]}, open(sys.argv[2], 'w'))\n")  # fmt: skip
    todo = [replace(task, image="host:", module="method") for task in tasks(P, IMAGES)]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, failed = run_tasks(P, todo, tmp_path)
    why = "int8-corrected failed (exit code 1): ValueError: no kernel for this GPU"
    assert failed == {"int8-corrected": why}
    assert found.keys() == {task.name for task in todo} - {"int8-corrected"}
    listed = {row["id"]: row for row in rows(P, GPU, {}, failed, LLAMA, RATES)}
    assert listed["int8-corrected"]["not_measured"] == why


# What is made of the measurements.


def result(method, variant, speeds, tokens=24):
    answers = [
        {"tokens": tokens, "seconds": tokens / speed, "ttft_seconds": 0.1, "cpu_seconds": 2.4} for speed in speeds
    ]
    made_by = {"image": "venv:pytorch", "versions": {}}
    return {"method": method, "variant": variant, "answers": answers, "warmups": [], "prompt_tokens": 34,
            "dtype": "bfloat16", "compiled_graphs": 0, "wall_seconds": 9.0, "made_by": made_by,
            "memory": {"process_peak_mib": 700.0, "device": "resident (CPU)"}}  # fmt: skip


def measured(machine=CPU):
    found = {"none-corrected": result("none", "corrected", [10, 20, 30]),
             "vllm-corrected": result("vllm", "corrected", [40, 40, 40])}  # fmt: skip
    return {row["id"]: row for row in rows(P, machine, found, {}, LLAMA, RATES)}


def test_a_method_is_compared_with_no_speedup():
    found = measured()
    assert found["none-corrected"]["tokens_per_second"] == 20 and found["vllm-corrected"]["interval"] == [40, 40]
    low, high = found["none-corrected"]["interval"]
    assert 10 <= low < 20 < high <= 30
    over = found["vllm-corrected"]["over_none"]
    assert over["ratio"] == 2 and over["low"] < 2 < over["high"]


def test_the_cpu_time_of_a_token_is_over_all_answers():
    assert measured()["none-corrected"]["cpu_seconds_per_token"] == pytest.approx(0.1)


def test_the_limit_reads_every_weight_once_a_token():
    found = measured()["vllm-corrected"]
    bound = closed_loop(LLAMA, "bf16", "bf16", RATES, 1, 34, 24)["apart_tokens_per_second"]
    assert found["share_of_limit"] == pytest.approx(40 / bound)
    # 13.2 GB of weights at 10 GB/s: less than one token a second.
    assert 0.5 < found["limit_tokens_per_second"] < 0.76


def test_what_was_not_measured_stands_there_with_the_reason():
    found = measured()
    assert found["int8-corrected"]["not_measured"].startswith("on a CPU bitsandbytes")
    assert "tokens_per_second" not in found["int8-corrected"]
    without = replace(P, methods=["none"])
    listed = {row["id"]: row for row in rows(without, GPU, {}, {}, LLAMA, RATES)}
    assert listed["int8-corrected"]["not_measured"] == "params.yaml: speedups.methods has no int8"


def test_total_seconds_need_every_published_method():
    took = [{"variant": "published", "wall_seconds": seconds} for seconds in (60.0, 40.0)]
    other = {"variant": "corrected", "wall_seconds": 7.0}
    assert published_seconds([*took, other]) == 100
    assert published_seconds([*took, {"variant": "published", "not_measured": "failed"}]) is None
    assert published_seconds([other]) is None


def batch(seconds, digest="a"):
    repeats = [{"seconds": one, "tokens": 100, "computed_tokens": 150, "cpu_seconds": 5.0} for one in seconds]
    return {"prompts_sha256": digest, "repeats": repeats, "prompt_tokens": 9.0, "output_tokens": [10, 90],
            "memory": {"process_peak_mib": 1.0}, "wall_seconds": 1.0,
            "made_by": {"image": "venv:a", "versions": {}}}  # fmt: skip


def test_systems_are_compared_with_static_batches():
    found = {"batch-static": batch([4, 5, 5]), "batch-vllm": batch([1, 1, 2])}
    listed = {one["system"]: one for one in systems(found, {})}
    assert (listed["static"]["tokens_per_second"], listed["vllm"]["over_static"]["ratio"]) == (20, 5)
    assert listed["one"]["not_measured"] == "params.yaml: speedups.batch_systems has no one"
    with pytest.raises(UserError, match="not given the same prompts"):
        systems({**found, "batch-vllm": batch([1, 1, 2], "b")}, {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods", ["flash3"], "speedups.methods has 'flash3'; use none, compile, flash1, "),
        ("variants", ["tuned"], "speedups.variants has 'tuned'; use published, corrected"),
        ("batch_systems", ["tgi"], "speedups.batch_systems has 'tgi'; use one, static, continuous, vllm"),
        ("answers", 0, "speedups.answers is 0; use 1 or more"),
    ],
)
def test_wrong_parameters_say_what_to_mend(key, value, message):
    with pytest.raises(UserError, match=message):
        Speedups(**{**asdict(P), key: value})


def test_a_wrong_parameter_stops_before_loading(tree):
    set_params(tree, speedups={"batch_environment": "triton"})
    words = [f"{role}={image}" for role, image in IMAGES.items()]
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.speedups", *words)
    assert only_error(done) == "error: params.yaml: speedups.batch_environment is 'triton'; use pytorch, vllm"


# Claims: the writeup's figure holds under its conditions only.


def judged(tmp_path, name, **changes):
    """The outcome of a claim in a run whose speedups.json is the recorded one with changes."""
    data = read_json(REPO / "tests/fixtures/speedups/speedups.json") | changes
    write_json(tmp_path / "speedups" / "speedups.json", data)
    claim = next(one for one in load_claims(REPO / "data/claims")[1] if one.id == name)
    return judge.outcome(claim, "a run", tmp_path, "", 0.1)


RTX = {"model": "llm-jp-1.3b shape", "gpus": GPU["gpus"], "answers": 100, "max_new_tokens": 256}


def test_another_model_machine_or_protocol_is_not_comparable(tmp_path):
    same = [{"id": "none-published", "tokens_per_second": 44.0}]
    assert judged(tmp_path, "five-baseline", rows=same)["verdict"] == "not comparable"
    assert judged(tmp_path, "five-baseline", rows=same, **RTX)["verdict"] == "reproduced"
    for other in ({"answers": 3}, {"max_new_tokens": 24}, {"model": "SmolLM2"}, {"gpus": [{"name": "NVIDIA H200"}]}):
        assert judged(tmp_path, "five-baseline", rows=same, **{**RTX, **other})["verdict"] == "not comparable", other


def test_four_methods_help_where_four_are_faster(tmp_path):
    speeds = dict(zip(PUBLISHED, (44.36, 43.60, 48.97, 65.59, 74.76, 102.69), strict=True))
    listed = [{"id": f"{name}-published", "tokens_per_second": speed} for name, speed in speeds.items()]
    found = judged(tmp_path, "five-four-help", rows=listed, **RTX)
    assert (found["verdict"], found["measured"]) == ("reproduced", True)
    assert judged(tmp_path, "five-two-stand-out", rows=listed, **RTX)["verdict"] == "reproduced"


def test_a_ratio_on_a_cpu_says_nothing_about_24_times(tmp_path):
    ratio = [{"system": "vllm", "tokens_per_second": 60.0}, {"system": "static", "tokens_per_second": 10.0}]
    assert judged(tmp_path, "vllm-24x", systems=ratio)["verdict"] == "not comparable"
    assert judged(tmp_path, "vllm-24x", systems=ratio, **RTX)["verdict"] == "direction only"


# The report.


def section(tmp_path, *stages):
    for stage in stages:
        data = read_json(REPO / f"tests/fixtures/speedups/{stage}.json")
        write_json(tmp_path / stage / f"{stage}.json", data)
    ledger = {"runs": {"a run": {"folder": str(tmp_path)}}}
    published = {name: {"value": 44.36} for name in speedups.CLAIMS.values()}
    return [*speedups.speedups(ledger, published), *kv_cache.kv_cache(ledger)]


def test_the_report_has_every_row_and_its_published_figure(tmp_path):
    blocks = section(tmp_path, "speedups", "kv_cache")
    table = next(block for block in blocks if block[0] == "table" and block[1][0] == "method")
    assert len(table[2]) == len(METHODS) + len(PUBLISHED)
    assert table[2][0][:3] == ["eager attention", "published", "44.36"]
    assert any("bitsandbytes" in cell for row in table[2] for cell in row)
    text = " ".join(block[1] for block in blocks if block[0] == "text")
    assert "torch.compile compiles nothing" in text and "KiB a token" in text
    figures = [block[1] for block in blocks if block[0] == "figure"]
    assert figures == ["speedups-a-run", "kv-waste-a-run"]


def test_the_figures_data_are_the_measured_ones(tmp_path):
    blocks = section(tmp_path, "speedups")
    drawn = next(block[2] for block in blocks if block[0] == "figure")
    recorded = read_json(REPO / "tests/fixtures/speedups/speedups.json")
    by_id = {row["id"]: row for row in recorded["rows"]}
    for variant in ("published", "corrected"):
        measured = {row["method"] for row in recorded["rows"] if row["variant"] == variant and not row["not_measured"]}
        assert drawn.data["tokens_per_second"][variant].keys() == measured
        for method, speed in drawn.data["tokens_per_second"][variant].items():
            assert speed == by_id[f"{method}-{variant}"]["tokens_per_second"]


def test_recorded_static_batches_compute_more_than_asked():
    recorded = read_json(REPO / "tests/fixtures/speedups/speedups.json")
    known = {one["system"]: one for one in recorded["systems"] if not one["not_measured"]}
    assert {"static", "continuous"} <= known.keys() and [one["system"] for one in recorded["systems"]] == list(SYSTEMS)
    assert len({tuple(one["output_tokens"]) for one in known.values()}) == 1
    assert known["static"]["computed_tokens"] > known["static"]["tokens"] == known["continuous"]["computed_tokens"]


def test_without_a_run_the_report_says_what_measures_it(tmp_path):
    texts = [block[1] for block in section(tmp_path) if block[0] == "text"]
    assert texts == ["Not measured yet. `make speedups` measures it."] * 2
