"""
Commands inside an image, what the image has inside, and whether an engine built in one fits here.

in:   data/written_for.yaml       the versions that the flags and files were checked for
out:  .cache/images/DIGEST.json   what an image has inside
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lib.core.parent import die_with_parent, exit_words
from lib.core.stage import UserError, load_yaml, read_json, write_json

WRITTEN_FOR = "data/written_for.yaml"


def record(image):
    """The record of an image's contents, by its digest; containers/run looks for it."""
    digest, plus, packages = image.rpartition("@sha256:")[2].partition("+")
    return Path(".cache/images") / f"{digest[:12]}{plus}{packages}.json"


def look(image):
    """The contents of `image`, by stages/workers/inspect_image.py, kept by its digest; UserError if that cannot run
    there."""
    if image.startswith("docker://") and record(image).exists():
        return read_json(record(image))
    command = ["containers/run", image, "python3", "stages/workers/inspect_image.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "REPO_LOOKING": "1"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{image}: what it has inside cannot be looked up: {last}")
    # The NVIDIA images' own greeting is set aside with their entrypoint; a program may still say something first.
    contents = json.loads(done.stdout[done.stdout.index("{") :])
    if image.startswith("docker://"):
        write_json(record(image), contents)
    return contents


def differences(role, contents):
    """Messages for each difference from the tested image; versions match by prefix."""
    wanted = load_yaml(WRITTEN_FOR)[role]
    reasons = [
        f"{package} is {contents['versions'].get(package)}, this was written for {version}"
        for package, version in wanted["versions"].items()
        if not str(contents["versions"].get(package)).startswith(version)
    ]
    for script, sha256 in wanted.get("sha256", {}).items():
        if contents["sha256"].get(script) != sha256:
            reasons.append(f"{script} is {'another than was read' if script in contents['sha256'] else 'not there'}")
    for model, keys in wanted.get("placeholders", {}).items():
        if lacking := [key for key in keys if key not in contents["placeholders"].get(model, [])]:
            reasons.append(f"{model}/config.pbtxt has no placeholder {', '.join(lacking)}")
    return reasons


def unknown_flags(command, help_text):
    """The flags of a command that the tool's own help does not name."""
    flags = [word for word in command if word.startswith("--")]
    return [flag for flag in flags if help_text and flag not in help_text]


def in_image(image, command, log, name=None):
    """Run a command in the image, its output in `log`; the seconds it took. UserError behind the log's last lines."""
    begun, name = time.monotonic(), name or Path(command[command[0] == "python3"]).name
    print(f"{name}: its output goes to {log}", flush=True)
    with log.open("ab") as sink:
        words = ["containers/run", image, *map(str, command)]
        code = subprocess.run(words, stdout=sink, stderr=sink, preexec_fn=die_with_parent()).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()[-15:]
        print(f"the last lines of {log}:", *lines, sep="\n| ", file=sys.stderr)
        raise UserError(f"{name} failed ({exit_words(code)}); its output: {log}")
    return round(time.monotonic() - begun, 1)


def engines(folder):
    """Every engine that is built, by variant, as its engine.json says it."""
    built = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/engine.json"))}
    return {variant: engine for variant, engine in built.items() if engine["not_built"] is None}


def rebuild(built, gpu, image):
    """Why an engine cannot be used here, in one line; None when it can. gpu: architecture(), None where unknown."""
    key = built["key"]
    if gpu == key["gpu"] and image == key["image"]:
        return None
    here = gpu if image == key["image"] else f"{gpu} with {image}"
    return f"rebuild: built for {key['gpu']} with TensorRT-LLM {key['tensorrt_llm']}, found {here or 'no GPU'}"
