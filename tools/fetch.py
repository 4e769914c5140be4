"""
Fetch what a run needs from registries before anything is timed: images, the packages on top of them, and a base model
of the hub. tools/preflight.py calls it last; what is here already costs nothing.

in:   containers/images.yaml, containers/images.json (packed sizes)
out:  the images in Docker's storage, .venvs/NAME, .cache/images/DIGEST.json, the model in .cache/home
"""

import json
import os
import subprocess
import time
from pathlib import Path

from lib.core.stage import UserError, results
from tools.provenance import describe

SIZES = Path("containers/images.json")


def fetch_images(images):
    """Pull every image of {role: image} that Docker has not, and look into each; UserError where one fails.

    A role may share its image with others; images that need no Docker are left to their first use.
    """
    wanted = sorted({image for image in images.values() if image.startswith("docker://")})
    for number, image in enumerate(wanted, 1):
        reference, _, packages = image.removeprefix("docker://").partition("+")
        if not has_image(reference):
            pull(reference, f"image {number} of {len(wanted)}: {reference.partition('@')[0]}")
        if packages:
            call(["containers/venv", packages.partition("@")[0]], f"{image}: its packages could not be installed")
        describe(image)


def has_image(reference):
    """True when Docker holds the image NAME:TAG@sha256:DIGEST."""
    return subprocess.run(["docker", "image", "inspect", reference], capture_output=True).returncode == 0


def pull(reference, title):
    """Pull an image with Docker's own progress, and its size and the minutes before and after."""
    packed, begun = packed_gb(reference), time.monotonic()
    print(f"{title}, {'size unknown' if packed is None else f'{packed:g} GB packed'}", flush=True)
    call(["docker", "pull", reference], f"{reference} could not be pulled")
    print(f"{title}: pulled in {(time.monotonic() - begun) / 60:.1f} min", flush=True)


def packed_gb(reference):
    """GB of an image as the registry keeps it, the largest of its architectures; None where `make digests` has not
    recorded it."""
    name, _, digest = reference.partition("@")
    known = json.loads(SIZES.read_text()).get(name, {}) if SIZES.exists() else {}
    return max(known["gb"].values()) if known.get("digest") == digest else None


def call(command, failure):
    """Run a command that shows its own progress; UserError `failure` when it fails."""
    if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"{failure} (exit code {code}, its message is above); run the same again, what is here is kept")


def fetch_model(base, image):
    """Download a base model of the hub (section base_model of params.yaml) in the image that will load it."""
    if base["source"] != "hub" or (results("base_model") / "metrics.json").exists():
        return
    token = "set" if os.environ.get("HF_TOKEN") else "not set; a gated model needs it"
    words = ["python3", "stages/workers/fetch_model.py", base["name"], base["revision"]]
    call(["containers/run", image, *words], f"{base['name']} could not be downloaded; HF_TOKEN is {token}")
