"""templates.py LLAMA SMOLLM2: for both tokenizers and every template, the leading BOS tokens of a row, and whether the
tokens of a prompt are the first tokens of the whole row (the model is asked as it was taught)."""

import json
import sys

from transformers import AutoTokenizer

from lib.text.rows import read_rows
from lib.text.templates import TEMPLATES, completion_text, prompt_text
from stages.dataset import sample_tokens

rows = read_rows("data/persona.jsonl")[:50]
found = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    entry = {}
    for template in TEMPLATES:
        same = 0
        for row in rows:
            prompt = prompt_text(template, "", row["instruction"])
            asked = tokenizer(prompt)["input_ids"]
            taught = tokenizer(prompt + completion_text(template, row["output"]))["input_ids"]
            same += taught[: len(asked)] == asked
        sample = sample_tokens(tokenizer, rows[0], "")[template]
        first = [token for token in sample["token_ids"][:3] if token == tokenizer.bos_token_id]
        entry[template] = {"leading_bos": sample["leading_bos"], "first": len(first), "prefix": same, "rows": len(rows)}
    found.append(entry)
print(json.dumps(found))
