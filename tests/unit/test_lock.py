"""tools/lock.py: locks and digests written, nothing known overwritten."""

import hashlib

import pytest
from conftest import REPO

from lib.core.stage import UserError
from tools.lock import (
    ask_registry,
    compile_command,
    compile_environment,
    main,
    record_images,
    resolve_command,
    with_digests,
    with_locks,
)

KNOWN = "a" * 64
TEXT = f"""\
set: &set
  pytorch: docker://example.org/a:1@sha256:{KNOWN}
  triton: docker://example.org/b:2@sha256:UNRESOLVED   # a comment
  trtllm: docker://example.org/b:2@sha256:UNRESOLVED
"""


def resolver(**digests):
    return lambda name, tag: digests.get(name[-1])


def test_resolving_an_image_keeps_comments():
    digest = "sha256:" + "b" * 64
    text, told = with_digests(TEXT, resolver(a=f"sha256:{KNOWN}", b=digest))
    assert text == TEXT.replace("sha256:UNRESOLVED", digest)
    assert told == ["example.org/a:1: unchanged", f"example.org/b:2: resolved to {digest}"]


def test_a_tag_that_has_moved_is_told_and_the_known_image_stays():
    moved = "sha256:" + "c" * 64
    text, told = with_digests(TEXT, resolver(a=moved))
    assert text == TEXT
    assert told[0] == f"example.org/a:1: has moved to {moved}; sha256:{KNOWN} stays in use, change it by hand"


def test_an_image_that_cannot_be_reached_stays_unresolved():
    text, told = with_digests(TEXT, resolver())
    assert text == TEXT and all(line.endswith("not resolved, left as it is") for line in told)


@pytest.mark.parametrize("words", [[], ["--digests"]])
def test_where_no_registry_answers_locking_leaves_no_record(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["lock", *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "skopeo").write_text("#!/bin/sh\necho 'unauthorized: sign in' >&2\nexit 1\n")
    (tmp_path / "skopeo").chmod(0o755)
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "images.yaml").write_text(TEXT)
    main()
    assert [path.name for path in (tmp_path / "containers").iterdir()] == ["images.yaml"]
    said = capsys.readouterr()
    assert "example.org/b:2: not resolved, left as it is" in said.out
    assert "example.org/b:2:\n| unauthorized: sign in" in said.err


def test_digests_alone_touch_no_lock_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lock", "--digests"])
    monkeypatch.setattr("tools.lock.ask_registry", lambda name, tag: "sha256:" + "b" * 64)
    monkeypatch.setattr("tools.lock.ask_manifest", lambda reference: None)
    (tmp_path / "containers/tools").mkdir(parents=True)
    (tmp_path / "containers/tools/requirements.in").write_text("no-such-package==1\n")
    (tmp_path / "containers/images.yaml").write_text(TEXT + "  tools: venv:small@0123456789ab\n")
    main()
    assert "UNRESOLVED" not in (text := (tmp_path / "containers/images.yaml").read_text())
    assert "venv:small@0123456789ab" in text
    assert [path.name for path in (tmp_path / "containers/tools").iterdir()] == ["requirements.in"]


def test_each_environment_is_locked_with_its_own_torch(monkeypatch):
    monkeypatch.chdir(REPO)
    for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_TORCH_BACKEND", "cpu")  # the caller's does not count
    backends = {
        path.parent.name: compile_environment(path.parent).get("UV_TORCH_BACKEND")
        for path in REPO.glob("containers/*/requirements.in")
    }
    assert {name for name, backend in backends.items() if backend == "cpu"} >= {"pytorch", "vllm"}
    assert backends["pytorch-cuda"] is backends["vllm-cuda"] is backends["client"] is None


# As registries answer: an index with two machines and an attestation, and what an image for one machine has.
INDEX = {
    "manifests": [
        {"digest": "sha256:amd", "platform": {"os": "linux", "architecture": "amd64"}},
        {"digest": "sha256:arm", "platform": {"os": "linux", "architecture": "arm64"}},
        {"digest": "sha256:att", "platform": {"os": "unknown", "architecture": "unknown"}},
    ]
}
MANIFESTS = {
    f"example.org/a@sha256:{KNOWN}": INDEX,
    "example.org/a@sha256:amd": {"layers": [{"size": 9_000_000_000}, {"size": 500_000_000}]},
    "example.org/a@sha256:arm": {"layers": [{"size": 8_000_000_000}]},
}


def test_an_image_records_date_architectures_and_size():
    first = record_images({}, TEXT, MANIFESTS.get, "2026-01-02")
    assert first == {
        "example.org/a:1": {"digest": f"sha256:{KNOWN}", "resolved": "2026-01-02", "gb": {"amd64": 9.5, "arm64": 8.0}}
    }
    assert record_images(first, TEXT, {}.get, "2026-03-04") == first  # nobody is asked again, and the date stays
    other = TEXT.replace(KNOWN, "d" * 64)
    one = record_images(
        first, other, {f"example.org/a@sha256:{'d' * 64}": {"layers": [{"size": 10**9}]}}.get, "2026-03-04"
    )
    assert one["example.org/a:1"] == {"digest": f"sha256:{'d' * 64}", "resolved": "2026-03-04", "gb": {"unknown": 1.0}}
    assert record_images({}, TEXT, {}.get, "2026-03-04") == {}  # a registry that does not answer


def test_a_stale_environment_hash_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock = tmp_path / "containers" / "vllm-cuda" / "requirements.txt"
    lock.parent.mkdir(parents=True)
    lock.write_text("vllm==1.0\n")
    now = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    text = "# venv:NAME@LOCK\n  vllm: venv:vllm-cuda   # a\n  other: venv:vllm-cuda@0123456789ab   # b\n"
    assert with_locks(text) == (
        f"# venv:NAME@LOCK\n  vllm: venv:vllm-cuda@{now}   # a\n  other: venv:vllm-cuda@{now}   # b\n"
    )
    assert with_locks(with_locks(text)) == with_locks(text)
    for digest in ("a" * 64, "UNRESOLVED"):
        on_image = f"  a: docker://example.org/a:1@sha256:{digest}+vllm-cuda"
        assert with_locks(f"{on_image}@0123456789ab   # b\n") == with_locks(f"{on_image}   # b\n")
        assert with_locks(f"{on_image}\n") == f"{on_image}@{now}\n"


def test_a_lock_has_hashes_but_no_index_or_excluded_package(tmp_path):
    folder = tmp_path / "vllm"
    folder.mkdir()
    options = "pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links"
    assert " ".join(compile_command(folder)[1:]) == (
        f"{options} --no-header {folder}/requirements.in -o {folder}/requirements.txt"
    )
    (folder / "image-python").write_text("3.12\n")
    assert "--python-version 3.12" in " ".join(compile_command(folder))
    (folder / "excludes.txt").write_text("torchvision\n")
    assert f"--excludes {folder}/excludes.txt" in " ".join(compile_command(folder))


def test_without_a_tool_for_registries_it_says_which_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install docker, skopeo or crane"):
        resolve_command("example.org/a", "1")


def test_a_digest_is_asked_for_with_the_tool_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, words in (
        ("docker", "docker buildx imagetools inspect --format {{.Manifest.Digest}} example.org/a:1"),
        ("crane", "crane digest example.org/a:1"),
        ("skopeo", "skopeo inspect --no-tags --format {{.Digest}} docker://example.org/a:1"),
    ):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
        assert " ".join(resolve_command("example.org/a", "1")) == words


def test_docker_without_buildx_reads_the_pulled_digest(tmp_path, monkeypatch):
    digest = "sha256:" + "b" * 64
    script = f"""#!/bin/sh
case "$1" in
  buildx) echo "docker: 'buildx' is not a docker command." >&2; exit 1 ;;
  pull) : > {tmp_path}/pulled; echo "$3" ;;
  image) [ -f {tmp_path}/pulled ] && echo "example.org/a@{digest}" ;;
esac
"""
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_registry("example.org/a", "1") == digest
