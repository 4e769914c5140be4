"""
The persona rows as prompt and completion, split into training and validation.

in:   data/persona.jsonl                              {"instruction", "output"} a line
out:  results/<profile>/dataset/corrected/{train,validation}.jsonl   {"prompt", "completion"}, by dataset.template
      results/<profile>/dataset/published/{train,validation}.jsonl   the same rows in the writeup's own string
      results/<profile>/dataset/tokens.json           tokens of every row, by variant and part, for stage vram
      results/<profile>/dataset/metrics.json          counts, and one sample's token ids under every template
"""

import math
from dataclasses import dataclass

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, need, read_params, results, run, write_json
from lib.text.rows import read_rows, write_jsonl
from lib.text.templates import TEMPLATES, completion_text, prompt_text


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
        check_bounds("dataset", self, {"seed": 0, "train_rows": 0, "validation_rows": 0})


def split(rows, p):
    """(train, validation) lists: the split of the datasets library with this seed, then the first rows of each."""
    held = math.ceil(len(rows) * p.test_share)
    if held >= len(rows):
        raise UserError(f"{p.file}: {len(rows)} rows leave none to train on beside {held} held out; add rows")

    from datasets import Dataset as Table

    halves = Table.from_list(rows).train_test_split(test_size=p.test_share, seed=p.seed)
    train, validation = halves["train"].to_list(), halves["test"].to_list()
    for name, have, wanted in (("train", train, p.train_rows), ("validation", validation, p.validation_rows)):
        if wanted > len(have):
            raise UserError(f"params.yaml: dataset.{name}_rows is {wanted}, but there are {len(have)}; 0 takes all")
    return train[: p.train_rows or None], validation[: p.validation_rows or None]


def check_control_tokens(file, rows, tokens):
    """UserError where a row's text holds a control token: it would end a turn or begin another one."""
    for number, row in enumerate(rows, start=1):
        for key, text in row.items():
            if present := [token for token in tokens if token in text]:
                raise UserError(f"{file}: line {number}: {key} holds the control token {present[0]}; take it out")


def check_style_prompts(wanted, validation):
    """UserError before the training where fewer rows are held out than `style` is to answer."""
    if wanted > len(validation):
        raise UserError(f"params.yaml: style.prompts is {wanted}, but {len(validation)} rows are held out; 0 takes all")


def as_pair(row, template, system):
    """A row as the {"prompt", "completion"} that the trainer reads."""
    return {
        "prompt": prompt_text(template, system, row["instruction"]),
        "completion": completion_text(template, row["output"]),
    }


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
    folder = need(results("base_model") / "model", "base_model")

    from transformers import AutoTokenizer

    out = results("dataset")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_control_tokens(p.file, rows, tokenizer.all_special_tokens)
    train, validation = split(rows, p)
    check_style_prompts(load_yaml("params.yaml")["style"]["prompts"], validation)
    tokens = {"corrected": {}, "published": {}}
    for variant, template in (("corrected", p.template), ("published", "published")):
        for name, part in (("train", train), ("validation", validation)):
            pairs = [as_pair(row, template, p.system_prompt) for row in part]
            write_jsonl(out / variant / f"{name}.jsonl", pairs)
            tokens[variant][name] = [trained_tokens(tokenizer, pair) for pair in pairs]
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
