"""
The variants of a run's fine-tuning, for the report's chapter on it: which of them are one recipe, which differ in one
setting alone, and their steps.
"""

import csv

# What a run is compared with: the recipe itself, whole or stopped early.
RECIPES = ("", "-short", "-published")
# Settings that say when to stop and how often to look: no part of a step.
STOPPING = ("max_steps", "eval_steps", "logging_steps", "workers")


def packs(metrics):
    """True for a variant that cuts the text into pieces: it trains other sequences, so its losses compare with none."""
    return metrics.get("settings", {}).get("packing", 0) > 0


def recipe_of(by_variant, method):
    """The variant of a run that is the recipe itself, whole or stopped early; None without one."""
    return next((f"{method}{end}" for end in ("-short", "-published", "") if f"{method}{end}" in by_variant), None)


def groups(by_variant, first, *others):
    """Lists of variants of one method, as {variant: metrics}, that differ in the settings named and in no other; no two
    of a list have the same `first`, and it stands in its order."""
    by_rest = {}
    for variant, metrics in by_variant.items():
        settings = {"gpus": 1, "sharded": False} | metrics.get("settings", {})  # runs before there were these settings
        if first not in settings or "proofs" not in metrics:
            continue
        rest = {key: value for key, value in settings.items() if key not in (first, *others)}
        key = repr([metrics["method"], metrics["proofs"]["effective_batch_rows"], sorted(rest.items())])
        by_rest.setdefault(key, {}).setdefault(settings[first], variant)
    return [{of[n]: by_variant[of[n]] for n in sorted(of)} for of in by_rest.values() if len(of) > 1]


def gpu_groups(by_variant):
    """Groups of the same step on one GPU and on several."""
    several = groups(by_variant, "gpus", "micro_batch", "accumulation")
    return [group for group in several if next(iter(group.values()))["settings"].get("gpus", 1) == 1]


def set_apart(by_variant):
    """The variants with a table of their own: one step on one GPU and on several, and the same with other seeds."""
    several = {variant for group in gpu_groups(by_variant) for variant in group}
    return several | {variant for group in groups(by_variant, "seed") for variant in list(group)[1:]}


def steps_of(folder, variant):
    """The steps of a fine-tuning as numbers; None where a step logged nothing."""
    path = folder / "finetune" / variant / "steps.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
