"""A page as a browser reads it: balanced, with nothing fetched or run."""

import html.parser
from collections import Counter

VOID = {"meta", "img", "br", "hr", "input"}


class Html(html.parser.HTMLParser):
    """Parses a page, and asserts that elements are balanced and that nothing is fetched or run.

    Attributes:
        text: all that is to be read.
        tags: how often each element occurs.
        anchors, links: the ids, and the targets of links within the page.
        marked: the cells of table rows that are marked as best.
    """

    def __init__(self, content: str):
        super().__init__()
        self.text, self.tags = "", Counter()
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.marked: list[list[str]] = []
        self._open: list[tuple[str, bool]] = []  # elements, and whether they are marked
        self.feed(content)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute twice: {attrs}"
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not any(name.startswith("on") for name in values)
        self.tags[tag] += 1
        for name in {"src", "href", "xlink:href", "action"} & values.keys():
            assert values[name].startswith(("data:image/png;base64,", "#")), values[name][:50]
            self.links += [values[name][1:]] if values[name].startswith("#") else []
        self.anchors += [values["id"]] if "id" in values else []
        best = tag == "tr" and values.get("class") == "best"
        self.marked += [[]] if best else []
        if tag not in VOID:
            self._open.append((tag, best))

    def handle_endtag(self, tag):
        assert tag in VOID or (self._open and self._open.pop()[0] == tag), (
            f"</{tag}> closes nothing"
        )

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "style":
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if any(best for _, best in self._open) and data.strip():
            self.marked[-1].append(data)


def read(content: str) -> Html:
    """The page, checked; its links lead somewhere."""
    assert content.startswith("<!DOCTYPE html>")
    page = Html(content)
    assert len(set(page.anchors)) == len(page.anchors) and {*page.links} <= {*page.anchors}
    return page
