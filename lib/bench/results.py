"""
Writes a server's results, or the reason why it was skipped (stages/bench.py).

in:   .work/<profile>/bench-EXPERIMENT-<fingerprint>/points/, servers/
out:  results/<profile>/bench/EXPERIMENT/SERVER/points.json, points.csv
"""

import csv

from lib.bench import metrics
from lib.bench.experiments import BUDGET_ENDED, key_of, visits
from lib.core.provenance import write_metrics
from lib.core.stage import read_json
from lib.model.shapes import dimensions, shape_file
from lib.serving.servers import OURS

SCHEMA = 2  # from 2 on the plain numbers are by the server's count of tokens, the client's own stand as client_NAME
# The facts in points.json of a server that never ran.
NOT_STARTED = {"engine": None, "engine_is_stand_in": False, "weights_format": None, "kv_format": None,
               "server_ready_seconds": None, "server_command": None}  # fmt: skip


def publish(out, work, p, server_name, asked):
    """The points of one server, summed up over their repeats; asked: what_was_asked."""
    facts_file, groups = work / "servers" / f"{server_name}.json", {}
    for _, group in visits(p):
        for point in group:
            if point.server == server_name and (work / "points" / f"{point}.json").exists():
                groups.setdefault(key_of(point), []).append(read_json(work / "points" / f"{point}.json"))
    summed = [
        metrics.summarise_repeats(group) for group in sorted(groups.values(), key=lambda group: place(p, group[0]))
    ]
    wanted = len(p.lengths) * len(p.concurrency) * len(p.variants) * p.repeats
    got = sum(len(group) for group in groups.values())
    short = None if got == wanted else f"{BUDGET_ENDED} {got} of {wanted} measurements"
    facts = {**asked, **(read_json(facts_file) if facts_file.exists() else NOT_STARTED)}
    write_metrics(
        out / server_name / "points.json", {"schema": SCHEMA, **facts, "not_measured": short, "points": summed}
    )
    write_csv(out / server_name / "points.csv", [repeat for entry in summed for repeat in entry["repeats"]])


def place(p, point):
    """Sort key of a point: by variant, then by load."""
    load = [point[name] for name in ("input_tokens_asked", "output_tokens_asked", "concurrency")]
    return [p.variants.index(point["variant"]), *load]


def write_csv(path, repeats):
    """One line a repeat, with the verdict of every check and the number of invalid earlier tries."""
    rows = [
        {**repeat, "invalid_reasons": "; ".join(repeat["invalid_reasons"]),
         "refused_tries": len(repeat["refused_tries"]),
         "checks": ", ".join(f"{check['check']} {check['verdict']}" for check in repeat["checks"])}
        for repeat in repeats
    ]  # fmt: skip
    columns = [name for row in rows for name in row]  # clients differ in what they tell
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(columns)) or ["concurrency"])
        writer.writeheader()
        writer.writerows(rows)


def what_was_asked(name, p, inputs, server_name, images):
    """The part of points.json that is known before anything runs."""
    settings = ("lengths", "repeats", "together", "variants", "client", "requests_per_stream", "min_requests",
                "warmup_requests", "endpoint", "prompts", "pinned", "seed")  # fmt: skip
    return {
        "experiment": name,
        "server": server_name,
        "model": p.model,
        "server_image": images[server_name.partition("-")[0]],
        "client_image": images["client"],
        "base_model": model_facts(p.model, inputs),
        "input_tokens_asked": p.lengths[0][0],
        "output_tokens_asked": p.lengths[0][1],
        "settings": {key: getattr(p, key) for key in settings}
        | {"client_variants": {name: p.client_variants[name] for name in p.variants}},
    }


def model_facts(model, inputs):
    """{name, weights, parameters, config} of what is served."""
    if model in OURS:
        base = read_json(inputs.base_model / "metrics.json")
        config = read_json(inputs.base_model / "model" / "config.json")
        return {name: base[name] for name in ("name", "weights", "parameters")} | {"config": dimensions(config)}
    shape, weights = model.split(":")
    facts = {"name": f"{shape} shape", "weights": "random", "parameters": None, "shape": shape, "format": weights}
    return facts | {"config": dimensions(read_json(shape_file(model)))}


def not_measured(out, facts, reason):
    """points.json of a server that is not measured, with the reason."""
    write_metrics(
        out / facts["server"] / "points.json",
        {"schema": SCHEMA, **facts, **NOT_STARTED, "not_measured": reason, "points": []},
    )
    print(f"{facts['experiment']}, {facts['server']}: not measured ({reason})")
