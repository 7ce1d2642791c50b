"""A finished export is uploaded to the Hugging Face hub, or to the server that HF_ENDPOINT names.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`); no message shows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featcache.errors import UsageError, UserError, command_line, one_line

MESSAGE = "Upload by student export"
_TEXT = 160  # characters of the server's own words that are shown


def check(repo: str) -> None:
    """Raise before any work is done: UsageError for what is no name of a repository, UserError
    where no upload can work, offline or without a token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"--push {one_line(repo)[:120]!r} is no repository of the hub; NAME or OWNER/NAME of "
            "letters, digits, -, _ and . is needed"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push: HF_HUB_OFFLINE is set, and nothing can be uploaded; unset it, or leave --push "
            "out"
        )
    if not get_token():
        raise UserError(
            "--push needs a token of the hub that may write, and none is found; set HF_TOKEN or "
            "run `hf auth login`, or leave --push out"
        )


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload the files of a folder in one commit and return the address. A new repository is
    private unless `public`; one that exists keeps what it is and its other files. Raises UserError,
    and the folder stays."""
    from huggingface_hub import HfApi

    with _errors(folder, repo, public), _no_bars():
        api = HfApi()
        made = api.create_repo(repo, private=not public, exist_ok=True)
        found: str = made.repo_id  # with its owner
        api.upload_folder(repo_id=found, folder_path=folder, commit_message=MESSAGE)
        return f"{_without_user(str(api.endpoint))}/{found}"


def _without_user(address: str) -> str:
    """Return an address without the name and password that may stand before its host."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def _errors(folder: Path, repo: str, public: bool) -> Iterator[None]:
    """Raise whatever stops an upload as one line. The client's kinds of errors changed with the
    library below it; the common ones are OSErrors and its HTTPError."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        private = () if public else ("--private",)  # hf itself makes public ones
        again = command_line("hf", "upload", repo, str(folder), ".", *private)
        raise UserError(
            f"--push {repo}: {_why(error)}; the export is complete and stays at {str(folder)!r}: "
            f"`{again}` sends it later"
        ) from error


def _why(error: Exception) -> str:
    chain = [error]  # the client hides some behind others
    while isinstance(cause := chain[-1].__cause__, Exception):
        chain.append(cause)
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
    status = next((each for each in statuses if each is not None), None)
    known = {
        401: "the hub does not accept the token",
        403: "the token may not write there",
        404: "the hub has no such owner or repository for this token",
    }
    if status in known:
        return f"{known[status]} (status {status}); one that may write is needed"
    if status is not None:
        return f"the hub answers with status {status}"
    return f"the hub cannot be reached, or its answer not be read ({_without_token(chain[-1])})"


def _without_token(error: Exception) -> str:
    from huggingface_hub import get_token

    text, token = one_line(str(error)) or type(error).__name__, get_token()
    return (text.replace(token, "TOKEN") if token else text)[:_TEXT]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing its own progress bars."""
    from huggingface_hub import utils

    shown: Any = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
