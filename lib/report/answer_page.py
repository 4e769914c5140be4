"""
The report's first page, as blocks (lib/report/page.py): how many claims hold, five findings, this checkout's run, its
answers, what to try next. At most 1,200 words and six figures (tests/unit/test_report_pages.py).
"""

from lib.claims.kinds import UNANSWERED
from lib.claims.runs import OWN_RUN
from lib.report import answer_plots
from lib.report.answers import SHOWN_ANSWERS, best_answers, random_words
from lib.report.findings import findings
from lib.report.result_files import METHODS, folders, not_measured, variants

GROUPS = {
    "holds": ("reproduced", "direction only", "confirmed by source", "estimate agrees"),
    "consistent": ("consistent",),
    "does not hold": (
        "not reproduced", "contradicted by its own source", "refuted by source", "inconsistent", "estimate disagrees",
    ),
    "no answer": UNANSWERED,
    "opinion": ("opinion",),
}  # fmt: skip
ANSWER_LETTERS = 110
NEXT = {
    "Talk to the model": "make chat ADAPTER=lora",
    "Change one number, for example the rank": "containers/run venv:tools dvc exp run -S lora.r=8",
    "See your experiments beside each other": "containers/run venv:tools dvc exp show --only-changed",
    "Load a server yourself": "make serve SERVER=vllm",
    "The writeup's exact shapes, on a GPU of 24 GB": "make reproduce PROFILE=weightless",
    "Keep this run beside the committed ones": "make publish NAME=my-machine",
}


def answer_page(ledger, summary):
    """The whole page."""
    yield ("text", opening(ledger))
    yield from verdicts(ledger)
    yield ("heading", 2, "Five findings")
    yield from findings(ledger, summary)
    yield ("heading", 2, "This run")
    yield from this_run(ledger)
    yield from before_and_after(ledger)
    yield ("heading", 2, "Try next")
    yield ("table", ["to", "command"], [[what, f"`{command}`"] for what, command in NEXT.items()])


def opening(ledger):
    """The texts that are judged."""
    first, *others = ledger["writeups"]
    covers = first["covers"].partition(". ")[0].rstrip(".")
    return (
        f"Judged here: the writeup of {first['publisher']}: {covers}; and {len(others)} other texts on the same tools. "
        'Each published number is run again, or held against a source or arithmetic. "The writeup" is the first.'
    )


def verdicts(ledger):
    """One sentence and one bar."""
    groups = {group: {v: n for v in of if (n := ledger["counts"][v])} for group, of in GROUPS.items()}
    sums = {group: sum(of.values()) for group, of in groups.items()}
    decidable = sum(sums.values()) - sums["opinion"]
    yield ("heading", 2, "Do the published numbers hold?")
    yield (
        "text",
        f"Of {decidable} published numbers and statements that can be decided, {sums['holds']} hold: "
        f"{words(groups['holds'])}. {sums['does not hold']} do not: {words(groups['does not hold'])}. "
        f"{sums['consistent']} are only consistent: they agree with the writeup's other figures, and nothing here "
        f"measured them. {sums['no answer']} have no answer yet. {sums['opinion']} more are opinions.",
    )
    caption = "All claims of the five writeups by verdict."
    yield ("figure", "answer-verdicts", answer_plots.verdict_bar("answer-verdicts", groups), caption)
    yield ("link", f"All {len(ledger['claims'])} claims: search, filter, sort", "claims.html")


def words(counts):
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) or "none"


def this_run(ledger):
    """What this checkout ran, on what, and how long its trainings took."""
    facts = next((facts for name, _, facts in folders(ledger) if name == OWN_RUN), None)
    if not facts:
        yield ("text", "No run of this checkout yet. `make reproduce` runs the pipeline.")
        return
    gpu = "no GPU" if facts["gpu"] == "none" else ", ".join(facts["gpu"])
    machine = f"{facts.get('cpu', '—')}, {facts.get('cores', '—')} cores, {facts.get('memory_gib', '—')} GiB, {gpu}"
    yield ("text", f"Profile {facts.get('profile', '—')}, {facts.get('model', '—')}, on {machine}.")
    rows = [
        [
            METHODS.get(variant, variant),
            *(f"{metrics[key]:,.{digits}f}" if metrics.get(key) is not None else "—"
              for key, digits in (("wall_seconds", 0), ("optimizer_steps", 0), ("eval_loss_best", 2))),
        ]
        for name, folder, _ in folders(ledger) if name == OWN_RUN
        for variant, metrics in variants(folder).items()
    ]  # fmt: skip
    if rows:
        yield ("table", ["training", "seconds", "steps", "best validation loss"], rows)
    yield ("link", "Fine-tuning: loss curves, speed, checks", "finetuning.html")


def before_and_after(ledger):
    """The first eight questions, answered by the base model and with the LoRA adapter, cut short."""
    yield ("heading", 3, "Before and after")
    answers = best_answers(ledger)
    if not answers:
        yield not_measured("dvc repro chat")
        return
    name, data = answers
    yield ("text", f"The first words of {data.get('model', 'a model without a name')}, {name}.{random_words(data)}")
    who = "lora" if any(entry.get("lora") for entry in data["prompts"]) else "qlora"
    rows = [
        [cut(entry.get(key) or "—") for key in ("prompt", "base", who)] for entry in data["prompts"][:SHOWN_ANSWERS]
    ]
    yield ("table", ["question", "before", f"after {METHODS[who]}"], rows)
    yield ("link", "Whole answers, QLoRA's too, and the measures of style", "finetuning.html")


def cut(text):
    """At most ANSWER_LETTERS, ending at a word."""
    if len(text) <= ANSWER_LETTERS:
        return text
    start, space, _ = text[:ANSWER_LETTERS].rpartition(" ")
    return f"{start} …" if space else f"{text[:ANSWER_LETTERS]}…"
