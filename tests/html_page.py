"""What a browser would trip over in a page, and what a page shows."""

import html.parser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Html(html.parser.HTMLParser):
    """Parses a page; asserts that elements are balanced and that nothing is fetched or run.

    Attributes:
        text: what is to be read.
        tags: how often each element occurs.
        anchors, links: the ids, and the targets of links within the page.
        marked: the cells of table rows that are marked as best.
    """

    def __init__(self, content: str):
        super().__init__()
        self.text = ""
        self.tags: dict[str, int] = {}
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.marked: list[list[str]] = []
        self._open: list[str] = []
        self._in_best = False
        self.feed(content)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice: {attrs}"
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not any(name.startswith("on") for name in given)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name in ("src", "href", "xlink:href", "action"):
            target = given.get(name) or ""
            assert target.startswith(("data:image/png;base64,", "#")) or not target, target[:50]
            if name == "href" and target:
                self.links.append(target[1:])
        if "id" in given:
            self.anchors.append(given["id"])
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr" and given.get("class") == "best":
            self.marked.append([])
            self._in_best = True

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"
        self._in_best = self._in_best and tag != "tr"

    def handle_data(self, data):
        if "style" in self._open:
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if self._in_best and data.strip():
            self.marked[-1].append(data)


def read(content: str) -> Html:
    """The page, checked; its links lead somewhere."""
    assert content.startswith("<!DOCTYPE html>")
    page = Html(content)
    assert len(set(page.anchors)) == len(page.anchors)
    assert set(page.links) <= set(page.anchors)
    return page
