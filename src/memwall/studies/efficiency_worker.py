"""A process that runs each measured job in a fork of its own, so that all start from the same memory.

`Worker(module)` starts `python -m memwall.studies.efficiency_worker MODULE`, which imports that module once and then
waits. `call(name, request)` has it fork: the child runs `module.name(request, report)` and ends, and everything it
allocated with it. What the parent imported is shared, so a job costs no start-up, and no job sees another's heap.

The protocol is a JSON object a line: {"call", "request"} in; {"progress": [done, whole, what]} and one of {"result"} or
{"error"} out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any

from memwall.errors import InputError, MemwallError

Report = Callable[[int, int, str], None]


class Worker:
    """See the module. A context; the process ends with it."""

    def __init__(self, module: str, *, threads: int | None = None) -> None:
        """threads: of libraries that read OMP_NUM_THREADS."""
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin would count as work
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def call(self, name: str, request: dict[str, Any], report: Report | None = None) -> Any:
        """The job's result. InputError with what the job said where it failed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"call": name, "request": request}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise InputError(f"{name}: the measuring process has ended") from None
        for line in process.stdout:
            told = json.loads(line)
            if "progress" in told:
                if report is not None:
                    report(*told["progress"])
            elif "error" in told:
                raise InputError(f"{name}: {told['error']}")
            else:
                return told["result"]
        raise InputError(f"{name}: the measuring process has ended")

    def close(self) -> None:
        """Ends the process; a job that runs is ended too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()  # a job that reports now gets no reader, and ends
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def say(told: dict[str, Any]) -> None:
    """One line to whoever asked."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _job(module: Any, asked: dict[str, Any]) -> int:
    """In the child; its exit status."""
    try:
        job = getattr(module, asked["call"])
        say({"result": job(asked["request"], lambda done, whole, what: say({"progress": [done, whole, what]}))})
    except MemwallError as error:
        say({"error": str(error)})
    except BrokenPipeError:
        return 1
    except MemoryError:
        say({"error": "not enough memory"})
    except Exception as error:
        traceback.print_exc()  # to standard error: a fault of ours, not of the input
        say({"error": f"{type(error).__name__}: {error}"})
    return 0


def serve(name: str) -> None:
    """Reads requests until there are no more."""
    module = import_module(name)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = _job(module, json.loads(line))
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            try:
                say({"error": f"the job's process ended with status {os.waitstatus_to_exitcode(status)}"})
            except BrokenPipeError:
                return


if __name__ == "__main__":
    serve(sys.argv[1])
