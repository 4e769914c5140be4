"""The stage kv_cache: bytes of keys and values a token, and the waste of room in one piece beside blocks."""

import json

import pytest
from conftest import REPO, only_error, run_in, set_params, stage

from stages.kv_cache import allocated, policies


@pytest.fixture(scope="module")
def counted(small_tree):
    set_params(small_tree, kv_cache={"shapes": ["llm-jp-1.3b", "gpt-oss-20b"], "tokens": 200, "block_tokens": [16]})
    return json.loads((stage(small_tree, "venv:pytorch", "kv_cache") / "kv_cache.json").read_text())


def test_the_formula_is_what_transformers_keeps(counted):
    # 2 x 24 layers x 16 heads x 128 x 2 bytes; the tiny Llama: 2 x 2 layers x 2 KV heads x 16 x 2 bytes.
    for name, by_hand in (("llm-jp-1.3b", 196_608), ("tiny", 256)):
        entry = counted["shapes"][name]
        assert entry["bytes_per_token"] == entry["counted_bytes_per_token"] == by_hand, name


def test_a_layer_with_a_window_keeps_its_window_alone(counted):
    entry = counted["shapes"]["gpt-oss-20b"]
    # A layer: 2 x 8 KV heads x 64 x 2 bytes; 12 of 24 keep the 127 positions that the next token can still see.
    assert entry["bytes_per_token"] == 24 * 2048
    assert entry["counted_bytes"] == 12 * 2048 * 200 + 12 * 2048 * 127


def test_the_rooms_are_of_the_dataset_the_run_used(counted, small_tree):
    tokens = json.loads((small_tree / "results/embedded/dataset/tokens.json").read_text())["corrected"]
    lengths = [length for part in tokens.values() for length in part]
    assert (counted["rows"], counted["longest_row"]) == (20, max(lengths))
    assert {one["used_tokens"] for one in counted["policies"]} == {sum(lengths)}


def test_blocks_waste_less_than_one_piece():
    assert allocated([1, 16, 17], 16) == 16 + 16 + 32
    whole, longest, paged = policies([100, 20], 1000, [16], 2**20)
    assert [one["allocated_tokens"] for one in (whole, longest, paged)] == [2000, 200, 112 + 32]
    assert [round(one["wasted_share"], 4) for one in (whole, longest, paged)] == [0.94, 0.4, 0.1667]
    # A token of a MiB: 1,024 tokens a GiB, and a sequence takes 1,000, 100 or 72 of them.
    assert [round(one["sequences_per_gib"], 2) for one in (whole, longest, paged)] == [1.02, 10.24, 14.22]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", 0, "kv_cache.tokens is 0; use 1 or more"),
        ("block_tokens", [16, 0], "kv_cache.block_tokens has 0; use whole numbers from 1"),
        (
            "shapes",
            ["gpt-5"],
            "kv_cache.shapes has 'gpt-5'; use one of elyza-7b-fast, gpt-oss-20b, llama-2-7b, llama-65b, llm-jp-1.3b",
        ),
    ],
)
def test_wrong_parameters_say_what_to_mend(tree, key, value, message):
    set_params(tree, kv_cache={key: value})
    done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "stages.kv_cache")
    assert only_error(done) == f"error: params.yaml: {message}"


def test_the_formula_gives_the_cache_blocks_of_vllm():
    fixtures = REPO / "tests" / "fixtures" / "speedups"
    cache = json.loads((fixtures / "speedups.json").read_text())["vllm_kv_cache"]
    formula = json.loads((fixtures / "kv_cache.json").read_text())["shapes"]["SmolLM2-135M-Instruct"]
    each = cache["bytes"] / (cache["blocks"] * cache["block_tokens"])
    # vLLM makes whole blocks only: what is left over is less than one.
    assert formula["bytes_per_token"] <= each < formula["bytes_per_token"] * (1 + 1 / cache["blocks"])
