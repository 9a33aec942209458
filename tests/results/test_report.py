from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import harness
from harness.errors import OrreryError
from harness.records import Record
from harness.techniques import all_options
from results import again, report
from results.document import inline
from results.settings import colour, settings

LOADING = {"src", "srcset", "poster", "data", "background", "action", "formaction"}


@pytest.fixture(scope="module")
def written(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(swept / "runs", folder / "runs")
    report.write(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_records_same_bytes(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "runs", tmp_path / "runs")
    report.write(tmp_path)
    first, second = contents(written), contents(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_figures_have_svg_png_and_data(written: Path) -> None:
    stems: dict[str, set[str]] = {}
    for path in (written / "figures").iterdir():
        stems.setdefault(path.stem, set()).add(path.suffix)
    assert all(suffixes == {".svg", ".png", ".csv"} for suffixes in stems.values())
    kinds = {stem.rpartition("-")[2] for stem in stems}
    assert kinds == {"throughput", "memory", "timeline", "loss"}
    timelines = {stem for stem in stems if stem.endswith("timeline")}
    assert any("gpipe" in stem for stem in timelines) and any("pipedream-1f1b" in stem for stem in timelines)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.references += [v[1:] for n, v in attributes if n in ("href", "xlink:href") and v and v.startswith("#")]
        self.loads += [f"{tag} {name}={value}" for name, value in attributes if name in LOADING]
        self.loads += [f"{tag} {v}" for n, v in attributes if n.endswith("href") and re.match(r"\w+:|//", v or "")]
        if named.get("role") in ("img", "region") and not named.get("aria-label"):
            self.unlabelled.append(tag)


def test_the_page_loads_nothing(written: Path) -> None:
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "image"} & {*page.tags}
    assert "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_resolve(written: Path) -> None:
    page = Page((written / "index.html").read_text())
    assert len(set(page.ids)) == len(page.ids)
    assert {*page.references} <= {*page.ids}


def test_links_lead_to_files(written: Path) -> None:
    links = re.findall(r'<a href="([^"#]+)"', (written / "index.html").read_text())
    links += re.findall(r"\]\(([^)]+)\)", (written / "report.md").read_text())
    assert links and all((written / link).is_file() for link in links)


def test_the_page_can_be_read_by_everybody(written: Path) -> None:
    text = (written / "index.html").read_text()
    assert Page(text).unlabelled == []
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and '<html lang="en">' in text
    assert text.count("<table>") == text.count('<th scope="col"'.join(["<thead><tr>", ""]))


def test_both_forms_have_the_same_tables(written: Path, records: list[Record]) -> None:
    markdown, page = (written / "report.md").read_text(), (written / "index.html").read_text()
    assert len(re.findall(r"^\| -", markdown, flags=re.MULTILINE)) == page.count("<table>")
    for record in records:
        assert f"runs/{record.provenance.config_hash}.json" in markdown
        if record.reason:
            assert record.reason in markdown and record.reason in page


def test_what_was_assumed_and_where_it_ran_is_told(written: Path, records: list[Record]) -> None:
    text = (written / "report.md").read_text()
    assert "Assumed and fitted constants of pac-nano-4" in text
    assert records[0].provenance.libraries["torch"] in text
    clock = text[text.index("## Wall clock") :]
    assert "Time that planning took" in clock and "planning, s" not in text[: -len(clock)]


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match="There are no results"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_method_keeps_its_colour() -> None:
    methods = ("standalone", "eddl", "gpipe", "pipedream-1f1b", "pac", "asteroid", "galaxy")
    assert len({colour(method) for method in methods}) == len(methods)
    assert colour("somebody-elses") == colour("somebody-elses")


def test_settings_tell_options_apart(records: list[Record]) -> None:
    eddl = next(r for r in records if r.method == "eddl")
    other = eddl.model_copy(update={"method_options": {**eddl.method_options, "shares": "speed"}})
    (setting,) = settings([eddl, other])
    assert {setting.label(r) for r in setting.records} == {"eddl (shares=equal)", "eddl (shares=speed)"}
    (alone,) = settings([eddl])
    assert alone.label(eddl) == "eddl"


def test_settings_have_names_of_their_own(records: list[Record]) -> None:
    one = records[0]
    found = settings([one, one.model_copy(update={"batch_size": 4}), one.model_copy(update={"seq_len": 4})])
    assert len({setting.name for setting in found}) == 3


def test_clipping_makes_another_setting_and_is_told(records: list[Record]) -> None:
    clipped = records[0].model_copy(update={"clip_norm": 0.5})
    works = {setting.first.clip_norm: setting.work for setting in settings([records[0], clipped])}
    assert "gradients clipped to a norm of 0.5" in works[0.5] and "clipped" not in works[None]


def test_an_svg_becomes_part_of_a_page() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg><metadata><a href="http://x"/></metadata>\n  '
        '<defs><path id="p"/></defs><use xlink:href="#p"/><g clip-path="url(#p)"/></svg>'
    )
    assert inline(svg, "f1-") == (
        '<svg>\n<defs><path id="f1-p"/></defs><use xlink:href="#f1-p"/><g clip-path="url(#f1-p)"/></svg>'
    )


def test_settings_tell_options_of_the_technique_apart(records: list[Record]) -> None:
    eddl = next(r for r in records if r.method == "eddl")
    first, other = (
        eddl.model_copy(update={"technique": "lora", "technique_options": all_options("lora", {"rank": rank})})
        for rank in (4, 32)
    )
    (setting,) = settings([first, other])
    assert {setting.label(r) for r in setting.records} == {"eddl (rank=4)", "eddl (rank=32)"}


def test_a_record_with_options_of_its_technique_is_asked_again() -> None:
    options = {"technique_options": {"rank": 4, "alpha": 8}}
    record = harness.run(
        method="eddl", model="bert-tiny", technique="lora", testbed="pac-nano-2", num_samples=32, **options
    )
    assert record.technique_options == {"rank": 4, "alpha": 8, "dropout": None}
    asked = again.request(record)
    assert asked is not None and asked.config_hash == record.provenance.config_hash
    assert again.workload(record) == asked.workload
