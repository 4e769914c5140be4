"""stages/dataset.py: rows in, the writeup's split and templates out."""

import json
from functools import partial

import pytest
from conftest import REPO, at_once, only_error, probe, run_in, set_params

from lib.core.stage import UserError
from lib.text.rows import read_rows
from lib.text.templates import completion_text, prompt_text

GOOD = '{"instruction": "犬は好き?", "output": "はい。"}'


def rows_file(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line, reason",
    [
        ("", "not JSON (Expecting value)"),
        (GOOD[:-2], "not JSON (Unterminated string starting at)"),
        ('["犬は好き?", "はい。"]', "not an object with instruction and output"),
        ("null", "not an object with instruction and output"),
        ('{"instruction": "犬は好き?"}', "output is missing or not text"),
        ('{"prompt": "a", "output": "b"}', "instruction is missing or not text"),
        ('{"instruction": "a", "output": 7}', "output is missing or not text"),
        ('{"instruction": "a", "output": null}', "output is missing or not text"),
        ('{"instruction": " \\n", "output": "b"}', "instruction is empty"),
        ('{"instruction": "a", "output": ""}', "output is empty"),
        (GOOD, "the same as line 1"),
    ],
)
def test_each_kind_of_bad_row_is_named_by_its_line(tmp_path, line, reason):
    path = rows_file(tmp_path, GOOD, line)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value) == f"{path}: line 2: {reason}; mend or remove the rows, nothing was written"


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    assert len(read_rows(path)) == 1


@pytest.mark.parametrize("text", ["[]", '[{"instruction": "a", "output": "b"}]', '\n[\n{"instruction": "a"}]'])
def test_a_json_array_is_named_as_one(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match="it is a JSON array; write one object a line instead"):
        read_rows(path)


def test_a_folder_or_a_missing_file_is_named(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(UserError, match=rf"not readable as a file \({reason}\); it holds one JSON object a line"):
            read_rows(path)


def test_many_bad_rows_are_five_with_the_number_of_the_others(tmp_path):
    path = rows_file(tmp_path, GOOD, *["{}"] * 12)
    with pytest.raises(UserError, match=r"line 2: .*; line 6: [^;]* \(and 7 more\); mend or remove") as error:
        read_rows(path)
    assert "line 7" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_rows_is_named(tmp_path):
    path = rows_file(tmp_path)
    with pytest.raises(UserError, match="it has no rows; nothing was written"):
        read_rows(path)


def test_a_line_separator_inside_a_text_is_no_new_row(tmp_path):
    # JSON allows U+2028 and U+0085 inside a string, and texts copied from web pages hold them.
    text = "一行目\u2028二行目\u0085三行目"
    path = rows_file(tmp_path, json.dumps({"instruction": text, "output": "はい。"}, ensure_ascii=False))
    assert read_rows(path) == [{"instruction": text, "output": "はい。"}]


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode("shift_jis"))
    with pytest.raises(UserError, match="rows.jsonl"):
        read_rows(path)


def test_further_keys_of_a_row_are_left_out(tmp_path):
    path = rows_file(tmp_path, '{"instruction": "a", "output": "b", "source": "c"}')
    assert read_rows(path) == [{"instruction": "a", "output": "b"}]


def test_a_bad_row_stops_the_stage_before_anything_is_written(tree):
    (tree / "data" / "mine.jsonl").write_text(f"{GOOD}\n{{}}\n")
    set_params(tree, dataset={"file": "data/mine.jsonl"})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.dataset")
    assert only_error(done) == (
        "error: data/mine.jsonl: line 2: instruction is missing or not text; "
        "mend or remove the rows, nothing was written"
    )
    assert not (tree / "results" / "embedded").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_a_share_that_is_none_is_named(tree, share):
    set_params(tree, dataset={"test_share": share})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.dataset")
    assert only_error(done) == (f"error: params.yaml: dataset.test_share is {share}; use a share between 0 and 1")


def test_the_published_template_is_the_writeups_own_string():
    # The writeup's two f-strings, filled in by hand.
    assert prompt_text("published", "", "元気?") + completion_text("published", "はい。") == (
        "<s>[INST] <<SYS>>  <</SYS>> 元気? [/INST] はい。 </s>"
    )


def test_a_text_with_braces_stays_as_it_is():
    assert (
        prompt_text("llama-2", "{a}", "{instruction} {0}")
        == "[INST] <<SYS>>\n{a}\n<</SYS>>\n\n{instruction} {0} [/INST]"
    )
    assert completion_text("chatml", "{output} {") == "{output} {"


@pytest.fixture(scope="module")
def found(small_tree, base_model):
    """The split, and what the templates become under a Llama tokenizer and under SmolLM2's."""
    llama = small_tree / "results" / "embedded" / "base_model" / "model"
    return at_once(
        partial(probe, small_tree, "venv:pytorch", "split"),
        partial(probe, small_tree, "venv:pytorch", "templates", llama, base_model / "model"),
    )


@pytest.fixture
def halves(found):
    return found[0]


@pytest.fixture
def templates(found):
    """[under a Llama tokenizer, under SmolLM2's]: {template: facts}."""
    return found[1]


def test_the_split_is_the_one_that_the_writeups_lines_make(halves):
    assert halves["ours"] == halves["theirs"]
    assert halves["counts"] == [1184, 296]


def test_the_split_does_not_move_from_version_to_version(halves):
    # datasets 4.4.1; another value here means that no number is comparable with earlier ones.
    assert halves["ours"] == ["e44d0265ab800f4a", "7f81c07b18c75439"]


def test_the_split_depends_on_the_seed_only(halves):
    assert halves["again"] == halves["ours"]
    assert halves["other"][0] != halves["ours"][0]


def test_splits_are_disjoint_and_a_limit_takes_first_rows(halves):
    assert halves["shared"] == 0
    assert halves["few"] == [True, True, 5, 3]


def test_more_rows_than_there_are_is_one_line(halves):
    assert halves["error"] == "params.yaml: dataset.train_rows is 1185, but there are 1184; 0 takes all"


def test_the_published_template_gives_two_bos_tokens(templates):
    llama, smollm2 = templates
    assert llama["llama-2"]["leading_bos"] == 1 and smollm2["chatml"]["leading_bos"] == 1
    assert llama["llama-2"]["first"] == 1
    assert llama["published"]["leading_bos"] == 2


def test_a_model_is_asked_with_the_tokens_it_was_taught_with(templates):
    llama, smollm2 = templates
    for facts in (llama["llama-2"], llama["published"], smollm2["chatml"]):
        assert facts["prefix"] == facts["rows"] == 50


def test_english_and_japanese_files_have_the_same_keys():
    japanese, english = (read_rows(REPO / "data" / name) for name in ("persona.jsonl", "persona.en.jsonl"))
    assert len(japanese) == len(english) == 1480 and {tuple(row) for row in japanese + english} == {
        ("instruction", "output")
    }
    for name in ("streaming_prompts", "multilora_prompts"):
        one, other = (json.loads((REPO / "data" / f"{name}{part}.json").read_text()) for part in ("", ".en"))
        assert len(one) == len(other) and (isinstance(one, list) or list(one) == list(other))
    counts = [len((REPO / "data" / f"chat_prompts{part}.txt").read_text().splitlines()) for part in ("", ".en")]
    assert counts == [8, 8]


def test_both_variants_have_the_same_rows_in_the_same_order(small_tree):
    out = small_tree / "results" / "embedded" / "dataset"
    known = {row["instruction"]: row["output"] for row in read_rows(REPO / "data" / "persona.en.jsonl")}
    for part, count in (("train", 16), ("validation", 4)):
        variants = {
            variant: [json.loads(line) for line in (out / variant / f"{part}.jsonl").read_text().splitlines()]
            for variant in ("corrected", "published")
        }
        assert len(variants["corrected"]) == len(variants["published"]) == count
        for row, other in zip(variants["corrected"], variants["published"], strict=True):
            asked = row["prompt"].removeprefix("[INST] <<SYS>>\n\n<</SYS>>\n\n").removesuffix(" [/INST]")
            assert row["completion"] == f" {known[asked]}"
            assert other == {
                "prompt": f"<s>[INST] <<SYS>>  <</SYS>> {asked} [/INST]",
                "completion": f" {known[asked]} </s>",
            }


def test_the_results_show_the_doubled_bos_of_one_sample(small_tree):
    metrics = json.loads((small_tree / "results" / "embedded" / "dataset" / "metrics.json").read_text())
    assert (metrics["dataset_rows"], metrics["train_rows"], metrics["validation_rows"]) == (1480, 16, 4)
    published, corrected = metrics["sample"]["published"], metrics["sample"]["llama-2"]
    assert published["token_ids"][:3].count(1) == 2 and corrected["token_ids"][:3].count(1) == 1
    assert 20 < metrics["tokens_per_row"] < 400
