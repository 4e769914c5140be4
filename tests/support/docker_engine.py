"""
A Docker engine and a registry of our own, for the tests of containers/run: what runs on this machine otherwise is not
touched. They need root, the kernel's rights for it, and Debian's docker.io and docker-registry.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24
TENSORRT = "/usr/local/tensorrt/lib"
PROGRAMS = ("sh", "bash", "id", "cat", "ls", "sleep", "touch", "env")

# Where root may not raise limits (a virtual machine or container without CAP_SYS_RESOURCE), no engine can set
# `--ulimit memlock=-1`. This runtime leaves that one limit out and is runc in all else.
RUNTIME = """#!{python}
import json, os, sys
if "--bundle" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    with open(path) as file:
        config = json.load(file)
    limits = config["process"].get("rlimits") or []
    config["process"]["rlimits"] = [limit for limit in limits if limit["type"] != "RLIMIT_MEMLOCK"]
    with open(path, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc", *sys.argv[1:]])
"""


def why_not():
    """What this machine lacks for an engine of our own, in one sentence; None where it has everything."""
    if missing := [name for name in ("dockerd", "docker", "docker-registry", "runc") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0 or not has_capability(CAP_SYS_ADMIN):
        return "starting a Docker engine needs root and CAP_SYS_ADMIN"
    return None


def has_capability(number):
    """True when this process has the Linux capability of that number."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


@dataclass
class Engine:
    host: str  # for DOCKER_HOST
    reference: str  # a small image in the registry, as docker://NAME:TAG@sha256:DIGEST

    def docker(self, *words, **options):
        """Run the docker client against this engine; its output as text."""
        env = {**os.environ, "DOCKER_HOST": self.host}
        return subprocess.run(
            ["docker", *words], env=env, check=True, stdout=subprocess.PIPE, text=True, **options
        ).stdout.strip()


@contextlib.contextmanager
def engine(folder):
    """A running Engine whose files are all under `folder` (a short path: a socket's may have 107 characters)."""
    words = [
        "dockerd", "--iptables=false", "--bridge=none", "--host", f"unix://{folder}/docker.sock",
        "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/docker.pid",
    ]  # fmt: skip
    if not has_capability(CAP_SYS_RESOURCE):
        (folder / "runtime").write_text(RUNTIME.format(python=sys.executable))
        (folder / "runtime").chmod(0o755)
        words += ["--add-runtime", f"limited={folder}/runtime", "--default-runtime", "limited"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "registry.yml").write_text(json.dumps(registry))
    registry_words = ["docker-registry", "serve", folder / "registry.yml"]
    try:
        with running(folder, "dockerd", words), running(folder, "registry", registry_words):
            made = Engine(f"unix://{folder}/docker.sock", "")
            wait_until(lambda: (folder / "docker.sock").is_socket() and answers(port), folder)
            (folder / "docker.sock").chmod(0o666)  # as for a user in the group docker
            made.reference = f"docker://{push_small_image(made, folder, f'localhost:{port}/small')}"
            yield made
    finally:
        # The engine leaves the mount of its network behind, and with it the folder could not be removed.
        for mount in folder.glob("exec/netns/*"):
            subprocess.run(["umount", mount], check=True)


@contextlib.contextmanager
def running(folder, name, words):
    """A process that writes folder/NAME.log and is ended with SIGTERM."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def answers(port):
    """True when something listens on the port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready, folder, seconds=30):
    """Return when ready() holds; RuntimeError with the ends of the logs when it does not in time."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join("\n".join(log.read_text().splitlines()[-3:]) for log in folder.glob("*.log"))
            raise RuntimeError(f"the Docker engine of the tests did not start:\n{logs}")
        time.sleep(0.05)


def push_small_image(made, folder, name):
    """Put an image of a few programs of this machine into the registry only; returns NAME:1@sha256:DIGEST.

    Its entrypoint fails, so whatever runs in it has set the entrypoint aside.
    """
    return push_image(
        made, folder / "root", f"{name}:1", {shutil.which(program): f"bin/{program}" for program in PROGRAMS}
    )


def push_image(made, root, name, programs, *others):
    """Make an image NAME:TAG of what is under `root`, with programs of this machine and the libraries they load.

    programs: {path here: path inside}. It goes into the registry only, under `others` too; returns each of the names as
    NAME:TAG@sha256:DIGEST, or the one.
    """
    for program in programs:
        copy_into(root, program, programs[program])
        for word in subprocess.run(["ldd", program], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                copy_into(root, word, word.lstrip("/"))
    # As NVIDIA's images: where TensorRT's libraries lie is set by bash alone.
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc/shinit").write_text(f"export LD_LIBRARY_PATH={TENSORRT}\n")
    tar = subprocess.run(["tar", "-C", root, "-c", "."], check=True, stdout=subprocess.PIPE).stdout
    changes = ['ENTRYPOINT ["/bin/sh", "-c", "exit 99"]', "ENV BASH_ENV=/etc/shinit"]
    words = ["docker", "import", *(word for change in changes for word in ("--change", change)), "-", name]
    subprocess.run(words, env={**os.environ, "DOCKER_HOST": made.host}, input=tar, check=True, stdout=subprocess.PIPE)
    for other in (name, *others):
        made.docker("tag", name, other)
        made.docker("push", other, stderr=subprocess.STDOUT)
    digest = made.docker("inspect", "--format", "{{index .RepoDigests 0}}", name).split("@")[1]
    made.docker("rmi", "--force", name, *others)
    references = [f"{one}@{digest}" for one in (name, *others)]
    return references if others else references[0]


def copy_into(root, source, inside):
    """Copy a file to `inside` under root, with its folders."""
    (root / inside).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.path.realpath(source), root / inside)
