"""Figures as text."""

from lib.claims.consistency import Printed, decimals


def show(value):
    """A figure for reading: exact integers, four significant digits otherwise, dashes for None."""
    if value is None or isinstance(value, bool | str):
        return {None: "—", True: "yes", False: "no"}.get(value, value)
    if float(value).is_integer() or abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def published(claim):
    """The published figure with the digits and the unit that were printed, and what the unit really is."""
    if claim.value is None:
        return "—"
    value = f"{claim.value:,.{decimals(claim.value)}f}" if isinstance(claim.value, Printed) else f"{claim.value:,}"
    return f"{value} {claim.unit or ''}".strip() + (f" ({claim.reads})" if claim.reads else "")
