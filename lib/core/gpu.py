"""
The NVIDIA GPUs as the driver sees them: which there are, what they do, and who uses them.

The list comes from nvidia-smi, which every machine with a driver has; figures under load come from NVML. A question
that the driver does not answer gives None (unknown), never an exception.
"""

import os
import subprocess
import time

from lib.core.attempt import attempt
from lib.core.stage import UserError

# Bits of NVML's clock event reasons that mean that the card is slower than it could be, and why (nvml.h).
SLOWED = {0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
          0x80: "hardware power brake"}  # fmt: skip
POWER_CAP = 0x4
LEAVE_SECONDS = 10  # to wait for stopped workers to leave NVML's process list


def gpus():
    """The NVIDIA GPUs that CUDA programs of this shell see, as {name, memory_mib, driver}; an empty list without one.

    memory_mib is None where the GPU shares the machine's memory: nvidia-smi says [N/A] there (GB10).
    """
    return [
        {"name": name, "memory_mib": int(memory) if memory.isdigit() else None, "driver": driver}
        for name, memory, driver in query_gpus("name,memory.total,driver_version")
    ]


def query_gpus(fields):
    """nvidia-smi's fields of each GPU that CUDA programs of this shell see; an empty list without an answer."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown == "":
        return []
    if shown and "MIG" not in shown:  # nvidia-smi names no parts of a GPU
        query.append(f"--id={shown}")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def use_gpus(count):
    """Show CUDA programs started from here on the first `count` of the GPUs alone: a Trainer splits every step over all
    that it sees."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if shown is None else shown.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:count])


def torch_device():
    """ "cuda" or "cpu"; UserError where a CUDA build of torch sees no GPU: 7 B would train on the CPU for weeks."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda:
        raise UserError(
            f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU; look at nvidia-smi, at "
            "CUDA_VISIBLE_DEVICES, and whether the driver is new enough (make doctor)"
        )
    return "cpu"


def architecture():
    """The architecture of those GPUs as "sm_90"; None without one. UserError where they differ."""
    kinds = sorted({kind for (kind,) in query_gpus("compute_cap")})
    if len(kinds) > 1:
        raise UserError(f"GPUs of different kinds ({', '.join(kinds)}): choose some with CUDA_VISIBLE_DEVICES")
    return f"sm_{kinds[0].replace('.', '')}" if kinds else None


def gpu_handles():
    """NVML's handles of the GPUs that CUDA programs of this shell see; an empty list without a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is None:
            return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        words = [word.strip() for word in shown.split(",") if word.strip()]
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(word)
            for word in words
        ]
    except Exception:  # no driver, no package, or a GPU that NVML does not know: unknown in the validity checks
        return []


def gpu_sample(handle):
    """{watts, sm_mhz, celsius, slowed, capped} of one GPU now; None where the driver does not tell."""
    import pynvml

    watts = attempt(pynvml.nvmlDeviceGetPowerUsage, handle)
    reasons = attempt(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return {
        "watts": None if watts is None else watts / 1000,
        "sm_mhz": attempt(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "celsius": attempt(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "slowed": None if reasons is None else [name for bit, name in SLOWED.items() if reasons & bit],
        "capped": None if reasons is None else bool(reasons & POWER_CAP),
    }


def gpu_mib():
    """Memory in use on those GPUs together, whoever uses it; None without a GPU or where the driver does not tell."""
    handles = gpu_handles()
    if not handles:
        return None
    import pynvml

    used = [attempt(pynvml.nvmlDeviceGetMemoryInfo, handle) for handle in handles]
    return None if None in used else sum(each.used for each in used) / 2**20


def other_gpu_processes():
    """Ids of processes that hold memory on the GPUs and stay; None where the driver does not tell."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while (pids := gpu_processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return pids


def gpu_processes():
    """Ids of the processes that hold memory on the GPUs now; None where the driver does not tell."""
    handles = gpu_handles()
    if not handles:
        return None
    import pynvml

    running = [attempt(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) for handle in handles]
    return None if None in running else [each.pid for processes in running for each in processes]
