"""packed.py: what the tiny model says of four rows of different lengths: padded, end to end, end to end with the rows'
bounds forgotten (as if they were one row), with another last row; what LoRA's products give at rank 4 and 8; and what
lib/training/cpu.py gives beside peft, TRL and torch, by method."""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

from lib.core.stage import read_params, results
from lib.training.config import Finetune, Lora
from lib.training.cpu import Masks
from lib.training.speed import widen_rank
from lib.training.trainer import make_trainer

p = dataclasses.replace(read_params(Finetune), micro_batch=4)
lora = dataclasses.replace(read_params(Lora), dropout=0.0)


def trainer_of(padding_free, folder, fast=False, method="lora"):
    return make_trainer(
        dataclasses.replace(p, padding_free=padding_free, fast_cpu=fast),
        lora,
        method,
        results("base_model") / "model",
        results("dataset") / p.template,
        Path(folder),
        TrainerCallback(),
    )


def difference(ours, theirs):
    """The largest difference of two sets of logits, as a share of the spread of the second."""
    return float((ours - theirs).abs().max() / theirs.std())


def step(trainer, batch):
    """Loss and adapter gradients of one batch, with an adapter whose B is no longer zero."""
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = [weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None]
    return float(loss), torch.cat(gradients)


def beside(folder, method):
    """The losses of a batch in training and in evaluation, plain and fast, and how far apart the gradients are."""
    steps, evaluated = [], []
    for fast in (False, True):
        trainer = trainer_of(fast, folder, fast, method)
        steps.append(step(trainer, trainer.data_collator([trainer.train_dataset[n] for n in range(4)])))
        evaluated.append(trainer.evaluate()["eval_loss"])
    (plain, slow), (ours, quick) = steps
    return {"losses": [plain, ours], "evaluated": evaluated, "gradients": float((quick - slow).norm() / slow.norm())}


def masks():
    """Share dropped, whether the same seed draws the same mask, whether another draw is another one."""
    drawn = Masks()
    torch.manual_seed(0)
    drawn.begin()
    first, second = (drawn.draw(torch.Size([999, 101]), 0.1) for _ in range(2))
    torch.manual_seed(0)
    drawn.begin()
    same = drawn.draw(torch.Size([999, 101]), 0.1)
    values = set(first.unique().tolist())
    return [
        float((first == 0).float().mean()),
        values == {0, 1},
        bool((first == same).all()),
        bool((first != second).any()),
    ]


with tempfile.TemporaryDirectory() as folder:
    fast = {method: beside(folder, method) for method in ("lora", "qlora")}
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    padded, packed = trainer_of(False, folder), trainer_of(True, folder)
    rows = [padded.train_dataset[n] for n in range(4)]
    lengths = [len(row["input_ids"]) for row in rows]
    batch, other = padded.data_collator(rows), packed.data_collator(rows)
    loss, first = padded.compute_loss(padded.model.eval(), dict(batch), return_outputs=True)
    logits = torch.cat([row[:length] for row, length in zip(first.logits, lengths, strict=True)]).float()
    other_loss, second = packed.compute_loss(packed.model.eval(), dict(other), return_outputs=True)
    total = sum(lengths)
    forgotten = {**other, "cu_seq_lens_q": torch.tensor([0, total], dtype=torch.int32), "max_length_q": total}
    _, third = packed.compute_loss(packed.model, forgotten, return_outputs=True)
    tokens = other["input_ids"].clone()
    tokens[0, -lengths[-1] :] = tokens[0, -lengths[-1] :].flip(0)
    _, fourth = packed.compute_loss(packed.model, {**other, "input_ids": tokens}, return_outputs=True)
    same = (fourth.logits[0] == second.logits[0]).all(-1)
    with torch.enable_grad():
        loss_4, gradients_4 = step(packed, packed.data_collator(rows))
        widen_rank(packed.model)
        loss_8, gradients_8 = step(packed, packed.data_collator(rows))
    print(
        json.dumps(
            {
                "lengths": lengths,
                "tokens": [batch["input_ids"].numel(), other["input_ids"].numel()],
                "losses": [float(loss), float(other_loss)],
                "packed": difference(second.logits[0].float(), logits),
                "forgotten": difference(third.logits[0].float(), logits),
                "untouched": [bool(same[: -lengths[-1]].all()), bool(same[-lengths[-1] :].any())],
                "ranks": [loss_4, loss_8, difference(gradients_8, gradients_4)],
                "fast": fast,
                "masks": masks(),
            }
        )
    )
