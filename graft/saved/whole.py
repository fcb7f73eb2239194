"""All that is saved, replaced in one step by what was written beside it.

    prepared = store.prepare_all(state)     # what fails on a full disk
    prepared.commit()                       # until `finish`, `undo` takes it back
    prepared.finish()

The notes of what is for now (`--no-save`) end with it: else they would be restored in the place of what is saved.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from graft.kernel.atomic_file import exchange, sync_folder


@dataclass(frozen=True, slots=True)
class PreparedWhole:
    """What is to be at ``folder``, written ``beside`` it; and the ``notes`` of what is for now.

    ``number`` is the inode of the new folder: which of the two is in its place, the file system says.
    """

    beside: Path
    folder: Path
    notes: Path
    number: int

    def commit(self) -> None:
        """Put it in its place, and the notes away. Where that fails (OSError) or is ended, all is as it was, unless
        `undo` fails too.
        """
        try:
            exchange(self.beside, self.folder)
            self._put_notes_away()
            sync_folder(self.folder.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # it is told when it is called again
                self.undo()
            raise

    def undo(self) -> None:
        """Have in its place what was saved before, and remove the new. Safe to repeat. Raises OSError."""
        if old_of(self.notes).exists():
            old_of(self.notes).rename(self.notes)
        old = old_of(self.folder)
        if self.folder.exists() and self.folder.stat().st_ino == self.number:
            if old.exists():  # of three steps (graft.kernel.atomic_file.exchange) two were made
                self.folder.rename(self.beside)
            else:
                exchange(self.beside, self.folder)
        if old.exists() and not self.folder.exists():
            old.rename(self.folder)
        shutil.rmtree(self.beside, ignore_errors=True)

    def finish(self) -> None:
        """Remove what was saved before."""
        shutil.rmtree(self.beside, ignore_errors=True)

    def _put_notes_away(self) -> None:
        """In one step: a command that is killed leaves all of them, or none."""
        with contextlib.suppress(FileNotFoundError):
            self.notes.rename(old_of(self.notes))


def old_of(folder: Path) -> Path:
    """Where a folder is while another one is put in its place."""
    return folder.with_name(f"{folder.name}.old")
