"""
Fine-tune the base model with LoRA or QLoRA: python -m stages.finetune VARIANT, where VARIANT is METHOD or METHOD-NAME
(lora, qlora, lora-published); NAME is a patch of this stage's parameters in experiments.yaml: finetune.definitions.

in:   results/<profile>/base_model/model/, results/<profile>/dataset/
out:  results/<profile>/finetune/VARIANT/adapter/      the adapter with the best validation loss
      results/<profile>/finetune/VARIANT/metrics.json  time, memory, losses, what was proven about the settings
      results/<profile>/finetune/VARIANT/steps.csv     one line an optimiser step
      results/<profile>/finetune/VARIANT/summary.json  what `dvc exp show` lists
With finetune.gpus above 1 the stage starts itself once a GPU; the first one writes the results. Each GPU holds the
whole model, or with finetune.sharded a part of it.
Checkpoints are kept in .work/ until the run is whole: after a kill, the same command resumes from the last one.
"""

import csv
import dataclasses
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time

from lib.core.gpu import use_gpus
from lib.core.parent import die_with_parent
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, fingerprint, read_json, read_params, results, run, write_json
from lib.core.work import work_dir
from lib.training.checks import prove
from lib.training.config import Finetune, Lora, check_sharded, with_variant
from lib.training.flops import flops_per_token, utilisation
from lib.training.memory import MemorySampler
from lib.training.speed import attention_kernels
from lib.training.trainer import make_trainer, progress_callback

STARTED = time.monotonic()


def last_whole_checkpoint(folder):
    """The newest checkpoint whose state file was written (the last file of a save); half a checkpoint is removed."""
    whole = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            whole = path
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(path)
    return whole


def read_steps(path):
    """The step lines merged to one row a step, the latest line of a step last (a resumed run repeats some)."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {"step": row["step"]}).update(row)
    return [rows[step] for step in sorted(rows)]


def write_steps(path, rows):
    """steps.csv, one line a step; empty where a step logged nothing."""
    columns = ["step", "seconds", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows):
    """Summary of the steps: median step time (without the first, which warms up), losses, tokens trained."""
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    seconds = [row["seconds"] for row in rows[1:] if "seconds" in row]
    logged = [n for n, row in enumerate(rows) if "tokens" in row]
    tokens = rows[logged[-1]]["tokens"] if logged else None
    rates = [  # of the stretches from one log line to the next: the first one, which warms up, counts to no stretch
        (rows[b]["tokens"] - rows[a]["tokens"]) / sum(row["seconds"] for row in rows[a + 1 : b + 1])
        for a, b in itertools.pairwise(logged)
    ]
    total = sum(row["seconds"] for row in rows if "seconds" in row)
    return {
        "optimizer_steps": rows[-1]["step"],
        "seconds_per_step_median": statistics.median(seconds) if seconds else None,
        "step_seconds_total": total,
        "trained_tokens": tokens,
        "tokens_per_second": tokens / total if tokens else None,
        "tokens_per_second_median": statistics.median(rates) if rates else None,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "eval_loss_first": evals[0] if evals else None,
        "eval_loss_best": min(evals) if evals else None,
    }


def on_several_gpus(p, variant):
    """Run this stage once a GPU, as processes that find each other through torchrun's variables."""
    import torch

    if p.sharded and not torch.cuda.is_available():
        raise UserError(f"params.yaml: {variant} is sharded over {p.gpus} NVIDIA GPUs; this machine has none")
    if torch.cuda.is_available() and torch.cuda.device_count() < p.gpus:
        raise UserError(f"params.yaml: finetune.gpus is {p.gpus}; this machine has {torch.cuda.device_count()}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(p.gpus)]
    done = subprocess.run([*launch, "-m", "stages.finetune", variant], preexec_fn=die_with_parent())
    if done.returncode:
        sys.exit(done.returncode)


def main():
    variant = sys.argv[1]
    lora = read_params(Lora)
    method, p = with_variant(read_params(Finetune), variant)
    check_sharded(p, variant)
    use_gpus(p.gpus)
    base = read_json(results("base_model") / "metrics.json")
    data = read_json(results("dataset") / "metrics.json")

    settings = {key: value for key, value in dataclasses.asdict(p).items() if key not in ("variants", "definitions")}
    inputs = [results("base_model") / "model" / "config.json", *sorted((results("dataset") / p.template).iterdir())]
    # Random weights of another seed have the same config: what names the model belongs to the key of the work too.
    model = [base[key] for key in ("name", "source", "revision", "shape", "seed")]
    work = work_dir(f"finetune-{variant}", fingerprint([settings, dataclasses.asdict(lora), model], inputs))
    if p.gpus > 1 and "RANK" not in os.environ:
        return on_several_gpus(p, variant)
    first = os.environ.get("RANK", "0") == "0"
    steps = p.max_steps or p.epochs * -(-data["train_rows"] // (p.micro_batch * p.accumulation * p.gpus))
    if first:
        each = f" on each of {p.gpus} GPUs" if p.gpus > 1 else ""
        print(f"finetune {variant}: {steps} steps of {p.micro_batch} x {p.accumulation} rows{each}", flush=True)

    with MemorySampler() as memory:
        model, rows = results("base_model") / "model", results("dataset") / p.template
        trainer = make_trainer(
            p, lora, method, model, rows, work / "checkpoints", progress_callback(variant, work / "steps", memory)
        )
        memory.mark("load")
        proofs = prove(trainer, p, lora, method)
        flops = flops_per_token(trainer.model)
        resumed = last_whole_checkpoint(work / "checkpoints")
        if resumed and first:
            print(f"finetune {variant}: going on from {resumed.name}", flush=True)
        begun = time.monotonic()
        with attention_kernels(p):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        trained = time.monotonic() - begun

    weights = trainer.accelerator.get_state_dict(trainer.model)  # from all processes where the model is sharded
    if not first:
        return
    out = results("finetune") / variant
    out.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out / "adapter", state_dict=weights)
    steps = read_steps(work / "steps")
    write_steps(out / "steps.csv", steps)
    totals = summary(steps)
    metrics = {
        "method": method,
        "variant": variant,
        "model": base["name"],
        "shape": base["shape"],
        "weights": base["weights"],
        # A run that was interrupted has no wall time of its own: the time before the kill is not known.
        "wall_seconds": None if resumed else time.monotonic() - STARTED,
        "train_seconds": None if resumed else trained,
        **cpu_seconds(resumed),
        "resumed_from_step": int(resumed.name.split("-")[1]) if resumed else None,
        **totals,
        # The trainer counts tokens from zero when it resumes from a checkpoint.
        **({"trained_tokens": None, "tokens_per_second": None} if resumed else {}),
        **utilisation(flops, totals["tokens_per_second_median"], p.gpus),
        "dataset_rows": data["dataset_rows"],
        "train_rows": data["train_rows"],
        "memory": memory.summary(),
        **proofs,
        "settings": settings,
        "lora": dataclasses.asdict(lora),
        "seed": p.seed,
    }
    write_metrics(out / "metrics.json", metrics)
    write_json(out / "summary.json", {variant: in_short(metrics)})
    shutil.rmtree(work)


def cpu_seconds(resumed):
    """{user_seconds, system_seconds} of this process and its children, as `time` gives them; None for a resumed run."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "user_seconds": None if resumed else own.ru_utime + children.ru_utime,
        "system_seconds": None if resumed else own.ru_stime + children.ru_stime,
    }


def in_short(metrics):
    """The few numbers of a fine-tuning, for `dvc exp show`."""
    names = ("trainable_parameters", "eval_loss_best", "seconds_per_step_median", "tokens_per_second")
    return {name: metrics[name] for name in names} | {"process_peak_mib": metrics["memory"]["process_peak_mib"]}


if __name__ == "__main__":
    run(main)
