"""The report of real and made-up runs (fixtures/claims, see test_claims.py), as HTML and as Markdown."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lib.report import overview
from stages import claims, report, serving_summary

ROOT = Path(__file__).parents[2]
DVC = "containers/run venv:tools dvc repro"
RUNS = Path(__file__).parents[1] / "fixtures" / "claims"


def checkout(folder, monkeypatch, runs=("cpu", "h100")):
    """A checkout in `folder` with its own run `cpu` and the reference `h100`, as `runs` says, and its report."""
    monkeypatch.chdir(folder)
    for path in ("data/claims", "data/report", "data/shapes"):
        if not (folder / path).exists():
            shutil.copytree(ROOT / path, folder / path)
    (folder / "params.yaml").write_text("profile: embedded\nclaims: {tolerance: 0.1}\nreport: {title: A <title>}\n")
    if "cpu" in runs:
        shutil.copytree(RUNS / "cpu", folder / "results/embedded")
    if "h100" in runs:
        shutil.copytree(RUNS / "h100", folder / "results/reference/h100")
    monkeypatch.setattr("sys.argv", ["report"])
    claims.main()
    serving_summary.main()
    report.main()
    out = folder / "results/embedded/report"
    return {name: (out / f"{name}.html").read_text() for name in report.CHAPTERS}, (out / "report.md").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("checkout")
        html, markdown = checkout(folder, monkeypatch)
        return html, markdown, json.loads((folder / "results/embedded/claims/claims.json").read_text())


def test_every_page_is_well_formed_and_its_links_lead_somewhere(pages):
    for text in pages[0].values():
        root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))  # the figures' ids too
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
        assert set(re.findall(r'href="([^"#:]+)\.html"', text)) <= pages[0].keys()


def test_no_page_loads_anything(pages):
    for name, text in pages[0].items():
        assert not re.search(r"<(link|iframe|img|base|object)\b|@import|javascript:", text)
        assert not re.search(r"""(src|href|action|data|url)\s*[=(]\s*["']?(https?:)?//""", text)
        assert text.count("<script") == (name == "claims")


def test_every_claim_stands_in_both_pages(pages):
    html, markdown, ledger = pages
    for claim in ledger["claims"]:
        assert f"<code>{claim['id']}</code>" in html["claims"]
        assert f"`{claim['id']}`" in markdown


def test_the_markdown_twin_has_the_same_tables_in_the_same_order(pages):
    html, markdown, _ = pages
    roots = [
        ElementTree.fromstring(t.removeprefix("<!DOCTYPE html>\n")) for name, t in html.items() if name != "claims"
    ]
    found = [table for root in roots for table in root.iter("table")]
    theirs = [[len(table.findall(".//th")), len(table.findall("tbody/tr"))] for table in found]
    blocks = re.findall(r"(?:^\|.*\n)+", markdown.partition("## All claims")[0], re.MULTILINE)
    ours = [[len(re.findall(r"(?<!\\)\|", b.splitlines()[0])) - 1, len(b.splitlines()) - 2] for b in blocks]
    assert ours == theirs
    for block in blocks:  # no cell breaks its table
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()} == {
            ours[blocks.index(block)][0] + 1
        }


def test_the_markdown_twin_has_the_same_figures_beside_it(pages, tmp_path, monkeypatch):
    html, markdown = checkout(tmp_path, monkeypatch)
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert len(linked) == sum(text.count("<figure>") for text in html.values()) == 7
    for name in linked:
        path = tmp_path / "results/embedded/report" / name
        ElementTree.parse(path)
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_has_its_data_and_command_beside_it(tmp_path, monkeypatch):
    checkout(tmp_path, monkeypatch)
    out = tmp_path / "results/embedded/report"
    saved = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert saved.keys() == {path.stem for path in out.glob("*.svg")}
    assert {one["command"] for one in saved.values()} == {"make report"}
    (vllm,) = [one for one in saved["serving-base-this-checkout"]["series"] if one["label"].startswith("vllm")]
    assert [(point["concurrency"], point["valid"]) for point in vllm["points"]] == [(1, True), (2, False), (4, True)]
    assert vllm["points"][0]["tokens_per_second"] == 61.3


def test_every_figure_is_described_in_words(pages):
    html = "".join(pages[0].values())
    assert all(len(label) > 20 for label in re.findall(r'<svg role="img" aria-label="([^"]+)"', html))
    assert html.count("<svg") == html.count('<svg role="img" aria-label=')


def test_a_hostile_chat_answer_is_shown_as_text(pages):
    html, markdown, _ = pages
    assert (
        "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; | <code>a</code> [link](http://evil.example/)"
        in html["answers"]
    )
    assert "<script>" not in html["answers"] + html["index"] and "<script>" not in markdown
    assert r"\[link\](http://evil.example/)" in markdown


def test_a_stand_in_is_named_wherever_its_figures_stand(pages):
    chapter = pages[1].split("### Serving: this checkout")[1].split("### Serving: h100")[0]
    full = "Transformers 5.23.0 continuous batching behind Triton 2.51.0 (stand-in for TensorRT-LLM)"
    assert f"triton (stand-in) is {full}" in chapter and "A stand-in is drawn dashed" in chapter
    assert chapter.count("| triton (stand-in) | c=") == 7  # four points, three of them beside vLLM's
    assert not re.search(r"\| triton \||triton \(vLLM|of triton:", chapter)
    assert "Validity of triton (stand-in):" in chapter


def test_an_invalid_point_is_shown_with_its_reason(pages):
    assert "no: 2 of 8 requests stopped early" in pages[0]["serving"]


def test_own_published_and_reference_figures_stand_in_one_table(pages):
    section = pages[1].split("## Fine-tuning")[1].split("## Memory")[0]
    assert "| published | QLoRA |" in section
    assert "| this checkout | qlora | SmolLM2-135M-Instruct |" in section
    assert "| h100 | qlora | elyza/ELYZA-japanese-Llama-2-7b-instruct |" in section


def test_a_run_that_only_served_names_what_it_served(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests/fixtures/serving/h200", tmp_path / "results/reference/h200-vllm")
    for name in ("cards.yaml", "shapes"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    _, markdown = checkout(tmp_path, monkeypatch, runs=())
    ran = markdown.split("## What ran")[1].split("## Reproduce it")[0]
    (row,) = re.findall(r"^\| h200-vllm \| weightless \|.*", ran, re.MULTILINE)
    assert "gpt-oss-20b shape (random weights), llama-2-7b shape (random weights)" in row
    assert "| h200-vllm | NVIDIA H200 | memory | 4,468.40 GB/s |" in markdown


def outcome(run, verdict, measured=1.0):
    return {"run": run, "verdict": verdict, "measured": measured}


def test_a_verdicts_reason_lists_only_relevant_variants():
    outcomes = [
        outcome("this checkout", "not comparable", 1.0),
        outcome("this checkout (published variant)", "not comparable", 2.0),
        outcome("h200", "reproduced", 3.0),
        outcome("h200 (short variant)", "reproduced", 4.0),
        outcome("h200 (tuned variant)", "not comparable", 5.0),
        outcome("h200 (slow variant)", "not reproduced", 6.0),
        outcome("h100", "not reproduced", 7.0),
        outcome("h100 (short variant)", "not reproduced", 8.0),
        outcome("a100", "not measured", None),
        outcome("cpu", "not comparable", 9.0),
    ]
    claim = outcome("h200", "reproduced", 3.0) | {
        "reason": "r",
        "conditions": "c",
        "note": None,
        "inferred": None,
        "command": None,
        "outcomes": outcomes,
    }
    assert overview.why(claim).splitlines() == [
        "r",
        "Conditions: c.",
        "this checkout: not comparable, 1",
        "h200 (slow variant): not reproduced, 6",
        "h100: not reproduced, 7",
    ]


def test_the_same_results_give_the_same_bytes(pages, tmp_path, monkeypatch):
    assert checkout(tmp_path, monkeypatch) == pages[:2]


def test_an_empty_report_names_the_command_of_each_part(tmp_path, monkeypatch):
    html, markdown = checkout(tmp_path, monkeypatch, runs=())
    for command in ("make reproduce", f"{DVC} finetune@lora finetune@qlora", f"{DVC} vram", f"{DVC} chat",
                    f"{DVC} bench@base", "make publish NAME=..."):  # fmt: skip
        assert f"`{command}`" in markdown and f"<code>{command}</code>" in "".join(html.values())


def test_the_report_works_from_references_alone(tmp_path, monkeypatch):
    _, markdown = checkout(tmp_path, monkeypatch, runs=("h100",))
    assert "No run of this checkout yet." in markdown
    assert "| h100 | writeup | Intel Xeon Platinum 8480C, 16 cores, 128 GiB | NVIDIA H100 80GB HBM3 |" in markdown
    assert "| this checkout |" not in markdown


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    """The chapter on fine-tuning of the committed GPU run, as Markdown, and its metrics by variant."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("h200")
        shutil.copytree(ROOT / "results/reference/h200-weightless", folder / "results/reference/h200-weightless")
        _, markdown = checkout(folder, monkeypatch, runs=())
    variants = (folder / "results/reference/h200-weightless/finetune").glob("*/metrics.json")
    chapter = markdown.split("## Fine-tuning")[1].split("## Memory")[0]
    return chapter, {path.parent.name: json.loads(path.read_text()) for path in variants}


def row_of(text, *cells):
    """The cells of the one table row that begins with `cells`."""
    plain = re.sub(r"\\(.)", r"\1", text)  # without Markdown's escapes
    (row,) = re.findall(rf"^\| {re.escape(' | '.join(cells))} \|.*", plain, re.MULTILINE)
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_faster_variant_stands_beside_the_recipe_of_its_method(h200, method):
    chapter, metrics = h200
    table = chapter.split("### How fast: h200-weightless")[1].split("**What differs")[0]
    tuned, recipe = metrics[f"{method}-tuned"], metrics[f"{method}-short"]
    cells = row_of(table, f"{method}-tuned")
    assert cells[2] == f"{recipe['seconds_per_step_median'] / tuned['seconds_per_step_median']:.1f}x"
    assert cells[4] == f"{tuned['utilisation']:.1%}" and cells[6] == f"{tuned['train_seconds']:.2f}"
    assert row_of(table, f"{method}-short")[2] == "1.0x"


def test_the_time_of_a_shortened_run_is_extrapolated(h200):
    chapter, metrics = h200
    seconds = metrics["lora-short"]["seconds_per_step_median"] * 111
    assert row_of(chapter.split("### How fast")[1].split("**What")[0], "lora-short")[6] == f"≈ {seconds:,.0f}"


def test_packed_pieces_are_no_faster_recipe(h200):
    cells = row_of(h200[0].split("### How fast")[1].split("**What differs")[0], "lora-packed")
    assert cells[2] == cells[6] == cells[7] == "—" and cells[4] != "—"


def test_a_faster_variant_says_which_settings_it_changed(h200):
    fold = h200[0].split("**What differs from the recipe**")[1].split("###")[0]
    changed = row_of(fold, "lora-tuned-24gb")[1]
    assert "micro_batch 1 → 32, accumulation 32 → 1" in changed and "gradient_checkpointing" not in changed


def section(text, heading):
    return text.split(f"### {heading}")[1].split("### ")[0]


def test_several_gpus_show_speedup_and_efficiency(h200):
    chapter, metrics = h200
    table = section(chapter, "On several GPUs: h200-weightless")
    one = metrics["lora-tuned-1-gpu"]["seconds_per_step_median"]
    for variant, gpus in (("lora-tuned-1-gpu", 1), ("lora-tuned-2-gpus", 2), ("lora-tuned-4-gpus", 4)):
        faster = one / metrics[variant]["seconds_per_step_median"]
        cells = row_of(table, variant, str(gpus))
        assert cells[3:5] == [f"{faster:.2f}x", f"{faster / gpus:.0%}"]
        assert cells[7] == f"{metrics[variant]['utilisation']:.1%}"
    assert row_of(table, "lora-tuned-2-gpus")[5] == "0.5363"  # a step that the median passes over
    assert table.count("](scaling-lora-tuned-1-gpu-h200-weightless.svg)") == 1


def test_the_spread_of_seeds_is_shown_beside_the_difference(h200):
    chapter, metrics = h200
    table = section(chapter, "What another seed changes: h200-weightless")
    best = [metrics[f"lora-tuned{seed}"]["eval_loss_best"] for seed in ("", "-seed-43", "-seed-44")]
    assert [row_of(table, f"lora-tuned{end}")[-1] for end in ("", "-seed-43", "-seed-44")] == [f"{x:.3f}" for x in best]
    assert row_of(table, "spread")[-1] == f"{max(best) - min(best):.3f}"
    apart = abs(metrics["lora-tuned-short"]["eval_loss_best"] - metrics["lora-short"]["eval_loss_best"])
    assert f"own 21 steps, with its seed, lora-tuned-short ends {apart:.3f} from it" in table.replace("\\", "")


def test_variants_with_own_tables_are_not_repeated(h200):
    chapter, _ = h200
    speeds = section(chapter, "How fast: h200-weightless")
    assert "gpu" not in speeds.split("**What differs")[1] and "seed" not in speeds.split("**What differs")[1]
    assert "| lora-tuned-seed-43 |" not in speeds and "| lora-tuned-1-gpu |" not in speeds
    assert "(loss-31-" not in chapter and "(loss-111-" in chapter


def test_a_run_without_gpus_or_other_seeds_has_neither_table(pages):
    assert "On several GPUs" not in pages[1] and "What another seed changes" not in pages[1]


def test_memory_is_predicted_measured_and_published_in_a_row(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results/reference/h200-weightless", tmp_path / "results/reference/h200-weightless")
    _, markdown = checkout(tmp_path, monkeypatch, runs=())
    run = tmp_path / "results/reference/h200-weightless"
    predicted = json.loads((run / "vram/vram.json").read_text())["finetune"]["variants"]["qlora-short"]
    measured = json.loads((run / "finetune/qlora-short/metrics.json").read_text())["memory"]["process_peak_mib"]
    cells = row_of(markdown.split("## Memory")[1], "qlora-short")
    assert cells[4:6] == [f"{predicted['process_bytes'] / 2**20:,.0f}", f"{measured:,.0f}"]
    assert cells[6] == f"{predicted['process_bytes'] / 2**20 / measured - 1:+.1%}" and cells[7:] == ["7,577", "load"]
    assert row_of(markdown.split("## Memory")[1], "lora-tuned")[4].startswith("≈ ")


def test_both_templates_are_shown_with_token_ids_and_loss(h200):
    chapter, metrics = h200
    published, corrected = row_of(chapter, "published (published)"), row_of(chapter, "corrected (llama-2)")
    assert published[1] == "2" and published[2].startswith("1 1 28792") and corrected[2].startswith("1 28792")
    assert f"lora-published {metrics['lora-published']['eval_loss_best']:.4g}" in published[-1]
    assert f"lora-short {metrics['lora-short']['eval_loss_best']:.4g}" in corrected[-1]


def test_a_flag_cleared_by_the_trainer_is_explained(h200, pages):
    assert h200[0].count("hands the setting to peft") == 1
    assert pages[1].count("hands the setting to peft") == 1  # of two runs, one has checkpointing


def test_style_scores_stand_beside_the_data_set_s_own(tmp_path, monkeypatch):
    mean = {"rows": 16, "mean": 0.0625, "low": 0.05, "high": 0.07}
    shutil.copytree(RUNS / "h100", tmp_path / "results/reference/h100")
    scores = {
        "model": "a model", "prompts": 16, "remarks": ["Mind this."],
        "measures": {"commas_per_character": {
            "definition": "Commas over characters.",
            "means": {"dataset": mean, "lora": mean, "qlora": {"rows": 3, "mean": 0.5, "low": None, "high": None}},
            "differences": {"lora_minus_qlora": mean | {"verdict": "differs"}},
        }},
    }  # fmt: skip
    target = tmp_path / "results/reference/h100/style/style.json"
    target.parent.mkdir()
    target.write_text(json.dumps(scores))
    _, markdown = checkout(tmp_path, monkeypatch, runs=())
    cells = row_of(markdown, "commas per character", "0.0625 [0.05, 0.07]", "—", "—", "0.0625 [0.05, 0.07]")
    assert cells[5] == "0.5 no interval"
    assert cells[6:] == ["0.0625 [0.05, 0.07]", "differs", "—"]
    assert "Mind this." in markdown and "Commas over characters." in markdown
