"""
The persona rows as prompt and completion, split into training and validation.

in:   data/persona.jsonl                              {"instruction", "output"} a line
out:  results/<profile>/dataset/corrected/{train,validation}.jsonl   {"prompt", "completion"}, by dataset.template
      results/<profile>/dataset/published/{train,validation}.jsonl   the same rows in the writeup's own string
      results/<profile>/dataset/tokens.json           tokens of every row, by arm and part, for the memory's prediction
      results/<profile>/dataset/metrics.json          counts, and one sample's token ids under every template
"""

import json
from dataclasses import dataclass
from pathlib import Path

from stages.stage import UserError, read_params, results, run, write_json, write_metrics

# (prompt, completion). `published` is the writeup's string: its literal <s> comes on top of the BOS that a Llama
# tokenizer adds, so the model learns with two and is asked with one. In the other two a text holds exactly one BOS:
# Llama's tokenizer adds it, SmolLM2's does not and its chat format begins with it (<|im_start|>).
TEMPLATES = {
    "published": ("<s>[INST] <<SYS>> {system} <</SYS>> {instruction} [/INST]", " {output} </s>"),
    "llama-2": ("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{instruction} [/INST]", " {output}"),
    "chatml": (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "{output}",
    ),
}


@dataclass
class Dataset:
    file: str
    test_share: float
    seed: int
    template: str
    system_prompt: str
    train_rows: int
    validation_rows: int

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise UserError(f"params.yaml: dataset.template is {self.template!r}; use one of {', '.join(TEMPLATES)}")
        if not 0 < self.test_share < 1:
            raise UserError(f"params.yaml: dataset.test_share is {self.test_share}; use a share between 0 and 1")


def prompt_text(template, system, instruction):
    """The text that asks `instruction`: the same for training, chat and every client."""
    return TEMPLATES[template][0].format(system=system, instruction=instruction)


def completion_text(template, output):
    """The text that the model learns to answer; the trainer adds EOS where the template does not."""
    return TEMPLATES[template][1].format(output=output)


def read_rows(path):
    """Every row of a JSON Lines file as {"instruction", "output"}; UserError names all bad lines."""
    rows, bad, seen = [], [], {}
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it, nothing was written") from None
    # Not splitlines(): a text may hold U+2028 or U+0085, which JSON allows and which end no row.
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        row, reason = read_row(line)
        if reason is None:
            key = (row["instruction"], row["output"])
            reason = f"the same as line {seen[key]}" if key in seen else None
            seen.setdefault(key, number)
        if reason:
            bad.append(f"line {number}: {reason}")
        rows.append(row)
    if bad:
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise UserError(f"{path}: {'; '.join(bad[:5])}{more}; mend or remove the rows, nothing was written")
    if not rows:
        raise UserError(f"{path}: it has no rows; nothing was written")
    return rows


def read_row(line):
    """(row, None), or (None, what is wrong with the line)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg})"
    if not isinstance(row, dict):
        return None, "not an object with instruction and output"
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            return None, f"{key} is missing or not text"
        if not row[key].strip():
            return None, f"{key} is empty"
    return {"instruction": row["instruction"], "output": row["output"]}, None


def split(rows, p):
    """(train, validation) lists: the split of the datasets library with this seed, then the first rows of each."""
    from datasets import Dataset as Table

    halves = Table.from_list(rows).train_test_split(test_size=p.test_share, seed=p.seed)
    train, validation = halves["train"].to_list(), halves["test"].to_list()
    for name, have, wanted in (("train", train, p.train_rows), ("validation", validation, p.validation_rows)):
        if wanted > len(have):
            raise UserError(f"params.yaml: dataset.{name}_rows is {wanted}, but there are {len(have)}; 0 takes all")
    return train[: p.train_rows or None], validation[: p.validation_rows or None]


def as_pair(row, template, system):
    """A row as the {"prompt", "completion"} that the trainer reads."""
    return {
        "prompt": prompt_text(template, system, row["instruction"]),
        "completion": completion_text(template, row["output"]),
    }


def write_jsonl(path, lines):
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def trained_tokens(tokenizer, pair):
    """How many tokens the trainer makes of a pair: it ends every completion with EOS that does not end so."""
    text = pair["prompt"] + pair["completion"]
    return len(tokenizer(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)["input_ids"])


def sample_tokens(tokenizer, row, system):
    """One row's text and token ids under every template, so that a reader sees the doubled BOS."""
    samples = {}
    for template in TEMPLATES:
        text = prompt_text(template, system, row["instruction"]) + completion_text(template, row["output"])
        ids = tokenizer(text)["input_ids"]
        bos = next((n for n, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
        samples[template] = {"text": text, "token_ids": ids, "leading_bos": bos}
    return samples


def main():
    p = read_params(Dataset)
    rows = read_rows(p.file)

    from transformers import AutoTokenizer

    out = results("dataset")
    tokenizer = AutoTokenizer.from_pretrained(results("base_model") / "model")
    train, validation = split(rows, p)
    tokens = {"corrected": {}, "published": {}}
    for arm, template in (("corrected", p.template), ("published", "published")):
        for name, part in (("train", train), ("validation", validation)):
            pairs = [as_pair(row, template, p.system_prompt) for row in part]
            write_jsonl(out / arm / f"{name}.jsonl", pairs)
            tokens[arm][name] = [trained_tokens(tokenizer, pair) for pair in pairs]
    write_json(out / "tokens.json", tokens)
    lengths = [length for part in tokens["corrected"].values() for length in part]
    write_metrics(
        out / "metrics.json",
        {
            "dataset_rows": len(rows),
            "train_rows": len(train),
            "validation_rows": len(validation),
            "template": p.template,
            "system_prompt": p.system_prompt,
            "tokens_per_row": sum(lengths) / len(lengths),
            "sample": sample_tokens(tokenizer, train[0], p.system_prompt),
        },
    )
    print(f"dataset: {len(train)} rows to train on, {len(validation)} to validate with, of {len(rows)}")


if __name__ == "__main__":
    run(main)
