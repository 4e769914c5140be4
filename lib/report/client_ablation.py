"""
The ablation of the load client, as blocks (lib/report/page.py): from the writeup's client to ours, change by change.
"""

from lib.analysis.metrics import RATE
from lib.claims.format import show
from lib.report.page import Grey
from lib.report.serving_points import format_number
from lib.stats import REPEATS_NEEDED

STEP_NUMBERS = (RATE, "ttft_ms_p50")  # what the ablation follows


def ablation(data):
    """From the writeup's client to ours, one change at a time: what each step changes in what is measured."""
    groups = {}
    for step in data["steps"]:
        groups.setdefault((step["server"], step["group"]), []).append(step)
    points = {(p["server"], p["load"].rpartition(" ")[0], p["variant"]): p for p in data["points"]}
    header = ["variant", "what changes", "tokens/s", "by this step", "first token ms", "by this step",
              "between tokens ms", "tokens out", "requests", "valid"]  # fmt: skip
    for (server, group), steps in groups.items():
        measured = [points[server, group, step["variant"]] for step in steps]
        words = f"{server}, {group}: a line changes what it names and keeps what the lines above it changed."
        if min(point["repeats"] for point in measured) < REPEATS_NEEDED:
            words += f" With fewer than {REPEATS_NEEDED} repeats nobody can tell a change from noise."
        yield ("text", words)
        yield ("table", header, [ablation_row(*pair) for pair in zip(steps, measured, strict=True)])


def ablation_row(step, point):
    """One step of the ablation and the point that it gave."""
    cells = []
    for name in STEP_NUMBERS:
        cells += [format_number(point, name), change_cell(step["numbers"][name])]
    row = [step["variant"], "; ".join(step["changes"]) or "—", *cells, format_number(point, "itl_ms_p50")]
    row += [show(point["output_tokens"]), show(point["requests"]), valid_cell(point)]
    return row if point["valid"] else Grey(row)


def change_cell(ratio):
    """A ratio as a change in per cent."""
    if not ratio:
        return "—"
    return f"{ratio['ratio'] - 1:+.1%}" + (" (within the noise)" if ratio["verdict"] == "cannot be told apart" else "")


def valid_cell(point):
    return "yes" if point["valid"] else f"no: {'; '.join(point['invalid_reasons'])}"
