"""
The Llama 2 quick start with an engine, in front of a program that stands for the image. Its other path, with the
stand-in behind a real Triton, is in test_serving.py.
"""

import shlex

import pytest
from contracts import Contract

from lib.core.stage import UserError, write_json
from tools.quickstart_trtllm import bodies, engine_steps, run_command


@pytest.mark.parametrize("gpus", [1, 2])
def test_run_py_starts_a_process_for_each_gpu(gpus):
    words = run_command("/engine", "/model", gpus)
    start = words.index("python3")
    assert words[:start] == (["mpirun", "--allow-run-as-root", "-n", "2"] if gpus == 2 else [])
    assert Contract("run").parse(words[start:])[0]["--max_output_len"] == 100


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A checkout with an engine `plain`, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: writeup\n")
    commands = [["python3", "/app/examples/quantization/quantize.py", "--dtype", "float16"], ["trtllm-build"]]
    write_json(tmp_path / "results/writeup/engine/plain/engine.json", {"commands": commands})
    (tmp_path / "containers").mkdir()
    return {"engine_variant": "plain", "world_size": 1}


def image_that(tmp_path, script):
    (tmp_path / "containers/run").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "containers/run").chmod(0o755)


def test_run_py_runs_in_the_image_of_the_engine(built, tmp_path, capfd):
    image_that(tmp_path, 'printf "%q " "$@"')
    engine_steps(built, "docker://image")
    *shown, ran = capfd.readouterr().out.splitlines()
    assert shown[:2] == ["$ python3 /app/examples/quantization/quantize.py --dtype float16", "$ trtllm-build"]
    image, *words = shlex.split(ran)
    assert image == "docker://image" and shown[-1] == f"$ {shlex.join(words)}"
    given = Contract("run").parse(words)[0]
    assert given["--engine_dir"] == str(tmp_path / "results/writeup/engine/plain/engine")


def test_a_run_py_that_fails_is_one_line(built, tmp_path):
    image_that(tmp_path, "exit 3")
    with pytest.raises(UserError, match=r"run.py failed \(exit code 3\); its own words are above"):
        engine_steps(built, "docker://image")


def test_every_prompt_form_asks_the_same_question():
    old, new, asked = bodies("llama-2", "").values()
    assert old["text_input"] == new["text_input"] in asked["text_input"] != new["text_input"]
    assert old["parameters"]["max_tokens"] == new["max_tokens"] == asked["max_tokens"] == 100
