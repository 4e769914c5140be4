"""make doctor: what a profile needs and what is here, without starting anything."""

import pytest
from conftest import REPO, run_in

from tools.doctor import checklist

H200 = [{"name": "NVIDIA H200", "memory_mib": 143771, "driver": "580.82.07"}]


@pytest.fixture
def on(monkeypatch, tmp_path):
    """on(profile, ...) gives the checklist of a machine that has everything but what is given."""
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NGC_API_KEY", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def found(profile, cards=H200, free_gb=500.0, gib=128, docker=True):
        return checklist(profile, cards, free_gb, gib, docker)

    return found


def lines(found, fine):
    return [line for state, line in found if state is fine]


def test_an_unresolved_image_is_missing_on_any_machine(on):
    missing = [line for line in lines(on("writeup"), False) if "container toolkit" not in line]
    assert missing and all(line.startswith("image: nvcr.io/") for line in missing)
    there = lines(on("writeup"), True)
    for start in ("disk: 500 GB free", "memory: 128 GiB", "GPU: NVIDIA H200", "Docker: ", "driver 580.82.07"):
        assert [line for line in there if line.startswith(start)], start


def test_what_is_missing_is_told_with_both_numbers(on):
    missing = lines(on("writeup", cards=[], free_gb=10.0, gib=8, docker=False), False)
    for start in ("disk: 10.0 GB", "memory: this machine has 8 GiB", "GPU: nvidia-smi finds none", "Docker: no engine"):
        assert [line for line in missing if line.startswith(start)], start


def test_access_and_licences_are_notes_for_the_reader(on, monkeypatch):
    notes = " / ".join(lines(on("writeup"), None))
    assert "NGC: not signed in" in notes and "Llama 2 Community License" in notes and "HF_TOKEN is not set" in notes
    monkeypatch.setenv("NGC_API_KEY", "key")
    assert "NGC: signed in" in lines(on("writeup"), True)
    for version, roles in {"535.104.05": ["pytorch", "triton"], "575.57.08": ["pytorch"]}.items():
        notes = lines(on("writeup", cards=[{**H200[0], "driver": version}]), None)
        old = [line for line in notes if line.startswith(f"driver {version}: ")]
        assert [line.split("the image of ")[1].split()[0] for line in old] == roles


@pytest.mark.parametrize(("profile", "cards"), [("embedded", []), ("weightless", H200)])
def test_a_profile_without_containers_asks_for_none(on, profile, cards):
    found = on(profile, cards=cards, docker=False)
    assert lines(found, False) == [] and not [line for _, line in found if "Docker" in line or "NGC" in line]


def test_random_weights_have_no_licence_to_read(on):
    assert not [line for line in lines(on("weightless"), None) if "licence" in line]


def test_make_doctor_changes_nothing_and_names_the_profiles(tree):
    before = (tree / "params.yaml").read_bytes()
    done = run_in(tree, "make", "doctor", "PROFILE=writeup")
    assert done.returncode != 0 and done.stdout.startswith("profile writeup:\n  MISSING ")
    assert (tree / "params.yaml").read_bytes() == before
    assert (
        "error: PROFILE is all; use one of embedded, weightless, writeup"
        in run_in(tree, "make", "doctor", "PROFILE=all").stderr
    )
