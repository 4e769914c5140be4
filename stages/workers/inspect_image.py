"""
The contents of an image as JSON on stdout: python3 stages/workers/inspect_image.py, run in it, with its own Python
alone.

versions of the packages that decide what is built, sha256 of the scripts that we call, the placeholders of every
config.pbtxt of the skeleton, and the help text of trtllm-build. What is not there is null or left out.
"""

import hashlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "tensorrt_llm",
    "tensorrt",
    "nvidia-modelopt",
    "torch",
    "transformers",
    "genai-perf",
    "tritonclient",
    "vllm",
    "trl",
    "peft",
    "bitsandbytes",
    "numpy",
)
SCRIPTS = ("examples/quantization/quantize.py", "examples/models/core/llama/convert_checkpoint.py",
           "examples/hf_lora_convert.py", "tools/fill_template.py", "scripts/launch_triton_server.py")  # fmt: skip
SKELETON = "all_models/inflight_batcher_llm"


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def help_of(program):
    try:
        return subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return None


def main():
    app = Path(sys.argv[1] if len(sys.argv) > 1 else "/app")
    contents = {
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in PACKAGES},
        "sha256": {
            name: hashlib.sha256((app / name).read_bytes()).hexdigest() for name in SCRIPTS if (app / name).is_file()
        },
        "placeholders": {
            path.parent.name: sorted(set(re.findall(r"\$\{(\w+)\}", path.read_text())))
            for path in sorted((app / SKELETON).glob("*/config.pbtxt"))
        },
        "trtllm_build_help": help_of("trtllm-build"),
    }
    print(json.dumps(contents, indent=2))


if __name__ == "__main__":
    main()
