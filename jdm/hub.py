"""Addresses of models on the Hugging Face Hub, and files fetched from a repository and sent to one.

    hf://owner/name             the newest commit of the branch main
    hf://owner/name@revision    a branch, a tag or a commit

Owns what these addresses mean and what can go wrong on the way, each in one sentence. The work is
that of the package huggingface_hub (the extra `hub`), with its own settings: $HF_ENDPOINT is the
server, $HF_TOKEN or `hf auth login` the token, $HF_HOME the cache, which also answers where the
server cannot be reached. Only files that the caller names are fetched. Does not know what they
hold.
"""

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jdm.errors import Failure, InvalidValue
from jdm.files import location

MAIN = "main"  # the branch of an address that names no revision
LIBRARY = "jdm"  # by which a repository says what can load it
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ADDRESS = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)


class Address(NamedTuple):
    """repository: "owner/name". revision: a branch, a tag or a commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hf://{self.repository}" + f"@{self.revision}" * (self.revision != MAIN)


def address(parameter: str, path: str | os.PathLike) -> Address | None:
    """The address that a user's text stands for; None where it does not begin with hf:/.

    Raises InvalidValue, about the parameter, where it names no repository.
    """
    given = os.fspath(path)
    if not (scheme := re.match(r"hf:/+", given, re.IGNORECASE)):  # pathlib makes one slash of two
        return None
    if not (found := _ADDRESS.fullmatch(given[scheme.end() :])):
        allowed = "is not the address of a model: hf://owner/name or hf://owner/name@revision"
        raise InvalidValue(parameter, given, allowed)
    return Address(found[1], found[2] or MAIN)


def model_path(parameter: str, path: str | os.PathLike) -> str:
    """The path of a model as `jdm.load` takes it: an address as it is, or see `files.location`.

    Raises InvalidValue, about the parameter, for any other URL and a path that cannot be one.
    """
    if address(parameter, path):
        return re.sub(r"^hf:/+", "hf://", os.fspath(path), flags=re.IGNORECASE)
    return location(parameter, path)


def fetch(parameter: str, at: Address, names: Sequence[str], check: Callable[[Path], Any]) -> Path:
    """The folder of the cache that holds these files of a repository, all of one commit.

    check: called with the first file before the others are fetched; raises where they are not
    wanted.

    Raises InvalidValue, about the parameter, where the repository, the revision or one of the files
    does not exist or may not be read; Failure where the server cannot be reached and the cache does
    not have the files, and without huggingface_hub.
    """
    download = _import("huggingface_hub").hf_hub_download
    first, revision = None, at.revision
    with _one_sentence(parameter, at, names[0]):
        cached = not _answers(at, names[0])
    for name in names:
        options = dict(revision=revision, library_name=LIBRARY, local_files_only=cached)
        with _one_sentence(parameter, at, name):
            file = Path(download(at.repository, name, **options))
        if first is None:
            first, revision = file, file.parent.name  # the commit, by which the others are found
            check(file)
    assert first is not None
    return first.parent


def _answers(at: Address, name: str) -> bool:
    """Whether the server can be asked for a file. The library would find out as well, but only
    after half a minute of trying again.

    Raises an error of the library where the server answers that the file is not to be had.
    """
    hub, errors = _import("huggingface_hub"), _import("huggingface_hub.errors")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(at.repository, name, revision=at.revision))
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
    except (errors.HTTPError, ConnectionError):  # the second where HF_HUB_OFFLINE is set
        pass
    else:
        return True
    return False


def check_token(parameter: str, at: Address) -> None:
    """Raises InvalidValue where there is no token to send files with."""
    if _import("huggingface_hub").get_token() is None:
        hint = "run `hf auth login`, or set HF_TOKEN to a token that may write"
        raise InvalidValue(parameter, str(at), "cannot be written to without a token", hint)


def push(parameter: str, at: Address, files: Mapping[str, bytes], private: bool, why: str) -> str:
    """Sends files to a repository in one commit, and returns the address of the commit.

    The repository is made where it does not exist. private: whether only its owner sees it.
    why: the message of the commit.

    Raises InvalidValue, about the parameter, where the repository may not be written, is public in
    spite of `private`, or holds something else than a model of jdm; Failure where the server cannot
    be reached or refuses.
    """
    hub = _import("huggingface_hub")
    api, errors = hub.HfApi(library_name=LIBRARY), _import("huggingface_hub.errors")
    with _one_sentence(parameter, at):
        try:
            held = api.model_info(at.repository)
        except errors.RepositoryNotFoundError:
            api.create_repo(at.repository, private=private)
        else:
            _check_held(parameter, at, held, private)
        operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        sent = api.create_commit(
            at.repository, operations, commit_message=why, revision=at.revision
        )
    return f"hf://{at.repository}@{sent.oid}"


def _check_held(parameter: str, at: Address, held: Any, private: bool) -> None:
    """Raises InvalidValue where a repository that exists is not one to push to; see `push`."""
    if private and not held.private:
        allowed = "is a public repository, and stays public"
        raise InvalidValue(parameter, str(at), allowed, "make it private on its page first")
    others = {file.rfilename for file in held.siblings or ()} - {".gitattributes", "README.md"}
    if others and held.library_name != LIBRARY:
        allowed = f"is not a model of jdm: it holds {min(others)}"
        raise InvalidValue(parameter, str(at), allowed, "choose a new name")


@contextlib.contextmanager
def _one_sentence(parameter: str, at: Address, file: str = "") -> Iterator[None]:
    """The errors of huggingface_hub as errors of jdm."""
    errors = _import("huggingface_hub.errors")
    try:
        yield
    except InvalidValue:
        raise
    except errors.GatedRepoError:
        hint = "accept them there, and log in with `hf auth login` or HF_TOKEN"
        _refuse(parameter, at, "has conditions that must be accepted on its page first", hint)
    except errors.RepositoryNotFoundError:
        token = _import("huggingface_hub").get_token()
        hint = "this token may not read it" if token else "log in with `hf auth login` or HF_TOKEN"
        _refuse(parameter, at, "does not exist, or is private", f"if it is private, {hint}")
    except errors.RevisionNotFoundError:
        _refuse(parameter, at, f"has no branch, tag or commit {at.revision!r}")
    except errors.LocalEntryNotFoundError as error:
        strange = isinstance(error.__cause__, errors.FileMetadataError)
        why = f"{_server()} does not answer as a hub of models" if strange else _unreachable()
        raise Failure(f"{at} is not in the cache, and {why}") from error
    except errors.EntryNotFoundError:
        _refuse(parameter, at, f"is not a model of jdm: it has no {file}")
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            _refuse(parameter, at, f"may not be used with this token (HTTP status {status})")
        raise Failure(f"{_server()} could not answer for {at}: {_cause(error)}") from error
    except (errors.HTTPError, ConnectionError) as error:
        raise Failure(f"{at}: {_unreachable()} ({_cause(error)})") from error
    except ValueError as error:  # a name or a card that the library or the server refuses
        _refuse(parameter, at, f"is refused: {_cause(error)}")
    except RuntimeError as error:  # a part of the weights that did not arrive
        raise Failure(f"nothing was sent to {at}: {_cause(error.__cause__ or error)}") from error


def _refuse(parameter: str, at: Address, allowed: str, hint: str = "") -> NoReturn:
    raise InvalidValue(parameter, str(at), allowed, hint) from None


def _server() -> str:
    return _import("huggingface_hub").constants.ENDPOINT


def _unreachable() -> str:
    if _import("huggingface_hub").constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{_server()} cannot be reached"


def _cause(error: BaseException) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _import(name: str) -> Any:
    """A module of the extra "hub". Raises Failure where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise Failure(f"hf:// needs {package}: pip install 'jdm[hub]'") from error
