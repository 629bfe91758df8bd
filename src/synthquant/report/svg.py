"""From the SVG that a drawing library writes to an element of the page: the one door for markup that is no template.

The SVG is read as XML and written anew, so that names, whatever they hold, are text in it and can be nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

from markupsafe import Markup

# What is in <style> would hold for the whole page, which has these rules for its figures itself.
_LEFT_OUT = ("metadata", "style")


def page_element(svg: str, element_id: str, title: str, restyle: Callable[[str], str]) -> Markup:
    """Return an SVG document as an element of a page: with ids of its own, as wide as there is room, with a title.

    Args:
        svg: the document, well-formed.
        element_id: what its ids begin with.
        title: what is read aloud in its place.
        restyle: is given the values of attributes, never texts, and returns what stands there in the page.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in _LEFT_OUT]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(name): _own_ids(_local(name), restyle(value), element_id) for name, value in element.items()
        }
    kept = {name: value for name, value in root.items() if name not in ("width", "height")}
    root.attrib = {"role": "img", "aria-label": title, "xmlns": "http://www.w3.org/2000/svg"} | kept
    # Written as XML: every text and every value is escaped.
    return Markup(ElementTree.tostring(root, encoding="unicode").rstrip())


def _local(name: str) -> str:
    """The name of a tag or an attribute without its namespace."""
    return name.rpartition("}")[2]


def _own_ids(name: str, value: str, element_id: str) -> str:
    if name == "id":
        return f"{element_id}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{element_id}-{value[1:]}"
    return value.replace("url(#", f"url(#{element_id}-")
