"""containers/run and containers/venv: the one place that starts anything in an environment."""

import getpass
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import docker_engine
import psutil
import pytest
from conftest import REPO, run_in, tiny_wheel, variables
from terminal import CTRL_C, Terminal

from lib.core.attempt import attempt
from lib.serving.containers import container_memory_mib, container_name
from lib.serving.monitor import cpu_seconds
from tools import lock

DIGEST = "sha256:" + "0123456789abcdef" * 4
IMAGE = f"docker://example.org/team/image:1.0@{DIGEST}"


@pytest.fixture
def bare(tmp_path):
    """A project with nothing but containers/run and containers/venv."""
    folder = tmp_path / "project"
    (folder / "containers").mkdir(parents=True)
    for name in ("run", "venv"):
        shutil.copy2(REPO / "containers" / name, folder / "containers" / name)
    return folder


@pytest.mark.parametrize("image", ["host:", "venv:tools"])
@pytest.mark.parametrize("code", [0, 1, 7, 130])
def test_exit_codes_pass_through(tree, image, code):
    assert run_in(tree, "containers/run", image, "sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("image", ["host:", "venv:tools"])
def test_arguments_survive_as_they_are(tree, image):
    words = ["two words", "", "*", "$HOME", "a'b\"c", "--flag=1", "日本語", "two\nlines"]
    done = run_in(tree, "containers/run", image, "python3", "-c", "import sys; print(sys.argv[1:])", *words)
    assert done.stdout.strip() == repr(words)


def test_the_command_runs_where_it_was_called_from(tree):
    (tree / "data").mkdir(exist_ok=True)
    done = run_in(tree / "data", "../containers/run", "host:", "pwd")
    assert done.stdout.strip() == str(tree / "data")


@pytest.mark.parametrize("image", ["host:", "venv:tools"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command_and_no_process_stands_between(tree, image, sent):
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(int(sys.argv[1]), lambda number, frame: sys.exit(40 + number))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    words = ["containers/run", image, "python3", "-c", code, str(int(sent))]
    process = subprocess.Popen(words, cwd=tree, stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(sent)
    assert process.wait(10) == 40 + sent


@pytest.mark.parametrize(
    "image, says",
    [
        ("pytorch", "'pytorch' is no image reference; use venv:NAME, host: or docker://NAME:TAG@sha256:DIGEST"),
        ("nvcr.io/nvidia/pytorch:25.09-py3", "is no image reference"),
        ("venv:pytroch", "venv:pytroch has no lock file; use one of: client pytorch tools"),
        ("venv:tools@0123456789ab", "the lock of tools is another than venv:tools@0123456789ab; `make lock` writes"),
        ("docker://example.org/a:1", "docker://example.org/a:1 has no digest; pin it as NAME:TAG@sha256:..."),
        ("docker://example.org/a:1@sha256:UNRESOLVED", "has no digest yet; `make digests` resolves it"),
        (
            "docker://example.org/a:1@sha256:UNRESOLVED+client",
            "a:1@sha256:UNRESOLVED has no digest yet; `make digests`",
        ),
    ],
)
def test_a_bad_reference_is_one_line_and_exit_code_2(tree, image, says):
    for other in set(os.listdir(tree / "containers")) - {
        *("run", "venv", "images.yaml", "provenance.py", "client", "pytorch", "tools")
    }:
        shutil.rmtree(tree / "containers" / other)
    done = run_in(tree, "containers/run", image, "true")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: containers/run: ") and says in done.stderr


def test_image_packages_need_their_image(tree):
    done = run_in(tree, "containers/run", "venv:client-image", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: containers/run: venv:client-image lies on an image; see containers/images.yaml\n"


def test_without_a_command_it_shows_how_it_is_used(tree):
    done = run_in(tree, "containers/run", "venv:tools")
    assert done.returncode == 2 and done.stderr.startswith("containers/run IMAGE COMMAND...")


def test_a_command_learns_what_runs_it(tree):
    done = run_in(tree, "containers/run", "venv:tools", "env")
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert (seen["REPO_IMAGE"], seen["REPO_COMMIT"], seen["REPO_DIRTY"]) == ("venv:tools", "none", "true")
    lock = hashlib.sha256((tree / "containers" / "tools" / "requirements.txt").read_bytes()).hexdigest()
    assert seen["REPO_LOCK"] == lock
    assert seen["VIRTUAL_ENV"] == f"{tree}/.venvs/tools" and seen["PATH"].startswith(f"{tree}/.venvs/tools/bin:")


def test_modules_from_outside_do_not_enter_a_locked_environment(tree, tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit('not the locked one')\n")
    done = run_in(
        tree, "containers/run", "venv:tools", "python", "-c", "import yaml", environment={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr


def test_dirty_ignores_changes_that_the_run_itself_made(bare):
    env = {name: value for name, value in os.environ.items() if name not in ("REPO_COMMIT", "REPO_DIRTY")}

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=bare, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def said():
        words = ["containers/run", "host:", "sh", "-c", "echo $REPO_COMMIT $REPO_DIRTY"]
        return subprocess.run(words, cwd=bare, env=env, capture_output=True, text=True).stdout.split()

    assert said() == ["unknown", "true"]  # no repository: nobody can say that nothing was changed
    git("init", "--quiet")
    (bare / "dvc.lock").write_text("a")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    commit = git("rev-parse", "HEAD")
    assert said() == [commit, "false"]
    (bare / "dvc.lock").write_text("b")
    (bare / "studies").mkdir()
    (bare / "studies" / "dvc.lock").write_text("c")
    assert said() == [commit, "false"]
    (bare / "new.py").write_text("")
    assert said() == [commit, "true"]


@pytest.fixture
def tiny(bare):
    """A project with one environment of one package, which lies beside it: nothing is fetched."""
    digest = tiny_wheel(bare / "wheels")
    (bare / "containers" / "small").mkdir()
    write_lock(bare, digest)
    if shutil.which("uv") is None:  # the one that made this environment
        (bare / ".venvs").mkdir()
        (bare / ".venvs" / "uv").symlink_to(REPO / ".venvs" / "uv")
    return bare


def write_lock(project, digest):
    (project / "containers" / "small" / "requirements.txt").write_text(f"tinypkg==1.0 --hash=sha256:{digest}\n")


def in_small(project, *command):
    """Run a command in that environment, without any package index."""
    environment = {"UV_FIND_LINKS": str(project / "wheels"), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}
    return run_in(project, "containers/run", "venv:small", *command, environment=environment)


VALUE = ["python", "-c", "import tinypkg; print(tinypkg.VALUE)"]


def test_an_environment_is_made_on_first_use_and_then_left_alone(tiny):
    first = in_small(tiny, *VALUE)
    assert (first.returncode, first.stdout) == (0, "42\n"), first.stderr
    assert "making the environment small (1 packages)" in first.stderr
    second = in_small(tiny, *VALUE)
    assert (second.stdout, second.stderr) == ("42\n", "")


def test_concurrent_stages_create_an_environment_once(tiny):
    env = {**os.environ, "UV_FIND_LINKS": str(tiny / "wheels"), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}
    both = [
        subprocess.Popen(
            ["containers/run", "venv:small", *VALUE], cwd=tiny, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in said] == ["42\n", "42\n"]
    assert "".join(err for _, err in said).count("making the environment") == 1


def test_a_package_with_another_hash_stops_the_run(tiny):
    right = (tiny / "containers" / "small" / "requirements.txt").read_text().strip().split(":")[1]
    write_lock(tiny, "0" * 64)
    for _ in range(2):  # a failed environment is never taken for a whole one
        done = in_small(tiny, *VALUE)
        assert done.returncode != 0 and done.stdout == ""
        assert "tinypkg" in done.stderr and "ash" in done.stderr and "0" * 64 in done.stderr
    write_lock(tiny, right)
    assert in_small(tiny, *VALUE).stdout == "42\n"


def test_setup_runs_once_and_activate_on_every_start(tiny):
    folder = tiny / "containers" / "small"
    (folder / "setup").write_text('#!/bin/sh\necho made >> "$1/setup.txt"\n')
    (folder / "setup").chmod(0o755)
    (folder / "activate").write_text('export SMALL_LIBRARY="$VIRTUAL_ENV/lib"\n')
    for _ in range(2):
        done = in_small(tiny, "sh", "-c", "cat $VIRTUAL_ENV/setup.txt; echo $SMALL_LIBRARY")
        assert done.stdout.split() == ["made", f"{tiny}/.venvs/small/lib"], done.stderr
    (folder / "setup").write_text('#!/bin/sh\necho again >> "$1/setup.txt"\n')
    assert in_small(tiny, "sh", "-c", "cat $VIRTUAL_ENV/setup.txt").stdout == "again\n"


def test_a_setup_that_fails_stops_the_run(tiny):
    setup = tiny / "containers" / "small" / "setup"
    setup.write_text("#!/bin/sh\necho 'error: a library is missing' >&2\nexit 2\n")
    setup.chmod(0o755)
    for _ in range(2):
        done = in_small(tiny, *VALUE)
        assert (done.returncode, done.stdout) == (2, "") and "a library is missing" in done.stderr


@pytest.fixture
def fake_docker(tmp_path, monkeypatch):
    """A `docker` that notes its words and its environment and exits with 7; no GPU unless a test makes one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(
        '#!/bin/sh\n[ "$1" = info ] && exit "${ENGINE:-0}"\n[ "$1" = run ] || exit 0\n'
        f'printf "%s\\0" "$@" > {tmp_path}/words\nenv > {tmp_path}/env\nexit 7\n'
    )
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("HF_TOKEN", "NGC_API_KEY", "REPO_LOCK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REPO_LOOKING", "1")  # what an image's first use does is tested with a real engine
    return folder


def noted(tmp_path):
    return (tmp_path / "words").read_text().split("\0")[:-1]


def test_docker_gets_exactly_this_command(tree, tmp_path, fake_docker):
    done = run_in(tree, "containers/run", IMAGE, "python", "-m", "stages.finetune", "two words")
    assert (done.returncode, done.stderr) == (7, "")
    words = noted(tmp_path)
    assert words.pop(4).startswith("qlora-to-triton-")
    assert words == [
        "run", "--rm", "--init", "--name",
        "--ipc", "host", "--network", "host",
        "--ulimit", "memlock=-1", "--ulimit", "stack=67108864",
        "--user", f"{os.getuid()}:{os.getgid()}", "--env", f"HOME={tree}/.cache/home",
        "--env", f"USER={getpass.getuser()}",
        "--volume", f"{tree}:{tree}", "--workdir", str(tree),
        "--env", "REPO_IMAGE", "--env", "REPO_COMMIT", "--env", "REPO_DIRTY", "--env", "PYTHONUTF8=1",
        "--env", "NO_PROXY", "--env", "no_proxy",
        "--entrypoint", "", f"example.org/team/image:1.0@{DIGEST}",
        "bash", "-c", 'exec "$@"', "bash", "python", "-m", "stages.finetune", "two words",
    ]  # fmt: skip


def test_added_packages_come_before_those_of_the_image(bare, tmp_path, fake_docker):
    (bare / "containers" / "top").mkdir()
    lock = bare / "containers" / "top" / "requirements.txt"
    lock.write_text("")
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    packages = bare / ".venvs" / "top"
    packages.mkdir(parents=True)
    (packages / "lock.sha256").write_text(digest)  # made already
    assert run_in(bare, "containers/run", f"{IMAGE}+top@{digest[:12]}", "true").returncode == 7
    words = noted(tmp_path)
    given = words[words.index("no_proxy") + 1 : words.index("--entrypoint")]
    assert given == [
        "--volume", f"{packages}:{packages}", "--env", f"PYTHONPATH={packages}", "--env", f"REPO_LOCK={digest}",
    ]  # fmt: skip
    assert words[-6:] == [IMAGE.removeprefix("docker://"), "bash", "-c", 'exec "$@"', "bash", "true"]
    done = run_in(bare, "containers/run", f"{IMAGE}+top@0123456789ab", "true")
    assert done.returncode == 2 and "the lock of top is another than docker://example.org" in done.stderr


def test_an_interactive_command_gets_an_available_terminal(tree, tmp_path, fake_docker):
    talk = ["containers/run", "--terminal", IMAGE, "true"]
    run_in(tree, *talk)
    assert noted(tmp_path)[5] == "--interactive" and "--tty" not in noted(tmp_path)
    for command, attached in (
        (talk, ["--interactive", "--tty"]),
        (["sh", "-c", f"{' '.join(talk)} > /dev/null"], ["--interactive"]),
        (["sh", "-c", f"{' '.join(talk)} 2> /dev/null"], ["--interactive"]),
        (["containers/run", IMAGE, "true"], []),
    ):
        with Terminal(*command, cwd=tree, env=variables()) as terminal:
            assert terminal.process.wait(20) == 7
        words = noted(tmp_path)
        assert words[5 : words.index("--ipc")] == attached


@pytest.mark.parametrize("image", ["host:", "venv:tools"])
def test_an_interactive_command_has_the_terminal_in_a_venv(tree, image):
    script = 'test -t 0 && test -t 1 && test -t 2 && read -r line && echo "got $line"'
    with Terminal("containers/run", "--terminal", image, "sh", "-c", script, cwd=tree, env=variables()) as terminal:
        terminal.type("two words\n")
        terminal.until("got two words\n")
        assert terminal.process.wait(20) == 0


EIGHT_GPUS = """#!/bin/sh
# A line at a time, as the tool asks each card: who has stopped reading ends it with SIGPIPE.
for n in 0 1 2 3 4 5 6 7; do echo "GPU $n: NVIDIA H100 80GB HBM3 (UUID: GPU-$n)"; sleep 0.05; done
"""


@pytest.mark.parametrize(
    "shown, given",
    [
        (None, ["--gpus", "all"]),
        ("3", ["--gpus", '"device=3"']),
        ("0,GPU-5", ["--gpus", '"device=0,GPU-5"']),
        ("", []),
        ("-1", []),
    ],
)
def test_a_container_gets_the_gpus_that_the_caller_sees(tree, tmp_path, fake_docker, shown, given):
    (fake_docker / "nvidia-smi").write_text(EIGHT_GPUS)
    run_in(tree, "containers/run", IMAGE, "true", environment={} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
    words = noted(tmp_path)
    assert words[5 : words.index("--ipc")] == given


def test_a_checkout_with_a_colon_in_its_path_is_one_line(tree, tmp_path, fake_docker):
    moved = tree.rename(tmp_path / "attempt 2: again")
    done = run_in(moved, "containers/run", IMAGE, "true")
    assert done.returncode == 2 and "has a colon" in done.stderr and not (tmp_path / "words").exists()


def test_a_secret_never_appears_on_a_command_line(tree, tmp_path, fake_docker):
    run_in(tree, "containers/run", IMAGE, "true", environment={"HF_TOKEN": "hf_verysecret", "NGC_API_KEY": ""})
    words = noted(tmp_path)
    assert words[words.index("HF_TOKEN") - 1] == "--env" and "NGC_API_KEY" not in words
    assert not [word for word in words if "hf_verysecret" in word]
    assert "HF_TOKEN=hf_verysecret" in (tmp_path / "env").read_text().splitlines()


def test_an_engine_that_does_not_answer_is_one_line(tree, tmp_path, fake_docker):
    done = run_in(tree, "containers/run", IMAGE, "true", environment={"ENGINE": "1"})
    assert done.returncode == 2 and not (tmp_path / "words").exists()
    assert done.stderr == (
        "error: containers/run: the docker engine does not answer; start it, or add this user to the group docker\n"
    )


# From here on with a real engine.


@pytest.fixture(scope="module")
def engine():
    if reason := docker_engine.why_not():
        pytest.skip(reason)
    # Not under pytest's own folder: another user must get at it, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="engine") as name:
        Path(name).chmod(0o755)
        with docker_engine.engine(Path(name)) as started:
            yield started


USER = 12345


@pytest.fixture
def owned(engine):
    """A project that belongs to a user who is not root."""
    with tempfile.TemporaryDirectory(prefix="owned") as name:
        folder = Path(name)
        (folder / "containers").mkdir()
        shutil.copy2(REPO / "containers" / "run", folder / "containers" / "run")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, USER, USER)
        yield folder


def docker_run(engine, folder, *command, **environment):
    """containers/run with the engine's image, as that user."""
    return subprocess.run(
        ["containers/run", engine.reference, *command],
        capture_output=True,
        text=True,
        **as_user(engine, folder, environment),
    )


def as_user(engine, folder, environment):
    env = {**os.environ, "DOCKER_HOST": engine.host, "REPO_COMMIT": "none", "REPO_DIRTY": "true", "HOME": str(folder)}
    env["REPO_LOOKING"] = "1"  # this image has no Python
    return {"cwd": folder, "env": {**env, **environment}, "user": USER, "group": USER, "extra_groups": []}


def test_an_image_runs_by_digest_without_its_entrypoint(engine, owned):
    assert engine.docker("images", "--quiet") == ""
    done = docker_run(engine, owned, "sh", "-c", "echo ran; exit 7")
    assert (done.returncode, done.stdout) == (7, "ran\n"), done.stderr
    assert engine.docker("images", "--quiet", "--digests") != ""


def test_another_digest_under_the_same_tag_is_refused(engine, owned):
    engine.reference, kept = engine.reference.split("@")[0] + "@sha256:" + "0" * 64, engine.reference
    done = docker_run(engine, owned, "sh", "-c", "echo ran")
    engine.reference = kept
    assert done.returncode == 125 and done.stdout == ""


def test_a_container_runs_as_the_caller_in_the_callers_tree(engine, owned):
    script = "id -u; id -g; echo $PWD; echo $HOME; cat note; echo b > made; : > $HOME/.cached"
    (owned / "note").write_text("a\n")
    done = docker_run(engine, owned, "sh", "-c", script)
    assert done.stdout.split() == [str(USER), str(USER), str(owned), f"{owned}/.cache/home", "a"], done.stderr
    made = owned / "made"
    assert made.read_text() == "b\n" and (made.stat().st_uid, made.stat().st_gid) == (USER, USER)
    assert (owned / ".cache" / "home" / ".cached").stat().st_uid == USER


def test_a_container_names_a_user_without_passwd_entry(engine, owned):
    assert docker_run(engine, owned, "sh", "-c", "echo $USER").stdout == f"{USER}\n"


def test_the_container_learns_what_runs_it_and_gets_the_secret(engine, owned):
    done = docker_run(engine, owned, "env", HF_TOKEN="hf_verysecret", UNRELATED="1")
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert seen["REPO_IMAGE"] == engine.reference and seen["REPO_COMMIT"] == "none"
    assert seen["HF_TOKEN"] == "hf_verysecret" and "UNRELATED" not in seen


def test_arguments_survive_into_the_container(engine, owned):
    words = ["two words", "", "*", "$HOME", "a'b\"c"]
    done = docker_run(engine, owned, "sh", "-c", 'for word; do echo "<$word>"; done', "sh", *words)
    assert done.stdout.splitlines() == [f"<{word}>" for word in words]


def test_the_container_has_the_hosts_network_and_shared_memory(engine, owned):
    done = docker_run(engine, owned, "ls", "-l", "/proc/self/ns/net", "/proc/self/ns/ipc")
    links = [line.split(" -> ")[1] for line in done.stdout.splitlines()]
    assert links == [os.readlink("/proc/self/ns/ipc"), os.readlink("/proc/self/ns/net")], done.stderr


def test_nothing_is_left_of_a_container(engine, owned):
    assert docker_run(engine, owned, "sh", "-c", "exit 3").returncode == 3
    assert engine.docker("ps", "--all", "--quiet") == ""


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 42), (signal.SIGTERM, 55)])
def test_ctrl_c_and_sigterm_end_the_command_in_a_container(engine, owned, sent, code):
    name = {signal.SIGINT: "INT", signal.SIGTERM: "TERM"}[sent]
    script = f"trap 'exit {code}' {name}; echo ready; sleep 61 & wait"
    words = ["containers/run", engine.reference, "sh", "-c", script]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **as_user(engine, owned, {}))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    assert process.wait(20) == code
    assert engine.docker("ps", "--all", "--quiet") == ""
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if read(path) == b"sleep\x0061\x00"]


def read(path):
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_ctrl_c_on_a_terminal_reaches_the_command_once(engine, owned):
    # What runs beside docker in the same group is here the shell, as `make` is elsewhere.
    inside = "trap 'echo stopped' INT; test -t 0 && test -t 1 && echo ready; sleep 63; read -r line; echo got $line"
    outside = f'containers/run --terminal {engine.reference} sh -c "$INSIDE"; echo "code $?"'
    options = as_user(engine, owned, {"INSIDE": inside})
    with Terminal("sh", "-c", outside, **options) as terminal:
        terminal.until("ready\n")
        terminal.type(CTRL_C)
        terminal.until("stopped\n")
        terminal.type("日本語\n")
        terminal.until("got 日本語\n")
        terminal.until("code 0\n")
        assert terminal.process.wait(20) == 0
    assert engine.docker("ps", "--all", "--quiet") == ""


def test_an_interactive_container_reads_a_pipe_to_its_end(engine, owned):
    words = ["containers/run", "--terminal", engine.reference, "cat"]
    given = "犬\n猫\n"
    done = subprocess.run(words, input=given, capture_output=True, text=True, **as_user(engine, owned, {}))
    assert (done.returncode, done.stdout) == (0, given), done.stderr


def test_a_container_goes_with_its_killed_client(engine, owned):
    words = ["containers/run", engine.reference, "sleep", "64"]
    process = subprocess.Popen(words, **as_user(engine, owned, {}))
    docker_engine.wait_until(lambda: engine.docker("ps", "--quiet") != "", owned)
    process.kill()
    process.wait()
    docker_engine.wait_until(lambda: engine.docker("ps", "--all", "--quiet") == "", owned)
    assert process.returncode == -signal.SIGKILL and engine.docker("ps", "--all", "--quiet") == ""


def test_a_container_tells_its_cpu_time_and_memory(engine, owned, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    busy = ["containers/run", engine.reference, "bash", "-c", "while :; do :; done"]
    process = subprocess.Popen(busy, start_new_session=True, **as_user(engine, owned, {}))
    try:
        docker_engine.wait_until(lambda: (attempt(cpu_seconds, [process.pid]) or 0) > 0.5, owned)
        assert 0 < container_memory_mib(container_name(psutil.Process(process.pid).cmdline())) < 100
    finally:
        process.terminate()
        process.wait(20)


def test_a_command_has_what_bash_sets_in_its_image(engine, owned):
    done = docker_run(engine, owned, "sh", "-c", "echo $LD_LIBRARY_PATH")
    assert done.stdout == "/usr/local/tensorrt/lib\n", done.stderr


def test_a_command_without_a_signal_handler_ends_too(engine, owned):
    words = ["containers/run", engine.reference, "sleep", "62"]
    process = subprocess.Popen(words, **as_user(engine, owned, {}))
    deadline = time.monotonic() + 20
    while engine.docker("ps", "--quiet") == "" and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert engine.docker("ps", "--all", "--quiet") == ""


def test_a_tag_resolves_to_the_digest_of_a_real_registry(engine, tmp_path, monkeypatch):
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    image, digest = engine.reference.removeprefix("docker://").split("@")
    name, _, tag = image.rpartition(":")
    # It speaks no TLS.
    (tmp_path / ".config/containers").mkdir(parents=True)
    conf = f'[[registry]]\nlocation = "{name.split("/")[0]}"\ninsecure = true\n'
    (tmp_path / ".config/containers/registries.conf").write_text(conf)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lock.ask_registry(name, tag) == digest and lock.ask_registry(name, "2") is None
    text, told = lock.with_digests(f"a: docker://{image}@sha256:UNRESOLVED\n", lock.ask_registry)
    assert (text, told) == (f"a: {engine.reference}\n", [f"{image}: resolved to {digest}"])
    (record,) = lock.record_images({}, text, lock.ask_manifest, "2026-01-02").values()
    assert record["digest"] == digest and list(record["gb"]) == ["unknown"] and record["gb"]["unknown"] < 0.1
