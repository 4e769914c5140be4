"""
Did each request get its own adapter (stages/multilora.py)? The writeup's six prompts at once with its ids -1 0 1 -1 0 1
(none, lora, qlora), greedy; then each alone.

"float32": no rounding decides between two tokens; "batch-invariant": vLLM computes a request alike in every batch (on a
GPU, where its LoRA kernels take no float32); "served": as the server is otherwise, where the other requests of a batch
may change the last bits, and with them a greedy answer.
"""

from dataclasses import dataclass
from pathlib import Path

from lib.core.stage import read_json, write_json
from lib.serving.process import run_client
from lib.serving.servers import ADAPTERS
from lib.streaming.http import Request
from lib.streaming.load import in_template, load

PROOF = [None, *ADAPTERS]  # the writeup's task ids -1, 0, 1


@dataclass
class AskedModel:
    """The served model's folder, and the folder of the dataset whose template its prompts have."""

    model: Path
    dataset: Path


class Asking:
    """A server that runs, the client environment that asks it, and the folder for what is asked and answered."""

    def __init__(self, p, inputs, image, process, out):
        self.p, self.inputs, self.image, self.process, self.out = p, inputs, image, process, out

    def client(self, name, *words):
        command = ["containers/run", self.image, "python3", *(str(word) for word in words)]
        log = self.out / f"{name}.log"
        run_client(name, command, log, self.process, self.p.client_seconds, "multilora.client_seconds")

    def ask(self, name, loads):
        """The answers to each load, by stages/workers/stream_client.py."""
        write_json(self.out / f"{name}.ask.json", loads)
        answers = self.out / f"{name}.told.json"
        self.client(name, "-m", "stages.workers.stream_client", self.out / f"{name}.ask.json", answers)
        return read_json(answers)


def proof(p, asking, precision, client, url, adapters):
    """Six requests at once, then each alone; in the template that the adapters were trained with."""
    prompts = [in_template(text, asking.inputs.dataset) for text in read_json(p.prompts)]
    asked = [
        Request(prompt, PROOF[number % len(PROOF)], p.proof_tokens, 0, 0.0, 1.0, p.seed)
        for number, prompt in enumerate(prompts)
    ]
    # Once to warm up: the first request of an adapter brings it into the engine.
    loads = [load(client, url, asking.inputs.model, asked, width, adapters=adapters) for width in (1, len(asked), 1)]
    _, together, alone = asking.ask(f"proof-{precision}", loads)
    rows = [
        {"prompt": request.prompt, "adapter": request.adapter, "together": both["text"], "alone": single["text"]}
        for request, both, single in zip(asked, together["answers"], alone["answers"], strict=True)
    ]
    return {"rows": rows, "together_seconds": together["wall_seconds"], "alone_seconds": alone["wall_seconds"],
            **compare_answers(rows)}  # fmt: skip


def compare_answers(rows):
    """How many answers are the ones that their adapter gives alone; how many of an adapter are not the base model's;
    and how many different answers the prompts have, over all adapters."""
    base = {row["prompt"]: row["alone"] for row in rows if row["adapter"] is None}
    adapted = [row for row in rows if row["adapter"]]
    return {
        "requests": len(rows),
        "same_as_alone": sum(row["together"] == row["alone"] for row in rows),
        "different_answers": len({(row["prompt"], row["together"]) for row in rows}),
        "with_an_adapter": len(adapted),
        "other_than_adapter_off": sum(row["together"] != base[row["prompt"]] for row in adapted),
    }


def format_proof(proof):
    """A proof in one line."""
    if "not_measured" in proof:
        return f"not measured: {proof['not_measured']}"
    alone = f"{proof['same_as_alone']} of {proof['requests']} answers given at once are those of their adapter alone"
    return (
        f"{alone}; {proof['other_than_adapter_off']} of {proof['with_an_adapter']} differ from the adapter switched off"
    )
