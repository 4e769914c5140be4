"""
Verdict names and figures as text.
"""

# The best outcome over all runs is a claim's verdict, in this order; a contradiction in the source goes before all.
CONTRADICTED = "contradicted by its own source"
VERDICTS = ("reproduced", "direction only", "not reproduced", CONTRADICTED, "not comparable", "not measured")


def show(value):
    """A figure for reading: exact integers, four significant digits otherwise, dashes for None."""
    if value is None or isinstance(value, bool | str):
        return {None: "—", True: "yes", False: "no"}.get(value, value)
    if float(value).is_integer() or abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def published(claim):
    """The published figure exactly as the ledger has it, with its unit."""
    return "—" if claim.value is None else f"{claim.value:,} {claim.unit or ''}".strip()
