"""stages/workers/random_weights.py: a folder that vLLM serves, whose every answer is as many tokens as were made."""

import json
from functools import partial

import pytest
from conftest import REPO, at_once, copy_tree, only_error, probe, run_in

from lib.analysis.roofline import weight_bytes
from lib.core.stage import UserError
from lib.model.shapes import parameters, read_shape
from stages.workers.random_weights import check, options, write


def shape(name):
    return json.loads((REPO / "data" / "shapes" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("random_model") / "tree")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """gpt-oss-20b without weights."""
    folder = tmp_path_factory.mktemp("gpt-oss-20b")
    write(shape("gpt-oss-20b"), "mxfp4", folder)
    return folder


@pytest.fixture(scope="module")
def found(tree, folder, tmp_path_factory):
    """What training's environment makes of random weights, and three environments of the vocabulary."""
    words = {image: partial(probe, tree, image, "words", folder) for image in ("venv:client", "venv:pytorch")}
    weights = partial(probe, tree, "venv:pytorch", "random_weights", tmp_path_factory.mktemp("weights"))
    first, *read = at_once(weights, *words.values())
    return {"weights": first, "words": dict(zip(words, read, strict=True))}


# The vocabulary.


@pytest.fixture(params=["venv:client", "venv:pytorch"])
def words(request, found):
    return found["words"][request.param]


def test_every_id_of_the_vocabulary_is_a_word_of_its_own(words):
    assert words["size"] == 201_088 and words["each"] and words["special"] == []


def test_any_answer_is_as_many_tokens_when_it_is_tokenised_again(words):
    assert words["back"]


def test_every_token_of_a_stream_is_text_at_once(words):
    assert words["pieces"] and words["streamed"]


def test_a_chat_adds_no_token_and_an_unknown_word_is_one(words):
    assert words["chat"] == [5, 7] and words["unknown"] == [0, 0, 0]


def test_prompts_have_exact_lengths_and_unique_beginnings(tree, folder, tmp_path):
    prompts = ["containers/run", "venv:client", "python3", "stages/workers/prompts.py", folder]
    outs = [tmp_path / "first.jsonl", tmp_path / "again.jsonl", tmp_path / "other.jsonl"]
    for out, seed in zip(outs, ("42", "42", "43"), strict=True):
        done = run_in(tree, *map(str, prompts), "64", "300", seed, str(out))
        assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"].split(" ") for line in outs[0].read_text().splitlines()]
    assert len(texts) == 300 and {len(words) for words in texts} == {64}
    assert len({words[0] for words in texts}) == 300
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(word in vocabulary for words in texts for word in words)
    assert outs[0].read_text() == outs[1].read_text() != outs[2].read_text()


def test_the_servers_bos_counts_in_a_prompts_length(tree, folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    word = next(iter(tokenizer["model"]["vocab"]))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": word, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {word: {"id": word, "ids": [0], "tokens": [word]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["containers/run", "venv:client", "python3", "stages/workers/prompts.py", str(tmp_path)]
    done = run_in(tree, *command, "64", "3", "42", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()]
    assert [len(text.split(" ")) for text in texts] == [63] * 3
    done = run_in(tree, *command, "1", "3", "42", str(tmp_path / "out"))
    assert only_error(done).endswith("puts 1 tokens in front of a text; ask for more than 1")


def test_more_prompts_than_words_is_one_line(tree, tmp_path):
    write(shape("llama-2-7b") | {"vocab_size": 10}, "bf16", tmp_path)
    words = ["stages/workers/prompts.py", str(tmp_path), "4", "11", "0", str(tmp_path / "out")]
    done = run_in(tree, "containers/run", "venv:client", "python3", *words)
    assert "11 prompts cannot all begin with another of 10 words" in only_error(done)


# The config.


def test_only_the_experts_of_gpt_oss_are_mxfp4(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config == shape("gpt-oss-20b")
    assert config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    special = json.loads((folder / "generation_config.json").read_text())
    assert (special["eos_token_id"], special["pad_token_id"]) == (200_002, 199_999)


@pytest.mark.parametrize(
    ("weights", "seed", "words"),
    [
        ("bf16", 0, []),
        ("int4-g128", None, ["--load-format", "dummy"]),
        ("fp8", None, ["--quantization", "fp8", "--load-format", "dummy"]),
    ],
)
def test_fp8_is_a_word_of_vllm_and_int4_stands_in_the_config(tmp_path, weights, seed, words):
    write(shape("llama-2-7b"), weights, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    assert options(weights, seed) == words and method == ("gptq" if weights == "int4-g128" else None)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("llama-2-7b", "int3", "use one of bf16"),
        ("llama-2-7b", "mxfp4", "for gpt_oss"),
        ("gpt-oss-20b", "int4-g128", "for llama"),
    ],
)
def test_a_format_that_a_shape_cannot_have_is_one_line(name, weights, said):
    with pytest.raises(UserError, match=said):
        check(shape(name), weights)


def test_an_unknown_shape_lists_the_known_ones(monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError, match="the shape is 'gpt-4'; use one of elyza-7b-fast, gpt-oss-20b, llama-2-7b"):
        read_shape("gpt-4", "the shape is")


# The weights.


@pytest.fixture
def weights(found):
    return found["weights"]


@pytest.mark.parametrize("name", ["mxfp4", "int4-g128", "bf16"])
def test_weight_files_have_the_bytes_of_the_roofline(weights, name):
    config = weights["moe" if name == "mxfp4" else "llama"]
    # All experts are in use by so many tokens; the embedding table is in the file whole and read a row a token.
    tokens = 1000
    read = weight_bytes(config, name, tokens) - 2 * tokens * config["hidden_size"]
    sizes = weights["bytes"][name]
    unread = sizes.get("qzeros", 0) + sizes.get("g_idx", 0)  # symmetric, without desc_act: no kernel needs them
    assert sum(sizes.values()) - unread == read + 2 * parameters(config)["embedding"]


def test_packed_weights_have_the_models_shape_and_spread(weights):
    moe, llama = weights["moe"], weights["llama"]
    assert weights["mxfp4"]["shape"] == [32, moe["intermediate_size"], moe["hidden_size"]]
    assert weights["int4"]["shape"] == [llama["intermediate_size"], llama["hidden_size"]]
    assert weights["mxfp4"]["spread"] == pytest.approx(0.02, rel=0.2)  # a power of two: 0.0229
    assert weights["int4"]["spread"] == pytest.approx(0.02, rel=0.02)


def test_the_seed_decides_the_weights(weights):
    assert weights["same_seed"] and not weights["other_seed"]


def test_random_weights_route_evenly_and_dummy_weights_do_not(weights):
    evenly = 32 * (1 - (28 / 32) ** 16)  # 28.2 of 32
    assert weights["experts"] == pytest.approx(evenly, rel=0.05)
    assert weights["experts_with_dummy_weights"] < 6
