"""
The report's chapter on fine-tuning, as blocks (lib/report/page.py): time and loss, the writeup's string beside the
corrected one, and what was proven; how the variants compare stands in lib/report/training_speed.py.
"""

from lib.claims.format import show
from lib.claims.runs import optional
from lib.report import plots
from lib.report.result_files import METHODS, folders, not_measured, slug, variants
from lib.report.training_speed import scaling, seeds, speed
from lib.report.training_variants import RECIPES, packs, set_apart, steps_of

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
SHOWN_TOKENS = 24


def finetuning(ledger, claims):
    """Time and memory beside the published figures, and the loss curves."""
    yield ("heading", 2, "Fine-tuning")
    rows = published_training(claims)
    measured = False
    for name, folder, _ in folders(ledger):
        by_variant = variants(folder)
        measured |= bool(by_variant)
        for variant, metrics in by_variant.items():
            if "-memory-" in variant:  # a few steps for the table of predicted memory
                continue
            cells = [show(metrics.get(key)) for key in TRAINING.values()]
            peak = show(metrics.get("memory", {}).get("process_peak_mib"))
            rows.append([name, variant, metrics.get("model", "—"), *cells, peak])
    if not measured:
        yield not_measured("dvc repro finetune@lora finetune@qlora")
    yield ("table", ["run", "variant", "model", *TRAINING, "peak MiB"], rows)
    for name, folder, _ in folders(ledger):
        by_variant = variants(folder)
        yield from loss_figures(name, folder, by_variant)
        yield from speed(name, by_variant)
        yield from scaling(name, folder, by_variant)
        yield from seeds(name, folder, by_variant)
        yield from templates(name, folder, by_variant)
        yield from proven(name, by_variant)


def published_training(claims):
    """The table rows of the published figures."""
    steps, trainable, low = (claims[name]["value"] for name in ("lora-checkpoint", "lora-trainable", "lora-memory-low"))
    rows = []
    for method, high in (("lora", claims["lora-memory-high"]["value"]), ("qlora", claims["qlora-memory"]["value"])):
        cells = [show(steps), show(claims[f"{method}-wall"]["value"]), *["—"] * 5, show(trainable)]
        peak = f"{low:,} to {high:,}" if method == "lora" else show(high)
        rows.append(["published", METHODS[method], "ELYZA 7B, H100", *cells, peak])
    return rows


def loss_figures(name, folder, by_variant):
    """One figure for all variants of equally many steps: the learning rate's course depends on their number."""
    by_steps, apart = {}, set_apart(by_variant)
    for variant, metrics in by_variant.items():
        if variant not in apart and not packs(metrics) and (rows := steps_of(folder, variant)):
            by_steps.setdefault(metrics.get("optimizer_steps"), {})[variant] = rows
    for steps, curves in by_steps.items():
        figure = slug(f"loss-{steps}", name)
        random = any(by_variant[variant].get("weights") == "random" for variant in curves)
        meaning = " Random weights: only the curves' agreement means something." if random else ""
        caption = f"Training and validation loss over {show(steps)} steps: {name}.{meaning}"
        yield ("figure", figure, plots.losses(figure, curves), caption)


def templates(name, folder, by_variant):
    """One row of the data under the writeup's string and under the corrected one, and what each training learned."""
    data = optional(folder / "dataset/metrics.json")
    samples, template = data.get("sample", {}), data.get("template")
    if "published" not in samples or template not in samples:
        return
    yield ("heading", 3, f"The writeup's string and the corrected one: {name}")
    rows = []
    for string, key in (("published", "published"), ("corrected", template)):
        ids = samples[key]["token_ids"]
        losses = [
            f"{variant} {show(metrics.get('eval_loss_best'))}"
            for variant, metrics in by_variant.items()
            if metrics.get("settings", {}).get("template") == string
            and variant.lstrip("q").removeprefix("lora") in RECIPES
        ]
        shown = " ".join(map(str, ids[:SHOWN_TOKENS])) + (" …" if len(ids) > SHOWN_TOKENS else "")
        text = f"`{samples[key]['text']}`"
        rows.append([f"{string} ({key})", str(samples[key]["leading_bos"]), shown, text, ", ".join(losses) or "—"])
    yield ("table", ["template", "leading BOS", "first token ids", "text", "best validation loss"], rows)


def proven(name, by_variant):
    """What the settings did, read from the trainer before the first step."""
    rows = [
        [variant, *(show(metrics["proofs"].get(key)) for key in PROOFS.values())]
        for variant, metrics in by_variant.items()
        if "proofs" in metrics
    ]
    if not rows:
        return
    inner = [("table", ["variant", *PROOFS], rows)]
    if any(m["proofs"].get("checkpointing_modules") and not m["proofs"].get("trainer_says_checkpointing", True)
           for m in by_variant.values() if "proofs" in m):  # fmt: skip
        why = (
            "The trainer says no under QLoRA although checkpointing is on: TRL 0.25 hands the setting to peft, which "
            "switches it on in the modules, and then clears its own flag. The modules count."
        )
        inner.append(("text", why))
    yield ("fold", f"Proof that the settings took effect: {name}", inner)
