"""
A checklist of the needs of a profile and the resources of this machine: python -m tools.doctor [PROFILE]

Nothing is written, fetched or started. Exit code 1 when something that the profile needs is missing.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from lib.core.gpu import gpus
from lib.core.stage import UserError, load_yaml, run
from stages.machine import usable_memory_gib
from tools.preflight import (
    Estimate,
    checked,
    disk_of_images,
    docker_answers,
    in_use,
    misfits,
    missing_images,
    missing_resources,
    old_drivers,
)


def values(profile):
    """The parameters as `make profile PROFILE=...` would write them."""
    params = checked()
    names = sorted(path.stem for path in Path("profiles").glob("*.yaml"))
    if profile not in names:
        raise UserError(f"PROFILE is {profile}; use one of {', '.join(names)}")
    for section, keys in load_yaml(f"profiles/{profile}.yaml").items():
        params[section] = params[section] | keys
    return params


def driver(images, cards):
    """[(fine, sentence)] about the driver of the GPUs, for each of the images in use that wants a newer one."""
    old = old_drivers(images, cards)
    return [(None, line) for line in old] or [(True, f"driver {cards[0]['driver']}")]


def container_toolkit():
    """(fine, sentence): can a container see the GPUs?"""
    if shutil.which("nvidia-ctk") or shutil.which("nvidia-container-runtime"):
        return True, "NVIDIA container toolkit"
    return False, "NVIDIA container toolkit: not found; `docker run --gpus all` needs it"


def registry_access(images):
    """(fine, sentence) about signing in to the registry of NVIDIA's images; None: it may do without."""
    if not any("nvcr.io" in image for image in images.values()):
        return []
    try:
        known = json.loads((Path.home() / ".docker/config.json").read_text()).get("auths", {})
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    if "nvcr.io" in known or os.environ.get("NGC_API_KEY"):
        return [(True, "NGC: signed in")]
    return [(None, "NGC: not signed in; if a pull is refused: docker login nvcr.io")]


def model_access(base):
    """(fine, sentence) about where the base model comes from, and its licence."""
    if base["source"] == "random":
        return []  # no weights of anyone's
    notes = [(None, f"licence of the base model: {base['licence']}; read it before you use {base['name']}")]
    if base["source"] == "hub":
        token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set; a gated model needs it"
        notes.append((None, f"Hugging Face: {base['name']} at {base['revision'][:12]}; {token}"))
    return notes


def checklist(profile, cards, free_gb, gib, docker):
    """[(fine, sentence)]: True is there, False is missing, None is for the reader to know."""
    params = values(profile)
    images = in_use(load_yaml("containers/images.yaml")[profile], params)
    needs = Estimate(**params["estimate"])
    pulled = [image for image in images.values() if image.startswith("docker://")]
    missing = missing_resources(needs, free_gb, gib, cards) + missing_images(images, docker)
    missing += disk_of_images(needs, images, free_gb)
    missing += misfits(params, load_yaml("containers/images.yaml")[profile], len(cards))
    checks = [(False, line) for line in missing]
    lacking = {line.split(":")[0] for line in missing}
    there = {
        "disk": f"disk: {free_gb:.0f} GB free, {needs.disk_gb:g} needed",
        "memory": f"memory: {gib} GiB, {needs.memory_gb:g} GB needed",
        **({"GPU": f"GPU: {', '.join(card['name'] for card in cards)}"} if needs.gpu_memory_gb else {}),
        **({"Docker": "Docker: the engine answers"} if pulled else {}),
        **({"image": f"images: {len(set(pulled))} with a digest"} if pulled else {}),
    }
    checks += [(True, line) for name, line in there.items() if name not in lacking]
    if pulled:
        checks += [container_toolkit(), *(driver(images, cards) if cards else []), *registry_access(images)]
    return checks + model_access(params["base_model"])


def main():
    profile = sys.argv[1] if len(sys.argv) > 1 else load_yaml("params.yaml")["profile"]
    docker = docker_answers()
    gib = usable_memory_gib()
    checks = checklist(profile, gpus(), shutil.disk_usage(".").free / 1e9, gib, docker)
    print(f"profile {profile}:")
    for fine, line in checks:
        print(f"  { ({True: 'ok', False: 'MISSING', None: 'note'}[fine]):8}{line}")
    print("What another card should give: `make estimate CARD=a100_sxm MODEL=llama-2-7b FORMAT=bf16 USERS=1,16,64`")
    if any(fine is False for fine, _ in checks):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
