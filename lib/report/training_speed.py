"""
What a faster step, several GPUs and another seed change in fine-tuning: sections of the report, as blocks
(lib/report/page.py).
"""

from lib.claims.format import show
from lib.report import plots
from lib.report.result_files import slug
from lib.report.training_variants import RECIPES, STOPPING, gpu_groups, groups, packs, recipe_of, set_apart, steps_of


def speed(name, by_variant):
    """The faster variants beside the recipe of the same run: one machine, the same rows, the same updates."""
    rows, differences = [], []
    apart = set_apart(by_variant)
    for method in ("lora", "qlora"):
        recipe = recipe_of(by_variant, method)
        for variant, metrics in by_variant.items():
            suffix = variant.removeprefix(method)
            faster = variant.startswith(method) and suffix not in RECIPES and not suffix.startswith("-memory")
            faster = faster and variant not in apart
            if recipe and (faster or variant == recipe):
                rows.append([variant, *speed_cells(metrics, by_variant[recipe])])
            if recipe and faster:
                differences.append([variant, changed(metrics["settings"], by_variant[recipe]["settings"])])
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


def scaling(name, folder, by_variant):
    """The same optimiser step on one GPU and on several."""
    for group in gpu_groups(by_variant):
        single = next(iter(group.values()))
        if not all(metrics["seconds_per_step_median"] for metrics in group.values()):
            continue
        yield ("heading", 3, f"On several GPUs: {name}")
        rows, exchanged = single["proofs"]["effective_batch_rows"], single["trainable_parameters"] * 4 / 1e6
        yield (
            "text",
            f"The same step of {rows} rows, shared out among the GPUs, each of which "
            "holds the whole model. Speed-up: the median step of one GPU over this one's; efficiency: the speed-up "
            "over the number of GPUs. The median passes over single slow steps (the slowest one after the first "
            "stands beside it); tokens/s and utilisation, from one log line to the next, count them. What the "
            f"processes exchange in a step are the adapter's gradients, {exchanged:,.0f} MB. Where the time of a step "
            "goes was not measured beyond this table: how much of it is launching kernels, exchanging gradients or "
            "waiting for the slowest process is not known.",
        )
        header = ["variant", "GPUs", "s/step", "speed-up", "efficiency", "slowest step s", "tokens/s", "utilisation",
                  "tokens a GPU and step", "peak MiB of the first GPU"]  # fmt: skip
        yield ("table", header, [scaling_row(folder, variant, metrics, single) for variant, metrics in group.items()])
        keys = "seconds_per_step_median", "tokens_per_second_median"
        points = [(m["settings"].get("gpus", 1), *(m.get(key) for key in keys)) for m in group.values()]
        if all(rate for _, _, rate in points):
            figure = slug(f"scaling-{next(iter(group))}", name)
            caption = f"One optimiser step on several GPUs: {name}. Ideal: each GPU adds as much as the first."
            yield ("figure", figure, plots.scaling(figure, points), caption)


def scaling_row(folder, variant, metrics, single):
    """Table cells of a run on some number of GPUs; single: the metrics of the run on a single GPU."""
    gpus, step = metrics["settings"].get("gpus", 1), metrics["seconds_per_step_median"]
    faster, used = single["seconds_per_step_median"] / step, metrics.get("utilisation")
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


def seeds(name, folder, by_variant):
    """The validation losses of the same fine-tuning with other seeds, and how far it is from the recipe."""
    for group in groups(by_variant, "seed"):
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
            "Spread: the largest loss less the smallest. " + from_recipe(folder, by_variant, next(iter(group))),
        )
        rows = [
            [variant, str(metrics["settings"]["seed"]), *(f"{losses[variant][step]:.3f}" for step in steps)]
            for variant, metrics in group.items()
        ]
        spread = [max(of[step] for of in losses.values()) - min(of[step] for of in losses.values()) for step in steps]
        rows.append(["spread", "—", *(f"{size:.3f}" for size in spread)])
        header = ["variant", "seed", *(f"validation loss after {step} steps" for step in steps)]
        yield ("table", header, rows)


def from_recipe(folder, by_variant, variant):
    """How far a variant's losses are from the recipe's with the same seed, where both took equally many steps."""
    method, settings = by_variant[variant]["method"], by_variant[variant]["settings"]
    recipe = recipe_of(by_variant, method)
    steps = by_variant.get(recipe, {}).get("optimizer_steps")
    for twin, metrics in by_variant.items():
        other = metrics.get("settings", {})
        same = metrics.get("method") == method and all(
            other.get(k) == settings[k] for k in settings if k not in STOPPING
        )
        if not same or metrics["optimizer_steps"] != steps or other["seed"] != by_variant[recipe]["settings"]["seed"]:
            continue
        ours, theirs = ({row["step"]: row["loss"] for row in steps_of(folder, name)} for name in (twin, recipe))
        apart = max(abs(ours[step] - theirs[step]) for step in ours if ours[step] and theirs.get(step))
        ends = [run["eval_loss_best"] for run in (metrics, by_variant[recipe])]
        return (
            f"Over the recipe's own {steps} steps, with its seed, {twin} ends {abs(ends[0] - ends[1]):.3f} from it "
            f"(validation loss {ends[0]:.3f}, recipe {ends[1]:.3f}), and no step's training loss is further than "
            f"{apart:.3f} from the recipe's."
        )
    return ""
