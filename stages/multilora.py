"""
Several LoRA adapters on one base model: python -m stages.multilora SERVER SERVER_IMAGE CLIENT_IMAGE

in:   data/multilora_prompts.json, results/<profile>/base_model, results/<profile>/dataset/metrics.json,
      results/<profile>/machine/machine.json, results/<profile>/finetune,
      for triton results/<profile>/repository/lora
out:  results/<profile>/multilora/SERVER/multilora.json   proof: did each request get its own adapter?
                                                          points: speed and memory by adapters, rank and popularity
      results/<profile>/multilora/SERVER/raw/             what was asked and answered, the servers' logs

The proof: the writeup's six prompts at once with its ids -1 0 1 -1 0 1 (none, lora, qlora), greedy; then each alone.
"float32": no rounding decides between two tokens; "served": in the precision that the server has otherwise, where the
other requests of a batch may change the last bits, and with them a greedy answer.
The study, vLLM only: adapters with random weights, loaded while the server runs. "none" is a server without LoRA: what
merged weights cost, for they have the base's shapes. "unused" is a server with LoRA whose requests name no adapter.
"""

import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from stages.dataset import read_rows
from stages.repository import TASKS
from stages.servers import ADAPTERS, SERVERS, URL
from stages.serving import run_client, serving, session
from stages.stage import UserError, flags, read_json, read_params, results, run, write_json, write_metrics
from stages.streams import Request, post
from stages.studies import begin, in_template, load, write_not_measured

PROOF = [None, *ADAPTERS]  # the writeup's task ids -1, 0, 1
POPULARITY = {"uniform": lambda rank: 1.0, "skewed": lambda rank: 1.0 / rank}  # skewed: Zipf's law


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


# The study.


def questions(p):
    """Prompts of the dataset, as many as a point asks."""
    rows = read_rows(p.questions)
    return [in_template(rows[number % len(rows)]["instruction"]) for number in range(p.requests + p.concurrency)]


def drawn(names, popularity, count, seed):
    """Which adapter each of `count` requests names, by popularity; the first name is the most popular."""
    weights = [POPULARITY[popularity](rank) for rank in range(1, len(names) + 1)]
    return random.Random(seed).choices(names, weights, k=count)


def point(p, asking, name, names, popularity):
    """One load on the running server; names: the adapters there are, empty for the base model alone."""
    texts = questions(p)
    chosen = drawn(names, popularity, len(texts), p.seed) if names else [None] * len(texts)
    asked = [
        Request(text, adapter, p.output_tokens, p.output_tokens, 0.0, 1.0, p.seed)
        for text, adapter in zip(texts, chosen, strict=True)
    ]
    warm, measured = asked[: p.concurrency], asked[p.concurrency :]
    # Every adapter once before: bringing it in is no part of the speed.
    first = {one.adapter: one for one in measured}.values()
    loads = [load("vllm", URL, each, p.concurrency) for each in ([*first, *warm], measured)]
    told = asking.ask(name, loads)[1]
    firsts = [1000 * one["ttft_seconds"] for one in told["answers"]]
    made = sum(one["tokens"] for one in told["answers"])
    return {
        "requests": len(measured),
        "adapters_asked_for": len({one.adapter for one in measured} - {None}),
        "output_tokens": made / len(measured),
        "output_tokens_per_second": made / told["wall_seconds"],
        "ttft_ms_p50": statistics.median(firsts),
        "ttft_ms_max": max(firsts),
        **memory(asking.process),
    }


def memory(process):
    """MiB that the server's processes hold (no figure where they run in a container), and what the GPUs hold in all."""
    import psutil

    resident = [psutil.Process(pid).memory_info().rss for pid in session(process)]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError):
        used = []
    gpu = sum(int(one) for one in used) if used and all(one.isdigit() for one in used) else None
    in_container = process.args[1].startswith("docker:")
    return {"resident_mib": None if in_container else sum(resident) / 2**20, "gpu_mib": gpu}


def load_adapter(name, folder):
    """Load an adapter into the running vLLM under a name; returns the seconds it took."""
    begun = time.monotonic()
    post(f"{URL}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}).close()
    return time.monotonic() - begun


def study_rank(p, asking, rank):
    """Points of one server with LoRA of this rank: unused, then more and more adapters, by each popularity."""
    random_ones = asking.out / f"adapters-{rank}"
    model = results("base_model") / "model"
    words = [model, random_ones, max(p.adapters), rank, p.seed, *p.target_modules]
    asking.client(f"random-{rank}", "containers/client/random_lora.py", *words)
    bytes_each = (random_ones / "0" / "adapter_model.safetensors").stat().st_size
    same = {"rank": rank, "slots": p.slots, "adapter_bytes": bytes_each}
    points = [{"arm": "unused", "adapters": 0, "popularity": None, **same, "load_seconds": None,
               **point(p, asking, f"unused-{rank}", [], None)}]  # fmt: skip
    loaded, names = [], []
    for count in p.adapters:
        for number in range(len(names), count):
            loaded.append(load_adapter(f"random-{number}", random_ones / str(number)))
            names.append(f"random-{number}")
        for popularity in p.popularity if count > 1 else p.popularity[:1]:
            found = point(p, asking, f"{popularity}-{count}-{rank}", names, popularity)
            points.append({"arm": "adapters", "adapters": count, "popularity": popularity, **same,
                           "load_seconds": statistics.median(loaded), **found})  # fmt: skip
            print(f"multilora: {told(points[-1])}", flush=True)
    shutil.rmtree(random_ones)  # the seed makes them again
    return points


def told(one):
    who = f"{one['adapters']} adapters of rank {one['rank']}, {one['popularity']}" if one["adapters"] else one["arm"]
    return f"{who}: {one['output_tokens_per_second']:.1f} tokens/s, first token after {one['ttft_ms_p50']:.0f} ms"


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
    slots, kept = max(p.slots, len(ADAPTERS)), max(p.adapters) + len(ADAPTERS)
    words = flags({"enable-lora": True, "max-lora-rank": rank, "max-loras": slots, "max-cpu-loras": kept})
    return [*plain, *words, *options]


def measure_vllm(p, images, out):
    """A server without LoRA, one in float32 for the proof, then one for each rank; the first of these proves too."""
    server = SERVERS["vllm"]("base")
    plain = server.command(p.server_options)

    start = ["containers/run", images[0]]
    updating = [*start, "env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]  # adapters are loaded while it runs
    runs = {"none": [*start, *plain], "float32": updating + with_lora(p, plain, p.ranks[0], "--dtype", "float32")}
    runs |= {rank: updating + with_lora(p, plain, rank) for rank in p.ranks}
    found = {"proof": {}, "points": []}
    for name, command in runs.items():
        with serving(server, command, out / "raw" / f"server-{name}.log", p.ready_seconds) as (process, ready):
            asking = Asking(p, images[1], process, out)
            found["engine"], found["engine_is_stand_in"] = server.engine()
            print(f"multilora: {found['engine']}, LoRA {name}, is ready after {ready:.0f} s", flush=True)
            if name == "none":
                none = {"arm": "none", "adapters": 0, "popularity": None, "rank": None, "slots": 0,
                        "adapter_bytes": None, "load_seconds": None}  # fmt: skip
                found["points"].append(none | point(p, asking, "none", [], None))
            if name in ("float32", p.ranks[0]):
                for adapter in ADAPTERS:
                    load_adapter(adapter, results("finetune") / adapter / "adapter")
                precision = "float32" if name == "float32" else "served"
                found["proof"][precision] = proof(p, asking, precision, "vllm", URL, {})
            if name in p.ranks:
                found["points"] += study_rank(p, asking, name)
    return {**found, "server_command": runs[p.ranks[0]]}


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
        alone = (
            f"{shown['same_as_alone']} of {shown['requests']} answers given at once are those of their adapter alone"
        )
        off = f"{shown['other_than_adapter_off']} of {shown['with_an_adapter']} differ from the adapter switched off"
        print(f"multilora, {precision}: {alone}; {off}")


if __name__ == "__main__":
    run(main)
