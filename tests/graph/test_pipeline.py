"""dvc.yaml, params.yaml, profiles/, containers/, stages/ and tools/ agree: seconds, no model, no network."""

import ast
import dataclasses
import hashlib
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import REPO, copy_tree, run_in, tracked_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.core.stage import load_yaml, read_params
from tools.profile import changes

PROFILES = sorted(path.stem for path in (REPO / "profiles").glob("*.yaml"))
DIGEST = r"@sha256:(?:[0-9a-f]{64}|UNRESOLVED)"
LOCKED = r"[\w-]+@[0-9a-f]{12}"
REFERENCE = rf"venv:tools|venv:{LOCKED}|host:|docker://(?:[\w.-]+:\d+/)?[\w./-]+:[\w.-]+{DIGEST}(?:\+{LOCKED})?"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """{profile: its stages as DVC resolves them} and {profile: its params.yaml}."""
    from dvc.repo import Repo

    stages, params = {}, {}
    tree = copy_tree(tmp_path_factory.mktemp("pipeline") / "tree")
    run_in(tree, "git", "init", "--quiet")
    for profile in PROFILES:
        done = run_in(tree, "containers/run", "venv:tools", "python", "-m", "tools.profile", profile)
        assert done.returncode == 0, done.stderr
        params[profile] = load_yaml(tree / "params.yaml")
        with Repo(str(tree)) as repo:
            stages[profile] = [
                {
                    "name": stage.name,
                    "file": f"stages/{stage.name.split('@')[0]}.py",
                    "cmd": stage.cmd,
                    "deps": [dep.def_path for dep in stage.deps],
                    "outs": [out.def_path for out in stage.outs],
                    "params": [key for dep in stage.deps for key in getattr(dep, "params", None) or []],
                }
                for stage in repo.index.stages
            ]
    return stages, params


@pytest.fixture(params=PROFILES)
def graph(request, graphs):
    """The stages of one profile whose file is there (the first test says which are not)."""
    return [stage for stage in graphs[0][request.param] if (REPO / stage["file"]).is_file()]


# What a source file says about itself.


@cache
def parsed(file):
    return ast.parse((REPO / file).read_text())


@cache
def imports(file):
    """The project's own files that a file imports."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] in ("stages", "lib", "tools")}
    return {one for one in files if (REPO / one).is_file()}


def closure(file, through=lambda file: True):
    """The file with all that it imports, transitively; imports of a file for which `through` is false are left out."""
    found, queue = set(), [file]
    while queue:
        one = queue.pop()
        if one not in found:
            found.add(one)
            queue += [other for other in imports(one) if through(other)]
    return found


def own_code(stage):
    """The files whose main a stage runs: its own and the modules that are no stage themselves."""
    return closure(stage["file"], through=lambda file: Path(file).stem not in stage_names())


@cache
def stage_names():
    return {name for graph in ("dvc.yaml", "studies/dvc.yaml") for name in load_yaml(REPO / graph)["stages"]}


def calls(file, name):
    """The calls of a function of that name in a file."""
    return [
        node
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def sections_read(file):
    """The sections of params.yaml that a file asks read_params for, as {section: class name}."""
    classes = [call.args[0].id for call in calls(file, "read_params") if isinstance(call.args[0], ast.Name)]
    nodes = list(ast.walk(parsed(file)))
    known = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    known |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", one).lower(): one for one in classes if one in known}


def keys_read(file):
    """The top-level keys that a file takes as load_yaml("params.yaml")["key"]."""
    return {
        node.slice.value
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and ast.unparse(node.value) == "load_yaml('params.yaml')"
    }


def result_paths(file):
    """Every results("stage") / "a" / "b" of a file as (path, whole): not whole where a part is no constant."""
    inner = {
        id(node.left) for node in ast.walk(parsed(file)) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    }
    for node in ast.walk(parsed(file)):
        if id(node) in inner:
            continue
        parts, whole = [], True
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts, node = [node.right, *parts], node.left
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "results" and node.args:
            path = []
            for part in [node.args[0], *parts]:
                whole = whole and isinstance(part, ast.Constant)
                path += [part.value] if whole else []
            yield "/".join(path), whole and bool(parts)


# The graph and the code.


def test_every_stage_runs_its_own_file_in_a_named_environment(graphs):
    for stage in (stage for stages in graphs[0].values() for stage in stages):
        module = stage["file"][:-3].replace("/", ".")
        assert re.fullmatch(rf"containers/run (?:{REFERENCE}) python -m {re.escape(module)}(?: .+)?", stage["cmd"]), (
            stage
        )
        assert (REPO / stage["file"]).is_file(), f"{stage['file']} is missing"


def test_every_stage_has_a_test_file():
    tested = {path.stem for path in (REPO / "tests").glob("*/test_*.py")}
    assert [name for name in stage_names() if f"test_{name}" not in tested] == []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda words: words[0])
def test_the_code_passes_the_linter(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_line_of_a_graph_or_of_the_parameters_is_too_long():
    files = ("dvc.yaml", "studies/dvc.yaml", "params.yaml", "experiments.yaml")
    assert [(name, line) for name in files for line in text(name).splitlines() if len(line) > 120] == []


def test_a_test_name_has_at_most_60_characters():
    files = [name for name in tracked_files() if Path(name).match("tests/**/test_*.py")]
    names = {node.name for name in files for node in ast.walk(parsed(name)) if isinstance(node, ast.FunctionDef)}
    assert len(files) > 50 and [name for name in names if name.startswith("test_") and len(name) > 60] == []


def code_files(pattern):
    return {name for name in tracked_files() if re.fullmatch(pattern, name) and not name.endswith("__init__.py")}


def test_stages_holds_the_stages_and_nothing_else():
    assert code_files(r"stages/\w+\.py") == {f"stages/{name}.py" for name in stage_names()}


def test_every_module_serves_a_stage_a_worker_or_a_tool():
    started = code_files(r"(stages|stages/workers|tools)/\w+\.py")
    assert code_files(r"lib/.*\.py") - set().union(*map(closure, started)) == set()


def test_the_map_names_every_chapter():
    chapters = {path.name for path in (REPO / "lib").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"(?m)^  (\w+)/ {2,}\S", text("README.md"))) == chapters
    named = set(re.findall(r"`([\w/.]+\.(?:py|yaml))`", text("docs/architecture.md")))
    assert [name for name in named if not (REPO / name).exists() and "NAME" not in name and "WRITEUP" not in name] == []


def test_package_files_are_empty():
    assert [name for name in tracked_files() if name.endswith("__init__.py") and text(name)] == []


def layer(file):
    """Arrows go from a higher layer to the same or a lower one; a stage and a worker import no stage."""
    return ["lib/core/", "lib/", "stages/workers/", "stages/", "tools/"].index(
        next(start for start in ("lib/core/", "lib/", "stages/workers/", "stages/", "tools/") if file.startswith(start))
    )


def test_imports_go_down_the_layers():
    wrong = []
    for file in code_files(r"(lib|stages|tools)/.*\.py"):
        for other in imports(file):
            is_stage = re.fullmatch(r"stages/\w+\.py", other) and not file.startswith("tools/")
            draws = other.startswith("lib/report/") and not file.startswith(
                ("lib/report/", "stages/report.py", "stages/bench_vllm_vs_trtllm.py", "tools/")
            )
            if layer(other) > layer(file) or is_stage or draws:
                wrong.append(f"{file} imports {other}")
    assert wrong == []


def test_no_module_imports_itself_through_others():
    for file in code_files(r"(lib|stages|tools)/.*\.py"):
        assert file not in set().union(*map(closure, imports(file))), file


def covers(dep, file):
    return file == dep or file.startswith(f"{dep}/")


def workers(stage):
    """The worker programs that a stage depends on: it starts them in another environment."""
    return [dep for dep in stage["deps"] if dep.startswith("stages/workers/")]


def test_a_stage_depends_on_all_code_that_it_runs(graph):
    for stage in graph:
        code = set().union(*map(closure, [stage["file"], *workers(stage)]))
        missing = [file for file in code if not any(covers(dep, file) for dep in stage["deps"])]
        assert missing == [], stage["name"]


def test_a_stage_depends_on_no_code_that_it_does_not_run(graph):
    for stage in graph:
        code = set().union(*map(closure, [stage["file"], *workers(stage)]))
        deps = [dep for dep in stage["deps"] if dep.startswith(("lib", "stages"))]
        assert [dep for dep in deps if not any(covers(dep, file) for file in code)] == [], stage["name"]
        texts = "".join(text(file) for file in code)
        for worker in workers(stage):
            assert worker in texts or worker[:-3].replace("/", ".") in texts, f"{stage['name']} never starts {worker}"


def test_a_stage_declares_exactly_the_sections_that_it_reads(graph):
    for stage in graph:
        read = {key for file in own_code(stage) for key in [*sections_read(file), *keys_read(file)]}
        assert {key.split(".")[0] for key in stage["params"]} == read, stage["name"]


def test_an_experiment_depends_on_its_own_definition_only(graphs):
    for profile, params in graphs[1].items():
        bench = params["bench"]
        experiments = {stage["name"]: stage["params"] for stage in graphs[0][profile] if stage["name"][:6] == "bench@"}
        assert experiments.keys() == {f"bench@{name}" for name in bench["experiments"]}
        for name, keys in experiments.items():
            # A limit changes no number: a higher one measures nothing again.
            limits = {"ready_seconds", "point_seconds"}
            own = {"definitions", "experiments", *limits, f"definitions.{name.removeprefix('bench@')}"}
            assert set(keys) == {"profile"} | {f"bench.{key}" for key in (bench.keys() ^ own) - {"experiments"}}


def test_only_a_stage_or_a_tool_opens_a_results_folder_by_name():
    assert [file for file in code_files(r"lib/.*\.py") if calls(file, "results")] == []


def test_a_stage_depends_on_the_results_and_data_that_it_reads(graph):
    for stage in graph:
        profile = next(out.split("/")[1] for out in stage["outs"])
        # Of one file with several stages (bench@base, bench@lora), each reads its own part.
        same = [other for other in graph if other["file"] == stage["file"]]
        declared = [path for other in same for path in other["deps"] + other["outs"]]
        for file in own_code(stage):
            for path, whole in result_paths(file):
                if stage["name"].startswith("bench@") and path == "finetune":
                    continue  # through trtllm_serve/lora/serve.json, which holds the adapters' hashes
                place = f"results/{profile}/{path}"
                covers = any(place == one or place.startswith(f"{one}/") for one in declared)
                inside = any(one.startswith(f"{place}/") for one in declared)
                assert covers or (inside and not whole), f"{stage['name']} reads {place} without depending on it"
            for node in ast.walk(parsed(file)):
                data = isinstance(node, ast.Constant) and re.fullmatch(r"data/[\w./-]+", str(node.value))
                if data:
                    assert any(node.value == one or node.value.startswith(f"{one}/") for one in declared), (
                        f"{stage['name']} reads {node.value} without depending on it"
                    )


def test_what_measures_depends_on_the_machine_it_measured(graph):
    for stage in graph:
        if stage["name"].startswith(("finetune@", "bench@", "limits", "speedups", "streaming@", "multilora@")):
            assert any(dep.endswith("/machine/machine.json") for dep in stage["deps"]), stage["name"]


def test_the_base_model_benchmark_ignores_the_fine_tuning(graph):
    made_by = {out: stage for stage in graph for out in stage["outs"]}

    def before(stage):
        found = {stage["name"]}
        for dep in stage["deps"]:
            for out, maker in made_by.items():
                if out == dep or out.startswith(f"{dep}/") or dep.startswith(f"{out}/"):
                    found |= before(maker)
        return found

    for stage in graph:
        if stage["name"] == "bench@base":
            assert not [name for name in before(stage) if name.startswith("finetune")], stage["name"]


def test_no_result_is_in_git_and_made_by_a_stage_too(graph):
    tracked = tracked_files()
    for stage in graph:
        for out in stage["outs"]:
            assert not [name for name in tracked if name == out or name.startswith(f"{out}/")]


# Parameters.


def test_every_section_is_read_by_a_stage_or_a_tool():
    files = [name for name in tracked_files() if re.fullmatch(r"(lib|stages|tools)/.*\.py", name)]
    read = {key for file in files for key in [*sections_read(file), *keys_read(file)]}
    assert set(load_yaml(REPO / "params.yaml")) - read == set()
    assert read - set(load_yaml(REPO / "params.yaml")) == set()


def test_each_section_has_exactly_the_keys_of_its_class(graphs, tmp_path):
    files = [name for name in tracked_files() if re.fullmatch(r"(lib|stages|tools)/.*\.py", name)]
    for profile, params in graphs[1].items():
        path = tmp_path / f"{profile}.yaml"
        path.write_text(yaml.safe_dump(params))
        for file in files:
            for section, name in sections_read(file).items():
                cls = getattr(importlib.import_module(file[:-3].replace("/", ".")), name)
                assert dataclasses.asdict(read_params(cls, path)) == params[section]


def test_no_parameter_has_a_default_in_code():
    for file in [name for name in tracked_files() if re.fullmatch(r"(lib|stages|tools)/.*\.py", name)]:
        for name in sections_read(file).values():
            cls = getattr(importlib.import_module(file[:-3].replace("/", ".")), name)
            for field in dataclasses.fields(cls):
                assert field.default is field.default_factory is dataclasses.MISSING, f"{file}: {name}.{field.name}"


def test_a_class_of_one_section_has_the_same_fields_everywhere():
    fields = {}
    for file in [name for name in tracked_files() if re.fullmatch(r"(lib|stages|tools)/.*\.py", name)]:
        for section, name in sections_read(file).items():
            cls = getattr(importlib.import_module(file[:-3].replace("/", ".")), name)
            fields.setdefault(section, set()).add(tuple((field.name, field.type) for field in dataclasses.fields(cls)))
    assert [section for section, kinds in fields.items() if len(kinds) > 1] == []


def leaves(profile):
    return {(section, key): value for section, keys in profile.items() for key, value in keys.items()}


def test_every_profile_sets_the_same_keys_with_the_same_types():
    first, *others = (leaves(load_yaml(REPO / "profiles" / f"{name}.yaml")) for name in PROFILES)
    assert [name for name in ("embedded", "weightless", "writeup") if name not in PROFILES] == []
    for other in others:
        assert other.keys() == first.keys()
        assert {key: type(value) for key, value in other.items()} == {key: type(value) for key, value in first.items()}


def test_every_profile_key_is_a_parameter_of_the_same_type():
    params = leaves({key: value for key, value in load_yaml(REPO / "params.yaml").items() if isinstance(value, dict)})
    for name in PROFILES:
        for key, value in leaves(load_yaml(REPO / "profiles" / f"{name}.yaml")).items():
            assert type(params.get(key)) is type(value), (name, key)


def committed(name):
    return subprocess.run(["git", "show", f"HEAD:{name}"], cwd=REPO, capture_output=True, text=True).stdout


def test_the_table_of_times_names_the_stages_of_the_graph(graphs):
    main = load_yaml(REPO / "dvc.yaml")["stages"]
    for profile, seconds in load_yaml(REPO / "data/stage_seconds.yaml").items():
        names = {stage["name"] for stage in graphs[0][profile] if stage["name"].split("@")[0] in main}
        assert seconds.keys() == names


def test_the_committed_parameters_are_the_embedded_profile():
    if not committed("params.yaml"):
        pytest.skip("this is no git checkout")
    params, profile = (yaml.safe_load(committed(name)) for name in ("params.yaml", "profiles/embedded.yaml"))
    assert params["profile"] == "embedded" and changes(params, profile) == []
    assert re.search(r"(?m)^images: \*embedded$", committed("containers/images.yaml"))


# Environments.


def image_sets():
    """{profile: {role: reference}}."""
    return {name: entry for name, entry in load_yaml(REPO / "containers" / "images.yaml").items() if name != "images"}


def environments():
    """The names of all environments that an image set asks for, those that lie on an image among them."""
    references = " ".join(reference for entry in image_sets().values() for reference in entry.values())
    return sorted(set(re.findall(r"(?:venv:|\+)([\w-]+)", references)))


def test_every_profile_has_its_set_of_images_with_the_same_roles():
    sets = image_sets()
    assert sorted(sets) == PROFILES
    assert len({tuple(entry) for entry in sets.values()}) == 1


def test_a_reference_names_its_runner_and_a_docker_digest():
    for name, entry in image_sets().items():
        for role, reference in entry.items():
            assert re.fullmatch(REFERENCE, reference), f"{name}.{role}: {reference}"


def test_the_profile_without_a_gpu_needs_no_docker():
    assert all(reference.startswith("venv:") for reference in image_sets()["embedded"].values())


def test_images_are_named_in_images_yaml_only():
    host = re.compile(r"(?:nvcr\.io|docker\.io|ghcr\.io|quay\.io)/\w|@sha256:[0-9a-f]{12}")
    code = [name for name in tracked_files() if re.match(r"(lib|stages|tools|containers|profiles)/|[^/]+$", name)]
    code = [name for name in code if not name.endswith(".md") and not re.fullmatch(r"containers/images\.\w+", name)]
    assert [name for name in code if host.search(text(name))] == []


def test_environments_and_locks_match_one_to_one():
    locked = {path.parent.name for path in (REPO / "containers").glob("*/requirements.txt")}
    assert set(environments()) - locked == set()
    assert locked - set(environments()) - {"uv"} == set()


def test_only_images_with_a_named_python_get_packages():
    references = {reference for entry in image_sets().values() for reference in entry.values()}
    named = {path.parent.name for path in (REPO / "containers").glob("*/image-python")}
    assert named == {one.partition("+")[2].split("@")[0] for one in references if "+" in one}


LOCKS = sorted(str(path.relative_to(REPO)) for path in (REPO / "containers").glob("*/requirements.txt"))


def locked_versions(lock):
    """{package: version} of a lock file."""
    found = re.findall(r"(?m)^([\w.-]+)(?:\[[\w,]+\])?==([^\s;\\]+)", (REPO / lock).read_text())
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_a_hash_and_no_index_is_named(lock):
    entries = re.split(r"(?m)^(?=[A-Za-z])", re.sub(r"(?m)^ *#.*\n", "", (REPO / lock).read_text()))
    for entry in filter(str.strip, entries):
        assert re.match(r"[\w.-]+(\[[\w,]+\])?==\S+", entry) and "--hash=sha256:" in entry, entry[:80]
    assert not re.search(r"://|index-url|find-links|trusted-host", (REPO / lock).read_text())


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_every_requirement(lock):
    versions = locked_versions(lock)
    lines = (REPO / lock).with_suffix(".in").read_text().splitlines()
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        asked = Requirement(line)
        version = versions.get(canonicalize_name(asked.name))
        assert version and asked.specifier.contains(version, prereleases=True), f"{asked} is locked as {version}"


@pytest.mark.parametrize("lock", LOCKS)
def test_what_a_lock_leaves_out_on_purpose_is_not_in_it(lock):
    excludes = (REPO / lock).parent / "excludes.txt"
    names = excludes.read_text().splitlines() if excludes.exists() else []
    left_out = {canonicalize_name(name.split("#")[0].strip()) for name in names if name.split("#")[0].strip()}
    assert left_out & locked_versions(lock).keys() == set()


def test_a_changed_lock_runs_its_stages_again(graph):
    for stage in graph:
        for name, lock in re.findall(r"(?:venv:|\+)([\w-]+)@([0-9a-f]{12})", stage["cmd"]):
            content = (REPO / "containers" / name / "requirements.txt").read_bytes()
            assert hashlib.sha256(content).hexdigest()[:12] == lock, f"{name} is locked anew: run `make lock`"


# Names for people.


def recipes():
    """The commands of the Makefile, as words, with TOOLS filled in."""
    makefile = text("Makefile")
    tools = re.search(r"(?m)^TOOLS = (.*)$", makefile).group(1)
    lines = [line.strip().lstrip("@") for line in makefile.splitlines() if line.startswith("\t")]
    return [part.replace("$(TOOLS)", tools).split() for line in lines for part in line.split("&&")]


def test_every_module_that_make_runs_is_there():
    modules = [words[words.index("-m") + 1].rstrip(")") for words in recipes() if "-m" in words]
    assert len(modules) >= 5
    missing = [one for one in modules if one != "pytest" and not (REPO / f"{one.replace('.', '/')}.py").is_file()]
    assert missing == []


def test_every_dvc_command_that_make_runs_is_one():
    from dvc.cli import parse_args

    commands = [["repro", *words[words.index("tools.repro") + 1 :]] for words in recipes() if "tools.repro" in words]
    assert commands
    for words in commands:
        parse_args(words)  # exits on an option that dvc does not have


def test_make_help_lists_every_target_with_its_cost():
    targets = set(re.search(r"(?m)^\.PHONY: (.*)$", text("Makefile")).group(1).split())
    done = subprocess.run(["make", "--no-print-directory", "help"], cwd=REPO, capture_output=True, text=True)
    listed = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert listed.keys() == targets
    assert [name for name in targets - {"help"} if not re.search(r"second|minute|min,|hour", listed[name])] == []


# What must never be committed.


@cache
def text(name):
    """A project file as text; empty where it is none."""
    try:
        return (REPO / name).read_text()
    except UnicodeDecodeError:
        return ""


def test_no_file_names_a_local_path_or_a_registry():
    path = re.compile(r"""(?<![\w.$}])/(?:work|root|farm|home/\w+|Users/\w+|tmp/lab|tmp/pytest)[/"'\s]""")
    host = re.compile(r"py(?:pi\.org|thonhosted)|registry\.npm(?:js)|deb\.deb(?:ian)|download\.pytor(?:ch)")
    found = {
        name: (path.search(text(name)) or host.search(text(name))).group()
        for name in tracked_files()
        if path.search(text(name)) or host.search(text(name))
    }
    assert found == {}


def test_no_file_holds_a_secret():
    secret = re.compile(r"\bhf_[A-Za-z0-9]{30,}|\bnvapi-[\w-]{40,}|-----BEGIN [A-Z ]*PRIVATE KEY")
    assert [name for name in tracked_files() if secret.search(text(name))] == []


def test_no_file_is_too_large_for_git():
    assert [name for name in tracked_files() if (REPO / name).stat().st_size > 2**20] == []
