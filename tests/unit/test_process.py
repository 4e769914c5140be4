"""How a program is started and stopped with its children, and how a taken port is named."""

import os
import socket
import time

import pytest

from lib.core.stage import UserError
from lib.serving import process as serving_process


def test_a_stubborn_program_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_process, "STOP_SECONDS", 0.5)
    stubborn = "trap '' TERM; sleep 600 & sleep 600"
    with serving_process.started(["bash", "-c", stubborn], tmp_path / "log") as process:
        deadline = time.monotonic() + 5
        while len(serving_process.session(process)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(serving_process.session(process)) == 3
    assert serving_process.session(process) == []


def test_a_taken_port_names_the_program_that_holds_it():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken by \w+.* \(process {os.getpid()}\); stop it first"):
            serving_process.check_ports([port])
    serving_process.check_ports([port])
