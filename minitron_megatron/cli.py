"""The command line: `minitron VERB [key=value ...]`.

Composes and checks the settings before any heavy import, then calls the verb's function: in this process, as one of
the ranks that torchrun or srun started, or on ranks that it starts itself.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from minitron_megatron import __version__
from minitron_megatron.artifacts.lease import lease_for
from minitron_megatron.config.compose import as_used, compose, load_named_plugins, read_settings, shipped
from minitron_megatron.config.describe import describe, summary
from minitron_megatron.config.reader import near
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.config.verbs import DISTRIBUTED, SHARED, VERBS, verb_function
from minitron_megatron.disk import convert_os_errors
from minitron_megatron.errors import PREEMPTED, ConfigError, LostWorkerError, Preempted, UserError, raise_if_any
from minitron_megatron.launch.local import ROLE, run_ranks
from minitron_megatron.launch.world import ranks_to_start, slurm_environment, world_problems
from minitron_megatron.process import set_up_logging, update_environment
from minitron_megatron.process_tree import watched

logger = logging.getLogger(__name__)

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        exit status: 0; 2 for an error the user can fix; 75 if a signal stopped a run that can resume; 130 after
        Ctrl-C; 141 if the reader of its output has left.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments, file = _without_file(arguments)
    options = {argument for argument in arguments if argument.startswith("-")}
    words = [argument for argument in arguments if argument not in options]
    verb, overrides = (words[0] if words else None), words[1:]
    try:
        with convert_os_errors():
            status = _run(verb, overrides, options, file)
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `minitron ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 128 + signal.SIGPIPE
    except UserError as error:
        _print_error(verb, error)
        return error.exit_status
    except Preempted as stop:
        logger.info("%s", stop)
        _write_error_file(str(stop), PREEMPTED)
        return PREEMPTED
    except KeyboardInterrupt:
        return INTERRUPTED


def _without_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """Splits off `--config FILE` or `--config=FILE` from the arguments."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], argument.removeprefix("--config=")
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
    return arguments, None


def _run(verb: str | None, overrides: list[str], options: set[str], file: str | None) -> int:
    known = {"-h", "--help", "--cfg", "--version", *(("-m", "--multirun") if verb == "launch" else ())}
    if unknown := options - known:
        raise ConfigError(
            [f"unknown option {option}: {near(option, ['--help', '--cfg'])}" for option in sorted(unknown)]
        )
    if "--version" in options:
        print(__version__)
        return 0
    if verb is None:
        print(_overview())
        return 0
    if verb not in SCHEMAS:
        raise ConfigError([f"unknown command {verb!r}: {near(verb, list(SCHEMAS))}"])
    if options & {"-h", "--help"}:
        if verb in VERBS:  # plugins may add settings
            load_named_plugins(verb, overrides)
        print(f"minitron {verb}: {summary(verb)}\n\n{describe(verb)}")
        return 0
    if verb == "launch":
        from minitron_megatron.launching import command

        if file:
            raise ConfigError([f"--config {file} is of no use to launch: give settings as key=value"])
        return command(overrides, bool(options & {"-m", "--multirun"}), "--cfg" in options)
    if file and overrides:
        raise ConfigError([f"--config {file} has every setting of {verb}: leave out {' '.join(overrides)}"])
    settings = read_settings(verb, Path(file)) if file else compose(verb, overrides)
    if "--cfg" in options:
        print(as_used(settings), end="")
        return 0
    return _start(verb, ["--config", file] if file else overrides, settings)


def _start(verb: str, arguments: list[str], settings: Any) -> int:
    """Runs a verb in the current world of ranks, or in ranks that it starts."""
    update_environment(slurm_environment(os.environ))
    raise_if_any(world_problems(os.environ))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ and ranks_to_start(verb, settings) > 1:
        with lease_for(settings):
            return run_ranks(ranks_to_start(verb, settings), [verb, *arguments])
    if verb in DISTRIBUTED:
        settings.parallel.in_world(world_size)
    elif world_size > 1 and verb not in SHARED:
        raise ConfigError([f"{verb} runs in one process, and here are {world_size}: start it without a launcher"])
    rank = os.environ.get("RANK")
    set_up_logging(is_first=rank in (None, "0"))
    # Somebody who starts ranks without a launcher may leave them alone.
    parent = os.getppid() if rank and "TORCHELASTIC_RUN_ID" in os.environ else None
    what = f"rank {rank}" if rank else f"minitron {verb}"
    with watched(what, parent, helpers=True, tell=lambda line: _write_error_file(line, LostWorkerError.exit_status)):
        verb_function(verb)(settings)
    return 0


def _overview() -> str:
    lines = [f"  {verb:<10}{summary(verb)}" for verb in SCHEMAS]
    return "\n".join(
        [
            "Usage: minitron VERB [key=value ...]",
            "",
            *lines,
            "",
            "  minitron VERB --help                     the settings of a verb",
            "  minitron VERB key=value ... --cfg        print the resolved settings without running",
            f"  minitron compress experiment=NAME        a whole recipe: {', '.join(shipped('experiment'))}",
        ]
    )


def _print_error(verb: str | None, error: UserError) -> None:
    """Prints an error once, whatever the number of ranks that raise it.

    The launcher prints errors that only other ranks than the first raise. Ranks started by `run_ranks` leave all of
    them to the launcher.
    """
    start = f"minitron {verb}: " if verb else "minitron: "
    message = "\n".join(start + line for line in str(error).splitlines())
    has_launcher = _write_error_file(message, error.exit_status)
    left_to_launcher = has_launcher and (os.environ.get("ROLE_NAME") == ROLE or os.environ.get("RANK", "0") != "0")
    if not left_to_launcher:
        print(message, file=sys.stderr)


def _write_error_file(message: str, status: int) -> bool:
    """Tells the launcher, if there is one, why this rank ends.

    torch's elastic launcher and the script of a Slurm job give every rank a file for this. Otherwise a launcher, which
    ends all ranks when the first one leaves, would only know their exit statuses.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    extra = {"timestamp": str(int(time.time())), "exit_status": status}
    Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
