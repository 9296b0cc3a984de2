"""What other users put in a merge's way, in a parent folder that they may write to."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fastmerge import api
from fastmerge.cli.files import write_result
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.journal import check_own
from fastmerge.output import publish
from fastmerge.output.journal import boot_id
from fastmerge.output.writer import ModelWriter
from tests.test_writer import fill, interrupted, layout, settle, siblings, tree, write_model

MALLORY, ALICE = 54321, 54322
_STICKY, _OPEN = 0o1777, 0o777
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")


def as_user(uid: int, work: Callable[[], object]) -> None:
    """Runs ``work`` in a process of that user; its failure is the test's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(params=[_STICKY, _OPEN], ids=["sticky", "open"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that every user may write to."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as two users")
    folder = Path(tempfile.mkdtemp(prefix="fastmerge-shared-"))
    folder.chmod(request.param)
    yield folder
    shutil.rmtree(folder)


def refusal(target: Path, **options: object) -> str:
    with pytest.raises(FastmergeError) as caught:
        ModelWriter(target, layout(), **{"key": "k", **options})
    assert str(caught.value).isprintable()
    return str(caught.value)


def forge(target: Path, of: Path) -> None:
    """A whole unfinished merge of the same job, with what Mallory likes for weights."""
    with suppress(KeyboardInterrupt), ModelWriter(of, layout(), key="k") as writer:
        fill(writer, writer.pending())
        settle(writer, len(writer.layout.slots))
        raise KeyboardInterrupt
    for kind in ("partial", "journal"):
        of.with_name(f".{of.name}.fastmerge-{kind}").rename(
            target.with_name(f".{target.name}.fastmerge-{kind}")
        )


# --- another user ---


def test_another_users_unfinished_merge_is_not_published(shared: Path) -> None:
    target = shared / "out"
    as_user(MALLORY, lambda: forge(target, shared / "mine"))
    before = siblings(target)
    for options in ({}, {"fresh": True}, {"overwrite": True}):
        assert f"another user's (uid {MALLORY})" in refusal(target, **options)
    as_user(ALICE, lambda: refusal(target))
    assert siblings(target) == before


def test_another_users_partial_folder_is_neither_used_nor_deleted(shared: Path) -> None:
    target = shared / "out"
    partial = shared / ".out.fastmerge-partial"
    as_user(MALLORY, lambda: (partial.mkdir(), (partial / "thesis").write_text("x")))

    def alice() -> None:
        for fresh in (False, True):
            assert f"another user's (uid {MALLORY})" in refusal(target, fresh=fresh)

    alice()
    as_user(ALICE, alice)
    assert (partial / "thesis").read_text() == "x"
    assert siblings(target) == [partial.name]


def test_another_users_links_are_not_followed(shared: Path) -> None:
    """The journal's name leads to a file of the victim's, the folder's to one of its folders."""
    home = Path(tempfile.mkdtemp(prefix="fastmerge-home-"))
    try:
        home.chmod(0o755)
        os.chown(home, ALICE, ALICE)
        as_user(ALICE, lambda: (home / "bashrc").write_text("precious"))
        for kind, leads_to in (("journal", home / "bashrc"), ("partial", home), ("old", home)):
            planted = shared / f".out.fastmerge-{kind}"
            as_user(MALLORY, lambda to=leads_to, link=planted: link.symlink_to(to))  # type: ignore[misc]

            def alice(link: Path = planted) -> None:
                assert str(link) in refusal(shared / "out")

            alice()
            as_user(ALICE, alice)
            assert planted.is_symlink()
            planted.unlink()
            assert siblings(shared / "out") == []
        assert (home / "bashrc").read_text() == "precious"
        assert [path.name for path in home.iterdir()] == ["bashrc"]
    finally:
        shutil.rmtree(home)


def test_another_users_old_model_does_not_become_the_output(shared: Path) -> None:
    as_user(MALLORY, lambda: write_model(shared / ".out.fastmerge-old"))
    for user in (os.geteuid(), ALICE):
        as_user(user, lambda: "not known to be the model" in refusal(shared / "out") or 1 / 0)
    assert siblings(shared / "out") == [".out.fastmerge-old"]


def test_a_merge_in_a_shared_folder_is_private_until_it_is_whole(shared: Path) -> None:
    target = shared / "out"

    def alice() -> None:
        for kind in ("partial", "journal"):
            mode = os.stat(shared / f".out.fastmerge-{kind}").st_mode
            assert not mode & (stat.S_IRWXG | stat.S_IRWXO)
        os.umask(0o027)
        with ModelWriter(target, layout(), key="k") as writer:
            assert len(writer.resumed) >= 20
            fill(writer, writer.pending())
            writer.finish({"config.json": b"{}"})

    def mallory() -> None:
        with pytest.raises(PermissionError):
            os.listdir(shared / ".out.fastmerge-partial")

    as_user(ALICE, lambda: (os.umask(0), interrupted(target, 40)))
    as_user(MALLORY, mallory)
    as_user(ALICE, alice)
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert siblings(target) == ["out"]


def test_a_folder_exchanged_while_it_is_written(shared: Path) -> None:
    """Where Mallory may rename what is Alice's: nothing of hers is written to, or lost in it."""
    if shared.stat().st_mode & stat.S_ISVTX:
        pytest.skip("a sticky folder lets nobody rename another's")
    partial, aside = shared / ".out.fastmerge-partial", shared / "aside"
    write_model(shared / "precious")
    whole = tree(shared / "precious")

    def mallory() -> None:
        partial.rename(aside)
        (shared / "precious").rename(partial)

    def attacked() -> None:
        with ModelWriter(shared / "out", layout(), key="other") as writer:
            fill(writer, writer.pending()[:20])
            as_user(MALLORY, mallory)
            fill(writer, writer.pending()[20:])
            writer.finish({"config.json": b"stranger"})

    with pytest.raises(FastmergeError, match="somebody exchanged the folder"):
        attacked()
    assert tree(shared / "out") == whole
    assert (aside / "config.json").read_bytes() == b"stranger"


# --- one user, what an archive or a slip puts there ---


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "fifo", "folder"])
def test_a_planted_journal(tmp_path: Path, kind: str) -> None:
    journal, precious = tmp_path / ".out.fastmerge-journal", tmp_path / "bashrc"
    precious.write_text("precious")
    if kind == "link":
        journal.symlink_to(precious)
    elif kind == "dangling":
        journal.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        journal.hardlink_to(precious)
    elif kind == "fifo":
        os.mkfifo(journal)
    else:
        journal.mkdir()
    before = siblings(journal)
    for options in ({}, {"fresh": True}):
        assert str(journal) in refusal(tmp_path / "out", **options)
    assert precious.read_text() == "precious"
    assert siblings(journal) == before


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_a_shard_of_an_unfinished_merge_that_is_none(tmp_path: Path, kind: str) -> None:
    interrupted(tmp_path / "out", 60)
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 1_000_000)
    shard = tmp_path / ".out.fastmerge-partial" / layout().shards[0].name
    shard.unlink()
    if kind == "link":
        shard.symlink_to(precious)
    elif kind == "hard link":
        shard.hardlink_to(precious)
    else:
        os.mkfifo(shard)
    assert str(shard) in refusal(tmp_path / "out")
    assert precious.read_bytes() == b"x" * 1_000_000
    with ModelWriter(tmp_path / "out", layout(), key="k", fresh=True) as writer:
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})
    assert precious.read_bytes() == b"x" * 1_000_000
    write_model(tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["partial", "journal"])
def test_an_unfinished_merge_that_others_could_write_to(tmp_path: Path, what: str) -> None:
    interrupted(tmp_path / "out", 40)
    place = tmp_path / f".out.fastmerge-{what}"
    place.chmod(place.stat().st_mode | stat.S_IWGRP)
    before = siblings(tmp_path / "out")
    assert "other users could write to" in refusal(tmp_path / "out")
    assert siblings(tmp_path / "out") == before
    write_model(tmp_path / "out", fresh=True)
    assert siblings(tmp_path / "out") == ["out"]


def test_a_run_of_the_mode_that_earlier_versions_gave_goes_on(tmp_path: Path) -> None:
    kept = interrupted(tmp_path / "out", 40)
    (tmp_path / ".out.fastmerge-partial").chmod(0o755)
    (tmp_path / ".out.fastmerge-journal").chmod(0o644)
    with ModelWriter(tmp_path / "out", layout(), key="k") as writer:
        assert sorted(writer.resumed) == kept


def test_an_unpacked_unfinished_merge_counts_for_nothing(tmp_path: Path) -> None:
    """Whoever packs one knows neither this boot nor the numbers that its folder will get."""
    partial, journal = tmp_path / ".out.fastmerge-partial", tmp_path / ".out.fastmerge-journal"
    interrupted(tmp_path / "out", 40)
    shutil.copytree(partial, tmp_path / "copy")
    shutil.rmtree(partial)
    (tmp_path / "copy").rename(partial)
    lines = journal.read_text().splitlines()
    assert json.loads(lines[0])["boot"] == boot_id()
    with ModelWriter(tmp_path / "out", layout(), key="k") as writer:
        assert not writer.resumed
    assert siblings(tmp_path / "out") == []


def test_an_unpacked_old_model_does_not_become_the_output(tmp_path: Path) -> None:
    write_model(tmp_path / ".out.fastmerge-old")
    assert "not known to be the model that a merge moved aside" in refusal(tmp_path / "out")
    assert siblings(tmp_path / "out") == [".out.fastmerge-old"]


def test_the_output_has_the_mode_of_any_new_folder(tmp_path: Path) -> None:
    for umask in (0o022, 0o027, 0o002):
        before = os.umask(umask)
        try:
            write_model(tmp_path / f"{umask}")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}").stat().st_mode) == 0o777 & ~umask


def test_a_planted_journal_is_one_line_on_the_whole_way(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    bashrc = tmp_path / "bashrc"
    bashrc.write_text("precious")
    (tmp_path / ".out.fastmerge-journal").symlink_to(bashrc)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(base)}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(FastmergeError, match=r"a link \(.*where a merge keeps its own work"):
        api.merge(recipe, tmp_path / "out")
    assert bashrc.read_text() == "precious"


# --- a link at the output itself ---


def linked(place: Path, to: Path, *, by: int, owner: int, group: int, mode: int) -> Path:
    """A folder with a link in it, each with the owner that it is to have."""
    place.mkdir()
    os.chown(place, owner, group)
    place.chmod(mode)
    (place / "o").symlink_to(to)
    os.lchown(place / "o", by, by)
    return place / "o"


@root
@pytest.mark.parametrize("there", [True, False], ids=["model", "dangling"])
@pytest.mark.parametrize(
    ("by", "owner", "group", "mode"),
    [
        (MALLORY, 0, MALLORY, 0o775),  # theirs, where they may write
        (MALLORY, MALLORY, 0, 0o755),  # and where all is theirs
        (MALLORY, 0, 0, 0o755),
        (MALLORY, 0, 0, _STICKY),
        (0, 0, MALLORY, 0o775),  # ours, which they may exchange for theirs
        (0, MALLORY, 0, 0o755),
        (0, MALLORY, 0, _STICKY),
        (0, 0, 0, _OPEN),
    ],
)
def test_a_link_of_others_is_no_output(
    tmp_path: Path, by: int, owner: int, group: int, mode: int, there: bool
) -> None:
    """It chose which model --overwrite replaced, and where a new one landed."""
    precious = tmp_path / "precious"
    if there:
        write_model(precious)
    whole = tree(precious) if there else None
    link = linked(tmp_path / "sg", precious, by=by, owner=owner, group=group, mode=mode)
    said = refusal(link, overwrite=True)
    assert f"{link}: a link ({precious}) " in said
    assert ("another user's" if by else "others may exchange") in said
    assert str(link) in refusal(tmp_path / "sg" / "." / "o", overwrite=True)
    (tmp_path / "mine").symlink_to(link)  # a link of ours to it is no other
    assert str(link) in refusal(tmp_path / "mine", overwrite=True)
    for call in (check_own, write_result_of):
        with pytest.raises(FastmergeError, match=re.escape(f"{link}: a link")):
            call(link)
    assert (tree(precious) if there else None) == whole and precious.exists() == there
    assert siblings(precious) == (["mine", "precious", "sg"] if there else ["mine", "sg"])


def write_result_of(place: Path) -> None:
    write_result(place, b"x")


@pytest.mark.parametrize("mode", [0o755, 0o700, _STICKY, 0o775])
def test_a_link_of_ours_in_a_folder_of_ours_is_followed(tmp_path: Path, mode: int) -> None:
    """To a big disk, say. With umask 002 a folder is writable by the group of one's own name."""
    us = pwd.getpwuid(os.geteuid())
    if mode == 0o775 and grp.getgrgid(us.pw_gid).gr_name != us.pw_name:
        pytest.skip("no group of our own")
    link = tmp_path / "links" / "o"
    link.parent.mkdir()
    link.parent.chmod(mode)
    link.symlink_to("../disk")
    write_model(link)
    assert link.is_symlink()
    whole = tree(tmp_path / "disk")
    write_model(link, overwrite=True)
    check_own(link)
    assert tree(tmp_path / "disk") == whole and link.is_symlink()


@pytest.mark.parametrize("change", ["members", "name", "first group"])
def test_a_group_is_ours_alone_if_nobody_else_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    us, found = pwd.getpwuid(os.geteuid()), list(grp.getgrgid(os.getegid()))
    found[0], members = us.pw_name, [us.pw_name]
    users = [us]
    if change == "members":
        members.append("mallory")
    elif change == "name":
        found[0] = "team"
    else:
        users.append(pwd.struct_passwd(["mallory", "x", MALLORY, us.pw_gid, "", "/", "/bin/sh"]))
    group = grp.struct_group([found[0], "x", us.pw_gid, members])
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    tmp_path.chmod(0o775)
    (tmp_path / "o").symlink_to("disk")
    assert "others may exchange" in refusal(tmp_path / "o")


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_partial_folder_that_others_may_write_to_is_not_taken(tmp_path: Path, mode: int) -> None:
    """Without a journal too: what they had put there was deleted unsaid."""
    partial = tmp_path / ".out.fastmerge-partial"
    partial.mkdir()
    partial.chmod(mode)
    (partial / "thesis").write_text("x")
    assert f"{partial}: an unfinished merge that other users could write to" in (
        refusal(tmp_path / "out")
    )
    assert (partial / "thesis").read_text() == "x" and siblings(tmp_path / "out") == [partial.name]
    write_model(tmp_path / "out", fresh=True)
    assert siblings(tmp_path / "out") == ["out"]


@pytest.mark.parametrize("named", [True, False])
def test_what_has_the_old_model_s_place_after_a_kill_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Where others may write, they give what they like the name of the model that was replaced."""
    target, partial = tmp_path / "out", tmp_path / ".out.fastmerge-partial"
    write_model(target)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "remove_tree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with suppress(KeyboardInterrupt):
            write_model(target, overwrite=True)
    assert partial.is_dir()
    if named:
        (partial / "thesis").touch()
        write_model(target, overwrite=True)
        assert siblings(target) == ["out"]
        return
    partial.rename(tmp_path / "aside")
    partial.mkdir(mode=0o700)
    (partial / "thesis").write_text("x")
    for options in ({}, {"fresh": True}, {"overwrite": True}):
        assert "not known to be the model that a merge replaced" in refusal(target, **options)
    assert (partial / "thesis").read_text() == "x"
