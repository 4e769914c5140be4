"""
Judge a claim: compare what was published with what the runs measured.
"""

import dataclasses

from lib.claims.format import CONTRADICTED, VERDICTS, published, show
from lib.claims.runs import arms, facts_of, lookup, many, optional, run_facts

# The stages of studies/dvc.yaml.
STUDIES = ("streaming", "multilora", "client_accuracy", "speedups", "kv_cache")

# Arithmetic on published figures must agree up to their rounding.
ARITHMETIC_TOLERANCE = 0.005


def gathered(stated, run_wide):
    """{fact: values} of the files that a claim reads; what they do not state is taken from the run."""
    names = {name for facts in stated for name in facts}
    values = {name: [v for facts in stated if name in facts for v in many(facts[name])] for name in names}
    return {name: many(value) for name, value in run_wide.items()} | values


def unmet(requires, facts):
    """The requirements that the facts do not meet, as text; a list asks for any of its entries."""
    lacks = []
    for name, want in requires.items():
        met = [any(alike(one, have) for one in many(want)) for have in facts.get(name, [])]
        # Servers are compared with each other, so one engine must be the one asked for; all else holds for every file.
        if not (any(met) if name == "engine" else met and all(met)):
            here = ", ".join(dict.fromkeys(map(str, facts.get(name, ["not stated"]))))
            lacks.append(f"{name} {' or '.join(map(str, many(want)))} (here {here})")
    return lacks


def alike(want, have):
    """Text matches where it is contained, whatever the case: "H100" is met by "NVIDIA H100 80GB HBM3"."""
    return want.lower() in str(have).lower() if isinstance(want, str) else want == have


def outcome(claim, name, folder, arm, tolerance):
    """{run, verdict, reason, measured} of one claim in one run (and fine-tuning arm); where it is not comparable, with
    the conditions that are other ones, `apart`."""
    stated, values, problems = [], {}, []
    result = {"run": f"{name} ({arm[1:]} arm)" if arm else name, "measured": None}
    for figure, where in claim.figures.items():
        path = where["file"].replace("{arm}", arm)
        data = optional(folder / path)
        stated.append(facts_of(data))
        if data.get("engine_is_stand_in"):
            problems.append(f"{path} is of a stand-in engine, {data.get('engine')}")
        try:
            values[figure] = lookup(data, where["key"])
        except ValueError as error:
            problems.append(f"the point in {path} is invalid: {error}")
        if values.get(figure) is None and not problems:
            missing = f"{path} holds no {where['key']}" if data else f"no {path}; `dvc repro {stage_of(path)}` makes it"
            return {**result, "verdict": "not measured", "reason": str(data.get("not_measured") or missing)}
    if None not in [values.get(figure) for figure in claim.figures]:
        result["measured"] = compute(claim.formula, values)
    facts = gathered(stated, run_facts(folder))
    lacks = unmet(claim.requires, facts)
    if apart := problems + lacks:
        needs = ["needs " + ", ".join(lacks)] if lacks else []
        model = facts.get("model", ["a model without a name"])[0]
        shown = "" if result["measured"] is None else f"; measured {show(result['measured'])} on {model}"
        return {**result, "verdict": "not comparable", "reason": "; ".join(problems + needs) + shown, "apart": apart}
    return {**result, **judge(claim, result["measured"], values, tolerance)}


def stage_of(path):
    """The DVC stage that makes a result file: bench/base/vllm/points.json is of bench@base. Studies have a graph."""
    stage = "@".join(path.split("/")[:-1][:2])
    return f"studies/dvc.yaml:{stage}" if stage.partition("@")[0] in STUDIES else stage


def compute(formula, values):
    """The value of a checked expression; None where it divides by zero."""
    try:
        return eval(compile(formula, "measure", "eval"), {"__builtins__": {}}, dict(values))
    except ZeroDivisionError:
        return None


def judge(claim, measured, values, tolerance):
    """{verdict, reason} of a comparable figure; `values` are the figures it was computed from."""
    if measured is None:
        return {"verdict": "not measured", "reason": "the measured figures divide by zero"}
    if claim.value is None:
        figures = ", ".join(f"{name} {show(value)}" for name, value in values.items())
        answer = "holds" if measured else "does not hold"
        verdict = "reproduced" if measured else "not reproduced"
        return {"verdict": verdict, "reason": f"`{claim.formula}` {answer}: {figures}"}
    limit = tolerance if claim.tolerance is None else claim.tolerance
    ratio = measured / claim.value if claim.value else None
    neutral = claim.measure.get("no_effect") if values else None
    if (abs(measured) if ratio is None else abs(ratio - 1)) <= limit:
        verdict = "reproduced"
    elif neutral is not None and (measured - neutral) * (claim.value - neutral) > 0:
        verdict = "direction only"
    else:
        verdict = "not reproduced"
    predicted = values and all(figure["file"].startswith("vram/") for figure in claim.figures.values())
    how = "predicted" if predicted else "measured" if values else "computed"
    times = "" if ratio is None else f"ratio {ratio:.4g}, "
    reason = f"{how} {show(measured)}, published {published(claim)}; {times}tolerance {limit:g}"
    return {"verdict": verdict, "reason": reason}


def settle(claim, tolerance, all_runs):
    """A claim as a dictionary with its verdict, the reason, the run that gave it, and its outcome in every run."""
    outcomes = []
    if claim.measure is not None:
        by_arm = any("{arm}" in figure["file"] for figure in claim.figures.values())
        outcomes += [
            outcome(claim, name, folder, arm, tolerance)
            for name, folder in all_runs.items()
            for arm in (arms(folder) if by_arm else [""])
        ]
    if claim.computed is not None:
        value = compute(claim.computed, {})
        outcomes.append({"run": "arithmetic", "measured": value, **judge(claim, value, {}, ARITHMETIC_TOLERANCE)})
    reason = "no stage measures it" if claim.measure is None else "there is no run yet; `make reproduce` makes one"
    nothing = {"run": None, "verdict": "not measured", "measured": None, "reason": reason}
    best = min(outcomes, key=rank, default=nothing)
    if claim.contradiction:
        outcomes, best = [contradicted(one) for one in outcomes], contradicted(best)
        measured = "" if best["measured"] is None else f" ({best['reason']})"
        best = {**best, "verdict": CONTRADICTED, "reason": claim.contradiction + measured}
    return {**dataclasses.asdict(claim), "published": published(claim), **best, "outcomes": outcomes}


def rank(outcome):
    """The less, the better: by verdict, then a figure before none, then the fewest conditions that are other ones."""
    return VERDICTS.index(outcome["verdict"]), outcome["measured"] is None, len(outcome.get("apart", ()))


def contradicted(outcome):
    """Without a figure of other conditions or of a stand-in: under this verdict nobody would see that it is one."""
    comparable = outcome["verdict"] != "not comparable"
    return {**outcome, "verdict": CONTRADICTED, "measured": outcome["measured"] if comparable else None}
