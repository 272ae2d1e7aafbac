"""A hook of the documentation's site: formulas become MathML, which browsers draw without a script."""

import re

from latex2mathml.converter import convert

_FENCE = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
_INLINE = re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")


def on_page_markdown(markdown: str, **_) -> str:
    """The page with ```math blocks and $…$ outside of code as MathML."""
    markdown = _FENCE.sub(lambda found: f"<div>{convert(found[1].strip(), display='block')}</div>", markdown)
    parts = _CODE.split(markdown)
    return "".join(
        part if i % 2 else _INLINE.sub(lambda f: f"<span>{convert(f[1])}</span>", part) for i, part in enumerate(parts)
    )
