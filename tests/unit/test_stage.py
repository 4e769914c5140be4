"""lib/core/stage.py: what every stage shares."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import REPO, only_error, run_in, set_params

from lib.core import gpu
from lib.core.stage import REPRO, UserError, fingerprint, flags, load_yaml, read_json, read_params, write_json
from lib.core.work import work_dir


@dataclass
class TinyTrain:
    rate: float
    epochs: int
    name: str
    warm: bool


GOOD = "tiny_train: {rate: 0.1, epochs: 2, name: a, warm: true}\n"


def params(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD.replace("rate", "rat"), "tiny_train has no parameter 'rat'; it has rate, epochs, name, warm"),
        (GOOD.replace("epochs: 2, ", ""), "tiny_train.epochs is missing"),
        (GOOD.replace("0.1", "high"), "tiny_train.rate is 'high', want a value of type float"),
        (GOOD.replace("2,", "2.5,"), "tiny_train.epochs is 2.5, want a value of type int"),
        (GOOD.replace("epochs: 2", "epochs: true"), "tiny_train.epochs is True, want a value of type int"),
        (GOOD.replace("rate: 0.1", "rate: true"), "tiny_train.rate is True, want a value of type float"),
        (GOOD.replace("name: a", "name: 7"), "tiny_train.name is 7, want a value of type str"),
        (GOOD.replace("name: a", "name:"), "tiny_train.name is None, want a value of type str"),
        ("train: {}\n", "the section tiny_train is missing; it has rate, epochs, name, warm"),
        ("tiny_train:\n", "the section tiny_train is missing; it has rate, epochs, name, warm"),
    ],
)
def test_wrong_parameters_say_what_to_mend(tmp_path, text, message):
    path = params(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_params(TinyTrain, path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("text", ["", "just text\n", "[1, 2]\n"])
def test_a_parameter_file_without_sections_is_one_line_too(tmp_path, text):
    path = params(tmp_path, text)
    with pytest.raises(UserError, match="tiny_train"):
        read_params(TinyTrain, path)


def test_broken_yaml_is_named_with_its_line(tmp_path):
    path = params(tmp_path, "profile: embedded\ntiny_train: {rate: 0.1\nother: 1\n")
    with pytest.raises(UserError, match=f"{path}: line 3: not valid YAML"):
        read_params(TinyTrain, path)


def test_a_missing_parameter_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.yaml: there is no such file"):
        load_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "2.e-4", "2.0e-4", "0.0002"])
def test_floats_are_read_in_every_spelling_of_dvc(tmp_path, written):
    from dvc.utils.serialize import parse_yaml

    text = GOOD.replace("0.1", written)
    given = read_params(TinyTrain, params(tmp_path, text)).rate
    assert (given, type(given)) == (0.0002, float)
    assert parse_yaml(text, "params.yaml")["tiny_train"]["rate"] == given


def test_an_integer_does_for_a_float(tmp_path):
    assert read_params(TinyTrain, params(tmp_path, GOOD.replace("0.1", "1"))).rate == 1


@pytest.mark.parametrize("name", ["1e", "e5", "12a3-4", "1e5x"])
def test_a_word_that_only_begins_like_a_number_stays_a_word(tmp_path, name):
    assert read_params(TinyTrain, params(tmp_path, GOOD.replace("name: a", f"name: {name}"))).name == name


def test_a_result_cut_short_is_named_with_what_makes_it_anew(tmp_path):
    path = tmp_path / "metrics.json"
    whole = json.dumps({"loss": 2.5, "steps": [1, 2, 3]}, indent=2)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{path}: not whole \(.*line 3\); delete it and run `{REPRO}`"):
        read_json(path)
    with pytest.raises(UserError, match=f"gone.json: there is no such file; `{REPRO}` makes it"):
        read_json(tmp_path / "gone.json")


def test_a_writer_killed_in_the_middle_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    write_json(path, {"loss": 1})
    # The kernel kills the child inside its write, at byte 4,096.
    killed = (
        "import resource, signal; from lib.core.stage import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"write_json({str(path)!r}, list(range(5000)))"
    )
    done = subprocess.run([sys.executable, "-c", killed], cwd=REPO)
    assert done.returncode == -signal.SIGXFSZ
    assert read_json(path) == {"loss": 1}
    write_json(path, {"loss": 2})
    assert read_json(path) == {"loss": 2}
    assert [one.name for one in path.parent.iterdir()] == ["metrics.json"]


def test_japanese_stands_as_itself_in_a_result(tmp_path):
    write_json(tmp_path / "chat.json", {"prompt": "犬は好き?"})
    assert "犬は好き?" in (tmp_path / "chat.json").read_text(encoding="utf-8")


def test_only_work_of_other_parameters_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    old, new = fingerprint({"r": 4}), fingerprint({"r": 8})
    first = work_dir("finetune-lora", old)
    (first / "checkpoint").write_text("x")
    others = [
        work_dir("finetune-qlora", old),
        work_dir("finetune-lora-published", old),
        work_dir("bench-vllm", old),
    ]
    kept = work_dir("finetune-lora", new)
    assert not first.exists() and kept.is_dir() and all(other.is_dir() for other in others)
    (kept / "checkpoint").write_text("y")
    assert (work_dir("finetune-lora", new) / "checkpoint").read_text() == "y"


def test_a_setting_or_a_byte_changes_the_fingerprint(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("a")
    first = fingerprint({"a": 1, "b": 2}, [file])
    assert fingerprint({"b": 2, "a": 1}, [file]) == first and len(first) == 16
    assert fingerprint({"a": 1, "b": 3}, [file]) != first
    file.write_text("b")
    assert fingerprint({"a": 1, "b": 2}, [file]) != first


def test_options_become_command_line_words():
    options = {"seed": 1, "streaming": True, "extra-inputs": ["a:1", "b:2"]}
    assert flags(options) == ["--seed", "1", "--streaming", "--extra-inputs", "a:1", "--extra-inputs", "b:2"]


def fake_nvidia_smi(folder, monkeypatch, body):
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_each_gpu_stands_in_the_result_with_memory_and_driver(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "printf 'NVIDIA H200, 143771, 570.86.15\\nNVIDIA L4, 23034, 570.86.15\\n'")
    assert gpu.gpus() == [
        {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "570.86.15"},
        {"name": "NVIDIA L4", "memory_mib": 23034, "driver": "570.86.15"},
    ]


def test_a_gpu_with_shared_memory_reports_no_memory(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA GB10, [N/A], 580.95.05'")
    assert gpu.gpus() == [{"name": "NVIDIA GB10", "memory_mib": None, "driver": "580.95.05"}]


def test_a_driver_that_does_not_answer_means_no_gpu(tmp_path, monkeypatch):
    fake_nvidia_smi(
        tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9"
    )
    assert gpu.gpus() == []


def test_a_number_carries_image_lock_commit_and_versions(tree):
    code = "from lib.core.provenance import write_metrics; write_metrics('m.json', {'loss': None})"
    done = run_in(tree, "containers/run", "venv:tools", "python", "-c", code)
    assert done.returncode == 0, done.stderr
    written = read_json(tree / "m.json")
    made = written["made_by"]
    assert written["loss"] is None and list(written) == ["made_by", "loss"]
    assert (made["image"], made["commit"], made["dirty"]) == ("venv:tools", "none", True)
    lock = subprocess.run(["sha256sum", REPO / "containers/tools/requirements.txt"], capture_output=True, text=True)
    assert made["lock_sha256"] == lock.stdout.split()[0]
    assert made["python"] == "3.11." + made["python"].split(".")[2] and "torch" not in made["versions"]


def test_a_mistake_ends_a_stage_with_one_line_and_code_1(tree):
    set_params(tree, dataset={"template": "alpaca"})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.dataset")
    assert only_error(done) == (
        "error: params.yaml: dataset.template is 'alpaca'; use one of published, llama-2, chatml"
    )


def test_a_bug_keeps_its_traceback(tmp_path):
    code = "from lib.core.stage import run\ndef main(): return {}['key']\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'key'" in done.stderr


def test_ctrl_c_ends_a_stage_with_130_and_says_how_to_go_on():
    code = "import os, signal\nfrom lib.core.stage import run\nrun(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped by Ctrl-C; run the same command again to resume"


def test_a_full_disk_leaves_the_old_result_whole(tree):
    folder = tree / "results" / "embedded" / "machine"
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text("the old one")
    (folder / "machine.json.part").symlink_to("/dev/full")  # every write there fails as on a full disk
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.machine")
    assert done.returncode == 1
    assert only_error(done).startswith("error: the disk is full; free some space")
    assert (folder / "machine.json").read_text() == "the old one"


def test_a_reader_may_change_what_load_yaml_gives(tmp_path):
    path = params(tmp_path, "a: {b: [1]}\n")
    load_yaml(path)["a"]["b"].append(2)
    assert load_yaml(path) == {"a": {"b": [1]}}
    path.write_text("a: 3\n")
    assert load_yaml(path) == {"a": 3}
