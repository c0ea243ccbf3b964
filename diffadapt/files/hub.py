"""Repositories of the hub, and its cache."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location
from diffadapt.files.folder import CONFIG_NAME, USUAL_NAMES, choose, refuse_leading_out


def cached_folder(repo: str) -> Path | None:
    """What the hub's cache has of a repository, if anything. Asks no network."""
    try:
        validate_repo_id(repo)
        return Path(snapshot_download(repo, local_files_only=True))
    except (hub_errors.HFValidationError, hub_errors.LocalEntryNotFoundError):
        return None


def from_hub(repo: str, where: Location) -> Path:
    for name in (where.subfolder, where.weight_name):
        refuse_leading_out(repo, name or "")
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError:
        raise AdapterError(f"{repo}: no such file or folder, and not a hub id either") from None
    try:
        return _download(repo, where)
    except hub_errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo, error) from error
    except hub_errors.EntryNotFoundError as error:
        raise AdapterError(f"{repo}: the repository has no file {where.weight_name!r}") from error
    except hub_errors.GatedRepoError as error:
        raise AdapterError(f"{repo}: gated; accept its terms on the hub and pass token=") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise AdapterError(f"{repo}: no such file here and no such repository; private ones need token=") from error
    except hub_errors.RevisionNotFoundError as error:
        raise AdapterError(f"{repo}: no revision {where.revision!r}") from error
    except AdapterError:
        raise
    except Exception as error:  # which ones the network raises depends on the HTTP library of huggingface_hub
        raise _unreachable(repo, error) from error


def _download(repo: str, where: Location) -> Path:
    folder = f"{where.subfolder}/" if where.subfolder else ""
    options: dict[str, Any] = {"revision": where.revision, "cache_dir": where.cache_dir}
    fetch: dict[str, Any] = {**options, "token": where.token, "local_files_only": where.local_files_only}
    name = where.weight_name
    if name is None and (where.local_files_only or constants.HF_HUB_OFFLINE):
        cached = (
            usual for usual in USUAL_NAMES if isinstance(try_to_load_from_cache(repo, folder + usual, **options), str)
        )
        name = next(cached, None)
        if name is None:
            raise AdapterError(
                f"{repo}: none of {', '.join(USUAL_NAMES)} is in the cache and the hub is switched off; "
                "pass weight_name=, or the path of a local file"
            )
    elif name is None:
        listed = list_repo_files(repo, revision=where.revision, token=where.token)
        inside = [file.removeprefix(folder) for file in listed if file.startswith(folder)]
        found = sorted(file for file in inside if file.endswith(".safetensors") and "/" not in file)
        name = choose(found, None, repo, found.__contains__)
        if CONFIG_NAME in inside:
            hf_hub_download(repo, folder + CONFIG_NAME, **fetch)
    return Path(hf_hub_download(repo, folder + name, **fetch))


def _unreachable(repo: str, error: BaseException) -> AdapterError:
    return AdapterError(
        f"{repo}: no such file here, and the hub cannot be reached or is switched off ({_first_line(error)}); "
        "download the file once while online, or pass the path of a local file"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
