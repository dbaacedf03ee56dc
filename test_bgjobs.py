"""Tests of bgjobs, in the order of its sections. Real SQLite files, threads and processes; only the clock is ever faked."""
import asyncio
import concurrent.futures
import contextlib
import contextvars
import datetime
import decimal
import functools
import gc
import http.client
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import uuid
import zoneinfo

import pytest

import bgjobs

HERE = pathlib.Path(__file__).resolve().parent


# ---- helpers ---------------------------------------------------------------------------------------------------

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


def consistent(runner):
    """Check what must be true of a file at any time: counts agree with the jobs, nothing is lost between the indexes."""
    with contextlib.closing(sqlite3.connect(runner.path)) as db:
        db.row_factory = sqlite3.Row
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        jobs = {row["id"]: row for row in db.execute("SELECT * FROM bgjobs_jobs")}
    for job in jobs.values():
        below = [j for j in jobs.values() if job["id"] in lineage(jobs, j)]
        direct = [j for j in jobs.values() if j["parent_id"] == job["id"]]
        over = [j for j in below if j["status"] in bgjobs.OVER]
        assert job["total"] == len(below)
        assert job["done"] == len(over)
        assert job["failed"] == sum(j["status"] == "failed" for j in below)
        assert job["running"] == sum(j["status"] in bgjobs.ACTIVE for j in below)
        assert job["open"] == sum(j["status"] not in bgjobs.OVER for j in direct)
        parts = sum(1.0 if j["status"] in bgjobs.OVER else j["progress"] or 0.0 for j in below)
        assert job["tree_progress"] == pytest.approx(parts, abs=1e-6)
        assert job["queue"] is None or job["status"] == "pending" and job["queue"] == job["low_priority"]
        assert (job["owner"] is not None) == (job["status"] in bgjobs.ACTIVE and not job["returned"])
        if job["parent_id"] is None:
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


def python(code, *arguments, cwd=None, **environment):
    """Start a Python process that can import bgjobs and this file."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], text=True, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(HERE), **environment})


def finish(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


# ---- the functions that jobs run ---------------------------------------------------------------------------------

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


def nap(seconds):
    time.sleep(seconds)


def stoppable(name="stoppable"):
    job = bgjobs.current_job()
    seen.append((name, job.attempt))
    while True:
        job.sleep(5)


def children(count, function=None, *arguments):
    return [bgjobs.submit(function or add, *(arguments or (i, i))).id for i in range(count)]


def sum_of_children(count):
    jobs = [bgjobs.submit(add, i, i) for i in range(count)]
    return sum(job.result() for job in jobs)


def nested(depth):
    return 0 if depth == 0 else 1 + bgjobs.submit(nested, depth - 1).result()


def tree(width, depth):
    if depth == 0:
        return 1
    return sum(job.result() for job in [bgjobs.submit(tree, width, depth - 1) for _ in range(width)])


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


class Tasks:
    @staticmethod
    def double(value):
        return 2 * value


async def coroutine(value):
    await asyncio.sleep(0)
    return [value, bgjobs.current_job().id]


@bgjobs.job(name="tests.declared", low_priority=True, label="Declared")
def declared(value):
    return value


# ---- 1 Words and rules ---------------------------------------------------------------------------------------------

class TestTransitions:
    def test_every_status_has_a_row_of_answers(self):
        for operation, moves in bgjobs.TRANSITIONS.items():
            assert set(moves) <= set(bgjobs.STATUSES), operation
            assert set(moves.values()) <= set(bgjobs.STATUSES), operation

    @pytest.mark.parametrize("operation", bgjobs.TRANSITIONS)
    @pytest.mark.parametrize("status", bgjobs.STATUSES)
    def test_the_store_does_what_the_table_says(self, idle, status, operation):
        job = idle.submit(add, 1)
        with contextlib.closing(sqlite3.connect(idle.path)) as db:
            db.execute("UPDATE bgjobs_jobs SET status = ?, queue = CASE WHEN ? = 'pending' THEN 0 END, owner = CASE WHEN ? IN "
                       "('running', 'stopping') THEN 99 END, lane = CASE WHEN ? = 'pending' THEN 0 END", [status] * 4)
            db.commit()
        call = {"set_low_priority": lambda: job.set_low_priority(True), "cancel": lambda: idle._operate("cancel", job.id, None),
                "remove_low_priority": lambda: job.set_low_priority(False)}.get(operation, getattr(job, operation, None))
        expected = bgjobs.TRANSITIONS[operation].get(status)
        if expected is None:
            with pytest.raises(bgjobs.InvalidOperation, match=f"job {job.id} is {status}; it can"):
                call()
            assert job.status == status
        else:
            call()
            assert job.status == expected
        consistent(idle)

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


# ---- 2 Values -------------------------------------------------------------------------------------------------------

UTC = datetime.timezone.utc
STORED = [
    None, True, 0, -1, 1.5, 10**100, "", "text", "\ud800 lone", "\x00nul", [], [1, [2, {}]], {}, {"a": {"b": [None]}},
    {"$date": "2026-01-31"}, {"$": 1, "b": 2}, {"$dict": []}, {"$unknown": 1},
    datetime.datetime(2026, 1, 31, 12, 30, 1, 5), datetime.datetime(2026, 1, 31, tzinfo=UTC),
    datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
    datetime.date(2026, 1, 31), datetime.time(23, 59, 59, 1), datetime.time(1, 2, tzinfo=UTC),
    datetime.timedelta(days=-3, microseconds=7), decimal.Decimal("1.10"), decimal.Decimal("NaN"),
    uuid.UUID("12345678123456781234567812345678"), b"", b"\x00\xff", set(), {1, "a", None}, pathlib.Path("/tmp/x"),
]


def nested_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED = [
    (float("nan"), "not JSON compliant"), (float("inf"), "not JSON compliant"), ({1: 2}, "the key 1 is no string"),
    ({(1, 2): 3}, "is no string"), (object(), "is of type object"), (lambda: 0, "is of type function"),
    (10**5000, "digits"), ("x" * 300_000, "more than the 262,144 allowed"), (nested_list(100_000), "nested too deeply"),
    ({(1, 2)}, "a set of tuples"), ({frozenset()}, "frozenset"), (1 + 2j, "complex"), (range(3), "range"),
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
            assert (back.tzinfo, back.fold) == (value.tzinfo, value.fold)

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


# ---- 3 Functions and options -------------------------------------------------------------------------------------------

def outer():
    def inner():
        pass
    return inner


class TestFunctions:
    @pytest.mark.parametrize("function,reason", [
        (lambda: 0, "a lambda has no name"), (outer(), "defined inside a function"), (functools.partial(add, 1), "partial objects"),
        (3, "not callable"), (Tasks().double.__call__, "no import path|leads to"), ([].append, "leads to|no import path"),
        (contextlib.suppress(), "not callable"),
    ], ids=["lambda", "nested", "partial", "int", "wrapper", "bound", "object"])
    def test_a_function_that_cannot_be_imported_again_is_refused(self, idle, function, reason):
        with pytest.raises(TypeError, match=reason):
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

    def test_unknown_options_and_bad_values_are_refused_by_name(self, idle):
        with pytest.raises(TypeError, match="unknown option 'lable'"):
            idle.options(lable="x")
        with pytest.raises(ValueError, match="delay must be seconds, 0 or more, got -1"):
            idle.options(delay=-1)
        with pytest.raises(ValueError, match="run_at must be Unix seconds or an aware datetime"):
            bgjobs.options(run_at=datetime.datetime(2026, 1, 1))
        with pytest.raises(ValueError, match="not both"):
            idle.options(delay=1, run_at=1)

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
        assert jobs[0].args == [1, bgjobs.MASK] and jobs[1].kwargs == {"b": bgjobs.MASK}
        idle.drain()
        assert jobs[0].result() == 271829
        with pytest.raises(ValueError, match="no such argument"):
            idle.options(secret=["c"]).submit(add, 1)

    def test_importing_is_quick_and_has_no_side_effects(self, tmp_path):
        code = """
            import sys, threading
            import bgjobs
            heavy = {"http.server", "asyncio", "inspect", "argparse", "decimal", "uuid", "wsgiref", "socket"} & set(sys.modules)
            print(sorted(heavy), threading.active_count())
        """
        assert finish(python(code, cwd=tmp_path)) == (0, "[] 1\n", "")
        assert list(tmp_path.iterdir()) == []
