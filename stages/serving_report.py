"""
The report's chapter on serving, as blocks (stages/page.py): every load of every experiment beside what the machine
allows, whether it is what was asked for (its certificate), the servers of an experiment beside each other, and the walk
from the writeup's client to ours.
"""

import json

from stages import figures
from stages.claims import show
from stages.comparison import RATE, SAME_SPEED, compared, counted_by, noise, value
from stages.page import Grey
from stages.points import REPEATS_NEEDED
from stages.roofline import BITS, KV_BYTES, closed_loop, decode_step, rates, seconds
from stages.runs import optional
from stages.sections import folders, not_measured, slug
from stages.shapes import experts
from stages.stage import read_json

# The published serving points: server, concurrency, and the claims that hold throughput, per user, first token, ITL.
POINTS = (
    ("Triton, TensorRT-LLM", 1, [f"stream-c1-{key}" for key in ("throughput", "per-user-avg", "ttft-avg", "itl-avg")]),
    ("Triton, TensorRT-LLM", 2, [f"stream-c2-{key}" for key in ("throughput", "per-user-avg", "ttft-avg", "itl-avg")]),
    ("Triton, TensorRT-LLM", 16, ["triton-throughput", None, None, None]),
    ("vLLM 0.11.0", 16, ["triton-vllm-throughput", None, None, None]),
)
# Columns of the tables, and of every comparison: the number in points.json and what it is called.
NUMBERS = {
    RATE: "tokens/s",
    "per_user_tokens_per_second": "tokens/s a user",
    "ttft_ms_p50": "first token ms",
    "itl_ms_p50": "between tokens ms",
}
# What the figures call the same.
DRAWN = {
    RATE: "tokens_per_second",
    "per_user_tokens_per_second": "per_user_tokens_per_second",
    "ttft_ms_p50": "ttft_ms",
    "itl_ms_p50": "itl_ms",
}
STEPS = (RATE, "ttft_ms_p50")  # what the walk follows
ARM_KEYS = ("endpoint", "prompts", "pinned", "requests_per_stream", "min_requests", "warmup_requests")


def serving(ledger, claims):
    """What was published, then every run's experiments."""
    yield ("heading", 2, "Serving")
    rows = [[server, str(level), *(show(claims[name]["value"]) if name else "—" for name in ids)]
            for server, level, ids in POINTS]  # fmt: skip
    yield (
        "text",
        "Published, for ELYZA 7B in 4 bits on one H100, 512 tokens in, 256 asked for, lengths not controlled:",
    )
    header = ["server", "concurrency", *NUMBERS.values()]
    yield ("table", header, rows)
    measured = 0
    for name, folder, _ in folders(ledger):
        found = experiments(folder)
        measured += len(found)
        if found:
            yield from chapter(name, folder, found)
    if not measured:
        yield not_measured("dvc repro bench@base")


def experiments(folder):
    """{experiment: {server: points.json}} of a run."""
    found = {}
    for path in sorted(folder.glob("bench/*/*/points.json")):
        experiment, server = path.parts[-3:-1]
        found.setdefault(experiment, {})[server] = read_json(path)
    return found


def chapter(name, folder, found):
    """One run: how to read it, then each experiment."""
    yield ("heading", 3, f"Serving: {name}")
    if note := optional(folder / "run.json").get("note"):
        yield ("text", note)
    limits = optional(folder / "limits/limits.json")
    how = 'of the limit: of the most that any engine could deliver there (section "What the machine allows")'
    yield (
        "text",
        f"Medians of the valid repeats, in brackets the 95 % interval of the median where there are three; {how}; J: "
        "of the GPUs, all watts of the load. What failed a check of its certificate is grey and makes no verdict."
        + ("" if limits else " No limit: `dvc repro limits` has not run there."),
    )
    for experiment, servers in found.items():
        measured = {called(server, data): data for server, data in servers.items() if data["points"]}
        if measured:
            yield ("heading", 4, f"{experiment}: {name}")
            yield ("text", conditions(measured))
        for server, data in servers.items():
            if data["not_measured"]:
                how_much = "partial" if data["points"] else "not measured"
                yield ("text", f"{experiment}, {server}: {how_much}, {data['not_measured']}.")
        if measured:
            yield from one_experiment(f"{experiment}-{name}", measured, limits)


def called(server, data):
    """A server's name wherever its figures stand: a stand-in is never shown under another engine's name."""
    return f"{server} (stand-in)" if data["engine_is_stand_in"] else server


def conditions(servers):
    """What every point of an experiment shares, in words."""
    first = next(iter(servers.values()))
    base, asked = first["base_model"], first["settings"]
    engines = ", ".join(f"{server} is {data['engine']}" for server, data in servers.items())
    formats = " and ".join(dict.fromkeys(data["weights_format"] or "unknown" for data in servers.values()))
    words = f"{base['name']} ({base['weights']} weights), weights in {formats}; {engines}. "
    words += f"{' and '.join(f'{i} tokens in, {o} out' for i, o in asked['lengths'])}; {client(asked)}."
    if any(data["engine_is_stand_in"] for data in servers.values()):
        words += " A stand-in is drawn dashed; it says nothing about the engine that it stands for."
    if base["weights"] == "random" and experts(base["config"])[0] > 1:
        words += (
            " Random weights choose their experts almost evenly; trained ones do not, and a step then reads fewer of "
            "them: neither the points nor the limit are those of the trained model."
        )
    return words


def client(asked):
    """How the load was made."""
    lengths = "answers of exactly that length" if asked["pinned"] else "answers of free length"
    prompts = "prompts of which none comes twice" if asked["prompts"] == "unique" else "genai-perf's own prompts"
    requests = f"{asked['requests_per_stream']} requests a stream and at least {asked['min_requests']}"
    return f"{requests}, {asked['warmup_requests']} a stream to warm up, {asked['endpoint']}, {prompts}, {lengths}"


def one_experiment(name, servers, limits):
    """Table, figures, comparison, walk and certificate of one experiment of one run."""
    if any(len(data["settings"]["arms"]) > 1 for data in servers.values()):
        yield from walk(servers)
    else:
        header, rows = points_table(servers, limits)
        yield ("table", header, rows)
        if any(share(data, point, limits) > 1 for data in servers.values() for point in data["points"]):
            yield ("text", "More than 100 %: the limit was measured while other programs used the machine.")
        series = [one for server, data in servers.items() for one in all_series(server, data, limits)]
        if max(len({point["concurrency"] for point in entry["points"]}) for entry in series) > 1:
            weights = next(iter(servers.values()))["base_model"]["weights"]
            yield from drawings(name, series, weights)
        yield from beside_the_first(servers)
    yield from certificates(servers)


# The points.


def load_of(data, point):
    """A load in a word: its concurrency, with lengths and arm where the experiment has several."""
    words = [f"{point['input_tokens_asked']}/{point['output_tokens_asked']}"] * (len(data["settings"]["lengths"]) > 1)
    words += [f"c={point['concurrency']}"]
    return " ".join(words + [point["arm"]] * (len(data["settings"]["arms"]) > 1))


def points_table(servers, limits):
    """(header, rows) of every load of every server."""
    rows = []
    for server, data in servers.items():
        for point in data["points"]:
            of_limit = share(data, point, limits)
            valid = sum(one["valid"] for one in point["repeats"])
            row = [server, load_of(data, point), with_interval(point, RATE), f"{of_limit:.0%}" if of_limit else "—"]
            row += [with_interval(point, name) for name in NUMBERS if name != RATE]
            row += [show(point.get("tokens_per_joule")), f"{valid} of {len(point['repeats'])}"]
            row += ["yes" if point["valid"] else f"no: {'; '.join(point['invalid_reasons'])}"]
            rows.append(row if point["valid"] else Grey(row))
    (rate, *others) = NUMBERS.values()
    return ["server", "load", rate, "of the limit", *others, "tokens/J", "repeats", "valid"], rows


def with_interval(point, name):
    """A number of a point, with its interval where it has one."""
    span = point["intervals"].get(counted_by(point, name))
    return show(value(point, name)) + (f" [{show(span[0])}, {show(span[1])}]" if span else "")


def share(data, point, limits):
    """A point's throughput over the limit; 0 where either is not known."""
    limit, rate = bound(data, point, limits), value(point, RATE)
    return rate / limit["tokens_per_second"] if limit and rate else 0


def bound(data, point, limits):
    """{tokens_per_second, per_user_tokens_per_second, itl_ms}: what no engine exceeds for this load on this machine, by
    the lengths that the server counted; None where the format, the model's size or the machine's rates are not known,
    and for a server that guesses tokens: it reads the weights once for several.
    """
    base, weights, kv = data["base_model"], data["weights_format"], data["kv_format"]
    if not limits or weights not in BITS or kv not in KV_BYTES or "config" not in base or guesses(data):
        return None
    config, machine = base["config"], rates(limits, gpus(data["server_command"]))
    tokens_in = round(point.get("input_tokens") or point["input_tokens_asked"])
    tokens_out = round(point.get("server_output_tokens") or point["output_tokens_asked"])
    found = closed_loop(config, weights, kv, machine, point["concurrency"], tokens_in, tokens_out)
    step = seconds(decode_step(config, weights, kv, point["concurrency"], tokens_in + tokens_out // 2), machine)
    if not step or not found["tokens_per_second"]:
        return None
    return {
        "concurrency": point["concurrency"],
        "tokens_per_second": found["tokens_per_second"],
        "per_user_tokens_per_second": 1 / step,
        "itl_ms": 1000 * step,
    }


def guesses(data):
    """Whether a server decodes speculatively."""
    return any("--speculative" in word for word in data["server_command"] or [])


def gpus(command):
    """The GPUs that share the model, out of the words that started the server."""
    for word in command or []:
        name, _, number = word.partition("=")
        if name in ("--tensor-parallel-size", "--tp_size"):
            return int(number)
    return 1


# The figures.


def all_series(server, data, limits):
    """A server's points as the figures take them: one series a pair of lengths."""
    for lengths in data["settings"]["lengths"]:
        group = [p for p in data["points"] if [p["input_tokens_asked"], p["output_tokens_asked"]] == lengths]
        if group:
            several = f", {lengths[0]} in, {lengths[1]} out" if len(data["settings"]["lengths"]) > 1 else ""
            engine = "" if data["engine_is_stand_in"] else f" ({data['engine']})"
            yield {
                "label": f"{server}{engine}{several}",
                "stand_in": data["engine_is_stand_in"],
                "points": [drawn_point(point) for point in group],
                "limit": [one for point in group if (one := bound(data, point, limits))],
            }


def drawn_point(point):
    """What the figures show of a point."""
    spans = {DRAWN[name]: point["intervals"].get(counted_by(point, name)) for name in NUMBERS}
    return {
        "concurrency": point["concurrency"],
        "valid": point["valid"],
        "intervals": {name: span for name, span in spans.items() if span},
        **{DRAWN[name]: value(point, name) for name in NUMBERS},
    }


def drawings(name, series, weights):
    """Both figures of an experiment."""
    shared = "Bars: 95 % intervals. Dotted: the most or the least that this machine allows. Crosses: not valid."
    shared = f"{weights.capitalize()} weights. {shared}"
    for kind, draw, caption in (
        ("serving", figures.serving, "Throughput and waiting over concurrent requests"),
        (
            "pareto",
            figures.pareto,
            "What one user gets and what all get together, at the concurrency beside each point",
        ),
    ):
        figure = slug(kind, name)
        yield ("figure", figure, draw(figure, series), f"{caption}: {name}. {shared}")


# The servers beside each other.


def beside_the_first(servers):
    """Every other server of an experiment divided by the first at each load, and which is the fastest."""
    (first, reference), *others = servers.items()
    rows, faster, at = [], {}, {load_of(reference, point): point for point in reference["points"]}
    for server, data in others:
        floor = {name: noise([reference, data], name) for name in NUMBERS}
        for point in data["points"]:
            load = load_of(data, point)
            if load not in at:
                continue
            found = {name: compared(point, at[load], name, floor[name], (server, first)) for name in NUMBERS}
            rows.append([server, load, *(cell for one in found.values() for cell in told(one))])
            if found[RATE]:
                faster.setdefault(load, []).append((found[RATE], server, same_answers(reference, data)))
    if not rows:
        return
    header = [cell for name in NUMBERS.values() for cell in (name, "verdict")]
    yield ("text", f"Divided by {first}, with the 95 % interval of the ratio.")
    yield ("table", ["server", "load", *header], rows)
    yield ("text", "\n".join(fastest(load, first, found) for load, found in faster.items()))


def told(found):
    """A ratio and its verdict as two cells."""
    if found is None:
        return ["—", "not valid or not measured"]
    span = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return [f"{found['ratio']:.3f}{span}", found["verdict"]]


def same_answers(reference, data):
    """Whether a server computes what the first one computes, as far as its start says: the same formats; and guessed
    tokens only where the weights are real, for what random weights say is easy to guess."""
    formats = ("weights_format", "kv_format")
    random = data["base_model"]["weights"] == "random"
    return all(reference[name] == data[name] for name in formats) and not (guesses(data) and random)


def fastest(load, first, found):
    """One sentence: the fastest server at a load among those that answer the same."""
    higher = [(one["ratio"], server) for one, server, same in found if same and one["verdict"] == f"{server} higher"]
    if higher:
        ratio, server = max(higher)
        return f"{load}: {server} delivers the most tokens a second, {ratio:.3f} times {first}."
    if all(one["low"] is None for one, _, _ in found):
        return f"{load}: no verdict on the fastest, for that needs three repeats."
    return f"{load}: no other server that gives the same answers delivers more than {first}."


# The walk.


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


# The certificate.


def certificates(servers):
    """Of every server a fold: each check at each load, and what is behind all that did not pass."""
    for server, data in servers.items():
        verdicts, reasons = {}, {}
        for point in data["points"]:
            load = load_of(data, point)
            for repeat in point["repeats"]:
                for one in repeat["checks"]:
                    verdicts.setdefault(one["check"], {}).setdefault(load, []).append(one["verdict"])
                    if one["verdict"] != "pass":
                        why = (one["check"], one["verdict"], one["reason"])
                        reasons.setdefault(why, {}).setdefault(load, []).append(str(repeat["repeat"]))
        if not verdicts:
            continue
        loads = list(dict.fromkeys(load_of(data, point) for point in data["points"]))
        rows = [[check, *(summed_up(at.get(load, [])) for load in loads)] for check, at in verdicts.items()]
        every = [verdict for at in verdicts.values() for found in at.values() for verdict in found]
        counts = ", ".join(f"{every.count(verdict)} {verdict}" for verdict in ("pass", "fail", "unknown"))
        inner = [("table", ["check", *loads], rows)]
        if reasons:
            told = [[*why, "; ".join(f"{load} ({', '.join(at)})" for load, at in where.items())]
                    for why, where in sorted(reasons.items())]  # fmt: skip
            inner.append(("table", ["check", "verdict", "reason", "load (repeats)"], told))
        yield ("fold", f"Certificate of {server}: {counts}", inner)


def summed_up(verdicts):
    """The verdicts of all repeats in a word."""
    if not verdicts:
        return "—"
    worst = next(one for one in ("fail", "unknown", "pass") if one in verdicts)
    count = verdicts.count(worst)
    return worst if count == len(verdicts) else f"{worst} ({count} of {len(verdicts)})"
