"""kept.py COUNT: what COUNT random small Llamas with random settings keep for the backward pass, and their peak of live
bytes in one training step, in the trainer that `finetune` uses. Run in a tree with a base model and a dataset.

Four things are made as on a GPU: dropout keeps a byte an element (the CPU's own keeps the scaled mask), a 4-bit weight
is written out in one piece (the CPU's in many), a 4-bit model is prepared for training (TRL takes one on the CPU for a
sharded one, and leaves it as it is), and autocast counts as on (peft looks at the GPU's alone).
"""

import json
import random
import sys
import tempfile
import weakref

import bitsandbytes.functional
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig
from trl.models import utils
from trl.trainer import sft_trainer

from lib.core.stage import read_params, results
from lib.training import trainer as training_trainer
from lib.training.config import Finetune, Lora

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


autocast_on = torch.is_autocast_enabled


def autocast_here(device="cpu"):
    return autocast_on(device)


def gpu_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


def gpu_dequantise(packed, state):
    scales = torch.empty(state.shape.numel() // state.blocksize, dtype=torch.float32)
    weight = torch.zeros(state.shape, dtype=torch.bfloat16)
    del scales
    return weight.t()


def prepare_as_on_a_gpu(model, peft_config, args):
    """trl.models.utils.prepare_peft_model, with its question whether a 4-bit model is sharded answered with no."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return utils.prepare_peft_model(model, peft_config, args)
    model = utils.prepare_model_for_kbit_training(model, args.gradient_checkpointing, {})
    args.gradient_checkpointing = False
    model = utils.get_peft_model(model, peft_config)
    utils.peft_module_casting_to_bf16(model)
    return model


class LiveBytes(TorchDispatchMode):
    """The bytes of every storage that an operation makes, while it lives; not those of the model itself."""

    def __init__(self, model):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(one.untyped_storage() for one in [*model.parameters(), *model.buffers()])

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage() not in self.known:
                self.made(one.untyped_storage())
        return out

    def made(self, storage):
        size = storage.nbytes()
        self.known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.gone, size)

    def gone(self, size):
        self.live -= size


def random_case(draw):
    """(config, changed parameters, adapter, batch) of one training step."""
    heads, width = draw.choice([2, 4, 8]), draw.choice([16, 32])
    padding_free = draw.random() < 0.35
    lengths = [draw.randint(40, 160) for _ in range(draw.randint(1, 4))]
    if not padding_free and draw.random() < 0.6:
        lengths = [16 * draw.randint(3, 8)] * len(lengths)
    elif not padding_free:  # the GPU's kernel pads its mask to 16, the CPU's does not
        lengths[0] = 16 * -(-max(lengths) // 16)
    grouped = padding_free or min(lengths) < max(lengths)
    config = {
        "vocab_size": draw.choice([40, 700, 2000]),
        "hidden_size": heads * width * draw.choice([1, 2]),
        "intermediate_size": 64 * draw.randint(2, 12),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]) if padding_free else 2 if grouped else heads,
        "head_dim": width,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    changes = {"gradient_checkpointing": draw.random() < 0.5, "padding_free": padding_free, "fast_cpu": False}
    targets = MODULES if draw.random() < 0.6 else draw.sample(MODULES, draw.randint(1, 6))
    # Without dropout an adapter keeps attention's output itself; padding-free, the CPU's is a copy of it.
    dropout = 0.1 if padding_free else draw.choice([0.0, 0.1])
    return config, changes, {"r": draw.randint(1, 9), "dropout": dropout, "targets": targets}, lengths


def as_trained(config, changes, adapter, method):
    """(trainer, its model as it trains) of a case."""

    def random_base(folder, method, attention="sdpa", sharded=False):
        torch.manual_seed(0)
        llama = AutoModelForCausalLM.from_config(
            LlamaConfig(**config), dtype=torch.bfloat16, attn_implementation=attention
        )
        if method == "qlora":
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            )
            with tempfile.TemporaryDirectory() as folder:
                llama.save_pretrained(folder)
                llama = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.bfloat16,
                    attn_implementation=attention,
                    quantization_config=nf4,
                    device_map="cpu",
                )
        llama.config.use_cache = False
        return llama, AutoTokenizer.from_pretrained(results("base_model") / "model")

    training_trainer.load_base = random_base
    p, lora = read_params(Finetune), read_params(Lora)
    for key, value in changes.items():
        setattr(p, key, value)
    lora.r, lora.dropout, lora.target_modules = adapter["r"], adapter["dropout"], adapter["targets"]
    trainer = training_trainer.make_trainer(
        p, lora, method, None, results("dataset") / p.template, tempfile.mkdtemp(), None
    )
    return trainer, trainer.accelerator.prepare_model(trainer.model)


def measured(config, changes, adapter, lengths, method):
    """{kept, peak}: bytes of the saved tensors, each storage once, and the highest sum of what is live."""
    trainer, model = as_trained(config, changes, adapter, method)
    rows = [
        {"input_ids": [draw.randrange(config["vocab_size"]) for _ in range(n)], "completion_mask": [1] * n}
        for n in lengths
    ]
    batch, own = trainer.data_collator(rows), {one.untyped_storage()._cdata for one in model.parameters()}
    kept = {}

    def keep(one):
        # Not the labels, nor what has one element.
        if one.untyped_storage()._cdata not in own and one.dtype != torch.int64 and one.numel() > 1:
            kept[one.untyped_storage()._cdata] = one.untyped_storage()
        return one

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    total = sum(one.nbytes() for one in kept.values())
    kept.clear()
    del loss
    with LiveBytes(model) as live:
        trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7)).backward()
    return {"kept": total, "peak": live.peak}


torch.is_autocast_enabled = autocast_here
torch.nn.functional.dropout = gpu_dropout
bitsandbytes.functional.dequantize_4bit = gpu_dequantise
sft_trainer.prepare_peft_model = prepare_as_on_a_gpu
draw = random.Random(0)
cases = []
for number in range(int(sys.argv[1])):
    config, changes, adapter, lengths = random_case(draw)
    method = ("lora", "qlora")[number % 2]
    found = measured(config, changes, adapter, lengths, method)
    cases.append({"method": method, "config": config, **changes, **adapter, "lengths": lengths, **found})
print(json.dumps(cases))
