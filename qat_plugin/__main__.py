"""The ``qat`` command. torch and Lightning are imported only once there is something to run."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from qat_plugin import __version__
from qat_plugin.config.arguments import Arguments, parse
from qat_plugin.errors import QatError

MISTAKE = 2
INTERRUPTED = 130
READER_GONE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0 done, 2 a mistake of the user's (one message on stderr), 130 interrupted and resumable, 141 when the reader
        of its output went away (``qat --help | head``). A bug raises.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        return _read(lambda: _run(parse(given), given))
    except QatError as error:
        print(f"qat: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:  # before a run's folder exists
        print("qat: stopped; no run had begun, so there is nothing to resume", file=sys.stderr)
        return INTERRUPTED


def _read(act: Callable[[], int]) -> int:
    """The exit code of what prints, 141 where its reader goes away (``qat --help | head``)."""
    try:
        code = act()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return READER_GONE
    return code


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed; from then on it goes nowhere, at the end of the process too."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run(arguments: Arguments, given: Sequence[str]) -> int:
    if arguments.version:
        print(f"qat_plugin {__version__}")
    elif arguments.help:
        from qat_plugin.config.usage import help_text

        print(help_text(arguments.config_dirs))
    elif arguments.lists_recipes:
        from qat_plugin.config.usage import listing

        print(listing(arguments.config_dirs))
    else:
        from qat_plugin.config.launch import Job, launch

        # OpenMP threads that spin at barriers make two threads on a busy machine several times slower than one.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        def run(job: Job) -> int:
            if sys.stderr.isatty():
                print("loading torch, Lightning and transformers ...", file=sys.stderr)
            from qat_plugin.runs.jobs import run_job  # not before the recipe is known to be sound

            return _read(lambda: run_job(job, given))  # here already: Hydra would tell of the error

        return launch(arguments, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
