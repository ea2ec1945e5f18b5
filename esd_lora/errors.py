"""Everything that can go wrong, as a tree. A message is one or a few lines: what is wrong, where, what would be right.

EsdLoraError              exit code 1: a failure
├── TrainingError         the run itself broke (a loss that is not a number)
├── HubError              the Hub did not answer, broke off, or sent something else than it promised
└── UserError             exit code 2: something that the user can put right
    ├── RecipeError       a recipe, or an option that overrides it
    ├── BaseModelError    the base model: not found, not a pipeline, a device or precision that is not there
    ├── PatchError        a patch file, or a patch that does not fit its base
    ├── RepositoryError   what a repository on the Hub does not have, or does not allow
    └── OutputError       a folder or file that cannot be written
"""

from __future__ import annotations

import errno

DISK = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EROFS)
"""By which the system says that a place cannot be written to."""


class EsdLoraError(Exception):
    """Root of the package's exceptions; `exit_code` is what the command line returns."""

    exit_code = 1


class TrainingError(EsdLoraError):
    """A training run that cannot go on."""


class HubError(EsdLoraError):
    """The Hub, or the way to it, that failed."""


class UserError(EsdLoraError):
    """A mistake of the user's, with its remedy in the message."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that does not say what to do."""


class BaseModelError(UserError):
    """A base model that cannot be loaded or adapted."""


class PatchError(UserError):
    """A patch file that is broken, or does not fit."""


class RepositoryError(UserError):
    """A repository on the Hub that is not there, or may not be read or written."""


class OutputError(UserError):
    """A place that cannot be written to."""


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a file could not be read as text."""
    return getattr(error, "strerror", None) or "not a text file"


def unwritable(error: Exception) -> str:
    """What an error of a download says where it is the disk that refuses; empty where it is not."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return ""
    return f"cannot write to {error.filename or 'the cache of the Hub'}: {error.strerror}"
