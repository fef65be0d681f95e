"""The versions of installed packages, for the record of what was computed with them."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Python's version and that of each package; None if a package has no metadata, as in a bundle
    or a checkout that was not installed.
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
