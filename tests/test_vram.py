"""stages/vram.py: the memory of fine-tuning from a config alone."""

import json

import pytest
from conftest import REPO, only_error, probe, run_in, set_params, stage

from stages.vram import Lora, predict

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape(name):
    return json.loads((REPO / "data" / "shapes" / f"{name}.json").read_text())


def test_llama_2_7b_with_rank_4_trains_9994240_of_6748409856():
    # What peft printed for this model on a GPU.
    found = predict(shape("llama-2-7b"), Lora(4, 8, 0.1, ALL))["lora"]
    assert (found["trainable_parameters"], found["all_parameters"]) == (9_994_240, 6_748_409_856)
    assert f"{found['trainable_percent']:.4f}" == "0.1481"


def test_full_fine_tuning_takes_12_bytes_a_parameter_and_81_gb_for_7b():
    found = predict(shape("llama-2-7b"), Lora(4, 8, 0.1, ALL))["full"]
    assert found["bytes_per_parameter"] == 12
    assert found["total_bytes"] == 12 * 6_738_415_616
    assert 80.8e9 < found["total_bytes"] < 80.9e9  # "84 GB" takes the model for 7.0 billion


def test_lora_keeps_the_weights_and_qlora_a_quarter_of_the_linear_ones():
    found = predict(shape("llama-2-7b"), Lora(4, 8, 0.1, ALL))
    assert found["lora"]["weights_bytes"] == 2 * 6_738_415_616
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    # NF4 with double quantisation: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a value; the rest in bf16 or fp32.
    unquantised = found["qlora"]["weights_bytes"] - linear * 4.12695 / 8
    assert 1.999 * rest < unquantised < 4.001 * rest


def test_a_65b_model_fits_one_48_gb_gpu_with_qlora_only():
    # The claim of the QLoRA paper.
    found = predict(shape("llama-65b"), Lora(64, 16, 0.05, ALL))
    assert found["parameters"] == pytest.approx(65.2e9, rel=0.01)
    assert found["qlora"]["total_bytes"] < 48e9 < found["lora"]["total_bytes"] < found["full"]["total_bytes"]


def test_the_terms_add_up():
    for method, entry in predict(shape("llama-2-7b"), Lora(8, 8, 0.1, ["q_proj"])).items():
        if method != "parameters":
            parts = ("weights_bytes", "adapter_bytes", "gradients_bytes", "optimizer_bytes")
            assert sum(entry[part] for part in parts) == entry["total_bytes"]


def test_for_random_shapes_the_counts_are_those_of_transformers_and_peft(tree):
    cases = probe(tree, "venv:pytorch", "adapters", 30)
    assert [case for case in cases if case["ours"] != case["theirs"]] == []
    configs = [case["config"] for case in cases]  # the cases are what they are meant to be
    assert any(one["tie_word_embeddings"] for one in configs) and any("head_dim" in one for one in configs)
    assert any(one["num_key_value_heads"] < one["num_attention_heads"] for one in configs) and len(cases) == 30


def test_a_module_that_a_llama_block_has_not_is_named(small_tree, tree):
    (tree / "results" / "embedded").mkdir(parents=True)
    (tree / "results" / "embedded" / "base_model").symlink_to(small_tree / "results" / "embedded" / "base_model")
    set_params(tree, lora={"target_modules": ["q_proj", "W_pack"]})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.vram")
    assert only_error(done) == (
        f"error: params.yaml: lora.target_modules has 'W_pack'; a Llama block has {', '.join(ALL)}"
    )


def test_an_unknown_shape_lists_the_known_ones(tree):
    set_params(tree, vram={"shapes": ["llama-3-8b"]})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.vram")
    assert only_error(done) == "error: params.yaml: vram.shapes has 'llama-3-8b'; use llama-2-7b, llama-65b"


def test_the_table_holds_every_shape_and_the_model_in_use(small_tree):
    out = stage(small_tree, "venv:tools", "vram")
    written = json.loads((out / "vram.json").read_text())
    assert list(written["models"]) == ["llama-2-7b", "llama-65b", "tiny"]
    rows = [line.split(" | ") for line in (out / "vram.md").read_text().splitlines()[2:]]
    assert [row[:2] for row in rows[:3]] == [
        ["| llama-2-7b", "full"],
        ["| llama-2-7b", "lora"],
        ["| llama-2-7b", "qlora"],
    ]
    assert len(rows) == 9 and rows[0][6] == "80.86"
