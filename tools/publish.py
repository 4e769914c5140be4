"""
Publish this checkout's run as a reference: python -m tools.publish NAME

in:   results/<profile>/               what the run produced
out:  results/reference/NAME/          its small files (numbers, tables, figures), both dvc.lock, params.yaml, run.json
Weights, raw client output and logs stay behind: they are in DVC's cache.
"""

import re
import shutil
import sys
import time
from pathlib import Path

from lib.core.provenance import made_by
from lib.core.stage import UserError, load_yaml, read_json, run, write_json
from tools.checkout import only_run

SMALL = {".json", ".csv", ".md", ".svg", ".png"}
MAX_BYTES = 500_000
# Folders whose small files are a tool's own output, belong to weights, or are made anew from the others.
LEFT_OUT = {"model", "models", "adapter", "adapters", "raw", "claims", "report", "corrected", "published"}


def small_files(folder):
    """The files of a run that a reader needs, relative to `folder`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in SMALL)
    inside = [path.relative_to(folder) for path in files if path.stat().st_size <= MAX_BYTES]
    return [path for path in inside if not LEFT_OUT & set(path.parts[:-1])]


def publish(name):
    """Copy the small files of this checkout's run to results/reference/NAME."""
    profile = load_yaml("params.yaml")["profile"]
    source, target = Path("results") / profile, Path("results/reference") / name
    files = small_files(source) if source.is_dir() else []
    if not files:
        raise UserError(f"{source} holds no results; `make reproduce PROFILE={profile}` makes them")
    read_json(source / "machine" / "machine.json")  # a run without its machine is no reference

    if target.exists():
        shutil.rmtree(target)
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
    for path in (Path("dvc.lock"), Path("studies/dvc.lock"), Path("params.yaml"), Path("experiments.yaml")):
        if path.exists():
            (target / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path)
    published = {"name": name, "profile": profile, "published": time.strftime("%Y-%m-%d"), "made_by": made_by()}
    write_json(target / "run.json", published)
    print(f"published {len(files)} files of profile {profile} under {target}; commit them")


def main():
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise UserError(f"NAME is {name!r}; use small letters, digits, dots and dashes, as in h200-weightless")
    with only_run("make publish"):
        publish(name)


if __name__ == "__main__":
    run(main)
