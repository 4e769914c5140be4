"""
The validity of served points, as blocks (lib/report/page.py): which checks each repeat passed.
"""


def validity(data):
    """Of every server a fold: each check at each load, and the reason behind each that did not pass."""
    for server in dict.fromkeys(point["server"] for point in data["points"]):
        points = [point for point in data["points"] if point["server"] == server]
        verdicts, reasons = {}, {}
        for point in points:
            for check in point["checks"]:
                verdicts.setdefault(check["check"], {}).setdefault(point["load"], []).append(check["verdict"])
                if check["verdict"] != "pass":
                    why = (check["check"], check["verdict"], check["reason"])
                    reasons.setdefault(why, {}).setdefault(point["load"], []).append(str(check["repeat"]))
        if not verdicts:
            continue
        loads = list(dict.fromkeys(point["load"] for point in points))
        rows = [[check, *(verdict_cell(at.get(load, [])) for load in loads)] for check, at in verdicts.items()]
        every = [check["verdict"] for point in points for check in point["checks"]]
        counts = ", ".join(f"{every.count(verdict)} {verdict}" for verdict in ("pass", "fail", "unknown"))
        inner = [("table", ["check", *loads], rows)]
        if reasons:
            listed = [
                [*why, "; ".join(f"{load} ({', '.join(at)})" for load, at in where.items())]
                for why, where in sorted(reasons.items())
            ]
            inner.append(("table", ["check", "verdict", "reason", "load (repeats)"], listed))
        yield ("fold", f"Validity of {server}: {counts}", inner)


def verdict_cell(verdicts):
    """The verdicts of all repeats in a word."""
    if not verdicts:
        return "—"
    worst = next(verdict for verdict in ("fail", "unknown", "pass") if verdict in verdicts)
    count = verdicts.count(worst)
    return worst if count == len(verdicts) else f"{worst} ({count} of {len(verdicts)})"
