"""Rows survive their file, files of another version are refused, and reports show what rows say and nothing more."""

import csv
import io
import json
from pathlib import Path

import pytest
from bench_rows import make_row

from m2train.bench import rows as row_files
from m2train.bench.display import notes
from m2train.bench.report import figures, readme, write_report
from m2train.bench.report.markdown import to_markdown
from m2train.bench.report.page import render
from m2train.bench.report.select import latest
from m2train.bench.schema import Memory, Numerics, Physics, Ratio, Row

ROOT = Path(__file__).parents[1]


def test_round_trip(tmp_path):
    rows = [make_row(), make_row(impl="torch"), make_row(impl="verl", status="skipped")]
    for row in rows:
        row_files.append_row(tmp_path / "a" / "x.jsonl", row)
    assert row_files.read_rows([tmp_path]) == rows
    assert row_files.read_rows([tmp_path / "a" / "x.jsonl"]) == rows


@pytest.mark.parametrize(
    "change", [{"schema_version": 2}, {"unheard_of": 1}, {"status": "fine"}, {"identity": {"case": "x"}}]
)
def test_rows_of_another_version_are_refused(tmp_path, change):
    path = tmp_path / "x.jsonl"
    path.write_text(make_row().to_json() + "\n\n" + json.dumps(json.loads(make_row().to_json()) | change))
    with pytest.raises(ValueError, match=r"x\.jsonl:3 is not a row of this version"):
        row_files.read_rows([path])


def test_ids_tell_rows_apart():
    ids = {make_row().id, make_row(impl="torch").id, make_row(phase="fwd").id, make_row(created="2026-01-02").id}
    assert len(ids) == 4 and make_row().id == make_row().id


def test_csv():
    text = row_files.to_csv([make_row(), make_row(impl="x", status="refused")])
    first, second = csv.DictReader(io.StringIO(text))
    assert first["impl"] == "m2" and float(first["ratio_high"]) == 0.52 and first["sha"] == "0123456789abcdef"
    assert second["status"] == "refused" and second["median"] == "" and second["reason"]


def test_newest_row_of_a_key_is_shown():
    old, new = make_row(created="2026-01-01", median=1.0), make_row(created="2026-02-01", median=2.0)
    other = make_row(created="2026-01-01", cache="warm")
    assert latest([new, old, other]) == [new, other]


def test_report_is_one_safe_file(tmp_path):
    rows = [make_row(created=f"2026-01-0{n}", median=n * 1e-3) for n in (1, 2, 3)]
    rows += [make_row(impl="torch"), make_row(impl="evil", status="refused"), make_row(impl="verl", status="skipped")]
    paths = {path.name: path.read_text() for path in write_report(rows, tmp_path)}
    page = paths["report.html"]
    assert "because of &lt;b&gt;evil" in page and "<b>evil" not in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 3  # roofline, ratios, trend
    assert "policy_loss/verl" in page and "3 ms [2.97, 3.03]" in page
    assert page.isascii() and "x0.500 [0.480, 0.520]" in paths["report.md"]
    with pytest.raises(ValueError, match="no rows"):
        write_report([], tmp_path)


def test_rows_without_physics_have_no_place_under_the_roof():
    row = make_row()
    assert figures.placeable(row)
    row.physics.bandwidth = None
    assert not figures.placeable(row)
    assert "Roofline" not in render([row])


def test_markdown_names_refused_and_skipped():
    text = to_markdown([make_row(), make_row(impl="a", status="refused"), make_row(impl="b", status="skipped")])
    assert "**Refused**" in text and "policy_loss/b: because of" in text
    assert f"`{make_row().id}`" in text


def test_reports_show_ratios_to_peers_own_memory_and_figures_of_merit(tmp_path):
    row = make_row()
    row.timing.others = [Ratio(to="liger", value=0.7, low=0.6, high=0.8)]
    row.memory = Memory(peak=30 << 20, results=8 << 20, own=16 << 20, own_share=0.125)
    row.numerics.quality = {"tile_inflation": 1.0312}
    row = Row.from_json(row.to_json())
    for path in write_report([row, make_row(impl="torch")], tmp_path):
        text = path.read_text()
        if path.suffix == ".csv":
            assert ",16777216,0.125," in text
        else:
            assert "16.0 (12.5 %)" in text and "liger x0.700 [0.600, 0.800]" in text
            assert "tile_inflation 1.0312" in text


def test_what_speaks_against_a_figure_stands_beside_it(tmp_path):
    row, planner = make_row(), make_row(impl="planner")
    row.timing.note, row.physics.note = "clocks were throttled", "faster than the speed of light"
    planner.physics = Physics(note="states no bytes")
    assert notes(row) == ["faster than the speed of light", "clocks were throttled"] and notes(planner) == []
    for path in write_report([row, planner], tmp_path):
        text = path.read_text()
        assert path.suffix == ".csv" or ("clocks were throttled" in text and "faster than the speed of light" in text)
        assert "states no bytes" not in text


def test_a_ceiling_is_named_so_everywhere(tmp_path):
    row, bound = make_row(), make_row(impl="gemms", gpu="NVIDIA H100 80GB HBM3")
    row.timing.others = [Ratio(to="gemms", value=1.1, low=1.0, high=1.2, ceiling=True)]
    bound.ceiling, bound.numerics = True, Numerics(reason="a ceiling: part of the work alone")
    rows = [Row.from_json(x.to_json()) for x in (row, bound)]
    for path in write_report(rows, tmp_path):
        text = path.read_text()
        if path.suffix == ".csv":
            assert [line["ceiling"] for line in csv.DictReader(io.StringIO(text))] == ["False", "True"]
        else:
            assert "gemms (ceiling, not checked)" in text and "gemms (ceiling) x1.100" in text
    assert "gemms (ceiling, not checked)" in readme.table(rows)


def test_ticks_are_few_and_inside():
    for low, high in ((0.6, 1.3), (0.01, 30), (1e3, 1e12), (0.9, 1.1)):
        ticks = figures.log_ticks(low, high)
        assert 1 < len(ticks) <= 8 and all(low <= t <= high for t in ticks)


# ------------------------------------------------------------------------------------------------- README


def test_table_holds_h100_rows_only():
    assert readme.table([make_row()]) == readme.NO_ROWS
    text = readme.table([make_row(), make_row(impl="torch", gpu="NVIDIA H100 80GB HBM3", device="cuda")])
    assert text.count("\n") == 2 and "is the baseline" in text and "m2bench repro" in text


def test_update(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert not readme.update(path, [], write=False) and "old" in path.read_text()
    assert not readme.update(path, [], write=True)
    assert path.read_text() == f"before\n{readme.BEGIN}\n{readme.NO_ROWS}\n{readme.END}\nafter\n"
    assert readme.update(path, [], write=False)
    path.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        readme.update(path, [], write=True)


def test_readme_and_committed_rows_agree():
    """No figure stands in the README without a row, and no row is left out of it."""
    results = ROOT / "benchmarks" / "results"
    rows = row_files.read_rows([results] if results.exists() else [])
    assert readme.update(ROOT / "README.md", rows, write=False), "run `m2bench report --readme README.md`"


@pytest.mark.parametrize(
    "report", sorted((ROOT / "benchmarks" / "results").glob("*/report.md")), ids=lambda p: p.parent.name
)
def test_committed_reports_are_of_their_rows(report):
    assert report.read_text() == to_markdown(row_files.read_rows([report.parent])), "run `m2bench report`"


def test_committed_rows_can_be_repeated():
    results = ROOT / "benchmarks" / "results"
    rows = row_files.read_rows([results] if results.exists() else [])
    assert len({row.id for row in rows}) == len(rows)
    assert all(isinstance(row, Row) and row.repro.startswith("m2bench run ") for row in rows)
