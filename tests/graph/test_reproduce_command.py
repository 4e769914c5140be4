"""make reproduce around the graph: what it refuses, what it says of a stage that fails, how little a run prints."""

import re

import pytest
from conftest import copy_tree, run_in
from dvc.dvcfile import Lockfile
from dvc.utils import strictyaml
from dvc.utils.serialize import _common, _yaml

from tools.dvc_command import mend_dvc

# Two stages in the place of the graph, and the verdicts that the last lines read.
GRAPH = """\
stages:
  first:
    cmd: echo "much chatter"; mkdir -p results/embedded/claims results/embedded/report; touch first
    outs: [first]
    always_changed: true
  second:
    cmd: sh second.sh
    deps: [first, second.sh]
"""
CLAIMS = 'echo \'{"counts": {"reproduced": 2}}\' > results/embedded/claims/claims.json\n'


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project under git and DVC, with those two stages."""
    tree = copy_tree(tmp_path_factory.mktemp("reproduce") / "tree")
    (tree / "dvc.yaml").write_text(GRAPH)
    (tree / "dvc.lock").unlink()
    (tree / "studies/dvc.yaml").unlink()
    (tree / "studies/dvc.lock").unlink()
    run_in(tree, "git", "init", "--quiet", check=True)
    return tree


def reproduce(tree, *words, **environment):
    return run_in(tree, "make", "--no-print-directory", "reproduce", *words, environment=environment)


@pytest.mark.parametrize("profile", ["writeup", "weightless"])
def test_a_refused_profile_changes_nothing(tree, profile):
    run_in(tree, "git", "add", "--all", check=True)
    done = reproduce(tree, f"PROFILE={profile}")
    assert done.returncode and f"error: profile {profile} cannot run here" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_in(tree, "git", "diff", check=True).stdout == ""
    assert run_in(tree, "git", "ls-files", "--others", "--exclude-standard", check=True).stdout == ""


def test_a_wrong_budget_is_refused_before_anything_runs(tree):
    done = reproduce(tree, "BUDGET=30")
    assert done.returncode and done.stdout == ""
    assert done.stderr.startswith("error: BUDGET is '30'; write a number and s, m or h, such as 30m\n")


def test_a_failed_stage_shows_the_end_of_its_log(tree):
    (tree / "second.sh").write_text('echo "error: no luck"\nexit 1\n')
    done = reproduce(tree)
    assert done.returncode and "Traceback" not in done.stderr
    assert "error: no luck" in done.stderr
    assert "stage second failed; its log: .work/embedded/logs/second.log; mend it and run" in done.stderr


def test_a_run_prints_a_line_a_stage(tree):
    (tree / "second.sh").write_text(CLAIMS)
    done = reproduce(tree)
    assert done.returncode == 0, done.stderr
    assert "chatter" not in done.stdout + done.stderr
    assert re.search(r"(?m)^\[ 2 of 2\] second +\d+ s$", done.stdout)
    lines = done.stdout.splitlines()
    assert lines[-3:-1] == ["verdicts: 2 reproduced", "report: results/embedded/report/index.html"]
    assert len(lines) == 2 + 5 and done.stderr == ""  # what it takes, the stages, how long it took, what came out


def test_verbose_shows_all(tree):
    (tree / "second.sh").write_text(CLAIMS + "echo all of it\n")
    done = reproduce(tree, VERBOSE="1")
    assert done.returncode == 0 and "all of it" in done.stdout


def test_a_run_without_changes_leaves_dvc_lock_alone(tree):
    (tree / "second.sh").write_text(CLAIMS)
    assert reproduce(tree).returncode == 0
    before = (tree / "dvc.lock").stat().st_mtime_ns
    done = reproduce(tree)
    assert "\n1 of 2 stages ran in" in done.stdout  # the first, which is always_changed
    assert (tree / "dvc.lock").stat().st_mtime_ns == before


@pytest.mark.parametrize("module", ["tools.reproduce", "tools.repro"])
def test_dvc_lock_is_what_dvc_alone_writes(tree, module):
    (tree / "second.sh").write_text(CLAIMS + f"# changed for {module}\n")
    run_in(tree, "containers/run", "venv:tools", "python", "-m", module, check=True)
    ours = (tree / "dvc.lock").read_bytes()
    (tree / "dvc.lock").unlink()
    run_in(tree, "containers/run", "venv:tools", "dvc", "repro", check=True)
    assert (tree / "dvc.lock").read_bytes() == ours


@pytest.mark.parametrize(
    ("name", "text"),
    [("dvc.lock", "schema: '2.0'\nstages:\n  first:\n    cmd: a\n      b:"), ("dvc.yaml", "stages: [")],
)
def test_a_file_that_dvc_cannot_read_is_one_line(tree, name, text):
    whole = (tree / name).read_text()
    (tree / name).write_text(text)
    done = reproduce(tree)
    (tree / name).write_text(whole)
    line = done.stderr.splitlines()[0]
    assert (
        done.returncode and line.startswith(f"error: DVC: unable to read: '{name}'") and "Traceback" not in done.stderr
    )
    assert ("`git checkout dvc.lock` and run the same again" in line) == (name == "dvc.lock")


@pytest.fixture
def mended(monkeypatch):
    """What mend_dvc changes is taken back after the test."""
    for where, name in [
        (Lockfile, "dump_stages"), (strictyaml, "parse_yaml"), (_yaml, "parse_yaml"), (_yaml, "_dump_data"),
        (_common, "_dump_data"),
    ]:  # fmt: skip
        monkeypatch.setattr(where, name, getattr(where, name))


def test_a_killed_dvc_leaves_dvc_lock_whole(mended, tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text("stages: {a: 1}\n")

    def killed(data, file):
        file.write("stages: {")
        raise SystemExit

    mend_dvc()
    with pytest.raises(SystemExit):
        _common._dump_data(path, {}, killed)
    assert path.read_text() == "stages: {a: 1}\n"
    with _yaml.modify_yaml(path) as data:
        data["stages"]["a"] = 2
    assert path.read_text() == "stages: {a: 2}\n"


def test_dvc_parses_each_text_once(mended, monkeypatch):
    texts = []
    monkeypatch.setattr(_yaml, "parse_yaml", lambda text, *_: texts.append(text) or {"a": [text]})
    mend_dvc()
    first, second = (strictyaml.parse_yaml("1", "dvc.lock") for _ in range(2))
    assert texts == ["1"] and first == second == {"a": ["1"]}
    first["a"].append("changed by its reader")
    assert _yaml.parse_yaml("1", "params.yaml") == second
    assert _yaml.parse_yaml("2", "params.yaml") == {"a": ["2"]}
