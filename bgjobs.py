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
next checkpoint; ``resume`` makes it pending again. ``cancelled`` is for good. TRANSITIONS below is the table.

Guarantees. What submit, checkpoint and the operations have returned for is in the file and survives a
kill -9. A job runs at least once: again only because its process died, somebody asked, or a retry was due.
Each attempt's outcome is recorded at most once: every write carries its attempt's number, and one that has
been superseded is refused. Execution time is shared fairly between roots, over all processes on the file.

How it hangs together. A thread that wants to write (submit, checkpoint, an operation, a worker with an outcome)
hands a function to the store. One of the threads that wait leads: it opens one transaction, runs what
all of them brought, lets the runner record the outcomes of ended attempts and claim the next jobs in it, and
commits. So the batches grow with the load and a caller alone pays no hand-over. Claimed jobs go to the pool,
whose workers execute them, or to an executor, whose processes speak to the runner over a port of its own. A service
thread looks after what comes by the clock or from other processes.

Contents:  1 Words and rules   2 Values   3 Functions and options   4 Times of schedules   5 Fair shares and pace
           6 Force stop   7 Transactions   8 Store   9 Worker pool   10 Inside a job   11 The handle   12 Runner
           13 Elsewhere   14 The default runner   15 Status page   16 Command line

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
from collections import OrderedDict, deque
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED as FUTURE_FINISHED
from typing import Any, Callable, Iterable, Iterator, NamedTuple

__version__ = "0.1.0"
__all__ = ["BgjobsError", "InvalidOperation", "Job", "JobContext", "JobFailed", "JobStopped", "Runner", "Schedule",
           "StoreError", "Submitter", "backup", "close", "current_job", "drain", "every", "get", "job", "jobs", "options",
           "prune", "schedules", "serve", "shutdown", "start", "stats", "submit", "submit_many", "wsgi"]

_log = logging.getLogger("bgjobs")


def _say(level: int, text: str) -> None:
    """Log a message of the library's own, from a thread of its own: handlers are the app's and may block, and no job may own it."""
    with contextlib.suppress(RuntimeError):               # the interpreter ends
        threading.Thread(target=contextvars.Context().run, args=(_log.log, level, "%s", text), name="bgjobs-log", daemon=True).start()


# ---- 1 Words and rules ----------------------------------------------------------------------------------------

PENDING = "pending"        # waits for a worker, or for its time. A crash changes nothing.
RUNNING = "running"        # an attempt executes, or has returned and waits for children. A crash: pending again.
STOPPING = "stopping"      # asked to stop, no checkpoint reached yet. A crash: stopped.
STOPPED = "stopped"        # halted; can be resumed or cancelled.
FINISHED = "finished"      # the function returned and all descendants are over.
FAILED = "failed"          # the function raised.
CANCELLED = "cancelled"    # discarded for good.

STATUSES = (PENDING, RUNNING, STOPPING, STOPPED, FINISHED, FAILED, CANCELLED)
ACTIVE = (RUNNING, STOPPING)
OVER = (FINISHED, FAILED, CANCELLED)
_NOT_OVER = (PENDING, RUNNING, STOPPING, STOPPED)

# operation -> {status it is allowed in: status that follows}. What refines it is said in Transaction.operate.
TRANSITIONS: dict[str, dict[str, str]] = {
    "stop": {PENDING: STOPPED, RUNNING: STOPPING, STOPPING: STOPPING, STOPPED: STOPPED},
    "resume": {STOPPED: PENDING, FAILED: PENDING},
    "force_stop": {STOPPING: STOPPED},
    "cancel": {PENDING: CANCELLED, STOPPED: CANCELLED},
    "restart": {FINISHED: PENDING, FAILED: PENDING},
    "set_low_priority": {status: status for status in _NOT_OVER},
    "remove_low_priority": {status: status for status in _NOT_OVER},
}


class BgjobsError(Exception):
    """What all errors of this module derive from, but for plain misuse (TypeError, ValueError)."""


class InvalidOperation(BgjobsError):
    """The job's status does not allow the operation; the text says which ones it allows."""


class StoreError(BgjobsError):
    """The job file cannot be used; the text names it and the remedy."""


class JobFailed(BgjobsError):
    """A job failed in another process, or long ago. `type`, `text` and `traceback` are what its function raised."""

    def __init__(self, job: str, type: str, text: str, traceback: str) -> None:
        super().__init__(f"{job} failed with {type}: {text}")
        self.type, self.text, self.traceback = type, text, traceback


class JobStopped(BaseException):
    """Raised inside a job at a checkpoint when it is to stop. `except Exception` does not swallow it."""


def allowed_operations(status: str, options: dict[str, Any], system: bool = False, active_below: bool = False) -> list[str]:
    """Return the operations that a job with this status and these options allows now; `active_below`: a descendant runs."""
    unfit = {"stop"} if status in (STOPPING, STOPPED) else set()      # it repeats silently; there is no use in offering it
    if active_below:
        unfit |= {"cancel", "restart"}
    return [name for name, moves in TRANSITIONS.items()
            if (status in moves or name == "force_stop" and status == STOPPED and active_below)
            and name not in unfit and not objection(name, options, system)]


def objection(operation: str, options: dict[str, Any], system: bool) -> str:
    """Return why a job refuses an operation in any status, or ""."""
    if operation == "stop" and system and not options.get("stoppable", False):
        return "it is a system job"
    if operation == "restart" and not options.get("restartable", True):
        return "it was declared restartable=False"
    return ""


_VERBS = {"stop": "stopped", "resume": "resumed", "force_stop": "force-stopped", "cancel": "cancelled",
          "restart": "restarted", "set_low_priority": "set to low priority",
          "remove_low_priority": "taken off low priority"}


def refusal(job: str, status: str, operation: str, allowed: list[str], why: str = "") -> InvalidOperation:
    """Return the error for an operation that is not allowed: what is so, what would be allowed, what is not."""
    can = " or ".join(_VERBS[name] for name in allowed if "priority" not in name)
    text = f"it can be {can}, not {_VERBS[operation]}" if can else f"it cannot be {_VERBS[operation]}"
    return InvalidOperation(f"{job} is {status}; {text}{f' ({why})' if why else ''}")


# ---- 2 Values -------------------------------------------------------------------------------------------------
#
# Arguments, state and results are JSON. What JSON lacks is an object with one key, the name of its type: {"$date":
# "2026-01-31"}. A dict of the user's with such a key is stored as {"$dict": [[key, value], ...]}.

VALUE_LIMIT = 256 * 1024           # characters of JSON for arguments, a state or a result
TEXT_LIMIT = 8 * 1024              # characters of a log line, a label, a message
_PLAIN = frozenset((str, int, float, bool, type(None)))
_dump = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _is_number(value: Any) -> bool:
    """Tell whether `value` is an int or float that a float can hold: not NaN, not infinite, not 10**400."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def encode(value: Any, what: str = "the value") -> str:
    """Return `value` as JSON text. TypeError: it cannot be stored; the text names `what` and the remedy."""
    try:
        text = _dump(_jsonable(value))
    except RecursionError:
        raise TypeError(f"{what} cannot be stored: it is nested too deeply; pass a flatter value") from None
    except Exception as error:                            # of ours, or of the value's own methods
        raise TypeError(f"{what} cannot be stored: {_text(error)}") from None
    if len(text) > VALUE_LIMIT:
        raise TypeError(f"{what} cannot be stored: {len(text):,} characters of JSON are more than the {VALUE_LIMIT:,} "
                        "allowed; keep it in a file or a table and pass its name")
    return text


def decode(text: str | None) -> Any:
    """Return the value that `encode` made `text` from."""
    if text is None:
        return None
    return json.loads(text, object_hook=_untagged) if '{"$' in text else json.loads(text)


def _jsonable(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return [item if type(item) in _PLAIN else _jsonable(item) for item in value]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"the key {_short(key)} is no string; use {_short(_text(key))}, or a list of pairs")
        plain = {key: item if type(item) in _PLAIN else _jsonable(item) for key, item in value.items()}
        return {"$dict": [list(pair) for pair in plain.items()]} if any(key[:1] == "$" for key in plain) else plain
    return _tagged(value, kind)


def _tagged(value: Any, kind: type) -> dict[str, Any]:
    """Encode the types beyond JSON. Their modules are looked up, not imported: no value has a type not loaded."""
    module = str(kind.__module__)
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if kind is set:
        if any(type(item) is tuple for item in value):
            raise TypeError("a set of tuples would come back as lists; pass a list")
        return {"$set": sorted(map(_jsonable, value), key=_dump)}
    if module == "datetime" and kind.__name__ in ("datetime", "time"):
        return {"$" + kind.__name__: [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value)]}
    if module == "datetime" and kind.__name__ == "date":
        return {"$date": value.isoformat()}
    if module == "datetime" and kind.__name__ == "timedelta":
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    if module == "decimal" and kind.__name__ == "Decimal":
        return {"$decimal": str(value)}
    if module == "uuid" and kind.__name__ == "UUID":
        return {"$uuid": value.hex}
    if module.partition(".")[0] == "pathlib" and kind is type(sys.modules["pathlib"].Path()):      # not another system's
        return {"$path": str(value)}
    raise TypeError(f"{_short(value)} is of type {_type_name(value)}; pass JSON values, dates, Decimal, UUID, bytes, "
                    "set or Path, or an id to load it by")


def _zone(value: Any) -> Any:
    zone = value.tzinfo
    if zone is None:
        return None
    if type(zone).__module__.partition(".")[0] == "zoneinfo" and zone.key:
        type(zone)(zone.key)                              # raises, where it was made from a file and cannot be loaded by that key
        return zone.key
    if type(zone).__module__ == "datetime":
        offset, *name = zone.__getinitargs__()
        return [offset.total_seconds(), *name] if name else offset.total_seconds()
    raise TypeError(f"the time zone {_short(zone)} is not of datetime or zoneinfo; convert it with astimezone()")


def _clock_value(kind: str, text: str, fold: int, zone: Any) -> Any:
    import datetime
    value = getattr(datetime, kind).fromisoformat(text).replace(fold=fold)
    if isinstance(zone, str):
        import zoneinfo
        return value.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    if zone is not None:
        seconds, *name = zone if isinstance(zone, list) else [zone]
        return value.replace(tzinfo=datetime.timezone(datetime.timedelta(seconds=seconds), *name))
    return value


def _untagged(found: dict[str, Any]) -> Any:
    if len(found) != 1:
        return found
    (tag, value), = found.items()
    if tag == "$dict":
        return dict(value)
    if tag == "$bytes":
        return base64.b64decode(value)
    if tag == "$set":
        return set(value)
    if tag in ("$datetime", "$time"):
        return _clock_value(tag[1:], *value)
    if tag == "$date":
        import datetime
        return datetime.date.fromisoformat(value)
    if tag == "$timedelta":
        import datetime
        return datetime.timedelta(*value)
    if tag == "$decimal":
        import decimal
        return decimal.Decimal(value)
    if tag == "$uuid":
        import uuid
        return uuid.UUID(value)
    if tag == "$path":
        import pathlib
        return pathlib.Path(value)
    return found


def _type_name(value: Any) -> str:
    """Return the name of the value's type, whatever its metaclass does."""
    return type.__dict__["__qualname__"].__get__(type(value))


def _let_ctrl_c_pass(error: BaseException) -> None:
    """Raise a KeyboardInterrupt that hit the caller itself; one from deeper may be the doing of a value's own methods."""
    if isinstance(error, KeyboardInterrupt) and (error.__traceback__ is None or error.__traceback__.tb_next is None):
        raise error


def _short(value: Any, limit: int = 80) -> str:
    """Return repr(value), cut, whatever the object's own __repr__ does."""
    try:
        text = str.__str__(repr(value))
    except BaseException as error:
        _let_ctrl_c_pass(error)
        text = f"<{_type_name(value)} that cannot be printed>"
    return text if len(text) <= limit else text[:limit - 3] + "..."


def _text(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Return `value` as text that SQLite can hold: cut, lone surrogates written out. Never raises."""
    try:
        text = str.__str__(str(value))                    # a subclass may have methods of its own
    except BaseException as error:
        _let_ctrl_c_pass(error)
        text = f"<{_type_name(value)} that cannot be printed>"
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-8", "backslashreplace").decode()
    return text


# ---- 3 Functions and options ----------------------------------------------------------------------------------

class _Registry:
    """The functions this process knows by name: declared with @job, or submitted. Filled at import, so global."""

    def __init__(self) -> None:
        self.by_name: dict[str, Callable[..., Any]] = {}
        self.declared: dict[Callable[..., Any], dict[str, Any]] = {}
        self.names: dict[Callable[..., Any], str] = {}
        self.has_executors = False                        # one at least is declared with executor=

    def declare(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        if "name" in options:
            known = self.by_name.setdefault(options["name"], function)
            if _origin(known) != _origin(function):
                raise ValueError(f"the job name {options['name']!r} is taken by {'.'.join(_origin(known))}; choose another")
            self.by_name[options["name"]] = function      # a reloaded module's newer one
        self.declared[function] = options
        self.has_executors |= "executor" in options

    def name_of(self, function: Callable[..., Any]) -> str:
        """Return the function's stable name, and remember the function by it. TypeError: it cannot be a job."""
        try:
            return self.names[function]
        except (KeyError, TypeError):
            name = self.declared.get(function, {}).get("name") if callable(function) else None
            path = import_path(function)
            self.names[function] = name = name or path
            self.by_name[name] = function
            return name

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the function of this name, or None. A name is data: nothing is imported."""
        return self.by_name.get(name) or _defined_in_loaded_module(name)


_registry = _Registry()


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _module_name(module: str) -> str:
    """Return the name under which another process can import `module`: that of the script for __main__."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")
    return os.path.splitext(os.path.basename(file))[0] if file else module


def import_path(function: Callable[..., Any]) -> str:
    """Return "package.module.function". TypeError: it cannot be imported again; the text says what to do."""
    if not callable(function):
        raise TypeError(f"{_short(function)} cannot be a job: it is not callable")
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualname, str):
        if "<lambda>" in qualname:
            raise TypeError(f"{_short(function)} cannot be a job: a lambda has no name to import it by; "
                            "define it with def at the top level of a module")
        if "<locals>" in qualname:
            raise TypeError(f"{qualname} cannot be a job: it is defined inside a function; move it to the top level of its module")
        found: Any = sys.modules.get(module)
        for attribute in qualname.split("."):
            found = getattr(found, attribute, None)
        if found == function:
            return f"{_module_name(module)}.{qualname}"
        raise TypeError(f"{module}.{qualname} cannot be a job: that name leads to {_short(found)}, not to this function; "
                        "submit what the module holds under that name")
    raise TypeError(f"{_short(function)} cannot be a job: {_type_name(function)} objects have no import path; "
                    "submit the function itself and pass it its arguments")


def _defined_in_loaded_module(name: str) -> Callable[..., Any] | None:
    """Find a function that a loaded module defines itself, never one of the standard library or one it imported."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name, qualname = ".".join(parts[:split]), ".".join(parts[split:])
        module = sys.modules.get("__main__") if module_name == _module_name("__main__") else sys.modules.get(module_name)
        if module is None:
            continue
        if parts[0] in sys.stdlib_module_names:
            return None
        found: Any = vars(module).get(parts[split])
        for attribute in parts[split + 1:]:
            found = getattr(found, attribute, None) if isinstance(found, type) else None
        defined = getattr(found, "__module__", None) == module.__name__ and getattr(found, "__qualname__", None) == qualname
        return found if defined and callable(found) else None
    return None


# Option -> (check, what it must be). Defaults are said in DESIGN's table and in `options`.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: _is_name(v), "a text of 1 to 500 characters, without lone surrogates"),
    "label": (lambda v: isinstance(v, str), "a text"),
    "run_by": (lambda v: v is None or isinstance(v, str), "a text or None"),
    "low_priority": (lambda v: isinstance(v, bool), "True or False"),
    "system": (lambda v: isinstance(v, bool), "True or False"),
    "key": (lambda v: _is_name(v), "a text of 1 to 500 characters, without lone surrogates"),
    "delay": (lambda v: _are_seconds([v]), "seconds, 0 or more"),
    "run_at": (lambda v: _unix(v) is not None, "Unix seconds or an aware datetime"),
    "retries": (lambda v: type(v) is int and v >= 0, "a whole number, 0 or more"),
    "backoff": (lambda v: callable(v) or _are_seconds([v]) or isinstance(v, (list, tuple)) and len(v) > 0 and _are_seconds(v),
                "seconds, a list of seconds, or a function of the attempt"),
    "timeout": (lambda v: v is None or _are_seconds([v]) and v > 0, "seconds, more than 0"),
    "max_running": (lambda v: v is None or type(v) is int and 0 < v < 1 << 63, "a whole number greater than 0 and less than 2**63"),
    "stoppable": (lambda v: isinstance(v, bool), "True or False"),
    "restartable": (lambda v: isinstance(v, bool), "True or False"),
    "recover": (lambda v: isinstance(v, bool), "True or False"),
    "secret": (lambda v: isinstance(v, (list, tuple, set, frozenset)) and all(isinstance(n, str) for n in v), "a list of argument names"),
    "isolate": (lambda v: isinstance(v, bool), "True or False"),
    "executor": (lambda v: _is_executor(v), "a concurrent.futures.Executor, what makes one, or None"),
    "tz": (lambda v: zone_of(v) is not None, "the name of a time zone, a ZoneInfo, or None for the machine's own"),
    "parent": (lambda v: v is None or isinstance(v, Job), "a Job or None"),
    "connection": (lambda v: v is None or isinstance(v, sqlite3.Connection), "an open sqlite3.Connection"),
}
_KEPT = ("stoppable", "restartable", "recover", "secret", "retries", "timeout", "isolate")    # kept with the job, as JSON; others are columns
BACKOFF_SECONDS = 1.0, 600.0       # the default pause before the first retry, and the longest


def _is_executor(value: Any) -> bool:
    return value is None or callable(getattr(value, "submit", None)) or callable(value)


def _is_name(value: Any) -> bool:
    """Tell whether a text can be stored as it is, neither cut nor escaped: two names must not become one."""
    return isinstance(value, str) and 0 < len(value) <= 500 and _text(value) == value


def _are_seconds(values: Iterable[Any]) -> bool:
    return all(_is_number(v) and v >= 0 for v in values)


def _backoff_list(backoff: Any, retries: int) -> list[float]:
    """Return the pauses before the first, second … retry; the last one is that of all that follow. ValueError: a function gave
    something else."""
    if isinstance(backoff, (list, tuple)):
        return list(backoff)
    if not callable(backoff):
        return [backoff]
    pauses = [backoff(attempt) for attempt in range(1, min(retries, 100) + 1)]
    if not _are_seconds(pauses):
        raise ValueError(f"backoff must give seconds, 0 or more; it gave {_short(pauses)}")
    return pauses


def pause_before_retry(options: dict[str, Any], failures: int) -> float:
    """Return the seconds to wait after this many failures: the `backoff` of the job's options, else twice as long each time,
    up to ten minutes, and up to half as long again by chance, lest what failed together comes back together."""
    pauses = options.get("backoff")
    if pauses:
        return pauses[min(failures, len(pauses)) - 1]
    first, longest = BACKOFF_SECONDS
    return min(longest, first * 2.0 ** min(failures - 1, 30) * random.uniform(1.0, 1.5))


def _unix(value: Any) -> float | None:
    if hasattr(value, "timestamp") and value.utcoffset() is not None:
        value = value.timestamp()
    return float(value) if _is_number(value) else None


def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return `given`. TypeError: an unknown option; ValueError: a value that does not fit."""
    for name, value in given.items():
        if name not in _OPTIONS:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(_OPTIONS)}")
        check, must_be = _OPTIONS[name]
        try:
            fits = check(value)
        except Exception:                                 # of the value's own methods
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {must_be}, got {_short(value)}")
    if "delay" in given and "run_at" in given:
        raise ValueError("give delay or run_at, not both")
    return given


def job(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function with default options for its jobs (those of `options`); it is returned unchanged. executor: where it executes
    instead, a concurrent.futures.Executor or what makes one; None: in the app's threads, whatever the runner's.

        @bgjobs.job(name="export", low_priority=True)
        def export(table): ...
    """
    check_options(options)
    for name in ("parent", "connection"):
        if name in options:
            raise TypeError(f"{name} is an option of one submit, not of a function")

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.declare(function, options)
        return function
    return declare


def _secret_places(function: Callable[..., Any], secret: Iterable[str]) -> list[str | int]:
    """Return the names in `secret` and the positions at which they may be passed. ValueError: no such argument."""
    import inspect
    parameters = list(inspect.signature(function).parameters.values())
    places: list[str | int] = []
    for name in secret:
        position = next((i for i, p in enumerate(parameters) if p.name == name), None)
        if position is not None and parameters[position].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ValueError(f"secret names {name!r}, which takes any number of arguments of {function.__qualname__}; name its keywords, "
                             "or pass them as one argument, a list or a dict")
        if position is None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(f"secret names {name!r}, but {function.__qualname__} has no such argument")
        places += [name] if position is None else [name, position]
    return places


# ---- 4 Times of schedules -------------------------------------------------------------------------------------
#
# When a schedule is due next: every so many seconds, or at the times of five cron fields, as crontab in POSIX says: a day
# fits when its month does and, if day of month and day of week are both restricted, either of them. A time that the clocks skip in
# spring comes as much later; one that they repeat in autumn comes once, the first time. Hours that are all given ("*") are hours
# that pass instead, whatever the clocks say.

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON_FIELDS = (("minute", 0, 59, ()), ("hour", 0, 23, ()), ("day of month", 1, 31, ()), ("month", 1, 12, _MONTHS),
                ("day of week", 0, 7, _WEEKDAYS))
_CRON_WORDS = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
               "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *"}
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


class Every:
    """A schedule with a period, a text like "15m" (s, m, h, d, w)."""

    def __init__(self, schedule: str) -> None:
        number, unit = schedule[:-1].strip(), schedule[-1:]
        if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
            raise ValueError(f"a schedule is seconds, a text like \"15m\" or five cron fields, got {schedule!r}")
        self.seconds = float(number) * _UNITS[unit]
        if not 0.01 <= self.seconds < 1e9:
            raise ValueError(f"the period of a schedule is at least 0.01 s, got {schedule!r}")

    def first(self, now: float) -> float:
        """Return when it is due for the first time, in Unix seconds."""
        return now + self.seconds

    def next(self, due: float, now: float) -> float:
        """Return when it is due next, if it was due then: after `now`, in step with before."""
        return due + self.seconds * (math.floor((now - due) / self.seconds) + 1) if due <= now else due


def _period(seconds: float) -> str:
    """Write a period as people do: 900 as "15m"."""
    unit = next(unit for unit in reversed(_UNITS) if seconds and seconds % _UNITS[unit] == 0 or unit == "s")
    return f"{seconds / _UNITS[unit]:.12g}{unit}"


class Cron:
    """A schedule of five fields: minute, hour, day of month, month, day of week, in a time zone; None: the machine's."""

    def __init__(self, fields: str, zone: Any = None) -> None:
        texts = _CRON_WORDS.get(fields.strip().lower(), fields).lower().split()
        if len(texts) != 5:
            raise ValueError(f"a cron schedule has five fields (minute hour day month weekday), got {fields!r}")
        self._zone = zone
        self._minutes, self._hours, self._days, self._months, weekdays = (
            self._values(text, *field) for text, field in zip(texts, _CRON_FIELDS))
        self._weekdays = {day % 7 for day in weekdays}
        self._by_day, self._by_weekday = texts[2] != "*", texts[4] != "*"
        self._each_hour = len(self._hours) == 24
        if self._next_after(time.time()) is None:
            raise ValueError(f"the cron schedule {fields!r} is never due: no such day comes")

    @staticmethod
    def _values(text: str, name: str, least: int, most: int, words: tuple[str, ...]) -> set[int]:
        """Return the values of one field: lists of *, numbers or names, ranges, and steps."""
        def number(word: str) -> int:
            value = words.index(word) + least if word in words else int(word) if word.isdecimal() else -1
            if not least <= value <= most:
                raise ValueError(f"the {name} of a cron schedule is {least} to {most}, got {word!r} in {text!r}")
            return value
        values: set[int] = set()
        for part in text.split(","):
            span, slash, step = part.partition("/")
            if slash and not (step.isdecimal() and int(step)):
                raise ValueError(f"a step of a cron schedule is a whole number greater than 0, got {step!r} in {text!r}")
            low, dash, high = span.partition("-")
            first, last = (least, most) if span == "*" else (number(low), number(high) if dash else most if slash else number(low))
            if first > last:
                raise ValueError(f"a range of a cron schedule goes up, got {part!r}")
            values.update(range(first, last + 1, int(step or 1)))
        return values

    def first(self, now: float) -> float:
        """Return when it is due for the first time, in Unix seconds."""
        return self.next(-math.inf, now)

    def next(self, due: float, now: float) -> float:
        """Return when it is due next after `now`."""
        return self._next_after(max(due, now)) or math.inf

    def _next_after(self, after: float) -> float | None:
        import datetime
        begin = datetime.datetime.fromtimestamp(after - 3 * 3_600, self._zone)      # no clock goes further back, or on
        day, hour = begin.date(), begin.hour
        for _ in range(366 * 41):                         # a certain weekday is 29 February after 40 years at most
            if self._fits(day):
                times = [moment for moment in self._times_of(day, hour) if moment > after]
                if times:
                    return min(times)
            day, hour = day + datetime.timedelta(days=1), 0
        return None

    def _fits(self, day: Any) -> bool:
        by_day, by_weekday = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        either = self._by_day and self._by_weekday
        return day.month in self._months and (by_day or by_weekday if either else by_day and by_weekday)

    def _times_of(self, day: Any, from_hour: int) -> Iterator[float]:
        import datetime
        for hour in self._hours:
            for minute in self._minutes if hour >= from_hour else ():
                for fold in (0, 1) if self._each_hour else (0,):
                    local = datetime.datetime(day.year, day.month, day.day, hour, minute, tzinfo=self._zone, fold=fold)
                    moment = local.timestamp()
                    skipped = datetime.datetime.fromtimestamp(moment, self._zone).replace(fold=fold) != local
                    if not (skipped and self._each_hour):
                        yield moment


def zone_of(tz: Any) -> tuple[Any, str | None]:
    """Return a time zone and the key to store it by; None is the machine's own. ValueError: an unknown one."""
    import datetime
    import zoneinfo
    key = "UTC" if tz is datetime.timezone.utc else getattr(tz, "key", tz)
    if key is None:
        return None, None
    try:
        return zoneinfo.ZoneInfo(key), key
    except Exception:                                     # KeyError, ValueError, OSError: it says too little
        raise ValueError(f"unknown time zone {_short(tz)}; a name like \"Europe/Berlin\", \"UTC\" or None for the machine's own") from None


@functools.lru_cache(1_000)
def schedule_of(schedule: str, zone: str | None) -> Every | Cron:
    """Return the schedule that a text like "15m", or five cron fields, describe. ValueError: they describe none."""
    if len(schedule.split()) > 1 or schedule.startswith("@"):
        return Cron(schedule, zone_of(zone)[0])
    return Every(schedule)


# ---- 5 Fair shares and pace -----------------------------------------------------------------------------------
#
# Start-time fair queueing (Goyal, Vin and Cheng, 1996) over roots. Each root has a virtual time: the microseconds its
# tree has run. The next place goes to the ready root with the least. The queue's virtual time is the start tag
# of the newest claim; a root that becomes ready starts at it, or at its own if that is later, so idling earns no
# credit. A claim charges an estimate at once, since a root with running attempts is not idle; the end corrects it.

UNKNOWN_COST = 0.010       # seconds charged for the first run of a function


def fair_order(roots: Iterable[tuple[int, int, Iterator[Any]]], charge: Callable[[Any], int | None]
               ) -> Iterator[tuple[int, Any, int, int]]:
    """Yield (root, job, start tag, charge) in the order in which places are to be given.

    `roots` has (virtual time, root id, its ready jobs, oldest first); `charge(job)` is in microseconds, None passes the job over.
    Taking the next pair from the iterator means that the last one was claimed.
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
    """Return the virtual time at which a root that becomes ready starts: no credit for having been idle."""
    return max(own, clock)


class Costs:
    """The recent mean run time of each function, and of the trees below it, in seconds; a newer run weighs a fifth."""

    def __init__(self, means: dict[str, float] | None = None) -> None:
        self.means = means or {}
        self.trees: dict[str, float] = {}
        self.changed: set[str] = set()

    def record(self, name: str, seconds: float) -> None:
        """Take the run time of one attempt into its function's mean."""
        self._record(self.means, name, seconds)

    def record_tree(self, name: str, seconds: float) -> None:
        """Take the duration of a job with children, from its start to its last descendant's end, into the mean."""
        self._record(self.trees, name, seconds)

    def _record(self, means: dict[str, float], name: str, seconds: float) -> None:
        mean = means.get(name)
        means[name] = seconds if mean is None else mean + (seconds - mean) / 5
        self.changed.add(name)

    def take_changed(self) -> list[tuple[str, float | None, float | None]]:
        """Return (name, mean, mean of trees) of those that changed since the last call."""
        changed, self.changed = self.changed, set()
        return [(name, self.means.get(name), self.trees.get(name)) for name in changed]

    def plan(self, name: str) -> tuple[int, float]:
        """Return the microseconds to charge for a claim of this function, and the seconds that it will keep a worker from the
        next one: infinitely many, as long as that is not known."""
        mean = self.means.get(name)
        return (int(UNKNOWN_COST * 1e6), math.inf) if mean is None else (max(1, int(mean * 1e6)), mean + _OVERHEAD)


AHEAD_SECONDS = 0.010      # the work that may wait, claimed, for each worker
AHEAD_LIMIT = 256          # claimed jobs that may wait in a process
_OVERHEAD = 50e-6          # seconds a job costs besides its function
HAND_SECONDS = 0.001       # the work that is worth waking another thread for
LINGER_SECONDS = 0.001     # how long a worker without a job stays up to claim what comes meanwhile


class Rate(NamedTuple):
    """Units gained in seconds, of which the recent ones weigh more."""

    gained: float = 0.0
    seconds: float = 0.0

    def after(self, gained: float, seconds: float, elapsed: float) -> Rate:
        """Return the rate after `gained` more units in `seconds`, `elapsed` seconds into the work.

        An exponential average over about three quarters of the elapsed time: an early hiccup is forgotten, one late sample cannot
        make the estimate jump, and units that come in waves, from several workers, count as what they are.
        """
        kept = math.exp(-max(seconds, 0.0) / max(elapsed * 0.75, 1.0))
        return Rate(self.gained * kept + gained, self.seconds * kept + max(seconds, 0.0))

    @property
    def per_second(self) -> float | None:
        """Return the units per second, or None."""
        return self.gained / self.seconds if self.gained > 0 and self.seconds > 0 else None


def time_left(left: float, rate: Rate, step: float, age: float, elapsed: float) -> float | None:
    """Return the seconds that `left` units take, or None.

    `age`: seconds since the last report. It counts down until the next is due, `step` seconds after the last; from then on
    the estimate is what it would be if that came just now, and the time it is late: it grows slowly, and does not jump.
    """
    speed = rate.per_second
    if speed is None:
        return None
    if age <= step:
        return max(0.0, left / speed - max(age, 0.0))
    late = rate.after(speed * step, age, elapsed + age).per_second or speed
    return max(0.0, left - speed * step) / late + (age - step)


FLUSH_SECONDS = 0.25       # how often log lines and progress are written when no other write takes them along


class Pace:
    """How fast an attempt goes, from its reports of `done` units at seconds since it began."""

    __slots__ = ("rate", "step", "done", "at", "_guessed")

    def __init__(self) -> None:
        self.rate = Rate()                                # units per second
        self.step = 0.0                                   # seconds between reports, a mean
        self.done, self.at = 0.0, 0.0                     # of the last report of more units
        self._guessed = True                              # the rate is that of the first report

    def start(self, done: float, at: float) -> None:
        """Take the first report in. One in no time may tell what was done before; that is no rate to keep."""
        self.done, self.at, self._guessed = done, at, at < 0.1
        self.rate = Rate(done, at) if done > 0 else Rate()

    def resume(self, done: float, at: float) -> None:
        """Take the first report of a resumed attempt in: what is done by then took no time of this one."""
        self.done, self.at = done, at

    def report(self, done: float, at: float) -> None:
        """Take another report in. One of less than before begins anew."""
        gained, seconds = done - self.done, at - self.at
        if gained < 0:
            self.resume(done, at)
            self.rate, self._guessed = Rate(), True
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
# A force stop refuses the attempt in the file first; then it raises JobStopped in the attempt's thread, wherever that is, with
# PyThreadState_SetAsyncExc. Guarantee: it is raised at most once, in the job's function or what that calls, never in the
# library's code (where it would leave a lock or a transaction open) and never after the attempt, in a thread that has
# gone on to the next. Each attempt has a ticket for that. The function runs with the ticket on the table. Library
# code that the function calls takes it and puts it back; the attempt takes it for good when its function has ended. To
# raise something in the thread takes the ticket, too, and it is not put back then: whoever finds it gone waits until
# the exception is on its way, and takes that back if it has been caught already.

class Ticket:
    """The right to raise JobStopped once in the thread of an attempt."""

    __slots__ = ("_free", "_nested", "_raised", "_spent", "void", "thread")

    def __init__(self) -> None:
        self._free = threading.Lock()      # held: the ticket is taken
        self._free.acquire()
        self._nested = 1                   # library code within library code; only the attempt's thread counts
        self._raised = False
        self._spent = False                # nothing will be raised from outside any more
        self.void = False                  # the attempt has been superseded: it goes on in no library call
        self.thread = 0                    # the attempt's

    def take(self, quietly: bool = False) -> None:
        """Enter library code. Raises JobStopped, unless quietly: the attempt has been superseded."""
        if self._nested == 0:
            if not self._spent and not self._free.acquire(False):
                self._await_exception()
            self._spent |= self.void
            if self._spent and not quietly:
                raise JobStopped("the attempt has been superseded")
        self._nested += 1

    def put_back(self) -> None:
        """Leave library code. Raises JobStopped, once: the attempt has been superseded meanwhile."""
        self._nested -= 1
        if self._nested == 0 and not self._spent:
            self._free.release()
            if self.void:
                self.take()

    def keep(self) -> None:
        """Take the ticket for good. JobStopped may be raised in here for the last time."""
        if self._nested == 0 and not self._spent and not self._free.acquire(False):
            self._await_exception()
        self._nested = 1

    def use(self) -> None:
        """From another thread: raise JobStopped in the attempt's, now if it is in its function, else when it returns there."""
        self.void = True
        if self._free.acquire(False):
            if _is_logging(self.thread):
                threading.Thread(target=self._raise_after_logging, name="bgjobs-force-stop", daemon=True).start()
            else:
                self._raise()

    def _raise(self) -> None:
        _raise_in_thread(self.thread, JobStopped)
        self._raised = True

    def _raise_after_logging(self) -> None:
        """Let the app's logging get out of its handlers' locks: all threads need those. At its next record it waits for us."""
        pause = 0.001
        while _is_logging(self.thread):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        self._raise()

    def _await_exception(self) -> None:
        while not self._raised:
            time.sleep(0.0001)
        _raise_in_thread(self.thread, None)
        self._spent = True


def _is_logging(thread: int) -> bool:
    """Tell whether a thread is somewhere below a call of `logging`, unless it waits there for our exception."""
    frame = sys._current_frames().get(thread)
    if frame is not None and frame.f_code is Ticket._await_exception.__code__:
        return False
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "logging":
            return True
        frame = frame.f_back
    return False


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


def library_code(function: Callable[..., Any]) -> Callable[..., Any]:
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
    return call


# Ctrl-C in the main thread may come at any call or return in Python code, so also at the end of Condition.__enter__ and at the
# begin of Condition.__exit__: the lock would be held for ever. A lock's own, in C, are one step with the `with`. So we have
# `with` find those.

class _Condition(threading.Condition):
    """A condition that Ctrl-C does not leave locked."""

    __enter__ = property(lambda self: self._lock.__enter__)       # type: ignore[assignment]
    __exit__ = property(lambda self: self._lock.__exit__)         # type: ignore[assignment]


class _Event(threading.Event):
    """An event that Ctrl-C does not leave locked."""

    def __init__(self) -> None:
        super().__init__()
        self._cond = _Condition(threading.Lock())


class _HandleLock:
    """The lock of a handle, which `wait` and `as_completed` take inside a job: who holds it has the ticket, too."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._release_save = self._lock._release_save             # type: ignore[attr-defined]
        self._acquire_restore = self._lock._acquire_restore       # type: ignore[attr-defined]
        self._is_owned = self._lock._is_owned                     # type: ignore[attr-defined]

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        ticket = _here.ticket
        if ticket is not None:
            ticket.take(quietly=True)                     # also while a generator of the stdlib's cleans up
        acquired = self._lock.acquire(blocking, timeout)
        if not acquired and ticket is not None:
            ticket.put_back()
        return acquired

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


# ---- 7 Transactions -------------------------------------------------------------------------------------------
#
# A job that is pending and has no queue waits for its time, or is `parked`: out of the way until what that column names
# comes, a process that knows its function ("function NAME"), the end of another job of its name ("limit NAME"), or that of a
# job which is suspected, like this one, of taking its process down ("suspect").
#
# `queue` of a job is its lane while it is ready to be claimed (0 normal, 1 low priority), else NULL. `lane` of a root is
# the best queue in its tree, so that (lane, vtime) finds the next root and (root_id, queue, id) its oldest ready child.
# Each job carries counts over its descendants (total, done, failed, running; `open` is its direct children that
# are not over), which the transaction adds up and writes once for each ancestor, however many children it touched.

MIGRATIONS: tuple[tuple[str, ...], ...] = ((
    """CREATE TABLE bgjobs_jobs (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
        parent_id INTEGER, root_id INTEGER, queue INTEGER, lane INTEGER, vtime INTEGER NOT NULL DEFAULT 0,
        charge INTEGER NOT NULL DEFAULT 0, owner INTEGER, submitter INTEGER, returned INTEGER NOT NULL DEFAULT 0,
        goes_on INTEGER NOT NULL DEFAULT 0, superseded INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, died_with TEXT,
        own_errors INTEGER NOT NULL DEFAULT 0, open INTEGER NOT NULL DEFAULT 0,
        total INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        running INTEGER NOT NULL DEFAULT 0, low_priority INTEGER NOT NULL DEFAULT 0, system INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL, run_at REAL, started_at REAL, waited REAL, finished_at REAL, since REAL,
        duration REAL NOT NULL DEFAULT 0, progress REAL, progress_at REAL, gained REAL, seconds REAL, step REAL,
        tree_progress REAL NOT NULL DEFAULT 0, tree_at REAL, tree_gained REAL, tree_seconds REAL,
        phase TEXT, parked TEXT, max_running INTEGER, label TEXT, run_by TEXT, key TEXT, options TEXT, message TEXT,
        args TEXT, kwargs TEXT, state TEXT, positions TEXT, result TEXT, error TEXT)""",
    "CREATE INDEX bgjobs_ready_roots ON bgjobs_jobs(lane, vtime) WHERE lane IS NOT NULL",
    "CREATE INDEX bgjobs_ready_children ON bgjobs_jobs(root_id, queue) WHERE parent_id IS NOT NULL AND queue IS NOT NULL",
    # system and parent_id are there for the lists of people, which this index counts and has in order by itself.
    "CREATE INDEX bgjobs_begun ON bgjobs_jobs(status, system, parent_id) WHERE status <> 'pending'",
    "CREATE INDEX bgjobs_children ON bgjobs_jobs(parent_id) WHERE parent_id IS NOT NULL",
    "CREATE INDEX bgjobs_due ON bgjobs_jobs(run_at) WHERE run_at IS NOT NULL AND queue IS NULL AND status = 'pending'",
    "CREATE INDEX bgjobs_parked ON bgjobs_jobs(parked, root_id) WHERE parked IS NOT NULL",
    "CREATE INDEX bgjobs_limited ON bgjobs_jobs(name) WHERE max_running IS NOT NULL AND owner IS NOT NULL",
    "CREATE INDEX bgjobs_suspects ON bgjobs_jobs(deaths) WHERE deaths > 0",
    """CREATE UNIQUE INDEX bgjobs_root_key ON bgjobs_jobs(key) WHERE key IS NOT NULL AND parent_id IS NULL
        AND status IN ('pending', 'running', 'stopping', 'stopped')""",
    "CREATE UNIQUE INDEX bgjobs_child_key ON bgjobs_jobs(parent_id, key) WHERE key IS NOT NULL AND parent_id IS NOT NULL",
    """CREATE TABLE bgjobs_logs (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL, at REAL NOT NULL,
        level INTEGER NOT NULL, message TEXT NOT NULL)""",
    "CREATE INDEX bgjobs_logs_of_job ON bgjobs_logs(job_id)",
    # What people see of attempts; of those alone that are not told by their job's row: more than one, or one that did not end it.
    """CREATE TABLE bgjobs_attempts (job_id INTEGER NOT NULL, number INTEGER NOT NULL, started_at REAL, ended_at REAL NOT NULL,
        outcome TEXT NOT NULL, error TEXT, PRIMARY KEY (job_id, number)) WITHOUT ROWID""",
    # vtime: the queue's virtual time. last_id: the highest id ever removed, which is not given out again. counted_id: up to
    # which the statistics have counted what was created. token: of the status page, whichever process serves it.
    "CREATE TABLE bgjobs_clock (vtime INTEGER NOT NULL, last_id INTEGER NOT NULL, counted_id INTEGER NOT NULL, token TEXT)",
    "INSERT INTO bgjobs_clock VALUES (0, 0, 0, NULL)",
    """CREATE TABLE bgjobs_runners (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, host TEXT NOT NULL,
        workers INTEGER NOT NULL, started_at REAL NOT NULL, heartbeat_at REAL NOT NULL, abandoned INTEGER NOT NULL DEFAULT 0,
        lock_file TEXT)""",
    "CREATE TABLE bgjobs_functions (name TEXT PRIMARY KEY, seconds REAL, tree_seconds REAL) WITHOUT ROWID",
    """CREATE TABLE bgjobs_schedules (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, schedule TEXT NOT NULL, zone TEXT,
        name TEXT NOT NULL, args TEXT, kwargs TEXT, options TEXT, label TEXT, run_by TEXT, low_priority INTEGER NOT NULL,
        system INTEGER NOT NULL, max_running INTEGER, created_at REAL NOT NULL, next_at REAL NOT NULL, last_at REAL, job_id INTEGER,
        runs INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, paused INTEGER NOT NULL DEFAULT 0)""",
    # minute: of Unix time, the first of the hour where hours are summed up, 0 for what is older than the windows.
    """CREATE TABLE bgjobs_stats (minute INTEGER NOT NULL, name TEXT NOT NULL, created INTEGER NOT NULL, started INTEGER NOT NULL,
        finished INTEGER NOT NULL, failed INTEGER NOT NULL, waiting REAL NOT NULL, waiting_min REAL, waiting_max REAL,
        running REAL NOT NULL, running_min REAL, running_max REAL, PRIMARY KEY (minute, name)) WITHOUT ROWID""",
    # Which living runners' code has which schedules.
    """CREATE TABLE bgjobs_registered (schedule_id INTEGER NOT NULL, runner_id INTEGER NOT NULL,
        PRIMARY KEY (schedule_id, runner_id)) WITHOUT ROWID""",
),)

_SUBMITTED = ("id, name, status, queue, lane, vtime, created_at, run_at, submitter, parent_id, root_id, low_priority, system, "
              "label, run_by, key, options, args, kwargs")
NEXT_ID = "SELECT max((SELECT last_id FROM bgjobs_clock), ifnull((SELECT max(id) FROM bgjobs_jobs), 0)) + 1"
INSERT_ROOT = f"""INSERT INTO bgjobs_jobs ({_SUBMITTED}) VALUES (({NEXT_ID}), ?, 'pending', ?, ?,
    (SELECT vtime FROM bgjobs_clock), ?, ?, ?, NULL, NULL, ?, ?, ?, ?, ?, ?, ?, ?)"""
INSERT_CHILD = f"""INSERT INTO bgjobs_jobs ({_SUBMITTED}) VALUES (({NEXT_ID}), ?, 'pending', ?, NULL, 0, ?, ?, ?, ?, ?, ?,
    ?, ?, ?, ?, ?, ?, ?)"""
# One statement for a batch: five times as quick as a statement for each job. The encoded arguments are its JSON array.
INSERT_MANY = f"""INSERT INTO bgjobs_jobs ({_SUBMITTED}) SELECT :first + key, :name, 'pending', :queue, :lane, :vtime, :now, :run_at,
    :submitter, :parent, :root, :low, :system, :label, :run_by, NULL, :options, value, NULL FROM json_each(:batch)"""
CLOCK = "SELECT vtime FROM bgjobs_clock"
PAGE_TOKEN = "SELECT token FROM bgjobs_clock WHERE token IS NOT NULL"
KEEP_PAGE_TOKEN = "UPDATE bgjobs_clock SET token = :token WHERE token IS NULL"
TAKE_LOCK = "UPDATE bgjobs_clock SET vtime = vtime WHERE 0"
ADVANCE_CLOCK = "UPDATE bgjobs_clock SET vtime = :tag WHERE vtime < :tag"
ROOT_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE key = :key AND key IS NOT NULL AND parent_id IS NULL
    AND status IN ('pending', 'running', 'stopping', 'stopped')"""
CHILD_WITH_KEY = """SELECT id FROM bgjobs_jobs WHERE parent_id = :parent AND key = :key AND key IS NOT NULL
    AND parent_id IS NOT NULL"""
PARENT_OF = "SELECT parent_id FROM bgjobs_jobs WHERE id = :id"
STANDING = "SELECT status, attempt, root_id, low_priority, run_by, options FROM bgjobs_jobs WHERE id = :id"

# Cast, since SQLite keeps any type in any column: a row that somebody else has written must not stop the claims of all.
_CLAIMED = ("id, parent_id, root_id, CAST(name AS TEXT), CAST(attempt AS INTEGER), args, kwargs, state, positions, "
            "CAST(options AS TEXT), run_by, CAST(low_priority AS INTEGER), CAST(total AS INTEGER), CAST(progress AS REAL), "
            "CAST(vtime AS INTEGER), queue, CAST(max_running AS INTEGER), CAST(deaths AS INTEGER), "
            "CAST(CASE WHEN started_at IS NULL THEN max(created_at, ifnull(run_at, 0.0)) END AS REAL), CAST(duration AS REAL), system")
READY_ROOTS = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE id IN
    (SELECT id FROM bgjobs_jobs WHERE lane = :lane ORDER BY vtime, id LIMIT :limit)"""
READY_CHILDREN = f"""SELECT {_CLAIMED} FROM bgjobs_jobs WHERE root_id = :root AND queue = :lane AND id > :after
    AND parent_id IS NOT NULL AND queue IS NOT NULL ORDER BY id LIMIT :limit"""
# Jobs that are charged alike are claimed by one statement; :ids is a JSON array. A root without children is its own tree.
CLAIM = """UPDATE bgjobs_jobs SET status = 'running', attempt = attempt + 1, queue = NULL, charge = :charge, owner = :owner,
    waited = CASE WHEN started_at IS NULL THEN max(0.0, :now - max(created_at, ifnull(run_at, 0))) ELSE waited END,
    since = :now, started_at = ifnull(started_at, :now), phase = NULL, gained = NULL WHERE id IN (SELECT value FROM json_each(:ids))"""
CLAIM_SINGLE = CLAIM.replace("queue = NULL,", "queue = NULL, lane = NULL, vtime = vtime + :charge,")
FINISH = """UPDATE bgjobs_jobs SET status = 'finished', returned = 1, finished_at = ?, duration = duration + ?, result = ?,
    vtime = vtime + ?, charge = 0, owner = NULL, since = NULL
    WHERE id = ? AND attempt = ? AND open = 0 AND status IN ('running', 'stopping')"""
JUST_FINISHED = "SELECT 1 FROM bgjobs_jobs WHERE id = ? AND attempt = ? AND finished_at = ? AND status = 'finished'"
STILL_ACTIVE = """SELECT status, own_errors FROM bgjobs_jobs
    WHERE id = :id AND attempt = :attempt AND returned = 0 AND status IN ('running', 'stopping')"""
END_ATTEMPT = """UPDATE bgjobs_jobs SET status = :status, returned = :returned, finished_at = :finished_at, since = :since,
    duration = duration + :ran, result = :result, error = ifnull(:error, error), own_errors = own_errors + :errors,
    state = ifnull(:state, state), positions = ifnull(:positions, positions), attempt = attempt - :unspent,
    started_at = CASE WHEN :unspent AND started_at = since THEN NULL ELSE started_at END,
    queue = :queue, parked = :parked, goes_on = 0, phase = :phase, run_at = ifnull(:run_at, run_at), charge = 0, owner = NULL
    WHERE id = :id"""
SAVE_STATE = """UPDATE bgjobs_jobs SET state = ifnull(:state, state), positions = ifnull(:positions, positions)
    WHERE id = :id AND attempt = :attempt AND returned = 0 AND status IN ('running', 'stopping')"""
SAVE_PROGRESS = """UPDATE bgjobs_jobs SET progress = :progress, progress_at = :at, gained = :gained, seconds = :seconds, step = :step,
    message = :message
    WHERE id = :id AND attempt = :attempt AND returned = 0 AND status IN ('running', 'stopping')"""
ADD_CHARGE = """UPDATE bgjobs_jobs SET charge = charge + :more
    WHERE id = :id AND attempt = :attempt AND returned = 0 AND status IN ('running', 'stopping')"""

TREE_ROW = """SELECT name, status, returned, error, parent_id, root_id, open, total, done, failed, running, tree_progress, tree_at,
    tree_gained, tree_seconds, duration, since, lane, vtime, progress, low_priority, goes_on, deaths, system
    FROM bgjobs_jobs WHERE id = :id"""
BEST_LANE = """SELECT min(queue) FROM (SELECT queue FROM bgjobs_jobs WHERE id = :root UNION ALL SELECT min(queue)
    FROM bgjobs_jobs WHERE root_id = :root AND parent_id IS NOT NULL AND queue IS NOT NULL)"""
SAVE_TREE = """UPDATE bgjobs_jobs SET open = ?, total = ?, done = ?, failed = ?, running = ?, tree_progress = ?, tree_at = ?,
    tree_gained = ?, tree_seconds = ?, lane = ?, vtime = ? WHERE id = ?"""
CLOSE_PARENT = """UPDATE bgjobs_jobs SET status = :status, finished_at = :now, duration = :duration, since = NULL, phase = NULL
    WHERE id = :id"""

SUBTREE = """WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL SELECT j.id FROM tree JOIN bgjobs_jobs j ON j.parent_id = tree.id
    AND j.parent_id IS NOT NULL)
    SELECT j.id, j.parent_id, j.root_id, j.name, j.status, j.returned, j.options, j.system, j.low_priority, j.queue,
    j.progress, j.since, j.open, j.total, j.done, j.failed, j.running, j.tree_progress, j.run_at, j.key, j.charge, j.max_running,
    j.deaths, j.started_at, j.attempt
    FROM tree JOIN bgjobs_jobs j ON j.id = tree.id"""
MOVE = """UPDATE bgjobs_jobs SET status = :status, queue = :queue, parked = NULL, goes_on = 0, phase = :phase,
    finished_at = :finished_at, since = :since, duration = duration + :ran, charge = :charge,
    superseded = CASE WHEN :supersede THEN attempt ELSE superseded END,
    owner = CASE WHEN :status IN ('running', 'stopping') THEN owner END WHERE id = :id"""
SET_LOW_PRIORITY = "UPDATE bgjobs_jobs SET low_priority = :low, queue = :queue WHERE id = :id"
RESET = """UPDATE bgjobs_jobs SET state = NULL, positions = NULL, progress = NULL, progress_at = NULL, gained = NULL, step = NULL,
    message = NULL, result = NULL, error = NULL, own_errors = 0, returned = 0, goes_on = 0, deaths = 0, died_with = NULL, started_at = NULL,
    finished_at = NULL, duration = 0, open = 0, total = 0, done = 0, failed = 0, running = 0, tree_progress = 0, tree_at = NULL,
    tree_gained = NULL, tree_seconds = NULL WHERE id = :id"""
GO_ON = "UPDATE bgjobs_jobs SET goes_on = :goes_on WHERE id = :id AND goes_on <> :goes_on"
ACQUIT = "UPDATE bgjobs_jobs SET deaths = 0, died_with = NULL WHERE id = :id"
REOPEN = "UPDATE bgjobs_jobs SET returned = 0, error = NULL WHERE id = :id"
DELETE_JOB = "DELETE FROM bgjobs_jobs WHERE id = ?"
DELETE_LOGS = "DELETE FROM bgjobs_logs WHERE job_id = ?"
DELETE_ATTEMPTS = "DELETE FROM bgjobs_attempts WHERE job_id = ?"
INSERT_ATTEMPT = "INSERT OR IGNORE INTO bgjobs_attempts VALUES (:id, :number, :started_at, :ended_at, :outcome, :error)"
TRIM_ATTEMPTS = "DELETE FROM bgjobs_attempts WHERE job_id = :id AND number <= :number - :keep"
ATTEMPTS = "SELECT number AS attempt, started_at, ended_at, outcome, error FROM bgjobs_attempts WHERE job_id = :id ORDER BY number"
NOTE_REMOVED = "UPDATE bgjobs_clock SET last_id = max(last_id, :id)"
INSERT_LOG = "INSERT INTO bgjobs_logs (job_id, at, level, message) VALUES (?, ?, ?, ?)"
# One statement for all, since a thread that computes holds each one up by the interpreter lock; :lines is a JSON array of
# [job, at, level, message, attempt].
INSERT_LINES = """INSERT INTO bgjobs_logs (job_id, at, level, message) SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
    json_extract(value, '$[2]'), json_extract(value, '$[3]') FROM json_each(:lines) WHERE EXISTS
    (SELECT 1 FROM bgjobs_jobs WHERE id = json_extract(value, '$[0]') AND superseded < json_extract(value, '$[4]'))"""

DUE = """SELECT id, parent_id, root_id, low_priority FROM bgjobs_jobs WHERE run_at <= :now AND run_at IS NOT NULL
    AND queue IS NULL AND status = 'pending' AND parked IS NULL LIMIT 1000"""
NEXT_DUE = "SELECT min(run_at) FROM bgjobs_jobs WHERE run_at IS NOT NULL AND queue IS NULL AND status = 'pending' AND parked IS NULL"
MAKE_READY = "UPDATE bgjobs_jobs SET queue = :queue, parked = NULL, phase = NULL WHERE id = :id"
PARK = "UPDATE bgjobs_jobs SET queue = NULL, parked = :key, phase = :phase WHERE id = :id"
LIMIT = "UPDATE bgjobs_jobs SET max_running = :limit, parked = :key, phase = :phase WHERE id BETWEEN :first AND :last"
PARKED_KEYS = """WITH RECURSIVE keys(found) AS (SELECT min(parked) FROM bgjobs_jobs WHERE parked IS NOT NULL UNION ALL
    SELECT (SELECT min(parked) FROM bgjobs_jobs WHERE parked > found) FROM keys WHERE found IS NOT NULL)
    SELECT found FROM keys WHERE found IS NOT NULL"""
PARKED = "SELECT id, parent_id, root_id, low_priority FROM bgjobs_jobs WHERE parked = :key LIMIT 1000"
PARKED_ROOT = """SELECT id, parent_id, root_id, low_priority, max_running, deaths FROM bgjobs_jobs
    WHERE parked = :key AND root_id IS NULL ORDER BY id LIMIT 1"""
PARKED_CHILD = """SELECT id, parent_id, root_id, low_priority, max_running, deaths FROM bgjobs_jobs
    WHERE parked = :key AND root_id > :after ORDER BY root_id, id LIMIT 1"""
VTIME = "SELECT vtime FROM bgjobs_jobs WHERE id = :id"
PARKED_BELOW = """WITH RECURSIVE below(id) AS (SELECT value FROM json_each(:holders) UNION
    SELECT j.id FROM below JOIN bgjobs_jobs j ON j.parent_id = below.id WHERE j.open > 0 OR j.parked = :key)
    SELECT j.id, parent_id, root_id, low_priority, max_running, deaths FROM below JOIN bgjobs_jobs j USING (id) WHERE parked = :key LIMIT 100"""
HOLDERS_OF_NAME = "SELECT id FROM bgjobs_jobs WHERE name = :name AND max_running IS NOT NULL AND owner IS NOT NULL"
HOLDERS_SUSPECT = "SELECT id FROM bgjobs_jobs WHERE deaths >= 2 AND deaths > 0 AND owner IS NOT NULL"

SCHEDULE = """SELECT s.*, EXISTS (SELECT 1 FROM bgjobs_registered WHERE schedule_id = s.id) AS registered,
    (SELECT status FROM bgjobs_jobs WHERE id = s.job_id) AS job_status FROM bgjobs_schedules s"""
SCHEDULES = SCHEDULE + " ORDER BY system, name, id"
ONE_SCHEDULE = SCHEDULE + " WHERE id = :id"
DUE_SCHEDULES = SCHEDULE + " WHERE next_at <= :now AND paused = 0 AND registered"
NEXT_SCHEDULE = """SELECT min(next_at) FROM bgjobs_schedules WHERE paused = 0
    AND id IN (SELECT schedule_id FROM bgjobs_registered)"""
SCHEDULE_WITH_KEY = "SELECT id, schedule, zone, next_at FROM bgjobs_schedules WHERE key = :key"
INSERT_SCHEDULE = """INSERT INTO bgjobs_schedules (key, schedule, zone, name, args, kwargs, options, label, run_by, low_priority,
    system, max_running, created_at, next_at) VALUES (:key, :schedule, :zone, :name, :args, :kwargs, :options, :label, :run_by, :low_priority,
    :system, :max_running, :now, :next_at)"""
UPDATE_SCHEDULE = """UPDATE bgjobs_schedules SET schedule = :schedule, zone = :zone, name = :name, args = :args, kwargs = :kwargs,
    options = :options, label = :label, run_by = :run_by, low_priority = :low_priority, system = :system, max_running = :max_running,
    next_at = ifnull(:next_at, next_at) WHERE key = :key"""
REGISTER = "INSERT OR IGNORE INTO bgjobs_registered VALUES (:schedule, :runner)"
UNREGISTER = "DELETE FROM bgjobs_registered WHERE runner_id = :id"
TICK = """UPDATE bgjobs_schedules SET next_at = :next_at, last_at = :now, job_id = ifnull(:job, job_id),
    runs = runs + (:job IS NOT NULL), skipped = skipped + (:job IS NULL) WHERE id = :id"""
PAUSE_SCHEDULE = "UPDATE bgjobs_schedules SET paused = :paused, next_at = :next_at WHERE id = :id"
RUN_NOW = "UPDATE bgjobs_schedules SET last_at = :now, job_id = :job, runs = runs + 1 WHERE id = :id"
REMOVE_SCHEDULE = "DELETE FROM bgjobs_schedules WHERE id = :id"

SAVE_RUNNER = """INSERT INTO bgjobs_runners (id, pid, host, workers, started_at, heartbeat_at, abandoned, lock_file)
    VALUES (:id, :pid, :host, :workers, :now, :now, :abandoned, :lock_file)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = :now, abandoned = :abandoned, lock_file = :lock_file"""
REMOVE_RUNNER = "DELETE FROM bgjobs_runners WHERE id = :id"
LAST_SEEN = "SELECT heartbeat_at FROM bgjobs_runners WHERE id = :id"
OWNED = """SELECT id, parent_id, root_id, status, attempt, low_priority, since, charge, options, name, max_running FROM bgjobs_jobs
    WHERE status IN ('running', 'stopping') AND status <> 'pending' AND owner = :owner"""
ORPHANED = """SELECT DISTINCT owner FROM bgjobs_jobs WHERE status IN ('running', 'stopping') AND owner IS NOT NULL
    AND status <> 'pending' AND owner NOT IN (SELECT id FROM bgjobs_runners)"""
SUPERSEDE = "UPDATE bgjobs_jobs SET superseded = attempt WHERE id = :id"
# died_with: the runners that died under the job since it was last acquitted; `deaths` is their number.
COUNT_DEATH = """UPDATE bgjobs_jobs SET deaths = deaths + 1, died_with = json_insert(ifnull(died_with, '[]'), '$[#]', :owner)
    WHERE id = :id"""
DIED_BESIDE = """SELECT id, parent_id, root_id, low_priority, parked FROM bgjobs_jobs WHERE deaths > 0 AND id <> :id
    AND EXISTS (SELECT 1 FROM json_each(died_with) WHERE value IN
    (SELECT value FROM json_each((SELECT died_with FROM bgjobs_jobs WHERE id = :id))))"""
FORGET_DEATHS = """UPDATE bgjobs_jobs SET (deaths, died_with) = (SELECT count(*), json_group_array(value) FROM json_each(died_with)
    WHERE value NOT IN (SELECT value FROM json_each((SELECT died_with FROM bgjobs_jobs WHERE id = :killer)))) WHERE id = :id"""
_TALLIES = ("created", "started", "finished", "failed", "waiting", "waiting_min", "waiting_max", "running", "running_min", "running_max")
SAVE_TALLY = f"""INSERT INTO bgjobs_stats (minute, name, {", ".join(_TALLIES)}) VALUES ({", ".join("?" * 12)})
    ON CONFLICT (minute, name) DO UPDATE SET """ + ", ".join(
    f"{name} = {name[-3:]}(ifnull({name}, excluded.{name}), ifnull(excluded.{name}, {name}))" if name[-4:] in ("_min", "_max")
    else f"{name} = {name} + excluded.{name}" for name in _TALLIES)
_SUMS = ", ".join(f"{name[-3:]}({name}) AS {name}" if name[-4:] in ("_min", "_max") else f"sum({name}) AS {name}" for name in _TALLIES)
FOLD = f"SELECT {{part}} AS part, name, {_SUMS} FROM bgjobs_stats WHERE minute BETWEEN :first AND :last GROUP BY part, name"
# What was created is counted by its ids, when somebody asks or before some of it is removed: a submit pays nothing for it.
UNCOUNTED = """SELECT CAST(created_at / 60 AS INTEGER), name, count(*) FROM bgjobs_jobs
    WHERE id > (SELECT counted_id FROM bgjobs_clock) AND system = 0 GROUP BY 1, 2"""
NOTE_COUNTED = "UPDATE bgjobs_clock SET counted_id = max(counted_id, (SELECT ifnull(max(id), 0) FROM bgjobs_jobs))"
FORGET_MINUTES = "DELETE FROM bgjobs_stats WHERE minute BETWEEN :first AND :last"

# A job goes with its root, which has the lowest id of its tree; what an interruption left behind has no root any more.
EXPIRED = """SELECT j.id FROM bgjobs_jobs j LEFT JOIN bgjobs_jobs r ON r.id = ifnull(j.root_id, j.id)
    WHERE j.id > :after AND j.id <= :until AND (r.id IS NULL OR r.status IN ('finished', 'cancelled') AND r.finished_at < :finished
    OR r.status = 'failed' AND r.finished_at < :failed)"""
HIGHEST_ID = "SELECT ifnull(max(id), 0) FROM bgjobs_jobs"
TRIM_LOG = """DELETE FROM bgjobs_logs WHERE job_id = :id AND id <= (SELECT id FROM bgjobs_logs WHERE job_id = :id
    ORDER BY id DESC LIMIT 1 OFFSET :keep)"""
SAVE_COST = "INSERT OR REPLACE INTO bgjobs_functions VALUES (?, ?, ?)"


class Submission:
    """One job that is to be stored: its columns, encoded, and who it comes from."""

    __slots__ = ("name", "args", "kwargs", "options", "label", "run_by", "low_priority", "system", "key", "run_at",
                 "max_running", "submitter", "parent_id", "author")

    def __init__(self, name: str) -> None:
        self.name = name
        self.args: str | None = None
        self.kwargs: str | None = None
        self.options: str | None = None
        self.label: str | None = None
        self.run_by: str | None = None        # None: the parent's
        self.low_priority: int | None = None  # None: the parent's
        self.system = 0
        self.key: str | None = None
        self.run_at: float | None = None
        self.max_running: int | None = None
        self.submitter: int | None = None
        self.parent_id: int | None = None
        self.author: tuple[int, int] | None = None      # job id and attempt, when a job submits: a superseded one may not


def _scheduled(row: dict[str, Any]) -> Submission:
    """Return the job that a row of bgjobs_schedules makes."""
    new = Submission(row["name"])
    for column in ("args", "kwargs", "options", "label", "run_by", "low_priority", "system", "max_running"):
        setattr(new, column, row[column])
    return new


SUSPECT = 2                # deaths of its process after which a job runs with no other such one beside it
DEATHS = 3                 # after which it is failed
HEARTBEAT_SECONDS = 15     # for people to see; what tells the dead from the living is _Presence
PARKED_A_CLAIM = 200       # jobs that one claim puts out of the way; then others get their turn to write


def kept_options(text: str | None) -> dict[str, Any]:
    """Return the options that a row keeps. Those that somebody else has written and nobody can read: {"unreadable": why}."""
    if not text:
        return {}
    try:
        options = json.loads(text)
        if not isinstance(options, dict):
            raise ValueError(f"{_short(text)} is no JSON object")
        for name, value in options.items():
            if not (isinstance(value, list) if name == "secret" else name not in _OPTIONS or _OPTIONS[name][0](value)):
                raise ValueError(f"{name} is {_short(value)}")
        return options
    except (RecursionError, TypeError, ValueError) as error:
        return {"unreadable": _text(error)}


def slots_of(name: str, max_running: int | None, deaths: int) -> dict[str, int]:
    """Return the limits that a job counts for, as {what it is parked by: how many may run}."""
    slots = {} if max_running is None else {f"limit {name}": max_running}
    return slots if deaths < SUSPECT else {**slots, "suspect": 1}


class _Tally:
    """What one transaction counts for the statistics of one function."""

    __slots__ = ("started", "finished", "failed", "waiting", "running")

    def __init__(self) -> None:
        self.started = self.finished = self.failed = 0
        self.waiting: list[float] = []
        self.running: list[float] = []

    def row(self) -> tuple[Any, ...]:
        """Return the columns of _TALLIES."""
        measured = [value for some in (self.waiting, self.running)
                    for value in (sum(some), min(some, default=None), max(some, default=None))]
        return 0, self.started, self.finished, self.failed, *measured


class _Change:
    """What one transaction adds up for one job that has descendants, or for one root."""

    __slots__ = ("open", "total", "done", "failed", "running", "progress", "charge", "wake", "relane")

    def __init__(self) -> None:
        self.open = self.total = self.done = self.failed = self.running = self.charge = 0
        self.progress = 0.0
        self.wake: int | None = None       # a job became ready in this lane
        self.relane = False                # ready jobs went away: look the best lane up


def _contribution(status: str, progress: float | None) -> tuple[int, int, int, float]:
    """Return what a job in `status` adds to done, failed, running and progress of its ancestors."""
    over = status in OVER
    return over, status == FAILED, status in ACTIVE, 1.0 if over else progress or 0.0


class Transaction:
    """What a write may do, between one BEGIN IMMEDIATE and its COMMIT. Made and run by the store."""

    def __init__(self, db: sqlite3.Connection | _Through, lineages: dict[int, tuple[int, ...]], now: float) -> None:
        self.execute, self.executemany, self.now = db.execute, db.executemany, now
        self._lineages = lineages                       # parent id -> it and its ancestors, up to the root
        self._changes: dict[int, _Change] = {}
        self._reported: dict[int, tuple[float, int]] = {}   # job id -> progress and more charge that this transaction saved
        self._tallies: dict[str, _Tally] = {}           # by name of the function
        self.over: list[int] = []                       # jobs that became over
        self.parked = 0                                 # jobs that claims have put out of the way
        self._slots: dict[str, set[int]] = {}           # key of a limit -> jobs that run, while claiming
        self._freed: set[str] = set()                   # keys of limits below which attempts have ended
        self.trees: list[tuple[str, float]] = []        # names of jobs with children that finished, and their durations
        self.after_commit: list[Callable[[], None]] = []

    def forget_changes(self) -> None:
        """Drop what is added up and not applied, after a ROLLBACK TO."""
        self._changes.clear()

    def _change(self, job_id: int) -> _Change:
        change = self._changes.get(job_id)
        if change is None:
            change = self._changes[job_id] = _Change()
        return change

    def _lineage(self, parent_id: int | None) -> tuple[int, ...]:
        """Return the ids from a job's parent up to its root; they never change."""
        if parent_id is None:
            return ()
        line = self._lineages.get(parent_id)
        if line is None:
            row = self.execute(PARENT_OF, {"id": parent_id}).fetchone()
            line = (parent_id, *(self._lineage(row[0]) if row else ()))
            if len(self._lineages) > 10_000:
                self._lineages.clear()
            self._lineages[parent_id] = line
        return line

    # submit

    def submit(self, new: Submission) -> int:
        """Store one job and return its id; with a key, that of the job which has it already."""
        root_id, low, run_by = self._admit(new)
        if new.key is not None:
            found = self.execute(ROOT_WITH_KEY if new.parent_id is None else CHILD_WITH_KEY,
                                 {"key": new.key, "parent": new.parent_id}).fetchone()
            if found:
                return found[0]
        queue = self._queue_of(new, low)
        shared = (self.now, new.run_at, new.submitter)
        rest = (low, new.system, new.label, run_by, new.key, new.options, new.args, new.kwargs)
        if root_id is None:
            job_id = self.execute(INSERT_ROOT, (new.name, queue, queue, *shared, *rest)).lastrowid
        else:
            job_id = self.execute(INSERT_CHILD, (new.name, queue, *shared, new.parent_id, root_id, *rest)).lastrowid
            self._adopt(new.parent_id, 1, queue)
        if new.max_running is not None:
            self._limit(new, range(job_id, job_id + 1), queue)
        return job_id

    def submit_many(self, new: Submission, arguments: list[str | None]) -> range:
        """Store one job for each of the encoded argument lists and return their ids."""
        root_id, low, run_by = self._admit(new)
        queue = self._queue_of(new, low)
        first = self.execute(NEXT_ID).fetchone()[0]
        ids = range(first, first + len(arguments))
        lane, vtime = (queue, self.execute(CLOCK).fetchone()[0]) if root_id is None else (None, 0)
        self.execute(INSERT_MANY, {
            "first": first, "name": new.name, "queue": queue, "lane": lane, "vtime": vtime, "now": self.now, "run_at": new.run_at,
            "submitter": new.submitter, "parent": new.parent_id, "root": root_id, "low": low, "system": new.system,
            "label": new.label, "run_by": run_by, "options": new.options, "batch": json.dumps(arguments)})
        if root_id is not None:
            self._adopt(new.parent_id, len(arguments), queue)
        if new.max_running is not None:
            self._limit(new, ids, queue)
        return ids

    def _queue_of(self, new: Submission, low: int) -> int | None:
        """Return the queue a new job is ready in, or None: it waits for its time, or at the end of those its limit holds up."""
        if new.run_at is not None and new.run_at > self.now:
            return None
        key = f"limit {new.name}"
        behind_others = new.max_running is not None and self.execute(PARKED, {"key": key}).fetchone() is not None
        return low if not behind_others or self._holders(key).intersection(self._lineage(new.parent_id)) else None

    def _limit(self, new: Submission, ids: range, queue: int | None) -> None:
        parked = queue is None and (new.run_at is None or new.run_at <= self.now)
        self.execute(LIMIT, {"first": ids[0], "last": ids[-1], "limit": new.max_running, "key": f"limit {new.name}" if parked else None,
                             "phase": "limit reached" if parked else None})

    def _admit(self, new: Submission) -> tuple[int | None, int, str | None]:
        """Return the root's id (None: the job is one), low_priority and run_by, if author and parent allow the job now."""
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
        if status in OVER or status in (STOPPING, STOPPED) and not by_itself:
            raise InvalidOperation(f"job {new.parent_id} is {status}; it takes no {'more ' if status in OVER else ''}children"
                                   f"{'' if status in OVER else ' before it is resumed'}")
        return (root_id or new.parent_id, low if new.low_priority is None else new.low_priority,
                run_by if new.run_by is None else new.run_by)

    def check_author(self, author: tuple[int, int]) -> None:
        """Refuse what an attempt asks for that has been superseded. Raises JobStopped."""
        row = self.execute(STANDING, {"id": author[0]}).fetchone()
        if row is None or row[1] != author[1] or row[0] not in ACTIVE:
            raise JobStopped(f"attempt {author[1]} of job {author[0]} has been superseded")

    def _adopt(self, parent_id: int, count: int, queue: int | None) -> None:
        """Count new children for all their ancestors, and wake the root."""
        self._count(parent_id, 0, 0, 0, 0.0, count)
        self._change(parent_id).open += count
        if queue is not None:
            self._wake(self._lineage(parent_id)[-1], queue)

    def _wake(self, root_id: int, queue: int) -> None:
        change = self._change(root_id)
        change.wake = queue if change.wake is None else min(change.wake, queue)

    # claim

    def claim(self, owner: int, free: int, low_free: int, ahead: int, planned: float, workers: int, costs: Costs
              ) -> list[tuple[Any, ...]]:
        """Claim jobs for `free` places in fair order, and up to `ahead` more that are short, for `workers` that will be free
        soon, where `planned` seconds of work wait already. Low-priority jobs get at most `low_free` places and only what normal ones leave.
        Returns rows of _CLAIMED, each with its charge appended."""
        claims: list[tuple[Any, ...]] = []
        self._slots.clear()
        while True:
            self.apply()                                # what this transaction submitted, or parked, counts
            parked, normal = self.parked, []
            if free + ahead > len(claims):
                normal = self._claim_lane(0, owner, max(0, free - len(claims)), ahead, planned, workers, costs)
            claims += normal
            low_room = min(low_free, free - len(claims))
            if low_room > 0:
                low = self._claim_lane(1, owner, low_room, 0, 0.0, workers, costs)
                low_free -= len(low)
                claims += low
            if len(claims) >= free or self.parked == parked or self.parked >= PARKED_A_CLAIM:
                return claims

    def _claim_lane(self, lane: int, owner: int, free: int, ahead: int, planned: float, workers: int, costs: Costs
                    ) -> list[tuple[Any, ...]]:
        roots = self.execute(READY_ROOTS, {"lane": lane, "limit": free + ahead}).fetchall()
        if not roots:
            return []
        claims, tag, budget = [], 0, AHEAD_SECONDS * workers
        singles: dict[int, list[int]] = {}                # charge -> ids
        others: dict[int, list[int]] = {}
        plans: dict[str, tuple[int, float]] = {}          # all jobs of a batch and a name cost alike

        def charge_for(row: tuple[Any, ...]) -> int | None:
            if (row[16] is not None or row[17] >= SUSPECT) and not self._take_slots(row):
                return None
            return (plans.get(row[3]) or plans.setdefault(row[3], costs.plan(row[3])))[0]
        for root, row, tag, charge in self._in_fair_order(roots, lane, free + ahead, charge_for):
            if len(claims) >= free:                       # ahead of a free worker: only while they are known to be short
                planned += plans[row[3]][1]
                if planned > budget or len(claims) >= free + ahead or row[9] is not None and '"recover":false' in row[9]:
                    break
            claims.append((*row, charge))
            if row[1] is None and row[12] == 0:
                singles.setdefault(charge, []).append(row[0])
                continue
            others.setdefault(charge, []).append(row[0])
            self._count(row[1], 0, 0, 1, 0.0)
            change = self._change(root)
            change.charge += charge
            change.relane = True
        for sql, ids_by_charge in ((CLAIM_SINGLE, singles), (CLAIM, others)):
            for charge, ids in ids_by_charge.items():
                self.execute(sql, {"charge": charge, "owner": owner, "now": self.now, "ids": json.dumps(ids)})
        if tag:
            self.execute(ADVANCE_CLOCK, {"tag": tag})
        return claims

    def _take_slots(self, row: tuple[Any, ...]) -> bool:
        """Count a job that is limited, by max_running or as a suspect, as running; or park it, if it may not run now."""
        keys = slots_of(row[3], row[16], row[17])
        for key, limit in keys.items():
            if key not in self._slots:
                self._slots[key] = self._holders(key)
            if not self._has_room(self._slots[key], limit, row[1]):
                self.execute(PARK, {"id": row[0], "key": key, "phase": "limit reached" if key != "suspect" else "interrupted"})
                self._change(row[2] or row[0]).relane = True
                self.parked += 1
                return False
        for key in keys:
            self._slots[key].add(row[0])
        return True

    def _free_slots(self, name: str, max_running: int | None, deaths: int) -> None:
        """Note that an attempt has ended; apply() makes ready what waited for that."""
        if max_running is not None or deaths >= SUSPECT:
            self._freed.update(slots_of(name, max_running, deaths))

    def unpark_next(self, key: str) -> None:
        """Make as many jobs ready as a limit has slots free."""
        def make_ready(job: tuple[Any, ...]) -> bool:
            room = self._has_room(running, slots_of(name, job[4], job[5])[key], job[1])
            if room:
                self._make_ready([job[:4]])
                running.add(job[0])
            return room
        name, running = key.partition(" ")[2], self._holders(key)
        while (following := self._next_parked(key)) is not None and make_ready(following):
            pass
        if following is not None:
            for descendant in self.execute(PARKED_BELOW, {"key": key, "holders": json.dumps([*running])}).fetchall():
                make_ready(descendant)

    def _holders(self, key: str) -> set[int]:
        """Return the jobs that run and count for a limit."""
        return {row[0] for row in self.execute(HOLDERS_SUSPECT if key == "suspect" else HOLDERS_OF_NAME, {"name": key.partition(" ")[2]})}

    def _has_room(self, running: set[int], limit: int, parent_id: int | None) -> bool:
        """Tell whether a child of this parent may run beside those. Its ancestors do not count: they may wait for it."""
        return len(running) < limit or parent_id is not None and len(running.difference(self._lineage(parent_id))) < limit

    def _next_parked(self, key: str) -> tuple[Any, ...] | None:
        """Return the oldest job of the tree that has run least, normal before low priority, as far as 64 trees."""
        heads, after = self.execute(PARKED_ROOT, {"key": key}).fetchall(), 0
        while len(heads) < 64 and (head := self.execute(PARKED_CHILD, {"key": key, "after": after}).fetchone()):
            heads.append(head)
            after = head[2]
        clock = self.execute(CLOCK).fetchone()[0]
        return min(heads, default=None, key=lambda head: (
            head[3], entry_tag(self.execute(VTIME, {"id": head[2] or head[0]}).fetchone()[0], clock), head[0]))

    def _in_fair_order(self, roots: list[tuple[Any, ...]], lane: int, limit: int, charge: Callable[[tuple[Any, ...]], int | None]
                       ) -> Iterator[tuple[int, Any, int, int]]:
        """Yield what fair_order does for rows of roots. Where all of them are single jobs, none comes twice: no heap."""
        if any(row[12] for row in roots):
            chunk = max(4, limit // len(roots) + 1)
            return fair_order([(row[14], row[0], self._ready_jobs(row, lane, chunk) if row[12] else iter((row,)))
                               for row in roots], charge)
        roots.sort(key=operator.itemgetter(14, 0))
        return ((row[0], row, row[14], cost) for row in roots if (cost := charge(row)) is not None)

    def _ready_jobs(self, root: tuple[Any, ...], lane: int, chunk: int) -> Iterator[tuple[Any, ...]]:
        """Yield the ready jobs of a tree in one lane, oldest first, read a chunk at a time."""
        if root[15] == lane:
            yield root
        after = 0
        while True:
            rows = self.execute(READY_CHILDREN, {"root": root[0], "lane": lane, "after": after, "limit": chunk}).fetchall()
            yield from rows
            if len(rows) < chunk or self.parked >= PARKED_A_CLAIM:
                return
            after = rows[-1][0]

    # the end of attempts

    def finish(self, attempts: list[Attempt]) -> None:
        """Record the outcomes of attempts. One that was superseded is left out."""
        self.apply()                                    # the children that this transaction submitted count
        plain = [a for a in attempts if a.outcome == RETURNED and not a.has_children and a.number == 1]
        if plain:
            rows = [(self.now, a.ran, a.result, a.correction if a.parent_id is None else 0, a.id, a.number) for a in plain]
            if self.executemany(FINISH, rows).rowcount == len(rows):
                for attempt in plain:
                    self._ended(attempt)
            else:                                       # some were superseded or got a child from outside: one by one
                for attempt, row in zip(plain, rows):
                    if self.execute(STILL_ACTIVE, {"id": attempt.id, "attempt": attempt.number}).fetchone():
                        self._end(attempt)
                    elif self.execute(JUST_FINISHED, (attempt.id, attempt.number, self.now)).fetchone():
                        self._ended(attempt)
        for attempt in attempts:
            if attempt.outcome != RETURNED or attempt.has_children or attempt.number > 1:
                self._end(attempt)

    def finish_superseded(self, attempt: Attempt) -> bool:
        """Record the outcome of an attempt that goes on executing, and accept nothing from it any more. False: it has ended."""
        active = self.execute(STILL_ACTIVE, {"id": attempt.id, "attempt": attempt.number}).fetchone() is not None
        if active:
            self._end(attempt)
            self.execute(SUPERSEDE, {"id": attempt.id})
        return active

    def _ended(self, attempt: Attempt) -> None:
        """Count a leaf that FINISH has written."""
        self.over.append(attempt.id)
        self._tally_end(attempt.name, attempt.system, FINISHED, attempt.ran_before + attempt.ran)
        self._free_slots(attempt.name, attempt.max_running, attempt.deaths)
        if attempt.parent_id is not None:
            progress, charged = self._saved(attempt)
            self._count(attempt.parent_id, 1, 0, -1, 1.0 - progress)
            self._change(attempt.parent_id).open -= 1
            self._change(attempt.root_id).charge += attempt.correction - charged

    def _end(self, attempt: Attempt) -> None:
        """Record any outcome, unless the attempt has been superseded."""
        self.apply()                                    # the counts must be true before they decide
        found = self.execute(STILL_ACTIVE, {"id": attempt.id, "attempt": attempt.number}).fetchone()
        if found is None:
            return
        if attempt.unsaved_progress is not None:
            self.save_progress(attempt, attempt.unsaved_progress)
        progress, charged = self._saved(attempt)
        row = self._row(attempt.id)
        outcome, over = attempt.outcome, row["open"] == 0
        stops = found[0] == STOPPING and not row["goes_on"]
        end: dict[str, Any] = {"id": attempt.id, "ran": attempt.ran, "result": None, "error": None, "errors": 0, "queue": None,
                               "returned": 0, "state": None, "positions": attempt.unsaved_positions(),
                               "phase": None, "parked": None, "run_at": None, "unspent": 0, "since": None, "finished_at": None}
        if outcome == RETURNED:
            status = FINISHED if over else STOPPED if stops else RUNNING
            end.update(result=attempt.result, returned=1)
        elif outcome == RAISED and found[1] < attempt.options.get("retries", 0):
            pause = pause_before_retry(attempt.options, found[1] + 1)
            status = STOPPED if stops else PENDING
            end.update(error=attempt.error, errors=1, run_at=self.now + (0.0 if stops else pause), phase=None if stops else "retrying")
            when = "when it is resumed" if stops else f"in {pause:,.1f} s"
            self.log(attempt.id, logging.WARNING,
                     f"attempt {attempt.number} failed; retry {found[1] + 1} of {attempt.options['retries']} {when}")
        elif outcome == RAISED:
            status = FAILED if over else STOPPED if stops else RUNNING
            end.update(error=attempt.error, errors=1, returned=2)              # 2: it raised; an error may be of an earlier attempt
        elif outcome == HALTED and not row["goes_on"]:
            status = STOPPED
        else:                                           # given back: RELEASED, UNSPENT or UNKNOWN; or resumed already
            status = STOPPED if stops else PENDING
            end["unspent"] = int(outcome in (UNSPENT, UNKNOWN))
            if status == PENDING and outcome == UNKNOWN:
                end.update(parked=f"function {attempt.name}", phase="unknown function")
            elif status == PENDING:
                end.update(queue=row["low_priority"], phase="interrupted" if outcome == RELEASED else None)
        if status in OVER:
            end["finished_at"] = self.now
            self._tally_end(attempt.name, attempt.system, status, row["duration"] + attempt.ran)
            if status == FINISHED and row["total"]:
                self.trees.append((attempt.name, row["duration"] + attempt.ran))
        if status == RUNNING:
            end["since"] = self.now
        if not end["unspent"] and (attempt.number > 1 or not end["returned"]):
            word = "timed out" if outcome == RAISED and attempt.reason == TIMED_OUT else OUTCOMES[outcome]
            self._keep_attempt(attempt.id, attempt.number, row["since"], word, attempt.error)
        self.execute(END_ATTEMPT, {**end, "status": status})
        self._free_slots(attempt.name, attempt.max_running, attempt.deaths)
        root_id = attempt.root_id or attempt.id
        self._change(root_id).charge += attempt.correction - charged
        self._moved(attempt.id, attempt.parent_id, found[0], status, progress)
        if end["queue"] is not None:
            self._wake(root_id, end["queue"])

    def _keep_attempt(self, job_id: int, number: int, started_at: float | None, outcome: str, error: str | None) -> None:
        """Keep, for people, what became of an attempt; error is one of dump_error."""
        said = json.loads(error) if error else {}
        self.execute(INSERT_ATTEMPT, {"id": job_id, "number": number, "started_at": started_at, "ended_at": self.now, "outcome": outcome,
                                      "error": _text(f"{said['type']}: {said['text']}", 500) if said else None})
        if number > ATTEMPTS_A_JOB:
            self.execute(TRIM_ATTEMPTS, {"id": job_id, "number": number, "keep": ATTEMPTS_A_JOB})

    def _moved(self, job_id: int, parent_id: int | None, old: str, new: str, progress: float | None) -> None:
        """Count a change of status for the ancestors."""
        if new in OVER and old not in OVER:
            self.over.append(job_id)
        if parent_id is None or old == new:
            return
        over, failed, active, gained = (after - before for after, before in
                                        zip(_contribution(new, progress), _contribution(old, progress)))
        self._count(parent_id, over, failed, active, gained)
        self._change(parent_id).open -= over

    def _count(self, parent_id: int | None, done: int, failed: int, running: int, progress: float, total: int = 0) -> None:
        """Add to the counts of a job's ancestors, from its parent up."""
        for ancestor in self._lineage(parent_id):
            change = self._change(ancestor)
            change.done += done
            change.failed += failed
            change.running += running
            change.progress += progress
            change.total += total

    def _row(self, job_id: int) -> dict[str, Any]:
        cursor = self.execute(TREE_ROW, {"id": job_id})
        return dict(zip((column[0] for column in cursor.description), cursor.fetchone()))

    # what is added up

    def _tally(self, name: str) -> _Tally:
        tally = self._tallies.get(name)
        if tally is None:
            tally = self._tallies[name] = _Tally()
        return tally

    def count_start(self, name: str, waited: float) -> None:
        """Count a job that has begun, for the first time."""
        self._tally(name).started += 1
        self._tally(name).waiting.append(waited)

    def _tally_end(self, name: str, system: Any, status: str, seconds: float) -> None:
        if not system:
            tally = self._tally(name)
            if status == FINISHED:
                tally.finished += 1
            else:
                tally.failed += 1
            tally.running.append(seconds)

    def save_tallies(self) -> None:
        """Write what was counted for the statistics; the last thing in a transaction."""
        if self._tallies:
            minute = int(self.now // 60)
            self.executemany(SAVE_TALLY, [(minute, name, *tally.row()) for name, tally in self._tallies.items()])

    def apply(self) -> None:
        """Write the counts of ancestors and the virtual times of roots; close parents whose last child is over."""
        while self._changes or self._freed:
            freed, self._freed = self._freed, set()
            for key in freed:
                self.unpark_next(key)
            changes, self._changes = self._changes, {}
            for job_id, change in changes.items():
                row = self.execute(TREE_ROW, {"id": job_id}).fetchone()
                if row is not None:
                    self._apply(job_id, change, row)

    def _apply(self, job_id: int, change: _Change, row: tuple[Any, ...]) -> None:
        (name, status, returned, error, parent_id, root_id, open_, total, done, failed, running, tree_progress, tree_at, tree_gained,
         tree_seconds, duration, since, lane, vtime, progress, _, _, _, system) = row
        open_ += change.open
        total += change.total
        if change.progress:
            elapsed = duration + max(0.0, self.now - since if since else 0.0)
            gap = self.now - max(tree_at or 0.0, since or 0.0)      # what happened before a resume took no time of this run
            tree_gained, tree_seconds = Rate(tree_gained or 0.0, tree_seconds or 0.0).after(change.progress, gap, elapsed)
            tree_at = self.now
            tree_progress += change.progress
        vtime += change.charge
        idle = lane is None
        if change.relane:
            lane = self.execute(BEST_LANE, {"root": job_id}).fetchone()[0]
        if change.wake is not None:
            if idle:
                vtime = entry_tag(vtime, self.execute(CLOCK).fetchone()[0])
            lane = change.wake if lane is None else min(lane, change.wake)
        self.execute(SAVE_TREE, (open_, total, done + change.done, failed + change.failed, running + change.running, tree_progress,
                                 tree_at, tree_gained, tree_seconds, lane, vtime, job_id))
        if open_ == 0 and returned and status in (RUNNING, STOPPED):
            self._close(job_id, name, system, parent_id, status, error if returned == 2 else None,
                        duration + max(0.0, self.now - (since or self.now)), progress)

    def _close(self, job_id: int, name: str, system: int, parent_id: int | None, status: str, error: str | None, duration: float,
               progress: float | None) -> None:
        """End a job whose function has returned and whose last child is over."""
        end = FAILED if error is not None else FINISHED
        self.execute(CLOSE_PARENT, {"id": job_id, "status": end, "now": self.now, "duration": duration})
        if end == FINISHED:
            self.trees.append((name, duration))
        self._tally_end(name, system, end, duration)
        self._moved(job_id, parent_id, status, end, progress)

    # operations

    def operate(self, operation: str, job_id: int, by: str | None, author: tuple[int, int] | None = None) -> list[int]:
        """Apply an operation to a job and those descendants that allow it; return the ids it was applied to.

        KeyError: no such job; InvalidOperation: the job's status does not allow it.
        """
        if author is not None:
            self.check_author(author)
        self.apply()
        cursor = self.execute(SUBTREE, {"id": job_id})
        columns = [column[0] for column in cursor.description]
        tree = [dict(zip(columns, row)) for row in cursor.fetchall()]
        if not tree:
            raise KeyError(job_id)
        top = tree[0]
        self._check_operation(operation, top, tree)
        if operation == "restart":
            self._forget_descendants(top, tree[1:])
            tree = tree[:1]
        moved = [row["id"] for row in tree if self._operate_on(operation, row, top)]
        if moved:
            text = f"{operation.replace('_', ' ')}{f' by {by}' if by else ''}"
            self.log(job_id, logging.INFO, f"{text} ({len(moved):,} jobs of the tree)" if len(moved) > 1 else text)
        self.apply()
        return moved

    def _check_operation(self, operation: str, top: dict[str, Any], tree: list[dict[str, Any]]) -> None:
        options, job = kept_options(top["options"]), f"job {top['id']}"
        active = next((row["id"] for row in tree if row["status"] in ACTIVE and row is not top), None)
        allowed = allowed_operations(top["status"], options, bool(top["system"]), active is not None)
        why = objection(operation, options, bool(top["system"]))
        below = operation == "force_stop" and top["status"] == STOPPED and any(row["status"] == STOPPING for row in tree)
        if why or top["status"] not in TRANSITIONS[operation] and not below:
            raise refusal(job, top["status"], operation, [name for name in allowed if name != operation],
                          why if top["status"] in TRANSITIONS[operation] else "")
        if operation in ("cancel", "restart") and active is not None:
            raise refusal(job, top["status"], operation, [], f"its descendant job {active} is still running; stop it first")
        if top["key"] and top["status"] in OVER and top["parent_id"] is None:
            holder = self.execute(ROOT_WITH_KEY, {"key": top["key"]}).fetchone()
            if holder:
                raise refusal(job, top["status"], operation, [], f"job {holder[0]} has its key {top['key']!r} now")

    def _operate_on(self, operation: str, row: dict[str, Any], top: dict[str, Any]) -> bool:
        """Apply an operation to one job of the tree, if its status allows it."""
        status, options = row["status"], kept_options(row["options"])
        new = TRANSITIONS[operation].get(status)
        if operation == "resume" and status == STOPPING and row is not top:
            self.execute(GO_ON, {"id": row["id"], "goes_on": 1})     # as soon as it has stopped
            return True
        if operation == "force_stop" and row is top and status == STOPPED:
            return False                                # for the sake of its descendants
        if new is None or row is not top and (operation == "resume" and status == FAILED and top["status"] != FAILED
                                              or operation == "restart"):
            return False
        if operation == "stop":
            if status in (STOPPING, STOPPED):
                self.execute(GO_ON, {"id": row["id"], "goes_on": 0})
                return row is top
            if objection(operation, options, bool(row["system"])):
                return False
        if operation.endswith("low_priority"):
            return self._set_low_priority(row, int(operation == "set_low_priority"))
        since, ran, root_id = None, 0.0, row["root_id"] or row["id"]
        if status in ACTIVE:
            ran = max(0.0, self.now - (row["since"] or self.now))
            since = row["since"]
            if new == STOPPING and row["returned"]:     # nothing executes: there is no checkpoint to wait for
                new = STOPPED
            if new == STOPPED:
                since = None
                if not row["returned"]:
                    self._keep_attempt(row["id"], row["attempt"], row["since"], "force-stopped", None)
                    self._change(root_id).charge += int(ran * 1e6) - row["charge"]
                    self._free_slots(row["name"], row["max_running"], row["deaths"])
        if operation == "resume" and row["returned"] and status == STOPPED:
            new, since = RUNNING, self.now              # waits for its children again
        elif operation == "resume" and row["returned"]:
            self.execute(REOPEN, {"id": row["id"]})
        if operation == "resume" and row["deaths"]:
            self.execute(ACQUIT, {"id": row["id"]})     # somebody has looked at it
        if operation == "restart":
            self.execute(RESET, {"id": row["id"]})
            row["progress"] = None
        later = row["run_at"] is not None and row["run_at"] > self.now and row["started_at"] is None      # no retry's pause
        queue = row["low_priority"] if new == PENDING and not later else None
        self.execute(MOVE, {"id": row["id"], "status": new, "queue": queue, "phase": None, "since": since,
                            "finished_at": self.now if new in OVER else None, "charge": row["charge"] if new in ACTIVE else 0,
                            "ran": ran if new == STOPPED else 0.0, "supersede": operation == "force_stop"})
        self._moved(row["id"], row["parent_id"], status, new, row["progress"])
        change = self._change(root_id)
        change.relane = True
        if row["returned"]:
            self._change(row["id"])                     # its last child may be over already: apply() looks
        if queue is not None:
            self._wake(root_id, queue)
        return True

    def _set_low_priority(self, row: dict[str, Any], low: int) -> bool:
        if row["low_priority"] != low:
            ready = row["queue"] is not None
            self.execute(SET_LOW_PRIORITY, {"id": row["id"], "low": low, "queue": low if ready else None})
            self._change(row["root_id"] or row["id"]).relane = True
        return True

    def _forget_descendants(self, top: dict[str, Any], descendants: list[dict[str, Any]]) -> None:
        """Delete a job's descendants, with their logs, and take them out of its ancestors' counts."""
        if not descendants:
            return
        self.count_created()
        ids = [(row["id"],) for row in descendants]
        self.over += [row["id"] for row in descendants]  # who waits for one of them learns that it is gone
        self.executemany(DELETE_JOB, ids)
        self.executemany(DELETE_LOGS, ids)
        self.executemany(DELETE_ATTEMPTS, ids)
        self.execute(NOTE_REMOVED, {"id": max(ids)[0]})
        self._count(top["parent_id"], -top["done"], -top["failed"], -top["running"], -top["tree_progress"], -top["total"])

    # by the clock, and after a crash

    def wake_due(self) -> bool:
        """Make the jobs ready whose time has come."""
        return self._make_ready(self.execute(DUE, {"now": self.now}).fetchall())

    def register(self, key: str, schedule: str, zone: str | None, new: Submission, runner: int) -> int:
        """Store a schedule that a runner's code has, and return its id. One that changes is due anew; else it keeps its time."""
        found = self.execute(SCHEDULE_WITH_KEY, {"key": key}).fetchone()
        row = {"key": key, "schedule": schedule, "zone": zone, "name": new.name, "args": new.args, "kwargs": new.kwargs,
               "options": new.options, "label": new.label, "run_by": new.run_by, "low_priority": new.low_priority or 0, "system": new.system,
               "max_running": new.max_running, "now": self.now, "next_at": None}
        first = schedule_of(schedule, zone).first(self.now)
        if found is None or found[1:3] != (schedule, zone) or found[3] > first:      # the last: the clock was set back
            row["next_at"] = first
        if found is None:
            schedule_id = self.execute(INSERT_SCHEDULE, row).lastrowid
        else:
            schedule_id = found[0]
            self.execute(UPDATE_SCHEDULE, row)
        self.execute(REGISTER, {"schedule": schedule_id, "runner": runner})
        return schedule_id

    def _schedule(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        cursor = self.execute(sql, {"now": self.now, **parameters})
        return [dict(zip([column[0] for column in cursor.description], row)) for row in cursor.fetchall()]

    def run_schedules(self) -> None:
        """Submit a job for each schedule that is due, once for all the times it was, unless its last one is not over."""
        for row in self._schedule(DUE_SCHEDULES):
            job = None
            if row["job_status"] in (None, *OVER):
                job = self.submit(_scheduled(row))
            else:
                self.log(row["job_id"], logging.WARNING, f"its schedule, {row['schedule']}, was due again, and skipped: this job is not over")
            self.execute(TICK, {"id": row["id"], "next_at": self._next_time(row), "now": self.now, "job": job})

    def clock_was_set_back(self) -> None:
        """Have no schedule wait until the clock shows the time again at which it would have been due."""
        for row in self._schedule(SCHEDULES):
            self.execute(PAUSE_SCHEDULE, {"id": row["id"], "paused": row["paused"], "next_at": min(row["next_at"], self._next_time(row))})

    def _next_time(self, row: dict[str, Any]) -> float:
        """Return when a schedule is due next. Never later than if it began now, for the clock may have been set back; in an hour,
        if it cannot be told here: another process has written it, with other time zones."""
        try:
            schedule = schedule_of(row["schedule"], row["zone"])
        except ValueError as error:
            _say(logging.ERROR, f"schedule {row['id']} ({row['name']}) cannot be followed: {error}; looking again in an hour")
            return self.now + 3_600
        return min(schedule.next(row["next_at"], self.now), schedule.first(self.now))

    def operate_schedule(self, operation: str, schedule_id: int, runner: int) -> int | None:
        """Pause, resume, run or remove a schedule; return the id of the job that this made. KeyError: there is none."""
        if operation == "remove":
            self.execute(UNREGISTER + " AND schedule_id = :schedule", {"id": runner, "schedule": schedule_id})
        rows = self._schedule(ONE_SCHEDULE, id=schedule_id)
        if not rows:
            raise KeyError(schedule_id)
        row, = rows
        if operation == "remove":
            if row["registered"]:
                raise InvalidOperation(f"schedule {schedule_id} ({row['name']}) is in the code of another process that runs; remove it there")
            self.execute(REMOVE_SCHEDULE, {"id": schedule_id})
        elif operation == "run_now":
            if row["job_status"] not in (None, *OVER):
                raise InvalidOperation(f"job {row['job_id']} of schedule {schedule_id} ({row['name']}) is {row['job_status']}; wait until it is over")
            job = self.submit(_scheduled(row))
            self.execute(RUN_NOW, {"id": schedule_id, "now": self.now, "job": job})
            return job
        else:                                             # what was missed in the pause is not made up for
            self.execute(PAUSE_SCHEDULE, {"id": schedule_id, "paused": int(operation == "pause"), "next_at": self._next_time(row)})
        return None

    def unpark(self, key: str) -> bool:
        """Make the jobs ready that were parked with this key."""
        return self._make_ready(self.execute(PARKED, {"key": key}).fetchall())

    def _make_ready(self, rows: list[tuple[Any, ...]]) -> bool:
        for job_id, parent_id, root_id, low in rows:
            self.execute(MAKE_READY, {"id": job_id, "queue": low})
            self._wake(root_id or job_id, low)
        return bool(rows)

    def recover(self, owner: int) -> int:
        """Take the jobs of a runner whose process died back: running to pending, stopping to stopped, at the third death to failed."""
        rows = sorted(self.execute(OWNED, {"owner": owner}).fetchall(), reverse=True)
        seen = self.execute(LAST_SEEN, {"id": owner}).fetchone()
        for row in rows:
            self.execute(COUNT_DEATH, {"id": row[0], "owner": owner})
        for row in rows:                                # children before their parents, which only waited for them
            self.take_back(row, "its process died", min(self.now, seen[0] + HEARTBEAT_SECONDS) if seen else 0.0, died=True)
        self.remove_runner(owner)
        return len(rows)

    def remove_runner(self, runner: int) -> None:
        """Forget a runner, and what its code had registered."""
        self.execute(REMOVE_RUNNER, {"id": runner})
        self.execute(UNREGISTER, {"id": runner})

    def take_back(self, owned: tuple[Any, ...], why: str, until: float, died: bool = False) -> None:
        """Supersede the attempt of a job, a row of OWNED, that ran until then: running to pending, stopping to stopped."""
        job_id, parent_id, root_id, status, number, low, since, charge, options, name, max_running = owned
        self.apply()
        self._keep_attempt(job_id, number, since, "interrupted" if died else "given back", None)
        row = self._row(job_id)
        deaths = row["deaths"]
        new, error = (STOPPED if status == STOPPING and not row["goes_on"] else PENDING), None
        if new == PENDING and not kept_options(options).get("recover", True):
            error = f"{why} while it ran, and it was declared recover=False"
        elif died and deaths >= DEATHS:
            error = f"its process died under it {deaths} times; resume gives it another try"
            self._acquit_others(job_id)
        if error is not None:
            new = FAILED if row["open"] == 0 else RUNNING
        ran = max(0.0, until - (since or until))
        queue = low if new == PENDING else None
        self.execute(END_ATTEMPT, {
            "id": job_id, "status": new, "returned": 2 * int(error is not None), "finished_at": self.now if new == FAILED else None,
            "since": self.now if new == RUNNING else None, "ran": ran, "result": None,
            "error": error and dump_error("Interrupted", error, ""), "errors": int(error is not None), "state": None,
            "positions": None, "unspent": 0, "queue": queue, "parked": None, "run_at": None,
            "phase": "interrupted" if new == PENDING else None})
        root = root_id or job_id
        self._change(root).charge += int(ran * 1e6) - charge
        self._moved(job_id, parent_id, status, new, row["progress"])
        if new == FAILED:
            self._tally_end(name, row["system"], new, row["duration"] + ran)
        self._free_slots(name, max_running, deaths - died)       # what it was when it was claimed
        self.execute(SUPERSEDE, {"id": job_id})
        if queue is not None:
            self._wake(root, queue)
        self.log(job_id, logging.WARNING, f"{error or why}; {new} now")

    def _acquit_others(self, killer: int) -> None:
        """Do not hold the deaths for which a job has been failed against those that ran beside it."""
        for job_id, parent_id, root_id, low, parked in self.execute(DIED_BESIDE, {"id": killer}).fetchall():
            self.execute(FORGET_DEATHS, {"id": job_id, "killer": killer})
            if parked == "suspect":
                self._make_ready([(job_id, parent_id, root_id, low)])

    def prune(self, after: int, until: int, finished: float, failed: float) -> int:
        """Remove the jobs with ids up to `until` whose root was over before these times, with their logs; return how many."""
        ids = self.execute(EXPIRED, {"after": after, "until": until, "finished": finished, "failed": failed}).fetchall()
        if ids:
            self.count_created()
            self.over += [job_id for job_id, in ids]
            self.executemany(DELETE_JOB, ids)
            self.executemany(DELETE_LOGS, ids)
            self.executemany(DELETE_ATTEMPTS, ids)
            self.execute(NOTE_REMOVED, {"id": max(ids)[0]})
        return len(ids)

    def count_created(self) -> None:
        """Bring the statistics up to date with what was created."""
        rows = self.execute(UNCOUNTED).fetchall()
        self.executemany(SAVE_TALLY, [(minute, name, count, 0, 0, 0, 0.0, None, None, 0.0, None, None) for minute, name, count in rows])
        self.execute(NOTE_COUNTED)

    def fold_statistics(self, part: str, last: int) -> None:
        """Sum the minutes of the statistics up to `last` up by an SQL expression of the minute."""
        bounds = {"first": 0, "last": last}
        rows = self.execute(FOLD.format(part=part), bounds).fetchall()
        self.execute(FORGET_MINUTES, bounds)
        self.executemany(SAVE_TALLY, rows)

    def log(self, job_id: int, level: int, message: str) -> None:
        """Add one line to a job's log."""
        self.execute(INSERT_LOG, (job_id, self.now, level, _text(message)))

    # what attempts report

    def save_state(self, attempt: Attempt, state: str | None, positions: str | None) -> bool:
        """Store an attempt's state; False when it has been superseded."""
        return self.execute(SAVE_STATE, {"id": attempt.id, "attempt": attempt.number, "state": state,
                                         "positions": positions}).rowcount == 1

    def save_states(self, saves: list[tuple[Attempt, str | None, str | None]]) -> list[bool]:
        """Store the states of many attempts as `save_state` does; where state and positions are None it only tells."""
        rows = [{"id": attempt.id, "attempt": attempt.number, "state": state, "positions": positions} for attempt, state, positions in saves]
        if self.executemany(SAVE_STATE, rows).rowcount == len(saves):
            return [True] * len(saves)
        return [self.save_state(*save) for save in saves]

    def save_progress(self, attempt: Attempt, report: Report) -> None:
        """Store an attempt's progress, and add it to its ancestors'."""
        saved = self.execute(SAVE_PROGRESS, {"id": attempt.id, "attempt": attempt.number, "at": self.now - report.age,
                                             "progress": report.progress, "gained": report.rate.gained,
                                             "seconds": report.rate.seconds, "step": report.step,
                                             "message": report.message})
        if saved.rowcount == 1:
            before, charged = self._saved(attempt)
            self._count(attempt.parent_id, 0, 0, 0, (report.progress or 0.0) - before)
            self._reported[attempt.id] = report.progress or 0.0, charged
            self.after_commit.append(lambda: setattr(attempt, "saved_progress", report.progress))

    def add_charge(self, attempt: Attempt, more: int) -> None:
        """Charge an attempt that runs longer than estimated for what it has run by now."""
        if self.execute(ADD_CHARGE, {"id": attempt.id, "attempt": attempt.number, "more": more}).rowcount == 1:
            before, charged = self._saved(attempt)
            self._change(attempt.root_id or attempt.id).charge += more
            self._reported[attempt.id] = before, charged + more
            self.after_commit.append(lambda: setattr(attempt, "charge", attempt.charge + more))

    def _saved(self, attempt: Attempt) -> tuple[float, int]:
        """Return the progress that is in the file, and what this transaction has charged beyond attempt.charge."""
        return self._reported.get(attempt.id) or (attempt.saved_progress or 0.0, 0)


def dump_error(type: str, text: str, trace: str) -> str:
    """Return the `error` column: what a function raised."""
    return json.dumps({"type": _text(type), "text": _text(text), "traceback": _text(trace, 64 * 1024)})


# ---- 8 Store --------------------------------------------------------------------------------------------------

JOB_ROW = "SELECT * FROM bgjobs_jobs WHERE id = :id"
STATUS_OF = "SELECT status FROM bgjobs_jobs WHERE id = :id"
CREATED_AT = "SELECT created_at FROM bgjobs_jobs WHERE id = :id"
OUTCOME_OF = "SELECT status, name, attempt, result, error FROM bgjobs_jobs WHERE id = :id"
MEANS = "SELECT name, seconds, tree_seconds FROM bgjobs_functions"
MEAN_OF = "SELECT ifnull(tree_seconds, seconds) FROM bgjobs_functions WHERE name = :name"
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
    (SELECT submitter FROM bgjobs_jobs r WHERE r.id = bgjobs_jobs.root_id) = :submitter) AND id > :after ORDER BY id LIMIT 500"""
LOG_LINES = """SELECT id, job_id, at, level, message FROM bgjobs_logs WHERE job_id {which} AND id > :after AND level >= :level
    AND at >= :since AND at <= :until ORDER BY id {order} LIMIT :limit"""
ONE_JOB = "= :id"
WHOLE_TREE = """IN (WITH RECURSIVE tree(id) AS (SELECT :id UNION ALL SELECT j.id FROM tree JOIN bgjobs_jobs j
    ON j.parent_id = tree.id AND j.parent_id IS NOT NULL) SELECT id FROM tree)"""

STATS = f"""SELECT {{by}} AS part, {_SUMS} FROM bgjobs_stats
    WHERE minute BETWEEN :first AND :last AND (:name IS NULL OR name = :name) GROUP BY part"""
WINDOWS = {"1h": (60, 1), "24h": (96, 15), "7d": (84, 120), "30d": (120, 360)}    # how many parts, of how many minutes

COUNT_LIMIT = 10_001               # where counting for people ends
SEARCH_SECONDS = 0.006             # how long people's searches look at one job after the other; they may go on from there
SEARCH_AT_LEAST = 12_000           # jobs that are looked at, however long that takes
WAL_LIMIT = 64 * 1024 * 1024       # bytes
SQLITE_DONE = 101                  # sqlite3 has it by name since Python 3.11
LOCK_SECONDS = 30                  # how long a write waits while another program holds the file's lock
LOCK_STEP_SECONDS = 0.05           # SQLite waits so long at a time, so that going down can cut it short
SCHEMA_VERSION = len(MIGRATIONS)
TABLES = ("bgjobs_schema", *(sql.split()[2] for sqls in MIGRATIONS for sql in sqls if sql.startswith("CREATE TABLE")))
_CONNECT: dict[str, Any] = {"timeout": 30, "isolation_level": None, "check_same_thread": False}


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


class _Write:
    """A write that waits for its transaction; `wake` is released when it is done, or is to lead."""

    __slots__ = ("run", "value", "error", "done", "gone", "leads", "wake")

    def __init__(self, run: Callable[[Transaction], Any]) -> None:
        self.run = run
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = self.gone = self.leads = False
        self.wake: Any = None


class _ForkGate:
    """Keeps a fork out of the moments when a thread of ours reads: the child would inherit SQLite's global locks, locked. (Out of
    those when one writes, Store.pause keeps it.)"""

    def __init__(self) -> None:
        self._door = threading.RLock()                    # held during a fork; reentrant for finalizers that read
        self._inside: set[int] = set()                    # threads; one that Ctrl-C has left here goes with its next read

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


_fork_gate = _ForkGate()
_inherited: list[Any] = []         # where _never_free has no other means


def _never_free(connection: sqlite3.Connection | None) -> None:
    """Keep a connection of the parent's from being closed in a forked child, by its end, too."""
    try:
        import ctypes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    except (ImportError, AttributeError):                 # not CPython
        _inherited.append(connection)


def _uri(path: str) -> str:
    """Return a file: URI as SQLite reads it."""
    path = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return "file:///" + path.replace("\\", "/") if os.name == "nt" else "file://" + path


def _decoded(text: bytes) -> str:
    """Return a text of the file, also one that somebody else has written and that is not UTF-8."""
    return text.decode("utf-8", "backslashreplace")


def _do_nothing(tx: Transaction) -> None:
    """What a transaction without a write of its own runs: what waits rides along."""


class Store:
    """One SQLite file: a connection that writes, led by one thread at a time, and connections that read.

    Readers never wait for writers (WAL). `begin(transaction)` and `rider(transaction, kicked)` are called at the begin and the
    end of transactions, so that what else waits (logs, outcomes, claims) shares them; `announce(transaction)` after every
    commit; `backlog()` when more is waiting and nobody leads.
    """

    def __init__(self, path: str | os.PathLike[str], durability: str, journal: str, clock: Callable[[], float]) -> None:
        if sqlite3.sqlite_version_info < (3, 31):
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; bgjobs needs 3.31 or newer")
        self.path, self.clock = os.path.abspath(path), clock
        self.begin: Callable[[Transaction], None] = lambda tx: None
        self.rider: Callable[[Transaction, bool], None] = lambda tx, kicked: None
        self.announce: Callable[[Transaction], None] = lambda tx: None
        self.backlog: Callable[[], None] = lambda: None
        # EXTRA also syncs the folder that the rollback journal is deleted from: that is the commit there.
        self._synchronous = "NORMAL" if durability == "process" else "FULL" if journal == "wal" else "EXTRA"
        self._journal = journal
        self._complaints: dict[str, float] = {}           # what was logged lately, and when
        self._readers: deque[sqlite3.Connection] = deque()
        self._version_lock = threading.Lock()             # guards _version_db
        self._version_db: sqlite3.Connection | None = None
        self._lineages: dict[int, tuple[int, ...]] = {}
        self._others_version = -1
        # `_lock` guards _waiting, leading and _again; no SQL and no user code runs under it.
        # Reentrant, since a garbage collection under it may call a finalizer that writes.
        self._lock = threading.RLock()
        self._leader = 0                                  # the leading thread's ident
        self._leads = _Write(_do_nothing)                 # the write that leads, or was the last to
        self._waiting: deque[_Write] = deque()            # until they are done
        self._pause: _Write | None = None                 # a fork's, which leads next
        self.leading = self._again = self.closed = self.forked = False
        self.cut_short = False                            # Ctrl-C came: something may be committed that nobody was told of
        self.close_by = math.inf                          # when what still runs is given back; soon after, no write waits for a lock
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
            raise StoreError(f"cannot use {self.path} as a job file: {error}; {_remedy(error)}") from error
        self._identity, self._checked_at = self._identity_now(), 0.0

    # opening

    def _check_path(self, path: str) -> None:
        folder = os.path.dirname(self.path)
        if path == "" or path.startswith(":memory:"):
            raise ValueError(f"path must name a file, got {path!r}; jobs are kept on disk")
        if os.path.isdir(self.path):
            raise StoreError(f"cannot use {self.path} as a job file: it is a folder; give the path of a file in it")
        if not os.path.isdir(folder):
            raise StoreError(f"cannot use {self.path} as a job file: the folder {folder} does not exist; create it first")

    def _check_json(self) -> None:
        try:
            self._writer.execute("SELECT json_array()")
        except sqlite3.OperationalError:                  # an option of the build before 3.38
            raise StoreError("this SQLite was built without its JSON functions; bgjobs needs them") from None

    def connect(self) -> sqlite3.Connection:
        """Return a new connection for reading, never a new file. The caller closes it."""
        db = sqlite3.connect(_uri(self.path) + "?mode=rw", uri=True, **_CONNECT)
        db.row_factory, db.text_factory = sqlite3.Row, _decoded
        return db

    def _identity_now(self) -> list[tuple[int, int]]:
        """Return what tells the file, and its WAL, which is there as long as we are connected, from others of their names."""
        found = []
        for path in (self.path, os.path.realpath(self.path) + "-wal")[:2 if self._journal == "wal" else 1]:
            try:
                stat = os.stat(path)
            except OSError:
                raise StoreError(f"{path} was deleted or moved while it was in use; put it back, or start anew with close() and a "
                                 "new runner") from None
            found.append((stat.st_dev, stat.st_ino))
            if path == self.path and stat.st_size == 0:
                raise StoreError(f"{path} was emptied while it was in use; close() this runner, put a backup there, without a -wal "
                                 "beside it, and make a new runner")
        return found

    def check_file(self) -> None:
        """Raise StoreError unless the path still names the file that is open: SQLite would write on into nothing."""
        self._checked_at = -math.inf                      # should it fail, the next write looks again at once
        found = self._identity_now()
        if found != self._identity:
            what = self.path + "-wal" if found[0] == self._identity[0] else self.path
            raise StoreError(f"{what} was replaced by another file while it was in use; nothing is written any more: close() this "
                             "runner, put the right file there, without a -wal beside it, and make a new runner")
        self._checked_at = time.monotonic()

    def complain(self, text: str) -> None:
        """Log an error, the same one every ten seconds at most."""
        now = time.monotonic()
        if now - self._complaints.get(text, -math.inf) > 10:
            self._complaints = {text: now} if len(self._complaints) > 20 else {**self._complaints, text: now}
            _say(logging.ERROR, text)

    def _prepare(self) -> None:
        """Switch to WAL and bring the schema up to date. Several processes may do so at once: it is tried again."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._migrate()
                mode = self._writer.execute(f"PRAGMA journal_mode = {self._journal}").fetchone()[0]
                if mode != self._journal:
                    raise StoreError(f"cannot use {self.path} as a job file: the journal mode stays {mode!r} instead of "
                                     f"{self._journal!r}; put the file on a local disk, and have all processes use the same mode")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.01, 0.05))
        self._writer.execute(f"PRAGMA synchronous = {self._synchronous}")
        self._writer.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
        self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
        self._writer.execute("SELECT version FROM bgjobs_schema").fetchone()     # the WAL is there from the first read on

    def _migrate(self) -> None:
        db = self._writer
        if db.in_transaction:
            db.execute("ROLLBACK")
        if self._schema_version() == SCHEMA_VERSION:
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            version = self._schema_version()
            if version == 0:
                db.execute("CREATE TABLE bgjobs_schema (version INTEGER NOT NULL)")
                db.execute("INSERT INTO bgjobs_schema VALUES (0)")
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    db.execute(statement)
            db.execute("UPDATE bgjobs_schema SET version = :version", {"version": SCHEMA_VERSION})
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _schema_version(self) -> int:
        """Return the version of the schema that is in the file, 0: none. StoreError: it is a newer one, or has been damaged."""
        execute = self._writer.execute
        found = {name for name, in execute("SELECT name FROM sqlite_master WHERE type = 'table'")}.intersection(TABLES)
        if not found:
            return 0
        rows = execute("SELECT version FROM bgjobs_schema").fetchall() if "bgjobs_schema" in found else []
        version = rows[0][0] if len(rows) == 1 else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise StoreError(f"{self.path} has schema version {version}, and this bgjobs {__version__} knows up to "
                             f"{SCHEMA_VERSION}; copy a newer bgjobs.py into the app")
        wrong = "" if isinstance(version, int) and version > 0 else f"its schema version is {_short(version)}"
        if version == SCHEMA_VERSION:
            lacking = [name for name in TABLES if name not in found]
            wrong = f"it lacks {', '.join(lacking)}" if lacking else "" if execute(CLOCK).fetchone() else "bgjobs_clock is empty"
        if wrong:
            raise StoreError(f"cannot use {self.path} as a job file: somebody has changed its bgjobs_ tables: {wrong}; restore it from "
                             "a backup, or drop these tables to start anew")
        return version

    def close(self, last: Callable[[Transaction], None] = _do_nothing) -> None:
        """Run a last write and close the connections. Waits for the transaction under way; writes after it raise StoreError."""
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
            while self._readers:
                self._readers.pop().close()

    def pause(self) -> None:
        """Before a fork: take the lead as soon as the transaction under way is over, within a second, and write nothing."""
        with self._lock:
            if self._leader == threading.get_ident():
                return                                  # a signal handler forks
            pause = self._pause = _Write(_do_nothing)
            if self.leading:
                pause.wake = threading.Lock()
                pause.wake.acquire()
            else:
                self._leads, pause.leads, self.leading = pause, True, True
        if pause.wake is not None:
            pause.wake.acquire(timeout=1.0)
        with self._lock:
            if pause.leads:
                self._leader = threading.get_ident()
            else:
                self._pause = None

    def go_on(self) -> None:
        """After the fork, in the parent."""
        pause, self._pause = self._pause, None
        if pause is not None:
            self._hand_over(pause)

    def leave_to_parent(self) -> None:
        """In a forked child: touch nothing that belongs to the parent. Its connections are never used, nor closed, here."""
        for connection in (self._writer, self._version_db, *self._readers):
            _never_free(connection)
        self._readers, self._version_db, self._waiting, self._pause, self._leader = deque(), None, deque(), None, 0
        self._lock, self._version_lock = threading.RLock(), threading.Lock()
        self.leading, self.closed, self.forked = False, True, True

    def shorten_wal(self) -> None:
        """Truncate the WAL if it has grown large, and say so when a reader keeps it from being."""
        try:
            size = os.path.getsize(os.path.realpath(self.path) + "-wal")
        except OSError:
            return
        if size > WAL_LIMIT:
            with contextlib.closing(self.connect()) as db:
                db.execute("PRAGMA busy_timeout = 100")
                busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if busy and size > 4 * WAL_LIMIT:
                self.complain(f"the WAL of {self.path} has {size >> 20} MB and grows: another program keeps an old read transaction "
                              "open on it; end that")

    def backup(self, path: str) -> None:
        """Copy the file as it is at one moment, while it is in use."""
        self.check_file()
        try:
            open(path, "xb").close()
        except FileExistsError:
            raise ValueError(f"{path} exists; give the path of a new file") from None
        except OSError as error:
            raise StoreError(f"cannot back {self.path} up to {path}: {error.strerror}; give a path in a folder that exists and is "
                             "writable") from error

        def give_up(status: int, remaining: int, total: int) -> None:
            if status != SQLITE_DONE and time.monotonic() > deadline:
                raise sqlite3.OperationalError("database is locked")      # by another program: it would wait as long as that does
        deadline = time.monotonic() + _CONNECT["timeout"]
        try:
            with contextlib.closing(self.connect()) as db, contextlib.closing(sqlite3.connect(path)) as copy:
                db.backup(copy, progress=give_up)
                copy.execute("DELETE FROM bgjobs_runners")       # none of them has the copy: what it shows as running is taken back
                copy.commit()
        except BaseException as error:
            for rest in (path, path + "-journal"):
                with contextlib.suppress(OSError):
                    os.remove(rest)
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"cannot back {self.path} up to {path}: {error}; {_remedy(error)}") from error
            raise

    # writing

    @library_code
    def write(self, run: Callable[[Transaction], Any]) -> Any:
        """Call `run(transaction)` in the next transaction and return its value, after the commit.

        `run` may be called again when the transaction had to be rolled back, so it has no effect but on the
        transaction. What it raises is raised here, and nothing of it is stored.
        """
        if self.leading and self._leader == threading.get_ident() and not self._leads.gone:
            raise RuntimeError("bgjobs was called from inside a write of the same thread: by a signal handler, or a finalizer; "
                               "have it set a flag or start a thread instead")
        write = _Write(run)
        try:
            with self._lock:
                if self.leading:
                    wake = threading.Lock()
                    wake.acquire()
                    write.wake = wake
                self._waiting.append(write)
                if write.wake is None:
                    self._leads, write.leads, self.leading = write, True, True
            # The leader commits this write, too, or hands the lead on.
            while not (write.leads or write.done) and not write.wake.acquire(timeout=1.0):
                self._take_over(write)
            if write.leads:
                self._lead(write)
        except BaseException:                           # Ctrl-C: do not count on this thread to lead
            write.gone = self.cut_short = True
            self._hand_over(write)
            raise
        if write.error is not None:
            raise write.error
        return write.value

    @library_code
    def kick(self) -> None:
        """Lead transactions until nothing waits for one; return at once if another thread leads already."""
        write = _Write(_do_nothing)
        try:
            with self._lock:
                if self.leading:
                    self._again = True                  # whoever leads sees to it
                    return
                self._leads, write.leads, self.leading = write, True, True
            self._lead(write, until_done=True)
        except BaseException:
            write.gone = self.cut_short = True
            self._hand_over(write)
            raise

    def _lead(self, write: _Write, until_done: bool = False) -> None:
        """Run and commit what waits, then hand the lead to the next waiting thread, if any."""
        self._leader = threading.get_ident()
        try:
            while True:
                with self._lock:
                    batch = [other for other in self._waiting if not (other.done or other.gone)]
                    self._again = False
                worked = self._commit(batch, "all" if until_done else "some")
                self._release()
                if not until_done or not worked or not self._again or self._waiting or self._pause:
                    break
        finally:
            self._hand_over(write)

    def _hand_over(self, write: _Write) -> None:
        """Give the lead, if this write has it, to the first waiting thread, or up."""
        left = False
        with self._lock:
            if write.leads:
                heir = self._pause or next((other for other in self._waiting if not (other.done or other.gone or other is write)), None)
                left = self._again and heir is None
                self._leader, self.leading, write.leads = 0, heir is not None, False
                if heir is not None:                    # no call up to here: it would be a gap for Ctrl-C
                    self._leads, heir.leads = heir, True
                    heir.wake.release()
        if left:
            self.backlog()

    def _take_over(self, write: _Write) -> None:
        """Take the lead if Ctrl-C came twice: in the thread that had it, and again before that handed it over."""
        with self._lock:
            if self._leads.gone and self._leads.leads and not write.done:
                self._leads.leads, write.leads, self._leads = False, True, write

    def _release(self) -> None:
        """Wake those whose writes are done. Ctrl-C may come: then the next leader does the rest."""
        with self._lock:
            while self._waiting and (self._waiting[0].done or self._waiting[0].gone):
                wake = self._waiting[0].wake
                if wake is not None and wake.locked():
                    wake.release()
                self._waiting.popleft()

    def _commit(self, batch: list[_Write], ride: str) -> bool:
        """Run a batch in one transaction. If it fails, each write is run again alone, so that only a bad one fails. False: what
        rides along could not be recorded; it is tried again by who leads next, the service thread if nobody else."""
        try:
            self._transact(batch, ride)
            return True
        except (Exception, JobStopped) as error:        # JobStopped: a superseded attempt submits
            if isinstance(error, StoreError) and batch:   # the file's trouble, and no write's: all would wait for it again
                for write in batch:
                    write.error, write.done = copy.copy(error), True
                    write.error.__cause__ = error.__cause__
                self._again = bool(ride) and not self.closed
                return False
            if ride and batch:
                for write in batch:
                    self._commit([write], ride="")
                    self._release()
                self._again = True
            elif batch:
                batch[0].error, batch[0].done = self._explained(error), True
            elif not self.closed:
                self.complain(f"cannot record outcomes: {self._explained(error)}; trying again")
                if self.close_by == math.inf:
                    time.sleep(0.05)
                self._again = True
                return False
            return True

    def _transact(self, batch: list[_Write], ride: str) -> None:
        if self.forked:
            raise StoreError(f"the runner on {self.path} belongs to the process that this one was forked from; call its start() "
                             "here, or make a new Runner")
        if self.closed:
            raise StoreError(f"the runner on {self.path} is shut down")
        if time.monotonic() - self._checked_at > 0.005:
            self.check_file()
        tx = self._run_in_transaction(batch, ride)
        for callback in (*tx.after_commit, lambda: self.announce(tx)):
            try:
                callback()
            except Exception as error:                    # it is committed: nothing may make it look failed
                _say(logging.ERROR, f"bgjobs on {self.path}: trouble after a commit\n{_traceback_of(error)}")

    def _run_in_transaction(self, batch: list[_Write], ride: str) -> Transaction:
        db = self._writer
        if db.in_transaction:                             # an exception hit the last leader at an unlucky moment
            db.execute("ROLLBACK")
        self._await_lock("BEGIN IMMEDIATE")
        committing = False
        try:
            tx = Transaction(db, self._lineages, self.clock())
            if ride:
                self.begin(tx)
            for write in batch:
                write.value = write.run(tx)
            if ride:
                self.rider(tx, ride == "all")
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
            if isinstance(error, sqlite3.OperationalError) and "decode to UTF-8" in str(error):
                db.text_factory = _decoded                # slower; the transaction is run again
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
                    if self.close_by < math.inf:          # what else is written while going down is tried once
                        self._writer.execute("PRAGMA busy_timeout = 0")
                    raise self._explained(error) from error

    def write_through(self, connection: sqlite3.Connection, run: Callable[[Transaction], Any]) -> Any:
        """Run a write in the transaction of the app's own connection to this file; the app commits, or rolls back. If none is
        open, one is begun, and committed here where the connection commits each statement by itself. ValueError: the
        connection is to another file."""
        if self.forked or self.closed:
            self._transact([], "")                        # says why not
        db, begins = _Through(connection), not connection.in_transaction
        text_factory, connection.text_factory = connection.text_factory, str
        try:
            autocommit = getattr(connection, "autocommit", -1)    # since Python 3.12; -1 leaves it to isolation_level
            file = next(row[2] for row in db.execute("PRAGMA database_list").fetchall() if row[1] == "main")
            if not file or not os.path.samefile(file, self.path):
                raise ValueError(f"the connection is to {file or 'a database in memory'}; jobs in {self.path} can be part of a "
                                 "transaction of that file alone")
            if begins:
                db.execute("BEGIN IMMEDIATE")
            try:
                db.execute("SAVEPOINT bgjobs")
                try:
                    db.execute(TAKE_LOCK)                 # before anything is read: now it waits for it
                    tx = Transaction(db, {}, self.clock())
                    value = run(tx)
                    tx.apply()
                    tx.save_tallies()
                except BaseException:
                    db.execute("ROLLBACK TO bgjobs")
                    raise
                finally:
                    db.execute("RELEASE bgjobs")
                if begins and (autocommit is True or autocommit == -1 and connection.isolation_level is None):
                    db.execute("COMMIT")
                return value
            except BaseException:
                if begins and connection.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if "locked" in str(error) and not begins:
                raise StoreError(f"cannot write to {self.path} in this transaction: {error}; submit before it reads, or begin it with "
                                 "BEGIN IMMEDIATE: one that has read may not write once another connection has written") from error
            raise self._explained(error) from error
        finally:
            connection.text_factory = text_factory

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, sqlite3.Error):
            explained = StoreError(f"cannot write to {self.path}: {error}; {_remedy(error)}")
            explained.__cause__ = error
            return explained
        return error

    # reading

    @library_code
    def read(self, sql: str, parameters: dict[str, Any] | None = None) -> list[sqlite3.Row]:
        """Return all rows of a query, on a connection of its own."""
        with _fork_gate:
            db = None
            try:
                db = self._readers.pop() if self._readers else self.connect()
                rows = db.execute(sql, parameters or {}).fetchall()
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                if db is not None:
                    db.close()
                if isinstance(error, sqlite3.Error):
                    raise StoreError(f"cannot read {self.path}: {error}; {_remedy(error)}") from error
                name, value = next((name, value) for name, value in parameters.items() if isinstance(value, int)
                                   and value.bit_length() > 63 or isinstance(value, str) and _text(value, len(value)) != value)
                raise ValueError(f"{name} is {_short(value)}, which SQLite cannot hold") from error
            if len(self._readers) < 8 and not self.closed:
                self._readers.append(db)
            else:
                db.close()
            return rows

    def version(self) -> int:
        """Return a number that differs when another connection has committed since: any write, of any process."""
        with self._version_lock, _fork_gate:
            try:
                if self._version_db is None:
                    self._version_db = self.connect()
                return self._version_db.execute("PRAGMA data_version").fetchone()[0]
            except sqlite3.Error as error:
                raise StoreError(f"cannot read {self.path}: {error}; {_remedy(error)}") from error

    def changed_by_others(self) -> bool:
        """Tell whether another connection has written since the last call: another process, or another runner."""
        version = self.write(lambda tx: tx.execute("PRAGMA data_version").fetchone()[0])
        changed, self._others_version = version != self._others_version, version
        return changed

    def row(self, job_id: int) -> sqlite3.Row:
        """Return a job's row. KeyError: there is none."""
        rows = self.read(JOB_ROW, {"id": job_id})
        if not rows:
            raise KeyError(job_id)
        return rows[0]

    def find(self, filters: dict[str, Any], limit: int, before: int | None = None) -> list[sqlite3.Row]:
        """Return the rows that pass the filters (see `Filters`), newest first, ids below `before`."""
        where, parameters = conditions(filters)
        source = ""
        if filters.get("status") is not None and filters.get("parent") is None:
            wanted = wanted_of(filters)
            if all(self._count(ids_of(status)) < COUNT_LIMIT for status in wanted):
                where.append(f"id IN ({' UNION ALL '.join(f'SELECT * FROM ({ids_of(status)})' for status in wanted)})")
            else:
                source = "NOT INDEXED"                   # no index has them in the order of ids, and they are not far
        if before is not None:
            where, parameters = [*where, "id < :before"], {**parameters, "before": before}
        sql = f"SELECT * FROM bgjobs_jobs {source} WHERE {' AND '.join(where) or '1'} ORDER BY id DESC LIMIT :limit"
        return self.read(sql, {**parameters, "limit": limit})

    def page(self, filters: dict[str, Any], limit: int, before: int | None = None
             ) -> tuple[list[sqlite3.Row], int | None, dict[str, int], list[str]]:
        """Return what `find` does, as far as it is found in SEARCH_SECONDS, and the id before which to go on, or None; how many
        jobs of each status pass the other filters, up to COUNT_LIMIT; and the statuses of which there may be more than that,
        since there was no time to count them to the end."""
        conditions(filters)
        wanted = wanted_of(filters)
        where, parameters = conditions({name: value for name, value in filters.items() if name != "status"})
        if filters.get("parent") is not None:             # the index of children has them in order
            counts, unsure = self._count_children(where, parameters)
            ids = self._ids([*where, f"status IN ({', '.join(map(repr, wanted))})"], parameters, limit + 1, before)
            return self._page_of(ids, limit, None, counts, unsure)
        roots = "parent" in filters
        indexed = set(filters) <= {"status", "parent", "system"}       # what has begun is counted in its index alone
        ordered = indexed and roots and not filters.get("system")      # and found there in the order of ids
        few = {status: total for status in STATUSES if not indexed or status == PENDING or status in wanted and not ordered
               if (total := self._count(ids_of(status, roots))) < COUNT_LIMIT}
        ids: list[int] = []
        bottom: int | None = 1                            # what was looked at one after the other goes down to there; None: all was
        counts, unsure = dict.fromkeys(STATUSES, 0), []
        if not indexed and len(few) < len(STATUSES):
            bottom = self._scan(filters, where, parameters, 1 << 62, wanted, limit + 1, ids, counts)
        looks = SEARCH_AT_LEAST // 4                      # where the scan was too short, the statuses with few jobs are counted whole
        for status in sorted(STATUSES, key=lambda status: few.get(status, 0)) if bottom else ():
            looks -= few.get(status, 0)
            if indexed or status in few and (looks >= 0 or len(few) == len(STATUSES)):
                counts[status] = self._count("SELECT 1 FROM bgjobs_jobs WHERE "
                                             + " AND ".join([*where, among(status, indexed, roots)]), parameters)
            elif counts[status] < COUNT_LIMIT:
                unsure.append(status)
        if all(status in few or ordered and status != PENDING for status in wanted):
            ids = sorted((job_id for status in wanted for job_id in self._ids(
                [*where, among(status, ordered, roots)], parameters, limit + 1, before)), reverse=True)
            bottom = None
        elif indexed or before is not None:
            ids = []
            bottom = self._scan(filters, where, parameters, before or 1 << 62, wanted, limit + 1, ids, None)
        return self._page_of(ids, limit, bottom, counts, unsure)

    def _page_of(self, ids: list[int], limit: int, bottom: int | None, counts: dict[str, int], unsure: list[str]
                 ) -> tuple[list[sqlite3.Row], int | None, dict[str, int], list[str]]:
        rows = self.read("SELECT * FROM bgjobs_jobs WHERE id IN (SELECT value FROM json_each(:ids)) ORDER BY id DESC",
                         {"ids": json.dumps(ids[:limit])})
        return rows, ids[limit - 1] if len(ids) > limit else bottom, counts, unsure

    def _ids(self, where: list[str], parameters: dict[str, Any], limit: int, before: int | None) -> list[int]:
        """Return the ids that fulfil the conditions, the highest first."""
        return [row[0] for row in self.read(
            f"SELECT id FROM bgjobs_jobs WHERE {' AND '.join([*where, 'id < :before'])} ORDER BY id DESC LIMIT :limit",
            {**parameters, "limit": limit, "before": before or 1 << 62})]

    def _count(self, query: str, parameters: dict[str, Any] | None = None) -> int:
        return self.read(f"SELECT count(*) FROM ({query} LIMIT {COUNT_LIMIT})", parameters)[0][0]

    def _count_children(self, where: list[str], parameters: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
        rows = self.read(f"SELECT status, count(*) FROM (SELECT status FROM bgjobs_jobs WHERE {' AND '.join(where)} "
                         f"LIMIT {2 * COUNT_LIMIT}) GROUP BY status", parameters)
        counts = {**dict.fromkeys(STATUSES, 0), **{row[0]: min(COUNT_LIMIT, row[1]) for row in rows}}
        complete = sum(row[1] for row in rows) < 2 * COUNT_LIMIT
        return counts, [] if complete else [status for status in STATUSES if counts[status] < COUNT_LIMIT]

    def _scan(self, filters: dict[str, Any], where: list[str], parameters: dict[str, Any], before: int, wanted: list[str],
              enough: int, ids: list[int], counts: dict[str, int] | None) -> int | None:
        """Look at one job after the other, from the newest, until the time is up. Put the first ids of wanted statuses that pass
        into `ids`, and how many of each status into `counts`, unless it is None: then it ends when there are enough ids. Return
        the lowest id that was looked at, or None: all were. The dates bound the ids, but for an hour's error of the clock."""
        deadline = time.perf_counter() + SEARCH_SECONDS
        newest = self.read(HIGHEST_ID)[0][0]
        low, high = 1, newest + 1
        if filters.get("created_from") is not None:
            low = self._first_id_since(float(filters["created_from"]) - 3_600, newest)
        if filters.get("created_to") is not None:
            high = self._first_id_since(float(filters["created_to"]) + 3_600, newest)
        high, width = min(high, before), SEARCH_AT_LEAST // (4 if "q" in filters else 1)
        condition = f"bgjobs_jobs NOT INDEXED WHERE {' AND '.join([*where, 'id >= :low', 'id < :high'])}"
        is_wanted = f"status IN ({', '.join(map(repr, wanted))})"
        while high > low and width > SEARCH_AT_LEAST // 40 and (counts is not None or len(ids) < enough):
            begun, bounds = time.perf_counter(), {**parameters, "low": max(low, high - width), "high": high, "limit": enough - len(ids)}
            here = None
            if counts is not None:
                here = dict(map(tuple, self.read(f"SELECT status, count(*) FROM {condition} GROUP BY status", bounds)))
                for status, number in here.items():
                    counts[status] = min(COUNT_LIMIT, counts[status] + number)
            if len(ids) < enough and (here is None or here.keys() & set(wanted)):
                ids += [row[0] for row in self.read(f"SELECT id FROM {condition} AND {is_wanted} ORDER BY id DESC LIMIT :limit", bounds)]
            high, now = bounds["low"], time.perf_counter()
            width = int(width * min(4.0, max(0.0, deadline - now) / max(1e-6, now - begun)))
        return high if high > low else None

    def _first_id_since(self, created_at: float, newest: int) -> int:
        """Return the first id that was given out at that time or later, as far as ids and the clock go up together."""
        low, high = 1, newest + 1
        while low < high:
            middle = (low + high) // 2
            rows = self.read("SELECT id, created_at FROM bgjobs_jobs WHERE id >= :id ORDER BY id LIMIT 1", {"id": middle})
            if rows and rows[0]["id"] < high and rows[0]["created_at"] < created_at:
                low = rows[0]["id"] + 1
            else:
                high = middle
        return low

    def counts(self, filters: dict[str, Any]) -> dict[str, int]:
        """Return how many jobs of each status pass the other filters, up to COUNT_LIMIT."""
        return self.page(filters, 0)[2]

    def logs(self, job_id: int, *, level: int, text: str | None, regex: str | None, since: float, until: float, after: int,
             limit: int | None, tree: bool) -> list[dict[str, Any]]:
        """Return log lines of a job, or its tree, oldest first: the newest `limit` of them, or those that follow `after`."""
        newest = limit is not None and not after
        sql = LOG_LINES.format(which=WHOLE_TREE if tree else ONE_JOB, order="DESC" if newest else "ASC")
        rows = self.read(sql, {"id": job_id, "after": after, "level": level, "since": since, "until": until,
                               "limit": -1 if limit is None or text or regex else limit})
        lines = [{**dict(row), "level": logging.getLevelName(row["level"])} for row in rows]
        if text:
            lines = [line for line in lines if text.lower() in line["message"].lower()]
        if regex:
            import re
            lines = [line for line in lines if re.search(regex, line["message"])]
        lines = lines[:limit]
        return lines[::-1] if newest else lines


def _remedy(error: sqlite3.Error) -> str:
    """Return what a person can do about an error of SQLite."""
    text = str(error)
    for sign, remedy in (("locked", "another program holds its lock: end it, or wait"),
                         ("readonly", "make the file and its folder writable"),
                         ("full", "make room on the disk"),
                         ("not a database", "give the path of a new file, or of a job file"),
                         ("malformed", "restore it from a backup"),
                         ("disk I/O", "make room on the disk; if there is some, look into the system's log for trouble of the disk"),
                         ("same thread", "give the connection of this thread"),
                         ("unable to open", "check that the folder exists and is writable")):
        if sign in text:
            return remedy
    return "see the error of SQLite above"


def wanted_of(filters: dict[str, Any]) -> list[str]:
    """Return the statuses that pass."""
    asked = filters.get("status") or STATUSES
    return [asked] if isinstance(asked, str) else [status for status in STATUSES if status in asked]


def ids_of(status: str, roots: bool = False) -> str:
    """Return the query for the ids of all jobs of a status, each once, by indexes; roots: of no children that are pending."""
    if status != PENDING:
        return f"SELECT id FROM bgjobs_jobs WHERE status = '{status}' AND status <> 'pending'"
    indexes = {"ready_roots": "lane IS NOT NULL AND parent_id IS NULL AND queue IS NOT NULL",
               "ready_children": "parent_id IS NOT NULL AND queue IS NOT NULL",
               "due": "run_at IS NOT NULL AND queue IS NULL AND parked IS NULL", "parked": "parked IS NOT NULL"}
    return "SELECT id FROM (" + " UNION ALL ".join(       # by name, else it walks through all children there are
        f"SELECT id FROM bgjobs_jobs INDEXED BY bgjobs_{index} WHERE status = 'pending' AND {where}"
        for index, where in indexes.items() if not (roots and index == "ready_children")) + ")"


def among(status: str, by_index: bool, roots: bool) -> str:
    """Return the condition by which only the jobs of a status are looked at; by_index: in the index of what has begun, where it
    answers all that is asked."""
    return f"status = '{status}' AND " + ("status <> 'pending'" if by_index and status != PENDING else f"id IN ({ids_of(status, roots)})")


FILTERS = ("status", "name", "run_by", "errors", "low_priority", "q", "parent", "system", "created_from", "created_to")


def conditions(filters: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the SQL conditions and their parameters for the filters that are given. ValueError: a bad one.

    status, name, run_by: equal. errors, low_priority: True or False. q: an id, or text in the name, label, arguments,
    message or run_by. parent: an id or a Job; None for roots only. system: True adds the system jobs. created_from,
    created_to: Unix seconds.
    """
    where, parameters = [], {}
    for name, value in filters.items():
        if name not in FILTERS:
            raise TypeError(f"unknown filter {name!r}; the filters are {', '.join(FILTERS)}")
    if filters.get("status") is not None:
        statuses = [filters["status"]] if isinstance(filters["status"], str) else list(filters["status"])
        for status in statuses:
            if status not in STATUSES:
                raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {_short(status)}")
        names = [f"'{status}'" for status in statuses]
        where.append(f"status = {names[0]}" if len(names) == 1 else f"status IN ({', '.join(names)})")
        if PENDING not in statuses:
            where.append("status <> 'pending'")
    for name in ("name", "run_by"):
        if filters.get(name) is not None:
            if not isinstance(filters[name], str):
                raise ValueError(f"{name} must be a text, got {_short(filters[name])}")
            where.append(f"{name} = :{name}")
            parameters[name] = filters[name]
    if filters.get("errors") is not None:
        where.append("own_errors + failed > 0" if filters["errors"] else "own_errors + failed = 0")
    if filters.get("low_priority") is not None:
        where.append(f"low_priority = {int(bool(filters['low_priority']))}")
    if "parent" in filters:
        parent = filters["parent"]
        where.append("parent_id IS NULL" if parent is None else "parent_id = :parent AND parent_id IS NOT NULL")
        parameters["parent"] = getattr(parent, "id", parent)
    if not filters.get("system"):
        where.append("system = 0")
    for name, sign in (("created_from", ">="), ("created_to", "<=")):
        if filters.get(name) is not None:
            where.append(f"created_at {sign} :{name}")
            try:
                parameters[name] = float(filters[name])
            except OverflowError:
                raise ValueError(f"{name} must be Unix seconds, got {_short(filters[name])}") from None
    if filters.get("q"):
        where.append(
            "(id = :number OR instr(lower(name || ' ' || ifnull(label, '') || ' ' || ifnull(message, '') || ' ' || ifnull(run_by, '')), :q)"
            " OR instr(ifnull(options, ''), '\"secret\"') = 0 AND instr(lower(ifnull(args, '') || ' ' || ifnull(kwargs, '')), :json))")
        text = _text(filters["q"])
        parameters.update(q=text.lower(), json=_dump(text)[1:-1].lower(),      # arguments are ASCII, the rest is escaped
                          number=int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1)
    return where, parameters


# ---- what people see of a job ---------------------------------------------------------------------------------

MASK = "\u2022\u2022\u2022"
COLUMNS_SEEN = ("id", "name", "label", "status", "created_at", "run_at", "started_at", "finished_at", "run_by", "parent_id",
                "attempt", "message")
_TEXT_COLUMNS = ("name", "status", "phase", "parked", "label", "run_by", "key", "message")
_JSON_COLUMNS = ("options", "args", "kwargs", "state", "positions", "result", "error")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_parse = json.JSONDecoder(parse_constant=_refuse_constant).decode


def describe(row: sqlite3.Row, now: float, usual: Callable[[str], float | None]) -> dict[str, Any]:
    """Return the `info` of a job: the dict of the JSON interface. Times are Unix seconds, durations seconds; `usual(name)` is
    how long jobs of this name take. Of a row that somebody else has written wrong: what can be read of it."""
    try:
        return _described(row, now, usual)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return _described(_legible(row, error), now, usual)


def _legible(row: sqlite3.Row, why: Exception) -> dict[str, Any]:
    """Return a row without what nobody can read, nor values: which of them are secret may be among that."""
    legible: dict[str, Any] = {}
    for name in row.keys():
        value = None if name in _JSON_COLUMNS else row[name]
        if value is not None:
            value = _text(value) if name in _TEXT_COLUMNS else value if _is_number(value) else 0
        legible[name] = value
    return {**legible, "error": dump_error("StoreError", f"this row cannot be read: {_text(why)}", "")}


def _described(row: sqlite3.Row | dict[str, Any], now: float, usual: Callable[[str], float | None]) -> dict[str, Any]:
    options = kept_options(row["options"])
    values = tuple(row)
    if "unreadable" in options or bytes in map(type, values) or math.inf in values or -math.inf in values:
        raise ValueError(options.get("unreadable", "it has bytes, or an infinite number"))
    status = row["status"]
    active = status in ACTIVE
    due = max(row["created_at"], row["run_at"] or 0.0)
    duration = row["duration"] + (max(0.0, now - row["since"]) if active and row["since"] else 0.0)
    error = _parse(row["error"]) if row["error"] else None
    waits_until = now if status == PENDING else row["finished_at"] or due
    info = {name: row[name] for name in COLUMNS_SEEN}
    info.update(
        phase=phase_of(row, now), waiting=max(0.0, waits_until - due) if row["started_at"] is None else row["waited"], duration=duration,
        errors=row["own_errors"] + row["failed"], low_priority=bool(row["low_priority"]), system=bool(row["system"]),
        progress=progress_of(row), eta=eta_of(row, now, duration, usual),
        children={name: row[name] for name in ("total", "done", "failed", "running")},
        root_id=row["root_id"] or row["id"], **shown_arguments(row, options.get("secret", ())),
        state=_parse(row["state"]) if row["state"] else None, result=_parse(row["result"]) if row["result"] else None,
        error=error and (error["traceback"] or f"{error['type']}: {error['text']}"),
        operations=allowed_operations(status, options, bool(row["system"]), row["running"] > 0))
    return info


def phase_of(row: sqlite3.Row, now: float) -> str:
    """Return what refines the status, for people."""
    if row["status"] == RUNNING:
        return "waiting for children" if row["returned"] else ""
    if row["status"] != PENDING:
        return ""
    if row["parked"] is not None:
        return row["phase"]
    if row["run_at"] is not None and row["queue"] is None:
        return row["phase"] or "scheduled"
    return row["phase"] or ("waiting for low load" if row["low_priority"] else "")


def progress_of(row: sqlite3.Row) -> float | None:
    """Return 0 to 1, or None: the mean over the descendants, and the job itself where it reports progress of its own."""
    if row["status"] == FINISHED:
        return 1.0
    if not row["total"]:
        return row["progress"]
    own = row["progress"]
    parts, done = row["total"], row["tree_progress"]
    if own is not None:
        parts, done = parts + 1, done + (1.0 if row["returned"] else own)
    return min(1.0, max(0.0, done / parts))


def eta_of(row: sqlite3.Row, now: float, duration: float, usual: Callable[[str], float | None]) -> float | None:
    """Return the seconds left: from the tree's rate and the attempt's own, else from earlier jobs of the same name."""
    if row["status"] not in ACTIVE:
        return None
    estimates = []
    if row["total"]:
        rate = Rate(row["tree_gained"] or 0.0, row["tree_seconds"] or 0.0)
        speed = rate.per_second
        age = now - max(row["tree_at"] or 0.0, row["since"] or 0.0)
        estimates.append(time_left(row["total"] - row["tree_progress"], rate, max(1, row["running"]) / speed if speed else 0.0, age,
                                   duration - age))
    if row["gained"] and not row["returned"]:
        age = now - row["progress_at"]
        estimates.append(time_left(1.0 - row["progress"], Rate(row["gained"], row["seconds"]), row["step"], age, duration - age))
    known = [estimate for estimate in estimates if estimate is not None and math.isfinite(estimate)]
    if known:
        return max(known)
    mean = usual(row["name"])
    return mean - duration if mean is not None and duration < mean else None      # longer than usual: nobody knows


def shown_arguments(row: sqlite3.Row, secret: Iterable[str | int]) -> dict[str, Any]:
    """Return args and kwargs as JSON values, with the secret ones masked."""
    args = list(_parse(row["args"])) if row["args"] else []
    kwargs = dict(_parse(row["kwargs"])) if row["kwargs"] else {}
    for place in secret:
        if isinstance(place, int) and place < len(args):
            args[place] = MASK
        elif place in kwargs:
            kwargs[place] = MASK
    return {"args": args, "kwargs": kwargs}


# ---- 9 Worker pool --------------------------------------------------------------------------------------------

ABANDONED_A_PLACE = 2      # threads of superseded attempts that live on, for each place; then no job is claimed


class Pool:
    """`size` places in which attempts execute, and the threads for them, made when needed and reused. One that executes in
    another process takes a place as well, but no thread: it is handed to `depart`, and `end` is called when it is back.

    An attempt that waits for another job gives its place away and asks for one when it goes on. Places go to those
    that return and to claimed jobs in turn, so neither starves, waiting never deadlocks, and never do more than `size`
    attempts execute, but for one when all of those that do have become low priority meanwhile.
    """

    def __init__(self, size: int, execute: Callable[[Attempt], None], settle: Callable[[Attempt], bool],
                 claim: Callable[[], None], depart: Callable[[Attempt], None]) -> None:
        self.size = size
        self._reserve = 1 if size > 1 else 0              # places that low priority never takes
        self._execute = execute
        self._settle, self._claim = settle, claim         # settle tells whether to claim at once
        self._depart = depart                             # called under the lock
        # `_changed` guards everything below; no user code and no SQL runs under it.
        self._changed = _Condition()
        self._queue: deque[Attempt] = deque()             # claimed
        self._returning: deque[Attempt] = deque()         # they have waited, and go on with the next place
        self._handed: deque[Attempt] = deque()            # claimed ones that have a place, for the next idle thread
        self._returning_first = True
        self._executing: set[Attempt] = set()
        self._busy = self._low_busy = 0                   # places taken; those by low priority
        self._idle = 0                                    # threads without work
        self.lingers = False                              # one of them does not sleep yet: it claims in a moment
        self._threads: set[threading.Thread] = set()
        self.abandoned = 0                                # superseded attempts whose threads live on
        self._closed = self.forked = False

    @property
    def is_clogged(self) -> bool:
        """Tell whether so many abandoned threads live on that no more jobs should be claimed."""
        return self.abandoned >= ABANDONED_A_PLACE * self.size

    def room(self) -> tuple[int, int, int, list[Attempt]]:
        """Return the free places, those that low-priority jobs may take, those that are about to get free (whose attempts
        are still short ones), and the claimed jobs that wait."""
        long_since = time.monotonic() - 2 * AHEAD_SECONDS
        with self._changed:
            waiting = list(self._queue)
            if self.is_clogged:
                return 0, 0, 0, waiting
            low_returning = sum(attempt.low_priority for attempt in self._returning)
            low_room = self.size - self._reserve - self._low_busy - sum(attempt.low_priority for attempt in waiting)
            long = sum(attempt.has_place and 0 < attempt.begun < long_since for attempt in self._executing)
            returning = len(self._returning) - low_returning + max(0, min(low_returning, low_room))
            free = self._places - self._busy - returning - len(waiting)
            return free, low_room - low_returning, self.size - long, waiting

    @property
    def _places(self) -> int:
        """The places there are. Attempts that became low priority while they ran are not interrupted; the reserve comes on top."""
        return self.size + max(0, self._low_busy - (self.size - self._reserve))

    def take_back_stuck(self) -> list[Attempt]:
        """Take out the claimed attempts if they have waited for too long: those before them turned out long."""
        with self._changed:
            stuck = self._queue and time.monotonic() - self._queue[0].claimed_at > 5 * AHEAD_SECONDS
        return self.take_back() if stuck else []

    @property
    def is_empty(self) -> bool:
        """Tell whether no claimed job waits for a place."""
        return not self._queue

    def put(self, attempts: Iterable[Attempt] = (), work: float = math.inf) -> None:
        """Have claimed attempts executed, in this order; they are known to be `work` seconds of work.

        To wake a thread costs more than a tiny job: only so many are woken as the work is worth. The service thread calls it
        without attempts, and gives the rest of the free places out.
        """
        with self._changed:
            self._queue.extend(attempts)
            if not attempts:                              # threads that Ctrl-C kept from being started are not counted on
                started = {thread for thread in self._threads if thread.ident is not None}
                self._idle -= len(self._threads) - len(started)
                self._threads = started
            starting = self._give_places(work / HAND_SECONDS + 1)
        self._start(starting)

    def _give_places(self, hands: float = 1) -> list[threading.Thread]:
        """Hand free places out; return the threads to start for them. Called under the lock."""
        while self._busy < self._places and hands >= 1:
            full = self._low_busy >= self.size - self._reserve
            back = next((attempt for attempt in self._returning if not (full and attempt.low_priority)), None)
            if back is not None and (self._returning_first or not self._queue):
                attempt = back
                self._returning.remove(attempt)
            elif not self._queue:
                break
            else:
                attempt = self._queue.popleft()
            self._returning_first = not self._returning_first
            attempt.has_place = True
            self._busy += 1
            self._low_busy += attempt.low_priority
            if attempt is back:
                attempt.place.set()                       # type: ignore[union-attr]
            elif attempt.engine is not None:
                self._executing.add(attempt)
                self._depart(attempt)
                continue
            else:
                self._handed.append(attempt)
            hands -= 1
        if not self._handed:
            return []
        self._changed.notify(len(self._handed))
        starting = [threading.Thread(target=self._work, name="bgjobs-worker", daemon=True)
                    for _ in range(len(self._handed) - self._idle)]
        self._idle += len(starting)
        self._threads.update(starting)
        return starting

    def _start(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError as error:                 # the service thread's put() tries again
                _say(logging.ERROR, f"bgjobs: {error}")
                with self._changed:
                    self._idle -= 1
                    self._threads.discard(thread)

    def _work(self) -> None:
        """What a worker thread does: execute, have the outcome recorded, take the next job over with the place."""
        attempt = self._next_handed()
        while attempt is not None:
            self._execute(attempt)
            if self.forked:                               # by the function; this is the child, and ends: the parent has the job
                return
            lead = self._settle(attempt)
            starting: list[threading.Thread] = []
            with self._changed:
                self._executing.discard(attempt)
                retires = attempt.abandoned               # another thread has taken this one's part
                if retires:
                    lead |= self._forget_abandoned()
                    self._threads.discard(threading.current_thread())
                elif lead or self._returning or not self._queue or self._queue[0].engine is not None or self._busy > self.size:
                    starting = self._free(attempt)
                    self._idle += 1
                    attempt = None                        # an idle worker keeps nothing alive
                else:
                    attempt = self._take_over(attempt)
            self._start(starting)
            if lead:
                self._claim()
            if retires:
                return
            if attempt is None:
                if not lead and not self.lingers:
                    self._linger()
                attempt = self._next_handed()

    def end(self, attempt: Attempt) -> None:
        """Have the outcome of an attempt that executed elsewhere recorded, and give its place to the next."""
        lead = self._settle(attempt)
        with self._changed:
            self._executing.discard(attempt)
            if attempt in self._returning:                # it died while it waited for its place
                self._returning.remove(attempt)
            if attempt.abandoned:
                lead |= self._forget_abandoned()
            starting = self._free(attempt) if attempt.has_place else []
        self._start(starting)
        if lead:
            self._claim()

    def _forget_abandoned(self) -> bool:
        """Count one abandoned attempt less; tell whether that lets jobs be claimed again. Called under the lock."""
        clogged = self.is_clogged
        self.abandoned -= 1
        return clogged

    def _linger(self) -> None:
        """Look again in a moment: where jobs keep coming and nobody waits for them, that spares a claim and a wake-up for each."""
        self.lingers = True
        time.sleep(LINGER_SECONDS)
        self.lingers = False
        self._claim()

    def _next_handed(self) -> Attempt | None:
        """Wait for an attempt that has been given a place; None when the pool is closed."""
        with self._changed:
            self._threads.add(threading.current_thread())
            while not self._handed and not self._closed:
                self._changed.wait()
            self._idle -= 1
            if not self._handed:
                self._threads.discard(threading.current_thread())
                return None
            attempt = self._handed.popleft()
            self._executing.add(attempt)
            return attempt

    def _take_over(self, ended: Attempt) -> Attempt:
        """Give the place of an ended attempt to the first claimed one. Called under the lock."""
        attempt = self._queue.popleft()
        ended.has_place, attempt.has_place = False, True
        self._low_busy += attempt.low_priority - ended.low_priority
        self._executing.add(attempt)
        return attempt

    def _free(self, attempt: Attempt) -> list[threading.Thread]:
        """Take the place of an attempt away and give it to the next. Called under the lock."""
        attempt.has_place = False
        self._busy -= 1
        self._low_busy -= attempt.low_priority
        return self._give_places()

    def abandon(self, attempt: Attempt) -> None:
        """Take the place of a superseded attempt away. Its thread ends with it; another takes its part."""
        with self._changed:
            if attempt.abandoned or attempt not in self._executing:
                return
            attempt.abandoned = True
            self.abandoned += 1
            if attempt in self._returning:                # it stops without a place
                self._returning.remove(attempt)
                attempt.place.set()                       # type: ignore[union-attr]
            starting = self._free(attempt) if attempt.has_place else []
            clogged = self.is_clogged
        self._start(starting)
        if clogged:
            _say(logging.ERROR, f"{self.abandoned} superseded attempts still run in threads of this process: no more jobs are "
                 "claimed until some of them end")
        self._claim()

    def set_low_priority(self, attempt: Attempt, low: int) -> None:
        """Have the place that an attempt holds, or will get, count as one of low priority, or not."""
        with self._changed:
            if attempt.has_place:
                self._low_busy += low - attempt.low_priority
            attempt.low_priority = low
            starting = self._give_places()                # one that returns may take the reserve now
        self._start(starting)

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
                attempt.waited += time.monotonic() - attempt.left_at

    def leave(self, attempt: Attempt) -> None:
        """Give the place of an attempt away that begins to wait."""
        with self._changed:
            attempt.waits += 1
            leaves = attempt.waits == 1 and attempt.has_place
            if leaves:
                attempt.left_at = time.monotonic()
            starting = self._free(attempt) if leaves else []
        self._start(starting)
        if leaves:
            self._claim()

    def ask_back(self, attempt: Attempt, place: Any) -> bool:
        """Have `place.set()` called as soon as there is a place for an attempt that has waited. False: it needs none."""
        with self._changed:
            attempt.waits -= 1
            returns = attempt.waits == 0 and not attempt.has_place and not attempt.abandoned
            if returns:
                attempt.place = place
                self._returning.append(attempt)
            starting = self._give_places() if returns else []
        self._start(starting)
        return returns

    def has(self, attempt: Attempt) -> bool:
        """Tell whether an attempt waits for its thread, or has one."""
        with self._changed:
            return attempt in self._executing or attempt in self._handed or attempt in self._queue

    def take_back(self) -> list[Attempt]:
        """Take out the claimed attempts that have no place yet."""
        with self._changed:
            attempts = list(self._queue)
            self._queue.clear()
        return attempts

    def close(self, seconds: float) -> None:
        """Let the threads end as they become idle; wait for that for some seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = [thread for thread in self._threads if thread.ident is not None and thread is not threading.current_thread()]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


# ---- 10 Inside a job ------------------------------------------------------------------------------------------

_UNSET: Any = object()
_current: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("bgjobs_current", default=None)


class JobContext:
    """What `current_job()` returns. Outside a job, as here, all of it works and does nothing."""

    id: int | None = None
    name: str | None = None
    run_by: str | None = None
    attempt: int = 0
    state: Any = None
    stop_requested: bool = False

    @property
    def log(self) -> logging.Logger:
        """A logger of the standard library; inside a job its records go to the job's log, too."""
        return _log

    def checkpoint(self, state: Any = _UNSET) -> None:
        """Be stopped here, if that was asked for; with `state`, save it first (JSON values; returns after the commit).

        The next attempt finds it as `current_job().state`. Costs next to nothing without state: call it in every turn
        of a loop. Raises JobStopped: stop now; TypeError: the state cannot be stored.
        """

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the job is: `done` of `total` units. Shown within a second. Never a checkpoint."""

    def each(self, iterable: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        """Yield the items, with progress and a checkpoint between them.

        A resumed attempt goes on after the last item whose turn was completed: the iterable must then give the same
        items in the same order. `total`: how many there are, where the iterable has no length.
        """
        yield from iterable

    def sleep(self, seconds: float) -> None:
        """Sleep, and be stopped at once if that is asked for. Raises JobStopped."""
        time.sleep(seconds)


_outside = JobContext()

RETURNED, RAISED, HALTED = "returned", "raised", "halted"           # outcomes of an attempt's function;
RELEASED, UNSPENT, UNKNOWN = "released", "unspent", "unknown"       # of one that is given back: begun, not begun, unknown here
TIMED_OUT = "timed out"                                              # the reason to stop one; it ends as RAISED
OUTCOMES = {RETURNED: "finished", RAISED: "failed", HALTED: "stopped", RELEASED: "given back"}       # in words


class Attempt(JobContext):
    """One execution of a job's function by this process."""

    # Defaults that most attempts never change stand here: an attempt is made for each job.
    begun = ran = worked = waited = left_at = 0.0         # monotonic; seconds: in all, without waiting for others, waiting; monotonic
    outcome, reason = UNSPENT, HALTED                     # how the function ended; how it ends when it stops
    result: str | None = None
    error: str | None = None
    exception: BaseException | None = None
    thread: int | None = None                             # while it executes
    has_place = abandoned = False                         # these four are the pool's
    waits = lines = lines_at_trim = 0                     # lines: logged, and those of them when its log was trimmed last
    place: Any = None                                     # what is set when one that waited has a place again
    engine: Engine | None = None                          # that executes it elsewhere
    unsaved_progress: Report | None = None
    _progress: tuple[float, float | None, str | None, float] | None = None    # the newest: done, total, message, monotonic seconds
    _pace: Pace | None = None
    _loops = 0                                            # of each(), the next one's number
    _attention = False                                    # a checkpoint has more to do than to go on
    _operation: threading.Event | None = None
    _saved_at = 0.0
    _logger: logging.Logger | None = None
    connections: dict[sqlite3.Connection, int] = {}       # the app's, in whose transactions the function has submitted: the last id

    def __init__(self, runner: Runner, claim: tuple[Any, ...]) -> None:
        (self.id, self.parent_id, self.root_id, self.name, number, self.args, self.kwargs, self._state, self._positions, options,
         self.run_by, self.low_priority, total, self.saved_progress, _, _, self.max_running, self.deaths, self.due, self.ran_before,
         self.system, self.charge) = claim
        self.number = self.attempt = number + 1
        self.runner = runner
        self.options = kept_options(options) if options else {}
        self.has_children = total > 0
        self.claimed_at = time.monotonic()
        self.ticket = Ticket()
        self._loop_positions: list[int] = []
        self._turns: list[tuple[float, float | None]] = []    # of the loops of each() that are under way: done, total
        self._wakes: list[Any] = []                       # what a stop request sets

    @property
    def correction(self) -> int:
        """The microseconds by which the claim charged too little."""
        return int(self.worked * 1e6) - self.charge

    @property
    def took_too_long(self) -> TimeoutError:
        return TimeoutError(f"attempt {self.number} took longer than its timeout of {self.options['timeout']:,g} s")

    def fail(self, error: BaseException) -> None:
        """Make this error the attempt's outcome. Never raises, whatever the error's own methods do."""
        self.outcome, self.exception, self.result = RAISED, error, None
        self.error = dump_error(_type_name(error), _text(error), _traceback_of(error))

    # stopping

    def request_stop(self, reason: str = HALTED, force: bool = False) -> None:
        """Have JobStopped raised at the next checkpoint; `reason` is the outcome then. From any thread."""
        if not force and not self.options.get("stoppable", True):
            return
        self.reason = reason
        self.stop_requested = self._attention = True
        for wake in list(self._wakes):
            wake.set()

    def let_pass(self, operation: threading.Event) -> None:
        """Have the next checkpoint wait for an operation on its way: a loop that only computes would hold it up by the
        interpreter lock, 5 ms for each of its statements."""
        self._operation = operation
        self._attention = True

    def supersede(self) -> None:
        """Have JobStopped raised wherever the function is. From any thread, once the store refuses this attempt."""
        self.request_stop(force=True)
        self.ticket.use()

    def raise_if_stopped(self) -> None:
        """Be a checkpoint. Raises JobStopped."""
        if self.stop_requested:
            raise JobStopped(f"job {self.id} was asked to stop")

    def checkpoint(self, state: Any = _UNSET) -> None:
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
        wake = _Event()
        with self.woken_by_stop(wake):
            wake.wait(seconds)
        self.raise_if_stopped()

    @contextlib.contextmanager
    def woken_by_stop(self, wake: Any) -> Iterator[None]:
        """Have a stop request call `wake.set()` during the block."""
        self._wakes.append(wake)
        try:
            if self.stop_requested:                       # it came before this was in the list
                wake.set()
            yield
        finally:
            self._wakes.remove(wake)

    # state

    @property
    def state(self) -> Any:
        """What the last checkpoint saved, or None. A copy: only checkpoint(state=...) changes what is saved."""
        return decode(self._state)

    def _save(self, state: str | None) -> None:
        positions = self.unsaved_positions()
        if not self.runner._store.write(lambda tx: tx.save_state(self, state, positions)):
            self.request_stop()
            raise JobStopped(f"attempt {self.number} of job {self.id} has been superseded")
        if state is not None:
            self._state = state
        self._saved_at = time.monotonic()

    def unsaved_positions(self) -> str | None:
        """Return how far each loop of each() is, as JSON, or None."""
        return json.dumps(self._loop_positions) if self._loop_positions else None

    def each(self, iterable: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        positions, loop = self._resumed_positions(), self._loops
        self._loops += 1
        if loop == len(positions):
            positions.append(0)
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        total = None if total is None else float(total)
        done = positions[loop]
        turns, depth = self._turns, len(self._turns)
        turns.append((done, total))
        try:
            for item in itertools.islice(iterable, done, None) if done else iterable:
                self._report_turn(depth, done, total)
                if self._attention:
                    self._attend()
                yield item
                done += 1
                positions[loop:] = [done]                 # the loops inside this turn are done with: the next turn's are new
                self._loops = loop + 1
                if time.monotonic() - self._saved_at > 0.1:
                    self._save(None)
            self._report_turn(depth, done, total)
        finally:
            del turns[depth:]
        self.raise_if_stopped()

    def _report_turn(self, depth: int, done: float, total: float | None) -> None:
        """Report the progress of a loop of each(); one inside another's turn refines the outer one's."""
        turns = self._turns
        turns[depth:] = [(done, total)]
        for outer_done, outer_total in reversed(turns[:depth]):
            done, total = outer_done + (done / total if total else 0.0), outer_total
        self._note_progress(done, total, None)

    def _resumed_positions(self) -> list[int]:
        if not self._loop_positions and self._positions:
            self._loop_positions = json.loads(self._positions)
        return self._loop_positions

    # progress and log

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
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
        if self._logger is None:
            self._logger = _JobLogger(self)
        return self._logger


class _JobLogger(logging.Logger):
    """A job's own logger: its records go to the job's log, and on to the app's handlers as those of "bgjobs.job" would."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__("bgjobs.job", logging.DEBUG)
        self.parent = logging.getLogger("bgjobs.job")
        self._attempt = attempt

    isEnabledFor = library_code(logging.Logger.isEnabledFor)

    @library_code
    def callHandlers(self, record: logging.LogRecord) -> None:
        self._attempt.runner._keep_log_line(self._attempt, record)
        if self.parent.isEnabledFor(record.levelno):
            self.parent.callHandlers(record)


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
        if attempt is not None and record.name not in ("bgjobs.job", None):      # None: of makeLogRecord, which emits nothing
            attempt.runner._keep_log_line(attempt, record)
        return record
    make_and_keep._bgjobs = True                          # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_and_keep)


def current_job() -> JobContext:
    """Return the context of the job that this code runs in; outside of one, a context that does nothing."""
    return _current.get() or _outside


# ---- 11 The handle --------------------------------------------------------------------------------------------

def _live(name: str, what: str) -> Any:
    return property(lambda self: self.info()[name], doc=what + " Read from the store at each access.")


class _Waiters(list):                                     # type: ignore[type-arg]
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
        """Wait until the event is set. A stop comes at the next checkpoint, but a force stop at once: raises JobStopped."""
        attempt = self._attempt
        if not self.is_set():
            with attempt.woken_by_stop(_Notifier(self._cond)):
                attempt.runner._wait_in_job(attempt, self._wait, timeout)
            if attempt.ticket.void:
                raise JobStopped(f"attempt {attempt.number} of job {attempt.id} has been superseded")
        return self.is_set()

    def _wait(self, timeout: float | None) -> bool:
        with self._cond:
            return self._cond.wait_for(lambda: self.is_set() or self._attempt.ticket.void, timeout)

    @library_code
    def clear(self) -> None:
        super().clear()


class _Notifier:
    """Has the looks of an event to a stop request: setting it wakes who waits on the condition."""

    def __init__(self, condition: threading.Condition) -> None:
        self._condition = condition

    def set(self) -> None:
        with self._condition:
            self._condition.notify_all()


class Job(Future):                                        # type: ignore[type-arg]
    """The handle of a job: a concurrent.futures.Future whose attributes are read from the store when asked.

    `stopped` is not done: `result()` waits on. The Future part completes once; `restart`, and `resume` of a failed
    job, return a new handle. Attributes raise KeyError when the job has been removed.
    """

    def __init__(self, runner: Runner, job_id: int, created_at: float | None = None) -> None:
        self._created_at = created_at                     # of one whose transaction may be rolled back; None: it is stored
        # What Future.__init__ sets, but for the condition, which is made when somebody first waits: see _condition.
        self._runner, self.id = runner, job_id
        self._state = "PENDING"
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters = _Waiters()
        self._done_callbacks: list[Callable[[Future[Any]], Any]] = []
        self._lazy_condition: threading.Condition | None = None

    def _stored(self) -> int:
        """Return the id, as long as it is this job's: a transaction that is rolled back leaves its ids to others. KeyError."""
        if self._created_at is not None:
            rows = self._runner._store.read(CREATED_AT, {"id": self.id})
            if rows and rows[0][0] != self._created_at:
                raise KeyError(f"the transaction that submitted job {self.id} was rolled back")
            if rows:
                self._created_at = None
        return self.id

    @property
    def _condition(self) -> threading.Condition:
        """Whoever touches the Future's condition wants to know of the end: from then on the runner watches for it."""
        if self._lazy_condition is None:
            self._stored()
            self._runner._watch(self)
            self._made_condition()
        return self._lazy_condition                       # type: ignore[return-value]

    @library_code
    def _made_condition(self) -> threading.Condition:
        if self._lazy_condition is None:
            with self._runner._handle_lock:
                self._lazy_condition = self._lazy_condition or _Condition(_HandleLock())       # type: ignore[arg-type]
        return self._lazy_condition

    name = _live("name", "The stable name of the function.")
    label = _live("label", "A title for people, or None.")
    status = _live("status", "One of the seven statuses.")
    phase = _live("phase", "What refines the status for people, or \"\".")
    created_at = _live("created_at", "Unix seconds.")
    started_at = _live("started_at", "Unix seconds of the first attempt, or None.")
    finished_at = _live("finished_at", "Unix seconds, or None.")
    waiting = _live("waiting", "Seconds from creation, or its due time, to the start.")
    duration = _live("duration", "Seconds it has been running, all attempts.")
    errors = _live("errors", "Its own failed attempts plus failed descendants.")
    low_priority = _live("low_priority", "Whether it runs in periods of low load only.")
    run_by = _live("run_by", "Who asked for it, or None.")
    progress = _live("progress", "0 to 1, or None.")
    eta = _live("eta", "Seconds left, or None.")
    children = _live("children", "{total, done, failed, running} over all descendants.")
    parent_id = _live("parent_id", "The parent's id, or None.")
    root_id = _live("root_id", "The id of its tree's root.")
    attempt = _live("attempt", "The number of the newest attempt, 0 before the first.")
    error = _live("error", "The traceback of the newest failure, or None.")
    operations = _live("operations", "The operations its status allows now.")

    @property
    def args(self) -> list[Any]:
        """Its positional arguments, secret ones masked. Read from the store at each access."""
        return decode(json.dumps(self.info()["args"]))

    @property
    def kwargs(self) -> dict[str, Any]:
        """Its keyword arguments, secret ones masked. Read from the store at each access."""
        return decode(json.dumps(self.info()["kwargs"]))

    @property
    def state(self) -> Any:
        """What its last checkpoint saved, or None. Read from the store at each access."""
        return decode(json.dumps(self.info()["state"]))

    def info(self) -> dict[str, Any]:
        """Return all attributes as one dict of JSON values: the JSON interface's."""
        return self._runner._info(self._stored())

    def logs(self, *, level: str | int | None = None, text: str | None = None, regex: str | None = None,
             since: float | None = None, until: float | None = None, after: int = 0, limit: int | None = None, tree: bool = False
             ) -> list[dict[str, Any]]:
        """Return the log lines {"id", "job_id", "at", "level", "message"}, oldest first.

        level: the least, as a name or number. text: contained, in any case. regex: found in it, as `re.search` does. since,
        until: Unix seconds. after: a line's id. limit: how many at most; without `after` the newest ones. tree: those of all
        descendants, too.
        """
        return self._runner._logs(self._stored(), level, text, since, until, after, limit, tree, regex)

    # operations

    def stop(self, *, by: str | None = None) -> Job:
        """Stop the job and its descendants at their next checkpoint; at once where none executes. Returns at once."""
        return self._runner._operate("stop", self._stored(), by, self)

    def resume(self, *, by: str | None = None) -> Job:
        """Have a stopped or failed job go on from its saved state. Returns a new handle if this one was completed."""
        return self._runner._operate("resume", self._stored(), by, self)

    def force_stop(self, *, by: str | None = None) -> Job:
        """Make a stopping job stopped now; what the abandoned attempt still does changes nothing in the store."""
        return self._runner._operate("force_stop", self._stored(), by, self)

    def restart(self, *, by: str | None = None) -> Job:
        """Run a finished or failed job again from scratch, its former descendants removed. Returns a new handle."""
        return self._runner._operate("restart", self._stored(), by, self)

    def set_low_priority(self, low_priority: bool = True, *, by: str | None = None) -> Job:
        """Have the job and its descendants run in periods of low load only, or no longer so."""
        return self._runner._operate("set_low_priority" if low_priority else "remove_low_priority", self._stored(), by, self)

    def cancel(self, *, by: str | None = None) -> bool:
        """Discard a pending or stopped job for good. Returns whether it is cancelled; never raises InvalidOperation."""
        if self._state != "PENDING":
            return self._state == CANCELLED_AND_NOTIFIED
        try:
            self._runner._operate("cancel", self._stored(), by, self)
        except (InvalidOperation, StoreError):            # StoreError: the runner is shut down
            return self.cancelled()
        return True

    # the Future part

    def done(self) -> bool:
        """Tell whether the job is over."""
        return self._look() in OVER

    def running(self) -> bool:
        """Tell whether the job is running or stopping."""
        return self._look() in ACTIVE

    def cancelled(self) -> bool:
        """Tell whether the job has been cancelled."""
        return self._look() == CANCELLED

    def _look(self) -> str:
        if self._state == CANCELLED_AND_NOTIFIED:
            return CANCELLED
        if self._state == FUTURE_FINISHED:
            return FINISHED if self._exception is None else FAILED
        status = self._runner._status(self._stored())
        if status in OVER:
            self._complete()
        return status

    @library_code
    def result(self, timeout: float | None = None) -> Any:
        """Return what the function returned, once the job and all its descendants are over.

        timeout: seconds, None waits on. In a job this is a checkpoint, and the worker's place is given away meanwhile.
        Raises what the function raised (JobFailed, where another process ran it), TimeoutError, CancelledError.
        """
        self._await_end(timeout)
        error = super().exception(0)
        if error is None:                                 # Future.result asks for its truth
            return self._result
        try:
            raise error
        finally:
            del self, error                               # its traceback keeps this frame

    @library_code
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the function raised, or None, once the job is over. Waits and raises as `result` does."""
        self._await_end(timeout)
        return super().exception(0)

    def _await_end(self, timeout: float | None, given_up: Callable[[], bool] = lambda: False) -> None:
        if self._state == "PENDING":
            self.done()
        if self._state == "PENDING":                      # also when it was over and has been resumed by now
            attempt = _current.get()
            if attempt is None:
                self._wait(timeout, lambda: self._state != "PENDING")
                return
            with attempt.woken_by_stop(_Notifier(self._condition)):
                attempt.runner._wait_in_job(attempt, lambda seconds: self._wait(
                    seconds, lambda: self._state != "PENDING" or attempt.stop_requested or given_up()), timeout)
            attempt.raise_if_stopped()

    def _wait(self, timeout: float | None, over: Callable[[], bool]) -> bool:
        condition = self._condition
        with condition:
            return condition.wait_for(over, timeout)

    def __await__(self) -> Any:
        import asyncio
        if _current.get() is None:
            return asyncio.wrap_future(self).__await__()
        return self._await_in_job().__await__()

    async def _await_in_job(self) -> Any:
        """Await the result in a thread that is no executor's: the interpreter would wait for that at exit. A cancelled task goes
        on when the attempt has its place again."""
        import asyncio
        loop, cancelled = asyncio.get_running_loop(), []
        end = loop.create_future()

        def wait() -> None:
            outcome: Future[Any] = Future()
            try:
                self._await_end(None, lambda: bool(cancelled))
                outcome.set_result(Future.result(self, 0))
            except BaseException as error:
                outcome.set_exception(error)
            with contextlib.suppress(RuntimeError):           # a force stop has ended the loop
                loop.call_soon_threadsafe(end.set_result, outcome)
        threading.Thread(target=contextvars.copy_context().run, args=(wait,), name="bgjobs-await", daemon=True).start()
        while not end.done():
            try:
                await asyncio.wait([end])
            except asyncio.CancelledError as error:
                cancelled.append(error)
                _Notifier(self._condition).set()
        if cancelled:
            raise cancelled[0]
        return end.result().result()

    @library_code
    def add_done_callback(self, fn: Callable[[Future[Any]], Any]) -> None:
        """Call `fn(job)` once the job is over, in a thread of the runner's for callbacks; at once if it is over."""
        if self._state == "PENDING":
            self._runner._hold(self)
        super().add_done_callback(fn)
        self.done()

    @library_code
    def _complete(self) -> None:
        """Take the outcome over from the store, once. Wakes who waits; callbacks are called in a thread of their own."""
        rows = self._runner._store.read(OUTCOME_OF, {"id": self.id})
        row = rows[0] if rows else {"status": "removed"}
        if row["status"] not in (*OVER, "removed"):
            return
        condition = self._made_condition()
        with condition:
            if self._state != "PENDING":
                return
            state = CANCELLED_AND_NOTIFIED if row["status"] == CANCELLED else FUTURE_FINISHED
            if row["status"] == CANCELLED:
                for waiter in self._waiters:
                    waiter.add_cancelled(self)
            else:
                try:
                    if row["status"] == "removed":
                        self._exception = BgjobsError(f"job {self.id} has been removed from {self._runner.path}")
                    elif row["status"] == FINISHED:
                        self._result = decode(row["result"])
                    else:
                        self._exception = self._runner._exception_of(self.id, row)
                except Exception as error:
                    self._exception = BgjobsError(f"job {self.id} is {row['status']}, but its outcome cannot be read: {_text(error)}")
                    self._exception.__cause__ = error
                for waiter in self._waiters:
                    waiter.add_result(self) if self._exception is None else waiter.add_exception(self)
            condition.notify_all()
            self._state = state                           # last: what Ctrl-C cuts short is done again
        self._runner._call_back(self)

    def __repr__(self) -> str:
        try:
            return f"<Job {self.id} {self.name} {self.status}>"
        except (KeyError, BgjobsError):
            return f"<Job {self.id}>"


# ---- 12 Runner ------------------------------------------------------------------------------------------------

SETTLE_SECONDS = 0.002     # how long an outcome that nobody waits for may wait for company
POLL_SECONDS = 0.05        # how often the service thread looks for what other processes wrote
GRACE_SECONDS = 5.0        # what running jobs get to reach a checkpoint when the app goes down
STANDING_CLOCK_SECONDS = 5.0   # then a job that waits, in drain, for another time is an error
ATTEMPTS_A_JOB = 100       # that are kept, for people to see
LINES_A_JOB = 10_000       # log lines that are kept of a job, the newest, and up to a tenth more
RETENTION = {"finished": 7 * 86_400, "failed": 30 * 86_400}     # seconds that jobs are kept once they are over, cancelled as finished
PRUNE_IDS = 2_000          # ids that one transaction of a prune looks at
LINES_A_WRITE = 2_000      # log lines that one transaction takes along
LOG_BUFFER = 20_000        # log lines that may wait to be written; more are counted, not kept
MEMORY_OF_EXCEPTIONS = 1_000


class Schedule:
    """What `every` returns: a schedule in the file."""

    def __init__(self, runner: Runner, schedule_id: int) -> None:
        self._runner, self.id = runner, schedule_id

    def info(self) -> dict[str, Any]:
        """Return what there is to know, as JSON values. Times are Unix seconds. registered: the code of a living process has it;
        one that no code has runs no more. skipped: times at which the last job was not over. KeyError: it was removed."""
        rows = self._runner._store.read(ONE_SCHEDULE, {"id": self.id})
        if not rows:
            raise KeyError(f"there is no schedule {self.id} in {self._runner.path}")
        row = dict(rows[0])
        secret = kept_options(row["options"]).get("secret", ())
        live = row["registered"] and not row["paused"]
        return {"id": row["id"], "key": row["key"], "schedule": row["schedule"], "tz": row["zone"], "name": row["name"], "label": row["label"],
                "run_by": row["run_by"], "low_priority": bool(row["low_priority"]), "system": bool(row["system"]),
                **shown_arguments(rows[0], secret), "next_at": row["next_at"] if live else None, "last_at": row["last_at"],
                "job_id": row["job_id"], "job_status": row["job_status"], "runs": row["runs"], "skipped": row["skipped"],
                "paused": bool(row["paused"]), "registered": bool(row["registered"])}

    def pause(self) -> Schedule:
        """Let no more jobs be made, in any process, until it is resumed."""
        self._operate("pause")
        return self

    def resume(self) -> Schedule:
        """Go on with the next time; what was missed in the pause is not made up for."""
        self._operate("resume")
        return self

    def remove(self) -> None:
        """Delete it. InvalidOperation: the code of another living process has it."""
        key = self.info()["key"]
        self._operate("remove")
        self._runner._schedules.pop(key, None)

    def run_now(self) -> Job:
        """Submit its job now; the times stay. InvalidOperation: the last one is not over."""
        return Job(self._runner, self._operate("run_now"))

    def _operate(self, operation: str) -> Any:
        runner = self._runner
        try:
            return runner._store.write(lambda tx: tx.operate_schedule(operation, self.id, runner._id))
        except KeyError:
            raise KeyError(f"there is no schedule {self.id} in {runner.path}") from None

    def __repr__(self) -> str:
        return f"<Schedule {self.id}>"


class Submitter:
    """Submits with the options it was made with: what `options()` returns. A runner is one, too."""

    def __init__(self, runner: Runner | None, options: dict[str, Any]) -> None:
        self._of, self._options = runner, check_options(options)
        if "executor" in options:
            raise TypeError("executor is an option of a function, @job(executor=...), or of start(); it cannot be stored with a job")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
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

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
            ) -> Iterator[Any]:
        """Submit `fn(*arguments)` for each tuple of zip(*iterables), now; return an iterator over the results, in order.

        timeout: seconds from now until which all results must be there, else TimeoutError. chunksize is ignored. What has
        not begun is cancelled when the iterator raises or is dropped.
        """
        jobs = [self.submit(fn, *arguments) for arguments in zip(*iterables)]
        return _results(jobs, None if timeout is None else time.monotonic() + timeout)

    def every(self, schedule: float | str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Schedule:
        """Have `fn(*args, **kwargs)` submitted again and again, from all processes once each time; return the schedule.

        schedule: seconds, a text like "15m" (s, m, h, d, w), or five cron fields, in the time zone of the option tz. It is known by the
        option key, else by function and arguments: to register it at each start changes nothing, or its times, if those given
        have changed. What was missed while no process ran comes once; while its last job is not over, a time is skipped.
        ValueError: a bad schedule, or the same one at other times; give each a key then. TypeError: as submit.
        """
        return (self._of or default_runner())._every(schedule, fn, args, kwargs, self._options)

    def options(self, **options: Any) -> Submitter:
        """Return a Submitter with these options added."""
        return Submitter(self._of, {**self._options, **options})


def _results(jobs: list[Job], deadline: float | None) -> Iterator[Any]:
    jobs.reverse()
    try:
        while jobs:
            result = jobs[-1].result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            jobs.pop()
            yield result
            del result
    except GeneratorExit:
        for job in jobs:                                  # perhaps within a garbage collection: nothing may be locked here
            job._runner._to_cancel.put(job)
        raise
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


@job(name="bgjobs.housekeeping")
def housekeeping(finished: float, failed: float) -> int:
    """Prune the file of the runner whose job this is, and fold its statistics. Each started runner schedules it hourly."""
    runner = _current.get().runner                        # type: ignore[union-attr]
    runner._fold_statistics()
    return runner.prune(finished, failed)


class Runner(Submitter, Executor):
    """Runs the jobs of one file on threads of this process; a complete concurrent.futures.Executor.

    path: the SQLite file ($BGJOBS_DB, else "bgjobs.db"); it may be the app's own. max_workers: attempts that execute
    at once (cores + 4, at most 32). start=False: submits, reads and operates, but runs nothing until start().
    durability: "process" survives the death of the process, "power" a power cut, too. journal: "wal", or "delete", slower, for
    SQLite's rollback journal. retention: seconds that whole trees are kept once they are over, {"finished": 7 days, "failed": 30 days} by
    default, where finished stands for cancelled, too; None keeps everything. modules: names of modules to import, whose
    functions jobs may name. executor: where functions execute instead, a concurrent.futures.Executor (or what makes one, a class or a function without
    arguments: then a broken one is replaced); max_workers is how many at once, by default the executor's. callback: "host:port" of this
    machine, by which an executor's workers on other machines reach it. clock: returns Unix seconds.
    Raises ValueError for a bad value, StoreError for a file that cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_workers: int | None = None, start: bool = True,
                 durability: str = "process", journal: str = "wal", retention: dict[str, float] | None = RETENTION,
                 modules: Iterable[str] = (), executor: Any = None, callback: str | None = None,
                 clock: Callable[[], float] = time.time) -> None:
        if not _is_executor(executor):
            raise ValueError(f"executor must be {_OPTIONS['executor'][1]}, got {_short(executor)}")
        if callback is not None and not (isinstance(callback, str) and callback.rpartition(":")[0] and callback.rpartition(":")[2].isdecimal()):
            raise ValueError(f'callback must be "host:port", got {_short(callback)}')
        if max_workers is None and executor is not None:
            max_workers = getattr(executor, "_max_workers", None)
        if max_workers is None:
            max_workers = min(32, (getattr(os, "process_cpu_count", os.cpu_count)() or 1) + 4)
        if isinstance(max_workers, bool) or not isinstance(max_workers, int) or max_workers <= 0:
            raise ValueError(f"max_workers must be greater than 0, got {_short(max_workers)}")
        if max_workers >= 1 << 31:
            raise ValueError(f"max_workers must be less than 2**31, got {_short(max_workers)}")
        if durability not in ("process", "power"):
            raise ValueError(f'durability must be "process" or "power", got {_short(durability)}')
        if journal not in ("wal", "delete"):
            raise ValueError(f'journal must be "wal" or "delete", got {_short(journal)}')
        if retention is not None and not (isinstance(retention, dict) and set(retention) <= set(RETENTION) and _are_seconds(retention.values())):
            raise ValueError(f"retention must be None or a dict of seconds for {', '.join(RETENTION)}, got {_short(retention)}")
        self._retention = None if retention is None else {**RETENTION, **retention}
        Submitter.__init__(self, self, {})
        self.max_workers = self._max_workers = max_workers
        self._executor, self._callback_address = executor, callback
        self._clock = clock
        for module in modules:
            __import__(module)
        self._store_options = (os.environ.get("BGJOBS_DB", "bgjobs.db") if path is None else path, durability, journal, clock)
        self._open()
        _live_until_exit(self)
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
        self.path = self._store.path
        self._costs = Costs()
        for name, seconds, tree_seconds in self._store.read(MEANS):
            self._costs.means.update({} if seconds is None else {name: seconds})
            self._costs.trees.update({} if tree_seconds is None else {name: tree_seconds})
        self._callback = Callback(self, self._callback_address)
        self._engines: dict[int, Engine] = {}             # by the id of what the app gave
        self._pool = Pool(self.max_workers, self._execute, self._settle, self._store.kick, self._callback.depart)
        self._id, self._first_id = self._register()       # no job of this runner has a lower id
        self._begin_empty()

    def _begin_empty(self) -> None:
        """Set what this process keeps in memory: all that there is where an attempt executes elsewhere."""
        # `_handle_lock` guards _watched, _held and the making of a handle's condition; no SQL runs under it.
        self._handle_lock = threading.Lock()
        self._watched: dict[int, list[weakref.ref[Job]]] = {}
        self._held: set[Job] = set()                     # handles with callbacks live until these were called
        self._callback_thread: threading.Thread | None = None
        self._ends_missed = False                        # of watched jobs, since they could not be read
        self._callbacks_left = 0                         # guarded by _handle_lock, as the thread is
        self._to_call_back: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_cancel: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._exceptions: OrderedDict[int, tuple[int, BaseException]] = OrderedDict()
        # What rides along in the next transaction. Only the leading thread takes from these.
        self._ended: deque[Attempt] = deque()
        self._ended_at = 0.0
        self._settling: list[Attempt] = []
        self._backlog = True                             # more may be ready than the last claim took
        self._lines: deque[tuple[int, float, int, str, int]] = deque()       # job id, time, level, message, attempt
        self._lines_taken: list[tuple[Any, ...]] = []     # by the transaction under way
        self._begun: deque[tuple[str, float]] = deque()   # names of jobs that have begun, and seconds they waited; to be counted
        self._begun_taken: list[tuple[str, float]] = []
        self._lines_dropped = 0
        self._attempts: dict[int, Attempt] = {}           # claimed by this runner, by job id
        self._schedules: dict[str, tuple[str, str | None]] = {}          # that this code has, by key: times and zone
        self._started = self._shut = self._shut_claims = self._inline = False
        self._close_lock = threading.Lock()              # only one thread closes
        self._has_submitted = False
        self._over = _Condition()                        # notified when jobs are over and somebody waits for it
        self._waiting_for_over = 0
        self._service: _Service | None = None
        self._servers: list[Any] = []                    # of the status page
        self._store.begin, self._store.rider, self._store.announce = self._begin, self._ride, self._announce
        self._store.backlog = self._nudge_service

    def _leave_to_parent(self) -> None:
        """In a forked child: this runner has no threads here, and its file is the parent's. Only start() makes it work again."""
        self._store.leave_to_parent()
        self._pool.forked = True
        self._handle_lock, self._close_lock, self._over = threading.Lock(), threading.Lock(), _Condition()
        self._service, self._callback_thread, self._started = None, None, False
        self._attempts, self._servers = {}, []
        self._callback.leave_to_parent()

    def _register(self) -> tuple[int, int]:
        def register(tx: Transaction) -> tuple[int, int]:
            runner_id = self._save_runner(tx, None)
            while not _presence().appear(self._store.path, runner_id):     # a runner on a deleted file of this name has it
                tx.execute(REMOVE_RUNNER, {"id": runner_id})
                runner_id = self._save_runner(tx, None)               # a higher one; its lock is held before anybody can see the row
            return runner_id, tx.execute(NEXT_ID).fetchone()[0]
        return self._store.write(register)

    def _save_runner(self, tx: Transaction, runner_id: int | None, abandoned: int = 0) -> int:
        """Write down, for people to see, that this runner lives; with None for the id it gets one. Returns the id."""
        import socket
        cursor = tx.execute(SAVE_RUNNER, {"id": runner_id, "pid": os.getpid(), "host": socket.gethostname(),
                                          "workers": self.max_workers, "now": tx.now, "abandoned": abandoned,
                                          "lock_file": _presence().file_id(self._store.path)})
        return cursor.lastrowid if runner_id is None else runner_id

    # the hot path: submit, claim, execute, finish

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Job:
        new = self._submission(fn, options)
        if args:
            new.args = encode(args, f"the arguments of {new.name}")
        if kwargs:
            new.kwargs = encode(kwargs, f"the arguments of {new.name}")
        self._has_submitted = True
        connection = options.get("connection")
        if connection is None:
            return Job(self, self._store.write(lambda tx: tx.submit(new)))
        job_id, created_at = self._write_through(connection, lambda tx: (
            found := tx.submit(new), tx.execute(CREATED_AT, {"id": found}).fetchone()[0]))
        return Job(self, job_id, created_at)

    def _write_through(self, connection: sqlite3.Connection, run: Callable[[Transaction], Any]) -> Any:
        value, attempt = self._store.write_through(connection, run), _current.get()
        if attempt is not None:
            attempt.connections = {**attempt.connections, connection: value[0]}
        return value

    def _submit_many(self, fn: Callable[..., Any], argument_tuples: Iterable[tuple[Any, ...]], options: dict[str, Any]
                     ) -> list[int]:
        new = self._submission(fn, options)
        if new.key is not None:
            raise ValueError("a key names one job; it cannot be an option of submit_many")
        ids: list[int] = []
        what = f"the arguments of {new.name}"
        tuples = iter(argument_tuples)
        try:
            while True:
                batch = [encode(args if isinstance(args, tuple) else _not_a_tuple(args), what) if args != () else None
                         for args in itertools.islice(tuples, 10_000)]
                if not batch:
                    return ids
                self._has_submitted = True
                connection = options.get("connection")
                ids += (self._store.write if connection is None else functools.partial(self._write_through, connection))(
                    lambda tx: tx.submit_many(new, batch))
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else BgjobsError
            raise kind(f"{_text(error)} ({len(ids):,} jobs were stored before)") from error

    def _every(self, schedule: float | str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
               ) -> Schedule:
        bad = [name for name in ("delay", "run_at", "parent", "connection") if name in options]
        if bad:
            raise TypeError(f"{bad[0]} is no option of a schedule")
        new = self._submission(fn, {**options, "parent": None})
        new.args, new.kwargs = (encode(given, f"the arguments of {new.name}") if given else None for given in (args, kwargs))
        if not isinstance(schedule, str):
            schedule = _period(schedule) if _are_seconds([schedule]) else _short(schedule)
        tz = options.get("tz", _registry.declared.get(fn, {}).get("tz"))
        zone = zone_of(tz)[1]
        schedule_of(schedule, zone)
        arguments = f"{new.args or ''}{new.kwargs or ''}"
        if '"secret"' in (new.options or ""):
            import hashlib
            arguments = hashlib.sha256(arguments.encode()).hexdigest()
        key = new.key or f"{new.name}({arguments})"
        if len(key) > 500:
            raise ValueError(f"the arguments of {new.name} are too long to know its schedule by; give it a key")
        known = self._schedules.setdefault(key, (schedule, zone, new.name, arguments))
        if known != (schedule, zone, new.name, arguments):
            what = f"the key {key!r} is taken by {known[2]}" if new.key else f"{new.name} with these arguments is scheduled already"
            raise ValueError(f"{what}, {known[0]}; give each schedule a key of its own")
        schedule_id = self._store.write(lambda tx: tx.register(key, schedule, zone, new, self._id))
        if self._started:
            self._ensure_service()
        return Schedule(self, schedule_id)

    def schedules(self, system: bool = False) -> list[Schedule]:
        """Return the schedules in the file, also those that no code has any more. system=True adds those of the library."""
        return [Schedule(self, row["id"]) for row in self._store.read(SCHEDULES) if system or not row["system"]]

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
        new.name = given.get("name", new.name)
        if "name" in given:
            _registry.by_name.setdefault(new.name, fn)
        new.key = given.get("key")
        for name in ("label", "run_by"):
            value = given.get(name)
            setattr(new, name, None if value is None else _text(value, 500))
        new.low_priority = int(given["low_priority"]) if "low_priority" in given else None
        new.system = int(given.get("system", False))
        new.max_running = given.get("max_running")
        if "run_at" in given:
            new.run_at = _unix(given["run_at"])
        elif given.get("delay"):
            new.run_at = self._clock() + given["delay"]
        kept = {name: given[name] for name in _KEPT if name in given}
        if "backoff" in given:
            kept["backoff"] = _backoff_list(given["backoff"], given.get("retries", 0))
        if "secret" in kept:
            kept["secret"] = _secret_places(fn, kept["secret"])
        if kept:
            new.options = json.dumps(kept, separators=(",", ":"))
        parent = given.get("parent")
        if parent is not None:
            if parent._runner is not self and os.path.realpath(parent._runner.path) != os.path.realpath(self.path):
                raise ValueError(f"{parent!r} is in {parent._runner.path}; it takes no children from {self.path}")
            new.parent_id = parent.id
            running = self._attempts.get(parent.id)
            if running is not None:
                running.has_children = True

    def _begin(self, tx: Transaction) -> None:
        """Begin a transaction with the log lines that wait, and the starts to count: they come before the operations and outcomes in it."""
        taken, begun = self._lines_taken, self._begun_taken      # the last transaction may have failed with some
        while self._lines and len(taken) < LINES_A_WRITE:
            taken.append(self._lines.popleft())
        while self._begun:
            begun.append(self._begun.popleft())
        if taken:
            lines = [line for line in taken if len(line) > 1]
            try:
                tx.execute(INSERT_LINES, {"lines": _dump(lines)})
            except (TypeError, ValueError, sqlite3.DataError, sqlite3.IntegrityError):      # the lines' trouble, not the disk's
                self._lines_dropped += len(lines)
                taken.clear()
            ended = {line[0] for line in taken if len(line) == 1}
            for job_id in {line[0] for line in taken}:
                attempt = self._attempts.get(job_id)
                if job_id in ended or attempt is not None and attempt.lines - attempt.lines_at_trim > LINES_A_JOB // 10:
                    if attempt is not None:
                        attempt.lines_at_trim = attempt.lines
                    tx.execute(TRIM_LOG, {"id": job_id, "keep": LINES_A_JOB})
        for name, waited in begun:
            tx.count_start(name, waited)
        if taken or begun:
            tx.after_commit.append(lambda: (taken.clear(), begun.clear()))

    def _ride(self, tx: Transaction, kicked: bool) -> None:
        """Take what waits into a transaction: outcomes of attempts, and claims for free places."""
        if self._pool.lingers and not kicked:
            return                                       # a worker is about to do so, for more at a time
        again = self._settling                           # the last transaction failed with these
        ended = self._settling = again + list(self._ended)     # in both for a moment, rather than in neither, if Ctrl-C comes
        for _ in range(len(ended) - len(again)):
            self._ended.popleft()
        if again:
            for attempt in ended:
                self._finish_with_care(tx, attempt)
        elif ended:
            tx.finish(ended)
        claims: list[Attempt] = []
        if self._started and not self._shut_claims:
            claims = self._claim(tx)
        if tx.parked >= PARKED_A_CLAIM:
            tx.after_commit.append(self._store.kick)     # what is behind them has its turn next
        if ended or claims:
            tx.after_commit.append(lambda: self._committed(claims))

    def _finish_with_care(self, tx: Transaction, attempt: Attempt) -> None:
        """Record one outcome; one that cannot be recorded becomes a failure, so that it holds nobody else up."""
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
        self._backlog = len(rows) >= free or low_free <= 0
        return [self._attempt(row) for row in rows]

    def _attempt(self, claim: tuple[Any, ...]) -> Attempt:
        name, options, system = claim[3], claim[9], claim[20]
        engine = self._engine_for(name, options) if (self._executor is not None or _registry.has_executors) and not system \
            or options and '"isolate":true' in options else None
        return Attempt(self, claim) if engine is None else Departed(self, claim, engine)

    def _engine_for(self, name: str, options: str | None = None) -> Engine | None:
        """Return what executes the jobs of this name, or None: the threads of this process."""
        if options and '"isolate":true' in options:
            executor: Any = IsolatedProcesses
        else:
            function = _registry.find(name)
            executor = _registry.declared.get(function, {}).get("executor", self._executor) if function is not None else None
        if executor is None:
            return None
        return self._engines.get(id(executor)) or self._engines.setdefault(id(executor), Engine(executor))

    def _committed(self, claims: list[Attempt]) -> None:
        """After a commit of what rode along: forget it, and hand the claims out. Runs in the leading thread."""
        for attempt in self._settling:
            if self._attempts.get(attempt.id) is attempt:
                del self._attempts[attempt.id]
        self._settling = []
        if claims:
            for attempt in claims:
                superseded = self._attempts.get(attempt.id)
                self._attempts[attempt.id] = attempt
                if superseded is not None:                # by another process, and resumed: nobody here has noticed yet
                    self._abandon(superseded)
            self._pool.put(claims, sum(self._costs.means.get(attempt.name, math.inf) for attempt in claims))

    def _announce(self, tx: Transaction) -> None:
        """After any commit: tell who waits for what has ended. Runs in the leading thread."""
        for name, seconds in tx.trees:
            self._costs.record_tree(name, seconds)
        if tx.over and self._watched:
            self._complete_handles(tx.over)
        if tx.over and self._waiting_for_over:
            with self._over:
                self._over.notify_all()

    def _execute(self, attempt: Attempt) -> None:
        """Run one attempt's function in this thread, if it is not to stop already. Never raises."""
        if not attempt.stop_requested:
            self._perform(attempt)

    def _perform(self, attempt: Attempt) -> None:
        attempt.begun = time.monotonic()
        if self._inline and attempt.options.get("timeout"):
            self._ensure_service()
        attempt.thread = attempt.ticket.thread = threading.get_ident()
        around, _here.ticket = _here.ticket, attempt.ticket
        try:
            function = _registry.find(attempt.name)
            if function is None:
                attempt.outcome = UNKNOWN
            else:
                if attempt.due is not None and not attempt.system:
                    self._begun.append((attempt.name, max(0.0, self._clock() - attempt.due)))
                try:
                    value = contextvars.Context().run(self._call, attempt, function)
                finally:
                    attempt.ticket.keep()                 # a force stop raises nothing here any more
                attempt.result = None if value is None else self._encoded_result(attempt, value)
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

    def _roll_back(self, attempt: Attempt) -> None:
        """Roll back what an attempt has left open on connections of its thread: the locks would keep its outcome from being
        recorded. A connection that other threads may use is theirs."""
        for connection, job_id in attempt.connections.items():
            with contextlib.suppress(sqlite3.Error, StoreError):
                if connection.in_transaction and not is_shared(connection):
                    # With autocommit=False a transaction is always open.
                    lost = getattr(connection, "autocommit", True) is not False or not self._store.read(STATUS_OF, {"id": job_id})
                    connection.rollback()
                    if lost:
                        _say(logging.WARNING, f"job {attempt.id} ({attempt.name}) ended within a transaction of its own: rolled back")
        attempt.connections = {}

    @staticmethod
    def _encoded_result(attempt: Attempt, value: Any) -> str:
        try:
            return encode(value, "the result")
        except BaseException as error:                    # whatever the value's own methods raise
            raise TypeError(f"{attempt.name} returned, but {_text(error)}") from None

    @staticmethod
    def _call(attempt: Attempt, function: Callable[..., Any]) -> Any:
        _current.set(attempt)
        if "unreadable" in attempt.options:
            raise StoreError(f"the options of job {attempt.id} cannot be read: {attempt.options['unreadable']}")
        try:
            args = decode(attempt.args) if attempt.args else ()
            kwargs = decode(attempt.kwargs) if attempt.kwargs else {}
        except Exception as error:
            raise StoreError(f"the arguments of job {attempt.id} cannot be read: {_text(error)}") from error
        attempt.ticket.put_back()
        value = function(*args, **kwargs)
        if isinstance(value, types.CoroutineType):
            import asyncio
            return asyncio.run(value)
        return value

    def _settle(self, attempt: Attempt) -> bool:
        """Have an ended attempt recorded. True: now, since somebody waits for it, or its place for a job that is ready; else it
        happens within SETTLE_SECONDS, with what else is written then."""
        try:
            if attempt.exception is not None and not attempt.ticket.void:
                self._remember_exception(attempt)
            attempt.unsaved_progress = attempt.report_to_save() if attempt.outcome != RETURNED else None
        except BaseException as error:                    # whatever it is, the job ends and the worker goes on
            attempt.fail(error)
        if attempt.lines > LINES_A_JOB // 10:
            self._lines.append((attempt.id,))            # behind its last line: the log is trimmed
        now = time.monotonic()
        if not self._ended:
            self._ended_at = now
        self._ended.append(attempt)
        if attempt.id in self._watched or attempt.has_children or attempt.parent_id is not None and self._watched \
                or self._backlog and self._pool.is_empty \
                or now - self._ended_at > SETTLE_SECONDS and not self._store.leading:
            return True
        if self._service is not None:
            self._service.nudge_soon()
        return False

    def _remember_exception(self, attempt: Attempt) -> None:
        error = attempt.exception
        traceback.clear_frames(_frames_of(error))         # keeps the lines, not what the function held
        self._exceptions[attempt.id] = attempt.number, error
        if len(self._exceptions) > MEMORY_OF_EXCEPTIONS:
            self._exceptions.popitem(last=False)

    @library_code
    def _keep_log_line(self, attempt: Attempt, record: logging.LogRecord) -> None:
        """Take a log record into the job's log; written with the next transaction, within a second."""
        if self._attempts.get(attempt.id) is not attempt:
            return                                        # superseded
        if len(self._lines) >= LINES_A_WRITE and self._inline:
            self._store.kick()                            # nobody else writes them
        if len(self._lines) >= LOG_BUFFER:
            self._lines_dropped += 1
            return
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += "\n" + _traceback_of(record.exc_info[1])
        except Exception as error:
            message = f"{_short(record.msg)} could not be formatted: {_text(error)}"
        at = record.created if self._clock is time.time and _is_number(record.created) else self._clock()
        level = record.levelno if isinstance(record.levelno, int) and abs(record.levelno) < 1 << 31 else logging.NOTSET
        attempt.lines += 1
        self._lines.append((attempt.id, at, level, _text(message).replace("\0", "\\0"), attempt.number))

    # reading and operating

    def get(self, job_id: int) -> Job:
        """Return the handle of a job. KeyError: there is none with this id."""
        if isinstance(job_id, bool) or not isinstance(job_id, int):
            raise TypeError(f"a job id is an int, got {_short(job_id)}")
        if not 0 < job_id < 1 << 63:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        self._status(job_id)
        return Job(self, job_id)

    def jobs(self, *, limit: int | None = 100, before: int | None = None, **filters: Any) -> list[Job]:
        """Return the jobs that pass the filters, newest first: status= name= run_by= errors= low_priority= q= parent= system=
        created_from= created_to= (see `conditions`), with ids below `before`; all of them with limit=None. ValueError: a bad value."""
        _check_limit(limit)
        return [Job(self, row["id"]) for row in self._store.find(filters, -1 if limit is None else limit, before)]

    def _status(self, job_id: int) -> str:
        rows = self._store.read(STATUS_OF, {"id": job_id})
        if not rows:
            raise KeyError(f"there is no job {job_id} in {self.path}")
        return rows[0][0]

    def _info(self, job_id: int) -> dict[str, Any]:
        try:
            return describe(self._store.row(job_id), self._clock(), self._usual)
        except KeyError:
            raise KeyError(f"there is no job {job_id} in {self.path}") from None

    def _attempts_of(self, job_id: int) -> dict[str, Any]:
        """Return what is known of a job's attempts, oldest first, and the saved positions of its each() loops, outermost first.
        The last attempt is told by the job itself, unless something followed."""
        row = self._store.row(job_id)
        kept = [dict(each) for each in self._store.read(ATTEMPTS, {"id": job_id})]
        if row["attempt"] and not (kept and kept[-1]["attempt"] == row["attempt"]):
            is_active = row["status"] in ACTIVE and not row["returned"]
            kept.append({"attempt": row["attempt"], "started_at": row["since"] if is_active else row["started_at"],
                         "ended_at": row["finished_at"], "outcome": row["status"] if row["status"] in OVER else None, "error": None})
        return {"attempts": kept, "positions": (_parse(row["positions"]) if row["positions"] else None) or []}

    def _usual(self, name: str) -> float | None:
        """Return how many seconds jobs of this name have taken lately, here or in another process."""
        if name in self._costs.changed:
            return self._costs.trees.get(name, self._costs.means.get(name))
        rows = self._store.read(MEAN_OF, {"name": name})
        return rows[0][0] if rows else None

    def _logs(self, job_id: int, level: str | int | None, text: str | None, since: float | None, until: float | None,
              after: int, limit: int | None, tree: bool, regex: str | None = None) -> list[dict[str, Any]]:
        if regex is not None:
            import re
            try:
                re.compile(regex)
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                raise ValueError(f"regex {_short(regex)} is no regular expression: {error}") from None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text must be a text or None, got {_short(text)}")
        _check_limit(limit)
        if isinstance(level, str):
            number = int(level) if level.isdecimal() else logging.getLevelName(level.upper())
            if not isinstance(number, int):
                raise ValueError(f"level must be DEBUG, INFO, WARNING, ERROR, CRITICAL or a number, got {_short(level)}")
            level = number
        if (self._lines or self._lines_taken) and not self._store.closed:
            for _ in range(len(self._lines) // LINES_A_WRITE + 1):
                self._store.write(_do_nothing)            # who asks sees what was logged by now
        return self._store.logs(job_id, level=level or 0, text=text, regex=regex, since=since or 0.0,
                                until=math.inf if until is None else until, after=after or 0, limit=limit, tree=tree)

    @library_code
    def _operate(self, operation: str, job_id: int, by: str | None, handle: Job | None = None) -> Job:
        if not 0 < job_id < 1 << 63:
            raise KeyError(f"there is no job {job_id} in {self.path}")
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
        except KeyError:
            raise KeyError(f"there is no job {job_id} in {self.path}") from None
        finally:
            passed.set()
        if operation == "restart" or handle is None or operation == "resume" and handle._state != "PENDING":
            return Job(self, job_id)
        return handle

    def _time_out(self) -> None:
        """Stop the attempts that take longer than their timeout; what reaches no checkpoint then fails without its consent."""
        now = time.monotonic()
        timed = [attempt for attempt in list(self._attempts.values()) if attempt.thread is not None and attempt.options.get("timeout")]
        for attempt in timed:
            late = now - attempt.begun - attempt.options["timeout"]
            if late > GRACE_SECONDS and attempt.reason == TIMED_OUT:
                self._store.write(lambda tx: self._fail_late(tx, attempt))
            elif late > 0 and attempt.reason == HALTED:
                attempt.request_stop(TIMED_OUT, force=True)

    def _fail_late(self, tx: Transaction, attempt: Attempt) -> None:
        """Record the failure of an attempt that still executes."""
        lost = copy.copy(attempt)
        lost.ran = time.monotonic() - attempt.begun
        lost.worked = max(0.0, lost.ran - lost.waited)
        lost.fail(attempt.took_too_long)
        if tx.finish_superseded(lost):
            self._remember_exception(lost)
            tx.after_commit.append(lambda: self._abandon(attempt))

    def _tell_attempts(self, operation: str, job_ids: Iterable[int]) -> None:
        """After the commit of an operation: carry it out on what executes here. Runs in the leading thread, before any of these
        jobs can be claimed again."""
        for attempt in filter(None, map(self._attempts.get, job_ids)):
            if operation == "stop":
                attempt.request_stop()
            elif operation == "force_stop":
                self._abandon(attempt)
            elif operation.endswith("low_priority"):
                self._pool.set_low_priority(attempt, int(operation == "set_low_priority"))
                self._store.kick()                        # it may have left a place to another of low priority

    def _abandon(self, attempt: Attempt) -> None:
        """Be done with an attempt that has been superseded in the store: stop it wherever it is, and fill its place."""
        if self._attempts.get(attempt.id) is attempt:
            del self._attempts[attempt.id]
        attempt.supersede()
        self._pool.abandon(attempt)

    # waiting

    @library_code
    def _watch(self, handle: Job) -> None:
        """Complete this handle when its job is over, whichever process runs it."""
        with self._handle_lock:
            self._watched.setdefault(handle.id, []).append(weakref.ref(handle))
        self._ensure_service()
        if self._ended and not self._store.closed:
            self._store.kick()                            # its outcome may be among those that wait for company
        with contextlib.suppress(KeyError):
            handle._look()                                # it may have ended before it was watched

    def _hold(self, handle: Job) -> None:
        with self._handle_lock:
            self._held.add(handle)

    def _call_back(self, handle: Job) -> None:
        """Have the callbacks of a completed handle called, outside of any transaction and any job's context."""
        if handle._done_callbacks:
            with self._handle_lock:
                self._callbacks_left += 1
                if self._callback_thread is None:
                    self._callback_thread = threading.Thread(target=self._run_callbacks, name="bgjobs-callbacks", daemon=True)
                    self._callback_thread.start()
            self._to_call_back.put(handle)
        with self._handle_lock:
            self._held.discard(handle)

    def _run_callbacks(self) -> None:
        while (handle := self._to_call_back.get()) is not None:
            try:
                contextvars.Context().run(handle._invoke_callbacks)
            except BaseException:
                _log.exception("a callback of job %d failed", handle.id)
            del handle
            with self._handle_lock:
                self._callbacks_left -= 1
        self._callback_thread = None

    def _complete_handles(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            references = list(self._watched.get(job_id, ()))
            if not references:
                continue
            for reference in references:
                handle = reference()
                if handle is not None:
                    try:
                        handle._complete()
                    except Exception as error:            # others' ends are told; the service thread looks again
                        self._ends_missed = True
                        self._store.complain(_text(error))
            with self._handle_lock:                       # those stay that another process has resumed meanwhile
                left = [r for r in self._watched.get(job_id, ()) if (handle := r()) is not None and handle._state == "PENDING"]
                if left:
                    self._watched[job_id] = left
                else:
                    self._watched.pop(job_id, None)

    def _watched_now(self) -> list[int]:
        """Return the ids of the jobs whose end somebody wants to know; forget those whose handles nobody has any more."""
        with self._handle_lock:
            for job_id in [i for i, references in self._watched.items() if all(r() is None for r in references)]:
                del self._watched[job_id]
            return list(self._watched)

    def _look_after_watched(self) -> None:
        """Complete the handles whose jobs other processes have ended."""
        self._ends_missed = False
        watched = self._watched_now()
        for start in range(0, len(watched), 500):
            some = ",".join(map(str, watched[start:start + 500]))
            going_on = {row[0] for row in self._store.read(f"SELECT id FROM bgjobs_jobs WHERE id IN ({some}) AND status IN "
                                                           f"('pending', 'running', 'stopping', 'stopped')")}
            self._complete_handles([job_id for job_id in watched[start:start + 500] if job_id not in going_on])

    def _wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool], timeout: float | None) -> bool:
        """Wait in a job of this runner, its worker's place given away. In `drain` the jobs waited for run here."""
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
                raise RuntimeError(f"job {attempt.id} waits for what is not due yet, and the clock of this runner stands")
            self._look_after_watched()
            wait(0.01)
        attempt.waited += time.monotonic() - begun
        return True

    def _exception_of(self, job_id: int, row: sqlite3.Row) -> BaseException:
        number, own = self._exceptions.get(job_id, (0, None))
        if own is not None and number == row["attempt"]:
            return own
        error = json.loads(row["error"]) if row["error"] else {"type": "", "text": "", "traceback": ""}
        return JobFailed(f"job {job_id} ({row['name']})", error["type"], error["text"], error["traceback"])

    # starting and going down

    @library_code
    def start(self) -> Runner:
        """Take back what a dead process left behind, and begin to run jobs. Returns the runner.

        In a forked child it opens the file anew first. In the process of an isolated attempt, whose function's modules may call it,
        it does nothing.
        """
        if _serves_attempts:
            return self
        if self._store.forked:
            self._open()
        if self._shut:
            raise RuntimeError(f"the runner on {self.path} is shut down; make a new one")
        if not self._started:
            _capture_log_records()
            self._recover_dead()
            self._started = True
            if self._retention is not None:
                options = {"key": "bgjobs.housekeeping", "system": True, "label": "Housekeeping: remove what is over for long"}
                self._every("1h", housekeeping, (), self._retention, options)
            self._ensure_service()
            self._store.kick()
        return self

    def backup(self, path: str | os.PathLike[str]) -> str:
        """Copy the job file as it is at this moment to a new file, while it is in use; return its path. (A plain copy would miss
        what is in the -wal file, or tear a transaction.) ValueError: the path exists."""
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
        self._store.write(lambda tx: tx.clock_was_set_back())    # a clock for tests may have been
        self._inline, ran = True, 0
        try:
            while self._run_one():
                ran += 1
        finally:
            self._inline = False
        return ran

    def _run_one(self) -> bool:
        def claim(tx: Transaction) -> list[tuple[Any, ...]]:
            tx.run_schedules()
            tx.wake_due()
            return tx.claim(self._id, 1, 1, 0, 0.0, 1, self._costs)
        rows = self._store.write(claim)
        for row in rows:
            attempt = self._attempts[row[0]] = Attempt(self, row)
            self._execute(attempt)
            self._settle(attempt)
            self._store.kick()
            self._flush_progress()
        return bool(rows)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs. wait=True: return when no job submitted through this runner, nor a descendant of one, is
        ready or running; then close. cancel_futures: cancel those that are pending."""
        with contextlib.suppress(StoreError):
            self._shut = True
            if cancel_futures:
                self._cancel_pending()
            if not self._started:
                self.close()
            elif wait:
                self._wait_for_own()
                while self._callbacks_left and threading.current_thread() is not self._callback_thread:
                    time.sleep(0.002)
                self.close()
            else:
                threading.Thread(target=lambda: self.shutdown(), name="bgjobs-shutdown", daemon=True).start()

    def _cancel_pending(self) -> None:
        after = 0
        while True:
            rows = self._store.read(MY_PENDING, {"submitter": self._id, "after": after})
            for row in rows:
                with contextlib.suppress(InvalidOperation, KeyError):
                    self._operate("cancel", row["id"], None)
            if len(rows) < 500:
                return
            after = rows[-1]["id"]

    def _wait_for_own(self) -> None:
        """Wait until nothing that was submitted through this runner is ready or running."""
        self._waiting_for_over += 1
        try:
            after = self._first_id
            while self._has_submitted:
                parameters = {"submitter": self._id, "after": after}
                found = [row["id"] for sql in UNFINISHED_QUERIES for row in self._store.read(sql, parameters)]
                if not found and after == self._first_id:
                    return
                if found:
                    after = min(found)
                    with self._over:
                        self._over.wait(0.05)
                else:
                    after = self._first_id                # once more from the start: an older one may have been resumed
        finally:
            self._waiting_for_over -= 1

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
            except KeyboardInterrupt:                              # another Ctrl-C: wait no longer
                for runner in list(_living):
                    runner._store.close_by = 0.0
            finally:
                self._close_lock.release()

    def _time_to_close(self, extra: float, most: float) -> float:
        """Return the seconds that are left while going down: `extra` more than what running jobs get, and `most` in any case."""
        return max(0.0, min(most, self._store.close_by + extra - time.monotonic()))

    def _pause(self) -> None:
        """Claim nothing more, and ask what runs to pause at its next checkpoint."""
        self._shut = self._shut_claims = True
        for attempt in list(self._attempts.values()):
            attempt.request_stop(RELEASED)

    def _close(self) -> None:
        self._pause()
        with contextlib.suppress(StoreError):
            self._store.write(_do_nothing)            # who leads now may be claiming still: after this nobody is
        self._ended.extend(self._pool.take_back())
        self._pause()
        with contextlib.suppress(StoreError):
            self._store.kick()
            while self._attempts and time.monotonic() < self._store.close_by:
                time.sleep(0.005)
            self._flush_progress()
        means = self._costs.take_changed()

        def leave(tx: Transaction) -> None:
            self._release(tx, "its process was closed", lambda job_id: False)
            tx.executemany(SAVE_COST, means)
            tx.remove_runner(self._id)
        self._store.close(leave)
        self._callback.close()
        for engine in self._engines.values():
            engine.close()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        _presence().vanish(self.path, self._id)
        if self._service is not None:
            self._service.end(self._time_to_close(0.8, 1.0))
        self._pool.close(self._time_to_close(0.8, 0.2))
        self._held.clear()                                # whose jobs are not over: nobody waits here for what others do
        self._to_call_back.put(None)

    def _release(self, tx: Transaction, why: str, keep: Callable[[int], bool]) -> None:
        """Make jobs pending again that this runner has claimed, but those to keep; their attempts are superseded."""
        for row in tx.execute(OWNED, {"owner": self._id}).fetchall():
            if not keep(row[0]):
                tx.take_back(row, why, tx.now)

    def _release_lost(self) -> None:
        """Make jobs pending again that were claimed and never reached the pool: Ctrl-C came right after the commit."""
        def is_known(job_id: int) -> bool:
            attempt = self._attempts.get(job_id)
            return attempt is not None and (time.monotonic() - attempt.claimed_at < 1.0 or self._pool.has(attempt)
                                            or attempt in self._ended or attempt in self._settling)

        def release(tx: Transaction) -> None:             # while this thread leads, no outcome is on its way elsewhere
            self._release(tx, "its claim was lost", is_known)
            tx.after_commit.append(lambda: [self._abandon(attempt) for attempt in list(self._attempts.values())
                                            if not is_known(attempt.id)])
        if not all(is_known(row["id"]) for row in self._store.read(OWNED, {"owner": self._id})):
            self._store.write(release)

    def __exit__(self, *exc_info: Any) -> None:
        self.shutdown(wait=True)

    # what comes by the clock, or from other processes: called by the service thread

    def _ensure_service(self) -> None:
        with self._handle_lock:
            if self._service is None or not self._service.alive:
                self._service = _Service(self)

    def _nudge_service(self) -> None:
        if self._service is not None:
            self._service.nudge_soon()

    def _heed_operations(self) -> None:
        """Tell attempts of this process what other processes did to their jobs."""
        attempts = list(self._attempts.values())
        if not attempts:
            return
        owned = {row["id"]: row for row in self._store.read(OWNED, {"owner": self._id})}
        superseded = []
        for attempt in attempts:
            row = owned.get(attempt.id)
            if row is None or row["attempt"] != attempt.number:
                superseded.append(attempt)
            elif row["status"] == STOPPING:
                attempt.request_stop()
            elif row["low_priority"] != attempt.low_priority:
                self._pool.set_low_priority(attempt, row["low_priority"])
        if superseded:
            def abandon() -> None:                        # in the leading thread, the only one to change _attempts
                for attempt in superseded:
                    if self._attempts.get(attempt.id) is attempt and attempt not in self._ended:
                        self._abandon(attempt)
            self._store.write(lambda tx: tx.after_commit.append(abandon))

    def _flush_progress(self) -> None:
        changed = [(attempt, new) for attempt in list(self._attempts.values()) if attempt.thread is not None
                   for new in [attempt.report_to_save()] if new is not None]
        if changed or self._lines or self._begun:
            def save(tx: Transaction) -> None:
                for attempt, report in changed:
                    tx.save_progress(attempt, report)
            self._store.write(save)
            while len(self._lines) >= LINES_A_WRITE:
                self._store.write(_do_nothing)        # they ride along
        dropped, self._lines_dropped = self._lines_dropped, 0
        if dropped:
            _say(logging.WARNING, f"{dropped:,} log lines of jobs were dropped: they came faster than the disk takes them, or could not "
                 "be stored")

    def _charge_long_ones(self) -> None:
        """Charge attempts that run longer than estimated, so that their roots do not look idle."""
        now, more = time.monotonic(), []
        for attempt in list(self._attempts.values()):
            if attempt.thread is not None:
                excess = int((now - attempt.begun - attempt.waited) * 1e6) - attempt.charge
                if excess > 100_000:
                    more.append((attempt, excess))
        if more:
            self._store.write(lambda tx: [tx.add_charge(attempt, excess) for attempt, excess in more])

    def _recover_dead(self) -> None:
        """Take the jobs of dead processes back."""
        presence = _presence()
        if presence.reassert(self.path):
            self._store.write(lambda tx: self._save_runner(tx, self._id, self._pool.abandoned))
        lock_file, now = presence.file_id(self.path), self._clock()
        # Where the lock file is another than the one a runner wrote down, it tells nothing, before that had the time to notice.
        judged = {row[0] for row in self._store.read(LOCK_FILES)
                  if row[1] in (None, lock_file) or now - row[2] > 3 * HEARTBEAT_SECONDS}
        judged.update(row[0] for row in self._store.read(ORPHANED))
        for runner in [runner for runner in judged - {self._id} if presence.is_dead(self.path, runner)]:
            taken = self._store.write(lambda tx: tx.recover(runner))
            if taken:
                _say(logging.WARNING, f"took back {taken:,} jobs of a process that died")

    def _return_stuck_claims(self) -> None:
        """Give claimed jobs back that wait behind attempts which turned out long."""
        stuck = self._pool.take_back_stuck()
        if stuck:
            self._ended.extend(stuck)
            self._store.kick()

    def _unpark(self) -> None:
        """Make ready what this process knows the function of; and what a limit holds up, in case its end went unnoticed."""
        for (key,) in self._store.read(PARKED_KEYS):
            kind, _, name = key.partition(" ")
            if kind != "function":
                self._store.write(lambda tx: tx.unpark_next(key))
            elif _registry.find(name) is not None and not ((engine := self._engine_for(name)) and engine.is_broken):
                while self._store.write(lambda tx: tx.unpark(key)):
                    pass

    # retention

    def prune(self, finished: float = RETENTION["finished"], failed: float = RETENTION["failed"]) -> int:
        """Remove whole trees that are over for so many seconds (cancelled ones as finished), with their logs; return how many
        jobs that were. In many short transactions; in a job each is followed by a checkpoint."""
        if not _are_seconds([finished, failed]):
            raise ValueError(f"finished and failed are seconds, 0 or more, got {_short((finished, failed))}")
        now, removed = self._clock(), 0
        before = {"finished": now - finished, "failed": now - failed}
        for after in reversed(range(0, self._store.read(HIGHEST_ID)[0][0], PRUNE_IDS)):      # a root goes after its descendants
            ids = {"after": after, "until": after + PRUNE_IDS}
            if self._store.read(EXPIRED + " LIMIT 1", {**ids, **before}):
                removed += self._store.write(lambda tx: tx.prune(**ids, **before))
            current_job().checkpoint()
        return removed

    def _fold_statistics(self) -> None:
        """Keep the statistics of each window by its parts once they have left the shorter one, and after the longest only sums."""
        minute = int(self._clock() // 60)
        for (count, step), (_, next_step) in itertools.pairwise(WINDOWS.values()):
            last = (minute - (count + 1) * step) // next_step * next_step - 1
            self._store.write(lambda tx: tx.fold_statistics(f"minute / {next_step} * {next_step}", last))
        self._store.write(lambda tx: tx.fold_statistics("0", minute - 31 * 1_440))

    # statistics

    def stats(self, window: str = "24h", name: str | None = None) -> dict[str, Any]:
        """Return what was counted in a window: "1h", "24h", "7d" or "30d", of all functions or of one; system jobs are not.

        {"window", "name", "from", "to", "parts": [{"at", "created", "started", "finished", "failed", "waiting", "running"}],
        "total": the same over all parts, "functions": [the same for each "name"]}. from, to and at are Unix seconds. waiting,
        from its creation or due time to a job's start, and running, until its end, are {"avg", "min", "max"} in seconds, or None.
        """
        if not isinstance(window, str) or window not in WINDOWS:
            raise ValueError(f"window must be {', '.join(WINDOWS)}, got {_short(window)}")
        count, step = WINDOWS[window]
        last = int(self._clock() // 60)
        first = (last // step - count + 1) * step
        bounds = {"first": first, "last": last, "name": name}
        self._count_created()

        def sums(by: str) -> dict[Any, sqlite3.Row]:
            return {row["part"]: row for row in self._store.read(STATS.format(by=by), bounds)}
        parts, functions = sums(f"minute / {step}"), sums("name")
        return {"window": window, "name": name, "from": first * 60, "to": (last + 1) * 60,
                "parts": [{"at": part * step * 60, **_counted(parts.get(part))} for part in range(first // step, last // step + 1)],
                "total": _counted(sums("NULL").get(None)),
                "functions": [{"name": name, **_counted(row)} for name, row in functions.items()]}

    def _count_created(self) -> None:
        if self._begun or self._store.read(UNCOUNTED):
            self._store.write(lambda tx: tx.count_created())

    def _metrics(self) -> str:
        """Return counters and gauges in the text format of Prometheus, version 0.0.4."""
        lines = []

        def metric(name: str, kind: str, help: str, values: Iterable[tuple[str, float]]) -> None:
            lines.extend([f"# HELP bgjobs_{name} {help}", f"# TYPE bgjobs_{name} {kind}"])
            lines.extend(f"bgjobs_{name}{labels} {value!r}" for labels, value in values)

        def label(name: str, value: str) -> str:
            escaped = value.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")
            return f'{{{name}="{escaped}"}}'
        metric("jobs", "gauge", f"Jobs by status, counted up to {COUNT_LIMIT - 1:,}.",
               [(label("status", status), count) for status, count in self._store.counts({"system": True}).items()])
        self._count_created()
        functions = self._store.read(STATS.format(by="name"), {"first": 0, "last": 1 << 62, "name": None})
        for name, help in (("created", "Jobs submitted."), ("started", "Jobs started for the first time."),
                           ("finished", "Jobs finished."), ("failed", "Jobs failed for good."),
                           ("waiting", "Seconds from creation or due time to the start."), ("running", "Seconds that ended jobs ran.")):
            unit = "_seconds" if name in ("waiting", "running") else ""
            metric(f"{name}{unit}_total", "counter", help, [(label("function", row["part"]), row[name]) for row in functions])
        runners = self._store.read(RUNNERS)
        metric("runners", "gauge", "Processes that have the file open to run or submit jobs.", [("", len(runners))])
        metric("abandoned_threads", "gauge", "Threads of superseded attempts that live on.", [("", sum(row["abandoned"] for row in runners))])
        return "\n".join(lines) + "\n"

    # the page

    def serve(self, host: str = "127.0.0.1", port: int = 8765, **options: Any) -> str:
        """Serve the status page in a thread of its own; return its URL. port=0 takes a free one.

        read_only=True: without operations. password: asked for by the browser (HTTP Basic, which TLS has to hide on its way
        through a network). authorize: a function of the request, its WSGI environ, that returns the user's name, or None for
        one who may not come; the job log's `by` has that name, or the one given with the password. hosts: the names by which it is
        reached, besides the machine's own and its addresses.
        ValueError: a host other than loopback without password or authorize. A port that is taken is a warning, and "" is
        returned: jobs go on.
        """
        return "" if _serves_attempts else serve_page(Page(self, **options), host, port)

    def wsgi(self, **options: Any) -> Page:
        """Return the status page as a WSGI app, to mount under any prefix of the app's own server.

        The options are those of `serve`. Without password and authorize, who may see it is up to the app; then hosts names what it
        answers to besides loopback (["example.org"]).
        """
        return Page(self, **options)


def _counted(row: sqlite3.Row | None) -> dict[str, Any]:
    """Return one row of STATS as the JSON interface has it."""
    if row is None or row["created"] is None:
        return {"created": 0, "started": 0, "finished": 0, "failed": 0, "waiting": None, "running": None}

    def measured(name: str, count: int) -> dict[str, float] | None:
        return {"avg": row[name] / count, "min": row[f"{name}_min"], "max": row[f"{name}_max"]} if count > 0 else None
    return {**{name: row[name] for name in ("created", "started", "finished", "failed")},
            "waiting": measured("waiting", row["started"]), "running": measured("running", row["finished"] + row["failed"])}


def _check_limit(limit: Any) -> None:
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ValueError(f"limit must be a whole number, 0 or more, or None, got {_short(limit)}")


def _not_a_tuple(args: Any) -> tuple[Any, ...]:
    raise TypeError(f"submit_many takes tuples of arguments, got {_short(args)}; write (value,) for a single argument")


def _frames_of(error: BaseException) -> types.TracebackType | None:
    """Return error.__traceback__, whatever the exception's class has made of that."""
    return BaseException.__dict__["__traceback__"].__get__(error)


def _is_stop(error: BaseException) -> bool:
    """Tell whether an exception is JobStopped, or a group of nothing else, as asyncio.TaskGroup makes of it (since Python 3.11)."""
    group, errors = getattr(builtins, "BaseExceptionGroup", ()), [error]
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
        return f"{_type_name(error)} (its traceback cannot be printed)"


class _Service:
    """The thread that looks after what no caller brings: due times, other processes, log lines, progress, recovery."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._event = _Event()
        self._due_at: float | None = None                 # Unix seconds, as _clock_at
        self._clock_at = runner._clock()                  # what the clock showed when it was looked at last
        self._look_at_due = self._nudged = True
        self._soon = False
        self._seconds, self._version, self._flushed_at, self._half_second_at = 0.0, -1, 0.0, 0.0
        self._abandoned = 0
        self._thread = threading.Thread(target=self._run, name="bgjobs-service", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self, seconds: float) -> None:
        """Wait some seconds for the thread to end, unless it goes on watching handles for others; the store is closed."""
        self._event.set()
        if self._thread is not threading.current_thread() and not self._runner._watched_now():
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
            while not store.closed or runner._watched:
                self._event.wait(max(0.0, next_poll - time.monotonic()))
                self._event.clear()
                try:
                    if self._soon:
                        time.sleep(SETTLE_SECONDS)
                        self._soon, self._nudged = False, True
                    if self._nudged:
                        self._nudged = False
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
        """Look at what came by the clock and from others. `version` changes with every commit, this process's included."""
        runner, store, now = self._runner, self._runner._store, time.monotonic()
        changed, self._version = version != self._version, version
        if store.closed:
            runner._look_after_watched()
            return
        if changed and store.changed_by_others():
            runner._heed_operations()
            runner._look_after_watched()
            self._nudged = True
            self._event.set()
        if store.cut_short:
            store.cut_short, self._nudged, runner._ends_missed = False, True, True
            store.write(_do_nothing)                      # takes the lead over, should it be lost
            runner._heed_operations()
        if runner._ends_missed:
            runner._look_after_watched()
        self._look_at_due |= changed
        while not runner._to_cancel.empty():
            runner._to_cancel.get().cancel()
        if runner._started:
            self._wake_due()
        runner._pool.put()
        runner._return_stuck_claims()
        runner._time_out()
        if now - self._flushed_at >= FLUSH_SECONDS:
            self._flushed_at = now
            runner._flush_progress()
        if now - self._half_second_at >= 0.5 and runner._started:
            self._half_second_at = now
            self._every_half_second()

    def _wake_due(self) -> None:
        runner, before, self._clock_at = self._runner, self._clock_at, self._runner._clock()
        if self._clock_at < before - 1.0:
            runner._store.write(lambda tx: tx.clock_was_set_back())
            self._look_at_due = True
        if self._look_at_due:
            self._look_at_due = False
            due = [runner._store.read(sql)[0][0] for sql in (NEXT_DUE, NEXT_SCHEDULE)]
            self._due_at = min((at for at in due if at is not None), default=None)
        if self._due_at is not None and self._due_at <= self._clock_at:
            runner._store.write(lambda tx: (runner._shut or tx.run_schedules(), tx.wake_due()))
            self._look_at_due = True

    def _every_half_second(self) -> None:
        runner = self._runner
        self._seconds += 0.5
        runner._store.check_file()
        runner._recover_dead()
        if self._seconds % 1.0:
            return
        if self._seconds % 60 == 0:
            runner._store.shorten_wal()
            runner._count_created()
        abandoned = runner._pool.abandoned
        if self._seconds % HEARTBEAT_SECONDS == 0 or abandoned != self._abandoned:
            runner._store.write(lambda tx: runner._save_runner(tx, runner._id, abandoned))
            self._abandoned = abandoned
        if runner._costs.changed:
            means = runner._costs.take_changed()
            runner._store.write(lambda tx: tx.executemany(SAVE_COST, means))
        runner._charge_long_ones()
        runner._release_lost()
        runner._unpark()


class _Presence:
    """Tells which runners live, by locks of the operating system that die with their process.

    Byte N of PATH-bgjobs-lock is locked by the process of runner N. A process never asks for its own bytes: it would get
    them. So there is one descriptor for each file and process, shared by all copies of this module through sys.modules. POSIX locks
    would be dropped when the app closes any descriptor of the file (a copy of the folder does); those of Linux's open files
    are not, but a forked child has to close its copy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()                     # guards _files
        self._files: dict[str, tuple[int, set[int]]] = {}

    def leave_to_parent(self) -> None:
        """In a forked child: keep nothing locked."""
        for descriptor, _ in self._files.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._files = {}

    def _file(self, path: str) -> tuple[int, set[int]]:
        key = os.path.realpath(path)
        if key not in self._files:
            self._files[key] = (self._open(key), set())
        return self._files[key]

    @staticmethod
    def _open(path: str) -> int:
        """Open the lock file, which whoever may use the job file may use, too."""
        try:
            descriptor = os.open(path + "-bgjobs-lock", os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(OSError, AttributeError):    # it is another's, who has done so; Windows
                os.fchmod(descriptor, os.stat(path).st_mode & 0o777)
        except OSError as error:
            raise StoreError(f"cannot open {path}-bgjobs-lock, whose locks tell which processes live: {error.strerror}; make it and its "
                             "folder writable for all who use the job file") from error
        return descriptor

    def appear(self, path: str, runner: int) -> bool:
        """Take the lock of a runner of this process. False: another holds it."""
        with self._lock:
            descriptor, own = self._file(path)
            try:
                if runner in own or not _lock_byte(descriptor, runner):
                    return False
            except OSError as error:
                raise StoreError(f"cannot lock {path}-bgjobs-lock, which tells whether this process lives: {error.strerror}; put the "
                                 "job file on a local disk") from error
            own.add(runner)
            return True

    def file_id(self, path: str) -> str:
        """Return what tells the lock file from another one of its name."""
        with self._lock:
            found = os.fstat(self._file(path)[0])
            return f"{found.st_dev}:{found.st_ino}"

    def reassert(self, path: str) -> bool:
        """Take the locks of this process again: closing any descriptor of the file drops them, and it may have been deleted.
        True: it was, and they are on a new file now."""
        with self._lock:
            key, (descriptor, own) = os.path.realpath(path), self._file(path)
            if os.name == "nt":                               # neither can happen there
                return False
            try:
                lost = not os.path.samestat(os.stat(key + "-bgjobs-lock"), os.fstat(descriptor))
            except FileNotFoundError:
                lost = True
            if lost:
                fresh = self._open(key)
                os.close(descriptor)
                descriptor, self._files[key] = fresh, (fresh, own)
            for runner in own:
                _lock_byte(descriptor, runner)
            return lost

    def vanish(self, path: str, runner: int) -> None:
        """Give the lock of a runner of this process back."""
        with self._lock:
            descriptor, own = self._file(path)
            own.discard(runner)
            if own:
                _unlock_byte(descriptor, runner)
            else:
                os.close(descriptor)                      # drops the lock, too
                del self._files[os.path.realpath(path)]

    def is_dead(self, path: str, runner: int) -> bool:
        """Tell whether no process holds the lock of this runner."""
        with self._lock:
            descriptor, own = self._file(path)
            if runner in own or not _lock_byte(descriptor, runner):
                return False
            _unlock_byte(descriptor, runner)
            return True


def _lock_byte(descriptor: int, byte: int) -> bool:
    """Lock a byte of a file. False: another process has."""
    try:
        _set_lock(descriptor, byte, True)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock_byte(descriptor: int, byte: int) -> None:
    _set_lock(descriptor, byte, False)


def _set_lock(descriptor: int, byte: int, locked: bool) -> None:
    if os.name == "nt":
        import msvcrt
        os.lseek(descriptor, byte, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK if locked else msvcrt.LK_UNLCK, 1)    # type: ignore[attr-defined]
        return
    import fcntl
    import struct
    if hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("P") == 8:        # Linux: locks of the open file, not of the process
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK if locked else fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if locked else fcntl.LOCK_UN, 1, byte)


def _presence() -> _Presence:
    modules: dict[str, Any] = sys.modules
    return modules.get("_bgjobs_presence") or modules.setdefault("_bgjobs_presence", _Presence())


_living: weakref.WeakSet[Runner] = weakref.WeakSet()


def _live_until_exit(runner: Runner) -> None:
    """Close the runner when the interpreter exits, and leave it to the parent when the process forks."""
    _register_hooks()
    _living.add(runner)


@functools.cache
def _register_hooks() -> None:
    def close_all() -> None:
        close_by = time.monotonic() + GRACE_SECONDS       # one for all, also for a close() under way in another thread
        runners = [runner for runner in list(_living) if not runner._store.closed]
        for runner in runners:
            runner._store.close_by = min(runner._store.close_by, close_by)
            runner._pause()
        for runner in runners:
            try:
                runner._close_at_exit()
            except Exception as error:
                print(f"bgjobs: {error}", file=sys.stderr)
    atexit.register(close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_leave_to_parent)


_paused: list[Store] = []          # during a fork
_one_fork = threading.RLock()      # at a time


def _before_fork() -> None:
    _one_fork.acquire()
    _paused.extend(runner._store for runner in list(_living) if not runner._store.closed)
    for store in _paused:
        store.pause()
    _fork_gate.shut()                  # last: who leads a transaction may read


def _after_fork() -> None:
    _fork_gate.open()
    while _paused:
        _paused.pop().go_on()
    _one_fork.release()


def _leave_to_parent() -> None:
    global _default_lock, _fork_gate, _one_fork
    _default_lock, _fork_gate, _one_fork = threading.Lock(), _ForkGate(), threading.RLock()
    _paused.clear()
    _here.ticket = None
    inherited: Any = sys.modules.pop("_bgjobs_presence", None)
    if inherited is not None:
        inherited.leave_to_parent()
    _links.clear()
    for runner in list(_living):
        runner._leave_to_parent()


# ---- 18 Elsewhere ---------------------------------------------------------------------------------------------
#
# An attempt may execute in another process: one of its own (isolate=True), or wherever a concurrent.futures.Executor, the engine, takes
# it (executor=). The life of such an attempt:
#
#   1. Handed over. The engine gets one call, run_attempt(payload). The payload is a JSON text: the job, the import path of its function, the
#      address of the runner's callback, a port opened for the first such attempt, and a token for this attempt alone.
#   2. Hello. Each process has one connection to the callback, made for its first attempt. There the attempt says hello. If the engine
#      executes it twice, the first to do so is welcome. Now it has begun: its time runs, and its function is called.
#   3. It says and asks: states, progress, log lines, children. The runner tells it unasked when it is to stop, or is void (superseded).
#   4. Outcome. run_attempt returns it as a JSON text, and the engine's future brings it. The token is forgotten: what still comes with it is
#      refused as "gone".
#   5. Or loss. The engine's future brings an error: the attempt has failed, or is given back if it had not begun. A connection that
#      is lost is made again, and the calls without an answer are repeated; by its number, the runner carries each out once.
#      When it cannot be made for RETRY_SECONDS, the attempt stops at its next checkpoint.
#
# Lines of JSON go both ways:
#
#   there -> runner    [token, number, call, argument...]
#   runner -> there    [number, value], or [number, null, type of an error, its text]; unasked: [0, token, news, value]
#
# Hosts and guests. An attempt that waits for another job gives its place away, but the engine counts its process as taken. So the process
# executes what gets the place: the attempt says "leave", and is a host. The next attempt for this engine goes to a host, if there is
# one, as the news "run", with the payload that the engine would get. This guest runs in a thread of its own, says hello like any other, and
# "ended", with its outcome. When the host goes on it says "ask_back", which is answered as soon as it has a place. So that no job waits for
# a process in vain: an attempt without a place, and without a guest that has not ended, is always among the hosts; and a new host takes
# over what its engine has queued. That may begin in both places: the first to say hello executes it.

RETRY_SECONDS = 10.0               # that a lost connection is tried again, before both sides give up
STRANGER_SECONDS = 10.0            # in which a connection has to show a token
STRANGER_BYTES = 4_096             # that it may send before
TELL_SECONDS = 0.25                # between two reports of progress, log lines and positions
COLLECT_SECONDS = 0.0002           # for each attempt under way, that the states of others may wait for company in the next transaction;
COLLECT_AT_MOST = 0.02             # but no longer than this
BROKEN_SECONDS = 10.0              # until an executor that takes nothing is tried again
ONCE = ("submit", "operate", "leave", "ask_back", "ended")         # calls that must not be carried out again when they are repeated
REPLIES_KEPT = 100                 # of an attempt, for such repetitions
WARM_PROCESSES = 8                 # of isolated attempts, that wait for the next one


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


def _as_line(message: list[Any]) -> bytes:
    return _dump(message).encode() + b"\n"


# Engines.

class Engine:
    """An executor of a runner: one that the app made, or what makes one, which then also replaces a broken one."""

    def __init__(self, executor: Any) -> None:
        self._make = executor if isinstance(executor, type) or not hasattr(executor, "submit") else None
        self._executor: Any = None if self._make is not None else executor
        self._broken_until = -math.inf                    # monotonic
        self.has_worked = False                           # an attempt has begun there, since it was made
        self.hosts: dict[Departed, None] = {}             # a set in order

    @property
    def is_broken(self) -> bool:
        return time.monotonic() < self._broken_until

    def note_broken(self) -> None:
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

    def close(self) -> None:
        if self._make is not None and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


class IsolatedCall(Future):                               # type: ignore[type-arg]
    """A call that executes in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()                     # guards the two below
        self._process: Any = None                         # while it executes the call
        self._is_unwanted = False                         # kill() was called

    def kill(self) -> None:
        """Kill its process, now or as soon as there is one. Does nothing once it has answered: it may be another call's by then."""
        with self._lock:
            self._is_unwanted = True
            if self._process is not None:
                self._process.kill()

    def execute(self, process: Any, payload: str) -> bytes:
        """Have a process execute it; return the answer, a line. Else the process is not to be used again: it has died, or will."""
        with self._lock:
            self._process = process
            if self._is_unwanted:
                process.kill()
        answer = b""
        with contextlib.suppress(OSError):
            process.stdin.write(payload.encode() + b"\n")
            process.stdin.flush()
            answer = self._answer_of(process)
        with self._lock:
            self._process = None
            return answer if answer.endswith(b"\n") and not self._is_unwanted else b""

    @staticmethod
    def _answer_of(process: Any) -> bytes:
        """Wait for a process's answer; b"": it has died. What it forked may live on with its pipes, so their end does not tell."""
        import selectors
        if os.name != "nt":
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while not selector.select(0.5):
                    if process.poll() is not None and not selector.select(0):
                        return b""
        return process.stdout.readline()


class IsolatedProcesses(Executor):
    """Makes each call in a process of its own: started fresh, never forked, and kept for another one after a call that has left
    no thread behind."""

    def __init__(self) -> None:
        self._warm: list[Any] = []                        # processes; list.append and pop need no lock
        self._calls: set[IsolatedCall] = set()            # under way

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> IsolatedCall:
        call = IsolatedCall()
        self._calls.add(call)
        threading.Thread(target=self._make, args=(call, *args), name="bgjobs-isolated", daemon=True).start()
        return call

    def _make(self, call: IsolatedCall, payload: str) -> None:
        try:
            if call.set_running_or_notify_cancel():
                process = self._warm_process() or self._start()
                answer = call.execute(process, payload)
                stays_warm = answer[:1] == b"+" and len(self._warm) < WARM_PROCESSES
                if stays_warm:
                    self._warm.append(process)
                if answer:
                    call.set_result(answer[1:].decode())
                if not stays_warm:                        # one with threads left ends with them
                    self._end(process, kill=answer[:1] != b"-")
                if answer:
                    return
                code = process.returncode
                raise BgjobsError("the process of its own died under it: " + (f"exit code {code}" if code >= 0 else f"signal {-code}"))
        except Exception as error:
            call.set_exception(error)
        finally:
            self._calls.discard(call)

    @staticmethod
    def _end(process: Any, kill: bool = True) -> None:
        if kill:
            process.kill()
        with contextlib.suppress(OSError), process:       # its pipes are closed, and it has ended
            pass

    def _warm_process(self) -> Any:
        with contextlib.suppress(IndexError):
            while True:
                process = self._warm.pop()
                if process.poll() is None:
                    return process
                self._end(process)                        # somebody has killed it
        return None

    @staticmethod
    def _start() -> Any:
        import subprocess
        name, folder = (__name__, []) if __name__ != "__main__" else (_module_name("__main__"), [os.path.dirname(os.path.abspath(__file__))])
        code = "import json, sys; path, name = json.loads(sys.argv[1]); sys.path[:] = path; sys.argv[1:] = []; " \
               "__import__('importlib').import_module(name).serve_process()"
        command = [sys.executable, "-c", code, json.dumps([sys.path + folder, name])]
        with _fork_gate:                                  # Popen waits for the end of a pipe; who is forked meanwhile would keep it open
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    start_new_session=True)         # Ctrl-C in a terminal is for the app, which tells us

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for call in list(self._calls):
            call.kill()
        while self._warm:
            self._end(self._warm.pop())


def serve_process() -> None:
    """Execute the attempts whose payloads come on standard input, a line each; be a process of IsolatedProcesses."""
    global _serves_attempts
    _serves_attempts = True
    threading.Thread(target=_end_with, args=(os.getppid(),), name="bgjobs-parent", daemon=True).start()
    payloads, outcomes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)                                         # what functions print
    for payload in payloads:
        outcome = run_attempt(payload.decode())
        is_clean = all(thread is threading.current_thread() or thread.name.startswith("bgjobs-") for thread in threading.enumerate())
        outcomes.write((b"+" if is_clean else b"-") + outcome.encode() + b"\n")
        outcomes.flush()
        if not is_clean:
            return


def _end_with(parent: int) -> None:
    """End when the runner's process does. (A forked process of the app may keep our standard input open.)"""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


_serves_attempts = False                                  # this process: then it runs no jobs of its own, whatever the app's modules start


# The runner's side.

class Departed(Attempt):
    """An attempt that executes elsewhere, as its runner sees it. The pool gives it a place like any other, but no thread."""

    future: Any = None                                    # the engine's, if it went there
    host: Departed | None = None                          # in whose process it executes, or is to, as a guest
    run: str | None = None                                # the execution of it that has said hello
    caller: _Caller | None = None                         # the connection of its process, if there is one now
    _report: Report | None = None
    _positions_there: str | None = None

    def __init__(self, runner: Runner, claim: tuple[Any, ...], engine: Engine) -> None:
        import secrets
        super().__init__(runner, claim)
        self.engine, self.token = engine, secrets.token_urlsafe(16)
        self.claim = claim[:-1]
        self.replies: dict[int, Future[Any]] = {}         # to calls of ONCE, by their numbers

    def request_stop(self, reason: str = HALTED, force: bool = False) -> None:
        super().request_stop(reason, force)
        if self.stop_requested:
            self.runner._callback.stop(self)

    def let_pass(self, operation: threading.Event) -> None:
        pass                                              # it holds nothing up here

    def supersede(self) -> None:
        self.ticket.void = True
        self.request_stop(force=True)

    def report_to_save(self) -> Report | None:
        report, self._report = self._report, None
        return report

    def unsaved_positions(self) -> str | None:
        return self._positions_there

    def hear(self, lines: list[list[Any]], report: list[Any] | None, positions: str | None) -> None:
        """Take over what the attempt has logged and reported. Written with the next transaction, within a second."""
        runner = self.runner
        if runner._attempts.get(self.id) is not self:
            return
        for at, level, message in lines:
            if len(runner._lines) >= LOG_BUFFER:
                runner._lines_dropped += 1
            else:
                self.lines += 1
                runner._lines.append((self.id, at, level, message, self.number))
        if report is not None:
            progress, rate, *rest = report
            self._report = Report(progress, Rate(*rate), *rest)
        self._positions_there = positions or self._positions_there

    def take_over(self, outcome: dict[str, Any]) -> None:
        """Make what `run_attempt` returned this attempt's outcome."""
        self.hear(outcome["lines"], outcome["report"], outcome["positions"])
        self.outcome, self.result, self.error = outcome["outcome"], outcome["result"], outcome["error"]
        self.ran, self.waited = outcome["ran"], outcome["waited"]
        self.worked = max(0.0, self.ran - self.waited)

    def lose(self, error: BaseException) -> None:
        """Make the loss of its process, which `error` tells of, this attempt's outcome."""
        if self.run is None and isinstance(error, BrokenExecutor):
            self.outcome = UNSPENT                        # another attempt broke it, or there is something wrong with it
            if not self.engine.has_worked:                # type: ignore[union-attr]
                self.engine.note_broken()                 # type: ignore[union-attr]
        elif self.runner._shut_claims:
            self.outcome = RELEASED                       # Ctrl-C went to its process, too
        else:
            self.ran = self.worked = time.monotonic() - self.begun if self.run else 0.0
            self.fail(error)


class Place(Future):                                      # type: ignore[type-arg]
    """The place that an attempt elsewhere asks back: the answer to its call."""

    def set(self) -> None:
        self.set_result(True)


class Save(NamedTuple):
    """A state that waits for its transaction, or None: then only whether the attempt is still welcome is looked up."""

    caller: _Caller
    number: int
    attempt: Departed
    state: str | None
    positions: str | None = None


class _Caller:
    """A connection to the callback, a protocol of asyncio's: a process in which attempts execute, or a stranger."""

    def __init__(self, callback: Callback) -> None:
        self._callback, self._lines = callback, Lines()
        self.is_known = False                             # it has shown a token

    def connection_made(self, transport: Any) -> None:
        import socket
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._callback.callers.add(self)
        self._callback.loop.call_later(STRANGER_SECONDS, lambda: self.is_known or transport.abort())

    def data_received(self, received: bytes) -> None:
        try:
            calls = [(token, number, call, arguments) for token, number, call, *arguments in self._lines.take(received)]
            if not all((type(token), type(number), type(call)) == (str, int, str) for token, number, call, _ in calls):
                raise ValueError("that is no call")
        except (ValueError, TypeError, RecursionError):
            return self.transport.abort()
        for call in calls:
            self._callback.heed(self, *call)
        if not self.is_known and len(self._lines.unread) > STRANGER_BYTES:
            self.transport.abort()

    def eof_received(self) -> None:
        self._callback.save()                             # the answers go out before the connection is closed

    def send(self, *message: Any) -> None:
        if not self.transport.is_closing():
            self.transport.write(_as_line([*message]))

    def pause_writing(self) -> None:
        if not self.is_known:                             # it asks without end, and does not read
            self.transport.abort()

    def resume_writing(self) -> None:
        pass

    def connection_lost(self, error: Exception | None) -> None:
        self._callback.callers.discard(self)
        self._callback.lose(self)


class Callback:
    """Where a runner hands attempts over, in one thread, since an engine may block, and where it hears of them, in another: an
    event loop's."""

    def __init__(self, runner: Runner, address: str | None) -> None:
        self._runner, self._address = runner, address
        self._attempts: dict[str, Departed] = {}          # from being handed over to the outcome, by token
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()       # for engines
        self._starting = threading.Lock()                 # guards _thread
        self._thread: threading.Thread | None = None
        self._listener: Any = None
        self.loop: Any = None
        self.callers: set[_Caller] = set()                # these two belong to the loop's thread
        self._saves: list[Save] = []

    # 1. handing over

    def depart(self, attempt: Departed) -> None:
        """Have an attempt executed elsewhere. From any thread; returns at once."""
        self._do(self._send_off, attempt)

    def stop(self, attempt: Departed) -> None:
        """Tell an attempt that it is to stop or void; take it back if it has not begun. From any thread; returns at once."""
        self._soon(self._tell_to_stop, attempt)
        self._do(self._take_back, attempt)

    def _do(self, step: Callable[[Departed], None], attempt: Departed) -> None:
        """Have the thread for engines do something."""
        self._steps.put(functools.partial(step, attempt))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._hand_over, name="bgjobs-departures", daemon=True)
                self._thread.start()

    def _hand_over(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                step()
            except Exception:
                _log.exception("trouble with an executor")
            del step

    def _send_off(self, attempt: Departed) -> None:
        runner, engine, function = self._runner, attempt.engine, _registry.find(attempt.name)
        self._attempts[attempt.token] = attempt
        if attempt.stop_requested:
            return self._end(attempt, CancelledError())
        attempt.outcome = UNKNOWN                         # if it does not get there
        if function is None or engine.is_broken:
            return self._end(attempt, None)
        try:
            if self.loop is None:
                self._listen()
            attempt.host = self._host_for(attempt)
            if attempt.host is None:
                attempt.future = engine.submit(self._payload(attempt))
        except Exception as error:                        # the job waits until the executor takes it
            engine.note_broken()
            text = f"its executor takes no job: {_type_name(error)}: {_text(error, 500)}"
            with contextlib.suppress(StoreError):
                runner._store.write(lambda tx: tx.log(attempt.id, logging.ERROR, text))
            _say(logging.ERROR, f"job {attempt.id} ({attempt.name}) waits: {text}")
            return self._end(attempt, None)
        if attempt.host is not None:
            return self._soon(self._send_to_host, attempt)
        attempt.future.add_done_callback(functools.partial(self._come_back, attempt))
        host = self._host_for(attempt)
        if host is not None:                              # it has come while the engine took the attempt
            self._soon(self._offer, host)

    def _payload(self, attempt: Departed) -> str:
        function = _registry.find(attempt.name)
        return _dump({"claim": attempt.claim, "module": _module_name(function.__module__), "function": function.__qualname__,    # type: ignore
                      "callback": self._listener.getsockname()[:2], "token": attempt.token, "path": self._runner.path,
                      "runner": self._runner._id, "is_guest": attempt.host is not None})

    def _take_back(self, attempt: Departed) -> None:
        """Cancel what has not begun; kill what has been superseded, if it has a process of its own."""
        if attempt.host is not None:
            self._give_back(attempt)
        elif attempt.ticket.void and isinstance(attempt.future, IsolatedCall):
            attempt.future.kill()
        elif attempt.future is not None and (attempt.ticket.void or attempt.run is None):
            attempt.future.cancel()

    # 4. and 5. outcome and loss

    def _come_back(self, attempt: Departed, future: Any) -> None:
        """Take the outcome from an engine's future. Called in a thread of the engine's."""
        try:
            outcome = CancelledError() if future.cancelled() else future.result()
        except BaseException as error:                    # a process of it died, or was taken away
            outcome = error
        if attempt.host is None:                          # else it was taken from the engine before it began
            self._end(attempt, outcome)

    def _end(self, attempt: Departed, outcome: str | BaseException | None) -> None:
        """End an attempt with what run_attempt returned, with what kept it from that, or, if it was not handed over, as it is."""
        if self._attempts.pop(attempt.token, None) is None:
            return                                        # it has been lost already, or its engine tells twice
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                attempt.take_over(json.loads(outcome))
        except CancelledError:
            attempt.outcome = UNSPENT
        except BaseException as error:
            attempt.lose(error)
            for guest in [guest for guest in list(self._attempts.values()) if guest.host is attempt]:
                self._end(guest, error)
        attempt.thread = attempt.caller = None
        attempt.engine.hosts.pop(attempt, None)           # type: ignore[union-attr]
        if attempt.host is not None and attempt.host.token in self._attempts and not attempt.host.has_place:
            self._soon(self._offer, attempt.host)
        if attempt.outcome not in (UNKNOWN, UNSPENT):
            self._runner._costs.record(attempt.name, attempt.worked)
        self._runner._pool.end(attempt)

    def lose(self, caller: _Caller) -> None:
        """Note that a connection is lost. Not every engine tells that a process of its died."""
        for attempt in [attempt for attempt in list(self._attempts.values()) if attempt.caller is caller]:
            attempt.caller = None
            if attempt.host is not None and attempt.run is None:
                self._give_back(attempt)
            else:
                self.loop.call_later(RETRY_SECONDS, self._end_if_away, attempt)

    def _end_if_away(self, attempt: Departed) -> None:
        if attempt.caller is None:
            self._end(attempt, BgjobsError("the process that executed it is gone"))

    # hosts and guests

    @staticmethod
    def _host_for(attempt: Departed) -> Departed | None:
        if not attempt.options.get("isolate"):
            with contextlib.suppress(KeyError):
                return attempt.engine.hosts.popitem()[0]  # type: ignore[union-attr]
        return None

    def _offer(self, host: Departed) -> None:
        """Have a host's process execute what its engine has not begun, which may be what all its processes wait for; else what comes
        next. In the loop's thread."""
        host.engine.hosts[host] = None                    # type: ignore[union-attr]  # first: see _send_off
        queued = next((each for each in list(self._attempts.values()) if each.engine is host.engine and each.host is None
                       and each.run is None and each.future is not None and not isinstance(each.future, IsolatedCall)), None)
        if queued is not None and host.engine.hosts.pop(host, self) is None:             # type: ignore[union-attr, arg-type]
            queued.host = host
            self._send_to_host(queued)
            self._do(lambda attempt: attempt.host and attempt.future.cancel(), queued)       # the first to say hello executes it

    def _send_to_host(self, guest: Departed) -> None:
        guest.caller = guest.host.caller                  # type: ignore[union-attr]
        if guest.caller is None:
            self._give_back(guest)
        else:
            guest.caller.send(0, guest.host.token, "run", self._payload(guest))         # type: ignore[union-attr]

    def _give_back(self, guest: Departed) -> None:
        """Have a guest handed over anew, unless it has begun."""
        if guest.run is None:
            self._end(guest, CancelledError())

    # 2. and 3. listening: in the loop's thread

    def _listen(self) -> None:
        import asyncio
        import socket
        host, _, port = (self._address or "127.0.0.1:0").rpartition(":")
        self._listener = socket.create_server((host, int(port)))
        loop = asyncio.SelectorEventLoop()
        server = loop.run_until_complete(loop.create_server(functools.partial(_Caller, self), sock=self._listener, backlog=1024))
        threading.Thread(target=self._run_loop, args=(loop, server), name="bgjobs-callback", daemon=True).start()
        self.loop = loop
        with contextlib.suppress(AttributeError, RuntimeError):         # the standard library's own; or the interpreter ends already
            threading._register_atexit(_close_before_executors, weakref.ref(self._runner))          # type: ignore[attr-defined]

    def _run_loop(self, loop: Any, server: Any) -> None:
        import asyncio
        loop.run_forever()                                # until close()
        server.close()
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
        if attempt.caller is not None and attempt.run is not None:        # else it hears that when it says hello
            attempt.caller.send(0, attempt.token, "void" if attempt.ticket.void else "stop", attempt.reason)

    def heed(self, caller: _Caller, token: str, number: int, call: str, arguments: list[Any]) -> None:
        """Carry a call out, or see to it, and answer it."""
        attempt = self._attempts.get(token)
        caller.is_known |= attempt is not None
        if attempt is None or call != "ended" and (attempt.ticket.void or call != "hello" and attempt.caller is not caller):
            caller.send(number, None, "gone", "")
        elif call == "hello":
            caller.send(number, *self._welcome(caller, attempt, *arguments))
        elif call == "save":
            self._save_soon(Save(caller, number, attempt, *arguments))
        elif call == "tell":
            attempt.hear(*arguments)
            self._save_soon(Save(caller, number, attempt, None, arguments[-1]))
        else:
            reply = attempt.replies.get(number)
            if reply is None:
                reply = self._outcome_of(lambda: getattr(self, "_call_" + call)(attempt, *arguments))
                if call in ONCE:
                    attempt.replies[number] = reply
                    for old in [old for old, kept in attempt.replies.items() if kept.done()][:-REPLIES_KEPT]:
                        del attempt.replies[old]
            reply.add_done_callback(lambda reply: self._soon(self._reply, caller, number, reply))

    def _outcome_of(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function; return its outcome. If it returns a future, its value is yet to come, and that is returned."""
        outcome: Future[Any] = Future()
        try:
            value = function(*arguments)
            if isinstance(value, Future):
                return value
            outcome.set_result(value)
        except BaseException as error:                    # JobStopped is one of these
            outcome.set_exception(error)
        return outcome

    def _reply(self, caller: _Caller, number: int, reply: Future[Any]) -> None:
        error = reply.exception()
        if error is None:
            caller.send(number, reply.result())
        else:
            caller.send(number, *self._refusal(error))

    def _refusal(self, error: BaseException) -> list[Any]:
        if self._runner._store.closed:
            return [None, "gone", ""]
        return [None, _type_name(error), str(error.args[0]) if isinstance(error, KeyError) and error.args else _text(error)]

    def _save_soon(self, save: Save) -> None:
        if not self._saves:
            self.loop.call_soon(self.save)
        self._saves.append(save)

    def save(self) -> None:
        """Save the states that wait, in one transaction."""
        saves, self._saves = self._saves, []
        if not saves:
            return
        try:
            stored = self._runner._store.write(lambda tx: tx.save_states([(each.attempt, each.state, each.positions) for each in saves]))
            replies = [[True] if is_stored else [None, "gone", ""] for is_stored in stored]
        except Exception as error:
            replies = [self._refusal(error)] * len(saves)
        for each, reply in zip(saves, replies):
            each.caller.send(each.number, *reply)
        time.sleep(min(COLLECT_AT_MOST, COLLECT_SECONDS * len(self._attempts)))           # many: more of them wake the loop at once

    def _welcome(self, caller: _Caller, attempt: Departed, run: str, is_guest: bool = False) -> list[Any]:
        runner = self._runner
        is_taken = not is_guest and attempt.future is not None and attempt.future.cancelled()      # Dask may begin it all the same
        if attempt.run is None and not is_taken:
            attempt.engine.has_worked = True              # type: ignore[union-attr]
            attempt.host = attempt.host if is_guest else None
            attempt.run, attempt.begun, attempt.thread = run, time.monotonic(), 0
            if attempt.due is not None and not attempt.system:
                runner._begun.append((attempt.name, max(0.0, runner._clock() - attempt.due)))
        if attempt.run != run:
            return [None, "JobStopped", f"attempt {attempt.number} of job {attempt.id} has begun elsewhere: its executor has started it twice"]
        attempt.caller = caller
        return [[attempt.stop_requested, attempt.reason]]

    # what an attempt may ask for

    def _call_submit(self, attempt: Departed, new: dict[str, Any], arguments: list[str | None] | None) -> Any:
        submission = Submission(new["name"])
        for name, value in new.items():
            setattr(submission, name, value)
        submission.submitter, submission.author = self._runner._id, (attempt.id, attempt.number)
        self._runner._has_submitted = True
        parent = self._runner._attempts.get(submission.parent_id)      # type: ignore[arg-type]
        if parent is not None:
            parent.has_children = True
        return self._runner._store.write(lambda tx: tx.submit(submission) if arguments is None else [*tx.submit_many(submission, arguments)])

    def _call_operate(self, attempt: Departed, operation: str, job_id: int, by: str | None) -> None:
        if operation not in TRANSITIONS:
            raise ValueError(f"there is no operation {_short(operation)}")
        self._runner._operate(operation, job_id, by)

    def _call_info(self, attempt: Departed, job_id: int) -> dict[str, Any]:
        return self._runner._info(job_id)

    def _call_logs(self, attempt: Departed, job_id: int, *filters: Any) -> list[dict[str, Any]]:
        return self._runner._logs(job_id, *filters)

    def _call_outcome(self, attempt: Departed, job_id: int) -> dict[str, Any] | None:
        rows = self._runner._store.read(OUTCOME_OF, {"id": job_id})
        return dict(rows[0]) if rows else None

    def _call_end(self, attempt: Departed, job_id: int) -> Future[Any]:
        """Answer with a job's outcome once it is over."""
        end: Future[Any] = Future()
        self._runner.get(job_id).add_done_callback(lambda job: end.set_result(self._call_outcome(attempt, job_id)))
        return end

    def _call_leave(self, attempt: Departed) -> None:
        if not attempt.waits:
            self._offer(attempt)
        self._runner._pool.leave(attempt)

    def _call_ask_back(self, attempt: Departed) -> Future[Any]:
        place = Place()                                   # until it has that, its process executes others
        place.add_done_callback(lambda place: attempt.engine.hosts.pop(attempt, None))       # type: ignore[union-attr]
        if not self._runner._pool.ask_back(attempt, place):
            place.set_result(False)                       # it needs none
        return place

    def _call_ended(self, attempt: Departed, outcome: str) -> None:
        if attempt.host is not None:                      # else its engine was quicker
            self._end(attempt, outcome)

    # going down

    def close(self) -> None:
        self._steps.put(None)
        if self.loop is not None:
            self._soon(self.loop.stop)

    def leave_to_parent(self) -> None:
        """In a forked child: keep no connection of the parent's open. (To close the transports would change the epoll object of both.)"""
        if self.loop is not None:
            with open(os.devnull) as nothing:
                for connection in (self._listener, *(caller.transport.get_extra_info("socket") for caller in list(self.callers))):
                    os.dup2(nothing.fileno(), connection.fileno())


def _close_before_executors(reference: weakref.ref[Runner]) -> None:
    """Close a runner when the interpreter ends, before process pools wait for what they execute, as they do then."""
    runner = reference()
    if runner is not None and not runner._store.closed:
        runner._store.close_by = min(runner._store.close_by, time.monotonic() + GRACE_SECONDS)
        runner._close_at_exit()


# Over there.

def run_attempt(payload: str) -> str:
    """Execute one attempt in this process, for the runner that made this text; return its outcome, as JSON. For engines: the one
    function that they call."""
    given = json.loads(payload)
    return AttemptThere(_link_to(tuple(given["callback"]), given["path"], given["runner"]), given).execute()


_links: dict[tuple[Any, ...], Link] = {}


def _link_to(address: tuple[str, int], path: str, runner_id: int) -> Link:
    key = address, path, runner_id
    return _links.get(key) or _links.setdefault(key, Link(*key))


class AttemptThere(Attempt):
    """An attempt in the process that executes it."""

    _told_positions: str | None = None

    def __init__(self, link: Link, given: dict[str, Any]) -> None:
        import secrets
        super().__init__(link.runner, (*given["claim"], 0))
        self.link, self.token, self.run, self.is_guest = link, given["token"], secrets.token_hex(8), given["is_guest"]
        self._module, self._function = given["module"], given["function"]

    def execute(self) -> str:
        """Say hello, call the function; return the outcome, as JSON."""
        _capture_log_records()
        try:
            self.link.begin(self)
            if not self.stop_requested:
                self._import_function()
                self.runner._perform(self)
        except (Exception, JobStopped) as error:          # JobStopped: its hello was refused
            self.fail(BgjobsError(_text(error)) if isinstance(error, JobStopped) else error)
        lines, report, positions = self.link.part_from(self)
        return _dump({"outcome": self.outcome, "result": self.result, "error": self.error, "ran": self.ran, "waited": self.waited,
                      "lines": lines, "report": report, "positions": positions})

    def _import_function(self) -> None:
        import importlib
        function: Any = importlib.import_module(self._module)
        for name in self._function.split("."):
            function = getattr(function, name)
        _registry.by_name[self.name] = function

    def _save(self, state: str | None) -> None:
        if state is not None:                             # positions alone go with what is told next
            self.link.ask(self, "save", state, self.unsaved_positions())
            self._state = state
        self._saved_at = time.monotonic()

    def untold(self) -> tuple[list[Any], list[Any] | None, str | None]:
        """Return the log lines, the progress and the positions that the runner has not been told; None: it knows."""
        report, positions = self.report_to_save(), self.unsaved_positions()
        new_positions = positions if positions != self._told_positions else None
        self._told_positions = positions
        return self.runner.take_lines(self), None if report is None else list(report), new_positions         # type: ignore[attr-defined]


class RunnerThere(Runner):
    """What stands for the runner in the process of an attempt: asks it through the link."""

    def __init__(self, link: Link, path: str, runner_id: int) -> None:
        Submitter.__init__(self, self, {})
        self._link, self.path, self._id = link, path, runner_id
        self._store = _StoreThere(link)                   # type: ignore[assignment]
        self._costs, self._clock = Costs(), time.time
        self._begin_empty()
        self._begun = deque(maxlen=1)                     # counted by the runner

    def _watch(self, handle: Job) -> None:
        """Complete this handle when its job is over. Does not wait for an answer: the caller may hold another handle's lock."""
        with self._handle_lock:
            self._watched.setdefault(handle.id, []).append(weakref.ref(handle))
        call = self._link.post(self._link.attempt_here(), "end", handle.id)
        call.add_done_callback(functools.partial(self._complete, handle.id))

    def _complete(self, job_id: int, end: Future[Any]) -> None:
        if isinstance(end.exception(), JobStopped):
            return                                        # who asked has ended
        self._store.outcomes[job_id] = None if end.exception() else end.result()         # type: ignore[attr-defined]
        self._complete_handles([job_id])
        self._store.outcomes.pop(job_id, None)            # type: ignore[attr-defined]

    def take_lines(self, attempt: Attempt) -> list[Any]:
        """Take the log lines of an attempt out of those that wait: [[at, level, message]...]. Under the link's lock."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        is_own = [line[0] == attempt.id and line[4] == attempt.number for line in lines]
        self._lines.extendleft(reversed([line for line, own in zip(lines, is_own) if not own]))
        return [line[1:4] for line, own in zip(lines, is_own) if own]

    def _info(self, job_id: int) -> dict[str, Any]:
        return self._link.ask(None, "info", job_id)

    def _status(self, job_id: int) -> str:
        return self._info(job_id)["status"]

    def _logs(self, *filters: Any) -> list[dict[str, Any]]:
        return self._link.ask(None, "logs", *filters)

    def _operate(self, operation: str, job_id: int, by: str | None, handle: Job | None = None) -> Job:
        self._link.ask(None, "operate", operation, job_id, by)
        return Job(self, job_id) if handle is None or operation in ("resume", "restart") and handle._state != "PENDING" else handle

    def _wait_in_job(self, attempt: Attempt, wait: Callable[[float | None], bool], timeout: float | None) -> bool:
        begun = time.monotonic()
        self._link.ask(attempt, "leave")
        try:
            return wait(timeout)
        finally:
            self._link.ask(attempt, "ask_back")           # answered when it has a place
            attempt.waited += time.monotonic() - begun


class _StoreThere:
    """What stands for the store in the process of an attempt: the one transaction and the one query that handles and submits need."""

    closed = forked = False

    def __init__(self, link: Link) -> None:
        self._link = link
        self.outcomes: dict[int, dict[str, Any] | None] = {}      # of jobs that are over, while their handles are completed

    def write(self, run: Callable[[Any], Any]) -> Any:
        return run(self)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a job that executes in another process cannot ask this of its runner; do it in the app, or in a job without "
                           "executor= and isolate=")

    def kick(self) -> None:
        """There is nothing to lead."""

    def submit(self, new: Submission, arguments: list[str | None] | None = None) -> Any:
        return self._link.ask(None, "submit", {name: getattr(new, name) for name in Submission.__slots__}, arguments)

    submit_many = submit

    def read(self, sql: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        if sql != OUTCOME_OF:
            return self.__getattr__("read")
        job_id = parameters["id"]
        outcome = self.outcomes[job_id] if job_id in self.outcomes else self._link.ask(None, "outcome", job_id)
        return [] if outcome is None else [outcome]


class _Call(Future):                                      # type: ignore[type-arg]
    """A call to the callback: its answer is this future's result."""

    def __init__(self, attempt: AttemptThere, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._condition = _Condition()
        self.attempt, self.name = attempt, name
        self.line = _as_line([attempt.token, number, name, *arguments])


class Link:
    """The connection of this process to a runner's callback. A thread of its own keeps it, hears, and tells what is new."""

    def __init__(self, address: tuple[str, int], path: str, runner_id: int) -> None:
        self._address = address
        self._lock = threading.RLock()                    # guards all below, and the sending; no call is answered under it
        self._attempts: dict[str, AttemptThere] = {}      # that execute here, by their runs: an engine may start one twice
        self._calls: dict[int, _Call] = {}                # without an answer, by number
        self._numbers = itertools.count(1)
        self._socket: Any = None
        self._thread: threading.Thread | None = None      # while there are attempts or calls, and for some time after
        self._is_gone = False                             # the runner: it has been given up
        self._lost_at = math.inf                          # monotonic: when the connection was lost, unless there is one that works
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

    def part_from(self, attempt: AttemptThere) -> tuple[list[Any], list[Any] | None, str | None]:
        """Forget an attempt that has ended; return what its runner has not been told of it, once it has heard the rest."""
        with self._lock:
            self._attempts.pop(attempt.run, None)
            rest = attempt.untold()
            if self.runner._attempts.get(attempt.id) is attempt:
                del self.runner._attempts[attempt.id]
            told = [call for call in self._calls.values() if call.attempt is attempt and call.name == "tell"]
        wait(told, RETRY_SECONDS)
        self._refuse(f"attempt {attempt.number} of job {attempt.id} has ended", attempt)
        return rest

    def attempt_here(self) -> AttemptThere:
        """Return the attempt that this is called in; in another thread, one of this process. Raises JobStopped: there is none."""
        attempt = _current.get() or next(iter(self._attempts.values()), None)
        if attempt is None or attempt.runner is not self.runner:
            raise JobStopped("the attempt that this belongs to has ended")
        return attempt                                    # type: ignore[return-value]

    @library_code
    def ask(self, attempt: Any, name: str, *arguments: Any) -> Any:
        """Ask the runner for something and return what it says. Raises JobStopped when it is not there any more, or the attempt is
        superseded; else what it raised there."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the link's own thread cannot wait for an answer")
        return self.post(attempt or self.attempt_here(), name, *arguments).result()

    @library_code
    def post(self, attempt: AttemptThere, name: str, *arguments: Any) -> _Call:
        """Ask the runner for something; the answer will be the result of what is returned."""
        number = next(self._numbers)
        call = _Call(attempt, number, name, arguments)
        with self._lock:
            self._calls[number] = call
            self._send(call)
            if self._thread is None and not self._is_gone:
                self._lost_at = min(self._lost_at, time.monotonic())
                self._thread = _start_thread("bgjobs-link", self._run)
        if self._is_gone:
            self._refuse(self._no_answer)
        return call

    def _greet(self, attempt: AttemptThere) -> _Call:
        hello = self.post(attempt, "hello", attempt.run, attempt.is_guest)
        hello.add_done_callback(functools.partial(self._heed_welcome, attempt))
        return hello

    @staticmethod
    def _heed_welcome(attempt: AttemptThere, hello: Future[Any]) -> None:
        if hello.exception() is None and hello.result()[0]:
            attempt.request_stop(hello.result()[1], force=True)

    def _send(self, call: _Call) -> None:
        """Send a call; if that fails, it is sent once there is a connection again. Called under the lock."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(call.line)

    @property
    def _no_answer(self) -> str:
        return f"the runner does not answer at {self._address[0]}:{self._address[1]}"

    def _refuse(self, why: str, attempt: AttemptThere | None = None) -> None:
        """Answer the calls of an attempt, or all, with JobStopped."""
        with self._lock:
            refused = [number for number, call in self._calls.items() if attempt in (None, call.attempt)]
        for call in [self._calls.pop(number, None) for number in refused]:
            if call is not None:
                call.set_exception(JobStopped(why))

    # in the link's thread

    def _run(self) -> None:
        used_at = time.monotonic()
        idle_seconds = 60.0 if threading.current_thread().daemon else 1.0     # else it holds up the end of its interpreter
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
        import socket
        pause = 0.02
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=5)
                break
            except OSError:
                if time.monotonic() - self._lost_at > RETRY_SECONDS:
                    return False
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._socket, self._lines = connection, Lines()
            unanswered = sorted(self._calls.values(), key=lambda call: call.name != "hello")
            for attempt in self._attempts.values():
                if not any(call.name == "hello" and call.attempt is attempt for call in unanswered):
                    self._greet(attempt)
            for call in unanswered:
                self._send(call)
        return True

    def _hang_up(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
                self._lost_at = min(self._lost_at, time.monotonic())

    def _hear(self) -> None:
        import selectors
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(TELL_SECONDS):
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
        call = self._calls.pop(number, None)
        if call is None:
            return
        if kind is None:
            return call.set_result(value)
        if kind == "gone":
            kind, text = "JobStopped", "the attempt has been superseded"
            self._supersede(call.attempt)
        known = {each.__name__: each for each in (JobStopped, StoreError, InvalidOperation, KeyError, TypeError, ValueError, RuntimeError)}
        call.set_exception(known.get(kind, BgjobsError)(text))

    def _heed_news(self, token: str, news: str, value: Any) -> None:
        if news == "run":
            _start_thread("bgjobs-guest", self._run_guest, value)
        for attempt in [each for each in list(self._attempts.values()) if each.token == token]:
            if news == "stop":
                attempt.request_stop(value, force=True)
            elif news == "void":
                self._supersede(attempt)

    def _supersede(self, attempt: AttemptThere) -> None:
        attempt.supersede()
        self._refuse("the attempt has been superseded", attempt)

    def _run_guest(self, payload: str) -> None:
        """Execute another attempt while one of this process waits."""
        guest = AttemptThere(self, json.loads(payload))
        self.post(guest, "ended", guest.execute())

    def _tell(self) -> None:
        """Tell the runner what is new of each attempt, now and then, unless it does not keep up."""
        if time.monotonic() < self._told_at + TELL_SECONDS or len(self._calls) > 1_000:
            return
        self._told_at = time.monotonic()
        for attempt in list(self._attempts.values()):
            with self._lock:                              # it may part meanwhile
                lines, report, positions = attempt.untold()
                if lines or report is not None or positions is not None:
                    self.post(attempt, "tell", lines, report, positions)

    def _give_up(self) -> None:
        """Stop what executes here: its runner is gone."""
        with self._lock:
            self._thread, self._is_gone = None, True
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.request_stop(RELEASED, force=True)
        self._refuse(self._no_answer)


def _start_thread(name: str, run: Callable[..., None], *args: Any) -> threading.Thread:
    """Start a thread that belongs to no job, a daemon where the interpreter allows them: a subinterpreter does not."""
    for daemon in (True, False):
        with contextlib.suppress(RuntimeError):
            thread = threading.Thread(target=contextvars.Context().run, args=(run, *args), name=name, daemon=daemon)
            thread.start()
            return thread
    raise RuntimeError("no thread can be started")


# ---- 14 The default runner ------------------------------------------------------------------------------------

_default: Runner | None = None
_default_lock = threading.Lock()                              # guards _default


@library_code
def start(path: str | os.PathLike[str] | None = None, **options: Any) -> Runner:
    """Make the default runner and start it; see Runner for the options. RuntimeError: there is one on another file."""
    global _default
    with _default_lock:
        if _default is not None and _default._store.forked and path is None and not options:
            return _default.start()
        if _default is not None and not _default._store.closed:
            if path is not None and os.path.abspath(path) != _default.path:
                raise RuntimeError(f"the default runner is on {_default.path} already; close() it, or make a Runner of your own")
            if options:
                raise RuntimeError("the default runner has been made already; call start() with its options before the first submit")
            return _default.start()
        _default = Runner(path, **options)
        return _default


def default_runner() -> Runner:
    """Return the runner whose job this is called in, else the default one, started when first needed.

    RuntimeError: it has been closed. Another would be on another file, where nobody looks.
    """
    attempt = _current.get()
    if attempt is not None:
        return attempt.runner
    runner = _default
    if runner is None:
        return start()
    if runner._store.closed and not runner._store.forked:
        raise RuntimeError(f"the runner on {runner.path} is shut down; call start()")
    return runner


def submit(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
    """Runner.submit on the default runner; inside a job, a child of it."""
    return default_runner()._submit(fn, args, kwargs, {})


def submit_many(fn: Callable[..., Any], argument_tuples: Iterable[tuple[Any, ...]]) -> list[int]:
    """Runner.submit_many on the default runner."""
    return default_runner()._submit_many(fn, argument_tuples, {})


def options(**options: Any) -> Submitter:
    """Return a Submitter for the default runner: `options(label="Nightly export").submit(export, "users")`.

    name: stable identity of the function, its import path by default. label: a title for people. run_by: who asked for
    it; a child has its parent's. low_priority: run in periods of low load; a child as its parent. system: hidden by
    default. key: at the root, while a job with this key is not over, submit returns that job; in a child, unique within
    the parent for good. delay: seconds, or run_at: Unix seconds or an aware datetime. retries: attempts more after an exception.
    backoff: the pause before each, in seconds, a list of them (the last one repeats), or a function of the attempt, called at submit;
    by default 1 s, twice as long each time, up to 10 min, and up to half as long again by chance. timeout: seconds of one attempt; it
    is stopped then, after a grace of 5 s by force, and has failed with a TimeoutError. max_running: at most so many attempts of
    this name at once, over all processes; the job's ancestors, which may wait for it, do not count. stoppable=False: stays
    stopping until it ends. restartable=False: refuses restart. recover=False: an attempt cut off by a crash fails instead of
    running again. isolate=True: in a process of its own. tz: the time zone of `every`. secret: argument names that people do not get to see. parent: a Job to become
    its child, None for a root. connection: the app's open sqlite3.Connection to the same file: the job exists if and only if its
    transaction commits; ask the handle for nothing but its id before.
    """
    return Submitter(None, options)


def every(schedule: float | str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Schedule:
    """Runner.every on the default runner: `every("15m", tidy)`, `options(tz="Europe/Berlin").every("30 6 * * mon-fri", report)`."""
    return default_runner()._every(schedule, fn, args, kwargs, {})


def schedules(system: bool = False) -> list[Schedule]:
    """Runner.schedules on the default runner."""
    return default_runner().schedules(system)


def stats(window: str = "24h", name: str | None = None) -> dict[str, Any]:
    """Runner.stats on the default runner."""
    return default_runner().stats(window, name)


def prune(finished: float = RETENTION["finished"], failed: float = RETENTION["failed"]) -> int:
    """Runner.prune on the default runner."""
    return default_runner().prune(finished, failed)


def get(job_id: int) -> Job:
    """Runner.get on the default runner."""
    return default_runner().get(job_id)


def jobs(**filters: Any) -> list[Job]:
    """Runner.jobs on the default runner."""
    return default_runner().jobs(**filters)


def drain() -> int:
    """Runner.drain on the default runner."""
    return default_runner().drain()


def serve(host: str = "127.0.0.1", port: int = 8765, **options: Any) -> str:
    """Runner.serve on the default runner."""
    return default_runner().serve(host, port, **options)


def wsgi(**options: Any) -> Page:
    """Runner.wsgi on the default runner."""
    return default_runner().wsgi(**options)


def backup(path: str | os.PathLike[str]) -> str:
    """Runner.backup on the default runner."""
    return default_runner().backup(path)


def close(timeout: float = GRACE_SECONDS) -> None:
    """Runner.close on the default runner, if there is one."""
    if _default is not None:
        _default.close(timeout)


def shutdown(wait: bool = True, *, cancel_futures: bool = False) -> None:
    """Runner.shutdown on the default runner, if there is one."""
    if _default is not None:
        _default.shutdown(wait, cancel_futures=cancel_futures)


# ---- 15 Status page -------------------------------------------------------------------------------------------
#
# Three assets without interpolation, and a JSON interface. What keeps strangers out: only known Host headers are answered
# (DNS rebinding), the API refuses requests from other origins, and an operation needs POST, JSON and a token that only
# a page of this origin can read.

PAGE_HTML = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>bgjobs</title>
<link id="icon" rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='3' fill='%232456c7'/%3E%3Cpath d='M3 5h10M3 8h7M3 11h4' stroke='%23fff' stroke-width='1.6'/%3E%3C/svg%3E">
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
  <div id="bulk"></div>
</footer>
<dialog id="confirm" aria-labelledby="confirm-title" aria-describedby="confirm-text">
  <h2 id="confirm-title"></h2>
  <p id="confirm-text"></p>
  <p class="buttons">
    <button type="button" id="confirm-no" autofocus>Go back</button>
    <button type="button" id="confirm-yes" class="grave"></button>
  </p>
</dialog>
</body>
</html>
'''

PAGE_CSS = r''':root {
  color-scheme: light dark;
  --back: #ffffff; --raised: #f5f6f8; --text: #1c2026; --quiet: #5a6270; --line: #e1e4e9; --edge: #7d8591;
  --accent: #2456c7; --on-accent: #ffffff; --chosen: #eaf0fd;
  --good: #1a7a3c; --bad: #b3261e; --warn: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15181c; --raised: #1e2227; --text: #e4e7eb; --quiet: #a0a8b4; --line: #2d333b; --edge: #79828f;
    --accent: #8ab0ff; --on-accent: #10131a; --chosen: #1d2a45;
    --good: #5cc47e; --bad: #ff8a80; --warn: #e3b341;
  }
}

* { box-sizing: border-box; }
html { scroll-padding: 1rem 0 5rem; accent-color: var(--accent); }
body {
  margin: 0; min-height: 100vh; display: flex; flex-direction: column;
  background: var(--back); color: var(--text);
  font: 0.875rem/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
header, main, #banner, #dock { padding: 0 1.25rem; }
main { flex: 1; padding-bottom: 2rem; }
main[aria-busy] { opacity: 0.6; transition: opacity 0s 0.4s; }
h1 { font-size: 1.375rem; line-height: 1.25; margin: 1rem 0 0.75rem; }
h2 { font-size: 0.9375rem; margin: 1.5rem 0 0.375rem; }
p { margin: 0 0 0.5rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
small { color: var(--quiet); font-size: 0.8125rem; font-weight: normal; }
code, pre, #log { font: 0.8125rem/1.5 ui-monospace, monospace; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
h1:focus, main:focus { outline: none; }
.bad { color: var(--bad); }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; padding: 0.5rem 1.25rem; }

header { display: flex; align-items: center; gap: 1.5rem; border-bottom: 1px solid var(--line); background: var(--raised); }
nav { display: flex; flex-wrap: wrap; gap: 0 1rem; }
header a { padding: 0.625rem 0; color: inherit; text-decoration: none; }
header a[aria-current] { box-shadow: inset 0 -2px var(--accent); }
header a:hover, .tabs a:hover, th a:hover { text-decoration: underline; }
#banner:not(:empty) { margin: 0; padding-block: 0.5rem; color: var(--warn); background: var(--raised); border-bottom: 1px solid var(--line); }
.path { margin-top: 0.5rem; gap: 0.375rem; }
.path + h1 { margin-top: 0.25rem; }
.pages { display: flex; flex-wrap: wrap; gap: 0 1rem; margin-top: 1rem; color: var(--quiet); }
.spring { flex: 1; }
.pages a, .path a { padding: 0.25rem 0; }

.tabs { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0 0 0.75rem; padding: 0; list-style: none; }
.tabs a { display: block; padding: 0.1875rem 0.625rem; border-radius: 1rem; color: inherit; text-decoration: none; }
.tabs a[aria-current] { background: var(--accent); color: var(--on-accent); }
.tabs a[aria-current] small { color: inherit; }

form, .filters { display: flex; flex-wrap: wrap; align-items: end; gap: 0.5rem 0.75rem; margin-bottom: 1rem; }
form label, .filters label { display: grid; color: var(--quiet); font-size: 0.8125rem; }
.flags { display: flex; flex-wrap: wrap; gap: 0 1rem; }
label.flag { display: flex; align-items: center; gap: 0.375rem; min-height: 2rem; }
label.flag, form > a { color: var(--text); }
form > a { line-height: 2rem; }
summary { padding: 0.25rem 0; width: fit-content; }
input, select, button { font: inherit; color: inherit; }
input:not([type=checkbox]), select {
  height: 2rem; padding: 0 0.5rem; background: var(--back); border: 1px solid var(--edge); border-radius: 4px;
}
input[type=search] { width: 11rem; }
input[type=checkbox] { width: 1rem; height: 1rem; margin: 0; }
button { min-height: 2rem; padding: 0 0.75rem; background: var(--back); border: 1px solid var(--edge); border-radius: 4px; cursor: pointer; }
button:hover:enabled { border-color: var(--accent); color: var(--accent); }
button:disabled { color: var(--quiet); border-color: var(--line); cursor: default; }
button.grave { background: var(--bad); border-color: var(--bad); color: var(--back); }
button.grave:hover:enabled { color: var(--back); border-color: var(--text); }
.buttons, #bulk { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; }
.buttons { margin: 0.75rem 0; }

table { width: 100%; border-collapse: collapse; font-size: 0.8125rem; }
th, td { padding: 0.25rem 0.4375rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle; }
thead th { color: var(--quiet); font-weight: 600; font-size: 0.8125rem; white-space: nowrap; }
tbody tr:hover { background: var(--raised); }
tbody tr.selected { background: var(--chosen); }
td[data-label=Waiting], td[data-label=Duration] { white-space: nowrap; }
td[data-label="Run by"] { min-width: 5rem; overflow-wrap: anywhere; }
td[data-label=Children] { min-width: 7rem; }
td > small { display: block; }
td progress { flex: none; width: 6.5rem; }
.pick { width: 2rem; padding: 0; }
.pick label { display: grid; place-items: center; min-width: 1.75rem; min-height: 1.75rem; }
tbody th { padding-left: 0; font-weight: 500; min-width: min(12rem, 100%); }
tbody th, td code { overflow-wrap: anywhere; }
.job { display: flex; align-items: center; min-height: 1.75rem; min-width: 12rem; max-width: 22rem; overflow-wrap: anywhere; }
.job a { display: inline-block; padding: 0.1875rem 0; text-decoration: none; }
.indent { flex: 0 0 1.25rem; }
.twist { flex: 0 0 1.75rem; min-height: 1.75rem; padding: 0; border: 0; background: none; color: var(--quiet); }
thead .pick + th { padding-left: 1.75rem; }
.more { padding-left: 4rem; }

.status { white-space: nowrap; }
.status::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 0.4em; border: 1.5px solid; border-radius: 50%; }
.status:not([data-status=pending], [data-status=cancelled])::before { background: currentColor; }
[data-status=running] { color: var(--accent); }
[data-status=finished] { color: var(--good); }
[data-status=failed], [data-level=ERROR] b, [data-level=CRITICAL] b { color: var(--bad); }
[data-status=stopping], [data-status=stopped], [data-level=WARNING] b { color: var(--warn); }
[data-status=pending], [data-status=cancelled], [data-level=DEBUG] { color: var(--quiet); }
.progress { display: flex; align-items: center; gap: 0 0.5rem; white-space: nowrap; }
td .progress { flex-direction: column; align-items: start; }
progress { appearance: none; flex: 0 1 26rem; min-width: 4rem; height: 0.375rem; border: 0; border-radius: 1rem; background: var(--line); overflow: hidden; }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
progress[value="1"]::-webkit-progress-value { background: var(--edge); }
progress[value="1"]::-moz-progress-bar { background: var(--edge); }

pre, #log { margin: 0; padding: 0.625rem 0.75rem; max-height: 26rem; overflow: auto; background: var(--raised); border: 1px solid var(--line); border-radius: 4px; white-space: pre-wrap; }
pre.error { border-left: 3px solid var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 0.75rem 1.25rem; margin: 1.25rem 0; }
dt { color: var(--quiet); font-size: 0.8125rem; }
dd { margin: 0; }
.values { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1.25rem; align-items: start; }
#log { list-style: none; }
.earlier { margin-bottom: 0.5rem; }
#log .twist { min-height: 1.5rem; width: 1.5rem; margin-left: -0.5rem; }
#log [data-around] { padding-left: 1.5rem; background: var(--chosen); }
#log:empty::before { content: "No lines"; color: var(--quiet); }
#log time, #log [data-level=INFO] b { color: var(--quiet); font-weight: normal; }
.empty { margin: 2rem 0; }
.empty pre { width: fit-content; max-width: 100%; }

#dock { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1rem; background: var(--raised); }
#dock:has(:not(:empty)) { padding-block: 0.625rem; border-top: 1px solid var(--line); }
#answer { order: 1; margin: 0; }
dialog { max-width: min(30rem, calc(100% - 2rem)); padding: 1.25rem; background: var(--back); color: var(--text); border: 1px solid var(--edge); border-radius: 6px; }
dialog h2 { margin-top: 0; }
dialog .buttons { justify-content: flex-end; margin-bottom: 0; }
::backdrop { background: rgb(0 0 0 / 0.45); }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem 2rem; }
figure { margin: 0; min-width: 0; }
.chart { position: relative; border-top: 1px dashed var(--line); }
.chart svg { display: block; width: 100%; height: 7.5rem; }
.most { position: absolute; top: 0; right: 0; background: var(--back); padding-left: 0.25rem; }
.axis { display: flex; justify-content: space-between; }
.bar { fill: var(--accent); }
.bad .bar { fill: var(--bad); }
.band { fill: var(--accent); opacity: 0.25; }
.mean { fill: none; stroke: var(--accent); stroke-width: 2; vector-effect: non-scaling-stroke; }
.at { fill: var(--text); opacity: 0.12; }
.base { stroke: var(--edge); vector-effect: non-scaling-stroke; }
figure table { width: auto; }
figure details[open] { max-height: 16rem; overflow: auto; }
td .buttons { margin: 0; }
.cards:not(.jobs) thead th:first-child { padding-left: 0; }

@media (min-width: 80rem) { .filtering > summary { display: none; } }
@media (max-width: 79.99rem) {         /* a row is job and status, then the rest, small, each under its name */
  header, main, #banner, #dock { padding-inline: 0.75rem; }
  #bulk button:disabled, .cards thead th:not(.pick), td:empty, .twist:empty { display: none; }
  .cards, .cards tbody, .cards thead { display: block; }
  .cards tr { display: flex; flex-wrap: wrap; align-items: center; gap: 0 0.875rem; position: relative; padding: 0.25rem 0 0.375rem; border-bottom: 1px solid var(--line); }
  .jobs tr { padding-left: 2.25rem; }
  .cards th, .cards td { border: 0; padding: 0; }
  .pick { position: absolute; left: 0; top: 0.375rem; }
  .cards:not(.jobs) thead { display: none; }
  .jobs thead tr { min-height: 2.5rem; }
  .jobs thead tr::after { content: "Select all"; color: var(--quiet); }
  .cards tbody th { flex: 1 1 calc(100% - 8.875rem); }
  .job { min-width: 0; max-width: none; }
  td[data-label] { order: 2; }
  .job, td[data-label=Status] { font-size: 0.875rem; }
  td[data-label]:not([data-label=Status], [data-label=Progress], [data-label=Actions])::before { content: attr(data-label) " "; color: var(--quiet); }
  td[data-label=Status] { order: 1; flex: 0 0 8rem; text-align: right; white-space: normal; }
  td[data-label=Progress] { order: 1; flex: 1 1 100%; }
  td[data-label=Progress]:has(> small) { display: none; }
  td .progress { flex-direction: row; align-items: center; }
  td progress { flex: 0 1 20rem; }
  td[data-label=Actions] { flex: 1 1 100%; padding: 0.25rem 0; }
}
'''

PAGE_JS = r'''"use strict";

/* The page shows what the JSON interface says and keeps no truth of its own. A view loads data and builds
   elements from it; morph() makes the document look like them. The same happens after every poll and
   once a second, so nothing that draws has to know what was there before. */

const POLL_MS = 1500, TIMEOUT_MS = 20000, PAGE = 50, MOST = 200, LOG_PAGE = 500, LOG_MOST = 2000, LOG_LINES = 10000, CONTEXT = 5;
const BASE = location.origin + location.pathname.replace(/\/jobs\/\d+$|\/[^/]*$/, "/");   // wherever the app has mounted us

const STATUSES = ["pending", "running", "stopping", "stopped", "finished", "failed", "cancelled"];

const OPERATIONS = {       // the button, the word in the answer, and what to say before doing it
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
};

function changesSomething(operation) {       // called with the job as `this`: is there a use in offering it?
  return operation !== (this.low_priority ? "set_low_priority" : "remove_low_priority");
}

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
const svg = (tag, props, ...children) => made(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function made(node, props, children) {
  node.props = props ?? {};
  for (const name in node.props) setProp(node, name, node.props[name]);
  node.append(...children.flat(Infinity).filter(isThere));
  return node;
}

function setProp(node, name, value) {
  const property = name[0] === "." ? name.slice(1) : name === "key" && name;
  if (property) node[property] !== value && (node[property] = value);
  else if (value === "" || isThere(value)) node.setAttribute(name, value === true ? "" : value);
  else node.removeAttribute(name);
}

const isThere = value => value !== undefined && value !== null && value !== false && value !== "";
const flag = (label, props) => el("label", { class: "flag" }, el("input", { type: "checkbox", ...props }), label);
const button = (label, onclick, props) => el("button", { type: "button", ".onclick": onclick, ...props }, label);
const link = (path, ...text) => el("a", { href: BASE + path }, ...text);
const byId = id => document.getElementById(id);

/* Make `old` look like `fresh` by changing only what differs, so that focus, scroll, selected text and
   what someone is typing survive. With ".own" the children are somebody else's business. */
function morph(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const name in old.props) if (!(name in fresh.props)) setProp(old, name, null);
  for (const name in fresh.props) {    // people change properties, but only we change attributes
    if (name[0] === "." || old.props[name] !== fresh.props[name]) setProp(old, name, fresh.props[name]);
  }
  old.props = fresh.props;
  if (!fresh.own && (old.firstChild || fresh.firstChild)) morphChildren(old, [...fresh.childNodes]);
}

const alike = (old, fresh) => old && old.key === fresh.key && old.nodeName === fresh.nodeName;

function morphChildren(parent, children) {
  const olds = [...parent.childNodes];
  if (olds.length === children.length && olds.every((old, i) => alike(old, children[i]))) {
    return olds.forEach((old, i) => morph(old, children[i]));          // nearly always: as quick as it gets
  }
  // What is gone goes first: to move a node takes the focus away from it, so nothing may be in its place.
  const wanted = new Set(children.map(child => child.key)), keyed = new Map();
  for (const old of olds) wanted.has(old.key) ? keyed.set(old.key, old) : old.remove();
  let next = parent.firstChild;
  for (const child of children) {
    const old = child.key === undefined ? next : keyed.get(child.key);
    if (alike(old, child)) {
      if (old === next) next = next.nextSibling;
      else parent.insertBefore(old, next);
      morph(old, child);
    } else {
      parent.insertBefore(child, next);
    }
  }
  for (const rest of [...parent.childNodes].slice(children.length)) rest.remove();
}

// The JSON interface --------------------------------------------------------------------------------------

/* Path -> [ETag, body]. The browser's cache could do this, but would not say that a body is an old one,
   and what counts up from it would jump back at each poll. */
const answers = new Map();
let token = null, readOnly = false;
let ahead = 0;                         // milliseconds that the app's clock is ahead of this one
const now = () => Date.now() + ahead;

async function get(path, signal) {
  const [known, kept] = answers.get(path) ?? [];
  const headers = known ? { "If-None-Match": known } : {};
  const response = await fetch(BASE + path, { signal, headers, cache: "no-store" });
  if (response.status === 304) return kept;
  const body = await bodyOf(response), etag = response.headers.get("ETag");
  body.atLeast = response.headers.get("X-Bgjobs-At-Least")?.split(",") ?? [];      // the statuses that were not counted to the end
  const off = Date.parse(response.headers.get("Date")) - Date.now();
  ahead = Math.abs(off) > 5000 ? off : 0;                // less is the way here
  for (const each of body.jobs ?? [body]) each.at = now();
  if (answers.size > 200) answers.clear();
  if (etag) answers.set(path, [etag, body]);
  return body;
}

/* Throws an Error with a `status` when the app has answered, but not with what was asked for. */
async function bodyOf(response) {
  const body = await response.json().catch(() => ({})), { status } = response;
  if (response.ok || body.refused) return body;
  throw Object.assign(new Error(body.error ?? `The app answered with status ${status}.`), { status });
}

async function session() {
  if (!token) ({ token, read_only: readOnly } = await fetch(BASE + "api/session", { cache: "no-store" }).then(bodyOf));
}

async function post(path, body, again = true) {
  await session();
  const headers = { "Content-Type": "application/json", "X-Bgjobs-Token": token };
  const response = await fetch(BASE + path, { method: "POST", headers, body: JSON.stringify(body) });
  if (response.status === 403 && again) {                // the app was started again since we asked
    token = null;
    return post(path, body, false);
  }
  return bodyOf(response);
}

// Words ---------------------------------------------------------------------------------------------------

const two = number => String(number).padStart(2, "0");
const grouped = new Intl.NumberFormat("en");
const count = number => number > 10000 ? "10,000+" : grouped.format(number);
const percent = progress => Math.floor(progress * 100) + "%";
const nameOf = job => /[^\s\p{Cf}]/u.test(job.label ?? "") ? job.label : job.name;      // a label that nobody sees is none
const named = job => `\u2068${nameOf(job)}\u2069`;         // in a text: whatever its direction, the rest keeps its own

function when(seconds, inFull) {
  if (seconds === null) return null;
  const date = new Date(seconds * 1000);
  if (isNaN(date)) return String(seconds);
  const day = [date.getFullYear(), two(date.getMonth() + 1), two(date.getDate())].join("-");
  const clock = date.toTimeString().slice(0, 8);
  const isToday = date.toDateString() === new Date().toDateString();
  const text = inFull ? `${day} ${clock}` : isToday ? clock : `${day} ${clock.slice(0, 5)}`;
  return el("time", { datetime: date.toISOString(), title: date.toISOString() }, text);
}

function span(seconds) {
  if (seconds < 10) return (seconds && seconds.toFixed(seconds < 1 ? 2 : 1)) + " s";
  const [days, hours, minutes] = [seconds / 86400, seconds / 3600, seconds / 60].map(Math.floor);
  if (days) return `${days} d ${two(hours % 24)} h`;
  if (hours) return `${hours} h ${two(minutes % 60)} min`;
  return minutes ? `${minutes} min ${two(Math.floor(seconds % 60))} s` : `${Math.floor(seconds)} s`;
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

function childrenOf({ children: { total, done, failed, running } }) {
  return total > 0 && [`${count(done)} of ${count(total)} done`, running && `${count(running)} running`,
    failed && `${count(failed)} failed`].filter(Boolean).join(", ");
}

const status = job => el("span", { class: "status", "data-status": job.status }, job.status);

const progress = job => job.progress === null ? eta(job) : job.status === "finished" ? el("small", null, "100%") : el("div", { class: "progress", title: job.message },
  el("progress", { max: 1, value: job.progress, "aria-label": `Progress of job ${job.id}` }),
  el("small", null, [percent(job.progress), eta(job)].filter(Boolean).join(", ")));

// The table of jobs ---------------------------------------------------------------------------------------

const COLUMNS = [
  ["Create date", job => when(job.created_at)],
  ["Waiting", waiting],
  ["Start date", job => when(job.started_at)],
  ["Duration", duration],
  ["Status", job => [status(job), job.phase && el("small", null, job.phase)]],
  ["Errors", job => job.errors > 0 && el("b", { class: "bad" }, count(job.errors))],
  ["Low priority", job => job.low_priority && "yes"],
  ["Run by", job => job.run_by],
  ["Progress", progress],
  ["Children", childrenOf],
];

const opened = new Map();              // path of a row ("7", "7/9") -> how many of its children to show
const selected = new Set();            // ids
let everything = false;                // all that match the filters are, also those that are not shown
let shown = new Map();                 // id -> job, for every row on the page

/* Fetch the children of every row that is open, however deep. */
async function loadOpened(jobs, prefix, signal) {
  await Promise.all(jobs.map(async job => {
    const limit = opened.get(prefix + job.id);
    const kids = limit ? await get(`api/jobs?parent=${job.id}&system=true&limit=${limit}`, signal) : null;
    if (kids) await loadOpened(kids.jobs, prefix + job.id + "/", signal);
    job.kids = kids;
  }));
}

function jobTable(jobs, prefix = "", more = null) {
  const ids = jobs.map(job => job.id), chosen = ids.filter(id => selected.has(id)).length;
  const pickAll = event => pick(ids, event.target.checked);
  return el("table", { key: "table", class: "cards jobs" },
    el("thead", null, el("tr", null,
      el("th", { class: "pick" }, checkbox("Select all", chosen > 0 && chosen === ids.length, pickAll)),
      ["Job", ...COLUMNS.map(([title]) => title)].map(title => el("th", { scope: "col" }, title)))),
    el("tbody", null, jobs.map(job => jobRows(job, prefix, 0)), more));
}

function jobRows(job, prefix, depth) {
  shown.set(job.id, job);
  const path = prefix + job.id, kids = opened.has(path) && job.kids;
  const row = el("tr", { key: path, class: selected.has(job.id) && "selected" },
    el("td", { class: "pick" },
      checkbox(`Select job ${job.id}`, selected.has(job.id), event => pick([job.id], event.target.checked))),
    el("th", { scope: "row" }, el("div", { class: "job" },
      Array.from({ length: Math.min(depth, 8) }, () => el("span", { class: "indent" })),
      job.children.total > 0 ? disclosure(job, path) : el("span", { class: "twist" }),
      el("span", null, link(`jobs/${job.id}`, el("bdi", null, nameOf(job))), " ", el("small", null, `#${job.id}`)))),
    COLUMNS.map(([title, cell]) => el("td", { "data-label": title }, cell(job))));
  return [row, kids && kids.jobs.map(kid => jobRows(kid, path + "/", depth + 1)), kids && moreRow(job, path, kids)];
}

const checkbox = (label, checked, onchange) => el("label", null,
  el("input", { type: "checkbox", "aria-label": label, ".checked": checked, ".onchange": onchange }));

function disclosure(job, path) {
  const open = opened.has(path);
  const toggle = () => (open ? opened.delete(path) : opened.set(path, PAGE), poll());
  return button(open ? "\u25be" : "\u25b8", toggle,
    { class: "twist", "aria-expanded": String(open), "aria-label": `Children of job ${job.id}` });
}

/* The way to the children that are not shown; beyond MOST of them, a list of their own. */
function moreRow(job, path, { jobs, next }) {
  if (next === null) return null;
  const way = jobs.length < MOST
    ? button("More children", () => (opened.set(path, Math.min(MOST, jobs.length + PAGE)), poll()))
    : link(`?parent=${job.id}`, "All children as a list");
  return el("tr", { key: path + "/more" }, el("td", { class: "more", colspan: COLUMNS.length + 2 }, way));
}

function pick(ids, on) {
  everything = false;
  for (const id of ids) on ? selected.add(id) : selected.delete(id);
  draw();
}

// Operations ----------------------------------------------------------------------------------------------

function bulkBar() {
  const ids = [...selected];
  const clear = () => (say(""), selected.clear(), everything = false, draw());
  if (everything) return [
    el("b", null, `All ${matching(here)} that match`),
    Object.keys(OPERATIONS).map(name => operationButton(name, null)),
    button("Clear selection", clear),
  ];
  if (!ids.length) return byId("answer").textContent ? [button("Close", () => (say(""), draw()))] : [];
  const allowed = new Set(ids.flatMap(id => shown.get(id).operations.filter(changesSomething, shown.get(id))));
  return [
    el("b", null, `${ids.length} selected`),
    here.view.load === loadList && allowed.size > 0 && (here.data.next !== null || here.query.has("before"))
      && button(`Select all ${matching(here)} that match`, () => (everything = true, draw())),
    Object.keys(OPERATIONS).map(name => operationButton(name, ids, { disabled: !allowed.has(name) })),
    button("Clear selection", clear),
  ];
}

/* How many jobs pass all filters, in words. */
function matching({ query, data: { counts, atLeast } }) {
  const names = query.has("status") ? [query.get("status")] : STATUSES;
  const sum = names.reduce((total, name) => total + (counts[name] ?? 0), 0);
  return grouped.format(sum) + (names.some(name => counts[name] > 10000 || atLeast.includes(name)) ? "+" : "");
}

const operationButton = (name, ids, props) =>
  button(OPERATIONS[name][0], () => operate(name, ids), { key: name, ...props });

async function operate(operation, ids) {
  const [label, , grave] = OPERATIONS[operation];
  const whom = !ids ? `all ${matching(here)} jobs that match` : ids.length === 1 ? `job ${ids[0]} (${named(shown.get(ids[0]))})`
    : `${ids.length} jobs`;
  const warning = [!ids && "It goes to each job that passes the filters now, also to those that are not shown.", grave].filter(Boolean).join(" ");
  const body = ids ? { ids } : { filter: filterOf(here.query) };
  if (warning && !await confirmed(`${label} ${whom}?`, warning, `Yes, ${label.toLowerCase()}`)) return;
  if (!ids) say("Working on it\u2026");
  try {
    say(describe(operation, await post("api/jobs/" + operation, body)));
  } catch (error) {
    say(error.status ? error.message : "The app did not answer, so it is not known whether this was done.");
  }
  poll();
}

function describe(operation, { done, refused }) {
  const reasons = [...new Set(refused.map(({ why }) => why))];
  const rest = reasons.length > 3 ? `, and ${reasons.length - 3} other reasons` : "";
  return [
    (done.length || !refused.length) && `${done.length} ${OPERATIONS[operation][1]}`,
    refused.length && `${refused.length} refused: ${reasons.slice(0, 3).join(". ")}${rest}`,
  ].filter(Boolean).join(", ");
}

/* Tell people when what they asked for comes to nothing. */
const attempted = promise => promise.catch(error => say(error.message)).finally(draw);
const say = text => byId("answer").textContent = text;

function confirmed(title, text, yes) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  byId("confirm-yes").onclick = () => dialog.close("yes");
  byId("confirm-no").onclick = () => dialog.close("no");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => dialog.onclose = () => resolve(dialog.returnValue === "yes"));
}

// The list ------------------------------------------------------------------------------------------------

const TEXTS = [["q", "Text", "search"], ["name", "Name", "search"], ["run_by", "Run by", "search"],
  ["created_from", "Created from", "datetime-local"], ["created_to", "Created to", "datetime-local"]];
const FLAGS = [["errors", "With errors"], ["low_priority", "Low priority"], ["system", "System jobs"],
  ["children", "Children too"]];
const isOn = value => value === "true" || value === "1";
let filtersOpen = false;               // where the window is narrow

/* The page's query string is the interface's, but for local times and for children, who are left out. */
function listPath(query) {
  const asked = new URLSearchParams(query);
  for (const name of ["created_from", "created_to"]) {
    if (asked.has(name)) asked.set(name, new Date(asked.get(name)) / 1000);
  }
  if (!isOn(asked.get("children")) && !asked.has("parent")) asked.set("parent", "none");
  asked.delete("children");
  asked.set("limit", PAGE);
  return "api/jobs?" + asked;
}

/* What passes the filters, for operations and exports, as the interface has it. */
function filterOf(query) {
  const asked = new URLSearchParams(listPath(query).split("?")[1]);
  asked.delete("limit"), asked.delete("before");
  return Object.fromEntries(asked);
}

const withParam = (query, changes) => {
  const params = new URLSearchParams(query);
  params.delete("before");
  for (const [name, value] of Object.entries(changes)) value ? params.set(name, value) : params.delete(name);
  return String(params) && "?" + params;
};

const loadList = async ({ query }, signal) => {
  const answer = await get(listPath(query), signal);
  await loadOpened(answer.jobs, "", signal);
  return answer;
};

function drawList({ query, data: { jobs, next, counts, atLeast } }) {
  const filtered = [...query.keys()].length > 0, parent = query.get("parent");
  const busy = ["running", "failed"].filter(name => counts[name]).map(name => `${count(counts[name])} ${name}`);
  document.title = `${busy.join(", ") || "Jobs"} - bgjobs`;
  markIcon(counts);
  const isPart = next !== null && jobs.length < PAGE;    // the time was up
  const nothingMatches = el("p", { key: "empty", class: "empty" },
    isPart ? `None of the jobs from #${next} on matches. ` : "No job matches the filters. ", link("", "Show all jobs"));
  return [
    el("h1", { tabindex: -1 }, parent ? ["Children of ", link(`jobs/${parent}`, `job ${parent}`)] : "Jobs"),
    tabs(query, counts, atLeast),
    filterForm(query),
    jobs.length ? jobTable(jobs) : filtered ? nothingMatches : firstSteps(),
    el("nav", { key: "pages", "aria-label": "Pages", class: "pages" },
      query.has("before") && link(withParam(query, {}), "Newest"),
      next !== null && link(withParam(query, { before: next }), isPart ? `Search on before #${next}` : "Older"),
      jobs.length > 0 && [el("span", { class: "spring" }), "Export all that match: ",
        ["csv", "json"].map(format => el("a", { href: `${BASE}api/export?${new URLSearchParams({ ...filterOf(query), format })}`,
          download: "" }, format.toUpperCase()))]),
  ];
}

/* A dot on the tab's icon: red for failed jobs, green for running ones. */
let bareIcon;
function markIcon(counts) {
  const icon = byId("icon"), colour = counts.failed ? "%23ff5a4f" : counts.running ? "%2344c767" : null;
  bareIcon ??= icon.getAttribute("href");
  const dot = colour ? `%3Ccircle cx='12' cy='12' r='4' fill='${colour}' stroke='%23fff'/%3E` : "";
  const href = bareIcon.replace("%3C/svg%3E", dot + "%3C/svg%3E");
  if (icon.getAttribute("href") !== href) icon.setAttribute("href", href);
}

function tabs(query, counts, atLeast) {
  const tab = (name, number) => el("li", null, el("a", {
    href: BASE + withParam(query, { status: name }),
    "aria-current": (query.get("status") ?? "") === name && "true",
  }, name || "all", " ", el("small", null, number)));
  const counted = name => count(counts[name] ?? 0) + (atLeast.includes(name) && counts[name] <= 10000 ? "+" : "");
  return el("nav", { key: "tabs", "aria-label": "Status" },
    el("ul", { class: "tabs" }, tab("", matching({ query: new URLSearchParams(), data: { counts, atLeast } })),
      STATUSES.map(name => tab(name, counted(name)))));
}

function filterForm(query) {
  const active = [...TEXTS, ...FLAGS].filter(([name]) => query.has(name)).length;
  const toggle = () => { filtersOpen = !filtersOpen; };
  return el("details", { key: "filters", class: "filtering", open: filtersOpen || matchMedia("(min-width: 80rem)").matches },
    el("summary", { ".onclick": toggle }, active ? `Filters (${active})` : "Filters"),
    el("form", { id: "filters", ".oninput": filterSoon, ".onsubmit": filterNow },
      TEXTS.map(([name, label, type]) => el("label", null, label, el("input", { name, type, value: query.get(name) }))),
      el("div", { class: "flags" }, FLAGS.map(([name, label]) =>
        flag(label, { name, value: "true", checked: isOn(query.get(name)) }))),
      active > 0 && link(withParam("", { status: query.get("status") }), "Clear filters")));
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
  const entered = new FormData(byId("filters"));
  const kept = new URLSearchParams(location.search);     // a box has no way to say that something must be false
  const changes = Object.fromEntries([...TEXTS, ...FLAGS].map(([name]) =>
    [name, entered.get(name) ?? (isOn(kept.get(name)) ? null : kept.get(name))]));
  history.replaceState(null, "", BASE + withParam(location.search, changes));
  visit({ typed: true });
}

const firstSteps = () => el("section", { key: "empty", class: "empty" },
  el("p", null, "There are no jobs yet. Any importable function is one:"),
  el("pre", null, `import bgjobs

def export(table):
    job = bgjobs.current_job()
    for row in job.each(read(table)):    # progress, ETA and a place to stop
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
const LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"];

async function loadJob(here, signal) {
  const [id] = here.args, root = "job/" + id;
  if (!opened.has(root)) opened.set(root, PAGE);
  const log = here.log ??= { ...NO_LOG, job: id, level: "", text: "", regex: "", tree: "", follow: true, top: 0 };
  try {
    const [job, { attempts, positions }] = await Promise.all([get("api/jobs/" + id, signal), get(`api/jobs/${id}/attempts`, signal),
      loadLines(log, signal)]);
    await loadOpened([job], "job/", signal);
    const stack = runs(job) && (here.stack ?? job.status === "stopping") ? (await get(`api/jobs/${id}/stack`, signal)).stack : null;
    return { job, stack, attempts, positions };
  } catch (error) {
    if (error.status === 404) return { missing: error.message };
    throw error;
  }
}

function drawJob({ data: { job, stack, attempts, positions, missing }, log }) {
  if (missing) return [el("h1", { tabindex: -1 }, "No such job"), el("p", null, missing, " ", link("", "All jobs"))];
  shown.set(job.id, job);
  const percentage = runs(job) && job.progress !== null ? ` ${percent(job.progress)}` : "";
  document.title = `${job.status}${percentage} - ${named(job)} - bgjobs`;
  const { id, root_id: root, parent_id: parent, kids } = job, path = `job/${id}`;
  return [
    el("nav", { key: "path", class: "path", "aria-label": "Path" }, link("", "Jobs"),
      root !== id && [" / ", link(`jobs/${root}`, `root job ${root}`)],
      parent !== null && parent !== root && [" / ", link(`jobs/${parent}`, `parent job ${parent}`)]),
    el("h1", { tabindex: -1 }, el("bdi", null, nameOf(job)), " ", el("small", null, `#${id}`)),
    el("p", { key: "status" }, status(job), job.phase && `, ${job.phase}`, " ",
      el("small", null, WHY[job.phase] ?? WHY[job.status], " ", resumesAt(job, positions))),
    el("p", { key: "operations", class: "buttons" }, job.operations.filter(changesSomething, job)
      .map(name => operationButton(name, [id]))),
    el("div", { key: "progress" }, progress(job), el("small", null, job.message)),
    runs(job) && stackSection(job, stack),
    job.error && section("Error", el("pre", { class: "error", tabindex: 0 }, job.error)),
    el("dl", { key: "fields" }, FIELDS.map(([title, field]) => [title, field(job)]).map(([title, value]) =>
      isThere(value) && el("div", { key: title }, el("dt", null, title), el("dd", null, value)))),
    el("div", { key: "values", class: "values" }, BLOCKS.map(([name, title]) => !isEmpty(job[name])
      && section(title, el("pre", { tabindex: 0 }, JSON.stringify(job[name], null, 2))))),
    attempts.length > 1 && section("Attempts", attemptTable(attempts)),
    kids?.jobs.length > 0 && section("Children", jobTable(kids.jobs, path + "/", moreRow(job, path, kids))),
    logSection(log),
  ];
}

/* Where the next attempt would go on, for a job that has begun and may have one. */
function resumesAt(job, positions) {
  if (job.attempt === 0 || job.phase === "waiting for children" || ["finished", "cancelled"].includes(job.status)) return null;
  const saved = [positions.some(Boolean) && `after item ${positions.map(count).join(", then ")} of job.each()`, job.state !== null && "with the saved state below"];
  return `${runs(job) ? "Interrupted now, it would go on" : "It would go on"} ${saved.filter(Boolean).join(", ") || "from its beginning: nothing is saved"}.`;
}

const ATTEMPT_COLUMNS = [
  ["Start", each => when(each.started_at, true)], ["End", each => when(each.ended_at, true)],
  ["Took", each => each.started_at !== null && span(Math.max(0, (each.ended_at ?? now() / 1000) - each.started_at))],
  ["Outcome", each => each.outcome ?? "under way"], ["Error", each => each.error && el("code", null, each.error)],
];

const attemptTable = attempts => el("table", { class: "cards" },
  el("thead", null, el("tr", null, ["Attempt", ...ATTEMPT_COLUMNS.map(([title]) => title)].map(title => el("th", { scope: "col" }, title)))),
  el("tbody", null, attempts.map(each => el("tr", { key: each.attempt }, el("th", { scope: "row" }, String(each.attempt)),
    ATTEMPT_COLUMNS.map(([title, cell]) => el("td", { "data-label": title }, cell(each)))))));

/* Why is it still stopping? Here is where its thread is. */
function stackSection(job, stack) {
  const open = here.stack ?? job.status === "stopping";
  const toggle = event => { event.preventDefault(), here.stack = !open, draw(), poll(); };
  return el("details", { key: "stack", class: "stack", open },
    el("summary", { ".onclick": toggle }, job.status === "stopping" ? "Where it is, on its way to a checkpoint" : "Where it is now"),
    open && el("pre", { tabindex: 0 }, stack ?? "No thread of this process executes it: it runs in another process, or waits for children."));
}

const section = (title, ...content) => el("section", { key: title }, el("h2", null, title), ...content);
const isEmpty = value => value === null || typeof value === "object" && Object.keys(value).length === 0;

/* What a log starts with: none of its lines on the page, neither `fresh` ones to append nor `earlier` ones to put before the
   `first`; the last one known is `after`. */
const NO_LOG = { after: "", first: null, isWhole: false, wrong: "", get fresh() { return []; }, get earlier() { return []; } };

const linesPath = (log, more) => `api/jobs/${log.job}/logs?` + new URLSearchParams(Object.entries(
  { level: log.level, text: log.text, tree: log.tree, ...more }).filter(([, value]) => value));

async function loadLines(log, signal) {
  const { logs } = await get(linesPath(log, { after: log.after, limit: LOG_PAGE }), signal);
  const wanted = await matchingLines(log, logs);
  log.fresh.push(...wanted);
  log.after = logs.at(-1)?.id ?? log.after;
  if (!log.first) log.isWhole = logs.length < LOG_PAGE, log.first = logs[0];
  while (log.regex && !log.isWhole) await loadEarlier(log, signal);        // it is looked for in all lines
}

async function loadEarlier(log, signal) {
  const { logs } = await get(linesPath(log, { until: log.first.at, limit: LOG_MOST }), signal);
  const earlier = logs.filter(({ id }) => id < log.first.id);
  log.isWhole = logs.length < LOG_MOST || !earlier.length;
  log.first = earlier[0] ?? log.first;
  log.earlier.unshift(...await matchingLines(log, earlier));
}

/* The lines are appended by drawLines(); another filter is another log, so it starts with an empty list. */
function logSection(log) {
  const refilter = name => event => {
    const { value, checked, type } = event.target;
    here.log = { ...here.log, [name]: type === "checkbox" ? checked : value, ...NO_LOG };
    poll();
  };
  const follow = on => { log.follow = on; draw(); drawLines(here, on); };
  const scrolled = ({ target: { scrollTop, clientHeight, scrollHeight } }) => {      // by a person, who went up
    if (log.follow && scrollTop < log.top && scrollTop + clientHeight < scrollHeight - 40) follow(false);
    log.top = scrollTop;
  };
  return section("Log",
    el("p", { class: "filters" },
      el("label", null, "Level", el("select", { ".value": log.level, ".onchange": refilter("level") },
        el("option", { value: "" }, "all"), LEVELS.map(name => el("option", { value: name }, `${name} and above`)))),
      el("label", null, "Text", el("input", { type: "search", ".value": log.text, ".oninput": refilter("text") })),
      el("label", null, "Regex", el("input", { type: "search", ".value": log.regex, ".oninput": refilter("regex"),
        "aria-invalid": log.wrong ? "true" : null, "aria-describedby": log.wrong ? "regex-wrong" : null })),
      flag("Children too", { ".checked": Boolean(log.tree), ".onchange": refilter("tree") }),
      flag("Follow", { ".checked": log.follow, ".onchange": event => follow(event.target.checked) })),
    log.wrong && el("p", { key: "wrong", id: "regex-wrong", class: "bad" }, log.wrong),
    !log.isWhole && button("Earlier lines", () => attempted(loadEarlier(log)), { key: "earlier", class: "earlier" }),
    el("ol", { id: "log", key: log, ".own": true, ".onscroll": scrolled, tabindex: 0, "aria-label": "Log lines" }));
}

/* The lines that the log's expression is found in. It is tried here, so that a slow one keeps nobody's app busy, and in a
   worker, so that it does not keep the page busy either. */
async function matchingLines(log, lines) {
  if (!log.regex || log.wrong || !lines.length) return log.wrong ? [] : lines;
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

function drawLines({ log, data }, toTheEnd = log.fresh.length > 0) {
  if (data.missing) return;
  const list = byId("log"), isPart = log.level || log.text || log.regex;
  const around = { class: "twist", "aria-expanded": "false", "aria-label": "The lines around this one", title: "The lines around this one" };
  const drawn = lines => lines.splice(0).map(line =>
    logLine(line, log.tree, isPart && button("\u2195", ({ currentTarget }) => attempted(toggleContext(line, currentTarget)), around)));
  const height = list.scrollHeight, earlier = drawn(log.earlier);
  list.prepend(...earlier);
  if (earlier.length) list.scrollTop += list.scrollHeight - height;
  list.append(...drawn(log.fresh));
  while (list.childElementCount > LOG_LINES) list.firstChild.remove();
  if (log.follow && toTheEnd) list.scrollTop = list.scrollHeight;
}

const logLine = ({ job_id, at, level, message }, tree, tool, surrounds) => el("li", { "data-level": level, "data-around": surrounds },
  tool, when(at), " ", tree && [link(`jobs/${job_id}`, `#${job_id}`), " "], el("b", null, level), " ", message);

/* Show, or hide, what a line's job logged before and after it, whatever the filters say. */
async function toggleContext(line, toggle) {
  const item = toggle.parentElement, isOpen = toggle.getAttribute("aria-expanded") === "true";
  toggle.setAttribute("aria-expanded", String(!isOpen));
  for (const old of byId("log").querySelectorAll(`[data-around="${line.id}"]`)) old.remove();
  if (isOpen) return;
  here.log.follow = false;             // somebody reads
  const lines = `api/jobs/${line.job_id}/logs?limit=`;
  const [before, after] = await Promise.all([get(`${lines}${CONTEXT + 1}&until=${line.at}`), get(`${lines}${CONTEXT}&after=${line.id}`)]);
  const made = logs => logs.map(each => logLine(each, here.log.tree, null, line.id));
  if (toggle.getAttribute("aria-expanded") === "true") {
    item.before(...made(before.logs.filter(({ id }) => id < line.id)));
    item.after(...made(after.logs));
  }
}

// Schedules -----------------------------------------------------------------------------------------------

const loadSchedules = async (here, signal) => (await session(), get("api/schedules", signal));

function drawSchedules({ data: { schedules } }) {
  document.title = "Schedules - bgjobs";
  return [
    el("h1", { tabindex: -1 }, "Schedules"),
    schedules.length ? el("table", { key: "table", class: "cards" },
      el("thead", null, el("tr", null, ["Function", ...SCHEDULE_COLUMNS.map(([title]) => title), "Actions"]
        .map(title => el("th", { scope: "col" }, title)))),
      el("tbody", null, schedules.map(scheduleRow)))
      : el("section", { key: "empty", class: "empty" },
        el("p", null, "There are no schedules yet. This makes a job each night:"),
        el("pre", null, 'bgjobs.every("30 2 * * *", clean_up, tz="UTC")')),
  ];
}

const SCHEDULE_COLUMNS = [
  ["Schedule", each => [el("code", null, each.schedule), each.tz && el("small", null, each.tz)]],
  ["Next", each => each.next_at !== null ? [when(each.next_at), el("small", null, until(each.next_at))]
    : each.paused ? "paused" : el("span", { class: "bad" }, "not in the code of any running process")],
  ["Last", each => when(each.last_at)],
  ["Last job", each => each.job_id && [link(`jobs/${each.job_id}`, `#${each.job_id}`), " ",
    each.job_status ? status({ status: each.job_status }) : el("small", null, "removed since")]],
  ["Runs", each => count(each.runs)],
  ["Skipped", each => each.skipped > 0 && count(each.skipped)],
];

function until(at) {
  const seconds = at - now() / 1000;
  return seconds > 0 ? `in ${span(Math.ceil(seconds))}` : "due";
}

function scheduleRow(each) {
  const act = (label, name) => button(label, () => operateSchedule(name, each), { key: name, "aria-label": `${label}: ${named(each)}` });
  return el("tr", { key: each.id },
    el("th", { scope: "row" }, el("bdi", { title: each.name }, nameOf(each))),
    SCHEDULE_COLUMNS.map(([title, cell]) => el("td", { "data-label": title }, cell(each))),
    el("td", { "data-label": "Actions" }, !readOnly && el("div", { class: "buttons" },
      act("Run now", "run_now"), each.paused ? act("Resume", "resume") : act("Pause", "pause"), !each.registered && act("Remove", "remove"))));
}

async function operateSchedule(operation, { id, label, name }) {
  if (operation === "remove" && !await confirmed(`Remove the schedule of ${named({ label, name })}?`,
    "Its jobs stay. It comes back when the app registers it again.", "Yes, remove")) return;
  try {
    const { refused } = await post("api/schedules/" + operation, { ids: [id] });
    say(refused.length ? refused[0].why : { run_now: "Submitted", pause: "Paused", resume: "Resumed", remove: "Removed" }[operation]);
  } catch (error) {
    say(error.status ? error.message : "The app did not answer, so it is not known whether this was done.");
  }
  poll();
}

// Statistics ----------------------------------------------------------------------------------------------

const WINDOWS = [["1h", "1 hour"], ["24h", "24 hours"], ["7d", "7 days"], ["30d", "30 days"]];
const CHARTS = [          // title, the value of a part (or its average, with a band from least to most), how to say it
  ["Created", part => part.created, count],
  ["Failed", part => part.failed, count, "bad"],
  ["Waiting", part => part.waiting, span],
  ["Run time", part => part.running, span],
];
const CHART_WIDTH = 600, CHART_HEIGHT = 120;

async function loadStatistics({ query }, signal) {
  const asked = new URLSearchParams({ window: query.get("window") ?? "24h" });
  if (query.has("name")) asked.set("name", query.get("name"));
  return get("api/stats?" + asked, signal);
}

function drawStatistics({ query, data }) {
  document.title = "Statistics - bgjobs";
  const at = changes => "statistics" + withParam(query, changes);
  return [
    el("h1", { tabindex: -1 }, "Statistics", query.has("name") && [" of ", el("code", null, query.get("name"))]),
    el("nav", { key: "windows", "aria-label": "Window" }, el("ul", { class: "tabs" }, WINDOWS.map(([window, label]) => el("li", null,
      el("a", { href: BASE + at({ window }), "aria-current": data.window === window && "true" }, label))),
    query.has("name") && el("li", null, link(at({ name: "" }), "All functions")))),
    el("div", { key: "charts", class: "charts" }, CHARTS.map(chart => figure(data, ...chart))),
    data.functions.length > 0 && section("Functions", el("table", { class: "cards" },
      el("thead", null, el("tr", null, ["Function", ...FUNCTION_COLUMNS.map(([title]) => title)].map(title => el("th", { scope: "col" }, title)))),
      el("tbody", null, [...data.functions].sort((a, b) => b.created - a.created || (a.name < b.name ? -1 : 1)).map(each =>
        el("tr", { key: each.name }, el("th", { scope: "row" }, link(at({ name: each.name }), each.name)),
          FUNCTION_COLUMNS.map(([title, cell]) => el("td", { "data-label": title }, cell(each)))))))),
  ];
}

const measured = value => value && `${span(value.avg)} (${span(value.min)} \u2013 ${span(value.max)})`;
const FUNCTION_COLUMNS = [
  ["Created", each => count(each.created)], ["Started", each => count(each.started)], ["Finished", each => count(each.finished)],
  ["Failed", each => each.failed > 0 && el("b", { class: "bad" }, count(each.failed))],
  ["Waiting", each => measured(each.waiting)], ["Run time", each => measured(each.running)],
];

const clock = (seconds, window) => {
  const date = new Date(seconds * 1000), time = `${two(date.getHours())}:${two(date.getMinutes())}`;
  return ["1h", "24h"].includes(window) ? time : `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${time}`;
};

function figure(data, title, valueOf, say, tone) {
  const { parts, window } = data, isBand = title === "Waiting" || title === "Run time";
  const values = parts.map(valueOf), most = Math.max(0, ...values.map(value => isBand ? value?.max ?? 0 : value));
  const top = most || 1, step = CHART_WIDTH / parts.length, y = value => CHART_HEIGHT - value / top * (CHART_HEIGHT - 4);
  const total = valueOf(data.total), at = here.pointed?.title === title ? Math.min(here.pointed.index, parts.length - 1) : null;
  const text = index => `${clock(parts[index].at, window)} \u2013 ${clock(parts[index + 1]?.at ?? data.to, window)}: `
    + (isBand ? measured(values[index]) ?? "no job" : say(values[index]));
  const point = index => { here.pointed = index === null ? null : { title, index }; draw(); };
  const follow = ({ currentTarget, clientX }) => {
    const { left, width } = currentTarget.getBoundingClientRect();
    point(Math.max(0, Math.min(parts.length - 1, Math.floor((clientX - left) / width * parts.length))));
  };
  const keys = { ArrowLeft: -1, ArrowRight: 1, Home: -parts.length, End: parts.length };
  const move = event => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    point(Math.max(0, Math.min(parts.length - 1, (at ?? parts.length) + keys[event.key])));
  };
  return el("figure", { key: title },
    el("figcaption", null, el("b", null, title), " ", el("small", { role: "status" }, at !== null ? text(at)
      : isBand ? total ? `${measured(total)}` : "no job" : `${say(total)} in all`)),
    el("div", { class: "chart" },
      el("small", { class: "most", "aria-hidden": "true" }, most ? say(most) : ""),
      svg("svg", { viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`, preserveAspectRatio: "none", tabindex: 0, role: "img", class: tone,
        "aria-label": `${title}, ${isBand ? measured(total) ?? "no job" : `${say(total)} in all`}. Arrow keys read the parts.`,
        ".onpointermove": follow, ".onpointerleave": () => point(null), ".onkeydown": move, ".onblur": () => point(null) },
      at !== null && svg("rect", { key: "at", class: "at", x: at * step, y: 0, width: step, height: CHART_HEIGHT }),
      isBand ? bands(values, step, y) : values.map((value, index) => value > 0 && svg("rect", { key: index, class: "bar",
        x: index * step + step * 0.1, width: step * 0.8, y: y(value), height: CHART_HEIGHT - y(value) })),
      svg("line", { key: "base", class: "base", x1: 0, x2: CHART_WIDTH, y1: CHART_HEIGHT, y2: CHART_HEIGHT }))),
    el("div", { class: "axis", "aria-hidden": "true" }, el("small", null, clock(data.from, window)), el("small", null, clock(data.to, window))),
    el("details", null, el("summary", null, "Data"), el("table", null,
      el("thead", null, el("tr", null, ["From", title].map(name => el("th", { scope: "col" }, name)))),
      el("tbody", null, parts.map((part, index) => [part, values[index]]).filter(([, value]) => value).map(([part, value]) =>
        el("tr", { key: part.at }, el("th", { scope: "row" }, clock(part.at, window)), el("td", null, isBand ? measured(value) : say(value))))))));
}

/* For each run of parts that have values: a band from the least to the most, and a line through the averages. */
function bands(values, step, y) {
  const runsOf = [];
  values.forEach((value, index) => {
    if (!value) return;
    if (index === 0 || !values[index - 1]) runsOf.push([]);
    runsOf.at(-1).push([index, value]);
  });
  return runsOf.map(run => {
    const edges = (name, list = run) => list.flatMap(([index, value]) => [[index, value], [index + 1, value]])
      .map(([x, value]) => `${x * step},${y(value[name])}`);
    const [first] = run[0];
    return svg("g", { key: first },
      svg("path", { class: "band", d: `M${edges("max").join("L")}L${edges("min").reverse().join("L")}Z` }),
      svg("path", { class: "mean", d: `M${edges("avg").join("L")}` }));
  });
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
  const first = here === null;
  here = { ...routeOf(location.pathname) ?? { view: VIEWS[0], args: [] }, query: new URLSearchParams(location.search), data: null };
  everything = false;
  if (!typed) selected.clear(), say("");
  byId("main").setAttribute("aria-busy", "true");
  here.arrive = () => {
    byId("main").removeAttribute("aria-busy");
    if (typed || first) return;
    byId("filters")?.reset();          // to the values of the address
    byId("main").querySelector("h1").focus({ preventScroll: true });
    scrollTo(0, scroll);
  };
  poll();
}

const abandonedIn = ({ abandoned, workers, pid, host }) =>
  `In process ${pid} on ${host}: ${abandoned} force-stopped ${abandoned > 1 ? "attempts have" : "attempt has"} not ended yet. `
  + (abandoned < 2 * workers ? `At ${2 * workers} of them it takes no more jobs.` : "It takes no more jobs until some of them do.");

async function poll() {
  clearTimeout(timer);
  polling?.abort();
  const mine = polling = new AbortController(), late = setTimeout(() => mine.abort(), TIMEOUT_MS);
  let trouble = "";
  try {
    const [data, { runners }] = await Promise.all([here.view.load(here, mine.signal), get("api/runners", mine.signal)]);
    if (mine === polling) here.data = data;
    trouble = runners.filter(runner => runner.abandoned).map(abandonedIn).join(" ");
  } catch (error) {
    trouble = error.status ? error.message : "The connection to the app is lost. Trying again.";
    if (mine === polling && error.status) here.refused = error.message;
  }
  clearTimeout(late);
  if (mine !== polling) return;        // somebody could not wait for the next poll
  if (byId("banner").textContent !== trouble) byId("banner").textContent = trouble;      // else it is read out again
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
  draw();
}

const nothingToShow = ({ refused }) => [el("h1", { tabindex: -1 }, "This cannot be shown"), el("p", null, refused, " ", link("", "All jobs"))];

function draw() {
  if (!here.data && !here.refused) return;
  const focused = document.activeElement;
  shown = new Map();
  const content = (here.data ? here.view.draw : nothingToShow)(here);
  for (const id of selected) if (!shown.has(id)) selected.delete(id);   // nobody operates on what he cannot see
  fill("main", content);
  fill("bulk", bulkBar());
  fill("views", NAVIGATION.map(([title, path]) =>
    el("a", { href: BASE + path, "aria-current": here.view.under === title && "true" }, title)));
  if (here.data) here.view.drawn?.(here);
  if (!focused.isConnected || focused.disabled) byId("main").focus({ preventScroll: true });
  here.arrive?.();
  here.arrive = null;
}

const fill = (id, content) => morphChildren(byId(id), content.flat(Infinity).filter(isThere));

function goToLink(event) {
  const a = event.target.closest("a[href]");
  if (a?.getAttribute("href") === "#main") return event.preventDefault(), byId("main").focus();
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

BODY_LIMIT = 1024 * 1024
EXPORTS_AT_ONCE = 4                    # each may take as long as its reader
_exports = threading.BoundedSemaphore(EXPORTS_AT_ONCE)
LIST_LIMIT = 500
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_SECURITY_HEADERS = [
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; worker-src 'self'; img-src 'self' "
     "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"), ("Cache-Control", "no-cache")]
_REASONS = {200: "OK", 304: "Not Modified", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
            408: "Request Timeout", 409: "Conflict", 411: "Length Required", 413: "Content Too Large", 415: "Unsupported Media Type",
            421: "Misdirected Request", 500: "Internal Server Error", 503: "Service Unavailable"}


class _Refused(Exception):
    """A request that is answered with an error: its HTTP status, and the text for people."""

    def __init__(self, status: int, text: str, body: Any = None) -> None:
        super().__init__(text)
        self.status, self.body = status, body if body is not None else {"error": text}


class Page:
    """The status page of a runner, as a WSGI app; the options are those of Runner.serve."""

    def __init__(self, runner: Runner, *, read_only: bool = False, hosts: Iterable[str] = (), password: str | None = None,
                 authorize: Callable[[dict[str, Any]], str | None] | None = None) -> None:
        import secrets
        if password is not None and (not isinstance(password, str) or not password or _text(password, len(password)) != password):
            raise ValueError("password must be a text that is not empty, without lone surrogates")
        if isinstance(hosts, str):
            raise ValueError(f"hosts must be a list of names, got {_short(hosts)}")
        if authorize is not None and not callable(authorize):
            raise ValueError(f"authorize must be a function of the request, got {_short(authorize)}")
        self._runner, self._read_only, self._password, self._authorize = runner, read_only, password, authorize
        self.is_guarded = password is not None or authorize is not None
        self._hosts = {host.lower() for host in hosts}
        self._port: int | None = None                     # of our own server: then the Host header must name it
        self._boot = secrets.token_hex(4)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers: list[tuple[str, str]] = []
        try:
            status, kind, body = self._answer(environ, headers)
        except _Refused as refused:
            status, kind, body = refused.status, "application/json", _json_bytes(refused.body)
        except StoreError as error:                       # which the store has told the log
            status, kind, body = 503, "application/json", _json_bytes({"error": str(error)})
        except (Exception, SystemExit):                   # SystemExit: of authorize()
            _log.exception("the status page failed on %s", environ.get("PATH_INFO", "")[:200])
            status, kind, body = 500, "application/json", _json_bytes({"error": "internal error; see the app's log"})
        if isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        start_response(f"{status} {_REASONS[status]}", [("Content-Type", f"{kind}; charset=utf-8"), *headers, *_SECURITY_HEADERS])
        if environ.get("REQUEST_METHOD") == "HEAD":
            return [b""]
        return [body] if isinstance(body, bytes) else body

    def _answer(self, environ: dict[str, Any], headers: list[tuple[str, str]]) -> tuple[int, str, bytes | Iterator[bytes]]:
        """Return status, content type and body, one that comes piece by piece as an iterator. Raises _Refused."""
        host = self._check_host(environ)
        if environ.get("PATH_INFO", "") == "" and environ.get("SCRIPT_NAME"):     # mounted, and asked for without the last slash
            from urllib.parse import quote
            query = environ.get("QUERY_STRING")
            headers.append(("Location", quote(environ["SCRIPT_NAME"].rpartition("/")[2].encode("latin-1")) + "/" + (f"?{query}" if query else "")))
            return 308, "text/plain", b""
        if self._runner._store.closed:
            raise _Refused(503, f"the runner on {self._runner.path} is shut down")
        path = environ.get("PATH_INFO", "").lstrip("/")
        method = environ.get("REQUEST_METHOD", "GET")
        user = "" if path == "healthz" else self._user(environ, headers)
        if path.startswith("api/"):
            self._check_origin(environ, host)
            parts = path.split("/")[1:]
            if method == "POST":
                self._check_token(environ)
                return 200, "application/json", _json_bytes(self._post(parts, _read_json(environ), user))
        if method not in ("GET", "HEAD"):
            raise _Refused(405, f"{method} is not allowed here")
        if path.startswith("api/"):
            return self._api(parts, environ, headers)
        if path == "healthz":
            self._runner._store.read("SELECT 1")
            return 200, "text/plain", b"ok\n"
        if path == "metrics":
            return 200, "text/plain; version=0.0.4", self._runner._metrics().encode()
        asset = path.removeprefix("jobs/")
        if asset == "page.css":
            return 200, "text/css", PAGE_CSS.encode()
        if asset == "page.js":
            return 200, "text/javascript", PAGE_JS.encode()
        if path in ("", "statistics", "schedules") or path != asset and asset.isascii() and asset.isdigit():
            return 200, "text/html", PAGE_HTML.encode()
        raise _Refused(404, "there is no such page")

    # who may ask

    def _check_host(self, environ: dict[str, Any]) -> str:
        """Return the Host header. _Refused: it is missing, doubled, or a stranger's."""
        host = environ.get("HTTP_HOST", "").lower()
        name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdigit() else (host, "", "")
        # An address, or this machine's own name, cannot be made to lead here by somebody else's DNS.
        own = name in _LOOPBACK or self.is_guarded and (_is_address(name.strip("[]")) or name == _host_name())
        if not (own and (self._port is None or (port or "80") == str(self._port)) or host in self._hosts or name in self._hosts):
            raise _Refused(421, "this host name is not answered; a page that is reached by another name gets hosts=[name]")
        return host

    def _user(self, environ: dict[str, Any], headers: list[tuple[str, str]]) -> str:
        """Return who asks, a name for the job log. _Refused: somebody who may not."""
        import base64
        import hmac
        if self._authorize is not None:
            user = self._authorize(environ)
            if not isinstance(user, str) or not user.strip():            # False, "" and the like admit nobody
                raise _Refused(403, "you may not see this page")
            return _text(user, 200)
        if self._password is None:
            return "web"
        kind, _, coded = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        try:
            given = base64.b64decode(coded, validate=True) if kind.lower() == "basic" else b":"
        except ValueError:
            given = b":"
        name, _, password = given.partition(b":")
        if not hmac.compare_digest(password, self._password.encode()):
            headers.append(("WWW-Authenticate", 'Basic realm="bgjobs", charset="UTF-8"'))
            raise _Refused(401, "this page needs its password")
        return _text(name.decode("utf-8", "replace"), 200) or "web"

    def _check_origin(self, environ: dict[str, Any], host: str) -> None:
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            raise _Refused(403, "requests from other sites are refused")
        own = {f"{scheme}://{host}" for scheme in ("https", environ.get("wsgi.url_scheme", "http"))}      # https: of a proxy before us
        if "HTTP_ORIGIN" in environ and environ["HTTP_ORIGIN"] not in own:
            raise _Refused(403, "requests from other origins are refused")

    def _token(self) -> str:
        """Return what an operation must bring: one text for all processes that serve this file's page, known to no other page."""
        import secrets
        store = self._runner._store
        while not (rows := store.read(PAGE_TOKEN)):
            token = secrets.token_urlsafe(32)
            store.write(lambda tx: tx.execute(KEEP_PAGE_TOKEN, {"token": token}))
        return rows[0][0]

    def _check_token(self, environ: dict[str, Any]) -> None:
        import hmac
        if self._read_only:
            raise _Refused(403, "this page is read-only")
        if "HTTP_ORIGIN" not in environ:
            raise _Refused(403, "an operation needs the Origin header of this page")
        token = environ.get("HTTP_X_BGJOBS_TOKEN", "")
        if not hmac.compare_digest(token.encode("latin-1", "replace"), self._token().encode()):
            raise _Refused(403, "an operation needs the X-Bgjobs-Token that api/session hands out")
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "the body must be application/json")

    # reading

    def _api(self, parts: list[str], environ: dict[str, Any], headers: list[tuple[str, str]]) -> tuple[int, str, bytes]:
        if parts == ["session"]:
            return 200, "application/json", _json_bytes({
                "token": self._boot if self._read_only else self._token(), "read_only": self._read_only, "version": __version__})
        minute = f"-{int(time.time() // 60)}" if parts == ["stats"] else ""      # its windows move on
        asked = hash((*parts, environ.get("QUERY_STRING")))
        tag = f'W/"{self._boot}{asked:x}-{self._runner._store.version()}{minute}"'
        if environ.get("HTTP_IF_NONE_MATCH") == tag:
            return 304, "application/json", b""
        if parts[-1] not in ("stack", "export"):          # which move on without a commit, or are a file
            headers.append(("ETag", tag))
        query = _query(environ.get("QUERY_STRING", ""))
        if parts == ["export"]:
            return self._export(query, headers)
        if parts == ["jobs"]:
            return 200, "application/json", _json_bytes(self._list(query, headers))
        if parts == ["stats"]:
            try:
                return 200, "application/json", _json_bytes(self._runner.stats(query.get("window", "24h"), query.get("name")))
            except ValueError as error:
                raise _Refused(400, str(error)) from None
        if parts == ["schedules"]:
            return 200, "application/json", _json_bytes({"schedules": [schedule.info() for schedule in self._runner.schedules()]})
        if parts == ["runners"]:
            return 200, "application/json", _json_bytes({"runners": [dict(row) for row in self._runner._store.read(RUNNERS)]})
        if parts[0] == "jobs" and len(parts) in (2, 3) and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 19:
            job_id = int(parts[1])
            try:
                info = self._runner._info(job_id)
            except KeyError:
                raise _Refused(404, f"there is no job {job_id}") from None
            if len(parts) == 2:
                return 200, "application/json", _json_bytes(self._shown(info))
            if parts[2] == "logs":
                return 200, "application/json", _json_bytes({"logs": self._log_lines(job_id, query)})
            if parts[2] == "attempts":
                return 200, "application/json", _json_bytes(self._runner._attempts_of(job_id))
            if parts[2] == "stack":
                return 200, "application/json", _json_bytes({"stack": self._stack(job_id)})
        raise _Refused(404, "there is no such resource")

    def _list(self, query: dict[str, str], headers: list[tuple[str, str]]) -> dict[str, Any]:
        runner, filters = self._runner, _filters(query)
        limit = max(1, min(_number(query, "limit", 50), LIST_LIMIT))
        before = _number(query, "before", 0) or None
        try:
            rows, following, counts, unsure = runner._store.page(filters, limit, before)
        except (TypeError, ValueError) as error:
            raise _Refused(400, str(error)) from None
        now = runner._clock()
        infos = [self._shown(describe(row, now, runner._usual)) for row in rows]
        headers.append(("X-Bgjobs-At-Least", ",".join(unsure)))      # the statuses whose counts went out of time
        return {"jobs": infos, "next": following, "counts": counts}

    def _export(self, query: dict[str, str], headers: list[tuple[str, str]]) -> tuple[int, str, Iterator[bytes]]:
        """Answer with all jobs that pass the filters, page by page."""
        import csv
        import io
        form = query.pop("format", "csv")
        if form not in ("csv", "json"):
            raise _Refused(400, f"format must be csv or json, got {_short(form)}")
        if {"before", "limit"} & set(query):
            raise _Refused(400, "an export has all that match: before and limit have no place in it")
        filters, runner = _filters(query), self._runner
        pages = self._pages(filters)
        first = next(pages)                               # a bad filter is refused before the answer begins
        if not _exports.acquire(blocking=False):
            raise _Refused(503, f"{EXPORTS_AT_ONCE} exports are under way; try again later")
        headers.append(("Content-Disposition", f'attachment; filename="jobs.{form}"'))

        def cell(value: Any) -> Any:
            if isinstance(value, (dict, list)):
                value = _dump(value)
            return "'" + value if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value      # no formula of a stranger's

        def pieces() -> Iterator[bytes]:
            try:
                yield b""                                 # from here on the end is reached, whoever drops this
                begun = False
                for rows in itertools.chain([first], pages):
                    infos = [self._shown(describe(row, runner._clock(), runner._usual)) for row in rows]
                    text = io.StringIO()
                    if form == "json":
                        text.writelines(f"{',' if begun or n else '['}\n{_dump(info)}" for n, info in enumerate(infos))
                    elif infos:
                        table = csv.writer(text)
                        if not begun:
                            table.writerow(infos[0])
                        table.writerows([cell(value) for value in info.values()] for info in infos)
                    begun |= bool(infos)
                    yield text.getvalue().encode()
                if form == "json":
                    yield b"\n]\n" if begun else b"[]\n"
            finally:
                _exports.release()
        body = pieces()
        next(body)
        return 200, "text/csv" if form == "csv" else "application/json", body

    def _pages(self, filters: dict[str, Any]) -> Iterator[list[sqlite3.Row]]:
        """Yield all rows that pass, newest first, 500 at a time. _Refused: a bad filter."""
        before = None
        while True:
            try:
                rows = self._runner._store.find(filters, 500, before)
            except (TypeError, ValueError) as error:
                raise _Refused(400, str(error)) from None
            yield rows
            if len(rows) < 500:
                return
            before = rows[-1]["id"]

    def _shown(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "operations": []} if self._read_only else info

    def _log_lines(self, job_id: int, query: dict[str, str]) -> list[dict[str, Any]]:
        unknown = set(query) - {"level", "text", "since", "until", "after", "limit", "tree"}
        if unknown:
            raise _Refused(400, f"unknown filter {sorted(unknown)[0]!r}")
        try:
            return self._runner._logs(job_id, query.get("level") or None, query.get("text") or None,
                                      float(query.get("since") or 0), float(query.get("until") or math.inf),
                                      _number(query, "after", 0), min(_number(query, "limit", 200), 2_000),
                                      query.get("tree") in ("true", "1"))
        except ValueError as error:
            raise _Refused(400, str(error)) from None

    def _stack(self, job_id: int) -> str | None:
        """Return where a job's thread in this process is now."""
        attempt = self._runner._attempts.get(job_id)
        frame = sys._current_frames().get(attempt.thread) if attempt is not None and attempt.thread else None
        frames = traceback.extract_stack(frame) if frame is not None else []
        begun = max((i for i, each in enumerate(frames) if each.name == "_call" and each.filename == __file__), default=None)
        return None if begun is None else "".join(traceback.format_list(frames[begun + 1:])) or None      # from the job's function on

    # operating

    def _post(self, parts: list[str], body: Any, by: str) -> dict[str, Any]:
        kind, operation = parts if len(parts) == 2 else ("", "")
        operations = {"jobs": tuple(TRANSITIONS), "schedules": ("pause", "resume", "run_now", "remove")}.get(kind, ())
        if operation not in operations:
            raise _Refused(404, f"there is no such operation; there are {', '.join(operations or TRANSITIONS)}")
        if not isinstance(body, dict) or len(body) != 1 or not set(body) <= {"ids", "filter"} or kind == "schedules" and "filter" in body:
            raise _Refused(400, 'the body must be {"ids": [...]}' + (' or {"filter": {...}}' if kind == "jobs" else ""))
        if "ids" in body:
            ids = body["ids"]
            if not isinstance(ids, list) or not all(type(i) is int and 0 < i < 1 << 63 for i in ids):
                raise _Refused(400, f"ids must be a list of {kind[:-1]} ids")
        else:
            ids = self._matching(body["filter"])
        done, refused = [], []
        for each in ids:
            try:
                if kind == "jobs":
                    self._runner._operate(operation, each, by)
                else:
                    Schedule(self._runner, each)._operate(operation)
                done.append(each)
            except InvalidOperation as error:
                refused.append({"id": each, "why": str(error)})
            except KeyError:
                refused.append({"id": each, "why": f"there is no {kind[:-1]} {each}"})
        answer = {"done": done, "refused": refused}
        if "ids" in body and len(ids) == 1 and refused:
            raise _Refused(404 if refused[0]["why"].startswith("there is no") else 409, refused[0]["why"], answer)
        return answer

    def _matching(self, given: Any) -> Iterator[int]:
        """Yield the ids that pass a filter, newest first, a page at a time."""
        if not isinstance(given, dict) or not all(isinstance(v, (str, int, float, bool, type(None))) for v in given.values()):
            raise _Refused(400, "filter must be an object like the parameters of api/jobs")
        if {"before", "limit"} & set(given):
            raise _Refused(400, "an operation applies to all that match: before and limit have no place in its filter")
        filters = _filters({name: str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
                            for name, value in given.items() if value is not None or name == "parent"})
        for rows in self._pages(filters):
            yield from [row["id"] for row in rows]


def _is_address(name: str) -> bool:
    import ipaddress
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _host_name() -> str:
    import socket
    return socket.gethostname().lower()


def _json_bytes(value: Any) -> bytes:
    return _dump(value).encode()


def _read_json(environ: dict[str, Any]) -> Any:
    length = environ.get("CONTENT_LENGTH") or ""
    if not (length.isascii() and length.isdigit()):
        raise _Refused(411, "an operation needs a Content-Length")
    if len(length) > 20 or int(length) > BODY_LIMIT:
        raise _Refused(413, f"the body is larger than {BODY_LIMIT:,} bytes")
    try:
        body = environ["wsgi.input"].read(int(length))
    except TimeoutError:
        raise _Refused(408, "the body did not come in time") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not JSON") from None


def _query(text: str) -> dict[str, str]:
    from urllib.parse import parse_qsl
    try:
        return dict(parse_qsl(text, max_num_fields=50))
    except ValueError:
        raise _Refused(400, "the query string has too many fields") from None


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _Refused(400, f"{name} must be a whole number, got {_short(text)}")
    return int(text)


def _filters(query: dict[str, str]) -> dict[str, Any]:
    """Return the filters of `conditions` from a query string's fields."""
    filters: dict[str, Any] = {}
    for name, text in query.items():
        if name in ("before", "limit") or text == "":
            continue
        if name not in FILTERS:
            raise _Refused(400, f"unknown filter {name!r}; the filters are {', '.join(FILTERS)}")
        if name in ("errors", "low_priority", "system"):
            if text not in ("true", "false", "1", "0"):
                raise _Refused(400, f"{name} must be true or false, got {_short(text)}")
            filters[name] = text in ("true", "1")
        elif name == "parent":
            filters[name] = None if text == "none" else _number(query, name, 0)
        elif name in ("created_from", "created_to"):
            try:
                filters[name] = float(text)
            except ValueError:
                raise _Refused(400, f"{name} must be Unix seconds, got {_short(text)}") from None
        else:
            filters[name] = text
    return filters


REQUEST_SECONDS = 10.0             # from the first byte of a request to the last of its answer
CONNECTION_LIMIT = 64


def serve_page(page: Page, host: str, port: int) -> str:
    """Serve a page with http.server on a daemon thread; return its URL, or "" when the port is taken."""
    import io
    import socket
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

    if host not in ("127.0.0.1", "localhost", "::1") and not page.is_guarded:
        raise ValueError(f"host must be a loopback address, got {host!r}, unless password= or authorize= says who may come")
    if not 0 <= port < 65_536:
        raise ValueError(f"port must be 0 to 65535, got {port}")

    class DeadlineReader(io.RawIOBase):
        """Reads a socket until an absolute deadline, which one byte now and then cannot push away."""

        def __init__(self, connection: socket.socket) -> None:
            self._connection, self._deadline = connection, time.monotonic() + REQUEST_SECONDS

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self._connection.settimeout(max(0.001, self._deadline - time.monotonic()))
            return self._connection.recv_into(buffer)

    class Handler(WSGIRequestHandler):
        """One request for each connection: what a refused one leaves unread is never taken for the next."""

        server_version, sys_version = "bgjobs", ""

        def setup(self) -> None:
            super().setup()
            self.rfile = io.BufferedReader(DeadlineReader(self.connection))      # type: ignore[assignment]

        def handle(self) -> None:
            try:
                self.raw_requestline = self.rfile.readline(65537)
                if len(self.raw_requestline) > 65536:
                    self.send_error(414)
                elif self.raw_requestline and self.parse_request():
                    self.connection.settimeout(REQUEST_SECONDS)
                    handler = ServerHandler(self.rfile, self.wfile, io.StringIO(), self.get_environ(), multithread=True)
                    handler.request_handler = self                               # type: ignore[attr-defined]
                    handler.run(self.server.get_app())                           # type: ignore[attr-defined]
            except OSError:
                pass                                      # the client went away, or was too slow

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            body = _json_bytes({"error": self.responses.get(code, ("bad request",))[0]})
            lines = [f"HTTP/1.0 {int(code)} Refused", "Content-Type: application/json", f"Content-Length: {len(body)}",
                     *(f"{name}: {value}" for name, value in _SECURITY_HEADERS)]
            self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug("page: " + format, *args)

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads, allow_reuse_address, request_queue_size = True, os.name != "nt", 64
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        free = threading.BoundedSemaphore(CONNECTION_LIMIT)

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()
            self.server_name, self.server_port = host, self.server_address[1]    # without a look-up in the DNS
            self.setup_environ()

        def process_request(self, request: Any, client_address: Any) -> None:
            if self.free.acquire(blocking=False):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.free.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            _log.debug("page: a request failed", exc_info=True)

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        _log.warning("the status page is not served: port %s of %s cannot be used (%s); jobs go on", port, host, error)
        return ""
    page._port = server.server_port
    server.set_app(page)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="bgjobs-page", daemon=True).start()
    page._runner._servers.append(server)
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{server.server_port}/"


# ---- 16 Command line ------------------------------------------------------------------------------------------

def fingerprint(folder: str) -> dict[str, Any]:
    """Find duplicate files below a folder: the job of `demo`. A child for each subfolder, the largest at low priority."""
    context = current_job()
    counts = context.state or _submit_children(folder)      # a resumed attempt finds its children where they are
    sizes: dict[str, int] = {}
    copies: dict[str, list[str]] = {}
    for child in reversed(jobs(parent=context.id, limit=10**9)):
        result = child.result()
        counts["unreadable"] += result["unreadable"]
        for name, size, digest in result["files"]:
            sizes[digest] = size
            copies.setdefault(digest, []).append(os.path.join(result["folder"], name))
        context.checkpoint()
    groups = sorted(((sizes[digest] * (len(paths) - 1), digest) for digest, paths in copies.items()
                     if len(paths) > 1 and sizes[digest]), reverse=True)
    context.progress(1, 1, f"{len(groups):,} groups of duplicates")
    return {"folder": folder, **counts, "bytes": sum(sizes[digest] * len(paths) for digest, paths in copies.items()),
            "duplicate_groups": len(groups), "wasted_bytes": sum(wasted for wasted, _ in groups),
            "largest_groups": [{"sha256": digest, "size": sizes[digest], "copies": len(copies[digest]),
                                "paths": sorted(copies[digest])[:5]} for _, digest in groups[:20]]}


def _submit_children(folder: str) -> dict[str, int]:
    """Look at all folders, then submit a child for every thousand files in each; return what there is."""
    context = current_job()
    parts, counts = [], {"folders": 0, "files": 0, "unreadable": 0}
    for path, size, names, unreadable in _folders(folder):
        parts += [(size, path, names[i:i + 1_000]) for i in range(0, len(names), 1_000)]
        counts["folders"] += bool(names)
        counts["files"] += len(names)
        counts["unreadable"] += unreadable
        context.progress(0, message=f"looking: {counts['files']:,} files in {counts['folders']:,} folders")
        context.checkpoint()
    largest = max(parts, default=(0, "", []))[1]
    submit_many(fingerprint_files, [(path, names) for _, path, names in parts if path != largest])
    options(low_priority=True).submit_many(fingerprint_files, [(path, names) for _, path, names in parts if path == largest])
    context.progress(0, 1, f"{counts['files']:,} files in {counts['folders']:,} folders")
    context.checkpoint(state=counts)
    return counts


def _folders(folder: str) -> Iterator[tuple[str, int, list[str], int]]:
    """Yield (folder, bytes, names of its regular files, how many entries could not be looked at) for it and all below."""
    errors: list[OSError] = []
    for path, _, entries in os.walk(folder, onerror=errors.append):
        size, names = 0, []
        for name in entries:
            try:
                status = os.lstat(os.path.join(path, name))
            except OSError as error:
                errors.append(error)
                continue
            if status.st_mode & 0o170000 == 0o100000:
                size += status.st_size
                names.append(name)
        if names or errors:
            yield path, size, names, len(errors)
            errors.clear()
    if errors:
        yield folder, 0, [], len(errors)


def fingerprint_files(folder: str, names: list[str]) -> dict[str, Any]:
    """Return the SHA-256 of files in one folder: a child of `fingerprint`."""
    import hashlib
    context = current_job()
    files, unreadable = [], 0
    for name in context.each(names):
        digest, size = hashlib.sha256(), 0
        try:
            with open(os.path.join(folder, name), "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    context.checkpoint()
            files.append([name, size, digest.hexdigest()])
        except OSError as error:
            unreadable += 1
            context.log.warning("%s cannot be read: %s", _text(name), error.strerror)
    return {"folder": folder, "files": files, "unreadable": unreadable}


def _follow(job: Job, out: Any) -> dict[str, Any]:
    """Draw a progress bar on a terminal until the job is over or stopped; return its info."""
    import shutil
    info = job.info()
    while info["status"] not in OVER and info["status"] != STOPPED:
        if out.isatty():
            width = shutil.get_terminal_size().columns
            out.write("\r\x1b[K" + progress_line(info, width))
            out.flush()
        wait([job], timeout=0.2)
        info = job.info()
    if out.isatty():
        out.write("\r\x1b[K")
    return info


def progress_line(info: dict[str, Any], width: int) -> str:
    """Return one line of at most `width` characters: bar, percent, children, time left, message."""
    progress, children = info["progress"], info["children"]
    filled = int(24 * (progress or 0))
    parts = [f"[{'#' * filled}{'-' * (24 - filled)}]", "  ..." if progress is None else f"{progress:5.1%}"]
    if children["total"]:
        parts.append(f"{children['done']:,} of {children['total']:,} children")
    if info["eta"] is not None:
        parts.append(f"{for_people(info['eta'])} left")
    parts += [text for text in (info["phase"], info["message"]) if text]
    line = "  ".join(parts)
    return "".join(c if c.isprintable() else "?" for c in line)[:max(20, width - 1)]


def for_people(seconds: float) -> str:
    """Return a duration like "1 h 5 min", "2 min 10 s" or "3.2 s"."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def _demo(args: Any) -> int:
    folder = os.path.abspath(args.folder)
    if not os.path.isdir(folder):
        raise BgjobsError(f"{folder} is not a folder")
    with contextlib.closing(Runner(args.db, max_workers=args.workers)) as runner:
        url = runner.serve(port=args.port) or runner.serve(port=0)
        print(f"Status page: {url}\nJob file:    {runner.path}", flush=True)
        job = runner.options(key=f"demo {folder}", label=f"Duplicate files below {folder}", run_by="demo").submit(fingerprint, folder)
        info = _follow(job, sys.stderr)
        if info["status"] != FINISHED:
            print(f"job {job.id} is {info['status']}\n{info['error'] or ''}", file=sys.stderr)
            return 1
        _print_report(job.result(), info["duration"])
        if sys.stdout.isatty() and not args.once:
            print("The status page stays up until Ctrl-C.")
            while True:
                time.sleep(3600)
    return 0


def _print_report(report: dict[str, Any], seconds: float) -> None:
    print(f"{report['files']:,} files in {report['folders']:,} folders, {report['bytes'] / 1e6:,.1f} MB, in {for_people(seconds)}; "
          f"{report['unreadable']:,} could not be read\n{report['duplicate_groups']:,} groups of duplicates waste "
          f"{report['wasted_bytes'] / 1e6:,.1f} MB; the largest:")
    for group in report["largest_groups"][:5]:
        print(f"  {group['copies']} copies of {group['size']:,} bytes, sha256 {group['sha256'][:12]}")
        for path in group["paths"][:3]:
            print("    " + path.encode("utf-8", "backslashreplace").decode())


def _run(args: Any) -> int:
    module, colon, name = args.function.partition(":")
    if not colon:
        raise BgjobsError(f"{args.function!r} names no function; write module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function: Any = __import__(module, fromlist=["_"])
        for attribute in name.split("."):
            function = getattr(function, attribute)
    except (ImportError, AttributeError) as error:
        raise BgjobsError(f"cannot find {args.function}: {error}") from None
    with contextlib.closing(Runner(args.db, max_workers=args.workers)) as runner:
        job = runner.submit(function, *(_argument(text) for text in args.args))
        info = _follow(job, sys.stderr)
    if info["status"] != FINISHED:
        print(f"job {job.id} is {info['status']}\n{info['error'] or ''}", file=sys.stderr)
        return 1
    print(json.dumps(info["result"], indent=2))
    return 0


def _work(args: Any) -> int:
    """Be a worker process. At its end running jobs pause at a checkpoint and go back to the file with their state."""
    import signal
    ended = threading.Event()

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)             # once more ends it at once
        ended.set()
    sys.path.insert(0, os.getcwd())
    try:
        runner = Runner(args.db, max_workers=args.workers, modules=args.modules)
    except ImportError as error:
        raise BgjobsError(f"cannot import what it should work for: {error}") from None
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), end)
    print(f"working on {runner.path} with {runner.max_workers} workers; Ctrl-C ends it", file=sys.stderr, flush=True)
    while not ended.wait(1.0):
        pass
    runner.close(args.grace)
    return 0


def _opened(args: Any) -> Any:
    """Open a job file that exists, to look and operate only."""
    path = args.db or os.environ.get("BGJOBS_DB", "bgjobs.db")
    if not os.path.exists(path):
        raise BgjobsError(f"there is no job file {path}; name one with --db")
    return contextlib.closing(Runner(path, start=False))


_COLOURS = {PENDING: "33", RUNNING: "36", STOPPING: "35", STOPPED: "35", FINISHED: "32", FAILED: "31", CANCELLED: "90"}


def _coloured(text: str, status: str) -> str:
    """Return text in the colour of a status, on a terminal whose user has nothing against it (no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m"
    return text


def _plain(value: Any) -> str:
    """Return text that does nothing to a terminal but to stand there."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _clock_time(at: float | None) -> str:
    try:
        return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OSError, OverflowError, ValueError):          # beyond all calendars
        return f"{at:g}"


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    import unicodedata
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _fitted(text: str, cells: int) -> str:
    """Return a text cut or filled up to a number of cells."""
    if _cells(text) > cells:
        while _cells(text) > cells - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (cells - _cells(text))


def print_table(header: list[str], rows: list[list[str]], statuses: Iterable[str] = (), spare: Iterable[str] = ()) -> None:
    """Print a table whose last column takes what the terminal leaves; a narrow one does without the spare columns, first
    those named first. A cell with the row's status has its colour."""
    import shutil
    room = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    table = [header, *rows]
    widths = [max(_cells(row[i]) for row in table) for i in range(len(header))]
    for column in spare:
        if sum(widths[:-1]) + 2 * len(widths) + 20 > room:
            i = table[0].index(column)
            table, widths = [row[:i] + row[i + 1:] for row in table], widths[:i] + widths[i + 1:]
    widths[-1] = max(8, min(widths[-1], room - sum(widths[:-1]) - 2 * (len(widths) - 1)))
    for row, status in itertools.zip_longest(table, [None, *statuses]):
        cells = [_fitted(cell, width) for cell, width in zip(row, widths)]
        print("  ".join(_coloured(cell, status) if status is not None and cell.strip() == status else cell for cell in cells).rstrip())


def _list(args: Any) -> int:
    with _opened(args) as runner:
        filters = {name: getattr(args, name) for name in ("status", "name", "run_by", "q", "parent") if getattr(args, name) is not None}
        filters.update({name: True for name in ("errors", "low_priority", "system") if getattr(args, name)})
        if not filters.keys() & {"parent", "q"} and not args.children:
            filters["parent"] = None
        jobs = [job.info() for job in runner.jobs(limit=args.limit, **filters)]
    if args.json:
        print(json.dumps(jobs, indent=2))
        return 0
    header = ["ID", "Created", "Waiting", "Duration", "Status", "Errors", "Progress", "Children", "Run by", "Name"]
    rows = []
    for job in jobs:
        progress = "" if job["progress"] is None else f"{job['progress']:.0%}"
        children = f"{job['children']['done']:,}/{job['children']['total']:,}" if job["children"]["total"] else ""
        eta = f", {for_people(job['eta'])} left" if job["eta"] is not None else ""
        name = job["label"] or job["name"]
        rows.append([str(job["id"]), _clock_time(job["created_at"]), for_people(job["waiting"]), for_people(job["duration"]), job["status"],
                     str(job["errors"] or ""), progress + eta, children, _plain(job["run_by"] or ""),
                     _plain(f"{name} ({job['phase']})" if job["phase"] else name) + (" (low priority)" if job["low_priority"] else "")])
    print_table(header, rows, [job["status"] for job in jobs], ("Run by", "Created", "Waiting", "Errors", "Children", "Duration"))
    return 0


def _show(args: Any) -> int:
    with _opened(args) as runner:
        job = _job_of(runner, args.id)
        info = _follow(job, sys.stderr) if args.follow else job.info()
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        shown = {name: value for name, value in info.items() if value not in (None, "", [], {}, False)}
        for name, value in shown.items():
            value = (_clock_time(value) if name.endswith("_at") else for_people(value) if name in ("waiting", "duration", "eta")
                     else _coloured(value, value) if name == "status" else value if isinstance(value, str) else json.dumps(value))
            lines = value.split("\n")
            print(f"{name.replace('_', ' '):>12}  " + ("\n" + " " * 14).join(line if name == "status" else _plain(line) for line in lines))
    return 0 if info["status"] not in (FAILED, CANCELLED) else 1


def _logs_command(args: Any) -> int:
    """Print a job's log; with -f until the job is over."""
    with _opened(args) as runner:
        job, after, limit = _job_of(runner, args.id), 0, None if args.all else 1_000
        while True:
            over = job.status in (*OVER, STOPPED)         # first: what it logs before its end is read after this
            lines = job.logs(level=args.level, text=args.text, regex=args.regex, after=after, tree=args.tree, limit=limit)
            limit = None
            for line in lines:
                after = line["id"]
                source = f" [{line['job_id']}]" if args.tree else ""
                print(json.dumps(line) if args.json else f"{_clock_time(line['at'])} {line['level']:<8}{source} "
                      + "\n  ".join(map(_plain, line["message"].split("\n"))), flush=True)
            if not args.follow or over:
                return 0
            time.sleep(0.2)


def _job_of(runner: Runner, job_id: int) -> Job:
    try:
        return runner.get(job_id)
    except KeyError:
        raise BgjobsError(f"there is no job {job_id} in {runner.path}") from None


def _operation(args: Any) -> int:
    """Apply an operation to jobs; say of each what came of it. 1: one was refused."""
    import getpass
    try:
        by = getpass.getuser()
    except Exception:                                     # KeyError, ImportError, OSError: a user without a name
        by = "the command line"
    statuses: dict[int, str] = {}
    refused: list[dict[str, Any]] = []
    with _opened(args) as runner:
        for job_id in args.ids:
            try:
                runner._operate(args.operation, job_id, by)
                statuses[job_id] = runner.get(job_id).status
            except (InvalidOperation, KeyError) as error:
                refused.append({"id": job_id, "why": str(error.args[0])})
    if args.json:
        print(json.dumps({"done": list(statuses), "refused": refused}, indent=2))
    else:
        for job_id, status in statuses.items():
            print(f"job {job_id}: {_coloured(status, status)}")
        for refusal_ in refused:
            print(f"bgjobs: {refusal_['why']}", file=sys.stderr)
    return 1 if refused else 0


def _stats(args: Any) -> int:
    with _opened(args) as runner:
        stats = runner.stats(args.window, args.name)
    if args.json:
        print(json.dumps(stats, indent=2))
        return 0

    def measured(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{for_people(value['avg'])} ({for_people(value['min'])} - {for_people(value['max'])})"
    rows = [[f"{part[what]:,}" for what in ("created", "started", "finished", "failed")] + [measured(part["waiting"]), measured(part["running"]),
            _plain(name)] for name, part in [*((f["name"], f) for f in stats["functions"]), ("all", stats["total"])]]
    header = ["Created", "Started", "Finished", "Failed", "Waiting (least - most)", "Running (least - most)", f"Name, last {args.window}"]
    print_table(header, rows, spare=[header[4], "Started", header[5]])
    return 0


def _serve(args: Any) -> int:
    with _opened(args) as runner:
        url = runner.serve(args.host, args.port, read_only=args.read_only, password=os.environ.get("BGJOBS_PASSWORD") or None)
        if not url:
            raise BgjobsError(f"port {args.port} is taken; give another with --port, or 0 for a free one")
        print(f"Status page: {url}   Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)


def _seconds(text: str) -> float:
    """Return the seconds of a text like "7d" or "90"."""
    number, unit = (text, 1) if text[-1:].isdecimal() else (text[:-1], _UNITS.get(text[-1:], math.nan))
    if not number.replace(".", "", 1).isdecimal() or math.isnan(unit):
        raise ValueError(f"a time is seconds, or a text like 15m, 12h or 7d, got {text!r}")
    return float(number) * unit


def _prune(args: Any) -> int:
    with _opened(args) as runner:
        removed = runner.prune(_seconds(args.finished), _seconds(args.failed))
    print(json.dumps({"removed": removed}) if args.json else f"{removed:,} jobs removed")
    return 0


def _argument(text: str) -> Any:
    """Return a command line argument as JSON, where it is, else as text."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text


def _nothing() -> None:
    """Do nothing: the job of `bench`."""


def _bench(args: Any) -> int:
    """Print what bgjobs reaches beside bare sqlite3 on this machine, in one run."""
    import statistics
    import tempfile
    print(f"bgjobs {__version__}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores; "
          f"medians of {args.repeat} runs, side by side")
    print(f"{'':34}{'bgjobs':>14}{'bare sqlite3':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for title, unit, ours, bare in _BENCHES:
            figures = [(ours(os.path.join(folder, f"{title}-{i}.db")), bare and bare(os.path.join(folder, f"{title}-{i}-bare.db")))
                       for i in range(args.repeat)]
            mine = statistics.median(figure[0] for figure in figures)
            theirs = statistics.median(figure[1] for figure in figures) if bare else None
            print(f"{title:34}{mine:>14,.1f}" + (f"{theirs:>14,.1f}{mine / theirs:>8.2f}" if theirs else " " * 22) + f"  {unit}", flush=True)
    return 0


def _rate(count: int, work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return count / (time.perf_counter() - begun)


def _bare_db(path: str, rows: int) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL",
                      "CREATE TABLE jobs (id INTEGER PRIMARY KEY, fn TEXT, args TEXT, status INTEGER DEFAULT 0)",
                      "CREATE INDEX queued ON jobs(id) WHERE status = 0"):
        db.execute(statement)
    db.executemany("INSERT INTO jobs (fn, args) VALUES (?, ?)", [("nothing", "[]")] * rows)
    return db


def _bench_submit(path: str) -> float:
    with contextlib.closing(Runner(path, start=False)) as runner:
        return _rate(3_000, lambda: [runner.submit(_nothing) for _ in range(3_000)])


def _bare_submit(path: str) -> float:
    with contextlib.closing(_bare_db(path, 0)) as db:
        return _rate(3_000, lambda: [db.execute("INSERT INTO jobs (fn, args) VALUES (?, ?)", ("nothing", "[]")) for _ in range(3_000)])


def _bench_submit_many(path: str) -> float:
    with contextlib.closing(Runner(path, start=False)) as runner:
        return _rate(50_000, lambda: runner.submit_many(_nothing, (() for _ in range(50_000))))


def _bare_submit_many(path: str) -> float:
    with contextlib.closing(_bare_db(path, 0)) as db:
        rows = [("nothing", "[]")] * 10_000

        def insert() -> None:
            for _ in range(5):
                db.execute("BEGIN IMMEDIATE")
                db.executemany("INSERT INTO jobs (fn, args) VALUES (?, ?)", rows)
                db.execute("COMMIT")
        return _rate(50_000, insert)


def _bench_drain(path: str) -> float:
    runner = Runner(path, start=False, max_workers=8)
    ids = runner.submit_many(_nothing, (() for _ in range(5_000)))

    def drain() -> None:
        runner.start()
        runner.shutdown()
    rate = _rate(len(ids), drain)
    assert runner.get(ids[-1]).status == FINISHED
    return rate


def _bare_drain(path: str) -> float:
    with contextlib.closing(_bare_db(path, 5_000)) as db:
        def drain() -> None:
            while rows := db.execute("SELECT id FROM jobs WHERE status = 0 ORDER BY id LIMIT 16").fetchall():
                for status in (1, 2):
                    db.execute("BEGIN IMMEDIATE")
                    db.executemany("UPDATE jobs SET status = ? WHERE id = ?", [(status, row[0]) for row in rows])
                    db.execute("COMMIT")
        return _rate(5_000, drain)


def _bench_latency(path: str) -> float:
    """Return the median milliseconds from submit to result on an idle runner."""
    laps = []
    with contextlib.closing(Runner(path)) as runner:
        for _ in range(100):
            time.sleep(0.005)
            begun = time.perf_counter()
            runner.submit(_nothing).result(10)
            laps.append((time.perf_counter() - begun) * 1e3)
    return sorted(laps)[50]


def _checkpoints() -> float:
    checkpoint = current_job().checkpoint
    begun = time.perf_counter()
    for _ in range(100_000):
        checkpoint()
    return (time.perf_counter() - begun) * 1e4


def _bench_checkpoint(path: str) -> float:
    with contextlib.closing(Runner(path)) as runner:
        return runner.submit(_checkpoints).result(30)


_BENCHES: tuple[tuple[str, str, Callable[[str], float], Callable[[str], float] | None], ...] = (
    ("submit, one by one", "jobs/s", _bench_submit, _bare_submit),
    ("submit_many", "jobs/s", _bench_submit_many, _bare_submit_many),
    ("run 5,000 jobs, 8 workers", "jobs/s", _bench_drain, _bare_drain),
    ("submit to result, idle", "ms", _bench_latency, None),
    ("checkpoint()", "ns", _bench_checkpoint, None),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 a job did not finish, 2 misuse or a file that cannot be used."""
    import argparse
    parser = argparse.ArgumentParser(prog="bgjobs", description="Background jobs in one SQLite file.")
    parser.add_argument("--version", action="version", version=f"bgjobs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[Any], int], help: str) -> Any:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function_of_command=function)
        return sub

    def with_file(sub: Any, json: bool = True) -> None:
        sub.add_argument("--db", metavar="FILE", help="the job file (default: $BGJOBS_DB, else bgjobs.db)")
        if json:
            sub.add_argument("--json", action="store_true", help="print JSON, for programs")

    def with_runner(sub: Any) -> None:
        with_file(sub, json=False)
        sub.add_argument("--workers", type=int, metavar="N", help="jobs that run at once (default: cores + 4)")

    demo = command("demo", _demo, "Find duplicate files below FOLDER with a job for each subfolder, and show it on the status page.")
    demo.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="default: the current one")
    demo.add_argument("--port", type=int, default=8765, help="of the status page (default: %(default)s, else a free one)")
    demo.add_argument("--once", action="store_true", help="end with the job; do not keep the page up")
    with_runner(demo)
    run = command("run", _run, "Run a function as a job and print its result as JSON.")
    run.add_argument("function", metavar="MODULE:FUNCTION")
    run.add_argument("args", nargs="*", metavar="ARG", help="JSON, or else text")
    with_runner(run)
    work = command("work", _work, "Run the jobs of a file in this process, until Ctrl-C or SIGTERM.")
    work.add_argument("modules", nargs="*", metavar="MODULE", help="modules to import, whose functions jobs may name")
    work.add_argument("--grace", type=float, default=GRACE_SECONDS, metavar="SECONDS",
                      help="what running jobs get at the end to reach a checkpoint (default: %(default)s)")
    with_runner(work)
    listing = command("list", _list, "List jobs, the newest first.")
    listing.add_argument("--status", choices=STATUSES, metavar="STATUS", help=f"one of {', '.join(STATUSES)}")
    listing.add_argument("--name", help="of the function")
    listing.add_argument("--run-by", metavar="NAME", help="who asked for it")
    listing.add_argument("-q", metavar="TEXT", help="an id, or text in name, label, arguments, message or run by")
    listing.add_argument("--parent", type=int, metavar="ID", help="the children of a job")
    listing.add_argument("--errors", action="store_true", help="only those with errors")
    listing.add_argument("--low-priority", action="store_true", help="only those that run in periods of low load")
    listing.add_argument("--children", action="store_true", help="children, too, not only roots")
    listing.add_argument("--system", action="store_true", help="system jobs, too")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="how many at most (default: %(default)s)")
    with_file(listing)
    show = command("show", _show, "Show a job. Exit code 1: it has failed or was cancelled.")
    show.add_argument("id", type=int, metavar="ID")
    show.add_argument("-f", "--follow", action="store_true", help="wait until it is over or stopped; on a terminal with a progress bar")
    with_file(show)
    logs = command("logs", _logs_command, "Print a job's log, the newest 1,000 lines.")
    logs.add_argument("id", type=int, metavar="ID")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it is over or stopped")
    logs.add_argument("--all", action="store_true", help="all lines")
    logs.add_argument("--level", help="the least: DEBUG, INFO, WARNING, ERROR")
    logs.add_argument("--text", help="only lines that contain it")
    logs.add_argument("--regex", help="only lines in which it is found")
    logs.add_argument("--tree", action="store_true", help="those of its descendants, too")
    with_file(logs)
    for name, what in (("stop", "Stop jobs at their next checkpoint."), ("resume", "Have stopped or failed jobs go on."),
                       ("force-stop", "Make stopping jobs stopped now."), ("cancel", "Discard pending or stopped jobs for good."),
                       ("restart", "Run finished or failed jobs from scratch."),
                       ("set-low-priority", "Run jobs in periods of low load."), ("remove-low-priority", "Run jobs as others.")):
        sub = command(name, _operation, f"{what} Exit code 1: one was refused.")
        sub.set_defaults(operation=name.replace("-", "_"))
        sub.add_argument("ids", type=int, nargs="+", metavar="ID")
        with_file(sub)
    stats = command("stats", _stats, "Print what was created, started, finished and failed, and how long that took.")
    stats.add_argument("--window", choices=WINDOWS, default="24h", help="default: %(default)s")
    stats.add_argument("--name", help="of one function")
    with_file(stats)
    serve = command("serve", _serve, "Serve the status page of a job file, until Ctrl-C.")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s; another one needs a password in $BGJOBS_PASSWORD")
    serve.add_argument("--port", type=int, default=8765, help="default: %(default)s; 0: a free one")
    serve.add_argument("--read-only", action="store_true", help="without operations")
    with_file(serve, json=False)
    prune = command("prune", _prune, "Remove whole trees that are over for long.")
    prune.add_argument("--finished", default="7d", metavar="TIME", help="how long finished and cancelled ones are kept (default: %(default)s)")
    prune.add_argument("--failed", default="30d", metavar="TIME", help="how long failed ones are kept (default: %(default)s)")
    with_file(prune)
    bench = command("bench", _bench, "Measure bgjobs beside bare sqlite3 on this machine.")
    bench.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                    # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    args = parser.parse_args(arguments)
    try:
        code = args.function_of_command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:                               # `bgjobs logs 5 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BgjobsError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"bgjobs: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        if isinstance(error, OSError):                    # of the output: it would be tried once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2
    except KeyboardInterrupt:
        print("\nbgjobs: interrupted; unfinished jobs wait in the file and go on with the next start", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.modules.setdefault("bgjobs", sys.modules["__main__"])      # `import bgjobs` in a job's module is this very file
    sys.exit(main())
