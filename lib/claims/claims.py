"""The claims of data/claims/, one file a writeup, read and checked field by field; README.md there has the format."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lib.claims.consistency import KINDS, Printed, decimals
from lib.claims.formulas import check_formula, check_measure, check_names, figures_of, formula_of
from lib.core.stage import Loader, UserError

WRITEUP_FIELDS = {"id", "order", "title", "publisher", "language", "url", "covers", "card", "settings"}
TABLE_FIELDS = {"id", "writeup", "section", "says", "conditions", "inferred", "requires", "users", "limit", "file",
                "point", "command", "rows"}  # fmt: skip
SOURCE_FIELDS = ({"answer", "repo", "at", "path", "line", "says"}, {"answer", "test", "says"})
STATISTICS = {"avg": "mean", "min": "minimum", "max": "maximum", "p99": "99th percentile", "p90": "90th percentile",
              "p75": "75th percentile"}  # fmt: skip


@dataclass
class Claim:
    id: str
    says: str
    writeup: str
    section: str
    conditions: str
    requires: dict
    value: int | float | None = None
    unit: str | None = None
    measure: dict | None = None
    computed: str | None = None
    consistent: dict | None = None
    source: dict | None = None
    estimate: dict | None = None
    opinion: str | None = None
    command: str | None = None
    tolerance: int | float | None = None
    contradiction: str | None = None
    note: str | None = None
    reads: str | None = None
    inferred: str | None = None
    elsewhere: list | None = None
    card: str | None = None
    table: dict | None = None

    @property
    def formula(self):
        """The measure as a Python expression over its figures."""
        return formula_of(self.measure)

    @property
    def figures(self):
        """{name: {file, key}} of every result figure that the formula uses."""
        return figures_of(self.measure)


class PrintedLoader(Loader):
    """Keeps the digits of every number with a point: 0.50 stays 0.50."""


PrintedLoader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: Printed(loader.construct_yaml_float(node), node.value),
)


def load_claims(path="data/claims"):
    """(writeups, claims) of every file; UserError names the first file, claim and field that is wrong."""
    writeups, claims = {}, {}
    for file in sorted(Path(path).glob("*.yaml")):
        content = load_file(file)
        writeup = read_writeup(content.get("writeup") or {}, file)
        writeups[writeup["id"]] = writeup
        cells = [cell for table in content.get("tables") or [] for cell in read_table(table, file)]
        for entry in [*(content.get("claims") or []), *cells]:
            claim = read_claim(entry, f"{file}: claim {entry.get('id', '(without id)')}")
            if claim.id in claims:
                raise UserError(f"{file}: claim {claim.id} stands twice; give one of them another id")
            if claim.writeup != writeup["id"]:
                raise UserError(f"{file}: claim {claim.id}: writeup is {claim.writeup!r}; use {writeup['id']}")
            claim.card = claim.card or writeup["card"]
            claims[claim.id] = claim
    if not claims:
        raise UserError(f"{path}: no claims; want one YAML file a writeup")
    for claim in claims.values():
        check_references(claim, claims, path)
    order = {name: writeup["order"] for name, writeup in writeups.items()}
    return (
        sorted(writeups.values(), key=lambda writeup: writeup["order"]),
        sorted(claims.values(), key=lambda claim: order[claim.writeup]),
    )


def load_file(file):
    """One file of claims as Python data."""
    try:
        return yaml.load(file.read_text(), PrintedLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{file}:{where} not valid YAML: {getattr(error, 'problem', error)}") from None


def read_writeup(writeup, file):
    """The head of a file, its fields checked."""
    if wrong := sorted(writeup.keys() ^ WRITEUP_FIELDS):
        raise UserError(f"{file}: writeup {writeup.get('id')}: the field {wrong[0]!r} is missing or unknown")
    return writeup


def read_table(table, file):
    """The claims of a printed table: one a cell, named TABLE-ROW-COLUMN."""
    if wrong := sorted(table.keys() ^ TABLE_FIELDS):
        raise UserError(f"{file}: table {table.get('id')}: the field {wrong[0]!r} is missing or unknown")
    for row, printed in table["rows"].items():
        values = printed["values"]
        for column, value in values.items() if isinstance(values, dict) else [(None, values)]:
            name = f"{row}-{column}" if column else row
            what = f"{printed['says']}, {STATISTICS[column]}" if column else printed["says"]
            yield {
                **{
                    field: table[field]
                    for field in ("writeup", "section", "conditions", "inferred", "requires", "command")
                },
                "id": f"{table['id']}-{name}",
                "says": f"{what}: {value:,.{decimals(value)}f} {printed['unit']} ({table['says']}).",
                "value": value,
                "unit": printed["unit"],
                "measure": cell_measure(table, printed, column),
                "estimate": printed.get("estimate") if column in (None, "avg") else None,
                "note": printed.get("note"),
                "table": {field: table[field] for field in ("id", "users", "limit")},
            }


def cell_measure(table, printed, column):
    """The figure of a run that answers a cell; None where our runs set it."""
    if "measure" not in printed:
        return None
    mean = printed.get("mean")
    key = mean if mean and column == "avg" else printed["measure"].replace("{column}", column or "")
    return {"file": table["file"], "key": f"{table['point']}.{key}"}


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
    for measure in (claim.measure, claim.estimate):
        if measure is not None:
            check_measure(measure, claim, where)
    if claim.computed is not None:
        check_formula(claim.computed, (), claim, where)
    if claim.consistent is not None:
        check_consistent(claim, where)
    if claim.source is not None:
        check_source(claim.source, where)
    return claim


def check_source(source, where):
    """A source is a line of a pinned file, or a test of this repository, with its answer in our words."""
    if source.keys() not in SOURCE_FIELDS:
        wanted = " or ".join(", ".join(sorted(fields)) for fields in SOURCE_FIELDS)
        raise UserError(f"{where}: source has {', '.join(source)}; want {wanted}")
    if source["answer"] not in ("confirmed", "refuted"):
        raise UserError(f"{where}: source.answer is {source['answer']!r}, want confirmed or refuted")
    for name, value in source.items():
        if not isinstance(value, str) and not (name == "line" and type(value) is int):
            raise UserError(f"{where}: source.{name} is {value!r}, want text")


def check_consistent(claim, where):
    """`consistent` is one check: a kind with its expression, the rule in words, and the figures by name."""
    kinds = [kind for kind in KINDS if kind in claim.consistent]
    if len(kinds) != 1 or "rule" not in claim.consistent:
        raise UserError(f"{where}: consistent wants one of {', '.join(KINDS)}, and a rule in words")
    if (kinds[0] == "holds") != (claim.value is None):
        raise UserError(f"{where}: consistent.holds is for a claim without a value; the other kinds compare the value")
    check_names(claim.consistent[kinds[0]], references(claim), where)


def references(claim):
    """{name: claim id or limit} of the figures that a consistency check reads."""
    return {name: figure for name, figure in claim.consistent.items() if name not in (*KINDS, "rule")}


def check_references(claim, claims, path):
    """Every figure of a consistency check is the id of a claim with a value, or a limit of the card."""
    for name, figure in references(claim).items() if claim.consistent else ():
        known = isinstance(figure, dict) or (figure in claims and claims[figure].value is not None)
        if not known:
            raise UserError(
                f"{path}: claim {claim.id}: consistent.{name} is {figure!r}, which is no claim with a value"
            )
