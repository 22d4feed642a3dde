"""The pages in a headless Chromium, opened from a folder as a user opens them; skipped where there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.registry.site.data import Catalogue, ShownVersion, catalogue
from xpert.registry.site.writing import write_site

Make = Callable[..., ShownVersion]
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


def written(found: Catalogue, folder: Path) -> str:
    write_site(found, folder / "site")
    return (folder / "site").as_uri()


@pytest.fixture
def many(make_shown: Make, make_mixed: Make) -> Catalogue:
    experts = []
    for index in range(120):
        scores = {f"skill {k}": ((index * 7 + k * 3) % 10) / 10 for k in range(12) if (index + k) % 5}
        name = f"{'acme' if index % 2 else 'north'}/expert-{index:03d}"
        base = "one" if index % 3 else "two"
        experts.append(make_shown(name, scores=scores, description=f"Über {index}", base=base))
    return catalogue([*experts, make_mixed("acme/mix", ("acme/expert-001@1",))])


def names(browser: Any) -> list[str]:
    found: list[str] = browser.js("[...document.querySelectorAll('#list tbody a')].map(a => a.textContent)")
    return found


def test_every_page_runs_without_a_complaint(browser: Any, sample: Catalogue, tmp_path: Path) -> None:
    url = written(sample, tmp_path)
    for path in sorted(p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")):
        for width in (1280, 400):
            browser.size(width, 900)
            browser.open(f"{url}/{path}")
            assert browser.complaints == [], path
            assert browser.js("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than {width}"
            assert (
                browser.js("getComputedStyle(document.querySelector('.top')).display") == "flex"
            )  # the style is there


def test_long_words_do_not_widen_a_page(browser: Any, make_shown: Make, make_mixed: Make, tmp_path: Path) -> None:
    long = "W" * 300
    evil = make_shown("a/long", scores={long: 0.5}, description=long, suite=long, metric=long, base=long, tags=(long,))
    url = written(catalogue([evil, make_mixed("a/mix", ("a/long@1",), gate=long)], title=long), tmp_path)
    for path in sorted(p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")):
        for width in (1280, 400):
            browser.size(width, 900)
            browser.open(f"{url}/{path}")
            assert browser.js("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than {width}"


def test_the_list_is_searched_sorted_and_paged(browser: Any, many: Catalogue, tmp_path: Path) -> None:
    url = written(many, tmp_path)
    browser.open(f"{url}/index.html")
    assert len(names(browser)) == 50 and browser.js("document.querySelector('#count').textContent").startswith(
        "121 names"
    )
    browser.js("document.querySelector('#q').focus()")
    browser.type("exp 01 uber")
    assert names(browser) == [
        f"{'acme' if i % 2 else 'north'}/expert-{i:03d}" for i in (11, 13, 15, 17, 19, 10, 12, 14, 16, 18)
    ]
    assert "#q=exp+01+uber" in browser.js("location.hash")
    browser.js("document.querySelector('#clear').click()")
    browser.type("expert")
    later = browser.js("new Promise(r => setTimeout(() => r(document.querySelectorAll('#list tbody tr').length), 400))")
    assert later == 50  # the first rows come at once, the others when one has stopped typing
    browser.js("document.querySelector('#clear').click()")
    browser.js(
        "(s => { s.value = 'skill 3'; s.dispatchEvent(new Event('change')); })(document.querySelector('#skill'))"
    )
    scores = browser.js("[...document.querySelectorAll('#list .bests b')].map(b => Number(b.textContent))")
    assert scores == sorted(scores, reverse=True) and scores[0] == 0.9
    assert browser.js("document.querySelector('th[data-sort=score]').getAttribute('aria-sort')") == "descending"
    browser.open(f"{url}/index.html#kind=mixture")
    assert names(browser) == ["acme/mix"]
    browser.open(f"{url}/index.html#page=3")
    assert len(names(browser)) == 21
    browser.open(f"{url}/index.html#q=nothing-like-it")
    assert browser.js("document.querySelector('#count').textContent") == "Nothing matches all of this."


def test_the_heat_map_by_keyboard(browser: Any, many: Catalogue, tmp_path: Path) -> None:
    browser.open(f"{written(many, tmp_path)}/heat.html#order=name")
    rows = "document.querySelectorAll('.heat tbody tr:not(.spacer)').length"
    assert browser.js(rows) < 120  # only what can be seen is drawn
    browser.js("document.querySelector('td[data-r]').focus()")
    for key in ["ArrowRight"] * 3 + ["ArrowDown"] * 100:
        browser.key(key)
    browser.js("new Promise(done => setTimeout(done, 200))")  # the last scroll is told of a frame later
    at = browser.js("[document.activeElement.dataset.r, document.activeElement.dataset.c]")
    assert at == ["100", "3"]
    box = browser.js("(b => [b.top, b.bottom, innerHeight])(document.activeElement.getBoundingClientRect())")
    assert 0 < box[0] < box[1] <= box[2]
    expert, skill = 80, 3  # by name: acme's sixty come first, and row 100 is north's 41st
    tip = browser.js("document.querySelector('#tip.on').textContent")
    assert f"north/expert-{expert:03d}@1" in tip and "items" in tip and "base" in tip
    score = ((expert * 7 + _column(skill) * 3) % 10) / 10
    assert f"{score:.3f}" in tip
    label = browser.js("document.activeElement.getAttribute('aria-label')")
    assert f"{score:.3f}" in label and "interval" in label
    browser.key("Escape")
    assert browser.js("document.querySelector('#tip.on')") is None
    browser.js("document.querySelector('#heat').dispatchEvent(new Event('scroll'))")
    assert browser.js("document.querySelector('#tip.on')") is None, "scrolling brings back what was sent away"


def _column(at: int) -> int:
    """The number of the skill in a column: they are sorted by name, so that 10 and 11 come before 2."""
    return sorted(range(12), key=str)[at]


def test_the_heat_map_shows_gains_orders_and_hatches(browser: Any, sample: Catalogue, tmp_path: Path) -> None:
    browser.open(f"{written(sample, tmp_path)}/heat.html#order=mean")
    first, second = browser.js(
        "[...document.querySelectorAll('.heat tbody tr')].map(r => [r.querySelector('a').textContent,"
        " ...[...r.querySelectorAll('td[data-r]')].map(c => c.textContent || c.getAttribute('aria-label'))])"
    )
    assert first == ["acme/sums", "dates: not scored", "70"]  # its mean is 0.7, that of acme/dates (0.9 + 0.25) / 2
    assert second == ["acme/dates", "90", "25"]
    hatched = browser.js("getComputedStyle(document.querySelector('.heat td.none')).backgroundImage")
    assert "repeating-linear-gradient" in hatched
    browser.js("document.querySelector('input[value=gain]').click()")
    shown = browser.js("[...document.querySelectorAll('.heat td[data-r]')].map(c => c.textContent)")
    assert sorted(shown) == sorted(["", "+50", "+70", "+5"])
    assert "show=gain" in browser.js("location.hash")
    browser.js("document.querySelector('.heat thead button').click()")  # orders by that skill
    assert browser.js("document.querySelector('.heat tbody a').textContent") == "acme/dates"


VERDICTS = (
    "[...document.querySelectorAll('.profile tbody tr')]"
    ".map(r => [r.querySelector('bdi').textContent, r.lastChild.textContent])"
)


def test_two_experts_are_compared_by_their_address(browser: Any, sample: Catalogue, tmp_path: Path) -> None:
    url = written(sample, tmp_path)
    browser.open(f"{url}/compare.html#a=acme/dates@2&b=acme/sums")
    assert browser.js(VERDICTS) == [
        ["sums", "second better, beyond both intervals"],
        ["dates", "scored for the first only"],
    ]
    browser.js("document.querySelector('#swap').click()")
    assert browser.js(VERDICTS)[0] == ["sums", "first better, beyond both intervals"]
    assert "a=acme%2Fsums&b=acme%2Fdates%402" in browser.js("location.hash")
    browser.open(f"{url}/compare.html#a=acme/dates@2&b=north/new")
    assert "different base models" in browser.js("document.querySelector('#comparison').textContent")
    browser.open(f"{url}/compare.html#a=acme/dates@9")
    assert "There is no expert acme/dates@9" in browser.js("document.querySelector('#comparison').textContent")


def test_the_heat_map_counts_what_it_shows(browser: Any, make_shown: Make, tmp_path: Path) -> None:
    one = make_shown("a/one", scores={"dates": 0.5})
    assert one.card is not None and one.profile is not None
    profile = dataclasses.replace(one.profile, keywords={**one.profile.skills, "sums": one.profile.skills["dates"]})
    one = dataclasses.replace(one, card=dataclasses.replace(one.card, profile=profile))
    url = written(catalogue([one]), tmp_path)
    browser.open(f"{url}/heat.html")
    assert browser.js("document.querySelector('#count').textContent") == "1 expert × 1 skill"
    browser.js(
        "(g => { g.value = 'keywords'; g.dispatchEvent(new Event('change', {bubbles: true})); })"
        "(document.querySelector('#group'))"
    )
    assert browser.js("document.querySelector('#count').textContent") == "1 expert × 2 keywords"


def test_verdicts_in_the_page_are_those_of_the_library(browser: Any, make_shown: Make, tmp_path: Path) -> None:
    from xpert.registry.site.wording import verdict

    pairs = {f"s{k}": (0.5, 0.5 + k * 0.02) for k in range(-8, 9)}
    one = make_shown("a/one", scores={skill: pair[0] for skill, pair in pairs.items()})
    two = make_shown("a/two", scores={skill: pair[1] for skill, pair in pairs.items()})
    browser.open(f"{written(catalogue([one, two]), tmp_path)}/compare.html#a=a/one&b=a/two")
    told = dict(browser.js(VERDICTS))
    assert len(told) == 17 and len(set(told.values())) >= 5
    for skill, words in told.items():
        first, second = (v.profile.skills[skill].expert for v in (one, two))
        expected = verdict(first, second)
        if expected.startswith("worse"):
            expected = f"second {expected.replace('worse', 'better')}"
        elif expected.startswith("better"):
            expected = f"first {expected}"
        assert words == expected, skill


def test_what_strangers_wrote_does_nothing(browser: Any, make_shown: Make, make_mixed: Make, tmp_path: Path) -> None:
    scores = {EVIL: 0.5, "x": 0.2}
    evil = make_shown(EVIL, scores=scores, description=EVIL, suite=EVIL, metric=EVIL, base=EVIL, tags=(EVIL,))
    other = make_shown("a/b", scores=scores, base=EVIL)
    url = written(catalogue([evil, other, make_mixed("a/mix", (evil.version.ref,), gate=EVIL)], title="Fine"), tmp_path)
    for path in sorted(p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")):
        browser.open(f"{url}/{path}")
        assert browser.complaints == [], path
        assert "owned" not in browser.js("document.title") or path.startswith("names/_/")
        assert browser.js("document.querySelectorAll('img, script:not([src]):not([type])').length") == 0
    browser.open(f"{url}/heat.html")
    browser.js("document.querySelector('td[data-r]').focus()")
    assert browser.js("document.querySelectorAll('img').length") == 0 and browser.complaints == []
    browser.open(f"{url}/index.html#q={EVIL}")
    assert browser.js("document.querySelector('#q').value") == EVIL


def test_inline_scripts_are_refused(browser: Any, sample: Catalogue, tmp_path: Path) -> None:
    """The policy of the pages, were a text of a card ever to become markup."""
    url = written(sample, tmp_path)
    page = tmp_path / "site/index.html"
    page.write_text(
        page.read_text().replace("</main>", "<script>window.ran = 1</script><i onclick='ran = 1'>x</i></main>")
    )
    browser.open(f"{url}/index.html")
    browser.js("document.querySelector('main > i').click()")
    assert browser.js("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_headings_landmarks_and_labels(browser: Any, sample: Catalogue, tmp_path: Path) -> None:
    url = written(sample, tmp_path)
    for path in ("index.html", "heat.html", "compare.html", "mixtures.html", "names/acme/dates.html"):
        browser.open(f"{url}/{path}")
        found = browser.js(
            """({
              h1: document.querySelectorAll("h1").length,
              landmarks: ["header", "nav", "main", "footer"].map(tag => document.querySelectorAll(tag).length > 0),
              unlabelled: [...document.querySelectorAll("input, select")].filter(c => !c.labels.length).length,
              headless: [...document.querySelectorAll("table")].filter(t => !t.querySelector("th[scope]")).length,
              nameless: [...document.querySelectorAll("button, a")].filter(b => !b.textContent.trim()).length,
              unreachable: [...document.querySelectorAll(".scroll")].filter(s => s.tabIndex !== 0).length,
            })"""
        )
        expected = {
            "h1": 1,
            "landmarks": [True] * 4,
            **dict.fromkeys(("unlabelled", "headless", "nameless", "unreachable"), 0),
        }
        assert found == expected, json.dumps([path, found])
        browser.key("Tab")
        assert browser.js("document.activeElement.className") == "skip"
