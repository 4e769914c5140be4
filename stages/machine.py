"""
What this machine is. Every measuring stage depends on this file, so a checkout that moves to another machine
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
