"""The docs site builds without a warning, and asks no other host for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOADS = {  # what a browser fetches by itself; <a href> is for the reader to click
    "script": ["src"], "link": ["href"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"],
    "audio": ["src"], "video": ["src", "poster"], "object": ["data"], "embed": ["src"], "image": ["href"],
    "use": ["href"], "form": ["action"], "base": ["href"],
}  # fmt: skip
EXTERNAL = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)


class Loads(HTMLParser):
    """Collects what a page loads from other hosts, and the pages it links to."""

    def __init__(self):
        super().__init__()
        self.external, self.internal_links = [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if value and name in LOADS.get(tag, ()) and EXTERNAL.match(value):
                self.external.append((tag, value))
            if value and name == "style" and re.search(r"url\(\s*['\"]?(https?:)?//", value):
                self.external.append((tag, value))
            if tag == "a" and name == "href" and value and not re.match(r"[a-z]+:|#", value):
                self.internal_links.append(value.split("#")[0])


def test_every_page_is_there_and_every_link_leads_somewhere(site):
    pages = sorted(site.rglob("*.html"))
    names = {str(page.relative_to(site)) for page in pages}
    assert {"index.html", "defects.html", "api/seqpar_ref.html", "api/simulator.html"} <= names
    for page in pages:
        if page.name == "404.html":
            continue
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        for link in loads.internal_links:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_page_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert not loads.external, f"{page.name}: {loads.external}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), (
            sheet.name
        )


def test_a_load_from_another_host_would_be_seen():
    loads = Loads()
    loads.feed(
        '<script src="https://a.b/c.js"></script><link href="//fonts.b"><a href="https://a.b">text</a>'
    )
    assert [tag for tag, _ in loads.external] == ["script", "link"]


def test_formulas_fonts_and_scripts_are_served_by_the_site(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'class="arithmatex"' in page
    for script in re.findall(r'<script src="([^"]+)"', page):
        assert (site / script.split("?")[0]).exists(), script
    sheet = (site / "vendor/katex/katex.min.css").read_text(encoding="utf-8")
    for font in re.findall(r"url\(([^)]+)\)", sheet):
        assert (site / "vendor/katex" / font).exists(), font


def test_the_figures_are_what_their_script_draws():
    import importlib.util

    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, figure in module.FIGURES.items():
        stored = (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8")
        assert figure()._repr_svg_() == stored, f"{name} is stale: run python docs/figures/make.py"
    for name, animation in module.ANIMATIONS.items():
        stored = (ROOT / "docs" / "figures" / name).read_bytes()
        assert animation() == stored, f"{name} is stale: run python docs/figures/make.py"
        assert len(stored) < 500_000
