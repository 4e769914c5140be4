"""packed.py: what the tiny model says of four rows of different lengths: padded, end to end, and end to end with the
rows' bounds forgotten (as if they were one row)."""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

from stages.finetune import Finetune, Lora
from stages.stage import read_params
from stages.training import make_trainer

p = dataclasses.replace(read_params(Finetune), micro_batch=4)
lora = dataclasses.replace(read_params(Lora), dropout=0.0)


def trainer_of(padding_free, folder):
    return make_trainer(
        dataclasses.replace(p, padding_free=padding_free), lora, "lora", Path(folder), TrainerCallback()
    )


def difference(ours, theirs):
    """The largest difference of two sets of logits, as a share of the spread of the second."""
    return float((ours - theirs).abs().max() / theirs.std())


with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
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
    print(
        json.dumps(
            {
                "lengths": lengths,
                "tokens": [batch["input_ids"].numel(), other["input_ids"].numel()],
                "losses": [float(loss), float(other_loss)],
                "packed": difference(second.logits[0].float(), logits),
                "forgotten": difference(third.logits[0].float(), logits),
            }
        )
    )
