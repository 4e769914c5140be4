"""
Command lines held against what a tool takes in its pinned version: tests/contracts/NAME.yaml, each with its source.

    Contract("trtllm-build").parse(["trtllm-build", "--max_batch_size", "4"])   -> {"--max_batch_size": 4}, remarks

A flag that is unknown, was removed or has a value of the wrong type raises BrokenContract with one line. A remark is
what passes and yet does not do what it seems to. The double images import this file too.
"""

import argparse
import re
import shlex
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "contracts"
TYPES = {"int": int, "float": float, "str": str}
JSON_TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict}


class BrokenContract(Exception):
    """One line: the tool, the flag, and what is wrong with it."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BrokenContract(f"{self.prog}: {message}")


class Contract:
    def __init__(self, name):
        self.data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        self.name = f"{self.data['tool']} {self.data['version']}"
        self.parser = Parser(prog=self.name, add_help=False, allow_abbrev=False)
        for flag, spec in self.data["flags"].items():
            self.parser.add_argument(
                flag, *spec.get("aliases", []), **options(spec), dest=flag, default=argparse.SUPPRESS
            )
        for word, spec in self.data.get("positional", {}).items():
            self.parser.add_argument(word, type=TYPES[spec["type"]])

    def parse(self, command):
        """({flag: value} of what is given, [(id, remark)]) of a command, as text or words."""
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        program = self.data["program"]
        start = [Path(word).name for word in words[: len(program)]]
        if start != [Path(word).name for word in program]:
            raise BrokenContract(f"{self.name}: begins with {' '.join(start)}, want {' '.join(program)}")
        words = words[len(program) :]
        for word in words:
            flag = word.split("=")[0]
            if instead := self.data.get("removed", {}).get(flag):
                raise BrokenContract(f"{self.name}: {flag} is not there any more; {instead}")
        given = vars(self.parser.parse_args(words))
        remarks = [
            (one["id"], one["say"]) for one in self.data.get("remarks", []) if "key" not in one and applies(one, given)
        ]
        return given, remarks

    def check_options(self, tree):
        """Hold the YAML file of --extra_llm_api_options against the schema; BrokenContract names the key."""
        check_tree(tree, self.data["options"], self.name)

    def fill(self, model, text):
        """fill_template.py's "key:value,..." for a model's config.pbtxt: ({key: value}, remarks)."""
        known, given = self.data["models"][model], {}
        for pair in split(text, ","):
            parts = split(pair, ":")
            if len(parts) != 2:
                raise BrokenContract(f"{self.name}: {pair!r} is not key:value; a comma inside a value is written \\,")
            key, value = parts
            if instead := self.data["removed"].get(key):
                raise BrokenContract(f"{self.name}: {key} is not there any more; {instead}")
            if key not in known["bare"] + known["quoted"] + known.get("perhaps", []):
                raise BrokenContract(f"{self.name}: key '{key}' does not exist in {model}/config.pbtxt")
            if value not in (allowed := self.data["values"].get(key, [value])):
                raise BrokenContract(f"{self.name}: {key} is {value!r}; use {', '.join(allowed)}")
            given[key] = value
        wanted = [key for key in known["bare"] if key not in self.data["defaulted"]] + known.get("needed", [])
        if missing := [key for key in wanted if key not in given]:
            raise BrokenContract(f"{self.name}: {model}/config.pbtxt cannot be loaded without {', '.join(missing)}")
        remarks = [(one["id"], one["say"]) for one in self.data["remarks"] if given.get(one["key"]) == one["value"]]
        return given, remarks


def options(spec):
    """argparse's keywords for one flag of a contract."""
    if spec["type"] == "flag":
        return {"action": "store_true"}
    kind = str.lower if spec.get("ignore_case") else TYPES[spec["type"]]
    found = {"type": kind, "action": "append" if spec.get("repeat") else "store"}
    return found | {key: spec[key] for key in ("choices", "nargs", "required") if key in spec}


def applies(remark, given):
    """Does the condition of a remark hold for the values of a command?"""
    if "absent" in remark:
        return remark["absent"] not in given
    if "flag" not in remark:
        return True
    if remark["flag"] not in given:
        return False
    value = given[remark["flag"]]
    if "without" in remark:
        return remark["without"] not in given
    if "above" in remark:
        return value > remark["above"]
    if "matches" in remark:
        return re.search(remark["matches"], value) is not None
    return "value" not in remark or remark["value"] in (value if isinstance(value, list) else [value])


def check_tree(tree, schema, where):
    if not isinstance(tree, dict):
        raise BrokenContract(f"{where}: {tree!r} is no mapping")
    for key, value in tree.items():
        if instead := schema.get("removed", {}).get(key):
            raise BrokenContract(f"{where}: {key} is not there any more; {instead}")
        if key not in schema["keys"]:
            raise BrokenContract(f"{where}: unknown key {key}")
        spec = schema["keys"][key]
        if "keys" in spec:
            check_tree(value, spec, f"{where}: {key}")
        elif not isinstance(value, JSON_TYPES[spec["type"]]) or (isinstance(value, bool) and spec["type"] != "bool"):
            raise BrokenContract(f"{where}: {key} is {value!r}, want {spec['type']}")
        elif value not in spec.get("choices", [value]):
            raise BrokenContract(f"{where}: {key} is {value!r}; use {', '.join(spec['choices'])}")


def split(text, delimiter):
    """Split as fill_template.py does: a backslash is taken away and keeps the character behind it.

    Pairs are split at commas first, keys from values afterwards: a colon inside a value needs two backslashes.
    """
    parts, escaped = [""], False
    for character in text:
        if escaped or character not in (delimiter, "\\"):
            parts[-1] += character
            escaped = False
        elif character == delimiter:
            parts.append("")
        else:
            escaped = True
    return parts


def judge(entry):
    """The ids of the remarks about a written line; BrokenContract where it does not hold."""
    contract = Contract(entry["contract"])
    words = shlex.split(entry["command"].replace("\\\n", ""))  # as the shell joins lines
    # `python` is python3 in these images, and the writeups call the scripts from other folders than the image's own.
    if words[0] == "python":
        words[0] = "python3"
    given, remarks = contract.parse(words)
    if entry["contract"] == "fill_template":
        remarks += contract.fill(Path(given["file_path"]).parent.name, given["substitutions"])[1]
    return [one for one, _ in remarks]
