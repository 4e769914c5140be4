"""What the tests share: copies of the tree to run in, and the small base model."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from lib.core.stage import fingerprint, read_json, write_json
from lib.serving.servers import Inputs
from tools.profile import set_values

pytest_plugins = ["bench_inputs"]

REPO = Path(__file__).resolve().parents[1]

# A shell that runs the tests in the background lets them and all their commands ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For tiny models, which are too small for more: two of them then run side by side, and their sums are always the same.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def variables():
    """The environment variables that a command in a copied tree gets."""
    # A copy is no git repository: what made a result is not what these tests are about.
    found = {**os.environ, "REPO_COMMIT": "none", "REPO_DIRTY": "true"}
    # Compiled modules are kept: importing transformers and trl takes a third of the time with them.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    # Beside the other worker of `make test` two threads wait for each other's core most of the time.
    if "PYTEST_XDIST_WORKER" in found:
        found |= ONE_THREAD
    # Under `make test` a make that a test starts would take itself for a part of that one, and print where it is.
    return {name: value for name, value in found.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}


def tracked_files():
    """Every file that belongs to the project, relative to its root: tracked, or new and not ignored."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (REPO / name).is_file()]


def copy_tree(target):
    """Copy the project's files to `target`; the environments of this checkout serve there too."""
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target / name)
    (REPO / ".venvs").mkdir(exist_ok=True)
    (target / ".venvs").symlink_to(REPO / ".venvs")
    return target


def set_params(tree, **sections):
    """Set keys of a copied tree's params.yaml: set_params(tree, finetune={"epochs": 2})."""
    path = tree / "params.yaml"
    values = {(section, key): value for section, keys in sections.items() for key, value in keys.items()}
    path.write_text(set_values(path.read_text(), values))


def write_files(folder, texts):
    """Write {path in the folder: its text}."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run_in(tree, *command, environment=None, **options):
    """Run a command in a copied tree, with further environment variables; its output as text."""
    env = variables() | (environment or {})
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, **options)


def probe(tree, image, name, *words, environment=None):
    """What tests/support/probes/NAME.py finds out inside an environment: the JSON that it prints last."""
    # Not `python FILE`: the project's root, where `stages` is, has to be first on the path.
    code = f"import runpy; runpy.run_path('tests/support/probes/{name}.py', run_name='__main__')"
    done = run_in(
        tree,
        "containers/run",
        image,
        "python",
        "-c",
        code,
        *map(str, words),
        environment=ONE_THREAD | (environment or {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def at_once(*calls):
    """Results of functions without arguments, two of them running at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def stage(tree, image, name, *words):
    """Run a stage in a copied tree, which must succeed; returns its folder of results."""
    done = run_in(tree, "containers/run", image, "python", "-m", f"stages.{name}", *words, environment=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "results" / "embedded" / name


def every_input(tree=Path(), profile="embedded"):
    """What servers read in the results of a profile."""
    folder = tree / "results" / profile
    return Inputs(*(folder / name for name in ("base_model", "repository", "trtllm_serve", "finetune")))


def left_out(tree, study):
    """What a study writes of vLLM in a copied tree whose params.yaml leaves out all its servers."""
    base = {"name": "tiny", "weights": "random", "parameters": 1}
    write_json(tree / "results" / "embedded" / "base_model" / "metrics.json", base)
    set_params(tree, **{study: {"servers": []}})
    return read_json(stage(tree, "venv:tools", study, "vllm", "venv:a", "venv:b") / "vllm" / f"{study}.json")


def tiny_wheel(folder):
    """Make the wheel of a package tinypkg, whose VALUE is 42, in a folder for UV_FIND_LINKS; gives its sha256."""
    folder.mkdir()
    wheel, info = folder / "tinypkg-1.0-py3-none-any.whl", "tinypkg-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinypkg.py", "VALUE = 42\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"tinypkg.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def only_error(done):
    """The one line on stderr of a command that ended with a user's mistake; a traceback or a second line fails."""
    assert done.returncode == 1, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-2000:]
    return lines[0]


@pytest.fixture
def tree(tmp_path):
    """A copy of the project to change and run in."""
    return copy_tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """The folder results/embedded/base_model, made by the stage as it stands; kept between test runs."""
    made_from = [REPO / name for name in ("stages/base_model.py", "containers/pytorch/requirements.txt")]
    kept = REPO / ".cache" / "tests" / f"base_model-{fingerprint([], made_from)}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker waits, and finds it made
        if not kept.exists():
            tree = copy_tree(tmp_path_factory.mktemp("base_model") / "tree")
            shutil.move(stage(tree, "venv:pytorch", "base_model"), kept)
    return kept


# A Llama with everything that the large ones have (grouped heads, untied tables), small enough for a second a step.
TINY_SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made_once(factory, name, make):
    """The folder that make(folder) makes: the first worker of this run that needs it makes it, the others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, part = shared / f"once-{name}", shared / f"once-{name}.part"
    with (shared / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """A copy of the project with a tiny random Llama as its base model and 16 rows to train on, both made by stages."""
    tree = tmp_path_factory.mktemp("small") / "tree"
    return Path(shutil.copytree(made_once(tmp_path_factory, "small", make_small_tree), tree, symlinks=True))


def make_small_tree(tree):
    copy_tree(tree)
    (tree / "data" / "shapes" / "tiny.json").write_text(json.dumps(TINY_SHAPE))
    set_params(
        tree,
        base_model={"source": "random", "name": "tiny", "shape": "tiny", "revision": "none", "licence": "none"},
        dataset={"template": "llama-2", "train_rows": 16, "validation_rows": 4},
        finetune={"epochs": 2, "micro_batch": 2, "accumulation": 2, "learning_rate": 0.01, "eval_steps": 2},
        chat={"max_new_tokens": 8},
        style={"prompts": 0},
    )
    stage(tree, "venv:pytorch", "base_model")
    stage(tree, "venv:pytorch", "dataset")


FINETUNE = ["containers/run", "venv:pytorch", "python", "-m", "stages.finetune"]


@pytest.fixture(scope="session")
def trained(small_tree, tmp_path_factory):
    """The tiny model fine-tuned by both methods, a core each; returns results/embedded/finetune."""
    finetune = small_tree / "results" / "embedded" / "finetune"

    def make(folder):
        runs = at_once(
            *(partial(run_in, small_tree, *FINETUNE, method, environment=ONE_THREAD) for method in ("lora", "qlora"))
        )
        assert [run.returncode for run in runs] == [0, 0], [run.stderr[-3000:] for run in runs]
        shutil.copytree(finetune, folder)

    shutil.copytree(made_once(tmp_path_factory, "trained", make), finetune, dirs_exist_ok=True)
    return finetune


def own_network():
    """The words before a command that give it a network of its own, without a way out; none where that is forbidden."""
    words = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


OWN_NETWORK = own_network()
# Their servers listen on Triton's and vLLM's own ports, 8000 to 8002: one worker runs them, one after the other.
LISTENING = {"test_bench", "test_multilora", "test_quickstart", "test_client_accuracy", "test_servers",
             "test_serving", "test_streaming", "test_writeup_images"}  # fmt: skip
LISTENING |= set() if OWN_NETWORK else {"test_reproduce"}


# Half a minute and more: at the end one worker would wait for the other.
LONG = ("test_reproduce", "test_finetune", "test_vram", "test_speedups", "test_style", "test_chat", "test_base_model",
        "test_tools_chat", "test_random_weights")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Those that listen come first, for together they take longest; then the long ones, the whole graph before all."""

    def turn(item):
        name = item.path.stem
        return name not in LISTENING, LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=turn)


def pytest_xdist_make_scheduler(config, log):
    """Under `make test` a file stays on one worker, with all that it shares."""
    return ByFile(config, log)


class ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        file = Path(nodeid.partition("::")[0]).stem
        return "servers" if file in LISTENING else file


# A word of a reason for which a test is skipped, and the command that enables it.
ENABLE = {
    "not installed": "apt-get install docker.io docker-registry skopeo runc",
    "needs root": "run as root with CAP_SYS_ADMIN, in a virtual machine for instance",
    "no git checkout": "git clone instead of an archive",
}


def pytest_terminal_summary(terminalreporter):
    """What was skipped, why, and what enables it."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.items():
        command = next((command for word, command in ENABLE.items() if word in reason), None)
        terminalreporter.write_line(f"{count} skipped: {reason}" + (f"; to run them: {command}" if command else ""))
