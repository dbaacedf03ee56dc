#!/usr/bin/env python3
"""bgjobs: background jobs for a Python app, in this one file and one SQLite file.

    import bgjobs

    def export(table):  # any importable function is a job
        job = bgjobs.current_job()  # works, as a no-op, outside a job too
        for row in job.each(read(table)):  # progress, ETA, stop checkpoint, resume: one line
            write(row)
        job.log.info("exported %s", table)

    bgjobs.start("app.db", max_workers=4)  # picks up what the last run left behind
    bgjobs.serve()  # http://127.0.0.1:8765/
    job = bgjobs.submit(export, "users")
    print(job.result(timeout=60))  # job.stop(), job.resume(), job.cancel() ...: also on the page

Words. A *job* is a persisted unit of work: a function by its import path, and JSON arguments. A
job submitted inside another is its *child*; one without a parent is a *root*; a root and all its
descendants are a *tree*. An *attempt* is one execution of a job's function by a *worker*, a thread.
A *runner* owns the workers of one process. Only the *store* touches SQLite. At a *checkpoint* the
function may be stopped and may save its *state*, from which the next attempt goes on.

Life of a job. ``pending`` until a worker is free; ``running`` until its function has returned and
all its descendants are over; then ``finished`` or ``failed``. ``stop`` makes it ``stopping``, and
``stopped`` at its next checkpoint; ``resume`` makes it pending again. ``cancelled`` is for good.

Guarantees. What submit, checkpoint and the operations have returned for is in the file and survives
a kill -9. A job runs at least once: again only if its process died, somebody asked, or a retry was
due. Each attempt's outcome is recorded at most once: every write carries its attempt's number, and
a superseded one is refused. All processes on the file share execution time fairly between roots.

The walk of a job, by sections:

    submit   Submitter.submit (12) encodes the call (2, 3); Store.write (8) queues what stores it,
             Transaction.submit (7).
    write    One of the threads that wait for the store leads. In one transaction it runs what all
             of them queued, records the outcomes of ended attempts and claims jobs for free
             workers.
    claim    claim (7) takes the oldest ready job of the root that has had the least time (5).
    run      Dispatch.execute (12) calls the function as an Attempt (10) in a thread of the Pool
             (9), or hands it to an executor, whose process calls back over a connection (18).
    finish   The outcome waits in Dispatch until Transaction.finish (7) records it in the next
             transaction. After the commit the handles (11) of jobs that are over complete.

A service thread (13) looks after schedules, retries, stops by other processes, and their deaths.

Contents:  1 Words and rules  2 Values  3 Functions and options  4 Times of schedules
    5 Fair shares  6 Tables  7 Transactions  8 Store  9 Worker pool  10 Inside a job  11 The handle
    12 Runner  13 Clock, processes and exit  14 Schedules  15 Statistics and retention
    16 What people see  17 The default runner  18 Elsewhere  19 Status page  20 Command line

MIT License. Copyright (c) 2026 the bgjobs developers.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
from __future__ import annotations

import atexit
import base64
import bisect
import builtins
import contextlib
import contextvars
import copy
import functools
import heapq
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import sqlite3
import sys
import threading
import time
import traceback
import types
import weakref
from collections import defaultdict, deque
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED as FUTURE_FINISHED
from typing import (
    Any, Callable, Concatenate, ContextManager, Coroutine, Generator, Iterable, Iterator, Mapping,
    NamedTuple, NoReturn, ParamSpec, Sized, TextIO, TypeVar, overload)

__version__ = "1.1.0"
__all__ = ["BgjobsError", "InvalidOperation", "Job", "JobContext", "JobFailed", "JobStopped",
           "Runner", "Schedule", "StoreError", "Submitter", "backup", "close", "current_job",
           "drain", "every", "get", "job", "jobs", "options", "prune", "schedules", "serve",
           "shutdown", "start", "stats", "submit", "submit_many", "wsgi"]

_log = logging.getLogger("bgjobs")

# For type checkers: a function's parameters, its result; an iterable's items.
_P = ParamSpec("_P")
_T = TypeVar("_T")
_Item = TypeVar("_Item")
Function = Callable[..., Any]
_F = TypeVar("_F", bound=Function)
Fields = dict[str, Any]  # a JSON object, options, or SQL parameters


def start_thread(name: str, run: Function, *args: Any) -> threading.Thread:
    """Start a daemon thread that belongs to no job."""
    thread = threading.Thread(target=contextvars.Context().run, args=(run, *args), name=name,
                              daemon=True)
    thread.start()
    return thread


def say(level: int, text: str) -> None:
    """Log a message from a thread of its own: the app's handlers may block."""
    with contextlib.suppress(RuntimeError):  # the interpreter ends
        start_thread("bgjobs-log", _log.log, level, "%s", text)


# ---- 1 Words and rules -----------------------------------

PENDING = "pending"  # waits for a worker, or for its time
RUNNING = "running"  # executes, or waits for children; after a crash pending
STOPPING = "stopping"  # after a crash stopped
STOPPED = "stopped"
FINISHED = "finished"
FAILED = "failed"
CANCELLED = "cancelled"

ACTIVE = (RUNNING, STOPPING)
OVER = (FINISHED, FAILED, CANCELLED)
_NOT_OVER = (PENDING, *ACTIVE, STOPPED)
STATUSES = _NOT_OVER + OVER


class Operation(NamedTuple):
    """What people may do to a job."""

    moves: dict[str, str]  # a status that allows it -> the status that follows
    done: str  # the past tense, for refusals
    does: str  # for the help of the command line
    once_returned: dict[str, str] = {}  # moves that differ then


_ANY_NOT_OVER = {status: status for status in _NOT_OVER}

OPERATIONS = {
    "stop": Operation({PENDING: STOPPED, RUNNING: STOPPING, STOPPING: STOPPING, STOPPED: STOPPED},
                      "stopped", "Stop jobs at their next checkpoint.", {RUNNING: STOPPED}),
    "resume": Operation({STOPPED: PENDING, FAILED: PENDING},
                        "resumed", "Let stopped or failed jobs go on.", {STOPPED: RUNNING}),
    "force_stop": Operation({STOPPING: STOPPED},
                            "force-stopped", "Make stopping jobs stopped now."),
    "cancel": Operation({PENDING: CANCELLED, STOPPED: CANCELLED},
                        "cancelled", "Discard pending or stopped jobs for good."),
    "restart": Operation({FINISHED: PENDING, FAILED: PENDING},
                         "restarted", "Run finished or failed jobs from scratch."),
    "set_low_priority": Operation(_ANY_NOT_OVER,
                                  "set to low priority", "Run jobs in periods of low load."),
    "remove_low_priority": Operation(_ANY_NOT_OVER,
                                     "taken off low priority", "Run jobs as others."),
}

# The outcome of an attempt: what its function did; or, if the attempt is given back, that the
# function had begun, had not, or is unknown here.
RETURNED, RAISED, HALTED = "returned", "raised", "halted"
RELEASED, UNSPENT, UNKNOWN = "released", "unspent", "unknown"
NO_EXECUTOR = "no executor"  # given back: its executor takes nothing
WAITS_FOR = {UNKNOWN: "function ", NO_EXECUTOR: "executor "}  # what blocks the job
TIMED_OUT = "timed out"  # why an attempt is stopped, and ends as RAISED

# Outcomes in an attempt's history; phases of jobs that are pending again.
OUTCOMES = {RETURNED: "finished", RAISED: "failed", HALTED: "stopped", RELEASED: "given back"}
PHASES = {RAISED: "retrying", RELEASED: "interrupted", UNKNOWN: "unknown function",
          NO_EXECUTOR: "waiting for the executor"}


class BgjobsError(Exception):
    """The base class of bgjobs' errors, except for misuse (TypeError, ValueError)."""


class InvalidOperation(BgjobsError):
    """The job's status does not allow the operation; the text says which it allows."""


class StoreError(BgjobsError):
    """The job file cannot be used; the text names it and the remedy."""


class JobFailed(BgjobsError):
    """A job failed in another process, or long ago.

    `type`, `text` and `traceback` are those of its function's exception.
    """

    def __init__(self, job: str, type: str, text: str, traceback: str) -> None:
        super().__init__(f"{job} failed with {type}: {text}")
        self.type, self.text, self.traceback = type, text, traceback


class JobStopped(BaseException):
    """Raised at a checkpoint of a job that is to stop. `except Exception` does not catch it."""


def allowed_operations(status: str, options: Fields, system: bool,
                       active_below: bool) -> list[str]:
    """Return what a job allows. active_below: a descendant runs or is stopping."""
    allowed = {name for name in OPERATIONS if status in OPERATIONS[name].moves}
    if status in (STOPPING, STOPPED):
        allowed.discard("stop")  # it would change nothing
    if active_below:
        allowed -= {"cancel", "restart"}
        if status == STOPPED:
            allowed.add("force_stop")  # of the descendants
    return [name for name in OPERATIONS
            if name in allowed and not objection(name, options, system)]


def objection(operation: str, options: Fields, system: bool) -> str:
    """Return why a job refuses an operation in any status, or ""."""
    if operation == "stop" and system and not options.get("stoppable"):
        return "it is a system job"
    if operation == "restart" and not options.get("restartable", True):
        return "it was declared restartable=False"
    return ""


def refusal(job: str, status: str, operation: str, allowed: list[str],
            why: str) -> InvalidOperation:
    """Return the error for an operation that a job does not allow."""
    done = OPERATIONS[operation].done
    can = " or ".join(OPERATIONS[name].done for name in allowed if "priority" not in name)
    text = f"it can be {can}, not {done}" if can else f"it cannot be {done}"
    reason = f" ({why})" if why else ""
    return InvalidOperation(f"{job} is {status}; {text}{reason}")


# The functions of later layers that the core calls -> their layer.
DOORS = {"serve": "page", "wsgi": "page", "isolate": "elsewhere", "executor": "elsewhere"}
_entrances: dict[str, Function] = {}


def open_door(name: str, function: Function) -> None:
    """Enter a function of a later layer."""
    _entrances[name] = function


def door(name: str) -> Function:
    """Return a function of a later layer. Raises BgjobsError if that was cut off."""
    if name not in _entrances:
        raise BgjobsError(f"{name} needs the layer {DOORS[name]!r}; copy the whole bgjobs.py")
    return _entrances[name]


# ---- 2 Values --------------------------------------------
#
# Arguments, state and results are JSON. A value of another type is an object whose one key names
# the type: {"$date": "2026-01-31"}. A dict with a key that begins with "$" is
# {"$dict": [[key, value], ...]}.

VALUE_LIMIT = 256 * 1024  # characters of arguments, a state or a result
TEXT_LIMIT = 8 * 1024  # characters of a log line or a message


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or float, but no bool, NaN, inf or 10**400."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def text_of(value: Any, limit: int = TEXT_LIMIT, form: Function = str) -> str:
    """Return str(value), or another form, cut, with lone surrogates escaped. Never raises."""
    try:
        text: str = form(value)
    except Exception:
        text = f"<{type(value).__qualname__} that cannot be printed>"
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: Any) -> str:
    """Return a value as error messages show it. Never raises."""
    return text_of(value, 80, repr)


dump = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_PLAIN = {str, int, float, bool, type(None)}


def _set_to_json(value: set[Any]) -> list[Any]:
    if tuple in map(type, value):
        raise TypeError("a set of tuples would come back as lists; pass a list")
    return sorted(map(_jsonable, value), key=dump)


def _clock_to_json(value: Any) -> list[Any]:
    """Return [ISO text, with a fixed offset; fold; key of the ZoneInfo]."""
    import datetime
    zone, key = value.tzinfo, getattr(value.tzinfo, "key", None)
    if key is None and not isinstance(zone, (datetime.timezone, type(None))):
        raise TypeError(f"the time zone {short(zone)} is not of datetime or zoneinfo")
    return [value.isoformat(), value.fold, key]


def _clock_from_json(kind: Any, stored: list[Any]) -> Any:
    text, fold, zone = stored
    value = kind.fromisoformat(text).replace(fold=fold)
    if isinstance(zone, str):
        return value.replace(tzinfo=zone_of(zone))
    if zone is not None:  # 1.0.0 stored a fixed offset as seconds, or as [seconds, name]
        import datetime
        seconds = zone[0] if isinstance(zone, list) else zone
        return value.replace(tzinfo=datetime.timezone(datetime.timedelta(seconds=seconds)))
    return value


def _construct(kind: Any, stored: Any) -> Any:
    return kind(stored)


# By tag: the module and name of the type, value -> JSON, and (type, JSON) -> value.
_TAGGED: Fields = {
    "$bytes": ("builtins", "bytes", lambda value: base64.b64encode(value).decode(),
               lambda kind, stored: base64.b64decode(stored)),
    "$set": ("builtins", "set", _set_to_json, _construct),
    "$datetime": ("datetime", "datetime", _clock_to_json, _clock_from_json),
    "$time": ("datetime", "time", _clock_to_json, _clock_from_json),
    "$date": ("datetime", "date", str, lambda kind, stored: kind.fromisoformat(stored)),
    "$timedelta": ("datetime", "timedelta",
                   lambda value: [value.days, value.seconds, value.microseconds],
                   lambda kind, stored: kind(*stored)),
    "$decimal": ("decimal", "Decimal", str, _construct),
    "$uuid": ("uuid", "UUID", str, _construct),
    "$path": ("pathlib", "WindowsPath" if os.name == "nt" else "PosixPath", str, _construct),
}


def _jsonable(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return [*map(_jsonable, value)]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"the key {short(key)} is no string; use a list of pairs")
        plain = {key: _jsonable(item) for key, item in value.items()}
        return {"$dict": list(plain.items())} if any(key[:1] == "$" for key in plain) else plain
    for tag, (module, name, to_json, _) in _TAGGED.items():
        # The module of a value's type is loaded.
        if kind is getattr(sys.modules.get(module), name, None):
            return {tag: to_json(value)}
    raise TypeError(f"{short(value)} is of type {kind.__qualname__}; pass JSON values, dates, "
                    "Decimal, UUID, bytes, set or Path, or an id to load it by")


def encode(value: Any, what: str = "the value") -> str:
    """Return `value` as JSON. Raises TypeError, with the remedy."""
    try:
        text = dump(_jsonable(value))
    except Exception as error:  # of the value's own methods, too
        raise TypeError(f"{what} cannot be stored: {text_of(error)}") from None
    if len(text) > VALUE_LIMIT:
        raise TypeError(f"{what} cannot be stored: {len(text):,} characters of JSON are more than "
                        f"the {VALUE_LIMIT:,} allowed; keep it in a file and pass its name")
    return text


def _untagged(found: Fields) -> Any:
    if len(found) == 1:
        (tag, stored), = found.items()
        if tag == "$dict":
            return dict(stored)
        if tag in _TAGGED:
            module, name, _, from_json = _TAGGED[tag]
            return from_json(getattr(__import__(module), name), stored)
    return found


def decode(text: str | None) -> Any:
    """Return the value of a text from `encode`; None for None."""
    if text is None:
        return None
    return json.loads(text, object_hook=_untagged if '{"$' in text else None)


# ---- 3 Functions and options -----------------------------

def import_name(module: str) -> str:
    """Return the name by which another process imports a module."""
    main: Any = sys.modules["__main__"]
    if module not in ("__main__", "__mp_main__"):  # multiprocessing's name for it
        return module
    if getattr(main, "__spec__", None):  # python -m
        return str(main.__spec__.name)
    file = getattr(main, "__file__", None) or "<stdin>"
    return module if file == "<stdin>" else os.path.splitext(os.path.basename(file))[0]


def module_name(module: str) -> str:
    """Return a module's name in job names: without .__main__."""
    return import_name(module).removesuffix(".__main__")


def import_path(function: Function) -> str:
    """Return "package.module.function". Raises TypeError if that leads elsewhere."""
    module, qualname = (str(getattr(function, name, None))
                        for name in ("__module__", "__qualname__"))
    found: Any = sys.modules.get(module)
    for attribute in qualname.split("."):
        found = getattr(found, attribute, None)
    if found is None or found != function:
        raise TypeError(
            f"{short(function)} cannot be a job: the name {module}.{qualname} does not lead to it; "
            "submit one that is defined with def at the top level of a module, and pass arguments")
    return f"{module_name(module)}.{qualname}"


# The functions declared with @job, submitted or found, by name; the options of those declared.
# Global, since imports fill them before there is a runner.
functions: dict[str, Function] = {}
declared: dict[Function, Fields] = {}


@functools.cache
def name_of(function: Function) -> str:
    """Return the function's name and remember it. Raises TypeError as import_path."""
    path = import_path(function)
    name: str = declared.get(function, {}).get("name") or path
    functions[name] = function
    return name


def function_of(name: str) -> Function | None:
    """Return the function of this name, or None if this process does not know it.

    A name is data: nothing is imported. The function was declared or submitted, or is defined in a
    loaded module outside the standard library.
    """
    if name in functions or name.partition(".")[0] in sys.stdlib_module_names:
        return functions.get(name)
    for path, module in [*sys.modules.items()]:
        prefix = f"{module_name(path)}."
        if name.startswith(prefix):
            first, *others = name.removeprefix(prefix).split(".")
            with contextlib.suppress(TypeError):  # import_path's
                found: Any = vars(module).get(first)
                for attribute in others:
                    found = getattr(found, attribute, None) if isinstance(found, type) else None
                if import_path(found) == name:
                    return functions.setdefault(name, found)
    return None


def are_seconds(values: Iterable[Any]) -> bool:
    return all(is_number(value) and value >= 0 for value in values)


def unix_seconds(value: Any) -> float | None:
    """Return Unix seconds or an aware datetime as Unix seconds, or None if neither."""
    if hasattr(value, "timestamp") and value.utcoffset() is not None:
        value = value.timestamp()
    return float(value) if is_number(value) else None


def zone_of(tz: Any) -> Any:
    """Return a ZoneInfo; None, the machine's own zone, for None. Raises ValueError."""
    import zoneinfo
    try:
        return None if tz is None else zoneinfo.ZoneInfo(str(tz))
    except Exception:  # KeyError, ValueError, OSError
        raise ValueError(f'unknown time zone {short(tz)}; use one like "Europe/Berlin"') from None


# Neither cut nor escaped, so that no two names become one.
_A_NAME = (lambda v: v != "" and text_of(v, 500) == v,
           "a text of 1 to 500 characters, without lone surrogates")
_A_TEXT = (lambda v: isinstance(v, str), "a text")
_A_BOOL = (lambda v: isinstance(v, bool), "True or False")

# For each option, a test and what a value must be. `options` explains them.
OPTIONS: Fields = {
    "name": _A_NAME,
    "label": _A_TEXT,
    "run_by": _A_TEXT,
    "low_priority": _A_BOOL,
    "system": _A_BOOL,
    "key": _A_NAME,
    "delay": (lambda v: are_seconds([v]), "seconds, 0 or more"),
    "run_at": (lambda v: unix_seconds(v) is not None, "Unix seconds or an aware datetime"),
    "retries": (lambda v: type(v) is int and v >= 0, "a whole number, 0 or more"),
    "backoff": (lambda v: callable(v) or _pauses(v, 0),
                "seconds, a list of seconds, or a function of the attempt"),
    "timeout": (lambda v: v > 0 and are_seconds([v]), "seconds, more than 0"),
    "max_running": (lambda v: type(v) is int and 0 < v < 1 << 63,
                    "a whole number greater than 0 and less than 2**63"),
    "stoppable": _A_BOOL,
    "restartable": _A_BOOL,
    "recover": _A_BOOL,
    "secret": (lambda v: type(v) in (list, tuple, set, frozenset) and {*map(type, v)} <= {str},
               "a list of argument names"),
    "isolate": _A_BOOL,
    "executor": (lambda v: callable(getattr(v, "submit", v)),
                 "a concurrent.futures.Executor, what makes one, or None"),
    "tz": (zone_of, "the name of a time zone, a ZoneInfo or None"),
    "parent": (lambda v: isinstance(v, Job), "a Job or None"),
    "connection": (lambda v: isinstance(v, sqlite3.Connection), "an open sqlite3.Connection"),
}


def check_values(given: Fields, tests: Fields) -> None:
    """Raise ValueError if a value is not None and fails its test."""
    for name, value in given.items():
        test, must_be = tests[name]
        try:
            fits = value is None or test(value)
        except Exception:  # of the value's own methods, or of zone_of
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {must_be}, got {short(value)}")


def check_options(given: Fields) -> Fields:
    """Return `given`. Raises TypeError: an unknown option; ValueError: a bad value."""
    for name in given.keys() - OPTIONS:
        raise TypeError(f"unknown option {name!r}; the options are {', '.join(OPTIONS)}")
    check_values(given, OPTIONS)
    if None not in (given.get("delay"), given.get("run_at")):
        raise ValueError("give delay or run_at, not both")
    return given


def job(**options: Any) -> Callable[[_T], _T]:
    """Decorate a function with default options for its jobs; return the function unchanged.

        @bgjobs.job(name="export", low_priority=True)
        def export(table): ...

    The options are those of `bgjobs.options`, except parent and connection, and
    executor: a concurrent.futures.Executor for the function, or what makes one; None: the app's
    threads, whatever the runner's is.

    Raises TypeError for an unknown option, ValueError for a bad value or a name that is taken.
    """
    check_options(options)
    for name in options.keys() & {"parent", "connection"}:
        raise TypeError(f"{name} is an option of one submit, not of a function")

    def declare(function: Any) -> Any:
        name = options.get("name")
        if name:
            known = functions.get(name, function)
            taken_by = f"{known.__module__}.{known.__qualname__}"
            if taken_by != f"{function.__module__}.{function.__qualname__}":
                raise ValueError(f"the job name {name!r} is taken by {taken_by}")
            functions[name] = function  # perhaps that of a reloaded module
        declared[function] = options
        return function
    return declare


# These options have no column of their own.
_KEPT = ("stoppable", "restartable", "recover", "secret", "retries", "timeout", "isolate",
         "backoff")


def options_to_keep(function: Function, given: Fields) -> Fields:
    """Return the options to store as JSON. Raises ValueError if `secret` or `backoff` is bad."""
    kept = {name: given[name] for name in _KEPT if given.get(name) is not None}
    if "secret" in kept:
        kept["secret"] = _secret_places(function, kept["secret"])
    if "backoff" in kept:
        kept["backoff"] = _pauses(kept["backoff"], kept.get("retries", 0))
    return kept


def _secret_places(function: Function, secret: Iterable[str]) -> list[str | int]:
    """Return the names, and their positions. Raises ValueError."""
    import inspect
    stars = {name: str(each).count("*", 0, 2)
             for name, each in inspect.signature(function).parameters.items()}
    for name in secret:
        if stars.get(name, 2 not in stars.values()):  # **keywords take any name
            raise ValueError(f"secret names {name!r}, but {function.__qualname__} has no such "
                             "argument; of *arguments and **keywords, name the keywords, or pass "
                             "a list or dict")
    return [*secret, *(place for place, name in enumerate(stars) if name in secret)]


def _pauses(backoff: Any, retries: int) -> list[float]:
    """Return the seconds before each retry; the last one repeats. Raises ValueError."""
    if callable(backoff):  # called now, for it cannot be stored
        backoff = [backoff(attempt) for attempt in range(1, min(retries, 100) + 1)]
    pauses = list(backoff) if isinstance(backoff, (list, tuple)) else [backoff]
    if not are_seconds(pauses):
        raise ValueError(f"backoff must give seconds, 0 or more; it gave {short(pauses)}")
    return pauses


def pause_before_retry(options: Fields, failures: int) -> float:
    """Return the seconds to wait after so many failures.

    By default 1 s, doubled each time, up to 10 min; and by chance up to half as long again, so that
    jobs that failed together are not retried together.
    """
    pauses = options.get("backoff")
    if pauses:
        return float(pauses[:failures][-1])
    return min(600.0, 2.0 ** min(failures - 1, 30) * random.uniform(1.0, 1.5))


# ---- 4 Times of schedules --------------------------------
#
# A schedule has a period or five cron fields. As in POSIX, if day of month and day of week are both
# restricted, a day fits if either does.
#
# Where the clocks change: a time skipped in spring runs that much later, a time repeated in autumn
# runs the first time. But with every hour ("*"), it runs in each hour that passes, whatever the
# clocks show: the wildcard rule of vixie-cron.

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def seconds_of(text: str) -> float | None:
    """Return the seconds of a text like "15m" (s, m, h, d, w), or None for another text."""
    try:
        return float(text[:-1]) * _UNITS[text[-1]]
    except (KeyError, ValueError):
        return None


def period_text(seconds: float) -> str:
    """Return a period as a text: 900 as "15m"."""
    unit = next((unit for unit in "wdhm" if seconds and seconds % _UNITS[unit] == 0), "s")
    return f"{seconds / _UNITS[unit]:.12g}{unit}"


class Every(NamedTuple):
    """A schedule with a period."""

    seconds: float

    def next(self, due: float, now: float) -> float:
        """Return when it is due after `now`, in step with `due`."""
        return due + self.seconds * max(0, math.floor((now - due) / self.seconds) + 1)


_CRON_FIELDS = (("minute", 0, 59, ""), ("hour", 0, 23, ""), ("day of month", 1, 31, ""),
                ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
                ("day of week", 0, 7, "sun mon tue wed thu fri sat"))
_CRON_WORDS = {"@yearly": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
               "@daily": "0 0 * * *", "@hourly": "0 * * * *"}


def _cron_values(text: str, name: str, least: int, most: int, words: str) -> set[int]:
    for number, word in enumerate(words.split(), least):
        text = text.replace(word, str(number))
    values: set[int] = set()
    try:
        for part in text.split(","):
            span, slash, step = part.partition("/")
            low, dash, high = (f"{least}-{most}" if span == "*" else span).partition("-")
            first = int(low)
            last = int(high) if dash else first
            if slash and not dash:
                last = most
            if not least <= first <= last <= most:
                raise ValueError
            values.update(range(first, last + 1)[::int(step) if slash else 1])
        return values
    except ValueError:
        raise ValueError(f"the {name} of a cron schedule is {least} to {most}, *, a range that "
                         "goes up, or a list of these, perhaps with a step of 1 or more; got "
                         f"{text!r}") from None


class Cron:
    """A schedule of five cron fields, in a zone; None: the machine's own."""

    def __init__(self, fields: str, zone: Any = None) -> None:
        texts = fields.lower().split()
        if len(texts) != 5:
            raise ValueError("a cron schedule has five fields (minute hour day month weekday), "
                             f"got {fields!r}")
        self._zone = zone
        self._minutes, self._hours, self._days, self._months, weekdays = (
            _cron_values(text, *field) for text, field in zip(texts, _CRON_FIELDS))
        self._weekdays = {day or 7 for day in weekdays}
        # A day field that begins with * is not restricted.
        self._combined = all if "*" in texts[2][0] + texts[4][0] else any
        self._folds = (0, 1) if len(self._hours) == 24 else (0,)  # of an hour that comes twice

    def next(self, due: float, now: float) -> float:
        """Return when it is due after `now` and `due`. Raises ValueError if it never is."""
        return min(self._next(max(due, now), fold) for fold in self._folds)

    def _next(self, after: float, fold: int) -> float:
        """Return the first time, in the first or second pass (fold) of repeated hours."""
        import datetime
        # No clock goes back further than 3 hours at once.
        hour = datetime.datetime.fromtimestamp(after - 3 * 3_600, self._zone)
        hour = hour.replace(minute=0, second=0, microsecond=0)
        last = hour + datetime.timedelta(days=366 * 41)  # 29 February, a Monday: in 40 years
        while hour < last:
            day_fits = hour.day in self._days, hour.isoweekday() in self._weekdays
            if hour.month not in self._months or not self._combined(day_fits):
                hour = hour.replace(hour=0) + datetime.timedelta(days=1)
                continue
            if hour.hour in self._hours:
                times = (hour.replace(minute=minute, fold=fold).timestamp()
                         for minute in self._minutes)
                later = [at for at in times if at > after]
                if later:
                    return min(later)
            hour += datetime.timedelta(hours=1)  # on the clock's face
        raise ValueError("the cron schedule is never due")


@functools.lru_cache(1_000)
def schedule_of(schedule: str, zone: str | None) -> Every | Cron:
    """Return the schedule of a text like "15m" or five cron fields. Raises ValueError."""
    fields = _CRON_WORDS.get(schedule, schedule)
    if len(fields.split()) > 1:
        return Cron(fields, zone_of(zone))
    seconds = seconds_of(schedule) or 0.0
    if not 0.01 <= seconds < 1e9:
        raise ValueError('a schedule is seconds, at least 0.01, a text like "15m" or five cron '
                         f"fields, got {schedule!r}")
    return Every(seconds)


# ---- 5 Fair shares ---------------------------------------
#
# Start-time fair queueing (Goyal, Vin and Cheng, 1996) over roots. A root's virtual time: the
# microseconds that its tree has run. The next slot goes to the ready root with the least, which is
# the start tag of the claim and the queue's virtual time. A root that becomes ready has at least
# that: idling earns no credit. A claim charges an estimate; the attempt's end corrects it.

def fair_order(roots: Iterable[tuple[int, int, Iterator[Any]]],
               charge: Callable[[Any], int | None]) -> Iterator[tuple[int, Any, int, int]]:
    """Yield (root, job, start tag, charge) in the order in which jobs get slots.

    roots: (virtual time, root id, its ready jobs). charge: microseconds, None passes a job over.
    """
    heads = [(tag, root, job, waiting) for tag, root, waiting in roots
             for job in itertools.islice(waiting, 1)]
    heapq.heapify(heads)
    while heads:
        tag, root, job, waiting = heapq.heappop(heads)
        cost = charge(job)
        if cost is not None:
            yield root, job, tag, cost
        job = next(waiting, None)
        if job is not None:
            heapq.heappush(heads, (tag + (cost or 0), root, job, waiting))


UNKNOWN_COST = 0.010  # seconds, for the first run of a function
AHEAD_SECONDS = 0.010  # of short jobs for each worker are claimed before it is free
AHEAD_LIMIT = 256  # jobs claimed so in a process
_OVERHEAD = 50e-6  # seconds of a job besides its function


class RunTimes:
    """The mean run time of each function in seconds, an exponential average."""

    def __init__(self, means: dict[str, float] | None = None) -> None:
        self.means = means or {}
        self._changed: set[str] = set()

    def record(self, name: str, seconds: float) -> None:
        mean = self.means.get(name, seconds)
        self.means[name] = mean + (seconds - mean) / 5
        self._changed.add(name)

    def take_changed(self) -> list[tuple[str, float]]:
        """Return each (name, mean) that has changed since the last call."""
        changed, self._changed = self._changed, set()
        return [(name, self.means[name]) for name in changed]

    def charge(self, name: str) -> int:
        """Return the microseconds to charge for a claim."""
        return max(1, int(self.means.get(name, UNKNOWN_COST) * 1e6))

    def occupies(self, name: str) -> float:
        """Return the seconds that an attempt keeps a worker, infinite if unknown."""
        return self.means.get(name, math.inf) + _OVERHEAD


class Pace:
    """How fast an attempt goes: `gained` units in `seconds`.

    Both fade over three quarters of its run time, so that an early hiccup is forgotten.
    """

    def __init__(self, resumed: bool) -> None:
        # The first report of a resumed attempt is fewer: it counts work of earlier attempts.
        self._done = math.inf if resumed else 0.0
        self._at = self._gained = self._seconds = 0.0

    def seconds_left(self, done: float, total: float, at: float) -> float | None:
        """Take in a report, `at` seconds after the begin; return the seconds left, if known."""
        if done < self._done or at < 0.1:  # too early: done before the attempt
            self._done, self._at, self._gained, self._seconds = done, at, 0.0, 0.0
        elif done > self._done and at > self._at:
            elapsed = at - self._at
            kept = math.exp(-elapsed / max(at * 0.75, 1.0))
            self._gained = self._gained * kept + done - self._done
            self._seconds = self._seconds * kept + elapsed
            self._done, self._at = done, at
        if self._gained <= 0:
            return None
        behind = at - self._at  # since the last report of more units
        return max(0.0, (total - done) * self._seconds / self._gained - behind)


# ---- 6 Tables --------------------------------------------
#
# A `pending` job is ready (`queue` is its lane, 0 normal or 1 low priority), or it waits for its
# time (`run_at`), or it is blocked. Then `parked` names what it waits for: a process that knows its
# function ("function NAME"), an executor ("executor NAME"), the end of another job of its name
# ("limit NAME"), or of another job that may take its process down ("suspect").
#
# `lane` of a root is the best queue in its tree, NULL if nothing there is ready: (lane, vtime)
# finds the next root, (root_id, queue, id) its oldest ready child. `owner` is the runner that
# executes the job, NULL once its function has returned. total, done, failed and running count
# descendants; `open` counts direct children that are not over.

TABLES = (
    "CREATE TABLE bgjobs_schema (version INTEGER NOT NULL)",
    # returned: 1 once the function has returned, 2 once it has raised for good. charge:
    # microseconds that the attempt has added to its root's vtime. since: active since then.
    # duration: seconds active before. ends_at: expected. own_errors: failed attempts. deaths: of
    # processes that executed it.
    """CREATE TABLE bgjobs_jobs (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, attempt INTEGER DEFAULT 0,
        parent_id INTEGER, root_id INTEGER, queue INTEGER, lane INTEGER, vtime INTEGER DEFAULT 0,
        charge INTEGER DEFAULT 0, owner INTEGER, submitter INTEGER, returned INTEGER DEFAULT 0,
        deaths INTEGER DEFAULT 0, own_errors INTEGER DEFAULT 0, open INTEGER DEFAULT 0,
        total INTEGER DEFAULT 0, done INTEGER DEFAULT 0, failed INTEGER DEFAULT 0,
        running INTEGER DEFAULT 0, low_priority INTEGER DEFAULT 0, system INTEGER DEFAULT 0,
        created_at REAL NOT NULL, run_at REAL, started_at REAL, waited REAL, finished_at REAL,
        since REAL, duration REAL DEFAULT 0, progress REAL, ends_at REAL,
        tree_progress REAL DEFAULT 0, phase TEXT, parked TEXT, max_running INTEGER, label TEXT,
        run_by TEXT, key TEXT, options TEXT, message TEXT, args TEXT, kwargs TEXT, state TEXT,
        positions TEXT, result TEXT, error TEXT)""",
    """CREATE TABLE bgjobs_logs (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL,
        at REAL NOT NULL, level INTEGER NOT NULL, message TEXT NOT NULL)""",
    # For people: all attempts but the one that ended the job.
    """CREATE TABLE bgjobs_attempts (
        job_id INTEGER NOT NULL, number INTEGER NOT NULL, started_at REAL, ended_at REAL NOT NULL,
        outcome TEXT NOT NULL, error TEXT, PRIMARY KEY (job_id, number)) WITHOUT ROWID""",
    # One row. vtime: the queue's virtual time. last_id: the highest id ever removed. counted_id:
    # creations up to it are in the statistics. token: of the status page.
    """CREATE TABLE bgjobs_clock (vtime INTEGER DEFAULT 0, last_id INTEGER DEFAULT 0,
        counted_id INTEGER DEFAULT 0, token TEXT)""",
    """CREATE TABLE bgjobs_runners (
        id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, host TEXT NOT NULL,
        workers INTEGER NOT NULL, started_at REAL NOT NULL, heartbeat_at REAL NOT NULL,
        abandoned INTEGER DEFAULT 0)""",
    "CREATE TABLE bgjobs_functions (name TEXT PRIMARY KEY, seconds REAL) WITHOUT ROWID",
    """CREATE TABLE bgjobs_schedules (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, schedule TEXT NOT NULL, zone TEXT,
        name TEXT NOT NULL, args TEXT, kwargs TEXT, options TEXT, label TEXT, run_by TEXT,
        low_priority INTEGER NOT NULL, system INTEGER NOT NULL, max_running INTEGER,
        created_at REAL NOT NULL, next_at REAL NOT NULL, last_at REAL, job_id INTEGER,
        runs INTEGER DEFAULT 0, skipped INTEGER DEFAULT 0, paused INTEGER DEFAULT 0)""",
    # The schedules in the code of each living runner.
    """CREATE TABLE bgjobs_registered (schedule_id INTEGER NOT NULL, runner_id INTEGER NOT NULL,
        PRIMARY KEY (schedule_id, runner_id)) WITHOUT ROWID""",
    # minute: of Unix time; the first of an hour that is summed up; 0 for all older ones.
    """CREATE TABLE bgjobs_stats (minute INTEGER NOT NULL, name TEXT NOT NULL,
        created INTEGER NOT NULL, started INTEGER NOT NULL, finished INTEGER NOT NULL,
        failed INTEGER NOT NULL, waiting REAL NOT NULL, waiting_min REAL, waiting_max REAL,
        running REAL NOT NULL, running_min REAL, running_max REAL,
        PRIMARY KEY (minute, name)) WITHOUT ROWID""",
)

INDEXES = (
    "CREATE INDEX bgjobs_ready_roots ON bgjobs_jobs(lane, vtime) WHERE lane IS NOT NULL",
    """CREATE INDEX bgjobs_ready_children ON bgjobs_jobs(root_id, queue)
        WHERE parent_id IS NOT NULL AND queue IS NOT NULL""",
    # system and parent_id: lists are counted and ordered by this index alone.
    """CREATE INDEX bgjobs_begun ON bgjobs_jobs(status, system, parent_id)
        WHERE status <> 'pending'""",
    "CREATE INDEX bgjobs_children ON bgjobs_jobs(parent_id) WHERE parent_id IS NOT NULL",
    """CREATE INDEX bgjobs_due ON bgjobs_jobs(run_at)
        WHERE run_at IS NOT NULL AND queue IS NULL AND status = 'pending'""",
    "CREATE INDEX bgjobs_parked ON bgjobs_jobs(parked, root_id) WHERE parked IS NOT NULL",
    """CREATE INDEX bgjobs_limited ON bgjobs_jobs(name)
        WHERE max_running IS NOT NULL AND owner IS NOT NULL""",
    "CREATE INDEX bgjobs_suspects ON bgjobs_jobs(deaths) WHERE deaths > 0",
    """CREATE UNIQUE INDEX bgjobs_root_key ON bgjobs_jobs(key) WHERE key IS NOT NULL
        AND parent_id IS NULL AND status IN ('pending', 'running', 'stopping', 'stopped')""",
    """CREATE UNIQUE INDEX bgjobs_child_key ON bgjobs_jobs(parent_id, key)
        WHERE key IS NOT NULL AND parent_id IS NOT NULL""",
    "CREATE INDEX bgjobs_logs_of_job ON bgjobs_logs(job_id)",
)

# What makes a file of this version from a new one (0) or an older version. A change of the schema
# is made above and appended here. Unused columns stay.
SCHEMA_VERSION = 3
MIGRATIONS: dict[int, tuple[str, ...]] = {
    0: (*TABLES, *INDEXES, f"INSERT INTO bgjobs_schema VALUES ({SCHEMA_VERSION})",
        "INSERT INTO bgjobs_clock DEFAULT VALUES"),
    # 1.0.0. Its runners are gone (see `JobFile`); jobs of a runner without a row are taken back.
    2: ("ALTER TABLE bgjobs_jobs ADD COLUMN ends_at REAL",
        "UPDATE bgjobs_jobs SET status = 'running' WHERE status = 'stopping' AND goes_on = 1",
        "DELETE FROM bgjobs_runners", "DELETE FROM bgjobs_registered"),
}


class JobRow(NamedTuple):
    """A job as transactions see it: columns of bgjobs_jobs."""

    id: int
    parent_id: int | None
    root_id: int | None  # None for a root
    name: str
    status: str
    attempt: int  # number of the newest
    options: str | None
    key: str | None
    system: int
    low_priority: int
    max_running: int | None
    deaths: int
    queue: int | None
    vtime: int  # microseconds
    created_at: float
    run_at: float | None
    started_at: float | None  # the first attempt since creation or restart
    duration: float
    progress: float | None  # its own
    total: int
    # What the function needs, as JSON, perhaps large: read by claims alone.
    args: str | None
    kwargs: str | None
    state: str | None
    positions: str | None
    run_by: str | None
    # Claims do not read on.
    owner: int | None
    returned: int
    parked: str | None
    charge: int
    since: float | None
    own_errors: int
    open: int
    done: int
    failed: int
    running: int
    tree_progress: float  # the sum over its descendants

    @property
    def root(self) -> int:
        return self.root_id or self.id

    @property
    def executes(self) -> bool:
        return self.status in ACTIVE and not self.returned

    @property
    def limits(self) -> dict[str, int]:
        """The limits that it counts for: {as in `parked`: how many may run}."""
        limits = {} if self.max_running is None else {f"limit {self.name}": self.max_running}
        return limits if self.deaths < SUSPECT else {**limits, "suspect": 1}


_CLAIMED = ", ".join(JobRow._fields[:25])
_JOB = ", ".join((*JobRow._fields[:20], *["NULL"] * 5, *JobRow._fields[25:]))
to_job = functools.partial(tuple.__new__, JobRow)  # as JobRow._make, but quick; takes short rows
_FIND = f"SELECT {_JOB} FROM bgjobs_jobs WHERE"
TREE_ROW = f"{_FIND} id = :id"
NEXT_ID = """SELECT max((SELECT last_id FROM bgjobs_clock),
    ifnull((SELECT max(id) FROM bgjobs_jobs), 0)) + 1"""


# ---- 7 Transactions --------------------------------------
#
# Writes change jobs and add up what that means for ancestors and roots. Code that decides by
# counts, lanes or virtual times calls `apply` first. BEGIN IMMEDIATE keeps other writers out: a
# status that was checked needs no second check in the UPDATE.

SUSPECT = 2  # crashes after which a job runs beside no other suspect
DEATHS = 3  # crashes after which it is failed
HEARTBEAT_SECONDS = 15  # for people; `Presence` tells the dead from the living
PARKED_A_CLAIM = 200  # jobs that one claim may block; then others may write
ATTEMPTS_A_JOB = 100  # kept for people


class Submission:
    """The columns of a new job, and the attempt that submits it."""

    args: str | None = None
    kwargs: str | None = None
    options: str | None = None
    label: str | None = None
    run_by: str | None = None  # None: the parent's; so the next one
    low_priority: int | None = None
    system = 0
    key: str | None = None
    run_at: float | None = None
    max_running: int | None = None
    submitter: int | None = None  # the runner
    parent_id: int | None = None
    author: tuple[int, int] | None = None  # job and attempt that submit it
    created_at: float | None = None  # once it is stored

    def __init__(self, name: str, **columns: Any) -> None:
        self.name = name
        if columns:
            vars(self).update(columns)


def kept_options(text: str | None) -> Fields:
    options: Fields = json.loads(text) if text else {}
    return options


def dump_error(type: str, text: str, trace: str) -> str:
    return json.dumps({"type": text_of(type), "text": text_of(text),
                       "traceback": text_of(trace, 64 * 1024)})


def status_after(job: JobRow, returned: int | None, halts: bool = False) -> str:
    """Return the status after an attempt; returned: None if the function is called again."""
    if returned and job.open == 0:
        return FINISHED if returned == 1 else FAILED
    if job.status == STOPPING or halts:
        return STOPPED
    return RUNNING if returned else PENDING


def contribution(status: str, progress: float | None) -> Fields:
    """Return what a job adds to the counts of its ancestors."""
    over = status in OVER
    return {"open": not over, "done": over, "failed": status == FAILED, "running": status in ACTIVE,
            "progress": 1.0 if over else progress or 0.0}


SAVE_TALLIES = """INSERT INTO bgjobs_stats VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (minute, name) DO UPDATE SET
    created = created + excluded.created, started = started + excluded.started,
    finished = finished + excluded.finished, failed = failed + excluded.failed,
    waiting = waiting + excluded.waiting, running = running + excluded.running""" + "".join(
    f", {name} = coalesce({name[-3:]}({name}, excluded.{name}), {name}, excluded.{name})"
    for name in ("waiting_min", "waiting_max", "running_min", "running_max"))

_NO_CHANGE: dict[str, float] = dict.fromkeys(
    ("open", "total", "done", "failed", "running", "progress", "charge"), 0)


# A new root starts at the queue's virtual time. The JSON array of INSERT_MANY is five times as
# quick as a statement for each job.
_SUBMITTED = """id, vtime, parent_id, root_id, max_running, lane, name, status, queue, created_at,
    run_at, submitter, low_priority, system, label, run_by, options, key, args, kwargs"""
_VALUES = "(SELECT vtime FROM bgjobs_clock), {}, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?"
_INSERT = f"INSERT INTO bgjobs_jobs ({_SUBMITTED}) VALUES (({NEXT_ID}), {_VALUES}, ?, ?, ?)"
_INSERT_MANY = f"""INSERT INTO bgjobs_jobs ({_SUBMITTED})
    SELECT ? + key, {_VALUES}, NULL, value, NULL FROM json_each(?)"""
# Whether the three are NULL -> statement. If it says so, SQLite leaves out four indexes: a sixth.
INSERT, INSERT_MANY = ({True: sql.format("NULL, NULL, NULL"), False: sql.format("?, ?, ?")}
                       for sql in (_INSERT, _INSERT_MANY))
ROOT_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE key = :key AND key IS NOT NULL
    AND parent_id IS NULL AND status IN ('pending', 'running', 'stopping', 'stopped')"""
CHILD_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE parent_id = :parent AND key = :key
    AND key IS NOT NULL AND parent_id IS NOT NULL"""

# The end of a first attempt that returned and has no children.
FINISH = """UPDATE bgjobs_jobs SET status = 'finished', returned = 1, finished_at = ?,
    duration = duration + ?, result = ?, vtime = vtime + ?, charge = 0, owner = NULL, since = NULL
    WHERE id = ? AND attempt = ? AND open = 0 AND status IN ('running', 'stopping')"""
# The lane of a root; also its virtual time if it becomes ready (section 5).
_BEST_LANE = """(SELECT min(queue) FROM (SELECT queue FROM bgjobs_jobs WHERE id = :id UNION ALL
    SELECT min(queue) FROM bgjobs_jobs
    WHERE root_id = :id AND parent_id IS NOT NULL AND queue IS NOT NULL))"""
ADD_CHANGE = f"""UPDATE bgjobs_jobs SET open = open + :open, total = total + :total,
    done = done + :done, failed = failed + :failed, running = running + :running,
    tree_progress = tree_progress + :progress,
    lane = CASE WHEN parent_id IS NULL THEN {_BEST_LANE} END,
    vtime = CASE WHEN parent_id IS NULL AND lane IS NULL AND {_BEST_LANE} IS NOT NULL
        THEN max(vtime + :charge, (SELECT vtime FROM bgjobs_clock)) ELSE vtime + :charge END
    WHERE id = :id"""
CLOSED = f"""{_FIND} id IN (SELECT value FROM json_each(:ids)) AND open = 0
    AND returned > 0 AND status IN ('running', 'stopped')"""


_LINE = """line(id) AS (SELECT :parent UNION ALL
    SELECT parent_id FROM line JOIN bgjobs_jobs j USING (id) WHERE parent_id > 0)"""
# Whether a child of :parent may start: below a member, or if fewer outermost members run.
HAS_ROOM = {kind: f"""WITH RECURSIVE
    member(id, up) AS (SELECT id, parent_id FROM bgjobs_jobs WHERE owner IS NOT NULL AND {which}),
    above(member, id) AS (SELECT id, up FROM member WHERE up IS NOT NULL UNION ALL
        SELECT member, parent_id FROM above JOIN bgjobs_jobs j USING (id) WHERE parent_id > 0),
    {_LINE}
    SELECT (SELECT count(*) FROM member) < :limit + (SELECT count(DISTINCT above.member) FROM above
        WHERE id IN (SELECT id FROM member))
    OR EXISTS (SELECT 1 FROM line WHERE id IN (SELECT id FROM member))""" for kind, which in (
        ("limit", "name = :name AND max_running IS NOT NULL"),
        ("suspect", "deaths >= 2 AND deaths > 0"))}
OLDEST_BLOCKED = f"""{_FIND} id IN (
    (SELECT id FROM bgjobs_jobs WHERE parked = :key AND root_id IS NULL ORDER BY id LIMIT 1),
    (SELECT id FROM bgjobs_jobs WHERE parked = :key AND root_id > 0 ORDER BY root_id, id LIMIT 1))
    ORDER BY ifnull(root_id, id), id LIMIT 1"""


class Transaction:
    """What a write may do between BEGIN IMMEDIATE and COMMIT."""

    def __init__(self, db: Any, lineages: dict[int, tuple[int, ...]], now: float) -> None:
        self.execute, self.executemany, self.now = db.execute, db.executemany, now
        self._lineages = lineages  # parent -> it and its ancestors
        self._changes: defaultdict[int, dict[str, float]] = defaultdict(_NO_CHANGE.copy)
        self.freed: set[str] = set()  # limits whose members have ended
        # (function, "started", FINISHED or FAILED) -> seconds waited, or run
        self.events: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.over: list[int] = []  # jobs that became over, or are gone
        self.after_commit: list[Callable[[], object]] = []

    def value(self, sql: str, **parameters: Any) -> Any:
        """Return the first value of a query, or None."""
        return next(self.execute(sql, parameters), (None,))[0]

    def jobs(self, sql: str, **parameters: Any) -> list[JobRow]:
        """Return the jobs that a query finds."""
        return list(map(to_job, self.execute(sql, parameters)))

    def executing(self, attempt: Attempt) -> JobRow | None:
        """Return the job of an attempt, None if that has ended or has been superseded."""
        # The owner counts, too: the number of a claim that was given back is used again.
        for job in self.jobs(TREE_ROW, id=attempt.id):
            if job.executes and (job.attempt, job.owner) == (attempt.number, attempt.owner):
                return job
        return None

    _LINEAGE = f"WITH RECURSIVE {_LINE} SELECT id FROM line"

    def lineage(self, parent_id: int | None) -> tuple[int, ...]:
        """Return the ids from a parent up to its root."""
        if parent_id is None:
            return ()
        if parent_id not in self._lineages:
            if len(self._lineages) > 10_000:
                self._lineages.clear()
            rows = self.execute(self._LINEAGE, {"parent": parent_id})
            self._lineages[parent_id] = tuple(job_id for job_id, in rows)
        return self._lineages[parent_id]

    # ancestors and roots

    def change(self, job_id: int, name: str = "open", value: float = 0) -> None:
        """Add to a column of a job; without one, look at its lane and its end."""
        self._changes[job_id][name] += value

    def count(self, parent_id: int | None, open: int = 0, **changes: float) -> None:
        """Add to the counts of a job's ancestors; `open` is the parent's alone."""
        for ancestor in self.lineage(parent_id):
            change = self._changes[ancestor]
            if ancestor == parent_id:
                change["open"] += open
            for name, value in changes.items():
                change[name] += value

    def apply(self) -> None:
        """Write what is added up, unblock jobs, close parents, until nothing changes."""
        while self._changes or self.freed:
            freed, self.freed = self.freed, set()
            for key in freed:
                unblock(self, key)
            changes, self._changes = self._changes, defaultdict(_NO_CHANGE.copy)
            for job_id, change in changes.items():
                self.execute(ADD_CHANGE, {**change, "id": job_id})
            for job in self.jobs(CLOSED, ids=json.dumps([*changes])):
                self.move(job, FINISHED if job.returned == 1 else FAILED)

    # submit

    def submit(self, new: Submission) -> int:
        """Store a job; return its id, or that of the job which has its key."""
        plain, values = self._admit(new)
        if new.key is not None:
            sql = ROOT_WITH_KEY if new.parent_id is None else CHILD_WITH_KEY
            holder = self.value(sql, key=new.key, parent=new.parent_id)
            if holder is not None:
                return int(holder)
        inserted = self.execute(INSERT[plain], (*values, new.key, new.args, new.kwargs))
        new.created_at = self.now
        if new.parent_id is not None:
            self.count(new.parent_id, open=1, total=1)
        job_id: int = inserted.lastrowid
        return job_id

    def submit_many(self, new: Submission, arguments: list[str | None]) -> range:
        (plain, values), count = self._admit(new), len(arguments)
        first: int = self.value(NEXT_ID)
        self.execute(INSERT_MANY[plain], (first, *values, json.dumps(arguments)))
        self.count(new.parent_id, open=count, total=count)
        return range(first, first + count)

    _PARENT = """SELECT ifnull(status, 'removed'), ifnull(root_id, id), ifnull(:low, low_priority),
        ifnull(:run_by, run_by), options FROM (SELECT :id AS id) LEFT JOIN bgjobs_jobs USING (id)"""

    def _admit(self, new: Submission) -> tuple[bool, tuple[Any, ...]]:
        """Return which INSERT, and its values; raise if the parent may have no children."""
        if new.author is not None:
            self.check_author(new.author)
        parent, root_id, low, run_by = new.parent_id, None, new.low_priority or 0, new.run_by
        if parent is not None:
            status, root_id, low, run_by, options = self.execute(self._PARENT, {
                "id": parent, "low": new.low_priority, "run_by": run_by}).fetchone()
            by_itself = new.author is not None and new.author[0] == parent
            if by_itself and status == STOPPING and kept_options(options).get("stoppable", True):
                raise JobStopped(f"job {parent} was asked to stop")
            if status not in (ACTIVE if by_itself else (PENDING, RUNNING)):
                raise InvalidOperation(f"job {parent} is {status}; it takes no children")
        queue = None if (new.run_at or 0.0) > self.now else low
        place = parent, root_id, new.max_running
        values = (queue if parent is None else None, new.name, queue, self.now, new.run_at,
                  new.submitter, low, new.system, new.label, run_by, new.options)
        return (True, values) if place == (None, None, None) else (False, place + values)

    _IS_AUTHOR = """SELECT 1 FROM bgjobs_jobs WHERE id = :id AND attempt = :attempt
        AND status IN ('running', 'stopping')"""

    def check_author(self, author: tuple[int, int]) -> None:
        """Raise JobStopped if this attempt has been superseded."""
        if self.value(self._IS_AUTHOR, id=author[0], attempt=author[1]) is None:
            raise JobStopped(f"attempt {author[1]} of job {author[0]} has been superseded")

    # the end of attempts

    _HAS_FINISHED = """SELECT 1 FROM bgjobs_jobs WHERE id = :id AND attempt = :attempt
        AND status = 'finished' AND finished_at = :now"""

    def finish(self, attempts: list[Attempt]) -> None:
        """Record the outcomes of attempts that have not been superseded."""
        self.apply()  # new children count
        plain = [attempt for attempt in attempts if attempt.is_plain]
        rows = [(self.now, a.ran, a.result, a.correction if a.parent_id is None else 0, a.id,
                 a.number) for a in plain]
        # Some may have been superseded, or got a child from outside.
        if self.executemany(FINISH, rows).rowcount < len(plain):
            plain = [a for a in plain
                     if self.value(self._HAS_FINISHED, id=a.id, attempt=a.number, now=self.now)]
        for attempt in plain:
            job = attempt.job
            self.over.append(job.id)
            self.freed.update(job.limits)
            if not job.system:
                self.events[job.name, FINISHED].append(job.duration + attempt.ran)
            if job.parent_id is not None:
                self.count(job.parent_id, open=-1, done=1, running=-1, progress=1.0)
                self.change(job.root, "charge", attempt.correction)
        recorded = set(plain)
        for attempt in attempts:
            if attempt not in recorded:
                self.end(attempt)

    def end(self, attempt: Attempt) -> bool:
        """Record any outcome; return False if superseded."""
        self.apply()  # counts decide
        if attempt.unsaved_progress is not None:
            self.report(attempt, attempt.unsaved_progress, None)
        job = self.executing(attempt)
        if job is None:
            return False
        outcome = attempt.outcome
        error = attempt.error if outcome == RAISED else None
        retries = error is not None and job.own_errors < attempt.options.get("retries", 0)
        returned = None if retries else {RETURNED: 1, RAISED: 2}.get(outcome)
        # If a resume has taken back the stop that it was asked for, it runs on.
        halts = outcome == HALTED and not attempt.was_asked_to_stop
        status = status_after(job, returned, halts)
        unspent = outcome in (UNSPENT, *WAITS_FOR)
        shown = ""
        if not unspent and (attempt.number > 1 or not returned):
            timed_out = error is not None and attempt.reason == TIMED_OUT
            shown = TIMED_OUT if timed_out else OUTCOMES[outcome]
        self.end_attempt(
            job, status, shown, attempt.ran, attempt.worked, phase=PHASES.get(outcome),
            parked=WAITS_FOR[outcome] + job.name if outcome in WAITS_FOR else None,
            run_at=self._retry_at(attempt, job.own_errors + 1, status) if retries else None,
            returned=returned, result=attempt.result, error=error,
            positions=attempt.unsaved_positions(), unspent=unspent)
        return True

    def _retry_at(self, attempt: Attempt, failures: int, status: str) -> float:
        pause = pause_before_retry(attempt.options, failures)
        when = f"in {pause:,.1f} s" if status == PENDING else "when it is resumed"
        self.log(attempt.id, logging.WARNING, f"attempt {attempt.number} failed; retry {failures} "
                 f"of {attempt.options['retries']} {when}")
        return self.now + pause

    _KEEP_ATTEMPT = """INSERT OR IGNORE INTO bgjobs_attempts SELECT id, attempt, since, :now,
        :outcome, substr(json_extract(:error, '$.type') || ': ' || json_extract(:error, '$.text'),
        1, 500) FROM bgjobs_jobs WHERE id = :id"""
    _TRIM_ATTEMPTS = "DELETE FROM bgjobs_attempts WHERE job_id = ? AND number <= ?"

    def end_attempt(self, job: JobRow, status: str, outcome: str, ran: float, worked: float,
                    **left: Any) -> None:
        """Move the job of an attempt that ends; its outcome is kept for people, if not empty."""
        if outcome:
            self.execute(self._KEEP_ATTEMPT, {
                "id": job.id, "now": self.now, "outcome": outcome, "error": left.get("error")})
            self.execute(self._TRIM_ATTEMPTS, (job.id, job.attempt - ATTEMPTS_A_JOB))
        self.change(job.root, "charge", int(worked * 1e6) - job.charge)
        self.freed.update(job.limits)
        self.move(job, status, ran, **left)

    _MOVE = """UPDATE bgjobs_jobs SET status = :status,
        queue = CASE WHEN :ready THEN low_priority END,
        parked = CASE WHEN :status = 'pending' THEN :parked END,
        phase = CASE WHEN :status = 'pending' THEN :phase END,
        run_at = CASE WHEN :status = 'pending' THEN ifnull(:run_at, run_at) ELSE run_at END,
        finished_at = CASE WHEN :over THEN :now END,
        started_at = CASE WHEN :unspent AND started_at = since THEN NULL ELSE started_at END,
        since = CASE WHEN :executes THEN since WHEN :status = 'running' THEN :now END,
        duration = duration + :ran, attempt = attempt - ifnull(:unspent, 0),
        charge = CASE WHEN :executes THEN charge ELSE 0 END,
        owner = CASE WHEN :executes THEN owner END, returned = ifnull(:returned, returned),
        result = ifnull(:result, result), error = ifnull(:error, error),
        own_errors = own_errors + (:error IS NOT NULL), positions = ifnull(:positions, positions)
        WHERE id = :id"""

    def move(self, job: JobRow, status: str, ran: float | None = None, **left: Any) -> None:
        """Change a job's status, and add up what that means for others.

        ran: seconds active, None: until now. left: `returned`, `result`, `error`, `positions`;
        `unspent` if the attempt does not count; `run_at`, `parked`, `phase` of a pending job.
        """
        given: defaultdict[str, Any] = defaultdict(lambda: None, left)
        # The attempt runs on: a stop, or a resume that takes it back.
        executes = job.executes and status in ACTIVE and not given["returned"]
        if ran is None:
            ran = max(0.0, self.now - job.since) if job.since and not executes else 0.0
        is_early = (job.run_at or 0.0) > self.now and job.started_at is None
        ready = status == PENDING and not (given["run_at"] or given["parked"] or is_early)
        given.update(id=job.id, status=status, ready=ready, executes=executes, ran=ran,
                     over=status in OVER, now=self.now)
        self.execute(self._MOVE, given)
        if status in OVER:
            self.over.append(job.id)
        if status in (FINISHED, FAILED) and not job.system:
            self.events[job.name, status].append(job.duration + ran)
        before, after = (contribution(each, job.progress) for each in (job.status, status))
        self.count(job.parent_id, **{name: after[name] - before[name] for name in after})
        if ready or job.queue is not None:
            self.change(job.root)
        if (job.returned or given["returned"]) and status not in OVER:
            self.change(job.id)  # its last child may be over

    _MAKE_READY = """UPDATE bgjobs_jobs SET queue = low_priority, parked = NULL, phase = NULL
        WHERE id = :id"""

    def make_ready(self, jobs: list[JobRow]) -> bool:
        """Make jobs ready; return whether there were any."""
        for job in jobs:
            self.execute(self._MAKE_READY, {"id": job.id})
            self.change(job.root)
        return bool(jobs)

    # statistics

    # For statistics and before rows are deleted: a submit pays nothing.
    UNCOUNTED = """SELECT CAST(created_at / 60 AS INTEGER), name, count(*), 0, 0, 0,
        0.0, NULL, NULL, 0.0, NULL, NULL FROM bgjobs_jobs
        WHERE id > (SELECT counted_id FROM bgjobs_clock) AND system = 0 GROUP BY 1, 2"""
    _NOTE_COUNTED = """UPDATE bgjobs_clock SET counted_id =
        max(counted_id, (SELECT ifnull(max(id), 0) FROM bgjobs_jobs))"""

    def count_created(self) -> None:
        self.executemany(SAVE_TALLIES, self.execute(self.UNCOUNTED).fetchall())
        self.execute(self._NOTE_COUNTED)

    def end_all(self) -> None:
        """Write what is added up, last in a transaction."""
        self.apply()
        for (name, event), seconds in self.events.items():
            counts = [len(seconds) * (event == each) for each in ("started", FINISHED, FAILED)]
            times = [sum(seconds), min(seconds), max(seconds), 0.0, None, None]
            if event != "started":
                times = times[3:] + times[:3]
            self.execute(SAVE_TALLIES, (self.now // 60, name, 0, *counts, *times))

    # reports of attempts

    _INSERT_LOG = "INSERT INTO bgjobs_logs (job_id, at, level, message) VALUES (?, ?, ?, ?)"

    def log(self, job_id: int, level: int, message: str) -> None:
        self.execute(self._INSERT_LOG, (job_id, self.now, level, text_of(message)))

    _SAVE_STATE = """UPDATE bgjobs_jobs SET state = ifnull(:state, state),
        positions = ifnull(:positions, positions) WHERE id = :id AND attempt = :attempt
        AND returned = 0 AND status IN ('running', 'stopping')"""

    def save_state(self, attempt: Attempt, state: str | None, positions: str | None) -> bool:
        """Store an attempt's state. Return False if the attempt has been superseded."""
        return bool(self.execute(self._SAVE_STATE, {
            "id": attempt.id, "attempt": attempt.number, "state": state,
            "positions": positions}).rowcount)

    _REPORT = """UPDATE bgjobs_jobs SET charge = :charge, progress = :progress,
        ends_at = CASE WHEN :reported THEN :now + :left ELSE ends_at END,
        message = CASE WHEN :reported THEN :message ELSE message END WHERE id = :id"""

    def report(self, attempt: Attempt, report: Any, charge: int | None) -> None:
        """Store progress and charge.

        report: progress, seconds left and message, each or all None. charge: microseconds, if the
        attempt has run longer than estimated.
        """
        job = self.executing(attempt)
        if job is None:
            return
        progress, left, message = report or (job.progress, None, None)
        charged = job.charge if charge is None else charge
        self.execute(self._REPORT, {
            "id": job.id, "charge": charged, "progress": progress, "now": self.now, "left": left,
            "message": message, "reported": report is not None})
        self.count(job.parent_id, progress=(progress or 0.0) - (job.progress or 0.0))
        self.change(job.root, "charge", charged - job.charge)
        attempt.has_reported = True
        self.after_commit.append(lambda: setattr(attempt, "charge", charged))


# Limits: max_running of a name, and one suspect at a time. A job is a member while its attempt
# executes. Its descendants neither count nor wait: it may wait for them. When a member ends, the
# oldest blocked jobs become ready.

def limit_without_room(tx: Transaction, job: JobRow, others: int = 0) -> str:
    """Return the limit that keeps a job from starting beside `others` more, or ""."""
    for key, limit in job.limits.items():
        if not tx.value(HAS_ROOM[key.partition(" ")[0]], name=job.name, parent=job.parent_id,
                        limit=limit - others):
            return key
    return ""


def unblock(tx: Transaction, key: str) -> None:
    """Make blocked jobs ready while a limit has room, the oldest first."""
    for others in itertools.count():
        jobs = tx.jobs(OLDEST_BLOCKED, key=key)
        if not jobs or limit_without_room(tx, jobs[0], others):
            return
        tx.make_ready(jobs)


# Claims.

class Room(NamedTuple):
    """What a runner has room for."""

    free: int  # slots
    low_free: int  # of them, for low priority
    ahead: int = 0  # short jobs beyond
    planned: float = 0.0  # seconds of work that wait already
    workers: int = 1  # free soon


READY_ROOTS = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE id IN
    (SELECT id FROM bgjobs_jobs WHERE lane = :lane ORDER BY vtime, id LIMIT :limit)"""
READY_CHILDREN = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE root_id = :root AND queue = :lane
    AND parent_id IS NOT NULL AND queue IS NOT NULL ORDER BY id"""
# For all jobs that are charged alike. A root without children gets its virtual time at once.
CLAIM = """UPDATE bgjobs_jobs SET status = 'running', attempt = attempt + 1, queue = NULL,
    phase = NULL, charge = :charge, owner = :owner, since = :now, ends_at = NULL,
    started_at = ifnull(started_at, :now), waited = CASE WHEN started_at IS NULL
    THEN max(0.0, :now - max(created_at, ifnull(run_at, 0))) ELSE waited END
    WHERE id IN (SELECT value FROM json_each(:ids))"""
CLAIM_SINGLE = CLAIM.replace("queue = NULL,", "queue = NULL, lane = NULL, vtime = vtime + :charge,")
_BLOCK = """UPDATE bgjobs_jobs SET queue = NULL, parked = :key,
    phase = CASE :key WHEN 'suspect' THEN 'interrupted' ELSE 'limit reached' END WHERE id = :id"""
BLOCKED_IN_TREE = f"{_FIND} parked = :key AND root_id = :root"
_ADVANCE_CLOCK = "UPDATE bgjobs_clock SET vtime = :tag WHERE vtime < :tag"


class Claims:
    """The jobs that a runner claims in one transaction, in fair order."""

    def __init__(self, tx: Transaction, owner: int, room: Room, run_times: RunTimes) -> None:
        self._tx, self._owner, self._room, self._run_times = tx, owner, room, run_times
        self.jobs: list[tuple[JobRow, int]] = []  # microseconds charged
        self.more_ready = False  # others are ready
        self._ids: defaultdict[tuple[str, int], list[int]] = defaultdict(list)  # to be written
        self._blocked = 0

    @property
    def cut_short(self) -> bool:
        """Whether the other jobs wait for the next claim."""
        return self._blocked >= PARKED_A_CLAIM

    def round(self) -> bool:
        """Claim jobs; return whether to look behind blocked ones."""
        free, blocked = self._room.free, self._blocked
        self._tx.apply()  # new and blocked jobs count
        self.more_ready = False
        self._claim_lane(0, free - len(self.jobs), self._room.ahead)
        low = sum(job.low_priority for job, _ in self.jobs)
        self._claim_lane(1, min(self._room.low_free - low, free - len(self.jobs)), 0)
        return len(self.jobs) < free and blocked < self._blocked and not self.cut_short

    def _claim_lane(self, lane: int, free: int, ahead: int) -> None:
        """Claim `free` jobs of one lane, and perhaps some ahead."""
        tx, run_times, limit = self._tx, self._run_times, max(0, free) + ahead
        roots = tx.jobs(READY_ROOTS, lane=lane, limit=limit) if limit else []
        self.more_ready |= 0 < len(roots) == limit
        trees = [(root.vtime, root.id,
                  self._ready_jobs(root, lane) if root.total else iter((root,)))
                 for root in roots]
        planned, budget = self._room.planned, AHEAD_SECONDS * self._room.workers
        taken = tag = 0
        for root_id, job, tag, charge in fair_order(trees, self._charge):
            if taken >= free:  # ahead: short jobs only
                planned += run_times.occupies(job.name)
                recovers = not job.options or kept_options(job.options).get("recover", True)
                if taken >= limit or planned > budget or not recovers:
                    self.more_ready = True
                    break
            taken += 1
            self.jobs.append((job, charge))
            is_single = job.parent_id is None and job.total == 0
            self._ids[CLAIM_SINGLE if is_single else CLAIM, charge].append(job.id)
            if not is_single:
                tx.count(job.parent_id, running=1)
                tx.change(root_id, "charge", charge)
        self._write()
        tx.execute(_ADVANCE_CLOCK, {"tag": tag})

    def _write(self) -> None:
        for (sql, charge), ids in self._ids.items():
            self._tx.execute(sql, {"charge": charge, "owner": self._owner, "now": self._tx.now,
                                   "ids": json.dumps(ids)})
        self._ids.clear()

    def _charge(self, job: JobRow) -> int | None:
        """Return the charge for a job, None if a limit blocks it."""
        limits = job.limits
        if limits:
            tx = self._tx
            self._write()  # limits count them
            key = limit_without_room(tx, job)
            if key:
                tx.execute(_BLOCK, {"id": job.id, "key": key})
                tx.change(job.root)
                self._blocked += 1
                return None
            for limit in limits if job.total else ():  # it may wait for descendants
                tx.make_ready(tx.jobs(BLOCKED_IN_TREE, key=limit, root=job.root))
        return self._run_times.charge(job.name)

    def _ready_jobs(self, root: JobRow, lane: int) -> Iterator[JobRow]:
        """Yield the ready jobs of a tree in a lane, oldest first."""
        if root.queue == lane:
            yield root
        for row in self._tx.execute(READY_CHILDREN, {"root": root.id, "lane": lane}):
            if self.cut_short:
                return
            yield to_job(row)


def claim(tx: Transaction, owner: int, room: Room, run_times: RunTimes) -> Claims:
    """Claim jobs for a runner; low priority gets the slots that normal jobs leave."""
    claims = Claims(tx, owner, room, run_times)
    while claims.round():
        pass
    return claims


_SUBTREE = f"""WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL SELECT j.id FROM tree
    JOIN bgjobs_jobs j ON j.parent_id = tree.id AND j.parent_id IS NOT NULL)
    SELECT {_JOB} FROM tree JOIN bgjobs_jobs USING (id)"""
# A person has looked at it: its deaths are forgotten. :again: the function is called again.
_RESUME = """UPDATE bgjobs_jobs SET deaths = 0,
    error = CASE WHEN :again AND returned > 0 THEN NULL ELSE error END,
    returned = CASE WHEN :again THEN 0 ELSE returned END WHERE id = :id"""
_RESET = """UPDATE bgjobs_jobs SET state = NULL, positions = NULL, message = NULL, result = NULL,
    error = NULL, progress = NULL, ends_at = NULL, own_errors = 0, returned = 0, deaths = 0,
    started_at = NULL, finished_at = NULL, duration = 0, open = 0, total = 0, done = 0, failed = 0,
    running = 0, tree_progress = 0 WHERE id = :id"""
_BEFORE = {"resume": _RESUME, "restart": _RESET}
_SET_LOW_PRIORITY = """UPDATE bgjobs_jobs SET low_priority = :low,
    queue = CASE WHEN queue IS NOT NULL THEN :low END WHERE id = :id"""


def operate(tx: Transaction, operation: str, job_id: int, by: str | None,
            author: tuple[int, int] | None = None) -> list[int]:
    """Apply an operation to a job and to descendants that allow it; return their ids."""
    if author is not None:
        tx.check_author(author)
    tx.apply()
    tree = tx.jobs(_SUBTREE, id=job_id)
    if not tree:
        raise KeyError(job_id)
    top, *below = tree
    _check_operation(tx, operation, top, below)
    if operation == "restart":
        remove(tx, [job.id for job in below])
        tx.count(top.parent_id, total=-top.total, done=-top.done, failed=-top.failed,
                       running=-top.running, progress=-top.tree_progress)
        tree = [top]
    moved = [job.id for job in tree if _carry_out(tx, operation, job, top)]
    if moved:
        text = f"{operation.replace('_', ' ')}{f' by {by}' if by else ''}"
        if len(moved) > 1:
            text += f" ({len(moved):,} jobs of the tree)"
        tx.log(job_id, logging.INFO, text)
    return moved


def _check_operation(tx: Transaction, operation: str, top: JobRow, below: list[JobRow]) -> None:
    """Raise InvalidOperation if a job does not allow an operation."""
    options, is_system = kept_options(top.options), bool(top.system)
    active = [job.id for job in below if job.status in ACTIVE]
    allowed = allowed_operations(top.status, options, is_system, bool(active))
    fits = top.status in OPERATIONS[operation].moves
    if operation == "force_stop" and top.status == STOPPED:
        fits = any(job.status == STOPPING for job in below)
    why = objection(operation, options, is_system) if fits else ""
    if fits and not why:
        allowed = []
        if active and operation in ("cancel", "restart"):
            why = f"its descendant job {active[0]} is still running; stop it first"
        elif top.key and top.status in OVER and top.parent_id is None:
            holder = tx.value(ROOT_WITH_KEY, key=top.key)
            why = f"job {holder} has its key {top.key!r} now" if holder else ""
        if not why:
            return
    raise refusal(f"job {top.id}", top.status, operation,
                  [name for name in allowed if name != operation], why)


def _carry_out(tx: Transaction, operation: str, job: JobRow, top: JobRow) -> bool:
    """Apply an operation on `top` to a job of its tree; return whether that allows it."""
    rules = OPERATIONS[operation]
    moves = {**rules.moves, **rules.once_returned} if job.returned else rules.moves
    follows = moves.get(job.status)
    if operation == "resume" and job.status == STOPPING:
        follows = RUNNING  # takes its stop back
    of_others = operation == "resume" and job.status == FAILED != top.status
    options, is_system = kept_options(job.options), bool(job.system)
    if not follows or of_others or objection(operation, options, is_system):
        return False
    if operation.endswith("low_priority"):
        tx.execute(_SET_LOW_PRIORITY, {"id": job.id, "low": operation == "set_low_priority"})
        tx.change(job.root)
    elif follows == job.status:
        return job is top  # a stop repeats silently
    elif operation == "force_stop":
        ran = max(0.0, tx.now - (job.since or tx.now))
        tx.end_attempt(job, follows, "force-stopped", ran, ran)
    else:
        if operation in _BEFORE:
            tx.execute(_BEFORE[operation], {"id": job.id, "again": follows == PENDING})
            job, = tx.jobs(TREE_ROW, id=job.id)
        tx.move(job, follows)
    return True


_REMOVE = ("DELETE FROM bgjobs_jobs WHERE id = ?", "DELETE FROM bgjobs_logs WHERE job_id = ?",
           "DELETE FROM bgjobs_attempts WHERE job_id = ?")
_NOTE_REMOVED = "UPDATE bgjobs_clock SET last_id = max(last_id, :id)"


def remove(tx: Transaction, ids: list[int]) -> None:
    """Delete jobs, with logs and attempts, and tell handles. Statistics keep them."""
    tx.count_created()
    tx.over += ids
    for sql in _REMOVE:
        tx.executemany(sql, zip(ids))
    tx.execute(_NOTE_REMOVED, {"id": max(ids, default=0)})


# By the clock, and after a crash.

_WAITS = "run_at IS NOT NULL AND queue IS NULL AND status = 'pending' AND parked IS NULL"
NEXT_DUE = f"SELECT min(run_at) FROM bgjobs_jobs WHERE {_WAITS}"
DUE = f"{_FIND} run_at <= :now AND {_WAITS} LIMIT 1000"
BLOCKED = f"{_FIND} parked = :key LIMIT 1000"
OWNED = f"""{_FIND} status IN ('running', 'stopping') AND status <> 'pending'
    AND owner = :owner"""
_LAST_SEEN = "SELECT heartbeat_at FROM bgjobs_runners WHERE id = :id"
_SET_DEATHS = "UPDATE bgjobs_jobs SET deaths = :deaths WHERE id = :id"


def wake_due(tx: Transaction) -> bool:
    return tx.make_ready(tx.jobs(DUE, now=tx.now))


def unpark(tx: Transaction, key: str) -> bool:
    return tx.make_ready(tx.jobs(BLOCKED, key=key))


def owned(tx: Transaction, owner: int) -> list[JobRow]:
    """Return the jobs that a runner executes, children before their parents."""
    return sorted(tx.jobs(OWNED, owner=owner), reverse=True)


def recover(tx: Transaction, owner: int) -> int:
    """Take back the jobs of a runner whose process died; return how many."""
    jobs, seen = owned(tx, owner), tx.value(_LAST_SEEN, id=owner)
    until = 0.0 if seen is None else min(tx.now, seen + HEARTBEAT_SECONDS)
    cleared: set[int] = set()
    for job in jobs:
        deaths = 0 if job.id in cleared else job.deaths + 1
        tx.execute(_SET_DEATHS, {"id": job.id, "deaths": deaths})
        if deaths >= DEATHS:  # it is to blame, not the ancestors that wait for it
            cleared.update(tx.lineage(job.parent_id))
        take_back(tx, job.id, "its process died", until, died=True)
    remove_runner(tx, owner)
    return len(jobs)


def remove_runner(tx: Transaction, runner: int) -> None:
    tx.execute("DELETE FROM bgjobs_runners WHERE id = :id", {"id": runner})
    tx.execute("DELETE FROM bgjobs_registered WHERE runner_id = :id", {"id": runner})


def take_back(tx: Transaction, job_id: int, why: str, until: float, died: bool = False) -> None:
    """Supersede the attempt of a job, which ran until then; it may have to fail."""
    tx.apply()
    job, = tx.jobs(TREE_ROW, id=job_id)
    error = ""
    if job.status == RUNNING and not kept_options(job.options).get("recover", True):
        error = f"{why} while it ran, and it was declared recover=False"
    elif died and job.deaths >= DEATHS:
        error = f"its process died under it {job.deaths} times; resume gives it another try"
    returned = 2 if error else None
    status = status_after(job, returned)
    ran = max(0.0, until - (job.since or until))
    tx.end_attempt(job, status, "interrupted" if died else OUTCOMES[RELEASED], ran, ran,
                   phase=PHASES[RELEASED], returned=returned,
                   error=dump_error("Interrupted", error, "") if error else None)
    tx.log(job_id, logging.WARNING, f"{error or why}; {status} now")


# ---- 8 Store ---------------------------------------------
#
# Group commit: a thread queues its write and tries to lead. The one leader runs all queued writes
# in one transaction, with what rides along (log lines, outcomes, claims). The others sleep until
# their writes are done or they are woken to lead. So a caller alone pays no hand-over, and batches
# grow with the load. If a batch fails, each write runs again alone.
#
# A fork waits until no thread is inside SQLite: a child forked inside a transaction inherits
# SQLite's table of held locks, and gets "database is locked" for good.

WAL_LIMIT = 64 * 1024 * 1024  # bytes
LOCK_SECONDS = 30  # how long a write waits for another program's lock
LOCK_STEP_SECONDS = 0.05  # of one wait inside SQLite, which close() cannot cut short
Change = Callable[[Transaction], Any]
_CONNECT: Fields = {"isolation_level": None, "check_same_thread": False}


class _ForkGate:
    """Makes a fork wait while a thread is inside SQLite."""

    def __init__(self) -> None:
        self.door = threading.RLock()  # held during a fork; finalizers may read
        self._inside: set[int] = set()  # threads

    def __enter__(self) -> None:
        with self.door:
            self._inside.add(threading.get_ident())

    def __exit__(self, *exc_info: Any) -> None:
        self._inside.discard(threading.get_ident())

    def shut(self) -> None:
        """Let no thread in, and wait until none is inside, for a second at most."""
        self.door.acquire()
        deadline = time.monotonic() + 1.0
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.0002)


fork_gate = _ForkGate()


class _Here(threading.local):
    ticket: Ticket | None = None


_here = _Here()


def library_code(function: _F) -> _F:
    """Decorate a function that no force stop may interrupt: it takes the ticket (10)."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        ticket = _here.ticket
        if ticket is None:
            return function(*args, **kwargs)
        ticket.take()
        try:
            return function(*args, **kwargs)
        finally:
            ticket.put_back()
    return call  # type: ignore[return-value]


_REMEDIES = {  # by a part of SQLite's error text
    "locked": "another program holds its lock: end it, or wait",
    "readonly": "make the file and its folder writable",
    "not a database": "give the path of a new file, or of a job file",
    "malformed": "restore it from a backup",
    "disk": "make room on the disk, or see the system's log for disk trouble",
    "unable to open": "give the path of a file in a folder that exists and is writable",
    "json": "use a build of SQLite with its JSON functions"}


def store_error(doing: str, error: BaseException) -> BaseException:
    """Return a StoreError with a remedy for an error of SQLite; other errors as they are."""
    if not isinstance(error, sqlite3.Error):
        return error
    remedies = [remedy for sign, remedy in _REMEDIES.items() if sign in str(error)]
    explained = StoreError("; ".join([f"cannot {doing}: {error}", *remedies[:1]]))
    explained.__cause__ = error
    return explained


class JobFile:
    """The SQLite file of a store, its schema, and whether it is still there."""

    def __init__(self, path: str | os.PathLike[str], journal: str) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ValueError(f"path must name a file, got {path!r}; jobs are kept on disk")
        self.path, self._journal = os.path.abspath(path), journal
        # SQLite puts the WAL beside a link's target.
        self._wal = os.path.realpath(self.path) + ("-wal" if journal == "wal" else "")

    def open(self, synchronous: str, now: float) -> Any:
        """Migrate the file and return the connection that writes."""
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=LOCK_STEP_SECONDS, **_CONNECT)
            self._prepare(db, now)
            db.executescript(f"""PRAGMA synchronous = {synchronous};
                PRAGMA wal_autocheckpoint = 4000; PRAGMA journal_size_limit = {WAL_LIMIT}""")
            self._version_in(db)  # makes the WAL
        except BaseException as error:
            if db is not None:
                db.close()
            raise store_error(f"use {self.path} as a job file", error)
        self._identity, self.checked_at = self._look(), 0.0
        return db

    def _prepare(self, db: sqlite3.Connection, now: float) -> None:
        """Migrate and set the journal mode, again if another process does so, too."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._migrate(db, now)
                mode = db.execute(f"PRAGMA journal_mode = {self._journal}").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                db.rollback()
                time.sleep(random.uniform(0.01, 0.05))
        if mode != self._journal:
            raise StoreError(f"the journal mode of {self.path} stays {mode!r}, not "
                             f"{self._journal!r}; use a local disk, and one mode in all processes")

    def _migrate(self, db: sqlite3.Connection, now: float) -> None:
        if self._version_in(db) == SCHEMA_VERSION:
            return
        db.execute("BEGIN IMMEDIATE")
        version = self._version_in(db)  # another process may be quicker
        if version == 2:  # 1.0.0 has other presence locks: it would take our jobs, and we its
            for pid, in db.execute("""SELECT pid FROM bgjobs_runners WHERE heartbeat_at > ?
                    ORDER BY heartbeat_at DESC""", [now - 20]):
                raise StoreError(f"{self.path} is in use by bgjobs 1.0.0 in process {pid}; stop "
                                 f"it before bgjobs {__version__} opens the file")
        while version != SCHEMA_VERSION:
            if version not in MIGRATIONS:
                raise StoreError(
                    f"{self.path} has schema version {version}, and this bgjobs {__version__} "
                    f"knows up to {SCHEMA_VERSION}; copy a newer bgjobs.py")
            for statement in MIGRATIONS[version]:
                db.execute(statement)
            version = version + 1 if version else SCHEMA_VERSION
        db.execute("UPDATE bgjobs_schema SET version = ?", [version])
        db.execute("COMMIT")

    def _version_in(self, db: sqlite3.Connection) -> Any:
        # Builds before 3.38 may lack the JSON functions.
        if db.execute("""SELECT json_array() FROM sqlite_master
                      WHERE name = 'bgjobs_schema'""").fetchone() is None:
            return 0
        return db.execute("SELECT version FROM bgjobs_schema").fetchone()[0]

    def _look(self) -> Any:
        with contextlib.suppress(OSError):
            seen = os.stat(self.path)
            return seen.st_size > 0, seen.st_dev, seen.st_ino, os.stat(self._wal).st_ino
        return object()  # equal to nothing else

    def check(self) -> None:
        """Raise StoreError if the path names another file now, which SQLite would not notice."""
        if self._look() != self._identity:
            raise StoreError(
                f"{self.path}, or its -wal, was deleted, emptied or replaced while it was in use; "
                "nothing more is written: put it back, or close() this runner, put the right file "
                "there without a -wal, and make a new runner")
        self.checked_at = time.monotonic()

    def connect(self) -> sqlite3.Connection:
        """Return a connection for reading; the caller closes it.

        No `check`: handles of a closed runner read on, when the WAL may be gone.
        """
        import pathlib
        db = sqlite3.connect(pathlib.Path(self.path).as_uri() + "?mode=rw", uri=True, timeout=30,
                             **_CONNECT)
        db.row_factory = sqlite3.Row
        return db

    def shorten_wal(self) -> None:
        """Truncate a large WAL. Raises StoreError if a reader prevents that."""
        size = os.path.getsize(self._wal)
        if size > WAL_LIMIT:
            with contextlib.closing(self.connect()) as db:
                db.execute("PRAGMA busy_timeout = 100")
                busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if busy and size > 4 * WAL_LIMIT:
                raise StoreError(f"the WAL of {self.path} has {size >> 20} MB: another program "
                                 "keeps an old read transaction open; end that")

    def backup(self, path: str) -> None:
        self.check()
        if os.path.exists(path):
            raise ValueError(f"{path} exists; give the path of a new file")
        try:
            with contextlib.closing(self.connect()) as db:
                with contextlib.closing(sqlite3.connect(path)) as copy:
                    db.backup(copy)
                    # So a runner on the copy takes back its running jobs.
                    copy.executescript("DELETE FROM bgjobs_runners; DELETE FROM bgjobs_registered")
        except BaseException as error:
            for rest in (path, path + "-journal"):
                with contextlib.suppress(OSError):
                    os.remove(rest)
            raise store_error(f"back {self.path} up to {path}", error)


class _Write:
    """A write that waits for its transaction."""

    value: Any = None
    error: BaseException | None = None
    done = False  # committed, or failed

    def __init__(self, run: Change) -> None:
        self.run = run
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # it is done, or can lead


class Store:
    """One SQLite file: a connection for the leader, which writes, and others for readers."""

    passenger: Dispatch  # rides along with each transaction
    leader = 0  # the ident of its thread, 0 if none leads
    _heir: _Write | None = None  # whose thread was woken to lead next
    _again = False  # more is to ride along
    closed = forked = False
    close_by = math.inf  # when a closing runner gives up

    def __init__(self, path: str | os.PathLike[str], durability: str, journal: str,
                 clock: Callable[[], float]) -> None:
        if sqlite3.sqlite_version_info < (3, 31):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; bgjobs needs 3.31")
        self.file, self.clock, self.pid = JobFile(path, journal), clock, os.getpid()
        self.path = self.file.path
        self._leading = threading.Lock()  # held by the leader
        self._waiting: deque[_Write] = deque()
        self._lineages: dict[int, tuple[int, ...]] = {}
        self._readers: deque[sqlite3.Connection] = deque()
        self._say_once = functools.lru_cache(20)(lambda text, period: say(logging.ERROR, text))
        # EXTRA also syncs the folder after the commit, which deletes a rollback journal.
        self._writer = self.file.open("NORMAL" if durability == "process" else "EXTRA", clock())
        self._version_lock = threading.Lock()
        self._version_db = self.file.connect()

    # writing

    @library_code
    def write(self, run: Change) -> Any:
        """Call `run(transaction)` and return its value after the commit.

        It may be called again after a rollback, so it changes nothing but the transaction. If it
        raises, nothing of it is stored, and the error is raised here.
        """
        if self.closed or self.forked or os.getpid() != self.pid:
            self._check_open()
        if self.leader == threading.get_ident():
            raise RuntimeError("a signal handler or finalizer called bgjobs inside a write of its "
                               "thread; let it start a thread")
        write = _Write(run)
        self._waiting.append(write)
        try:
            while not write.done:
                # A leader takes the write along, or wakes this thread.
                heir = self._heir
                another = heir is not None and heir is not write and not heir.done
                if self.leader or another or not self._lead(flushing=False):
                    with contextlib.suppress(queue.Empty):  # Ctrl-C may have hit the leader
                        write.wake.get(timeout=1.0)
        except BaseException:  # Ctrl-C
            write.done = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(write)
            raise
        if write.error is not None:
            raise write.error
        return write.value

    @library_code
    def flush(self) -> None:
        """Lead transactions until nothing more rides along, unless another thread leads."""
        self._again = True
        if self.leader != threading.get_ident():
            while self._again and self._lead(flushing=True) and not self._waiting:
                pass

    def _lead(self, flushing: bool) -> bool:
        """Run all waiting writes. Return False if another thread leads or the commit failed."""
        if not self._leading.acquire(blocking=False):
            return False
        worked = False
        try:
            self.leader, self._again, self._heir = threading.get_ident(), False, None
            worked = self._commit(list(self._waiting), flushing)
            while self._waiting and self._waiting[0].done:
                self._waiting.popleft().wake.put(None)
        finally:
            self.leader = 0
            self._leading.release()
            try:
                self._heir = self._waiting[0]
                self._heir.wake.put(None)  # its thread leads next
            except IndexError:
                if self._again and not (flushing and worked):
                    self.passenger.left_behind()
        return worked

    def _commit(self, batch: list[_Write], flushing: bool) -> bool:
        """Run a batch in one transaction; if that fails, return False after running each alone."""
        try:
            self._transact(batch, flushing)
            return True
        except (Exception, JobStopped) as error:  # JobStopped: a superseded one submits
            trouble = error
        for write in batch:
            try:
                if isinstance(trouble, StoreError):  # it hits all alike
                    raise copy.copy(trouble) from trouble.__cause__
                self._transact([write], None)
            except (Exception, JobStopped) as error:
                write.error, write.done = store_error(f"write to {self.path}", error), True
        self._again = not self.closed
        if self._again and not batch:
            why = store_error(f"write to {self.path}", trouble)
            self.complain(f"cannot record outcomes: {why}; trying again")
            time.sleep(0.05)
        return False

    def _transact(self, batch: list[_Write], flushing: bool | None) -> None:
        """Run a batch in one transaction; nothing rides along if flushing is None."""
        if self.closed:
            self._check_open()
        if time.monotonic() - self.file.checked_at > 0.005:
            self.file.check()
        with fork_gate:
            try:
                self._await_lock("BEGIN IMMEDIATE")
                tx = Transaction(self._writer, self._lineages, self.clock())
                if flushing is not None:
                    self.passenger.begin(tx)
                for write in batch:
                    write.value = write.run(tx)
                if flushing is not None:
                    self.passenger.end(tx, flushing)
                tx.end_all()
                self._await_lock("COMMIT")
            except BaseException:
                self._writer.rollback()
                self._lineages.clear()
                raise
        for write in batch:
            write.done = True
        tx.after_commit.append(lambda: self.passenger.committed(tx))
        for callback in tx.after_commit:
            try:
                callback()
            except Exception as error:  # the writes are committed all the same
                say(logging.ERROR, f"trouble after a commit\n{traceback_of(error)}")

    def _check_open(self) -> None:
        if os.getpid() != self.pid:
            leave_to_parent()  # after a fork in C, without hooks
        if self.forked:
            raise StoreError(f"the runner on {self.path} belongs to the process that this one was "
                             "forked from; call its start(), or make a new Runner")
        if self.closed:
            raise StoreError(f"the runner on {self.path} is shut down")

    def _await_lock(self, statement: str) -> None:
        """Execute a statement that needs the file's lock. Raises StoreError if it waits long."""
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._writer.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if (time.monotonic() > min(give_up, self.close_by + 0.4)
                        or "locked" not in str(error)):
                    raise store_error(f"write to {self.path}", error)

    def complain(self, text: str) -> None:
        """Log an error, once in ten seconds."""
        self._say_once(text, int(time.monotonic() / 10))

    def write_through(self, connection: sqlite3.Connection, run: Change) -> Any:
        """Run a write in the transaction of an app's connection, which the app commits.

        If none is open, one is begun, and committed if the connection commits by itself.
        """
        self._check_open()
        try:
            commits = connection.isolation_level is None
            commits |= getattr(connection, "autocommit", None) is True  # since Python 3.12
            begin, end, undo = "BEGIN IMMEDIATE", "COMMIT" if commits else "", "ROLLBACK"
            if connection.in_transaction:
                begin, end, undo = "SAVEPOINT bgjobs", "RELEASE bgjobs", "ROLLBACK TO bgjobs"
            db = sqlite3.Cursor(connection)  # has no row factory
            file = db.execute("PRAGMA database_list").fetchone()[2]
            if not file or not os.path.samefile(file, self.path):
                raise ValueError(f"the connection is to {file or 'a database in memory'}; jobs in "
                                 f"{self.path} need one to that file")
            db.execute(begin)
            try:
                # Takes the lock: SQLite waits for it only before the first read.
                db.execute("UPDATE bgjobs_clock SET vtime = vtime WHERE 0")
                tx = Transaction(db, {}, self.clock())
                value = run(tx)
                tx.end_all()
                db.execute(end)
                return value
            except BaseException:
                if connection.in_transaction:
                    db.execute(undo)
                raise
        except sqlite3.Error as error:
            raise store_error(f"write to {self.path} through the app's connection (if it reads "
                              "first, use BEGIN IMMEDIATE)", error)

    # reading

    @library_code
    def read(self, sql: str, parameters: Any = ()) -> list[sqlite3.Row]:
        """Return all rows of a query, without waiting for writes."""
        if os.getpid() != self.pid:
            leave_to_parent()
        with fork_gate:
            try:
                db = self._readers.pop()
            except IndexError:
                db = self.file.connect()
            try:
                return self._fetch(db, sql, parameters)
            finally:
                self._readers.append(db)
                if self.closed or len(self._readers) > 8:
                    self._close_readers()

    def _fetch(self, db: sqlite3.Connection, sql: str, parameters: Any = ()) -> list[sqlite3.Row]:
        try:
            return db.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise store_error(f"read {self.path}", error)

    def _close_readers(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._readers.pop().close()

    def version(self) -> int:
        self._check_open()
        if time.monotonic() - self.file.checked_at > 0.5:
            self.file.check()
        with self._version_lock, fork_gate:
            return int(self._fetch(self._version_db, "PRAGMA data_version")[0][0])

    # the end

    def close(self, last: Any = None) -> None:
        def run(tx: Transaction) -> None:
            last(tx)
            tx.after_commit.append(lambda: setattr(self, "closed", True))
        if last is not None:
            with contextlib.suppress(StoreError):  # the disk may be full
                self.write(run)
        self.closed = True
        with self._version_lock:
            self._version_db.close()
        self._writer.close()
        self._close_readers()

    def leave_to_parent(self) -> None:
        """In a forked child, neither use nor close the parent's connections."""
        with contextlib.suppress(ImportError, AttributeError):  # a freed one would be closed
            import ctypes
            for connection in (self._writer, self._version_db, *self._readers):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._readers, self.pid, self.closed, self.forked = deque(), os.getpid(), True, True


# ---- 9 Worker pool ---------------------------------------

ABANDONED_A_PLACE = 2  # abandoned attempts for each slot; then nothing is claimed
HAND_SECONDS = 0.001  # the work worth waking a thread for
LINGER_SECONDS = 0.001  # how long an idle worker waits, to claim more at a time


class Pool:
    """`size` slots in which attempts execute, and threads for them, which are reused.

    An attempt comes here *claimed*, and is *placed* once there is a slot. While it waits for
    another job it is *away*, its slot is given to others, and then it is *returning* until it is
    placed again. So waiting never deadlocks, and no more than `size` attempts execute. Returning
    attempts come first: the claimed ones may wait for them. A force stop makes an attempt
    *abandoned*: it has no slot, and its thread ends with it.

    Low priority never takes the last of several slots. If all placed attempts have become low
    priority, one slot more is given out.
    """

    _needed = 0  # threads that execute or are about to
    lingers = False  # a worker claims in a moment

    def __init__(self, size: int, execute: Callable[[Attempt], None],
                 settle: Callable[[Attempt], bool], claim: Callable[[], None]) -> None:
        self.size = size
        self._low_size = max(1, size - 1)  # slots for low priority
        self._execute = execute
        self._settle, self._claim = settle, claim  # settle returns whether to claim at once
        # `_lock` guards changes of all below; no user code or SQL runs under it.
        self._lock = threading.Lock()
        self.claimed: deque[Attempt] = deque()
        self._placed: tuple[set[Attempt], set[Attempt]] = set(), set()  # normal, low priority
        self._away: set[Attempt] = set()
        self._returning: dict[Attempt, threading.Event] = {}  # in order; set with the slot
        self.abandoned: set[Attempt] = set()
        self._handed: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()  # None ends a thread
        self._threads: set[threading.Thread] = set()
        self._pid = os.getpid()  # a fork has no threads of the pool

    @property
    def is_clogged(self) -> bool:
        return len(self.abandoned) >= ABANDONED_A_PLACE * self.size

    def has(self, attempt: Attempt) -> bool:
        places = (*self._placed, self._away, self._returning, self.claimed)
        return any(attempt in each for each in places)

    # slots

    def room(self, run_times: RunTimes) -> Room:
        long_since = time.monotonic() - 2 * AHEAD_SECONDS
        with self._lock:
            if self.is_clogged:
                return Room(0, 0)
            free, low_free = self._left(*self._returning, *self.claimed)
            long = sum(0 < each.begun < long_since for each in itertools.chain(*self._placed))
            planned = sum(run_times.occupies(each.name) for each in self.claimed)
            ahead = AHEAD_LIMIT - len(self.claimed) if long < self.size else 0
            return Room(free, low_free, ahead, planned, self.size - long)

    def _left(self, *others: Attempt) -> tuple[int, int]:
        """Return the free slots, and those for low priority, once `others` are placed."""
        low = len(self._placed[1]) + sum(each.low_priority for each in others)
        normal = len(self._placed[0]) + len(self._placed[1]) + len(others) - low
        return self.size - normal - min(low, self._low_size), self._low_size - low

    def put(self, attempts: Iterable[Attempt] = (), work: float = math.inf) -> None:
        """Execute claimed attempts, about `work` seconds of work, in this order.

        Waking a thread costs more than a tiny job, so only as many are woken as the work is worth.
        The service thread fills the other slots.
        """
        with self._lock:
            self.claimed.extend(attempts)
            self._give(work / HAND_SECONDS + 1)

    def _give(self, hands: float = 1, takes: bool = False) -> Attempt | None:
        """Give free slots out and wake at most `hands` threads, under the lock.

        takes: return the next claimed attempt, for the calling thread.
        """
        while hands >= 1 and (attempt := self._next()) is not None:
            hands -= 1
            self._placed[attempt.low_priority].add(attempt)
            returned = self._returning.pop(attempt, None)
            if returned is not None:
                attempt.waited += time.monotonic() - attempt.left_at
                returned.set()
                continue
            self.claimed.remove(attempt)
            if takes:
                return attempt
            self._needed += 1
            self._handed.put(attempt)
        try:
            while len(self._threads) < self._needed:
                self._threads.add(start_thread("bgjobs-worker", self._work))
        except RuntimeError as error:  # too many; the next put() tries again
            say(logging.ERROR, f"bgjobs: {error}")
        return None

    def _next(self) -> Attempt | None:
        left, low_left = self._left()
        if left > 0:
            for attempt in itertools.chain(self._returning, self.claimed):
                if low_left > 0 or not attempt.low_priority:
                    return attempt
        return None

    # threads

    def _work(self) -> None:
        attempt = self._handed.get()
        while attempt is not None:
            self._execute(attempt)
            if os.getpid() != self._pid:  # the function has forked
                return
            leads = self._settle(attempt)
            with self._lock:
                retires = attempt in self.abandoned  # a force stop may break anything
                leads |= self.is_clogged
                self._take_out(attempt)
                following = self._give(takes=not leads and not retires)
                if following is None:
                    self._needed -= 1
                if retires:
                    self._threads.discard(threading.current_thread())
            if leads:
                self._claim()
            if retires:
                return
            attempt = following
            if attempt is None:
                if not leads and not self.lingers:
                    # Without this, tiny jobs that arrive one by one take 1.5 times the CPU.
                    self.lingers = True
                    time.sleep(LINGER_SECONDS)
                    self.lingers = False
                    self._claim()
                attempt = self._handed.get()
        self._handed.put(None)  # for the next thread

    def _take_out(self, attempt: Attempt) -> None:
        self._placed[attempt.low_priority].discard(attempt)
        self._away.discard(attempt)
        self.abandoned.discard(attempt)
        returned = self._returning.pop(attempt, None)
        if returned is not None:  # abandoned: it goes on without a slot
            returned.set()

    def abandon(self, attempt: Attempt) -> None:
        with self._lock:
            if not self.has(attempt) or attempt in self.claimed:
                return
            self._take_out(attempt)
            self.abandoned.add(attempt)
            self._give()
        if self.is_clogged:
            say(logging.ERROR, "so many superseded attempts still run in threads of this process "
                               "that no more jobs are claimed until some end")
        self._claim()

    def set_low_priority(self, attempt: Attempt, low: int) -> None:
        with self._lock:
            if attempt in self._placed[not low]:
                self._placed[not low].remove(attempt)
                self._placed[low].add(attempt)
            attempt.low_priority = low
            self._give()
        self._claim()

    # waiting for other jobs

    def leave(self, attempt: Attempt) -> None:
        with self._lock:
            attempt.waits += 1
            placed = self._placed[attempt.low_priority]
            if attempt not in placed:
                return
            attempt.left_at = time.monotonic()
            placed.remove(attempt)
            self._away.add(attempt)
            self._give()
        self._claim()

    def come_back(self, attempt: Attempt) -> None:
        """Wait for a slot, unless another thread of the attempt still waits for a job."""
        returned = threading.Event()
        with self._lock:
            attempt.waits -= 1
            if attempt.waits or attempt not in self._away:
                return
            self._away.remove(attempt)
            self._returning[attempt] = returned
            self._give()
        returned.wait()

    # going down

    def take_back(self, waited: float = 0.0) -> list[Attempt]:
        """Take out the claimed attempts that have waited so many seconds."""
        until, attempts = time.monotonic() - waited, []
        with self._lock:
            while self.claimed and self.claimed[0].claimed_at <= until:
                attempts.append(self.claimed.popleft())
        return attempts

    def close(self, seconds: float) -> None:
        """End the threads, and wait some seconds for that."""
        deadline = time.monotonic() + seconds
        self._handed.put(None)
        for thread in self._threads - {threading.current_thread()}:
            thread.join(max(0.0, deadline - time.monotonic()))


# ---- 10 Inside a job -------------------------------------
#
# A force stop raises JobStopped in the thread of an attempt that the file already refuses, with
# PyThreadState_SetAsyncExc, which may strike between any two bytecodes. In the library it would
# leave a lock or a transaction open; later it would hit the thread's next job. So it is raised at
# most once, and only in the function or what that calls.
#
# Each attempt has a ticket: free while the function runs, taken in the library (`library_code`) and
# once the function has ended. A force stop takes it for good:
# - If the thread has it, the force stop leaves a note (`void`), and the thread raises the exception
#   itself on its way back from the library.
# - Else the exception may come at any moment. A thread that wants to enter the library waits until
#   it has been sent, takes it back if it is not raised yet, and raises its own.

FLUSH_SECONDS = 0.25  # between writes of progress alone


class Ticket:
    """The right to raise JobStopped in a thread; others only call `use`."""

    _depth = 1  # of calls in the library
    _raised = False  # from outside
    _spent = False  # nothing more comes from outside
    void = False  # superseded: library calls raise
    thread = 0  # the attempt's ident

    def __init__(self) -> None:
        self._taken = threading.Lock()  # by the attempt's thread
        self._taken.acquire()

    def take(self, quietly: bool = False) -> None:
        """Enter the library. Raises JobStopped if superseded, unless quietly."""
        if self._depth == 0:
            self._take()
            if self._spent and not quietly:
                raise JobStopped("the attempt has been superseded")
        self._depth += 1

    def put_back(self) -> None:
        """Leave the library. Raises JobStopped, once, if superseded meanwhile."""
        self._depth -= 1
        if self._depth == 0 and not self._spent:
            self._taken.release()
            if self.void:
                self.take()

    def _take(self) -> None:
        if not self._spent and not self._taken.acquire(False):
            while not self._raised:
                time.sleep(0.0001)
            _raise_in_thread(self.thread)
        self._spent |= self.void

    def use(self) -> None:
        """Raise JobStopped in the thread, now or on its way from the library."""
        self.void = True
        if self._taken.acquire(False):
            if _is_logging(self.thread):
                start_thread("bgjobs-force-stop", self._raise)
            else:
                self._raise()

    def _raise(self) -> None:
        """Raise it once the thread holds no lock of `logging`."""
        while _is_logging(self.thread):
            time.sleep(0.005)
        _raise_in_thread(self.thread, JobStopped)
        self._raised = True


def _is_logging(thread: int) -> bool:
    """Return whether a thread is in `logging`, and not in `_take`."""
    frame = sys._current_frames().get(thread)
    if not frame or frame.f_code is Ticket._take.__code__:
        return False
    return any(each.f_globals.get("__name__", "").split(".")[0] == "logging"
               for each, _ in traceback.walk_stack(frame))


def _raise_in_thread(thread: int, *error: type[BaseException]) -> None:
    """Raise `error` at a thread's next bytecode, or take the last back."""
    with contextlib.suppress(ImportError, AttributeError):  # not CPython
        import ctypes
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(*error))


_UNSET: Any = object()
_current: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar(
    "bgjobs_current", default=None)
current_attempt = _current.get
enter = _current.set
_job_log = logging.getLogger("bgjobs.job")


class JobContext:
    """The job that this code runs in.

    attempt: its number, from 1. Outside of a job it is 0, id, name and run_by are None, and methods
    do nothing. For any thread with the job's context (`asyncio.to_thread`), `each` for one only.
    """

    id: int | None = None
    name: str | None = None
    run_by: str | None = None
    attempt = 0

    def __init__(self, attempt: Attempt | None) -> None:
        self._attempt = attempt
        if attempt:
            self.id, self.name, self.run_by = attempt.id, attempt.name, attempt.job.run_by
            self.attempt = attempt.number

    @property
    def state(self) -> Any:
        """A copy of the state saved last, or None."""
        return decode(self._attempt.state) if self._attempt else None

    @property
    def stop_requested(self) -> bool:
        """Whether the next checkpoint raises JobStopped."""
        return self._attempt is not None and self._attempt.stop_requested

    @property
    def log(self) -> logging.Logger:
        """A logger whose records also go to the job's log."""
        return self._attempt.logger() if self._attempt else _log

    def checkpoint(self, state: Any = _UNSET) -> None:
        """Save `state`, if given, for the next attempt; then stop here if that was asked for.

        state: as arguments; blocks until its commit. Raises JobStopped, TypeError for a bad state.
        """
        attempt = self._attempt
        if attempt:
            if state is not _UNSET:
                attempt.save(encode(state, f"the state of job {attempt.id}"))
            if attempt.attention:
                attempt.attend()

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Report that `done` of `total` units are done, with a line for people.

        total: None if unknown. Never blocks; no checkpoint.
        """
        if self._attempt:
            self._attempt.report(done, total, message)

    def each(self, iterable: Iterable[_Item], total: int | None = None) -> Iterator[_Item]:
        """Yield the items, with a checkpoint before each and at the end; report the progress.

        A resumed attempt goes on after the last completed item, so their order must be the same.
        total: their number, if the iterable has no length. Raises JobStopped.
        """
        return self._attempt.each(iterable, total) if self._attempt else iter(iterable)

    def sleep(self, seconds: float) -> None:
        """Sleep. Raises JobStopped at once if the job is to stop."""
        (self._attempt or time).sleep(seconds)


def current_job() -> JobContext:
    """Return the context of this job, or one that does nothing."""
    return JobContext(current_attempt())


class Attempt:
    """One execution of a job's function."""

    thread: int | None = None  # while it executes; 0: elsewhere
    begun = left_at = 0.0  # monotonic; left_at: went away
    ran = waited = 0.0  # seconds: in all; for jobs
    waits = 0  # threads that wait
    lines = 0  # of the log, written

    outcome, reason = UNSPENT, HALTED  # how it ended; how a stop ends it
    result: str | None = None  # JSON
    error: str | None = None  # JSON
    exception: BaseException | None = None
    unsaved_progress: Any = None
    has_reported = False  # progress or a later charge is stored

    loops = 0  # each() loops begun
    loop_positions: Any = ()  # their completed turns
    stop_requested = was_asked_to_stop = False  # now; ever
    attention = False  # a checkpoint has something to do
    operation: Any = None  # the Event that it waits for
    saved_at = 0.0  # monotonic
    newest: Any = None
    pace: Any = None
    job_logger: logging.Logger | None = None
    on_stop: Any = None  # elsewhere: called from any thread, must not block
    away: Any = contextlib.nullcontext  # elsewhere: while it waits for jobs

    def __init__(self, backend: Core, job: JobRow, charge: int) -> None:
        self.backend, self.job, self.charge = backend, job, charge
        self.id, self.name, self.parent_id, self.root_id = job.id, job.name, job.parent_id, job.root
        self.number, self.owner = job.attempt + 1, backend.id
        self.low_priority, self.state = job.low_priority, job.state
        self.options = kept_options(job.options) if job.options else {}
        self.has_children = job.total > 0
        self.claimed_at = time.monotonic()
        self.ticket = Ticket()
        self.turns: list[Any] = []  # (done, total) of loops under way
        self.waits_on: list[Any] = []  # conditions that a stop notifies

    @property
    def is_plain(self) -> bool:
        """Whether FINISH can record it."""
        is_simple = self.number == 1 and not self.has_children and not self.has_reported
        return is_simple and self.outcome == RETURNED

    @property
    def worked(self) -> float:
        """Seconds at work, once it has ended."""
        return max(0.0, self.ran - self.waited)

    @property
    def correction(self) -> int:
        """Microseconds the claim charged too little."""
        return int(self.worked * 1e6) - self.charge

    @property
    def superseded(self) -> JobStopped:
        """The error of an attempt that the store refuses."""
        return JobStopped(f"attempt {self.number} of job {self.id} has been superseded")

    def fail(self, error: BaseException) -> None:
        """Make an error the outcome, whatever its methods raise."""
        self.outcome, self.exception, self.result = RAISED, None, None
        kind = type(error).__qualname__
        try:
            self.error = dump_error(kind, text_of(error), traceback_of(error))
            self.exception = error
        except BaseException:
            self.error = dump_error(kind, "it cannot be printed", "")

    def time_out(self) -> None:
        self.fail(TimeoutError(f"attempt {self.number} took longer than its timeout of "
                               f"{self.options['timeout']:,g} s"))

    # stopping

    def request_stop(self, reason: str = HALTED, force: bool = False) -> None:
        """Have the next checkpoint raise JobStopped. force: despite stoppable=False."""
        if not force and not self.options.get("stoppable", True):
            return
        self.reason = reason  # first: a checkpoint that sees `attention` needs it
        self.was_asked_to_stop = self.stop_requested = self.attention = True
        for condition in list(self.waits_on):
            with condition:
                condition.notify_all()
        if self.on_stop:
            self.on_stop()

    def withdraw_stop(self) -> None:
        """Go on: the job was resumed before a checkpoint."""
        if self.reason == HALTED:
            self.stop_requested = False

    def let_pass(self, operation: threading.Event) -> None:
        """Have the next checkpoint wait for an operation, which a busy loop holds up."""
        self.operation = operation
        self.attention = True

    def supersede(self) -> None:
        """Raise JobStopped wherever the function is, for the store refuses the attempt."""
        self.ticket.use()
        self.request_stop(force=True)  # last: threads that wake look at the ticket

    def raise_if_stopped(self) -> None:
        if self.stop_requested:
            raise JobStopped(f"job {self.id} was asked to stop")

    @library_code
    def attend(self) -> None:
        """Let an operation pass; raise JobStopped if a stop is requested."""
        operation, self.operation = self.operation, None
        self.attention = False  # first: a stop from here on sets it again
        if operation:
            operation.wait(1.0)
        if self.stop_requested:
            self.attention = True
            self.raise_if_stopped()

    @library_code
    def sleep(self, seconds: float) -> None:
        """Sleep, and keep the place. A stop raises JobStopped."""
        self.wait_on(threading.Condition(), lambda: self.stop_requested, seconds)
        self.raise_if_stopped()

    def wait_for(self, condition: Any, over: Function, timeout: float | None) -> None:
        """Wait, without the place."""
        with self.away():
            self.backend.wait_in_job(
                self, functools.partial(self.wait_on, condition, over), timeout)

    def wait_on(self, condition: Any, over: Function, timeout: float | None) -> bool:
        """Wait until `over()`, asked at notifications and stops; return it."""
        self.waits_on.append(condition)
        try:
            with condition:
                return bool(condition.wait_for(over, timeout))
        finally:
            self.waits_on.remove(condition)

    # state

    def save(self, state: str | None) -> None:
        """Save a state (JSON), if any, and each()'s positions; block until the commit."""
        if not self.backend.save(self, state, self.unsaved_positions()):
            self.request_stop()
            raise self.superseded
        if state is not None:
            self.state = state
        self.saved_at = time.monotonic()

    def unsaved_positions(self) -> str | None:
        return json.dumps(self.loop_positions) if self.loop_positions else None

    # Loops of each() follow each other or nest. They are numbered as they begin; a list has their
    # completed turns. After a turn the loops inside it leave the list, and the next turn's get
    # their numbers. So a resumed attempt finds its own.

    def each(self, iterable: Iterable[_Item], total: int | None) -> Iterator[_Item]:
        """Yield from the saved position on; save it at most ten times a second."""
        positions = self.loop_positions or json.loads(self.job.positions or "[]")
        self.loop_positions = positions
        loop, depth = self.loops, len(self.turns)
        self.loops += 1
        if loop == len(positions):
            positions.append(0)
        done = positions[loop]
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        try:
            for item in itertools.islice(iterable, done, None):
                self._report_turn(depth, done, total)
                if self.attention:
                    self.attend()
                yield item
                done += 1
                positions[loop:] = [done]
                self.loops = loop + 1
                if time.monotonic() - self.saved_at > 0.1:
                    self.save(None)
            self._report_turn(depth, done, total)
        finally:
            del self.turns[depth:]
        self.raise_if_stopped()

    # progress

    def _report_turn(self, depth: int, done: int, total: int | None) -> None:
        """Report a loop's progress; inner loops refine the outer's share."""
        self.turns[depth:] = [(done, total)]
        units = share = 0.0
        for done, total in reversed(self.turns):
            units = done + share
            share = units / total if total else 0.0
        self.report(units, total)

    def report(self, done: float, total: float | None = None, message: Any = None) -> None:
        """Note the progress for the service thread."""
        if message is not None:
            message = text_of(message, 500)  # here: __str__ is the app's
        self.newest = float(done), total and float(total), message, time.monotonic() - self.begun

    def report_to_save(self) -> Any:
        """Return (share, 0 to 1, seconds left, message), or None if nothing is new."""
        newest, self.newest = self.newest, None  # one of two threads gets it
        if not newest:
            return None
        done, total, message, at = newest
        if not (total and 0 < total < math.inf and math.isfinite(done)):
            return None, None, f"{done:,.12g} done" if message is None else message
        self.pace = self.pace or Pace(resumed=self.job.progress is not None)
        left = self.pace.seconds_left(done, total, at)
        return min(1.0, max(0.0, done / total)), left, message

    # log

    @library_code
    def logger(self) -> logging.Logger:
        """Return the job's logger, "bgjobs.job" for the app."""
        if self.job_logger is None:
            self.job_logger = logging.Logger(_job_log.name, logging.DEBUG)
            self.job_logger.parent = _job_log
            self.job_logger.addFilter(self.keep_record)
        return self.job_logger

    @library_code
    def keep_record(self, record: logging.LogRecord) -> bool:
        """Take a record into the log; return whether the app wants it, too."""
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1]:
                message += "\n" + traceback_of(record.exc_info[1])
        except Exception as error:
            message = f"{short(record.msg)} could not be formatted: {text_of(error)}"
        self.backend.keep_line(self, self.backend.clock(), record.levelno,
                               text_of(message).replace("\0", "\\0"))
        return _job_log.isEnabledFor(record.levelno)


@functools.cache
def capture_log_records() -> None:
    """Keep all records inside a job in its log. (A root handler would disable basicConfig.)"""
    make_record = logging.getLogRecordFactory()

    def make_and_keep(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        attempt = current_attempt()
        # None: makeLogRecord's, not emitted.
        if attempt and record.name not in (_job_log.name, None):
            attempt.keep_record(record)
        return record
    logging.setLogRecordFactory(make_and_keep)


# The execution of a function

def perform(attempt: Attempt, function: Function) -> None:
    """Call an attempt's function here; note the outcome."""
    attempt.begun = time.monotonic()
    attempt.thread = attempt.ticket.thread = threading.get_ident()
    around, _here.ticket = _here.ticket, attempt.ticket
    try:
        try:
            value = contextvars.Context().run(_call, attempt, function)
        finally:
            attempt.ticket.take(quietly=True)  # for good
        if value is not None:
            attempt.result = encode(value, f"{attempt.name} returned, but the result")
        attempt.outcome = RETURNED
    except BaseException as error:
        attempt.outcome = attempt.reason
        if not _is_stop(error):
            attempt.fail(error)
        elif attempt.reason == TIMED_OUT:
            attempt.time_out()
    finally:
        _here.ticket = around
        attempt.thread = None
        attempt.ran = time.monotonic() - attempt.begun


def _call(attempt: Attempt, function: Function) -> Any:
    """Call the function. The stack on the page begins below this frame."""
    enter(attempt)
    args, kwargs = decode(attempt.job.args) or (), decode(attempt.job.kwargs) or {}
    attempt.ticket.put_back()
    value = function(*args, **kwargs)
    if isinstance(value, types.CoroutineType):
        import asyncio
        return asyncio.run(value)
    return value


def _is_stop(error: Any) -> bool:
    """Return whether it is JobStopped, or a group of it alone (TaskGroup)."""
    kind = type(error)  # isinstance also asks __class__
    if issubclass(kind, getattr(builtins, "BaseExceptionGroup", ())):  # Python 3.11
        return all(map(_is_stop, error.exceptions))
    return issubclass(kind, JobStopped)


def traceback_of(error: BaseException) -> str:
    """Return the traceback without our frames."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


# ---- 11 The handle ---------------------------------------
#
# `wait` and `as_completed` of the standard library append a waiter to a handle's waiters, and wait
# on its event. For that this uses private parts, the same in Python 3.10 to 3.14: Future._waiters,
# Future._condition, a waiter's `event`, and Event._cond.

class HandleCondition(threading.Condition):
    """A handle's condition, which `wait` locks: no force stop may strike meanwhile."""

    _lock: threading.Lock

    def __init__(self) -> None:
        super().__init__()
        del self.acquire, self.release  # the lock's own

    def acquire(self) -> bool:  # type: ignore[override]
        if _here.ticket:
            _here.ticket.take(quietly=True)  # as_completed cleans up with it
        return self._lock.acquire()

    def release(self, *exc_info: Any) -> None:
        self._lock.release()
        if _here.ticket:
            _here.ticket.put_back()

    __enter__, __exit__ = acquire, release


class _Waiters(list[Any]):
    """A handle's waiters; inside a job they give the place away."""

    def __init__(self, handle: Job[Any]) -> None:
        super().__init__()
        self._handle = weakref.ref(handle)

    def append(self, waiter: Any) -> None:
        attempt, handle = current_attempt(), self._handle()
        if attempt and type(waiter.event) is threading.Event:
            waiter.event = _PlaceGivingEvent(attempt)
        super().append(waiter)
        if handle:
            handle._watch()  # last: the job may be over


class _PlaceGivingEvent(threading.Event):
    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self._attempt = attempt

    @library_code
    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set. Only a force stop raises JobStopped."""
        attempt = self._attempt
        if not self.is_set():
            attempt.wait_for(self._cond,  # type: ignore[attr-defined]
                             lambda: self.is_set() or attempt.ticket.void, timeout)
            if attempt.ticket.void:
                raise attempt.superseded
        return self.is_set()

    clear = library_code(threading.Event.clear)


class Job(Future[_T]):
    """The handle of a job: a concurrent.futures.Future with the job's attributes. For any thread.

    `stopped` is not done: `result()` waits on. It completes once: an operation on a complete handle
    returns a new one. `await job` works, too; giving it up does not cancel the job.

    Attributes are read from the file at each access; KeyError if the job has been removed. `*_at`
    are Unix seconds or None; `waiting`, `duration` and `eta` are seconds.

    name, label: the function's stable name; a title for people, or None.
    status, phase: one of the seven; what refines it for people, or "".
    started_at: of the first attempt since creation or restart.
    waiting: from creation, or its due time, to the start, or until now.
    duration: of its attempts, together.
    attempt: the newest's number, 0 before the first.
    errors: failed attempts and descendants.
    run_by: the person that asked for it, or None.
    progress, eta: 0 to 1, and the time left; None if unknown.
    children: {"total", "done", "failed", "running"}, over all descendants.
    parent_id: None for a root.
    args, kwargs: a list and a dict, secret arguments masked.
    state: what its last checkpoint saved, or None.
    error: the newest failure's traceback, or None.
    operations: those that its status allows.

    Operations block until their commit. by= names the person that asks. They raise KeyError,
    InvalidOperation if the status does not allow them, StoreError if the file cannot be written.
    """

    name: str
    label: str | None
    status: str
    phase: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    waiting: float
    duration: float
    attempt: int
    errors: int
    low_priority: bool
    run_by: str | None
    progress: float | None
    eta: float | None
    children: dict[str, int]
    parent_id: int | None
    root_id: int
    args: list[Any]
    kwargs: Fields
    state: Any
    error: str | None
    operations: list[str]

    _state = "PENDING"
    _result: Any = None
    _exception: BaseException | None = None

    def __init__(self, backend: Core, job_id: int, created_at: float | None = None) -> None:
        self._backend, self.id = backend, job_id
        self._created_at = created_at  # until the submit is committed
        # Future.__init__ sets this, the three above, `_condition` and `_waiters`.
        self._done_callbacks: list[Function] = []

    def __getattr__(self, name: str) -> Any:
        if name in _MADE_LATE:  # few handles are waited on
            return vars(self).setdefault(name, _MADE_LATE[name](self))
        if name not in Job.__annotations__:
            raise AttributeError(f"a Job has no attribute {name!r}")
        return decode(dump(self.info()[name]))  # with the dates in a state

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *Job.__annotations__]

    def _row(self) -> Any:
        """Return the outcome, {} if the job is gone, None if it is not committed yet."""
        row = self._backend.outcome(self.id)
        if row is None:
            return {} if self._created_at is None else None
        if self._created_at not in (None, row["created_at"]):  # a rolled back job's id, reused
            return {}
        self._created_at = None
        return row

    def _stored(self) -> int:
        """Return the id. Raises KeyError if its transaction was rolled back."""
        if self._created_at is not None and self._row() == {}:
            raise KeyError(f"the transaction that submitted job {self.id} was rolled back")
        return self.id

    def info(self) -> Fields:
        """Return all attributes as JSON values."""
        return self._backend.info(self._stored())

    def logs(self, **filters: Any) -> list[Fields]:
        """Return the log lines {"id", "job_id", "at", "level", "message"}, oldest first.

        level= the least, a name or number. text= contained, in any case. regex= found. since=
        until= Unix seconds. after= a line's id. limit= at most, without `after` the newest.
        tree=True: all descendants', too. Raises ValueError.
        """
        return self._backend.logs(self._stored(), filters)

    # operations

    def stop(self, *, by: str | None = None) -> Job[_T]:
        """Have the job and its descendants stop at their next checkpoint."""
        return self._operate("stop", by)

    def resume(self, *, by: str | None = None) -> Job[_T]:
        """Let a stopped or failed job go on from its saved state."""
        return self._operate("resume", by)

    def force_stop(self, *, by: str | None = None) -> Job[_T]:
        """Make a stopping job stopped now. Its attempt can store nothing more."""
        return self._operate("force_stop", by)

    def restart(self, *, by: str | None = None) -> Job[_T]:
        """Run a finished or failed job from scratch, without its descendants."""
        return self._operate("restart", by)

    def set_low_priority(self, low_priority: bool = True, *, by: str | None = None) -> Job[_T]:
        """Set whether the job and its descendants wait for low load."""
        return self._operate("set_low_priority" if low_priority else "remove_low_priority", by)

    def cancel(self, *, by: str | None = None) -> bool:
        """Discard a pending or stopped job. Return whether it is cancelled; no InvalidOperation."""
        if self._state == "PENDING":
            with contextlib.suppress(InvalidOperation, StoreError):  # StoreError: shut down
                self._operate("cancel", by)
                return True
        return self.cancelled()

    @library_code
    def _operate(self, operation: str, by: str | None) -> Job[_T]:
        """Carry an operation out. Return this handle, or a new one if complete."""
        self.done()  # takes the outcome of a job that is over
        self._backend.operate(operation, self._stored(), by)
        return self if self._state == "PENDING" else Job(self._backend, self.id)

    # the Future part

    def done(self) -> bool:
        """Return whether the job is over."""
        return self._look() in OVER

    def running(self) -> bool:
        """Return whether the job is running or stopping."""
        return self._look() in ACTIVE

    def cancelled(self) -> bool:
        """Return whether the job has been cancelled."""
        return self._look() == CANCELLED

    def _look(self) -> str:
        """Return the status; complete the handle if the job is over."""
        if self._state != "PENDING":
            return self._end
        status = self._backend.status(self._stored())
        if status in OVER:
            self._complete()
        return status

    @library_code
    def result(self, timeout: float | None = None) -> _T:
        """Return what the function returned, once the job and all its descendants are over.

        timeout: seconds. Inside a job this is a checkpoint, and gives the worker's place away.
        Raises what the function raised (JobFailed if in another process), TimeoutError,
        CancelledError, inside a job JobStopped.
        """
        error = self.exception(timeout)
        if error is not None:  # an error may be false
            raise error
        return self._result  # type: ignore[no-any-return]

    @library_code
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the function raised, or None. Waits and raises as `result` does."""
        self._wait_for_end(timeout)
        return super().exception(0)

    def _wait_for_end(self, timeout: float | None, given_up: Function = bool) -> None:
        """Wait until the job is over, or `given_up()` at a notification."""
        if self.done():
            return
        self._watch()
        attempt, condition = current_attempt(), self._condition

        def over() -> bool:
            stops = attempt is not None and attempt.stop_requested
            return stops or self._state != "PENDING" or given_up()
        if attempt:
            attempt.wait_for(condition, over, timeout)
            attempt.raise_if_stopped()
        else:
            with condition:
                condition.wait_for(over, timeout)

    def __await__(self) -> Generator[Any, None, _T]:
        return self._await().__await__()

    async def _await(self) -> _T:
        """Await a future of the loop; inside a job, a thread waits and gives the place away.

        The interpreter would wait for an executor's at exit. wrap_future would cancel the job.
        """
        import asyncio
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def end() -> None:
            if not over.done():
                over.set_result(None)

        def tell(job: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(end)

        def wait() -> None:
            with contextlib.suppress(BaseException):  # result() raises it again
                self._wait_for_end(None, over.done)
            tell(self)
        if current_attempt():
            start_thread("bgjobs-await", contextvars.copy_context().run, wait)
        else:
            self.add_done_callback(tell)
        try:
            await over
        finally:
            if tell in self._done_callbacks:
                self._done_callbacks.remove(tell)
            with self._condition:
                self._condition.notify_all()  # the thread may be given up
        return self.result()

    @library_code
    def add_done_callback(self, fn: Function) -> None:
        """Call `fn(job)` once the job is over, in another thread, or at once."""
        super().add_done_callback(fn)
        self._watch()

    def _watch(self) -> None:
        if self._state == "PENDING":
            self._stored()
            self._backend.watch(self)

    @library_code
    def _complete(self, row: Any = None) -> None:
        """Take the outcome over, once, if the job is over; wake waiting threads."""
        if row is None:  # {} elsewhere: the thread that reads must not wait for itself
            row = self._row()
        status = FAILED if row == {} else row and row["status"]
        if status not in OVER:
            return
        with self._condition:
            if self._state != "PENDING":
                return
            try:
                if not row:
                    self._exception = BgjobsError(f"job {self.id} has been removed")
                elif status == FAILED:
                    self._exception = self._backend.error_of(self.id, row)
                else:
                    self._result = decode(row["result"])
            except Exception as error:  # else threads wait for good
                self._exception = BgjobsError(
                    f"job {self.id} is {status}, but its outcome cannot be read: {error}")
            self._end = status
            self._state, tell = _FUTURE_STATES[status]  # last: read without the lock
            for waiter in self._waiters:
                getattr(waiter, tell)(self)
            self._condition.notify_all()
        self._backend.call_back(self)

    def __repr__(self) -> str:
        try:
            return f"<Job {self.id} {self.name} {self.status}>"
        except (KeyError, BgjobsError):
            return f"<Job {self.id}>"


_MADE_LATE = {"_condition": lambda handle: HandleCondition(), "_waiters": _Waiters}
# By status: the state of the Future, and the method that tells a waiter.
_FUTURE_STATES = {FINISHED: (FUTURE_FINISHED, "add_result"),
                  FAILED: (FUTURE_FINISHED, "add_exception"),
                  CANCELLED: (CANCELLED_AND_NOTIFIED, "add_cancelled")}


def path_of(handle: Job[Any]) -> str:
    return handle._backend.path


class Handles:
    """The handles that wait for the ends of their jobs.

    The thread that commits an end completes them; another calls their callbacks.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.ends_missed = False  # look() is due
        self._lock = threading.Lock()  # guards the four below
        self.watched: dict[int, Any] = {}  # by job, a WeakSet
        self.held: set[Any] = set()  # with callbacks: live until these ran
        self._to_call_back: deque[Any] = deque()
        self._caller: Any = None

    def watch(self, handle: Job[Any]) -> None:
        """Complete a handle, if kept or with callbacks, when its job is over."""
        with self._lock:
            self.watched.setdefault(handle.id, weakref.WeakSet()).add(handle)
            if handle._done_callbacks:
                self.held.add(handle)

    def ids(self) -> list[int]:
        with self._lock:
            self.watched = {job_id: handles for job_id, handles in self.watched.items() if handles}
            return list(self.watched)

    def complete(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            for handle in list(self.watched.get(job_id, ())):
                try:
                    handle._complete()
                except Exception as error:  # the service thread looks again
                    self.ends_missed = True
                    self._store.complain(text_of(error))

    _ENDED = """SELECT value FROM json_each(:ids) WHERE NOT EXISTS (SELECT 1 FROM bgjobs_jobs
        WHERE id = value AND status IN ('pending', 'running', 'stopping', 'stopped'))"""

    def look(self) -> None:
        """Complete the handles of jobs that ended unnoticed."""
        self.ends_missed = False
        ids = self.ids()
        if ids:
            self.complete(row["value"] for row in self._store.read(
                self._ENDED, {"ids": json.dumps(ids)}))

    def completed(self, handle: Job[Any]) -> None:
        """Forget a complete handle; have its callbacks called in their thread."""
        with self._lock:
            handles = self.watched.get(handle.id, set())
            handles.discard(handle)
            if not handles:
                self.watched.pop(handle.id, None)
            self.held.discard(handle)
            if handle._done_callbacks:
                self._to_call_back.append(handle)
            if self._to_call_back and self._caller is None:
                with contextlib.suppress(RuntimeError):  # too many; the next end tries again
                    self._caller = start_thread("bgjobs-callbacks", self._call_back)

    def _call_back(self) -> None:
        while True:
            with self._lock:
                if not self._to_call_back:
                    self._caller = None
                    return
                handle = self._to_call_back.popleft()
            try:
                handle._invoke_callbacks()
            except BaseException:
                _log.exception("a callback of job %d failed", handle.id)

    def wait_for_callbacks(self) -> None:
        """Block until all callbacks have returned, unless inside one."""
        while self._caller not in (None, threading.current_thread()):
            time.sleep(0.002)

    def leave_to_parent(self) -> None:
        self._lock, self._caller = threading.Lock(), None


# ---- 12 Runner -------------------------------------------
#
# `Runner` is what an app uses. `Core` connects the parts behind it: the store, log lines, handles
# that wait for ends, and `Dispatch`. `Lifecycle` starts all that and takes it down.

SETTLE_SECONDS = 0.002  # that an outcome which is not awaited may wait for company
GRACE_SECONDS = 5.0  # that running jobs get to reach a checkpoint when the app goes down
STANDING_CLOCK_SECONDS = 5.0  # then drain() waits for no other time
LINES_A_JOB = 10_000  # log lines kept of a job, the newest, and up to a tenth more
LINES_A_WRITE = 2_000  # log lines that a transaction without outcomes takes
LOG_BUFFER = 20_000  # log lines that may wait to be written; more are counted, not kept
MEMORY_OF_EXCEPTIONS = 1_000
# Seconds that trees are kept once over, cancelled ones as finished.
RETENTION = {"finished": 7 * 86_400, "failed": 30 * 86_400}


class LogLines:
    """Log lines, and first starts for the statistics, that wait for a transaction.

    Any thread adds; only the leader writes. If a transaction fails, its lines stay.
    """

    def __init__(self) -> None:
        # (attempt, time or seconds waited, level, message; None for a start)
        self._waiting: list[tuple[Attempt, float, int, str | None]] = []
        self.dropped = 0  # lines, since that was last reported

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, attempt: Attempt, at: float, level: int, message: str | None) -> None:
        if message is None or len(self._waiting) < LOG_BUFFER:
            self._waiting.append((attempt, at, level, message))
        else:
            self.dropped += 1

    TRIM = """DELETE FROM bgjobs_logs WHERE job_id = :id AND id <= (SELECT id FROM bgjobs_logs
        WHERE job_id = :id ORDER BY id DESC LIMIT 1 OFFSET :keep)"""

    def write(self, tx: Transaction, owner: int, most: int) -> None:
        entries = self._waiting[:most]
        lines, long_logs = [], set()
        for attempt, at, level, message in entries:
            if message is None:
                tx.events[attempt.name, "started"].append(at)
                continue
            lines.append((attempt.id, at, level, message, attempt.number))
            attempt.lines += 1
            if not attempt.lines % (LINES_A_JOB // 10):
                long_logs.add(attempt.id)
        if lines:
            # One statement for all: a thread that computes holds each one up by the interpreter
            # lock. Lines of an attempt that has been superseded are refused.
            tx.execute("""INSERT INTO bgjobs_logs (job_id, at, level, message)
                SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
                json_extract(value, '$[2]'), json_extract(value, '$[3]') FROM json_each(:lines)
                WHERE EXISTS (SELECT 1 FROM bgjobs_jobs WHERE id = json_extract(value, '$[0]')
                AND attempt = json_extract(value, '$[4]') AND owner = :owner)""",
                       {"owner": owner, "lines": dump(lines)})
        for job_id in long_logs:
            tx.execute(self.TRIM, {"id": job_id, "keep": LINES_A_JOB})

        def forget() -> None:
            del self._waiting[:len(entries)]
        tx.after_commit.append(forget)


class Dispatch:
    """Takes jobs from the file to the workers, and their outcomes back.

    It rides along with transactions: log lines at the begin, before what operations log, outcomes
    and claims at the end.
    """

    def __init__(self, core: Core) -> None:
        self._core, self._store = core, core.store
        self._store.passenger, self.run_times = self, core.run_times
        self.pool = Pool(core.max_workers, self.execute, self.settle, core.store.flush)
        self.attempts: dict[int, Attempt] = {}  # claimed here, by job; only the leader changes it
        self.ended: deque[Attempt] = deque()  # until recorded; only the leader removes
        self._riding: list[Attempt] = []  # ended, and to be recorded now
        self._ended_at = 0.0  # monotonic; of the first of `ended`
        self._backlog = True  # more jobs may be ready, says the last claim
        self.claims = False  # jobs are claimed

    # in the leader's thread

    def begin(self, tx: Transaction) -> None:
        """Write log lines: all if outcomes, which come after them, ride along."""
        self._riding = list(self.ended)
        if self._core.lines:
            self._core.lines.write(tx, self._core.id,
                                   LOG_BUFFER if self._riding else LINES_A_WRITE)

    def end(self, tx: Transaction, flushing: bool) -> None:
        """Record outcomes, and claim jobs for free slots."""
        if self.pool.lingers and not flushing:
            return  # a worker flushes in a moment
        ended = self._riding
        if ended:
            tx.finish(ended)
        claimed = self._claim(tx) if self.claims else []
        if ended or claimed:
            tx.after_commit.append(lambda: self._hand_over(ended, claimed))

    def _claim(self, tx: Transaction) -> list[Attempt]:
        room = self.pool.room(self.run_times)
        enough_waits = (room.ahead < AHEAD_LIMIT // 2
                        or room.planned > AHEAD_SECONDS * room.workers / 2)
        if room.free <= 0 and enough_waits:  # claims are batched
            self._backlog = True
            return []
        claims = claim(tx, self._core.id, room, self.run_times)
        self._backlog = claims.more_ready or room.low_free <= 0
        if claims.cut_short:  # the jobs behind get the next transaction
            tx.after_commit.append(self._store.flush)
        return [Attempt(self._core, job, charge) for job, charge in claims.jobs]

    def _hand_over(self, ended: list[Attempt], claimed: list[Attempt]) -> None:
        """Forget ended attempts, and give the claims to the pool."""
        for attempt in ended:
            self.ended.popleft()
            self._forget(attempt)
        self._ended_at = time.monotonic()  # of those that came meanwhile
        for attempt in claimed:
            superseded = self.attempts.get(attempt.id)
            self.attempts[attempt.id] = attempt
            if superseded is not None:  # by another process, and resumed
                self.abandon(superseded)
        if claimed:
            self.pool.put(claimed, sum(self.run_times.occupies(each.name) for each in claimed))

    def _forget(self, attempt: Attempt) -> None:
        if self.attempts.get(attempt.id) is attempt:
            del self.attempts[attempt.id]

    def committed(self, tx: Transaction) -> None:
        if self._core.handles.watched:
            self._core.handles.complete(tx.over)

    def left_behind(self) -> None:
        """Have the service thread lead soon."""
        if self._core.service is not None:
            self._core.service.nudge()

    # in a worker's thread

    def execute(self, attempt: Attempt) -> None:
        """Run one attempt, unless it is to stop already. Never raises: the thread must live on."""
        if attempt.stop_requested:
            return
        try:
            function = function_of(attempt.name)
            executor = None if attempt.job.system else self.executor_of(function)
            if attempt.options.get("isolate"):
                executor = ISOLATED
            if function is None:
                attempt.outcome = UNKNOWN
            elif executor is None:
                self.execute_here(attempt, function)
            else:
                self._core.elsewhere.drive(attempt, function, executor)
        except BaseException as error:  # of a method of the job's own exception, say
            attempt.fail(error)

    def execute_here(self, attempt: Attempt, function: Function) -> None:
        self.note_start(attempt)
        perform(attempt, function)
        self.run_times.record(attempt.name, attempt.worked)

    def note_start(self, attempt: Attempt) -> None:
        """Count a job's first start for the statistics."""
        job = attempt.job
        if job.started_at is None and not job.system:
            waited = self._core.clock() - max(job.created_at, job.run_at or 0.0)
            self._core.lines.add(attempt, max(0.0, waited), 0, None)

    def executor_of(self, function: Any) -> Any:
        """Return the executor for a function's attempts, or None for the workers."""
        return declared.get(function, {}).get("executor", self._core.executor)

    def settle(self, attempt: Attempt) -> bool:
        """Queue an outcome. Return whether to commit it now, not within SETTLE_SECONDS."""
        if attempt.exception is not None and not attempt.ticket.void:
            self._core.remember_exception(attempt)
        if attempt.outcome != RETURNED:
            attempt.unsaved_progress = attempt.report_to_save()
        if not self.ended:
            self._ended_at = time.monotonic()
        self.ended.append(attempt)
        # A handle waits for it, or a ready job for the slot or the limit; or it has waited.
        watched = self._core.handles.watched
        awaited = bool(
            attempt.id in watched or attempt.has_children
            or watched and attempt.parent_id is not None
            or self._backlog and not self.pool.claimed
            or (attempt.job.max_running or math.inf) <= self.pool.size
            or time.monotonic() - self._ended_at > SETTLE_SECONDS and not self._store.leader)
        if not awaited:
            self.left_behind()
        return awaited

    # what is rare

    def give_back(self, claims: list[Attempt]) -> None:
        """Return claims that have not begun, as outcomes that count as no attempt."""
        if claims:
            self.ended.extend(claims)
            self._store.flush()

    def abandon(self, attempt: Attempt) -> None:
        """Give up an attempt that the file has superseded."""
        self._forget(attempt)
        attempt.supersede()
        self.pool.abandon(attempt)

    def compare(self, tx: Transaction) -> None:
        """Carry out on the attempts here what operations, in any process, did to their jobs.

        Find lost claims, too. While this thread leads, no claim and no outcome is under way; and no
        job is claimed again before its old attempt is abandoned.
        """
        jobs = {job.id: job for job in owned(tx, self._core.id)}
        # An outcome is queued before its attempt leaves the pool.
        here = {attempt.id for attempt in list(self.attempts.values())
                if self.pool.has(attempt) or attempt in self.ended}
        if self.claims:  # else drain() is about to execute one
            for job_id in jobs.keys() - here:
                take_back(tx, job_id, "its claim was lost", tx.now)

        def carry_out() -> None:
            for attempt in list(self.attempts.values()):
                job = jobs.get(attempt.id)
                if job is None or job.attempt != attempt.number:
                    self.abandon(attempt)
                    continue
                if job.status == STOPPING:
                    attempt.request_stop()
                else:
                    attempt.withdraw_stop()
                if job.low_priority != attempt.low_priority:
                    self.pool.set_low_priority(attempt, job.low_priority)
        tx.after_commit.append(carry_out)


def job_failed(job_id: int, row: Any) -> JobFailed:
    """Return the error of a job that failed in another process, from its `Core.outcome`."""
    return JobFailed(f"job {job_id} ({row['name']})", **json.loads(
        row["error"] or '{"type": "", "text": "", "traceback": ""}'))


class Core:
    """What a runner is made of, and what handles, submitters and attempts ask of it.

    In an executor's process a proxy answers, from `submit` to `keep_line`.
    """

    def __init__(self, face: Runner, store: Store, executor: Any,
                 callback: str | None) -> None:
        self.face, self.store, self.path, self.clock = face, store, store.path, store.clock
        self.max_workers, self.executor, self.callback = face.max_workers, executor, callback
        self.run_times = RunTimes(dict(map(tuple, store.read(
            "SELECT name, seconds FROM bgjobs_functions WHERE seconds IS NOT NULL"))))
        self.lines, self.handles = LogLines(), Handles(store)
        self.call_back = self.handles.completed
        self.dispatch = Dispatch(self)
        self._exceptions: dict[Any, BaseException] = {}  # by job and attempt, the oldest first
        self.schedules: dict[str, Any] = {}  # of this code, by key: what was asked
        self.id = 0  # this runner's, once it is registered
        self.inline = False  # it runs jobs in drain()
        self.shut = self.goes_down = False  # takes no jobs; and ends
        self._service_lock = threading.Lock()  # guards the making of the two below
        self.service: Service | None = None
        self.elsewhere_if_made: Any = None
        self.servers: list[Any] = []  # of the status page
        self.life = Lifecycle(self)  # last: it enters the runner in the file

    @property
    def elsewhere(self) -> Any:
        """Executes attempts in other processes; made when first needed."""
        with self._service_lock:
            if self.elsewhere_if_made is None:
                self.elsewhere_if_made = door("executor")(self, self.callback)
            return self.elsewhere_if_made

    def is_broken(self, name: str) -> bool:
        """Whether a function's executor took nothing lately."""
        executor = self.dispatch.executor_of(function_of(name))
        return executor is not None and bool(self.elsewhere.is_broken(executor))

    def leave_to_parent(self) -> None:
        self.handles.leave_to_parent()
        self.dispatch.attempts = {}
        self._service_lock, self.service = threading.Lock(), None
        if self.elsewhere_if_made is not None:
            self.elsewhere_if_made.leave_to_parent()

    def ensure_service(self) -> None:
        with self._service_lock:
            if self.service is None or not self.service.thread.is_alive():
                self.service = Service(self)

    # submitting

    def submit(self, new: Submission, connection: Any = None) -> Job[Any]:
        job_id = self._write_for(new, connection)(lambda tx: tx.submit(new))
        return Job(self, job_id, None if connection is None else new.created_at)

    def submit_many(self, new: Submission, arguments: list[str | None],
                    connection: Any = None) -> list[int]:
        return list(self._write_for(new, connection)(lambda tx: tx.submit_many(new, arguments)))

    def _write_for(self, new: Submission, connection: Any) -> Function:
        """Return what writes a submission. Raises RuntimeError if the runner is shut down."""
        if self.shut and new.author is None:
            raise RuntimeError("cannot schedule new futures after shutdown")
        new.submitter = self.id
        parent = self.dispatch.attempts.get(new.parent_id or 0)
        if parent is not None:
            parent.has_children = True
        if connection is None:
            return self.store.write
        return functools.partial(self.store.write_through, connection)

    # reading

    def status(self, job_id: int) -> str:
        """Raises KeyError if there is no such job."""
        row = self.outcome(job_id)
        if row is None:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        return str(row["status"])

    def info(self, job_id: int) -> Fields:
        for info in describe_jobs(self.store, [job_id]):
            return info
        raise KeyError(f"there is no job {job_id} in {self.path}")

    def logs(self, job_id: int, filters: Fields) -> list[Fields]:
        if not self.store.closed:
            self.write_lines()
        return read_logs(self.store, job_id, filters)

    def outcome(self, job_id: int) -> Any:
        """Return a dict with status, created_at, name, attempt, result and error, or None."""
        if 0 < job_id < 1 << 63:
            for row in self.store.read("""SELECT status, created_at, name, attempt, result, error
                    FROM bgjobs_jobs WHERE id = ?""", [job_id]):
                return {**row}  # other processes get it as JSON
        return None

    def find(self, filters: Fields, limit: int | None, before: int | None) -> list[int]:
        return find_jobs(self.store, filters, limit, before)[0]

    def remember_exception(self, attempt: Attempt) -> None:
        """Keep what a function raised for this process's handles."""
        error: Any = attempt.exception
        traceback.clear_frames(error.__traceback__)  # keeps the lines, not what they held
        self._exceptions[attempt.id, attempt.number] = error
        if len(self._exceptions) > MEMORY_OF_EXCEPTIONS:
            del self._exceptions[next(iter(self._exceptions))]

    def error_of(self, job_id: int, row: Any) -> BaseException:
        """Return a failed job's exception: its own if this process ran it, else JobFailed."""
        own = self._exceptions.get((job_id, row["attempt"]))
        return job_failed(job_id, row) if own is None else own

    # operating

    @library_code
    def operate(self, operation: str, job_id: int, by: str | None) -> None:
        """Apply an operation. Raises InvalidOperation, KeyError."""
        by = None if by is None else " ".join(text_of(by, 200).split())
        author = author_in(self)
        passed = threading.Event()
        for running in list(self.dispatch.attempts.values()):
            running.let_pass(passed)

        def run(tx: Transaction) -> None:
            operate(tx, operation, job_id, by, author)
            self.dispatch.compare(tx)
        try:
            self.store.write(run)
        except (KeyError, OverflowError):
            raise KeyError(f"there is no job {job_id} in {self.path}") from None
        finally:
            passed.set()

    # waiting

    @library_code
    def watch(self, handle: Job[Any]) -> None:
        self.handles.watch(handle)
        self.ensure_service()
        if self.dispatch.ended and not self.store.closed:
            self.store.flush()  # its outcome may wait for company
        self.handles.complete([handle.id])  # it may have ended before it was watched

    def wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool],
                    timeout: float | None) -> bool:
        """Return wait(timeout); meanwhile give the slot away, or run other jobs in drain()."""
        if not self.inline:
            self.dispatch.pool.leave(attempt)
            try:
                return wait(timeout)
            finally:
                self.dispatch.pool.come_back(attempt)
        begun = idle_since = time.monotonic()
        clock = self.clock()
        while not wait(0):
            now = time.monotonic()
            if timeout is not None and now >= begun + timeout:
                return False
            if self.run_one():
                idle_since = now
            elif now - idle_since > STANDING_CLOCK_SECONDS and self.clock() == clock:
                raise RuntimeError(f"job {attempt.id} waits for a job that is not due yet, and "
                                   "the clock of this runner stands")
            self.handles.look()
            wait(0.01)
        attempt.waited += time.monotonic() - begun
        return True

    def run_one(self) -> bool:
        """Run a ready job in this thread; return whether there was one."""
        def claim_one(tx: Transaction) -> Claims:
            run_schedules(tx)
            wake_due(tx)
            return claim(tx, self.id, Room(1, 1), self.run_times)
        for job, charge in self.store.write(claim_one).jobs:
            attempt = self.dispatch.attempts[job.id] = Attempt(self, job, charge)
            if attempt.options.get("timeout"):
                self.ensure_service()  # it watches the time
            self.dispatch.execute(attempt)
            self.dispatch.settle(attempt)
            self.store.flush()
            self.flush_reports()
            return True
        return False

    # reports of attempts

    def save(self, attempt: Attempt, state: str | None, positions: str | None) -> bool:
        return bool(self.store.write(lambda tx: tx.save_state(attempt, state, positions)))

    def keep_line(self, attempt: Attempt, at: float, level: int, message: str) -> None:
        """Log a line; it is in the file within a second."""
        if self.dispatch.attempts.get(attempt.id) is attempt:  # not superseded
            if self.inline and len(self.lines) >= LINES_A_WRITE:
                self.store.flush()  # in drain() no other thread writes them
            self.lines.add(attempt, at, level, message)

    def flush_reports(self) -> None:
        """Write progress, log lines, and what long attempts cost beyond their charge.

        Else their roots would look idle.
        """
        now, reports = time.monotonic(), []
        for attempt in list(self.dispatch.attempts.values()):
            if attempt.thread is not None:
                worked = int((now - attempt.begun - attempt.waited) * 1e6)
                charge = worked if worked > attempt.charge + 1_000_000 else None
                report = attempt.report_to_save()
                if report or charge:
                    reports.append((attempt, report, charge))
        if reports:
            def write(tx: Transaction) -> None:
                for each in reports:
                    tx.report(*each)
            self.store.write(write)
        self.write_lines()
        dropped, self.lines.dropped = self.lines.dropped, 0
        if dropped:
            say(logging.WARNING, f"{dropped:,} log lines of jobs were dropped: they came faster "
                                 "than the disk takes them")

    def write_lines(self) -> None:
        for _ in range(-(-len(self.lines) // LINES_A_WRITE)):
            self.store.write(lambda tx: None)


_MINE = """(submitter = :submitter OR
    (SELECT submitter FROM bgjobs_jobs r WHERE r.id = j.root_id) = :submitter)"""
# Executing, or ready. Each part has an index of its own.
_MY_UNFINISHED = f"""SELECT * FROM (SELECT id FROM bgjobs_jobs j WHERE status <> 'pending'
    AND status IN ('running', 'stopping') AND owner IS NOT NULL AND {_MINE} LIMIT 1)
    UNION ALL SELECT * FROM (SELECT id FROM bgjobs_jobs j WHERE status = 'pending'
    AND queue IS NOT NULL AND parent_id IS NOT NULL AND root_id > 0 AND {_MINE} LIMIT 1)
    UNION ALL SELECT * FROM (SELECT id FROM bgjobs_jobs j WHERE status = 'pending'
    AND queue IS NOT NULL AND parent_id IS NULL AND lane IS NOT NULL AND {_MINE} LIMIT 1)"""


class Lifecycle:
    """Registers a runner in the file, starts it, and takes it down."""

    def __init__(self, core: Core) -> None:
        self._core, self._store = core, core.store
        self.presence = Presence(core.path)
        self.started = False
        self._closing = threading.Lock()  # only one thread closes
        core.id = self._store.write(self._register)

    def _register(self, tx: Transaction) -> int:
        """Enter this runner in the file, with its lock held."""
        import socket
        while True:
            runner: int = tx.execute(
                """INSERT INTO bgjobs_runners (pid, host, workers, started_at, heartbeat_at)
                VALUES (?, ?, ?, ?, ?)""", [os.getpid(), socket.gethostname(),
                                            self._core.max_workers, tx.now, tx.now]).lastrowid
            if self.presence.appear(runner):
                return runner
            remove_runner(tx, runner)  # of a deleted file; the next id is higher

    def beat(self) -> None:
        """Show that this runner lives, at once if the number of abandoned threads changes."""
        self._store.write(lambda tx: tx.execute(
            """UPDATE bgjobs_runners SET heartbeat_at = :now, abandoned = :abandoned WHERE id = :id
            AND (abandoned <> :abandoned OR abs(heartbeat_at - :now) >= :each)""",
            {"now": tx.now, "abandoned": len(self._core.dispatch.pool.abandoned),
             "id": self._core.id, "each": HEARTBEAT_SECONDS}))

    def start(self) -> None:
        """Take back what dead processes left behind, and begin to claim jobs."""
        core = self._core
        if core.shut:
            raise RuntimeError(f"the runner on {core.path} is shut down; make a new one")
        if core.callback is not None:
            core.elsewhere.listen()  # now: later nobody would hear an error
        capture_log_records()
        self.recover_dead()
        self.started = core.dispatch.claims = True
        core.ensure_service()
        self._store.flush()

    def recover_dead(self) -> None:
        """Take back the jobs of runners that died or have no row."""
        for runner, silent in self._store.read("""
                SELECT id, ? - heartbeat_at FROM bgjobs_runners WHERE id <> ? UNION ALL
                SELECT DISTINCT owner, 9e999 FROM bgjobs_jobs WHERE owner IS NOT NULL
                AND status IN ('running', 'stopping') AND status <> 'pending'
                AND owner NOT IN (SELECT id FROM bgjobs_runners)""",
                                             [self._core.clock(), self._core.id]):
            if self.presence.is_dead(runner, silent):
                taken = self._store.write(lambda tx: recover(tx, runner))
                self.presence.remove(runner)
                if taken:
                    say(logging.WARNING, f"took back {taken:,} jobs of a process that died")

    # going down

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        """Take no more jobs; see `Runner.shutdown`."""
        core, mine = self._core, {"submitter": self._core.id}
        core.shut = True
        with contextlib.suppress(StoreError):
            for row in self._store.read(
                    f"SELECT id FROM bgjobs_jobs j WHERE status = 'pending' AND {_MINE} "
                    "ORDER BY id", mine) if cancel_futures else ():
                with contextlib.suppress(InvalidOperation, KeyError):
                    core.operate("cancel", row["id"], None)
            if self.started:
                if not wait:
                    start_thread("bgjobs-shutdown", self.shutdown, True, False)
                    return
                while self._store.read(_MY_UNFINISHED, mine):
                    time.sleep(0.01)
                core.handles.wait_for_callbacks()
            self.close(time.monotonic() + GRACE_SECONDS)

    def close(self, until: float) -> None:
        """Go down; running jobs have until then (monotonic) to reach a checkpoint."""
        self._store.close_by = min(self._store.close_by, until)
        with self._closing:
            if not self._store.closed:
                self._close()

    def pause(self) -> None:
        """Claim nothing more; ask running jobs to pause at a checkpoint."""
        self._core.shut = self._core.goes_down = True
        self._core.dispatch.claims = False
        for attempt in list(self._core.dispatch.attempts.values()):
            attempt.request_stop(RELEASED)

    def save_means(self) -> None:
        """Write recent run times, for other processes and the next start."""
        means = self._core.run_times.take_changed()
        if means:
            self._store.write(lambda tx: tx.executemany(
                "INSERT OR REPLACE INTO bgjobs_functions (name, seconds) VALUES (?, ?)", means))

    def _close(self) -> None:
        core, dispatch = self._core, self._core.dispatch
        self.pause()
        with contextlib.suppress(StoreError):
            self._store.write(lambda tx: None)  # the leader may be claiming still
            self.pause()  # what was claimed meanwhile
            dispatch.give_back(dispatch.pool.take_back())
            while dispatch.attempts and time.monotonic() < self._store.close_by:
                time.sleep(0.005)
            core.flush_reports()
            self.save_means()

        def leave(tx: Transaction) -> None:
            for job in owned(tx, core.id):
                take_back(tx, job.id, "its process was closed", tx.now)
            remove_runner(tx, core.id)
            tx.after_commit += [self.presence.release, lambda: self.presence.remove(core.id)]
        self._store.close(leave)
        if core.elsewhere_if_made is not None:
            core.elsewhere_if_made.close()
        for server in core.servers:
            server.shutdown()
            server.server_close()
        if core.service is not None:
            core.service.end()
        self.presence.release()  # if that write has failed
        dispatch.pool.close(0.2)
        core.handles.held.clear()  # else their callbacks are waited for
        # They were given back: other processes may execute their jobs now.
        for attempt in list(dispatch.attempts.values()):
            attempt.supersede()

    def leave_to_parent(self) -> None:
        self._store.leave_to_parent()
        self.presence.release()
        self._core.leave_to_parent()
        self.started, self._closing = False, threading.Lock()


class Submitter:
    """Submits with options, as `options()` returns it. A runner is one, too."""

    def __init__(self, core: Callable[[], Core], options: Fields) -> None:
        self._find_core, self._options = core, check_options(options)
        if "executor" in options:
            raise TypeError("executor is an option of a function, @job(executor=...), or of "
                            "start(); it cannot be stored with a job")

    @overload  # a coroutine is run to its value
    def submit(self, fn: Callable[_P, Coroutine[Any, Any, _T]], /,
               *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]: ...
    @overload
    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]: ...

    def submit(self, fn: Function, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Store a job that calls `fn(*args, **kwargs)`; return its handle after the commit.

        Inside a job it is a child of that job. Raises TypeError for a function or arguments that
        cannot be stored, RuntimeError after shutdown, JobStopped if the job around it is to stop.
        """
        backend = self._find_core()
        new = new_submission(backend, fn, self._options, args, kwargs)
        return backend.submit(new, self._options.get("connection"))

    def submit_many(self, fn: Function,
                    argument_tuples: Iterable[tuple[Any, ...]]) -> list[int]:
        """Store a job `fn(*arguments)` for each tuple; return the ids, in order.

        In transactions of at most 10,000; an error says how many were stored.
        """
        backend = self._find_core()
        new = new_submission(backend, fn, self._options)
        if new.key is not None:
            raise ValueError("a key names one job; it cannot be an option of submit_many")
        ids: list[int] = []

        def encode_tuple(args: Any) -> str | None:
            if not isinstance(args, tuple):
                raise TypeError(f"submit_many takes tuples of arguments, got {short(args)}; write "
                                "(value,) for a single argument")
            return encode(args, f"the arguments of {new.name}") if args else None
        encoded = map(encode_tuple, argument_tuples)
        try:
            while batch := list(itertools.islice(encoded, 10_000)):
                ids += backend.submit_many(new, batch, self._options.get("connection"))
            return ids
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else BgjobsError
            raise kind(f"{text_of(error)} ({len(ids):,} jobs were stored before)") from error

    def map(self, fn: Callable[..., _T], *iterables: Iterable[Any], timeout: float | None = None,
            chunksize: int = 1, buffersize: int | None = None) -> Iterator[_T]:
        """Submit `fn(*arguments)` for each tuple of zip(*iterables); yield the results, in order.

        timeout: seconds from now to the last result, else TimeoutError. chunksize is ignored.
        buffersize: submit only so many now, and one for each result taken. Pending jobs are
        cancelled when the iterator raises or is closed.
        """
        check_values({"buffersize": buffersize}, _ARGUMENTS)
        submissions = (self.submit(fn, *arguments) for arguments in zip(*iterables))
        jobs = deque(itertools.islice(submissions, buffersize))
        return _results(jobs, submissions, None if timeout is None else time.monotonic() + timeout)

    def every(self, schedule: float | str, fn: Callable[_P, Any], /,
              *args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        """Submit `fn(*args, **kwargs)` again and again, once each time over all processes.

        schedule: seconds, "15m" (s, m, h, d, w), or five cron fields, in the time zone of the
        option tz. Known by the option key, else by function and arguments: to register it at each
        start changes its times alone, if they differ. Times missed while no process ran are made up
        once; one at which its last job is not over is skipped. Raises ValueError for a bad
        schedule, or one that this code has at other times (give each a key), TypeError as submit.
        """
        return register(self._find_core(), schedule, fn, args, kwargs, self._options)

    def options(self, **options: Any) -> Submitter:
        """Return a Submitter with more options: `options(label="Nightly").submit(export, "users")`.

        name: stable identity of the function; else its import path.
        label: a title for people.
        run_by: who asked for it; else as the parent.
        low_priority: run in periods of low load; else as the parent.
        system: housekeeping, hidden by default.
        key: at the root: while a job with this key is not over, submit returns that one; in a
            child: unique within the parent for good.
        delay: seconds to wait.
        run_at: or when to run, in Unix seconds or an aware datetime.
        retries: attempts after an exception; by default 0.
        backoff: the pause before each: seconds, a list of them (the last one repeats), or a
            function of the attempt, called at submit; else 1 s, doubled up to 10 min, and up to
            half as long again by chance.
        timeout: seconds of one attempt; then it is stopped, 5 s later by force: TimeoutError.
        max_running: attempts of this name at once, over all processes; its ancestors do not count.
        stoppable: False: stays stopping until it ends.
        restartable: False: refuses restart.
        recover: False: an attempt cut off by a crash fails (at most once).
        isolate: each attempt in a process of its own, which force stop and timeout kill.
        tz: the time zone of `every`; else the machine's.
        secret: names of arguments that people do not see.
        parent: a Job to become its child; None: a root, also from inside a job.
        connection: an open sqlite3.Connection to the file: the job exists if and only if its
            transaction commits; until then the handle tells its id alone.

        Raises TypeError for an unknown option, ValueError for a bad value. executor: see `job`.
        """
        return Submitter(self._find_core, {**self._options, **options})


def author_in(backend: Core) -> tuple[int, int] | None:
    """Return the job and attempt that this is called in, if of this runner."""
    attempt = current_attempt()
    if attempt is None or attempt.backend is not backend:
        return None
    return attempt.id, attempt.number


# Option of a job -> what its column stores.
_text = functools.partial(text_of, limit=500)
_COLUMNS: dict[str, Function] = {
    "name": _text, "label": _text, "run_by": _text, "key": _text, "run_at": unix_seconds,
    "low_priority": int, "system": int, "max_running": int}


def new_submission(backend: Core, fn: Function, options: Fields,
                   args: Any = (), kwargs: Any = None) -> Submission:
    """Raises as `Submitter.submit`."""
    attempt = current_attempt()
    if attempt is None and serves_attempts():
        raise RuntimeError(
            f"{text_of(fn)} was submitted while its module was imported in the process of an "
            'isolated attempt: put the calls that start the app below `if __name__ == "__main__":`')
    new = Submission(name_of(fn))
    given = {**declared[fn], **options} if fn in declared else options
    if given:
        for name, stored in _COLUMNS.items():
            if given.get(name) is not None:
                setattr(new, name, stored(given[name]))
        if "name" in given:
            functions.setdefault(new.name, fn)
        if given.get("isolate"):
            door("isolate")
        if new.run_at is None and given.get("delay"):
            new.run_at = backend.clock() + given["delay"]
        kept = options_to_keep(fn, given)
        if kept:
            new.options = dump(kept)
        if given.get("parent") is not None:
            new.parent_id = given["parent"].id
            path = path_of(given["parent"])
            if os.path.realpath(path) != os.path.realpath(backend.path):
                raise ValueError(f"{given['parent']!r} is in {path}; it takes no children from "
                                 f"{backend.path}")
    if attempt is not None:
        new.author = author_in(backend)
        if new.author is not None:
            attempt.raise_if_stopped()
            if "parent" not in given:
                new.parent_id = attempt.id
    if args:
        new.args = encode(args, f"the arguments of {new.name}")
    if kwargs:
        new.kwargs = encode(kwargs, f"the arguments of {new.name}")
    return new


def _results(jobs: deque[Job[_T]], submissions: Iterator[Job[_T]],
             deadline: float | None) -> Iterator[_T]:
    try:
        while jobs:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            result = jobs[0].result(left)
            jobs.popleft()
            jobs.extend(itertools.islice(submissions, 1))
            yield result
            del result
    finally:
        if jobs:  # in a thread: the garbage collector may come here under any lock
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                start_thread("bgjobs-cancel", lambda: [job.cancel() for job in jobs])


ISOLATED = "isolated"  # stands for the executor of attempts with isolate=True
# Set in the process of an isolated attempt: it runs no jobs, whatever the app's modules start.
_serves_attempts = threading.Event()
serve_one_attempt, serves_attempts = _serves_attempts.set, _serves_attempts.is_set


# Argument of Runner or `map` -> test, in words.
_ARGUMENTS: dict[str, tuple[Function, str]] = {
    "executor": OPTIONS["executor"],
    "callback": (lambda v: re.fullmatch(r".+:\d+", v), '"host:port"'),
    "max_workers": (lambda v: type(v) is int and 0 < v < 1 << 31, "greater than 0"),
    "buffersize": (lambda v: type(v) is int and v > 0, "None or greater than 0"),
    "durability": (("process", "power").__contains__, '"process" or "power"'),
    "journal": (("wal", "delete").__contains__, '"wal" or "delete"'),
    "retention": (lambda v: set(v) <= set(RETENTION) and are_seconds(v.values()),
                  f"None or a dict of seconds for {', '.join(RETENTION)}"),
}


class RunnerFace(Submitter):
    """What a runner offers in every process, an executor's too."""

    def get(self, job_id: int) -> Job[Any]:
        """Return the handle of a job. Raises KeyError if there is none."""
        if type(job_id) is not int:
            raise TypeError(f"a job id is an int, got {short(job_id)}")
        backend = self._find_core()
        backend.status(job_id)
        return Job(backend, job_id)

    def jobs(self, /, *, limit: int | None = 100, before: int | None = None,
             **filters: Any) -> list[Job[Any]]:
        """Return the jobs that pass the filters, newest first; all of them with limit=None.

        Filters: status= name= run_by= errors= low_priority= q= parent= system= created_from=
        created_to= (see `conditions`). before: ids below. Raises ValueError for a bad value.
        """
        backend = self._find_core()
        return [Job(backend, job_id) for job_id in backend.find(filters, limit, before)]


class Runner(RunnerFace, Executor):
    """Runs the jobs of one file on threads of this process; a complete futures Executor.

    path: the SQLite file ($BGJOBS_DB, else "bgjobs.db"); it may be the app's own.
    max_workers: attempts at once (cores + 4, at most 32, or the executor's).
    start: False: submits, reads and operates, but runs nothing until start().
    durability: "process" survives the death of the process, "power" a power cut, too.
    journal: "wal", or "delete", slower, for SQLite's rollback journal.
    retention: seconds that whole trees are kept once they are over, by default {"finished": 7 days,
        "failed": 30 days}; cancelled ones as finished; None keeps everything.
    modules: names of modules to import, whose functions jobs may name.
    executor: where functions execute instead, a concurrent.futures.Executor, or a class or function
        that makes one: then a broken one is replaced.
    callback: "host:port" of this machine, where an executor's workers on others reach it.
    clock: returns Unix seconds.

    Raises ValueError for a bad value, StoreError or OSError for an unusable file or callback.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *,
                 max_workers: int | None = None, start: bool = True, durability: str = "process",
                 journal: str = "wal", retention: Mapping[str, float] | None = RETENTION,
                 modules: Iterable[str] = (), executor: Any = None, callback: str | None = None,
                 clock: Callable[[], float] = time.time) -> None:
        if max_workers is None:
            cores = getattr(os, "process_cpu_count", os.cpu_count)()
            max_workers = getattr(executor, "_max_workers", min(32, (cores or 1) + 4))
        check_values({"executor": executor, "callback": callback, "max_workers": max_workers,
                      "durability": durability, "journal": journal, "retention": retention},
                     _ARGUMENTS)
        if executor is not None:
            door("executor")
        for module in modules:
            __import__(module)
        Submitter.__init__(self, lambda: self.core, {})
        self.max_workers = self._max_workers = max_workers
        self._retention = None if retention is None else {**RETENTION, **retention}
        if path is None:
            path = os.environ.get("BGJOBS_DB", "bgjobs.db")
        self._file = path, durability, journal, clock
        self._elsewhere = executor, callback
        self._open()
        register_hooks()
        living.add(self)
        if start:
            try:
                self.start()
            except BaseException:
                self.close(0)
                raise

    def _open(self) -> None:
        store = Store(*self._file)
        try:
            self.core = Core(self, store, *self._elsewhere)
        except BaseException:
            store.close()
            raise
        self.path = store.path

    @library_code
    def start(self) -> Runner:
        """Take back what a dead process left behind, and begin to run jobs. Return the runner.

        In a forked child it opens the file anew; in the process of an isolated attempt it does
        nothing. Raises OSError if the callback address cannot be used.
        """
        if not serves_attempts():
            if self.core.store.forked:
                self._open()
            if not self.core.life.started:
                self.core.life.start()
                keep_house(self, self._retention)
        return self

    def schedules(self, system: bool = False) -> list[Schedule]:
        """Return the schedules in the file, also those that no code has any more.

        system: the library's, too.
        """
        return [Schedule(self.core, row["id"])
                for row in self.core.store.read(SCHEDULES, {"system": system})]

    def drain(self) -> int:
        """Run what is ready in this thread until nothing is; return how many attempts ran.

        For an app's tests. Raises RuntimeError if the runner has been started.
        """
        core = self.core
        if core.life.started:
            raise RuntimeError("drain() is for a runner made with start=False; this one runs its "
                               "jobs itself")
        capture_log_records()
        core.life.recover_dead()
        core.store.write(clock_was_set_back)  # a clock for tests may have been
        core.inline = True
        try:
            return sum(iter(core.run_one, False))
        finally:
            core.inline = False

    def stats(self, window: str = "24h", name: str | None = None) -> Fields:
        """Return what was counted in a window: "1h", "24h", "7d" or "30d", without system jobs.

        name: of one function. {"window", "name", "from", "to", "parts": [{"at", "created",
        "started", "finished", "failed", "waiting", "running"}], "total": the same over all,
        "functions": [the same for each "name"]}. from, to, at: Unix seconds. waiting, from creation
        or due time to start, and running, until the end: {"avg", "min", "max"} in seconds, or None.
        """
        return read_statistics(self.core, window, name)

    def prune(self, finished: float = RETENTION["finished"],
              failed: float = RETENTION["failed"]) -> int:
        """Remove whole trees that have been over for so many seconds; return how many jobs.

        Cancelled ones count as finished. In short transactions with checkpoints between.
        """
        return remove_expired(self.core, finished, failed)

    def backup(self, path: str | os.PathLike[str]) -> str:
        """Copy the job file as it is at this moment, while it is in use; return the path.

        A plain copy would miss the -wal file. Raises ValueError if the path exists.
        """
        path = os.path.abspath(path)
        self.core.store.file.backup(path)
        return path

    def serve(self, /, host: str = "127.0.0.1", port: int = 8765, **options: Any) -> str:
        """Serve the status page in a thread of its own; return its URL. port=0 takes a free one.

        read_only: without operations.
        password: asked for by the browser (HTTP Basic; use TLS on a network).
        authorize: a function of the request's WSGI environ that returns the user's name, or None to
            refuse. The job log's `by` has that name, or the one given with the password.
        hosts: the names by which it is reached, besides the machine's own and its addresses.

        Raises ValueError for a host other than loopback without password or authorize. If the port
        is taken, it logs a warning and returns "": jobs go on.
        """
        return "" if serves_attempts() else door("serve")(self.wsgi(**options), host, port)

    def wsgi(self, /, **options: Any) -> Any:
        """Return the status page as a WSGI app, to mount under any prefix of the app's own server.

        Options as for `serve`. Without password and authorize, the app decides who may see it, and
        hosts names what it answers to besides loopback (["example.org"]).
        """
        return door("wsgi")(self.core, **options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, and close once none is left. wait: return after that.

        That is: no job submitted through this runner, nor a descendant of one, is ready or running.
        cancel_futures: cancel those that are pending.
        """
        self.core.life.shutdown(wait, cancel_futures)

    @library_code
    def close(self, timeout: float = GRACE_SECONDS) -> None:
        """Go down: running jobs pause at their next checkpoint and go back to pending.

        The next start continues from their state. timeout: seconds until those without a checkpoint
        are given back, too; what they still do changes nothing in the file.
        """
        self.core.life.close(time.monotonic() + timeout)


# ---- 13 Clock, processes and exit ------------------------

POLL_SECONDS = 0.05  # how often the service thread looks for what other processes wrote


class Service:
    """The background thread: due times, other processes' changes, reports, recovery."""

    _soon = False  # it leads soon
    _version = -1  # of the file, when last polled
    _others_version = -1  # without our own commits
    _due_at = math.inf  # of the next job or schedule

    def __init__(self, core: Core) -> None:
        self._core, self._store = core, core.store
        self._event = threading.Event()  # ends the sleep
        self._clock_at = core.clock()  # when last polled
        dispatch, life = core.dispatch, core.life
        # When the duties of a started runner were last done, each with its period in seconds.
        self._done_at: dict[Any, float] = dict.fromkeys((
            (0.0, dispatch.pool.put), (0.0, self._wake_due), (FLUSH_SECONDS, core.flush_reports),
            # Jobs are claimed behind attempts that may turn out long.
            (0.0, lambda: dispatch.give_back(dispatch.pool.take_back(5 * AHEAD_SECONDS))),
            (0.5, life.recover_dead), (1.0, life.beat), (1.0, life.save_means),
            (1.0, self._unpark), (1.0, lambda: core.store.write(dispatch.compare)),
            (10.0, core.handles.look),  # if Ctrl-C has hit the thread that tells of ends
            (60.0, core.store.file.shorten_wal), (60.0, lambda: count_created(core))),
            time.monotonic())
        self.thread = start_thread("bgjobs-service", self._run)

    def end(self) -> None:
        """Wait a little for the thread's end, unless it still watches handles."""
        self._event.set()
        if self.thread is not threading.current_thread() and not self._core.handles.ids():
            self.thread.join(0.8)

    def nudge(self) -> None:
        """Lead a transaction in SETTLE_SECONDS."""
        if not self._soon:
            self._soon = True
            self._event.set()

    def _run(self) -> None:
        store, handles, next_poll = self._store, self._core.handles, 0.0
        while not store.closed or handles.watched:
            self._event.wait(max(0.0, next_poll - time.monotonic()))
            self._event.clear()
            try:
                if self._soon:
                    time.sleep(SETTLE_SECONDS)
                    self._soon = False
                    store.flush()
                if time.monotonic() >= next_poll:
                    next_poll = time.monotonic() + POLL_SECONDS
                    if store.closed:
                        handles.look()
                    else:
                        self._poll()
                    left = self._due_at - self._core.clock()
                    if 0 < left < POLL_SECONDS:
                        next_poll = time.monotonic() + left
            except Exception as error:
                if not store.closed:
                    store.complain(f"{error}; trying again")
                    time.sleep(0.2)

    def _poll(self) -> None:
        version = self._store.version()
        if version != self._version:
            self._store.write(self._see_others)
            self._due_at = self._store.read(
                f"SELECT min(at) FROM (SELECT ({NEXT_DUE}) AS at UNION ALL "
                f"SELECT ({NEXT_SCHEDULE}))")[0][0] or math.inf
            self._version = version
        if self._core.handles.ends_missed:
            self._core.handles.look()
        self._time_out()
        if self._core.life.started:
            for (seconds, do), done_at in self._done_at.items():
                if time.monotonic() - done_at >= seconds:
                    self._done_at[seconds, do] = time.monotonic()
                    do()

    # its duties

    def _see_others(self, tx: Transaction) -> None:
        others = tx.value("PRAGMA data_version")  # here our own commits do not change it
        if others != self._others_version:
            self._others_version, self._core.handles.ends_missed = others, True
            self._core.dispatch.compare(tx)

    def _time_out(self) -> None:
        """Stop the attempts past their timeout; abandon those that go on after the grace."""
        for attempt in list(self._core.dispatch.attempts.values()):
            if attempt.thread is None:
                continue
            timeout = attempt.options.get("timeout", math.inf)
            late = time.monotonic() - attempt.begun - timeout
            if late > GRACE_SECONDS and attempt.reason == TIMED_OUT:
                self._store.write(functools.partial(self._fail_late, attempt))
            elif late > 0 and attempt.reason == HALTED:
                attempt.request_stop(TIMED_OUT, force=True)

    def _fail_late(self, attempt: Attempt, tx: Transaction) -> None:
        lost = copy.copy(attempt)
        lost.ran = time.monotonic() - attempt.begun
        lost.time_out()
        if tx.end(lost):
            self._core.remember_exception(lost)
            tx.after_commit.append(lambda: self._core.dispatch.abandon(attempt))

    def _wake_due(self) -> None:
        before, self._clock_at = self._clock_at, self._core.clock()
        if self._clock_at < before - 1.0:
            self._store.write(clock_was_set_back)
        if self._due_at <= self._clock_at:
            if not self._core.shut:
                self._store.write(run_schedules)
            self._store.write(wake_due)

    BLOCKED_KEYS = """WITH RECURSIVE keys(found) AS
        (SELECT min(parked) FROM bgjobs_jobs WHERE parked IS NOT NULL UNION ALL
        SELECT (SELECT min(parked) FROM bgjobs_jobs WHERE parked > found) FROM keys
        WHERE found IS NOT NULL) SELECT found FROM keys WHERE found IS NOT NULL"""

    def _unpark(self) -> None:
        """Unblock the jobs whose function is known here, or whose limit has room."""
        for (key,) in self._store.read(self.BLOCKED_KEYS):
            kind, _, name = key.partition(" ")
            if kind in ("limit", "suspect"):
                self._store.write(lambda tx: unblock(tx, key))
            elif function_of(name) is not None and not self._core.is_broken(name):
                while self._store.write(lambda tx: unpark(tx, key)):
                    pass


class Presence:
    """Tells which runners on a file live, by a lock of the system that dies with the process.

    Runner N locks PATH-bgjobs-N.lock as long as it lives, even if suspended. A probe of the own
    lock finds it held, so two copies of this module in one process do no harm. A forked child
    closes the lock that it inherits.
    """

    _lock: int | None = None  # descriptor

    def __init__(self, path: str) -> None:
        self._path = os.path.realpath(path)

    def _file(self, runner: int) -> str:
        return f"{self._path}-bgjobs-{runner}.lock"

    def appear(self, runner: int) -> bool:
        """Take the lock of a new runner; return False if it is taken."""
        try:
            self._lock = _lock_file(self._file(runner), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StoreError(f"cannot lock {self._file(runner)}: {error}; use a local "
                             "disk") from error
        return self._lock is not None

    def is_dead(self, runner: int, silent: float) -> bool:
        """Return whether the process of a runner is gone.

        silent: seconds since its heartbeat, which decide if the lock file was deleted.
        """
        with fork_gate:  # a child would inherit the lock
            try:
                lock = _lock_file(self._file(runner), os.O_RDONLY)
            except FileNotFoundError:
                return silent > 3 * HEARTBEAT_SECONDS
            if lock is not None:
                os.close(lock)
            return lock is not None

    def remove(self, runner: int) -> None:
        with contextlib.suppress(OSError):
            os.remove(self._file(runner))

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock_file(path: str, flags: int) -> int | None:
    """Open and lock a file until it is closed; return None if it is locked."""
    descriptor = os.open(path, flags, 0o644)
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None


living: weakref.WeakSet[Runner] = weakref.WeakSet()


@functools.cache
def register_hooks() -> None:
    """Close the living runners at exit, and leave them to the parent at a fork."""
    atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=fork_gate.shut, after_in_parent=lambda: fork_gate.door.release(),
                            after_in_child=leave_to_parent)


def _close_all() -> None:
    until = time.monotonic() + GRACE_SECONDS
    lives = [runner.core.life for runner in list(living)]
    for life in lives:
        life.pause()
    for life in lives * 3:  # again if Ctrl-C cuts it short, then without waiting
        try:
            life.close(until)
        except KeyboardInterrupt:
            until = 0.0


def leave_to_parent() -> None:
    fork_gate.__init__()  # type: ignore[misc]
    _here.ticket = None
    for runner in list(living):
        if runner.core.store.pid != os.getpid():
            runner.core.life.leave_to_parent()


# ---- 14 Schedules ----------------------------------------
#
# A schedule is a row: a call, and the times at which to make a job of it. Code registers it at each
# start. Once no living process has it, it makes no more jobs, but people still see it. The
# transaction that submits a job moves `next_at` past the present. So each time makes one job,
# whichever process looks first, and all missed times make one together.

_JOB_COLUMNS = ("name", "args", "kwargs", "options", "label", "run_by", "low_priority", "system",
                "max_running")
SCHEDULE = """SELECT s.*,
    EXISTS (SELECT 1 FROM bgjobs_registered WHERE schedule_id = s.id) AS registered,
    (SELECT status FROM bgjobs_jobs WHERE id = s.job_id) AS job_status FROM bgjobs_schedules s"""
SCHEDULES = SCHEDULE + " WHERE system <= :system ORDER BY system, name, id"
ONE_SCHEDULE = SCHEDULE + " WHERE id = :id"
NEXT_SCHEDULE = """SELECT min(next_at) FROM bgjobs_schedules WHERE paused = 0
    AND id IN (SELECT schedule_id FROM bgjobs_registered)"""


def _rows(tx: Transaction, sql: str, **parameters: Any) -> list[sqlite3.Row]:
    cursor = tx.execute(sql, parameters)
    cursor.row_factory = sqlite3.Row
    return list(cursor)


def _next_time(row: sqlite3.Row, now: float) -> float:
    """Return when a schedule is due next: its `next_at` if the data of its zone is not here."""
    due: float = row["next_at"]
    try:
        times = schedule_of(row["schedule"], row["zone"])
    except ValueError:
        return due
    return min(times.next(due, now), times.next(now, now))


def _make_job(tx: Transaction, row: sqlite3.Row, next_at: float) -> int | None:
    """Set `next_at` and submit a job; return None if the last one is not over."""
    job = None
    if row["job_status"] in (None, *OVER):
        job = tx.submit(Submission(**{name: row[name] for name in _JOB_COLUMNS}))
    tx.execute("""UPDATE bgjobs_schedules SET next_at = :next_at, last_at = :now,
        job_id = ifnull(:job, job_id), runs = runs + (:job IS NOT NULL),
        skipped = skipped + (:job IS NULL) WHERE id = :id""",
               {"id": row["id"], "job": job, "now": tx.now, "next_at": next_at})
    return job


def run_schedules(tx: Transaction) -> None:
    for row in _rows(tx, SCHEDULE + " WHERE next_at <= :now AND paused = 0 AND registered",
                     now=tx.now):
        next_at = _next_time(row, tx.now)
        if next_at > tx.now:
            _make_job(tx, row, next_at)


def clock_was_set_back(tx: Transaction) -> None:
    """Let no schedule wait until the clock has caught up."""
    for row in _rows(tx, SCHEDULE + " WHERE registered"):
        tx.execute("UPDATE bgjobs_schedules SET next_at = min(next_at, ?) WHERE id = ?",
                   [_next_time(row, tx.now), row["id"]])


def describe_schedule(row: sqlite3.Row) -> Fields:
    info = dict(row)
    info |= shown_arguments(row, kept_options(info.pop("options")))
    info["tz"] = info.pop("zone")
    for name in ("low_priority", "system", "paused", "registered"):
        info[name] = bool(info[name])
    if info["paused"] or not info["registered"]:
        info["next_at"] = None
    return info


class Schedule:
    """A schedule in the file, as `every` returns it. Methods raise KeyError once it is removed."""

    def __init__(self, core: Core, schedule_id: int) -> None:
        self._core, self.id = core, schedule_id

    def info(self) -> Fields:
        """Return all that is known of it, as JSON values; times in Unix seconds.

        registered: a living process has it in its code, else it makes no jobs. skipped: how often
        its last job was not over when it was due.
        """
        return describe_schedule(self._found(
            self._core.store.read(ONE_SCHEDULE, {"id": self.id})))

    def pause(self) -> Schedule:
        """Make no jobs, in any process, until it is resumed."""
        return self._set_paused(True)

    def resume(self) -> Schedule:
        """Go on with the next time; those in the pause are not made up for."""
        return self._set_paused(False)

    def run_now(self) -> Job[Any]:
        """Submit its job now; its times stay. Raises InvalidOperation if the last is not over."""
        def run(tx: Transaction, row: sqlite3.Row) -> int:
            job = _make_job(tx, row, row["next_at"])
            if job is None:
                raise InvalidOperation(f"job {row['job_id']} of schedule {self.id} ({row['name']}) "
                                       f"is {row['job_status']}; wait until it is over")
            return job
        return Job(self._core, self._change(run))

    def remove(self) -> None:
        """Delete it. Raises InvalidOperation if another living process has it in its code."""
        def remove(tx: Transaction, row: sqlite3.Row) -> None:
            tx.execute("DELETE FROM bgjobs_registered WHERE schedule_id = ? AND runner_id = ?",
                       [self.id, self._core.id])
            if not tx.execute("""DELETE FROM bgjobs_schedules WHERE id = ?
                    AND id NOT IN (SELECT schedule_id FROM bgjobs_registered)""",
                              [self.id]).rowcount:
                raise InvalidOperation(f"schedule {self.id} ({row['name']}) is in the code of "
                                       "another process; remove it there")
            self._core.schedules.pop(row["key"], None)
        self._change(remove)

    def _set_paused(self, paused: bool) -> Schedule:
        self._change(lambda tx, row: tx.execute(
            "UPDATE bgjobs_schedules SET next_at = ?, paused = ? WHERE id = ?",
            [_next_time(row, tx.now), paused, self.id]))
        return self

    def _change(self, change: Callable[[Transaction, sqlite3.Row], Any]) -> Any:
        return self._core.store.write(
            lambda tx: change(tx, self._found(_rows(tx, ONE_SCHEDULE, id=self.id))))

    def _found(self, rows: list[sqlite3.Row]) -> sqlite3.Row:
        if not rows:
            raise KeyError(f"there is no schedule {self.id} in {self._core.path}")
        return rows[0]

    def __repr__(self) -> str:
        return f"<Schedule {self.id}>"


# With new times, a schedule is due as if new; else next_at stays, unless the clock was set back.
SAVE_SCHEDULE = """INSERT INTO bgjobs_schedules (key, schedule, zone, created_at, next_at,
        name, args, kwargs, options, label, run_by, low_priority, system, max_running)
    VALUES (:key, :schedule, :zone, :now, :first,
        :name, :args, :kwargs, :options, :label, :run_by, ifnull(:low_priority, 0), :system,
        :max_running)
    ON CONFLICT (key) DO UPDATE SET
    next_at = CASE WHEN schedule = :schedule AND zone IS :zone THEN min(next_at, :first)
        ELSE :first END,
    schedule = :schedule, zone = :zone, name = :name, args = :args, kwargs = :kwargs,
    options = :options, label = :label, run_by = :run_by, low_priority = ifnull(:low_priority, 0),
    system = :system, max_running = :max_running"""
REGISTER = """INSERT OR IGNORE INTO bgjobs_registered
    SELECT id, :runner FROM bgjobs_schedules WHERE key = :key"""


def register(core: Core, schedule: float | str, fn: Function, args: Any, kwargs: Any,
             options: Fields) -> Schedule:
    for name in options.keys() & {"delay", "run_at", "parent", "connection"}:
        raise TypeError(f"{name} is no option of a schedule")
    if serves_attempts():  # the app has registered it
        return Schedule(core, 0)
    new = new_submission(core, fn, {**options, "parent": None}, args, kwargs)
    if not isinstance(schedule, str):
        schedule = period_text(schedule) if are_seconds([schedule]) else str(schedule)
    zone = getattr(zone_of(options.get("tz", declared.get(fn, {}).get("tz"))), "key", None)
    now, key = core.clock(), new.key
    if key is None:  # function and arguments, hashed if secret or long
        arguments = f"{new.args or ''}{new.kwargs or ''}"
        if len(arguments) > 400 or '"secret"' in f"{new.options}":
            import hashlib
            arguments = hashlib.sha256(arguments.encode()).hexdigest()
        key = f"{new.name}({arguments})"
    values = {**{name: getattr(new, name) for name in _JOB_COLUMNS}, "key": key, "zone": zone,
              "schedule": schedule, "runner": core.id, "now": now,
              "first": schedule_of(schedule, zone).next(now, now)}
    asked = schedule, zone, new.name, new.args, new.kwargs
    known = core.schedules.setdefault(key, asked)
    if known != asked:
        raise ValueError(f"{key!r} is scheduled already: {known[2]}, {known[0]}; give each schedule "
                         "a key of its own")

    def save(tx: Transaction) -> Any:
        tx.execute(SAVE_SCHEDULE, values)
        tx.execute(REGISTER, values)
        return tx.value("SELECT id FROM bgjobs_schedules WHERE key = :key", key=key)
    return Schedule(core, core.store.write(save))


# ---- 15 Statistics and retention -------------------------
#
# bgjobs_stats counts by minute and function, and outlives the jobs. Every hour a system job sums up
# rows that have left a window by the parts of the next longer one, and removes old trees.

# A window's number of parts, and their minutes; FOLD follows them.
WINDOWS = {"1h": (60, 1), "24h": (96, 15), "7d": (84, 120), "30d": (120, 360)}

# {by}: `at` (a part's first minute), `name`, or NULL for all. quote() gives all digits.
STATS = """WITH RECURSIVE part (at) AS
    (SELECT :first UNION ALL SELECT at + :step FROM part WHERE at + :step <= :last)
  SELECT {by}, json_object('created', ifnull(sum(created), 0), 'started', ifnull(sum(started), 0),
    'finished', ifnull(sum(finished), 0), 'failed', ifnull(sum(failed), 0),
    'waiting', json(CASE WHEN sum(started) > 0 THEN json_object(
      'avg', json(quote(sum(waiting) / sum(started))),
      'min', json(quote(min(waiting_min))), 'max', json(quote(max(waiting_max)))) END),
    'running', json(CASE WHEN sum(finished + failed) > 0 THEN json_object(
      'avg', json(quote(sum(running) / sum(finished + failed))),
      'min', json(quote(min(running_min))), 'max', json(quote(max(running_max)))) END))
  FROM part LEFT JOIN bgjobs_stats
    ON minute BETWEEN at AND at + :step - 1 AND name = ifnull(:name, name)
  GROUP BY {by} ORDER BY {by}"""


def count_created(core: Core) -> None:
    if core.lines or core.store.read(Transaction.UNCOUNTED):
        core.store.write(Transaction.count_created)


def read_statistics(core: Core, window: str, name: str | None) -> Fields:
    if window not in WINDOWS:
        raise ValueError(f"window must be {', '.join(WINDOWS)}, got {short(window)}")
    count_created(core)
    count, step = WINDOWS[window]
    last = int(core.clock() // 60)
    bounds: Fields = {"first": (last // step - count + 1) * step, "last": last, "step": step,
                      "name": name}

    def sums(by: str) -> list[Any]:
        return [(key, json.loads(counted))
                for key, counted in core.store.read(STATS.format(by=by), bounds)]
    return {"window": window, "name": name, "from": bounds["first"] * 60, "to": (last + 1) * 60,
            "parts": [{"at": at * 60, **counted} for at, counted in sums("at")],
            "total": sums("NULL")[0][1],
            "functions": [{"name": each, **counted} for each, counted in sums("name") if each]}


# A row's minute: the first of its part of the shortest window it is in.
FOLD = """CASE WHEN minute >= :now - 60 THEN minute WHEN minute >= :now - 96 * 15 THEN minute / 15 * 15
  WHEN minute >= :now - 84 * 120 THEN minute / 120 * 120
  WHEN minute >= :now - 120 * 360 THEN minute / 360 * 360 ELSE 0 END"""
FOLDED = f"""SELECT {FOLD} AS part, name, sum(created), sum(started), sum(finished), sum(failed),
  sum(waiting), min(waiting_min), max(waiting_max),
  sum(running), min(running_min), max(running_max)
  FROM bgjobs_stats WHERE part < minute GROUP BY part, name"""
FORGET_FOLDED = f"DELETE FROM bgjobs_stats WHERE {FOLD} < minute"


def fold_statistics(core: Core) -> None:
    def fold(tx: Transaction) -> None:
        now = {"now": int(tx.now // 60)}
        sums = tx.execute(FOLDED, now).fetchall()
        tx.execute(FORGET_FOLDED, now)
        tx.executemany(SAVE_TALLIES, sums)
    core.store.write(fold)


PRUNE_IDS = 2_000  # that a prune looks at together
PRUNE_SECONDS = 0.02  # of a transaction, while all writers wait

# A job goes with its root, which has the tree's lowest id, once the tree has nothing left to do. An
# interrupted prune leaves jobs without root.
EXPIRED = """SELECT j.id FROM bgjobs_jobs j
  LEFT JOIN bgjobs_jobs r ON r.id = ifnull(j.root_id, j.id)
  WHERE j.id > :after AND j.id <= :until AND j.status IN ('finished', 'failed', 'cancelled')
  AND (r.id IS NULL OR r.done >= r.total AND (r.status = 'failed' AND r.finished_at < :failed
  OR r.status IN ('finished', 'cancelled') AND r.finished_at < :finished)) ORDER BY j.id DESC"""


def _remove_some(tx: Transaction, which: Fields) -> int:
    """Remove expired jobs for PRUNE_SECONDS; return how many."""
    until, count = time.perf_counter() + PRUNE_SECONDS, 0
    for job_id, in tx.execute(EXPIRED, which).fetchall():
        remove(tx, [job_id])
        count += 1
        if time.perf_counter() > until:
            break
    return count


def remove_expired(core: Core, finished: float, failed: float) -> int:
    """Remove trees that are over for so long; see Runner.prune."""
    if not are_seconds([finished, failed]):
        raise ValueError(f"finished and failed are seconds, got {short((finished, failed))}")
    now, removed = core.clock(), 0
    (highest,), = core.store.read("SELECT ifnull(max(id), 0) FROM bgjobs_jobs")
    for after in reversed(range(0, highest, PRUNE_IDS)):  # a root goes after its descendants
        which = {"after": after, "until": after + PRUNE_IDS,
                 "finished": now - finished, "failed": now - failed}
        while core.store.read(EXPIRED, which):
            removed += core.store.write(lambda tx: _remove_some(tx, which))
            current_job().checkpoint()
    return removed


@job(name="bgjobs.housekeeping")
def housekeeping(finished: float, failed: float) -> int:
    core = current_attempt().backend  # type: ignore[union-attr]
    fold_statistics(core)
    return remove_expired(core, finished, failed)


def keep_house(runner: Runner, retention: dict[str, float] | None) -> None:
    if retention:
        runner.options(key="bgjobs.housekeeping", system=True,
                       label="Housekeeping: remove what is over for long").every(
            "1h", housekeeping, **retention)


# ---- 16 What people see ----------------------------------
#
# An index for every filter would slow each submit down. If none has the jobs in order, the search
# goes from the newest down, SEARCH_LIMIT jobs at a time: a list then says where to go on, a count
# that it is "at least".

COUNT_LIMIT = 10_001  # where counting for people ends
SEARCH_LIMIT = 60_000  # jobs a search looks at; for texts a sixth
FEW = 10_000  # a status with fewer jobs is searched in full
MAX_ID = (1 << 63) - 2  # SQLite holds one more


# Filters. A reader is a function that reads a value, from Python or a URL, or raises any error, and
# what the value must be.

A_TRUTH = (lambda value: (False, True).index(json.loads(str(value).lower())), "true or false")
A_TEXT = (lambda value: str.encode(value).decode(), "a text")  # in UTF-8
A_TIME = (lambda value: json.loads(dump(float(value))), "Unix seconds")  # no NaN
A_NUMBER = (lambda value: range(MAX_ID + 1).index(int(value)), "a whole number, 0 or more")


def read_value(name: str, value: Any, reader: tuple[Function, str]) -> Any:
    """Return a parameter's value. Raises ValueError if it is bad."""
    read, must_be = reader
    try:
        return read(value)
    except Exception:
        raise ValueError(f"{name} must be {must_be}, got {short(value)}") from None


def read_filters(given: Fields, known: Fields) -> tuple[list[str], Fields]:
    """Return the SQL conditions of filters, and their values by name.

    known: by name, a reader and a condition. None is no filter, but for parent. Raises TypeError,
    ValueError.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"unknown filter {name!r}; the filters are {', '.join(known)}")
    values = {name: read_value(name, value, known[name][0]) for name, value in given.items()
              if value is not None or name == "parent"}
    return [known[name][1] for name in known if name in values and known[name][1]], values


_CHILDREN = "parent_id = :parent AND parent_id IS NOT NULL"
# With both, bgjobs_begun has a status's jobs in order.
_ROOTS, _NO_SYSTEM = _INDEXED = ["parent_id IS NULL", "system = 0"]
FILTERS: Fields = {
    "status": ((lambda value: sorted({value} if isinstance(value, str) else {*value},
                                     key=STATUSES.index), f"one of {', '.join(STATUSES)}"), ""),
    "name": (A_TEXT, "name = :name"),
    "run_by": (A_TEXT, "run_by = :run_by"),
    "errors": (A_TRUTH, "(own_errors + failed > 0) = :errors"),
    "low_priority": (A_TRUTH, "low_priority = :low_priority"),
    "parent": ((lambda value: None if value in (None, "none")
                else A_NUMBER[0](getattr(value, "id", value)), "the id of a job, or none"),
               _CHILDREN),  # _ROOTS if it is None
    "system": (A_TRUTH, _NO_SYSTEM),  # no condition if it is true
    "created_from": (A_TIME, "created_at >= :created_from"),
    "created_to": (A_TIME, "created_at <= :created_to"),
    # The slowest is the last. Arguments are searched for :json, as their JSON is ASCII.
    "q": ((text_of, "a text"), """(id = :q OR instr(lower(name || ' ' || ifnull(label, '')
        || ' ' || ifnull(message, '') || ' ' || ifnull(run_by, '')), lower(:q))
        OR instr(ifnull(options, ''), '"secret"') = 0
        AND instr(lower(ifnull(args, '') || ' ' || ifnull(kwargs, '')), lower(:json)))"""),
}


def conditions(filters: Fields) -> tuple[list[str], Fields]:
    """Return the SQL conditions of all filters but status, and all values by name.

    status: one or several. name, run_by: the whole text. errors, low_priority: True or False. q: an
    id, or a part of the name, label, arguments, message or run_by. parent: an id or a Job, None for
    roots. system: True adds system jobs. created_from, created_to: Unix seconds.
    """
    where, values = read_filters({"system": False, **filters}, FILTERS)
    values.setdefault("status", list(STATUSES))
    if values.get("system"):
        where.remove(_NO_SYSTEM)
    if values.get("parent", 0) is None:
        where[where.index(_CHILDREN)] = _ROOTS
    values["json"] = dump(values.get("q", ""))[1:-1]
    return where, values


# Lists and counts

def find_jobs(store: Store, filters: Fields, limit: Any, before: Any = None,
              most: Any = None) -> tuple[list[int], int | None]:
    """Return the ids of jobs that pass, the highest first, and that below which to go on, or None.

    before: only ids below it. limit: how many at most. most: how many jobs to look at.
    """
    where, values = conditions(filters)
    limit = MAX_ID if limit is None else read_value("limit", limit, A_NUMBER)
    values["before"] = MAX_ID if before is None else read_value("before", before, A_NUMBER)
    values["limit"] = limit + 1
    statuses, bottom = values["status"], None
    # An index has them in order, or they are few enough to sort.
    unsorted = [status for status in statuses if status == PENDING or where != _INDEXED]
    indexed = [condition for condition in where if condition in _INDEXED]
    if _CHILDREN not in where and len(unsorted) < len(STATUSES) and all(
            count_at_most(store, status, indexed, {}, FEW) < FEW for status in unsorted):
        queries = [f"({_of_status(status, where)}) WHERE id < :before" for status in statuses]
    else:
        values["statuses"] = json.dumps(statuses)
        where.insert(0, "status IN (SELECT value FROM json_each(:statuses))")
        newest, bottom = newest_jobs(store, where, values, most)
        queries = [newest]
    ids = sorted((row[0] for query in queries for row in store.read(
        f"SELECT id FROM {query} ORDER BY id DESC LIMIT :limit", values)), reverse=True)
    return (ids, bottom) if len(ids) <= limit else (ids[:limit], ids[limit - 1])


# Each job once. Indexes are named, else SQLite reads all children.
_PENDING_ROOTS = """SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_ready_roots WHERE {where}
    AND lane IS NOT NULL AND parent_id IS NULL AND queue IS NOT NULL
  UNION ALL SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_due WHERE {where}
    AND run_at IS NOT NULL AND queue IS NULL AND parked IS NULL
  UNION ALL SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_parked WHERE {where}
    AND parked IS NOT NULL AND root_id IS NULL"""
_PENDING_JOBS = _PENDING_ROOTS.replace(" AND root_id IS NULL", """
    UNION ALL SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_ready_children WHERE {where}
        AND parent_id IS NOT NULL AND queue IS NOT NULL""")


def _of_status(status: str, where: list[str]) -> str:
    fulfilled = " AND ".join([f"status = '{status}'", *where])
    if status == PENDING:
        return (_PENDING_ROOTS if _ROOTS in where else _PENDING_JOBS).format(where=fulfilled)
    return f"SELECT id FROM bgjobs_jobs WHERE {fulfilled} AND status <> 'pending'"  # bgjobs_begun


def count_at_most(store: Store, status: str, where: list[str], values: Fields, most: int) -> Any:
    query = f"SELECT count(*) FROM (SELECT * FROM ({_of_status(status, where)}) LIMIT {most})"
    return store.read(query, values)[0][0]


# The first id since a time, by binary search.
_FIRST_ID_SINCE = """WITH RECURSIVE search(step, last) AS (VALUES (1 << 62, 0)
  UNION ALL SELECT step / 2, last + CASE WHEN (SELECT created_at FROM bgjobs_jobs
    WHERE id >= last + step ORDER BY id LIMIT 1) < :since THEN step ELSE 0 END
  FROM search WHERE step > 0) SELECT max(last) + 1 FROM search"""


def newest_jobs(store: Store, where: list[str], values: Fields, most: Any) -> tuple[str, Any]:
    """Return what to search the `most` newest jobs FROM, and the id below which to go on, or None.

    values: gets :lowest, and :before if there is none.
    """
    source = f"WHERE {_CHILDREN}" if _CHILDREN in where else "NOT INDEXED WHERE 1"
    jobs, bottom = f"bgjobs_jobs {source} AND id < :before AND id >= :lowest", None
    values.setdefault("before", MAX_ID)
    values["lowest"] = 0
    if most is not None:
        # Ids go up with time; an hour's grace if the clock was set.
        values["lowest"], end = (store.read(_FIRST_ID_SINCE, {"since": since})[0][0] for since in (
            values.get("created_from", 0.0) - 3_600, values.get("created_to", math.inf) + 3_600))
        values["before"] = min(values["before"], end)
        last = (most // 6 if "q" in values else most) - 1
        for row in store.read(f"SELECT id FROM {jobs} ORDER BY id DESC LIMIT 1 OFFSET {last}",
                              values):
            bottom = values["lowest"] = row[0]
    return " AND ".join([jobs, *where]), bottom


# A job's info

MASK = "\u2022\u2022\u2022"
# The eta is the longer of the attempt's estimate and the tree's mean rate's, else by the mean run
# time of the function.
_INFO = """WITH job AS (SELECT *, max(created_at, ifnull(run_at, 0.0)) AS due,
    duration + CASE WHEN since IS NULL THEN 0.0 ELSE max(0.0, :now - since) END AS ran,
    status IN ('running', 'stopping') AS active FROM bgjobs_jobs
    WHERE id IN (SELECT value FROM json_each(:ids))),
  estimate AS (SELECT *,
    CASE WHEN active AND NOT returned THEN max(0.0, ends_at - :now) END AS own,
    CASE WHEN active AND total AND tree_progress > 0
      THEN ran * (total - tree_progress) / tree_progress END AS tree,
    CASE WHEN active THEN (SELECT seconds FROM bgjobs_functions f WHERE f.name = job.name) - ran
      END AS usual FROM job)
  SELECT id, name, label, status, created_at, run_at, started_at, finished_at, run_by, parent_id,
  attempt, message,
  CASE WHEN status = 'running' AND returned THEN 'waiting for children'
    WHEN status <> 'pending' THEN '' WHEN phase IS NOT NULL THEN phase
    WHEN queue IS NULL AND parked IS NULL THEN 'scheduled'
    WHEN low_priority THEN 'waiting for low load' ELSE '' END AS phase,
  CASE WHEN started_at IS NOT NULL THEN waited WHEN status = 'pending' THEN max(0.0, :now - due)
    ELSE max(0.0, ifnull(finished_at, due) - due) END AS waiting,
  ran AS duration, own_errors + failed AS errors,
  CASE WHEN low_priority THEN 'true' ELSE 'false' END AS low_priority,
  CASE WHEN system THEN 'true' ELSE 'false' END AS system,
  CASE WHEN status = 'finished' THEN 1.0 WHEN NOT total THEN progress
    WHEN progress IS NULL THEN min(1.0, max(0.0, tree_progress / total))
    ELSE min(1.0, max(0.0, (tree_progress + CASE WHEN returned THEN 1.0 ELSE progress END)
      / (total + 1))) END AS progress,
  CASE WHEN own IS NULL AND tree IS NULL THEN CASE WHEN usual > 0 THEN usual END
    ELSE max(ifnull(own, 0.0), ifnull(tree, 0.0)) END AS eta,
  json_object('total', total, 'done', done, 'failed', failed, 'running', running) AS children,
  ifnull(root_id, id) AS root_id, args, kwargs, state, result,
  ifnull(nullif(json_extract(error, '$.traceback'), ''),
    json_extract(error, '$.type') || ': ' || json_extract(error, '$.text')) AS error,
  options FROM estimate ORDER BY id DESC"""


def describe_jobs(store: Store, ids: list[int]) -> list[Fields]:
    """Return the `info` of jobs that exist, the highest id first."""
    infos: list[Fields] = []
    for row in store.read(_INFO, {"now": store.clock(), "ids": json.dumps(ids)}):
        info = {**row}
        for name in ("children", "low_priority", "system", "state", "result"):
            info[name] = json.loads(info[name] or "null")
        options = kept_options(info.pop("options"))
        infos.append({**info, **shown_arguments(info, options), "operations": allowed_operations(
            info["status"], options, info["system"], info["children"]["running"] > 0)})
    return infos


def shown_arguments(row: Any, options: Fields) -> Fields:
    """Return args and kwargs, secret ones masked."""
    args, kwargs = json.loads(row["args"] or "[]"), json.loads(row["kwargs"] or "{}")
    for place in options.get("secret", ()):  # a name, or a position
        if place in kwargs:
            kwargs[place] = MASK
        elif place in range(len(args)):
            args[place] = MASK
    return {"args": args, "kwargs": kwargs}


# A job's log

_WHOLE_TREE = """job_id IN (WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL
    SELECT j.id FROM tree JOIN bgjobs_jobs j ON j.parent_id = tree.id AND j.parent_id IS NOT NULL)
    SELECT id FROM tree)"""
_LOG_FILTERS: Fields = {
    "level": ((lambda value: A_NUMBER[0](getattr(logging, str(value).upper(), value)),
               "DEBUG, INFO, WARNING, ERROR, CRITICAL or a number"), "level >= :level"),
    "text": ((lambda value: re.compile(re.escape(value), re.IGNORECASE), "a text"), ""),
    "regex": ((re.compile, "a regular expression"), ""),
    "since": (A_TIME, "at >= :since"),
    "until": (A_TIME, "at <= :until"),
    "after": (A_NUMBER, "id > :after"),
    "limit": (A_NUMBER, ""),
    "tree": (A_TRUTH, ""),
}


def read_logs(store: Store, job_id: int, filters: Fields) -> list[Fields]:
    where, values = read_filters(filters, _LOG_FILTERS)
    patterns = [values.pop(name) for name in ("text", "regex") if name in values]
    where.append(_WHOLE_TREE if values.get("tree") else "job_id = :id")
    limit, follows = values.get("limit", MAX_ID), values.get("after", 0) > 0
    rows = store.read(
        f"""SELECT id, job_id, at, level, message FROM bgjobs_logs WHERE {' AND '.join(where)}
            ORDER BY id {'ASC' if follows else 'DESC'} LIMIT :most""",
        {**values, "id": job_id, "most": MAX_ID if patterns else limit})
    lines = [{**row, "level": logging.getLevelName(row["level"])} for row in rows
             if all(pattern.search(row["message"]) for pattern in patterns)][:limit]
    return lines if follows else lines[::-1]


# ---- 17 The default runner -------------------------------

_default: Runner | None = None
_default_lock = threading.Lock()  # guards the making of _default


@library_code
def start(path: str | os.PathLike[str] | None = None, **options: Any) -> Runner:
    """Make the default runner and start it, or return the one there is.

    path and options: as for Runner. Raises RuntimeError if there is one and they ask for another.
    """
    global _default
    with _default_lock:
        runner, anew = _default, path is not None or options
        if not runner or (runner.core.store.closed if anew else _is_shut(runner)):
            _default = Runner(path, **options)
            return _default
        if options or os.path.abspath(path or runner.path) != runner.path:
            raise RuntimeError(f"the default runner is on {runner.path}; close() it first")
        return runner.start()


def _is_shut(runner: Runner) -> bool:
    """Return whether a runner is closed for good, not by a fork."""
    return runner.core.store.closed and not runner.core.store.forked


def _backend() -> Core:
    """Return the core. Raises RuntimeError if closed: a new runner might be on another file."""
    attempt, runner = current_attempt(), _default
    if attempt:
        return attempt.backend
    if not runner:
        return start().core
    if _is_shut(runner):
        raise RuntimeError(f"the runner on {runner.path} is shut down; call start()")
    return runner.core


_submitter = Submitter(_backend, {})
submit = _submitter.submit
submit_many = _submitter.submit_many
every = _submitter.every
options = _submitter.options


def _of_default_runner(method: Callable[Concatenate[Runner, _P], _T]) -> Callable[_P, _T]:
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return getattr(_backend().face, method.__name__)(*args, **kwargs)  # type: ignore[no-any-return]
    # Bound, so that help() shows no `self`.
    functools.update_wrapper(call, types.MethodType(method, Runner))
    call.__qualname__ = call.__name__
    return call


get = _of_default_runner(Runner.get)
jobs = _of_default_runner(Runner.jobs)
schedules = _of_default_runner(Runner.schedules)
stats = _of_default_runner(Runner.stats)
prune = _of_default_runner(Runner.prune)
drain = _of_default_runner(Runner.drain)
backup = _of_default_runner(Runner.backup)
serve = _of_default_runner(Runner.serve)
wsgi = _of_default_runner(Runner.wsgi)


def close(timeout: float = GRACE_SECONDS) -> None:
    """Runner.close on the default runner, if there is one."""
    if _default:
        _default.close(timeout)


def shutdown(wait: bool = True, *, cancel_futures: bool = False) -> None:
    """Runner.shutdown on the default runner, if there is one."""
    if _default:
        _default.shutdown(wait, cancel_futures=cancel_futures)


# ==== layer: elsewhere ====================================

# ---- 18 Elsewhere ----------------------------------------
#
# An attempt may execute in another process: in one of its own (isolate=True), or wherever a
# concurrent.futures.Executor, the engine, takes it (executor=). The worker thread that would call
# the function drives the attempt instead:
#
#   1. It hands the engine one call, run_attempt(where to dial, a token, the job). A port is opened
#      for the first such attempt.
#   2. Over there, run_attempt dials and shows the token, which is good for one connection. So if
#      the engine makes the call twice, the second one is refused. The answer is [the time here].
#   3. The function is called. What it asks of its job goes over the connection, and the worker
#      thread here carries it out, call by call, as the same job would in this thread. A wait for
#      another job gives the place away, as always.
#   4. The outcome comes over the connection, too, as the last call.
#   5. A connection that ends before that is a lost attempt: it has failed, with the engine's
#      reason, or is given back if the runner goes down. Over there it stops at its next checkpoint.
#
# An isolated attempt gets a socket of its own, and [the time, the job] over it, instead of 1 and 2.
#
# A line of JSON is a message:
#
#   there -> runner    [number, call, [argument...], news...]     number 0: no answer is wanted
#   runner -> there    [number, value], or [number, null, type of an error, its text]
#                      unasked: [0, "stop", reason], [0, "void"], [0, "over", job, its outcome]
#
# The news are what was not told before: log lines, progress or null, and the positions of each().
#
# Threads. Most attempts are short, and starting or waking a thread costs more than they do. So
# over there the thread that asks reads the connection until its answer has come, and one thread for
# the whole process tells the news, and reads what came unasked, four times a second. A thread that
# waits for another job reads meanwhile, so it hears of that job's end at once.
#
# Places. No more attempts are at an engine than it has places, those that wait for other jobs
# included. While one waits, the next job of the engine gets its turn, but there is no place for
# it; so it executes in the worker's thread here. Thus no job waits for a process in vain.

STRANGER_SECONDS = 10.0  # in which a connection has to show a token
STRANGER_BYTES = 4_096  # that it may send before
STRANGERS = 64  # connections that have shown none; one more closes the oldest
LINE_BYTES = 32_000_000  # of a message from over there; a longer one ends the connection
LINES_A_CALL = 1_000  # log lines that one call takes along
COLLECT_SECONDS = 0.0001  # for each attempt, that states wait for a common transaction
COLLECT_AT_MOST = 0.02
TELL_SECONDS = 0.25  # between two reports of progress, log lines and positions
BROKEN_SECONDS = 10.0  # until an executor that takes nothing is tried again
LOSS_SECONDS = 1.0  # that an engine may take to tell why a connection has ended
SIGNAL_SECONDS = 5.0  # that an attempt gets to reach a checkpoint after a signal


class Connection:
    """A socket over which messages go both ways. Any thread may send; one at a time receives."""

    def __init__(self, link: Any) -> None:
        self.socket = link
        with contextlib.suppress(OSError):  # it is no TCP socket
            link.setsockopt(6, 1, 1)  # IPPROTO_TCP, TCP_NODELAY
        self._sending = threading.Lock()  # a message is sent in one piece
        self._unread = b""  # of a message whose end has not come yet

    def send(self, *message: Any) -> None:
        """Send a message. Raises OSError if the connection is lost."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            self.socket.sendall(line)

    def receive(self) -> list[Any]:
        """Wait for data; return the messages that are complete now.

        Raises OSError if the connection has ended, ValueError or RecursionError if that was no
        message.
        """
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the connection has ended")
        *lines, self._unread = (self._unread + received).split(b"\n")
        if len(self._unread) > LINE_BYTES:
            raise ValueError("a message is too long")
        return [json.loads(line) for line in lines]

    def is_ready(self, seconds: float) -> bool:
        """Wait for data for so many seconds; return whether there is any, or the end."""
        import selectors
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            return bool(selector.select(seconds))


# The runner's side.

class Engine:
    """An executor: one that the app made, or one made here, which is replaced when it breaks."""

    def __init__(self, executor: Any, places: int) -> None:
        self.is_made_here = isinstance(executor, type) or not hasattr(executor, "submit")
        self._make, self._executor = executor, None if self.is_made_here else executor
        self._making = threading.Lock()  # guards _executor
        self._default_places = places
        self.broken_until = -math.inf  # monotonic; nothing is sent there before
        self.has_worked = False  # an attempt has begun since it was made
        # `_changed` guards the two below: the attempts that have a turn, with True if they are at
        # the executor, and those of them that wait for other jobs, once for each thread that waits.
        self._changed = threading.Condition()
        self._attempts: dict[Attempt, bool] = {}
        self._waiting: list[Attempt] = []

    def executor(self) -> Any:
        """Return the executor, made if there is none. Raises what making it raises."""
        with self._making:
            if self._executor is None:
                self._executor, self.has_worked = self._make(), False
            return self._executor

    def submit(self, *arguments: Any) -> Any:
        """Return the executor's future for run_attempt.

        Raises what an executor raises that takes nothing.
        """
        executor = self.executor()
        try:
            return executor.submit(run_attempt, *arguments)
        except Exception:
            if not self.is_made_here:
                raise
        with self._making:
            if self._executor is executor:  # no other thread has replaced it
                self._executor = None
        return self.executor().submit(run_attempt, *arguments)

    def close(self) -> None:
        """Shut down the executor if it was made here."""
        if self.is_made_here and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def enter(self, attempt: Attempt) -> bool:
        """Wait for an attempt's turn, or until it is asked to stop.

        Returns whether there is a place for it at the executor; else it is to execute here.
        """
        places = getattr(self.executor(), "_max_workers", None) or self._default_places

        def has_turn() -> bool:
            at_work = len(self._attempts) - len(set(self._waiting))
            return attempt.stop_requested or at_work < places
        with self._changed:
            attempt.wait_on(self._changed, has_turn, None)
            goes_there = sum(self._attempts.values()) < places
            self._attempts[attempt] = goes_there
        attempt.away = functools.partial(self.away, attempt)
        return goes_there

    def exit(self, attempt: Attempt) -> None:
        """Give the turn of an attempt that has ended to the next."""
        del attempt.away
        with self._changed:
            del self._attempts[attempt]
            self._changed.notify_all()

    @contextlib.contextmanager
    def away(self, attempt: Attempt) -> Iterator[None]:
        """Give the turn of an attempt away while a thread of it waits for another job."""
        with self._changed:
            self._waiting.append(attempt)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting.remove(attempt)


# Of executors that the app made: several runners may use one, and then share its places.
_shared_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()


def _cut(link: Any) -> None:
    """End a connection for both sides, and for copies of the socket in forked children."""
    with contextlib.suppress(OSError):
        link.shutdown(2)  # SHUT_RDWR


class AttemptServer:
    """Listens for attempts, in a thread of its own, and for nothing else: each shows its token."""

    def __init__(self, address: str | None) -> None:
        self._address = address or "127.0.0.1:0"
        self._starting = threading.Lock()  # guards _listener: only one is opened
        self._listener: Any = None
        self._found: Any = None  # its address
        self.expected: dict[str, queue.SimpleQueue[Any]] = {}  # by token: where its socket goes
        self.strangers: dict[Any, bytearray] = {}  # by socket, the oldest first: what it sent

    def listen(self) -> tuple[str, int]:
        """Open the port, unless it is open; return its address.

        A port that is taken may belong to the process before this one, which goes down; wait for
        that. Raises OSError, which names the address.
        """
        import errno
        import socket
        host, _, port = self._address.rpartition(":")
        give_up = time.monotonic() + GRACE_SECONDS + 1
        with self._starting:
            while not self._found:
                try:
                    self._listener = socket.create_server((host, int(port)), backlog=1024)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or time.monotonic() > give_up:
                        text = f"callback {self._address} cannot be listened at: {error.strerror}"
                        raise OSError(error.errno, text) from error
                    time.sleep(0.1)
                else:
                    self._found = self._listener.getsockname()[:2]
                    self._listener.settimeout(1.0)  # close() may not end an accept()
                    start_thread("bgjobs-callback", self._serve)
        return self._found  # type: ignore[no-any-return]

    def _serve(self) -> None:
        """Accept connections until close(). An attempt shows its token at once."""
        while self._listener.fileno() >= 0:
            try:
                stranger, _ = self._listener.accept()
                sent = self.strangers[stranger] = bytearray()
                try:
                    self._read_token(stranger, sent, 0.002)
                except OSError:  # not yet
                    start_thread("bgjobs-stranger", self._wait_for_token, stranger, sent)
                if len(self.strangers) > STRANGERS:
                    oldest = list(self.strangers)[0]
                    if self.strangers.pop(oldest, None) is not None:
                        _cut(oldest)
            except (OSError, RuntimeError):  # descriptors or threads are used up
                time.sleep(0.01)

    def _wait_for_token(self, stranger: Any, sent: bytearray) -> None:
        try:
            self._read_token(stranger, sent, STRANGER_SECONDS)
        except OSError:
            self.strangers.pop(stranger, None)
            stranger.close()

    def _read_token(self, stranger: Any, sent: bytearray, seconds: float) -> None:
        """Hand a connection over to the attempt whose token it shows; close any other.

        Raises OSError, most often TimeoutError, if it does not show a whole one.
        """
        until = time.monotonic() + seconds
        while not sent.endswith(b"\n") and len(sent) < STRANGER_BYTES:
            stranger.settimeout(max(0.001, until - time.monotonic()))
            received = stranger.recv(STRANGER_BYTES)
            if not received:
                raise ConnectionError
            sent += received
        token = sent.rstrip(b"\n").decode("latin-1")
        known = self.strangers.pop(stranger, None)  # None: it had to go
        inbox = None if known is None else self.expected.pop(token, None)
        if inbox is None:
            stranger.close()
        else:
            stranger.settimeout(None)
            inbox.put(stranger)

    def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            _cut(self._listener)
            self._listener.close()

    def leave_to_parent(self) -> None:
        """Close the copies of the sockets, in a forked child."""
        for each in filter(None, (self._listener, *self.strangers)):
            each.close()


class Drive:
    """The execution of one attempt at an engine, as the worker thread here sees it."""

    _future: Any = None  # the engine's
    connection: Connection | None = None  # once it has begun
    _has_ended = False

    def __init__(self, elsewhere: Elsewhere, attempt: Attempt, function: Function) -> None:
        self._elsewhere, self.core = elsewhere, elsewhere.core
        self.attempt, self.function = attempt, function
        self._waits: list[ContextManager[Any]] = []  # under way

    def run(self, server: AttemptServer, engine: Engine) -> None:
        """Hand the attempt to its engine, and carry out what it asks for until it has ended.

        Raises what an executor raises that takes nothing.
        """
        self._engine = engine
        # The attempt's socket; None: look what is new.
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        address, token = server.listen(), os.urandom(16).hex()
        server.expected[token] = self._inbox
        self.attempt.on_stop = self._tell_to_stop
        link = None
        try:
            self._future = engine.submit(*address, token, self.payload())
            self._future.add_done_callback(self._look)
            link = self._meet()
            if link is not None:
                engine.has_worked = True
                self.carry_out(Connection(link), self.core.clock())
        finally:
            del self.attempt.on_stop
            if server.expected.pop(token, None) is None and link is None:  # it dials just now
                while link is None:
                    link = self._inbox.get()
                link.close()

    def _meet(self) -> Any:
        """Wait until the attempt has dialed; return its socket, or None if it ends unbegun."""
        while (link := self._inbox.get()) is None:
            if self.attempt.stop_requested:
                self._future.cancel()
            if self._future.done():
                if not self._future.cancelled():
                    self._lose(self.reason(""))
                return None
        return link

    def _look(self, future: Any) -> None:
        """Note that the engine's future is done. In any thread."""
        if self.connection is None:
            self._inbox.put(None)
        elif future.cancelled() or future.exception() is not None:
            _cut(self.connection.socket)

    def _tell_to_stop(self) -> None:
        """Tell the attempt that it is to stop, or is void. From any thread; never blocks."""
        if self.connection is None:
            self._inbox.put(None)
        elif self.attempt.ticket.void:
            self.post("void")
        else:
            self.post("stop", self.attempt.reason)

    def post(self, *message: Any) -> None:
        """Send a message from a thread of its own: a process that does not read holds up nobody."""
        def send() -> None:
            with contextlib.suppress(OSError):
                self.connection.send(0, *message)  # type: ignore[union-attr]
        try:
            start_thread("bgjobs-post", send)
        except RuntimeError:  # since Python 3.12 there are no new ones once the interpreter ends
            send()

    def payload(self) -> str:
        """Return the job as the attempt over there needs it."""
        return dump({"job": self.attempt.job, "module": import_name(self.function.__module__),
                     "function": self.function.__qualname__, "path": self.core.path})

    def carry_out(self, connection: Connection, *greeting: Any) -> None:
        """Answer the calls of the attempt until it has ended, or is lost."""
        attempt, core = self.attempt, self.core
        attempt.begun, attempt.thread = time.monotonic(), 0
        core.dispatch.note_start(attempt)
        self.connection, why = connection, "it has ended the connection"
        try:
            if greeting:
                connection.send(*greeting)
            if attempt.stop_requested:  # before there was a connection
                self._tell_to_stop()
            if self._future is not None and self._future.done():
                self._look(self._future)
            while not self._has_ended:
                for message in connection.receive():
                    self._heed(message)
        except Exception as error:
            why = f"{type(error).__qualname__}: {text_of(error, 200)}"
        finally:
            attempt.thread = None
            _cut(connection.socket)
            connection.socket.close()
        took = time.monotonic() - attempt.begun
        if not self._has_ended:
            attempt.ran = took
            self._lose(self.reason(why))
        core.run_times.record(attempt.name, max(0.0, took - attempt.waited))

    def reason(self, why: str) -> BaseException:
        """Return what the engine says about an attempt that was lost."""
        reason: BaseException | None = None
        with contextlib.suppress(Exception):  # it says nothing in time
            reason = self._future.exception(LOSS_SECONDS)
        return reason or BgjobsError(f"the process that executed it is gone: {why}")

    def _lose(self, reason: BaseException) -> None:
        """Make the loss of the attempt its outcome."""
        attempt, core = self.attempt, self.core
        # Ctrl-C in a terminal may reach a pool that just begins an attempt before it has this
        # process go down.
        is_cut_off = isinstance(reason, (BrokenExecutor, KeyboardInterrupt, SystemExit))
        until = time.monotonic() + LOSS_SECONDS
        while is_cut_off and not core.goes_down and time.monotonic() < until:
            time.sleep(0.02)
        if core.goes_down:
            attempt.outcome = RELEASED if attempt.begun else UNSPENT
        elif attempt.begun or not is_cut_off:
            attempt.fail(reason)
        elif not self._engine.has_worked:
            raise reason  # something is wrong with the executor
        # Else another attempt broke it before this one began.

    def _heed(self, message: Any) -> None:
        """Carry out a call, and answer it. Raises ValueError if it is none."""
        match message:
            case [int(number), str(call), list(arguments), *news] if call in _OF_CORE + _OF_DRIVE:
                self._hear(*news)
            case _:
                raise ValueError(f"{short(message)} is no call")
        if call == "end":
            self.end(*arguments)
        elif call == "save":
            self._elsewhere.save(self, number, *arguments)
        else:
            asked = self.core if call in _OF_CORE else self
            self.answer(number, lambda: getattr(asked, call)(*arguments))

    def answer(self, number: int, call: Callable[[], Any]) -> None:
        """Answer a call with what `call` returns or raises."""
        answer: tuple[Any, ...]
        try:
            if self.attempt.ticket.void:
                raise self.attempt.superseded
            answer = (call(),)
        except BaseException as error:  # JobStopped is one of these
            is_key = isinstance(error, KeyError) and error.args
            text = text_of(error.args[0] if is_key else error)
            kind = "JobStopped" if self.core.store.closed else type(error).__qualname__
            answer = None, kind, text
        if number:
            with contextlib.suppress(OSError):
                self.connection.send(number, *answer)  # type: ignore[union-attr]

    def _hear(self, lines: list[Any], report: list[Any] | None, positions: list[int]) -> None:
        """Take over log lines, progress and positions. Written with the next transaction."""
        for line in lines:
            self.core.keep_line(self.attempt, *line)
        if report is not None:
            self.attempt.report(*report)
        self.attempt.loop_positions = positions

    # calls

    def tell(self) -> None:
        """Take the news alone."""

    def submit(self, columns: Fields, arguments: list[str | None] | None) -> Any:
        """Submit a job, or one for each of the arguments; return its id, or theirs."""
        self.attempt.raise_if_stopped()
        new = Submission(**columns)
        new.author = self.attempt.id, self.attempt.number
        if arguments is None:
            return self.core.submit(new).id
        return self.core.submit_many(new, arguments)

    def outcome(self, job_id: int) -> Fields | None:
        """Return what `Core.outcome` does, as JSON."""
        row = self.core.outcome(job_id)
        return row and dict(row)

    def watch(self, job_id: int) -> None:
        """Tell the attempt once a job is over."""
        Job[Any](self.core, job_id).add_done_callback(
            lambda job: self.post("over", job_id, self.outcome(job_id) or {}))

    def leave(self) -> None:
        """Give the attempt's place away."""
        wait = self.attempt.away()
        wait.__enter__()
        self._waits.append(wait)
        self.core.dispatch.pool.leave(self.attempt)

    def come_back(self) -> None:
        """Return once the attempt has a place again, unless other threads of it still wait."""
        self.core.dispatch.pool.come_back(self.attempt)
        self._waits.pop().__exit__(None, None, None)

    def end(self, outcome: str, ran: float, *texts: str | None) -> None:
        """Take over the outcome, the seconds the function took, and its result and error."""
        if outcome not in OUTCOMES or not {*map(type, texts)} <= {str, type(None)}:
            raise ValueError("there is no such outcome")
        self.attempt.result, self.attempt.error = texts
        self.attempt.outcome, self.attempt.ran = outcome, float(ran)
        self._has_ended = True


# What an attempt may ask its runner for, and what it may ask its drive for.
_OF_CORE = "operate", "info", "logs", "status", "find"
_OF_DRIVE = "tell", "save", "submit", "outcome", "watch", "leave", "come_back", "end"


class IsolatedDrive(Drive):
    """The execution of one attempt in a process of its own, started fresh, never forked.

    With the process, everything that it started is killed (on Windows the process alone).
    """

    _is_dead = False

    def run_alone(self) -> None:
        """Start the process, and carry out what the attempt asks for until it has ended.

        Raises BgjobsError if no process can be started.
        """
        import socket
        apart = f"{self.attempt.name} is declared with isolate=True, but "
        if getattr(sys, "frozen", False) or not sys.executable:
            raise BgjobsError(apart + "a frozen app has no Python to start a process with: leave "
                              "isolate out, or use executor=")
        if import_name(self.function.__module__) == "__main__":
            raise BgjobsError(apart + "its code was typed into standard input, a notebook or -c, "
                              "where another process cannot import it: put it into a file of its "
                              "own and import that")
        ours, theirs = socket.socketpair()
        # `_lock` guards the killing: a process that has been waited for may be another by now.
        self._lock = threading.Lock()
        with theirs:
            self._process = self._start(theirs)
        self.attempt.on_stop = self._tell_to_stop
        try:
            self.carry_out(Connection(ours), self.core.clock(), self.payload())
        finally:
            del self.attempt.on_stop
            self._kill()

    def _start(self, theirs: Any) -> Any:
        """Start a process that imports this module, and nothing of the app."""
        import subprocess
        folder = [os.path.dirname(os.path.abspath(__file__))] if __name__ == "__main__" else []
        code = "import json, sys; path, name = json.loads(sys.argv[1]); sys.path[:] = path; " \
               "sys.argv[1:] = []; __import__('importlib').import_module(name).execute_isolated()"
        command = [sys.executable, "-c", code,
                   json.dumps([sys.path + folder, module_name(__name__)])]
        is_windows = os.name == "nt"
        stdin: Any = subprocess.PIPE if is_windows else theirs
        # Popen waits for the end of a pipe, which a process forked meanwhile would keep open. A
        # session of its own: Ctrl-C in a terminal is for the app, which tells us.
        with fork_gate:
            process = subprocess.Popen(command, stdin=stdin, start_new_session=True)
        if is_windows:  # where no process inherits a socket
            with process.stdin:  # type: ignore[union-attr]
                process.stdin.write(theirs.share(process.pid))  # type: ignore
        return process

    def _tell_to_stop(self) -> None:
        """Tell the attempt to stop; kill it if it is void. From any thread; never blocks."""
        if self.attempt.ticket.void:
            self._kill()
        elif self.connection is not None:
            self.post("stop", self.attempt.reason)

    def _kill(self) -> None:
        """Kill the process and everything that it started, once."""
        import signal
        with self._lock:
            if not self._is_dead and hasattr(os, "killpg"):
                with contextlib.suppress(OSError):  # there is none left
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # does nothing if it has been waited for
            self._process.wait()
            self._is_dead = True

    def reason(self, why: str) -> BaseException:
        """Return how the process died."""
        with contextlib.suppress(Exception):  # it lives, and has closed its socket
            self._process.wait(LOSS_SECONDS)
        code = self._process.returncode
        if code is None:
            return BgjobsError(f"the process of its own is killed: {why}")
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        return BgjobsError(f"the process of its own died under it: {how}")


class Elsewhere:
    """What a runner needs to have attempts execute in other processes."""

    def __init__(self, core: Core, address: str | None) -> None:
        self.core = core
        self._saving = threading.Lock()  # guards _saves
        self._saves: list[Any] = []  # (drive, number of the call, state, positions)
        self._engines: dict[int, Engine] = {}  # by the id of what the app gave
        self.server = AttemptServer(address)
        self.listen = self.server.listen
        self._drives: weakref.WeakSet[Drive] = weakref.WeakSet()
        # The standard library's own hook; RuntimeError: the interpreter ends already.
        with contextlib.suppress(AttributeError, RuntimeError):
            register: Callable[..., None] = threading._register_atexit  # type: ignore[attr-defined]
            register(_close_before_executors, weakref.ref(core))

    def engine(self, executor: Any) -> Engine:
        """Return the engine for an executor, or for what makes one."""
        if id(executor) not in self._engines:
            engine = Engine(executor, self.core.max_workers)
            if not engine.is_made_here:
                engine = _shared_engines.setdefault(id(executor), engine)
            self._engines.setdefault(id(executor), engine)
        return self._engines[id(executor)]

    def is_broken(self, executor: Any) -> bool:
        """Return whether an executor took nothing lately."""
        return executor is not None and time.monotonic() < self.engine(executor).broken_until

    def save(self, drive: Drive, number: int, state: Any, positions: Any) -> None:
        """Save a state. If many attempts are under way, one thread does it for all of them."""
        with self._saving:
            self._saves.append((drive, number, str(state), positions and str(positions)))
            others_do_it = len(self._saves) > 1
        if others_do_it:
            return
        time.sleep(min(COLLECT_SECONDS * (len(self._drives) - 1), COLLECT_AT_MOST))
        with self._saving:
            saves, self._saves = self._saves, []

        @functools.cache
        def saved() -> list[bool]:
            return self.core.store.write(lambda tx: [  # type: ignore[no-any-return]
                tx.save_state(drive.attempt, *state) for drive, _, *state in saves])
        for index, (drive, number, *_) in enumerate(saves):
            drive.answer(number, lambda: saved()[index])

    def drive(self, attempt: Attempt, function: Function, executor: Any) -> None:
        """Have an attempt executed elsewhere. Never raises. In the thread that would execute it."""
        try:
            contextvars.Context().run(self._drive, attempt, function, executor)
        except BaseException as error:
            attempt.fail(error)

    def _drive(self, attempt: Attempt, function: Function, executor: Any) -> None:
        enter(attempt)  # what is done here is the job's doing
        if executor is ISOLATED:
            alone = IsolatedDrive(self, attempt, function)
            self._drives.add(alone)
            alone.run_alone()
        elif self.is_broken(executor):
            attempt.outcome = NO_EXECUTOR
        else:
            engine = self.engine(executor)
            try:
                self._take_turn(attempt, function, engine)
            except Exception as error:
                engine.broken_until = time.monotonic() + BROKEN_SECONDS
                attempt.outcome = NO_EXECUTOR
                text = "its executor takes no job: "
                text += f"{type(error).__qualname__}: {text_of(error, 500)}"
                say(logging.ERROR, f"job {attempt.id} ({attempt.name}) waits: {text}")
                self.core.store.write(lambda tx: tx.log(attempt.id, logging.ERROR, text))

    def _take_turn(self, attempt: Attempt, function: Function, engine: Engine) -> None:
        """Execute an attempt at its engine, or here if all places of it are taken."""
        goes_there = engine.enter(attempt)
        try:
            if attempt.stop_requested:
                return
            if goes_there:
                drive = Drive(self, attempt, function)
                self._drives.add(drive)
                drive.run(self.server, engine)
            else:
                self.core.dispatch.execute_here(attempt, function)
        finally:
            engine.exit(attempt)

    def close(self) -> None:
        """Take no more attempts. Those that still execute are told by their own connections."""
        self.server.close()
        for engine in list(self._engines.values()):
            engine.close()

    def leave_to_parent(self) -> None:
        """Keep no connection of the parent's open, in a forked child."""
        self.server.leave_to_parent()
        for drive in list(self._drives):
            if drive.connection is not None:
                drive.connection.socket.close()


def _close_before_executors(reference: weakref.ref[Core]) -> None:
    """Close a runner at interpreter exit before process pools wait for what they execute."""
    core = reference()
    if core is not None and not core.store.closed:
        core.life.close(time.monotonic() + GRACE_SECONDS)


for _name in ("executor", "isolate"):
    open_door(_name, Elsewhere)


# The other side: the process in which the attempt executes.

def run_attempt(host: str, port: int, token: str, payload: str) -> None:
    """Execute one attempt in this process: the one function that engines call."""
    import socket
    try:
        link = socket.create_connection((host, port), timeout=60)
        try:
            link.sendall(token.encode() + b"\n")
            proxy = RunnerProxy(Connection(link), payload)
            link.settimeout(None)
        except BaseException:
            link.close()
            raise
    except OSError as error:
        raise BgjobsError(f"the runner at {host}:{port} does not take this attempt: it is gone, "
                          f"cannot be reached, or has the attempt already ({text_of(error)})"
                          ) from error
    proxy.execute()


def execute_isolated() -> None:
    """Execute the attempt that this process was started for."""
    import socket
    serve_one_attempt()
    if os.name == "nt":
        link = socket.fromshare(sys.stdin.buffer.read())  # type: ignore[attr-defined]
    else:
        link = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=link.close)
    RunnerProxy(Connection(link)).execute()


class RunnerThere(RunnerFace):
    """The runner for `bgjobs.submit` and the like inside a job that executes elsewhere."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a job that executes in another process cannot ask this of its runner; "
                           "do it in the app, or in a job without executor= and isolate=")

    every = schedules = stats = prune = drain = serve = wsgi = backup = _refuse


_ERRORS = {each.__name__: each for each in (
    JobStopped, StoreError, InvalidOperation, KeyError, TypeError, ValueError, RuntimeError)}


class RunnerProxy:
    """The backend of an attempt in another process: asks the runner over the connection."""

    def __init__(self, connection: Connection, payload: str | None = None) -> None:
        """Wait until the runner has taken the attempt. payload: None in an isolated process."""
        self._connection, self._is_isolated = connection, payload is None
        while not (messages := connection.receive()):
            pass
        (now, *given), *self._unheeded = messages
        self._given = given = json.loads(payload or given[0])
        self.path = given["path"]
        self._ahead = now - time.time()  # the runner's clock
        self.id = 0
        self.face = RunnerThere(lambda: self, {})  # type: ignore[arg-type, return-value]
        self.attempt = Attempt(self, to_job(given["job"]), 0)  # type: ignore[arg-type]
        self._gone = ""  # why the runner cannot be asked any more
        self.pid = os.getpid()
        self._numbers = itertools.count(1)
        self._answers: dict[int, list[Any]] = {}  # to calls, by number
        self._telling = threading.Lock()  # news are told in order
        self._receiving = threading.Lock()  # one thread at a time receives
        self._lines: deque[Any] = deque(maxlen=LOG_BUFFER)  # of the log, not told yet
        self._watched: dict[int, list[Job[Any]]] = {}

    def clock(self) -> float:
        """Return Unix seconds, by the runner's clock."""
        return time.time() + float(self._ahead)

    def execute(self) -> None:
        """Call the function and send the outcome."""
        attempt, link = self.attempt, self._connection.socket
        capture_log_records()
        _signals.begin(attempt)
        self._heed_all(self._unheeded)
        _link.add(self)
        try:
            function = self._function()
        except BaseException as error:
            attempt.fail(error)
        else:
            perform(attempt, function)
        for stream in (sys.stdout, sys.stderr):  # an isolated process is killed
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(JobStopped):
            while len(self._lines) > LINES_A_CALL:
                self._send(0, "tell")
            self._send(0, "end", attempt.outcome, attempt.ran, attempt.result, attempt.error)
        self._gone = f"attempt {attempt.number} of job {attempt.id} has ended"
        _link.proxies.discard(self)
        with link, contextlib.suppress(OSError):  # until the runner has read the outcome
            link.settimeout(LOSS_SECONDS)
            while link.recv(1 << 16):
                pass
        _signals.end(attempt)

    def _function(self) -> Function:
        """Import the function, and have the registry know it by the job's name."""
        import importlib
        name = self._given["module"]
        is_main = name == import_name("__main__") and not self._is_isolated
        module = sys.modules["__main__"] if is_main else importlib.import_module(name)
        function: Function = operator.attrgetter(self._given["function"])(module)
        functions[self.attempt.name] = function
        return function

    # the connection

    @library_code
    def ask(self, call: str, *arguments: Any) -> Any:
        """Ask the runner for something and return its answer.

        Raises JobStopped if the runner is gone or the attempt is superseded, else what the call
        raised there.
        """
        number = next(self._numbers)
        self._send(number, call, *arguments)
        while number not in self._answers:
            self._listen(number)
        value, *error = self._answers.pop(number)
        if not error:
            return value
        kind, text = error
        raise _ERRORS.get(kind, BgjobsError)(text)

    @library_code
    def _send(self, number: int, call: str, *arguments: Any) -> None:
        """Send a call, and what is new. Raises JobStopped if the runner is gone."""
        if self.pid != os.getpid():
            raise JobStopped("this process was forked by a job: only its parent can speak for that")
        with self._telling:
            if self._gone:
                raise JobStopped(self._gone)
            try:
                lines = [self._lines.popleft()
                         for _ in range(min(len(self._lines), LINES_A_CALL))]
                newest, self.attempt.newest = self.attempt.newest, None
                self._connection.send(number, call, arguments, lines, newest and newest[:3],
                                      self.attempt.loop_positions)
            except OSError as error:
                raise JobStopped("the runner is gone") from error

    def _listen(self, number: int = 0, seconds: float = math.inf) -> bool:
        """Heed what the runner says within so many seconds; return whether it said something.

        Not if another thread does that already, or has done it for the call `number`. Raises
        JobStopped if the runner is gone.
        """
        if not self._receiving.acquire(timeout=0.002):
            return False
        try:
            if number in self._answers:
                return True
            if seconds < math.inf and not self._connection.is_ready(seconds):
                return False
            messages = self._connection.receive()
        except (OSError, ValueError, RecursionError):
            if not self._gone:
                self._gone = "the runner is gone"
                if self._is_isolated:  # nobody else ends what it started
                    os.killpg(0, 9) if hasattr(os, "killpg") else os._exit(1)
                self.attempt.request_stop(RELEASED, force=True)
            raise JobStopped(self._gone) from None
        else:
            self._heed_all(messages)
            return True
        finally:
            self._receiving.release()

    def _heed_all(self, messages: list[Any]) -> None:
        for number, *message in messages:
            match message:
                case _ if number:
                    self._answers[number] = message
                case "stop", reason:
                    self.attempt.request_stop(reason, force=True)
                case "over", job_id, row:
                    for handle in self._watched.pop(job_id, []):
                        handle._complete(row)
                case _:
                    self.attempt.supersede()

    def keep_in_touch(self) -> None:
        """Tell the runner what is new, and heed what it said unasked. Never raises."""
        with contextlib.suppress(JobStopped):
            while self._lines or self.attempt.newest:
                self._send(0, "tell")
            while self._listen(seconds=0):
                pass
        _signals.look(self.attempt, bool(self._gone))

    def wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool],
                    timeout: float | None) -> bool:
        """Return wait(timeout); the runner gives the attempt's place away meanwhile.

        One of the threads that wait reads what the runner says.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        self.ask("leave")
        try:
            while not (over := wait(0)) and time.monotonic() < until:
                left = max(0.0, min(TELL_SECONDS, until - time.monotonic()))
                if not self._listen(seconds=left):  # another thread listens, or no news came
                    wait(left / 10)
            return over
        finally:
            self.ask("come_back")  # answered when it has a place

    # what handles, submitters and the attempt ask

    def submit(self, new: Submission, connection: Any = None) -> Job[Any]:
        """Have the runner store a job; return its handle."""
        return Job(self, self._submit(new, None, connection))  # type: ignore[arg-type]

    def submit_many(self, new: Submission, arguments: list[str | None],
                    connection: Any = None) -> list[int]:
        """Have the runner store a job for each of the arguments, 100 at a time; return the ids."""
        return [job_id for start in range(0, len(arguments), 100)
                for job_id in self._submit(new, arguments[start:start + 100], connection)]

    def _submit(self, new: Submission, arguments: list[str | None] | None, connection: Any) -> Any:
        if connection is not None:
            self.face.stats()  # raises the same error
        return self.ask("submit", vars(new), arguments)

    def __getattr__(self, call: str) -> Function:
        """Ask the runner: operate, info, status, logs, find, outcome."""
        return functools.partial(self.ask, call)

    error_of = staticmethod(job_failed)

    @library_code
    def watch(self, handle: Job[Any]) -> None:
        """Complete a handle when its job is over. Returns at once: other handles may be locked."""
        self._watched.setdefault(handle.id, []).append(handle)
        self._send(0, "watch", handle.id)

    def call_back(self, handle: Job[Any]) -> None:
        """Call the callbacks of a completed handle, in a thread of their own."""
        if handle._done_callbacks:
            start_thread("bgjobs-callbacks", handle._invoke_callbacks)

    @library_code
    def save(self, attempt: Attempt, state: str | None, positions: str | None) -> bool:
        """Save a state. How far each() is alone is told with the news; it hears of a stop here."""
        if state is None:
            self._listen(seconds=0)
            return True
        return bool(self.ask("save", state, positions))

    def keep_line(self, attempt: Attempt, at: float, level: int, message: str) -> None:
        """Keep a log line until it is told; the newest LOG_BUFFER of them at most."""
        self._lines.append((at, level, message))


class _Link:
    """The thread that keeps the attempts of this process in touch with their runners."""

    def __init__(self) -> None:
        self.proxies: set[RunnerProxy] = set()  # of attempts under way
        self._thread: threading.Thread | None = None

    def add(self, proxy: RunnerProxy) -> None:
        """Include an attempt that begins."""
        self.proxies.add(proxy)
        if self._thread is None or not self._thread.is_alive():  # it is not after a fork
            # No daemon: subinterpreters have none.
            self._thread = threading.Thread(target=self._run, name="bgjobs-link")
            self._thread.start()

    def _run(self) -> None:
        while self.proxies and threading.main_thread().is_alive():
            time.sleep(TELL_SECONDS)
            for proxy in list(self.proxies):
                if proxy.pid == os.getpid():
                    proxy.keep_in_touch()
                else:  # it was left behind by a fork
                    self.proxies.discard(proxy)
            if not self.proxies:
                self._thread = None  # first: add() starts another one now


_link = _Link()


class _Signals:
    """SIGINT and SIGTERM while an attempt executes in the main thread of its process.

    The first one asks the attempt to pause at its next checkpoint: so Ctrl-C in a terminal, or
    SIGTERM to a whole process group, fails nothing. The signal takes its usual course once the
    attempt has ended, after SIGNAL_SECONDS, when the runner is gone, or at a second signal. (A pool
    that broke sends SIGTERM to its processes and waits for their end.)

    The handler stays when the attempt has ended: a signal that comes while Python puts the default
    back would be lost.
    """

    def __init__(self) -> None:
        self._usual: dict[int, Any] = {}  # handlers
        self._attempt: Attempt | None = None  # under way
        self._came = 0  # the signal, since it began
        self._until = math.inf  # monotonic

    def begin(self, attempt: Attempt) -> None:
        """Heed signals for an attempt, if this is the main thread."""
        import signal
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None, self._note):
                    with contextlib.suppress(ValueError):  # in a subinterpreter
                        self._usual[number] = signal.signal(number, self._note)
            self._attempt, self._came, self._until = attempt, 0, math.inf

    def end(self, attempt: Attempt) -> None:
        """Let a signal that has come take its course."""
        if self._attempt is attempt:
            self._attempt = None
            if self._came:
                self._note(self._came)

    def _note(self, number: int, frame: Any = None) -> None:
        """Be the handler: only note the signal, since this thread may hold any lock."""
        import signal
        if self._attempt is None or self._came:
            signal.signal(number, self._usual[number])
            signal.raise_signal(number)
        self._came, self._until = number, time.monotonic() + SIGNAL_SECONDS

    def look(self, attempt: Attempt, is_gone: bool) -> None:
        """Do what follows from a signal that has come. In the thread of the link."""
        import signal
        if not self._came or self._attempt is not attempt:
            return
        if not attempt.stop_requested:
            attempt.request_stop(RELEASED)
        if is_gone or time.monotonic() > self._until:
            self._until = math.inf
            # The main thread may be in C code, where it runs no handler.
            dies = not callable(self._usual[self._came]) and hasattr(signal, "SIGKILL")
            os.kill(os.getpid(), signal.SIGKILL if dies else self._came)


_signals = _Signals()  # of this process


# ==== layer: page =========================================

# ---- 19 Status page --------------------------------------
#
# Three assets without interpolation, and a JSON interface. What keeps strangers out: only known Host headers are
# answered (DNS rebinding), the API refuses requests from other origins, and an operation needs POST, JSON and a token
# that only a page of this origin can read.

PAGE_HTML = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>bgjobs</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E
%3Crect width='16' height='16' rx='3' fill='%232456c7'/%3E
%3Cpath d='M3 5h10M3 8h7M3 11h4' stroke='%23fff' stroke-width='1.6'/%3E%3C/svg%3E">
<link rel="stylesheet" href="page.css">
<script src="page.js" defer></script>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
  <strong>bgjobs</strong>
  <nav id="views" aria-label="Views"></nav>
</header>
<p id="banner" role="status"></p>
<main id="main" tabindex="-1">
  <noscript>This page needs JavaScript. The same facts are under <code>api/jobs</code> as JSON.</noscript>
</main>
<footer id="dock">
  <p id="answer" role="status"></p>
  <div id="bulk" class="buttons"></div>
</footer>
<dialog id="confirm" aria-labelledby="confirm-title" aria-describedby="confirm-text">
  <h2 id="confirm-title"></h2>
  <p id="confirm-text"></p>
  <form method="dialog" class="buttons">
    <button autofocus>Go back</button>
    <button id="confirm-yes" class="grave" value="yes"></button>
  </form>
</dialog>
</body>
</html>
'''

PAGE_CSS = r''':root {
  color-scheme: light dark;
  --back: light-dark(#ffffff, #15181c);
  --raised: light-dark(#f5f6f8, #1e2227);
  --text: light-dark(#1c2026, #e4e7eb);
  --quiet: light-dark(#5a6270, #a0a8b4);
  --line: light-dark(#e1e4e9, #2d333b);
  --edge: light-dark(#7d8591, #79828f);
  --accent: light-dark(#2456c7, #8ab0ff);
  --on-accent: light-dark(#ffffff, #10131a);
  --chosen: light-dark(#eaf0fd, #1d2a45);
  --good: light-dark(#1a7a3c, #5cc47e);
  --bad: light-dark(#b3261e, #ff8a80);
  --warn: light-dark(#8a5a00, #e3b341);
  --side: 1.25rem; --small: 0.8125rem;
}

/* Text */
* { box-sizing: border-box; }
html { scroll-padding: 1rem 0 5rem; accent-color: var(--accent); }
body {
  margin: 0; min-height: 100vh; display: flex; flex-direction: column;
  background: var(--back); color: var(--text);
  font: 0.875rem/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1 { font-size: 1.375rem; line-height: 1.25; margin: 1rem 0 0.75rem; }
h2 { font-size: 0.9375rem; margin: 1.5rem 0 0.375rem; }
p { margin: 0 0 0.5rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
small, label, dt { color: var(--quiet); font-size: var(--small); font-weight: normal; }
time { white-space: nowrap; }
code, pre, #log { font: var(--small)/1.5 ui-monospace, monospace; }
pre, #log {
  margin: 0; padding: 0.625rem 0.75rem; max-height: 26rem; overflow: auto; white-space: pre-wrap;
  background: var(--raised); border: 1px solid var(--line); border-radius: 4px;
}
pre.error { border-left: 3px solid var(--bad); }
.bad { color: var(--bad); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
h1:focus, main:focus { outline: none; }

/* The frame */
header, #views, #dock, .tabs, .pages, .flags, .buttons, .filters {
  display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem;
}
header, main, #banner, #dock { padding: 0 var(--side); }
header, #banner, #dock { background: var(--raised); border: 0 solid var(--line); }
header { column-gap: 1.5rem; border-bottom-width: 1px; }
header a { padding: 0.625rem 0; color: inherit; }
header a[aria-current] { box-shadow: inset 0 -2px var(--accent); }
#views, #dock, .pages, .flags { column-gap: 1rem; }
#banner, #answer { margin: 0; }
#banner:not(:empty) { padding-block: 0.5rem; border-bottom-width: 1px; color: var(--warn); }
main { flex: 1; padding-bottom: 2rem; }
main[aria-busy] { opacity: 0.6; transition: opacity 0s 0.4s; }
#dock { position: sticky; bottom: 0; }
#dock:has(:not(:empty)) { padding-block: 0.625rem; border-top-width: 1px; }
#answer { order: 1; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; padding: 0.5rem var(--side); }
.path { margin-top: 0.5rem; }
.path + h1 { margin-top: 0.25rem; }
.pages { margin-top: 1rem; }
.pages a, .path a { display: inline-block; padding: 0.25rem 0; }
.export { margin-left: auto; color: var(--quiet); }
.export a { margin-left: 0.5rem; }
.empty { margin: 2rem 0; }
.empty pre { width: fit-content; max-width: 100%; }

.tabs { gap: 0.25rem; margin: 0 0 0.75rem; padding: 0; list-style: none; }
.tabs a { display: block; padding: 0.1875rem 0.625rem; border-radius: 1rem; color: inherit; }
.tabs a[aria-current] { background: var(--accent); color: var(--on-accent); }
.tabs a[aria-current] small { color: inherit; }
:is(header, .tabs, .job) a:not(:hover) { text-decoration: none; }

dialog {
  max-width: min(30rem, calc(100% - 2rem)); padding: 1.25rem;
  background: var(--back); color: var(--text); border: 1px solid var(--edge); border-radius: 6px;
}
dialog h2 { margin-top: 0; }
dialog .buttons { justify-content: flex-end; margin-bottom: 0; }
::backdrop { background: rgb(0 0 0 / 0.45); }

/* What is entered and pressed */
input, select, button { font: inherit; color: var(--text); }
input[type=checkbox] { width: 1rem; height: 1rem; margin: 0; }
input:not([type=checkbox]), select, button {
  min-height: 2rem; padding: 0 0.5rem; background: var(--back); border: 1px solid var(--edge); border-radius: 4px;
}
input[type=search] { width: 11rem; }
button { padding: 0 0.75rem; }
button:hover:enabled { box-shadow: 0 0 0 1px; }
button:disabled { color: var(--quiet); border-color: var(--line); }
button.grave { background: var(--bad); border-color: var(--bad); color: var(--back); }
.buttons { margin: 0.75rem 0; }
td .buttons, #bulk { margin: 0; }
.filters { align-items: end; column-gap: 0.75rem; margin-bottom: 1rem; }
.filters label { display: grid; }
.filters .flag, .flags a { display: flex; align-items: center; gap: 0.375rem; min-height: 2rem; color: var(--text); }
summary { padding: 0.25rem 0; width: fit-content; }

/* Tables */
table { width: 100%; border-collapse: collapse; font-size: var(--small); }
th, td { padding: 0.25rem 0.4375rem; border-bottom: 1px solid var(--line); text-align: left; }
th:first-child { padding-left: 0; }
thead th { color: var(--quiet); white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
tbody tr:hover { background: var(--raised); }
tbody tr.selected { background: var(--chosen); }
td code { overflow-wrap: anywhere; }
td > small { display: block; }
[data-label=Waiting], [data-label=Duration], [data-label=Took] { white-space: nowrap; }
td[data-label="Run by"] { min-width: 5rem; overflow-wrap: anywhere; }
td[data-label=Children] { min-width: 7rem; }
td progress { flex: none; width: 6.5rem; }
td .progress { flex-direction: column; align-items: start; }
.job { display: flex; align-items: center; min-height: 1.75rem; min-width: 14rem; max-width: 24rem; }
.job a { display: inline-block; padding: 0.1875rem 0; }
.pick { flex: none; display: grid; place-items: center; width: 2rem; height: 1.75rem; }
tbody .job > :last-child { min-width: 8rem; }
.indent { flex: 0 0 1.25rem; }
.twist { flex: none; width: 1.75rem; min-height: 1.75rem; padding: 0; }
button.twist { border: 0; background: none; color: var(--quiet); }
.more { padding-left: 5rem; }

/* Jobs */
.status { white-space: nowrap; }
.status::before {
  content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 0.4em;
  border: 1.5px solid; border-radius: 50%;
}
.status:not([data-status=pending], [data-status=cancelled])::before { background: currentColor; }
[data-status=running] { color: var(--accent); }
[data-status=finished] { color: var(--good); }
[data-status=failed], [data-level=ERROR] b, [data-level=CRITICAL] b { color: var(--bad); }
[data-status=stopping], [data-status=stopped], [data-level=WARNING] b { color: var(--warn); }
[data-status=pending], [data-status=cancelled], [data-level=DEBUG] { color: var(--quiet); }
.progress { display: flex; align-items: center; gap: 0 0.5rem; white-space: nowrap; }
progress {
  appearance: none; flex: 0 1 26rem; min-width: 4rem; height: 0.375rem;
  border: 0; border-radius: 1rem; background: var(--line); overflow: hidden;
}
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
dl, .values, .charts { display: grid; gap: 0.75rem 1.25rem; }
dl { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); margin: 1.25rem 0; }
dl > :has(code) { grid-column: 1 / -1; }
dd { margin: 0; }
.values { grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); align-items: start; }
.values h2 { margin-top: 0.75rem; }
.earlier { margin-bottom: 0.5rem; }
#log { list-style: none; }
#log:empty::before { content: "No lines"; color: var(--quiet); }
#log .twist { min-height: 1.5rem; width: 1.5rem; margin-left: -0.5rem; }
#log [data-around] { padding-left: 1.5rem; background: var(--chosen); }
#log time, #log [data-level=INFO] b { color: var(--quiet); font-weight: normal; }

/* Charts */
.charts { grid-template-columns: repeat(auto-fit, minmax(max(min(20rem, 100%), 40%), 1fr)); }
figure { position: relative; margin: 0; min-width: 0; }
figcaption { padding-right: 4rem; }
.most { position: absolute; top: 0; right: 0; }
.axis { display: flex; justify-content: space-between; }
svg { display: block; width: 100%; height: 7.5rem; border-top: 1px dashed var(--line); }
.bar, .band { fill: var(--accent); }
.bad .bar { fill: var(--bad); }
.band { opacity: 0.25; }
.at { fill: var(--text); opacity: 0.25; }
line { stroke: var(--edge); vector-effect: non-scaling-stroke; }
.mean { stroke: var(--accent); stroke-width: 2; }
figure table { width: auto; }
figure details[open] { max-height: 16rem; overflow: auto; }

@media (min-width: 80rem) { .filtering > summary { display: none; } }
@media (max-width: 79.99rem) {         /* a row is a card: its name, a job's status, the rest after its title */
  :root { --side: 0.75rem; }
  #bulk button:disabled, thead, td:empty, .pick + .twist:empty { display: none; }
  table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.875rem; padding: 0.25rem 0 0.375rem; }
  tr { border-bottom: 1px solid var(--line); }
  th, td { border: 0; padding: 0; }
  tbody th { flex: 1 1 100%; }
  td[data-label] { order: 2; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--quiet); }
  td > small { display: inline; margin-left: 0.375rem; }
  td[data-label=Actions] { flex: 1 1 100%; padding: 0.25rem 0; }
  td:is([data-label=Status], [data-label=Progress], [data-label=Actions])::before { content: none; }

  .jobs thead { display: block; }
  .jobs thead th:not(:first-child) { display: none; }
  .jobs tr { align-items: start; padding-left: 2rem; }
  .jobs .pick { margin-left: -2rem; }
  .jobs tbody th { flex-basis: calc(100% - 7.875rem); }
  .job, tbody .job > :last-child { min-width: 0; max-width: none; }
  .indent { flex-basis: 0.375rem; }
  tbody .job { align-items: start; }
  .job, td[data-label=Status] { font-size: 0.875rem; }
  td[data-label=Status] { order: 1; flex: 0 0 7rem; padding-top: 0.1875rem; text-align: right; }
  td[data-label=Status] > small { display: block; }
  td[data-label=Progress] { order: 1; flex: 1 1 100%; }
  td[data-label=Progress]:has(> small) { display: none; }
  td .progress { flex-direction: row; align-items: center; }
  td progress { flex: 0 1 20rem; }
}
'''

PAGE_JS = r'''"use strict";

/* The page shows what the JSON interface says and keeps no truth of its own. A view loads data and builds
   elements from it; morph() makes the document look like them. The same happens after every poll and
   once a second, so nothing that draws has to know what was there before. */

const POLL_MS = 1500, TIMEOUT_MS = 20000;
const PAGE = 50, MOST_CHILDREN = 100;                    // jobs in a list; children of each in a tree
const LOG_PAGE = 500, LOG_MOST = 2000;                   // log lines that are fetched: new ones, earlier ones
const LOG_LINES = 10000, CONTEXT = 5;                    // that are on the page; around one of them
const BASE = location.origin + location.pathname.replace(/\/jobs\/\d+$|\/[^/]*$/, "/");    // where it is mounted

const STATUSES = ["pending", "running", "stopping", "stopped", "finished", "failed", "cancelled"];

/* Kind -> name -> the button, the word in the answer, and what to say before doing it. */
const OPERATIONS = { jobs: {
  stop: ["Stop", "stopped"],
  resume: ["Resume", "resumed"],
  force_stop: ["Force stop", "force-stopped", "This does not wait for a checkpoint. What has been done since the "
    + "last one is done again after a resume."],
  cancel: ["Cancel", "cancelled", "A cancelled job never runs, and nothing brings it back. Its pending and "
    + "stopped children are cancelled with it."],
  restart: ["Restart", "restarted", "A restarted job runs from scratch: its saved state, progress and error "
    + "count are cleared, and its former children are removed."],
  set_low_priority: ["Low priority", "set to low priority"],
  remove_low_priority: ["Normal priority", "set to normal priority"],
}, schedules: {
  run_now: ["Run now", "submitted"],
  pause: ["Pause", "paused"],
  resume: ["Resume", "resumed"],
  remove: ["Remove", "removed", "Its jobs stay. It comes back when the app registers it again."],
} };

const WHY = {              // what a phase, or else a status, means for someone who waits
  "scheduled": "It starts at the time it was submitted for.",
  "retrying": "An attempt failed; the next one comes at the time below.",
  "interrupted": "The process that ran it ended. It goes on from its saved state when a worker is free.",
  "waiting for low load": "It is of low priority and starts when nothing normal is ready.",
  "limit reached": "As many jobs of this name are running as its max_running allows.",
  "unknown function": "No running process knows this function: import its module in the app, or name it in "
    + "start(modules=[\u2026]).",
  "waiting for the executor": "The executor that it belongs to takes nothing for now.",
  "waiting for children": "Its function has returned; it is over when all its children are.",
  "pending": "It starts when a worker is free and its turn has come.",
  "stopping": "It was asked to stop and will at its next checkpoint.",
  "stopped": "It can be resumed, or cancelled.",
};

// Elements ------------------------------------------------------------------------------------------------

/* Build an element. A prop is an attribute; ".name" is a property that morph() keeps current; "key" tells
   siblings apart. Children are elements or text, in arrays if need be; null, false and "" are left out. */
const el = (tag, props, ...children) => made(document.createElement(tag), props, children);
const svg = (tag, props, ...children) =>
  made(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function made(node, props, children) {
  node.props = props ?? {};
  for (const name in node.props) setProp(node, name, node.props[name]);
  node.append(...flat(children));
  return node;
}

function setProp(node, name, value) {
  const property = name === "key" ? name : name[0] === "." && name.slice(1);
  if (property) {
    if (node[property] !== value) node[property] = value;
  } else if (value === "" || isThere(value)) {
    node.setAttribute(name, value === true ? "" : value);
  } else {
    node.removeAttribute(name);
  }
}

const isThere = value => value !== undefined && value !== null && value !== false && value !== "";
const flat = content => content.flat(Infinity).filter(isThere);
const byId = id => document.getElementById(id);
const fill = (id, content) => morphChildren(byId(id), flat(content));

const button = (label, onclick, props) => el("button", { type: "button", ".onclick": onclick, ...props }, label);
const flag = (label, props) => el("label", { class: "flag" }, el("input", { type: "checkbox", ...props }), label);
const heading = (...text) => el("h1", { tabindex: -1 }, ...text);
const link = (path, ...text) => el("a", { href: BASE + path }, ...text);
const section = (title, ...content) => el("section", { key: title }, el("h2", null, title), ...content);
const small = (...text) => el("small", null, ...text);

const tabs = (label, ...items) => el("nav", { key: label, "aria-label": label }, el("ul", { class: "tabs" }, items));
const tab = (path, isHere, ...text) =>
  el("li", null, el("a", { href: BASE + path, "aria-current": isHere && "true" }, ...text));

/* A column is its title and a function from an item to what stands in it. The first one names the item. */
const table = (columns, items, key) =>
  tableOf(columns.map(([title]) => title), items.map(item => tableRow(columns, item, { key: item[key] })));
const tableOf = (titles, rows, props) => el("table", { key: "table", ...props },
  el("thead", null, el("tr", null, titles.map(title => el("th", { scope: "col" }, title)))),
  el("tbody", null, rows));
const tableRow = ([[, name], ...columns], item, props) => el("tr", props,
  el("th", { scope: "row" }, name(item)),
  columns.map(([title, cell]) => el("td", { "data-label": title }, cell(item))));

/* Make `old` look like `fresh` by changing only what differs, so that focus, scroll, selected text and
   what someone is typing survive. With ".own" the children are somebody else's business. */
function morph(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const name in { ...old.props, ...fresh.props }) {    // people change properties, only we change attributes
    if (name[0] === "." || old.props[name] !== fresh.props[name]) setProp(old, name, fresh.props[name] ?? null);
  }
  old.props = fresh.props;
  if (!fresh.own && (old.firstChild || fresh.firstChild)) morphChildren(old, [...fresh.childNodes]);
}

const alike = (old, fresh) => old && old.key === fresh.key && old.nodeName === fresh.nodeName;

function morphChildren(parent, children) {
  // What is gone goes first: to move a node takes the focus away from it, so nothing may be in its place.
  const wanted = new Set(children.map(child => child.key)), keyed = new Map();
  for (const old of [...parent.childNodes]) {
    if (wanted.has(old.key)) keyed.set(old.key, old);
    else old.remove();
  }
  let next = parent.firstChild;
  for (const child of children) {
    const old = child.key === undefined ? next : keyed.get(child.key);
    if (!alike(old, child)) {
      parent.insertBefore(child, next);
      continue;
    }
    if (old === next) next = next.nextSibling;
    else parent.insertBefore(old, next);
    morph(old, child);
  }
  for (const rest of [...parent.childNodes].slice(children.length)) rest.remove();
}

// The JSON interface --------------------------------------------------------------------------------------

/* Path -> [ETag, body]. The browser's cache could do this, but would not say that a body is an old one,
   and what counts up from it would jump back at each poll. */
const answers = new Map();
let ahead = 0;                         // milliseconds that the app's clock is ahead of this one
const now = () => Date.now() + ahead;

async function get(path, signal) {
  const [tag, kept] = answers.get(path) ?? [];
  const headers = tag ? { "If-None-Match": tag } : {};
  const response = await fetch(BASE + path, { signal, headers, cache: "no-store" });
  if (response.status === 304) return kept;
  const body = await bodyOf(response);
  body.atLeast = response.headers.get("X-Bgjobs-At-Least")?.split(",") ?? [];      // statuses not counted to the end
  const off = Date.parse(response.headers.get("Date")) - Date.now();
  ahead = Math.abs(off) > 5000 ? off : 0;                // less is the way here
  for (const each of body.jobs ?? [body]) each.at = now();
  if (answers.size > 200) answers.clear();
  answers.set(path, [response.headers.get("ETag"), body]);
  return body;
}

/* Throws an Error with a `status` when the app has answered, but not with what was asked for. */
async function bodyOf(response) {
  const { ok, status } = response;
  if (ok) return response.json();      // which throws when a poll was cut short: half an answer is none
  const body = await response.json().catch(() => ({}));
  if (body.refused) return body;
  throw Object.assign(new Error(body.error ?? `The app answered with status ${status}.`), { status });
}

let granted = null;                    // { token, read_only }
const session = async () => granted ??= await bodyOf(await fetch(BASE + "api/session", { cache: "no-store" }));

async function post(path, body) {
  const send = async () => fetch(BASE + path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Bgjobs-Token": (await session()).token },
    body: JSON.stringify(body),
  });
  let response = await send();
  if (response.status === 403) {       // the app was started again since we asked for the token
    granted = null;
    response = await send();
  }
  return bodyOf(response);
}

// Words ---------------------------------------------------------------------------------------------------

const grouped = new Intl.NumberFormat("en");
const count = number => number > 10000 ? "10,000+" : grouped.format(number);
const percent = progress => Math.floor(progress * 100) + "%";
const listed = (...parts) => parts.filter(Boolean).join(", ");
const nameOf = job => /[^\s\p{Cf}]/u.test(job.label ?? "") ? job.label : job.name;      // for a label that can be seen
/* In a text, whatever the direction of a name: the rest keeps its own. */
const isolated = text => `\u2068${text.replace(/\p{Bidi_Control}/gu, "")}\u2069`;
const named = job => isolated(nameOf(job));

/* 2026-12-31 23:59:59 where the reader is: how Swedes write it. */
const localTime = date => date.toLocaleString("sv");

function when(seconds, inFull) {
  const date = new Date(seconds * 1000);
  if (seconds === null || isNaN(date)) return seconds;   // there are times that no calendar has
  const text = localTime(date), iso = date.toISOString();
  const isToday = date.toDateString() === new Date().toDateString();
  return el("time", { datetime: iso, title: iso }, inFull ? text : isToday ? text.slice(11) : text.slice(0, 16));
}

function span(seconds) {
  if (seconds < 0.005) return "0 s";
  if (seconds < 10) return seconds.toFixed(seconds < 1 ? 2 : 1) + " s";
  const [days, hours, minutes, rest] = [86400, 3600, 60, 1].map(unit => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${rest % 60} s` : `${rest} s`;
}

/* Seconds since the app said so: what grows in the app grows here between two polls. */
const age = (job, since = 0) => Math.max(0, (now() - Math.max(job.at, since * 1000)) / 1000);
const runs = job => job.status === "running" || job.status === "stopping";
const waiting = job => span(job.waiting + (job.status === "pending" ? age(job, job.run_at ?? 0) : 0));
const duration = job => job.started_at === null ? null : span(job.duration + (runs(job) ? age(job) : 0));

function eta(job) {
  if (job.eta === null || !runs(job)) return null;
  const left = Math.max(1, Math.round(job.eta - age(job)));
  if (left < 60) return `${left} s left`;
  return left < 3600 ? `${Math.round(left / 60)} min left` : `${span(left)} left`;
}

const childrenOf = ({ children: { total, done, failed, running } }) => total > 0 && listed(
  `${count(done)} of ${count(total)} done`,
  running && `${count(running)} running`,
  failed && `${count(failed)} failed`);

const statusOf = (status, phase) =>
  [el("span", { class: "status", "data-status": status }, status), phase && small(phase)];

function progress(job) {
  if (job.progress === null) return eta(job);
  const text = small(listed(percent(job.progress), eta(job)));
  if (job.status === "finished") return text;
  return el("div", { class: "progress", title: job.message },
    el("progress", { max: 1, value: job.progress, "aria-label": `Progress of job ${job.id}` }), text);
}

const jobInWords = job => `job ${job.id} (${named(job)})`;
const badCount = number => number > 0 && el("b", { class: "bad" }, count(number));

// The table of jobs ---------------------------------------------------------------------------------------

const COLUMNS = [
  ["Create date", job => when(job.created_at)],
  ["Waiting", waiting],
  ["Start date", job => when(job.started_at)],
  ["Duration", duration],
  ["Status", job => statusOf(job.status, job.phase)],
  ["Errors", job => badCount(job.errors)],
  ["Low priority", job => job.low_priority && "yes"],
  ["Run by", job => job.run_by],
  ["Progress", progress],
  ["Children", childrenOf],
];

const opened = new Set();              // ids of the jobs whose children are shown
const selected = new Set();            // ids
let everything = false;                // all that match the filters are, also those that are not shown
let shown = new Map();                 // id -> job, for every row on the page
const include = (set, item, isIn) => isIn ? set.add(item) : set.delete(item);

/* Fetch the children of a job, and theirs where they are open, however deep. */
async function loadKids(job, signal) {
  job.kids = await get(`api/jobs?parent=${job.id}&system=true&limit=${MOST_CHILDREN}`, signal);
  await loadOpened(job.kids.jobs, signal);
}

const loadOpened = (jobs, signal) =>
  Promise.all(jobs.filter(({ id }) => opened.has(id)).map(job => loadKids(job, signal)));

/* The jobs of a list, or the children of a parent. */
function jobTable(list, parent) {
  const ids = list.jobs.map(job => job.id), areAll = ids.every(id => selected.has(id));
  const head = el("div", { class: "job" }, checkbox("Select all", areAll, ids), el("span", { class: "twist" }), "Job");
  return tableOf([head, ...COLUMNS.map(([title]) => title)], jobRows(list, parent), { class: "jobs" });
}

/* A key is a path like "/7/9": a child that is listed for itself may stand below its parent, too. */
function jobRows({ jobs, next }, parent, depth = 0, path = "") {
  const rows = jobs.map(job => {
    shown.set(job.id, job);
    const key = `${path}/${job.id}`, kids = opened.has(job.id) && job.kids;
    return [jobRow(job, depth, key), kids && jobRows(kids, job.id, depth + 1, key)];
  });
  const isPart = parent && next !== null;                // there are too many for a tree
  return [rows, isPart && el("tr", { key: path + "/more" },
    el("td", { class: "more", colspan: COLUMNS.length + 1 }, link(`?parent=${parent}`, "All children as a list")))];
}

function jobRow(job, depth, key) {
  const isSelected = selected.has(job.id);
  const name = () => el("div", { class: "job" },
    checkbox(`Select job ${job.id}`, isSelected, [job.id]),
    Array.from({ length: Math.min(depth, 8) }, () => el("span", { class: "indent" })),
    job.children.total > 0 ? disclosure(job.id) : el("span", { class: "twist" }),
    el("span", null, link(`jobs/${job.id}`, el("bdi", null, nameOf(job))), " ", small(`#${job.id}`)));
  return tableRow([["Job", name], ...COLUMNS], job, { key, class: isSelected && "selected" });
}

function checkbox(label, checked, ids) {
  const pick = ({ target }) => {
    everything = false;
    for (const id of ids) include(selected, id, target.checked);
    draw();
  };
  return el("label", { class: "pick" },
    el("input", { type: "checkbox", "aria-label": label, ".checked": checked, ".onchange": pick }));
}

function disclosure(id) {
  const isOpen = opened.has(id);
  const toggle = () => {
    include(opened, id, !isOpen);
    poll();
  };
  return button(isOpen ? "\u25be" : "\u25b8", toggle,
    { class: "twist", "aria-expanded": String(isOpen), "aria-label": `Children of job ${id}` });
}

// Operations ----------------------------------------------------------------------------------------------

const say = text => byId("answer").textContent = text;

/* What may be asked of a job, but for a priority that it has. */
const offered = job =>
  job.operations.filter(name => name !== (job.low_priority ? "set_low_priority" : "remove_low_priority"));

function clearSelection() {
  say("");
  selected.clear();
  everything = false;
  draw();
}

function bulkBar() {
  const ids = [...selected], jobs = ids.map(id => shown.get(id));
  if (!ids.length && !everything) return [byId("answer").textContent && button("Close", clearSelection)];
  const names = Object.keys(OPERATIONS.jobs), allowed = everything ? names : jobs.flatMap(offered);
  const isPart = here.view.load === loadList && (here.data.next !== null || here.query.has("before"));
  const selectAll = () => {
    everything = true;
    draw();
  };
  const [whom, body] = everything
    ? [`all ${matching()} jobs that match`, { filter: filtersOf(here.query) }]
    : [ids.length === 1 ? jobInWords(jobs[0]) : `${ids.length} jobs`, { ids }];
  return [
    el("b", null, everything ? `All ${matching()} that match` : `${ids.length} selected`),
    isPart && !everything && allowed.length > 0 && button(`Select all ${matching()} that match`, selectAll),
    names.map(name => operationButton("jobs", name, whom, body, { disabled: !allowed.includes(name) })),
    button("Clear selection", clearSelection),
  ];
}

/* How many jobs have one of these statuses, in words. */
function countOf(statuses, { counts, atLeast }) {
  const sum = statuses.reduce((total, name) => total + Math.min(counts[name] ?? 0, 10000), 0);
  return grouped.format(sum) + (statuses.some(name => counts[name] > 10000 || atLeast.includes(name)) ? "+" : "");
}

const matching = () => countOf(STATUSES.filter(name => name === (here.query.get("status") || name)), here.data);

/* A button that does it, after a question where there is a warning, and says what came of it. */
function operationButton(kind, name, whom, body, props) {
  const [label, done, ...warnings] = OPERATIONS[kind][name];
  if (body.filter) warnings.unshift("It goes to all jobs that pass the filters now, also to those that are not shown.");
  const operate = async () => {
    const warning = warnings.join(" ");
    if (warning && !await confirmed(`${label} ${whom}?`, warning, `Yes, ${label.toLowerCase()}`)) return;
    if (body.filter) say("Working on it\u2026");
    try {
      say(outcome(done, await post(`api/${kind}/${name}`, body)));
    } catch (error) {
      say(error.status ? error.message : "The app did not answer, so it is not known whether this was done.");
    }
    poll();
  };
  return button(label, operate, { key: name, ...props });
}

function outcome(word, { done, refused }) {
  const reasons = refused.slice(0, 3).map(({ why }) => why).join(". ") + (refused.length > 3 ? " \u2026" : "");
  return listed(
    (done.length > 0 || !refused.length) && `${done.length} ${word}`,
    refused.length > 0 && `${refused.length} refused: ${reasons}`);
}

function confirmed(title, text, yes) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.showModal();
  return new Promise(resolve => {      // not by "close", which comes later: perhaps when the next question is asked
    dialog.onsubmit = event => resolve(event.submitter.value === "yes");
    dialog.oncancel = () => resolve(false);
  });
}

// The list ------------------------------------------------------------------------------------------------

const TEXTS = [["q", "Text", "search"], ["name", "Name", "search"], ["run_by", "Run by", "search"],
  ["created_from", "Created from", "datetime-local"], ["created_to", "Created to", "datetime-local"]];
const FLAGS = [["errors", "With errors"], ["low_priority", "Low priority"], ["system", "System jobs"],
  ["children", "Children too"]];
const FILTERS = [...TEXTS, ...FLAGS].map(([name]) => name);
const isOn = value => value === "true" || value === "1";
const unixOf = text => text && String(new Date(text) / 1000);            // of a field for a local time

/* The filters in the page's query string as the interface has them: times are Unix seconds, and children are left out
   unless they are asked for. */
function filtersOf(query) {
  const { before, children, ...filters } = Object.fromEntries(query);
  for (const name of ["created_from", "created_to"]) {
    if (filters[name]) filters[name] = unixOf(filters[name]);
  }
  if (!isOn(children)) filters.parent ??= "none";
  return filters;
}

/* A query string with changes, which lead to the first page of what they find. */
function withParams(query, changes) {
  const params = new URLSearchParams(query);
  params.delete("before");
  for (const [name, value] of Object.entries(changes)) {
    if (value) params.set(name, value);
    else params.delete(name);
  }
  return String(params) && "?" + params;
}

async function loadList({ query }, signal) {
  const asked = { ...filtersOf(query), before: query.get("before") ?? "", limit: PAGE };
  const answer = await get("api/jobs?" + new URLSearchParams(asked), signal);
  await loadOpened(answer.jobs, signal);
  return answer;
}

function drawList({ query, data }) {
  const { jobs, next } = data, parent = query.get("parent");
  const statusTab = (name, statuses) => tab(withParams(query, { status: name }), (query.get("status") ?? "") === name,
    name || "all", " ", small(countOf(statuses, data)));
  const isPart = next !== null && jobs.length < PAGE;    // the time was up
  return [
    parent ? heading("Children of ", link(`jobs/${parent}`, `job ${parent}`)) : heading("Jobs"),
    tabs("Status", statusTab("", STATUSES), STATUSES.map(name => statusTab(name, [name]))),
    filterForm(query),
    jobs.length > 0 && jobTable(data),
    !jobs.length && (String(query) ? nothingMatches(isPart && next) : firstSteps()),
    el("nav", { key: "pages", "aria-label": "Pages", class: "pages" },
      query.has("before") && link(withParams(query, {}), "Newest"),
      next !== null && link(withParams(query, { before: next }), isPart ? `Search on before #${next}` : "Older"),
      jobs.length > 0 && el("span", { class: "export" },
        "Export all that match:", exportLink(query, "csv"), exportLink(query, "json"))),
  ];
}

const exportLink = (query, format) => el("a",
  { href: `${BASE}api/export?${new URLSearchParams({ ...filtersOf(query), format })}`, download: true },
  format.toUpperCase());

function filterForm(query) {
  const active = FILTERS.filter(name => query.has(name)).length;
  return el("details", { key: "filters", class: "filtering", open: matchMedia("(min-width: 80rem)").matches },
    el("summary", null, active ? `Filters (${active})` : "Filters"),
    el("form", { id: "filters", class: "filters", ".oninput": filterSoon, ".onsubmit": filterNow },
      TEXTS.map(([name, label, type]) => el("label", null, label, el("input", { name, type, value: query.get(name) }))),
      el("div", { class: "flags" },
        FLAGS.map(([name, label]) => flag(label, { name, value: "true", checked: isOn(query.get(name)) })),
        active > 0 && link(withParams("", { status: query.get("status") }), "Clear filters"))));
}

let typing;
function filterSoon() {
  clearTimeout(typing);
  typing = setTimeout(filterNow, 300);
}

function filterNow(event) {
  event?.preventDefault();
  clearTimeout(typing);
  if (!byId("filters")) return;        // gone to another view meanwhile
  const entered = new FormData(byId("filters")), kept = new URLSearchParams(location.search), changes = {};
  for (const name of FILTERS) {        // a box has no way to say that something must be false: such a filter stays
    changes[name] = entered.get(name) ?? (isOn(kept.get(name)) ? null : kept.get(name));
  }
  history.replaceState(null, "", BASE + withParams(kept, changes));
  visit({ typed: true });
}

const empty = (...content) => el("section", { key: "empty", class: "empty" }, ...content);
const nothingMatches = before => empty(
  before ? `None of the jobs from #${before} on matches. ` : "No job matches the filters. ", link("", "Show all jobs"));
const firstSteps = () => empty(
  el("p", null, "There are no jobs yet. Any importable function is one:"),
  el("pre", null, `import bgjobs

def export(table):
    job = bgjobs.current_job()
    # progress, ETA, places to stop:
    for row in job.each(read(table)):
        write(row)

bgjobs.submit(export, "users")`));

// One job -------------------------------------------------------------------------------------------------

const FIELDS = [
  ["Create date", job => when(job.created_at, true)],
  ["To start at", job => when(job.run_at, true)],
  ["Start date", job => when(job.started_at, true)],
  ["End date", job => when(job.finished_at, true)],
  ["Waiting", waiting],
  ["Duration", duration],
  ["Attempt", job => job.attempt],
  ["Errors", job => count(job.errors)],
  ["Run by", job => job.run_by],
  ["Low priority", job => job.low_priority ? "yes" : "no"],
  ["System job", job => job.system && "yes"],
  ["Children", childrenOf],
  ["Function", job => el("code", null, job.name)],
];
const BLOCKS = [["args", "Arguments"], ["kwargs", "Keyword arguments"], ["state", "Saved state"], ["result", "Result"]];
const ATTEMPT_COLUMNS = [
  ["Attempt", each => String(each.attempt)],
  ["Start", each => when(each.started_at, true)],
  ["End", each => when(each.ended_at, true)],
  ["Took", each => each.started_at !== null && span((each.ended_at ?? now() / 1000) - each.started_at)],
  ["Outcome", each => each.outcome ?? "under way"],
  ["Error", each => each.error && el("code", null, each.error)],
];

async function loadJob(here, signal) {
  const [id] = here.args, path = "api/jobs/" + id;
  here.log ??= newLog({ job: id, level: "", text: "", regex: "", since: "", until: "", tree: false, follow: true });
  const [job, { attempts, positions }] = await Promise.all(
    [get(path, signal), get(path + "/attempts", signal), loadLines(here.log, signal)]);
  await loadKids(job, signal);
  const stack = showsStack(job) ? (await get(path + "/stack", signal)).stack : null;
  return { job, stack, attempts, positions };
}

function drawJob({ data: { job, stack, attempts, positions }, log }) {
  shown.set(job.id, job);
  const { id, root_id: root, parent_id: parent, kids } = job;
  return [
    el("nav", { key: "path", class: "path", "aria-label": "Path" }, link("", "Jobs"),
      root !== id && [" / ", link(`jobs/${root}`, `root job ${root}`)],
      parent !== null && parent !== root && [" / ", link(`jobs/${parent}`, `parent job ${parent}`)]),
    heading(el("bdi", null, nameOf(job)), " ", small(`#${id}`)),
    el("p", { key: "status" }, statusOf(job.status), job.phase && `, ${job.phase}`, " ",
      small(WHY[job.phase] ?? WHY[job.status], " ", whereItGoesOn(job, positions))),
    el("p", { key: "operations", class: "buttons" },
      offered(job).map(name => operationButton("jobs", name, jobInWords(job), { ids: [id] }))),
    el("div", { key: "progress" }, progress(job), small(job.message)),
    runs(job) && stackDetails(job, stack),
    job.error && section("Error", el("pre", { class: "error", tabindex: 0 }, job.error)),
    el("dl", { key: "fields" }, FIELDS.map(([title, field]) => [title, field(job)]).map(([title, value]) =>
      isThere(value) && el("div", { key: title }, el("dt", null, title), el("dd", null, value)))),
    el("div", { key: "values", class: "values" }, BLOCKS.map(([name, title]) => !isEmpty(job[name])
      && section(title, el("pre", { tabindex: 0 }, JSON.stringify(job[name], null, 2))))),
    attempts.length > 1 && section("Attempts", table(ATTEMPT_COLUMNS, attempts, "attempt")),
    kids.jobs.length > 0 && section("Children", jobTable(kids, id)),
    logSection(log),
  ];
}

const isEmpty = value => value === null || typeof value === "object" && Object.keys(value).length === 0;

/* Where the next attempt would go on, for a job that has begun and may have one. */
function whereItGoesOn(job, positions) {
  const hasNone = job.attempt === 0 || job.phase === "waiting for children";
  if (hasNone || job.status === "finished" || job.status === "cancelled") return null;
  const saved = listed(
    positions.some(Boolean) && `after item ${positions.map(count).join(", then ")} of job.each()`,
    job.state !== null && "with the saved state below");
  return (runs(job) ? "Interrupted now, it would go on " : "It would go on ")
    + (saved || "from its beginning: nothing is saved") + ".";
}

/* Why is it still stopping? Here is where its thread is. */
const showsStack = job => runs(job) && (here.stack ?? job.status === "stopping");

function stackDetails(job, stack) {
  const open = showsStack(job);
  const toggled = ({ target }) => {
    if (target.open === open) return;
    here.stack = target.open;
    poll();
  };
  return el("details", { key: "stack", open, ".ontoggle": toggled },
    el("summary", null, job.status === "stopping" ? "Where it is, on its way to a checkpoint" : "Where it is now"),
    open && el("pre", { tabindex: 0 },
      stack ?? "No thread of this process executes it: it runs in another process, or waits for children."));
}

// The log of a job ----------------------------------------------------------------------------------------

const LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"];

/* A log with its filters (others make another log), of which no line is known yet: neither the `first` one nor the
   last, whose id is `after`. drawLines() has yet to put the `earlier` lines at its beginning and the `fresh` ones at
   its end. `isWhole`: nothing comes before the first; `wrong`: why the regex cannot be used. */
const newLog = filters => ({ ...filters, first: null, after: "", earlier: [], fresh: [], isWhole: false, wrong: "" });

async function getLines({ job, level = "", text = "", since = "", until = "", tree = false }, where, signal) {
  const asked = new URLSearchParams({ level, text, since: unixOf(since), until: unixOf(until), tree, ...where });
  return (await get(`api/jobs/${job}/logs?${asked}`, signal)).logs;
}

async function loadLines(log, signal) {
  const { after } = log, lines = await getLines(log, { after, limit: LOG_PAGE }, signal);
  const found = await matchingLines(log, lines);
  if (log.after !== after) return;     // another poll was quicker
  log.fresh.push(...found);
  log.after = lines.at(-1)?.id ?? after;
  if (!log.first) {
    log.first = lines[0];
    log.isWhole = lines.length < LOG_PAGE;
  }
  while (log.regex && !log.isWhole) await loadEarlier(log, signal);        // it is looked for in all lines
}

async function loadEarlier(log, signal) {
  const { first } = log, lines = await getLines(log, { until: first.at, limit: LOG_MOST }, signal);
  const earlier = lines.filter(({ id }) => id < first.id), found = await matchingLines(log, earlier);
  if (log.first !== first) return;     // the button was pressed twice
  log.isWhole = lines.length < LOG_MOST || !earlier.length;
  log.first = earlier[0] ?? first;
  log.earlier.unshift(...found);
}

/* The lines that the log's expression is found in. It is tried here, so that a slow one keeps nobody's app busy,
   and in a worker, so that it does not keep the page busy either. */
async function matchingLines(log, lines) {
  if (log.wrong) return [];
  if (!log.regex || !lines.length) return lines;
  const worker = new Worker(BASE + "page.js");
  const { found, error } = await new Promise(resolve => {
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = () => resolve({ error: "It cannot be tried here." });
    setTimeout(resolve, 2000, { error: "It takes too long on these lines." });
    worker.postMessage([log.regex, lines.map(({ message }) => message)]);
  });
  worker.terminate();
  log.wrong = error ?? "";
  return found ? lines.filter((line, i) => found[i]) : [];
}

/* What the worker does, which is this file, too. */
function tryExpression({ data: [source, messages] }) {
  try {
    const expression = new RegExp(source, "i");
    postMessage({ found: messages.map(message => expression.test(message)) });
  } catch ({ message }) {
    postMessage({ error: message });
  }
}

function logSection(log) {
  const refilter = (name, key) => ({ target }) => {
    here.log = newLog({ ...here.log, [name]: target[key] });
    poll();
  };
  const field = (label, name, type, props) => el("label", null, label,
    el("input", { type, ".value": log[name], ".oninput": refilter(name, "value"), ...props }));
  const follow = on => {
    log.follow = on;
    if (on) toTheEnd();
  };
  const scrolled = ({ target: { scrollTop, clientHeight, scrollHeight } }) => {
    log.follow = scrollTop + clientHeight > scrollHeight - 40;
  };
  return section("Log",
    el("p", { class: "filters" },
      el("label", null, "Level", el("select", { ".value": log.level, ".onchange": refilter("level", "value") },
        el("option", { value: "" }, "all"), LEVELS.map(name => el("option", { value: name }, `${name} and above`)))),
      field("Text", "text", "search"),
      field("Regex", "regex", "search", log.wrong ? { "aria-invalid": "true", "aria-describedby": "regex-wrong" } : {}),
      field("From", "since", "datetime-local"), field("To", "until", "datetime-local"),
      flag("Children too", { ".checked": log.tree, ".onchange": refilter("tree", "checked") }),
      flag("Follow", { ".checked": log.follow, ".onchange": ({ target }) => follow(target.checked) })),
    log.wrong && el("p", { key: "wrong", id: "regex-wrong", class: "bad" }, log.wrong),
    !log.isWhole && button("Earlier lines", () => attempted(loadEarlier(log)), { key: "earlier", class: "earlier" }),
    el("ol", { id: "log", key: log, ".own": true, ".onscroll": scrolled, tabindex: 0, "aria-label": "Log lines" }));
}

/* Say it when what a person asked for comes to nothing. */
const attempted = promise => promise.catch(error => say(error.message)).finally(draw);

/* Put the lines that have come into the list. */
function drawLines({ log }) {
  const list = byId("log"), isPart = log.level || log.text || log.regex || log.since || log.until;
  const isMore = log.fresh.length > 0;
  const drawn = lines => lines.splice(0).map(line => logLine(line, log.tree, isPart && contextButton(line)));
  const height = list.scrollHeight, earlier = drawn(log.earlier);
  list.prepend(...earlier);
  if (earlier.length) list.scrollTop += list.scrollHeight - height;
  list.append(...drawn(log.fresh));
  while (list.childElementCount > LOG_LINES) list.firstChild.remove();
  if (log.follow && isMore) toTheEnd();
}

function toTheEnd() {
  byId("log").scrollTop = byId("log").scrollHeight;
}

const logLine = ({ job_id, at, level, message }, tree, tool, around) =>
  el("li", { "data-level": level, "data-around": around },
    tool, when(at), " ", tree && [link(`jobs/${job_id}`, `#${job_id}`), " "], el("b", null, level), " ", message);

const contextButton = line => button("\u2195", ({ currentTarget }) => attempted(toggleContext(line, currentTarget)),
  { class: "twist", "aria-expanded": "false", title: "The lines around this one" });

/* Show, or hide, what a line's job logged before and after it, whatever the filters say. */
async function toggleContext({ id, at, job_id: job }, toggle) {
  const isOpen = () => toggle.getAttribute("aria-expanded") === "true";
  toggle.setAttribute("aria-expanded", String(!isOpen()));
  for (const old of byId("log").querySelectorAll(`[data-around="${id}"]`)) old.remove();
  if (!isOpen()) return;
  here.log.follow = false;             // somebody reads
  const [before, after] = await Promise.all(
    [getLines({ job }, { until: at, limit: CONTEXT + 1 }), getLines({ job }, { after: id, limit: CONTEXT })]);
  if (!isOpen()) return;
  const drawn = lines => lines.map(line => logLine(line, here.log.tree, null, id));
  toggle.parentElement.before(...drawn(before.filter(line => line.id < id)));
  toggle.parentElement.after(...drawn(after));
}

// Schedules -----------------------------------------------------------------------------------------------

const SCHEDULE_COLUMNS = [
  ["Function", each => el("bdi", { title: each.name }, nameOf(each))],
  ["Schedule", each => [el("code", null, each.schedule), each.tz && small(each.tz)]],
  ["Next", nextTime],
  ["Last", each => when(each.last_at)],
  ["Last job", each => each.job_id && [link(`jobs/${each.job_id}`, `#${each.job_id}`), " ",
    each.job_status ? statusOf(each.job_status) : small("removed since")]],
  ["Runs", each => count(each.runs)],
  ["Skipped", each => each.skipped > 0 && count(each.skipped)],
];

function nextTime(each) {
  if (each.next_at === null) {
    return each.paused ? "paused" : el("span", { class: "bad" }, "not in the code of any running process");
  }
  const seconds = each.next_at - now() / 1000;
  return [when(each.next_at), small(seconds > 0 ? `in ${span(Math.ceil(seconds))}` : "due")];
}

const loadSchedules = async (here, signal) =>
  ({ ...await get("api/schedules", signal), isReadOnly: (await session()).read_only });

function drawSchedules({ data: { schedules, isReadOnly } }) {
  const columns = isReadOnly ? SCHEDULE_COLUMNS : [...SCHEDULE_COLUMNS, ["Actions", scheduleButtons]];
  const none = () => empty(
    el("p", null, "There are no schedules yet. This makes a job each night:"),
    el("pre", null, 'bgjobs.every("30 2 * * *", clean_up, tz="UTC")'));
  return [heading("Schedules"), schedules.length ? table(columns, schedules, "id") : none()];
}

const scheduleButtons = each => el("div", { class: "buttons" },
  ["run_now", each.paused ? "resume" : "pause", !each.registered && "remove"].filter(Boolean).map(name =>
    operationButton("schedules", name, `the schedule of ${named(each)}`, { ids: [each.id] },
      { "aria-label": `${OPERATIONS.schedules[name][0]}: ${named(each)}` })));

// Statistics ----------------------------------------------------------------------------------------------

const WINDOWS = [["1h", "1 hour"], ["24h", "24 hours"], ["7d", "7 days"], ["30d", "30 days"]];
const CHARTS = [["Created", "created"], ["Failed", "failed", "bad"], ["Waiting", "waiting"], ["Run time", "running"]];

/* A value of the statistics is a number of jobs, or the seconds { avg, min, max } of some, or null: those of none. */
const isCount = value => typeof value === "number";
const inWords = value =>
  isCount(value) ? count(value) : value && `${span(value.avg)} (${span(value.min)} \u2013 ${span(value.max)})`;

const FUNCTION_COLUMNS = [
  ["Function", each => link("statistics" + withParams(here.query, { name: each.name }), each.name)],
  ["Created", each => count(each.created)],
  ["Started", each => count(each.started)],
  ["Finished", each => count(each.finished)],
  ["Failed", each => badCount(each.failed)],
  ["Waiting", each => inWords(each.waiting)],
  ["Run time", each => inWords(each.running)],
];

const loadStatistics = ({ query }, signal) => get("api/stats?" + query, signal);

function drawStatistics({ query, data }) {
  const path = changes => "statistics" + withParams(query, changes);
  const functions = [...data.functions].sort((a, b) => b.created - a.created || (a.name < b.name ? -1 : 1));
  return [
    heading("Statistics", query.has("name") && [" of ", el("code", null, query.get("name"))]),
    tabs("Window", WINDOWS.map(([window, label]) => tab(path({ window }), data.window === window, label)),
      query.has("name") && tab(path({ name: "" }), false, "All functions")),
    el("div", { key: "charts", class: "charts" }, CHARTS.map(chart => figure(data, ...chart))),
    functions.length > 0 && section("Functions", table(FUNCTION_COLUMNS, functions, "name")),
  ];
}

function figure({ parts, total, window, from, to }, title, field, tone) {
  const clock = seconds => localTime(new Date(seconds * 1000)).slice(["1h", "24h"].includes(window) ? 11 : 0, 16);
  const values = parts.map(part => part[field]), whole = total[field];
  const most = Math.max(...values.map(value => value?.max ?? value));
  const summary = isCount(whole) ? `${count(whole)} in all` : inWords(whole) ?? "no job";
  const pointed = here.pointed?.title === title ? here.pointed.index : null;
  const part = index =>
    `${clock(parts[index].at)} \u2013 ${clock(parts[index + 1]?.at ?? to)}: ${inWords(values[index]) ?? "no job"}`;
  const columns = [["From", part => clock(part.at)], [title, part => inWords(part[field])]];
  return el("figure", { key: title },
    el("figcaption", null,
      el("b", null, title), " ", el("small", { role: "status" }, pointed === null ? summary : part(pointed))),
    el("small", { class: "most", "aria-hidden": "true" }, most > 0 && (isCount(whole) ? count(most) : span(most))),
    svg("svg", {
      viewBox: `0 0 ${parts.length} ${most || 1}`, preserveAspectRatio: "none", class: tone,
      role: "img", "aria-label": `${title}, ${summary}. Arrow keys read the parts.`,
      ...pointing(title, parts.length, pointed),
    }, drawing(values, most || 1, pointed)),
    el("div", { class: "axis", "aria-hidden": "true" }, small(clock(from)), small(clock(to))),
    el("details", null, el("summary", null, "Data"), table(columns, parts.filter(part => part[field]), "at")));
}

/* The props of a chart whose parts are read by pointer and by arrow keys. */
function pointing(title, length, pointed) {
  const point = index => {
    here.pointed = index !== null && { title, index: Math.max(0, Math.min(length - 1, index)) };
    draw();
  };
  const leave = () => point(null);
  const follow = ({ currentTarget, clientX }) => {
    const { left, width } = currentTarget.getBoundingClientRect();
    point(Math.floor((clientX - left) / width * length));
  };
  const keys = { ArrowLeft: -1, ArrowRight: 1, Home: -length, End: length };
  const move = event => {
    if (!(event.key in keys)) return;
    event.preventDefault();            // of scrolling
    point((pointed ?? length) + keys[event.key]);
  };
  return { tabindex: 0, ".onkeydown": move, ".onpointermove": follow, ".onpointerleave": leave, ".onblur": leave };
}

/* A bar for each number; for seconds one from the least to the most, and a line at the average. In the drawing a part
   is 1 wide and a value is as high as it says. */
function drawing(values, most, pointed) {
  const bar = (name, x, low, high) =>
    svg("rect", { key: name + x, class: name, x: x + 0.1, width: 0.8, y: most - high, height: high - low });
  const line = (name, x, width, value) =>
    svg("line", { key: name + x, class: name, x1: x, x2: x + width, y1: most - value, y2: most - value });
  return [
    pointed !== null && bar("at", pointed, 0, most),
    values.map((value, x) => value && (isCount(value) ? bar("bar", x, 0, value)
      : [bar("band", x, value.min, value.max), line("mean", x, 1, value.avg)])),
    line("base", 0, values.length, 0),
  ];
}

// Where we are, and keeping it current --------------------------------------------------------------------

/* A view: where it is below BASE, what it is under in the navigation, load(here, signal) -> data,
   draw(here) -> elements, and drawn(here) for what it does to the document itself. */
const VIEWS = [
  { route: /^$/, under: "Jobs", load: loadList, draw: drawList },
  { route: /^jobs\/(\d+)$/, under: "Jobs", load: loadJob, draw: drawJob, drawn: drawLines },
  { route: /^statistics$/, under: "Statistics", load: loadStatistics, draw: drawStatistics },
  { route: /^schedules$/, under: "Schedules", load: loadSchedules, draw: drawSchedules },
];
const NAVIGATION = [["Jobs", ""], ["Statistics", "statistics"], ["Schedules", "schedules"]];

let here = null;                       // { view, args, query, data } of the address in the bar
let polling = null, timer = null;

function routeOf(pathname) {
  const url = location.origin + pathname, path = url.startsWith(BASE) ? url.slice(BASE.length) : null;
  const view = VIEWS.find(({ route }) => path !== null && route.test(path));
  return view && { view, args: view.route.exec(path).slice(1) };
}

/* Show what the address says. `typed`: it was the filter form that changed it, so leave that alone. */
function visit({ typed = false, scroll = 0 } = {}) {
  const isFirst = here === null, route = routeOf(location.pathname) ?? { view: VIEWS[0], args: [] };
  here = { ...route, query: new URLSearchParams(location.search), data: null };
  everything = false;
  if (!typed) {
    selected.clear();
    say("");
  }
  byId("main").setAttribute("aria-busy", "true");
  here.arrive = () => {
    byId("main").removeAttribute("aria-busy");
    if (typed || isFirst) return;
    byId("filters")?.reset();          // to the values of the address
    byId("main").querySelector("h1").focus({ preventScroll: true });
    scrollTo(0, scroll);
  };
  poll();
}

const abandonedIn = ({ abandoned, workers, pid, host }) => abandoned > 0
  && `${abandoned} of the force-stopped attempts in process ${pid} on ${host} `
  + `still run (at ${2 * workers} it takes no more jobs)`;

async function poll() {
  clearTimeout(timer);
  polling?.abort();
  const mine = polling = new AbortController(), late = setTimeout(() => mine.abort(), TIMEOUT_MS);
  const outcome = { refused: null };
  let trouble;
  try {
    const loads = [here.view.load(here, mine.signal), get("api/runners", mine.signal)];
    const [data, { runners }] = await Promise.all(loads);
    outcome.data = data;
    trouble = listed(...runners.map(abandonedIn));
  } catch ({ status, message }) {
    if (status) outcome.refused = message;
    if (status < 500) outcome.data = null;               // there is no such thing, or not any more
    trouble = status < 500 ? "" : outcome.refused ?? "The connection to the app is lost. Trying again.";
  }
  clearTimeout(late);
  if (mine !== polling) return;        // somebody could not wait for the next poll
  Object.assign(here, outcome);
  if (byId("banner").textContent !== trouble) byId("banner").textContent = trouble;      // else it is read out again
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
  draw();
}

function draw() {
  if (!here.data && !here.refused) return;
  const focused = document.activeElement;
  shown = new Map();
  const content = here.data ? here.view.draw(here)
    : [heading("This cannot be shown"), el("p", null, here.refused), link("", "All jobs")];
  for (const id of selected) if (!shown.has(id)) selected.delete(id);   // nobody operates on what he cannot see
  everything &&= here.data !== null;
  fill("main", content);
  document.title = `${isolated(byId("main").querySelector("h1").textContent)} - bgjobs`;
  fill("bulk", bulkBar());
  fill("views", NAVIGATION.map(([title, path]) =>
    el("a", { href: BASE + path, "aria-current": here.view.under === title && "true" }, title)));
  if (here.data) here.view.drawn?.(here);
  if (!focused.isConnected || focused.disabled) byId("main").focus({ preventScroll: true });
  here.arrive?.();
  here.arrive = null;
}

/* Go to another view without leaving the page. */
function goToLink(event) {
  const a = event.target.closest("a[href]");
  if (a?.getAttribute("href") === "#main") {
    event.preventDefault();
    byId("main").focus();
    return;
  }
  if (!a || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  if (a.origin !== location.origin || a.hash || !routeOf(a.pathname)) return;
  event.preventDefault();
  history.replaceState({ scroll: scrollY }, "");
  history.pushState(null, "", a.href);
  visit();
}

if (self.document) {
  document.addEventListener("click", goToLink);
  addEventListener("popstate", event => visit(event.state ?? {}));
  document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : poll());
  setInterval(() => document.hidden || draw(), 1000);
  visit();
} else {
  onmessage = tryExpression;
}
'''

RUNNERS = """SELECT id, pid, host, workers, started_at, heartbeat_at, abandoned
    FROM bgjobs_runners ORDER BY id"""
PAGE_TOKEN = "SELECT token FROM bgjobs_clock WHERE token IS NOT NULL"
KEEP_PAGE_TOKEN = "UPDATE bgjobs_clock SET token = :token WHERE token IS NULL"
ATTEMPTS = """SELECT number AS attempt, started_at, ended_at, outcome, error FROM bgjobs_attempts
    WHERE job_id = :id ORDER BY number"""


def attempts_of(store: Store, job_id: int) -> Fields:
    """Return a job's attempts, oldest first, and the saved positions of its each() loops, outermost
    first.

    {"attempts": [{"attempt", "started_at", "ended_at", "outcome", "error"}], "positions": [int]}.
    The last attempt is in the job's own row, unless something followed it.
    Raises KeyError if there is no such job.
    """
    rows = store.read("SELECT * FROM bgjobs_jobs WHERE id = :id", {"id": job_id})
    if not rows:
        raise KeyError(f"there is no job {job_id} in {store.path}")
    row = rows[0]
    attempts = [dict(each) for each in store.read(ATTEMPTS, {"id": job_id})]
    if row["attempt"] not in [0, *(each["attempt"] for each in attempts)]:
        attempts.append({
            "attempt": row["attempt"], "started_at": row["since"] or row["started_at"],
            "ended_at": row["finished_at"],
            "outcome": row["status"] if row["status"] in OVER else None, "error": None})
    return {"attempts": attempts, "positions": json.loads(row["positions"] or "[]")}


def count_jobs(store: Store, filters: Fields) -> tuple[dict[str, int], list[str]]:
    """Return how many jobs of each status pass the other filters, at most COUNT_LIMIT, and the
    statuses that may have more such jobs, since the search ended before."""
    where, values = conditions(filters)
    counts, at_least, bottom = dict.fromkeys(STATUSES, 0), [], None
    an_index_counts = set(where) <= set(_INDEXED)         # however many jobs there are
    if not an_index_counts:
        newest, bottom = newest_jobs(store, where, values, SEARCH_LIMIT)
        rows = store.read(f"SELECT status, count(*) FROM {newest} GROUP BY status", values)
        counts.update(map(tuple, rows))
    for status in STATUSES:
        counts_again = bottom is not None and count_at_most(store, status, [], {}, FEW // 10) < FEW // 10
        if an_index_counts or counts_again:
            counts[status] = count_at_most(store, status, where, values, COUNT_LIMIT)
        elif bottom is not None and counts[status] < COUNT_LIMIT:
            at_least.append(status)
        counts[status] = min(counts[status], COUNT_LIMIT)
    return counts, at_least


def _metric(name: str, help: str, values: Mapping[str, float], label: str = "") -> str:
    """Return the lines of a metric: one for each value of the label, or one without a label."""
    kind = "counter" if name.endswith("_total") else "gauge"
    lines = f"# HELP bgjobs_{name} {help}\n# TYPE bgjobs_{name} {kind}\n"
    for of, value in values.items():
        escaped = of.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")
        labels = f'{{{label}="{escaped}"}}' if label else ""
        lines += f"bgjobs_{name}{labels} {value!r}\n"
    return lines


_COUNTERS = {
    "created_total": "Jobs submitted.",
    "started_total": "Jobs started for the first time.",
    "finished_total": "Jobs finished.",
    "failed_total": "Jobs failed for good.",
    "waiting_seconds_total": "Seconds from creation or due time to the start.",
    "running_seconds_total": "Seconds that ended jobs ran.",
}


COUNTED_BY_NAME = """SELECT name, sum(created) AS created, sum(started) AS started,
    sum(finished) AS finished, sum(failed) AS failed, sum(waiting) AS waiting,
    sum(running) AS running FROM bgjobs_stats GROUP BY name"""


def metrics(core: Core) -> str:
    """Return counters and gauges in the text format of Prometheus, version 0.0.4."""
    count_created(core)
    functions = core.store.read(COUNTED_BY_NAME)
    runners = core.store.read(RUNNERS)
    return "".join([
        _metric("jobs", f"Jobs by status, counted up to {COUNT_LIMIT - 1:,}.",
                count_jobs(core.store, {"system": True})[0], "status"),
        *(_metric(name, help, {row["name"]: row[name.partition("_")[0]] for row in functions},
                  "function") for name, help in _COUNTERS.items()),
        _metric("runners", "Processes that have the file open to run or submit jobs.",
                {"": len(runners)}),
        _metric("abandoned_threads", "Threads of superseded attempts that live on.",
                {"": sum(row["abandoned"] for row in runners)})])


LIST_LIMIT = 500                       # jobs in one answer
LOG_LIMIT = 2_000                      # log lines in one answer
BODY_LIMIT = 1024 * 1024               # bytes
EXPORTS_AT_ONCE = 4                    # each may take as long as its reader
EXPORT_COLUMNS = (
    "id", "name", "label", "status", "created_at", "run_at", "started_at", "finished_at", "run_by",
    "parent_id", "attempt", "message", "phase", "waiting", "duration", "errors", "low_priority",
    "system", "progress", "eta", "children", "root_id", "args", "kwargs", "state", "result",
    "error", "operations")
SCHEDULE_OPERATIONS = ("pause", "resume", "run_now", "remove")
_exports = threading.BoundedSemaphore(EXPORTS_AT_ONCE)
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_SECURITY_HEADERS = (                  # on every answer, errors included
    ("Content-Security-Policy",
     "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; worker-src 'self'; "
     "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-cache"),
)


class _Answer(NamedTuple):
    """What is sent back; a body that comes piece by piece is an iterator."""

    body: bytes | Iterator[bytes]
    kind: str = "application/json"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


def _json_bytes(value: Any) -> bytes:
    return dump(value).encode()


class _Refused(Exception):
    """A request that is answered with an error: its HTTP status, and the text for people."""

    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.answer = _Answer(_json_bytes({"error": text}), status=status, headers=headers)


# Of parameters that are no filters of lists, which `conditions` reads.
_READERS = {"tree": A_TRUTH, "since": A_TIME, "until": A_TIME, "before": A_NUMBER, "after": A_NUMBER, "limit": A_NUMBER}


def _read_parameters(given: Fields, known: Iterable[str]) -> Fields:
    """Return the parameters that are not empty, all but filters read. ValueError: an unknown one, or a bad value."""
    for name, value in given.items():
        if name not in known and value != "":
            raise ValueError(f"unknown filter {name!r}; the filters are {', '.join(known)}")
    return {name: read_value(name, value, _READERS[name]) if name in _READERS else value
            for name, value in given.items() if value != ""}


class _Request:
    """What a WSGI environ says. Its body is read when it is asked for."""

    def __init__(self, environ: Fields) -> None:
        self.environ = environ
        self.is_head = environ.get("REQUEST_METHOD") == "HEAD"
        self.method: str = "GET" if self.is_head else environ.get("REQUEST_METHOD", "GET")
        self.host: str = environ.get("HTTP_HOST", "").lower()
        self.path: str = environ.get("PATH_INFO", "").lstrip("/")
        self.query: str = environ.get("QUERY_STRING", "")
        self.user = ""                                    # for the job log: who it is that has been let in

    def parameters(self, *known: str) -> Fields:
        from urllib.parse import parse_qsl
        given = parse_qsl(self.query, max_num_fields=50)
        if len(given) > len(dict(given)):                 # readers disagree whether the first or the last counts
            raise ValueError("each parameter may be given once")
        return _read_parameters(dict(given), known)

    def json(self) -> Any:
        length = self.environ.get("CONTENT_LENGTH") or ""
        if not (length.isascii() and length.isdigit()):
            raise _Refused(411, "an operation needs a Content-Length")
        if len(length) > 20 or int(length) > BODY_LIMIT:
            raise _Refused(413, f"the body is larger than {BODY_LIMIT:,} bytes")
        try:
            body = self.environ["wsgi.input"].read(int(length))
        except TimeoutError:
            raise _Refused(408, "the body did not come in time") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("the body is not JSON") from None


def _csv_of(pages: Iterable[list[Fields]]) -> Iterator[str]:
    """Yield the pieces of a table of jobs for spreadsheets: a header, then a line for each job."""
    import csv

    def cell(value: Any) -> Any:
        if isinstance(value, (dict, list)):
            value = dump(value)
        is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        return "'" + value if is_formula else value       # a spreadsheet would execute what a stranger has named a job

    line = csv.writer(types.SimpleNamespace(write=str)).writerow       # returns what write() does: the line
    yield line(EXPORT_COLUMNS)
    for infos in pages:
        yield "".join(line([cell(info[name]) for name in EXPORT_COLUMNS]) for info in infos)


def _json_of(pages: Iterable[list[Fields]]) -> Iterator[str]:
    """Yield the pieces of a JSON array of jobs, one a line."""
    before = "[\n"
    for infos in pages:
        if infos:
            yield before + ",\n".join(map(dump, infos))
            before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


_EXPORTS = {"csv": ("text/csv", _csv_of), "json": ("application/json", _json_of)}


def _is_address(name: str) -> bool:
    import ipaddress
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Page:
    """The status page of a runner, as a WSGI app; the options are those of Runner.serve."""

    def __init__(self, core: Core, *, read_only: bool = False, hosts: Iterable[str] = (),
                 password: str | None = None, authorize: Callable[[Fields], str | None] | None = None) -> None:
        import secrets
        if password is not None and not (
                isinstance(password, str) and password and text_of(password, len(password)) == password):
            raise ValueError("password must be a text that is not empty, without lone surrogates")
        if isinstance(hosts, str):
            raise ValueError(f"hosts must be a list of names, got {short(hosts)}")
        if authorize is not None and not callable(authorize):
            raise ValueError(f"authorize must be a function of the request, got {short(authorize)}")
        self.core, self._read_only, self._password, self._authorize = core, read_only, password, authorize
        self.is_guarded = password is not None or authorize is not None
        self._hosts = {host.lower() for host in hosts}
        self._port: int | None = None                     # of our own server: then the Host header must name it
        self._boot = secrets.token_hex(4)                 # no ETag outlives this page

    def __call__(self, environ: Fields, start_response: Function) -> Iterable[bytes]:
        from http import HTTPStatus
        request = _Request(environ)
        try:
            answer = self._answer(request)
        except _Refused as refused:
            answer = refused.answer
        except StoreError as error:                       # which the store has told the log
            answer = _Refused(503, str(error)).answer
        except (Exception, SystemExit):                   # SystemExit: of authorize()
            _log.exception("the status page failed on %s", request.path[:200])
            answer = _Refused(500, "internal error; see the app's log").answer
        headers = [("Content-Type", f"{answer.kind}; charset=utf-8"), *answer.headers, *_SECURITY_HEADERS]
        if isinstance(answer.body, bytes):
            headers.append(("Content-Length", str(len(answer.body))))
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", headers)
        if request.is_head:
            return [b""]
        return [answer.body] if isinstance(answer.body, bytes) else answer.body

    def _answer(self, request: _Request) -> _Answer:
        """Let the request in, and answer it by the table of routes."""
        self._check_host(request)
        if request.environ.get("PATH_INFO", "") == "" and request.environ.get("SCRIPT_NAME"):
            return self._redirect_to_slash(request)
        if self.core.store.closed:
            raise _Refused(503, f"the runner on {self.core.path} is shut down")
        if request.path != "healthz":
            request.user = self._user(request)
        is_api = request.path.startswith("api/")
        if is_api:
            self._check_origin(request)
        if is_api and request.method == "POST":
            self._check_token(request)
        elif request.method != "GET":
            raise _Refused(405, f"{request.method} is not allowed here")
        function, arguments, has_etag = self._route(request)
        tag = self._etag(request) if has_etag else ""
        if tag and request.environ.get("HTTP_IF_NONE_MATCH") == tag:
            return _Answer(b"", status=304)
        try:
            found = function(self, request, *arguments)
        except ValueError as error:                       # of a parameter
            raise _Refused(400, str(error)) from None
        answer = found if isinstance(found, _Answer) else _Answer(_json_bytes(found))
        return answer._replace(headers=(*answer.headers, ("ETag", tag))) if tag else answer

    def _route(self, request: _Request) -> tuple[Function, tuple[str, ...], bool]:
        """Return what answers a request, the arguments in its path, and whether the answer has an ETag."""
        import re
        for method, path, function, has_etag in self._ROUTES:
            found = re.fullmatch(path, request.path)
            if found and method == request.method:
                return function, found.groups(), has_etag
        raise _Refused(404, "there is nothing at this address")

    def _etag(self, request: _Request) -> str:
        """Return what stays the same until something is committed; of statistics, whose windows move, for a minute."""
        asked = hash((request.path, request.query))
        minute = int(time.time() // 60) if request.path == "api/stats" else 0
        return f'W/"{self._boot}{asked:x}-{self.core.store.version()}-{minute}"'

    def _redirect_to_slash(self, request: _Request) -> _Answer:
        """Lead from where the page is mounted to the same with a slash at its end, below which the assets are."""
        from urllib.parse import quote
        folder = quote(request.environ["SCRIPT_NAME"].rpartition("/")[2].encode("latin-1"))
        query = f"?{request.query}" if request.query else ""
        return _Answer(b"", "text/plain", 308, (("Location", f"{folder}/{query}"),))

    # who may ask

    def _check_host(self, request: _Request) -> None:
        """Refuse a Host that is missing, doubled, or a stranger's: a web page could have made its name lead here."""
        import socket
        name, _, port = request.host.rpartition(":")
        if not port.isdigit():
            name, port = request.host, "80"
        # An address, or this machine's own name, cannot be made to lead here by somebody else's DNS.
        is_own = name in _LOOPBACK_NAMES or self.is_guarded and (
            _is_address(name.strip("[]")) or name == socket.gethostname().lower())
        is_ours = is_own and (self._port is None or port == str(self._port))
        if not (is_ours or request.host in self._hosts or name in self._hosts):
            raise _Refused(421, "this host name is not answered; a page that is reached by another name gets "
                                "hosts=[name]")

    def _user(self, request: _Request) -> str:
        """Return who asks, a name for the job log. _Refused: somebody who may not."""
        import hmac
        if self._authorize is not None:
            user = self._authorize(request.environ)
            if not isinstance(user, str) or not user.strip():            # False, "" and the like admit nobody
                raise _Refused(403, "you may not see this page")
            return text_of(user, 200)
        if self._password is None:
            return "web"
        kind, _, coded = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        try:
            given = base64.b64decode(coded, validate=True) if kind.lower() == "basic" else b""
        except ValueError:
            given = b""
        name, _, password = given.partition(b":")
        if not hmac.compare_digest(password, self._password.encode()):
            raise _Refused(401, "this page needs its password",
                           ("WWW-Authenticate", 'Basic realm="bgjobs", charset="UTF-8"'))
        return text_of(name.decode("utf-8", "replace"), 200) or "web"

    def _check_origin(self, request: _Request) -> None:
        """Refuse what a page of another site, or another port of this machine, makes a browser ask for."""
        environ = request.environ
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            raise _Refused(403, "requests from other sites are refused")
        schemes = ("https", environ.get("wsgi.url_scheme", "http"))      # https: of a proxy before us
        if environ.get("HTTP_ORIGIN") not in (None, *(f"{scheme}://{request.host}" for scheme in schemes)):
            raise _Refused(403, "requests from other origins are refused")

    def _check_token(self, request: _Request) -> None:
        """Refuse an operation that does not come from this page."""
        import hmac
        environ = request.environ
        if self._read_only:
            raise _Refused(403, "this page is read-only")
        if "HTTP_ORIGIN" not in environ:
            raise _Refused(403, "an operation needs the Origin header of this page")
        token = environ.get("HTTP_X_BGJOBS_TOKEN", "")
        if not hmac.compare_digest(token.encode("latin-1", "replace"), self._token().encode()):
            raise _Refused(403, "an operation needs the X-Bgjobs-Token that api/session hands out")
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "the body must be application/json")

    def _token(self) -> str:
        """Return what an operation must bring: known to no other page, and to all processes that serve this file's."""
        import secrets
        store = self.core.store
        while not (rows := store.read(PAGE_TOKEN)):
            token = secrets.token_urlsafe(32)
            store.write(lambda tx: tx.execute(KEEP_PAGE_TOKEN, {"token": token}))
        return str(rows[0][0])

    # the page, and what looks after the app

    def _html(self, request: _Request) -> _Answer:
        return _Answer(PAGE_HTML.encode(), "text/html")

    def _css(self, request: _Request) -> _Answer:
        return _Answer(PAGE_CSS.encode(), "text/css")

    def _javascript(self, request: _Request) -> _Answer:
        return _Answer(PAGE_JS.encode(), "text/javascript")

    def _health(self, request: _Request) -> _Answer:
        self.core.store.read("SELECT 1")
        return _Answer(b"ok\n", "text/plain")

    def _metrics(self, request: _Request) -> _Answer:
        return _Answer(metrics(self.core).encode(), "text/plain; version=0.0.4")

    # reading: what is returned is sent as JSON

    def _session(self, request: _Request) -> Fields:
        token = self._boot if self._read_only else self._token()      # nothing is written for those who only read
        return {"token": token, "read_only": self._read_only, "version": __version__}

    def _list(self, request: _Request) -> _Answer:
        filters = request.parameters(*FILTERS, "before", "limit")
        limit = max(1, min(filters.pop("limit", 50), LIST_LIMIT))
        before = filters.pop("before", None) or None
        store = self.core.store
        ids, following = find_jobs(store, filters, limit, before, SEARCH_LIMIT)
        counts, unsure = count_jobs(store, filters)
        body = _json_bytes({"jobs": self._infos(ids), "next": following, "counts": counts})
        return _Answer(body, headers=(("X-Bgjobs-At-Least", ",".join(unsure)),))      # statuses not counted to the end

    def _infos(self, ids: list[int]) -> list[Fields]:
        return [self._shown(info) for info in describe_jobs(self.core.store, ids)]

    def _shown(self, info: Fields) -> Fields:
        return {**info, "operations": []} if self._read_only else info

    def _pages(self, filters: Fields) -> Iterator[list[int]]:
        """Yield the ids of all jobs that pass, newest first, a page at a time."""
        before = None
        while True:
            ids, before = find_jobs(self.core.store, filters, LIST_LIMIT, before)
            yield ids
            if before is None:
                return

    def _export(self, request: _Request) -> _Answer:
        """Answer with all jobs that pass the filters, page by page."""
        filters = request.parameters(*FILTERS, "format")
        form = filters.pop("format", "csv")
        if form not in _EXPORTS:
            raise ValueError(f"format must be {' or '.join(_EXPORTS)}, got {short(form)}")
        kind, written = _EXPORTS[form]
        pages = self._pages(filters)
        first = next(pages)                               # a bad filter is refused before the answer begins
        if not _exports.acquire(blocking=False):
            raise _Refused(503, f"{EXPORTS_AT_ONCE} exports are under way; try again later")

        def pieces() -> Iterator[bytes]:
            try:
                yield b""                                 # once here, `finally` is reached, whoever drops this
                for text in written(map(self._infos, itertools.chain([first], pages))):
                    yield text.encode()
            finally:
                _exports.release()
        body = pieces()
        next(body)
        return _Answer(body, kind, headers=(("Content-Disposition", f'attachment; filename="jobs.{form}"'),))

    def _info(self, number: str) -> Fields:
        try:
            return self.core.info(int(number))
        except KeyError:
            raise _Refused(404, f"there is no job {number}") from None

    def _job(self, request: _Request, number: str) -> Fields:
        return self._shown(self._info(number))

    def _logs(self, request: _Request, number: str) -> Fields:
        job_id = self._info(number)["id"]
        filters: Fields = {
            "level": None, "text": None, "since": None, "until": None, "after": 0, "limit": 200, "tree": False}
        filters.update(request.parameters(*filters))
        filters["limit"] = min(filters["limit"], LOG_LIMIT)
        return {"logs": self.core.logs(job_id, filters)}

    def _attempts(self, request: _Request, number: str) -> Fields:
        return attempts_of(self.core.store, self._info(number)["id"])

    def _stack(self, request: _Request, number: str) -> Fields:
        """Return where a job's thread in this process is now, from the job's function on."""
        attempt = self.core.dispatch.attempts.get(self._info(number)["id"])
        frame = sys._current_frames().get(attempt.thread) if attempt is not None and attempt.thread else None
        frames = traceback.extract_stack(frame) if frame is not None else []
        calls = [i for i, each in enumerate(frames, 1) if each.name == "_call" and each.filename == __file__]
        own = frames[calls[-1]:] if calls else []
        return {"stack": "".join(traceback.format_list(own)) or None}

    def _stats(self, request: _Request) -> Fields:
        return self.core.face.stats(**request.parameters("window", "name"))

    def _schedules(self, request: _Request) -> Fields:
        rows = self.core.store.read(SCHEDULES, {"system": False})
        return {"schedules": [describe_schedule(row) for row in rows]}

    def _runners(self, request: _Request) -> Fields:
        return {"runners": [dict(row) for row in self.core.store.read(RUNNERS)]}

    # operating

    def _operate(self, request: _Request, kind: str, operation: str) -> _Answer:
        """Operate on each job, or schedule, that the body names; return what was done and what was refused."""
        operations = OPERATIONS if kind == "job" else SCHEDULE_OPERATIONS
        if operation not in operations:
            raise _Refused(404, f"there is no such operation; there are {', '.join(operations)}")
        body = request.json()
        ids = self._ids_in(body, kind)
        done, refused, status = [], [], 200
        for each in ids:
            try:
                if kind == "job":
                    self.core.operate(operation, each, request.user)
                else:
                    getattr(Schedule(self.core, each), operation)()
                done.append(each)
            except KeyError:
                status = 404
                refused.append({"id": each, "why": f"there is no {kind} {each}"})
            except InvalidOperation as error:
                status = 409
                refused.append({"id": each, "why": str(error)})
        is_one = "ids" in body and len(body["ids"]) == 1
        return _Answer(_json_bytes({"done": done, "refused": refused}), status=status if is_one else 200)

    def _ids_in(self, body: Any, kind: str) -> Iterable[int]:
        """Return the ids that an operation's body names. ValueError: a bad body."""
        may_filter = kind == "job"
        if not isinstance(body, dict) or set(body) != {"ids"} and not (may_filter and set(body) == {"filter"}):
            raise ValueError('the body must be {"ids": [...]}' + (' or {"filter": {...}}' if may_filter else ""))
        if "filter" in body:
            return self._matching(body["filter"])
        ids = body["ids"]
        if not isinstance(ids, list) or not all(type(each) is int and 0 < each < 1 << 63 for each in ids):
            raise ValueError(f"ids must be a list of {kind} ids")
        return ids

    def _matching(self, given: Any) -> Iterator[int]:
        """Yield the ids of the jobs that pass a filter, newest first. ValueError: a bad one."""
        if not isinstance(given, dict) or any(isinstance(value, (dict, list)) for value in given.values()):
            raise ValueError("filter must be an object like the parameters of api/jobs")
        for ids in self._pages(_read_parameters(given, FILTERS)):
            yield from ids

    # Method, path, what answers it, given the groups of the path, and whether that has an ETag: it does where nothing
    # but a commit changes it.
    _ROUTES: tuple[tuple[str, str, Function, bool], ...] = (
        ("GET", r"|statistics|schedules|jobs/[0-9]+", _html, False),
        ("GET", r"(?:jobs/)?page\.css", _css, False),
        ("GET", r"(?:jobs/)?page\.js", _javascript, False),
        ("GET", r"healthz", _health, False),
        ("GET", r"metrics", _metrics, False),
        ("GET", r"api/session", _session, False),
        ("GET", r"api/jobs", _list, True),
        ("GET", r"api/export", _export, False),
        ("GET", r"api/jobs/([0-9]{1,18})", _job, True),
        ("GET", r"api/jobs/([0-9]{1,18})/logs", _logs, True),
        ("GET", r"api/jobs/([0-9]{1,18})/attempts", _attempts, True),
        ("GET", r"api/jobs/([0-9]{1,18})/stack", _stack, False),
        ("GET", r"api/stats", _stats, True),
        ("GET", r"api/schedules", _schedules, True),
        ("GET", r"api/runners", _runners, True),
        ("POST", r"api/(job|schedule)s/([^/]+)", _operate, False),
    )


# The server

REQUEST_SECONDS = 10.0             # from the first byte of a request to the last of its answer
CONNECTION_LIMIT = 64


def serve_page(page: Page, host: str, port: int) -> str:
    """Serve a page with http.server on a daemon thread; return its URL, or "" when the port is taken."""
    if host not in ("127.0.0.1", "localhost", "::1") and not page.is_guarded:
        raise ValueError(f"host must be a loopback address, got {host!r}, unless password= or authorize= says who may "
                         "come")
    if not 0 <= port < 65_536:
        raise ValueError(f"port must be 0 to 65535, got {port}")
    try:
        server = _page_server(page, host, port)
    except OSError as error:
        _log.warning("the status page is not served: port %s of %s cannot be used (%s); jobs go on", port, host, error)
        return ""
    page._port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.1,), name="bgjobs-page", daemon=True).start()
    page.core.servers.append(server)
    return f"http://{f'[{host}]' if ':' in host else host}:{page._port}/"


open_door("wsgi", Page)
open_door("serve", serve_page)


def _page_server(page: Page, host: str, port: int) -> Any:
    """Return a server that is bound to its port. Its classes are made here, since what they come from loads late."""
    import io
    import socket
    from socketserver import ThreadingTCPServer
    from wsgiref.simple_server import WSGIRequestHandler

    class DeadlineReader(io.RawIOBase):
        """Reads a socket until an absolute deadline, which one byte now and then cannot push away."""

        def __init__(self, connection: socket.socket) -> None:
            self._connection, self._deadline = connection, time.monotonic() + REQUEST_SECONDS

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self._connection.settimeout(max(0.001, self._deadline - time.monotonic()))
            try:
                return self._connection.recv_into(buffer)
            finally:
                self._connection.settimeout(REQUEST_SECONDS)       # for each part of the answer

    class Handler(WSGIRequestHandler):
        """One request for each connection: what a refused one leaves unread is never taken for the next."""

        server_version, sys_version = "bgjobs", ""
        default_request_version = "HTTP/1.0"              # who does not name one gets headers, too
        error_content_type, error_message_format = "application/json", '{"error": "%(message)s"}'

        def setup(self) -> None:
            super().setup()
            self.rfile = io.BufferedReader(DeadlineReader(self.connection))

        def get_stderr(self) -> Any:
            return io.StringIO()                          # for tracebacks of clients that went away

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            super().send_error(code)                      # the message would repeat what a stranger has sent

        def end_headers(self) -> None:                    # of such an error: the page's answers bring their own
            for header in _SECURITY_HEADERS:
                self.send_header(*header)
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug("page: " + format, *args)

    free = threading.BoundedSemaphore(CONNECTION_LIMIT)

    class Server(ThreadingTCPServer):
        """A thread for each connection, up to a limit; what comes beyond it is closed at once."""

        daemon_threads = True
        allow_reuse_address = os.name != "nt"             # where it would let two servers have one port
        request_queue_size = 64
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def get_app(self) -> Page:
            return page

        def verify_request(self, request: Any, client_address: Any) -> bool:
            return free.acquire(blocking=False)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                free.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            _log.debug("page: a request failed", exc_info=True)            # its client went away, or was too slow

    server = Server((host, port), Handler)
    server.base_environ = {                               # type: ignore[attr-defined]
        "SERVER_NAME": host, "SERVER_PORT": str(server.server_address[1]), "SCRIPT_NAME": "", "CONTENT_LENGTH": ""}
    return server


# ==== layer: command line =================================

# ---- 20 Command line -------------------------------------
#
# For each command there is a function that takes the parsed arguments and returns the exit code; `_arguments`, near the
# end, names them all.

# What goes to a terminal.

_COLOURS = {PENDING: "33", RUNNING: "36", STOPPING: "35", STOPPED: "35", FINISHED: "32", FAILED: "31", CANCELLED: "90"}


def _coloured(status: str) -> str:
    """Return a status in its colour, on a terminal whose user has nothing against it (no-color.org)."""
    colour = _COLOURS.get(status.strip())
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return status if plain or colour is None else f"\x1b[{colour}m{status}\x1b[0m"


def _plain(value: Any) -> str:
    """Return text that does nothing to a terminal but stand there."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _plain_lines(text: str, indent: int = 0) -> str:
    """Return such text whose lines stand below each other, all but the first after so many spaces."""
    return ("\n" + " " * indent).join(map(_plain, text.split("\n")))


def _clock_time(at: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OSError, OverflowError, ValueError):          # beyond all calendars
        return f"{at:g}"


def for_people(seconds: float) -> str:
    """Return a duration like "1 h 5 min", "2 min 10 s" or "3.2 s"."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    import unicodedata
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _fitted(text: str, cells: int) -> str:
    """Return a text cut or filled up to a number of cells."""
    ends = list(itertools.accumulate(map(_cells, text)))
    if ends and ends[-1] > cells:
        text = text[:bisect.bisect_right(ends, cells - 1)] + "…"
    return text + " " * (cells - _cells(text))


def _width(stream: TextIO) -> int:
    """Return the columns of a stream's terminal; of what is no terminal, more than a line needs."""
    import shutil
    if not stream.isatty():
        return 10_000
    return shutil.get_terminal_size(os.get_terminal_size(stream.fileno())).columns or 80


def print_table(rows: list[Fields], spare: Iterable[str]) -> None:
    """Print rows of cells, by the titles of their columns. The last column takes what the terminal leaves; a narrow one
    does without the spare columns, first those named first."""
    if not rows:
        return
    titles = {title: title for title in rows[0]}
    lines = [titles, *({title: _plain(cell) for title, cell in row.items()} for row in rows)]
    widths = {title: max(_cells(line[title]) for line in lines) for title in titles}
    last, longest = widths.popitem()
    room = _width(sys.stdout) - sum(width + 2 for width in widths.values())
    for title in spare:
        if room < 20:
            room += widths.pop(title) + 2
    widths[last] = max(8, min(longest, room))
    for line in lines:
        cells = {title: _fitted(line[title], width) for title, width in widths.items()}
        print("  ".join(_coloured(cell) if title == "Status" else cell for title, cell in cells.items()).rstrip())


def _time_left(info: Fields) -> str:
    return "" if info["eta"] is None else f"{for_people(info['eta'])} left"


def progress_line(info: Fields, width: int) -> str:
    """Return one line for a terminal of this width: bar, percent, children, time left, message."""
    progress, children = info["progress"], info["children"]
    filled = int(24 * (progress or 0))
    parts = [f"[{'#' * filled}{'-' * (24 - filled)}]", "  ..." if progress is None else f"{progress:5.1%}",
             f"{children['done']:,} of {children['total']:,} children" if children["total"] else "",
             _time_left(info), info["phase"], info["message"]]
    return _fitted(_plain("  ".join(filter(None, parts))), max(20, width - 1)).rstrip()


_AT_REST = (*OVER, STOPPED)        # what following a job ends with


def _follow(job: Job[Any]) -> Fields:
    """Wait until a job is over or stopped, with a progress bar if this is a terminal; return its info."""
    while True:
        info = job.info()
        ended = info["status"] in _AT_REST
        if sys.stderr.isatty():
            line = "" if ended else progress_line(info, _width(sys.stderr))
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        if ended:
            return info
        wait([job], timeout=0.2)


def _answer(args: Any, found: Any, print_it: Callable[[], object]) -> None:
    """Print what was found: as JSON, for programs, or as `print_it` does, for people."""
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_it()


def _until_interrupted(what: str, stream: TextIO | None = None) -> NoReturn:
    """Say what goes on until Ctrl-C, and let it."""
    print(what, file=stream, flush=True)
    while True:
        time.sleep(3600)


# Commands that run jobs.

def _finished(job: Job[Any]) -> Fields:
    """Follow a job to its end; return its info. SystemExit, which says so: it has not finished."""
    info = _follow(job)
    if info["status"] != FINISHED:
        sys.exit(f"job {job.id} is {info['status']}\n{_plain_lines(info['error'] or '')}")
    return info


def _run(args: Any) -> int:
    import pkgutil
    if ":" not in args.function:
        raise BgjobsError(f"{args.function!r} names no function; write module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(args.function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BgjobsError(f"cannot find {args.function}: {error}") from None
    with contextlib.closing(Runner(args.db, max_workers=args.workers)) as runner:
        info = _finished(runner.submit(function, *map(_argument, args.args)))
    print(json.dumps(info["result"], indent=2))
    return 0


def _argument(text: str) -> Any:
    """Return an argument as JSON, if it is that, else as text."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text


def _work(args: Any) -> int:
    """Be a worker process. At its end running jobs pause at a checkpoint and go back to the file with their state."""
    import signal
    sys.path.insert(0, os.getcwd())
    try:
        runner = Runner(args.db, max_workers=args.workers, modules=args.modules)
    except ImportError as error:
        raise BgjobsError(f"cannot import what it should work for: {error}") from None
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _until_interrupted(f"working on {runner.path} with {runner.max_workers} workers; Ctrl-C ends it", sys.stderr)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)         # once more ends it at once
    runner.close(args.grace)
    return 0


# Commands on a job file.

def _opened(args: Any) -> contextlib.closing[Runner]:
    """Open a job file that exists, to look and operate only."""
    if not os.path.exists(args.db):
        raise BgjobsError(f"there is no job file {args.db}; name one with --db")
    return contextlib.closing(Runner(args.db, start=False))


def _list(args: Any) -> int:
    filters = {name: value for name, value in vars(args).items() if name in FILTERS}
    if args.parent is None and (args.q or args.children):
        del filters["parent"]
    with _opened(args) as runner:
        jobs = [job.info() for job in runner.jobs(limit=args.limit, **filters)]
    _answer(args, jobs, lambda: print_table(
        list(map(_listed, jobs)), ("Run by", "Created", "Waiting", "Errors", "Children", "Duration")))
    return 0


def _listed(job: Fields) -> Fields:
    """Return a job's row in the list."""
    progress, children = "" if job["progress"] is None else f"{job['progress']:.0%}", job["children"]
    return {
        "ID": job["id"],
        "Created": _clock_time(job["created_at"]),
        "Waiting": for_people(job["waiting"]),
        "Duration": for_people(job["duration"]),
        "Status": job["status"],
        "Errors": job["errors"] or "",
        "Progress": ", ".join(filter(None, (progress, _time_left(job)))),
        "Children": f"{children['done']:,}/{children['total']:,}" if children["total"] else "",
        "Run by": job["run_by"] or "",
        "Name": (job["label"] or job["name"]) + (f" ({job['phase']})" if job["phase"] else "")
                + (" (low priority)" if job["low_priority"] else ""),
    }


def _show(args: Any) -> int:
    with _opened(args) as runner:
        job = runner.get(args.id)
        info = _follow(job) if args.follow else job.info()
    _answer(args, info, lambda: _print_fields(info))
    return 1 if info["status"] in (FAILED, CANCELLED) else 0


def _print_fields(info: Fields) -> None:
    """Print what there is to say of a job, a line for each field."""
    for name, value in info.items():
        if value in (None, "", [], {}, False):
            continue
        if name.endswith("_at"):
            value = _clock_time(value)
        elif name in ("waiting", "duration", "eta"):
            value = for_people(value)
        elif not isinstance(value, str):
            value = json.dumps(value)
        text = _plain_lines(value, 14)
        print(f"{name.replace('_', ' '):>12}  {_coloured(text) if name == 'status' else text}")


def _logs(args: Any) -> int:
    """Print a job's log; with -f until the job is over or stopped."""
    with _opened(args) as runner:
        job, after = runner.get(args.id), 0
        while True:
            ended = job.status in _AT_REST                # first: what it logs before its end is read after this
            for line in job.logs(level=args.level, text=args.text, regex=args.regex, after=after, tree=args.tree):
                after = line["id"]
                source = f" [{line['job_id']}]" if args.tree else ""
                message = _plain_lines(line["message"], 2)
                print(json.dumps(line) if args.json else
                      f"{_clock_time(line['at'])} {line['level']:<8}{source} {message}", flush=True)
            if ended or not args.follow:
                return 0
            time.sleep(0.2)


def _operation(args: Any) -> int:
    """Apply an operation to jobs; say of each what came of it."""
    import getpass
    try:
        by = getpass.getuser()
    except Exception:                                     # KeyError, ImportError, OSError: a user without a name
        by = "the command line"
    done: list[int] = []
    refused: list[Fields] = []
    with _opened(args) as runner:
        for job_id in args.ids:
            try:
                runner.core.operate(args.command.replace("-", "_"), job_id, by)
                said, stream = f"job {job_id}: {_coloured(runner.get(job_id).status)}", sys.stdout
                done.append(job_id)
            except (InvalidOperation, KeyError) as error:
                said, stream = f"bgjobs: {error.args[0]}", sys.stderr
                refused.append({"id": job_id, "why": str(error.args[0])})
            if not args.json:
                print(said, file=stream)
    if args.json:
        print(json.dumps({"done": done, "refused": refused}, indent=2))
    return 1 if refused else 0


def _stats(args: Any) -> int:
    with _opened(args) as runner:
        stats = runner.stats(args.window, args.name)

    def measured(times: dict[str, float] | None) -> str:
        return "" if times is None else "{avg} ({min} - {max})".format_map(
            {what: for_people(seconds) for what, seconds in times.items()})
    rows = [{**{what.title(): f"{part[what]:,}" for what in ("created", "started", "finished", "failed")},
             **{f"{what.title()} (least - most)": measured(part[what]) for what in ("waiting", "running")},
             f"Name, last {args.window}": part["name"]}
            for part in (*stats["functions"], {**stats["total"], "name": "all"})]
    _answer(args, stats, lambda: print_table(rows, ("Waiting (least - most)", "Started", "Running (least - most)")))
    return 0


def _serve(args: Any) -> int:
    with _opened(args) as runner:
        url = runner.serve(args.host, args.port, read_only=args.read_only,
                           password=os.environ.get("BGJOBS_PASSWORD") or None)
        if not url:
            raise BgjobsError(f"port {args.port} is taken; give another with --port, or 0 for a free one")
        _until_interrupted(f"Status page: {url}   Ctrl-C ends it")


def _prune(args: Any) -> int:
    with _opened(args) as runner:
        removed = runner.prune(_seconds(args.finished), _seconds(args.failed))
    _answer(args, {"removed": removed}, lambda: print(f"{removed:,} jobs removed"))
    return 0


def _seconds(text: str) -> float:
    """Return the seconds of a text like "7d" or "90"."""
    seconds = seconds_of(f"{text}s" if text[-1:].isdecimal() else text)
    if seconds is None:
        raise ValueError(f"a time is seconds, or a text like 15m, 12h or 7d, got {text!r}")
    return seconds


# The demo: a job that finds duplicate files.

ENTRIES_A_CHILD = 1_000            # of a folder


def fingerprint(folder: str) -> Fields:
    """Find duplicate files below a folder: the job of `demo`. A child for each folder, the largest at low priority."""
    context = current_job()
    if context.state is None:                             # a resumed attempt finds its children where they are
        context.checkpoint(state=_submit_children(folder))
    parts = [child.result() for child in jobs(parent=context.id, limit=None)]
    # Sets: an attempt cut off while it submitted children leaves some that the next one submits again.
    copies: dict[tuple[int, str], set[str]] = defaultdict(set)
    for part in parts:
        for name, size, digest in part["files"]:
            copies[size, digest].add(os.path.join(part["folder"], name))
    groups = [{"wasted": size * (len(paths) - 1), "size": size, "sha256": digest, "copies": len(paths),
               "paths": heapq.nsmallest(3, paths)}
              for (size, digest), paths in copies.items() if size and len(paths) > 1]
    context.progress(1, 1, f"{len(groups):,} groups of duplicates")
    return {"folders": len({part["folder"] for part in parts if part["files"]}),
            "files": sum(map(len, copies.values())),
            "bytes": sum(size * len(paths) for (size, _), paths in copies.items()),
            "unreadable": context.state + sum(part["unreadable"] for part in parts),
            "groups": len(groups),
            "wasted": sum(group["wasted"] for group in groups),
            "largest": heapq.nlargest(5, groups, operator.itemgetter("wasted"))}


def _submit_children(folder: str) -> int:
    """Look at all folders, then submit a child for every thousand entries; return how many could not be looked at."""
    context = current_job()
    folders: list[tuple[str, list[str]]] = []             # path, names of the entries
    unreadable: list[OSError] = []
    for path, _, names in os.walk(folder, onerror=unreadable.append):
        folders.append((path, names))
        context.progress(0, message=f"looking: {len(folders):,} folders")
        context.checkpoint()
    folders.sort(key=lambda found: len(found[1]))
    for submit_all, some in (submit_many, folders[:-1]), (options(low_priority=True).submit_many, folders[-1:]):
        submit_all(fingerprint_files, [(path, names[i:i + ENTRIES_A_CHILD]) for path, names in some
                                       for i in range(0, len(names), ENTRIES_A_CHILD)])
    context.progress(0, 1, f"{len(folders):,} folders")
    return len(unreadable)


def fingerprint_files(folder: str, names: list[str]) -> Fields:
    """Return size and SHA-256 of the regular files among the entries of one folder: a child of `fingerprint`."""
    import hashlib
    import stat
    context = current_job()
    files, unreadable = [], 0
    for done, name in enumerate(names):                   # not each(): after a stop, what `files` has would be lost
        context.progress(done, len(names))
        context.checkpoint()
        path, digest, size = os.path.join(folder, name), hashlib.sha256(), 0
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    context.checkpoint()
            files.append([name, size, digest.hexdigest()])
        except OSError as error:
            unreadable += 1
            context.log.warning("%s cannot be read: %s", text_of(name), error.strerror)
    return {"folder": folder, "files": files, "unreadable": unreadable}


def _demo(args: Any) -> int:
    folder = os.path.abspath(args.folder)
    if not os.path.isdir(folder):
        raise BgjobsError(f"{folder} is not a folder")
    with contextlib.closing(Runner(args.db, max_workers=args.workers)) as runner:
        url = runner.serve(port=args.port) or runner.serve(port=0)
        print(f"Status page: {url}\nJob file:    {runner.path}", flush=True)
        info = _finished(runner.options(key=f"demo {folder}", label=f"Duplicate files below {folder}", run_by="demo")
                         .submit(fingerprint, folder))
        _print_report(info["result"], info["duration"])
        if sys.stdout.isatty():
            _until_interrupted("The status page stays up until Ctrl-C.")
    return 0


def _print_report(report: Fields, seconds: float) -> None:
    print(f"{report['files']:,} files in {report['folders']:,} folders, {report['bytes'] / 1e6:,.1f} MB, "
          f"in {for_people(seconds)}; {report['unreadable']:,} could not be read\n"
          f"{report['groups']:,} groups of duplicates waste {report['wasted'] / 1e6:,.1f} MB; the largest:")
    for group in report["largest"]:
        print(f"  {group['copies']} copies of {group['size']:,} bytes, sha256 {group['sha256'][:12]}",
              *map(_plain, group["paths"]), sep="\n    ")


# The commands and their arguments.

def _arguments(arguments: list[str] | None) -> Any:
    """Parse a command line; `call` of what is returned is its command's function."""
    import argparse
    parser = argparse.ArgumentParser(prog="bgjobs", description="Background jobs in one SQLite file.")
    parser.add_argument("--version", action="version", version=f"bgjobs {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--db", default=os.environ.get("BGJOBS_DB", "bgjobs.db"), metavar="FILE",
                      help="the job file (default: $BGJOBS_DB, else bgjobs.db)")
    as_json, workers = (argparse.ArgumentParser(add_help=False, parents=[file]) for _ in range(2))
    as_json.add_argument("--json", action="store_true", help="print JSON, for programs")
    workers.add_argument("--workers", type=int, metavar="N", help="jobs that run at once (default: cores + 4)")
    one_job = argparse.ArgumentParser(add_help=False, parents=[as_json])
    one_job.add_argument("id", type=int, metavar="ID")
    one_job.add_argument("-f", "--follow", action="store_true", help="go on until it is over or stopped")

    def command(name: str, call: Callable[[Any], int], does: str, *shared: Any) -> Function:
        """Add a command with arguments that others have, too; return what adds its own."""
        made = commands.add_parser(name, help=does, description=does, parents=shared)
        made.set_defaults(call=call)
        return made.add_argument

    demo = command("demo", _demo, "Find duplicate files below FOLDER with a job for each subfolder, and show it on the "
                                  "status page.", workers)
    demo("folder", nargs="?", default=".", metavar="FOLDER", help="default: the current one")
    demo("--port", type=int, default=8765, help="of the status page (default: %(default)s, else a free one)")

    run = command("run", _run, "Run a function as a job and print its result as JSON.", workers)
    run("function", metavar="MODULE:FUNCTION")
    run("args", nargs="*", metavar="ARG", help="JSON, or else text")

    work = command("work", _work, "Run the jobs of a file in this process, until Ctrl-C or SIGTERM.", workers)
    work("modules", nargs="*", metavar="MODULE", help="modules to import, whose functions jobs may name")
    work("--grace", type=float, default=GRACE_SECONDS, metavar="SECONDS",
         help="what running jobs get at the end to reach a checkpoint (default: %(default)s)")

    list_ = command("list", _list, "List jobs, the newest first.", as_json)
    list_("--status", choices=STATUSES, metavar="STATUS", help=f"one of {', '.join(STATUSES)}")
    list_("--name", help="of the function")
    list_("--run-by", metavar="NAME", help="who asked for it")
    list_("--errors", action="store_true", default=None, help="only those with errors")
    list_("--low-priority", action="store_true", default=None, help="only those that run in periods of low load")
    list_("-q", metavar="TEXT", help="an id, or text in name, label, arguments, message or run by")
    list_("--parent", type=int, metavar="ID", help="the children of a job")
    list_("--children", action="store_true", help="children, too, not only roots")
    list_("--system", action="store_true", help="system jobs, too")
    list_("--limit", type=int, default=50, metavar="N", help="how many at most (default: %(default)s)")

    command("show", _show, "Show a job. Exit code 1: it has failed or was cancelled.", one_job)

    logs = command("logs", _logs, "Print a job's log.", one_job)
    logs("--level", help="the least: DEBUG, INFO, WARNING, ERROR")
    logs("--text", help="only lines that contain it")
    logs("--regex", help="only lines in which it is found")
    logs("--tree", action="store_true", help="those of its descendants, too")

    for name, operation in OPERATIONS.items():
        add = command(name.replace("_", "-"), _operation, f"{operation.does} Exit code 1: one was refused.", as_json)
        add("ids", type=int, nargs="+", metavar="ID")

    stats = command("stats", _stats, "Print what was created, started, finished and failed, and how long that took.",
                    as_json)
    stats("--window", choices=WINDOWS, default="24h", help="default: %(default)s")
    stats("--name", help="of one function")

    serve = command("serve", _serve, "Serve the status page of a job file, until Ctrl-C.", file)
    serve("--host", default="127.0.0.1", help="default: %(default)s; another one needs a password in $BGJOBS_PASSWORD")
    serve("--port", type=int, default=8765, help="default: %(default)s; 0: a free one")
    serve("--read-only", action="store_true", help="without operations")

    prune = command("prune", _prune, "Remove whole trees that are over for long.", as_json)
    prune("--finished", default=period_text(RETENTION["finished"]), metavar="TIME",
          help="how long finished and cancelled ones are kept (default: %(default)s)")
    prune("--failed", default=period_text(RETENTION["failed"]), metavar="TIME",
          help="how long failed ones are kept (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 a job did not finish, 2 misuse or a file that cannot be used."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                                # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = _arguments(arguments)
    try:
        code: int = args.call(args)
        sys.stdout.flush()
        return code
    except (BgjobsError, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError):                    # perhaps of the output, which would be tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):            # `bgjobs logs 5 | head`
            return 0
        print(f"bgjobs: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbgjobs: interrupted; unfinished jobs wait in the file and go on with the next start", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.modules.setdefault("bgjobs", sys.modules["__main__"])      # `import bgjobs` in a job's module is this very file
    sys.exit(main())
