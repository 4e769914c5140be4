"""stages/style.py and its two modules in lib/text: an answer's style as a number, and when two models differ."""

import json
import math
import random
import statistics
from functools import partial

import pytest
from conftest import REPO, at_once, only_error, probe, run_in, set_params, stage

from lib.core.stage import read_json
from lib.text import style_measures
from lib.text.rows import read_rows
from lib.text.style_measures import MEASURES, Answer, language, sentences
from lib.text.style_scores import (
    GROUPS,
    MODELS,
    PAIRS,
    as_markdown,
    cell,
    difference,
    distance,
    interval,
    score,
    verdicts,
    withdraw,
)
from stages.style import Style

P = Style(
    prompts=0,
    max_new_tokens=160,
    temperature=0.7,
    top_p=0.9,
    repetition_penalty=1.0,
    batch=16,
    bootstrap_samples=2000,
    seed=42,
)
ALIKE = [1] * 10


def measure(name, text, cut=False):
    return getattr(style_measures, name)(Answer(text, cut))


# Sentences.


@pytest.mark.parametrize(
    "text, found",
    [
        ("犬です。猫です。", ["犬です。", "猫です。"]),
        ("「もう、いい？」と、聞く。帰る", ["「もう、いい？」と、聞く。", "帰る"]),  # the end of a quotation ends none
        ("一行目\n二行目です。\n\n", ["一行目", "二行目です。"]),
        ("It is 3.5 m. Go! 1. 犬 を飼う", ["It is 3.5 m.", "Go!", "1. 犬 を飼う"]),
        ("。。。！", []),
        ("", []),
    ],
)
def test_a_sentence_ends_at_its_mark_or_with_its_line(text, found):
    assert sentences(Answer(text, cut=False)) == found


def test_the_unfinished_end_of_a_cut_answer_is_no_sentence():
    assert sentences(Answer("犬です。猫で", cut=True)) == ["犬です。"]
    assert sentences(Answer("犬です。猫です。", cut=True)) == ["犬です。", "猫です。"]
    assert sentences(Answer("猫で", cut=True)) == []


# Measures, by hand.


def test_commas_are_counted_per_character_without_white_space():
    assert measure("commas_per_character", "私は、 犬が、\n好き。") == 2 / 9
    assert measure("commas_per_character", "a, b") == 0
    assert measure("commas_per_character", " ") is None


def test_sentence_length_is_the_mean_of_the_finished_ones():
    assert measure("sentence_characters", "犬です。それは、猫です。") == (4 + 8) / 2
    assert measure("sentence_characters", "犬です。それは、猫", cut=True) == 4
    assert measure("sentence_characters", "それは、猫", cut=True) is None


def test_a_first_person_pronoun_is_a_whole_word():
    assert measure("first_person_sentences", "私です。私たちも。犬です。僕だ。") == 3 / 4
    assert measure("first_person_sentences", "私立です。しおれています。自分でします。") == 0


def test_polite_endings_are_told_from_plain_ones():
    polite = "犬です。行きました。行きませんか。そうですから。お待ちください。お行きなさい。「はい」でしょうね。"
    assert measure("polite_endings", polite) == 1
    assert measure("polite_endings", "犬だ。行く。ですます体。Yes.") == 0
    assert measure("polite_endings", "行きます！行く。") == 1 / 2


def test_explaining_endings_are_neither_things_nor_negations():
    assert measure("explaining_endings", "行くのです。行くんですよ。行くのでしょうか。") == 1
    assert measure("explaining_endings", "よいものです。行きませんでした。犬です。") == 0


def test_distinct_n_looks_at_as_many_characters_of_every_answer():
    assert measure("distinct_1", "あい" * 20) == 2 / 40 and measure("distinct_2", "あい" * 20) == 2 / 39
    assert measure("distinct_1", "あ" * 500) == measure("distinct_1", "あ" * 40) == 1 / 40
    assert measure("distinct_1", "あ" * 39 + " \n") is measure("distinct_2", "あ" * 39) is None


def test_length_counts_characters_and_cut_is_one_or_nothing():
    assert measure("answer_characters", "犬 です。\n") == 4
    assert (measure("cut", "犬", cut=True), measure("cut", "犬", cut=False)) == (1, 0)


def test_the_personas_answers_are_told_from_a_plain_assistants():
    answers = [Answer(row["output"], False) for row in read_rows(REPO / "data" / "persona.jsonl")]
    plain = Answer("暇つぶしの方法は人によって異なりますが、次の方法があります。映画を見る。散歩をする。", False)
    commas = sorted(style_measures.commas_per_character(answer) for answer in answers)
    assert style_measures.commas_per_character(plain) < commas[0] < 0.13 < statistics.fmean(commas[700:])
    assert statistics.fmean(style_measures.polite_endings(answer) for answer in answers) > 0.9
    assert style_measures.polite_endings(plain) == 1 / 3


def test_every_measure_has_a_definition_in_one_line():
    for one in {*MEASURES["ja"], *MEASURES["en"]}:
        assert one.__doc__ and "\n" not in one.__doc__


def test_english_is_counted_in_words():
    assert measure("commas_per_word", "It is, as I said, mine.") == 2 / 6
    assert measure("commas_per_word", "...") is None
    assert measure("sentence_words", 'I can\'t say. "Cats are a two-faced lot." Well') == (3 + 5 + 1) / 3
    assert measure("sentence_words", "It cost 3.50 dollars. Well", cut=True) == 4
    assert measure("answer_words", "A cat,\nlet us say.") == 5
    assert measure("distinct_words_1", "a b " * 10) == 2 / 20 and measure("distinct_words_2", "A b " * 10) == 2 / 19
    assert measure("distinct_words_1", "a " * 19) is None


def test_english_sentences_tell_who_speaks_and_how_surely():
    assert measure("sentences_with_i", "I am here. It suits me. In a mine shaft? Imelda is. Ivy, too.") == 3 / 5
    assert measure("hedged_sentences", "It is so, I think. It is so. Perhaps! Rathering is no word.") == 2 / 4


def test_the_english_persona_differs_from_a_plain_assistant():
    answers = [Answer(row["output"], False) for row in read_rows(REPO / "data" / "persona.en.jsonl")]
    plain = Answer("There are many ways to pass the time. You can watch a film, read a book or go for a walk.", False)
    for name, least in (("commas_per_word", 0.15), ("sentences_with_i", 0.3), ("hedged_sentences", 0.2)):
        found = [getattr(style_measures, name)(answer) for answer in answers]
        assert statistics.fmean(found) > least > getattr(style_measures, name)(plain)


def test_the_language_is_that_of_most_answers():
    for name, wanted in (("persona.jsonl", "ja"), ("persona.en.jsonl", "en")):
        assert language([row["output"] for row in read_rows(REPO / "data" / name)]) == wanted
    assert language(["犬です。", "A dog (犬)."]) == "en"


# Intervals and verdicts.


def test_the_interval_of_ten_coins_is_the_binomial_one():
    found = interval([0] * 5 + [1] * 5, ALIKE, P)
    # Of B(10, 1/2), 1.1 % lie below 2 and 5.5 % below 3: the 2.5 % point is 2, and by symmetry 8.
    assert found == {"rows": 10, "mean": 0.5, "low": 0.2, "high": 0.8}


def test_about_95_of_100_intervals_hold_the_true_mean():
    draw = random.Random(0)
    found = [interval([draw.gauss(3, 1) for _ in range(30)], [1] * 30, P) for _ in range(300)]
    assert 0.90 < statistics.fmean(one["low"] <= 3 <= one["high"] for one in found) < 0.98


def test_a_mean_is_weighted_by_the_tokens_of_its_rows():
    assert interval([1.0, 3.0], [3, 1], P)["mean"] == 1.5
    assert interval([2.0] * 6, [1, 2, 3, 4, 5, 6], P) == {"rows": 6, "mean": 2.0, "low": 2.0, "high": 2.0}


def test_five_rows_make_no_interval():
    assert interval([1, 1, None, 1, 1, 1, 7, None][:6], [1] * 6, P) == {"rows": 5, "mean": 1, "low": None, "high": None}
    assert interval([None, None], [1, 1], P) == {"rows": 0, "mean": None, "low": None, "high": None}


def test_a_paired_difference_shows_despite_spread_of_rows():
    first = [float(10 * n) for n in range(10)]
    second = [value + 1 + (-0.5) ** n for n, value in enumerate(first)]
    ours, theirs = interval(first, ALIKE, P), interval(second, ALIKE, P)
    assert ours["low"] < theirs["low"] < ours["high"] < theirs["high"]  # the intervals overlap
    found = difference(first, second, ALIKE, P)
    assert found["verdict"] == "differs" and found["high"] < 0


def test_differences_that_go_both_ways_cannot_be_told_apart():
    found = difference([1.0] * 10, [0.0, 2.0] * 5, ALIKE, P)
    assert found["verdict"] == "cannot be told apart" and found["low"] < 0 < found["high"]
    assert difference([0.5] * 10, [0.5] * 10, ALIKE, P)["verdict"] == "cannot be told apart"


def test_a_rounding_error_is_no_difference():
    found = difference([0.1 + 0.2] * 10, [0.3] * 10, ALIKE, P)
    assert 0.1 + 0.2 != 0.3 and (found["low"], found["high"]) == (0, 0)
    assert found["verdict"] == "cannot be told apart"


def test_only_rows_where_both_have_a_value_are_compared():
    first, second = [1.0, None] * 8, [0.0] * 12 + [None] * 4
    assert difference(first, second, [1] * 16, P) == {
        "rows": 6, "mean": 1.0, "low": 1.0, "high": 1.0, "verdict": "differs",
    }  # fmt: skip
    few = difference(first[:10], second[:10], ALIKE, P)
    assert (few["rows"], few["low"], few["verdict"]) == (5, None, "not measured")


def test_the_distance_is_in_standard_deviations_of_the_dataset():
    assert distance(4.0, 2.0, [1.0, None, 3.0]) == 2 / math.sqrt(2)
    assert distance(4.0, 2.0, [3.0, 3.0]) is None  # no deviation, no unit
    assert distance(None, 2.0, [1.0, 3.0]) is distance(4.0, None, [1.0, 3.0]) is None


PERSONA, PLAIN = "私は、犬が、好きです。猫も、好きです。", "犬が好きです。猫も好きです。"


@pytest.fixture
def measured():
    """Ten rows where LoRA and QLoRA write as the dataset does and the base writes without commas and does not end."""
    texts = {"dataset": [PERSONA, PLAIN] * 20, "reference": [PERSONA] * 10, "lora": [PERSONA] * 10}
    answers = {who: [Answer(text, False) for text in given] for who, given in texts.items()}
    answers |= {"base": [Answer(PLAIN, True)] * 10, "qlora": answers["lora"]}
    losses = {"base": [3.0] * 10, "lora": [2.0] * 10, "qlora": [2.0, 2.1] * 5}
    return score(answers, losses, [20] * 10, P)


def test_every_measure_has_means_distances_and_verdicts(measured):
    assert list(measured) == ["completion_loss", *(one.__name__ for one in MEASURES["ja"])]
    for name, entry in measured.items():
        assert list(entry["means"]) == list(MODELS) if name == "completion_loss" else set(entry["means"]) == set(GROUPS)
        assert set(entry["differences"]) == set(PAIRS) and set(entry["distances"]) == set(MODELS)
        assert "\n" not in entry["definition"]
    commas = measured["commas_per_character"]
    assert commas["means"]["reference"]["mean"] == 3 / 19 and commas["means"]["base"]["mean"] == 0
    assert commas["distances"]["lora"] == 0 > -1 > commas["distances"]["base"]
    assert measured["completion_loss"]["distances"]["lora"] is None  # the reference has no loss of its own
    assert measured["completion_loss"]["differences"]["lora_minus_base"]["mean"] == -1


def test_the_verdicts_name_what_differs(measured):
    found = verdicts(measured, "lora_minus_qlora")
    assert found["differs"] == ["completion_loss"] and found["not measured"] == ["distinct_1", "distinct_2"]
    found = verdicts(measured, "lora_minus_base")
    assert {"completion_loss", "commas_per_character", "first_person_sentences", "cut"} <= set(found["differs"])
    assert "polite_endings" in found["cannot be told apart"]


def test_nothing_is_judged_of_random_weights(measured):
    withdraw(measured)
    for pair in PAIRS:
        found = verdicts(measured, pair)
        assert (found["differs"], found["cannot be told apart"]) == ([], [])


def test_the_tables_hold_every_measure_and_no_invented_number(measured):
    data = {"model": "m", "remarks": ["Mind this."], "prompts": 10, "dataset_rows": 40, "max_new_tokens": 160}
    data |= {"temperature": 0.7, "top_p": 0.9}
    text = as_markdown({**data, "measures": measured})
    assert text.splitlines()[:3] == [
        "m: 10 held-out prompts, temperature 0.7, top-p 0.9, at most 160 tokens.",
        "",
        "- Mind this.",
    ]
    for name in measured:
        assert text.count(f"| {name} | ") == 3 and text.count(f"- {name}: ") == 1
    assert "| completion_loss | — | — | 3 [3, 3] | 2 [2, 2] | " in text  # the dataset has no loss
    assert "| distinct_1 | — | — | — | — | — |" in text


def test_a_cell_says_when_rows_are_missing():
    found = {"rows": 7, "mean": 0.1234, "low": 0.1, "high": 0.2}
    assert cell(found, 7) == "0.123 [0.1, 0.2]" and cell(found, 16) == "0.123 [0.1, 0.2] (7 rows)"
    assert cell({**found, "low": None, "high": None}, 7, "+") == "+0.123 no interval"
    assert cell({"rows": 0, "mean": None, "low": None, "high": None}, 7) == "—"


# The stage.


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("batch", 0, "style.batch is 0; use 1 or more"),
        ("prompts", -1, "style.prompts is -1; use 0 or more"),
        ("bootstrap_samples", 5, "style.bootstrap_samples is 5; use 100 or more"),
    ],
)
def test_a_parameter_that_cannot_work_is_one_line(tree, key, value, message):
    set_params(tree, style={key: value})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.style")
    assert only_error(done) == f"error: params.yaml: {message}"


def test_more_prompts_than_rows_are_held_out_is_one_line(small_tree, tmp_path):
    params = (small_tree / "params.yaml").read_text()
    set_params(small_tree, style={"prompts": 99})
    done = run_in(small_tree, "containers/run", "venv:tools", "python", "-m", "stages.style")
    (small_tree / "params.yaml").write_text(params)
    assert only_error(done) == "error: params.yaml: style.prompts is 99, but 4 rows are held out; 0 takes all"


@pytest.fixture(scope="module")
def found(base_model, small_tree, trained):
    """What SmolLM2 is asked, and the stage's folder for the tiny random model."""
    set_params(small_tree, style={"max_new_tokens": 8})
    return at_once(
        partial(probe, small_tree, "venv:pytorch", "asked", base_model / "model"),
        partial(stage, small_tree, "venv:pytorch", "style"),
    )


def test_an_answer_is_cut_where_the_model_had_more_to_say(found):
    (text, cut), _ = found[0]["long"]
    assert "Paris" in text and not cut
    assert found[0]["short"] == [["The capital of", True]]
    assert found[0]["long"] == found[0]["one by one"]


def test_half_a_character_at_the_cut_is_none(found):
    assert all(cut and text and "\ufffd" not in text for text, cut in found[0]["japanese"])
    lengths = [len(text) for text, _ in found[0]["japanese"]]
    assert any(shorter == longer for shorter, longer in zip(lengths, lengths[1:], strict=False))


def test_the_loss_is_that_of_the_completion_and_its_end(found):
    (likely, tokens), (unlikely, _), (_, one) = found[0]["likely"], found[0]["unlikely"], found[0]["end alone"]
    assert likely < 0.5 < 2 < unlikely
    assert (tokens, one) == (8, 1)  # The, capital, of, France, is, Paris, the full stop, the end


def test_the_stage_finds_the_loss_that_the_trainer_found(found, trained):
    means = read_json(found[1] / "style.json")["measures"]["completion_loss"]["means"]
    # The trainer's validation is one batch of these four rows: its mean is weighted by token too.
    for method in ("lora", "qlora"):
        best = read_json(trained / method / "metrics.json")["eval_loss_best"]
        assert means[method]["mean"] == pytest.approx(best, abs=0.02)
    assert means["base"]["mean"] == pytest.approx(math.log(32000), abs=0.5) and means["base"]["rows"] == 4


def test_random_weights_are_named_and_give_no_verdict(found):
    written = read_json(found[1] / "style.json")
    assert written["weights"] == "random" and "mean nothing" in written["remarks"][0]
    assert "mean nothing" in (found[1] / "style.md").read_text()
    rows = [json.loads(line) for line in (found[1] / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == written["prompts"] == 4
    for row in rows:
        assert list(row) == ["weights", "prompt", "reference", "base", "lora", "qlora", "cut"]
        assert row["weights"] == "random"
    for pair in PAIRS:
        assert list(written["verdicts"][pair]) == ["cannot be told apart", "differs", "not measured"]
        assert len(written["verdicts"][pair]["not measured"]) == len(MEASURES["en"]) + 1
