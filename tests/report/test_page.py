"""One page that needs nothing else, that data cannot break out of, and that tells no secret."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from makd_llm.cli import main
from makd_llm.config import DistilConfig
from makd_llm.config.objectives import OBJECTIVES
from makd_llm.models.families import family_of
from makd_llm.models.pairing import Pairing
from makd_llm.report.contents import read_run
from makd_llm.report.numbers import level_of, numbers
from makd_llm.report.page import read, render
from makd_llm.testing import tiny_config
from makd_llm.train.build import build_objectives

HOSTILE = (
    '</p></details><script>alert(1)</script><img src=x onerror="alert(2)"> '
    "<svg onload=alert(3)> &lt;b&gt; {{ 7 * 7 }} \u202e \x00 \ud800 ' \" --> ]]>"
)
SECRET = "hf_abcdefghijklmnopqrst"


class Page(HTMLParser):
    """The elements of a page, and its text by the elements around it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br", "path", "circle"):
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside and self.inside[-1] == tag, f"</{tag}> ends {self.inside[-3:]}"
        self.inside.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*folders: Path) -> Page:
    page = Page(render(read(folders)))
    assert page.inside == [], "every element is closed"
    return page


@pytest.fixture(params=["one run", "several runs", "a comparison"])
def page(request: pytest.FixtureRequest, make_run: Any, make_comparison: Any) -> Page:
    if request.param == "a comparison":
        return page_of(make_comparison())
    several = [make_run("b/run", worse=1)] if request.param == "several runs" else []
    return page_of(make_run(), *several)


def test_it_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert "style" not in {name for _, attributes in page.elements for name in attributes}
    (policy,) = [m for m in page.all("meta") if m.get("http-equiv")]
    assert policy["content"] and policy["content"].startswith("default-src 'none'")


def test_it_can_be_used_without_eyes_or_a_mouse(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    for chart in [s for s in page.all("svg") if s.get("aria-hidden") != "true"]:
        assert chart.get("role") == "img" and len(chart.get("aria-label") or "") > 20
    names = [t.get("aria-label") for t in page.all("table")]
    assert names.count(None) == [tag for tag, _ in page.elements].count("caption")
    groups = [a for _, a in page.elements if a.get("role") == "group"]
    assert groups and all(a.get("tabindex") == "0" and a.get("aria-label") for a in groups)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    assert page.all("html")[0]["lang"] == "en" and page.all("main") and page.all("nav")
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("label") == tags.count("input"), "every input has its label"


def test_its_parts_are_there(page: Page) -> None:
    sections = [s["id"] for s in page.all("section")]
    assert sections == [
        "summary",
        "training",
        "speed",
        "student",
        "attention",
        "summaries",
        "settings",
    ]
    for words in ("cross entropy", "matrix level", "layer level", "model level", "Residual"):
        assert words in page.text
    for words in ("Before distillation", "After distillation", "tokens/s", "peak memory"):
        assert words in page.text
    assert "as in the reference" in page.text and "config.yaml" in page.text


def test_texts_of_data_stay_texts(make_run: Any) -> None:
    folder = make_run(HOSTILE.replace("/", "|").replace("\x00", "").replace("\ud800", ""))
    sample = {
        "id": HOSTILE,
        "document": HOSTILE,
        "references": [HOSTILE],
        "teacher": HOSTILE,
        HOSTILE: HOSTILE,
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["models"][HOSTILE] = evaluation["models"]["lead-3"]
    evaluation |= {"prompt": HOSTILE, "generation": HOSTILE, "stages": {HOSTILE: 2.0, "b": 3.0}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1][f"loss/{HOSTILE}"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    factorization = json.loads((folder / "factorization.json").read_text())
    factorization["recipe"]["method"] = HOSTILE
    for matrix in factorization["matrices"]:
        matrix["role"] += HOSTILE
    (folder / "factorization.json").write_text(json.dumps(factorization))
    (folder / "environment.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    (folder / "config.yaml").write_text(f"teacher: {{model: {json.dumps(HOSTILE[:60])}}}\n")
    for made in (page_of(folder), page_of(folder, make_run("other"))):
        tags = [tag for tag, _ in made.elements]
        assert tags.count("script") == 1 and "img" not in tags and "iframe" not in tags
        assert "<script>alert(1)</script>" in made.text and "{{ 7 * 7 }}" in made.text
        assert not any(n.startswith("on") for _, attributes in made.elements for n in attributes)


def test_a_hostile_comparison(make_comparison: Any) -> None:
    folder = make_comparison()
    content = json.loads((folder / "comparison.json").read_text())
    for row in content["rows"] + content["groups"]:
        row |= {"label": HOSTILE, "error": HOSTILE, "state": HOSTILE}
    content |= dict.fromkeys(("name", "teacher", "data", "analysis"), HOSTILE)
    (folder / "comparison.json").write_text(json.dumps(content))
    made = page_of(folder)
    assert [tag for tag, _ in made.elements].count("script") == 1
    assert not made.all("img")


def test_secrets_are_not_in_it(make_run: Any) -> None:
    folder = make_run()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{config}hub_token: {SECRET}\nurl: http://me:pw1@host/\n")
    other = make_run("other")
    (other / "config.yaml").write_text(config + "hub_token: other-words-1\n")
    for subject in (read([folder]), read([folder, other])):
        html = render(subject)
        for secret in (SECRET, "pw1", "plain-words", "other-words-1"):
            assert secret not in html
        assert "***" in html
    assert SECRET not in json.dumps(numbers(read([folder]).runs))


def test_a_large_run_stays_small(make_run: Any) -> None:
    folder = make_run(layers=32, heads=32, steps=5000, documents=500)
    html = render(read([folder]))
    assert len(html.encode()) < 1_000_000
    assert "The first 40 of 500 documents" in html
    wide = make_run("wide", layers=2, heads=128)
    assert "too many heads" in render(read([wide]))


def test_runs_of_one_student_show_it_once(make_run: Any) -> None:
    same = [make_run("a"), make_run("b", worse=1)]
    assert page_of(*same).text.count("Residual, as calibrated. Most") == 1
    other = make_run("c", layers=3)
    made = page_of(*same, other)
    assert made.text.count("Residual, as calibrated. Most") == 2
    assert "Where the runs differ" not in made.text, "their folders do not count"


def test_the_runs_settings_are_compared(make_run: Any) -> None:
    made = page_of(make_run("a"), make_run("b", overrides=("distil.split=0.25",)))
    assert re.search(r"distil\.split\s*0\.5\s*0\.25", made.text)


def test_the_levels_are_the_objectives_own(make_run: Any) -> None:
    """What the report knows of kinds is what the objectives say of themselves."""
    asked = DistilConfig.model_validate(
        {"objectives": {name: {} for name in OBJECTIVES}, "over_parameterize": {"tensors": 3}}
    )
    made = build_objectives(asked, family_of(tiny_config("llama")), 2, Pairing.one_to_one(2))
    run = read_run(make_run())
    run.config["distil"] = asked.model_dump(mode="json")
    assert set(made.names) == set(OBJECTIVES)
    assert {n: level_of(run, n) for n in OBJECTIVES} == {n: made.level_of(n) for n in OBJECTIVES}
    assert level_of(run, "own_words") == "model"
    run.config["distil"]["objectives"]["late"] = {"objective": "hidden"}
    assert level_of(run, "late") == "layer"


def test_the_command(
    make_run: Any, make_comparison: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = make_run()
    main(["report", str(folder)])
    assert f"written: {folder / 'report.html'}" in capsys.readouterr().out
    assert (folder / "report.html").read_text() == render(read([folder]))
    main(["report", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert run["models"]["student"]["share_of_teacher"] == pytest.approx(0.9)
    assert run["training"]["distil"]["objectives"]["late"]["level"] == "layer"
    assert run["attention"]["models"]["student"]["by_layer"][0] == pytest.approx(0.07 * 1.15)
    assert run["factorization"]["by_role"]["q"]["rank"] == [4, 12]
    assert [step["stage"] for step in run["steps_from_the_teacher"]][-1] == "distilled"
    comparison = make_comparison()
    main(["report", str(comparison), "--out", str(tmp_path / "c.html"), "--samples", "0"])
    assert "Full makd is 0.50 above kd" in (tmp_path / "c.html").read_text()
    capsys.readouterr()
    main(["report", str(comparison), "--json"])
    assert len(json.loads(capsys.readouterr().out)["comparison"]["rows"]) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "no such folder"),
        (["run", "--out", "no/where.html"], "there is no folder"),
        (["run", "--out", "."], "give the page's name"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line(
    make_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    make_run()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["report", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
