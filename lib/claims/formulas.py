"""The formulas of claims: the figures that a measure reads, and the check that it holds arithmetic alone."""

import ast

from lib.core.stage import UserError

# An expression holds figures, numbers, arithmetic and comparisons; no call, no attribute, no index.
ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Load,
              ast.operator, ast.unaryop, ast.boolop, ast.cmpop)  # fmt: skip


def formula_of(measure):
    """A measure as a Python expression over its figures."""
    return "figure" if "file" in measure else measure["expression"]


def figures_of(measure):
    """{name: {file, key}} of every result figure that a measure uses."""
    if "file" in measure:
        return {"figure": measure}
    return {name: where for name, where in measure.items() if name not in ("expression", "no_effect")}


def check_measure(measure, claim, where):
    """A measure is {file, key}, or an expression over such figures."""
    if not {"file", "expression"} & measure.keys():
        raise UserError(f"{where}: measure has neither file and key nor an expression")
    figures = figures_of(measure)
    for name, figure in figures.items():
        if not isinstance(figure, dict) or figure.keys() != {"file", "key"}:
            raise UserError(f"{where}: measure.{name} is {figure!r}, want {{file, key}}")
    if not figures:
        raise UserError(f"{where}: measure reads no figure of a run; plain arithmetic is the field computed")
    check_formula(formula_of(measure), figures, claim, where)


def check_formula(formula, names, claim, where):
    """Arithmetic over `names`; it is a comparison just where the claim has no value, for that answers yes or no."""
    tree = check_names(formula, names, where)
    if isinstance(tree.body, ast.Compare | ast.BoolOp) != (claim.value is None):
        raise UserError(f"{where}: {formula!r} must be a comparison just where value is null; value is {claim.value}")


def check_names(formula, names, where):
    """The syntax tree of an expression that holds nothing but arithmetic over `names`."""
    try:
        tree = ast.parse(formula, mode="eval")
    except SyntaxError:
        raise UserError(f"{where}: {formula!r} is not arithmetic") from None
    for node in ast.walk(tree):
        if not isinstance(node, ARITHMETIC) or (isinstance(node, ast.Name) and node.id not in names):
            raise UserError(f"{where}: {ast.unparse(node)!r} in {formula!r} is neither arithmetic nor a figure")
    return tree
