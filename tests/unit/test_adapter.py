"""The adapter stage: from PEFT's folders to what lora_task_id answers with."""

import json
import shutil
import sys

import pytest
from conftest import REPO, only_error, run_in
from contracts import Contract
from doubles import host_doubles

from stages.adapter import convert_command

ENGINE = {
    "not_built": None, "dtype": "float16", "max_lora_rank": 8,
    "lora_target_modules": ["attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"],
}  # fmt: skip


@pytest.fixture
def converted(tree, tmp_path):
    """converted(variant=engine.json, ...) runs the stage with those engines and two adapters; gives its folder."""
    results = tree / "results" / "embedded"
    for method in ("lora", "qlora"):
        shutil.copytree(REPO / "tests/fixtures/adapter", results / "finetune" / method / "adapter")
    shims = host_doubles(tmp_path / "shims")

    def run(**engines):
        for variant, engine in engines.items():
            (results / "engine" / variant).mkdir(parents=True)
            (results / "engine" / variant / "engine.json").write_text(json.dumps(engine))
        command = [sys.executable, "-m", "stages.adapter", "host:"]
        run.done = run_in(tree, *command, environment=shims)
        return results / "adapter"

    run.results, run.shims = results, tmp_path / "shims"
    return run


def test_the_command_holds_by_the_contract_without_a_remark():
    words = convert_command("/a", "/prefetch/1", "float16")
    assert Contract("hf_lora_convert").parse(words) == (
        {"--in-file": "/a", "--out-dir": "/prefetch/1", "--storage-type": "float16"},
        [],
    )


def test_adapters_are_converted_and_numbered_from_one(converted):
    out = converted(corrected=ENGINE)
    assert converted.done.returncode == 0, converted.done.stderr
    made = json.loads((out / "adapter.json").read_text())
    assert list(made["adapters"]) == ["1", "2"] and made["not_built"] is None
    assert made["adapters"]["1"]["adapter"] == "results/embedded/finetune/lora/adapter"
    assert (made["adapters"]["1"]["rows"], made["adapters"]["1"]["rank"]) == (14, 4)
    assert {path.name for path in (out / "2").iterdir()} == {"model.lora_weights.npy", "model.lora_config.npy"}


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"lora_target_modules": ["attn_q", "attn_v"]}, "the engine corrected cannot take it: "),
        ({"max_lora_rank": 2}, "rank 4 is above engine.max_lora_rank 2"),
    ],
)
def test_an_unfit_adapter_is_refused_before_anything_runs(converted, engine, says):
    converted(corrected=ENGINE | engine)
    assert says in only_error(converted.done)
    assert "finetune/lora/adapter" in converted.done.stderr


def test_engines_of_two_types_cannot_share_adapters(converted):
    converted(corrected=ENGINE, other=ENGINE | {"dtype": "bfloat16"})
    assert "engine.dtype is bfloat16 and float16; adapters are stored in one of them" in only_error(converted.done)


def test_what_the_converter_got_wrong_is_found(converted):
    shim = converted.shims / "python3"
    shim.write_text(
        shim.read_text().replace(
            '"$@" ;; *)',
            '"$@" --storage-type float32 ;; *)',  # the last one counts, as with argparse
        )
    )
    converted(corrected=ENGINE)
    assert "lora_weights are float32, want float16, the engine's own" in converted.done.stderr


def test_without_an_engine_nothing_is_converted(converted):
    out = converted(corrected={"not_built": "params.yaml: engine.route is none"})
    assert converted.done.returncode == 0, converted.done.stderr
    assert [path.name for path in out.iterdir()] == ["adapter.json"]
    assert (
        json.loads((out / "adapter.json").read_text())["not_built"] == "no engine is built; params.yaml: engine.route"
    )
