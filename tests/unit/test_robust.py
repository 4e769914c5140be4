"""What a run meets on a machine that is not ours: another run, a killed one, a proxy, a memory limit, odd variables."""

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import REPO, run_in
from kill_anywhere import KINDS, is_good

from lib.bench.validity import gpu_clocks
from lib.core import work
from lib.core.parent import exit_words
from lib.core.stage import UserError, read_json, write_json
from lib.core.web import open_url
from lib.serving.answers import answer, sums
from lib.serving.process import is_ready
from stages.machine import memory_limit_gib
from tools import bench, lock, profile, publish, report
from tools.checkout import RWLOCK, only_run
from tools.reproduce import describe_failure


def wait_for(condition, seconds=10):
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def program():
    """program(WORDS...) starts a program that is killed after the test; "-c" CODE runs Python of this repo."""
    running = []

    def start(*words, **options):
        command = [sys.executable, *words] if words[0] == "-c" else list(words)
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


# Two runs at once

HOLD_CHECKOUT = """
import time
from tools.checkout import only_run
with only_run("make streaming"):
    print(1, flush=True)
    time.sleep(60)
"""
HOLD_WORK = """
import time
from lib.core.work import work_dir
work_dir("finetune-lora", "0" * 16)
print(1, flush=True)
time.sleep(60)
"""


def test_a_second_run_names_the_first_in_one_line(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    first = program("-c", HOLD_CHECKOUT, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert first.stdout.readline() == "1\n"
    holder = rf"process {first.pid} \(make streaming\) of 20\S+ \S+ holds this checkout; wait for it or stop it"
    with pytest.raises(UserError, match=holder), only_run("make reproduce"):
        pass
    first.kill()
    first.wait()
    with only_run("make reproduce"):
        pass


@pytest.mark.parametrize(
    ("tool", "words"),
    [(bench, ["walk"]), (lock, []), (lock, ["--digests"]), (profile, ["writeup"]), (report, []), (publish, ["mine"])],
)
def test_nothing_reads_or_writes_beside_a_running_graph(tree, monkeypatch, program, tool, words):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    files = [tree / "params.yaml", tree / "containers/images.yaml"]
    before = [file.read_bytes() for file in files]
    first = program("-c", HOLD_CHECKOUT, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert first.stdout.readline() == "1\n"
    with pytest.raises(UserError, match=rf"process {first.pid} .* holds this checkout"):
        tool.main()
    assert [file.read_bytes() for file in files] == before


def lock_of(process, mode):
    info = {"pid": process.pid, "cmd": "/bin/dvc repro"}
    write_json(RWLOCK, {"write": {"a": info}, "read": {}} if mode == "write" else {"write": {}, "read": {"a": [info]}})


@pytest.mark.parametrize("mode", ["write", "read"])
def test_a_living_dvc_is_named_in_one_line(tmp_path, monkeypatch, program, mode):
    monkeypatch.chdir(tmp_path)
    running = program("bash", "-c", "exec -a dvc sleep 60")
    assert wait_for(lambda: psutil.Process(running.pid).cmdline()[:1] == ["dvc"])
    lock_of(running, mode)
    with (
        pytest.raises(UserError, match=rf"process {running.pid} \(/bin/dvc repro\) of 20.* holds this checkout"),
        only_run("make reproduce"),
    ):
        pass


@pytest.mark.parametrize("is_reused", [True, False])
def test_the_lock_of_a_killed_run_is_removed(tmp_path, monkeypatch, program, is_reused):
    monkeypatch.chdir(tmp_path)
    other = program("sleep", "60")  # a program that got the number of the killed one
    lock_of(other, "write")
    if not is_reused:
        other.kill()
        other.wait()
    with only_run("make reproduce"):
        assert not RWLOCK.exists()


@pytest.mark.parametrize("target", ["streaming", "multilora", "client-accuracy", "speedups", "quickstart-trtllm"])
def test_every_target_that_runs_dvc_holds_the_checkout(target):
    lines = run_in(REPO, "make", "--dry-run", target).stdout.splitlines()
    assert not [line for line in lines if " dvc " in line] and "tools.repro " in "".join(lines)


def test_two_processes_never_share_a_work_folder(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "LOCK_SECONDS", 0.5)
    (tmp_path / "params.yaml").write_text("profile: a\n")
    first = program("-c", HOLD_WORK, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert first.stdout.readline() == "1\n"
    with pytest.raises(UserError, match=rf"process {first.pid} works there; stop it first"):
        work.work_dir("finetune-lora", "0" * 16)
    first.kill()
    first.wait()
    assert work.work_dir("finetune-lora", "0" * 16).is_dir()
    work.HELD.clear()


# A killed parent

STARTED = """
import sys, time
from lib.serving import process
process.guarding = lambda *_: time.sleep(60)  # killed before there is a guard
with process.started(["sleep", "61"], sys.argv[1]):
    pass
"""


def test_a_program_ends_with_a_stage_killed_at_once(tmp_path, program):
    parent = program("-c", STARTED, str(tmp_path / "log"), env=os.environ | {"PYTHONPATH": str(REPO)})
    assert wait_for(lambda: psutil.Process(parent.pid).children())
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 3)


def test_a_stage_whose_dvc_died_while_it_was_imported_ends():
    code = "from lib.core.stage import run; run(lambda: print('runs'))"
    command = [sys.executable, "-c", code]

    def ask(**variables):
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=REPO)

    ended = ask(DVC_STAGE="finetune@lora", REPO_PARENT="1")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "error: the DVC that started this stage has ended; run the same command again\n"
    assert ask(DVC_STAGE="finetune@lora", REPO_PARENT=str(os.getpid())).stdout == "runs\n"
    assert ask(REPO_PARENT="1").stdout == "runs\n"  # by hand, a stage may outlive its shell


def test_an_exit_code_is_explained(tmp_path):
    assert exit_words(3) == "exit code 3"
    assert (
        exit_words(-signal.SIGKILL)
        == "exit code -9: killed; the kernel does that where memory runs out, see `make doctor`"
    )
    error = RuntimeError("failed to reproduce 'finetune@lora'")
    error.__cause__ = RuntimeError("failed to run: containers/run ..., exited with -9")
    assert "memory runs out" in describe_failure("finetune@lora", tmp_path / "log", error)
    error.__cause__ = RuntimeError("failed to run: containers/run ..., exited with 1")
    assert "memory runs out" not in describe_failure("finetune@lora", tmp_path / "log", error)
    error.__cause__ = RuntimeError("failed to run: containers/run ..., exited with 75")
    assert describe_failure("bench@walk", tmp_path / "log", error).startswith("stage bench@walk: BUDGET ended; run")


# A proxy


@pytest.fixture
def behind_a_proxy(monkeypatch):
    """A proxy that answers nothing, and a server of this machine at the given address."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_requests_to_this_machine_go_past_a_proxy(behind_a_proxy):
    assert open_url(behind_a_proxy).read() == b"here" and is_ready(behind_a_proxy)


def test_programs_of_an_environment_go_past_a_proxy(behind_a_proxy):
    code = f"import urllib.request; print(urllib.request.urlopen('{behind_a_proxy}').read().decode())"
    done = run_in(REPO, "containers/run", "host:", sys.executable, "-c", code)
    assert done.stdout == "here\n", done.stderr
    kept = run_in(
        REPO, "containers/run", "host:", "sh", "-c", "echo $no_proxy", environment={"no_proxy": "example.org"}
    )
    assert "example.org" in kept.stdout.split(",")[-1] and "127.0.0.1" in kept.stdout


def test_requests_elsewhere_keep_their_proxy(behind_a_proxy):
    with pytest.raises(OSError, match="refused"):
        open_url("http://example.org")


# What an observer meets

COUNTER = '# TYPE nv_llm_sum counter\nnv_llm_sum{model="a"} 60\nnv_llm_sum{model="b"} 3\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (COUNTER, {"tokens": 63.0}),
        (COUNTER.replace(" 3", " NaN"), {}),
        (COUNTER.replace(" 3", " three"), {}),
        (COUNTER + "{{{\n", {}),
        ("<html>busy</html>", {}),
        ("", {}),
    ],
)
def test_a_counter_that_is_no_number_is_unknown(text, found):
    assert sums(text, {"tokens": "nv_llm_sum"}) == found


def test_a_gpu_that_tells_little_fails_no_check():
    silent = dict.fromkeys(("gpu_sm_mhz", "gpu_watts", "gpu_celsius_max", "gpu_capped"))
    verdict, reason = gpu_clocks(silent | {"gpu_slowed": []})
    assert verdict == "pass" and reason.startswith("unknown MHz, unknown W")
    assert gpu_clocks(silent | {"gpu_slowed": None})[0] == "unknown"


def test_a_ready_server_that_does_not_answer_is_named():
    with pytest.raises(UserError, match="http://127.0.0.1:9/version: the server is ready and does not answer this"):
        answer("/version", "http://127.0.0.1:9")


# A container's limit, and variables of other systems


def test_the_least_memory_limit_of_the_groups_counts(tmp_path):
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/memory.max").write_text(f"{2 * 2**30}\n")
    (tmp_path / "job/step/memory.max").write_text("max\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert memory_limit_gib(tmp_path, own) == 2
    (tmp_path / "job/memory.max").write_text("max\n")
    assert memory_limit_gib(tmp_path, own) is None
    (tmp_path / "memory/job").mkdir(parents=True)
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text(f"{3 * 2**30}\n")
    own.write_text("5:cpu:/job\n4:memory:/job\n")
    assert memory_limit_gib(tmp_path, own) == 3


def test_variables_of_other_systems_stay_outside():
    odd = {"SHELL": "/usr/sbin/nologin", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    show = "echo $SHELL ${RANK-no} ${WORLD_SIZE-no} ${LOCAL_RANK-no}"
    done = run_in(REPO, "containers/run", "host:", "sh", "-c", show, environment=odd)
    shell, *others = done.stdout.split()
    assert shell.endswith("/bash") and others == ["no"] * 3


def test_troubleshooting_says_what_the_kills_showed():
    kills = read_json(REPO / "results/reference/kills.json")
    assert len(kills["each"]) == kills["kills"] and sum(map(is_good, kills["each"])) == kills["good"]
    assert {kill["kind"] for kill in kills["each"]} <= set(KINDS) and kills["completed_runs"]
    assert re.fullmatch("[0-9a-f]{40}", kills["made_by"]["commit"]) and not kills["made_by"]["dirty"]
    words = f"{kills['good']} of {kills['kills']} kills at random moments of the smallest whole run"
    assert words in (REPO / "docs/troubleshooting.md").read_text()
