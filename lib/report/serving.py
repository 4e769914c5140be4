"""
The report's chapter on serving, as blocks (lib/report/page.py): every load of every experiment (lib/report/serving_points.py),
the servers of an experiment beside each other, the walk from the writeup's client to ours (lib/report/ablation.py), and
whether a load is what was asked for (its certificate).
"""

from lib.analysis.compare import compared, noise
from lib.analysis.summary import experiments, guesses, load_of, same_answers, share
from lib.bench.metrics import RATE
from lib.claims.runs import optional
from lib.model.shapes import experts
from lib.report.ablation import walk
from lib.report.published_serving import published
from lib.report.result_files import folders, not_measured
from lib.report.serving_points import NUMBERS, all_series, drawings, points_table


def serving(ledger, claims):
    """What was published, then every run's experiments."""
    yield ("heading", 2, "Serving")
    yield from published(ledger, claims)
    measured = 0
    for name, folder, _ in folders(ledger):
        found = experiments(folder)
        measured += len(found)
        if found:
            yield from chapter(name, folder, found)
    if not measured:
        yield not_measured("dvc repro bench@base")


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
    return words + miscounted(servers)


def miscounted(servers):
    """A sentence where the client counted other tokens than the server made; empty where it did not."""
    off = [point["output_tokens"] / point["server_output_tokens"] - 1
           for data in servers.values() for point in data["points"]
           if point.get("output_tokens") and point.get("server_output_tokens")]  # fmt: skip
    if not off or max(map(abs, off)) < 0.01:
        return ""
    return (
        f" genai-perf, which tokenises an answer again, was {min(off):+.1%} to {max(off):+.1%} off in its tokens: "
        "tokens/s, tokens/s a user and the time between tokens stand here by the server's count."
    )


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
        yield from (("text", guessing(server, data)) for server, data in servers.items() if guesses(data))
        if any(share(data, point, limits) > 1 for data in servers.values() for point in data["points"]):
            yield ("text", "More than 100 %: the limit was measured while other programs used the machine.")
        series = [one for server, data in servers.items() for one in all_series(server, data, limits)]
        if max(len({point["concurrency"] for point in entry["points"]}) for entry in series) > 1:
            weights = next(iter(servers.values()))["base_model"]["weights"]
            yield from drawings(name, series, weights)
        yield from beside_the_first(servers)
    yield from certificates(servers)


def guessing(server, data):
    """What became of the tokens that a server guessed: the rest of its figures rests on it."""
    found = {load_of(data, point): point.get("guessed_right") for point in data["points"]}
    told = ", ".join(f"{one:.0%} at {load}" for load, one in found.items() if one is not None)
    if all(point.get("guessed_tokens") == 0 for point in data["points"]):
        return f"{server} looks for guesses, but found none to make: nothing here repeated itself."
    if not told:
        return f"{server} guesses tokens; how many of them were right is not measured."
    if data["base_model"]["weights"] == "random":
        told += "; what random weights write is no text: a trained model's shares are others"
    return f"Of the tokens that {server} guessed these were right: {told}."


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


def fastest(load, first, found):
    """One sentence: the fastest server at a load among those that answer the same."""
    higher = [(one["ratio"], server) for one, server, same in found if same and one["verdict"] == f"{server} higher"]
    if higher:
        ratio, server = max(higher)
        return f"{load}: {server} delivers the most tokens a second, {ratio:.3f} times {first}."
    if all(one["low"] is None for one, _, _ in found):
        return f"{load}: no verdict on the fastest, for that needs three repeats."
    return f"{load}: no other server that gives the same answers delivers more than {first}."


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
