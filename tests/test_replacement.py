"""Functions of another package with ours in their place: many threads, and the way back."""

from __future__ import annotations

import threading
import time
from types import ModuleType
from typing import Any

import pytest

from fastmerge.integrations.replacement import Replacement


def theirs() -> str:
    return "theirs"


def ours() -> str:
    return "ours"


@pytest.fixture
def package() -> Any:
    made: Any = ModuleType("package")
    made.function = theirs
    return made


def test_a_thread_that_leaves_takes_nothing_from_another(package: Any) -> None:
    replacement = Replacement(lambda: {(package, "function"): ours})
    first, second = replacement.installed(), replacement.installed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert package.function is ours
    replacement.uninstall()  # another one's `install`, which was none
    assert package.function is ours
    second.__exit__(None, None, None)
    assert package.function is theirs


def test_what_was_installed_stays_until_it_is_uninstalled(package: Any) -> None:
    replacement = Replacement(lambda: {(package, "function"): ours})
    with replacement.installed():
        replacement.install()
    assert package.function is ours
    replacement.uninstall()
    assert package.function is theirs
    with replacement.installed():
        assert package.function is ours
    assert package.function is theirs


def test_threads_that_begin_at_once_keep_theirs(package: Any) -> None:
    """Both looked at what stood there before either had exchanged it, and one kept ours."""

    def places() -> Any:
        time.sleep(0.05)  # as an import does
        return {(package, "function"): ours}

    replacement = Replacement(places)
    threads = [threading.Thread(target=replacement.install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*replacement.theirs.values()] == [theirs]
    replacement.uninstall()
    assert package.function is theirs


def test_what_is_called_during_the_exchange_finds_theirs() -> None:
    seen = []

    class Place:
        def __setattr__(self, name: str, value: Any) -> None:
            seen.append(dict(replacement.theirs))
            object.__setattr__(self, name, value)

    place: Any = Place.__new__(Place)
    object.__setattr__(place, "function", theirs)
    replacement = Replacement(lambda: {(place, "function"): ours})
    with replacement.installed():
        pass
    assert seen == [{(place, "function"): theirs}] * 2


def test_a_package_that_is_not_there_leaves_nothing_behind(package: Any) -> None:
    def missing() -> Any:
        raise RuntimeError("not there")

    replacement = Replacement(missing)
    for call in (replacement.install, replacement.installed().__enter__):
        with pytest.raises(RuntimeError):
            call()
    replacement.uninstall()
    assert not replacement.theirs and package.function is theirs
