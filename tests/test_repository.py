"""Git facts come from the checkout that holds the code, whatever the environment says; without one they are
unknown."""

import os
import shutil
import subprocess

import pytest

from common import repository
from evidence import arms
from common.errors import UserError

IDENTITY = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"
}


def new_repository(folder, text="1\n"):
    """Hash of the only commit of a new repository that holds code.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(text)
    for words in (["init", "--quiet"], ["add", "code.py"], ["commit", "--quiet", "--message", "x"]):
        repository.git(*words, cwd=folder, env=IDENTITY)
    return repository.line("rev-parse", "HEAD", cwd=folder)


@pytest.fixture
def project(tmp_path):
    return tmp_path / "project", new_repository(tmp_path / "project")


def test_a_clean_and_an_edited_checkout(project):
    folder, commit = project
    assert repository.code_version(folder) == commit
    (folder / "code.py").write_text("2\n")
    assert repository.code_version(folder) == commit + "-dirty"


@pytest.mark.parametrize(
    "name",
    [
        "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CEILING_DIRECTORIES",
        "GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_CONFIG"
    ],
)
def test_what_the_environment_says_of_another_repository_is_not_heard(project, tmp_path, monkeypatch, name):
    folder, commit = project
    new_repository(tmp_path / "other", "another\n")
    monkeypatch.setenv(
        name, str(tmp_path / "other" / {"GIT_DIR": ".git", "GIT_INDEX_FILE": ".git/index"}.get(name, ""))
    )
    assert (
        repository.code_version(folder) == commit
        and arms.git("rev-parse", "HEAD", cwd=folder).decode().strip() == commit
    )


def test_configuration_in_the_environment_is_not_heard(project, tmp_path, monkeypatch):
    folder, commit = project
    settings = {"core.worktree": str(tmp_path), "status.showUntrackedFiles": "no", "core.excludesFile": "x"}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for i, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    monkeypatch.setenv("GIT_CONFIG_PARAMETERS", "'core.bare'='true'")
    assert repository.code_version(folder) == commit


def test_a_copy_inside_another_repository_is_unknown(project, tmp_path):
    folder, _ = project
    outer = tmp_path / "outer"
    new_repository(outer)
    shutil.copytree(folder, outer / "project", ignore=shutil.ignore_patterns(".git"))
    assert repository.code_version(outer / "project") == "unknown" and not repository.is_project(
        outer / "project"
    )
    repository.git("add", "project", cwd=outer)  # also where that repository holds its files
    repository.git("commit", "--quiet", "--message", "y", cwd=outer, env=IDENTITY)
    assert repository.code_version(outer / "project") == "unknown"


def test_no_repository_no_commit_and_a_broken_index_are_unknown(project, tmp_path):
    assert repository.code_version(tmp_path) == "unknown"
    (tmp_path / "empty").mkdir()
    repository.git("init", "--quiet", cwd=tmp_path / "empty")
    assert repository.code_version(tmp_path / "empty") == "unknown"
    folder, _ = project
    (folder / ".git/index").write_bytes(b"torn")  # its status cannot be read: that is not the same as clean
    assert repository.code_version(folder) == "unknown"


def test_a_checkout_of_another_user_is_read_and_no_hook_or_monitor_runs(project, tmp_path, monkeypatch):
    """As in a container whose user is not the owner of the mounted checkout."""
    folder, commit = project
    monkeypatch.setattr(
        repository, "OPTIONS", tuple(x.replace(str(repository.ROOT), str(folder)) for x in repository.OPTIONS)
    )
    witness = tmp_path / "ran"
    monitor = folder / "monitor"
    monitor.write_text(f"#!/bin/sh\ntouch {witness}\n")
    monitor.chmod(0o755)
    repository.git("config", "core.fsmonitor", str(monitor), cwd=folder)
    if os.geteuid() == 0:
        for path in [folder, *folder.glob("**/*")]:
            os.chown(path, 12345, 12345)
    assert repository.code_version(folder) == commit and not witness.exists()


def test_without_git_code_is_unknown_and_arms_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository.code_version() == "unknown"
    with pytest.raises(UserError, match="git cannot be run"):
        arms.git("rev-parse", "HEAD")


def test_a_git_that_hangs_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="no answer within 0.2 s"):
        repository.git("status", timeout=0.2)


def test_this_checkout_tells_its_commit_from_any_folder(tmp_path, monkeypatch):
    if not repository.is_project():
        pytest.skip("this is no git checkout")
    monkeypatch.chdir(tmp_path)
    plain = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository.ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert repository.code_version().removesuffix("-dirty") == plain
