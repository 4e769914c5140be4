"""
Lock the environments anew and resolve image tags to digests: python -m tools.lock; with --digests the digests alone

in:   containers/*/requirements.in, excludes.txt; containers/images.yaml
out:  containers/*/requirements.txt with hashes; containers/images.yaml with the locks' own hashes, and with digests for
      the images that had none; containers/images.json with the date, the architectures and the size of each
A digest that is known is never overwritten: when its tag has moved, that is said, and the known image stays in use.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lib.core.stage import UserError, run
from tools.checkout import only_run

IMAGES = Path("containers/images.yaml")
RECORDS = Path("containers/images.json")
REFERENCE = re.compile(
    r"docker://(?P<name>(?:[\w.-]+:\d+/)?[\w./-]+):(?P<tag>[\w.-]+)@sha256:(?P<digest>[0-9a-f]{64}|UNRESOLVED)"
)


def compile_command(folder):
    """The words that lock one environment; the lock holds hashes and names no index."""
    excludes, on_image = folder / "excludes.txt", folder / "image-python"
    python = on_image.read_text().strip() if on_image.exists() else "3.11"
    return [
        *(uv(), "pip", "compile", "--quiet", "--python-version", python, "--generate-hashes"),
        *("--no-emit-index-url", "--no-emit-find-links", "--no-header"),
        *(["--excludes", str(excludes)] if excludes.exists() else []),
        *(str(folder / "requirements.in"), "-o", str(folder / "requirements.txt")),
    ]


def uv():
    """uv on PATH, or the one that containers/venv installed."""
    return shutil.which("uv") or ".venvs/uv/bin/uv"


def resolve_command(name, tag):
    """The words that print a tag's digest, with the tool that is here; UserError without one."""
    if shutil.which("skopeo"):
        return ["skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", f"docker://{name}:{tag}"]
    if shutil.which("crane"):
        return ["crane", "digest", f"{name}:{tag}"]
    if has_buildx():
        return ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", f"{name}:{tag}"]
    if shutil.which("docker"):  # which tells the digest of what it has; a run pulls the image anyway
        look = 'docker pull --quiet "$0" >/dev/null && docker image inspect --format "{{index .RepoDigests 0}}" "$0"'
        return ["sh", "-c", look, f"{name}:{tag}"]
    raise UserError("images cannot be resolved: install docker, skopeo or crane")


def has_buildx():
    """Whether docker has its plugin for registries; Debian's docker.io comes without."""
    words = ["docker", "buildx", "version"]
    return shutil.which("docker") is not None and subprocess.run(words, capture_output=True).returncode == 0


def with_digests(text, resolve):
    """images.yaml's text with every UNRESOLVED filled in; resolve(name, tag) gives "sha256:..." or None.

    Returns (text, lines to print): the resolved digests, those that have moved, those that could not be resolved.
    """
    lines = []
    for name, tag, known in sorted({match.groups() for match in REFERENCE.finditer(text)}):
        digest = resolve(name, tag)
        if digest is None:
            lines.append(f"{name}:{tag}: not resolved, left as it is")
        elif known == "UNRESOLVED":
            text = text.replace(f"{name}:{tag}@sha256:UNRESOLVED", f"{name}:{tag}@{digest}")
            lines.append(f"{name}:{tag}: resolved to {digest}")
        elif digest != f"sha256:{known}":
            lines.append(f"{name}:{tag}: has moved to {digest}; sha256:{known} stays in use, change it by hand")
        else:
            lines.append(f"{name}:{tag}: unchanged")
    return text, lines


def record_images(records, text, manifest_of, today):
    """`records` with an entry for every image with a digest: {digest, resolved, gb: {architecture: packed size}}.

    manifest_of(NAME@DIGEST) gives the registry's JSON, or None. One that is recorded already is not asked for again.
    """
    entries = {}
    for name, tag, known in sorted({match.groups() for match in REFERENCE.finditer(text)}):
        image, digest = f"{name}:{tag}", f"sha256:{known}"
        if known == "UNRESOLVED":
            continue
        if records.get(image, {}).get("digest") == digest:
            entries[image] = records[image]
        elif (index := manifest_of(f"{name}@{digest}")) is not None:
            manifests = {None: index} if "layers" in index else platforms(name, index, manifest_of)
            gb = {
                kind or "unknown": round(sum(part["size"] for part in each["layers"]) / 1e9, 2)
                for kind, each in manifests.items()
            }
            entries[image] = {"digest": digest, "resolved": today, "gb": gb}
    return entries


def platforms(name, index, manifest_of):
    """{architecture: its manifest} of an image for several machines; attestations are none."""
    kinds = {
        manifest["platform"]["architecture"]: manifest_of(f"{name}@{manifest['digest']}")
        for manifest in index["manifests"]
        if manifest.get("platform", {}).get("os") == "linux"
    }
    return {kind: manifest for kind, manifest in kinds.items() if manifest}


def ask_manifest(reference):
    """The JSON that a registry has for NAME@DIGEST, or None when it does not answer or no tool here asks for it."""
    asking = {
        "skopeo": ["skopeo", "inspect", "--raw", f"docker://{reference}"],
        "crane": ["crane", "manifest", reference],
        "docker": ["docker", "buildx", "imagetools", "inspect", "--raw", reference],
    }
    words = next((words for program, words in asking.items() if shutil.which(program)), None)
    answer = subprocess.run(words, capture_output=True, text=True) if words else None
    return json.loads(answer.stdout) if answer and answer.returncode == 0 else None


def with_locks(text):
    """images.yaml's text with the first 12 digits of each lock's sha256 behind its environment's name: venv:NAME@LOCK,
    and docker://IMAGE+NAME@LOCK.

    tools goes without: it starts the others, and a new ruff there should not measure everything again.
    """

    def locked(match):
        runner, name = match.group(1, 2)
        if name == "tools":
            return "venv:tools"
        lock = Path("containers") / name / "requirements.txt"
        return f"{runner}{name}@{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"

    return re.sub(r"((?<=: )venv:|(?<=[0-9a-f]{64})\+|(?<=UNRESOLVED)\+)([\w-]+)(@[0-9a-f]{12})?", locked, text)


def ask_registry(name, tag):
    """The tag's digest as its registry gives it now, or None when it does not answer; its client's own words are shown
    then."""
    answer = subprocess.run(resolve_command(name, tag), capture_output=True, text=True)
    digest = re.search(r"sha256:[0-9a-f]{64}$", answer.stdout.strip())
    if not digest:
        lines = (answer.stderr or answer.stdout).strip().splitlines()[-3:]
        print(f"{name}:{tag}:", *(lines or ["no output"]), sep="\n| ", file=sys.stderr)
    return digest[0] if digest else None


def compile_environment(folder):
    """The variables that uv locks an environment with. The CPU build of torch is not on the package index: an
    environment that asks for it gets PyTorch's own, where no local wheels are named; any other keeps its CUDA build."""
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if links:
        return {**os.environ, "UV_FIND_LINKS": links}
    cpu = re.search(r"(?m)^torch==.*\+cpu", (folder / "requirements.in").read_text())
    rest = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "UV_TORCH_BACKEND")}
    return rest | ({"UV_TORCH_BACKEND": "cpu"} if cpu else {})


def lock_environments():
    """Write every requirements.txt anew."""
    for source in sorted(Path("containers").glob("*/requirements.in")):
        print(f"locking {source.parent.name}", flush=True)
        if subprocess.run(compile_command(source.parent), env=compile_environment(source.parent)).returncode:
            raise UserError(f"{source} cannot be locked; uv's reason is above")


def lock(with_environments):
    """Write the locks, the digests and what was found about the images; tell about each image."""
    text = IMAGES.read_text()
    if with_environments:
        lock_environments()
        text = with_locks(text)
    text, lines = with_digests(text, ask_registry)
    IMAGES.write_text(text)
    before = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    records = record_images(before, text, ask_manifest, datetime.date.today().isoformat())
    if records or before:
        RECORDS.write_text(json.dumps(records, indent=2) + "\n")
    lines += [f"{image}: {record['resolved']}, {record['gb']} GB packed" for image, record in records.items()]
    print("\n".join(lines))


def main():
    if sys.argv[1:] not in ([], ["--digests"]):
        raise UserError("usage: python -m tools.lock [--digests]")
    with only_run(f"make {'digests' if sys.argv[1:] else 'lock'}"):
        lock(with_environments=not sys.argv[1:])


if __name__ == "__main__":
    run(main)
