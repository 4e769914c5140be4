"""
The verdicts that changed against the last commit, as lines. docs/verdicts.csv holds the committed ones: those by the
reference runs and by arithmetic alone, so a run of one's own shows here where it decides a claim otherwise.
"""

import csv
import io
import subprocess

FILE = "docs/verdicts.csv"
SHOWN = 10


def as_csv(claims):
    """A line a claim: id, writeup, verdict, evidence."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "writeup", "verdict", "evidence"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(claims)
    return text.getvalue()


def committed():
    """The last commit's docs/verdicts.csv; None without git, without a commit or without the file in it."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{FILE}"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def moved(before, claims):
    """A line for each claim whose verdict is not the committed one, new and dropped claims too."""
    old = {row["id"]: row["verdict"] for row in csv.DictReader(io.StringIO(before))}
    for claim in claims:
        was = old.pop(claim["id"], "new claim")
        if was != claim["verdict"]:
            yield f"{claim['id']}: {was} -> {claim['verdict']}" + (f" ({claim['run']})" if claim["run"] else "")
    yield from (f"{claim}: {was} -> claim removed" for claim, was in old.items())


def as_text(before, claims):
    """The last lines of `make report`."""
    if before is None:
        return f"verdicts that moved: unknown, the last commit has no {FILE}"
    lines = list(moved(before, claims))
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([f"verdicts that moved against the last commit: {len(lines)}", *lines[:SHOWN], *rest])
