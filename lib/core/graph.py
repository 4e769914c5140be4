"""
The dependencies of a stage, as dvc.yaml and studies/dvc.yaml name them.
"""

import re
from pathlib import Path

from lib.core.stage import load_yaml


def dependencies(stage):
    """Every file that a stage (NAME or NAME@KEY) depends on, folders expanded, in the order of their paths.

    A key of these files and of the parameters tells whether unfinished work of an earlier run can be resumed.
    """
    name, _, key = stage.partition("@")
    graph = next(path for path in ("dvc.yaml", "studies/dvc.yaml") if name in load_yaml(path)["stages"])
    entry = load_yaml(graph)["stages"][name]
    values = {"profile": load_yaml("params.yaml")["profile"], "key": key} | item_values(entry.get("foreach"), key)
    paths = [fill_in(dep, values).removeprefix("../") for dep in entry.get("do", entry)["deps"]]
    return sorted(file for path in paths for file in files_of(Path(path)))


def item_values(foreach, key):
    """{"item": ...} or {"item.NAME": ...} that `foreach` gives the stage of this key."""
    if not isinstance(foreach, dict):
        return {"item": key}
    return {f"item.{name}": value for name, value in foreach[key].items()}


def fill_in(text, values):
    """The text with ${NAME} replaced; NAME is one of `values` or, with dots, a key of params.yaml."""

    def value(match):
        if match[1] in values:
            return str(values[match[1]])
        node = load_yaml("params.yaml")
        for part in match[1].split("."):
            node = node[part]
        return str(node)

    return re.sub(r"\$\{([\w.]+)\}", value, text)


def files_of(path):
    """The file itself, or all files below a folder but compiled Python; nothing if it does not exist yet."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [path] if path.is_file() else []
