"""
The answers of several models as numbers beside the dataset's own: means, distances, differences, verdicts, tables.

A mean over rows stands with its 95 % bootstrap interval: rows are drawn anew, and 2.5 % of the drawn means lie on
either side. Two models are compared row by row, on the rows where both have a value: their mean difference and its
interval, not whether two intervals overlap, for rows differ more from each other than models do. "cannot be told apart"
is no proof of equality: the interval says how large a difference could have stayed hidden.

`p` gives bootstrap_samples and seed. `weights` are those of the rows in a mean, `values` may hold None.
"""

import statistics

from lib.markdown import table
from lib.text.style_measures import MEASURES, language

MODELS = {"base": "base", "lora": "LoRA", "qlora": "QLoRA"}
GROUPS = {"dataset": "whole dataset", "reference": "reference answers", **MODELS}
# LoRA against the base shows whether a measure can see a difference where there should be one.
PAIRS = {
    "lora_minus_qlora": ("lora", "qlora"),
    "lora_minus_base": ("lora", "base"),
    "qlora_minus_base": ("qlora", "base"),
}
SAME, DIFFERS, NOT_MEASURED = "cannot be told apart", "differs", "not measured"
ROWS_NEEDED = 6  # for an interval: five rows all differ the same way in 6 % of cases by chance alone (2 of 2^5)
LOSS = """Mean loss in nats per token of the held-out completion and its end of sequence. The mean over rows is weighted
by their tokens, so that it is the loss of a token, not of a row."""


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
    estimate = interval([None if None in pair else pair[0] - pair[1] for pair in pairs], weights, p)
    if estimate["low"] is None:
        return {**estimate, "verdict": NOT_MEASURED}
    return {**estimate, "verdict": SAME if estimate["low"] <= 0 <= estimate["high"] else DIFFERS}


def distance(mean, reference, dataset):
    """(mean - reference) in standard deviations of the dataset's answers (Glass's delta); None if these are alike."""
    known = [value for value in dataset if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else 0
    return None if None in (mean, reference) or not deviation else (mean - reference) / deviation


def score_measure(definition, values, weights, p):
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
    entries = {"completion_loss": score_measure(LOSS, losses, tokens, p)}
    for measure in MEASURES[language([answer.text for answer in answers["dataset"]])]:
        values = {who: [measure(answer) for answer in given] for who, given in answers.items()}
        entries[measure.__name__] = score_measure(measure.__doc__, values, [1] * len(tokens), p)
    return entries


def withdraw(measures):
    """Every verdict becomes "not measured": of random weights there is nothing to judge."""
    for entry in measures.values():
        for difference in entry["differences"].values():
            difference["verdict"] = NOT_MEASURED


def verdicts(measures, pair):
    """{verdict: [measure, ...]} of one pair, with all three verdicts."""
    given = {name: entry["differences"][pair]["verdict"] for name, entry in measures.items()}
    return {verdict: [name for name in given if given[name] == verdict] for verdict in (SAME, DIFFERS, NOT_MEASURED)}


def style_differs(judged):
    """How many measures of style differ in one pair's `verdicts`; None where none could be judged. The loss is none."""
    seen = [name for verdict in (SAME, DIFFERS) for name in judged[verdict] if name != "completion_loss"]
    return len([name for name in seen if name in judged[DIFFERS]]) if seen else None


def cell(estimate, rows, sign=""):
    """A mean as a table's cell: 0.13 [0.12, 0.14]; with the rows behind it where these are not all."""
    if estimate["mean"] is None:
        return "—"
    few = "" if estimate["rows"] == rows else f" ({estimate['rows']} rows)"
    ends = "no interval" if estimate["low"] is None else f"[{estimate['low']:{sign}.3g}, {estimate['high']:{sign}.3g}]"
    return f"{estimate['mean']:{sign}.3g} {ends}{few}"


def as_markdown(data):
    """The result as tables: means, differences with verdicts, distances, definitions."""

    def by_measure(head, row):
        return table(["measure", *head], [[name, *row(entry)] for name, entry in data["measures"].items()])

    def means(entry):
        rows = {"dataset": data["dataset_rows"]}
        groups = [(who, entry["means"].get(who)) for who in GROUPS]
        return [cell(mean, rows.get(who, data["prompts"])) if mean else "—" for who, mean in groups]

    def differences(entry):
        differences = entry["differences"]
        return [
            text
            for name in PAIRS
            for text in (cell(differences[name], data["prompts"], "+"), differences[name]["verdict"])
        ]

    def distances(entry):
        return ["—" if entry["distances"][who] is None else f"{entry['distances'][who]:+.2f}" for who in MODELS]

    pairs = [text for a, b in PAIRS.values() for text in (f"{MODELS[a]} − {MODELS[b]}", "verdict")]
    how = f"temperature {data['temperature']}, top-p {data['top_p']}" if data["temperature"] else "greedy"
    lines = [f"{data['model']}: {data['prompts']} held-out prompts, {how}, at most {data['max_new_tokens']} tokens."]
    lines += ["", *(f"- {remark}" for remark in data["remarks"])]
    lines += ["", "Mean and 95 % interval:", "", by_measure(GROUPS.values(), means)]
    lines += ["", "Difference, row by row, and 95 % interval:", "", by_measure(pairs, differences)]
    lines += ["", "Distance from the reference answers, in standard deviations of the dataset's answers:", ""]
    lines += [by_measure(MODELS.values(), distances), ""]
    lines += [f"- {name}: {entry['definition']}" for name, entry in data["measures"].items()]
    return "\n".join(lines) + "\n"
