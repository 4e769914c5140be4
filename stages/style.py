"""
Style as a number: held-out prompts answered by the base model, by LoRA and by QLoRA (on the 4-bit base it was trained
on), sampled with one seed and scored beside the dataset's own answers: whether LoRA and QLoRA differ is then measured,
not seen.

How: lib/text/style_measures.py and lib/text/style_scores.py.

in:   results/<profile>/base_model/, results/<profile>/finetune/{lora,qlora}/adapter/, dataset.file,
      results/<profile>/dataset/corrected/validation.jsonl
out:  results/<profile>/style/answers.jsonl  one row a prompt: reference, base, lora, qlora, and whose answer was cut
      results/<profile>/style/style.json     every measure: means, distances from the reference, differences, verdicts
      results/<profile>/style/style.md       the same as tables
"""

import json
from dataclasses import dataclass

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, need, read_json, read_params, results, run
from lib.model.answer import continuations, with_adapter
from lib.model.load import load_to_answer
from lib.text.rows import read_rows, write_jsonl
from lib.text.style_measures import Answer
from lib.text.style_scores import MODELS, PAIRS, as_markdown, score, style_differs, verdicts, withdraw
from lib.training.config import METHODS, check_both_methods

LOSSES = 8  # rows whose logits exist at once
RANDOM = "The weights are random: style and loss mean nothing here, and no difference is judged."
REMARKS = [
    "Each verdict stands at 95 %: where nothing differs, about one in twenty says differs all the same.",
    "A measure that cannot tell LoRA from the base says little about LoRA and QLoRA.",
    "An interval without width means that all rows have the same value, not that the mean is known exactly.",
]


@dataclass
class Style:
    prompts: int
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    batch: int
    bootstrap_samples: int
    seed: int

    def __post_init__(self):
        ones = dict.fromkeys(("max_new_tokens", "repetition_penalty", "batch"), 1)
        zeros = dict.fromkeys(("prompts", "temperature", "seed"), 0)
        check_bounds("style", self, {**zeros, **ones, "bootstrap_samples": 100})
        if not 0 < self.top_p <= 1:
            raise UserError(f"params.yaml: style.top_p is {self.top_p}; use a share above 0, at most 1")


def held_out(path, p):
    """The first p.prompts rows of a file of {"prompt", "completion"} rows; all for 0."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    if p.prompts > len(rows):
        raise UserError(f"params.yaml: style.prompts is {p.prompts}, but {len(rows)} rows are held out; 0 takes all")
    return rows[: p.prompts or None]


def ask(model, tokenizer, prompts, p):
    """An Answer to each prompt; cut where max_new_tokens came before the end of sequence."""
    answers, end = [], tokenizer.eos_token_id
    for begin in range(0, len(prompts), p.batch):
        for ids in continuations(model, tokenizer, prompts[begin : begin + p.batch], p):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            # A cut may go through a character of several tokens: its rest is no character of the answer.
            answers.append(Answer(text, False) if end in ids else Answer(text.rstrip("\ufffd"), True))
    return answers


def completion_losses(model, tokenizer, rows):
    """(mean loss in nats, tokens) of each row's completion with its end of sequence, as the trainer tokenizes them."""
    import torch

    tokenizer.padding_side, losses = "right", []
    for begin in range(0, len(rows), LOSSES):
        part = rows[begin : begin + LOSSES]
        starts = [len(tokenizer(row["prompt"])["input_ids"]) for row in part]
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in part]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            logits = model(**batch).logits
        for n, (start, length) in enumerate(zip(starts, batch.attention_mask.sum(1).tolist(), strict=True)):
            ahead, labels = logits[n, start - 1 : length - 1].float(), batch.input_ids[n, start:length]
            losses.append((torch.nn.functional.cross_entropy(ahead, labels).item(), length - start))
    return losses


def examine(model, tokenizer, rows, p):
    """The held-out rows' (Answers, losses, tokens of the completions)."""
    answers = ask(model, tokenizer, [row["prompt"] for row in rows], p)
    losses, tokens = zip(*completion_losses(model, tokenizer, rows), strict=True)
    return answers, losses, tokens


def main():
    p = read_params(Style)
    base = read_json(results("base_model") / "metrics.json")
    dataset = [Answer(row["output"], False) for row in read_rows(load_yaml("params.yaml")["dataset"]["file"])]
    rows = held_out(results("dataset") / "corrected" / "validation.jsonl", p)

    check_both_methods(load_yaml("params.yaml")["finetune"]["variants"])
    for method in METHODS:
        need(results("finetune") / method / "adapter", f"finetune@{method}")

    examined = {}
    for method in ("lora", "qlora"):
        model, tokenizer = load_to_answer(results("base_model") / "model", method)
        if method == "lora":
            examined["base"] = examine(model, tokenizer, rows, p)
            print(f"style: the base model has answered {len(rows)} prompts", flush=True)
        model = with_adapter(model, results("finetune") / method / "adapter")
        examined[method] = examine(model, tokenizer, rows, p)
        print(f"style: {method} has answered", flush=True)

    answers = {"dataset": dataset, "reference": [Answer(row["completion"].strip(), False) for row in rows]}
    answers |= {who: examined[who][0] for who in MODELS}
    measures = score(answers, {who: examined[who][1] for who in MODELS}, examined["base"][2], p)
    if base["weights"] == "random":
        withdraw(measures)
    judged = {pair: verdicts(measures, pair) for pair in PAIRS}
    data = {
        "model": base["name"],
        "weights": base["weights"],
        "remarks": [RANDOM] if base["weights"] == "random" else REMARKS,
        "prompts": len(rows),
        "dataset_rows": len(dataset),
        **{key: getattr(p, key) for key in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")},
        "bootstrap_samples": p.bootstrap_samples,
        "verdicts": judged,
        "style_differs": {pair: style_differs(judged[pair]) for pair in PAIRS},
        "measures": measures,
    }
    out = results("style")
    write_jsonl(out / "answers.jsonl", [
        {"weights": base["weights"], "prompt": row["prompt"]}
        | {who: answers[who][n].text for who in ("reference", *MODELS)}
        | {"cut": [who for who in MODELS if answers[who][n].cut]}
        for n, row in enumerate(rows)
    ])  # fmt: skip
    write_metrics(out / "style.json", data)
    (out / "style.md").write_text(as_markdown(data))
    count = {verdict: len(names) for verdict, names in judged["lora_minus_qlora"].items()}
    print("style: LoRA and QLoRA:", ", ".join(f"{verdict} in {n}" for verdict, n in count.items()), "measures")


if __name__ == "__main__":
    run(main)
