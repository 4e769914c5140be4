"""
`dvc repro` for the other targets of make, one run of this checkout at a time: python -m tools.repro TARGET...
"""

import subprocess
import sys

from lib.core.parent import die_with_parent
from lib.core.stage import run
from tools.checkout import only_run


def reproduce(targets):
    """Run the stages `targets` with what they depend on, in a checkout that is held; exits as DVC does where that
    fails."""
    command = [sys.executable, "-m", "tools.dvc_command", "repro", *targets]
    code = subprocess.run(command, preexec_fn=die_with_parent()).returncode
    if code:
        sys.exit(code)


def main():
    with only_run(f"dvc repro {' '.join(sys.argv[1:])}"):
        reproduce(sys.argv[1:])


if __name__ == "__main__":
    run(main)
