"""setuptools' build backend, asking for torch only where there is none to build against.

Under pip's build isolation ``sysconfig`` still describes the environment that is installed into,
so its torch serves: the build needs headers and libraries, which torch's stable ABI keeps valid
for every later release, and never imports it.
"""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change
from torch_location import find_torch


def _torch_requirement() -> list[str]:
    return [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
