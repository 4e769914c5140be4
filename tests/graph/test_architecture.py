"""docs/architecture.md says which files to edit to add something: each addition, made in a copy of the tree."""

import json

from conftest import REPO, run_in, set_params, write_files

TOOLS = ("containers/run", "venv:tools")
STAGE = '''"""hello: writes one number."""

from dataclasses import dataclass

from lib.core.stage import read_params, results, run, write_json


@dataclass
class Hello:
    number: int


def main():
    write_json(results("hello") / "hello.json", {"number": read_params(Hello).number})


if __name__ == "__main__":
    run(main)
'''
ENTRY = """
  hello:
    cmd: containers/run ${images.tools} python -m stages.hello
    deps: [stages/hello.py, lib/core]
    params: [profile, hello]
    outs:
      - results/${profile}/hello
"""
SERVER = '''

class Eager(Vllm):
    """vLLM without CUDA graphs."""

    def command(self, options):
        return super().command([*options, "--enforce-eager"])


SERVERS["eager"] = Eager
'''
CLAIM = '  - {<<: *vllm-use, id: vllm-new, says: "A new claim.", requires: {}, opinion: "Not to be measured."}\n'


def append(path, text):
    path.write_text(path.read_text() + text)


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def succeed(tree, *command):
    done = run_in(tree, *TOOLS, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_dvc(tree, *words):
    append(tree / ".dvc/config", "    no_scm = true\n")  # a copy is no git repository
    return succeed(tree, "dvc", *words)


def edited(tree):
    """The files of the copy that are not as they are in the project, results and caches apart."""
    new = [path.relative_to(tree) for folder in ("stages", "lib", "data", "containers") for path in
           (tree / folder).rglob("*.*") if "__pycache__" not in path.parts and path.is_file()]  # fmt: skip
    new += [path.relative_to(tree) for path in tree.glob("*.yaml")]
    return sorted(
        str(path)
        for path in new
        if not (REPO / path).exists() or (REPO / path).read_bytes() != (tree / path).read_bytes()
    )


def test_an_experiment_takes_two_edits(tree):
    replace(
        tree / "experiments.yaml",
        "  definitions:  # `make exp",
        "  definitions:\n    tiny: {servers: [vllm]}  # `make exp",
    )
    set_params(tree, bench={"experiments": {"base": "base", "tiny": "base"}})
    assert "tiny" in succeed(tree, "python", "-m", "tools.experiments")
    assert "bench@tiny" in run_dvc(tree, "stage", "list", "--name-only").split()
    assert edited(tree) == ["experiments.yaml", "params.yaml"]


def test_a_fine_tuning_variant_takes_two_edits(tree):
    replace(tree / "experiments.yaml", "    published:\n      template: published\n",
            "    published:\n      template: published\n    one-epoch: {epochs: 1}\n")  # fmt: skip
    set_params(tree, finetune={"variants": ["lora", "qlora", "lora-one-epoch"]})
    assert "finetune@lora-one-epoch" in run_dvc(tree, "stage", "list", "--name-only").split()
    check = "from lib.core.stage import read_params; from lib.training.config import *; "
    check += "print(with_variant(read_params(Finetune), 'lora-one-epoch')[1].epochs)"
    assert succeed(tree, "python", "-c", check) == "1\n"
    assert edited(tree) == ["experiments.yaml", "params.yaml"]


def test_a_stage_takes_three_edits_and_a_test(tree):
    write_files(tree, {"stages/hello.py": STAGE})
    append(tree / "params.yaml", "\nhello:\n  number: 7\n")
    replace(tree / "dvc.yaml", "\n  report:\n", ENTRY + "\n  report:\n")
    run_dvc(tree, "repro", "-s", "hello")
    assert json.loads((tree / "results/embedded/hello/hello.json").read_text()) == {"number": 7}
    assert edited(tree) == ["dvc.yaml", "params.yaml", "stages/hello.py"]


def test_a_server_takes_four_edits(tree):
    append(tree / "lib/serving/servers.py", SERVER)
    replace(tree / "containers/images.yaml", "embedded: &embedded\n", "embedded: &embedded\n  eager: venv:vllm\n")
    replace(tree / "dvc.yaml", "trtllm=${images.trtllm}\n", "trtllm=${images.trtllm} eager=${images.eager}\n")
    set_params(tree, bench={"servers": ["vllm", "eager"]})
    check = "from lib.core.stage import read_params; from lib.bench.experiments import *; "
    check += "print([server for server, _ in visits(read_params(Bench))])"
    assert succeed(tree, "python", "-c", check) == "['vllm', 'eager', 'vllm', 'eager']\n"
    assert edited(tree) == ["containers/images.yaml", "dvc.yaml", "lib/serving/servers.py", "params.yaml"]


def test_a_claim_takes_one_edit(tree):
    append(tree / "data/claims/vllm-supercharge.yaml", CLAIM)
    succeed(tree, "python", "-m", "stages.claims")
    claims = json.loads((tree / "results/embedded/claims/claims.json").read_text())["claims"]
    assert [claim["verdict"] for claim in claims if claim["id"] == "vllm-new"] == ["opinion"]
    assert edited(tree) == ["data/claims/vllm-supercharge.yaml"]
