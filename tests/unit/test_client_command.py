"""genai-perf's command line for each server and variant."""

from pathlib import Path

from bench_inputs import PARAMS
from conftest import every_input

from lib.bench.experiments import Bench, Point
from lib.bench.inputs import load_of
from lib.serving import servers
from lib.serving.clients import GenaiPerf


def client_command(p, server, point, work):
    return GenaiPerf().command(load_of(p, server, point, work))


def test_triton_gets_a_pinned_length_and_an_adapter(embedded):
    command = client_command(
        Bench(**PARAMS), servers.Triton("lora", every_input()), Point("triton", 64, 32, 4, "corrected", 1), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model ensemble --url 127.0.0.1:8001 --endpoint-type kserve --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 4 --request-count 16 "
        "--input-file W/prompts-64.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 "
        "--extra-inputs min_tokens:32 --extra-inputs lora_task_id:1 --random-seed 42 "
        "--artifact-dir W/raw/triton-64-32-c4-corrected-r1 --backend tensorrtllm --warmup-request-count 8"
    )


def test_vllm_gets_the_same_prompts_and_the_adapter_by_name(embedded):
    command = client_command(
        Bench(**PARAMS), servers.Vllm("lora", every_input()), Point("vllm", 64, 32, 1, "corrected", 2), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model lora --url http://127.0.0.1:8000 --endpoint-type completions --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 1 --request-count 8 "
        "--input-file W/prompts-64.jsonl --output-tokens-mean 32 --output-tokens-stddev 0 "
        "--extra-inputs ignore_eos:true --extra-inputs min_tokens:32 --extra-inputs temperature:0 --random-seed 42 "
        "--artifact-dir W/raw/vllm-64-32-c1-corrected-r2 --warmup-request-count 2"
    )


def test_the_writeups_client_chats_with_prompts_of_its_own(embedded):
    changes = {"pinned": False, "endpoint": "chat", "prompts": "synthetic", "warmup_requests": 0}
    p = Bench(**PARAMS | changes | {"min_requests": 10, "requests_per_stream": 2})
    command = client_command(
        p, servers.Vllm("base", every_input()), Point("vllm", 512, 256, 16, "corrected", 1), Path("W")
    )
    assert " ".join(command) == (
        "genai-perf profile --model base --url http://127.0.0.1:8000 --endpoint-type chat --streaming "
        "--tokenizer results/embedded/base_model/model --concurrency 16 --request-count 32 --output-tokens-mean 256 "
        "--extra-inputs temperature:0 --random-seed 42 --artifact-dir W/raw/vllm-512-256-c16-corrected-r1 "
        "--synthetic-input-tokens-mean 512 --synthetic-input-tokens-stddev 0"
    )
