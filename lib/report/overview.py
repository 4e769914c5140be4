"""
The report's chapters on verdicts and runs: counts, machines, headline claims, every claim.
"""

from collections import Counter

from lib.claims.format import show
from lib.claims.kinds import EVIDENCE, UNANSWERED, VERDICTS
from lib.claims.runs import optional
from lib.report import plots, result_files

# What makes each part.
COMMANDS = {
    "Everything": "make reproduce",
    "This report, from what is there": "make report",
    "Predicted memory": "dvc repro vram",
    "LoRA": "dvc repro finetune@lora",
    "QLoRA": "dvc repro finetune@qlora",
    "Chat": "dvc repro chat",
    "Style": "dvc repro style",
    "Triton": "dvc repro bench@base bench@lora",
    "vLLM": "dvc repro bench@base bench@lora",
    "Both servers side by side": "dvc repro bench_vllm_vs_trtllm",
    "One change, for example the rank": "dvc exp run -S lora.r=8",
}
HEADLINES = (
    "memory-rule",
    "lora-trainable",
    "lora-memory-high",
    "qlora-memory",
    "qlora-memory-change",
    "lora-wall",
    "qlora-wall",
    "qlora-time-change",
    "stream-ttft",
    "triton-throughput",
    "triton-vllm-throughput",
    "triton-beats-vllm",
    "five-speed-up",
    "lowrank-factored",
    "vllm-24x",
)
MADE = (
    "base_model/metrics.json",
    "vram/vram.json",
    "finetune/*/metrics.json",
    "chat/chat.json",
    "style/style.json",
    "bench/*/*/points.json",
    "client_accuracy/client_accuracy.json",
    "streaming/*/streaming.json",
    "multilora/*/multilora.json",
    "limits/limits.json",
    "speedups/speedups.json",
    "kv_cache/kv_cache.json",
)


def gpu_names(names):
    """A machine's GPUs in words, equal ones together."""
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def what_ran(ledger, serving):
    """The runs, and the environment of every result in them."""
    yield ("heading", 2, "What ran")
    rows, environments = [], []
    for name, folder, facts in result_files.folders(ledger):
        provenance = {path: optional(path).get("made_by", {}) for part in MADE for path in sorted(folder.glob(part))}
        commits = {
            f"`{by['commit'][:10] or 'unknown'}`" + (" with changes" if by.get("dirty") else "")
            for by in provenance.values()
            if "commit" in by
        }
        gpus = facts["gpu"] if isinstance(facts["gpu"], list) else [facts["gpu"]]
        machine = f"{facts.get('cpu', '—')}, {facts.get('cores', '—')} cores, {facts.get('memory_gib', '—')} GiB"
        served = {
            (data["base_model"]["name"], data["base_model"]["weights"])
            for data in serving["runs"].get(name, {"experiments": {}})["experiments"].values()
        }
        models = [(facts["model"], facts["weights"])] if "model" in facts and "weights" in facts else sorted(served)
        model = ", ".join(f"{base} ({weights} weights)" for base, weights in models) or "—"
        profile = optional(folder / "run.json").get("profile") or facts.get("profile", "—")
        rows.append([name, profile, machine, gpu_names(gpus), model, ", ".join(sorted(commits)) or "—"])
        for path, by in provenance.items():
            versions = ", ".join(f"{package} {version}" for package, version in by.get("versions", {}).items())
            lock = (by.get("lock_sha256") or "—")[:12]
            where = str(path.relative_to(folder).parent)
            environments.append([name, where, by.get("image", "—"), lock, by.get("python", "—"), versions or "—"])
    if not rows:
        yield ("text", "No run yet: what follows are the claims alone. `make reproduce` runs the pipeline.")
        return
    yield ("table", ["run", "profile", "machine", "GPU", "model", "commit"], rows)
    header = ["run", "result", "image", "lock (sha256)", "Python", "packages"]
    yield ("fold", "The environment of every result", [("table", header, environments)])


def verdicts(ledger):
    """How many claims got which verdict, and the claims a reader asks for first."""
    yield ("heading", 2, "Verdicts")
    ids = [writeup["id"] for writeup in ledger["writeups"]]
    counts = {name: Counter(c["verdict"] for c in ledger["claims"] if c["writeup"] == name) for name in ids}
    caption = "The verdicts on each writeup's claims in per cent; the figures in the bars count claims."
    yield ("figure", "verdicts", plots.verdicts("verdicts", counts, list(VERDICTS)), caption)
    rows = [
        [v, says, str(ledger["counts"][v]), *(str(of[v]) for of in counts.values())] for v, says in VERDICTS.items()
    ]
    yield ("table", ["verdict", "meaning", "all", *ids], rows)
    by_evidence = ledger["counts_by_evidence"]
    rows = [[name, says, str(sum(by_evidence.get(name, {}).values()))] for name, says in EVIDENCE.items()]
    yield ("table", ["evidence", "meaning", "claims"], rows)
    yield (
        "text",
        "A figure is compared only with a run that meets its conditions: hardware, model, lengths, engine. A run on "
        "the writeup's card goes before one on another card, that before a CPU, a prediction, arithmetic and a source. "
        "Among equal evidence the best run counts, and the reason names the others. Opinions are left out of shares.",
    )
    rows = [
        [c["says"], c["published"], measured(c), c["verdict"], c["evidence"]]
        for c in ledger["claims"]
        if c["id"] in HEADLINES
    ]
    yield ("table", ["claim", "published", "measured", "verdict", "evidence"], rows)
    rows = [[c["says"], c["verdict"], f"`{c['command']}`"] for c in ledger["claims"] if c["verdict"] in UNANSWERED]
    yield (
        "fold",
        f"{len(rows)} claims without an answer",
        [("table", ["claim", "verdict", "command that answers it"], rows)],
    )


def whole_ledger(ledger):
    """Every claim of every writeup: what it says, what was published, what was measured, the verdict and why."""
    yield ("heading", 2, "All claims")
    for writeup in ledger["writeups"]:
        yield from writeup_blocks(writeup)
        mine = [claim for claim in ledger["claims"] if claim["writeup"] == writeup["id"]]
        for section in dict.fromkeys(claim["section"] for claim in mine):
            part = [claim for claim in mine if claim["section"] == section]
            counts = Counter(claim["verdict"] for claim in part)
            summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
            rows = [
                [f"{c['says']}\n`{c['id']}`", c["verdict"], c["evidence"], c["published"], measured(c), why(c)]
                for c in part
            ]
            header = ["claim", "verdict", "evidence", "published", "measured", "why"]
            yield ("fold", f"{section}: {summary}", [("table", header, rows)])


def writeup_blocks(writeup):
    """A writeup: who published it where, what it covers, its settings."""
    yield ("heading", 3, writeup["title"])
    address = writeup["url"] or "The text that we worked from names no address."
    yield ("text", f"{writeup['publisher']}; in {writeup['language']}. {address}\n{writeup['covers']}")
    settings = [[what, str(setting)] for what, setting in writeup["settings"].items()]
    yield ("fold", "Its settings", [("table", ["what", "setting"], settings)])


def measured(claim, estimated="estimated"):
    """The measured value and the run that it is from; an estimate is called one."""
    if claim["measured"] is None:
        return show(None)
    word = f"{estimated} " if claim["evidence"] == "estimated" else ""
    return f"{word}{show(claim['measured'])} ({claim['run']})"


def why(claim):
    """The reason, the conditions, the note, and what else speaks for or against the verdict."""
    lines = [claim["reason"], f"Conditions: {claim['conditions']}."]
    if claim["inferred"]:
        lines.append(f"Inferred: {claim['inferred']}.")
    if claim["command"]:
        lines.append(f"Command: `{claim['command']}`")
    if claim["note"]:
        lines.append(claim["note"])
    return "\n".join(
        [*lines, *(f"{outcome['run']}: {outcome['verdict']}, {show(outcome['measured'])}" for outcome in others(claim))]
    )


def others(claim):
    """The outcomes beside the one that gave the verdict, of each run's variants one a verdict: those under the claim's
    conditions, and this checkout's in any case."""
    seen = {(run_of(claim), claim["verdict"])}
    for outcome in claim["outcomes"]:
        key = run_of(outcome), outcome["verdict"]
        counts = outcome["verdict"] not in ("not comparable", "not measured") or key[0] == "this checkout"
        if counts and outcome["measured"] is not None and key not in seen:
            seen.add(key)
            yield outcome


def run_of(outcome):
    """The run without its variant: h200-weightless of "h200-weightless (short variant)"."""
    return (outcome["run"] or "").partition(" (")[0]


def how_to(ledger):
    """The command of each part, and the published runs."""
    yield ("heading", 2, "Reproduce it")
    yield (
        "table",
        ["part", "command"],
        [[part, f"`{result_files.pasteable(command)}`"] for part, command in COMMANDS.items()],
    )
    yield (
        "text",
        "Every figure lies beside this page as SVG and PNG, its data and the command that made it in a JSON file: "
        "`NAME.svg`, `.png`, `.json`.",
    )
    yield ("heading", 2, "Reference runs")
    rows = []
    for name, folder, _ in result_files.folders(ledger):
        if about := optional(folder / "run.json"):
            known = ("name", "profile", "published")
            rest = [f"{key}: {value}" for key, value in about.items() if isinstance(value, str) and key not in known]
            rows.append(
                [name, about.get("profile", "—"), about.get("published", "—"), "\n".join(rest) or "—", f"`{folder}`"]
            )
    if rows:
        yield ("table", ["run", "profile", "published", "about", "files"], rows)
    else:
        yield ("text", "None yet. `make publish NAME=...` publishes a run.")
