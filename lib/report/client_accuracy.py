"""
The report's section on the load clients, as blocks (lib/report/page.py): how far each is off, what it costs, what
three say of the same server, and how each client defines ITL (stage client_accuracy).
"""

from pathlib import Path
from statistics import mean

from lib.claims.format import show
from lib.claims.runs import optional
from lib.report.result_files import not_measured

# Columns: heading and our name of the number.
ERRORS = (
    ("TTFT", "ttft_ms_avg"),
    ("TTFT p50", "ttft_ms_p50"),
    ("TTFT p99", "ttft_ms_p99"),
    ("TPOT", "tpot_ms_avg"),
    ("ITL", "itl_ms_avg"),
    ("ITL p99", "itl_ms_p99"),
)
SAID = (
    ("TTFT ms", "ttft_ms_avg"),
    ("TPOT ms", "tpot_ms_avg"),
    ("ITL ms", "itl_ms_avg"),
    ("latency ms", "request_latency_ms_avg"),
    ("tokens/s", "output_tokens_per_second"),
)


def client_accuracy(ledger):
    """Blocks of every run that has held the clients against the mock."""
    studies = [
        (name, data)
        for name, facts in ledger["runs"].items()
        if (data := optional(Path(facts["folder"]) / "client_accuracy/client_accuracy.json"))
    ]
    yield ("heading", 2, "The load clients")
    if not studies:
        yield not_measured("make client-accuracy")
        return
    for name, data in studies:
        yield ("heading", 3, f"The load clients: {name}")
        yield from errors(data)
        yield from costs(data)
        yield from same_server(data)
    yield from conversion(studies[-1][1])


def groups(runs, *keys):
    """{the values of those keys: the valid runs that share them}, in the order in which they ran."""
    by_values = {}
    for run in runs:
        if run["valid"]:
            by_values.setdefault(tuple(run[key] for key in keys), []).append(run)
    return by_values


def over(runs, part, name):
    """The mean of a number over runs, None where a run lacks it."""
    values = [run[part][name] for run in runs]
    return None if None in values else mean(values)


def signed(value, form="+.2f"):
    return "—" if value is None else format(value, form)


def invalid(runs):
    """A sentence for each reason why runs do not count."""
    by_reasons = {}
    for run in runs:
        if not run["valid"]:
            which = f"{run['client']}, concurrency {run['concurrency']}, run {run['run']}"
            by_reasons.setdefault("; ".join(run["invalid_reasons"]), []).append(which)
    for reasons, which in by_reasons.items():
        yield ("text", f"Invalid, {reasons}: {'; '.join(which)}.")


def errors(data):
    """What each client said, less what was so."""
    clients = data["clients"]
    yield (
        "text",
        "Against a server of known timing: what a client says, less what that server wrote down with each token; the "
        "way to the server and back, on one machine, is in it. "
        f"ms, mean of two runs; {data['requests_per_stream']} requests a stream of {data['input_tokens']} tokens in, "
        f"{data['output_tokens']} out. The server's lateness (how long after its deadline a token left, 99th "
        f"percentile) is no error of the client's. {', '.join(clients[name]['version'] for name in clients)}. "
        f"Measured {data['begun']} on {data['machine']['cpu']}, {data['machine']['cores']} cores, where just before "
        f"{data['load_average_before']:.1f} processes wanted one.",
    )
    rows = []
    for (ttft, itl, concurrency, name), runs in groups(
        data["mock"], "ttft_ms", "itl_ms", "concurrency", "client"
    ).items():
        cells = [signed(over(runs, "error", key)) for _, key in ERRORS]
        rate = signed(over(runs, "error_percent", "output_tokens_per_second"))
        late = f"{mean(run['late_ms']['p99'] for run in runs):.2f}"
        rows.append([f"{ttft} + {itl} ms", str(concurrency), name, *cells, rate, late])
    header = ["TTFT + ITL", "concurrency", "client", *(head for head, _ in ERRORS), "tokens/s %", "server late"]
    yield ("table", header, rows)
    yield from invalid(data["mock"])


def costs(data):
    """What a run of each client costs beside the load."""
    yield (
        "text",
        "What one run costs: seconds from start to end beyond the load itself, and CPU seconds of the client in all.",
    )
    rows = []
    for (name,), runs in groups(data["mock"], "client").items():
        extra = [run["seconds"]["overhead"] for run in runs]
        cpu = over(runs, "seconds", "client_cpu")
        rows.append([name, f"{mean(extra):.1f}", f"{min(extra):.1f} to {max(extra):.1f}", signed(cpu, ".1f")])
    yield ("table", ["client", "seconds beyond the load", "from, to", "CPU seconds"], rows)


def same_server(data):
    """What the clients said of one server, and how far two runs of one client are apart."""
    if not data["server"]:
        return
    yield (
        "text",
        f"The same server, {data['engine']} with {data['base_model']['name']}, in the order A B C C B A; mean of two "
        "runs, in brackets how far the two are apart. What the server says of TTFT and latency is without the way to "
        "the client.",
    )
    rows = []
    for (concurrency, name), runs in groups(data["server"], "concurrency", "client").items():
        cells = []
        for _, key in SAID:
            value, each = over(runs, "said", key), [run["said"][key] for run in runs]
            cells.append("—" if value is None else f"{show(value)} ({show(max(each) - min(each))})")
        own = [show(over(runs, "server", key)) for key in ("ttft_ms_avg", "request_latency_ms_avg")]
        rows.append([str(concurrency), name, *cells, *own])
    header = ["concurrency", "client", *(head for head, _ in SAID), "server: TTFT ms", "server: latency ms"]
    yield ("table", header, rows)
    yield from invalid(data["server"])


def conversion(data):
    """Which client's name stands for which number, and where that is written."""
    yield ("heading", 3, "Whose ITL is whose")
    clients = data["clients"]
    rows = [
        [f"`{row['name']}`", row["formula"], *(row[client] or "—" for client in clients)] for row in data["conversion"]
    ]
    yield ("table", ["here", "formula", *clients], rows)
    sources = "; ".join(f"`{entry['source']}` of {entry['version']}" for entry in clients.values())
    yield ("text", f"Read in {sources}.")
