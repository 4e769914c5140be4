"""Judge a claim by one run: are its conditions met, and is the measured number the published one?"""

from lib.claims.format import published, show
from lib.claims.kinds import CARD, CPU, OTHER_CARD
from lib.claims.runs import as_list, facts_of, lookup, matches, optional, run_facts

# The stages of studies/dvc.yaml.
STUDIES = ("streaming", "multilora", "client_accuracy", "speedups", "kv_cache", "estimate")

# Figures that are computed without running a model, by the folder of their file.
COMPUTED = {"vram": "predicted", "kv_cache": "computed"}


def collect_facts(stated, run_wide):
    """{fact: values} of the files that a claim reads; facts missing there are taken from the run."""
    names = {name for facts in stated for name in facts}
    values = {name: [v for facts in stated if name in facts for v in as_list(facts[name])] for name in names}
    return {name: as_list(value) for name, value in run_wide.items()} | values


def find_unmet(requires, facts):
    """{requirement: text} of those that the facts do not meet; a list asks for any of its entries."""
    unmet = {}
    for name, want in requires.items():
        met = [any(matches(entry, value) for entry in as_list(want)) for value in facts.get(name, [])]
        # Servers are compared with each other, so one engine must be the one asked for; all else holds for every file.
        if not (any(met) if name == "engine" else met and all(met)):
            here = ", ".join(dict.fromkeys(map(str, facts.get(name, ["not stated"]))))
            unmet[name] = f"{name} {' or '.join(map(str, as_list(want)))} (here {here})"
    return unmet


def outcome(claim, name, folder, variant, tolerance):
    """{run, verdict, evidence, reason, measured} of one claim in one run (and fine-tuning variant); where it is not
    comparable, with the conditions that are not met, `unmet`."""
    run = {"run": f"{name} ({variant[1:]} variant)" if variant else name, "measured": None, "evidence": "none"}
    values, stated, problems, missing = read_figures(claim, folder, variant)
    if missing:
        return {**run, "verdict": "not measured", "reason": missing[0]}
    if len(values) == len(claim.figures):
        run["measured"] = compute(claim.formula, values)
    facts = collect_facts(stated, run_facts(folder))
    unmet = find_unmet(claim.requires, facts)
    excused = {key: text for key, text in unmet.items() if key in (claim.elsewhere or ())}
    if problems or unmet.keys() - excused.keys():
        return not_comparable(run, problems, unmet, facts)
    judged = {**run, "evidence": evidence(claim, facts), **judge(claim, run["measured"], values, tolerance)}
    return on_another_card(judged, excused) if excused else judged


def read_figures(claim, folder, variant):
    """(values, facts, problems, missing) of the files that a claim reads in one run.

    problems: invalid points and stand-ins, as text; missing: why a figure is not there.
    """
    values, stated, problems, missing = {}, [], [], []
    for figure, where in claim.figures.items():
        path = where["file"].replace("{variant}", variant)
        data = optional(folder / path)
        stated.append(facts_of(data))
        try:
            value = lookup(data, where["key"])
        except ValueError as error:
            problems.append(f"the point in {path} is invalid: {error}")
            continue
        if value is None:
            missing.append(str(data.get("not_measured") or without(path, where["key"], data)))
            continue
        values[figure] = value
        if data.get("engine_is_stand_in"):
            problems.append(f"{path} is of a stand-in engine, {data.get('engine')}")
    return values, stated, list(dict.fromkeys(problems)), missing


def not_comparable(run, problems, unmet, facts):
    """The outcome of a run under other conditions, which its reason names."""
    needs = [f"needs {', '.join(unmet.values())}"] if unmet else []
    model = facts.get("model", ["a model without a name"])[0]
    shown = "" if run["measured"] is None else f"; measured {show(run['measured'])} on {model}"
    reason = "; ".join(problems + needs) + shown
    return {**run, "verdict": "not comparable", "reason": reason, "unmet": [*problems, *unmet.values()]}


def without(path, key, data):
    """Why a file has no figure, and the command that makes it."""
    return (
        f"{path} holds no {key}"
        if data
        else f"no {path}; `containers/run venv:tools dvc repro {stage_of(path)}` makes it"
    )


def on_another_card(judged, excused):
    """A ratio or a rank of a card that is not the writeup's shows the direction at most."""
    verdict = "direction only" if judged["verdict"] == "reproduced" else judged["verdict"]
    return {
        **judged,
        "verdict": verdict,
        "reason": f"not on the writeup's machine: {', '.join(excused.values())}; {judged['reason']}",
    }


def evidence(claim, facts):
    """How a comparable figure came about."""
    folders = {where["file"].partition("/")[0] for where in claim.figures.values()}
    if folders <= COMPUTED.keys():
        return COMPUTED[min(folders)]
    cards = [card for card in facts.get("gpu", []) if card != "none"]
    if not cards:
        return CPU
    return CARD if claim.card and all(matches(claim.card, card) for card in cards) else OTHER_CARD


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
        formula = claim.formula if values else claim.computed
        return {"verdict": verdict, "reason": f"`{formula}` {answer}" + (f": {figures}" if figures else "")}
    limit = tolerance if claim.tolerance is None else claim.tolerance
    ratio = measured / claim.value if claim.value else None
    neutral = claim.measure.get("no_effect") if values else None
    if (abs(measured) if ratio is None else abs(ratio - 1)) <= limit:
        verdict = "reproduced"
    elif neutral is not None and (measured - neutral) * (claim.value - neutral) > 0:
        verdict = "direction only"
    else:
        verdict = "not reproduced"
    folders = {figure["file"].partition("/")[0] for figure in claim.figures.values()} if values else set()
    how = COMPUTED.get(min(folders), "measured") if len(folders) == 1 else "measured" if values else "computed"
    times = "" if ratio is None else f"ratio {ratio:.4g}, "
    reason = f"{how} {show(measured)}, published {published(claim)}; {times}tolerance {limit:g}"
    return {"verdict": verdict, "reason": reason}
