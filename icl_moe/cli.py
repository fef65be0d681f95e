"""The command line `icl-moe`, with one verb for each stage. Every verb imports what it needs when
it runs, so that --help answers at once.
"""

import argparse
import errno
import io
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from icl_moe import __version__
from icl_moe.commands import data, evaluation, inference, tokenizer, training
from icl_moe.errors import InputError, RankError, StoppedError, UnsavedError
from icl_moe.messages import is_main, say, say_on_main
from icl_moe.signals import before_the_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 if it succeeded; 2, with one sentence on standard
    error, if the input is wrong or the operating system refuses a file; 1, with one sentence, if a
    run ends with steps that are in no checkpoint; 128 + the number of a signal that stopped a
    sequence of stages, with one sentence.
    """
    _prepare_streams()
    done = False
    try:
        try:
            options = parse_arguments(arguments)
            code = options.run(options) or 0
            done = True
            return code
        except SystemExit:  # argparse has printed its message.
            done = True
            raise
        finally:
            sys.stdout.flush()  # Now, while an error of writing can still be handled.
    except InputError as error:
        _say_once(error)
        return 2
    except UnsavedError as error:
        say_on_main(str(error))
        return 1
    except StoppedError as error:
        say(str(error))
        return 128 + error.number
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept.")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _discard_closed_pipes():
            # The reader of our output, such as `head`, has ended. If the work was not done yet, the
            # exit code must not say that it was: it is the one that other commands have then.
            return 0 if done else 128 + signal.SIGPIPE
        return _answer_system(error)
    finally:
        if arguments is None:
            # Only the interpreter's own clean-up is left: a Ctrl-C ends it without a message.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


_FOR_RANK_0 = 10.0
"""Seconds that a silent rank leaves rank 0 to print the error that both find, before it ends. When
rank 0 has ended, the launcher ends this rank too, without waiting for that time.
"""

_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
)
"""Errors of the machine, which are reported even if they name no file."""


def _answer_system(error: OSError) -> int:
    """Report in one sentence what the operating system refused, and return the exit code. Errors
    that point to a bug in this code are raised again.
    """
    if error.filename is None and error.errno not in _OF_THE_MACHINE:
        raise error
    where = error.filename if error.filename is not None else "standard output or a file"
    try:
        sys.stdout.flush()
    except OSError:
        where = "standard output"
        _discard(sys.stdout)
    say(f"{where}: {error.strerror}.")
    return 2


def _discard_closed_pipes() -> bool:
    """Discard what is written to standard output or standard error if it is a pipe without a
    reader; returns whether there was such a pipe.
    """
    closed = []
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            closed.append(stream)
            _discard(stream)
    return bool(closed)


def _discard(stream: TextIO) -> None:
    """Discard what a stream holds in its buffer, and everything that is written to it later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare_streams() -> None:
    """Make sure that printing cannot fail: open standard streams that are closed, and escape
    characters in file names that cannot be encoded.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is the stream's own: no other file may get it.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say_once(error: InputError) -> None:
    """Print an error once. Under a launcher every rank finds the same error, and rank 0 prints it.
    But an error may concern one machine only, so the first rank of every other machine prints it
    with the name of that machine, and a RankError is printed by the rank that raises it.
    """
    if is_main() or isinstance(error, RankError):
        say(str(error))
    elif os.environ.get("LOCAL_RANK") == "0":
        say(str(error), machine=platform.node())
    elif before_the_run():
        # Launchers end all ranks as soon as one has ended, and rank 0 may be slower to find this.
        time.sleep(_FOR_RANK_0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of this process. `run` of the result executes it. Ends
    the process with a message, as argparse does, if there is no such command.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse reads positional arguments in one group, so settings after an option remain unparsed.
    if rest and not (
        hasattr(options, "overrides")
        and all("=" in each and not each.startswith("-") for each in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icl-moe", description="Multimodal in-context learning with a sparse decoder."
    )
    parser.add_argument("--version", action="version", version=f"icl-moe {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    data.add_shards(verbs)
    data.add_episodes(verbs)
    tokenizer.add_tokenizer(verbs)
    training.add_train(verbs)
    training.add_export(verbs)
    evaluation.add_evaluate(verbs)
    evaluation.add_predictions(verbs)
    evaluation.add_compare(verbs)
    inference.add_segment(verbs)
    inference.add_caption(verbs)
    inference.add_label(verbs)
    inference.add_web(verbs)
    training.add_demo(verbs)
    training.add_reproduce(verbs)
    return parser
