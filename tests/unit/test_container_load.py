"""lib/serving/containers.py: CPU and memory of a program in a container, from its control groups."""

import os
import subprocess
import sys

import pytest

from lib.multilora.cost import resident_mib
from lib.serving import containers
from lib.serving.monitor import cores, cpu_seconds

IDENTITY = "ab12" * 16
VERSION_2 = f"0::/system.slice/docker-{IDENTITY}.scope\n"
VERSION_1 = f"4:memory:/docker/{IDENTITY}\n2:cpu,cpuacct:/docker/{IDENTITY}\n1:name=systemd:/init\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """write(version) makes the control groups of one container: 12.5 s of CPU, 300 MiB."""
    monkeypatch.setattr(containers, "CGROUPS", tmp_path)

    def write(version):
        places = {2: ("system.slice/docker-{}.scope",) * 2, 1: ("cpuacct/docker/{}", "memory/docker/{}")}[version]
        cpu, memory = (tmp_path / place.format(IDENTITY) for place in places)
        for folder in (cpu, memory):
            folder.mkdir(parents=True, exist_ok=True)
        (cpu / "cpuacct.usage").write_text("12500000000\n")
        (cpu / "cpu.stat").write_text("usage_usec 12500000\nuser_usec 1\n")
        (memory / "memory.stat").write_text(f"anon {300 * 2**20}\ntotal_rss {300 * 2**20}\nfile {9 * 2**30}\n")
        return {2: VERSION_2, 1: VERSION_1}[version]

    return write


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_counts_by_its_control_group(machine, monkeypatch, version):
    folders = containers.read_cgroups(machine(version), IDENTITY)
    monkeypatch.setattr(containers, "container_cgroups", lambda name: folders)
    assert containers.container_cpu_seconds("one") == 12.5
    assert containers.container_memory_mib("one") == 300


def test_another_containers_control_group_is_not_taken(machine):
    assert containers.read_cgroups(machine(2), "cd34" * 16) == {}


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A program that looks like Docker's client of the container `one`, whose engine answers nothing."""
    (tmp_path / "docker").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [tmp_path / "docker", "run", "--rm", "--name", "one", "image"]
    (tmp_path / "run").write_text("import time; time.sleep(60)")
    process = subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"LD_LIBRARY_PATH": ""}, start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_a_client_of_docker_counts_with_its_container(client, monkeypatch):
    monkeypatch.setattr("lib.serving.monitor.container_cpu_seconds", {"one": 40.0}.__getitem__)
    monkeypatch.setattr("lib.multilora.cost.container_memory_mib", {"one": 5000.0}.__getitem__)
    assert 40 <= cpu_seconds([client.pid, os.getpid()]) < 4000
    assert 5000 <= resident_mib(client) < 6000


def test_a_container_that_tells_nothing_is_unknown_not_idle(client):
    for ask in (lambda: cpu_seconds([client.pid]), lambda: resident_mib(client)):
        with pytest.raises((LookupError, OSError)):
            ask()
    sample = {"client_cpu_seconds": None, "server_cpu_seconds": 1.0, "all_cpu_seconds": 5.0}
    assert set(cores([{**sample, "seconds": 0}, {**sample, "seconds": 1}]).values()) == {None}
