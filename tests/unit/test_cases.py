"""Small inputs and surroundings that people stumbled over elsewhere, one test a kind."""

import os
import shutil
import subprocess
from functools import partial

import pytest
from conftest import REPO, run_in, variables

from lib.core.stage import UserError, load_yaml
from lib.core.work import work_dir
from lib.serving.process import prepare
from lib.training.checks import check, check_answers
from lib.training.config import Finetune, Lora, check_both_methods
from stages.chat import Chat, read_prompts
from stages.dataset import Dataset, check_control_tokens, check_style_prompts, split
from stages.machine import memory_limit_gib
from tests.unit.test_finetune import FACTS

# The caller's environment.


def inside(tree, image, *words, **environment):
    """What a command prints in an environment whose caller has these variables; None takes one away."""
    env = {name: value for name, value in (variables() | environment).items() if value is not None}
    return subprocess.run(
        ["containers/run", image, *words], cwd=tree, env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("image", ["host:", "venv:tools"])
def test_the_callers_settings_do_not_enter(tree, image):
    # A machine that someone else provisioned (host:) may have its packages on PYTHONPATH.
    path = {"PYTHONPATH": "/none"} if image != "host:" else {}
    set_outside = path | {"PIP_USER": "1", "PIP_TARGET": "/tmp/x", "PIP_CONSTRAINT": "/none", "UV_CONSTRAINT": "/none",
                          "CDPATH": ".:/", "PYTHONSAFEPATH": "1", "RANK": "1", "WORLD_SIZE": "8"}  # fmt: skip
    lines = inside(tree, image, "env", **set_outside, SHELL="/usr/sbin/nologin", USER=None, LOGNAME=None).splitlines()
    env = dict(line.partition("=")[::2] for line in lines)
    assert set_outside.keys() & env.keys() == set()
    assert env["SHELL"].endswith("bash") and env["USER"] and env["PYTHONUTF8"] == "1"


def test_a_locale_that_is_not_utf_8_reads_the_files(tree):
    code = "from lib.core.stage import load_yaml; print(load_yaml('params.yaml')['speedups']['prompt'])"
    # ASCII everywhere, without a locale to install: Python's own ways back to UTF-8 are off.
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "今日は" in inside(tree, "venv:tools", "python", "-c", code, **ascii_only)


def ci_calls(tmp_path, programs):
    """What .ci/run calls as root on a machine that has these programs and no others of those it installs."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPO / ".ci/run", tmp_path / ".ci/run")
    for name in ("apt-get", "make", *programs):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/calls"\n')
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    for name in ("apt-get", "make", "id", *programs):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    subprocess.run([shutil.which("bash"), tmp_path / ".ci/run"], env={"PATH": str(tmp_path)}, check=True)
    return (tmp_path / "calls").read_text().splitlines()


DOCKER_PROGRAMS = ["dockerd", "docker", "docker-registry", "skopeo", "runc"]


def test_ci_installs_nothing_that_is_there(tmp_path):
    assert ci_calls(tmp_path, DOCKER_PROGRAMS) == ["make test"]


@pytest.mark.parametrize("lacking", DOCKER_PROGRAMS)
def test_ci_installs_a_single_missing_program(tmp_path, lacking):
    calls = ci_calls(tmp_path, [name for name in DOCKER_PROGRAMS if name != lacking])
    assert [call.split()[:2] for call in calls] == [["apt-get", "update"], ["apt-get", "install"], ["make", "test"]]


def test_scripts_keep_their_line_ends_on_windows():
    done = run_in(REPO, "git", "check-attr", "eol", "containers/run", "containers/venv")
    assert done.stdout.count("eol: lf") == 2


def test_a_containers_memory_limit_counts(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/box/inner\n")
    inner = tmp_path / "root/box/inner"
    inner.mkdir(parents=True)
    assert memory_limit_gib(tmp_path / "root", own) is None
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text(f"{2 * 2**30}\n")
    assert memory_limit_gib(tmp_path / "root", own) == 2
    own.write_text("5:cpu,memory:/old\n")
    (tmp_path / "root/memory/old").mkdir(parents=True)
    (tmp_path / "root/memory/old/memory.limit_in_bytes").write_text(str(2**30))
    assert memory_limit_gib(tmp_path / "root", own) == 1


def test_an_environment_is_made_before_the_clock_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers/run").write_text('#!/bin/sh\necho "$*" >> calls\n[ "$1" != "venv:broken" ] || exit 2\n')
    (tmp_path / "containers/run").chmod(0o755)
    for _ in range(2):
        prepare(["containers/run", "venv:slow", "serve"])
    prepare(["sleep", "1"])
    assert (tmp_path / "calls").read_text() == "venv:slow true\n"
    with pytest.raises(UserError, match="venv:broken cannot be started"):
        prepare(["containers/run", "venv:broken", "serve"])


# Parameters.


def params(section, **changes):
    return load_yaml(REPO / "params.yaml")[section] | changes


@pytest.mark.parametrize(
    ("make", "section", "key", "value"),
    [
        *((Lora, "lora", "r", value) for value in (0, -4)),
        (Lora, "lora", "dropout", 1.5),
        (Lora, "lora", "target_modules", []),
        (Finetune, "finetune", "schedule", "cosinus"),
        (Finetune, "finetune", "optimizer", "adamw"),
        *((Finetune, "finetune", key, 0) for key in ("micro_batch", "accumulation", "epochs")),
        *((Finetune, "finetune", key, 0) for key in ("logging_steps", "eval_steps")),
        *((Finetune, "finetune", key, -1) for key in ("max_steps", "learning_rate", "seed")),
        (Finetune, "finetune", "max_tokens", 0),
        *((Dataset, "dataset", key, -1) for key in ("seed", "train_rows", "validation_rows")),
        (Chat, "chat", "max_new_tokens", 0),
        (Chat, "chat", "top_p", 0),
    ],
)  # fmt: skip
def test_a_parameter_out_of_bounds_is_named(make, section, key, value):
    with pytest.raises(UserError) as error:
        make(**params(section, **{key: value}))
    words = str(error.value)
    assert words.startswith(f"params.yaml: {section}.{key} is {value!r}") and "; " in words and "\n" not in words


def test_a_run_without_qlora_is_refused_before_the_training():
    check_both_methods(["lora", "qlora", "lora-tuned"])
    with pytest.raises(UserError, match="name qlora too: chat and style compare LoRA and QLoRA"):
        check_both_methods(["lora"])


def test_prompts_of_ones_own_are_tracked_and_named_when_missing(tree):
    (tree / "params.yaml").write_text((tree / "params.yaml").read_text().replace("data/chat_prompts", "data/mine"))
    listed = run_in(tree, "containers/run", "venv:tools", "dvc", "repro", "--dry", "chat").stderr
    assert (REPO / "dvc.yaml").read_text().count("${chat.prompts}") == 1 and "data/chat_prompts" not in listed
    with pytest.raises(UserError, match="chat.prompts is data/mine.txt; there is no such file"):
        read_prompts("data/mine.txt")


# Rows.


def test_a_dataset_too_small_to_split_is_named():
    p = Dataset(**params("dataset", train_rows=0, validation_rows=0))
    with pytest.raises(UserError, match="1 rows leave none to train on beside 1 held out; add rows"):
        split([{"instruction": "a", "output": "b"}], p)


def test_too_few_held_out_rows_are_named_before_the_training():
    check_style_prompts(5, [1] * 5)
    with pytest.raises(UserError, match="style.prompts is 8, but 5 rows are held out; 0 takes all"):
        check_style_prompts(8, [1] * 5)


def test_a_control_token_in_a_row_is_named():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b<|im_end|>c"}]
    with pytest.raises(UserError, match=r"f.jsonl: line 2: output holds the control token <\|im_end\|>; take it out"):
        check_control_tokens("f.jsonl", rows, ["<|im_start|>", "<|im_end|>"])


class Rows(dict):
    column_names = ["completion_mask"]

    def __len__(self):
        return len(self["completion_mask"])


def test_rows_without_an_answer_in_reach_are_counted():
    p = Finetune(**params("finetune"))
    check_answers(Rows(completion_mask=[[0, 1], [1]]), p)
    with pytest.raises(UserError, match=r"2 of 3 rows \(the first is row 2\) have no token of their answer within"):
        check_answers(Rows(completion_mask=[[0, 1], [0, 0], [0]]), p)


def test_a_tokenizer_without_bos_may_train():
    p = Finetune(**params("finetune"))
    check(FACTS | {"leading_bos": 0, "wanted_bos": 0}, p, Lora(4, 8, 0.1, ["q_proj"]), "qlora")
    with pytest.raises(UserError, match="begins with 0 BOS tokens, not 1"):
        check(FACTS | {"leading_bos": 0}, p, Lora(4, 8, 0.1, ["q_proj"]), "qlora")


# Two at once.


def test_two_stages_never_share_a_work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lib.core.work.LOCK_SECONDS", 0)
    (tmp_path / "params.yaml").write_text("profile: embedded\n")
    work_dir("finetune-lora", "0" * 16)
    code = "import lib.core.work as w; w.LOCK_SECONDS = 0; w.work_dir('finetune-lora', '0' * 16)"
    again = partial(subprocess.run, ["python3", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    done = again(env={**os.environ, "PYTHONPATH": f"{REPO}:{':'.join(__import__('sys').path)}"})
    assert done.returncode and f"process {os.getpid()} works there; stop it first" in done.stderr
