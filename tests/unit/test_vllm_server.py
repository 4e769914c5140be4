"""vLLM's counters, its adapters and the formats of its weights."""

import shutil

import pytest
from conftest import every_input

from lib.bench import metrics
from lib.core.stage import UserError
from lib.serving import answers, servers

VLLM_METRICS = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="base"} 94.0
vllm:generation_tokens_created{engine="0",model_name="base"} 1.7952430471469536e+09
vllm:request_success_total{engine="0",finished_reason="stop",model_name="base"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="base"} 2.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="base"} 0.0
"""
TRITON_METRICS = """\
nv_llm_input_token_len_sum{model="tensorrt_llm",response_metric_type="total_input_tokens",version="1"} 60
nv_llm_output_token_len_sum{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"} 113
nv_llm_output_token_len_count{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"} 11
nv_llm_output_token_len_bucket{model="tensorrt_llm",version="1",le="10.0"} 4
"""


def test_the_tokens_a_server_made_are_read_from_its_metrics():
    assert answers.sums(VLLM_METRICS, servers.Vllm.counters) == {"output_tokens": 94.0, "requests": 3.0}
    counted = {"input_tokens": 60.0, "output_tokens": 113.0, "requests": 11.0}
    assert answers.sums(TRITON_METRICS, servers.Triton.counters) == counted


VLLM_GUESSING = """\
vllm:spec_decode_num_drafts_total{engine="0",model_name="base"} 13.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="base"} 46.0
vllm:spec_decode_num_draft_tokens_created{engine="0",model_name="base"} 1.7953661829967446e+09
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="base"} 43.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="base",position="0"} 13.0
"""


@pytest.mark.parametrize(
    ("text", "guessed", "right"),
    [
        (VLLM_GUESSING, 46, 43 / 46),
        (VLLM_GUESSING.replace(" 46.0", " 0.0").replace(" 43.0", " 0.0"), 0, None),
        (VLLM_METRICS, None, None),
    ],
)
def test_the_accepted_draft_tokens_are_read_from_the_server(text, guessed, right):
    counted = answers.sums(text, servers.Vllm.counters)
    assert metrics.guess_counts(counted) == {"guessed_tokens": guessed, "guessed_right": right}


def test_a_shape_is_served_out_of_a_folder_of_its_own(embedded):
    command = servers.Vllm("gpt-oss-20b:mxfp4", every_input()).command([])
    assert command[command.index("--model") + 1] == ".work/embedded/shapes/gpt-oss-20b-mxfp4"


@pytest.mark.parametrize(
    ("model", "options", "formats"),
    [
        ("base", [], ("bf16", "bf16")),
        ("llama-2-7b:int4-g128", [], ("int4-g128", "bf16")),
        ("llama-2-7b:bf16", ["--quantization=fp8", "--kv-cache-dtype=fp8"], ("fp8", "fp8")),
    ],
)
def test_a_point_knows_in_which_format_its_weights_are_served(embedded, model, options, formats):
    assert servers.Vllm(model, every_input()).formats(options) == formats


def test_vllm_serves_all_adapters_with_a_rank_that_it_accepts(embedded):
    command = servers.Vllm("lora", every_input()).command(["--enforce-eager"])
    assert " ".join(command) == (
        "python3 -m vllm.entrypoints.openai.api_server --model results/embedded/base_model/model "
        "--served-model-name base --host 127.0.0.1 --port 8000 --no-enable-prefix-caching --enable-lora "
        "--max-lora-rank 16 --max-loras 3 --lora-modules lora=results/embedded/finetune/lora/adapter "
        "qlora=results/embedded/finetune/qlora/adapter --enforce-eager"
    )
    assert "--enable-lora" not in servers.Vllm("base", every_input()).command([])


def test_a_missing_adapter_is_named_before_anything_starts(embedded):
    shutil.rmtree("results/embedded/finetune/lora")
    with pytest.raises(UserError, match="results/embedded/finetune/lora/adapter: no adapter there"):
        servers.Vllm("lora", every_input()).command([])
