"""The claims ledger data/claims.yaml, read and checked field by field; claims.py judges what stands in it."""

import ast
import dataclasses
import re
from dataclasses import dataclass

from lib.core.stage import UserError, load_yaml

WRITEUP_FIELDS = {"id", "title", "publisher", "language", "url", "covers", "settings"}

# What an expression may hold: figures, numbers, arithmetic and comparisons; no call, no attribute, no index.
ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Load,
              ast.operator, ast.unaryop, ast.boolop, ast.cmpop)  # fmt: skip


@dataclass
class Claim:
    id: str
    says: str
    value: int | float | None
    unit: str | None
    writeup: str
    section: str
    conditions: str
    requires: dict
    measure: dict | None
    computed: str | None = None
    tolerance: int | float | None = None
    contradiction: str | None = None
    note: str | None = None

    @property
    def formula(self):
        """The measure as a Python expression over its figures."""
        return "figure" if "file" in self.measure else self.measure["expression"]

    @property
    def figures(self):
        """{name: {file, key}} of every result figure that the formula uses."""
        if "file" in self.measure:
            return {"figure": self.measure}
        return {name: where for name, where in self.measure.items() if name not in ("expression", "no_effect")}


def load_ledger(path="data/claims.yaml"):
    """(writeups, claims); UserError names the first claim and field that is not as it should be."""
    ledger = load_yaml(path)
    writeups = {writeup.get("id"): writeup for writeup in ledger["writeups"]}
    for name, writeup in writeups.items():
        if wrong := sorted(writeup.keys() ^ WRITEUP_FIELDS):
            raise UserError(f"{path}: writeup {name}: the field {wrong[0]!r} is missing or unknown")
    claims = {}
    for entry in ledger["claims"]:
        claim = read_claim(entry, f"{path}: claim {entry.get('id', '(without id)')}")
        if claim.id in claims:
            raise UserError(f"{path}: claim {claim.id} stands twice; give one of them another id")
        if claim.writeup not in writeups:
            raise UserError(f"{path}: claim {claim.id}: writeup is {claim.writeup!r}; use {', '.join(writeups)}")
        claims[claim.id] = claim
    return list(writeups.values()), list(claims.values())


def read_claim(entry, where):
    """One entry as a Claim, every field checked; `where` begins each error."""
    fields = {field.name: field for field in dataclasses.fields(Claim)}
    if unknown := sorted(entry.keys() - fields.keys()):
        raise UserError(f"{where} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    for name, field in fields.items():
        if name not in entry and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: the field {name!r} is missing")
        if name in entry and not isinstance(entry[name], field.type):
            kind = getattr(field.type, "__name__", field.type)
            raise UserError(f"{where}: {name} is {entry[name]!r}, want a value of type {kind}")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["id"]):
        raise UserError(f"{where}: the id is {entry['id']!r}, want kebab-case")
    claim = Claim(**entry)
    if claim.measure is not None:
        check_measure(claim, where)
    if claim.computed is not None:
        check_formula(claim.computed, (), claim, where)
    return claim


def check_measure(claim, where):
    """A measure is {file, key}, or an expression over such figures."""
    if not {"file", "expression"} & claim.measure.keys():
        raise UserError(f"{where}: measure has neither file and key nor an expression")
    for name, figure in claim.figures.items():
        if not isinstance(figure, dict) or figure.keys() != {"file", "key"}:
            raise UserError(f"{where}: measure.{name} is {figure!r}, want {{file, key}}")
    if not claim.figures:
        raise UserError(f"{where}: measure reads no figure of a run; plain arithmetic is the field computed")
    check_formula(claim.formula, claim.figures, claim, where)


def check_formula(formula, names, claim, where):
    """Arithmetic over `names`; it is a comparison just where the claim has no value, for that answers yes or no."""
    try:
        tree = ast.parse(formula, mode="eval")
    except SyntaxError:
        raise UserError(f"{where}: {formula!r} is not arithmetic") from None
    for node in ast.walk(tree):
        if not isinstance(node, ARITHMETIC) or (isinstance(node, ast.Name) and node.id not in names):
            raise UserError(f"{where}: {ast.unparse(node)!r} in {formula!r} is neither arithmetic nor a figure")
    if isinstance(tree.body, ast.Compare | ast.BoolOp) != (claim.value is None):
        raise UserError(f"{where}: {formula!r} must be a comparison just where value is null; value is {claim.value}")
