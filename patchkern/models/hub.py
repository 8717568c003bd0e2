# SPDX-License-Identifier: Apache-2.0
"""Saved models to a hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from patchkern.models.files import DESCRIPTION
from patchkern.models.folders import current


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model of patchkern",
    **options: Any,
) -> str:
    """Upload what ``save_pretrained`` wrote, and the model card beside it, to a hub's repository.

    Args:
        folder: of a saved model.
        repo_id: such as "org/model"; made if needed.
        private: whether a repository that is made is private; None: as the organisation has it.
        token: of an account that may write there; None: the one that is logged in.
        commit_message: of the commit.
        options: for ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        ConnectionError: no hub can be reached, or it refuses.
    """
    path = Path(current(folder))
    if not (path / DESCRIPTION).is_file():
        raise FileNotFoundError(f"folder: expected a model saved by patchkern, got {os.fspath(folder)!r}")
    api = HfApi(token=token)
    of_training = ["trained_weights.pt", "optimizer.pt", "scheduler.pt", "rng_state*"]
    ignored = ["checkpoint-*/**", ".*", ".*/**", *of_training, "*.part"]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=path, commit_message=commit_message, **{"ignore_patterns": ignored} | options
        )
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected a name such as 'org/model', got {repo_id!r}") from error
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"repo_id: {repo_id!r} could not be written ({type(error).__name__}: {str(error).splitlines()[0]}); is a "
            "hub reachable, and is there a token that may write there?"
        ) from error
    return str(commit.commit_url)
