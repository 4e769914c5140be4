"""
The report's section on style as a number, as blocks (lib/report/page.py).
"""

from lib.claims.runs import optional
from lib.report.result_files import folders, found_in, not_measured


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
    answered = [(name, data) for name, data in found_in(ledger, "chat/chat.json") if data.get("prompts")]
    if not answered:
        yield not_measured("dvc repro chat")
    for name, data in answered:
        random = " Its weights are random, so the answers mean nothing." if data.get("weights") == "random" else ""
        yield ("text", f"{name}: {data.get('model', 'a model without a name')}.{random}")
        rows = [[entry.get(who) or "—" for who in ("prompt", "base", "lora", "qlora")] for entry in data["prompts"]]
        yield ("table", ["prompt", "base", "LoRA", "QLoRA"], rows)
