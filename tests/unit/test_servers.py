"""How TensorRT-LLM's two servers are started, held against what their images take."""

import io
import json

import pytest
from conftest import REPO, every_input
from contracts import Contract

from lib.core.stage import UserError, load_yaml
from lib.serving.servers import Triton, Trtllm
from stages.workers import stream_client
from tools import remote


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml; write(NAME, data) puts a result there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())

    def write(name, data):
        path = tmp_path / "results" / "embedded" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data))

    return write


def ranks(command):
    """The tritonserver of every rank, as the words behind its program."""
    assert command[:2] == ["mpirun", "--allow-run-as-root"] and command[-1] == ":"
    parts = " ".join(map(str, command[2:-1])).split(" : ")
    assert all(part.startswith("-n 1 /opt/tritonserver/bin/tritonserver ") for part in parts)
    return [Contract("tritonserver").parse(["tritonserver", *part.split()[3:]])[0] for part in parts]


def test_tensorrt_llm_starts_a_tritonserver_for_each_gpu(project):
    project("repository/base/repository.json", {"engine_is_stand_in": False, "world_size": 2})
    first, second = ranks(Triton("base", every_input()).command([]))
    for rank, given in enumerate((first, second)):
        # As launch_triton_server.py has it: nothing is guessed, every process has shared memory of its own.
        assert given["--disable-auto-complete-config"] is True
        assert given["--backend-config"] == [f"python,shm-region-prefix-name=bench_triton_{rank}_"]
        assert given["--model-repository"] == "results/embedded/repository/base/models"
        assert (given["--http-port"], given["--grpc-port"], given["--metrics-port"]) == (8000, 8001, 8002)
    assert "--load-model" not in first
    assert (second["--model-control-mode"], second["--load-model"]) == ("explicit", ["tensorrt_llm"])


def test_the_stand_in_is_served_without_mpi(project):
    project("repository/base/repository.json", {"engine_is_stand_in": True})
    env, options, *command = Triton("base", every_input()).command(["--max-num-seqs=4"])
    assert (env, options) == ("env", "VLLM_OPTIONS=--max-num-seqs=4")
    given, _ = Contract("tritonserver").parse(command)
    assert given["--disable-auto-complete-config"] is True


class Load:
    pinned, endpoint = True, "completions"


@pytest.mark.parametrize("model", ["base", "lora"])
def test_genai_perf_asks_trtllm_serve_for_pinned_lengths(project, model):
    adapters = {"1": "/a/adapter"} if model == "lora" else {}
    project(f"trtllm_serve/{model}/serve.json", {"not_built": None, "command": ["trtllm-serve"], "adapters": adapters})
    server = Trtllm(model, every_input())
    assert server.command(["--enforce-eager"]) == ["trtllm-serve"] and server.not_built() is None
    options = server.client(Load, 256)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    given, remarks = Contract("genai-perf").parse(["genai-perf", "profile", *words])
    assert remarks == []
    extra = json.loads(given["--extra-inputs"][0])
    assert (extra["ignore_eos"], extra["min_tokens"], extra["temperature"]) == (True, 256, 0)
    assert extra.get("lora_request") == (
        {"lora_name": "1", "lora_int_id": 1, "lora_path": "/a/adapter"} if model == "lora" else None
    )


def test_every_profile_names_an_image_for_every_server():
    for images in load_yaml(REPO / "containers/images.yaml").values():
        assert {"triton", "vllm", "trtllm"} <= images.keys()


def test_chat_numbers_each_adapter_for_trtllm_serve(monkeypatch, tmp_path):
    # The server keeps an adapter under its number: two under one number would answer alike.
    monkeypatch.setattr(remote.socket, "create_connection", lambda *_, **__: io.StringIO())
    monkeypatch.setattr(stream_client, "post", lambda *_: io.StringIO('{"data": [{"id": "model"}]}'))
    monkeypatch.chdir(REPO)
    asked = {
        name: remote.connect("trtllm", None, name, tmp_path / name).chosen(name)["lora_request"]
        for name in ("lora", "qlora")
    }
    assert asked == {
        "lora": {"lora_name": "1", "lora_int_id": 1, "lora_path": str(tmp_path / "lora")},
        "qlora": {"lora_name": "2", "lora_int_id": 2, "lora_path": str(tmp_path / "qlora")},
    }
    with pytest.raises(UserError, match="ADAPTER is lora-published; trtllm serves lora, qlora or none"):
        remote.connect("trtllm", None, "lora-published", tmp_path)
