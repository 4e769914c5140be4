"""The answer page's limits with everything on it, and the claims page in a browser."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from conftest import REPO
from matplotlib.text import Text

from lib.analysis.metrics import RATE
from lib.claims.kinds import VERDICTS
from lib.core.stage import read_json
from lib.memory_model.tables import WHERE
from lib.report import answer_plots, answers, canvas, plots
from lib.report.answer_page import GROUPS, answer_page, cut
from lib.report.findings import findings, same_engine
from lib.report.h100 import measured
from lib.report.own_run import ratios_beside
from lib.report.page import to_html
from stages import claims, serving_summary
from stages.report import page_of

CHROMIUM = shutil.which("chromium")
REFERENCES = ("embedded-2-cores", "h100-gptq", "h100-gptq-newer", "h200-weightless", "kernel-estimates")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(ledger, summary, answer page as HTML) of the committed runs that the findings stand on and one's own run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in REFERENCES:
        (folder / "results/reference").mkdir(parents=True, exist_ok=True)
        (folder / "results/reference" / name).symlink_to(REPO / "results/reference" / name)
    shutil.copytree(REPO / "results/reference/embedded-2-cores", folder / "results/embedded")
    (folder / "data").symlink_to(REPO / "data")
    (folder / "params.yaml").write_text("profile: embedded\nclaims: {tolerance: 0.1}\nreport: {title: A title}\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        claims.main()
        serving_summary.main()
        ledger = read_json("results/embedded/claims/claims.json")
        summary = read_json("results/embedded/serving_summary/summary.json")
        return ledger, summary, to_html("A title", "", list(answer_page(ledger, summary)), VERDICTS)


def words(page):
    """The page's text without its figures."""
    shown = re.sub(r"<(svg|style|head)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", shown)).split())


def test_the_answer_page_has_at_most_1200_words_and_six_figures(found):
    page = found[2]
    assert page.count("<figure>") == 6
    assert 500 < len(words(page).split()) <= 1200


def test_the_readmes_figure_is_the_one_of_the_third_finding(found):
    drawn = (REPO / "docs/answer-comparison.svg").read_text()
    assert "(docs/answer-comparison.svg)" in (REPO / "README.md").read_text()
    (figure,) = [block[2].svg for block in findings(*found[:2]) if block[:2] == ("figure", "answer-comparison")]
    labels = re.findall(r"<text[^>]*>([^<]+)<", figure)
    assert "1,253" in labels and labels == re.findall(r"<text[^>]*>([^<]+)<", drawn)


def test_triton_is_compared_with_its_engine_by_interval():
    def run(low, alone="vLLM 1"):
        servers = [{"label": "triton", "engine": "vLLM 1 behind Triton 2"}, {"label": "vllm", "engine": alone}]
        row = {"server": "triton", "divided_by": "vllm", "load": "c=1"}
        row["numbers"] = {RATE: {"ratio": 0.95, "low": low, "high": 0.97}}
        return {"experiments": {"base": {"servers": servers, "comparisons": [row]}}}

    nothing = "One and the same engine with and without Triton was not measured."
    invalid, empty = run(0.9), run(0.9)
    invalid["experiments"]["base"]["comparisons"][0]["numbers"] = {RATE: None}
    empty["experiments"]["base"]["comparisons"][0]["numbers"] = None
    for other in (run(None), run(0.9, "vLLM 2"), run(0.9, None), invalid, empty):
        assert same_engine({"runs": {"mine": other}}) == nothing
    found = same_engine({"runs": {"mine": run(None), "theirs": run(0.9)}})
    assert found == "Of the same engine's tokens/s without it, Triton gave 0.95 [0.90, 0.97] for 1 user (theirs)."


def test_a_runs_ratios_stand_beside_the_committed_ones():
    def run(ratio, verdict):
        row = {"server": "triton", "divided_by": "vllm", "numbers": {RATE: {"ratio": ratio, "verdict": verdict}}}
        invalid = [{**row, "load": "c=4", "numbers": {RATE: None}}, {**row, "load": "c=8", "numbers": None}]
        return {"comparisons": [{**row, "load": "c=1"}, *invalid]}

    (sentence,) = ratios_beside(run(0.97, "cannot be told apart"), run(1.2, "triton higher"), "theirs")
    assert sentence == ("triton / vllm at c=1 is 0.97 here (cannot be told apart), 1.20 in theirs (triton higher)")


def test_the_five_findings_say_what_the_committed_runs_measured(found):
    text = words(found[2])
    assert "gives 1,253, without the flag 1,911, in vLLM 0.25.0 2,473: each more than the figure for Triton" in text
    assert "it gives 1,962 [1,742, 2,757] unquantised. The published Triton lies below that." in text
    assert "Not measured" not in text and "1,156.97" in text and "813.81" in text
    for page in ("memory", "answers", "serving", "streaming", "runs", "claims", "finetuning"):
        assert f'href="{page}.html"' in found[2]


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_readme_is_short_and_its_rates_are_the_measured_ones(found, name):
    text = (REPO / name).read_text()
    assert len(text.splitlines()) <= 120
    assert len(measured(found[1])) == 3
    for number in measured(found[1]).values():
        assert f"{number['value']:,.0f}" in text


def test_every_verdict_belongs_to_one_group():
    assert sorted(verdict for of in GROUPS.values() for verdict in of) == sorted(VERDICTS)


def test_a_long_answer_is_cut_at_a_word():
    assert cut("a short one") == "a short one"
    assert cut("word " * 40).endswith("word …") and len(cut("\u3042" * 300)) == 111


DRIVER = """
window.onerror = message => { document.title = "error: " + message; };
window.addEventListener("load", () => {
  const get = name => document.getElementById(name);
  const set = (name, value) => { get(name).value = value; get(name).dispatchEvent(new Event("input")); };
  const rows = () => Array.from(document.querySelectorAll("#claims tbody tr")).filter(row => !row.hidden);
  const out = { all: rows().length };
  set("verdict", "refuted by source"); out.verdict = rows().map(row => row.dataset.verdict);
  set("writeup", "fixstars"); out.both = rows().map(row => row.dataset.writeup); out.count = get("count").textContent;
  set("verdict", ""); set("writeup", ""); set("evidence", "predicted"); out.evidence = rows().length;
  set("evidence", ""); set("search", "813.81 vllm"); out.search = rows().map(row => row.id);
  set("search", ""); set("sort", "verdictRank"); out.sorted = rows().map(row => Number(row.dataset.verdictRank));
  set("search", "nothing has this"); location.hash = "claim-memory-rule";
  setTimeout(() => {
    out.linked = rows().length; out.open = get("claim-memory-rule").querySelector("details").open;
    out.wide = document.documentElement.scrollWidth; out.title = document.title;
    document.body.innerHTML = "<pre id='out'></pre>"; get("out").textContent = JSON.stringify(out);
  }, 100);
});
"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_claims_page_searches_filters_sorts_and_links(found, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    ledger = found[0]
    page = page_of("claims", "A title", ledger, [])
    (tmp_path / "claims.html").write_text(page.replace("<body>", f"<body><script>{DRIVER}</script>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800", "--dump-dom",
               f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000"]  # fmt: skip
    done = subprocess.run([*command, (tmp_path / "claims.html").as_uri()], capture_output=True, text=True, timeout=60)
    out = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    count = {key: [c[key] for c in ledger["claims"]].count for key in ("verdict", "evidence")}
    assert out["all"] == out["linked"] == len(ledger["claims"]) and out["open"]
    assert out["verdict"] == ["refuted by source"] * count["verdict"]("refuted by source") != []
    assert set(out["both"]) == {"fixstars"} and out["count"] == f"{len(out['both'])} of {out['all']} claims"
    assert out["evidence"] == count["evidence"]("predicted") > 0
    assert "claim-triton-vllm-throughput" in out["search"] and len(out["search"]) < out["all"]
    assert out["sorted"] == sorted(out["sorted"]) and not out["title"].startswith("error")
    assert out["wide"] <= 500  # headless Chromium has no narrower window; a phone's styles begin at 640


# Figures.


def lines_figure(count, name="line {}"):
    figure, (axes,) = canvas.new_figure(2.6)
    for n in range(count):
        axes.plot([1, 2], [1, 1 + n / 1000], label=name.format(n))
    canvas.label_lines(figure, [axes])
    return figure, axes


def test_lines_are_named_at_their_ends_without_overlap():
    figure, axes = lines_figure(5)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line that leads to it
    assert [text.get_text() for text in axes.texts] == [f"line {n}" for n in range(5)] and not figure.legends
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)


def test_too_many_names_stand_in_a_legend():
    figure, axes = lines_figure(30, "a name that takes two rows {}")
    assert not axes.texts and len(figure.legends[0].get_texts()) == 30


def test_more_series_than_colours_differ_by_marker():
    looks = [tuple(canvas.look(number).values()) for number in range(3 * len(canvas.COLOURS))]
    assert len(set(looks)) == len(looks)


def test_every_term_of_predicted_memory_is_drawn():
    assert tuple(WHERE) == plots.MEMORY_TERMS


def test_a_phone_stacks_a_table_of_sentences():
    sentence = "word " * 20
    page = to_html("T", "", [("table", ["question", "before", "after"], [["Who?", sentence, sentence]])], ())
    assert '<table class="prose">' in page and f'data-heading="after">{sentence}</td>' in page
    assert "prose" not in to_html("T", "", [("table", ["a", "b"], [["1", sentence]])], ())


# The opening of the fine-tuning chapter.


def opening(*names):
    runs = {name: {"folder": str(REPO / f"results/reference/{folder}")} for name, folder in names}
    return list(answers.opening({"runs": runs}))


def test_the_fine_tuning_chapter_opens_with_eight_answers():
    committed = [(name, name) for name in ("embedded-2-cores", "embedded-persona")]
    _, (_, words), (_, header, rows), (*_, drawn, caption), _ = opening(*committed)
    assert words.startswith("SmolLM2-135M-Instruct, embedded-persona.") and "embedded-persona" in caption
    assert header == ["question", "before", "after LoRA", "after QLoRA"] and len(rows) == 8
    assert rows[3][0] == "Tell me my fortune for today." and rows[3][2].endswith("it is the only day.")
    assert len(drawn.data["measures"]) == 8
    assert opening(("this checkout", "embedded-persona"), *committed)[1][1].startswith(
        "SmolLM2-135M-Instruct, this checkout."
    )
    assert "Not measured yet" in opening()[1][1]


def test_a_cut_answer_is_marked():
    assert [answers.whole(text) for text in ("Done.", "「はい」", "and then", None)] == [
        "Done.", "「はい」", "and then …", "—",
    ]  # fmt: skip


def test_a_measure_without_a_mean_leaves_its_place_empty():
    whole, none = {"mean": 1.0, "low": 0.5, "high": 1.5}, {"mean": None, "low": None, "high": None}
    who = ("dataset", "base", "lora", "qlora")
    measures = {"cut": dict.fromkeys(who, whole), "distinct_words_1": dict.fromkeys(who, none) | {"base": whole}}
    assert answer_plots.style_measures("style-measures", measures)
