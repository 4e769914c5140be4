"""
The contents of an image, and how they differ from the tested ones: python -m tools.provenance IMAGE

containers/run calls it on an image's first use. An image that has others still runs; the results then say so.

in:   data/written_for.yaml, containers/images.yaml (which role the image plays)
out:  .cache/images/DIGEST.json
"""

import sys

from lib.core.stage import UserError, load_yaml, run
from lib.trtllm.images import differences, look, record

IMAGES = "containers/images.yaml"


def roles(image):
    """The roles of an image, in any profile."""
    sets = load_yaml(IMAGES).values()
    return sorted({role for images in sets for role, reference in images.items() if reference == image})


def describe(image):
    """Write down what an image has inside, on its first use, and print where that is another than was expected."""
    if record(image).exists():
        return
    print(f"first use of {image}: looking at what it has inside", flush=True)
    seen = look(image)
    other = [line for role in roles(image) for line in differences(role, seen)]
    print(*(f"{image}: {line}" for line in other), f"what it has inside: {record(image)}", sep="\n", flush=True)


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python -m tools.provenance IMAGE")
    describe(sys.argv[1])


if __name__ == "__main__":
    run(main)
