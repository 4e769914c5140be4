"""
The vLLM guide's three examples on this checkout's base model: one prompt, a list of prompts, and the OpenAI server with
a completions request: python -m tools.quickstart_vllm

in:   params.yaml (profile, bench.server_options), results/<profile>/base_model/model
The guide's code runs gpt2-xl and bloomz-560m; its calls are the same today. `--offline` is the part inside vLLM's
environment.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from lib.core.stage import UserError, load_yaml, results, run
from lib.serving.answers import URL
from lib.serving.process import serving
from lib.serving.servers import Inputs, Vllm
from lib.streaming.http import post

SAMPLING = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 50, "seed": 42}  # the guide's; it sets no seed
ONE = "Machine Learning is"
LIST = ["What is Quantum Computing?", "How is an Electron different from a Proton?", "What is Machine Learning?"]


def offline(model):
    """vLLM as a library: LLM.generate, timed as the guide times it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU: else it takes a share of the whole memory
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}  # its processes warn of what a CPU lacks
    from vllm import LLM, SamplingParams

    begun = time.monotonic()
    llm = LLM(model=str(model), enforce_eager=True, max_model_len=512)
    print(f"loaded in {time.monotonic() - begun:.1f} s", flush=True)
    for prompts in ([ONE], LIST):
        begun = time.monotonic()
        answers = llm.generate(prompts, SamplingParams(**SAMPLING), use_tqdm=False)
        seconds = time.monotonic() - begun
        for answer in answers:
            print(f"> {answer.prompt}\n{answer.outputs[0].text.strip()}\n")
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        print(
            f"{len(prompts)} answered in {seconds:.2f} s: {tokens} tokens, {tokens / seconds:.1f} tokens/s\n",
            flush=True,
        )


def online(image, options, ready_seconds, log):
    """vLLM as a server: the request of the guide, as curl would send it."""
    server = Vllm("base", Inputs(results("base_model")))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    command = ["containers/run", image, *server.command(options)]
    with serving(server, command, log, ready_seconds, "bench.ready_seconds") as (_, seconds):
        print(f"{server.engine()[0]} is ready after {seconds:.0f} s", flush=True)
        curl(f"{URL}/v1/completions", {"model": "base", "prompt": ONE, **SAMPLING})


def curl(url, body):
    """Show a request as the curl that sends it, and the answer."""
    print(f"$ curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}", flush=True)
    with post(url, body) as response:
        print(json.dumps(json.load(response), indent=2, ensure_ascii=False), flush=True)


def main():
    model = results("base_model") / "model"
    if sys.argv[1:] == ["--offline"]:
        offline(model)
        return
    if not (model / "config.json").exists():
        raise UserError(f"{model}: there is no model; `containers/run venv:tools dvc repro base_model` makes it")
    params = load_yaml("params.yaml")
    image = load_yaml("containers/images.yaml")["images"]["vllm"]
    print("1. and 2. offline: one prompt, then a list", flush=True)
    if subprocess.run(["containers/run", image, "python3", "-m", "tools.quickstart_vllm", "--offline"]).returncode:
        raise UserError("vLLM failed offline; its own words are above")
    print("3. the server with the OpenAI protocol", flush=True)
    bench = params["bench"]
    online(image, bench["server_options"], bench["ready_seconds"], Path(".work") / params["profile"] / "quickstart.log")


if __name__ == "__main__":
    run(main)
