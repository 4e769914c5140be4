"""
The common code of all stages: parameters in, numbers out, errors in one line. Nothing else belongs here,
for a change to this file makes DVC run every stage again.
"""

import dataclasses
import errno
import hashlib
import json
import re
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import yaml

from lib.core.parent import end_with_dvc


class Loader(yaml.SafeLoader):
    """PyYAML reads 2e-4 as text (YAML 1.1), DVC as a number (YAML 1.2): here it is a number too."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


REPRO = "containers/run venv:tools dvc repro"  # a command to paste: DVC is not on PATH


class UserError(Exception):
    """A mistake the user can mend: shown as one line, without a traceback."""


def read_params(cls, path="params.yaml"):
    """Build the dataclass `cls` from its section of params.yaml; class BaseModel reads `base_model:`.

    No defaults and no leftovers: every field must be given, every key must be a field.
    A field typed `float` takes an integer too. Raises UserError with the file, the key and its value.
    """
    section = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    sections = load_yaml(path)
    given = sections.get(section) if isinstance(sections, dict) else None
    fields = {field.name: field.type for field in dataclasses.fields(cls)}

    if not isinstance(given, dict):
        raise UserError(f"{path}: the section {section} is missing; it has {', '.join(fields)}")
    if unknown := sorted(given.keys() - fields.keys()):
        raise UserError(f"{path}: {section} has no parameter {unknown[0]!r}; it has {', '.join(fields)}")
    if missing := sorted(fields.keys() - given.keys()):
        raise UserError(f"{path}: {section}.{missing[0]} is missing")
    for name, kind in fields.items():
        if type(given[name]) is not kind and not (kind is float and type(given[name]) is int):
            raise UserError(f"{path}: {section}.{name} is {given[name]!r}, want a value of type {kind.__name__}")
    return cls(**given)


def patched(p, patch, where, fixed):
    """The parameters `p` with the keys of `patch` changed; UserError names the place `where` and a wrong key or value.

    fixed: fields that a patch must not touch (those that hold the patches).
    """
    if not isinstance(patch, dict):
        raise UserError(f"experiments.yaml: {where} is {patch!r}, want parameters as key: value")
    kinds = {field.name: field.type for field in dataclasses.fields(p) if field.name not in fixed}
    for key, value in patch.items():
        if key not in kinds:
            raise UserError(f"experiments.yaml: {where}.{key} is no parameter of {where.partition('.')[0]}")
        if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            raise UserError(f"experiments.yaml: {where}.{key} is {value!r}, want {kinds[key].__name__}")
    return dataclasses.replace(p, **patch)


def load_yaml(path):
    """A YAML file as Python data; UserError names the file (and the line) where it cannot be read.

    params.yaml comes with the sections of experiments.yaml beside it, where there is one; its own keys win.
    """
    try:
        return parse_yaml(Path(path).read_text(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None


@cache
def load_once(text):
    """A YAML text as data that nobody may change: every section of params.yaml is read by a call of its own."""
    return yaml.load(text, Loader)


def parse_yaml(text, path):
    """The data of a YAML text that stands, or is to stand, at a path; see load_yaml."""
    beside = Path(path).with_name("experiments.yaml")
    try:
        data = deepcopy(load_once(text))
        if Path(path).name == "params.yaml" and beside.exists():
            for section, values in load_yaml(beside).items():
                data[section] = {**values, **data.get(section, {})}
        return data
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', error)}") from None


def results(stage):
    """The folder of a stage's results under the profile in use, for example results/embedded/finetune/lora."""
    return Path("results") / load_yaml("params.yaml")["profile"] / stage


def check_bounds(section, values, least):
    """UserError for the first number below its least value; least: {key: value}."""
    for key, bound in least.items():
        value = getattr(values, key)
        if value < bound:
            raise UserError(f"params.yaml: {section}.{key} is {value}; use {bound} or more")


def check_choice(section, key, value, choices):
    """UserError where a text is none of the choices."""
    if value not in choices:
        raise UserError(f"params.yaml: {section}.{key} is {value!r}; use one of {', '.join(choices)}")


def need(path, stage):
    """The path of an earlier stage's result; UserError names the stage that makes it if it is missing."""
    if not Path(path).exists():
        raise UserError(f"{path}: there is no such file; `{REPRO} {stage}` makes it")
    return Path(path)


def work_folder(name):
    """A place for what a stage makes on its way, outside its DVC outs: .work/<profile>/<name>."""
    return Path(".work") / load_yaml("params.yaml")["profile"] / name


def fingerprint(settings, files=()):
    """16 hex digits that change when `settings` (JSON data) or the content of a file does."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with Path(path).open("rb") as file:  # in pieces: a model's weights are gigabytes
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def maker_of(path):
    """The stage that makes a result, with a space before it; empty for any other file."""
    parts = path.parts[path.parts.index("results") :] if "results" in path.parts else ()
    return f" {parts[2]}" if len(parts) > 3 and parts[1] != "reference" else ""


def read_json(path):
    """A result file of an earlier stage; UserError says which stage makes it when it is missing or cut short."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `{REPRO}{maker_of(path)}` makes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not whole ({error.msg}, line {error.lineno}); delete it and run `{REPRO}`") from None


def write_json(path, data):
    """Write JSON so that a reader never sees half a file: a run may be killed at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    part.replace(path)


def flags(options):
    """{"seed": 1, "streaming": True, "url": None, "extra-inputs": ["a:1", "b:2"]} as a list of command line words; an
    option that is None is left out."""
    words = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return words


def run(main):
    """Run a stage's main(); a UserError or a full disk ends it with one line and exit code 1, Ctrl-C with 130."""
    end_with_dvc()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit("error: the disk is full; free some space and run the same command again, what was finished is kept")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
