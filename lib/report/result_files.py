"""
Locate result files for the report.
"""

from pathlib import Path

from lib.claims.runs import OWN_RUN, optional
from lib.core.stage import read_json

VOICE = "embedded-persona"  # the committed run whose training is long enough for the dataset's voice
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def not_measured(command):
    return ("text", f"Not measured yet. `{pasteable(command)}` measures it.")


def pasteable(command):
    """A command as a person pastes it: dvc stands in an environment of its own."""
    return f"containers/run venv:tools {command}" if command.startswith("dvc ") else command


def folders(ledger):
    """(name, folder, facts) of every run."""
    return [(name, Path(facts["folder"]), facts) for name, facts in ledger["runs"].items()]


def found_in(ledger, file):
    """[(run, data)] of the runs that have that file."""
    return [(name, data) for name, folder, _ in folders(ledger) if (data := optional(folder / file))]


def best_spoken(runs):
    """The (run, data) of this checkout, else of the committed run that learned the voice, else the first; or None."""
    order = {OWN_RUN: 0, VOICE: 1}
    return min(runs, key=lambda pair: order.get(pair[0], 2), default=None)


def variants(folder):
    """{variant: metrics} of every fine-tuning of a run."""
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("finetune/*/metrics.json"))}


def slug(kind, name):
    """A figure's name: serving-this-checkout."""
    return f"{kind}-{name.replace(' ', '-')}"
