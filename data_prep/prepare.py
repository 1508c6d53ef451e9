"""Text to a prepared folder: tokenise units, arrange their documents, write shards; each step goes on after a kill."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable
from contextlib import closing

from data_prep import arrange, claim, output, space
from data_prep.bad import JUDGED_FROM, check_damaged, check_share, check_source_field
from data_prep.columns import BYTES_PER_DOCUMENT, Columns, load_columns
from data_prep.errors import InputChangedError, PrepareError
from data_prep.finish import Sums, make_manifest
from data_prep.job import Job
from data_prep.manifest import Manifest
from data_prep.pool import Pool, peak_memory
from data_prep.prefix import Prefix
from data_prep.progress import Progress
from data_prep.settings import token_dtype
from data_prep.shards import PRELOAD, ShardRecord, ShardWriter, find_shard, head_bytes, lies_there
from data_prep.tasks import Tasks, UnitUsers
from data_prep.units import UnitWriter, find_record
from data_prep.work import (
    Place,
    find_place,
    is_work_of,
    keep_tokenizer,
    locked,
    note_shared_memory,
    open_work,
    remove_work,
)
from titans_train import __version__

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space or allow larger files"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Give write permission or name another folder"),
    **dict.fromkeys((errno.ENAMETOOLONG,), "Choose a shorter name"),
}


def prepare(job: Job, say: Callable[[str], None] = print) -> Manifest:
    """Write the output or, where it already holds exactly this, leave it. Return its manifest.

    PrepareError: another content lies there, another process prepares it, the corpus or the disk does not allow it.
    What was done until then stays in the working folder, and the same call goes on from there.
    """
    place = find_place(job.output, job.work)
    try:
        if (manifest := output.existing(place, job.wanted)) is None:
            with locked(place):
                manifest = output.existing(place, job.wanted)  # finished by another process meanwhile?
                if manifest is None:
                    return _Run(job, place, say).run()
        if is_work_of(place, job.wanted):  # the run that finished was killed before it tidied up
            remove_work(place)
    except OSError as error:
        raise PrepareError(_describe(place, error)) from error
    say(f"already prepared: {place.output}")
    return manifest


def _describe(place: Place, error: OSError) -> str:
    where = f"{error.filename}" if error.filename else f"preparing {place.output}"
    kept = f"; what is done is kept in {place.work}" if os.path.isdir(place.work) else ""
    remedy = _REMEDIES.get(error.errno or 0, "Mend that")
    return f"{where}: {error.strerror or error}{kept}. {remedy}, and run the same command again"


class _Run:
    def __init__(self, job: Job, place: Place, say: Callable[[str], None]) -> None:
        self.job, self.place, self._say = job, place, say
        self.start = time.monotonic()
        self.progress = Progress(job.quiet)
        self.pool = Pool(job.worker_count(), self.progress.add, functools.partial(note_shared_memory, place.work))
        self.itemsize = token_dtype(job.tokenizer).itemsize
        self.units = job.units()
        self.writer: UnitWriter
        self.claim: claim.Claim | None = None
        self.none_named_said = False
        self.made: set[int] = set()  # units that this run has tokenised itself

    def run(self) -> Manifest:
        job, place = self.job, self.place
        resumed = open_work(place, job.wanted, job.files, __version__, job.restart)
        self._begin(resumed)
        self.say(f"{'going on in' if resumed else 'working in'} {place.work}, {self.pool.workers} workers")
        try:
            self._check_room()
            prefix = self._tokenise()
            columns, sums = self._arrange(prefix)
            shards = self._write(columns)
            manifest = make_manifest(job, place, self.units, prefix.records, columns, sums, shards)
            output.publish(place, manifest, self.claim)
        except InputChangedError:
            raise
        except PrepareError as error:
            raise PrepareError(
                f"{error}. What is done is kept in {place.work}: the same command goes on from there, --restart begins "
                "anew"
            ) from error
        finally:
            self.progress.end()
        remove_work(place)
        self._say_cost(sums)
        return manifest

    def _begin(self, resumed: bool) -> None:
        """What would make all work useless is looked for before it, and leaves no working folder behind."""
        job, place = self.job, self.place
        try:
            if place.remote:
                self.claim = claim.take(place.remote, place.work, job.restart)
            output.check_replaceable(place)
            if not resumed:
                output.check_remote_empty(place)
            spec = keep_tokenizer(place, job.tokenizer)
        except PrepareError:
            if not resumed:
                remove_work(place)
            raise
        self.writer = UnitWriter(place.units, spec, job.tokenizer.sha256, job.read, job.settings)

    def say(self, text: str) -> None:
        """A note, on a line of its own."""
        self.progress.end()
        self._say(text)

    def _check_room(self) -> None:
        job = self.job
        tokens = space.token_bytes(space.text_bytes(job.files, job.settings.max_bytes), job.tokenizer)
        shards = 0 if self.place.remote else space.shard_bytes(tokens, job.settings.compression)
        has = space.used_bytes(self.place.units), space.used_bytes(self.place.staging)
        space.check_free_space([
            (self.place.work, max(0, tokens - has[0])), (self.place.beside, max(0, shards - has[1])),
        ])  # fmt: skip

    def _tokenise(self) -> Prefix:
        """All units, or the first ones that hold --max-bytes of text."""
        folder = self.place.units
        found = [find_record(folder, unit, self.writer.key) for unit in self.units]
        prefix = Prefix(self.job.settings.max_bytes)
        for record in found:
            if record is not None:
                prefix.add(record)
        left = [] if prefix.full else [unit for unit in self.units if found[unit.number] is None]
        done = len(self.units) - len(left)
        if done:
            self.say(f"{done:,} of {len(self.units):,} units were tokenised before")
        covered = sum(unit.bytes for unit in self.units) - sum(unit.bytes for unit in left)
        self.progress.begin("tokenise", space.text_bytes(self.job.files, self.job.settings.max_bytes), covered)
        with closing(self.pool.run(self.writer, left)) as results:
            for record in results:
                self.made.add(record.number)
                if prefix.add(record):
                    self._check_records(prefix, final=False)
                    prefix.check_sources()
                    self._say_none_named(prefix)
                if prefix.full:
                    break
                if len(self.made) == len(left) // 2:  # so that nobody waits for it later
                    self.pool.warm(PRELOAD)
        self._check_records(prefix, final=True)
        prefix.check_sources()
        check_source_field(prefix, self.job.files, self.job.read.source_field)
        return prefix

    def _check_records(self, prefix: Prefix, final: bool) -> None:
        if not self.job.skip_damaged_files:
            check_damaged(self.place.units, self.units, prefix)
        check_share(self.place.units, self.units, prefix, self.job.max_bad_share, final)

    def _say_none_named(self, prefix: Prefix) -> None:
        """Once, and early: it may be meant, where texts without fields come first."""
        field = self.job.read.source_field
        if field is not None and prefix.none_named and prefix.documents >= JUDGED_FROM and not self.none_named_said:
            self.none_named_said = True
            self.say(f"none of {prefix.documents:,} documents so far names a source in the field {field!r}")

    def _arrange(self, prefix: Prefix) -> tuple[Columns, Sums]:
        """The documents that stay, and what was not kept."""
        job = self.job
        memory = prefix.documents * BYTES_PER_DOCUMENT / 1e6
        self.say(
            f"arranging {prefix.documents:,} documents, {BYTES_PER_DOCUMENT} bytes of memory each: {memory:,.0f} MB"
        )
        columns, hashes = load_columns(self.place.units, self.units, prefix.records, job.files)
        within = arrange.rows_within(columns.text_bytes, job.settings.max_bytes)
        arrange.check_first(columns, within, job.settings.max_bytes)
        last_after = None
        if within < len(columns):
            last_after = within - (len(columns) - prefix.records[-1].document_count)
            columns.keep(slice(within))
        copies = arrange.later_copies(hashes[0][:within], hashes[1][:within])
        del hashes
        sums = Sums(within, int(copies.sum()), last_after, int(columns.text_bytes.sum()))
        if not job.settings.keep_duplicates:
            columns.keep(~copies)
        arrange.check_counts(columns, job.settings, len(job.files))
        return columns, sums

    def _write(self, columns: Columns) -> list[ShardRecord]:
        """Records of all shards, in the order of the plan."""
        job, place = self.job, self.place
        names = [file.name for file in job.files]
        sizes = arrange.sample_bytes(columns, names, self.itemsize)
        limit = job.settings.shard_size - head_bytes(job.settings.compression, job.settings.shard_size)
        plans = list(arrange.plan_shards(columns, arrange.folder_names(columns.source_names), sizes, limit))
        done = self._shards_there(plans)
        left = [plan for plan in plans if plan.name not in done]
        users = UnitUsers(place.units, len(self.units), [columns.unit[plan.rows] for plan in left])
        self._mend_tokens(users)
        self._check_room_for_shards(int(sum(sizes[plan.rows].sum() for plan in left)))
        self.progress.begin("write", int(sum(columns.tokens[plan.rows].sum() for plan in left)) * self.itemsize)
        writer = ShardWriter(
            place.units, place.records, place.staging, self.claim, job.settings.compression,
            job.settings.shard_size, self.itemsize,
        )  # fmt: skip
        units_of = {plan.name: columns.unit[plan.rows] for plan in left}
        with closing(self.pool.run(writer, Tasks(columns, names, left), PRELOAD)) as results:
            for record in results:
                done[record.name] = record
                users.release(units_of.pop(record.name))
        return [done[plan.name] for plan in plans]

    def _shards_there(self, plans: list[arrange.ShardPlan]) -> dict[str, ShardRecord]:
        """Name -> record of the shards that an earlier run wrote, and that are still where it put them."""
        place = self.place
        remote = output.stored_sizes(place.output) if place.remote else None
        found = [record for plan in plans if (record := find_shard(place.records, plan.name)) is not None]
        self.progress.begin("check", sum(record.entry.stored.bytes for record in found))
        done = {}
        for record in found:
            if lies_there(record, place.staging, remote):
                done[record.name] = record
            self.progress.add(record.entry.stored.bytes, 0)
        if done:
            self.say(f"{len(done):,} of {len(plans):,} shards were written before")
        return done

    def _mend_tokens(self, users: UnitUsers) -> None:
        """Tokens that an earlier run left are read against their hash, and made anew where they are not whole."""
        numbers = [number for number in users.used() if number not in self.made]
        self.progress.begin("check", sum(self.units[number].bytes for number in numbers))
        with closing(self.pool.run(self.writer, [self.units[number] for number in numbers])) as results:
            self.made.update(record.number for record in results)

    def _check_room_for_shards(self, raw: int) -> None:
        needed = 0 if self.place.remote else space.shard_bytes(raw, self.job.settings.compression)
        space.check_free_space([(self.place.beside, needed)])

    def _say_cost(self, sums: Sums) -> None:
        seconds, cpu = time.monotonic() - self.start, time.process_time() + sum(self.pool.cpu.values())
        speed = sums.text_bytes / 1e6 / seconds
        peaks = f"main process {peak_memory() / 1e6:,.0f} MB, worker {self.pool.peak_bytes / 1e6:,.0f} MB"
        self.say(
            f"{seconds:,.1f} s, {speed:,.2f} MB of text per second, {cpu:,.1f} s of CPU time; peak memory: {peaks}"
        )
