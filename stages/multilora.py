"""
Several LoRA adapters on one base model: python -m stages.multilora SERVER SERVER_IMAGE CLIENT_IMAGE

in:   data/multilora_prompts.json, results/<profile>/base_model, results/<profile>/dataset/metrics.json,
      results/<profile>/machine/machine.json, results/<profile>/finetune,
      for triton results/<profile>/repository/lora
out:  results/<profile>/multilora/SERVER/multilora.json   proof: did each request get its own adapter?
                                                          points: speed and memory by adapters, rank and popularity
      results/<profile>/multilora/SERVER/raw/             what was asked and answered, the servers' logs

The proof: the writeup's six prompts at once with its ids -1 0 1 -1 0 1 (none, lora, qlora), greedy; then each alone.
"float32": no rounding decides between two tokens; "batch-invariant": vLLM computes a request alike in every batch (on a
GPU, where its LoRA kernels take no float32); "served": as the server is otherwise, where the other requests of a batch
may change the last bits, and with them a greedy answer.
The points, vLLM only: stages/multilora_points.py.
"""

import shutil
import sys
from dataclasses import dataclass

from stages.multilora_points import POPULARITY, load_adapter, point, study_rank
from stages.repository import TASKS
from stages.servers import ADAPTERS, SERVERS, URL
from stages.serving import run_client, serving
from stages.stage import UserError, flags, read_json, read_params, results, run, write_json, write_metrics
from stages.streams import Request
from stages.studies import begin, in_template, load, write_not_measured

PROOF = [None, *ADAPTERS]  # the writeup's task ids -1, 0, 1


@dataclass
class Multilora:
    servers: list
    prompts: str
    proof_tokens: int
    adapters: list
    ranks: list
    target_modules: list
    popularity: list
    max_loras: int
    questions: str
    concurrency: int
    requests: int
    output_tokens: int
    seed: int
    ready_seconds: int
    client_seconds: int
    server_options: list

    def __post_init__(self):
        if unknown := [name for name in self.servers if name not in ("triton", "vllm")]:
            raise UserError(f"params.yaml: multilora.servers has {unknown[0]!r}; use triton, vllm")
        if unknown := [name for name in self.popularity if name not in POPULARITY]:
            raise UserError(f"params.yaml: multilora.popularity has {unknown[0]!r}; use {', '.join(POPULARITY)}")
        if not self.adapters or self.adapters != sorted(set(self.adapters)) or self.adapters[0] < 1:
            raise UserError(f"params.yaml: multilora.adapters is {self.adapters}; use growing numbers from 1")
        if any(rank not in (8, 16, 32, 64, 128, 256) for rank in self.ranks):
            raise UserError(f"params.yaml: multilora.ranks is {self.ranks}; vLLM takes 8, 16, 32, 64, 128, 256")

    @property
    def slots(self):
        """How many adapters may be in one batch; the others wait in main memory."""
        return min(self.max_loras, max(self.adapters))


class Asking:
    """A server that runs, and the client environment that asks it."""

    def __init__(self, p, image, process, out):
        self.p, self.image, self.process, self.out = p, image, process, out / "raw"

    def client(self, name, *words):
        command = ["containers/run", self.image, "python3", *(str(word) for word in words)]
        run_client(name, command, self.out / f"{name}.log", self.process, self.p.client_seconds)

    def ask(self, name, loads):
        """What stages/streams.py gives of each load."""
        write_json(self.out / f"{name}.ask.json", loads)
        told = self.out / f"{name}.told.json"
        self.client(name, "-m", "stages.streams", self.out / f"{name}.ask.json", told)
        return read_json(told)


# The proof.


def proof(p, asking, precision, client, url, adapters):
    """Six requests at once, then each alone; in the template that the adapters were trained with."""
    prompts = [in_template(text) for text in read_json(p.prompts)]
    asked = [
        Request(prompt, PROOF[number % len(PROOF)], p.proof_tokens, 0, 0.0, 1.0, p.seed)
        for number, prompt in enumerate(prompts)
    ]
    # Once to warm up: the first request of an adapter brings it into the engine.
    loads = [load(client, url, asked, width, adapters=adapters) for width in (1, len(asked), 1)]
    _, together, alone = asking.ask(f"proof-{precision}", loads)
    rows = [
        {"prompt": one.prompt, "adapter": one.adapter, "together": both["text"], "alone": single["text"]}
        for one, both, single in zip(asked, together["answers"], alone["answers"], strict=True)
    ]
    return {"rows": rows, "together_seconds": together["wall_seconds"], "alone_seconds": alone["wall_seconds"],
            **compared(rows)}  # fmt: skip


def compared(rows):
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


# The servers.


def in_float32(out):
    """The command word of Triton's repository and the one of a copy whose base model is computed in float32."""
    served, copy = results("repository") / "lora", out / "float32" / "repository" / "lora"
    shutil.copytree(served, copy, ignore=shutil.ignore_patterns("__pycache__"))
    # Where the copy's relative paths look for it.
    model = out / "float32" / "base_model" / "model"
    model.mkdir(parents=True)
    for path in (results("base_model") / "model").iterdir():
        (model / path.name).symlink_to(path.resolve())
    config = read_json(model / "config.json")
    (model / "config.json").unlink()
    write_json(model / "config.json", {**config, "dtype": "float32"})
    return str(served / "models"), str(copy / "models")


def measure_triton(p, images, out):
    """The proof alone: this repository's adapters are fixed when Triton starts."""
    server = SERVERS["triton"]("lora")
    commands = {"served": ["containers/run", images[0], *server.command(p.server_options)]}
    if server.built["engine_is_stand_in"]:
        old, new = in_float32(out)
        commands["float32"] = [new if word == old else word for word in commands["served"]]
    found = {"proof": {}, "points": []}
    for precision, command in commands.items():
        with serving(server, command, out / "raw" / f"server-{precision}.log", p.ready_seconds) as (process, _):
            found["engine"], found["engine_is_stand_in"] = server.engine()
            tasks = {name: task for task, name in TASKS.items()}
            asking = Asking(p, images[1], process, out)
            found["proof"][precision] = proof(p, asking, precision, "triton-stream", "127.0.0.1:8001", tasks)
    shutil.rmtree(out / "float32", ignore_errors=True)
    return {**found, "server_command": commands["served"]}


def with_lora(p, plain, rank, *options):
    """The words of a vLLM that takes adapters of this rank, `plain` those of one without."""
    # One slot more than the proof's adapters: on a CPU, a request without adapter gets the one of the last slot when it
    # shares a batch with others (vllm-project/vllm pull request 48421, open); with an empty one it gets none.
    slots, kept = max(p.slots, len(ADAPTERS) + 1), max(p.adapters) + len(ADAPTERS)
    words = flags({"enable-lora": True, "max-lora-rank": rank, "max-loras": slots, "max-cpu-loras": kept})
    return [*plain, *words, *options]


def exactly(machine):
    """(precision, environment, further words) of a vLLM whose answers do not hang on the rest of the batch."""
    if machine["gpus"]:
        # One name until vLLM 0.11.0, the other since then.
        return "batch-invariant", ["VLLM_KERNEL_OVERRIDE_BATCH_INVARIANT=1", "VLLM_BATCH_INVARIANT=1"], []
    return "float32", [], ["--dtype", "float32"]


def measure_vllm(p, images, out):
    """A server without LoRA, one for each rank, the first of which proves too, and one for the exact proof; should that
    one fail, its reason stands in its place."""
    server = SERVERS["vllm"]("base")
    plain = server.command(p.server_options)
    exact, environment, words = exactly(read_json(results("machine") / "machine.json"))

    start = ["containers/run", images[0]]
    updating = [*start, "env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]  # adapters are loaded while it runs
    runs = {"none": [*start, *plain]}
    runs |= {rank: updating + with_lora(p, plain, rank) for rank in p.ranks}
    runs |= {exact: [*updating, *environment, *with_lora(p, plain, p.ranks[0], *words)]}
    found = {"proof": {}, "points": []}
    for name, command in runs.items():
        try:
            with serving(server, command, out / "raw" / f"server-{name}.log", p.ready_seconds) as (process, ready):
                found["engine"], found["engine_is_stand_in"] = server.engine()
                print(f"multilora: {found['engine']}, LoRA {name}, is ready after {ready:.0f} s", flush=True)
                measure_server(p, Asking(p, images[1], process, out), name, exact, found)
        except UserError as error:
            if name != exact:
                raise
            found["proof"][exact] = {"not_measured": str(error)}
    return {**found, "server_command": runs[p.ranks[0]]}


def measure_server(p, asking, name, exact, found):
    """Add to `found` what a running vLLM is there for: a rank's number, "none", or the name of the exact precision."""
    if name == "none":
        none = {"arm": "none", "adapters": 0, "popularity": None, "rank": None, "slots": 0,
                "adapter_bytes": None, "load_seconds": None}  # fmt: skip
        found["points"].append(none | point(p, asking, "none", [], None))
    if name in (exact, p.ranks[0]):
        for adapter in ADAPTERS:
            load_adapter(adapter, results("finetune") / adapter / "adapter")
        precision = exact if name == exact else "served"
        found["proof"][precision] = proof(p, asking, precision, "vllm", URL, {})
    if name in p.ranks:
        found["points"] += study_rank(p, asking, name)


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main():
    measures = {"triton": measure_triton, "vllm": measure_vllm}
    if len(sys.argv) != 4 or sys.argv[1] not in measures:
        raise UserError("usage: python -m stages.multilora triton|vllm SERVER_IMAGE CLIENT_IMAGE")
    kind, *images = sys.argv[1:]
    p = read_params(Multilora)
    out = results("multilora") / kind
    facts = {
        **begin(out),
        "base_model_bytes": bytes_of(results("base_model") / "model"),
        "trained_adapter_bytes": bytes_of(results("finetune") / ADAPTERS[0] / "adapter"),
        "not_measured": None,
    }
    reason = f"params.yaml: multilora.servers has no {kind}" if kind not in p.servers else None
    if reason:
        write_not_measured(out / "multilora.json", facts, reason)
        return
    found = measures[kind](p, images, out)
    write_metrics(out / "multilora.json", {**facts, **found})
    for precision, shown in found["proof"].items():
        print(f"multilora, {precision}: {said(shown)}")
    if failed := [precision for precision, shown in found["proof"].items() if "not_measured" in shown]:
        raise UserError(
            f"no proof in {failed[0]}; all else stands in {out / 'multilora.json'}; see {out / 'raw'}/*.log"
        )


def said(proof):
    """A proof in one line."""
    if "not_measured" in proof:
        return f"not measured: {proof['not_measured']}"
    alone = f"{proof['same_as_alone']} of {proof['requests']} answers given at once are those of their adapter alone"
    return (
        f"{alone}; {proof['other_than_adapter_off']} of {proof['with_an_adapter']} differ from the adapter switched off"
    )


if __name__ == "__main__":
    run(main)
