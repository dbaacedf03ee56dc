"""Tests of bgjobs, in the order of its sections.

Real SQLite files, threads and processes; only the clock is ever faked.
"""
import ast
import asyncio
import atexit
import base64
import builtins
import collections
import concurrent.futures
import contextlib
import contextvars
import csv
import datetime
import decimal
import dis
import errno
import fractions
import functools
import gc
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import urllib.request
import uuid
import zoneinfo

import pytest

import bgjobs

HERE = pathlib.Path(__file__).resolve().parent


# ---- helpers -------------------------------------------------------------------------------------------------
# A job function or a helper that few sections use stands above the first class that uses it.

def wait_for(condition, seconds=10.0):
    """Wait until condition() is true and return what it gave; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)
    return value


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "jobs.db")


@pytest.fixture
def make(path):
    """Make runners that are closed at the end of the test."""
    runners = []

    def make(at=path, **options):
        runner = bgjobs.Runner(at, **options)
        runners.append(runner)
        return runner
    yield make
    gates.clear()
    for gate in list(gates_made):
        gate.set()
    gates_made.clear()
    for runner in runners:
        runner.close(timeout=2)


@pytest.fixture
def runner(make):
    return make(max_workers=4)


@pytest.fixture
def idle(make):
    """A runner that runs nothing by itself."""
    return make(start=False)


def rows(runner, sql, *parameters):
    with contextlib.closing(sqlite3.connect(runner.path)) as db:
        return db.execute(sql, parameters).fetchall()


def execute(runner, sql, *parameters):
    """Change the file as another program may."""
    with contextlib.closing(sqlite3.connect(runner.path)) as db:
        db.execute(sql, parameters)
        db.commit()


# The inside of bgjobs, which tests reach through these helpers only.

def runner_id(runner):
    return runner.core.id


def runner_of(job):
    return job._backend.face


def store_of(runner):
    return runner.core.store


def written(runner, run):
    """Call run(transaction) in a write of the runner's store, and return what it returned."""
    return store_of(runner).write(run)


def waiting_writes(runner):
    """Return how many writes are on their way into the file."""
    return len(store_of(runner)._waiting)


def statements(runner, run):
    """Return how many statements such a write executes."""
    calls = itertools.count()
    store_of(runner)._writer.set_trace_callback(lambda sql: next(calls))
    written(runner, run)
    store_of(runner)._writer.set_trace_callback(None)
    return next(calls)


def synchronous(runner):
    """Return how SQLite is told to flush what the runner writes."""
    return store_of(runner)._writer.execute("PRAGMA synchronous").fetchone()[0]


def counted(runner, **filters):
    """Return the number of jobs by status."""
    return bgjobs.count_jobs(store_of(runner), filters)[0]


def submission(runner, function, **options):
    """Return what a runner would write for such a submit."""
    return bgjobs.new_submission(runner.core, function, options)


def operate(runner, operation, job_id):
    return runner.core.operate(operation, job_id, None)


def claim(tx, runner, count, ahead=0, workers=None, run_times=None):
    """Claim up to `count` jobs, and up to `ahead` more of short ones, as a runner does."""
    run_times = runner.core.run_times if run_times is None else run_times
    room = bgjobs.Room(count, count, ahead, 0.0, workers or count)
    return bgjobs.claim(tx, runner_id(runner), room, run_times)


def claimed(runner, count):
    """Claim jobs, run nothing, and return their attempts."""
    claims = written(runner, lambda tx: claim(tx, runner, count))
    return [bgjobs.Attempt(runner.core, *each) for each in claims.jobs]


def ended(runner, *attempts):
    """Record the outcomes of attempts."""
    written(runner, lambda tx: tx.finish(list(attempts)))


def take_back(runner):
    """Take back what a runner has claimed, as if its process had died."""
    written(runner, lambda tx: bgjobs.recover(tx, runner_id(runner)))


def look_for_the_dead(runner):
    """Take back what runners whose processes have died had claimed."""
    runner.core.life.recover_dead()


def attempts_of(runner):
    """Return the attempts that a runner has, by job id."""
    return runner.core.dispatch.attempts


def abandoned(runner):
    """Return the number of threads that a force stop has left behind."""
    return len(runner.core.dispatch.pool.abandoned)


def places(runner):
    """Return how many slots are taken by normal and by low priority."""
    return tuple(map(len, runner.core.dispatch.pool._placed))


def has_place_in(pool, attempt):
    return any(attempt in placed for placed in pool._placed)


def free_places(runner):
    return runner.core.dispatch.pool.room(runner.core.run_times).free


def unwritten(runner):
    """Return the log lines and the starts of attempts that the next write takes along."""
    return runner.core.lines


def handles_of(runner):
    return runner.core.handles


def watched(runner):
    """Return the jobs whose end a handle of this runner waits for."""
    return handles_of(runner).watched


def hurry(runner):
    """Have all duties of the service thread done at its next round."""
    done_at = runner.core.service._done_at
    done_at.update(dict.fromkeys(done_at, -1e9))


def consistent(runner):
    """Check what must be true of a file at any time.

    Counts and virtual times agree with the jobs, each running job has an owner, and no job is
    lost between the indexes.
    """
    with contextlib.closing(sqlite3.connect(runner.path)) as db:
        db.row_factory = sqlite3.Row
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        db.execute("BEGIN")
        jobs = {row["id"]: row for row in db.execute("SELECT * FROM bgjobs_jobs")}
        owners = {row["id"] for row in db.execute("SELECT id FROM bgjobs_runners")}
    below_of, children_of = {i: [] for i in jobs}, {i: [] for i in jobs}
    for job in jobs.values():
        for ancestor in lineage(jobs, job):
            below_of[ancestor].append(job)
        if job["parent_id"] is not None:
            children_of[job["parent_id"]].append(job)
    for job in jobs.values():
        below, direct = below_of[job["id"]], children_of[job["id"]]
        over = [j for j in below if j["status"] in bgjobs.OVER]
        assert job["total"] == len(below)
        assert job["done"] == len(over)
        assert job["failed"] == sum(j["status"] == "failed" for j in below)
        assert job["running"] == sum(j["status"] in bgjobs.ACTIVE for j in below)
        assert job["open"] == sum(j["status"] not in bgjobs.OVER for j in direct)
        parts = sum(1.0 if j["status"] in bgjobs.OVER else j["progress"] or 0.0 for j in below)
        assert job["tree_progress"] == pytest.approx(parts, abs=1e-6)
        if job["queue"] is not None:
            assert job["status"] == "pending" and job["queue"] == job["low_priority"]
        if job["parked"] is not None:
            assert job["status"] == "pending" and job["queue"] is None
        if job["status"] == "pending":
            assert (job["queue"], job["parked"], job["run_at"]) != (None, None, None)
        executes = job["status"] in bgjobs.ACTIVE and not job["returned"]
        assert (job["owner"] is not None) == executes
        assert job["owner"] in (None, *owners)
        assert job["owner"] is not None or not job["charge"]
        if job["parent_id"] is None:
            charges = sum(j["charge"] for j in (job, *below))
            assert job["vtime"] >= charges, "the charges of a tree are part of its virtual time"
            ready = [j["queue"] for j in (job, *below) if j["queue"] is not None]
            assert job["lane"] == min(ready, default=None)
        else:
            assert job["lane"] is None
        if job["status"] == "finished":
            assert job["open"] == 0


def lineage(jobs, job):
    while job["parent_id"] is not None:
        yield job["parent_id"]
        job = jobs[job["parent_id"]]


# ---- the functions that jobs run ------------------------------------------------------------------------------

gates = {}                 # name -> event that jobs wait for
gates_made = []
seen = []                  # what jobs did, in order


def gate(name):
    if name not in gates:
        gates[name] = threading.Event()
        gates_made.append(gates[name])
    return gates[name]


def add(a, b=0):
    return a + b


def echo(value):
    return value


def note(value):
    seen.append(value)


def hold(name):
    seen.append(name)
    assert gate(name).wait(20)


def fail(text="boom"):
    raise ValueError(text)


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self, now=1_000_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def nap(seconds):
    time.sleep(seconds)


def children(count, function="add", *arguments):
    return [bgjobs.submit(globals()[function], *(arguments or (i, i))).id for i in range(count)]


# ---- 1 Words and rules -----------------------------------------------------------------------------------------

def job_in(idle, status):
    """Submit a job and write a status into the file."""
    job = idle.submit(add, 1)
    with contextlib.closing(sqlite3.connect(idle.path)) as db:
        db.execute("""UPDATE bgjobs_jobs SET status = :status,
                      queue = CASE WHEN :status = 'pending' THEN 0 END,
                      lane = CASE WHEN :status = 'pending' THEN 0 END,
                      owner = CASE WHEN :status IN ('running', 'stopping') THEN :owner END
                      WHERE id = :id""", {"status": status, "id": job.id, "owner": runner_id(idle)})
        db.commit()
    return job


class TestTransitions:
    def test_every_status_has_a_row_of_answers(self):
        for name, operation in bgjobs.OPERATIONS.items():
            assert {*operation.moves, *operation.moves.values()} <= set(bgjobs.STATUSES), name
            assert set(operation.once_returned) <= set(operation.moves), name

    @pytest.mark.parametrize("operation", bgjobs.OPERATIONS)
    @pytest.mark.parametrize("status", bgjobs.STATUSES)
    def test_the_store_does_what_the_table_says(self, idle, status, operation):
        job = job_in(idle, status)
        expected = bgjobs.OPERATIONS[operation].moves.get(status)
        if expected is None:
            with pytest.raises(bgjobs.InvalidOperation, match=f"job {job.id} is {status}; it can"):
                operate(idle, operation, job.id)
            assert job.status == status
        else:
            operate(idle, operation, job.id)
            assert job.status == expected
        consistent(idle)

    def test_http_has_every_operation(self, idle):
        visitor = Visitor(idle.serve(port=0))
        for name, operation in bgjobs.OPERATIONS.items():
            status, expected = next(iter(operation.moves.items()))
            job = job_in(idle, status)
            assert visitor.post(f"api/jobs/{name}", {"ids": [job.id]})["done"] == [job.id]
            assert job.status == expected

    def test_a_parent_that_has_returned_stops_at_once_and_waits_again_when_resumed(self, runner):
        parent = runner.submit(parent_of_deaf, False)
        wait_for(lambda: parent.phase == "waiting for children" and parent.children["running"])
        for operation, before in (("stop", "running"), ("resume", "stopped")):
            assert parent.status == before
            getattr(parent, operation)()
            assert parent.status == bgjobs.OPERATIONS[operation].once_returned[before]
        gate("deaf").set()
        assert parent.result(10) is None and parent.attempt == 1

    def test_a_refusal_names_the_job_its_status_and_what_it_allows(self, idle):
        job = idle.submit(add, 1)
        assert idle.drain() == 1
        with pytest.raises(bgjobs.InvalidOperation) as refused:
            job.stop()
        assert str(refused.value) == f"job {job.id} is finished; it can be restarted, not stopped"

    def test_only_stop_repeats_silently(self, idle):
        job = idle.submit(add, 1)
        assert job.stop() is job and job.stop().status == "stopped"
        job.cancel()
        assert job.cancel() is True
        with pytest.raises(bgjobs.InvalidOperation, match="is cancelled; it cannot be resumed"):
            job.resume()

    def test_operations_are_those_that_are_not_refused(self, idle):
        job = idle.submit(add, 1)
        assert job.operations == ["stop", "cancel", "set_low_priority", "remove_low_priority"]
        job.stop()
        assert job.operations == ["resume", "cancel", "set_low_priority", "remove_low_priority"]

    def test_system_jobs_refuse_stop_and_restartable_false_refuses_restart(self, idle):
        system = idle.options(system=True).submit(add, 1)
        once = idle.options(restartable=False).submit(add, 1)
        with pytest.raises(bgjobs.InvalidOperation, match="it is a system job"):
            system.stop()
        idle.drain()
        with pytest.raises(bgjobs.InvalidOperation, match="restartable=False"):
            once.restart()


# ---- 2 Values --------------------------------------------------------------------------------------------------

UTC = datetime.timezone.utc


def minutes(text, zone):
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


STORED = [
    None, True, 0, -1, 1.5, 10**100, "", "text", "\ud800 lone", "\x00nul", [], [1, [2, {}]], {}, {"a": {"b": [None]}},
    {"$date": "2026-01-31"}, {"$": 1, "b": 2}, {"$dict": []}, {"$unknown": 1},
    datetime.datetime(2026, 1, 31, 12, 30, 1, 5), datetime.datetime(2026, 1, 31, tzinfo=UTC),
    datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-1, seconds=1, microseconds=2))),
    datetime.time(1, 2, tzinfo=zoneinfo.ZoneInfo("Asia/Tokyo"), fold=1),
    datetime.date(2026, 1, 31), datetime.time(23, 59, 59, 1), datetime.time(1, 2, tzinfo=UTC),
    datetime.timedelta(days=-3, microseconds=7), decimal.Decimal("1.10"), decimal.Decimal("NaN"),
    uuid.UUID("12345678123456781234567812345678"), b"", b"\x00\xff", set(), {1, "a", None}, pathlib.Path("/tmp/x"),
]


def nested_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class SilentKey:
    def __repr__(self):
        raise RuntimeError


class NoModule:
    __module__ = None


class NoZone(datetime.tzinfo):
    def __repr__(self):
        raise RuntimeError

    def utcoffset(self, at):
        return datetime.timedelta(0)


REFUSED = [
    (float("nan"), "not JSON compliant"), (float("inf"), "not JSON compliant"), ({1: 2}, "the key 1 is no string"),
    ({(1, 2): 3}, "is no string"), (object(), "is of type object"), (lambda: 0, "is of type function"),
    (10**5000, "digits"), ("x" * 300_000, "more than the 262,144 allowed"), (nested_list(100_000), "recursion depth"),
    ({(1, 2)}, "a set of tuples"), ({frozenset()}, "frozenset"), (1 + 2j, "complex"), (range(3), "range"),
    ({SilentKey()}, "SilentKey"), ({SilentKey(): 1}, "SilentKey"), (NoModule(), "is of type NoModule"),
    (datetime.datetime(2026, 1, 1, tzinfo=NoZone()), "NoZone"), (pathlib.PureWindowsPath("C:/x"), "is of type PureWindowsPath"),
    (pathlib.PurePosixPath("/x"), "is of type PurePosixPath"),
]


class TestValues:
    @pytest.mark.parametrize("value", STORED, ids=lambda v: ascii(v)[:40])
    def test_what_can_be_stored_comes_back_as_it_was(self, value):
        back = bgjobs.decode(bgjobs.encode(value))
        assert type(back) is type(value)
        if isinstance(value, decimal.Decimal) and value.is_nan():
            assert back.is_nan()
        else:
            assert back == value
        if isinstance(value, datetime.datetime):
            assert (back.tzinfo, back.fold, back.tzname()) == (value.tzinfo, value.fold, value.tzname())

    @pytest.mark.parametrize("text,value", [
        ('{"$datetime":["2026-01-31T12:30:00",0,null]}', datetime.datetime(2026, 1, 31, 12, 30)),
        ('{"$datetime":["2026-01-31T12:30:00",0,0.0]}', datetime.datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ('{"$datetime":["2026-01-01T00:00:00",0,[3600.0,"CET"]]}',
         datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))),
        ('{"$datetime":["2026-10-25T02:30:00",1,"Europe/Berlin"]}',
         datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1)),
        ('{"$time":["01:02:00",0,-1800.0]}', datetime.time(1, 2, tzinfo=datetime.timezone(-datetime.timedelta(minutes=30)))),
        ('{"$uuid":"12345678123456781234567812345678"}', uuid.UUID("12345678123456781234567812345678"))])
    def test_what_version_1_0_0_stored_is_still_read(self, text, value):
        back = bgjobs.decode(text)
        assert back == value and repr(back) == repr(value)

    def test_tuples_come_back_as_lists(self):
        assert bgjobs.decode(bgjobs.encode({"a": (1, (2, 3))})) == {"a": [1, [2, 3]]}

    @pytest.mark.parametrize("value,reason", REFUSED, ids=[reason for _, reason in REFUSED])
    def test_what_cannot_be_stored_is_refused_at_submit_with_the_reason(self, idle, value, reason):
        with pytest.raises(TypeError, match="the arguments of .*echo cannot be stored: .*" + reason):
            idle.submit(echo, value)
        with pytest.raises(TypeError, match=reason):
            idle.submit(echo, value=[value])
        assert idle.jobs() == []

    def test_subclasses_are_refused_not_changed_silently(self):
        class Text(str):
            pass
        with pytest.raises(TypeError, match="Text"):
            bgjobs.encode(Text("a"))

    def test_an_object_whose_repr_raises_is_refused_all_the_same(self):
        class Silent:
            def __repr__(self):
                raise RuntimeError
        with pytest.raises(TypeError, match="is of type .*Silent"):
            bgjobs.encode(Silent())

    def test_arguments_are_copied_at_submit(self, idle):
        value = [1]
        job = idle.submit(echo, value)
        value.append(2)
        idle.drain()
        assert job.result() == [1]

    def test_arguments_and_result_pass_through_a_job_as_they_were(self, idle):
        value = {"when": datetime.date(2026, 1, 31), "raw": b"\x00", "tags": {1, 2}}
        job = idle.submit(echo, value)
        idle.drain()
        assert job.result() == value and job.args == [value]

    def test_a_result_that_cannot_be_stored_fails_the_job_and_is_not_run_again(self, runner):
        job = runner.submit(gate, "result")
        assert isinstance(job.exception(10), TypeError)
        assert "returned, but the result cannot be stored" in str(job.exception())
        assert (job.status, job.attempt) == ("failed", 1)


# ---- 3 Functions and options -----------------------------------------------------------------------------------

def python(code, *arguments, cwd=None, **variables):
    """Start a Python process that can import bgjobs and this file."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, text=True, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(**variables))


def ready(code, *arguments, **variables):
    """Start such a process and wait until it says "ready"."""
    process = python(code, *arguments, **variables)
    assert process.stdout.readline() == "ready\n", finish(process)
    return process


def environment(**more):
    """Return the variables with which processes import these files; one compiles them for all."""
    return {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": bytecode_folder(), **more}


@functools.cache
def bytecode_folder():
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def finish(process, seconds=30):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out = process.communicate()
        raise AssertionError(f"the process did not end in time; it printed {out}") from None
    return process.returncode, out, err


def printed(process, seconds=30):
    """Wait until a process has ended well; return what it printed."""
    code, out, err = finish(process, seconds)
    assert code == 0, err
    return out


class Tasks:
    @staticmethod
    def double(value):
        return 2 * value


@bgjobs.job(name="tests.declared", low_priority=True, label="Declared")
def declared(value):
    return value


def outer():
    def inner():
        pass
    return inner


def any_number(*words, **named):
    pass


class NoOffset(datetime.tzinfo):
    def __init__(self, kind):
        self.kind = kind

    def utcoffset(self, at):
        if self.kind is not None:
            raise RuntimeError(self.kind)


class TestFunctions:
    @pytest.mark.parametrize("function", [
        lambda: 0, outer(), functools.partial(add, 1), 3, None, Tasks().double.__call__, [].append, contextlib.suppress(),
    ], ids=["lambda", "nested", "partial", "int", "none", "wrapper", "bound", "object"])
    def test_a_function_that_cannot_be_imported_again_is_refused(self, idle, function):
        with pytest.raises(TypeError, match="cannot be a job: the name .* does not lead to it.* submit one that is defined with def"):
            idle.submit(function)
        assert idle.jobs() == []

    def test_the_name_is_the_import_path(self, idle):
        assert idle.submit(add, 1).name == "test_bgjobs.add"
        assert idle.submit(Tasks.double, 1).name == "test_bgjobs.Tasks.double"

    def test_static_methods_and_builtins_run(self, idle):
        jobs = [idle.submit(Tasks.double, 4), idle.submit(pow, 2, 5), idle.submit(time.sleep, 0)]
        idle.drain()
        assert [job.result() for job in jobs] == [8, 32, None]

    def test_declared_options_hold_and_the_function_is_unchanged(self, idle):
        assert declared(3) == 3
        job = idle.submit(declared, 3)
        assert (job.name, job.label, job.low_priority) == ("tests.declared", "Declared", True)
        assert idle.options(low_priority=False).submit(declared, 3).low_priority is False

    def test_two_functions_cannot_declare_one_name(self):
        with pytest.raises(ValueError, match="taken by test_bgjobs.declared"):
            bgjobs.job(name="tests.declared")(add)

    def test_a_name_in_the_file_never_reaches_the_standard_library_or_an_import_of_the_app(self, make, tmp_path):
        marker = tmp_path / "marker"
        runner = make()
        for name in ("os.system", "posix.system", "test_bgjobs.os.system", "test_bgjobs.subprocess.call", "builtins.eval",
                     "test_bgjobs.Tasks.__init__", "nowhere.at.all", "", "..", "test_bgjobs.shutil.rmtree"):
            with contextlib.closing(sqlite3.connect(runner.path)) as db:
                db.execute("INSERT INTO bgjobs_jobs (name, status, queue, lane, created_at, args) VALUES (?, 'pending', 0, 0, 0, ?)",
                           (name, json.dumps([f"touch {marker}"])))
                db.commit()
        assert runner.submit(add, 1, 2).result(10) == 3
        wait_for(lambda: all(job.phase == "unknown function" for job in runner.jobs(status="pending")))
        assert len(runner.jobs(status="pending")) == 10 and not marker.exists()
        assert all((job.status, job.attempt, job.started_at) == ("pending", 0, None) for job in runner.jobs(status="pending"))
        consistent(runner)

    def test_a_parked_job_goes_on_when_a_process_that_knows_the_name_appears(self, make, tmp_path):
        (tmp_path / "late_module.py").write_text("def work():\n    return 'late'\n")
        runner = make()
        with contextlib.closing(sqlite3.connect(runner.path)) as db:
            db.execute("INSERT INTO bgjobs_jobs (name, status, queue, lane, created_at) VALUES ('late_module.work', 'pending', 0, 0, 0)")
            db.commit()
        job = runner.get(1)
        wait_for(lambda: job.phase == "unknown function")
        code = """
            import sys, bgjobs
            sys.path.insert(0, sys.argv[2])
            runner = bgjobs.Runner(sys.argv[1], modules=["late_module"])
            print(runner.get(1).result(10))
            runner.close()
        """
        assert finish(python(code, runner.path, tmp_path)) == (0, "late\n", "")
        assert job.result(5) == "late"

    def test_a_function_of_the_script_is_stored_under_the_scripts_name_and_runs_after_a_restart(self, tmp_path):
        script = tmp_path / "my_app.py"
        script.write_text(textwrap.dedent("""
            import sys, bgjobs

            def work(x):
                return x + 1

            if __name__ == "__main__":
                runner = bgjobs.Runner("jobs.db", start=False)
                if sys.argv[1] == "submit":
                    print(runner.submit(work, 1).name)
                else:
                    runner.drain()
                    print(runner.get(1).result())
        """))
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        outs = [subprocess.run([sys.executable, "my_app.py", step], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
                for step in ("submit", "run")]
        assert [out.stdout for out in outs] == ["my_app.work\n", "2\n"], outs

    def test_unknown_options_and_two_times_are_refused(self, idle):
        with pytest.raises(TypeError, match="unknown option 'lable'"):
            idle.options(lable="x")
        with pytest.raises(ValueError, match="not both"):
            idle.options(delay=1, run_at=1)

    @pytest.mark.parametrize("name,values", [
        ("key", ["", 5, "x" * 501, "\udcff"]), ("name", ["", 5, "x" * 501, "\udcff"]),
        ("delay", [-1, 10**400, float("inf"), True]),
        ("run_at", [10**400, float("nan"), datetime.datetime(2026, 1, 1),
                    datetime.datetime(2026, 1, 1, tzinfo=NoOffset("raises")),
                    datetime.datetime(2026, 1, 1, tzinfo=NoOffset(None))]),
        ("max_running", [0, -1, 1.5, 2**63, True, "2"]),
        ("secret", ["b", 5, [5], (name for name in "b")])])
    def test_values_that_cannot_be_kept_as_they_are_are_refused(self, idle, name, values):
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be .*, got "):
                idle.options(**{name: value}).submit(add, 1, 2)
        assert idle.jobs() == []

    def test_numbers_and_texts_that_sqlite_cannot_hold_are_value_errors_that_name_them(self, idle):
        job = idle.submit(add, 1)
        for name in ("limit", "before", "parent"):
            with pytest.raises(ValueError, match=name):
                idle.jobs(**{name: 2**63})
        for name in ("limit", "after", "level"):
            with pytest.raises(ValueError, match=name):
                job.logs(**{name: 2**63})
        for filters in ({"created_from": 10**400}, {"name": ["a"]}, {"name": "\udcff"}, {"run_by": 5}):
            with pytest.raises(ValueError, match=next(iter(filters))):
                idle.jobs(**filters)

    def test_none_is_the_default_of_each_option(self, idle):
        nothing = dict.fromkeys(bgjobs.OPTIONS.keys() - {"executor"})
        first, second = idle.submit(add, 1), idle.options(**nothing).submit(add, 1)
        assert idle.drain() == 2
        facts = ("name", "label", "status", "errors", "low_priority", "run_by", "parent_id", "operations")
        assert [first.info()[fact] for fact in facts] == [second.info()[fact] for fact in facts]

    def test_options_and_arguments_of_the_function_never_clash(self, idle):
        job = idle.options(label="L", run_by="ann").submit(dict, label=1, fn=2, self=3, options=4)
        idle.drain()
        assert job.result() == {"label": 1, "fn": 2, "self": 3, "options": 4}
        assert (job.label, job.run_by) == ("L", "ann")

    def test_secret_arguments_are_masked_wherever_people_look(self, idle):
        secret = idle.options(secret=["b"])
        jobs = [secret.submit(add, 1, 271828), secret.submit(add, 1, b=271828)]
        for job in jobs:
            assert "271828" not in json.dumps(job.info())
        assert idle.jobs(q="2718") == [] and len(idle.jobs(q="test_bgjobs.add")) == 2
        assert jobs[0].args == [1, bgjobs.MASK] and jobs[1].kwargs == {"b": bgjobs.MASK}
        idle.drain()
        assert jobs[0].result() == 271829
        with pytest.raises(ValueError, match="no such argument"):
            idle.options(secret=["c"]).submit(add, 1)
        assert idle.options(secret=set()).submit(add, 1, 2).args == [1, 2]
        assert idle.options(secret=["word"]).submit(any_number, word="271828", user="u").kwargs == {"word": bgjobs.MASK, "user": "u"}
        for name in ("words", "named"):
            with pytest.raises(ValueError, match=f"secret names '{name}', but any_number has no such argument; of .arguments and"):
                idle.options(secret=[name]).submit(any_number, "271828")

    def test_importing_is_quick_and_has_no_side_effects(self, tmp_path):
        code = """
            import sys, threading
            import bgjobs
            heavy = {"http.server", "asyncio", "inspect", "argparse", "decimal", "uuid", "wsgiref", "socket"} & set(sys.modules)
            print(sorted(heavy), threading.active_count())
        """
        assert finish(python(code, cwd=tmp_path)) == (0, "[] 1\n", "")
        assert list(tmp_path.iterdir()) == []


# ---- 4 Times of schedules --------------------------------------------------------------------------------------

# Worked out with another program: schedule | after this time | the next ones; the year where it changes. In UTC.
CRON_TABLE = """
    * * * * *            | 2026-01-30 23:58 | 01-30 23:59, 01-31 00:00, 01-31 00:01, 01-31 00:02
    */5 * * * *          | 2027-12-30 11:07 | 12-30 11:10, 12-30 11:15, 12-30 11:20, 12-30 11:25
    */7 * * * *          | 2026-01-30 23:58 | 01-31 00:00, 01-31 00:07, 01-31 00:14, 01-31 00:21
    0 * * * *            | 2027-12-30 11:07 | 12-30 12:00, 12-30 13:00, 12-30 14:00, 12-30 15:00
    17 */6 * * *         | 2026-01-30 23:58 | 01-31 00:17, 01-31 06:17, 01-31 12:17, 01-31 18:17
    0 0 * * *            | 2027-12-30 11:07 | 12-31 00:00, 2028-01-01 00:00, 01-02 00:00
    @daily               | 2026-01-30 23:58 | 01-31 00:00, 02-01 00:00, 02-02 00:00, 02-03 00:00
    @hourly              | 2027-12-30 11:07 | 12-30 12:00, 12-30 13:00, 12-30 14:00, 12-30 15:00
    @weekly              | 2026-01-30 23:58 | 02-01 00:00, 02-08 00:00, 02-15 00:00, 02-22 00:00
    @monthly             | 2027-12-30 11:07 | 2028-01-01 00:00, 02-01 00:00, 03-01 00:00
    @yearly              | 2026-01-30 23:58 | 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00
    30 6 * * 1-5         | 2027-12-30 11:07 | 12-31 06:30, 2028-01-03 06:30, 01-04 06:30
    30 6 * * mon-fri     | 2026-01-30 23:58 | 02-02 06:30, 02-03 06:30, 02-04 06:30, 02-05 06:30
    0 22 * * 5           | 2027-12-30 11:07 | 12-31 22:00, 2028-01-07 22:00, 01-14 22:00
    0 22 * * fri         | 2026-01-30 23:58 | 02-06 22:00, 02-13 22:00, 02-20 22:00, 02-27 22:00
    0 12 * * 0           | 2027-12-30 11:07 | 2028-01-02 12:00, 01-09 12:00, 01-16 12:00
    0 12 * * 7           | 2026-01-30 23:58 | 02-01 12:00, 02-08 12:00, 02-15 12:00, 02-22 12:00
    0 12 * * sun         | 2027-12-30 11:07 | 2028-01-02 12:00, 01-09 12:00, 01-16 12:00
    15 10 15 * *         | 2026-01-30 23:58 | 02-15 10:15, 03-15 10:15, 04-15 10:15, 05-15 10:15
    0 0 31 * *           | 2027-12-30 11:07 | 12-31 00:00, 2028-01-31 00:00, 03-31 00:00
    0 0 30 * *           | 2026-01-30 23:58 | 03-30 00:00, 04-30 00:00, 05-30 00:00, 06-30 00:00
    0 0 29 2 *           | 2027-12-30 11:07 | 2028-02-29 00:00, 2032-02-29 00:00, 2036-02-29 00:00
    0 0 1 1 *            | 2026-01-30 23:58 | 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00
    0 0 1 jan,jul *      | 2027-12-30 11:07 | 2028-01-01 00:00, 07-01 00:00, 2029-01-01 00:00
    0 0 1 */3 *          | 2026-01-30 23:58 | 04-01 00:00, 07-01 00:00, 10-01 00:00
    0 9 1-7 * 1          | 2027-12-30 11:07 | 2028-01-01 09:00, 01-02 09:00, 01-03 09:00
    30 4 1,15 * 5        | 2026-01-30 23:58 | 02-01 04:30, 02-06 04:30, 02-13 04:30, 02-15 04:30
    0 0 13 * 5           | 2027-12-30 11:07 | 12-31 00:00, 2028-01-07 00:00, 01-13 00:00
    0 0 */10 * *         | 2026-01-30 23:58 | 01-31 00:00, 02-01 00:00, 02-11 00:00, 02-21 00:00
    0 0 1 * 1            | 2027-12-30 11:07 | 2028-01-01 00:00, 01-03 00:00, 01-10 00:00
    59 23 31 12 *        | 2026-01-30 23:58 | 12-31 23:59, 2027-12-31 23:59, 2028-12-31 23:59
    0,30 8-10 * * *      | 2027-12-30 11:07 | 12-31 08:00, 12-31 08:30, 12-31 09:00, 12-31 09:30
    5,10,15-20 3 * * *   | 2026-01-30 23:58 | 01-31 03:05, 01-31 03:10, 01-31 03:15, 01-31 03:16
    10-50/20 */8 * * *   | 2027-12-30 11:07 | 12-30 16:10, 12-30 16:30, 12-30 16:50, 12-31 00:10
    0 0-20/5 * * *       | 2026-01-30 23:58 | 01-31 00:00, 01-31 05:00, 01-31 10:00, 01-31 15:00
    0 6 * 2 *            | 2027-12-30 11:07 | 2028-02-01 06:00, 02-02 06:00, 02-03 06:00
    0 6 10-12 6 sat      | 2026-01-30 23:58 | 06-06 06:00, 06-10 06:00, 06-11 06:00, 06-12 06:00
    */15 9-17 * * 1-5    | 2027-12-30 11:07 | 12-30 11:15, 12-30 11:30, 12-30 11:45, 12-30 12:00
    0 0 28-31 * *        | 2026-01-30 23:58 | 01-31 00:00, 02-28 00:00, 03-28 00:00, 03-29 00:00
    45 23 * * 6          | 2027-12-30 11:07 | 2028-01-01 23:45, 01-08 23:45, 01-15 23:45
    1 2 3 4 *            | 2026-01-30 23:58 | 04-03 02:01, 2027-04-03 02:01, 2028-04-03 02:01
    1 2 3 4 5            | 2027-12-30 11:07 | 2028-04-03 02:01, 04-07 02:01, 04-14 02:01
    0 3 * * 2,4          | 2026-01-30 23:58 | 02-03 03:00, 02-05 03:00, 02-10 03:00, 02-12 03:00
    0 3 * * tue,thu      | 2027-12-30 11:07 | 2028-01-04 03:00, 01-06 03:00, 01-11 03:00
    20/15 * * * *        | 2026-01-30 23:58 | 01-31 00:20, 01-31 00:35, 01-31 00:50, 01-31 01:20
    0 0 1-31 * 3         | 2027-12-30 11:07 | 12-31 00:00, 2028-01-01 00:00, 01-02 00:00
    0 0 5 * 0-6          | 2026-01-30 23:58 | 01-31 00:00, 02-01 00:00, 02-02 00:00, 02-03 00:00
    0 12 25 dec *        | 2027-12-30 11:07 | 2028-12-25 12:00, 2029-12-25 12:00, 2030-12-25 12:00
    0 4 * nov sun        | 2026-01-30 23:58 | 11-01 04:00, 11-08 04:00, 11-15 04:00, 11-22 04:00
    30 1 29 2 1          | 2027-12-30 11:07 | 2028-02-07 01:30, 02-14 01:30, 02-21 01:30
"""


class TestTimesOfSchedules:
    @pytest.mark.parametrize("line", CRON_TABLE.strip().splitlines(), ids=lambda line: line.split("|")[0].strip())
    def test_cron_fields_mean_what_crontab_says(self, line):
        spec, now, expected = (part.strip() for part in line.split("|"))
        cron, year, zone = bgjobs.schedule_of(spec, "UTC"), now[:4], UTC
        at = cron.next(0, minutes(now, zone))
        for text in expected.split(", "):
            year = text[:4] if text[4] == "-" else year
            text = text if text[4] == "-" else f"{year}-{text}"
            assert at == minutes(text, zone)
            at = cron.next(at, at)

    @pytest.mark.parametrize("spec,begin,expected", [
        ("30 2 * * *", "2026-03-28 12:00", ["03-29 03:30+0200", "03-30 02:30+0200"]),           # 02:30 does not exist: once all the same
        ("30 2 * * *", "2026-10-24 12:00", ["10-25 02:30+0200", "10-26 02:30+0100"]),           # 02:30 comes twice: once
        ("0 3 * * *", "2026-03-28 12:00", ["03-29 03:00+0200", "03-30 03:00+0200"]),
        ("0 0 * * *", "2026-03-28 12:00", ["03-29 00:00+0100", "03-30 00:00+0200"]),
        ("30 2,3 * * *", "2026-03-28 12:00", ["03-29 03:30+0200", "03-30 02:30+0200", "03-30 03:30+0200"]),
        ("*/30 * * * *", "2026-10-25 01:50", ["10-25 02:00+0200", "10-25 02:30+0200", "10-25 02:00+0100", "10-25 02:30+0100", "10-25 03:00+0100"]),
        ("*/30 * * * *", "2026-03-29 01:40", ["03-29 03:00+0200", "03-29 03:30+0200"]),
        ("0 */2 * * *", "2026-10-25 00:30", ["10-25 02:00+0200", "10-25 04:00+0100"])])
    def test_where_the_clocks_change_a_daily_time_comes_once_a_day_and_an_hourly_one_each_hour(self, spec, begin, expected):
        zone = zoneinfo.ZoneInfo("Europe/Berlin")
        cron, at = bgjobs.Cron(spec, zone), minutes(begin, zone)
        for text in expected:
            at = cron.next(at, at)
            assert datetime.datetime.fromtimestamp(at, zone).strftime("%m-%d %H:%M%z") == text

    def test_hours_that_pass_are_counted_also_where_the_clocks_go_back_past_midnight(self):
        zone = zoneinfo.ZoneInfo("Antarctica/Casey")       # on 5 March 2010, 2:00 was followed by 23:00 of the day before
        cron, at, got = bgjobs.Cron("40 * * * *", zone), minutes("2010-03-05 00:50", zone), []
        for _ in range(4):
            at = cron.next(at, at)
            got.append(datetime.datetime.fromtimestamp(at, zone).strftime("%d %H:%M%z"))
        assert got == ["05 01:40+1100", "04 23:40+0800", "05 00:40+0800", "05 01:40+0800"]

    def test_the_next_minute_is_found_without_looking_at_the_whole_day(self):
        cron, at = bgjobs.Cron("* * * * *", zoneinfo.ZoneInfo("Europe/Berlin")), minutes("2026-03-03 00:00", UTC)
        begun = time.process_time()
        for _ in range(1_000):                             # it is looked for in a transaction
            at = cron.next(at, at)
        assert time.process_time() - begun < 1.0 and at == minutes("2026-03-03 16:40", UTC)

    def test_times_before_midnight_that_the_clocks_skip_come_after_it(self):
        zone = zoneinfo.ZoneInfo("America/Nuuk")           # 22:59:59 on 27 March 2027 is followed by 0:00
        cron, at, got = bgjobs.Cron("*/20 23 * * *", zone), minutes("2027-03-27 12:00", zone), []
        for _ in range(4):
            at = cron.next(at, at)
            got.append(datetime.datetime.fromtimestamp(at, zone).strftime("%d %H:%M"))
        assert got == ["28 00:00", "28 00:20", "28 00:40", "28 23:00"]

    @pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Sao_Paulo", "UTC"])
    def test_a_daily_time_comes_on_each_of_a_thousand_days(self, zone):
        zone = zoneinfo.ZoneInfo(zone)
        for spec in ("30 2 * * *", "10 0 * * *", "0 1,12 * * *"):
            cron, at, days = bgjobs.Cron(spec, zone), minutes("2016-01-01 00:00", zone), []
            for _ in range(1_000):
                at = cron.next(at, at)
                days.append(datetime.datetime.fromtimestamp(at, zone).date())
            distinct = sorted(set(days))
            assert len(distinct) == 1_000 // (2 if "," in spec else 1) and (distinct[-1] - distinct[0]).days == len(distinct) - 1

    def test_a_period_keeps_step_and_what_was_missed_comes_once(self):
        every = bgjobs.schedule_of("15m", None)
        assert every.next(1_000.0, 1_000.0) == 1_900.0 and every.next(1_900.0, 1_000.0) == 1_900.0
        assert every.next(1_900.0, 1_900.2) == 2_800.0
        assert every.next(1_900.0, 1_900.0 + 86_400) == 1_900.0 + 86_400 + 900
        assert [bgjobs.schedule_of(text, None).seconds for text in ("0.05s", "90s", "2h", "1d", "1.5h", "1w")] == [0.05, 90, 7_200, 86_400, 5_400, 604_800]

    @pytest.mark.parametrize("schedule,reason", [
        ("15", "five cron fields"), ("m", "five cron fields"), ("-5m", "five cron fields"), ("nans", "five cron fields"), ("0s", "at least 0.01"),
        ("", "five cron fields"), ("* * * *", "has five fields"), ("* * * * * *", "has five fields"), ("60 * * * *", "minute of a cron schedule is 0 to 59"),
        ("* 24 * * *", "hour .* is 0 to 23"), ("* * 0 * *", "day of month .* is 1 to 31"), ("* * * 13 *", "month .* is 1 to 12"),
        ("* * * foo *", "got 'foo'"), ("* * * * 8", "day of week .* is 0 to 7"), ("*/0 * * * *", "a step of 1 or more"),
        ("*/x * * * *", "a step"), ("5-1 * * * *", "a range that goes up"), ("0 0 30 2 *", "is never due"), ("@never x", "five fields"), ("@reboot", "five cron fields")])
    def test_a_bad_schedule_is_refused_with_the_reason(self, idle, schedule, reason):
        with pytest.raises(ValueError, match=reason):
            idle.every(schedule, add, 1)
        assert idle.schedules() == []

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, None, [1], 1e12])
    def test_bad_seconds_are_refused(self, idle, seconds):
        with pytest.raises(ValueError, match="a schedule is seconds, at least 0.01"):
            idle.every(seconds, add, 1)

    @pytest.mark.parametrize("tz", ["Mars/Olympus", "../etc/passwd", 5, ""])
    def test_an_unknown_zone_is_an_error_when_registering(self, idle, tz):
        with pytest.raises(ValueError, match="tz must be the name of a time zone"):
            idle.options(tz=tz).every("0 9 * * *", add, 1)


# ---- 5 Fair shares and pace ------------------------------------------------------------------------------------

def jain(shares):
    return sum(shares) ** 2 / (len(shares) * sum(share ** 2 for share in shares))


def simulate(roots, workers, seconds, arrivals=()):
    """Run the queue's arithmetic on simulated time; return what each root had of the workers' time.

    roots: {name: endless iterator of job lengths in seconds}.
    arrivals: [(time, name, lengths)] of roots that come later.
    """
    streams, vtime, got, run_times = {}, {}, {}, bgjobs.RunTimes()
    running, arrivals, serial, clock, now = [], list(arrivals), itertools.count(), 0, 0.0

    def arrive(name, lengths):
        streams[name] = ((name, length) for length in lengths)
        vtime[name], got[name] = max(vtime.get(name, 0), clock), got.get(name, 0.0)
    for name, lengths in roots.items():
        arrive(name, lengths)
    while now < seconds:
        while len(running) < workers:
            queues = [(vtime[name], i, stream) for i, (name, stream) in enumerate(streams.items())]
            _, (name, length), tag, charge = next(
                bgjobs.fair_order(queues, lambda job: run_times.charge(job[0])))
            clock = max(clock, tag)
            vtime[name] += charge
            running.append((now + length, next(serial), name, length, charge))
        running.sort()
        if arrivals and arrivals[0][0] <= running[0][0]:
            now, *late = arrivals.pop(0)
            arrive(*late)
            continue
        now, _, name, length, charge = running.pop(0)
        got[name] += length
        run_times.record(name, length)
        vtime[name] += int(length * 1e6) - charge
    return got


def estimates(reports, every=0.25):
    """Follow a job as the page does, from reports (seconds, done, total).

    Yield (seconds, progress, estimate) at each look.
    """
    pace, reports, now, ends_at = bgjobs.Pace(resumed=False), list(reports), 0.0, None
    end = reports[-1][0]
    while now < end:
        now += every
        newest = None
        while reports and reports[0][0] <= now:
            newest = reports.pop(0)
        if newest is not None:
            at, done, total = newest
            left = pace.seconds_left(done, total, at)
            ends_at = None if left is None else now + left
        if ends_at is not None:
            yield now, done / total, max(0.0, ends_at - now)


class TestFairShares:
    def test_the_next_place_goes_to_the_root_with_the_least_virtual_time(self):
        roots = [(30, 1, iter("a")), (10, 2, iter("bcd")), (10, 3, iter("e"))]
        assert [(job, tag) for _, job, tag, _ in bgjobs.fair_order(roots, lambda job: 10)] == \
            [("b", 10), ("e", 10), ("c", 20), ("a", 30), ("d", 30)]

    def test_roots_with_jobs_of_unequal_length_get_equal_time(self):
        got = simulate({i: itertools.repeat(0.005 * 2 ** i) for i in range(5)}, workers=3, seconds=60)
        assert jain(list(got.values())) > 0.999

    def test_one_function_with_random_lengths_is_shared_equally(self):
        chance = random.Random(1)
        got = simulate({i: iter(lambda: chance.expovariate(1 / (0.01 * (i + 1))), None) for i in range(5)}, workers=4, seconds=200)
        assert jain(list(got.values())) > 0.999

    def test_a_root_that_was_idle_has_no_credit(self):
        got = simulate({"busy": itertools.repeat(0.01)}, workers=1, seconds=20, arrivals=[(10, "late", itertools.repeat(0.01))])
        assert got["late"] == pytest.approx(5, rel=0.02)

    def test_a_single_job_behind_a_burst_starts_in_the_time_of_a_few_attempts(self):
        got = simulate({"burst": itertools.repeat(0.01)}, workers=1, seconds=1.05, arrivals=[(1, "single", itertools.repeat(0.01))])
        assert got["single"] >= 0.02

    def test_a_million_roots_are_picked_from_in_no_time(self):
        roots = [(i, i, iter((i,))) for i in range(1_000_000)]
        order = bgjobs.fair_order(roots, lambda job: 5)
        assert [job for _, job, _, _ in itertools.islice(order, 100)] == list(range(100))

    def test_charges_follow_the_recent_runs_and_are_never_nothing(self):
        run_times = bgjobs.RunTimes()
        assert run_times.charge("new") == bgjobs.UNKNOWN_COST * 1e6
        assert run_times.occupies("new") == float("inf")
        for seconds in (1.0, *[0.0] * 60):
            run_times.record("f", seconds)
        assert run_times.charge("f") == 1

    def test_only_known_short_jobs_are_claimed_ahead(self, idle):
        def ahead(function, *arguments, workers=1, **options):
            idle.options(**options).submit_many(function, [arguments] * 50)
            claims = written(idle, lambda tx: claim(tx, idle, 1, 40, workers, run_times))
            for job in idle.jobs(limit=1000):
                job.cancel()
            return len(claims.jobs) - 1
        run_times = bgjobs.RunTimes({"test_bgjobs.add": 0.001, "test_bgjobs.nap": 1.0})
        assert ahead(add, 1) == 9 and ahead(add, 1, workers=4) == 38
        assert ahead(nap, 1, workers=8) == 0 == ahead(fail, workers=8) == ahead(add, 1, recover=False)

    @pytest.mark.parametrize("low_priority", [False, True])
    def test_a_claim_knows_whether_more_is_ready(self, idle, low_priority):
        def more_ready(free, ahead=0):
            claims = written(idle, lambda tx: claim(tx, idle, free, ahead, 4, run_times))
            return len(claims.jobs), claims.more_ready
        run_times = bgjobs.RunTimes({"test_bgjobs.add": 0.0001, "test_bgjobs.nap": 1.0})
        root = idle.options(low_priority=low_priority).submit(add, 1)
        idle.options(parent=root).submit_many(add, [(1,)] * 5)
        assert [more_ready(4), more_ready(4), more_ready(1)] == [(4, True), (2, False), (0, False)]
        idle.options(low_priority=low_priority).submit_many(nap, [(1,)] * 2)
        assert more_ready(1, ahead=0 if low_priority else 9) == (1, True)      # too long to be claimed ahead
        assert more_ready(2) == (1, False)


class TestPace:
    @pytest.mark.parametrize("items, seconds", [
        (10, 60), (20, 7), (100, 30), (5_000, 20), (1_000, 3_600)])
    def test_at_a_steady_rate_the_estimate_is_within_10_percent_from_the_first_tenth_on(
            self, items, seconds):
        looks = list(estimates([(i * seconds / items, i, items) for i in range(items + 1)]))
        late = [(now, left) for now, progress, left in looks if progress >= 0.1 and now < seconds]
        assert late
        for now, left in late:
            assert left == pytest.approx(seconds - now, rel=0.1, abs=0.3)

    def test_uneven_items_do_not_make_it_jump(self):
        chance = random.Random(3)
        items = [chance.uniform(0.02, 0.18) for _ in range(600)]
        at = list(itertools.accumulate([0.0, *items]))
        reports = [(seconds, i, 600) for i, seconds in enumerate(at)]
        looks = [look for look in estimates(reports) if look[1] > 0.1]
        for (now, _, left), (later, _, then) in itertools.pairwise(looks):
            assert abs((left - then) - (later - now)) < 0.05 * at[-1]
        for now, _, left in looks:
            assert left == pytest.approx(at[-1] - now, rel=0.2, abs=2)

    def test_a_job_that_slows_down_is_followed(self):
        slowing = [(i * 0.1, i, 200) for i in range(100)]
        slowing += [(10 + i * 0.5, 100 + i, 200) for i in range(100)]
        looks = {round(now): left for now, _, left in estimates(slowing)}
        assert looks[9] == pytest.approx(11, rel=0.1)        # nobody can know yet
        assert looks[30] == pytest.approx(30, rel=0.4)
        assert looks[50] == pytest.approx(10, rel=0.2)

    def test_a_resumed_attempt_counts_from_where_it_began(self):
        pace = bgjobs.Pace(resumed=True)
        assert pace.seconds_left(500, 1_000, 0.5) is None
        for second in range(1, 11):
            left = pace.seconds_left(500 + second, 1_000, 0.5 + second)
        assert left == pytest.approx(490)

    def test_what_is_done_in_no_time_tells_nothing_of_the_rate(self):
        pace = bgjobs.Pace(resumed=False)
        assert pace.seconds_left(50, 100, 0.01) is None
        assert pace.seconds_left(51, 100, 1.01) == pytest.approx(49)

    def test_an_attempt_without_news_has_less_and_less_left_but_never_less_than_nothing(self):
        pace = bgjobs.Pace(resumed=False)
        assert pace.seconds_left(5, 10, 5) == pytest.approx(5)
        assert [pace.seconds_left(5, 10, at) for at in (7, 10, 60)] == pytest.approx([3, 0, 0])

    def test_a_total_that_changes_and_units_that_begin_anew_do_no_harm(self):
        pace = bgjobs.Pace(resumed=False)
        for second in range(11):
            left = pace.seconds_left(second * 3, 90, second)     # units a second
        assert left == pytest.approx(20)
        assert pace.seconds_left(30, 120, 10) == pytest.approx(30)
        assert pace.seconds_left(30, 28, 10) == 0.0
        assert pace.seconds_left(1, 5, 11) is None
        assert pace.seconds_left(3, 5, 12) == pytest.approx(1)

    def test_the_recent_rate_weighs_more(self):
        pace, done = bgjobs.Pace(resumed=False), 0
        for second in range(1, 101):
            done += 5 if second <= 50 else 1
            left = pace.seconds_left(done, done + 100, second)
        assert 40 < left < 100

    def test_a_job_is_estimated_by_its_tree_by_itself_or_by_its_history(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        job = idle.submit(add, 1)
        claimed(idle, 1)
        execute(idle, "INSERT INTO bgjobs_functions VALUES ('test_bgjobs.add', 30.0)")

        def eta(**columns):
            changes = ", ".join(f"{name} = ?" for name in columns)
            execute(idle, f"UPDATE bgjobs_jobs SET {changes}", *columns.values())
            return job.eta
        clock.now += 10
        assert job.eta == pytest.approx(20)
        clock.now += 30
        assert job.eta is None                               # longer than ever
        clock.now -= 30
        assert eta(ends_at=clock.now + 5, progress=0.5) == pytest.approx(5)
        assert eta(total=100, tree_progress=40.0) == pytest.approx(15)
        assert eta(ends_at=clock.now + 50) == pytest.approx(50)          # it goes on making children
        assert eta(returned=1) == pytest.approx(15)
        assert eta(status="stopped") is None

    @pytest.mark.parametrize("children, seconds, workers", [(400, 0.5, 4), (100, 1, 1), (1_000, 0.2, 8)])
    def test_a_tree_of_equal_children_is_estimated_within_10_percent_from_the_first_tenth_on(
            self, make, children, seconds, workers):
        clock = Clock()
        idle = make(start=False, clock=clock)
        job = idle.submit(add, 1)
        claimed(idle, 1)
        begun, length = clock.now, children * seconds / workers
        for percent in range(10, 100, 7):
            clock.now = begun + length * percent / 100
            done = (clock.now - begun) // seconds * workers
            execute(idle, "UPDATE bgjobs_jobs SET total = ?, tree_progress = ?", children, done)
            assert job.eta == pytest.approx(begun + length - clock.now, rel=0.1, abs=seconds)


# ---- 6 Force stop ----------------------------------------------------------------------------------------------

def in_another_process(path, statement):
    """Execute a statement with a `runner` on the same file in another process.

    Return what it printed.
    """
    return printed(python(f"""
        import bgjobs, sys, test_bgjobs
        with bgjobs.Runner(sys.argv[1], start=False) as runner:
            {statement}
        """, path))


def stop_and_wait(job):
    job.stop()
    wait_for(lambda: job.status == "stopped")


def spin():
    seen.append("spin")
    try:
        while True:
            pass
    finally:
        seen.append("spin ends")


def swallow():
    while not gate("swallow").is_set():
        with contextlib.suppress(BaseException):
            while not gate("swallow").wait(0.01):
                pass


def stoppable(name="stoppable"):
    job = bgjobs.current_job()
    seen.append((name, job.attempt))
    while True:
        job.sleep(5)


locks = {}


def count_up(turns):
    for _ in range(turns):
        pass
    return turns


def untimed_lock():
    seen.append("lock")
    with locks["untimed"]:
        pass


def receive():
    locks["socket"][0].recv(1)


def use_the_library(seed):
    """Call whatever a job may call, for good."""
    job, chance = bgjobs.current_job(), random.Random(seed)
    calls = (
        lambda: bgjobs.submit(add, 1), lambda: job.checkpoint(state=seed), lambda: job.log.info("still here"),
        lambda: bgjobs.submit(add, 1).result(), lambda: bgjobs.get(job.id).info(), lambda: job.sleep(0.001),
        lambda: concurrent.futures.wait([bgjobs.submit(add, 1), bgjobs.submit(add, 2)]),
        lambda: list(concurrent.futures.as_completed([bgjobs.submit(add, 1), bgjobs.submit(add, 2)])),
        lambda: bgjobs.submit(add, 1).add_done_callback(id))
    while True:
        chance.choice(calls)()


turns = []


def checkpoint_on_and_on():
    job = bgjobs.current_job()
    for turns[:] in zip(itertools.count()):
        job.checkpoint()


def return_the_attempt():
    attempt = bgjobs.current_job().attempt
    while not gate(f"attempt {attempt}").is_set():
        with contextlib.suppress(bgjobs.JobStopped):
            gate(f"attempt {attempt}").wait(20)
    return attempt


def stoppable_with_end():
    job = bgjobs.current_job()
    seen.append(("begins", job.attempt))
    try:
        while True:
            job.sleep(0.001)
    finally:
        seen.append(("ends", job.attempt))


def log_on_and_on():
    while True:
        bgjobs.current_job().log.info("still here")
        time.sleep(0.001)


def flood_a_logger():
    logger = logging.getLogger("tests.flood")
    while True:
        logger.warning("still here")
        time.sleep(0)                                        # let others have the interpreter


def force_stop_itself():
    me = bgjobs.get(bgjobs.current_job().id)
    me.stop()
    me.force_stop()


def wait_for_child(name):
    try:
        child = bgjobs.options(stoppable=False).submit(hold, name)
        concurrent.futures.wait([child])
        seen.append("went on")
        bgjobs.current_job().checkpoint()
        seen.append("after")
    finally:
        seen.append("unwound")


class TestForceStop:
    @pytest.mark.parametrize("function,arguments", [(spin, []), (nap, [0.7]), (untimed_lock, []), (receive, []), (swallow, [])])
    def test_whatever_the_function_does_the_job_is_stopped_and_its_place_is_usable(self, make, function, arguments):
        locks.update(untimed=threading.Lock(), socket=socket.socketpair())
        locks["untimed"].acquire()
        gate("swallow")
        runner = make(max_workers=1)
        job = runner.options(stoppable=False).submit(function, *arguments)
        wait_for(lambda: job.status == "running")
        assert job.stop().status == "stopping"
        assert job.force_stop().status == "stopped"
        assert runner.submit(add, 1, 2).result(10) == 3
        locks["untimed"].release()
        locks["socket"][1].send(b"x")
        gate("swallow").set()
        wait_for(lambda: abandoned(runner) == 0)        # the thread ends as soon as it can
        assert job.status == "stopped" and job.attempt == 1 and job.info()["result"] is None
        for end in locks["socket"]:
            end.close()
        consistent(runner)

    def test_it_reaches_a_loop_whose_finally_block_runs(self, make):
        runner = make(max_workers=1)
        seen.clear()
        job = runner.submit(spin)
        wait_for(lambda: "spin" in seen)
        job.stop()
        job.force_stop()
        wait_for(lambda: "spin ends" in seen)
        assert job.status == "stopped" and job.info()["result"] is None

    def test_against_completion_it_is_one_or_the_other(self, make):
        runner = make(max_workers=2)
        chance, ends = random.Random(1), []
        for _ in range(500):
            job = runner.options(stoppable=False).submit(count_up, chance.choice([0, 100, 1_000, 10_000, 30_000]))
            time.sleep(chance.choice([0, 0.002 * chance.random(), 0.01]))
            with contextlib.suppress(bgjobs.InvalidOperation):
                job.stop()
                job.force_stop()
            ends.append(wait_for(lambda: (status := job.status) in ("finished", "stopped") and status))
            assert (job.info()["result"] is None) == (ends[-1] == "stopped"), job.info()
        assert set(ends) == {"finished", "stopped"}
        wait_for(lambda: abandoned(runner) == 0)
        assert runner.submit(add, 1, 2).result(10) == 3
        consistent(runner)

    def test_it_never_interrupts_the_library(self, make):
        runner = make(max_workers=2)
        chance = random.Random(2)
        for seed in range(200):
            job = runner.submit(use_the_library, seed)
            wait_for(lambda: job.status != "pending")
            time.sleep(chance.random() / 1000)
            with contextlib.suppress(bgjobs.InvalidOperation):
                job.stop()
                job.force_stop()
            wait_for(lambda: job.status == "stopped")
        wait_for(lambda: abandoned(runner) == 0)
        assert runner.submit(add, 1, 2).result(10) == 3
        consistent(runner)

    def test_resumed_at_once_the_abandoned_attempt_changes_nothing(self, make):
        runner = make(max_workers=2)
        seen.clear()
        locks["untimed"] = threading.Lock()
        locks["untimed"].acquire()
        job = runner.submit(untimed_lock)
        for attempt in (1, 2):
            wait_for(lambda: len(seen) == attempt)
            job.stop()
            job.force_stop()
            job.resume()
        wait_for(lambda: len(seen) == 3)
        assert job.status == "running" and job.attempt == 3 and abandoned(runner) == 2
        locks["untimed"].release()
        assert job.result(10) is None and job.attempt == 3
        wait_for(lambda: abandoned(runner) == 0)
        assert [line["message"] for line in job.logs()] == ["stop", "force stop", "resume"] * 2
        consistent(runner)

    def test_an_abandoned_attempt_that_returns_all_the_same_is_refused(self, make):
        runner = make(max_workers=2)
        job = runner.submit(return_the_attempt)
        wait_for(lambda: job.status == "running")
        job.stop()
        job.force_stop()
        job.resume()
        wait_for(lambda: job.attempt == 2 and job.status == "running")
        gate("attempt 1").set()
        wait_for(lambda: abandoned(runner) == 0)
        assert runner.submit(add, 1, 2).result(10) == 3      # the outcomes that waited are recorded by now
        assert job.status == "running"
        gate("attempt 2").set()
        assert job.result(10) == 2

    def test_an_attempt_that_another_process_superseded_and_resumed_at_once_is_stopped(self, make, path):
        runner = make(max_workers=2)
        seen.clear()
        job = runner.submit(stoppable_with_end)
        for attempt in (1, 2, 3):
            wait_for(lambda: ("begins", attempt) in seen)
            in_another_process(path, "runner.get(1).stop().force_stop().resume()")
            wait_for(lambda: ("ends", attempt) in seen)
        wait_for(lambda: ("begins", 4) in seen)
        assert job.status == "running" and job.attempt == 4 and list(attempts_of(runner)) == [job.id]
        stop_and_wait(job)
        assert abandoned(runner) == 0 and places(runner) == (0, 0)

    def test_lines_that_a_superseded_attempt_logs_are_refused(self, make, path):
        runner = make(max_workers=1)
        job = runner.submit(log_on_and_on)
        wait_for(lambda: job.status == "running")
        out = printed(python("""
            import bgjobs, sys, time
            with bgjobs.Runner(sys.argv[1], start=False) as runner:
                runner.get(1).stop().force_stop()
                print(time.time())
            """, path))
        wait_for(lambda: abandoned(runner) == 0 and not attempts_of(runner))
        runner.submit(add, 1).result(10)
        assert all(line["at"] <= float(out) for line in job.logs())

    def test_what_a_superseded_attempt_still_saves_or_logs_is_refused_by_the_file_itself(self, idle):
        job = idle.submit(add, 1)
        attempt, = claimed(idle, 1)
        job.stop()
        job.force_stop()
        job.resume()
        claimed(idle, 1)
        with pytest.raises(bgjobs.JobStopped, match="attempt 1 of job 1 has been superseded"):
            attempt.save('"late"')
        unwritten(idle).add(attempt, time.time(), 20, "late")
        written(idle, lambda tx: tx.report(attempt, (0.5, None, None), None))
        assert (job.state, job.progress, job.attempt, job.status) == (None, None, 2, "running")
        assert "late" not in [line["message"] for line in job.logs()]

    def test_it_leaves_the_apps_logging_whole(self, make):
        runner = make(max_workers=2)
        handler = logging.StreamHandler(open(os.devnull, "w"))
        logger = logging.getLogger("tests.flood")
        logger.addHandler(handler)
        logger.propagate = False
        chance = random.Random(4)
        try:
            for _ in range(20):
                job = runner.submit(flood_a_logger)
                wait_for(lambda: job.status == "running")
                time.sleep(chance.random() / 500)
                job.stop()
                job.force_stop()
            wait_for(lambda: abandoned(runner) == 0)
            assert handler.lock.acquire(timeout=5)
            handler.lock.release()
        finally:
            logger.removeHandler(handler)
            handler.stream.close()

    def test_a_job_may_force_stop_itself(self, make):
        runner = make(max_workers=1)
        job = runner.submit(force_stop_itself)
        wait_for(lambda: job.status == "stopped")
        wait_for(lambda: abandoned(runner) == 0)
        assert runner.submit(add, 1, 2).result(10) == 3

    def test_too_many_abandoned_threads_end_the_claiming_until_they_end(self, make, caplog):
        runner = make(max_workers=1)
        visitor = Visitor(runner.serve(port=0))
        locks["untimed"] = threading.Lock()
        locks["untimed"].acquire()
        seen.clear()
        for attempt in (1, 2):
            job = runner.submit(untimed_lock)
            wait_for(lambda: len(seen) == attempt)
            job.stop()
            job.force_stop()
        waiting = runner.submit(add, 1, 2)
        wait_for(lambda: "superseded attempts still run in threads of this process that no more jobs are claimed" in caplog.text)
        wait_for(lambda: visitor.get("api/runners")["runners"][0]["abandoned"] == 2)
        assert waiting.status == "pending"
        locks["untimed"].release()
        assert waiting.result(10) == 3
        wait_for(lambda: visitor.get("api/runners")["runners"][0]["abandoned"] == 0)

    def test_inside_wait_a_stop_comes_at_the_next_checkpoint_and_a_force_stop_at_once(self, make):
        runner = make(max_workers=2)
        seen.clear()
        job = runner.submit(wait_for_child, "waited for")
        wait_for(lambda: "waited for" in seen)
        job.stop()
        runner.submit(add, 1).result(10)
        assert job.status == "stopping" and "went on" not in seen
        gate("waited for").set()
        wait_for(lambda: job.status == "stopped")
        assert "went on" in seen and "after" not in seen
        other = runner.submit(wait_for_child, "waited in vain")
        wait_for(lambda: "waited in vain" in seen)
        seen.remove("went on")
        other.stop()
        other.force_stop()
        wait_for(lambda: seen.count("unwound") == 2)
        assert other.status == "stopped" and "went on" not in seen

    def test_who_waits_inside_wait_wakes_up_when_the_ticket_is_void_not_before(self, make, monkeypatch):
        use = bgjobs.Ticket.use
        monkeypatch.setattr(bgjobs.Ticket, "use", lambda ticket: (time.sleep(0.05), use(ticket)))
        runner = make(max_workers=2)
        seen.clear()
        job = runner.submit(wait_for_child, "told late")
        wait_for(lambda: "told late" in seen)
        job.stop()
        job.force_stop()
        wait_for(lambda: "unwound" in seen)
        gate("told late").set()

    def test_a_taken_ticket_puts_the_exception_off_and_it_is_raised_once(self):
        ticket = bgjobs.Ticket()
        ticket.thread = threading.get_ident()
        ticket.put_back()
        ticket.take()
        ticket.take()
        ticket.use()                                       # from within the library: nothing is raised
        ticket.put_back()
        with pytest.raises(bgjobs.JobStopped):
            ticket.put_back()                              # on the way back to the function
        with pytest.raises(bgjobs.JobStopped):
            ticket.take()                                  # nor does it get into the library again
        ticket.take(quietly=True)

    def test_who_finds_the_ticket_gone_waits_for_the_exception_or_takes_it_back(self):
        for swallows in (False, True):
            ticket, caught = bgjobs.Ticket(), 0
            ticket.thread = threading.get_ident()
            ticket.put_back()
            other = threading.Thread(target=ticket.use)
            try:
                other.start()
                if swallows:
                    with contextlib.suppress(bgjobs.JobStopped):
                        while True:
                            time.sleep(0.001)
                    caught += 1
                ticket.take(quietly=True)
            except bgjobs.JobStopped:
                caught += 1
            other.join()
            time.sleep(0)
            assert caught == 1

    def test_a_computing_loop_lets_an_operation_pass(self, make):
        runner = make(max_workers=1)
        job = runner.submit(checkpoint_on_and_on)
        wait_for(lambda: job.status == "running")
        attempt = attempts_of(runner)[job.id]
        passed = threading.Event()
        attempt.let_pass(passed)
        wait_for(lambda: attempt.operation is None)
        before = turns[0]
        time.sleep(0.05)
        assert turns[0] == before
        passed.set()
        wait_for(lambda: turns[0] > before)


# ---- 7 Tables and statements -----------------------------------------------------------------------------------

class TestTables:
    # The statements of the hot path; the plan where it is one step or a few.
    BY_ID = ["SEARCH bgjobs_jobs USING INTEGER PRIMARY KEY (rowid=?)"]
    BY_IDS = [*BY_ID, "LIST SUBQUERY 1", "SCAN json_each VIRTUAL TABLE INDEX 1:"]
    HOT = {
        "READY_ROOTS": [*BY_ID, "LIST SUBQUERY 1",
                        "SEARCH bgjobs_jobs USING COVERING INDEX bgjobs_ready_roots (lane=?)"],
        "READY_CHILDREN": ["SEARCH bgjobs_jobs USING INDEX bgjobs_ready_children "
                           "(root_id=? AND queue=?)"],
        "CLAIM": BY_IDS, "CLAIM_SINGLE": BY_IDS, "FINISH": BY_ID, "TREE_ROW": BY_ID,
        "ADD_CHANGE": None, "CLOSED": BY_IDS, "OLDEST_BLOCKED": None, "BLOCKED": None,
        "HAS_ROOM limit": None, "HAS_ROOM suspect": None,
        "ROOT_WITH_KEY": ["SEARCH bgjobs_jobs USING INDEX bgjobs_root_key (key=?)"],
        "CHILD_WITH_KEY": ["SEARCH bgjobs_jobs USING COVERING INDEX bgjobs_child_key "
                           "(parent_id=? AND key=?)"],
        "NEXT_DUE": ["SEARCH bgjobs_jobs USING INDEX bgjobs_due (run_at>?)"],
        "DUE": ["SEARCH bgjobs_jobs USING INDEX bgjobs_due (run_at>? AND run_at<?)"],
        "OWNED": ["SEARCH bgjobs_jobs USING INDEX bgjobs_begun (status=?)"],
        "Service.BLOCKED_KEYS": None, "BLOCKED_IN_TREE": None, "LogLines.TRIM": None,
    }

    @pytest.mark.parametrize("name", HOT)
    def test_each_hot_statement_is_an_index_search(self, idle, name):
        attribute, _, kind = name.partition(" ")
        sql = operator.attrgetter(attribute)(bgjobs)
        sql = sql[kind] if kind else sql.format(order="ASC", which="= :id")
        with contextlib.closing(sqlite3.connect(idle.path)) as db:
            named = dict.fromkeys(re.findall(r":(\w+)", sql), 1)
            unnamed = [1] * sql.count("?")
            plan = [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + sql, named or unnamed)]
        scans = ("SCAN bgjobs_jobs", "SCAN bgjobs_logs", "SCAN j")
        assert not [step for step in plan if f"{step} ".startswith(tuple(f"{s} " for s in scans))]
        # The two oldest blocked jobs are ordered by hand: a root and a child.
        assert name == "OLDEST_BLOCKED" or "USE TEMP B-TREE FOR ORDER BY" not in plan
        if self.HOT[name]:
            assert plan == self.HOT[name]

    def test_the_cost_of_a_claim_does_not_depend_on_the_backlog(self, idle):
        """Counted in SQLite's own steps, not in time."""
        def steps(backlog):
            with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
                for statement in bgjobs.MIGRATIONS[0]:
                    db.execute(statement)
                db.execute("WITH RECURSIVE k(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM k WHERE i < ?) INSERT INTO bgjobs_jobs "
                           "(name, status, queue, lane, created_at) SELECT 'f', 'pending', 0, 0, 0 FROM k", [backlog])
                count = itertools.count()
                db.set_progress_handler(lambda: next(count) and 0, 10)
                tx = bgjobs.Transaction(db, {}, 1.0)
                room = bgjobs.Room(8, 8, workers=8)
                assert len(bgjobs.claim(tx, 1, room, bgjobs.RunTimes()).jobs) == 8
                return next(count)
        assert steps(100_000) <= steps(100) * 1.2

    def test_a_newer_schema_is_refused_naming_both_versions(self, idle):
        idle.close()
        with contextlib.closing(sqlite3.connect(idle.path)) as db:
            db.execute("UPDATE bgjobs_schema SET version = 99")
            db.commit()
        before = pathlib.Path(idle.path).read_bytes()
        with pytest.raises(bgjobs.StoreError, match=r"schema version 99, and this bgjobs .* knows up to \d+; copy a newer"):
            bgjobs.Runner(idle.path)
        assert pathlib.Path(idle.path).read_bytes() == before


# A file of bgjobs 1.0.0 whose process was killed, with jobs in every status, 90 seconds before the
# time that Clock shows at first.
OLDER_FILE = """
CREATE TABLE bgjobs_schema (version INTEGER NOT NULL);
CREATE TABLE bgjobs_jobs (id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, parent_id INTEGER, root_id INTEGER, queue INTEGER, lane
    INTEGER, vtime INTEGER NOT NULL DEFAULT 0, charge INTEGER NOT NULL DEFAULT 0, owner INTEGER,
    submitter INTEGER, returned INTEGER NOT NULL DEFAULT 0, goes_on INTEGER NOT NULL DEFAULT 0,
    superseded INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, died_with TEXT,
    own_errors INTEGER NOT NULL DEFAULT 0, open INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL
    DEFAULT 0, done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, running INTEGER
    NOT NULL DEFAULT 0, low_priority INTEGER NOT NULL DEFAULT 0, system INTEGER NOT NULL DEFAULT
    0, created_at REAL NOT NULL, run_at REAL, started_at REAL, waited REAL, finished_at REAL,
    since REAL, duration REAL NOT NULL DEFAULT 0, progress REAL, progress_at REAL, gained REAL,
    seconds REAL, step REAL, tree_progress REAL NOT NULL DEFAULT 0, tree_at REAL, tree_gained
    REAL, tree_seconds REAL, phase TEXT, parked TEXT, max_running INTEGER, label TEXT, run_by
    TEXT, key TEXT, options TEXT, message TEXT, args TEXT, kwargs TEXT, state TEXT, positions
    TEXT, result TEXT, error TEXT);
CREATE TABLE bgjobs_logs (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL, at REAL NOT NULL, level
    INTEGER NOT NULL, message TEXT NOT NULL);
CREATE TABLE bgjobs_attempts (job_id INTEGER NOT NULL, number INTEGER NOT NULL, started_at REAL,
    ended_at REAL NOT NULL, outcome TEXT NOT NULL, error TEXT, PRIMARY KEY (job_id, number))
    WITHOUT ROWID;
CREATE TABLE bgjobs_clock (vtime INTEGER NOT NULL DEFAULT 0, last_id INTEGER NOT NULL DEFAULT 0,
    counted_id INTEGER NOT NULL DEFAULT 0, token TEXT);
CREATE TABLE bgjobs_runners (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, host TEXT
    NOT NULL, workers INTEGER NOT NULL, started_at REAL NOT NULL, heartbeat_at REAL NOT NULL,
    abandoned INTEGER NOT NULL DEFAULT 0, lock_file TEXT);
CREATE TABLE bgjobs_functions (name TEXT PRIMARY KEY, seconds REAL, tree_seconds REAL) WITHOUT
    ROWID;
CREATE TABLE bgjobs_schedules (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, schedule TEXT NOT
    NULL, zone TEXT, name TEXT NOT NULL, args TEXT, kwargs TEXT, options TEXT, label TEXT, run_by
    TEXT, low_priority INTEGER NOT NULL, system INTEGER NOT NULL, max_running INTEGER, created_at
    REAL NOT NULL, next_at REAL NOT NULL, last_at REAL, job_id INTEGER, runs INTEGER NOT NULL
    DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, paused INTEGER NOT NULL DEFAULT 0);
CREATE TABLE bgjobs_registered (schedule_id INTEGER NOT NULL, runner_id INTEGER NOT NULL, PRIMARY
    KEY (schedule_id, runner_id)) WITHOUT ROWID;
CREATE TABLE bgjobs_stats (minute INTEGER NOT NULL, name TEXT NOT NULL, created INTEGER NOT NULL,
    started INTEGER NOT NULL, finished INTEGER NOT NULL, failed INTEGER NOT NULL, waiting REAL NOT
    NULL, waiting_min REAL, waiting_max REAL, running REAL NOT NULL, running_min REAL, running_max
    REAL, PRIMARY KEY (minute, name)) WITHOUT ROWID;
CREATE INDEX bgjobs_ready_roots ON bgjobs_jobs(lane, vtime) WHERE lane IS NOT NULL;
CREATE INDEX bgjobs_ready_children ON bgjobs_jobs(root_id, queue) WHERE parent_id IS NOT NULL AND
    queue IS NOT NULL;
CREATE INDEX bgjobs_begun ON bgjobs_jobs(status, system, parent_id) WHERE status <> 'pending';
CREATE INDEX bgjobs_children ON bgjobs_jobs(parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX bgjobs_due ON bgjobs_jobs(run_at) WHERE run_at IS NOT NULL AND queue IS NULL AND
    status = 'pending';
CREATE INDEX bgjobs_parked ON bgjobs_jobs(parked, root_id) WHERE parked IS NOT NULL;
CREATE INDEX bgjobs_limited ON bgjobs_jobs(name) WHERE max_running IS NOT NULL AND owner IS NOT
    NULL;
CREATE INDEX bgjobs_suspects ON bgjobs_jobs(deaths) WHERE deaths > 0;
CREATE UNIQUE INDEX bgjobs_root_key ON bgjobs_jobs(key) WHERE key IS NOT NULL AND parent_id IS
    NULL AND status IN ('pending', 'running', 'stopping', 'stopped');
CREATE UNIQUE INDEX bgjobs_child_key ON bgjobs_jobs(parent_id, key) WHERE key IS NOT NULL AND
    parent_id IS NOT NULL;
CREATE INDEX bgjobs_logs_of_job ON bgjobs_logs(job_id);
CREATE TABLE orders (id INTEGER PRIMARY KEY, job_id INTEGER);
CREATE VIEW waiting AS SELECT id FROM bgjobs_jobs WHERE status = 'pending';
INSERT INTO bgjobs_schema (version) VALUES (2);
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, returned, created_at,
    started_at, waited, finished_at, duration, label, run_by, args, result) VALUES (1,
    'test_bgjobs.add', 'finished', 1, 104, 1, 1, 999999910.48, 999999910.48, 0.0, 999999910.48,
    0.0001, 'Sum', 'ann', '[20,1]', '21');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, returned, own_errors,
    created_at, run_at, started_at, waited, finished_at, duration, options, args, error) VALUES
    (2, 'test_bgjobs.fail', 'failed', 2, 2017, 1, 2, 2, 999999910.49, 999999910.49, 999999910.49,
    0.0004, 999999910.53, 0.002, '{"retries":1,"backoff":[0.0]}', '["lost"]',
    '{"type":"ValueError","text":"lost","traceback":"Traceback: lost"}');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, created_at, started_at,
    waited, duration, run_by, state) VALUES (3, 'test_bgjobs.count_with_state', 'stopped', 1,
    7983, 1, 999999910.53, 999999910.53, 0.0, 0.0062, 'ann', '{"n":5}');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, created_at, started_at,
    waited, duration, progress, progress_at, gained, seconds, step, args, positions) VALUES (4,
    'test_bgjobs.each_item', 'stopped', 1, 145145, 1, 999999910.54, 999999910.54, 0.0, 0.1434,
    0.244, 999999910.69, 0.244, 0.1425, 0.3925, '[500,"older"]', '[122]');
INSERT INTO bgjobs_jobs (id, name, status, vtime, submitter, low_priority, created_at, run_at,
    options, args, kwargs) VALUES (5, 'test_bgjobs.add', 'pending', 1743, 1, 1, 999999910.7,
    4102444800.0, '{"secret":["b",1]}', '[1]', '{"b":2}');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, returned, open, total, done,
    failed, running, created_at, started_at, waited, since, duration, tree_progress, tree_at,
    tree_gained, tree_seconds, args) VALUES (6, 'test_bgjobs.hold', 'running', 1, 2072665, 1, 1,
    4, 7, 3, 1, 2, 999999910.7, 999999910.7, 0.0, 999999910.71, 0.014, 3.0, 999999910.71, 2.9861,
    0.0147, '["family"]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, parent_id, root_id, submitter, returned,
    created_at, started_at, waited, finished_at, key, args, result) VALUES (7, 'test_bgjobs.add',
    'finished', 1, 6, 6, 1, 1, 999999910.7, 999999910.7, 0.0, 999999910.71, 'first', '[1]', '1');
INSERT INTO bgjobs_jobs (id, name, status, attempt, parent_id, root_id, submitter, returned,
    own_errors, created_at, started_at, waited, finished_at, duration, error) VALUES (8,
    'test_bgjobs.fail', 'failed', 1, 6, 6, 1, 2, 1, 999999910.71, 999999910.71, 0.0, 999999910.71,
    0.0002, '{"type":"ValueError","text":"boom","traceback":"Traceback: boom"}');
INSERT INTO bgjobs_jobs (id, name, status, attempt, parent_id, root_id, charge, owner, submitter,
    created_at, started_at, waited, since, args) VALUES (9, 'test_bgjobs.hold', 'running', 1, 6,
    6, 1030915, 1, 1, 999999910.71, 999999910.71, 0.0, 999999910.71, '["older child"]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, parent_id, root_id, charge, owner, submitter,
    created_at, started_at, waited, since) VALUES (10, 'test_bgjobs.deaf', 'stopping', 1, 6, 6,
    1025729, 1, 1, 999999910.71, 999999910.71, 0.001, 999999910.71);
INSERT INTO bgjobs_jobs (id, name, status, parent_id, root_id, submitter, created_at, run_at,
    args) VALUES (11, 'test_bgjobs.add', 'stopped', 6, 6, 1, 999999910.71, 4102444800.0, '[2]');
INSERT INTO bgjobs_jobs (id, name, status, parent_id, root_id, submitter, created_at, run_at,
    finished_at, args) VALUES (12, 'test_bgjobs.add', 'cancelled', 6, 6, 1, 999999910.71,
    4102444800.0, 999999910.71, '[3]');
INSERT INTO bgjobs_jobs (id, name, status, parent_id, root_id, submitter, created_at, run_at,
    args) VALUES (13, 'test_bgjobs.add', 'pending', 6, 6, 1, 999999910.71, 4102444800.0, '[4]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, returned, open, total,
    running, created_at, started_at, waited, since, duration, args) VALUES (14,
    'test_bgjobs.parent_of_deaf', 'running', 1, 1046345, 1, 1, 1, 1, 1, 999999910.71,
    999999910.71, 0.0, 999999910.71, 0.0005, '[false]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, parent_id, root_id, charge, owner, submitter,
    goes_on, created_at, started_at, waited, since) VALUES (15, 'test_bgjobs.deaf', 'stopping', 1,
    14, 14, 1024070, 1, 1, 1, 999999910.71, 999999910.71, 0.0, 999999910.71);
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, charge, owner, submitter, created_at,
    started_at, waited, since, max_running, args) VALUES (16, 'older limited', 'running', 1, 1055093,
    1023099, 1, 1, 999999910.71, 999999910.71, 0.0, 999999910.71, 1, '["limited"]');
INSERT INTO bgjobs_jobs (id, name, status, vtime, submitter, created_at, phase, parked,
    max_running, args) VALUES (17, 'older limited', 'pending', 31994, 1, 999999910.72, 'limit reached',
    'limit older limited', 1, '["limited"]');
INSERT INTO bgjobs_jobs (id, name, status, vtime, submitter, created_at, waited, duration, phase,
    parked, args) VALUES (18, 'gone.nowhere', 'pending', 32044, 2, 999999910.87, 0.0162, 0.0001,
    'unknown function', 'function gone.nowhere', '[1]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, charge, owner, submitter, created_at,
    started_at, waited, since, key, args) VALUES (19, 'test_bgjobs.hold', 'running', 1, 1128447,
    1096453, 1, 1, 999999910.89, 999999910.89, 0.0, 999999910.89, 'nightly', '["older running"]');
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, submitter, returned, created_at,
    started_at, waited, finished_at, duration) VALUES (20, 'test_bgjobs.log_line', 'finished', 1,
    32161, 1, 1, 999999910.9, 999999910.9, 0.0, 999999910.9, 0.0002);
INSERT INTO bgjobs_jobs (id, name, status, attempt, vtime, returned, created_at, started_at,
    waited, finished_at, label, args, kwargs, result) VALUES (21, 'test_bgjobs.add', 'finished',
    1, 32032, 1, 999999910.9, 999999910.9, 0.0, 999999910.9, 'Often', '[1]', '{"b":1}', '2');
INSERT INTO bgjobs_logs (id, job_id, at, level, message) VALUES (1, 2, 999999910.49, 30,
    'attempt 1 failed; retry 1 of 1 in 0.0 s');
INSERT INTO bgjobs_logs (id, job_id, at, level, message) VALUES (2, 3, 999999910.54, 20, 'stop');
INSERT INTO bgjobs_logs (id, job_id, at, level, message) VALUES (9, 20, 999999910.9, 20,
    'from 1.0.0');
INSERT INTO bgjobs_attempts (job_id, number, started_at, ended_at, outcome, error) VALUES (2, 1,
    999999910.49, 999999910.49, 'failed', 'ValueError: lost');
INSERT INTO bgjobs_attempts (job_id, number, started_at, ended_at, outcome, error) VALUES (2, 2,
    999999910.53, 999999910.53, 'failed', 'ValueError: lost');
INSERT INTO bgjobs_attempts (job_id, number, started_at, ended_at, outcome) VALUES (3, 1,
    999999910.53, 999999910.54, 'stopped');
INSERT INTO bgjobs_attempts (job_id, number, started_at, ended_at, outcome) VALUES (4, 1,
    999999910.54, 999999910.69, 'stopped');
INSERT INTO bgjobs_clock (vtime, counted_id) VALUES (31994, 21);
INSERT INTO bgjobs_runners (id, pid, host, workers, started_at, heartbeat_at, lock_file) VALUES
    (1, 4242, 'host', 12, 999999910.47, 999999910.47, '65024:2299030');
INSERT INTO bgjobs_functions (name, seconds) VALUES ('test_bgjobs.hold', 0.014);
INSERT INTO bgjobs_schedules (id, key, schedule, name, kwargs, label, low_priority, system,
    created_at, next_at) VALUES (1, 'bgjobs.housekeeping', '1h', 'bgjobs.housekeeping',
    '{"finished":604800,"failed":2592000}', 'Housekeeping: remove what is over for long', 0, 1,
    999999910.48, 1000003510.48);
INSERT INTO bgjobs_schedules (id, key, schedule, name, args, kwargs, label, low_priority, system,
    created_at, next_at, last_at, job_id, runs) VALUES (2, 'often', '1h', 'test_bgjobs.add',
    '[1]', '{"b":1}', 'Often', 0, 0, 999999910.9, 1000003510.9, 999999910.9, 21, 1);
INSERT INTO bgjobs_schedules (id, key, schedule, name, args, low_priority, system, created_at,
    next_at, paused) VALUES (3, 'test_bgjobs.add([5])', '30 2 * * *', 'test_bgjobs.add', '[5]', 0,
    0, 999999910.9, 1000033140.0, 1);
INSERT INTO bgjobs_registered (schedule_id, runner_id) VALUES (1, 1);
INSERT INTO bgjobs_registered (schedule_id, runner_id) VALUES (2, 1);
INSERT INTO bgjobs_registered (schedule_id, runner_id) VALUES (3, 1);
INSERT INTO bgjobs_stats (minute, name, created, started, finished, failed, waiting, waiting_min,
    waiting_max, running, running_min, running_max) VALUES (16666665, 'test_bgjobs.add', 7, 3, 3,
    0, 0.0022, 0.0005, 0.0011, 0.0002, 0.0, 0.0001);
INSERT INTO bgjobs_stats (minute, name, created, started, finished, failed, waiting, waiting_min,
    waiting_max, running, running_min, running_max) VALUES (16666665, 'test_bgjobs.fail', 2, 2, 0,
    2, 0.0012, 0.0004, 0.0008, 0.0022, 0.0002, 0.002);
INSERT INTO orders VALUES (1, 1);
"""


@bgjobs.job(name="older limited")
def older_limited(name):
    hold(name)


class TestOlderFiles:
    @pytest.fixture
    def older(self, tmp_path):
        path = str(tmp_path / "older.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(OLDER_FILE)
        return path

    @staticmethod
    def content(path):
        with contextlib.closing(sqlite3.connect(path)) as db:
            return list(db.iterdump())

    def test_a_file_of_1_0_0_has_what_a_new_file_has_and_keeps_all_it_had(
            self, older, idle, make):
        upgraded = make(older, start=False, clock=Clock())
        assert rows(upgraded, "SELECT version FROM bgjobs_schema") == [(bgjobs.SCHEMA_VERSION,)]
        indexes = "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql > '' ORDER BY name"
        old, new = ([" ".join(sql.split()) for sql, in rows(each, indexes)]
                    for each in (upgraded, idle))
        assert old == new
        for table, in rows(idle, "SELECT name FROM sqlite_master WHERE type = 'table'"):
            columns = f"SELECT name, type FROM pragma_table_info('{table}')"
            assert {*rows(idle, columns)} <= {*rows(upgraded, columns)}
        assert rows(upgraded, "PRAGMA integrity_check") == [("ok",)]
        statuses = {job.id: job.status for job in upgraded.jobs()}
        assert statuses == {
            1: "finished", 2: "failed", 3: "stopped", 4: "stopped", 5: "pending", 6: "running",
            7: "finished", 8: "failed", 9: "running", 10: "stopping", 11: "stopped",
            12: "cancelled", 13: "pending", 14: "running", 15: "running", 16: "running",
            17: "pending", 18: "pending", 19: "running", 20: "finished", 21: "finished"}
        finished, failed, stopped, each, scheduled, family = map(upgraded.get, range(1, 7))
        assert (finished.result(), finished.label, finished.run_by) == (21, "Sum", "ann")
        assert "lost" in failed.error and failed.errors == 2 and failed.attempt == 2
        assert (stopped.state, each.progress) == ({"n": 5}, 0.244)
        assert (scheduled.phase, scheduled.kwargs) == ("scheduled", {"b": bgjobs.MASK})
        assert family.children == {"total": 7, "done": 3, "failed": 1, "running": 2}
        assert family.phase == "waiting for children"
        assert [upgraded.get(i).phase for i in (17, 18)] == ["limit reached", "unknown function"]
        assert [line["message"] for line in upgraded.get(20).logs()] == ["from 1.0.0"]
        often, paused = upgraded.schedules()
        assert (often.info()["key"], often.info()["runs"]) == ("often", 1)
        assert paused.info()["paused"]
        total = upgraded.stats("1h")["total"]
        assert (total["created"], total["finished"], total["failed"]) == (9, 3, 2)
        assert upgraded.core.run_times.means["test_bgjobs.hold"] == 0.014
        assert upgraded.submit(add, 1).id == 22
        assert upgraded.options(key="nightly").submit(add, 1).id == 19
        assert upgraded.options(parent=family, key="first").submit(add, 1).id == 7

    def test_what_the_app_has_in_it_stays_as_it_was(self, older, make):
        upgraded = make(older, start=False, clock=Clock())
        assert rows(upgraded, "SELECT * FROM orders") == [(1, 1)]
        assert rows(upgraded, "SELECT id FROM waiting") == [(5,), (13,), (17,), (18,)]

    def test_its_jobs_and_schedules_go_on(self, older, make):
        clock = Clock()
        runner = make(older, max_workers=8, clock=clock)
        again = {9: "pending", 10: "stopped", 15: "pending", 16: "pending", 19: "pending"}
        for job_id, status in again.items():
            messages = [line["message"] for line in runner.get(job_id).logs()]
            assert f"its process died; {status} now" in messages
        consistent(runner)
        for name in ("older child", "deaf", "limited", "older running", "count"):
            gate(name).set()
        seen.clear()
        assert [runner.get(i).result(10) for i in (9, 14, 15, 16, 17, 19)] == [None] * 6
        assert [runner.get(i).attempt for i in (9, 14, 15, 16, 17, 19)] == [2, 1, 2, 2, 1, 2]
        assert runner.get(3).resume().result(10) == [5, 2]
        assert runner.get(4).resume().result(10) == 500
        assert [item for name, *_, item in seen[1:] if name == "older"][0] == 122
        assert runner.get(1).restart().result(10) == 21
        with pytest.raises(bgjobs.JobFailed, match="lost"):
            runner.get(2).result(10)
        with pytest.raises(ValueError, match="lost"):
            runner.get(2).resume().result(10)
        for job_id in (11, 13, 18):
            assert runner.get(job_id).cancel()
        assert runner.get(10).resume().result(10) is None
        family = runner.get(6)
        assert family.result(10) is None and family.attempt == 1
        often = runner.options(key="often").every("1h", add, 1, b=1)
        assert often.id == 2 and often.info()["next_at"] == pytest.approx(clock.now + 3_511)
        clock.now += 3_600
        wait_for(lambda: often.info()["runs"] == 2)
        consistent(runner)

    def test_it_is_refused_while_a_runner_of_1_0_0_lives(self, older, make):
        clock = Clock()
        with contextlib.closing(sqlite3.connect(older)) as db:
            db.execute("UPDATE bgjobs_runners SET heartbeat_at = ?", [clock.now - 15])
            db.commit()
        before = self.content(older)
        with pytest.raises(bgjobs.StoreError, match="in use by bgjobs 1.0.0 in process 4242; stop it"):
            make(older, clock=clock)
        assert self.content(older) == before
        clock.now += 6
        assert make(older, start=False, clock=clock).get(1).result() == 21

    def test_a_migration_that_is_cut_short_leaves_the_file_as_it_was(
            self, older, make, monkeypatch):
        before = self.content(older)
        steps = (*bgjobs.MIGRATIONS[2], "SELECT 1 FROM nothing_there")
        monkeypatch.setitem(bgjobs.MIGRATIONS, 2, steps)
        with pytest.raises(bgjobs.StoreError, match="nothing_there"):
            make(older, start=False, clock=Clock())
        assert self.content(older) == before

    def test_processes_that_open_it_at_once_migrate_it_once(self, older, make):
        code = """
            import sys, bgjobs, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], start=False)
            print(runner.submit(test_bgjobs.add, 1).id)
            runner.close()
        """
        ends = [finish(process) for process in [python(code, older) for _ in range(4)]]
        assert sorted(int(out) for _, out, _ in ends) == [22, 23, 24, 25], ends
        upgraded = make(older, start=False)
        look_for_the_dead(upgraded)
        consistent(upgraded)

    @pytest.mark.parametrize("version", [1, 99])
    def test_a_file_of_any_other_version_is_refused_and_left_alone(self, older, version):
        with contextlib.closing(sqlite3.connect(older)) as db:
            db.execute("UPDATE bgjobs_schema SET version = ?", [version])
            db.commit()
        before = self.content(older)
        with pytest.raises(bgjobs.StoreError, match=f"has schema version {version}, and this bgjobs"):
            bgjobs.Runner(older)
        assert self.content(older) == before


# ---- 8 Transactions --------------------------------------------------------------------------------------------

def limited_nest(depth, kind):
    """Wait for a child that counts for the same limit, or is a suspect too."""
    if depth == 0:
        return 0
    if kind == "limit":
        return 1 + bgjobs.options(name="limited", max_running=1).submit(limited_nest, depth - 1, kind).result()
    child = bgjobs.options(delay=0.02).submit(limited_nest, depth - 1, kind)
    execute(runner_of(child), "UPDATE bgjobs_jobs SET deaths = 2 WHERE id = ?", child.id)
    return 1 + child.result()


def submit_and_fail_once():
    attempt = bgjobs.current_job().attempt
    bgjobs.submit(add, attempt)
    if attempt == 1:
        raise ValueError("no luck")
    return attempt


def deaf():
    """Reach the first checkpoint late."""
    while not gate("deaf").is_set():
        time.sleep(0.002)
    bgjobs.current_job().checkpoint()


def parent_of_deaf(waits):
    child = bgjobs.submit(deaf)
    if waits:
        child.result()


def stop_above_a_deaf_child(runner, waits=True):
    """Stop a parent whose child has not reached a checkpoint yet; return the parent."""
    parent = runner.submit(parent_of_deaf, waits)
    wait_for(lambda: parent.children["running"] == 1)
    stop_and_wait(parent)
    return parent


def fail_by_child():
    bgjobs.submit(hold, "sibling")
    bgjobs.submit(fail).result()


def submit_root():
    return bgjobs.options(parent=None).submit(add, 1).id


def gated(value):
    job = bgjobs.current_job()
    while not gate("sum").is_set():
        job.sleep(0.002)
    return value


def sum_after_gate(count):
    return sum(job.result() for job in [bgjobs.options(key=str(i)).submit(gated, i) for i in range(count)])


def keyed_parent():
    job = bgjobs.current_job()
    jobs = [bgjobs.options(key=f"part {i}").submit(add, i, i) for i in range(3)]
    job.checkpoint(state="submitted")
    while not gate("keyed").is_set():
        job.sleep(1)
    return [job.result() for job in jobs]


def hold_if(name):
    if name:
        hold(name)


class TestFairRunning:
    """The arithmetic on the real thing."""

    def test_equally_hungry_roots_get_equal_time_whatever_the_length_of_their_jobs(self, make):
        runner = make(max_workers=4, start=False)
        roots = [runner.submit(add, i) for i in range(5)]
        for i, root in enumerate(roots):
            runner.options(parent=root).submit_many(nap, [(0.005 * 2 ** i,)] * 400)
        runner.start()
        time.sleep(3)
        runner.close()
        spent = [rows(runner, "SELECT sum(duration) FROM bgjobs_jobs WHERE root_id = ?", root.id)[0][0] for root in roots]
        assert jain(spent) > 0.97, spent         # 0.99 and more over ten seconds, on a quiet machine
        consistent(runner)

    def test_single_jobs_do_not_wait_for_ten_thousand_children(self, make):
        runner = make(max_workers=4, start=False)
        big = runner.submit(add, 1)
        runner.options(parent=big).submit_many(nap, [(0.002,)] * 3_000)
        singles = [runner.submit(add, 1) for _ in range(20)]
        runner.start()
        wait_for(lambda: all(job.done() for job in singles))
        assert big.children["done"] < 1_000

    def test_two_runners_on_one_file_share_it_and_run_nothing_twice(self, make):
        runners = [make(max_workers=2, start=False) for _ in range(2)]
        ids = runners[0].submit_many(note, [(i,) for i in range(500)])
        seen.clear()
        for runner in runners:
            runner.start()
        wait_for(lambda: len(seen) >= 500 and not rows(runners[0], "SELECT 1 FROM bgjobs_jobs WHERE status <> 'finished'"))
        assert sorted(seen) == list(range(500)) and len(ids) == 500
        consistent(runners[0])

    def test_within_a_root_the_oldest_goes_first(self, idle):
        root = idle.submit(add, 1)
        idle.options(parent=root).submit_many(note, [(i,) for i in range(50)])
        seen.clear()
        idle.drain()
        assert seen == list(range(50))

    def test_low_priority_runs_only_when_nothing_normal_is_ready(self, idle):
        seen.clear()
        idle.options(low_priority=True).submit_many(note, [("low",)] * 3)
        idle.submit_many(note, [("normal",)] * 3)
        idle.drain()
        assert seen == ["normal"] * 3 + ["low"] * 3

    def test_low_priority_never_holds_the_last_worker(self, make):
        runner = make(max_workers=2)
        runner.options(low_priority=True).submit_many(hold, [("low",)] * 4)
        wait_for(lambda: len(runner.jobs(status="running")) == 1)
        assert runner.submit(add, 1, 2).result(5) == 3
        assert len(runner.jobs(status="running")) == 1
        waiting = runner.jobs(status="pending")
        assert {job.phase for job in waiting} == {"waiting for low load"}

    def test_a_function_that_turns_out_long_does_not_hold_others_that_were_claimed_ahead(self, make):
        runner = make(max_workers=2)
        for _ in range(10):
            runner.submit(hold_if, None).result(5)
        runner.submit(hold_if, "ahead"), runner.submit(hold_if, "ahead")
        ids = runner.submit_many(hold_if, [(None,)] * 20)
        other = make(max_workers=1)
        wait_for(lambda: all(other.get(i).done() for i in ids), 5)
        consistent(runner)


class TestOutcomes:
    def test_progress_and_outcome_in_one_transaction_are_counted_once(self, idle):
        parent = idle.submit(add, 1)
        idle.options(parent=parent).submit(add, 2)
        attempts = claimed(idle, 2)
        child = attempts[1]
        child.outcome, child.ran = bgjobs.RETURNED, 5.0
        written(idle, lambda tx: (tx.report(child, (0.5, None, None), 4_000_000),
                                  tx.finish([child])))
        assert rows(idle, "SELECT tree_progress, vtime FROM bgjobs_jobs WHERE id = ?", parent.id) == [(1.0, 5_010_000)]
        consistent(idle)

    def test_an_outcome_is_not_counted_for_a_job_that_was_cancelled_at_the_same_clock_reading(self, make):
        idle = make(start=False, clock=lambda: 1_000.0)
        parent = idle.submit(hold, "parent")
        child = idle.options(parent=parent).submit(add, 1)
        attempts = claimed(idle, 2)
        child.stop()
        child.force_stop()
        child.cancel()
        attempts[1].outcome = bgjobs.RETURNED
        ended(idle, *attempts[1:])
        assert child.status == "cancelled" and parent.children["running"] == 0
        consistent(idle)

    def test_a_root_that_is_resumed_has_no_credit(self, idle):
        job = idle.submit(add, 1)
        job.stop()
        written(idle, lambda tx: tx.execute(bgjobs._ADVANCE_CLOCK, {"tag": 50}))
        job.resume()
        assert rows(idle, "SELECT vtime FROM bgjobs_jobs") == [(50,)]

    def test_ids_of_removed_jobs_are_not_given_out_again(self, idle):
        parent = idle.submit(children, 3)
        idle.drain()
        assert [job.id for job in idle.jobs()] == [4, 3, 2, 1]
        parent.restart()
        assert [job.id for job in idle.jobs()] == [1]
        assert idle.submit(add, 1).id == 5
        assert idle.submit_many(add, [(1,)]) == [6]


class TestOperations:
    def test_a_tree_with_a_running_descendant_is_not_restarted_over_it(self, make):
        runner = make(max_workers=2)
        root = runner.submit(children, 1, "hold_if", None)
        root.result(10)
        child = runner.get(root.id + 1)
        with contextlib.closing(sqlite3.connect(runner.path)) as db:
            db.execute("UPDATE bgjobs_jobs SET args = '[\"restarted\"]' WHERE id = ?", [child.id])
            db.commit()
        again = child.restart()
        wait_for(again.running)
        with pytest.raises(bgjobs.InvalidOperation, match="is still running; stop it first"):
            root.restart()
        gate("restarted").set()
        again.result(10)

    def test_stopping_a_tree_stops_all_of_it_and_resume_reopens_it(self, make):
        runner = make(max_workers=2)
        job = runner.submit(sum_after_gate, 6)
        wait_for(lambda: runner.jobs(status="running", name="test_bgjobs.gated"))
        job.stop(by="ann")
        wait_for(lambda: job.status == "stopped" and not runner.jobs(status="stopping"))
        assert "stop by ann" in job.logs()[0]["message"]
        consistent(runner)
        gate("sum").set()
        assert job.resume().result(20) == 15
        consistent(runner)

    @pytest.mark.parametrize("waits", [True, False])
    @pytest.mark.parametrize("by_another_process", [True, False])
    def test_a_resume_takes_the_stop_of_stopping_descendants_back(
            self, make, waits, by_another_process):
        runner = make(max_workers=2)
        parent = stop_above_a_deaf_child(runner, waits)
        child, = runner.jobs(parent=parent)
        assert child.status == "stopping" and parent.operations[:2] == ["resume", "force_stop"]
        assert parent.cancel() is False
        resumer = make(start=False) if by_another_process else runner
        resumer.get(parent.id).resume()
        assert child.status == "running"
        wait_for(lambda: not attempts_of(runner)[child.id].stop_requested)
        gate("deaf").set()
        assert parent.result(10) is None and child.status == "finished" and child.attempt == 1
        consistent(runner)

    def test_a_descendant_that_has_halted_when_its_stop_is_taken_back_runs_again(self, idle):
        parent = idle.submit(add, 1)
        child = idle.options(parent=parent).submit(add, 2)
        attempts = claimed(idle, 2)
        parent.stop()
        for attempt in attempts:
            attempt.request_stop()
            attempt.outcome = bgjobs.HALTED
        ended(idle, attempts[0])
        assert (parent.status, child.status) == ("stopped", "stopping")
        parent.resume()
        assert (parent.status, child.status) == ("pending", "running")
        ended(idle, attempts[1])
        assert (child.status, child.attempt) == ("pending", 1)
        consistent(idle)

    def test_a_stop_takes_the_resume_of_a_stopping_descendant_back(self, make):
        runner = make(max_workers=2)
        parent = stop_above_a_deaf_child(runner)
        parent.resume()
        wait_for(lambda: parent.status == "running")
        parent.stop()
        gate("deaf").set()
        wait_for(lambda: all(job.status == "stopped" for job in runner.jobs()))
        assert parent.children["done"] == 0
        consistent(runner)

    def test_a_force_stop_of_a_stopped_root_reaches_descendants_that_are_still_stopping(self, make):
        runner = make(max_workers=2)
        parent = stop_above_a_deaf_child(runner)
        child, = runner.jobs(parent=parent)
        parent.force_stop()
        assert child.status == "stopped" and parent.status == "stopped"
        with pytest.raises(bgjobs.InvalidOperation, match="is stopped; it can be resumed or cancelled, not force-stopped"):
            parent.force_stop()
        assert parent.cancel() is True and child.status == "cancelled"
        consistent(runner)

    def test_cancel_is_refused_while_a_descendant_runs_and_else_takes_the_tree(self, idle):
        root = idle.submit(add, 1)
        kids = [idle.options(parent=root).submit(add, i) for i in range(3)]
        root.stop()
        assert [kid.status for kid in kids] == ["stopped"] * 3
        kids[0].resume()
        assert root.cancel() is True
        assert [job.status for job in (root, *kids)] == ["cancelled"] * 4
        consistent(idle)

    def test_restart_runs_from_scratch_without_the_former_descendants(self, idle):
        root = idle.submit(children, 3, "fail", "boom")
        idle.drain()
        assert root.errors == 3
        again = root.restart()
        assert again is not root and root.done() and not again.done()
        assert (again.status, again.errors, again.children["total"], again.started_at) == ("pending", 0, 0, None)
        idle.drain()
        assert again.children["total"] == 3
        consistent(idle)

    def test_operations_from_many_threads_against_completing_jobs_have_one_outcome_each(self, make):
        runner = make(max_workers=4)
        ids = runner.submit_many(nap, [(0.001,)] * 400)

        def harass(operation):
            for job_id in ids:
                with contextlib.suppress(bgjobs.InvalidOperation):
                    operate(runner, operation, job_id)
        threads = [threading.Thread(target=harass, args=(operation,)) for operation in ("stop", "force_stop", "resume", "stop")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: not rows(runner, "SELECT 1 FROM bgjobs_jobs WHERE status IN ('running', 'stopping', 'pending')"), 20)
        consistent(runner)
        assert {job.status for job in runner.jobs(limit=1000)} <= {"finished", "stopped"}


def submit_late():
    seen.append("submit late")
    gate("submit late").wait(20)
    return bgjobs.submit(add, 1).id


class TestTrees:
    def test_a_parent_is_over_after_its_last_descendant(self, runner):
        job = runner.submit(children, 5, "hold", "child")
        wait_for(lambda: job.phase == "waiting for children")
        assert (job.status, job.done(), job.children["total"]) == ("running", False, 5)
        gate("child").set()
        assert len(job.result(10)) == 5
        assert job.children == {"total": 5, "done": 5, "failed": 0, "running": 0} and job.progress == 1.0
        consistent(runner)

    def test_a_failed_child_counts_for_its_ancestors_and_fails_none(self, runner):
        job = runner.submit(children, 2, "fail", "boom")
        assert len(job.result(10)) == 2
        assert (job.status, job.errors, job.children["failed"]) == ("finished", 2, 2)
        consistent(runner)

    def test_a_parent_that_lets_a_childs_exception_out_fails_when_its_descendants_are_over(self, runner):
        job = runner.submit(fail_by_child)
        wait_for(lambda: job.errors == 2)
        assert (job.status, job.phase) == ("running", "waiting for children")
        gate("sibling").set()
        with pytest.raises(ValueError, match="boom"):
            job.result(10)
        assert job.status == "failed"
        consistent(runner)

    def test_children_inherit_who_asked_and_the_priority(self, idle):
        parent = idle.options(run_by="ann", low_priority=True).submit(children, 1)
        idle.drain()
        child = idle.get(2)
        assert (child.run_by, child.low_priority, child.parent_id, child.root_id) == ("ann", True, parent.id, parent.id)

    def test_parent_none_makes_a_root_from_inside_a_job(self, idle):
        job = idle.submit(submit_root)
        idle.drain()
        assert idle.get(job.result()).parent_id is None

    def test_a_job_takes_children_from_outside_until_it_is_over(self, idle):
        parent = idle.submit(add, 1)
        child = idle.options(parent=parent).submit(add, 2)
        assert child.parent_id == parent.id and parent.children["total"] == 1
        idle.drain()
        with pytest.raises(bgjobs.InvalidOperation, match="is finished; it takes no children"):
            idle.options(parent=parent).submit(add, 3)
        consistent(idle)

    def test_a_parent_may_be_of_a_runner_that_names_the_file_by_another_path(self, make, idle, tmp_path):
        os.symlink(idle.path, tmp_path / "link.db")
        parent = idle.submit(add, 1)
        assert make(tmp_path / "link.db", start=False).options(parent=parent).submit(add, 2).parent_id == parent.id

    def test_a_stopped_tree_takes_no_children(self, idle):
        root = idle.submit(add, 1)
        root.stop()
        with pytest.raises(bgjobs.InvalidOperation, match="is stopped; it takes no children"):
            idle.options(parent=root).submit(add, 1)

    def test_a_submit_in_a_stopping_tree_raises_even_before_the_attempt_was_told(self, make):
        runner = make(max_workers=1)
        seen.clear()
        job = runner.submit(submit_late)
        wait_for(lambda: "submit late" in seen)
        written(runner, lambda tx: bgjobs.operate(tx, "stop", job.id, None))      # as another process does it
        gate("submit late").set()
        wait_for(lambda: job.status == "stopped")
        assert job.children["total"] == 0

    def test_a_parent_does_not_finish_beside_a_child_that_comes_in_the_same_transaction(self, idle):
        parent = idle.submit(add, 1)
        attempt, = claimed(idle, 1)
        attempt.outcome = bgjobs.RETURNED
        new = bgjobs.Submission("test_bgjobs.add")
        new.parent_id = parent.id
        written(idle, lambda tx: (tx.submit(new), tx.finish([attempt])))
        assert parent.phase == "waiting for children"
        consistent(idle)

    def test_who_waits_for_a_job_that_is_removed_is_told(self, make):
        runner = make(max_workers=2)
        root = runner.submit(children, 1)
        root.result(10)
        child = runner.get(root.id + 1)
        runner.close()
        again = make(start=False)
        again.get(child.id).restart().stop()
        with concurrent.futures.ThreadPoolExecutor(1) as plain:
            waiting = plain.submit(again.get(child.id).exception, 10)
            wait_for(lambda: watched(again))
            again.get(root.id).restart()
            assert "has been removed" in str(waiting.result(10))

    def test_ten_thousand_children_cost_the_store_no_more_each_than_a_hundred(self, idle):
        def writes(count):
            root = idle.submit(add, 1)
            idle.options(parent=root).submit_many(add, [(1,)] * count)
            return statements(idle, lambda tx: [tx.change(root.id), tx.apply()])
        assert writes(10_000) == writes(100)


def let_go(processes):
    """Have processes that say "ready" and then read a line go on at the same time."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", finish(process)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


class TestKeys:
    def test_keyed_children_of_a_parent_that_runs_again_give_back_their_results(self, runner):
        seen.clear()
        job = runner.submit(keyed_parent)
        wait_for(lambda: job.state == "submitted")
        stop_and_wait(job)
        gate("keyed").set()
        job.resume()
        assert job.result(10) == [0, 2, 4] and job.children["total"] == 3

    @pytest.mark.parametrize("inside", [False, True])
    def test_one_key_submitted_by_8_processes_is_one_job(self, idle, path, inside):
        parent = idle.submit(hold, "parent") if inside else None
        processes = [python("""
            import bgjobs, sys, test_bgjobs
            path, parent = sys.argv[1], int(sys.argv[2])
            with bgjobs.Runner(path, start=False) as runner:
                options = {"parent": runner.get(parent)} if parent else {}
                print("ready", flush=True)
                sys.stdin.readline()
                for key in range(20):
                    print(runner.options(key=f"key {key}", **options).submit(test_bgjobs.add, 1).id)
            """, path, parent.id if inside else 0) for _ in range(8)]
        let_go(processes)
        outs = [finish(process) for process in processes]
        assert all(code == 0 for code, _, _ in outs), outs
        assert len({out for _, out, _ in outs}) == 1         # each got the same twenty
        assert rows(idle, "SELECT count(*) FROM bgjobs_jobs WHERE key IS NOT NULL") == [(20,)]
        consistent(idle)

    def test_a_key_gives_back_the_job_that_is_not_over(self, idle):
        first = idle.options(key="k").submit(add, 1)
        assert idle.options(key="k").submit(add, 2).id == first.id
        idle.drain()
        second = idle.options(key="k").submit(add, 2)
        assert second.id != first.id
        with pytest.raises(bgjobs.InvalidOperation, match=f"job {second.id} has its key 'k' now"):
            first.restart()


def holder(path, name, workers=1):
    """Start a process with a runner each of whose workers holds a job, until it is killed."""
    return ready("""
        import bgjobs, sys, test_bgjobs, threading
        path, name, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
        runner = bgjobs.Runner(path, max_workers=workers)
        runner.submit_many(test_bgjobs.hold, [(name,)] * workers)
        test_bgjobs.wait_for(lambda: len(test_bgjobs.seen) == workers)
        print("ready", flush=True)
        threading.Event().wait()
        """, path, name, workers)


executing = []


def count_executing(seconds=0.002):
    executing.append(1)
    seen.append(len(executing))
    time.sleep(seconds)
    executing.pop()


class TestMaxRunning:
    def test_no_more_attempts_of_a_name_run_at_once_and_others_go_past(self, make):
        runner = make(max_workers=4)
        limited = [runner.options(max_running=2).submit(hold, "limited") for _ in range(6)]
        wait_for(lambda: sum(job.status == "running" for job in limited) == 2)
        assert runner.submit(add, 1, 2).result(10) == 3
        assert sorted(job.phase for job in limited) == ["", "", *["limit reached"] * 4]
        consistent(runner)
        gate("limited").set()
        for job in limited:
            job.result(10)
        assert rows(runner, "SELECT count(*) FROM bgjobs_jobs WHERE parked IS NOT NULL") == [(0,)]
        consistent(runner)

    def test_it_holds_over_all_processes(self, make, path):
        idle = make(start=False)
        idle.options(max_running=3).submit_many(count_executing, [()] * 150)
        seen.clear()
        runners = [make(max_workers=4) for _ in range(3)]
        for job_id in range(1, 151):
            idle.get(job_id).result(20)
        assert max(seen) == 3
        consistent(runners[0])

    @pytest.mark.parametrize("ending", ["raise", "stop", "force stop", "cancel", "release", "crash"])
    def test_a_slot_is_free_however_its_attempt_ends(self, make, ending):
        clock = Clock()
        idle = make(start=False, clock=clock)
        first, second, third = (idle.options(max_running=1, delay=n).submit(add, 1, 2) for n in range(3))
        clock.now += 3
        written(idle, bgjobs.wake_due)
        attempt, = claimed(idle, 5)
        assert [second.phase, third.phase] == ["limit reached"] * 2
        if ending == "cancel":
            second.cancel()
            third.stop()
            third.resume()
        if ending == "stop":
            first.stop()
            attempt.outcome = bgjobs.HALTED
        elif ending == "raise":
            attempt.fail(ValueError())
        elif ending == "release":
            attempt.outcome = bgjobs.RELEASED
        elif ending == "cancel":
            attempt.outcome = bgjobs.RETURNED
        if ending == "force stop":
            first.stop()
            first.force_stop()
        elif ending == "crash":
            take_back(idle)
        else:
            ended(idle, attempt)
        consistent(idle)
        for _ in range(3):
            for attempt in claimed(idle, 5):
                attempt.outcome = bgjobs.RETURNED
                ended(idle, attempt)
        assert third.status == "finished" and rows(idle, "SELECT count(*) FROM bgjobs_jobs WHERE parked IS NOT NULL") == [(0,)]
        consistent(idle)

    def test_each_reason_to_be_parked_is_found_once(self, idle):
        for name in ("b", "a", "c"):
            idle.submit(add, 1)
            idle.submit(add, 1)
            execute(idle, """UPDATE bgjobs_jobs SET parked = ?, queue = NULL, lane = NULL
                             WHERE parked IS NULL""", f"limit {name}")
        keys = [row[0] for row in store_of(idle).read(bgjobs.Service.BLOCKED_KEYS)]
        assert keys == ["limit a", "limit b", "limit c"]

    def test_a_thousand_limited_jobs_hold_nobody_up(self, make):
        idle = make(start=False)
        idle.options(max_running=1).submit_many(nap, [(0.05,)] * 1_000)
        behind = idle.submit(add, 1, 2)
        runner = make(max_workers=2)
        assert runner.get(behind.id).result(10) == 3
        consistent(runner)

    @pytest.mark.parametrize("kind", ["limit", "suspect"])
    def test_who_waits_for_descendants_does_not_keep_them_from_running(self, make, kind):
        idle = make(start=False)
        options = {"max_running": 1} if kind == "limit" else {}
        others = idle.options(**options).submit_many(nap, [(0.001,)] * 5) if kind == "suspect" else []
        jobs = [idle.options(name="limited", **options).submit(limited_nest, 3, kind) for _ in range(4)]
        if kind == "suspect":
            execute(idle, "UPDATE bgjobs_jobs SET deaths = 2")
        runner = make(max_workers=4)
        for job in jobs:
            assert runner.get(job.id).result(20) == 3
        for job_id in others:
            runner.get(job_id).result(5)
        consistent(runner)

    def test_descendants_of_a_member_that_runs_neither_count_nor_wait(self, idle):
        limited = idle.options(max_running=2)
        members = [limited.submit(add, n) for n in range(2)]
        running = claimed(idle, 2)
        waiting = limited.submit(add, 2)
        children = [limited.options(parent=member).submit(add, 3) for member in members]
        attempts = claimed(idle, 5)
        assert [attempt.id for attempt in attempts] == [child.id for child in children]
        assert waiting.phase == "limit reached"
        for attempt in (*attempts, running[0]):
            assert waiting.phase == "limit reached"
            attempt.outcome = bgjobs.RETURNED
            ended(idle, attempt)
        attempt, = claimed(idle, 5)
        assert attempt.id == waiting.id
        consistent(idle)

    def test_a_child_that_was_blocked_goes_on_when_a_member_above_it_starts(self, idle):
        limited = idle.options(max_running=1)
        other, member = limited.submit(add, 1), limited.submit(add, 2)
        child = limited.options(parent=member).submit(add, 3)
        attempt, = claimed(idle, 5)
        assert attempt.id == other.id and child.phase == "limit reached"
        attempt.outcome = bgjobs.RETURNED
        ended(idle, attempt)
        assert [each.id for each in claimed(idle, 1)] == [member.id]
        assert [each.id for each in claimed(idle, 1)] == [child.id]
        consistent(idle)


def die():
    os._exit(9)


def fail_until(attempt):
    job = bgjobs.current_job()
    job.checkpoint(state=(job.state or 0) + 1)
    if job.attempt < attempt:
        raise ValueError(f"boom {job.attempt}")
    return job.state


def parent_fails_once():
    child = bgjobs.options(key="child").submit(add, 1, 2)
    if bgjobs.current_job().attempt == 1:
        raise ValueError
    return child.result()


class TestRetries:
    def test_a_failed_attempt_is_repeated_after_a_pause_and_keeps_its_state(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        job = idle.options(retries=2, backoff=[10, 20]).submit(fail_until, 3)
        assert idle.drain() == 1
        assert (job.status, job.phase, job.attempt, job.errors) == ("pending", "retrying", 1, 1)
        assert "boom 1" in job.error and job.info()["run_at"] == clock.now + 10
        assert idle.drain() == 0
        clock.now += 10
        assert idle.drain() == 1 and job.info()["run_at"] == clock.now + 20
        assert [line["message"] for line in job.logs()] == ["attempt 1 failed; retry 1 of 2 in 10.0 s", "attempt 2 failed; retry 2 of 2 in 20.0 s"]
        clock.now += 20
        idle.drain()
        assert (job.status, job.result(), job.attempt, job.errors, job.waiting) == ("finished", 3, 3, 2, 0.0)
        consistent(idle)

    def test_a_parent_whose_retry_returned_is_finished_when_its_children_are(self, make):
        idle = make(start=False)
        job = idle.options(retries=1, backoff=0).submit(submit_and_fail_once)
        idle.drain()
        assert (job.status, job.errors, job.result()) == ("finished", 1, 2) and "no luck" in job.error
        consistent(idle)

    def test_when_no_retries_are_left_it_fails_with_the_last_exception_and_resume_is_one_more_try(self, make):
        runner = make(max_workers=2)
        job = runner.options(retries=2, backoff=0).submit(fail_until, 5)
        with pytest.raises(ValueError, match="boom 3"):
            job.result(10)
        assert (job.status, job.attempt, job.errors) == ("failed", 3, 3)
        with pytest.raises(ValueError, match="boom 4"):
            job.resume().result(10)
        assert job.resume().result(10) == 5
        assert job.restart().result(10) == 1 and job.errors == 0       # from scratch: but what it counts by is the attempt
        consistent(runner)

    def test_the_pause_doubles_up_to_ten_minutes_with_some_chance(self):
        pauses = [[bgjobs.pause_before_retry({}, failures) for _ in range(200)] for failures in range(1, 40)]
        for failures, some in enumerate(pauses, 1):
            first = min(600, 2 ** (failures - 1))
            assert first <= min(some) and max(some) <= min(600, first * 1.5)
            assert first > 400 or max(some) > min(some) * 1.2

    @pytest.mark.parametrize("backoff,pauses", [(3, [3, 3, 3]), ([1, 5], [1, 5, 5]), (lambda attempt: attempt * 7, [7, 14, 21]), (0.5, [0.5] * 3)])
    def test_a_pause_may_be_given(self, idle, backoff, pauses):
        job = idle.options(retries=3, backoff=backoff).submit(add, 1)
        options = json.loads(rows(idle, "SELECT options FROM bgjobs_jobs WHERE id = ?", job.id)[0][0])
        assert [bgjobs.pause_before_retry(options, failures) for failures in (1, 2, 3)] == pauses

    @pytest.mark.parametrize("options,reason", [
        ({"retries": -1}, "retries must be"), ({"retries": True}, "retries must be"), ({"backoff": -1}, "backoff must be"),
        ({"backoff": []}, "backoff must be"), ({"backoff": [1, "2"]}, "backoff must be"), ({"backoff": float("nan")}, "backoff must be"),
        ({"retries": 1, "backoff": lambda attempt: "soon"}, "backoff must give seconds"),
        ({"timeout": 0}, "timeout must be"), ({"timeout": "1"}, "timeout must be"), ({"timeout": float("inf")}, "timeout must be")])
    def test_bad_values_are_refused(self, idle, options, reason):
        with pytest.raises(ValueError, match=reason):
            idle.options(**options).submit(add, 1)

    def test_a_retrying_job_can_be_stopped_and_a_stopping_one_keeps_its_retry(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        job = idle.options(retries=1, backoff=10).submit(fail_until, 2)
        attempt, = claimed(idle, 1)
        job.stop()
        attempt.fail(ValueError("boom"))
        ended(idle, attempt)
        assert (job.status, job.errors) == ("stopped", 1)
        job.resume()
        idle.drain()                                       # at once: somebody has looked at it
        assert (job.status, job.attempt, job.result()) == ("finished", 2, 1)
        consistent(idle)

    def test_a_parent_is_repeated_and_gets_its_keyed_children_back(self, make):
        runner = make(max_workers=2)
        job = runner.options(retries=1, backoff=0).submit(parent_fails_once)
        assert job.result(10) == 3 and job.children["total"] == 1
        consistent(runner)

    def test_a_process_that_dies_uses_no_retry_up(self, make, path):
        finish(python("""
            import os, sys, bgjobs, test_bgjobs
            bgjobs.Runner(sys.argv[1], max_workers=1).options(retries=1).submit(test_bgjobs.die).result()
            """, path))
        idle = make(start=False)
        look_for_the_dead(idle)
        assert (idle.get(1).status, idle.get(1).phase, idle.get(1).errors) == ("pending", "interrupted", 0)


# ---- 9 Store ---------------------------------------------------------------------------------------------------

class Trouble:
    """Call `at(number, sql)` before and `after(sql)` after each statement of all connections."""

    def __init__(self, monkeypatch, at=lambda number, sql: None, after=lambda sql: None):
        trouble = self
        self.statements, self.at, self.after = 0, at, after

        class Connection(sqlite3.Connection):
            def execute(self, sql, *parameters):
                trouble.statements += 1
                trouble.at(trouble.statements, sql)
                cursor = super().execute(sql, *parameters)
                trouble.after(sql)
                return cursor

            def executemany(self, sql, rows):
                trouble.statements += 1
                trouble.at(trouble.statements, sql)
                return super().executemany(sql, rows)
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(
            *arguments, factory=Connection, **options))


def live_again(path, effects, acknowledged, crashes):
    """Open the file after trouble and let all jobs end; none may be lost or run too often."""
    with bgjobs.Runner(path, start=False) as runner:
        consistent(runner)
        assert {job.id for job in runner.jobs(limit=None)} >= set(acknowledged)
        for job in runner.jobs(limit=None, status="stopped"):
            with contextlib.suppress(bgjobs.InvalidOperation):
                job.resume()
        runner.drain()
        consistent(runner)
        jobs = runner.jobs(limit=None)
        statuses = {job.id: job.status for job in jobs}
        assert set(statuses.values()) <= set(bgjobs.OVER), statuses
    runs = pathlib.Path(effects).read_text().split("\n")[:-1] if os.path.exists(effects) else []
    for count in collections.Counter(run.split()[0] for run in runs).values():
        assert count <= 2 + crashes        # once, once more after restart, once for each crash


def sum_of_children(count):
    jobs = [bgjobs.submit(add, i, i) for i in range(count)]
    return sum(job.result() for job in jobs)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that takes root and its full rights")
    yield folder
    for gate in list(gates_made):
        gate.set()
    subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def locked(path, how="IMMEDIATE"):
    """Have another program in a transaction: an immediate one locks the file, a deferred one reads."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"BEGIN {how}")
        other.execute("SELECT count(*) FROM bgjobs_jobs").fetchall()
        yield
        other.execute("COMMIT")


def shared_folder(tmp_path):
    """A folder that another user can reach."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    return folder


def submit_and_commit(path, options):
    with contextlib.closing(sqlite3.connect(path, **options)) as db:
        bgjobs.options(connection=db).submit(add, 1)
        db.commit()




class TestStore:
    def test_eight_writing_processes_and_busy_pools_never_see_a_lock(self, make, path):
        runner = make(max_workers=4)
        writers = [python("""
            import bgjobs, contextlib, sys, time, test_bgjobs
            with bgjobs.Runner(sys.argv[1], start=False) as runner:
                print("ready", flush=True)
                sys.stdin.readline()
                end, count = time.monotonic() + 1, 0
                while time.monotonic() < end:
                    job = runner.options(key=f"{sys.argv[2]} {count}").submit(test_bgjobs.add, 3)
                    if count % 5 == 0:
                        with contextlib.suppress(bgjobs.InvalidOperation):           # it has ended
                            job.stop().resume()
                    count += 1
                runner.submit_many(test_bgjobs.add, [(1, 2)] * 100)
                print(count + 100)
            """, path, n) for n in range(8)]
        let_go(writers)
        ends = [finish(writer) for writer in writers]
        assert {code for code, _, _ in ends} == {0}, [err for _, _, err in ends]
        submitted = sum(int(out) for _, out, _ in ends)
        def are_finished():
            for job in runner.jobs(status="stopped"):            # the stop came when the job was claimed: resume() was too early
                job.resume()
            return rows(runner, "SELECT count(*) FROM bgjobs_jobs WHERE status = 'finished'") == [(submitted,)]
        wait_for(are_finished, 30)
        consistent(runner)

    def test_what_was_rolled_back_is_no_parent_of_the_job_that_gets_its_id(self, idle):
        parent = idle.submit(add, 1)

        def submit_and_fail(tx):
            child, grandchild = submission(idle, add, parent=parent), submission(idle, add)
            grandchild.parent_id = tx.submit(child)
            tx.submit(grandchild)
            raise ValueError
        with pytest.raises(ValueError):
            written(idle, submit_and_fail)
        root = idle.submit(add, 2)
        idle.options(parent=root).submit(add, 3)
        assert (parent.children["total"], root.children["total"]) == (0, 1)
        consistent(idle)

    def test_a_bad_write_in_a_batch_fails_alone(self, idle):
        """Eight threads write at once; half of them ask for a parent that does not exist."""
        barrier, outcomes = threading.Barrier(8), []

        def work(bad):
            barrier.wait()
            for i in range(50):
                try:
                    outcomes.append(written(idle, lambda tx: tx.submit(submission(-1 if bad else None))))
                except bgjobs.InvalidOperation:
                    outcomes.append(None)

        def submission(parent):
            new = bgjobs.Submission("test_bgjobs.add")
            new.parent_id = parent
            return new
        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(None) == 200
        assert sorted(i for i in outcomes if i) == list(range(1, 201))

    def test_readers_do_not_wait_for_a_writer(self, runner):
        job = runner.submit(add, 1)
        job.result(10)
        with locked(runner.path):
            begun = time.monotonic()
            assert job.status == "finished" and runner.jobs(status="finished")
            assert time.monotonic() - begun < bgjobs.LOCK_SECONDS / 2

    def test_a_job_that_ends_beside_a_bad_write_completes_its_handle(self, make):
        runner = make(max_workers=1)
        first, second = (runner.options(delay=1_000).submit(add, 1) for _ in range(2))
        told = []
        for job in (first, second):
            job.add_done_callback(told.append)
        runner.get(first.id).cancel()
        wait_for(lambda: told == [first])
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            threads.submit(written, runner, lambda tx: hold("batch"))
            wait_for(lambda: "batch" in seen)
            bad = threads.submit(written, runner, lambda tx: 1 / 0)
            wait_for(lambda: waiting_writes(runner) == 2)
            good = threads.submit(runner.get(second.id).cancel)
            wait_for(lambda: waiting_writes(runner) == 3)
            gate("batch").set()
            assert isinstance(bad.exception(10), ZeroDivisionError) and good.result(10)
        wait_for(lambda: told == [first, second])

    def test_trouble_after_a_commit_does_not_repeat_the_write(self, idle, caplog):
        def trouble(tx):
            tx.after_commit.append(lambda: 1 / 0)
            return tx.submit(bgjobs.Submission("test_bgjobs.add"))
        assert written(idle, trouble) == 1
        assert len(idle.jobs()) == 1
        wait_for(lambda: "trouble after a commit" in caplog.text)

    def test_an_exception_in_the_leading_thread_hands_the_lead_on(self, idle):
        def interrupt(tx):
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            written(idle, interrupt)
        assert idle.submit(add, 1).id == 1

    def test_a_write_waits_for_another_programs_lock(self, idle):
        with contextlib.closing(sqlite3.connect(idle.path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            threading.Timer(0.3, lambda: other.execute("ROLLBACK")).start()
            assert idle.submit(add, 1).id == 1


class TestFile:
    @pytest.mark.parametrize("content,reason", [(b"text " * 500, "not a database"), (b"\x00" * 5000, "not a database")])
    def test_a_file_that_is_no_database_is_refused_and_left_alone(self, tmp_path, content, reason):
        file = tmp_path / "notes.txt"
        file.write_bytes(content)
        with pytest.raises(bgjobs.StoreError, match=f"{file}.*{reason}.*give the path of a new file"):
            bgjobs.Runner(file)
        assert file.read_bytes() == content

    def test_a_folder_a_missing_folder_and_memory_are_refused_with_the_remedy(self, tmp_path):
        for bad in (tmp_path, tmp_path / "nowhere" / "jobs.db"):
            with pytest.raises(bgjobs.StoreError, match=f"{bad} .*; give the path of a file in a folder that exists"):
                bgjobs.Runner(bad)
        for bad in (":memory:", ""):
            with pytest.raises(ValueError, match="path must name a file"):
                bgjobs.Runner(bad)

    def test_an_empty_file_is_taken(self, tmp_path):
        (tmp_path / "empty.db").touch()
        with contextlib.closing(bgjobs.Runner(tmp_path / "empty.db", start=False)) as runner:
            assert runner.submit(add, 1).id == 1

    @pytest.mark.skipif(os.name == "nt", reason="there a path with two slashes is a server's")
    def test_a_path_may_begin_with_two_slashes(self, make, path):
        assert make("/" + path, max_workers=1).submit(add, 1, 2).result(10) == 3

    def test_sqlite_too_old_is_refused_by_version(self, path, monkeypatch):
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 9))
        with pytest.raises(bgjobs.StoreError, match="is too old; bgjobs needs 3.31"):
            bgjobs.Runner(path)

    def test_the_file_may_be_the_apps_own_database(self, path):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE users (name)")
            db.execute("INSERT INTO users VALUES ('ann')")
            db.commit()
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            runner.submit(add, 1)
            assert rows(runner, "SELECT name FROM users") == [("ann",)]
            tables = {name for name, in rows(runner, "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
            assert {name for name in tables if not name.startswith("bgjobs_")} == {"users"}

    def test_eight_processes_open_a_fresh_path_at_once(self, path):
        code = """
            import sys, bgjobs, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], start=False)
            for i in range(20):
                runner.submit(test_bgjobs.add, i)
            runner.close()
        """
        processes = [python(code, path) for _ in range(8)]
        assert [finish(process)[::2] for process in processes] == [(0, "")] * 8
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            assert counted(runner)["pending"] == 160
            consistent(runner)

    def test_durability_is_how_sqlite_flushes(self, make, path):
        runner = make(durability="power")
        assert runner.submit(add, 1, 2).result(10) == 3
        assert synchronous(runner) == 3
        for journal, durability, level in (                  # EXTRA is 3, NORMAL is 1
                ("delete", "power", 3), ("delete", "process", 1), ("wal", "process", 1)):
            one = make(f"{path} {journal} {durability}", start=False, journal=journal, durability=durability)
            assert synchronous(one) == level


class TestDisk:
    def test_a_full_disk_is_a_clear_error_and_the_runner_goes_on_when_there_is_room(self, small_disk, make, caplog):
        runner = make(small_disk / "jobs.db", max_workers=2)
        kept = [runner.submit(add, 1, 2), runner.submit(hold, "full")]
        wait_for(lambda: kept[1].status == "running" and kept[0].done())
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(bgjobs.StoreError, match="full; make room on the disk"):
            for _ in range(10_000):
                kept.append(runner.submit(echo, "x" * 10_000))
        gate("full").set()
        wait_for(lambda: "cannot record outcomes" in caplog.text or kept[1].done())
        os.unlink(small_disk / "filler")
        assert kept[1].result(20) is None and kept[0].result(1) == 3
        for job in kept[2:]:
            assert len(job.result(20)) == 10_000
        assert runner.submit(add, 2, 3).result(10) == 5
        consistent(runner)

    @pytest.mark.parametrize("what", ["deleted", "replaced"])
    def test_a_file_that_goes_away_is_an_error_within_a_moment_and_is_never_made_anew(self, make, path, tmp_path, what, caplog):
        runner = make(max_workers=1)
        assert runner.submit(add, 1, 2).result(10) == 3
        os.rename(path, tmp_path / "moved.db")
        if what == "replaced":
            shutil.copy(tmp_path / "moved.db", path)
        before = os.path.exists(path) and pathlib.Path(path).read_bytes()
        wait_for(lambda: "replaced while it was in use" in caplog.text, 3)    # also where nobody asks
        with pytest.raises(bgjobs.StoreError, match=f"{re.escape(path)}, or its -wal, was deleted"):
            runner.submit(add, 1)
        assert (os.path.exists(path) and pathlib.Path(path).read_bytes()) == before
        os.replace(tmp_path / "moved.db", path)
        assert runner.submit(add, 2, 3).result(10) == 5      # the right one is back

    @pytest.mark.parametrize("harm", [
        lambda path: os.remove(path + "-wal"), lambda path: os.truncate(path, 0),
        lambda path: (os.truncate(path, 0), pathlib.Path(path + "-wal").unlink(missing_ok=True)),
        lambda path: (os.rename(pathlib.Path(path).parent, pathlib.Path(path).parent.parent / "moved"),
                      pathlib.Path(path).parent.write_text(""))])
    def test_a_file_that_is_harmed_while_it_is_in_use_is_an_error_not_an_acknowledgement(self, tmp_path, harm):
        folder = tmp_path / "folder"
        folder.mkdir()
        path = str(folder / "jobs.db")
        with contextlib.closing(bgjobs.Runner(path, max_workers=1)) as runner:
            assert runner.submit(add, 1, 2).result(10) == 3
            harm(path)
            time.sleep(0.01)                                 # a writer looks every 5 ms
            with pytest.raises(bgjobs.StoreError, match="was deleted, emptied or replaced"):
                runner.submit(add, 1)

    def test_a_link_to_the_file_may_be_used_and_one_that_leads_elsewhere_later_is_an_error(self, make, path, tmp_path):
        link = tmp_path / "link.db"
        link.symlink_to(path)
        runner = make(link, max_workers=1)
        assert runner.submit(add, 1, 2).result(10) == 3 and os.path.exists(path)
        other = runner.backup(tmp_path / "other.db")
        link.unlink()
        link.symlink_to(other)
        time.sleep(0.01)                                     # a writer looks every 5 ms
        with pytest.raises(bgjobs.StoreError, match="or replaced"):
            runner.submit(add, 1)
        link.unlink()
        link.symlink_to(path)
        assert runner.submit(add, 2, 3).result(10) == 5

    def test_an_old_file_in_the_place_of_a_deleted_one_gets_nothing_of_the_new_ones(self, make, path, tmp_path):
        runner = make(max_workers=1)
        runner.submit(add, 1).result(10)
        backup = runner.backup(tmp_path / "backup.db")
        runner.submit(add, 2).result(10)
        runner.close()
        os.replace(backup, path)
        assert len(make(start=False).jobs()) == 1

    def test_a_backup_of_a_busy_file_is_whole_and_runs_elsewhere(self, make, tmp_path):
        runner = make(max_workers=2)
        ids = runner.submit_many(add, [(n, n) for n in range(500)])
        held = runner.submit(hold, "backup")
        wait_for(lambda: held.status == "running")
        copy = runner.backup(tmp_path / "backup.db")
        with pytest.raises(ValueError, match="exists; give the path of a new file"):
            runner.backup(copy)
        gate("backup").set()
        other = make(copy, max_workers=2)
        assert [other.get(job_id).result(10) for job_id in ids] == [2 * n for n in range(500)]
        assert other.get(held.id).result(10) is None
        assert runner.get(held.id).result(10) is None
        consistent(other)
        consistent(runner)

    def test_a_backup_that_cannot_be_made_is_a_clear_error_and_leaves_nothing(self, make, path, tmp_path):
        runner = make(start=False)
        with pytest.raises(bgjobs.StoreError, match="to .*nowhere/b.db: .*; give the path of a file in a folder that exists"):
            runner.backup(tmp_path / "nowhere" / "b.db")
        os.rename(path, path + ".away")
        with pytest.raises(bgjobs.StoreError, match="was deleted"):
            runner.backup(tmp_path / "b.db")
        os.rename(path + ".away", path)
        assert runner.backup(tmp_path / "b.db") == str(tmp_path / "b.db")

    def test_a_backup_to_a_full_disk_leaves_nothing_in_the_way_of_the_next(self, small_disk, make):
        runner = make(start=False)
        runner.submit_many(echo, [("x" * 1000,)] * 3000)
        with pytest.raises(bgjobs.StoreError, match="full; make room on the disk"):
            runner.backup(small_disk / "b.db")
        assert os.listdir(small_disk) == []

    def test_a_file_or_folder_that_cannot_be_written_is_refused_with_the_remedy(self, tmp_path):
        out = printed(python("""
            import bgjobs, os, pathlib, sys
            folder = pathlib.Path(sys.argv[1])
            bgjobs.Runner(folder / "jobs.db").close()
            os.chmod(folder / "jobs.db", 0o444)
            os.chmod(folder, 0o555)
            if os.getuid() == 0:
                os.setuid(65534)
            for name in ("jobs.db", "new.db"):
                before = (folder / name).read_bytes() if (folder / name).exists() else None
                try:
                    bgjobs.Runner(folder / name)
                except bgjobs.StoreError as error:
                    print(error)
                assert ((folder / name).read_bytes() if (folder / name).exists() else None) == before
            """, shared_folder(tmp_path)))
        first, second = out.splitlines()
        assert "jobs.db" in first and "make the file and its folder writable" in first
        assert "new.db" in second and "give the path of a file in a folder that exists and is writable" in second

    def test_a_corrupt_page_is_one_clear_error(self, make, path):
        runner = make(start=False)
        runner.submit_many(add, [(n, n) for n in range(2_000)])
        runner.close()
        content = bytearray(pathlib.Path(path).read_bytes())
        content[4096 * 3:] = bytes(random.Random(1).randbytes(len(content) - 4096 * 3))
        pathlib.Path(path).write_bytes(content)
        with pytest.raises(bgjobs.StoreError, match="malformed; restore it from a backup"):
            broken = make(max_workers=1)
            for job_id in range(1, 2_001):
                broken.get(job_id).info()

    def test_a_lock_of_another_program_is_waited_for_and_then_an_error_the_runner_survives(self, make, path, monkeypatch):
        monkeypatch.setattr(bgjobs, "LOCK_SECONDS", 0.3)
        runner = make(max_workers=1)
        with locked(path), pytest.raises(bgjobs.StoreError, match="locked; another program holds its lock: end it, or wait"):
            runner.submit(add, 1)
        assert runner.submit(add, 1, 2).result(10) == 3

    def test_many_threads_that_wait_for_the_same_lock_get_the_error_together(self, make, path, monkeypatch):
        monkeypatch.setattr(bgjobs, "LOCK_SECONDS", 0.5)
        runner = make(max_workers=1)
        with locked(path), concurrent.futures.ThreadPoolExecutor(40) as threads:
            begun = time.monotonic()
            errors = [future.exception() for future in [threads.submit(runner.submit, add, 1) for _ in range(40)]]
            assert time.monotonic() - begun < 10                 # one wait under way and one for all others, not forty
        assert {type(error) for error in errors} == {bgjobs.StoreError} and len(set(map(id, errors))) == 40
        assert runner.submit(add, 1, 2).result(10) == 3 and len(runner.jobs()) == 1

    def test_going_down_does_not_wait_for_a_lock_of_another_program(self, make, path, monkeypatch):
        runner = make(max_workers=2)
        job = runner.submit(stoppable, "locked out")
        wait_for(lambda: ("locked out", 1) in seen)
        with locked(path), concurrent.futures.ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(runner.submit, add, 1)
            wait_for(lambda: store_of(runner).leader)
            begun = time.monotonic()
            runner.close(timeout=0.3)
            assert isinstance(waiting.exception(), bgjobs.StoreError)
            assert time.monotonic() - begun < bgjobs.LOCK_SECONDS / 2
            monkeypatch.setattr(bgjobs, "LOCK_SECONDS", 0.3)
            with pytest.raises(bgjobs.StoreError, match="locked"):
                make()
        again = make(start=False)
        assert again.get(job.id).status == "running"             # what could not be given back is taken back as a dead one's is
        look_for_the_dead(again)
        assert again.get(job.id).status == "pending"
        consistent(again)

    def test_with_a_rollback_journal_a_commit_waits_for_a_reader(self, make, path, monkeypatch):
        runner = make(journal="delete", start=False)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            with locked(path, "DEFERRED"):
                waiting = thread.submit(runner.submit, add, 1)
                wait_for(lambda: os.path.exists(path + "-journal"))
                time.sleep(4 * bgjobs.LOCK_STEP_SECONDS)         # more than SQLite waits at a time
                assert not waiting.done()
            assert waiting.result(10).id == 1
        monkeypatch.setattr(bgjobs, "LOCK_SECONDS", 0.2)
        with locked(path, "DEFERRED"), pytest.raises(bgjobs.StoreError, match="locked"):
            runner.submit(add, 2)
        assert runner.submit(add, 3).id == 2
        consistent(runner)

    def test_a_torn_wal_leaves_a_prefix_of_history_intact(self, path, tmp_path):
        process = python("""
            import bgjobs, os, sys, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], start=False)
            for n in range(200):
                runner.submit(test_bgjobs.add, n)
            os.kill(os.getpid(), 9)
            """, path)
        finish(process)
        wal = pathlib.Path(path + "-wal").read_bytes()
        assert wal
        pathlib.Path(path + "-wal").write_bytes(wal[:len(wal) * 2 // 3 + 123])
        with bgjobs.Runner(path, start=False) as runner:
            ids = sorted(job.id for job in runner.jobs(limit=1000))
            assert ids == list(range(1, len(ids) + 1)) and 0 < len(ids) < 200
            consistent(runner)

    def test_a_reader_that_pins_the_wal_is_complained_about_and_what_it_left_is_cut(self, make, path, monkeypatch, caplog):
        monkeypatch.setattr(bgjobs, "WAL_LIMIT", 100_000)
        runner = make(max_workers=1)
        with locked(path, "DEFERRED"):
            for _ in range(10):
                runner.options(delay=100).submit_many(echo, [("x" * 1_000,)] * 100)
            hurry(runner)                     # it looks once a minute
            wait_for(lambda: "another program keeps an old read transaction open" in caplog.text)
        hurry(runner)
        wait_for(lambda: os.path.getsize(path + "-wal") < 100_000)

    def test_the_rollback_journal_works_as_well(self, make, path):
        runner = make(journal="delete", max_workers=2)
        assert runner.submit(sum_of_children, 5).result(10) == 20
        assert rows(runner, "PRAGMA journal_mode") == [("delete",)] and not os.path.exists(path + "-wal")
        consistent(runner)


class TestConnection:
    MODES = [{}, {"isolation_level": None}, {"isolation_level": "IMMEDIATE"}, {"isolation_level": "EXCLUSIVE"},
             *([{"autocommit": True}, {"autocommit": False}] if sys.version_info >= (3, 12) else [])]

    @pytest.fixture
    def connect(self, path):
        made = []

        def connect(**options):
            made.append(sqlite3.connect(path, **options))
            return made[-1]
        yield connect
        for db in made:
            db.close()

    def test_a_job_may_submit_through_a_connection_of_its_own_in_any_mode(self, make, path):
        runner = make(max_workers=1)
        for options in self.MODES:
            job = runner.submit(submit_and_commit, path, options)
            job.result(10)
            assert job.children["done"] == 1

    @pytest.mark.parametrize("options", [{"isolation_level": None}, {"autocommit": False}] if sys.version_info >= (3, 12) else
                             [{"isolation_level": None}], ids=str)
    def test_a_deferred_transaction_waits_for_the_lock(self, idle, path, connect, options):
        db = connect(timeout=20, **options)
        idle.options(key="first").submit(add, 1)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            for n in range(5):
                other.execute("BEGIN IMMEDIATE")
                other.execute("CREATE TABLE t%d (x)" % n)
                timer = threading.Timer(0.1, other.execute, ["COMMIT"])
                timer.start()
                if "isolation_level" in options:
                    db.execute("BEGIN")
                idle.options(connection=db, key=f"order {n}").submit(add, 1)
                db.commit()
                timer.join()
        assert len(idle.jobs()) == 6

    def test_the_handle_of_a_submit_that_was_rolled_back_reaches_nobody_elses_job(self, idle, connect):
        db = connect()
        mine = idle.options(connection=db).submit(add, 1)
        db.rollback()
        other = idle.submit(add, 2)
        assert mine.id == other.id
        for use in (mine.cancel, mine.stop, mine.info, mine.logs, lambda: mine.status, lambda: mine.result(0.1)):
            with pytest.raises(KeyError, match="was rolled back"):
                use()
        assert other.status == "pending"

    def test_a_callback_comes_after_the_commit_and_of_a_job_that_is_gone_at_once(self, idle, connect):
        db, told = connect(), []
        mine = idle.options(connection=db).submit(add, 1, 2)
        mine.add_done_callback(told.append)                  # others may see the job after the commit only
        handles_of(idle).look()
        assert mine._state == "PENDING"
        db.commit()
        idle.drain()
        wait_for(lambda: told == [mine])
        assert mine.result(0) == 3
        again, lost = idle.get(mine.id), idle.options(connection=db).submit(add, 1)
        lost.add_done_callback(told.append)
        db.rollback()
        idle.prune(finished=0)
        again.add_done_callback(told.append)
        assert idle.submit(add, 2).id == lost.id
        idle.drain()
        wait_for(lambda: told == [mine, again, lost])
        for gone in (again, lost):
            with pytest.raises(bgjobs.BgjobsError, match=f"job {gone.id} has been removed"):
                gone.result(0)
        assert not handles_of(idle).held and not watched(idle)

    def test_a_connection_of_another_thread_is_a_clear_error(self, idle, connect):
        db = connect()
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            with pytest.raises(bgjobs.StoreError, match="only be used in that same thread"):
                thread.submit(idle.options(connection=db).submit, add, 1).result()

    @pytest.mark.parametrize("options", MODES, ids=str)
    def test_the_job_exists_if_and_only_if_the_apps_transaction_commits(self, runner, connect, options):
        db = connect(**options)
        db.execute("CREATE TABLE orders (id INTEGER)")
        db.commit()
        by_itself = options in ({"isolation_level": None}, {"autocommit": True})
        for end, there in ((db.rollback, by_itself), (db.commit, True)):
            job = runner.options(connection=db).submit(add, 20, 22)         # the first statement: nothing else begins a transaction
            end()
            if there:
                assert runner.get(job.id).result(5) == 42
            else:
                with pytest.raises(KeyError):
                    runner.get(job.id)
        if by_itself:
            db.execute("BEGIN")
        db.execute("INSERT INTO orders VALUES (1)")
        gone = runner.options(connection=db).submit(add, 1)
        ids = runner.options(connection=db).submit_many(add, [(1,), (2,)])
        db.execute("ROLLBACK") if by_itself else db.rollback()
        assert not {gone.id, *ids} & {job.id for job in runner.jobs(limit=None)[:-2]} and len(runner.jobs()) == 1 + by_itself
        if by_itself:
            db.execute("BEGIN")
        db.execute("INSERT INTO orders VALUES (2)")
        jobs = [runner.options(connection=db).submit(add, n) for n in range(3)]
        db.execute("COMMIT") if by_itself else db.commit()
        assert [runner.get(job.id).result(5) for job in jobs] == [0, 1, 2]
        assert db.execute("SELECT id FROM orders").fetchall() == [(2,)]
        db.rollback()
        consistent(runner)

    def test_whatever_the_connections_row_factory_is(self, runner, connect):
        db = connect()
        db.row_factory = lambda cursor, row: dict(zip([c[0] for c in cursor.description], row))
        parent = runner.options(label="Ann's", run_by="ann").submit(hold, "factory")
        wait_for(lambda: parent.status == "running")
        child = runner.options(connection=db, parent=parent, key="k").submit(add, 1)
        assert runner.options(connection=db, parent=parent, key="k").submit(add, 1).id == child.id
        db.commit()
        assert runner.get(child.id).run_by == "ann" and runner.get(child.id).result(5) == 1
        gate("factory").set()
        parent.result(5)
        consistent(runner)

    def test_a_crash_before_the_commit_leaves_nothing(self, path):
        code, _, err = finish(python("""
            import os, sqlite3, sys, bgjobs, test_bgjobs
            with bgjobs.Runner(sys.argv[1], start=False) as runner:
                db = sqlite3.connect(sys.argv[1])
                db.execute("CREATE TABLE orders (id)")
                for commits in (True, False):
                    db.execute("INSERT INTO orders VALUES (?)", (commits,))
                    runner.options(connection=db).submit(test_bgjobs.add, 1)
                    if commits:
                        db.commit()
                os._exit(9)
            """, path))
        assert code == 9, err
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            assert [job.id for job in runner.jobs()] == [1] and rows(runner, "SELECT * FROM orders") == [(1,)]
            assert runner.drain() == 1
            consistent(runner)

    def test_what_cannot_be_is_refused_and_the_apps_transaction_lives(self, runner, connect, tmp_path):
        db = connect()
        with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other, contextlib.closing(sqlite3.connect(":memory:")) as memory:
            with pytest.raises(ValueError, match=r"the connection is to .*other\.db; jobs in"):
                runner.options(connection=other).submit(add, 1)
            with pytest.raises(ValueError, match="a database in memory"):
                runner.options(connection=memory).submit(add, 1)
        db.execute("CREATE TABLE orders (id)")
        over = runner.submit(add, 1)
        over.result(5)
        db.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(bgjobs.InvalidOperation, match="takes no children"):
            runner.options(connection=db, parent=over).submit(add, 1)
        with pytest.raises(TypeError, match="cannot be stored"):
            runner.options(connection=db).submit(add, object())
        db.commit()
        assert db.execute("SELECT * FROM orders").fetchall() == [(1,)]
        with pytest.raises(ValueError, match="connection must be an open"):
            runner.options(connection="app.db")
        with pytest.raises(TypeError, match="connection is an option of one submit"):
            bgjobs.job(connection=db)

    def test_a_transaction_that_has_only_read_is_told_to_begin_immediately(self, runner, connect):
        db = connect(isolation_level=None)
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM bgjobs_jobs").fetchall()
        runner.submit(add, 1).result(5)
        with pytest.raises(bgjobs.StoreError, match="BEGIN IMMEDIATE"):
            runner.options(connection=db).submit(add, 1)
        db.execute("ROLLBACK")
        assert runner.options(connection=db).submit(add, 2).result(5) == 2

    def test_in_djangos_and_flasks_usual_way(self, runner, connect):
        flask = connect(detect_types=sqlite3.PARSE_DECLTYPES)            # Flask's tutorial
        flask.row_factory = sqlite3.Row
        with flask:
            job = runner.options(connection=flask).submit(add, 1)
        assert job.result(5) == 1
        django = connect(isolation_level=None, check_same_thread=False, detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES)
        django.execute("BEGIN")                                          # transaction.atomic()
        django.execute("SAVEPOINT s1")                                   # and one inside it
        gone = runner.options(connection=django).submit(add, 2)
        django.execute("ROLLBACK TO s1")
        django.execute("RELEASE s1")
        job = runner.options(connection=django).submit(add, 3)
        django.execute("COMMIT")
        assert runner.get(job.id).result(5) == 3 and job.id == gone.id   # an id that never was is given out


def in_a_child(function):
    """Call a function in a forked process, and return the id of that.

    The process ends with code 0, or 1 if the function raises.
    """
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return child


def write_down(path):
    """Add a line to a file: which attempt of which job this is."""
    job = bgjobs.current_job()
    with open(path, "a") as file:
        file.write(f"{job.id} {job.attempt}\n")


def sweep_job(effects, count):
    """Save states, make keyed children, wait for them; write down each run."""
    job = bgjobs.current_job()
    write_down(effects)
    if count:
        children = [bgjobs.options(key=str(n)).submit(sweep_job, effects, 0) for n in range(count)]
        for child in job.each(children):
            job.checkpoint(state=child.id)
            child.result()
    return count


def live(path, effects, acknowledge):
    """Do what a runner does in its life, and say which job ids were acknowledged."""
    runner = bgjobs.Runner(path, start=False)
    try:
        parent = runner.submit(sweep_job, effects, 2)
        acknowledge(parent.id)
        for job_id in runner.submit_many(sweep_job, [(effects, 0)] * 3):
            acknowledge(job_id)
        stopped = runner.get(2).stop().resume().set_low_priority()
        runner.drain()
        stopped.restart()
        runner.get(3).restart().cancel()
        runner.drain()
    finally:
        runner.close()


class TestSweeps:
    @pytest.mark.parametrize("part", range(4))
    def test_s1_whichever_statement_fails_the_file_is_intact_and_nothing_acknowledged_is_lost(self, tmp_path, monkeypatch, part):
        with monkeypatch.context() as patched:
            trouble = Trouble(patched)
            live(tmp_path / "count.db", tmp_path / "effects", lambda job_id: None)
        assert trouble.statements > 50
        for number in range(1 + part, trouble.statements + 1, 4):
            path, effects, acknowledged = tmp_path / f"{number}.db", f"{tmp_path}/effects {number}", []

            def fail(count, sql, number=number):
                if count == number and sql != "ROLLBACK":
                    raise sqlite3.OperationalError("disk I/O error")
            with monkeypatch.context() as patched:
                Trouble(patched, fail)
                with contextlib.suppress(bgjobs.BgjobsError):
                    live(path, effects, acknowledged.append)
            live_again(path, effects, acknowledged, crashes=1)

    def test_s2_a_crash_before_or_after_any_commit_loses_nothing_acknowledged(self, tmp_path):
        out = printed(python("""
            import os, pathlib, pytest, sys, test_bgjobs
            folder = pathlib.Path(sys.argv[1])

            def code_of(function):
                return os.waitpid(test_bgjobs.in_a_child(function), 0)[1] >> 8

            def crash_at(number, when, path, effects, acknowledged):
                commits = 0
                def count(sql, mine):
                    nonlocal commits
                    commits += mine and sql == "COMMIT"
                    if mine and sql == "COMMIT" and commits == number:
                        os._exit(9)
                def note(job_id):
                    with open(acknowledged, "a") as file:
                        print(job_id, file=file)
                with pytest.MonkeyPatch.context() as patched:
                    test_bgjobs.Trouble(patched, lambda _, sql: count(sql, when == "before"), lambda sql: count(sql, when == "after"))
                    test_bgjobs.live(path, effects, note)

            number, crashes = 0, 0
            while True:
                number += 1
                codes = []
                for when in ("before", "after"):
                    path, effects, acknowledged = (str(folder / f"{kind} {when} {number}") for kind in ("db", "effects", "ids"))
                    codes.append(code_of(lambda: crash_at(number, when, path, effects, acknowledged)))
                    ids = [int(line) for line in open(acknowledged)] if os.path.exists(acknowledged) else []
                    assert code_of(lambda: test_bgjobs.live_again(path, effects, ids, 1)) == 0, (when, number)
                assert set(codes) <= {0, 9}, codes                 # how many commits there are depends on the time a little
                crashes += 2
                if codes == [0, 0]:
                    break
            print(crashes)
            """, tmp_path), 120)
        assert int(out) > 40


# ---- 10 What people see ----------------------------------------------------------------------------------------

def hold_and_log(name):
    bgjobs.current_job().log.info("one")
    bgjobs.current_job().log.warning("two")
    hold(name)


class TestWhatPeopleSee:
    @pytest.mark.parametrize("most,few,limit", [(20_000, 10_000, 10_001), (12, 20, 10_001), (40, 6, 6)])
    def test_what_people_search_for_is_found_page_by_page_and_counted_as_far_as_it_goes(self, idle, monkeypatch, most, few, limit):
        monkeypatch.setattr(bgjobs, "COUNT_LIMIT", limit)
        monkeypatch.setattr(bgjobs, "SEARCH_LIMIT", most)
        monkeypatch.setattr(bgjobs, "FEW", few)
        chance = random.Random(7)
        jobs = []
        for n in range(120):
            parents = jobs[71:] if n > 70 else jobs[:71]             # those that are not over
            parent = chance.choice(parents) if parents and chance.random() < 0.4 else None
            function = chance.choice([add, note, fail])
            options = {"delay": 50} if chance.random() < 0.1 else {"low_priority": True} if chance.random() < 0.2 else {}
            jobs.append(idle.options(parent=parent, run_by=chance.choice(["ann", "bob", None]), system=chance.random() < 0.1,
                                     **options).submit(function, n))
            if n == 70:
                idle.drain()
        for job in jobs[-30::3]:
            with contextlib.suppress(bgjobs.InvalidOperation):       # system jobs are not stopped; cancelled ones are over
                job.stop() if chance.random() < 0.5 else job.cancel()
        middle = jobs[60].created_at
        values = {"status": [*bgjobs.STATUSES, ["failed", "pending"]], "name": ["test_bgjobs.add", "nobody"], "run_by": ["ann", "x"],
                  "errors": [True, False], "low_priority": [True], "q": ["note", "11", "nothing"], "parent": [None, jobs[0].id, jobs[1]],
                  "system": [True], "created_from": [middle], "created_to": [middle]}
        for _ in range(150):
            filters = {name: chance.choice(values[name]) for name in chance.sample(sorted(values), chance.choice([0, 1, 1, 2, 3]))}
            where, parameters = bgjobs.conditions(filters)
            everywhere = [(row["id"], row["status"]) for row in store_of(idle).read(
                f"SELECT id, status FROM bgjobs_jobs WHERE {' AND '.join(where) or '1'} ORDER BY id DESC", parameters)]
            expected = [job_id for job_id, status in everywhere if status in (filters.get("status") or bgjobs.STATUSES)]
            assert bgjobs.find_jobs(store_of(idle), filters, None) == (expected, None)
            found, before = [], None
            while True:
                ids, before = bgjobs.find_jobs(store_of(idle), filters, 7, before, most)
                found += ids
                if before is None:
                    break
            assert found == expected, filters
            counts, unsure = bgjobs.count_jobs(store_of(idle), filters)
            for status in bgjobs.STATUSES:
                real = [each for _, each in everywhere].count(status)
                assert counts[status] == min(real, limit) or status in unsure and counts[status] < real, (filters, status)
            assert not unsure or most < 100

    def test_filters_combine_and_bad_ones_are_named(self, idle):
        ann = idle.options(run_by="ann", label="100% of_it", low_priority=True).submit(add, 1, 2)
        bob = idle.options(run_by="bob").submit(fail, "needle")
        hidden = idle.options(system=True).submit(add, 1)
        idle.drain()

        def ids(**filters):
            return [job.id for job in idle.jobs(**filters)]
        assert ids() == [bob.id, ann.id] and ids(system=True) == [hidden.id, bob.id, ann.id]
        assert ids(run_by="ann") == [ann.id] and ids(low_priority=True) == [ann.id] and ids(errors=True) == [bob.id]
        assert ids(status="failed") == [bob.id] == ids(q="NEEDLE") == ids(name="test_bgjobs.fail")
        assert bob.id in ids(q=str(bob.id)) and ids(q="100% of_") == [ann.id] and ids(q="100%_of") == []
        assert ids(status="failed", run_by="ann") == [] and ids(limit=1) == [bob.id]
        assert ids(created_from=ann.created_at, created_to=ann.created_at) == [ann.id]
        idle.options(run_by="m").submit(echo, 'M\u00fcller "x"')
        assert [job.run_by for job in idle.jobs(q='m\u00fcller "X')] == ["m"] and ids(status=None, run_by="m")
        abroad = idle.options(label="\u00dcber").submit(note, "\u00c4pfel")
        assert ids(q="\u00dcBER") == ids(q="\u00c4PFEL") == [abroad.id] == ids(parent="none", status=["pending"], limit=1)
        for name, bad in (("status", "done"), ("status", ["failed", 1]), ("name", 5), ("errors", "perhaps"), ("parent", -1),
                          ("created_from", float("nan")), ("created_to", 10 ** 400), ("limit", -1)):
            with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
                ids(**{name: bad})
        with pytest.raises(TypeError, match="unknown filter 'colour'"):
            ids(colour=1)

    def test_the_log_of_a_tree_has_its_childrens_lines(self, runner):
        job = runner.submit(children, 2, "hold_and_log", "tree log")
        gate("tree log").set()
        job.result(10)
        assert job.logs() == [] and len(job.logs(tree=True)) == 4
        assert [line["job_id"] for line in job.logs(tree=True, level="WARNING")] == [2, 3]


# ---- 11 Worker pool --------------------------------------------------------------------------------------------

def low_parent():
    bgjobs.submit(add, 1).result()
    gate("low parent").wait(20)


def nested(depth):
    return 0 if depth == 0 else 1 + bgjobs.submit(nested, depth - 1).result()


def tree(width, depth):
    if depth == 0:
        return 1
    return sum(job.result() for job in [bgjobs.submit(tree, width, depth - 1) for _ in range(width)])


others = []


def wait_elsewhere():
    return others[-1].submit(add, 1, 2).result()


def wait_inside(how):
    jobs = [bgjobs.submit(add, i, i) for i in range(5)]
    if how == "map":
        return sum(bgjobs.options().map(add, range(5), range(5)))
    ready = concurrent.futures.as_completed(jobs) if how == "as_completed" else concurrent.futures.wait(jobs).done
    return sum(job.result() for job in ready)


async def nested_coroutine(depth):
    return 0 if depth == 0 else 1 + await bgjobs.submit(nested_coroutine, depth - 1)


async def await_child(function, *arguments):
    return await bgjobs.submit(globals()[function], *arguments)


async def await_for_a_moment():
    child = bgjobs.submit(hold, "too long")
    while not child.running():
        await asyncio.sleep(0.001)
    try:
        await asyncio.wait_for(child, 0.05)
    except asyncio.TimeoutError:
        seen.append(["cancelled", child.status])


async def wait_in_threads():
    jobs = [bgjobs.submit(count_executing) for _ in range(4)]
    await asyncio.gather(*(asyncio.to_thread(job.result) for job in jobs))


def leave_a_waiting_thread():
    attempt, child = bgjobs.current_attempt(), bgjobs.submit(hold, "left waiting")
    threading.Thread(target=contextvars.copy_context().run, args=(child.result,), daemon=True).start()
    wait_for(lambda: not has_place_in(attempt.backend.dispatch.pool, attempt))


def poll_children():
    left = {bgjobs.submit(add, i) for i in range(3)}
    while left:
        left = concurrent.futures.wait(left, timeout=0.001).not_done


def fan_out(depth):
    count_executing()
    if depth:
        for job in [bgjobs.submit(fan_out, depth - 1) for _ in range(4)]:
            job.result()
        count_executing(0.001)


class TestWorkerPool:
    def test_waiting_for_a_job_of_another_runner_gives_the_right_place_away(self, make, tmp_path):
        one, two = make(max_workers=1), make(str(tmp_path / "two.db"), max_workers=1)
        others.append(two)
        assert one.submit(wait_elsewhere).result(10) == 3
        wait_for(lambda: [places(runner) for runner in (one, two)] == [(0, 0), (0, 0)])

    def test_max_workers_1_and_a_recursion_50_deep(self, make):
        runner = make(max_workers=1)
        assert runner.submit(nested, 50).result(30) == 50
        consistent(runner)

    def test_as_many_parents_as_workers_wait_for_3_children_4_deep(self, make):
        runner = make(max_workers=3)
        jobs = [runner.submit(tree, 3, 4) for _ in range(3)]
        assert [job.result(60) for job in jobs] == [81] * 3
        consistent(runner)

    @pytest.mark.parametrize("waiting", ["as_completed", "wait", "map"])
    def test_the_ways_to_wait_inside_a_job_give_the_place_away(self, make, waiting):
        runner = make(max_workers=1)
        assert runner.submit(wait_inside, waiting).result(20) == 20

    def test_await_of_a_child_gives_the_place_away(self, make):
        runner = make(max_workers=1)
        assert runner.submit(nested_coroutine, 10).result(20) == 10

    def test_an_await_that_is_cancelled_leaves_the_child_running_and_no_place_taken(self, make, caplog):
        runner = make(max_workers=2)
        parent = runner.submit(await_for_a_moment)
        wait_for(lambda: ["cancelled", "running"] in seen and free_places(runner) == 1)
        gate("too long").set()
        assert parent.result(10) is None
        wait_for(lambda: free_places(runner) == 2)
        assert caplog.text == ""

    def test_a_stop_of_a_job_that_awaits_its_child_reaches_it(self, make):
        runner = make(max_workers=2)
        parent = runner.submit(await_child, "hold", "awaited")
        wait_for(lambda: "awaited" in seen and free_places(runner) == 1)
        parent.stop()
        wait_for(lambda: parent.status == "stopped" and free_places(runner) == 1)

    def test_a_job_that_awaits_its_child_does_not_hold_the_exit_up(self, path):
        process = ready("""
            import bgjobs, sys, test_bgjobs
            bgjobs.GRACE_SECONDS = 0.6
            runner = bgjobs.Runner(sys.argv[1], max_workers=1)
            runner.submit(test_bgjobs.await_child, "hold", "exit")
            test_bgjobs.wait_for(lambda: test_bgjobs.seen)
            print("ready", flush=True)
        """, path)
        assert finish(process)[::2] == (0, "")

    def test_several_waiting_threads_of_one_job_give_one_place_away(self, make):
        runner = make(max_workers=2)
        seen.clear()
        for job in [runner.submit(wait_in_threads) for _ in range(3)]:
            job.result(20)
        assert max(seen) <= 2

    def test_several_threads_of_one_job_that_wait_in_turns_keep_no_place_and_ask_for_one(self, idle):
        idle.submit_many(add, [(1,)] * 2)
        one, two = claimed(idle, 2)
        pool = bgjobs.Pool(1, lambda attempt: gate(attempt.id).wait(20), lambda attempt: False,
                           lambda: None)
        pool.put([one])
        pool.leave(one)
        pool.put([two])
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            first = thread.submit(pool.come_back, one)
            wait_for(lambda: one.waits == 0)
            pool.leave(one)                                  # its second thread
            pool.come_back(one)                              # one place is asked for already
            pool.leave(one)
            assert not first.done() and not has_place_in(pool, one)
            gate(two.id).set()
            first.result(10)
        assert has_place_in(pool, one)
        pool.leave(one)                                      # now both wait
        assert not has_place_in(pool, one)
        pool.come_back(one)
        assert not has_place_in(pool, one)
        pool.come_back(one)
        assert has_place_in(pool, one)
        gate(one.id).set()
        pool.close(1)

    def test_a_job_whose_function_returns_while_a_thread_of_it_waits_gives_no_place_back_that_it_has_not(self, make):
        runner = make(max_workers=1)
        job = runner.submit(leave_a_waiting_thread)
        wait_for(lambda: job.phase == "waiting for children" and runner.get(job.id + 1).running())
        assert free_places(runner) == 0
        gate("left waiting").set()
        job.result(10)
        wait_for(lambda: free_places(runner) == 1)

    def test_parents_that_poll_do_not_starve_their_children(self, make):
        runner = make(max_workers=1)
        jobs = [runner.submit(poll_children) for _ in range(10)]
        assert not concurrent.futures.wait(jobs, 20).not_done

    def test_never_more_attempts_execute_than_there_are_workers(self, make):
        runner = make(max_workers=3)
        seen.clear()
        runner.submit(fan_out, 3).result(30)
        assert max(seen) <= 3

    def test_drain_runs_children_that_a_job_waits_for(self, idle):
        job = idle.submit(nested, 5)
        idle.drain()
        assert job.result() == 5


def wait_for_held(name):
    return bgjobs.submit(hold, name).result()


class TestLowPriority:
    def test_low_priority_set_on_a_running_parent_holds_for_its_later_children(self, make):
        runner = make(max_workers=2)
        seen.clear()
        job = runner.submit(submit_late)
        wait_for(lambda: "submit late" in seen)
        job.set_low_priority()
        gate("submit late").set()
        job.result(10)
        assert runner.get(job.id + 1).low_priority is True

    def test_low_priority_set_and_removed_on_running_jobs_moves_the_places_they_hold(self, make):
        runner = make(max_workers=2)
        first = runner.options(low_priority=True).submit(hold, "first")
        second = runner.options(low_priority=True).submit(hold, "second")
        wait_for(lambda: first.status == "running")
        wait_for(lambda: second.phase == "waiting for low load")
        first.set_low_priority(False)
        wait_for(lambda: second.status == "running")
        gate("first").set()
        first.result(10)
        third, normal = runner.options(low_priority=True).submit(hold, "third"), runner.submit(hold, "normal")
        wait_for(lambda: normal.status == "running")
        assert third.status == "pending"
        normal.set_low_priority()
        gate("second").set()
        second.result(10)
        assert runner.submit(add, 1, 2).result(10) == 3      # the reserve is left alone
        assert third.status == "pending"
        gate("normal").set()
        gate("third").set()
        third.result(10)
        assert places(runner)[1] == 0

    def test_low_priority_set_on_all_that_runs_leaves_room_for_a_normal_job(self, make):
        runner = make(max_workers=2)
        held = [runner.submit(hold, f"low {n}") for n in range(2)]
        wait_for(lambda: [job.status for job in held] == ["running"] * 2)
        for job in held:
            job.set_low_priority()
        assert runner.submit(add, 1, 2).result(10) == 3
        normal = runner.submit(hold, "low 1")
        wait_for(lambda: normal.status == "running")
        second = runner.submit(add, 1, 2)
        gate("low 0").set()
        assert held[0].result(10) is None
        assert sum(places(runner)) == 2                      # two places again, both taken
        gate("low 1").set()
        assert second.result(10) == 3
        normal.result(10)
        held[1].result(10)
        wait_for(lambda: places(runner) == (0, 0))

    def test_low_priority_parents_that_wait_for_the_low_place_keep_no_normal_job_waiting(self, make):
        runner = make(max_workers=2, start=False)
        parents = [runner.options(low_priority=True).submit(wait_for_held, f"child {n}") for n in range(2)]
        runner.start()                                       # with both there, so that neither child comes before a parent
        wait_for(lambda: parents[0].children["total"] == 1 and parents[1].children["total"] == 1)
        wait_for(lambda: places(runner)[1] == 1)
        assert runner.submit(add, 1, 2).result(10) == 3
        gate("child 0").set()
        assert runner.submit(add, 1, 2).result(10) == 3
        gate("child 1").set()
        for parent in parents:
            parent.result(10)

    def test_low_priority_set_by_another_process_moves_the_place(self, make, path):
        runner = make(max_workers=2)
        first = runner.options(low_priority=True).submit(hold, "one")
        second = runner.options(low_priority=True).submit(add, 1, 2)
        wait_for(lambda: first.status == "running")
        in_another_process(path, "runner.get(1).set_low_priority(False)")
        assert second.result(10) == 3

    def test_low_priority_parents_that_return_from_a_wait_leave_one_place(self, make):
        runner = make(max_workers=2)
        low = [runner.options(low_priority=True).submit(low_parent) for _ in range(4)]
        wait_for(lambda: any(job.children["done"] for job in low))
        assert runner.submit(add, 1, 2).result(5) == 3
        gate("low parent").set()
        for job in low:
            job.result(10)


# ---- 12 Inside a job -------------------------------------------------------------------------------------------

def each_item(count, name="each"):
    job = bgjobs.current_job()
    for item in job.each(range(count)):
        seen.append((name, job.attempt, item))
        if gate(name).is_set():
            job.sleep(0.001)
    return count


def context_seen():
    job = bgjobs.current_job()
    return [job.id, job.name, job.run_by, job.attempt, job.stop_requested]


def public_names():
    return [name for name in dir(bgjobs.current_job()) if not name.startswith("_")]


async def coroutine(value):
    await asyncio.sleep(0)
    return [value, bgjobs.current_job().id]


def count_with_state():
    job = bgjobs.current_job()
    n = begun = (job.state or {"n": 0})["n"]
    while not gate("count").is_set():
        n += 1
        job.checkpoint(state={"n": n})
        job.sleep(0.001)
    return [begun, job.attempt]


class Evil:
    def __repr__(self):
        raise RuntimeError("evil")
    __hash__ = object.__hash__


def odd(what):
    if what in ("fraction", "decimal"):
        one = fractions.Fraction(1) if what == "fraction" else decimal.Decimal(1)
        bgjobs.current_job().progress(one, 2 * one)
        raise ValueError
    if what == "set":
        return {Evil()}
    return type("Odd", (), {"__module__": None})()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")
    __repr__ = __str__


class NoAttributes(Exception):
    def __getattribute__(self, name):
        raise KeyError(name)


class Falsy(Exception):
    def __len__(self):
        return 0


class AmbiguousError(Exception):
    def __bool__(self):
        raise ValueError


STRANGE = {"Unprintable": Unprintable, "CancelledError": asyncio.CancelledError,
           "NoAttributes": NoAttributes, "Falsy": Falsy, "Ambiguous": AmbiguousError}


def exception_named(name):
    return STRANGE.get(name) or vars(builtins)[name]


def raise_it(name):
    raise exception_named(name)()


class Ambiguous:
    """Has neither truth nor falsehood, as an array of numpy's."""

    def __bool__(self):
        raise ValueError("the truth value is ambiguous")

    def __str__(self):
        return "ambiguous"


def nested_each():
    job = bgjobs.current_job()
    for outer in job.each("abc"):
        for inner in job.each(range(4)):
            seen.append((outer, inner))
            if (outer, inner) == ("b", 1):
                gate("nested each").wait(20)


def nap_in_turns(turns, seconds):
    for _ in bgjobs.current_job().each(range(turns)):
        time.sleep(seconds)


def nested_progress():
    job = bgjobs.current_job()
    for outer in job.each(range(4)):
        for inner in job.each("abcd"):
            if (outer, inner) == (2, "c"):
                assert gate("nested progress").wait(20)


def haunt(other):
    job = bgjobs.current_job()
    seen.append("haunt")
    with contextlib.suppress(bgjobs.JobStopped):
        gate("haunt").wait(20)
    for attempt in (lambda: bgjobs.options(parent=None).submit(add, 1), lambda: bgjobs.get(other).stop(), job.checkpoint,
                    lambda: job.log.info("still here")):
        with pytest.raises(bgjobs.JobStopped):
            attempt()
    seen.append("haunted")


leaking = contextvars.ContextVar("leaking", default=None)


def leak():
    before = leaking.get()
    leaking.set(1)
    return before


def bad_state():
    try:
        bgjobs.current_job().checkpoint(state={1: 2})
    except TypeError as error:
        return str(error)


class NoText:
    def __str__(self):
        raise ValueError("no text")
    __repr__ = __str__


def report_object(message):
    kinds = {"Ambiguous": Ambiguous, "NoText": NoText}
    bgjobs.current_job().progress(1, 4, kinds[message]() if message in kinds else eval(message))
    gate("progress").wait(20)
    bgjobs.current_job().progress(2, 4, kinds[message]() if message in kinds else eval(message))
    raise KeyError


def each_with_total(total):
    for _ in bgjobs.current_job().each(iter("ab"), total):
        pass


def stop_in_groups(only):
    try:
        while True:
            bgjobs.current_job().sleep(0.01)
    except bgjobs.JobStopped as stop:
        inner = builtins.BaseExceptionGroup("inner", [bgjobs.JobStopped()] if only else [bgjobs.JobStopped(), ValueError()])
        raise builtins.BaseExceptionGroup("outer", [inner, stop]) from None


def write_strange_logs():
    log = bgjobs.current_job().log
    logging.makeLogRecord({"name": "app", "levelno": 20, "msg": "made, not emitted"})
    record = logging.LogRecord("app", 20, "f", 1, "no time", (), None)
    record.created = float("nan")
    log.handle(record)
    log.log(1000, "high")
    logging.raiseExceptions = False
    log.info(NoText())
    logging.raiseExceptions = True
    return "logged"


def report_progress():
    bgjobs.current_job().progress(25, 100, "a quarter")
    gate("progress").wait(20)


def report_next_to_nothing():
    bgjobs.current_job().progress(5e-324, 1)
    gate("next to nothing").wait(20)


def write_logs():
    bgjobs.current_job().log.info("from the job %d", 1)
    logging.getLogger("app.module").warning("from the app")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("app").exception("failed")
    logging.raiseExceptions = False
    bgjobs.current_job().log.info("%d", "no number")
    logging.raiseExceptions = True


async def log_from_everywhere():
    app = logging.getLogger("app")
    app.warning("from a coroutine")

    async def task():
        app.warning("from a task")
    await asyncio.create_task(task())
    await asyncio.to_thread(app.warning, "from a thread")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(contextvars.copy_context().run, app.warning, "from an executor").result()


class TestInsideAJob:
    def test_outside_a_job_everything_works_and_does_nothing(self):
        job = bgjobs.current_job()
        job.checkpoint(state=1)
        job.progress(1, 2)
        job.sleep(0)
        job.log.debug("nothing")
        assert list(job.each([1, 2])) == [1, 2]
        assert (job.id, job.state, job.stop_requested, job.attempt) == (None, None, False, 0)

    def test_it_shows_eleven_names_and_no_other(self, idle):
        job = idle.submit(public_names)
        idle.drain()
        assert job.result() == public_names() == sorted((
            "id", "name", "run_by", "attempt", "state", "stop_requested", "checkpoint",
            "progress", "each", "sleep", "log"))

    def test_the_context_tells_who_and_what(self, runner):
        job = runner.options(run_by="ann").submit(context_seen)
        assert job.result(10) == [job.id, "test_bgjobs.context_seen", "ann", 1, False]

    def test_coroutines_run_to_completion_in_their_context(self, runner):
        job = runner.submit(coroutine, 7)
        assert job.result(10) == [7, job.id]

    def test_progress_and_messages_show_within_a_second(self, runner):
        job = runner.submit(report_progress)
        wait_for(lambda: job.progress == 0.25 and job.info()["message"] == "a quarter", 2)
        gate("progress").set()
        assert job.result(10) is None and job.progress == 1.0

    def test_the_estimate_of_a_steady_job_counts_down_and_the_next_one_is_estimated_from_it(self, make):
        runner = make(max_workers=1)
        job, begun = runner.submit(nap_in_turns, 40, 0.05), time.monotonic()
        wait_for(lambda: (job.progress or 0) >= 0.3)
        looks = []
        while (info := job.info())["eta"] is not None:
            looks.append((time.monotonic() - begun, info["eta"]))
            time.sleep(0.02)
        assert job.result(10) is None
        took = time.monotonic() - begun
        ends = sorted(at + eta for at, eta in looks)
        assert ends[len(ends) // 2] == pytest.approx(took, rel=0.25)     # the machine may be slow for a moment, not all the time
        following = runner.submit(hold, "following")
        assert following.eta is None
        gate("following").set()
        following.result(10)
        unreported = runner.submit(nap, 0.3)
        unreported.result(10)
        known = "SELECT 1 FROM bgjobs_functions WHERE name = 'test_bgjobs.nap'"
        wait_for(lambda: rows(runner, known))                # written within a second
        again = runner.submit(nap, 0.3)
        assert 0 < wait_for(lambda: again.eta) <= unreported.duration + 0.1

    def test_an_estimate_that_is_beyond_all_numbers_is_none(self, runner):
        job = runner.submit(report_next_to_nothing)
        wait_for(lambda: job.progress is not None)
        assert job.progress == 5e-324 and job.eta is None
        gate("next to nothing").set()

    def test_nested_loops_report_one_progress(self, make):
        runner = make(max_workers=1)
        job = runner.submit(nested_progress)
        wait_for(lambda: job.progress == pytest.approx(0.625))       # two of four, and half of the third
        gate("nested progress").set()
        assert job.result(10) is None

    def test_odd_numbers_in_progress_and_results_whose_own_methods_raise_fail_only_that_job(self, make):
        runner = make(max_workers=1)
        jobs = [runner.submit(odd, what) for what in ("fraction", "decimal", "set", "module")]
        assert [type(job.exception(10)).__name__ for job in jobs] == ["ValueError", "ValueError", "TypeError", "TypeError"]
        assert [job.progress for job in jobs[:2]] == [0.5, 0.5]
        assert runner.submit(add, 1, 2).result(10) == 3

    def test_nested_loops_of_each_skip_nothing_after_a_resume(self, make):
        runner = make(max_workers=1)
        seen.clear()
        job = runner.submit(nested_each)
        wait_for(lambda: ("b", 1) in seen)
        job.stop()
        gate("nested each").set()
        wait_for(lambda: job.status == "stopped")
        job.resume()
        job.result(10)
        assert set(seen) == {(outer, inner) for outer in "abc" for inner in range(4)}

    def test_what_a_force_stopped_attempt_still_submits_operates_or_logs_changes_nothing(self, make):
        runner = make(max_workers=1)
        other = runner.options(delay=1000).submit(add, 1)
        job = runner.submit(haunt, other.id)
        wait_for(lambda: "haunt" in seen)
        job.stop()
        job.force_stop()
        gate("haunt").set()
        wait_for(lambda: "haunted" in seen)
        assert other.phase == "scheduled" and len(runner.jobs()) == 2
        assert [line["message"].split(" (")[0] for line in job.logs()] == ["stop", "force stop"]

    def test_force_stop_reaches_the_next_checkpoint_also_of_an_unstoppable_one(self, make):
        runner = make(max_workers=1)
        seen.clear()
        gate("force").set()
        job = runner.options(stoppable=False).submit(each_item, 10**9, "force")
        wait_for(lambda: job.running() and seen)
        job.stop()
        job.force_stop()
        wait_for(lambda: abandoned(runner) == 0)

    def test_a_stop_reaches_a_sleep_at_once_and_state_is_kept(self, runner):
        job = runner.submit(count_with_state)
        wait_for(lambda: job.state and job.state["n"] >= 3)
        stop_and_wait(job)
        kept = job.state["n"]
        assert not job.done() and job.phase == ""
        gate("count").set()
        assert job.resume() is job
        assert job.result(10) == [kept, 2]

    def test_each_goes_on_after_the_last_item_that_was_done(self, runner):
        seen.clear()
        gate("again").set()
        job = runner.submit(each_item, 300, "again")
        wait_for(lambda: len(seen) > 50)
        stop_and_wait(job)
        job.resume()
        assert job.result(10) == 300
        items = [item for _, _, item in seen]
        assert sorted(set(items)) == list(range(300)) and len(items) <= 301
        assert {attempt for _, attempt, _ in seen} == {1, 2}

    def test_stoppable_false_stays_stopping_until_it_ends(self, make):
        runner = make(max_workers=1)
        job = runner.options(stoppable=False).submit(each_item, 300, "unstoppable")
        gate("unstoppable").set()
        wait_for(lambda: job.status == "running")
        job.stop()
        assert job.result(10) == 300 and job.attempt == 1

    def test_a_job_that_returns_before_a_checkpoint_is_finished(self, runner):
        job = runner.submit(hold, "returns")
        wait_for(lambda: job.status == "running" and "returns" in seen)
        assert job.stop().status == "stopping"
        gate("returns").set()
        wait_for(lambda: job.status == "finished")

    @pytest.mark.parametrize("name", [
        "SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError", "RecursionError", "CancelledError",
        "Unprintable"])
    def test_any_exception_ends_only_that_attempt_even_if_its_own_methods_raise(self, make, name):
        runner = make(max_workers=1)
        job = runner.submit(raise_it, name)
        assert type(job.exception(10)) in (exception_named(name), bgjobs.JobFailed)
        assert job.status == "failed" and name in job.error
        assert runner.submit(add, 1, 2).result(5) == 3

    def test_whatever_goes_wrong_when_an_attempt_ends_is_recorded_as_its_failure(self, make):
        runner = make(max_workers=1)
        job = runner.submit(raise_it, "NoAttributes")
        job.exception(10)
        assert job.status == "failed"
        assert runner.submit(add, 1, 2).result(5) == 3

    @pytest.mark.parametrize("message,shown", [("Ambiguous", "ambiguous"), ("[]", "[]"), ("{}", "{}"), ("b''", "b''"), ("''", ""),
                                               ("0", "0"), ("NoText", "<NoText that cannot be printed>")])
    def test_any_object_can_be_a_progress_message(self, runner, message, shown):
        job, other = runner.submit(report_object, message), runner.submit(report_progress)
        wait_for(lambda: job.info()["message"] == shown and other.progress == 0.25, 2)
        gate("progress").set()
        assert isinstance(job.exception(10), KeyError) and other.exception(10) is None
        json.dumps(job.info())

    def test_a_total_that_is_no_number_fails_only_the_job_that_gave_it(self, runner):
        other = runner.submit(report_progress)
        error = runner.submit(each_with_total, "many").exception(10)
        assert isinstance(error, (TypeError, ValueError))
        wait_for(lambda: other.progress == 0.25, 2)
        gate("progress").set()

    def test_context_variables_do_not_leak_from_job_to_job(self, make):
        runner = make(max_workers=1)
        assert [runner.submit(leak).result(10) for _ in range(3)] == [None] * 3

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no exception groups")
    @pytest.mark.parametrize("only,status", [(True, "stopped"), (False, "failed")])
    def test_a_group_of_nothing_but_stops_is_a_stop(self, runner, only, status):
        job = runner.submit(stop_in_groups, only)
        wait_for(lambda: job.status == "running")
        job.stop()
        wait_for(lambda: job.status == status)

    def test_a_checkpoint_with_a_state_that_cannot_be_stored_raises_there(self, runner):
        job = runner.submit(bad_state)
        assert job.result(10) == (f"the state of job {job.id} cannot be stored: the key 1 is no "
                                  "string; use a list of pairs")


class TestLog:
    def test_log_lines_of_the_job_and_of_the_apps_loggers_land_in_its_log(self, runner):
        job = runner.submit(write_logs)
        job.result(10)
        lines = [(line["level"], line["message"]) for line in job.logs()]
        assert lines[:2] == [("INFO", "from the job 1"), ("WARNING", "from the app")]
        assert lines[2][0] == "ERROR" and "ZeroDivisionError" in lines[2][1]
        assert "could not be formatted" in lines[3][1]
        assert [line["message"] for line in job.logs(level="warning", text="APP")] == ["from the app"]
        assert [line["message"] for line in job.logs(limit=2)] == [lines[2][1], lines[3][1]]
        assert job.logs(after=job.logs()[-1]["id"]) == []
        for bad, text in (({"limit": -1}, "limit must be a whole number, 0 or more, got -1"), ({"text": 5}, "text must be a text"),
                          ({"regex": "a{99999999999}"}, "regex must be a regular expression, got")):
            with pytest.raises(ValueError, match=text):
                job.logs(**bad)
        assert job.logs(until=0) == [] and job.logs(after=None) == job.logs()

    def test_the_last_resort_handler_and_basic_config_still_work_with_a_runner(self, path):
        code = """
            import logging, sys, bgjobs
            runner = bgjobs.Runner(sys.argv[1])
            logging.getLogger("app").warning("seen by the last resort")
            logging.basicConfig(format="basic %(message)s")
            logging.getLogger("app").warning("seen")
            runner.close()
        """
        assert finish(python(code, path))[2].splitlines() == ["seen by the last resort", "basic seen"]

    def test_strange_log_records_are_lines_like_others_or_left_out(self, make):
        runner = make(max_workers=1)
        job = runner.submit(write_strange_logs)
        assert job.result(10) == "logged"
        assert [(line["level"], line["message"]) for line in job.logs()] == [
            ("INFO", "no time"), ("Level 1000", "high"),
            ("INFO", "<NoText that cannot be printed> could not be formatted: no text")]
        assert all(abs(line["at"] - time.time()) < 60 for line in job.logs())

    def test_records_of_the_apps_loggers_from_coroutines_and_carried_contexts_land_in_the_log(self, runner):
        job = runner.submit(log_from_everywhere)
        job.result(10)
        assert sorted(line["message"] for line in job.logs()) == ["from a coroutine", "from a task", "from a thread", "from an executor"]



def slow_at_first():
    job = bgjobs.current_job()
    if job.attempt == 1:
        job.sleep(5)
    return job.attempt


class TestTimeout:
    @pytest.mark.parametrize("function,arguments", [(stoppable, []), (swallow, []), (nap, [0.9])])
    def test_an_attempt_that_takes_too_long_fails_at_a_checkpoint_or_without_one(self, make, monkeypatch, function, arguments):
        monkeypatch.setattr(bgjobs, "GRACE_SECONDS", 0.2)
        gate("swallow")
        runner = make(max_workers=1)
        job = runner.options(timeout=0.2, stoppable=False).submit(function, *arguments)
        with pytest.raises(TimeoutError, match="attempt 1 took longer than its timeout of 0.2 s"):
            job.result(5)
        assert (job.status, job.errors) == ("failed", 1) and "TimeoutError" in job.error
        assert runner.submit(add, 1, 2).result(5) == 3
        gate("swallow").set()
        wait_for(lambda: abandoned(runner) == 0)
        consistent(runner)

    def test_each_attempt_has_its_time_and_a_retry_may_do_better(self, make):
        runner = make(max_workers=1)
        job = runner.options(timeout=0.3, retries=1, backoff=0).submit(slow_at_first)
        assert job.result(5) == 2 and job.errors == 1
        quick = runner.options(timeout=0.3).submit(add, 1, 2)
        assert quick.result(5) == 3
        consistent(runner)

    def test_in_drain_too(self, idle):
        job = idle.options(timeout=0.1).submit(stoppable)
        assert idle.drain() == 1 and job.status == "failed" and "timeout of 0.1 s" in job.error

    def test_who_returns_in_the_grace_is_finished_and_a_stop_by_hand_stops(self, make):
        runner = make(max_workers=2)
        assert runner.options(timeout=0.1).submit(nap, 0.4).result(5) is None
        job = runner.options(timeout=30).submit(stoppable)
        wait_for(lambda: job.status == "running")
        stop_and_wait(job)


# ---- 13 The handle ---------------------------------------------------------------------------------------------

def raise_at_gate(name):
    assert gate("truth").wait(20)
    raise STRANGE[name]


class TestHandle:
    def test_attributes_are_live(self, idle):
        job = idle.submit(add, 1, 2)
        other = idle.get(job.id)
        assert (job.status, job.waiting >= 0, job.started_at, job.attempt) == ("pending", True, None, 0)
        idle.drain()
        assert (job.status, other.status, job.attempt, job.errors) == ("finished", "finished", 1, 0)
        assert job.created_at <= job.started_at <= job.finished_at and job.duration > 0

    def test_info_is_json_and_has_every_field_of_the_contract(self, idle):
        info = idle.submit(add, 1, b={"k": [datetime.date(2026, 1, 31)]}).info()
        assert json.loads(json.dumps(info)) == info
        assert set(info) >= set("id name label status phase created_at started_at finished_at waiting duration errors low_priority "
                                "run_by progress eta children parent_id root_id attempt args kwargs state error operations".split())
        assert info["kwargs"] == {"b": {"k": [{"$date": "2026-01-31"}]}}

    def test_waiting_is_counted_from_the_due_time(self, make):
        now = [1000.0]
        runner = make(start=False, clock=lambda: now[0])
        job = runner.options(delay=60).submit(add, 1)
        now[0] = 1030.0
        assert (job.waiting, job.phase, runner.drain()) == (0.0, "scheduled", 0)
        now[0] = 1070.0
        assert job.waiting == 10.0 and runner.drain() == 1 and job.waiting == 10.0

    def test_in_the_process_that_ran_it_the_functions_own_exception_is_raised_elsewhere_job_failed(self, runner, path):
        job = runner.submit(fail, "own")
        with pytest.raises(ValueError, match="own"):
            job.result(10)
        code = """
            import sys, bgjobs
            with bgjobs.Runner(sys.argv[1], start=False) as runner:
                try:
                    runner.get(1).result(5)
                except bgjobs.JobFailed as error:
                    print(error, "|", error.type, error.text, "in fail" in error.traceback)
        """
        assert finish(python(code, path))[1] == "job 1 (test_bgjobs.fail) failed with ValueError: own | ValueError own True\n"

    def test_an_unknown_id_is_a_key_error_that_names_it(self, idle):
        with pytest.raises(KeyError, match="there is no job 7 in"):
            idle.get(7)
        with pytest.raises(TypeError, match="a job id is an int"):
            idle.get("7")

    def test_cancel_keeps_the_futures_manners(self, runner, idle):
        job = idle.options(delay=1000).submit(add, 1)
        assert job.cancel() is True and job.cancel() is True and job.cancelled() and job.done()
        with pytest.raises(concurrent.futures.CancelledError):
            job.result()
        done = runner.submit(add, 1)
        done.result(10)
        assert done.cancel() is False

    def test_stopped_is_not_done(self, idle):
        job = idle.submit(add, 1)
        job.stop()
        assert not job.done()
        with pytest.raises(concurrent.futures.TimeoutError):
            job.result(timeout=0.05)

    def test_running_is_true_in_running_and_stopping(self, runner):
        job = runner.submit(hold, "running")
        wait_for(job.running)
        job.stop()
        assert job.running() and not job.done()
        gate("running").set()
        job.result(10)
        assert not job.running()

    def test_callbacks_are_called_once_with_the_handle_even_if_it_was_dropped(self, runner):
        called = []
        job = runner.submit(hold, "callback")
        job.add_done_callback(called.append)
        job_id = job.id
        del job
        gc.collect()
        gate("callback").set()
        wait_for(lambda: called)
        assert [j.id for j in called] == [job_id]
        runner.get(job_id).add_done_callback(called.append)
        wait_for(lambda: len(called) == 2)

    def test_a_done_callback_may_submit_and_wait_and_sees_no_jobs_context(self, make):
        runner = make(max_workers=2)
        got = []
        for _ in range(5):
            runner.submit(nap, 0.01).add_done_callback(
                lambda job: got.append((bgjobs.current_job().id, runner.submit(add, 4, 5).result(5))))
        wait_for(lambda: len(got) == 5)
        assert got == [(None, 9)] * 5

    def test_a_callback_is_called_also_when_its_runner_was_closed_before_the_job_ended_elsewhere(self, make):
        closed, called = make(start=False), []
        job = closed.submit(add, 1, 2)
        job.add_done_callback(called.append)
        closed.close()
        make(max_workers=1)
        wait_for(lambda: called == [job])

    def test_callbacks_are_called_though_their_thread_could_not_start_at_first(self, make, monkeypatch):
        runner, called, start = make(max_workers=1), [], threading.Thread.start

        def start_no_more(thread):
            if thread.name == "bgjobs-callbacks":
                monkeypatch.setattr(threading.Thread, "start", start)
                raise RuntimeError("can't start new thread")
            start(thread)
        jobs = [runner.submit(hold, name) for name in ("one", "two")]
        for job in jobs:
            job.add_done_callback(called.append)
        monkeypatch.setattr(threading.Thread, "start", start_no_more)
        gate("one").set()
        assert jobs[0].result(10) is None and not called
        gate("two").set()
        wait_for(lambda: called == jobs)

    def test_what_a_callback_raises_or_how_long_it_takes_harms_nobody(self, make, caplog):
        runner = make(max_workers=2)
        runner.submit(nap, 0.01).add_done_callback(lambda job: raise_it("SystemExit"))
        runner.submit(nap, 0.01).add_done_callback(lambda job: gate("slow callback").wait(20))
        assert [runner.submit(add, i).result(5) for i in range(5)] == list(range(5))
        gate("slow callback").set()
        wait_for(lambda: handles_of(runner)._caller is None)
        assert "a callback of job" in caplog.text

    def test_each_waiter_gets_the_very_exception(self, runner):
        for name in ("CancelledError", "SystemExit", "ValueError"):
            job = runner.submit(raise_it, name)
            error = job.exception(10)
            with pytest.raises(type(error)) as caught:
                runner.get(job.id).result(10)
            assert caught.value is error and not job.cancelled()

    @pytest.mark.parametrize("kind", ["Falsy"])
    def test_an_exception_is_one_whatever_its_truth_value(self, runner, kind):
        jobs = [runner.submit(raise_at_gate, kind) for _ in range(3)]
        waits = [threading.Thread(target=concurrent.futures.wait, args=([jobs[0]],), daemon=True),
                 threading.Thread(target=list, args=(concurrent.futures.as_completed([jobs[1]]),), daemon=True)]
        for wait in waits:
            wait.start()
        gate("truth").set()
        with pytest.raises(STRANGE[kind]):
            jobs[2].result(10)
        for wait in waits:
            wait.join(10)
            assert not wait.is_alive()

    @pytest.mark.parametrize("column,value", [("result", '{"$date": "x"}'), ("result", "{"), ("error", "junk")])
    def test_an_outcome_that_cannot_be_read_is_an_error_and_holds_no_other_handle_up(self, idle, column, value):
        bad, good = idle.submit(add, 1), idle.submit(add, 1, 2)
        both = concurrent.futures.as_completed([bad, good])
        with contextlib.closing(sqlite3.connect(idle.path)) as db:          # as if another process had run it
            db.execute(f"UPDATE bgjobs_jobs SET status = ?, {column} = ?, queue = NULL, lane = NULL WHERE id = ?",
                       ("finished" if column == "result" else "failed", value, bad.id))
            db.commit()
        idle.drain()
        assert {job.id for job in both} == {bad.id, good.id}
        with pytest.raises(bgjobs.BgjobsError, match="its outcome cannot be read"):
            bad.result(5)
        assert good.result(5) == 3

    def test_a_job_that_another_process_ends_completes_the_handle(self, idle, path):
        job = idle.submit(add, 1, 2)
        code = """
            import sys, bgjobs, test_bgjobs
            bgjobs.Runner(sys.argv[1], start=False).drain()
        """
        process = python(code, path)
        assert job.result(20) == 3
        assert finish(process)[0] == 0

    def test_a_handle_reads_on_after_the_runner_is_closed(self, make):
        runner = make()
        job = runner.submit(add, 1, 2)
        runner.shutdown()
        assert job.result() == 3 and job.status == "finished"

    def test_the_future_part_completes_once_and_restart_gives_a_new_handle(self, idle):
        job = idle.submit(fail)
        idle.drain()
        again = job.resume()
        assert again is not job and job.done() and not again.done()
        assert isinstance(job.exception(), ValueError) and job.status == "pending"

    def test_asyncio_awaits_jobs_and_runs_them_in_an_executor(self, runner):
        async def main():
            loop = asyncio.get_running_loop()
            one = await asyncio.wait_for(asyncio.wrap_future(runner.submit(add, 1, 2)), 10)
            two = await runner.submit(add, 3, 4)
            three = await loop.run_in_executor(runner, add, 5, 6)
            return [one, two, three, *await asyncio.gather(*(asyncio.wrap_future(runner.submit(echo, i)) for i in range(20)))]
        assert asyncio.run(main()) == [3, 7, 11, *range(20)]


# ---- 14 Schedules ----------------------------------------------------------------------------------------------

@bgjobs.job(name="declared there", tz="Asia/Tokyo")
def declared_there():
    pass


def register_a_schedule():
    return bgjobs.every("0 9 * * *", declared_there).info()["name"]


def kill(process):
    process.kill()
    process.communicate()


class TestSchedules:
    def test_a_schedule_makes_its_job_when_it_is_due_and_never_ahead(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        nightly = idle.options(tz="UTC", label="Nightly", run_by="ann").every("30 2 * * *", add, 20, b=22)
        quarter = idle.every("15m", note, "quarter")
        assert idle.drain() == 0 and idle.jobs() == []
        clock.now += 899
        assert idle.drain() == 0
        clock.now += 1
        assert idle.drain() == 1 and idle.drain() == 0
        clock.now = nightly.info()["next_at"]
        assert clock.now % 86_400 == 9_000
        assert idle.drain() == 2                                        # the quarters that were missed meanwhile are one
        job = next(job for job in idle.jobs() if job.label)
        assert (job.label, job.run_by, job.result(), job.waiting) == ("Nightly", "ann", 42, 0.0)
        info = quarter.info()
        assert (info["runs"], info["skipped"], info["job_status"], info["registered"]) == (2, 0, "finished", True)
        assert 0 < info["next_at"] - clock.now <= 900 and (info["next_at"] - 1_000_000_000) % 900 == 0
        consistent(idle)

    def test_asleep_for_a_day_it_runs_once(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.every(60, add, 1)
        clock.now += 86_400
        assert idle.drain() == 1
        clock.now += 60
        assert idle.drain() == 1

    def test_a_clock_that_is_set_back_holds_no_schedule_up(self, make):
        clock = Clock()
        runner = make(max_workers=1, clock=clock)
        daily, often = runner.options(tz="UTC").every("0 12 * * *", add, 1), runner.every(60, add, 2)
        due = daily.info()["next_at"], often.info()["next_at"]
        for offline in (False, True):
            clock.now -= 10 * 86_400
            if offline:
                runner.close()
                runner = make(max_workers=1, clock=clock)
                daily, often = runner.options(tz="UTC").every("0 12 * * *", add, 1), runner.every(60, add, 2)
            wait_for(lambda: (daily.info()["next_at"], often.info()["next_at"]) == (due[0] - 10 * 86_400, due[1] - 10 * 86_400))
            due = due[0] - 10 * 86_400, due[1] - 10 * 86_400
        assert runner.jobs() == []
        clock.now += 60
        wait_for(lambda: often.info()["runs"] == 1)

    def test_a_clock_for_tests_may_be_set_back_too(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        schedule = idle.every("1m", add, 1)
        clock.now += 365 * 86_400
        assert idle.drain() == 1
        clock.now -= 365 * 86_400
        assert idle.drain() == 0
        clock.now += 60
        assert idle.drain() == 1
        clock.now -= 86_400
        assert schedule.pause().resume().info()["next_at"] == clock.now + 60

    def test_a_key_is_one_functions(self, idle):
        idle.options(key="k").every("1h", add, 1)
        for fn, args in ((note, (1,)), (add, (2,))):
            with pytest.raises(ValueError, match="'k' is scheduled already: test_bgjobs.add, 1h; give each schedule a key of its own"):
                idle.options(key="k").every("1h", fn, *args)

    def test_one_in_a_zone_that_is_unknown_here_holds_nothing_else_up(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.options(key="bad").every("* * * * *", add, 1), idle.options(key="good").every("1m", add, 2)
        idle.options(delay=60).submit(add, 3)
        execute(idle, "UPDATE bgjobs_schedules SET zone = 'Mars/X' WHERE key = 'bad'")
        for ran in (2, 1):
            clock.now += 60
            assert idle.drain() == ran

    def test_a_period_is_one_however_it_is_written(self, idle):
        assert idle.every(900, add, 1).id == idle.every("15m", add, 1).id
        assert [idle.options(key=str(n)).every(n, add).info()["schedule"] for n in (90, 7_200, 0.5, 86_400, 604_800, 61)] == [
            "90s", "2h", "0.5s", "1d", "1w", "61s"]

    def test_while_its_job_is_not_over_a_time_is_skipped_and_counted(self, make):
        clock = Clock()
        runner = make(max_workers=1, clock=clock)
        schedule = runner.every(10, hold, "scheduled")
        clock.now += 10
        wait_for(lambda: schedule.info()["job_status"] == "running")
        for skipped in (1, 2):
            clock.now += 10
            wait_for(lambda: schedule.info()["skipped"] == skipped)
        job = runner.get(schedule.info()["job_id"])
        assert len(runner.jobs()) == 1
        with pytest.raises(bgjobs.InvalidOperation, match="is running; wait until it is over"):
            schedule.run_now()
        gate("scheduled").set()
        job.result(5)
        clock.now += 10
        wait_for(lambda: schedule.info()["runs"] == 2)

    def test_registered_twice_it_is_one_and_other_times_replace_the_former_ones_at_the_next_start(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        first, again = idle.every("1h", add, 1), idle.every("1h", add, 1)
        assert first.id == again.id and len(idle.schedules()) == 1
        assert idle.every("1h", add, 2).id != first.id                  # other arguments: another one
        with pytest.raises(ValueError, match="is scheduled already: test_bgjobs.add, 1h; give each schedule a key"):
            idle.every("2h", add, 1)
        assert idle.options(key="second").every("2h", add, 1).id != first.id
        due = first.info()["next_at"]
        idle.close()
        clock.now += 1_800
        later = make(start=False, clock=clock)
        assert later.every(3_599, add, 1).info()["next_at"] == clock.now + 3_599      # another period: due anew
        later.close()
        clock.now += 100
        third = make(start=False, clock=clock)
        assert third.every(3_599, add, 1).info()["next_at"] == due + 1_799            # the same: its time stays
        assert not [s for s in third.schedules() if s.id == first.id and not s.info()["registered"]]

    def test_what_no_code_has_any_more_is_shown_as_such_runs_no_more_and_can_be_removed(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.every("1h", add, 1)
        idle.close()
        later = make(start=False, clock=clock)
        clock.now += 7_200
        old, = later.schedules()
        assert (old.info()["registered"], old.info()["next_at"]) == (False, None) and later.drain() == 0
        assert later.every("1h", add, 1).id == old.id and later.drain() == 1          # missed ones became one
        other = make(start=False, clock=clock)
        other.every("1h", add, 1)
        with pytest.raises(bgjobs.InvalidOperation, match="in the code of another process"):
            old.remove()
        other.close()
        old.remove()
        assert later.schedules() == []
        for operation in (old.pause, old.run_now, old.info):
            with pytest.raises(KeyError, match="there is no schedule"):
                operation()
        later.every("2h", add, 1)                                       # it may come back with other times

    def test_paused_resumed_and_run_by_hand(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        schedule = idle.every("1h", add, 1, 2)
        assert schedule.pause().info()["paused"] and schedule.info()["next_at"] is None
        clock.now += 9_000
        assert idle.drain() == 0
        assert schedule.run_now().id == 1 and idle.drain() == 1
        assert schedule.resume().info()["next_at"] == clock.now + 1_800  # in step, and nothing made up for
        assert idle.drain() == 0
        clock.now += 1_800
        assert idle.drain() == 1 and schedule.info()["runs"] == 2

    def test_four_processes_make_one_job_for_each_time_even_if_one_is_killed(self, path):
        code = """
            import sys, bgjobs, test_bgjobs, threading
            with bgjobs.Runner(sys.argv[1], max_workers=1) as runner:
                runner.every(0.05, test_bgjobs.add, 1)
                print("ready", flush=True)
                threading.Event().wait()
        """
        processes = [ready(code, path) for _ in range(4)]
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            schedule, = runner.schedules()
            for process, runs in ((processes[0], 15), *((process, 30) for process in processes[1:])):
                wait_for(lambda: schedule.info()["runs"] >= runs)
                kill(process)
            info = schedule.info()
            (created, next_at), = rows(runner, "SELECT created_at, next_at FROM bgjobs_schedules WHERE system = 0")
            due = [created + 0.05 * n for n in range(1, round((next_at - created) / 0.05))]
            made = sorted(job.created_at for job in runner.jobs(limit=None))
            assert len(made) == info["runs"] and info["runs"] + info["skipped"] <= len(due)
            assert len({int((at - created) / 0.05) for at in made}) == len(made)        # at most one for each time
            assert len(made) > len(due) / 2
            consistent(runner)

    def test_in_a_backup_nobody_has_registered_them(self, make, tmp_path):
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.every("1h", add, 1)
        with bgjobs.Runner(idle.backup(tmp_path / "backup.db"), start=False, clock=clock) as copy:
            clock.now += 3_600
            assert copy.drain() == 0 and not copy.schedules()[0].info()["registered"]
            copy.schedules()[0].remove()
            assert copy.schedules() == []

    def test_arguments_may_be_long_and_the_key_shows_no_secret(self, idle):
        long, other = idle.every("1h", add, "x" * 1_000), idle.every("1h", add, "x" * 1_001)
        secret = idle.options(secret=["b"]).every("1h", add, 1, b="hush")
        assert long.id != other.id and len(long.info()["key"]) < 120 and "hush" not in secret.info()["key"]
        assert idle.every("1h", add, "x" * 1_000).id == long.id

    def test_a_schedule_inside_a_job_and_by_decorator_and_options(self, runner):
        assert runner.submit(register_a_schedule).result(5) == "declared there"
        schedule, = runner.schedules()
        assert schedule.info()["tz"] == "Asia/Tokyo" and schedule.run_now().result(5) is None
        with pytest.raises(TypeError, match="delay is no option of a schedule"):
            runner.options(delay=5).every("1h", add, 1)
        with pytest.raises(TypeError, match="lambda"):
            runner.every("1h", lambda: 0)

    def test_one_removed_on_the_page_may_be_registered_with_other_times(self, visitor, runner):
        schedule = runner.every("1h", add, 1)
        assert visitor.post("api/schedules/remove", {"ids": [schedule.id]})["done"] == [schedule.id]
        assert runner.every("2h", add, 1).info()["schedule"] == "2h"

    def test_the_api_lists_them_and_secrets_stay_secret(self, visitor, idle):
        idle.options(secret=["b"]).every("1h", add, 1, b="hush")
        answer = visitor.get("api/schedules")
        assert "hush" not in json.dumps(answer)
        assert [(s["schedule"], s["args"], s["kwargs"], s["runs"]) for s in answer["schedules"]] == [("1h", [1], {"b": "•••"}, 0)]


# ---- 15 Statistics and retention -------------------------------------------------------------------------------

def log_lines(count):
    job = bgjobs.current_job()
    for n in range(count):
        job.log.info("line %d", n)
        if n % 100 == 0:
            job.sleep(0.01)


class TestStatistics:
    def test_they_are_counted_per_minute_and_function(self, make):
        clock = Clock(1_000_000_020.0)
        idle = make(start=False, clock=clock)
        first, second = idle.submit(add, 1), idle.submit(add, 2)
        idle.submit_many(note, [(n,) for n in range(10)])
        idle.options(system=True).submit(add, 3)
        clock.now += 30
        idle.drain()
        clock.now += 60
        idle.submit(fail), idle.options(delay=10, retries=1, backoff=0).submit(fail_until, 2)
        clock.now += 15
        idle.drain()
        stats = idle.stats("1h")
        assert (len(stats["parts"]), stats["to"] - stats["from"]) == (60, 3_600)
        assert sum(part["created"] for part in stats["parts"]) == stats["total"]["created"] == 14
        assert [part["created"] for part in stats["parts"][-2:]] == [12, 2] and stats["parts"][-1]["at"] + 60 == stats["to"]
        assert stats["total"]["waiting"] == {"avg": pytest.approx((12 * 30 + 15 + 5) / 14), "min": 5, "max": 30}      # what is due later does not wait
        by_name = {function["name"].split(".")[-1]: function for function in stats["functions"]}
        assert {name: [by_name[name][what] for what in ("created", "started", "finished", "failed")] for name in by_name} == {
            "add": [2, 2, 2, 0], "note": [10, 10, 10, 0], "fail": [1, 1, 0, 1], "fail_until": [1, 1, 1, 0]}
        assert by_name["add"]["running"]["max"] >= first.duration >= by_name["add"]["running"]["min"] > 0
        assert idle.stats("24h", first.name)["total"]["created"] == 2 and second.done()
        clock.now += 3_600
        assert idle.stats("1h")["total"]["created"] == 0 and idle.stats("1h")["total"]["waiting"] is None
        assert [idle.stats(window)["total"]["created"] for window in ("24h", "7d", "30d")] == [14] * 3

    def test_counters_never_fall_and_no_wait_is_negative(self, make):
        runner = make(max_workers=2)
        for _ in range(30):
            runner.submit(nap, 0).result(10)                     # short ones: the next are claimed ahead of free workers
        ids, last = runner.submit_many(nap, [(0.15,)] * 20), 0
        while runner.jobs(status=["pending", "running"], limit=1):
            started = runner.stats()["total"]["started"]
            assert last <= started <= 50
            last = started
        total = runner.stats()["total"]
        assert (total["started"], total["finished"]) == (50, 50) and total["waiting"]["min"] >= 0 and len(ids) == 20
        consistent(runner)

    def test_trees_crashes_cancellations_and_claims_given_back_are_counted_once(self, make):
        runner = make(max_workers=2)
        runner.submit(sum_of_children, 5).result(10)
        runner.options(delay=60).submit(add, 1).cancel()
        total = runner.stats()["total"]
        assert [total[what] for what in ("created", "started", "finished", "failed")] == [7, 6, 6, 0]
        idle = make(f"{runner.path} 2", start=False)
        idle.submit(add, 1)
        for outcome in (bgjobs.UNSPENT, bgjobs.RELEASED):
            attempt, = claimed(idle, 1)
            attempt.outcome = outcome
            ended(idle, attempt)
        attempt, = claimed(idle, 1)
        unwritten(idle).add(attempt, 0.0, 0, None)   # it has begun at last
        execute(idle, "UPDATE bgjobs_jobs SET deaths = 2")
        take_back(idle)
        total = idle.stats()["total"]
        assert [total[what] for what in ("created", "started", "finished", "failed")] == [1, 1, 0, 1]

    def test_bad_windows_are_refused_and_the_api_has_them(self, visitor, runner):
        with pytest.raises(ValueError, match="window must be 1h, 24h, 7d, 30d"):
            runner.stats("1y")
        runner.submit(add, 1)
        assert visitor.get("api/stats?window=1h")["total"]["created"] == 1
        assert visitor.get(f"api/stats?name={add.__module__}.nothing")["total"]["created"] == 0
        assert visitor.get("api/stats?window=1y", 400)["error"].startswith("window must be")

    def test_metrics_are_prometheus_text(self, visitor, runner):
        runner.options(name='odd "name"\\ with\nbreaks').submit(add, 1).result(5)
        text = visitor.request("GET", "metrics")[2].decode()
        types, values = {}, {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                name, kind = line[7:].split(" ")
                assert name not in types and kind in ("counter", "gauge")
                types[name] = kind
            elif not line.startswith("# HELP "):
                match = re.fullmatch(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-z]+="(?:[^"\\\n]|\\["\\n])*"\})? (\S+)', line)
                assert match and match[1] in types, line
                values[match[1] + (match[2] or "")] = float(match[3])
        assert text.endswith("\n") and all(name.endswith("_total") == (kind == "counter") for name, kind in types.items())
        assert values['bgjobs_jobs{status="finished"}'] == 1 and values["bgjobs_runners"] == 1
        assert values['bgjobs_created_total{function="odd \\"name\\"\\\\ with\\nbreaks"}'] == 1


def outlives(name):
    """Wait for a child that may not end well, and say how it did."""
    try:
        return bgjobs.options(key="child").submit(globals()[name]).result()
    except Exception as error:
        return f"outlived {type(error).__name__}"


class TestRetention:
    def test_whole_trees_go_when_they_are_over_for_long_and_nothing_else_does(self, make):
        clock = Clock()
        idle = make(start=False, clock=clock)
        tree, failed = idle.submit(children, 3), idle.submit(fail)
        cancelled = idle.submit(add, 1)
        cancelled.cancel()
        idle.drain()
        stopped, pending = idle.submit(add, 1), idle.options(delay=90 * 86_400).submit(add, 1)
        stopped.stop()
        clock.now += 6 * 86_400
        young = idle.submit(add, 1)
        idle.drain()
        assert idle.prune() == 0
        clock.now += 2 * 86_400
        assert idle.prune() == 5                                   # the tree of four, and the cancelled one
        assert [job.id for job in idle.jobs(limit=None)] == [young.id, pending.id, stopped.id, failed.id]
        with pytest.raises(KeyError):
            tree.info()
        consistent(idle)
        clock.now += 30 * 86_400
        assert idle.prune() == 2 and stopped.resume().status == "pending"
        assert idle.prune(finished=0, failed=0) == 0
        assert idle.submit(add, 1).id > young.id                   # no id comes again
        assert rows(idle, "SELECT count(*) FROM bgjobs_logs WHERE job_id NOT IN (SELECT id FROM bgjobs_jobs)") == [(0,)]

    def test_a_tree_in_which_something_is_not_over_stays_though_its_root_is_over(self, make):
        idle = make(start=False)
        top = idle.submit(outlives, "fail")
        idle.drain()
        below, = idle.jobs(parent=top)
        assert (top.status, below.status) == ("finished", "failed")
        below = below.resume()
        assert idle.prune(0, 0) == 0 and below.status == "pending"
        idle.drain()
        assert below.status == "failed" and idle.prune(0, 0) == 2

    def test_what_an_interrupted_prune_left_of_a_tree_goes_with_the_next(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "PRUNE_IDS", 5)
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.submit(children, 12)
        idle.drain()
        clock.now += 8 * 86_400
        written(idle, lambda tx: bgjobs.remove(tx, [1, 2, 3, 4, 5]))
        assert len(rows(idle, "SELECT id FROM bgjobs_jobs")) == 8
        assert idle.prune() == 8

    def test_who_writes_meanwhile_waits_only_for_some_of_the_log_lines(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "PRUNE_SECONDS", 0.0)
        clock = Clock()
        idle = make(start=False, clock=clock)
        idle.submit(children, 9)
        idle.drain()
        clock.now += 100
        remove, sizes = bgjobs._remove_some, []
        monkeypatch.setattr(bgjobs, "_remove_some", lambda tx, which: sizes.append(remove(tx, which)) or sizes[-1])
        assert idle.prune(0, 0) == 10 and sizes == [1] * 10 and idle.jobs() == []

    def test_it_runs_by_itself_as_a_system_job_and_over_a_month_the_file_stays_bounded(self, make, path):
        clock = Clock()
        runner = make(max_workers=2, clock=clock)
        schedule, = runner.schedules(system=True)
        assert runner.schedules() == [] and (schedule.info()["name"], schedule.info()["schedule"]) == ("bgjobs.housekeeping", "1h")
        sizes = []
        for day in range(30):
            ids = runner.submit_many(echo, [("x" * 200,)] * 300)
            wait_for(lambda: counted(runner, created_from=clock.now)["finished"] >= 300)
            runs = schedule.info()["runs"]
            clock.now += 86_400
            wait_for(lambda: schedule.info()["runs"] > runs and schedule.info()["job_status"] == "finished")
            sizes.append(rows(runner, "PRAGMA page_count")[0][0])
        assert len(rows(runner, "SELECT id FROM bgjobs_jobs WHERE system = 0")) <= 8 * 300 and runner.get(ids[-1]).done()
        assert runner.stats("30d")["total"]["finished"] > 28 * 300     # they outlive the jobs
        assert len(rows(runner, "SELECT 1 FROM bgjobs_stats")) < 40
        assert sizes[-1] <= max(sizes[8:12]) * 1.2
        consistent(runner)

    def test_it_can_be_set_and_turned_off(self, make, path):
        make(retention=None)
        runner = make(f"{path} 2", retention={"finished": 60})
        schedule, = runner.schedules(system=True)
        assert schedule.info()["kwargs"] == {"finished": 60, "failed": 30 * 86_400}
        with pytest.raises(ValueError, match="finished and failed are seconds"):
            runner.prune(finished=-1)
        assert make(f"{path} 3", retention=None).schedules(system=True) == []

    def test_sums_of_statistics_stay_when_their_minutes_are_folded(self, make):
        clock = Clock(1_000_000_000.0)
        idle = make(start=False, clock=clock)
        for _ in range(5):
            idle.submit(add, 1)
            idle.drain()
            clock.now += 3_600 * 9
        before = idle.stats("7d")["total"]
        clock.now += 86_400 * 3
        bgjobs.fold_statistics(idle.core)
        assert idle.stats("7d")["total"] == before
        assert [idle.stats(window)["total"] for window in ("7d", "30d")] == [before] * 2
        assert all(minute % 120 == 0 for minute, in rows(idle, "SELECT minute FROM bgjobs_stats"))
        clock.now += 86_400 * 40
        bgjobs.fold_statistics(idle.core)
        assert [row[:2] for row in rows(idle, "SELECT minute, created FROM bgjobs_stats")] == [(0, 5)]
        assert f'bgjobs_finished_total{{function="{add.__module__}.add"}} 5' in bgjobs.metrics(idle.core)

    def test_a_jobs_log_keeps_its_newest_lines(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "LINES_A_JOB", 500)
        runner = make(max_workers=1)
        job = runner.submit(log_lines, 3_000)
        job.result(20)
        lines = job.logs()
        assert 500 <= len(lines) <= 600 + bgjobs.LINES_A_WRITE and lines[-1]["message"] == "line 2999"

    def test_what_is_logged_last_is_trimmed_too(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "LINES_A_JOB", 500)
        monkeypatch.setattr(bgjobs, "LINES_A_WRITE", 100)
        runner = make(max_workers=1)
        for count in (560, 680, 1_000):
            job = runner.submit(log_lines, count)
            job.result(20)
            wait_for(lambda: not unwritten(runner))
            assert len(job.logs()) == 500 + (50 if count == 560 else 0) or 500 <= len(job.logs()) <= 550

    def test_an_interrupted_prune_leaves_no_child_without_its_root(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "PRUNE_IDS", 2)
        clock = Clock()
        idle = make(start=False, clock=clock)
        root = idle.submit(children, 6)
        idle.drain()
        clock.now += 100
        remove, calls = bgjobs.remove, []

        def die(tx, ids):
            calls.append(ids)
            if len(calls) > 2:
                raise ZeroDivisionError
            return remove(tx, ids)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(bgjobs, "remove", die)
            idle.prune(0, 0)
        assert 1 < len(idle.jobs()) < 7 and root.restart().status == "pending"
        idle.drain()
        assert root.children["done"] == 6

    def test_drain_keeps_the_newest_lines_of_a_flood_at_the_time_of_its_clock(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "LINES_A_WRITE", 100)
        monkeypatch.setattr(bgjobs, "LOG_BUFFER", 200)
        idle = make(start=False, clock=Clock())
        job = idle.submit(log_lines, 3_000)
        idle.drain()
        lines = job.logs()
        assert len(lines) == 3_000 and lines[-1]["message"] == "line 2999" and {line["at"] for line in lines} == {Clock().now}


# ---- 16 Runner -------------------------------------------------------------------------------------------------

async def square_async(number):
    await asyncio.sleep(0.001)
    return number * number


def submit_after(name):
    hold(name)
    return bgjobs.submit(add, 1, 2).result()


def submit_elsewhere():
    others[-1].submit(add, 1, 2)


def many_children():
    bgjobs.submit_many(add, [(i,) for i in range(30)])


class TestExecutor:
    def test_it_is_one(self, runner):
        assert isinstance(runner, concurrent.futures.Executor) and isinstance(runner.submit(add, 1), concurrent.futures.Future)

    def test_map_keeps_the_order_and_raises_in_place(self, runner):
        assert list(runner.map(add, range(10), range(10))) == [2 * i for i in range(10)]
        results = runner.map(divmod, [1, 1], [1, 0])
        assert next(results) == [1, 0]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_a_map_with_a_buffer_submits_as_results_are_taken(self, idle):
        results = idle.map(add, itertools.count(), buffersize=3)
        assert len(idle.jobs()) == 3
        idle.drain()
        assert [next(results), next(results)] == [0, 1] and len(idle.jobs()) == 5
        results.close()
        assert list(idle.map(add, [], buffersize=1)) == []
        for size in (0, -1, 1.5, True, "1"):
            with pytest.raises(ValueError, match="buffersize must be None or greater than 0"):
                idle.map(add, [1], buffersize=size)

    def test_map_gives_up_after_its_timeout(self, make):
        runner = make(max_workers=1)
        with pytest.raises(concurrent.futures.TimeoutError):
            list(runner.map(hold, ["map timeout"], timeout=0.1))
        gate("map timeout").set()

    def test_a_map_outlives_its_runner_and_cancel_never_raises(self, make):
        runner = make(max_workers=2)
        results, job = runner.map(add, range(5)), runner.submit(add, 1)
        runner.shutdown()
        assert list(results) == list(range(5)) and job.cancel() is False
        with pytest.raises(RuntimeError, match="cannot schedule new futures"):
            runner.map(add, [1])

    def test_a_map_that_is_given_up_cancels_what_has_not_begun(self, make):
        runner = make(max_workers=1)
        first = runner.submit(hold, "map given up")
        wait_for(first.running)
        results = runner.map(note, ["a", "b"], timeout=0)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        wait_for(lambda: len(runner.jobs(status="cancelled")) >= 1)
        gate("map given up").set()

    def test_a_half_read_map_may_become_garbage_at_any_moment(self, path):
        code = """
            import gc, sys, bgjobs, test_bgjobs
            gc.set_threshold(50)
            with bgjobs.Runner(sys.argv[1], max_workers=2) as runner:
                for _ in range(100):
                    results = runner.map(test_bgjobs.add, range(5))
                    next(results)
                    loop = [results]
                    loop.append(loop)
                    del results, loop
                print(runner.submit(test_bgjobs.add, 1).result(10))
        """
        assert finish(python(code, path))[:2] == (0, "1\n")

    def test_a_write_from_inside_a_write_is_refused_not_hung(self, idle):
        def nested_write(tx):
            idle.submit(add, 1)
        with pytest.raises(RuntimeError, match="inside a write of its thread"):
            written(idle, nested_write)
        assert idle.submit(add, 1).id == 1

    def test_jobs_and_plain_futures_mix(self, runner):
        with concurrent.futures.ThreadPoolExecutor(1) as plain:
            mine, other = runner.submit(hold, "mix"), plain.submit(add, 1)
            ready = concurrent.futures.as_completed([mine, other, mine], timeout=10)
            assert next(ready) is other
            gate("mix").set()
            assert list(ready) == [mine]

    def test_an_asyncio_app_submits_and_awaits_in_its_handlers(self, runner):
        async def handler(reader, writer):
            number = int(await reader.readline())
            job = runner.options(label=f"square of {number}").submit(square_async, number)
            writer.write(f"{job.id} {await job}\n".encode())
            await writer.drain()
            writer.close()

        async def request(port, number):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{number}\n".encode())
            answer = await reader.readline()
            writer.close()
            return answer.split()[1]

        async def main():
            server = await asyncio.start_server(handler, "127.0.0.1", 0)
            async with server:
                port = server.sockets[0].getsockname()[1]
                return await asyncio.gather(*(request(port, number) for number in range(30)))
        assert asyncio.run(main()) == [str(number * number).encode() for number in range(30)]

    def test_cancelling_the_asyncio_task_cancels_the_pending_job(self, make):
        runner = make(max_workers=1)

        async def main():
            runner.submit(hold, "task")
            job = runner.submit(add, 1)
            waiting = asyncio.wrap_future(job)
            waiting.cancel()
            await asyncio.sleep(0.05)
            assert job.status == "cancelled"
        asyncio.run(main())
        gate("task").set()

    def test_close_and_shutdown_from_many_threads_at_once_never_raise(self, path):
        for _ in range(10):
            runner = bgjobs.Runner(path, max_workers=2)
            runner.submit(add, 1)
            with concurrent.futures.ThreadPoolExecutor(3) as plain:
                for call in [plain.submit(end) for end in (runner.close, runner.shutdown, runner.close)]:
                    call.result(10)

    def test_wait_tells_done_from_not_done(self, runner):
        slow, quick, bad = runner.submit(hold, "wait"), runner.submit(add, 1), runner.submit(fail)
        done, pending = concurrent.futures.wait([slow, quick], return_when="FIRST_COMPLETED")
        assert (done, pending) == ({quick}, {slow})
        assert bad in concurrent.futures.wait([slow, bad], return_when="FIRST_EXCEPTION").done
        assert concurrent.futures.wait([slow], timeout=0.05).not_done == {slow}
        gate("wait").set()
        assert concurrent.futures.wait([slow, quick, bad], timeout=10).not_done == set()

    def test_as_completed_gives_each_job_once_also_those_that_were_over(self, runner):
        over, cancelled = runner.submit(add, 1), runner.options(delay=1000).submit(add, 1)
        over.result(10), cancelled.cancel()
        fresh = runner.submit(add, 2)
        found = list(concurrent.futures.as_completed([over, fresh, over, cancelled], timeout=10))
        assert len(found) == 3 and set(found) == {over, fresh, cancelled}

    def test_shutdown_waits_for_what_was_submitted_and_for_its_children(self, make):
        runner = make(max_workers=2)
        parent = runner.submit(children, 20, "nap", 0.005)
        ids = runner.submit_many(nap, [(0.002,)] * 50)
        later = runner.options(delay=1000).submit(add, 1)
        runner.shutdown()
        assert parent.status == "finished" and all(runner.get(i).status == "finished" for i in ids)
        assert later.status == "pending"
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            runner.submit(add, 1)

    def test_a_running_job_may_submit_after_shutdown(self, make):
        runner = make(max_workers=1)
        job = runner.submit(submit_after, "after shutdown")
        wait_for(lambda: job.running() and "after shutdown" in seen)
        runner.shutdown(wait=False)
        gate("after shutdown").set()
        assert job.result(10) == 3

    def test_cancel_futures_cancels_those_pending_only(self, make):
        runner = make(max_workers=1)
        running = runner.submit(hold, "cancel futures")
        wait_for(lambda: running.running() and "cancel futures" in seen)
        pending = [runner.submit(add, i) for i in range(5)]
        threading.Timer(0.2, gate("cancel futures").set).start()
        runner.shutdown(cancel_futures=True)
        assert all(job.cancelled() for job in pending) and running.status == "finished"

    def test_shutdown_does_not_wait_for_jobs_of_others(self, make):
        other = make(start=False)
        backlog = other.options(parent=other.submit(add, 1)).submit_many(nap, [(0.2,)] * 500)
        with make(max_workers=2) as runner:
            mine = runner.submit(add, 1)
        assert mine.status == "finished" and other.get(backlog[-1]).status == "pending"
        consistent(other)

    def test_a_with_block_waits(self, path):
        with bgjobs.Runner(path) as runner:
            jobs = [runner.submit(nap, 0.01) for _ in range(10)]
        assert all(job.done() for job in jobs)


class TestRunner:
    @pytest.mark.parametrize("reason,values", [
        ("max_workers must be greater than 0, got", [0, -1, 1.5, True, "4"]),
        ("max_workers must be", [2**63]), ("durability must be", ["none"]), ("journal must be", ["off"]),
        ("retention must be", [{"forever": 1}, {"finished": -1}, {"finished": "7d"}])])
    def test_bad_arguments_are_refused_by_name_and_no_file_is_made(self, path, reason, values):
        for value in values:
            with pytest.raises(ValueError, match=reason):
                bgjobs.Runner(path, **{reason.split()[0]: value})
        assert not os.path.exists(path)

    def test_submit_many_stores_all_in_order_and_says_how_many_at_an_error(self, idle):
        ids = idle.submit_many(echo, ((i,) for i in range(25_000)))
        assert ids == list(range(1, 25_001))
        assert idle.get(20_001).args == [20_000]
        bad = itertools.chain(((1,) for _ in range(10_000)), [(object(),)])
        with pytest.raises(TypeError, match=r"is of type object.*\(10,000 jobs were stored before\)"):
            idle.submit_many(echo, bad)
        with pytest.raises(bgjobs.BgjobsError, match=r"codec can't decode.*\(0 jobs were stored before\)"):
            idle.submit_many(echo, (bytes([255]).decode() for _ in range(1)))
        with pytest.raises(TypeError, match=r"write \(value,\) for a single argument"):
            idle.submit_many(echo, [1])
        assert counted(idle)["pending"] == bgjobs.COUNT_LIMIT

    def test_submit_many_inside_a_job_makes_children(self, idle):
        job = idle.submit(many_children)
        idle.drain()
        assert job.children == {"total": 30, "done": 30, "failed": 0, "running": 0}
        consistent(idle)

    def test_a_runner_made_with_start_false_runs_nothing_until_started(self, make):
        runner = make(start=False)
        job = runner.submit(add, 1, 2)
        time.sleep(0.15)
        assert job.status == "pending"
        runner.start()
        assert job.result(10) == 3
        with pytest.raises(RuntimeError, match="drain"):
            runner.drain()

    def test_a_delayed_job_starts_when_it_is_due_and_not_before(self, runner):
        begun = time.time()
        job = runner.options(delay=0.3).submit(time.time)
        early = runner.options(run_at=datetime.datetime.now(UTC)).submit(add, 1)
        assert job.phase == "scheduled" and early.result(10) == 1
        assert begun + 0.29 <= job.result(10) < begun + 2

    def test_a_submit_from_another_process_is_noticed(self, runner, path):
        assert in_another_process(path, "print(runner.submit(test_bgjobs.add, 20, 22).result(10))") == "42\n"

    def test_a_stop_from_another_process_reaches_the_attempt(self, runner, path):
        job = runner.submit(stoppable, "from outside")
        wait_for(lambda: job.running() and ("from outside", 1) in seen)
        in_another_process(path, "runner.get(1).stop(by='outside')")
        wait_for(lambda: job.status == "stopped", 2)

    def test_close_gives_running_jobs_back_with_their_state(self, make):
        runner = make(max_workers=2)
        job = runner.submit(count_with_state)
        queued = runner.submit_many(hold, [("close",)] * 3)
        wait_for(lambda: job.state and job.state["n"] >= 2 and "close" in seen)
        runner.close(timeout=0.3)
        assert (job.status, job.phase) == ("pending", "interrupted") and job.state["n"] >= 2
        assert [runner.get(i).status for i in queued] == ["pending"] * 3
        assert rows(runner, "SELECT * FROM bgjobs_runners") == []
        consistent(runner)
        gate("count").set(), gate("close").set()
        with contextlib.closing(bgjobs.Runner(runner.path, max_workers=2)) as again:
            assert again.get(job.id).result(10)[1] == 2
            wait_for(lambda: again.get(queued[-1]).done())

    def test_what_was_claimed_but_not_begun_is_given_back_unspent(self, make):
        runner = make(max_workers=1)
        for _ in range(5):
            runner.submit(hold_if, None).result(10)
        runner.submit_many(hold_if, [("unspent",), *[(None,)] * 30])
        wait_for(lambda: "unspent" in seen)
        runner.close(timeout=0.1)
        waiting = runner.jobs(status="pending", limit=30)
        assert {(job.attempt, job.started_at) for job in waiting} == {(0, None)}
        consistent(runner)

    def test_a_submit_inside_a_job_to_another_runner_is_no_child(self, make, tmp_path):
        one, two = make(max_workers=1), make(str(tmp_path / "two.db"), max_workers=1)
        others.append(two)
        job = one.submit(submit_elsewhere)
        assert job.result(10) is None and job.children["total"] == 0
        assert two.get(1).parent_id is None and two.get(1).result(10) == 3
        with pytest.raises(ValueError, match="it takes no children from"):
            one.options(parent=two.get(1)).submit(add, 1)


# ---- 17 Clock, processes and exit ------------------------------------------------------------------------------

def kill_me(effects, count):
    """Write down that an attempt began; work a little, in children if so asked."""
    job = bgjobs.current_job()
    write_down(effects)
    for n in job.each(range(3)):
        if count:
            bgjobs.options(key=str(n)).submit(kill_me, effects, 0).result()
        job.checkpoint(state=n)
        job.sleep(0.001)


class TestCrashes:
    def test_after_kill_9_the_next_start_runs_what_was_running_and_what_was_queued(self, path):
        process = holder(path, "kill", 3)
        with bgjobs.Runner(path, start=False) as idle:
            idle.submit_many(add, [(i, i) for i in range(20)])
        kill(process)
        with contextlib.closing(bgjobs.Runner(path, max_workers=3)) as runner:
            wait_for(lambda: all(runner.get(i).attempt == 2 and runner.get(i).status == "running" for i in (1, 2, 3)))
            assert "its process died; pending now" in runner.get(1).logs()[0]["message"]
            gate("kill").set()
            wait_for(lambda: len(runner.jobs(status="finished")) == 23)
            consistent(runner)

    def test_a_living_process_takes_a_dead_ones_jobs_back_within_a_moment(self, make, path):
        process = holder(path, "dead")
        runner = make(max_workers=1)
        look_for_the_dead(runner)
        assert runner.get(1).attempt == 1        # its owner lives: nobody touches it, however long it takes
        kill(process)
        wait_for(lambda: runner.get(1).attempt == 2, 3)

    def test_a_hundred_kills_at_random_moments_lose_nothing_and_end_nothing_twice(self, tmp_path):
        # A child with a runner is killed after 0 to 50 ms, while another one lives or not, and what it wrote down is held against the file.
        out = printed(python("""
            import bgjobs, os, random, signal, sys, time, test_bgjobs
            path, effects, submitted = (f"{sys.argv[1]}/{name}" for name in ("jobs.db", "effects", "submitted"))

            def live():
                runner = bgjobs.Runner(path, max_workers=3)
                with open(submitted, "a", buffering=1) as acknowledged:
                    while True:
                        count = random.choice([0, 0, 0, 3])
                        job = runner.submit(test_bgjobs.kill_me, effects, count)
                        print(job.id, file=acknowledged)
                        time.sleep(random.random() / 100)

            def live_on():
                with bgjobs.Runner(path, max_workers=3) as runner:
                    test_bgjobs.wait_for(lambda: not runner.jobs(status=("pending", "running")), 60)
                    test_bgjobs.consistent(runner)
                    ids = {int(line) for line in open(submitted)}
                    jobs = {job.id: job for job in runner.jobs(limit=None)}
                    assert ids <= jobs.keys()
                    begun = [tuple(map(int, line.split())) for line in open(effects)]
                    assert len(begun) == len(set(begun)), "an attempt that began twice"
                    for job in jobs.values():
                        runs = [attempt for job_id, attempt in begun if job_id == job.id]
                        assert max(runs, default=0) <= job.attempt, job.info()
                        if job.status == "failed":
                            assert "died under it 3 times" in job.error, job.info()
                        else:
                            assert job.status == "finished" and runs and job.state == 2, (job.info(), runs)
                    print(len(jobs), sum(job.attempt > 1 for job in jobs.values()), sum(job.status == "failed" for job in jobs.values()))
                    sys.stdout.flush()

            older = None
            for kill in range(int(sys.argv[2])):
                newer = test_bgjobs.in_a_child(live)
                time.sleep(0.02 + random.random() / 20)
                victim, older = (newer, older) if older is not None and random.random() < 0.5 else (older, newer)
                if victim is not None:
                    os.kill(victim, signal.SIGKILL)
                    assert os.waitpid(victim, 0)[1] == signal.SIGKILL
            os.kill(older, signal.SIGKILL)
            os.waitpid(older, 0)
            sys.exit(os.waitpid(test_bgjobs.in_a_child(live_on), 0)[1] >> 8)
            """, tmp_path, 100), 120)
        jobs, again, _ = map(int, out.split())
        assert jobs > 100 and again > 20

    def test_whoever_has_its_lock_lives_though_its_row_was_deleted_by_hand(self, make, path):
        process = holder(path, "dead")
        runner = make(max_workers=1)
        living = runner.submit(hold, "living")
        wait_for(lambda: living.status == "running")
        execute(runner, "DELETE FROM bgjobs_runners")
        look_for_the_dead(runner)
        assert runner.get(1).attempt == living.attempt == 1
        assert runner.get(1).status == living.status == "running"
        kill(process)
        gate("living").set()
        wait_for(lambda: runner.get(1).attempt == 2, 5)
        gate("dead").set()
        runner.get(1).result(5)

    def test_a_dead_process_is_told_by_its_lock_even_if_another_has_its_pid_now(self, make, path):
        kill(holder(path, "pid"))
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE bgjobs_runners SET pid = ?, heartbeat_at = ?", (os.getpid(), time.time() + 100))
            db.commit()
        gate("pid").set()
        runner = make(max_workers=1)
        runner.get(1).result(5)
        assert runner.get(1).attempt == 2

    def test_two_copies_of_the_module_in_one_process_do_not_take_each_other_for_dead(self, make, path):
        spec = importlib.util.spec_from_file_location("vendored_bgjobs", bgjobs.__file__)
        copy = sys.modules["vendored_bgjobs"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(copy)
            ours = make(max_workers=1)
            first = ours.submit(hold, "ours")
            wait_for(lambda: first.status == "running")
            with contextlib.closing(copy.Runner(path, max_workers=1)) as theirs:
                second = theirs.submit(hold, "theirs")
                wait_for(lambda: second.status == "running")
                look_for_the_dead(ours), look_for_the_dead(theirs)
                with contextlib.closing(copy.Runner(path, max_workers=1)):
                    pass
                look_for_the_dead(ours), look_for_the_dead(theirs)
                assert first.attempt == second.attempt == 1 and first.status == second.status == "running"
                gate("ours").set(), gate("theirs").set()
                first.result(5), second.result(5)
            consistent(ours)
        finally:
            del sys.modules["vendored_bgjobs"]

    @pytest.mark.parametrize("killers", [1, 2])
    def test_a_job_that_takes_its_process_down_three_times_is_failed_and_its_neighbours_finish(self, make, path, killers):
        idle = make(start=False)
        neighbours = idle.submit_many(nap, [(0.002,)] * 26 * (killers == 1))
        bad = [idle.submit(die) for _ in range(killers)]                        # two are claimed together, so suspected together
        neighbours += idle.submit_many(nap, [(0.002,)] * 26)
        lives = 0
        while any(job.status != "failed" for job in bad):
            lives += 1
            assert lives <= 3 * killers + 2
            process = python("""
                import bgjobs, sys, test_bgjobs
                with bgjobs.Runner(sys.argv[1], max_workers=4) as runner:
                    test_bgjobs.wait_for(lambda: not runner.jobs(status=("pending", "running")), 30)
                """, path)
            finish(process)
        assert "its process died under it 3 times" in bad[0].error
        assert 3 <= bad[0].attempt <= 3 * killers            # a death beside the other one is not held against it once that is convicted
        with pytest.raises(bgjobs.JobFailed, match="died under it 3 times"):
            bad[0].result(1)
        runner = make(max_workers=4)
        for job_id in neighbours:
            assert runner.get(job_id).result(20) is None
        consistent(runner)

    def test_a_parent_that_waits_for_a_killer_is_not_failed_with_it(self, make, path):
        job = make(start=False).submit(outlives, "die")
        while job.status in ("pending", "running") and job.attempt < 6:
            finish(python("""
                import bgjobs, sys, test_bgjobs
                with bgjobs.Runner(sys.argv[1], max_workers=2) as runner:
                    test_bgjobs.wait_for(lambda: runner.get(1).status == "finished")
                """, path))
        assert job.result(5) == "outlived JobFailed" and job.children["failed"] == 1
        consistent(runner_of(job))

    def test_the_time_between_a_crash_and_the_next_start_is_no_running_time(self, make, path):
        clock = Clock()
        crashed = make(start=False, clock=clock)
        job = crashed.submit(add, 1)
        claimed(crashed, 1)
        execute(crashed, "UPDATE bgjobs_runners SET id = 77, heartbeat_at = ?", clock.now + 30)
        execute(crashed, "UPDATE bgjobs_jobs SET owner = 77")
        clock.now += 3 * 86_400
        look_for_the_dead(make(start=False, clock=clock))
        assert (job.status, job.duration) == ("pending", 30 + bgjobs.HEARTBEAT_SECONDS)
        assert rows(crashed, "SELECT vtime FROM bgjobs_jobs") == [(45_000_000,)]

    def test_a_lock_file_that_is_copied_or_deleted_makes_nobody_dead(self, make, path, tmp_path):
        runner = make(max_workers=1)
        job = runner.submit(hold, "lock file")
        wait_for(lambda: job.status == "running")
        lock = f"{path}-bgjobs-{runner_id(runner)}.lock"
        others = """
            import bgjobs, sys
            bgjobs.Runner(sys.argv[1]).close()                   # it looks for dead ones at its start
        """
        shutil.copy(lock, tmp_path / "copy")                     # which opens and closes it
        assert finish(python(others, path)) == (0, "", "")
        os.remove(lock)
        assert finish(python(others, path)) == (0, "", "")       # its heartbeat is young
        assert (job.status, job.attempt) == ("running", 1)
        gate("lock file").set()
        job.result(5)

    def test_a_dead_process_whose_lock_file_was_deleted_is_told_by_its_heartbeat(self, make, path):
        kill(holder(path, "silent"))
        os.remove(f"{path}-bgjobs-1.lock")
        runner = make(start=False)
        look_for_the_dead(runner)
        assert runner.get(1).status == "running"
        execute(runner, "UPDATE bgjobs_runners SET heartbeat_at = heartbeat_at - 3 * ? WHERE id = 1",
                bgjobs.HEARTBEAT_SECONDS)
        look_for_the_dead(runner)
        assert runner.get(1).status == "pending"

    def test_a_runner_on_a_deleted_file_shares_no_lock_with_one_on_the_new_file(self, make, path):
        old = make(max_workers=1)
        old_id = runner_id(old)
        for end in ("", "-wal", "-shm"):
            os.remove(path + end)
        new = make(max_workers=1)
        assert runner_id(new) > old_id
        presence = new.core.life.presence
        assert [presence.is_dead(runner_id(each), 0.0) for each in (old, new)] == [False, False]
        old.close()
        assert not presence.is_dead(runner_id(new), 0.0)

    def test_recover_false_fails_instead_of_running_again(self, path):
        code = """
            import os, sys, bgjobs, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], max_workers=1)
            runner.options(recover=False).submit(test_bgjobs.hold, "once")
            test_bgjobs.wait_for(lambda: test_bgjobs.seen)
            os._exit(9)
        """
        assert finish(python(code, path))[0] == 9
        with contextlib.closing(bgjobs.Runner(path)) as runner:
            assert (runner.get(1).status, runner.get(1).attempt, runner.get(1).errors) == ("failed", 1, 1)
            with pytest.raises(bgjobs.JobFailed, match="recover=False"):
                runner.get(1).result(5)

    def test_runners_that_start_together_never_take_each_other_for_dead(self, path):
        code = """
            import sys, bgjobs, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], max_workers=1)
            job = runner.submit(test_bgjobs.nap, 1.5)
            print("ready", flush=True)
            sys.stdin.readline()
            test_bgjobs.look_for_the_dead(runner)
            print(job.attempt <= 1, len(test_bgjobs.rows(
                runner, "SELECT 1 FROM bgjobs_runners WHERE id = ?", test_bgjobs.runner_id(runner))))
            runner.close()
        """
        processes = [python(code, path) for _ in range(6)]
        let_go(processes)
        assert [finish(process)[:2] for process in processes] == [(0, "True 1\n")] * 6

    def test_a_job_to_stop_that_fails_by_its_third_death_is_stopped_while_children_are_open(self, idle):
        parent = idle.submit(add, 1)
        child = idle.options(parent=parent).submit(add, 2)
        claimed(idle, 1)
        parent.stop()
        execute(idle, "UPDATE bgjobs_jobs SET deaths = 2 WHERE id = ?", parent.id)
        take_back(idle)
        assert (parent.status, child.status) == ("stopped", "stopped")
        consistent(idle)
        parent.resume()
        assert (parent.status, parent.phase, child.status) == ("running", "waiting for children", "pending")
        idle.drain()
        assert (parent.status, child.result()) == ("failed", 2) and "died under it 3 times" in parent.error
        consistent(idle)

    def test_an_outcome_that_comes_twice_is_not_taken_for_that_of_another_runners_attempt(
            self, make):
        one, two = make(start=False), make(start=False)
        job = one.submit(add, 1, 2)
        given_back, = claimed(one, 1)
        ended(one, given_back)
        assert job.status == "pending" and job.attempt == 0
        taken, = claimed(two, 1)                         # its number is that of the attempt given back
        ended(one, given_back)
        assert job.status == "running" and job.attempt == 1
        taken.outcome = bgjobs.RETURNED
        ended(two, taken)
        assert job.status == "finished"
        consistent(one)

    def test_a_crash_between_commit_and_hand_over_loses_no_claim(self, make):
        """Its claims are committed, but never reach the pool."""
        runner = make(start=False)
        job = runner.submit(add, 1, 2)
        claimed(runner, 1)
        assert job.status == "running"
        runner.start()
        assert job.result(10) == 3
        consistent(runner)


class TestFork:
    def test_a_fork_after_a_runner_with_an_executor_was_closed_is_silent(self, path):
        code, out, err = finish(python("""
            import concurrent.futures, os, sys, bgjobs, test_bgjobs
            pool = concurrent.futures.ThreadPoolExecutor(1)
            runner = bgjobs.Runner(sys.argv[1], executor=pool)
            runner.submit(test_bgjobs.add, 1).result(20)
            runner.close()
            if (child := os.fork()) == 0:
                os._exit(0)
            os.waitpid(child, 0)
            """, path))
        assert code == 0 and "Exception" not in err, err         # since 3.12 forks beside threads are warned of

    def test_a_forked_child_is_told_works_after_start_and_the_parent_never_notices(self, path):
        assert printed(python("""
            import bgjobs, concurrent.futures, os, sys, threading
            nobody_inside = []                                           # SQLite, at the moment of the fork
            os.register_at_fork(before=lambda: nobody_inside.append(
                not bgjobs.fork_gate._inside and not runner.core.store._writer.in_transaction))
            runner = bgjobs.start(sys.argv[1], max_workers=2)
            stop = threading.Event()
            def submit_on_and_on():
                while not stop.is_set():
                    bgjobs.submit(pow, 1, 2).result()
            threads = [threading.Thread(target=submit_on_and_on) for _ in range(2)]
            for thread in threads:
                thread.start()
            def fork(n):
                child = os.fork()
                if child:
                    return os.waitpid(child, 0)[1] >> 8
                try:
                    bgjobs.submit(pow, 1, 2)
                    os._exit(1)
                except bgjobs.StoreError as error:
                    assert "belongs to the process that this one was forked from; call its start()" in str(error)
                assert bgjobs.get(1).name == "builtins.pow"              # reading does no harm
                if n % 2:
                    assert bgjobs.start() is runner
                    assert bgjobs.submit(pow, n, 2).result(20) == n * n
                (os._exit if n < 10 else sys.exit)(7)                    # the exit hooks run, too
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                assert list(pool.map(fork, range(10))) == [7] * 10
            assert fork(10) == fork(11) == 7
            assert all(nobody_inside) and len(nobody_inside) == 12       # although others always want to be
            stop.set()
            for thread in threads:
                thread.join()
            assert runner.submit(pow, 3, 2).result(20) == 9
            runner.shutdown()
            import test_bgjobs
            test_bgjobs.consistent(runner)
            print("whole")
            """, path, PYTHONWARNINGS="ignore"), 60) == "whole\n"

    def test_a_fork_that_python_did_not_make_is_noticed_at_the_first_call(self, path):
        assert printed(python("""
            import bgjobs, ctypes, os, sys, test_bgjobs
            runner = bgjobs.Runner(sys.argv[1], start=False)
            runner.submit(pow, 2, 3)
            def write():
                try:
                    runner.submit(pow, 1, 2)
                except bgjobs.StoreError as error:
                    assert "belongs to the process that this one was forked from" in str(error)
                    assert runner.start().submit(pow, 3, 2).result(10) == 9
                    runner.close()
                    os._exit(7)
            def read():
                assert runner.get(1).status in ("pending", "finished") and runner.core.store.forked
                os._exit(7)
            for act in (write, read):
                child = ctypes.PyDLL(None).fork()                        # no hook runs
                if child == 0:
                    try:
                        act()
                    finally:
                        os._exit(1)
                assert os.waitpid(child, 0)[1] >> 8 == 7
            runner.submit(pow, 4, 2)
            runner.close()
            test_bgjobs.consistent(runner)
            print("whole")
            """, path), 60) == "whole\n"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    @pytest.mark.parametrize("how", ["fork", "pool"])
    def test_kill_9_of_an_app_whose_forked_child_lives_on_is_noticed_all_the_same(
            self, make, path, how):
        process = python("""
            import bgjobs, multiprocessing, os, sys, test_bgjobs, time
            path, how = sys.argv[1:]
            runner = bgjobs.Runner(path, max_workers=1)
            runner.submit(test_bgjobs.hold, "forked")
            test_bgjobs.wait_for(lambda: test_bgjobs.seen)
            def detach():                                # from the pipes of the test
                nothing = os.open(os.devnull, os.O_RDWR)
                for descriptor in range(3):
                    os.dup2(nothing, descriptor)
                return os.getpid()
            if how == "pool":
                pool = multiprocessing.get_context("fork").Pool(1)
                child = pool.apply(detach)
                pool.apply_async(time.sleep, [60])       # an idle worker would see that the app is gone
            elif (child := os.fork()) == 0:
                detach()
                time.sleep(60)
                os._exit(0)
            print(child, flush=True)
            sys.stdin.readline()
            """, path, how, PYTHONWARNINGS="ignore")
        child = int(process.stdout.readline() or finish(process)[2])
        try:
            runner = make(max_workers=1)
            look_for_the_dead(runner)
            assert runner.get(1).attempt == 1
            kill(process)
            wait_for(lambda: runner.get(1).attempt == 2, 2)
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)
        gate("forked").set()
        runner.get(1).result(5)

    def test_a_child_that_a_job_forks_ends_with_the_jobs_function(self, path):
        assert printed(python("""
            import bgjobs, os, sys
            def fork(how):
                child = os.fork()
                if child:
                    return os.waitpid(child, 0)[0] == child
                if how == "raises":
                    raise ValueError
                if how == "exits":
                    sys.exit()
                if how == "starts":
                    bgjobs.start()
                    bgjobs.close()
                return "of the child"
            bgjobs.start(sys.argv[1], max_workers=1)
            print(*[bgjobs.submit(fork, how).result(10) for how in ("returns", "raises", "exits", "starts")])
            """, path, PYTHONWARNINGS="ignore")) == "True True True True\n"

    def test_multiprocessing_in_a_job_and_beside_one(self, path):
        assert printed(python("""
            import bgjobs, multiprocessing, sys, test_bgjobs
            context = multiprocessing.get_context("fork")
            def square(n):
                bgjobs.current_job().checkpoint()
                return n * n
            def in_a_job():
                with context.Pool(2) as pool:
                    return pool.map(square, range(5))
            with bgjobs.Runner(sys.argv[1], max_workers=2) as runner:
                assert runner.submit(in_a_job).result(30) == in_a_job()
            print("fine")
            """, path, PYTHONWARNINGS="ignore"), 60) == "fine\n"


class TestExit:
    @pytest.mark.parametrize("function,ending,code", [
        ("stoppable", "pass", 0), ("spin", "pass", 0), ("stoppable", "sys.exit(3)", 3), ("spin", "sys.exit(3)", 3),
        ("stoppable", "raise ValueError", 1), ("stoppable", "signal.raise_signal(signal.SIGINT)", None),
        ("spin", "interrupt_soon(); signal.raise_signal(signal.SIGINT)", None), ("spin", "interrupt_soon()", None),
        ("stoppable", "interrupt_soon(); runner.get(6).result()", None), ("stoppable", "os.abort()", -signal.SIGABRT),
        ("spin", "threading.Thread(target=runner.close, args=(60,), daemon=True).start()", 0), ("spin", "runner.close(0.2); sys.exit(4)", 4)])
    def test_the_interpreter_exits_on_time_and_leaves_the_jobs_in_the_file(self, path, function, ending, code):
        script = f"""
            import os, signal, sys, threading, bgjobs, test_bgjobs
            bgjobs.GRACE_SECONDS = 0.6
            handlers = [signal.getsignal(number) for number in range(1, 20)]
            runner = bgjobs.Runner(sys.argv[1], max_workers=1)
            runner.submit(test_bgjobs.{function})
            runner.submit_many(test_bgjobs.add, [(1,)] * 5)
            def interrupt_soon():
                timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
                timer.daemon = True                              # it comes while the interpreter closes the runner
                timer.start()
            test_bgjobs.wait_for(lambda: test_bgjobs.seen)
            assert handlers == [signal.getsignal(number) for number in range(1, 20)]
            print("ready", flush=True)
            {ending}
        """
        got, out, err = finish(ready(script, path))        # within 1 s where the machine has time
        assert got == code or code is None
        assert "Exception ignored" not in err and ("result()" in ending or "/bgjobs.py" not in err), err
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            if "abort" in ending:
                look_for_the_dead(runner)
            assert counted(runner)["pending"] == 6
            consistent(runner)

    def test_several_runners_share_the_time_that_an_exit_may_take(self, path):
        process = ready("""
            import atexit, bgjobs, sys, test_bgjobs
            atexit.register(lambda: print(len({test_bgjobs.store_of(runner).close_by for runner in runners}), "deadline"))
            bgjobs.GRACE_SECONDS = 1.0
            runners = [bgjobs.Runner(f"{sys.argv[1]}{n}", max_workers=2) for n in range(4)]
            for runner in runners:
                runner.submit(test_bgjobs.hold, "deaf"), runner.submit(test_bgjobs.stoppable)
            test_bgjobs.wait_for(lambda: len(test_bgjobs.seen) == 8)
            print("ready", flush=True)
        """, path)
        assert finish(process) == (0, "1 deadline\n", "")
        for n in range(4):
            with contextlib.closing(bgjobs.Runner(f"{path}{n}", start=False)) as runner:
                assert [job.status for job in runner.jobs()] == ["pending"] * 2

    def test_a_handle_whose_job_ended_before_it_was_watched_is_watched_no_longer(self, runner):
        jobs = [runner.submit(add, n) for n in range(20)]
        wait_for(lambda: all(job.status == "finished" for job in jobs))
        assert len(concurrent.futures.wait(jobs, 10).done) == len(list(concurrent.futures.as_completed(jobs))) == 20
        assert not watched(runner)

    def test_a_read_that_ends_while_the_store_closes_leaves_no_connection_open(self, path):
        store = store_of(bgjobs.Runner(path, start=False))
        store.close()

        class Readers(collections.deque):
            def append(self, db):                            # the store is closed just before this
                store.closed = True
                super().append(db)
        store._readers, store.closed = Readers(), False
        assert store.read("SELECT 1") and not store._readers

    def test_starting_and_closing_leaves_no_thread_and_no_descriptor(self, path):
        def descriptors():
            return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0

        def once():
            with bgjobs.Runner(path, max_workers=2) as runner:
                runner.submit(add, 1).result(10)
        once()
        wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("bgjobs")])
        before = descriptors()
        for _ in range(100):
            once()
        wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("bgjobs")])
        gc.collect()
        assert descriptors() <= before + 1


# ---- 18 Elsewhere ----------------------------------------------------------------------------------------------

@pytest.fixture
def quick_processes(monkeypatch):
    """Let isolated processes find the files compiled."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", bytecode_folder())
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(params=["threads", "processes", "isolate"])
def elsewhere(request, make, quick_processes):
    """A runner whose functions execute elsewhere, and the options that make it so."""
    if request.param == "isolate":
        yield make(max_workers=2).options(isolate=True)
        return
    executor = concurrent.futures.ThreadPoolExecutor(2) if request.param == "threads" else concurrent.futures.ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"))
    with executor:
        runner = make(executor=executor)
        yield runner
        runner.close()


def where():
    return os.getpid()


def steps(name, count):
    """Save a state at each step, and wait for the gate's file at the last one."""
    job = bgjobs.current_job()
    step = (job.state or {"step": 0})["step"]
    while step < count:
        step += 1
        job.checkpoint(state={"step": step})
        job.progress(step, count, f"step {step}")
    logging.getLogger("app").warning("step %d of attempt %d", step, job.attempt)
    while not os.path.exists(name):
        job.sleep(0.01)
    return [step, job.attempt, job.run_by]


@pytest.fixture
def spawned(make, quick_processes):
    """A runner with a process pool that is replaced when it breaks."""
    pools = []

    def pool():
        pools.append(concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")))
        return pools[-1]
    yield make(executor=pool, max_workers=2)
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


def pool_of(runner):
    """Return the executor that a runner has made."""
    return runner.core.elsewhere.engine(runner.core.executor).executor()


class Hand(concurrent.futures.Executor):
    """An executor that does what the test says: it keeps what it is given."""

    def __init__(self, places=9):
        self.calls, self._max_workers = [], places

    def submit(self, fn, /, *args):
        future = concurrent.futures.Future()
        self.calls.append((future, fn, args))
        return future

    def execute(self, index=0):
        """Make one of the calls in a thread of its own; return the thread."""
        future, fn, args = self.calls[index]

        def call():
            if not future.done():
                future.set_running_or_notify_cancel()
            with contextlib.suppress(bgjobs.BgjobsError):
                fn(*args)
                if not future.done():
                    future.set_result(None)
        thread = threading.Thread(target=call)
        thread.start()
        return thread

    def dial(self, index=0):
        """Be the process that executes one of the calls; return its connection, and the job."""
        host, port, token, payload = self.calls[index][2]
        line = dialed(host, port, token.encode() + b"\n")
        assert abs(json.loads(line.readline())[0] - time.time()) < 60
        return line, json.loads(payload)


NO_NEWS = [], None, []     # no log lines, no progress, no loop of each()


def dialed(host, port, data):
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(data)
        return connection.makefile("rw")


def say(line, *message):
    line.write(json.dumps(message) + "\n")
    line.flush()


def ask(line, number, *call):
    say(line, number, *call)
    return json.loads(line.readline())


def refused(line):
    """Wait until the runner has ended a connection; return what it said before."""
    try:
        return line.read()
    except ConnectionError:
        return ""


def take_items(name, count):
    job = bgjobs.current_job()
    for item in job.each(range(count)):
        job.log.info("item %d", item)
        while item == count - 1 and not os.path.exists(name):
            job.sleep(0.01)


def isolated_children(count):
    many = bgjobs.options(isolate=True)
    return [job.result() for job in [many.submit(add, n, n) for n in range(count)]] + bgjobs.submit_many(add, [(1,)])


def spin_quietly():
    while True:
        pass


def die_once(name):
    if not os.path.exists(name):
        open(name, "w").close()
        os._exit(3)
    return bgjobs.current_job().attempt


def print_it(text):
    print(text)


def start_a_program_and(do):
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    bgjobs.current_job().checkpoint(state=program.pid)
    {"die": lambda: os._exit(9), "return": int, "spin": spin_quietly}[do]()


def ask_much():
    job = bgjobs.current_job()
    child = bgjobs.options(label="child", delay=1000).submit(add, 1)
    told = [child.status, child.label, child.parent_id == job.id, bgjobs.get(child.id).info()["name"]]
    child.stop(by="its parent")
    told += [child.status, child.logs()[-1]["message"], child.cancel(), child.cancelled()]
    told += [[each.id for each in bgjobs.jobs(parent=job.id)] == [child.id]]
    for question in (bgjobs.stats, lambda: child.resume(), lambda: bgjobs.get(10**6), lambda: bgjobs.options(connection=0)):
        try:
            question()
        except Exception as error:
            told.append(type(error).__name__)
    return told


def count_tree(depth, width=2):
    return 1 + sum(job.result() for job in [bgjobs.submit(count_tree, depth - 1, width) for _ in range(width)]) if depth else 1


def wait_for_two_handles():
    child, called = bgjobs.submit(hold, "held child"), []
    bgjobs.get(child.id).add_done_callback(lambda job: called.append(job.id))
    done, _ = concurrent.futures.wait([bgjobs.get(child.id), bgjobs.get(child.id)], timeout=15)
    wait_for(lambda: called == [child.id])
    return len(done)


def wait_in_two_threads():
    job = bgjobs.current_job()
    children = [bgjobs.submit(add, n) for n in range(2)]
    results = []
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(lambda child=child: results.append(child.result()),))
               for child in children]
    for thread in threads:
        thread.start()
    for n in range(20):
        job.checkpoint(state=n)                              # while others wait
    for thread in threads:
        thread.join()
    return sorted(results)


def save_later(name):
    bgjobs.current_job().checkpoint(state=0)
    hold(name)
    bgjobs.current_job().checkpoint(state=1)


def fork_and_die():
    if os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def interrupt_itself():
    raise KeyboardInterrupt("by itself")


def count_on(name):
    job = bgjobs.current_job()
    for n in itertools.count(job.state or 0):
        job.checkpoint(state=n)
        if os.path.exists(name):
            return n
        time.sleep(0.01)


class TestElsewhere:
    def test_a_function_executes_there_and_reports_as_it_does_here(self, elsewhere, tmp_path):
        assert elsewhere.submit(add, 1, 2).result(20) == 3
        failed = elsewhere.submit(fail, "over there")
        with pytest.raises(bgjobs.JobFailed, match="ValueError: over there") as caught:
            failed.result(20)
        assert "in fail" in str(caught.value.traceback) and failed.errors == 1
        job = elsewhere.options(run_by="ann", label="Steps").submit(steps, str(tmp_path / "go"), 5)
        wait_for(lambda: job.progress == 1.0 and job.logs(), 20)
        assert job.status == "running" and job.state == {"step": 5} and job.info()["message"] == "step 5"
        assert [line["message"] for line in job.logs()] == ["step 5 of attempt 1"] and job.logs()[0]["level"] == "WARNING"
        job.stop()
        wait_for(lambda: job.status == "stopped", 5)
        (tmp_path / "go").touch()
        job.resume()
        assert job.result(20) == [5, 2, "ann"] and [line["message"] for line in job.logs()][-1] == "step 5 of attempt 2"
        consistent(job._backend)

    def test_each_goes_on_after_the_last_item_that_was_told(self, elsewhere, tmp_path):
        job = elsewhere.submit(take_items, str(tmp_path / "go"), 300)
        wait_for(lambda: len(job.logs()) == 300, 20)
        job.stop()
        wait_for(lambda: job.status == "stopped", 5)
        (tmp_path / "go").touch()
        job.resume().result(20)
        assert [line["message"] for line in job.logs() if line["message"].startswith("item")] == [
            *(f"item {n}" for n in range(300)), "item 299"]

    def test_a_job_that_waits_for_children_gives_its_place_away(self, elsewhere):
        assert elsewhere.submit(nested, 6).result(60) == 6                      # two places, seven that wait or execute
        assert elsewhere.submit(sum_of_children, 8).result(60) == 56
        assert elsewhere.submit(wait_in_two_threads).result(30) == [0, 1]
        consistent(elsewhere.submit(add)._backend)

    def test_what_a_function_asks_and_does_there(self, elsewhere):
        assert elsewhere.submit(ask_much).result(30) == [
            "pending", "child", True, "test_bgjobs.add", "stopped", "stop by its parent", True, True, True,
            "RuntimeError", "InvalidOperation", "KeyError", "ValueError"]

    def test_the_end_of_a_child_reaches_all_its_handles_there(self, make):
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            runner = make(executor=executor)
            job = runner.submit(wait_for_two_handles)
            wait_for(lambda: seen[-1:] == ["held child"])
            gate("held child").set()
            assert job.result(10) == 2
            runner.close()

    # isolate=True

    def test_isolated_attempts_have_processes_of_their_own(self, make, quick_processes, capfd, tmp_path):
        runner = make(max_workers=2)
        isolated = runner.options(isolate=True)
        assert len({os.getpid(), *(isolated.submit(where).result(20) for _ in range(2))}) == 3
        assert isolated.submit(isolated_children, 3).result(20)[:3] == [0, 2, 4]
        with pytest.raises(bgjobs.BgjobsError, match="the process of its own died under it: exit code 9"):
            isolated.submit(die).result(20)
        assert isolated.options(retries=1, backoff=0).submit(die_once, str(tmp_path / "died")).result(20) == 2
        assert runner.submit(where).result(20) == os.getpid()
        isolated.submit(print_it, "printed there").result(20)
        assert "printed there" in capfd.readouterr().out

    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups")
    @pytest.mark.parametrize("end", ["die", "return", "spin"])
    def test_what_an_isolated_attempt_started_ends_with_it(self, make, quick_processes, monkeypatch, end):
        monkeypatch.setattr(bgjobs, "GRACE_SECONDS", 0.2)
        runner = make(max_workers=1)
        job = runner.options(isolate=True).submit(start_a_program_and, end)
        program = wait_for(lambda: job.state, 20)
        if end == "spin":
            job.stop()
            assert is_alive(program)
            job.force_stop()
        wait_for(lambda: not is_alive(program) and job.status in ("failed", "finished", "stopped"))
        assert runner.submit(add, 1).result(10) == 1
        wait_for(lambda: abandoned(runner) == 0)

    def test_a_timeout_kills_an_isolated_attempt(self, make, quick_processes, monkeypatch):
        monkeypatch.setattr(bgjobs, "GRACE_SECONDS", 0.2)
        runner = make(max_workers=1)
        with pytest.raises(TimeoutError, match="longer than its timeout of 0.3 s"):
            runner.options(isolate=True, timeout=0.3).submit(spin_quietly).result(20)
        wait_for(lambda: abandoned(runner) == 0)
        consistent(runner)

    def test_a_force_stop_kills_nobody_elses_process(self, make, quick_processes):
        runner = make(max_workers=1)
        isolated = runner.options(isolate=True)
        for _ in range(10):
            first, second = isolated.submit(nap, 0.03), isolated.submit(nap, 0.03)
            time.sleep(0.05)
            with contextlib.suppress(bgjobs.InvalidOperation):
                first.stop()
                first.force_stop()
            assert second.result(20) is None
        wait_for(lambda: abandoned(runner) == 0)

    def test_an_isolated_crash_is_noticed_though_a_forked_child_lives(self, make, quick_processes):
        job = make(max_workers=1).options(isolate=True).submit(fork_and_die)
        with pytest.raises(bgjobs.BgjobsError, match="died under it: signal 9"):
            job.result(6)

    def test_an_isolated_attempt_ends_though_a_forked_child_of_the_app_lives(self, make, quick_processes):
        job = make(max_workers=1).options(isolate=True).submit(nap, 0.5)
        wait_for(lambda: job.status == "running" and attempts_of(runner_of(job))[job.id].begun, 20)
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        try:
            assert job.result(10) is None
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_the_modules_of_an_isolated_function_start_no_runner(self, tmp_path, quick_processes):
        (tmp_path / "app.py").write_text(textwrap.dedent("""
            import bgjobs, os
            runner = bgjobs.start("jobs.db", max_workers=2)
            url = bgjobs.serve(port=0)
            @bgjobs.job(isolate=True)
            def where():
                return [os.getpid(), runner.core.life.started, url]
            bgjobs.every("1h", where)
            """))
        code, out, err = finish(python("""
            import app, bgjobs, os
            pid, started, url = app.runner.submit(app.where).result(20)
            print(pid != os.getpid(), started, repr(url), app.runner.core.life.started, app.url != "")
            """, cwd=tmp_path))
        assert (code, out, err) == (0, "True False '' True True\n", "")

    def test_code_that_no_other_process_can_import_is_an_error_before_a_process_starts(self, tmp_path):
        code = textwrap.dedent("""
            import bgjobs
            @bgjobs.job(isolate=True)
            def typed():
                pass
            with bgjobs.Runner("jobs.db") as runner:
                print(runner.submit(typed).exception(10))
            """)
        process = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=tmp_path, env=environment())
        assert "was typed into standard input, a notebook or -c" in process.stdout and not process.stderr

    def test_an_isolated_process_ends_with_its_app(self, tmp_path, quick_processes):
        process = python("""
            import bgjobs, test_bgjobs, sys, time
            runner = bgjobs.Runner(sys.argv[1])
            job = runner.options(isolate=True).submit(test_bgjobs.start_a_program_and, "spin")
            print(test_bgjobs.wait_for(lambda: job.state), flush=True)
            time.sleep(60)
            """, tmp_path / "jobs.db")
        program = int(process.stdout.readline())
        kill(process)
        wait_for(lambda: not is_alive(program))

    # the engine

    def test_a_worker_that_dies_is_a_failed_attempt_and_the_engine_is_replaced(self, spawned, tmp_path):
        with pytest.raises(concurrent.futures.BrokenExecutor):
            spawned.submit(die).result(30)
        assert spawned.submit(add, 1, 2).result(30) == 3
        assert spawned.options(retries=1, backoff=0).submit(die_once, str(tmp_path / "died")).result(30) == 2
        consistent(spawned)

    def test_jobs_wait_for_an_executor_that_takes_none(self, make, monkeypatch, caplog):
        monkeypatch.setattr(bgjobs, "BROKEN_SECONDS", 0.5)
        executor = concurrent.futures.ThreadPoolExecutor(1)
        executor.shutdown()
        runner = make(executor=executor)
        jobs = [runner.submit(add, n) for n in range(20)]
        wait_for(lambda: all(job.phase == "waiting for the executor" for job in jobs))
        wait_for(lambda: any("cannot schedule new futures after shutdown" in line["message"] for job in jobs for line in job.logs()))
        assert "its executor takes no job" in caplog.text
        executor._shutdown = False
        assert [job.result(10) for job in jobs] == [*range(20)] and {job.attempt for job in jobs} == {1}
        consistent(runner)
        executor._shutdown = True

    def test_an_executor_that_repeats_a_call_is_refused_and_one_that_is_stopped_forgets(self, make):
        hand = Hand()
        runner = make(executor=hand, max_workers=3)
        twice = runner.submit(steps, os.devnull, 3)
        wait_for(lambda: len(hand.calls) == 1)
        lost = runner.submit(add, 1)
        wait_for(lambda: len(hand.calls) == 2)
        hand.execute(0).join()
        assert twice.result(10) == [3, 1, None]
        with pytest.raises(bgjobs.BgjobsError, match="does not take this attempt"):
            hand.calls[0][1](*hand.calls[0][2])
        assert twice.attempt == 1 and twice.status == "finished"
        lost.stop()
        wait_for(lambda: lost.status == "stopped" and hand.calls[1][0].cancelled())
        assert lost.attempt == 0
        lost.resume()
        wait_for(lambda: len(hand.calls) == 3)
        hand.execute(2).join()
        assert lost.result(10) == 1
        consistent(runner)

    def test_what_an_executor_has_not_begun_is_given_back_at_the_end(self, make):
        hand = Hand()
        runner = make(executor=hand)
        job = runner.submit(add, 1)
        wait_for(lambda: hand.calls)
        begun = time.monotonic()
        runner.close(20)
        assert time.monotonic() - begun < 15 and hand.calls[0][0].cancelled()
        again = make(start=False)
        assert again.get(job.id).status == "pending" and again.get(job.id).attempt == 0
        consistent(again)

    def test_no_more_attempts_are_at_an_engine_than_it_has_places(self, make):
        hand = Hand(places=1)
        runner = make(executor=hand, max_workers=3)
        parent = runner.submit(wait_for_held, "on its place")
        wait_for(lambda: hand.calls)
        thread = hand.execute()
        wait_for(lambda: seen[-1:] == ["on its place"])                          # in a thread of the app's
        later = runner.submit(add, 1)
        time.sleep(0.2)
        assert len(hand.calls) == 1 and later.status == "running" and later.info()["attempt"] == 1
        later.stop()
        wait_for(lambda: later.status == "stopped")
        gate("on its place").set()
        assert parent.result(10) is None
        thread.join(10)
        consistent(runner)

    @pytest.mark.parametrize("places", [2, 16])
    def test_deep_and_broad_trees_never_wait_for_a_process_in_vain(self, make, places):
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            runner = make(executor=executor, max_workers=places)
            assert [runner.submit(count_tree, 4).result(30) for _ in range(2)] == [31] * 2
            jobs = [runner.submit(count_tree, 3, 3) for _ in range(2)]
            assert [job.result(60) for job in jobs] == [40, 40]
            consistent(runner)
            runner.close()

    def test_what_a_broken_pool_had_only_queued_is_no_attempt(self, make):
        hands = []

        def make_hand():
            hands.append(Hand())
            return hands[-1]
        runner = make(executor=make_hand, max_workers=2)
        jobs = [runner.submit(add, 1), runner.submit(add, 2)]
        wait_for(lambda: hands and len(hands[0].calls) == 2)
        line, given = hands[0].dial(0)
        jobs.sort(key=lambda job: job.id != given["job"][0])
        wait_for(lambda: any(attempt.begun for attempt in attempts_of(runner).values()))
        hands[0].submit = lambda *call: exec("raise concurrent.futures.BrokenExecutor")
        for future, *_ in list(hands[0].calls):
            future.set_exception(concurrent.futures.BrokenExecutor("a process died"))
        assert isinstance(jobs[0].exception(10), concurrent.futures.BrokenExecutor)
        wait_for(lambda: len(hands) == 2 and hands[1].calls)
        hands[1].execute().join()
        assert jobs[1].result(10) == jobs[1].id and jobs[1].attempt == 1 and jobs[1].errors == 0
        consistent(runner)
        line.close()

    def test_functions_say_where_they_execute(self, make):
        here, there = Hand(), Hand()
        bgjobs.job(executor=there)(echo)
        bgjobs.job(executor=None)(note)
        try:
            runner = make(executor=here, callback="127.0.0.1:0")
            runner.submit(add, 1), runner.submit(echo, 2)
            runner.submit(note, 3).result(10)
            wait_for(lambda: here.calls and there.calls)
            assert seen[-1] == 3 and len(here.calls) == len(there.calls) == 1
            there.execute().join(), here.execute().join()
        finally:
            del bgjobs.declared[echo], bgjobs.declared[note]

    def test_bad_executors_are_refused(self, make, tmp_path):
        for bad in (5, "x", object()):
            with pytest.raises(ValueError, match="executor must be a concurrent.futures.Executor, what makes one, or None"):
                make(executor=bad)
        with pytest.raises(TypeError, match="executor is an option of a function"):
            bgjobs.options(executor=None)
        for bad in (5, "x", ":80", "host:", "host:x"):
            with pytest.raises(ValueError, match='callback must be "host:port"'):
                make(callback=bad)
        assert make(str(tmp_path / "a.db"), executor=concurrent.futures.ThreadPoolExecutor(3)).max_workers == 3

    # the connection

    def test_an_attempt_whose_connection_is_lost_has_failed(self, make):
        hand = Hand()
        runner = make(executor=hand)
        told = runner.submit(add, 1)
        wait_for(lambda: len(hand.calls) == 1)
        silent = runner.submit(add, 2)
        wait_for(lambda: len(hand.calls) == 2)
        for index in range(2):
            line, _ = hand.dial(index)
            line.close()
            if index == 0:
                time.sleep(0.1)
                hand.calls[0][0].set_exception(OSError("the machine burns"))
        assert isinstance(told.exception(10), OSError)
        assert "the process that executed it is gone" in str(silent.exception(10))
        assert sum(places(runner)) == 0
        consistent(runner)

    def test_what_an_attempt_says_is_carried_out_in_order(self, make):
        hand = Hand()
        runner = make(executor=hand)
        job = runner.submit(add, 1)
        wait_for(lambda: hand.calls)
        line, given = hand.dial()
        assert given["function"] == "add" and given["path"] == runner.path
        assert ask(line, 1, "save", ["5", None], [[0, 20, "a line"]], [1, 4, "a message"], [3]) == [1, True]
        assert ask(line, 2, "operate", ["drop", 1, None], *NO_NEWS)[2] == "KeyError"
        assert ask(line, 3, "info", [99], *NO_NEWS) == [3, None, "KeyError", f"there is no job 99 in {runner.path}"]
        assert ask(line, 4, "info", [], *NO_NEWS)[2] == "TypeError"
        assert job.state == 5 and [entry["message"] for entry in job.logs()] == ["a line"]
        wait_for(lambda: job.progress == 0.25 and job.info()["message"] == "a message", 2)
        job.stop()
        assert json.loads(line.readline()) == [0, "stop", "halted"]
        job.force_stop()
        assert json.loads(line.readline()) == [0, "void"]
        assert ask(line, 5, "save", ["6", None], *NO_NEWS)[2] == "JobStopped" and job.state == 5
        say(line, 0, "end", ["returned", 0.1, "7", None], *NO_NEWS)
        assert refused(line) == "" and job.status == "stopped"
        wait_for(lambda: abandoned(runner) == 0)

    @pytest.mark.parametrize("bad", [
        "GET / HTTP/1.0\r\n\r\n", "[]\n", "5\n", "[" * 3_000 + "\n", '[1, "nonsense", [], [], null, []]\n',
        '["1", "info", [1], [], null, []]\n', '[1, "info", [1]]\n', '[0, "tell", [], 5, null, []]\n',
        '[0, "save", [], [], null, []]\n', '[0, "tell", [], [["x"]], null, []]\n', "x" * 300_000])
    def test_a_message_that_is_none_ends_that_attempt_alone(self, make, monkeypatch, bad):
        monkeypatch.setattr(bgjobs, "LINE_BYTES", 200_000)
        hand = Hand()
        runner = make(executor=hand)
        job = runner.submit(add, 1)
        wait_for(lambda: len(hand.calls) == 1)
        other = runner.submit(add, 2)
        wait_for(lambda: len(hand.calls) == 2)
        line, _ = hand.dial()
        hand.calls[0][0].set_result(None)
        with contextlib.suppress(OSError):
            line.write(bad)
            line.flush()
        assert refused(line) == ""
        assert isinstance(job.exception(10), bgjobs.BgjobsError)
        hand.execute(1).join()
        assert other.result(10) == 2

    def test_strangers_and_replayed_tokens_are_refused(self, make, monkeypatch):
        monkeypatch.setattr(bgjobs, "STRANGER_SECONDS", 0.5)
        hand = Hand()
        runner = make(executor=hand)
        job = runner.submit(add, 1)
        wait_for(lambda: hand.calls)
        host, port, token, _ = hand.calls[0][2]
        assert host == "127.0.0.1"
        for bad in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe\n", b"\n", b"a" * 5_000, token[:-1].encode() + b"\n", token.upper().encode() + b"x\n"):
            assert refused(dialed(host, port, bad)) == ""
        begun = time.monotonic()
        assert refused(dialed(host, port, token[:5].encode())) == "" and 0.3 < time.monotonic() - begun < 5
        hand.execute().join()
        assert job.result(10) == 1
        assert refused(dialed(host, port, token.encode() + b"\n")) == ""

    def test_a_flood_of_strangers_takes_few_connections_and_holds_up_no_attempt(self, make):
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            runner = make(executor=executor)
            assert runner.submit(add, 1).result(10) == 1
            server = runner.core.elsewhere.server
            address, strangers, most = server.listen(), [], []

            def flood():
                for _ in range(1_200):
                    with contextlib.suppress(OSError):
                        strangers.append(socket.create_connection(address, timeout=10))
                    most.append(len(server.strangers))
                    if len(strangers) > 300:
                        strangers.pop(0).close()
            flooding = threading.Thread(target=flood)
            flooding.start()
            begun = time.monotonic()
            for n in range(20):
                assert runner.submit(add, n).result(10) == n
            flooding.join(30)
            assert time.monotonic() - begun < 20 and max(most) <= bgjobs.STRANGERS + 1
            for stranger in strangers:
                stranger.close()
            runner.close()

    def test_many_attempts_leave_no_threads_descriptors_or_memory_behind(self, make):
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            runner = make(executor=executor)
            jobs = runner.submit_many(add, [(n,) for n in range(100)])
            assert runner.get(jobs[-1]).result(20) == 99
            wait_for(lambda: not attempts_of(runner))
            time.sleep(0.3)
            before = threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
            jobs = runner.submit_many(add, [(n,) for n in range(500)])
            assert [runner.get(job).result(20) for job in jobs] == [*range(500)]
            wait_for(lambda: threading.active_count() <= before[0])
            assert not before[1] or wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before[1] + 2)
            gc.collect()
            assert not [each for each in gc.get_objects() if type(each) is bgjobs.Drive]
            runner.close()

    def test_an_attempt_whose_runner_is_gone_stops_at_its_next_checkpoint(self, make):
        hand = Hand()
        runner = make(executor=hand)
        jobs = [runner.submit(steps, "/nowhere", 10**9), runner.submit(save_later, "later")]
        wait_for(lambda: len(hand.calls) == 2)
        threads = [hand.execute(index) for index in range(2)]
        wait_for(lambda: jobs[0].state and seen[-1:] == ["later"])
        runner.close(0)
        gate("later").set()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        again = make(start=False)
        assert again.get(jobs[0].id).status == "pending" and again.get(jobs[0].id).state["step"] >= 1
        assert again.get(jobs[1].id).state == 0

    def test_two_runners_share_an_executor_and_two_processes_a_file(self, make, tmp_path):
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            runners = [make(str(tmp_path / name), executor=executor) for name in ("a.db", "b.db", "a.db")]
            jobs = [runner.submit(count_tree, 3) for runner in runners]
            assert [job.result(30) for job in jobs] == [15] * 3
            for runner in runners:
                consistent(runner)
                runner.close()

    def test_a_callback_address_that_is_taken_is_waited_for_and_then_an_error_at_start(self, make, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            runner = make(executor=concurrent.futures.ThreadPoolExecutor, callback=address, start=False)
            job = runner.submit(add, 1)
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                started = thread.submit(runner.start)
                assert not concurrent.futures.wait([started], 0.2).done
                other.close()                                # the process before this one has gone down
                assert started.result(5) is runner
        assert job.result(10) == 1 and runner.core.elsewhere.server.listen()[1] == int(address[10:])
        monkeypatch.setattr(bgjobs, "GRACE_SECONDS", -1)
        with pytest.raises(OSError, match=f"callback {address} cannot be listened at: ") as caught:
            make(executor=Hand(), callback=address)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="callback no.such.host.invalid:80 cannot be listened at: "):
            make(executor=Hand(), callback="no.such.host.invalid:80")

    # going down

    def test_an_app_that_ends_without_close_waits_for_no_endless_attempt_of_its_pool(self, tmp_path):
        (tmp_path / "app.py").write_text(textwrap.dedent("""
            import bgjobs, concurrent.futures, itertools
            def count():
                job = bgjobs.current_job()
                for n in itertools.count():
                    job.checkpoint(state=n)
                    job.sleep(0.01)
            if __name__ == "__main__":
                runner = bgjobs.Runner("jobs.db", executor=concurrent.futures.ProcessPoolExecutor, max_workers=2)
                jobs = [runner.submit(count) for _ in range(2)]
                while not any(job.state for job in jobs):
                    pass
            """))
        code, out, err = finish(python("import runpy; runpy.run_path('app.py', run_name='__main__')", cwd=tmp_path), 30)
        assert code == 0
        runner = bgjobs.Runner(tmp_path / "jobs.db", start=False)
        assert [job.status for job in runner.jobs()] == ["pending"] * 2 and any(job.state for job in runner.jobs())
        runner.close()

    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups")
    @pytest.mark.parametrize("ending", ["try: ready()\nfinally: runner.close()", "with runner: ready()", "ready()"])
    def test_what_ctrl_c_cuts_off_in_the_processes_of_a_pool_goes_on_at_the_next_start(self, tmp_path, ending):
        (tmp_path / "app.py").write_text(textwrap.dedent("""
            import bgjobs, itertools, multiprocessing, sys, time
            from concurrent.futures import ProcessPoolExecutor
            def count():
                for n in itertools.count():
                    bgjobs.current_job().checkpoint(state=n)
                    sum(range(100_000))
            def ready():
                print("ready", flush=True)
                time.sleep(60)
            def main(ending):                                # of three processes, a third is idle
                pool = lambda: ProcessPoolExecutor(3, multiprocessing.get_context("spawn"))
                runner = bgjobs.Runner("jobs.db", executor=pool, max_workers=3)
                jobs = [runner.submit(count) for _ in range(2)]
                while not all(job.state for job in jobs):
                    time.sleep(0.01)
                exec(ending, {**globals(), "runner": runner})
            if __name__ == "__main__":
                main(*sys.argv[1:])
            """))
        with open(tmp_path / "printed", "w") as printed:
            app = subprocess.Popen([sys.executable, "app.py", ending], cwd=tmp_path, stdin=subprocess.DEVNULL,
                                   stdout=printed, stderr=printed, start_new_session=True, env=environment())
        try:
            wait_for(lambda: "ready" in (tmp_path / "printed").read_text(), 30)
            with contextlib.closing(bgjobs.Runner(tmp_path / "jobs.db", start=False)) as runner:
                jobs = runner.jobs()
                os.killpg(app.pid, signal.SIGINT)
                if "with" in ending:                                            # waits for the jobs, as executors do: they go on
                    wait_for(lambda: all(job.attempt == 2 for job in jobs), 20)
                    states = [job.state for job in jobs]
                    wait_for(lambda: all(job.state > state for job, state in zip(jobs, states)), 20)
                    os.killpg(app.pid, signal.SIGINT)
                assert app.wait(20)
                assert [(job.status, job.phase, job.errors) for job in jobs] == [("pending", "interrupted", 0)] * 2
                assert all(job.state is not None for job in jobs)
                consistent(runner)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(app.pid, signal.SIGKILL)
            app.wait(10)

    @pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
    def test_sigterm_to_a_process_of_a_pool_has_its_attempt_pause(self, spawned, tmp_path, monkeypatch):
        job = spawned.submit(count_on, str(tmp_path / "go"))
        wait_for(lambda: job.state, 20)
        for pid in list(pool_of(spawned)._processes):
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: job.attempt == 2 and job.status == "running", 20)
        (tmp_path / "go").touch()
        assert job.result(20) > 0 and job.errors == 0
        consistent(spawned)

    @pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
    def test_a_pool_that_broke_ends_though_a_function_reaches_no_checkpoint(self, spawned, monkeypatch):
        spinning = spawned.submit(spin_quietly)
        wait_for(lambda: spinning.status == "running" and attempts_of(spawned)[spinning.id].begun, 20)
        pool = pool_of(spawned)
        dead = spawned.submit(die)
        assert dead.exception(20) is not None
        begun = time.monotonic()
        pool.shutdown(wait=True)
        assert time.monotonic() - begun < 20
        assert isinstance(spinning.exception(20), concurrent.futures.BrokenExecutor)

    def test_a_job_that_raises_keyboard_interrupt_by_itself_fails(self, elsewhere):
        job = elsewhere.submit(interrupt_itself)
        with pytest.raises(bgjobs.JobFailed, match="KeyboardInterrupt: by itself"):
            job.result(20)
        assert job.status == "failed" and elsewhere.submit(add, 1).result(20) == 1
        consistent(job._backend)


# ---- 19 The default runner -------------------------------------------------------------------------------------

class TestDefaultRunner:
    def test_the_default_runner_starts_with_the_first_submit(self, tmp_path):
        code = """
            import bgjobs, test_bgjobs
            job = bgjobs.submit(test_bgjobs.sum_of_children, 4)
            print(job.result(10), [j.status for j in bgjobs.jobs(parent=job)], bgjobs.get(job.id).children["total"])
            try:
                bgjobs.start("other.db")
            except RuntimeError as error:
                print(error)
            bgjobs.close()
        """
        code, out, err = finish(python(code, cwd=tmp_path, BGJOBS_DB=str(tmp_path / "env.db")))
        assert out.startswith("12 ['finished', 'finished', 'finished', 'finished'] 4\nthe default runner is on"), (out, err)
        assert (tmp_path / "env.db").exists()

    def test_a_submit_after_the_default_runner_was_closed_opens_no_other_file(self, tmp_path):
        code, out, err = finish(python("""
            import bgjobs, os, test_bgjobs
            bgjobs.start("app.db")
            bgjobs.close()
            for use in (lambda: bgjobs.submit(test_bgjobs.add, 1), bgjobs.jobs, bgjobs.drain):
                try:
                    print(use())
                except RuntimeError as error:
                    print(error)
            assert not os.path.exists("bgjobs.db")
            bgjobs.start("app.db")
            print(bgjobs.submit(test_bgjobs.add, 1, 2).result(10))
        """, cwd=tmp_path))
        closed = f"the runner on {tmp_path / 'app.db'} is shut down; call start()\n"
        assert (code, out) == (0, 3 * closed + "3\n"), err

    @pytest.mark.parametrize("name", ["submit", "submit_many", "every", "options", "get", "jobs", "schedules", "stats", "prune",
                                      "drain", "backup", "serve", "wsgi", "close", "shutdown"])
    def test_the_functions_of_the_module_are_the_methods_of_a_runner_in_signature_and_words(self, name):
        function, method = getattr(bgjobs, name), getattr(bgjobs.Runner, name)
        first, *others = inspect.signature(method).parameters.values()
        assert first.name == "self" and [str(each) for each in inspect.signature(function).parameters.values()] == [str(each) for each in others]
        assert function.__name__ == name and (function.__doc__ == method.__doc__ or name in ("close", "shutdown"))

    def test_the_functions_of_the_module_can_be_jobs(self, tmp_path):
        code = """
            import bgjobs
            runner = bgjobs.start("app.db")
            print(bgjobs.submit(bgjobs.prune, 0).result(10), bgjobs.get(1).name, bgjobs.submit(bgjobs.backup, "copy.db").result(10))
            bgjobs.close()
        """
        code, out, err = finish(python(code, cwd=tmp_path))
        assert (code, out) == (0, f"0 bgjobs.prune {tmp_path / 'copy.db'}\n"), err


# ---- 20 Status page --------------------------------------------------------------------------------------------

def say_lines(count):
    for n in range(count):
        bgjobs.current_job().log.info(f"line {n}" if n else "a" * 40 + "! 0")
    gate("more").wait(20)
    bgjobs.current_job().log.info("more")


def fail_with(text):
    raise ValueError(text)


class Visitor:
    """A browser's manners towards a page, without the browser."""

    def __init__(self, url):
        self.url, self.host = url, url.split("/")[2]
        self.token = self.get("api/session")["token"]

    def request(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection(self.host, timeout=10)
        connection.request(method, "/" + path, body, {"Host": self.host, **dict(headers)})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        return answer.status, answer.headers, content

    def get(self, path, status=200):
        got, _, content = self.request("GET", path)
        assert got == status, content
        return json.loads(content)

    def post(self, path, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        full = {"Content-Type": "application/json", "Origin": f"http://{self.host}",
                "X-Bgjobs-Token": self.token,
                **{name.replace("_", "-"): value for name, value in headers.items()}}
        sent = {name: value for name, value in full.items() if value is not None}
        got, _, content = self.request("POST", path, data, sent)
        assert got == status, content
        return json.loads(content)


@pytest.fixture
def visitor(runner):
    return Visitor(runner.serve(port=0))


def raw(visitor, data, seconds=12):
    """Send bytes, return all that comes back."""
    host, port = visitor.host.split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        with contextlib.suppress(ConnectionError):
            while block := connection.recv(65536):
                got += block
        return got


class TestPage:
    def test_the_list_has_what_the_contract_says(self, runner, visitor):
        job = runner.options(label="<script>alert(1)</script>", run_by="ann").submit(sum_of_children, 3)
        job.result(10)
        answer = visitor.get("api/jobs")
        assert set(answer) == {"jobs", "next", "counts"} and answer["next"] is None
        assert answer["counts"] == {"pending": 0, "running": 0, "stopping": 0, "stopped": 0, "finished": 4, "failed": 0, "cancelled": 0}
        assert [info["id"] for info in answer["jobs"]] == [4, 3, 2, 1]
        assert visitor.get("api/jobs/1") == job.info() == answer["jobs"][3]
        assert [info["id"] for info in visitor.get("api/jobs?parent=none")["jobs"]] == [1]
        assert [info["id"] for info in visitor.get("api/jobs?parent=1")["jobs"]] == [4, 3, 2]
        assert visitor.get("api/jobs?run_by=ann&status=failed")["jobs"] == []

    def test_pages_of_the_list_follow_each_other(self, runner, visitor):
        ids = runner.options(delay=1000).submit_many(add, [(i,) for i in range(25)])
        got, cursor = [], ""
        while cursor is not None:
            answer = visitor.get(f"api/jobs?limit=10&before={cursor}")
            got += [info["id"] for info in answer["jobs"]]
            cursor = answer["next"]
        assert got == ids[::-1]

    def test_logs_and_stack_of_a_job(self, runner, visitor):
        job = runner.submit(hold_and_log, "logs")
        wait_for(lambda: "logs" in seen)
        assert "in hold" in visitor.get(f"api/jobs/{job.id}/stack")["stack"]
        gate("logs").set()
        job.result(10)
        lines = visitor.get(f"api/jobs/{job.id}/logs")["logs"]
        assert [(line["level"], line["message"]) for line in lines] == [("INFO", "one"), ("WARNING", "two")]
        assert set(lines[0]) == {"id", "job_id", "at", "level", "message"}
        assert visitor.get(f"api/jobs/{job.id}/logs?after={lines[0]['id']}&level=WARNING&text=TWO")["logs"] == lines[1:]
        assert visitor.get(f"api/jobs/{job.id}/stack") == {"stack": None}

    @pytest.mark.parametrize("address", ["api/jobs?status=done", "api/jobs?colour=1", "api/jobs?limit=x", "api/jobs?parent=-1",
                                      "api/jobs?created_from=soon", "api/jobs?errors=perhaps", "api/jobs/1/logs?level=loud",
                                      "api/jobs/1/logs?since=x", "api/jobs/1/logs?regex=x", "api/jobs?created_to=nan",
                                      "api/jobs/1/logs?until=inf", "api/jobs?status=failed&status=pending"])
    def test_bad_parameters_are_named(self, runner, visitor, address):
        runner.submit(add, 1)
        assert len(visitor.get(address, 400)["error"]) > 10

    @pytest.mark.parametrize("address", ["api/jobs/99", "api/jobs/abc", "api/nothing", "nothing", "jobs/x", "..%2fetc/passwd",
                                      "api/jobs/" + "9" * 40])
    def test_what_does_not_exist_is_404(self, visitor, address):
        assert "error" in visitor.get(address, 404)

    def test_operations_say_what_was_done_and_what_was_refused(self, runner, visitor):
        later = [runner.options(delay=1000).submit(add, i) for i in range(3)]
        over = runner.submit(add, 1)
        over.result(10)
        answer = visitor.post("api/jobs/stop", {"ids": [later[0].id, over.id, 99]})
        assert answer["done"] == [later[0].id]
        assert answer["refused"][0] == {"id": over.id, "why": f"job {over.id} is finished; it can be restarted, not stopped"}
        assert later[0].status == "stopped" and "stop by web" in later[0].logs()[0]["message"]
        assert visitor.post("api/jobs/stop", {"ids": [over.id]}, 409)["refused"][0]["id"] == over.id
        assert visitor.post("api/jobs/cancel", {"filter": {"status": "pending"}})["done"] == [later[2].id, later[1].id]
        assert visitor.post("api/jobs/stop", {"ids": [99]}, 404)["refused"] == [{"id": 99, "why": "there is no job 99"}]
        assert visitor.post("api/jobs/stop", {"filter": {"limit": 1}}, 400)
        assert visitor.post("api/jobs/resume", {"ids": [later[0].id]}) == {"done": [later[0].id], "refused": []}
        assert later[0].phase == "scheduled"

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"ids": 1}', b'{"ids": ["1"]}', b'{"ids": [true]}', b'{"ids": [], "x": 1}',
                                      b'{"filter": []}', b'{"filter": {"colour": 1}}', b'{"ids": [' + b"9" * 30 + b"]}",
                                      b"[" * 100_000])
    def test_a_bad_body_is_400(self, visitor, body):
        assert "error" in visitor.post("api/jobs/stop", body, 400)

    @pytest.mark.parametrize("headers,status", [
        ({"X_Bgjobs_Token": None}, 403), ({"X_Bgjobs_Token": "wrong"}, 403), ({"X_Bgjobs_Token": "\xe9"}, 403),
        ({"Origin": None}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403), ({"Content_Type": "text/plain"}, 415), ({"Content_Type": None}, 415),
        ({"Host": "evil.example"}, 421), ({"Host": "127.0.0.1:1"}, 421), ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
    ])
    def test_strangers_cannot_operate(self, runner, visitor, headers, status):
        job = runner.options(delay=1000).submit(add, 1)
        visitor.post("api/jobs/stop", {"ids": [job.id]}, status, **headers)
        assert job.status == "pending"

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
    def test_other_methods_change_nothing(self, runner, visitor, method):
        job = runner.options(delay=1000).submit(add, 1)
        status, _, _ = visitor.request(method, "api/jobs/stop", json.dumps({"ids": [job.id]}), {"X-Bgjobs-Token": visitor.token})
        assert status in (404, 405) and job.status == "pending"

    @pytest.mark.parametrize("host", [b"", b"Host: evil.example\r\n", b"Host: 127.0.0.1\r\nHost: 127.0.0.1\r\n",
                                      b"Host: localhost:99999\r\n", b"Host: 127.0.0.1.evil.example\r\n"])
    def test_other_host_headers_are_not_answered(self, visitor, host):
        assert raw(visitor, b"GET /api/jobs HTTP/1.0\r\n" + host + b"\r\n").split(b"\r\n")[0].split()[1] == b"421"

    @pytest.mark.parametrize("data", [
        b"GET /\r\n", b"\x00\xff\xfe\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /api/jobs/stop HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"GET /%0d%0aX-Evil:1 HTTP/1.0\r\n\r\n", b"GET /%00 HTTP/1.0\r\n\r\n",
        b"POST /api/jobs/stop HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nContent-Length: 40\r\n\r\nGET /api/session HTTP/1.1\r\nHost: 127.0.0.1",
    ])
    def test_broken_requests_get_one_answer_or_none_and_the_page_lives(self, visitor, data, monkeypatch):
        monkeypatch.setattr(bgjobs, "REQUEST_SECONDS", 1.0)
        answer = raw(visitor, data)
        assert answer.count(b"HTTP/1.0 ") <= 1 and b"X-Evil" not in answer and b"token" not in answer
        assert not answer or re.match(rb"HTTP/1\.0 [45]", answer) and b"default-src 'none'" in answer
        assert visitor.get("api/session")["token"] == visitor.token

    def test_slow_requests_end_at_a_deadline_and_hold_nobody_up(self, visitor, monkeypatch):
        monkeypatch.setattr(bgjobs, "REQUEST_SECONDS", 0.5)
        host, port = visitor.host.split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(40)]
        for connection in slow:
            connection.sendall(b"GET / HT")
        assert visitor.get("api/jobs")["jobs"] == []
        begun = time.monotonic()
        for connection in slow:
            connection.settimeout(15)
            assert connection.recv(100) == b""
            connection.close()
        assert time.monotonic() - begun < 15                 # not 0.5 s for each of the 40

    def test_unchanged_lists_cost_a_304(self, runner, visitor):
        runner.submit(add, 1).result(10)
        _, headers, _ = visitor.request("GET", "api/jobs")
        unchanged = visitor.request("GET", "api/jobs", headers={"If-None-Match": headers["ETag"]})
        assert unchanged[0] == 304 and unchanged[2] == b""
        runner.options(delay=1000).submit(add, 1)
        assert visitor.request("GET", "api/jobs", headers={"If-None-Match": headers["ETag"]})[0] == 200
        tag = visitor.request("GET", "api/jobs")[1]["ETag"]
        for other in ("api/jobs/1", "api/jobs?status=failed", "api/stats", "api/export"):
            assert visitor.request("GET", other, headers={"If-None-Match": tag})[0] == 200

    def test_the_page_and_its_assets_are_valid_alone(self, visitor):
        for path, kind in (("", "text/html"), ("jobs/1", "text/html"), ("page.css", "text/css"), ("jobs/page.js", "text/javascript")):
            status, headers, content = visitor.request("GET", path)
            assert status == 200 and headers["Content-Type"].startswith(kind) and len(content) > 500
        assert "innerHTML" not in bgjobs.PAGE_JS and "<script>" not in bgjobs.PAGE_HTML and "style=" not in bgjobs.PAGE_HTML
        assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", bgjobs.PAGE_HTML + bgjobs.PAGE_CSS)

    def test_it_mounts_under_a_prefix_of_a_wsgi_app(self, runner):
        page, seen = runner.wsgi(), []
        job = runner.options(delay=1000).submit(add, 1)

        def call(path, **environ):
            started = []
            body = b"".join(page({"REQUEST_METHOD": "GET", "SCRIPT_NAME": "/admin/jobs", "PATH_INFO": path, "wsgi.url_scheme": "http",
                                  "HTTP_HOST": "localhost:5000", **environ}, lambda status, headers: started.append(status)))
            return started[0], body
        assert call("/")[0] == "200 OK" and call("/page.js")[0] == "200 OK"
        assert json.loads(call(f"/api/jobs/{job.id}")[1])["id"] == job.id
        assert call("/", HTTP_HOST="app.example")[0].startswith("421")
        page = runner.wsgi(hosts=["app.example"])
        assert call("/", HTTP_HOST="app.example")[0] == "200 OK"
        page({"SCRIPT_NAME": "/caf\u00c3\u00a9", "PATH_INFO": "", "QUERY_STRING": "status=failed", "HTTP_HOST": "localhost"},
             lambda status, headers: seen.extend([status, dict(headers)["Location"]]))
        assert seen == ["308 Permanent Redirect", "caf%C3%A9/?status=failed"]
        runner.close()
        assert call("/api/jobs")[0] == call("/healthz")[0] == "503 Service Unavailable"

    def test_read_only_refuses_operations(self, runner):
        visitor = Visitor(runner.serve(port=0, read_only=True))
        job = runner.options(delay=1000).submit(add, 1)
        assert visitor.get(f"api/jobs/{job.id}")["operations"] == [] == visitor.get("api/jobs")["jobs"][0]["operations"]
        assert "read-only" in visitor.post("api/jobs/stop", {"ids": [job.id]}, 403)["error"]

    def test_other_addresses_are_refused_and_a_taken_port_is_a_warning(self, runner, visitor, caplog):
        for host in ("0.0.0.0", "192.168.1.1", "example.org", ""):
            with pytest.raises(ValueError, match="host must be a loopback address"):
                runner.serve(host)
        with caplog.at_level("WARNING", "bgjobs"):
            assert runner.serve(port=int(visitor.host.split(":")[1])) == ""
        assert "jobs go on" in caplog.text and runner.submit(add, 1, 2).result(10) == 3

    def test_processes_that_serve_one_file_share_a_token_behind_any_balancer(self, make, path, visitor):
        first, second = visitor, Visitor(make(path, start=False).serve(port=0))
        job = make(path, start=False).options(delay=1000).submit(add, 1)
        second.post("api/jobs/stop", {"ids": [job.id]}, X_Bgjobs_Token=first.token)
        assert job.status == "stopped"

    def test_a_proxy_may_end_tls_before_it(self, runner):
        page = runner.wsgi(hosts=["jobs.example"])

        def status(origin, scheme="http"):
            started = []
            list(page({"REQUEST_METHOD": "GET", "PATH_INFO": "/api/jobs", "wsgi.url_scheme": scheme, "HTTP_HOST": "jobs.example",
                       "HTTP_ORIGIN": origin}, lambda status, headers: started.append(int(status[:3]))))
            return started[0]
        assert status("http://jobs.example") == status("https://jobs.example") == status("https://jobs.example", "https") == 200
        assert status("http://jobs.example", "https") == status("https://jobs.example:444") == status("null") == 403

    def test_a_store_that_cannot_serve_says_so_once_and_without_a_traceback(self, make, caplog, monkeypatch):
        page = make(start=False).wsgi()

        def fail(self, sql, parameters=None):
            raise bgjobs.StoreError("cannot read it")
        monkeypatch.setattr(bgjobs.Store, "read", fail)
        started = []
        body, = page({"REQUEST_METHOD": "GET", "PATH_INFO": "/healthz", "HTTP_HOST": "localhost"}, lambda status, headers: started.append(status))
        assert started == ["503 Service Unavailable"] and json.loads(body) == {"error": "cannot read it"} and not caplog.records

    def test_two_runners_pages_do_not_share_a_token(self, make, visitor, tmp_path):
        other = Visitor(make(str(tmp_path / "other.db"), start=False).serve(port=0))
        other.post("api/jobs/stop", {"ids": [1]}, 403, X_Bgjobs_Token=visitor.token)

    def test_a_password_is_asked_for_and_its_name_stands_in_the_log(self, runner):
        visitor = Visitor.__new__(Visitor)
        visitor.url = runner.serve("0.0.0.0", 0, password="open s\u00e9same")
        visitor.host = "127.0.0.1:" + visitor.url.split(":")[2].rstrip("/")
        right = {"Authorization": "Basic " + base64.b64encode("ann:open s\u00e9same".encode()).decode()}
        for path in ("", "api/jobs", "api/session", "metrics", "page.js"):
            for wrong in ({}, {"Authorization": "Basic YW5uOm5v"}, {"Authorization": "Basic \u00ff"}, {"Authorization": "Bearer x"}):
                status, headers, _ = visitor.request("GET", path, headers=wrong)
                assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="bgjobs", charset="UTF-8"')
            assert visitor.request("GET", path, headers=right)[0] == 200
        assert visitor.request("GET", "healthz")[0] == 200
        visitor.token = json.loads(visitor.request("GET", "api/session", headers=right)[2])["token"]
        job = runner.options(delay=60).submit(add, 1)
        visitor.post("api/jobs/stop", {"ids": [job.id]}, 401)
        visitor.post("api/jobs/stop", {"ids": [job.id]}, **right)
        assert job.logs()[-1]["message"] == "stop by ann"
        assert visitor.request("GET", "api/jobs", headers={**right, "Host": "evil.example"})[0] == 421
        assert visitor.request("GET", "api/jobs", headers={**right, "Host": "192.0.2.7:" + visitor.host.split(":")[1]})[0] == 200
        with pytest.raises(ValueError, match="must be a loopback address, got '0.0.0.0', unless password= or authorize="):
            runner.serve("0.0.0.0", 0)
        for bad in ({"password": ""}, {"password": 5}, {"password": "\ud800"}, {"authorize": "x"}, {"hosts": "example.org"}):
            with pytest.raises(ValueError, match="must be"):
                runner.wsgi(**bad)

    def test_the_app_may_say_who_comes(self, runner):
        visitor = Visitor.__new__(Visitor)
        visitor.url = runner.serve(port=0, authorize=lambda request: request.get("HTTP_X_USER"))
        visitor.host = visitor.url.split("/")[2]
        assert visitor.request("GET", "")[0] == visitor.request("GET", "api/session")[0] == 403
        visitor.token = json.loads(visitor.request("GET", "api/session", headers={"X-User": "bob"})[2])["token"]
        job = runner.options(delay=60).submit(add, 1)
        visitor.post("api/jobs/cancel", {"ids": [job.id]}, 403)
        visitor.post("api/jobs/cancel", {"ids": [job.id]}, X_User="bob")
        assert job.logs()[-1]["message"] == "cancel by bob"
        for nobody in (False, True, "", " ", 0, 1, b"ann", ["ann"]):
            visitor.url = runner.serve(port=0, authorize=lambda request: nobody)
            visitor.host = visitor.url.split("/")[2]
            assert visitor.request("GET", "api/jobs")[0] == 403

        def leave(request):
            raise SystemExit
        visitor.url = runner.serve(port=0, authorize=leave)
        visitor.host = visitor.url.split("/")[2]
        assert visitor.request("GET", "api/jobs")[0] == 500

    def test_an_export_has_all_that_match_and_no_formula_of_a_strangers(self, idle):
        visitor = Visitor(idle.serve(port=0))
        idle.submit_many(add, [(n,) for n in range(1_201)])
        idle.options(label='=HYPERLINK("http://evil.example")', run_by="@ann").submit(note, [1, 2])
        status, headers, body = visitor.request("GET", "api/export?format=csv")
        table = list(csv.DictReader(io.StringIO(body.decode())))
        assert status == 200 and headers["Content-Disposition"] == 'attachment; filename="jobs.csv"' and "ETag" not in headers
        assert [int(row["id"]) for row in table] == list(range(1_202, 0, -1))
        assert (table[0]["label"], table[0]["run_by"], table[0]["args"]) == ("'=HYPERLINK(\"http://evil.example\")", "'@ann", "[[1,2]]")
        assert set(table[0]) == set(idle.get(1).info())
        assert len(visitor.get("api/export?format=json&name=test_bgjobs.add")) == 1_201
        assert visitor.get("api/export?format=json&name=x") == []
        header, rest = body.split(b"\n", 1)
        assert visitor.request("GET", "api/export?name=x")[2] == header + b"\n" and rest and b"label,status" in header
        for bad in ("format=xml", "limit=5", "status=odd", "nonsense=1"):
            visitor.get(f"api/export?{bad}", 400)
        page = idle.wsgi()
        export = {"PATH_INFO": "/api/export", "HTTP_HOST": "localhost"}
        readers = [page(export, lambda status, headers: None) for _ in range(bgjobs.EXPORTS_AT_ONCE)]
        assert "try again later" in visitor.get("api/export", 503)["error"]
        del readers                                       # who reads slowly takes no more places than these, and gives his back
        assert visitor.request("HEAD", "api/export")[0] == visitor.request("GET", "api/export")[0] == 200

    def test_the_attempts_of_a_job_are_told_one_by_one(self, make, monkeypatch):
        clock = Clock()
        idle = make(start=False, clock=clock)
        page = Visitor(idle.serve(port=0))

        def told(job):
            return [(each["attempt"], each["outcome"], each["error"]) for each in page.get(f"api/jobs/{job.id}/attempts")["attempts"]]
        plain = idle.submit(add, 1)
        assert told(plain) == []
        idle.drain()
        assert told(plain) == [(1, "finished", None)] and rows(idle, "SELECT * FROM bgjobs_attempts") == []
        retried = idle.options(retries=2, backoff=0).submit(fail_until, 3)
        idle.drain()
        assert [outcome for _, outcome, _ in told(retried)] == ["failed", "failed", "finished"]
        assert "Error" in told(retried)[0][2]
        plain.restart()
        attempt, = claimed(idle, 1)
        assert told(plain)[-1] == (2, None, None)
        assert page.get(f"api/jobs/{plain.id}/attempts")["positions"] == []
        plain.stop()
        plain.force_stop()
        assert told(plain) == [(2, "force-stopped", None)]
        plain.resume()
        claimed(idle, 1)
        take_back(idle)
        idle.drain()
        assert [each[:2] for each in told(plain)] == [(2, "force-stopped"), (3, "interrupted"), (4, "finished")]
        monkeypatch.setattr(bgjobs, "ATTEMPTS_A_JOB", 2)
        plain.restart()
        idle.drain()
        assert [each[0] for each in told(plain)] == [4, 5]
        clock.now += 1_000
        idle.prune(0, 0)
        assert rows(idle, "SELECT * FROM bgjobs_attempts") == []

    def test_schedules_are_operated(self, idle):
        visitor = Visitor(idle.serve(port=0))
        schedule = idle.every("1h", add, 1)
        for operation, paused in (("pause", True), ("resume", False)):
            assert visitor.post(f"api/schedules/{operation}", {"ids": [schedule.id]}) == {"done": [schedule.id], "refused": []}
            assert schedule.info()["paused"] is paused
        visitor.post("api/schedules/run_now", {"ids": [schedule.id]})
        assert idle.get(schedule.info()["job_id"]).status == "pending"
        assert "wait until it is over" in visitor.post("api/schedules/run_now", {"ids": [schedule.id]}, 409)["refused"][0]["why"]
        assert visitor.post("api/schedules/remove", {"ids": [99]}, 404)["refused"] == [{"id": 99, "why": "there is no schedule 99"}]
        for bad in ({"filter": {}}, {}, {"ids": [schedule.id], "filter": {}}):
            visitor.post("api/schedules/pause", bad, 400)
        visitor.post("api/schedules/stop", {"ids": [schedule.id]}, 404)

    def test_no_list_sorts_or_walks_through_all_jobs(self, idle, visitor, monkeypatch):
        """Each query is looked up by id, in an index, or in a range of ids; but for the last it is an index that counts."""
        idle.submit_many(add, [(n,) for n in range(20)])
        idle.drain()
        monkeypatch.setattr(bgjobs, "COUNT_LIMIT", 6)
        monkeypatch.setattr(bgjobs, "FEW", 6)
        plans = []
        read = bgjobs.Store.read

        def explained(store, sql, parameters=None):
            plans.append((sql, [row[3] for row in read(store, "EXPLAIN QUERY PLAN " + sql, parameters)]))
            return read(store, sql, parameters)
        monkeypatch.setattr(bgjobs.Store, "read", explained)
        for query in ("", "parent=none", "status=finished", "status=pending&parent=none", "status=failed&parent=none", "parent=1",
                      "name=x", "status=finished&q=1", "created_from=1&created_to=2"):
            visitor.get(f"api/jobs?{query}")
        for sql, plan in plans:
            walks = [step for step in plan if re.fullmatch(r"SCAN bgjobs_jobs", step)]
            is_few = sql.startswith("SELECT id FROM (SELECT id") and "status <> 'pending' AND parent_id IS NULL AND system = 0" not in sql
            assert not walks and (is_few or not any("TEMP B-TREE FOR ORDER" in step for step in plan)), (sql, plan)
            assert "parent_id = :parent" in sql or not any("bgjobs_children" in step for step in plan), (sql, plan)


class Browser:
    """A headless Chromium over the WebDriver protocol."""

    def __init__(self, driver, chromium, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update",
                     "--disable-sync", "--window-size=1300,900", f"--user-data-dir={profile}"]
        wait_for(self._ready)
        wanted = {"goog:chromeOptions": {"binary": chromium, "args": arguments},
                  "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.url += "/" + answer["sessionId"]

    def _ready(self):
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(self.url.replace("/session", "/status"), timeout=60) as answer:
                return json.load(answer)["value"]["ready"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, method=method, data=data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def open(self, url):
        self.call("POST", "/url", {"url": "about:blank"})
        self.complaints()              # of the last test's page, whose runner has been closed
        self.call("POST", "/url", {"url": url})

    def text(self):
        return self.run("return document.body.innerText")

    def click(self, text, within="button, a, label"):
        """Click the first visible, enabled element with this text."""
        wait_for(lambda: self.run("""
            const it = [...document.querySelectorAll(arguments[1])].find(each =>
                each.innerText.trim() === arguments[0] && each.checkVisibility() && !each.disabled);
            if (it) it.click(); return !!it""", text, within))

    def resize(self, width):
        """Make the window this wide, on a phone if that is narrow; None: as it was."""
        which, size = "clear", {}
        if width is not None:
            which = "set"
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("POST", "/goog/cdp/execute",
                  {"cmd": f"Emulation.{which}DeviceMetricsOverride", "params": size})

    def complaints(self):
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self):
        with contextlib.suppress(OSError):
            self.call("DELETE", "")
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        remedy = "apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(f"chromium and chromedriver are needed where CI is set: {remedy}")
        pytest.skip(f"no browser: {remedy}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(driver, chromium, profile)
        yield browser
        browser.close()


class TestInTheBrowser:
    def test_a_job_is_seen_stopped_resumed_and_read(self, runner, browser):
        url = runner.serve(port=0)
        browser.open(url)
        wait_for(lambda: "bgjobs.submit" in browser.text())                     # the empty state says how to begin
        job = runner.options(label="<script>document.title = 'hacked'</script>", run_by="ann").submit(count_with_state)
        wait_for(lambda: "<script>" in browser.text() and "running" in browser.text())
        browser.click("<script>document.title = 'hacked'</script>", "a")
        wait_for(lambda: browser.run("return location.pathname") == f"/jobs/{job.id}")
        browser.click("Stop")
        wait_for(lambda: job.status == "stopped" and "stop by web" in browser.text())
        gate("count").set()
        browser.click("Resume")
        wait_for(lambda: job.status == "finished" and "Attempts" in browser.text())
        browser.run("history.back()")
        wait_for(lambda: "Create date" in browser.text())
        assert browser.run("return document.title") != "hacked"
        assert not browser.complaints()

    def test_the_list_has_the_contracts_columns_and_expands_children(self, runner, browser):
        runner.options(label="family").submit(children, 3).result(10)
        browser.open(runner.serve(port=0))
        wait_for(lambda: "family" in browser.text())
        heads = [head for head in browser.run("return [...document.querySelectorAll('thead th')].map(th => th.innerText.trim())") if head]
        assert heads == ["Job", "Create date", "Waiting", "Start date", "Duration", "Status", "Errors", "Low priority", "Run by",
                         "Progress", "Children"]
        assert "test_bgjobs.add" not in browser.text()
        browser.run("document.querySelector('[aria-expanded]').click()")
        wait_for(lambda: browser.text().count("test_bgjobs.add") == 3)

    def test_bulk_operations_ask_first_and_say_what_was_done(self, runner, browser):
        runner.submit(add, 1).result(10)
        later = [runner.options(delay=1000).submit(add, i) for i in range(2)]
        browser.open(runner.serve(port=0))
        wait_for(lambda: browser.run("return document.querySelectorAll('tbody input[type=checkbox]').length") == 3)
        browser.run("document.querySelectorAll('tbody input[type=checkbox]').forEach(box => box.click())")
        browser.click("Cancel")
        wait_for(lambda: browser.run("if (document.getElementById('confirm').open) { document.getElementById('confirm-yes').click(); "
                                     "return true }"))
        wait_for(lambda: all(job.status == "cancelled" for job in later))
        wait_for(lambda: "2 cancelled, 1 refused" in browser.text())

    def test_filters_bulk_restart_and_force_stop(self, runner, browser):
        done = [runner.options(run_by="ann").submit(add, n, label) for n, label in ((1, 2), (3, 4))]
        others = runner.submit(add, 5, 6)
        deaf = runner.options(label="Deaf", run_by="bob").submit(hold, "deaf")
        for job in (*done, others):
            job.result(10)
        wait_for(lambda: deaf.status == "running")
        url = runner.serve(port=0)
        browser.open(url)

        def ids():
            return browser.run("return [...document.querySelectorAll('tbody .job small')].map(each => Number(each.innerText.slice(1)))")

        def confirm(question, answer):
            wait_for(lambda: question in browser.text() and browser.run("return document.activeElement.innerText") == "Go back")
            browser.click(answer)
        wait_for(lambda: ids() == [4, 3, 2, 1])
        browser.run("""const form = document.getElementById('filters'); form.elements.run_by.value = 'ann';
            form.dispatchEvent(new Event('input'))""")
        wait_for(lambda: ids() == [2, 1] and browser.run("return location.search") == "?run_by=ann")
        browser.run("document.querySelector('thead input').click()")
        browser.click("Restart")
        confirm("Restart 2 jobs?", "Go back")
        wait_for(lambda: not browser.run("return document.getElementById('confirm').open"))
        assert [job.attempt for job in done] == [1, 1]
        browser.click("Restart")
        confirm("Restart 2 jobs?", "Yes, restart")
        wait_for(lambda: "2 restarted" in browser.text() and all(runner.get(job.id).attempt == 2 for job in done))
        browser.open(url + "?run_by=bob&status=running")
        wait_for(lambda: ids() == [deaf.id])
        deaf.stop()
        wait_for(lambda: ids() == [])
        browser.open(url + "?status=stopping")
        wait_for(lambda: ids() == [deaf.id])
        browser.run("document.querySelector('tbody input').click()")
        browser.click("Force stop")
        confirm("Force stop job 4 (\u2068Deaf\u2069)?", "Yes, force stop")
        wait_for(lambda: deaf.status == "stopped" and "1 force-stopped" in browser.text())
        gate("deaf").set()
        assert not browser.complaints()

    def test_all_that_match_are_operated_on_at_once(self, idle, browser):
        jobs = [idle.options(delay=1000, run_by="ann" if n % 2 else "bob").submit(add, n) for n in range(130)]
        browser.open(idle.serve(port=0) + "?run_by=ann")
        wait_for(lambda: browser.run("return document.querySelectorAll('tbody input[type=checkbox]').length") == 50)
        browser.run("document.querySelector('thead input[type=checkbox]').click()")
        browser.click("Select all 65 that match")
        wait_for(lambda: "All 65 that match" in browser.text())
        browser.click("Cancel")
        wait_for(lambda: "Cancel all 65 jobs that match?" in browser.text())
        browser.click("Yes, cancel")
        wait_for(lambda: "65 cancelled" in browser.text())
        assert [job.status for job in jobs] == ["pending", "cancelled"] * 65
        assert not browser.complaints()

    def test_who_is_not_let_in_any_more_sees_no_jobs_and_operates_on_none(self, idle, browser):
        idle.submit_many(add, [(n,) for n in range(60)])
        user = ["ann"]
        browser.open(idle.serve(port=0, authorize=lambda request: user[0]))
        wait_for(lambda: browser.run("return document.querySelectorAll('tbody input').length") == 50)
        browser.run("document.querySelector('thead input').click()")
        browser.click("Select all 60 that match")
        wait_for(lambda: "All 60 that match" in browser.text())
        user[0] = None
        wait_for(lambda: "you may not see this page" in browser.text() and "Cancel" not in browser.text())
        user[0] = "ann"
        wait_for(lambda: "test_bgjobs.add" in browser.text())
        assert "Cancel" not in browser.text()
        assert not [line for line in browser.complaints() if "status of 403" not in line]

    def test_statistics_and_schedules_are_read_and_operated(self, runner, browser):
        schedule = runner.options(label="Hourly").every("1h", add, 1)
        runner.submit(add, 1).result(10), runner.submit(fail).exception(10)
        browser.open(runner.serve(port=0) + "statistics")
        wait_for(lambda: "2 in all" in browser.text() and "1 in all" in browser.text())
        browser.click("1 hour")
        arrived = "return document.querySelector('main:not([aria-busy]) .tabs [aria-current]')?.innerText"
        wait_for(lambda: browser.run(arrived) == "1 hour" and browser.run("return location.search") == "?window=1h")
        assert "2 in all" in browser.text()
        browser.run("""const chart = document.querySelector('figure svg'); chart.focus();
            chart.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }))""")
        wait_for(lambda: browser.run("return document.querySelector('figcaption').innerText").endswith((": 2", ": 0")))
        assert browser.run("return document.querySelectorAll('.bar').length") >= 2
        browser.click("test_bgjobs.add", "a")
        wait_for(lambda: browser.run("return location.search") == "?window=1h&name=test_bgjobs.add" and "0 in all" in browser.text())
        browser.click("Schedules")
        wait_for(lambda: "Hourly" in browser.text())
        browser.click("Run now")
        wait_for(lambda: schedule.info()["job_status"] == "finished" and "finished" in browser.text())
        browser.click("Pause")
        wait_for(lambda: schedule.info()["paused"] and "paused" in browser.text())
        browser.click("Resume")
        wait_for(lambda: not schedule.info()["paused"] and "in 59 min" in browser.text())
        assert not browser.complaints()

    def test_a_job_that_does_not_stop_shows_where_it_is_and_its_log_is_searched(self, runner, browser):
        job = runner.submit(hold_and_log, "not yet")
        wait_for(lambda: job.status == "running")
        job.stop()
        browser.open(runner.serve(port=0) + f"jobs/{job.id}")
        wait_for(lambda: "assert gate(name).wait(20)" in browser.text() and "two" in browser.text())
        browser.run("""const field = [...document.querySelectorAll('label')].find(each => each.innerText.startsWith('Regex')).querySelector('input');
            field.value = '^o.e$'; field.dispatchEvent(new Event('input', { bubbles: true }))""")
        wait_for(lambda: browser.run("return document.querySelector('#log').innerText").strip().endswith("one"))
        gate("not yet").set()
        wait_for(lambda: "finished" in browser.text() and "gate(name)" not in browser.text())
        assert not browser.complaints()

    def test_a_long_log_is_read_from_its_end_to_its_beginning_searched_and_followed(self, make, browser):
        runner = make(max_workers=1)
        job = runner.submit(say_lines, 3_000)
        wait_for(lambda: len(job.logs()) == 3_000)
        browser.open(runner.serve(port=0) + f"jobs/{job.id}")

        def lines():
            return browser.run("return [...document.querySelectorAll('#log li')].map(each => each.innerText.split(' ').pop())")

        def enter(label, text):
            browser.run("""const field = [...document.querySelectorAll('label')].find(each => each.innerText.startsWith(arguments[0]))
                .querySelector('input'); field.value = arguments[1]; field.dispatchEvent(new Event('input', { bubbles: true }))""", label, text)
        wait_for(lambda: lines() == [str(n) for n in range(2_500, 3_000)])
        browser.run("const it = [...document.querySelectorAll('button')].find(each => each.innerText === 'Earlier lines'); it.click(); it.click()")
        wait_for(lambda: len(lines()) == 2_499)
        browser.click("Earlier lines")
        wait_for(lambda: lines() == [str(n) for n in range(3_000)] and "Earlier lines" not in browser.text())
        enter("Regex", "^line (17|2999)$")
        wait_for(lambda: lines() == ["17", "2999"])
        browser.run("document.querySelector('#log button').click()")
        wait_for(lambda: lines() == [*map(str, range(12, 23)), "2999"])
        browser.run("document.querySelector('#log button').click()")
        wait_for(lambda: lines() == ["17", "2999"])
        enter("Regex", "^line 1$")
        wait_for(lambda: lines() == ["1"])
        browser.run("document.querySelector('#log button').click()")
        wait_for(lambda: lines() == [*map(str, range(7))])
        for wrong, text in (("(", "Invalid regular expression"), ("(a+)+$", "It takes too long on these lines")):
            enter("Regex", wrong)
            wait_for(lambda: text in browser.text() and lines() == [])
        enter("Regex", "")
        wait_for(lambda: len(lines()) == 500)
        for since, until, shown in (("9999-01-01T00:00", "", 0), ("", "1999-12-31T23:59", 0), ("1999-12-31T23:59", "9999-01-01T00:00", 500)):
            enter("From", since)
            enter("To", until)
            wait_for(lambda: len(lines()) == shown)
        browser.click("Earlier lines")
        wait_for(lambda: len(lines()) == 2_499)
        enter("From", "")
        enter("To", "")
        wait_for(lambda: len(lines()) == 500)
        browser.click("Follow", "label")                                        # reading around a line had ended it
        gate("more").set()
        wait_for(lambda: lines()[-1] == "more" and browser.run("const it = document.getElementById('log'); "
                                                               "return it.scrollTop + it.clientHeight > it.scrollHeight - 2"))
        assert not browser.complaints()

    def test_an_answer_that_was_cut_short_is_asked_for_again(self, runner, browser):
        job = runner.submit(fail)
        assert job.exception(10)
        browser.open(runner.serve(port=0) + "jobs/1")
        wait_for(lambda: "ValueError: boom" in browser.text())
        browser.run("""const whole = fetch;
            window.fetch = async (...request) => {
                const answer = await whole(...request);
                if (answer.status === 200 && request[0].endsWith("/attempts")) {
                    [window.fetch, window.wasCut] = [whole, true];
                    answer.json = () => Promise.reject(new DOMException("", "AbortError"));
                }
                return answer;
            }""")
        assert job.restart().exception(10)
        wait_for(lambda: browser.run("return window.wasCut && document.body.innerText.includes('restart')"))
        assert not browser.complaints()

    def test_odd_addresses_names_and_filters(self, runner, browser):
        url = runner.serve(port=0)
        ids = [runner.options(label=label).submit(add, n, n).id for n, label in enumerate(("pay \u202e001 bob", " \u200b", "plain", "a\u2069\u202eb"))]
        for odd in ("?utm_source=mail", "?status=bogus", "?before=abc", "statistics?window=bogus", "jobs/99"):
            browser.open(url + odd)
            wait_for(lambda: "This cannot be shown" in browser.text() and "Schedules" in browser.text())
        browser.click("All jobs", "a")
        wait_for(lambda: "plain" in browser.text() and "test_bgjobs.add #2" in browser.text())
        browser.open(url + "/?errors=false")
        wait_for(lambda: "plain" in browser.text())
        browser.run("const form = document.getElementById('filters'); form.elements.q.value = 'pla'; form.dispatchEvent(new Event('input'))")
        wait_for(lambda: browser.run("return location.search") == "?errors=false&q=pla" and "test_bgjobs.add" not in browser.text())
        browser.run("document.querySelector('tbody input').click()")
        wait_for(lambda: "1 selected" in browser.text())
        browser.run("document.querySelector('.skip').click()")
        assert browser.run("return document.activeElement.id") == "main" and "1 selected" in browser.text()
        browser.open(url + f"jobs/{ids[0]}")
        wait_for(lambda: "pay" in browser.text())
        left, right = (browser.run(f"return document.querySelector('h1 {part}').getBoundingClientRect().left") for part in ("bdi", "small"))
        assert left < right
        browser.open(url + f"jobs/{ids[3]}")
        wait_for(lambda: browser.run("return document.title") == "\u2068ab #4\u2069 - bgjobs")
        assert not [line for line in browser.complaints() if not re.search("status of 40[04]", line)]

    def test_names_stay_legible_however_deep_they_stand(self, runner, browser):
        runner.options(run_by="y" * 100).submit(nested, 12).result(20)
        url = runner.serve(port=0)
        browser.open(url)
        widths = "return [...document.querySelectorAll('tbody .job > :last-child')].map(each => each.getBoundingClientRect().width)"
        for depth in range(1, 12):
            wait_for(lambda: len(browser.run(widths)) == depth)
            browser.run("[...document.querySelectorAll('.twist[aria-expanded=false]')].pop().click()")
        try:
            for width in (1300, 390):
                browser.resize(width)
                assert min(browser.run(widths)) > 80 and browser.run("return document.documentElement.scrollWidth <= innerWidth")
        finally:
            browser.resize(None)

    def test_nothing_scrolls_sideways(self, runner, browser):
        runner.options(label="x" * 200, run_by="y" * 100).submit(add, 1).result(10)
        runner.options(label="x" * 200).every("1h", add, 1)
        runner.options(name="z" * 300, retries=1, backoff=0).submit(fail_with, "w" * 400).exception(10)
        url = runner.serve(port=0)
        try:
            for width in (390, 1300):
                browser.resize(width)
                for page in ("", "jobs/1", "jobs/2", "schedules", "statistics"):
                    browser.open(url + page)
                    wait_for(lambda: "xxx" in browser.text() or "zzz" in browser.text())
                    assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), (width, page)
        finally:
            browser.resize(None)


# ---- 21 Command line -------------------------------------------------------------------------------------------

def log_until(name):
    log = bgjobs.current_job().log
    log.debug("unseen")
    log.info("first")
    assert gate(name).wait(20)
    log.info("second")
    log.warning("last")


def started_command(*arguments, cwd=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    **variables):
    """Start `python bgjobs.py` with these arguments."""
    command = [sys.executable, str(HERE / "bgjobs.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=stdout, stderr=stderr, text=True,
                            env=environment(**variables))


def printed_on_a_terminal(stream, *arguments, **variables):
    """Run such a command, whose stdout or stderr is a terminal; return what stands there."""
    import pty
    main, side = pty.openpty()
    code, *others = finish(started_command(*arguments, **{stream: side}, **variables))
    os.close(side)
    out = b""
    with contextlib.suppress(OSError):                   # nobody has the other side any more
        while block := os.read(main, 65536):
            out += block
    os.close(main)
    assert code == 0, (out, others)
    return out.decode()


def bgjobs_command(*arguments, cwd=None, **variables):
    """Run `python -m bgjobs` with these arguments."""
    command = [sys.executable, "-m", "bgjobs", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60,
                          env=environment(**variables))


class TestCommandLine:
    def test_demo_fingerprints_odd_names_and_reports_duplicates(self, tmp_path):
        folder = tmp_path / "files"
        (folder / "sub" / "deep").mkdir(parents=True)
        (folder / "a").write_bytes(b"same" * 100)
        (folder / "sub" / "b \n\u00e9").write_bytes(b"same" * 100)
        (folder / "sub" / "deep" / "c").write_bytes(b"other")
        with open(os.path.join(os.fsencode(folder), b"odd \xff name"), "wb") as file:
            file.write(b"same" * 100)
        os.symlink("nowhere", folder / "dangling")
        os.mkfifo(folder / "fifo")
        done = bgjobs_command("demo", folder, "--port", 0, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "4 files in 3 folders" in done.stdout and "1 groups of duplicates" in done.stdout and "3 copies of 400 bytes" in done.stdout
        assert re.search(r"Status page: http://127\.0\.0\.1:\d+/", done.stdout) and (tmp_path / "bgjobs.db").exists()
        assert f"    {folder}/sub/b  \u00e9\n" in done.stdout     # the line break of its name is none of the report

    def test_a_demo_that_is_stopped_and_resumed_loses_no_file(self, make, tmp_path):
        names = [f"{n:03}" for n in range(100)]
        for name in names:
            with open(tmp_path / name, "wb") as file:
                file.truncate(4 << 20)
        runner = make()
        job = runner.submit(bgjobs.fingerprint_files, str(tmp_path), names)
        wait_for(lambda: (job.progress or 0) > 0)
        stop_and_wait(job)
        job.resume()
        assert [name for name, _, _ in job.result(60)["files"]] == names

    def test_run_prints_the_result_as_json(self, tmp_path):
        (tmp_path / "tasks.py").write_text("import bgjobs\ndef work(a, b):\n    return [a, b, bgjobs.current_job().id]\n"
                                           "def bad():\n    raise ValueError('boom\\x1b[31m')\n")
        done = bgjobs_command("run", "tasks:work", "1", "text", cwd=tmp_path)
        assert (done.returncode, json.loads(done.stdout)) == (0, [1, "text", 1]), done.stderr
        done = bgjobs_command("run", "tasks:bad", cwd=tmp_path)
        assert done.returncode == 1 and "ValueError: boom [31m\n" in done.stderr

    @pytest.mark.parametrize("arguments,text", [
        (["run", "tasks"], "write module:function"), (["run", "nowhere:f"], "cannot find nowhere:f"), (["run", "os:nothing"], "cannot find"),
        (["demo", "/nowhere"], "is not a folder"), (["demo", ".", "--workers", "0"], "max_workers must be greater than 0"),
        (["run", "os:getpid", "--db", "/nowhere/x.db"], "in a folder that exists"), ([], "COMMAND"), (["fly"], "invalid choice")])
    def test_misuse_is_one_clear_line_and_exit_code_2(self, tmp_path, arguments, text):
        done = bgjobs_command(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr

    def test_output_that_cannot_be_written_is_one_line_and_odd_characters_are_escaped(self, jobs_file):
        for command in ("list", "stats"):
            with open("/dev/full", "w") as full:
                assert finish(started_command(command, "--db", jobs_file, stdout=full)) == (
                    2, None, "bgjobs: [Errno 28] No space left on device\n")
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as nobody_reads:
            assert finish(started_command("list", "--db", jobs_file, stdout=nobody_reads)) == (0, None, "")
        closed = subprocess.run(["sh", "-c", f"'{sys.executable}' '{HERE / 'bgjobs.py'}' list --db '{jobs_file}' >&-"], timeout=60,
                                stderr=subprocess.PIPE, text=True)
        assert (closed.returncode, closed.stderr) == (0, "")
        done = bgjobs_command("list", "--db", jobs_file, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and "\\u6570" in done.stdout and "Sums" in done.stdout
        done = bgjobs_command("restart", "2", "1", "--db", jobs_file)    # a child, which goes when its parent is restarted
        assert (done.returncode, done.stdout, done.stderr) == (0, "job 2: pending\njob 1: pending\n", "")

    @pytest.fixture
    def jobs_file(self, tmp_path):
        path = str(tmp_path / "jobs.db")
        with contextlib.closing(bgjobs.Runner(path, start=False)) as runner:
            runner.options(label="Sums\x1b[31m of \n numbers", run_by="ann").submit(children, 3)
            runner.submit(fail)
            runner.drain()
            runner.submit(add, 1, 2)
            runner.options(low_priority=True, delay=3_600, label="\u6570\u5b57" * 40).submit(add, 2)
            runner.options(system=True, delay=3_600).submit(add, 3)
        return path

    def test_list_and_show_are_tables_for_people_and_json_for_programs(self, jobs_file):
        done = bgjobs_command("list", "--db", jobs_file)
        assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
        header, *lines = done.stdout.splitlines()
        assert header.split()[:4] == ["ID", "Created", "Waiting", "Duration"] and [line.split()[0] for line in lines] == ["7", "6", "2", "1"]
        assert "3/3" in lines[3] and "ann" in lines[3] and "(scheduled) (low priority)" in lines[0] and "failed" in lines[2]
        listed = json.loads(bgjobs_command("list", "--db", jobs_file, "--json", "--children", "--status", "finished").stdout)
        assert [job["id"] for job in listed] == [5, 4, 3, 1]
        for filters, ids in ((["--parent", 1], [5, 4, 3]), (["-q", "SUMS"], [1]), (["-q", "test_bgjobs.add", "--limit", 4], [7, 6, 5, 4]),
                             (["--system", "--status", "pending"], [8, 7, 6]), (["--errors"], [2]), (["--low-priority"], [7]),
                             (["--name", "test_bgjobs.fail"], [2]), (["--run-by", "ann", "--children"], [5, 4, 3, 1])):
            assert [job["id"] for job in json.loads(bgjobs_command("list", "--json", *filters, BGJOBS_DB=jobs_file).stdout)] == ids
        none = bgjobs_command("list", "--status", "stopped", "--db", jobs_file)
        assert (none.returncode, none.stdout, none.stderr) == (0, "", "")
        shown = bgjobs_command("show", 2, "--db", jobs_file)
        assert shown.returncode == 1 and "ValueError: boom" in shown.stdout and "operations  [\"resume\", \"restart\"" in shown.stdout
        assert json.loads(bgjobs_command("show", 1, "--json", "--db", jobs_file).stdout)["children"]["done"] == 3

    def test_operations_work_from_another_process_and_say_what_was_refused(self, jobs_file):
        done = bgjobs_command("stop", 6, 7, 1, 99, "--db", jobs_file)
        assert done.returncode == 1 and done.stdout == "job 6: stopped\njob 7: stopped\n"
        assert "job 1 is finished; it can be restarted, not stopped" in done.stderr and "there is no job 99" in done.stderr
        for command, status in (("resume", "pending"), ("set-low-priority", "pending"), ("remove-low-priority", "pending"), ("cancel", "cancelled")):
            done = bgjobs_command(command, 6, "--db", jobs_file)
            assert (done.returncode, done.stdout) == (0, f"job 6: {status}\n"), done.stderr
        done = bgjobs_command("restart", 2, "--json", "--db", jobs_file)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"done": [2], "refused": []})
        assert bgjobs_command("force-stop", 2, "--db", jobs_file).returncode == 1
        assert bgjobs_command("restart", 3, "--db", jobs_file).returncode == 0
        assert "[3] restart by " in bgjobs_command("logs", 1, "--tree", "--db", jobs_file).stdout
        assert "stop by " in bgjobs_command("logs", 6, "--db", jobs_file).stdout

    def test_logs_are_followed_and_filtered(self, make, path):
        runner = make(max_workers=1)
        job = runner.submit(log_until, "follow")
        follower = started_command("logs", "-f", job.id, "--db", path, "--level", "info")
        assert follower.stdout.readline().endswith("INFO     first\n")
        gate("follow").set()
        code, out, _ = finish(follower)
        assert (code, [line.split()[-1] for line in out.splitlines()]) == (0, ["second", "last"])
        job.result(5)
        assert [line["message"] for line in job.logs(regex="^(first|la.t)$")] == ["first", "last"]
        assert [json.loads(line)["message"] for line in bgjobs_command("logs", job.id, "--json", "--regex", "st$", "--db", path).stdout.splitlines()] \
            == ["first", "last"]
        assert bgjobs_command("logs", job.id, "--text", "SECOND", "--db", path).stdout.endswith("second\n")
        for bad in (["--regex", "("], ["--level", "loud"]):
            done = bgjobs_command("logs", job.id, *bad, "--db", path)
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert bgjobs_command("logs", job.id, "--level", "30", "--db", path).stdout.endswith("last\n")
        shown = bgjobs_command("show", "-f", job.id, "--json", "--db", path)
        assert json.loads(shown.stdout)["status"] == "finished"

    def test_stats_and_prune(self, jobs_file):
        done = bgjobs_command("stats", "--db", jobs_file)
        assert done.returncode == 0 and [line.split()[:4] for line in done.stdout.splitlines()[-1:]] == [["7", "5", "4", "1"]]
        assert json.loads(bgjobs_command("stats", "--json", "--window", "1h", "--db", jobs_file).stdout)["total"]["failed"] == 1
        only = json.loads(bgjobs_command("stats", "--json", "--name", "test_bgjobs.fail", "--db", jobs_file).stdout)
        assert (only["total"]["finished"], only["total"]["failed"]) == (0, 1)
        assert bgjobs_command("prune", "--db", jobs_file).stdout == "0 jobs removed\n"
        assert json.loads(bgjobs_command("prune", "--finished", "0.01s", "--json", "--db", jobs_file).stdout) == {"removed": 4}
        for bad, code in ((["prune", "--failed", "soon"], 2), (["stop", 1 << 70], 1), (["serve", "--port", 99999], 2)):
            done = bgjobs_command(*bad, "--db", jobs_file)
            assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr
        assert bgjobs_command("prune", "--failed", "0", "--db", jobs_file).stdout == "1 jobs removed\n"

    def test_serve_shows_a_file_without_running_it(self, jobs_file):
        process = started_command("serve", "--port", "0", "--read-only", "--db", jobs_file)
        visitor = Visitor(re.search(r"http://\S+", process.stdout.readline())[0])
        assert visitor.get("api/jobs")["counts"]["pending"] == 2 and visitor.get("api/session")["read_only"] is True
        process.send_signal(signal.SIGINT)
        assert finish(process, 20)[0] == 130

    @pytest.mark.parametrize("command", [["list"], ["show", 1], ["logs", 1], ["stop", 1], ["stats"], ["prune"], ["serve"]])
    def test_a_file_that_is_not_there_is_not_made(self, tmp_path, command):
        done = bgjobs_command(*command, "--db", tmp_path / "no.db")
        assert done.returncode == 2 and re.fullmatch(r"bgjobs: there is no job file .*no\.db; name one with --db\n", done.stderr)
        assert list(tmp_path.iterdir()) == []

    def test_colours_are_for_terminals_whose_users_want_them(self, jobs_file):
        for wanted, coloured in (({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            listed, stats = (printed_on_a_terminal("stdout", command, "--db", jobs_file, COLUMNS="60", **{"TERM": "xterm", **wanted})
                             for command in ("list", "stats"))
            assert ("\x1b[31mfailed" in listed) is coloured
            assert all(bgjobs._cells(re.sub(r"\x1b\[\d*m", "", line)) <= 60 for line in (listed + stats).splitlines())

    def test_run_and_show_draw_a_progress_bar_on_a_terminal_and_remove_it(self, tmp_path):
        drawn = printed_on_a_terminal("stderr", "run", "test_bgjobs:nap_in_turns", 5, 0.2, "--db", tmp_path / "jobs.db", COLUMNS="60")
        assert re.search(r"\r\x1b\[K\[#{4,23}-+\] +[2-9]\d\.0%", drawn) and drawn.endswith("\r\x1b[K")
        shown = printed_on_a_terminal("stderr", "show", "-f", 1, "--db", tmp_path / "jobs.db")
        assert shown == "\r\x1b[K"                               # it was over

    @pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
    def test_a_worker_process_runs_the_jobs_of_others_and_gives_them_back_at_its_end(self, tmp_path, end):
        (tmp_path / "tasks.py").write_text(textwrap.dedent("""
            import bgjobs
            def double(n):
                return 2 * n
            def count():
                job = bgjobs.current_job()
                for n in job.each(range(10**6)):
                    job.sleep(0.001)
            """))
        printed(python("""
            import bgjobs, tasks
            with bgjobs.Runner("jobs.db", start=False) as runner:
                print(runner.submit(tasks.double, 21).id, runner.submit(tasks.count).id)
            """, cwd=tmp_path, PYTHONPATH=f"{HERE}{os.pathsep}{tmp_path}"))
        worker = started_command("work", "--db", "jobs.db", "--workers", "2", "tasks", cwd=tmp_path)
        assert "jobs.db with 2 workers; Ctrl-C ends it" in worker.stderr.readline()
        with bgjobs.Runner(tmp_path / "jobs.db", start=False) as runner:
            assert runner.get(1).result(20) == 42
            wait_for(lambda: (runner.get(2).progress or 0) > 0)
            worker.send_signal(end)
            assert finish(worker)[0] == 0
            counting = runner.get(2)
            assert (counting.status, counting.phase) == ("pending", "interrupted")
        missing = bgjobs_command("work", "no_such_module", cwd=tmp_path)
        assert missing.returncode == 2 and "cannot import what it should work for" in missing.stderr

    def test_a_worker_process_gives_its_jobs_time_and_a_second_signal_ends_it_at_once(self, idle, path):
        job = idle.submit(hold, "no checkpoint")
        for grace in (0.1, 60):
            worker = started_command("work", "--db", path, "--grace", grace, "test_bgjobs")
            assert worker.stderr.readline().startswith(f"working on {path} with ")
            wait_for(lambda: job.status == "running")
            worker.send_signal(signal.SIGTERM)
            if grace == 0.1:
                assert finish(worker, bgjobs.GRACE_SECONDS - 1)[0] == 0
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(1)
        worker.send_signal(signal.SIGTERM)
        assert finish(worker)[0] == -signal.SIGTERM

    def test_the_progress_line_fits_the_terminal_and_is_inert(self):
        info = {"progress": 0.5, "eta": 75.0, "children": {"total": 10, "done": 4}, "phase": "", "message": "\x1b[31mred\u2028" + "x" * 200}
        line = bgjobs.progress_line(info, 80)
        assert len(line) == 79 and line.startswith("[############------------]  50.0%  4 of 10 children  1 min 15 s left")
        assert "\x1b" not in line
        wide = bgjobs.progress_line({**info, "message": "\u6570" * 200}, 80)
        assert wide.endswith("\u6570\u2026") and bgjobs._cells(wide) in (78, 79)

    def test_a_job_that_reports_nothing_has_a_time_left_all_the_same(self, idle):
        info = idle.submit(add, 1).info()
        assert [bgjobs._listed({**info, "progress": progress, "eta": eta})["Progress"]
                for progress, eta in ((None, None), (0.5, None), (None, 75.0), (0.5, 75.0))] == [
                    "", "50%", "1 min 15 s left", "50%, 1 min 15 s left"]

    def test_long_texts_are_cut_to_a_width_quickly(self):
        begun = time.perf_counter()
        assert [bgjobs._fitted(text, 5) for text in ("\u6570" * 8_192, "e\u0301" * 4_096, "abc", "abcde", "")] == [
            "\u6570\u6570\u2026", "e\u0301" * 4 + "\u2026", "abc  ", "abcde", "     "]
        assert time.perf_counter() - begun < 5

    def test_durations_for_people(self):
        assert [bgjobs.for_people(s) for s in (0.04, 9.96, 59.4, 60, 3661)] == ["0.0 s", "10.0 s", "59 s", "1 min 0 s", "1 h 1 min"]


# ---- the layers of the file ------------------------------------------------------------------------------------

def pieces_of_the_file():
    """Return the source of bgjobs.py, and the line on which each layer but the core begins."""
    source = pathlib.Path(bgjobs.__file__).read_text(encoding="utf-8")
    banners = {match[1]: number for number, line in enumerate(source.splitlines(), 1)
               if (match := re.match("# ==== layer: ([a-z ]+) =", line))}
    return source, banners


def names_of(code, *operations):
    return {instruction.argval for instruction in dis.get_instructions(code)
            if instruction.opname in operations}


def global_names(code):
    """Yield the names that a code object, or one inside it, looks up in the module."""
    yield from names_of(code, "LOAD_GLOBAL")
    yield from names_of(code, "LOAD_NAME") - names_of(code, "STORE_NAME")      # a class's own
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)


class TestLayers:
    LAYERS = ["core", "elsewhere", "page", "command line"]

    def test_the_file_has_them_in_order(self):
        _, banners = pieces_of_the_file()
        assert list(banners) == self.LAYERS[1:]
        assert {*bgjobs.DOORS.values()} < {*self.LAYERS}

    def test_none_names_what_a_later_one_defines(self):
        source, banners = pieces_of_the_file()
        defined, used = {}, []                               # name -> its first layer; (name, layer)
        for statement in ast.parse(source).body:
            layer = sum(statement.lineno > line for line in banners.values())
            # Without `from __future__ import annotations`, so that annotations are looked at, too.
            code = compile(ast.Module([statement], []), "bgjobs.py", "exec", dont_inherit=True)
            for name in names_of(code, "STORE_NAME", "STORE_GLOBAL"):
                defined.setdefault(name, layer)
            used += [(name, layer) for name in global_names(code)]
        assert len(defined) > 400
        assert not {(name, self.LAYERS[layer], self.LAYERS[defined[name]]) for name, layer in used
                    if defined.get(name, 0) > layer}

    @pytest.mark.parametrize("cut_off", LAYERS[1:])
    def test_what_stands_above_works_alone_and_a_missing_door_names_its_layer(
            self, tmp_path, cut_off):
        source, banners = pieces_of_the_file()
        above = source.splitlines(keepends=True)[:banners[cut_off] - 1]
        (tmp_path / "bgjobs.py").write_text("".join(above), encoding="utf-8")
        (tmp_path / "work.py").write_text(textwrap.dedent("""
            import bgjobs

            def add(a, b=0):
                return a + b

            def count(n):
                for i in bgjobs.current_job().each(range(n)):
                    bgjobs.current_job().sleep(0.005)
                return n

            def family(n):
                bgjobs.current_job().log.info("makes %d children", n)
                return sum(job.result() for job in [bgjobs.submit(add, i) for i in range(n)])
        """))
        missing = {name: layer for name, layer in bgjobs.DOORS.items()
                   if self.LAYERS.index(layer) >= self.LAYERS.index(cut_off)}
        program = """
            import bgjobs, concurrent.futures, os, sys, time, work
            assert os.path.dirname(os.path.abspath(bgjobs.__file__)) == os.getcwd()
            runner = bgjobs.start("jobs.db", max_workers=2)
            assert bgjobs.submit(work.add, 1, 2).result(10) == 3
            job = bgjobs.submit(work.count, 100)
            while not job.progress:
                time.sleep(0.01)
            job.stop()
            while job.status != "stopped":
                time.sleep(0.01)
            assert job.resume().result(10) == 100 and job.attempt == 2
            parent = bgjobs.submit(work.family, 5)
            assert parent.result(10) == 10 and parent.children["done"] == 5
            assert [line["message"] for line in parent.logs()] == ["makes 5 children"]
            assert bgjobs.every("1h", work.add, 5).run_now().result(10) == 5
            assert len(bgjobs.jobs(status="finished")) == 9
            assert bgjobs.stats("1h")["total"]["finished"] == 9
            calls = {"serve": lambda: bgjobs.serve(port=0), "wsgi": bgjobs.wsgi,
                     "isolate": lambda: bgjobs.options(isolate=True).submit(work.add, 1),
                     "executor": lambda: bgjobs.Runner(
                         "other.db", executor=concurrent.futures.ThreadPoolExecutor)}
            for name in sys.argv[1:]:
                try:
                    calls[name]()
                except bgjobs.BgjobsError as error:
                    print(error)
            bgjobs.close()
        """
        out = printed(python(program, *missing, cwd=tmp_path))
        for line, (name, layer) in itertools.zip_longest(out.splitlines(), missing.items()):
            assert line.startswith(f"{name} needs the layer {layer!r}")


# ---- README ----------------------------------------------------------------------------------------------------

# What the README's examples of mounting import, for machines without it: the least that they use of it.
STAND_INS = {
    "flask.py": """
        class Flask:
            def __init__(self, name):
                self.wsgi_app = lambda environ, start_response: (start_response("404 Not Found", []), [b""])[1]
            def __call__(self, environ, start_response):
                return self.wsgi_app(environ, start_response)
        """,
    "werkzeug/middleware/dispatcher.py": """
        from wsgiref.util import shift_path_info
        class DispatcherMiddleware:
            def __init__(self, app, mounts):
                self.app, self.mounts = app, mounts
            def __call__(self, environ, start_response):
                mounted = self.mounts.get("/" + environ["PATH_INFO"].split("/")[1])
                if mounted:
                    shift_path_info(environ)
                return (mounted or self.app)(environ, start_response)
        """,
    "django/core/wsgi.py": """
        def get_wsgi_application():
            return lambda environ, start_response: (start_response("404 Not Found", []), [b""])[1]
        """,
}


ASK = """
    import base64, sys
    sys.path.append("stand_ins")
    import app
    from wsgiref.util import setup_testing_defaults
    def ask(path, **more):
        environ, answers = {"PATH_INFO": path, "HTTP_HOST": "example.org", **more}, []
        setup_testing_defaults(environ)
        mounted = app.application if hasattr(app, "application") else app.app
        body = b"".join(mounted(environ, lambda status, headers: answers.append(status[:3])))
        return answers[0], body
    login = {"HTTP_AUTHORIZATION": "Basic " + base64.b64encode("ann:…".encode()).decode()}
    assert ask("/elsewhere")[0] == "404" and ask("/jobs")[0] == "308" and ask("/jobs/")[0] == "401"
    assert b"<title>bgjobs</title>" in ask("/jobs/", **login)[1] and b'"jobs":[]' in ask("/jobs/api/jobs", **login)[1]
    """


# What a type checker says of an app: the lines it refuses are marked.
TYPED = """
    import asyncio
    import bgjobs

    def double(n: int) -> int:
        return 2 * n

    async def fetch(url: str) -> bytes:
        return url.encode()

    @bgjobs.job(retries=3)
    def export(table: str) -> list[str]:
        return [f"{table} {row + 1}" for row in bgjobs.current_job().each([1, 2])]

    def told(job: bgjobs.Job[int]) -> None:
        print(job.result() + 1)

    async def handler() -> tuple[int, bytes]:
        return await bgjobs.submit(double, 1), await bgjobs.submit(fetch, "url")

    bgjobs.submit(double, 1).add_done_callback(told)
    number: int = bgjobs.options(delay=1).submit(double, 1).resume().result()
    numbers: list[int] = list(bgjobs.options().map(double, [1, 2]))
    content: bytes = bgjobs.submit(fetch, url="url").result(timeout=1)
    lines: list[str] = bgjobs.submit(export, "users").result()
    bgjobs.every("15m", double, 1)

    text: str = bgjobs.submit(double, 1).result()                  # wrong
    bgjobs.submit(double, "1")                                     # wrong
    bgjobs.submit(double)                                          # wrong
    bgjobs.submit(export, "users", 1)                              # wrong
    bgjobs.options(delay=1).submit(fetch, 1)                       # wrong
    bgjobs.submit(fetch, "url").add_done_callback(told)            # wrong
    bgjobs.every("15m", double, "1")                               # wrong
    """


class TestReadme:
    TEXT = (HERE / "README.md").read_text()
    BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)

    @pytest.mark.parametrize("number", range(len(BLOCKS)))
    def test_its_code_runs(self, number, tmp_path):
        (tmp_path / "app.py").write_text(self.BLOCKS[number])
        command = [sys.executable, "app.py"]
        if "def test_" in self.BLOCKS[number]:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "app.py"]
        if "bgjobs.wsgi(" in self.BLOCKS[number]:
            command = [sys.executable, "-c", textwrap.dedent(ASK)]
            for name, code in STAND_INS.items():
                file = tmp_path / "stand_ins" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(textwrap.dedent(code))
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment())
        assert done.returncode == 0, done.stderr + done.stdout

    def test_its_commands_run(self, tmp_path):
        demo, run = re.findall(r"^    python3 bgjobs.py (demo|run) (.*)$", self.TEXT, re.M)
        shutil.copy(HERE / "bgjobs.py", tmp_path)
        done = bgjobs_command("run", *run[1].split("#")[0].split(), cwd=tmp_path)
        assert done.returncode == 0 and int(done.stdout) == (HERE / "bgjobs.py").stat().st_size
        assert demo[1] == "/usr/share"                           # TestCommandLine runs it on a small folder

    def test_its_benchmark_prints_ratios(self, tmp_path):
        done = subprocess.run([sys.executable, HERE / "test_bgjobs.py", "bench", "--repeat", "1"], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300, env=environment())
        assert done.returncode == 0, done.stderr
        assert "submit_many" in done.stdout and "checkpoint()" in done.stdout and list(tmp_path.iterdir()) == []

    def test_a_type_checker_knows_what_a_job_returns_and_takes(self, tmp_path):
        mypy = pytest.importorskip("mypy.api", reason="no type checker: pip install mypy")
        app = tmp_path / "app.py"
        app.write_text(textwrap.dedent(TYPED))
        out, err, _ = mypy.run(["--strict", "--no-error-summary", f"--cache-dir={tmp_path}", str(app), str(HERE / "bgjobs.py")])
        wrong = [number for number, line in enumerate(app.read_text().splitlines(), 1) if line.endswith("# wrong")]
        assert [int(number) for number in re.findall(r"app\.py:(\d+): error", out)] == wrong and "bgjobs.py" not in out, out + err

    def test_its_links_lead_somewhere(self):
        anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
                   for title in re.findall(r"^#+ (.*)$", self.TEXT, re.M)}
        for link in re.findall(r"\]\(([^)]*)\)", self.TEXT):
            assert link[1:] in anchors if link.startswith("#") else (HERE / link).is_file(), link

    def test_the_first_example_of_the_docstring_is_that_of_the_readme(self):
        example, readme = ([" ".join(line.split()) for line in text.splitlines() if line.strip()] for text in (
            bgjobs.__doc__.split("\n\n", 1)[1].split("\n\nWords.")[0], self.BLOCKS[0]))
        assert [line for line in readme if line in example] == example


# ---- the soak: python test_bgjobs.py soak [MINUTES] [WORKERS] -------------------------------------------------

def soak_leaf(seconds):
    write_down(os.environ["SOAK_NOTES"])                        # none may begin twice
    job = bgjobs.current_job()
    for n in job.each(range(5)):
        job.log.info("turn %d", n)
        job.checkpoint(state=n)
        job.sleep(seconds / 5)
    if seconds > 0.045:
        raise ValueError("a long one")


def soak_parent(count):
    write_down(os.environ["SOAK_NOTES"])                        # none may begin twice
    children = [bgjobs.options(key=str(n)).submit(soak_leaf, 0.01) for n in range(count)]
    bgjobs.current_job().progress(1, 2)
    concurrent.futures.wait(children)


def soak_worker(path):
    with bgjobs.Runner(path, max_workers=3):
        threading.Event().wait()


class Soak:
    """Several processes that run jobs on one file, and a runner that makes trouble for them."""
    UNSETTLED = ("pending", "running", "stopping", "stopped")

    def __init__(self, workers):
        self.folder = tempfile.mkdtemp(prefix="soak")
        self.path, self.notes = f"{self.folder}/jobs.db", f"{self.folder}/notes"
        os.environ["SOAK_NOTES"] = self.notes
        self.chance = random.Random()
        self.submitted, self.operations, self.refused, self.kills = [], 0, 0, 0
        self.runner = bgjobs.Runner(self.path, start=False)
        self.processes = [self.worker() for _ in range(workers)]

    def worker(self):
        command = [sys.executable, __file__, "soak-worker", self.path]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=HERE)

    def say(self, *words):
        """Print the words, the KB of the file and its WAL, and the MB of each worker process."""
        size = [os.path.getsize(self.path + end) // 1024 for end in ("", "-wal")
                if os.path.exists(self.path + end)]
        status = [pathlib.Path(f"/proc/{each.pid}/status").read_text() for each in self.processes]
        memory = [int(re.search(r"VmRSS:\s+(\d+)", text)[1]) // 1024 for text in status]
        print(*words, "file and WAL KB:", size, "workers' MB:", memory, flush=True)

    def account(self):
        return (f"{len(self.submitted):,} submitted, {self.operations:,} operations "
                f"({self.refused:,} refused), {self.kills} kills;")

    def submit(self):
        if counted(self.runner)["pending"] > 300:        # the life of jobs counts, not a backlog
            return
        for _ in range(self.chance.randrange(8)):
            if self.chance.random() < 0.2:
                job = self.runner.submit(soak_parent, self.chance.randrange(1, 6))
            else:
                limited = self.runner.options(max_running=self.chance.choice([None, None, 2]))
                job = limited.submit(soak_leaf, self.chance.random() * 0.05)
            self.submitted.append(job.id)

    def operate(self):
        jobs = self.runner.jobs(limit=60, status=(*self.UNSETTLED, "failed"))
        if not jobs:
            return
        job = self.chance.choice(jobs)
        try:
            if allowed := [name for name in job.operations if "low" not in name]:
                getattr(job, self.chance.choice(allowed))()
                self.operations += 1
        except bgjobs.InvalidOperation:
            self.refused += 1

    def kill(self):
        victim = self.chance.randrange(len(self.processes))
        self.processes[victim].kill()
        self.processes[victim].wait()
        self.processes[victim] = self.worker()
        self.kills += 1

    def settle(self):
        """Wait until all jobs are over; fail if for a minute none ends."""
        left, moved = None, time.monotonic()
        while unsettled := self.runner.jobs(limit=None, status=self.UNSETTLED):
            if left != len(unsettled):
                left, moved = len(unsettled), time.monotonic()
            assert time.monotonic() < moved + 60, [
                (job.id, job.status, job.phase) for job in unsettled][:20]
            for job in unsettled:
                with contextlib.suppress(bgjobs.InvalidOperation):
                    job.resume()
            time.sleep(0.5)

    def check(self):
        """Check that no job was lost and that no attempt began twice."""
        look_for_the_dead(self.runner)
        consistent(self.runner)
        jobs = self.runner.jobs(limit=None)
        assert {job.id for job in jobs} >= set(self.submitted)
        begun = collections.Counter(pathlib.Path(self.notes).read_text().splitlines())
        assert max(begun.values()) == 1, [each for each, count in begun.items() if count > 1][:20]
        by_status = {status: count for status, count in counted(self.runner).items() if count}
        print(f"{len(jobs):,} jobs, {len(begun):,} attempts; by status: {by_status};",
              "the file is consistent")

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


def soak(minutes, workers=2):
    """Submit, operate and kill at random; check the file once a minute, and at the end."""
    it, deadline = Soak(workers), time.monotonic() + 60 * minutes
    with it.runner:
        try:
            time.sleep(2)
            it.say("at the start:")
            said = time.monotonic()
            while time.monotonic() < deadline:
                it.submit()
                it.operate()
                if it.chance.random() < 0.01:
                    it.kill()
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    consistent(it.runner)
                    it.say(it.account())
                time.sleep(0.02)
            it.settle()
            it.say("at the end:", it.account())
        finally:
            it.end()
        it.check()
    shutil.rmtree(it.folder)


# ---- the benchmark, beside bare sqlite3 that does the least of the same: python test_bgjobs.py bench [--repeat N] ----

def do_nothing():
    pass


def time_checkpoints():
    """Return the nanoseconds of a checkpoint without a state."""
    return 1e9 / rate(100_000, bgjobs.current_job().checkpoint)


def rate(count, call):
    """Return how many such calls a second there are, in a row of `count`."""
    begun = time.perf_counter()
    for _ in range(count):
        call()
    return count / (time.perf_counter() - begun)


def round_trip(runner):
    """Return the median milliseconds from submit to result on an idle runner."""
    laps = []
    for _ in range(100):
        time.sleep(0.005)
        laps.append(1e3 / rate(1, lambda: runner.submit(do_nothing).result(10)))
    return statistics.median(laps)


def run_all(runner):
    last = runner.submit_many(do_nothing, [()] * 5_000)[-1]
    ran = 5_000 * rate(1, lambda: runner.start().shutdown())
    assert runner.get(last).status == "finished"
    return ran


BARE_INSERT = "INSERT INTO jobs (fn, args) VALUES ('nothing', ?)"


def bare_db(path):
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript("""
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        CREATE TABLE jobs (id INTEGER PRIMARY KEY, fn TEXT, args TEXT, status INTEGER DEFAULT 0);
        CREATE INDEX queued ON jobs(id) WHERE status = 0""")
    return contextlib.closing(db)


def bare_write(db, statement, rows):
    db.execute("BEGIN IMMEDIATE")
    db.executemany(statement, rows)
    db.execute("COMMIT")


def bare_run_all(db):
    bare_write(db, BARE_INSERT, [("[]",)] * 5_000)

    def drain():
        while ids := db.execute("SELECT id FROM jobs WHERE status = 0 ORDER BY id LIMIT 16").fetchall():
            bare_write(db, "UPDATE jobs SET status = 1 WHERE id = ?", ids)
            bare_write(db, "UPDATE jobs SET status = 2 WHERE id = ?", ids)
    return 5_000 * rate(1, drain)


BENCHES = [                         # title, unit, with a runner that has not been started, with bare_db
    ("submit, one by one", "jobs/s", lambda runner: rate(3_000, lambda: runner.submit(do_nothing)),
     lambda db: rate(3_000, lambda: db.execute(BARE_INSERT, ("[]",)))),
    ("submit_many", "jobs/s", lambda runner: 50_000 * rate(1, lambda: runner.submit_many(do_nothing, [()] * 50_000)),
     lambda db: 10_000 * rate(5, lambda: bare_write(db, BARE_INSERT, [("[]",)] * 10_000))),
    ("run 5,000 jobs, 8 workers", "jobs/s", run_all, bare_run_all),
    ("submit to result, idle", "ms", lambda runner: round_trip(runner.start()), None),
    ("checkpoint()", "ns", lambda runner: runner.start().submit(time_checkpoints).result(30), None),
]


def bench(repeat):
    """Print what bgjobs reaches beside bare sqlite3 on this machine, in one run."""
    print(f"bgjobs {bgjobs.__version__}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, "
          f"{os.cpu_count()} cores; medians of {repeat} runs, side by side")
    print(f"{'':34}{'bgjobs':>14}{'bare sqlite3':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        files = (os.path.join(folder, f"{number}.db") for number in itertools.count())
        for title, unit, ours, bare in BENCHES:
            mine, theirs = [], []
            for _ in range(repeat):
                with contextlib.closing(bgjobs.Runner(next(files), start=False, max_workers=8)) as runner:
                    mine.append(ours(runner))
                if bare is not None:
                    with bare_db(next(files)) as db:
                        theirs.append(bare(db))
            figure, beside = statistics.median(mine), statistics.median(theirs) if theirs else None
            ratio = f"{beside:>14,.1f}{figure / beside:>8.2f}" if beside else ""
            print(f"{title:34}{figure:>14,.1f}{ratio:22}  {unit}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["soak"]:
        soak(*map(float, sys.argv[2:3] or ["30"]), *map(int, sys.argv[3:4]))
    elif sys.argv[1:2] == ["soak-worker"]:
        soak_worker(sys.argv[2])
    elif sys.argv[1:] == ["bench"] or sys.argv[1:3] == ["bench", "--repeat"]:
        bench(*map(int, sys.argv[3:] or ["3"]))
    else:
        sys.exit("python test_bgjobs.py soak [MINUTES] [WORKERS], or bench [--repeat N]; the tests themselves run with pytest")
