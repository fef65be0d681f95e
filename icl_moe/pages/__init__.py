"""Self-contained HTML pages, rendered from templates that escape their content."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from icl_moe.pictures import data_url, jpeg_url, picture_url


def render(template: str, **content: Any) -> str:
    """The page that a template of this folder renders. Texts are escaped; HTML from this package
    must be `markupsafe.Markup`.
    """
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("icl_moe.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = data_url
    environment.filters["jpeg_url"] = jpeg_url
    environment.filters["picture_url"] = picture_url
    return environment
