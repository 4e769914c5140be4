"""README.md, README.ja.md and docs/: their generated tables, and every command and link that they hold."""

import json
import re
import shlex
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from contracts import judge

from lib.claims.claims import load_claims
from lib.claims.kinds import CPU, EVIDENCE, OTHER_CARD, UNANSWERED, VERDICTS
from lib.core.stage import UserError, load_yaml, read_json
from lib.report.overview import HEADLINES
from stages import claims
from tools import moved, pages

PAGES = [REPO / "README.md", REPO / "README.ja.md", *sorted((REPO / "docs").glob("*.md"))]
ENTRIES = load_yaml(REPO / "data/discrepancies.yaml")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# The tables.


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """The verdicts of a fresh clone: by the committed references alone."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "results").mkdir()
    (folder / "data").symlink_to(REPO / "data")
    (folder / "results/reference").symlink_to(REPO / "results/reference")
    (folder / "params.yaml").write_text((REPO / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        claims.main()
        return read_json("results/embedded/claims/claims.json")


@pytest.fixture(scope="module")
def tables(settled):
    """Every table as a fresh clone makes it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(REPO)
        return pages.tables(settled)


@each_page
def test_a_page_shows_its_tables_as_make_report_writes_them(page, tables):
    text = page.read_text()
    assert pages.fill_page(text, tables, page) == text, "run: make report"


def test_every_table_stands_on_a_page(tables):
    assert tables.keys() == {name for page in PAGES for _, name, _ in pages.BLOCK.findall(page.read_text())}


def test_every_claim_stands_on_its_writeups_page(tables):
    writeups, claims = load_claims(REPO / "data/claims")
    for writeup in writeups:
        mine = [claim for claim in claims if claim.writeup == writeup["id"]]
        text = tables[f"claims-{writeup['id']}"]
        assert text.startswith(f"{len(mine)} claims: ")
        assert text.count("\n| ") - 2 * text.count("\n| claim |") == len(mine)
        assert all(claim.conditions in text for claim in mine)


def test_every_headline_and_verdict_has_japanese_words():
    words = load_yaml(REPO / "data/ja.yaml")
    assert words["claims"].keys() == set(HEADLINES) and words["verdicts"].keys() == set(VERDICTS)
    assert words["evidence"].keys() == set(EVIDENCE)


def test_a_page_shows_no_run_of_ones_own():
    mine = {
        "run": "this checkout (short variant)",
        "verdict": "reproduced",
        "measured": 1,
        "reason": "mine",
        "evidence": CPU,
    }
    theirs = {"run": "h200", "verdict": "not reproduced", "measured": 2, "reason": "theirs", "evidence": OTHER_CARD}
    claim = {"measure": {}, "contradiction": None, **mine}
    assert pages.public({**claim, "outcomes": [mine, theirs]})["reason"] == "theirs"
    assert pages.public({**claim, "outcomes": [mine]})["verdict"] == "not measured"
    contradicted = pages.public({**claim, "outcomes": [theirs], "contradiction": "5 is not 4"})
    assert (contradicted["measured"], contradicted["reason"]) == (2, "5 is not 4")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- results:begin -->\n", "want the marks"),
        ("<!-- results:end -->\n<!-- results:begin -->\n", "want the marks"),
        ("<!-- a:begin -->\n<!-- b:end -->\n", "want the marks"),
        ("<!-- nothing:begin -->\n<!-- nothing:end -->\n", "there is no table 'nothing'; there are results"),
    ],
)
def test_wrong_marks_are_named_and_leave_the_page_unchanged(text, says):
    with pytest.raises(UserError, match=f"README.md: {says}"):
        pages.fill_page(text, {"results": "| new |"}, "README.md")


def test_a_table_is_written_between_its_marks_and_only_once():
    text = "# Above\n<!-- results:begin -->\nstale\n<!-- results:end -->\nbelow\n"
    once = pages.fill_page(text, {"results": "| new |"}, "README.md")
    assert once == "# Above\n<!-- results:begin -->\n| new |\n<!-- results:end -->\nbelow\n"
    assert pages.fill_page(once, {"results": "| new |"}, "README.md") == once


def test_every_unanswered_claim_names_a_pasteable_command(settled):
    unanswered = [claim for claim in map(pages.public, settled["claims"]) if claim["verdict"] in UNANSWERED]
    assert len(unanswered) <= 34
    assert [claim["id"] for claim in unanswered if not claim["command"] or claim["command"].startswith("dvc ")] == []


# The verdicts that moved.


def test_the_committed_verdicts_are_those_of_the_references(settled):
    assert (REPO / moved.FILE).read_text() == moved.as_csv(map(pages.public, settled["claims"])), "run: make report"
    counts = Counter(line.split(",")[2] for line in (REPO / moved.FILE).read_text().splitlines()[1:])
    assert settled["counts"] == {verdict: counts[verdict] for verdict in VERDICTS}


def a_claim(name, verdict, run=None):
    return {"id": name, "writeup": "w", "verdict": verdict, "evidence": "none", "run": run}


def test_a_moved_verdict_is_one_line():
    before = moved.as_csv([a_claim("a", "reproduced"), a_claim("b", "not measured"), a_claim("gone", "opinion")])
    now = [a_claim("a", "reproduced"), a_claim("b", "reproduced", "this checkout"), a_claim("c", "opinion")]
    assert moved.as_text(before, now).splitlines() == [
        "verdicts that moved against the last commit: 3",
        "  b: not measured -> reproduced (this checkout)",
        "  c: new claim -> opinion",
        "  gone: opinion -> claim removed",
    ]


def test_at_most_ten_moved_verdicts_are_listed():
    lines = moved.as_text(moved.as_csv([]), [a_claim(f"c{n}", "opinion") for n in range(12)]).splitlines()
    assert (len(lines), lines[0][-2:], lines[-1]) == (12, "12", "  and 2 more")


def test_moved_verdicts_are_read_from_the_last_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / moved.FILE).write_text("id\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    assert moved.committed() is None and "unknown" in moved.as_text(None, [])
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (tmp_path / moved.FILE).write_text("id\nchanged\n")
    assert moved.committed() == "id\n"


# What the tables are made of.


def test_a_discrepancy_names_its_file_or_why_it_stays():
    ids = [entry["id"] for entry in ENTRIES]
    assert ids == [f"P{n}" for n in range(1, 23)] + [f"M{n}" for n in range(1, 19)]
    for entry in ENTRIES:
        assert ("handled" in entry) != ("as_published" in entry), entry["id"]
        assert (REPO / entry.get("handled", "README.md")).is_file(), entry


def test_every_remark_on_a_command_is_a_listed_discrepancy():
    written = yaml.safe_load((REPO / "tests/fixtures/writeup_commands.yaml").read_text())
    listed = {entry["id"] for entry in ENTRIES}
    assert {remark for line in written for remark in line.get("remarks", [])} - listed == set()


NOW = [line for steps in load_yaml(REPO / "data/then_and_now.yaml").values() for step in steps
       for line in step["now"].splitlines()]  # fmt: skip


@pytest.mark.parametrize("line", NOW, ids=lambda line: Path(line.split()[line.startswith("python3")]).name)
def test_every_corrected_command_holds_its_contract(line):
    words = shlex.split(line)
    name = Path(words[words[0] == "python3"]).stem
    if name in ("docker", "git", "cp"):
        return
    if name == "curl":
        assert json.loads(words[words.index("-d") + 1])["max_tokens"]
        return
    # P22: the launch script returns at once, which the table says. P5: nothing is calibrated without quantisation.
    assert set(judge({"contract": name, "command": line})) <= {"P22", "P5"}


CHAPTERS = load_yaml(REPO / "data/writeup_chapters.yaml")


def test_every_chapter_of_the_writeup_with_a_claim_has_a_row():
    claims = load_yaml(REPO / "data/claims/fixstars.yaml")
    sections = {entry["section"] for kind in ("claims", "tables") for entry in claims[kind]}
    assert [entry["section"] for entry in CHAPTERS] == sorted(sections)


def test_a_chapters_commands_and_stages_exist():
    stages = {name for file in ("dvc.yaml", "studies/dvc.yaml") for name in load_yaml(REPO / file)["stages"]}
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    experiments = load_yaml(REPO / "experiments.yaml")["bench"]["definitions"]
    for entry in CHAPTERS:
        assert {stage.partition("@")[0] for stage in entry["stages"]} <= stages
        for make, target, *settings in map(str.split, entry["commands"]):
            assert (make, target in targets) == ("make", True)
            assert {word.removeprefix("EXPERIMENT=") for word in settings if word.startswith("EXP")} <= set(experiments)


PERSONA = REPO / "results/reference/embedded-persona"


def test_the_voice_on_the_pages_is_the_one_that_was_trained():
    (asked,) = [row for row in read_json(PERSONA / "chat/chat.json")["prompts"] if "fortune" in row["prompt"]]
    for page in ("README.md", "docs/fine-tuning.md"):
        before, after = re.findall(r'"(The day[^"]+)"', (REPO / page).read_text().replace("\n", " "))
        assert asked["base"].startswith(before) and asked["lora"] == after


def test_the_fine_tuning_page_gives_measured_losses_and_rates():
    page = (REPO / "docs/fine-tuning.md").read_text()
    rows = re.findall(r"(?m)^\| ([\d.]+) " + r"\| ([\d.]*) ?" * 3 + r"\|$", page)
    shown = {row[0]: row[1:] for row in rows}
    runs = read_json(PERSONA / "finetune_search.json")["runs"]
    assert len(runs) == 9 == sum(bool(cell) for row in shown.values() for cell in row)
    for run in runs:
        assert shown[str(run["learning_rate"])][(4, 8, 16).index(run["r"])] == f"{run['eval_loss_best']:.2f}"
    for method, rates in read_json(PERSONA / "fast_cpu.json")["tokens_per_second"].items():
        plain, fast = (statistics.fmean(rates[way]) for way in ("plain", "fast"))
        assert f"| {method} | {plain:.0f} | {fast:.0f} | {fast / plain:.1f} |" in page


# Commands and links.


@each_page
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    targets = set(re.search(r"(?m)^\.PHONY: (.*)$", (REPO / "Makefile").read_text())[1].split())
    assert set(re.findall(r"(?m)(?:`|^)make ([a-z][a-z-]*)", text)) - targets == set()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def commands(page):
    """The words of every dvc command of a page, in a block of code or inside a line."""
    return [
        shlex.split(command) for command in re.findall(r"(?m)(?:`|^)containers/run venv:tools dvc ([^#`\n]+)", page)
    ]


def test_dvc_commands_in_the_docs_name_existing_stages():
    from dvc.cli import parse_args

    graphs = {file: load_yaml(REPO / file)["stages"] for file in ("dvc.yaml", "studies/dvc.yaml")}
    params = load_yaml(REPO / "params.yaml")
    dvc_commands = [words for page in PAGES for words in commands(page.read_text())]
    assert len(dvc_commands) >= 10
    for words in dvc_commands:
        given = parse_args(words)
        for target in getattr(given, "targets", None) or []:
            file, _, stage = target.rpartition(":")
            assert stage.partition("@")[0] in graphs[file or "dvc.yaml"], words
        for change in getattr(given, "set_param", None) or []:
            section, _, key = change.partition("=")[0].partition(".")
            assert key in params[section], words
