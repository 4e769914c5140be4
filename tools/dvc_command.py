"""
DVC's own command line, with its files read once and written whole: python -m tools.dvc_command repro TARGET...
"""

import os
import sys
from copy import deepcopy
from pathlib import Path


def mend_dvc():
    """Change how DVC reads and writes YAML in this process.

    It parses params.yaml at every stage and dvc.lock at every look at the graph, and parses and writes dvc.lock after
    each stage, also where nothing changed in it: most of the time of a run that has nothing to do. A DVC that is killed
    while it writes dvc.lock leaves half a file, which no later run can read.
    """
    from dvc.dvcfile import Lockfile
    from dvc.stage.serialize import to_lockfile
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _common, _yaml

    parse, dump_data, parsed = _yaml.parse_yaml, _common._dump_data, {}

    def parse_once(text, path, typ="safe"):
        if typ != "safe":  # with comments, to be written again
            return parse(text, path, typ)
        if text not in parsed:
            parsed[text] = parse(text, path)
        return deepcopy(parsed[text])

    def dump_changed(self, stages, **options):
        data = self.load() or {"schema": "2.0", "stages": {}}
        entries = {stage.name: to_lockfile(stage, **options)[stage.name] for stage in stages}
        if any(data["stages"].get(name) != entry for name, entry in entries.items()):
            data["stages"].update(entries)
            _yaml.dump_yaml(self.path, data)
            parsed[Path(self.path).read_text(encoding="utf-8")] = data
            self.repo.scm_context.track_file(self.relpath)

    def dump_whole(path, *words, **options):
        dump_data(f"{path}.part", *words, **options)
        os.replace(f"{path}.part", path)

    _yaml.parse_yaml = strictyaml.parse_yaml = parse_once
    Lockfile.dump_stages = dump_changed
    _common._dump_data = _yaml._dump_data = dump_whole


def main():
    from dvc.cli import main as dvc

    mend_dvc()
    sys.exit(dvc(sys.argv[1:]))


if __name__ == "__main__":
    main()
