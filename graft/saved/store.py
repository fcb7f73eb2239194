"""The files of what is saved: `saved/` in the state directory, one for each endpoint and one for each attachment.

    saved/endpoints/NAME       saved/attachments/HASH (of KIND:NAME)
    set-aside/                 what was damaged, or may be somebody else's
    saved.lock                 whoever changes what is saved, or restores it, has this lock

A change writes one file: first beside its place (`prepare_endpoint`, `prepare_attachment`), which is what fails on a
full disk; then the change is made; then the file is renamed. A killed command leaves the old file or the new one.
Where the whole is replaced in three steps, a killed one may leave all of the old in `saved.old`: it counts as saved,
and the next to have the lock puts it back.

The files are root's. One that others can write is not read, and neither is a folder. One that the disk does not give
now, or that a newer Graft has written, stays: an error passes, and the older of two versions takes nothing away.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from graft.errors import KernelError, RefusedError, UsageError
from graft.kernel.atomic_file import PreparedFile, exchange, prepare_file, sync_folder
from graft.kernel.file_lock import locked_file
from graft.kernel.ownership import NotOwnError, problem_of, read_own
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.policy.model import Policy
from graft.saved import envelope
from graft.saved.model import SavedAttachment, SavedState, Target, saved_state
from graft.saved.values import (
    attachment_value,
    endpoint_file_value,
    plain_document,
    read_attachment,
    read_endpoint_file,
)
from graft.saved.whole import PreparedWhole, old_of

T = TypeVar("T")

_LOCK_SECONDS = 60.0
"""How long to wait for other commands: one may be waiting for a container that blocks it, for some seconds."""

_DETACH_ALL_THE_SAME = "graft detach --no-save takes a container's rules away all the same"

ENDPOINTS, ATTACHMENTS = "endpoints", "attachments"


@dataclass(frozen=True, slots=True)
class BadFile:
    """A saved file that cannot be used, and why: one line without the path. ``stays``: it may be used later."""

    path: Path
    reason: str
    stays: bool = False

    @property
    def line(self) -> str:
        """Which it is, and why."""
        return f"{self.path}: {self.reason}"


def file_name(target: Target) -> str:
    """The name of an attachment's file: a path of a cgroup is longer than a file's name may be."""
    return sha256(target.text.encode(errors="surrogateescape")).hexdigest()[:32]


class Store:
    """What is saved under one state directory. Reading needs no lock: each file is replaced in one step."""

    def __init__(self, settings: Settings) -> None:
        self._state_dir = settings.state_dir
        self._lock = settings.state_dir / "saved.lock"
        self.folder = settings.state_dir / "saved"
        self._paused = settings.run_dir / "paused"

    @property
    def exists(self) -> bool:
        """Whether anything was ever saved, and not forgotten since."""
        return self._in_place.exists()

    @property
    def _in_place(self) -> Path:
        """The folder with what is saved: the old one, where a command that was killed has put none in its place."""
        old = old_of(self.folder)
        return old if old.exists() and not self.folder.exists() else self.folder

    @property
    def has_lock(self) -> bool:
        """Whether anybody has the lock, ever had it, or may take it: to restore what is saved."""
        return self._lock.exists() or self.exists

    @contextlib.contextmanager
    def locked(self, saves: bool = True) -> Iterator[None]:
        """Hold the lock on what is saved, until the block ends or the process dies. What a killed command has begun to
        replace is as it was by then. Raises KernelError.

        Without ``saves`` the block only has to read it: the state directory may be read-only. A disk that fails is
        made so, and is to keep no container from the policy that can be read there.
        """
        with contextlib.ExitStack() as stack:
            try:
                self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(locked_file(self._lock, _LOCK_SECONDS, reads=not saves))
                self._finish_exchange(saves)
            except OSError as error:
                raise (_unsaved if saves else _unreadable)(self._state_dir, error) from error
            yield

    def _finish_exchange(self, saves: bool) -> None:
        """Finish what a killed command began (graft.kernel.atomic_file.exchange): before anybody makes a folder anew in
        the place of what is saved. Who does not save reads it where it is (`_in_place`).
        """
        old = old_of(self.folder)
        if not old.exists():
            return
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            return
        try:
            old.rename(self.folder)
        except OSError as error:
            if saves or error.errno != errno.EROFS:
                raise

    # ---- reading --------------------------------------------------------------------------------

    def read(self) -> tuple[SavedState, list[BadFile]]:
        """All that is saved and can be read, and what cannot. Raises RefusedError if others can write the folder, and
        KernelError if it cannot be listed.
        """
        bad: list[BadFile] = []
        endpoints = [one for _, one in self._each(ENDPOINTS, _endpoint_of, bad)]
        attachments = [one for _, one in self._each(ATTACHMENTS, _attachment_of, bad)]
        return saved_state(endpoints, attachments), bad

    def attachment(self, target: Target) -> SavedAttachment | None:
        """That of one container; None if none is saved. Raises KernelError where it cannot be read."""
        path = self._in_place / ATTACHMENTS / file_name(target)
        try:
            return _attachment_of(path)
        except FileNotFoundError:
            return None
        except (OSError, UsageError) as error:
            raise KernelError(_bad_file(path, error).line, "graft up") from error

    def has_endpoint(self, name: str) -> bool:
        """Whether an endpoint is saved. One that cannot be read counts: it may be read later, and come back. Raises
        what `read` raises.
        """
        return name in {path.name for path in self._listed(ENDPOINTS)}  # not by a path: it may be written as one

    def _each(self, kind: str, read: Callable[[Path], T], bad: list[BadFile]) -> Iterator[tuple[Path, T]]:
        for path in self._listed(kind):
            try:
                yield path, read(path)
            except FileNotFoundError:  # removed just now
                continue
            except (OSError, UsageError) as error:
                bad.append(_bad_file(path, error))

    def _listed(self, kind: str) -> list[Path]:
        whole = self._in_place
        folder = whole / kind
        try:
            if not folder.exists():
                return []
            _check_folder(self._state_dir, follow=True)  # an operator may have it elsewhere
            for checked in (whole, folder):
                _check_folder(checked)
            return sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # of killed commands
        except OSError as error:
            raise _unreadable(folder, error) from error

    # ---- changes, under the lock ----------------------------------------------------------------

    def prepare_endpoint(self, endpoint: Endpoint) -> PreparedFile:
        """The file of an endpoint, not yet in its place. Raises KernelError."""
        return self._prepare(self.folder / ENDPOINTS / endpoint.name, envelope.encode(endpoint_file_value(endpoint)))

    def prepare_attachment(self, saved: SavedAttachment) -> PreparedFile:
        """The same of an attachment."""
        path = self.folder / ATTACHMENTS / file_name(saved.target)
        return self._prepare(path, envelope.encode(attachment_value(saved)))

    def _prepare(self, path: Path, data: bytes) -> PreparedFile:
        try:
            _check_folder(self._state_dir, follow=True)
            _make_folders(self.folder)
            return prepare_file(path, data, durable=True)
        except OSError as error:
            raise _unsaved(path, error) from error

    def remove_endpoint(self, name: str) -> None:
        """Forget an endpoint. Safe to repeat. Raises KernelError."""
        _remove(self.folder / ENDPOINTS / name)

    def remove_attachment(self, target: Target) -> None:
        """Forget an attachment. Safe to repeat. Raises KernelError."""
        _remove(self.folder / ATTACHMENTS / file_name(target))

    def tidy(self) -> None:
        """Remove what killed commands left."""
        for path in (*self.folder.glob("*/.*"), self._beside):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def set_aside(self, bad: BadFile) -> str:
        """Move a file away that cannot be used. Returns the line that says so."""
        where = self._state_dir / "set-aside"
        try:
            where.mkdir(mode=0o700, exist_ok=True)
            name = f"{bad.path.parent.name}-{bad.path.name}"
            free = next(path for n in range(1, 1 << 20) if not (path := where / f"{name}.{n}").exists())
            bad.path.rename(free)
        except OSError as error:
            return f"{bad.line}; not restored, and cannot be set aside: {error.strerror}"
        return f"{bad.line}; set aside as {free}"

    # ---- the whole ------------------------------------------------------------------------------

    @property
    def _beside(self) -> Path:
        return self.folder.with_name("saved.new")

    def prepare_all(self, state: SavedState) -> PreparedWhole:
        """Write all of ``state`` beside what is saved, not yet in its place. Raises KernelError."""
        new = self._beside
        try:
            for left in (new, old_of(self._paused)):  # by a command that was killed
                shutil.rmtree(left, ignore_errors=True)
            _make_folders(new)
            _make_folders(self.folder)
            for endpoint in state.endpoints:
                data = envelope.encode(endpoint_file_value(endpoint))
                prepare_file(new / ENDPOINTS / endpoint.name, data, durable=True).commit()
            for one in state.attachments:
                data = envelope.encode(attachment_value(one))
                prepare_file(new / ATTACHMENTS / file_name(one.target), data, durable=True).commit()
            return PreparedWhole(new, self.folder, self._paused, new.stat().st_ino)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise _unsaved(new, error) from error

    def put_in_place(self, prepared: PreparedWhole) -> None:
        """`PreparedWhole.commit`. Raises KernelError."""
        try:
            prepared.commit()
        except OSError as error:
            raise _unsaved(self.folder, error) from error

    def forget_all(self) -> None:
        """Remove all that is saved."""
        with self.locked():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.tidy()
            sync_folder(self._state_dir)

    # ---- what is saved, and for now not wanted, or not wanted so --------------------------------
    #
    # Noted in run_dir, which a boot empties and `graft down` removes. A data plane that is lost does not end it.

    def pause(self, kind: str, name: str) -> None:
        """Do not restore it in this boot: it was taken away for now only (`--no-save`). Raises KernelError."""
        path = self._paused / f"{kind}-{name}"
        try:
            self._paused.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as error:
            raise KernelError(f"cannot write {path}: {error.strerror}; it may be restored in this boot") from error

    def resume(self, kind: str, name: str) -> None:
        """Take `pause` back. Safe to repeat."""
        (self._paused / f"{kind}-{name}").unlink(missing_ok=True)

    def is_paused(self, kind: str, name: str) -> bool:
        """Whether it is not to be restored."""
        return (self._paused / f"{kind}-{name}").exists()

    def prepare_for_now(self, saved: SavedAttachment, policy: Policy) -> PreparedFile:
        """The note that a saved container has this policy in this boot (`--no-save`), not yet in its place: it
        would come out of a narrower one by ending and starting again. Raises KernelError.
        """
        path = self._for_now(saved.target)
        try:
            for folder in (self._paused, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return prepare_file(path, envelope.encode(attachment_value(replace(saved, policy=policy))))
        except OSError as error:
            raise KernelError(f"cannot write {path}: {error.strerror}; nothing was changed") from error

    @contextlib.contextmanager
    def for_now_changed(self, saved: SavedAttachment, policy: Policy) -> Iterator[None]:
        """Have that policy in the note, if there is one, before the block puts it in force: wherever that is ended, the
        container does not start again by the one that it had for now. Where the block fails the note is as it was.
        """
        if not self.has_for_now(saved.target):
            yield
            return
        prepared = self.prepare_for_now(saved, policy)
        try:
            exchange(prepared.temporary, prepared.path)
        except OSError as error:
            prepared.discard()
            raise KernelError(f"cannot write {prepared.path}: {error.strerror}; nothing was changed") from error
        try:
            yield
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # an import has put it away, and said so
                exchange(prepared.temporary, prepared.path)
            raise
        finally:
            prepared.discard()

    def wanted(self, saved: SavedAttachment) -> SavedAttachment:
        """An attachment as it is to be restored now: with the policy that it has for now, if any.

        Raises KernelError where that cannot be read: the saved one may be wider.
        """
        path = self._for_now(saved.target)
        try:
            return replace(saved, policy=_attachment_of(path).policy)
        except FileNotFoundError:
            return saved
        except (OSError, UsageError) as error:
            raise KernelError(f"cannot read {path}: {error}", "graft policy apply gives it a policy") from error

    def has_for_now(self, target: Target) -> bool:
        """Whether there is such a note."""
        return self._for_now(target).exists()

    def drop_for_now(self, target: Target) -> None:
        """Take `prepare_for_now` back. Safe to repeat. Raises KernelError."""
        try:
            self._for_now(target).unlink(missing_ok=True)
        except OSError as error:
            raise KernelError(f"cannot remove {self._for_now(target)}: {error.strerror}") from error

    def _for_now(self, target: Target) -> Path:
        return self._paused / "policies" / file_name(target)

    def resume_all(self) -> None:
        """Take all of that back."""
        for path in (self._paused, old_of(self._paused)):
            shutil.rmtree(path, ignore_errors=True)


def _make_folders(folder: Path) -> None:
    for one in (folder, folder / ENDPOINTS, folder / ATTACHMENTS):
        if not one.exists():
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(one.parent)
        _check_folder(one)


def _check_folder(path: Path, follow: bool = False) -> None:
    """Raises RefusedError if another user than root and the caller can write there."""
    if problem := problem_of(path.stat() if follow else path.lstat()):
        raise RefusedError(
            f"{path}: {problem}; nothing that is saved was read or written",
            f"chmod go-w {path}; {_DETACH_ALL_THE_SAME}",
        )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        if path.parent.exists():
            sync_folder(path.parent)
    except OSError as error:
        message = f"cannot remove {path}: {error.strerror}; what was removed comes back with the next `graft up`"
        raise KernelError(message) from error


def _unsaved(path: Path, error: OSError) -> KernelError:
    reason = error.strerror or str(error)
    return KernelError(f"cannot save to {path}: {reason}; nothing was changed", "--no-save changes it for this boot")


def _unreadable(folder: Path, error: OSError) -> KernelError:
    reason = error.strerror or str(error)
    return KernelError(f"cannot read {folder}: {reason}; nothing was changed", _DETACH_ALL_THE_SAME)


def _read(path: Path) -> bytes:
    """The bytes of a saved file. Raises OSError, and UsageError for one that root alone did not write."""
    try:
        return read_own(path, envelope.MAX_BYTES + 1)
    except NotOwnError as error:
        raise UsageError(f"{path.name}: {error}") from error


def _bad_file(path: Path, error: OSError | UsageError) -> BadFile:
    if isinstance(error, OSError):
        return BadFile(path, f"cannot be read: {error.strerror}", stays=True)
    return BadFile(path, error.message.removeprefix(f"{path.name}: "), isinstance(error, envelope.NewerError))


def _endpoint_of(path: Path) -> Endpoint:
    document = plain_document(envelope.decode(_read(path), path.name))
    found = read_endpoint_file(document)
    if found is None:
        raise UsageError(f"{path.name}: {document.problems[0].field}: {document.problems[0].message}")
    if found.name != path.name:
        raise UsageError(f"{path.name}: it is that of another endpoint, {found.name}")
    return found


def _attachment_of(path: Path) -> SavedAttachment:
    document = plain_document(envelope.decode(_read(path), path.name))
    found = read_attachment(document)
    if found is None:
        raise UsageError(f"{path.name}: {document.problems[0].field}: {document.problems[0].message}")
    if file_name(found.target) != path.name:
        raise UsageError(f"{path.name}: it is that of another container, {found.target.text}")
    return found
