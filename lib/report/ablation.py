"""
The walk from the writeup's client to ours in the report (lib/report/serving.py), one change at a time.
"""

import json

from lib.analysis.compare import SAME_SPEED, compared, noise
from lib.analysis.summary import load_of
from lib.bench.metrics import RATE
from lib.claims.format import show
from lib.report.page import Grey
from lib.report.serving_points import with_interval
from lib.stats import REPEATS_NEEDED

STEPS = (RATE, "ttft_ms_p50")  # what the walk follows
ARM_KEYS = ("endpoint", "prompts", "pinned", "requests_per_stream", "min_requests", "warmup_requests")


def walk(servers):
    """From the writeup's client to ours, one change at a time: what each step changes in what is measured."""
    for server, data in servers.items():
        loads = {}
        for point in data["points"]:
            loads.setdefault(load_of(data, point).rpartition(" ")[0], {})[point["arm"]] = point
        for load, points in loads.items():
            arms = [arm for arm in data["settings"]["arms"] if arm in points]
            floor = {name: noise([{"points": list(points.values())}], name, every=True) for name in STEPS}
            rows = [
                step(data, points[arm], points[before] if before else None, floor)
                for before, arm in zip([None, *arms], arms, strict=False)
            ]
            words = f"{server}, {load}: a line changes what it names and keeps what the lines above it changed."
            if min(len(point["repeats"]) for point in points.values()) < REPEATS_NEEDED:
                words += f" With fewer than {REPEATS_NEEDED} repeats nobody can tell a change from noise."
            yield ("text", words)
            header = ["arm", "what changes", "tokens/s", "by this step", "first token ms", "by this step",
                      "between tokens ms", "tokens out", "requests", "valid"]  # fmt: skip
            yield ("table", header, rows)


def settings_of(data, arm):
    """The client's settings under an arm."""
    settings = data["settings"] | data["settings"]["client_arms"][arm]
    return {name: settings[name] for name in ARM_KEYS}


def step(data, point, before, floor):
    """One row of the walk; before: the point of the row above, None for the first; floor: the noise, by number."""
    now, past = (settings_of(data, one["arm"]) if one else {} for one in (point, before))
    changed = [f"{name} {json.dumps(past[name])} → {json.dumps(now[name])}" for name in past if past[name] != now[name]]
    cells = []
    for name in STEPS:
        # Arms that fail the certificate too: what their flaws do to the figures is the question.
        found = before and compared(point, before, name, floor[name], ("this", "the other"), every=True)
        cells += [with_interval(point, name), changed_by(found)]
    tokens = show(point.get("server_output_tokens") or point.get("output_tokens"))
    row = [point["arm"], "; ".join(changed).replace('"', "") or "—", *cells, with_interval(point, "itl_ms_p50"), tokens]
    row += [show(point["requests"]), "yes" if point["valid"] else f"no: {'; '.join(point['invalid_reasons'])}"]
    return row if point["valid"] else Grey(row)


def changed_by(found):
    """A ratio as a change in per cent."""
    if not found:
        return "—"
    return f"{found['ratio'] - 1:+.1%}" + (" (within the noise)" if found["verdict"] == SAME_SPEED else "")
