"""
Download a model of the hub into its cache: python3 stages/workers/fetch_model.py NAME REVISION, in the environment that
will load it. Prints how much there is; huggingface_hub shows the progress.

Weights that the repository has as safetensors are not downloaded a second time in PyTorch's format.
"""

import sys

from huggingface_hub import HfApi, snapshot_download

OTHER_FORMATS = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "metal/*"]


def ignored(files):
    """Patterns of what transformers does not load of a repository with these files."""
    has_safetensors = any(name.endswith(".safetensors") for name in files)
    return OTHER_FORMATS + (["*.bin", "*.pt", "*.pth"] if has_safetensors else [])


def main():
    name, revision = sys.argv[1:]
    listed = HfApi().model_info(name, revision=revision, files_metadata=True).siblings
    files = {file.rfilename: file.size or 0 for file in listed}
    print(f"{name}: {sum(files.values()) / 1e9:.1f} GB in all its formats", flush=True)
    snapshot_download(name, revision=revision, ignore_patterns=ignored(files))


if __name__ == "__main__":
    main()
