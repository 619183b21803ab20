"""A report has the same contents in each of its formats."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compiled_llm.report.export import write_report
from compiled_llm.report.html import render_html
from compiled_llm.report.report import BucketReport, BucketState, PhaseReport, Report, StartupReport
from compiled_llm.report.svg import Bar, bar_plot
from compiled_llm.report.tables import report_tables, summary_lines
from passes import PassReport


@pytest.fixture
def report() -> Report:
    graph_pass = PassReport(
        name="lower_attention_marker",
        matches=2,
        expected=2,
        seconds=0.1,
        ops_before=150,
        ops_after=110,
    )
    served = BucketReport(
        bucket="decode-4-greedy",
        size=4,
        state=BucketState.GRAPH,
        trace_seconds=1,
        compile_seconds=2,
        capture_seconds=0.5,
        bytes=3 * 2**20,
        replays=10,
        padded=15,
        passes=[graph_pass],
    )
    failed = BucketReport(
        bucket="decode-2-greedy", size=2, failure='RuntimeError: a < b & "c"', passes=[graph_pass]
    )
    waiting = BucketReport(bucket="decode-1-greedy", size=1, state=BucketState.PENDING)
    made = Report(
        startup=StartupReport(facts={"model": "tiny"}),
        warnings=["<script>alert(1)</script>"],
        buckets=[served, failed, waiting],
    )
    made.phases.append(PhaseReport(name="load weights", seconds=1.25, bytes=2**20))
    made.fallbacks["no bucket"] += 7
    return made


class _Page(HTMLParser):
    """The open tags, all tags, the links and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_complete_and_loads_no_other_file(report: Report) -> None:
    page = render_html(report)
    parsed = _Page(page)
    assert parsed.open == []
    assert not parsed.links
    assert not parsed.seen & {"script", "link", "img", "iframe", "object"}
    assert not any(word in page for word in ("http:", "https:", "url(", "@import"))
    for table in report_tables(report):
        assert table.title in parsed.text
        assert all(cell in parsed.text for row in table.rows for cell in row)
    assert all(line in parsed.text for line in summary_lines(report)), "a warning is escaped"
    plots = page.split("<svg")[1:]
    assert len(plots) == 5, "phases, cost, memory, padding, passes"
    assert "load weights, seconds: 1.25 s" in plots[0]
    assert "decode-4-greedy, compile or load: 2 s" in plots[1]
    assert "decode-1-greedy" not in plots[1].partition("</svg>")[0], "pending"
    assert "decode-4-greedy, memory: 3 MiB" in plots[2]
    assert "decode-4-greedy, tokens: 25" in plots[3]
    assert "decode-4-greedy, padding: 15" in plots[3]
    assert "lower_attention_marker, ops after: 220" in plots[4]


def test_an_empty_report_has_a_page() -> None:
    assert _Page(render_html(Report())).open == []


def test_the_lengths_of_bars_are_those_of_their_values() -> None:
    root = ET.fromstring(bar_plot([Bar("a & b", [1, 3]), Bar("c", [0, 2])], ["x", "y"], unit="s"))
    rects = list(root.iter("rect"))[2:]  # after the legend's
    assert [float(rect.attrib["width"]) for rect in rects] == pytest.approx(
        [140, 420, 0, 280], abs=0.1
    )
    assert float(rects[1].attrib["x"]) == pytest.approx(float(rects[0].attrib["x"]) + 140, abs=0.1)
    apart = ET.fromstring(bar_plot([Bar("a", [1, 4])], ["before", "after"], stacked=False))
    assert [float(rect.attrib["width"]) for rect in apart.iter("rect")][2:] == pytest.approx(
        [140, 560], abs=0.1
    )
    assert bar_plot([Bar("nothing", [0])], ["x"]).count("<rect") == 1
    assert bar_plot([], ["x"]) == ""


def test_the_suffix_selects_the_format(report: Report, tmp_path: Path) -> None:
    for ending in ("html", "json", "txt"):
        write_report(report, tmp_path / "new" / f"report.{ending}")
    written = {path.suffix: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert written[".html"] == render_html(report)
    assert json.loads(written[".json"]) == json.loads(json.dumps(report.to_dict()))
    assert json.loads(written[".json"])["fallbacks"] == {"no bucket": 7}
    assert written[".txt"] == str(report)
    with pytest.raises(ValueError, match=r"must end in \.html, \.json, \.txt, got .*report\.pdf"):
        write_report(report, tmp_path / "report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_report(report, tmp_path / "file" / "report.html")
