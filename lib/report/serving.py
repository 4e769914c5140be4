"""
The report's chapter on serving, as blocks (lib/report/page.py), rendered from the serving summary.
"""

from lib.analysis.metrics import RATE
from lib.claims.format import show
from lib.report import h100
from lib.report.client_ablation import ablation
from lib.report.result_files import not_measured
from lib.report.serving_points import NUMBERS, draw_figures, points_table
from lib.report.validity import validity


def serving(ledger, summary):
    """The published points, drawn beside those measured and estimated on such a card, then every run's experiments."""
    yield ("heading", 2, "Serving")
    yield from published_points(summary["published"])
    if estimates := h100.read_estimates(ledger):
        yield h100.figure(estimates, summary)
    measured = {name: run for name, run in summary["runs"].items() if run["experiments"]}
    for name, run in measured.items():
        yield from run_chapter(name, run)
    if not measured:
        yield not_measured("dvc repro bench@base")


def published_points(published):
    """The writeup's own points and their share of what such a card allows."""
    words = "Published, for ELYZA 7B in 4 bits on one H100, 512 tokens in, 256 asked for, lengths not controlled"
    if run := published["limits_of"]:
        words += f" (of the limit: of the card in {run}, at these lengths)"
    yield ("text", words + ":")
    rows = []
    for point in published["points"]:
        rate, *others = (show(number) for number in point["numbers"])
        rows.append([point["server"], str(point["concurrency"]), rate, percent(point["share"]), *others])
    rate, *others = NUMBERS.values()
    yield ("table", ["server", "concurrency", rate, "of the limit", *others], rows)


def percent(share):
    return "—" if share is None else f"{share:.0%}"


def run_chapter(name, run):
    """One run: how to read it, then each experiment."""
    yield ("heading", 3, f"Serving: {name}")
    if run["note"]:
        yield ("text", run["note"])
    yield (
        "text",
        "Medians of the valid repeats, with the 95 % interval in brackets from three repeats on. Of the limit: of the "
        'most that any engine could deliver there (section "What the machine allows"). Tokens/J uses total GPU power. '
        "Points that fail a validity check are grey and excluded from verdicts."
        + ("" if run["has_limits"] else " No limit: `dvc repro limits` has not run there."),
    )
    for experiment, data in run["experiments"].items():
        if data["points"]:
            yield ("heading", 4, f"{experiment}: {name}")
            yield ("text", conditions(data))
        for server in data["servers"]:
            if server["not_measured"]:
                how_much = "partial" if server["points"] else "not measured"
                yield ("text", f"{experiment}, {server['name']}: {how_much}, {server['not_measured']}.")
        if data["points"]:
            yield from experiment_blocks(f"{experiment}-{name}", data)


def conditions(data):
    """What every point of an experiment shares, in words."""
    base, asked = data["base_model"], data["settings"]
    measured = [server for server in data["servers"] if server["points"]]
    engines = ", ".join(f"{server['label']} is {server['engine']}" for server in measured)
    formats = " and ".join(dict.fromkeys(server["weights_format"] or "unknown" for server in measured))
    words = f"{base['name']} ({base['weights']} weights), weights in {formats}; {engines}. "
    words += f"{' and '.join(f'{i} tokens in, {o} out' for i, o in asked['lengths'])}; {client_words(asked)}."
    if any(server["engine_is_stand_in"] for server in measured):
        words += " A stand-in is drawn dashed; it says nothing about the engine that it stands for."
    if data["random_experts"]:
        words += (
            " Random weights choose their experts almost evenly; trained ones do not, and a step then reads fewer of "
            "them: neither the points nor the limit are those of the trained model."
        )
    return words + token_error_words(data["client_token_error"])


def token_error_words(error):
    """A sentence where the client counted other tokens than the server made; empty where it did not."""
    if not error or max(map(abs, error)) < 0.01:
        return ""
    return (
        f" genai-perf, which tokenises an answer again, was {error[0]:+.1%} to {error[1]:+.1%} off in its tokens: "
        "tokens/s, tokens/s a user and the time between tokens stand here by the server's count."
    )


def client_words(asked):
    """How the load was made."""
    lengths = "answers of exactly that length" if asked["pinned"] else "answers of free length"
    prompts = "prompts of which none comes twice" if asked["prompts"] == "unique" else "genai-perf's own prompts"
    requests = f"{asked['requests_per_stream']} requests a stream and at least {asked['min_requests']}"
    return f"{requests}, {asked['warmup_requests']} a stream to warm up, {asked['endpoint']}, {prompts}, {lengths}"


def experiment_blocks(name, data):
    """Table, figures, comparison or ablation, and validity of one experiment of one run."""
    if data["steps"]:
        yield from ablation(data)
    else:
        header, rows = points_table(data)
        yield ("table", header, rows)
        for server in data["servers"]:
            if server["speculates"] and server["points"]:
                yield ("text", speculation_words(server["label"], data))
        if any((point["share"] or 0) > 1 for point in data["points"]):
            yield ("text", "More than 100 %: the limit was measured while other programs used the machine.")
        yield from draw_figures(name, data)
        yield from comparison(data)
    yield from validity(data)


def speculation_words(server, data):
    """How many of a server's guessed tokens were right: the rest of its figures rests on it."""
    points = [point for point in data["points"] if point["server"] == server]
    shares = {point["load"]: point["guessed_right"] for point in points}
    words = ", ".join(f"{share:.0%} at {load}" for load, share in shares.items() if share is not None)
    if all(point["guessed_tokens"] == 0 for point in points):
        return f"{server} looks for guesses, but found none to make: nothing here repeated itself."
    if not words:
        return f"{server} guesses tokens; how many of them were right is not measured."
    if data["base_model"]["weights"] == "random":
        words += "; what random weights write is no text: a trained model's shares are others"
    return f"Of the tokens that {server} guessed these were right: {words}."


# The servers beside each other.


def comparison(data):
    """Every other server of an experiment divided by the first at each load, and the fastest at each load."""
    if not data["comparisons"]:
        return
    rows = [
        [row["server"], row["load"], *(cell for name in NUMBERS for cell in ratio_cells(row["numbers"][name]))]
        for row in data["comparisons"]
    ]
    first = data["comparisons"][0]["divided_by"]
    header = [cell for title in NUMBERS.values() for cell in (title, "verdict")]
    yield ("text", f"Divided by {first}, with the 95 % interval of the ratio.")
    yield ("table", ["server", "load", *header], rows)
    loads = dict.fromkeys(row["load"] for row in data["comparisons"] if row["numbers"][RATE])
    yield ("text", "\n".join(fastest_words(load, first, data) for load in loads))


def ratio_cells(ratio):
    """A ratio and its verdict as two cells."""
    if ratio is None:
        return ["—", "not valid or not measured"]
    span = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return [f"{ratio['ratio']:.3f}{span}", ratio["verdict"]]


def fastest_words(load, first, data):
    """One sentence: the fastest server at a load among those that give the same answers."""
    same = {server["label"]: server["same_answers"] for server in data["servers"]}
    ratios = {
        row["server"]: row["numbers"][RATE]
        for row in data["comparisons"]
        if row["load"] == load and row["numbers"][RATE]
    }
    higher = [
        (ratio["ratio"], server)
        for server, ratio in ratios.items()
        if same[server] and ratio["verdict"] == f"{server} higher"
    ]
    if higher:
        ratio, server = max(higher)
        return f"{load}: {server} delivers the most tokens a second, {ratio:.3f} times {first}."
    if all(ratio["low"] is None for ratio in ratios.values()):
        return f"{load}: no verdict on the fastest, for that needs three repeats."
    return f"{load}: no other server that gives the same answers delivers more than {first}."
