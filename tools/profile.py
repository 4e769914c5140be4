"""
Write a profile into params.yaml (comments and layout stay) and choose its set of images: python -m tools.profile NAME

in:   profiles/NAME.yaml       the values that make the profile, the same keys in every profile
out:  params.yaml, containers/images.yaml
"""

import json
import re
import sys
from pathlib import Path

import yaml

from lib.core.stage import UserError, load_yaml, run

PARAMS = Path("params.yaml")
COMMENT_COLUMN = 26
IMAGES = Path("containers/images.yaml")


def as_yaml(value):
    """A value as params.yaml writes it: lists in one line, floats with a point (5.0e-05: YAML 1.1 wants it)."""
    if isinstance(value, list):
        return "[" + ", ".join(as_yaml(one) for one in value) + "]"
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./= -]*( \(.*\))?", value)
    # `no`, `true` and `null` would be read as something else than words.
    return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)


def set_value(text, section, key, value):
    """params.yaml's text with section.key (or the top-level key, section None) set; comments stand at one column."""
    lines, inside = text.splitlines(), section is None
    for number, line in enumerate(lines):
        if section and re.match(r"\S", line):
            inside = line.startswith(f"{section}:")
        found = re.match(rf"({'  ' if section else ''}{key}: )(.*?)(\s+#.*)?$", line)
        if inside and found:
            head, _, comment = found.groups()
            lines[number] = head + as_yaml(value)
            if comment:
                gap = max(COMMENT_COLUMN - len(lines[number]), 1)
                lines[number] += " " * gap + comment.lstrip()
            return "\n".join(lines) + "\n"
    raise UserError(f"profiles: {section}.{key} is no key of params.yaml" if section else f"params.yaml has no {key}")


def changes(params, profile):
    """[(section, key, old, new)] for every value of the profile that params.yaml does not hold yet."""
    found = []
    for section, values in profile.items():
        for key, new in values.items():
            if key not in params.get(section, {}):
                raise UserError(f"profiles: {section}.{key} is no key of params.yaml")
            if params[section][key] != new:
                found.append((section, key, params[section][key], new))
    return found


def main():
    names = sorted(path.stem for path in Path("profiles").glob("*.yaml"))
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        given = sys.argv[1] if len(sys.argv) > 1 else "missing"
        raise UserError(f"PROFILE is {given}; use one of {', '.join(names)}")
    name = sys.argv[1]

    text = set_value(PARAMS.read_text(), None, "profile", name)
    differing = changes(load_yaml(PARAMS), load_yaml(f"profiles/{name}.yaml"))
    for section, key, old, new in differing:
        text = set_value(text, section, key, new)
        print(f"  {section}.{key}: {old} -> {new}")
    PARAMS.write_text(text)
    IMAGES.write_text(re.sub(r"(?m)^images: \*\w+$", f"images: *{name}", IMAGES.read_text()))
    print(f"profile {name}: {len(differing) or 'no'} values changed")


if __name__ == "__main__":
    run(main)
