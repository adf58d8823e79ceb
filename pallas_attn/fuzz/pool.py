"""Many seeds in many processes: one that dies is reported, and the rest go on.

Tracing is Python, so that threads of one process wait for each other; a process has a
JAX of its own, a share of the GPU's memory, and one thread for linear algebra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from pallas_attn.fuzz.job import Options, plan_of, prepare, Result, run
from pallas_attn.fuzz.plan import describe
from pallas_attn.fuzz.run import Finding


# Of all processes together; the rest is for what their runtimes keep.
MEMORY_SHARE = 0.8
# A process forgets its programs, and is replaced, after so many calls.
FORGET, RETIRE = 20, 200
# One call with its compiles; interpreted it may take minutes.
MOST_SECONDS = 900.0


def run_all(
    seeds: Iterable[int],
    options: Options,
    processes: int,
    *,
    deadline: float | None = None,
    most_seconds: float = MOST_SECONDS,
    serve: Callable[[Connection, Options], None] | None = None,
) -> Iterator[Result]:
    """The result of every seed, in the order in which they end.

    Args:
        seeds: What to run.
        options: Common to all.
        processes: How many at a time.
        deadline: On `time.monotonic`'s clock: no call starts later.
        most_seconds: A call that takes longer is reported, and its process ended.
        serve: What a process does; None: runs the seeds that it is sent.
    """
    rest = iter(seeds)

    def next_seed() -> int | None:
        late = deadline is not None and time.monotonic() > deadline
        return None if late else next(rest, None)

    with _environment(processes):
        workers = []
        for _ in range(processes):
            if (seed := next_seed()) is None:
                break
            workers.append(_Worker(options, seed, serve or _serve))
        while workers:
            pipes = {worker.pipe: worker for worker in workers}
            ready = [pipes[pipe] for pipe in wait(list(pipes), timeout=1.0)]
            late = [x for x in workers if x not in ready and x.taken > most_seconds]
            for worker in [*ready, *late]:
                yield worker.result(late=worker in late)
                seed = next_seed()
                if seed is not None and worker.usable:
                    worker.give(seed)
                    continue
                worker.end()
                workers.remove(worker)
                if seed is not None:
                    workers.append(_Worker(options, seed, serve or _serve))


class _Worker:
    """A process, the seed that it runs, and whether it can run another."""

    def __init__(
        self,
        options: Options,
        seed: int,
        serve: Callable[[Connection, Options], None],
    ):
        context = multiprocessing.get_context("spawn")
        self.options = options
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, options), daemon=True
        )
        self.process.start()
        theirs.close()  # so that its end is seen
        self.usable, self.calls = True, 0
        self.give(seed)

    @property
    def taken(self) -> float:
        return time.monotonic() - self.start

    def give(self, seed: int) -> None:
        self.seed, self.start = seed, time.monotonic()
        with contextlib.suppress(OSError):  # dead: `result` says so
            self.pipe.send(seed)

    def result(self, *, late: bool) -> Result:
        """What its process sent; where it died or is late, that."""
        self.calls += 1
        if not late:
            with contextlib.suppress(EOFError, OSError):
                found: Result = self.pipe.recv()
                self.usable = not found.fatal and self.calls < RETIRE
                return found
        self.usable = False
        self.process.join(timeout=0 if late else 10)
        why = f"no end after {self.taken:.0f} s"
        if not late:
            why = f"the process died, exit code {self.process.exitcode}"
        plan = plan_of(self.seed, self.options)
        finding = Finding("?", "late" if late else "died", note=why)
        return Result(self.seed, describe(plan), [finding], 0, self.taken)

    def end(self) -> None:
        self.pipe.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, options: Options) -> None:
    """A process: seeds in, results out, until the pipe is closed or CUDA is lost."""
    import jax

    prepare(options)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        for calls in range(1, RETIRE + 1):
            found = run(pipe.recv(), options)
            pipe.send(_plain(found))
            if found.fatal:
                os._exit(1)  # its runtime would wait for a lost device
            if calls % FORGET == 0:
                jax.clear_caches()


def _plain(found: Result) -> Result:
    """With Python's numbers: nothing of a library has to be there to read it."""
    findings = [
        dataclasses.replace(
            x, error=float(x.error), allowed=float(x.allowed), size=float(x.size)
        )
        for x in found.findings
    ]
    return dataclasses.replace(found, findings=findings)


@contextlib.contextmanager
def _environment(processes: int) -> Iterator[None]:
    """What the processes find in their environment; the user's own settings win."""
    given: dict[str, Any] = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / processes:.3f}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    before = dict(os.environ)
    flags = os.environ.get("XLA_FLAGS", "")
    if "force_compilation_parallelism" not in flags:
        one = "--xla_gpu_force_compilation_parallelism=1"
        os.environ["XLA_FLAGS"] = f"{flags} {one}".strip()
    for name, value in given.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
