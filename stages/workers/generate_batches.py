"""
Many prompts answered by one system as fast as it can, inside the environment that has it:
python -m stages.workers.generate_batches TASK.json RESULT.json

Prompts and answer lengths are those of the dataset's held-out rows: every system gets the same token ids, and gives
each answer exactly the length of that row's own. All prompts are there from the start; at most `batch_size` are worked
on at a time. What counts is the asked tokens over the time until the last answer is there.

  one         Transformers, one prompt after the other
  static      Transformers, batches of batch_size in the order of the rows: a batch ends with its longest answer
  continuous  Transformers' own continuous batching: a finished answer makes room for the next prompt
  vllm        vLLM
"""

import hashlib
import json
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, run
from stages.workers.generate_one import leave_a_core, sampling_memory, tree_cpu_seconds, vllm_engine

PAGE_TOKENS = 128  # of Transformers' paged cache


def read_load(task):
    """[(prompt's token ids, tokens to make)] of the first held-out rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    rows = [json.loads(line) for line in Path(task["rows"]).read_text().splitlines()][: task["batch_prompts"]]
    if len(rows) < task["batch_prompts"]:
        raise UserError(f"{task['rows']} has {len(rows)} rows; lower speedups.batch_prompts ({task['batch_prompts']})")

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [(ids(row["prompt"]), len(ids(row["completion"]))) for row in rows]


def transformers_model(task):
    import torch
    from transformers import AutoModelForCausalLM

    leave_a_core()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=torch.bfloat16, attn_implementation="sdpa", device_map=where
    ).eval()


def in_batches(size):
    """A system that takes `size` prompts at a time: padded on the left, to the length of the longest answer."""

    def prepare(task):
        import torch

        model = transformers_model(task)

        def answer(load):
            tokens = 0
            for start in range(0, len(load), size):
                batch = load[start : start + size]
                width, longest = max(len(ids) for ids, _ in batch), max(length for _, length in batch)
                padded = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch], device=model.device)
                mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch]).to(model.device)
                with torch.no_grad():
                    model.generate(
                        padded, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=longest,
                        min_new_tokens=longest,
                    )  # fmt: skip
                tokens += longest * len(batch)
            return tokens

        return answer

    return prepare


@contextmanager
def continuous(task):
    """Transformers' manager, with a cache that holds batch_size sequences, so that none is put off for want of room;
    it is stopped at the end, for its thread would keep the process alive."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model, size = transformers_model(task), task["batch_size"]
    longest = max(len(ids) + length for ids, length in read_load(task))
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=size * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(512, size),
            max_requests_per_batch=size,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        ),
    )
    manager.start()

    def answer(load):
        for ids, length in load:
            manager.add_request(ids, max_new_tokens=length)
        tokens, finished = 0, 0
        while finished < len(load):
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise UserError("Transformers' continuous batching stopped; its log says why")
            elif output.is_finished():
                tokens, finished = tokens + len(output.generated_tokens), finished + 1
        return tokens

    try:
        yield answer
    finally:
        manager.stop(block=True, hard_stop=True)


def vllm(task):
    from vllm import SamplingParams

    llm = vllm_engine(task, "bfloat16", max_num_seqs=task["batch_size"], enable_prefix_caching=False)

    def answer(load):
        sampling = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in load]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in load], sampling, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in outputs)

    return answer


def prepared(system, task):
    """A context whose value answers a load and returns how many tokens were computed for it."""
    if system == "continuous":
        return continuous(task)
    kinds = {"one": in_batches(1), "static": in_batches(task["batch_size"]), "vllm": vllm}
    return nullcontext(kinds[system](task))


def main():
    if len(sys.argv) != 3:
        raise UserError("usage: python -m stages.workers.generate_batches TASK.json RESULT.json")
    task, out = read_json(sys.argv[1]), Path(sys.argv[2])
    load, repeats = read_load(task), []
    asked = sum(length for _, length in load)
    lines = out.with_suffix(".answers")
    lines.write_text("")
    begun = time.monotonic()
    with sampling_memory() as sampler, prepared(task["system"], task) as answer:
        sampler.mark("load")
        answer(load[: task["batch_size"]])  # not counted
        for _ in range(task["batch_repeats"]):
            started, busy = time.monotonic(), tree_cpu_seconds()
            tokens = answer(load)
            seconds, busy = time.monotonic() - started, tree_cpu_seconds() - busy
            repeats.append({"seconds": seconds, "tokens": asked, "computed_tokens": tokens, "cpu_seconds": busy})
            with lines.open("a") as file:
                file.write(json.dumps(repeats[-1]) + "\n")
        sampler.mark("answers")
    write_metrics(
        out,
        {
            "system": task["system"],
            "prompts_sha256": hashlib.sha256(json.dumps(load).encode()).hexdigest(),
            "prompt_tokens": sum(len(ids) for ids, _ in load) / len(load),
            "output_tokens": [length for _, length in load],
            "wall_seconds": time.monotonic() - begun,
            "memory": sampler.summary(),
            "repeats": repeats,
        },
    )


if __name__ == "__main__":
    run(main)
