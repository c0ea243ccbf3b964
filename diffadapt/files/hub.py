"""Files of hub repositories, downloaded or in the hub's cache. The only module that uses the network."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location
from diffadapt.files.file_names import PEFT_CONFIG, PEFT_FILE, USUAL_FILES, choose_name, refuse_outside_name


def cached_folder(repo: str) -> Path | None:
    """Return the folder of a repository in the hub's cache, or `None` if it is not there. Uses no network."""
    try:
        validate_repo_id(repo)
        return Path(snapshot_download(repo, local_files_only=True))
    except (hub_errors.HFValidationError, hub_errors.LocalEntryNotFoundError):
        return None


def file_from_hub(repo: str, location: Location) -> Path:
    """Return the local path of a repository's weight file, downloading it and PEFT's config if necessary.

    Raises:
        AdapterError: the repository or the file does not exist or cannot be reached, or it is not clear which file is
            meant.
    """
    for name in (location.subfolder, location.weight_name):
        refuse_outside_name(repo, name or "")
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError:
        raise AdapterError(f"{repo}: no such file or folder, and not a hub id either") from None
    try:
        return _download(repo, location)
    except hub_errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo, error) from error
    except hub_errors.EntryNotFoundError as error:
        raise AdapterError(f"{repo}: the repository has no file {location.weight_name!r}") from error
    except hub_errors.GatedRepoError as error:
        raise AdapterError(f"{repo}: gated; accept its terms on the hub and pass token=") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise AdapterError(f"{repo}: no such file here and no such repository; private ones need token=") from error
    except hub_errors.RevisionNotFoundError as error:
        raise AdapterError(f"{repo}: no revision {location.revision!r}") from error
    except AdapterError:
        raise
    except Exception as error:  # The HTTP library of huggingface_hub, and so its exceptions, depend on the version.
        raise _unreachable(repo, error) from error


def _download(repo: str, location: Location) -> Path:
    folder = f"{location.subfolder}/" if location.subfolder else ""
    options: dict[str, Any] = {"revision": location.revision, "cache_dir": location.cache_dir}
    fetch: dict[str, Any] = {**options, "token": location.token, "local_files_only": location.local_files_only}
    name = location.weight_name
    if name is None and (location.local_files_only or constants.HF_HUB_OFFLINE):
        cached = (
            usual for usual in USUAL_FILES if isinstance(try_to_load_from_cache(repo, folder + usual, **options), str)
        )
        name = next(cached, None)
        if name is None:
            raise AdapterError(
                f"{repo}: none of {', '.join(USUAL_FILES)} is in the cache and the hub is switched off; "
                "pass weight_name=, or the path of a local file"
            )
    elif name is None:
        listed = list_repo_files(repo, revision=location.revision, token=location.token)
        inside = [file.removeprefix(folder) for file in listed if file.startswith(folder)]
        found = sorted(file for file in inside if file.endswith(".safetensors") and "/" not in file)
        name = choose_name(found, None, repo, found.__contains__)
        if PEFT_CONFIG in inside:
            hf_hub_download(repo, folder + PEFT_CONFIG, **fetch)
    elif name == PEFT_FILE:
        # The alphas are in the config.
        with suppress(hub_errors.EntryNotFoundError):
            hf_hub_download(repo, folder + PEFT_CONFIG, **fetch)
    return Path(hf_hub_download(repo, folder + name, **fetch))


def _unreachable(repo: str, error: BaseException) -> AdapterError:
    return AdapterError(
        f"{repo}: no such file here, and the hub cannot be reached or is switched off ({_first_line(error)}); "
        "download the file once while online, or pass the path of a local file"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
