"""
Fine-tune the base model with LoRA or QLoRA: python -m stages.finetune VARIANT, where VARIANT is METHOD or METHOD-ARM
(lora, qlora, lora-published); an arm is a patch of this stage's parameters, named in params.yaml.

in:   results/<profile>/base_model/model/, results/<profile>/dataset/
out:  results/<profile>/finetune/VARIANT/adapter/      the adapter with the best validation loss
      results/<profile>/finetune/VARIANT/metrics.json  time, memory, losses, what was proven about the settings
      results/<profile>/finetune/VARIANT/steps.csv     one line an optimiser step
Checkpoints stand in .work/ until the run is whole: after a kill, the same command goes on from the last one.
"""

import csv
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass

from stages.memory import MemorySampler
from stages.proofs import prove
from stages.stage import UserError, fingerprint, read_json, read_params, results, run, work_dir, write_metrics

METHODS = ("lora", "qlora")
STARTED = time.monotonic()


@dataclass
class Lora:
    r: int
    alpha: int
    dropout: float
    target_modules: list


@dataclass
class Finetune:
    variants: list
    arms: dict
    template: str
    epochs: int
    max_steps: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    optimizer: str
    gradient_checkpointing: bool
    max_tokens: int
    eval_steps: int
    logging_steps: int
    seed: int


def with_arm(p, variant):
    """(method, parameters) of a variant; UserError names what there is when the variant or a patched key is unknown."""
    method, _, arm = variant.partition("-")
    if method not in METHODS or (arm and arm not in p.arms):
        known = [m for m in METHODS] + [f"{m}-{a}" for a in p.arms for m in METHODS]
        raise UserError(f"params.yaml: finetune has no variant {variant!r}; use one of {', '.join(known)}")
    patch = p.arms[arm] if arm else {}
    for key, value in patch.items():
        if key not in {field.name for field in dataclasses.fields(p)} - {"variants", "arms"}:
            raise UserError(f"params.yaml: finetune.arms.{arm}.{key} is no parameter of finetune")
        if type(value) is not type(getattr(p, key)):
            raise UserError(
                f"params.yaml: finetune.arms.{arm}.{key} is {value!r}, want {type(getattr(p, key)).__name__}"
            )
    return method, dataclasses.replace(p, **patch)


def load_base(method):
    """The base model in bf16 (LoRA), or in NF4 with double quantisation (QLoRA), and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = results("base_model") / "model"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=nf4 if method == "qlora" else None,
    )
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(folder)


def sft_config(p, checkpoints):
    """The trainer's arguments: the writeup's, with the values of params.yaml."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=p.epochs,
        max_steps=p.max_steps or -1,
        per_device_train_batch_size=p.micro_batch,
        per_device_eval_batch_size=max(p.micro_batch, 8),
        gradient_accumulation_steps=p.accumulation,
        learning_rate=p.learning_rate,
        lr_scheduler_type=p.schedule,
        warmup_steps=p.warmup_steps,
        optim=p.optimizer,
        gradient_checkpointing=p.gradient_checkpointing,
        max_length=p.max_tokens,
        completion_only_loss=True,
        logging_steps=p.logging_steps,
        eval_strategy="steps",
        eval_steps=p.eval_steps,
        save_strategy="steps",
        save_steps=p.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=p.seed,
    )


def progress_callback(variant, steps_file, memory):
    """Times every optimiser step, keeps one JSON line a step in steps_file, and says how far the run is."""
    import torch
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        begun = tokens = None

        def on_step_begin(self, args, state, control, **kwargs):
            synchronize(torch)
            self.begun = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize(torch)
            seconds = time.monotonic() - self.begun
            memory.mark("first_step" if state.global_step == 1 else "steady")
            self.write({"step": state.global_step, "seconds": seconds})
            left = (state.max_steps - state.global_step) * seconds
            print(
                f"finetune {variant}: step {state.global_step} of {state.max_steps}, {seconds:.1f} s, "
                f"about {left / 60:.1f} min left",
                flush=True,
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            names = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "learning_rate", "num_tokens": "tokens"}
            row = {new: logs[old] for old, new in names.items() if old in logs}
            if row:
                self.write({"step": state.global_step, **row})

        def on_evaluate(self, args, state, control, **kwargs):
            memory.mark("eval")

        def write(self, row):
            with steps_file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return Progress()


def synchronize(torch):
    """Wait for the GPU, so that a clock read now covers what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    """steps.csv: step, seconds, loss, eval_loss, learning_rate, tokens; empty where a step logged none."""
    columns = ["step", "seconds", "loss", "eval_loss", "learning_rate", "tokens"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows):
    """What the steps say: median step time (the first step, which warms up, left out), losses, tokens trained."""
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    seconds = sorted(row["seconds"] for row in rows[1:] if "seconds" in row)
    median = seconds[len(seconds) // 2] if seconds else None
    tokens = max((row["tokens"] for row in rows if "tokens" in row), default=None)
    total = sum(row["seconds"] for row in rows if "seconds" in row)
    return {
        "optimizer_steps": rows[-1]["step"],
        "seconds_per_step_median": median,
        "step_seconds_total": total,
        "trained_tokens": tokens,
        "tokens_per_second": tokens / total if tokens else None,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "eval_loss_first": evals[0] if evals else None,
        "eval_loss_best": min(evals) if evals else None,
    }


def make_trainer(p, lora, method, checkpoints, callback):
    """The SFTTrainer of the writeup on this profile's model and rows."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTTrainer

    data = results("dataset") / p.template
    rows = load_dataset("json", data_files={part: str(data / f"{part}.jsonl") for part in ("train", "validation")})
    model, tokenizer = load_base(method)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(p, checkpoints),
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            bias="none",
        ),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log line again, as a dict
    return trainer


def main():
    variant = sys.argv[1]
    lora = read_params(Lora)
    method, p = with_arm(read_params(Finetune), variant)
    base = read_json(results("base_model") / "metrics.json")
    data = read_json(results("dataset") / "metrics.json")

    settings = {key: value for key, value in dataclasses.asdict(p).items() if key not in ("variants", "arms")}
    inputs = [results("base_model") / "model" / "config.json", *sorted((results("dataset") / p.template).iterdir())]
    work = work_dir(f"finetune-{variant}", fingerprint([settings, dataclasses.asdict(lora), base["revision"]], inputs))
    rows = -(-data["train_rows"] * p.epochs // (p.micro_batch * p.accumulation))
    print(f"finetune {variant}: {p.max_steps or rows} steps of {p.micro_batch} x {p.accumulation} rows", flush=True)

    with MemorySampler() as memory:
        trainer = make_trainer(
            p, lora, method, work / "checkpoints", progress_callback(variant, work / "steps", memory)
        )
        memory.mark("load")
        proofs = prove(trainer, p, lora, method)
        resumed = last_whole_checkpoint(work / "checkpoints")
        if resumed:
            print(f"finetune {variant}: going on from {resumed.name}", flush=True)
        begun = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        trained = time.monotonic() - begun

    out = results("finetune") / variant
    out.mkdir(parents=True, exist_ok=True)
    trainer.model.save_pretrained(out / "adapter")
    steps = read_steps(work / "steps")
    write_steps(out / "steps.csv", steps)
    write_metrics(
        out / "metrics.json",
        {
            "method": method,
            "variant": variant,
            "model": base["name"],
            "shape": base["shape"],
            "weights": base["weights"],
            # A run that was interrupted has no wall time of its own: the time before the kill is not known.
            "wall_seconds": None if resumed else time.monotonic() - STARTED,
            "train_seconds": None if resumed else trained,
            "resumed_from_step": int(resumed.name.split("-")[1]) if resumed else None,
            **summary(steps),
            "dataset_rows": data["dataset_rows"],
            "train_rows": data["train_rows"],
            "memory": memory.summary(),
            **proofs,
            "settings": settings,
            "lora": dataclasses.asdict(lora),
            "seed": p.seed,
        },
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
