"""
Write a profile into params.yaml (comments and layout stay) and choose its set of images: python -m tools.profile NAME

in:   profiles/NAME.yaml       the values that make the profile, the same keys in every profile
out:  params.yaml, containers/images.yaml
"""

import io
import os
import re
import sys
from pathlib import Path

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lib.core.stage import UserError, load_yaml, run
from tools.checkout import only_run

PARAMS = Path("params.yaml")
COMMENT_COLUMN = 26
IMAGES = Path("containers/images.yaml")


def round_trip():
    """A YAML reader and writer that keeps comments, order and layout."""
    codec = YAML()
    codec.preserve_quotes = True
    codec.width = 4096
    codec.representer.add_representer(float, represent_float)
    return codec


def represent_float(representer, value):
    """Floats with a point, 5.0e-05: YAML 1.1, which PyYAML reads, takes 5e-05 for text."""
    text = re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


def as_node(value):
    """A value as params.yaml writes it: lists and maps in one line, text in quotes where YAML 1.1 reads another
    type."""
    if isinstance(value, list | dict):
        node = CommentedSeq(map(as_node, value)) if isinstance(value, list) else CommentedMap()
        if isinstance(value, dict):
            node.update({key: as_node(each) for key, each in value.items()})
        node.fa.set_flow_style()
        return node
    if isinstance(value, str) and yaml.safe_load(value or "''") != value:
        return DoubleQuotedScalarString(value)
    return value


def set_values(text, values):
    """params.yaml's text with {(section, key): value} set; section None: the top-level key."""
    codec, out = round_trip(), io.StringIO()
    data = codec.load(text)
    for (section, key), value in values.items():
        node = data if section is None else data.get(section, {})
        if key not in node:
            place = f"{section}.{key}" if section else key
            raise UserError(f"profiles: {place} is no key of params.yaml")
        node[key] = as_node(value)
        comment = (node.ca.items.get(key) or [None] * 3)[2]
        if comment:
            comment.column = COMMENT_COLUMN  # a longer value has moved it
    codec.dump(data, out)
    return out.getvalue()


def changes(params, profile):
    """[(section, key, old, new)] for every value of the profile that params.yaml does not hold yet."""
    differing = []
    for section, values in profile.items():
        for key, new in values.items():
            if key not in params.get(section, {}):
                raise UserError(f"profiles: {section}.{key} is no key of params.yaml")
            if params[section][key] != new:
                differing.append((section, key, params[section][key], new))
    return differing


def check_name(name):
    """UserError that lists the profiles where `name` is none of them."""
    names = sorted(path.stem for path in Path("profiles").glob("*.yaml"))
    if name not in names:
        raise UserError(f"PROFILE is {name or 'missing'}; use one of {', '.join(names)}")


def plan_profile(name):
    """(text of params.yaml, text of images.yaml, changes) with the profile in effect; nothing is written yet."""
    check_name(name)
    differing = changes(load_yaml(PARAMS), load_yaml(f"profiles/{name}.yaml"))
    values = {(None, "profile"): name} | {(section, key): new for section, key, _, new in differing}
    images = re.sub(r"(?m)^images: \*\w+$", f"images: *{name}", IMAGES.read_text())
    return set_values(PARAMS.read_text(), values), images, differing


def write_profile(name):
    """Write the profile; one line on what changed, each value with VERBOSE=1."""
    params, images, differing = plan_profile(name)
    PARAMS.write_text(params)
    IMAGES.write_text(images)
    print(f"profile {name}: {len(differing) or 'no'} values of params.yaml changed")
    if os.environ.get("VERBOSE"):
        for section, key, old, new in differing:
            print(f"  {section}.{key}: {old} -> {new}")


def main():
    if len(sys.argv) > 2:
        raise UserError("usage: make profile PROFILE=NAME")
    with only_run("make profile"):
        write_profile(sys.argv[1] if len(sys.argv) > 1 else "")


if __name__ == "__main__":
    run(main)
