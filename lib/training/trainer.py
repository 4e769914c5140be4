"""
The trainer of `finetune`: the base model, TRL's arguments, and what is told and kept while it runs.
"""

import json
import time

from lib.core.stage import UserError
from lib.model.load import load_base
from lib.training import packing
from lib.training.speed import compile_layers, count_tokens_ahead, runs_ahead


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
        ddp_find_unused_parameters=False,
        fsdp="full_shard auto_wrap" if p.sharded else "",
        fsdp_config=fsdp_config() if p.sharded else None,
        dataloader_num_workers=p.workers,
        dataloader_persistent_workers=p.workers > 0,
        accelerator_config={"non_blocking": runs_ahead(p)},
        logging_nan_inf_filter=not runs_ahead(p),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=p.seed,
    )


def fast_on_cpu(p):
    """True if lib/training/cpu.py computes the layers and the loss: the run needs nothing that it leaves out."""
    import torch

    asked = p.gradient_checkpointing or p.packing or p.liger or p.compile or p.gpus > 1
    return p.fast_cpu and p.padding_free and not asked and not torch.cuda.is_available()


def fsdp_config():
    """How a sharded model is loaded: the first process reads the weights and sends them to the other GPUs.

    Without GPUs, where only tests shard, accelerate cannot send: each process reads for itself.
    """
    import torch

    sends = torch.cuda.is_available()
    return {"sync_module_states": sends, "cpu_ram_efficient_loading": sends, "use_orig_params": False}


def make_trainer(p, lora, method, model_folder, data, checkpoints, callback):
    """The SFTTrainer of the writeup on a model and the rows of a dataset folder."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer

    rows = load_dataset("json", data_files={part: str(data / f"{part}.jsonl") for part in ("train", "validation")})
    # Before the adapter is made: the trainer's own seed comes after that, and would leave its weights to chance.
    set_seed(p.seed)
    packing.register()
    args = sft_config(p, checkpoints)  # before the model is loaded, which must know that it will be sharded
    attention = packing.ATTENTION if p.padding_free else "sdpa"
    if fast := fast_on_cpu(p):
        from lib.training import cpu

        cpu.register()
        attention = cpu.ATTENTION
    model, tokenizer = load_base(model_folder, method, attention, p.sharded)
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := [name for name in lora.target_modules if name not in modules]:
        # peft passes over a name as long as another one matches.
        raise UserError(f"params.yaml: lora.target_modules has {unknown[0]!r}, which is no module of this model")
    trainer = SFTTrainer(
        model=model,
        args=args,
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
    if runs_ahead(p):
        count_tokens_ahead(trainer)
    if p.padding_free:
        if fast:
            cpu.train_on_cpu(trainer)
        packing.make_padding_free(trainer)
    if p.compile:
        compile_layers(trainer)
    if p.sharded:
        shard(trainer)
    return trainer


def shard(trainer):
    """FSDP of the frozen model by layers, and of each trained matrix; checkpoints hold the whole adapter.

    accelerate would round every buffer to bf16, also the frequencies of the rotary embedding, which say where a token
    stands, and add up gradients in bf16: both stay fp32, as on one GPU.
    """
    import torch
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import MixedPrecision

    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.set_state_dict_type("FULL_STATE_DICT")

    def plan():  # what the trainer calls before it wraps the model
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(trainer.model)
        plugin.mixed_precision_policy = MixedPrecision(torch.bfloat16, torch.float32, torch.float32)

    trainer._fsdp_qlora_plugin_updates = plan


def progress_callback(variant, steps_file, memory):
    """Times every optimiser step, keeps one JSON line a step in steps_file, and says how far the run is."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """No synchronisation of its own: it would stall a fast step. The queue of work for the GPU is short, so even a
        trainer that never waits for it goes at its pace: from one step's end to the next's is a step's time."""

        last = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.last = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            seconds = time.monotonic() - self.last
            memory.mark("first_step" if state.global_step == 1 else "steady")
            self.write(state, {"step": state.global_step, "seconds": seconds})
            if state.is_world_process_zero:
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
                self.write(state, {"step": state.global_step, **row})

        def on_evaluate(self, args, state, control, **kwargs):
            memory.mark("eval")

        def on_save(self, args, state, control, **kwargs):
            self.last = time.monotonic()  # validation and saving, which end here, are no part of the next step

        def write(self, state, row):
            if not state.is_world_process_zero:
                return
            with steps_file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return Progress()
