"""tools/fetch.py: images and models are there before anything is timed."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest

from lib.core.stage import UserError
from lib.trtllm.images import record
from stages import base_model
from tools import fetch

DIGEST = "sha256:" + "0123456789abcdef" * 4
IMAGE = f"docker://example.org/team/image:1.0@{DIGEST}"

# A registry that needs a second for a pull, and refuses images named "gone".
SLOW_DOCKER = """#!/bin/sh
case "$1 $2" in
  "image inspect") [ -e pulled ] ;;
  pull*gone*) echo "unauthorized" >&2; exit 1 ;;
  pull*) echo "pull $2" >> calls; sleep 1; touch pulled; echo "Pull complete" ;;
  *) exit 0 ;;
esac
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project whose docker is slow, and whose containers/run needs the image to be there within 0.5 s."""
    monkeypatch.chdir(tmp_path)
    programs = {
        "bin/docker": SLOW_DOCKER,
        "containers/run": '#!/bin/sh\n[ -e pulled ] || sleep 9\necho "run $*" >> calls\n'
        'case "$*" in *refused*) exit 1 ;; *) echo \'{"versions": {}, "sha256": {}, "placeholders": {}}\' ;; esac\n',
        "containers/venv": '#!/bin/sh\necho "venv $*" >> calls\n',
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "containers/images.yaml").write_text(f"images: {{tools: '{IMAGE}'}}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/written_for.yaml").write_text("tools: {versions: {torch: '2.9'}}\n")
    (tmp_path / "params.yaml").write_text("profile: writeup\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def calls(project):
    return (project / "calls").read_text().splitlines()


def test_a_slow_pull_ends_before_the_image_is_used(project, capfd):
    packed = {"example.org/team/image:1.0": {"digest": DIGEST, "gb": {"amd64": 16.25, "arm64": 15.0}}}
    (project / "containers/images.json").write_text(json.dumps(packed))
    fetch.fetch_images({"triton": IMAGE, "client": f"{IMAGE}+top@0123456789ab", "tools": "venv:tools"})
    reference = IMAGE.removeprefix("docker://")
    assert calls(project) == [
        f"pull {reference}",
        f"run {IMAGE} python3 stages/workers/inspect_image.py",
        "venv top",
        f"run {IMAGE}+top@0123456789ab python3 stages/workers/inspect_image.py",
    ]
    said = capfd.readouterr().out
    assert "image 1 of 2: example.org/team/image:1.0, 16.25 GB packed" in said
    assert "Pull complete" in said and "pulled in 0.0 min" in said
    assert f"{IMAGE}: torch is None, this was written for 2.9" in said


def test_what_is_here_is_not_fetched_again(project, capfd):
    (project / "pulled").touch()
    record(IMAGE).parent.mkdir(parents=True)
    record(IMAGE).write_text("{}")
    fetch.fetch_images({"triton": IMAGE})
    assert not (project / "calls").exists() and capfd.readouterr().out == ""


def test_a_refused_pull_names_its_image(project, capfd):
    with pytest.raises(UserError, match="example.org/gone:1.*could not be pulled .exit code 1"):
        fetch.fetch_images({"triton": f"docker://example.org/gone:1@{DIGEST}"})
    assert "unauthorized" in capfd.readouterr().err


def test_a_model_of_the_hub_is_downloaded_once(project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (project / "pulled").touch()
    base = {"source": "hub", "name": "team/model", "revision": "0" * 40}
    fetch.fetch_model(base | {"source": "random"}, IMAGE)
    fetch.fetch_model(base, IMAGE)
    assert calls(project) == [f"run {IMAGE} python3 stages/workers/fetch_model.py team/model {'0' * 40}"]
    with pytest.raises(UserError, match="team/refused could not be downloaded; HF_TOKEN is not set"):
        fetch.fetch_model(base | {"name": "team/refused"}, IMAGE)
    done = project / "results/writeup/base_model/metrics.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    fetch.fetch_model(base | {"name": "team/refused"}, IMAGE)


@pytest.mark.parametrize(("weights", "skips_bin"), [("model.safetensors", True), ("pytorch_model.bin", False)])
def test_weights_are_downloaded_in_one_format(monkeypatch, capsys, weights, skips_bin):
    asked = {}
    files = [SimpleNamespace(rfilename=weights, size=13_500_000_000), SimpleNamespace(rfilename="a.json", size=None)]
    hub = SimpleNamespace(
        HfApi=lambda: SimpleNamespace(model_info=lambda name, **_: SimpleNamespace(siblings=files)),
        snapshot_download=lambda name, **words: asked.update(words),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", "team/model", "0" * 40])
    runpy.run_module("stages.workers.fetch_model", run_name="__main__")
    assert ("*.bin" in asked["ignore_patterns"]) is skips_bin and asked["revision"] == "0" * 40
    assert capsys.readouterr().out == "team/model: 13.5 GB in all its formats\n"


def test_a_hub_model_keeps_its_dtype_and_asks_nobody(monkeypatch):
    """Without the variable transformers opens a request for safetensors at the model's repository."""
    asked = {}

    def load(name, **words):
        asked.update(words, conversion=base_model.os.environ.get("DISABLE_SAFETENSORS_CONVERSION"))

    double = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=load),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name, **words: None),
    )
    monkeypatch.setitem(sys.modules, "transformers", double)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "")
    base_model.from_hub(SimpleNamespace(name="team/model", revision="0" * 40))
    assert asked["dtype"] == "auto" and asked["conversion"] == "true"
