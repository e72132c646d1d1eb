"""The build backend of pyproject.toml: setuptools, but for editable installations only.

The project runs from its checkout, which holds records, texts and caches; a wheel with modules called `data`
or `settings` in site-packages would be no use. So `pip install -e .` works, and `pip install .` is refused
before anything is downloaded.
"""

from typing import NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,  # noqa: F401  pip calls them
    prepare_metadata_for_build_editable,
)


def refuse(*arguments, **options) -> NoReturn:
    """Refuse to build a wheel: the project runs from its checkout."""
    raise SystemExit("error: speedrun runs from its checkout: clone it and type `pip install -e .` there")


build_wheel = build_sdist = prepare_metadata_for_build_wheel = refuse
