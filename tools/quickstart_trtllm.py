"""
The quick start for Llama 2 on this checkout's base model, its four steps: build, run, serve, curl:
python -m tools.quickstart_trtllm

in:   params.yaml (profile, bench.ready_seconds, bench.server_options), results/<profile>/base_model,
      results/<profile>/dataset/metrics.json, results/<profile>/repository/base, and with TensorRT-LLM
      results/<profile>/engine
The writeup compiles Llama-2-7b-chat; docs/llama2-triton.md has the settings that do the same, and its commands beside
today's. Where a stand-in sits in TensorRT-LLM's place there is no engine to build or to run.
"""

import shlex
import subprocess
from pathlib import Path

from lib.core.stage import UserError, flags, load_yaml, read_json, results, run
from lib.serving.answers import URL
from lib.serving.process import serving
from lib.text.templates import prompt_text
from tools.quickstart_vllm import curl
from tools.serve import built

QUESTION = "How do I count to nine in French?"
TOKENS = 100
GENERATE = f"{URL}/v2/models/ensemble/generate"
RUN = "/app/examples/run.py"


def run_command(engine, tokenizer, gpus):
    """The words of TensorRT-LLM's own run.py, which needs no server; a process a GPU."""
    words = flags({"engine_dir": engine, "max_output_len": TOKENS, "tokenizer_dir": tokenizer, "input_text": QUESTION})
    return [*(["mpirun", "--allow-run-as-root", "-n", str(gpus)] if gpus > 1 else []), "python3", RUN, *words]


def bodies(template, system_prompt):
    """{why: body} of the requests: the writeup's, that in today's form, and one that a chat model expects."""
    words = {"max_tokens": TOKENS, "bad_words": "", "stop_words": ""}
    nested = {"max_tokens": TOKENS, "bad_words": [""], "stop_words": [""]}
    asked = prompt_text(template, system_prompt, QUESTION)
    return {
        "as the writeup sends it": {"text_input": QUESTION, "parameters": nested},
        "with the inputs where Triton documents them": {"text_input": QUESTION, **words},
        f"in the template that this model was trained with ({template})": {"text_input": asked, **words},
    }


def show(words):
    print(f"$ {shlex.join(map(str, words))}", flush=True)


def engine_steps(repository, image):
    """Steps 1 and 2 with a real engine: the commands that built it, and run.py for one answer."""
    variant = results("engine") / repository["engine_variant"]
    for words in read_json(variant / "engine.json")["commands"]:
        show(words)
    print("2. run", flush=True)
    model, gpus = (results("base_model") / "model").resolve(), repository["world_size"]
    words = run_command((variant / "engine").resolve(), model, gpus)
    show(words)
    if code := subprocess.run(["containers/run", image, *map(str, words)]).returncode:
        raise UserError(f"run.py failed (exit code {code}); its own words are above")


def main():
    server = built("triton", "none")
    params = load_yaml("params.yaml")
    image = load_yaml("containers/images.yaml")["images"]["triton"]
    template = read_json(results("dataset") / "metrics.json")
    repository = server.built
    print(f"1. build: {repository['engine']}, base model {params['base_model']['name']}", flush=True)
    if repository["engine_is_stand_in"]:
        print(f"a stand-in for {repository['stands_in_for']}: no engine to build\n2. run: none, for the same reason")
    else:
        engine_steps(repository, image)
    print("3. serve", flush=True)
    command = server.command(params["bench"]["server_options"])
    show(command)
    log = Path(".work") / params["profile"] / "quickstart-triton.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    command = ["containers/run", image, *command]
    with serving(server, command, log, params["bench"]["ready_seconds"], "bench.ready_seconds") as (_, seconds):
        print(f"{server.engine()[0]} is ready after {seconds:.0f} s\n4. curl", flush=True)
        for why, body in bodies(template["template"], template["system_prompt"]).items():
            print(f"\n{why}:", flush=True)
            curl(GENERATE, body)


if __name__ == "__main__":
    run(main)
