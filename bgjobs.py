#!/usr/bin/env python3
"""bgjobs: background jobs for a Python app, in this one file and one SQLite file.

    import bgjobs

    def export(table):                            # any importable function is a job
        job = bgjobs.current_job()                # works, as a no-op, outside a job too
        for row in job.each(read(table)):         # progress, ETA, stop checkpoint, resume: one line
            write(row)
        job.log.info("exported %s", table)

    bgjobs.start("app.db", max_workers=4)         # picks up what the last run left behind
    bgjobs.serve()                                # http://127.0.0.1:8765/
    job = bgjobs.submit(export, "users")
    print(job.result(timeout=60))                 # job.stop(), job.resume(), job.cancel() ...: also on the page

Words. A *job* is one persisted unit of work: a function by its import path, and JSON arguments. A job
submitted from inside another is its *child*; one without a parent is a *root*; a root with all its
descendants is a *tree*. An *attempt* is one execution of a job's function, by a *worker*, a thread. A
*runner* owns the workers of one process. The *store* is the only code that touches SQLite. A *checkpoint* is
a point where the function may be stopped and may save its *state*, from which the next attempt goes on.

Life of a job. ``pending`` until a worker is free; ``running`` until its function has returned and all its
descendants are over; then ``finished`` or ``failed``. ``stop`` makes it ``stopping``, and ``stopped`` at its
next checkpoint; ``resume`` makes it pending again. ``cancelled`` is for good. OPERATIONS below is the table.

Guarantees. What submit, checkpoint and the operations have returned for is in the file and survives a
kill -9. A job runs at least once: again only because its process died, somebody asked, or a retry was due.
Each attempt's outcome is recorded at most once: every write carries its attempt's number, and one that has
been superseded is refused. Execution time is shared fairly between roots, over all processes on the file.

How it hangs together. What happens to a call, and where to read about it:

    submit   The runner (16) encodes the call (2, 3) and hands the store (9) a function that writes it (8).
    write    One of the threads that wait for the store leads. It opens one transaction, runs what all of them brought,
             records the outcomes of ended attempts, claims the next jobs for free workers, and commits. So batches
             grow with the load, and a caller alone pays no hand-over.
    claim    The root that has had the least time is next (5), with its oldest ready job (8).
    run      A worker of the pool (11) calls the function, as an Attempt (12). Or an executor's process does, which
             speaks to the runner over a port of its own (18).
    finish   The outcome waits for the next transaction. After its commit the handles (13) of what is over are told.

A service thread (17) looks after what comes by the clock, or from other processes: schedules, retries, stops, deaths.

Contents:  1 Words and rules   2 Values   3 Functions and options   4 Times of schedules   5 Fair shares and pace
           6 Force stop   7 Tables and statements   8 Transactions   9 Store   10 What people see   11 Worker pool
           12 Inside a job   13 The handle   14 Schedules   15 Statistics and retention   16 Runner
           17 Clock, processes and exit   18 Elsewhere   19 The default runner   20 Status page   21 Command line

MIT License. Copyright (c) 2026 the bgjobs developers.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions
of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
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
import sqlite3
import sys
import threading
import time
import traceback
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED as FUTURE_FINISHED
from typing import (
    Any, Callable, Concatenate, Coroutine, Generator, Iterable, Iterator, Mapping, NamedTuple, NoReturn, ParamSpec,
    Sized, TextIO, TypeVar, overload)

__version__ = "1.0.0"
__all__ = ["BgjobsError", "InvalidOperation", "Job", "JobContext", "JobFailed", "JobStopped", "Runner", "Schedule",
           "StoreError", "Submitter", "backup", "close", "current_job", "drain", "every", "get", "job", "jobs",
           "options", "prune", "schedules", "serve", "shutdown", "start", "stats", "submit", "submit_many", "wsgi"]

_log = logging.getLogger("bgjobs")

# For type checkers: a function as it is given and returned, its parameters, what it returns; the items of an iterable.
_Function = TypeVar("_Function", bound=Callable[..., Any])
_P = ParamSpec("_P")
_T = TypeVar("_T")
_Item = TypeVar("_Item")


def _say(level: int, text: str) -> None:
    """Log a message of the library's own, in a thread of its own: the app's handlers may block; no job may own it."""
    with contextlib.suppress(RuntimeError):               # the interpreter ends
        threading.Thread(target=contextvars.Context().run, args=(_log.log, level, "%s", text), name="bgjobs-log",
                         daemon=True).start()


# ---- 1 Words and rules ----------------------------------------------------------------------------------------

PENDING = "pending"        # waits for a worker, or for its time. A crash changes nothing.
RUNNING = "running"        # executes, or has returned and waits for children. A crash: pending.
STOPPING = "stopping"      # asked to stop, no checkpoint reached yet. A crash: stopped.
STOPPED = "stopped"        # halted; can be resumed or cancelled.
FINISHED = "finished"      # the function returned and all descendants are over.
FAILED = "failed"          # the function raised.
CANCELLED = "cancelled"    # discarded for good.

ACTIVE = (RUNNING, STOPPING)
OVER = (FINISHED, FAILED, CANCELLED)
_NOT_OVER = (PENDING, *ACTIVE, STOPPED)
STATUSES = _NOT_OVER + OVER


class Operation(NamedTuple):
    """What people may do to a job. Transaction has a method for each that carries it out."""

    moves: dict[str, str]              # each status that allows it -> the status that follows
    done: str                          # the past tense, for refusals
    does: str                          # for the help of the command line
    once_returned: dict[str, str] = {}           # moves that differ once the function has returned

    def follows(self, status: str, returned: bool) -> str:
        """Return the status that follows. Raises KeyError if this status does not allow it."""
        moves = {**self.moves, **self.once_returned} if returned else self.moves
        return moves[status]


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

# The outcome of an attempt: what its function did, or, if the attempt is given back: whether its
# function had begun, had not, or is unknown in this process.
RETURNED, RAISED, HALTED = "returned", "raised", "halted"
RELEASED, UNSPENT, UNKNOWN = "released", "unspent", "unknown"
TIMED_OUT = "timed out"            # the reason to stop an attempt, which then ends as RAISED

# The words for outcomes in an attempt's history, and for jobs that are pending again.
OUTCOMES = {RETURNED: "finished", RAISED: "failed", HALTED: "stopped", RELEASED: "given back"}
PHASES = {RAISED: "retrying", RELEASED: "interrupted", UNKNOWN: "unknown function"}


class BgjobsError(Exception):
    """The base class of this module's errors, except for plain misuse (TypeError, ValueError)."""


class InvalidOperation(BgjobsError):
    """The job's status does not allow the operation; the text says which ones it allows."""


class StoreError(BgjobsError):
    """The job file cannot be used; the text names it and the remedy."""


class JobFailed(BgjobsError):
    """A job failed in another process, or long ago.

    `type`, `text` and `traceback` are those of the exception that its function raised.
    """

    def __init__(self, job: str, type: str, text: str, traceback: str) -> None:
        super().__init__(f"{job} failed with {type}: {text}")
        self.type, self.text, self.traceback = type, text, traceback


class JobStopped(BaseException):
    """Raised in a job at a checkpoint if it is to stop. `except Exception` does not swallow it."""


def allowed_operations(status: str, options: dict[str, Any], system: bool = False,
                       active_below: bool = False) -> list[str]:
    """Return the operations that a job allows. `active_below`: a descendant runs or is stopping."""
    allowed = {name for name, operation in OPERATIONS.items() if status in operation.moves}
    if status in (STOPPING, STOPPED):
        allowed.remove("stop")         # it repeats silently; there is no use in offering it
    if active_below:
        allowed -= {"cancel", "restart"}
    if active_below and status == STOPPED:
        allowed.add("force_stop")      # of the descendants
    return [name for name in OPERATIONS
            if name in allowed and not objection(name, options, system)]


def objection(operation: str, options: dict[str, Any], system: bool) -> str:
    """Return why a job refuses an operation in any status, or ""."""
    if operation == "stop" and system and not options.get("stoppable", False):
        return "it is a system job"
    if operation == "restart" and not options.get("restartable", True):
        return "it was declared restartable=False"
    return ""


def refusal(job: str, status: str, operation: str, allowed: list[str],
            why: str = "") -> InvalidOperation:
    """Return the error for an operation that a job's status does not allow."""
    done = OPERATIONS[operation].done
    can = " or ".join(OPERATIONS[name].done for name in allowed if "priority" not in name)
    text = f"it can be {can}, not {done}" if can else f"it cannot be {done}"
    reason = f" ({why})" if why else ""
    return InvalidOperation(f"{job} is {status}; {text}{reason}")


# ---- 2 Values -------------------------------------------------------------------------------------------------
#
# Arguments, state and results are JSON. A value of a type that JSON lacks is stored as an object
# with one key, which names the type: {"$date": "2026-01-31"}. A dict with a key of its own that
# begins with "$" is stored as a list of pairs: {"$dict": [[key, value], ...]}.

VALUE_LIMIT = 256 * 1024           # characters of JSON for arguments, a state or a result
TEXT_LIMIT = 8 * 1024              # characters of a log line, a label, a message


def _is_number(value: Any) -> bool:
    """Return whether `value` is an int or float that a float can hold: not NaN, inf or 10**400."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _printed(value: Any, how: Callable[[Any], str]) -> str:
    """Return str(value) or repr(value) as a plain str, or a stand-in if that raises."""
    try:
        return str(how(value))
    except Exception:
        return f"<{type(value).__qualname__} that cannot be printed>"


def _short(value: Any) -> str:
    """Return a value as error messages show it: its repr, cut to 80 characters. Never raises."""
    return _text(_printed(value, repr), 80)


def _text(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Return str(value) as SQLite can hold it. Never raises.

    It is cut to `limit` characters, and lone surrogates are escaped.
    """
    text = _printed(value, str)
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    return text.encode("utf-8", "backslashreplace").decode()


_dump = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_PLAIN = frozenset((str, int, float, bool, type(None)))


def _set_to_json(value: set[Any]) -> list[Any]:
    if any(type(item) is tuple for item in value):
        raise TypeError("a set of tuples would come back as lists; pass a list")
    return sorted(map(_jsonable, value), key=_dump)


def _clock_to_json(value: Any) -> list[Any]:
    """Return a datetime or time as [ISO text, fold, key of its ZoneInfo].

    A fixed offset is in the ISO text.
    """
    import datetime
    zone, key = value.tzinfo, getattr(value.tzinfo, "key", None)
    if key is None and not isinstance(zone, (datetime.timezone, type(None))):
        raise TypeError(f"the time zone {_short(zone)} is not of datetime or zoneinfo; convert it "
                        "with astimezone()")
    return [value.isoformat(), value.fold, key]


def _clock_from_json(kind: Any, stored: list[Any]) -> Any:
    text, fold, zone = stored
    value = kind.fromisoformat(text).replace(fold=fold)
    if zone is None:
        return value
    if isinstance(zone, str):
        return value.replace(tzinfo=zone_of(zone)[0])
    import datetime
    # 1.0.0 stored a fixed offset as seconds, or as [seconds, name].
    seconds = zone[0] if isinstance(zone, list) else zone
    return value.replace(tzinfo=datetime.timezone(datetime.timedelta(seconds=seconds)))


class _Tagged(NamedTuple):
    """How values of a type that JSON lacks are stored."""

    module: str
    name: str
    to_json: Callable[[Any], Any]                # value -> JSON
    from_json: Callable[[Any, Any], Any] = lambda kind, stored: kind(stored)   # type, JSON -> value


_TAGGED = {
    "$bytes": _Tagged("builtins", "bytes", lambda value: base64.b64encode(value).decode("ascii"),
                      lambda kind, stored: base64.b64decode(stored)),
    "$set": _Tagged("builtins", "set", _set_to_json),
    "$datetime": _Tagged("datetime", "datetime", _clock_to_json, _clock_from_json),
    "$time": _Tagged("datetime", "time", _clock_to_json, _clock_from_json),
    "$date": _Tagged("datetime", "date", str, lambda kind, stored: kind.fromisoformat(stored)),
    "$timedelta": _Tagged("datetime", "timedelta",
                          lambda value: [value.days, value.seconds, value.microseconds],
                          lambda kind, stored: kind(*stored)),
    "$decimal": _Tagged("decimal", "Decimal", str),
    "$uuid": _Tagged("uuid", "UUID", str),
    "$path": _Tagged("pathlib", "WindowsPath" if os.name == "nt" else "PosixPath", str),
}


def _jsonable(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return [item if type(item) in _PLAIN else _jsonable(item) for item in value]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"the key {_short(key)} is no string; use {_short(_text(key))}, "
                                "or a list of pairs")
        plain = {key: _jsonable(item) for key, item in value.items()}
        return {"$dict": list(plain.items())} if any(key[:1] == "$" for key in plain) else plain
    for tag, (module, name, to_json, _) in _TAGGED.items():
        # Nothing is imported: the value's type is there, so its module is loaded.
        if kind is getattr(sys.modules.get(module), name, None):
            return {tag: to_json(value)}
    raise TypeError(f"{_short(value)} is of type {kind.__qualname__}; pass JSON values, dates, "
                    "Decimal, UUID, bytes, set or Path, or an id to load it by")


def encode(value: Any, what: str = "the value") -> str:
    """Return `value` as JSON text.

    Raises TypeError if it cannot be stored; the text names `what` and the remedy.
    """
    try:
        text = _dump(_jsonable(value))
    except RecursionError:
        raise TypeError(f"{what} cannot be stored: it is nested too deeply; pass a flatter value"
                        ) from None
    except Exception as error:         # ours, or raised by the value's own methods
        raise TypeError(f"{what} cannot be stored: {_text(error)}") from None
    if len(text) > VALUE_LIMIT:
        raise TypeError(f"{what} cannot be stored: {len(text):,} characters of JSON are more than "
                        f"the {VALUE_LIMIT:,} allowed; keep it in a file or a table and pass its "
                        "name")
    return text


def _untagged(found: dict[str, Any]) -> Any:
    if len(found) != 1:
        return found
    (tag, stored), = found.items()
    if tag == "$dict":
        return dict(stored)
    if tag not in _TAGGED:
        return found
    module, name, _, from_json = _TAGGED[tag]
    return from_json(getattr(__import__(module), name), stored)


def decode(text: str | None) -> Any:
    """Return the value that `encode` made `text` from; None for None."""
    if text is None:
        return None
    return json.loads(text, object_hook=_untagged) if '{"$' in text else json.loads(text)


# ---- 3 Functions and options ----------------------------------------------------------------------------------

def _module_name(module: str) -> str:
    """Return the name by which another process can import `module`: for __main__, the script's."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    if main.__spec__ is not None:      # python -m
        return main.__spec__.name.removesuffix(".__main__")
    return os.path.splitext(os.path.basename(getattr(main, "__file__", module)))[0]


def import_path(function: Callable[..., Any]) -> str:
    """Return "package.module.function".

    Raises TypeError, with the remedy, if the function cannot be imported by that again.
    """
    def refuse(why: str, named: str = "") -> NoReturn:
        raise TypeError(f"{named or _short(function)} cannot be a job: {why}")
    if not callable(function):
        refuse("it is not callable")
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        refuse(f"{type(function).__qualname__} objects have no import path; submit the function "
               "itself and pass it its arguments")
    if "<lambda>" in qualname:
        refuse("a lambda has no name to import it by; define it with def at the top level of a "
               "module")
    if "<locals>" in qualname:
        refuse("it is defined inside a function; move it to the top level of its module", qualname)
    found: Any = sys.modules.get(module)
    for attribute in qualname.split("."):
        found = getattr(found, attribute, None)
    if found != function:
        refuse(f"that name leads to {_short(found)}, not to this function; submit what the module "
               "holds under that name", f"{module}.{qualname}")
    return f"{_module_name(module)}.{qualname}"


def _defined_in_loaded_module(name: str) -> Callable[..., Any] | None:
    """Return the function of this name, or None if no loaded module defines it itself.

    The standard library's functions are never found, nor are those that a module imported.
    """
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return None
    for split in range(len(parts) - 1, 0, -1):
        path, qualname = ".".join(parts[:split]), ".".join(parts[split:])
        module = sys.modules.get("__main__" if path == _module_name("__main__") else path)
        if module is not None:
            found: Any = vars(module).get(parts[split])
            for attribute in parts[split + 1:]:
                found = getattr(found, attribute, None) if isinstance(found, type) else None
            origin = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
            return found if origin == (module.__name__, qualname) and callable(found) else None
    return None


class _Registry:
    """The functions that this process knows by name: those declared with @job, or submitted.

    It is filled while modules are imported, before there is a runner, so it is global.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Callable[..., Any]] = {}
        self.declared: dict[Callable[..., Any], dict[str, Any]] = {}     # the default options
        self.names: dict[Callable[..., Any], str] = {}                   # of those submitted
        self.has_executors = False     # a function is declared with executor=

    def declare(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        """Take in a function with its default options.

        Raises ValueError if another function has its name.
        """
        if "name" in options:
            name = options["name"]
            known = self.by_name.get(name, function)
            taken_by = f"{known.__module__}.{known.__qualname__}"
            if taken_by != f"{function.__module__}.{function.__qualname__}":
                raise ValueError(f"the job name {name!r} is taken by {taken_by}; choose another")
            self.by_name[name] = function          # also if a reloaded module has a newer one
        self.declared[function] = options
        self.has_executors |= "executor" in options

    def name_of(self, function: Callable[..., Any]) -> str:
        """Return the function's stable name, and remember the function by it.

        Raises TypeError if it cannot be a job.
        """
        try:
            return self.names[function]
        except (KeyError, TypeError):  # TypeError: it has no hash, so it is no function
            path = import_path(function)
        name: str = self.declared.get(function, {}).get("name", path)
        self.names[function] = name
        self.by_name[name] = function
        return name

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the function of this name, or None. A name is data: nothing is imported."""
        return self.by_name.get(name) or _defined_in_loaded_module(name)


_registry = _Registry()


def _is_name(value: Any) -> bool:
    """Return whether a text is stored as it is, uncut and unescaped: no two names become one."""
    return isinstance(value, str) and 0 < len(value) <= 500 and _text(value) == value


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 63


def _are_seconds(values: Iterable[Any], least: float = 0.0) -> bool:
    return all(_is_number(value) and value >= least for value in values)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _unix(value: Any) -> float | None:
    """Return Unix seconds, or an aware datetime, as Unix seconds, or None if it is neither."""
    if hasattr(value, "timestamp") and value.utcoffset() is not None:
        value = value.timestamp()
    return float(value) if _is_number(value) else None


def zone_of(tz: Any) -> tuple[Any, str | None]:
    """Return a time zone and the key to store it by; None for the machine's own.

    Raises ValueError if it is unknown.
    """
    import datetime
    import zoneinfo
    key = "UTC" if tz is datetime.timezone.utc else getattr(tz, "key", tz)
    try:
        return key if key is None else zoneinfo.ZoneInfo(key), key
    except Exception:                  # KeyError, ValueError, OSError: their texts say too little
        raise ValueError(f'unknown time zone {_short(tz)}; a name like "Europe/Berlin", "UTC" or '
                         "None for the machine's own") from None


_A_NAME = _is_name, "a text of 1 to 500 characters, without lone surrogates"
_A_BOOL = (lambda v: isinstance(v, bool)), "True or False"

# Each option: a test of its value, and what the value must be. `options` says what they mean.
_OPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": _A_NAME,
    "label": (lambda v: isinstance(v, str), "a text"),
    "run_by": (lambda v: v is None or isinstance(v, str), "a text or None"),
    "low_priority": _A_BOOL,
    "system": _A_BOOL,
    "key": _A_NAME,
    "delay": (lambda v: _are_seconds([v]), "seconds, 0 or more"),
    "run_at": (lambda v: _unix(v) is not None, "Unix seconds or an aware datetime"),
    "retries": (lambda v: _is_whole(v, 0), "a whole number, 0 or more"),
    "backoff": (lambda v: callable(v) or _are_seconds(_as_list(v) or [None]),
                "seconds, a list of seconds, or a function of the attempt"),
    "timeout": (lambda v: v is None or _are_seconds([v], sys.float_info.min),
                "seconds, more than 0"),
    "max_running": (lambda v: v is None or _is_whole(v, 1),
                    "a whole number greater than 0 and less than 2**63"),
    "stoppable": _A_BOOL,
    "restartable": _A_BOOL,
    "recover": _A_BOOL,
    "secret": (lambda v: (isinstance(v, (list, tuple, set, frozenset))
                          and all(isinstance(name, str) for name in v)),
               "a list of argument names"),
    "isolate": _A_BOOL,
    "executor": (lambda v: v is None or callable(getattr(v, "submit", v)),
                 "a concurrent.futures.Executor, what makes one, or None"),
    "tz": (zone_of, "the name of a time zone, a ZoneInfo, or None for the machine's own"),
    "parent": (lambda v: v is None or isinstance(v, Job), "a Job or None"),
    "connection": (lambda v: v is None or isinstance(v, sqlite3.Connection),
                   "an open sqlite3.Connection"),
}


def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return `given`.

    Raises TypeError for an unknown option, ValueError for a value that does not fit.
    """
    for name, value in given.items():
        if name not in _OPTIONS:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(_OPTIONS)}")
        test, must_be = _OPTIONS[name]
        try:
            fits = test(value)
        except Exception:              # of the value's own methods, or an unknown time zone
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {must_be}, got {_short(value)}")
    if "delay" in given and "run_at" in given:
        raise ValueError("give delay or run_at, not both")
    return given


def job(**options: Any) -> Callable[[_Function], _Function]:
    """Decorate a function with default options for its jobs; return the function unchanged.

        @bgjobs.job(name="export", low_priority=True)
        def export(table): ...

    The options are those of `bgjobs.options`, except parent and connection, and one more:
    executor: where the function executes, a concurrent.futures.Executor or what makes one; None: in
    the app's threads, whatever the runner's is.

    Raises TypeError for an unknown option, ValueError for a value that does not fit or a name that
    is taken.
    """
    check_options(options)
    for name in ("parent", "connection"):
        if name in options:
            raise TypeError(f"{name} is an option of one submit, not of a function")

    def declare(function: _Function) -> _Function:
        _registry.declare(function, options)
        return function
    return declare


# These options have no column of their own: a job keeps them, and its backoff, as JSON.
_KEPT = ("stoppable", "restartable", "recover", "secret", "retries", "timeout", "isolate")


def options_to_keep(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the options to keep with a job of this function, as JSON.

    Raises ValueError if `secret` or `backoff` does not fit the function.
    """
    kept = {name: given[name] for name in _KEPT if name in given}
    if "secret" in kept:
        kept["secret"] = _secret_places(function, kept["secret"])
    if "backoff" in given:
        kept["backoff"] = _pauses(given["backoff"], given.get("retries", 0))
    return kept


def _secret_places(function: Callable[..., Any], secret: Iterable[str]) -> list[str | int]:
    """Return the names in `secret` and the positions at which they may be passed.

    Raises ValueError if the function has no such argument.
    """
    import inspect
    parameters = inspect.signature(function).parameters
    names = [name for name, each in parameters.items() if not each.kind.name.startswith("VAR_")]
    takes_any_name = inspect.Parameter.VAR_KEYWORD in [each.kind for each in parameters.values()]
    places: list[str | int] = []
    for name in secret:
        if name in names:
            places += [name, names.index(name)]
        elif takes_any_name and name not in parameters:
            places.append(name)
        else:
            raise ValueError(f"secret names {name!r}, but {function.__qualname__} has no such "
                             "argument; of *arguments and **keywords, name the keywords, or pass a "
                             "list or a dict instead")
    return places


def _pauses(backoff: Any, retries: int) -> list[float]:
    """Return the seconds before the first, second ... retry; the last pause repeats.

    A function is called now, for it cannot be stored. Raises ValueError if it returns anything but
    seconds.
    """
    if not callable(backoff):
        return _as_list(backoff)
    pauses = [backoff(attempt) for attempt in range(1, min(retries, 100) + 1)]
    if not _are_seconds(pauses):
        raise ValueError(f"backoff must give seconds, 0 or more; it gave {_short(pauses)}")
    return pauses


def pause_before_retry(options: dict[str, Any], failures: int) -> float:
    """Return the seconds to wait after this many failures: the `backoff` of the job's options.

    By default 1 s, twice as long each time, up to 10 min, and up to half as long again by chance,
    so that jobs that failed together are not retried together.
    """
    pauses: list[float] | None = options.get("backoff")
    if pauses:
        return pauses[min(failures, len(pauses)) - 1]
    return min(600.0, 2.0 ** min(failures - 1, 30) * random.uniform(1.0, 1.5))


# ---- 4 Times of schedules -------------------------------------------------------------------------------------
#
# A schedule is due once in a period, or at the times that five cron fields give. As crontab in
# POSIX says, a day fits if its month does and, if day of month and day of week are both restricted,
# if either of them does.
#
# Where the clocks change: a time skipped in spring runs that much later, a time repeated in autumn
# runs once, the first time. But where every hour is given ("*"), hours are those that pass,
# whatever the clocks show: the wildcard rule of vixie-cron. So there are two ways to look for the
# next time.

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def seconds_of(text: str) -> float | None:
    """Return the seconds of a text like "15m" (s, m, h, d, w), or None if it is no such text."""
    number, unit = text[:-1].strip(), text[-1:]
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        return None
    return float(number) * _UNITS[unit]


def _period(seconds: float) -> str:
    """Return a period as people write it: 900 as "15m"."""
    unit = next((unit for unit in "wdhm" if seconds and seconds % _UNITS[unit] == 0), "s")
    return f"{seconds / _UNITS[unit]:.12g}{unit}"


class Every:
    """A schedule with a period, a text like "15m"."""

    def __init__(self, schedule: str) -> None:
        seconds = seconds_of(schedule)
        if seconds is None:
            raise ValueError('a schedule is seconds, a text like "15m" or five cron fields, '
                             f"got {schedule!r}")
        if not 0.01 <= seconds < 1e9:
            raise ValueError(f"the period of a schedule is at least 0.01 s, got {schedule!r}")
        self.seconds = seconds

    def next(self, due: float, now: float) -> float:
        """Return when it is due after `now`, in Unix seconds.

        In step with `due`, a time when it was due or will be.
        """
        periods = math.floor((now - due) / self.seconds) + 1
        return due + self.seconds * max(0, periods)


_CRON_FIELDS = (("minute", 0, 59, ""), ("hour", 0, 23, ""), ("day of month", 1, 31, ""),
                ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
                ("day of week", 0, 7, "sun mon tue wed thu fri sat"))
_CRON_WORDS = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
               "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
               "@hourly": "0 * * * *"}
_CRON_DAYS = 366 * 41              # how far to look: 29 February is a certain weekday in 40 years
_CLOCK_CHANGE_HOURS = 3            # no clock goes further back, or on, at once


def _cron_values(text: str, name: str, least: int, most: int, words: str) -> set[int]:
    """Return the values of a field: a list of *, numbers, names and ranges, perhaps with a step."""
    numbers = {word: number for number, word in enumerate(words.split(), least)}

    def number_of(word: str) -> int:
        number = numbers.get(word, int(word) if word.isdecimal() else -1)
        if not least <= number <= most:
            raise ValueError(f"the {name} of a cron schedule is {least} to {most}, got {word!r} in "
                             f"{text!r}")
        return number
    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdecimal() and int(step)):
            raise ValueError("a step of a cron schedule is a whole number greater than 0, "
                             f"got {step!r} in {text!r}")
        low, dash, high = (f"{least}-{most}" if span == "*" else span).partition("-")
        first = last = number_of(low)
        if dash or slash:
            last = number_of(high) if dash else most
        if first > last:
            raise ValueError(f"a range of a cron schedule goes up, got {part!r}")
        values.update(range(first, last + 1, int(step or 1)))
    return values


class Cron:
    """A schedule of five fields: minute, hour, day of month, month, day of week.

    zone: None for the machine's time zone.
    """

    def __init__(self, fields: str, zone: Any = None) -> None:
        texts = _CRON_WORDS.get(fields.strip().lower(), fields).lower().split()
        if len(texts) != 5:
            raise ValueError("a cron schedule has five fields (minute hour day month weekday), "
                             f"got {fields!r}")
        self._zone = zone
        self._minutes, self._hours, self._days, self._months, weekdays = (
            _cron_values(text, *field) for text, field in zip(texts, _CRON_FIELDS))
        self._weekdays = {day % 7 for day in weekdays}
        self._combined = all if "*" in (texts[2], texts[4]) else any       # the two day fields
        if self.next(0, time.time()) == math.inf:
            raise ValueError(f"the cron schedule {fields!r} is never due: no such day comes")

    def next(self, due: float, now: float) -> float:
        """Return when it is due after both `now` and `due`, in Unix seconds."""
        after = max(due, now)
        if len(self._hours) == 24:
            return self._next_as_hours_pass(after)
        return self._next_by_the_clock(after)

    def _fits(self, day: Any) -> bool:
        fits = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        return day.month in self._months and self._combined(fits)

    def _next_as_hours_pass(self, after: float) -> float:
        import datetime
        moment = math.floor(after)
        while moment < after + _CRON_DAYS * 86_400:
            local = datetime.datetime.fromtimestamp(moment, self._zone)
            if not self._fits(local):
                # On to midnight, but not past the hours in which the clocks may have changed.
                hours = max(1, 24 - _CLOCK_CHANGE_HOURS - local.hour)
                moment += 3_600 * hours - 60 * local.minute - local.second
            elif moment > after and local.minute in self._minutes and local.second == 0:
                return float(moment)
            else:
                moment += 60 - local.second
        return math.inf

    def _next_by_the_clock(self, after: float) -> float:
        import datetime
        begin = datetime.datetime.fromtimestamp(after - 3_600 * _CLOCK_CHANGE_HOURS, self._zone)
        day = begin.date()
        for _ in range(_CRON_DAYS):
            if self._fits(day):
                times = (datetime.datetime.combine(day, datetime.time(hour, minute), self._zone)
                         for hour in self._hours for minute in self._minutes)
                moments = [moment for moment in map(datetime.datetime.timestamp, times)
                           if moment > after]
                if moments:
                    return min(moments)
            day += datetime.timedelta(days=1)
        return math.inf


@functools.lru_cache(1_000)
def schedule_of(schedule: str, zone: str | None) -> Every | Cron:
    """Return the schedule that a text like "15m", or five cron fields, describe.

    Raises ValueError if it is neither.
    """
    if len(schedule.split()) > 1 or schedule.startswith("@"):
        return Cron(schedule, zone_of(zone)[0])
    return Every(schedule)


# ---- 5 Fair shares and pace -----------------------------------------------------------------------------------
#
# Start-time fair queueing (Goyal, Vin and Cheng, 1996) over roots. Each root has a virtual time: the microseconds its
# tree has run. The next place goes to the ready root with the least; what that was is the start tag of the claim. The
# queue's own virtual time is the start tag of the newest claim; a root that becomes ready starts at it, or at its own
# if that is later, so idling earns no credit. A claim charges its root an estimate at once, for a root with running
# attempts is not idle; the end of the attempt corrects it.

def fair_order(roots: Iterable[tuple[int, int, Iterator[Any]]], charge: Callable[[Any], int | None]
               ) -> Iterator[tuple[int, Any, int, int]]:
    """Yield (root, job, start tag, charge) in the order in which places are to be given.

    `roots` has (virtual time, root id, its ready jobs, oldest first); `charge(job)` is in microseconds, None passes the
    job over. To take the next one from the iterator means that the last one was claimed.
    """
    heap = [(tag, root, head, waiting) for tag, root, waiting in roots for head in itertools.islice(waiting, 1)]
    heapq.heapify(heap)
    while heap:
        tag, root, head, waiting = heap[0]
        cost = charge(head)
        if cost is not None:
            yield root, head, tag, cost
        following = next(waiting, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (tag + (cost or 0), root, following, waiting))


def entry_tag(own: int, clock: int) -> int:
    """Return the virtual time at which a root that becomes ready starts, from its own and the queue's."""
    return max(own, clock)


UNKNOWN_COST = 0.010       # seconds charged for the first run of a function
AHEAD_SECONDS = 0.010      # short jobs are claimed ahead of free workers: so much work for each worker
AHEAD_LIMIT = 256          # and so many jobs in a process
_OVERHEAD = 50e-6          # seconds a job costs besides its function


class Costs:
    """The recent mean run time of each function, and of each function's trees, in seconds: exponential averages."""

    def __init__(self, means: dict[str, float] | None = None) -> None:
        self.means = means or {}
        self.trees: dict[str, float] = {}
        self.changed: set[str] = set()

    def record(self, name: str, seconds: float) -> None:
        """Take in the run time of one attempt."""
        self._average(self.means, name, seconds)

    def record_tree(self, name: str, seconds: float) -> None:
        """Take in the duration of a job with children, from its start to its last descendant's end."""
        self._average(self.trees, name, seconds)

    def _average(self, means: dict[str, float], name: str, seconds: float) -> None:
        mean = means.get(name, seconds)
        means[name] = mean + (seconds - mean) / 5
        self.changed.add(name)

    def take_changed(self) -> list[tuple[str, float | None, float | None]]:
        """Return (name, mean, mean of trees) of the functions whose means have changed since the last call."""
        changed, self.changed = self.changed, set()
        return [(name, self.means.get(name), self.trees.get(name)) for name in changed]

    def plan(self, name: str) -> tuple[int, float]:
        """Return the microseconds to charge for a claim of this function, and the seconds for which it will keep a
        worker: infinitely many, as long as that is not known."""
        mean = self.means.get(name)
        return (int(UNKNOWN_COST * 1e6), math.inf) if mean is None else (max(1, int(mean * 1e6)), mean + _OVERHEAD)


# How fast an attempt goes, and how long it will take: from the reports of its progress.

class Rate(NamedTuple):
    """Units gained in a number of seconds; the recent ones weigh more."""

    gained: float = 0.0
    seconds: float = 0.0

    def after(self, gained: float, seconds: float, elapsed: float) -> Rate:
        """Return the rate after `gained` more units in `seconds`, `elapsed` seconds into the work.

        An exponential average over about three quarters of the elapsed time: an early hiccup is forgotten, one late
        sample cannot make the estimate jump, and units that come in waves, from several workers, count as what they
        are.
        """
        kept = math.exp(-max(seconds, 0.0) / max(elapsed * 0.75, 1.0))
        return Rate(self.gained * kept + gained, self.seconds * kept + max(seconds, 0.0))

    @property
    def per_second(self) -> float | None:
        """Return the units per second; None: not known."""
        return self.gained / self.seconds if self.gained > 0 and self.seconds > 0 else None


def time_left(left: float, rate: Rate, step: float, age: float, elapsed: float) -> float | None:
    """Return the seconds that `left` more units take; None: the rate is not known.

    step: seconds between reports. age: seconds since the last one. elapsed: seconds from the begin of the work to that.
    The estimate counts down until the next report is due. From then on it is what it would be if that came just now,
    plus the time it is late: so it grows slowly while nothing comes, and does not jump.
    """
    speed = rate.per_second
    if speed is None:
        return None
    if age <= step:
        return max(0.0, left / speed - max(age, 0.0))
    late = rate.after(speed * step, age, elapsed + age).per_second or speed
    return max(0.0, left - speed * step) / late + (age - step)


class Pace:
    """How fast an attempt goes, by its reports: `done` units, `at` seconds after it began."""

    __slots__ = ("rate", "step", "done", "at", "_guessed")

    def __init__(self) -> None:
        self.rate = Rate()                                # units per second
        self.step = 0.0                                   # seconds between reports, an exponential average
        self.done, self.at = 0.0, 0.0                     # of the last report of more units
        self._guessed = True                              # there is no rate, or one to forget with the next report

    def start(self, done: float, at: float) -> None:
        """Take in the first report. One in no time may be of what was done before; its rate is shown, but not kept."""
        self.done, self.at, self._guessed = done, at, at < 0.1
        self.rate = Rate(done, at) if done > 0 else Rate()

    def resume(self, done: float, at: float) -> None:
        """Take in the first report of a resumed attempt: what is done by then took no time of this one."""
        self.done, self.at = done, at

    def report(self, done: float, at: float) -> None:
        """Take in another report. One of fewer units than before begins anew."""
        gained, seconds = done - self.done, at - self.at
        if gained < 0:
            self.done, self.at, self.rate, self._guessed = done, at, Rate(), True
        elif gained > 0 and seconds > 0:
            first = self._guessed
            self.step = seconds if first else self.step + (seconds - self.step) / 4
            self.rate = (Rate() if first else self.rate).after(gained, seconds, at)
            self.done, self.at, self._guessed = done, at, False


class Report(NamedTuple):
    """What the store keeps of an attempt's progress."""

    progress: float | None                                # 0 to 1
    rate: Rate = Rate()                                   # of progress
    step: float = 0.0                                     # seconds until the next one is due
    age: float = 0.0                                      # seconds since the last progress
    message: str | None = None


# ---- 6 Force stop ---------------------------------------------------------------------------------------------
#
# A force stop has the file refuse the attempt first. Then it raises JobStopped in the attempt's thread, between any two
# bytecodes, with PyThreadState_SetAsyncExc. In the job's function that may happen. In the library's code it would leave
# a lock or a transaction open, and once the function has ended it would hit the next job of that thread. So the promise
# is: it is raised at most once, in the function or what that calls, never in the library, and never after the function.
#
# For that, each attempt has a ticket, which lies on the table while the function runs. Where the function calls the
# library, the thread takes the ticket, and puts it back on return (`library_code`); it keeps it when the function has
# ended. A force stop takes it as well, raises the exception, and never puts it back. Who finds the ticket gone:
# - the force stop only leaves word (`void`); on its way back from the library the thread raises the exception itself;
# - the thread waits until the exception has been sent, since it may come any moment; if it has not been raised by then,
#   or was raised before and caught, it takes it back and raises one itself.

class Ticket:
    """The right to raise JobStopped once in the thread of an attempt. All but `use` is for that thread to call."""

    __slots__ = ("_taken", "_depth", "_raised", "_spent", "void", "thread")

    def __init__(self) -> None:
        self._taken = threading.Lock()     # at first, by the attempt
        self._taken.acquire()
        self._depth = 1                    # of library code that calls library code
        self._raised = False               # by a force stop, from outside
        self._spent = False                # nothing will be raised from outside any more
        self.void = False                  # the attempt has been superseded: it goes on in no library call
        self.thread = 0                    # the attempt's

    def take(self, quietly: bool = False) -> None:
        """Enter library code. Raises JobStopped, unless quietly: the attempt has been superseded."""
        if self._depth == 0:
            self._take()
            if self._spent and not quietly:
                raise JobStopped("the attempt has been superseded")
        self._depth += 1

    def put_back(self) -> None:
        """Leave library code. Raises JobStopped, once: the attempt has been superseded meanwhile."""
        self._depth -= 1
        if self._depth == 0 and not self._spent:
            self._taken.release()
            if self.void:
                self.take()

    def keep(self) -> None:
        """Take the ticket for good. JobStopped may be raised in here for the last time."""
        if self._depth == 0:
            self._take()
        self._depth = 1

    def _take(self) -> None:
        if not self._spent and not self._taken.acquire(False):
            while not self._raised:
                time.sleep(0.0001)
            _raise_in_thread(self.thread, None)
        self._spent |= self.void

    def use(self) -> None:
        """Raise JobStopped in the attempt's thread: now if it is in its function, else when it returns there."""
        self.void = True
        if self._taken.acquire(False):
            if _is_logging(self.thread):
                threading.Thread(target=self._raise, name="bgjobs-force-stop", daemon=True).start()
            else:
                self._raise()

    def _raise(self) -> None:
        """Raise it when the thread holds no lock of the app's logging, which all threads need. (A record that it logs
        meanwhile is a call of the library, which waits for us.)"""
        pause = 0.001
        while _is_logging(self.thread):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        _raise_in_thread(self.thread, JobStopped)
        self._raised = True


def _is_logging(thread: int) -> bool:
    """Return whether a thread is in a call of `logging`, unless it waits there for our exception."""
    frame = sys._current_frames().get(thread)
    if frame is None or frame.f_code is Ticket._take.__code__:
        return False
    modules = (each.f_globals.get("__name__", "") for each, _ in traceback.walk_stack(frame))
    return any(module.partition(".")[0] == "logging" for module in modules)


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> None:
    """Have `error` raised in a thread at its next bytecode; None takes back what is not raised yet."""
    try:
        import ctypes
        set_error = ctypes.pythonapi.PyThreadState_SetAsyncExc
    except (ImportError, AttributeError):                 # not CPython: the attempt stops at its next checkpoint
        return
    set_error(ctypes.c_ulong(thread), ctypes.py_object() if error is None else ctypes.py_object(error))


class _Here(threading.local):
    ticket: Ticket | None = None           # of the attempt that this thread executes


_here = _Here()


def library_code(function: _Function) -> _Function:
    """Decorate what must not be interrupted by a force stop of the job that calls it."""
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
    return call                                           # type: ignore[return-value]


# Ctrl-C raises an exception in the main thread, at any call or return in Python code: also at the end of
# Condition.__enter__ and at the begin of Condition.__exit__. There the lock would stay taken for ever. A lock's own
# __enter__ and __exit__ are written in C and one step with the `with` block. So here `with condition` calls those.

class _Condition(threading.Condition):
    """A condition that Ctrl-C does not leave locked."""

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)


class _Event(threading.Event):
    """An event that Ctrl-C does not leave locked."""

    def __init__(self) -> None:
        super().__init__()
        self._cond = _Condition(threading.Lock())


class _HandleCondition(_Condition):
    """The condition of a handle. In a job the stdlib's `wait` and `as_completed` lock it; a force stop must not hit
    them then, so who locks it takes the ticket, too."""

    _lock: threading.RLock

    def __init__(self) -> None:
        super().__init__()
        del self.acquire, self.release                    # the lock's own, which Condition puts there

    def acquire(self) -> bool:                            # type: ignore[override]
        if _here.ticket is not None:
            _here.ticket.take(quietly=True)               # also while a generator of the stdlib's cleans up
        return self._lock.acquire()

    def release(self) -> None:
        self._lock.release()
        if _here.ticket is not None:
            _here.ticket.put_back()

    @property
    def __enter__(self) -> Any:
        return self._lock.__enter__ if _here.ticket is None else self.acquire

    @property
    def __exit__(self) -> Any:
        return self._lock.__exit__ if _here.ticket is None else lambda *exc_info: self.release()


# ---- 7 Tables and statements ----------------------------------------------------------------------------------
#
# A job that is `pending` is in one of three places. Ready: `queue` is its lane, 0 normal or 1 low priority. Waiting
# for its time: `run_at`, and no queue. Or `parked`, out of the way until what that column names comes: a process that
# knows its function ("function NAME"), the end of another job of its name ("limit NAME"), or the end of a job that is
# suspected, like this one, of taking its process down ("suspect").
#
# `lane` of a root is the best queue in its tree, NULL while nothing there is ready: (lane, vtime) finds the next root
# and (root_id, queue, id) its oldest ready child. `owner` is the runner that executes the job, NULL once its function
# has returned.
#
# Each job carries counts over its descendants (total, done, failed, running; `open` counts only its direct children
# that are not over). A transaction adds up what it changes and writes each ancestor once, however many of its
# descendants it touched.

TABLES = {sql.split()[2]: sql for sql in (
    "CREATE TABLE bgjobs_schema (version INTEGER NOT NULL)",
    """CREATE TABLE bgjobs_jobs (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
        parent_id INTEGER, root_id INTEGER, queue INTEGER, lane INTEGER, vtime INTEGER NOT NULL DEFAULT 0,
        charge INTEGER NOT NULL DEFAULT 0, owner INTEGER, submitter INTEGER,
        returned INTEGER NOT NULL DEFAULT 0, goes_on INTEGER NOT NULL DEFAULT 0, superseded INTEGER NOT NULL DEFAULT 0,
        deaths INTEGER NOT NULL DEFAULT 0, died_with TEXT, own_errors INTEGER NOT NULL DEFAULT 0,
        open INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0,
        failed INTEGER NOT NULL DEFAULT 0, running INTEGER NOT NULL DEFAULT 0,
        low_priority INTEGER NOT NULL DEFAULT 0, system INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL, run_at REAL, started_at REAL, waited REAL, finished_at REAL, since REAL,
        duration REAL NOT NULL DEFAULT 0, progress REAL, progress_at REAL, gained REAL, seconds REAL, step REAL,
        tree_progress REAL NOT NULL DEFAULT 0, tree_at REAL, tree_gained REAL, tree_seconds REAL,
        phase TEXT, parked TEXT, max_running INTEGER, label TEXT, run_by TEXT, key TEXT, options TEXT, message TEXT,
        args TEXT, kwargs TEXT, state TEXT, positions TEXT, result TEXT, error TEXT)""",
    """CREATE TABLE bgjobs_logs (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL, at REAL NOT NULL,
        level INTEGER NOT NULL, message TEXT NOT NULL)""",
    # Of attempts, for people: those alone that their job's row does not tell, others than the one that ended it.
    """CREATE TABLE bgjobs_attempts (
        job_id INTEGER NOT NULL, number INTEGER NOT NULL, started_at REAL, ended_at REAL NOT NULL,
        outcome TEXT NOT NULL, error TEXT, PRIMARY KEY (job_id, number)) WITHOUT ROWID""",
    # One row. vtime: the queue's virtual time. last_id: the highest id ever removed, which is not given out again.
    # counted_id: up to which the statistics have counted what was created. token: of the status page, whichever
    # process serves it.
    """CREATE TABLE bgjobs_clock (vtime INTEGER NOT NULL DEFAULT 0, last_id INTEGER NOT NULL DEFAULT 0,
        counted_id INTEGER NOT NULL DEFAULT 0, token TEXT)""",
    """CREATE TABLE bgjobs_runners (
        id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, host TEXT NOT NULL, workers INTEGER NOT NULL,
        started_at REAL NOT NULL, heartbeat_at REAL NOT NULL, abandoned INTEGER NOT NULL DEFAULT 0, lock_file TEXT)""",
    "CREATE TABLE bgjobs_functions (name TEXT PRIMARY KEY, seconds REAL, tree_seconds REAL) WITHOUT ROWID",
    """CREATE TABLE bgjobs_schedules (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, schedule TEXT NOT NULL, zone TEXT,
        name TEXT NOT NULL, args TEXT, kwargs TEXT, options TEXT, label TEXT, run_by TEXT,
        low_priority INTEGER NOT NULL, system INTEGER NOT NULL, max_running INTEGER,
        created_at REAL NOT NULL, next_at REAL NOT NULL, last_at REAL, job_id INTEGER,
        runs INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, paused INTEGER NOT NULL DEFAULT 0)""",
    # Which living runners' code has which schedules.
    """CREATE TABLE bgjobs_registered (schedule_id INTEGER NOT NULL, runner_id INTEGER NOT NULL,
        PRIMARY KEY (schedule_id, runner_id)) WITHOUT ROWID""",
    # minute: of Unix time, the first of the hour where hours are summed up, 0 for what is older than the windows.
    """CREATE TABLE bgjobs_stats (
        minute INTEGER NOT NULL, name TEXT NOT NULL,
        created INTEGER NOT NULL, started INTEGER NOT NULL, finished INTEGER NOT NULL, failed INTEGER NOT NULL,
        waiting REAL NOT NULL, waiting_min REAL, waiting_max REAL,
        running REAL NOT NULL, running_min REAL, running_max REAL, PRIMARY KEY (minute, name)) WITHOUT ROWID""",
)}

INDEXES = (
    "CREATE INDEX bgjobs_ready_roots ON bgjobs_jobs(lane, vtime) WHERE lane IS NOT NULL",
    """CREATE INDEX bgjobs_ready_children ON bgjobs_jobs(root_id, queue)
        WHERE parent_id IS NOT NULL AND queue IS NOT NULL""",
    # system and parent_id are there for the lists of people, which this index counts and has in order by itself.
    "CREATE INDEX bgjobs_begun ON bgjobs_jobs(status, system, parent_id) WHERE status <> 'pending'",
    "CREATE INDEX bgjobs_children ON bgjobs_jobs(parent_id) WHERE parent_id IS NOT NULL",
    """CREATE INDEX bgjobs_due ON bgjobs_jobs(run_at)
        WHERE run_at IS NOT NULL AND queue IS NULL AND status = 'pending'""",
    "CREATE INDEX bgjobs_parked ON bgjobs_jobs(parked, root_id) WHERE parked IS NOT NULL",
    "CREATE INDEX bgjobs_limited ON bgjobs_jobs(name) WHERE max_running IS NOT NULL AND owner IS NOT NULL",
    "CREATE INDEX bgjobs_suspects ON bgjobs_jobs(deaths) WHERE deaths > 0",
    """CREATE UNIQUE INDEX bgjobs_root_key ON bgjobs_jobs(key)
        WHERE key IS NOT NULL AND parent_id IS NULL AND status IN ('pending', 'running', 'stopping', 'stopped')""",
    """CREATE UNIQUE INDEX bgjobs_child_key ON bgjobs_jobs(parent_id, key)
        WHERE key IS NOT NULL AND parent_id IS NOT NULL""",
    "CREATE INDEX bgjobs_logs_of_job ON bgjobs_logs(job_id)",
)

# A file of an older version gets the tables above; its rows keep the columns that are still there, and new ones get
# their defaults. So a change of the schema is made above, with a default for a new column that is NOT NULL, and gets
# an entry here: version of the file -> what else its rows need, once they are in the new tables, to be as the next
# version has them.
UPGRADES: dict[int, tuple[str, ...]] = {
    0: ("INSERT INTO bgjobs_schema VALUES (0)", "INSERT INTO bgjobs_clock DEFAULT VALUES"),      # a new file
    1: ("""UPDATE bgjobs_jobs SET parked = 'function ' || name
            WHERE status = 'pending' AND phase = 'unknown function' AND parked IS NULL""",
        """UPDATE bgjobs_jobs SET waited = max(0.0, started_at - CASE WHEN run_at BETWEEN created_at AND started_at
            THEN run_at ELSE created_at END) WHERE started_at IS NOT NULL AND waited IS NULL""",
        "UPDATE bgjobs_jobs SET returned = 2 WHERE returned = 1 AND error IS NOT NULL"),
}
SCHEMA_VERSION = len(UPGRADES)
ALL_VERSIONS_HAVE = ("bgjobs_jobs", "bgjobs_clock", "bgjobs_runners")


def rebuild(db: sqlite3.Connection, version: int) -> None:
    """Make the tables of a file with this version those of now, in the transaction that is open.

    The app's own tables stay as they are, and so do the triggers and indexes that it may have on ours. The connection
    has foreign_keys off and legacy_alter_table on: else the app's views, triggers and foreign keys would follow the
    older     tables out of the way.
    """
    apps_own = db.execute("""SELECT sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL
        AND name NOT LIKE 'bgjobs\\_%' ESCAPE '\\' AND tbl_name IN (SELECT value FROM json_each(?))""",
                          [json.dumps([*TABLES])]).fetchall()
    for table, create in TABLES.items():
        older = _columns_of(db, table)
        if older:
            db.execute(f"ALTER TABLE {table} RENAME TO bgjobs_older")
        db.execute(create)
        if older:
            columns = ", ".join(name for name in _columns_of(db, table) if name in older)
            db.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM bgjobs_older")
            db.execute("DELETE FROM sqlite_sequence WHERE name = ?", [table])      # AUTOINCREMENT goes on where it was
            db.execute("UPDATE sqlite_sequence SET name = ? WHERE name = 'bgjobs_older'", [table])
            db.execute("DROP TABLE bgjobs_older")         # with its indexes: those of now may have the same names
    changes = [sql for step in range(version, SCHEMA_VERSION) for sql in UPGRADES[step]]
    for statement in (*INDEXES, *changes, *(sql for sql, in apps_own)):
        db.execute(statement)
    db.execute("UPDATE bgjobs_schema SET version = ?", [SCHEMA_VERSION])


def _columns_of(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


class JobRow(NamedTuple):
    """A job as transactions see it: columns of bgjobs_jobs."""

    id: int
    parent_id: int | None
    root_id: int | None                                   # None: it is a root
    name: str
    status: str
    attempt: int                                          # number of the newest
    owner: int | None                                     # the runner that executes it
    returned: int                                         # 1: its function has; 2: it raised, and is not called again
    goes_on: int                                          # stopping, and resumed already: pending once it has stopped
    options: str | None                                   # JSON
    key: str | None
    system: int
    low_priority: int
    max_running: int | None
    deaths: int                                           # of processes that executed it
    queue: int | None
    lane: int | None
    parked: str | None
    vtime: int                                            # microseconds; of a root
    charge: int                                           # microseconds: what its attempt has added to vtime
    run_at: float | None
    started_at: float | None                              # the first attempt, since creation or restart
    since: float | None                                   # active since then, else None
    duration: float                                       # seconds active, before `since`
    progress: float | None                                # its own
    error: str | None                                     # JSON
    own_errors: int
    open: int                                             # counts over its descendants, as said above
    total: int
    done: int
    failed: int
    running: int
    tree_progress: float                                  # the sum of their progress; when it changed, its Rate
    tree_at: float | None
    tree_gained: float | None
    tree_seconds: float | None

    @property
    def root(self) -> int:
        """The id of the root of its tree."""
        return self.root_id or self.id

    @property
    def executes(self) -> bool:
        """An attempt of it executes."""
        return self.status in ACTIVE and not self.returned

    @property
    def stops(self) -> bool:
        """It is to be stopped when its attempt has ended."""
        return self.status == STOPPING and not self.goes_on


# Cast, since SQLite keeps any type in any column: a row that somebody else has written must not stop the claims of all.
_REALS = ("run_at", "started_at", "since", "duration", "progress", "tree_progress", "tree_at", "tree_gained",
          "tree_seconds")
_AS_THEY_ARE = ("id", "parent_id", "root_id", "name", "status", "options", "key", "parked", "error")
_JOB = ", ".join(
    name if name in _AS_THEY_ARE else f"CAST({name} AS {'REAL' if name in _REALS else 'INTEGER'}) AS {name}"
    for name in JobRow._fields)


class Claim(NamedTuple):
    """A job that has been claimed: what an attempt is made of."""

    id: int
    parent_id: int | None
    root_id: int | None
    name: str
    number: int                                           # of its attempts before this one
    args: str | None                                      # JSON, as the next four
    kwargs: str | None
    state: str | None
    positions: str | None
    options: str | None
    run_by: str | None
    low_priority: int
    total: int                                            # descendants
    progress: float | None
    vtime: int
    queue: int | None
    max_running: int | None
    deaths: int
    due: float | None                                     # since when it waits, if it never began
    duration: float
    system: int
    charge: int                                           # microseconds


_CLAIMED = """id, parent_id, root_id, CAST(name AS TEXT), CAST(attempt AS INTEGER), args, kwargs, state, positions,
    CAST(options AS TEXT), run_by, CAST(low_priority AS INTEGER), CAST(total AS INTEGER), CAST(progress AS REAL),
    CAST(vtime AS INTEGER), queue, CAST(max_running AS INTEGER), CAST(deaths AS INTEGER),
    CAST(CASE WHEN started_at IS NULL THEN max(created_at, ifnull(run_at, 0.0)) END AS REAL), CAST(duration AS REAL),
    system, 0"""

# submit. A root starts at the queue's virtual time. INSERT_MANY takes a batch, five times as quick as a statement for
# each job: a JSON array of their encoded arguments.
_SUBMITTED = """id, lane, vtime, parent_id, root_id, name, status, queue, created_at, run_at, submitter, low_priority,
    system, label, run_by, options, key, args, kwargs"""
_AS_ROOT, _AS_CHILD = "?, (SELECT vtime FROM bgjobs_clock), NULL, NULL", "NULL, 0, ?, ?"
_VALUES = "?, 'pending'" + ", ?" * 9
NEXT_ID = "SELECT max((SELECT last_id FROM bgjobs_clock), ifnull((SELECT max(id) FROM bgjobs_jobs), 0)) + 1"
INSERT_JOB = f"INSERT INTO bgjobs_jobs ({_SUBMITTED}) VALUES (({NEXT_ID}), {{}}, {_VALUES}, ?, ?, ?)"
INSERT_MANY = f"""INSERT INTO bgjobs_jobs ({_SUBMITTED})
    SELECT ? + key, {{}}, {_VALUES}, NULL, value, NULL FROM json_each(?)"""
INSERT_ROOT, INSERT_CHILD, INSERT_ROOTS, INSERT_CHILDREN = (
    sql.format(place) for sql in (INSERT_JOB, INSERT_MANY) for place in (_AS_ROOT, _AS_CHILD))
LIMIT = "UPDATE bgjobs_jobs SET max_running = :limit, parked = :key, phase = :phase WHERE id BETWEEN :first AND :last"
ROOT_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE key = :key AND key IS NOT NULL AND parent_id IS NULL
    AND status IN ('pending', 'running', 'stopping', 'stopped')"""
CHILD_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE parent_id = :parent AND key = :key AND key IS NOT NULL
    AND parent_id IS NOT NULL"""
PARENT_OF = "SELECT parent_id FROM bgjobs_jobs WHERE id = :id"
STANDING = "SELECT status, attempt, root_id, low_priority, run_by, options FROM bgjobs_jobs WHERE id = :id"
CLOCK = "SELECT vtime FROM bgjobs_clock"
ADVANCE_CLOCK = "UPDATE bgjobs_clock SET vtime = :tag WHERE vtime < :tag"
PAGE_TOKEN = "SELECT token FROM bgjobs_clock WHERE token IS NOT NULL"
KEEP_PAGE_TOKEN = "UPDATE bgjobs_clock SET token = :token WHERE token IS NULL"
TAKE_LOCK = "UPDATE bgjobs_clock SET vtime = vtime WHERE 0"

# claim
READY_ROOTS = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE id IN
    (SELECT id FROM bgjobs_jobs WHERE lane = :lane ORDER BY vtime, id LIMIT :limit)"""
READY_CHILDREN = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE root_id = :root AND queue = :lane AND id > :after
    AND parent_id IS NOT NULL AND queue IS NOT NULL ORDER BY id LIMIT :limit"""
# Jobs that are charged alike are claimed by one statement; :ids is a JSON array. A root without children is its own
# tree.
CLAIM = """UPDATE bgjobs_jobs SET status = 'running', attempt = attempt + 1, queue = NULL, phase = NULL,
    charge = :charge, owner = :owner, since = :now, started_at = ifnull(started_at, :now), gained = NULL,
    waited = CASE WHEN started_at IS NULL THEN max(0.0, :now - max(created_at, ifnull(run_at, 0))) ELSE waited END
    WHERE id IN (SELECT value FROM json_each(:ids))"""
CLAIM_SINGLE = CLAIM.replace("queue = NULL,", "queue = NULL, lane = NULL, vtime = vtime + :charge,")

# what attempts report; one that has been superseded is refused
_OF_ATTEMPT = "WHERE id = :id AND attempt = :attempt AND returned = 0 AND status IN ('running', 'stopping')"
SAVE_STATE = f"""UPDATE bgjobs_jobs SET state = ifnull(:state, state), positions = ifnull(:positions, positions)
    {_OF_ATTEMPT}"""
SAVE_PROGRESS = """UPDATE bgjobs_jobs SET progress = :progress, progress_at = :at, gained = :gained,
    seconds = :seconds, step = :step, message = :message WHERE id = :id"""
ADD_CHARGE = f"UPDATE bgjobs_jobs SET charge = charge + :more {_OF_ATTEMPT}"
INSERT_LOG = "INSERT INTO bgjobs_logs (job_id, at, level, message) VALUES (?, ?, ?, ?)"
# One statement for all, since a thread that computes holds each one up by the interpreter lock; :lines is a JSON
# array of [job, at, level, message, attempt].
INSERT_LINES = """INSERT INTO bgjobs_logs (job_id, at, level, message)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]') FROM json_each(:lines) WHERE EXISTS
    (SELECT 1 FROM bgjobs_jobs WHERE id = json_extract(value, '$[0]') AND superseded < json_extract(value, '$[4]'))"""

# the end of attempts. FINISH is for the first attempt of a job that returned and has no children; others take several
# statements: RECORD what the function left, MOVE the job to its next status, perhaps take its number back or refuse
# what it still says.
FINISH = """UPDATE bgjobs_jobs SET status = 'finished', returned = 1, finished_at = ?, duration = duration + ?,
    result = ?, vtime = vtime + ?, charge = 0, owner = NULL, since = NULL
    WHERE id = ? AND attempt = ? AND open = 0 AND status IN ('running', 'stopping')"""
JUST_FINISHED = """SELECT 1 FROM bgjobs_jobs
    WHERE id = :id AND attempt = :attempt AND status = 'finished' AND finished_at = :now"""
RECORD = """UPDATE bgjobs_jobs SET returned = :returned, result = :result, error = ifnull(:error, error),
    own_errors = own_errors + (:error IS NOT NULL), positions = ifnull(:positions, positions) WHERE id = :id"""
UNSPEND = """UPDATE bgjobs_jobs SET attempt = attempt - 1,
    started_at = CASE WHEN started_at = since THEN NULL ELSE started_at END WHERE id = :id"""
SUPERSEDE = "UPDATE bgjobs_jobs SET superseded = attempt WHERE id = :id"
MOVE = """UPDATE bgjobs_jobs SET status = :status, queue = :queue, parked = :parked, phase = :phase, goes_on = 0,
    run_at = ifnull(:run_at, run_at), finished_at = :finished_at, since = :since, duration = duration + :ran,
    charge = CASE WHEN :executes THEN charge ELSE 0 END, owner = CASE WHEN :executes THEN owner END WHERE id = :id"""
INSERT_ATTEMPT = "INSERT OR IGNORE INTO bgjobs_attempts VALUES (:id, :number, :started_at, :ended_at, :outcome, :error)"
TRIM_ATTEMPTS = "DELETE FROM bgjobs_attempts WHERE job_id = :id AND number <= :number - :keep"
ATTEMPTS = """SELECT number AS attempt, started_at, ended_at, outcome, error FROM bgjobs_attempts
    WHERE job_id = :id ORDER BY number"""

# trees
TREE_ROW = f"SELECT {_JOB} FROM bgjobs_jobs WHERE id = :id"
BEST_LANE = """SELECT min(queue) FROM (SELECT queue FROM bgjobs_jobs WHERE id = :root UNION ALL SELECT min(queue)
    FROM bgjobs_jobs WHERE root_id = :root AND parent_id IS NOT NULL AND queue IS NOT NULL)"""
SAVE_TREE = """UPDATE bgjobs_jobs SET open = ?, total = ?, done = ?, failed = ?, running = ?, tree_progress = ?,
    tree_at = ?, tree_gained = ?, tree_seconds = ?, lane = ?, vtime = ? WHERE id = ?"""
SUBTREE = f"""WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL
    SELECT j.id FROM tree JOIN bgjobs_jobs j ON j.parent_id = tree.id AND j.parent_id IS NOT NULL)
    SELECT {_JOB} FROM tree JOIN bgjobs_jobs USING (id)"""

# operations
SET_LOW_PRIORITY = "UPDATE bgjobs_jobs SET low_priority = :low, queue = :queue WHERE id = :id"
RESET = """UPDATE bgjobs_jobs SET state = NULL, positions = NULL, message = NULL, result = NULL, error = NULL,
    progress = NULL, progress_at = NULL, gained = NULL, step = NULL, own_errors = 0, returned = 0, goes_on = 0,
    deaths = 0, died_with = NULL, started_at = NULL, finished_at = NULL, duration = 0,
    open = 0, total = 0, done = 0, failed = 0, running = 0,
    tree_progress = 0, tree_at = NULL, tree_gained = NULL, tree_seconds = NULL WHERE id = :id"""
GO_ON = "UPDATE bgjobs_jobs SET goes_on = :goes_on WHERE id = :id AND goes_on <> :goes_on"
ACQUIT = "UPDATE bgjobs_jobs SET deaths = 0, died_with = NULL WHERE id = :id"
REOPEN = "UPDATE bgjobs_jobs SET returned = 0, error = NULL WHERE id = :id"
DELETE_JOB = "DELETE FROM bgjobs_jobs WHERE id = ?"
DELETE_LOGS = "DELETE FROM bgjobs_logs WHERE job_id = ?"
DELETE_ATTEMPTS = "DELETE FROM bgjobs_attempts WHERE job_id = ?"
NOTE_REMOVED = "UPDATE bgjobs_clock SET last_id = max(last_id, :id)"

# jobs that wait for their time, or are parked
DUE = f"""SELECT {_JOB} FROM bgjobs_jobs WHERE run_at <= :now AND run_at IS NOT NULL AND queue IS NULL
    AND status = 'pending' AND parked IS NULL LIMIT 1000"""
NEXT_DUE = """SELECT min(run_at) FROM bgjobs_jobs WHERE run_at IS NOT NULL AND queue IS NULL AND status = 'pending'
    AND parked IS NULL"""
MAKE_READY = "UPDATE bgjobs_jobs SET queue = :queue, parked = NULL, phase = NULL WHERE id = :id"
PARK = "UPDATE bgjobs_jobs SET queue = NULL, parked = :key, phase = :phase WHERE id = :id"
PARKED_KEYS = """WITH RECURSIVE keys(found) AS (SELECT min(parked) FROM bgjobs_jobs WHERE parked IS NOT NULL UNION ALL
    SELECT (SELECT min(parked) FROM bgjobs_jobs WHERE parked > found) FROM keys WHERE found IS NOT NULL)
    SELECT found FROM keys WHERE found IS NOT NULL"""
PARKED = f"SELECT {_JOB} FROM bgjobs_jobs WHERE parked = :key LIMIT 1000"
PARKED_ROOT = f"SELECT {_JOB} FROM bgjobs_jobs WHERE parked = :key AND root_id IS NULL ORDER BY id LIMIT 1"
PARKED_CHILD = f"SELECT {_JOB} FROM bgjobs_jobs WHERE parked = :key AND root_id > :after ORDER BY root_id, id LIMIT 1"
PARKED_BELOW = f"""WITH RECURSIVE below(id) AS (SELECT value FROM json_each(:holders) UNION
    SELECT j.id FROM below JOIN bgjobs_jobs j ON j.parent_id = below.id WHERE j.open > 0 OR j.parked = :key)
    SELECT {_JOB} FROM below JOIN bgjobs_jobs USING (id) WHERE parked = :key LIMIT 100"""
HOLDERS_OF_NAME = "SELECT id FROM bgjobs_jobs WHERE name = :name AND max_running IS NOT NULL AND owner IS NOT NULL"
HOLDERS_SUSPECT = "SELECT id FROM bgjobs_jobs WHERE deaths >= 2 AND deaths > 0 AND owner IS NOT NULL"

# runners, and those that have died
SAVE_RUNNER = """INSERT INTO bgjobs_runners (id, pid, host, workers, started_at, heartbeat_at, abandoned, lock_file)
    VALUES (:id, :pid, :host, :workers, :now, :now, :abandoned, :lock_file)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = :now, abandoned = :abandoned, lock_file = :lock_file"""
REMOVE_RUNNER = "DELETE FROM bgjobs_runners WHERE id = :id"
UNREGISTER = "DELETE FROM bgjobs_registered WHERE runner_id = :id"
LAST_SEEN = "SELECT heartbeat_at FROM bgjobs_runners WHERE id = :id"
OWNED = f"""SELECT {_JOB} FROM bgjobs_jobs
    WHERE status IN ('running', 'stopping') AND status <> 'pending' AND owner = :owner"""
ORPHANED = """SELECT DISTINCT owner FROM bgjobs_jobs WHERE status IN ('running', 'stopping') AND owner IS NOT NULL
    AND status <> 'pending' AND owner NOT IN (SELECT id FROM bgjobs_runners)"""
# died_with: the runners that died under the job since it was last acquitted; `deaths` is their number.
COUNT_DEATH = """UPDATE bgjobs_jobs SET deaths = deaths + 1,
    died_with = json_insert(ifnull(died_with, '[]'), '$[#]', :owner) WHERE id = :id"""
DIED_BESIDE = f"""SELECT {_JOB} FROM bgjobs_jobs WHERE deaths > 0 AND id <> :id
    AND EXISTS (SELECT 1 FROM json_each(died_with) WHERE value IN
    (SELECT value FROM json_each((SELECT died_with FROM bgjobs_jobs WHERE id = :id))))"""
FORGET_DEATHS = """UPDATE bgjobs_jobs SET (deaths, died_with) = (SELECT count(*), json_group_array(value)
    FROM json_each(died_with) WHERE value NOT IN
    (SELECT value FROM json_each((SELECT died_with FROM bgjobs_jobs WHERE id = :killer)))) WHERE id = :id"""
_TALLIES = ("created", "started", "finished", "failed", "waiting", "waiting_min", "waiting_max",
            "running", "running_min", "running_max")
SAVE_TALLY = f"""INSERT INTO bgjobs_stats (minute, name, {", ".join(_TALLIES)}) VALUES ({", ".join("?" * 12)})
    ON CONFLICT (minute, name) DO UPDATE SET """ + ", ".join(
    f"{name} = {name[-3:]}(ifnull({name}, excluded.{name}), ifnull(excluded.{name}, {name}))"
    if name[-4:] in ("_min", "_max")
    else f"{name} = {name} + excluded.{name}" for name in _TALLIES)
# What was created is counted by its ids, when somebody asks or before some of it is removed: a submit pays nothing
# for it.
UNCOUNTED = """SELECT CAST(created_at / 60 AS INTEGER), name, count(*), 0, 0, 0, 0.0, NULL, NULL, 0.0, NULL, NULL
    FROM bgjobs_jobs WHERE id > (SELECT counted_id FROM bgjobs_clock) AND system = 0 GROUP BY 1, 2"""
NOTE_COUNTED = "UPDATE bgjobs_clock SET counted_id = max(counted_id, (SELECT ifnull(max(id), 0) FROM bgjobs_jobs))"

HIGHEST_ID = "SELECT ifnull(max(id), 0) FROM bgjobs_jobs"
TRIM_LOG = """DELETE FROM bgjobs_logs WHERE job_id = :id AND id <= (SELECT id FROM bgjobs_logs WHERE job_id = :id
    ORDER BY id DESC LIMIT 1 OFFSET :keep)"""
SAVE_COST = "INSERT OR REPLACE INTO bgjobs_functions VALUES (?, ?, ?)"


# ---- 8 Transactions -------------------------------------------------------------------------------------------
#
# What writes do to jobs. All of it happens in a Transaction, and the order is the same everywhere: change the jobs
# themselves, adding up what that means for their ancestors and roots; `apply` writes those, and closes the parents
# whose last child is over. What decides by counts, lanes or virtual times calls `apply` first.

SUSPECT = 2                # deaths of its process after which a job runs with no other such one beside it
DEATHS = 3                 # after which it is failed
HEARTBEAT_SECONDS = 15     # for people to see; what tells the dead from the living is _Presence
PARKED_A_CLAIM = 200       # jobs that one claim puts out of the way; then others get their turn to write
ATTEMPTS_A_JOB = 100       # that are kept, for people to see


class Submission:
    """One job that is to be stored: its columns, encoded, and who it comes from."""

    args: str | None = None
    kwargs: str | None = None
    options: str | None = None
    label: str | None = None
    run_by: str | None = None                             # None: the parent's
    low_priority: int | None = None                       # None: the parent's
    system = 0
    key: str | None = None
    run_at: float | None = None
    max_running: int | None = None
    submitter: int | None = None
    parent_id: int | None = None
    author: tuple[int, int] | None = None                 # when a job submits: its id and attempt

    def __init__(self, name: str) -> None:
        self.name = name


def kept_options(text: str | None) -> dict[str, Any]:
    """Return the options that a row keeps."""
    options: dict[str, Any] = json.loads(text) if text else {}
    return options


def dump_error(type: str, text: str, trace: str) -> str:
    """Return the `error` column: what a function raised."""
    return json.dumps({"type": _text(type), "text": _text(text), "traceback": _text(trace, 64 * 1024)})


def slots_of(job: Claim | JobRow | Attempt) -> dict[str, int]:
    """Return the limits that a job counts for, as {what it is parked by: how many may run}."""
    slots = {} if job.max_running is None else {f"limit {job.name}": job.max_running}
    return slots if job.deaths < SUSPECT else {**slots, "suspect": 1}


def status_after(job: JobRow, outcome: str, retries: bool = False) -> str:
    """Return the status of a job whose attempt has ended so; `retries`: what it raised is no reason to end."""
    if outcome == RETURNED or outcome == RAISED and not retries:       # the function is not called again
        if job.open == 0:
            return FINISHED if outcome == RETURNED else FAILED
        return STOPPED if job.stops else RUNNING
    return STOPPED if job.stops or outcome == HALTED and not job.goes_on else PENDING


def contribution(status: str, progress: float | None) -> dict[str, Any]:
    """Return what a job in `status` adds to the counts and the progress of its ancestors."""
    over = status in OVER
    return {"done": over, "failed": status == FAILED, "running": status in ACTIVE,
            "progress": 1.0 if over else progress or 0.0}


class _Tally:
    """What one transaction counts for the statistics of one function: seconds, one number for each job."""

    __slots__ = ("waiting", "finished", "failed")

    def __init__(self) -> None:
        self.waiting: list[float] = []
        self.finished: list[float] = []
        self.failed: list[float] = []

    def row(self) -> tuple[Any, ...]:
        """Return the columns of _TALLIES."""
        measured = [value for some in (self.waiting, self.finished + self.failed)
                    for value in (sum(some), min(some, default=None), max(some, default=None))]
        return 0, len(self.waiting), len(self.finished), len(self.failed), *measured


class _Change:
    """What one transaction adds up for one job that has descendants, or for one root."""

    open = total = done = failed = running = charge = 0
    progress = 0.0
    wake: int | None = None                               # a job became ready in this lane
    relane = False                                        # ready jobs went away: look the best lane up


class Transaction:
    """What a write may do, between one BEGIN IMMEDIATE and its COMMIT. Made and run by the store."""

    def __init__(self, db: sqlite3.Connection | _Through, lineages: dict[int, tuple[int, ...]], now: float) -> None:
        self.execute, self.executemany, self.now = db.execute, db.executemany, now
        self._lineages = lineages                         # parent id -> it and its ancestors, up to the root
        self._changes: defaultdict[int, _Change] = defaultdict(_Change)      # by job id; not applied yet
        self._freed: set[str] = set()                     # limits below which attempts have ended; not applied yet
        self._slots: dict[str, set[int]] = {}             # key of a limit -> jobs that run, while claiming
        self._tallies: defaultdict[str, _Tally] = defaultdict(_Tally)        # by name of the function
        self.over: list[int] = []                         # jobs that became over
        self.parked = 0                                   # jobs that claims have put out of the way
        self.more_ready = False                           # than the last claim took
        self.trees: list[tuple[str, float]] = []          # jobs with children that finished: name and duration
        self.after_commit: list[Callable[[], None]] = []

    def value(self, sql: str, **parameters: Any) -> Any:
        """Return the first value that a query finds, or None."""
        row = self.execute(sql, parameters).fetchone()
        return None if row is None else row[0]

    def jobs(self, sql: str, **parameters: Any) -> list[JobRow]:
        """Return the jobs that a query for the columns of JobRow finds."""
        return [JobRow._make(row) for row in self.execute(sql, parameters).fetchall()]

    def _job(self, job_id: int) -> JobRow:
        """Return a job as it is now. KeyError: there is none."""
        for job in self.jobs(TREE_ROW, id=job_id):
            return job
        raise KeyError(job_id)

    def _executing(self, attempt: Attempt) -> JobRow | None:
        """Return the job of an attempt, or None: the attempt has been superseded, or has ended.

        The owner counts, too: the number of one that was given back unspent is given out again, perhaps to another.
        """
        for job in self.jobs(TREE_ROW, id=attempt.id):
            if job.executes and job.attempt == attempt.number and job.owner == attempt.runner._id:
                return job
        return None

    def _lineage(self, parent_id: int | None) -> tuple[int, ...]:
        """Return the ids from a job's parent up to its root; they never change."""
        if parent_id is None:
            return ()
        line = self._lineages.get(parent_id)
        if line is None:
            line = (parent_id, *self._lineage(self.value(PARENT_OF, id=parent_id)))
            if len(self._lineages) > 10_000:
                self._lineages.clear()
            self._lineages[parent_id] = line
        return line

    # submit

    def submit(self, new: Submission) -> int:
        """Store one job and return its id; with a key, that of the job which has it already."""
        (queue, values), is_root = self._values(new), new.parent_id is None
        if new.key is not None:
            holder = self.value(ROOT_WITH_KEY if is_root else CHILD_WITH_KEY, key=new.key, parent=new.parent_id)
            if holder is not None:
                return int(holder)
        inserted = self.execute(INSERT_ROOT if is_root else INSERT_CHILD, (*values, new.key, new.args, new.kwargs))
        job_id: int = inserted.lastrowid                  # type: ignore[assignment]
        self._submitted(new, job_id, 1, queue)
        return job_id

    def submit_many(self, new: Submission, arguments: list[str | None]) -> range:
        """Store one job for each of the encoded argument lists and return their ids."""
        (queue, values), first = self._values(new), self.value(NEXT_ID)
        self.execute(INSERT_ROOTS if new.parent_id is None else INSERT_CHILDREN,
                     (first, *values, json.dumps(arguments)))
        self._submitted(new, first, len(arguments), queue)
        return range(first, first + len(arguments))

    def _values(self, new: Submission) -> tuple[int | None, tuple[Any, ...]]:
        """Return the queue in which a new job is ready, or None, and the parameters of its INSERT.

        Raises what _admit does.
        """
        root_id, low, run_by = self._admit(new)
        waits = new.run_at is not None and new.run_at > self.now
        queue = None if waits or new.max_running is not None and self._is_held_up(new) else low
        place = (queue,) if root_id is None else (new.parent_id, root_id)
        return queue, (*place, new.name, queue, self.now, new.run_at, new.submitter, low, new.system, new.label,
                       run_by, new.options)

    def _submitted(self, new: Submission, first: int, count: int, queue: int | None) -> None:
        """Write the limit of new jobs; if they are children, count them for their ancestors and wake their root."""
        if new.max_running is not None:
            parked = queue is None and (new.run_at is None or new.run_at <= self.now)
            key, phase = (f"limit {new.name}", "limit reached") if parked else (None, None)
            self.execute(LIMIT, {"first": first, "last": first + count - 1, "limit": new.max_running, "key": key,
                                 "phase": phase})
        if new.parent_id is not None:
            self._count(new.parent_id, total=count)
            self._changes[new.parent_id].open += count
            if queue is not None:
                self._wake(self._lineage(new.parent_id)[-1], queue)

    def _admit(self, new: Submission) -> tuple[int | None, int, str | None]:
        """Return the id of the root (None: the job is one), low_priority and run_by of a new job.

        JobStopped, InvalidOperation: its author, or its parent, may have no children now.
        """
        if new.author is not None:
            self.check_author(new.author)
        if new.parent_id is None:
            return None, new.low_priority or 0, new.run_by
        row = self.execute(STANDING, {"id": new.parent_id}).fetchone()
        if row is None:
            raise InvalidOperation(f"job {new.parent_id} does not exist any more; it takes no children")
        status, _, root_id, low, run_by, options = row
        by_itself = new.author is not None and new.author[0] == new.parent_id
        if by_itself and status == STOPPING and kept_options(options).get("stoppable", True):
            raise JobStopped(f"job {new.parent_id} was asked to stop")
        if status in OVER:
            raise InvalidOperation(f"job {new.parent_id} is {status}; it takes no more children")
        if status in (STOPPING, STOPPED) and not by_itself:
            raise InvalidOperation(f"job {new.parent_id} is {status}; it takes no children before it is resumed")
        return (root_id or new.parent_id, low if new.low_priority is None else new.low_priority,
                run_by if new.run_by is None else new.run_by)

    def check_author(self, author: tuple[int, int]) -> None:
        """Refuse what an attempt asks for that has been superseded. Raises JobStopped."""
        row = self.execute(STANDING, {"id": author[0]}).fetchone()
        if row is None or row[1] != author[1] or row[0] not in ACTIVE:
            raise JobStopped(f"attempt {author[1]} of job {author[0]} has been superseded")

    def _is_held_up(self, new: Submission) -> bool:
        """Return whether a new job waits behind others of its name that are parked: none that runs may wait for it."""
        key = f"limit {new.name}"
        return self.execute(PARKED, {"key": key}).fetchone() is not None \
            and not self._holders(key).intersection(self._lineage(new.parent_id))

    # claim

    def claim(self, owner: int, free: int, low_free: int, ahead: int, planned: float, workers: int, costs: Costs
              ) -> list[Claim]:
        """Claim jobs for the free places of a runner, in fair order.

        Up to `ahead` more are claimed if they are short, for `workers` that will be free soon, where `planned` seconds
        of work wait already. Low-priority jobs get at most `low_free` places, and only those that normal ones leave.
        """
        claims: list[Claim] = []
        self._slots.clear()
        while True:
            self.apply()                                  # what this transaction submitted, or parked, counts
            parked, self.more_ready = self.parked, False
            claims += self._claim_lane(0, owner, free - len(claims), ahead, planned, workers, costs)
            low = self._claim_lane(1, owner, min(low_free, free - len(claims)), 0, 0.0, workers, costs)
            low_free -= len(low)
            claims += low
            if len(claims) >= free or self.parked == parked or self.parked >= PARKED_A_CLAIM:
                return claims

    def _claim_lane(self, lane: int, owner: int, free: int, ahead: int, planned: float, workers: int, costs: Costs
                    ) -> list[Claim]:
        limit = max(0, free) + ahead
        ready = list(map(Claim._make, self.execute(READY_ROOTS, {"lane": lane, "limit": limit}))) if limit else []
        if not ready:
            return []
        self.more_ready |= len(ready) == limit
        claims: list[Claim] = []
        tag, budget = 0, AHEAD_SECONDS * workers
        batches: defaultdict[tuple[str, int], list[int]] = defaultdict(list)      # statement and charge -> ids
        plans: dict[str, tuple[int, float]] = {}          # all jobs of a batch and a name cost alike

        def charge_for(job: Claim) -> int | None:
            if (job.max_running is not None or job.deaths >= SUSPECT) and not self._take_slots(job):
                return None
            return (plans.get(job.name) or plans.setdefault(job.name, costs.plan(job.name)))[0]
        for root, job, tag, charge in self._in_fair_order(ready, lane, limit, charge_for):
            if len(claims) >= free:                       # ahead of a free worker: only what is known to be short
                planned += plans[job.name][1]
                once = job.options is not None and '"recover":false' in job.options
                if planned > budget or len(claims) >= limit or once:
                    self.more_ready = True
                    break
            claims.append(Claim(*job[:-1], charge))
            if job.parent_id is None and job.total == 0:
                batches[CLAIM_SINGLE, charge].append(job.id)
                continue
            batches[CLAIM, charge].append(job.id)
            self._count(job.parent_id, running=1)
            change = self._changes[root]
            change.charge += charge
            change.relane = True
        for (sql, charge), ids in batches.items():
            self.execute(sql, {"charge": charge, "owner": owner, "now": self.now, "ids": json.dumps(ids)})
        if tag:
            self.execute(ADVANCE_CLOCK, {"tag": tag})
        return claims

    def _in_fair_order(self, roots: list[Claim], lane: int, limit: int, charge: Callable[[Claim], int | None]
                       ) -> Iterator[tuple[int, Claim, int, int]]:
        """Yield what fair_order does for these roots. Where all of them are single jobs, none comes twice: no heap."""
        if any(root.total for root in roots):
            chunk = max(4, limit // len(roots) + 1)
            return fair_order([
                (root.vtime, root.id, self._ready_jobs(root, lane, chunk) if root.total else iter((root,)))
                for root in roots], charge)
        roots.sort(key=operator.attrgetter("vtime", "id"))
        return ((root.id, root, root.vtime, cost) for root in roots if (cost := charge(root)) is not None)

    def _ready_jobs(self, root: Claim, lane: int, chunk: int) -> Iterator[Claim]:
        """Yield the ready jobs of a tree in one lane, oldest first, read a chunk at a time."""
        if root.queue == lane:
            yield root
        after = 0
        while True:
            page = {"root": root.id, "lane": lane, "after": after, "limit": chunk}
            rows = self.execute(READY_CHILDREN, page).fetchall()
            yield from map(Claim._make, rows)
            if len(rows) < chunk or self.parked >= PARKED_A_CLAIM:
                return
            after = rows[-1][0]

    # limits: max_running of a name, and one suspect at a time

    def _take_slots(self, job: Claim) -> bool:
        """Count a job that is limited as running; or park it, if it may not run now."""
        slots = slots_of(job)
        for key, limit in slots.items():
            if key not in self._slots:
                self._slots[key] = self._holders(key)
            if not self._has_room(self._slots[key], limit, job.parent_id):
                phase = "interrupted" if key == "suspect" else "limit reached"
                self.execute(PARK, {"id": job.id, "key": key, "phase": phase})
                self._changes[job.root_id or job.id].relane = True
                self.parked += 1
                return False
        for key in slots:
            self._slots[key].add(job.id)
        return True

    def _free_slots(self, job: JobRow | Attempt) -> None:
        """Note that an attempt has ended; apply() makes ready what waited for that."""
        if job.max_running is not None or job.deaths >= SUSPECT:
            self._freed.update(slots_of(job))

    def unpark_next(self, key: str) -> None:
        """Make as many jobs ready as a limit leaves slots, and descendants of those that run, which may wait for
        them."""
        running = self._holders(key)

        def make_ready(job: JobRow) -> bool:
            room = self._has_room(running, slots_of(job)[key], job.parent_id)
            if room:
                self._make_ready([job])
                running.add(job.id)
            return room
        while (following := self._next_parked(key)) is not None and make_ready(following):
            pass
        if following is not None:
            for descendant in self.jobs(PARKED_BELOW, key=key, holders=json.dumps([*running])):
                make_ready(descendant)

    def _holders(self, key: str) -> set[int]:
        """Return the jobs that run and count for a limit."""
        kind, _, name = key.partition(" ")
        sql = HOLDERS_SUSPECT if kind == "suspect" else HOLDERS_OF_NAME
        return {job_id for job_id, in self.execute(sql, {"name": name})}

    def _has_room(self, running: set[int], limit: int, parent_id: int | None) -> bool:
        """Return whether a child of this parent may run beside these. Its ancestors do not count, for they may wait."""
        return len(running) < limit or len(running.difference(self._lineage(parent_id))) < limit

    def _next_parked(self, key: str) -> JobRow | None:
        """Return the oldest job of the tree that has run least, normal before low priority, as far as 64 trees."""
        heads, after = self.jobs(PARKED_ROOT, key=key), 0
        while len(heads) < 64 and (found := self.jobs(PARKED_CHILD, key=key, after=after)):
            heads += found
            after = found[0].root
        clock = self.value(CLOCK)

        def turn(head: JobRow) -> tuple[int, int, int]:
            root = head if head.root_id is None else self._job(head.root_id)
            return head.low_priority, entry_tag(root.vtime, clock), head.id
        return min(heads, default=None, key=turn)

    # the end of attempts

    def finish(self, attempts: list[Attempt]) -> None:
        """Record the outcomes of attempts. One that was superseded is left out."""
        self.apply()                                      # the children that this transaction submitted count
        plain = [a for a in attempts
                 if a.outcome == RETURNED and a.number == 1 and not a.has_children and not a.has_reported]
        rows = [(self.now, a.ran, a.result, a.correction if a.parent_id is None else 0, a.id, a.number) for a in plain]
        if plain and self.executemany(FINISH, rows).rowcount < len(plain):
            # Some were superseded, or got a child from outside.
            plain = [a for a in plain if self.value(JUST_FINISHED, id=a.id, attempt=a.number, now=self.now)]
        for attempt in plain:
            self._count_finished(attempt)
        recorded = set(plain)
        for attempt in attempts:
            if attempt not in recorded:
                self._end(attempt)

    def finish_superseded(self, attempt: Attempt) -> bool:
        """Record the outcome of an attempt that still executes, and accept nothing more from it. False: it has
        ended."""
        ends = self._end(attempt)
        if ends:
            self.execute(SUPERSEDE, {"id": attempt.id})
        return ends

    def _count_finished(self, attempt: Attempt) -> None:
        """Count an attempt that FINISH has written."""
        self.over.append(attempt.id)
        self._tally_end(attempt.name, attempt.system, FINISHED, attempt.ran_before + attempt.ran)
        self._free_slots(attempt)
        if attempt.parent_id is not None:
            self._count(attempt.parent_id, done=1, running=-1, progress=1.0)
            self._changes[attempt.parent_id].open -= 1
            self._changes[attempt.root_id].charge += attempt.correction

    def _end(self, attempt: Attempt) -> bool:
        """Record any outcome. False: the attempt has been superseded."""
        self.apply()                                      # the counts must be true before they decide
        if attempt.unsaved_progress is not None:
            self.save_progress(attempt, attempt.unsaved_progress)
        job = self._executing(attempt)
        if job is None:
            return False
        outcome, error = attempt.outcome, attempt.error if attempt.outcome == RAISED else None
        retries = outcome == RAISED and job.own_errors < attempt.options.get("retries", 0)
        returned = 0 if retries else {RETURNED: 1, RAISED: 2}.get(outcome, 0)
        status = status_after(job, outcome, retries)
        if outcome in (UNSPENT, UNKNOWN):
            self.execute(UNSPEND, {"id": job.id})
        elif attempt.number > 1 or not returned:
            timed_out = outcome == RAISED and attempt.reason == TIMED_OUT
            self._keep_attempt(job, TIMED_OUT if timed_out else OUTCOMES[outcome], error)
        self.execute(RECORD, {"id": job.id, "returned": returned, "result": attempt.result, "error": error,
                              "positions": attempt.unsaved_positions()})
        self._end_attempt(job, status, attempt.ran, attempt.worked, phase=PHASES.get(outcome),
                          run_at=self._announce_retry(attempt, job.own_errors + 1, status) if retries else None,
                          parked=f"function {job.name}" if outcome == UNKNOWN else None)
        return True

    def _announce_retry(self, attempt: Attempt, failures: int, status: str) -> float:
        """Return when the next attempt is due, and tell the job's log."""
        pause = pause_before_retry(attempt.options, failures)
        when = f"in {pause:,.1f} s" if status == PENDING else "when it is resumed"
        self.log(attempt.id, logging.WARNING,
                 f"attempt {attempt.number} failed; retry {failures} of {attempt.options['retries']} {when}")
        return self.now + pause

    def _keep_attempt(self, job: JobRow, outcome: str, error: str | None = None) -> None:
        """Keep, for people, what became of an attempt; error is one of dump_error."""
        if error is not None:
            raised = json.loads(error)
            error = _text(f"{raised['type']}: {raised['text']}", 500)
        self.execute(INSERT_ATTEMPT, {"id": job.id, "number": job.attempt, "started_at": job.since,
                                      "ended_at": self.now, "outcome": outcome, "error": error})
        if job.attempt > ATTEMPTS_A_JOB:
            self.execute(TRIM_ATTEMPTS, {"id": job.id, "number": job.attempt, "keep": ATTEMPTS_A_JOB})

    def _end_attempt(self, job: JobRow, status: str, ran: float, worked: float, **waits: Any) -> None:
        """End the attempt that executes: charge its root for `worked` seconds, free its slots, and move the job on."""
        self._changes[job.root].charge += int(worked * 1e6) - job.charge
        self._free_slots(job)
        self._move(job, status, ran, **waits)

    def _move(self, job: JobRow, status: str, ran: float | None = None, *, run_at: float | None = None,
              parked: str | None = None, phase: str | None = None) -> None:
        """Change a job's status, and add up what that means for others.

        ran: the seconds that it was active, where that is not the time since it became so. run_at, parked, phase: what
        it waits for if it becomes pending and is not ready, and the word for that.
        """
        executes = status == STOPPING                     # up to its next checkpoint
        if status != PENDING:
            run_at = parked = phase = None
        if ran is None:
            ran = max(0.0, self.now - job.since) if job.since and not executes else 0.0
        waits = run_at or parked or job.run_at is not None and job.run_at > self.now and job.started_at is None
        queue = job.low_priority if status == PENDING and not waits else None
        self.execute(MOVE, {"id": job.id, "status": status, "queue": queue, "parked": parked, "phase": phase,
                            "run_at": run_at, "ran": ran, "executes": executes,
                            "since": job.since if executes else self.now if status == RUNNING else None,
                            "finished_at": self.now if status in OVER else None})
        if status in OVER and job.status not in OVER:
            self.over.append(job.id)
        if status in (FINISHED, FAILED):
            self._tally_end(job.name, job.system, status, job.duration + ran)
        if status == FINISHED and job.total:
            self.trees.append((job.name, job.duration + ran))
        if job.parent_id is not None:
            before, after = contribution(job.status, job.progress), contribution(status, job.progress)
            changed = {name: after[name] - before[name] for name in after}
            self._count(job.parent_id, **changed)
            self._changes[job.parent_id].open -= changed["done"]
        if job.queue is not None:
            self._changes[job.root].relane = True
        if queue is not None:
            self._wake(job.root, queue)
        if job.returned and status not in OVER:
            self._changes.setdefault(job.id, _Change())   # its last child may be over already: apply() looks

    # what is added up

    def _count(self, parent_id: int | None, *, total: int = 0, done: int = 0, failed: int = 0, running: int = 0,
               progress: float = 0.0) -> None:
        """Add to the counts of a job's ancestors, from its parent up."""
        for ancestor in self._lineage(parent_id):
            change = self._changes[ancestor]
            change.total += total
            change.done += done
            change.failed += failed
            change.running += running
            change.progress += progress

    def _wake(self, root_id: int, queue: int) -> None:
        """Note that a job of a tree became ready."""
        change = self._changes[root_id]
        change.wake = queue if change.wake is None else min(change.wake, queue)

    def forget_changes(self) -> None:
        """Drop what is added up and not applied, after a ROLLBACK TO."""
        self._changes.clear()

    def apply(self) -> None:
        """Write what is added up: counts of ancestors, virtual times and lanes of roots; and give freed slots out.

        A parent whose last child is over is closed, which may mean the same for its own parent.
        """
        while self._changes or self._freed:
            freed, self._freed = self._freed, set()
            for key in freed:
                self.unpark_next(key)
            changes, self._changes = self._changes, defaultdict(_Change)
            for job_id, change in changes.items():
                for job in self.jobs(TREE_ROW, id=job_id):      # none, if it has been removed
                    self._apply(job, change)

    def _apply(self, job: JobRow, change: _Change) -> None:
        open_, vtime, lane = job.open + change.open, job.vtime + change.charge, job.lane
        pace = job.tree_at, job.tree_gained, job.tree_seconds
        if change.progress:
            elapsed = job.duration + (max(0.0, self.now - job.since) if job.since else 0.0)
            gap = self.now - max(job.tree_at or 0.0, job.since or 0.0)      # a pause before a resume is none of it
            pace = self.now, *Rate(job.tree_gained or 0.0, job.tree_seconds or 0.0).after(change.progress, gap, elapsed)
        if change.relane:
            lane = self.value(BEST_LANE, root=job.id)
        if change.wake is not None:
            if job.lane is None:                          # it was idle
                vtime = entry_tag(vtime, self.value(CLOCK))
            lane = change.wake if lane is None else min(lane, change.wake)
        self.execute(SAVE_TREE, (
            open_, job.total + change.total, job.done + change.done, job.failed + change.failed,
            job.running + change.running, job.tree_progress + change.progress, *pace, lane, vtime, job.id))
        if open_ == 0 and job.returned and job.status in (RUNNING, STOPPED):
            self._move(job, FINISHED if job.returned == 1 else FAILED)

    # what is counted for the statistics

    def count_start(self, name: str, waited: float) -> None:
        """Count a job that has begun, for the first time, after so many seconds."""
        self._tallies[name].waiting.append(waited)

    def _tally_end(self, name: str, system: Any, status: str, seconds: float) -> None:
        if not system:
            tally = self._tallies[name]
            (tally.finished if status == FINISHED else tally.failed).append(seconds)

    def save_tallies(self) -> None:
        """Write what was counted for the statistics; the last thing in a transaction."""
        if self._tallies:
            minute = int(self.now // 60)
            self.executemany(SAVE_TALLY, [(minute, name, *tally.row()) for name, tally in self._tallies.items()])

    def count_created(self) -> None:
        """Bring the statistics up to date with what was created."""
        self.executemany(SAVE_TALLY, self.execute(UNCOUNTED).fetchall())
        self.execute(NOTE_COUNTED)

    # operations: a method for each returns whether it did something to a job; `top` is the one that it was asked for

    def operate(self, operation: str, job_id: int, by: str | None, author: tuple[int, int] | None = None) -> list[int]:
        """Apply an operation to a job and those descendants that allow it; return the ids it was applied to.

        KeyError: no such job; InvalidOperation: the job's status does not allow it.
        """
        if author is not None:
            self.check_author(author)
        self.apply()
        tree = self.jobs(SUBTREE, id=job_id)
        if not tree:
            raise KeyError(job_id)
        top = tree[0]
        self._check_operation(operation, top, tree[1:])
        if operation == "restart":
            self._forget_descendants(top, tree[1:])
            tree = [top]
        carry_out = getattr(self, f"_{operation}")
        moved = [job.id for job in tree if carry_out(job, top)]
        if moved:
            text = f"{operation.replace('_', ' ')}{f' by {by}' if by else ''}"
            self.log(job_id, logging.INFO, f"{text} ({len(moved):,} jobs of the tree)" if len(moved) > 1 else text)
        self.apply()
        return moved

    def _check_operation(self, operation: str, top: JobRow, below: list[JobRow]) -> None:
        """Raise InvalidOperation if a job does not allow an operation."""
        def refuse(why: str, allowed: Iterable[str] = ()) -> None:
            raise refusal(f"job {top.id}", top.status, operation, [name for name in allowed if name != operation], why)
        options, fits = kept_options(top.options), top.status in OPERATIONS[operation].moves
        active = next((job.id for job in below if job.status in ACTIVE), None)
        for_others = operation == "force_stop" and top.status == STOPPED and STOPPING in [job.status for job in below]
        why = objection(operation, options, bool(top.system))
        if why or not (fits or for_others):
            refuse(why if fits else "", allowed_operations(top.status, options, bool(top.system), active is not None))
        if operation in ("cancel", "restart") and active is not None:
            refuse(f"its descendant job {active} is still running; stop it first")
        if top.key and top.status in OVER and top.parent_id is None:
            holder = self.value(ROOT_WITH_KEY, key=top.key)
            if holder is not None:
                refuse(f"job {holder} has its key {top.key!r} now")

    def _stop(self, job: JobRow, top: JobRow) -> bool:
        if job.status in (STOPPING, STOPPED):
            self.execute(GO_ON, {"id": job.id, "goes_on": 0})
            return job is top
        if job.status in OVER or objection("stop", kept_options(job.options), bool(job.system)):
            return False
        self._move(job, OPERATIONS["stop"].follows(job.status, bool(job.returned)))
        return True

    def _resume(self, job: JobRow, top: JobRow) -> bool:
        if job.status == STOPPING and job is not top:
            self.execute(GO_ON, {"id": job.id, "goes_on": 1})       # as soon as it has stopped
            return True
        # Of a failed one, the failed ones too.
        if not (job.status == STOPPED or job.status == FAILED == top.status):
            return False
        if job.deaths:
            self.execute(ACQUIT, {"id": job.id})          # somebody has looked at it
        follows = OPERATIONS["resume"].follows(job.status, bool(job.returned))
        if job.returned and follows == PENDING:
            self.execute(REOPEN, {"id": job.id})
        self._move(job, follows)
        return True

    def _force_stop(self, job: JobRow, top: JobRow) -> bool:
        if job.status != STOPPING:
            return False
        ran = max(0.0, self.now - (job.since or self.now))
        self._keep_attempt(job, "force-stopped")
        self.execute(SUPERSEDE, {"id": job.id})
        self._end_attempt(job, STOPPED, ran, ran)
        return True

    def _cancel(self, job: JobRow, top: JobRow) -> bool:
        if job.status not in (PENDING, STOPPED):
            return False
        self._move(job, CANCELLED)
        return True

    def _restart(self, job: JobRow, top: JobRow) -> bool:
        self.execute(RESET, {"id": job.id})
        self._move(job._replace(progress=None), PENDING)
        return True

    def _set_low_priority(self, job: JobRow, top: JobRow, low: int = 1) -> bool:
        if job.status in OVER:
            return False
        if job.low_priority != low:
            self.execute(SET_LOW_PRIORITY, {"id": job.id, "low": low, "queue": None if job.queue is None else low})
            self._changes[job.root].relane = True
        return True

    def _remove_low_priority(self, job: JobRow, top: JobRow) -> bool:
        return self._set_low_priority(job, top, 0)

    def _forget_descendants(self, top: JobRow, descendants: list[JobRow]) -> None:
        """Delete a job's descendants and take them out of its ancestors' counts."""
        if descendants:
            self.remove([job.id for job in descendants])
            self._count(top.parent_id, total=-top.total, done=-top.done, failed=-top.failed, running=-top.running,
                        progress=-top.tree_progress)
            self._changes[top.root].relane = True

    def remove(self, ids: list[int]) -> None:
        """Delete jobs, with their logs and attempts. Statistics keep them, and their ids are not given out again."""
        self.count_created()
        self.over += ids                                # who waits for one of them learns that it is gone
        for sql in (DELETE_JOB, DELETE_LOGS, DELETE_ATTEMPTS):
            self.executemany(sql, [(job_id,) for job_id in ids])
        self.execute(NOTE_REMOVED, {"id": max(ids, default=0)})

    # by the clock, and after a crash

    def wake_due(self) -> bool:
        """Make the jobs ready whose time has come."""
        return self._make_ready(self.jobs(DUE, now=self.now))

    def unpark(self, key: str) -> bool:
        """Make the jobs ready that were parked with this key."""
        return self._make_ready(self.jobs(PARKED, key=key))

    def _make_ready(self, jobs: list[JobRow]) -> bool:
        for job in jobs:
            self.execute(MAKE_READY, {"id": job.id, "queue": job.low_priority})
            self._wake(job.root, job.low_priority)
        return bool(jobs)

    def owned(self, owner: int) -> list[JobRow]:
        """Return the jobs that a runner executes, the newest first: so children come before their parents."""
        return sorted(self.jobs(OWNED, owner=owner), reverse=True)

    def recover(self, owner: int) -> int:
        """Take back the jobs of a runner whose process died, and forget it; return how many there were."""
        jobs, seen = self.owned(owner), self.value(LAST_SEEN, id=owner)
        until = 0.0 if seen is None else min(self.now, seen + HEARTBEAT_SECONDS)
        for job in jobs:
            self.execute(COUNT_DEATH, {"id": job.id, "owner": owner})
        for job in jobs:
            self.take_back(job.id, "its process died", until, died=True)
        self.remove_runner(owner)
        return len(jobs)

    def remove_runner(self, runner: int) -> None:
        """Forget a runner, and what its code had registered."""
        self.execute(REMOVE_RUNNER, {"id": runner})
        self.execute(UNREGISTER, {"id": runner})

    def take_back(self, job_id: int, why: str, until: float, died: bool = False) -> None:
        """Supersede the attempt of a job, which ran until then: running becomes pending, stopping becomes stopped.

        If it may not run again (recover=False, or the third process died under it) it ends as if it had raised.
        """
        self.apply()
        job, error = self._job(job_id), None
        if not job.stops and not kept_options(job.options).get("recover", True):
            error = f"{why} while it ran, and it was declared recover=False"
        elif died and job.deaths >= DEATHS:
            error = f"its process died under it {job.deaths} times; resume gives it another try"
            self._acquit_others(job_id)
        status = status_after(job, RELEASED if error is None else RAISED)
        ran = max(0.0, until - (job.since or until))
        self._keep_attempt(job, "interrupted" if died else OUTCOMES[RELEASED])
        self.execute(SUPERSEDE, {"id": job_id})
        if error is not None:
            self.execute(RECORD, {"id": job_id, "returned": 2, "result": None, "positions": None,
                                  "error": dump_error("Interrupted", error, "")})
        self._end_attempt(job, status, ran, ran, phase=PHASES[RELEASED])
        self.log(job_id, logging.WARNING, f"{error or why}; {status} now")

    def _acquit_others(self, killer: int) -> None:
        """Do not hold the deaths for which a job has been failed against those that ran beside it."""
        for job in self.jobs(DIED_BESIDE, id=killer):
            self.execute(FORGET_DEATHS, {"id": job.id, "killer": killer})
            if job.parked == "suspect":
                self._make_ready([job])

    def log(self, job_id: int, level: int, message: str) -> None:
        """Add one line to a job's log."""
        self.execute(INSERT_LOG, (job_id, self.now, level, _text(message)))

    # what attempts report

    def save_state(self, attempt: Attempt, state: str | None, positions: str | None) -> bool:
        """Store an attempt's state; False when it has been superseded."""
        return self.execute(SAVE_STATE, {"id": attempt.id, "attempt": attempt.number, "state": state,
                                         "positions": positions}).rowcount == 1

    def save_progress(self, attempt: Attempt, report: Report) -> None:
        """Store an attempt's progress, and add it to its ancestors'."""
        job = self._executing(attempt)
        if job is not None:
            self.execute(SAVE_PROGRESS, {
                "id": job.id, "at": self.now - report.age, "progress": report.progress, "gained": report.rate.gained,
                "seconds": report.rate.seconds, "step": report.step, "message": report.message})
            self._count(job.parent_id, progress=(report.progress or 0.0) - (job.progress or 0.0))
            attempt.has_reported = True

    def add_charge(self, attempt: Attempt, more: int) -> None:
        """Charge an attempt that runs longer than estimated for what it has run by now."""
        if self.execute(ADD_CHARGE, {"id": attempt.id, "attempt": attempt.number, "more": more}).rowcount == 1:
            self._changes[attempt.root_id or attempt.id].charge += more
            attempt.has_reported = True
            self.after_commit.append(lambda: setattr(attempt, "charge", attempt.charge + more))


# ---- 9 Store --------------------------------------------------------------------------------------------------
#
# How a write gets into the file. A thread that wants to write puts a function of the transaction into a queue and tries
# to lead. One thread leads at a time: it opens a transaction, runs all that is in the queue, lets ride along what else
# waits (log lines, outcomes, claims), and commits. The others sleep until their writes are done, or they are woken to
# lead. So a caller alone pays no hand-over, and batches grow with the load. The lead is kept free for the thread that
# was woken for it: if the last leader took it for its next write, the other would have been woken in vain each time. If
# a batch fails, each of its writes is run again alone, so that only a bad one fails.
#
# Ctrl-C may hit the main thread anywhere, and a second one may hit it while it cleans up. Hence the lead is a lock that
# is released by a single call in C, a write stays in the queue until it is done, and sleepers look again every second.
#
# A fork waits at a gate until no thread is inside SQLite. Otherwise the child would inherit half a transaction, and
# locks that nobody will ever release.

JOB_ROW = "SELECT * FROM bgjobs_jobs WHERE id = :id"
STATUS_OF = "SELECT status FROM bgjobs_jobs WHERE id = :id"
CREATED_AT = "SELECT created_at FROM bgjobs_jobs WHERE id = :id"
OUTCOME_OF = "SELECT status, name, attempt, result, error FROM bgjobs_jobs WHERE id = :id"
MEANS = "SELECT name, seconds, tree_seconds FROM bgjobs_functions"
RUNNERS = "SELECT id, pid, host, workers, started_at, heartbeat_at, abandoned FROM bgjobs_runners ORDER BY id"
LOCK_FILES = "SELECT id, lock_file, heartbeat_at FROM bgjobs_runners"
# Ready, or executing, and submitted through this runner or below a job that was. `after` keeps the search short.
UNFINISHED = """SELECT id FROM bgjobs_jobs j WHERE {status} AND (submitter = :submitter OR
    (SELECT submitter FROM bgjobs_jobs r WHERE r.id = j.root_id) = :submitter) AND id >= :after ORDER BY id LIMIT 1"""
UNFINISHED_QUERIES = tuple(UNFINISHED.format(status=s) for s in (
    "status = 'running' AND status <> 'pending' AND owner IS NOT NULL",
    "status = 'stopping' AND status <> 'pending' AND owner IS NOT NULL",
    "status = 'pending' AND queue IS NOT NULL AND parent_id IS NOT NULL AND root_id IS NOT NULL",
    "status = 'pending' AND queue IS NOT NULL AND parent_id IS NULL AND lane IS NOT NULL"))
MY_PENDING = """SELECT id FROM bgjobs_jobs WHERE status = 'pending' AND (submitter = :submitter OR
    (SELECT submitter FROM bgjobs_jobs r WHERE r.id = bgjobs_jobs.root_id) = :submitter) AND id > :after
    ORDER BY id LIMIT 500"""

WAL_LIMIT = 64 * 1024 * 1024       # bytes
SQLITE_DONE = 101                  # sqlite3 has it by name since Python 3.11
LOCK_SECONDS = 30                  # how long a write waits while another program holds the file's lock
LOCK_STEP_SECONDS = 0.05           # SQLite waits so long at a time, so that going down can cut it short
_CONNECT: dict[str, Any] = {"timeout": 30, "isolation_level": None, "check_same_thread": False}


class _ForkGate:
    """Keeps a fork out of the moments when a thread of ours is inside SQLite."""

    def __init__(self) -> None:
        self._door = threading.RLock()                    # held during a fork; reentrant for finalizers that read
        self._inside: set[int] = set()                    # threads; one that Ctrl-C left here goes with its next use

    def __enter__(self) -> None:
        with self._door:
            self._inside.add(threading.get_ident())

    def __exit__(self, *exc_info: Any) -> None:
        self._inside.discard(threading.get_ident())

    def shut(self) -> None:
        """Let no other thread in, and wait until those inside are out, for a second at most."""
        self._door.acquire()
        deadline = time.monotonic() + 1.0
        while self._inside - {threading.get_ident()} and time.monotonic() < deadline:
            time.sleep(0.0002)

    def open(self) -> None:
        """Let threads in again."""
        self._door.release()

    def leave_to_parent(self) -> None:
        """In a forked child: only this thread is here."""
        self._door, self._inside = threading.RLock(), set()


_fork_gate = _ForkGate()


class _Write:
    """A write that waits for its transaction."""

    __slots__ = ("run", "value", "error", "done", "gone", "wake")

    def __init__(self, run: Callable[[Transaction], Any]) -> None:
        self.run = run
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = False                                 # committed, or failed
        self.gone = False                                 # Ctrl-C came: nobody waits for it
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()   # where its thread sleeps, if it does

    def fail(self, error: BaseException) -> None:
        self.error, self.done = error, True

    def sleep(self) -> None:
        """Sleep until somebody wakes this thread: it looks then whether the write is done, or it can lead."""
        with contextlib.suppress(queue.Empty):            # Ctrl-C came in the thread that should have woken it
            self.wake.get(timeout=1.0)


def _do_nothing(tx: Transaction) -> None:
    """Run a transaction for the sake of what rides along."""


class Store:
    """One SQLite file: a connection that writes, used by one thread at a time, and connections that read.

    Readers never wait for writers (WAL). The runner sets what rides along: `begin(transaction)` is called at the start
    of a transaction and `rider(transaction, kicked)` at its end, `announce(transaction)` after every commit, and
    `backlog()` when more is to ride along and nobody leads.
    """

    begin = rider = announce = backlog = staticmethod(lambda *arguments: None)

    def __init__(self, path: str | os.PathLike[str], durability: str, journal: str, clock: Callable[[], float]) -> None:
        if sqlite3.sqlite_version_info < (3, 31):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; bgjobs needs 3.31 or newer")
        self.path, self.clock = os.path.abspath(path), clock
        # EXTRA also syncs the folder that the rollback journal is deleted from: that is the commit there.
        self._synchronous = "NORMAL" if durability == "process" else "FULL" if journal == "wal" else "EXTRA"
        self._journal = journal
        # `_lead` is held by the thread that leads. It knows its owner, so that a finalizer which a garbage collection
        # runs in that thread does not wait for it.
        self._lead = threading.RLock()
        self._waiting: deque[_Write] = deque()            # writes, until they are done; only the leader removes them
        self._again = False                               # more is to ride along than the last transaction took
        self.leading = False                              # a hint: some thread leads
        self._heir: _Write | None = None                  # a hint: its thread was woken to lead next
        self.closed = self.forked = False
        self.cut_short = False                            # by Ctrl-C: perhaps nobody was told of what was committed
        self.close_by = math.inf                          # when a runner that goes down gives up what still runs
        self._lineages: dict[int, tuple[int, ...]] = {}
        self._readers: deque[sqlite3.Connection] = deque()
        self._version_lock = threading.Lock()             # guards _version_db
        self._version_db: sqlite3.Connection | None = None
        self._others_version = -1
        self._complaints: dict[str, float] = {}           # what was logged lately, and when
        self._check_path(os.fspath(path))
        try:
            self._writer = sqlite3.connect(self.path, **{**_CONNECT, "timeout": LOCK_STEP_SECONDS})
            try:
                self._check_json()
                self._prepare()
            except BaseException:
                self._writer.close()
                raise
        except sqlite3.Error as error:
            raise _store_error(f"use {self.path} as a job file", error)
        self._wal = os.path.realpath(self.path) + "-wal"  # SQLite puts it beside the file that a link led to
        self._identity, self._checked_at = self._identity_now(), 0.0

    # writing

    @library_code
    def write(self, run: Callable[[Transaction], Any]) -> Any:
        """Call `run(transaction)` in the next transaction and return its value, after the commit.

        `run` may be called again when the transaction had to be rolled back, so it has no effect but on the
        transaction. What it raises is raised here, and nothing of it is stored.
        """
        if self._lead._is_owned():                        # type: ignore[attr-defined]
            raise RuntimeError("bgjobs was called from inside a write of the same thread: by a signal handler, or a "
                               "finalizer; have it set a flag or start a thread instead")
        write = _Write(run)
        try:
            self._waiting.append(write)
            if self._is_led:                              # that thread takes the write along, or wakes this one
                write.sleep()
            while not write.done:
                if not self._lead_once(kicked=False) and not write.done:
                    write.sleep()
        except BaseException:
            write.gone = self.cut_short = True
            raise
        if write.error is not None:
            raise write.error
        return write.value

    @library_code
    def kick(self) -> None:
        """Lead transactions until nothing more is to ride along. If another thread leads, that one sees to it."""
        self._again = True
        if not self._lead._is_owned():                    # type: ignore[attr-defined]
            while self._again and self._lead_once(kicked=True) and not self._waiting:
                pass

    def _lead_once(self, kicked: bool) -> bool:
        """Run what waits in one transaction. False: another thread leads, or what rode along could not be recorded."""
        worked = False
        try:
            if not self._lead.acquire(blocking=False):
                return False
            self.leading, self._again, self._heir = True, False, None
            worked = self._commit([write for write in tuple(self._waiting) if not (write.done or write.gone)], kicked)
            self._dismiss()
            self.leading = False
        except BaseException:
            self.leading, self.cut_short = False, True
            raise
        finally:
            try:
                self._lead.release()
            except RuntimeError:                          # another thread leads
                pass
            else:
                self._pass_on(kicked and worked)
        return worked

    @property
    def _is_led(self) -> bool:
        """Whether a thread leads, or is about to."""
        heir = self._heir
        return self.leading or heir is not None and not (heir.done or heir.gone)

    def _dismiss(self) -> None:
        """Take the writes that are done out of the queue, and wake their threads."""
        while self._waiting and (self._waiting[0].done or self._waiting[0].gone):
            self._waiting.popleft().wake.put(None)

    def _pass_on(self, goes_on: bool) -> None:
        """After leading: wake the first thread that waits, to lead; or say that there is more to ride along."""
        heirs = tuple(self._waiting)[:1]
        if heirs:
            self._heir = heirs[0]
            heirs[0].wake.put(None)
        elif self._again and not goes_on:
            self.backlog()

    def _commit(self, batch: list[_Write], kicked: bool) -> bool:
        """Run a batch in one transaction; if that fails, each write again alone. False: what rides along could not be
        recorded. Whoever leads next tries again; if nobody else does, that is the service thread."""
        try:
            self._transact(batch, kicked)
            return True
        except StoreError as error:                       # the file's trouble: alone, each would only wait for it again
            trouble: BaseException = error
            for write in batch:
                own_copy = copy.copy(error)
                own_copy.__cause__ = error.__cause__
                write.fail(own_copy)
        except (Exception, JobStopped) as error:          # JobStopped: a superseded attempt submits
            trouble = self._explained(error)
            for write in batch:
                try:
                    self._transact([write], None)
                except (Exception, JobStopped) as own:
                    write.fail(self._explained(own))
                self._dismiss()
            if batch:
                self._again = True
                return True
        self._again = not self.closed
        if not batch and not self.closed:
            self.complain(f"cannot record outcomes: {trouble}; trying again")
            if self.close_by == math.inf:
                time.sleep(0.05)
        return False

    def _transact(self, batch: list[_Write], kicked: bool | None) -> None:
        """Run a batch in one transaction, then what is to follow its commit. kicked is None: nothing rides along."""
        self._check_open()
        if time.monotonic() - self._checked_at > 0.005:
            self.check_file()
        with _fork_gate:
            tx = self._run_in_transaction(batch, kicked)
        callbacks: list[Callable[[], Any]] = [*tx.after_commit, lambda: self.announce(tx)]
        for callback in callbacks:
            try:
                callback()
            except Exception as error:                    # it is committed: nothing may make it look failed
                _say(logging.ERROR, f"bgjobs on {self.path}: trouble after a commit\n{_traceback_of(error)}")

    def _check_open(self) -> None:
        if self.forked:
            raise StoreError(f"the runner on {self.path} belongs to the process that this one was forked from; "
                             "call its start() here, or make a new Runner")
        if self.closed:
            raise StoreError(f"the runner on {self.path} is shut down")

    def _run_in_transaction(self, batch: list[_Write], kicked: bool | None) -> Transaction:
        db = self._writer
        if db.in_transaction:                             # an exception hit the last leader at an unlucky moment
            db.execute("ROLLBACK")
        self._await_lock("BEGIN IMMEDIATE")
        committing = False
        try:
            tx = Transaction(db, self._lineages, self.clock())
            if kicked is not None:
                self.begin(tx)
            for write in batch:
                write.value = write.run(tx)
            if kicked is not None:
                self.rider(tx, kicked)
            tx.apply()
            tx.save_tallies()
            committing = True
            self._await_lock("COMMIT")
            for write in batch:
                write.done = True
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            elif committing and not isinstance(error, Exception):     # Ctrl-C after the COMMIT
                for write in batch:
                    write.done = True
            self._lineages.clear()
            raise
        return tx

    def _await_lock(self, statement: str) -> None:
        """Execute a BEGIN IMMEDIATE or COMMIT. StoreError: another program holds the lock, for too long."""
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._writer.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                if time.monotonic() > min(give_up, self.close_by + 0.4):
                    if self.close_by < math.inf:          # going down: what is still written is tried once
                        self._writer.execute("PRAGMA busy_timeout = 0")
                    raise self._explained(error)

    def _explained(self, error: BaseException) -> BaseException:
        return _store_error(f"write to {self.path}", error) if isinstance(error, sqlite3.Error) else error

    def complain(self, text: str) -> None:
        """Log an error, the same one every ten seconds at most."""
        now = time.monotonic()
        if now - self._complaints.get(text, -math.inf) > 10:
            self._complaints = {text: now} if len(self._complaints) > 20 else {**self._complaints, text: now}
            _say(logging.ERROR, text)

    # writing in a transaction of the app's own

    def write_through(self, connection: sqlite3.Connection, run: Callable[[Transaction], Any]) -> Any:
        """Run a write in the transaction that is open on a connection of the app's to this file; the app commits it, or
        rolls it back. If none is open, one is begun, and committed here if the connection commits each statement by
        itself. ValueError: the connection is to another file."""
        self._check_open()
        db, is_within = _Through(connection), connection.in_transaction
        text_factory, connection.text_factory = connection.text_factory, str
        try:
            autocommit = getattr(connection, "autocommit", -1)    # since Python 3.12; -1 leaves it to isolation_level
            commits = autocommit is True or autocommit == -1 and connection.isolation_level is None
            if is_within:
                begin, end, undo = "SAVEPOINT bgjobs", ["RELEASE bgjobs"], ["ROLLBACK TO bgjobs", "RELEASE bgjobs"]
            else:
                begin, end, undo = "BEGIN IMMEDIATE", ["COMMIT"] if commits else [], ["ROLLBACK"]
            file = next(row[2] for row in db.execute("PRAGMA database_list").fetchall() if row[1] == "main")
            if not file or not os.path.samefile(file, self.path):
                raise ValueError(f"the connection is to {file or 'a database in memory'}; "
                                 f"jobs in {self.path} can be part of a transaction of that file alone")
            db.execute(begin)
            try:
                db.execute(TAKE_LOCK)                     # SQLite waits for it only before anything has been read
                tx = Transaction(db, {}, self.clock())
                value = run(tx)
                tx.apply()
                tx.save_tallies()
                for statement in end:
                    db.execute(statement)
                return value
            except BaseException:
                for statement in undo if connection.in_transaction else ():
                    db.execute(statement)
                raise
        except sqlite3.Error as error:
            if "locked" in str(error) and is_within:
                raise StoreError(f"cannot write to {self.path} in this transaction: {error}; submit before it reads, "
                                 "or begin it with BEGIN IMMEDIATE: one that has read may not write once another "
                                 "connection has written") from error
            raise self._explained(error)
        finally:
            connection.text_factory = text_factory

    # reading

    def connect(self) -> sqlite3.Connection:
        """Return a new connection for reading, never a new file. The caller closes it."""
        db: sqlite3.Connection = sqlite3.connect(_uri(self.path) + "?mode=rw", uri=True, **_CONNECT)
        db.row_factory = sqlite3.Row
        return db

    @library_code
    def read(self, sql: str, parameters: dict[str, Any] | None = None) -> list[sqlite3.Row]:
        """Return all rows of a query, on a connection of its own. ValueError: a parameter that SQLite cannot hold."""
        with _fork_gate:
            db = None
            try:
                try:
                    db = self._readers.pop()
                except IndexError:
                    db = self.connect()
                rows = db.execute(sql, parameters or {}).fetchall()
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                if db is not None:
                    db.close()
                if isinstance(error, sqlite3.Error):
                    raise _store_error(f"read {self.path}", error)
                name, value = next(
                    (name, value) for name, value in (parameters or {}).items() if isinstance(value, int)
                    and value.bit_length() > 63 or isinstance(value, str) and _text(value, len(value)) != value)
                raise ValueError(f"{name} is {_short(value)}, which SQLite cannot hold") from error
            if len(self._readers) < 8:
                self._readers.append(db)
            else:
                db.close()
            if self.closed:                               # perhaps since this read began
                self._close_readers()
            return rows

    def _close_readers(self) -> None:
        with contextlib.suppress(IndexError):             # another thread does so, too
            while True:
                self._readers.pop().close()

    def row(self, job_id: int) -> sqlite3.Row:
        """Return a job's row. KeyError: there is none."""
        rows = self.read(JOB_ROW, {"id": job_id})
        if not rows:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        return rows[0]

    def version(self) -> int:
        """Return a number that differs when another connection has committed since: any write, of any process."""
        with self._version_lock, _fork_gate:
            try:
                if self._version_db is None:
                    self._version_db = self.connect()
                return int(self._version_db.execute("PRAGMA data_version").fetchone()[0])
            except sqlite3.Error as error:
                raise _store_error(f"read {self.path}", error)

    def changed_by_others(self) -> bool:
        """Tell whether another connection has written since the last call: another process, or another runner."""
        version: int = self.write(lambda tx: tx.value("PRAGMA data_version"))
        changed, self._others_version = version != self._others_version, version
        return changed

    # opening

    def _check_path(self, path: str) -> None:
        folder = os.path.dirname(self.path)
        if path == "" or path.startswith(":memory:"):
            raise ValueError(f"path must name a file, got {path!r}; jobs are kept on disk")
        if os.path.isdir(self.path):
            raise StoreError(f"cannot use {self.path} as a job file: it is a folder; give the path of a file in it")
        if not os.path.isdir(folder):
            raise StoreError(f"cannot use {self.path} as a job file: the folder {folder} does not exist; "
                             "create it first")

    def _check_json(self) -> None:
        try:
            self._writer.execute("SELECT json_array()")
        except sqlite3.OperationalError:                  # an option of the build before 3.38
            raise StoreError("this SQLite was built without its JSON functions; bgjobs needs them") from None

    def _prepare(self) -> None:
        """Bring the schema up to date and switch to WAL. Where several processes do so at once, try again."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._migrate()
                mode = self._writer.execute(f"PRAGMA journal_mode = {self._journal}").fetchone()[0]
                if mode != self._journal:
                    raise StoreError(f"cannot use {self.path} as a job file: the journal mode stays {mode!r} instead "
                                     f"of {self._journal!r}; put the file on a local disk, and have all processes use "
                                     "the same mode")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.01, 0.05))
        self._writer.execute(f"PRAGMA synchronous = {self._synchronous}")
        self._writer.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
        self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
        self._writer.execute("SELECT version FROM bgjobs_schema").fetchone()      # the first read makes the WAL

    def _migrate(self) -> None:
        """Bring the tables in the file to this version. What is cut short, by a kill even, leaves the file as it
        was."""
        db = self._writer
        if db.in_transaction:
            db.execute("ROLLBACK")
        if self._schema_version() == SCHEMA_VERSION:
            return
        db.execute("PRAGMA foreign_keys = OFF")           # these two do nothing within a transaction
        db.execute("PRAGMA legacy_alter_table = ON")
        db.execute("BEGIN IMMEDIATE")
        try:
            version = self._schema_version()
            if version < SCHEMA_VERSION:                  # no other process was quicker
                rebuild(db, version)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _schema_version(self) -> int:
        """Return the version of the schema that is in the file, 0: none. StoreError: it is a newer one, or has been
        damaged."""
        execute = self._writer.execute
        found = {name for name, in execute("SELECT name FROM sqlite_master WHERE type = 'table'")}.intersection(TABLES)
        if not found:
            return 0
        rows = execute("SELECT version FROM bgjobs_schema").fetchall() if "bgjobs_schema" in found else []
        version: Any = rows[0][0] if len(rows) == 1 else None
        if not (isinstance(version, int) and version > 0):
            wrong = f"its schema version is {_short(version)}"
        elif version > SCHEMA_VERSION:
            raise StoreError(f"{self.path} has schema version {version}, and this bgjobs {__version__} knows up to "
                             f"{SCHEMA_VERSION}; copy a newer bgjobs.py into the app")
        else:
            needed = TABLES if version == SCHEMA_VERSION else ALL_VERSIONS_HAVE
            lacking = [name for name in needed if name not in found]
            if lacking:
                wrong = f"it lacks {', '.join(lacking)}"
            else:
                wrong = "" if execute(CLOCK).fetchone() else "bgjobs_clock is empty"
        if wrong:
            raise StoreError(f"cannot use {self.path} as a job file: somebody has changed its bgjobs_ tables: {wrong}; "
                             "restore it from a backup, or drop these tables to start anew")
        return int(version)

    # looking after the file

    def _identity_now(self) -> list[tuple[int, int]]:
        """Return device and inode of the file and of its WAL, which is there as long as we are connected."""
        found = []
        for path in (self.path, self._wal) if self._journal == "wal" else (self.path,):
            try:
                stat = os.stat(path)
            except OSError:
                raise StoreError(f"{path} was deleted or moved while it was in use; put it back, or start anew with "
                                 "close() and a new runner") from None
            if path == self.path and stat.st_size == 0:   # first: SQLite deletes the WAL of an empty file
                raise StoreError(f"{path} was emptied while it was in use; close() this runner, put a backup there, "
                                 "without a -wal beside it, and make a new runner")
            found.append((stat.st_dev, stat.st_ino))
        return found

    def check_file(self) -> None:
        """Raise StoreError unless the path still names the file that is open: SQLite would write on into nothing."""
        self._checked_at = -math.inf                      # should it fail, the next write looks again at once
        found = self._identity_now()
        if found != self._identity:
            what = self.path + "-wal" if found[0] == self._identity[0] else self.path
            raise StoreError(f"{what} was replaced by another file while it was in use; nothing is written any more: "
                             "close() this runner, put the right file there, without a -wal beside it, and make a new "
                             "runner")
        self._checked_at = time.monotonic()

    def shorten_wal(self) -> None:
        """Truncate the WAL if it has grown large; complain if a reader does not let that happen."""
        try:
            size = os.path.getsize(self._wal)
        except OSError:
            return
        if size > WAL_LIMIT:
            with contextlib.closing(self.connect()) as db:
                db.execute("PRAGMA busy_timeout = 100")
                busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if busy and size > 4 * WAL_LIMIT:
                self.complain(f"the WAL of {self.path} has {size >> 20} MB and grows: another program keeps an old "
                              "read transaction open on it; end that")

    def backup(self, path: str) -> None:
        """Copy the file as it is at one moment, while it is in use."""
        self.check_file()
        try:
            open(path, "xb").close()
        except FileExistsError:
            raise ValueError(f"{path} exists; give the path of a new file") from None
        except OSError as error:
            raise StoreError(f"cannot back {self.path} up to {path}: {error.strerror}; give a path in a folder that "
                             "exists and is writable") from error

        def give_up(status: int, remaining: int, total: int) -> None:
            if status != SQLITE_DONE and time.monotonic() > deadline:     # SQLite itself would wait without end
                raise sqlite3.OperationalError("database is locked")
        deadline = time.monotonic() + _CONNECT["timeout"]
        try:
            with contextlib.closing(self.connect()) as db, contextlib.closing(sqlite3.connect(path)) as copy:
                db.backup(copy, progress=give_up)
                copy.execute("DELETE FROM bgjobs_runners")       # so that what the copy shows as running is taken back
                copy.execute("DELETE FROM bgjobs_registered")
                copy.commit()
        except BaseException as error:
            for rest in (path, path + "-journal"):
                with contextlib.suppress(OSError):
                    os.remove(rest)
            if isinstance(error, sqlite3.Error):
                raise _store_error(f"back {self.path} up to {path}", error)
            raise

    def close(self, last: Callable[[Transaction], None] = _do_nothing) -> None:
        """Run a last write and close the connections; writes after it raise StoreError. Waits for whoever leads."""
        def run(tx: Transaction) -> None:
            last(tx)
            tx.after_commit.append(lambda: setattr(self, "closed", True))
        if not self.closed:
            try:
                self.write(run)
            except StoreError:                            # the disk is full, the file is gone, ...
                self.closed = True
            self._writer.close()
            with self._version_lock:
                if self._version_db is not None:
                    self._version_db.close()
            self._close_readers()

    def leave_to_parent(self) -> None:
        """In a forked child: leave the parent's connections alone. They are never used here, nor closed."""
        for connection in (self._writer, self._version_db, *self._readers):
            _never_free(connection)
        self._readers, self._version_db, self._waiting = deque(), None, deque()
        self._lead, self._version_lock = threading.RLock(), threading.Lock()
        self.leading, self._heir, self.closed, self.forked = False, None, True, True


_REMEDIES = {
    "locked": "another program holds its lock: end it, or wait",
    "readonly": "make the file and its folder writable",
    "full": "make room on the disk",
    "not a database": "give the path of a new file, or of a job file",
    "malformed": "restore it from a backup",
    "disk I/O": "make room on the disk; if there is some, look into the system's log for trouble of the disk",
    "same thread": "give the connection of this thread",
    "unable to open": "check that the folder exists and is writable"}


def _store_error(doing: str, error: sqlite3.Error) -> StoreError:
    """Return an error of SQLite as ours: what could not be done, and what a person can do about it."""
    remedies = (remedy for sign, remedy in _REMEDIES.items() if sign in str(error))
    explained = StoreError(f"cannot {doing}: {error}; {next(remedies, 'see the error of SQLite above')}")
    explained.__cause__ = error
    return explained


class _Through:
    """What a Transaction needs of an app's connection, whatever factories that has."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return sqlite3.Cursor(self._connection).execute(sql, parameters)

    def executemany(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:
        return sqlite3.Cursor(self._connection).executemany(sql, rows)


def is_shared(connection: sqlite3.Connection) -> bool:
    """Tell whether other threads may use a connection."""
    cursors = []

    def use() -> None:
        with contextlib.suppress(sqlite3.Error):
            cursors.append(connection.cursor())
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join()
    return bool(cursors)


_inherited: list[Any] = []         # where _never_free has no other means


def _never_free(connection: sqlite3.Connection | None) -> None:
    """Keep a connection of the parent's from ever being closed in a forked child, even at the interpreter's exit."""
    try:
        import ctypes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    except (ImportError, AttributeError):                 # not CPython
        _inherited.append(connection)


def _uri(path: str) -> str:
    """Return a file: URI as SQLite reads it."""
    path = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return "file:///" + path.replace("\\", "/") if os.name == "nt" else "file://" + path


# ---- 10 What people see ---------------------------------------------------------------------------------------
#
# Lists and counts, a job's `info`, its attempts, its log. A list takes milliseconds with a million
# jobs, too, and without an index for every filter, which each submit would pay for. If no index has
# the jobs in order, the search goes from the newest job down, SEARCH_LIMIT jobs at a time: a list
# then says where to go on, a count that it is "at least".

COUNT_LIMIT = 10_001       # where counting for people ends
SEARCH_LIMIT = 60_000      # jobs that one search looks at; a sixth of that if it looks into texts
FEW = 10_000               # if a status has fewer jobs than that, all of them are looked at
MAX_ID = (1 << 63) - 1


# Filters

class Reader(NamedTuple):
    """Reads a parameter: a Python value, or a text of a URL. `read` raises an error if the value
    is not what it must be."""

    read: Callable[[Any], Any]
    must_be: str


def read_value(name: str, value: Any, reader: Reader) -> Any:
    """Return what a reader makes of the value of a parameter. Raises ValueError if it is bad."""
    try:
        return reader.read(value)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{name} must be {reader.must_be}, got {_short(value)}") from None


def _natural(value: Any) -> int:
    number = int(value)
    if not 0 <= number <= MAX_ID:
        raise ValueError
    return number


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


_TRUTHS = {"true": True, "1": True, "false": False, "0": False}
A_TRUTH = Reader(lambda value: _TRUTHS[str(value).lower()], "true or false")
A_TEXT = Reader(str.__str__, "a text")
A_TIME = Reader(_finite, "Unix seconds")
A_NUMBER = Reader(_natural, "a whole number")
A_LIMIT = Reader(lambda value: MAX_ID - 1 if value is None else _natural(value),
                 "a whole number, 0 or more, or None")
_STATUSES = Reader(
    lambda value: sorted({value} if isinstance(value, str) else {*value}, key=STATUSES.index),
    f"one of {', '.join(STATUSES)}")
_A_PARENT = Reader(
    lambda value: None if value in (None, "none") else _natural(getattr(value, "id", value)),
    "the id of a job, or none")

_CHILDREN = "parent_id = :parent AND parent_id IS NOT NULL"
# With both, bgjobs_begun has the jobs of a status in the order of their ids.
_ROOTS, _NO_SYSTEM = _INDEXED = ["parent_id IS NULL", "system = 0"]
FILTERS: dict[str, tuple[Reader, str]] = {                # each with its condition
    "status": (_STATUSES, ""),                            # the condition depends on the index
    "name": (A_TEXT, "name = :name"),
    "run_by": (A_TEXT, "run_by = :run_by"),
    "errors": (A_TRUTH, "(own_errors + failed > 0) = :errors"),
    "low_priority": (A_TRUTH, "low_priority = :low_priority"),
    "parent": (_A_PARENT, _CHILDREN),                     # _ROOTS if it is None
    "system": (A_TRUTH, _NO_SYSTEM),                      # no condition if it is true
    "created_from": (A_TIME, "created_at >= :created_from"),
    "created_to": (A_TIME, "created_at <= :created_to"),
    # The slowest condition is the last. Arguments are searched for :json, as their JSON is ASCII.
    "q": (Reader(_text, "a text"), """(id = :q OR instr(lower(name || ' ' || ifnull(label, '')
        || ' ' || ifnull(message, '') || ' ' || ifnull(run_by, '')), lower(:q))
        OR instr(ifnull(options, ''), '"secret"') = 0
        AND instr(lower(ifnull(args, '') || ' ' || ifnull(kwargs, '')), lower(:json)))"""),
}


def conditions(filters: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the SQL conditions of all filters but the status, and all their values by name.

    status: one, or a list of them. name, run_by: the whole text. errors, low_priority: True or
    False. q: an id, or a part of the name, label, arguments, message or run_by. parent: an id or a
    Job, None for roots only. system: True adds the system jobs. created_from, created_to: Unix
    seconds. A filter that is None, but for parent, lets every job pass.
    Raises TypeError if there is no such filter, ValueError if a value is bad.
    """
    for name in filters:
        if name not in FILTERS:
            raise TypeError(f"unknown filter {name!r}; the filters are {', '.join(FILTERS)}")
    values: dict[str, Any] = {"status": STATUSES, "system": False}
    values |= {name: read_value(name, value, FILTERS[name][0]) for name, value in filters.items()
               if value is not None or name == "parent"}
    where = [condition for name, (_, condition) in FILTERS.items() if condition and name in values]
    if values["system"]:
        where.remove(_NO_SYSTEM)
    if "parent" in values and values["parent"] is None:
        where[where.index(_CHILDREN)] = _ROOTS
    if "q" in values:
        values["json"] = _dump(values["q"])[1:-1]
    return where, values


# Lists and counts

def find_jobs(store: Store, filters: dict[str, Any], limit: int | None, before: int | None = None,
              most: int | None = None) -> tuple[list[int], int | None]:
    """Return the ids of jobs that pass the filters, the highest first, and the id below which to
    go on, or None.

    before: only ids below that. limit: how many at most. most: how many jobs to look at; then
    there may be fewer than `limit` among them, even none, and more further down.
    """
    where, values = conditions(filters)
    limit = read_value("limit", limit, A_LIMIT)
    values |= {"before": MAX_ID if before is None else before, "limit": limit + 1}
    statuses, bottom = values["status"], None
    if _are_at_hand(store, statuses, where):
        queries = [f"({_of_status(status, where)}) WHERE id < :before" for status in statuses]
    else:
        others = ", ".join(repr(status) for status in STATUSES if status not in statuses)
        newest, bottom = _newest(store, [f"status NOT IN ({others})", *where], values, most)
        queries = [newest]
    ids = [row[0] for query in queries for row in store.read(
        f"SELECT id FROM {query} ORDER BY id DESC LIMIT :limit", values)]
    ids.sort(reverse=True)
    return (ids, bottom) if len(ids) <= limit else (ids[:limit], ids[limit - 1])


def count_jobs(store: Store, filters: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Return how many jobs of each status pass the other filters, at most COUNT_LIMIT, and the
    statuses that may have more such jobs, since the search ended before."""
    where, values = conditions(filters)
    counts, at_least, bottom = dict.fromkeys(STATUSES, 0), [], None
    an_index_counts = set(where) <= set(_INDEXED)         # however many jobs there are
    if not an_index_counts:
        newest, bottom = _newest(store, where, values, SEARCH_LIMIT)
        rows = store.read(f"SELECT status, count(*) FROM {newest} GROUP BY status", values)
        counts.update(map(tuple, rows))
    for status in STATUSES:
        counts_again = bottom is not None and _has_few(store, status, [], FEW // 10)
        if an_index_counts or counts_again:
            counts[status] = _count(store, _of_status(status, where), values, COUNT_LIMIT)
        elif bottom is not None and counts[status] < COUNT_LIMIT:
            at_least.append(status)
        counts[status] = min(counts[status], COUNT_LIMIT)
    return counts, at_least


# The indexes that have the pending jobs, each job once. They are named, else SQLite walks through
# all children.
_PENDING_JOBS = {"ready_roots": "lane IS NOT NULL AND parent_id IS NULL AND queue IS NOT NULL",
                 "ready_children": "parent_id IS NOT NULL AND queue IS NOT NULL",
                 "due": "run_at IS NOT NULL AND queue IS NULL AND parked IS NULL",
                 "parked": "parked IS NOT NULL"}


def _of_status(status: str, where: list[str]) -> str:
    """Return the query for the ids of the jobs of a status that fulfil conditions, by the indexes
    of the status."""
    if status != PENDING:
        # The second condition lets SQLite use bgjobs_begun.
        where = [f"status = '{status}' AND status <> 'pending'", *where]
        return f"SELECT id FROM bgjobs_jobs WHERE {' AND '.join(where)}"
    indexes, where = dict(_PENDING_JOBS), ["status = 'pending'", *where]
    if _ROOTS in where:
        del indexes["ready_children"]
        where.append("root_id IS NULL")                   # bgjobs_parked has that, too
    return " UNION ALL ".join(
        f"SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_{index} WHERE {' AND '.join([jobs, *where])}"
        for index, jobs in indexes.items())


def _count(store: Store, query: str, values: dict[str, Any], limit: int) -> int:
    rows = store.read(f"SELECT count(*) FROM (SELECT * FROM ({query}) LIMIT {limit})", values)
    return int(rows[0][0])


def _has_few(store: Store, status: str, where: list[str], limit: int) -> bool:
    return _count(store, _of_status(status, where), {}, limit) < limit


def _are_at_hand(store: Store, statuses: list[str], where: list[str]) -> bool:
    """Tell whether indexes have the jobs of these statuses in order, or so few that all can be
    sorted."""
    in_order = where == _INDEXED
    needs_a_search = len(statuses) == len(STATUSES) and not in_order
    if needs_a_search or _CHILDREN in where:
        return False
    indexed = [condition for condition in where if condition in _INDEXED]
    to_sort = [status for status in statuses if status == PENDING or not in_order]
    return all(_has_few(store, status, indexed, FEW) for status in to_sort)


def _newest(store: Store, where: list[str], values: dict[str, Any], most: int | None
            ) -> tuple[str, int | None]:
    """Return FROM what to search the `most` newest jobs, and the id below which to go on, or None.

    values: its :before limits the search, and :lowest is set.
    """
    source = f"WHERE {_CHILDREN}" if _CHILDREN in where else "NOT INDEXED WHERE 1"
    jobs, bottom = f"bgjobs_jobs {source} AND id < :before AND id >= :lowest", None
    values.setdefault("before", MAX_ID)
    values["lowest"] = 0
    if most is not None:
        # Ids go up with time, give or take an hour if the clock was set.
        if "created_from" in values:
            values["lowest"] = _first_id_since(store, values["created_from"] - 3_600)
        if "created_to" in values:
            first_later = _first_id_since(store, values["created_to"] + 3_600)
            values["before"] = min(values["before"], first_later)
        last = (most // 6 if "q" in values else most) - 1
        for row in store.read(f"SELECT id FROM {jobs} ORDER BY id DESC LIMIT 1 OFFSET {last}",
                              values):
            bottom = values["lowest"] = row[0]
    return " AND ".join([jobs, *where]), bottom


CREATED_SINCE_ID = "SELECT created_at FROM bgjobs_jobs WHERE id >= :id ORDER BY id LIMIT 1"


def _first_id_since(store: Store, created_at: float) -> int:
    """Return the first id that was given out at that time or later."""
    def created(job_id: int) -> float:
        rows = store.read(CREATED_SINCE_ID, {"id": job_id})
        return rows[0][0] if rows else math.inf
    ids = range(store.read(HIGHEST_ID)[0][0] + 1)
    return bisect.bisect_left(ids, created_at, key=created)


# A job's info

MASK = "\u2022\u2022\u2022"
JOB_ROWS = """SELECT * FROM bgjobs_jobs
    WHERE id IN (SELECT value FROM json_each(:ids)) ORDER BY id DESC"""
COLUMNS_SEEN = ("id", "name", "label", "status", "created_at", "run_at", "started_at",
                "finished_at", "run_by", "parent_id", "attempt", "message")


def describe_jobs(store: Store, ids: list[int], now: float, usual: Callable[[str], float | None]
                  ) -> list[dict[str, Any]]:
    """Return the `info` of the jobs that are still there, the highest id first."""
    return [describe(row, now, usual) for row in store.read(JOB_ROWS, {"ids": json.dumps(ids)})]


def describe(row: sqlite3.Row, now: float, usual: Callable[[str], float | None]) -> dict[str, Any]:
    """Return the `info` of a job: the dict of the JSON interface. Times are Unix seconds, durations
    seconds.

    usual: returns how many seconds jobs of a name usually take.
    """
    options, error = kept_options(row["options"]), _parsed(row["error"])
    due = max(row["created_at"], row["run_at"] or 0.0)
    waiting = row["waited"]
    if row["started_at"] is None:
        waited_until = now if row["status"] == PENDING else row["finished_at"] or due
        waiting = max(0.0, waited_until - due)
    duration = row["duration"] + (max(0.0, now - row["since"]) if row["since"] else 0.0)
    is_system = bool(row["system"])
    return {
        **{name: row[name] for name in COLUMNS_SEEN},
        "phase": phase_of(row), "waiting": waiting, "duration": duration,
        "errors": row["own_errors"] + row["failed"],
        "low_priority": bool(row["low_priority"]), "system": is_system,
        "progress": progress_of(row), "eta": eta_of(row, now, duration, usual),
        "children": {name: row[name] for name in ("total", "done", "failed", "running")},
        "root_id": row["root_id"] or row["id"],
        **shown_arguments(row, options),
        "state": _parsed(row["state"]), "result": _parsed(row["result"]),
        "error": error and (error["traceback"] or f"{error['type']}: {error['text']}"),
        "operations": allowed_operations(row["status"], options, is_system, row["running"] > 0)}


def _parsed(text: str | None) -> Any:
    """Return the JSON value of a column."""
    return json.loads(text) if text else None


def phase_of(row: sqlite3.Row) -> str:
    """Return what refines the status for people, or ""."""
    if row["status"] == RUNNING and row["returned"]:
        return "waiting for children"
    if row["status"] != PENDING:
        return ""
    if row["phase"]:
        return str(row["phase"])
    if row["queue"] is None and row["parked"] is None:
        return "scheduled"
    return "waiting for low load" if row["low_priority"] else ""


def progress_of(row: sqlite3.Row) -> float | None:
    """Return 0 to 1, or None: the mean over the descendants, and the job itself if it reports progress of its own."""
    if row["status"] == FINISHED:
        return 1.0
    own: float | None = row["progress"]
    if not row["total"]:
        return own
    parts, done = row["total"], row["tree_progress"]
    if own is not None:
        parts, done = parts + 1, done + (1.0 if row["returned"] else own)
    return min(1.0, max(0.0, float(done / parts)))


def eta_of(row: sqlite3.Row, now: float, duration: float, usual: Callable[[str], float | None]
           ) -> float | None:
    """Return the seconds left: from the tree's rate and the attempt's own, else from earlier jobs of the same name."""
    if row["status"] not in ACTIVE:
        return None
    estimates = []
    if row["total"]:
        rate = Rate(row["tree_gained"] or 0.0, row["tree_seconds"] or 0.0)
        step = max(1, row["running"]) / rate.per_second if rate.per_second else 0.0
        age = now - max(row["tree_at"] or 0.0, row["since"] or 0.0)
        estimates.append(time_left(row["total"] - row["tree_progress"], rate, step, age, duration - age))
    if row["gained"] and not row["returned"]:
        rate, age = Rate(row["gained"], row["seconds"]), now - row["progress_at"]
        estimates.append(time_left(1.0 - row["progress"], rate, row["step"], age, duration - age))
    known = [estimate for estimate in estimates if estimate is not None and math.isfinite(estimate)]
    if known:
        return max(known)
    mean = usual(row["name"])
    return mean - duration if mean is not None and duration < mean else None      # longer than usual: nobody knows


MEAN_OF = "SELECT ifnull(tree_seconds, seconds) FROM bgjobs_functions WHERE name = :name"


def usual_seconds(store: Store, costs: Costs, name: str) -> float | None:
    """Return how many seconds jobs of this name have taken lately, here or in another process, or None."""
    if name in costs.changed:
        return costs.trees.get(name, costs.means.get(name))
    rows = store.read(MEAN_OF, {"name": name})
    return rows[0][0] if rows else None


def shown_arguments(row: sqlite3.Row, options: dict[str, Any]) -> dict[str, Any]:
    """Return args and kwargs as JSON values, with the secret ones masked."""
    args, kwargs = _parsed(row["args"]) or [], _parsed(row["kwargs"]) or {}
    secret = {*options.get("secret", ())}                 # names, and positions
    for name in secret & {*kwargs}:
        kwargs[name] = MASK
    for position in secret & {*range(len(args))}:
        args[position] = MASK
    return {"args": args, "kwargs": kwargs}


# A job's attempts and its log

def attempts_of(store: Store, job_id: int) -> dict[str, Any]:
    """Return a job's attempts, oldest first, and the saved positions of its each() loops, outermost
    first.

    {"attempts": [{"attempt", "started_at", "ended_at", "outcome", "error"}], "positions": [int]}.
    The last attempt is in the job's own row, unless something followed it.
    Raises KeyError if there is no such job.
    """
    row = store.row(job_id)
    attempts = [dict(each) for each in store.read(ATTEMPTS, {"id": job_id})]
    if row["attempt"] not in [0, *(each["attempt"] for each in attempts)]:
        attempts.append({
            "attempt": row["attempt"], "started_at": row["since"] or row["started_at"],
            "ended_at": row["finished_at"],
            "outcome": row["status"] if row["status"] in OVER else None, "error": None})
    return {"attempts": attempts, "positions": _parsed(row["positions"]) or []}


LOG_LINES = """SELECT id, job_id, at, level, message FROM bgjobs_logs
    WHERE job_id {which} AND id > :after AND level >= :level AND at >= :since AND at <= :until
    ORDER BY id {order} LIMIT :limit"""
WHOLE_TREE = """IN (WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL
    SELECT j.id FROM tree JOIN bgjobs_jobs j ON j.parent_id = tree.id AND j.parent_id IS NOT NULL)
    SELECT id FROM tree)"""


def read_logs(store: Store, job_id: int, level: str | int | None, text: str | None,
              since: float | None, until: float | None, after: int, limit: int | None, tree: bool,
              regex: str | None = None) -> list[dict[str, Any]]:
    """Return log lines of a job, or of its tree, oldest first: the newest `limit` lines, or those
    that follow the line `after`.

    The filters are those of Job.logs. Raises ValueError if one is bad.
    """
    limit = read_value("limit", limit, A_LIMIT)
    needle = read_value("text", text or "", A_TEXT).lower()
    found_in = _search_function(regex)
    sql = LOG_LINES.format(which=WHOLE_TREE if tree else "= :id", order="ASC" if after else "DESC")
    rows = store.read(sql, {
        "id": job_id, "after": after or 0, "level": read_value("level", level, _A_LEVEL),
        "since": since or 0.0, "until": math.inf if until is None else until,
        "limit": MAX_ID if text or regex else limit})
    passing = [row for row in rows
               if needle in row["message"].lower() and found_in(row["message"])]
    lines = [{**dict(row), "level": logging.getLevelName(row["level"])} for row in passing[:limit]]
    return lines if after else lines[::-1]


def _search_function(regex: str | None) -> Callable[[str], Any]:
    """Return a function that finds a regular expression in a text. Raises ValueError if it is
    none."""
    import re
    try:
        return re.compile(regex or "").search
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"regex {_short(regex)} is no regular expression: {error}") from None


def _level_number(level: str | int | None) -> int:
    if not isinstance(level, str):
        return level or 0
    return int(level if level.isdecimal() else logging.getLevelName(level.upper()))


_A_LEVEL = Reader(_level_number, "DEBUG, INFO, WARNING, ERROR, CRITICAL or a number")


# ---- 11 Worker pool -------------------------------------------------------------------------------------------

ABANDONED_A_PLACE = 2      # threads of superseded attempts that live on, for each place; then no job is claimed
HAND_SECONDS = 0.001       # the work that is worth waking another thread for
LINGER_SECONDS = 0.001     # how long a worker without a job stays up to claim what comes meanwhile


class Pool:
    """`size` places in which attempts execute, and the threads for them, made when needed and reused. An attempt that
    executes in another process takes a place, too, but no thread: it is handed to `depart`, and who brings its outcome
    calls `end`.

    An attempt comes here *claimed*, and is *placed* as soon as there is a place for it. One that waits for another job
    is *away*, and its place is given to others; when it goes on it is *returning*, until it is placed again. So waiting
    never deadlocks, and no more than `size` attempts execute. Places go to the returning and the claimed in turn:
    neither starve. A force stop makes an attempt *abandoned*: it has no place any more, and its thread ends with it.

    Low priority never takes the last of several places. When all that executes has become low priority meanwhile it
    goes on, and one place more is given out.
    """

    def __init__(self, size: int, execute: Callable[[Attempt], None], settle: Callable[[Attempt], bool],
                 claim: Callable[[], None], depart: Callable[[Any], None]) -> None:
        self.size = size
        self._low_size = max(1, size - 1)                 # places that low priority may take
        self._execute = execute
        self._settle, self._claim = settle, claim         # settle returns whether to claim at once
        self._depart = depart                             # called under the lock
        # `_lock` guards everything below; no user code and no SQL runs under it. An attempt is in one of these five.
        self._lock = threading.Lock()
        self._claimed: deque[Attempt] = deque()
        self._placed: tuple[set[Attempt], set[Attempt]] = set(), set()      # of normal and of low priority
        self._away: set[Attempt] = set()
        self._returning: dict[Attempt, Any] = {}          # in order, with what is set when it has a place
        self._abandoned: set[Attempt] = set()
        self._returning_next = True                       # it is their turn
        self._handed: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()    # for the next idle thread; None: end
        self._needed = 0                                  # threads that execute an attempt, or are to
        self._threads: set[threading.Thread] = set()
        self.lingers = False                              # one of them does not sleep yet: it claims in a moment
        self.forked = False

    @property
    def abandoned(self) -> int:
        """How many superseded attempts still execute."""
        return len(self._abandoned)

    @property
    def is_clogged(self) -> bool:
        """Whether so many superseded attempts still execute that no more jobs should be claimed."""
        return self.abandoned >= ABANDONED_A_PLACE * self.size

    @property
    def is_empty(self) -> bool:
        """Whether no claimed attempt waits for a place."""
        return not self._claimed

    def has(self, attempt: Attempt) -> bool:
        """Return whether an attempt waits here for its turn, or executes and has not been abandoned."""
        with self._lock:
            return attempt in self._claimed or self._executes(attempt)

    def is_placed(self, attempt: Attempt) -> bool:
        """Return whether an attempt has a place."""
        return attempt in self._placed[attempt.low_priority]

    def _executes(self, attempt: Attempt) -> bool:
        return self.is_placed(attempt) or attempt in self._away or attempt in self._returning

    # places

    def room(self) -> tuple[int, int, int, list[Attempt]]:
        """Return how many more jobs there is a place for, how many of low priority, how many places are about to get
        free (those whose attempts are still short ones), and the claimed attempts that wait."""
        long_since = time.monotonic() - 2 * AHEAD_SECONDS
        with self._lock:
            waiting = list(self._claimed)
            if self.is_clogged:
                return 0, 0, 0, waiting
            coming = [attempt.low_priority for attempt in (*self._returning, *waiting)]
            long = sum(0 < attempt.begun < long_since for attempt in itertools.chain(*self._placed))
            return *self._left(len(coming) - sum(coming), sum(coming)), self.size - long, waiting

    def _left(self, normal: int = 0, low: int = 0) -> tuple[int, int]:
        """Return how many places are left, and for how many of low priority, once so many more attempts have theirs."""
        normal, low = normal + len(self._placed[0]), low + len(self._placed[1])
        return self.size - normal - min(low, self._low_size), self._low_size - low

    def put(self, attempts: Iterable[Attempt] = (), work: float = math.inf) -> None:
        """Have claimed attempts executed, in this order; they are known to be `work` seconds of work.

        To wake a thread costs more than a tiny job: only so many are woken as the work is worth. The service thread
        calls it without attempts, and gives the rest of the free places out.
        """
        with self._lock:
            self._claimed.extend(attempts)
            self._give(work / HAND_SECONDS + 1)

    def _give(self, hands: float = 1, hand: Callable[[Attempt], None] | None = None) -> None:
        """Give free places out, and wake at most so many threads. `hand` takes an attempt that needs one; by default it
        is for an idle thread, or a new one. Called under the lock, after whatever may have freed a place."""
        while hands >= 1 and (attempt := self._next()) is not None:
            returns = attempt in self._returning
            # In this order: wherever Ctrl-C comes, no place stays taken for what nobody executes.
            if returns:
                attempt.waited += time.monotonic() - attempt.left_at
                self._returning[attempt].set()
                del self._returning[attempt]
            else:
                self._claimed.remove(attempt)
                (self._depart if attempt.engine is not None else hand or self._hand)(attempt)
            self._placed[attempt.low_priority].add(attempt)
            self._returning_next = not returns
            hands -= attempt.engine is None
        while len(self._threads) < self._needed and self._start_thread():
            pass

    def _next(self) -> Attempt | None:
        """Return the attempt whose turn it is, or None: there is no place for any."""
        left, low_left = self._left()
        waiting = (self._returning, self._claimed) if self._returning_next else (self._claimed, self._returning)
        candidates: Iterable[Attempt] = itertools.chain(*waiting) if left > 0 else ()
        for attempt in candidates:
            if low_left > 0 or not attempt.low_priority:
                return attempt
        return None

    # threads

    def _hand(self, attempt: Attempt) -> None:
        self._needed += 1
        self._handed.put(attempt)

    def _start_thread(self) -> bool:
        thread = threading.Thread(target=self._work, name="bgjobs-worker", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:                     # there are too many; the service thread's put() tries again
            _say(logging.ERROR, f"bgjobs: {error}")
            return False
        self._threads.add(thread)
        return True

    def _work(self) -> None:
        """What a worker does: execute an attempt, have its outcome recorded, go on with the next one in its place."""
        attempt = self._handed.get()
        while attempt is not None:
            self._execute(attempt)
            if self.forked:                               # by the function; this is the child: the parent has the job
                return
            lead = self._settle(attempt)
            following: list[Attempt] = []
            with self._lock:
                retires = attempt in self._abandoned      # nobody knows what the exception has left in this thread
                lead |= self._take_out(attempt)
                self._give(hand=None if lead or retires else following.append)
                if not following:
                    self._needed -= 1
                if retires:
                    self._threads.discard(threading.current_thread())
            if lead:
                self._claim()
            if retires:
                return
            attempt = following.pop() if following else None      # an idle worker keeps nothing alive
            if attempt is None:
                if not lead and not self.lingers:
                    self._linger()
                attempt = self._handed.get()
        self._handed.put(None)                            # for the next thread

    def _linger(self) -> None:
        """Claim in a moment: where jobs keep coming and nobody waits for them, that spares a claim and a wake-up for
        each."""
        self.lingers = True
        time.sleep(LINGER_SECONDS)
        self.lingers = False
        self._claim()

    # ends

    def end(self, attempt: Attempt) -> None:
        """Have the outcome of an attempt that executed elsewhere recorded, and give its place to the next."""
        lead = self._settle(attempt)
        with self._lock:
            lead |= self._take_out(attempt)
            self._give()
        if lead:
            self._claim()

    def _take_out(self, attempt: Attempt) -> bool:
        """Forget an attempt that executed; return whether that lets jobs be claimed again. Called under the lock."""
        unclogs = attempt in self._abandoned and self.is_clogged
        self._placed[attempt.low_priority].discard(attempt)
        self._away.discard(attempt)
        self._abandoned.discard(attempt)
        if attempt in self._returning:                    # who waits for its place goes on without
            self._returning.pop(attempt).set()
        return unclogs

    def abandon(self, attempt: Attempt) -> None:
        """Take the place of a superseded attempt away. Its thread lives on as long as it does; others take its part."""
        with self._lock:
            if not self._executes(attempt):
                return
            self._take_out(attempt)
            self._abandoned.add(attempt)
            self._give()
            clogged = self.is_clogged
        if clogged:
            _say(logging.ERROR, f"{self.abandoned} superseded attempts still run in threads of this process: no more "
                 "jobs are claimed until some of them end")
        self._claim()

    def set_low_priority(self, attempt: Attempt, low: int) -> None:
        """Have an attempt count as one of low priority, or not."""
        with self._lock:
            if self.is_placed(attempt):
                self._placed[low].add(attempt)
            attempt.low_priority = low
            self._placed[not low].discard(attempt)
            self._give()                                  # one that returns may take the last place now

    # waiting for other jobs

    @contextlib.contextmanager
    def away(self, attempt: Attempt) -> Iterator[None]:
        """Give the place of a waiting attempt away, and wait for one at the end. Several of its threads may wait."""
        self.leave(attempt)
        try:
            yield
        finally:
            place = _Event()
            if self.ask_back(attempt, place):
                while not place.wait(1.0):                # Ctrl-C may have come between the setting and the waking
                    pass

    def leave(self, attempt: Attempt) -> None:
        """Give the place of an attempt away that begins to wait."""
        with self._lock:
            attempt.waits += 1
            leaves = self.is_placed(attempt)
            if leaves:
                attempt.left_at = time.monotonic()
                self._placed[attempt.low_priority].remove(attempt)
                self._away.add(attempt)
                self._give()
        if leaves:
            self._claim()

    def ask_back(self, attempt: Attempt, place: Any) -> bool:
        """Have `place.set()` called as soon as there is a place for an attempt that has waited. False: it needs none.
        Returns at once."""
        with self._lock:
            attempt.waits -= 1
            returns = attempt.waits == 0 and attempt in self._away
            if returns:
                self._away.remove(attempt)
                self._returning[attempt] = place
                self._give()
        return returns

    # giving claims back, and going down

    def take_back_stuck(self) -> list[Attempt]:
        """Take out the claimed attempts if they have waited for too long: those before them turned out long."""
        return self.take_back(5 * AHEAD_SECONDS)

    def take_back(self, waited: float = 0.0) -> list[Attempt]:
        """Take out the claimed attempts that have no place yet, if the first one has waited for so many seconds."""
        with self._lock:
            if not self._claimed or time.monotonic() - self._claimed[0].claimed_at < waited:
                return []
            attempts = list(self._claimed)
            self._claimed.clear()
        return attempts

    def close(self, seconds: float) -> None:
        """Let the threads end as they become idle; wait for that for some seconds."""
        deadline = time.monotonic() + seconds
        self._handed.put(None)
        for thread in self._threads - {threading.current_thread()}:
            thread.join(max(0.0, deadline - time.monotonic()))


# ---- 12 Inside a job ------------------------------------------------------------------------------------------

FLUSH_SECONDS = 0.25       # how often log lines and progress are written when no other write takes them along

_UNSET: Any = object()
_current: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("bgjobs_current", default=None)


class JobContext:
    """What `current_job()` returns: the job that this code runs in. Outside of one, all of it works and does nothing.

    id, name, run_by: the job's. attempt: the number of this attempt, from 1. state: what the last checkpoint saved, or
    None; a copy of it. stop_requested: whether the next checkpoint raises JobStopped. Outside of a job these are None,
    0 and False. Any thread that has the job's context (`asyncio.to_thread` passes it on) may use all of this, but
    `each` is for one at a time.
    """

    id: int | None = None
    name: str | None = None
    run_by: str | None = None
    attempt: int = 0
    state: Any = None
    stop_requested: bool = False

    @property
    def log(self) -> logging.Logger:
        """A logger of the standard library; inside a job its records go to the job's log, too, within a second."""
        return _log

    def checkpoint(self, state: Any = _UNSET) -> None:
        """Stop here if that was asked for; with `state`, save it first, for the next attempt's `current_job().state`.

        state: any value that arguments may have. With it, the call blocks until the commit. Without it, it costs next
        to nothing: call it in every turn of a loop. Raises JobStopped: stop now; TypeError: the state cannot be stored.
        """

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Report that `done` of `total` units are done, with a line for people. Shown within a second.

        Returns at once; never a checkpoint. total=None: nobody knows; then no share is shown.
        """

    def each(self, iterable: Iterable[_Item], total: int | None = None) -> Iterator[_Item]:
        """Yield the items, with a checkpoint before each of them and at the end, and report the progress.

        A resumed attempt goes on after the last item whose turn was completed: the iterable must then give the same
        items in the same order. `total`: how many there are, where the iterable has no length. Raises JobStopped.
        """
        yield from iterable

    def sleep(self, seconds: float) -> None:
        """Sleep, and wake up at once when the job is to stop. Raises JobStopped."""
        time.sleep(seconds)


_outside = JobContext()


class Attempt(JobContext):
    """One execution of a job's function by this process."""

    id: int
    name: str
    low_priority: int
    charge: int                                           # microseconds, of its claim

    # Defaults that most attempts never change stand here: an attempt is made for each job.
    thread: int | None = None                             # while it executes
    engine: Engine | None = None                          # that executes it elsewhere
    begun = left_at = 0.0                                 # monotonic: when it began; when it gave its place away
    ran = worked = waited = 0.0                           # seconds: in all; without waiting for others; waiting
    waits = 0                                             # of its threads, at present
    untrimmed_lines = 0                                   # in the file since the job's log was trimmed last
    connections: dict[sqlite3.Connection, int] = {}       # the app's, by which it has submitted: the last id

    outcome, reason = UNSPENT, HALTED                     # how the function ended; how it ends when it stops
    result: str | None = None
    error: str | None = None
    exception: BaseException | None = None
    unsaved_progress: Report | None = None
    # The file knows of its progress, or of a charge beyond its claim's.
    has_reported = False

    _attention = False                                    # a checkpoint has more to do than to go on
    _operation: threading.Event | None = None             # it lets this pass first
    _saved_at = 0.0
    _loops = 0                                            # the number of the next loop of each()
    _progress: tuple[float, float | None, str | None, float] | None = None    # done, total, message, monotonic: newest
    _pace: Pace | None = None
    _logger: logging.Logger | None = None

    def __init__(self, runner: Runner, claim: tuple[Any, ...]) -> None:
        (self.id, self.parent_id, self.root_id, self.name, number, self.args, self.kwargs, self._state, self._positions,
         options, self.run_by, self.low_priority, total, self.saved_progress, _, _, self.max_running, self.deaths,
         self.due, self.ran_before, self.system, self.charge) = claim
        self.number = self.attempt = number + 1
        self.runner = runner
        self.options = kept_options(options)
        self.has_children = total > 0
        self.claimed_at = time.monotonic()
        self.ticket = Ticket()
        self._loop_positions: list[int] = []              # of the loops of each(): how many turns are completed
        self._turns: list[tuple[float, float | None]] = []    # of the loops under way, outermost first: done, total
        self._waits_on: list[threading.Condition] = []    # of its threads that wait; a stop request wakes them

    @property
    def has_place(self) -> bool:
        """Whether it has a place in the pool: not while it waits for another job."""
        return self.runner._pool.is_placed(self)

    @property
    def correction(self) -> int:
        """The microseconds by which the claim charged too little."""
        return int(self.worked * 1e6) - self.charge

    @property
    def took_too_long(self) -> TimeoutError:
        """What a timeout is recorded as."""
        return TimeoutError(f"attempt {self.number} took longer than its timeout of {self.options['timeout']:,g} s")

    @property
    def superseded(self) -> JobStopped:
        """What is raised in an attempt that the store refuses."""
        return JobStopped(f"attempt {self.number} of job {self.id} has been superseded")

    def fail(self, error: BaseException) -> None:
        """Make this error the attempt's outcome. Never raises, whatever the error's own methods do."""
        self.outcome, self.exception, self.result = RAISED, error, None
        self.error = dump_error(type(error).__qualname__, _text(error), _traceback_of(error))

    # stopping

    def request_stop(self, reason: str = HALTED, force: bool = False) -> None:
        """Have JobStopped raised at the next checkpoint; `reason` is the outcome then. From any thread."""
        if not force and not self.options.get("stoppable", True):
            return
        self.reason = reason
        self.stop_requested = self._attention = True
        for condition in list(self._waits_on):
            with condition:
                condition.notify_all()

    def let_pass(self, operation: threading.Event) -> None:
        """Have the next checkpoint wait for an operation on its way: a loop that only computes would hold it up by the
        interpreter lock, 5 ms for each of its statements."""
        self._operation = operation
        self._attention = True

    def supersede(self) -> None:
        """Have JobStopped raised wherever the function is. From any thread, once the store refuses this attempt."""
        self.ticket.use()
        self.request_stop(force=True)                     # now: who wakes up looks at the ticket

    def raise_if_stopped(self) -> None:
        """Be a checkpoint. Raises JobStopped."""
        if self.stop_requested:
            raise JobStopped(f"job {self.id} was asked to stop")

    def checkpoint(self, state: Any = _UNSET) -> None:
        """Save the state, if one is given; then see to what was asked for. Mostly that is nothing, and costs a look."""
        if state is not _UNSET:
            self._save(encode(state, f"the state of job {self.id}"))
        if self._attention:
            self._attend()

    @library_code
    def _attend(self) -> None:
        operation, self._operation = self._operation, None
        self._attention = False            # first: a stop that comes from here on sets it again
        if operation is not None:
            operation.wait(1.0)
        if self.stop_requested:
            self._attention = True
            self.raise_if_stopped()

    @library_code
    def sleep(self, seconds: float) -> None:
        """Wait for a stop request, for some seconds. The worker's place is kept."""
        self._wait(_Condition(), lambda: self.stop_requested, seconds)
        self.raise_if_stopped()

    def wait_for(self, condition: threading.Condition, over: Callable[[], bool], timeout: float | None) -> None:
        """Wait until `over()`, which is asked when the condition is notified or a stop requested. The worker's place is
        given away meanwhile."""
        self.runner._wait_in_job(self, functools.partial(self._wait, condition, over), timeout)

    def _wait(self, condition: threading.Condition, over: Callable[[], bool], timeout: float | None) -> bool:
        self._waits_on.append(condition)
        try:
            with condition:
                return condition.wait_for(over, timeout)
        finally:
            self._waits_on.remove(condition)

    # state

    @property
    def state(self) -> Any:
        """A copy: only checkpoint(state=...) changes what is saved."""
        return decode(self._state)

    def _save(self, state: str | None) -> None:
        positions = self.unsaved_positions()
        if not self.runner._store.write(lambda tx: tx.save_state(self, state, positions)):
            self.request_stop()
            raise self.superseded
        if state is not None:
            self._state = state
        self._saved_at = time.monotonic()

    def unsaved_positions(self) -> str | None:
        """Return how far each loop of each() is, as JSON, or None."""
        return json.dumps(self._loop_positions) if self._loop_positions else None

    # A function may have several loops of each(), one after the other or one inside another's turns. They are numbered
    # as they begin, and a list has the completed turns of each. With a turn, the loops inside it are done with: they
    # leave the list, and those of the next turn get their numbers again. So a resumed attempt, whose loops begin in the
    # same order, finds its own.

    def each(self, iterable: Iterable[_Item], total: int | None = None) -> Iterator[_Item]:
        """Yield the items from the saved position on. It is saved ten times a second at most, and with the outcome."""
        positions = self._loop_positions = self._loop_positions or json.loads(self._positions or "[]")
        loop, depth = self._loops, len(self._turns)
        self._loops += 1
        if loop == len(positions):
            positions.append(0)
        done = positions[loop]
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        items = None if total is None else float(total)
        try:
            for item in itertools.islice(iterable, done, None):
                self._report_turn(depth, done, items)
                if self._attention:
                    self._attend()
                yield item
                done += 1
                positions[loop:] = [done]
                self._loops = loop + 1
                if time.monotonic() - self._saved_at > 0.1:
                    self._save(None)
            self._report_turn(depth, done, items)
        finally:
            del self._turns[depth:]
        self.raise_if_stopped()

    def _report_turn(self, depth: int, done: float, total: float | None) -> None:
        """Report the progress of a loop of each(); one inside another's turn refines the outer one's."""
        outer = self._turns[:depth]
        self._turns[depth:] = [(done, total)]
        for outer_done, outer_total in reversed(outer):
            done, total = outer_done + (done / total if total else 0.0), outer_total
        self._note_progress(done, total, None)

    # progress and log

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Note how far the function is; the service thread writes the newest report."""
        if message is not None and type(message) is not str:
            message = library_code(_text)(message)        # here, not in the service thread, which is everybody's
        self._note_progress(float(done), None if total is None else float(total), message)

    def _note_progress(self, done: float, total: float | None, message: str | None) -> None:
        now = time.monotonic()
        self._progress = (done, total, message, now)
        if self._pace is None and math.isfinite(done):
            self._pace = Pace()
            (self._pace.start if self.saved_progress is None else self._pace.resume)(done, now - self.begun)

    def report_to_save(self) -> Report | None:
        """Return what there is to tell of the progress, if that changed since the last call."""
        newest, self._progress = self._progress, None     # two threads may ask: one gets it
        if newest is None:
            return None
        done, total, message, at = newest
        if message is None and not total:
            message = f"{done:,.12g} done"
        message = None if message is None else _text(message, 500)
        pace = self._pace
        if not total or total < 0 or not math.isfinite(total) or not math.isfinite(done) or pace is None:
            return Report(None, message=message)
        pace.report(done, at - self.begun)
        rate = Rate(pace.rate.gained / total, pace.rate.seconds) if done <= total else Rate()
        age = time.monotonic() - self.begun - pace.at
        return Report(min(1.0, max(0.0, done / total)), rate, pace.step + FLUSH_SECONDS, age, message)

    @property
    @library_code
    def log(self) -> logging.Logger:
        """The job's own logger, made when it is first asked for."""
        if self._logger is None:
            self._logger = _JobLogger(self)
        return self._logger


class _JobLogger(logging.Logger):
    """A job's own logger: its records go to the job's log, and to the app's handlers as those of "bgjobs.job" would."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__("bgjobs.job", logging.DEBUG)
        self.parent = self._app_logger = logging.getLogger("bgjobs.job")
        self._attempt = attempt

    isEnabledFor = library_code(logging.Logger.isEnabledFor)

    @library_code
    def callHandlers(self, record: logging.LogRecord) -> None:
        self._attempt.runner._keep_log_line(self._attempt, record)
        if self._app_logger.isEnabledFor(record.levelno):
            self._app_logger.callHandlers(record)


def _capture_log_records() -> None:
    """Have the records that any logger emits inside a job land in the job's log, too.

    A record factory, since a handler on the root logger would disable logging.basicConfig and the last-resort handler.
    """
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "_bgjobs", False):
        return

    def make_and_keep(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        attempt = _current.get()
        if attempt is not None and record.name not in ("bgjobs.job", None):      # None: makeLogRecord emits nothing
            attempt.runner._keep_log_line(attempt, record)
        return record
    make_and_keep._bgjobs = True                          # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_and_keep)


def current_job() -> JobContext:
    """Return the context of the job that this code runs in; outside of one, a context that does nothing."""
    return _current.get() or _outside


# ---- 13 The handle --------------------------------------------------------------------------------------------

class _Waiters(list[Any]):
    """A Future's list of waiters. `wait` and `as_completed` append theirs before they wait on its event; inside a job
    that wait gives the worker's place away."""

    def append(self, waiter: Any) -> None:
        attempt = _current.get()
        if attempt is not None and type(waiter.event) is threading.Event:
            waiter.event = _PlaceGivingEvent(attempt)
        super().append(waiter)


class _PlaceGivingEvent(_Event):
    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self._attempt = attempt

    @library_code
    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set. A stop waits for the next checkpoint; a force stop raises JobStopped at once."""
        attempt = self._attempt
        if not self.is_set():
            attempt.wait_for(self._cond, lambda: self.is_set() or attempt.ticket.void, timeout)
            if attempt.ticket.void:
                raise attempt.superseded
        return self.is_set()

    @library_code
    def clear(self) -> None:
        super().clear()


def _live(name: str, what: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
    return property(lambda self: read(self.info()[name]), doc=what + " Read from the store at each access.")


def _typed(value: Any) -> Any:
    """Return a JSON value of `info()` with dates and the like as they were given."""
    return decode(json.dumps(value))


class Job(Future[_T]):
    """The handle of a job: a concurrent.futures.Future whose attributes are read from the store when asked.

    `stopped` is not done: `result()` waits on. The Future part completes once; `restart`, and `resume` of a failed
    job, return a new handle, while attributes stay true on both. `await job` works, too. Any thread may use a handle.

    Attributes are read without waiting for writers; KeyError: the job has been removed. Operations block until their
    commit, not until the job has followed. They take `by=`, who asked, for the job's log. Raises InvalidOperation: the
    job's status does not allow it, the text says what it does; KeyError; StoreError: the file cannot be written.
    """

    _state = "PENDING"
    _result: Any = None
    _exception: BaseException | None = None
    _lazy_condition: threading.Condition | None = None    # made when somebody first waits: see _condition

    def __init__(self, runner: Runner, job_id: int, created_at: float | None = None) -> None:
        self._runner, self.id = runner, job_id
        self._created_at = created_at                     # while its transaction may be rolled back; None: it is stored
        # With the four above, this is what Future.__init__ sets.
        self._waiters = _Waiters()
        self._done_callbacks: list[Callable[[Job[_T]], Any]] = []

    def _stored(self) -> int:
        """Return the id while it is this job's: a transaction that is rolled back leaves its ids to others.
        KeyError."""
        if self._created_at is not None:
            rows = self._runner._store.read(CREATED_AT, {"id": self.id})
            if rows and rows[0][0] != self._created_at:
                raise KeyError(f"the transaction that submitted job {self.id} was rolled back")
            if rows:
                self._created_at = None
        return self.id

    name: str = _live("name", "The stable name of the function.")
    label: str | None = _live("label", "A title for people, or None.")
    status: str = _live("status", "One of the seven statuses.")
    phase: str = _live("phase", "What refines the status for people, or \"\".")
    created_at: float = _live("created_at", "Unix seconds.")
    started_at: float | None = _live("started_at", "Unix seconds of the first attempt since creation or restart, or "
                                     "None.")
    finished_at: float | None = _live("finished_at", "Unix seconds, or None.")
    waiting: float = _live("waiting", "Seconds from creation, or its due time, to the start, or until now.")
    duration: float = _live("duration", "Seconds that its attempts have been running, all together.")
    errors: int = _live("errors", "How many of its own attempts and of its descendants have failed.")
    low_priority: bool = _live("low_priority", "Whether it runs in periods of low load only.")
    run_by: str | None = _live("run_by", "Who asked for it, or None.")
    progress: float | None = _live("progress", "0 to 1, or None.")
    eta: float | None = _live("eta", "Seconds left, or None.")
    children: dict[str, int] = _live("children", '{"total", "done", "failed", "running"}, counts over all descendants.')
    parent_id: int | None = _live("parent_id", "The parent's id, or None.")
    root_id: int = _live("root_id", "The id of its tree's root.")
    attempt: int = _live("attempt", "The number of the newest attempt, 0 before the first.")
    args: list[Any] = _live("args", "A list of its positional arguments, secret ones masked.", _typed)
    kwargs: dict[str, Any] = _live("kwargs", "A dict of its keyword arguments, secret ones masked.", _typed)
    state: Any = _live("state", "What its last checkpoint saved, or None.", _typed)
    error: str | None = _live("error", "The traceback of the newest failure, a text, or None.")
    operations: list[str] = _live("operations", "A list of the operations that its status allows now.")

    def info(self) -> dict[str, Any]:
        """Return all attributes as one dict of JSON values: the JSON interface's."""
        return self._runner._info(self._stored())

    def logs(self, *, level: str | int | None = None, text: str | None = None, regex: str | None = None,
             since: float | None = None, until: float | None = None, after: int = 0, limit: int | None = None,
             tree: bool = False) -> list[dict[str, Any]]:
        """Return the log lines {"id", "job_id", "at", "level", "message"}, oldest first.

        level: the least, as a name or number. text: contained, in any case. regex: found in it, as `re.search` does.
        since, until: Unix seconds. after: a line's id. limit: how many at most; without `after` the newest ones. tree:
        those of all descendants, too. ValueError: a bad value.
        """
        return self._runner._logs(self._stored(), level, text, since, until, after, limit, tree, regex)

    # operations

    def stop(self, *, by: str | None = None) -> Job[_T]:
        """Stop the job and its descendants at their next checkpoint, or now where none executes. Returns before it."""
        return self._runner._operate("stop", self._stored(), by, self)

    def resume(self, *, by: str | None = None) -> Job[_T]:
        """Have a stopped or failed job go on from its saved state. Returns a new handle if this one was completed."""
        return self._runner._operate("resume", self._stored(), by, self)

    def force_stop(self, *, by: str | None = None) -> Job[_T]:
        """Make a stopping job stopped now; what the abandoned attempt still does changes nothing in the store."""
        return self._runner._operate("force_stop", self._stored(), by, self)

    def restart(self, *, by: str | None = None) -> Job[_T]:
        """Run a finished or failed job again from scratch, its former descendants removed. Returns a new handle."""
        return self._runner._operate("restart", self._stored(), by, self)

    def set_low_priority(self, low_priority: bool = True, *, by: str | None = None) -> Job[_T]:
        """Have the job and its descendants run in periods of low load only, or no longer so."""
        operation = "set_low_priority" if low_priority else "remove_low_priority"
        return self._runner._operate(operation, self._stored(), by, self)

    def cancel(self, *, by: str | None = None) -> bool:
        """Discard a pending or stopped job for good. Returns whether it is cancelled; never raises InvalidOperation."""
        if self._state == "PENDING":
            with contextlib.suppress(InvalidOperation, StoreError):          # StoreError: the runner is shut down
                self._runner._operate("cancel", self._stored(), by, self)
                return True
        return self.cancelled()

    # the Future part

    @property
    def _condition(self) -> threading.Condition:          # type: ignore[override]
        """Whoever touches the Future's condition wants to know of the end: from then on the runner watches for it."""
        if self._lazy_condition is None:
            self._stored()
            self._runner._watch(self)
        return self._made_condition()

    def _made_condition(self) -> threading.Condition:
        return self._lazy_condition or vars(self).setdefault("_lazy_condition", _HandleCondition())      # atomic

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
        if self._state == CANCELLED_AND_NOTIFIED:
            return CANCELLED
        if self._state == FUTURE_FINISHED:
            return FINISHED if self._exception is None else FAILED
        status = self._runner._status(self._stored())
        if status in OVER:
            self._complete()
        return status

    @library_code
    def result(self, timeout: float | None = None) -> _T:
        """Return what the function returned, once the job and all its descendants are over.

        timeout: seconds, None waits on. In a job this is a checkpoint, and the worker's place is given away meanwhile.
        Raises what the function raised (JobFailed, where another process ran it), TimeoutError, CancelledError; inside
        a job also JobStopped.
        """
        error = self.exception(timeout)
        if error is None:                                 # Future.result asks for its truth
            value: _T = self._result
            return value
        try:
            raise error
        finally:
            del self, error                               # its traceback keeps this frame

    @library_code
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the function raised, or None, once the job is over. Waits and raises as `result` does."""
        self._wait_for_end(timeout)
        return super().exception(0)

    def _wait_for_end(self, timeout: float | None, given_up: Callable[[], bool] = lambda: False) -> None:
        if self._state == "PENDING":
            self._look()
        if self._state != "PENDING":
            return
        attempt, condition = _current.get(), self._condition

        def over() -> bool:
            return self._state != "PENDING" or attempt is not None and attempt.stop_requested or given_up()
        if attempt is not None:
            attempt.wait_for(condition, over, timeout)
            attempt.raise_if_stopped()
        else:
            with condition:
                condition.wait_for(over, timeout)

    def __await__(self) -> Generator[Any, None, _T]:
        import asyncio
        return (asyncio.wrap_future(self) if _current.get() is None else self._await_in_job()).__await__()

    async def _await_in_job(self) -> _T:
        """Await the result in a thread that is no executor's: the interpreter would wait for that at exit. A cancelled
        task goes on when the attempt has its place again."""
        import asyncio
        loop = asyncio.get_running_loop()
        cancelled: list[asyncio.CancelledError] = []
        outcome: Future[_T] = Future()
        end = loop.create_future()

        def wait() -> None:
            try:
                self._wait_for_end(None, lambda: bool(cancelled))
                outcome.set_result(Future.result(self, 0))
            except BaseException as error:
                outcome.set_exception(error)
            with contextlib.suppress(RuntimeError):           # a force stop has ended the loop
                loop.call_soon_threadsafe(end.set_result, None)
        threading.Thread(target=contextvars.copy_context().run, args=(wait,), name="bgjobs-await", daemon=True).start()
        while not end.done():
            try:
                await asyncio.wait([end])
            except asyncio.CancelledError as error:
                cancelled.append(error)
                with self._condition:
                    self._condition.notify_all()
        if cancelled:
            raise cancelled[0]
        return outcome.result()

    @library_code
    def add_done_callback(self, fn: Callable[[Job[_T]], Any]) -> None:
        """Call `fn(job)` once the job is over, in a thread of the runner's for callbacks; at once if it is over."""
        if self._state == "PENDING":
            self._runner._handles.hold(self)
        super().add_done_callback(fn)                     # type: ignore[arg-type]
        self._complete()

    @library_code
    def _complete(self) -> None:
        """Take the outcome over from the store, once. Wakes who waits; callbacks come in a thread of their own."""
        try:
            rows = self._runner._store.read(OUTCOME_OF, {"id": self._stored()})
        except KeyError:                                  # rolled back
            rows = []
        else:
            if not rows and self._created_at is not None:
                return                                    # not committed yet
        status = rows[0]["status"] if rows else "removed"
        if status not in (*OVER, "removed"):
            return
        condition = self._made_condition()
        with condition:
            if self._state != "PENDING":
                return
            if status == CANCELLED:
                state, tell = CANCELLED_AND_NOTIFIED, "add_cancelled"
            else:
                self._result, self._exception = self._outcome(status, rows)
                state, tell = FUTURE_FINISHED, "add_result" if self._exception is None else "add_exception"
            for waiter in self._waiters:
                getattr(waiter, tell)(self)
            condition.notify_all()
            self._state = state                           # last: what Ctrl-C cuts short is done again
        self._runner._handles.call_back(self)

    def _outcome(self, status: str, rows: list[sqlite3.Row]) -> tuple[Any, BaseException | None]:
        """Return the result and the exception of a job that is over and has not been cancelled."""
        try:
            if status == "removed":
                return None, BgjobsError(f"job {self.id} has been removed from {self._runner.path}")
            if status == FINISHED:
                return decode(rows[0]["result"]), None
            return None, self._runner._exception_of(self.id, rows[0])
        except Exception as error:
            unreadable = BgjobsError(f"job {self.id} is {status}, but its outcome cannot be read: {_text(error)}")
            unreadable.__cause__ = error
            return None, unreadable

    def __repr__(self) -> str:
        try:
            return f"<Job {self.id} {self.name} {self.status}>"
        except (KeyError, BgjobsError):
            return f"<Job {self.id}>"


# ---- 14 Schedules ---------------------------------------------------------------------------------------------
#
# A schedule is a row: a function, its arguments and options, and the times at which to make a
# job of them. Code registers it at each start. Once no living process has it in its code, it
# makes no more jobs, and the row stays for people to see. The transaction that submits a job also
# moves `next_at` past the present. So each time makes one job, whichever process looks first, and
# all times that were missed make one, too.

_JOB_COLUMNS = ("name", "args", "kwargs", "options", "label", "run_by", "low_priority", "system",
                "max_running")
SCHEDULE = """SELECT s.*,
    EXISTS (SELECT 1 FROM bgjobs_registered WHERE schedule_id = s.id) AS registered,
    (SELECT status FROM bgjobs_jobs WHERE id = s.job_id) AS job_status FROM bgjobs_schedules s"""
SCHEDULES = SCHEDULE + " WHERE system <= :system ORDER BY system, name, id"
ONE_SCHEDULE = SCHEDULE + " WHERE id = :id"
DUE_SCHEDULES = SCHEDULE + " WHERE next_at <= :now AND paused = 0 AND registered"
NEXT_SCHEDULE = """SELECT min(next_at) FROM bgjobs_schedules WHERE paused = 0
    AND id IN (SELECT schedule_id FROM bgjobs_registered)"""
SET_NEXT = "UPDATE bgjobs_schedules SET next_at = :next_at, paused = :paused WHERE id = :id"


def _rows(tx: Transaction, sql: str, **parameters: Any) -> list[sqlite3.Row]:
    """Return the rows of a query within a transaction, their columns by name."""
    cursor = tx.execute(sql, parameters)
    cursor.row_factory = sqlite3.Row
    return cursor.fetchall()


def _next_time(row: sqlite3.Row, now: float) -> float:
    """Return when a schedule is due next: never later than if it began now, for the clock may
    have been set back. In an hour if this process cannot tell: the process that registered the
    schedule may know other time zones."""
    try:
        times = schedule_of(row["schedule"], row["zone"])
    except ValueError as error:
        _say(logging.ERROR, f"schedule {row['id']} ({row['name']}) cannot be followed: {error}; "
             "looking again in an hour")
        return now + 3_600
    return min(times.next(row["next_at"], now), times.next(now, now))


TICK = """UPDATE bgjobs_schedules SET next_at = :next_at, last_at = :now,
    job_id = ifnull(:job, job_id), runs = runs + (:job IS NOT NULL),
    skipped = skipped + (:job IS NULL) WHERE id = :id"""


def _make_job(tx: Transaction, row: sqlite3.Row, next_at: float) -> int | None:
    """Submit a schedule's job, unless its last one is not over, and note when it is due next.
    Return the job's id, or None."""
    job = None
    if row["job_status"] in (None, *OVER):
        new = Submission(row["name"])
        for name in _JOB_COLUMNS:
            setattr(new, name, row[name])
        job = tx.submit(new)
    tx.execute(TICK, {"id": row["id"], "job": job, "now": tx.now, "next_at": next_at})
    return job


def run_schedules(tx: Transaction) -> None:
    """Make a job for each schedule that is due, unless its last one is not over."""
    for row in _rows(tx, DUE_SCHEDULES, now=tx.now):
        if _make_job(tx, row, _next_time(row, tx.now)) is None:
            tx.log(row["job_id"], logging.WARNING, f"its schedule, {row['schedule']}, was due "
                   "again, and skipped: this job is not over")


def clock_was_set_back(tx: Transaction) -> None:
    """Let no schedule wait until the clock shows the time again at which it would have been due."""
    for row in _rows(tx, SCHEDULE):
        next_at = min(row["next_at"], _next_time(row, tx.now))
        tx.execute(SET_NEXT, {"id": row["id"], "paused": row["paused"], "next_at": next_at})


def describe_schedule(row: sqlite3.Row) -> dict[str, Any]:
    """Return the `info` of a schedule: a dict of the JSON interface."""
    is_followed = row["registered"] and not row["paused"]
    return {**{name: row[name] for name in (
                "id", "key", "schedule", "name", "label", "run_by", "last_at", "job_id",
                "job_status", "runs", "skipped")},
            **{name: bool(row[name]) for name in (
                "low_priority", "system", "paused", "registered")},
            **shown_arguments(row, kept_options(row["options"])),
            "tz": row["zone"], "next_at": row["next_at"] if is_followed else None}


REMOVE_SCHEDULE = """DELETE FROM bgjobs_schedules WHERE id = :id AND NOT EXISTS
    (SELECT 1 FROM bgjobs_registered WHERE schedule_id = :id AND runner_id <> :runner)"""
UNREGISTER_ALL = "DELETE FROM bgjobs_registered WHERE schedule_id = :id"


class Schedule:
    """A schedule in the file, as `every` returns it. If it was removed, methods raise KeyError."""

    def __init__(self, runner: Runner, schedule_id: int) -> None:
        self._runner, self.id = runner, schedule_id

    def info(self) -> dict[str, Any]:
        """Return all that is known of it, as JSON values. Times are Unix seconds.

        registered: a living process has it in its code, else it makes no more jobs. skipped: how
        often its last job was not over when it was due.
        """
        return describe_schedule(self._found(
            self._runner._store.read(ONE_SCHEDULE, {"id": self.id})))

    def pause(self) -> Schedule:
        """Make no more jobs, in any process, until it is resumed."""
        return self._set_paused(True)

    def resume(self) -> Schedule:
        """Go on with the next time; times that passed in the pause are not made up for."""
        return self._set_paused(False)

    def run_now(self) -> Job[Any]:
        """Submit its job now; its times stay. Raises InvalidOperation if its last job is not
        over."""
        def run(tx: Transaction, row: sqlite3.Row) -> int:
            job = _make_job(tx, row, row["next_at"])
            if job is None:
                raise InvalidOperation(f"job {row['job_id']} of schedule {self.id} ({row['name']}) "
                                       f"is {row['job_status']}; wait until it is over")
            return job
        return Job(self._runner, self._change(run))

    def remove(self) -> None:
        """Delete it. Raises InvalidOperation if another living process has it in its code."""
        def remove(tx: Transaction, row: sqlite3.Row) -> str:
            deleted = tx.execute(REMOVE_SCHEDULE, {"id": self.id, "runner": self._runner._id})
            if not deleted.rowcount:
                raise InvalidOperation(f"schedule {self.id} ({row['name']}) is in the code of "
                                       "another process that runs; remove it there")
            tx.execute(UNREGISTER_ALL, {"id": self.id})
            return str(row["key"])
        self._runner._schedules.pop(self._change(remove), None)

    def _set_paused(self, paused: bool) -> Schedule:
        self._change(lambda tx, row: tx.execute(SET_NEXT, {
            "id": self.id, "paused": paused, "next_at": _next_time(row, tx.now)}))
        return self

    def _change(self, change: Callable[[Transaction, sqlite3.Row], Any]) -> Any:
        return self._runner._store.write(
            lambda tx: change(tx, self._found(_rows(tx, ONE_SCHEDULE, id=self.id))))

    def _found(self, rows: list[sqlite3.Row]) -> sqlite3.Row:
        if not rows:
            raise KeyError(f"there is no schedule {self.id} in {self._runner.path}")
        return rows[0]

    def __repr__(self) -> str:
        return f"<Schedule {self.id}>"


# If its times change, a schedule is due as if it were new. Else next_at stays, unless the clock
# was set back.
SAVE_SCHEDULE = f"""INSERT INTO bgjobs_schedules
    (key, schedule, zone, created_at, next_at, {", ".join(_JOB_COLUMNS)})
    VALUES (:key, :schedule, :zone, :now, :first, {", ".join(f":{name}" for name in _JOB_COLUMNS)})
    ON CONFLICT (key) DO UPDATE SET
    next_at = CASE WHEN schedule = :schedule AND zone IS :zone THEN min(next_at, :first)
        ELSE :first END,
    schedule = :schedule, zone = :zone, {", ".join(f"{name} = :{name}" for name in _JOB_COLUMNS)}"""
SCHEDULE_ID = "SELECT id FROM bgjobs_schedules WHERE key = :key"
REGISTER = f"INSERT OR IGNORE INTO bgjobs_registered VALUES (({SCHEDULE_ID}), :runner)"


def register(runner: Runner, schedule: float | str, fn: Callable[..., Any], args: tuple[Any, ...],
             kwargs: dict[str, Any], options: dict[str, Any]) -> Schedule:
    """Store a schedule that the code of this runner has; see Submitter.every."""
    for name in ("delay", "run_at", "parent", "connection"):
        if name in options:
            raise TypeError(f"{name} is no option of a schedule")
    new = runner._submission(fn, {**options, "parent": None})
    new.args, new.kwargs = (encode(given, f"the arguments of {new.name}") if given else None
                            for given in (args, kwargs))
    new.low_priority = new.low_priority or 0
    schedule = _period(schedule) if _are_seconds([schedule]) else _text(schedule)
    zone = zone_of(options.get("tz", _registry.declared.get(fn, {}).get("tz")))[1]
    times = schedule_of(schedule, zone)
    key = new.key or _call_as_key(new)
    asked = schedule, zone, new.name, new.args, new.kwargs
    known = runner._schedules.setdefault(key, asked)
    if known != asked:
        taken = f"the key {key!r} is taken by {known[2]}"
        if not new.key:
            taken = f"{new.name} with these arguments is scheduled already"
        raise ValueError(f"{taken}, {known[0]}; give each schedule a key of its own")
    values = {**{name: getattr(new, name) for name in _JOB_COLUMNS},
              "key": key, "zone": zone, "schedule": schedule, "runner": runner._id}

    def save(tx: Transaction) -> int:
        tx.execute(SAVE_SCHEDULE, {**values, "now": tx.now,
                                   "first": times.next(tx.now, tx.now)})
        tx.execute(REGISTER, values)
        return int(tx.value(SCHEDULE_ID, key=key))
    return Schedule(runner, runner._store.write(save))


def _call_as_key(new: Submission) -> str:
    """Return the key of a schedule that was given none: function and arguments, hashed if they
    are secret or long."""
    arguments = f"{new.args or ''}{new.kwargs or ''}"
    if len(arguments) > 400 or '"secret"' in (new.options or ""):
        import hashlib
        arguments = hashlib.sha256(arguments.encode()).hexdigest()
    return f"{new.name}({arguments})"


# ---- 15 Statistics and retention ------------------------------------------------------------------------------
#
# Transactions count in bgjobs_stats what happens to jobs, by minute and function, so that it
# outlives the jobs. Every hour a system job sums up the rows that have left a window of `stats`,
# by the parts of the next longer window, and removes the trees that have been over for long.

# How many parts a window has, and of how many minutes.
WINDOWS = {"1h": (60, 1), "24h": (96, 15), "7d": (84, 120), "30d": (120, 360)}
_A_WINDOW = Reader(WINDOWS.__getitem__, ", ".join(WINDOWS))
AGES = 1 << 40             # minutes: one part for all that is older than the windows
# Seconds that trees are kept once they are over, cancelled ones as finished.
RETENTION = {"finished": 7 * 86_400, "failed": 30 * 86_400}

# {by}: the first columns of the rows, and what they are grouped by.
SUMS = "SELECT {by}, " + ", ".join(
    f"{name[-3:]}({name}) AS {name}" if name[-4:] in ("_min", "_max") else f"sum({name}) AS {name}"
    for name in _TALLIES) + """ FROM bgjobs_stats
    WHERE minute BETWEEN :first AND :last AND name = ifnull(:name, name) GROUP BY {by}"""


def count_created(runner: Runner) -> None:
    """Bring the statistics up to date with the jobs that were created and begun by now."""
    if runner._unwritten.starts or runner._store.read(UNCOUNTED):
        runner._store.write(Transaction.count_created)


_NOTHING = {"created": 0, "started": 0, "finished": 0, "failed": 0, "waiting": None,
            "running": None}


def _counted(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row of SUMS as the JSON interface has it."""
    counted = {name: row[name] for name in _NOTHING}
    for name, count in (("waiting", row["started"]), ("running", row["finished"] + row["failed"])):
        counted[name] = None if count == 0 else {
            "avg": row[name] / count, "min": row[name + "_min"], "max": row[name + "_max"]}
    return counted


def read_statistics(runner: Runner, window: str, name: str | None) -> dict[str, Any]:
    """Return the counts of a window; see Runner.stats."""
    count, step = read_value("window", window, _A_WINDOW)
    last = int(runner._clock() // 60)
    first = (last // step - count + 1) * step
    count_created(runner)

    def sums(by: str) -> dict[Any, dict[str, Any]]:
        bounds = {"first": first, "last": last, "name": name}
        return {row[0]: _counted(row)
                for row in runner._store.read(SUMS.format(by=by), bounds)}
    parts = sums(f"minute / {step}")
    return {"window": window, "name": name, "from": first * 60, "to": (last + 1) * 60,
            "parts": [{"at": part * step * 60, **parts.get(part, _NOTHING)}
                      for part in range(first // step, last // step + 1)],
            "total": sums("NULL").get(None, _NOTHING),
            "functions": [{"name": name, **counted} for name, counted in sums("name").items()]}


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


def metrics(runner: Runner) -> str:
    """Return counters and gauges in the text format of Prometheus, version 0.0.4."""
    count_created(runner)
    ages = {"first": 0, "last": AGES, "name": None}
    functions = runner._store.read(SUMS.format(by="name"), ages)
    runners = runner._store.read(RUNNERS)
    return "".join([
        _metric("jobs", f"Jobs by status, counted up to {COUNT_LIMIT - 1:,}.",
                count_jobs(runner._store, {"system": True})[0], "status"),
        *(_metric(name, help, {row["name"]: row[name.partition("_")[0]] for row in functions},
                  "function") for name, help in _COUNTERS.items()),
        _metric("runners", "Processes that have the file open to run or submit jobs.",
                {"": len(runners)}),
        _metric("abandoned_threads", "Threads of superseded attempts that live on.",
                {"": sum(row["abandoned"] for row in runners)})])


FORGET_MINUTES = "DELETE FROM bgjobs_stats WHERE minute BETWEEN :first AND :last"


def fold_statistics(runner: Runner) -> None:
    """Sum up the rows that have left each window by the parts of the next longer window, and
    after the longest for good."""
    now = int(runner._clock() // 60)
    for (count, step), (_, longer) in itertools.pairwise((*WINDOWS.values(), (1, AGES))):
        bounds = {"first": 0, "last": now - (count + 1) * step, "name": None}

        def fold(tx: Transaction) -> None:
            by_part = SUMS.format(by=f"minute / {longer} * {longer}, name")
            sums = tx.execute(by_part, bounds).fetchall()
            tx.execute(FORGET_MINUTES, bounds)
            tx.executemany(SAVE_TALLY, sums)
        runner._store.write(fold)


PRUNE_IDS = 2_000          # ids that a prune looks at together
PRUNE_SECONDS = 0.02       # how long one of its transactions removes jobs, while all writers wait

# A job goes with its root, which has the lowest id of its tree, once nothing in the tree is left to
# do: a child that was resumed below a root that is over still runs. Jobs that an interrupted prune
# left behind have no root any more.
EXPIRED = """SELECT j.id FROM bgjobs_jobs j
    LEFT JOIN bgjobs_jobs r ON r.id = ifnull(j.root_id, j.id)
    WHERE j.id > :after AND j.id <= :until AND j.status IN ('finished', 'failed', 'cancelled')
    AND (r.id IS NULL OR r.done >= r.total AND (r.status = 'failed' AND r.finished_at < :failed
    OR r.status IN ('finished', 'cancelled') AND r.finished_at < :finished)) ORDER BY j.id DESC"""


def _remove_some(tx: Transaction, which: dict[str, float]) -> int:
    """Remove expired jobs for PRUNE_SECONDS and return how many; a job may have thousands of log
    lines."""
    ids, until = tx.execute(EXPIRED, which).fetchall(), time.perf_counter() + PRUNE_SECONDS
    for count, (job_id,) in enumerate(ids, 1):
        tx.remove([job_id])
        if time.perf_counter() > until:
            return count
    return len(ids)


def remove_expired(runner: Runner, finished: float, failed: float) -> int:
    """Remove whole trees that are over for so many seconds, and return the number of their jobs;
    see Runner.prune."""
    if not _are_seconds([finished, failed]):
        raise ValueError("finished and failed are seconds, 0 or more, "
                         f"got {_short((finished, failed))}")
    now, removed = runner._clock(), 0
    highest = runner._store.read(HIGHEST_ID)[0][0]
    for after in reversed(range(0, highest, PRUNE_IDS)):  # a root goes after its descendants
        which = {"after": after, "until": after + PRUNE_IDS,
                 "finished": now - finished, "failed": now - failed}
        while runner._store.read(EXPIRED + " LIMIT 1", which):
            removed += runner._store.write(lambda tx: _remove_some(tx, which))
            current_job().checkpoint()
    return removed


@job(name="bgjobs.housekeeping")
def housekeeping(finished: float, failed: float) -> int:
    """Fold the statistics and prune the file of the runner whose job this is."""
    runner = _current.get().runner                        # type: ignore[union-attr]
    fold_statistics(runner)
    return remove_expired(runner, finished, failed)


def keep_house(runner: Runner) -> None:
    """Schedule the housekeeping, which one process at a time does; each runner that starts calls
    this."""
    if runner._retention is not None:
        label = "Housekeeping: remove what is over for long"
        hourly = runner.options(key="bgjobs.housekeeping", system=True, label=label)
        hourly.every("1h", housekeeping, **runner._retention)


# ---- 16 Runner ------------------------------------------------------------------------------------------------
#
# A runner connects the parts. The store has it take along what waits: log lines at the beginning of each transaction,
# outcomes of ended attempts and claims for free places at its end (`_ride`). After the commit the claims go to the
# pool (`_committed`), and the handles of jobs that are over are completed (`_announce`). The pool's workers call
# `_execute` and `_settle`.

SETTLE_SECONDS = 0.002     # how long an outcome that nobody waits for may wait for company
POLL_SECONDS = 0.05        # how often the service thread looks for what other processes wrote
GRACE_SECONDS = 5.0        # what running jobs get to reach a checkpoint when the app goes down
STANDING_CLOCK_SECONDS = 5.0   # then a job that waits, in drain, for another time is an error
LINES_A_JOB = 10_000       # log lines that are kept of a job, the newest, and up to a tenth more
LINES_A_WRITE = 2_000      # log lines that one transaction takes along
LOG_BUFFER = 20_000        # log lines that may wait to be written; more are counted, not kept
MEMORY_OF_EXCEPTIONS = 1_000

GOING_ON = """SELECT id FROM bgjobs_jobs WHERE id IN (SELECT value FROM json_each(:ids))
    AND status IN ('pending', 'running', 'stopping', 'stopped')"""


class Submitter:
    """Submits with the options it was made with: what `options()` returns. A runner is one, too."""

    def __init__(self, runner: Runner | None, options: dict[str, Any]) -> None:
        self._of, self._options = runner, check_options(options)
        if "executor" in options:
            raise TypeError("executor is an option of a function, @job(executor=...), or of start(); it cannot be "
                            "stored with a job")

    @overload                                             # a coroutine is run, and its value is the result
    def submit(self, fn: Callable[_P, Coroutine[Any, Any, _T]], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]: ...
    @overload
    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Store a job that calls `fn(*args, **kwargs)`; return its handle after the commit. In a job: a child of it.

        TypeError: the function or the arguments cannot be stored; RuntimeError: the runner is shut down;
        JobStopped: the job that submits is to stop.
        """
        return (self._of or default_runner())._submit(fn, args, kwargs, self._options)

    def submit_many(self, fn: Callable[..., Any], argument_tuples: Iterable[tuple[Any, ...]]) -> list[int]:
        """Store a job `fn(*arguments)` for each tuple; return the ids, in order.

        In transactions of at most 10,000; an error in between says how many were stored.
        """
        return (self._of or default_runner())._submit_many(fn, argument_tuples, self._options)

    def map(self, fn: Callable[..., _T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            buffersize: int | None = None) -> Iterator[_T]:
        """Submit `fn(*arguments)` for each tuple of zip(*iterables), now; return an iterator over the results, in
        order.

        timeout: seconds from now until which all results must be there, else TimeoutError. chunksize is ignored.
        buffersize: submit only so many now, and another one for each result that is taken. What has not begun is
        cancelled when the iterator raises or is dropped. ValueError: a bad buffersize.
        """
        if buffersize is not None and (type(buffersize) is not int or buffersize < 1):
            raise ValueError(f"buffersize must be None or greater than 0, got {_short(buffersize)}")
        submissions = (self.submit(fn, *arguments) for arguments in zip(*iterables))
        jobs = deque(itertools.islice(submissions, buffersize))
        return _results(jobs, submissions, None if timeout is None else time.monotonic() + timeout)

    def every(self, schedule: float | str, fn: Callable[_P, Any], /, *args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        """Have `fn(*args, **kwargs)` submitted again and again, from all processes once each time; return the schedule.

        schedule: seconds, a text like "15m" (s, m, h, d, w), or five cron fields, in the time zone of the option tz. It
        is known by the option key, else by function and arguments: to register it at each start changes nothing, or its
        times, if those given have changed. What was missed while no process ran comes once; while its last job is not
        over, a time is skipped. ValueError: a bad schedule, or the same one at other times; give each a key then.
        TypeError: as submit.
        """
        return register(self._of or default_runner(), schedule, fn, args, kwargs, self._options)

    def options(self, **options: Any) -> Submitter:
        """Return a Submitter with these options added: `options(label="Nightly").submit(export, "users")`.

        name           stable identity of the function; by default its import path
        label          a title for people
        run_by         who asked for it; by default as the parent
        low_priority   True: run in periods of low load; by default as the parent
        system         True: housekeeping, hidden by default
        key            at the root: while a job with this key is not over, submit returns that job;
                       in a child: unique within the parent for good
        delay          seconds to wait
        run_at         or when to run, in Unix seconds or an aware datetime
        retries        how many more attempts after an exception; by default 0
        backoff        the pause before each of them: seconds, a list of them (the last one repeats), or a
                       function of the attempt, called at submit; by default 1 s, twice as long each time,
                       up to 10 min, and up to half as long again by chance
        timeout        seconds of one attempt; then it is stopped, after a grace of 5 s by force, and has
                       failed with a TimeoutError
        max_running    at most so many attempts of this name at once, over all processes; the job's
                       ancestors, which may wait for it, do not count
        stoppable      False: stays stopping until it ends
        restartable    False: refuses restart
        recover        False: an attempt cut off by a crash fails instead of running again (at most once)
        isolate        True: each attempt in a process of its own, which force stop and timeout kill
        tz             the time zone of `every`; by default the machine's
        secret         names of arguments that people do not get to see
        parent         a Job to become its child; None: a root, also from inside a job
        connection     the app's open sqlite3.Connection to the same file: the job exists if and only if
                       its transaction commits; before that, ask the handle for nothing but its id

        Raises TypeError for an unknown option, ValueError for a value that does not fit. For
        `executor` see `job`.
        """
        return Submitter(self._of, {**self._options, **options})


def _results(jobs: deque[Job[_T]], submissions: Iterator[Job[_T]], deadline: float | None) -> Iterator[_T]:
    try:
        while jobs:
            result = jobs[0].result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            jobs.popleft()
            jobs.extend(itertools.islice(submissions, 1))
            yield result
            del result
    except GeneratorExit:
        for job in jobs:                                  # perhaps in a garbage collection: nothing may be locked here
            job._runner._handles.to_cancel.put(job)
        raise
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


class _Unwritten:
    """Log lines, and starts of jobs to be counted, until a transaction has taken them along.

    Any thread adds; only the leading thread writes and removes. A transaction that fails leaves them to the next.
    """

    def __init__(self) -> None:
        self.lines: deque[tuple[Attempt, float, int, str]] = deque()      # with time, level and message
        self.starts: deque[tuple[str, float]] = deque()   # names of functions, and the seconds that their jobs waited
        self.dropped = 0                                  # lines, since that was last reported

    def add_line(self, attempt: Attempt, at: float, level: int, message: str) -> None:
        if len(self.lines) < LOG_BUFFER:
            self.lines.append((attempt, at, level, message))
        else:
            self.dropped += 1

    def add_start(self, attempt: Attempt, now: float) -> None:
        """Note that a job begins, if for the first time and no system job."""
        if attempt.due is not None and not attempt.system:
            self.starts.append((attempt.name, max(0.0, now - attempt.due)))

    def __bool__(self) -> bool:
        return bool(self.lines or self.starts)

    def write(self, tx: Transaction) -> None:
        """Begin a transaction with what waits, so that it comes before the operations and outcomes in it."""
        if not self:
            return
        lines, starts, unfit = list(self.lines)[:LINES_A_WRITE], list(self.starts), 0
        for name, waited in starts:
            tx.count_start(name, waited)
        if lines:
            try:
                self._write_lines(tx, lines)
            except (TypeError, ValueError, sqlite3.DataError, sqlite3.IntegrityError):     # not the disk's fault
                unfit = len(lines)
        tx.after_commit.append(lambda: self._forget(len(lines), len(starts), unfit))

    @staticmethod
    def _write_lines(tx: Transaction, lines: list[tuple[Attempt, float, int, str]]) -> None:
        rows = _dump([(attempt.id, at, level, message, attempt.number) for attempt, at, level, message in lines])
        tx.execute(INSERT_LINES, {"lines": rows})
        for attempt, count in Counter(attempt for attempt, *_ in lines).items():
            attempt.untrimmed_lines += count
            if attempt.untrimmed_lines > LINES_A_JOB // 10:
                tx.execute(TRIM_LOG, {"id": attempt.id, "keep": LINES_A_JOB})
                tx.after_commit.append(functools.partial(setattr, attempt, "untrimmed_lines", 0))

    def _forget(self, lines: int, starts: int, unfit: int) -> None:
        self.dropped += unfit
        for _ in range(lines):
            self.lines.popleft()
        for _ in range(starts):
            self.starts.popleft()


class _Handles:
    """The handles that somebody waits on: completes them when their jobs are over, and calls their callbacks in a
    thread of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.to_cancel: queue.SimpleQueue[Job[Any]] = queue.SimpleQueue()   # of a `map` given up; by the service thread
        self._to_call_back: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self.ends_missed = False                          # jobs may be over whose handles were not told: look() is due
        # `lock` guards the five below and the making of a handle's condition; no SQL runs under it.
        self.lock = threading.Lock()
        self.watched: dict[int, list[weakref.ref[Job[Any]]]] = {}
        self._held: set[Job[Any]] = set()                 # handles with callbacks live until these were called
        self.callbacks_left = 0
        self._thread: threading.Thread | None = None      # which calls them
        self._closed = False

    def watch(self, handle: Job[Any]) -> None:
        """Have this handle completed when its job is over."""
        with self.lock:
            self.watched.setdefault(handle.id, []).append(weakref.ref(handle))

    def hold(self, handle: Job[Any]) -> None:
        """Keep a handle alive until its callbacks were called, even if the app drops it."""
        with self.lock:
            self._held.add(handle)

    def ids(self) -> list[int]:
        """Return the ids of the watched jobs, after forgetting those whose handles nobody has any more."""
        with self.lock:
            for job_id in [i for i, references in self.watched.items() if all(r() is None for r in references)]:
                del self.watched[job_id]
            return list(self.watched)

    def complete(self, job_ids: Iterable[int]) -> None:
        """Complete the handles of jobs that are over. One that another process has resumed meanwhile stays watched."""
        for job_id in job_ids:
            references = list(self.watched.get(job_id, ()))
            if not references:
                continue
            for handle in filter(None, (reference() for reference in references)):
                try:
                    handle._complete()
                except Exception as error:                # others' ends are told; the service thread looks again
                    self.ends_missed = True
                    self._store.complain(_text(error))
            self.forget_completed(job_id)

    def forget_completed(self, job_id: int) -> None:
        """Watch those handles of a job no longer that are complete, or that nobody has any more."""
        with self.lock:
            left = [reference for reference in self.watched.get(job_id, ())
                    if (handle := reference()) is not None and handle._state == "PENDING"]
            if left:
                self.watched[job_id] = left
            else:
                self.watched.pop(job_id, None)

    def look(self) -> None:
        """Complete the handles of jobs that ended unnoticed, in another process above all. Reads the file."""
        self.ends_missed = False
        ids = self.ids()
        if ids:
            going_on = {row[0] for row in self._store.read(GOING_ON, {"ids": json.dumps(ids)})}
            self.complete([job_id for job_id in ids if job_id not in going_on])

    def call_back(self, handle: Job[Any]) -> None:
        """Have the callbacks of a completed handle called, outside of any transaction and any job's context."""
        with self.lock:
            if handle._done_callbacks:
                self._to_call_back.put(handle)
                self.callbacks_left += 1
                if self._closed:
                    self._to_call_back.put(None)
                self._ensure_thread()
            self._held.discard(handle)

    def _ensure_thread(self) -> None:
        """Have the thread for callbacks running. Called under the lock."""
        if self._thread is None:
            thread = threading.Thread(target=self._run_callbacks, name="bgjobs-callbacks", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:                 # there are too many; the next end tries again
                self._store.complain(f"bgjobs: {error}")

    def _run_callbacks(self) -> None:
        while not self._ends(handle := self._to_call_back.get()):
            if handle is not None:
                try:
                    contextvars.Context().run(handle._invoke_callbacks)       # type: ignore[attr-defined]
                except BaseException:
                    _log.exception("a callback of job %d failed", handle.id)
                del handle
                with self.lock:
                    self.callbacks_left -= 1

    def _ends(self, handle: Job[Any] | None) -> bool:
        """Return whether the thread ends: with the None after the last handle, once this is closed."""
        with self.lock:
            if handle is not None or self.callbacks_left > 0:
                return False
            self._thread = None
            return True

    def wait_for_callbacks(self) -> None:
        """Block until the callbacks of completed handles have returned; called from one of them, not at all."""
        while self.callbacks_left > 0 and threading.current_thread() is not self._thread:
            with self.lock:
                self._ensure_thread()
            time.sleep(0.002)

    def close(self) -> None:
        """Let the thread end, and drop the handles of jobs that are not over."""
        self._held.clear()
        with self.lock:
            self._closed = True
            self._to_call_back.put(None)

    def leave_to_parent(self) -> None:
        """In a forked child: renew the lock, which may be held, and forget the thread, which is not here."""
        self.lock, self._thread = threading.Lock(), None


# What the options of a Runner must be: (name, check, in words). The error names the first that does not fit.
_RUNNER_OPTIONS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("executor", *_OPTIONS["executor"]),
    ("callback", lambda v: v is None or isinstance(v, str) and ":" in v[1:] and v.rpartition(":")[2].isdecimal(),
     '"host:port"'),
    ("max_workers", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "greater than 0"),
    ("max_workers", lambda v: v < 1 << 31, "less than 2**31"),
    ("durability", lambda v: v in ("process", "power"), '"process" or "power"'),
    ("journal", lambda v: v in ("wal", "delete"), '"wal" or "delete"'),
    ("retention", lambda v: v is None or isinstance(v, dict) and set(v) <= set(RETENTION) and _are_seconds(v.values()),
     f"None or a dict of seconds for {', '.join(RETENTION)}"),
)


# Option of a job -> what is stored of it, in the column of this name.
_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "name": str.__str__, "label": lambda v: _text(v, 500), "run_by": lambda v: _text(v, 500), "low_priority": int,
    "system": int, "key": str.__str__, "run_at": _unix, "max_running": int}


class Runner(Submitter, Executor):
    """Runs the jobs of one file on threads of this process; a complete concurrent.futures.Executor.

    path: the SQLite file ($BGJOBS_DB, else "bgjobs.db"); it may be the app's own. max_workers: attempts that execute at
    once (cores + 4, at most 32). start=False: submits, reads and operates, but runs nothing until start(). durability:
    "process" survives the death of the process, "power" a power cut, too. journal: "wal", or "delete", slower, for
    SQLite's rollback journal. retention: seconds that whole trees are kept once they are over, {"finished": 7 days,
    "failed": 30 days} by default, where finished stands for cancelled, too; None keeps everything. modules: names of
    modules to import, whose functions jobs may name. executor: where functions execute instead, a
    concurrent.futures.Executor (or what makes one, a class or a function without arguments: then a broken one is
    replaced); max_workers is how many at once, by default the executor's. callback: "host:port" of this machine, by
    which an executor's workers on other machines reach it. clock: returns Unix seconds. Raises ValueError for a bad
    value, StoreError for a file that cannot be used, OSError for a callback address that cannot.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_workers: int | None = None,
                 start: bool = True, durability: str = "process", journal: str = "wal",
                 retention: Mapping[str, float] | None = RETENTION, modules: Iterable[str] = (), executor: Any = None,
                 callback: str | None = None, clock: Callable[[], float] = time.time) -> None:
        if max_workers is None and executor is not None:
            max_workers = getattr(executor, "_max_workers", None)
        if max_workers is None:
            max_workers = min(32, (getattr(os, "process_cpu_count", os.cpu_count)() or 1) + 4)
        given = {"executor": executor, "callback": callback, "max_workers": max_workers, "durability": durability,
                 "journal": journal, "retention": retention}
        for name, fits, must_be in _RUNNER_OPTIONS:
            if not fits(given[name]):
                raise ValueError(f"{name} must be {must_be}, got {_short(given[name])}")
        for module in modules:
            __import__(module)
        Submitter.__init__(self, self, {})
        self.max_workers = self._max_workers = max_workers
        self._executor, self._callback_address, self._clock = executor, callback, clock
        self._retention = None if retention is None else {**RETENTION, **retention}
        path = os.environ.get("BGJOBS_DB", "bgjobs.db") if path is None else path
        self._store_options = path, durability, journal, clock
        self._open()
        _register_hooks()
        _living.add(self)
        if start:
            try:
                self.start()
            except BaseException:
                self.close(0)
                raise

    def _open(self) -> None:
        self._store = Store(*self._store_options)
        try:
            self._begin_anew()
        except BaseException:
            self._store.close_by = 0.0                   # it has waited already
            self._store.close()
            raise

    def _begin_anew(self) -> None:
        store = self._store
        self.path = store.path
        means = store.read(MEANS)
        self._costs = Costs({name: seconds for name, seconds, _ in means if seconds is not None})
        self._costs.trees = {name: seconds for name, _, seconds in means if seconds is not None}
        self._callback = Callback(self, self._callback_address)
        self._engines: dict[int, Engine] = {}             # by the id of what the app gave
        self._pool = Pool(self.max_workers, self._execute, self._settle, store.kick, self._callback.depart)
        self._presence = _presence(self.path)
        self._id, self._first_id = self._register()       # no job of this runner has a lower id
        self._begin_empty()
        store.begin, store.rider, store.announce = self._unwritten.write, self._ride, self._announce
        store.backlog = self._nudge_service

    def _begin_empty(self) -> None:
        """Set what this process keeps in memory: all that there is where an attempt executes elsewhere."""
        self._attempts: dict[int, Attempt] = {}           # claimed here, by job id; only the leading thread changes it
        self._unwritten, self._handles = _Unwritten(), _Handles(self._store)
        self._ended: deque[Attempt] = deque()             # until they are recorded; only the leading thread removes
        self._ended_at = 0.0                              # monotonic; when the first of them came
        self._finishing = False                           # a transaction with outcomes is under way, or has failed
        self._backlog = True                              # more may be ready, as far as the last claim knows
        self._exceptions: OrderedDict[int, tuple[int, BaseException]] = OrderedDict()     # by job id, with the attempt
        self._schedules: dict[str, tuple[Any, ...]] = {}  # that this code has, by key: times, zone, function, arguments
        self._started = self._inline = False              # inline: in drain()
        self._shut = self._shut_claims = False            # takes no jobs; claims none, since it goes down
        self._interrupted_at = -math.inf                  # monotonic; when Ctrl-C had it shut down
        self._close_lock = threading.Lock()               # only one thread closes
        self._service: _Service | None = None
        self._servers: list[Any] = []                     # of the status page

    # the hot path: submit, claim, execute, finish

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
                ) -> Job[Any]:
        new = self._submission(fn, options)
        if args:
            new.args = encode(args, f"the arguments of {new.name}")
        if kwargs:
            new.kwargs = encode(kwargs, f"the arguments of {new.name}")
        connection = options.get("connection")
        if connection is None:
            return Job(self, self._store.write(lambda tx: tx.submit(new)))
        return Job(self, *self._write_through(connection, lambda tx: (
            job_id := tx.submit(new), tx.execute(CREATED_AT, {"id": job_id}).fetchone()[0])))

    def _submit_many(self, fn: Callable[..., Any], argument_tuples: Iterable[tuple[Any, ...]], options: dict[str, Any]
                     ) -> list[int]:
        new = self._submission(fn, options)
        if new.key is not None:
            raise ValueError("a key names one job; it cannot be an option of submit_many")
        connection = options.get("connection")
        write = self._store.write if connection is None else functools.partial(self._write_through, connection)
        what, tuples, ids = f"the arguments of {new.name}", iter(argument_tuples), []
        try:
            while batch := [None if args == () else encode(_checked_tuple(args), what)
                            for args in itertools.islice(tuples, 10_000)]:
                ids += write(lambda tx: tx.submit_many(new, batch))
            return ids
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else BgjobsError
            raise kind(f"{_text(error)} ({len(ids):,} jobs were stored before)") from error

    def schedules(self, system: bool = False) -> list[Schedule]:
        """Return the schedules in the file, also those that no code has any more. system=True adds those of the
        library."""
        return [Schedule(self, row["id"]) for row in self._store.read(SCHEDULES, {"system": system})]

    def _submission(self, fn: Callable[..., Any], options: dict[str, Any]) -> Submission:
        """Return the row for a job of this function, but for its arguments."""
        new = Submission(_registry.name_of(fn))
        declared = _registry.declared.get(fn)
        given = {**declared, **options} if declared else options
        attempt = _current.get()
        if attempt is not None and attempt.runner is not self:
            attempt = None
        if self._shut and attempt is None:
            raise RuntimeError("cannot schedule new futures after shutdown")
        new.submitter = self._id
        if given:
            self._apply_options(new, fn, given)
        if attempt is not None:
            attempt.raise_if_stopped()
            new.author = attempt.id, attempt.number
            if "parent" not in given:
                new.parent_id = attempt.id
                attempt.has_children = True
        return new

    def _apply_options(self, new: Submission, fn: Callable[..., Any], given: dict[str, Any]) -> None:
        for name, stored in _COLUMNS.items():
            if given.get(name) is not None:
                setattr(new, name, stored(given[name]))
        if "name" in given:
            _registry.by_name.setdefault(new.name, fn)
        if new.run_at is None and given.get("delay"):
            new.run_at = self._clock() + given["delay"]
        kept = options_to_keep(fn, given)
        if kept:
            new.options = json.dumps(kept, separators=(",", ":"))
        parent = given.get("parent")
        if parent is not None:
            if parent._runner is not self and os.path.realpath(parent._runner.path) != os.path.realpath(self.path):
                raise ValueError(f"{parent!r} is in {parent._runner.path}; it takes no children from {self.path}")
            new.parent_id = parent.id
            if parent.id in self._attempts:
                self._attempts[parent.id].has_children = True

    def _ride(self, tx: Transaction, kicked: bool) -> None:
        """End a transaction with what waits for one: the outcomes of ended attempts, and claims for free places."""
        if self._pool.lingers and not kicked:
            return                                       # a worker is about to do so, for more at a time
        ended, failed = list(self._ended), self._finishing
        self._finishing = bool(ended)
        if failed:
            for attempt in ended:
                self._finish_with_care(tx, attempt)
        elif ended:
            tx.finish(ended)
        claims = self._claim(tx) if self._started and not self._shut_claims else []
        if tx.parked >= PARKED_A_CLAIM:
            tx.after_commit.append(self._store.kick)     # what is behind them has its turn next
        if ended or claims:
            tx.after_commit.append(lambda: self._committed(ended, claims))

    def _claim(self, tx: Transaction) -> list[Attempt]:
        """Claim jobs for the free places, and some ahead of free workers while they are known to be short."""
        free, low_free, quick, waiting = self._pool.room()
        ahead = AHEAD_LIMIT - len(waiting) if quick else 0
        if free <= 0 and ahead < AHEAD_LIMIT // 2:        # enough waits; claims come in batches
            self._backlog = True
            return []
        free = max(0, free)
        planned = sum(self._costs.means.get(attempt.name, 0.0) + _OVERHEAD for attempt in waiting)
        rows = tx.claim(self._id, free, low_free, ahead, planned, quick, self._costs)
        self._backlog = tx.more_ready or low_free <= 0
        return [self._attempt(row) for row in rows]

    def _attempt(self, claim: Claim) -> Attempt:
        engine = self._engine_for(claim.name, claim.options, claim.system)
        return Attempt(self, claim) if engine is None else Departed(self, claim, engine)

    def _committed(self, ended: list[Attempt], claims: list[Attempt]) -> None:
        """After a commit of what rode along: forget what has ended, and hand the claims out. Runs in the leading
        thread."""
        self._finishing = False
        for attempt in ended:
            if self._attempts.get(attempt.id) is attempt:
                del self._attempts[attempt.id]
            self._ended.popleft()                         # last: what Ctrl-C leaves here is recorded again, in vain
        self._ended_at = time.monotonic()                 # of those that came meanwhile
        for attempt in claims:
            superseded = self._attempts.get(attempt.id)
            self._attempts[attempt.id] = attempt
            if superseded is not None:                    # by another process, and resumed: nobody here has noticed yet
                self._abandon(superseded)
        if claims:
            self._pool.put(claims, sum(self._costs.means.get(attempt.name, math.inf) for attempt in claims))

    def _announce(self, tx: Transaction) -> None:
        """After any commit: tell who waits for what has ended. Runs in the leading thread."""
        for name, seconds in tx.trees:
            self._costs.record_tree(name, seconds)
        if tx.over and self._handles.watched:
            self._handles.complete(tx.over)

    def _execute(self, attempt: Attempt) -> None:
        """Run one attempt's function in this thread, if it is not to stop already. Never raises."""
        if not attempt.stop_requested:
            self._perform(attempt)

    def _perform(self, attempt: Attempt) -> None:
        attempt.begun = time.monotonic()
        attempt.thread = attempt.ticket.thread = threading.get_ident()
        around, _here.ticket = _here.ticket, attempt.ticket
        try:
            function = _registry.find(attempt.name)
            if function is None:
                attempt.outcome = UNKNOWN
            else:
                self._unwritten.add_start(attempt, self._clock())
                try:
                    value = contextvars.Context().run(self._call, attempt, function)
                finally:
                    attempt.ticket.keep()                 # a force stop raises nothing here any more
                attempt.result = None if value is None else encode(value, f"{attempt.name} returned, but the result")
                attempt.outcome = RETURNED
        except BaseException as error:
            attempt.outcome = attempt.reason
            if not _is_stop(error):
                attempt.fail(error)
            elif attempt.reason == TIMED_OUT:
                attempt.fail(attempt.took_too_long)
        _here.ticket = around
        attempt.thread = None
        if attempt.connections:
            self._roll_back(attempt)
        attempt.ran = time.monotonic() - attempt.begun
        attempt.worked = max(0.0, attempt.ran - attempt.waited)
        if attempt.outcome != UNKNOWN:
            self._costs.record(attempt.name, attempt.worked)

    @staticmethod
    def _call(attempt: Attempt, function: Callable[..., Any]) -> Any:
        _current.set(attempt)
        args = decode(attempt.args) if attempt.args else ()
        kwargs = decode(attempt.kwargs) if attempt.kwargs else {}
        attempt.ticket.put_back()
        value = function(*args, **kwargs)
        if isinstance(value, types.CoroutineType):
            import asyncio
            return asyncio.run(value)
        return value

    def _settle(self, attempt: Attempt) -> bool:
        """Queue the outcome of an attempt for `_ride`. True: the caller is to lead a transaction now, since somebody
        waits for the outcome, or a ready job for the place or the limit; else one follows within SETTLE_SECONDS, for
        more at a time."""
        try:
            if attempt.exception is not None and not attempt.ticket.void:
                self._remember_exception(attempt)
            attempt.unsaved_progress = attempt.report_to_save() if attempt.outcome != RETURNED else None
        except BaseException as error:                    # whatever it is, the job ends and the worker goes on
            attempt.fail(error)
        now, watched = time.monotonic(), self._handles.watched
        if not self._ended:
            self._ended_at = now
        self._ended.append(attempt)
        if attempt.id in watched or attempt.has_children or attempt.parent_id is not None and watched \
                or self._backlog and self._pool.is_empty \
                or attempt.max_running is not None and attempt.max_running <= self._pool.size \
                or now - self._ended_at > SETTLE_SECONDS and not self._store.leading:
            return True
        self._nudge_service()
        return False

    # what is rare on that path

    def _write_through(self, connection: sqlite3.Connection, run: Callable[[Transaction], Any]) -> Any:
        """Run a write in the app's own transaction. The ids it returns show later whether that was committed."""
        value, attempt = self._store.write_through(connection, run), _current.get()
        if attempt is not None:
            attempt.connections = {**attempt.connections, connection: value[0]}
        return value

    def _engine_for(self, name: str, options: str | None = None, system: int = 0) -> Engine | None:
        """Return what executes the jobs of this name, or None: the threads of this process."""
        executor = self._executor
        if options and '"isolate":true' in options:
            executor = IsolatedProcesses
        elif system or executor is None and not _registry.has_executors:
            return None
        else:
            function = _registry.find(name)
            executor = _registry.declared.get(function, {}).get("executor", executor) if function else executor
        if executor is None:
            return None
        return self._engines.get(id(executor)) or self._engines.setdefault(id(executor), Engine(executor))

    def _finish_with_care(self, tx: Transaction, attempt: Attempt) -> None:
        """Record one outcome. One that cannot be recorded becomes a failure instead of holding everybody up."""
        tx.execute("SAVEPOINT outcome")
        try:
            tx.finish([attempt])
            tx.apply()
        except sqlite3.OperationalError:                  # the disk's trouble, not the outcome's
            raise
        except Exception as error:
            tx.execute("ROLLBACK TO outcome")
            tx.forget_changes()
            attempt.unsaved_progress = None
            attempt.fail(error)
            tx.finish([attempt])
        tx.execute("RELEASE outcome")

    def _roll_back(self, attempt: Attempt) -> None:
        """Roll back what an attempt left open on connections of its thread, whose locks would keep its outcome from
        being recorded. A connection that other threads may use is left to them."""
        for connection, job_id in attempt.connections.items():
            with contextlib.suppress(sqlite3.Error, StoreError):
                if connection.in_transaction and not is_shared(connection):
                    # With autocommit=False a transaction is always open.
                    always_open = getattr(connection, "autocommit", True) is False
                    lost = not always_open or not self._store.read(STATUS_OF, {"id": job_id})
                    connection.rollback()
                    if lost:
                        _say(logging.WARNING, f"job {attempt.id} ({attempt.name}) ended within a transaction of its "
                             "own: rolled back")
        attempt.connections = {}

    def _remember_exception(self, attempt: Attempt) -> None:
        error = attempt.exception
        if error is None:
            return
        traceback.clear_frames(_frames_of(error))         # keeps the lines, not what the function held
        self._exceptions[attempt.id] = attempt.number, error
        if len(self._exceptions) > MEMORY_OF_EXCEPTIONS:
            self._exceptions.popitem(last=False)

    @library_code
    def _keep_log_line(self, attempt: Attempt, record: logging.LogRecord) -> None:
        """Take a log record into the job's log; written with the next transaction, within a second."""
        if self._attempts.get(attempt.id) is not attempt:
            return                                        # superseded
        if self._inline and len(self._unwritten.lines) >= LINES_A_WRITE:
            self._store.kick()                            # nobody else writes them
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += "\n" + _traceback_of(record.exc_info[1])
        except Exception as error:
            message = f"{_short(record.msg)} could not be formatted: {_text(error)}"
        at = record.created if self._clock is time.time and _is_number(record.created) else self._clock()
        level = record.levelno if isinstance(record.levelno, int) and abs(record.levelno) < 1 << 31 else logging.NOTSET
        self._unwritten.add_line(attempt, at, level, _text(message).replace("\0", "\\0"))

    def _abandon(self, attempt: Attempt) -> None:
        """Give up an attempt that the file has superseded: stop it, wherever it is, and give its place to another."""
        if self._attempts.get(attempt.id) is attempt:
            del self._attempts[attempt.id]
        attempt.supersede()
        self._pool.abandon(attempt)

    # reading and operating

    def get(self, job_id: int) -> Job[Any]:
        """Return the handle of a job. KeyError: there is none with this id."""
        if isinstance(job_id, bool) or not isinstance(job_id, int):
            raise TypeError(f"a job id is an int, got {_short(job_id)}")
        if not 0 < job_id < 1 << 63:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        self._status(job_id)
        return Job(self, job_id)

    def jobs(self, /, *, limit: int | None = 100, before: int | None = None, **filters: Any) -> list[Job[Any]]:
        """Return the jobs that pass the filters, newest first: status= name= run_by= errors= low_priority= q= parent=
        system= created_from= created_to= (see `conditions`), with ids below `before`; all of them with limit=None.
        ValueError: a bad value."""
        return [Job(self, job_id) for job_id in find_jobs(self._store, filters, limit, before)[0]]

    def _status(self, job_id: int) -> str:
        rows = self._store.read(STATUS_OF, {"id": job_id})
        if not rows:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        return str(rows[0][0])

    def _info(self, job_id: int) -> dict[str, Any]:
        return describe(self._store.row(job_id), self._clock(), self._usual)

    def _usual(self, name: str) -> float | None:
        return usual_seconds(self._store, self._costs, name)

    def _logs(self, job_id: int, *filters: Any, **named: Any) -> list[dict[str, Any]]:
        if not self._store.closed:
            self._write_lines()                           # who asks sees what was logged by now
        return read_logs(self._store, job_id, *filters, **named)

    @library_code
    def _operate(self, operation: str, job_id: int, by: str | None, handle: Job[Any] | None = None) -> Job[Any]:
        by = None if by is None else " ".join(_text(by, 200).split())
        if handle is not None and operation in ("resume", "restart"):
            handle.done()                                 # a handle whose job was over keeps that outcome
        attempt = _current.get()
        author = (attempt.id, attempt.number) if attempt is not None and attempt.runner is self else None
        passed = _Event()
        for running in list(self._attempts.values()):
            running.let_pass(passed)

        def operate(tx: Transaction) -> None:
            moved = tx.operate(operation, job_id, by, author)
            tx.after_commit.append(lambda: self._tell_attempts(operation, moved))
        try:
            self._store.write(operate)
        except (KeyError, OverflowError):
            raise KeyError(f"there is no job {job_id} in {self.path}") from None
        finally:
            passed.set()
        if operation == "restart" or handle is None or operation == "resume" and handle._state != "PENDING":
            return Job(self, job_id)
        return handle

    def _tell_attempts(self, operation: str, job_ids: Iterable[int]) -> None:
        """Carry a committed operation out on the attempts of this process. Runs in the leading thread, before any of
        these jobs can be claimed again."""
        for attempt in filter(None, map(self._attempts.get, job_ids)):
            if operation == "stop":
                attempt.request_stop()
            elif operation == "force_stop":
                self._abandon(attempt)
            elif operation.endswith("low_priority"):
                self._pool.set_low_priority(attempt, int(operation == "set_low_priority"))
                self._store.kick()                        # it may have left a place to another of low priority

    # waiting

    @library_code
    def _watch(self, handle: Job[Any]) -> None:
        """Have this handle completed when its job is over, whichever process runs it."""
        self._handles.watch(handle)
        self._ensure_service()
        if self._ended and not self._store.closed:
            self._store.kick()                            # its outcome may be among those that wait for company
        handle._complete()                                # it may have ended before it was watched
        if handle._state != "PENDING":
            self._handles.forget_completed(handle.id)

    def _wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool], timeout: float | None) -> bool:
        """Return wait(timeout), called inside a job while its worker's place is given away. In drain(), jobs run here
        meanwhile."""
        if not self._inline:
            with self._pool.away(attempt):
                return wait(timeout)
        begun = idle_since = time.monotonic()
        clock = self._clock()
        while not wait(0):
            if timeout is not None and time.monotonic() - begun >= timeout:
                return False
            if self._run_one() or self._clock() != clock:
                idle_since, clock = time.monotonic(), self._clock()
            elif time.monotonic() - idle_since > STANDING_CLOCK_SECONDS:
                raise RuntimeError(f"job {attempt.id} waits for what is not due yet, and the clock of this runner "
                                   "stands")
            self._handles.look()
            wait(0.01)
        attempt.waited += time.monotonic() - begun
        return True

    def _exception_of(self, job_id: int, row: sqlite3.Row) -> BaseException:
        number, own = self._exceptions.get(job_id, (0, None))
        if own is not None and number == row["attempt"]:
            return own
        error = json.loads(row["error"]) if row["error"] else {"type": "", "text": "", "traceback": ""}
        return JobFailed(f"job {job_id} ({row['name']})", error["type"], error["text"], error["traceback"])

    # starting

    @library_code
    def start(self) -> Runner:
        """Take back what a dead process left behind, and begin to run jobs. Returns the runner.

        In a forked child it opens the file anew first. In the process of an isolated attempt, whose function's modules
        may call it, it does nothing. Raises OSError: the address given as callback= cannot be used.
        """
        if _serves_attempts:
            return self
        if self._store.forked:
            self._open()
        if self._shut:
            raise RuntimeError(f"the runner on {self.path} is shut down; make a new one")
        if not self._started:
            if self._callback_address is not None:
                self._callback.listen()                   # now: later nobody would hear of an address that is taken
            _capture_log_records()
            self._recover_dead()
            self._started = True
            keep_house(self)
            self._ensure_service()
            self._store.kick()
        return self

    def _register(self) -> tuple[int, int]:
        """Enter this runner in the file. Returns its id, and the lowest that its jobs may have."""
        def register(tx: Transaction) -> tuple[int, int]:
            runner_id = self._save_runner(tx, None)
            # Its lock is held before anybody can see the row. A runner on a deleted file of this name may have that.
            while not self._presence.appear(runner_id):
                tx.execute(REMOVE_RUNNER, {"id": runner_id})
                runner_id = self._save_runner(tx, None)   # a higher one
            return runner_id, tx.value(NEXT_ID)
        registered: tuple[int, int] = self._store.write(register)
        return registered

    def _save_runner(self, tx: Transaction, runner_id: int | None) -> int:
        """Write this runner's row, with the time as its heartbeat, for people to see. Returns its id; None gets it a
        new one."""
        import socket
        cursor = tx.execute(SAVE_RUNNER, {
            "id": runner_id, "pid": os.getpid(), "host": socket.gethostname(), "workers": self.max_workers,
            "now": tx.now, "abandoned": self._pool.abandoned, "lock_file": self._presence.file_id()})
        return runner_id or cursor.lastrowid or 0

    def _recover_dead(self) -> None:
        """Take the jobs of dead runners back, as `_Presence` tells them."""
        presence = self._presence
        if presence.reassert():
            self._store.write(lambda tx: self._save_runner(tx, self._id))
        lock_file, now = presence.file_id(), self._clock()
        # A runner whose row names another lock file may not have noticed yet that its own was deleted: give it time.
        judged = {row[0] for row in self._store.read(LOCK_FILES)
                  if row[1] in (None, lock_file) or now - row[2] > 3 * HEARTBEAT_SECONDS}
        judged.update(row[0] for row in self._store.read(ORPHANED))
        for runner in filter(presence.is_dead, judged - {self._id}):
            taken = self._store.write(lambda tx: tx.recover(runner))
            if taken:
                _say(logging.WARNING, f"took back {taken:,} jobs of a process that died")

    def _ensure_service(self) -> None:
        with self._handles.lock:
            if self._service is None or not self._service.alive:
                self._service = _Service(self)

    def _nudge_service(self) -> None:
        if self._service is not None:
            self._service.nudge_soon()

    def backup(self, path: str | os.PathLike[str]) -> str:
        """Copy the job file as it is at this moment to a new file, while it is in use; return its path. (A plain copy
        would miss what is in the -wal file, or tear a transaction.) ValueError: the path exists."""
        self._store.backup(os.path.abspath(path))
        return os.path.abspath(path)

    def drain(self) -> int:
        """Run what is ready in this thread until nothing is; return how many attempts ran. For the tests of an app.

        RuntimeError: the runner has been started.
        """
        if self._started:
            raise RuntimeError("drain() is for a runner that was made with start=False; this one runs its jobs itself")
        _capture_log_records()
        self._recover_dead()
        self._store.write(clock_was_set_back)      # a clock for tests may have been
        self._inline, ran = True, 0
        try:
            while self._run_one():
                ran += 1
        finally:
            self._inline = False
        return ran

    def _run_one(self) -> bool:
        def claim(tx: Transaction) -> list[Claim]:
            run_schedules(tx)
            tx.wake_due()
            return tx.claim(self._id, 1, 1, 0, 0.0, 1, self._costs)
        rows = self._store.write(claim)
        for row in rows:
            attempt = self._attempts[row.id] = Attempt(self, row)
            if attempt.options.get("timeout"):
                self._ensure_service()                    # which watches the time
            self._execute(attempt)
            self._settle(attempt)
            self._store.kick()
            self._flush_reports()
        return bool(rows)

    def _flush_reports(self) -> None:
        """Write how far the executing attempts are, what was logged, and what they cost beyond their charge, lest their
        roots look idle."""
        now = time.monotonic()
        executing = [attempt for attempt in list(self._attempts.values()) if attempt.thread is not None]
        reports = [(attempt, report) for attempt in executing if (report := attempt.report_to_save()) is not None]
        charges = [(attempt, more) for attempt in executing
                   if (more := int((now - attempt.begun - attempt.waited) * 1e6) - attempt.charge) > 1_000_000]

        def save(tx: Transaction) -> None:
            for attempt, report in reports:
                tx.save_progress(attempt, report)
            for attempt, more in charges:
                tx.add_charge(attempt, more)
        if reports or charges:
            self._store.write(save)
        self._write_lines()
        dropped, self._unwritten.dropped = self._unwritten.dropped, 0
        if dropped:
            _say(logging.WARNING, f"{dropped:,} log lines of jobs were dropped: they came faster than the disk takes "
                 "them, or could not be stored")

    def _write_lines(self) -> None:
        """Return when the lines logged by now are in the file. Each transaction takes some along."""
        for _ in range(len(self._unwritten.lines) // LINES_A_WRITE + bool(self._unwritten)):
            self._store.write(_do_nothing)

    # going down

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs. wait=True: return when no job submitted through this runner, nor a descendant of one, is
        ready or running; then close. cancel_futures: cancel those that are pending."""
        with contextlib.suppress(StoreError):
            self._shut = True
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):         # it ends the `with` block of this runner
                self._interrupted_at = time.monotonic()
            if cancel_futures:
                self._cancel_pending()
            if self._started and not wait:
                threading.Thread(target=self.shutdown, name="bgjobs-shutdown", daemon=True).start()
                return
            if self._started:
                self._wait_for_own()
                self._handles.wait_for_callbacks()
            self.close()

    def _cancel_pending(self) -> None:
        after = 0
        while rows := self._store.read(MY_PENDING, {"submitter": self._id, "after": after}):
            for row in rows:
                with contextlib.suppress(InvalidOperation, KeyError):
                    self._operate("cancel", row["id"], None)
            after = rows[-1]["id"]

    def _wait_for_own(self) -> None:
        """Wait until nothing that was submitted through this runner is ready or running."""
        after = self._first_id
        while True:
            parameters = {"submitter": self._id, "after": after}
            found = [row["id"] for sql in UNFINISHED_QUERIES for row in self._store.read(sql, parameters)]
            if found:
                after = min(found)
                time.sleep(0.01)
            elif after > self._first_id:
                after = self._first_id                    # once more from the start: an older one may have been resumed
            else:
                return

    @library_code
    def close(self, timeout: float = GRACE_SECONDS) -> None:
        """Go down: running jobs are asked to pause at their next checkpoint and go back to pending with their state.

        They continue at the next start. timeout: seconds until those that reached none are given back, too; what they
        still do then changes nothing in the file.
        """
        with self._close_lock:
            if not self._store.closed:
                self._store.close_by = time.monotonic() + timeout
                self._close()
                for attempt in list(self._attempts.values()):
                    attempt.supersede()                   # it has been given back: another process may run the job now

    def _close_at_exit(self) -> None:
        while not self._store.closed and self._close_lock.acquire(timeout=self._time_to_close(1.0, math.inf)):
            try:
                if not self._store.closed:
                    self._close()
            except KeyboardInterrupt:                     # another Ctrl-C: wait no longer
                for runner in list(_living):
                    runner._store.close_by = 0.0
            finally:
                self._close_lock.release()

    def _close(self) -> None:
        """Go down in order. Running jobs get until store.close_by, the rest takes a moment."""
        self._pause()
        with contextlib.suppress(StoreError):
            self._store.write(_do_nothing)                # who leads now may be claiming still: after this nobody is
        self._pause()                                     # what was claimed meanwhile
        with contextlib.suppress(StoreError):
            self._give_back(self._pool.take_back())
            while self._attempts and time.monotonic() < self._store.close_by:
                time.sleep(0.005)
            self._flush_reports()
        means = self._costs.take_changed()

        def leave(tx: Transaction) -> None:
            for job in tx.owned(self._id):
                tx.take_back(job.id, "its process was closed", tx.now)
            tx.executemany(SAVE_COST, means)
            tx.remove_runner(self._id)
        self._store.close(leave)
        self._callback.close()
        for engine in self._engines.values():
            engine.close()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self._service is not None:
            self._service.end(self._time_to_close(0.8, 1.0))
        self._presence.vanish(self._id)                   # after that thread, which would open the lock file again
        self._pool.close(self._time_to_close(0.8, 0.2))
        self._handles.close()

    @property
    def _goes_down(self) -> bool:
        """Whether what took an attempt's process away, like Ctrl-C, is ending this process, too."""
        return self._shut_claims or time.monotonic() < self._interrupted_at + 2 * INTERRUPT_SECONDS

    def _pause(self) -> None:
        """Claim nothing more, and ask the running jobs to pause at their next checkpoint."""
        self._shut = self._shut_claims = True
        for attempt in list(self._attempts.values()):
            attempt.request_stop(RELEASED)

    def _give_back(self, claims: list[Attempt]) -> None:
        """Return claims that have not begun: as outcomes like others, which count as no attempt."""
        self._ended.extend(claims)
        self._store.kick()

    def _time_to_close(self, extra: float, most: float) -> float:
        """Return the seconds left until `extra` seconds after store.close_by, at most `most`."""
        return max(0.0, min(most, self._store.close_by + extra - time.monotonic()))

    def _leave_to_parent(self) -> None:
        """In a forked child: leave threads, locks and connections to the parent. Only start() makes this runner work
        again."""
        self._store.leave_to_parent()
        self._callback.leave_to_parent()
        self._handles.leave_to_parent()
        self._pool.forked, self._started = True, False
        self._close_lock, self._service = threading.Lock(), None
        self._attempts, self._servers = {}, []

    # retention

    def prune(self, finished: float = RETENTION["finished"], failed: float = RETENTION["failed"]) -> int:
        """Remove whole trees that are over for so many seconds (cancelled ones as finished), with their logs; return
        how many jobs that were. In many short transactions; in a job each is followed by a checkpoint."""
        return remove_expired(self, finished, failed)

    # statistics

    def stats(self, window: str = "24h", name: str | None = None) -> dict[str, Any]:
        """Return what was counted in a window: "1h", "24h", "7d" or "30d", of all functions or of one; system jobs
        are not.

        {"window", "name", "from", "to", "parts": [{"at", "created", "started", "finished", "failed", "waiting",
        "running"}], "total": the same over all parts, "functions": [the same for each "name"]}. from, to and at are
        Unix seconds. waiting, from its creation or due time to a job's start, and running, until its end, are {"avg",
        "min", "max"} in seconds, or None.
        """
        return read_statistics(self, window, name)

    # the page

    def serve(self, /, host: str = "127.0.0.1", port: int = 8765, **options: Any) -> str:
        """Serve the status page in a thread of its own; return its URL. port=0 takes a free one.

        read_only=True: without operations. password: asked for by the browser (HTTP Basic, which TLS has to hide on its
        way through a network). authorize: a function of the request, its WSGI environ, that returns the user's name, or
        None for one who may not come; the job log's `by` has that name, or the one given with the password. hosts: the
        names by which it is reached, besides the machine's own and its addresses. ValueError: a host other than
        loopback without password or authorize. A port that is taken is a warning, and "" is returned: jobs go on.
        """
        return "" if _serves_attempts else serve_page(Page(self, **options), host, port)

    def wsgi(self, /, **options: Any) -> Page:
        """Return the status page as a WSGI app, to mount under any prefix of the app's own server.

        The options are those of `serve`. Without password and authorize, who may see it is up to the app; then hosts
        names what it answers to besides loopback (["example.org"]).
        """
        return Page(self, **options)




def _checked_tuple(args: Any) -> tuple[Any, ...]:
    if not isinstance(args, tuple):
        raise TypeError(f"submit_many takes tuples of arguments, got {_short(args)}; write (value,) for a single "
                        "argument")
    return args


def _frames_of(error: BaseException) -> types.TracebackType | None:
    """Return error.__traceback__, whatever the exception's class has made of that."""
    frames: types.TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return frames


def _is_stop(error: BaseException) -> bool:
    """Tell whether an exception is JobStopped, or a group of nothing else, as asyncio.TaskGroup makes of it (since
    Python 3.11)."""
    group: Any = getattr(builtins, "BaseExceptionGroup", ())
    errors = [error]
    for one in errors:                                    # it grows
        if issubclass(type(one), group):
            errors += group.exceptions.__get__(one)
    return all(issubclass(type(one), (JobStopped, group)) for one in errors)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback as text, whatever the exception's own methods do; our own frames are left out."""
    frames = _frames_of(error)
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None:
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    except BaseException:
        return f"{type(error).__qualname__} (its traceback cannot be printed)"


# ---- 17 Clock, processes and exit -----------------------------------------------------------------------------

class _Service:
    """The thread for what no caller triggers: due times, the doings of other processes, log lines, progress, recovery.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, store = runner, runner._store
        self._event = _Event()                            # there is something to do before the next poll
        self._soon = False                                # to lead a transaction, in SETTLE_SECONDS
        self._version = -1                                # of the file, at the last poll
        self._clock_at = runner._clock()                  # Unix seconds; what the clock showed at the last poll
        self._due_at: float | None = None                 # Unix seconds; of the next job or schedule,
        self._look_at_due = True                          # unless that is to be looked up
        self._abandoned_shown = 0                         # threads, in the runner's row
        # (every so many seconds, duty); the second list is for a runner that has been started.
        self._duties: list[tuple[float, Callable[[], Any]]] = [
            (0.0, self._cancel_given_up), (0.0, runner._pool.put), (0.0, self._return_stuck_claims),
            (0.0, self._time_out), (FLUSH_SECONDS, runner._flush_reports)]
        self._duties_when_started: list[tuple[float, Callable[[], Any]]] = [
            (0.0, self._wake_due), (0.5, self._recover_dead), (1.0, self._show_abandoned), (1.0, self._save_means),
            (1.0, self._compare_with_file), (1.0, self._unpark), (HEARTBEAT_SECONDS, self._beat),
            (60.0, store.shorten_wal), (60.0, functools.partial(count_created, runner))]
        now = time.monotonic()
        self._done_at = {duty: now for _, duty in self._duties + self._duties_when_started}
        self._thread = threading.Thread(target=self._run, name="bgjobs-service", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self, seconds: float) -> None:
        """Wait some seconds for the thread to end, unless it goes on watching handles for others; the store is closed.
        """
        self._event.set()
        if self._thread is not threading.current_thread() and not self._runner._handles.ids():
            self._thread.join(seconds)

    def nudge_soon(self) -> None:
        """Have the thread lead a transaction in SETTLE_SECONDS."""
        if not self._soon:
            self._soon = True
            self._event.set()

    def _run(self) -> None:
        runner, store = self._runner, self._runner._store
        next_poll, db = 0.0, None
        try:
            while not store.closed or runner._handles.watched:
                self._event.wait(max(0.0, next_poll - time.monotonic()))
                self._event.clear()
                try:
                    if self._soon:
                        time.sleep(SETTLE_SECONDS)
                        self._soon = False
                        store.kick()
                    if time.monotonic() >= next_poll:
                        next_poll = time.monotonic() + POLL_SECONDS
                        with _fork_gate:
                            db = db or store.connect()
                            version = db.execute("PRAGMA data_version").fetchone()[0]
                        self._poll(version)
                        if self._due_at is not None and (left := self._due_at - runner._clock()) > 0:
                            next_poll = min(next_poll, time.monotonic() + left)
                except Exception as error:
                    if not store.closed:
                        store.complain(f"{error}; trying again")
                        time.sleep(0.2)
        finally:
            if db is not None:
                db.close()

    def _poll(self, version: int) -> None:
        """Take notice of what others have written, then do what is due. `version` changes with every commit, ours
        included."""
        runner, store, handles = self._runner, self._runner._store, self._runner._handles
        changed, self._version = version != self._version, version
        self._look_at_due |= changed
        if store.closed:
            handles.look()
            return
        if store.cut_short:
            store.cut_short, handles.ends_missed = False, True
            store.write(_do_nothing)                      # takes the lead over, should Ctrl-C have lost it
        if changed and store.changed_by_others():
            handles.ends_missed = True
        if handles.ends_missed:
            self._compare_with_file()
            handles.look()
        for seconds, duty in self._duties + self._duties_when_started if runner._started else self._duties:
            now = time.monotonic()
            if now - self._done_at.get(duty, -math.inf) >= seconds:
                self._done_at[duty] = now
                duty()

    # its duties

    def _compare_with_file(self) -> None:
        """Find what other processes did to the jobs that run here, and claims that were lost to Ctrl-C right after
        their commit."""
        runner = self._runner
        attempts = list(runner._attempts.values())
        if not (attempts or runner._started):
            return
        owned = {row["id"]: row for row in runner._store.read(OWNED, {"owner": runner._id})}
        differs = any(map(self._is_lost, owned))
        for attempt in attempts:
            row = owned.get(attempt.id)
            if row is None or row["attempt"] != attempt.number:
                differs = True
            elif row["status"] == STOPPING:
                attempt.request_stop()
            elif row["low_priority"] != attempt.low_priority:
                runner._pool.set_low_priority(attempt, row["low_priority"])
        if differs:
            runner._store.write(self._settle_differences)

    def _is_lost(self, job_id: int) -> bool:
        """Return whether a job that this runner has claimed is on no way here: neither waiting, nor executing, nor
        ended."""
        runner = self._runner
        attempt = runner._attempts.get(job_id)
        if attempt is None:
            return runner._started                        # in drain(), it is about to execute
        on_its_way = time.monotonic() - attempt.claimed_at < 1.0
        return not (on_its_way or runner._pool.has(attempt) or attempt in runner._ended)

    def _settle_differences(self, tx: Transaction) -> None:
        """Give lost claims back, and abandon superseded attempts. While this thread leads, no claim and no outcome is
        under way."""
        runner, numbers = self._runner, {}
        for job in tx.owned(runner._id):
            if self._is_lost(job.id):
                tx.take_back(job.id, "its claim was lost", tx.now)
            else:
                numbers[job.id] = job.attempt

        def abandon() -> None:
            for attempt in list(runner._attempts.values()):
                if numbers.get(attempt.id) != attempt.number and attempt not in runner._ended:
                    runner._abandon(attempt)
        tx.after_commit.append(abandon)

    def _cancel_given_up(self) -> None:
        to_cancel = self._runner._handles.to_cancel
        while not to_cancel.empty():
            to_cancel.get().cancel()

    def _return_stuck_claims(self) -> None:
        """Give claimed jobs back that wait behind attempts which turned out long."""
        stuck = self._runner._pool.take_back_stuck()
        if stuck:
            self._runner._give_back(stuck)

    def _time_out(self) -> None:
        """Stop the attempts that take longer than their timeout. One that reaches no checkpoint within the grace has
        failed then, and goes on without a job."""
        runner, now = self._runner, time.monotonic()
        for attempt in list(runner._attempts.values()):
            if attempt.thread is None or not attempt.options.get("timeout"):
                continue
            late = now - attempt.begun - attempt.options["timeout"]
            if late > GRACE_SECONDS and attempt.reason == TIMED_OUT:
                runner._store.write(functools.partial(self._fail_late, attempt))
            elif late > 0 and attempt.reason == HALTED:
                attempt.request_stop(TIMED_OUT, force=True)

    def _fail_late(self, attempt: Attempt, tx: Transaction) -> None:
        """Record the failure of an attempt that still executes."""
        lost = copy.copy(attempt)
        lost.ran = time.monotonic() - attempt.begun
        lost.worked = max(0.0, lost.ran - lost.waited)
        lost.fail(attempt.took_too_long)
        if tx.finish_superseded(lost):
            self._runner._remember_exception(lost)
            tx.after_commit.append(lambda: self._runner._abandon(attempt))

    def _wake_due(self) -> None:
        """Make ready what is due. What is due next is looked up only when that may have changed."""
        store, before, self._clock_at = self._runner._store, self._clock_at, self._runner._clock()
        if self._clock_at < before - 1.0:
            store.write(clock_was_set_back)
        if self._look_at_due:
            due = [store.read(sql)[0][0] for sql in (NEXT_DUE, NEXT_SCHEDULE)]
            self._due_at = min((at for at in due if at is not None), default=None)
            self._look_at_due = False
        if self._due_at is not None and self._due_at <= self._clock_at:
            store.write(self._make_due_ready)

    def _make_due_ready(self, tx: Transaction) -> None:
        if not self._runner._shut:
            run_schedules(tx)
        tx.wake_due()

    def _recover_dead(self) -> None:
        self._runner._store.check_file()                  # first: raises
        self._runner._recover_dead()

    def _show_abandoned(self) -> None:
        if self._runner._pool.abandoned != self._abandoned_shown:
            self._beat()

    def _beat(self) -> None:
        self._abandoned_shown = self._runner._pool.abandoned
        self._runner._store.write(lambda tx: self._runner._save_runner(tx, self._runner._id))

    def _save_means(self) -> None:
        if self._runner._costs.changed:
            means = self._runner._costs.take_changed()
            self._runner._store.write(lambda tx: tx.executemany(SAVE_COST, means))

    def _unpark(self) -> None:
        """Make ready the jobs whose function this process knows; and those a limit held up, in case its end went
        unnoticed."""
        store = self._runner._store
        for (key,) in store.read(PARKED_KEYS):
            kind, _, name = key.partition(" ")
            if kind != "function":
                store.write(lambda tx: tx.unpark_next(key))
            elif _registry.find(name) is not None:
                engine = self._runner._engine_for(name)
                while (engine is None or not engine.is_broken) and store.write(lambda tx: tx.unpark(key)):
                    pass


class _Presence:
    """Knows which runners on a file are alive, by operating-system locks that die with their process.

    The process of runner N locks byte N of PATH-bgjobs-lock. A process must never probe its own bytes: it would get
    them. So there is one descriptor per file and process, shared by all copies of this module (see `_presence`).
    Classic POSIX locks are dropped when the app closes any descriptor of the file, as copying the folder does. Linux's
    locks of open files are not, but a forked child has to close its copy of the descriptor.
    """

    def __init__(self, path: str) -> None:
        self._path = path                                 # of the job file
        self._lock = threading.Lock()                     # guards the two below
        self._opened: int | None = None                   # the descriptor of the lock file, opened when needed
        self._own: set[int] = set()                       # runners of this process

    def _descriptor(self) -> int:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> int:
        """Open the lock file, which whoever may use the job file may use, too."""
        try:
            descriptor = os.open(self._path + "-bgjobs-lock", os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(OSError, AttributeError):    # it is another's, who has done so; Windows
                os.fchmod(descriptor, os.stat(self._path).st_mode & 0o777)
        except OSError as error:
            raise StoreError(f"cannot open {self._path}-bgjobs-lock, whose locks tell which processes live: "
                             f"{error.strerror}; make it and its folder writable for all who use the job "
                             "file") from error
        return descriptor

    def _close(self) -> None:
        """Drop all locks."""
        if self._opened is not None:
            os.close(self._opened)
        self._opened = None

    def appear(self, runner: int) -> bool:
        """Take the lock of a new runner of this process. False: another process holds it."""
        with self._lock:
            try:
                if runner in self._own or not _lock_byte(self._descriptor(), runner):
                    return False
            except OSError as error:
                raise StoreError(f"cannot lock {self._path}-bgjobs-lock, which tells whether this process lives: "
                                 f"{error.strerror}; put the job file on a local disk") from error
            self._own.add(runner)
            return True

    def vanish(self, runner: int) -> None:
        """Release the lock of a runner of this process."""
        with self._lock:
            self._own.discard(runner)
            if self._own:
                _lock_byte(self._descriptor(), runner, lock=False)
            else:
                self._close()

    def is_dead(self, runner: int) -> bool:
        """Return whether no process holds the lock of this runner."""
        with self._lock:
            if runner in self._own or not _lock_byte(self._descriptor(), runner):
                return False
            _lock_byte(self._descriptor(), runner, lock=False)
            return True

    def file_id(self) -> str:
        """Return what distinguishes the lock file from a later one of the same name."""
        with self._lock:
            found = os.fstat(self._descriptor())
            return f"{found.st_dev}:{found.st_ino}"

    def reassert(self) -> bool:
        """Take the locks of this process again, since classic ones get dropped. True: the file had been deleted; they
        are on a new one now."""
        if os.name == "nt":                               # neither can happen there
            return False
        with self._lock:
            try:
                lost = not os.path.samestat(os.stat(self._path + "-bgjobs-lock"), os.fstat(self._descriptor()))
            except FileNotFoundError:
                lost = True
            if lost:
                fresh = self._open()
                self._close()
                self._opened = fresh
            for runner in self._own:
                _lock_byte(self._descriptor(), runner)
            return lost

    def leave_to_parent(self) -> None:
        """In a forked child: keep nothing locked."""
        with contextlib.suppress(OSError):
            self._close()


def _lock_byte(descriptor: int, byte: int, lock: bool = True) -> bool:
    """Lock a byte of a file, or unlock it. False: another process holds it."""
    try:
        if os.name == "nt":
            import msvcrt
            os.lseek(descriptor, byte, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK if lock else msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
            return True
        import fcntl
        import struct
        if hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("P") == 8:      # Linux: not the process's locks
            flock = struct.pack("hhqqi4x", fcntl.F_WRLCK if lock else fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if lock else fcntl.LOCK_UN, 1, byte)
        return True
    except (BlockingIOError, PermissionError):
        return False


def _presence(path: str) -> _Presence:
    """Return the one for a file; the same for all copies of this module in this process, by way of sys.modules."""
    shared = sys.modules.setdefault("_bgjobs_presence", types.ModuleType("_bgjobs_presence"))
    files = vars(shared).setdefault("files", {})
    path = os.path.realpath(path)
    presence: _Presence = files.get(path) or files.setdefault(path, _Presence(path))
    return presence


_living: weakref.WeakSet[Runner] = weakref.WeakSet()


@functools.cache
def _register_hooks() -> None:
    """Have the living runners closed when the interpreter exits, and left to the parent when the process forks."""
    atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_fork_gate.shut, after_in_parent=_fork_gate.open, after_in_child=_leave_to_parent)


def _close_all() -> None:
    close_by = time.monotonic() + GRACE_SECONDS           # one for all, also for a close() under way in another thread
    runners = [runner for runner in list(_living) if not runner._store.closed]
    for runner in runners:
        runner._store.close_by = min(runner._store.close_by, close_by)
        runner._pause()
    for runner in runners:
        try:
            runner._close_at_exit()
        except Exception as error:
            print(f"bgjobs: {error}", file=sys.stderr)


def _leave_to_parent() -> None:
    global _default_lock
    _default_lock = threading.Lock()
    _fork_gate.leave_to_parent()
    _here.ticket = None
    shared = sys.modules.pop("_bgjobs_presence", None)
    for presence in getattr(shared, "files", {}).values():
        presence.leave_to_parent()
    _links.clear()
    for runner in list(_living):
        runner._leave_to_parent()


# ---- 18 Elsewhere ---------------------------------------------------------------------------------------------
#
# An attempt may execute in another process: one of its own (isolate=True), or wherever a concurrent.futures.Executor,
# the engine, takes it (executor=). The life of such an attempt:
#
#   1. Handed over. The engine gets one call, run_attempt(payload). The payload is a JSON text: the job, the import
#      path of its function, the address of the runner's callback, a port opened for the first such attempt, and a
#      token for this attempt alone.
#   2. Hello. Each process has one connection to the callback, made for its first attempt. There the attempt says
#      hello. If the engine executes it twice, the first to do so is welcome. Now it has begun: its time runs, and its
#      function is called.
#   3. It says and asks: states, progress, log lines, children. The runner tells it unasked when it is to stop, or is
#      void (superseded).
#   4. Outcome. run_attempt returns it as a JSON text, and the engine's future brings it. The token is forgotten: what
#      still comes with it is refused as "gone".
#   5. Or loss. The engine's future brings an error: the attempt has failed, or is given back if it had not begun, or
#      if the runner goes down, too: Ctrl-C reaches all processes of a terminal, and some may tell before the runner
#      knows. A connection that is lost is made again, and the calls without an answer are repeated; by its number, the
#      runner carries each out once. When it cannot be made for RETRY_SECONDS, the attempt stops at its next checkpoint.
#
# Lines of JSON go both ways:
#
#   there -> runner    [token, number, call, argument...]
#   runner -> there    [number, value], or [number, null, type of an error, its text]; unasked: [0, token, news, value]
#
# Hosts and guests. An attempt that waits for another job gives its place away, but the engine counts its process as
# taken. So the process executes what gets the place: the attempt says "leave", and is a host. The next attempt for
# this engine goes to a host, if there is one, as the news "run", with the payload that the engine would get. This
# guest runs in a thread of its own, says hello like any other, and "ended", with its outcome. When the host goes on
# it says "ask_back", which is answered as soon as it has a place. So that no job waits for a process in vain: an
# attempt without a place, and without a guest that has not ended, is always among the hosts; and a new host takes
# over what its engine has queued. That may begin in both places: the first to say hello executes it.

RETRY_SECONDS = 10.0               # that a lost connection is tried again, before both sides give up
INTERRUPT_SECONDS = 1.0            # that what is lost waits for the runner to go down: it is given back then
STRANGER_SECONDS = 10.0            # in which a connection has to show a token
STRANGER_BYTES = 4_096             # that it may send before
ACCEPTED_AT_ONCE = 10              # far fewer than STRANGERS: else many processes that come at once displace each other
STRANGERS = 100                    # connections that have shown none; one more, and the oldest is closed
TELL_SECONDS = 0.25                # between two reports of progress, log lines and positions
COLLECT_SECONDS = 0.0002           # for each attempt under way, that states wait for company in the next transaction
COLLECT_AT_MOST = 0.02             # of this in all
BROKEN_SECONDS = 10.0              # until an executor that takes nothing is tried again
# Calls that must not be carried out again when they are repeated.
ONCE = ("submit", "operate", "leave", "ask_back", "ended")
REPLIES_KEPT = 100                 # of an attempt, for such repetitions
WARM_PROCESSES = 8                 # of isolated attempts, that wait for the next one
GONE = (None, "gone", "")          # the answer to who has been superseded, or is unknown
OUTCOME = ("outcome", "result", "error", "ran", "waited", "worked")       # of an attempt: what its runner takes over


class Lines:
    """Takes apart what is received: each line is a message, as JSON."""

    def __init__(self) -> None:
        self.unread = bytearray()                         # of a line whose end has not come yet

    def take(self, received: bytes) -> list[Any]:
        """Return the messages that are complete now. ValueError, RecursionError: one is no JSON."""
        self.unread += received
        if b"\n" not in received:
            return []
        *lines, self.unread = self.unread.split(b"\n")
        return [json.loads(line.decode()) for line in lines]


def _as_line(*message: Any) -> bytes:
    return _dump(message).encode() + b"\n"


def _can_read(source: Any, seconds: float) -> bool:
    """Wait until a socket or a pipe has something to read, or its end, for so many seconds at most."""
    import selectors
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _start_thread(name: str, run: Callable[..., None], *args: Any) -> threading.Thread:
    """Start a thread that belongs to no job, a daemon where the interpreter allows them: a subinterpreter does not."""
    for daemon in (True, False):
        with contextlib.suppress(RuntimeError):
            thread = threading.Thread(target=contextvars.Context().run, args=(run, *args), name=name, daemon=daemon)
            thread.start()
            return thread
    raise RuntimeError("no thread can be started")


# Engines.

class Engine:
    """An executor of a runner: one that the app made, or what makes one, which then also replaces a broken one."""

    def __init__(self, executor: Any) -> None:
        # None: the app has made it, and another cannot be made.
        self._make = executor if isinstance(executor, type) or not hasattr(executor, "submit") else None
        self._executor: Any = None if self._make is not None else executor
        self._broken_until = -math.inf                    # monotonic
        self.has_worked = False                           # an attempt has begun there, since it was made
        self.hosts: dict[Departed, None] = {}             # a set in order

    @property
    def is_broken(self) -> bool:
        """Whether it took nothing lately."""
        return time.monotonic() < self._broken_until

    def note_broken(self) -> None:
        """Send nothing there for BROKEN_SECONDS."""
        self._broken_until = time.monotonic() + BROKEN_SECONDS

    def submit(self, payload: str) -> Any:
        """Return the executor's future. Raises what the executor does when it takes nothing."""
        if self._executor is not None:
            try:
                return self._executor.submit(run_attempt, payload)
            except Exception:
                if self._make is None:
                    raise
        self._executor, self.has_worked = self._make(), False           # type: ignore[misc]
        return self._executor.submit(run_attempt, payload)

    def take_host(self) -> Departed | None:
        """Take out a host, for the next attempt. None: there is none."""
        with contextlib.suppress(KeyError):
            return self.hosts.popitem()[0]
        return None

    def close(self) -> None:
        """Shut down the executor, if it was made here."""
        if self._make is not None and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


class IsolatedCall(Future):                               # type: ignore[type-arg]
    """A call that executes in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        # Guards the two below, and the killing: else the process could answer, and be another call's, in between.
        self._lock = threading.Lock()
        self._process: Any = None                         # while it executes the call
        self._is_unwanted = False                         # kill() was called

    def kill(self) -> None:
        """Kill its process, now or as soon as there is one; not once it has answered."""
        with self._lock:
            self._is_unwanted = True
            if self._process is not None:
                self._process.kill()

    def execute(self, process: Any, payload: str) -> bytes:
        """Have a process execute it; return the answer, a line. Else the process is not to be used again: it has
        died, or will."""
        with self._lock:
            self._process = process
            if self._is_unwanted:                         # kill() came before there was a process
                process.kill()
        answer = b""
        with contextlib.suppress(OSError):
            process.stdin.write(payload.encode() + b"\n")
            process.stdin.flush()
            answer = self._answer_of(process)
        with self._lock:
            self._process = None
            # Unwanted: kill() came after the answer, or cut it short. The process dies either way.
            return answer if answer.endswith(b"\n") and not self._is_unwanted else b""

    @staticmethod
    def _answer_of(process: Any) -> bytes:
        """Wait for a process's answer; b"": it has died. What it forked may live on with its pipes, so their end does
        not tell."""
        while os.name != "nt" and not _can_read(process.stdout, 0.5):
            # It may have answered between the two, and then died.
            if process.poll() is not None and not _can_read(process.stdout, 0):
                return b""
        answer: bytes = process.stdout.readline()
        return answer


class IsolatedProcesses(Executor):
    """Makes each call in a process of its own: started fresh, never forked, and kept for another one after a call
    that has left no thread behind."""

    def __init__(self) -> None:
        self._warm: list[Any] = []                        # processes; list.append and pop need no lock
        self._calls: set[IsolatedCall] = set()            # under way

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> IsolatedCall:
        """Have a process execute a payload, the one argument of `run_attempt`. Returns at once."""
        call = IsolatedCall()
        self._calls.add(call)
        _start_thread("bgjobs-isolated", self._make, call, *args)
        return call

    def _make(self, call: IsolatedCall, payload: str) -> None:
        """Make a call, in a thread of its own."""
        try:
            if not call.set_running_or_notify_cancel():
                return
            process = self._warm_process() or self._start()
            answer = call.execute(process, payload)
            if not answer:
                self._end(process)
                code = process.returncode
                how = f"exit code {code}" if code >= 0 else f"signal {-code}"
                raise BgjobsError(f"the process of its own died under it: {how}")
            is_clean = answer.startswith(b"+")
            stays_warm = is_clean and len(self._warm) < WARM_PROCESSES
            if stays_warm:
                self._warm.append(process)                # first: who gets the result may make the next call
            call.set_result(answer[1:].decode())
            if not stays_warm:
                self._end(process, kill=is_clean)         # one with threads left ends with them
        except Exception as error:
            call.set_exception(error)
        finally:
            self._calls.discard(call)

    @staticmethod
    def _end(process: Any, kill: bool = True) -> None:
        """Kill a process, or wait until it ends by itself."""
        if kill:
            process.kill()
        with contextlib.suppress(OSError), process:       # its pipes are closed, and it has ended
            pass

    def _warm_process(self) -> Any:
        """Return a process that waits for a call, or None."""
        with contextlib.suppress(IndexError):
            while True:
                process = self._warm.pop()
                if process.poll() is None:
                    return process
                self._end(process)                        # somebody has killed it
        return None

    @staticmethod
    def _start() -> Any:
        """Start a process that imports this module, and nothing of the app."""
        import subprocess
        folder = [os.path.dirname(os.path.abspath(__file__))] if __name__ == "__main__" else []
        code = "import json, sys; path, name = json.loads(sys.argv[1]); sys.path[:] = path; sys.argv[1:] = []; " \
               "__import__('importlib').import_module(name).serve_process()"
        command = [sys.executable, "-c", code, json.dumps([sys.path + folder, _module_name(__name__)])]
        # Popen waits for the end of a pipe; who is forked meanwhile would keep it open.
        with _fork_gate:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    start_new_session=True)       # Ctrl-C in a terminal is for the app, which tells us

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Kill all processes, whatever they do. Waits for the warm ones to end."""
        for call in list(self._calls):
            call.kill()
        while self._warm:
            self._end(self._warm.pop())


def serve_process() -> None:
    """Execute the attempts whose payloads come on standard input, a line each; be a process of IsolatedProcesses."""
    global _serves_attempts
    _serves_attempts = True
    _start_thread("bgjobs-parent", _end_with, os.getppid())
    payloads, outcomes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)                                         # what functions print
    for payload in payloads:
        outcome = run_attempt(payload.decode())
        is_clean = all(thread is threading.current_thread() or thread.name.startswith("bgjobs-")
                       for thread in threading.enumerate())
        outcomes.write((b"+" if is_clean else b"-") + outcome.encode() + b"\n")
        outcomes.flush()
        if not is_clean:
            return


def _end_with(parent: int) -> None:
    """End when the runner's process does. (A forked process of the app may keep our standard input open.)"""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# This process: then it runs no jobs of its own, whatever the app's modules start.
_serves_attempts = False


# The runner's side.

class Departed(Attempt):
    """An attempt that executes elsewhere, as its runner sees it. The pool gives it a place like any other, but no
    thread."""

    engine: Engine
    future: Any = None                                    # the engine's, if it went there
    host: Departed | None = None                          # in whose process it executes, or is to, as a guest
    run: str | None = None                                # the execution of it that has said hello
    caller: _Caller | None = None                         # the connection of its process, if there is one now
    loss: dict[str, Any] | BaseException | None = None    # what cut it off: the runner may be about to go down, too
    _report: Report | None = None                         # the last that has not been saved

    def __init__(self, runner: Runner, claim: tuple[Any, ...], engine: Engine) -> None:
        super().__init__(runner, claim)
        self.engine, self.token = engine, os.urandom(16).hex()
        self.claim = claim[:-1]
        self.replies: dict[int, Future[Any]] = {}         # to calls of ONCE, by their numbers

    def request_stop(self, reason: str = HALTED, force: bool = False) -> None:
        """Have JobStopped raised at the next checkpoint over there; what has not begun is taken back."""
        super().request_stop(reason, force)
        if self.stop_requested:
            self.runner._callback.stop(self)

    def report_to_save(self) -> Report | None:
        """Return the progress that has been told since it was last asked for, or None."""
        report, self._report = self._report, None
        return report

    def hear(self, lines: list[list[Any]], report: list[Any] | None, positions: str | None) -> None:
        """Take over what the attempt has logged and reported. Written with the next transaction, within a second."""
        runner = self.runner
        if runner._attempts.get(self.id) is not self:
            return
        for line in lines:
            runner._unwritten.add_line(self, *line)
        if report:
            progress, rate, *rest = report
            self._report = Report(progress, Rate(*rate), *rest)
        if positions:
            self._loop_positions = json.loads(positions)

    def take_over(self, outcome: dict[str, Any]) -> None:
        """Make what `run_attempt` returned this attempt's outcome."""
        self.hear(*outcome["untold"])
        for name in OUTCOME:
            setattr(self, name, outcome[name])
        if outcome["was_interrupted"] and self.runner._goes_down:
            self.lose(KeyboardInterrupt())

    def lose(self, error: BaseException) -> None:
        """Make the loss of its process, which `error` tells of, this attempt's outcome."""
        if self.runner._goes_down:
            self.outcome = RELEASED if self.run else UNSPENT
        elif self.run is None and isinstance(error, BrokenExecutor):
            # Another attempt broke it, or there is something wrong with it.
            self.outcome = UNSPENT
            if not self.engine.has_worked:
                self.engine.note_broken()
        else:
            self.ran = self.worked = time.monotonic() - self.begun if self.run else 0.0
            self.fail(error)


class Place(Future):                                      # type: ignore[type-arg]
    """The place that an attempt elsewhere asks back: the answer to its call."""

    def set(self) -> None:
        """Say that it is there, as an event would. For the pool."""
        self.set_result(True)


class _Caller:
    """A connection to the callback, a protocol of asyncio's: a process in which attempts execute, or a stranger."""

    def __init__(self, callback: Callback) -> None:
        self._callback, self._lines = callback, Lines()

    @property
    def is_known(self) -> bool:
        """Whether it has shown a token."""
        return self not in self._callback.strangers

    def connection_made(self, transport: Any) -> None:
        """Begin as a stranger."""
        import socket
        self.transport = transport
        self._patience = self._callback.loop.call_later(STRANGER_SECONDS, lambda: self.is_known or transport.abort())
        self._callback.receive(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, received: bytes) -> None:
        """Heed the calls that are complete. What sends anything else is cut off."""
        try:
            messages = self._lines.take(received)
        except (ValueError, RecursionError):
            messages = [None]                             # which is no call, either
        for message in messages:
            match message:
                case [str(token), int(number), str(call), *arguments]:
                    self._callback.heed(self, token, number, call, arguments)
                case _:
                    self.transport.abort()
        if not self.is_known and len(self._lines.unread) > STRANGER_BYTES:
            self.transport.abort()

    def eof_received(self) -> None:
        """Answer what waits for a transaction before the connection is closed."""
        self._callback.save()

    def send(self, *message: Any) -> None:
        """Send a message, unless the connection is about to close. In the loop's thread; never blocks."""
        if not self.transport.is_closing():
            self.transport.write(_as_line(*message))

    def pause_writing(self) -> None:
        """Cut off a stranger who asks without end, and does not read."""
        if not self.is_known:
            self.transport.abort()

    def resume_writing(self) -> None:
        """Go on as before: nothing was held back."""

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection."""
        self._patience.cancel()                           # it would keep a flood in memory
        self._callback.strangers.pop(self, None)
        self._callback.callers.discard(self)
        self._callback.lose(self)


class Callback:
    """Where a runner hands attempts over, in one thread, since an engine may block, and where it hears of them, in
    another: an event loop's."""

    def __init__(self, runner: Runner, address: str | None) -> None:
        self._runner, self._address = runner, address
        self._attempts: dict[str, Departed] = {}          # from being handed over to the outcome, by token
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()       # for engines
        self._starting = threading.Lock()                 # guards _thread: only one is started
        self._thread: threading.Thread | None = None
        self._listener: Any = None
        self.loop: Any = None
        self.callers: set[_Caller] = set()                # these three belong to the loop's thread
        self.strangers: dict[_Caller, None] = {}          # of them; a set in order, the oldest first
        # What waits for the next transaction: (who is answered, to which call), (the attempt, its state and positions).
        self._saves: list[tuple[tuple[_Caller, int], tuple[Departed, str | None, str | None]]] = []

    # 1. handing over

    def depart(self, attempt: Departed) -> None:
        """Have an attempt executed elsewhere. From any thread; returns at once."""
        self._do(self._send_off, attempt)

    def stop(self, attempt: Departed) -> None:
        """Tell an attempt that it is to stop or void; take it back if it has not begun. From any thread; returns at
        once."""
        self._soon(self._tell_to_stop, attempt)
        self._do(self._take_back, attempt)

    def _do(self, step: Callable[[Departed], None], attempt: Departed) -> None:
        """Have the thread for engines do something."""
        self._steps.put(functools.partial(step, attempt))
        with self._starting:
            if self._thread is None:
                self._thread = _start_thread("bgjobs-departures", self._hand_over)

    def _hand_over(self) -> None:
        """Do what is to be done with engines, one after the other, until close()."""
        while (step := self._steps.get()) is not None:
            try:
                step()
            except Exception:
                _log.exception("trouble with an executor")
            del step                                      # it would keep the attempt until the next one

    def _send_off(self, attempt: Departed) -> None:
        """Hand an attempt to a host, else to its engine."""
        engine = attempt.engine
        self._attempts[attempt.token] = attempt
        if attempt.stop_requested:
            return self._end(attempt)
        if _registry.find(attempt.name) is None or engine.is_broken:
            attempt.outcome = UNKNOWN
            return self._end(attempt)
        attempt.host = engine.take_host()
        if attempt.host is not None:
            return self._soon(self._send_to_host, attempt)
        try:
            self.listen()
            attempt.future = engine.submit(self._payload(attempt))
        except Exception as error:                        # the job waits until the executor takes it
            engine.note_broken()
            text = f"its executor takes no job: {type(error).__qualname__}: {_text(error, 500)}"
            with contextlib.suppress(StoreError):
                self._runner._store.write(lambda tx: tx.log(attempt.id, logging.ERROR, text))
            _say(logging.ERROR, f"job {attempt.id} ({attempt.name}) waits: {text}")
            attempt.outcome = UNKNOWN
            return self._end(attempt)
        attempt.future.add_done_callback(functools.partial(self._come_back, attempt))
        host = engine.take_host()
        if host is not None:
            # It has come while the engine took the attempt, and may have looked for one in vain, see _offer.
            self._soon(self._offer, host)

    def _payload(self, attempt: Departed) -> str:
        """Return what `run_attempt` needs to execute an attempt, as JSON."""
        function = _registry.find(attempt.name)
        return _dump({"claim": attempt.claim, "module": _module_name(function.__module__),
                      "function": function.__qualname__,                                      # type: ignore[union-attr]
                      "callback": self._listener.getsockname()[:2], "token": attempt.token, "path": self._runner.path,
                      "runner": self._runner._id})

    def _take_back(self, attempt: Departed) -> None:
        """Cancel what has not begun; kill what has been superseded, if it has a process of its own; end what has been
        cut off."""
        if attempt.loss is not None:
            self._end(attempt, attempt.loss)
        elif attempt.host is not None:
            self._give_back(attempt)
        elif attempt.ticket.void and isinstance(attempt.future, IsolatedCall):
            attempt.future.kill()
        elif attempt.future is not None and (attempt.ticket.void or attempt.run is None):
            attempt.future.cancel()

    # 4. and 5. outcome and loss

    def _come_back(self, attempt: Departed, future: Any) -> None:
        """Take the outcome from an engine's future. Called in a thread of the engine's."""
        outcome: Any
        try:
            outcome = json.loads(future.result())
            is_cut_off = outcome["was_interrupted"]
        except CancelledError:
            outcome, is_cut_off = None, False
        except BaseException as error:                    # a process of it died, or was taken away
            outcome, is_cut_off = error, not isinstance(future, IsolatedCall)      # Ctrl-C does not reach those
        if attempt.host is not None:
            return                                        # a host has taken it from the engine
        if is_cut_off:
            # In this order: if the runner begins to go down before the look at _shut_claims, that shows it; if later,
            # it stops the attempt, and _take_back finds the loss.
            attempt.loss = outcome
            if not self._runner._shut_claims:
                return self._soon(self.loop.call_later, INTERRUPT_SECONDS, self._end, attempt, outcome)
        self._end(attempt, outcome)

    def _end(self, attempt: Departed, outcome: dict[str, Any] | BaseException | None = None) -> None:
        """End an attempt with what run_attempt returned, or with what kept it from that. None: it has not begun, and
        ends as it is."""
        if self._attempts.pop(attempt.token, None) is None:
            return                                        # somebody else has ended it: a loss, a guest, a late future
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                attempt.take_over(outcome)
        except BaseException as error:
            attempt.lose(error)
            for guest in [guest for guest in list(self._attempts.values()) if guest.host is attempt]:
                self._end(guest, error)
        attempt.thread = attempt.caller = None
        attempt.engine.hosts.pop(attempt, None)
        if attempt.host is not None and attempt.host.token in self._attempts and not attempt.host.has_place:
            self._soon(self._offer, attempt.host)
        if attempt.outcome not in (UNKNOWN, UNSPENT):
            self._runner._costs.record(attempt.name, attempt.worked)
        self._runner._pool.end(attempt)

    def lose(self, caller: _Caller) -> None:
        """Note that a connection is lost. Not every engine tells that a process of its died."""
        for attempt in [attempt for attempt in list(self._attempts.values()) if attempt.caller is caller]:
            attempt.caller = None
            if attempt.host is not None:
                self._give_back(attempt)
            self.loop.call_later(RETRY_SECONDS, self._end_if_away, attempt)

    def _end_if_away(self, attempt: Departed) -> None:
        """End an attempt whose process has not come back."""
        if attempt.caller is None:
            self._end(attempt, BgjobsError("the process that executed it is gone"))

    # hosts and guests

    def _offer(self, host: Departed) -> None:
        """Have a host's process execute what its engine has not begun, which may be what all its processes wait for;
        else what comes next. In the loop's thread."""
        if host.options.get("isolate"):
            return                                        # each of these gets a process
        # In this order: of an attempt that comes meanwhile, either _send_off sees the host, or it is seen here.
        hosts = host.engine.hosts
        hosts[host] = None
        queued = next((each for each in list(self._attempts.values()) if each.engine is host.engine
                       and each.host is None and each.run is None and each.future is not None), None)
        if queued is None or hosts.pop(host, "taken") == "taken":
            return                                        # there is none, or _send_off has given it another
        queued.host = host
        self._send_to_host(queued)
        self._do(self._cancel_queued, queued)

    @staticmethod
    def _cancel_queued(guest: Departed) -> None:
        """Have the engine forget what a host executes, unless the engine was quicker: then it is no guest any more."""
        if guest.host is not None:
            guest.future.cancel()

    def _send_to_host(self, guest: Departed) -> None:
        """Have a guest executed by its host's process."""
        guest.caller = guest.host.caller                  # type: ignore[union-attr]
        if guest.caller is None:                          # its connection has been lost meanwhile
            self._give_back(guest)
        else:
            guest.caller.send(0, guest.host.token, "run", self._payload(guest))         # type: ignore[union-attr]

    def _give_back(self, guest: Departed) -> None:
        """Have a guest handed over anew, unless it has begun."""
        if guest.run is None:
            self._end(guest)

    # 2. and 3. listening: in the loop's thread

    def listen(self) -> None:
        """Open the port, unless it is open. One that is taken may be so by the process before this one, which goes
        down: wait for that. Raises OSError, which names the address."""
        import asyncio
        import errno
        import socket
        if self.loop is not None:
            return
        address, give_up = self._address or "127.0.0.1:0", time.monotonic() + GRACE_SECONDS + 1
        host, _, port = address.rpartition(":")
        while True:
            try:
                self._listener = socket.create_server((host, int(port)))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > give_up:
                    text = f"callback {address} cannot be listened at: {error.strerror}"
                    raise OSError(error.errno, text) from error
                time.sleep(0.1)
        loop = asyncio.SelectorEventLoop()
        make_caller: Any = functools.partial(_Caller, self)      # a protocol by its looks: asyncio is imported late
        # So many are accepted before the loop reads what they say; asyncio has one parameter for this and the queue.
        server = loop.run_until_complete(loop.create_server(make_caller, sock=self._listener, backlog=ACCEPTED_AT_ONCE))
        self._listener.listen(1024)                       # the queue
        _start_thread("bgjobs-callback", self._run_loop, loop, server)
        self.loop = loop
        # The standard library's own; or the interpreter ends already.
        with contextlib.suppress(AttributeError, RuntimeError):
            register: Callable[..., None] = threading._register_atexit       # type: ignore[attr-defined]
            register(_close_before_executors, weakref.ref(self._runner))

    def _run_loop(self, loop: Any, server: Any) -> None:
        """Serve the connections until close()."""
        import asyncio
        loop.run_forever()
        loop.remove_reader(self._listener)
        if coming := asyncio.all_tasks(loop):             # connections that are accepted, but not made known yet
            loop.run_until_complete(asyncio.wait(coming))
        server.close()                                    # not before: they would stay open
        for caller in self.callers:
            caller.transport.abort()
        loop.run_until_complete(asyncio.sleep(0))         # they close
        loop.close()

    def _soon(self, step: Callable[..., None], *arguments: Any) -> None:
        """Have the loop's thread do something, if there is one. From any thread; never blocks."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):       # it is closed
                self.loop.call_soon_threadsafe(step, *arguments)

    def _tell_to_stop(self, attempt: Departed) -> None:
        """Tell an attempt that it is to stop, or void."""
        if attempt.caller is not None and attempt.run is not None:        # else it hears of it as it says hello
            attempt.caller.send(0, attempt.token, "void" if attempt.ticket.void else "stop", attempt.reason)

    def receive(self, caller: _Caller) -> None:
        """Take in a connection, which has shown no token yet; if there are too many of those, close the oldest."""
        self.callers.add(caller)
        self.strangers[caller] = None
        if len(self.strangers) > STRANGERS:
            oldest = next(iter(self.strangers))
            del self.strangers[oldest]
            oldest.transport.abort()

    def heed(self, caller: _Caller, token: str, number: int, call: str, arguments: list[Any]) -> None:
        """Carry a call out, or see to it, and answer it."""
        attempt = self._attempts.get(token)
        if attempt is not None:
            self.strangers.pop(caller, None)
        # "ended" is heeded in any case: the guest has a place, which is to become free.
        if attempt is None or call != "ended" and (
                attempt.ticket.void or call != "hello" and attempt.caller is not caller):
            caller.send(number, *GONE)
        elif call == "hello":
            caller.send(number, *self._welcome(caller, attempt, *arguments))
        elif call == "save":
            self._save_soon(caller, number, attempt, *arguments)
        elif call == "tell":
            attempt.hear(*arguments)
            self._save_soon(caller, number, attempt, None, arguments[-1])
        else:
            reply = attempt.replies.get(number) or self._carry_out(attempt, number, call, arguments)
            reply.add_done_callback(lambda reply: self._soon(self._reply, caller, number, reply))

    def _carry_out(self, attempt: Departed, number: int, call: str, arguments: list[Any]) -> Future[Any]:
        """Do what an attempt asks for; return the answer, which may be yet to come."""
        reply: Future[Any] = Future()
        try:
            value = getattr(self, "_call_" + call)(attempt, *arguments)
            if isinstance(value, Future):
                reply = value
            else:
                reply.set_result(value)
        except BaseException as error:                    # JobStopped is one of these
            reply.set_exception(error)
        if call in ONCE:
            attempt.replies[number] = reply
            for old in [old for old, kept in attempt.replies.items() if kept.done()][:-REPLIES_KEPT]:
                del attempt.replies[old]
        return reply

    def _reply(self, caller: _Caller, number: int, reply: Future[Any]) -> None:
        """Answer a call. In the loop's thread."""
        error = reply.exception()
        caller.send(number, *(self._refusal(error) if error else (reply.result(),)))

    def _refusal(self, error: BaseException) -> tuple[Any, ...]:
        """Return the answer to a call that has raised this."""
        if self._runner._store.closed:
            return GONE
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else _text(error)
        return None, type(error).__qualname__, text

    def _save_soon(self, caller: _Caller, number: int, attempt: Departed, state: str | None,
                   positions: str | None = None) -> None:
        """Save a state with the next transaction; None: then only whether the attempt is still welcome is looked up."""
        if not self._saves:
            self.loop.call_soon(self.save)
        self._saves.append(((caller, number), (attempt, state, positions)))

    def save(self) -> None:
        """Save the states that wait, in one transaction."""
        saves, self._saves = self._saves, []
        if not saves:
            return
        replies: list[tuple[Any, ...]]
        try:
            stored = self._runner._store.write(lambda tx: [tx.save_state(*state) for _, state in saves])
            replies = [(True,) if is_stored else GONE for is_stored in stored]
        except Exception as error:
            replies = [self._refusal(error)] * len(saves)
        for ((caller, number), _), reply in zip(saves, replies):
            caller.send(number, *reply)
        # Many: more of them wake the loop at once.
        time.sleep(min(COLLECT_AT_MOST, COLLECT_SECONDS * len(self._attempts)))

    def _welcome(self, caller: _Caller, attempt: Departed, run: str, is_guest: bool = False) -> list[Any]:
        """Return the answer to a hello: whether it is to stop at once. The first run of an attempt that says it is the
        one: its engine may begin it twice, and so may its engine and a host."""
        runner = self._runner
        # Dask may begin it although it was cancelled for the sake of a host.
        is_taken = not is_guest and attempt.future is not None and attempt.future.cancelled()
        if attempt.run is None and not is_taken:
            attempt.engine.has_worked = True
            attempt.host = attempt.host if is_guest else None
            attempt.run, attempt.begun, attempt.thread = run, time.monotonic(), 0
            runner._unwritten.add_start(attempt, runner._clock())
        if attempt.run != run:
            return [None, "JobStopped", f"attempt {attempt.number} of job {attempt.id} has begun elsewhere: "
                                        "its executor has started it twice"]
        attempt.caller = caller
        return [[attempt.stop_requested, attempt.reason]]

    # what an attempt may ask for: each call has a method here, whose value, or whose future's, is the answer

    def _call_submit(self, attempt: Departed, new: dict[str, Any], arguments: list[str | None] | None) -> Any:
        """Submit one job, or one for each of the arguments; answer with the ids."""
        submission = Submission(new["name"])
        vars(submission).update(new, submitter=self._runner._id, author=(attempt.id, attempt.number))
        parent = self._runner._attempts.get(new.get("parent_id", 0))
        if parent is not None:
            parent.has_children = True
        return self._runner._store.write(lambda tx: tx.submit(submission) if arguments is None else
                                         list(tx.submit_many(submission, arguments)))

    def _call_operate(self, attempt: Departed, operation: str, job_id: int, by: str | None) -> None:
        """Stop, resume, cancel ... a job."""
        if operation not in OPERATIONS:
            raise ValueError(f"there is no operation {_short(operation)}")
        self._runner._operate(operation, job_id, by)

    def _call_info(self, attempt: Departed, job_id: int) -> dict[str, Any]:
        """Answer with what Job.info() returns."""
        return self._runner._info(job_id)

    def _call_logs(self, attempt: Departed, job_id: int, *filters: Any) -> list[dict[str, Any]]:
        """Answer with what Job.logs() returns."""
        return self._runner._logs(job_id, *filters)

    def _call_outcome(self, attempt: Departed, job_id: int) -> dict[str, Any] | None:
        """Answer with how a job has ended, or None: there is none."""
        return next(map(dict, self._runner._store.read(OUTCOME_OF, {"id": job_id})), None)

    def _call_end(self, attempt: Departed, job_id: int) -> Future[Any]:
        """Answer with a job's outcome once it is over."""
        end: Future[Any] = Future()
        self._runner.get(job_id).add_done_callback(lambda job: end.set_result(self._call_outcome(attempt, job_id)))
        return end

    def _call_leave(self, attempt: Departed) -> None:
        """Give the attempt's place away; its process becomes a host."""
        if not attempt.waits:
            self._offer(attempt)
        self._runner._pool.leave(attempt)

    def _call_ask_back(self, attempt: Departed) -> Future[Any]:
        """Answer once the attempt has a place again; until then its process executes others."""
        place = Place()
        place.add_done_callback(lambda place: attempt.engine.hosts.pop(attempt, None))
        if not self._runner._pool.ask_back(attempt, place):
            place.set_result(False)                       # it needs none
        return place

    def _call_ended(self, attempt: Departed, outcome: dict[str, Any]) -> None:
        """Take the outcome of a guest."""
        if attempt.host is not None:                      # else its engine was quicker
            self._end(attempt, outcome)

    # going down

    def close(self) -> None:
        """End both threads. Returns at once."""
        self._steps.put(None)
        if self.loop is not None:
            self._soon(self.loop.stop)

    def leave_to_parent(self) -> None:
        """In a forked child: keep no connection of the parent's open. (To close the transports would change the epoll
        object of both.)"""
        if self.loop is None:
            return
        callers = [caller.transport.get_extra_info("socket") for caller in list(self.callers)]
        with open(os.devnull) as nothing:
            for connection in (self._listener, *callers):
                if connection.fileno() >= 0:              # else it is closed already
                    os.dup2(nothing.fileno(), connection.fileno())


def _close_before_executors(reference: weakref.ref[Runner]) -> None:
    """Close a runner when the interpreter ends, before process pools wait for what they execute, as they do then."""
    runner = reference()
    if runner is not None and not runner._store.closed:
        runner._store.close_by = min(runner._store.close_by, time.monotonic() + GRACE_SECONDS)
        runner._close_at_exit()


# Over there.

def run_attempt(payload: str) -> str:
    """Execute one attempt in this process, for the runner that made this text; return its outcome, as JSON. For
    engines: the one function that they call."""
    given = json.loads(payload)
    runner = tuple(given["callback"]), given["path"], given["runner"]
    link = _links.get(runner) or _links.setdefault(runner, Link(*runner))
    return _dump(AttemptThere(link, given).execute())


_links: dict[tuple[Any, ...], Link] = {}                  # of this process, by the runner


class AttemptThere(Attempt):
    """An attempt in the process that executes it."""

    _told_positions: str | None = None

    def __init__(self, link: Link, given: dict[str, Any], is_guest: bool = False) -> None:
        super().__init__(link.runner, (*given["claim"], 0))
        self.link, self.token, self.run, self.is_guest = link, given["token"], os.urandom(8).hex(), is_guest
        self._module, self._function = given["module"], given["function"]

    def execute(self) -> dict[str, Any]:
        """Say hello, call the function; return the outcome."""
        _capture_log_records()
        try:
            self.link.begin(self)
            if not self.stop_requested:
                self._import_function()
                self.runner._perform(self)
        except BaseException as error:                    # JobStopped: its hello was refused
            self.fail(BgjobsError(_text(error)) if isinstance(error, JobStopped) else error)
        return {"was_interrupted": isinstance(self.exception, KeyboardInterrupt),
                "untold": self.link.part_from(self), **{name: getattr(self, name) for name in OUTCOME}}

    def _import_function(self) -> None:
        """Have the registry know the function by the job's name."""
        import importlib
        module = importlib.import_module(self._module)
        _registry.by_name[self.name] = operator.attrgetter(self._function)(module)

    def _save(self, state: str | None) -> None:
        """Save a state; return once it is in the file. Raises JobStopped: the attempt has been superseded."""
        if state is not None:                             # positions alone go with what is told next
            self.link.ask(self, "save", state, self.unsaved_positions())
            self._state = state
        self._saved_at = time.monotonic()

    def untold(self) -> tuple[list[Any], Report | None, str | None]:
        """Return the log lines, the progress and the positions that the runner has not been told; None: it knows."""
        positions, told = self.unsaved_positions(), self._told_positions
        self._told_positions = positions
        lines = self.runner.take_lines(self)              # type: ignore[attr-defined]
        return lines, self.report_to_save(), None if positions == told else positions


class RunnerThere(Runner):
    """What stands for the runner in the process of an attempt: asks it through the link."""

    def __init__(self, link: Link, path: str, runner_id: int) -> None:
        Submitter.__init__(self, self, {})
        self._link, self.path, self._id = link, path, runner_id
        self._store = _StoreThere(link)                   # type: ignore[assignment]
        self._costs, self._clock = Costs(), time.time
        self._begin_empty()
        self._unwritten.starts = deque(maxlen=0)          # the runner counts them

    def _watch(self, handle: Job[Any]) -> None:
        """Complete this handle when its job is over. Returns at once: the caller may hold another handle's lock."""
        self._handles.watch(handle)
        call = self._link.post(None, "end", handle.id)
        call.add_done_callback(functools.partial(self._complete, handle.id))

    def _complete(self, job_id: int, end: Future[Any]) -> None:
        """Complete the handles of a job that is over."""
        if isinstance(end.exception(), JobStopped):
            return                                        # who asked has ended
        self._store.outcomes[job_id] = None if end.exception() else end.result()         # type: ignore[attr-defined]
        self._handles.complete([job_id])
        self._store.outcomes.pop(job_id, None)            # type: ignore[attr-defined]

    def take_lines(self, attempt: Attempt) -> list[Any]:
        """Take the log lines of an attempt out of those that wait: [[at, level, message]...]. Under the link's lock."""
        waiting = self._unwritten.lines
        lines = [waiting.popleft() for _ in range(len(waiting))]
        waiting.extendleft(reversed([line for line in lines if line[0] is not attempt]))
        return [line[1:] for line in lines if line[0] is attempt]

    def _info(self, job_id: int) -> Any:
        """Return what Job.info() does."""
        return self._link.ask(None, "info", job_id)

    def _status(self, job_id: int) -> str:
        """Return a job's status."""
        return str(self._info(job_id)["status"])

    def _logs(self, *filters: Any) -> Any:
        """Return what Job.logs() does."""
        return self._link.ask(None, "logs", *filters)

    def _operate(self, operation: str, job_id: int, by: str | None, handle: Job[Any] | None = None) -> Job[Any]:
        """Have the runner stop, resume, cancel ... a job; return its handle, a new one if the old one is complete."""
        self._link.ask(None, "operate", operation, job_id, by)
        is_over = handle is not None and handle._state != "PENDING"
        return Job(self, job_id) if handle is None or is_over and operation in ("resume", "restart") else handle

    def _wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool], timeout: float | None) -> bool:
        """Wait without a place: this process executes other attempts meanwhile."""
        begun = time.monotonic()
        self._link.ask(attempt, "leave")
        try:
            return wait(timeout)
        finally:
            self._link.ask(attempt, "ask_back")           # answered when it has a place
            attempt.waited += time.monotonic() - begun


class _StoreThere:
    """What stands for the store in the process of an attempt: the one transaction and the one query that handles and
    submits need."""

    closed = forked = False

    def __init__(self, link: Link) -> None:
        self._link = link
        # Of jobs that are over, while their handles are completed.
        self.outcomes: dict[int, dict[str, Any] | None] = {}

    def write(self, run: Callable[[Any], Any]) -> Any:
        """Call `run(transaction)`, where this is the transaction."""
        return run(self)

    def __getattr__(self, name: str) -> Any:
        """Refuse all that a store does besides."""
        raise RuntimeError("a job that executes in another process cannot ask this of its runner; do it in the app, or "
                           "in a job without executor= and isolate=")

    def kick(self) -> None:
        """Do nothing: the runner's store has the transactions."""

    def submit(self, new: Submission, arguments: list[str | None] | None = None) -> Any:
        """Have the runner submit a job, or one for each of the arguments; return the ids."""
        return self._link.ask(None, "submit", vars(new), arguments)

    submit_many = submit

    def read(self, sql: str, parameters: Any = None) -> list[dict[str, Any]]:
        """Return the row of the one query that handles need."""
        if sql != OUTCOME_OF:
            self.__getattr__("read")                      # raises
        job_id = parameters["id"]
        outcome = self.outcomes[job_id] if job_id in self.outcomes else self._link.ask(None, "outcome", job_id)
        return [] if outcome is None else [outcome]


class _Call(Future):                                      # type: ignore[type-arg]
    """A call to the callback: its answer is this future's result."""

    def __init__(self, attempt: AttemptThere, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._condition = _Condition()
        self.attempt, self.name = attempt, name
        self.line = _as_line(attempt.token, number, name, *arguments)


class Link:
    """The connection of this process to a runner's callback. A thread of its own keeps it, hears, and tells what is
    new."""

    def __init__(self, address: tuple[str, int], path: str, runner_id: int) -> None:
        self._address = address
        self._no_answer = f"the runner does not answer at {address[0]}:{address[1]}"
        # Guards all below, and the sending, but for the taking of a call out of _calls, which one pop decides. No call
        # is answered under it: that may run callbacks of the app's.
        self._lock = threading.RLock()
        # That execute here, by their runs: an engine may start one twice.
        self._attempts: dict[str, AttemptThere] = {}
        self._calls: dict[int, _Call] = {}                # without an answer, by number
        self._numbers = itertools.count(1)
        self._socket: Any = None
        self._thread: threading.Thread | None = None      # while there are attempts or calls, and for some time after
        self._is_gone = False                             # the runner: it has been given up
        # Monotonic: when the connection was lost, unless there is one that works.
        self._lost_at = math.inf
        self._told_at = 0.0
        self.runner = RunnerThere(self, path, runner_id)

    # for attempts

    @library_code
    def begin(self, attempt: AttemptThere) -> None:
        """Say hello for an attempt. Raises JobStopped: it is not welcome, or nobody answers."""
        with self._lock:
            self._attempts[attempt.run] = attempt
            self._is_gone = False                         # it may be back
            hello = self._greet(attempt)
        hello.result()
        self.runner._attempts[attempt.id] = attempt

    def part_from(self, attempt: AttemptThere) -> tuple[list[Any], Report | None, str | None]:
        """Forget an attempt that has ended; return what its runner has not been told of it, once it has heard the
        rest."""
        with self._lock:                                  # _tell takes and posts under it: nothing is in between
            self._attempts.pop(attempt.run, None)
            rest = attempt.untold()
            if self.runner._attempts.get(attempt.id) is attempt:
                del self.runner._attempts[attempt.id]
            told = [call for call in self._calls.values() if call.attempt is attempt and call.name == "tell"]
        wait(told, RETRY_SECONDS)
        self._refuse(f"attempt {attempt.number} of job {attempt.id} has ended", attempt)
        return rest

    def _attempt_here(self) -> AttemptThere:
        """Return the attempt that this is called in; in another thread, one of this process. Raises JobStopped: there
        is none."""
        attempt = _current.get() or next(iter(self._attempts.values()), None)
        if attempt is None or attempt.runner is not self.runner:
            raise JobStopped("the attempt that this belongs to has ended")
        return attempt                                    # type: ignore[return-value]

    @library_code
    def ask(self, attempt: Any, name: str, *arguments: Any) -> Any:
        """Ask the runner for something and return what it says. Raises JobStopped when it is not there any more, or
        the attempt is superseded; else what it raised there."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the link's own thread cannot wait for an answer")
        return self.post(attempt, name, *arguments).result()

    @library_code
    def post(self, attempt: AttemptThere | None, name: str, *arguments: Any) -> _Call:
        """Ask the runner for something, for an attempt, or the one that this is called in; the answer will be the
        result of what is returned."""
        number = next(self._numbers)
        call = _Call(attempt or self._attempt_here(), number, name, arguments)
        with self._lock:
            self._calls[number] = call
            self._send(call)
            if self._thread is None and not self._is_gone:
                self._lost_at = min(self._lost_at, time.monotonic())
                self._thread = _start_thread("bgjobs-link", self._run)
        if self._is_gone:                                 # since before the call was there: _give_up has not seen it
            self._refuse(self._no_answer)
        return call

    def _greet(self, attempt: AttemptThere) -> _Call:
        """Say hello for an attempt, on each new connection."""
        hello = self.post(attempt, "hello", attempt.run, attempt.is_guest)
        hello.add_done_callback(functools.partial(self._heed_welcome, attempt))
        return hello

    @staticmethod
    def _heed_welcome(attempt: AttemptThere, hello: Future[Any]) -> None:
        """Stop, if that was asked for before it could be told."""
        if hello.exception() is None and hello.result()[0]:
            attempt.request_stop(hello.result()[1], force=True)

    def _send(self, call: _Call) -> None:
        """Send a call; if that fails, it is sent once there is a connection again. Called under the lock."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(call.line)

    def _refuse(self, why: str, attempt: AttemptThere | None = None) -> None:
        """Answer the calls of an attempt, or all, with JobStopped."""
        for number, call in list(self._calls.items()):
            # Who takes it out answers it: here, or the link's thread by what it has heard meanwhile.
            if attempt in (None, call.attempt) and self._calls.pop(number, None) is not None:
                call.set_exception(JobStopped(why))

    # in the link's thread

    def _run(self) -> None:
        """Keep the connection while there are attempts or calls; give up when nobody answers."""
        used_at = time.monotonic()
        # Else it holds up the end of its interpreter.
        idle_seconds = 60.0 if threading.current_thread().daemon else 1.0
        try:
            while True:
                with self._lock:
                    if self._attempts or self._calls:
                        used_at = time.monotonic()
                    elif self._socket is None or time.monotonic() - used_at > idle_seconds:
                        self._hang_up()
                        self._thread, self._lost_at = None, math.inf
                        return
                if self._socket is None and not self._connect():
                    return self._give_up()
                self._hear()
                self._tell()
        except BaseException:
            self._give_up()
            raise

    def _connect(self) -> bool:
        """Make the connection, say hello for all that execute here, and repeat what has no answer. False: it cannot be
        made, or nobody has answered for RETRY_SECONDS by those that could."""
        import socket
        connection = None
        while connection is None:
            away = time.monotonic() - self._lost_at
            if away > RETRY_SECONDS:
                return False
            time.sleep(min(away / 2, 1.0))                # so it is tried at once, and then ever more rarely
            with contextlib.suppress(OSError):
                connection = socket.create_connection(self._address, timeout=5)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        with self._lock:
            self._socket, self._lines = connection, Lines()
            unanswered = list(self._calls.values())
            for attempt in self._attempts.values():
                self._greet(attempt)                      # first: else the calls are refused
            for call in unanswered:
                self._send(call)
        return True

    def _hang_up(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
                self._lost_at = min(self._lost_at, time.monotonic())

    def _hear(self) -> None:
        """Take in what the runner says, within TELL_SECONDS."""
        if not _can_read(self._socket, TELL_SECONDS):
            return
        try:
            received = self._socket.recv(1 << 20)
            messages = self._lines.take(received)
        except (OSError, ValueError, RecursionError):
            received = b""
        if not received:
            return self._hang_up()
        for number, *rest in messages:
            self._lost_at = math.inf
            if number:
                self._heed_answer(number, *rest)
            else:
                self._heed_news(*rest)

    def _heed_answer(self, number: int, value: Any, kind: str | None = None, text: str = "") -> None:
        """Complete a call, unless it has been refused meanwhile."""
        call = self._calls.pop(number, None)
        if call is None:
            return
        if kind is None:
            return call.set_result(value)
        if kind == "gone":
            kind, text = "JobStopped", "the attempt has been superseded"
            self._supersede(call.attempt)
        known = (JobStopped, StoreError, InvalidOperation, KeyError, TypeError, ValueError, RuntimeError)
        call.set_exception(next((each for each in known if each.__name__ == kind), BgjobsError)(text))

    def _heed_news(self, token: str, news: str, value: Any) -> None:
        """Heed what the runner says unasked."""
        if news == "run":
            _start_thread("bgjobs-guest", self._run_guest, value)
        for attempt in [each for each in list(self._attempts.values()) if each.token == token]:
            if news == "stop":
                attempt.request_stop(value, force=True)
            elif news == "void":
                self._supersede(attempt)

    def _supersede(self, attempt: AttemptThere) -> None:
        """Stop an attempt that is void, wherever it is."""
        attempt.supersede()
        self._refuse("the attempt has been superseded", attempt)

    def _run_guest(self, payload: str) -> None:
        """Execute another attempt while one of this process waits."""
        guest = AttemptThere(self, json.loads(payload), is_guest=True)
        self.post(guest, "ended", guest.execute())

    def _tell(self) -> None:
        """Tell the runner what is new of each attempt, now and then, unless it does not keep up."""
        if time.monotonic() < self._told_at + TELL_SECONDS or len(self._calls) > 1_000:
            return
        self._told_at = time.monotonic()
        for attempt in list(self._attempts.values()):
            with self._lock:                              # if it parts first, nothing is left to tell
                untold = attempt.untold()
                if any(untold):
                    self.post(attempt, "tell", *untold)

    def _give_up(self) -> None:
        """Stop what executes here: its runner is gone."""
        with self._lock:
            self._thread, self._is_gone = None, True
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.request_stop(RELEASED, force=True)
        self._refuse(self._no_answer)


# ---- 19 The default runner ------------------------------------------------------------------------------------
#
# The module's own functions are methods of the default runner.

_default: Runner | None = None
_default_lock = threading.Lock()       # guards the making of _default


@library_code
def start(path: str | os.PathLike[str] | None = None, **options: Any) -> Runner:
    """Make the default runner and start it, or return the one there is.

    path and options are those of Runner. Raises RuntimeError if there is a default runner on
    another file, or one for which options come too late.
    """
    global _default
    with _default_lock:
        runner, anew = _default, path is not None or bool(options)
        if runner is None or (runner._store.closed if anew else _is_shut(runner)):
            _default = Runner(path, **options)
            return _default
        if path is not None and os.path.abspath(path) != runner.path:
            raise RuntimeError(f"the default runner is on {runner.path} already; close() it, or "
                               "make a Runner of your own")
        if options:
            raise RuntimeError("the default runner has been made already; call start() with its "
                               "options before the first submit")
        return runner.start()


def _is_shut(runner: Runner) -> bool:
    """Return whether a runner is closed for good; one that a fork has closed can start again."""
    return runner._store.closed and not runner._store.forked


def default_runner() -> Runner:
    """Return the runner whose job this is called in, else the default one, started if need be.

    Raises RuntimeError if it is closed: a new one might be on another file, where nobody looks.
    """
    attempt, runner = _current.get(), _default
    if attempt is not None:
        return attempt.runner
    if runner is None:
        return start()
    if _is_shut(runner):
        raise RuntimeError(f"the runner on {runner.path} is shut down; call start()")
    return runner


_submitter = Submitter(None, {})
submit = _submitter.submit
submit_many = _submitter.submit_many
every = _submitter.every
options = _submitter.options


def _of_default_runner(method: Callable[Concatenate[Runner, _P], _T]) -> Callable[_P, _T]:
    """Return a method of Runner as a function that calls it on the default runner."""
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        result: _T = getattr(default_runner(), method.__name__)(*args, **kwargs)
        return result
    # Of a bound method, so that help() shows the signature without `self`.
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
    if _default is not None:
        _default.close(timeout)


def shutdown(wait: bool = True, *, cancel_futures: bool = False) -> None:
    """Runner.shutdown on the default runner, if there is one."""
    if _default is not None:
        _default.shutdown(wait, cancel_futures=cancel_futures)


# ---- 20 Status page -------------------------------------------------------------------------------------------
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

LIST_LIMIT = 500                       # jobs in one answer
LOG_LIMIT = 2_000                      # log lines in one answer
BODY_LIMIT = 1024 * 1024               # bytes
EXPORTS_AT_ONCE = 4                    # each may take as long as its reader
EXPORT_COLUMNS = (
    *COLUMNS_SEEN, "phase", "waiting", "duration", "errors", "low_priority", "system", "progress", "eta", "children",
    "root_id", "args", "kwargs", "state", "result", "error", "operations")
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
    return _dump(value).encode()


class _Refused(Exception):
    """A request that is answered with an error: its HTTP status, and the text for people."""

    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.answer = _Answer(_json_bytes({"error": text}), status=status, headers=headers)


# Of parameters that are no filters of lists, which `conditions` reads.
_READERS = {"tree": A_TRUTH, "since": A_TIME, "until": A_TIME, "before": A_NUMBER, "after": A_NUMBER, "limit": A_NUMBER}


def _read_parameters(given: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the parameters that are not empty, all but filters read. ValueError: an unknown one, or a bad value."""
    for name, value in given.items():
        if name not in known and value != "":
            raise ValueError(f"unknown filter {name!r}; the filters are {', '.join(known)}")
    return {name: read_value(name, value, _READERS[name]) if name in _READERS else value
            for name, value in given.items() if value != ""}


class _Request:
    """What a WSGI environ says. Its body is read when it is asked for."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ = environ
        self.is_head = environ.get("REQUEST_METHOD") == "HEAD"
        self.method: str = "GET" if self.is_head else environ.get("REQUEST_METHOD", "GET")
        self.host: str = environ.get("HTTP_HOST", "").lower()
        self.path: str = environ.get("PATH_INFO", "").lstrip("/")
        self.query: str = environ.get("QUERY_STRING", "")
        self.user = ""                                    # for the job log: who it is that has been let in

    def parameters(self, *known: str) -> dict[str, Any]:
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


def _csv_of(pages: Iterable[list[dict[str, Any]]]) -> Iterator[str]:
    """Yield the pieces of a table of jobs for spreadsheets: a header, then a line for each job."""
    import csv

    def cell(value: Any) -> Any:
        if isinstance(value, (dict, list)):
            value = _dump(value)
        is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        return "'" + value if is_formula else value       # a spreadsheet would execute what a stranger has named a job

    line = csv.writer(types.SimpleNamespace(write=str)).writerow       # returns what write() does: the line
    yield line(EXPORT_COLUMNS)
    for infos in pages:
        yield "".join(line([cell(info[name]) for name in EXPORT_COLUMNS]) for info in infos)


def _json_of(pages: Iterable[list[dict[str, Any]]]) -> Iterator[str]:
    """Yield the pieces of a JSON array of jobs, one a line."""
    before = "[\n"
    for infos in pages:
        if infos:
            yield before + ",\n".join(map(_dump, infos))
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

    def __init__(self, runner: Runner, *, read_only: bool = False, hosts: Iterable[str] = (),
                 password: str | None = None, authorize: Callable[[dict[str, Any]], str | None] | None = None) -> None:
        import secrets
        if password is not None and not (
                isinstance(password, str) and password and _text(password, len(password)) == password):
            raise ValueError("password must be a text that is not empty, without lone surrogates")
        if isinstance(hosts, str):
            raise ValueError(f"hosts must be a list of names, got {_short(hosts)}")
        if authorize is not None and not callable(authorize):
            raise ValueError(f"authorize must be a function of the request, got {_short(authorize)}")
        self._runner, self._read_only, self._password, self._authorize = runner, read_only, password, authorize
        self.is_guarded = password is not None or authorize is not None
        self._hosts = {host.lower() for host in hosts}
        self._port: int | None = None                     # of our own server: then the Host header must name it
        self._boot = secrets.token_hex(4)                 # no ETag outlives this page

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
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
        if self._runner._store.closed:
            raise _Refused(503, f"the runner on {self._runner.path} is shut down")
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

    def _route(self, request: _Request) -> tuple[Callable[..., Any], tuple[str, ...], bool]:
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
        return f'W/"{self._boot}{asked:x}-{self._runner._store.version()}-{minute}"'

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
            return _text(user, 200)
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
        return _text(name.decode("utf-8", "replace"), 200) or "web"

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
        store = self._runner._store
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
        self._runner._store.read("SELECT 1")
        return _Answer(b"ok\n", "text/plain")

    def _metrics(self, request: _Request) -> _Answer:
        return _Answer(metrics(self._runner).encode(), "text/plain; version=0.0.4")

    # reading: what is returned is sent as JSON

    def _session(self, request: _Request) -> dict[str, Any]:
        token = self._boot if self._read_only else self._token()      # nothing is written for those who only read
        return {"token": token, "read_only": self._read_only, "version": __version__}

    def _list(self, request: _Request) -> _Answer:
        filters = request.parameters(*FILTERS, "before", "limit")
        limit = max(1, min(filters.pop("limit", 50), LIST_LIMIT))
        before = filters.pop("before", None) or None
        store = self._runner._store
        ids, following = find_jobs(store, filters, limit, before, SEARCH_LIMIT)
        counts, unsure = count_jobs(store, filters)
        body = _json_bytes({"jobs": self._infos(ids), "next": following, "counts": counts})
        return _Answer(body, headers=(("X-Bgjobs-At-Least", ",".join(unsure)),))      # statuses not counted to the end

    def _infos(self, ids: list[int]) -> list[dict[str, Any]]:
        runner = self._runner
        return [self._shown(info) for info in describe_jobs(runner._store, ids, runner._clock(), runner._usual)]

    def _shown(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "operations": []} if self._read_only else info

    def _pages(self, filters: dict[str, Any]) -> Iterator[list[int]]:
        """Yield the ids of all jobs that pass, newest first, a page at a time."""
        before = None
        while True:
            ids, before = find_jobs(self._runner._store, filters, LIST_LIMIT, before)
            yield ids
            if before is None:
                return

    def _export(self, request: _Request) -> _Answer:
        """Answer with all jobs that pass the filters, page by page."""
        filters = request.parameters(*FILTERS, "format")
        form = filters.pop("format", "csv")
        if form not in _EXPORTS:
            raise ValueError(f"format must be {' or '.join(_EXPORTS)}, got {_short(form)}")
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

    def _info(self, number: str) -> dict[str, Any]:
        try:
            return self._runner._info(int(number))
        except KeyError:
            raise _Refused(404, f"there is no job {number}") from None

    def _job(self, request: _Request, number: str) -> dict[str, Any]:
        return self._shown(self._info(number))

    def _logs(self, request: _Request, number: str) -> dict[str, Any]:
        job_id = self._info(number)["id"]
        filters: dict[str, Any] = {
            "level": None, "text": None, "since": None, "until": None, "after": 0, "limit": 200, "tree": False}
        filters.update(request.parameters(*filters))
        filters["limit"] = min(filters["limit"], LOG_LIMIT)
        return {"logs": self._runner._logs(job_id, **filters)}

    def _attempts(self, request: _Request, number: str) -> dict[str, Any]:
        return attempts_of(self._runner._store, self._info(number)["id"])

    def _stack(self, request: _Request, number: str) -> dict[str, Any]:
        """Return where a job's thread in this process is now, from the job's function on."""
        attempt = self._runner._attempts.get(self._info(number)["id"])
        frame = sys._current_frames().get(attempt.thread) if attempt is not None and attempt.thread else None
        frames = traceback.extract_stack(frame) if frame is not None else []
        calls = [i for i, each in enumerate(frames, 1) if each.name == "_call" and each.filename == __file__]
        own = frames[calls[-1]:] if calls else []
        return {"stack": "".join(traceback.format_list(own)) or None}

    def _stats(self, request: _Request) -> dict[str, Any]:
        return self._runner.stats(**request.parameters("window", "name"))

    def _schedules(self, request: _Request) -> dict[str, Any]:
        rows = self._runner._store.read(SCHEDULES, {"system": False})
        return {"schedules": [describe_schedule(row) for row in rows]}

    def _runners(self, request: _Request) -> dict[str, Any]:
        return {"runners": [dict(row) for row in self._runner._store.read(RUNNERS)]}

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
                    self._runner._operate(operation, each, request.user)
                else:
                    getattr(Schedule(self._runner, each), operation)()
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
    _ROUTES: tuple[tuple[str, str, Callable[..., Any], bool], ...] = (
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
    page._runner._servers.append(server)
    return f"http://{f'[{host}]' if ':' in host else host}:{page._port}/"


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


# ---- 21 Command line ------------------------------------------------------------------------------------------
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


def print_table(rows: list[dict[str, Any]], spare: Iterable[str]) -> None:
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


def _time_left(info: dict[str, Any]) -> str:
    return "" if info["eta"] is None else f"{for_people(info['eta'])} left"


def progress_line(info: dict[str, Any], width: int) -> str:
    """Return one line for a terminal of this width: bar, percent, children, time left, message."""
    progress, children = info["progress"], info["children"]
    filled = int(24 * (progress or 0))
    parts = [f"[{'#' * filled}{'-' * (24 - filled)}]", "  ..." if progress is None else f"{progress:5.1%}",
             f"{children['done']:,} of {children['total']:,} children" if children["total"] else "",
             _time_left(info), info["phase"], info["message"]]
    return _fitted(_plain("  ".join(filter(None, parts))), max(20, width - 1)).rstrip()


_AT_REST = (*OVER, STOPPED)        # what following a job ends with


def _follow(job: Job[Any]) -> dict[str, Any]:
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

def _finished(job: Job[Any]) -> dict[str, Any]:
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


def _listed(job: dict[str, Any]) -> dict[str, Any]:
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


def _print_fields(info: dict[str, Any]) -> None:
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
    refused: list[dict[str, Any]] = []
    with _opened(args) as runner:
        for job_id in args.ids:
            try:
                runner._operate(args.command.replace("-", "_"), job_id, by)
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


def fingerprint(folder: str) -> dict[str, Any]:
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


def fingerprint_files(folder: str, names: list[str]) -> dict[str, Any]:
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
            context.log.warning("%s cannot be read: %s", _text(name), error.strerror)
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


def _print_report(report: dict[str, Any], seconds: float) -> None:
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

    def command(name: str, call: Callable[[Any], int], does: str, *shared: Any) -> Callable[..., Any]:
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
    prune("--finished", default=_period(RETENTION["finished"]), metavar="TIME",
          help="how long finished and cancelled ones are kept (default: %(default)s)")
    prune("--failed", default=_period(RETENTION["failed"]), metavar="TIME",
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
