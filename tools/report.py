"""
Verdicts, report, and the tables of README and docs/, made from the results that are there: python -m tools.report
"""

import subprocess
import sys

from lib.core.parent import die_with_parent
from lib.core.stage import run
from tools.checkout import only_run

MODULES = ("stages.serving_summary", "stages.claims", "stages.report", "tools.pages")


def main():
    with only_run("make report"):
        for module in MODULES:
            if code := subprocess.run([sys.executable, "-m", module], preexec_fn=die_with_parent()).returncode:
                sys.exit(code)


if __name__ == "__main__":
    run(main)
