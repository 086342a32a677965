"""Record of ended episodes on disk, from which an interrupted evaluation continues.

Owns: episodes.jsonl and videos/ while an evaluation runs, the lock that keeps a second process out. Does not know: the report.

    OUTPUT/episodes.jsonl    {"settings": ...}           the first line: all settings that results depend on
                             {"task": ..., "seed": ...}  one line for each episode, synced before the next; its video is written first
    OUTPUT/unfinished-N/     rows and videos of an interrupted evaluation of other settings
It is removed once report.html, summary.json and episodes.json are written.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from pi0fm import files, progress
from pi0fm.eval.report.page import JOURNAL, keep_video, refuse_ended
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult
from pi0fm_client.errors import OutputError


@final
class Journal:
    """Journal of an evaluation, `with Journal(output_dir, settings) as journal: journal.add(result)`; without a result no file is left."""

    def __init__(self, output_dir: Path, settings: Mapping[str, str]) -> None:
        self._folder, self._settings = output_dir, dict(settings)
        self._path = output_dir / JOURNAL
        self._file = -1
        self._rows: dict[tuple[str, int], EpisodeResult] = {}

    def __enter__(self) -> Self:
        """Lock the file and read its rows. Raises OutputError when another process evaluates into the folder, or it cannot be written."""
        files.make_folder(self._folder)
        with files.write_faults(self._folder):
            lock = files.lock_file(self._path)
            if lock is None:
                raise OutputError(f"another process evaluates into {self._folder}; wait for it, or type --output_dir ANOTHER")
            self._file = lock
            self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._rows:
            self.remove()
            with suppress(OSError):
                self._folder.rmdir()  # only if it is empty
        os.close(self._file)

    def finished(self, episodes: Sequence[Episode]) -> dict[tuple[str, int], EpisodeResult]:
        """Return the results of the `episodes` that were run before; a filmed one must have its video."""
        found = [(episode, self._rows[key]) for episode in episodes if (key := (episode.task, episode.seed)) in self._rows]
        return {
            (row.task, row.seed): row
            for episode, row in found
            if not episode.filmed(row.outcome) or (row.video_path and (self._folder / row.video_path).is_file())
        }

    def add(self, result: EpisodeResult) -> EpisodeResult:
        """Write the video, then the row; return the result with its video's path. On an OutputError no part of the row is kept."""
        with files.write_faults(self._folder):
            kept = keep_video(self._folder, result)
            first = [] if self._rows else [{"settings": self._settings}]
            scores = [{name: float(value) for name, value in each.items()} for each in kept.scores]
            self._append(*first, dataclasses.asdict(kept) | {"scores": scores})
        self._rows[result.task, result.seed] = kept
        return kept

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _append(self, *rows: Mapping[str, Any]) -> None:
        end = os.lseek(self._file, 0, os.SEEK_END)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
        os.ftruncate(self._file, len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._refuse_ended()
            return
        if lines[0].get("settings") != self._settings:
            self._set_aside(lines[0].get("settings") or {})
            return
        rows = [EpisodeResult(**{**row, "scores": tuple(row["scores"])}) for row in lines[1:]]
        self._rows = {(row.task, row.seed): row for row in rows}
        progress.say(f"{self._folder} holds {len(self._rows)} episodes of an interrupted evaluation: they are not run again")

    def _refuse_ended(self) -> None:
        """Raise OutputError where another process ended its evaluation here since the folder was checked."""
        try:
            refuse_ended(self._folder)
        except OutputError:
            self.remove()
            os.close(self._file)
            raise

    def _set_aside(self, settings: Mapping[str, str]) -> None:
        """Move rows and videos of an evaluation of other settings to a folder."""
        number = next(number for number in range(1, 10**6) if not (self._folder / f"unfinished-{number}").exists())
        aside = self._folder / f"unfinished-{number}"
        aside.mkdir()
        shutil.copyfile(self._path, aside / JOURNAL)
        with suppress(FileNotFoundError):
            (self._folder / "videos").rename(aside / "videos")
        os.ftruncate(self._file, 0)
        changed = [name for name in {**settings, **self._settings} if settings.get(name) != self._settings.get(name)]
        progress.say(f"the interrupted evaluation in {self._folder} had another {', '.join(changed)}: its rows and videos are in {aside}")
