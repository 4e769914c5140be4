"""
The trainer of `finetune`: the base model, TRL's arguments, and what is told and kept while it runs.
"""

import json
import time

from stages import packing
from stages.stage import UserError, results


def load_base(method, attention="sdpa"):
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
        attn_implementation=attention,
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
        padding_free=p.padding_free,
        packing=p.packing > 0,
        packing_strategy="wrapped",
        eval_packing=False,
        use_liger_kernel=p.liger,
        # torch.compile fuses what the other kernels of liger would, and fuses more.
        liger_kernel_config={name: False for name in ("rope", "rms_norm", "swiglu")} if p.compile else None,
        max_length=p.packing or p.max_tokens,
        completion_only_loss=True,
        logging_steps=p.logging_steps,
        eval_strategy="steps",
        eval_steps=p.eval_steps,
        save_strategy="steps",
        save_steps=p.eval_steps,
        save_total_limit=2,
        dataloader_num_workers=p.workers,
        dataloader_persistent_workers=p.workers > 0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=p.seed,
    )


def make_trainer(p, lora, method, checkpoints, callback):
    """The SFTTrainer of the writeup on this profile's model and rows."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer

    data = results("dataset") / p.template
    rows = load_dataset("json", data_files={part: str(data / f"{part}.jsonl") for part in ("train", "validation")})
    # Before the adapter is made: the trainer's own seed comes after that, and would leave its weights to chance.
    set_seed(p.seed)
    packing.register()
    model, tokenizer = load_base(method, packing.ATTENTION if p.padding_free else "sdpa")
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := [name for name in lora.target_modules if name not in modules]:
        # peft passes over a name as long as another one matches.
        raise UserError(f"params.yaml: lora.target_modules has {unknown[0]!r}, which is no module of this model")
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
        callbacks=[callback] if callback else None,
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log line again, as a dict
    if p.padding_free:
        packing.make_padding_free(trainer)
    if p.compile:
        for layer in trainer.model.get_base_model().model.layers:  # one compilation serves them all
            layer.compile(dynamic=True)
    return trainer


def progress_callback(variant, steps_file, memory):
    """Times every optimiser step, keeps one JSON line a step in steps_file, and says how far the run is."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """No synchronisation of its own: it would stall a fast step. The trainer waits for the GPU once a step anyway
        (it counts the tokens there), so the time from one step's end to the next's is a step's."""

        last = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.last = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            seconds = time.monotonic() - self.last
            memory.mark("first_step" if state.global_step == 1 else "steady")
            self.write({"step": state.global_step, "seconds": seconds})
            left = (state.max_steps - state.global_step) * seconds
            print(
                f"finetune {variant}: step {state.global_step} of {state.max_steps}, {seconds:.2f} s, "
                f"about {left / 60:.1f} min left",
                flush=True,
            )
            self.last = time.monotonic()

        def on_log(self, args, state, control, logs=None, **kwargs):
            names = {"loss": "loss", "eval_loss": "eval_loss", "grad_norm": "grad_norm", "num_tokens": "tokens"}
            names["learning_rate"] = "learning_rate"
            row = {new: logs[old] for old, new in names.items() if old in logs}
            if row:
                self.write({"step": state.global_step, **row})

        def on_evaluate(self, args, state, control, **kwargs):
            memory.mark("eval")

        def on_save(self, args, state, control, **kwargs):
            self.last = time.monotonic()  # validation and saving, which end here, are no part of the next step

        def write(self, row):
            with steps_file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return Progress()
