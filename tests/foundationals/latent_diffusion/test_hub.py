"""Repositories of the hub: their files come from the cache, the hub is asked only once, and need not answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_specimens import small_folder, small_model
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from refiners.foundationals.latent_diffusion import StableDiffusion_1


@pytest.fixture(scope="module")
def model() -> StableDiffusion_1:
    return small_model()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("saved") / "sd")


def cached_repository(folder: Path, cache: Path) -> None:
    """The files of a folder as the hub's client keeps those of someone/small."""
    repository, commit = cache / "models--someone--small", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder.resolve(), target_is_directory=True)


def hub_that(answer: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Any]:
    """A hub that answers for each repository's commit, or raises; and what it was asked."""
    asked: list[Any] = []

    def model_info(_: Any, repository: str, revision: str | None = None, timeout: float | None = None) -> Any:
        asked.append((repository, revision))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return asked


@pytest.mark.parametrize("is_reached", [True, False])
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_repository_of_the_hub_is_read_from_the_cache_and_the_hub_asked_once(
    is_reached: bool,
    revision: str | None,
    saved: Path,
    model: StableDiffusion_1,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import hf_hub_download

    def download(repository: str, name: str, revision: str | None, local_files_only: bool) -> str:
        assert (revision, local_files_only) == (("c" * 40, False) if is_reached else (given, True))
        if not (saved / name).is_file():
            raise EntryNotFoundError(name)
        return hf_hub_download(repository, name, revision=revision, local_files_only=True)

    given = revision
    cached_repository(saved, tmp_path)
    answer = SimpleNamespace(sha="c" * 40) if is_reached else ConnectionError("offline")
    asked = hub_that(answer, monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    read = StableDiffusion_1.from_pretrained("someone/small", revision=revision).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    assert asked == [("someone/small", revision)]


def test_a_repository_that_was_never_fetched_is_refused_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_that(ConnectionError("offline"), monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"someone/else: not in the hub's cache, .* cannot be reached"):
        StableDiffusion_1.from_pretrained("someone/else")


def test_a_hub_that_falls_silent_is_an_error_and_no_file_is_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("silent")

    hub_that(SimpleNamespace(sha="c" * 40), monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="could not be fetched, as the hub does not answer"):
        StableDiffusion_1.from_pretrained("someone/small")
