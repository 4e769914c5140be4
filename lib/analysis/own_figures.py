"""Every claim held against the writeup's other figures and against the measured limits of the card that it names."""

from lib.analysis.roofline import closed_loop, decode_step, prefill, rates, seconds
from lib.claims.claims import references
from lib.claims.consistency import KINDS, check, describe, table_checks
from lib.claims.runs import matches, optional
from lib.model.shapes import read_shape


def all_checks(claims, limits):
    """{claim id: [check]} of every consistency check; limits: {card: limits.json}."""
    by_id = {claim.id: claim for claim in claims}
    checks = {}
    for claim in claims:
        if claim.consistent:
            figures = {name: figure_of(figure, by_id, claim, limits) for name, figure in references(claim).items()}
            if None not in figures.values():
                checks[claim.id] = [own_check(claim, figures)]
    for name in dict.fromkeys(claim.table["id"] for claim in claims if claim.table):
        part = [claim for claim in claims if claim.table and claim.table["id"] == name]
        cells = {claim.id.removeprefix(f"{name}-").replace("-", "_"): claim for claim in part}
        extra = table_limits(part[0], limits)
        checked = table_checks(
            {cell: claim.value for cell, claim in cells.items()} | extra, {cell: c.unit for cell, c in cells.items()}
        )
        checks |= {claim.id: checked[cell] for cell, claim in cells.items()}
    return checks


def own_check(claim, figures):
    """The consistency check that a claim itself states; a broken one names the figures it disagrees with."""
    kind = next(kind for kind in KINDS if kind in claim.consistent)
    result = check(kind, claim.value, claim.consistent[kind], figures, claim.consistent["rule"])
    result["cells"] = [claim.id, *(figure for figure in references(claim).values() if isinstance(figure, str))]
    return {**result, "says": describe(result, claim.value, claim.unit or "")}


def figure_of(figure, by_id, claim, limits):
    """The printed value of another claim, or a limit of the writeup's card; None where it was not measured."""
    if isinstance(figure, str):
        return by_id[figure].value
    card = limits.get(claim.card)
    return card and load_limits(figure, card)[figure["limit"]]


def table_limits(claim, limits):
    """{name: value} of what the card allows for a table's load, and its users."""
    card, users = limits.get(claim.card), claim.table["users"]
    return {"users": users} | (load_limits({**claim.table["limit"], "users": users}, card) if card else {})


def load_limits(load, card):
    """{step_ms, prompt_ms, card_tokens_per_second} at best, of a load on a card with these measured limits."""
    config, machine = read_shape(load["shape"], "a claim's shape is"), rates(card)
    formats, lengths = (load["weights"], load["kv"]), (load["input_tokens"], load["output_tokens"])
    return {
        "step_ms": 1000 * seconds(decode_step(config, *formats, 1, lengths[0] + 1), machine),
        "prompt_ms": 1000 * seconds(prefill(config, *formats, 1, lengths[0]), machine),
        "card_tokens_per_second": closed_loop(config, *formats, machine, load["users"], *lengths)["tokens_per_second"],
    }


def card_limits(claims, all_runs):
    """{card: the limits.json with the most bandwidth} for every card that a writeup names and a run has measured."""
    measured = {name: optional(folder / "limits/limits.json") for name, folder in all_runs.items()}
    best = {}
    for card in {claim.card for claim in claims if claim.card}:
        fitting = {name: limits for name, limits in measured.items() if limits and matches(card, limits["device"])}
        if fitting:
            best[card] = max(fitting.values(), key=lambda limits: limits["bytes_per_second"] or 0)
    return best
