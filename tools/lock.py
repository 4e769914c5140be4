"""
Lock the environments anew and resolve image tags to digests: python -m tools.lock

in:   containers/*/requirements.in, excludes.txt; containers/images.yaml
out:  containers/*/requirements.txt with hashes; containers/images.yaml with the locks' own hashes, and with digests for
      the images that had none
A digest that is known is never overwritten: when its tag has moved, that is said, and the known image stays in use.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from stages.stage import UserError, run

IMAGES = Path("containers/images.yaml")
REFERENCE = re.compile(r"docker://(?P<name>[\w./-]+):(?P<tag>[\w.-]+)@sha256:(?P<digest>[0-9a-f]{64}|UNRESOLVED)")


def compile_command(folder):
    """The words that lock one environment; the lock holds hashes and names no index."""
    excludes = folder / "excludes.txt"
    return [
        *(uv(), "pip", "compile", "--quiet", "--python-version", "3.11", "--generate-hashes"),
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
    if shutil.which("docker"):
        return ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", f"{name}:{tag}"]
    raise UserError("images cannot be resolved: install skopeo, or docker with buildx")


def with_digests(text, resolve):
    """images.yaml's text with every UNRESOLVED filled in; resolve(name, tag) gives "sha256:..." or None.

    Returns (text, lines to tell): what was resolved, what has moved, what could not be reached.
    """
    told = []
    for found in sorted({match.groups() for match in REFERENCE.finditer(text)}):
        name, tag, known = found
        digest = resolve(name, tag)
        if digest is None:
            told.append(f"{name}:{tag}: could not be reached, left as it is")
        elif known == "UNRESOLVED":
            text = text.replace(f"{name}:{tag}@sha256:UNRESOLVED", f"{name}:{tag}@{digest}")
            told.append(f"{name}:{tag}: resolved to {digest}")
        elif digest != f"sha256:{known}":
            told.append(f"{name}:{tag}: has moved to {digest}; sha256:{known} stays in use, change it by hand")
        else:
            told.append(f"{name}:{tag}: unchanged")
    return text, told


def with_locks(text):
    """images.yaml's text with the first 12 digits of each lock's sha256 behind its environment's name.

    tools goes without: it starts the others, and a new ruff there should not measure everything again.
    """

    def locked(match):
        if match.group(1) == "tools":
            return "venv:tools"
        lock = Path("containers") / match.group(1) / "requirements.txt"
        return f"venv:{match.group(1)}@{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"

    return re.sub(r"(?<=: )venv:([\w-]+)(@[0-9a-f]{12})?", locked, text)


def ask_registry(name, tag):
    """The tag's digest as its registry gives it now, or None when it does not answer."""
    answer = subprocess.run(resolve_command(name, tag), capture_output=True, text=True)
    digest = answer.stdout.strip()
    return digest if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) else None


def main():
    environment = {**os.environ, "UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))}
    if not environment["UV_FIND_LINKS"]:
        del environment["UV_FIND_LINKS"]
        environment["UV_TORCH_BACKEND"] = "cpu"
    for source in sorted(Path("containers").glob("*/requirements.in")):
        print(f"locking {source.parent.name}", flush=True)
        if subprocess.run(compile_command(source.parent), env=environment).returncode:
            raise UserError(f"{source} cannot be locked; uv's reason is above")
    text, told = with_digests(with_locks(IMAGES.read_text()), ask_registry)
    IMAGES.write_text(text)
    print("\n".join(told))


if __name__ == "__main__":
    run(main)
