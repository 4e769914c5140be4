"""
The trainer of `finetune`: the base model, TRL's arguments, and what is told and kept while it runs.
"""

import contextlib
import json
import os
import time

from stages import packing
from stages.stage import UserError, results


def load_base(method, attention="sdpa", sharded=False):
    """The base model in bf16 (LoRA), or in NF4 with double quantisation (QLoRA), and its tokenizer.

    sharded: in the first process's main memory, the others' are empty; the weights go to the GPUs in parts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = results("base_model") / "model"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        # FSDP cuts tensors of one type only, so what holds the 4-bit numbers is called bf16 as all others.
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )
    device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=None if sharded else {"": device},
        attn_implementation=attention,
        quantization_config=nf4 if method == "qlora" else None,
    )
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(folder)


def load_to_answer(method):
    """load_base for a model that only answers: a CPU unpacks the 4-bit values once, not again at every token."""
    model, tokenizer = load_base(method)
    if method == "qlora" and model.device.type == "cpu":
        model = model.dequantize()  # to the same values
    return model, tokenizer


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


def fsdp_config():
    """How a sharded model is loaded: the first process reads the weights and sends them to the other GPUs.

    Without GPUs, where only tests shard, accelerate cannot send: each process reads for itself.
    """
    import torch

    sends = torch.cuda.is_available()
    return {"sync_module_states": sends, "cpu_ram_efficient_loading": sends, "use_orig_params": False}


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
    args = sft_config(p, checkpoints)  # before the model is loaded, which must know that it will be sharded
    model, tokenizer = load_base(method, packing.ATTENTION if p.padding_free else "sdpa", p.sharded)
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


def attention_kernels(p):
    """A context for training: pieces of full length take cuDNN's attention, on Hopper faster than torch's own."""
    import torch

    if not runs_ahead(p) or p.padding_free or not torch.cuda.is_available():
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


def runs_ahead(p):
    """True where nothing in a step has to wait for the GPU: no padding to look for, no whole logits to measure."""
    return p.liger and (p.padding_free or p.packing > 0)


def count_tokens_ahead(trainer):
    """Count the trained tokens from the shape of a batch without padding.

    TRL's own compute_loss adds metrics to its parent's and asks the GPU for each: the GPU then idles until the next
    kernel is launched, which a fast step feels. On several GPUs the first one's count stands for each of them.
    """
    from transformers import Trainer

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training:
            trainer._total_train_tokens += inputs["input_ids"].numel() * trainer.accelerator.num_processes
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        return Trainer.compute_loss(trainer, model, {**inputs, "use_cache": False}, *args, **kwargs)

    trainer.compute_loss = compute_loss


def compile_layers(trainer):
    """torch.compile of the decoder's layers for training; validation stays as it is, so that its losses compare.

    The compiler would keep fp32 between the operations that it fuses. It is told to round where the uncompiled layers
    round to bf16: small adapter updates vanish in that rounding, so that without it the same recipe learns otherwise.
    """
    import torch

    widen_rank(trainer.model)
    torch._inductor.config.emulate_precision_casts = True
    for layer in trainer.model.get_base_model().model.layers:  # one compilation serves them all
        layer.compile(dynamic=True)
    evaluate = trainer.evaluate

    def evaluate_uncompiled(*args, **kwargs):
        with torch.compiler.set_stance("force_eager"):
            return evaluate(*args, **kwargs)

    trainer.evaluate = evaluate_uncompiled


def widen_rank(model, to=8):
    """Compute LoRA's products at a rank that is a multiple of `to`, with zeros: the same numbers, sooner.

    The matrix units take rows of 16 bytes, eight numbers in bf16; for rank 4 the library falls back to old kernels.
    The weights that are trained and saved keep their rank.
    """
    from torch.nn import Linear
    from torch.nn.functional import linear, pad

    class WideA(Linear):
        def forward(self, x):
            return linear(x, pad(self.weight, (0, 0, 0, -self.out_features % to)))

    class WideB(Linear):
        def forward(self, x):
            return linear(x, pad(self.weight, (0, -self.in_features % to)))

    for module in model.modules():
        for layers, wide in ((getattr(module, "lora_A", {}), WideA), (getattr(module, "lora_B", {}), WideB)):
            for layer in layers.values():
                layer.__class__ = wide


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
