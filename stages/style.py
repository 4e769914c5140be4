"""
Style as a number: held-out prompts answered by the base model, by LoRA and by QLoRA (on the 4-bit base it was trained
on), sampled with one seed and scored beside the dataset's own answers: whether LoRA and QLoRA differ is then measured,
not seen.

A mean over rows stands with its 95 % bootstrap interval: rows are drawn anew, and 2.5 % of the drawn means lie on
either side. Two models are compared row by row, on the rows where both have a value: their mean difference and its
interval, not whether two intervals overlap, for rows differ more from each other than models do. "cannot be told apart"
is no proof of equality: the interval says how large a difference could have stayed hidden.

in:   results/<profile>/base_model/, results/<profile>/finetune/{lora,qlora}/adapter/, dataset.file,
      results/<profile>/dataset/corrected/validation.jsonl
out:  results/<profile>/style/answers.jsonl  one row a prompt: reference, base, lora, qlora, and whose answer was cut
      results/<profile>/style/style.json     every measure: means, distances from the reference, differences, verdicts
      results/<profile>/style/style.md       the same as tables
"""

import json
import statistics
from dataclasses import dataclass

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, load_yaml, need, read_json, read_params, results, run
from lib.model.answer import continuations, with_adapter
from lib.model.load import load_to_answer
from lib.text.rows import read_rows, write_jsonl
from lib.text.style_measures import MEASURES, Answer, language
from lib.training.config import METHODS, check_both_methods

MODELS = {"base": "base", "lora": "LoRA", "qlora": "QLoRA"}
GROUPS = {"dataset": "whole dataset", "reference": "reference answers", **MODELS}
# LoRA against the base shows whether a measure can see a difference where there should be one.
PAIRS = {
    "lora_minus_qlora": ("lora", "qlora"),
    "lora_minus_base": ("lora", "base"),
    "qlora_minus_base": ("qlora", "base"),
}
SAME, DIFFERS, NOT_MEASURED = "cannot be told apart", "differs", "not measured"
LOSSES = 8  # rows whose logits exist at once
ROWS_NEEDED = 6  # for an interval: five rows all differ the same way in 6 % of cases by chance alone (2 of 2^5)
RANDOM = "The weights are random: style and loss mean nothing here, and no difference is judged."
REMARKS = [
    "Each verdict stands at 95 %: where nothing differs, about one in twenty says differs all the same.",
    "A measure that cannot tell LoRA from the base says little about LoRA and QLoRA.",
    "An interval without width means that all rows have the same value, not that the mean is known exactly.",
]
LOSS = """Mean loss in nats per token of the held-out completion and its end of sequence. The mean over rows is weighted
by their tokens, so that it is the loss of a token, not of a row."""


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

    tokenizer.padding_side, found = "right", []
    for begin in range(0, len(rows), LOSSES):
        part = rows[begin : begin + LOSSES]
        starts = [len(tokenizer(row["prompt"])["input_ids"]) for row in part]
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in part]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            logits = model(**batch).logits
        for n, (start, length) in enumerate(zip(starts, batch.attention_mask.sum(1).tolist(), strict=True)):
            told, labels = logits[n, start - 1 : length - 1].float(), batch.input_ids[n, start:length]
            found.append((torch.nn.functional.cross_entropy(told, labels).item(), length - start))
    return found


def examine(model, tokenizer, rows, p):
    """The held-out rows' (Answers, losses, tokens of the completions)."""
    answers = ask(model, tokenizer, [row["prompt"] for row in rows], p)
    losses, tokens = zip(*completion_losses(model, tokenizer, rows), strict=True)
    return answers, losses, tokens


def interval(values, weights, p):
    """{"rows", "mean", "low", "high"} of the values that are not None; low and high are None below ROWS_NEEDED rows."""
    import numpy

    known = [pair for pair in zip(values, weights, strict=True) if pair[0] is not None]
    if not known:
        return {"rows": 0, "mean": None, "low": None, "high": None}
    values, weights = numpy.array(known, dtype=float).T
    low = high = None
    if len(known) >= ROWS_NEEDED:
        drawn = numpy.random.default_rng(p.seed).integers(len(known), size=(p.bootstrap_samples, len(known)))
        means = (values * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
        # Rounded, and + 0.0 against -0.0: a sum that should be 0 and comes out as -1e-17 must not decide a verdict.
        low, high = (numpy.quantile(means, [0.025, 0.975]).round(12) + 0.0).tolist()
    return {"rows": len(known), "mean": float((values * weights).sum() / weights.sum()), "low": low, "high": high}


def difference(first, second, weights, p):
    """The interval of first - second over the rows where both have a value, and the verdict."""
    pairs = zip(first, second, strict=True)
    found = interval([None if None in pair else pair[0] - pair[1] for pair in pairs], weights, p)
    if found["low"] is None:
        return {**found, "verdict": NOT_MEASURED}
    return {**found, "verdict": SAME if found["low"] <= 0 <= found["high"] else DIFFERS}


def distance(mean, reference, dataset):
    """(mean - reference) in standard deviations of the dataset's answers (Glass's delta); None if these are alike."""
    known = [value for value in dataset if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else 0
    return None if None in (mean, reference) or not deviation else (mean - reference) / deviation


def scored(definition, values, weights, p):
    """One measure: `values` holds a value or None a row for each of GROUPS, `weights` those of the held-out rows."""
    means = {who: interval(v, [1] * len(v) if who == "dataset" else weights, p) for who, v in values.items()}
    reference, dataset = means.get("reference", {}).get("mean"), values.get("dataset", [])
    return {
        "definition": " ".join(definition.split()),
        "means": means,
        "distances": {who: distance(means[who]["mean"], reference, dataset) for who in MODELS},
        "differences": {name: difference(values[a], values[b], weights, p) for name, (a, b) in PAIRS.items()},
    }


def score(answers, losses, tokens, p):
    """{measure: entry} of the `answers` of GROUPS, and of the `losses` of MODELS a completion of `tokens` tokens.

    The measures are those of the dataset's language.
    """
    found = {"completion_loss": scored(LOSS, losses, tokens, p)}
    for measure in MEASURES[language([answer.text for answer in answers["dataset"]])]:
        values = {who: [measure(answer) for answer in given] for who, given in answers.items()}
        found[measure.__name__] = scored(measure.__doc__, values, [1] * len(tokens), p)
    return found


def withdraw(measures):
    """Every verdict becomes "not measured": of random weights there is nothing to judge."""
    for entry in measures.values():
        for found in entry["differences"].values():
            found["verdict"] = NOT_MEASURED


def verdicts(measures, pair):
    """{verdict: [measure, ...]} of one pair, with all three verdicts."""
    given = {name: entry["differences"][pair]["verdict"] for name, entry in measures.items()}
    return {one: [name for name in given if given[name] == one] for one in (SAME, DIFFERS, NOT_MEASURED)}


def style_differs(judged):
    """How many measures of style differ in one pair's `verdicts`; None where none could be judged. The loss is none."""
    seen = [name for verdict in (SAME, DIFFERS) for name in judged[verdict] if name != "completion_loss"]
    return len([name for name in seen if name in judged[DIFFERS]]) if seen else None


def cell(found, rows, sign=""):
    """A mean as a table's cell: 0.13 [0.12, 0.14]; with the rows behind it where these are not all."""
    if found["mean"] is None:
        return "—"
    few = "" if found["rows"] == rows else f" ({found['rows']} rows)"
    ends = "no interval" if found["low"] is None else f"[{found['low']:{sign}.3g}, {found['high']:{sign}.3g}]"
    return f"{found['mean']:{sign}.3g} {ends}{few}"


def as_markdown(data):
    """The result as tables: means, differences with verdicts, distances, definitions."""

    def table(head, row):
        return [f"| measure | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"] + [
            f"| {name} | {' | '.join(row(entry))} |" for name, entry in data["measures"].items()
        ]

    def means(entry):
        rows = {"dataset": data["dataset_rows"]}
        found = [(who, entry["means"].get(who)) for who in GROUPS]
        return [cell(one, rows.get(who, data["prompts"])) if one else "—" for who, one in found]

    def differences(entry):
        found = entry["differences"]
        return [text for name in PAIRS for text in (cell(found[name], data["prompts"], "+"), found[name]["verdict"])]

    def distances(entry):
        return ["—" if entry["distances"][who] is None else f"{entry['distances'][who]:+.2f}" for who in MODELS]

    pairs = [text for a, b in PAIRS.values() for text in (f"{MODELS[a]} − {MODELS[b]}", "verdict")]
    how = f"temperature {data['temperature']}, top-p {data['top_p']}" if data["temperature"] else "greedy"
    lines = [f"{data['model']}: {data['prompts']} held-out prompts, {how}, at most {data['max_new_tokens']} tokens."]
    lines += ["", *(f"- {remark}" for remark in data["remarks"])]
    lines += ["", "Mean and 95 % interval:", "", *table(GROUPS.values(), means)]
    lines += ["", "Difference, row by row, and 95 % interval:", "", *table(pairs, differences)]
    lines += ["", "Distance from the reference answers, in standard deviations of the dataset's answers:", ""]
    lines += [*table(MODELS.values(), distances), ""]
    lines += [f"- {name}: {entry['definition']}" for name, entry in data["measures"].items()]
    return "\n".join(lines) + "\n"


def main():
    p = read_params(Style)
    base = read_json(results("base_model") / "metrics.json")
    dataset = [Answer(row["output"], False) for row in read_rows(load_yaml("params.yaml")["dataset"]["file"])]
    rows = held_out(results("dataset") / "corrected" / "validation.jsonl", p)

    check_both_methods(load_yaml("params.yaml")["finetune"]["variants"])
    for method in METHODS:
        need(results("finetune") / method / "adapter", f"finetune@{method}")

    found = {}
    for method in ("lora", "qlora"):
        model, tokenizer = load_to_answer(results("base_model") / "model", method)
        if method == "lora":
            found["base"] = examine(model, tokenizer, rows, p)
            print(f"style: the base model has answered {len(rows)} prompts", flush=True)
        model = with_adapter(model, results("finetune") / method / "adapter")
        found[method] = examine(model, tokenizer, rows, p)
        print(f"style: {method} has answered", flush=True)

    answers = {"dataset": dataset, "reference": [Answer(row["completion"].strip(), False) for row in rows]}
    answers |= {who: found[who][0] for who in MODELS}
    measures = score(answers, {who: found[who][1] for who in MODELS}, found["base"][2], p)
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
