"""The engine stage: the words it gives TensorRT-LLM's tools, and what it does with what they write."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO, only_error, run_in, set_params, write_files
from contracts import Contract
from doubles import host_doubles

from lib.core.stage import UserError, load_yaml
from lib.trtllm.images import differences, rebuild, unknown_flags
from stages.engine import Engine, build_command, checkpoint_command, with_room, with_variant, write_calibration

IMAGES = [name["triton"] for name in load_yaml(REPO / "containers/images.yaml").values()]


def section(profile="writeup", **changes):
    """The engine's parameters as a profile sets them."""
    values = load_yaml(REPO / "params.yaml")["engine"] | load_yaml(REPO / f"profiles/{profile}.yaml")["engine"]
    return Engine(**(values | changes))


VARIANTS = ["corrected", *load_yaml(REPO / "params.yaml")["engine"]["definitions"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variants_commands_hold_by_the_contracts(variant):
    p = with_variant(section(), variant)
    words = checkpoint_command(p, "/m", "/c", "/k")
    name = {"quantize": "quantize", "convert_checkpoint": "convert_checkpoint"}[p.route]
    given, remarks = Contract(name).parse(words)
    assert given["--tp_size"] == p.tp_size and given["--model_dir"] == "/m"
    # What the published variants do against better knowledge is remarked on; the others do nothing of the kind.
    assert bool({one for one, _ in remarks} & {"P2", "P3", "P4"}) == variant.startswith("published")
    build, remarks = Contract("trtllm-build").parse(build_command(p, "/k", Path("/e/engine")))
    assert remarks == [] and build["--max_batch_size"] == p.max_batch_size
    assert build["--lora_target_modules"] == p.lora_target_modules


def test_the_corrected_words_are_the_documented_ones():
    assert " ".join(checkpoint_command(section(), "M", "D", "CK")) == (
        "python3 /app/examples/quantization/quantize.py --model_dir M --output_dir CK --dtype float16 --tp_size 1 "
        "--qformat int4_awq --awq_block_size 128 --kv_cache_dtype int8 --calib_size 32 --calib_dataset D"
    )


@pytest.mark.parametrize(("rank", "flag"), [(4, 8), (16, 16)])
def test_the_engines_rank_follows_the_adapters(rank, flag):
    words = build_command(with_room(section(), rank), "/k", Path("/e/engine"))
    assert Contract("trtllm-build").parse(words)[0]["--max_lora_rank"] == flag


def flags_of(text, contract):
    return {flag: value for flag, value in Contract(contract).parse(text.replace("\\\n", " "))[0].items()}


def written(contract):
    entries = yaml.safe_load((REPO / "tests/fixtures/writeup_commands.yaml").read_text())
    return next(one["command"] for one in entries if (one["seed"], one["contract"]) == ("000", contract))


def test_published_commands_differ_in_paths_and_calibration_only():
    p = with_variant(section(), "published")
    ours = [" ".join(map(str, checkpoint_command(p, "/m", "/c", "/k"))), " ".join(build_command(p, "/k", Path("/e/x")))]
    paths = {"--model_dir", "--output_dir", "--checkpoint_dir", "--output_timing_cache"}
    added = {"--calib_dataset", "--tp_size", "--workers"}  # ours: no network; 1 is the default of both
    for name, text in zip(("convert_checkpoint", "trtllm-build"), ours, strict=True):
        mine, theirs = flags_of(text, name), flags_of(written(name), name)
        assert {key: value for key, value in mine.items() if key not in paths | added} == {
            key: value for key, value in theirs.items() if key not in paths
        }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"route": "awq"}, "engine.route is 'awq'; use none, quantize, convert_checkpoint"),
        ({"dtype": "fp16"}, "engine.dtype is 'fp16'; use float16, bfloat16"),
        ({"max_batch_size": 0}, "engine.max_batch_size is 0; use 1 or more"),
        ({"max_seq_len": 2048}, "engine.max_seq_len is 2048, which leaves nothing to answer behind max_input_len 2048"),
        ({"lora_target_modules": ["attn_q", "q_proj"]}, "engine.lora_target_modules has 'q_proj'; use attn_qkv"),
    ],
)
def test_a_parameter_that_no_engine_can_have_is_one_line(changes, says):
    with pytest.raises(UserError, match=says):
        section(**changes)


def test_an_unknown_variant_names_those_there_are():
    with pytest.raises(UserError, match="engine has no variant 'batch-5'; use corrected, published"):
        with_variant(section(), "batch-5")


def test_the_calibration_set_holds_every_training_row(tmp_path):
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "[INST] 犬\\u2028 [/INST]", "completion": " 猫"}\n{"prompt": "a", "completion": "b"}\n')
    assert write_calibration(rows, tmp_path / "calibration") == 2
    lines = (tmp_path / "calibration" / "train.jsonl").read_text().split("\n")[:2]
    assert [json.loads(line) for line in lines] == [{"text": "[INST] 犬\u2028 [/INST] 猫"}, {"text": "ab"}]
    with pytest.raises(UserError, match="takes a path with 'cnn_dailymail' in it for that data set"):
        write_calibration(rows, tmp_path / "CNN_DailyMail")


KEY = {"tensorrt_llm": "1.0.0", "gpu": "sm_90", "image": "docker://a@sha256:1"}


def test_an_engine_of_another_gpu_or_image_is_told_to_be_rebuilt():
    assert rebuild({"key": KEY}, "sm_90", KEY["image"]) is None
    assert (
        rebuild({"key": KEY}, "sm_89", KEY["image"]) == "rebuild: built for sm_90 with TensorRT-LLM 1.0.0, found sm_89"
    )
    assert rebuild({"key": KEY}, None, KEY["image"]).endswith("found no GPU")
    assert rebuild({"key": KEY}, "sm_90", "docker://b").endswith("found sm_90 with docker://b")


def test_an_image_with_other_versions_or_without_a_flag_is_told(monkeypatch):
    monkeypatch.chdir(REPO)
    wanted = load_yaml(REPO / "data/written_for.yaml")["triton"]
    versions = {"tensorrt_llm": "1.0.0", "tensorrt": "10.11.0.33", "nvidia-modelopt": "0.33.1"}
    found = {"versions": versions, "sha256": wanted["sha256"], "placeholders": wanted["placeholders"]}
    assert differences("triton", found) == []
    assert differences("triton", found | {"versions": versions | {"tensorrt_llm": "1.1.0"}}) == [
        "tensorrt_llm is 1.1.0, this was written for 1.0.0"
    ]
    other = {
        "examples/hf_lora_convert.py": "0" * 64,
        "tools/fill_template.py": wanted["sha256"]["tools/fill_template.py"],
    }
    assert differences("triton", found | {"sha256": other}) == [
        "examples/hf_lora_convert.py is another than was read",
        "examples/models/core/llama/convert_checkpoint.py is not there",
    ]
    fewer = wanted["placeholders"] | {"tensorrt_llm_bls": ["triton_max_batch_size", "bls_instance_count"]}
    assert differences("triton", found | {"placeholders": fewer}) == [
        "tensorrt_llm_bls/config.pbtxt has no placeholder logits_datatype, decoupled_mode"
    ]
    assert unknown_flags(["trtllm-build", "--old", "1", "--new", "2"], "usage: --old N") == ["--new"]
    assert unknown_flags(["trtllm-build", "--old"], None) == []


@pytest.fixture
def built(tree, tmp_path):
    """built(VARIANT) runs the stage with the doubles in a copied tree; gives the output folder."""
    # A path that the quantiser would take for other models, and that a shell splits.
    tree = tree.rename(tmp_path / "my prömpts (attempt 2)")
    results = tree / "results" / "embedded"
    files = {
        "base_model/model/config.json": "{}",
        "base_model/metrics.json": "{}",
        "dataset/corrected/train.jsonl": '{"prompt": "a", "completion": "b"}\n',
    }
    write_files(results, files)
    shims = host_doubles(tmp_path / "shims")

    def run(variant, environment=None, **parameters):
        set_params(tree, engine={"route": "quantize"} | parameters)
        command = [sys.executable, "-m", "stages.engine", variant, "host:"]
        run.done = run_in(tree, *command, environment=shims | (environment or {}))
        return results / "engine" / variant

    run.tree, run.shims = tree, shims
    return run


def test_an_engine_records_its_key_limits_and_builder(built):
    out = built("two-gpus")
    assert built.done.returncode == 0, built.done.stderr
    made = json.loads((out / "engine.json").read_text())
    key = made["key"]
    assert (key["tensorrt_llm"], key["gpu"], key["tp_size"], key["image"]) == ("1.0.0", "sm_90", 2, "host:")
    assert key["flags"]["max_batch_size"] == 16 and key["flags"]["tp_size"] == 2
    assert (made["not_built"], made["logits_dtype"], made["dtype"]) == (None, "float16", "float16")
    assert sorted(path.name for path in (out / "engine").iterdir()) == ["config.json", "rank0.engine", "rank1.engine"]
    assert made["seconds"]["checkpoint"] >= 0 and [command[0] for command in made["commands"]] == [
        "python3",
        "trtllm-build",
    ]
    assert (out / "calibration" / "train.jsonl").read_text() == '{"text": "ab"}\n'
    assert json.loads((out / "provenance.json").read_text())["versions"]["tensorrt_llm"] is None
    assert "this was written for 1.0.0" in " ".join(made["differs"])  # this machine is no such image
    kept = [path.name for path in (built.tree / ".work" / "embedded").iterdir()]
    assert [name for name in kept if not name.endswith(".lock")] == []


def test_a_plain_engine_has_float32_logits(built):
    made = json.loads((built("plain", route="convert_checkpoint") / "engine.json").read_text())
    assert (made["logits_dtype"], made["max_batch_size"]) == ("float32", 16)


def test_a_finished_checkpoint_outlives_a_build_that_failed(built, tmp_path):
    real = (tmp_path / "shims" / "trtllm-build").read_text()
    (tmp_path / "shims" / "trtllm-build").write_text('#!/bin/sh\n[ "$1" = --help ] || echo "out of memory"\nexit 3\n')
    built("corrected")
    assert built.done.returncode == 1 and "| out of memory" in built.done.stderr
    assert "error: trtllm-build failed (exit code 3)" in built.done.stderr
    (tmp_path / "shims" / "trtllm-build").write_text(real)
    nothing = {"versions": {"tensorrt": None}, "sha256": {}, "placeholders": {}, "trtllm_build_help": None}
    only_looked_at = f"case $1 in stages/workers/*) echo '{json.dumps(nothing)}' ;; *) exit 9 ;; esac"
    (tmp_path / "shims" / "python3").write_text(f"#!/bin/sh\n{only_looked_at}\n")
    made = json.loads((built("corrected") / "engine.json").read_text())
    assert built.done.returncode == 0, built.done.stderr
    assert made["seconds"]["checkpoint"] is None and made["seconds"]["build"] >= 0


def test_without_a_gpu_it_stops_before_anything_runs(built):
    built("corrected", environment={"PATH": os.environ["PATH"]})
    assert "nvidia-smi finds no GPU; an engine is built for the GPU that serves it" in only_error(built.done)


def test_where_nothing_is_to_be_built_it_says_so_in_a_moment(built):
    out = built("corrected", route="none")
    assert built.done.returncode == 0, built.done.stderr
    assert [path.name for path in out.iterdir()] == ["engine.json"]
    assert json.loads((out / "engine.json").read_text())["not_built"] == "params.yaml: engine.route is none"


def test_every_profile_sets_the_engine_of_its_machine():
    assert [section(name).route for name in ("embedded", "weightless", "writeup")] == ["none", "none", "quantize"]
    assert {one.name for one in dataclasses.fields(Engine)} == set(load_yaml(REPO / "params.yaml")["engine"])
