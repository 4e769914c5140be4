"""
The report's chapter on fine-tuning, as blocks (stages/page.py): time and loss, what a faster step changes, several
GPUs, several seeds, the writeup's string beside the corrected one, what was proven, and style as a number.
"""

import csv

from stages import figures
from stages.claims import show
from stages.runs import optional
from stages.sections import METHODS, folders, not_measured, slug, variants

# Columns of the tables: heading and key in a result file.
TRAINING = {
    "steps": "optimizer_steps",
    "wall s": "wall_seconds",
    "s/step": "seconds_per_step_median",
    "first training loss": "train_loss_first",
    "last": "train_loss_last",
    "first validation loss": "eval_loss_first",
    "best": "eval_loss_best",
    "trainable": "trainable_parameters",
}
PROOFS = {
    "4-bit modules": "four_bit_modules",
    "modules with checkpointing": "checkpointing_modules",
    "the trainer says": "trainer_says_checkpointing",
    "leading BOS": "leading_bos",
    "prompt tokens learned": "prompt_tokens_learned",
    "ends with EOS": "ends_with_eos",
    "optimiser": "optimizer",
    "rows a step": "effective_batch_rows",
    "seed": "seed",
}
# What a run is compared with: the recipe itself, whole or stopped early.
RECIPES = ("", "-short", "-published")
# Settings that say when to stop and how often to look: no part of a step.
STOPPING = ("max_steps", "eval_steps", "logging_steps", "workers")
SHOWN_TOKENS = 24


def finetuning(ledger, claims):
    """Time and memory beside the published figures, and the loss curves."""
    yield ("heading", 2, "Fine-tuning")
    rows = published_training(claims)
    measured = False
    for name, folder, _ in folders(ledger):
        found = variants(folder)
        measured |= bool(found)
        for variant, metrics in found.items():
            if "-memory-" in variant:  # a few steps for the table of predicted memory
                continue
            cells = [show(metrics.get(key)) for key in TRAINING.values()]
            peak = show(metrics.get("memory", {}).get("process_peak_mib"))
            rows.append([name, variant, metrics.get("model", "—"), *cells, peak])
    if not measured:
        yield not_measured("dvc repro finetune@lora finetune@qlora")
    yield ("table", ["run", "variant", "model", *TRAINING, "peak MiB"], rows)
    for name, folder, _ in folders(ledger):
        found = variants(folder)
        yield from loss_figures(name, folder, found)
        yield from speed(name, found)
        yield from scaling(name, folder, found)
        yield from seeds(name, folder, found)
        yield from arms(name, folder, found)
        yield from proven(name, found)


def published_training(claims):
    """The table rows of the published figures."""
    steps, trainable, low = (claims[name]["value"] for name in ("lora-checkpoint", "lora-trainable", "lora-memory-low"))
    rows = []
    for method, high in (("lora", claims["lora-memory-high"]["value"]), ("qlora", claims["qlora-memory"]["value"])):
        cells = [show(steps), show(claims[f"{method}-wall"]["value"]), *["—"] * 5, show(trainable)]
        peak = f"{low:,} to {high:,}" if method == "lora" else show(high)
        rows.append(["published", METHODS[method], "ELYZA 7B, H100", *cells, peak])
    return rows


def packs(metrics):
    """True for a variant that cuts the text into pieces: it trains other sequences, so its losses compare with none."""
    return metrics.get("settings", {}).get("packing", 0) > 0


def loss_figures(name, folder, found):
    """One figure for all variants of equally many steps: the learning rate's course depends on their number."""
    by_steps, apart = {}, set_apart(found)
    for variant, metrics in found.items():
        if variant not in apart and not packs(metrics) and (rows := steps_of(folder, variant)):
            by_steps.setdefault(metrics.get("optimizer_steps"), {})[variant] = rows
    for steps, curves in by_steps.items():
        figure = slug(f"loss-{steps}", name)
        random = any(found[variant].get("weights") == "random" for variant in curves)
        meaning = " Random weights: only the curves' agreement means something." if random else ""
        caption = f"Training and validation loss over {show(steps)} steps: {name}.{meaning}"
        yield ("figure", figure, figures.losses(figure, curves), caption)


def loss_rows(path):
    """The steps of a fine-tuning as numbers; None where a step logged nothing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def recipe_of(found, method):
    """The variant of a run that is the recipe itself, whole or stopped early; None without one."""
    return next((f"{method}{end}" for end in ("-short", "-published", "") if f"{method}{end}" in found), None)


def groups(found, first, *others):
    """Lists of variants of one method, as {variant: metrics}, that differ in the settings named and in no other; no two
    of a list have the same `first`, and it stands in its order."""
    by_rest = {}
    for variant, metrics in found.items():
        settings = {"gpus": 1, "sharded": False} | metrics.get("settings", {})  # runs before there were these settings
        if first not in settings or "proofs" not in metrics:
            continue
        rest = {key: value for key, value in settings.items() if key not in (first, *others)}
        key = repr([metrics["method"], metrics["proofs"]["effective_batch_rows"], sorted(rest.items())])
        by_rest.setdefault(key, {}).setdefault(settings[first], variant)
    return [{of[n]: found[of[n]] for n in sorted(of)} for of in by_rest.values() if len(of) > 1]


def gpu_groups(found):
    """Groups of the same step on one GPU and on several."""
    several = groups(found, "gpus", "micro_batch", "accumulation")
    return [group for group in several if next(iter(group.values()))["settings"].get("gpus", 1) == 1]


def set_apart(found):
    """The variants with a table of their own: one step on one GPU and on several, and the same with other seeds."""
    several = {variant for group in gpu_groups(found) for variant in group}
    return several | {variant for group in groups(found, "seed") for variant in list(group)[1:]}


def speed(name, found):
    """The faster variants beside the recipe of the same run: one machine, the same rows, the same updates."""
    rows, differences = [], []
    apart = set_apart(found)
    for method in ("lora", "qlora"):
        recipe = recipe_of(found, method)
        for variant, metrics in found.items():
            arm = variant.removeprefix(method)
            faster = variant.startswith(method) and arm not in RECIPES and not arm.startswith("-memory")
            faster = faster and variant not in apart
            if recipe and (faster or variant == recipe):
                rows.append([variant, *speed_cells(metrics, found[recipe])])
            if recipe and faster:
                differences.append([variant, changed(metrics["settings"], found[recipe]["settings"])])
    if not differences:
        return
    yield ("heading", 3, f"How fast: {name}")
    yield (
        "text",
        "The ratio is the recipe's median step over the variant's, of the same method in the same run. Utilisation: "
        "the model's operations (4 a weight and token, attention left out) over what the card does in a large matrix "
        "product, measured after each training. ≈ marks a whole training that is extrapolated from its steps. The "
        "tuned variants take the recipe's steps with its rows, rank, dropout and learning rates; what is not the same "
        "is the order in which sums are made and dropout is drawn, and that AdamW keeps its moments in fp32 instead of "
        "8 bits.",
    )
    header = ["variant", "s/step", "ratio", "tokens/s", "utilisation", "peak MiB", "whole training s", "best loss"]
    yield ("table", header, rows)
    yield ("fold", "What differs from the recipe", [("table", ["variant", "settings"], differences)])


def speed_cells(metrics, recipe):
    """Time, throughput and memory of one variant; the ratio only where a step trains the same rows."""
    step, used = metrics.get("seconds_per_step_median"), metrics.get("utilisation")
    ratio = f"{recipe['seconds_per_step_median'] / step:.1f}x" if step and not packs(metrics) else "—"
    return [
        show(step),
        ratio,
        show(metrics.get("tokens_per_second_median") or metrics.get("tokens_per_second")),
        "—" if used is None else f"{used:.1%}",
        show(metrics["memory"]["process_peak_mib"]),
        whole_training(metrics),
        "—" if packs(metrics) or metrics.get("eval_loss_best") is None else f"{metrics['eval_loss_best']:.3f}",
    ]


def whole_training(metrics):
    """Seconds of all epochs with validation; from the step time, and marked so, where the run was stopped early."""
    settings, step = metrics["settings"], metrics.get("seconds_per_step_median")
    if packs(metrics) or not step:
        return "—"
    if not settings.get("max_steps"):
        return show(metrics.get("train_seconds"))
    rows_a_step = metrics["proofs"]["effective_batch_rows"]
    return f"≈ {settings['epochs'] * -(-metrics['train_rows'] // rows_a_step) * step:,.0f}"


def changed(settings, recipe):
    """The settings that differ from the recipe's, as `micro_batch 1 → 32`."""
    keys = [key for key in settings if key not in STOPPING and settings[key] != recipe.get(key)]
    return ", ".join(f"{key} {recipe.get(key, '—')} → {settings[key]}" for key in keys)


def scaling(name, folder, found):
    """The same optimiser step on one GPU and on several."""
    for group in gpu_groups(found):
        one = next(iter(group.values()))
        if not all(metrics["seconds_per_step_median"] for metrics in group.values()):
            continue
        yield ("heading", 3, f"On several GPUs: {name}")
        exchanged = one["trainable_parameters"] * 4 / 1e6
        yield (
            "text",
            f"The same step of {one['proofs']['effective_batch_rows']} rows, shared out among the GPUs, each of which "
            "holds the whole model. Speed-up: the median step of one GPU over this one's; efficiency: the speed-up "
            "over the number of GPUs. The median passes over single slow steps (the slowest one after the first "
            "stands beside it); tokens/s and utilisation, from one log line to the next, count them. What the "
            f"processes exchange in a step are the adapter's gradients, {exchanged:,.0f} MB. Where the time of a step "
            "goes was not measured beyond this table: how much of it is launching kernels, exchanging gradients or "
            "waiting for the slowest process is not known.",
        )
        header = ["variant", "GPUs", "s/step", "speed-up", "efficiency", "slowest step s", "tokens/s", "utilisation",
                  "tokens a GPU and step", "peak MiB of the first GPU"]  # fmt: skip
        yield ("table", header, [scaling_row(folder, variant, metrics, one) for variant, metrics in group.items()])
        keys = "seconds_per_step_median", "tokens_per_second_median"
        points = [(m["settings"].get("gpus", 1), *(m.get(key) for key in keys)) for m in group.values()]
        if all(rate for _, _, rate in points):
            figure = slug(f"scaling-{next(iter(group))}", name)
            caption = f"One optimiser step on several GPUs: {name}. Ideal: each GPU adds as much as the first."
            yield ("figure", figure, figures.scaling(figure, points), caption)


def scaling_row(folder, variant, metrics, one):
    """One number of GPUs as table cells; one: the metrics of a single GPU."""
    gpus, step = metrics["settings"].get("gpus", 1), metrics["seconds_per_step_median"]
    faster, used = one["seconds_per_step_median"] / step, metrics.get("utilisation")
    tokens = metrics["trained_tokens"] and round(metrics["trained_tokens"] / metrics["optimizer_steps"] / gpus)
    slowest = max((row["seconds"] for row in steps_of(folder, variant)[1:] if row["seconds"]), default=None)
    return [
        variant,
        str(gpus),
        show(step),
        f"{faster:.2f}x",
        f"{faster / gpus:.0%}",
        show(slowest),
        show(metrics.get("tokens_per_second_median")),
        "—" if used is None else f"{used:.1%}",
        show(tokens),
        show(metrics["memory"]["process_peak_mib"]),
    ]


def seeds(name, folder, found):
    """The validation losses of the same fine-tuning with other seeds, and how far it is from the recipe."""
    for group in groups(found, "seed"):
        losses = {
            variant: {int(row["step"]): row["eval_loss"] for row in steps_of(folder, variant) if row["eval_loss"]}
            for variant in group
        }
        steps = sorted(set.intersection(*(set(of) for of in losses.values())))
        if not steps:
            continue
        yield ("heading", 3, f"What another seed changes: {name}")
        yield (
            "text",
            "Another seed draws another order of the rows, other first weights of the adapter and other dropout. "
            "Spread: the largest loss less the smallest. " + from_recipe(folder, found, next(iter(group))),
        )
        rows = [
            [variant, str(metrics["settings"]["seed"]), *(f"{losses[variant][step]:.3f}" for step in steps)]
            for variant, metrics in group.items()
        ]
        spread = [max(of[step] for of in losses.values()) - min(of[step] for of in losses.values()) for step in steps]
        rows.append(["spread", "—", *(f"{size:.3f}" for size in spread)])
        header = ["variant", "seed", *(f"validation loss after {step} steps" for step in steps)]
        yield ("table", header, rows)


def from_recipe(folder, found, variant):
    """How far a variant's losses are from the recipe's with the same seed, where both took equally many steps."""
    method, settings = found[variant]["method"], found[variant]["settings"]
    recipe = recipe_of(found, method)
    steps = found.get(recipe, {}).get("optimizer_steps")
    for twin, metrics in found.items():
        other = metrics.get("settings", {})
        same = metrics.get("method") == method and all(
            other.get(k) == settings[k] for k in settings if k not in STOPPING
        )
        if not same or metrics["optimizer_steps"] != steps or other["seed"] != found[recipe]["settings"]["seed"]:
            continue
        ours, theirs = ({row["step"]: row["loss"] for row in steps_of(folder, one)} for one in (twin, recipe))
        apart = max(abs(ours[step] - theirs[step]) for step in ours if ours[step] and theirs.get(step))
        ends = [one["eval_loss_best"] for one in (metrics, found[recipe])]
        return (
            f"Over the recipe's own {steps} steps, with its seed, {twin} ends {abs(ends[0] - ends[1]):.3f} from it "
            f"(validation loss {ends[0]:.3f}, recipe {ends[1]:.3f}), and no step's training loss is further than "
            f"{apart:.3f} from the recipe's."
        )
    return ""


def steps_of(folder, variant):
    return loss_rows(folder / "finetune" / variant / "steps.csv")


def arms(name, folder, found):
    """One row of the data under the writeup's string and under the corrected one, and what each arm learned."""
    data = optional(folder / "dataset/metrics.json")
    samples, template = data.get("sample", {}), data.get("template")
    if "published" not in samples or template not in samples:
        return
    yield ("heading", 3, f"The writeup's string and the corrected one: {name}")
    rows = []
    for arm, key in (("published", "published"), ("corrected", template)):
        ids = samples[key]["token_ids"]
        losses = [
            f"{variant} {show(metrics.get('eval_loss_best'))}"
            for variant, metrics in found.items()
            if metrics.get("settings", {}).get("template") == arm
            and variant.lstrip("q").removeprefix("lora") in RECIPES
        ]
        shown = " ".join(map(str, ids[:SHOWN_TOKENS])) + (" …" if len(ids) > SHOWN_TOKENS else "")
        text = f"`{samples[key]['text']}`"
        rows.append([f"{arm} ({key})", str(samples[key]["leading_bos"]), shown, text, ", ".join(losses) or "—"])
    yield ("table", ["arm", "leading BOS", "first token ids", "text", "best validation loss"], rows)


def proven(name, found):
    """What the settings did, read from the trainer before the first step."""
    rows = [
        [variant, *(show(metrics["proofs"].get(key)) for key in PROOFS.values())]
        for variant, metrics in found.items()
        if "proofs" in metrics
    ]
    if not rows:
        return
    inner = [("table", ["variant", *PROOFS], rows)]
    if any(m["proofs"].get("checkpointing_modules") and not m["proofs"].get("trainer_says_checkpointing", True)
           for m in found.values() if "proofs" in m):  # fmt: skip
        why = (
            "The trainer says no under QLoRA although checkpointing is on: TRL 0.25 hands the setting to peft, which "
            "switches it on in the modules, and then clears its own flag. The modules count."
        )
        inner.append(("text", why))
    yield ("fold", f"Proof that the settings took effect: {name}", inner)


def style(ledger):
    """Style scores of the held-out answers: base, LoRA and QLoRA beside the data set's own."""
    yield ("heading", 2, "Style")
    scored = [(name, data) for name, folder, _ in folders(ledger) if (data := optional(folder / "style/style.json"))]
    if not scored:
        yield not_measured("dvc repro style")
    header = ["measure", "dataset", "reference", "base", "LoRA", "QLoRA", "LoRA − QLoRA", "verdict", "LoRA − base"]
    for name, data in scored:
        yield ("text", f"{name}: {data['model']}, {data['prompts']} held-out prompts. {' '.join(data['remarks'])}")
        rows = []
        for measure, entry in data["measures"].items():
            means = [interval(entry["means"].get(who)) for who in ("dataset", "reference", "base", "lora", "qlora")]
            between, control = (entry["differences"].get(f"lora_minus_{other}") or {} for other in ("qlora", "base"))
            verdict = between.get("verdict", "not measured")
            rows.append([measure.replace("_", " "), *means, interval(between), verdict, interval(control)])
        yield ("table", header, rows)
        definitions = [[m.replace("_", " "), e["definition"]] for m, e in data["measures"].items()]
        yield ("fold", "What each measure counts", [("table", ["measure", "definition"], definitions)])


def interval(entry):
    """A mean with its 95 % interval, or a dash; too few rows have no interval."""
    if not entry or entry.get("mean") is None:
        return "—"
    ends = "no interval" if entry["low"] is None else f"[{entry['low']:.3g}, {entry['high']:.3g}]"
    return f"{entry['mean']:.3g} {ends}"
