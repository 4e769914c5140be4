"""
Answers to one prompt, one after the other, by one method of stages/speedups.py, inside the environment that has it:
python -m stages.workers.generate_one TASK.json RESULT.json

A task is what Speedups.task() makes. Beside RESULT.json stands RESULT.answers, a line an answer as it comes.

The variant `published` does what the writeup's code does, in the words of today's versions: to_bettertransformer() is
gone in transformers 5 and torch.backends.cuda.sdp_kernel deprecated; attn_implementation="sdpa" under
torch.nn.attention.sdpa_kernel takes their place. The variant `corrected` gives every method the same: a KV cache, the
same length, the same 16-bit type, and a warm-up that is not counted.
"""

import dataclasses
import json
import os
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, run
from lib.speedups.methods import METHODS
from lib.training.memory import MemorySampler


class FirstToken:
    """A streamer for generate(): when the first token after the prompt came."""

    def __init__(self):
        self.puts, self.at = 0, None

    def put(self, tokens):
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.at = time.monotonic()

    def end(self):
        pass


def leave_a_core():
    """As vLLM's CPU build: one core is left to all else. With none left, every step waits for the thread that another
    process has pushed aside."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


def load(task, method):
    """The Transformers model, on the GPU where there is one; weights in 16 bits, or quantised by bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    }.get(method.weights)
    return AutoModelForCausalLM.from_pretrained(
        task["model"],
        dtype=torch.bfloat16,
        attn_implementation=method.attention,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        quantization_config=quantised,
    ).eval()


def generate_options(task, method):
    """The keywords of generate(): the writeup's sampling, and what the method and the variant add."""
    options = {**task["sampling"], "do_sample": True, "max_new_tokens": task["max_new_tokens"], "use_cache": False}
    if task["variant"] == "published":
        return options
    options |= {"use_cache": True, "min_new_tokens": task["max_new_tokens"]}
    if method.lookup:
        options["prompt_lookup_num_tokens"] = task["lookup_tokens"]
    if method.static or method.compile:
        options["cache_implementation"] = "static"
    if method.compile:
        from transformers import CompileConfig

        options["compile_config"] = CompileConfig(mode="reduce-overhead", fullgraph=False)
        options["compile_config"]._compile_all_devices = True  # else generate() compiles on a GPU only
    else:
        options["disable_compile"] = True  # a static cache alone would have generate() compile on a GPU
    return options


def kernels(task, method):
    """The kernels that SDPA may choose from: a GPU's flash kernel does not take the mask of a static cache."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not method.flash_only:
        return nullcontext()
    masked = method.compile and task["variant"] == "corrected"
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION] + [SDPBackend.EFFICIENT_ATTENTION] * masked)


def by_transformers(task, note, sampler):
    """Every answer of a Transformers method through note(); returns further facts."""
    import torch
    from transformers import AutoTokenizer, set_seed

    method = METHODS[task["method"]]
    leave_a_core()
    model = load(task, method)
    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    ids = tokenizer.encode(task["prompt"], add_special_tokens=False, return_tensors="pt").to(model.device)
    if method.compile and task["variant"] == "published":
        model = torch.compile(model)  # the writeup's line; see compiled_graphs in the result
    options = generate_options(task, method) | {"pad_token_id": tokenizer.pad_token_id}
    sampler.mark("load")
    set_seed(task["seed"])
    with kernels(task, method), torch.no_grad():
        for number in range(-task["warmup"], task["answers"]):
            first, busy, begun = FirstToken(), tree_cpu_seconds(), time.monotonic()
            output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=first, **options)
            seconds = time.monotonic() - begun
            note(number, output.shape[1] - ids.shape[1], seconds, first.at - begun, busy)
    return {
        "prompt_tokens": ids.shape[1],
        "dtype": "bfloat16",
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def vllm_engine(task, dtype, **options):
    """vLLM as a library, its engine in this process, so that what this process holds is what it takes."""
    # On a CPU its processes warn of what is missing there; on a GPU its own default is what counts.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONWARNINGS": "ignore"}
    from vllm import LLM

    if task["vllm_kv_cache_mib"]:
        options["kv_cache_memory_bytes"] = task["vllm_kv_cache_mib"] * 2**20
    return LLM(
        model=task["model"],
        tokenizer=task["tokenizer"],
        dtype=dtype,
        seed=task["seed"],
        max_model_len=task["max_model_len"],
        enforce_eager=task["vllm_enforce_eager"],
        disable_log_stats=False,  # else it keeps no times of a request
        **options,
    )


def by_vllm(task, note, sampler):
    """The same with vLLM; `published` as the writeup calls it: float16, no length, no repetition penalty."""
    from vllm import SamplingParams

    published = task["variant"] == "published"
    dtype = "float16" if published else "bfloat16"
    llm = vllm_engine(task, dtype)
    ids = llm.get_tokenizer().encode(task["prompt"], add_special_tokens=False)
    sampling = dict(task["sampling"])
    if published:
        del sampling["repetition_penalty"]
    else:
        sampling |= {"max_tokens": task["max_new_tokens"], "ignore_eos": True}
    sampler.mark("load")
    for number in range(-task["warmup"], task["answers"]):
        busy, begun = tree_cpu_seconds(), time.monotonic()
        (answer,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(**sampling), use_tqdm=False)
        seconds = time.monotonic() - begun
        first = getattr(answer.metrics, "first_token_latency", None)
        note(number, len(answer.outputs[0].token_ids), seconds, first, busy)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "prompt_tokens": len(ids),
        "dtype": dtype,
        "compiled_graphs": None,
        "kv_cache": {
            "bytes": cache.kv_cache_memory_bytes,
            "blocks": cache.num_gpu_blocks,
            "block_tokens": cache.block_size,
        },
    }


def tree(read):
    """The sum of read(process) over this process and all that it started: vLLM computes in a child on a CPU."""
    import psutil

    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += read(process)
    return total


def tree_mib():
    """Resident memory, in MiB."""
    return tree(lambda process: process.memory_info().rss) / 2**20


def tree_cpu_seconds():
    """CPU time so far: beside the wall time it tells whether others were at work on the machine."""
    return tree(lambda process: sum(process.cpu_times()[:2]))


def sampling_memory():
    """A MemorySampler of the whole process tree."""
    sampler = MemorySampler()
    if not sampler.on_gpu:
        sampler.read = tree_mib
    return sampler


def answer(task, out):
    """Run a task to its end; writes RESULT.answers as it goes. The whole result without what made it."""
    lines, warmups, answers = out.with_suffix(".answers"), [], []
    lines.write_text("")

    def note(number, tokens, seconds, first, busy):
        used = tree_cpu_seconds() - busy
        entry = {"tokens": tokens, "seconds": seconds, "ttft_seconds": first, "cpu_seconds": used}
        (warmups if number < 0 else answers).append(entry)
        with lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    begun = time.monotonic()
    with sampling_memory() as sampler:
        facts = (by_vllm if task["method"] == "vllm" else by_transformers)(task, note, sampler)
        sampler.mark("answers")
    seconds = time.monotonic() - begun
    return {**facts, "wall_seconds": seconds, "memory": sampler.summary(), "warmups": warmups, "answers": answers}


def main():
    if len(sys.argv) != 3:
        raise UserError("usage: python -m stages.workers.generate_one TASK.json RESULT.json")
    task, out = read_json(sys.argv[1]), Path(sys.argv[2])
    says = dataclasses.asdict(METHODS[task["method"]])["says"]
    write_metrics(out, {"method": task["method"], "variant": task["variant"], "says": says, **answer(task, out)})


if __name__ == "__main__":
    run(main)
