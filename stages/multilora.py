"""
Several LoRA adapters on one base model: python -m stages.multilora SERVER SERVER_IMAGE CLIENT_IMAGE

in:   data/multilora_prompts.json, results/<profile>/base_model, results/<profile>/dataset/metrics.json,
      results/<profile>/machine/machine.json, results/<profile>/finetune,
      for triton results/<profile>/repository/lora
out:  results/<profile>/multilora/SERVER/multilora.json   proof: did each request get its own adapter?
                                                          points: speed and memory by adapters, rank and popularity
      results/<profile>/multilora/SERVER/raw/             what was asked and answered, the servers' logs

The proof: lib/multilora/isolation.py. The points, vLLM only: lib/multilora/cost.py. A killed run
resumes with the vLLM that it had reached.
"""

import dataclasses
import shutil
import sys
from dataclasses import dataclass

from lib.core.graph import dependencies
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, fingerprint, flags, read_json, read_params, results, run, write_json
from lib.core.work import work_dir
from lib.multilora.cost import POPULARITY, load_adapter, point, study_rank
from lib.multilora.isolation import AskedModel, Asking, format_proof, proof
from lib.serving.answers import URL
from lib.serving.process import serving
from lib.serving.servers import ADAPTERS, SERVERS, Inputs
from lib.serving.vllm_options import max_lora_rank
from lib.streaming.load import begin, write_not_measured
from lib.trtllm.adapters import TASKS

READY = "multilora.ready_seconds"


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
        ones = (
            "proof_tokens",
            "max_loras",
            "concurrency",
            "requests",
            "output_tokens",
            "ready_seconds",
            "client_seconds",
        )
        check_bounds("multilora", self, dict.fromkeys(ones, 1) | {"seed": 0})
        numbers = all(type(count) is int for count in self.adapters)
        if not (numbers and self.adapters and self.adapters == sorted(set(self.adapters)) and self.adapters[0] > 0):
            raise UserError(f"params.yaml: multilora.adapters is {self.adapters}; use growing numbers from 1")
        if any(rank not in (8, 16, 32, 64, 128, 256) for rank in self.ranks):
            raise UserError(f"params.yaml: multilora.ranks is {self.ranks}; vLLM takes 8, 16, 32, 64, 128, 256")

    @property
    def slots(self):
        """How many adapters may be in one batch; the others wait in main memory."""
        return min(self.max_loras, max(self.adapters))


def inputs():
    return Inputs(results("base_model"), results("repository"), finetune=results("finetune"))


def asked_model():
    return AskedModel(results("base_model") / "model", results("dataset"))


# The servers.


def measure_triton(p, images, out):
    """The proof alone: this repository's adapters are fixed when Triton starts."""
    server = SERVERS["triton"]("lora", inputs())
    commands = {"served": ["containers/run", images[0], *server.command(p.server_options)]}
    if server.built["engine_is_stand_in"]:
        precision, environment, words = exactly(read_json(results("machine") / "machine.json"))
        command = server.command([*p.server_options, *words])
        commands[precision] = ["containers/run", images[0], "env", *environment, *command]
    measured = {"proof": {}, "points": []}
    for precision, command in commands.items():
        log = out / "raw" / f"server-{precision}.log"
        with serving(server, command, log, p.ready_seconds, READY) as (process, _):
            measured["engine"], measured["engine_is_stand_in"] = server.engine()
            tasks = {name: task for task, name in TASKS.items()}
            asking = Asking(p, asked_model(), images[1], process, out / "raw")
            measured["proof"][precision] = proof(p, asking, precision, "triton-stream", "127.0.0.1:8001", tasks)
    return {**measured, "server_command": commands["served"]}


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
        # Older versions know the first name, newer ones the second.
        return "batch-invariant", ["VLLM_KERNEL_OVERRIDE_BATCH_INVARIANT=1", "VLLM_BATCH_INVARIANT=1"], []
    return "float32", [], ["--dtype", "float32"]


def commands(p, image, server, exact, rank_of_ours):
    """{name: command} of the servers: one without LoRA, one for the exact proof, one for each rank.

    exact: what exactly() gives. rank_of_ours: the least --max-lora-rank of the two servers that load our adapters.
    """
    plain, start = server.command(p.server_options), ["containers/run", image]
    updating = [*start, "env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]  # adapters are loaded while it runs
    precision, environment, words = exact
    room = max(p.ranks[0], rank_of_ours)
    return {
        "none": [*start, *plain],
        precision: [*updating, *environment, *with_lora(p, plain, room, *words)],
        **{rank: updating + with_lora(p, plain, room if rank == p.ranks[0] else rank) for rank in p.ranks},
    }


def measure_vllm(p, images, out):
    """The points of all servers and two proofs. The results of each server are kept for a run that is cut off; a failed
    exact proof leaves its reason."""
    server = SERVERS["vllm"]("base", inputs())
    exact = exactly(read_json(results("machine") / "machine.json"))
    ours = max_lora_rank(results("finetune") / name / "adapter" for name in ADAPTERS)
    runs, work = commands(p, images[0], server, exact, ours), working_folder(p, images)
    measured = {"proof": {}, "points": [], "server_command": runs[p.ranks[0]]}
    for name, command in runs.items():
        try:
            part = of_server(p, server, images[1], name, command, exact[0], work)
        except UserError as error:
            if name != exact[0]:
                raise
            part = {"proof": {name: {"not_measured": str(error)}}, "points": []}
        measured["points"] += part.pop("points")
        measured["proof"] |= part.pop("proof")
        measured |= part
    shutil.copytree(work, out / "raw", dirs_exist_ok=True)
    return measured


def working_folder(p, images):
    """Keeps what a server gave; another folder when anything that it depends on has changed."""
    return work_dir("multilora", fingerprint([dataclasses.asdict(p), images], dependencies("multilora@vllm")))


def of_server(p, server, client, name, command, exact, work):
    """{proof, points, engine, engine_is_stand_in} of one server, measured or kept; client: the client's image."""
    kept = work / f"{name}.json"
    if kept.exists():
        print(f"multilora: LoRA {name} is there from a run that was cut off", flush=True)
        return read_json(kept)
    with serving(server, command, work / f"server-{name}.log", p.ready_seconds, READY) as (process, ready):
        engine, stand_in = server.engine()
        print(f"multilora: {engine}, LoRA {name}, is ready after {ready:.0f} s", flush=True)
        measured = measure_server(p, Asking(p, asked_model(), client, process, work), name, exact)
        write_json(kept, {**measured, "engine": engine, "engine_is_stand_in": stand_in})
    return read_json(kept)


def measure_server(p, asking, name, exact):
    """{proof, points} that a running vLLM is there for; name: "none", a rank, or the exact precision."""
    proofs, points = {}, []
    if name == "none":
        none = {"variant": "none", "adapters": 0, "popularity": None, "rank": None, "slots": 0,
                "adapter_bytes": None, "load_seconds": None}  # fmt: skip
        points.append(none | point(p, asking, "none", [], None))
    if name in (exact, p.ranks[0]):
        for adapter in ADAPTERS:
            load_adapter(adapter, results("finetune") / adapter / "adapter")
        precision = exact if name == exact else "served"
        proofs[precision] = proof(p, asking, precision, "vllm", URL, {})
    if name in p.ranks:
        points += study_rank(p, asking, name)
    return {"proof": proofs, "points": points}


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
        **begin(out, results("base_model")),
        "base_model_bytes": bytes_of(results("base_model") / "model"),
        "trained_adapter_bytes": bytes_of(results("finetune") / ADAPTERS[0] / "adapter"),
        "not_measured": None,
    }
    reason = f"params.yaml: multilora.servers has no {kind}" if kind not in p.servers else None
    if reason:
        write_not_measured(out / "multilora.json", facts, reason)
        return
    measured = measures[kind](p, images, out)
    write_metrics(out / "multilora.json", {**facts, **measured})
    for precision, shown in measured["proof"].items():
        print(f"multilora, {precision}: {format_proof(shown)}")
    if failed := [precision for precision, shown in measured["proof"].items() if "not_measured" in shown]:
        raise UserError(f"no proof in {failed[0]}; see {out / 'raw'}/*.log; the same command tries it again and keeps "
                        "all else")  # fmt: skip
    if kind == "vllm":
        shutil.rmtree(working_folder(p, images))  # a run that is asked for again measures again


if __name__ == "__main__":
    run(main)
