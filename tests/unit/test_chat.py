"""stages/chat.py: the writeup's prompts, answered."""

from functools import partial

import pytest
from conftest import REPO, at_once, only_error, probe, run_in, set_params, stage

from lib.core.stage import read_json
from stages.chat import as_markdown, read_prompts


def test_the_writeups_eight_prompts_are_there():
    prompts = read_prompts(REPO / "data" / "chat_prompts.txt")
    assert len(prompts) == len(set(prompts)) == 8


def test_empty_lines_are_no_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("犬は好き?\n\n  \n元気?\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["犬は好き?", "元気?"]


def test_a_file_without_prompts_is_one_line(tree):
    (tree / "data" / "none.txt").write_text("\n")
    set_params(tree, chat={"prompts": "data/none.txt"})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.chat")
    assert only_error(done) == "error: params.yaml: chat.prompts names data/none.txt, which holds no prompt"


def test_no_answer_breaks_the_table():
    table = as_markdown([{"prompt": "a|b", "base": "one\ntwo", "lora": "", "qlora": "x"}])
    assert table.splitlines()[2] == "| a\\|b | one<br>two | (nothing) | x |"
    assert len(table.splitlines()) == 3


@pytest.fixture(scope="module")
def found(base_model, small_tree, trained):
    """The answers of SmolLM2 to questions of ours, and the stage's folder for the tiny model."""
    return at_once(
        partial(probe, small_tree, "venv:pytorch", "answers", base_model / "model"),
        partial(stage, small_tree, "venv:pytorch", "chat"),
    )


@pytest.fixture
def answers(found):
    return found[0]


def test_a_prompt_is_answered_alike_alone_and_beside_longer_ones(answers):
    assert answers["together"] == answers["alone"]
    assert "Paris" in answers["together"][0]


def test_an_answer_holds_neither_its_prompt_nor_special_tokens(answers):
    for text in answers["together"]:
        assert text and "<|" not in text and "user" not in text and "assistant" not in text


def test_sampling_repeats_with_its_seed_and_differs_with_another(answers):
    first, again, other = answers["sampled"]
    assert first == again != other


def test_every_prompt_is_answered_by_base_lora_and_qlora(found):
    out = found[1]
    written = read_json(out / "chat.json")
    assert (written["model"], written["weights"]) == ("tiny", "random")
    assert [row["prompt"] for row in written["prompts"]] == read_prompts(REPO / "data" / "chat_prompts.en.txt")
    for row in written["prompts"]:
        assert row["base"] and row["lora"] and row["qlora"]
        assert set(row["greedy"]) == {"base", "lora", "qlora"} and all(row["greedy"].values())
    assert any(row["base"] != row["lora"] for row in written["prompts"])  # the adapter speaks
    table = (out / "chat.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 * (2 + 8)
    assert "Temperature 0.7, top-p 0.9:" in table and "Greedy, repetition penalty 1.2:" in table
