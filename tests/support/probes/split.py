"""split.py: the split of data/persona.jsonl as the writeup's own lines make it, and as the stage does."""

import hashlib
import json

from datasets import load_dataset

from lib.core.stage import UserError
from lib.text.rows import read_rows
from lib.text.templates import prompt_text
from stages.dataset import Dataset, split


def params(**changes):
    given = {
        "file": "data/persona.jsonl", "test_share": 0.2, "seed": 42, "template": "llama-2", "system_prompt": "",
        "train_rows": 0, "validation_rows": 0,
    } | changes  # fmt: skip
    return Dataset(**given)


def digest(rows):
    """One digest of all rows in their order."""
    text = json.dumps([[row["instruction"], row["output"]] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def error(**changes):
    try:
        split(rows, params(**changes))
    except UserError as mistake:
        return str(mistake)


rows = read_rows("data/persona.jsonl")
theirs = load_dataset("json", data_files="data/persona.jsonl", split="train").train_test_split(test_size=0.2, seed=42)
ours, again, other = split(rows, params()), split(rows, params()), split(rows, params(seed=7))
few = split(rows, params(train_rows=5, validation_rows=3))
whole = [{row["instruction"] + row["output"] for row in part} for part in ours]
print(
    json.dumps(
        {
            "theirs": [digest(theirs["train"]), digest(theirs["test"])],
            "ours": [digest(part) for part in ours],
            "again": [digest(part) for part in again],
            "other": [digest(part) for part in other],
            "counts": [len(part) for part in ours],
            "shared": len(whole[0] & whole[1]),
            "few": [few[0] == ours[0][:5], few[1] == ours[1][:3], len(few[0]), len(few[1])],
            "error": error(train_rows=1185),
            "braces": prompt_text("chatml", "{a}", "{instruction} {0}"),
        }
    )
)
