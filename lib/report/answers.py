"""
The report's sections on answers and on style as a number, as blocks (lib/report/page.py), and the fine-tuning chapter's
opening, which shows both.
"""

from lib.claims.runs import optional
from lib.report import answer_plots
from lib.report.result_files import best_spoken, folders, found_in, not_measured

ENDINGS = tuple(".!?\"'\u201d\u3002\uff01\uff1f\u300d")  # an answer that ends otherwise was cut
SHOWN_ANSWERS = 8


def opening(ledger):
    """The eight prompts before and after, and the measures of style, of this checkout or else of a committed run."""
    yield ("heading", 2, "Before and after")
    answers = best_answers(ledger)
    if not answers:
        yield not_measured("dvc repro chat")
        return
    name, data = answers
    yield ("text", f"{data.get('model', 'A model without a name')}, {name}.{random_words(data)} … marks a cut answer.")
    rows = [
        [entry["prompt"], *(whole(entry.get(who)) for who in ("base", "lora", "qlora"))]
        for entry in data["prompts"][:SHOWN_ANSWERS]
    ]
    yield ("table", ["question", "before", "after LoRA", "after QLoRA"], rows)
    scores = dict(found_in(ledger, "style/style.json")).get(name, {"measures": {}})["measures"]
    who = ("dataset", "base", "lora", "qlora")
    drawn = {
        measure: means
        for measure, entry in scores.items()
        if all((means := entry["means"]).get(source) for source in who)
    }
    if drawn:
        caption = (
            f"Measures of style of {name}: the dataset, the base model, LoRA and QLoRA, with 95 % intervals. A "
            "training that took over the dataset's manner moves the points to the green line."
        )
        yield ("figure", "style-measures", answer_plots.style_measures("style-measures", drawn), caption)
    yield ("link", "Every measure with its definition, and the answers of all runs", "answers.html")


def all_answers(ledger):
    """[(run, chat.json)] of the runs that have answers."""
    return [(name, data) for name, data in found_in(ledger, "chat/chat.json") if data.get("prompts")]


def best_answers(ledger):
    """(run, chat.json) to show; None without one."""
    return best_spoken(all_answers(ledger))


def random_words(data):
    return " Its weights are random, so the answers mean nothing." if data.get("weights") == "random" else ""


def whole(text):
    """An answer, with … where it was cut, or a dash for none."""
    return "—" if not text else text if text.endswith(ENDINGS) else f"{text} …"


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


def chat(ledger):
    """The answers side by side, of every run that has any."""
    yield ("heading", 2, "Chat")
    answers = all_answers(ledger)
    if not answers:
        yield not_measured("dvc repro chat")
    for name, data in answers:
        yield ("text", f"{name}: {data.get('model', 'a model without a name')}.{random_words(data)}")
        rows = [[entry.get(who) or "—" for who in ("prompt", "base", "lora", "qlora")] for entry in data["prompts"]]
        yield ("table", ["prompt", "base", "LoRA", "QLoRA"], rows)
