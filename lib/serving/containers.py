"""
CPU time and memory of what runs in a container, out of its control groups: its processes are the engine's, so the
session of Docker's client has none of them.

A container whose figures cannot be had raises OSError or LookupError: unknown, not 0.
"""

import subprocess
from functools import lru_cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
INSPECT_SECONDS = 5


def container_name(words):
    """The name in the command line of Docker's client, as containers/run writes it; None for any other program."""
    if len(words) < 2 or Path(words[0]).name != "docker" or words[1] != "run":
        return None
    return words[words.index("--name") + 1]


@lru_cache(maxsize=64)
def container_cgroups(name):
    """{controller: folder} of a running container's control groups; version 2's only one is named ""."""
    command = ["docker", "inspect", "--format", "{{.Id}} {{.State.Pid}}", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSPECT_SECONDS)
    if done.returncode:
        raise LookupError(f"{name}: no such container")
    identity, pid = done.stdout.split()
    folders = read_cgroups(Path(f"/proc/{pid}/cgroup").read_text(), identity)
    if not folders:  # not started yet, or an engine on another machine, whose number is some other process here
        raise LookupError(f"{name}: process {pid} is not in its control group")
    return folders


def read_cgroups(text, identity):
    """{controller: folder} of those lines of /proc/PID/cgroup whose group belongs to the container `identity`."""
    folders = {}
    for line in text.splitlines():
        _, controllers, group = line.split(":", 2)
        if identity not in group:
            continue
        for controller in controllers.split(","):
            base = CGROUPS / controller
            if not controller and (CGROUPS / "unified").is_dir():
                base = CGROUPS / "unified"
            folders[controller] = base / group.strip("/")
    return folders


def container_cpu_seconds(name):
    """CPU seconds that a container's processes have used, ended ones included."""
    folders = container_cgroups(name)
    if "cpuacct" in folders:
        return int((folders["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
    return read_stat(folders[""] / "cpu.stat")["usage_usec"] / 1e6


def container_memory_mib(name):
    """MiB of memory that a container's processes hold, page cache left out."""
    folders = container_cgroups(name)
    if "memory" in folders:
        return read_stat(folders["memory"] / "memory.stat")["total_rss"] / 2**20
    return read_stat(folders[""] / "memory.stat")["anon"] / 2**20


def read_stat(path):
    """A control group's file of "NAME NUMBER" lines as {name: number}."""
    return {name: int(number) for name, number in map(str.split, path.read_text().splitlines())}
