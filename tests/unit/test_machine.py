"""stages/machine.py: what this machine is."""

import json
import os

from conftest import run_in

from stages.machine import cpu_features, cpu_name, memory_gib

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8581C CPU @ 2.10GHz
flags\t\t: fpu vme sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8581C CPU @ 2.10GHz
flags\t\t: fpu vme sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile
"""
# An Arm server's kernel gives neither a model name nor flags.
GRACE = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd evtstrm bf16\nCPU implementer\t: 0x41\n"


def test_the_processor_and_its_instruction_sets_are_named():
    assert cpu_name(XEON) == "Intel(R) Xeon(R) Platinum 8581C CPU @ 2.10GHz"
    assert cpu_features(XEON) == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]


def test_a_processor_without_a_name_still_has_its_architecture():
    assert cpu_name(GRACE) and cpu_features(GRACE) == []


def test_memory_is_rounded_to_whole_gib():
    assert memory_gib("MemTotal:       24632584 kB\nMemFree: 1 kB\n") == memory_gib("MemTotal:  24590000 kB\n") == 23


def test_the_machine_file_changes_with_the_gpu_only(tree, tmp_path):
    written = tree / "results" / "embedded" / "machine" / "machine.json"
    command = ["containers/run", "venv:tools", "python", "-m", "stages.machine"]
    assert run_in(tree, *command).returncode == 0
    first = written.read_bytes()
    assert run_in(tree, *command).returncode == 0
    assert written.read_bytes() == first
    facts = json.loads(first)
    assert facts["cores"] >= 1 and facts["memory_gib"] >= 1 and facts["cpu"]

    folder = tmp_path / "bin"
    folder.mkdir()
    told = "NVIDIA H200, 143771, 570.86.15\nNVIDIA H100, 81559, 570.86.15"
    second = 'case "$*" in *--id=1*) first=2;; esac'
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nfirst=1\n{second}\necho '{told}' | tail -n +$first\n")
    (folder / "nvidia-smi").chmod(0o755)
    both = ["NVIDIA H200", "NVIDIA H100"]
    for value, names in ((None, both), ("1", ["NVIDIA H100"]), ("", [])):
        shown = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
        done = run_in(tree, *command, environment={"PATH": f"{folder}:{os.environ['PATH']}", **shown})
        assert done.returncode == 0, done.stderr
        assert [gpu["name"] for gpu in json.loads(written.read_text())["gpus"]] == names
