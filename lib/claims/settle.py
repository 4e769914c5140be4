"""Settle a claim: its outcome in every run, by sources, by its own figures and by estimates, and the best of them."""

import dataclasses

from lib.claims.format import published, show
from lib.claims.judge import compute, judge, outcome, stage_of
from lib.claims.kinds import CONTRADICTED, MEASURED, UNANSWERED, rank
from lib.claims.runs import lookup, optional, variants
from lib.estimate.calibration import judge as judge_band

# Arithmetic on published figures must agree up to their rounding.
ARITHMETIC_TOLERANCE = 0.005

# An estimate's verdict by the tolerance, if it has no calibrated band.
ESTIMATED = {
    "reproduced": "estimate agrees",
    "direction only": "estimate agrees",
    "not reproduced": "estimate disagrees",
}


def settle(claim, tolerance, all_runs, checks=None):
    """A claim as a dictionary with its verdict, evidence, reason, the run that gave it, and its outcome in every run.

    checks: {claim id: [check]} of the consistency checks.
    """
    outcomes = [
        *measured_outcomes(claim, tolerance, all_runs),
        *computed_outcomes(claim),
        *source_outcomes(claim),
        *consistency_outcomes(claim, (checks or {}).get(claim.id, [])),
        *estimate_outcomes(claim, tolerance, all_runs),
        *opinion_outcomes(claim),
    ]
    reason = "no stage measures it" if claim.measure is None else "there is no run yet; `make reproduce` makes one"
    nothing = {"run": None, "verdict": "not measured", "measured": None, "evidence": "none", "reason": reason}
    best = min(outcomes, key=rank, default=nothing)
    best = {**best, "reason": best["reason"] + disagreement(best, outcomes)}
    if claim.contradiction:
        outcomes, best = [contradicted(each) for each in outcomes], contradicted(best)
        measured = "" if best["measured"] is None else f" ({best['reason']})"
        best = {**best, "verdict": CONTRADICTED, "evidence": "own text", "reason": claim.contradiction + measured}
    return {
        **dataclasses.asdict(claim),
        "published": published(claim),
        **best,
        "command": command_of(claim) if best["verdict"] in UNANSWERED else None,
        "outcomes": outcomes,
    }


def measured_outcomes(claim, tolerance, all_runs):
    """The outcome of every run, and of every fine-tuning variant where the measure names one."""
    if claim.measure is None:
        return []
    by_variant = any("{variant}" in figure["file"] for figure in claim.figures.values())
    return [
        outcome(claim, name, folder, variant, tolerance)
        for name, folder in all_runs.items()
        for variant in (variants(folder) if by_variant else [""])
    ]


def computed_outcomes(claim):
    """The outcome by arithmetic on facts that the claim does not state."""
    if claim.computed is None:
        return []
    value = compute(claim.computed, {})
    judged = judge(claim, value, {}, ARITHMETIC_TOLERANCE)
    return [{"run": "arithmetic", "measured": value, "evidence": "computed", **judged}]


def source_outcomes(claim):
    """The outcome by a pinned source or by a test of this repository."""
    if claim.source is None:
        return []
    source = claim.source
    where = f"test {source['test']}" if "test" in source else address(source)
    return [
        {
            "run": where,
            "measured": None,
            "verdict": f"{source['answer']} by source",
            "evidence": "test" if "test" in source else "source",
            "reason": f"{source['says']} ({where})",
        }
    ]


def address(source):
    """The place of a source: repository@version path:line."""
    line = f":{source['line']}" if isinstance(source["line"], int) else f", {source['line']}"
    return f"{source['repo']}@{source['at']} {source['path']}{line}"


def consistency_outcomes(claim, checks):
    """The outcome by the writeup's other figures and the card's limit; a broken check is named first."""
    if not checks:
        return []
    broken = [result for result in checks if not result["holds"]]
    says = list(dict.fromkeys(result["says"] for result in broken or checks))
    cells = [f"the cells are {' and '.join(broken[0]['cells'])}"] if broken else []
    return [
        {
            "run": "its own figures",
            "measured": None,
            "verdict": "inconsistent" if broken else "consistent",
            "evidence": "computed",
            "reason": "; ".join(says + cells),
            "checks": checks,
        }
    ]


def estimate_outcomes(claim, tolerance, all_runs):
    """The outcome by an estimate of a run; a run without one says nothing."""
    if claim.estimate is None:
        return []
    asked = dataclasses.replace(claim, measure=claim.estimate, estimate=None, requires={}, elsewhere=None)
    outcomes = [estimate_outcome(asked, name, folder, tolerance) for name, folder in all_runs.items()]
    return [{**outcome, "evidence": "estimated"} for outcome in outcomes if outcome]


def estimate_outcome(asked, name, folder, tolerance):
    """The outcome of one run's estimate: by its calibrated band, else by the tolerance; None without an estimate."""
    estimated = outcome(asked, name, folder, "", tolerance)
    if estimated["verdict"] not in ESTIMATED:
        return None
    figures = {figure: band_of(folder, where) for figure, where in asked.figures.items()}
    if not all(figures.values()):
        return {**estimated, "verdict": ESTIMATED[estimated["verdict"]]}
    judged = judge_band(asked.value, figures, lambda values: compute(asked.formula, values))
    return judged and {**estimated, **judged, "reason": f"{judged['reason']}; {'; '.join(reasons_of(folder, asked))}"}


def band_of(folder, where):
    """{value, low, high, bounded} of an estimated number; None without a band."""
    key, _, number = where["key"].rpartition(".")
    point = lookup(optional(folder / where["file"]), key) if key else None
    ends = (point or {}).get("band", {}).get(number)
    return ends and {"value": point[number], **ends, "bounded": point["bounded"]}


def reasons_of(folder, asked):
    """The origin of the estimates that a claim reads, and the parts that are missing in them."""
    points = [
        lookup(optional(folder / where["file"]), where["key"].rpartition(".")[0]) for where in asked.figures.values()
    ]
    return dict.fromkeys(reason for point in points for reason in [f"kernels of {point['kernels']}", *point["reasons"]])


def opinion_outcomes(claim):
    """The outcome of a claim that no run can decide."""
    if claim.opinion is None:
        return []
    return [{"run": "opinion", "measured": None, "verdict": "opinion", "evidence": "none", "reason": claim.opinion}]


def disagreement(best, outcomes):
    """Comparable runs with the same evidence whose verdict is another: they must not vanish behind the best one."""
    if best["verdict"] not in MEASURED:
        return ""
    others = [
        f"{other['run']}: {other['verdict']}, {show(other['measured'])}"
        for other in outcomes
        if other["evidence"] == best["evidence"]
        and other["verdict"] in MEASURED
        and other["verdict"] != best["verdict"]
    ]
    return f"; other runs differ ({'; '.join(others)})" if others else ""


def command_of(claim):
    """The one command that would answer a claim."""
    if claim.command:
        return claim.command
    if claim.measure is None:
        return None
    path = next(iter(claim.figures.values()))["file"].replace("{variant}", "")
    return f"containers/run venv:tools dvc repro {stage_of(path)}"


def contradicted(outcome):
    """Without a figure of other conditions or of a stand-in: under this verdict nobody would see that it is one."""
    comparable = outcome["verdict"] != "not comparable"
    return {**outcome, "verdict": CONTRADICTED, "measured": outcome["measured"] if comparable else None}
