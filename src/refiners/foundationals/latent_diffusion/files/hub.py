"""Files of a repository on the Hugging Face hub: fetched once, and then found in the hub's cache, online or not."""

from pathlib import Path
from typing import cast

from refiners.foundationals.latent_diffusion.files.diffusers_folder import Fetch

_TIMEOUT_S = 10
_BUSY, _FIRST_SERVER_ERROR = 429, 500  # HTTP's; the files of the cache do not need the hub to answer


def fetch_from_hub(repository: str, revision: str | None = None) -> Fetch:
    """What gives the files of one commit of a repository: that of `revision` now, or else the one in the cache.

    The hub is asked for the commit, once. Asked for each file without one, its client would wait half a minute for each
    if it is offline. Raises FileNotFoundError if there is no such repository or revision, or none that may be read.
    """
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]  # its tqdm is bare
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    commit = _commit_of(repository, revision)

    def fetch(name: str) -> Path | None:
        try:
            found = hf_hub_download(repository, name, revision=commit or revision, local_files_only=commit is None)
            return Path(found)
        except LocalEntryNotFoundError as error:
            if commit:
                raise FileNotFoundError(
                    f"{repository}: {name} could not be fetched, as the hub does not answer any more; try again"
                ) from error
            if name == "unet/config.json":
                raise FileNotFoundError(
                    f"{repository}: not in the hub's cache, and the hub cannot be reached; connect once, or give the "
                    "path of a folder or file"
                ) from error
            return None
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise _refused(repository, error) from error

    return fetch


def _commit_of(repository: str, revision: str | None) -> str | None:
    """The commit that a revision stands for, None if the hub cannot be asked. Raises FileNotFoundError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # the errors of whatever the client speaks HTTP with, which is not the same in all its versions
    no_answer = (OSError, *cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__))
    try:
        return HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha
    except HfHubHTTPError as error:
        if error.response.status_code == _BUSY or error.response.status_code >= _FIRST_SERVER_ERROR:
            return None
        raise _refused(repository, error) from error
    except no_answer:
        return None


def _refused(repository: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{repository}: the hub has no such repository or revision that you may read ({error}); check the name, and "
        "log in if it is private"
    )
