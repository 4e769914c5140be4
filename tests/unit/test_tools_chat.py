"""tools/chat.py: the talk with the model, on a terminal of the tests' own."""

import os
import random
import re
import shutil
import subprocess
import time
from functools import partial

import pytest
from conftest import ONE_THREAD, at_once, only_error, probe, run_in, set_params, variables
from terminal import CTRL_C, CTRL_D, CTRL_Z, Terminal

from lib.core.stage import read_json, write_json
from tools.chat import Stream, as_sentence

CHAT = ["containers/run", "venv:tools", "python", "-m", "tools.chat"]
SINGLE_TURNS = "Each question is answered on its own: the model was trained on single turns"


# The stream.


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, 256 the end of sequence.

    With fallback it decodes as sentencepiece's do: a run of bytes is text as a whole, or U+FFFD byte for byte.
    """

    def __init__(self, fallback):
        self.fallback = fallback

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        data = bytes(token for token in ids if token < 256)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data) if self.fallback else data.decode(errors="replace")


class Value(list):
    """What `generate` hands over is a tensor; only this of it is used."""

    def tolist(self):
        return list(self)


def streamed(data, fallback=False):
    """The pieces in which these tokens are written."""
    pieces = []
    stream = Stream(Bytes(fallback), pieces.append)
    stream.put(Value([1, 2, 3]))  # the prompt
    for token in data:
        stream.put(Value([token]))
    stream.end()
    return pieces


@pytest.mark.parametrize("fallback", [False, True])
def test_kana_come_one_by_one_and_none_of_them_in_parts(fallback):
    assert streamed("ひらがなは、すぐ。".encode(), fallback) == list("ひらがなは、すぐ。")


@pytest.mark.parametrize("fallback", [False, True])
def test_no_streamed_piece_splits_a_character(fallback):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("aé犬の🐕𠮷\u3000 \n\t。", k=draw.randint(1, 30)))
        pieces = streamed(text.encode(), fallback)
        assert "".join(pieces) == text.strip() and all(pieces) and "\ufffd" not in "".join(pieces)


def test_a_character_that_is_cut_through_is_left_out():
    assert streamed("猫犬".encode()[:-1]) == ["猫"]
    assert streamed("猫犬".encode()[:-1], fallback=True) == ["猫"]


def test_control_codes_and_invalid_bytes_are_escaped():
    assert "".join(streamed(b"a\xffb\x1b[2Jc\td\n\x07e")) == "a\ufffdb\ufffd[2Jc\td\n\ufffde"


def test_the_prompt_and_the_end_of_sequence_are_no_text():
    assert streamed([104, 105, 256]) == ["h", "i"]


# What is measured.


def test_the_rate_is_that_of_the_tokens_after_the_first():
    assert as_sentence([10.5, 10.75, 11.0], 10.0, stopped=False, cut=False) == (
        "3 tokens, the first after 0.50 s, then 4.0 tokens/s"
    )


def test_what_was_not_measured_is_not_said():
    assert as_sentence([10.5], 10.0, stopped=False, cut=False) == "1 token, the first after 0.50 s"
    assert as_sentence([], 10.0, stopped=True, cut=False) == "0 tokens, stopped"


def test_an_answer_that_was_cut_names_the_parameter():
    said = as_sentence([1.0, 2.0], 0.0, stopped=False, cut=True)
    assert said == "2 tokens, the first after 1.00 s, then 1.0 tokens/s, cut at chat.max_new_tokens"


# Before any model is loaded.


def test_help_names_adapters_and_that_turns_are_independent(tree):
    done = run_in(tree, *CHAT, "--help")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and SINGLE_TURNS in said and "--once TEXT" in said and "none: the base model" in said


def test_a_missing_adapter_names_its_command(tree):
    done = run_in(tree, "make", "chat")
    line = (
        "error: results/embedded/finetune/lora/adapter: there is no adapter; "
        "`containers/run venv:tools dvc repro finetune@lora` makes it"
    )
    assert done.stderr.splitlines()[0] == line and done.stdout == ""
    assert only_error(run_in(tree, *CHAT)) == line


def test_a_variant_that_is_no_stage_yet_says_where_to_put_it(tree):
    assert only_error(run_in(tree, *CHAT, "qlora-tuned")) == (
        "error: results/embedded/finetune/qlora-tuned/adapter: there is no adapter; put qlora-tuned into "
        "finetune.variants of params.yaml, then `containers/run venv:tools dvc repro finetune@qlora-tuned` makes it"
    )


@pytest.mark.parametrize("name", ["lara", "lora-nope", "none-published", "../lora"])
def test_an_unknown_variant_lists_those_that_there_are(tree, name):
    said = only_error(run_in(tree, *CHAT, name))
    assert said.startswith(f"error: params.yaml: finetune has no variant {name!r}; use one of lora, qlora, ")
    assert said.endswith("; ADAPTER=none is the base model alone")


def test_a_missing_base_model_names_the_command_that_makes_it(tree):
    assert only_error(run_in(tree, *CHAT, "none")) == (
        "error: results/embedded/base_model/metrics.json: there is no such file; "
        "`containers/run venv:tools dvc repro dataset` makes it"
    )


@pytest.fixture
def in_docker(tree, tmp_path, monkeypatch):
    """A copy of the project whose pytorch image is a docker one, and a `docker` that notes its words."""
    for name in ("base_model", "dataset"):
        write_json(tree / "results" / "embedded" / name / "metrics.json", {"template": "chatml"})
    images = tree / "containers" / "images.yaml"
    image = f"docker://example.org/a:1@sha256:{'0' * 64}"
    images.write_text(re.sub(r"(?m)^(  pytorch: )\S+", rf"\1{image}", images.read_text()))
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(f'#!/bin/sh\n[ "$1" != run ] || printf "%s\\0" "$@" > {tmp_path}/words\n')
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tree


def words_of(tmp_path):
    return (tmp_path / "words").read_text().split("\0")[:-1]


def test_chat_runs_in_the_profiles_image_with_its_stdin(in_docker, tmp_path):
    assert run_in(in_docker, "make", "chat", "ADAPTER=none").returncode == 0
    words = words_of(tmp_path)
    image = f"example.org/a:1@sha256:{'0' * 64}"
    assert words[-9:] == [image, "bash", "-c", 'exec "$@"', "bash", "python", "-m", "tools.chat", "none"]
    assert "--interactive" in words and "--tty" not in words


@pytest.mark.parametrize("question", ['What\'s "this"? `id` $(id) \\ *', "two\nlines", "--help", "猫"])
def test_make_passes_a_question_unchanged(in_docker, tmp_path, question):
    # From the environment: as a word of make's own, a $ is written $$.
    done = run_in(in_docker, "make", "chat", "ADAPTER=none", environment={"ONCE": question})
    assert done.returncode == 0, done.stderr
    words = words_of(tmp_path)
    assert words[-3:] == ["tools.chat", "none", f"--once={question}"] and "--interactive" not in words
    assert run_in(in_docker, "make", "chat", f"ONCE={question.replace('$', '$$')}", "ADAPTER=none").returncode == 0
    name = words.index("--name") + 1  # another at each start
    assert [word for at, word in enumerate(words_of(tmp_path)) if at != name] == words[:name] + words[name + 1 :]


# With a tiny model.


def copied(small_tree, folder, **chat):
    tree = shutil.copytree(small_tree, folder / "tree", symlinks=True)
    set_params(tree, chat=chat)
    return tree


@pytest.fixture(scope="module")
def brief(small_tree, trained, tmp_path_factory):
    """The tiny model with sampled answers of 12 tokens, and its adapter once more as if of the writeup's template."""
    tree = copied(small_tree, tmp_path_factory.mktemp("brief"), max_new_tokens=12, temperature=1.0, top_p=0.9)
    finetune = tree / "results" / "embedded" / "finetune"
    shutil.copytree(finetune / "lora", finetune / "lora-published")
    metrics = read_json(finetune / "lora" / "metrics.json")
    metrics["settings"]["template"] = "published"
    write_json(finetune / "lora-published" / "metrics.json", metrics)
    return tree


@pytest.fixture(scope="module")
def wordy(small_tree, tmp_path_factory):
    """The tiny model with answers that take half a minute."""
    return copied(
        small_tree, tmp_path_factory.mktemp("wordy"), max_new_tokens=20000, temperature=0.0, repetition_penalty=1.0
    )


@pytest.fixture(scope="module")
def told(brief, base_model):
    return probe(brief, "venv:pytorch", "told", base_model / "model")


def test_real_tokenizers_give_whole_characters_at_once(told):
    for found in told["streamed"]:
        assert found["rows"] == found["same"] == 100 and found["broken"] == 0
        assert found["characters"] / found["pieces"] < 2


def test_once_prints_only_the_answer(brief, told):
    def once(adapter):
        return run_in(brief, "make", "chat", f"ADAPTER={adapter}", "ONCE=犬は好き?", environment=ONE_THREAD)

    adapters = ("none", "lora", "lora-published")
    done = dict(zip(adapters, at_once(*(partial(once, adapter) for adapter in adapters)), strict=True))
    assert {adapter: one.stdout for adapter, one in done.items()} == {
        adapter: told["answers"][adapter][0] + "\n" for adapter in adapters
    }
    assert len({one.stdout for one in done.values()}) == 3
    random_weights = "Its weights are random: its answers mean nothing."
    folder = "results/embedded/finetune/lora-published/adapter"
    assert done["none"].stderr.splitlines() == ["tiny with no adapter, template llama-2", random_weights]
    said = done["lora-published"].stderr.splitlines()
    assert said == [f"tiny with the adapter {folder}, template published", random_weights]


def test_questions_down_a_pipe_are_each_answered_on_their_own(brief, told):
    env = variables() | ONE_THREAD
    given = "犬は好き?\n\n  \n犬は好き?\n".encode() + b"caf\xe9"
    done = subprocess.run([*CHAT, "qlora"], cwd=brief, env=env, input=given, capture_output=True)
    assert done.returncode == 0, done.stderr
    dog, cafe = told["answers"]["qlora"]
    assert done.stdout.decode() == f"{dog}\n{dog}\n{cafe}\n"
    said = done.stderr.decode()
    assert SINGLE_TURNS in said and len(re.findall(r"(?m)^\d+ tokens?, the first after \d+\.\d\d s", said)) == 3
    assert "\x1b" not in said


def test_a_closed_pipe_ends_the_answer_without_traceback(wordy):
    pipe = f"set -o pipefail; {' '.join(CHAT)} none --once 犬は好き? | head -c 1"
    done = run_in(wordy, "bash", "-c", pipe, environment=ONE_THREAD, timeout=60)
    assert len(done.stdout) == 1 and done.returncode == 128 + 13
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def on_terminal(tree):
    """`make chat` in a script on a terminal; the script then says make's exit code and reads a line."""
    script = 'make chat ADAPTER=none; echo "code $?"; read -r line; echo "read <$line>"'
    return Terminal("bash", "-c", script, cwd=tree, env=variables() | ONE_THREAD | {"TERM": "dumb"})


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(wordy):
    with on_terminal(wordy) as terminal:
        start = terminal.until("> ")
        assert "tiny with no adapter, template llama-2\n" in start and SINGLE_TURNS in start
        assert "Its weights are random: its answers mean nothing.\n" in start
        terminal.type("犬は好き?\n")
        terminal.until("\n")
        terminal.until(r"\S")  # of an answer that is far from its end
        time.sleep(0.3)
        terminal.type(CTRL_C)
        rest = terminal.until("\n> ")
        measured = re.search(r"\x1b\[2m(\d+) tokens, the first after \d+\.\d\d s, then [\d.]+ tokens/s, stopped", rest)
        assert measured and 1 < int(measured.group(1)) < 20000 and len(rest) > 10
        terminal.type(CTRL_Z)  # `make` could not be woken with its child
        terminal.type("\n \n猫は好き?\n")  # an empty line is no question
        terminal.until("猫は好き\\?\n")
        terminal.until(r"\S")
        terminal.type(CTRL_C)
        terminal.until(r"stopped\S*\n> ")
        terminal.type(CTRL_D)
        assert terminal.until("code .*\n").strip() == "code 0"
        terminal.type("still here\n")
        assert "read <still here>\n" in terminal.until("read <.*\n")


def test_ctrl_c_at_the_prompt_ends_the_talk_and_make_with_it(wordy):
    with on_terminal(wordy) as terminal:
        terminal.until("> ")
        terminal.type("half a ques")
        terminal.until("ques")
        time.sleep(0.5)  # Python loses a Ctrl-C within microseconds of another key
        terminal.type(CTRL_C)
        said = terminal.until("code .*\n")
        assert said.replace("^C", "").strip() == "code 0"
        terminal.type("still here\n")
        assert "read <still here>\n" in terminal.until("read <.*\n")
