"""
The facts of this machine. Every measuring stage depends on this file, so a checkout that moves to another machine
measures again, and a checkout that stays does not: only facts that do not change by themselves stand here.

out:  results/<profile>/machine/machine.json   cpu, cores, memory_gib, gpus
"""

import os
import platform
from pathlib import Path

from lib.core.gpu import gpus
from lib.core.stage import results, run, write_json


def cpu_name(cpuinfo):
    """The processor's name out of /proc/cpuinfo's text; the architecture where the kernel gives no name."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_features(cpuinfo):
    """Of the instruction sets that decide the speed of a CPU run, those that this processor has."""
    flags = next((line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def memory_gib(meminfo):
    """Installed memory in whole GiB: the kernel's own share makes the exact figure move from boot to boot."""
    kib = next(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemTotal"))
    return round(kib / 2**20)


def memory_limit_gib(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """The least memory limit of this process's control groups in GiB; None without one."""
    limits = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        name, base = ("memory.limit_in_bytes", root / "memory") if controllers else ("memory.max", root)
        folder = base / group.strip("/")
        for place in [folder, *folder.parents]:
            text = (place / name).read_text().strip() if (place / name).is_file() else "max"
            if text.isdigit() and int(text) < 2**60:  # version 1 says "none" with a number near 2^63
                limits.append(int(text) / 2**30)
            if place == base:
                break
    return min(limits, default=None)


def usable_memory_gib():
    """The memory that this process may use, in GiB: the machine's, or less under a container's limit."""
    installed = memory_gib(Path("/proc/meminfo").read_text())
    return min(installed, memory_limit_gib() or installed)


def main():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    write_json(
        results("machine") / "machine.json",
        {
            "cpu": cpu_name(cpuinfo),
            "cpu_features": cpu_features(cpuinfo),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": memory_gib(Path("/proc/meminfo").read_text()),
            "gpus": gpus(),
        },
    )


if __name__ == "__main__":
    run(main)
