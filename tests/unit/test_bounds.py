"""A number out of bounds in params.yaml is one line that names the key, its value and the bound."""

import pytest
from conftest import REPO

from lib.bench.experiments import Bench
from lib.core.stage import UserError, load_yaml
from stages.claims import Claims
from stages.client_accuracy import ClientAccuracy
from stages.multilora import Multilora
from stages.speedups import Speedups
from stages.streaming import Streaming
from stages.style import Style

SECTIONS = {"bench": Bench, "claims": Claims, "client_accuracy": ClientAccuracy, "multilora": Multilora,
            "speedups": Speedups, "streaming": Streaming, "style": Style}  # fmt: skip
# The least value of each whole number.
LEAST = {
    "bench": {"repeats": 1, "requests_per_stream": 1, "min_requests": 1, "warmup_requests": 0, "seed": 0,
              "ready_seconds": 1, "point_seconds": 1},
    "client_accuracy": {"input_tokens": 1, "output_tokens": 2, "requests_per_stream": 1, "warmup_requests": 0,
                        "seed": 0, "ready_seconds": 1, "run_seconds": 1},
    "multilora": {"proof_tokens": 1, "max_loras": 1, "concurrency": 1, "requests": 1, "output_tokens": 1, "seed": 0,
                  "ready_seconds": 1, "client_seconds": 1},
    "speedups": {"answers": 1, "max_new_tokens": 1, "top_k": 0, "warmup": 0, "lookup_tokens": 1, "batch_prompts": 1,
                 "batch_size": 1, "batch_repeats": 1, "vllm_kv_cache_mib": 0, "max_model_len": 1, "seed": 0,
                 "run_seconds": 1},
    "streaming": {"max_new_tokens": 1, "repeats": 1, "bls_requests": 1, "bls_tokens": 1, "seed": 0,
                  "ready_seconds": 1, "client_seconds": 1},
    "style": {"prompts": 0, "max_new_tokens": 1, "batch": 1, "bootstrap_samples": 100, "seed": 0},
}  # fmt: skip
# (section, key, wrong value, what the line says of it)
WRONG = [
    (section, key, least - 1, f"use {least} or more") for section in LEAST for key, least in LEAST[section].items()
]
WRONG += [
    ("claims", "tolerance", -0.1, "use a share from 0, below 1"),
    ("claims", "tolerance", 1.0, "use a share from 0, below 1"),
    ("multilora", "adapters", ["1"], "use growing numbers from 1"),
    ("multilora", "adapters", [0, 1], "use growing numbers from 1"),
    ("speedups", "temperature", 0.0, "use a number above 0"),
    ("speedups", "repetition_penalty", 0.0, "use a number above 0"),
    ("speedups", "top_p", 0.0, "use a share above 0, at most 1"),
    ("speedups", "top_p", 1.5, "use a share above 0, at most 1"),
]


def section(name, **changes):
    return SECTIONS[name](**load_yaml(REPO / "params.yaml")[name] | changes)


@pytest.mark.parametrize(("name", "key", "value", "advice"), WRONG)
def test_a_number_out_of_bounds_is_one_line(name, key, value, advice):
    with pytest.raises(UserError) as error:
        section(name, **{key: value})
    assert str(error.value) == f"params.yaml: {name}.{key} is {value}; {advice}"


@pytest.mark.parametrize("name", LEAST)
def test_the_least_values_are_taken(name):
    assert section(name, **LEAST[name])


@pytest.mark.parametrize("name", LEAST)
def test_every_whole_number_has_a_bound(name):
    whole = {key for key, value in load_yaml(REPO / "params.yaml")[name].items() if type(value) is int}
    assert whole == LEAST[name].keys()
