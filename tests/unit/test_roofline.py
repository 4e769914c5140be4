"""lib/model/shapes.py and lib/analysis/roofline.py: bytes and operations that a model cannot be served without."""

import json
from itertools import pairwise

import pytest
from conftest import REPO, probe

from lib.analysis.roofline import (
    BITS,
    closed_loop,
    decode_step,
    distinct_experts,
    kv_bytes_per_token,
    prefill,
    rates,
    seconds,
    weight_bytes,
)
from lib.model.shapes import parameters, tensors

MACHINE = {"bytes_per_second": 4e12, "flops_per_second": 7e14, "fp8_flops_per_second": 1.4e15}


def shape(name):
    return json.loads((REPO / "data" / "shapes" / f"{name}.json").read_text())


LLAMA, OSS = shape("llama-2-7b"), shape("gpt-oss-20b")
# Llama-2-7B by hand. A layer: four projections of 4096 x 4096, three matrices of 4096 x 11008.
LLAMA_LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
LLAMA_TABLE = 32_000 * 4096
LLAMA_NORMS = (2 * 32 + 1) * 4096
# gpt-oss-20b by hand. Queries and output 2880 x 4096, keys and values 2880 x 512; an expert 2880 x 5760, 2880 x 2880.
OSS_ATTENTION = 24 * (2 * 2880 * 4096 + 2 * 2880 * 512)
OSS_EXPERT = 2880 * 5760 + 2880 * 2880
OSS_ROUTER = 24 * 32 * 2880
OSS_TABLE = 201_088 * 2880
# A layer: the biases of four projections and of the router, a sink for each of 64 heads, two norms; a norm at the end.
OSS_SMALL = 24 * (4096 + 2 * 512 + 2880 + 32 + 64 + 2 * 2880) + 2880


def test_the_tensors_of_every_shape_are_those_of_transformers(tree):
    for name, built in probe(tree, "venv:pytorch", "shapes").items():
        assert {tensor.name: list(tensor.shape) for tensor in tensors(shape(name))} == built, name


def test_the_models_have_as_many_parameters_as_published():
    assert sum(parameters(LLAMA).values()) == 6_738_415_616
    # "20.9B" and "3.6B active" in the model card: active leaves out the embedding table and 28 of 32 experts.
    assert sum(parameters(OSS).values()) == 20_914_757_184
    active = OSS_ATTENTION + OSS_ROUTER + 24 * 4 * (OSS_EXPERT + 8640) + OSS_TABLE + OSS_SMALL
    assert active == pytest.approx(3.61e9, rel=0.002)


def test_a_step_of_llama_2_7b_reads_all_but_the_embedding_table():
    assert weight_bytes(LLAMA, "bf16", 1) == 2 * (6_738_415_616 - LLAMA_TABLE + 4096) == 13_214_695_424
    assert weight_bytes(LLAMA, "bf16", 64) - weight_bytes(LLAMA, "bf16", 1) == 63 * 4096 * 2


@pytest.mark.parametrize(
    ("weights", "bits"),
    [("fp8", 8), ("int4-g128", 4.125), ("int4-g128-zeros", 4.15625), ("nf4", 4.5), ("nf4-double", 4.126953125)],
)
def test_a_format_shrinks_the_linear_layers_and_nothing_else(weights, bits):
    rest = 2 * (LLAMA_TABLE + LLAMA_NORMS + 4096)
    assert weight_bytes(LLAMA, weights, 1) == pytest.approx(LLAMA_LINEAR * bits / 8 + rest, rel=1e-12)


def test_a_gpt_oss_token_reads_4_experts_in_4_25_bits():
    experts = 24 * 4 * (OSS_EXPERT * 4.25 / 8 + 2 * 8640)
    rest = 2 * (OSS_ATTENTION + OSS_ROUTER + OSS_TABLE + OSS_SMALL + 2880)
    assert weight_bytes(OSS, "mxfp4", 1) == pytest.approx(experts + rest, rel=1e-12)
    whole = 24 * 32 * (OSS_EXPERT * 4.25 / 8 + 2 * 8640) + rest
    assert weight_bytes(OSS, "mxfp4", 10_000) - 9_999 * 2 * 2880 == pytest.approx(whole, rel=1e-12)


def test_experts_in_use_grow_from_4_to_nearly_all():
    assert distinct_experts(OSS, 1) == pytest.approx(4)
    assert distinct_experts(OSS, 2) == pytest.approx(4 + 4 * 28 / 32)  # the second token's, less those already in use
    assert 31.9 < distinct_experts(OSS, 64) < 32
    assert distinct_experts(LLAMA, 1) == distinct_experts(LLAMA, 64) == 1


def test_a_token_of_llama_2_7b_keeps_half_a_mebibyte():
    assert kv_bytes_per_token(LLAMA, "bf16") == 2 * 32 * 32 * 128 * 2 == 524_288
    assert kv_bytes_per_token(LLAMA, "fp8") == 262_144
    assert kv_bytes_per_token(OSS, "bf16") == 2 * 24 * 8 * 64 * 2 == 49_152


def test_half_the_gpt_oss_layers_read_128_positions_at_most():
    one = 2 * 8 * 64 * 2  # bytes of a position in a layer
    assert decode_step(OSS, "mxfp4", "bf16", 1, 100)["kv_bytes"] == 24 * 100 * one
    assert decode_step(OSS, "mxfp4", "bf16", 3, 1000)["kv_bytes"] == 3 * (12 * 1000 + 12 * 128) * one


def test_flops_are_2_per_weight_and_4_per_position_and_query():
    step = decode_step(LLAMA, "bf16", "bf16", 1, 1000)
    assert step["flops"] == 2 * (LLAMA_LINEAR + LLAMA_TABLE) + 4 * 4096 * 32 * 1000 and step["fp8_flops"] == 0
    step = decode_step(LLAMA, "fp8", "bf16", 2, 1000)
    assert step["flops"] == 2 * (2 * LLAMA_TABLE + 4 * 4096 * 32 * 1000) and step["fp8_flops"] == 4 * LLAMA_LINEAR
    step = decode_step(OSS, "mxfp4", "bf16", 1, 1000)
    matrices = OSS_ATTENTION + OSS_ROUTER + 24 * 4 * OSS_EXPERT + OSS_TABLE
    assert step["flops"] == 2 * matrices + 4 * 4096 * (12 * 1000 + 12 * 128)


@pytest.mark.parametrize("config", [LLAMA, OSS], ids=["llama", "gpt-oss"])
@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
def test_reading_a_prompt_is_the_sum_of_its_positions(config, tokens):
    found = prefill(config, "bf16", "bf16", 2, tokens)
    head = 2 * config["vocab_size"] * config["hidden_size"]
    one_by_one = [decode_step(config, "bf16", "bf16", 2, 1 + n)["flops"] - 2 * head for n in range(tokens)]
    assert found["flops"] == sum(one_by_one) + 2 * head  # logits at the last position only
    assert found["kv_bytes"] == 2 * tokens * kv_bytes_per_token(config, "bf16")


def test_a_large_batch_is_bound_by_arithmetic():
    one, many = (decode_step(LLAMA, "bf16", "bf16", batch, 10) for batch in (1, 4096))
    assert seconds(one, MACHINE) == (one["weight_bytes"] + one["kv_bytes"]) / 4e12
    assert seconds(many, MACHINE) == many["flops"] / 7e14


def test_one_request_is_limited_by_bandwidth_over_bytes():
    # 13.2 GB of weights and 640 positions of half a MiB in the middle, at 4 TB/s: 3.39 ms a token, 255 times, after
    # 0.01 s for the prompt's 512 tokens; were the prompt's arithmetic free, its pass would still read the weights.
    found = closed_loop(LLAMA, "bf16", "bf16", MACHINE, 1, 512, 256)
    middle = (13_214_695_424 + 640 * 524_288) / 4e12
    assert found["decode_seconds"] == pytest.approx(255 * middle, rel=1e-9)
    assert found["apart_tokens_per_second"] == pytest.approx(256 / (255 * middle + found["prefill_seconds"]), rel=1e-9)
    first = (13_214_695_424 + 512 * 524_288) / 4e12
    assert found["tokens_per_second"] == pytest.approx(256 / (255 * middle + first), rel=1e-9)


def test_a_load_that_is_all_prompts_is_bound_by_the_matrix_rate():
    found = closed_loop(LLAMA, "bf16", "bf16", MACHINE, 8, 2000, 1)
    work = prefill(LLAMA, "bf16", "bf16", 8, 2000)
    assert found["decode_seconds"] == 0
    assert found["tokens_per_second"] == pytest.approx(8 / (work["flops"] / 7e14))


def limit(config=LLAMA, weights="bf16", kv="bf16", machine=MACHINE, load=(16, 512, 256)):
    return closed_loop(config, weights, kv, machine, *load)


@pytest.mark.parametrize("config", [LLAMA, OSS], ids=["llama", "gpt-oss"])
def test_mixed_prefill_is_never_slower_than_separate(config):
    for concurrency in (1, 4, 16, 64, 256):
        for lengths in ((1, 1), (512, 256), (1000, 1000), (4000, 10)):
            found = limit(config, load=(concurrency, *lengths))
            assert found["apart_tokens_per_second"] <= found["tokens_per_second"] * (1 + 1e-12)


@pytest.mark.parametrize("config", [LLAMA, OSS], ids=["llama", "gpt-oss"])
def test_concurrency_raises_the_total_and_not_each_share(config):
    found = [limit(config, load=(c, 512, 256))["tokens_per_second"] / c for c in (1, 2, 4, 8, 16, 32, 64, 256)]
    totals = [one * c for one, c in zip(found, (1, 2, 4, 8, 16, 32, 64, 256), strict=True)]
    assert all(a <= b for a, b in pairwise(totals)) and all(a >= b for a, b in pairwise(found))


@pytest.mark.parametrize("config", [LLAMA, OSS], ids=["llama", "gpt-oss"])
def test_a_longer_context_never_takes_less(config):
    work = [decode_step(config, "bf16", "bf16", 4, context) for context in (1, 100, 128, 129, 1000, 4000)]
    for name in ("kv_bytes", "flops"):
        assert all(a[name] < b[name] for a, b in pairwise(work))


def test_fewer_bits_are_a_higher_limit_for_one_request():
    found = [limit(weights=one, load=(1, 512, 256))["tokens_per_second"] for one in ("bf16", "fp8", "nf4", "int4-g128")]
    assert found == sorted(found) and found[0] < found[-1]
    assert BITS["int4-g128"] < BITS["int4-g128-zeros"] < BITS["mxfp4"] < BITS["fp8"] < BITS["bf16"]
    assert limit(kv="fp8")["tokens_per_second"] > limit(kv="bf16")["tokens_per_second"]


def test_twice_the_cards_are_twice_the_limit():
    double = rates(MACHINE | {"device": "two"}, gpus=2)
    assert limit(machine=double)["tokens_per_second"] == pytest.approx(2 * limit()["tokens_per_second"])


def test_without_a_measured_fp8_rate_fp8_has_no_limit():
    unmeasured = rates(MACHINE | {"fp8_flops_per_second": None})
    assert set(limit(weights="fp8", machine=unmeasured).values()) == {None}
    assert limit(machine=unmeasured)["tokens_per_second"] == limit()["tokens_per_second"]
