"""stages/finetune.py with training.py, proofs.py, packing.py: real runs of a tiny model, and what surrounds them."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import FINETUNE as COMMAND
from conftest import ONE_THREAD, REPO, at_once, only_error, probe, run_in, set_params

from lib.core.stage import UserError, read_json, read_params
from lib.training.checks import check
from lib.training.config import Finetune, Lora, check_sharded, with_variant
from stages.finetune import last_whole_checkpoint, read_steps, summary
from stages.vram import predict

# 16 rows, 2 a pass, 2 passes a step, 2 epochs.
STEPS = 8


def steps_of(folder):
    with (folder / "steps.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_step_stands_in_the_results_with_time_and_loss(trained, method):
    rows = steps_of(trained / method)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(float(row["seconds"]) > 0 and float(row["loss"]) > 0 for row in rows)
    assert [row["step"] for row in rows if row["eval_loss"]] == ["2", "4", "6", "8"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_metrics_are_complete_and_agree_with_the_steps(trained, method):
    metrics, rows = read_json(trained / method / "metrics.json"), steps_of(trained / method)
    assert metrics["optimizer_steps"] == STEPS and metrics["train_rows"] == 16 and metrics["dataset_rows"] == 1480
    assert metrics["wall_seconds"] > metrics["train_seconds"] > metrics["step_seconds_total"] > 0
    assert metrics["resumed_from_step"] is None
    assert metrics["train_loss_first"] == float(rows[0]["loss"]) and metrics["train_loss_last"] == float(
        rows[-1]["loss"]
    )
    assert metrics["eval_loss_best"] == min(float(row["eval_loss"]) for row in rows if row["eval_loss"])
    assert metrics["eval_loss_best"] < metrics["eval_loss_first"]  # it learns
    assert metrics["made_by"]["image"] == "venv:pytorch" and metrics["made_by"]["versions"]["trl"] == "0.25.0"
    assert (metrics["model"], metrics["weights"], metrics["shape"]) == ("tiny", "random", "tiny")
    assert metrics["settings"]["learning_rate"] == 0.01 and metrics["lora"]["r"] == 4


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gpu_memory_is_none_on_a_cpu_and_never_0(trained, method):
    memory = read_json(trained / method / "metrics.json")["memory"]
    assert memory["device"] == "resident (CPU)" and memory["torch_allocated_peak_mib"] is None
    assert set(memory["phases"]) == {"load", "first_step", "steady", "eval"}
    peaks = [phase["process_peak_mib"] for phase in memory["phases"].values()]
    assert memory["process_peak_mib"] == max(peaks) and min(peaks) > 100


def test_trained_tokens_are_those_of_the_rows(trained, small_tree):
    rows = read_json(small_tree / "results" / "embedded" / "dataset" / "tokens.json")["corrected"]["train"]
    metrics = read_json(trained / "lora" / "metrics.json")
    assert len(rows) == 16 and metrics["trained_tokens"] == 2 * sum(rows)  # two epochs
    assert metrics["tokens_per_second"] == pytest.approx(metrics["trained_tokens"] / metrics["step_seconds_total"])


def test_the_proofs_say_what_took_effect(trained):
    lora, qlora = (read_json(trained / method / "metrics.json") for method in ("lora", "qlora"))
    for metrics in (lora, qlora):
        facts = metrics["proofs"]
        assert facts["lora_modules"] == 2 * 7 and facts["leading_bos"] == 1 and facts["prompt_tokens_learned"] == 0
        assert facts["ends_with_eos"] and facts["completion_tokens_learned"] > 0
        assert facts["effective_batch_rows"] == 4 and facts["optimizer"] == "AdamW"
        # r x (inputs + outputs): q and o 64+64, k and v 64+32, three of 64+128, in 2 layers.
        assert metrics["trainable_parameters"] == 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert (lora["proofs"]["four_bit_modules"], qlora["proofs"]["four_bit_modules"]) == (0, 14)


def test_loaded_adapters_change_the_models_answers(trained, afterwards):
    for method, found in afterwards["adapters"].items():
        assert found["trainable"] == read_json(trained / method / "metrics.json")["trainable_parameters"]
        assert found["modules"] == found["trained_modules"] == 14 and found["moved"] > 1e-3
        assert (found["four_bit"] > 0) == (method == "qlora")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_has_the_size_that_was_predicted_for_it(trained, small_tree, method):
    # A safetensors file: 8 bytes with the length of the header, the header, the numbers.
    content = (trained / method / "adapter" / "adapter_model.safetensors").read_bytes()
    config = read_json(small_tree / "results" / "embedded" / "base_model" / "model" / "config.json")
    lora = Lora(**read_json(trained / method / "metrics.json")["lora"])
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == predict(config, lora)[method]["adapter_bytes"]


def test_a_finished_run_leaves_no_checkpoints(trained, small_tree):
    assert list((small_tree / ".work").rglob("checkpoint-*")) == []
    assert sorted(path.name for path in (trained / "lora").iterdir()) == [
        "adapter",
        "metrics.json",
        "steps.csv",
        "summary.json",
    ]


@pytest.fixture(scope="module")
def afterwards(trained, small_tree, tmp_path_factory):
    """What is tried once the tiny model is trained; see each function or probe."""
    names = ["adapters", "packed", "resumed", "partly_matching_targets", "one_process", "two_processes"]
    names += ["whole", "sharded"]
    found = at_once(
        partial(probe, small_tree, "venv:pytorch", "adapter", "lora", "qlora"),
        partial(probe, small_tree, "venv:pytorch", "packed"),
        partial(stop_and_resume, untrained_copy(small_tree, tmp_path_factory.mktemp("resumed"))),
        partial(aim_at_a_missing_module, untrained_copy(small_tree, tmp_path_factory.mktemp("targets"))),
        partial(train_by, 1, untrained_copy(small_tree, tmp_path_factory.mktemp("one"))),
        partial(train_by, 2, untrained_copy(small_tree, tmp_path_factory.mktemp("two"))),
        partial(train_4_bits, COMMAND, 1, untrained_copy(small_tree, tmp_path_factory.mktemp("whole"))),
        partial(train_4_bits, SHARDED, 2, untrained_copy(small_tree, tmp_path_factory.mktemp("sharded"))),
    )
    return dict(zip(names, found, strict=True))


def untrained_copy(small_tree, folder):
    shutil.copytree(small_tree, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns("finetune", ".work"))
    return folder / "tree"


def stop_and_resume(tree):
    """The LoRA run stopped by Ctrl-C after step 5 and started again."""
    stopped = run_in(tree, *COMMAND[:-1], "tests.support.probes.stopped", "lora", environment=ONE_THREAD)
    checkpoints = sorted(path.name for path in (tree / ".work").rglob("checkpoint-*"))
    again = run_in(tree, *COMMAND, "lora", environment=ONE_THREAD)
    return {"stopped": stopped, "checkpoints": checkpoints, "again": again, "tree": tree}


def aim_at_a_missing_module(tree):
    """peft adapts q_proj and passes over the other in silence."""
    set_params(tree, lora={"target_modules": ["q_proj", "W_pack"]})
    return run_in(tree, *COMMAND, "lora", environment=ONE_THREAD)


def train_by(processes, tree):
    """LoRA without dropout, whose masks no two layouts share, by one process or several; 4 rows a step."""
    set_params(tree, lora={"dropout": 0.0}, finetune={"gpus": processes, "micro_batch": 2 // processes})
    done = run_in(tree, *COMMAND, "lora", environment=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "results" / "embedded" / "finetune" / "lora", done.stdout


SHARDED = ["containers/run", "venv:pytorch", "python", "-m", "torch.distributed.run", "--standalone"]
SHARDED += ["--nproc-per-node", "2", "-m", "tests.support.probes.sharded"]


def train_4_bits(command, processes, tree):
    """QLoRA without dropout, one epoch, by one process with the whole model or two with a part each; 4 rows a step."""
    rows = {"gpus": processes, "sharded": processes > 1, "micro_batch": 2 // processes}
    set_params(tree, lora={"dropout": 0.0}, finetune=rows | {"epochs": 1, "gradient_checkpointing": True})
    done = run_in(tree, *command, "qlora", environment=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "results" / "embedded" / "finetune" / "qlora"


def weights_of(folder):
    """{name: numbers} of an adapter; a safetensors file is the header's length in 8 bytes, the header, the numbers."""
    content = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    numbers = np.frombuffer(content[start:], np.float32)
    ends = {name: [end // 4 for end in entry["data_offsets"]] for name, entry in header.items()}
    return {name: numbers[slice(*ends[name])].reshape(entry["shape"]) for name, entry in header.items()}


def distance(ours, theirs):
    """How far one adapter is from another, relative to the other's own size; lora_B, which begins at zero, alone."""
    names = [name for name in theirs if "lora_B" in name]
    return sum(((ours[n] - theirs[n]) ** 2).sum() for n in names) / sum((theirs[n] ** 2).sum() for n in names)


@pytest.fixture
def resumed(afterwards):
    return afterwards["resumed"]


def test_ctrl_c_says_how_to_go_on_and_keeps_the_checkpoints(resumed):
    errors = resumed["stopped"].stderr
    assert resumed["stopped"].returncode == 130
    assert errors.strip().splitlines()[-1] == "stopped by Ctrl-C; run the same command again to resume"
    assert "Traceback" not in errors
    assert resumed["checkpoints"] == ["checkpoint-2", "checkpoint-4"]


def test_the_same_command_goes_on_from_the_last_checkpoint(resumed):
    again = resumed["again"]
    assert again.returncode == 0, again.stderr[-3000:]
    assert "finetune lora: going on from checkpoint-4" in again.stdout.splitlines()
    assert f"step 4 of {STEPS}" not in again.stdout and f"step 5 of {STEPS}" in again.stdout


def test_a_resumed_run_ends_where_an_undisturbed_one_does(resumed, trained):
    out = resumed["tree"] / "results" / "embedded" / "finetune" / "lora"
    ours, theirs = steps_of(out), steps_of(trained / "lora")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=2e-3), row["step"]
    assert list((resumed["tree"] / ".work").rglob("checkpoint-*")) == []


def test_a_resumed_run_claims_no_time_that_it_did_not_measure(resumed):
    metrics = read_json(resumed["tree"] / "results" / "embedded" / "finetune" / "lora" / "metrics.json")
    assert metrics["wall_seconds"] is None and metrics["train_seconds"] is None
    assert metrics["resumed_from_step"] == 4 and metrics["optimizer_steps"] == STEPS
    assert metrics["seconds_per_step_median"] > 0


def test_a_resumed_run_counts_all_tokens_or_none(resumed, trained):
    metrics = read_json(resumed["tree"] / "results" / "embedded" / "finetune" / "lora" / "metrics.json")
    whole = read_json(trained / "lora" / "metrics.json")["trained_tokens"]
    assert metrics["trained_tokens"] in (None, whole)
    if metrics["trained_tokens"] is None:
        assert metrics["tokens_per_second"] is None


def test_rows_end_to_end_say_what_the_padded_batch_says(afterwards):
    found = afterwards["packed"]
    assert found["tokens"] == [4 * max(found["lengths"]), sum(found["lengths"])]
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-3)
    # bf16 has 8 bits; rows that see each other differ by far more.
    assert found["packed"] < 0.05 and found["forgotten"] > 1


def test_no_row_of_a_packed_batch_sees_another(afterwards):
    assert afterwards["packed"]["untouched"] == [True, False]  # to the bit, when the last row is another


def test_a_padded_lora_rank_keeps_loss_and_gradients(afterwards):
    narrow, wide, gradients = afterwards["packed"]["ranks"]
    assert wide == pytest.approx(narrow, rel=1e-5) and gradients < 0.01


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_cpu_trains_fast_to_the_same_losses_and_gradients(afterwards, method):
    found = afterwards["packed"]["fast"][method]
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=2e-3)
    assert found["evaluated"][1] == pytest.approx(found["evaluated"][0], rel=2e-3)
    assert found["gradients"] < 0.05


def test_cpu_dropout_follows_its_rate_and_seed(afterwards):
    dropped, zeros_and_ones, same_again, others_next = afterwards["packed"]["masks"]
    assert dropped == pytest.approx(0.1, abs=0.005) and zeros_and_ones and same_again and others_next


def test_two_processes_take_the_steps_of_one(afterwards):
    (one, _), (two, said) = afterwards["one_process"], afterwards["two_processes"]
    ours, theirs = steps_of(two), steps_of(one)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=2e-3), row["step"]
    found, alone = (read_json(folder / "metrics.json") for folder in (two, one))
    assert found["proofs"]["effective_batch_rows"] == alone["proofs"]["effective_batch_rows"] == 4
    assert found["trained_tokens"] == alone["trained_tokens"]
    assert said.count("step 8 of 8") == 1  # the second process is silent


def test_a_sharded_4_bit_model_trains_as_a_whole_one(afterwards):
    whole, sharded = afterwards["whole"], afterwards["sharded"]
    ours, theirs = steps_of(sharded), steps_of(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == ["1", "2", "3", "4"]
    for row, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            assert float(row[key]) == pytest.approx(float(other[key]), rel=2e-3), (row["step"], key)
    assert float(ours[-1]["eval_loss"]) == pytest.approx(float(theirs[-1]["eval_loss"]), rel=1e-4)
    facts, alone = (read_json(folder / "metrics.json")["proofs"] for folder in (sharded, whole))
    assert facts == alone and facts["four_bit_modules"] == 14 and facts["checkpointing_modules"] > 0


def test_the_adapter_of_a_sharded_model_is_saved_whole(afterwards, trained):
    ours, theirs = weights_of(afterwards["sharded"]), weights_of(afterwards["whole"])
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    assert distance(ours, theirs) < 1e-3 < 0.1 < distance(weights_of(trained / "qlora"), theirs)  # of two epochs
    files = [sorted(path.name for path in (afterwards[name] / "adapter").iterdir()) for name in ("sharded", "whole")]
    assert files[0] == files[1]


# Pure functions.


def state(folder, step, text='{"global_step": 2}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    if text is not None:
        (path / "trainer_state.json").write_text(text)
    return path


def test_training_resumes_from_the_highest_whole_checkpoint(tmp_path):
    for step in (5, 100, 25):
        state(tmp_path, step)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize("text", [None, "", '{"global_step": 10, "log_history": [{"lo'])
def test_a_half_written_checkpoint_is_thrown_away(tmp_path, text):
    whole, half = state(tmp_path, 8), state(tmp_path, 10, text)
    assert last_whole_checkpoint(tmp_path) == whole
    assert whole.is_dir() and not half.exists()


def test_without_a_checkpoint_a_run_begins_anew(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "never-made") is None
    state(tmp_path, 2, "")
    assert last_whole_checkpoint(tmp_path) is None


# As a run wrote them that was stopped in step 3 and went on from checkpoint 2.
LINES = """\
{"step": 1, "seconds": 12.9}
{"step": 1, "loss": 2.7836, "learning_rate": 0.0, "tokens": 2180.0}
{"step": 2, "seconds": 3.0}
{"step": 2, "loss": 2.7265, "learning_rate": 0.0005, "tokens": 4424.0}
{"step": 2, "eval_loss": 2.6268, "tokens": 4424.0}
{"step": 3, "seconds": 99.0}
{"step": 3, "seconds": 5.0}
{"step": 3, "loss": 2.6057, "learning_rate": 0.001, "tokens": 6809.0}
{"step": 4, "seconds": 4.0}
{"step": 4, "eval_loss": 2.4471, "tokens": 9060.0}
"""


def test_the_last_log_line_of_a_step_counts(tmp_path):
    (tmp_path / "steps").write_text(LINES)
    rows = read_steps(tmp_path / "steps")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[1] == {
        "step": 2, "seconds": 3.0, "loss": 2.7265, "learning_rate": 0.0005, "tokens": 4424.0, "eval_loss": 2.6268,
    }  # fmt: skip
    assert rows[2]["seconds"] == 5.0


def test_the_median_step_time_excludes_the_first_step(tmp_path):
    (tmp_path / "steps").write_text(LINES)
    found = summary(read_steps(tmp_path / "steps"))
    assert found["optimizer_steps"] == 4 and found["seconds_per_step_median"] == 4.0
    assert found["step_seconds_total"] == pytest.approx(12.9 + 3 + 5 + 4)
    assert (found["train_loss_first"], found["train_loss_last"]) == (2.7836, 2.6057)
    assert (found["eval_loss_first"], found["eval_loss_best"]) == (2.6268, 2.4471)
    assert found["trained_tokens"] == 9060 and found["tokens_per_second"] == pytest.approx(9060 / 24.9)
    bare = summary([{"step": 1, "seconds": 2.0}])
    assert bare["seconds_per_step_median"] is None and bare["tokens_per_second"] is None
    assert bare["train_loss_first"] is None and bare["eval_loss_best"] is None


def test_an_even_median_lies_between_the_middle_steps():
    rows = [{"step": n, "seconds": seconds} for n, seconds in enumerate([9.0, 1.0, 2.0, 4.0, 8.0], start=1)]
    assert summary(rows)["seconds_per_step_median"] == 3.0


@pytest.fixture
def p():
    return read_params(Finetune, REPO / "params.yaml")


def test_a_variant_is_a_patch_of_the_parameters(p):
    assert with_variant(p, "qlora") == ("qlora", p)
    assert with_variant(p, "lora-published") == ("lora", replace(p, template="published"))


@pytest.mark.parametrize(
    "variant, definitions, says",
    [
        ("dora", {}, "finetune has no variant 'dora'; use one of lora, qlora"),
        (
            "lora-large",
            {"published": {}},
            "no variant 'lora-large'; use one of lora, qlora, lora-published, qlora-published",
        ),
        ("lora-a", {"a": {"epoch": 2}}, "finetune.definitions.a.epoch is no parameter of finetune"),
        ("lora-a", {"a": {"definitions": {}}}, "finetune.definitions.a.definitions is no parameter of finetune"),
        ("lora-a", {"a": {"epochs": "2"}}, "finetune.definitions.a.epochs is '2', want int"),
        ("lora-a", {"a": {"epochs": True}}, "finetune.definitions.a.epochs is True, want int"),
        ("lora-a", {"a": "published"}, "finetune.definitions.a is 'published'"),
        ("lora-a", {"a": None}, "finetune.definitions.a is None"),
    ],
)
def test_a_wrong_variant_says_what_to_mend(p, variant, definitions, says):
    with pytest.raises(UserError) as error:
        with_variant(replace(p, definitions=definitions), variant)
    assert str(error.value).startswith(("params.yaml: ", "experiments.yaml: ")) and says in str(error.value)


def test_an_integer_does_for_a_float_in_a_variant_too(p):
    assert with_variant(replace(p, definitions={"a": {"learning_rate": 1}}), "lora-a")[1].learning_rate == 1


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"gpus": 1}, "finetune.gpus is 1 where qlora is sharded; use 2 or more"),
        ({"compile": True}, "finetune.compile is true where qlora is sharded; use false"),
        (
            {"optimizer": "paged_adamw_8bit"},
            "finetune.optimizer is paged_adamw_8bit where qlora is sharded; use adamw_torch or adamw_torch_fused",
        ),
    ],
)
def test_a_sharded_model_without_what_it_needs_is_refused(p, changes, says):
    good = replace(p, gpus=2, sharded=True)
    check_sharded(good, "qlora")
    with pytest.raises(UserError) as error:
        check_sharded(replace(good, **changes), "qlora")
    assert str(error.value) == f"params.yaml: {says}"
    check_sharded(replace(good, **changes, sharded=False), "qlora")


def test_no_model_is_sharded_without_gpus(small_tree):
    done = run_in(small_tree, *COMMAND, "qlora-sharded-2-gpus")
    assert only_error(done) == (
        "error: params.yaml: qlora-sharded-2-gpus is sharded over 2 NVIDIA GPUs; this machine has none"
    )


def test_an_unknown_variant_is_a_one_line_error(tree):
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.finetune", "dora")
    assert "finetune has no variant 'dora'" in only_error(done)


def test_without_a_base_model_the_stage_says_what_makes_it(tree):
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.finetune", "lora")
    assert only_error(done) == (
        "error: results/embedded/base_model/metrics.json: there is no such file; "
        "`containers/run venv:tools dvc repro base_model` makes it"
    )


# As the stage wrote them for SmolLM2 with QLoRA.
FACTS = {
    "four_bit_modules": 210, "lora_modules": 210, "checkpointing_modules": 0, "leading_bos": 1, "wanted_bos": 1,
    "prompt_tokens_learned": 0, "completion_tokens_learned": 77, "ends_with_eos": True, "optimizer": "AdamW",
    "effective_batch_rows": 16, "trainer_says_checkpointing": False, "seed": 42,
}  # fmt: skip


def test_facts_that_agree_with_the_parameters_pass(p):
    check(FACTS, replace(p, micro_batch=8, accumulation=2), Lora(4, 8, 0.1, ["q_proj"]), "qlora")


@pytest.mark.parametrize(
    "fact, value, says",
    [
        ("lora_modules", 0, "no module matches lora.target_modules ['q_proj']"),
        ("four_bit_modules", 0, "0 modules are in 4 bits"),
        ("checkpointing_modules", 30, "gradient checkpointing is on in 30 modules"),
        ("leading_bos", 2, "a row begins with 2 BOS tokens, not 1"),
        ("leading_bos", 0, "a row begins with 0 BOS tokens, not 1"),
        ("prompt_tokens_learned", 5, "the prompt's tokens are learned too"),
        ("completion_tokens_learned", 0, "no token of the completion is learned"),
        ("ends_with_eos", False, "a row does not end with EOS"),
        ("effective_batch_rows", 8, "a step takes 8 rows, not 8 x 2 x 1"),
    ],
)
def test_a_setting_without_effect_stops_the_stage(p, fact, value, says):
    p = replace(p, micro_batch=8, accumulation=2, gradient_checkpointing=False)
    with pytest.raises(UserError) as error:
        check(FACTS | {fact: value}, p, Lora(4, 8, 0.1, ["q_proj"]), "qlora")
    assert str(error.value) == f"finetune: a setting had no effect: {says}"


def test_lora_on_a_4_bit_model_is_not_lora(p):
    with pytest.raises(UserError, match="210 modules are in 4 bits"):
        check(FACTS, replace(p, micro_batch=8, accumulation=2), Lora(4, 8, 0.1, ["q_proj"]), "lora")


def test_the_published_variant_may_have_its_second_bos(p):
    p = replace(p, micro_batch=8, accumulation=2, template="published")
    check(FACTS | {"leading_bos": 2}, p, Lora(4, 8, 0.1, ["q_proj"]), "qlora")


def test_an_unknown_target_module_stops_before_the_first_step(afterwards):
    done = afterwards["partly_matching_targets"]
    assert done.returncode == 1 and "step 1 of" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "lora.target_modules" in last and "W_pack" in last
